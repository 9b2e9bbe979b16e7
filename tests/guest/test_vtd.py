"""A VT-d unit that stock kernels drive: they find it, translate edu's DMA by it, and report what it refuses."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vmodel.devices.vtd.unit import VtdDevice
from vmodel.guest.artifacts import find_kernel
from vmodel.guest.running import Guest, GuestSpec, run_guest
from vmodel.iommu.domain import TableDomain
from vmodel.machine import load
from vmodel.patience import patience

pytestmark = pytest.mark.guest
Compiled = Callable[[str], Path]
MACHINE = Path(__file__).parents[2] / "examples" / "edu-vtd.toml"


def guest(tmp_path: Path, kernel: str, *more: object, machine: Path = MACHINE) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "vmodel", "guest", machine, "--run-dir", tmp_path / "run", "--kernel", kernel, *more]
    return subprocess.run(list(map(str, line)), capture_output=True, text=True, timeout=patience(200))


def test_vfio(kernel: str, compiled: Compiled, tmp_path: Path) -> None:
    """IOVA != GPA by the guest's own tables; what is not mapped is refused, and reported by the guest's kernel."""
    program = compiled("examples/vfio_edu.c")
    modules = ["--module", "vfio_iommu_type1", "--module", "vfio-pci", "--file", program]
    done = guest(tmp_path, kernel, *modules, "--", "sh", "-c", "./vfio_edu && ls -1 /sys/bus/pci/devices && dmesg")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all is well" in done.stdout
    page = re.search(r"^iova 0x123400000 is at (0x\w+)$", done.stdout, re.MULTILINE)
    assert page is not None
    for what, kind, address, code in (
        ("write beside the mapping", "Write", "0x123402000", "05"),
        ("write to the physical address", "Write", page[1], "05"),
        ("read after unmap", "Read", "0x123400000", "06"),
    ):
        said = rf"{what} refused: DMAR: \[DMA {kind} NO_PASID\] Request device \[(0000:)?00:03.0\] "
        assert re.search(said + rf"fault addr {address} \[fault reason 0x{code}\]", done.stdout), (what, done.stdout)
    assert "DMAR: dmar0: reg_base_addr e0000000 ver 1:0" in done.stdout
    assert "DMAR: dmar0: Using Queued invalidation" in done.stdout
    assert "0000:00:03.0\n" in done.stdout
    assert "0000:00:02.0\n" not in done.stdout  # the unit has hidden itself


def test_namespace_devices(kernel: str, tmp_path: Path) -> None:
    """The guest's kernel finds the ANDD of `params.namespace`, and the scope that refers to it."""
    machine = tmp_path / "m.toml"
    text = MACHINE.read_text().replace(
        'address = "0000:00:02.0"\n',
        'address = "0000:00:02.0"\nparams = { namespace = { "\\\\_SB.UART" = "0000:00:1e.5" } }\n',
    )
    machine.write_text(text)
    done = guest(tmp_path, kernel, "--", "dmesg", machine=machine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"DMAR: ANDD device: 1 name: \\_SB.UART$", done.stdout, re.MULTILINE)
    assert "DMAR: dmar0: Using Queued invalidation" in done.stdout


BRIDGES = """
[machine]
name = "m"
[[iommu]]
name = "vtd0"
kind = "vt-d"
address = "0000:00:02.0"
[[bridge]]
name = "rp0"
kind = "root-port"
address = "0000:00:04.0"
secondary = 1
[[device]]
name = "alone"
model = "edu"
address = "0000:01:00.0"
params = { dma_mask = 0xffff_ffff_ffff }
[[bridge]]
name = "rp1"
kind = "root-port"
address = "0000:00:05.0"
secondary = 2
[[bridge]]
name = "to-pci"
kind = "pcie-to-pci"
address = "0000:02:00.0"
secondary = 3
[[device]]
name = "left"
model = "edu"
address = "0000:03:01.0"
params = { dma_mask = 0xffff_ffff_ffff }
[[device]]
name = "right"
model = "edu"
address = "0000:03:02.0"
[[bridge]]
name = "rp2"
kind = "root-port"
address = "0000:00:06.0"
secondary = 4
[[device]]
name = "mixed"
model = "edu"
address = "0000:04:00.0"
[[device]]
name = "outside"
model = "edu"
address = "0000:04:00.1"
iommu = "none"
"""


def test_bridges(kernel: str, compiled: Compiled, tmp_path: Path) -> None:
    """The guest's groups are ours; a device behind a bridge to PCI is known by the bridge's id."""
    machine = tmp_path / "m.toml"
    machine.write_text(BRIDGES)
    program = compiled("examples/vfio_edu.c")
    # The kernel's driver reports ten lines in 5 seconds.
    script = (
        "ls -1d /sys/kernel/iommu_groups/*/devices/* && ./vfio_edu 0000:01:00.0 && sleep 6 && ./vfio_edu 0000:03:01.0"
    )
    modules = ["--module", "vfio_iommu_type1", "--module", "vfio-pci", "--file", program]
    done = guest(tmp_path, kernel, *modules, "--", "sh", "-c", script, machine=machine)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Request device \[(0000:)?01:00.0\]", done.stdout)
    assert re.search(r"Request device \[(0000:)?03:00.0\]", done.stdout)
    theirs: dict[str, set[str]] = {}
    for number, address in re.findall(r"^/sys/kernel/iommu_groups/(\d+)/devices/(\S+)$", done.stdout, re.MULTILINE):
        theirs.setdefault(number, set()).add(address)
    loaded = load(machine)
    ours = {frozenset(str(e.source.bdf) for e in group.endpoints) for group in loaded.system.groups}  # type: ignore[union-attr]
    loaded.close()
    # A bridge that is not listed, because not all that is below it is behind the unit, is in no group of the guest's.
    assert {frozenset(group) for group in theirs.values()} == ours - {frozenset({"0000:00:06.0"})}


def test_no_dma_without_a_mapping(kernel: str, compiled: Compiled, tmp_path: Path) -> None:
    """uio knows no IOMMU: DMA by physical address is refused by default, and gets through with iommu=pt."""
    program = compiled("examples/edu_check.c")
    more = ["--module", "uio_pci_generic", "--file", program]
    script = "cat /sys/bus/pci/devices/0000:00:03.0/iommu_group/type; ./edu_check"
    done = guest(tmp_path, kernel, *more, "--", "sh", "-c", script)
    assert done.stdout.startswith("DMA-FQ\n") and done.returncode == 1, done
    assert re.search(r"DMAR: \[DMA Read NO_PASID\] Request device \[(0000:)?00:03.0\]", done.stderr), done
    done = guest(tmp_path, kernel, *more, "--append", "iommu=pt", "--", "sh", "-c", script)
    assert done.stdout.startswith("identity\n") and done.returncode == 0, done
    assert "equal" in done.stdout


def test_warm_reboot(kernel: str, compiled: Compiled, tmp_path: Path) -> None:
    """The firmware finds the function again, and the next kernel the unit."""
    machine = load(MACHINE)
    unit = machine.devices["vtd0"]
    assert isinstance(unit, VtdDevice) and unit.contexts is not None
    spec = GuestSpec(
        command="echo booted; read what; [ $what = go ] || reboot -f; ./vfio_edu",
        kernel=find_kernel(kernel),
        modules=["vfio_iommu_type1", "vfio-pci"],
        files=[compiled("examples/vfio_edu.c")],
        allow_reboot=True,
    )
    try:
        with machine.serve(tmp_path):
            spec.qemu_args = machine.qemu_args(tmp_path)
            with Guest(spec) as running:
                running.expect(rb"booted")
                assert unit.contexts.enabled
                running.send(b"again\n")
                running.expect(rb"booted")
                assert running.boots == 2
                assert unit.contexts.enabled and unit.config.header.VENDOR_ID == 0xFFFF
                running.send(b"go\n")
                running.expect(rb"round trip 1 equal")
                group = machine.system["edu0"].group
                assert group is not None and isinstance(group.domain, TableDomain)
                # What the guest maps can be looked at from here.
                assert group.domain.iova_to_phys(0x1_2340_0000) is not None
                result = running.wait()
        assert result.status == 0, result.output
        assert unit.errors == 0 and machine.devices["edu0"].errors == 3  # as the program was refused
    finally:
        machine.close()


def test_the_registers_are_not_where_dmar_says(
    kernel: str, compiled: Compiled, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Linux leaves the unit alone, and the device works without it."""
    machine = load(MACHINE)
    unit = machine.devices["vtd0"]
    assert isinstance(unit, VtdDevice)
    unit.base = 0xC800_0000  # type: ignore[misc]
    spec = GuestSpec(
        command="dmesg | grep DMAR; cat /sys/bus/pci/devices/0000:00:02.0/vendor; ./edu_check",
        kernel=find_kernel(kernel),
        modules=["uio_pci_generic"],
        files=[compiled("examples/edu_check.c")],
    )
    try:
        with machine.serve(tmp_path):
            spec.qemu_args = machine.qemu_args(tmp_path)
            result = run_guest(spec)
    finally:
        machine.close()
    assert result.status == 0, result.output
    assert b"No supported address widths. Not attempting DMA translation" in result.output
    assert b"\n0x1234\n" in result.output  # nobody has read CAP
    (said,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert said.startswith("vtd0: the firmware has placed the registers at 0xe0000000, DMAR says 0xc8000000:")
