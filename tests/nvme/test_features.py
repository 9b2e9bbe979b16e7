"""Get and Set Features."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable

import pytest

from tests.nvme.driver import Driver, name, prps
from vmodel.device import ResetKind
from vmodel.devices.nvme.features import FeatureId, Select

SET, GET = 0x09, 0x0A
SAVE = 1 << 31


def put(driver: Driver, feature: int, value: int, **fields: int) -> str:
    return name(driver.admin.send(SET, cdw10=feature, cdw11=value, dptr=prps(driver.page), **fields))


def get(driver: Driver, feature: int, select: Select = Select.CURRENT, **fields: int) -> int:
    done = driver.admin.send(GET, cdw10=select << 8 | feature, dptr=prps(driver.page), **fields)
    assert done.status == 0, name(done)
    return done.result


@pytest.mark.parametrize(
    ("feature", "default", "value"),
    [
        (FeatureId.ARBITRATION, 7, 0x0302_0104),
        (FeatureId.POWER_MANAGEMENT, 0, 1 << 5),
        (FeatureId.VOLATILE_WRITE_CACHE, 1, 0),
        (FeatureId.INTERRUPT_COALESCING, 0, 0x0102),
        (FeatureId.WRITE_ATOMICITY, 0, 1),
        (FeatureId.ASYNCHRONOUS_EVENTS, 0, 0x31F),
        (FeatureId.KEEP_ALIVE, 0, 60_000),
        (FeatureId.SANITIZE, 0, 1),
        (FeatureId.SOFTWARE_PROGRESS, 0, 9),
    ],
)
def test_values(driver: Driver, feature: FeatureId, default: int, value: int) -> None:
    assert get(driver, feature) == get(driver, feature, Select.DEFAULT) == default
    assert put(driver, feature, value) == "SUCCESS"
    assert get(driver, feature) == value
    assert get(driver, feature, Select.DEFAULT) == get(driver, feature, Select.SAVED) == default
    driver.disable()
    driver.enable()
    assert get(driver, feature) == default


def test_supported(driver: Driver) -> None:
    assert get(driver, FeatureId.ARBITRATION, Select.SUPPORTED) == 0b101
    assert get(driver, FeatureId.KEEP_ALIVE, Select.SUPPORTED) == 0b100
    assert get(driver, FeatureId.WRITE_PROTECTION, Select.SUPPORTED, nsid=1) == 0b110


def test_saved_values_outlive_resets(driver: Driver) -> None:
    assert put(driver, FeatureId.ARBITRATION | SAVE, 3) == "SUCCESS"
    assert put(driver, FeatureId.ARBITRATION, 4) == "SUCCESS"
    assert (get(driver, FeatureId.ARBITRATION), get(driver, FeatureId.ARBITRATION, Select.SAVED)) == (4, 3)
    driver.device.reset(ResetKind.DEVICE)
    driver.device.config.write(4, b"\x06\x00")
    driver.enable()
    assert get(driver, FeatureId.ARBITRATION) == 3
    assert driver.device.arbiter.burst == 8


@pytest.mark.parametrize(
    ("feature", "value", "fields", "status"),
    [
        (0x00, 0, {}, "INVALID_FIELD"),
        (0x0D, 0, {}, "INVALID_FIELD"),
        (0xC0, 0, {}, "INVALID_FIELD"),
        (FeatureId.ARBITRATION, 8, {}, "INVALID_FIELD"),
        (FeatureId.ARBITRATION, 1, {"nsid": 1}, "FEATURE_NOT_NAMESPACE_SPECIFIC"),
        (FeatureId.ARBITRATION, 1, {"nsid": 99}, "INVALID_NAMESPACE"),
        (FeatureId.POWER_MANAGEMENT, 1, {}, "INVALID_FIELD"),
        (FeatureId.POWER_MANAGEMENT | SAVE, 0, {}, "FEATURE_NOT_SAVEABLE"),
        (FeatureId.VOLATILE_WRITE_CACHE, 2, {}, "INVALID_FIELD"),
        (FeatureId.TEMPERATURE_THRESHOLD, 2 << 16, {}, "INVALID_FIELD"),
        (FeatureId.TEMPERATURE_THRESHOLD, 2 << 20, {}, "INVALID_FIELD"),
        (FeatureId.INTERRUPT_VECTOR, 65, {}, "INVALID_FIELD"),
        (FeatureId.NUMBER_OF_QUEUES, 0xFFFF, {}, "INVALID_FIELD"),
        (FeatureId.NUMBER_OF_QUEUES, 0xFFFF_0000, {}, "INVALID_FIELD"),
        (FeatureId.ERROR_RECOVERY, 1 << 16, {"nsid": 1}, "INVALID_FIELD"),
        (FeatureId.ERROR_RECOVERY, 1, {"nsid": 0}, "INVALID_NAMESPACE"),
        (FeatureId.ERROR_RECOVERY, 1, {"nsid": 2}, "INVALID_FIELD"),
        (FeatureId.ASYNCHRONOUS_EVENTS, 1 << 16, {}, "INVALID_FIELD"),
        (FeatureId.WRITE_PROTECTION, 3, {"nsid": 1}, "INVALID_FIELD"),
        (FeatureId.WRITE_PROTECTION, 1, {"nsid": 0xFFFF_FFFF}, "INVALID_NAMESPACE"),
        (FeatureId.HOST_IDENTIFIER, 2, {}, "INVALID_FIELD"),
    ],
)
def test_what_cannot_be_set(driver: Driver, feature: int, value: int, fields: dict[str, int], status: str) -> None:
    assert put(driver, feature, value, **fields) == status


def test_selects_that_are_not_there(driver: Driver) -> None:
    assert name(driver.admin.send(GET, cdw10=4 << 8 | FeatureId.ARBITRATION)) == "INVALID_FIELD"


def test_number_of_queues(started: Callable[..., Driver]) -> None:
    driver = started(queues=5)
    done = driver.admin.send(SET, cdw10=FeatureId.NUMBER_OF_QUEUES, cdw11=0x0001_0001)
    assert (done.status, done.result) == (0, 0x0004_0004)
    assert get(driver, FeatureId.NUMBER_OF_QUEUES) == 0x0004_0004
    driver.create(1)
    assert put(driver, FeatureId.NUMBER_OF_QUEUES, 0x0001_0001) == "COMMAND_SEQUENCE"


def test_vectors_by_themselves(driver: Driver) -> None:
    """5.21.1.9: a vector that no I/O completion queue has is Invalid Field in Command."""
    assert put(driver, FeatureId.INTERRUPT_VECTOR, 1 << 16 | 3) == "INVALID_FIELD"
    driver.create(1, vector=3)
    assert put(driver, FeatureId.INTERRUPT_VECTOR, 1 << 16) == "INVALID_FIELD"
    assert put(driver, FeatureId.INTERRUPT_VECTOR, 1 << 16 | 3) == "SUCCESS"
    assert get(driver, FeatureId.INTERRUPT_VECTOR, cdw11=3) == 1 << 16 | 3
    assert get(driver, FeatureId.INTERRUPT_VECTOR, cdw11=4) == 4


def test_temperature_thresholds(driver: Driver) -> None:
    over, under, all_sensors = 0, 1 << 20, 15 << 16
    assert get(driver, FeatureId.TEMPERATURE_THRESHOLD, cdw11=over) == 343
    assert get(driver, FeatureId.TEMPERATURE_THRESHOLD, cdw11=under) == 0
    assert driver.log(2, 512)[0] == 0
    assert put(driver, FeatureId.TEMPERATURE_THRESHOLD, all_sensors | over | 300) == "SUCCESS"
    assert get(driver, FeatureId.TEMPERATURE_THRESHOLD, cdw11=over | 1 << 16) == 300
    assert driver.log(2, 512)[0] == 2
    assert put(driver, FeatureId.TEMPERATURE_THRESHOLD, over | 343) == "SUCCESS"
    assert driver.log(2, 512)[0] == 0
    assert put(driver, FeatureId.TEMPERATURE_THRESHOLD, under | 310) == "SUCCESS"
    assert driver.log(2, 512)[0] == 2


def test_timestamp(driver: Driver) -> None:
    get(driver, FeatureId.TIMESTAMP)
    since_reset = driver.memory.read(driver.page, 8)
    assert since_reset[6] == 0 and int.from_bytes(since_reset[:6], "little") < 100_000
    driver.memory.write(driver.page, struct.pack("<Q", 1_700_000_000_000))
    assert put(driver, FeatureId.TIMESTAMP, 0) == "SUCCESS"
    get(driver, FeatureId.TIMESTAMP)
    raw = driver.memory.read(driver.page, 8)
    assert raw[6] == 2 and 0 <= int.from_bytes(raw[:6], "little") - 1_700_000_000_000 < 100_000


def test_host_identifier(driver: Driver) -> None:
    """5.21.1.25: 128 bits with EXHID, which a controller takes that says so in CTRATT, bit 0 (5.15.2.2)."""
    assert driver.identify(1)[96] & 1
    driver.memory.write(driver.page, b"ABCDEFGHIJKLMNOP")
    assert put(driver, FeatureId.HOST_IDENTIFIER, 1) == "SUCCESS"
    driver.memory.write(driver.page, bytes(16))
    assert get(driver, FeatureId.HOST_IDENTIFIER, cdw11=1) == 1
    assert driver.memory.read(driver.page, 16) == b"ABCDEFGHIJKLMNOP"
    driver.memory.write(driver.page, b"x" * 16)
    assert put(driver, FeatureId.HOST_IDENTIFIER, 1) == "COMMAND_SEQUENCE"


def test_data_that_cannot_be_reached(driver: Driver) -> None:
    done = driver.admin.send(SET, cdw10=FeatureId.TIMESTAMP, dptr=prps(1 << 40))
    assert name(done) == "DATA_TRANSFER_ERROR"
    done = driver.admin.send(GET, cdw10=FeatureId.TIMESTAMP, dptr=prps(1 << 40))
    assert name(done) == "DATA_TRANSFER_ERROR"


def test_write_protection(driver: Driver) -> None:
    pair = driver.create(1)
    write = {"nsid": 1, "dptr": prps(driver.page)}
    assert pair.send(0x01, **write).status == 0
    assert put(driver, FeatureId.WRITE_PROTECTION, 1, nsid=1) == "SUCCESS"
    assert get(driver, FeatureId.WRITE_PROTECTION, nsid=1) == 1
    assert name(pair.send(0x01, **write)) == "NAMESPACE_WRITE_PROTECTED"
    assert driver.identify(0, 1)[99] == 1
    assert put(driver, FeatureId.WRITE_PROTECTION, 0, nsid=1) == "SUCCESS"
    assert pair.send(0x01, **write).status == 0
    assert put(driver, FeatureId.WRITE_PROTECTION, 2, nsid=1) == "SUCCESS"
    assert put(driver, FeatureId.WRITE_PROTECTION, 0, nsid=1) == "FEATURE_NOT_CHANGEABLE"
    driver.disable()
    driver.enable()
    assert get(driver, FeatureId.WRITE_PROTECTION, nsid=1) == 2
    driver.device.reset(ResetKind.DEVICE)
    driver.device.config.write(4, b"\x06\x00")
    driver.enable()
    assert get(driver, FeatureId.WRITE_PROTECTION, nsid=1) == 0


def test_keep_alive_for_ever_holds_no_memory(driver: Driver) -> None:
    """A timer of 49 days that each command restarts."""
    for _ in range(3000):
        assert put(driver, FeatureId.KEEP_ALIVE, 0xFFFF_FFFF) == "SUCCESS"
    assert len(driver.device.backend.agenda) < 200


def test_keep_alive_is_rounded_up(driver: Driver) -> None:
    """5.21.1.15: to the granularity that KAS says, 100 ms."""
    assert driver.identify(1)[320:322] == b"\1\0"
    assert put(driver, FeatureId.KEEP_ALIVE, 10_001) == "SUCCESS"
    timer = driver.device._keep_alive
    assert timer is not None
    assert timer.deadline_ns - time.monotonic_ns() <= 10_100 * 10**6
    assert driver.device._keep_alive_ms == 10_100


def test_keep_alive_expires(driver: Driver) -> None:
    assert put(driver, FeatureId.KEEP_ALIVE, 200) == "SUCCESS"
    assert driver.admin.send(0x18).status == 0
    driver.run()
    assert not driver.status.CFS
    driver.device.backend.run_due(time.monotonic_ns() + 10**9)
    assert driver.status.CFS
    driver.disable()
    driver.enable()
    # 7.12: an entry of the error log says Keep Alive Timeout Expired (19h), of no queue and no command.
    count, sqid, cid, status = struct.unpack_from("<QHHH", driver.log(1, 64))
    assert (count, sqid, cid, status >> 1 & 0x7FF) == (1, 0xFFFF, 0xFFFF, 0x19)
    assert get(driver, FeatureId.KEEP_ALIVE) == 0


def test_keep_alive_can_be_switched_off(driver: Driver) -> None:
    assert put(driver, FeatureId.KEEP_ALIVE, 100) == "SUCCESS"
    assert put(driver, FeatureId.KEEP_ALIVE, 0) == "SUCCESS"
    driver.device.backend.run_due(time.monotonic_ns() + 10**9)
    assert not driver.status.CFS


def test_error_recovery_of_all_namespaces(started: Callable[..., Driver]) -> None:
    driver = started(namespaces=[{"memory": "64K"}] * 2)
    assert put(driver, FeatureId.ERROR_RECOVERY, 7, nsid=0xFFFF_FFFF) == "SUCCESS"
    assert get(driver, FeatureId.ERROR_RECOVERY, nsid=1) == get(driver, FeatureId.ERROR_RECOVERY, nsid=2) == 7
    done = driver.admin.send(GET, nsid=0xFFFF_FFFF, cdw10=FeatureId.ERROR_RECOVERY)
    assert name(done) == "INVALID_NAMESPACE"
