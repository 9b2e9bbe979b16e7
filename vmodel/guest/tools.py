"""Debian's programs for guests, with the shared libraries that they need.  `scripts/get-qemu --tools` fetches them.

The cache's folder `tools/root` has Debian's layout: programs in usr/bin and usr/sbin, libraries in `LIBS` and folders
below.  In the guest, programs are in /bin and libraries in `LIBS`, where ld.so looks for them.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.segments import InterpSegment

from vmodel.guest.artifacts import FETCH_COMMAND, ArtifactError, cache_dir, read_stamp

#: Debian's packages, and the programs of each that guests may use.
TOOLS = {
    "nvme-cli": ("nvme",),
    "fio": ("fio",),
    "e2fsprogs": ("mkfs.ext4", "e2fsck"),
    "util-linux": ("fstrim", "blockdev"),
    "fdisk": ("sfdisk",),
}
LIBS = "usr/lib/x86_64-linux-gnu"
#: The dynamic loader's path, which each program names.
LOADER = "lib64/ld-linux-x86-64.so.2"


def find_tools() -> Path:
    """The root folder of the cache's tools.  ArtifactError: they are not in the cache."""
    part = cache_dir() / "tools"
    if not read_stamp(part):
        raise ArtifactError(f"no tools for guests found; run {FETCH_COMMAND} --tools")
    return part / "root"


def programs() -> list[str]:
    """The names of all tools, sorted."""
    return sorted(name for names in TOOLS.values() for name in names)


def program_files(root: Path, names: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """(path in the guest, path on the host) of programs and the libraries that they need.

    ArtifactError: a program or a library is missing.
    """
    libraries: dict[str, Path] = {}
    todo: list[tuple[str, Path]] = []
    for name in dict.fromkeys(names):
        path = next((found for place in ("bin", "sbin") if (found := root / "usr" / place / name).is_file()), None)
        if path is None:
            raise ArtifactError(f"there is no tool {name!r} for guests (tools are: {', '.join(programs())})")
        yield f"bin/{name}", path
        todo.append((name, path))
    while todo:
        whose, path = todo.pop()
        try:
            with path.open("rb") as file:
                wanted = needed(file)
        except ValueError as error:
            raise ArtifactError(str(error), file=path) from None
        for name in wanted:
            if name not in libraries:
                libraries[name] = _library(root, name, whose)
                todo.append((name, libraries[name]))
    for name, path in sorted(libraries.items()):
        yield (LOADER if name == Path(LOADER).name else f"{LIBS}/{name}"), path


def _library(root: Path, name: str, whose: str) -> Path:
    # Some are in a folder of their own, which their users' RUNPATH names.  In the guest all are in one folder.
    for path in (root / LIBS / name, *sorted((root / LIBS).glob(f"*/{name}"))):
        if path.is_file():
            return path
    missing = f"{whose} needs the library {name}, which is not among the tools"
    raise ArtifactError(f"{missing}; run {FETCH_COMMAND} --tools --refresh")


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


@contextlib.contextmanager
def reading_elf() -> Iterator[None]:
    """Turns every exception of pyelftools, for a file that is not ELF or damaged, into ValueError."""
    try:
        yield
    except ELFError as error:
        raise ValueError(f"not an ELF file: {error}") from None
    except Exception as error:
        # The list is open: pyelftools raises errors of struct, construct, Unicode and file offsets for damaged files.
        raise ValueError(f"a damaged ELF file: {type(error).__name__}: {error}") from None
