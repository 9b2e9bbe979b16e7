"""Backends against a plain bytearray; files that are locked, shortened, full, or not what they should be."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.examples import examples
from vmodel._shim import FunctionRegions
from vmodel._shim.store import Store, Workers
from vmodel.devices.nvme.backend import BlockBackend, FileBackend, Job, MemoryBackend, Op
from vmodel.errors import ConfigError

SIZE = 1 << 20
spans = st.tuples(st.integers(0, SIZE), st.integers(0, 70000)).map(lambda s: (s[0], min(s[1], SIZE - s[0])))


class Patient:
    """Does jobs to their end, with workers or without."""

    def __init__(self, workers: Workers | None) -> None:
        self.workers = workers

    def __call__(self, backend: BlockBackend, job: Job) -> int:
        codes: list[int] = []
        backend.submit(job, codes.append)
        if self.workers is not None:
            self.workers.settle()
            self.workers.collect()
        (code,) = codes
        return code


class BackendMachine(RuleBasedStateMachine):
    """Jobs of all kinds; each is done before the next."""

    backend: BlockBackend
    do: Patient

    def __init__(self) -> None:
        super().__init__()
        self.model = bytearray(SIZE)
        self.make()

    def make(self) -> None:
        raise NotImplementedError

    @rule(span=spans, seed=st.integers(0, 255), sync=st.booleans())
    def write(self, span: tuple[int, int], seed: int, sync: bool) -> None:
        offset, length = span
        data = bytearray(n * 3 + seed & 0xFF for n in range(length))
        assert self.do(self.backend, Job(Op.WRITE, offset, length, data, sync=sync)) == 0
        self.model[offset : offset + length] = data

    @rule(span=spans, sync=st.booleans())
    def read(self, span: tuple[int, int], sync: bool) -> None:
        offset, length = span
        data = bytearray(length)
        assert self.do(self.backend, Job(Op.READ, offset, length, data, sync=sync)) == 0
        assert data == self.model[offset : offset + length]

    @rule(span=spans, op=st.sampled_from([Op.ZERO, Op.DISCARD]))
    def clear(self, span: tuple[int, int], op: Op) -> None:
        offset, length = span
        assert self.do(self.backend, Job(op, offset, length)) == 0
        self.model[offset : offset + length] = bytes(length)

    @rule(span=spans, same=st.booleans(), at=st.integers(0, 70000))
    def compare(self, span: tuple[int, int], same: bool, at: int) -> None:
        offset, length = span
        expected = self.model[offset : offset + length]
        if length and not same:
            expected[at % length] ^= 1
        code = self.do(self.backend, Job(Op.COMPARE, offset, length, expected=expected))
        assert code == (errno.EBADMSG if length and not same else 0)

    @rule(span=spans, same=st.booleans(), at=st.integers(0, 70000), seed=st.integers(0, 255))
    def compare_write(self, span: tuple[int, int], same: bool, at: int, seed: int) -> None:
        offset, length = span
        expected = self.model[offset : offset + length]
        if length and not same:
            expected[at % length] ^= 1
        data = bytearray([seed]) * length
        code = self.do(self.backend, Job(Op.COMPARE_WRITE, offset, length, data, expected=expected))
        assert code == (errno.EBADMSG if length and not same else 0)
        if not code:
            self.model[offset : offset + length] = data

    @rule(span=spans)
    def verify(self, span: tuple[int, int]) -> None:
        assert self.do(self.backend, Job(Op.VERIFY, *span)) == 0

    @rule()
    def sync(self) -> None:
        assert self.do(self.backend, Job(Op.SYNC)) == 0

    @rule(span=spans)
    def out_of_it(self, span: tuple[int, int]) -> None:
        offset = span[0]
        beyond = SIZE - offset + 1
        assert self.do(self.backend, Job(Op.VERIFY, offset, beyond)) == errno.EINVAL

    @precondition(lambda self: self.backend.view(0, 1) is not None)
    @invariant()
    def views_agree(self) -> None:
        view = self.backend.view(0, SIZE)
        assert view is not None and view == self.model

    def teardown(self) -> None:
        self.backend.close()


class MemoryMachine(BackendMachine):
    def make(self) -> None:
        self.backend, self.do = MemoryBackend(SIZE), Patient(None)


class FileMachine(BackendMachine):
    folder: Path
    workers = 0

    def make(self) -> None:
        workers = Workers(FunctionRegions(), self.workers) if self.workers else None
        path = self.folder / "disk.img"
        path.unlink(missing_ok=True)
        self.backend, self.do = FileBackend(path, SIZE, workers=workers), Patient(workers)


def run(machine: type[BackendMachine], most: int) -> None:
    case = machine.TestCase
    case.settings = settings(max_examples=examples(most), stateful_step_count=25, deadline=None)
    case("runTest").runTest()


def test_memory_is_a_bytearray() -> None:
    run(MemoryMachine, 40)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_file_is_a_bytearray(tmp_path: Path, workers: int) -> None:
    class Here(FileMachine):
        pass

    Here.folder, Here.workers = tmp_path, workers
    run(Here, 25)


# ---- workers ------------------------------------------------------------------------------------------


@pytest.fixture
def workers() -> Workers:
    return Workers(FunctionRegions(), 4)


def settle(workers: Workers) -> None:
    workers.settle()
    workers.collect()


def test_many_jobs_at_a_time(tmp_path: Path, workers: Workers) -> None:
    backend = FileBackend(tmp_path / "disk.img", SIZE, workers=workers)
    codes: list[int] = []
    for n in range(256):
        backend.submit(Job(Op.WRITE, n * 4096, 4096, bytearray([n]) * 4096), codes.append)
    settle(workers)
    assert codes == [0] * 256
    buffers = [bytearray(4096) for _ in range(256)]
    for n, buffer in enumerate(buffers):
        backend.submit(Job(Op.READ, n * 4096, 4096, buffer), codes.append)
    settle(workers)
    assert codes == [0] * 512
    assert buffers == [bytearray([n]) * 4096 for n in range(256)]
    backend.close()


def test_a_read_sees_all_or_nothing_of_a_write(tmp_path: Path, workers: Workers) -> None:
    """Also where the file system locks page by page."""
    backend, length = FileBackend(tmp_path / "disk.img", SIZE, workers=workers), 300000
    images = [bytearray([value]) * length for value in (0, 1, 2)]
    buffers = [bytearray(length) for _ in range(60)]
    codes: list[int] = []
    for n, buffer in enumerate(buffers):
        backend.submit(Job(Op.WRITE, 5000, length, images[1 + n % 2]), codes.append)
        backend.submit(Job(Op.READ, 5000, length, buffer), codes.append)
    settle(workers)
    assert not any(codes)
    assert all(buffer in images for buffer in buffers)
    backend.close()


def test_compare_and_write_is_one(tmp_path: Path, workers: Workers) -> None:
    """A counter that is incremented by compare-and-write, as often as that succeeds."""
    backend = FileBackend(tmp_path / "disk.img", SIZE, workers=workers)
    for value in range(50):
        old, new = value.to_bytes(512, "little"), (value + 1).to_bytes(512, "little")
        codes: list[int] = []
        for _ in range(8):
            backend.submit(Job(Op.COMPARE_WRITE, 0, 512, bytearray(new), expected=old), codes.append)
        settle(workers)
        assert sorted(codes) == [0] + [errno.EBADMSG] * 7
    backend.close()


def test_a_job_that_has_not_begun_can_be_taken_back(tmp_path: Path) -> None:
    workers = Workers(FunctionRegions(), 1)
    backend = FileBackend(tmp_path / "disk.img", 64 << 20, workers=workers)
    codes: list[int] = []
    data = bytearray(16 << 20)
    numbers = [backend.submit(Job(Op.WRITE, 0, len(data), data), codes.append) for _ in range(50)]
    taken = [backend.revoke(number) for number in reversed(numbers) if number is not None]
    settle(workers)
    assert taken[0] and codes == [0] * taken.count(False)
    assert not any(backend.revoke(number) for number in numbers if number is not None)
    backend.close()


def test_workers_end_with_jobs_in_hand(tmp_path: Path) -> None:
    threads = len(list(Path("/proc/self/task").iterdir()))
    workers = Workers(FunctionRegions(), 2)
    backend = FileBackend(tmp_path / "disk.img", SIZE, workers=workers)
    for _ in range(32):
        backend.submit(Job(Op.WRITE, 0, SIZE, bytearray(SIZE), sync=True), lambda _: pytest.fail("nobody collects"))
    backend.close()
    del backend, workers
    assert len(list(Path("/proc/self/task").iterdir())) == threads


def test_somebody_is_woken(tmp_path: Path) -> None:
    function = FunctionRegions()
    workers = Workers(function, 1)
    backend = FileBackend(tmp_path / "disk.img", SIZE, workers=workers)
    woken = threading.Event()

    def sleep() -> None:
        function.idle(-1, time.monotonic_ns() + 10_000_000_000)
        woken.set()

    thread = threading.Thread(target=sleep)
    thread.start()
    codes: list[int] = []
    backend.submit(Job(Op.SYNC), codes.append)
    assert woken.wait(5)
    thread.join()
    workers.collect()
    assert codes == [0]
    backend.close()


def test_as_many_as_are_collected_at_once(tmp_path: Path) -> None:
    """64 jobs fit into one call: the thread is woken for the next one all the same."""
    function = FunctionRegions()
    workers = Workers(function, 1)
    backend = FileBackend(tmp_path / "disk.img", SIZE, workers=workers)
    codes: list[int] = []
    for count in (64, 1):
        for _ in range(count):
            backend.submit(Job(Op.SYNC), codes.append)
        before = time.monotonic()
        function.idle(-1, time.monotonic_ns() + 10_000_000_000)
        assert time.monotonic() - before < 9  # it was woken
        workers.settle()
        workers.collect()
    assert codes == [0] * 65
    backend.close()


# ---- space ----------------------------------------------------------------------------------------------


def blocks(path: Path) -> int:
    """Bytes that a file takes on disk."""
    return path.stat().st_blocks * 512


def test_a_file_is_sparse_and_gives_space_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    backend = FileBackend(path, 64 << 20)
    do = Patient(None)
    assert path.stat().st_size == 64 << 20 and blocks(path) == 0
    assert do(backend, Job(Op.WRITE, 8 << 20, SIZE, bytearray(b"x" * SIZE), sync=True)) == 0
    taken = blocks(path)
    assert taken >= SIZE
    assert do(backend, Job(Op.DISCARD, 8 << 20, SIZE)) == 0
    assert do(backend, Job(Op.SYNC)) == 0
    assert blocks(path) <= taken - SIZE // 2
    assert path.stat().st_size == 64 << 20
    backend.close()


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_memory_is_taken_as_it_is_written_and_given_back() -> None:
    data = bytearray(b"x" * (64 << 20))
    before = resident()
    backend = MemoryBackend(1 << 40)
    do = Patient(None)
    start = resident()
    assert start - before < 8 << 20
    assert do(backend, Job(Op.WRITE, 1 << 39, len(data), data)) == 0
    assert resident() - start > 60 << 20
    assert do(backend, Job(Op.DISCARD, 1 << 39, len(data))) == 0
    assert resident() - start < 8 << 20
    backend.close()


# ---- files that are not as they should be -------------------------------------------------------------


@pytest.mark.slow
def test_a_file_is_for_one_server(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    backend = FileBackend(path, SIZE)
    code = "import sys; from pathlib import Path; from vmodel.devices.nvme.backend import FileBackend\n"
    code += "try:\n    FileBackend(Path(sys.argv[1]), read_only=sys.argv[2] == 'r')\n"
    code += "except Exception as error:\n    print(type(error).__name__, error)\nelse:\n    print('open')\n"

    def other(mode: str) -> str:
        command = [sys.executable, "-c", code, str(path), mode]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    for mode in ("w", "r"):
        assert other(mode) == f"ConfigError {path} is in use by another server; stop that one, or use another file\n"
    with pytest.raises(ConfigError, match="in use"):
        FileBackend(path, SIZE)
    backend.close()
    assert other("w") == "open\n"
    readers = [FileBackend(path, read_only=True) for _ in range(2)]
    assert other("r") == "open\n"
    assert "in use" in other("w")
    for reader in readers:
        reader.close()


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with pytest.raises(ConfigError, match=r"No such file.*give a size"):
        FileBackend(path)
    with pytest.raises(ConfigError, match=r"cannot open .*No such file"):
        FileBackend(path, read_only=True)
    with pytest.raises(ConfigError, match="cannot open"):
        FileBackend(tmp_path / "nowhere" / "disk.img", SIZE)
    with pytest.raises(ConfigError, match="cannot open"):
        FileBackend(tmp_path, SIZE)
    with pytest.raises(ConfigError, match="must be a regular file"):
        FileBackend(Path("/dev/zero"), SIZE)
    path.touch()
    with pytest.raises(ConfigError, match="is empty; give a size"):
        FileBackend(path)
    FileBackend(path, SIZE).close()
    assert path.stat().st_size == SIZE
    FileBackend(path).close()
    with pytest.raises(ConfigError, match=f"has {SIZE} bytes, not 4096; leave out size"):
        FileBackend(path, 4096)
    with pytest.raises(ConfigError, match=r"cannot make .* bytes long"):
        FileBackend(tmp_path / "large.img", 1 << 62)


def test_an_image_that_is_only_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(b"boot" * 1024)
    path.chmod(0o444)
    backend, do = FileBackend(path, read_only=True), Patient(None)
    assert backend.size == 4096 and backend.read_only
    data = bytearray(4)
    assert do(backend, Job(Op.READ, 4, 4, data)) == 0 and data == b"boot"
    for op in (Op.WRITE, Op.ZERO, Op.DISCARD):
        assert do(backend, Job(op, 0, 4, data)) == errno.EBADF
    backend.close()
    assert path.read_bytes() == b"boot" * 1024


def test_a_file_that_somebody_has_shortened(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    backend, do = FileBackend(path, SIZE), Patient(None)
    os.truncate(path, 4096)
    data = bytearray(8192)
    assert do(backend, Job(Op.READ, 0, 8192, data)) == errno.EIO
    assert do(backend, Job(Op.VERIFY, 0, 8192)) == errno.EIO
    assert do(backend, Job(Op.READ, 0, 4096, data)) == 0
    backend.close()


@pytest.fixture
def full() -> Iterator[Callable[[Workers | None], BlockBackend]]:
    """A backend on a device that is always full."""
    fd = os.open("/dev/full", os.O_RDWR)
    yield lambda workers: BlockBackend(SIZE, Store.file(fd, SIZE), read_only=False, workers=workers)
    os.close(fd)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_full_disk(full: Callable[[Workers | None], BlockBackend], threads: int) -> None:
    workers = Workers(FunctionRegions(), threads) if threads else None
    backend, do = full(workers), Patient(workers)
    data = bytearray(4096)
    assert do(backend, Job(Op.READ, 0, 4096, data)) == 0
    assert do(backend, Job(Op.WRITE, 0, 4096, data)) == errno.ENOSPC
    assert do(backend, Job(Op.COMPARE_WRITE, 0, 4096, data, expected=bytes(4096))) == errno.ENOSPC
