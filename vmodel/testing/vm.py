"""`Vm`: boots guests with the machine of a test."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vmodel.dma_report import DmaFinding, DmaWatch
from vmodel.dma_report.watch import SETTLE
from vmodel.guest.artifacts import Kernel
from vmodel.guest.booted import BootedGuest
from vmodel.guest.options import spec_of
from vmodel.guest.running import Guest, GuestResult, GuestSpec
from vmodel.guest.served import Served
from vmodel.patience import patience
from vmodel.testing.coverage import MergedCoverage

#: For pytest: what fails here is shown at the line of the test that called.
__tracebackhide__ = True
#: CPUs of a test's guest, unless the machine file or the mark `guest` says otherwise: one CPU hides a driver's races.
_CPUS = 2


class Vm:
    """Boots guests with a test's machine."""

    def __init__(
        self,
        served: Served,
        kernel: Kernel,
        options: dict[str, Any],
        artifacts: Path,
        coverage: MergedCoverage | None = None,
        *,
        watch_dma: bool = False,
    ) -> None:
        """`coverage`: gets what the guests run, with `add_coverage`.  `watch_dma`: records for `dma_findings`."""
        #: The guests of `boot`.
        self.booted: list[BootedGuest] = []
        self._run: list[Guest] = []
        self._coverage = coverage
        self._watch_dma = watch_dma
        self._watches: list[DmaWatch] = []
        self._served = served
        self._kernel = kernel
        self._options = options
        self._artifacts = artifacts
        self._count = 0

    def spec(self, command: str, **options: Any) -> GuestSpec:
        """The GuestSpec of a guest; options are those of the mark `guest`, and take precedence over it.

        Both are added to the machine file's `[guest]` table.
        """
        merged = {**self._options, **options}
        table = self._served.machine.content.guest
        smp = smp_of(merged, table.cpus, table.qemu_args)
        args = [*smp, *merged.pop("qemu_args", ()), *self._served.qemu_args(merged.pop("without", ()))]
        made = spec_of(self._served.machine, args, self._kernel, command=command, **merged)
        if self._coverage is not None:
            theirs = self._coverage.of_guest(self._kernel, [*made.modules, *made.extra_modules])
            made.coverage = list(dict.fromkeys((*made.coverage, *theirs)))
        return made

    def logs(self) -> Path:
        """The folder for the logs of the test's next guest."""
        self._count += 1
        return self._artifacts / f"guest-{self._count}"

    def run(self, command: str, **options: Any) -> GuestResult:
        """Boots a guest, runs a shell script, and powers off.  GuestRunError: see its subclasses."""
        with Guest(self._watched(self.spec(command, **options)), artifacts=self.logs()) as guest:
            self._run.append(guest)
            return guest.wait()

    def boot(self, **options: Any) -> BootedGuest:
        """A guest that runs scripts; a context manager that boots it."""
        host = self._served.host_commands(lambda: guest.monitor)
        guest = BootedGuest(self._watched(self.spec("", **options)), artifacts=self.logs(), host=host)
        self.booted.append(guest)
        return guest

    def _watched(self, spec: GuestSpec) -> GuestSpec:
        """The same, whose guest's DMA is recorded if that is wanted."""
        if self._watch_dma:
            machine = self._served.machine
            watch = DmaWatch(machine.name, machine.system.endpoints)
            self._watches.append(watch)
            spec.on_end = partial(watch.seal, settle=patience(SETTLE))
        return spec

    def dma_findings(self) -> list[DmaFinding]:
        """What is wrong with the DMA of the guests, which have ended."""
        for watch in self._watches:
            watch.close()
        return [finding for watch in self._watches for _, finding in watch.report().findings]

    def add_coverage(self) -> None:
        """Passes on what the guests, which have ended, ran."""
        for guest in (*self._run, *(booted.guest for booted in self.booted)):
            if self._coverage is not None:
                self._coverage.add_guest(self._kernel.release, guest.coverage)


def smp_of(options: dict[str, Any], cpus: object, qemu_args: Sequence[str]) -> list[str]:
    """QEMU's arguments for the number of CPUs.  `options`: the mark's, of which `cpus` is removed.

    `cpus` and `qemu_args` are those of the machine file.  An `-smp` among QEMU's arguments is all that counts.
    """
    wanted = options.pop("cpus", None) or cpus or _CPUS
    return [] if "-smp" in (*qemu_args, *options.get("qemu_args", ())) else ["-smp", str(wanted)]
