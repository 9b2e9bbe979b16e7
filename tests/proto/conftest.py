"""Fixtures, from the barest up: pick the first that will do.

`toy`      a device, served
`raw`      a connected client that has said nothing
`client`   one that has negotiated
`driver`   one that has enabled memory and bus mastering as well
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proto.toy import Toy
from vmodel.patience import patience
from vmodel.server import Server
from vmodel.vfio_user.client import Client
from vmodel.vfio_user.wire import Region


class Served:
    """A device and where it is served."""

    def __init__(self, toy: Toy, path: Path) -> None:
        self.toy = toy
        self.path = path

    def connect(self) -> Client:
        return Client.connect(self.path)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    toy = Toy()
    server = Server()
    server.add(toy, tmp_path / "toy.sock")
    threads = set(threading.enumerate())  # those of other tests may end meanwhile
    with server:
        yield Served(toy, tmp_path / "toy.sock")
    assert not set(threading.enumerate()) - threads, "a thread has not ended"
    toy.close()
    assert not (tmp_path / "toy.sock").exists()


@pytest.fixture
def toy(served: Served) -> Toy:
    return served.toy


@pytest.fixture
def raw(served: Served) -> Iterator[Client]:
    with served.connect() as client:
        yield client


@pytest.fixture
def client(raw: Client) -> Client:
    raw.negotiate()
    return raw


def enable(client: Client) -> None:
    client.region_write(Region.CONFIG, 4, b"\x07\x00")


@pytest.fixture
def driver(client: Client) -> Client:
    enable(client)
    return client


def open_fds() -> int:
    """How many fds this process has, those of unreachable objects not counted."""
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


def fds_settle(expected: int) -> bool:
    """Whether the count comes down to `expected` soon: the server closes fds on its own thread."""
    deadline = time.monotonic() + patience(5)
    while open_fds() > expected and time.monotonic() < deadline:
        time.sleep(0.02)
    return open_fds() == expected
