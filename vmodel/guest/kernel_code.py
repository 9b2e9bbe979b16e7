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
from vmodel.guest.modules import builtin, files_of, find_module, is_path, is_source, load_module
from vmodel.guest.tools import nearest

#: The limits of a module's file, in bytes, and of the folders in which a build is looked for.
_LARGEST, _MOST_FOLDERS = 256 << 20, 1000
#: Most names of modules in an error.
_MOST_NAMES = 10


def check_target(text: str, kernel: Kernel, modules: Iterable[str] = ()) -> None:
    """Checks that a guest with this kernel and these modules (as of `GuestSpec.modules`) has the code.  CoverageError.

    What is given as source is built if nothing else is that code: BuildError, ArtifactError.
    """
    target = Target.parse(text)
    if target.kernel:
        names = (name for _, _, name in KernelImage.load(kernel.image).symbols.functions())
        if not any(name.startswith(target.prefix) for name in names):
            raise CoverageError(f"kernel {kernel.release} has no function whose name begins with {target.prefix!r}")
    elif target.file is None:
        given = [entry for entry in modules if is_path(entry)]
        own = {_module_of(Path(entry)) for entry in given if not is_source(entry)}
        try:
            check_module(target.name, kernel, own)
        except CoverageError:
            built = files_of(filter(is_source, given), kernel)
            check_module(target.name, kernel, own | built.keys())


def check_module(name: str, kernel: Kernel, own: Collection[str] = ()) -> None:
    """CoverageError: a module is no file of the kernel's, and not among the names `own` of a guest's other modules."""
    if name in own:
        return
    if name in builtin(kernel):
        raise CoverageError(
            f"{name} is built into kernel {kernel.release}: write vmlinux:PREFIX, with which its functions begin"
        )
    try:
        check_modules(kernel, [name], "vmlinux:PREFIX")
    except ConfigError as error:
        if close := nearest(name, own):
            raise CoverageError(f"no module {name!r}: did you mean {close!r}, which the guest loads?") from None
        theirs = f"; the guest's own modules are {', '.join(sorted(own)[:_MOST_NAMES])}" if own else ""
        raise CoverageError(f"{error}{theirs}") from None


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
                    return Program.of_module(name, elf, find_debug(kernel, name) if kernel else None, path)
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
