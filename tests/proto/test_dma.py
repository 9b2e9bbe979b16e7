"""DMA_MAP, DMA_UNMAP, and what the device then reaches: by fd, by message, on the twin socket."""

from __future__ import annotations

import errno
import os
import struct
import threading
from dataclasses import replace

import pytest

from tests.proto.conftest import Served, enable
from tests.proto.toy import Toy
from tests.waiting import until
from vmodel.errors import DmaFault, Reason
from vmodel.patience import patience
from vmodel.server import Connection
from vmodel.vfio_user import wire
from vmodel.vfio_user.client import Client
from vmodel.vfio_user.wire import Command, Region


def copy(client: Client, source: int, target: int, count: int, *, posted: bool = False) -> None:
    client.region_write(0, 0x08, source.to_bytes(8, "little"))
    client.region_write(0, 0x10, target.to_bytes(8, "little"))
    client.region_write(0, 0x18, count.to_bytes(4, "little"), posted=posted)


def reason(toy: Toy) -> Reason:
    assert isinstance(toy.last_error, DmaFault)
    return toy.last_error.reason


def test_by_fd(driver: Client, toy: Toy) -> None:
    low, high = driver.share(0, 0x10000), driver.share(1 << 32, 0x10000)
    low.view[0x100:0x105] = b"hello"
    copy(driver, 0x100, (1 << 32) + 0x8000, 5)
    assert bytes(high.view[0x8000:0x8005]) == b"hello"
    assert driver.dma_log == []


def test_bus_master_off(client: Client, toy: Toy) -> None:
    client.share(0, 0x10000)
    client.region_write(Region.CONFIG, 4, b"\x02\x00")
    copy(client, 0, 0x1000, 4)
    assert reason(toy) is Reason.BUS_MASTER_OFF


@pytest.mark.parametrize("posted", [False, True])
@pytest.mark.parametrize("twin", [False, True])
def test_by_message(served: Served, toy: Toy, twin: bool, posted: bool) -> None:
    with served.connect() as client:
        client.negotiate(twin_socket=twin, max_data_xfer_size=1000)
        enable(client)
        ram = client.share(0x4000, 0x4000, by_fd=False)
        ram.view[:0x1000] = bytes(range(256)) * 16
        copy(client, 0x4000, 0x5000, 0x1000, posted=posted)
        until(lambda: client.info() and toy.regs.COPY_COUNT, "the copy by the device")
        assert bytes(ram.view[0x1000:0x2000]) == bytes(ram.view[:0x1000])
        assert {command for command, _, _ in client.dma_log} == {Command.DMA_READ, Command.DMA_WRITE}
        assert max(count for _, _, count in client.dma_log) == 1000
        assert toy.dma.stats.write_bytes == 0x1000


def test_a_read_hook_cannot_wait_for_a_message(driver: Client, toy: Toy) -> None:
    driver.share(0, 0x4000, by_fd=False)
    assert driver.region_read(0, 0x2C, 4) == b"\xff" * 4
    assert reason(toy) is Reason.WOULD_DEADLOCK
    driver.share(0x10000, 0x1000)
    driver.region_write(0, 0x08, (0x10000).to_bytes(8, "little"))
    assert driver.region_read(0, 0x2C, 4) == bytes(4)


def test_requests_are_served_while_a_message_is_awaited(driver: Client, toy: Toy) -> None:
    """The lock rule: the client asks for registers before it answers the DMA message."""
    driver.map_dma(0, 0x4000)
    ids = []
    driver.region_write(0, 0x10, (0x1000).to_bytes(8, "little"))
    payload = wire.RegionAccess.build({"offset": 0x18, "region": 0, "count": 4, "data": b"\4\0\0\0"})
    driver.post(Command.REGION_WRITE, payload)
    for offset in (0, 4):
        request = wire.RegionAccess.build({"offset": offset, "region": 0, "count": 4, "data": b""})
        data = driver.message(Command.REGION_READ, request)
        ids.append(wire.Header.parse(data).id)
        driver.main.send(data)
    import time

    deadline = time.monotonic() + patience(5)
    asked = driver.main.receive(deadline)
    assert asked.command == Command.DMA_READ
    values = [driver.main.receive(deadline).payload[16:] for _ in ids]
    assert values == [b"\x11" * 4, b"\xdd" * 4]
    driver._answer(driver.main, asked)  # no such memory: an error reply
    driver.info()
    assert reason(toy) is Reason.CLIENT


@pytest.mark.parametrize("bad", [b"", b"\0" * 15, b"\0" * 16, b"\xff" * 20])
def test_broken_answers_to_messages(driver: Client, toy: Toy, bad: bytes) -> None:
    driver.map_dma(0, 0x4000)
    payload = wire.RegionAccess.build({"offset": 0x18, "region": 0, "count": 4, "data": b"\4\0\0\0"})
    driver.post(Command.REGION_WRITE, payload)
    import time

    asked = driver.main.receive(time.monotonic() + patience(5))
    head = {"id": asked.id, "command": asked.command, "size": 16 + len(bad), "flags": 1, "error": 0}
    driver.main.send(wire.Header.build({**head, "id": asked.id ^ 1}) + bad)  # an answer to nothing
    driver.main.send(wire.Header.build(head) + bad)
    driver.info()
    assert reason(toy) is Reason.CLIENT


def test_the_client_leaves_instead_of_answering(served: Served, toy: Toy) -> None:
    with served.connect() as client:
        client.negotiate()
        enable(client)
        client.map_dma(0, 0x4000)
        payload = wire.RegionAccess.build({"offset": 0x18, "region": 0, "count": 4, "data": b"\4\0\0\0"})
        client.post(Command.REGION_WRITE, payload)
    with served.connect() as client:
        client.negotiate()
        assert reason(toy) is Reason.CLIENT
        client.share(0, 0x4000)
        copy(client, 0, 0x1000, 16)


def test_dma_from_another_thread(driver: Client, toy: Toy) -> None:
    ram = driver.share(0, 0x4000, by_fd=False)
    ram.view[:4] = b"abcd"
    seen: list[bytes] = []
    thread = threading.Thread(target=lambda: seen.append(toy.dma.read(0, 4)))
    thread.start()

    def ended() -> bool:
        driver.serve(0.05)
        return not thread.is_alive()

    until(ended, "the end of the thread that reads by DMA")
    assert seen == [b"abcd"]


def test_dma_from_another_thread_that_is_given_up(driver: Client, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device's thread has not begun it in time, it fails, and does not happen later."""
    driver.share(0, 0x4000, by_fd=False)
    courier = toy.dma.courier
    assert isinstance(courier, Connection)
    monkeypatch.setattr(courier, "limits", replace(courier.limits, message_timeout=0.1))
    busy, free = threading.Event(), threading.Event()
    toy.post(lambda: busy.set() or free.wait(60))
    assert busy.wait(60)
    with pytest.raises(DmaFault) as caught:
        toy.dma.write(0, b"late")
    free.set()
    driver.info()
    assert caught.value.reason is Reason.CLIENT and driver.dma_log == []


def test_overlap_and_unmap(client: Client, toy: Toy) -> None:
    client.share(0x10000, 0x10000)
    for address, size in ((0x10000, 0x10000), (0x1F000, 0x1000), (0, 0x11000), (0, 0x100000)):
        with pytest.raises(FileExistsError):
            client.map_dma(address, size)
    for address, size in ((0x10000, 0x1000), (0x11000, 0x1000), (0x8000, 0x10000)):
        with pytest.raises(OSError) as caught:
            client.unmap_dma(address, size)
        assert caught.value.errno == errno.EINVAL
    client.unmap_dma(0, 0x10000)  # never mapped
    client.unmap_dma(0, 1 << 40)
    assert toy.memory.windows() == []
    client.map_dma(0, 4096)
    client.map_dma(8192, 4096)
    client.unmap_dma(0, 0, everything=True)
    assert len(toy.memory) == 0


def test_unmap_replies_with_the_request(client: Client) -> None:
    request = wire.DmaUnmap.build({"argsz": 24, "flags": 0, "address": 0x5000, "size": 0x1000})
    assert client.request(Command.DMA_UNMAP, request).payload == request


@pytest.mark.slow
def test_too_many_windows(client: Client, toy: Toy) -> None:
    payloads = [struct.pack("<IIQQQ", 32, 3, 0, n * 8192, 4096) for n in range(65536)]
    for payload in payloads[:-1]:
        client.post(Command.DMA_MAP, payload)
    with pytest.raises(OSError) as caught:
        client.request(Command.DMA_MAP, payloads[-1])
    assert caught.value.errno == errno.ENOSPC
    assert len(toy.memory) == 65535


def test_the_file_shrinks(driver: Client, toy: Toy) -> None:
    ram = driver.share(0, 0x10000)
    assert ram.fd is not None
    other = os.memfd_create("other")
    os.ftruncate(other, 0x4000)
    driver.map_dma(0x100000, 0x4000, fd=other)
    os.ftruncate(other, 0)
    os.close(other)
    copy(driver, 0x100000, 0, 16)
    assert reason(toy) is Reason.TRUNCATED


def test_dirty_log(driver: Client, toy: Toy) -> None:
    driver.share(0, 0x40000)
    with pytest.raises(OSError):
        driver.dirty_report(0, 0x40000)
    driver.dirty_start([(0, 0x20000)])
    with pytest.raises(OSError) as caught:
        driver.dirty_start()
    assert caught.value.errno == errno.EBUSY
    copy(driver, 0, 0x4FFE, 4)
    copy(driver, 0, 0x30000, 4)
    assert driver.dirty_report(0, 0x40000) == {4, 5}
    assert driver.dirty_report(0, 0x40000) == set()
    driver.dirty_stop()
    with pytest.raises(OSError):
        driver.dirty_stop()
    for ranges in ([(0, 0)], [(2**64 - 4096, 8192)], [(0, 8192), (4096, 4096)]):
        with pytest.raises(OSError):
            driver.dirty_start(ranges)
    driver.dirty_start()
    for iova, length, page in ((0, 0, 4096), (0, 4096, 0), (0, 4096, 4095), (1, 4096, 4096), (0, 1 << 60, 4096)):
        with pytest.raises(OSError) as caught:
            driver.dirty_report(iova, length, page)
        assert caught.value.errno == errno.EINVAL
