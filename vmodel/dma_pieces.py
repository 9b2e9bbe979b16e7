"""Accesses that are made in pieces: what a fault counts, and reads that are too large for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from vmodel import _shim
from vmodel.errors import DmaFault

_Read = Callable[[int, int], bytes]


@contextmanager
def counting(done: int) -> Iterator[None]:
    """Adds what was moved before to the `done` of a fault."""
    try:
        yield
    except DmaFault as fault:
        fault.done += done
        raise


def read_each(read: _Read, pieces: Sequence[tuple[int, int]]) -> bytes:
    """Reads (iova, size) pieces one after the other, so that memory is taken for what has been read only."""
    data = bytearray()
    for iova, size in pieces:
        with counting(len(data)):
            data += read(iova, size)
    return bytes(data)


def read_large(read: _Read, iova: int, size: int) -> bytes:
    """Reads `size` bytes by reads of up to 16 MiB."""
    most, data = _shim.MOST_BYTES, bytearray()
    while len(data) < size:
        with counting(len(data)):
            data += read(iova + len(data), min(most, size - len(data)))
    return bytes(data)
