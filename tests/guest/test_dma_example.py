"""The driver with a bug of each kind that DMA can have (examples/dma): each happens, and without one all is right."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.waiting import until
from vmodel.errors import Access
from vmodel.guest.booted import BootedGuest
from vmodel.guest.options import spec_of
from vmodel.iommu.fault import FaultRecord
from vmodel.machine import Machine, load

pytestmark = pytest.mark.guest
FOLDER = Path(__file__).parents[2] / "examples" / "dma"
#: By bug: bytes of its mapping, and the access that the IOMMU refuses.
BUGS: dict[str, tuple[int, Access | None]] = {
    "leak": (3 * 4096, None),
    "after_unmap": (4096, Access.WRITE),
    "unmapped": (4096, Access.READ),
    "direction": (4096, Access.WRITE),
    "in_flight": (4096, None),
    "both_directions": (4096, None),
    "too_large": (65536, None),
    "unused": (4096, None),
    "mapped_twice": (4096, None),
    "exposed": (64, None),
    "stale": (4096, None),
}
LINE = re.compile(r"\bdma: bug=(\w+) iova=(0x[0-9a-f]+) bytes=(\d+)$", re.MULTILINE)


@dataclass
class Bench:
    """A machine, its guest, and what its IOMMU has refused."""

    machine: Machine
    guest: BootedGuest
    refused: list[FaultRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine.system.iommus[0].on_fault(self.refused.append)
        self.device = self.machine.devices["edu0"]

    def run(self, bug: str) -> str:
        """Loads the driver and removes it; the kernel's log."""
        self.refused.clear()
        self.guest.clear()
        done = self.guest.run(f"modprobe edudma bug={bug} && rmmod edudma")
        log = self.guest.dmesg()
        assert done.status == 0, done.output.decode() + log
        return log

    def is_mapped(self, iova: int) -> bool:
        group = self.machine.system["edu0"].group
        return group is not None and group.domain.iova_to_phys(iova) is not None


@pytest.mark.parametrize("kind", ["virtio-iommu", "vt-d"])
def test_each_bug(kind: str, kernel: str, tmp_path: Path, artifacts: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "vmodel")  # each refused access is a line
    machine = load(FOLDER / f"{kind}.toml")
    try:
        with machine.serve(tmp_path):
            spec = spec_of(machine, machine.qemu_args(tmp_path), kernel, command="", timeout=120)
            with BootedGuest(spec, artifacts=artifacts) as guest:
                _check_all(Bench(machine, guest))
    finally:
        machine.close()


def _check_all(bench: Bench) -> None:
    _check_without(bench)
    for bug in BUGS:
        _check(bench, bug)
    _check_without(bench)
    assert 'error -EINVAL: there is no bug "none"' in bench.run("none")


def _check_without(bench: Bench) -> None:
    errors = bench.device.errors
    log = bench.run("")
    assert not LINE.search(log) and "error" not in log
    assert (bench.refused, bench.device.errors) == ([], errors)


def _check(bench: Bench, bug: str) -> None:
    size, access = BUGS[bug]
    errors = bench.device.errors
    found = LINE.findall(bench.run(bug))
    assert [(name, int(said)) for name, _, said in found] == [(bug, size)]
    iova = int(found[0][1], 16)
    refused = [(one.iova, one.access) for one in bench.refused]
    if bug == "stale":  # what comes after the flush
        assert set(refused) <= {(iova, Access.WRITE)}
    else:
        assert refused == ([] if access is None else [(iova, access)]), bug
    # Without bus mastering the IOMMU sees nothing of an access.
    failed = errors + (1 if bug == "in_flight" else len(refused))
    until(lambda: bench.device.errors >= failed, f"{bug}: {failed} accesses that fail")
    assert bench.device.errors == failed, bug
    if bug == "leak":
        assert bench.is_mapped(iova)
    else:
        until(lambda: not bench.is_mapped(iova), f"{bug}: the flush after the unmap")
