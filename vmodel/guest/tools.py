"""Debian's programs for guests.  `scripts/get-qemu --tool PACKAGE` fetches a package, and so do commands with `--tool`.

The cache's folder `tool-PACKAGE/root` has Debian's layout, with what the package's programs need (programs.py) and no
more.  In the guest, files have the same paths; /bin has links to the programs that the guest was asked for.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, BinaryIO

from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import InterpSegment

from vmodel.elf import reading_elf
from vmodel.errors import ConfigError
from vmodel.guest.artifacts import FETCH_COMMAND, ArtifactError, cache_dir, read_stamp

LIBS = "usr/lib/x86_64-linux-gnu"
#: The dynamic loader's path, which each program names.
LOADER = "lib64/ld-linux-x86-64.so.2"
#: Folders of programs, the first ones first.
PROGRAMS = ("usr/bin/", "usr/sbin/", "usr/games/")
#: Beside the root folder: all files, and for each program their numbers in this list, the program's own first.
MANIFEST = "manifest.json"
#: A package's name.  No other text becomes an argument of apt, or a folder's name.
PACKAGE_NAME = re.compile(r"[a-z0-9][a-z0-9+.-]+")
_PROGRAM_NAME = re.compile(r"[\w+@][\w.+@-]*", re.ASCII)
_SHEBANG = re.compile(rb"#![ \t]*(/\S+)(?:[ \t]+(\S+))?")


def tool(text: str) -> tuple[str, str]:
    """(package, program) of "PACKAGE:PROGRAM".  ConfigError: it has another form."""
    package, colon, program = text.partition(":")
    if not colon or not PACKAGE_NAME.fullmatch(package) or not _PROGRAM_NAME.fullmatch(program):
        parts = sorted(path.name for path in cache_dir().glob("tool-*"))
        known = [name.removeprefix("tool-") for name in parts if text in _programs(cache_dir() / name)]
        raise ConfigError(
            f"{text!r}: must be PACKAGE:PROGRAM, as {known[0] if known else 'pciutils'}:{text if known else 'lspci'}"
        )
    return package, program


def find_tool(package: str) -> Path:
    """The part of a package in the cache.  ArtifactError: it is not in there."""
    part = cache_dir() / f"tool-{package}"
    if not read_stamp(part):
        raise ArtifactError(f"no programs of the package {package!r} found; run {FETCH_COMMAND} --tool {package}")
    return part


def _programs(part: Path) -> dict[str, list[str]]:
    """The files of each program in a part, the program's own first."""
    try:
        manifest = json.loads((part / MANIFEST).read_text())
        return {name: [manifest["files"][n] for n in files] for name, files in manifest["programs"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        raise ArtifactError(f"{part} is damaged; remove it") from None


def tool_files(tools: Iterable[str]) -> dict[str, Path]:
    """{path in the guest: file on the host} of programs, as "PACKAGE:PROGRAM", and of what they need.

    Programs are at their own paths.  Of files that several packages have, the first package's is taken.
    ConfigError: a text has another form.  ArtifactError: a package or a program is missing.
    """
    found: dict[str, Path] = {}
    for text in dict.fromkeys(tools):
        part = find_tool(tool(text)[0])
        for path in _files_of(part, *tool(text)):
            found.setdefault(LOADER if Path(path).name == Path(LOADER).name else path, part / "root" / path)
    return found


def program_path(text: str) -> str:
    """The path of a program, "PACKAGE:PROGRAM", in the guest.  ConfigError, ArtifactError: as for `tool_files`."""
    return _files_of(find_tool(tool(text)[0]), *tool(text))[0]


def _files_of(part: Path, package: str, program: str) -> list[str]:
    programs = _programs(part)
    if program not in programs:
        close = nearest(program, programs)
        what = f"did you mean {package}:{close}? It" if close else "it"
        raise ArtifactError(
            f"the package {package!r} has no program {program!r}: {what} has {', '.join(sorted(programs))}"
        )
    return programs[program]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """As `vmodel.mistakes.guess`, which needs pydantic: what fetches QEMU must not."""
    return next(iter(difflib.get_close_matches(word, known, 1)), None)


def interpreter(program: Path) -> str:
    """The path of the interpreter of a script, for `env NAME` that name; "" for other files."""
    with program.open("rb") as file:
        found = _SHEBANG.match(file.read(256))
    if found is None:
        return ""
    path, word = (part.decode(errors="replace") if part else "" for part in found.groups())
    return word if Path(path).name == "env" and word else path


def needed(program: BinaryIO) -> list[str]:
    """The libraries that an ELF file needs (DT_NEEDED), in the file's order; [] for a static program.

    ValueError: it is not an ELF file, or a damaged one.
    """
    with reading_elf():
        elf = ELFFile(program)
        dynamic = [segment for segment in elf.iter_segments() if isinstance(segment, DynamicSegment)]
        tags: list[Any] = [tag for segment in dynamic for tag in segment.iter_tags("DT_NEEDED")]
        return [str(tag.needed) for tag in tags]


def missing(data: bytes, there: Collection[str]) -> str:
    """What a program needs that is not among the guest's files: "the loader PATH", "the library NAME"; "" if nothing.

    A library may be in any folder, as the program's own paths and $LD_LIBRARY_PATH may name it.  `there`: paths without
    a leading slash.  A file that is not ELF, or a damaged one, needs nothing.
    """
    if not data.startswith(b"\x7fELF"):
        return ""
    with contextlib.suppress(ValueError), reading_elf():
        elf = ELFFile(io.BytesIO(data))
        if loaders := [part.get_interp_name() for part in elf.iter_segments() if isinstance(part, InterpSegment)]:
            if loaders[0].lstrip("/") not in there:
                return f"the loader {loaders[0]}"
            names = {path.rpartition("/")[2] for path in there}
            for name in needed(io.BytesIO(data)):
                if name not in names:
                    return f"the library {name}"
    return ""
