"""An initramfs for a guest: busybox, kernel modules in load order, files, and /init.

Format: cpio "newc", uncompressed (the kernel's Documentation/driver-api/early-userspace/buffer-format.rst).
Unpacking a few MiB costs a guest less than decompressing them.
"""

from __future__ import annotations

import os
import shlex
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from vmodel.errors import ConfigError
from vmodel.guest.artifacts import Kernel
from vmodel.guest.modules import files_of, in_order
from vmodel.guest.shares import MODULES, Share, check, mount_lines
from vmodel.guest.tools import find_tool, interpreter, missing, program_path, tool, tool_files

#: A folder that is copied has at most this many bytes: it takes the guest's memory.
_LARGEST_FOLDER = 256 << 20
#: Links to busybox before `busybox --install` has created those in /bin: for /init, and for scripts' first lines.
_APPLETS = ("bin/sh", "bin/mount", "usr/bin/env")


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
        self._add(path, stat.S_IFLNK | 0o777, os.fsencode(target))

    def node(self, path: str, major: int, minor: int) -> None:
        """Adds a character device."""
        self._add(path, stat.S_IFCHR | 0o600, b"", (major, minor))

    def names(self) -> set[str]:
        """The paths of all that is there but folders, without a leading slash."""
        return set(self._others)

    def finish(self) -> bytes:
        """Ends the archive, and returns it."""
        self._entry("TRAILER!!!", 0, b"", (0, 0))
        return b"".join(self._parts)

    def _clean(self, path: str) -> str:
        name = str(PurePosixPath(path.lstrip("/")))
        # The kernel silently skips an entry whose name is longer than PATH_MAX.
        if name == "." or ".." in name.split("/") or "\0" in name or len(os.fsencode(name)) > 4095:
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
        encoded = os.fsencode(name) + b"\0"
        # c_ino c_mode c_uid c_gid c_nlink c_mtime c_filesize c_maj c_min c_rmaj c_rmin c_namesize c_chksum
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, *device, len(encoded), 0)
        head = b"070701" + b"".join(b"%08X" % value for value in fields) + encoded
        for part in (head, data):
            self._parts.append(part + bytes(-len(part) % 4))


# ---- the archive -------------------------------------------------------------------------------------

# The third serial port is the harness's own: the harness answers "boot" with the number of this boot, and "status N",
# "module NAME" or "share TAG" ends the run, once the harness has answered with a line; gdb.py reads "section" and
# "gdb", and answers with a line when gdb has continued the guest.  The second port is the command's stdin, stdout and
# stderr.  Kernel messages mix with neither.  The last close of a tty waits until all bytes are sent, so poweroff loses
# none.  modprobe, unlike insmod, applies the parameters for modules in the kernel's command line.  A boot has many
# warnings that are no problem: the console gets warnings only from the first module on; but all of the log if the boot
# had a WARN.
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
    [ ! -e /vmodel-sizes ] || kill $(cat /vmodel-sizes)
    echo "$@" >&3
    read -t 60 -r _ <&3
    exec 3>&-
    poweroff -f
}}
load() {{
    modprobe $1 2>/dev/console || finish module $1
}}
own() {{
    read -r level _ < /proc/sys/kernel/printk
    [ $level -ge 5 ] || dmesg -n 5
    load $1
}}
gdb() {{
    for module in "$@"; do
        for section in $(ls -A /sys/module/$module/sections); do
            echo section $module $section $(cat /sys/module/$module/sections/$section) >&3
        done
    done
    if [ "$VMODEL_BOOT" = 1 ]; then
        echo gdb >&3
        read -r _ <&3
    fi
    echo 1 > /sys/bus/pci/drivers_autoprobe
    for device in /sys/bus/pci/devices/*; do
        [ -e $device/driver ] || echo ${{device##*/}} > /sys/bus/pci/drivers_probe
    done 2>/dev/null
}}
share() {{
    mkdir -p "$2" && mount -t 9p -o "$3" $1 "$2" 2>/dev/console || finish share $1
}}
read level rest < /proc/sys/kernel/printk
[ $level -ge 5 ] || dmesg -n 5
read warnings 2>/dev/null < /sys/kernel/warn_count && [ $warnings = 0 ] || dmesg > /dev/console
{load}
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
    shares: Sequence[Share] = (),
    gdb: bool = False,
) -> bytes:
    """An initramfs that runs `command` (words, or a shell script) and powers off.

    `modules` are loaded in this order, dependencies first; `modprobe` can load `extra_modules`.  Both are names, paths
    of .ko files, or source folders (see modules.py).
    `tools` are Debian's programs, as "pciutils:lspci"; they take precedence over busybox's applets of the same name.
    `files`: (path on the host, path in the guest), or a path for /root/NAME.  They keep their modes.  A folder comes
    with all that is in it.  `shares` are mounted before `modules` are loaded.  `gdb`: /init waits for it, see gdb.py.
    ArtifactError: busybox, a tool or a module is missing.  ConfigError: a file is missing, its path is used twice, or
    it is a program whose loader or libraries the guest has not got.
    """
    archive = Cpio()
    for folder in ("proc", "sys", "dev", "tmp", "root", "bin", "sbin", "usr/bin", "usr/sbin", "run", "etc"):
        archive.folder(folder)
    check(shares, kernel)
    archive.node("dev/console", 5, 1)
    archive.node("dev/null", 1, 3)
    archive.file("bin/busybox", _read(busybox), 0o755)
    load, extra = files_of(modules, kernel), files_of(extra_modules, kernel)
    own: dict[str, Path | None] = dict.fromkeys(MODULES) if shares and kernel.modules else {}
    # A module that is given by its path in one of both is that one in both.
    load = {name: path or extra.get(name) for name, path in load.items()}
    home = f"lib/modules/{kernel.release}"
    below: dict[str, set[str]] = {}
    dep = ""
    for module in in_order(kernel, load | {name: path for name, path in (own | extra).items() if name not in load}):
        archive.file(f"{home}/{module.name}.ko", module.elf)
        needs = set(module.needs).union(*(below[need] for need in module.needs))
        # modprobe loads from a line's end to its start; `below` is in load order.
        dep += " ".join([f"{module.name}.ko:", *(f"{need}.ko" for need in reversed(below) if need in needs)]) + "\n"
        below[module.name] = needs
    archive.file(f"{home}/modules.dep", dep.encode())
    sources: dict[Path, None] = {}
    for entry in files:
        source, target = entry if isinstance(entry, tuple) else (entry, f"root/{entry.name}")
        _copy(archive, source, target)
        sources[source] = None
    _add_tools(archive, tools)
    for source in sources:
        _check_program(source, archive)
    script = command if isinstance(command, str) else shlex.join(command)
    archive.file("vmodel-command", os.fsencode(script) + b"\n", 0o755)
    lines = [f"load {name}" for name in own]
    lines += [shlex.join(("share", *line)) for line in mount_lines(shares)]
    lines += ["echo 0 > /sys/bus/pci/drivers_autoprobe"] if gdb else []
    # The console has warnings, too, once a module of the user's is loaded.
    lines += [f"{'own' if load.get(module.name) else 'load'} {module.name}" for module in in_order(kernel, load)]
    if gdb:
        lines.append(" ".join(["gdb", *(name for name, path in load.items() if path)]))
    archive.file("init", os.fsencode(_INIT.format(load="\n".join(lines))), 0o755)
    return archive.finish()


def _add_tools(archive: Cpio, tools: Sequence[str]) -> None:
    """Adds programs with what they need, links to them in /bin, and links to busybox for what is not there then.

    A file that the user puts at the same place takes precedence.
    """
    for target, source in tool_files(tools).items():
        if target in archive.names():
            continue
        if source.is_symlink():  # to a folder
            archive.link(target, str(source.readlink()))
        else:
            archive.file(target, _read(source), source.stat().st_mode & 0o777)
    paths = {text: program_path(text) for text in tools}
    for path in paths.values():
        _link(archive, f"bin/{Path(path).name}", f"/{path}")
    for applet in _APPLETS:
        _link(archive, applet, "/bin/busybox")
    for text, path in paths.items():
        named = interpreter(find_tool(tool(text)[0]) / "root" / path)
        wanted = named.lstrip("/") if "/" in named else f"bin/{named}"
        name = Path(wanted).name
        if f"usr/{wanted}" in archive.names():
            _link(archive, wanted, f"/usr/{wanted}")
        if named and not {wanted, f"usr/{wanted}"} & archive.names():
            raise ConfigError(f"{text} is a script for {named}, which is not in the guest: add the tool {name}:{name}")


def _link(archive: Cpio, path: str, target: str) -> None:
    if path not in archive.names():
        archive.link(path, target)


def _check_program(source: Path, archive: Cpio) -> None:
    """ConfigError: this file is a program that cannot run in the guest."""
    if source.is_file() and (lacks := missing(_read(source), archive.names())):
        raise ConfigError(f"needs {lacks}, which is not in the guest: link it with -static", file=source)


def _copy(archive: Cpio, source: Path, target: str) -> None:
    """Adds a file, or a folder with all that is in it."""
    if not source.is_dir():
        archive.file(target, _read(source), source.stat().st_mode & 0o777)
        return
    size = 0
    archive.folder(target)
    for place, folders, names in os.walk(source):
        folders.sort()
        inside = f"{target}/{Path(place).relative_to(source)}"
        for name in sorted(folders):
            path = Path(place, name)
            if path.is_symlink():
                archive.link(f"{inside}/{name}", str(path.readlink()))
            else:
                archive.folder(f"{inside}/{name}")
        for name in sorted(names):
            path = Path(place, name)
            if path.is_file():  # links, too: what they lead to may not be in the guest
                if (size := size + path.stat().st_size) > _LARGEST_FOLDER:
                    raise ConfigError("has more than 256 MiB, too much to copy: share it instead", file=source)
                archive.file(f"{inside}/{name}", _read(path), path.stat().st_mode & 0o777)
            elif path.is_symlink():
                archive.link(f"{inside}/{name}", str(path.readlink()))
            else:
                raise ConfigError("cannot be copied into the guest: not a file", file=path)


def _read(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot be copied into the guest: {error.strerror}", file=source) from None
