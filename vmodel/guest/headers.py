"""What kernel modules are built with: a kernel's headers with kbuild, and the compiler that built the kernel.

Two kinds of parts of the cache, from Debian's packages, which are unpacked and not installed:

    headers-NAME/  usr/src/linux-headers-*/, usr/lib/linux-kbuild-*/; the stamp has RELEASE and the compiler's number;
                   of the debug kernel also modules/: its own modules with debug information
    gcc-14/        usr/: gcc, binutils and make with their libraries; other numbers for other kernels

Programs of both run on any host, as each is a script that starts the real one (`NAME.elf`) by the loader and the
libraries of the part `gcc-N`: Debian's need a newer C library than older hosts have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile

from vmodel.elf import reading_elf
from vmodel.guest.artifacts import DEBUG, FETCH_COMMAND, ArtifactError, Kernel, cache_dir, read_stamp
from vmodel.guest.debian import unpack
from vmodel.guest.tools import LIBS

#: Beside the compiler: make, and objtool's library.
_BESIDE = ("binutils", "make", "libelf1t64")
_TRIPLE = "x86_64-linux-gnu"
_BINUTILS = ("addr2line", "ar", "as", "ld", "ld.bfd", "nm", "objcopy", "objdump", "ranlib", "readelf", "strip")


@dataclass(frozen=True)
class Headers:
    """A kernel's headers: its release, the folder for `make -C`, and the programs that modules are built with."""

    release: str
    folder: Path
    programs: Path


def find_headers(kernel: Kernel) -> Headers:
    """The headers of exactly this kernel, with its compiler.  ArtifactError: the cache has not both."""
    for part in sorted(cache_dir().glob("headers-*")):
        stamp = read_stamp(part)
        if stamp.get("release") == kernel.release:
            compiler = cache_dir() / f"gcc-{stamp.get('compiler')}"
            if read_stamp(compiler):
                folder = part / "usr/src" / f"linux-headers-{kernel.release}"
                return Headers(kernel.release, folder, compiler / "usr/bin")
    raise ArtifactError(f"no headers of kernel {kernel.release} in the cache; run {FETCH_COMMAND} --headers")


def debug_modules(kernel: Kernel) -> list[Path]:
    """The folder of the kernel's own modules with debug information, which only the debug kernel has; else none."""
    part = cache_dir() / f"headers-{DEBUG}"
    return [part / "modules"] if read_stamp(part).get("release") == kernel.release else []


def gcc_packages(number: str) -> list[str]:
    """Debian's packages of the compiler with this number, and of what is needed beside it."""
    return [f"gcc-{number}", *_BESIDE]


def unpack_gcc(debs: Sequence[Path], folder: Path, target: Path, number: str) -> None:
    """Unpacks a compiler with binutils and make into `folder`, which is to become `target`.

    ArtifactError: the packages lack one of the programs.
    """
    programs = {f"{_TRIPLE}-{name}" for name in (*_BINUTILS, f"gcc-{number}", f"cpp-{number}")}
    home = f"usr/libexec/gcc/{_TRIPLE}/{number}"
    wanted = {f"usr/bin/{name}" for name in programs} | {"usr/bin/make"}
    wanted |= {f"{home}/{name}" for name in ("cc1", "collect2", "lto-wrapper", "liblto_plugin.so")}
    folders = (f"{LIBS}/", f"usr/lib/gcc/{_TRIPLE}/{number}/include/")

    def place(name: str) -> str | None:
        return name if name in wanted or name.startswith(folders) else None

    for deb in debs:
        unpack(deb, folder, place)
    for name in sorted(wanted):
        if not (folder / name).exists():
            raise ArtifactError(f"the packages of gcc-{number} have no {name}: their layout changed")
    run_by_loader(folder, target, target)


def unpack_headers(debs: Sequence[Path], folder: Path, target: Path, release: str, compiler: Path) -> None:
    """Unpacks a kernel's headers with kbuild into `folder`, which is to become `target`; `compiler`: its part.

    ArtifactError: the packages lack something.
    """
    for deb in debs:
        unpack(deb, folder, lambda name: name if name.startswith(("usr/src/", "usr/lib/linux-kbuild-")) else None)
    makefile = folder / "usr/src" / f"linux-headers-{release}" / "Makefile"
    if not makefile.is_file():
        raise ArtifactError(f"the packages of the headers of {release} have no Makefile: their layout changed")
    makefile.write_text(makefile.read_text().replace("/usr/src/", f"{target}/usr/src/"))
    run_by_loader(folder, target, compiler)


def run_by_loader(folder: Path, target: Path, libraries: Path) -> None:
    """Makes each program below `folder` a script that runs it with the loader and libraries of the part `libraries`.

    `target`: what `folder` will be called.
    """
    loader = libraries / LIBS / "ld-linux-x86-64.so.2"
    for program in _programs(folder):
        real = program.with_name(f"{program.name}.elf")
        program.rename(real)
        # --argv0: gcc finds cc1, and kbuild's wrappers find what they wrap, from their own path.
        program.write_text(
            f"""#!/bin/sh
unset LD_PRELOAD LD_LIBRARY_PATH
exec "{loader}" --argv0 "$0" --library-path "{libraries / LIBS}" "{target / real.relative_to(folder)}" "$@"
"""
        )
        program.chmod(0o755)


def _programs(folder: Path) -> Iterable[Path]:
    for path in sorted(folder.rglob("*")):
        # Some libraries can be run, too, such as libc.so.6.
        if ".so" not in path.suffixes and path.is_file() and not path.is_symlink() and _has_loader(path):
            yield path


def _has_loader(path: Path) -> bool:
    with path.open("rb") as file:
        if file.read(4) != b"\x7fELF":
            return False
        with reading_elf():
            return any(segment["p_type"] == "PT_INTERP" for segment in ELFFile(file).iter_segments())
