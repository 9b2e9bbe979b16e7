"""Selects the events that a rule matches: by point, and by fields of the event."""

from __future__ import annotations

import functools
import importlib.util
import operator
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema, model_validator

from vmodel.errors import ConfigError
from vmodel.inject.quantity import Number, Numbers, SpanOf, Words
from vmodel.logs import limited
from vmodel.mistakes import exception_line, guess
from vmodel.pci.topology import Bdf
from vmodel.points import EVENTS, AccessEvent, ConfigEvent, Event, Phase, Point, keys_of
from vmodel.register_map import Place, RegisterMap
from vmodel.vfio_user.wire import Region


def _fields() -> dict[str, dict[Point, str]]:
    """For each key: the points whose events have what it asks about, and the field."""
    found: dict[str, dict[Point, str]] = {}
    for point in Point:
        for key, name in keys_of(EVENTS[point]).items():
            found.setdefault(key, {})[point] = name
    return found


#: The points whose events have what a key asks about, and in which field; keys that are not here: all points.
KEYS = _fields()


def _point(value: object) -> object:
    if isinstance(value, str):
        known = [point.value for point in Point]
        if value not in known:
            close = guess(value, known)
            raise ValueError(
                f"is not a point: {f'did you mean {close!r}? ' if close else ''}Points are {', '.join(known)}"
            )
        return Point(value)
    return value


def _requester(value: object) -> object:
    if isinstance(value, str) and "." in value:
        try:
            return Bdf.parse(value).rid
        except ValueError:
            raise ValueError('must be a PCI address, as "0000:00:03.0", or a number, as 0x18') from None
    return value


log = limited(__name__)

#: A user's function for `when`: (event) -> bool.
Test = Callable[[Event], bool]


def load_test(text: str, base: Path) -> Test:
    """The function that "path/file.py:function" names.  ValueError."""
    source, colon, name = text.rpartition(":")
    path = base / source
    if not colon or not source.endswith(".py") or not name.isidentifier():
        raise ValueError('must be "path/file.py:function"')
    if not path.is_file():
        raise ValueError(f"there is no file {source!r}")
    found: Test | None = getattr(_load(path.resolve(), path.stat().st_mtime_ns), name, None)
    if not callable(found):
        raise ValueError(f"no function {name!r} in {source}")
    return found


@functools.lru_cache(maxsize=64)
def _load(path: Path, changed_ns: int) -> ModuleType:
    """Executes a plan's Python file, once for all rules that name it, and again after it has changed."""
    spec = importlib.util.spec_from_file_location(f"vmodel_plan_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # as the suffix is .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"cannot be loaded: {exception_line(error)}") from error
    return module


def _when(value: object) -> object:
    if isinstance(value, str):
        return value
    if callable(value):
        return value
    raise ValueError('must be "path/file.py:function"')


When = Annotated[
    Any,
    BeforeValidator(_when),
    PlainSerializer(lambda value: value if isinstance(value, str) or value is None else value.__qualname__),
    WithJsonSchema({"type": "string", "description": '"path/file.py:function", which takes the event'}),
]
OnePoint = Annotated[
    Point,
    BeforeValidator(_point),
    PlainSerializer(lambda point: point.value),
    WithJsonSchema({"enum": [point.value for point in Point]}),
]


class Match(BaseModel):
    """Matches events at a point, by their fields.  A key that is left out matches everything."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    point: OnePoint = Field(examples=['"dma.write"'], description="where")
    device: Words | None = Field(default=None, examples=['"edu0"'], description='name, with "*" for anything')
    requester: Annotated[Number | None, BeforeValidator(_requester)] = Field(
        default=None, examples=['"0000:00:03.0"'], description="the id that the IOMMU sees, or a PCI address"
    )
    group: Number | None = Field(default=None, examples=["0"], description="number of the IOMMU group")
    domain: Words | None = Field(default=None, examples=['"DMA*"'], description="name of the domain")
    pasid: Number | None = Field(default=None, examples=["1"], description="the PASID")
    direction: Literal["read", "write"] | None = Field(
        default=None, examples=['"write"'], description="of what is translated"
    )
    iova: SpanOf | None = Field(default=None, examples=['"0x1000-0x1fff"'], description="overlaps this range")
    gpa: SpanOf | None = Field(default=None, examples=['"0x1000-0x1fff"'], description="starts in this range")
    size: SpanOf | None = Field(default=None, examples=["16"], description="bytes, or a range of them")
    bar: Number | None = Field(default=None, examples=["0"], description="number of the BAR")
    offset: SpanOf | None = Field(default=None, examples=["0x10"], description="offset in the BAR or config space")
    register_: str | None = Field(
        default=None, alias="register", examples=['"STATUS"'], description='name, or "bank.NAME", "capability.NAME"'
    )
    vector: Numbers | None = Field(default=None, examples=["0"], description="interrupt vectors")
    kind: Words | None = Field(
        default=None,
        examples=['"FLR"'],
        description="FLR, DEVICE_RESET, D3hot*; iotlb, context; submission, completion",
    )
    queue: Numbers | None = Field(default=None, examples=["1"], description="numbers of queues")
    opcode: Numbers | None = Field(default=None, examples=["1"], description="opcodes of commands")
    lba: SpanOf | None = Field(default=None, examples=['"0-7"'], description="overlaps these blocks")
    status: Numbers | None = Field(default=None, examples=["0"], description="that the device would report")
    phase: Literal["probe", "running", "remove", "suspend"] | None = Field(
        default=None, examples=['"running"'], description="the driver's phase"
    )
    when: When | None = Field(
        default=None, examples=['"checks.py:wanted"'], description="a Python function that decides"
    )

    @model_validator(mode="after")
    def _fits(self) -> Match:
        for key, points in KEYS.items():
            if getattr(self, "register_" if key == "register" else key) is not None and self.point not in points:
                known = ", ".join(point.value for point in Point if point in points)
                raise ValueError(f"{key}: events at {self.point.value} have no such field: only those at {known} do")
        return self


class Predicate:
    """A `Match` that is ready for use: its names are resolved to devices and registers."""

    def __init__(self, match: Match, maps: Mapping[str, RegisterMap], base: Path) -> None:
        """`maps`: the registers of each device; paths are relative to `base`.

        ConfigError: a device, register or function does not exist; its key names the mistake.
        """
        self.match = match
        self._tests = _tests_of(match)
        self.devices = [name for name in maps if match.device is None or _named(name, match.device)]
        if match.device is not None:
            for pattern in match.device:
                if not any(fnmatchcase(name, pattern) for name in maps):
                    close = guess(pattern, list(maps))
                    hint = f"did you mean {close!r}?" if close else f"devices are {', '.join(maps) or 'none'}"
                    raise ConfigError(f"no device is called {pattern!r}: {hint}", key="device")
        #: The register's places, by device.
        self.places: dict[str, list[Place]] = {}
        if match.register_ is not None:
            self._find_register(match.register_, maps)
        self._test: Test | None = match.when if callable(match.when) else None
        if isinstance(match.when, str):
            try:
                self._test = load_test(match.when, base)
            except ValueError as error:
                raise ConfigError(f"{match.when!r}: {error}", key="when") from error

    def _find_register(self, name: str, maps: Mapping[str, RegisterMap]) -> None:
        config = self.match.point in ConfigEvent.points
        known: set[str] = set()
        for device in self.devices:
            self.places[device] = maps[device].find(name, config=config)
            known |= {p.full_name for p in maps[device].places if (p.region == Region.CONFIG) is config}
        if not any(self.places.values()):
            close = guess(name, sorted(known | {full.rpartition(".")[2] for full in known}))
            hint = f"did you mean {close!r}?" if close else "see vmodel regs MODEL"
            raise ConfigError(f"no register is called {name!r}: {hint}", key="register")

    def __call__(self, event: Event) -> bool:
        """Whether an event matches."""
        m = self.match
        return (
            m.point is event.point
            and (m.device is None or any(_named(name, m.device) for name in (event.device, *event.others)))
            and all(test(event) for test in self._tests)
            and (m.phase is None or Phase(m.phase).value == event.phase)
            and (m.register_ is None or self.window(event) is not None)
            and (self._test is None or self._passes(self._test, event))
        )

    def _passes(self, test: Test, event: Event) -> bool:
        try:
            return bool(test(event))
        except Exception:
            # An exception of the user's function must not stop the device.
            log.exception("%r failed: the event does not match", self.match.when)
            return False

    def window(self, event: Event) -> slice | None:
        """The event's bytes that belong to the register: all without a `register`, None if it does not touch it."""
        if self.match.register_ is None:
            return slice(None)
        if not isinstance(event, AccessEvent):
            return None
        first, last = event.address, event.address + event.size - 1
        for place in self.places.get(event.device, ()):
            if place.region == event.region and place.span.start <= last and first <= place.span.last:
                start = max(first, place.span.start) - first
                return slice(start, min(last, place.span.last) - first + 1)
        return None


def _named(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_named(wanted: Sequence[str], found: str | None) -> bool:
    return found is not None and _named(found, wanted)


def _leads_to(wanted: Any, leads: Callable[[], int | None]) -> bool:
    gpa = leads()
    return gpa is not None and gpa in wanted


#: How a key's value is compared with the field.
_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "requester": operator.eq,
    "group": operator.eq,
    "domain": _is_named,
    "pasid": operator.eq,
    "direction": lambda wanted, write: (wanted == "write") is write,
    "size": lambda wanted, found: found is not None and found in wanted,
    "bar": operator.eq,
    "vector": lambda wanted, found: found in wanted,
    "kind": _is_named,
    "queue": lambda wanted, found: found in wanted,
    "opcode": lambda wanted, found: found in wanted,
    "status": lambda wanted, found: found in wanted,
    # Last, as it may walk tables.
    "gpa": _leads_to,
}
#: Keys about a range that begins at the field: the field with its length.
_RANGES = {"iova": "size", "offset": "size", "lba": "blocks"}


def _tests_of(match: Match) -> list[Callable[[Event], bool]]:
    """What the keys of a match ask of an event's fields, but for its register."""

    def touches(wanted: Any, field: str, length: str) -> Callable[[Event], bool]:
        return lambda event: _touches(wanted, getattr(event, field), getattr(event, length))

    def compares(test: Callable[[Any, Any], bool], wanted: Any, field: str) -> Callable[[Event], bool]:
        return lambda event: test(wanted, getattr(event, field))

    tests = []
    for key, length in _RANGES.items():
        if (wanted := getattr(match, key)) is not None:
            tests.append(touches(wanted, KEYS[key][match.point], length))
    for key, test in _COMPARED.items():
        if (wanted := getattr(match, key)) is not None:
            tests.append(compares(test, wanted, KEYS[key][match.point]))
    return tests


def _touches(wanted: Any, start: int | None, size: int | None) -> bool:
    if wanted is None:
        return True
    if start is None:
        return False
    return bool(start <= wanted.last and wanted.start <= start + max(size or 1, 1) - 1)
