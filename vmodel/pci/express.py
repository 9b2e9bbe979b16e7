"""The PCI Express capability of an endpoint (PCIe 5.0, 7.5.3).

What the specification lets a function hardwire because it has no use for it is hardwired.
"""

from __future__ import annotations

from vmodel.pci.caps import Capability, ResetKind
from vmodel.regs import RO, RW, W1C, Bit, Bits, Layout, Reg16, Reg32, RegisterBank


class DevCap(Layout):
    """Device Capabilities."""

    MAX_PAYLOAD = Bits(0, 2, doc="128 bytes")
    EXTENDED_TAG = Bit(5)
    ROLE_BASED_ERRORS = Bit(15)
    FLR = Bit(28)


class DevCtl(Layout):
    """Device Control.  Sizes of payloads and tags are fixed, as Device Capabilities offer one only."""

    CORRECTABLE = Bit(0, RW)
    NON_FATAL = Bit(1, RW)
    FATAL = Bit(2, RW)
    UNSUPPORTED = Bit(3, RW)
    RELAXED_ORDERING = Bit(4, RW)
    MAX_PAYLOAD = Bits(5, 7)
    EXTENDED_TAG = Bit(8)
    NO_SNOOP = Bit(11, RW)
    MAX_READ_REQUEST = Bits(12, 14, RW)
    INITIATE_FLR = Bit(15, RW, doc="reads as 0")


class DevSta(Layout):
    """Device Status."""

    CORRECTABLE = Bit(0, W1C)
    NON_FATAL = Bit(1, W1C)
    FATAL = Bit(2, W1C)
    UNSUPPORTED = Bit(3, W1C)
    TRANSACTIONS_PENDING = Bit(5, RO)


class LnkCap(Layout):
    """Link Capabilities."""

    MAX_SPEED = Bits(0, 3)
    MAX_WIDTH = Bits(4, 9)
    ASPM_OPTIONALITY = Bit(22, doc="set in all functions")


class LnkCtl(Layout):
    """Link Control, as far as it is an endpoint's."""

    ASPM = Bits(0, 1, RW)
    READ_COMPLETION_BOUNDARY = Bit(3, RW)
    COMMON_CLOCK = Bit(6, RW)
    EXTENDED_SYNCH = Bit(7, RW)


class DevCap2(Layout):
    """Device Capabilities 2."""

    TIMEOUT_DISABLE = Bit(4, doc="required of endpoints that issue requests")
    EXTENDED_FMT = Bit(20, doc="required beside TLP prefixes")
    TLP_PREFIX = Bit(21, doc="End-End TLP prefixes, such as PASIDs")


class DevCtl2(Layout):
    """Device Control 2."""

    TIMEOUT_DISABLE = Bit(4, RW)
    ATOMIC_REQUESTER = Bit(6, RW)


class LnkCtl2(Layout):
    """Link Control 2; what else there is may be hardwired at 2.5 GT/s."""

    TARGET_SPEED = Bits(0, 3, RW)


class PcieRegs(RegisterBank, size=0x3C):
    """PCI Express capability, version 2.  An endpoint has no slot and no root registers."""

    PCIE_CAP = Reg16(0x02, RO, doc="version, device/port type")
    DEVCAP = Reg32(0x04, RO, layout=DevCap)
    DEVCTL = Reg16(0x08, RO, layout=DevCtl, reset=0x2810)
    DEVSTA = Reg16(0x0A, RO, layout=DevSta)
    LNKCAP = Reg32(0x0C, RO, layout=LnkCap, reset=0x0040_0011, doc="2.5 GT/s, x1")
    LNKCTL = Reg16(0x10, RO, layout=LnkCtl)
    LNKSTA = Reg16(0x12, RO, reset=0x0011)
    DEVCAP2 = Reg32(0x24, RO, layout=DevCap2)
    DEVCTL2 = Reg16(0x28, RO, layout=DevCtl2)
    LNKCAP2 = Reg32(0x2C, RO, reset=0x0000_0002)
    LNKCTL2 = Reg16(0x30, RO, layout=LnkCtl2, reset=0x0001, sticky=True)


class Pcie(Capability):
    """PCI Express endpoint.

    `flr`: supports Function Level Reset; `integrated`: is a root complex integrated endpoint, which has no link;
    `tlp_prefix`: supports End-End TLP prefixes, which PASIDs need.
    """

    id = 0x10
    bank = PcieRegs
    hooked = (PcieRegs.DEVCTL, PcieRegs.LNKCTL, PcieRegs.LNKCTL2)
    regs: PcieRegs

    def __init__(self, *, flr: bool = True, integrated: bool = False, tlp_prefix: bool = False) -> None:
        self.flr = flr
        self.integrated = integrated
        self.tlp_prefix = tlp_prefix

    def reset(self, kind: ResetKind) -> None:
        link = self.regs.LNKCTL
        super().reset(kind)
        if kind is ResetKind.FUNCTION:
            self.regs.LNKCTL = link  # an FLR leaves what the link is at alone (6.6.2)

    def fill(self) -> None:
        regs = self.regs
        regs.PCIE_CAP = 2 | (9 if self.integrated else 0) << 4
        regs.DEVCAP = DevCap.FLR.put(DevCap.ROLE_BASED_ERRORS.mask, int(self.flr))
        regs.DEVCAP2 = DevCap2.TLP_PREFIX.put(
            DevCap2.TIMEOUT_DISABLE.mask | DevCap2.EXTENDED_FMT.mask, int(self.tlp_prefix)
        )
        if self.integrated:
            self._no_link()

    def _no_link(self) -> None:
        """7.5.3: where there is no link its registers are hardwired to 0."""
        regs = self.regs
        regs.LNKCAP = regs.LNKCTL = regs.LNKSTA = regs.LNKCAP2 = regs.LNKCTL2 = 0

    def written(self) -> None:
        if self.integrated:
            self._no_link()
        control = self.regs.DEVCTL
        self.regs.DEVCTL = control & ~DevCtl.INITIATE_FLR.mask  # always reads as 0
        if self.flr and DevCtl(control).INITIATE_FLR:
            self.owner.reset(ResetKind.FUNCTION)
