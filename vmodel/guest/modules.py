"""Kernel modules for a guest: which files, in which order they are loaded, and what they depend on.

A module is the kernel's own, by its name; a file, by its path; or all modules of a source folder, which are built when
they are needed (kbuild.py).
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from elftools.elf.elffile import ELFFile

from vmodel.compressed import decompress
from vmodel.elf import reading_elf
from vmodel.files import pieces
from vmodel.guest.artifacts import ArtifactError, Kernel
from vmodel.guest.kbuild import OUTPUT, build

log = logging.getLogger("vmodel.guest")
#: Bytes of a module: amdgpu with debug information has some 500 MB.
_LARGEST = 1 << 30


@dataclass(frozen=True)
class Module:
    """A module: its name, its ELF file, and the names of the modules that have to be loaded before it."""

    name: str
    elf: bytes
    needs: tuple[str, ...]


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def load_module(path: Path) -> bytes:
    """A module's ELF file, decompressed according to its suffix.  ArtifactError: it cannot be read or decompressed."""
    if path.suffix not in (".ko", ".xz", ".gz", ".zst"):
        raise ArtifactError(f"unknown compression {path.suffix}", file=path)
    try:
        data = b"".join(pieces(path, _LARGEST))
        return data if path.suffix == ".ko" else decompress(data, _LARGEST)
    except OSError as error:
        raise ArtifactError(f"cannot be read: {error.strerror}", file=path) from None
    except ValueError as error:
        raise ArtifactError(str(error), file=path) from None


def modinfo(elf: bytes) -> Iterator[tuple[str, str]]:
    """The strings of a module's .modinfo section, as (key, value).  ValueError: it is not an ELF file."""
    with reading_elf():
        section: Any = ELFFile(io.BytesIO(elf)).get_section_by_name(".modinfo")
        data = b"" if section is None else section.data()
    for entry in data.split(b"\0"):
        key, equals, value = entry.decode("utf-8", "replace").partition("=")
        if equals:
            yield key, value


def _needs(elf: bytes) -> tuple[list[str], list[str]]:
    """The modules that must be loaded before this one, and those that should be if they exist."""
    hard: list[str] = []
    soft: list[str] = []
    for key, value in modinfo(elf):
        if key == "depends":
            hard += [name.replace("-", "_") for name in value.split(",") if name]
        elif key == "softdep" and (before := re.match(r"\s*pre:((?:\s+[\w-]+(?!:)\b)*)", value)):
            soft += before[1].replace("-", "_").split()
    return hard, soft


def is_path(entry: str) -> bool:
    """Whether a module is given by a path, which has a / in it or ends in .ko, and not by its name."""
    return "/" in entry or entry.endswith(".ko")


def is_source(entry: str) -> bool:
    """Whether this is the path of a source folder."""
    return is_path(entry) and (entry.endswith("/") or Path(entry).is_dir())


def files_of(entries: Iterable[str], kernel: Kernel) -> dict[str, Path | None]:
    """The modules that are meant: {name: its file, None for one of the kernel's own}.

    The modules of a source folder are built for the kernel first, in ./build.  In a path, {release} stands for the
    kernel's release.  BuildError, ArtifactError.
    """
    found: dict[str, Path | None] = {}
    for entry in (text.replace("{release}", kernel.release) for text in entries):
        if not is_path(entry):
            found.setdefault(entry.replace("-", "_"), None)
        elif is_source(entry):
            found |= {_module_name(path): path for path in build(Path(entry), kernel, OUTPUT, log.warning).modules}
        else:
            found[_module_name(Path(entry))] = Path(entry)
    return found


def built(entries: Iterable[str], kernel: Kernel) -> tuple[list[str], dict[str, Path]]:
    """The same modules with files in place of source folders, and the files by name.  BuildError, ArtifactError."""
    found = files_of(entries, kernel)
    own = {name: path.absolute() for name, path in found.items() if path is not None}
    return [str(own.get(name, name)) for name in found], own


def in_order(kernel: Kernel, wanted: Mapping[str, Path | None]) -> list[Module]:
    """These modules (see `files_of`) and all that they depend on, dependencies first; built-in ones are left out.

    What a module depends on is read from the module itself: Debian's packages have no modules.dep, so depmod is not
    needed.  ArtifactError: the kernel has no such module, or a file was built for another kernel.
    """
    index = _index(kernel)
    own = {name: path for name, path in wanted.items() if path}
    inside = builtin(kernel) - own.keys()
    done: dict[str, Module] = {}
    under_way: list[str] = []

    def visit(name: str) -> None:
        if name in done or name in inside:
            return
        if name in under_way:
            raise ArtifactError(f"modules depend on each other: {' > '.join([*under_way, name])}")
        path = own.get(name) or index.get(name)
        if path is None:
            needed = f" (needed by {under_way[-1]})" if under_way else ""
            beside = "" if kernel.modules else f": it has none beside {kernel.image}"
            raise ArtifactError(f"kernel {kernel.release} has no module {name!r}{needed}{beside}")
        elf = load_module(path)
        try:
            if name in own:
                _check_release(elf, path, kernel)
            hard, soft = _needs(elf)
        except ValueError as error:
            raise ArtifactError(str(error), file=path) from None
        under_way.append(name)
        for need in hard:
            visit(need)
        for need in soft:  # it may be the name of an algorithm instead of a module, and loops are allowed here
            if (need in index or need in own) and need not in under_way:
                visit(need)
        under_way.pop()
        done[name] = Module(name, elf, tuple(need for need in hard if need not in inside))

    for name in wanted:
        visit(name)
    return list(done.values())


def has_module(kernel: Kernel, name: str) -> bool:
    """Whether the kernel has a module of this name, built in or as a file."""
    return name in builtin(kernel) or find_module(kernel, name) is not None


def find_module(kernel: Kernel, name: str) -> Path | None:
    """The file of the kernel's module of this name; None: it has none, or it is built in."""
    return _index(kernel).get(name)


def _index(kernel: Kernel) -> Mapping[str, Path]:
    """The files of the kernel's modules by name."""
    folder = kernel.modules
    return _files_by_name(folder, folder.stat().st_mtime_ns) if folder is not None and folder.is_dir() else {}


@lru_cache(maxsize=8)
def _files_by_name(folder: Path, _: int) -> Mapping[str, Path]:
    """Some thousand files take 0.1 s; `_`: when the folder was changed."""
    return {_module_name(path): path for path in folder.rglob("*.ko*")}


def builtin(kernel: Kernel) -> set[str]:
    """The names of the modules that are built into the kernel."""
    file = kernel.modules / "modules.builtin" if kernel.modules else None
    return {_module_name(Path(line)) for line in file.read_text().split()} if file and file.is_file() else set()


def _check_release(elf: bytes, path: Path, kernel: Kernel) -> None:
    release = dict(modinfo(elf)).get("vermagic", "unknown").split(" ")[0]
    if release != kernel.release:
        raise ArtifactError(
            f"was built for kernel {release}, but the guest's is {kernel.release}; build it for that one (vmodel build"
            " DIR --kernel NAME), or give the folder of its source",
            file=path,
        )
