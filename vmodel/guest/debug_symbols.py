"""Debug information (DWARF) of a kernel's own modules, which says what line of the source an instruction is from.

    debug-NAME/    modules/MODULE.ko, vmlinux; the stamp has the kernel's RELEASE

Debian's package of it (linux-image-RELEASE-dbg) has about 1 GB: `scripts/get-qemu --debug-symbols MODULE` reads it
while it is downloaded, and keeps the files of these modules only.  The debug kernel comes with its own.
"""

from __future__ import annotations

import lzma
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from vmodel.guest.artifacts import FETCH_COMMAND, ArtifactError, Kernel, cache_dir, find_kernel, read_stamp
from vmodel.guest.headers import debug_modules
from vmodel.guest.streamed import Download, members
from vmodel.guest.tools import nearest

#: How the kernel itself, with all that is built in, is named among modules.
KERNEL = "vmlinux"
MODULE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def normal(module: str) -> str:
    """A module's name as the kernel has it: "nvme-core" is the file of "nvme_core"."""
    return module.replace("-", "_")


def find_debug(kernel: Kernel, module: str) -> Path | None:
    """The ELF file with debug information of a kernel's own module, or of "vmlinux"; None: it is not in the cache."""
    name = normal(module)
    if not MODULE_NAME.fullmatch(module):
        return None
    folders = [part for part in cache_dir().glob("debug-*") if read_stamp(part).get("release") == kernel.release]
    for part in sorted(folders):
        path = part / KERNEL if name == KERNEL else part / "modules" / f"{name}.ko"
        if path.is_file():
            return path
    for folder in debug_modules(kernel):
        for path in sorted(folder.rglob("*.ko")):
            if _module_of(path.name) == name:
                return path
    return None


def debug_names(part: Path) -> list[str]:
    """The modules whose debug information a part of the cache has."""
    names = [_module_of(path.name) for path in sorted((part / "modules").glob("*.ko*"))]
    return [KERNEL, *names] if (part / KERNEL).is_file() else names


def missing_debug(name: str, modules: Collection[str]) -> bool:
    """Whether the cache lacks the debug information of some of these modules for a kernel of the cache, or the kernel.

    ArtifactError: the kernel has no such module.
    """
    try:
        kernel = find_kernel(name)
    except ArtifactError:
        return bool(modules)
    check_modules(kernel, modules)
    return any(find_debug(kernel, module) is None for module in modules)


def debug_file(kernel: Kernel, module: str) -> Path:
    """As `find_debug`.  ArtifactError: it is not in the cache."""
    found = find_debug(kernel, module)
    if found is None:
        raise ArtifactError(
            f"no debug symbols of {module} of kernel {kernel.release} in the cache; run"
            f" {FETCH_COMMAND} --debug-symbols {module}"
        )
    return found


def check_modules(kernel: Kernel, modules: Iterable[str], builtin: str = KERNEL) -> None:
    """ArtifactError: the kernel has no such module as a file.

    `builtin`: what the user writes for code that is built into the kernel.
    """
    names = _modules(kernel)
    for module in modules:
        if normal(module) in names:
            continue
        close = nearest(normal(module), names)
        hint = f"did you mean {close!r}? " if close else ""
        raise ArtifactError(
            f"kernel {kernel.release} has no module {module!r}: {hint}write {builtin} for code that is built in"
        )


def has_module(kernel: Kernel, module: str) -> bool:
    """Whether a kernel has debug information of this name: it is a module that is a file, or "vmlinux"."""
    return normal(module) in _modules(kernel)


def _modules(kernel: Kernel) -> set[str]:
    files = () if kernel.modules is None else kernel.modules.rglob("*.ko*")
    return {KERNEL, *(_module_of(path.name) for path in files)}


def pick_debug(download: Download, folder: Path, release: str, modules: Collection[str]) -> None:
    """Writes the debug files of these modules of the package into `folder`, and verifies the package.

    ArtifactError: the package is damaged, is not the one of the archive's lists, or lacks one.
    """
    wanted = {normal(module) for module in modules}
    (folder / "modules").mkdir(parents=True, exist_ok=True)
    for path, content in members(download):
        name = _wanted(path, release)
        if name not in wanted:
            continue
        target = folder / KERNEL if name == KERNEL else folder / "modules" / f"{name}.ko"
        with target.open("wb") as file:
            if path.endswith(".xz"):
                try:
                    with lzma.open(content) as plain:
                        shutil.copyfileobj(plain, file, 1 << 20)
                except (lzma.LZMAError, EOFError):
                    raise ArtifactError(f"the package of debug symbols of {release} is damaged: {path}") from None
            else:
                shutil.copyfileobj(content, file, 1 << 20)
        wanted.discard(name)
        if not wanted:
            break
    download.verify()
    if wanted:
        raise ArtifactError(f"the package of debug symbols of {release} has none of {', '.join(sorted(wanted))}")


def _wanted(path: str, release: str) -> str:
    """The module's name, if this file of the package is a module's debug file or the kernel's; else ""."""
    home, _, name = path.rpartition("/")
    if not home.startswith("usr/lib/debug/") and home != "usr/lib/debug":
        return ""
    if name in (KERNEL, f"{KERNEL}-{release}"):
        return KERNEL
    if f"/{release}/" in f"{home}/" and re.fullmatch(r"[\w-]+\.ko(\.xz)?", name):
        return _module_of(name)
    return ""


def _module_of(file: str) -> str:
    return normal(file.partition(".ko")[0])
