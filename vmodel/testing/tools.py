"""Programs of Debian's for guests, with the shared libraries that they need. `scripts/get-qemu --tools` brings them.

Stdlib only, as artifacts.py. The cache's folder `tools/root` is laid out as in Debian: programs in usr/bin and
usr/sbin, libraries in `LIBS` and folders below. In the guest, programs are in /bin and libraries in `LIBS`, where its
ld.so looks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from vmodel.testing.artifacts import MEND, ArtifactError, cache_dir, read_stamp

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

_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ = 0, 1, 5, 10


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
            wanted = list(needed(path.read_bytes()))
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


def needed(elf: bytes) -> Iterator[str]:
    """The libraries that a program or library names as needed (DT_NEEDED).  ValueError: no ELF64, or a broken one."""
    try:
        if elf[:6] != b"\x7fELF\2\1":
            raise ValueError("not a little-endian ELF64 file")
        (table,) = struct.unpack_from("<Q", elf, 0x20)
        size, count = struct.unpack_from("<HH", elf, 0x36)
        # p_type p_flags p_offset p_vaddr p_paddr p_filesz
        segments = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
        for kind, _, offset, _, _, length in segments:
            if kind == _PT_DYNAMIC:
                tags = list(struct.iter_unpack("<QQ", elf[offset : offset + length]))
                yield from _names(elf, segments, tags)
    except struct.error as error:
        raise ValueError(f"a broken ELF file: {error}") from None


def _names(elf: bytes, segments: list[tuple[int, ...]], tags: list[tuple[int, int]]) -> Iterator[str]:
    end = next((i for i, (tag, _) in enumerate(tags) if tag == _DT_NULL), len(tags))
    values = dict(tags[:end])
    if _DT_STRTAB not in values or _DT_STRSZ not in values:
        raise ValueError("a broken ELF file: its dynamic section has no string table")
    at = values[_DT_STRTAB]
    # The table's address is that in memory; a segment says where in the file that is.
    start = next((o + at - a for kind, _, o, a, _, n in segments if kind == _PT_LOAD and a <= at < a + n), None)
    if start is None:
        raise ValueError("a broken ELF file: its string table is in no segment")
    strings = elf[start : start + values[_DT_STRSZ]]
    for tag, value in tags[:end]:
        if tag == _DT_NEEDED:
            yield strings[value:].partition(b"\0")[0].decode()
