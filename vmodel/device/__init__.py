"""`PciDevice`: what a model derives from.  `devices/edu.py` is the tutorial.

A class declares what the hardware is: identity, BARs, banks of registers, capabilities, hooks (`declare`).  Mistakes in
that are `RegisterError`s when the class is made.  An instance is one function; it knows nothing of sockets or QEMU, and
a test can use it by itself.  What a model does not need, such as accesses, interrupts' eventfds and migration, is in
`PciDevice.backend`.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import pydantic

from vmodel.device.backend import VfioBackend
from vmodel.device.declare import Declaration
from vmodel.dma import Dma
from vmodel.errors import PeerError
from vmodel.memory import GuestMemory
from vmodel.pci.bar import IoBar, MmioBar
from vmodel.pci.caps import Msi, Msix, Pm, ResetKind, VendorSpecific
from vmodel.pci.config import ConfigSpace
from vmodel.pci.express import Pcie
from vmodel.pci.irq import Intx
from vmodel.points import Points
from vmodel.regs import RegisterError, on_read, on_write, on_write_each
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
    "on_write",
    "on_write_each",
]


class Params(pydantic.BaseModel):
    """A model's parameters, as in a machine file; unknown ones are refused."""

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

    A model overrides `setup`, `on_reset` and what else it needs; it has no `__init__`.  All methods but `after`,
    `defer`, `post` and `close` belong to the thread that serves the device.
    """

    vendor_id: ClassVar[int]
    device_id: ClassVar[int]
    #: 24 bits: class, subclass, programming interface.
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

    #: What the class declares.
    declaration: ClassVar[Declaration]
    #: Names that neither a subclass nor an instance may use for something else.
    _reserved: ClassVar[frozenset[str]] = frozenset()

    #: Its name in the machine.
    name: str
    #: An instance of the model's Params.
    params: Any
    log: logging.Logger
    #: Reads and writes the guest's memory.
    dma: Dma
    #: What the client shares of the guest's memory.
    memory: GuestMemory
    config: ConfigSpace
    #: What experiments may interfere with; see vmodel.points.
    points: Points
    #: What is behind all this: accesses, interrupts' eventfds, migration.
    backend: VfioBackend

    def __init_subclass__(cls) -> None:
        for name in vars(cls):
            if name in _FRAMEWORK:
                raise RegisterError(
                    f"{cls.__name__}.{name}: PciDevice has something else of that name; reserved are:"
                    f" {', '.join(sorted(_FRAMEWORK))}"
                )
        for name, instead in (("__init__", "setup()"), ("__new__", "for_params()")):
            if name in vars(cls):
                raise RegisterError(f"{cls.__name__}.{name}: a model overrides {instead} instead")
        if hasattr(cls, "vendor_id"):
            cls.declaration = Declaration.of(cls)
            cls._reserved = _FRAMEWORK | cls.declaration.names
            # A trial run of the layout finds everything else now rather than when a machine starts.
            VfioBackend(cls.declaration, object.__new__(cls), cls.__name__).close()

    @classmethod
    def for_params(cls, params: Any) -> type[Self]:
        """For a model to override whose parameters change what is declared: this class, or a subclass of it.

        `params` is an instance of Params.
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
        """`params`: an instance of the model's Params, or what makes one (pydantic.ValidationError)."""
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
                f"{type(self).__name__}.{name} is a part of the device, or PciDevice's: it cannot be replaced"
            )
        object.__setattr__(self, name, value)

    # ---- for a model to override --------------------------------------------------------------

    def setup(self) -> None:
        """Makes the model's own attributes, once: registers, `params` and `dma` are there, no reset has been yet."""

    def on_reset(self, kind: ResetKind) -> None:
        """A reset: registers have their reset values, timers are gone.  Also runs once, after `setup`."""

    def on_enables(self) -> None:
        """The Command register or the power state may have changed."""

    def on_wake(self) -> None:
        """The device's thread has been woken, and is about to run timers and deferred work."""

    def open(self) -> None:
        """Takes hold of files and the like, just before the device is served.

        ConfigError, one line for the user.  What it takes hold of is given back by `close`.
        """

    def save_extra(self) -> bytes:
        """State that is neither in registers nor in RAM areas, for migration."""
        return b""

    def restore_extra(self, data: bytes) -> None:
        """Takes `save_extra`'s bytes back.  PeerError(EINVAL) when they are wrong."""
        if data:
            raise PeerError(errno.EINVAL, f"{self.name}: {len(data)} bytes of state that this model does not have")

    def close(self) -> None:
        """Gives back fds and memory; the device is of no use afterwards."""
        self.backend.close()

    # ---- for a model to call ------------------------------------------------------------------

    def after(self, seconds: float, call: Callable[[], None]) -> Timer:
        """Runs `call` in `seconds` on the device's thread.  A reset cancels it.

        ```python
        self.timer = self.after(0.010, self.finish)
        ```
        """
        return self.backend.agenda.after(seconds, call)

    def defer(self, call: Callable[[], None], *, by: PciDevice | None = None) -> None:
        """Runs `call` on the device's thread once the access at hand is answered.

        A reset of `by`, whose work it is, drops it; of this device without.
        """
        self.backend.defer(call, (self if by is None else by).backend)

    def post(self, call: Callable[[], None]) -> None:
        """As `defer`, but no reset drops it: for a thread that waits until it has run."""
        self.backend.defer(call, None)

    def reset(self, kind: ResetKind) -> None:
        """Brings all registers to their declared values; RAM areas keep their contents."""
        self.backend.reset(kind)

    @property
    def errors(self) -> int:
        """Exceptions that came out of the model's hooks and callbacks."""
        return self.backend.errors


#: What PciDevice keeps for itself.
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
    ]
)
