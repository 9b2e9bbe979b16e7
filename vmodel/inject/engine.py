"""`Engine` runs a plan: it gets events on all devices' threads, and decides for each event which rules fire."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any
from weakref import WeakSet

from vmodel.closing import Closing
from vmodel.device import PciDevice
from vmodel.device.taps import tap
from vmodel.errors import ConfigError, DmaFault, VmodelError
from vmodel.inject.action import Injection
from vmodel.inject.journal import Journal, shown
from vmodel.inject.plan import FaultPlan, Rule, keyed
from vmodel.inject.predicate import Predicate
from vmodel.inject.schedule import Progress, stream
from vmodel.logs import limited, report_held
from vmodel.points import Event, Point, Proceed
from vmodel.register_map import RegisterMap
from vmodel.timers import Timer

log = limited(__name__)

#: The limit of delayed events that wait for a point, which may never be reached; beyond it the oldest are carried out.
MOST_HELD = 10_000


class _Live:
    """An armed rule, with the state of its schedule and its random generators."""

    def __init__(self, rule: Rule, name: str, seed: str, maps: Mapping[str, RegisterMap], base: Path) -> None:
        self.rule = rule
        self.name = name
        self.predicate = Predicate(rule, maps, base)
        self.markers: tuple[Predicate, ...] = ()
        if rule.between is not None:
            try:
                self.markers = tuple(Predicate(match, maps, base) for match in rule.between)
            except ConfigError as error:
                raise ConfigError(str(error).partition(": ")[2], key=f"between.{error.key}") from error
        self.progress = Progress(rule.schedule, seed)
        self.random = stream(seed, "action")
        self.memory: dict[Any, bytes] = {}
        self.paused = False

    @property
    def points(self) -> set[Point]:
        """The points to tap for this rule."""
        return {self.rule.point, *(m.match.point for m in self.markers), *self.rule.do.also_armed()}


class Engine(Closing):
    """Arms a plan's rules on devices; a context manager that disarms them at the end.

    Rules can be added, removed and paused while devices are served.  Injections are reproducible: the same seed, rules
    and events of a device give the same injections.  Each rule has generators of its own, seeded by the plan's seed and
    the rule's name (or, without a name, its text), so that rules do not influence each other.
    """

    def __init__(
        self,
        plan: FaultPlan,
        devices: Mapping[str, PciDevice] | Iterable[PciDevice],
        *,
        path: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        """`path`: the file of the log.  ConfigError: a rule names a device or register that does not exist; a
        line for each.

        `clock`: the seconds that schedules and `heal` go by; `sleep`: blocks a device's thread for so many seconds,
        where they are not real seconds.
        """
        named = devices if isinstance(devices, Mapping) else {device.name: device for device in devices}
        self.devices: dict[str, PciDevice] = dict(named)
        self.plan = plan
        self.journal = Journal(path)
        self._clock = clock
        #: What the times of records count from, as `clock` gives it.
        self.started = clock()
        self._sleep = sleep
        self._closed = False
        self._maps = {name: RegisterMap(device) for name, device in self.devices.items()}
        self._lock = threading.Lock()
        self._rules: list[_Live] = []
        self._by_point: dict[Point, tuple[_Live, ...]] = {}
        self._held: list[tuple[Point, str, Injection, Callable[[], object]]] = []
        #: The delayed events that wait for their time; an agenda keeps those that are still to come.
        self._timers: WeakSet[Timer] = WeakSet()
        self._healed = False
        self._heal = None
        wrong: list[ConfigError] = []
        for n, rule in enumerate(plan.rule):
            try:
                self._add(rule)
            except ConfigError as error:
                file, place = plan.place(n)
                key = f"{place}.{error.key}" if file else f"{place}: {error.key}"
                wrong.append(ConfigError(_bare(error), file=file, key=key))
        if plan.heal is not None and plan.heal.on is not None:
            try:
                self._heal = Predicate(plan.heal.on, self._maps, plan.base)
            except ConfigError as error:
                wrong.append(ConfigError(_bare(error), file=plan.file, key=f"heal.on.{error.key}"))
        if wrong:
            raise wrong[0] if len(wrong) == 1 else ConfigError("\n".join(map(str, wrong)))
        self._arm()

    # ---- rules -----------------------------------------------------------------------------

    def _add(self, rule: Rule) -> str:
        names = {live.name for live in self._rules}
        name = rule.name or next(f"rule{n}" for n in range(1, len(names) + 2) if f"rule{n}" not in names)
        if name in names:
            raise ConfigError(f"{name!r} is already the name of another rule", key="name")
        same = sum(keyed(live.rule) == keyed(rule) for live in self._rules)
        live = _Live(rule, name, f"{self.plan.seed}\0{keyed(rule)}\0{same}", self._maps, self.plan.base)
        try:
            rule.do.check([self.devices[device] for device in live.predicate.devices])
        except ValueError as error:
            raise ConfigError(f"{str(rule.do)!r}: {error}", key="do") from error
        self._rules.append(live)
        return name

    def add(self, rule: Rule) -> str:
        """Arms another rule; returns its name.  ConfigError: as the constructor, or the name is used."""
        with self._lock:
            name = self._add(rule)
        self._arm()
        return name

    def _named(self, name: str) -> _Live:
        for live in self._rules:
            if live.name == name:
                return live
        known = ", ".join(live.name for live in self._rules)
        raise ConfigError(f"no rule is called {name!r}: {f'rules are {known}' if known else 'there are no rules'}")

    def remove(self, name: str) -> None:
        """Disarms a rule.  ConfigError: there is no rule of that name."""
        with self._lock:
            self._rules.remove(self._named(name))
        self._arm()

    def pause(self, name: str | None, paused: bool = True) -> None:
        """Pauses a rule (None: all), so that it neither fires nor counts, or resumes it.  ConfigError: no such rule."""
        with self._lock:
            for live in self._rules if name is None else [self._named(name)]:
                live.paused = paused

    def describe(self) -> list[dict[str, Any]]:
        """The rules, with their state and counts, as plain data."""
        now = self._now()
        with self._lock:
            return [
                {
                    "name": live.name,
                    "rule": live.rule.text(),
                    "matched": live.progress.matched,
                    "fired": live.progress.fired,
                    "state": self._state(live, now),
                }
                for live in self._rules
            ]

    def _state(self, live: _Live, now: float) -> str:
        if self._is_healed(now) or live.progress.over(now):
            return "over"
        return "paused" if live.paused else "armed"

    def _arm(self) -> None:
        """Taps each device at the points that its rules need, and removes the tap elsewhere."""
        with self._lock:
            rules = list(self._rules)
            self._by_point = {point: tuple(live for live in rules if point in live.points) for point in Point}
        heal = set() if self._heal is None else {self._heal.match.point}
        for name, device in self.devices.items():
            wanted = {point for live in rules if self._concerns(live, name) for point in live.points}
            wanted = wanted | heal if rules else wanted
            tap(device.backend, wanted, self if wanted else None)

    def _concerns(self, live: _Live, name: str) -> bool:
        """Whether a rule needs a device's events.  Events of an IOMMU concern other devices: it is always tapped."""
        predicates = (live.predicate, *live.markers)
        from_iommu = {Point.IOMMU_MAP, Point.IOMMU_UNMAP, Point.INVALIDATE}
        return any(name in p.devices or p.match.point in from_iommu for p in predicates)

    # ---- events ----------------------------------------------------------------------------

    def _now(self) -> float:
        return self._clock() - self.started

    def _is_healed(self, now: float) -> bool:
        heal = self.plan.heal
        return self._healed or (heal is not None and heal.after is not None and now >= heal.after)

    def __call__(self, event: Event, proceed: Proceed) -> bytes:
        """Handles an event, as the `Sink` of the devices: carries it out with the actions of the rules that fire."""
        now = self._now()
        rules = self._by_point.get(event.point, ())
        # Without the lock: predicates may be slow, as they may call functions of the user's.
        matching = [live for live in rules if not live.paused and live.predicate(event)]
        ending = [live for live in rules if live.markers and live.markers[1](event)]
        beginning = [live for live in rules if live.markers and live.markers[0](event)]
        healing = self._heal is not None and self._heal(event)
        with self._lock:
            healed = self._is_healed(now)
            for live in ending:
                live.progress.end()
            fired = {live: _place(live) for live in matching if not healed and live.progress.fires(now)}
            for live in beginning:
                live.progress.begin()
            self._healed = self._healed or healing
        chain: list[Callable[[Event, Proceed], bytes]] = []
        for live in matching:
            if live in fired:
                chain.append(self._step(live, fired[live], now, event))
            elif live.rule.do.observes:
                chain.append(lambda e, p, live=live: live.rule.do.observe(e, live.memory, p))  # type: ignore[misc]
        try:
            return _through(chain, 0, event, proceed)
        finally:
            if self._held:
                self._release(event, everything=healed or healing)

    def _step(
        self, live: _Live, place: tuple[int, int], now: float, origin: Event
    ) -> Callable[[Event, Proceed], bytes]:
        def act(event: Event, proceed: Proceed) -> bytes:
            window = live.predicate.window(event) or slice(None)
            at = Injection(self, live.name, place[0], event, proceed, window, live.random, live.memory, origin)
            at.nth = place[1]
            try:
                return live.rule.do.run(at)
            except VmodelError as error:
                at.result = error.reason.name if isinstance(error, DmaFault) else at.result
                raise
            finally:
                self._log(at, now, live)

        return act

    def _log(self, at: Injection, now: float, live: _Live, *, late: bool = False) -> None:
        event = at.event
        said: dict[str, Any] = {f.name: getattr(event, f.name) for f in fields(event)}
        record: dict[str, Any] = {
            "t": round(now, 6),
            "rule": at.rule,
            "count": at.count,
            "nth": at.nth,
            "do": str(live.rule.do),
            "point": event.point.value,
            "device": event.device,
            "requester": None if (requester := said.get("requester")) is None else f"{requester:#x}",
            "address": None if (address := said.get("address")) is None else f"{address:#x}",
            "size": said.get("size"),
            "before": shown(at.before),
            "after": shown(at.after),
            "result": at.result,
        }
        for key in ("vector", "queue", "id", "status", "opcode", "lba", "kind"):
            if (value := said.get(key)) is not None:
                record[key] = value
        if late:
            record["late"] = True
        try:
            self.journal.put(record)
        except OSError as error:
            log.error("cannot write the log of injections: %s", error)

    def goes_on(self, rule: str) -> bool:
        """Whether a repeated action of a rule is to continue: the rule still exists, and the plan is not healed."""
        return not self._is_healed(self._now()) and any(live.name == rule for live in self._rules)

    # ---- delayed actions -------------------------------------------------------------------

    def wait(self, device: PciDevice, seconds: float) -> None:
        """See Injection.wait."""
        if self._sleep is not None:
            self._sleep(seconds)
        else:
            device.backend.pause.wait(seconds, lambda: self._closed)

    def later(self, at: Injection, call: Callable[[], object], delay: float, after: Point | None) -> None:
        """See Injection.later; `delay` in seconds.  A reset of the function cancels calls that wait for their time."""
        device = at.device
        late = Injection(self, at.rule, at.count, at.event, at.proceed, slice(None), at.random, at.memory, at.origin)
        late.nth = at.nth
        live = next((live for live in self._rules if live.name == at.rule), None)

        def carry_out() -> None:
            try:
                call()
            except VmodelError as error:
                late.result = error.reason.name if isinstance(error, DmaFault) else str(error)
            if live is not None:
                self._log(late, self._now(), live, late=True)

        if after is None:
            if delay:
                with self._lock:
                    self._timers.add(device.after(delay, carry_out))
            else:
                device.defer(carry_out)
            return
        with self._lock:
            self._held.append((after, at.event.device, at, carry_out))
            excess = self._held[: -MOST_HELD or None] if len(self._held) > MOST_HELD else []
            del self._held[: len(excess)]
        for _, _, _, ready in excess:
            ready()

    def _release(self, event: Event, *, everything: bool) -> None:
        """Carries out the calls that waited for this event."""
        with self._lock:
            ready = [
                held
                for held in self._held
                if everything
                or (
                    held[0] is event.point
                    and held[2].origin is not event
                    and (held[1] == event.device or held[1] in event.others)
                )
            ]
            self._held = [held for held in self._held if held not in ready]
        for _, _, _, call in ready:
            call()

    # ---- life ------------------------------------------------------------------------------

    @property
    def unfinished(self) -> bool:
        """Whether events are held back now: after `close`, those that wait for a time are still carried out."""
        with self._lock:
            return bool(self._held) or any(timer.call is not None for timer in self._timers)

    def close(self) -> None:
        """Disarms all rules, ends their waits, and closes the log.  Calls that wait for a point are discarded."""
        self._closed = True
        for device in self.devices.values():
            device.backend.pause.look()
        with self._lock:
            self._rules.clear()
            self._held.clear()
        self._arm()
        report_held()
        self.journal.close()


def _place(live: _Live) -> tuple[int, int]:
    """(how often the rule has fired, the number of the current event)."""
    return live.progress.fired, live.progress.seen


def _through(chain: list[Callable[[Event, Proceed], bytes]], n: int, event: Event, proceed: Proceed) -> bytes:
    """Runs the chain from `n` on, in the order of the plan: an earlier rule may keep the event from later ones."""
    if n == len(chain):
        return proceed(event)
    return chain[n](event, lambda e: _through(chain, n + 1, e, proceed))


def _bare(error: ConfigError) -> str:
    return str(error).removeprefix(f"{error.key}: ")
