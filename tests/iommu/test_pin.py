"""Views of guest memory through a paging domain."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from vmodel import _shim
from vmodel.errors import DmaFault, Reason
from vmodel.memory import GuestMemory
from vmodel.span import PAGE

READ, WRITE, RW = 1, 2, 3


@pytest.fixture
def device() -> Iterator[tuple[_shim.Requester, _shim.Domain]]:
    """IOVA 0x10000 leads to two pages that are side by side, IOVA 0x20000 to two that are not."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 16 * PAGE)
    memory = GuestMemory()
    memory.map(0, 16 * PAGE, fd=fd)
    requester = _shim.Requester(memory.shim)
    requester.enable(True)
    domain = _shim.Domain.paging(PAGE, 0, 2**48 - 1, 2**52 - 1, 100)
    for iova, gpa, prot in (
        (0x10000, 0x2000, RW),
        (0x11000, 0x3000, RW),
        (0x20000, 0x5000, RW),
        (0x21000, 0x7000, RW),
        (0x30000, 0x9000, READ),
    ):
        domain.map(iova, gpa, PAGE, prot)
    requester.attach(domain)
    yield requester, domain
    os.close(fd)


def dirty(domain: _shim.Domain, iova: int) -> int:
    """The bits of 64 pages from iova on; read and cleared."""
    return int.from_bytes(domain.dirty_report(iova, 64 * PAGE, PAGE, False), "little")


def test_a_writable_view_is_dirty_until_it_is_closed(device: tuple[_shim.Requester, _shim.Domain]) -> None:
    """The log may be read while a view is in use: what comes after that is not lost."""
    requester, domain = device
    domain.dirty_start()
    pin = requester.pin(0x10800, PAGE, _shim.DMA_WRITE)
    assert dirty(domain, 0x10000) == 0b11
    assert dirty(domain, 0x10000) == 0
    pin.view[0] = 1
    pin.close()
    assert dirty(domain, 0x10000) == 0b11
    requester.pin(0x10800, PAGE, 0).close()
    assert dirty(domain, 0x10000) == 0


def test_a_view_outlives_its_domain(device: tuple[_shim.Requester, _shim.Domain]) -> None:
    requester, domain = device
    domain.dirty_start()
    pin = requester.pin(0x10000, 2 * PAGE, _shim.DMA_WRITE)
    requester.attach(None)
    del domain, device
    pin.view[-1] = 7
    assert pin.view[-1] == 7
    pin.close()


@pytest.mark.parametrize(
    ("iova", "size", "flags", "reason", "stops"),
    [
        (0x20800, PAGE, 0, Reason.NO_WINDOW, 0x21000),  # not in one piece
        (0x11000, PAGE + 1, 0, Reason.NOT_MAPPED, 0x12000),
        (0x30000, PAGE, _shim.DMA_WRITE, Reason.PERMISSION, 0x30000),
        (2**64 - PAGE, 2 * PAGE, 0, Reason.WRAP, 2**64 - PAGE),
    ],
)
def test_what_no_view_can_show(
    device: tuple[_shim.Requester, _shim.Domain], iova: int, size: int, flags: int, reason: Reason, stops: int
) -> None:
    with pytest.raises(DmaFault) as caught:
        device[0].pin(iova, size, flags)
    assert (caught.value.reason, caught.value.iova) == (reason, stops)
