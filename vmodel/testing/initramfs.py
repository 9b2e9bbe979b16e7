"""An initramfs for a guest: busybox, kernel modules in load order, files, and /init.  Format: cpio "newc"."""

from __future__ import annotations

import lzma
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from vmodel.testing.artifacts import ArtifactError, Kernel

#: Commands of busybox that /init and most test scripts use; `busybox --install` makes the others.
_APPLETS = ("sh", "mount", "insmod", "modprobe", "poweroff", "reboot", "cat", "echo", "ls", "sleep", "mknod")


class Cpio:
    """A cpio archive in the making."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._inode = 0
        self._seen: set[str] = set()

    def _entry(self, name: str, mode: int, data: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        encoded = name.encode() + b"\0"
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % value for value in fields) + encoded
        for part in (head, data):
            self._parts.append(part + bytes(-len(part) % 4))

    def _parents(self, path: str) -> None:
        for parent in reversed(Path(path).parents):
            name = str(parent)
            if name not in (".", "/") and name not in self._seen:
                self._seen.add(name)
                self._entry(name, stat.S_IFDIR | 0o755, b"")

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """A regular file at `path` (no leading slash needed), with its folders."""
        path = path.lstrip("/")
        self._parents(path)
        self._entry(path, stat.S_IFREG | mode, data)

    def folder(self, path: str) -> None:
        """A folder."""
        self._parents(path.strip("/") + "/x")

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        path = path.lstrip("/")
        self._parents(path)
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def node(self, path: str, major: int, minor: int) -> None:
        """A character device."""
        path = path.lstrip("/")
        self._parents(path)
        self._entry(path, stat.S_IFCHR | 0o600, b"", (major, minor))

    def finish(self) -> bytes:
        """The whole archive."""
        self._entry("TRAILER!!!", 0, b"")
        return b"".join(self._parts)


# ---- kernel modules ----------------------------------------------------------------------------------


def _module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def _load(path: Path) -> bytes:
    """A module's ELF file, decompressed; ArtifactError for a compression that is not supported."""
    data = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(data)
    if path.suffix == ".ko":
        return data
    raise ArtifactError(f"{path}: modules compressed as {path.suffix} are not supported: only .xz and plain ones")


def modules_in_order(kernel: Kernel, names: Iterable[str]) -> list[tuple[str, bytes]]:
    """(name, ELF) of the modules and all they depend on, dependencies first; built-in ones are left out.

    What a module depends on is read from the module itself, as no depmod is needed for that.  ArtifactError for a
    name that the kernel has not.
    """
    index = {_module_name(path): path for path in kernel.modules.rglob("*.ko*")}
    builtin_file = kernel.modules / "modules.builtin"
    builtin = (
        {_module_name(Path(line)) for line in builtin_file.read_text().split()} if builtin_file.exists() else set()
    )
    done: dict[str, bytes] = {}

    def visit(name: str, wanted_by: str) -> None:
        name = name.replace("-", "_")
        if name in done or name in builtin:
            return
        if name not in index:
            raise ArtifactError(f"kernel {kernel.release} has no module {name!r}{wanted_by}")
        elf = _load(index[name])
        match = re.search(rb"(?:^|\0)depends=([\w,-]*)\0", elf)
        for dependency in match[1].decode().split(",") if match else ():
            if dependency:
                visit(dependency, f" (needed by {name})")
        done[name] = elf

    for name in names:
        visit(name, "")
    return list(done.items())


# ---- the whole ---------------------------------------------------------------------------------------

_INIT = """#!/bin/sh
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in {modules}; do
    insmod /modules/$module.ko || echo "vmodel: insmod $module failed" >/dev/console
done
# The second serial port carries what the command prints, the third its exit status: kernel messages mix with neither.
stty -F /dev/ttyS1 raw -echo 2>/dev/null
cd /root
sh /vmodel-command </dev/ttyS1 >/dev/ttyS1 2>&1
status=$?
sync
stty -F /dev/ttyS2 raw -echo 2>/dev/null
echo "status $status" >/dev/ttyS2
poweroff -f
"""


def build(
    kernel: Kernel,
    busybox: Path,
    command: Sequence[str] | str,
    modules: Iterable[str] = (),
    files: Iterable[tuple[Path, str]] = (),
) -> bytes:
    """An initramfs that runs `command` (words, or a shell script) and powers off.

    `files`: (path on this machine, path in the guest); executable ones stay so.
    """
    archive = Cpio()
    for folder in ("proc", "sys", "dev", "tmp", "root", "bin", "modules"):
        archive.folder(folder)
    archive.node("dev/console", 5, 1)
    archive.node("dev/null", 1, 3)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in _APPLETS:
        archive.link(f"bin/{applet}", "busybox")
    ordered = modules_in_order(kernel, modules)
    for name, elf in ordered:
        archive.file(f"modules/{name}.ko", elf)
    for source, target in files:
        archive.file(target, source.read_bytes(), source.stat().st_mode & 0o777)
    script = command if isinstance(command, str) else " ".join(_quote(word) for word in command)
    archive.file("vmodel-command", script.encode() + b"\n", 0o755)
    archive.file("init", _INIT.format(modules=" ".join(name for name, _ in ordered)).encode(), 0o755)
    return archive.finish()


def _quote(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"
