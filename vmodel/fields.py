"""Fields of registers, and layouts: the fields of one register."""

from __future__ import annotations

import difflib
import enum
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, Self, SupportsIndex, overload

from vmodel.errors import VmodelError
from vmodel.modes import Mode


class RegisterError(VmodelError):
    """A declaration is wrong: a bug in the model, found when its class is made."""


_MODES = "RO, RW, WO, W1C, W1S, RC, RESERVED or another Mode of vmodel.regs"


#: Most names that a message lists.
_LISTED = 40


def near(what: str, kind: str, name: str, known: Sequence[str]) -> str:
    """A message that `what` has no `kind` of that name, with the known name most like it, or all of them."""
    close = difflib.get_close_matches(name, known, 1)
    listed = ", ".join([*known[:_LISTED], *(["..."] if len(known) > _LISTED else [])])
    hint = f"; did you mean {close[0]}?" if close else f": there are {listed or 'none'}"
    return f"{what} has no {kind} {name}{hint}"


def check_arguments(of: str, numbers: Mapping[str, object], mode: object, doc: object) -> None:
    """Checks the types of arguments that registers and fields have in common.  RegisterError."""
    for name, value in numbers.items():
        if not isinstance(value, int):
            raise RegisterError(f"{of}: {name} must be a number, not {value!r}")
    if not isinstance(mode, Mode):
        raise RegisterError(f"{of}: mode must be {_MODES}, not {mode!r}")
    if not isinstance(doc, str):
        raise RegisterError(f"{of}: doc must be a text, not {doc!r}")


def fit(value: SupportsIndex, bits: int, what: str) -> int:
    """A value as the contents of `bits` bits: 0 to 2**bits - 1, or a negative number that is `~x` of one of these.

    This is the rule for all that a model stores in registers and fields, and that its hooks return.  ValueError: it is
    another number; TypeError: it is none.  Both name `what`.
    """
    __tracebackhide__ = True  # for pytest: the line that has the value counts
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{what} ({bits} bits): must be a number, not {value!r}") from None
    if not -1 << bits <= number < 1 << bits:
        raise ValueError(f"{number:#x} does not fit into {what} ({bits} bits)")
    return number & ((1 << bits) - 1)


class Values(enum.IntEnum):
    """Names of a field's values, for `Bits(4, 6, values=Speed)`.

    ```python
    class Speed(Values):
        SLOW = 0
        FAST = 3, "only with a short cable"
    ```
    """

    doc: str

    def __new__(cls, value: int, doc: str = "") -> Self:
        member = int.__new__(cls, value)
        member._value_, member.doc = value, doc
        return member


@dataclass(frozen=True)
class Field:
    """Bits `lo`..`hi` (inclusive) of a register; `mode` None: the register's own mode; `values`: names of values."""

    lo: int
    hi: int
    mode: Mode | None = None
    doc: str = ""
    name: str = ""
    values: type[Values] | None = None

    def __post_init__(self) -> None:
        of = f"a field of bits {self.lo}..{self.hi}"
        check_arguments(of, {"lo": self.lo, "hi": self.hi}, Mode.RW if self.mode is None else self.mode, self.doc)
        if self.values is None:
            return
        if not (isinstance(self.values, type) and issubclass(self.values, Values)) or not len(self.values):
            raise RegisterError(f"{of}: values must be a class derived from vmodel.regs.Values, not {self.values!r}")
        for value in self.values:
            if not 0 <= value < 1 << max(self.hi - self.lo + 1, 0):
                raise RegisterError(f"{of}: {self.values.__name__}.{value.name} = {int(value)} does not fit")

    @cached_property
    def mask(self) -> int:
        """The field's bits in the register, all ones."""
        return ((1 << (self.hi - self.lo + 1)) - 1) << self.lo

    def of(self, value: int) -> int:
        """The field's value in a register's value."""
        return (value & self.mask) >> self.lo

    def value_name(self, value: int) -> str:
        """The name of the field's value in a register's value; empty if it has none."""
        field = self.of(value)
        return next((named.name for named in self.values or () if named == field), "")

    def put(self, value: int, field: int) -> int:
        """A register's `value` with the field set to `field`.  ValueError: `field` does not fit."""
        return value & ~self.mask | fit(field, self.hi - self.lo + 1, self.name) << self.lo

    def __set_name__(self, owner: type, name: str) -> None:
        object.__setattr__(self, "name", name)

    @overload
    def __get__(self, layout: None, owner: type) -> Field: ...
    @overload
    def __get__(self, layout: Layout, owner: type) -> int: ...
    def __get__(self, layout: Layout | None, owner: type) -> Field | int:
        return self if layout is None else self.of(layout.value)

    def __set__(self, layout: Layout, field: int) -> None:
        layout.value = self.put(layout.value, field)


def Bit(n: int, mode: Mode | None = None, *, doc: str = "", values: type[Values] | None = None) -> Field:
    """A field of one bit."""
    return Field(n, n, mode, doc, values=values)


def Bits(lo: int, hi: int, mode: Mode | None = None, *, doc: str = "", values: type[Values] | None = None) -> Field:
    """A field of bits `lo`..`hi`, inclusive."""
    return Field(lo, hi, mode, doc, values=values)


class Layout:
    """The fields of a register; an instance wraps a value.

    `Control(value).RUN` is a field of a value, and `Control(RUN=1, MODE=3)` a value with these fields, the others 0.
    `int()` gives the number; a register takes either: `self.regs.CONTROL = Control(RUN=1)`.
    """

    fields: ClassVar[tuple[Field, ...]] = ()

    def __init_subclass__(cls) -> None:
        fields = sorted((f for f in vars(cls).values() if isinstance(f, Field)), key=lambda f: f.lo)
        for field in fields:
            if not 0 <= field.lo <= field.hi < 64:
                raise RegisterError(f"{cls.__name__}.{field.name}: bits {field.lo}..{field.hi} are not within 0..63")
        for left, right in pairwise(fields):
            if right.lo <= left.hi:
                raise RegisterError(f"{cls.__name__}: {left.name} and {right.name} overlap")
        cls.fields = tuple(fields)

    def __init__(self, value: int = 0, **fields: int) -> None:
        """`value`, with the named fields set.  ValueError: one does not fit; TypeError: there is none of that name."""
        self.value = value
        for name, field in fields.items():
            self.named(name).__set__(self, field)

    @classmethod
    def named(cls, name: str) -> Field:
        """The field of that name.  TypeError: there is none."""
        for field in cls.fields:
            if field.name == name:
                return field
        raise TypeError(near(cls.__name__, "field", name, [field.name for field in cls.fields]))

    def __int__(self) -> int:
        return self.value

    __index__ = __int__

    def __eq__(self, other: object) -> bool:
        return self.value == other.value if type(self) is type(other) and isinstance(other, Layout) else NotImplemented

    def __hash__(self) -> int:
        return hash((type(self), self.value))

    def __repr__(self) -> str:
        inner = ", ".join(f"{f.name}={f.of(self.value):#x}" for f in self.fields)
        return f"{type(self).__name__}({inner})"
