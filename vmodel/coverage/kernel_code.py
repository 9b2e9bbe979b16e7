"""The functions of a kernel's image, those whose names have certain prefixes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from vmodel.coverage.disassembly import Referred, decode
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.functions import CodeFunction, NamedCode, put_together
from vmodel.coverage.kallsyms import Symbols
from vmodel.coverage.object_file import SHF_WRITE, ObjectFile


class KernelCode:
    """Decodes functions of a kernel, which has no relocations: its addresses are final (ET_EXEC)."""

    def __init__(self, file: ObjectFile, symbols: Symbols, prefixes: Sequence[str]) -> None:
        """`prefixes`: those of the names of functions that are wanted."""
        self._file = file
        self._prefixes = tuple(prefixes)
        #: One for each address: of aliases, a wanted one.
        self._functions: dict[int, tuple[int, str]] = {}
        for address, size, name in symbols.functions():
            known = self._functions.get(address)
            if known is None or self._rank(name) < self._rank(known[1]):
                self._functions[address] = size, name
        self._starts = sorted(self._functions)
        self.undecoded: list[int] = []

    def _wanted(self, name: str) -> bool:
        return name.startswith(self._prefixes)

    def _rank(self, name: str) -> tuple[bool, bool]:
        """Of names for one address the best is the lowest; __pi_ is in front of those that code before paging uses."""
        return not self._wanted(name), name.startswith("__pi_")

    def functions(self) -> list[CodeFunction]:
        """Those that are wanted, in ascending order."""
        parts = []
        for section in self._file.sections:
            # nm takes all that is in .data of Linux 7.3 for code: the section is executable, and writable.
            if section.executable and not section.flags & SHF_WRITE and (data := self._file.contents(section)):
                end = section.address + section.size
                for start in self._starts[bisect_right(self._starts, section.address - 1) :]:
                    if start >= end:
                        break
                    size, name = self._functions[start]
                    if self._wanted(name):
                        stop = min(start + size, end)
                        code = data[start - section.address : stop - section.address]
                        instructions = list(decode(code, start, {}, self._refer, [], self.undecoded))
                        parts.append(NamedCode(name, section.name, start, stop, instructions))
        if not parts:
            raise CoverageError(f"the kernel has no function whose name begins with {' or '.join(self._prefixes)}")
        return put_together(parts)

    def _refer(self, target: int) -> Referred:
        at = bisect_right(self._starts, target) - 1
        if at < 0:
            return Referred(None, f"{target:#x}")
        start = self._starts[at]
        size, name = self._functions[start]
        if target >= start + size:
            return Referred(None, f"{target:#x}")
        return Referred.to(target if self._wanted(name) else None, name, target - start)
