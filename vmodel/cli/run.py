"""vmodel run."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
from typing import Annotated

import typer

from vmodel.cli import ending
from vmodel.cli.output import Verbose, log_to_stderr
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
from vmodel.guest import artifacts
from vmodel.guest.keeper import Keeper

Arguments = Annotated[
    list[str] | None,
    typer.Argument(metavar="[-- QEMU ARGS]", help="Additional arguments for QEMU.", show_default=False),
]

#: Seconds for QEMU to end after SIGTERM.
_PATIENCE = 1.0


def run(
    path: MachinePath,
    arguments: Arguments = None,
    run_dir: RunDir = None,
    plan: Plan = None,
    fault: Faults = None,
    seed: Seed = None,
    debug_model: DebugModel = False,
    verbose: Verbose = False,
    device: Devices = None,
    register: Registers = None,
) -> None:
    """Serve a machine and run QEMU with it.

    The exit status is QEMU's, or one of vmodel's own:

    \b
      2    The machine file or the command line is wrong.
     70    A model raised an exception, or did not return; QEMU's status was 0.
    125    vmodel or the host failed, or QEMU cannot be started.
    128+N  Signal N ended QEMU.
    """
    log_to_stderr(verbose)
    wanted = traced(verbose, device, register)
    faults = faults_of(plan, fault, seed)
    with Stop.on_signals() as stop, loaded(path) as machine:
        qemu = artifacts.find_qemu()
        with served(machine, run_dir, faults, wanted, debug=debug_model) as (_, folder):
            line = [str(qemu.path), *machine.qemu_args(folder, debug=debug_model), *(arguments or [])]
            process = subprocess.Popen(line)
            with Keeper(process):
                status = _wait(process, stop)
        found = [ending.Kind.MODEL] if ending.model_errors(machine) else []
        status = ending.status_of(status, found, found)
    raise typer.Exit(status if status >= 0 else 128 - status)


def _wait(process: subprocess.Popen[bytes], stop: Stop) -> int:
    """Waits for QEMU; returns its status.  A signal to this process ends QEMU.

    (Ctrl-C in a terminal also reaches QEMU directly.)
    """
    ended = os.pidfd_open(process.pid)
    try:
        select.select([ended, stop.fileno()], [], [])
        if stop.number:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                return process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
        return process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    finally:
        os.close(ended)
