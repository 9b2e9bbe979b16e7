"""`TextLayout`: where the kernel's module loader puts a module's executable sections.

Linux's kernel/module/main.c, layout_sections(): sections with SHF_EXECINSTR and SHF_ALLOC, in the order of their
headers, each at the next multiple of its alignment; those whose name begins with ".init" are in memory of their own,
which is freed after the module's init.  So it has been since 6.4, and 6.12 and 7.3 agree; before, both kinds of memory
had data behind the code, and code began at the same place.  A kernel without CONFIG_MODULE_UNLOAD, unlike
Debian's, counts ".exit" sections with ".init" ones.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from vmodel.coverage.object_file import Section


@dataclass(frozen=True)
class PlacedSection:
    """A section at `offset` of the memory for text, or for init: `size` bytes, from `address` on in the program."""

    name: str
    init: bool
    offset: int
    address: int
    size: int


@dataclass(frozen=True)
class TextLayout:
    """Places of executable sections in a loaded module's two memories; without sections: those of the kernel itself."""

    sections: tuple[PlacedSection, ...] = ()

    @classmethod
    def of_sections(cls, sections: Iterable[Section]) -> TextLayout:
        """Of all sections of a module, in the file's order."""
        placed = []
        sizes = [0, 0]
        for section in sections:
            if section.executable:
                init = section.name.startswith(".init")
                alignment = section.alignment or 1
                offset = -(-sizes[init] // alignment) * alignment
                sizes[init] = offset + section.size
                placed.append(PlacedSection(section.name, init, offset, section.offset, section.size))
        return cls(tuple(placed))

    def loaded(self, text: int, init: int | None) -> dict[str, int]:
        """Where each section is that is not empty, as in /sys/module/NAME/sections, when memory begins at these."""
        return {s.name: base + s.offset for s in self.sections if s.size and (base := _base(s, text, init)) is not None}

    def address_of(self, text: int, init: int | None, virtual: int) -> int | None:
        """The address in the program of a virtual address in the guest; None: none of the module's code.

        `text`, `init`: where the module's memory for text and for init begins; `init` is None when it is freed.
        """
        found = self.ranges_of(text, init, [(virtual, virtual + 1)])
        return found[0][0] if found else None

    def ranges_of(self, text: int, init: int | None, ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """As `address_of`, of ranges (start, end), end not included; what is not the module's code is left out."""
        if not self.sections:
            return list(ranges)
        places = sorted(
            (base + s.offset, s.size, s.address)
            for s in self.sections
            if s.size and (base := _base(s, text, init)) is not None
        )
        starts = [start for start, _, _ in places]
        found = []
        for first, end in ranges:
            at = max(bisect_right(starts, first) - 1, 0)
            while at < len(places) and starts[at] < end:
                start, size, address = places[at]
                low, high = max(first, start), min(end, start + size)
                if low < high:
                    found.append((low - start + address, high - start + address))
                at += 1
        return found


def _base(section: PlacedSection, text: int, init: int | None) -> int | None:
    return init if section.init else text
