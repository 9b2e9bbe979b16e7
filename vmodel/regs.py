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

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self, SupportsIndex, TypeVar, overload

from vmodel._shim import ALL_SIZES, EXIT_ON_READ, EXIT_ON_WRITE, MISALIGNED, SIZE_ODD, Policy
from vmodel.fields import Bit as Bit
from vmodel.fields import Bits as Bits
from vmodel.fields import Field as Field
from vmodel.fields import Layout as Layout
from vmodel.fields import RegisterError as RegisterError
from vmodel.fields import Values as Values
from vmodel.fields import check_arguments, fit, near
from vmodel.modes import Mode, Read, Write

RO, RW, WO, W1C, W1S, RC, RESERVED = list(Mode)[:7]  # the others are in Mode, such as Mode.W1T

#: Most registers of a bank, those of arrays included.
MAX_REGISTERS = 1 << 16


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
        check_arguments(of, {"offset": offset, "reset": reset}, mode, doc)
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

    def placed(self, name: str, at: int) -> Self:
        """A copy of the register with another name, `at` bytes further on: an element of an array."""
        copied = copy.copy(self)
        copied.name, copied.offset = name, self.offset + at
        copied._index = copied.offset // self.size
        return copied

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

    def masks(self) -> dict[Mode, int]:
        """The bits of each access mode that the register has."""
        masks = {self.mode: (1 << self.width) - 1}
        for field in self.fields:
            if field.mode is not None:
                masks = {mode: mask & ~field.mask for mode, mask in masks.items()}
                masks[field.mode] = masks.get(field.mode, 0) | field.mask
        return {mode: mask for mode, mask in masks.items() if mask}

    @cached_property
    def writes(self) -> dict[Write, int]:
        """By what a write does: the bits that it does that to."""
        found: dict[Write, int] = {}
        for mode, mask in self.masks().items():
            if mode.write is not Write.NOTHING:
                found[mode.write] = found.get(mode.write, 0) | mask
        return found

    @cached_property
    def reads(self) -> dict[Read, int]:
        """By what a read does: the bits that it does that to."""
        found: dict[Read, int] = {}
        for mode, mask in self.masks().items():
            if mode.read is not Read.NOTHING:
                found[mode.read] = found.get(mode.read, 0) | mask
        return found

    def written(self, stored: int, value: int, enabled: int) -> int:
        """The new value after a write of `value` to the bits in `enabled`, by access modes; WO bits as written."""
        for write, mask in self.writes.items():
            stored = write.apply(stored, value, mask if write in _WHOLE else mask & enabled)
        return stored

    def after_read(self, stored: int, enabled: int) -> int:
        """The new value after a read of the bits in `enabled`, by access modes."""
        cleared, set_ = self.reads.get(Read.CLEARS, 0), self.reads.get(Read.SETS, 0)
        return stored & ~(cleared & enabled) | set_ & enabled

    @property
    def exits_on_write(self) -> bool:
        """Whether the shim leaves writes to Python, as it does not know all of the access modes."""
        return bool(self.writes.keys() - _IN_SHIM)

    @property
    def exits_on_read(self) -> bool:
        """Likewise for reads."""
        return Read.SETS in self.reads

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

    def __set__(self, bank: RegisterBank, value: SupportsIndex) -> None:
        try:
            bank.cells[self.width][self._index] = value  # type: ignore[call-overload]  # memoryviews take any index
        except (ValueError, TypeError):
            bank.cells[self.width][self._index] = fit(value, self.width, f"{type(bank).__name__}.{self.name}")

    def __repr__(self) -> str:
        bank = self.bank.__name__ if self.bank else "?"
        return f"<{bank}.{self.name} at {self.offset:#x}>"


#: Writes that the shim carries out itself.
_IN_SHIM = {Write.PASSES, Write.STORES, Write.ONE_CLEARS, Write.ONE_SETS}
#: Writes that concern all their bits, whatever bytes are written.
_WHOLE = {Write.CLEARS, Write.SETS}


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


class Part:
    """What a bank contains besides single registers: see vmodel.register_files.

    As an attribute of a bank's instance it is what `bound` returns, made when it is first used.
    """

    name = "?"

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def registers(self) -> Iterator[Register]:
        """Yields the registers of this part, with their names and offsets in the bank."""
        return iter(())

    def memory(self) -> Iterator[Part]:
        """Yields the memories of this part, with their names and offsets in the bank."""
        return iter(())

    def placed(self, name: str, at: int) -> Part:
        """A copy of this part with another name, `at` bytes further on."""
        raise NotImplementedError

    def check(self, bank: type[RegisterBank]) -> None:
        """Checks the declaration, now that its bank is known.  RegisterError."""

    def of_class(self, path: str, registers: Mapping[str, Register]) -> Any:
        """What the bank's class has under this part's name; `registers`: those of the bank, by path."""
        return self

    def bound(self, bank: RegisterBank) -> Any:
        """What a bank's instance has under this part's name."""
        raise NotImplementedError

    def __get__(self, bank: RegisterBank | None, owner: type[RegisterBank]) -> Any:
        if bank is None:
            return self.of_class(self.name, owner.by_name)
        # There is no __set__, so that Python finds this in the instance from now on.
        return vars(bank).setdefault(self.name, self.bound(bank))


class Note:
    """Of a register with hooks in one bank: whether a hook sets the register itself."""

    __slots__ = ("place", "value")

    def __init__(self, place: tuple[int, int]) -> None:
        self.place = place
        #: While a hook runs that has not set the register: the value that the access makes of it.
        self.value: int | None = None


class _BankType(type):
    """The type of bank classes: says what there is instead of an attribute that there is not."""

    if not TYPE_CHECKING:

        def __getattr__(cls, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(f"{cls.__name__} has no attribute {name}", name=name, obj=cls)
            raise AttributeError(cls._no_register(name), name=name, obj=cls)


class RegisterBank(metaclass=_BankType):
    """A range of registers, `size` bytes long.  An instance holds the registers of one device."""

    size: ClassVar[int]
    #: Allowed access sizes in bytes, for registers that declare none.
    sizes: ClassVar[tuple[int, ...]]
    #: Whether accesses need not be naturally aligned.
    misaligned: ClassVar[bool]
    #: All registers in ascending order, those of register files and arrays included: "DMA[2].CONTROL".
    registers: ClassVar[tuple[Register, ...]] = ()
    by_name: ClassVar[Mapping[str, Register]] = {}
    #: Register files, arrays and memories, as declared.
    parts: ClassVar[tuple[Part, ...]] = ()
    #: Memories in ascending order, those of register files included; see vmodel.register_files.RamArea.
    memories: ClassVar[tuple[Any, ...]] = ()
    #: By register name: its width, and its index in `cells[width]`.  An instance has its own if a register has hooks,
    #: with a Note instead.
    _places: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, *, size: int, sizes: tuple[int, ...] = (1, 2, 4, 8), misaligned: bool = True) -> None:
        if not isinstance(size, int):
            raise RegisterError(f"{cls.__name__}: size must be a number, not {size!r}")
        cls.size, cls.sizes, cls.misaligned = size, sizes, misaligned
        _size_mask(sizes, misaligned, cls.__name__)
        if size <= 0:
            raise RegisterError(f"{cls.__name__}: size {size} is not positive")
        registers = [r for r in vars(cls).values() if isinstance(r, Register)]
        cls._places = {r.name: (r.width, r.offset // r.size) for r in registers}
        cls.parts = tuple(part for part in vars(cls).values() if isinstance(part, Part))
        for part in cls.parts:
            part.check(cls)
            registers += part.registers()
            if len(registers) > MAX_REGISTERS:
                raise RegisterError(f"{cls.__name__}.{part.name}: more than {MAX_REGISTERS} registers")
        for register in registers:
            register.bank = cls
            register.check(cls)
        cls.registers = tuple(sorted(registers, key=lambda r: r.offset))
        cls.by_name = {register.name: register for register in cls.registers}
        memories = [memory for part in cls.parts for memory in part.memory()]
        cls.memories = tuple(sorted(memories, key=lambda m: m.offset))
        for left, right in pairwise(sorted((*cls.registers, *cls.memories), key=lambda r: r.offset)):
            if right.offset < left.offset + left.size:
                raise RegisterError(f"{cls.__name__}: {left.name} and {right.name} overlap")

    view: memoryview
    #: The same bytes as arrays of 8, 16, 32 and 64-bit numbers: registers and host are little-endian (see wire).
    cells: dict[int, memoryview]
    #: Of registers with hooks.
    _notes: dict[Register, Note]

    def __init__(self, view: memoryview) -> None:
        """`view` holds the values: `size` bytes, format 'B'."""
        size = len(view)
        cells = {
            8: view,
            16: view[: size & ~1].cast("H"),
            32: view[: size & ~3].cast("I"),
            64: view[: size & ~7].cast("Q"),
        }
        vars(self).update(view=view, cells=cells, _notes={})

    def __setattr__(self, name: str, value: SupportsIndex) -> None:
        place = self._places.get(name)
        if place.__class__ is not tuple:
            if place is None:
                raise RegisterError(self._no_register(name))
            place.value = None
            place = place.place
        width, index = place
        try:
            self.cells[width][index] = value  # type: ignore[call-overload]  # memoryviews take any index
        except (ValueError, TypeError):
            self.cells[width][index] = fit(value, width, f"{type(self).__name__}.{name}")

    @property
    def fields(self) -> Any:
        """The fields of the registers, to read and to set: `regs.fields.CONTROL.RUN = 1`.  No hooks run."""
        return _BankFields(self)

    if not TYPE_CHECKING:  # a type checker finds such names itself

        def __getattr__(self, name: str) -> int:
            # Python calls this only for names that it does not find otherwise.
            raise AttributeError(self._no_register(name), name=name, obj=self)

    @classmethod
    def _no_register(cls, name: str) -> str:
        return near(cls.__name__, "register", name, [*cls._places, *(part.name for part in cls.parts)])

    def load_reset(self, *, everything: bool = False) -> None:
        """Stores the reset values; sticky registers and memories keep theirs unless `everything`."""
        if everything:
            for memory in self.memories:
                self.view[memory.offset : memory.offset + memory.size] = bytes(memory.size)
        for register in self.registers:
            if everything or not register.sticky:
                register.__set__(self, register.reset)
                if register in self._notes:
                    self._notes[register].value = None

    @classmethod
    def policy(cls, hooked_reads: set[Register], hooked_writes: set[Register]) -> Policy:
        """The shim's policy for the bank; accesses to hooked registers exit.  Gaps between registers are read-only."""
        policy = Policy(cls.size)
        policy.sizes[:] = bytes([_size_mask(cls.sizes, cls.misaligned, cls.__name__)]) * cls.size
        for register in cls.registers:
            at = slice(register.offset, register.offset + register.size)
            for array, mask in (
                (policy.store, register.writes.get(Write.STORES, 0)),
                (policy.w1c, register.writes.get(Write.ONE_CLEARS, 0)),
                (policy.w1s, register.writes.get(Write.ONE_SETS, 0)),
                (policy.rc, register.reads.get(Read.CLEARS, 0)),
            ):
                array[at] = mask.to_bytes(register.size, "little")
            exits = EXIT_ON_READ if register in hooked_reads or register.exits_on_read else 0
            exits |= EXIT_ON_WRITE if register in hooked_writes or register.exits_on_write else 0
            policy.exits[at] = bytes([exits]) * register.size
            if register.sizes is not None:
                mask = _size_mask(register.sizes, cls.misaligned, f"{cls.__name__}.{register.name}")
                policy.sizes[at] = bytes([mask]) * register.size
        for memory in cls.memories:
            if memory.mode is RW:
                policy.store[memory.offset : memory.offset + memory.size] = b"\xff" * memory.size
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
                        "values": [{"name": v.name, "value": int(v), "doc": v.doc} for v in f.values or ()],
                    }
                    for f in register.fields
                ],
            }


def note_of(bank: RegisterBank, register: Register) -> Note | None:
    """The note for the hooks of a register; None: it is an element of an array, which models set without the bank."""
    *files, name = register.name.split(".")
    owner: Any = bank  # the bank in which a model sets the register
    for file in files:
        attribute, *indices = file.replace("]", "").split("[")
        owner = getattr(owner, attribute)
        for index in indices:
            owner = owner[int(index)]
    if name not in owner._places:
        return None
    places = vars(owner).setdefault("_places", dict(owner._places))
    note = places[name] if isinstance(places[name], Note) else Note(places[name])
    places[name] = bank._notes[register] = note
    return note


class _BankFields:
    """`bank.fields`: the fields of each register."""

    __slots__ = ("_bank",)

    def __init__(self, bank: RegisterBank) -> None:
        self._bank = bank

    def __getattr__(self, name: str) -> _RegisterFields:
        register = vars(type(self._bank)).get(name)
        if not isinstance(register, Register):
            raise AttributeError(self._bank._no_register(name), name=name, obj=self._bank)
        return _RegisterFields(self._bank, register)


class _RegisterFields:
    """`bank.fields.CONTROL`: the fields of one register, as attributes."""

    __slots__ = ("_place",)

    _place: tuple[RegisterBank, Register]

    def __init__(self, bank: RegisterBank, register: Register) -> None:
        object.__setattr__(self, "_place", (bank, register))

    def _field(self, name: str) -> Field:
        _, register = self._place
        for field in register.fields:
            if field.name == name:
                return field
        known = [field.name for field in register.fields]
        raise AttributeError(near(repr(register), "field", name, known), name=name, obj=self)

    def __getattr__(self, name: str) -> int:
        bank, register = self._place
        return self._field(name).of(register.__get__(bank, type(bank)))

    def __setattr__(self, name: str, value: int) -> None:
        bank, register = self._place
        # In the register's own write hook, the other fields become what was written.
        new = getattr(bank._places[register.name], "value", None)
        stored = register.__get__(bank, type(bank)) if new is None else new
        setattr(bank, register.name, self._field(name).put(stored, value))


@dataclass(frozen=True)
class Hook:
    """The mark that `on_read`, `on_write`, `on_read_each` or `on_write_each` puts on a method."""

    kind: str  # "read" or "write"
    register: Register
    #: For the latter two: the register's index among its arguments; else None.
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

    `new` is the register's value after access modes and partial writes; until the hook has run the register keeps its
    old one.  The hook's result is stored.  None stores `new`, unless the hook has set the register (an element of an
    array: to another value).  WO bits are never stored.
    """
    return _hook("write", registers)


def on_write_each(*registers: Register) -> Callable[[_F], _F]:
    """Marks a device's method `(self, index: int, new: int) -> int | None` as the write hook of similar registers.

    For example doorbells: `index` is the written register's position in `registers`.  Otherwise as `on_write`.
    """
    return _hook("write", registers, indexed=True)


def on_read(*registers: Register) -> Callable[[_F], _F]:
    """Marks a device's method `(self, stored: int) -> int` as the read hook: a read gives its result.

    The result is not stored.  What a read does to the register, as RC, comes after the hook, unless that has set it.
    """
    return _hook("read", registers)


def on_read_each(*registers: Register) -> Callable[[_F], _F]:
    """Marks a device's method `(self, index: int, stored: int) -> int` as the read hook of similar registers.

    `index` is the read register's position in `registers`.  Otherwise as `on_read`.
    """
    return _hook("read", registers, indexed=True)


def hooks_of(method: object) -> tuple[Hook, ...]:
    """The hooks that a method is marked as; empty for other objects."""
    return getattr(method, "_vmodel_hooks", ())
