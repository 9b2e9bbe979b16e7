"""vmodel guest."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, TextIO, cast

import typer
from rich.markup import escape
from rich.table import Table

from vmodel.cli import ending
from vmodel.cli.build import fetch_for
from vmodel.cli.guest_coverage import show_coverage
from vmodel.cli.output import Verbose, console, log_to_stderr, show
from vmodel.cli.screen import Log, Screen, decoded, shared, unix_lines, with_places
from vmodel.cli.serve import (
    DebugModel,
    Devices,
    Faults,
    MachinePath,
    Plan,
    Registers,
    RunDir,
    Seed,
    Stop,
    faults_of,
    loaded,
    served,
    traced,
)
from vmodel.cli.terminal import ESCAPE_NAME, Terminal
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.errors import CoverageError
from vmodel.dma_report.files import check_file, write_report
from vmodel.dma_report.report import DmaReport
from vmodel.dma_report.text import text
from vmodel.dma_report.watch import SETTLE
from vmodel.errors import ConfigError
from vmodel.experiment.oracle import Finding
from vmodel.guest import artifacts, modules, options
from vmodel.guest.monitor import MonitorError
from vmodel.guest.running import Guest, GuestResult, GuestRunError, GuestSpec, on_terminal
from vmodel.guest.shares import share_at
from vmodel.machine import Machine
from vmodel.patience import patience, slowness
from vmodel.server import Server

Command = Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="The command to run.", show_default=False)]
Kernel = Annotated[str | None, typer.Option(metavar="NAME|PATH", help=artifacts.KERNEL_HELP)]
Modules = Annotated[
    list[str] | None,
    typer.Option("--module", metavar="M", help="A kernel module to load: its name, a .ko file, or a source folder."),
]
Files = Annotated[
    list[str] | None,
    typer.Option(
        "--file", metavar="F[:DEST]", help="A file or folder to copy into the guest, by default to /root/NAME."
    ),
]
Shares = Annotated[
    list[str] | None,
    typer.Option("--share", metavar="DIR[:PATH][:rw]", help="A folder that the guest sees, by default at /root/NAME."),
]
Tools = Annotated[
    list[str] | None,
    typer.Option("--tool", metavar="PACKAGE:PROGRAM", help="A Debian program for the guest, as pciutils:lspci."),
]
ExtraModules = Annotated[
    list[str] | None, typer.Option("--extra-module", metavar="M", help="A kernel module for modprobe; not loaded.")
]
Append = Annotated[list[str] | None, typer.Option(metavar="STR", help="Additional kernel arguments; repeatable.")]
Sanitize = Annotated[
    bool, typer.Option("--sanitize", help="The kernel looks for misuse of memory: red zones, poison, KFENCE.")
]
Cpus = Annotated[int | None, typer.Option(metavar="N", min=1, max=64, help="CPUs of the guest.")]
QemuArgs = Annotated[
    list[str] | None, typer.Option("--qemu-arg", metavar="ARG", help="An additional argument for QEMU; repeatable.")
]
Timeout = Annotated[
    float | None,
    typer.Option(metavar="S", help="Time limit in seconds, by default 300 (on a terminal none); times $VMODEL_SLOW."),
]
Artifacts = Annotated[Path | None, typer.Option("--artifacts", metavar="DIR", help="Keep the logs in DIR.")]
Stats = Annotated[bool, typer.Option("--stats", help="Print counters of devices and IOMMUs at the end.")]
Interactive = Annotated[
    bool, typer.Option("--interactive", "-i", help="Forward standard input; a terminal becomes COMMAND's.")
]

Coverages = Annotated[
    list[str] | None,
    typer.Option(
        "--coverage", metavar="CODE", help="Print what ran of a module, a .ko file, or vmlinux:PREFIX; repeatable."
    ),
]
CoverageOut = Annotated[
    Path | None,
    typer.Option("--coverage-out", metavar="DIR", help="Write it to DIR, as HTML, JSON and lcov's coverage.info."),
]
CoverageSource = Annotated[
    list[Path] | None,
    typer.Option("--coverage-source", metavar="DIR", help="Find source files in DIR, as a tree of Linux; repeatable."),
]
DmaReportTo = Annotated[
    str | None,
    typer.Option(
        "--dma-report",
        metavar="[=FILE]",
        help="Print what the driver's DMA does wrong; with =FILE write all of it, as .html or .json.",
        show_default=False,
    ),
]
Gdb = Annotated[bool, typer.Option("--gdb", help="Wait for gdb before devices are bound; print how to start it.")]

log = logging.getLogger(__name__)

#: The first output of an interactive command: input that is sent before the guest has opened its port is lost.
_LISTENING = b"\x16"

#: Kernel arguments for a guest whose CPUs a debugger holds up: no watchdog of the kernel is to report that.
_DEBUG_APPEND = "nowatchdog rcupdate.rcu_cpu_stall_suppress=1"


def guest(
    path: MachinePath,
    command: Command,
    kernel: Kernel = None,
    module: Modules = None,
    file: Files = None,
    share: Shares = None,
    tool: Tools = None,
    extra_module: ExtraModules = None,
    append: Append = None,
    sanitize: Sanitize = False,
    cpus: Cpus = None,
    qemu_arg: QemuArgs = None,
    timeout: Timeout = None,
    artifacts_dir: Artifacts = None,
    run_dir: RunDir = None,
    plan: Plan = None,
    fault: Faults = None,
    seed: Seed = None,
    debug_model: DebugModel = False,
    fail_on: ending.FailOn = ending.FAIL_ON,
    stats: Stats = False,
    interactive: Interactive = False,
    gdb: Gdb = False,
    coverage: Coverages = None,
    coverage_out: CoverageOut = None,
    coverage_source: CoverageSource = None,
    dma_report: DmaReportTo = None,
    verbose: Verbose = False,
    device: Devices = None,
    register: Registers = None,
) -> None:
    """Run a command in a stock guest with a machine's devices.

    With -i in a terminal, the terminal is the command's: all keys go to it, and Ctrl-] ends the guest (status 130).

    The command's output goes to stdout unchanged.  The kernel's console goes to stderr, and if that is a terminal,
    control characters are escaped.

    The exit status is the command's, or one of vmodel's own:

    \b
      2    The machine file or the command line is wrong.
     70    A model raised an exception, or did not return.  (--fail-on model)
     71    The kernel panicked.
     72    The kernel had an oops or a BUG, or found its memory damaged.
           (--fail-on oops)
     73    The kernel warned (WARN, lockdep, UBSAN), or found a lockup or a hung
           task.  (--fail-on warn)
    124    The time limit was reached.
    125    vmodel, QEMU or the host failed, or the guest stopped too early.
    126    The guest's shell cannot run the command.
    127    The guest's shell cannot find the command.
    128+N  Signal N ended vmodel, or the command.

    70, 72 and 73 replace only a 0 of the command.
    """
    out = err = Screen(sys.stderr.fileno())
    if not shared(sys.stdout, sys.stderr):
        out = Screen(sys.stdout.fileno())
    log_to_stderr(verbose, cast(TextIO, Log(err, sys.stderr)))
    on_tty = interactive and sys.stdin.isatty() and sys.stdout.isatty()
    if timeout is None:
        timeout = float("inf") if on_tty or gdb or debug_model else 300.0
    if on_tty and debug_model:
        raise ConfigError("-i and --debug-model: both take the terminal: use one of them")
    if not timeout > 0:  # neither is NaN
        raise ConfigError(f"--timeout {timeout:g}: must be more than 0 seconds")
    if coverage_out and not coverage:
        raise ConfigError("--coverage-out: there is no --coverage, as --coverage nvme")
    if coverage_out and coverage_out.exists() and not coverage_out.is_dir():
        raise ConfigError(f"--coverage-out {coverage_out}: is no folder")
    for place in coverage_source or ():
        if not coverage_out:
            raise ConfigError("--coverage-source: there is no --coverage-out, which shows the source")
        if not place.is_dir():
            raise ConfigError(f"--coverage-source {place}: is no folder")
    dma_file = None if dma_report in (None, "-") else check_file(Path(dma_report or ""), "--dma-report=")
    slowness()
    fails = ending.kinds(fail_on)
    wanted = traced(verbose, device, register)
    faults = faults_of(plan, fault, seed)
    with loaded(path) as machine:
        spec = options.spec_of(
            machine,
            [*(["-smp", str(cpus)] if cpus else []), *(qemu_arg or ())],
            kernel,
            command=command,
            modules=[options.at_option("--module", options.module_at, entry) for entry in module or ()],
            extra_modules=[
                options.at_option("--extra-module", options.module_at, entry) for entry in extra_module or ()
            ],
            files=[options.at_option("--file", options.guest_file, entry) for entry in file or ()],
            shares=[options.at_option("--share", share_at, entry) for entry in share or ()],
            tools=[options.at_option("--tool", options.tool_at, entry) for entry in tool or ()],
            append=" ".join([*([_DEBUG_APPEND] if debug_model else ()), *(append or ())]),
            sanitize=sanitize,
            timeout=timeout,
            qemu=artifacts.find_qemu(),
            gdb=gdb,
            coverage=[options.at_option("--coverage", options.coverage_target, entry) for entry in coverage or ()],
        )
        if dma_report is not None:
            spec.on_end = partial(machine.watch_dma().seal, settle=patience(SETTLE))
        fetch_for(
            [kernel or machine.content.guest.kernel or artifacts.STABLE],
            any(map(modules.is_source, (*spec.modules, *spec.extra_modules))),
            spec.tools,
        )
        with Stop.on_signals() as stop, served(machine, run_dir, faults, wanted, debug=debug_model) as (server, folder):
            spec.qemu_args = [*spec.qemu_args, *machine.qemu_args(folder, debug=debug_model)]
            ended: GuestResult | GuestRunError
            reports: list[tuple[ending.Kind, Finding]] = []
            reached: Coverage | CoverageError | None = None
            try:
                with Terminal(sys.stdin.fileno()) if on_tty else contextlib.nullcontext() as terminal:
                    if interactive:
                        spec.command = _announced(command, terminal)
                    quiet = interactive or debug_model
                    ended, reports, reached = _watch(spec, artifacts_dir, stop, interactive, quiet, terminal, out, err)
            except GuestRunError as error:
                ended = error
            err.end_line()
            if stats and isinstance(ended, GuestResult):
                summary(server, machine, ended)
            if dma_report is not None:
                _show_dma(machine.dma_report(), dma_file)
            shown = reached is None or show_coverage(
                reached, " ".join(command), spec.kernel, coverage_out, coverage_source or ()
            )
        # The server has stopped: a hook that does not return is known now.
        found = [ending.Kind.MODEL] if ending.model_errors(machine) else []
        if stop.number:
            raise typer.Exit(128 + stop.number)
        for kind, finding in reports:
            # A GuestPanic says it itself; after a time-out the examination has caused it.
            if kind is ending.Kind.PANIC and isinstance(ended, GuestRunError):
                continue
            print(f"vmodel: kernel {kind}: {finding.text}", file=sys.stderr)
            found.append(kind)
        if isinstance(ended, GuestRunError):
            print(f"vmodel: {ended}", file=sys.stderr)
            raise typer.Exit(ending.status_of_error(ended, found, fails))
    status = ending.status_of(ended.status, found, fails)
    raise typer.Exit(status if shown else status or ending.OWN_FAILURE)


def first_step(spec: GuestSpec, release: str) -> str:
    """What takes time before QEMU starts, if anything does: a build of modules takes longer than a boot."""
    sources = [entry for entry in (*spec.modules, *spec.extra_modules) if modules.is_source(entry)]
    return f"building {', '.join(sources)} for {release}" if sources else f"booting {release}"


def _watch(
    spec: GuestSpec,
    logs: Path | None,
    stop: Stop,
    interactive: bool,
    quiet: bool,
    terminal: Terminal | None,
    out: Screen,
    err: Screen,
) -> tuple[GuestResult | GuestRunError, list[tuple[ending.Kind, Finding]], Coverage | CoverageError | None]:
    messages = console(sys.stderr)
    release = spec.kernel.release if spec.kernel else ""
    spin = messages.is_terminal and not quiet
    spinner = messages.status(escape(first_step(spec, release))) if spin else contextlib.nullcontext()
    to_console: Callable[[bytes], None] = partial(err.put, "console")
    if messages.is_terminal:
        to_console = decoded(to_console)
    to_console = unix_lines(with_places(to_console, lambda line: running.places.of(line)))
    listening = threading.Event()
    with spinner as shown:
        if shown is not None:
            out.erase = err.erase = shown.stop

        def on_output(data: bytes) -> None:
            if interactive and not listening.is_set() and _LISTENING in data:
                listening.set()
                data = data.replace(_LISTENING, b"", 1)
            out.put("output", data)

        with Guest(spec, artifacts=logs, on_output=on_output, on_console=to_console) as running:
            if shown is not None:  # what is built has been built
                shown.update(f"booting {release}")
            threading.Thread(target=_end_on, args=(stop, running, terminal), daemon=True).start()
            if terminal is not None:
                print(f"vmodel: booting {release}; {ESCAPE_NAME} ends the guest", file=sys.stderr)
                threading.Thread(target=_keys, args=(listening, terminal, running), daemon=True).start()
            elif interactive:
                threading.Thread(target=_forward, args=(listening, sys.stdin.fileno(), running), daemon=True).start()
            if spec.gdb:
                threading.Thread(target=_debugged, args=(running, err), daemon=True).start()
            ended: GuestResult | GuestRunError
            try:
                ended = running.wait()
            except GuestRunError as error:
                ended = error
            recorded = running.coverage
            reached: Coverage | CoverageError | None = None
            if recorded is not None and recorded.recorder.loaded:
                try:
                    reached = recorded.taken()
                except CoverageError as error:  # the command has ended nevertheless
                    reached = error
            return ended, ending.kernel_findings(running.console, running.places.of), reached


def _show_dma(report: DmaReport, file: Path | None) -> None:
    """Prints the findings on stderr, as stdout is the command's; writes the report."""
    show(text(report), console(sys.stderr))
    if file is not None:
        write_report(report, file)
        print(f"vmodel: {file} has the report", file=sys.stderr)


def _announced(command: list[str], terminal: Terminal | None) -> list[str] | str:
    words = ["sh", "-c", f"printf '{_LISTENING.decode()}'; exec \"$@\"", "sh", *command]
    # The port takes keys as a terminal's only then.
    return on_terminal(words, *terminal.size(), os.environ.get("TERM", "vt100")) if terminal else words


def _end_on(stop: Stop, running: Guest, terminal: Terminal | None) -> None:
    while running.running():
        if stop.wait(0.2):
            if terminal is not None:
                terminal.close()  # before anything that may take its time
            running.kill()


def _debugged(running: Guest, err: Screen) -> None:
    def say(line: str, commands: str) -> None:
        text = f"vmodel: the guest waits for gdb to attach and continue:\n{line}\nwhich reads:\n{commands}"
        err.put("log", text.encode(errors="backslashreplace"))

    try:
        running.wait_for_gdb(say)
    except (MonitorError, ConfigError, OSError) as error:
        if running.running():  # else wait() says why it ended
            log.error("--gdb: %s", error)
            running.kill()


def _keys(listening: threading.Event, terminal: Terminal, running: Guest) -> None:
    if terminal.forward(running, listening):
        os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does it elsewhere


def _forward(listening: threading.Event, source: int, running: Guest) -> None:
    listening.wait()
    # The loop ends with the input or, by an OSError, with the guest.
    with contextlib.suppress(OSError):
        while data := os.read(source, 4096):
            running.send(data)


def summary(server: Server, machine: Machine, result: GuestResult) -> None:
    """Prints the counters of devices and IOMMUs on stderr."""
    stats = server.stats()
    table = Table("", *(f"[bold]{name}[/]" for name in stats), box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    for label, keys in (
        ("accesses by the guest", ["reads", "writes"]),
        ("  reads", ["reads"]),
        ("  writes", ["writes"]),
        ("  served in C, without Python", ["served"]),
        ("exits to Python", ["exits"]),
        ("DMA bytes, guest to device", ["dma_read_bytes"]),
        ("DMA bytes, device to guest", ["dma_write_bytes"]),
        ("DMA faults", ["dma_faults"]),
        ("IOTLB hits", ["iotlb_hits"]),
        ("IOTLB misses", ["iotlb_misses"]),
        ("stale translations used", ["stale"]),
        ("interrupts", ["interrupts"]),
    ):
        table.add_row(label, *(f"{sum(counters[key] for key in keys):,}" for counters in stats.values()))
    table.add_row("wall time, boot to power-off", f"{result.wall:.1f} s")
    show(table, console(sys.stderr))
    for iommu in machine.system.iommus:
        queue = iommu.faults
        lost = f", {queue.lost} of them lost: its queue holds {queue.depth}" if queue.lost else ""
        print(f"{iommu.name}: {queue.total} fault{'' if queue.total == 1 else 's'} recorded{lost}", file=sys.stderr)
        for record in queue.peek()[:8]:
            print(f"  {record}", file=sys.stderr)
