"""What a guest is booted with: a machine file's `[guest]` table, and what a command, a test or a campaign adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from glob import escape
from pathlib import Path
from typing import Any, TypeVar

from vmodel.coverage.target import Target
from vmodel.errors import ConfigError
from vmodel.guest.artifacts import DEBUG_RELEASE, Kernel, find_kernel
from vmodel.guest.kbuild import source_files
from vmodel.guest.modules import is_path
from vmodel.guest.running import GuestSpec
from vmodel.guest.sanitize import with_sanitizers
from vmodel.guest.shares import share_at
from vmodel.guest.tools import tool
from vmodel.machine import Machine
from vmodel.span import MiB, number

Place = TypeVar("Place")

#: Debian's kernels for amd64 boot in no less memory, in bytes.  Measured with the smallest initramfs in steps of 8 MiB:
#: 6.12 and its cloud kernel boot in 80 MiB, 7.3 in 88 MiB.  In less they panic, most before they print anything.
LEAST_MEMORY = 96 * MiB
#: The debug kernel boots in this, and hangs in 96 MiB: KASAN takes an eighth of all memory.
LEAST_FOR_DEBUG = 128 * MiB
#: In the release of Debian's kernels, as 6.12.117+deb13-amd64.
_DEBIAN = "+deb"


def guest_file(text: str, base: Path) -> Path | tuple[Path, str]:
    """A file or folder for the guest, "FILE" or "FILE:PLACE", in the form of `GuestSpec.files`.

    ConfigError: it does not exist.

    >>> guest_file("check.sh:/bin/check", Path("/project"))  # doctest: +SKIP
    (PosixPath('/project/check.sh'), '/bin/check')
    """
    source, colon, target = text.partition(":")
    path = base / source
    if not source or not (path.is_file() or path.is_dir()):
        raise ConfigError(f"there is no file {source!r}")
    path = path.resolve() if path.name in ("", "..") else path  # the name is its place in the guest
    if colon and not target.strip("/"):
        raise ConfigError(f"{text!r}: must be FILE, or FILE:PLACE-IN-THE-GUEST")
    return (path, target) if colon else path


def files_in(path: Path) -> list[Path]:
    """A file itself, or all files of a folder, sorted."""
    return sorted(found for found in path.rglob("*") if found.is_file()) if path.is_dir() else [path]


def module_at(entry: str, base: Path) -> str:
    """A module's name, or its path from the folder `base`.  ConfigError: nothing is there."""
    if not is_path(entry):
        return entry
    path = base / entry
    if not module_files(str(path)):
        raise ConfigError(f"there is no module or source folder {entry!r}")
    return f"{path}/" if path.is_dir() else str(path)


def coverage_target(entry: str, base: Path) -> str:
    """What coverage is wanted of, as of `Target.parse`; the path of a module's file from the folder `base`.

    ConfigError: it is no target of coverage, or there is no such file.
    """
    target = Target.parse(entry)
    if target.file is None:
        return target.name
    path = base / target.file
    if not path.is_file():
        raise ConfigError(f"there is no file {entry!r}")
    return str(path)


def tool_at(entry: str, base: Path) -> str:
    """A program of Debian's, "PACKAGE:PROGRAM", as it is.  ConfigError: it has another form."""
    tool(entry)
    return entry


def module_files(entry: str) -> list[Path]:
    """The files that a module's path stands for: one, or all of a source folder; for {release} those of all kernels."""
    start = Path(entry).anchor or "."
    pattern = "*".join(escape(part) for part in str(Path(entry)).removeprefix(start).split("{release}"))
    paths = sorted(Path(start).glob(pattern)) if pattern.strip(".") else [Path(start)]
    return [file for path in paths for file in (source_files(path) if path.is_dir() else [path])]


def at_option(option: str, call: Callable[[str, Path], Place], entry: str) -> Place:
    """`call(entry, the current folder)`.  A ConfigError gets the option that `entry` comes from, and has it once."""
    try:
        return call(entry, Path().absolute())
    except ConfigError as error:
        text = str(error).removeprefix(f"{entry!r} ")
        raise ConfigError(f"{option} {entry or repr(entry)}: {text}") from error


def _check_memory(machine: Machine, kernel: Kernel) -> None:
    """ConfigError: Debian's kernel, or the debug kernel, does not boot in so little memory, and would not say why."""
    size = number(machine.memory)
    debug = kernel.release.endswith(DEBUG_RELEASE)
    needed = LEAST_FOR_DEBUG if debug else LEAST_MEMORY if _DEBIAN in kernel.release else 0
    if size < needed:
        whose = "the debug" if debug else "Debian's"
        text = f'{machine.memory!r}: {whose} kernel {kernel.release} needs "{needed // MiB}M" or more to boot'
        raise ConfigError(text, file=machine.file, key="machine.memory")


def spec_of(
    machine: Machine, qemu_args: Sequence[str], kernel: Kernel | str | None = None, **options: Any
) -> GuestSpec:
    """The guest of a machine: its `[guest]` table, then `options`, which are fields of GuestSpec; then `qemu_args`.

    Lists and kernel arguments add up; other options replace.  `sanitize` is an option, too: whether the kernel looks
    for misuse of memory (`vmodel.guest.sanitize`); the table may say so, too.  ConfigError: a file is missing.
    """
    table, base = machine.content.guest, machine.file.absolute().parent

    def at(key: str, call: Any, entries: Sequence[str]) -> list[Any]:
        made = []
        for n, entry in enumerate(entries):
            try:
                made.append(call(entry, base))
            except ConfigError as error:
                raise ConfigError(str(error), file=machine.file, key=f"guest.{key}[{n}]") from None
        return made

    sums: dict[str, Any] = {
        "modules": at("modules", module_at, table.modules),
        "extra_modules": at("extra_modules", module_at, table.extra_modules),
        "files": at("files", guest_file, table.files),
        "shares": at("shares", share_at, table.shares),
        "tools": at("tools", tool_at, table.tools),
        "qemu_args": [*(["-smp", str(table.cpus)] if table.cpus else []), *table.qemu_args],
    }
    for key, value in sums.items():
        value.extend(options.pop(key, None) or ())
    append = " ".join(filter(None, (table.append, options.pop("append", ""))))
    if options.pop("sanitize", False) or table.sanitize:
        append = with_sanitizers(append)
    chosen = kernel if isinstance(kernel, Kernel) else find_kernel(kernel or table.kernel)
    _check_memory(machine, chosen)
    sums["qemu_args"] += qemu_args
    return GuestSpec(**options, **sums, append=append, kernel=chosen)
