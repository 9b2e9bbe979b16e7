"""What is known of stock drivers, and every campaign has to find: else its tools are wrong.

On the machines and with the workload of examples/campaign.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path

import pytest

from tests.guest.kernels import CHOSEN
from vmodel.experiment import Result, Rig
from vmodel.experiment.case import Case
from vmodel.experiment.oracle import Outcome
from vmodel.inject import FaultPlan, parse_rule
from vmodel.patience import patience

pytestmark = pytest.mark.guest
CAMPAIGN = Path(__file__).parents[2] / "examples" / "campaign"
TIMES = f"nvme_core.io_timeout={ceil(patience(2))} nvme_core.admin_timeout={ceil(patience(4))}"
DATA = 'device=nvme0 size="4096-16384"'
Experiment = Callable[..., Result]


@pytest.fixture(scope="module", params=CHOSEN)
def kernel(request: pytest.FixtureRequest) -> str:
    """Each of the guest kernels, one after the other: guests are used on."""
    return str(request.param)


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """Guests that are used on: each case here ends with a check that the disk works."""
    with Rig(reuse=set(Outcome) - {Outcome.HANG, Outcome.CRASH, Outcome.HARNESS}) as made:
        yield made


@pytest.fixture
def experiment(rig: Rig, kernel: str, artifacts: Path) -> Experiment:
    def run(rule: str, machine: str = "nvme", append: str = "", **fields: object) -> Result:
        case = {
            "machine": CAMPAIGN / f"{machine}.toml",
            "workload": "sh disk.sh",
            "check": "sh disk.sh 2",
            "files": (CAMPAIGN / "disk.sh",),
            "modules": ("nvme",),
            "append": f"{TIMES} {append}",
            "kernel": kernel,
            "plan": FaultPlan().extended([parse_rule(rule)]),
            **fields,
        }
        return rig.run(Case.model_validate(case), artifacts / "run")

    return run


def signs(result: Result) -> set[str]:
    return {finding.sign for finding in result.evidence}


def test_a_lost_completion_ends_in_a_timeout_and_a_reset(experiment: Experiment) -> None:
    result = experiment("completion device=nvme0 queue=1 nth=3 do=drop")
    assert result.outcome is Outcome.RECOVERED, result.evidence
    said = "\n".join(finding.text for finding in result.evidence)
    assert "timeout, aborting" in said and "timeout, reset controller" in said
    assert result.time_to_detect is not None and result.time_to_detect > 1
    assert result.check_status == 0


def test_an_aborted_read_of_memory_is_tried_again(experiment: Experiment) -> None:
    """By the block layer, which does not even say so; data is right."""
    result = experiment(f"dma.read {DATA} nth=3 do=abort")
    assert (result.outcome, result.injected, result.status) == (Outcome.MASKED, 1, 0), result.evidence


def test_and_if_that_goes_on_it_is_an_error(experiment: Experiment) -> None:
    """And no corruption."""
    result = experiment(f"dma.read {DATA} do=abort")
    assert (result.outcome, result.status, result.check_status) == (Outcome.FAILED, 1, 0), result.evidence
    assert {"nvme-error", "io-error"} <= signs(result)


@pytest.mark.parametrize("point", ["dma.read", "dma.write"])
def test_a_flipped_bit_is_silent(experiment: Experiment, point: str) -> None:
    """Nothing looks at data without protection information; on its way to the disk, and on its way back."""
    result = experiment(f"{point} {DATA} nth=3 do=flip")
    assert (result.outcome, result.status, result.check_status) == (Outcome.CORRUPTION, 65, 0), result.evidence
    assert signs(result) == {"data"}


#: Reads of one page into one buffer.  The pipe takes 16 of them at once, then there are 30 ms between two.
SLOW_READS = """
dd if=/dev/nvme0n1 bs=4k count=40 iflag=direct | while [ "$(dd bs=4k count=1 | wc -c)" != 0 ]; do usleep 30000; done
"""


@pytest.mark.parametrize("append", ["", "iommu.strict=1"], ids=["DMA-FQ", "strict"])
def test_the_window_of_deferred_flushes(experiment: Experiment, artifacts: Path, append: str) -> None:
    """Linux unmaps a page at once, and flushes IOTLBs 10 ms later or more: what a device does meanwhile gets through.

    Not so with iommu.strict=1: then the unit refuses it, and Linux says so.  A guest on a busy host may unmap a page
    later than the access: so one of twelve accesses is enough, in one of five runs.  Only single pages are deferred by
    all kernels: from 7.3, NVMe data of several pages is unmapped and flushed at once.
    """
    nth = ",".join(map(str, range(24, 36)))
    rule = f"dma.write device=nvme0 size=4096 nth={nth} do=use-after-unmap(6)"
    for _ in range(5):
        result = experiment(rule, "nvme-vtd", append, workload=SLOW_READS)
        late = [record["result"] for record in result.injections if record.get("late")]
        model = artifacts / "run" / "model.log"
        stale = model.read_text().count("is stale: cached is") if model.exists() else 0
        assert len(late) == 12, result.injections
        # What comes between the change of the tables and the invalidation that Linux waits for is stale, too: rarely.
        assert not append or stale <= 2, (late, stale)
        if "NOT_MAPPED" in late if append else "ok" in late and stale:
            break
    if append:
        assert "NOT_MAPPED" in late, late
        assert result.outcome is Outcome.RECOVERED and "iommu-fault" in signs(result), result.evidence
    else:
        assert "ok" in late and stale, (late, stale)
