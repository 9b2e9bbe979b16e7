"""Controller registers and doorbells (NVMe base 1.4, 3.1)."""

from __future__ import annotations

import functools

from vmodel.regs import RO, RW, W1C, Bit, Bits, Layout, Reg32, Reg64, RegisterBank

#: Version 1.4.0.
VERSION = 0x0001_0400
#: The value that NSSR accepts: "NVMe".
SUBSYSTEM_RESET = 0x4E56_4D65
#: Offset of the doorbells, and the most queue pairs: the admin pair and 64 for I/O.
DOORBELLS_AT = 0x1000
QUEUE_PAIRS = 65
#: Largest stride: doorbells 256 bytes apart.
MAX_STRIDE = 6


class NvmeCap(Layout):
    """Controller Capabilities."""

    MQES = Bits(0, 15, doc="largest queue, in entries, less 1")
    CQR = Bit(16, doc="queues are physically contiguous")
    AMS = Bits(17, 18, doc="bit 0: weighted round robin with urgent priority class")
    TO = Bits(24, 31, doc="longest time to become ready, in 500 ms")
    DSTRD = Bits(32, 35, doc="doorbells are 4 << DSTRD bytes apart")
    NSSRS = Bit(36, doc="subsystem reset by NSSR")
    CSS = Bits(37, 44, doc="bit 0: NVM command set")
    BPS = Bit(45)
    MPSMIN = Bits(48, 51, doc="smallest page: 4096 << MPSMIN bytes")
    MPSMAX = Bits(52, 55, doc="largest page: 4096 << MPSMAX bytes")
    PMRS = Bit(56)
    CMBS = Bit(57)


class Cc(Layout):
    """Controller Configuration."""

    EN = Bit(0, RW, doc="enable")
    CSS = Bits(4, 6, RW, doc="0: NVM command set")
    MPS = Bits(7, 10, RW, doc="page size: 4096 << MPS bytes")
    AMS = Bits(11, 13, RW, doc="arbitration: 0 round robin, 1 weighted")
    SHN = Bits(14, 15, RW, doc="shutdown: 1 normal, 2 abrupt")
    IOSQES = Bits(16, 19, RW, doc="6: I/O submission queue entries of 64 bytes")
    IOCQES = Bits(20, 23, RW, doc="4: I/O completion queue entries of 16 bytes")


class Csts(Layout):
    """Controller Status."""

    RDY = Bit(0, RO, doc="ready")
    CFS = Bit(1, RO, doc="fatal error: the controller needs a reset")
    SHST = Bits(2, 3, RO, doc="shutdown: 0 none, 1 in progress, 2 complete")
    NSSRO = Bit(4, W1C, doc="there was a subsystem reset")
    PP = Bit(5, RO)


class Aqa(Layout):
    """Admin Queue Attributes."""

    ASQS = Bits(0, 11, RW, doc="entries of the admin submission queue less 1")
    ACQS = Bits(16, 27, RW, doc="entries of the admin completion queue less 1")


class AdminBase(Layout):
    """Address of an admin queue: bits 11:0 are 0."""

    BASE = Bits(12, 63, RW)


# Registers of 64 bits may be accessed in two halves.  Accesses of less than 32 bits are not defined, and read as 0.


class ControllerRegs(RegisterBank, size=0x1000, sizes=(4, 8), misaligned=False):
    """Controller registers, at the start of BAR0."""

    CAP = Reg64(0x00, RO, layout=NvmeCap)
    VS = Reg32(0x08, RO, reset=VERSION, doc="version: 1.4.0")
    INTMS = Reg32(0x0C, doc="write 1 to mask vectors 0-31; not with MSI-X")
    INTMC = Reg32(0x10, doc="write 1 to unmask; both read as the mask")
    CC = Reg32(0x14, RO, layout=Cc)
    CSTS = Reg32(0x1C, RO, layout=Csts)
    NSSR = Reg32(0x20, doc=f"write {SUBSYSTEM_RESET:#x} (NVMe) to reset the subsystem; reads as 0")
    AQA = Reg32(0x24, RO, layout=Aqa)
    ASQ = Reg64(0x28, RO, layout=AdminBase, doc="address of the admin submission queue")
    ACQ = Reg64(0x30, RO, layout=AdminBase, doc="address of the admin completion queue")
    CMBLOC = Reg32(0x38, RO, doc="controller memory buffer: not there")
    CMBSZ = Reg32(0x3C, RO)


@functools.cache
def doorbells(stride: int) -> type[RegisterBank]:
    """The bank of all doorbells, SQ0TDBL, CQ0HDBL, SQ1TDBL and so on, 4 << `stride` bytes apart."""
    step = 4 << stride
    registers = {}
    for qid in range(QUEUE_PAIRS):
        registers[f"SQ{qid}TDBL"] = Reg32(2 * qid * step, doc=f"tail of submission queue {qid}")
        registers[f"CQ{qid}HDBL"] = Reg32((2 * qid + 1) * step, doc=f"head of completion queue {qid}")
    text = {"__doc__": f"Doorbells, {step} bytes apart."}
    # The bank's class is made here, as the offsets of its registers depend on the stride.
    return type(f"Doorbells{step}", (RegisterBank,), {**text, **registers}, size=2 * QUEUE_PAIRS * step, sizes=(4,))
