"""The DMA sanitizer against a driver whose bugs are known (examples/dma): each is found, and without one nothing is."""

from __future__ import annotations

import gzip
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.waiting import until
from vmodel.dma_report import DmaFinding, DmaReport, DmaWatch
from vmodel.experiment import Case, Result, Rig
from vmodel.experiment.oracle import Outcome
from vmodel.guest.artifacts import find_kernel
from vmodel.guest.booted import BootedGuest
from vmodel.guest.options import spec_of
from vmodel.machine import Machine, parse
from vmodel.patience import patience

pytestmark = pytest.mark.guest
FOLDER = Path(__file__).parents[2] / "examples" / "dma"
LINE = re.compile(r"\bdma: bug=\w+ iova=(0x[0-9a-f]+) bytes=(\d+)$", re.MULTILINE)
#: By bug: its finding.  `leak` is the last one, as its mapping stays.
SIGNS = {
    "after_unmap": "dma-after-unmap",
    "unmapped": "dma-unmapped",
    "direction": "dma-direction",
    "in_flight": "dma-in-flight",
    "both_directions": "dma-both-directions",
    "too_large": "dma-too-large",
    "unused": "dma-unused",
    "mapped_twice": "dma-mapped-twice",
    "exposed": "dma-exposed",
    "leak": "dma-leak",
}


class Bench:
    """A machine and its guest."""

    def __init__(self, machine: Machine, guest: BootedGuest, version: tuple[int, ...]) -> None:
        self.machine, self.guest, self.version = machine, guest, version

    def run(self, bug: str) -> tuple[DmaReport, int, int]:
        """Loads the driver and removes it: the report, IOVA and size of the planted bug (0, 0: there is none)."""
        self.guest.clear()
        with DmaWatch(self.machine.name, self.machine.system.endpoints) as watch:
            done = self.guest.run(f"modprobe edudma bug={bug} && rmmod edudma")
            if bug == "in_flight":  # the transfer ends after the driver has
                until(lambda: "dma-in-flight" in watch.report().signs, "the device accesses memory")
            watch.seal(settle=patience(1.0))
        log = self.guest.dmesg()
        assert done.status == 0, done.output.decode() + log
        match = LINE.search(log)
        assert (match is None) == (not bug), log
        return watch.report(), int(match[1], 16) if match else 0, int(match[2]) if match else 0

    def without_the_iommus(self, report: DmaReport) -> list[DmaFinding]:
        """The findings that are the driver's: VT-d's driver in Linux makes what is writable readable up to 6.12.

        In intel_iommu_map_pages() of 6.12 DMA_PTE_READ is set with each mapping of a domain whose tables are
        second-stage; docs/drivers-under-faults.md found it by hand.
        """
        found = [finding for _, finding in report.findings]
        if self.machine.system.iommus[0].reports_maps and self.version < (6, 13):
            return [finding for finding in found if finding.sign != "dma-both-directions"]
        return found


@contextmanager
def booted(name: str, params: str, kernel: str, folder: Path, artifacts: Path) -> Iterator[Bench]:
    file = FOLDER / f"{name}.toml"
    text = file.read_text().replace('address = "0000:00:02.0"', f'address = "0000:00:02.0"\n{params}')
    machine = parse(text, file)
    try:
        with machine.serve(folder):
            spec = spec_of(machine, machine.qemu_args(folder), kernel, command="", timeout=120)
            with BootedGuest(spec, artifacts=artifacts) as guest:
                yield Bench(machine, guest, find_kernel(kernel).version)
    finally:
        machine.close()


@pytest.mark.parametrize(
    ("name", "params"), [("virtio-iommu", ""), ("vt-d", "params = { caching_mode = true }")], ids=["virtio", "vtd"]
)
def test_each_bug_is_found(
    name: str, params: str, kernel: str, tmp_path: Path, artifacts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL, "vmodel")  # each refused access is a line
    with booted(name, params, kernel, tmp_path, artifacts) as bench:
        report, _, _ = bench.run("")
        (endpoint,) = report.endpoints
        assert (endpoint.name, endpoint.known, endpoint.totals.mapped) == ("edu0", "reported", 4)
        assert endpoint.totals.live == endpoint.totals.other_incidents == 0
        assert bench.without_the_iommus(report) == []
        assert all(one.text == "only written" for _, finding in report.findings for one in finding.examples)
        for bug, sign in SIGNS.items():
            report, iova, size = bench.run(bug)
            found = [finding for _, finding in report.findings if finding.sign == sign]
            assert found, f"{bug}: found {report.signs}"
            shown = found[0].examples
            if bug == "unmapped":
                assert [one.iova for one in shown] == [iova]
            elif bug == "leak":  # Linux may map it in pieces
                assert (min(one.iova for one in shown), found[0].bytes) == (iova, size)
            else:
                page = iova & ~0xFFF
                whole = max(size, 4096)
                assert (page, whole) in [(one.iova, one.size) for one in shown], f"{bug}: {shown}"
            others = {other.sign for other in bench.without_the_iommus(report)} - {sign}
            # The device touches 64 bytes of a page, or nothing of what was unmapped or is of the other direction.
            assert others <= {"dma-unused", "dma-exposed"}, f"{bug}: found {others}, too"


def test_stale_translations_are_found(
    kernel: str, tmp_path: Path, artifacts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without caching mode Linux defers the flush: the device writes by entries of the IOTLB that are stale."""
    caplog.set_level(logging.CRITICAL, "vmodel")
    with booted("vt-d", "", kernel, tmp_path, artifacts) as bench:
        report, iova, size = bench.run("stale")
        (finding,) = [finding for _, finding in report.findings if finding.sign == "dma-after-unmap"]
        assert report.endpoints[0].known == "learnt"
        assert any("by a stale IOTLB entry" in one.text for one in finding.examples), finding
        assert {(one.iova, one.size) for one in finding.examples} == {(iova, size)}


def test_an_experiment_has_the_findings(kernel: str, artifacts: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each case has its own, in a guest that they share; a sign is a failure if the case says so."""
    caplog.set_level(logging.CRITICAL, "vmodel")
    case = Case(machine=FOLDER / "virtio-iommu.toml", workload="modprobe edudma && rmmod edudma", kernel=kernel)
    wrong = {"workload": "modprobe edudma bug=direction && rmmod edudma", "dma_report": True}
    with Rig(reuse=set(Outcome)) as rig:
        right = rig.run(case.model_copy(update={"dma_fails": ("error",)}), artifacts / "right")
        only_said = rig.run(case.model_copy(update=wrong), artifacts / "said")
        failed = rig.run(case.model_copy(update={**wrong, "dma_fails": ("dma-direction",)}), artifacts / "failed")
        without = rig.run(case, artifacts / "without")
    assert [result.nth for result in (right, only_said, failed, without)] == [1, 2, 3, 4]
    assert (right.outcome, right.findings, right.signs) == (Outcome.NOT_ACTIVATED, (), ())
    assert only_said.outcome is Outcome.NOT_ACTIVATED and "dma-direction" in only_said.signs
    assert failed.outcome is Outcome.FAILED and "dma-direction edu0" in failed.signatures
    assert without.dma is None and "dma" not in without.artefacts and without.findings == ()
    stored = gzip.decompress((artifacts / "failed" / failed.artefacts["dma"]).read_bytes())
    assert DmaReport.model_validate_json(stored) == failed.dma
    assert Result.model_validate_json((artifacts / "failed" / "result.json").read_text()).findings == failed.findings
