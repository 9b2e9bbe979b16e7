"""From a campaign file to its runs: each has the whole case, and a key that identifies it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator

from vmodel import machine as machines
from vmodel.campaign.rig import GUESTS, absolute, load_rig, plain
from vmodel.campaign.schema import MOST_RUNS, BootedMachineTable, CampaignFile, PlanTable, WorkloadTable
from vmodel.config_file import parse_toml, read_text
from vmodel.coverage.target import Target
from vmodel.errors import ConfigError
from vmodel.experiment.case import Case
from vmodel.experiment.oracle import Outcome
from vmodel.files import pieces
from vmodel.guest.artifacts import KERNELS
from vmodel.guest.modules import is_path
from vmodel.guest.options import coverage_target, files_in, guest_file, module_at, module_files, tool_at
from vmodel.inject import Engine, FaultPlan, Match
from vmodel.machine import Machine

#: The limit of a file that a run reads, in bytes: no larger one fits into an initramfs (newc's c_filesize has 32 bits).
LARGEST = (1 << 32) - 1
#: The plan's name of a run without faults.
CONTROL = "no faults"
#: Outcomes that are acceptable unless the plan says otherwise: all that do no harm.
ACCEPTABLE = (Outcome.NOT_ACTIVATED, Outcome.MASKED, Outcome.RECOVERED, Outcome.FAILED)


class Run(BaseModel):
    """One run of a campaign: its place in the matrix, and its case."""

    model_config = ConfigDict(frozen=True)

    machine: str
    kernel: str
    workload: str
    plan: str
    seed: int
    case: Case
    #: Outcomes that are acceptable.
    expect: tuple[Outcome, ...] = ACCEPTABLE
    #: Files that the run reads, and their SHA-256.
    inputs: dict[str, str] = {}
    rig: str = GUESTS

    @field_validator("rig")
    @classmethod
    def _renamed(cls, value: str) -> str:
        # Stores that were written before experiments had a package of their own.
        return GUESTS if value == "vmodel.testing.experiment:Rig" else value

    @property
    def control(self) -> bool:
        """Whether this is a run without faults."""
        return self.plan == CONTROL

    @property
    def key(self) -> str:
        """A SHA-256 of the case and of the contents of its files.  It does not depend on where the files are."""
        case = plain(self.case)
        for name in ("machine", "files", "name"):
            case.pop(name, None)
        for name in ("modules", "extra_modules"):
            case[name] = [Path(entry).name if is_path(entry) else entry for entry in getattr(self.case, name)]
        if self.case.coverage:  # older stores have none
            case["coverage"] = [Path(entry).name if is_path(entry) else entry for entry in self.case.coverage]
        if self.case.plan is not None:
            case["plan"] = self.case.plan.plain()
        places = [str(f[1]) if isinstance(f, tuple) else f.name for f in self.case.files]
        identity = {
            "case": case,
            "at": [self.machine, self.kernel, self.workload, self.plan, self.seed],
            "files": places,
            "inputs": list(self.inputs.values()),
            "rig": self.rig.rpartition("/")[2],
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


class Matrix:
    """The runs of a campaign file."""

    def __init__(self, content: CampaignFile, file: Path) -> None:
        """ConfigError: one of its files is missing or wrong, or a name is used twice."""
        self.content = content
        self.file = file
        self.base = file.absolute().parent
        self.rig = absolute(content.campaign.rig, self.base)
        if self.rig != GUESTS:
            self._at("campaign.rig", load_rig, self.rig)
        self._coverage = tuple(
            self._at(f"campaign.coverage[{n}]", coverage_target, entry, self.base)
            for n, entry in enumerate(content.campaign.coverage)
        )
        for n, entry in enumerate(self._coverage):
            if Target.parse(entry).name in {Target.parse(other).name for other in self._coverage[:n]}:
                raise ConfigError(f"{entry!r} is named twice", file=self.file, key=f"campaign.coverage[{n}]")
        self._machines = list(self._name_machines())
        self._plans = list(self._load_plans())
        self._unique("machine", [name for name, _, _ in self._machines])
        self._unique("workload", [workload.name for workload in content.workload])
        self._unique("plan", [name for name, _, _ in self._plans])
        self._patterns()
        for n, workload in enumerate(content.workload):
            for k, text in enumerate(workload.files):
                self._at(f"workload[{n}].files[{k}]", guest_file, text, self.base)
            for key in ("modules", "extra_modules"):
                for k, entry in enumerate(getattr(workload, key)):
                    self._at(f"workload[{n}].{key}[{k}]", module_at, entry, self.base)
            for k, entry in enumerate(workload.tools):
                self._at(f"workload[{n}].tools[{k}]", tool_at, entry, self.base)
        self._fit()

    def _at(self, key: str, call: Any, *arguments: Any) -> Any:
        """Calls `call(*arguments)`; a ConfigError gets this file and `key` as its place."""
        try:
            return call(*arguments)
        except ConfigError as error:
            raise ConfigError(str(error), file=self.file, key=key) from error

    def _unique(self, section: str, names: Sequence[str]) -> None:
        for name in names:
            if names.count(name) > 1:
                text = f"{name!r} is used twice: names must differ"
                raise ConfigError(text, file=self.file, key=f"{section}.name")

    def _name_machines(self) -> Iterator[tuple[str, BootedMachineTable, Path]]:
        for n, table in enumerate(self.content.machine):
            path = self.base / table.file
            if not path.is_file():
                raise ConfigError(f"there is no file {table.file!r}", file=self.file, key=f"machine[{n}].file")
            for k, entry in enumerate(table.modules):
                self._at(f"machine[{n}].modules[{k}]", module_at, entry, self.base)
            for k, entry in enumerate(table.tools):
                self._at(f"machine[{n}].tools[{k}]", tool_at, entry, self.base)
            yield table.name or path.stem, table, path

    def _load_plans(self) -> Iterator[tuple[str, PlanTable, FaultPlan]]:
        for n, table in enumerate(self.content.plan):
            if table.file is None:
                name = table.name or ""
                yield name, table, FaultPlan(rule=table.faults, heal=table.heal)
                continue
            pattern = Path(table.file)
            found = sorted(self.base.glob(table.file)) if not pattern.is_absolute() else [pattern]
            if not any(path.is_file() for path in found):
                raise ConfigError(f"there is no file {table.file!r}", file=self.file, key=f"plan[{n}].file")
            if table.name and len(found) > 1:
                text = f"{len(found)} files cannot share one name: leave it out, and each plan is named after its file"
                raise ConfigError(text, file=self.file, key=f"plan[{n}].name")
            for path in found:
                plan = FaultPlan.load(path)
                if not plan.rule:
                    raise ConfigError("has no [[rule]]: each workload runs once without faults anyway", file=path)
                yield table.name or path.stem, table, plan

    def _patterns(self) -> None:
        """ConfigError: a pattern matches nothing."""
        names = {
            "machines": [name for name, _, _ in self._machines],
            "workloads": [workload.name for workload in self.content.workload],
        }
        for section, tables in (("workload", self.content.workload), ("plan", self.content.plan)):
            for n, table in enumerate(tables):
                for key, known in names.items():
                    for pattern in getattr(table, key, ()):
                        if not any(fnmatchcase(name, pattern) for name in known):
                            text = f"{pattern!r} matches none of the {key}: {', '.join(known)}"
                            raise ConfigError(text, file=self.file, key=f"{section}[{n}].{key}")
        for name, _, _ in self._plans:
            if name == CONTROL:
                raise ConfigError(f"{name!r} is reserved for runs without a plan", file=self.file, key="plan.name")

    def _fit(self) -> None:
        """ConfigError: a plan names a device or register that one of its machines does not have."""
        for name, _, path in self._machines:
            with opened(path) as machine:
                for title, table, plan in self._plans:
                    if selected(name, table.machines):
                        self._fits(machine, name, title, plan)

    def _fits(self, machine: Machine, name: str, title: str, plan: FaultPlan) -> None:
        try:
            Engine(plan, machine.devices).close()
        except ConfigError as error:
            text = f"{error} (on machine {name!r})"
            if plan.file is not None:  # the text names it already
                raise ConfigError(text) from error
            raise ConfigError(text, file=self.file, key=f"plan {title!r}") from error

    def runs(self) -> list[Run]:
        """All runs.  Runs that can share a guest are adjacent, the one without faults first.

        ConfigError: there are no runs, or more than MOST_RUNS.
        """
        kernels: Sequence[str | None] = self.content.campaign.kernels or (KERNELS[0] if self.rig == GUESTS else None,)
        found: list[Run] = []
        for name, machine, path in self._machines:
            for kernel in kernels:
                for workload in self.content.workload:
                    if selected(name, workload.machines):
                        found += self._cell(name, machine, path, kernel, workload)
        if not found:
            raise ConfigError("no workload selects any of the machines", file=self.file)
        if len(found) > MOST_RUNS:
            raise ConfigError(f"has {len(found):,} runs; the limit is {MOST_RUNS:,}", file=self.file)
        return found

    def _cell(
        self, name: str, machine: BootedMachineTable, path: Path, kernel: str | None, workload: WorkloadTable
    ) -> Iterator[Run]:
        image = str(self.base / kernel) if kernel is not None and "/" in kernel else kernel
        case = Case(
            machine=path,
            workload=workload.run,
            kernel=image,
            check=workload.check,
            files=tuple(guest_file(text, self.base) for text in workload.files),
            modules=tuple(module_at(entry, self.base) for entry in (*machine.modules, *workload.modules)),
            extra_modules=tuple(module_at(entry, self.base) for entry in workload.extra_modules),
            tools=(*machine.tools, *workload.tools),
            append=machine.append,
            sanitize=machine.sanitize,
            qemu_args=machine.qemu_args,
            timeout=workload.timeout,
            boot_timeout=workload.boot_timeout,
            expected=workload.expected,
            fresh=workload.fresh,
            coverage=self._coverage,
            dma_report=self.content.campaign.dma_report,
            dma_fails=self.content.campaign.dma_fails,
        )

        def run(title: str, seed: int, expect: tuple[Outcome, ...], **changes: Any) -> Run:
            named = " / ".join((name, workload.name, title))
            made = case.model_copy(update={"name": named, "seed": seed, **changes})
            return Run(
                machine=name,
                kernel=kernel or "",
                workload=workload.name,
                plan=title,
                seed=seed,
                case=made,
                expect=expect,
                inputs=inputs(made, self.rig),
                rig=self.rig,
            )

        campaign = self.content.campaign
        if campaign.control:
            yield run(CONTROL, campaign.seeds[0], (Outcome.NOT_ACTIVATED,))
        for plan, table, faults in self._plans:
            if selected(name, table.machines) and selected(workload.name, table.workloads):
                for seed in campaign.seeds:
                    yield run(plan, seed, table.expect or ACCEPTABLE, plan=faults, arm=table.arm)


def selected(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches `name`."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


@contextmanager
def opened(path: Path) -> Iterator[Machine]:
    """A machine and its devices, not served; closed on exit.  ConfigError: the machine file is wrong."""
    machine = machines.load(path)
    try:
        yield machine
    finally:
        machine.close()


def functions(plan: FaultPlan) -> Iterator[Path]:
    """The Python files that the `when` of its rules name."""
    matches: list[Match | None] = [None if plan.heal is None else plan.heal.on]
    for rule in plan.rule:
        matches += [rule, *(rule.between or ())]
    for match in matches:
        if match is not None and isinstance(match.when, str):
            yield plan.base / match.when.rpartition(":")[0]


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hex.  OSError: it cannot be read, is no regular file, or has more than 4 GiB."""
    found = hashlib.sha256()
    for piece in pieces(path, LARGEST):
        found.update(piece)
    return found.hexdigest()


def inputs(case: Case, rig: str) -> dict[str, str]:
    """The files that a run reads, without kernels and QEMU, and their digests."""
    paths = [case.machine]
    for entry in case.files:
        paths += files_in(entry[0] if isinstance(entry, tuple) else entry)
    for module in filter(is_path, (*case.modules, *case.extra_modules)):
        paths += module_files(module)
    paths += map(Path, filter(is_path, case.coverage))
    described = parse_toml(read_text(case.machine), case.machine)
    for table in described.get("device", ()):
        source, _, _ = table["model"].rpartition(":")
        if source.endswith(".py"):
            paths.append(case.machine.parent / source)
    if case.plan is not None:
        paths += functions(case.plan)
    source, _, _ = rig.rpartition(":")
    if source.endswith(".py"):
        paths.append(Path(source))
    return {str(path): digest(path) for path in dict.fromkeys(paths)}
