"""Campaign files, in TOML: machines x kernels x workloads x plans x seeds.

```toml
[campaign]
name = "edu"
kernels = ["stable", "backports"]
seeds = 3

[[machine]]
file = "edu.toml"

[[workload]]
name = "check"
run = "./edu_check 0000:00:03.0"
files = ["edu_check"]
modules = ["uio_pci_generic"]

[[plan]]
name = "torn write"
faults = ["dma.write device=edu0 nth=3 do=partial(8)"]

[[plan]]
file = "plans/*.toml"
```
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from vmodel.campaign.rig import GUESTS
from vmodel.config_file import parse_toml, read_text
from vmodel.dma_report.finding import signs_of
from vmodel.errors import ConfigError
from vmodel.experiment.oracle import Outcome
from vmodel.guest.artifacts import KERNEL_NAME, NAMES
from vmodel.inject import Heal, Rule, parse_rule
from vmodel.inject.quantity import Seconds
from vmodel.mistakes import explain, guess

#: The limit of runs in one campaign: a file with more is taken for a mistake.
MOST_RUNS = 1_000_000


def _name(value: str) -> str:
    if not re.fullmatch(r"[^\x00-\x1f\x7f]{1,80}", value) or value != value.strip():
        raise ValueError("must be up to 80 characters, on one line")
    return value


def seed_numbers(value: object) -> tuple[int, ...]:
    """The seeds that `seeds` means: a count (3: 0, 1, 2), a list ([1, 7]) or a range ("1-3").  ValueError."""
    text = 'must be a number of seeds, as 3, or the seeds themselves, as [1, 7] or "10-19"'
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]+)-([0-9]+)", value)):
        first, last = int(match[1]), int(match[2])
        found = range(first, last + 1)
    elif isinstance(value, int) and not isinstance(value, bool):
        found = range(value)
    elif isinstance(value, list | tuple) and all(isinstance(v, int) and not isinstance(v, bool) for v in value):
        if len(set(value)) != len(value):
            raise ValueError("contains a seed twice")
        return _sound_seeds(tuple(value), text)
    else:
        raise ValueError(text)
    if not 0 < len(found) <= MOST_RUNS:
        raise ValueError(text)
    return _sound_seeds(tuple(found), text)


def _sound_seeds(found: tuple[int, ...], text: str) -> tuple[int, ...]:
    if not found:
        raise ValueError(text)
    if not all(0 <= seed < 1 << 64 for seed in found):
        raise ValueError("must be from 0 to 2**64 - 1")
    return found


def _kernel(value: str) -> str:
    if "/" not in value and not KERNEL_NAME.fullmatch(value):
        raise ValueError(f'must be {", ".join(NAMES)}, a version, as "6.12", or the path of an image')
    return value


def _fault(value: object) -> Rule:
    if not isinstance(value, str):
        raise ValueError('must be text, as "dma.write device=edu0 nth=3 do=partial(8)"')
    try:
        return parse_rule(value, "")
    except ConfigError as error:
        text = "; ".join(line.strip().removeprefix(f"{value!r}: ") for line in str(error).splitlines())
        raise ValueError(text) from None


def _dma_sign(name: str) -> str:
    try:
        signs_of([name])
    except ValueError as error:  # the name is said already
        raise ValueError(str(error).removeprefix(f"{name!r} ")) from None
    return name


def _outcome(value: object) -> object:
    known = [outcome.value for outcome in Outcome]
    if isinstance(value, str) and value not in known:
        close = guess(value, known)
        raise ValueError(f"{f'did you mean {close!r}? ' if close else ''}Outcomes are {', '.join(known)}")
    return value


Name = Annotated[str, AfterValidator(_name)]
Kernel = Annotated[str, AfterValidator(_kernel)]
Fault = Annotated[
    Rule, BeforeValidator(_fault), WithJsonSchema({"type": "string", "description": "a rule on one line"})
]
Expected = Annotated[Outcome, BeforeValidator(_outcome)]
Time = Annotated[Seconds, Field(gt=0)]
Seeds = Annotated[
    tuple[int, ...],
    BeforeValidator(seed_numbers),
    WithJsonSchema(
        {
            "type": ["integer", "string", "array"],
            "description": 'a number of seeds, or the seeds themselves, as [1, 7] or "10-19"',
            "items": {"type": "integer"},
        }
    ),
]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CampaignTable(_Table):
    """`[campaign]`."""

    name: Name = Field(examples=['"edu"'], description="for the report")
    kernels: tuple[Kernel, ...] = Field(
        default=(), examples=['["stable", "backports"]'], description="each machine runs with each of these kernels"
    )
    seeds: Seeds = Field(default=(0,), examples=["3"], description="each run is repeated with each of these seeds")
    control: bool = Field(default=True, examples=["true"], description="run each workload once without faults, too")
    coverage: tuple[str, ...] = Field(
        default=(),
        examples=['["nvme", "vmlinux:pci_"]'],
        description="the kernel code of which each run keeps what ran: modules, .ko files, vmlinux:PREFIX",
    )
    dma_report: bool = Field(
        default=False, examples=["true"], description="each run records the DMA: see docs/dma-sanitizer.md"
    )
    dma_fails: tuple[Annotated[str, AfterValidator(_dma_sign)], ...] = Field(
        default=(),
        examples=['["error", "dma-exposed"]'],
        description='runs with these findings are not as expected: signs, or "error" or "warning" for all of them',
    )
    rig: str = Field(default=GUESTS, examples=['"lab.py:Lab"'], description="a class that runs cases instead of guests")


class BootedMachineTable(_Table):
    """`[[machine]]`: a machine file, and how to boot its guest."""

    file: str = Field(examples=['"edu.toml"'], description="the machine file; paths count from the campaign's folder")
    name: Name | None = Field(
        default=None, examples=['"edu"'], description="for the report; by default the file's name"
    )
    modules: tuple[str, ...] = Field(default=(), examples=['["virtio_iommu"]'], description="modules to load at boot")
    tools: tuple[str, ...] = Field(
        default=(), examples=['["pciutils:lspci"]'], description="Debian's programs, PACKAGE:PROGRAM"
    )
    append: str = Field(default="", examples=['"iommu.strict=1"'], description="kernel arguments")
    sanitize: bool = Field(
        default=False, examples=["true"], description="the kernel looks for misuse of memory: see docs/sanitize.md"
    )
    qemu_args: tuple[str, ...] = Field(default=(), examples=['["-smp", "2"]'], description="more arguments for QEMU")


class WorkloadTable(_Table):
    """`[[workload]]`: what runs in the guest; the keys are those of `vmodel.experiment.Case`."""

    name: Name = Field(examples=['"check"'], description="for the report")
    run: str = Field(
        examples=['"./edu_check 0000:00:03.0"'],
        description="a shell script; exit status 0: success, 65: wrong data and no error, others: an error",
    )
    check: str = Field(
        default="",
        examples=['"./edu_check 0000:00:03.0"'],
        description="a script that runs afterwards without faults: does the device still work?",
    )
    files: tuple[str, ...] = Field(
        default=(), examples=['["edu_check"]'], description="files for the guest, FILE or FILE:PLACE"
    )
    modules: tuple[str, ...] = Field(
        default=(), examples=['["uio_pci_generic"]'], description="modules to load at boot"
    )
    extra_modules: tuple[str, ...] = Field(
        default=(), examples=['["nvme"]'], description="modules that `modprobe` can load"
    )
    tools: tuple[str, ...] = Field(
        default=(), examples=['["pciutils:lspci"]'], description="Debian's programs, PACKAGE:PROGRAM"
    )
    timeout: Time = Field(default=30.0, examples=['"30s"'], description="for the script, and again for the check")
    boot_timeout: Time = Field(default=90.0, examples=['"90s"'], description="for the boot")
    expected: tuple[str, ...] = Field(
        default=(), examples=['["warning: foo"]'], description="signatures of kernel messages that are ignored"
    )
    fresh: bool = Field(default=False, examples=["true"], description="each run gets a new guest")
    machines: tuple[str, ...] = Field(
        default=("*",), examples=['["edu*"]'], description="names of the machines that it runs on"
    )


class PlanTable(_Table):
    """`[[plan]]`: plan files, or faults in the command line's form."""

    file: str | None = Field(
        default=None, examples=['"plans/*.toml"'], description="plan files; or name and faults instead"
    )
    name: Name | None = Field(default=None, examples=['"torn write"'], description="for the report")
    faults: tuple[Fault, ...] = Field(
        default=(),
        examples=['["dma.write device=edu0 nth=3 do=partial(8)"]'],
        description="faults, each on one line",
    )
    heal: Heal | None = Field(
        default=None, examples=['{ after = "20s" }'], description="when the faults end, as in a plan"
    )
    arm: str = Field(
        default="workload",
        pattern="^(workload|boot)$",
        examples=['"boot"'],
        description="when faults are armed: before the workload, or before the guest boots",
    )
    expect: tuple[Expected, ...] = Field(
        default=(),
        examples=['["masked", "detected and recovered"]'],
        description="acceptable outcomes; by default all but corruption, hang, crash and harness error",
    )
    machines: tuple[str, ...] = Field(
        default=("*",), examples=['["edu*"]'], description="names of the machines that it applies to"
    )
    workloads: tuple[str, ...] = Field(
        default=("*",), examples=['["check"]'], description="names of the workloads that it applies to"
    )

    @model_validator(mode="after")
    def _sound(self) -> PlanTable:
        if (self.file is None) is (not self.faults):
            raise ValueError('faults: either file = "plans/torn.toml", or faults = ["dma.write nth=3 do=drop"]')
        if self.faults and self.name is None:
            raise ValueError('name: is missing, as name = "torn write"')
        if self.file is not None and self.heal is not None:
            raise ValueError("heal: must be in the plan's file")
        return self


class CampaignFile(_Table):
    """A whole campaign file."""

    campaign: CampaignTable
    machine: tuple[BootedMachineTable, ...] = ()
    workload: tuple[WorkloadTable, ...] = ()
    plan: tuple[PlanTable, ...] = ()

    @model_validator(mode="after")
    def _sound(self) -> CampaignFile:
        for section, example in (
            ("machine", 'file = "edu.toml"'),
            ("workload", 'name = "check", run = "./check"'),
            ("plan", 'name = "lost", faults = ["irq do=drop"]'),
        ):
            if not getattr(self, section):
                raise ValueError(f"{section}: a campaign needs a [[{section}]] table, as {example}")
        return self


def load(path: Path) -> tuple[CampaignFile, str]:
    """The content of a campaign file, and its text.  ConfigError: one line for each mistake."""
    text = read_text(path)
    raw = parse_toml(text, path)
    try:
        return CampaignFile.model_validate(raw), text
    except ValidationError as error:
        raise ConfigError("\n".join(str(one) for one in explain(error, path, CampaignFile))) from error
