"""What a rule does when it fires: `Action`, and the event that it is given."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict

from vmodel.device import PciDevice
from vmodel.errors import Access, DmaFault, Reason
from vmodel.inject.quantity import seconds
from vmodel.points import Event, Point, Proceed

if TYPE_CHECKING:
    from vmodel.inject.engine import Engine

#: What was there before, and after: bytes, numbers, words.
Shown = bytes | int | str | None


class Injection:
    """One firing of a rule: the event, and what an action may do with it."""

    def __init__(
        self,
        engine: Engine,
        rule: str,
        count: int,
        event: Event,
        proceed: Proceed,
        window: slice,
        random: random.Random,
        memory: dict[Any, bytes],
        origin: Event,
    ) -> None:
        self.engine = engine
        self.rule = rule
        self.count = count
        #: The event's number, as the rule's schedule counts.
        self.nth = 0
        #: As the rules before this one have left it; `origin`: as it was.
        self.event = event
        self.origin = origin
        self._proceed = proceed
        self._window = window
        self.random = random
        #: What the rule remembers from event to event.
        self.memory = memory
        #: For the log.
        self.before: Shown = None
        self.after: Shown = None
        self.result = "ok"

    @property
    def device(self) -> PciDevice:
        """Whose event it is."""
        return self.engine.devices[self.event.device]

    def proceed(self, event: Event | None = None) -> bytes:
        """Has the event, or a changed copy of it, carried out; what a read gives."""
        return self._proceed(self.event if event is None else event)

    def change(self, change: Callable[[bytes], bytes]) -> bytes:
        """Has it carried out with other data: of a read what it gives, else what is written.

        `change` gets the bytes of the rule's register, or all, and returns as many.
        """
        event = self.event
        old = self.proceed() if event.point.is_read else event.data or b""
        new = bytearray(old)
        changed = change(bytes(old[self._window]))
        new[self._window] = changed
        self.before, self.after = bytes(old[self._window]), changed
        if event.point.is_read:
            return bytes(new)
        return self.proceed(replace(event, data=bytes(new)))

    def fault(self, reason: Reason, done: int = 0, *, level: int = 0) -> DmaFault:
        """The access ends so, `done` bytes having been moved; to be raised."""
        event = self.event
        write = event.write if event.point is Point.TRANSLATE else event.point is Point.DMA_WRITE
        access = Access.WRITE if write else Access.READ
        self.result = reason.name
        self.device.dma.refused(reason, access)
        return DmaFault(reason, (event.address or 0) + done, access, done, event.pasid, level=level)

    def ones(self) -> bytes:
        """What a read gives that nobody answers."""
        return b"\xff" * (self.event.size or 0)

    def later(self, call: Callable[[], object], *, ms: float = 0.0, after: Point | None = None) -> None:
        """Calls on the device's thread: in `ms`, or once something has happened to the device at `after`."""
        self.engine.later(self, call, ms / 1000, after)


class Action(BaseModel):
    """Base of all actions.  A subclass says at which points it works; its docstring's first line is its help."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: What plans call it.
    name: ClassVar[str] = ""
    points: ClassVar[frozenset[Point]]

    def __init_subclass__(cls, *, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name

    def run(self, at: Injection) -> bytes:
        """Does it, and has the event carried out or not; what a read gives, b"" elsewhere."""
        raise NotImplementedError

    def check(self, devices: Sequence[PciDevice]) -> None:
        """ValueError: none of the devices that the rule is about has what this needs."""

    def listens(self) -> Sequence[Point]:
        """Points that it has to hear of beside its rule's own."""
        return ()

    def observe(self, event: Event, memory: dict[Any, bytes], proceed: Proceed) -> bytes:
        """Sees each event that its rule matches but does not fire at; carries it out."""
        return proceed(event)

    @property
    def observes(self) -> bool:
        """Whether `observe` is worth calling."""
        return type(self).observe is not Action.observe

    def __str__(self) -> str:
        given = self.model_dump(mode="json", exclude_defaults=True)
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in given.items())})" if given else self.name

    @classmethod
    def usage(cls) -> str:
        """As "partial(bytes)", "torn(bytes, ms=1.0)"."""
        parts = [
            key if field.is_required() else f"{key}={_shown(field.get_default(call_default_factory=True))}"
            for key, field in cls.model_fields.items()
        ]
        return f"{cls.name}({', '.join(parts)})" if parts else cls.name


def _shown(value: object) -> object:
    return value.value if isinstance(value, Point) else value


def milliseconds(value: object) -> float:
    """2 (ms), "2ms", "1s".  ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?", value.strip()):
        return float(value)
    return seconds(value) * 1000
