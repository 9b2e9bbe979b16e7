"""`Regions`: the accesses to a device's regions that exit to Python.

The shim answers accesses to bytes without a hook.  All others come here, and only here an access is split: at the
borders of hooked registers and areas, in ascending order.  Pieces without a hook have the same effect as in the shim.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from vmodel._shim import FunctionRegions
from vmodel._shim import key as access_key
from vmodel.fields import fit
from vmodel.modes import Write
from vmodel.regs import Register, RegisterBank, note_of
from vmodel.span import Span
from vmodel.threads import Owner, owned

Reader = Callable[[int], int]
Writer = Callable[[int], int | None]


class Area(Protocol):
    """Bytes of a region that Python serves; offsets are in the region."""

    span: Span

    def read(self, offset: int, count: int) -> bytes:
        """Reads `count` bytes, all inside the span."""

    def write(self, offset: int, data: bytes) -> None:
        """Writes `data`, all of it inside the span."""


class HookedRegister:
    """A register with a hook, as an Area of its region.

    While the hook runs, the register has its old value.  What the access makes of it is stored afterwards, unless the
    hook has set the register itself.
    """

    def __init__(
        self, at: int, bank: RegisterBank, register: Register, reader: Reader | None, writer: Writer | None
    ) -> None:
        """`at`: the bank's offset in the region."""
        self.span = Span.sized(at + register.offset, register.size)
        self._bank, self._register = bank, register
        self._reader, self._writer = reader, writer
        self._full = (1 << register.width) - 1
        #: None, and while the hook runs the value to be stored.  An element of an array has no note.
        self._note = note_of(bank, register)

    @property
    def _stored(self) -> int:
        return self._register.__get__(self._bank, type(self._bank))

    def _fit(self, result: int) -> int:
        """The result of a hook.  ValueError, TypeError: as of `fit`."""
        return fit(result, self._register.width, f"{type(self._bank).__name__}.{self._register.name}")

    def _call(self, hook: Callable[[int], int | None], argument: int, after: int) -> tuple[int | None, bool]:
        """Calls a hook: its result, and whether it has set the register; `after` is stored if it does neither."""
        note = self._note
        if note is None:
            before = self._stored
            return hook(argument), self._stored != before
        note.value = after
        try:
            return hook(argument), note.value is None
        finally:
            note.value = None

    def read(self, offset: int, count: int) -> bytes:
        """Reads `count` bytes of the register: those of the read hook's result, if there is one."""
        first = offset - self.span.start
        # The hook gets the value from before what a read does to it.
        value = self._stored
        after = self._register.after_read(value, ((1 << 8 * count) - 1) << 8 * first)
        own = False
        if self._reader is not None:
            result, own = self._call(self._reader, value, after)
            value = self._fit(result)  # type: ignore[arg-type]  # None is refused like any other wrong result
        if not own:
            self._register.__set__(self._bank, after)
        return value.to_bytes(self._register.size, "little")[first : first + count]

    def write(self, offset: int, data: bytes) -> None:
        """Writes bytes of the register and calls the write hook."""
        shift = 8 * (offset - self.span.start)
        self._write(int.from_bytes(data, "little") << shift, ((1 << 8 * len(data)) - 1) << shift)

    def _write(self, value: int, enabled: int) -> None:
        """Writes the bits in `enabled`; other bits keep their value, WO bits are never stored."""
        stored = self._stored
        new = self._register.written(stored, value, enabled)
        kept = self._register.writes.get(Write.PASSES, 0)
        if self._writer is not None:
            result, own = self._call(self._writer, new, stored & kept | new & ~kept)
            if result is not None:
                new = self._fit(result)
            elif own:
                return
        # Read again, as the hook may have changed the bits that are kept.
        self._register.__set__(self._bank, self._stored & kept | new & ~kept)

    def whole_read(self) -> Callable[[], int]:
        """A function that reads the whole register, as drivers nearly always do: the fast path."""
        register, reader, full = self._register, self._reader, self._full
        if register.reads or reader is None:
            return lambda: int.from_bytes(self.read(self.span.start, register.size), "little")
        cell, at = self._bank.cells[register.width], register.offset // register.size
        fitting = self._fit

        def read() -> int:
            value = reader(cell[at])
            return value if value.__class__ is int and 0 <= value <= full else fitting(value)

        return read

    def whole_write(self) -> Callable[[int], None]:
        """A function that writes the whole register: the fast path."""
        register, writer, full = self._register, self._writer, self._full
        if register.writes.get(Write.STORES) != full or writer is None:
            return lambda value: self._write(value, full)
        note = self._note
        if note is None:
            return self._whole_write_of_element(writer)
        cell, at = self._bank.cells[register.width], register.offset // register.size
        fitting = self._fit

        def write(value: int) -> None:
            note.value = value
            try:
                result = writer(value)
                if result is None:
                    result = note.value
                    if result is None:
                        return
                elif result.__class__ is not int or not 0 <= result <= full:
                    result = fitting(result)
                cell[at] = result
            finally:
                note.value = None

        return write

    def _whole_write_of_element(self, writer: Writer) -> Callable[[int], None]:
        """The same for an element of an array: it was set if its value is another one."""
        cell, at = self._bank.cells[self._register.width], self._register.offset // self._register.size
        fitting = self._fit

        def write(value: int) -> None:
            before = cell[at]
            result = writer(value)
            if result is not None:
                cell[at] = fitting(result)
            elif cell[at] == before:
                cell[at] = value

        return write


class Regions:
    """All accesses to one function that exit to Python."""

    def __init__(
        self, function: FunctionRegions, failed: Callable[[str, int, int, BaseException], None], owner: Owner
    ) -> None:
        """`failed` gets exceptions of hooks; a read whose hook fails returns all ones, as a master abort does."""
        self.owner = owner
        self._function = function
        self._failed = failed
        #: By region, in ascending order: the areas for reads, and those for writes.
        self._readers: dict[int, list[Area]] = {}
        self._writers: dict[int, list[Area]] = {}
        #: Reads and writes of whole registers, by the shim's key of the access.
        self._whole_reads: dict[int, Callable[[], int]] = {}
        self._whole_writes: dict[int, Callable[[int], None]] = {}
        #: By region: what runs before its reads, and after its writes.
        self._before: dict[int, Callable[[Span], None]] = {}
        self._after: dict[int, Callable[[Span], None]] = {}

    def add_area(self, region: int, area: Area) -> None:
        """Adds an area whose bytes only Python has."""
        for areas in (self._readers, self._writers):
            insort(areas.setdefault(region, []), area, key=_start)

    def add_hooks(
        self,
        region: int,
        at: int,
        bank: RegisterBank,
        readers: Mapping[Register, Reader],
        writers: Mapping[Register, Writer],
    ) -> None:
        """Adds the hooks of a bank at offset `at` of the region."""
        for register in bank.registers:
            reader, writer = readers.get(register), writers.get(register)
            exits_on_read = reader is not None or register.exits_on_read
            exits_on_write = writer is not None or register.exits_on_write
            if not exits_on_read and not exits_on_write:
                continue
            hooked = HookedRegister(at, bank, register, reader, writer)
            key = access_key(region, hooked.span.start, register.size)
            if exits_on_read:
                insort(self._readers.setdefault(region, []), hooked, key=_start)
                self._whole_reads[key] = hooked.whole_read()
            if exits_on_write:
                insort(self._writers.setdefault(region, []), hooked, key=_start)
                if region not in self._after:
                    self._whole_writes[key] = hooked.whole_write()

    def before_reads(self, region: int, call: Callable[[Span], None]) -> None:
        """Runs `call` before each read of a region that exits; it gets the bytes to be read."""
        self._before[region] = call

    def after_writes(self, region: int, call: Callable[[Span], None]) -> None:
        """Runs `call` after each write to a region that exits; it gets the written bytes.  Precedes `add_hooks`."""
        self._after[region] = call

    @owned
    def read(self, key: int, region: int, offset: int, count: int) -> int | bytes:
        """Reads `count` bytes: an int, or bytes when count > 8.  `key` is the access's vms_key."""
        try:
            whole = self._whole_reads.get(key)
            if whole is not None:
                return whole()
            if not key and (refusal := self._function.refusal(region, offset, count)):
                data = refusal[1]
                return int.from_bytes(data, "little") if count <= 8 else data
            if region in self._before:
                self._before[region](Span.sized(offset, count))
            data = b"".join(
                self._function.plain_read(region, at, size) if area is None else area.read(at, size)
                for at, size, area in _split(self._readers.get(region, ()), offset, count)
            )
        except BaseException as error:
            self._failed("a read", region, offset, error)
            data = b"\xff" * count
        return int.from_bytes(data, "little") if count <= 8 else data

    @owned
    def write(self, key: int, region: int, offset: int, count: int, value: int | bytes) -> None:
        """Writes `count` bytes; `value` is an int when count <= 8, else bytes.  `key` is the access's vms_key."""
        try:
            whole = self._whole_writes.get(key)
            if whole is not None:
                whole(value)  # type: ignore[arg-type]
                return
            if not key and self._function.refusal(region, offset, count):
                return
            data = value.to_bytes(count, "little") if isinstance(value, int) else value
            for at, size, area in _split(self._writers.get(region, ()), offset, count):
                piece = data[at - offset : at - offset + size]
                if area is None:
                    self._function.plain_write(region, at, piece)
                else:
                    area.write(at, piece)
            if region in self._after:
                self._after[region](Span.sized(offset, count))
        except BaseException as error:
            self._failed("a write", region, offset, error)


def _start(area: Area) -> int:
    return area.span.start


def _split(areas: list[Area] | tuple[()], offset: int, count: int) -> Iterator[tuple[int, int, Area | None]]:
    """Splits an access at the borders of areas: (offset, size, area or None), in ascending order."""
    end = offset + count
    for area in areas[bisect_left(areas, offset, key=lambda a: a.span.last) :]:
        if area.span.start >= end:
            break
        if offset < area.span.start:
            yield offset, area.span.start - offset, None
            offset = area.span.start
        stop = min(end, area.span.last + 1)
        yield offset, stop - offset, area
        offset = stop
    if offset < end:
        yield offset, end - offset, None
