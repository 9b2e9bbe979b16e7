"""A case: a machine, a stock kernel, a workload in the guest, a plan of faults; and what came of it.

`vmodel.experiment` runs them:

```python
case = Case(machine=Path("edu.toml"), workload="./edu_check", files=[Path("edu_check")], modules=["uio_pci_generic"],
            plan=FaultPlan.load(Path("plan.toml")), seed=1)
result = run(case, Path("artifacts/1"))
print(result.outcome, [finding.text for finding in result.evidence])
```

`Rig`, from there, runs many, and boots a new guest only where one is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator

from vmodel.experiment.oracle import Finding, Outcome
from vmodel.inject import FaultPlan


class Case(BaseModel):
    """What to run.  Plain data: `model_dump(mode="json")` and `model_validate` take it to another process and back."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: A machine file.
    machine: Path
    #: A shell script for the guest, in /root.  Exit status 0: all is well; 65 (`DATA_WRONG`): no error was reported,
    #: and data is wrong; others: it got an error.
    workload: str
    name: str = ""
    #: A role ("stable", "backports"), a version in the cache ("6.12"), or the path of an image; None: stable's.
    kernel: str | None = None
    plan: FaultPlan | None = None
    #: In place of the plan's own.
    seed: int | None = Field(default=None, ge=0, lt=1 << 64)
    #: When the plan is armed: with the workload; or before the guest boots (and then the case has a guest of its own).
    arm: str = Field(default="workload", pattern="^(workload|boot)$")
    #: A script that runs when the workload has ended and all rules are disarmed: does the device work, is data right?
    check: str = ""
    #: As in GuestSpec: a path here (it becomes /root/NAME), or (path here, path in the guest).
    files: tuple[Path | tuple[Path, str], ...] = ()
    #: Loaded at boot; `extra_modules` are there for the workload's `modprobe`.
    modules: tuple[str, ...] = ()
    extra_modules: tuple[str, ...] = ()
    #: More kernel arguments, and parameters of modules (MODULE.NAME=VALUE).
    append: str = ""
    #: More arguments of QEMU's, before the machine's.
    qemu_args: tuple[str, ...] = ()
    #: Seconds for the workload, as much again for the check, and for the boot.
    timeout: float = Field(default=30.0, gt=0)
    boot_timeout: float = Field(default=90.0, gt=0)
    #: Signatures that are no evidence: what the kernel says in a run without faults, too.
    expected: tuple[str, ...] = ()
    #: Whether it needs a guest that nothing has run in before.
    fresh: bool = False

    @field_serializer("plan")
    def _plan_out(self, plan: FaultPlan | None) -> dict[str, Any] | None:
        if plan is None:
            return None
        # The file, too: what the plan names counts from its folder.
        return {**plan.plain(), "file": None if plan.file is None else str(plan.file.absolute())}

    @field_validator("plan", mode="before")
    @classmethod
    def _plan_in(cls, value: Any) -> Any:
        if isinstance(value, dict) and "file" in value:
            said = {key: part for key, part in value.items() if key != "file"}
            return FaultPlan.model_validate(said).placed(None if value["file"] is None else Path(value["file"]))
        return value

    def seeded(self) -> FaultPlan | None:
        """The plan, with the case's seed if that has one.  ConfigError."""
        return None if self.plan is None else self.plan.extended((), self.seed)


class Result(BaseModel):
    """What came of a case.  Written to FOLDER/result.json, too."""

    outcome: Outcome
    #: What each oracle found, in the order of time.
    evidence: tuple[Finding, ...]
    #: Of the evidence, each once.
    signatures: tuple[str, ...]
    #: Exit status of workload and check; None: it did not end, or did not run.
    status: int | None
    check_status: int | None
    #: How many injections there were; the first 1000 records of the journal (`vmodel.inject.Journal`); and the rules,
    #: with how often they matched and fired.
    injected: int
    injections: tuple[dict[str, Any], ...]
    rules: tuple[dict[str, Any], ...]
    #: Seconds from the first injection to the first sign that somebody noticed; None: no injection, or no sign.
    time_to_detect: float | None
    #: Seconds from the first injection until the workload went on: its first output after the last sign, or its end.
    #: None unless it was detected and recovered.
    time_to_recover: float | None
    #: Seconds that the workload took, and the whole case with a boot that it may have needed.
    workload_time: float | None
    wall: float
    #: Files in FOLDER by what they are: "case", "console", "kernel log", "output", "check", "injections", "line"
    #: (QEMU's command line), "model" (what models and server warned of).
    artefacts: dict[str, str]
    #: "vmodel", "python", "qemu", "kernel".
    versions: dict[str, str]
    seed: int | None
    #: Which case this was of those that its guest has run, from 1 on.
    nth: int = 1
