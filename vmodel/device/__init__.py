"""`PciDevice`: the base class of models.  `devices/edu.py` is the tutorial.

A class declares the hardware: identity, BARs, register banks, capabilities and hooks (`declare`).  A mistake in a
declaration is a `RegisterError` when the class is made.  An instance is one PCI function; it does not depend on sockets
or QEMU, so a test can use it by itself.  Parts that a model does not need, such as accesses, eventfds and migration,
are in `PciDevice.backend`.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import pydantic

from vmodel.device.backend import VfioBackend
from vmodel.device.declare import Declaration
from vmodel.device.outside import outside
from vmodel.device.vectors import check_vectors
from vmodel.device.watches import Watch
from vmodel.dma import Dma
from vmodel.errors import PeerError
from vmodel.memory import GuestMemory
from vmodel.pci.bar import IoBar, MmioBar
from vmodel.pci.caps import Msi, Msix, Pm, ResetKind, VendorSpecific
from vmodel.pci.config import ConfigSpace
from vmodel.pci.express import Pcie
from vmodel.pci.irq import Intx
from vmodel.points import Points
from vmodel.regs import RegisterError, on_read, on_read_each, on_write, on_write_each
from vmodel.span import KiB
from vmodel.timers import Timer

__all__ = [
    "Intx",
    "IoBar",
    "MmioBar",
    "Msi",
    "Msix",
    "Params",
    "PciDevice",
    "Pcie",
    "Pm",
    "ResetKind",
    "VendorSpecific",
    "on_read",
    "on_read_each",
    "on_write",
    "on_write_each",
    "outside",
]


class Params(pydantic.BaseModel):
    """Base of a model's parameters, which a machine file sets under `params`; unknown keys are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class PciDevice:
    """One PCI function.

    ```python
    class Card(PciDevice):
        vendor_id, device_id, class_code = 0x1234, 0x0001, 0xFF0000
        bar0 = MmioBar(0, size=4096)
        regs = bar0.bank(CardRegs)
        irq = Intx()

        def setup(self) -> None:
            self.jobs: list[Job] = []
    ```

    A model overrides `setup`, `on_reset` and other methods as needed; it has no `__init__`.  Only the thread that
    serves the device may call methods, except `after`, `defer`, `post` and `close`.
    """

    vendor_id: ClassVar[int]
    device_id: ClassVar[int]
    #: 24 bits: class, subclass, programming interface.
    class_code: ClassVar[int]
    revision: ClassVar[int] = 0
    subsystem_vendor_id: ClassVar[int] = 0
    subsystem_id: ClassVar[int] = 0
    #: Contents of the expansion ROM: a power of two of at least 2 KiB; empty: there is no ROM.
    rom: ClassVar[bytes] = b""
    #: The model's parameters; a model overrides this with a nested class.
    Params: ClassVar[type[Params]] = Params
    #: Most bytes that `save_extra` returns; a longer saved state is refused.
    max_extra: ClassVar[int] = 64 * KiB

    #: The parts and hooks that the class declares.
    declaration: ClassVar[Declaration]
    #: Names that neither a subclass nor an instance may redefine.
    _reserved: ClassVar[frozenset[str]] = frozenset()

    #: The device's name in the machine.
    name: str
    #: An instance of the model's Params.
    params: Any
    log: logging.Logger
    #: Reads and writes guest memory, as the device does.
    dma: Dma
    #: The guest memory that the client has mapped.
    memory: GuestMemory
    config: ConfigSpace
    #: Fault points, which experiments can arm; see vmodel.points.
    points: Points
    #: Accesses, eventfds of interrupts, and migration.
    backend: VfioBackend

    def __init_subclass__(cls) -> None:
        for name in vars(cls):
            if name in _FRAMEWORK:
                raise RegisterError(
                    f"{cls.__name__}.{name}: PciDevice uses this name itself; reserved are:"
                    f" {', '.join(sorted(_FRAMEWORK))}"
                )
        for name, instead in (("__init__", "setup()"), ("__new__", "for_params()")):
            if name in vars(cls):
                raise RegisterError(f"{cls.__name__}.{name}: a model overrides {instead} instead")
        if hasattr(cls, "vendor_id"):
            cls.declaration = Declaration.of(cls)
            cls._reserved = _FRAMEWORK | cls.declaration.names
            if not any("for_params" in vars(base) for base in cls.__mro__ if base is not PciDevice):
                # Else parameters change what there is.
                check_vectors(cls, cls.declaration.capabilities)
            # Laying out a device once finds all other mistakes now, not when a machine starts.
            VfioBackend(cls.declaration, object.__new__(cls), cls.__name__).close()

    @classmethod
    def for_params(cls, params: Any) -> type[Self]:
        """The class to make for these parameters, an instance of Params: this class or a subclass of it.

        A model whose parameters change its declaration overrides this.
        """
        return cls

    def __new__(
        cls,
        name: str = "",
        params: pydantic.BaseModel | Mapping[str, Any] | None = None,
        *,
        multifunction: bool = False,
    ) -> Self:
        return object.__new__(cls.for_params(cls._validate(params)))

    def __init__(
        self,
        name: str = "",
        params: pydantic.BaseModel | Mapping[str, Any] | None = None,
        *,
        multifunction: bool = False,
    ) -> None:
        """`params`: an instance of the model's Params, or a mapping with its values (pydantic.ValidationError)."""
        name = name or type(self).__name__.lower()
        made: dict[str, object] = {
            "name": name,
            "params": self._validate(params),
        }
        vars(self).update(made)
        backend = VfioBackend(self.declaration, self, name, multifunction=multifunction)
        for what in ("log", "dma", "memory", "config", "points"):
            made[what] = getattr(backend, what)
        vars(self).update(made, backend=backend, **backend.parts)
        self.setup()
        self.reset(ResetKind.DEVICE)

    @classmethod
    def _validate(cls, params: pydantic.BaseModel | Mapping[str, Any] | None) -> pydantic.BaseModel:
        return params if isinstance(params, cls.Params) else cls.Params.model_validate(params or {})

    def __setattr__(self, name: str, value: object) -> None:
        if name in self._reserved:
            raise RegisterError(
                f"{type(self).__name__}.{name} is a part of the device or used by PciDevice: it cannot be replaced"
            )
        object.__setattr__(self, name, value)

    # ---- for a model to override --------------------------------------------------------------

    def setup(self) -> None:
        """Makes the model's own attributes; runs once, after registers, `params` and `dma` exist, before any reset."""

    def on_reset(self, kind: ResetKind) -> None:
        """Resets the model's own state: registers have their reset values, timers are cancelled.

        Also runs once when the device is made, after `setup`.
        """

    def on_enables(self) -> None:
        """Called when the Command register or the power state may have changed."""

    def on_wake(self) -> None:
        """Called on the device's thread after each wake-up, before timers and deferred work run."""

    def open(self) -> None:
        """Opens files and other resources, just before the device is served; `close` releases them.

        ConfigError: one line for the user.
        """

    def save_extra(self) -> bytes:
        """The model's state that is neither in registers nor in RAM areas, for migration; at most `max_extra` bytes."""
        return b""

    def restore_extra(self, data: bytes) -> None:
        """Loads the state that `save_extra` returned.  PeerError(EINVAL): it is invalid; nothing may change then."""
        if data:
            raise PeerError(errno.EINVAL, f"{self.name}: {len(data)} bytes of state, but this model has none")

    def close(self) -> None:
        """Releases fds and memory; the device must not be used afterwards."""
        self.backend.close()

    # ---- for a model to call ------------------------------------------------------------------

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Runs `call` after `seconds` on the device's thread.  A reset cancels it.  Any thread.

        ```python
        self.timer = self.after(0.010, self.finish)
        ```
        """
        return self.backend.agenda.after(seconds, call)

    def defer(self, call: Callable[[], None], *, by: PciDevice | None = None) -> None:
        """Runs `call` on the device's thread once the current access has been answered.  Any thread.

        `by`: the device that owns this work, whose reset cancels it; None: this device.
        """
        self.backend.defer(call, (self if by is None else by).backend)

    def post(self, call: Callable[[], None]) -> None:
        """Like `defer`, but no reset cancels it: for a thread that waits until `call` has run."""
        self.backend.defer(call, None)

    def watch(self, fd: int, call: Callable[[], None]) -> Watch:
        """Runs `call` on the device's thread while `fd` is readable or at its end; the result's `cancel` ends that.

        A reset does not.  The fd stays the model's.  If `call` raises an exception other than GuestError and DmaFault,
        the watch ends.  OSError: EPERM, a regular file; ENOSPC, more than 32 fds.  Any thread.
        """
        return self.backend.watches.add(fd, call)

    def reset(self, kind: ResetKind) -> None:
        """Sets all registers to their reset values and runs `on_reset`; RAM areas keep their contents."""
        self.backend.reset(kind)

    @property
    def errors(self) -> int:
        """How many exceptions the model's hooks and callbacks have raised."""
        return self.backend.errors


#: Names that a model must not redefine.
_FRAMEWORK = frozenset(
    [
        "after",
        "backend",
        "config",
        "declaration",
        "defer",
        "dma",
        "errors",
        "log",
        "memory",
        "name",
        "points",
        "post",
        "reset",
        "watch",
    ]
)
