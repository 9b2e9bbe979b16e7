"""VT-d's scalable mode by stock kernels: first- and second-stage tables by RID_PASID, ATS, page requests."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.ats_edu import AtsEdu
from tests.guest.rng import MARK
from vmodel.devices.vtd.regs import RootAddress, TranslationTableMode
from vmodel.devices.vtd.unit import VtdDevice
from vmodel.guest.artifacts import find_kernel
from vmodel.guest.running import Guest, GuestSpec
from vmodel.iommu.domain import TableDomain
from vmodel.iommu.pgtable import TableFormat
from vmodel.machine import Machine, parse

pytestmark = pytest.mark.guest

MACHINE = """
[machine]
name = "m"
memory = "512M"
[[iommu]]
name = "vtd0"
kind = "vt-d"
address = "0000:00:02.0"
params = { scalable = true, ats = true, report_stale = true }
capabilities = { input_bits = 57 }
[[device]]
name = "edu0"
model = "tests.guest.ats_edu:AtsEdu"
address = "0000:00:03.0"
params = { dma_mask = 0xffff_ffff_ffff }
[[device]]
name = "rng0"
model = "rng.py:Rng"
address = "0000:00:04.0"
"""


def table_of(machine: Machine, name: str) -> tuple[TableFormat, int]:
    group = machine.system[name].group
    assert group is not None and isinstance(group.domain, TableDomain)
    return group.domain.table.format, group.domain.table.levels


def test_scalable_mode(
    kernel: str,
    compiled: Callable[[str], Path],
    tmp_path: Path,
    artifacts: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The kernel finds the mode and what goes with it; drivers and VFIO do DMA; faults have scalable mode's reasons."""
    # What it takes for VFIO, and says of an address that is not mapped.  The DMA API has first-stage tables.
    recent = find_kernel(kernel).version >= (7, 0)
    vfio, reason = (TableFormat.X86, "71") if recent else (TableFormat.VTD_SECOND, "79")
    script = """
        dd if=/dev/hwrng bs=64 count=200 2>/dev/null; read go
        ./vfio_edu || exit; read go
        dmesg | grep -i -e 'DMAR:' -e SVM
    """
    machine = parse(MACHINE, Path(__file__).parent / "m.toml")
    unit, edu = machine.devices["vtd0"], machine.devices["edu0"]
    assert isinstance(unit, VtdDevice) and isinstance(edu, AtsEdu) and unit.contexts is not None
    spec = GuestSpec(
        command=script,
        kernel=find_kernel(kernel),
        modules=["virtio-rng", "vfio_iommu_type1", "vfio-pci"],
        files=[compiled("examples/vfio_edu.c")],
        append="intel_iommu=on,sm_on",
    )
    try:
        with machine.serve(tmp_path):
            spec.qemu_args = machine.qemu_args(tmp_path)
            with Guest(spec, artifacts=artifacts) as guest:
                got = guest.expect(rb"(?s)(.{12800})")[1]
                assert RootAddress(unit.contexts.tables.root).TTM == TranslationTableMode.SCALABLE
                assert table_of(machine, "rng0") == (TableFormat.X86, 5)
                seen = machine.devices["rng0"].seen  # type: ignore[attr-defined]
                guest.send(b"\n")
                guest.expect(rb"round trip 3 equal")
                assert table_of(machine, "edu0")[0] is vfio
                assert edu.ats.enabled and edu.pasid.enabled
                guest.expect(rb"all is well\n")
                guest.send(b"\n")
                result = guest.wait()
        assert result.status == 0, result.output
        requests = unit.regs.PQT // 32 if edu.pri.enabled else 0
        assert unit.errors == 0 and edu.errors == 3  # as the program was refused
        assert edu.dma.stats.stale == 0
        counted = machine.system.iommus[0].faults.total
    finally:
        machine.close()
    assert {got[at : at + 6] for at in range(0, len(got), 8)} == {MARK}
    assert min(seen) >= 512 << 20  # no physical addresses
    text = result.output.decode(errors="replace")
    for what, kind in (("write beside the mapping", "Write"), ("read after unmap", "Read")):
        said = rf"{what} refused: DMAR: \[DMA {kind} NO_PASID\] Request device \[(0000:)?00:03.0\] "
        assert re.search(said + rf"fault addr 0x[0-9a-f]+ \[fault reason 0x{reason}\] SM: ", text), text
    assert "DMAR: ATSR flags: 0x1" in text
    assert "SVM disabled" not in text
    # Since 7.0 it switches page requests on wherever they are; it has no use for these, and says so.
    assert (counted, requests) == (3, 3 if recent else 0)
    assert "does not answer" not in caplog.text
