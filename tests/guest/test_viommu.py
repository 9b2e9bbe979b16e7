"""A virtio-iommu that stock kernels drive: groups, DMA by the guest's mappings, and faults in the guest's log."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vmodel.guest.artifacts import STABLE
from vmodel.machine import load
from vmodel.patience import patience

pytestmark = pytest.mark.guest
Compiled = Callable[[str], Path]
EXAMPLES = Path(__file__).parents[2] / "examples"


def guest(machine: Path, tmp_path: Path, kernel: str, *more: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "vmodel", "guest", machine, "--run-dir", tmp_path / "run", "--kernel", kernel]
    line += ["--module", "virtio_iommu", *more]
    return subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=patience(200))


def test_vfio(kernel: str, compiled: Compiled, tmp_path: Path) -> None:
    """IOVA != GPA by the guest's own requests; what is not mapped is refused, and reported by the guest's kernel."""
    more = ["--module", "vfio_iommu_type1", "--module", "vfio-pci", "--file", compiled("examples/vfio_edu.c")]
    said = "virtio_iommu virtio0: page fault"
    command = ["./vfio_edu", "0000:00:03.0", said]
    done = guest(EXAMPLES / "edu-viommu.toml", tmp_path, kernel, *more, "--stats", "--", *command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout
    for what, address, kind in (
        ("write beside the mapping", "0x123402000", "W"),
        ("read after unmap", "0x123400000", "R"),
    ):
        line = rf"{what} refused: {said} from EP 24 at {address} \[{kind}\]"
        assert re.search(line, done.stdout), (what, done.stdout)
    assert re.search(r"^  viommu0: edu0 \[0x18\]: WRITE at iova 0x123402000: NOT_MAPPED", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(("append", "kind"), [("", "DMA-FQ"), ("iommu.strict=1", "DMA"), ("iommu=pt", "identity")])
def test_types_of_groups(append: str, kind: str, compiled: Compiled, tmp_path: Path) -> None:
    """uio knows no IOMMU: DMA by physical address gets through with identity only."""
    more = ["--module", "uio_pci_generic", "--file", compiled("examples/edu_check.c"), "--append", append]
    script = (
        "echo 1234 11e8 >/sys/bus/pci/drivers/uio_pci_generic/new_id;"
        "cat /sys/bus/pci/devices/0000:00:03.0/iommu_group/type; ./edu_check >/dev/null"
    )
    done = guest(EXAMPLES / "edu-viommu.toml", tmp_path, STABLE, *more, "--", "sh", "-c", script)
    assert (done.stdout, done.returncode) == (f"{kind}\n", 0 if kind == "identity" else 1), done


MODELS = (
    EXAMPLES.joinpath("iommu-groups.toml")
    .read_text()
    .replace('kind = "vt-d"', 'kind = "{kind}"\naddress = "0000:00:02.0"')
    .replace('name = "iommu-groups"', 'name = "m"')
)


@pytest.mark.parametrize("kind", ["virtio-iommu", "vt-d"])
def test_the_guests_groups_are_ours(kind: str, kernel: str, tmp_path: Path) -> None:
    """All of examples/iommu-groups.toml but the switch, where Linux is more trusting: see decision 0004."""
    file = tmp_path / "m.toml"
    file.write_text(MODELS.replace("{kind}", kind))
    script = (
        "for d in /sys/bus/pci/devices/*; do echo vfio-pci >$d/driver_override; done;"
        "for d in /sys/bus/pci/devices/*; do echo $(basename $d) >/sys/bus/pci/drivers_probe; done;"
        "cd /sys/kernel/iommu_groups; for g in *; do echo $g $(ls $g/devices); done"
    )
    done = guest(
        file, tmp_path, kernel, "--module", "vfio_iommu_type1", "--module", "vfio-pci", "--", "sh", "-c", script
    )
    theirs = {frozenset(line.split()[1:]) for line in done.stdout.splitlines()}
    machine = load(file)
    ours = {frozenset(str(e.source) for e in group.endpoints) for group in machine.system.groups}
    switch = {"0000:05:00.0", "0000:05:01.0", "0000:06:00.0", "0000:07:00.0"}
    machine.close()
    assert {group for group in theirs if not group & switch} == {group for group in ours if not group & switch}
