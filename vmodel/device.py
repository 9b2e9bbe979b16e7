"""`PciDevice`: what a model derives from.  `devices/edu.py` is the tutorial.

A class declares what the hardware is: identity, BARs, banks of registers, capabilities, hooks.  Mistakes in that
are `RegisterError`s when the class is made.  An instance is one function; it knows nothing of sockets or QEMU,
and a test can use it by itself.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pydantic

from vmodel._shim import Function
from vmodel._shim import key as access_key
from vmodel.dma import Dma
from vmodel.errors import DmaFault, GuestError, PeerError
from vmodel.logs import limited
from vmodel.memory import GuestMemory
from vmodel.pci.bar import BankSlot, Bar, IoBar, MmioBar, RamSlot
from vmodel.pci.caps import Capability, Msi, Msix, Pcie, Pm, ResetKind, VendorSpecific
from vmodel.pci.config import ConfigSpace, Identity, Status
from vmodel.pci.irq import Intx, Irqs
from vmodel.points import Point, Points
from vmodel.regs import (
    Hook,
    HookedBank,
    Register,
    RegisterBank,
    RegisterError,
    hooks_of,
    on_read,
    on_write,
    on_write_each,
)
from vmodel.span import KiB, Span
from vmodel.timers import Agenda, Timer
from vmodel.vfio_user.commands import IoEventFd, IrqInfo, RegionInfo, SetIrqs
from vmodel.vfio_user.wire import Irq, Region

__all__ = [
    "Intx",
    "IoBar",
    "MmioBar",
    "Msi",
    "Msix",
    "PciDevice",
    "Pcie",
    "Pm",
    "ResetKind",
    "VendorSpecific",
    "on_read",
    "on_write",
    "on_write_each",
]

#: A saved state begins with its magic number and the layout of what follows.
_STATE = struct.Struct("<4s32s")
_STATE_MAGIC = b"VMS2"


class Params(pydantic.BaseModel):
    """A model's parameters, as in a machine file; unknown ones are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True)
class _Area:
    """Something in a region that answers in Python; offsets count from its start."""

    span: Span
    read: Callable[[int, int], bytes | int]
    write: Callable[[int, int, int | bytes], None]


class PciDevice:
    """One PCI function.

    All methods but `after`, `defer`, `post` and `close` belong to the thread that serves the device.
    """

    vendor_id: ClassVar[int]
    device_id: ClassVar[int]
    class_code: ClassVar[int]
    revision: ClassVar[int] = 0
    subsystem_vendor_id: ClassVar[int] = 0
    subsystem_id: ClassVar[int] = 0
    #: Contents of the expansion ROM, a power of two of at least 2 KiB; empty: none.
    rom: ClassVar[bytes] = b""
    #: Parameters; a model overrides it with a nested class of that name.
    Params: ClassVar[type[Params]] = Params
    #: Most bytes that `save_extra` gives; nothing longer is taken from a client.
    max_extra: ClassVar[int] = 64 * KiB
    #: Read by models that want INTx; None: no pin.
    intx: Intx | None = None

    _declared: ClassVar[dict[str, Any]] = {}
    _hooks: ClassVar[dict[Hook, str]] = {}

    # ---- declaration ------------------------------------------------------------------------

    def __init_subclass__(cls) -> None:
        declared: dict[str, Any] = {}
        hooks: dict[Hook, str] = {}
        for base in reversed(cls.__mro__):
            for name, value in vars(base).items():
                declared.pop(name, None)
                if isinstance(value, Bar | BankSlot | RamSlot | Capability | Intx):
                    declared[name] = value
                for hook in [h for h, method in hooks.items() if method == name]:
                    del hooks[hook]
                for hook in hooks_of(value):
                    if hook in hooks:
                        raise RegisterError(f"{cls.__name__}: {hook.register} has two on_{hook.kind} hooks")
                    hooks[hook] = name
        cls._declared, cls._hooks = declared, hooks
        if hasattr(cls, "vendor_id"):
            cls._check()

    @classmethod
    def _check(cls) -> None:
        for name, width in (("vendor_id", 16), ("device_id", 16), ("class_code", 24), ("revision", 8)):
            value = getattr(cls, name, None)
            if not isinstance(value, int) or not 0 <= value < 1 << width:
                raise RegisterError(f"{cls.__name__}.{name} is not a {width}-bit number: {value!r}")
        if cls.rom and (len(cls.rom) < 2048 or len(cls.rom) & (len(cls.rom) - 1)):
            raise RegisterError(f"{cls.__name__}: an expansion ROM of {len(cls.rom)} bytes is no power of two >= 2048")
        banks = [slot.bank for slot in cls._of(BankSlot).values()]
        if len(set(banks)) != len(banks):
            raise RegisterError(f"{cls.__name__}: one bank class in two places: hooks could not tell them apart")
        for hook in cls._hooks:
            if hook.register.bank not in banks:
                raise RegisterError(f"{cls.__name__}: a hook on {hook.register}, whose bank no BAR has")
        taken = [n for bar in cls.declared_bars() for n in range(bar.index, bar.index + bar.registers)]
        for n in taken:
            if taken.count(n) > 1:
                raise RegisterError(f"{cls.__name__}: BAR{n} is there twice (a 64-bit BAR takes two registers)")
        # A trial run of the layout finds everything else now rather than when a machine starts.
        trial = object.__new__(cls)
        trial.function = Function()
        trial.irqs = Irqs(trial.function.signal)
        trial._lay_out(False)

    @classmethod
    def _of(cls, kind: type[Any]) -> dict[str, Any]:
        return {name: value for name, value in cls._declared.items() if isinstance(value, kind)}

    @classmethod
    def declared_bars(cls) -> list[Bar]:
        """All BARs, MSI-X's own included, by index."""
        bars = list(cls._of(Bar).values()) + [m.bar for m in cls._of(Msix).values() if m.owns_bar]
        return sorted(bars, key=lambda bar: bar.index)

    @classmethod
    def declared_capabilities(cls) -> dict[str, Capability]:
        """Capabilities by attribute name, in order."""
        return cls._of(Capability)

    # ---- an instance ------------------------------------------------------------------------

    def __init__(
        self,
        name: str = "",
        params: pydantic.BaseModel | Mapping[str, Any] | None = None,
        *,
        multifunction: bool = False,
    ) -> None:
        """`params`: an instance of the model's Params, or what makes one (pydantic.ValidationError)."""
        self.name = name or type(self).__name__.lower()
        self.params: Any = params if isinstance(params, self.Params) else self.Params.model_validate(params or {})
        self.log = limited(f"vmodel.device.{self.name}")
        #: Exceptions that came out of the model's hooks and callbacks.
        self.errors = 0
        #: Its thread was left behind, see Server.stop: nothing of it may be touched any more.
        self.abandoned = False
        self.function = Function()
        self.memory = GuestMemory()
        self.dma = Dma(self.memory)
        self.irqs = Irqs(self.function.signal)
        #: What experiments may interfere with; see vmodel.points.
        self.points = Points(self.name)
        #: Ends the client's connection, on the device's thread; None: there is none.
        self.hang_up: Callable[[], None] | None = None
        self._agenda = Agenda(self.function.wake, lambda error: self._failed("a callback", error))
        self._stopped = False
        self._events: list[IoEventFd] = []
        self._event_registers: list[tuple[int, int, int]] = []
        self._lay_out(multifunction)
        self.reset(ResetKind.DEVICE)

    def _lay_out(self, multifunction: bool) -> None:
        """Makes regions, banks and config space."""
        #: (region, offset, bank) of each bank, by its attribute.
        self.register_banks: dict[str, tuple[int, int, RegisterBank]] = {}
        self._rams: list[memoryview] = []
        self._areas: list[list[_Area]] = [[] for _ in range(9)]
        self._exact_reads: dict[int, Callable[[], int]] = {}
        self._exact_writes: dict[int, Callable[[int], None]] = {}
        self._pin: Intx | None = None
        bars = self.declared_bars()
        for bar in bars:
            self.function.define_region(bar.index, bar.size, fill=bar.fill)
        if self.rom:
            self.function.define_region(Region.ROM, len(self.rom), writable=False)
            self.function.add_ram(Region.ROM, 0, len(self.rom))[:] = self.rom
        capabilities = self.declared_capabilities()
        pins = self._of(Intx)
        self.config = ConfigSpace(
            self,
            self.function,
            Identity(
                self.vendor_id,
                self.device_id,
                self.class_code,
                self.revision,
                self.subsystem_vendor_id,
                self.subsystem_id,
                multifunction,
                max((pin.pin for pin in pins.values()), default=0),
            ),
            bars,
            len(self.rom),
            list(capabilities.values()),
        )
        self._areas[Region.CONFIG].append(_Area(Span.sized(0, self.config.size), self._config_read, self._config_write))
        for name, bound in zip(capabilities, self.config.capabilities, strict=True):
            setattr(self, name, bound)
            if isinstance(bound, Msix):
                self._lay_msix(bound)
        for name, pin in pins.items():
            self._pin = pin.bind(self.irqs, self._show_intx)
            setattr(self, name, self._pin)
        for name, slot in self._of(BankSlot).items():
            self._lay_bank(name, slot)
        for name, slot in self._of(RamSlot).items():
            view = self.function.add_ram(slot.bar.index, slot.ram.at, slot.ram.size, mappable=slot.ram.mappable)
            setattr(self, name, view)
            self._rams.append(view)
        self.regions = self._region_infos(bars)

    def _lay_bank(self, name: str, slot: BankSlot) -> None:
        region = slot.bar.index
        at = next(b.at for b in slot.bar.banks if b.bank is slot.bank)
        bank = slot.bank(self.function.add_bank(region, at, slot.bank.size))
        bank.view[:] = bytes([slot.bar.fill]) * len(bank.view)
        bank.load_reset(everything=True)
        mine = {h: self._method(h, name) for h, name in self._hooks.items() if h.register.bank is slot.bank}
        readers = {h.register: method for h, method in mine.items() if h.kind == "read"}
        writers = {h.register: method for h, method in mine.items() if h.kind == "write"}
        self.function.set_policy(region, at, bank.policy(set(readers), set(writers)))
        hooked = HookedBank(
            bank,
            readers,
            writers,
            lambda offset, count: self.function.plain_read(region, at + offset, count),
            lambda offset, data: self.function.plain_write(region, at + offset, data),
        )
        self._areas[region].append(_Area(Span.sized(at, bank.size), hooked.read, hooked.write))
        # Whole registers are what drivers access: found at once, by what the shim says.
        for register, read in hooked.whole_reads.items():
            self._exact_reads[access_key(region, at + register.offset, register.size)] = read
        for register, write in hooked.whole_writes.items():
            self._exact_writes[access_key(region, at + register.offset, register.size)] = write
        self.register_banks[name] = (region, at, bank)
        setattr(self, name, bank)

    def _method(self, hook: Hook, name: str) -> Callable[..., Any]:
        method = getattr(self, name)
        return method if hook.index is None else functools.partial(method, hook.index)

    def _lay_msix(self, msix: Msix) -> None:
        region, size = msix.bar.index, msix.table_size
        msix.table = memoryview(bytearray(size))
        self.function.add_hook(region, msix.table_offset, size)
        msix.pba = self.function.add_bank(region, msix.pba_offset, msix.pba_size)
        self._areas[region].append(
            _Area(
                Span.sized(msix.table_offset, size),
                msix.table_read,
                lambda offset, count, value: msix.table_write(offset, _as_bytes(value, count)),
            )
        )

    def _region_infos(self, bars: Sequence[Bar]) -> Sequence[RegionInfo]:
        infos = [RegionInfo(0)] * 9
        for bar in bars:
            areas = tuple(Span.sized(ram.at, ram.size) for ram in bar.rams if ram.mappable)
            infos[bar.index] = RegionInfo(bar.size, mmap_fd=self.function.region_fd(bar.index), mmap_areas=areas)
        if self.rom:
            infos[Region.ROM] = RegionInfo(len(self.rom), writable=False)
        infos[Region.CONFIG] = RegionInfo(self.config.size)
        return infos

    # ---- for models -------------------------------------------------------------------------

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Runs `call` in `seconds` on the device's thread.  A reset cancels it."""
        return self._agenda.after(seconds, call)

    def defer(self, call: Callable[[], None], *, by: PciDevice | None = None) -> None:
        """Runs `call` on the device's thread once the access at hand is answered.

        A reset of `by`, whose work it is, drops it; of this device without.
        """
        self._agenda.defer(call, (self if by is None else by)._agenda)

    def post(self, call: Callable[[], None]) -> None:
        """Likewise, but no reset drops it: for a thread that waits until it has run."""
        self._agenda.defer(call, None)

    def open(self) -> None:
        """For a model to override: takes hold of files and the like, just before the device is served.

        ConfigError, one line for the user.  What it takes hold of is given back by `close`.
        """

    def on_reset(self, kind: ResetKind) -> None:
        """For a model to override: registers have their reset values, timers are gone."""

    def save_extra(self) -> bytes:
        """For a model to override: state that is neither in registers nor in RAM areas."""
        return b""

    def restore_extra(self, data: bytes) -> None:
        """For a model to override: takes `save_extra`'s bytes back.  PeerError(EINVAL) when they are wrong."""
        if data:
            raise PeerError(errno.EINVAL, f"{self.name}: {len(data)} bytes of state that this model does not have")

    # ---- accesses ---------------------------------------------------------------------------

    def register_read(self, key: int, region: int, offset: int, count: int) -> int | bytes:
        """`region_read` for an access whose vms_key is at hand: one look-up for a register read whole."""
        exact = self._exact_reads.get(key)
        if exact is None:
            return self.region_read(region, offset, count)
        try:
            return exact()
        except Exception as error:
            self._failed(f"a read of region {region} at {offset:#x}", error)
            return (1 << 8 * count) - 1

    def region_read(self, region: int, offset: int, count: int) -> int | bytes:
        """A read that the shim left to Python: an int, or `count` bytes.  A hook that fails reads as all ones."""
        try:
            last = offset + count - 1
            for area in self._areas[region]:
                if area.span.start <= offset and last <= area.span.last:
                    result = area.read(offset - area.span.start, count)
                    if isinstance(result, bytes) and count <= 8:
                        return int.from_bytes(result, "little")
                    return result
            data = self._read_across(region, offset, count)
            return int.from_bytes(data, "little") if count <= 8 else data
        except Exception as error:
            self._failed(f"a read of region {region} at {offset:#x}", error)
            return (1 << 8 * count) - 1 if count <= 8 else b"\xff" * count

    def region_write(self, region: int, offset: int, count: int, value: int | bytes) -> None:
        """A write that the shim left to Python; `value` is an int when count <= 8."""
        try:
            exact = self._exact_writes.get(access_key(region, offset, count))
            if exact is not None and isinstance(value, int):
                exact(value)
                return
            last = offset + count - 1
            for area in self._areas[region]:
                if area.span.start <= offset and last <= area.span.last:
                    area.write(offset - area.span.start, count, value)
                    return
            self._write_across(region, offset, _as_bytes(value, count))
        except Exception as error:
            self._failed(f"a write of region {region} at {offset:#x}", error)

    def _pieces(self, region: int, offset: int, count: int) -> list[tuple[int, int, _Area | None]]:
        """An access cut at the borders of areas: (offset, count, area or None)."""
        pieces: list[tuple[int, int, _Area | None]] = []
        end = offset + count
        for area in sorted(self._areas[region], key=lambda a: a.span.start):
            if area.span.start >= end or area.span.last < offset:
                continue
            if offset < area.span.start:
                pieces.append((offset, area.span.start - offset, None))
                offset = area.span.start
            stop = min(end, area.span.last + 1)
            pieces.append((offset, stop - offset, area))
            offset = stop
        if offset < end:
            pieces.append((offset, end - offset, None))
        return pieces

    def _read_across(self, region: int, offset: int, count: int) -> bytes:
        data = b""
        for at, size, area in self._pieces(region, offset, count):
            if area is None:
                data += self.function.plain_read(region, at, size)
            else:
                data += _as_bytes(area.read(at - area.span.start, size), size)
        return data

    def _write_across(self, region: int, offset: int, data: bytes) -> None:
        for at, size, area in self._pieces(region, offset, len(data)):
            piece = data[at - offset : at - offset + size]
            if area is None:
                self.function.plain_write(region, at, piece)
            else:
                area.write(at - area.span.start, size, piece)

    def _config_read(self, offset: int, count: int) -> bytes:
        return self.config.read(offset, count)

    def _config_write(self, offset: int, count: int, value: int | bytes) -> None:
        self.config.write(offset, _as_bytes(value, count))

    def _failed(self, what: str, error: Exception) -> None:
        self.errors += 1
        if isinstance(error, GuestError | DmaFault):
            self.log.info("%s: %s: %s", self.name, what, error)
        else:
            self.log.error("%s: %s: the model failed", self.name, what, exc_info=error)

    # ---- enables, interrupts, reset ---------------------------------------------------------

    def update_enables(self) -> None:
        """Command, or the power state, has changed."""
        command, on = self.config.command, self._in_d0()
        self.dma.bus_master = bool(command.BUS_MASTER) and on and not self._stopped
        for bar in self.declared_bars():
            self.function.enable_region(bar.index, on and bool(command.IO if bar.io else command.MEMORY))
        self.update_interrupts()

    def _in_d0(self) -> bool:
        return all(c.state == 0 for c in self.config.capabilities if isinstance(c, Pm))

    def update_interrupts(self) -> None:
        """Which kinds may be signalled now (PCIe 5.0).

        A message is a memory write, which needs bus mastering (7.5.1.1.3); outside of D0 nothing is sent (5.3.1.4); a
        function with MSI or MSI-X enabled does not use INTx, nor one of them beside the other (6.1.4).
        """
        command, on = self.config.command, self._in_d0() and not self._stopped
        master = on and bool(command.BUS_MASTER)
        using = [c.irq for c in self.config.capabilities if isinstance(c, Msi | Msix) and c.enabled]
        self.irqs.allow(
            {
                Irq.INTX: on and not command.INTX_DISABLE and not using,
                Irq.MSI: master and using == [Irq.MSI],
                Irq.MSIX: master and using == [Irq.MSIX],
                Irq.ERR: not self._stopped,
                Irq.REQ: not self._stopped,
            }
        )

    def config_written(self) -> None:
        """The driver has written something that matters."""
        messages = [c.enabled for c in self.config.capabilities if isinstance(c, Msi | Msix)]
        self.points.told(master=bool(self.config.command.BUS_MASTER), interrupts=any(messages) or not messages)

    def _show_intx(self, level: bool) -> None:
        header = self.config.header
        header.STATUS = Status.INTERRUPT.put(header.STATUS, int(level))

    def reset(self, kind: ResetKind) -> None:
        """Brings all registers to their declared values; RAM areas keep their contents."""
        self.points.at(Point.RESET, lambda _: self._reset(kind), kind=kind.value)

    def _reset(self, kind: ResetKind) -> None:
        self.points.reset()
        self._agenda.cancel()
        if self._pin is not None:
            self._pin.lower()
        for _, _, bank in self.register_banks.values():
            bank.load_reset()
        self.config.reset(kind)
        self.update_enables()
        try:
            self.on_reset(kind)
        except Exception as error:
            self._failed("on_reset", error)

    # ---- for the server ---------------------------------------------------------------------

    def reset_device(self) -> None:
        """VFIO_USER_DEVICE_RESET."""
        self.reset(ResetKind.DEVICE)

    def irq_info(self, index: int) -> IrqInfo:
        """DEVICE_GET_IRQ_INFO."""
        return self.irqs.info(index)

    def set_irqs(self, request: SetIrqs) -> None:
        """DEVICE_SET_IRQS."""
        self.irqs.set(request)

    def has_work(self) -> bool:
        """Whether `run_due` is worth calling; after a wake-up it always is."""
        return self._agenda.waiting

    def run_due(self, now_ns: int) -> int | None:
        """Runs what is due; the next deadline in monotonic ns, or None."""
        return None if self._stopped else self._agenda.run(now_ns)

    def client_came(self, hang_up: Callable[[], None]) -> None:
        """A client has connected; `hang_up` ends that."""
        self.hang_up = hang_up
        self.regions = self._region_infos(self.declared_bars())
        self.points.at(Point.CONNECTION, lambda _: None)

    def client_gone(self) -> None:
        """Lets go of what the client gave; registers stay."""
        self.hang_up = None
        self.irqs.close()
        self.points.at(Point.UNPLUG, lambda _: None)

    def quiesce(self, stopped: bool) -> None:
        """Stops timers, DMA and interrupts for migration, or resumes them."""
        self._stopped = stopped
        self.update_enables()

    def io_event_fds(self, region: int) -> Sequence[IoEventFd]:
        """The doorbells of a region: registers declared with `ioeventfd`."""
        if not self._events:
            for index, at, bank in self.register_banks.values():
                for register in bank.registers:
                    if register.ioeventfd:
                        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                        self.function.watch(fd, len(self._events))
                        self._events.append(IoEventFd(at + register.offset, register.size, fd))
                        self._event_registers.append((index, at + register.offset, register.size))
        return [event for event, where in zip(self._events, self._event_registers, strict=True) if where[0] == region]

    def event(self, cookie: int) -> None:
        """A doorbell's eventfd has fired: as a write of 0."""
        region, offset, size = self._event_registers[cookie]
        self.region_write(region, offset, size, 0)

    # ---- state ------------------------------------------------------------------------------

    def _layout(self) -> bytes:
        """Tells states of other models, or of other versions of this one, apart: 32 bytes."""
        registers = [
            (name, region, at, r.name, r.offset, r.width)
            for name, (region, at, bank) in self.register_banks.items()
            for r in bank.registers
        ]
        sizes = [len(store) for store in self._stores()]
        text = json.dumps([self.vendor_id, self.device_id, registers, sizes])
        return hashlib.sha256(text.encode()).digest()

    def _stores(self) -> list[memoryview]:
        return [bank.view for _, _, bank in self.register_banks.values()] + self._rams + [self.config.view]

    @property
    def max_state(self) -> int:
        """Most bytes that a state of this device can have."""
        return _STATE.size + sum(map(len, self._stores())) + self.max_extra

    def save(self) -> bytes:
        """Registers, RAM areas, config space and `save_extra`.

        Timers are not part of it: a model that has some running keeps what it needs in `save_extra`.  The format has a
        head of fixed size (_STATE), and nothing in it that would have to be parsed.
        """
        extra = self.save_extra()
        if len(extra) > self.max_extra:
            raise PeerError(
                errno.EFBIG, f"{self.name}: save_extra gave {len(extra)} bytes, max_extra is {self.max_extra}"
            )
        return b"".join([_STATE.pack(_STATE_MAGIC, self._layout()), *map(bytes, self._stores()), extra])

    def restore(self, data: bytes) -> None:
        """Takes a state of `save` over.  PeerError(EINVAL), and nothing has changed, when it is not one."""
        stores = self._stores()
        if data[: _STATE.size] != _STATE.pack(_STATE_MAGIC, self._layout()):
            raise PeerError(errno.EINVAL, f"{self.name}: the state cannot be restored: of another model, or no state")
        own = sum(map(len, stores))
        if not own <= len(data) - _STATE.size <= own + self.max_extra:
            raise PeerError(errno.EINVAL, f"{self.name}: the state cannot be restored: {len(data)} bytes")
        body = memoryview(data)[_STATE.size :]
        self.restore_extra(bytes(body[own:]))
        at = 0
        for store in stores:
            store[:] = body[at : at + len(store)]
            at += len(store)
        for capability in self.config.capabilities:
            if isinstance(capability, Pm):
                capability.state = capability.regs.PMCSR & 3
        if self._pin is not None:
            self._pin.level = bool(Status(self.config.header.STATUS).INTERRUPT)
        self.update_enables()

    def close(self) -> None:
        """Gives back fds and memory; the device is of no use afterwards."""
        self._agenda.cancel()
        self.irqs.close()
        self.dma.close()
        self.memory.close()
        for event in self._events:
            self.function.unwatch(event.fd)
            os.close(event.fd)
        self._events.clear()

    @classmethod
    def describe(cls) -> dict[str, Any]:
        """The declaration as plain data, for `vmodel regs`."""
        return {
            "vendor_id": cls.vendor_id,
            "device_id": cls.device_id,
            "class_code": cls.class_code,
            "doc": (cls.__doc__ or "").strip().partition("\n")[0],
            "capabilities": [type(c).__name__ for c in cls.declared_capabilities().values()],
            "bars": [
                {
                    "index": bar.index,
                    "size": bar.size,
                    "kind": "io" if bar.io else "memory64" if bar.is_64bit else "memory32",
                    "banks": [
                        {
                            "name": b.bank.__name__,
                            "offset": b.at,
                            "size": b.bank.size,
                            "registers": list(b.bank.describe()),
                        }
                        for b in bar.banks
                    ],
                    "ram": [{"offset": r.at, "size": r.size, "mappable": r.mappable} for r in bar.rams],
                }
                for bar in cls.declared_bars()
            ],
        }


def _as_bytes(value: int | bytes, count: int) -> bytes:
    return value.to_bytes(count, "little") if isinstance(value, int) else value


def hooked_registers(model: type[PciDevice]) -> dict[Register, set[str]]:
    """Which registers of a model have hooks, and of which kind."""
    found: dict[Register, set[str]] = {}
    for hook in model._hooks:
        found.setdefault(hook.register, set()).add(hook.kind)
    return found
