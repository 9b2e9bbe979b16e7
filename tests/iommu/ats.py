"""A device with ATS behind a VT-d unit."""

from __future__ import annotations

from tests.guest.ats_edu import AtsEdu
from tests.iommu.vtd_bench import Bench

MODEL = "tests.guest.ats_edu:AtsEdu"
DTE = 4
#: Of config space: ATS Control.
ATS_CONTROL = 0x106


def edu(bench: Bench, name: str = "edu0") -> AtsEdu:
    device = bench.machine.devices[name]
    assert isinstance(device, AtsEdu)
    return device


def switch(bench: Bench, on: bool, name: str = "edu0") -> None:
    edu(bench, name).config.write(ATS_CONTROL, b"\0\x80" if on else b"\0\0")
    assert edu(bench, name).ats.enabled is on
