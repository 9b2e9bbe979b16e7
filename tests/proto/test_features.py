"""DEVICE_FEATURE, migration states and data."""

from __future__ import annotations

import errno
import struct

import pytest

from tests.proto.conftest import Served, enable
from tests.proto.toy import Toy
from vmodel.vfio_user import wire
from vmodel.vfio_user.client import Client
from vmodel.vfio_user.wire import Command, DeviceState, Feature, FeatureFlags, Irq, Region

GET, SET, PROBE = FeatureFlags.GET, FeatureFlags.SET, FeatureFlags.PROBE
S = DeviceState


def refused(call: object, *args: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*args)  # type: ignore[operator]
    return caught.value.errno or 0


def test_probe(client: Client) -> None:
    supported = {
        Feature.MIGRATION: {GET},
        Feature.MIG_DEVICE_STATE: {GET, SET},
        Feature.DMA_LOGGING_START: {SET},
        Feature.DMA_LOGGING_STOP: {SET},
        Feature.DMA_LOGGING_REPORT: {GET},
    }
    for feature, methods in supported.items():
        client.feature(feature, PROBE)
        for method in (GET, SET):
            if method in methods:
                client.feature(feature, PROBE | method)
            else:
                assert refused(client.feature, feature, PROBE | method) == errno.EINVAL
                assert refused(client.feature, feature, method) == errno.EINVAL
    for feature in (0, 3, 5, 9, 0xFFFF):
        assert refused(client.feature, feature, PROBE) == errno.ENOTTY
    assert refused(client.feature, Feature.MIGRATION, 0) == errno.EINVAL
    assert refused(client.feature, Feature.MIG_DEVICE_STATE, GET | SET) == errno.EINVAL
    assert refused(client.feature, Feature.MIGRATION, GET | 1 << 19) == errno.EINVAL


def test_wrong_sizes(client: Client) -> None:
    for payload in (b"", bytes(7), (7).to_bytes(4, "little") + (GET | 1).to_bytes(4, "little")):
        assert refused(client.request, Command.DEVICE_FEATURE, payload) == errno.EINVAL
    assert refused(client.feature, Feature.MIG_DEVICE_STATE, SET, b"\1\0\0\0") == errno.EINVAL
    for data in (b"", bytes(15), bytes(17), b"\0\x10" + bytes(6) + b"\xff\xff\xff\xff" + bytes(4)):
        assert refused(client.feature, Feature.DMA_LOGGING_START, SET, data) == errno.EINVAL
    assert refused(client.feature, Feature.DMA_LOGGING_REPORT, GET, bytes(23)) == errno.EINVAL


def test_migration_flags(client: Client) -> None:
    assert client.feature(Feature.MIGRATION, GET) == (1).to_bytes(8, "little")
    assert client.state() == S.RUNNING


ALLOWED = {
    S.RUNNING: {S.RUNNING, S.STOP, S.STOP_COPY, S.RESUMING},
    S.STOP: {S.RUNNING, S.STOP, S.STOP_COPY, S.RESUMING},
    S.STOP_COPY: {S.RUNNING, S.STOP, S.STOP_COPY, S.RESUMING},
    S.RESUMING: {S.RESUMING},  # the others need a complete state first
}


@pytest.mark.parametrize("start", list(ALLOWED))
@pytest.mark.parametrize("goal", list(S))
def test_every_transition(client: Client, start: S, goal: S) -> None:
    client.set_state(start)
    if goal in ALLOWED[start]:
        client.set_state(goal)
        assert client.state() == goal
    else:
        assert refused(client.set_state, goal) == errno.EINVAL
        assert client.state() == start
    client.reset()
    assert client.state() == S.RUNNING


@pytest.mark.parametrize("state", [8, 2**32 - 1])
def test_states_that_do_not_exist(client: Client, state: int) -> None:
    assert refused(client.set_state, state) == errno.EINVAL


def test_a_device_moves(served: Served, toy: Toy) -> None:
    with served.connect() as client:
        client.negotiate()
        enable(client)
        client.region_write(0, 0, b"\x78\x56\x34\x12")
        client.region_write(0, 0x2000, b"in the RAM area")
        client.set_state(S.STOP_COPY)
        state = client.migration_read(1000)
        assert client.migration_read() == b""
        client.set_state(S.RUNNING)
        client.region_write(0, 0, bytes(4))
        client.region_write(0, 0x2000, bytes(15))
        client.reset()
        client.set_state(S.RESUMING)
        client.migration_write(state, 777)
        client.set_state(S.RUNNING)
        assert client.region_read(0, 0, 4) == b"\x78\x56\x34\x12"  # enabled again, too
        assert client.region_read(0, 0x2000, 15) == b"in the RAM area"
        assert toy.dma.bus_master


def test_interrupts_are_part_of_the_state(client: Client, toy: Toy) -> None:
    """The MSI-X table as the guest wrote it, its mask bits, and what is pending behind them."""
    enable(client)
    msix = next(at for name, at, _ in toy.config.places if name == "msix")
    client.region_write(Region.CONFIG, msix + 2, b"\x00\x80")
    entry = b"\x00\x10\xe0\xfe" + bytes(4) + b"\x41\0\0\0"
    client.region_write(4, 16 * 5, entry + b"\x01\0\0\0")  # vector 5, masked
    client.region_write(4, 16 * 6, entry + b"\0\0\0\0")
    client.info()
    toy.defer(lambda: toy.msix.fire(5))
    client.info()
    client.info()
    table, pba = client.region_read(4, 0, 70 * 16), client.region_read(4, 0x1000, 16)
    assert (table[80:96], pba[0]) == (entry + b"\x01\0\0\0", 1 << 5)
    client.set_state(S.STOP_COPY)
    state = client.migration_read()
    client.reset()
    client.region_write(Region.CONFIG, 4, b"\x07\0")
    assert client.region_read(4, 80, 16) == bytes(12) + b"\x01\0\0\0"  # of the reset
    assert client.region_read(4, 0x1000, 16) == bytes(16)
    client.set_state(S.RESUMING)
    client.migration_write(state)
    client.set_state(S.RUNNING)
    assert client.region_read(4, 0, 70 * 16) == table
    assert client.region_read(4, 0x1000, 16) == pba
    events = client.eventfds(Irq.MSIX, 8)
    assert events[5].quiet()
    client.region_write(4, 16 * 5 + 12, bytes(4))  # unmasked: what was pending comes
    client.info()
    assert not events[5].quiet()
    assert client.region_read(4, 0x1000, 16) == bytes(16)


def test_a_broken_state_changes_nothing(client: Client, toy: Toy) -> None:
    client.set_state(S.STOP_COPY)
    state = client.migration_read()
    enable(client)
    before = toy.backend.save()
    for bad in (
        b"",
        state[:-1],
        state + b"x",
        b"VMS1" + state[4:],
        state[:4] + b"\xff" * 8,
        state[:4] + bytes([state[4] ^ 1]) + state[5:],  # of another model
        b"VMS1" + struct.pack("<I", 1 << 17) + b"[[]," * (1 << 13),  # as the old format was: a tree to be parsed
    ):
        client.set_state(S.STOP)
        client.set_state(S.RESUMING)
        client.migration_write(bad)
        assert refused(client.set_state, S.STOP) == errno.EINVAL
        assert client.state() == S.RESUMING
        assert toy.backend.save() == before
        client.reset()
        client.region_write(7, 4, b"\x07\x00")
        toy.post(lambda: toy.backend.restore(before))
        client.info()


def test_data_in_the_wrong_state(client: Client) -> None:
    assert refused(client.migration_read) == errno.EINVAL
    assert refused(client.migration_write, b"x") == errno.EINVAL
    client.set_state(S.STOP_COPY)
    for argsz, size in ((7, 0), (8, 1), (2**32 - 1, 2**32 - 1)):
        request = wire.MigData.build({"argsz": argsz, "size": size, "data": b""})
        assert refused(client.request, Command.MIG_DATA_READ, request) == errno.EINVAL
    client.set_state(S.RESUMING)
    for size, data in ((2, b"x"), (0, b"x"), (2**32 - 1, b"")):
        request = wire.MigData.build({"argsz": 8, "size": size, "data": data})
        assert refused(client.request, Command.MIG_DATA_WRITE, request) == errno.EINVAL


def test_a_stopped_device_is_quiet(driver: Client, toy: Toy) -> None:
    (event,) = driver.eventfds()
    ran: list[int] = []
    driver.set_state(S.STOP)
    toy.after(0, lambda: ran.append(1))
    driver.region_write(0, 0x34, bytes(4))
    assert toy.intx.level
    assert not toy.dma.bus_master
    driver.info()
    assert ran == []
    assert event.quiet()
    driver.set_state(S.RUNNING)
    driver.info()
    assert ran == [1]
    assert toy.dma.bus_master
    event.close()


def test_a_client_that_leaves_while_stopped(served: Served, toy: Toy) -> None:
    with served.connect() as client:
        client.negotiate()
        enable(client)
        client.dirty_start()
        client.set_state(S.STOP_COPY)
    with served.connect() as client:
        client.negotiate()
        assert client.state() == S.RUNNING
        assert toy.dma.bus_master
        client.dirty_start()
