"""The model and its driver, in stock guests: the driver is built for each kernel, and loaded when the guest boots."""

import zlib

import pytest

from vmodel.experiment.oracle import Outcome

pytestmark = pytest.mark.machine("crc.toml")


def test_the_driver(vm_booted, machine):
    done = vm_booted.run("sh crc.sh", timeout=30)
    assert (done.status, done.output) == (0, b"%08x\n" % zlib.crc32(b"all is well here"))
    assert machine.devices["crc0"].errors == 0


@pytest.mark.parametrize(
    ("faults", "outcome"),
    [
        (None, Outcome.NOT_ACTIVATED),
        ("mmio.write register=SOURCE nth=1 do=duplicate", Outcome.MASKED),
        ("irq nth=1 do=drop", Outcome.RECOVERED),
        ("plan.toml", Outcome.CORRUPTION),
        ("dma.read nth=1 do=abort", Outcome.FAILED),
    ],
)
def test_what_the_driver_does_about(experiment, faults, outcome):
    result = experiment("sh crc.sh", faults)
    assert result.outcome is outcome, result.evidence
