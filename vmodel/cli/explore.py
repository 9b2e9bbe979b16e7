"""vmodel explore: searches faults for what no fault has reached yet."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from vmodel.campaign.matrix import opened
from vmodel.campaign.progress import ProgressBar
from vmodel.campaign.rig import GUESTS, LASTING_GUESTS, absolute, load_rig
from vmodel.campaign.runner import Runner, executor
from vmodel.campaign.store import ResultStore
from vmodel.campaign.sweep import CleanRunError
from vmodel.cli.campaign import Folder, Jobs, Retry, Sanitize, Scheduler, check_host, stored
from vmodel.cli.output import console, log_to_stderr
from vmodel.cli.serve import MachinePath
from vmodel.coverage.registry import programs
from vmodel.coverage.target import Target
from vmodel.device import PciDevice
from vmodel.devices.iommu import IommuDevice
from vmodel.errors import ConfigError
from vmodel.experiment.case import Case
from vmodel.explore.against import Against
from vmodel.explore.explorer import Exploration, Explorer, SearchBudget
from vmodel.explore.script import cycle
from vmodel.explore.summary import document
from vmodel.explore.text import text_of
from vmodel.guest.artifacts import KERNEL_HELP, find_kernel, find_qemu
from vmodel.guest.coverage import check_emulator
from vmodel.guest.kernel_code import CodeFinder, check_module, check_target
from vmodel.guest.modules import files_of, in_order, is_path, is_source
from vmodel.guest.options import at_option, guest_file, module_at, tool_at
from vmodel.guest.running import accelerator
from vmodel.interrupts import uncovered
from vmodel.machine import Machine

_UNITS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def explore(
    machine: MachinePath,
    driver: Annotated[
        list[str],
        typer.Option("--driver", metavar="M", help="The driver: a module, its source folder, or vmlinux:PREFIX."),
    ],
    workload: Annotated[str, typer.Option(metavar="SCRIPT", help="A shell script to run in the guest.")],
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="End after this time, as 30m, 90s or 2h.", show_default=False)
    ] = None,
    runs: Annotated[int | None, typer.Option(metavar="N", help="End after N plans.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="The same seed tries the same plans.")] = 0,
    random: Annotated[bool, typer.Option("--random", help="Search without feedback, to compare with.")] = False,
    wait_for: Annotated[
        str, typer.Option("--wait-for", metavar="PATH", help="The workload needs this path, as /dev/nvme0n1.")
    ] = "",
    suspend: Annotated[bool, typer.Option("--suspend", help="Suspend and resume the devices in each run.")] = False,
    bare: Annotated[
        bool, typer.Option("--bare", help="Load the driver at boot; do not load and remove it in each run.")
    ] = False,
    boot: Annotated[bool, typer.Option("--boot", help="Load the driver at boot, with faults from then on.")] = False,
    device: Annotated[
        list[str] | None, typer.Option("--device", metavar="NAME", help="Inject faults only at these devices.")
    ] = None,
    wild: Annotated[
        bool, typer.Option("--wild", help="Also faults that write where the driver has not allowed it.")
    ] = False,
    check: Annotated[
        str, typer.Option(metavar="SCRIPT", help="The script that checks the guest afterwards instead of the workload.")
    ] = "",
    kernel: Annotated[str | None, typer.Option(metavar="NAME|PATH", help=KERNEL_HELP)] = None,
    module: Annotated[list[str] | None, typer.Option("--module", metavar="M", help="A module to load at boot.")] = None,
    file: Annotated[
        list[str] | None,
        typer.Option("--file", metavar="F[:DEST]", help="A file for the guest, and its path there."),
    ] = None,
    tool: Annotated[
        list[str] | None, typer.Option("--tool", metavar="PACKAGE:PROGRAM", help="A Debian program for the guest.")
    ] = None,
    append: Annotated[str, typer.Option(metavar="STR", help="Additional kernel arguments.")] = "",
    sanitize: Sanitize = False,
    timeout: Annotated[float, typer.Option(metavar="S", help="Time limit of a run's script, in seconds.")] = 30.0,
    against: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Compare what was reached with this campaign's folder.")
    ] = None,
    form: Annotated[str, typer.Option("--format", metavar="FORMAT", help="Of the summary: text, json.")] = "text",
    rig: Annotated[
        str, typer.Option(metavar="FILE.py:CLASS", help="A class that runs cases instead of guests.")
    ] = LASTING_GUESTS,
    output: Folder = None,
    jobs: Jobs = 1,
    scheduler: Scheduler = None,
    retry: Retry = False,
) -> None:
    """Search for faults that reach new code of a driver.

    Each run loads the driver, does the workload and removes the driver, under a plan of one to three faults.  Plans
    that reach something new are varied.  After an interruption, the same command continues.  The exit status is 1 if a
    problem was found, or a run ended with a harness error.
    """
    log_to_stderr(False)
    limits = _budget(budget, runs)
    if not 0 < timeout < math.inf:
        raise ConfigError(f"--timeout {timeout:g}: must be more than 0 seconds, and have an end")
    if form not in ("text", "json"):
        raise ConfigError(f"--format {form}: formats are text, json")
    # Before the search: a damaged folder ends nothing then.
    other = None if against is None else Against.read(against)
    entries = [at_option("--driver", module_at, entry) for entry in driver if not entry.startswith("vmlinux:")]
    parts = [str(at_option("--driver", lambda text, _: Target.parse(text), e)) for e in driver if not _is_source(e)]
    rig = absolute(rig, Path())
    own = rig not in (GUESTS, LASTING_GUESTS)
    kernel = str(Path(kernel).absolute()) if kernel and "/" in kernel else kernel
    with opened(machine) as loaded:
        devices = _devices(loaded, device or ())
        names: list[str] = []
        if own:
            load_rig(rig)
        else:
            if scheduler is None:
                check_host({kernel}, tool or ())
                check_emulator(find_qemu(), accelerator())
            names = _modules(entries, loaded, kernel, [part for part in parts if part.startswith("vmlinux:")])
            parts = [*names, *(part for part in parts if part.startswith("vmlinux:"))]
        cycled = bool(names) and not (bare or boot)
        if not cycled and (suspend or wait_for):
            raise ConfigError(
                f"--{'suspend' if suspend else 'wait-for'}: needs a driver that each run loads, a module without"
                " --bare or --boot: do it in the workload instead"
            )
        script = cycle(names, workload, wait_for=wait_for, suspend=suspend) if cycled else workload
        again = cycle(names, check or workload, wait_for=wait_for) if cycled else check or workload
        extra = tuple(at_option("--module", module_at, entry) for entry in module or ())
        case = Case(
            machine=machine.absolute(),
            workload=script,
            kernel=kernel,
            check="" if own else again,
            arm="boot" if boot else "workload",
            files=tuple(at_option("--file", guest_file, text) for text in file or ()),
            modules=(*extra, *entries) if (bare or boot) and not own else extra,
            extra_modules=() if bare or boot or own else tuple(entries),
            tools=tuple(at_option("--tool", tool_at, entry) for entry in tool or ()),
            append=append,
            sanitize=sanitize,
            timeout=timeout,
            coverage=() if own else tuple(parts),
        )
        what = Exploration(case, devices, tuple(parts), seed=seed, feedback=not random, wild=wild, rig=rig)
        folder = output or Path(f"{machine.stem}-explore.runs")
        with _at_work(what, folder, jobs, scheduler, limits, retry) as explorer:
            said = document(explorer, explorer.store.rows(), jobs, other)
            sys.stdout.write(json.dumps(said, indent=1) + "\n" if form == "json" else text_of(said))
        if explorer.ended == "interrupted":
            raise typer.Exit(130)
        if explorer.finds or said["harness_errors"]:
            raise typer.Exit(1)


@contextlib.contextmanager
def _at_work(
    what: Exploration, folder: Path, jobs: int, scheduler: str | None, limits: SearchBudget, retry: bool
) -> Iterator[Explorer]:
    """Runs the search; then, also after Ctrl-C, its explorer is what the block gets.  OSError: the disk is full."""
    explorer: Explorer | None = None
    with stored(folder), ResultStore.create(folder, what.definition()) as store:
        if retry:
            store.reset_errors()
        try:
            with (
                uncovered(),
                ProgressBar(console(sys.stderr)) as bar,
                executor(what.rig, folder, jobs=jobs, scheduler=scheduler) as on,
            ):
                explorer = Explorer(what, store, Runner(store, on, bar), bar, limits)
                explorer.run()
        except KeyboardInterrupt:
            print("vmodel: interrupted: the same command continues", file=sys.stderr)
            if explorer is None or explorer.search is None:
                raise typer.Exit(130) from None
        except CleanRunError as error:
            print(f"vmodel: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
        assert explorer is not None
        yield explorer


def _budget(text: str | None, runs: int | None) -> SearchBudget:
    """The limits that --budget and --runs mean.  ConfigError: there is none, or one is nothing."""
    if runs is not None and runs < 1:
        raise ConfigError(f"--runs {runs}: must be at least 1")
    if text is None:
        if runs is None:
            raise ConfigError("say when the search ends: --budget 30m, or --runs 500")
        return SearchBudget(runs)
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) *(s|m|min|h)", text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not seconds:
        raise ConfigError(f"--budget {text}: must be a time of more than 0, as 30m, 90s or 2h")
    return SearchBudget(runs, seconds)


def _is_source(entry: str) -> bool:
    """Whether it is the source folder of a driver, which has no target of coverage by its own name."""
    return not entry.startswith("vmlinux:") and is_source(entry)


def _devices(machine: Machine, named: Sequence[str]) -> dict[str, PciDevice]:
    """The machine's devices of these names, by default all but IOMMUs, which are not what the driver drives.

    ConfigError: there is none of that name.
    """
    if unknown := set(named) - set(machine.devices):
        raise ConfigError(
            f"--device {', '.join(sorted(unknown))}: there is none in {machine.file}: devices are"
            f" {', '.join(machine.devices)}"
        )
    if not named:
        named = [name for name, device in machine.devices.items() if not isinstance(device, IommuDevice)]
    return {name: device for name, device in machine.devices.items() if name in named}


def _modules(entries: Sequence[str], machine: Machine, kernel: str | None, functions: Sequence[str]) -> list[str]:
    """The names of the drivers' modules, in the order in which they are loaded.

    A name may be that of a module of the machine file's.  `functions`: those of the kernel itself, as vmlinux:PREFIX.
    ConfigError: the kernel has no such module or function, or has the module built in.
    """
    table, base = machine.content.guest, machine.file.absolute().parent
    found = find_kernel(kernel or table.kernel)
    for entry in functions:
        at_option("--driver", lambda text, _: check_target(text, found), entry)
    own = [module_at(entry, base) for entry in (*table.modules, *table.extra_modules) if is_path(entry)]
    named = files_of(entries, found)
    files = files_of(own, found) if any(path is None for path in named.values()) else {}
    wanted = {name: path or files.get(name) for name, path in named.items()}
    programs.add_finder(CodeFinder([found], [path for path in wanted.values() if path is not None]))
    for name in (name for name, path in wanted.items() if path is None):
        at_option("--driver", lambda text, _: check_module(text, found, files), name)
    return [module.name for module in in_order(found, wanted) if module.name in wanted]
