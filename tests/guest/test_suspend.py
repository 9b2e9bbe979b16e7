"""Faults while a guest suspends and resumes its devices: a phase of its own (docs/injection.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmodel.experiment import Rig
from vmodel.experiment.case import Case
from vmodel.experiment.oracle import Outcome
from vmodel.explore.script import cycle
from vmodel.inject import FaultPlan, parse_rule

pytestmark = pytest.mark.guest
MACHINE = Path(__file__).parents[2] / "examples" / "campaign" / "nvme-vtd.toml"
PHASES = ("probe", "running", "suspend", "remove")


def test_a_rule_of_the_phase_suspend(artifacts: Path) -> None:
    """The driver of NVMe disables the controller for a suspension and enables it again, as when it is loaded."""
    script = cycle(["nvme"], "dd if=/dev/nvme0n1 of=/dev/null bs=4k count=8", wait_for="/dev/nvme0n1", suspend=True)
    case = Case(machine=MACHINE, workload=script, extra_modules=("nvme",), timeout=60)
    watch = [parse_rule(f"mmio.write device=nvme0 register=CC phase={phase} do=watch") for phase in PHASES]
    with Rig() as rig:
        result = rig.run(case.model_copy(update={"plan": FaultPlan(rule=tuple(watch))}), artifacts / "watched")
        assert (result.outcome, result.status) == (Outcome.MASKED, 0), result.evidence
        fired = dict(zip(PHASES, (rule["fired"] for rule in result.rules), strict=True))
        assert fired["suspend"] >= 2 and sum(fired.values()) >= fired["suspend"] + 2, fired
        # As if the controller did not come back from the suspension.
        lost = parse_rule("mmio.read device=nvme0 register=CSTS phase=suspend do=ones")
        result = rig.run(case.model_copy(update={"plan": FaultPlan(rule=(lost,))}), artifacts / "lost")
    assert result.injected and result.outcome in (Outcome.RECOVERED, Outcome.FAILED), result.evidence
    assert "nvme-reset" in {finding.sign for finding in result.evidence}
