"""The driver with five planted bugs in its error handling (examples/driver): each shows under its plan only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.guest.kernels import CHOSEN
from vmodel.experiment import Result, Rig
from vmodel.experiment.case import Case
from vmodel.experiment.oracle import Outcome
from vmodel.inject import FaultPlan, parse_rule

pytestmark = pytest.mark.guest
FOLDER = Path(__file__).parents[2] / "examples" / "driver"
PLANS = FOLDER / "plans"
#: By plan: the outcome, and what one of the signatures begins with.
BUGS: dict[str, tuple[Outcome, str | tuple[str, ...]]] = {
    "unchecked-mapping": (Outcome.FAILED, "warn: WARNING: drivers/iommu/dma-iommu.c iommu_dma_unmap_p"),
    "stale-data": (Outcome.CORRUPTION, "data"),
    # KFENCE takes some of all allocations, whichever.
    "double-free": (Outcome.CRASH, ("memory: BUG kmalloc-", "kasan: BUG: KFENCE: ")),
    "use-after-free": (Outcome.CRASH, ("oops: ", "kasan: BUG: KFENCE: ")),
    # Seen while the status is stuck.
    "endless-loop": (Outcome.HANG, "polling: memcard_execute()"),
}
Experiment = Callable[..., Result]


@pytest.fixture(scope="module", params=CHOSEN)
def kernel(request: pytest.FixtureRequest) -> str:
    """Each of the guest kernels, one after the other: guests are used on."""
    return str(request.param)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """Guests that are used on: each run loads the driver again."""
    with Rig(reuse=set(Outcome) - {Outcome.HANG, Outcome.CRASH, Outcome.HARNESS}) as made:
        yield made


@pytest.fixture
def experiment(rig: Rig, kernel: str, artifacts: Path) -> Experiment:
    def run(plan: FaultPlan | None) -> Result:
        case = Case(
            machine=FOLDER / "memcard.toml",
            workload="sh memcard.sh",
            kernel=kernel,
            plan=plan,
            sanitize=True,
            timeout=10,
            coverage=("memcard",),
        )
        return rig.run(case, artifacts / "run")

    return run


def test_each_bug_has_a_plan() -> None:
    assert {path.stem for path in PLANS.glob("*.toml")} == set(BUGS)


def test_no_fault_no_problem(experiment: Experiment) -> None:
    """And in the same guest again."""
    for _ in range(2):
        result = experiment(None)
        assert (result.outcome, result.status, result.evidence) == (Outcome.NOT_ACTIVATED, 0, ())


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug(experiment: Experiment, name: str) -> None:
    outcome, signature = BUGS[name]
    result = experiment(FaultPlan.load(PLANS / f"{name}.toml"))
    assert result.outcome is outcome, result.evidence
    assert any(one.startswith(signature) for one in result.signatures), "\n".join(result.signatures)


@pytest.mark.parametrize(
    ("rule", "outcome"),
    [
        ("irq device=memcard0 nth=4 do=spurious(ms=1)", Outcome.MASKED),
        ("mmio.write device=memcard0 register=BLOCK nth=3 do=duplicate", Outcome.MASKED),
        ("mmio.read device=memcard0 register=ID do=ones", Outcome.FAILED),
        ("completion device=memcard0 nth=3 do=complete(status=3)", Outcome.FAILED),
        ("dma.write device=memcard0 size=4096 nth=2 do=flip", Outcome.FAILED),
        ("dma.read device=memcard0 nth=1 do=flip", Outcome.FAILED),
        ("dma.read device=memcard0 nth=1 do=abort", Outcome.FAILED),
        ("mmio.write device=memcard0 register=BLOCK nth=3 do=value(4)", Outcome.FAILED),
        ("irq device=memcard0 nth=2 do=drop", Outcome.MASKED),
    ],
)
def test_and_what_is_handled(experiment: Experiment, rule: str, outcome: Outcome) -> None:
    """So that a bug that shows is one of the five."""
    result = experiment(FaultPlan().extended([parse_rule(rule)]))
    assert result.outcome is outcome, result.evidence
    assert "oops" not in {finding.sign for finding in result.evidence}
