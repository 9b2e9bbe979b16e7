"""A coverage as files in a folder: coverage.info for lcov's tools and editors, coverage.json, and index.html."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

from vmodel.coverage.comparison import Comparison
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.document import as_json
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.lcov import lcov
from vmodel.coverage.listing import listed, listing
from vmodel.coverage.page import html
from vmodel.coverage.sources import Sources

#: The files, beside a listing of instructions (MODULE.s) for each module without debug information.
INFO, JSON, PAGE = "coverage.info", "coverage.json", "index.html"
_LISTING = ".s"


def write(
    coverage: Coverage | Comparison, folder: Path, *, title: str = "coverage", sources: Sequence[Path] = ()
) -> list[Path]:
    """Writes the files into a folder, which is made if it is not there; returns their paths, the page's first.

    All files are complete before the first one replaces an old one; an earlier coverage's listings of other modules are
    removed then.  `title`: that of a `Coverage`; `sources`: folders with source files, such as an unpacked tree of
    Linux.  CoverageError: the folder cannot be written, with the reason, and then files of before stay; or the
    coverages are of different builds.
    """
    comparison = coverage if isinstance(coverage, Comparison) else Comparison(coverage, title=title)
    where = Sources(sources)
    folder = folder.absolute()
    lists = {}
    for name, program in comparison.programs.items():
        if not comparison.places(name):
            lists[name] = (folder / f"{_file_name(name)}{_LISTING}", listing(program))
    texts = {path.name: text.text for path, text in lists.values()}
    texts |= {INFO: lcov(comparison, lists, where), JSON: as_json(comparison), PAGE: html(comparison, where)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".coverage-", dir=folder))
        try:
            for name, text in texts.items():
                (work / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            for name in texts:
                (work / name).replace(folder / name)
            for path in _old_listings(folder, texts):
                path.unlink(missing_ok=True)
        finally:
            with contextlib.suppress(OSError):
                shutil.rmtree(work)
    except OSError as error:
        raise CoverageError(f"cannot write the coverage: {error.strerror or error}", file=folder) from None
    return [folder / name for name in (PAGE, INFO, JSON, *(name for name in texts if name.endswith(_LISTING)))]


def _old_listings(folder: Path, texts: Collection[str]) -> list[Path]:
    """The listings of an earlier coverage in the folder: what was not written as one is somebody else's.  OSError."""
    return [
        path
        for path in folder.glob(f"*{_LISTING}")
        if path.name not in texts
        and path.is_file()
        and not path.is_symlink()
        and (name := listed(path)) is not None
        and path.name == f"{_file_name(name)}{_LISTING}"
    ]


def _file_name(module: str) -> str:
    """The module's name without characters that mean something in paths: "vmlinux:pci_" has one."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in module).lstrip(".") or "module"
