"""A case, which is a machine, a stock kernel, a workload in the guest and a plan of faults; and its result.

`vmodel.experiment` runs cases:

```python
case = Case(machine=Path("edu.toml"), workload="./edu_check", files=[Path("edu_check")], modules=["uio_pci_generic"],
            plan=FaultPlan.load(Path("plan.toml")), seed=1)
result = run(case, Path("artifacts/1"))
print(result.outcome, [finding.text for finding in result.evidence])
```

`vmodel.experiment.Rig` runs many cases, and boots a new guest only if one is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_serializer, field_validator

from vmodel.coverage.coverage import Coverage
from vmodel.dma_report.finding import DmaFinding, signs_of
from vmodel.dma_report.report import DmaReport
from vmodel.experiment.oracle import Finding, Outcome
from vmodel.inject import FaultPlan

#: A duration in seconds, measured on this host.  The limits find a damaged result.
Measured = Annotated[float, Field(ge=-1e9, le=1e9)]
#: The same, of something that ended after it began.
Lasted = Annotated[float, Field(ge=0, le=1e9)]
#: A count of events; the limit finds a damaged result, too.
_MOST_EVENTS = (1 << 63) - 1


def _counting(key: str, least: int) -> AfterValidator:
    """Checks records of which `key`, where there is one, is a number of events, from `least` on.

    A result may come from somebody else, and plans are made from these numbers.
    """

    def check(records: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        for record in records:
            if key in record and not (type(record[key]) is int and least <= record[key] <= _MOST_EVENTS):
                raise ValueError(f"{key} must be a whole number from {least} to {_MOST_EVENTS}")
        return records

    return AfterValidator(check)


def _signs(names: tuple[str, ...]) -> tuple[str, ...]:
    signs_of(names)
    return names


class Case(BaseModel):
    """What to run.  It is plain data: `model_dump(mode="json")` and `model_validate` pass it to another process."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    #: A machine file.
    machine: Path
    #: A shell script that runs in the guest, in /root.  Exit status 0: success; 65 (`DATA_WRONG`): no error was
    #: reported, but data is wrong; others: an error was reported.
    workload: str
    name: str = ""
    #: A role ("stable", "backports"), a version in the cache ("6.12"), or the path of an image; None: stable's.
    kernel: str | None = None
    plan: FaultPlan | None = None
    #: Replaces the plan's own seed.
    seed: int | None = Field(default=None, ge=0, lt=1 << 64)
    #: When the plan is armed: "workload", just before it; "boot", before the guest boots, which is a new one then.
    arm: str = Field(default="workload", pattern="^(workload|boot)$")
    #: A script that runs after the workload, with all rules disarmed.  It tests whether the device works and data is
    #: right; exit statuses are those of the workload.
    check: str = ""
    #: As in GuestSpec: a path on the host, which becomes /root/NAME, or (path on the host, path in the guest).
    files: tuple[Path | tuple[Path, str], ...] = ()
    #: Modules that are loaded at boot.
    modules: tuple[str, ...] = ()
    #: Modules that the workload can load by `modprobe`.
    extra_modules: tuple[str, ...] = ()
    #: Debian's programs that workload and check use, as "pciutils:lspci".
    tools: tuple[str, ...] = ()
    #: More kernel arguments, and parameters of modules (MODULE.NAME=VALUE).
    append: str = ""
    #: Whether the kernel looks for misuse of memory: see `vmodel.guest.sanitize`.
    sanitize: bool = False
    #: More arguments of QEMU, before those of the machine.
    qemu_args: tuple[str, ...] = ()
    #: Seconds for the workload, and again for the check.
    timeout: float = Field(default=30.0, gt=0)
    #: Seconds for the boot.
    boot_timeout: float = Field(default=90.0, gt=0)
    #: Signatures that are ignored, as the kernel logs them without faults, too.
    expected: tuple[str, ...] = ()
    #: Whether it needs a guest in which nothing has run yet.
    fresh: bool = False
    #: The kernel code whose execution is recorded, as "nvme" or "vmlinux:pci": from the workload's start to its end, or
    #: from the boot if the plan is armed before it.
    coverage: tuple[str, ...] = ()
    #: Whether the DMA of devices behind an IOMMU is recorded, from the workload's start to the check's end, or from the
    #: boot if the plan is armed before it: `Result.findings` has what is wrong in it.
    dma_report: bool = False
    #: The signs of findings that make the run a failure, as "dma-leak"; "error": all of this severity.  Others are in
    #: the result only.  If there are any, the DMA is recorded.
    dma_fails: Annotated[tuple[str, ...], AfterValidator(_signs)] = ()

    @property
    def watches_dma(self) -> bool:
        """Whether the DMA is recorded."""
        return self.dma_report or bool(self.dma_fails)

    @field_serializer("plan")
    def _plan_out(self, plan: FaultPlan | None) -> dict[str, Any] | None:
        if plan is None:
            return None
        # With the file's path: paths in the plan are relative to its folder.
        return {**plan.plain(), "file": None if plan.file is None else str(plan.file.absolute())}

    @field_validator("plan", mode="before")
    @classmethod
    def _plan_in(cls, value: Any) -> Any:
        if isinstance(value, dict) and "file" in value:
            content = {key: part for key, part in value.items() if key != "file"}
            return FaultPlan.model_validate(content).placed(None if value["file"] is None else Path(value["file"]))
        return value

    def seeded(self) -> FaultPlan | None:
        """The plan with the case's seed, or with its own if the case has none.  ConfigError: the plan is wrong."""
        return None if self.plan is None else self.plan.extended((), self.seed)


class Result(BaseModel):
    """The result of a case.  It is also written to FOLDER/result.json."""

    model_config = ConfigDict(allow_inf_nan=False, arbitrary_types_allowed=True)

    outcome: Outcome
    #: The findings of all oracles, in the order of time.
    evidence: tuple[Finding, ...]
    #: The signatures of the evidence, each once.
    signatures: tuple[str, ...]
    #: The workload's exit status; None: it did not end, or did not run.
    status: int | None
    #: The same for the check.
    check_status: int | None
    #: The number of injections.
    injected: Annotated[int, Field(ge=0, le=_MOST_EVENTS)]
    #: The first 1000 records of the journal (`vmodel.inject.Journal`).
    injections: Annotated[tuple[dict[str, Any], ...], _counting("nth", 1)]
    #: The rules, and how often each matched and fired.
    rules: Annotated[tuple[dict[str, Any], ...], _counting("fired", 0)]
    #: Seconds from the first injection until the kernel or the workload noticed; None: no injection, or not noticed.
    time_to_detect: Measured | None
    #: Seconds from the first injection until the workload continued: its first output after the last finding, or its
    #: end.  None unless the outcome is "detected and recovered".
    time_to_recover: Measured | None
    #: Seconds that the workload took; None: it did not run.
    workload_time: Lasted | None
    #: Seconds that the case took, with the boot if it needed one.
    wall: Lasted
    #: The files in FOLDER by content: "case", "console", "kernel log", "output", "check", "injections", "line" (QEMU's
    #: command line), "model" (warnings of models and server), "coverage", "dma" (a `DmaReport` as JSON, by gzip).
    artefacts: dict[str, str]
    #: By part: "vmodel", "python", "qemu", "kernel".
    versions: dict[str, str]
    seed: int | None
    #: The position of this case among those that ran in the same guest, from 1.
    nth: Annotated[int, Field(ge=1, le=_MOST_EVENTS)] = 1
    #: What ran of `Case.coverage`; None: nothing was asked for, or no guest ran.  It is the artefact "coverage", too,
    #: and not in result.json.
    coverage: Coverage | None = Field(default=None, exclude=True, repr=False)
    #: What is wrong with the DMA of the drivers, the gravest first, if it was recorded.
    findings: tuple[DmaFinding, ...] = ()
    #: All that was recorded of the DMA; None: nothing was asked for, or no guest ran.  It is the artefact "dma", too,
    #: and not in result.json.
    dma: DmaReport | None = Field(default=None, exclude=True, repr=False)

    @property
    def signs(self) -> tuple[str, ...]:
        """The signs of `findings`, each once."""
        return tuple(dict.fromkeys(finding.sign for finding in self.findings))
