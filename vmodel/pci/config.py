"""Type 0 config space (PCI 3.0, 6.1): header, capability list, extended capabilities.

The shim serves accesses by policy: a BAR, for example, is sized by a register whose low bits are read-only.  Only
registers with side effects (Command, some of the capabilities) exit on a write.  Then the policy is applied, and
after that the hooks of those registers run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vmodel._shim import EXIT_ON_WRITE, FunctionRegions, Policy
from vmodel.pci.bar import Bar
from vmodel.pci.caps import Capability, CapabilityOwner, ResetKind
from vmodel.pci.extcaps import ExtendedCapability
from vmodel.regs import RO, RW, W1C, Bit, Layout, Reg8, Reg16, Reg32, Register, RegisterBank, RegisterError
from vmodel.span import Span
from vmodel.vfio_user.wire import Region

#: Offsets of the first capability, and of the first extended one.
FIRST_CAPABILITY, FIRST_EXTENDED = 0x40, 0x100
ROM_ENABLE = 1


class CommandRegister(Layout):
    """Command register."""

    IO = Bit(0, RW)
    MEMORY = Bit(1, RW)
    BUS_MASTER = Bit(2, RW)
    PARITY = Bit(6, RW)
    SERR = Bit(8, RW)
    INTX_DISABLE = Bit(10, RW)


class StatusRegister(Layout):
    """Status register."""

    INTERRUPT = Bit(3)
    CAPABILITIES = Bit(4)
    PARITY = Bit(8, W1C)
    SIGNALED_TARGET_ABORT = Bit(11, W1C)
    RECEIVED_TARGET_ABORT = Bit(12, W1C)
    RECEIVED_MASTER_ABORT = Bit(13, W1C)
    SIGNALED_ERROR = Bit(14, W1C)
    DETECTED_PARITY = Bit(15, W1C)


class HeaderRegs(RegisterBank, size=0x40):
    """Type 0 header (PCI 3.0, 6.1): the first 64 bytes.  The BARs at 0x10 depend on the model (`ConfigSpace`)."""

    VENDOR_ID = Reg16(0x00, RO)
    DEVICE_ID = Reg16(0x02, RO)
    COMMAND = Reg16(0x04, RO, layout=CommandRegister)
    STATUS = Reg16(0x06, RO, layout=StatusRegister)
    REVISION = Reg8(0x08, RO)
    PROG_IF = Reg8(0x09, RO)
    SUBCLASS = Reg8(0x0A, RO)
    CLASS = Reg8(0x0B, RO)
    CACHE_LINE = Reg8(0x0C)
    LATENCY = Reg8(0x0D, RO)
    HEADER_TYPE = Reg8(0x0E, RO)
    SUBSYSTEM_VENDOR = Reg16(0x2C, RO)
    SUBSYSTEM = Reg16(0x2E, RO)
    ROM_BASE = Reg32(0x30, RO)
    CAPABILITIES = Reg8(0x34, RO)
    INTERRUPT_LINE = Reg8(0x3C)
    INTERRUPT_PIN = Reg8(0x3D, RO)


@dataclass(frozen=True)
class Identity:
    """The read-only header fields that identify a function (PCI 3.0, 6.2.1).

    `class_code` has 24 bits: class, subclass, programming interface.
    """

    vendor_id: int
    device_id: int
    class_code: int
    revision: int = 0
    subsystem_vendor_id: int = 0
    subsystem_id: int = 0
    multifunction: bool = False
    #: 0: no INTx, 1..4: INTA to INTD.
    interrupt_pin: int = 0


class ConfigSpace:
    """Config space of one function, in region 7."""

    def __init__(
        self,
        owner: CapabilityOwner,
        function: FunctionRegions,
        identity: Identity,
        bars: Sequence[Bar],
        rom_size: int,
        capabilities: Sequence[Capability],
        hooked: Callable[[type[RegisterBank], str], set[Register]] = lambda bank, kind: set(),
    ) -> None:
        """Lays out header, BARs and capabilities; binds `capabilities` in the order given (`self.capabilities`).

        `hooked(bank, "read" or "write")` gives the registers of a bank that the model has hooks on.  RegisterError:
        the capabilities do not fit, or one is declared twice.
        """
        self._owner = owner
        self._function = function
        self._identity = identity
        plain = [c for c in capabilities if not isinstance(c, ExtendedCapability)]
        extended = [c for c in capabilities if isinstance(c, ExtendedCapability)]
        express = any(c.id == 0x10 for c in plain)
        if extended and not express:
            raise RegisterError("extended capabilities need the PCI Express capability")
        ids = [(isinstance(c, ExtendedCapability), c.id) for c in capabilities if c.id != 0x09]
        if len(set(ids)) != len(ids):
            raise RegisterError("a capability is declared twice")
        self.size = 4096 if express else 256
        function.define_region(Region.CONFIG, self.size, fill=0)
        self.view = function.add_bank(Region.CONFIG, 0, self.size)
        self.header = HeaderRegs(self.view[:0x40])
        self._policy = Policy(self.size)
        self._hooked = hooked
        self._lay(HeaderRegs.policy(hooked(HeaderRegs, "read"), {HeaderRegs.COMMAND} | hooked(HeaderRegs, "write")), 0)
        self._bar_bits: dict[int, int] = {}
        for bar in bars:
            self._lay_bar(bar)
        self.rom_size = rom_size
        if rom_size:
            self._set_mask(0x30, (0xFFFF_FFFF & ~(rom_size - 1) & ~0x7FF) | ROM_ENABLE, 4)
            self._policy.exits[0x30:0x34] = bytes([EXIT_ON_WRITE]) * 4
        #: (bytes of a register, what runs after a write) of the registers that exit on writes; reads likewise below.
        self._write_hooks: list[tuple[Span, Callable[[], None]]] = [
            (Span(0x04, 0x05), owner.update_enables),
            (Span(0x30, 0x33), owner.update_enables),
        ]
        self._read_hooks: list[tuple[Span, Callable[[], None]]] = []
        #: The bound capabilities, in the order given.
        self.capabilities: list[Capability] = []
        self._chain: dict[int, int] = {}  # config offset -> byte of a capability's id or next pointer
        #: (name, offset, bank) of each register bank; the header's name is "".
        self.places: list[tuple[str, int, type[RegisterBank]]] = [("", 0, HeaderRegs)]
        bound = self._lay_list(owner, plain) | self._lay_extended(owner, extended)
        self.capabilities = [bound[id(c)] for c in capabilities]
        #: (offset, bank) of each bank of this device.
        self.banks: list[tuple[int, RegisterBank]] = [(0, self.header)]
        at = {name: offset for name, offset, _ in self.places}
        self.banks += [(at[capability.name], capability.regs) for capability in self.capabilities]
        function.set_policy(Region.CONFIG, 0, self._policy)

    # ---- layout -----------------------------------------------------------------------------

    def _lay(self, policy: Policy, at: int) -> None:
        for ours, theirs in zip(self._policy.arrays(), policy.arrays(), strict=True):
            ours[at : at + len(theirs)] = theirs

    def _set_mask(self, at: int, mask: int, size: int) -> None:
        self._policy.store[at : at + size] = mask.to_bytes(size, "little")

    def _lay_bar(self, bar: Bar) -> None:
        for n in range(bar.index, bar.index + bar.registers):
            self._bar_bits[n] = bar.header_bits() if n == bar.index else 0
        self._set_mask(0x10 + 4 * bar.index, bar.address_mask(), 4 * bar.registers)

    def _place(self, owner: CapabilityOwner, capability: Capability, at: int, limit: int) -> Capability:
        size = capability.bank.size
        if at + size > limit:
            raise RegisterError(f"capability {capability.name} at {at:#x}+{size:#x} does not fit into config space")
        bound = capability.bind(owner, self.view[at : at + size])
        self.places.append((capability.name, at, capability.bank))
        reads = {*bound.read_hooked, *self._hooked(capability.bank, "read")}
        writes = {*bound.hooked, *self._hooked(capability.bank, "write")}
        self._lay(bound.bank.policy(reads, writes), at)
        for register in bound.read_hooked:
            self._read_hooks.append((Span.sized(at + register.offset, register.size), bound.reading))
        for register in bound.hooked:
            span = Span.sized(at + register.offset, register.size)
            self._write_hooks.append((span, bound.written))
        return bound

    def _lay_list(self, owner: CapabilityOwner, capabilities: Sequence[Capability]) -> dict[int, Capability]:
        bound = {}
        link, at = 0x34, FIRST_CAPABILITY
        for capability in capabilities:
            bound[id(capability)] = self._place(owner, capability, at, 256)
            self._chain[link] = at
            self._chain[at] = capability.id
            self._chain[at + 1] = 0
            link, at = at + 1, (at + capability.bank.size + 3) & ~3
        return bound

    def _lay_extended(
        self, owner: CapabilityOwner, capabilities: Sequence[ExtendedCapability]
    ) -> dict[int, Capability]:
        bound: dict[int, Capability] = {}
        at, link = FIRST_EXTENDED, 0
        for capability in capabilities:
            bound[id(capability)] = self._place(owner, capability, at, 4096)
            self._chain |= dict(enumerate((capability.id | capability.version << 16).to_bytes(4, "little"), at))
            if link:  # the next pointer of the capability before: bits 20..31 of its header
                self._chain[link + 2] |= at << 4 & 0xF0
                self._chain[link + 3] = at >> 4
            link, at = at, (at + capability.bank.size + 3) & ~3
        return bound

    # ---- values -----------------------------------------------------------------------------

    def reset(self, kind: ResetKind) -> None:
        """Sets all registers to their declared values; sticky ones keep theirs."""
        identity, header = self._identity, self.header
        header.load_reset()
        header.VENDOR_ID, header.DEVICE_ID = identity.vendor_id, identity.device_id
        header.CLASS = identity.class_code >> 16
        header.SUBCLASS, header.PROG_IF = identity.class_code >> 8 & 0xFF, identity.class_code & 0xFF
        header.REVISION = identity.revision
        header.SUBSYSTEM_VENDOR, header.SUBSYSTEM = identity.subsystem_vendor_id, identity.subsystem_id
        header.HEADER_TYPE = 0x80 if identity.multifunction else 0
        header.INTERRUPT_PIN = identity.interrupt_pin
        header.STATUS = StatusRegister.CAPABILITIES.put(0, int(bool(self.capabilities)))
        for n in range(6):
            self.view[0x10 + 4 * n : 0x14 + 4 * n] = self._bar_bits.get(n, 0).to_bytes(4, "little")
        for capability in self.capabilities:
            capability.reset(kind)
        for at, byte in self._chain.items():
            self.view[at] = byte

    @property
    def command(self) -> CommandRegister:
        """The Command register."""
        return CommandRegister(self.header.COMMAND)

    def bar_address(self, index: int) -> int:
        """The address that the guest has written to a BAR."""
        low = int.from_bytes(self.view[0x10 + 4 * index : 0x14 + 4 * index], "little")
        if low & 1:
            return low & ~3
        high = int.from_bytes(self.view[0x14 + 4 * index : 0x18 + 4 * index], "little") if low & 4 else 0
        return high << 32 | low & ~15

    def reading(self, span: Span) -> None:
        """Updates registers whose value is computed on a read; called before a read of `span` that exits."""
        for update in dict.fromkeys(update for place, update in self._read_hooks if place.overlaps(span)):
            update()

    def write(self, offset: int, data: bytes) -> None:
        """Writes `data` at `offset`, as the guest does."""
        self._owner.region_write(Region.CONFIG, offset, len(data), data)

    def written(self, span: Span) -> None:
        """Runs the side effects of a write of `span`, after the registers have their new values."""
        # Each once, even if the write covers several registers of one capability.
        for effect in dict.fromkeys(effect for place, effect in self._write_hooks if place.overlaps(span)):
            effect()
        self._owner.config_written()
