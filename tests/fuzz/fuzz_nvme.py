"""NVMe's admin commands and I/O commands in Python: whatever they say, each has one completion, with a status.

No hook fails, the controller does not stop, and nothing is completed that was not asked for.  After a Doorbell Buffer
Config the input's own pages may be shadow doorbells, which ask for whatever is in the queues.
"""

from __future__ import annotations

import struct

import atheris

with atheris.instrument_imports(include=["vmodel.devices.nvme"]):
    from tests.nvme.driver import Driver, Pair, start
    from vmodel.devices.nvme.command import NvmeCommand

from tests.fuzz.harness import Input, fuzz

PARAMS = {"namespaces": [{"memory": "256K"}, {"memory": "128K", "lba": 4096}], "fast_path": False}
#: Admin commands of 1.4, figure 139, and of the I/O command set.
ADMIN = [
    0x00,
    0x01,
    0x02,
    0x04,
    0x05,
    0x06,
    0x08,
    0x09,
    0x0A,
    0x0C,
    0x0D,
    0x10,
    0x11,
    0x14,
    0x15,
    0x18,
    0x19,
    0x7C,
    0x80,
]
ADMIN += [0x81, 0x82, 0x84, 0xC0]
IO = [0x00, 0x01, 0x02, 0x04, 0x05, 0x08, 0x09, 0x0C, 0x0D, 0x0E, 0x11, 0x15, 0x19, 0x80]
NAMESPACES = [1, 2, 0, 3, 0xFFFF_FFFF, 0xFFFF_FFFE]
DOORBELL_BUFFER_CONFIG = 0x7C
#: Where commands' data is.
DATA = 0x10_0000
#: Where the queues are: nowhere that a command is likely to write to, as that would be its own fault.
QUEUES = 0x2A5_1000


def pointer(source: Input) -> int:
    """Of a data pointer."""
    kind = source.number(1)
    match kind >> 5:
        case 0:
            return source.number(8)
        case 1:
            return DATA + (kind & 31) * 4096 + (source.number(2) & 0xFFF)
        case 2:
            return (64 << 20) - 4096 + (kind & 31) * 256
        case _:
            return DATA + (kind & 31) * 4096


def data_pointer(source: Input, *, sgl: bool) -> bytes:
    """PRPs, or an SGL descriptor: a block or a segment, of a likely size."""
    first = pointer(source)
    if not sgl:
        return struct.pack("<QQ", first, pointer(source))
    kind = source.number(1)
    size = source.number(2) if kind & 8 else 512 << (kind & 7)
    return struct.pack("<QIBBBB", first, size, 0, 0, 0, source.number(1) if kind & 16 else kind & 0x30)


def command(source: Input, opcodes: list[int], cid: int) -> bytes:
    """A command, in which nothing or something is anything."""
    what, form = source.number(1), source.number(1)
    opcode = opcodes[source.number(1) % len(opcodes)] if what & 128 == 0 else source.number(1)
    raw = bytearray(
        NvmeCommand.make(
            opcode,
            nsid=NAMESPACES[what & 7] if what & 7 < len(NAMESPACES) else source.number(4),
            dptr=data_pointer(source, sgl=bool(form & 1)),
            cdw10=source.number(2 if what & 8 else 1) | (source.number(1) << 16 if what & 16 else 0),
            cdw11=source.number(1),
            cdw12=source.number(1) if what & 32 else 0,
        ).build()
    )
    raw[1] = 0x40 if form & 1 else 0  # PSDT
    raw[2:4] = struct.pack("<H", cid)
    if what & 64:
        raw[source.number(1) & 63] = source.number(1)
        raw[2:4] = struct.pack("<H", cid)
    return bytes(raw)


def reaped(pair: Pair) -> list[int]:
    """The identifiers that are complete."""
    return [entry.cid for entry in pair.reap()]


driver: Driver = start(PARAMS)


def one_input(data: bytes) -> None:
    """Commands for the admin queue and one I/O queue, in batches; between them pages of anything."""
    source = Input(data)
    driver.disable()
    driver.memory._next = QUEUES
    driver.enable()
    io = driver.create(1, 8)
    asked: dict[int, set[int]] = {0: set(), 1: set()}
    cid, shadow = 100, False
    for _ in range(8):
        if not source.left:
            break
        what = source.number(1)
        if what & 3 == 3:
            driver.memory.write(DATA + (what >> 2 & 31) * 4096, source.bytes(source.number(1)))
            continue
        pair, opcodes = (io, IO) if what & 1 else (driver.admin, ADMIN)
        for _ in range(1 + (what >> 2 & 3)):
            cid += 1
            raw = command(source, opcodes, cid)
            shadow |= raw[0] == DOORBELL_BUFFER_CONFIG
            driver.memory.write(pair.sq + 64 * pair.tail, raw)
            pair.tail = (pair.tail + 1) % pair.entries
            asked[pair.qid].add(cid)
        pair.ring()
        for qid, each in ((0, driver.admin), (1, io)):
            for done in reaped(each):
                assert shadow or done in asked[qid], f"a completion of {done} that was not asked for, or was twice"
                asked[qid].discard(done)
    driver.run()
    assert not driver.status.CFS


if __name__ == "__main__":
    fuzz(one_input)
