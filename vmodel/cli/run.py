"""vmodel serve, run, qemu-args, guest."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

from vmodel import machine as machines
from vmodel.errors import ConfigError
from vmodel.server import Server
from vmodel.testing import artifacts
from vmodel.testing.guest import Guest, GuestSpec, writer

MachinePath = Annotated[Path, typer.Argument(metavar="MACHINE.toml", help="The machine file.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", metavar="DIR", help="Where the sockets go.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what devices and clients do.")]


def default_run_dir(name: str) -> Path:
    """$XDG_RUNTIME_DIR/vmodel/NAME, else one of this user's in the temporary folder."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    root = Path(base) / "vmodel" if base else Path(tempfile.gettempdir()) / f"vmodel-{os.getuid()}"
    return root / name


def _prepare(run_dir: Path) -> Path:
    """The folder, made for this user alone; ConfigError when it is someone else's."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        if run_dir.stat().st_uid != os.getuid() or run_dir.parent.stat().st_uid not in (0, os.getuid()):
            raise ConfigError(f"{run_dir} belongs to another user: choose another --run-dir")
    except OSError as error:
        raise ConfigError(f"run directory {run_dir}: {error.strerror}") from error
    return run_dir.absolute()


def _log(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.WARNING,
        format="%(message)s",
        datefmt="%H:%M:%S",
        handlers=[RichHandler(console=Console(stderr=True), show_path=False)],
    )


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set."""
    stop = threading.Event()
    before = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _served(path: Path, run_dir: Path | None) -> Iterator[tuple[machines.Machine, Server, Path]]:
    """A machine while it is served."""
    machine = machines.load(path)
    try:
        folder = _prepare(run_dir or default_run_dir(machine.name))
        with machine.serve(folder) as server:
            yield machine, server, folder
    finally:
        machine.close()


def serve(machine: MachinePath, run_dir: RunDir = None, verbose: Verbose = False) -> None:
    """Serve a machine's devices, one socket each, until Ctrl-C."""
    _log(verbose)
    with _stop_on_signals() as stop, _served(machine, run_dir) as (loaded, _, folder):
        for name in loaded.devices:
            print(f"{name} {loaded.socket(name, folder)}", flush=True)
        print("ready", flush=True)
        stop.wait()


def qemu_args(machine: MachinePath, run_dir: RunDir = None) -> None:
    """Print QEMU's arguments for a machine, quoted for a shell."""
    loaded = machines.load(machine)
    try:
        folder = (run_dir or default_run_dir(loaded.name)).absolute()
        print(shlex.join(loaded.qemu_args(folder)))
    finally:
        loaded.close()


def run(
    machine: MachinePath,
    arguments: Annotated[list[str] | None, typer.Argument(metavar="[-- QEMU ARGS]", help="More for QEMU.")] = None,
    run_dir: RunDir = None,
    verbose: Verbose = False,
) -> None:
    """Serve a machine and run QEMU with it; the exit status is QEMU's."""
    _log(verbose)
    qemu = artifacts.find_qemu()
    with _served(machine, run_dir) as (loaded, _, folder):
        line = [str(qemu.path), *loaded.qemu_args(folder), *(arguments or [])]
        process = subprocess.Popen(line)
        # Ctrl-C in a terminal reaches QEMU as well; a SIGTERM does not.
        with _stop_on_signals() as stop:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(0.2)
                    break
                if stop.is_set():
                    process.terminate()
    raise typer.Exit(status if status >= 0 else 128 - status)


def guest(
    machine: MachinePath,
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND…", help="What to run in the guest.")],
    kernel: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="6.12, 7.2, or the path of a vmlinuz.")
    ] = None,
    module: Annotated[list[str] | None, typer.Option(metavar="M", help="A kernel module to load.")] = None,
    file: Annotated[
        list[str] | None, typer.Option(metavar="F[:DEST]", help="A file to put into the guest, at /root/NAME.")
    ] = None,
    append: Annotated[str, typer.Option(metavar="STR", help="More kernel arguments.")] = "",
    timeout: Annotated[float, typer.Option(metavar="S", help="Seconds for the whole run.")] = 300.0,
    artifacts_dir: Annotated[
        Path | None, typer.Option("--artifacts", metavar="DIR", help="Keep the logs there.")
    ] = None,
    run_dir: RunDir = None,
    stats: Annotated[bool, typer.Option("--stats", help="At the end, say what the devices saw.")] = False,
    verbose: Verbose = False,
) -> None:
    """Run a command in a stock guest with a machine's devices; the exit status is the command's."""
    _log(verbose)
    files = [_file(text) for text in file or ()]
    if timeout <= 0:
        raise ConfigError(f"--timeout {timeout}: must be more than 0 seconds")
    qemu, image = artifacts.find_qemu(), artifacts.find_kernel(kernel)
    with _stop_on_signals() as stop, _served(machine, run_dir) as (loaded, server, folder):
        spec = GuestSpec(
            command=command,
            kernel=image,
            modules=module or (),
            files=files,
            append=append,
            qemu_args=loaded.qemu_args(folder),
            timeout=timeout,
            qemu=qemu,
        )
        console = Console(stderr=True)
        waiting = console.status(f"booting {image.release}") if console.is_terminal else contextlib.nullcontext()
        out = writer(sys.stdout.fileno())
        with waiting as spinner:

            def show(data: bytes) -> None:
                if spinner is not None:
                    spinner.stop()
                out(data)

            with Guest(spec, artifacts=artifacts_dir, on_output=show) as running:
                threading.Thread(target=_end_when, args=(stop, running), daemon=True).start()
                result = running.wait()
        if stats:
            summary(console, server, result.wall)
    raise typer.Exit(result.status)


def _end_when(stop: threading.Event, running: Guest) -> None:
    stop.wait()
    if running.running():
        running.kill()


def _file(text: str) -> tuple[Path, str]:
    source, colon, target = text.partition(":")
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"--file {text}: there is no file {source}")
    return path, target if colon else f"root/{path.name}"


def summary(console: Console, server: Server, wall: float) -> None:
    """What the devices saw, for people."""
    for name, s in server.stats().items():
        accesses = s["reads"] + s["writes"]
        console.print(f"[bold]{name}[/bold]")
        for label, value in (
            ("accesses", f"{accesses:,} ({s['reads']:,} reads, {s['writes']:,} writes)"),
            ("served without Python", f"{s['served']:,}"),
            ("exits to Python", f"{s['exits']:,}"),
            ("DMA read by the device", f"{s['dma_read_bytes']:,} bytes in {s['dma_read_ops']:,} operations"),
            ("DMA written by the device", f"{s['dma_write_bytes']:,} bytes in {s['dma_write_ops']:,} operations"),
            ("DMA faults", f"{s['dma_faults']:,}"),
            ("interrupts", f"{s['interrupts']:,}"),
        ):
            console.print(f"  {label:<26} {value}", highlight=False)
    console.print(f"wall time                    {wall:.1f} s", highlight=False)
