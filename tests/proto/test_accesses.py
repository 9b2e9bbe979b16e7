"""REGION_READ, REGION_WRITE, REGION_WRITE_MULTI on a real device: BARs, config space, ROM, enables, resets."""

from __future__ import annotations

import errno
import logging

import pytest

from tests.proto.config_space import capability
from tests.proto.conftest import enable
from tests.proto.toy import Toy
from vmodel.vfio_user.client import Client
from vmodel.vfio_user.wire import Region


def read(client: Client, offset: int, count: int = 4, region: int = 0) -> int:
    return int.from_bytes(client.region_read(region, offset, count), "little")


def write(client: Client, offset: int, value: int, count: int = 4, region: int = 0, *, posted: bool = False) -> None:
    client.region_write(region, offset, value.to_bytes(count, "little"), posted=posted)


def test_registers(driver: Client, toy: Toy) -> None:
    assert read(driver, 0) == 0x1111_1111
    write(driver, 0, 0xDEAD_BEEF)
    assert (read(driver, 0), toy.regs.PLAIN) == (0xDEAD_BEEF, 0xDEAD_BEEF)
    write(driver, 4, 5)
    assert (read(driver, 4), toy.writes) == (~5 & 0xFFFF_FFFF, [5])
    write(driver, 0x20, 0x00FF, 2)
    assert read(driver, 0x20, 2) == 0xFF00
    write(driver, 0x22, 0x0101, 2)
    write(driver, 0x22, 0x0002, 2)
    assert read(driver, 0x22, 2) == 0x0103
    assert (read(driver, 0x24), read(driver, 0x24)) == (0x55AA, 0)
    write(driver, 0x28, 0)
    assert read(driver, 0x28) == 0xCAFE
    assert read(driver, 0x900) == 0xFFFF_FFFF


def test_partial_and_spanning_accesses(driver: Client, toy: Toy) -> None:
    write(driver, 5, 0xAB, 1)
    assert toy.writes == [0x2222_AB22]
    write(driver, 2, 0x4433_2211_8877_6655, 8)  # PLAIN's upper half, HOOKED, half of COPY_FROM
    assert toy.regs.PLAIN == 0x6655_1111
    assert toy.writes[-1] == 0x2211_8877
    assert toy.regs.COPY_FROM == 0x4433
    assert read(driver, 2, 8) == 0x4433_DDEE_7788_6655
    assert len(driver.region_read(0, 0, 0x2000 + 16)) == 0x2010


def test_posted_writes_come_before_what_follows(driver: Client, toy: Toy) -> None:
    for n in range(2000):
        write(driver, 4, n, posted=True)
        if n % 3 == 0:
            write(driver, 0, n, posted=True)
    assert read(driver, 0) == 1998
    assert toy.writes == list(range(2000))


def test_write_multi(driver: Client, toy: Toy) -> None:
    done = driver.write_multi([(0, 0, b"\1\0\0\0"), (0, 4, b"\2\0\0\0"), (0, 8, b"\3" * 8), (0, 4, b"\4\0\0\0")])
    assert done == 4
    assert (toy.regs.PLAIN, toy.writes, toy.regs.COPY_FROM) == (1, [2, 4], 0x0303030303030303)
    driver.write_multi([(0, 4, bytes([n % 256, n >> 8, 0, 0])) for n in range(1000)], posted=True)
    driver.info()
    assert toy.writes[2:] == list(range(1000))


@pytest.mark.parametrize("posted", [False, True])
def test_refused_writes_behind_one_for_python(driver: Client, toy: Toy, posted: bool) -> None:
    """A write that waits behind a hook's is refused as any other: by its size, or if memory space is off by then."""
    driver.write_multi([(0, 4, b"\1\0\0\0"), (0, 0x38, b"\1\0"), (0, 0x38, b"\2\0\0\0")], posted=posted)
    driver.info()
    assert (toy.writes, toy.regs.WHOLE) == ([1], 2)
    off, on = (Region.CONFIG, 4, b"\4\0"), (Region.CONFIG, 4, b"\6\0")
    driver.write_multi([off, (0, 4, b"\2\0\0\0"), (0, 0, b"\2\0\0\0"), on, (0, 8, b"\3" * 8)], posted=posted)
    driver.info()
    assert (toy.writes, toy.regs.PLAIN, toy.regs.COPY_FROM) == ([1], 0x1111_1111, 0x0303030303030303)


def test_a_bug_in_a_model_reads_as_all_ones(driver: Client, toy: Toy, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        assert read(driver, 0x30) == 0xFFFF_FFFF
    assert "a bug of the model's" in caplog.text
    assert toy.errors == 1
    assert read(driver, 0) == 0x1111_1111


def test_memory_and_io_enable(client: Client) -> None:
    assert read(client, 0) == 0xFFFF_FFFF
    write(client, 0, 1)
    write(client, 4, 2, 2, Region.CONFIG)
    assert read(client, 0) == 0x1111_1111
    assert len(client.region_read(1, 0, 4)) == 4


def test_bars_are_sized(client: Client) -> None:
    for at, expected in ((0x10, 0xFFF0_0000), (0x14, 0xFFFF_FFF1), (0x18, 0x0000_000C), (0x1C, 0xFFFF_FFFE), (0x24, 0)):
        write(client, at, 0xFFFF_FFFF, 4, Region.CONFIG)
        assert read(client, at, 4, Region.CONFIG) == expected, hex(at)
    write(client, 0x30, 0xFFFF_FFFF, 4, Region.CONFIG)
    assert read(client, 0x30, 4, Region.CONFIG) == 0xFFFF_F801
    write(client, 0x10, 0xFEB1_2345, 4, Region.CONFIG)
    assert read(client, 0x10, 4, Region.CONFIG) == 0xFEB0_0000


def test_header_and_rom(client: Client, toy: Toy) -> None:
    header = client.region_read(Region.CONFIG, 0, 64)
    assert header[:4] == b"\x36\x1b\x0f\x0f"
    assert header[8:12] == b"\x03\x00\x80\x05"
    assert header[0x2C:0x30] == b"\xf4\x1a\x00\x11"
    assert header[0x3D] == 1
    assert client.region_read(Region.ROM, 0, 2048) == toy.rom
    with pytest.raises(OSError) as caught:
        client.region_write(Region.ROM, 0, b"x")
    assert caught.value.errno == errno.EPERM
    write(client, 0, 0xFFFF_FFFF, 4, Region.CONFIG)
    assert read(client, 0, 4, Region.CONFIG) == 0x0F0F_1B36


def test_capability_lists_end(client: Client) -> None:
    assert [capability(client, id) for id in (1, 5, 0x11, 0x10)] == [0x40, 0x48, 0x60, 0x6C]
    at, found = 0x100, {}
    while at:
        head = read(client, at, 4, Region.CONFIG)
        assert head & 0xFFFF not in found
        found[head & 0xFFFF] = at
        at = head >> 20
    assert set(found) == {0x01, 0x03, 0x0D, 0x0F, 0x1B, 0x13}
    assert read(client, found[3] + 4, 8, Region.CONFIG) == 0x0123_4567_89AB_CDEF
    acs = found[0x0D]
    write(client, acs + 6, 0xFFFF, 2, Region.CONFIG)
    assert read(client, acs + 6, 2, Region.CONFIG) == 0x4C
    pri = found[0x13]
    assert read(client, pri + 6, 2, Region.CONFIG) == 0x100
    write(client, pri + 4, 1, 2, Region.CONFIG)
    assert read(client, pri + 6, 2, Region.CONFIG) == 0


def test_aer_status_is_write_one_to_clear(client: Client, toy: Toy) -> None:
    toy.aer.report(uncorrectable=1 << 20, header=(1, 2, 3, 4))
    toy.aer.report(uncorrectable=1 << 15, header=(5, 6, 7, 8))  # not the first: not logged
    assert read(client, 0x104, 4, Region.CONFIG) == 1 << 20 | 1 << 15
    assert read(client, 0x118, 4, Region.CONFIG) == 20
    assert read(client, 0x11C, 4, Region.CONFIG) == 1
    write(client, 0x104, 1 << 20, 4, Region.CONFIG)
    assert read(client, 0x104, 4, Region.CONFIG) == 1 << 15
    write(client, 0x108, 0xFFFF_FFFF, 4, Region.CONFIG)
    assert read(client, 0x108, 4, Region.CONFIG) == 0x001F_F030


@pytest.mark.parametrize("how", ["FLR", "D3hot to D0", "DEVICE_RESET"])
def test_resets_bring_declared_values_back(driver: Client, toy: Toy, how: str) -> None:
    write(driver, 0, 7)
    write(driver, 4, 7)
    timer = toy.after(3600, lambda: None)
    if how == "FLR":
        control = capability(driver, 0x10) + 8
        write(driver, control, read(driver, control, 2, Region.CONFIG) | 0x8000, 2, Region.CONFIG)
        assert read(driver, control, 2, Region.CONFIG) == 0x2810
    elif how == "D3hot to D0":
        pm = capability(driver, 1) + 4
        write(driver, pm, 3, 2, Region.CONFIG)
        assert read(driver, 0) == 0xFFFF_FFFF  # no memory space in D3hot
        assert not toy.dma.bus_master
        write(driver, pm, 0, 2, Region.CONFIG)
    else:
        driver.reset()
    assert toy.resets[-1] == str({k.value: k for k in type(toy).reset.__globals__["ResetKind"]}[how])
    assert timer.call is None
    assert not toy.dma.bus_master
    assert read(driver, 4, 2, Region.CONFIG) == 0
    enable(driver)
    assert read(driver, 0) == 0x1111_1111
    assert read(driver, 4) == ~0x2222_2222 & 0xFFFF_FFFF


def test_d1_is_not_there(driver: Client) -> None:
    pm = capability(driver, 1) + 4
    write(driver, pm, 1, 2, Region.CONFIG)
    assert read(driver, pm, 2, Region.CONFIG) == 0


def test_reset_with_a_payload(client: Client) -> None:
    with pytest.raises(OSError) as caught:
        client.request(13, b"x")
    assert caught.value.errno == errno.EINVAL
