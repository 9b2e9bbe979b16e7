"""What happens at a served machine's devices, as records: accesses by register and field, DMA, interrupts, resets.

While somebody follows, the points that he asked for are tapped, also for accesses that the shim answers by itself
otherwise.  With no follower nothing is armed, and nothing is paid.
"""

from __future__ import annotations

import copy
import itertools
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from vmodel.closing import Closing
from vmodel.control import Command
from vmodel.device import PciDevice
from vmodel.device.taps import tap
from vmodel.errors import ConfigError, DmaFault, VmodelError
from vmodel.logs import limited
from vmodel.mistakes import guess
from vmodel.points import (
    AccessEvent,
    DmaEvent,
    Event,
    InterruptEvent,
    Point,
    Proceed,
    RequestEvent,
    TapStage,
)
from vmodel.register_map import Place, RegisterMap
from vmodel.vfio_user.wire import Region

#: Lines of --verbose in logs.SECONDS, for each device.
VERBOSE_BURST = 1000
#: For the server's --verbose.
log = limited(__name__, VERBOSE_BURST)

Record = dict[str, Any]

#: Points that are recorded unless others are asked for.
POINTS = frozenset(
    {
        Point.MMIO_READ,
        Point.MMIO_WRITE,
        Point.CONFIG_READ,
        Point.CONFIG_WRITE,
        Point.DMA_READ,
        Point.DMA_WRITE,
        Point.IRQ,
        Point.RESET,
        Point.CONNECTION,
        Point.UNPLUG,
    }
)
#: Recorded before they are carried out, so that what they cause comes after them.  The others have a result to record.
_FIRST = frozenset(
    {
        Point.MMIO_WRITE,
        Point.CONFIG_WRITE,
        Point.DOORBELL,
        Point.COMPLETION,
        Point.RESET,
        Point.CONNECTION,
        Point.UNPLUG,
    }
)
_ACCESSES = {
    True: frozenset({Point.CONFIG_READ, Point.CONFIG_WRITE}),
    False: frozenset({Point.MMIO_READ, Point.MMIO_WRITE}),
}
#: Most followers at a time, and most records that one has not taken yet; further ones are counted.
MOST_FOLLOWERS, KEPT = 16, 5000
#: Seconds without a request after which a follower is dropped.
LEASE = 10.0
#: At the end of a server: seconds to take the last records, for those who have asked within so many seconds.
_DRAIN, _ASKS = 0.5, 2.0
#: Longest access whose registers are named, and most bytes of data in a record.
_NAMED, _SHOWN = 8, 16


@dataclass(frozen=True)
class Wanted:
    """What to record.  Empty `devices` or `registers`: all.  With registers, only accesses that touch them."""

    devices: tuple[str, ...] = ()
    #: "CC", or with the bank "regs.CC".
    registers: tuple[str, ...] = ()
    points: frozenset[Point] = POINTS

    @classmethod
    def of(cls, devices: Iterable[str], registers: Iterable[str], points: Iterable[str]) -> Wanted:
        """From text: points are "irq", "dma.read" or all of a family, "dma"; none: POINTS.  ConfigError."""
        found: set[Point] = set()
        names = [point.value for point in Point]
        for text in points:
            matching = {point for point in Point if text in (point.value, point.value.partition(".")[0])}
            if not matching:
                raise ConfigError(f"no point is called {text!r}: {_near(text, names)}")
            found |= matching
        return cls(tuple(devices), tuple(registers), frozenset(found) or POINTS)


class _Follower:
    """Records for one follower, as long as there is room."""

    def __init__(
        self, wanted: Wanted, maps: Mapping[str, RegisterMap], put: Callable[[Record], None] | None = None
    ) -> None:
        """`put`: gets each record, in place of `take`.  ConfigError: no such device or register."""
        for name in wanted.devices:
            if name not in maps:
                raise ConfigError(f"no device is called {name!r}: {_near(name, list(maps))}")
        self.devices = frozenset(wanted.devices or maps)
        self.put = put
        self.used = time.monotonic()
        self._records: list[Record] = []
        self._more = 0
        self._lock = threading.Lock()
        #: By device: the places that its accesses must touch; None: any.
        self._places: dict[str, list[Place]] | None = None
        #: By device: the points to tap.
        self.points = dict.fromkeys(self.devices, wanted.points)
        if wanted.registers:
            self._places = {name: list(_places(maps[name], wanted.registers)) for name in self.devices}
            self._check(wanted.registers, [maps[name] for name in sorted(self.devices)])
            for name, places in self._places.items():
                touched = [_ACCESSES[place.region == Region.CONFIG] for place in places]
                self.points[name] = wanted.points & frozenset().union(*touched)

    def _check(self, registers: Sequence[str], maps: Sequence[RegisterMap]) -> None:
        places = [place for one in maps for place in one.places]
        known = {place.full_name for place in places} | {place.name for place in places}
        for name in registers:
            if name not in known:
                raise ConfigError(
                    f"no register is called {name!r}: {_near(name, sorted(known), 'see vmodel regs MODEL')}"
                )

    def wants(self, event: Event) -> bool:
        """Whether to record an event."""
        if event.point not in self.points.get(event.device, ()):
            return False
        if self._places is None:
            return True
        assert isinstance(event, AccessEvent)
        first, last = event.address, event.address + event.size - 1
        return any(
            place.region == event.region and place.span.start <= last and first <= place.span.last
            for place in self._places[event.device]
        )

    def has_room(self) -> bool:
        """Whether the next record is kept.  If not, it is counted."""
        with self._lock:
            if self.put is not None or len(self._records) < KEPT:
                return True
            self._more += 1
            return False

    def add(self, record: Record) -> None:
        if self.put is not None:
            self.put(record)
            return
        with self._lock:
            self._records.append(record)

    def left(self) -> int:
        """How many records are still to be taken."""
        with self._lock:
            return len(self._records) + self._more

    def take(self) -> list[Record]:
        """The records since the last call, and if some were not kept, {"more": how many} at the end."""
        self.used = time.monotonic()
        with self._lock:
            records, self._records = self._records, []
            more, self._more = self._more, 0
        return [*records, {"more": more}] if more else records


def _places(registers: RegisterMap, names: Collection[str]) -> Iterator[Place]:
    return (place for place in registers.places if {place.name, place.full_name} & set(names))


def _near(word: str, known: Sequence[str], otherwise: str = "") -> str:
    close = guess(word, known)
    return f"did you mean {close!r}?" if close else otherwise or f"known are {', '.join(known)}"


class Trace(Closing):
    """The events of a machine's devices, for any number of followers; a context manager that disarms at its end."""

    def __init__(self, devices: Mapping[str, PciDevice], started: float | None = None) -> None:
        """`started`: time.monotonic() that the records' times count from; by default now."""
        self._devices = dict(devices)
        self._started = time.monotonic() if started is None else started
        self._maps = {name: RegisterMap(device) for name, device in devices.items()}
        #: By device: names of BAR registers that only one of its registers has.
        self._short = {name: _unique(registers) for name, registers in self._maps.items()}
        self._followers: dict[int, _Follower] = {}
        self._numbers = itertools.count(1)
        self._arming = threading.Lock()

    # ---- followers -------------------------------------------------------------------------

    def follow(self, wanted: Wanted, put: Callable[[Record], None] | None = None) -> int:
        """Records from now on; returns the follower's number.

        `put` gets each record on the thread where it happens, without a limit of time; else `take` is to be called at
        least every LEASE seconds.  ConfigError: no such device or register, or too many followers.
        """
        follower = _Follower(wanted, self._maps, put)
        self._drop_expired()
        with self._arming:
            if len(self._followers) >= MOST_FOLLOWERS:
                raise ConfigError(f"{MOST_FOLLOWERS} follow already")
            number = next(self._numbers)
            self._followers = {**self._followers, number: follower}
            self._arm()
        return number

    def take(self, number: int) -> list[Record] | None:
        """A follower's records since its last call; {"more": n} stands for n that were not kept.

        None: there is no such follower, or it was dropped, as it had not called for LEASE seconds.
        """
        follower = self._followers.get(number)
        return None if follower is None else follower.take()

    def leave(self, number: int) -> None:
        """Ends a follower, if there is such a one."""
        with self._arming:
            self._followers = {n: follower for n, follower in self._followers.items() if n != number}
            self._arm()

    def drain(self) -> None:
        """Waits until all records are taken, at the end of a server: not for followers that have stopped to ask."""
        now = time.monotonic()
        asking = [follower for follower in self._followers.values() if now - follower.used < _ASKS]
        while left := sum(follower.left() for follower in asking):
            if time.monotonic() >= now + _DRAIN:
                log.warning("%d records were not taken by those who follow", left)
                return
            time.sleep(0.01)

    def close(self) -> None:
        """Ends all followers."""
        with self._arming:
            self._followers = {}
            self._arm()

    def _drop_expired(self) -> None:
        now = time.monotonic()
        for number, follower in list(self._followers.items()):
            if follower.put is None and now - follower.used > LEASE:
                self.leave(number)

    def _arm(self) -> None:
        """Taps each device at the points that its followers need; hold `_arming`."""
        for name, device in self._devices.items():
            needed = [follower.points.get(name, frozenset()) for follower in self._followers.values()]
            wanted = frozenset[Point]().union(*needed)
            if wanted or device.backend.points.of(TapStage.LOG):
                tap(device.backend, wanted, self, TapStage.LOG)

    def commands(self) -> dict[str, Command]:
        """The commands of a server's control socket."""

        def follow(request: Mapping[str, Any]) -> int:
            wanted = Wanted.of(*(_texts(request, key) for key in ("devices", "registers", "points")))
            if request.get("events", True) is False:  # only injections
                wanted = replace(wanted, points=frozenset())
            return self.follow(wanted)

        def number(request: Mapping[str, Any]) -> int:
            found = request.get("follower")
            if not isinstance(found, int):
                raise ConfigError(f"follower must be a number, not {found!r}")
            return found

        return {
            "trace.follow": follow,
            "trace.followers": lambda _: sum(follower.put is None for follower in self._followers.values()),
            "trace.take": lambda request: self.take(number(request)),
            "trace.leave": lambda request: self.leave(number(request)),
        }

    # ---- events ----------------------------------------------------------------------------

    def injected(self, record: Record) -> None:
        """Passes on the record of an injection, to followers of its device."""
        for follower in list(self._followers.values()):
            if follower.put is None and record.get("device") in follower.devices and follower.has_room():
                follower.add(record)

    def __call__(self, event: Event, proceed: Proceed) -> bytes:
        """Records an event, as the `Sink` of the devices, and carries it out."""
        wanting = [follower for follower in self._followers.values() if follower.wants(event)]
        if not wanting:
            return proceed(event)
        if any(follower.put is None and time.monotonic() - follower.used > LEASE for follower in wanting):
            self._drop_expired()
        wanting = [follower for follower in wanting if follower.has_room()]
        if not wanting:
            return proceed(event)
        if event.point in _FIRST:
            self._put(wanting, self._record(event, getattr(event, "data", None)))
            return proceed(event)
        # A copy: a fault rule may change the event.
        asked = copy.copy(event)
        raised = self._raised(event)
        try:
            data = proceed(event)
        except VmodelError as error:
            self._put(wanting, self._record(asked, None) | _failure(error))
            raise
        record = self._record(asked, data if event.point.is_read else getattr(asked, "data", None))
        if isinstance(event, InterruptEvent):
            record["sent"] = self._raised(asked) > raised
        self._put(wanting, record)
        return data

    def _raised(self, event: Event) -> int:
        """Interrupts that the event's device has sent so far."""
        return self._devices[event.device].backend.irqs.raised

    def _put(self, wanting: Sequence[_Follower], record: Record) -> None:
        for follower in wanting:
            follower.add(record)

    def _record(self, event: Event, data: bytes | None) -> Record:
        record: Record = {
            "t": round(time.monotonic() - self._started, 6),
            "point": event.point.value,
            "device": event.device,
        }
        if isinstance(event, AccessEvent):
            record |= {"region": event.region, "address": f"{event.address:#x}", "size": event.size}
            if data is not None:
                record["data"] = data[:_SHOWN].hex()
                if len(data) <= _NAMED:
                    record["registers"] = self._registers(event, data)
            if event.refused:
                record["fault"] = f"refused, {event.refused}"
            return record
        for f in fields(event):
            value = getattr(event, f.name)
            if f.name in record or f.name in ("phase", "others", "gpa", "data") or value is None:
                continue
            record[f.name] = f"{value:#x}" if f.name in ("address", "requester") else value
        if isinstance(event, RequestEvent) and data and isinstance(event, DmaEvent):
            record["data"] = data[:_SHOWN].hex()
        return record

    def _registers(self, event: AccessEvent, data: bytes) -> list[Record]:
        """The registers that an access touches, each with its value and fields, as far as they are accessed."""
        found = []
        short = self._short[event.device]
        for place in self._maps[event.device].covering(event.region, event.address, len(data)):
            first = max(place.span.start, event.address)
            last = min(place.span.last, event.address + len(data) - 1)
            lo, bits = 8 * (first - place.span.start), 8 * (last - first + 1)
            part = int.from_bytes(data[first - event.address : last - event.address + 1], "little")
            whole, mask = part << lo, (1 << bits) - 1 << lo
            # Fields that are 0 only say something where a write clears them.
            before = place.stored if not event.point.is_read else 0
            name = place.name if place.name in short and place.region != Region.CONFIG else place.full_name
            register: Record = {"name": name, "value": f"{part:#0{bits // 4 + 2}x}"}
            if bits != 8 * place.span.size:
                register["bits"] = [lo + bits - 1, lo]
            shown = [f for f in place.fields if not f.mask & ~mask and (f.of(whole) or f.of(before))]
            if shown:
                register["fields"] = {field.name: field.of(whole) for field in shown}
            names = {field.name: field.value_name(whole) for field in shown if field.value_name(whole)}
            if names:
                register["values"] = names
            found.append(register)
        return found


def _unique(registers: RegisterMap) -> frozenset[str]:
    names = [place.name for place in registers.places if place.region != Region.CONFIG]
    return frozenset(name for name in names if names.count(name) == 1)


def _failure(error: VmodelError) -> Record:
    if isinstance(error, DmaFault):
        return {"fault": error.reason.name, "fault_at": f"{error.iova:#x}", "done": error.done}
    return {"fault": str(error)}


def _texts(request: Mapping[str, Any], key: str) -> list[str]:
    found = request.get(key, [])
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise ConfigError(f"{key} must be a list of texts, not {found!r}")
    return found


# ---- for people ------------------------------------------------------------------------------


class TraceLine:
    """A record as a line for people.  The text is made when it is needed: a log line that is held back needs none."""

    def __init__(self, record: Record) -> None:
        self._record = record

    def __str__(self) -> str:
        return what(self._record)


def log_verbosely(record: Record) -> None:
    """Logs a record for --verbose, within a limit of lines; a follower's `put`."""
    log.debug("%s %s", record["device"], TraceLine(record))


def what(record: Record) -> str:
    """What happened, without time and device."""
    point = record["point"]
    space, _, access = point.partition(".")
    if "region" in record:
        text = f"{'config ' if space == 'config' else ''}{access} {_accessed(record)}"
    elif space == "dma":
        pasid = f" pasid {record['pasid']}" if "pasid" in record else ""
        text = f"{point} {record['address']}+{record['size']}{pasid}"
    elif point == Point.IRQ.value:
        text = f"irq {record['kind']} {record['vector']}{'' if record.get('sent', True) else ' (not sent)'}"
    elif point in _CLIENT:
        text = _CLIENT[point]
    else:
        skipped = ("t", "point", "device", "fault", "fault_at", "done", "data")
        text = " ".join([point, *(f"{key}={value}" for key, value in record.items() if key not in skipped)])
    if "fault" in record:
        text += f": {record['fault']}"
        if "fault_at" in record:
            text += f" at {record['fault_at']}, {record['done']} bytes done"
    return text


#: What plans call "connection" and "unplug".
_CLIENT = {Point.CONNECTION.value: "client connected", Point.UNPLUG.value: "client gone"}


def _accessed(record: Record) -> str:
    if registers := record.get("registers"):
        return ", ".join(map(_register, registers))
    region = _REGIONS.get(record["region"], "")
    where = f"{region}+{record['address']}" if region else record["address"]
    data, size = bytes.fromhex(record.get("data", "")), record["size"]
    if len(data) != size or size > _NAMED:
        return f"{where}, {size} bytes"
    return f"{where} = {int.from_bytes(data, 'little'):#0{2 * size + 2}x}"


_REGIONS = {**{n: f"BAR{n}" for n in range(6)}, int(Region.ROM): "ROM", int(Region.CONFIG): ""}


def _register(register: Record) -> str:
    bits = "[{}:{}]".format(*register["bits"]) if "bits" in register else ""
    values: Mapping[str, str] = register.get("values", {})
    named = " ".join(
        f"{name}={values.get(name) or (f'{value:#x}' if value > 9 else value)}"
        for name, value in register.get("fields", {}).items()
    )
    return f"{register['name']}{bits} = {register['value']}{f' ({named})' if named else ''}"
