"""The symbols of a kernel, from the tables that it has of them for /proc/kallsyms: no other part of it has any.

Linux's scripts/kallsyms.c writes the tables into .rodata; kernel/kallsyms.c reads them.  Nothing says where they are,
so they are found by what they must agree on.  In order (each begins at a multiple of 4 bytes, or of 8 before Linux 7):

    num_syms      how many symbols there are (4 bytes)
    names         for each: how many bytes come (ULEB128), then these; each byte stands for a token.  The first token
                  begins with the symbol's type
    markers       where in names each 256th symbol is (4 bytes each)
    token_table   256 tokens, each ends with a NUL
    token_index   where in token_table each token is (2 bytes each)
    offsets       for each symbol, 4 bytes, in one of three ways, see _FORMS
    relative_base an address (8 bytes); Linux 7 has none
    seqs_of_names the symbols in the order of their names; not read

Before Linux 6.5 the order was: offsets, relative_base, num_syms, names, markers, seqs_of_names (since 6.2),
token_table, token_index.
"""

from __future__ import annotations

import bisect
import codecs
import operator
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from vmodel.coverage.errors import CoverageError
from vmodel.span import Span

#: Each digit is used in names, so it is a token by itself (insert_real_symbols_in_table).
_DIGITS = b"".join(b"%d\0" % digit for digit in range(10))
#: A symbol's longest name (KSYM_NAME_LEN), the most symbols, the most bytes of all names: in no kernel by far.
_LONGEST = 512
_MOST_SYMBOLS = 1 << 20
_MOST_BYTES = 64 << 20
#: How many places are tried that look like a table: the right one is among the first few.
_MOST_PLACES = 1000
#: The types of functions (nm): defined and weak ones.
_FUNCTIONS = "tTwW"
_64_BITS = (1 << 64) - 1


@dataclass(frozen=True)
class Symbols:
    """The symbols of a kernel in order of their link addresses.

    `addresses`, `types` (as nm has them: "t" is a local function, "T" a global one) and `names` are as long as each
    other; `code` has the addresses of all code.  Symbols of other sections may have the types of functions, too.
    """

    addresses: Sequence[int]
    types: str
    names: Sequence[str]
    code: Sequence[Span]

    def address(self, name: str) -> int:
        """The link address of this symbol, the lowest if several have the name.  CoverageError: none has."""
        try:
            return self.addresses[self.names.index(name)]
        except ValueError:
            raise CoverageError(f"the kernel has no symbol {name!r}") from None

    def functions(self) -> list[tuple[int, int, str]]:
        """(link address, size in bytes, name) of each symbol that is code, in order of the addresses.

        The size goes up to the next address that has any symbol, or to the end of the code.
        """
        starts = [span.start for span in self.code]
        ends = sorted({*self.addresses, *(span.last + 1 for span in self.code)})
        found = []
        for address, kind, name in zip(self.addresses, self.types, self.names, strict=True):
            if kind not in _FUNCTIONS:
                continue
            part = bisect.bisect_right(starts, address) - 1
            if part >= 0 and address <= self.code[part].last:
                found.append((address, ends[bisect.bisect_right(ends, address)] - address, name))
        return found

    def __iter__(self) -> Iterator[tuple[int, str, str]]:
        return zip(self.addresses, self.types, self.names, strict=True)

    def __len__(self) -> int:
        return len(self.addresses)


def read_symbols(rodata: bytes, address: int, text: int, code: Sequence[Span]) -> Symbols:
    """The symbols whose tables are in .rodata, which has this address; .text begins at `text`.

    ValueError: there are none, or they are damaged.
    """
    tokens, tokens_at, index_at = _tokens(rodata)
    count_at, places = _names(rodata, tokens_at)
    mapping = dict(enumerate(tokens))
    names, total = [], 0
    for start, end in places:
        name = codecs.charmap_decode(rodata[start:end], "strict", mapping)[0]
        total += len(name)
        if not 2 <= len(name) <= _LONGEST or total > _MOST_BYTES:
            raise ValueError("its table of symbols has a name that is too long or empty")
        names.append(name)
    types = "".join(name[0] for name in names)
    names = [name[1:] for name in names]
    addresses = _addresses(rodata, address, index_at + 512, count_at, names, text)
    return Symbols(addresses, types, names, tuple(code))


def _up(at: int) -> tuple[int, ...]:
    """Where a table may begin that follows this place."""
    return tuple(dict.fromkeys((-(-at // 4) * 4, -(-at // 8) * 8)))


def _tokens(data: bytes) -> tuple[list[str], int, int]:
    """The tokens; where token_table and token_index are."""
    at = -1
    for _ in range(_MOST_PLACES):
        at = data.find(_DIGITS, at + 1)
        if at < 0:
            break
        end = at
        for _ in range(256 - ord("0")):
            end = data.find(b"\0", end, end + _LONGEST) + 1
            if not end:
                break
        for index_at in _up(end) if end else ():
            index = struct.unpack("<256H", data[index_at : index_at + 512].ljust(512, b"\0"))
            start = at - index[ord("0")]
            if start < 0 or index_at + 512 > len(data):
                continue
            tokens = data[start:end].split(b"\0")[:-1]
            if len(tokens) == 256 and tuple(accumulate((len(token) + 1 for token in tokens[:-1]), initial=0)) == index:
                return [token.decode("ascii") for token in tokens], start, index_at
    raise ValueError("the kernel has no table of symbols: its option CONFIG_KALLSYMS is off, or the table is damaged")


def _names(data: bytes, tokens_at: int) -> tuple[int, list[tuple[int, int]]]:
    """Where num_syms is; where the bytes of each name begin and end."""
    walks = 0
    for markers_at, markers in _markers(data, tokens_at):
        counts = range((len(markers) - 1) * 256 + 1, len(markers) * 256 + 1)
        highest = (markers_at - markers[-1] - 4) // 4 * 4
        for count_at in range(highest, max(highest - 256 * _LONGEST, -1), -4):
            (count,) = struct.unpack_from("<I", data, count_at)
            if count not in counts:
                continue
            for at in _up(count_at + 4):
                walks += 1
                if found := _walk(data, at, count, markers_at, markers):
                    return count_at, found
                if walks > 16:
                    raise ValueError("its table of symbols is damaged")
    raise ValueError("its table of symbols is damaged")


def _markers(data: bytes, tokens_at: int) -> Iterator[tuple[int, list[int]]]:
    """Places that may be the markers, the last ones first: a zero, then numbers that grow up to the next table."""
    at = tokens_at
    for _ in range(_MOST_PLACES):
        at = data.rfind(bytes(4), max(0, tokens_at - 8 * _MOST_SYMBOLS), at + 3)
        if at < 0:
            return
        if at % 4:
            continue
        markers, end = [0], at + 4
        while end + 4 <= tokens_at and len(markers) <= _MOST_SYMBOLS // 256:
            (marker,) = struct.unpack_from("<I", data, end)
            if not 512 <= marker - markers[-1] <= 256 * _LONGEST:
                break
            markers.append(marker)
            end += 4
        left = tokens_at - end
        most = len(markers) * 256
        if len(markers) > 1 and (left < 8 or 3 * (most - 255) <= left <= 3 * most + 16):
            yield at, markers


def _walk(data: bytes, at: int, count: int, end: int, markers: list[int]) -> list[tuple[int, int]]:
    """Where the bytes of each name begin and end; []: these are no names that agree with the markers."""
    found, begin = [], at
    for number in range(count):
        if not number & 255 and at - begin != markers[number >> 8]:
            return []
        length = data[at]
        at += 1
        if length & 0x80:
            length = length & 0x7F | data[at] << 7
            at += 1
        if not length or at + length > end:
            return []
        found.append((at, at + length))
        at += length
    return found if end - at < 8 else []


#: How a symbol's address is had, from its number in offsets, where that is, and relative_base.
_FORMS: tuple[Callable[[int, int, int], int], ...] = (
    # Linux 7: it is relative to its own place.
    lambda offset, place, base: place + offset & _64_BITS,
    # Addresses of per-CPU data are as they are, all others are below relative_base - 1 (up to Linux 6.14).
    lambda offset, place, base: offset if offset >= 0 else base - 1 - offset & _64_BITS,
    lambda offset, place, base: base + (offset & 0xFFFFFFFF) & _64_BITS,
)


def _addresses(data: bytes, base: int, after: int, count_at: int, names: list[str], text: int) -> Sequence[int]:
    """The address of each symbol: that way to read the offsets in which `_text` is right, and all are in order."""
    count = len(names)
    known = next((number for number, name in enumerate(names) if name in ("_text", "_stext")), None)
    if known is None:
        raise ValueError("its table of symbols has no _text")
    before = (count_at - 8 - 4 * count) // 8 * 8
    for offsets_at, base_at in ((after, -(-(after + 4 * count) // 8) * 8), (before, count_at - 8)):
        if offsets_at < 0 or base_at + 8 > len(data):
            continue
        offsets = struct.unpack_from(f"<{count}i", data, offsets_at)
        (relative,) = struct.unpack_from("<Q", data, base_at)
        place = base + offsets_at
        for form in _FORMS:
            if form(offsets[known], place + 4 * known, relative) != text:
                continue
            found = [form(offset, place + 4 * number, relative) for number, offset in enumerate(offsets)]
            if all(map(operator.le, found, islice(found, 1, None))):
                return array("Q", found)
    raise ValueError("its table of symbols has no addresses")
