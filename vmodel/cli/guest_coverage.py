"""What `vmodel guest --coverage` prints at its end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vmodel.cli.output import console, show
from vmodel.coverage.comparison import Comparison
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.folder import write
from vmodel.coverage.table import table
from vmodel.guest.artifacts import DEBUG, FETCH_COMMAND, Kernel, find_kernels
from vmodel.guest.debug_symbols import KERNEL, find_debug, has_module


def show_coverage(
    reached: Coverage | CoverageError, title: str, kernel: Kernel | None, out: Path | None, sources: Sequence[Path]
) -> bool:
    """Prints the table on stderr, as stdout is the command's; writes the reports.  False: it printed why it cannot."""
    try:
        if isinstance(reached, CoverageError):
            raise reached
        comparison = Comparison(reached, title=title)
        show(table(comparison), console(sys.stderr))
        for hint in hints(comparison, kernel):
            print(f"vmodel: {hint}", file=sys.stderr)
        if out is not None:
            page, *others = write(comparison, out, sources=sources)
            beside = ", ".join(path.name for path in others)
            print(f"vmodel: {page} shows it; beside it: {beside}", file=sys.stderr)
    except CoverageError as error:
        print(f"vmodel: {error}", file=sys.stderr)
        return False
    return True


def hints(comparison: Comparison, kernel: Kernel | None) -> Iterator[str]:
    """What to do about modules of which nothing ran, and about source lines that are not known, a line each."""
    without_lines: dict[str, None] = {}
    for row in comparison.modules:
        of_kernel = row.name.startswith(f"{KERNEL}:")
        if not row.instructions.total:
            continue  # its file is not here
        if not row.instructions.reached:
            if not of_kernel:  # a module's first function runs when it is loaded
                yield f"{row.name}: nothing of it ran: the guest did not load it; --module {row.name} does, at boot"
        elif row.lines is None and not row.notes:
            without_lines[KERNEL if of_kernel else row.name] = None
    roles = [] if kernel is None else [n for n, known in find_kernels().items() if known.release == kernel.release]
    if kernel is None or not roles or DEBUG in roles:
        return
    fetched = [name for name in without_lines if has_module(kernel, name) and find_debug(kernel, name) is None]
    if fetched:
        names = " ".join(f"--debug-symbols {name}" for name in fetched)
        yield f"for source lines, once (1 GB): {FETCH_COMMAND} --kernel {roles[0]} {names}"
