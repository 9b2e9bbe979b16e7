"""virtio-iommu in Python: registers, rings, chains and requests are the input's.

No hook fails, what is answered was asked, and the device comes back after a reset.
"""

from __future__ import annotations

import struct
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["vmodel.virtio", "vmodel.devices"]):
    from tests.virtio.world import MACHINE, World
    from vmodel.machine import parse

from tests.fuzz.harness import Input, fuzz
from tests.virtio.driver import Driver, Queue

ENDPOINTS = [0x18, 0x20, 0x208, 0x210, 0x200, 0x999]
NEXT, WRITE, INDIRECT = 1, 2, 4
#: Registers of the common configuration, and those of a queue's (4.1.4.3).
REGISTERS = [0x00, 0x08, 0x0C, 0x14, 0x16, 0x18, 0x1C, 0x20, 0x24, 0x28, 0x2C, 0x30, 0x34, 0x100, 0x3000, 0x3004]

world = World(parse(MACHINE, Path("m.toml")))
world.iommu.fast_path = False


def request(source: Input) -> bytes:
    """A request as drivers write it, as a rule."""
    kind, domain, endpoint = source.number(1), source.number(1) & 3, ENDPOINTS[source.number(1) % len(ENDPOINTS)]
    match kind & 7:
        case 1:
            return struct.pack("<B3xIII4x", 1, domain, endpoint, kind >> 7)
        case 2:
            return struct.pack("<B3xII8x", 2, domain, endpoint)
        case 3:
            first = source.address()
            last = first + (source.number(1) % 9 << 12) + 4095 & (1 << 64) - 1
            return struct.pack("<B3xIQQQI", 3, domain, first, last, source.address(), kind >> 5 or 3)
        case 4:
            return struct.pack("<B3xIQQ4x", 4, domain, source.address(), source.address())
        case 5:
            return struct.pack("<B3xI64x", 5, endpoint)
        case _:
            return source.bytes(source.number(1) % 48)


def chain(queue: Queue, source: Input, n: int) -> None:
    """A request, in a chain that may be anything."""
    data, shape = request(source), source.number(1)
    at, head = queue.data + 0x100 * n, 4 * n
    queue.memory.write(at, data)
    flags = NEXT if shape & 1 else source.number(1)
    table = queue.data + 0x80 + 0x100 * n
    if shape & 2:
        parts = struct.pack("<QIHH", at, len(data), flags, source.number(1) if shape & 8 else 1)
        queue.memory.write(table, parts + struct.pack("<QIHH", table + 0x40, 4 + source.number(1), WRITE, 0))
        queue.describe(head, table, 32 if shape & 4 else source.number(2), INDIRECT | (flags if shape & 16 else 0))
    else:
        queue.describe(head, source.address() if shape & 8 else at, len(data), flags, head + 1)
        room = 4 if shape & 16 else source.number(2)
        queue.describe(head + 1, at + 0x80, room, WRITE if shape & 32 else source.number(1), source.number(1))
    queue.offer(head if shape & 64 else source.number(1))


def one_input(data: bytes) -> None:
    """A byte of features, then what the driver does."""
    source = Input(data)
    driver: Driver = world.driver
    features = source.number(1)
    offered = driver.offered()
    world.start(offered if features & 1 else None)
    for _ in range(16):
        if not source.left:
            break
        what = source.number(1)
        if what & 3 == 3:
            size = 1 << (what >> 2 & 3)
            place = REGISTERS[source.number(1) % len(REGISTERS)]
            world.iommu.backend.region_write(0, place, size, source.number(size))
        elif what & 3 == 2:  # anything anywhere near the rings
            queue = world.requests
            place = (queue.descriptors, queue.available, queue.used, queue.data)[what >> 2 & 3]
            world.driver.memory.write(place + source.number(1), source.bytes(what >> 4))
        else:
            count = 1 + (what >> 2 & 7)
            for n in range(count):
                chain(world.requests, source, n)
            world.requests.notify()
            for _ in range(4):
                world.iommu.backend.run_due(1 << 62)
    world.requests.used_now()
    # A reset repairs the queue from any state.
    world.start(offered)
    assert world.ask(2, 77, 0x18, bytes(8), form="II8s") is not None
    driver.put(0x14, 1, 0)


if __name__ == "__main__":
    fuzz(one_input)
