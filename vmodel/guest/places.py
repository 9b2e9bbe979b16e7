"""Where in a module's source a place in the kernel's log is: `mycard_probe+0x1c/0x80 [mycard]` is mycard.c:42.

The module's file must have debug information, as modules have that `vmodel build` makes.  binutils' addr2line reads it:
that of the cache's compiler, or the host's.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

from vmodel.elf import reading_elf
from vmodel.guest.artifacts import cache_dir
from vmodel.patience import patience

#: Finds the file of a module by its name; None: it is unknown.
Find = Callable[[str], Path | None]
# As printk's %pS and %pB write it; newer kernels write a build id behind the module's name.
_PLACE = re.compile(r"\b([A-Za-z_][\w.]*)\+0x([0-9a-f]+)/0x([0-9a-f]+) \[(\w+)")
_KNOWN = re.compile(r"\.[chS]:\d+\b")
_TIMEOUT = 30.0


class Places:
    """Finds the source of places in modules."""

    def __init__(self, find: Find) -> None:
        """`find` is called for each module that the log names."""
        self._find = find
        self._known: dict[tuple[str, str, str], str] = {}

    def of(self, line: str) -> str:
        """The file and line, as "driver/main.c:42", of the first place in a line of the log; "" if it is unknown.

        The file's path is relative to the current folder if it is in there.
        """
        found = _PLACE.search(line)
        if found is None or _KNOWN.search(line):
            return ""
        function, offset, size, module = found.groups()
        # A stack has the addresses behind the calls; only the instruction pointer is an address itself.
        exact = "RIP:" in line or "WARNING:" in line or line.startswith("CPU ")  # the last: of `hang`
        key = (module, function, f"{max(int(offset, 16) - (not exact), 0):x}")
        if key not in self._known:
            path = self._find(module)
            self._known[key] = _place(path, function, int(key[2], 16), int(size, 16)) if path else ""
        return self._known[key]

    def in_text(self, text: str) -> str:
        """The text of a log, with file and line number in parentheses at the end of each line where they are known."""
        return "\n".join(f"{line} ({place})" if (place := self.of(line)) else line for line in text.split("\n"))


def _place(module: Path, function: str, offset: int, size: int) -> str:
    program = _addr2line()
    if program is None:
        return ""
    try:
        with reading_elf(), module.open("rb") as file:
            sections = list(_sections_of(ELFFile(file), function, size))
    except (OSError, ValueError):
        return ""
    for section, start in sections:
        line = [program, "-i", "-e", str(module), "-j", section, f"{start + offset:#x}"]
        try:
            said = subprocess.run(line, capture_output=True, text=True, timeout=patience(_TIMEOUT), check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return ""
        # The innermost of inlined functions comes first; often it is one of the kernel's headers.
        places = [text.partition(" (")[0] for text in said.splitlines() if not text.startswith("??")]
        own = [text for text in places if not Path(text).is_relative_to(cache_dir()) and text.startswith("/")]
        # The kernel's own modules have linux/FILE: their source before the headers that it uses.
        for text in own or sorted(places, key=lambda text: ".h:" in text):
            path, _, number = text.rpartition(":")
            path = os.path.normpath(path)  # a test names its driver as ../driver
            if number.isdecimal():
                here = Path.cwd()
                return f"{Path(path).relative_to(here) if Path(path).is_relative_to(here) else path}:{number}"
    return ""


def _sections_of(elf: Any, function: str, size: int) -> Iterator[tuple[str, int]]:
    """The (section, offset in it) of functions of this name.  The kernel counts the padding behind one to its size."""
    table = elf.get_section_by_name(".symtab")
    for symbol in table.get_symbol_by_name(function) or () if table else ():
        index = symbol["st_shndx"]
        if symbol["st_info"]["type"] == "STT_FUNC" and isinstance(index, int) and symbol["st_size"] <= size:
            yield elf.get_section(index).name, symbol["st_value"]


def _addr2line() -> str | None:
    parts = sorted(cache_dir().glob("gcc-*/usr/bin/x86_64-linux-gnu-addr2line"))
    return str(parts[-1]) if parts else shutil.which("addr2line")


def finder(known: dict[str, Path], folders: Iterable[Path], release: str) -> Find:
    """Finds a module among `known` files, else as NAME.ko in these folders, best in one that is called `release`."""

    def find(name: str) -> Path | None:
        if name in known:
            return known[name]
        found = [
            path
            for folder in folders
            for path in sorted(folder.rglob("*.ko"))
            if path.stem.replace("-", "_") == name and path.is_file()
        ]
        return next((path for path in found if path.parent.name == release), found[0] if found else None)

    return find
