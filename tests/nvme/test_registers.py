"""Registers, and what becomes of the controller by them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.nvme.driver import CONFIGURATION, PAGE, Driver, raised, start
from vmodel.device import ResetKind
from vmodel.devices.nvme import Nvme
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.regs import SUBSYSTEM_RESET, Cc, ControllerRegs, Csts, NvmeCap
from vmodel.errors import PeerError
from vmodel.vfio_user.wire import Irq

ALL_ONES = 0xFFFF_FFFF


def test_capabilities(started: Callable[..., Driver]) -> None:
    cap = NvmeCap(started().get(ControllerRegs.CAP))
    assert (cap.MQES, cap.CQR, cap.AMS, cap.DSTRD, cap.NSSRS, cap.CSS) == (1023, 1, 1, 0, 0, 1)
    assert (cap.MPSMIN, cap.MPSMAX, cap.PMRS, cap.CMBS) == (0, 4, 0, 0)
    params = {"queue_entries": 64, "max_page_shift": 12, "doorbell_stride": 2, "subsystem_reset": True}
    other = NvmeCap(started(**params).get(ControllerRegs.CAP))
    assert (other.MQES, other.MPSMAX, other.DSTRD, other.NSSRS) == (63, 0, 2, 1)


def test_capabilities_outlive_resets(driver: Driver) -> None:
    cap = driver.get(ControllerRegs.CAP)
    for kind in ResetKind:
        driver.device.reset(kind)
        assert driver.get(ControllerRegs.CAP) == cap
        assert driver.get(ControllerRegs.VS) == 0x0001_0400


def test_halves_of_wide_registers(driver: Driver) -> None:
    driver.disable()
    device = driver.device
    device.backend.region_write(0, 0x28, 4, 0x1234_5FFF)
    device.backend.region_write(0, 0x2C, 4, 0x9)
    assert driver.get(ControllerRegs.ASQ) == 0x9_1234_5000
    assert device.backend.region_read(0, 0x2C, 4) == 9


def test_read_only_registers(driver: Driver) -> None:
    for register in (ControllerRegs.CAP, ControllerRegs.VS, ControllerRegs.CSTS, ControllerRegs.CMBSZ):
        before = driver.get(register)
        driver.put(register, ALL_ONES)
        assert driver.get(register) == before


@pytest.mark.parametrize(
    ("configuration", "why"),
    [
        (CONFIGURATION | 1 << 4, "a command set that is not there"),
        (CONFIGURATION | 5 << 7, "pages of 128 KiB"),
        (CONFIGURATION | 2 << 11, "an arbitration that is not there"),
    ],
)
def test_what_cannot_be_enabled(driver: Driver, configuration: int, why: str) -> None:
    driver.disable()
    driver.put(ControllerRegs.CC, configuration | 1)
    assert driver.status.CFS and not driver.status.RDY, why
    driver.doorbell(0, 1)  # it has no effect
    driver.run()
    driver.put(ControllerRegs.CC, 0)
    assert not driver.status.CFS
    driver.enable()
    assert driver.identify(1)[0:2] == b"\x34\x12"


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (ControllerRegs.AQA, 0),
        (ControllerRegs.AQA, 31),
        (ControllerRegs.AQA, 31 << 16),
    ],
)
def test_admin_queues_of_one_entry(driver: Driver, register: object, value: int) -> None:
    driver.disable()
    driver.set_up()
    driver.put(ControllerRegs.AQA, value)
    driver.put(ControllerRegs.CC, CONFIGURATION | 1)
    assert driver.status.CFS


def test_admin_queues_that_are_no_large_page(driver: Driver) -> None:
    driver.disable()
    driver.set_up()
    driver.put(ControllerRegs.ASQ, PAGE)
    driver.put(ControllerRegs.CC, CONFIGURATION | 1 << 7 | 1)
    assert driver.status.CFS


def test_enabling_without_a_reset_after_a_failure(driver: Driver) -> None:
    driver.disable()
    driver.put(ControllerRegs.CC, CONFIGURATION | 1 << 4 | 1)
    driver.put(ControllerRegs.CC, CONFIGURATION | 1)
    assert driver.status.CFS and not driver.status.RDY


@pytest.mark.parametrize("which", ["sq", "cq"])
def test_admin_queues_outside_memory(driver: Driver, which: str) -> None:
    driver.disable()
    driver.set_up()
    driver.put(ControllerRegs.ASQ if which == "sq" else ControllerRegs.ACQ, 1 << 40)
    driver.put(ControllerRegs.CC, CONFIGURATION | 1)
    assert driver.status.RDY
    driver.doorbell(0, 1)
    driver.run()
    assert driver.status.CFS
    driver.disable()
    driver.enable()
    assert driver.identify(1)[77] == 9


def test_what_is_fixed_while_it_is_enabled(driver: Driver) -> None:
    driver.put(ControllerRegs.CC, CONFIGURATION | 1 | 3 << 7 | 1 << 11 | 1 << 4)
    cc = Cc(driver.get(ControllerRegs.CC))
    assert (cc.MPS, cc.AMS, cc.CSS) == (0, 0, 0)
    assert driver.identify(1)[77] == 9


@pytest.mark.parametrize("how", [1, 2])
def test_shutdown(driver: Driver, how: int) -> None:
    driver.put(ControllerRegs.CC, CONFIGURATION | 1 | how << 14)
    driver.run()
    assert driver.status.SHST == 2 and driver.status.RDY
    driver.disable()
    assert driver.status.SHST == 0
    driver.enable()


def test_shutdown_while_it_is_disabled(driver: Driver) -> None:
    """3.1.5, SHN: what it asks for has nothing to do with EN; a host that waits for SHST gets it (3.1.6)."""
    driver.disable()
    driver.put(ControllerRegs.CC, CONFIGURATION | 1 << 14)
    driver.run()
    assert driver.status.SHST == 2 and not driver.status.RDY
    driver.enable()
    assert driver.status.SHST == 0


def test_one_shutdown_at_a_time(started: Callable[..., Driver], tmp_path: Path) -> None:
    """However often SHN is written, a namespace is flushed once, and it ends."""
    driver = started(namespaces=[{"path": tmp_path / "disk.img", "size": "64K"}])
    driver.put(ControllerRegs.CC, CONFIGURATION | 1 | 1 << 14)
    work = driver.device._flushing
    assert work is not None
    for n in range(100):
        driver.put(ControllerRegs.CC, CONFIGURATION | 1 | (2 - n % 2) << 14)
        assert driver.device._flushing is work
    driver.until(lambda: driver.status.SHST == 2)


def test_no_subsystem_reset_unless_a_parameter_says_so(driver: Driver) -> None:
    """3.1.1, NSSRS: 0, so NSSR is not there (3.1.7)."""
    driver.put(ControllerRegs.NSSR, SUBSYSTEM_RESET)
    driver.run()
    assert driver.status.RDY and not driver.status.NSSRO and driver.get(ControllerRegs.NSSR) == 0


def test_subsystem_reset(started: Callable[..., Driver]) -> None:
    """7.3.1; 3.1.6: NSSRO stays until it is cleared by writing 1."""
    driver = started(subsystem_reset=True)
    driver.create(1)
    driver.put(ControllerRegs.NSSR, 0x1234_5678)
    driver.run()
    assert driver.status.RDY
    driver.put(ControllerRegs.NSSR, SUBSYSTEM_RESET)
    driver.run()
    assert not driver.status.RDY and driver.status.NSSRO
    assert driver.get(ControllerRegs.NSSR) == 0
    assert (driver.get(ControllerRegs.CC), driver.get(ControllerRegs.ASQ)) == (0, 0)
    driver.enable()
    assert driver.status.NSSRO
    driver.put(ControllerRegs.CSTS, Csts.NSSRO.mask)
    assert not driver.status.NSSRO
    driver.create(1)


def test_disabling_keeps_the_admin_queues_registers(driver: Driver) -> None:
    at = driver.get(ControllerRegs.ASQ)
    driver.disable()
    assert driver.get(ControllerRegs.ASQ) == at != 0
    driver.put(ControllerRegs.CC, CONFIGURATION | 1)
    assert driver.status.RDY


@pytest.mark.parametrize("kind", [ResetKind.FUNCTION, ResetKind.DEVICE])
def test_resets_of_the_function(driver: Driver, kind: ResetKind) -> None:
    driver.create(1)
    driver.device.reset(kind)
    assert driver.get(ControllerRegs.CC) == driver.get(ControllerRegs.AQA) == int(driver.status) == 0
    driver.device.config.write(4, b"\x06\x00")
    driver.enable()
    driver.create(1)


def test_unknown_doorbells_are_events(driver: Driver) -> None:
    request = driver.admin.write(NvmeCommand.make(0x0C))
    driver.admin.ring()
    assert not driver.admin.reap()
    driver.doorbell(9, 1)
    (completion,) = driver.admin.wait()
    assert (completion.cid, completion.result) == (request, 0x01_00_00)


def test_doorbells_of_queues_that_are_there(driver: Driver) -> None:
    request = driver.admin.write(NvmeCommand.make(0x0C))
    driver.admin.ring()
    pair = driver.create(1, entries=16)
    driver.doorbell(1, 16)  # the queue has 0 to 15
    (completion,) = driver.admin.wait()
    assert (completion.cid, completion.result) == (request, 0x01_01_00)
    assert pair.send(0x00, nsid=1).status == 0  # it is as it was


def test_doorbells_while_it_is_disabled(driver: Driver) -> None:
    driver.disable()
    for n in range(2 * 65):
        driver.device.backend.region_write(0, 0x1000 + 4 * n, 4, ALL_ONES)
    driver.run()
    assert int(driver.status) == 0
    driver.enable()
    assert driver.identify(1)[77] == 9


def test_interrupts_by_msix(driver: Driver) -> None:
    fds = driver.vectors(Irq.MSIX, 3)
    pair = driver.create(1, vector=2)
    assert raised(fds[0]) == 2  # the two commands that made it
    pair.send(0x00, nsid=1)
    assert [raised(fd) for fd in fds] == [0, 0, 1]
    for fd in fds:
        os.close(fd)


def test_interrupts_by_msi_and_their_mask(started: Callable[..., Driver]) -> None:
    driver = started(interrupts="msi", namespaces=[{"memory": "1M"}])
    assert driver.device.msix is None
    fds = driver.vectors(Irq.MSI, 2)
    pair = driver.create(1, vector=1)
    raised(fds[0])
    driver.put(ControllerRegs.INTMS, 0b10)
    assert driver.get(ControllerRegs.INTMS) == driver.get(ControllerRegs.INTMC) == 0b10
    pair.write(NvmeCommand.make(0x00, nsid=1))
    pair.ring()
    assert [raised(fd) for fd in fds] == [0, 0]
    driver.put(ControllerRegs.INTMC, 0b10)
    assert driver.get(ControllerRegs.INTMS) == 0
    assert [raised(fd) for fd in fds] == [0, 1]
    for fd in fds:
        os.close(fd)


def test_interrupts_by_the_pin(driver: Driver) -> None:
    pin = driver.device.intx
    assert pin is not None
    pair = driver.create(1)
    assert not pin.level
    driver.admin.write(NvmeCommand.make(0x18))
    driver.admin.ring()
    assert pin.level, "until the driver has taken what is there"
    driver.put(ControllerRegs.INTMS, 1)
    assert not pin.level
    driver.put(ControllerRegs.INTMC, 1)
    assert pin.level
    driver.admin.wait()
    assert not pin.level
    pair.send(0x00, nsid=1)
    assert not pin.level, "this queue has no interrupts"
    driver.admin.write(NvmeCommand.make(0x18))
    driver.admin.ring()
    assert pin.level
    driver.disable()
    assert not pin.level


def test_doorbells_further_apart(started: Callable[..., Driver]) -> None:
    driver = started(doorbell_stride=3, namespaces=[{"memory": "1M"}])
    assert driver.stride == 32
    assert driver.create(16).send(0x00, nsid=1).status == 0


def test_models_of_ones_own(driver: Driver) -> None:
    """A class derived from it has the same choices."""

    class Mine(Nvme):
        pass

    assert type(Mine("m")) is Mine
    other = Mine("m", {"interrupts": "msi", "doorbell_stride": 1})
    assert isinstance(other, Mine) and other.msix is None and other.msi is not None
    assert NvmeCap(other.regs.CAP).DSTRD == 1


def test_migration_is_refused(driver: Driver) -> None:
    driver.device.backend.quiesce(True)
    with pytest.raises(PeerError, match="cannot be migrated"):
        driver.device.backend.save()
    driver.device.backend.quiesce(False)
    assert driver.identify(1)[77] == 9


def test_large_pages(started: Callable[..., Driver]) -> None:
    driver = started()
    driver.disable()
    driver.memory.page = 0x10000
    driver.enable(CONFIGURATION | 4 << 7)
    assert driver.device.page_size == 0x10000
    assert driver.identify(1)[77] == 9


@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    accesses=st.lists(
        st.tuples(
            st.one_of(st.sampled_from([0, 8, 0xC, 0x10, 0x14, 0x1C, 0x20, 0x24, 0x28, 0x30]), st.integers(0, 0x1300)),
            st.sampled_from([1, 2, 4, 8, 3, 16]),
            st.one_of(
                st.integers(0, (1 << 64) - 1),
                st.sampled_from([0, 1, CONFIGURATION | 1, CONFIGURATION | 1 | 1 << 14, SUBSYSTEM_RESET, ALL_ONES]),
            ),
        ),
        max_size=40,
    )
)
def test_any_accesses(accesses: list[tuple[int, int, int]]) -> None:
    """Whatever is written, of whatever size: no exception, and a reset brings it back."""
    driver = start({"namespaces": [{"memory": "64K"}]})
    device = driver.device
    for offset, size, value in accesses:
        data = (value & (1 << 64) - 1).to_bytes(8, "little") * 2
        if size <= 8:
            device.backend.region_write(0, offset, size, int.from_bytes(data[:size], "little"))
        else:
            device.backend.region_write(0, offset, size, data[:size])
        device.backend.region_read(0, offset, size)
        driver.run()
    assert not device.errors
    device.reset(ResetKind.DEVICE)
    device.config.write(4, b"\x06\x00")
    driver.enable()
    assert driver.identify(1)[77] == 9
    device.close()
    driver.close()
