"""Programs of Debian's for guests, with the shared libraries that they need. `scripts/get-qemu --tools` brings them.

The cache's folder `tools/root` is laid out as in Debian: programs in usr/bin and
usr/sbin, libraries in `LIBS` and folders below. In the guest, programs are in /bin and libraries in `LIBS`, where its
ld.so looks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from elftools.common.exceptions import ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile

from vmodel.guest.artifacts import MEND, ArtifactError, cache_dir, read_stamp

#: Debian's packages, and the programs of each that guests may have.
TOOLS = {
    "nvme-cli": ("nvme",),
    "fio": ("fio",),
    "e2fsprogs": ("mkfs.ext4", "e2fsck"),
    "util-linux": ("fstrim", "blockdev"),
    "fdisk": ("sfdisk",),
}
LIBS = "usr/lib/x86_64-linux-gnu"
#: The loader's path, which is in each program.
LOADER = "lib64/ld-linux-x86-64.so.2"


def find_tools() -> Path:
    """The root folder of the cache's tools.  ArtifactError without."""
    part = cache_dir() / "tools"
    if not read_stamp(part):
        raise ArtifactError(f"no tools for guests found; run {MEND} --tools")
    return part / "root"


def programs() -> list[str]:
    """The names of all tools, sorted."""
    return sorted(name for names in TOOLS.values() for name in names)


def program_files(root: Path, names: Iterable[str]) -> Iterator[tuple[str, Path]]:
    """(path in the guest, path here) of programs and all libraries that they need.  ArtifactError: one is missing."""
    libraries: dict[str, Path] = {}
    todo: list[tuple[str, Path]] = []
    for name in dict.fromkeys(names):
        path = next((found for place in ("bin", "sbin") if (found := root / "usr" / place / name).is_file()), None)
        if path is None:
            raise ArtifactError(f"there is no tool {name!r} for guests (there are: {', '.join(programs())})")
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
    # Some are in a folder of their package's own, which the user's RUNPATH names: here all become neighbours.
    for path in (root / LIBS / name, *sorted((root / LIBS).glob(f"*/{name}"))):
        if path.is_file():
            return path
    raise ArtifactError(f"{whose} needs the library {name}, which is not among the tools; run {MEND} --tools --refresh")


def needed(program: BinaryIO) -> list[str]:
    """The libraries that an ELF file names as needed (DT_NEEDED), in its order; none for a static one.

    ValueError: it is no ELF file, or a broken one.
    """
    with reading_elf():
        elf = ELFFile(program)
        dynamic = [segment for segment in elf.iter_segments() if isinstance(segment, DynamicSegment)]
        tags: list[Any] = [tag for segment in dynamic for tag in segment.iter_tags("DT_NEEDED")]
        return [str(tag.needed) for tag in tags]


@contextlib.contextmanager
def reading_elf() -> Iterator[None]:
    """While pyelftools reads a file: whatever it makes of one that is none, or broken, is a ValueError."""
    try:
        yield
    except ELFError as error:
        raise ValueError(f"not an ELF file: {error}") from None
    except Exception as error:
        # What pyelftools makes of a broken file is no closed list: errors of struct, construct, Unicode, file offsets.
        raise ValueError(f"a broken ELF file: {type(error).__name__}: {error}") from None
