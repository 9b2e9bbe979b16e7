"""The model and its driver, in stock guests."""

import zlib

import pytest

from vmodel.experiment.oracle import Outcome

pytestmark = [pytest.mark.machine("crc.toml"), pytest.mark.guest(files=["crc.sh"], append="mem=256M")]


def test_the_driver(vm_booted, machine):
    done = vm_booted.run("sh crc.sh", timeout=30)
    assert (done.status, done.output) == (0, b"crc %08x\n" % zlib.crc32(b"all is well here"))
    assert machine.devices["crc0"].errors == 0


@pytest.mark.parametrize(
    ("faults", "outcome"),
    [
        (None, Outcome.NOT_ACTIVATED),
        ("mmio.write register=SOURCE nth=1 do=duplicate", Outcome.MASKED),
        ("plan.toml", Outcome.CORRUPTION),
        ("dma.read nth=1 do=abort", Outcome.FAILED),
    ],
)
def test_what_the_driver_does_about(experiment, faults, outcome):
    result = experiment("sh crc.sh", faults)
    assert result.outcome is outcome, result.evidence
