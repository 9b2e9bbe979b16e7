"""DEVICE_FEATURE, the migration state machine, DMA logging and migration data: wrong sizes first."""

from __future__ import annotations

import errno
import itertools
import struct
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.unit.backend import Device, call, hello, refused
from vmodel.errors import PeerError
from vmodel.span import PAGE, Span
from vmodel.vfio_user.commands import Reply, Session
from vmodel.vfio_user.migration import ARCS, SAVING, path
from vmodel.vfio_user.wire import Command, DeviceState, Feature, FeatureFlags

GET, SET, PROBE = FeatureFlags.GET, FeatureFlags.SET, FeatureFlags.PROBE
S = DeviceState
LAST = 2**64 - 1


@pytest.fixture
def device() -> Iterator[Device]:
    with closing(Device()) as device:
        yield device


@pytest.fixture
def session(device: Device) -> Iterator[Session]:
    """A session whose handshake is done."""
    with closing(Session(device)) as session:
        hello(session, {"max_msg_fds": 8})
        yield session


# ---- DEVICE_FEATURE ----------------------------------------------------------------------------------


def feature(feature: int, method: int, data: bytes = b"", *, argsz: int | None = None) -> bytes:
    return struct.pack("<II", 8 + max(len(data), 4096) if argsz is None else argsz, feature | method) + data


def get(session: Session, number: int, data: bytes = b"") -> bytes:
    reply = call(session, Command.DEVICE_FEATURE, feature(number, GET, data)).payload
    argsz, flags = struct.unpack_from("<II", reply)
    assert (argsz, flags) == (len(reply), number | GET)
    return reply[8:]


def put(session: Session, number: int, data: bytes = b"") -> bytes:
    """SET; the reply's payload, which must be the request's but for what the feature changes."""
    return call(session, Command.DEVICE_FEATURE, feature(number, SET, data)).payload


METHODS = {
    Feature.MIGRATION: {GET},
    Feature.MIG_DEVICE_STATE: {GET, SET},
    Feature.DMA_LOGGING_START: {SET},
    Feature.DMA_LOGGING_STOP: {SET},
    Feature.DMA_LOGGING_REPORT: {GET},
}


@pytest.mark.parametrize("size", range(8))
def test_feature_too_short(session: Session, size: int) -> None:
    assert refused(session, Command.DEVICE_FEATURE, feature(1, PROBE)[:size]) == errno.EINVAL


def test_feature_argsz(session: Session) -> None:
    for argsz in (0, 7):
        assert refused(session, Command.DEVICE_FEATURE, feature(1, PROBE, argsz=argsz)) == errno.EINVAL
    # A reply must fit: the whole request for PROBE and SET, the data for GET.
    for request in (
        feature(1, PROBE, bytes(8), argsz=15),
        feature(2, SET, struct.pack("<II", S.STOP, 0), argsz=15),
        feature(1, GET, argsz=15),
        feature(2, GET, argsz=15),
    ):
        assert refused(session, Command.DEVICE_FEATURE, request) == errno.EINVAL
    assert session.migration.state is S.RUNNING
    assert len(call(session, Command.DEVICE_FEATURE, feature(1, GET, argsz=16)).payload) == 16


@pytest.mark.parametrize("number", list(METHODS))
def test_probe(session: Session, number: Feature) -> None:
    for methods in ((), (GET,), (SET,), (GET, SET)):
        flags = PROBE
        for method in methods:
            flags |= method
        request = feature(number, flags)
        if set(methods) <= METHODS[number]:
            assert call(session, Command.DEVICE_FEATURE, request).payload == request
        else:
            assert refused(session, Command.DEVICE_FEATURE, request) == errno.EINVAL
    for method in {GET, SET} - METHODS[number]:
        assert refused(session, Command.DEVICE_FEATURE, feature(number, method, bytes(24))) == errno.EINVAL


@pytest.mark.parametrize("number", [0, 3, 4, 5, 9, 10, 0xFFFF])
def test_features_that_are_not_there(session: Session, number: int) -> None:
    for method in (PROBE, GET, SET):
        assert refused(session, Command.DEVICE_FEATURE, feature(number, method)) == errno.ENOTTY


def test_feature_methods(session: Session) -> None:
    assert refused(session, Command.DEVICE_FEATURE, feature(2, 0)) == errno.EINVAL
    assert refused(session, Command.DEVICE_FEATURE, feature(2, GET | SET, bytes(8))) == errno.EINVAL
    for bit in range(19, 32):
        assert refused(session, Command.DEVICE_FEATURE, feature(1, GET | 1 << bit)) == errno.EINVAL


# ---- MIGRATION, MIG_DEVICE_STATE ---------------------------------------------------------------------


def state(goal: int, data_fd: int = 0) -> bytes:
    return struct.pack("<II", goal, data_fd)


def test_migration_flags(session: Session) -> None:
    assert get(session, Feature.MIGRATION) == struct.pack("<Q", 1)  # STOP_COPY only


def test_sizes_of_a_state(session: Session) -> None:
    for data in (b"", bytes(7), state(S.STOP) + b"\0"):
        assert refused(session, Command.DEVICE_FEATURE, feature(2, SET, data)) == errno.EINVAL
    assert session.migration.state is S.RUNNING


def test_a_state_is_answered_with_the_request(session: Session) -> None:
    request = feature(2, SET, state(S.STOP, 2**32 - 1), argsz=64)
    assert call(session, Command.DEVICE_FEATURE, request).payload == request
    assert get(session, Feature.MIG_DEVICE_STATE) == state(S.STOP)


def reference(start: DeviceState, goal: DeviceState) -> list[DeviceState] | None:
    """The specification's rules by brute force: the shortest of all simple paths, none through a saving state."""
    if goal is S.ERROR:
        return None
    if start is goal:
        return []
    states = [s for s in S if s not in (start, goal)]
    for length in range(len(states) + 1):
        for inner in itertools.permutations(states, length):
            way = [start, *inner, goal]
            if SAVING.isdisjoint(inner) and all(arc in ARCS for arc in itertools.pairwise(way)):
                return way[1:]
    return None


@pytest.mark.parametrize("start", list(S))
@pytest.mark.parametrize("goal", list(S))
def test_paths(start: DeviceState, goal: DeviceState) -> None:
    expected = reference(start, goal)
    if expected is None:
        with pytest.raises(PeerError) as caught:
            path(start, goal)
        assert caught.value.errno == errno.EINVAL
    else:
        assert path(start, goal) == expected


def test_the_arcs_are_the_specifications() -> None:
    """Section "Direct State Transitions"; "if PRE_COPY is not supported, arcs touching it are removed"."""
    assert set(ARCS) == {
        (S.RUNNING, S.STOP),
        (S.STOP_COPY, S.STOP),
        (S.RESUMING, S.STOP),
        (S.STOP, S.RUNNING),
        (S.STOP, S.STOP_COPY),
        (S.STOP, S.RESUMING),
    }


@pytest.mark.parametrize("goal", [8, 99, 2**32 - 1])
def test_states_that_do_not_exist(session: Session, goal: int) -> None:
    assert refused(session, Command.DEVICE_FEATURE, feature(2, SET, state(goal))) == errno.EINVAL


@pytest.mark.parametrize("goal", [S.ERROR, S.RUNNING_P2P, S.PRE_COPY, S.PRE_COPY_P2P])
def test_states_that_nobody_can_ask_for(session: Session, device: Device, goal: int) -> None:
    assert refused(session, Command.DEVICE_FEATURE, feature(2, SET, state(goal))) == errno.EINVAL
    assert session.migration.state is S.RUNNING
    assert device.calls == []


def test_the_device_is_stopped_once_and_started_once(session: Session, device: Device) -> None:
    for goal in (S.STOP_COPY, S.RESUMING):
        put(session, 2, state(goal))
    assert device.calls == ["stop", "save"]
    assert call(session, Command.MIG_DATA_WRITE, mig(device.state)) == Reply()
    put(session, 2, state(S.RUNNING))
    assert device.calls == ["stop", "save", "restore", "run"]


def test_an_arc_that_refuses_stays_where_it_began(session: Session, device: Device) -> None:
    device.fail = PeerError(errno.EFBIG, "too much")
    assert refused(session, Command.DEVICE_FEATURE, feature(2, SET, state(S.STOP_COPY))) == errno.EFBIG
    assert session.migration.state is S.STOP
    put(session, 2, state(S.RUNNING))
    assert device.calls == ["stop", "run"]


def test_an_arc_that_breaks_ends_in_error(session: Session, device: Device) -> None:
    """Only DEVICE_RESET leads out of it."""
    device.fail = RuntimeError("a bug of the model's")
    with pytest.raises(RuntimeError):
        put(session, 2, state(S.STOP_COPY))
    assert get(session, 2) == state(S.ERROR)
    for goal in S:
        assert refused(session, Command.DEVICE_FEATURE, feature(2, SET, state(goal))) == errno.EINVAL
    assert refused(session, Command.MIG_DATA_READ, mig(size=1)) == errno.EINVAL
    device.fail = None
    call(session, Command.DEVICE_RESET)
    assert get(session, 2) == state(S.RUNNING)
    assert device.calls == ["stop", "reset", "run"]


@pytest.mark.parametrize("goal", [S.STOP, S.STOP_COPY, S.RESUMING])
def test_a_client_that_leaves_while_stopped(session: Session, device: Device, goal: DeviceState) -> None:
    put(session, 2, state(goal))
    session.close()
    assert device.calls[-1] == "run"
    assert "reset" not in device.calls


def test_a_client_that_leaves_in_error(session: Session, device: Device) -> None:
    device.fail = RuntimeError("a bug of the model's")
    with pytest.raises(RuntimeError):
        put(session, 2, state(S.STOP_COPY))
    session.close()
    assert device.calls == ["stop", "reset", "run"]


# ---- DMA_LOGGING_START, _STOP, _REPORT ---------------------------------------------------------------


def logging(*ranges: tuple[int, int], page_size: int = PAGE, count: int | None = None, reserved: int = 0) -> bytes:
    head = struct.pack("<QII", page_size, len(ranges) if count is None else count, reserved)
    return head + b"".join(struct.pack("<QQ", *entry) for entry in ranges)


def start(session: Session, data: bytes) -> bytes:
    return put(session, Feature.DMA_LOGGING_START, data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(15),
        logging() + b"\0",
        logging(count=1),
        logging((0, 4096), count=0),
        logging((0, 4096), count=2),
        logging((0, 4096))[:-1],
        logging(count=2**32 - 1),
        logging(reserved=1),
        logging((0, 0)),
    ],
)
def test_malformed_ranges(session: Session, device: Device, data: bytes) -> None:
    assert refused(session, Command.DEVICE_FEATURE, feature(6, SET, data)) == errno.EINVAL
    assert device.memory.spans is None


@pytest.mark.parametrize("entry", [(LAST, 2), (2, LAST), (1 << 63, (1 << 63) + 1)])
def test_ranges_that_wrap(session: Session, device: Device, entry: tuple[int, int]) -> None:
    assert refused(session, Command.DEVICE_FEATURE, feature(6, SET, logging(entry))) == errno.EOVERFLOW
    assert device.memory.spans is None


@pytest.mark.parametrize("entry", [(LAST, 1), (1, LAST), (1 << 63, 1 << 63)])
def test_ranges_up_to_the_last_address(session: Session, device: Device, entry: tuple[int, int]) -> None:
    start(session, logging(entry))
    assert device.memory.spans == [Span(entry[0], LAST)]


@pytest.mark.parametrize("hint", [0, 1, 4096, 65536, LAST])
def test_the_page_size_is_a_hint(session: Session, device: Device, hint: int) -> None:
    request = feature(6, SET, logging((0, 8192), (1 << 40, 4096), page_size=hint))
    answer = call(session, Command.DEVICE_FEATURE, request).payload
    assert answer == request[:8] + struct.pack("<Q", 4096) + request[16:]
    assert device.memory.spans == [Span(0, 8191), Span.sized(1 << 40, 4096)]


def test_logging_is_started_once(session: Session, device: Device) -> None:
    start(session, logging())
    assert device.memory.spans == []
    assert refused(session, Command.DEVICE_FEATURE, feature(6, SET, logging())) == errno.EBUSY
    put(session, Feature.DMA_LOGGING_STOP)
    assert device.memory.spans is None
    assert refused(session, Command.DEVICE_FEATURE, feature(7, SET)) == errno.EINVAL


def test_stop_takes_the_structure_that_it_shares_with_start(session: Session, device: Device) -> None:
    # libvfio-user's sample client sends it; Linux has no data there.
    start(session, logging())
    assert refused(session, Command.DEVICE_FEATURE, feature(7, SET, bytes(3))) == errno.EINVAL
    request = feature(7, SET, logging(), argsz=24)
    assert call(session, Command.DEVICE_FEATURE, request).payload == request
    assert device.memory.spans is None


def report(iova: int, length: int, page_size: int = PAGE) -> bytes:
    return struct.pack("<QQQ", iova, length, page_size)


def test_a_report(session: Session) -> None:
    start(session, logging())
    for pages, size in ((1, 8), (64, 8), (65, 16)):
        data = get(session, Feature.DMA_LOGGING_REPORT, report(0x10000, pages * PAGE))
        assert data == report(0x10000, pages * PAGE) + b"\x05".ljust(size, b"\0")


def test_a_report_up_to_the_last_address(session: Session) -> None:
    start(session, logging())
    assert len(get(session, 8, report((1 << 64) - PAGE, PAGE))) == 32
    wraps = report((1 << 64) - PAGE, 2 * PAGE)
    assert refused(session, Command.DEVICE_FEATURE, feature(8, GET, wraps)) == errno.EOVERFLOW


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(23),
        report(0, PAGE) + b"\0",
        report(0, 0),
        report(0, PAGE, 0),
        report(0, PAGE, 2048),
        report(0, PAGE, PAGE + 1),
        report(0, 3 * PAGE, 3 * PAGE),
        report(1, PAGE),
        report(0, PAGE + 1),
        report(PAGE, 2 * PAGE, 2 * PAGE),
        report(0, 1 << 60),
        report(0, (1 << 64) - PAGE),
    ],
)
def test_malformed_reports(session: Session, data: bytes) -> None:
    start(session, logging())
    assert refused(session, Command.DEVICE_FEATURE, feature(8, GET, data, argsz=2**32 - 1)) == errno.EINVAL


def test_a_report_that_does_not_fit(session: Session) -> None:
    start(session, logging())
    request = feature(8, GET, report(0, 65 * PAGE), argsz=8 + 24 + 15)
    assert refused(session, Command.DEVICE_FEATURE, request) == errno.EINVAL
    request = feature(8, GET, report(0, 65 * PAGE), argsz=8 + 24 + 16)
    assert len(call(session, Command.DEVICE_FEATURE, request).payload) == 8 + 24 + 16


def test_a_report_of_nothing(session: Session) -> None:
    assert refused(session, Command.DEVICE_FEATURE, feature(8, GET, report(0, PAGE))) == errno.EINVAL


def test_logging_ends_with_the_client(session: Session, device: Device) -> None:
    start(session, logging())
    session.close()
    assert device.memory.spans is None
    session.close()  # once is enough


# ---- MIG_DATA_READ, MIG_DATA_WRITE -------------------------------------------------------------------


def mig(data: bytes = b"", *, size: int | None = None, argsz: int | None = None) -> bytes:
    size = len(data) if size is None else size
    return struct.pack("<II", min(8 + size, 2**32 - 1) if argsz is None else argsz, size) + data


def test_sizes_of_data(session: Session) -> None:
    put(session, 2, state(S.STOP_COPY))
    for payload in (b"", bytes(7), mig(size=4, argsz=11), mig(b"x", size=1), mig(size=(1 << 20) + 1)):
        assert refused(session, Command.MIG_DATA_READ, payload) == errno.EINVAL
    assert refused(session, Command.MIG_DATA_READ, mig(size=2**32 - 1, argsz=2**32 - 1)) == errno.EINVAL
    put(session, 2, state(S.RESUMING))
    for payload in (b"", bytes(7), mig(b"x", size=0), mig(b"x", size=2), mig(size=2**32 - 1)):
        assert refused(session, Command.MIG_DATA_WRITE, payload) == errno.EINVAL
    too_much = bytes((1 << 20) + 1)
    assert refused(session, Command.MIG_DATA_WRITE, mig(too_much)) == errno.EINVAL


def test_the_stream_is_read_to_its_end(session: Session, device: Device) -> None:
    put(session, 2, state(S.STOP_COPY))
    read = b""
    while len(read) <= len(device.state):
        reply = call(session, Command.MIG_DATA_READ, mig(size=5)).payload
        argsz, size = struct.unpack_from("<II", reply)
        assert argsz == len(reply) == 8 + size
        read += reply[8:]
        if size < 5:
            break
    assert read == device.state
    assert call(session, Command.MIG_DATA_READ, mig(size=5)).payload == struct.pack("<II", 8, 0)
    # A new session of data transfer starts at the beginning.
    put(session, 2, state(S.STOP))
    put(session, 2, state(S.STOP_COPY))
    assert call(session, Command.MIG_DATA_READ, mig(size=64)).payload[8:] == device.state


@pytest.mark.parametrize("where", [S.RUNNING, S.STOP, S.RESUMING])
def test_reading_in_the_wrong_state(session: Session, where: DeviceState) -> None:
    put(session, 2, state(where))
    assert refused(session, Command.MIG_DATA_READ, mig(size=1)) == errno.EINVAL


@pytest.mark.parametrize("where", [S.RUNNING, S.STOP, S.STOP_COPY])
def test_writing_in_the_wrong_state(session: Session, where: DeviceState) -> None:
    put(session, 2, state(where))
    assert refused(session, Command.MIG_DATA_WRITE, mig(b"x")) == errno.EINVAL


@pytest.mark.parametrize("argsz", [0, 8, 2**32 - 1])
def test_writing_needs_no_argsz(session: Session, argsz: int) -> None:
    put(session, 2, state(S.RESUMING))
    assert call(session, Command.MIG_DATA_WRITE, mig(b"x", argsz=argsz)) == Reply()


def test_a_bad_state_is_refused_and_forgotten(session: Session, device: Device) -> None:
    put(session, 2, state(S.RESUMING))
    call(session, Command.MIG_DATA_WRITE, mig(b"nonsense"))
    assert refused(session, Command.DEVICE_FEATURE, feature(2, SET, state(S.RUNNING))) == errno.EINVAL
    assert session.migration.state is S.RESUMING
    call(session, Command.MIG_DATA_WRITE, mig(device.state[:4]))
    call(session, Command.MIG_DATA_WRITE, mig(device.state[4:]))
    put(session, 2, state(S.RUNNING))
    assert device.calls == ["stop", "restore", "run"]


def test_a_state_without_an_end(session: Session, device: Device) -> None:
    """Not a byte more is kept than the device's own state can have."""
    put(session, 2, state(S.RESUMING))
    piece = mig(bytes(1 << 18))
    for _ in range(device.max_state >> 18):
        call(session, Command.MIG_DATA_WRITE, piece)
    assert refused(session, Command.MIG_DATA_WRITE, mig(b"x")) == errno.ENOSPC


def test_a_small_client_reads_in_small_pieces(device: Device) -> None:
    session = Session(device)
    hello(session, {"max_data_xfer_size": 8})
    put(session, 2, state(S.STOP_COPY))
    assert refused(session, Command.MIG_DATA_READ, mig(size=9)) == errno.EINVAL
    assert len(call(session, Command.MIG_DATA_READ, mig(size=8)).payload) == 16
    session.close()
