"""Firmware, Sanitize, Device Self-test, directives."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.nvme.blocks import read, write
from tests.nvme.driver import PAGE, Driver, name, prps
from tests.waiting import until
from vmodel.device import ResetKind
from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.regs import ControllerRegs

COMMIT, DOWNLOAD, SELF_TEST, SANITIZE = 0x10, 0x11, 0x14, 0x84
DIRECTIVE_SEND, DIRECTIVE_RECEIVE = 0x19, 0x1A
EVENT = 0x0C
ALL = 0xFFFF_FFFF


# ---- firmware -----------------------------------------------------------------------------------


def download(driver: Driver, image: bytes, at: int = 0) -> str:
    driver.memory.write(driver.page, image.ljust(PAGE, b"\0"))
    return name(driver.admin.send(DOWNLOAD, cdw10=PAGE // 4 - 1, cdw11=at // 4, dptr=prps(driver.page)))


def commit(driver: Driver, slot: int, action: int) -> str:
    return name(driver.admin.send(COMMIT, cdw10=action << 3 | slot))


def slots(driver: Driver) -> tuple[int, list[bytes]]:
    data = driver.log(3, 512)
    return data[0], [data[at : at + 8].rstrip(b"\0 ") for at in range(8, 64, 8)]


def running(driver: Driver) -> bytes:
    return driver.identify(1)[64:72].rstrip()


def test_firmware_that_a_reset_activates(driver: Driver) -> None:
    assert slots(driver) == (1, [b"1.0"] + [b""] * 6)
    assert download(driver, b"2.0") == "SUCCESS"
    assert commit(driver, 2, 1) == "SUCCESS"
    assert slots(driver) == (2 << 4 | 1, [b"1.0", b"2.0"] + [b""] * 5)
    assert running(driver) == b"1.0"
    driver.disable()
    driver.enable()
    assert slots(driver)[0] == 2 and running(driver) == b"2.0"
    driver.device.reset(ResetKind.DEVICE)
    driver.device.config.write(4, b"\x06\x00")
    driver.enable()
    assert running(driver) == b"2.0"
    assert commit(driver, 1, 2) == "SUCCESS"
    driver.disable()
    driver.enable()
    assert running(driver) == b"1.0"


def test_firmware_that_is_activated_at_once(driver: Driver) -> None:
    assert driver.admin.send(0x09, cdw10=0x0B, cdw11=1 << 9).status == 0
    driver.admin.write(NvmeCommand.make(EVENT))
    driver.admin.ring()
    assert download(driver, b"\xff\x01binary") == "SUCCESS"
    driver.admin.write(NvmeCommand.make(COMMIT, cdw10=3 << 3))
    driver.admin.ring()
    results = {completion.result for completion in driver.admin.wait(2)}
    assert results == {0, 0x03_01_02}
    state, names = slots(driver)
    assert state == 2 and running(driver) == names[1] and len(names[1]) == 8
    assert commit(driver, 1, 3) == "SUCCESS"
    assert running(driver) == b"1.0"


def test_firmware_in_parts(driver: Driver) -> None:
    assert download(driver, b"part two", PAGE) == "SUCCESS"
    assert download(driver, b"x", PAGE) == "OVERLAPPING_RANGE"
    assert download(driver, b"3.0") == "SUCCESS"
    assert commit(driver, 3, 0) == "SUCCESS"
    assert slots(driver) == (1, [b"1.0", b"", b"3.0"] + [b""] * 4)
    for image in (b"broken", b"4.0"):  # the second starts over, without the part behind the first
        assert download(driver, image) == "SUCCESS"
        if image == b"broken":
            assert download(driver, b"x", 2 * PAGE) == "SUCCESS"
    assert commit(driver, 3, 0) == "SUCCESS"
    assert slots(driver)[1][2] == b"4.0"


@pytest.mark.parametrize(
    ("slot", "action", "status"),
    [
        (1, 0, "INVALID_FIRMWARE_IMAGE"),
        (1, 1, "INVALID_FIRMWARE_IMAGE"),
        (2, 2, "INVALID_FIRMWARE_SLOT"),
        (2, 3, "INVALID_FIRMWARE_SLOT"),
        (4, 0, "INVALID_FIRMWARE_SLOT"),
        (1, 4, "INVALID_FIELD"),
        (1, 6, "INVALID_FIELD"),
    ],
)
def test_firmware_that_is_not_there(driver: Driver, slot: int, action: int, status: str) -> None:
    assert commit(driver, slot, action) == status
    assert slots(driver) == (1, [b"1.0"] + [b""] * 6)


def test_firmware_with_a_hole(driver: Driver) -> None:
    assert download(driver, b"5.0") == "SUCCESS"
    assert download(driver, b"x", 2 * PAGE) == "SUCCESS"
    assert commit(driver, 2, 0) == "INVALID_FIRMWARE_IMAGE"


def test_firmware_of_odd_sizes(driver: Driver) -> None:
    for fields in (
        {"cdw10": 0},
        {"cdw10": 1023, "cdw11": 1},
        {"cdw10": 1023, "cdw11": 0xFFFF_FC00},
        {"cdw10": ALL},
    ):
        assert name(driver.admin.send(DOWNLOAD, dptr=prps(driver.page), **fields)) == "INVALID_FIELD"
    # What cannot be read leaves no part behind.
    done = driver.admin.send(DOWNLOAD, cdw10=1023, dptr=prps(1 << 40))
    assert name(done) == "DATA_TRANSFER_ERROR"
    assert commit(driver, 2, 0) == "INVALID_FIRMWARE_IMAGE"


# ---- sanitize -----------------------------------------------------------------------------------


def sanitize(driver: Driver, action: int, pattern: int = 0) -> str:
    return name(driver.admin.send(SANITIZE, cdw10=action, cdw11=pattern))


def sanitize_log(driver: Driver) -> tuple[int, int, int]:
    return struct.unpack_from("<HHI", driver.log(0x81, 512))


@pytest.mark.parametrize("action", [2, 4, 2 | 1 << 9, 4 | 1 << 9])
def test_erasing(started: Callable[..., Driver], tmp_path: Path, action: int) -> None:
    """5.24: No-Deallocate After Sanitize (bit 9): blocks are not deallocated as a result of the operation.

    5.14.1.16.2: 001b is a success; 100b would be one that deallocated although bit 9 was set.
    """
    path = tmp_path / "disk.img"
    driver = started(namespaces=[{"memory": "64K"}, {"path": path, "size": "2M"}])
    pair = driver.create(1)
    assert sanitize_log(driver) == (0xFFFF, 0, 0)
    assert write(driver, pair, 1, 127, b"x" * 512) == write(driver, pair, 2, 4095, b"x" * 512) == "SUCCESS"
    driver.admin.write(NvmeCommand.make(EVENT))
    driver.admin.ring()
    driver.admin.write(NvmeCommand.make(SANITIZE, cdw10=action))
    driver.admin.ring()
    event = next(c for c in driver.admin.wait(2) if c.result)
    assert event.result == 0x81_01_06
    assert sanitize_log(driver) == (0xFFFF, 1 << 8 | 1, action)
    assert read(driver, pair, 1, 127, 512) == read(driver, pair, 2, 4095, 512) == bytes(512)
    assert path.read_bytes() == bytes(2 << 20)
    assert bool(path.stat().st_blocks) == bool(action & 1 << 9)


def test_overwriting(started: Callable[..., Driver], tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    driver = started(namespaces=[{"path": path, "size": "2M"}])
    passes, invert = 3, 1 << 8
    assert sanitize(driver, 3 | passes << 4 | invert, 0x1122_3344) == "SUCCESS"
    driver.until(lambda: not driver.device.sanitize.in_progress)
    assert sanitize_log(driver)[1] == 1 << 8 | passes << 3 | 1
    assert path.read_bytes() == b"\x44\x33\x22\x11" * (1 << 19)


def test_no_deallocate(driver: Driver) -> None:
    """5.15.2.2: a controller of 1.4 that sanitizes says in SANICAP 31:30 whether it modifies media after that.

    5.24: where bit 29 is clear, a host may ask for no deallocation.
    """
    capabilities = int.from_bytes(driver.identify(1)[328:332], "little")
    assert (capabilities >> 30, capabilities >> 29 & 1, capabilities & 7) == (1, 0, 7)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("opcode", [0x01, 0x08, 0x19])
def test_data_since_the_last_sanitize(started: Callable[..., Driver], opcode: int, fast: bool) -> None:
    """5.14.1.16.2: Global Data Erased is set if nothing was written since the last successful operation."""
    driver = started(namespaces=[{"memory": "64K"}], fast_path=fast)
    pair = driver.create(1)
    assert sanitize(driver, 2) == "SUCCESS"
    driver.run()
    assert read(driver, pair, 1, 0, 512) == bytes(512)
    assert sanitize_log(driver)[1] == 1 << 8 | 1
    driver.memory.write(driver.page, bytes(4096))
    done = pair.send(opcode, nsid=1, dptr=prps(driver.page), cdw10=4)
    assert done.status == 0
    assert sanitize_log(driver)[1] == 1
    assert sanitize(driver, 2) == "SUCCESS"
    driver.run()
    assert sanitize_log(driver)[1] == 1 << 8 | 1


def test_passes_that_are_complete(started: Callable[..., Driver]) -> None:
    """5.14.1.16.2: bits 7:3 are the passes of an overwrite that are complete; 0 after another operation."""
    driver = started(namespaces=[{"memory": "4M"}])
    assert sanitize(driver, 3 | 2 << 4) == "SUCCESS"
    driver.until(lambda: not driver.device.sanitize.in_progress)
    assert sanitize_log(driver)[1] >> 3 & 31 == 2
    driver.admin.write(NvmeCommand.make(SANITIZE, cdw10=3 | 2 << 4))
    driver.doorbell(0, driver.admin.tail)
    seen = set()

    def done() -> bool:
        driver.device.backend.run_due(0)
        seen.add(struct.unpack_from("<H", driver.device.sanitize.log(), 2)[0] >> 3 & 31)
        return not driver.device.sanitize.in_progress

    until(done, "the end of the sanitize operation", pause=0)
    assert seen == {0, 1, 2}
    driver.admin.reap()
    assert sanitize(driver, 2) == "SUCCESS"
    driver.until(lambda: not driver.device.sanitize.in_progress)
    assert sanitize_log(driver)[1] >> 3 & 31 == 0


def test_commands_while_it_is_sanitized(started: Callable[..., Driver]) -> None:
    driver = started(namespaces=[{"memory": "64M"}])
    pair = driver.create(1)
    driver.admin.write(NvmeCommand.make(SANITIZE, cdw10=3 | 1 << 4))
    driver.doorbell(0, driver.admin.tail)
    driver.device.backend.run_due(0)
    assert driver.device.sanitize.in_progress
    pair.write(NvmeCommand.make(0x02, nsid=1, dptr=prps(driver.page)))
    driver.doorbell(1, pair.tail)
    driver.admin.write(NvmeCommand.make(0x80, nsid=1))
    driver.admin.write(NvmeCommand.make(0x06, cdw10=1, dptr=prps(driver.page)))
    driver.admin.write(NvmeCommand.make(SANITIZE, cdw10=2))
    driver.doorbell(0, driver.admin.tail)
    (completion,) = pair.wait()
    assert name(completion) == "SANITIZE_IN_PROGRESS"
    names = [name(completion) for completion in driver.admin.wait(4)]
    assert names == ["SUCCESS", "SANITIZE_IN_PROGRESS", "SUCCESS", "SANITIZE_IN_PROGRESS"]
    driver.run()
    assert pair.send(0x02, nsid=1, dptr=prps(driver.page)).status == 0


def test_sanitize_goes_on_through_resets(started: Callable[..., Driver]) -> None:
    driver = started(namespaces=[{"memory": "16M"}])
    driver.admin.write(NvmeCommand.make(SANITIZE, cdw10=3 | 1 << 4, cdw11=ALL))
    driver.doorbell(0, driver.admin.tail)
    for _ in range(4):
        driver.device.backend.run_due(0)
    assert driver.device.sanitize.in_progress
    driver.device.reset(ResetKind.FUNCTION)
    driver.device.config.write(4, b"\x06\x00")
    assert driver.device.sanitize.in_progress
    driver.enable()
    driver.run()
    driver.until(lambda: not driver.device.sanitize.in_progress)
    assert sanitize_log(driver)[1] & 7 == 1
    pair = driver.create(1)
    assert read(driver, pair, 1, 32767, 512) == b"\xff" * 512


def test_what_cannot_be_sanitized(started: Callable[..., Driver], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * 4096)
    driver = started(namespaces=[{"path": image, "read_only": True}])
    assert sanitize(driver, 2) == "NAMESPACE_WRITE_PROTECTED"
    for action in (0, 5, 7):
        assert sanitize(driver, action) == "INVALID_FIELD"
    assert sanitize(driver, 1) == "SUCCESS", "there is no failure mode to leave"
    assert image.read_bytes() == b"x" * 4096


def test_sanitize_while_firmware_waits_for_a_reset(driver: Driver) -> None:
    """5.24: aborted with Firmware Activation Requires Controller Level Reset; once that has come it works."""
    assert download(driver, b"2.0") == "SUCCESS"
    assert commit(driver, 2, 1) == "SUCCESS"
    assert sanitize(driver, 2) == "FIRMWARE_NEEDS_CONTROLLER_RESET"
    driver.disable()
    driver.enable()
    assert sanitize(driver, 2) == "SUCCESS"


def test_a_new_sanitize_forgets_the_event_of_the_last(driver: Driver) -> None:
    """5.24: a Sanitize Operation Completed event that is outstanding is cleared when one starts."""
    for _ in range(2):
        assert sanitize(driver, 2) == "SUCCESS"
        driver.until(lambda: not driver.device.sanitize.in_progress)
        driver.admin.reap()
    assert [event.name for event in driver.device.events._events] == ["SANITIZE_COMPLETED"]
    device = driver.device
    driver.admin.write(NvmeCommand.make(SANITIZE, cdw10=2))
    driver.doorbell(0, driver.admin.tail)
    device.arbiter.run()
    assert not device.events._events
    driver.until(lambda: not device.sanitize.in_progress)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file grows beyond a mebibyte: what is written behind that is refused."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("unrestricted", [True, False])
def test_sanitize_that_fails(
    started: Callable[..., Driver], tmp_path: Path, request: pytest.FixtureRequest, unrestricted: bool
) -> None:
    driver = started(namespaces=[{"path": tmp_path / "disk.img", "size": "2M"}])
    pair = driver.create(1)
    request.getfixturevalue("small_files")
    assert sanitize(driver, 3 | unrestricted << 3 | 1 << 4) == "SUCCESS"
    driver.until(lambda: not driver.device.sanitize.in_progress)
    assert sanitize_log(driver)[1] & 7 == 3
    assert name(pair.send(0x02, nsid=1, dptr=prps(driver.page))) == "SANITIZE_FAILED"
    assert name(driver.admin.send(0x80, nsid=1)) == "SANITIZE_FAILED"
    assert sanitize(driver, 1) == ("SUCCESS" if unrestricted else "SANITIZE_FAILED")
    # 5.14.1.16.2: 000b is for those that were never sanitized; no pass was complete.
    assert sanitize_log(driver)[1] == 3
    if not unrestricted:
        # 5.24: in unrestricted mode neither; only the mode that has failed.
        assert sanitize(driver, 2 | 1 << 3) == "SANITIZE_FAILED"
        assert sanitize(driver, 2) == "SUCCESS", "another operation may do"
        driver.until(lambda: not driver.device.sanitize.in_progress)
    assert name(pair.send(0x02, nsid=1, dptr=prps(driver.page))) == "SUCCESS"


# ---- self-test ----------------------------------------------------------------------------------


def results(driver: Driver) -> list[tuple[int, int]]:
    """(code and outcome, namespace) of the tests in the log."""
    data = driver.log(6, 564)
    found = [struct.unpack_from("<BxBxQI", data, 4 + 28 * n) for n in range(20)]
    return [(status, nsid) for status, _, _, nsid in found if status & 15 != 15]


def test_self_tests(started: Callable[..., Driver]) -> None:
    driver = started(namespaces=[{"memory": "4M"}])
    assert results(driver) == []
    for code, nsid in ((1, 0), (1, 1), (2, ALL)):
        assert name(driver.admin.send(SELF_TEST, nsid=nsid, cdw10=code)) == "SUCCESS"
        driver.run()
    assert results(driver) == [(0x20, ALL), (0x10, 1), (0x10, 0)]


def test_a_self_test_under_way(started: Callable[..., Driver]) -> None:
    driver = started(namespaces=[{"memory": "8M"}])
    for code in (2, 1, 0xF):
        driver.admin.write(NvmeCommand.make(SELF_TEST, nsid=1, cdw10=code))
    driver.doorbell(0, driver.admin.tail)
    assert [name(done) for done in driver.admin.wait(3)] == ["SUCCESS", "SELF_TEST_IN_PROGRESS", "SUCCESS"]
    assert results(driver) == [(0x21, 1)]
    assert name(driver.admin.send(SELF_TEST, nsid=1, cdw10=0xF)) == "SUCCESS", "there is none"
    assert len(results(driver)) == 1


def test_what_ends_a_self_test(started: Callable[..., Driver]) -> None:
    driver = started(namespaces=[{"memory": "8M"}])
    for other, outcome in ((NvmeCommand.make(0x80, nsid=1), 4), (NvmeCommand.make(SANITIZE, cdw10=2), 9)):
        driver.admin.write(NvmeCommand.make(SELF_TEST, nsid=1, cdw10=2))
        driver.admin.write(other)
        driver.doorbell(0, driver.admin.tail)
        driver.admin.wait(2)
        driver.run()
        assert results(driver)[0] == (0x20 | outcome, 1)
    # 8.11: an operation that starts ends it, not a command that is refused.
    driver.admin.write(NvmeCommand.make(SELF_TEST, nsid=1, cdw10=2))
    driver.admin.write(NvmeCommand.make(SANITIZE, cdw10=7))
    driver.doorbell(0, driver.admin.tail)
    assert [name(done) for done in driver.admin.wait(2)] == ["SUCCESS", "INVALID_FIELD"]
    driver.run()
    assert results(driver)[0] == (0x20, 1)
    # A reset ends a short test; an extended one goes on.
    for code, status in ((1, 0x12), (2, 0x20)):
        driver.admin.write(NvmeCommand.make(SELF_TEST, nsid=1, cdw10=code))
        driver.doorbell(0, driver.admin.tail)
        driver.device.backend.run_due(0)
        driver.put(ControllerRegs.CC, 0)
        driver.enable()
        driver.run()
        assert results(driver)[0] == (status, 1)


@pytest.mark.parametrize(
    ("tested", "other", "status"),
    [
        (1, NvmeCommand.make(0x80, nsid=1), 0x24),
        (1, NvmeCommand.make(0x80, nsid=2), 0x20),
        (1, NvmeCommand.make(0x80, nsid=ALL), 0x24),
        (ALL, NvmeCommand.make(0x80, nsid=ALL), 0x24),
        (0, NvmeCommand.make(0x80, nsid=1), 0x20),
        (1, NvmeCommand.make(0x0D, nsid=2, cdw10=1), 0x20),
    ],
)
def test_which_self_tests_others_end(
    started: Callable[..., Driver], tested: int, other: NvmeCommand, status: int
) -> None:
    """8.11: Format NVM ends a test of the namespaces that it formats; removal one of the namespace that is removed."""
    driver = started(namespaces=[{"memory": "8M"}, {"memory": "64K"}])
    driver.admin.write(NvmeCommand.make(SELF_TEST, nsid=tested, cdw10=2))
    driver.admin.write(other)
    driver.doorbell(0, driver.admin.tail)
    assert [name(done) for done in driver.admin.wait(2)] == ["SUCCESS"] * 2
    driver.run()
    assert results(driver)[0] == (status, tested)


def test_a_self_test_that_fails(started: Callable[..., Driver], tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    driver = started(namespaces=[{"path": path, "size": "4M"}])
    with path.open("r+b") as file:
        file.truncate(3 << 20)
    assert name(driver.admin.send(SELF_TEST, nsid=1, cdw10=2)) == "SUCCESS"
    driver.until(lambda: bool(results(driver)))
    data = driver.log(6, 564)
    status, segment, valid, nsid, lba = struct.unpack_from("<BBBx8xIQ", data, 4)
    assert (status, segment, valid, nsid, lba) == (0x27, 1, 3, 1, 3 << 20 >> 9)


@pytest.mark.parametrize(
    ("nsid", "code", "status"),
    [
        (1, 0, "INVALID_FIELD"),
        (1, 3, "INVALID_FIELD"),
        (1, 0xE, "INVALID_FIELD"),
        (2, 1, "INVALID_FIELD"),
        (99, 1, "INVALID_NAMESPACE"),
    ],
)
def test_self_tests_that_are_not_there(driver: Driver, nsid: int, code: int, status: str) -> None:
    assert name(driver.admin.send(SELF_TEST, nsid=nsid, cdw10=code)) == status


# ---- directives ---------------------------------------------------------------------------------


def test_directives(driver: Driver) -> None:
    data = driver.ask(DIRECTIVE_RECEIVE, nsid=1, cdw10=1023, cdw11=1)
    assert data == b"\1" + bytes(31) + b"\1" + bytes(PAGE - 33)
    assert name(driver.admin.send(DIRECTIVE_RECEIVE, nsid=1, cdw11=1 << 8 | 1)) == "INVALID_FIELD"
    assert name(driver.admin.send(DIRECTIVE_RECEIVE, nsid=1, cdw11=2)) == "INVALID_FIELD"
    assert name(driver.admin.send(DIRECTIVE_SEND, nsid=1, cdw11=1, cdw12=1 << 8)) == "INVALID_FIELD"
    assert name(driver.admin.send(DIRECTIVE_RECEIVE, nsid=99, cdw11=1)) == "INVALID_NAMESPACE"
