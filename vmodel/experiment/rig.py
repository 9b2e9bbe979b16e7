"""Runs cases one after the other, in a guest that is shared until a case may have disturbed it."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import logging
import platform
import shlex
import time
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from vmodel.closing import Closing
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.errors import CoverageError
from vmodel.dma_report import DmaReport, DmaWatch
from vmodel.dma_report.finding import signs_of
from vmodel.dma_report.watch import SETTLE
from vmodel.errors import ConfigError
from vmodel.experiment import kernel_log
from vmodel.experiment.case import Case, Result
from vmodel.experiment.oracle import (
    Effect,
    Finding,
    Outcome,
    classify,
    of_dma,
    of_status,
    time_to_detect,
    time_to_recover,
)
from vmodel.guest.artifacts import Qemu, find_qemu
from vmodel.guest.booted import BEGIN, BootedGuest, Done
from vmodel.guest.hang import Examiner
from vmodel.guest.kernel_lines import lines_of, merged
from vmodel.guest.modules import is_path
from vmodel.guest.monitor import MonitorError
from vmodel.guest.options import files_in, module_files, spec_of
from vmodel.guest.running import GuestOff, GuestPanic, GuestRunError, GuestTimeout, ModuleError
from vmodel.guest.served import Served
from vmodel.inject import Engine, FaultPlan
from vmodel.patience import patience, spoken

#: The most records of the journal in a result.
_MOST_INJECTIONS = 1000
#: For so many seconds it is seen which code a guest that hangs still runs; the most functions that are named.
_WINDOW = 0.5
_MOST_NAMES = 3


def run(case: Case, folder: Path) -> Result:
    """Runs a case in a guest of its own.  The artefacts go to `folder`, which is created if it does not exist.

    ConfigError: machine, plan, files or kernel are missing or wrong.  Every other failure is a `Result`.
    """
    with Rig() as rig:
        return rig.run(case, folder)


class Rig(Closing):
    """Runs cases one after the other; a context manager that ends its guest.

    A case runs in the same guest as the case before it if machine, kernel, modules, files and arguments are the same.
    A process may run one case at a time: log records of models are assigned to a case by their devices' names.
    """

    def __init__(self, reuse: Collection[Outcome] = (Outcome.NOT_ACTIVATED, Outcome.MASKED)) -> None:
        """`reuse`: the outcomes after which a guest is used again; by default those without a visible effect."""
        self._reuse = frozenset(reuse)
        self._setup: _Setup | None = None

    def run(self, case: Case, folder: Path) -> Result:
        """Runs a case; its artefacts go to `folder`.  ConfigError: see the function `run`."""
        began = time.monotonic()
        key = _key(case)
        if self._setup is not None and (case.fresh or case.arm == "boot" or self._setup.key != key):
            self.close()
        if self._setup is None:
            self._setup = _Setup(case, key)
        trial = _Trial(case, self._setup, folder)
        try:
            trial.run()
            result = trial.result(began)
        except BaseException:
            self.close()
            raise
        if case.arm == "boot" or self._setup.is_worn or trial.unfinished or not self._is_reusable(result):
            self.close()
        return result

    def _is_reusable(self, result: Result) -> bool:
        """Whether the next case may run in the guest of this result."""
        return result.outcome in self._reuse

    def close(self) -> None:
        """Ends the guest, if one runs."""
        setup, self._setup = self._setup, None
        if setup is not None:
            setup.close()


class LastingRig(Rig):
    """Uses a guest again also after a failure, if the check afterwards, without faults, succeeded.

    For cases that load the driver and remove it: then a new guest for each says little more, and takes much longer.
    """

    def _is_reusable(self, result: Result) -> bool:
        survived = result.outcome in (Outcome.RECOVERED, Outcome.FAILED) and result.check_status == 0
        return super()._is_reusable(result) or survived


def _key(case: Case) -> Hashable:
    """The properties of a guest that the case depends on: cases with equal keys may share a guest."""

    def version(path: Path) -> Hashable:
        try:
            found = path.stat()
        except OSError as error:
            raise ConfigError(f"cannot be read: {error.strerror}", file=path) from error
        return path.absolute(), found.st_mtime_ns, found.st_size

    placed = [(f, "") if isinstance(f, Path) else f for f in case.files]
    files = tuple((version(file), place) for path, place in placed for file in files_in(path))
    own = filter(is_path, (*case.modules, *case.extra_modules))
    modules = tuple(version(file) for entry in own for file in module_files(entry))
    boot = (
        case.kernel,
        case.modules,
        case.extra_modules,
        case.tools,
        case.append,
        case.sanitize,
        case.qemu_args,
        case.boot_timeout,
    )
    return version(case.machine), files, modules, boot, case.coverage


class _Setup:
    """A served machine, and a guest with it."""

    def __init__(self, case: Case, key: Hashable) -> None:
        """Serves the machine; `boot` boots the guest.  ConfigError: machine, kernel or QEMU are missing or wrong."""
        self.key = key
        self.qemu: Qemu = find_qemu()
        self.served = Served(case.machine)
        #: The number of cases that the guest has run.
        self.count = 0
        self.booted = False
        try:
            spec = spec_of(
                self.served.machine,
                [*case.qemu_args, *self.served.qemu_args()],
                case.kernel,
                command="",
                modules=case.modules,
                extra_modules=case.extra_modules,
                tools=case.tools,
                files=case.files,
                append=case.append,
                sanitize=case.sanitize,
                timeout=case.boot_timeout,
                qemu=self.qemu,
                coverage=case.coverage,
            )
        except ConfigError:
            self.served.close()
            raise
        assert spec.kernel is not None
        self.kernel = spec.kernel
        self.guest = BootedGuest(spec, host=self.served.host_commands(lambda: self.guest.monitor))

    def boot(self) -> None:
        """Boots the guest, unless it has booted.  GuestRunError, MonitorError."""
        if not self.booted:
            self.guest.start()
            self.booted = True
            self.guest.monitor.execute("query-status")  # connects, so that panics are reported

    @property
    def is_worn(self) -> bool:
        """Whether there is little place left to record coverage."""
        return self.guest.guest.coverage is not None and self.guest.guest.coverage.nearly_full

    def close(self) -> None:
        self.guest.close()
        self.served.close()


class _Log(logging.Handler):
    """Collects the warnings and errors of these devices' models and of the server."""

    def __init__(self, devices: Collection[str]) -> None:
        super().__init__(logging.WARNING)
        self._devices = devices
        self.records: list[tuple[float, logging.LogRecord]] = []

    def emit(self, record: logging.LogRecord) -> None:
        model = record.name.removeprefix("vmodel.device.")
        if model == record.name or model in self._devices:
            self.records.append((time.monotonic(), record))

    def __enter__(self) -> Self:
        logging.getLogger("vmodel").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("vmodel").removeHandler(self)


@dataclass
class _Armed:
    """An armed plan.  Times are in seconds, of time.monotonic()."""

    engine: Engine
    #: When it was armed: times in its records count from then.
    at: float
    #: When the first fault was injected.
    first: float | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    rules: list[dict[str, Any]] = field(default_factory=list)
    #: Whether events were held back when it was disarmed: they may come, or be missing, in the next case.
    unfinished: bool = False

    def record(self, record: dict[str, Any]) -> None:
        """Keeps a record of the journal, up to _MOST_INJECTIONS."""
        if self.first is None:
            self.first = self.at + float(record["t"])
        if len(self.records) < _MOST_INJECTIONS:
            self.records.append(record)

    def disarm(self) -> None:
        if not self.rules:
            self.rules = self.engine.describe()
        self.unfinished |= self.engine.unfinished
        self.engine.close()


class _Trial:
    """The run of one case."""

    def __init__(self, case: Case, setup: _Setup, folder: Path) -> None:
        self.case = case
        self.setup = setup
        self.guest = setup.guest
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.artefacts: dict[str, str] = {}
        self.findings: list[Finding] = []
        self.armed: _Armed | None = None
        self.done: Done | None = None
        #: What ran of the kernel code that the case names.
        self.coverage: Coverage | None = None
        self.check: Done | None = None
        #: Records the DMA, if the case asks for it.
        self.watch: DmaWatch | None = None
        self.log = _Log(setup.served.machine.devices)
        self.mark = 0
        self.dmesg = ""
        #: If the guest hangs: its blocked tasks, and where its CPUs are.
        self.hang: list[str] = []
        #: Whether it has been asked for the blocked tasks.
        self.examined = False
        self.start = time.monotonic()
        self._write("case", "case.json", case.model_dump_json(indent=1) + "\n")
        setup.count += 1
        self.nth = setup.count

    def _write(self, what: str, name: str, content: str | bytes) -> None:
        (self.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        self.artefacts[what] = name

    def _found(self, oracle: str, effect: Effect, sign: str, text: str, at: float | None = None) -> None:
        when = None if at is None else at - self.start
        signature = f"{oracle} {sign}"
        if effect is Effect.HARNESS:
            signature += f": {kernel_log.normal(text.partition(chr(10))[0])}"
        self.findings.append(
            Finding(oracle=oracle, effect=effect, sign=sign, text=text, signature=signature, at=when, last=when)
        )

    @property
    def unfinished(self) -> bool:
        """Whether its faults may still have effects in another case of the same guest."""
        return self.armed is not None and self.armed.unfinished

    # ---- running ----------------------------------------------------------------------------

    def _arm(self) -> None:
        plan = self.case.seeded() or FaultPlan()
        path = self.folder / "injections.jsonl"
        path.unlink(missing_ok=True)
        for device in self.setup.served.machine.devices.values():
            # A case before it may have removed the driver: the phases are then those of a new guest.
            device.points.begin()
        at = time.monotonic()
        self.armed = _Armed(Engine(plan, self.setup.served.machine.devices, path=path), at)
        self.armed.engine.journal.listeners.append(self.armed.record)

    def run(self) -> None:
        """Boots a guest if none runs, runs workload and check, and collects the kernel's log."""
        with self.log:
            try:
                if self.case.arm == "boot":
                    self._watch_dma()
                    self._arm()
                elif not self.setup.booted:
                    # Reports a mistake in the plan before the boot.
                    Engine(self.case.seeded() or FaultPlan(), self.setup.served.machine.devices).close()
                if self._booted():
                    self._work()
                    self._collect()
            finally:
                if self.armed is not None:
                    self.armed.disarm()
                if self.watch is not None:
                    self.watch.close()

    def _watch_dma(self) -> None:
        if self.case.watches_dma and self.watch is None:
            machine = self.setup.served.machine
            self.watch = DmaWatch(machine.name, machine.system.endpoints)

    def _booted(self) -> bool:
        try:
            self.setup.boot()
            self.mark = 0 if self.case.arm == "boot" else self.guest.mark()
            if self.case.arm != "boot":
                self.guest.clear()
        except MonitorError as error:
            self._found("qmp", Effect.HARNESS, "qemu", str(error))
        except GuestRunError as error:
            self._ended("boot", error)
        else:
            return True
        return False

    def _ended(self, oracle: str, error: GuestRunError) -> None:
        """Adds the finding for a guest that has ended too early."""
        text, now = str(error), time.monotonic()
        if oracle == "boot" and self.case.arm != "boot":
            self._found(oracle, Effect.HARNESS, "boot", text, now)
        elif isinstance(error, GuestPanic):
            self._found(oracle, Effect.CRASH, "panic", text.partition("\n")[0], now)
        elif isinstance(error, GuestOff):
            self._found(oracle, Effect.CRASH, "off", "the guest powered off, without a panic", now)
        elif isinstance(error, GuestTimeout):
            self.hang += [line.strip() for line in text.splitlines()[1:]]
            text = f"the guest did not boot in {spoken(self.case.boot_timeout)}"
            self._found(oracle, Effect.HANG, "boot", text, now)
        elif isinstance(error, ModuleError):
            self._found(oracle, Effect.ERROR, "module", text.partition(";")[0], now)
        else:
            self._found("qemu", Effect.HARNESS, "qemu", text, now)

    def _work(self) -> None:
        self._watch_dma()
        if self.armed is None:
            self._arm()
        recorded = self.guest.guest.coverage
        if recorded is not None and self.case.arm != "boot":
            recorded.clear()
        self.done = done = self.guest.run(self.case.workload, self.case.timeout, examine=False)
        self._take_coverage()
        self.start = done.started
        self._judge("status", done)
        if self._hangs():
            # Before the device behaves again: a driver that waits for it may go on then.
            self._polling()
            self._examine(self._blocked)
        if self.armed is not None:
            self.armed.disarm()
        if self.case.check and done.status is not None:
            self.check = self.guest.run(self.case.check, self.case.timeout, examine=False)
            self._judge("check", self.check)
        if self.watch is not None:
            self.watch.seal(settle=patience(SETTLE))

    def _take_coverage(self) -> None:
        recorded = self.guest.guest.coverage
        if recorded is not None and self.coverage is None:
            self.coverage = recorded.taken()

    def _polling(self) -> None:
        """Adds a finding for code that a guest runs again and again while it hangs."""
        recorded = self.guest.guest.coverage
        if recorded is None:
            return
        try:
            recorded.clear()
            time.sleep(patience(_WINDOW))
            runs = sorted({name for _, name in recorded.taken().functions_reached()})
        except CoverageError as error:
            self.hang.append(f"which code still runs is unknown: {error}")
            return
        if runs:
            more = f" and {len(runs) - _MOST_NAMES} more" if len(runs) > _MOST_NAMES else ""
            names = ", ".join(f"{name}()" for name in runs[:_MOST_NAMES]) + more
            self.hang.append(f"still runs: {names}")
            now = time.monotonic() - self.start
            self.findings.append(
                Finding(
                    oracle="coverage",
                    effect=Effect.NOTICED,
                    sign="polling",
                    text=f"while it hung, {names} still ran",
                    signature=f"polling: {names}",
                    at=now,
                    last=now,
                )
            )

    def _judge(self, oracle: str, done: Done) -> None:
        at = done.ended - self.start
        if done.status is not None:
            if (found := of_status(oracle, done.status, at)) is not None:
                self.findings.append(found)
        elif self.guest.guest.running() and done.ended - done.started >= patience(self.case.timeout):
            what = "the workload" if oracle == "status" else "the check"
            self._found("time", Effect.HANG, oracle, f"{what} did not end in {spoken(self.case.timeout)}", done.ended)

    def _collect(self) -> None:
        """Fetches the kernel's log, and checks whether the guest still answers; examines it if it hangs."""
        try:
            if self._hangs() and not self.examined:
                self._examine(self._blocked)
            self.dmesg = self.guest.dmesg()
        except GuestRunError as error:
            if not self.guest.guest.running():
                self._ended("guest", error)
            elif not self._hangs():
                self._found("time", Effect.HANG, "guest", "the guest no longer answers", time.monotonic())
        if self._hangs() and self.guest.guest.running():
            # After the log: what the kernel prints about its CPUs is no warning of a driver.
            self._examine(self._cpus)
        for at, name, data in list(self.guest.monitor.events):
            if at >= self.start and name == "GUEST_PANICKED":
                self._found("qmp", Effect.CRASH, "panic", f"{name} {data.get('info', '')}".strip(), at)

    def _hangs(self) -> bool:
        return any(finding.effect is Effect.HANG for finding in self.findings)

    def _examine(self, how: Callable[[Examiner], Sequence[str]]) -> None:
        try:
            self.hang += how(self.guest.guest.examiner())
        except MonitorError as error:
            self.hang.append(f"QEMU does not answer: {error}")

    def _blocked(self, examiner: Examiner) -> Sequence[str]:
        self.examined = True
        return [f"blocked: {task}" for task in examiner.blocked()]

    def _cpus(self, examiner: Examiner) -> Sequence[str]:
        cpus = examiner.cpus(nmi=False)
        self._write("registers", "registers.log", cpus.registers)
        return cpus.lines

    # ---- the result -------------------------------------------------------------------------

    def _of_kernel(self) -> list[Finding]:
        lines = merged(self.guest.lines(self.mark), lines_of(self.dmesg, "kernel log"))
        relative = [replace(line, at=None if line.at is None else line.at - self.start) for line in lines]
        begin = next((n for n, line in enumerate(relative) if line.text.startswith(BEGIN)), len(relative))
        # Each boot has many warnings that indicate no problem.
        boot = kernel_log.findings(relative[:begin], unknown=False, where=self.guest.guest.places.of)
        after = kernel_log.findings(relative[begin:], where=self.guest.guest.places.of)
        return kernel_log.summed([*boot, *after])

    def _of_models(self) -> None:
        for at, record in self.log.records:
            if record.levelno >= logging.ERROR:
                self._found("model", Effect.HARNESS, record.name, record.getMessage(), at)

    def result(self, began: float) -> Result:
        """The result, with the findings of all oracles; writes the artefacts."""
        self._of_models()
        self._take_coverage()  # of a guest that did not boot
        armed, done = self.armed, self.done
        dma = None if self.watch is None else self.watch.report()
        wrong = () if dma is None else tuple(finding for _, finding in dma.findings)
        first = None if armed is None or armed.first is None else armed.first - self.start
        found = [
            finding
            for finding in (*self.findings, *of_dma(wrong, signs_of(self.case.dma_fails)), *self._of_kernel())
            if finding.signature not in self.case.expected
            and not (
                first is not None
                and finding.effect is Effect.NOTICED
                and finding.last is not None
                and finding.last < first
            )
        ]
        found.sort(key=lambda finding: (finding.at is None, finding.at or 0.0))
        outcome = classify(found, injected=first is not None)
        self._save(dma)
        result = Result(
            outcome=outcome,
            evidence=tuple(found),
            signatures=tuple(dict.fromkeys(finding.signature for finding in found)),
            status=None if done is None else done.status,
            check_status=None if self.check is None else self.check.status,
            injected=0 if armed is None else len(armed.engine.journal),
            injections=() if armed is None else tuple(armed.records),
            rules=() if armed is None else tuple(armed.rules),
            time_to_detect=time_to_detect(found, first),
            time_to_recover=self._recovered(outcome, found, first),
            workload_time=None if done is None else done.ended - done.started,
            wall=time.monotonic() - began,
            artefacts=self.artefacts,
            versions={
                "vmodel": importlib.metadata.version("vmodel"),
                "python": platform.python_version(),
                "qemu": ".".join(map(str, self.setup.qemu.version)),
                "kernel": self.setup.kernel.release,
            },
            seed=self._seed(),
            nth=self.nth,
            coverage=self.coverage,
            findings=wrong,
            dma=dma,
        )
        (self.folder / "result.json").write_text(result.model_dump_json(indent=1) + "\n")
        return result

    def _recovered(self, outcome: Outcome, found: Sequence[Finding], first: float | None) -> float | None:
        if outcome is not Outcome.RECOVERED or self.done is None:
            return None
        return time_to_recover(found, first, [at - self.start for at in (*self.done.came, self.done.ended)])

    def _seed(self) -> int | None:
        plan = self.case.seeded()
        return None if plan is None else plan.seed

    def _save(self, dma: DmaReport | None) -> None:
        places = self.guest.guest.places
        self._write("console", "console.log", places.in_text(self.guest.console(self.mark)))
        self._write("line", "qemu.line", shlex.join(self.guest.guest.line) + "\n")
        if self.coverage is not None:
            self._write("coverage", "coverage.json", json.dumps(self.coverage.to_json()))
        if dma is not None:
            self._write("dma", "dma.json.gz", gzip.compress(dma.model_dump_json(indent=1).encode(), mtime=0))
        if self.hang:
            self._write("hang", "hang.log", "".join(f"{line}\n" for line in self.hang))
        if self.dmesg:
            self._write("kernel log", "kernel.log", places.in_text(self.dmesg))
        if self.done is not None:
            self._write("output", "output.log", self.done.output)
        if self.check is not None:
            self._write("check", "check.log", self.check.output)
        if (self.folder / "injections.jsonl").exists():
            self.artefacts["injections"] = "injections.jsonl"
        if self.log.records:
            form = logging.Formatter("%(name)s: %(message)s")
            self._write("model", "model.log", "".join(f"{form.format(record)}\n" for _, record in self.log.records))
