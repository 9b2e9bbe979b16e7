"""A guest kernel's image, a bzImage as Linux's Documentation/arch/x86/boot.rst has it: its code, symbols and types.

All of it is in the image, however stripped: the kernel needs its symbols for /proc/kallsyms, and its types for BPF.
"""

from __future__ import annotations

import functools
import io
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile

from vmodel.compressed import decompress, format_of
from vmodel.coverage.btf import Btf
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.kallsyms import Symbols, read_symbols
from vmodel.coverage.module_layout import ModuleLayout
from vmodel.elf import reading_elf
from vmodel.files import pieces
from vmodel.span import Span

#: Bytes of an image, and of what is in it; Debian's has 62 MiB.
_MOST = 512 << 20
_MOST_SECTIONS = 1000
#: Sections that are read, and what is in them.
_NEEDED = {
    ".text": "code (.text)",
    ".rodata": "symbols (.rodata)",
    ".BTF": "types (.BTF): its option CONFIG_DEBUG_INFO_BTF is off",
}
#: Flags of a section of code.  Linux 7.3 has a writable .data with SHF_EXECINSTR.
_CODE = SH_FLAGS.SHF_ALLOC | SH_FLAGS.SHF_EXECINSTR
_CODE_FLAGS = _CODE | SH_FLAGS.SHF_WRITE


@dataclass(frozen=True)
class KernelImage:
    """A kernel's image at `path`: its `symbols` at their link addresses, and where its `struct module` has what.

    `modified` (ns) and `size` (bytes) are the file's when it was read.
    """

    path: Path
    modified: int
    size: int
    symbols: Symbols
    module_layout: ModuleLayout

    @classmethod
    def load(cls, image: Path) -> KernelImage:
        """Reads an image: a bzImage, or a vmlinux that has not been compressed.  One that has not changed is kept.

        CoverageError: it cannot be read, is damaged, is no 64-bit x86 kernel, or has no symbols or types.
        """
        try:
            state = image.stat()
        except OSError as error:
            raise CoverageError(f"cannot be read: {error.strerror}", file=image) from None
        return _load(image.absolute(), state.st_mtime_ns, state.st_size)

    @property
    def elf(self) -> bytes:
        """The vmlinux, an ELF file of some 60 MB, decompressed at each use.  CoverageError: it has changed since."""
        elf = _vmlinux(self.path)
        state = self.path.stat()
        if (state.st_mtime_ns, state.st_size) != (self.modified, self.size):
            raise CoverageError("has changed since it was read", file=self.path)
        return elf


@dataclass(frozen=True)
class _Section:
    flags: int
    address: int
    offset: int
    size: int
    in_file: bool

    def of(self, elf: bytes) -> bytes:
        return elf[self.offset : self.offset + self.size] if self.in_file else b""


@functools.lru_cache(maxsize=4)
def _load(path: Path, modified: int, size: int) -> KernelImage:
    elf = _vmlinux(path)
    try:
        sections = _sections(elf)
        for name, what in _NEEDED.items():
            if name not in sections:
                raise ValueError(f"the kernel has no {what}")
        code = sorted(
            Span.sized(section.address, section.size)
            for section in sections.values()
            if section.flags & _CODE_FLAGS == _CODE and section.in_file and section.size
        )
        rodata = sections[".rodata"]
        symbols = read_symbols(rodata.of(elf), rodata.address, sections[".text"].address, code)
        layout = ModuleLayout.of_btf(Btf(sections[".BTF"].of(elf)))
    except ValueError as error:
        raise CoverageError(str(error), file=path) from None
    except (struct.error, IndexError):
        raise CoverageError("is damaged: a table in it ends early", file=path) from None
    return KernelImage(path, modified, size, symbols, layout)


def _vmlinux(path: Path) -> bytes:
    """The ELF file in an image."""
    try:
        data = b"".join(pieces(path, _MOST))
    except OSError as error:
        raise CoverageError(f"cannot be read: {error.strerror}", file=path) from None
    try:
        return data if data.startswith(b"\x7fELF") else _payload(data)
    except ValueError as error:
        raise CoverageError(str(error), file=path) from None


def _payload(image: bytes) -> bytes:
    """The decompressed payload of a bzImage."""
    if len(image) < 0x268 or image[0x1FE:0x200] != b"\x55\xaa" or image[0x202:0x206] != b"HdrS":
        raise ValueError("is no kernel image (bzImage)")
    (version,) = struct.unpack_from("<H", image, 0x206)
    if version < 0x208:
        raise ValueError(f"is of boot protocol {version >> 8}.{version & 0xFF:02}, older than Linux 2.6.24")
    start, length = struct.unpack_from("<II", image, 0x248)
    start += ((image[0x1F1] or 4) + 1) * 512
    payload = image[start : start + length]
    if len(payload) != length or length < 16:
        raise ValueError("is damaged: it ends before its payload does")
    (size,) = struct.unpack_from("<I", payload, length - 4)
    # gzip's own last bytes are the size; behind others it is appended.
    elf = decompress(payload if format_of(payload) == "gzip" else payload[:-4], _MOST)
    if len(elf) != size:
        raise ValueError("is damaged: its payload has not the size that it says")
    return elf


def _sections(elf: bytes) -> dict[str, _Section]:
    """The sections of a vmlinux by name."""
    with reading_elf():
        file: Any = ELFFile(io.BytesIO(elf))
        if (file.elfclass, file.little_endian, file["e_machine"]) != (64, True, "EM_X86_64"):
            raise ELFError("of another machine than x86-64")
        if file.num_sections() > _MOST_SECTIONS:
            raise ELFError("it has too many sections")
        found = {}
        for section in file.iter_sections():
            in_file = section["sh_type"] != "SHT_NOBITS"
            part = _Section(section["sh_flags"], section["sh_addr"], section["sh_offset"], section["sh_size"], in_file)
            if in_file and part.offset + part.size > len(elf):
                raise ELFError(f"the section {section.name!r} goes on behind its end")
            found[section.name] = part
        return found
