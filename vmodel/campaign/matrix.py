"""From a campaign file to its runs: each with the whole case, and a key that says what it is."""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vmodel import machine as machines
from vmodel.campaign.rig import GUESTS, absolute, load_rig, plain
from vmodel.campaign.schema import MOST_RUNS, CampaignFile, MachineTable, PlanTable, WorkloadTable
from vmodel.errors import ConfigError
from vmodel.experiment.case import Case
from vmodel.experiment.oracle import Outcome
from vmodel.guest.artifacts import KERNELS
from vmodel.inject import Engine, FaultPlan, Match
from vmodel.machine import Machine

#: What the plan of a run without faults is called.
CONTROL = "no faults"
#: What a driver may do with a fault unless the plan says otherwise: anything but harm.
ACCEPTABLE = (Outcome.NOT_ACTIVATED, Outcome.MASKED, Outcome.RECOVERED, Outcome.FAILED)


class Run(BaseModel):
    """One run of a campaign: where it stands in the matrix, and what to do."""

    model_config = ConfigDict(frozen=True)

    machine: str
    kernel: str
    workload: str
    plan: str
    seed: int
    case: Case
    #: Outcomes that are right.
    expect: tuple[Outcome, ...] = ACCEPTABLE
    #: Files that it reads, and their SHA-256.
    inputs: dict[str, str] = {}
    rig: str = GUESTS

    @property
    def control(self) -> bool:
        """Whether it is one without faults."""
        return self.plan == CONTROL

    @property
    def key(self) -> str:
        """The same for the same run, wherever its files lie: a digest of what it is, with the contents of its files."""
        case = plain(self.case)
        for name in ("machine", "files", "name"):
            case.pop(name, None)
        if self.case.plan is not None:
            case["plan"] = self.case.plan.plain()
        places = [str(f[1]) if isinstance(f, tuple) else f.name for f in self.case.files]
        said = {
            "case": case,
            "at": [self.machine, self.kernel, self.workload, self.plan, self.seed],
            "files": places,
            "inputs": list(self.inputs.values()),
            "rig": self.rig.rpartition("/")[2],
        }
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


class Matrix:
    """The runs of a campaign file."""

    def __init__(self, content: CampaignFile, file: Path) -> None:
        """ConfigError: one of its files is missing or wrong, or two things have one name."""
        self.content = content
        self.file = file
        self.base = file.absolute().parent
        self.rig = absolute(content.campaign.rig, self.base)
        if self.rig != GUESTS:
            self._at("campaign.rig", load_rig, self.rig)
        self._machines = list(self._name_machines())
        self._plans = list(self._load_plans())
        self._unique("machine", [name for name, _, _ in self._machines])
        self._unique("workload", [workload.name for workload in content.workload])
        self._unique("plan", [name for name, _, _ in self._plans])
        self._patterns()
        for n, workload in enumerate(content.workload):
            for k, text in enumerate(workload.files):
                self._at(f"workload[{n}].files[{k}]", guest_file, text, self.base)
        self._fit()

    def _at(self, key: str, call: Any, *arguments: Any) -> Any:
        """A call; what is wrong with its arguments is what is wrong at `key`."""
        try:
            return call(*arguments)
        except ConfigError as error:
            raise ConfigError(str(error), file=self.file, key=key) from error

    def _unique(self, section: str, names: Sequence[str]) -> None:
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"{name!r} is there twice: give each its own", file=self.file, key=f"{section}.name")

    def _name_machines(self) -> Iterator[tuple[str, MachineTable, Path]]:
        for n, table in enumerate(self.content.machine):
            path = self.base / table.file
            if not path.is_file():
                raise ConfigError(f"there is no file {table.file!r}", file=self.file, key=f"machine[{n}].file")
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
                text = f"{len(found)} files cannot have one name: leave it out, and each has its file's"
                raise ConfigError(text, file=self.file, key=f"plan[{n}].name")
            for path in found:
                plan = FaultPlan.load(path)
                if not plan.rule:
                    raise ConfigError("has no [[rule]]: each workload runs once without faults anyway", file=path)
                yield table.name or path.stem, table, plan

    def _patterns(self) -> None:
        """Selections that select nothing are mistakes."""
        names = {
            "machines": [name for name, _, _ in self._machines],
            "workloads": [workload.name for workload in self.content.workload],
        }
        for section, tables in (("workload", self.content.workload), ("plan", self.content.plan)):
            for n, table in enumerate(tables):
                for key, known in names.items():
                    for pattern in getattr(table, key, ()):
                        if not any(fnmatchcase(name, pattern) for name in known):
                            text = f"{pattern!r} is none of the {key}: {', '.join(known)}"
                            raise ConfigError(text, file=self.file, key=f"{section}[{n}].{key}")
        for name, _, _ in self._plans:
            if name == CONTROL:
                raise ConfigError(f"{name!r} is what runs without a plan are called", file=self.file, key="plan.name")

    def _fit(self) -> None:
        """Each plan knows the devices and registers of the machines that it is for."""
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
            if plan.file is not None:  # it is in the text already
                raise ConfigError(text) from error
            raise ConfigError(text, file=self.file, key=f"plan {title!r}") from error

    def runs(self) -> list[Run]:
        """All runs: those that can share a guest together, the one without faults first.  ConfigError."""
        kernels: Sequence[str | None] = self.content.campaign.kernels or (KERNELS[0] if self.rig == GUESTS else None,)
        found: list[Run] = []
        for name, machine, path in self._machines:
            for kernel in kernels:
                for workload in self.content.workload:
                    if selected(name, workload.machines):
                        found += self._cell(name, machine, path, kernel, workload)
        if not found:
            raise ConfigError("no workload is for any of the machines", file=self.file)
        if len(found) > MOST_RUNS:
            raise ConfigError(f"that is {len(found):,} runs; {MOST_RUNS:,} at most", file=self.file)
        return found

    def _cell(
        self, name: str, machine: MachineTable, path: Path, kernel: str | None, workload: WorkloadTable
    ) -> Iterator[Run]:
        image = str(self.base / kernel) if kernel is not None and "/" in kernel else kernel
        case = Case(
            machine=path,
            workload=workload.run,
            kernel=image,
            check=workload.check,
            files=tuple(guest_file(text, self.base) for text in workload.files),
            modules=(*machine.modules, *workload.modules),
            extra_modules=workload.extra_modules,
            append=machine.append,
            qemu_args=machine.qemu_args,
            timeout=workload.timeout,
            boot_timeout=workload.boot_timeout,
            expected=workload.expected,
            fresh=workload.fresh,
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
    """Whether one of the patterns means it."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def guest_file(text: str, base: Path) -> Path | tuple[Path, str]:
    """A file for the guest, "FILE" or "FILE:PLACE", as Case has it.  ConfigError: it is not there."""
    source, colon, target = text.partition(":")
    path = base / source
    if not path.is_file():
        raise ConfigError(f"there is no file {source!r}")
    if colon and not target.strip("/"):
        raise ConfigError(f"{text!r}: must be FILE, or FILE:PLACE-IN-THE-GUEST")
    return (path, target) if colon else path


@contextmanager
def opened(path: Path) -> Iterator[Machine]:
    """A machine and its devices, which nobody serves.  ConfigError."""
    machine = machines.load(path)
    try:
        yield machine
    finally:
        machine.close()


def functions(plan: FaultPlan) -> Iterator[Path]:
    """The Python files that its rules ask."""
    matches: list[Match | None] = [None if plan.heal is None else plan.heal.on]
    for rule in plan.rule:
        matches += [rule, *(rule.between or ())]
    for match in matches:
        if match is not None and isinstance(match.when, str):
            yield plan.base / match.when.rpartition(":")[0]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inputs(case: Case, rig: str) -> dict[str, str]:
    """The files that a run reads, other than kernels and QEMU, with their digests."""
    paths = [case.machine, *(f[0] if isinstance(f, tuple) else f for f in case.files)]
    described = tomllib.loads(case.machine.read_text(encoding="utf-8-sig"))
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
