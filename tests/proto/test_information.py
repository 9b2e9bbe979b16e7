"""GET_INFO, GET_REGION_INFO, GET_REGION_IO_FDS, GET_IRQ_INFO."""

from __future__ import annotations

import errno
import mmap
import os
import time

import pytest

from tests.proto.toy import Toy
from vmodel.patience import patience
from vmodel.span import MiB, Span
from vmodel.vfio_user import wire
from vmodel.vfio_user.client import Client
from vmodel.vfio_user.wire import Command, DeviceFlags, Irq, IrqFlags, Region, RegionFlags


def refused(client: Client, command: int, payload: bytes) -> int:
    with pytest.raises(OSError) as caught:
        client.request(command, payload)
    return caught.value.errno or 0


@pytest.mark.parametrize(
    ("command", "size"),
    [
        (Command.DEVICE_GET_INFO, 16),
        (Command.DEVICE_GET_REGION_INFO, 32),
        (Command.DEVICE_GET_REGION_IO_FDS, 16),
        (Command.DEVICE_GET_IRQ_INFO, 16),
    ],
)
def test_wrong_sizes(client: Client, command: int, size: int) -> None:
    argsz = size.to_bytes(4, "little")
    for payload in (b"", argsz, argsz + bytes(size - 5), argsz + bytes(size), bytes(size)):
        assert refused(client, command, payload) == errno.EINVAL
    assert client.request(command, argsz + bytes(size - 4)).payload


def test_device(client: Client) -> None:
    info = client.info()
    assert (info.argsz, info.flags) == (16, DeviceFlags.RESET | DeviceFlags.PCI)
    assert (info.num_regions, info.num_irqs) == (9, 5)


def test_regions(client: Client) -> None:
    rw = RegionFlags.READ | RegionFlags.WRITE
    sizes = {0: 1 * MiB, 1: 16, 2: 8 << 30, 3: 0, 4: 8192, 5: 0, 6: 2048, 7: 4096, 8: 0}
    for index, size in sizes.items():
        region = client.region_info(index)
        assert region.size == size
        if index == Region.ROM:
            assert region.flags == RegionFlags.READ
        elif index != 0:
            assert region.flags == (rw if size else 0)
        if region.fd is not None:
            os.close(region.fd)
    for index in (9, 2**32 - 1):
        with pytest.raises(OSError) as caught:
            client.region_info(index)
        assert caught.value.errno == errno.EINVAL


def test_a_sparse_region_is_mapped(client: Client, toy: Toy) -> None:
    region = client.region_info(0)
    assert region.flags & RegionFlags.CAPS
    assert region.areas == (Span.sized(0x2000, 0x2000),)
    assert region.fd is not None
    with mmap.mmap(region.fd, 0x2000, offset=0x2000) as area:
        area[5] = 0x77
        assert toy.ram[5] == 0x77
    with pytest.raises(PermissionError):  # nobody can shrink it under the server
        os.ftruncate(region.fd, 0)
    os.close(region.fd)


def test_too_little_room_for_the_areas(client: Client) -> None:
    head = {"argsz": 32, "flags": 0, "index": 0, "cap_offset": 0, "size": 0, "offset": 0}
    reply = client.request(Command.DEVICE_GET_REGION_INFO, wire.RegionInfoHead.build(head))
    info = wire.RegionInfoHead.parse(reply.payload)
    assert (len(reply.payload), info.argsz, info.cap_offset) == (32, 64, 32)
    for fd in reply.fds:
        os.close(fd)


def test_interrupts(client: Client) -> None:
    counts = {Irq.INTX: 1, Irq.MSI: 4, Irq.MSIX: 70, Irq.ERR: 1, Irq.REQ: 1}
    for index, count in counts.items():
        info = client.irq_info(index)
        assert info.count == count
        assert info.flags & IrqFlags.EVENTFD
    assert client.irq_info(Irq.INTX).flags & IrqFlags.AUTOMASKED
    with pytest.raises(OSError) as caught:
        client.irq_info(5)
    assert caught.value.errno == errno.EINVAL


def test_doorbells(client: Client, toy: Toy) -> None:
    request = {"argsz": 16, "flags": 0, "index": 0, "count": 0}
    short = client.request(Command.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds.build(request))
    assert (len(short.payload), wire.RegionIoFds.parse(short.payload).argsz, short.fds) == (16, 56, ())
    full = client.request(Command.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds.build({**request, "argsz": 56}))
    entry = wire.SubRegion.parse(full.payload[16:])
    assert (entry.offset, entry.size, entry.fd_index, entry.type) == (0x1C, 4, 0, 0)
    (fd,) = full.fds
    os.eventfd_write(fd, 1)
    os.close(fd)
    deadline = time.monotonic() + patience(5)
    while not toy.doorbells and time.monotonic() < deadline:
        client.info()
    assert toy.doorbells == 1
    none = client.request(Command.DEVICE_GET_REGION_IO_FDS, wire.RegionIoFds.build({**request, "index": 7}))
    assert wire.RegionIoFds.parse(none.payload).count == 0
    bad = wire.RegionIoFds.build({**request, "flags": 1})
    assert refused(client, Command.DEVICE_GET_REGION_IO_FDS, bad) == errno.EINVAL


@pytest.mark.parametrize("command", [0, 14, 19, 0xFFFF])
def test_unknown_commands(client: Client, command: int) -> None:
    assert refused(client, command, bytes(8)) == errno.ENOTSUP


@pytest.mark.parametrize("command", [Command.DMA_READ, Command.DMA_WRITE])
def test_commands_of_the_other_direction(client: Client, command: int) -> None:
    assert refused(client, command, bytes(16)) == errno.EINVAL
