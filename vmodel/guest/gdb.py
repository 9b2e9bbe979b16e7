"""gdb for a guest's kernel and modules, by QEMU's stub on a unix socket.

A driver's probe runs while its module is loaded, before anybody knows the module's address.  So modules are loaded
while PCI devices are not bound; the guest reports the addresses and waits; once gdb has attached and continued, devices
are bound.  The kernel is at its link address (nokaslr), so addresses are the same in each boot.
"""

from __future__ import annotations

import io
import re
import shlex
import struct
from collections.abc import Mapping
from pathlib import Path

from elftools.elf.elffile import ELFFile

from vmodel.elf import reading_elf
from vmodel.guest.artifacts import Kernel
from vmodel.guest.modules import load_module

#: What /init writes to the harness's port last, see initramfs.py; before that, lines "section MODULE SECTION ADDRESS".
READY = b"\ngdb\n"
_REPORT = re.compile(rb"^section (\w+) (\S+) (0x[0-9a-f]+)\n", re.MULTILINE)
#: Sections whose addresses gdb gets: it puts the others at addresses of its own.
_SECTIONS = re.compile(r"\.(text|data|bss|rodata|exit\.text|init\.text)(\.|$)")
#: The offset of sh_addr in the header of a section (ELF-64, figure 8), and its type.
_ADDRESS_AT, _ADDRESS = 0x10, struct.Struct("<Q")


class Gdb:
    """gdb's side of one guest: the socket, copies of modules, and a script that attaches, all in one folder."""

    def __init__(self, folder: Path, kernel: Kernel, modules: Mapping[str, Path]) -> None:
        """`modules`: files of modules by name, those that gdb gets symbols of once they are loaded."""
        self._folder = folder
        self._socket = folder / "gdb.sock"
        self._kernel = kernel
        self._modules = modules

    def qemu_args(self) -> list[str]:
        """QEMU's arguments for a stub that listens on the socket."""
        return ["-chardev", f"socket,id=gdb,path={self._socket},server=on,wait=off", "-gdb", "chardev:gdb"]

    def prepare(self, report: bytes) -> tuple[str, str]:
        """Writes the script, from what /init has reported.  Returns the line that starts gdb, and the script's text.

        ArtifactError: a module's file cannot be read.  OSError: the script cannot be written.
        """
        script = self._folder / "attach.gdb"
        commands = self._commands(_sections(report))
        script.write_text(commands, errors="surrogateescape")
        return shlex.join(("gdb", "-q", "-x", str(script))), commands

    def _commands(self, found: Mapping[str, Mapping[str, int]]) -> str:
        # A guest on a busy machine may need longer for an answer than gdb's 2 s.
        lines = ["set confirm off", "set remotetimeout 60", "set architecture i386:x86-64"]
        image = self._kernel.image.resolve()
        built = [folder / "vmlinux" for folder in (image.parent, *image.parents[3:4])]  # arch/x86/boot/bzImage
        lines += [f"file {shlex.quote(str(path))}" for path in built if path.is_file()][:1]
        lines.append(f"target remote {self._socket}")
        for name, path in self._modules.items():
            there = {section: at for section, at in found.get(name, {}).items() if _SECTIONS.match(section)}
            text = there.pop(".text", None)
            if text is not None:
                copy = self._folder / f"{name}.ko"
                copy.write_bytes(without_addresses(load_module(path)))
                others = "".join(f" -s {section} {at:#x}" for section, at in sorted(there.items()))
                lines.append(f"add-symbol-file {shlex.quote(str(copy))} {text:#x}{others}")
        return "\n".join(lines) + "\n"


def without_addresses(module: bytes) -> bytes:
    """A module's ELF file with all its sections at address 0.

    gdb gives debug information the addresses of `add-symbol-file` only then (default_symfile_offsets in its symfile.c);
    else it takes all functions for ones of .text.  Some versions of Linux link modules with .data elsewhere.
    """
    found = bytearray(module)
    with reading_elf():
        elf = ELFFile(io.BytesIO(module))
        start, size = elf["e_shoff"], elf["e_shentsize"]
        for index in range(elf.num_sections()):
            _ADDRESS.pack_into(found, start + index * size + _ADDRESS_AT, 0)
    return bytes(found)


def _sections(report: bytes) -> dict[str, dict[str, int]]:
    """The addresses of sections by module."""
    found: dict[str, dict[str, int]] = {}
    for name, section, address in _REPORT.findall(report):
        found.setdefault(name.decode(), {})[section.decode(errors="replace")] = int(address, 16)
    return found
