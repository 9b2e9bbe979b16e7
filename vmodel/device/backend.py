"""`VfioBackend`: one function as the server, the client's session and its own capabilities see it.

It is for the framework, tests and experiments; models use `PciDevice` only.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

from vmodel._shim import FunctionRegions
from vmodel._shim import key as access_key
from vmodel.device.declare import Declaration
from vmodel.device.regions import Regions
from vmodel.device.state import State
from vmodel.device.watches import Watches
from vmodel.dma import Dma
from vmodel.errors import DmaFault, GuestError, Reason
from vmodel.logs import limited
from vmodel.memory import GuestMemory
from vmodel.mistakes import exception_line
from vmodel.pci.bar import BankSlot
from vmodel.pci.caps import Msi, Msix, Pm, ResetKind
from vmodel.pci.config import ConfigSpace, StatusRegister
from vmodel.pci.express import DevCtl, Pcie
from vmodel.pci.irq import Intx, Irqs
from vmodel.points import ConnectionEvent, Point, Points, ResetEvent
from vmodel.regs import Hook, RegisterBank
from vmodel.span import Span
from vmodel.threads import Owner, Pause, owned
from vmodel.timers import Agenda
from vmodel.vfio_user.commands import IoEventFd, IrqInfo, RegionInfo, SetIrqs
from vmodel.vfio_user.wire import Irq, Region

#: Bugs of a model that are kept; further ones are only counted and logged.
_MOST_MODEL_ERRORS = 10
#: No request was sent, or nothing has come back.
_NO_COMPLETION = frozenset(
    (
        Reason.BUS_MASTER_OFF,
        Reason.WRAP,
        Reason.UNALIGNED,
        Reason.NO_FILE,
        Reason.WOULD_DEADLOCK,
        Reason.COMPLETION_TIMEOUT,
    )
)


class Model(Protocol):
    """What the backend calls on a model; `PciDevice` documents each method."""

    max_extra: ClassVar[int]

    def on_reset(self, kind: ResetKind) -> None: ...
    def on_enables(self) -> None: ...
    def on_wake(self) -> None: ...
    def save_extra(self) -> bytes: ...
    def restore_extra(self, data: bytes) -> None: ...


class Accesses(Protocol):
    """Answers accesses: `Regions`, or a tap of an experiment in front of it."""

    def read(self, key: int, region: int, offset: int, count: int) -> int | bytes: ...
    def write(self, key: int, region: int, offset: int, count: int, value: int | bytes) -> None: ...


@dataclasses.dataclass(frozen=True)
class ModelError:
    """An exception of a model that is a bug: neither a GuestError nor a DmaFault.  `what`: the access or callback."""

    what: str
    error: BaseException

    def __str__(self) -> str:
        return f"{self.what}: {exception_line(self.error)}"


class _TableArea:
    """The MSI-X table in its BAR."""

    def __init__(self, msix: Msix) -> None:
        self.span = Span.sized(msix.table_offset, msix.table_size)
        self._msix = msix

    def read(self, offset: int, count: int) -> bytes:
        return self._msix.table_read(offset - self.span.start, count)

    def write(self, offset: int, data: bytes) -> None:
        self._msix.table_write(offset - self.span.start, data)


class VfioBackend:
    """One function's regions, interrupts and life cycle.

    Only the thread that serves the device may call methods, unless a docstring says "any thread".
    """

    def __init__(self, declaration: Declaration, model: Model, name: str, *, multifunction: bool = False) -> None:
        """Lays out the function.  RegisterError: the declared parts do not fit."""
        self.declaration = declaration
        self.name = name
        self._model = model
        self.function = FunctionRegions()
        self.memory = GuestMemory()
        self.dma = Dma(self.memory)
        #: The thread that serves the device.
        self.owner = Owner(name)
        #: Waits of that thread in which it serves no client.
        self.pause = Pause()
        self.irqs = Irqs(self.function.signal, self.owner)
        #: Fault points, which experiments can arm; see vmodel.points.
        self.points = Points(name)
        self.agenda = Agenda(self.function.wake, lambda error: self.failed("a callback", error))
        self.watches = Watches(self.name, lambda call: self.defer(call, None), self.failed)
        #: The device's thread did not end (Server.stop) and may still use the device: nothing else may.
        self.abandoned = False
        #: How many exceptions the model's hooks and callbacks have raised.
        self.errors = 0
        #: How many of them are bugs, and the first of those.
        self.bugs = 0
        self.model_errors: list[ModelError] = []
        self.log = limited(f"vmodel.device.{name}")
        #: Nanoseconds spent with timers and deferred work.
        self.busy_ns = 0
        #: Ends the client's connection, on the device's thread; None: there is no client.
        self.hang_up: Callable[[], None] | None = None
        #: (region, offset, bank) of each bank in a BAR, by the name of its attribute.
        self.banks: dict[str, tuple[int, int, RegisterBank]] = {}
        #: The instance's object for each declared part, by the name of its attribute.
        self.parts: dict[str, object] = {}
        #: The interrupt pin; None: the function has none.
        self.pin: Intx | None = None
        #: `regions` answers accesses: the plain ones, or a tap in front of them.
        self.plain_regions = Regions(self.function, self._access_failed, self.owner)
        self.regions: Accesses = self.plain_regions
        self._stopped = False
        self._rams: list[memoryview] = []
        self._events: list[IoEventFd] = []
        self._event_registers: list[tuple[int, int, int]] = []
        self.config = self._lay_out(multifunction)
        self.dma.on_refused(self._refused)
        self.dma.set_no_snoop_enable(self._no_snoop)
        #: DEVICE_GET_REGION_INFO, by VFIO region index.
        self.region_infos = self._region_infos()
        self._state: State | None = None

    # ---- layout -----------------------------------------------------------------------------

    def _lay_out(self, multifunction: bool) -> ConfigSpace:
        declared, function = self.declaration, self.function
        for bar in declared.bars:
            function.define_region(bar.index, bar.size, fill=bar.fill)
        if declared.rom:
            function.define_region(Region.ROM, len(declared.rom), writable=False)
            function.add_ram(Region.ROM, 0, len(declared.rom))[:] = declared.rom
        config = ConfigSpace(
            self,
            function,
            dataclasses.replace(declared.identity, multifunction=multifunction),
            declared.bars,
            len(declared.rom),
            list(declared.capabilities.values()),
            declared.hooked,
        )
        self.plain_regions.before_reads(Region.CONFIG, config.reading)
        self.plain_regions.after_writes(Region.CONFIG, config.written)
        for at, bank in config.banks:
            self._add_hooks(Region.CONFIG, at, bank)
        for name, bound in zip(declared.capabilities, config.capabilities, strict=True):
            self.parts[name] = bound
            if isinstance(bound, Msix):
                self._lay_msix(bound)
        for name, pin in declared.pins.items():
            self.pin = self.parts[name] = pin.bind(self.irqs, self._set_intx_status)
        for name, slot in declared.banks.items():
            self._lay_bank(name, slot)
        for name, ram in declared.rams.items():
            view = function.add_ram(ram.bar.index, ram.at, ram.size, mappable=ram.mappable)
            self.parts[name] = view
            self._rams.append(view)
        return config

    def _lay_bank(self, name: str, slot: BankSlot) -> None:
        region, declared = slot.bar.index, self.declaration
        bank = slot.bank(self.function.add_bank(region, slot.at, slot.bank.size))
        bank.view[:] = bytes([declared.bar(region).fill]) * len(bank.view)
        bank.load_reset(everything=True)
        policy = slot.bank.policy(declared.hooked(slot.bank, "read"), declared.hooked(slot.bank, "write"))
        self.function.set_policy(region, slot.at, policy)
        self._add_hooks(region, slot.at, bank)
        self.banks[name] = (region, slot.at, bank)
        self.parts[name] = bank

    def _add_hooks(self, region: int, at: int, bank: RegisterBank) -> None:
        mine = {h: self._method(h, name) for h, name in self.declaration.hooks.items() if h.register.bank is type(bank)}
        readers = {hook.register: method for hook, method in mine.items() if hook.kind == "read"}
        writers = {hook.register: method for hook, method in mine.items() if hook.kind == "write"}
        self.plain_regions.add_hooks(region, at, bank, readers, writers)

    def _method(self, hook: Hook, name: str) -> Callable[..., Any]:
        method: Callable[..., Any] = getattr(self._model, name)
        return method if hook.index is None else functools.partial(method, hook.index)

    def _lay_msix(self, msix: Msix) -> None:
        self.function.add_hook(msix.bar.index, msix.table_offset, msix.table_size)
        msix.pba = self.function.add_bank(msix.bar.index, msix.pba_offset, msix.pba_size)
        self.plain_regions.add_area(msix.bar.index, _TableArea(msix))

    # ---- accesses ---------------------------------------------------------------------------

    def region_read(self, region: int, offset: int, count: int) -> int | bytes:
        """Reads as the guest does: an int, or bytes when count > 8.  If a hook fails, the value is all ones."""
        return self.regions.read(access_key(region, offset, count), region, offset, count)

    def region_write(self, region: int, offset: int, count: int, value: int | bytes) -> None:
        """Writes as the guest does; `value` is an int or bytes."""
        if count <= 8 and not isinstance(value, int):
            value = int.from_bytes(value, "little")
        self.regions.write(access_key(region, offset, count), region, offset, count, value)

    def _region_infos(self) -> Sequence[RegionInfo]:
        infos = [RegionInfo(0)] * 9
        for bar in self.declaration.bars:
            areas = self.declaration.mappable(bar.index)
            infos[bar.index] = RegionInfo(bar.size, mmap_fd=self.function.region_fd(bar.index), mmap_areas=areas)
        if self.declaration.rom:
            infos[Region.ROM] = RegionInfo(len(self.declaration.rom), writable=False)
        infos[Region.CONFIG] = RegionInfo(self.config.size)
        return infos

    def failed(self, what: str, error: BaseException) -> None:
        """Logs and counts an exception of the model, even a SystemExit; `what` names the hook or callback."""
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise error  # the user's Ctrl-C
        self.errors += 1
        if isinstance(error, GuestError | DmaFault):
            self.log.info("%s: %s: %s", self.name, what, error)
            return
        found = ModelError(what, error)
        self.bugs += 1
        if len(self.model_errors) < _MOST_MODEL_ERRORS:
            self.model_errors.append(found)
        self.log.error("%s: the model failed: %s", self.name, found, exc_info=error)

    def _access_failed(self, kind: str, region: int, offset: int, error: BaseException) -> None:
        self.failed(f"{kind} of {self.place(region, offset)}", error)

    def place(self, region: int, offset: int) -> str:
        """The register at an offset, as "regs.STATUS", or region and offset if there is none."""
        banks = [(name, at, bank.registers) for name, (where, at, bank) in self.banks.items() if where == region]
        if region == Region.CONFIG:
            banks += [(name, at, bank.registers) for name, at, bank in self.config.places]
        for name, at, registers in banks:
            for register in registers:
                if register.offset <= offset - at < register.offset + register.size:
                    return f"{name}.{register.name}" if name else register.name
        return f"region {region} at {offset:#x}"

    # ---- enables, interrupts, reset ---------------------------------------------------------

    def update_enables(self) -> None:
        """Applies the Command register and the power state: bus mastering, decoding of BARs, interrupts."""
        command, on = self.config.command, self._in_d0()
        self.dma.bus_master = bool(command.BUS_MASTER) and on and not self._stopped
        for bar in self.declaration.bars:
            self.function.enable_region(bar.index, on and bool(command.IO if bar.io else command.MEMORY))
        self.update_interrupts()
        self._model.on_enables()

    def _in_d0(self) -> bool:
        return all(c.state == 0 for c in self.config.capabilities if isinstance(c, Pm))

    def update_interrupts(self) -> None:
        """Updates which interrupt types may be signalled (PCIe 5.0).

        A message is a memory write, which needs bus mastering (7.5.1.1.3).  Outside of D0 nothing is sent (5.3.1.4).  A
        function uses only one of INTx, MSI and MSI-X: with MSI or MSI-X enabled it does not use INTx, and with both
        enabled it signals nothing (6.1.4).
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

    def detected(self, errors: int) -> None:
        """Errors for PCI Express Device Status; nothing where there is none."""
        for capability in self.config.capabilities:
            if isinstance(capability, Pcie):
                capability.regs.DEVSTA |= errors

    def _no_snoop(self) -> bool:
        """Enable No Snoop of Device Control; False where there is none."""
        return any(DevCtl(c.regs.DEVCTL).NO_SNOOP for c in self.config.capabilities if isinstance(c, Pcie))

    def _refused(self, reason: Reason) -> None:
        """A completion has come that is none of success (PCIe 5.0, 7.5.1.1.4)."""
        header = self.config.header
        if reason is Reason.POISONED:
            header.STATUS |= StatusRegister.DETECTED_PARITY.mask | (
                StatusRegister.PARITY.mask if self.config.command.PARITY else 0
            )
        elif reason is Reason.COMPLETER_ABORT:
            header.STATUS |= StatusRegister.RECEIVED_TARGET_ABORT.mask
        elif reason not in _NO_COMPLETION:
            header.STATUS |= StatusRegister.RECEIVED_MASTER_ABORT.mask

    def config_written(self) -> None:
        """Updates the driver's phase (`Points`) after a config space write that exits."""
        messages = [c.enabled for c in self.config.capabilities if isinstance(c, Msi | Msix)]
        master = bool(self.config.command.BUS_MASTER)
        self.points.config_changed(master=master, interrupts=any(messages) or not messages)

    def _set_intx_status(self, level: bool) -> None:
        header = self.config.header
        header.STATUS = StatusRegister.INTERRUPT.put(header.STATUS, int(level))

    @owned
    def reset(self, kind: ResetKind) -> None:
        """Sets all registers to their reset values and runs `on_reset`; RAM areas keep their contents."""
        self.points.at(ResetEvent(Point.RESET, kind=kind.value), lambda _: self._reset(kind))

    def _reset(self, kind: ResetKind) -> None:
        self.points.reset()
        self.agenda.cancel()
        if self.pin is not None:
            self.pin.lower()
        for _, _, bank in self.banks.values():
            bank.load_reset()
        self.config.reset(kind)
        self.update_enables()
        try:
            self._model.on_reset(kind)
        except BaseException as error:
            self.failed("on_reset", error)

    def reset_device(self) -> None:
        """Carries out DEVICE_RESET."""
        self.reset(ResetKind.DEVICE)

    def irq_info(self, index: int) -> IrqInfo:
        """The answer to DEVICE_GET_IRQ_INFO."""
        return self.irqs.info(index)

    def set_irqs(self, request: SetIrqs) -> None:
        """Carries out DEVICE_SET_IRQS; errors as `Irqs.set`."""
        self.irqs.set(request)

    # ---- life -------------------------------------------------------------------------------

    def defer(self, call: Callable[[], None], by: VfioBackend | None) -> None:
        """Runs `call` on the device's thread once the current access has been answered.  Any thread.

        `by`: the device that owns this work, whose reset cancels it; None: no reset does.
        """
        self.agenda.defer(call, None if by is None else by.agenda)

    def has_work(self) -> bool:
        """Whether `run_due` may have work; call it after every wake-up in any case."""
        return self.agenda.waiting

    @owned
    def run_due(self, now_ns: int) -> int | None:
        """Runs timers and deferred work that are due; returns the next deadline in monotonic ns, or None."""
        if self._stopped:
            return None
        self._model.on_wake()
        deadline = self.agenda.run(now_ns)
        self.busy_ns += time.monotonic_ns() - now_ns
        return deadline

    def client_came(self, hang_up: Callable[[], None]) -> None:
        """Called when a client has connected; `hang_up` ends its connection."""
        self.hang_up = hang_up
        self.region_infos = self._region_infos()
        self.points.at(ConnectionEvent(Point.CONNECTION), lambda _: None)

    def client_gone(self) -> None:
        """Called when the client has disconnected: closes its eventfds; registers keep their values."""
        self.hang_up = None
        self.irqs.close()
        self.points.at(ConnectionEvent(Point.UNPLUG), lambda _: None)

    @owned
    def quiesce(self, stopped: bool) -> None:
        """Stops timers, DMA and interrupts for migration, or resumes them."""
        self._stopped = stopped
        self.update_enables()
        if not stopped:
            self.function.wake()  # what came meanwhile was not looked at

    def io_event_fds(self, region: int) -> Sequence[IoEventFd]:
        """The doorbells of a region: registers declared with `ioeventfd`."""
        if not self._events:
            for index, at, bank in self.banks.values():
                for register in bank.registers:
                    if register.ioeventfd:
                        fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                        self.function.watch(fd, len(self._events))
                        self._events.append(IoEventFd(at + register.offset, register.size, fd))
                        self._event_registers.append((index, at + register.offset, register.size))
        return [event for event, where in zip(self._events, self._event_registers, strict=True) if where[0] == region]

    def event(self, cookie: int) -> None:
        """Called when the eventfd of doorbell `cookie` was signalled: writes 0 to its register."""
        self.region_write(*self._event_registers[cookie], 0)

    # ---- state ------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        """The layout of the saved state, which migration uses."""
        if self._state is None:
            registers = [
                (name, region, at, r.name, r.offset, r.width)
                for name, (region, at, bank) in self.banks.items()
                for r in bank.registers
            ]
            identity = self.declaration.identity
            tables = [c.store for c in self.config.capabilities if isinstance(c, Msix)]
            self._state = State(
                self.name,
                [identity.vendor_id, identity.device_id, registers],
                [bank.view for _, _, bank in self.banks.values()] + self._rams + [self.config.view] + tables,
                self._model.max_extra + self.irqs.saved_size,
            )
        return self._state

    @property
    def max_state(self) -> int:
        """Most bytes of a saved state of this device."""
        return self.state.max_size

    def save(self) -> bytes:
        """The device's state, including the model's `save_extra`.  PeerError(EFBIG): that is too long."""
        return self.state.save(self.irqs.save() + self._model.save_extra())

    @owned
    def restore(self, data: bytes) -> None:
        """Loads a state that `save` returned.  PeerError(EINVAL): it is invalid; nothing has changed then."""
        body, extra = self.state.split(data)
        pending = self.irqs.parse(extra[: self.irqs.saved_size])
        self._model.restore_extra(extra[self.irqs.saved_size :])
        self.state.load(body)
        self.irqs.restore(pending)
        for capability in self.config.capabilities:
            capability.restored()
        if self.pin is not None:
            self.pin.level = bool(StatusRegister(self.config.header.STATUS).INTERRUPT)
        self.update_enables()

    def close(self) -> None:
        """Releases fds and memory; the device must not be used afterwards."""
        self.watches.close()
        self.agenda.cancel()
        self.irqs.close()
        self.dma.close()
        self.memory.close()
        for event in self._events:
            self.function.unwatch(event.fd)
            os.close(event.fd)
        self._events.clear()
