"""vmodel campaign and sweep: run many experiments."""

from __future__ import annotations

import contextlib
import errno
import math
import shlex
import sqlite3
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from vmodel.campaign import sweep as sweeps
from vmodel.campaign.matrix import Matrix
from vmodel.campaign.progress import STYLES, ProgressBar
from vmodel.campaign.rig import GUESTS, absolute, is_full, load_rig
from vmodel.campaign.runner import Runner, executor
from vmodel.campaign.schema import load
from vmodel.campaign.store import DATABASE, ResultStore, Row
from vmodel.cli.output import console, log_to_stderr, show
from vmodel.cli.serve import MachinePath
from vmodel.config_file import parse_toml, read_text
from vmodel.coverage.errors import CoverageError
from vmodel.errors import ConfigError
from vmodel.experiment.case import Case
from vmodel.experiment.oracle import Outcome
from vmodel.guest.artifacts import KERNEL_HELP, find_busybox, find_kernel, find_qemu
from vmodel.guest.coverage import check_emulator
from vmodel.guest.kernel_code import check_target
from vmodel.guest.options import at_option, guest_file, module_at, tool_at
from vmodel.guest.running import accelerator
from vmodel.guest.tools import program_path
from vmodel.interrupts import uncovered
from vmodel.patience import slowness

Folder = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="DIR", help="Store the results in DIR instead of ./FILE.runs.")
]
Jobs = Annotated[int, typer.Option("-j", "--jobs", metavar="N", min=1, help="Run N cases at a time on this machine.")]
Scheduler = Annotated[
    str | None, typer.Option(metavar="ADDRESS", help="Run on a Dask cluster, as tcp://host:8786 (vmodel[cluster]).")
]

Sanitize = Annotated[
    bool, typer.Option("--sanitize", help="The kernel looks for misuse of memory: red zones, poison, KFENCE.")
]
Retry = Annotated[bool, typer.Option("--retry", help="Repeat runs that ended with a harness error.")]


def campaign(
    path: Annotated[Path, typer.Argument(metavar="CAMPAIGN.toml", help="The campaign file.", show_default=False)],
    output: Folder = None,
    jobs: Jobs = 1,
    scheduler: Scheduler = None,
    retry: Retry = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the file and list the runs.")] = False,
) -> None:
    """Run a matrix of machines, kernels, workloads, plans and seeds.

    Each result is stored as soon as its run ends.  After an interruption, the same command continues.  The exit status
    is 1 if a run is not as expected.
    """
    log_to_stderr(False)
    content, text = load(path)
    matrix = Matrix(content, path)
    runs = matrix.runs()
    if dry_run:
        several = len({run.seed for run in runs}) > 1
        for run in runs:
            kernel = f" (kernel {run.kernel})" if run.kernel else ""
            print(f"{run.case.name}{f' / seed {run.seed}' if several and not run.control else ''}{kernel}")
        print(f"{path}: {len(runs)} run{'' if len(runs) == 1 else 's'}")
        return
    if matrix.rig == GUESTS and scheduler is None:
        check_host({run.case.kernel for run in runs}, {tool for run in runs for tool in run.case.tools})
        check_coverage(path, [run.case for run in runs])
    folder = output or Path(f"{path.stem}.runs")
    definition = {"kind": "campaign", "name": content.campaign.name, "file": text}
    with at_work(folder, definition, matrix.rig, jobs, scheduler) as (store, runner, _):
        store.keep_only(runs)
        if retry:
            store.reset_errors()
        store.add(runs)
        runner.finish()


def sweep(
    machine: MachinePath,
    point: Annotated[
        str,
        typer.Option(
            metavar="POINT [KEY=VALUE]...", help="The fault point, as 'dma.read device=edu0': see docs/injection.md."
        ),
    ],
    workload: Annotated[str, typer.Option(metavar="SCRIPT", help="A shell script to run in the guest.")],
    do: Annotated[
        str | None, typer.Option(metavar="ACTION", help="The action; the default depends on the point.")
    ] = None,
    check: Annotated[
        str, typer.Option(metavar="SCRIPT", help="A script that checks the guest afterwards, without faults.")
    ] = "",
    kernel: Annotated[str | None, typer.Option(metavar="NAME|PATH", help=KERNEL_HELP)] = None,
    module: Annotated[list[str] | None, typer.Option("--module", metavar="M", help="A module to load.")] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", metavar="F[:DEST]", help="A file for the guest; DEST is by default /root/NAME."),
    ] = None,
    tool: Annotated[
        list[str] | None, typer.Option("--tool", metavar="PACKAGE:PROGRAM", help="A Debian program for the guest.")
    ] = None,
    append: Annotated[str, typer.Option(metavar="STR", help="Additional kernel arguments.")] = "",
    sanitize: Sanitize = False,
    timeout: Annotated[float, typer.Option(metavar="S", help="Time limit of the workload, in seconds.")] = 30.0,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of the actions' random numbers.")] = 0,
    most: Annotated[int, typer.Option(metavar="N", min=1, help="Fail at most N events.")] = 1000,
    rig: Annotated[
        str, typer.Option(metavar="FILE.py:CLASS", help="A class that runs cases instead of guests.")
    ] = GUESTS,
    output: Folder = None,
    jobs: Jobs = 1,
    scheduler: Scheduler = None,
    retry: Retry = False,
) -> None:
    """Fail each event at a point in turn.

    Each event (the 1st, the 2nd, the 3rd ...) fails in a run of its own.  A first run without faults counts the
    events.  The exit status is 1 if a run is not as expected.
    """
    log_to_stderr(False)
    if not 0 < timeout < math.inf:
        raise ConfigError(f"--timeout {timeout:g}: must be more than 0 seconds, and have an end")
    rig = absolute(rig, Path())
    if rig != GUESTS:
        load_rig(rig)
    elif scheduler is None:
        check_host({kernel}, tool or ())
    case = Case(
        machine=machine.absolute(),
        workload=workload,
        kernel=str(Path(kernel).absolute()) if kernel and "/" in kernel else kernel,
        check=check,
        files=tuple(at_option("--file", guest_file, text) for text in file or ()),
        modules=tuple(at_option("--module", module_at, entry) for entry in module or ()),
        tools=tuple(at_option("--tool", tool_at, entry) for entry in tool or ()),
        append=append,
        sanitize=sanitize,
        timeout=timeout,
    )
    made = sweeps.Sweep(case, point, do, rig=rig, seed=seed)
    folder = output or Path(f"{machine.stem}-{point.split()[0]}.runs")
    with at_work(folder, made.definition(), rig, jobs, scheduler) as (store, runner, bar):
        if retry:
            store.reset_errors()
        try:
            sweeps.carry_out(made, store, runner, bar, most)
        except sweeps.CleanRunError as error:
            print(f"vmodel: {error}", file=sys.stderr)
            raise typer.Exit(1) from None


@contextlib.contextmanager
def at_work(
    folder: Path, definition: dict[str, str], rig: str, jobs: int, scheduler: str | None
) -> Iterator[tuple[ResultStore, Runner, ProgressBar]]:
    """Opens a campaign's folder for running; prints a summary at the end.  Exit status 1: a run is not as expected.

    Ctrl-C and SIGTERM end it: with exit status 130, and a line that says how to continue.  OSError: the disk is full.
    """
    with stored(folder), ResultStore.create(folder, definition) as store:
        try:
            with (
                uncovered(),
                ProgressBar(console(sys.stderr)) as bar,
                executor(rig, folder, jobs=jobs, scheduler=scheduler) as on,
            ):
                yield store, Runner(store, on, bar), bar
        except KeyboardInterrupt:
            rows = store.rows()
            done = sum(row.result is not None for row in rows)
            print(
                f"vmodel: interrupted after {done} of {len(rows)} runs: the same command continues from there",
                file=sys.stderr,
            )
            raise typer.Exit(130) from None
        if summarise(store.rows(), folder):
            raise typer.Exit(1)


@contextlib.contextmanager
def stored(folder: Path) -> Iterator[None]:
    """Errors of the disk that runs meet within this context name a file, and say how to continue if it is full."""
    further = "what has ended is stored, and the same command continues"
    try:
        yield
    except sqlite3.OperationalError as error:
        full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
        text = f"{error}: {further}" if full else str(error)
        raise OSError(errno.EIO, text, str(folder / DATABASE)) from error
    except OSError as error:
        if is_full(error):
            error.strerror = f"{error.strerror}: {further}"
            error.filename = error.filename or str(folder)
        raise


def check_host(kernels: Collection[str | None], tools: Collection[str] = ()) -> None:
    """Checks that this host can boot guests, before any run does.  ArtifactError: something is missing."""
    slowness()
    find_qemu()
    find_busybox()
    for kernel in kernels:
        find_kernel(kernel)
    for tool in sorted(tools):
        program_path(tool)


def check_coverage(file: Path, cases: Iterable[Case]) -> None:
    """ConfigError: a guest of one of the cases does not have the code whose coverage the campaign file asks for."""
    seen = set()
    for case in cases:
        guest = (case.kernel, case.machine, case.modules, case.extra_modules)
        if not case.coverage or guest in seen:
            continue
        seen.add(guest)
        table = parse_toml(read_text(case.machine), case.machine).get("guest", {})
        base = case.machine.parent
        theirs = [*table.get("modules", ()), *table.get("extra_modules", ())]
        modules = [*case.modules, *case.extra_modules, *(module_at(entry, base) for entry in theirs)]
        kernel = find_kernel(case.kernel or table.get("kernel"))
        for n, target in enumerate(case.coverage):
            try:
                check_emulator(find_qemu(), accelerator())
                check_target(target, kernel, modules)
            except CoverageError as error:
                raise ConfigError(str(error), file=file, key=f"campaign.coverage[{n}]") from None


def summarise(rows: Sequence[Row], folder: Path) -> int:
    """Prints the number of runs by outcome on stdout; returns how many are not as expected."""
    counts = Counter(row.result.outcome for row in rows if row.result is not None)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(justify="right")
    table.add_column()
    table.add_column()
    for outcome in Outcome:
        if counts[outcome]:
            table.add_row(str(counts[outcome]), f"[{STYLES[outcome]}]{outcome.value}[/]", outcome.doc)
    show(table, console())
    wrong = [row for row in rows if row.result is not None and not row.expected]
    if wrong:
        are = "is" if len(wrong) == 1 else "are"
        print(f"{len(wrong)} of {len(rows)} runs {are} not as expected, the first: {wrong[0].folder}")
    else:
        print(f"0 of {len(rows)} runs are not as expected")
    print(f"next: vmodel report {shlex.quote(str(folder))} -o report.html")
    return len(wrong)
