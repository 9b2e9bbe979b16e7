"""For coverage: whether a guest has some code, and which file on this host is the build that a coverage is of."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path

from vmodel.coverage.errors import CoverageError
from vmodel.coverage.kernel_image import KernelImage
from vmodel.coverage.object_file import ObjectFile
from vmodel.coverage.program import Program
from vmodel.coverage.target import Target
from vmodel.errors import ConfigError
from vmodel.files import regular
from vmodel.guest.artifacts import Kernel
from vmodel.guest.debug_symbols import KERNEL, check_modules, find_debug
from vmodel.guest.kbuild import OUTPUT
from vmodel.guest.modules import builtin, find_module, is_path, is_source, load_module

#: The limits of a module's file, in bytes, and of the folders in which a build is looked for.
_LARGEST, _MOST_FOLDERS = 256 << 20, 1000


def own_names(modules: Iterable[str]) -> set[str] | None:
    """The names of those of a guest's modules that are given by path; None: unknown, as one is a source folder."""
    own = [entry for entry in modules if is_path(entry)]
    return None if any(map(is_source, own)) else {_module_of(Path(entry)) for entry in own}


def check_target(text: str, kernel: Kernel, own: Collection[str] | None = ()) -> None:
    """CoverageError: a guest with this kernel has no such code.  `own`: the names of its modules, see `own_names`."""
    target = Target.parse(text)
    if target.kernel:
        names = (name for _, _, name in KernelImage.load(kernel.image).symbols.functions())
        if not any(name.startswith(target.prefix) for name in names):
            raise CoverageError(f"kernel {kernel.release} has no function whose name begins with {target.prefix!r}")
    elif target.file is None and own is not None and target.name not in own:
        if target.name in builtin(kernel):
            raise CoverageError(
                f"{target.name} is built into kernel {kernel.release}: write vmlinux:PREFIX, with which its functions"
                " begin"
            )
        try:
            check_modules(kernel, [target.name])
        except ConfigError as error:
            raise CoverageError(str(error)) from None


class CodeFinder:
    """Finds programs by name and build id, for `vmodel.coverage.registry`.

    It looks at files of the user's own modules, at kernels, and at what was built in ./build of some folders.  Only a
    file with the right build id is taken apart.
    """

    def __init__(
        self, kernels: Iterable[Kernel], files: Iterable[Path] = (), folders: Iterable[Path] = (Path(),)
    ) -> None:
        self._kernels = list(kernels)
        self._files = list(files)
        self._folders = list(folders)

    def __call__(self, name: str, build_id: str) -> Program | None:
        """The program; None: no file here is this build."""
        _, _, prefixes = name.partition(":")
        if prefixes:
            return self._kernel_functions(prefixes.split(","), build_id)
        for path, kernel in self._files_of(name):
            try:
                regular(path, _LARGEST)
                elf = load_module(path)
                if ObjectFile(elf, path).build_id == build_id:
                    return Program.of_module(name, elf, find_debug(kernel, name) if kernel else None)
            except (ConfigError, OSError, ValueError):  # another file may be the one
                continue
        return None

    def _kernel_functions(self, prefixes: list[str], build_id: str) -> Program | None:
        for kernel in self._kernels:
            try:
                found = Program.of_kernel(KernelImage.load(kernel.image), prefixes, find_debug(kernel, KERNEL))
            except ConfigError:  # another kernel may be the one
                continue
            if found.build_id == build_id:
                return found
        return None

    def _files_of(self, name: str) -> Iterator[tuple[Path, Kernel | None]]:
        """Files of modules with this name, and whose kernel's own they are."""
        yield from ((path, None) for path in self._files if _module_of(path) == name)
        for kernel in self._kernels:
            if (path := find_module(kernel, name)) is not None:
                yield path, kernel
            for folder in self._folders:
                for place, _, names in islice(os.walk(folder / OUTPUT / kernel.release), _MOST_FOLDERS):
                    yield from ((Path(place, file), None) for file in names if _module_of(Path(file)) == name)


def _module_of(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_") if ".ko" in path.name else ""
