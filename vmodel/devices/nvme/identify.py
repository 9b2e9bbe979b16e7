"""Identify data structures (NVMe 1.4, 5.15.2), 4096 bytes each."""

from __future__ import annotations

import functools
import struct
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from construct import Array, Bytes, BytesInteger, Int8ul, Int16ul, Int32ul, Int64ul, Padding, Struct

from vmodel.devices.nvme.command import BROADCAST, NvmeCommand
from vmodel.devices.nvme.events import LIMIT as EVENT_LIMIT
from vmodel.devices.nvme.firmware import GRANULARITY, SLOTS
from vmodel.devices.nvme.health import CRITICAL_TEMPERATURE, ERROR_ENTRIES, WARNING_TEMPERATURE
from vmodel.devices.nvme.io import ATOMIC_COMPARE_WRITE, MAX_COPY, MAX_COPY_RANGE, MAX_COPY_RANGES
from vmodel.devices.nvme.namespace import Namespace
from vmodel.devices.nvme.params import LBA_SIZES, MAX_NAMESPACES
from vmodel.devices.nvme.regs import VERSION
from vmodel.devices.nvme.status import CommandError, NvmeStatus
from vmodel.span import PAGE

if TYPE_CHECKING:
    from vmodel.devices.nvme.controller import Nvme

SIZE = 4096
#: The controller's own identifier.
CONTROLLER_ID = 0
#: Most outstanding Abort commands, less 1 (ACL): each is carried out at once.
ABORT_LIMIT = 3
#: Granularity of the keep alive timer, in 100 ms (KAS).
KEEP_ALIVE_GRANULARITY = 1
#: SANICAP: crypto erase, block erase, overwrite; No-Deallocate Inhibited is clear, and nothing is modified afterwards.
SANITIZE_CAPABILITIES = 0b111 | 1 << 30
#: A locally administered identifier, as the model has no organisation's OUI.
_IEEE = bytes.fromhex("000002")
#: Most entries of a list of namespaces, and of a list of controllers.
LIST_ENTRIES, CONTROLLER_ENTRIES = 1024, 2047

#: CNS values that name an I/O command set in Dword 11.
_OF_A_COMMAND_SET = frozenset((0x05, 0x06, 0x07, 0x1A, 0x1B))

_Int128ul = BytesInteger(16, swapped=True)

_PowerState = Struct(
    "maximum_power" / Int16ul,  # in centiwatts
    Padding(1),
    "flags" / Int8ul,
    "entry_latency" / Int32ul,  # in microseconds
    "exit_latency" / Int32ul,
    Padding(20),
)

#: Figure 247.  Numbers in comments are the offsets there.
Controller = Struct(
    "vid" / Int16ul,
    "ssvid" / Int16ul,
    "sn" / Bytes(20),
    "mn" / Bytes(40),
    "fr" / Bytes(8),  # 64
    "rab" / Int8ul,
    "ieee" / Bytes(3),
    "cmic" / Int8ul,
    "mdts" / Int8ul,
    "cntlid" / Int16ul,
    "ver" / Int32ul,  # 80
    "rtd3r" / Int32ul,
    "rtd3e" / Int32ul,
    "oaes" / Int32ul,
    "ctratt" / Int32ul,  # 96
    "rrls" / Int16ul,
    Padding(9),
    "cntrltype" / Int8ul,  # 111
    "fguid" / Bytes(16),
    "crdt" / Array(3, Int16ul),  # 128
    Padding(106),
    "management_interface" / Bytes(16),  # 240
    "oacs" / Int16ul,
    "acl" / Int8ul,
    "aerl" / Int8ul,
    "frmw" / Int8ul,  # 260
    "lpa" / Int8ul,
    "elpe" / Int8ul,
    "npss" / Int8ul,
    "avscc" / Int8ul,
    "apsta" / Int8ul,
    "wctemp" / Int16ul,
    "cctemp" / Int16ul,
    "mtfa" / Int16ul,
    "hmpre" / Int32ul,  # 272
    "hmmin" / Int32ul,
    "tnvmcap" / _Int128ul,
    "unvmcap" / _Int128ul,
    "rpmbs" / Int32ul,  # 312
    "edstt" / Int16ul,
    "dsto" / Int8ul,
    "fwug" / Int8ul,
    "kas" / Int16ul,  # 320
    "hctma" / Int16ul,
    "mntmt" / Int16ul,
    "mxtmt" / Int16ul,
    "sanicap" / Int32ul,  # 328
    "hmminds" / Int32ul,
    "hmmaxd" / Int16ul,
    "nsetidmax" / Int16ul,
    "endgidmax" / Int16ul,
    "anatt" / Int8ul,
    "anacap" / Int8ul,
    "anagrpmax" / Int32ul,  # 344
    "nanagrpid" / Int32ul,
    "pels" / Int32ul,
    Padding(156),
    "sqes" / Int8ul,  # 512
    "cqes" / Int8ul,
    "maxcmd" / Int16ul,
    "nn" / Int32ul,
    "oncs" / Int16ul,  # 520
    "fuses" / Int16ul,
    "fna" / Int8ul,
    "vwc" / Int8ul,
    "awun" / Int16ul,
    "awupf" / Int16ul,
    "nvscc" / Int8ul,
    "nwpc" / Int8ul,
    "acwu" / Int16ul,  # 532
    "ocfs" / Int16ul,  # technical proposal 4065
    "sgls" / Int32ul,
    "mnan" / Int32ul,
    Padding(224),
    "subnqn" / Bytes(256),  # 768
    Padding(1024),
    "power_states" / Array(32, _PowerState),  # 2048
    Padding(1024),
)

#: Figure 245.
NamespaceData = Struct(
    "nsze" / Int64ul,
    "ncap" / Int64ul,
    "nuse" / Int64ul,
    "nsfeat" / Int8ul,  # 24
    "nlbaf" / Int8ul,
    "flbas" / Int8ul,
    "mc" / Int8ul,
    "dpc" / Int8ul,
    "dps" / Int8ul,
    "nmic" / Int8ul,
    "rescap" / Int8ul,
    "fpi" / Int8ul,
    "dlfeat" / Int8ul,
    "nawun" / Int16ul,  # 34
    "nawupf" / Int16ul,
    "nacwu" / Int16ul,
    "nabsn" / Int16ul,
    "nabo" / Int16ul,
    "nabspf" / Int16ul,
    "noiob" / Int16ul,
    "nvmcap" / _Int128ul,  # 48
    "npwg" / Int16ul,
    "npwa" / Int16ul,
    "npdg" / Int16ul,
    "npda" / Int16ul,
    "nows" / Int16ul,
    "mssrl" / Int16ul,  # 74, technical proposal 4065
    "mcl" / Int32ul,
    "msrc" / Int8ul,
    Padding(11),
    "anagrpid" / Int32ul,  # 92
    Padding(3),
    "nsattr" / Int8ul,
    "nvmsetid" / Int16ul,
    "endgid" / Int16ul,
    "nguid" / Bytes(16),  # 104
    "eui64" / Bytes(8),
    "lbaf" / Array(16, Int32ul),  # 128
    Padding(192),
    Padding(3712),
)

assert Controller.sizeof() == NamespaceData.sizeof() == SIZE


@functools.cache
def _zero(structure: Any) -> Any:
    """The values of a structure's fields, all 0."""
    return structure.parse(bytes(structure.sizeof()))


def build(structure: Any, fields: Mapping[str, Any]) -> bytes:
    """Builds a structure with these fields; the others are 0.  An unknown name is a bug in vmodel."""
    blank = _zero(structure)
    assert fields.keys() <= blank.keys(), sorted(fields.keys() - blank.keys())
    return bytes(structure.build({**blank, **fields}))


def text(value: str, size: int) -> bytes:
    """ASCII, padded with blanks to `size` bytes."""
    return value.encode("ascii").ljust(size)


def id_list(ids: Iterable[int]) -> bytes:
    """A namespace list (4.9): ascending ids, at most 1024."""
    found = sorted(ids)[:LIST_ENTRIES]
    return struct.pack(f"<{len(found)}I", *found).ljust(SIZE, b"\0")


def controller_list(ids: Iterable[int]) -> bytes:
    """A controller list (4.10): number of ids, then ascending ids."""
    found = sorted(ids)[:CONTROLLER_ENTRIES]
    return struct.pack(f"<{1 + len(found)}H", len(found), *found).ljust(SIZE, b"\0")


def descriptors(identity: uuid.UUID) -> bytes:
    """A namespace identification descriptor list (figure 249): a UUID, type 3."""
    return (struct.pack("<BBH", 3, 16, 0) + identity.bytes).ljust(SIZE, b"\0")


def power_states(count: int) -> list[dict[str, Any]]:
    """32 power state descriptors, the first `count` of which are valid: 25 W, no latency."""
    blank = _zero(_PowerState)
    return [{**blank, "maximum_power": 2500 if n < count else 0} for n in range(32)]


#: Fields that are equal for all namespaces: LBA formats, limits of Copy, deallocated blocks read as zeros.
_FORMATS: dict[str, Any] = {
    "nlbaf": len(LBA_SIZES) - 1,
    "dlfeat": 1 | 1 << 3,
    "mssrl": MAX_COPY_RANGE,
    "mcl": MAX_COPY,
    "msrc": MAX_COPY_RANGES - 1,
    "lbaf": [(size.bit_length() - 1) << 16 for size in LBA_SIZES] + [0] * (16 - len(LBA_SIZES)),
}


class Identify:
    """The Identify command: builds the data structure for each Controller or Namespace Structure (CNS)."""

    def __init__(self, controller: Nvme) -> None:
        self._controller = controller
        self._pages: dict[int, Callable[[NvmeCommand], bytes]] = {
            0x00: self._namespace,
            0x01: self._identify_controller,
            0x02: self._active_list,
            0x03: self._descriptors,
            0x05: self._nvm_namespace,
            0x06: self._nvm_controller,
            0x07: self._active_list,
            0x08: self._independent,
            0x10: self._allocated_list,
            0x11: self._allocated_namespace,
            0x12: self._namespace_controllers,
            0x13: self._controllers,
            0x14: self._primary,
            0x15: self._secondary,
            0x1A: self._allocated_list,
            0x1B: self._nvm_allocated,
            0x1C: self._command_sets,
        }

    def page(self, command: NvmeCommand) -> bytes:
        """Carries out Identify; returns 4096 bytes.  CommandError."""
        cns = command.cdw10 & 0xFF
        build_page = self._pages.get(cns)
        if build_page is None:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
        # CNS values of an I/O command set: only NVM (0) is supported.
        if cns in _OF_A_COMMAND_SET and command.cdw11 >> 24:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=47)
        return build_page(command)

    # ---- the controller --------------------------------------------------------------------

    def _identify_controller(self, command: NvmeCommand) -> bytes:
        controller, params = self._controller, self._controller.params
        return build(
            Controller,
            {
                "vid": controller.vendor_id,
                "ssvid": controller.subsystem_vendor_id,
                "sn": text(controller.serial, 20),
                "mn": text(params.product, 40),
                "fr": text(controller.firmware.revision, 8),
                "ieee": _IEEE,
                "mdts": (params.max_transfer // 4096).bit_length() - 1,
                "cntlid": CONTROLLER_ID,
                "ver": VERSION,
                # Notices: namespace attributes, firmware activation.
                "oaes": 0x300,
                "ctratt": 1,  # host identifiers of 128 bits
                "cntrltype": 1,  # I/O
                # Format, firmware, namespace management, self-test, directives, doorbell buffer.
                "oacs": 0x3E | (0x100 if controller.has_shadow_doorbells else 0),
                "acl": ABORT_LIMIT,
                "aerl": EVENT_LIMIT - 1,
                "frmw": SLOTS << 1 | 1 << 4,  # activation without a reset
                "lpa": 0x6,  # command effects, extended data
                "elpe": ERROR_ENTRIES - 1,
                "wctemp": WARNING_TEMPERATURE,
                "cctemp": CRITICAL_TEMPERATURE,
                "tnvmcap": controller.inventory.total,
                "unvmcap": controller.inventory.unallocated,
                "edstt": 1,  # minutes
                "dsto": 1,  # one test at a time
                "fwug": GRANULARITY,
                "kas": KEEP_ALIVE_GRANULARITY,
                "sanicap": SANITIZE_CAPABILITIES,
                "sqes": 0x66,
                "cqes": 0x44,
                "nn": MAX_NAMESPACES,
                # Compare, Write Uncorrectable, Dataset Management, Write Zeroes, saved features, timestamp, Verify,
                # Copy.
                "oncs": 0x1DF,
                "fuses": 1,
                "fna": 0x4,  # cryptographic erase
                "vwc": 0x7,  # there is one, and Flush takes FFFFFFFFh
                "nwpc": 0x3,
                "acwu": ATOMIC_COMPARE_WRITE - 1,
                "ocfs": 1,
                "sgls": 1 | 1 << 16,  # without alignment, bit buckets
                "mnan": MAX_NAMESPACES,
                "subnqn": f"nqn.2014-08.org.nvmexpress:uuid:{controller.uuid}".encode().ljust(256, b"\0"),
                "power_states": power_states(1),
            },
        )

    def _nvm_controller(self, command: NvmeCommand) -> bytes:
        """Limits of I/O commands: there are none besides MDTS."""
        return bytes(SIZE)

    def _controllers(self, command: NvmeCommand) -> bytes:
        first = command.cdw10 >> 16
        return controller_list([CONTROLLER_ID] if first <= CONTROLLER_ID else [])

    def _primary(self, command: NvmeCommand) -> bytes:
        """Primary controller capabilities (figure 252): the controller shares no resources with secondary ones."""
        return struct.pack("<H", CONTROLLER_ID).ljust(SIZE, b"\0")

    def _secondary(self, command: NvmeCommand) -> bytes:
        """The secondary controller list (figure 253): empty."""
        return bytes(SIZE)

    def _command_sets(self, command: NvmeCommand) -> bytes:
        """Combinations of I/O command sets (technical proposal 4056): one, with only NVM."""
        if command.cdw10 >> 16 not in (CONTROLLER_ID, 0xFFFF):
            raise CommandError(NvmeStatus.INVALID_FIELD, location=42)
        return struct.pack("<Q", 1).ljust(SIZE, b"\0")

    # ---- namespaces ------------------------------------------------------------------------

    def _active_list(self, command: NvmeCommand) -> bytes:
        return self._list(command, self._controller.inventory.active)

    def _allocated_list(self, command: NvmeCommand) -> bytes:
        return self._list(command, self._controller.inventory.allocated)

    @staticmethod
    def _list(command: NvmeCommand, namespaces: Sequence[Namespace]) -> bytes:
        if command.nsid >= BROADCAST - 1:
            raise CommandError(NvmeStatus.INVALID_NAMESPACE, location=4)
        return id_list(namespace.nsid for namespace in namespaces if namespace.nsid > command.nsid)

    def _namespace(self, command: NvmeCommand) -> bytes:
        if command.nsid == BROADCAST:  # what all have in common
            return build(NamespaceData, _FORMATS)
        namespace = self._controller.inventory.find(command.nsid)
        return self._describe(namespace if namespace is not None and namespace.attached else None)

    def _allocated_namespace(self, command: NvmeCommand) -> bytes:
        return self._describe(self._controller.inventory.find(command.nsid))

    @staticmethod
    def _describe(namespace: Namespace | None) -> bytes:
        if namespace is None:  # an id that is valid and not in use
            return bytes(SIZE)
        preferred = (PAGE >> namespace.lba_shift) - 1  # a page of the host's: less is read before it is written
        return build(
            NamespaceData,
            {
                **_FORMATS,
                "nsfeat": 1 << 4,  # there are preferred granularities
                "npwg": preferred,
                "npwa": preferred,
                "npdg": preferred,
                "npda": preferred,
                "nsze": namespace.blocks,
                "ncap": namespace.blocks,
                "nuse": namespace.blocks,
                "flbas": namespace.lba_format,
                # Bit 0: currently write protected.
                "nsattr": int(namespace.read_only),
                "nvmcap": namespace.size,
            },
        )

    def _descriptors(self, command: NvmeCommand) -> bytes:
        return descriptors(self._controller.inventory.attached(command.nsid).uuid)

    def _nvm_namespace(self, command: NvmeCommand) -> bytes:
        """Command set specific data: all 0, as there is no protection information."""
        self._controller.inventory.attached(command.nsid)
        return bytes(SIZE)

    def _nvm_allocated(self, command: NvmeCommand) -> bytes:
        """Like `_nvm_namespace`, for a namespace that need not be attached."""
        if self._controller.inventory.find(command.nsid) is None:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=4)
        return bytes(SIZE)

    def _independent(self, command: NvmeCommand) -> bytes:
        """Data of a namespace that does not depend on the command set (NVMe 2.0, figure 280)."""
        namespace = self._controller.inventory.find(command.nsid)
        if namespace is None or not namespace.attached:
            return bytes(SIZE)
        ready = 1
        return struct.pack("<8xB5xB", int(namespace.read_only), ready).ljust(SIZE, b"\0")

    def _namespace_controllers(self, command: NvmeCommand) -> bytes:
        if command.nsid == BROADCAST:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=4)
        namespace = self._controller.inventory.find(command.nsid)
        first = command.cdw10 >> 16
        attached = namespace is not None and namespace.attached and first <= CONTROLLER_ID
        return controller_list([CONTROLLER_ID] if attached else [])
