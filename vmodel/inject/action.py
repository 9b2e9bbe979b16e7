"""`Action`, the effect of a rule that fires, and `Injection`, one firing."""

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
from vmodel.points import AccessEvent, DmaEvent, Event, Point, Proceed, RequestEvent, Transfer, TranslationEvent

if TYPE_CHECKING:
    from vmodel.inject.engine import Engine

#: A value before or after an injection, for the log.
Shown = bytes | int | str | None


class Injection:
    """One firing of a rule: the event, and the operations that an action may use."""

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
        #: The event's number in the count of the rule's schedule.
        self.nth = 0
        #: The event as changed by earlier rules; `origin` is the original event.
        self.event = event
        self.origin = origin
        self._proceed = proceed
        self._window = window
        self.random = random
        #: The rule's own state, kept from event to event.
        self.memory = memory
        #: For the log.
        self.before: Shown = None
        self.after: Shown = None
        self.result = "ok"

    @property
    def device(self) -> PciDevice:
        """The device of the event."""
        return self.engine.devices[self.event.device]

    @property
    def transfer(self) -> Transfer:
        """The event, at points where data is moved."""
        assert isinstance(self.event, DmaEvent | AccessEvent)
        return self.event

    @property
    def data(self) -> bytes | None:
        """What is written; None where nothing is."""
        return self.event.data if isinstance(self.event, DmaEvent | AccessEvent) else None

    def proceed(self, event: Event | None = None) -> bytes:
        """Carries out the event, or a changed copy of it; returns the data of a read."""
        return self._proceed(self.event if event is None else event)

    def change(self, change: Callable[[bytes], bytes]) -> bytes:
        """Carries out the event with changed data: the data that a read returns, or that is written.

        `change` gets the bytes of the rule's register, or all bytes, and returns the same number of bytes.
        """
        event = self.transfer
        old = self.proceed() if event.point.is_read else event.data or b""
        new = bytearray(old)
        changed = change(bytes(old[self._window]))
        new[self._window] = changed
        self.before, self.after = bytes(old[self._window]), changed
        if event.point.is_read:
            return bytes(new)
        return self.proceed(replace(event, data=bytes(new)))

    def fault(self, reason: Reason, done: int = 0, *, level: int = 0) -> DmaFault:
        """A fault for the action to raise: the access fails after `done` bytes were moved."""
        event = self.event
        assert isinstance(event, RequestEvent)
        write = event.write if isinstance(event, TranslationEvent) else event.point is Point.DMA_WRITE
        access = Access.WRITE if write else Access.READ
        self.result = reason.name
        self.device.dma.refused(reason, access)
        return DmaFault(reason, event.address + done, access, done, event.pasid, level=level)

    def ones(self) -> bytes:
        """The data of a read without an answer: all ones."""
        return b"\xff" * self.transfer.size

    def wait(self, ms: float) -> None:
        """Blocks the device's thread for `ms` milliseconds; a guest that accesses the device waits, too.

        A stop of the device's server ends the wait, and so does the engine's end.
        """
        self.engine.wait(self.device, ms / 1000)

    def later(self, call: Callable[[], object], *, ms: float = 0.0, after: Point | None = None) -> None:
        """Calls `call` on the device's thread: after `ms` milliseconds, or after the device's next event at `after`."""
        self.engine.later(self, call, ms / 1000, after)


class Action(BaseModel):
    """The base of all actions.  A subclass names the `points` at which it works."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: The name in plans.
    name: ClassVar[str] = ""
    points: ClassVar[frozenset[Point]]

    def __init_subclass__(cls, *, name: str = "", **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if name:
            cls.name = name

    def run(self, at: Injection) -> bytes:
        """Applies the action, and carries out the event or not; returns the data of a read, b"" for other events."""
        raise NotImplementedError

    def check(self, devices: Sequence[PciDevice]) -> None:
        """ValueError: none of `devices`, those that the rule matches, has what the action needs."""

    def also_armed(self) -> Sequence[Point]:
        """The points to tap in addition to the rule's own."""
        return ()

    def observe(self, event: Event, memory: dict[Any, bytes], proceed: Proceed) -> bytes:
        """Called for each event that the rule matches but does not fire at; carries it out."""
        return proceed(event)

    @property
    def observes(self) -> bool:
        """Whether the action overrides `observe`."""
        return type(self).observe is not Action.observe

    def __str__(self) -> str:
        given = self.model_dump(mode="json", exclude_defaults=True)
        return f"{self.name}({', '.join(f'{key}={value}' for key, value in given.items())})" if given else self.name

    @classmethod
    def usage(cls) -> str:
        """The action's syntax, as "partial(bytes)", "torn(bytes, ms=1.0)"."""
        parts = [
            key if field.is_required() else f"{key}={_shown(field.get_default(call_default_factory=True))}"
            for key, field in cls.model_fields.items()
        ]
        return f"{cls.name}({', '.join(parts)})" if parts else cls.name


def _shown(value: object) -> object:
    return value.value if isinstance(value, Point) else value


def milliseconds(value: object) -> float:
    """A time in milliseconds: 2, "2ms", "1s".  ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?", value.strip()):
        return float(value)
    return seconds(value) * 1000
