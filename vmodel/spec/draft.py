"""Drafts: registers as a specification has them, and the bank that is made from them.

All readers of specifications make drafts, so that names, checks and limits are the same for each format.
"""

from __future__ import annotations

import keyword
import re
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmodel.errors import ConfigError
from vmodel.fields import Field, Layout, RegisterError, Values
from vmodel.modes import Mode
from vmodel.printable import printable
from vmodel.register_files import Array, FileArray, RamArea, RegisterFile
from vmodel.regs import Reg8, Reg16, Reg32, Reg64, Register, RegisterBank

#: The largest bank, in bytes, RAM included.  A larger RAM belongs into the BAR itself: `bar.ram`.
MAX_SIZE = 16 << 20
#: Register files within register files.
MAX_DEPTH = 16
_KINDS: dict[int, type[Register]] = {8: Reg8, 16: Reg16, 32: Reg32, 64: Reg64}


@dataclass(frozen=True)
class SourcePlace:
    """Where something is in a specification; `line` 0 if that is not known."""

    file: Path
    line: int = 0
    path: str = ""

    def error(self, message: str) -> ConfigError:
        """An error at this place, on one line."""
        where = ": ".join(part for part in (f"line {self.line}" if self.line else "", self.path) if part)
        return ConfigError(printable(f"{where}: {message}" if where else message), file=self.file)


@dataclass(frozen=True)
class ValuesDraft:
    """Names of values: (name, value, description)."""

    name: str
    members: tuple[tuple[str, int, str], ...]


@dataclass(frozen=True, kw_only=True)
class _Draft:
    """Anything that has a name."""

    name: str
    doc: str
    place: SourcePlace = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class FieldDraft(_Draft):
    """A field: bits `lo` to `hi`."""

    lo: int
    hi: int
    mode: Mode
    reset: int
    values: ValuesDraft | None = None


@dataclass(frozen=True, kw_only=True)
class RamDraft(_Draft):
    """A memory."""

    offset: int
    size: int
    mode: Mode


@dataclass(frozen=True, kw_only=True)
class _Repeatable(_Draft):
    """What may be an array: it is one if there are `dimensions`."""

    #: Of the type, or empty.
    kind: str
    offset: int
    dimensions: tuple[int, ...] = ()
    stride: int = 0


@dataclass(frozen=True, kw_only=True)
class RegisterDraft(_Repeatable):
    """A register."""

    width: int
    fields: tuple[FieldDraft, ...]


@dataclass(frozen=True, kw_only=True)
class FileDraft(_Repeatable):
    """A register file or address map."""

    size: int
    members: tuple[RegisterDraft | RamDraft | FileDraft, ...]


def text_of(described: str | None) -> str:
    """A description as one line of printable text."""
    return printable(" ".join((described or "").split()))


def build(top: FileDraft) -> type[RegisterBank]:
    """The bank of a draft.  ConfigError: the draft cannot be a bank; the text names file and line."""
    return _Builder(top).bank(top)


class _Builder:
    """Makes the classes of one bank.  Equal drafts share a class."""

    def __init__(self, top: FileDraft) -> None:
        # In a class's body, an attribute hides a class of the same name.
        self._taken: set[str] = {*_RESERVED_CLASSES, *_names(top)}
        self._layouts: dict[tuple[str, tuple[tuple[Any, ...], ...]], type[Layout]] = {}
        self._values: dict[ValuesDraft, type[Values]] = {}
        self._banks: dict[tuple[str, int, tuple[Any, ...], str], type[RegisterBank]] = {}

    def _class_name(self, name: str, suffix: str = "") -> str:
        made = camel(name, suffix)
        number = 2
        while made in self._taken:
            made = f"{camel(name, suffix)}{number}"
            number += 1
        self._taken.add(made)
        return made

    def bank(self, draft: FileDraft, depth: int = 0) -> type[RegisterBank]:
        """The class of a register file."""
        key = (draft.kind, draft.size, draft.members, draft.doc)
        if key in self._banks:
            return self._banks[key]
        if draft.size > MAX_SIZE:
            raise draft.place.error(f"{draft.size:#x} bytes: a bank has at most {MAX_SIZE >> 20} MiB, RAM included")
        if depth > MAX_DEPTH:
            raise draft.place.error(f"more than {MAX_DEPTH} register files within each other")
        attributes: dict[str, Any] = {}
        for member in draft.members:
            name = attribute(member.name, _RESERVED_IN_BANKS)
            if name in attributes:
                raise member.place.error(f"a second {name}")
            attributes[name] = _checked(member.place, self._member, member, depth)
        if not attributes:
            raise draft.place.error("no registers")
        attributes["__doc__"] = draft.doc or f"Registers of {draft.name}."
        name = self._class_name(draft.kind or draft.name, "Regs")
        made: type[RegisterBank] = _checked(
            draft.place,
            types.new_class,
            name,
            (RegisterBank,),
            {"size": draft.size},
            lambda space: space.update(attributes),
        )
        self._banks[key] = made
        return made

    def _member(self, member: RegisterDraft | RamDraft | FileDraft, depth: int) -> Any:
        if isinstance(member, RamDraft):
            return RamArea(member.offset, member.size, member.mode, doc=member.doc)
        if isinstance(member, FileDraft):
            bank = self.bank(member, depth + 1)
            if not member.dimensions:
                return RegisterFile(bank, at=member.offset)
            return FileArray(bank, _count(member.dimensions), at=member.offset, stride=member.stride)
        register = self._register(member)
        if not member.dimensions:
            return register
        return Array(register, _count(member.dimensions), stride=member.stride)

    def _register(self, draft: RegisterDraft) -> Register:
        if draft.width not in _KINDS:
            raise draft.place.error(f"regwidth = {draft.width}: a register here has 8, 16, 32 or 64 bits")
        full, covered, reset = (1 << draft.width) - 1, 0, 0
        for f in draft.fields:
            mask = ((1 << (f.hi - f.lo + 1)) - 1) << f.lo
            covered |= mask
            # Bits that software cannot read give 0.
            reset |= 0 if f.mode in (Mode.WO, Mode.RESERVED) else f.reset << f.lo & mask
        modes = {f.mode for f in draft.fields}
        mode = next(iter(modes)) if covered == full and len(modes) == 1 else Mode.RO
        whole = [(f.name, f.doc) for f in draft.fields] == [(WHOLE, "")] and covered == full
        layout = None if whole else self._layout(draft, mode)
        return _KINDS[draft.width](draft.offset, mode, reset=reset, layout=layout, doc=draft.doc)

    def _layout(self, draft: RegisterDraft, mode: Mode) -> type[Layout]:
        fields = [(f.name, f.lo, f.hi, None if f.mode is mode else f.mode, f.doc, f.values) for f in draft.fields]
        key = (draft.kind or draft.name, tuple(fields))
        if key not in self._layouts:
            attributes: dict[str, Any] = {}
            for f, (name, lo, hi, own, doc, _) in zip(draft.fields, fields, strict=True):
                named = attribute(name, _RESERVED_IN_LAYOUTS)
                if named in attributes:
                    raise f.place.error(f"a second {named}")
                values = None if f.values is None else self._values_of(f.values, f.place)
                attributes[named] = _checked(f.place, Field, lo, hi, own, doc, "", values)
            attributes["__doc__"] = f"Fields of {draft.kind or draft.name}."
            name = self._class_name(draft.kind or draft.name)
            self._layouts[key] = _checked(draft.place, type, name, (Layout,), attributes)
        return self._layouts[key]

    def _values_of(self, draft: ValuesDraft, place: SourcePlace) -> type[Values]:
        if draft not in self._values:
            members: dict[str, tuple[int, str]] = {}
            for name, value, doc in draft.members:
                # Python keeps names that begin with "_" to itself.
                named = attribute(f"n{name}" if name.startswith("_") else name, _RESERVED_IN_VALUES)
                if named in members:
                    raise place.error(f"a second {named}")
                members[named] = (value, doc)
            functional: Any = Values  # type checkers see only the other meaning of a call
            self._values[draft] = functional(self._class_name(draft.name), members)
            self._values[draft].__doc__ = f"Values of {draft.name}."
        return self._values[draft]


#: The field of a register that has no fields: all its bits.
WHOLE = "VALUE"


def _count(dimensions: tuple[int, ...]) -> int | tuple[int, ...]:
    return dimensions[0] if len(dimensions) == 1 else dimensions


def _checked(place: SourcePlace, make: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return make(*arguments)
    except RegisterError as error:
        raise place.error(str(error)) from error


def _names_in(namespace: type[Any]) -> frozenset[str]:
    """The names that a class has already."""
    return frozenset(
        name for base in namespace.__mro__ for name in (*vars(base), *vars(base).get("__annotations__", ()))
    )


#: Names that generated source uses.
_RESERVED_CLASSES = frozenset(
    re.findall(
        r"\w+",
        "Array Bit Bits FileArray Layout Mode RamArea Reg8 Reg16 Reg32 Reg64 RegisterBank RegisterFile"
        " RO RW WO W1C W1S RC RESERVED Values",
    )
)
_RESERVED_IN_BANKS = _names_in(RegisterBank) | _RESERVED_CLASSES
_RESERVED_IN_LAYOUTS = _names_in(Layout) | _RESERVED_CLASSES | {"value"}
_RESERVED_IN_VALUES = _names_in(Values) | {"mro"}


def _names(draft: FileDraft) -> Iterator[str]:
    """Yields the names of all members and fields."""
    for member in draft.members:
        yield member.name
        if isinstance(member, FileDraft):
            yield from _names(member)
        elif isinstance(member, RegisterDraft):
            yield from (f.name for f in member.fields)


def attribute(name: str, reserved: frozenset[str]) -> str:
    """The attribute for a name of a specification: the name itself, or with "_" where Python or vmodel use it."""
    if name.startswith("__"):
        name = f"n{name}"  # Python changes such names in a class
    return f"{name}_" if keyword.iskeyword(name) or name in reserved else name


def camel(name: str, suffix: str = "") -> str:
    """A class name: "dma_channel" and "DMA_CHANNEL" give "DmaChannel"; `suffix` follows unless it is there already."""
    words: Iterator[str] = (word for word in re.split(r"[^A-Za-z0-9]+", name) if word)
    made = "".join(w[0].upper() + (w[1:].lower() if w.isupper() else w[1:]) for w in words)
    if not made or made[0].isdigit():
        made = f"N{made}"
    return made if not suffix or (made.endswith(suffix) and made != suffix) else f"{made}{suffix}"
