"""Windows, DMA and the dirty log of the shim, against dicts and bytearrays."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.waiting import meanwhile
from vmodel import _shim
from vmodel.dma import Dma
from vmodel.errors import Access, DmaFault, Reason
from vmodel.memory import GuestMemory
from vmodel.span import MiB, Span

RW = Access.READ | Access.WRITE
SIZE = 4 * MiB


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("guest-ram")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(_shim.Files())


@pytest.fixture
def dma(memory: GuestMemory) -> Dma:
    dma = Dma(memory)
    dma.bus_master = True
    return dma


def fault(call: object, *args: object, **kwargs: object) -> DmaFault:
    with pytest.raises(DmaFault) as caught:
        call(*args, **kwargs)  # type: ignore[operator]
    return caught.value


# ---- windows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gpa", "size", "access", "offset", "code"),
    [
        (0, 0, 3, 0, errno.EINVAL),  # empty
        (0x800, 4096, 3, 0, errno.EINVAL),  # start not on a page
        (0, 4097, 3, 0, errno.EINVAL),  # size not whole pages
        (2**64 - 4096, 8192, 3, 0, errno.EINVAL),  # wraps
        (0, 4096, 0, 0, errno.EINVAL),  # no access at all
        (0, 4096, 4, 0, errno.EINVAL),  # unknown access
        (0, SIZE + 4096, 3, 0, errno.EINVAL),  # past the end of the file
        (0, 4096, 3, SIZE, errno.EINVAL),
        (0, 4096, 3, 2**64 - 4096, errno.EINVAL),  # offset + size wraps
    ],
)
def test_bad_windows_are_refused(
    memory: GuestMemory, fd: int, gpa: int, size: int, access: int, offset: int, code: int
) -> None:
    with pytest.raises(OSError) as caught:
        memory.map(gpa, size, Access(access), fd, offset)
    assert caught.value.errno == code
    assert memory.windows() == []
    assert memory.shim.files.mapped == 0


def test_the_last_page_of_the_address_space(memory: GuestMemory, dma: Dma, fd: int) -> None:
    memory.map(2**64 - 4096, 4096, fd=fd)
    dma.write(2**64 - 4, b"last")
    assert os.pread(fd, 4, 4092) == b"last"
    assert fault(dma.read, 2**64 - 4, 5).reason is Reason.WRAP


def test_overlap_is_eexist(memory: GuestMemory, fd: int) -> None:
    memory.map(0x4000, 0x4000, fd=fd)
    for gpa, size in ((0x4000, 0x4000), (0x3000, 0x2000), (0x7000, 0x2000), (0, 0x100000), (0x5000, 0x1000)):
        with pytest.raises(FileExistsError):
            memory.map(gpa, size, fd=fd)
    memory.map(0x3000, 0x1000, fd=fd)
    memory.map(0x8000, 0x1000)
    assert [w.span.start for w in memory.windows()] == [0x3000, 0x4000, 0x8000]


def test_unmap_takes_whole_windows_only(memory: GuestMemory, fd: int) -> None:
    for page in range(4):
        memory.map(page * 0x10000, 0x4000, fd=fd)
    for gpa, size in ((0, 0x1000), (0x2000, 0x20000), (0x10000, 0x21000), (0x1000, 0x1000)):
        with pytest.raises(OSError) as caught:
            memory.unmap(gpa, size)
        assert caught.value.errno == errno.EINVAL
    assert len(memory) == 4
    assert memory.unmap(0x4000, 0xC000) == 0  # nothing there: fine
    assert memory.unmap(0x10000, 0x20000) == 0x8000
    assert memory.unmap_all() == 0x8000
    assert memory.shim.files.mapped == 0


def test_too_many_windows(fd: int) -> None:
    memory = GuestMemory(_shim.Files(), max_windows=3)
    for page in range(3):
        memory.map(page * 4096, 4096, fd=fd)
    with pytest.raises(OSError) as caught:
        memory.map(3 * 4096, 4096, fd=fd)
    assert caught.value.errno == errno.ENOSPC


def test_a_file_is_mapped_once(memory: GuestMemory, fd: int) -> None:
    for page in range(100):
        memory.map(page * 0x2000, 4096, fd=fd, offset=page * 4096)
    assert memory.shim.files.mapped == 1
    again = os.dup(fd)
    memory.map(1 << 40, 4096, fd=again)
    os.close(again)
    assert memory.shim.files.mapped == 1


def test_a_file_that_has_grown_is_mapped_anew(memory: GuestMemory, dma: Dma, fd: int) -> None:
    memory.map(0, SIZE, fd=fd)
    os.ftruncate(fd, 2 * SIZE)
    memory.map(SIZE, SIZE, fd=fd, offset=SIZE)
    dma.write(SIZE - 2, b"abcd")
    assert os.pread(fd, 4, SIZE - 2) == b"abcd"


def test_only_regular_files(memory: GuestMemory) -> None:
    read_end, write_end = os.pipe()
    with pytest.raises(OSError) as caught:
        memory.map(0, 4096, fd=read_end)
    assert caught.value.errno == errno.EINVAL
    os.close(read_end)
    os.close(write_end)


def test_a_read_only_fd(memory: GuestMemory, dma: Dma, fd: int) -> None:
    reader = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    with pytest.raises(PermissionError):
        memory.map(0, 4096, RW, fd=reader)
    memory.map(0, 4096, Access.READ, fd=reader)
    os.close(reader)
    assert dma.read(0, 4) == bytes(4)
    assert fault(dma.write, 0, b"x").reason is Reason.PERMISSION


# ---- DMA ----------------------------------------------------------------------------------------


def test_bus_master_off_is_an_unsupported_request(memory: GuestMemory, fd: int) -> None:
    memory.map(0, SIZE, fd=fd)
    dma = Dma(memory)
    assert fault(dma.read, 0, 4).reason is Reason.BUS_MASTER_OFF
    dma.bus_master = True
    assert dma.read(0, 4) == bytes(4)
    dma.bus_master = False
    assert fault(dma.write, 0, b"x").reason is Reason.BUS_MASTER_OFF
    assert os.pread(fd, 1, 0) == b"\0"


def test_faults_say_where_and_how_much(memory: GuestMemory, dma: Dma, fd: int) -> None:
    memory.map(0x1000, 0x1000, fd=fd)
    memory.map(0x2000, 0x1000, Access.READ, fd=fd)
    seen = fault(dma.read, 0x2800, 0x1000)
    assert (seen.reason, seen.iova, seen.done, seen.access) == (Reason.NO_WINDOW, 0x3000, 0x800, Access.READ)
    seen = fault(dma.write, 0x1F00, bytes(0x200))
    assert (seen.reason, seen.iova, seen.done) == (Reason.PERMISSION, 0x2000, 0x100)
    assert fault(dma.read, 0, 1).reason is Reason.NO_WINDOW
    assert dma.stats.faults == 3


def test_write_only_windows_cannot_be_read(memory: GuestMemory, dma: Dma, fd: int) -> None:
    memory.map(0, 4096, Access.WRITE, fd=fd)
    dma.write(0, b"hi")
    assert fault(dma.read, 0, 2).reason is Reason.PERMISSION
    with pytest.raises(DmaFault), dma.view(0, 2, writable=True):
        pass


def test_unmapped_memory_is_out_of_reach_at_once(memory: GuestMemory, dma: Dma, fd: int) -> None:
    memory.map(0, 4096, fd=fd)
    dma.read(0, 1)  # now it is cached
    memory.unmap(0, 4096)
    assert fault(dma.read, 0, 1).reason is Reason.NO_WINDOW


def test_a_truncated_file_is_a_fault_and_no_crash(memory: GuestMemory, dma: Dma, fd: int) -> None:
    memory.map(0, SIZE, fd=fd)
    dma.write(SIZE // 2 - 2, b"abcd")
    os.ftruncate(fd, SIZE // 2)
    seen = fault(dma.read, SIZE // 2 - 4096, 8192)
    assert seen.reason is Reason.TRUNCATED
    assert fault(dma.write, SIZE - 4096, b"x" * 4096).reason is Reason.TRUNCATED
    assert fault(dma.fetch_add, SIZE - 8, 8, 1).reason is Reason.TRUNCATED
    assert dma.read(SIZE // 2 - 2, 2) == b"ab"


def test_a_view_survives_truncation_and_unmap(memory: GuestMemory, dma: Dma, fd: int) -> None:
    memory.map(0, SIZE, fd=fd)
    dma.write(8192, b"data")
    with dma.view(8192, 4) as view:
        assert bytes(view) == b"data"
        with pytest.raises(TypeError):
            view[0] = 1
        os.ftruncate(fd, 4096)
        assert bytes(view) == bytes(4)
        memory.unmap_all()
        assert memory.shim.files.mapped == 1
    assert memory.shim.files.mapped == 0


def test_atomics(memory: GuestMemory, dma: Dma, fd: int) -> None:
    memory.map(0, 4096, fd=fd)
    assert dma.fetch_add(8, 4, 5) == 0
    assert dma.fetch_add(8, 4, -1) == 5
    assert dma.swap(8, 4, 0xFFFF_FFFF) == 4
    assert dma.fetch_add(8, 4, 1) == 0xFFFF_FFFF
    assert dma.compare_swap(8, 8, 1, 9) == 0
    assert dma.compare_swap(8, 8, 0, 9) == 0
    assert dma.read(8, 8) == (9).to_bytes(8, "little")
    assert fault(dma.fetch_add, 6, 4, 1).reason is Reason.UNALIGNED
    with pytest.raises(OSError, match="3 bytes"):
        dma.fetch_add(0, 3, 1)


def test_gather_and_scatter(memory: GuestMemory, dma: Dma, fd: int) -> None:
    memory.map(0, SIZE, fd=fd)
    pieces = [(0x1FFE, 4), (0x9000, 1), (0, 3)]
    dma.scatter(pieces, b"abcdefgh")
    assert dma.gather(pieces) == b"abcdefgh"
    assert dma.read(0x1FFE, 4) == b"abcd"
    with pytest.raises(ValueError, match="differ in size"):
        dma.scatter(pieces, b"short")
    assert fault(dma.gather, [(0, 4), (SIZE, 4)]).done == 4


class Post:
    """A client's memory that only messages reach."""

    def __init__(self) -> None:
        self.bytes = bytearray(SIZE)
        self.calls: list[tuple[str, int, int]] = []

    def read(self, gpa: int, size: int) -> bytes:
        self.calls.append(("read", gpa, size))
        return bytes(self.bytes[gpa : gpa + size])

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        self.calls.append(("write", gpa, len(data)))
        self.bytes[gpa : gpa + len(data)] = data


def test_transfers_over_files_and_messages(memory: GuestMemory, dma: Dma, fd: int) -> None:
    memory.map(0, 0x1000, fd=fd)
    memory.map(0x1000, 0x1000)
    memory.map(0x2000, 0x1000, fd=fd, offset=0x2000)
    assert fault(dma.read, 0x1000, 4).reason is Reason.CLIENT  # nobody carries messages
    post = Post()
    dma.courier = post
    data = bytes(range(256)) * 32
    dma.write(0x800, data[:0x2000])
    assert post.calls == [("write", 0x1000, 0x1000)]
    assert dma.read(0x800, 0x2000) == data[:0x2000]
    buffer = bytearray(0x2000)
    dma.readinto(0x800, buffer)
    assert buffer == data[:0x2000]
    assert fault(dma.read, 0x1800, 0x2000).done == 0x1800
    assert fault(dma.fetch_add, 0x1000, 4, 1).reason is Reason.NO_FILE
    assert dma.gather([(0x27FF, 1), (0x1000, 2)]) == data[0x1FFF:0x2000] + data[0x800:0x802]


@settings(max_examples=examples(200), deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 15), st.integers(1, 4), st.booleans()), max_size=12),
    st.lists(st.tuples(st.integers(0, 0xFFFF), st.binary(min_size=1, max_size=9000)), max_size=8),
)
def test_windows_and_writes_agree_with_a_dict(
    maps: list[tuple[int, int, bool]], writes: list[tuple[int, bytes]]
) -> None:
    """Random windows and writes: the same bytes land, the same faults come, as in a dict of pages."""
    memory = GuestMemory(_shim.Files())
    dma = Dma(memory)
    dma.bus_master = True
    fd = os.memfd_create("property")
    try:
        os.ftruncate(fd, 32 * 4096)
        pages: dict[int, tuple[int, bool]] = {}  # GPA page -> (file page, writable)
        for n, (page, count, writable) in enumerate(maps):
            wanted = range(page, page + count)
            try:
                memory.map(page * 4096, count * 4096, RW if writable else Access.READ, fd, (n % 16) * 4096)
            except FileExistsError:
                assert any(p in pages for p in wanted)
            else:
                assert not any(p in pages for p in wanted)
                pages |= {p: (n % 16 + i, writable) for i, p in enumerate(wanted)}
        image = bytearray(32 * 4096)
        for iova, data in writes:
            done = 0
            while done < len(data) and pages.get((iova + done) // 4096, (0, False))[1]:
                at = iova + done
                image[pages[at // 4096][0] * 4096 + at % 4096] = data[done]
                done += 1
            try:
                dma.write(iova, data)
            except DmaFault as seen:
                assert (seen.done, seen.iova) == (done, iova + done)
            else:
                assert done == len(data)
        assert os.pread(fd, len(image), 0) == image
    finally:
        os.close(fd)


def test_two_devices_copy_while_a_third_thread_maps(fd: int) -> None:
    memory = GuestMemory(_shim.Files())
    memory.map(0, SIZE, fd=fd)

    def copy(dma: Dma) -> None:
        dma.write(0x1000, b"x" * 4096)
        try:
            dma.read(1 << 32, 0x20000)
        except DmaFault as seen:
            assert seen.reason is Reason.NO_WINDOW

    devices = [Dma(memory) for _ in range(2)]
    for dma in devices:
        dma.bus_master = True
    with meanwhile(*(functools.partial(copy, dma) for dma in devices)):
        for _ in range(500):
            memory.map(1 << 32, 0x20000, fd=fd)
            memory.unmap(1 << 32, 0x20000)
    assert memory.shim.files.mapped == 1


# ---- dirty log ----------------------------------------------------------------------------------


def bits(report: bytes) -> set[int]:
    value = int.from_bytes(report, "little")
    return {n for n in range(value.bit_length()) if value >> n & 1}


def test_dirty_log(memory: GuestMemory, dma: Dma, fd: int) -> None:
    memory.map(0, SIZE, fd=fd)
    whole = Span.sized(0, SIZE)
    dma.write(0, b"before")
    memory.dirty_start()
    dma.write(0x1FFF, b"ab")
    dma.read(0x5000, 4)
    dma.fetch_add(0x7000, 4, 1)
    with dma.view(0x9000, 1, writable=True):
        assert bits(memory.dirty_report(whole)) == {1, 2, 7, 9}
    assert bits(memory.dirty_report(whole)) == {9}  # the view may have written since
    assert bits(memory.dirty_report(whole)) == set()
    with pytest.raises(OSError) as caught:
        memory.dirty_start()
    assert caught.value.errno == errno.EBUSY
    memory.dirty_stop()
    for call in (memory.dirty_stop, lambda: memory.dirty_report(whole)):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL


def test_dirty_ranges_and_page_sizes(memory: GuestMemory, dma: Dma, fd: int) -> None:
    memory.map(0, SIZE, fd=fd)
    with pytest.raises(OSError):
        memory.dirty_start([Span(0, 0x1FFF), Span(0x1000, 0x2FFF)])
    memory.dirty_start([Span(0x2000, 0x3FFF), Span(0x10000, 0x1FFFF)])
    dma.write(0, bytes(0x20000))
    assert bits(memory.dirty_report(Span(0, 0xFFFFF))) == {2, 3, *range(16, 32)}
    dma.write(0x3000, b"x")
    assert bits(memory.dirty_report(Span(0, 0xFFFFF), 0x10000)) == {0}
    for span, page in ((Span(0, 0xFFF), 2048), (Span(0x1000, 0x1FFF), 0x2000), (Span(0, 0x17FF), 0x1000)):
        with pytest.raises(OSError):
            memory.dirty_report(span, page)


@settings(max_examples=examples(100), deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, 100000)), max_size=6),
    st.integers(0, 1000),
    st.integers(1, 24),
)
def test_dirty_report_agrees_with_a_set(writes: list[tuple[int, int]], first: int, count: int) -> None:
    memory = GuestMemory(_shim.Files())
    dma = Dma(memory)
    dma.bus_master = True
    fd = os.memfd_create("property")
    try:
        os.ftruncate(fd, SIZE)
        base = (1 << 27) - SIZE // 2 // 4096 * 4096  # straddles two chunks of the log
        memory.map(base, SIZE, fd=fd)
        memory.dirty_start()
        dirty = set()
        for offset, size in writes:
            size = min(size, SIZE - offset)
            dma.write(base + offset, bytes(size))
            dirty |= set(range((base + offset) // 4096, (base + offset + size - 1) // 4096 + 1))
        start = base // 4096 + first
        report = memory.dirty_report(Span.sized(start * 4096, count * 4096))
        assert bits(report) == {page - start for page in dirty if start <= page < start + count}
        rest = bits(memory.dirty_report(Span.sized(base, SIZE)))
        assert rest == {p - base // 4096 for p in dirty if not start <= p < start + count}
    finally:
        os.close(fd)
