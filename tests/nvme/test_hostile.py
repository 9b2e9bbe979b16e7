"""Commands that mean no good: each has a completion, none is an error of ours."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.nvme.driver import CONFIGURATION, PAGE, SIZE, Driver, name, prps, start
from vmodel.devices.nvme.command import NvmeCommand

EVENT, SET_FEATURES, KEEP_ALIVE = 0x0C, 0x09, 0x0F

dwords = st.one_of(
    st.integers(0, 0xFFFF_FFFF),
    st.integers(0, 64),
    st.sampled_from([0xFFFF_FFFF, 0xFFFF_FFFE, 0x8000_0000, 1 << 16, 0xFFFF]),
    st.integers(0, 31).map(lambda n: 1 << n),
)
addresses = st.one_of(
    st.integers(0, SIZE - 1),
    st.integers(0, SIZE // PAGE - 1).map(lambda n: n * PAGE),
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([0, PAGE - 4, SIZE - PAGE, SIZE - 4, (1 << 64) - PAGE, (1 << 64) - 4, 0xFEE0_0000]),
)
commands = st.builds(
    lambda opcode, flags, nsid, mptr, first, second, words: NvmeCommand.make(
        opcode,
        flags=flags,
        nsid=nsid,
        mptr=mptr,
        dptr=prps(first, second),
        **{f"cdw1{n}": word for n, word in enumerate(words)},
    ),
    st.one_of(st.sampled_from([*range(0x1B), 0x7C, 0x80, 0x84]), st.integers(0, 255)),
    st.one_of(st.just(0), st.integers(0, 255)),
    st.one_of(st.integers(0, 3), dwords),
    st.integers(0, (1 << 64) - 1),
    addresses,
    addresses,
    st.lists(dwords, min_size=6, max_size=6),
)


def ends_the_queue(command: NvmeCommand) -> bool:
    """Whether a command may do what it says: then there is nobody to answer."""
    return command.opcode == SET_FEATURES and command.cdw10 & 0xFF == KEEP_ALIVE


def settle(driver: Driver) -> None:
    """Waits until work in the background is done."""
    device = driver.device
    driver.until(lambda: not device.sanitize.in_progress and not any(n.formatting for n in device.inventory.allocated))


def machine(folder: str, **more: Any) -> Driver:
    file = {"path": Path(folder) / "disk.img", "size": "256K", "lba": 4096}
    return start({"capacity": "64K", "queues": 4, "namespaces": [{"memory": "64K"}, file], **more})


def checked(driver: Driver) -> None:
    """It is all right, or can be brought back to that."""
    assert not driver.device.errors
    driver.disable()
    driver.enable()
    assert driver.identify(1)[77] == 9
    driver.device.close()
    driver.close()


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(sent=st.lists(commands, max_size=12), shadow=st.booleans())
@example(sent=[NvmeCommand.make(0x05, cdw10=0x0001_0001, cdw11=1, dptr=prps((1 << 64) - PAGE))], shadow=False)
@example(sent=[NvmeCommand.make(0x7C, dptr=prps(1 << 40, 1 << 40)), NvmeCommand.make(0x06, dptr=prps(0))], shadow=True)
def test_admin_commands(sent: list[NvmeCommand], shadow: bool) -> None:
    with TemporaryDirectory() as folder:
        driver = machine(folder, shadow_doorbells=shadow)
        for command in sent:
            if ends_the_queue(command):
                continue
            driver.admin.write(command)
            driver.admin.ring()
            if command.opcode == EVENT:
                driver.admin.reap()
                continue
            settle(driver)
            found = driver.admin.wait()
            assert all(name(completion) != "INTERNAL_ERROR" for completion in found), command
        checked(driver)


@settings(max_examples=examples(150), deadline=None, suppress_health_check=list(HealthCheck))
@given(sent=st.lists(commands, max_size=12), fast=st.booleans(), large=st.booleans())
def test_io_commands(sent: list[NvmeCommand], fast: bool, large: bool) -> None:
    with TemporaryDirectory() as folder:
        driver = machine(folder, fast_path=fast)
        if large:
            driver.disable()
            driver.memory.page = 0x10000
            driver.enable(CONFIGURATION | 4 << 7)
        pair = driver.create(1)
        for command in sent:
            pair.write(command)
        pair.ring()
        found = pair.wait(len(sent))
        assert len(found) == len(sent)
        assert all(name(completion) != "INTERNAL_ERROR" for completion in found)
        checked(driver)


@settings(max_examples=examples(60), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    sq=addresses,
    cq=addresses,
    rings=st.lists(st.tuples(st.integers(0, 9), st.one_of(st.integers(0, 70), dwords)), max_size=20),
)
def test_queues_anywhere(sq: int, cq: int, rings: list[tuple[int, int]]) -> None:
    """Queues on top of one another, of the data, or outside memory; doorbells as they come."""
    with TemporaryDirectory() as folder:
        driver = machine(folder)
        driver.admin.send(0x05, dptr=prps(cq & -PAGE), cdw10=63 << 16 | 1, cdw11=1)
        driver.admin.send(0x01, dptr=prps(sq & -PAGE), cdw10=63 << 16 | 1, cdw11=1 << 16 | 1)
        for n, value in rings:
            driver.device.backend.region_write(0, 0x1000 + 4 * n, 4, value)
            driver.run()
        driver.device.backend.reset_device()
        driver.device.config.write(4, b"\x06\x00")
        driver.enable()
        settle(driver)
        checked(driver)
