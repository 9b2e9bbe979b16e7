"""Arrays of registers, register files and memories: what a bank contains besides single registers.

```python
class Channel(RegisterBank, size=0x20):
    CONTROL = Reg32(0x00)
    ADDRESS = Reg64(0x08)

class Card(RegisterBank, size=0x2000):
    ID = Reg32(0x00, RO, reset=0xCA4D)
    DOORBELL = Array(Reg32(0x40, WO), 16)
    CHANNEL = FileArray(Channel, 4, at=0x100, stride=0x20)
    DEBUG = RegisterFile(Channel, at=0x200)
    BUFFER = RamArea(0x1000, size=0x1000)
```

In the class these are registers, which hooks name: `on_write(Card.CHANNEL[2].CONTROL)`,
`on_write_each(*Card.DOORBELL)`, `on_write_each(*(channel.CONTROL for channel in Card.CHANNEL))`.  In an instance they
are values: `regs.DOORBELL[3]`, `regs.CHANNEL[2].ADDRESS = 0x1000`, and `regs.BUFFER`, a writable memoryview.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Self, TypeVar, overload

from vmodel.fields import RegisterError
from vmodel.modes import Mode
from vmodel.regs import MAX_REGISTERS, Part, Register, RegisterBank

_B = TypeVar("_B", bound=RegisterBank)


class _Element:
    """One register file in a bank's class: its registers by name."""

    def __init__(self, of: type[RegisterBank], path: str, registers: Mapping[str, Register]) -> None:
        self._of, self._path, self._registers = of, path, registers

    def __getattr__(self, name: str) -> Any:
        declared = vars(self._of).get(name)
        if isinstance(declared, Register):
            return self._registers[f"{self._path}.{name}"]
        if isinstance(declared, Part):
            return declared.of_class(f"{self._path}.{name}", self._registers)
        raise AttributeError(self._of._no_register(name), name=name, obj=self)

    def __repr__(self) -> str:
        return f"<{self._path}: {self._of.__name__}>"


class _Repeated(Part):
    """A part of which there may be several, in one or more dimensions."""

    def __init__(self, at: int, count: int | Sequence[int], stride: int, what: str) -> None:
        dimensions = (count,) if isinstance(count, int) else tuple(count)
        for name, value in (("at", at), ("stride", stride), *(("count", n) for n in dimensions)):
            if not isinstance(value, int):
                raise RegisterError(f"{what}: {name} must be a number, not {value!r}")
        elements = 1
        for n in dimensions:
            if n < 1:
                raise RegisterError(f"{what}: a count of {n}")
            elements *= n
        if elements > MAX_REGISTERS:
            raise RegisterError(f"{what}: more than {MAX_REGISTERS} elements")
        if stride < 1:
            raise RegisterError(f"{what}: a stride of {stride} bytes")
        self.offset, self.dimensions, self.stride = at, dimensions, stride

    def elements(self) -> Iterator[tuple[str, int]]:
        """Yields (name, offset) of each element, the last dimension being the fastest."""
        for n, index in enumerate(itertools.product(*map(range, self.dimensions))):
            yield self.name + "".join(f"[{i}]" for i in index), self.offset + n * self.stride

    def _nested(self, make: Callable[[str, int], Any]) -> Any:
        """The elements that `make(name, offset)` makes, as tuples of tuples; without dimensions the element itself."""
        return _nest([make(name, at) for name, at in self.elements()], self.dimensions)

    def placed(self, name: str, at: int) -> Self:
        copied = copy.copy(self)
        copied.name, copied.offset = name, self.offset + at
        return copied


def _nest(flat: list[Any], dimensions: tuple[int, ...]) -> Any:
    for size in reversed(dimensions[1:]):
        flat = [tuple(flat[n : n + size]) for n in range(0, len(flat), size)]
    return tuple(flat) if dimensions else flat[0]


class Array(_Repeated):
    """Registers of one kind in a row: `DOORBELL = Array(Reg32(0x1000, WO), 64, stride=8)`.

    `register` is element 0.  `count`: how many, or a tuple of numbers for several dimensions, of which the last is the
    fastest.  `stride`: bytes from one to the next, by default their size.  In the class: a tuple of registers.  In an
    instance: a sequence of numbers, of which each can be set.
    """

    def __init__(self, register: Register, count: int | Sequence[int], *, stride: int | None = None) -> None:
        if not isinstance(register, Register):
            raise RegisterError(f"an Array is of a register, as Array(Reg32(0x40), 4), not of {register!r}")
        super().__init__(register.offset, count, register.size if stride is None else stride, "Array")
        if not self.dimensions:
            raise RegisterError("Array: a count of nothing")
        self.register = register

    def registers(self) -> Iterator[Register]:
        """Yields the registers."""
        for name, at in self.elements():
            yield self.register.placed(name, at - self.register.offset)

    def check(self, bank: type[RegisterBank]) -> None:
        """RegisterError: the stride is wrong."""
        if self.stride % self.register.size:
            raise RegisterError(
                f"{bank.__name__}.{self.name}: stride {self.stride:#x} is no multiple of its size {self.register.size}"
            )

    def of_class(self, path: str, registers: Mapping[str, Register]) -> Any:
        """The registers, as tuples."""
        renamed = self.placed(path, 0)
        return renamed._nested(lambda name, at: registers[name])

    def bound(self, bank: RegisterBank) -> Any:
        """The values: a memoryview of the registers' numbers, or lists of them."""
        cells, size = bank.cells[self.register.width], self.register.size
        row, step = self.dimensions[-1], self.stride // size
        starts = range(0, row * _product(self.dimensions[:-1]), row)
        first = self.offset // size
        rows = [cells[first + n * step :][: (row - 1) * step + 1 : step] for n in starts]
        return rows[0] if len(self.dimensions) == 1 else _nest(rows, self.dimensions[:-1])

    # An element is a number, and a register where the class is asked.
    @overload
    def __get__(self, bank: None, owner: type[RegisterBank]) -> Sequence[Register]: ...
    @overload
    def __get__(self, bank: RegisterBank, owner: type[RegisterBank]) -> memoryview: ...
    def __get__(self, bank: RegisterBank | None, owner: type[RegisterBank]) -> Any:
        return super().__get__(bank, owner)


def _product(numbers: Sequence[int]) -> int:
    product = 1
    for n in numbers:
        product *= n
    return product


class _Files(_Repeated):
    """Register files: banks in a bank."""

    def __init__(self, of: type[RegisterBank], at: int, count: int | Sequence[int], stride: int | None) -> None:
        what = type(self).__name__.lstrip("_")
        if not (isinstance(of, type) and issubclass(of, RegisterBank)) or of is RegisterBank:
            raise RegisterError(f"{what}: of must be a class derived from RegisterBank, not {of!r}")
        super().__init__(at, count, of.size if stride is None else stride, what)
        self.of = of
        if _product(self.dimensions) * len(of.registers) > MAX_REGISTERS:
            raise RegisterError(f"{what} of {of.__name__}: more than {MAX_REGISTERS} registers")

    def check(self, bank: type[RegisterBank]) -> None:
        """RegisterError: the register files end past the bank, or overlap."""
        end = self.offset + (_product(self.dimensions) - 1) * self.stride + self.of.size
        where = f"{bank.__name__}.{self.name}"
        if self.offset < 0 or end > bank.size:
            raise RegisterError(f"{where}: ends past the bank's size {bank.size:#x}")

    def registers(self) -> Iterator[Register]:
        """Yields the registers of all files."""
        for name, at in self.elements():
            for register in self.of.registers:
                yield register.placed(f"{name}.{register.name}", at)

    def memory(self) -> Iterator[Part]:
        """Yields the memories of all files."""
        for name, at in self.elements():
            for memory in self.of.memories:
                yield memory.placed(f"{name}.{memory.name}", at)

    def of_class(self, path: str, registers: Mapping[str, Register]) -> Any:
        """The registers of each file, as attributes."""
        renamed = self.placed(path, 0)
        return renamed._nested(lambda name, at: _Element(self.of, name, registers))

    def bound(self, bank: RegisterBank) -> Any:
        """A bank for each file."""
        return self._nested(lambda name, at: self.of(bank.view[at : at + self.of.size]))


class RegisterFile(_Files, Generic[_B]):
    """A register file: the registers of the bank `of`, from offset `at` on."""

    def __init__(self, of: type[_B], *, at: int) -> None:
        super().__init__(of, at, (), None)

    @overload
    def __get__(self, bank: None, owner: type[RegisterBank]) -> type[_B]: ...
    @overload
    def __get__(self, bank: RegisterBank, owner: type[RegisterBank]) -> _B: ...
    def __get__(self, bank: RegisterBank | None, owner: type[RegisterBank]) -> Any:
        return super().__get__(bank, owner)


class FileArray(_Files, Generic[_B]):
    """An array of register files.  `count` and `stride` as for `Array`; by default one follows the other."""

    def __init__(self, of: type[_B], count: int | Sequence[int], *, at: int, stride: int | None = None) -> None:
        super().__init__(of, at, count, stride)
        if not self.dimensions:
            raise RegisterError("FileArray: a count of nothing")

    @overload
    def __get__(self, bank: None, owner: type[RegisterBank]) -> Sequence[type[_B]]: ...
    @overload
    def __get__(self, bank: RegisterBank, owner: type[RegisterBank]) -> Sequence[_B]: ...
    def __get__(self, bank: RegisterBank | None, owner: type[RegisterBank]) -> Any:
        return super().__get__(bank, owner)


class RamArea(Part):
    """`size` bytes of plain memory at `offset`, which the guest reads and, unless `mode` is RO, writes.

    In an instance: a writable memoryview.  It begins as zeros and keeps its contents over a reset.  A memory of more
    than a few MiB, or one that the client may map, is better declared in the BAR: `bar.ram`.
    """

    def __init__(self, offset: int, size: int, mode: Mode = Mode.RW, *, doc: str = "") -> None:
        for name, value in (("offset", offset), ("size", size)):
            if not isinstance(value, int):
                raise RegisterError(f"RamArea: {name} must be a number, not {value!r}")
        if mode not in (Mode.RO, Mode.RW):
            raise RegisterError(f"RamArea at {offset:#x}: mode must be RO or RW, not {mode!r}")
        if size < 1:
            raise RegisterError(f"RamArea at {offset:#x}: {size} bytes")
        self.offset, self.size, self.mode, self.doc = offset, size, mode, doc

    def memory(self) -> Iterator[Part]:
        """Yields itself."""
        yield self

    def placed(self, name: str, at: int) -> Self:
        """A copy with another name, `at` bytes further on."""
        copied = copy.copy(self)
        copied.name, copied.offset = name, self.offset + at
        return copied

    def check(self, bank: type[RegisterBank]) -> None:
        """RegisterError: the memory ends past the bank."""
        if self.offset < 0 or self.offset + self.size > bank.size:
            raise RegisterError(f"{bank.__name__}.{self.name}: ends past the bank's size {bank.size:#x}")

    def bound(self, bank: RegisterBank) -> memoryview:
        """The bytes."""
        return bank.view[self.offset : self.offset + self.size]

    @overload
    def __get__(self, bank: None, owner: type[RegisterBank]) -> RamArea: ...
    @overload
    def __get__(self, bank: RegisterBank, owner: type[RegisterBank]) -> memoryview: ...
    def __get__(self, bank: RegisterBank | None, owner: type[RegisterBank]) -> Any:
        return super().__get__(bank, owner)
