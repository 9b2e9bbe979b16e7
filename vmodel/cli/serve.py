"""vmodel serve, qemu-args; and what all commands that serve a machine share."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import shlex
import signal
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from vmodel import machine as machines
from vmodel import status
from vmodel.cli.output import Verbose, log_to_stderr
from vmodel.control import Control
from vmodel.errors import ConfigError
from vmodel.inject import Engine, FaultPlan, live, parse_rule
from vmodel.server import Server

MachinePath = Annotated[Path, typer.Argument(metavar="MACHINE.toml", help="The machine file.", show_default=False)]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        help="Where the sockets go; else $XDG_RUNTIME_DIR/vmodel/NAME, or a folder of yours in the temporary one.",
    ),
]


Plan = Annotated[
    Path | None, typer.Option("--plan", metavar="PLAN.toml", help="Faults to inject; see docs/injection.md.")
]
Faults = Annotated[
    list[str] | None,
    typer.Option("--fault", metavar="RULE", help="One fault more, as 'dma.write device=edu0 nth=3 do=partial(8)'."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="Instead of the plan's.")]


#: Seconds from a signal until the process ends in any case.
_PATIENCE = 1.8


class Stop:
    """SIGINT and SIGTERM as something to wait for; `number` is the signal that came, else 0."""

    def __init__(self) -> None:
        self.number = 0
        # A pipe, as a signal handler must not touch locks: threading.Event.set() may deadlock in one.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    def fileno(self) -> int:
        """Readable once a signal has come."""
        return self._reader

    def wait(self, timeout: float | None = None) -> bool:
        """Sleeps until a signal comes; whether one has."""
        return bool(select.select([self._reader], [], [], timeout)[0])

    def _came(self, number: int, _: object) -> None:
        if not self.number:
            # What does not end in time is shown by its stack and left behind; this needs no lock of Python's.
            faulthandler.dump_traceback_later(_PATIENCE, exit=True, file=2)
        self.number = self.number or number
        with contextlib.suppress(BlockingIOError):  # full: then it has been written to before
            os.write(self._writer, b"\0")

    @classmethod
    @contextlib.contextmanager
    def on_signals(cls) -> Iterator[Stop]:
        """Meanwhile the signals do nothing else."""
        stop = cls()
        before = {number: signal.signal(number, stop._came) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield stop
        finally:
            faulthandler.cancel_dump_traceback_later()
            for number, handler in before.items():
                # After one the process ends, with the exit status that it has by now: a second Ctrl-C is too late.
                signal.signal(number, signal.SIG_IGN if stop.number else handler)
            os.close(stop._reader)
            os.close(stop._writer)


def default_run_dir(name: str) -> Path:
    """$XDG_RUNTIME_DIR/vmodel/NAME, else one of this user's in the temporary folder."""
    base = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    # After `su` it may still name another user's.
    if base.is_absolute() and os.access(base, os.W_OK | os.X_OK) and base.stat().st_uid == os.getuid():
        return base / "vmodel" / name
    return Path(tempfile.gettempdir()) / f"vmodel-{os.getuid()}" / name


def prepare_run_dir(run_dir: Path | None, name: str) -> Path:
    """The folder for a machine's sockets, made if it is not there.  ConfigError."""
    folder = (run_dir or default_run_dir(name)).absolute()
    try:
        if run_dir is None:
            # Its place is known to all, so somebody else may have made it, to look at what devices are told.
            _make_private(folder.parent)
            _make_private(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"run directory {folder}: {error.strerror}: choose another --run-dir") from error
    return folder


def _make_private(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(f"run directory {folder}: is no folder that only you can write to: choose another --run-dir")


@contextlib.contextmanager
def loaded(path: Path) -> Iterator[machines.Machine]:
    """A machine and its devices."""
    machine = machines.load(path)
    try:
        yield machine
    finally:
        machine.close()
        if machine.left_behind:
            # The interpreter's own end would take memory away under that thread.
            sys.stdout.flush()
            os._exit(1)


def faults_of(plan: Path | None, faults: list[str] | None, seed: int | None) -> FaultPlan:
    """What the options say together; the rules of --fault come behind the file's.  ConfigError."""
    rules = [parse_rule(text) for text in faults or ()]
    found = FaultPlan() if plan is None else FaultPlan.load(plan)
    return found.extended(rules, seed)


@contextlib.contextmanager
def served(
    machine: machines.Machine, run_dir: Path | None, faults: FaultPlan | None = None
) -> Iterator[tuple[Server, Path]]:
    """A machine while it is served, faults and all: the server, and the folder of its sockets."""
    folder = prepare_run_dir(run_dir, machine.name)
    for name in machine.devices:
        machine.socket(name, folder)  # too long a path is best told of by the name of a device
    # The control socket first: whoever has it owns the machine's ACPI tables in the folder.
    journal = folder / f"{machine.name}.injections.jsonl"
    with (
        Engine(faults or FaultPlan(), machine.devices, path=journal) as engine,
        Control(folder, machine.name, {**status.commands(machine), **live.commands(engine)}),
    ):
        try:
            with machine.serve(folder) as server:
                yield server, folder
        finally:
            machine.remove_acpi(folder)
            if count := len(engine.journal):
                print(f"vmodel: {count} injection{'' if count == 1 else 's'}, see {journal}", file=sys.stderr)


def serve(
    path: MachinePath,
    run_dir: RunDir = None,
    plan: Plan = None,
    fault: Faults = None,
    seed: Seed = None,
    verbose: Verbose = False,
) -> None:
    """Serve a machine's devices until Ctrl-C or SIGTERM.

    Prints a line with name and socket for each device, then "ready".
    """
    log_to_stderr(verbose)
    faults = faults_of(plan, fault, seed)
    with Stop.on_signals() as stop, loaded(path) as machine, served(machine, run_dir, faults) as (_, folder):
        for name in machine.devices:
            print(f"{name} {machine.socket(name, folder)}", flush=True)
        print("ready", flush=True)
        stop.wait()


def qemu_args(path: MachinePath, run_dir: RunDir = None) -> None:
    """Print QEMU's arguments for a machine, quoted for a shell."""
    log_to_stderr(False)
    with loaded(path) as machine:
        print(shlex.join(machine.qemu_args((run_dir or default_run_dir(machine.name)).absolute())))
