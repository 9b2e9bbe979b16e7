"""The register DSL: a register is declared once, and everything else follows from the declaration.

```python
class Control(Layout):
    RUN = Bit(0)
    MODE = Bits(4, 6)
    ERR = Bit(31, W1C)

class Regs(RegisterBank, size=0x100):
    ID = Reg32(0x00, RO, reset=0x0100_00ED)
    CTRL = Reg32(0x04, layout=Control)
    BASE = Reg64(0x08)
```

That is: reads, writes, access modes, reset values, documentation, and which accesses the shim answers without Python.
Accesses to a register without a hook never reach Python.  A mistake in a declaration (overlap, bad offset, reset value
too wide, a hook on an unknown register) is a `RegisterError` when the class is made.

An access to part of a register, or to several registers, is split.  Bytes that are not written keep their value (`new`
in a write hook is the merged value), and registers are accessed in ascending order.  `sizes` and `misaligned` of a bank
or a register define the allowed accesses; a read of any other size or alignment gives the BAR's fill byte, and such a
write is ignored.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

from vmodel._shim import ALL_SIZES, EXIT_ON_READ, EXIT_ON_WRITE, MISALIGNED, SIZE_ODD, Policy
from vmodel.errors import VmodelError


class RegisterError(VmodelError):
    """A declaration is wrong: a bug in the model, found when its class is made."""


class Mode(enum.Enum):
    """Access mode of bits, as software sees them, in the usual abbreviations."""

    RO = "read-only"
    RW = "read-write"
    #: Reads give the reset value; a write hook gets the written value.
    WO = "write-only"
    W1C = "write 1 to clear"
    W1S = "write 1 to set"
    #: Read-only, and a read clears it.
    RC = "read to clear"
    #: Reads give the reset value, writes are ignored.
    RESERVED = "reserved"


RO, RW, WO, W1C, W1S, RC, RESERVED = Mode


def _check_arguments(of: str, numbers: Mapping[str, object], mode: object, doc: object) -> None:
    """Checks the types of arguments that registers and fields have in common.  RegisterError."""
    for name, value in numbers.items():
        if not isinstance(value, int):
            raise RegisterError(f"{of}: {name} must be a number, not {value!r}")
    if not isinstance(mode, Mode):
        raise RegisterError(f"{of}: mode must be {', '.join(Mode.__members__)} of vmodel.regs, not {mode!r}")
    if not isinstance(doc, str):
        raise RegisterError(f"{of}: doc must be a text, not {doc!r}")


@dataclass(frozen=True)
class Field:
    """Bits `lo`..`hi` (inclusive) of a register; `mode` None: the register's own mode."""

    lo: int
    hi: int
    mode: Mode | None = None
    doc: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        of = f"a field of bits {self.lo}..{self.hi}"
        _check_arguments(of, {"lo": self.lo, "hi": self.hi}, RW if self.mode is None else self.mode, self.doc)

    @cached_property
    def mask(self) -> int:
        """The field's bits in the register, all ones."""
        return ((1 << (self.hi - self.lo + 1)) - 1) << self.lo

    def of(self, value: int) -> int:
        """The field's value in a register's value."""
        return (value & self.mask) >> self.lo

    def put(self, value: int, field: int) -> int:
        """A register's `value` with the field set to `field`.  ValueError: `field` does not fit."""
        if field << self.lo & ~self.mask or field < 0:
            raise ValueError(f"{field:#x} does not fit into {self.name} ({self.hi - self.lo + 1} bits)")
        return value & ~self.mask | field << self.lo

    def __set_name__(self, owner: type, name: str) -> None:
        object.__setattr__(self, "name", name)

    @overload
    def __get__(self, layout: None, owner: type) -> Field: ...
    @overload
    def __get__(self, layout: Layout, owner: type) -> int: ...
    def __get__(self, layout: Layout | None, owner: type) -> Field | int:
        return self if layout is None else self.of(layout.value)


def Bit(n: int, mode: Mode | None = None, *, doc: str = "") -> Field:
    """A field of one bit."""
    return Field(n, n, mode, doc)


def Bits(lo: int, hi: int, mode: Mode | None = None, *, doc: str = "") -> Field:
    """A field of bits `lo`..`hi`, inclusive."""
    return Field(lo, hi, mode, doc)


class Layout:
    """The fields of a register; an instance wraps a value: `Control(value).RUN`."""

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

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def __int__(self) -> int:
        return self.value

    def __repr__(self) -> str:
        inner = ", ".join(f"{f.name}={f.of(self.value):#x}" for f in self.fields)
        return f"{type(self).__name__}({inner})"


class Register:
    """One register of a bank.  As an attribute of a bank's instance it is the stored value; no hooks run."""

    width: ClassVar[int]

    def __init__(
        self,
        offset: int,
        mode: Mode = RW,
        *,
        reset: int = 0,
        layout: type[Layout] | None = None,
        doc: str = "",
        sizes: tuple[int, ...] | None = None,
        ioeventfd: bool = False,
        sticky: bool = False,
    ) -> None:
        """`offset` in bytes from the bank's start, a multiple of the register's size.

        `sizes`: access sizes in bytes that may begin in this register, None: those of the bank.  `ioeventfd`: the
        client may signal a write by an eventfd, so the written value is lost.  `sticky`: keeps its value over a reset.
        RegisterError: an argument is of the wrong type.
        """
        of = f"{type(self).__name__} at {offset:#x}" if isinstance(offset, int) else type(self).__name__
        _check_arguments(of, {"offset": offset, "reset": reset}, mode, doc)
        if layout is not None and not (isinstance(layout, type) and issubclass(layout, Layout)):
            raise RegisterError(f"{of}: layout must be a class derived from Layout, not {layout!r}")
        for name, flag in (("ioeventfd", ioeventfd), ("sticky", sticky)):
            if not isinstance(flag, bool):
                raise RegisterError(f"{of}: {name} must be True or False, not {flag!r}")
        if sizes is not None:
            _size_mask(sizes, True, of)
        self.offset = offset
        self.mode = mode
        self.reset = reset
        self.layout = layout
        self.doc = doc
        self.sizes = sizes
        self.ioeventfd = ioeventfd
        self.sticky = sticky
        self.name = "?"
        self.bank: type[RegisterBank] | None = None
        self._index = offset // (self.width // 8)

    @property
    def size(self) -> int:
        """The register's size in bytes."""
        return self.width // 8

    @property
    def fields(self) -> tuple[Field, ...]:
        """The layout's fields in ascending order; empty without a layout."""
        return self.layout.fields if self.layout else ()

    def mask(self, *modes: Mode) -> int:
        """All bits whose access mode is one of `modes`."""
        mask = (1 << self.width) - 1 if self.mode in modes else 0
        for field in self.fields:
            if field.mode is not None:
                mask = mask | field.mask if field.mode in modes else mask & ~field.mask
        return mask

    def written(self, stored: int, value: int, enabled: int) -> int:
        """The new value after a write of `value` to the bits in `enabled`, by access modes; WO bits as written."""
        value &= enabled
        store = self.mask(RW, WO) & enabled
        new = stored & ~store | value & store
        return new & ~(value & self.mask(W1C)) | value & self.mask(W1S)

    def check(self, bank: type[RegisterBank]) -> None:
        """Checks the declaration, now that its bank is known.  RegisterError."""
        where = f"{bank.__name__}.{self.name}"
        if self.offset < 0 or self.offset % self.size:
            raise RegisterError(f"{where}: offset {self.offset:#x} is no multiple of its size {self.size}")
        if self.offset + self.size > bank.size:
            raise RegisterError(f"{where}: ends past the bank's size {bank.size:#x}")
        if not 0 <= self.reset < 1 << self.width:
            raise RegisterError(f"{where}: reset value {self.reset:#x} is wider than {self.width} bits")
        if self.fields and self.fields[-1].hi >= self.width:
            raise RegisterError(f"{where}: field {self.fields[-1].name} is outside its {self.width} bits")
        if self.ioeventfd and self.mask(RW, WO) == 0:
            raise RegisterError(f"{where}: an ioeventfd on a register that cannot be written")

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, bank: None, owner: type) -> Register: ...
    @overload
    def __get__(self, bank: RegisterBank, owner: type) -> int: ...
    def __get__(self, bank: RegisterBank | None, owner: type) -> Register | int:
        if bank is None:
            return self
        return bank.cells[self.width][self._index]

    def __set__(self, bank: RegisterBank, value: int) -> None:
        bank.cells[self.width][self._index] = value

    def __repr__(self) -> str:
        bank = self.bank.__name__ if self.bank else "?"
        return f"<{bank}.{self.name} at {self.offset:#x}>"


class Reg8(Register):
    """A register of 8 bits."""

    width = 8


class Reg16(Register):
    """A register of 16 bits."""

    width = 16


class Reg32(Register):
    """A register of 32 bits."""

    width = 32


class Reg64(Register):
    """A register of 64 bits."""

    width = 64


def _size_mask(sizes: tuple[int, ...], misaligned: bool, where: str) -> int:
    if not isinstance(sizes, Collection) or not sizes or any(size not in (1, 2, 4, 8) for size in sizes):
        raise RegisterError(f"{where}: sizes must be some of 1, 2, 4 and 8, such as (4, 8), not {sizes!r}")
    mask = sum(set(sizes)) | (MISALIGNED if misaligned else 0)
    return ALL_SIZES if mask | SIZE_ODD == ALL_SIZES else mask


class RegisterBank:
    """A range of registers, `size` bytes long.  An instance holds the registers of one device."""

    size: ClassVar[int]
    #: Allowed access sizes in bytes, for registers that declare none.
    sizes: ClassVar[tuple[int, ...]]
    #: Whether accesses need not be naturally aligned.
    misaligned: ClassVar[bool]
    registers: ClassVar[tuple[Register, ...]] = ()
    #: By register name: its width, and its index in `cells[width]`.
    _places: ClassVar[dict[str, tuple[int, int]]] = {}

    def __init_subclass__(cls, *, size: int, sizes: tuple[int, ...] = (1, 2, 4, 8), misaligned: bool = True) -> None:
        if not isinstance(size, int):
            raise RegisterError(f"{cls.__name__}: size must be a number, not {size!r}")
        cls.size, cls.sizes, cls.misaligned = size, sizes, misaligned
        _size_mask(sizes, misaligned, cls.__name__)
        if size <= 0:
            raise RegisterError(f"{cls.__name__}: size {size} is not positive")
        registers = [r for r in vars(cls).values() if isinstance(r, Register)]
        registers.sort(key=lambda r: r.offset)
        for register in registers:
            register.bank = cls
            register.check(cls)
        for left, right in pairwise(registers):
            if right.offset < left.offset + left.size:
                raise RegisterError(f"{cls.__name__}: {left.name} and {right.name} overlap")
        cls.registers = tuple(registers)
        cls._places = {r.name: (r.width, r.offset // r.size) for r in registers}

    view: memoryview
    #: The same bytes as arrays of 8, 16, 32 and 64-bit numbers: registers and host are little-endian (see wire).
    cells: dict[int, memoryview]

    def __init__(self, view: memoryview) -> None:
        """`view` holds the values: `size` bytes, format 'B'."""
        size = len(view)
        cells = {
            8: view,
            16: view[: size & ~1].cast("H"),
            32: view[: size & ~3].cast("I"),
            64: view[: size & ~7].cast("Q"),
        }
        vars(self).update(view=view, cells=cells)

    def __setattr__(self, name: str, value: int) -> None:
        place = self._places.get(name)
        if place is None:
            raise RegisterError(self._no_register(name))
        width, index = place
        self.cells[width][index] = value

    if not TYPE_CHECKING:  # a type checker finds such names itself

        def __getattr__(self, name: str) -> int:
            # Python calls this only for names that it does not find otherwise.
            raise AttributeError(self._no_register(name), name=name, obj=self)

    @classmethod
    def _no_register(cls, name: str) -> str:
        close = difflib.get_close_matches(name, cls._places, 1)
        hint = f"; did you mean {close[0]}?" if close else f": there are {', '.join(cls._places) or 'none'}"
        return f"{cls.__name__} has no register {name}{hint}"

    def load_reset(self, *, everything: bool = False) -> None:
        """Stores the reset values; sticky registers keep theirs unless `everything`."""
        for register in self.registers:
            if everything or not register.sticky:
                register.__set__(self, register.reset)

    @classmethod
    def policy(cls, hooked_reads: set[Register], hooked_writes: set[Register]) -> Policy:
        """The shim's policy for the bank; accesses to hooked registers exit.  Gaps between registers are read-only."""
        policy = Policy(cls.size)
        policy.sizes[:] = bytes([_size_mask(cls.sizes, cls.misaligned, cls.__name__)]) * cls.size
        for register in cls.registers:
            at = slice(register.offset, register.offset + register.size)
            for array, mask in (
                (policy.store, register.mask(RW)),
                (policy.w1c, register.mask(W1C)),
                (policy.w1s, register.mask(W1S)),
                (policy.rc, register.mask(RC)),
            ):
                array[at] = mask.to_bytes(register.size, "little")
            exits = EXIT_ON_READ if register in hooked_reads else 0
            exits |= EXIT_ON_WRITE if register in hooked_writes else 0
            policy.exits[at] = bytes([exits]) * register.size
            if register.sizes is not None:
                mask = _size_mask(register.sizes, cls.misaligned, f"{cls.__name__}.{register.name}")
                policy.sizes[at] = bytes([mask]) * register.size
        return policy

    @classmethod
    def describe(cls) -> Iterator[dict[str, Any]]:
        """Yields each register as plain data, for documentation and `vmodel regs --json`."""
        for register in cls.registers:
            yield {
                "name": register.name,
                "offset": register.offset,
                "width": register.width,
                "mode": register.mode.name,
                "reset": register.reset,
                "doc": register.doc,
                "fields": [
                    {
                        "name": f.name,
                        "lo": f.lo,
                        "hi": f.hi,
                        "mode": (f.mode or register.mode).name,
                        "doc": f.doc,
                    }
                    for f in register.fields
                ],
            }


@dataclass(frozen=True)
class Hook:
    """The mark that `on_read`, `on_write` or `on_write_each` puts on a method."""

    kind: str  # "read" or "write"
    register: Register
    #: For `on_write_each`: the register's index among its arguments; else None.
    index: int | None = dataclasses.field(default=None, compare=False)


_F = TypeVar("_F", bound=Callable[..., Any])


def _hook(kind: str, registers: tuple[Register, ...], *, indexed: bool = False) -> Callable[[_F], _F]:
    for register in registers:
        if not isinstance(register, Register) or register.bank is None:
            raise RegisterError(f"on_{kind} takes registers of a bank, not {register!r}")

    def mark(method: _F) -> _F:
        hooks = getattr(method, "_vmodel_hooks", ())
        mine = tuple(Hook(kind, r, n if indexed else None) for n, r in enumerate(registers))
        method._vmodel_hooks = hooks + mine  # type: ignore[attr-defined]
        return method

    return mark


def on_write(*registers: Register) -> Callable[[_F], _F]:
    """Marks a device's method `(self, new: int) -> int | None` as the write hook of these registers.

    `new` is the register's value after access modes and partial writes.  The hook's result is stored; None stores
    `new`.  WO bits are never stored.
    """
    return _hook("write", registers)


def on_write_each(*registers: Register) -> Callable[[_F], _F]:
    """Marks a device's method `(self, index: int, new: int) -> int | None` as the write hook of similar registers.

    For example doorbells: `index` is the written register's position in `registers`.  Otherwise as `on_write`.
    """
    return _hook("write", registers, indexed=True)


def on_read(*registers: Register) -> Callable[[_F], _F]:
    """Marks a device's method `(self, stored: int) -> int` as the read hook: a read gives its result.

    The result is not stored.
    """
    return _hook("read", registers)


def hooks_of(method: object) -> tuple[Hook, ...]:
    """The hooks that a method is marked as; empty for other objects."""
    return getattr(method, "_vmodel_hooks", ())
