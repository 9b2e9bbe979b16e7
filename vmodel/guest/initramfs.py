"""An initramfs for a guest: busybox, kernel modules in load order, files, and /init.

Format: cpio "newc", uncompressed (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst).
Unpacking a few MiB costs a guest less than decompressing them.
"""

from __future__ import annotations

import gzip
import io
import lzma
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from elftools.elf.elffile import ELFFile

from vmodel.errors import ConfigError
from vmodel.guest.artifacts import ArtifactError, Kernel
from vmodel.guest.tools import find_tools, program_files, reading_elf

#: Commands that /init needs before `busybox --install` has created the others.
_APPLETS = ("sh", "mount")


class Cpio:
    """Builds a cpio archive.  Paths are the guest's, with or without a leading slash.

    ConfigError, of all methods: a path is used twice, contains "..", or does not fit the format.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._folders: set[str] = set()
        self._others: set[str] = set()

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Adds a regular file, and its folders."""
        self._add(path, stat.S_IFREG | mode, data)

    def folder(self, path: str) -> None:
        """Adds a folder, unless it exists."""
        self._parents(self._clean(path) + "/x")

    def link(self, path: str, target: str) -> None:
        """Adds a symbolic link to `target`."""
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def node(self, path: str, major: int, minor: int) -> None:
        """Adds a character device."""
        self._add(path, stat.S_IFCHR | 0o600, b"", (major, minor))

    def finish(self) -> bytes:
        """Ends the archive, and returns it."""
        self._entry("TRAILER!!!", 0, b"", (0, 0))
        return b"".join(self._parts)

    def _clean(self, path: str) -> str:
        name = str(PurePosixPath(path.lstrip("/")))
        # The kernel silently skips an entry whose name is longer than PATH_MAX.
        if name == "." or ".." in name.split("/") or "\0" in name or len(name.encode()) > 4095:
            raise ConfigError(f"{path[:80]!r} cannot be the path of a file in the guest")
        return name

    def _add(self, path: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        name = self._clean(path)
        if name in self._others or name in self._folders:
            raise ConfigError(f"/{name} would be in the guest twice")
        if len(data) >= 1 << 32:
            raise ConfigError(f"/{name} is too large for an initramfs: {len(data)} bytes")
        self._parents(name)
        self._others.add(name)
        self._entry(name, mode, data, device)

    def _parents(self, name: str) -> None:
        for parent in reversed(PurePosixPath(name).parents[:-1]):
            folder = str(parent)
            if folder in self._others:
                raise ConfigError(f"/{folder} would be a file and a folder in the guest")
            if folder not in self._folders:
                self._folders.add(folder)
                self._entry(folder, stat.S_IFDIR | 0o755, b"", (0, 0))

    def _entry(self, name: str, mode: int, data: bytes, device: tuple[int, int]) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        # c_ino c_mode c_uid c_gid c_nlink c_mtime c_filesize c_maj c_min c_rmaj c_rmin c_namesize c_chksum
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % value for value in fields) + encoded
        for part in (head, data):
            self._parts.append(part + bytes(-len(part) % 4))


# ---- kernel modules ----------------------------------------------------------------------------------


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _zstd(data: bytes) -> bytes:
    if not shutil.which("zstd"):
        raise ArtifactError("modules of this kernel are compressed with zstd: install the program zstd")
    return subprocess.run(["zstd", "-dcq"], input=data, capture_output=True, check=True, timeout=60).stdout


_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".ko": bytes,
    ".xz": lzma.decompress,
    ".gz": gzip.decompress,
    ".zst": _zstd,
}


def load_module(path: Path) -> bytes:
    """A module's ELF file, decompressed according to its suffix.  ArtifactError: it cannot be read or decompressed."""
    try:
        return _DECOMPRESS[path.suffix](path.read_bytes())
    except KeyError:
        raise ArtifactError(f"unknown compression {path.suffix}", file=path) from None
    except (OSError, EOFError, lzma.LZMAError, subprocess.SubprocessError) as error:
        raise ArtifactError(f"cannot be read: {error}", file=path) from None


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
            hard += [name for name in value.split(",") if name]
        elif key == "softdep" and (before := re.match(r"\s*pre:((?:\s+[\w-]+(?!:)\b)*)", value)):
            soft += before[1].split()
    return hard, soft


def modules_in_order(kernel: Kernel, names: Iterable[str]) -> list[tuple[str, bytes]]:
    """(name, ELF) of modules and their dependencies, dependencies first; without modules that are built in.

    Dependencies are read from the modules themselves, as Debian's packages have no modules.dep.  ArtifactError: the
    kernel has no module of this name.
    """
    return [(name, elf) for name, elf, _ in _ordered(kernel, names)]


def _ordered(kernel: Kernel, names: Iterable[str]) -> list[tuple[str, bytes, list[str]]]:
    wanted = list(names)
    if not wanted:
        return []
    if kernel.modules is None:
        raise ArtifactError(f"kernel {kernel.release} has no modules beside {kernel.image}")
    index = {_module_name(path): path for path in kernel.modules.rglob("*.ko*")}
    builtin_file = kernel.modules / "modules.builtin"
    builtin = {_module_name(Path(line)) for line in builtin_file.read_text().split()} if builtin_file.is_file() else ()
    done: dict[str, tuple[bytes, list[str]]] = {}
    under_way: list[str] = []

    def visit(name: str) -> None:
        name = name.replace("-", "_")
        if name in done or name in builtin:
            return
        if name in under_way:
            raise ArtifactError(f"modules depend on each other: {' > '.join([*under_way, name])}")
        if name not in index:
            needed = f" (needed by {under_way[-1]})" if under_way else ""
            raise ArtifactError(f"kernel {kernel.release} has no module {name!r}{needed}")
        elf = load_module(index[name])
        try:
            hard, soft = _needs(elf)
        except ValueError as error:
            raise ArtifactError(str(error), file=index[name]) from None
        hard = [need.replace("-", "_") for need in hard]
        under_way.append(name)
        for need in hard:
            visit(need)
        for need in soft:  # it may be the name of an algorithm instead of a module, and loops are allowed here
            if (need := need.replace("-", "_")) in index and need not in under_way:
                visit(need)
        under_way.pop()
        done[name] = elf, [need for need in hard if need not in builtin]

    for name in wanted:
        visit(name)
    return [(name, elf, hard) for name, (elf, hard) in done.items()]


# ---- the archive -------------------------------------------------------------------------------------

# The third serial port is the harness's own: the harness answers "boot" with the number of this boot, and "status N" or
# "module NAME" ends the run.  The second port is the command's stdin, stdout and stderr.  Kernel messages mix with
# neither.  The last close of a tty waits until all bytes are sent, so poweroff loses none.  modprobe, unlike insmod,
# applies the parameters for modules in the kernel's command line.
_INIT = """#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin HOME=/root TERM=dumb
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t debugfs debug /sys/kernel/debug 2>/dev/null
stty -F /dev/ttyS1 raw -echo
stty -F /dev/ttyS2 raw -echo
exec 3<>/dev/ttyS2
echo boot >&3
read -t 10 VMODEL_BOOT <&3
export VMODEL_BOOT
finish() {{
    sync
    echo "$@" >&3
    exec 3>&-
    poweroff -f
}}
for module in {load}; do
    modprobe $module 2>/dev/console || finish module $module
done
cd /root
sh /vmodel-command </dev/ttyS1 >/dev/ttyS1 2>&1 3>&-
finish status $?
"""


def build(
    kernel: Kernel,
    busybox: Path,
    command: Sequence[str] | str,
    modules: Iterable[str] = (),
    files: Iterable[Path | tuple[Path, str]] = (),
    extra_modules: Iterable[str] = (),
    tools: Sequence[str] = (),
) -> bytes:
    """An initramfs that runs `command` (words, or a shell script) and powers off.

    `modules` are loaded in this order, dependencies first; `modprobe` can load `extra_modules`.
    `tools` are Debian's programs; in /bin they take precedence over busybox's applets of the same name.
    `files`: (path on the host, path in the guest), or a path for /root/NAME.  They keep their modes.
    ArtifactError: busybox, a tool or a module is missing.  ConfigError: a file is missing, or its path is used twice.
    """
    archive = Cpio()
    for folder in ("proc", "sys", "dev", "tmp", "root", "bin", "sbin", "usr/bin", "usr/sbin", "run", "etc"):
        archive.folder(folder)
    archive.node("dev/console", 5, 1)
    archive.node("dev/null", 1, 3)
    archive.file("bin/busybox", _read(busybox), 0o755)
    for applet in _APPLETS:
        archive.link(f"bin/{applet}", "busybox")
    load = list(modules)
    ordered = _ordered(kernel, [*load, *extra_modules])
    home = f"lib/modules/{kernel.release}"
    below: dict[str, set[str]] = {}
    dep = ""
    for name, elf, hard in ordered:
        archive.file(f"{home}/{name}.ko", elf)
        below[name] = set(hard).union(*(below[need] for need in hard))
        # modprobe loads from a line's end to its start; `below` is in load order.
        dep += " ".join([f"{name}.ko:", *(f"{need}.ko" for need in reversed(below) if need in below[name])]) + "\n"
    archive.file(f"{home}/modules.dep", dep.encode())
    if tools:
        for target, source in program_files(find_tools(), tools):
            archive.file(target, _read(source), 0o755)
    for entry in files:
        source, target = entry if isinstance(entry, tuple) else (entry, f"root/{entry.name}")
        archive.file(target, _read(source), source.stat().st_mode & 0o777)
    script = command if isinstance(command, str) else shlex.join(command)
    archive.file("vmodel-command", script.encode() + b"\n", 0o755)
    names = " ".join(name for name, _ in modules_in_order(kernel, load))
    archive.file("init", _INIT.format(load=names).encode(), 0o755)
    return archive.finish()


def _read(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be copied into the guest: {error.strerror}", file=source) from None
