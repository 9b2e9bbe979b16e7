"""Kernel images made here: small ones, with the tables of symbols and types that kernels of several versions have.

Written from what Linux writes (scripts/kallsyms.c of each version, Documentation/bpf/btf.rst, arch/x86/boot.rst).
"""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import zstandard

TEXT = 0xFFFFFFFF81000000
RODATA = 0xFFFFFFFF82000000
DATA = 0xFFFFFFFF83800000
INIT_TEXT = 0xFFFFFFFF84000000

Symbol = tuple[int, str, str]


def some_symbols(percpu: bool) -> list[Symbol]:
    """Two symbols at one address, local and weak functions, a name of more than 127 bytes, data, per-CPU data."""
    found: list[Symbol] = [(n * 8, "A", f"cpu_variable_{n}") for n in range(40)] if percpu else []
    found += [(TEXT, "T", "_stext"), (TEXT, "T", "_text")]
    for n in range(550):
        found.append((TEXT + 16 * n, "t", f"__pfx_function_{n}"))
        found.append((TEXT + 16 * n + 8, "TtWw"[n % 4], f"function_{n}"))
    found.append((TEXT + 0x2600, "T", "Xq" * 120))
    found.append((TEXT + 0x3000, "T", "_etext"))
    found += [(RODATA + n, "rD"[n % 2], f"constant_{n}") for n in range(0, 400, 8)]
    found += [(DATA, "t", "no_code"), (INIT_TEXT + 4, "t", "start_it")]
    return found


# ---- kallsyms --------------------------------------------------------------------------------


def tokens() -> list[str]:
    """What each byte stands for: characters by themselves, and some longer ones."""
    longer = iter(["__pfx_", "function", "variable", *(f"{a}{b}" for a in "abcdefghijklmnop" for b in "aeioustrn_")])
    return [chr(n) if 0x20 < n < 0x7F else next(longer) for n in range(256)]


def encoded(text: str, table: Sequence[str]) -> bytes:
    """A name as its length and tokens, with the longest token at each place."""
    best: dict[str, int] = {token: n for n, token in enumerate(table)}
    found = bytearray()
    while text:
        size = next(size for size in range(8, 0, -1) if text[:size] in best)
        found.append(best[text[:size]])
        text = text[size:]
    size = len(found)
    return (bytes([size]) if size < 0x80 else bytes([size & 0x7F | 0x80, size >> 7])) + found


@dataclass(frozen=True)
class Version:
    """How a Linux writes the tables."""

    name: str
    offsets_last: bool = True
    align: int = 8
    sequences: bool = True
    offset: Callable[[int, int, int, str], int] = lambda address, place, base, kind: address - base & 0xFFFFFFFF
    percpu: bool = False
    before_6_4: bool = False


def _percpu_absolute(address: int, place: int, base: int, kind: str) -> int:
    return address if kind == "A" else base - 1 - address & 0xFFFFFFFF


def _place_relative(address: int, place: int, base: int, kind: str) -> int:
    return address - place & 0xFFFFFFFF


VERSIONS = (
    Version("7.3", align=4, offset=_place_relative),
    Version("6.15"),
    Version("6.12", offset=_percpu_absolute, percpu=True),
    Version("6.3", offsets_last=False, offset=_percpu_absolute, percpu=True, before_6_4=True),
    Version("6.1", offsets_last=False, sequences=False, offset=_percpu_absolute, percpu=True, before_6_4=True),
)


def tables(version: Version, symbols: Sequence[Symbol], address: int) -> bytes:
    """kallsyms' tables, to be put at this address."""
    out = bytearray()

    def align(to: int = version.align) -> None:
        out.extend(bytes(-(address + len(out)) % to))

    def offsets() -> None:
        base = next(at for at, kind, _ in symbols if kind != "A")
        align()
        for at, kind, _ in symbols:
            out.extend(struct.pack("<I", version.offset(at, address + len(out), base, kind)))
        if version.align == 8:
            align()
            out.extend(struct.pack("<Q", base))

    def sequences() -> None:
        align()
        by_name = sorted(range(len(symbols)), key=lambda n: symbols[n][2])
        for n in by_name if version.sequences else []:
            out.extend(n.to_bytes(3, "big"))

    table = tokens()
    names = [encoded(kind + name, table) for _, kind, name in symbols]
    if not version.offsets_last:
        offsets()
    align()
    out.extend(struct.pack("<I", len(symbols)))
    align()
    out.extend(b"".join(names))
    align()
    starts = list(accumulate(map(len, names), initial=0))
    out.extend(b"".join(struct.pack("<I", starts[n]) for n in range(0, len(names), 256)))
    if not version.offsets_last:
        sequences()
    align()
    out.extend(b"".join(token.encode() + b"\0" for token in table))
    align()
    out.extend(struct.pack("<256H", *accumulate((len(token) + 1 for token in table[:-1]), initial=0)))
    if version.offsets_last:
        offsets()
        sequences()
    return bytes(out)


# ---- types -----------------------------------------------------------------------------------


class Types:
    """A .BTF section while it is being made; the text of a name is stored once."""

    def __init__(self) -> None:
        self.strings = bytearray(b"\0")
        self.types = bytearray()

    def name(self, text: str) -> int:
        if (at := self.strings.find(b"\0%s\0" % text.encode())) >= 0:
            return at + 1
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text) - 1

    def structure(self, name: str, size: int, members: Mapping[str, int], flag: bool = False) -> None:
        self.types += struct.pack("<III", self.name(name), flag << 31 | 4 << 24 | len(members), size)
        for member, offset in members.items():
            self.types += struct.pack("<III", self.name(member), 1, offset * 8)

    def enumeration(self, name: str, values: Mapping[str, int]) -> None:
        self.types += struct.pack("<III", self.name(name), 6 << 24 | len(values), 4)
        for member, value in values.items():
            self.types += struct.pack("<Ii", self.name(member), value)

    def section(self) -> bytes:
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return header + self.types + self.strings


def types(before_6_4: bool) -> bytes:
    """Those that `struct module` is made of, with others before them that have the same names or members."""
    made = Types()
    made.structure("module_kobject", 96, {"mod": 64})
    made.structure("module", 8, {"name": 0})  # another type of the same name
    if before_6_4:
        made.structure("module_layout", 80, {"base": 0, "size": 8, "text_size": 12, "ro_size": 16})
        made.structure("module", 896, {"state": 0, "name": 24, "core_layout": 320, "init_layout": 400}, flag=True)
    else:
        kinds = ("TEXT", "DATA", "RODATA", "RO_AFTER_INIT", "INIT_TEXT", "INIT_DATA", "INIT_RODATA")
        made.enumeration("mod_mem_type", {f"MOD_{kind}": n for n, kind in enumerate(kinds)} | {"MOD_INVALID": -1})
        made.structure("module_memory", 72, {"base": 0, "is_rox": 8, "size": 12})
        made.structure("module", 1280, {"state": 0, "name": 24, "mem": 320}, flag=True)
    return made.section()


# ---- files -----------------------------------------------------------------------------------


#: What looks like a table of tokens.
DECOYS = b"0\0001\0002\0003\0004\0005\0006\0007\0008\0009\0" + b"text of the kernel\0" * 20


def rodata_of(version: Version, symbols: Sequence[Symbol]) -> bytes:
    """.rodata: other data, the tables, other data."""
    return DECOYS + tables(version, symbols, RODATA + len(DECOYS)) + bytes(100)


def vmlinux(version: Version, symbols: Sequence[Symbol]) -> bytes:
    """An ELF file with code, tables and types."""
    return elf_of(rodata_of(version, symbols), types(version.before_6_4))


def elf_of(rodata: bytes, btf: bytes) -> bytes:
    """An ELF file with these in .rodata and .BTF."""
    parts = [
        ("", 0, 0, 0, b""),
        (".text", 1, 6, TEXT, b"\x90" * 0x3000),
        (".rodata", 1, 3, RODATA, rodata),
        (".BTF", 1, 2, RODATA + 0x1000000, btf),
        (".data", 1, 7, DATA, bytes(64)),
        (".init.text", 1, 6, INIT_TEXT, b"\x90" * 64),
        (".bss", 8, 3, INIT_TEXT + 0x1000, bytes(1 << 20)),
    ]
    names = b"".join(name.encode() + b"\0" for name, *_ in parts) + b".shstrtab\0"
    parts.append((".shstrtab", 3, 0, 0, names))
    contents, headers = bytearray(64), bytearray()
    for name, kind, flags, address, data in parts:
        contents += bytes(-len(contents) % 64)
        at = names.find(name.encode() + b"\0")
        headers += struct.pack("<IIQQQQIIQQ", at, kind, flags, address, len(contents), len(data), 0, 0, 8, 0)
        contents += data if kind != 8 else b""
    contents[:24] = struct.pack("<16sHHI", b"\x7fELF\2\1\1", 2, 62, 1)
    contents[24:48] = struct.pack("<QQQ", TEXT, 0, len(contents))
    contents[48:64] = struct.pack("<IHHHHHH", 0, 64, 56, 0, 64, len(parts), len(parts) - 1)
    return bytes(contents + headers)


def _appended(compress: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """With the size behind it (scripts/Makefile.lib, size_append)."""
    return lambda data: compress(data) + struct.pack("<I", len(data))


def _xz(data: bytes) -> bytes:
    """As scripts/xz_wrap.sh: with the filter for x86 code."""
    filters = [{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 6}]
    return lzma.compress(data, check=lzma.CHECK_CRC32, filters=filters)


COMPRESSIONS = {"zstd": _appended(zstandard.compress), "xz": _appended(_xz), "gzip": gzip.compress}


def bzimage(payload: bytes) -> bytes:
    """A payload as the boot protocol has it."""
    setup, before = 3, 0x100
    head = bytearray(512 * (setup + 1))
    head[0x1F1] = setup
    head[0x1FE:0x206] = b"\x55\xaa\xeb\x66HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<II", head, 0x248, before, len(payload))
    return bytes(head) + bytes(before) + payload + bytes(64)
