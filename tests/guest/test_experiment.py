"""Experiments with stock drivers and programs: each outcome class, as it comes about."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmodel.errors import ConfigError
from vmodel.experiment import Result, Rig
from vmodel.experiment.case import Case
from vmodel.experiment.oracle import Outcome
from vmodel.inject import FaultPlan, parse_rule

pytestmark = pytest.mark.guest
EXAMPLES = Path(__file__).parents[2] / "examples"
#: edu_check says on its output what is wrong; that data is, is worth a status of its own.
CHECK = """
./edu_check > out; status=$?
cat out
grep -q 'the data that was read back differs' out && exit 65
exit $status
"""


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    with Rig() as made:
        yield made


@pytest.fixture
def edu(compiled: Callable[[str], Path], rig: Rig, artifacts: Path) -> Callable[..., Result]:
    """Runs a workload with edu, under rules."""
    count = 0

    def run(*rules: str, **fields: object) -> Result:
        nonlocal count
        count += 1
        plan = FaultPlan().extended([parse_rule(rule) for rule in rules])
        case = Case.model_validate(
            {
                "machine": EXAMPLES / "edu.toml",
                "workload": CHECK,
                "files": (compiled("examples/edu_check.c"),),
                "modules": ("uio_pci_generic",),
                "plan": plan,
                **fields,
            }
        )
        assert Case.model_validate_json(case.model_dump_json()) == case
        result = rig.run(case, artifacts / str(count))
        assert Result.model_validate_json((artifacts / str(count) / "result.json").read_text()) == result
        for name in result.artefacts.values():
            assert (artifacts / str(count) / name).exists()
        return result

    return run


def test_nothing_of_which_a_guest_needs_a_rest(edu: Callable[..., Result]) -> None:
    """Not activated, masked and silent corruption, in one guest: the last of them has it replaced."""
    clean = edu()
    assert (clean.outcome, clean.status, clean.evidence, clean.injected) == (Outcome.NOT_ACTIVATED, 0, (), 0)
    late = edu("mmio.read register=LIVENESS nth=5000 do=ones", seed=3)
    assert (late.outcome, late.seed, late.rules[0]["matched"]) == (Outcome.NOT_ACTIVATED, 3, 1000)
    masked = edu("mmio.write register=LIVENESS nth=7 do=duplicate")
    assert (masked.outcome, masked.injected, masked.time_to_detect) == (Outcome.MASKED, 1, None)
    wrong = edu("dma.read nth=1 do=flip(3)", check="exit 0")
    assert (wrong.outcome, wrong.status, wrong.check_status) == (Outcome.CORRUPTION, 65, 0)
    assert wrong.signatures == ("data",) and wrong.time_to_detect is not None
    assert [result.nth - clean.nth for result in (clean, late, masked, wrong)] == [0, 1, 2, 3]
    assert {*clean.versions} == {"vmodel", "python", "qemu", "kernel"}


def test_an_error(edu: Callable[..., Result], artifacts: Path) -> None:
    """That comes from the check after the workload, too, when no rule is armed any more."""
    failed = edu("mmio.read register=ID nth=1 do=ones", workload="./edu_check || true", check="exit 4")
    assert (failed.outcome, failed.status, failed.check_status) == (Outcome.FAILED, 0, 4)
    assert "edu_check: id 0xffffffff is not edu's" in (artifacts / "1" / "output.log").read_text()
    (record,) = map(json.loads, (artifacts / "1" / "injections.jsonl").read_text().splitlines())
    assert (record["after"], failed.injections) == ("ffffffff", (record,))


def test_a_hang(edu: Callable[..., Result], artifacts: Path) -> None:
    """A lost interrupt, and a program that waits for it without end: also where the time limit is multiplied.

    The artefacts say where the CPU is; that the kernel was asked is no finding.
    """
    hung = edu("irq nth=1 do=drop", workload="EDU_CHECK_WAIT=-1 ./edu_check", timeout=3)
    assert (hung.outcome, hung.status) == (Outcome.HANG, None)
    assert any(finding.oracle == "time" for finding in hung.evidence)
    assert "CPU 0: " in (artifacts / "1" / "hang.log").read_text()
    assert "RIP=" in (artifacts / "1" / "registers.log").read_text()
    assert not {finding.sign for finding in hung.evidence} & {"warning", "error"}, hung.evidence


def test_a_crash(edu: Callable[..., Result], artifacts: Path) -> None:
    """The workload has the kernel panic: QEMU and the console report it."""
    crash = edu("mmio.read register=ID nth=1 do=ones", workload="./edu_check || echo c > /proc/sysrq-trigger")
    assert crash.outcome is Outcome.CRASH and crash.time_to_detect is not None
    assert {finding.oracle for finding in crash.evidence} >= {"console", "qmp"}
    assert "panic: Kernel panic - not syncing: sysrq triggered crash" in " ".join(crash.signatures)
    assert "sysrq triggered crash" in (artifacts / "1" / "console.log").read_text()


def test_memory_that_a_device_overwrites(edu: Callable[..., Result]) -> None:
    """No IOMMU holds it back, and nothing is left that could say so."""
    assert edu("dma.write nth=1 do=overrun(16777216)").outcome is Outcome.CRASH


NVME = """
[machine]
name = "nvme"
[[device]]
name = "nvme0"
model = "nvme"
address = "0000:00:04.0"
params = { queues = 1, namespaces = [ { memory = "16M", lba = 512 } ] }
"""


def test_detected_and_recovered(edu: Callable[..., Result], kernel: str, tmp_path: Path) -> None:
    """A completion is lost: the driver's time for it is over, it asks, or resets the controller, and goes on."""
    (tmp_path / "nvme.toml").write_text(NVME)
    result = edu(
        "completion queue=1 nth=3 do=drop",
        machine=tmp_path / "nvme.toml",
        kernel=kernel,
        workload="dd if=/dev/nvme0n1 of=/dev/null bs=4096 count=64 iflag=direct && echo read",
        modules=("nvme",),
        files=(),
        append="nvme_core.io_timeout=1",
    )
    assert result.outcome is Outcome.RECOVERED, result.evidence
    assert "nvme-timeout" in {finding.sign for finding in result.evidence}
    assert result.time_to_detect is not None and result.time_to_recover is not None
    assert 0.5 < result.time_to_detect <= result.time_to_recover


def test_the_experiment_itself(edu: Callable[..., Result]) -> None:
    """QEMU that does not start, a workload that fails without a fault; and mistakes of the user's are errors."""
    dead = edu(qemu_args=("-device", "no-such-device"))
    assert dead.outcome is Outcome.HARNESS and "no-such-device" in dead.evidence[0].text
    with pytest.raises(ConfigError, match="no-such-file"):
        edu(files=(Path("no-such-file"),))
    with pytest.raises(ConfigError, match="no device is called 'edu1'"):
        edu("irq device=edu1 do=drop")


def test_a_fault_that_is_there_at_boot(edu: Callable[..., Result]) -> None:
    """No BAR: a driver that comes finds nothing to map."""
    result = edu("connection do=no-bar(0)", arm="boot")
    assert (result.outcome, result.status) == (Outcome.FAILED, 1), result.evidence
    assert result.injected >= 1
