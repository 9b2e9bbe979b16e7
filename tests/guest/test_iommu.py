"""Machines with bridges and IOMMUs whose domains come from the machine file, in real guests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vmodel.machine import load
from vmodel.patience import patience

pytestmark = pytest.mark.guest
EXAMPLES = Path(__file__).parents[2] / "examples"
VMODEL = [sys.executable, "-m", "vmodel"]


def guest(machine: Path, tmp_path: Path, kernel: str, *more: object) -> subprocess.CompletedProcess[str]:
    line = [*VMODEL, "guest", machine, "--run-dir", tmp_path / "run", "--kernel", kernel, *more]
    return subprocess.run(
        list(map(str, line)), env=dict(os.environ), capture_output=True, text=True, timeout=patience(200)
    )


def test_every_function_is_where_the_file_says(kernel: str, tmp_path: Path) -> None:
    """Bridges, and the bus numbers that the firmware gives."""
    machine = load(EXAMPLES / "iommu-groups.toml")
    script = 'cd /sys/bus/pci/devices; for d in *; do echo "$d $(cat $d/class)"; done'
    done = guest(machine.file, tmp_path, kernel, "--", "sh", "-c", script)
    found = dict(line.split() for line in done.stdout.splitlines())
    for function in machine.topology.functions():
        wanted = "0x0604" if function.kind.is_bridge else "0x00ff"
        assert found[str(function.bdf)].startswith(wanted), (function, found)
    machine.close()


def test_dma_by_listed_mappings(kernel: str, compiled: Callable[[str], Path], tmp_path: Path) -> None:
    """A round trip with IOVA != GPA behind a root port, and an access that is refused and recorded."""
    machine = tmp_path / "m.toml"
    machine.write_text(
        """
[machine]
name = "m"
memory = "256M"

[[iommu]]
name = "iommu0"
kind = "amd-vi"

[[bridge]]
name = "rp0"
kind = "root-port"
address = "0000:00:04.0"
secondary = 1

[[device]]
name = "edu0"
model = "edu"
address = "0000:01:00.0"
params = { dma_mask = 0xff_ffff_ffff }

[[group]]
device = "edu0"
domain = "paging"

[[group.mapping]]
iova = "0x40_0000_0000"
gpa = 0
size = "256M"
"""
    )
    check = compiled("examples/edu_check.c")
    command = ["./edu_check", "0000:01:00.0+0x4000000000"]
    more = ["--module", "uio_pci_generic", "--file", check, "--stats"]
    done = guest(machine, tmp_path, kernel, *more, "--", *command)
    assert done.returncode == 0, done
    page = re.search(r"^refused +DMA to iova (0x\w+),", done.stdout, re.MULTILINE)
    assert page is not None and re.search(r"equal: iova 0x40\w+ leads to page 0x\w+$", done.stdout, re.MULTILINE)
    (said,) = re.findall(r"^  iommu0: edu0 .*$", done.stderr, re.MULTILINE)
    assert said == f"  iommu0: edu0 [0x100]: WRITE at iova {page[1]}: NOT_MAPPED (DMA-FQ domain, group 1)"
