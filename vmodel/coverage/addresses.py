"""`AddressSet`: a set of addresses of instructions; small, and fast to unite even when there are thousands of sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

#: Addresses in a page.  Code is dense inside of a function, and functions that matter may be megabytes apart.
PAGE = 4096
#: The set bits of each byte.
_BITS = [tuple(bit for bit in range(8) if byte >> bit & 1) for byte in range(256)]


class AddressSet:
    """An immutable set of addresses, ints from 0: a bitmap for each page that has any."""

    __slots__ = ("_hash", "_pages")

    def __init__(self, addresses: Iterable[int] = ()) -> None:
        pages: dict[int, bytearray] = {}
        for address in addresses:
            number, at = divmod(address, PAGE)
            page = pages.get(number)
            if page is None:
                page = pages[number] = bytearray(PAGE // 8)
            page[at >> 3] |= 1 << (at & 7)
        self._pages = {number: int.from_bytes(page, "little") for number, page in pages.items()}
        self._hash: int | None = None

    @classmethod
    def _of(cls, pages: dict[int, int]) -> AddressSet:
        made = cls()
        made._pages = pages
        return made

    @classmethod
    def union(cls, sets: Iterable[AddressSet]) -> AddressSet:
        """The addresses that are in any of the sets."""
        pages: dict[int, int] = {}
        for other in sets:
            for number, page in other._pages.items():
                pages[number] = pages.get(number, 0) | page
        return cls._of(pages)

    def __or__(self, other: AddressSet) -> AddressSet:
        return AddressSet.union((self, other))

    def __and__(self, other: AddressSet) -> AddressSet:
        both = self._pages.keys() & other._pages.keys()
        return AddressSet._of({n: page for n in both if (page := self._pages[n] & other._pages[n])})

    def __sub__(self, other: AddressSet) -> AddressSet:
        theirs = other._pages
        return AddressSet._of({n: left for n, page in self._pages.items() if (left := page & ~theirs.get(n, 0))})

    def __le__(self, other: AddressSet) -> bool:
        theirs = other._pages
        return all(not page & ~theirs.get(number, 0) for number, page in self._pages.items())

    def __eq__(self, other: object) -> bool:
        return self._pages == other._pages if isinstance(other, AddressSet) else NotImplemented

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(frozenset(self._pages.items()))
        return self._hash

    def __bool__(self) -> bool:
        return bool(self._pages)

    def __len__(self) -> int:
        return sum(page.bit_count() for page in self._pages.values())

    @property
    def pages(self) -> int:
        """How many pages of `PAGE` addresses have any: what the set's size in memory depends on."""
        return len(self._pages)

    def __contains__(self, address: int) -> bool:
        return bool(self._pages.get(address // PAGE, 0) >> address % PAGE & 1)

    def __iter__(self) -> Iterator[int]:
        """The addresses in ascending order."""
        return chain.from_iterable(_addresses(number * PAGE, self._pages[number]) for number in sorted(self._pages))

    def __reduce__(self) -> tuple[object, ...]:
        return AddressSet._of, (self._pages,)

    def __repr__(self) -> str:
        return f"AddressSet({len(self)} addresses)"


def _addresses(start: int, page: int) -> Iterator[int]:
    for at, byte in enumerate(page.to_bytes(PAGE // 8, "little")):
        if byte:
            for bit in _BITS[byte]:
                yield start + at * 8 + bit
