"""What became of a fault: outcome classes, and the evidence for one.

Oracles are what looks at a run and says what it saw: the console and the kernel's log (`vmodel.experiment.kernel_log`),
the workload's exit status, its check of data, the time, QEMU (by QMP), the device models.  Each `Finding` says which
one it comes from; `classify` makes one `Outcome` of them all.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

#: With this exit status (EX_DATAERR of sysexits.h) a workload or check says: no error was reported, and data is wrong.
DATA_WRONG = 65


class Outcome(enum.StrEnum):
    """Classes, the worst last; a harness error says nothing about the driver."""

    NOT_ACTIVATED = "not activated"
    MASKED = "masked"
    RECOVERED = "detected and recovered"
    FAILED = "detected and failed"
    CORRUPTION = "silent corruption"
    HANG = "hang"
    CRASH = "crash"
    HARNESS = "harness error"

    @property
    def doc(self) -> str:
        """What it means."""
        return _DOCS[self]


_DOCS = {
    Outcome.NOT_ACTIVATED: "no rule fired, and the workload succeeded",
    Outcome.MASKED: "rules fired, the workload succeeded, and nobody noticed",
    Outcome.RECOVERED: "the kernel said that something is wrong, and the workload succeeded all the same",
    Outcome.FAILED: "the workload, or the check after it, got an error",
    Outcome.CORRUPTION: "nobody reported an error, and data was wrong",
    Outcome.HANG: "the workload, or the check after it, did not end in its time",
    Outcome.CRASH: "the kernel panicked, had an oops or a BUG, or damaged its own memory",
    Outcome.HARNESS: "the experiment itself went wrong: QEMU, a boot, a model, or the workload without a fault",
}


class Effect(enum.StrEnum):
    """What a finding stands for."""

    CRASH = "crash"
    HANG = "hang"
    CORRUPTION = "corruption"
    ERROR = "error"
    #: The kernel noticed that something is wrong: it alone is no failure.
    NOTICED = "noticed"
    HARNESS = "harness"


class Finding(BaseModel):
    """What one oracle saw."""

    model_config = ConfigDict(frozen=True)

    #: "console", "kernel log", "status", "check", "time", "qmp", "model", "boot".
    oracle: str
    effect: Effect
    #: What it is: of kernel messages a name of `kernel_log.SIGNS`, as "oops", "hung-task", "aer", "iommu-fault".
    sign: str
    text: str
    #: The same for the same thing in another run: without addresses, numbers and times; with the functions of a splat.
    signature: str
    #: Seconds since the workload began, of the first time and of the last; None where nobody knows.
    at: float | None = None
    last: float | None = None
    count: int = 1


def classify(findings: Sequence[Finding], *, injected: bool) -> Outcome:
    """One outcome of all that was found; `injected`: whether a rule fired.

    What goes wrong although no rule fired is the experiment's fault, and no driver's.
    """
    effects = {finding.effect for finding in findings}
    if Effect.HARNESS in effects:
        return Outcome.HARNESS
    if not injected:
        return Outcome.HARNESS if effects - {Effect.NOTICED} else Outcome.NOT_ACTIVATED
    for effect, outcome in (
        (Effect.CRASH, Outcome.CRASH),
        (Effect.HANG, Outcome.HANG),
        (Effect.CORRUPTION, Outcome.CORRUPTION),
        (Effect.ERROR, Outcome.FAILED),
        (Effect.NOTICED, Outcome.RECOVERED),
    ):
        if effect in effects:
            return outcome
    return Outcome.MASKED


def of_status(oracle: str, status: int, at: float | None = None) -> Finding | None:
    """What an exit status says, of the workload ("status") or the check after it ("check"); None: all is well."""
    if status == 0:
        return None
    if status == DATA_WRONG:
        text = f"exit status {status}: data is wrong"
        return Finding(
            oracle=oracle, effect=Effect.CORRUPTION, sign="data", text=text, signature="data", at=at, last=at
        )
    how = f"signal {status - 128}" if status > 128 else f"exit status {status}"
    return Finding(
        oracle=oracle, effect=Effect.ERROR, sign=oracle, text=how, signature=f"{oracle} {how}", at=at, last=at
    )


#: They are the experiment's own: what they see, nobody in the guest has found out.
_OURS = frozenset(("time", "model", "qemu"))


def time_to_detect(findings: Sequence[Finding], first: float | None) -> float | None:
    """Seconds from the first injection, at `first`, until kernel or workload noticed; None: they did not."""
    if first is None:
        return None
    times = [f.at for f in findings if f.oracle not in _OURS and f.at is not None and f.at >= first]
    return min(times) - first if times else None


def time_to_recover(findings: Sequence[Finding], first: float | None, life: Sequence[float]) -> float | None:
    """Seconds from the first injection until the workload went on.

    `life`: when it gave signs of that: each output, and its end.  What counts is the first one after the last finding.
    """
    if first is None:
        return None
    last = max((f.last for f in findings if f.last is not None), default=first)
    after = [at for at in life if at > last]
    return min(after) - first if after else None
