"""Commands of an SMMUv3 that users may send (IHI 0070, 4), as Linux checks them (arm_vsmmu_validate_user_cmd)."""

from __future__ import annotations

import enum
import errno

from vmodel.errors import IommuError
from vmodel.iommu.capabilities import Capabilities
from vmodel.regs import Bit, Bits, Layout
from vmodel.span import Span


class SmmuOp(enum.IntEnum):
    """Opcodes."""

    CFGI_CD = 0x05
    CFGI_CD_ALL = 0x06
    TLBI_NH_ALL = 0x10
    TLBI_NH_ASID = 0x11
    TLBI_NH_VA = 0x12
    TLBI_NH_VAA = 0x13
    TLBI_NSNH_ALL = 0x30
    ATC_INV = 0x40


class Tlbi0(Layout):
    """Word 0 of CMD_TLBI_*."""

    OP = Bits(0, 7)
    NUM = Bits(12, 16)
    SCALE = Bits(20, 25)
    VMID = Bits(32, 47)
    ASID = Bits(48, 63)


class Tlbi1(Layout):
    """Word 1 of CMD_TLBI_*."""

    LEAF = Bit(0)
    TTL = Bits(8, 9)
    TG = Bits(10, 11, doc="granule of a range: 4, 16, 64 KiB")
    ADDRESS = Bits(12, 63)


class Atc0(Layout):
    """Word 0 of CMD_ATC_INV and CMD_CFGI_*."""

    OP = Bits(0, 7)
    GLOBAL = Bit(9)
    SSV = Bit(11)
    SSID = Bits(12, 31)
    SID = Bits(32, 63)


class Atc1(Layout):
    """Word 1 of CMD_ATC_INV."""

    SIZE = Bits(0, 5, doc="2**SIZE pages of 4 KiB; 52: all")
    ADDRESS = Bits(12, 63)


_LEAF = 1
_MASKS = {
    SmmuOp.TLBI_NSNH_ALL: (0, 0),
    SmmuOp.TLBI_NH_ALL: (Tlbi0.VMID.mask, 0),
    SmmuOp.TLBI_NH_ASID: (Tlbi0.VMID.mask | Tlbi0.ASID.mask, 0),
    SmmuOp.TLBI_NH_VA: (Tlbi0.VMID.mask | Tlbi0.ASID.mask, _LEAF | Tlbi1.ADDRESS.mask),
    SmmuOp.TLBI_NH_VAA: (Tlbi0.VMID.mask, _LEAF | Tlbi1.ADDRESS.mask),
    SmmuOp.ATC_INV: (Atc0.SID.mask, Atc1.SIZE.mask | Atc1.ADDRESS.mask),
    SmmuOp.CFGI_CD: (Atc0.SID.mask, _LEAF),
    SmmuOp.CFGI_CD_ALL: (Atc0.SID.mask, 0),
}
#: More bits of word 0 where the SMMU has substreams.
_SUBSTREAMS = {
    SmmuOp.ATC_INV: Atc0.SSV.mask | Atc0.SSID.mask | Atc0.GLOBAL.mask,
    SmmuOp.CFGI_CD: Atc0.SSID.mask,
}
#: SCALE above 31 needs IDR5.DS, which is not there.
_RANGE = (Tlbi0.NUM.mask | Tlbi0.SCALE.mask & ~(1 << 25), Tlbi1.TG.mask | Tlbi1.TTL.mask)


def command_words(entry: bytes) -> tuple[int, int]:
    """The words of a command.  IommuError(EINVAL): it does not have 16 bytes."""
    if len(entry) != 16:
        raise IommuError(errno.EINVAL, f"a command of {len(entry)} bytes")
    return int.from_bytes(entry[:8], "little"), int.from_bytes(entry[8:], "little")


def check_command(words: tuple[int, int], can: Capabilities) -> None:
    """IommuError(EIO): a command, a field or a value that users must not send."""
    code = words[0] & Tlbi0.OP.mask
    if code not in set(SmmuOp):
        raise IommuError(errno.EIO, f"command {code:#x}")
    op = SmmuOp(code)
    first, second = _MASKS[op]
    if op in (SmmuOp.TLBI_NH_VA, SmmuOp.TLBI_NH_VAA):
        _check_range(*words)
        first, second = first | _RANGE[0], second | _RANGE[1]
    if op is SmmuOp.ATC_INV and (not can.page_requests or Atc1(words[1]).SIZE > 52):
        raise IommuError(errno.EIO, "ATC_INV without ATS, or of too large a size")
    if can.pasid_bits:
        first |= _SUBSTREAMS.get(op, 0)
    if words[0] & ~(first | Tlbi0.OP.mask) or words[1] & ~second:
        raise IommuError(errno.EIO, f"{op.name} {words[0]:#x} {words[1]:#x}: reserved bits")


def _check_range(word0: int, word1: int) -> None:
    counted, fields = bool(word0 & (Tlbi0.NUM.mask | Tlbi0.SCALE.mask)), Tlbi1(word1)
    without = not fields.TG and (counted or fields.TTL)
    small = fields.TG == 2 and fields.TTL == 1
    if without or small or (fields.TG and not counted and not fields.TTL):
        raise IommuError(errno.EIO, f"a range of NUM, SCALE, TG and TTL that is reserved: {word0:#x} {word1:#x}")


def range_of(words: tuple[int, int]) -> Span | None:
    """The IOVAs of TLBI_NH_VA(A): (NUM + 1) << SCALE granules; None: they wrap, so all (4.4.1.1)."""
    fields, word1 = Tlbi0(words[0]), Tlbi1(words[1])
    granule = 12 if not word1.TG else 10 + 2 * word1.TG
    size = (fields.NUM + 1 << fields.SCALE) << granule
    start = (word1.ADDRESS << 12) & -(1 << granule)
    return Span(start, start + size - 1) if start + size <= 1 << 64 else None
