"""The outcome of a fault, and the evidence for it.

Oracles observe a run: the console and the kernel's log (`vmodel.experiment.kernel_log`), the workload's exit status,
its check of data, the time, QEMU (by QMP), the device models, and the drivers' DMA (`vmodel.dma_report`).  Each
observation is a `Finding`; `classify` derives the `Outcome` from all of them.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Sequence

from pydantic import BaseModel, ConfigDict

from vmodel.dma_report.finding import DmaFinding

#: The exit status of a workload or check that finds wrong data without a reported error (EX_DATAERR of sysexits.h).
DATA_WRONG = 65


class Outcome(enum.StrEnum):
    """How a run ended, in order of severity.  A harness error says nothing about the driver."""

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
        """The meaning of the outcome, in a few words."""
        return _DOCS[self]


_DOCS = {
    Outcome.NOT_ACTIVATED: "no rule fired, and the workload succeeded",
    Outcome.MASKED: "a rule fired, the workload succeeded, and no problem was reported",
    Outcome.RECOVERED: "the kernel reported a problem, and the workload succeeded",
    Outcome.FAILED: "the workload, or the check after it, reported an error; or its DMA was wrong (`dma_fails`)",
    Outcome.CORRUPTION: "data was wrong, and no error was reported",
    Outcome.HANG: "the workload, or the check after it, exceeded its time limit",
    Outcome.CRASH: "the kernel panicked, had an oops or a BUG, or damaged its own memory",
    Outcome.HARNESS: "the experiment itself failed: QEMU, the boot, a model, or the workload without a fault",
}


class Effect(enum.StrEnum):
    """What a finding means for the run."""

    CRASH = "crash"
    HANG = "hang"
    CORRUPTION = "corruption"
    ERROR = "error"
    #: The kernel reported a problem, which by itself is not a failure.
    NOTICED = "noticed"
    HARNESS = "harness"


class Finding(BaseModel):
    """An observation of one oracle."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    #: "console", "kernel log", "status", "check", "time", "qmp", "qemu", "model", "boot", "guest", "coverage", "dma",
    #: "rig" or "worker".
    oracle: str
    effect: Effect
    #: Its kind; for kernel messages a name of `kernel_log.SIGNS`, such as "oops", "hung-task", "aer", "iommu-fault".
    sign: str
    #: The first occurrence, as it was printed; behind an oops, in parentheses, file and line in a module's source.
    text: str
    #: Equal in all runs with the same problem: without addresses, numbers and times; with the functions of a splat.
    signature: str
    #: When it was first seen, in seconds since the workload began; None: unknown.
    at: float | None = None
    #: When it was last seen; None: unknown.
    last: float | None = None
    #: How often it was seen.
    count: int = 1


def classify(findings: Sequence[Finding], *, injected: bool) -> Outcome:
    """The outcome of a run with these findings: that of the most severe one.  `injected`: whether a rule fired.

    A failure without an injected fault is a harness error, as no driver can be the cause; but it is the cause of what
    is wrong with its DMA.
    """
    effects = {finding.effect for finding in findings}
    if Effect.HARNESS in effects:
        return Outcome.HARNESS
    if not injected:
        others = {finding.effect for finding in findings if finding.oracle != "dma"} - {Effect.NOTICED}
        failed = Effect.ERROR in effects
        return Outcome.HARNESS if others else Outcome.FAILED if failed else Outcome.NOT_ACTIVATED
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


def of_dma(found: Iterable[DmaFinding], fails: Collection[str]) -> list[Finding]:
    """The findings for DMA that is wrong in a way whose sign is in `fails`."""
    return [
        Finding(
            oracle="dma",
            effect=Effect.ERROR,
            sign=one.sign,
            text=f"{one.sign}: {one.endpoint}: {one.text}",
            signature=f"{one.sign} {one.endpoint}",
        )
        for one in found
        if one.sign in fails
    ]


def of_status(oracle: str, status: int, at: float | None = None) -> Finding | None:
    """The finding for an exit status of the workload (`oracle` "status") or the check ("check"); None: success."""
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


#: Oracles of the harness: the guest does not know of their findings.
_HARNESS = frozenset(("time", "model", "qemu"))


def time_to_detect(findings: Sequence[Finding], first: float | None) -> float | None:
    """Seconds from the first injection, at `first`, until the kernel or the workload noticed; None: they did not."""
    if first is None:
        return None
    times = [f.at for f in findings if f.oracle not in _HARNESS and f.at is not None and f.at >= first]
    return min(times) - first if times else None


def time_to_recover(findings: Sequence[Finding], first: float | None, progress: Sequence[float]) -> float | None:
    """Seconds from the first injection, at `first`, until the workload continued; None: it did not.

    `progress`: the times of its outputs and of its end.  The first one after the last finding counts.
    """
    if first is None:
        return None
    last = max((f.last for f in findings if f.last is not None), default=first)
    after = [at for at in progress if at > last]
    return min(after) - first if after else None
