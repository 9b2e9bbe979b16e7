"""PRPs and SGLs of every legal and illegal shape, against what they were built from."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmodel.devices.nvme.command import NvmeCommand
from vmodel.devices.nvme.pointers import MAX_DESCRIPTORS, Transfer
from vmodel.devices.nvme.status import CommandError, NvmeStatus
from vmodel.dma import Dma
from vmodel.errors import DmaFault
from vmodel.memory import GuestMemory

SIZE = 16 << 20
NOWHERE = 1 << 40


@pytest.fixture(scope="module")
def dma() -> Iterator[Dma]:
    memory = GuestMemory()
    fd = os.memfd_create("guest")
    os.ftruncate(fd, SIZE)
    memory.map(0, SIZE, fd=fd)
    os.close(fd)
    dma = Dma(memory)
    dma.bus_master = True
    yield dma
    memory.close()


def bytes_of(pieces: list[tuple[int | None, int]]) -> list[int | None]:
    """The address of each byte, None in a bit bucket."""
    return [None if at is None else at + n for at, size in pieces for n in range(size)]


# ---- PRP ----------------------------------------------------------------------------------------------


@dataclass
class Prp:
    """A buffer's pages, and where its lists are."""

    page: int
    offset: int
    size: int
    pages: list[int]
    list_offset: int
    lists: list[int]
    writes: list[tuple[int, bytes]] = field(default_factory=list)

    def build(self) -> tuple[int, int]:
        """PRP Entry 1 and 2; fills `writes` with the lists."""
        rest = self.pages[1:]
        prp1 = self.pages[0] + self.offset
        if len(rest) < 2:
            return prp1, rest[0] if rest else 0
        prp2 = at = self.lists[0] + self.list_offset
        lists = iter(self.lists[1:])
        while rest:
            room = (self.page - at % self.page) // 8
            if len(rest) <= room:
                self.writes.append((at, struct.pack(f"<{len(rest)}Q", *rest)))
                break
            following = next(lists)
            entries = [*rest[: room - 1], following]
            self.writes.append((at, struct.pack(f"<{room}Q", *entries)))
            rest, at = rest[room - 1 :], following
        return prp1, prp2

    def expected(self) -> list[int | None]:
        """The address of each byte."""
        places = [page + n for page in self.pages for n in range(self.page)]
        return list(places[self.offset : self.offset + self.size])


@st.composite
def prps(draw: st.DrawFn, *, pages: int = 12) -> Prp:
    page = draw(st.sampled_from([4096, 8192]))
    offset = draw(st.one_of(st.just(0), st.integers(0, page // 4 - 1).map(lambda n: 4 * n)))
    size = draw(st.integers(1, pages * page - offset))
    count = -(-(offset + size) // page)
    numbers = draw(st.lists(st.integers(0, 511), min_size=count, max_size=count))
    # Lists begin anywhere in their page: close to its end they need another one.
    list_offset = page - 8 * draw(st.one_of(st.integers(1, 6), st.integers(1, page // 8)))
    lists = [(8 << 20) + n * 8192 for n in range(count + 2)]
    return Prp(page, offset, size, [n * page % (4 << 20) for n in numbers], list_offset, lists)


def transfer(dma: Dma, prp1: int, prp2: int, page: int, size: int) -> Transfer:
    return Transfer(dma, NvmeCommand.make(2, dptr=struct.pack("<QQ", prp1, prp2)), page, size, to_host=True)


@given(prps())
def test_every_list_that_is_right(dma: Dma, shape: Prp) -> None:
    prp1, prp2 = shape.build()
    for at, data in shape.writes:
        dma.write(at, data)
    pieces = transfer(dma, prp1, prp2, shape.page, shape.size).pieces
    assert bytes_of(pieces) == shape.expected()


@given(prps(), st.data())
def test_every_list_that_is_wrong(dma: Dma, shape: Prp, data: st.DataObject) -> None:
    prp1, prp2 = shape.build()
    for at, raw in shape.writes:
        dma.write(at, raw)
    kinds = ["first"]
    if len(shape.pages) == 2:
        kinds += ["second"]
    if shape.writes:
        kinds += ["list", "entry", "gone"]
    kind = data.draw(st.sampled_from(kinds))
    if kind == "first":
        prp1 |= data.draw(st.integers(1, 3))
    elif kind == "second":
        prp2 += data.draw(st.integers(1, shape.page - 1))
    elif kind == "list":
        prp2 |= data.draw(st.integers(1, 7))
    elif kind == "entry":
        at, raw = data.draw(st.sampled_from(shape.writes))
        n = data.draw(st.integers(0, len(raw) // 8 - 1))
        (entry,) = struct.unpack_from("<Q", raw, 8 * n)
        dma.write(at + 8 * n, struct.pack("<Q", entry + data.draw(st.integers(1, shape.page - 1))))
    else:
        prp2 = NOWHERE
    if kind == "gone":
        with pytest.raises(DmaFault):
            transfer(dma, prp1, prp2, shape.page, shape.size)
        return
    with pytest.raises(CommandError) as raised:
        transfer(dma, prp1, prp2, shape.page, shape.size)
    assert raised.value.status is NvmeStatus.PRP_OFFSET_INVALID


def test_a_list_that_leads_to_itself_ends(dma: Dma) -> None:
    at = 8 << 20
    dma.write(at, struct.pack("<512Q", *[at] * 512))
    pieces = transfer(dma, 0, at, 4096, 1024 * 4096).pieces
    assert sum(size for _, size in pieces) == 1024 * 4096


# ---- SGL ----------------------------------------------------------------------------------------------

BLOCK, BUCKET, SEGMENT, LAST = 0x00, 0x10, 0x20, 0x30


def descriptor(address: int, length: int, identifier: int) -> bytes:
    return struct.pack("<QI3xB", address, length, identifier)


@dataclass
class Sgl:
    """Segments of (address or None for a bit bucket, length)."""

    segments: list[list[tuple[int | None, int]]]
    places: list[int]

    def build(self, dma: Dma) -> bytes:
        """Writes the segments; the first descriptor."""
        if len(self.segments) == 1 and len(self.segments[0]) == 1:
            return self._data(*self.segments[0][0])
        following = b""
        for segment, at in reversed(list(zip(self.segments, self.places, strict=True))):
            raw = b"".join(self._data(*part) for part in segment) + following
            dma.write(at, raw)
            following = descriptor(at, len(raw), SEGMENT if following else LAST)
        return following

    @staticmethod
    def _data(at: int | None, length: int) -> bytes:
        return descriptor(0, length, BUCKET) if at is None else descriptor(at, length, BLOCK)

    def expected(self, *, to_host: bool) -> list[int | None]:
        parts = [part for segment in self.segments for part in segment]
        return bytes_of([part for part in parts if to_host or part[0] is not None])


@st.composite
def sgls(draw: st.DrawFn) -> Sgl:
    part = st.tuples(st.one_of(st.none(), st.integers(0, 4 << 20)), st.integers(0, 3000))
    segments = draw(st.lists(st.lists(part, min_size=1, max_size=5), min_size=1, max_size=4))
    return Sgl(segments, [(8 << 20) + 4096 * n for n in range(len(segments))])


def sgl_transfer(dma: Dma, first: bytes, size: int, *, to_host: bool) -> Transfer:
    return Transfer(dma, NvmeCommand.make(2, flags=1 << 6, dptr=first), 4096, size, to_host=to_host)


@given(sgls(), st.booleans())
def test_every_sgl_that_is_right(dma: Dma, shape: Sgl, to_host: bool) -> None:
    expected = shape.expected(to_host=to_host)
    pieces = sgl_transfer(dma, shape.build(dma), len(expected), to_host=to_host).pieces
    assert bytes_of(pieces) == expected


@given(sgls(), st.booleans(), st.integers(-3000, 3000))
def test_a_length_that_does_not_match(dma: Dma, shape: Sgl, to_host: bool, change: int) -> None:
    size = len(shape.expected(to_host=to_host))
    first = shape.build(dma)
    if not change or size + change < 0:
        return
    with pytest.raises(CommandError) as raised:
        sgl_transfer(dma, first, size + change, to_host=to_host)
    assert raised.value.status is NvmeStatus.DATA_SGL_LENGTH_INVALID


AT = 8 << 20


@pytest.mark.parametrize("identifier", [0x01, 0x0F, 0x31, 0x40, 0x4F, 0x50, 0xF0])
def test_other_types_and_subtypes(dma: Dma, identifier: int) -> None:
    dma.write(AT, descriptor(0, 4096, identifier))
    for first in (descriptor(0, 4096, identifier), descriptor(AT, 16, LAST)):
        with pytest.raises(CommandError) as raised:
            sgl_transfer(dma, first, 4096, to_host=True)
        assert raised.value.status is NvmeStatus.SGL_TYPE_INVALID


@pytest.mark.parametrize("kind", [SEGMENT, LAST])
@pytest.mark.parametrize("length", [0, 15, 17, 40])
def test_segments_of_wrong_lengths(dma: Dma, kind: int, length: int) -> None:
    with pytest.raises(CommandError) as raised:
        sgl_transfer(dma, descriptor(AT, length, kind), 4096, to_host=True)
    assert raised.value.status is NvmeStatus.INVALID_SGL_SEGMENT


@pytest.mark.parametrize("kind", [SEGMENT, LAST])
def test_a_segment_behind_the_last_one(dma: Dma, kind: int) -> None:
    dma.write(AT, descriptor(AT, 16, kind))
    with pytest.raises(CommandError) as raised:
        sgl_transfer(dma, descriptor(AT, 16, LAST), 4096, to_host=True)
    assert raised.value.status is NvmeStatus.INVALID_SGL_SEGMENT


@pytest.mark.parametrize("kind", [SEGMENT, LAST])
def test_a_segment_that_is_not_the_last_descriptor(dma: Dma, kind: int) -> None:
    dma.write(AT, descriptor(AT + 64, 16, kind) + descriptor(0, 4096, BLOCK))
    with pytest.raises(CommandError) as raised:
        sgl_transfer(dma, descriptor(AT, 32, SEGMENT), 4096, to_host=True)
    assert raised.value.status is NvmeStatus.INVALID_SGL_COUNT


def test_a_segment_that_leads_to_itself_ends(dma: Dma) -> None:
    dma.write(AT, descriptor(0, 0, BLOCK) + descriptor(AT, 32, SEGMENT))
    with pytest.raises(CommandError) as raised:
        sgl_transfer(dma, descriptor(AT, 32, SEGMENT), 4096, to_host=True)
    assert raised.value.status is NvmeStatus.INVALID_SGL_COUNT


def test_more_descriptors_than_there_may_be(dma: Dma) -> None:
    dma.write(AT, bytes(16 * MAX_DESCRIPTORS))
    with pytest.raises(CommandError) as raised:
        sgl_transfer(dma, descriptor(AT, (MAX_DESCRIPTORS + 1) * 16, LAST), 4096, to_host=True)
    assert raised.value.status is NvmeStatus.INVALID_SGL_COUNT


def test_a_segment_that_is_not_there(dma: Dma) -> None:
    with pytest.raises(DmaFault):
        sgl_transfer(dma, descriptor(NOWHERE, 32, LAST), 4096, to_host=True)


def test_what_is_reserved(dma: Dma) -> None:
    for flags, sgl in ((3 << 6, True), (1 << 6, False), (2 << 6, False)):
        with pytest.raises(CommandError) as raised:
            Transfer(dma, NvmeCommand.make(2, flags=flags, dptr=bytes(16)), 4096, 512, to_host=True, sgl=sgl)
        assert raised.value.status is NvmeStatus.INVALID_FIELD


@given(sgls())
def test_data_goes_where_it_should(dma: Dma, shape: Sgl) -> None:
    expected = shape.expected(to_host=True)
    dma.write(0, b"\xee" * (5 << 20))
    first = shape.build(dma)
    data = bytes(n * 7 & 0xFF for n in range(len(expected)))
    sgl_transfer(dma, first, len(data), to_host=True).to_guest(data)
    want = bytearray(b"\xee" * (5 << 20))
    for at, byte in zip(expected, data, strict=True):
        if at is not None:
            want[at] = byte
    assert dma.read(0, 5 << 20) == want
