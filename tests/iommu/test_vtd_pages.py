"""Page requests through the VT-d unit: the queue, its event, responses, and what a device does with them."""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from tests.iommu.ats import ATS_CONTROL, DTE, MODEL, edu, switch
from tests.iommu.vtd_bench import (
    DATA,
    FSTS,
    GCMD,
    IQA,
    IQE,
    IQER,
    IQT,
    OUTSIDE,
    PASIDE,
    PEADDR,
    PECTL,
    PEDATA,
    PQA,
    PQH,
    PQT,
    PRESENT,
    PRS,
    QIE,
    QUEUE,
    RAM,
    ROOT,
    RTADDR,
    SCALABLE,
    SRTP,
    TABLES,
    TE,
    WIDE,
    ScalableBench,
)
from tests.waiting import until
from vmodel.devices.vtd import pages
from vmodel.devices.vtd.codes import FaultCode
from vmodel.devices.vtd.unit import VtdDevice
from vmodel.errors import DmaFault, Reason
from vmodel.iommu.fault import PageResponse
from vmodel.machine import parse
from vmodel.pci.extcaps import PriSta
from vmodel.span import MiB
from vmodel.vfio_user.client import Client
from vmodel.vfio_user.wire import Region

PRE, PPR, PRO = 16, 1, 2
REQUESTS = 0xA000  # the queue, one page: 128 requests
#: Of config space.
PRI_CONTROL, PRI_STATUS = 0x114, 0x116
MESSAGE = (0xFEE0_1000, (0x77).to_bytes(4, "little"))


class PageBench(ScalableBench):
    """edu0 asks for pages, with PASID 1 and without; accesses go on in threads of their own."""

    def __init__(self) -> None:
        super().__init__(params="ats = true", model=MODEL)
        self.device("edu0", PRESENT | PASIDE | DTE | PRE)
        self.roots = {pasid: self.first("edu0", pasid) for pasid in (0, 1)}
        self.put(PQA, REQUESTS, 8)
        self.put(PEDATA, 0x77)
        self.put(PEADDR, 0xFEE0_1000)
        self.put(PECTL, 0)
        self.on()
        switch(self, True)
        edu(self).config.write(PRI_CONTROL, b"\1\0")
        assert edu(self).pri.enabled

    def start(self, iova: int, pasid: int = 0, write: bool = False) -> Future[bytes]:
        dma = edu(self).dma if not pasid else edu(self).dma.with_pasid(pasid)
        done: Future[bytes] = Future()

        def run() -> None:
            try:
                if write:
                    dma.write(iova, b"w")
                done.set_result(b"" if write else dma.read(iova, 4))
            except DmaFault as fault:
                done.set_exception(fault)

        threading.Thread(target=run).start()
        return done

    def until(self, what: Callable[[], object]) -> None:
        """Runs the units' and devices' threads, so to speak, until something is so."""

        def run() -> bool:
            self.run()
            return bool(what())

        until(run, "what the units' and devices' threads are to do")

    def request(self, n: int = 0) -> tuple[int, int]:
        """Waits for a request to be in the queue; its words."""
        self.until(lambda: self.get(PQT, 8) > 32 * n)
        first, second, *rest = struct.unpack_from("<4Q", self.ram, REQUESTS + 32 * n)
        assert rest == [0, 0]
        return first, second

    def respond(self, n: int, response: int) -> None:
        first, second = self.request(n)
        pasid = (first >> 32 & 0xFFFFF) << 32 | (first >> 8 & 1) << 4
        self.queue((9 | pasid | response << 12 | first & 0xFFFF_0000, second & 0xFFC))

    def result(self, done: Future[bytes]) -> bytes:
        self.until(done.done)
        return done.result()


@pytest.fixture
def pri() -> Iterator[PageBench]:
    made = PageBench()
    yield made
    made.close()


@pytest.mark.parametrize("pasid", [0, 1])
@pytest.mark.parametrize("write", [False, True])
def test_a_page_that_comes(pri: PageBench, pasid: int, write: bool) -> None:
    """The access waits, and goes on when it is there; the message is sent by the device that waits."""
    pri.ram[DATA + 8 : DATA + 12] = b"page"
    done = pri.start(0x5008, pasid, write)
    first, second = pri.request()
    assert first == 1 | (pasid and 1 << 8) | 0x18 << 16 | pasid << 32
    assert second & 7 == 4 | (2 if write else 1) and second >> 12 == 5
    pri.until(lambda: pri.lines["edu0"].sent)
    assert pri.lines["edu0"].sent == [MESSAGE] and not pri.lines["edu1"].sent
    assert pri.get(PRS) == PPR and not done.done()
    pri.map_first(pri.roots[pasid], 0x5000, DATA)
    pri.respond(0, PageResponse.SUCCESS)
    assert pri.result(done) == (b"" if write else b"page")
    assert pri.get(FSTS) == 0 and edu(pri).dma.stats.faults == 0
    if write:
        assert pri.ram[DATA + 8 : DATA + 9] == b"w"


def test_requests_of_two_accesses(pri: PageBench) -> None:
    """One event for both until PPR is cleared; answers find theirs, in any order."""
    one = pri.start(0x5000)
    pri.request(0)
    two = pri.start(0x6000, 1)
    pri.request(1)
    assert pri.lines["edu0"].sent == [MESSAGE]
    pri.map_first(pri.roots[1], 0x6000, DATA)
    pri.respond(1, PageResponse.SUCCESS)
    assert pri.result(two) == bytes(4) and not one.done()
    pri.put(PQH, 64, 8)
    pri.put(PRS, PPR)
    assert pri.get(PRS) == 0
    three = pri.start(0x7000)
    pri.request(2)
    pri.until(lambda: len(pri.lines["edu0"].sent) == 2)
    for n in (0, 2):
        pri.respond(n, PageResponse.INVALID)
    for done in (one, three):
        with pytest.raises(DmaFault):
            pri.result(done)


def test_an_event_behind_the_mask(pri: PageBench) -> None:
    pri.put(PECTL, 1 << 31)
    done = pri.start(0x5000)
    pri.request()
    assert pri.get(PECTL) == 3 << 30 and not pri.lines["edu0"].sent
    pri.put(PECTL, 0)
    pri.until(lambda: sum(len(line.sent) for line in pri.lines.values()) == 1)
    pri.respond(0, PageResponse.INVALID)
    with pytest.raises(DmaFault):
        pri.result(done)


def test_a_page_that_does_not_come(pri: PageBench) -> None:
    for n in range(2):  # the device may ask again
        done = pri.start(0x5000)
        pri.respond(n, PageResponse.INVALID)
        with pytest.raises(DmaFault) as caught:
            pri.result(done)
        assert caught.value.reason is Reason.NOT_MAPPED
        pri.run()
        assert pri.record(n) == (0x5000, FaultCode.FIRST_NOT_PRESENT, 0x18, True)


@pytest.mark.parametrize("response", [15, 7])
def test_failure(pri: PageBench, response: int) -> None:
    """The device sends no requests until they are enabled again (PCIe 10.4.1)."""
    done = pri.start(0x5000)
    pri.respond(0, response)
    with pytest.raises(DmaFault):
        pri.result(done)
    assert PriSta(edu(pri).pri.regs.STATUS).RESPONSE_FAILURE
    with pytest.raises(DmaFault):
        pri.result(pri.start(0x5000))
    assert pri.get(PQT, 8) == 32
    edu(pri).config.write(PRI_STATUS, b"\1\0")
    assert not PriSta(edu(pri).pri.regs.STATUS).RESPONSE_FAILURE
    done = pri.start(0x5000)
    pri.request(1)
    pri.map_first(pri.roots[0], 0x5000, DATA)
    pri.respond(1, PageResponse.SUCCESS)
    assert pri.result(done) == bytes(4)


def test_success_without_a_page(pri: PageBench) -> None:
    """The number of a device's page requests is bounded."""
    done = pri.start(0x5000)
    for n in range(8):
        if done.done():
            break
        pri.respond(n, PageResponse.SUCCESS)
        pri.until(lambda n=n: done.done() or pri.get(PQT, 8) > 32 * (n + 1))  # type: ignore[misc]
    with pytest.raises(DmaFault):
        pri.result(done)
    assert 1 < pri.get(PQT, 8) // 32 <= 8


def test_the_queue_is_full(pri: PageBench) -> None:
    """The device gets a retry response, and gives up; nothing comes until PRO is cleared."""
    pri.put(PQT, 0xFE0, 8)
    done = pri.start(0x5000)
    with pytest.raises(DmaFault):
        pri.result(done)
    assert pri.get(PRS) == PRO and pri.get(PQT, 8) == 0xFE0 and pri.lines["edu0"].sent == [MESSAGE]
    pri.put(PQH, 0x20, 8)
    with pytest.raises(DmaFault):
        pri.result(pri.start(0x5000))
    assert pri.get(PQT, 8) == 0xFE0
    pri.put(PRS, PRO)
    done = pri.start(0x5000)
    pri.until(lambda: pri.get(PQT, 8) == 0)  # it wraps
    words = struct.unpack_from("<2Q", pri.ram, REQUESTS + 0xFE0)
    pri.queue((9 | PageResponse.INVALID << 12 | words[0] & 0xFFFF_0000, words[1] & 0xFFC))
    with pytest.raises(DmaFault):
        pri.result(done)


def test_the_queue_is_nowhere(pri: PageBench) -> None:
    pri.put(PQA, OUTSIDE, 8)
    with pytest.raises(DmaFault):
        pri.result(pri.start(0x5000))
    assert pri.get(PRS) == 0 and pri.get(PQT, 8) == 0


def test_the_queue_passes_the_last_address(pri: PageBench) -> None:
    pri.put(PQA, (1 << 64) - 4096 | 7, 8)
    pri.put(PQT, 4096, 8)
    done = pri.start(0x5000)
    until(lambda: pri.run_unit() or pri.get(PQT, 8) == 4096 + 32, "the request")
    assert pri.ram[0] == 1  # a page request descriptor
    pri.respond(0, PageResponse.INVALID)
    with pytest.raises(DmaFault):
        pri.result(done)


def test_no_answer(pri: PageBench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(pages, "PATIENCE", 0.05)
    done = pri.start(0x5000)
    with pytest.raises(DmaFault):
        pri.result(done)
    assert "does not answer a page request" in caplog.text
    pri.respond(0, PageResponse.SUCCESS)  # too late
    assert pri.get(FSTS) & ~0xFF00 == 2  # the fault alone


def test_reset_while_an_access_waits(pri: PageBench) -> None:
    done = pri.start(0x5000)
    pri.request()
    pri.unit.backend.reset_device()
    with pytest.raises(DmaFault):
        pri.result(done)
    assert pri.result(pri.start(0x5000)) == bytes(4)  # translation is off


@pytest.mark.parametrize("what", ["PRE", "PRI", "ATS"])
def test_who_may_not_ask(what: str) -> None:
    bench = PageBench()
    if what == "PRE":
        bench.device("edu0", PRESENT | PASIDE | DTE)
        bench.first("edu0")
    elif what == "PRI":
        edu(bench).config.write(PRI_CONTROL, b"\0\0")
    else:
        switch(bench, False)
    with pytest.raises(DmaFault):
        bench.result(bench.start(0x5000))
    bench.run()
    wanted = FaultCode.NO_PAGE_REQUESTS if what == "PRE" else FaultCode.FIRST_NOT_PRESENT
    assert bench.record() == (0x5000, wanted, 0x18, True)
    assert bench.get(PQT, 8) == 0 and bench.get(PRS) == 0
    bench.close()


@pytest.mark.parametrize("words", [(9 | 1 << 5,), (9, 1), (9, 1 << 12), (9, 0, 1)])
def test_responses_that_are_wrong(pri: PageBench, words: tuple[int, ...]) -> None:
    pri.queue(words)
    assert pri.get(FSTS) == IQE and pri.get(IQER, 8) == 4


def test_draining(pri: PageBench) -> None:
    """What is asked for is in the queue by then."""
    pri.queue((5 | 1 << 7 | 1 << 6 | 1 << 5 | 1 << 32, 0x8000), (9 | 0x18 << 16, 3 << 3))
    assert pri.get(FSTS) == 0 and pri.ram[0x8000] == 1


# ---- served ------------------------------------------------------------------------------------------


def test_the_guest_reaches_a_device_that_waits(tmp_path: Path) -> None:
    """Two sockets: edu's registers answer while its DMA waits, and the unit takes the response."""
    bench = ScalableBench(params="ats = true", model=MODEL)  # lays the tables out
    bench.device("edu0", PRESENT | PASIDE | DTE | PRE)
    root = bench.first("edu0")
    machine = parse(bench.text, Path("m.toml"))
    with (
        machine.serve(tmp_path),
        Client.connect(tmp_path / "vtd0.sock") as unit,
        Client.connect(tmp_path / "edu0.sock") as device,
    ):

        def put(client: Client, at: int, value: int, size: int = 8) -> None:
            client.region_write(0, at, value.to_bytes(size, "little"))

        def get(client: Client, at: int, size: int = 8) -> int:
            return int.from_bytes(client.region_read(0, at, size), "little")

        rams = []
        for client in (unit, device):
            client.negotiate()
            fd = os.memfd_create("ram") if not rams else os.dup(rams[0])
            rams.append(fd)
            os.ftruncate(fd, RAM)
            client.map_dma(0, RAM, fd=fd)
        ram = mmap.mmap(rams[0], RAM)
        ram[:] = bench.ram[:]
        messages = device.share(OUTSIDE, 0x1000, by_fd=False)  # where the event goes, like an MSI by a write
        unit.region_write(Region.CONFIG, 0x10, VtdDevice.base.to_bytes(4, "little"))
        unit.region_write(Region.CONFIG, 4, b"\x02\0")
        device.region_write(Region.CONFIG, 4, b"\x06\0")
        for at, value, size in (
            (RTADDR, ROOT | SCALABLE, 8),
            (GCMD, SRTP, 4),
            (PQA, REQUESTS, 8),
            (PEADDR, OUTSIDE, 4),
            (PEDATA, 0x77, 4),
            (PECTL, 0, 4),
            (IQA, QUEUE | WIDE, 8),
            (GCMD, TE | QIE, 4),
        ):
            put(unit, at, value, size)
        device.region_write(Region.CONFIG, ATS_CONTROL, b"\0\x80")
        device.region_write(Region.CONFIG, PRI_CONTROL, b"\1\0")
        for at, value in ((0x80, 0x5000), (0x88, 0x40000), (0x90, 4), (0x98, 1)):
            put(device, at, value)
        until(lambda: get(unit, PQT), "a page request")
        assert get(device, 0, 4) == 0x010000ED and get(device, 0x98) & 1
        until(lambda: device.serve(0.01) or messages.view[0] == 0x77, "the message, from the device that waits")
        bench.map_first(root, 0x5000, DATA)
        ram[TABLES : TABLES + MiB] = bench.ram[TABLES : TABLES + MiB]
        words = struct.unpack_from("<2Q", ram, REQUESTS)
        struct.pack_into("<2Q", ram, QUEUE, 9 | words[0] & 0xFFFF_0000, words[1] & 0xFFC)
        put(unit, IQT, 32)
        until(lambda: not get(device, 0x98) & 1, "the end of the transfer")
        assert machine.devices["edu0"].errors == machine.devices["vtd0"].errors == 0
        assert machine.devices["edu0"].dma.stats.read_bytes == 4
        ram.close()
    for fd in rams:
        os.close(fd)
    machine.close()
    bench.close()
