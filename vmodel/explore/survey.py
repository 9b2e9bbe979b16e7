"""What a run's devices and IOMMU do: the sites at which faults can be injected.

A survey is a run under a plan whose rules watch all points and change nothing.  Its log says which registers, queues,
opcodes, sizes and vectors there are, in which phase of the driver, and how often.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from vmodel.device import PciDevice
from vmodel.errors import ConfigError
from vmodel.experiment.case import Result
from vmodel.files import regular
from vmodel.inject import FaultPlan, Rule
from vmodel.inject.predicate import KEYS
from vmodel.points import EVENTS, ConfigEvent, DmaEvent, MmioEvent, Phase, Point, TranslationEvent
from vmodel.register_map import RegisterMap
from vmodel.vfio_user.wire import Region

#: The most events that each rule of a survey records.
MOST_RECORDS = 1000
#: Beyond so many sizes or unnamed offsets at one place, rules do not distinguish them.
MOST_DISTINCT = 8
#: How many values of each register are kept, the most frequent ones.
MOST_VALUES = 4
#: The limit of a line of the log, in bytes: data is cut long before.
_LONGEST = 1 << 16
#: The limit of the log, in bytes.
_LARGEST = 1 << 30
#: Points of an IOMMU: their events name it, and a rule needs no device.
IOMMU_POINTS = frozenset((Point.IOMMU_MAP, Point.IOMMU_UNMAP, Point.INVALIDATE))
#: The name of a survey's rule: point, number of the device, phase and BAR.
_NAME = re.compile(r"(?P<point>[a-z.]+)/(?P<n>\d{1,4})/(?P<phase>[a-z]+)/(?P<bar>\d?)", re.ASCII)


def _hexadecimal(text: object) -> object:
    """Addresses in the log are hexadecimal.  ValueError."""
    if not isinstance(text, str) or not re.fullmatch("0x[0-9a-f]{1,16}", text):
        raise ValueError("must be a hexadecimal address")
    return int(text, 16)


_Number = Annotated[int, Field(ge=0, lt=1 << 32)]


class _WatchedEvent(BaseModel):
    """What a survey needs of a line of the log.  The folder may be somebody else's: any line may be in it."""

    model_config = ConfigDict(strict=True, frozen=True)

    rule: Annotated[str, Field(max_length=100)]
    address: Annotated[int, BeforeValidator(_hexadecimal), Field(ge=0, lt=1 << 64)] | None = None
    size: Annotated[int, Field(ge=0, le=1 << 64)] | None = None
    before: str | None = None
    queue: _Number | None = None
    opcode: _Number | None = None
    vector: _Number | None = None
    kind: Annotated[str, Field(pattern=r"^[A-Za-z0-9_ -]{1,40}$")] | None = None


@dataclass(frozen=True)
class Site:
    """Events that a rule can select: a point, and keys of a plan's rule with their values."""

    point: Point
    keys: tuple[tuple[str, Any], ...]
    #: How many of these events there were, as far as they were recorded.
    count: int = field(default=1, compare=False)
    #: Values that were read or written there, the most frequent first.
    values: tuple[int, ...] = field(default=(), compare=False)
    #: The size of an access in bytes, 0 where there is none; the most frequent one.
    size: int = field(default=0, compare=False)
    #: The points at which its device had an event before the last one of these.
    behind: frozenset[Point] = field(default=frozenset(), compare=False)

    @property
    def device(self) -> str | None:
        """The device that the events are of; None: any, at points of an IOMMU."""
        return dict(self.keys).get("device")

    def __str__(self) -> str:
        return " ".join([self.point.value, *(f"{key}={value}" for key, value in self.keys)])


def survey_plan(devices: Mapping[str, PciDevice], first: Sequence[Rule] = ()) -> FaultPlan:
    """A plan that watches all points of `devices`, behind the rules `first`.

    The names of its rules have what records lack: the device, its phase, and the BAR.
    """
    rules = list(first)
    watch = {"do": "watch", "first": MOST_RECORDS}
    for point in Point:
        if point in IOMMU_POINTS:
            rules.append(Rule.model_validate({**watch, "point": point.value, "name": point.value}))
            continue
        for n, (name, device) in enumerate(devices.items()):
            bars = [bar.index for bar in device.declaration.bars] if point in MmioEvent.points else [None]
            for phase in Phase:
                for bar in bars:
                    keys = {"device": name, "phase": phase.value} | ({} if bar is None else {"bar": bar})
                    text = f"{point.value}/{n}/{phase.value}/{'' if bar is None else bar}"
                    rules.append(Rule.model_validate({**watch, **keys, "point": point.value, "name": text}))
    return FaultPlan(rule=tuple(rules))


def records(result: Result, folder: Path) -> Iterator[dict[str, Any]]:
    """The log of a run's injections: from its artefact if there is one, else the part of it that the result has.

    ConfigError: the artefact is damaged, or is not there any more.  With a part of it, the search would be another one.
    """
    name = result.artefacts.get("injections")
    if name is None:
        yield from result.injections
        return
    path, count = folder / name, 0
    try:
        regular(path, _LARGEST)
        with path.open("rb") as file:
            while line := file.readline(_LONGEST):
                count += 1
                yield _record(line, path, count)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=path) from None
    if count != result.injected:
        raise ConfigError(f"is damaged: it has {count:,} records, and the run had {result.injected:,}", file=path)


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    """A line of the log.  ConfigError: it is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise ConfigError(f"is damaged: line {number:,} is no record of an injection", file=path)
    return record


@dataclass
class _Group:
    """The events of one place, before it is decided by which of their properties rules distinguish them."""

    seen: Counter[tuple[tuple[str, Any], ...]] = field(default_factory=Counter)
    values: defaultdict[tuple[tuple[str, Any], ...], Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    sizes: defaultdict[tuple[tuple[str, Any], ...], Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    behind: defaultdict[tuple[tuple[str, Any], ...], frozenset[Point]] = field(
        default_factory=lambda: defaultdict(frozenset)
    )


def sites(log: Iterable[Mapping[str, Any]], devices: Mapping[str, PciDevice]) -> list[Site]:
    """The sites that the records of a survey show, in a fixed order."""
    maps = {name: RegisterMap(device) for name, device in devices.items()}
    names = list(devices)
    groups: defaultdict[tuple[Point, tuple[tuple[str, Any], ...]], _Group] = defaultdict(_Group)
    before: defaultdict[Any, frozenset[Point]] = defaultdict(frozenset)
    for said in log:
        if said.get("do") != "watch" or said.get("late"):
            continue
        try:
            record = _WatchedEvent.model_validate(said)
        except ValueError:
            continue
        placed = _place(record.rule, devices, names)
        if placed is None:
            continue
        point, keys, bar = placed
        detail = _detail(point, record, maps.get(str(keys.get("device"))), bar)
        group = groups[point, tuple(keys.items())]
        group.seen[detail] += 1
        group.behind[detail] = before[keys.get("device")]
        before[keys.get("device")] |= {point}
        if record.size is not None:
            group.sizes[detail][record.size] += 1
        value = _value(record)
        if value is not None:
            group.values[detail][value] += 1
    found = [site for (point, keys), group in groups.items() for site in _of_group(point, keys, group)]
    found = [site for site in found if _selectable(site)]
    return sorted(found, key=lambda site: (list(Point).index(site.point), str(site)))


def _place(
    rule: str, devices: Mapping[str, PciDevice], names: Sequence[str]
) -> tuple[Point, dict[str, Any], int | None] | None:
    """The point, the keys and the BAR in the name of a survey's rule; None: it is no such rule."""
    if rule in {point.value for point in IOMMU_POINTS}:
        return Point(rule), {}, None
    parts = _NAME.fullmatch(rule)
    if parts is None or parts["point"] not in {point.value for point in Point} or int(parts["n"]) >= len(names):
        return None
    point, name = Point(parts["point"]), names[int(parts["n"])]
    bars = {bar.index for bar in devices[name].declaration.bars} if point in MmioEvent.points else {None}
    bar = int(parts["bar"]) if parts["bar"] else None
    if parts["phase"] not in {phase.value for phase in Phase} or bar not in bars:
        return None
    return point, {"device": name, "phase": parts["phase"]}, bar


def _selectable(site: Site) -> bool:
    """Whether a rule can select it: a record may say anything."""
    try:
        Rule.model_validate({"point": site.point.value, **dict(site.keys), "do": "watch"})
    except ValueError:
        return False
    return True


def _detail(
    point: Point, record: _WatchedEvent, registers: RegisterMap | None, bar: int | None
) -> tuple[tuple[str, Any], ...]:
    """The keys that distinguish a record's event from others of its point, device and phase."""
    if point in MmioEvent.points | ConfigEvent.points:
        region = Region.CONFIG if bar is None else bar
        offset = record.address or 0
        place = None
        if registers is not None:
            place = next(iter(registers.covering(region, offset, 1 if record.size is None else record.size)), None)
        if place is not None:
            return (("register", place.full_name),)
        return (("offset", offset),) if bar is None else (("bar", bar), ("offset", offset))
    said = {"queue": record.queue, "opcode": record.opcode, "vector": record.vector, "kind": record.kind}
    detail: dict[str, Any] = {key: value for key, value in said.items() if value is not None and point in KEYS[key]}
    if EVENTS[point] in (DmaEvent, TranslationEvent) and record.size is not None:
        detail["size"] = record.size
    return tuple(detail.items())


def _value(record: _WatchedEvent) -> int | None:
    """The value of a small access, little-endian."""
    text = record.before
    if text is None or not 0 < len(text) <= 16:
        return None
    try:
        return int.from_bytes(bytes.fromhex(text), "little")
    except ValueError:
        return None


def _of_group(point: Point, keys: tuple[tuple[str, Any], ...], group: _Group) -> Iterator[Site]:
    for key in ("size", "offset"):
        if len({value for detail in group.seen for name, value in detail if name == key}) > MOST_DISTINCT:
            group = _without(group, key)
    for detail, count in group.seen.items():
        values = tuple(value for value, _ in group.values[detail].most_common(MOST_VALUES))
        size = group.sizes[detail].most_common(1)
        yield Site(point, keys + detail, count, values, size[0][0] if size else 0, group.behind[detail])


def _without(group: _Group, key: str) -> _Group:
    """The same events, not distinguished by `key`."""
    merged = _Group()
    for detail, count in group.seen.items():
        rest = tuple(pair for pair in detail if pair[0] != key)
        merged.seen[rest] += count
        merged.values[rest] += group.values[detail]
        merged.sizes[rest] += group.sizes[detail]
        merged.behind[rest] |= group.behind[detail]
    return merged
