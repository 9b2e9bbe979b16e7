"""`Sources`: finds source files by the paths that debug information has of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from vmodel.files import regular

#: Debug information is input: only files that look like source are read, and no large ones.
_SUFFIXES = frozenset({".c", ".h", ".S", ".s", ".inc", ".rs"})
_MOST = 4 << 20


class Sources:
    """Source files at the paths that debug information names, or below `roots`, such as an unpacked tree of Linux.

    Debian's kernels were built at /build/.../linux-6.12.117/drivers/nvme/host/pci.c; of this, as much of the end as a
    root has counts.

    `within`: of the paths that debug information names, only those in these folders, and in `roots`; all by default.
    A page has the text of these files, and debug information of others may name any.
    """

    def __init__(self, roots: Sequence[Path] = (), within: Sequence[Path] | None = None) -> None:
        self._roots = [root.absolute() for root in roots]
        self._within = None if within is None else [folder.resolve() for folder in within]
        self._found: dict[str, Path | None] = {}

    def path(self, file: str) -> Path | None:
        """Where this file is here; None: it is not."""
        if file not in self._found:
            self._found[file] = self._find(PurePosixPath(file))
        return self._found[file]

    def _find(self, file: PurePosixPath) -> Path | None:
        if file.suffix not in _SUFFIXES or ".." in file.parts:
            return None
        parts = [part for part in file.parts if part != "/"]
        # A name alone, such as main.c, would be found everywhere.
        inner = [root.joinpath(*parts[n:]) for root in self._roots for n in range(max(len(parts) - 1, 1))]
        for path in [*inner, *([Path(file)] if file.is_absolute() else [])]:
            try:
                if self._within is not None and path not in inner and not self._is_within(path):
                    continue
                regular(path, _MOST)
            except (OSError, ValueError):  # a path may have a NUL
                continue
            return path
        return None

    def _is_within(self, path: Path) -> bool:
        real = path.resolve()
        return any(real.is_relative_to(folder.resolve()) for folder in [*(self._within or ()), *self._roots])

    def text(self, file: str) -> list[str] | None:
        """The file's lines; None: it is not here."""
        path = self.path(file)
        if path is None:
            return None
        try:
            return path.read_text(errors="replace").split("\n")
        except OSError:
            return None
