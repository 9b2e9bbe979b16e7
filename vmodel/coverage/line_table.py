"""Line programs of DWARF: which source line each address of code is from (DWARF 5, chapter 6.2; also versions 2 to 4).

pyelftools reads them, too, but takes ten times as long, and applies the relocations of all debug information first.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass

#: A source file, as the compiler recorded its path, and a line from 1.
Place = tuple[str, int]
#: An address, what it is from (None: no line, or the end of a sequence), and whether a statement begins there.
Row = tuple[int, Place | None, bool]

_DW_LNCT_PATH, _DW_LNCT_DIRECTORY = 1, 2
_STRING, _LINE_STRP, _STRP = 0x08, 0x1F, 0x0E
#: Sizes in bytes of DW_FORM_data1, 2, 4, 8 and 16; blocks and numbers in LEB128 have their sizes in them.
_FIXED = {0x0B: 1, 0x05: 2, 0x06: 4, 0x07: 8, 0x1E: 16}
_UDATA, _BLOCK = 0x0F, 0x09
_COPY, _ADVANCE_PC, _ADVANCE_LINE, _SET_FILE, _NEGATE_STMT, _CONST_ADD_PC, _FIXED_ADVANCE_PC = 1, 2, 3, 4, 6, 8, 9
_END_SEQUENCE, _SET_ADDRESS = 1, 2
_MASK = (1 << 64) - 1


class _Reader:
    """Reads bytes; IndexError behind their end."""

    def __init__(self, data: bytes, at: int, end: int) -> None:
        self.data = data
        self.at = at
        self.end = end

    def number(self, size: int) -> int:
        at = self.at
        self.skip(size)
        return int.from_bytes(self.data[at : self.at], "little")

    def skip(self, size: int) -> None:
        if self.at + size > self.end:
            raise IndexError
        self.at += size

    def leb(self) -> int:
        """An unsigned number in LEB128; it has at most 64 bits."""
        value = shift = 0
        while True:
            byte = self.number(1)
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value & _MASK
            if shift > 70:
                raise ValueError("a number with more than 64 bits")

    def signed(self) -> int:
        """A signed number in LEB128."""
        start = self.at
        value = self.leb()
        bits = 7 * (self.at - start)
        return value - (1 << bits) if value >> (bits - 1) & 1 else value

    def string(self) -> str:
        end = self.data.find(b"\0", self.at, self.end)
        if end < 0:
            raise IndexError
        found = self.data[self.at : end]
        self.at = end + 1
        return found.decode("utf-8", "replace")


@dataclass
class _Header:
    """Of a line program: what its opcodes mean, and the files by their number."""

    step: int
    statement: bool
    line_base: int
    line_range: int
    opcode_base: int
    lengths: list[int]
    files: list[str]


def rows(line: bytes, line_strings: bytes, strings: bytes) -> Iterator[Row]:
    """The rows of all programs of .debug_line, relocated.

    What an address is from goes on to the next row of its sequence; of several rows at one address, the last counts.
    `line_strings`, `strings`: .debug_line_str and .debug_str.  ValueError: damaged, or of an unknown version.
    """
    at = 0
    while at < len(line):
        reader = _Reader(line, at, len(line))
        try:
            size, wide = reader.number(4), 4
            if size == 0xFFFFFFFF:
                size, wide = reader.number(8), 8
            if size > len(line) - reader.at:
                raise IndexError
            at = reader.end = reader.at + size
            header = _header(reader, wide, line_strings, strings)
            yield from _run(reader, header)
        except IndexError:
            raise ValueError("a line program is cut off") from None


def _header(reader: _Reader, wide: int, line_strings: bytes, strings: bytes) -> _Header:
    version = reader.number(2)
    if not 2 <= version <= 5:
        raise ValueError(f"line programs of DWARF version {version}")
    if version == 5:
        reader.skip(2)
    start = reader.number(wide)
    start += reader.at
    step = reader.number(1)
    if version >= 4:
        reader.skip(1)  # operations in a VLIW instruction
    statement = bool(reader.number(1))
    base, lines, opcodes = reader.number(1), reader.number(1), reader.number(1)
    if not lines or not opcodes:
        raise ValueError("a line program without opcodes")
    lengths = [0, *(reader.number(1) for _ in range(opcodes - 1))]
    if version == 5:
        folders = _entries(reader, wide, line_strings, strings)
        names = _entries(reader, wide, line_strings, strings)
        top = folders[0][0] if folders else ""
        if not top.startswith("/"):
            top = ""  # Debian's kernels have a relative folder here, which says nothing: nobody knows to what
        files = [_path(name, folders[of][0] if of < len(folders) else "", top) for name, of in names]
    else:
        folders = [("", 0), *_old_entries(reader, False)]
        files = [
            "",
            *(_path(name, folders[min(of, len(folders) - 1)][0], "") for name, of in _old_entries(reader, True)),
        ]
    if not reader.at <= start <= reader.end:
        raise IndexError
    reader.at = start
    return _Header(step, statement, base - 256 if base > 127 else base, lines, opcodes, lengths, files)


def _path(name: str, folder: str, top: str) -> str:
    return posixpath.normpath(posixpath.join(top, folder, name))


def _old_entries(reader: _Reader, file: bool) -> Iterator[tuple[str, int]]:
    """Up to DWARF 4: a name, and for a file its folder's number, time and size, until an empty name."""
    while name := reader.string():
        folder = reader.leb() if file else 0
        if file:
            reader.leb()
            reader.leb()
        yield name, folder


def _entries(reader: _Reader, wide: int, line_strings: bytes, strings: bytes) -> list[tuple[str, int]]:
    """DWARF 5, 6.2.4.1: names and numbers of folders, in a form that the table describes."""
    form = [(reader.leb(), reader.leb()) for _ in range(reader.number(1))]
    count = reader.leb()
    if count > reader.end - reader.at:
        raise IndexError
    found = []
    for _ in range(count):
        name, folder = "", 0
        for kind, how in form:
            if how in (_LINE_STRP, _STRP):
                table = line_strings if how == _LINE_STRP else strings
                text = _Reader(table, reader.number(wide), len(table)).string()
            elif how == _STRING:
                text = reader.string()
            else:
                value = _value(reader, how)
                if kind == _DW_LNCT_DIRECTORY:
                    folder = value
                continue
            if kind == _DW_LNCT_PATH:
                name = text
        found.append((name, folder))
    return found


def _value(reader: _Reader, form: int) -> int:
    if form in _FIXED:
        return reader.number(_FIXED[form])
    value = reader.leb()
    if form == _BLOCK:
        reader.skip(value)
    elif form != _UDATA:
        raise ValueError(f"a table of files with the unknown form {form:#x}")
    return value


def _run(reader: _Reader, header: _Header) -> Iterator[Row]:
    """DWARF 5, 6.2.2 and 6.2.5: the state machine."""
    places: dict[tuple[int, int], Place | None] = {}
    address, file, line, statement = 0, 1, 1, header.statement
    base = header.opcode_base

    def row() -> Row:
        key = file, line
        if key not in places:
            known = 0 <= file < len(header.files) and line > 0
            places[key] = (header.files[file], line) if known else None
        return address, places[key], statement

    while reader.at < reader.end:
        opcode = reader.number(1)
        if opcode >= base:
            steps, lines = divmod(opcode - base, header.line_range)
            address = (address + steps * header.step) & _MASK
            line += header.line_base + lines
            yield row()
        elif opcode == 0:
            size = reader.leb()
            end = reader.at + size
            if not size or end > reader.end:
                raise IndexError
            kind = reader.number(1)
            if kind == _END_SEQUENCE:
                yield address, None, False
                address, file, line, statement = 0, 1, 1, header.statement
            elif kind == _SET_ADDRESS:
                address = reader.number(min(size - 1, 8))
            reader.at = end
        elif opcode == _COPY:
            yield row()
        elif opcode == _ADVANCE_PC:
            address = (address + reader.leb() * header.step) & _MASK
        elif opcode == _ADVANCE_LINE:
            line += reader.signed()
        elif opcode == _SET_FILE:
            file = reader.leb()
        elif opcode == _NEGATE_STMT:
            statement = not statement
        elif opcode == _CONST_ADD_PC:
            address = (address + (255 - base) // header.line_range * header.step) & _MASK
        elif opcode == _FIXED_ADVANCE_PC:
            address = (address + reader.number(2)) & _MASK
        else:
            for _ in range(header.lengths[opcode]):
                reader.leb()
