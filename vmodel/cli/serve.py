"""vmodel serve and qemu-args, and code shared by all commands that serve a machine."""

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
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from vmodel import calls, status
from vmodel import machine as machines
from vmodel.cli.complete import machine_files
from vmodel.cli.output import Verbose, log_to_stderr
from vmodel.control import Control
from vmodel.errors import ConfigError
from vmodel.inject import Engine, FaultPlan, live, parse_rule
from vmodel.iommu.domain import DomainType
from vmodel.server import Server
from vmodel.trace import Trace, Wanted, log_verbosely

MachinePath = Annotated[
    Path,
    typer.Argument(metavar="MACHINE.toml", help="The machine file.", show_default=False, autocompletion=machine_files),
]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir",
        metavar="DIR",
        help="Folder of the sockets; by default $XDG_RUNTIME_DIR/vmodel/NAME, or one in the temporary folder.",
    ),
]


Plan = Annotated[
    Path | None, typer.Option("--plan", metavar="PLAN.toml", help="Faults to inject; see docs/injection.md.")
]
Faults = Annotated[
    list[str] | None,
    typer.Option("--fault", metavar="RULE", help="Another fault, as 'dma.write device=edu0 nth=3 do=partial(8)'."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", min=0, help="Use this seed instead of the plan's.")]


Devices = Annotated[
    list[str] | None,
    typer.Option("--device", metavar="NAME", help="With -v or -f, only events of this device; repeatable."),
]
Registers = Annotated[
    list[str] | None,
    typer.Option("--register", metavar="NAME", help="With -v or -f, only accesses to this register; repeatable."),
]

DebugModel = Annotated[
    bool,
    typer.Option("--debug-model", help="Let hooks take as long as a debugger, such as breakpoint(), needs."),
]


#: Seconds after a signal until the process is ended by force.
_PATIENCE = 1.8


class Stop:
    """Waits for SIGINT and SIGTERM.  `number` is the signal that arrived, 0 before."""

    def __init__(self) -> None:
        self.number = 0
        # A pipe that Python's own C handler writes to.  A handler in Python would come too late: it runs between two
        # bytecodes, so a signal that arrives just before select() blocks would only be seen after it.
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)

    def fileno(self) -> int:
        """A descriptor that is readable after a signal has arrived."""
        return self._reader

    def wait(self, timeout: float | None = None) -> bool:
        """Blocks until a signal arrives, at most `timeout` seconds; returns whether one has arrived."""
        return bool(select.select([self._reader], [], [], timeout)[0])

    def _came(self, number: int, _: object) -> None:
        if not self.number:
            # If the process does not end in time, this prints all stacks and exits.  It needs no lock of Python's, and
            # nothing cancels it: it covers what comes after the context, and the shutdown of the interpreter.
            faulthandler.dump_traceback_later(_PATIENCE, exit=True, file=2)
        self.number = self.number or number

    @classmethod
    @contextlib.contextmanager
    def on_signals(cls) -> Iterator[Stop]:
        """Within this context, both signals only set the Stop that it yields; the process must end soon after one."""
        stop = cls()
        wakeup = signal.set_wakeup_fd(stop._writer, warn_on_full_buffer=False)  # full, it is readable as well
        before = {number: signal.signal(number, stop._came) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield stop
        finally:
            for number, handler in before.items():
                # After a signal the process is ending, and its exit status is set: a second Ctrl-C must not change it.
                signal.signal(number, signal.SIG_IGN if stop.number else handler)
            signal.set_wakeup_fd(wakeup)
            os.close(stop._reader)
            os.close(stop._writer)


def default_run_dir(name: str) -> Path:
    """$XDG_RUNTIME_DIR/vmodel/NAME, or a folder of this user in the temporary folder."""
    base = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    # After `su` the variable may still name another user's folder.
    if base.is_absolute() and os.access(base, os.W_OK | os.X_OK) and base.stat().st_uid == os.getuid():
        return base / "vmodel" / name
    return Path(tempfile.gettempdir()) / f"vmodel-{os.getuid()}" / name


def prepare_run_dir(run_dir: Path | None, name: str) -> Path:
    """The folder for a machine's sockets, created if it does not exist.

    ConfigError: it cannot be created, or it is a default folder that other users can write to.
    """
    folder = (run_dir or default_run_dir(name)).absolute()
    try:
        if run_dir is None:
            # The path is predictable: another user may have created it to read the devices' traffic.
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
        raise ConfigError(
            f"run directory {folder}: must be a folder that only you can write to: choose another --run-dir"
        )


#: Set when a device's thread did not end.  Normal interpreter exit would free memory that it still uses.
abandoned = threading.Event()


def leave(status: int) -> NoReturn:
    """Ends the process without the interpreter's shutdown, after `abandoned`; never with status 0."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status or 1)


@contextlib.contextmanager
def loaded(path: Path, default_domain: DomainType = DomainType.IDENTITY) -> Iterator[machines.Machine]:
    """A machine and its devices, closed on exit.  ConfigError: the machine file is wrong."""
    machine = machines.load(path, default_domain=default_domain)
    try:
        yield machine
    finally:
        machine.close()
        if machine.abandoned:
            abandoned.set()


def faults_of(plan: Path | None, faults: list[str] | None, seed: int | None) -> FaultPlan:
    """The plan of the options together; the rules of --fault come after the file's.  ConfigError."""
    rules = [parse_rule(text) for text in faults or ()]
    found = FaultPlan() if plan is None else FaultPlan.load(plan)
    return found.extended(rules, seed)


def traced(verbose: bool, device: list[str] | None, register: list[str] | None) -> Wanted | None:
    """The events that --verbose logs; None: none.  ConfigError: --device or --register without --verbose."""
    for name, given in (("--device", device), ("--register", register)):
        if given and not verbose:
            raise ConfigError(f"{name}: only with --verbose")
    return Wanted(tuple(device or ()), tuple(register or ())) if verbose else None


@contextlib.contextmanager
def served(
    machine: machines.Machine,
    run_dir: Path | None,
    faults: FaultPlan | None = None,
    wanted: Wanted | None = None,
    *,
    debug: bool = False,
) -> Iterator[tuple[Server, Path]]:
    """Serves a machine, with `faults` armed; yields the server and the folder of its sockets.  ConfigError.

    `wanted`: the events to log.  `debug`: as of `Machine.serve`.
    """
    folder = prepare_run_dir(run_dir, machine.name)
    for name in machine.devices:
        machine.socket(name, folder)  # reports a path that is too long, with the device's name
    # The control socket first: its owner also owns the machine's ACPI tables in the folder.
    journal = folder / f"{machine.name}.injections.jsonl"
    with (
        Engine(faults or FaultPlan(), machine.devices, path=journal) as engine,
        Trace(machine.devices, engine.started) as trace,
        Control(
            folder,
            machine.name,
            {**status.commands(machine), **live.commands(engine), **trace.commands()},
            slow=calls.commands(machine.devices),
        ),
    ):
        engine.journal.listeners.append(trace.injected)
        if wanted is not None:
            trace.follow(wanted, log_verbosely)
        try:
            _remove(journal)  # of an earlier run: this one may inject nothing
            with machine.serve(folder, debug=debug) as server:
                try:
                    yield server, folder
                finally:
                    _say_unfired(engine)
            trace.drain()
        finally:
            machine.remove_acpi(folder)
            if count := len(engine.journal):
                print(f"vmodel: {count} injection{'' if count == 1 else 's'}, see {journal}", file=sys.stderr)


def _remove(journal: Path) -> None:
    try:
        journal.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"{journal}: cannot be removed: {error.strerror}: choose another --run-dir") from error


def _say_unfired(engine: Engine) -> None:
    """A plan that had no effect looks like a driver that survived it."""
    for rule in engine.describe():
        if not rule["fired"]:
            count = rule["matched"]
            events = f"{count} event{'' if count == 1 else 's'}"
            print(f"vmodel: {rule['name']} never fired: it matched {events}", file=sys.stderr)


def serve(
    path: MachinePath,
    run_dir: RunDir = None,
    plan: Plan = None,
    fault: Faults = None,
    seed: Seed = None,
    debug_model: DebugModel = False,
    verbose: Verbose = False,
    device: Devices = None,
    register: Registers = None,
) -> None:
    """Serve a machine's devices until Ctrl-C or SIGTERM.

    For each device it prints a line with name and socket, then "ready".
    """
    log_to_stderr(verbose)
    wanted = traced(verbose, device, register)
    faults = faults_of(plan, fault, seed)
    with (
        Stop.on_signals() as stop,
        loaded(path) as machine,
        served(machine, run_dir, faults, wanted, debug=debug_model) as (_, folder),
    ):
        for name in machine.devices:
            print(f"{name} {machine.socket(name, folder)}", flush=True)
        print("ready", flush=True)
        stop.wait()


def qemu_args(path: MachinePath, run_dir: RunDir = None, debug_model: DebugModel = False) -> None:
    """Print QEMU's arguments for a machine, quoted for a shell."""
    log_to_stderr(False)
    with loaded(path) as machine:
        print(shlex.join(machine.qemu_args((run_dir or default_run_dir(machine.name)).absolute(), debug=debug_model)))
