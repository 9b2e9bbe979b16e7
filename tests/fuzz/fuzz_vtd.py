"""VT-d in Python: registers, root and context entries, PASID tables and the invalidation queue are the input's.

No hook fails, each DMA gets its bytes or a fault, and a reset makes the unit what it was.
"""

from __future__ import annotations

import contextlib

import atheris

with atheris.instrument_imports(include=["vmodel.devices.vtd", "vmodel.iommu"]):
    from tests.iommu.vtd_bench import CONTEXT, QUEUE, ROOT, SCALABLE, TABLES, Bench, ScalableBench
    from vmodel.errors import DmaFault

from tests.fuzz.harness import Input, fuzz

#: What there is between 0 and the records of faults: each register of the unit, and their halves.
REGISTERS = [0x18, 0x1C, 0x20, 0x28, 0x34, 0x38, 0x3C, 0x40, 0x58, 0x64, 0x68, 0x70, 0x78, 0x80, 0x88, 0x90, 0x98, 0x9C]
REGISTERS += [0xA0, 0xA8, 0xAC, 0xB0, 0xC0, 0xC8, 0xD0, 0xDC, 0xE0, 0xE4, 0xE8, 0xF0, 0x100, 0x108, 0x200, 0x208, 0x20C]
#: Pages that tables are likely to be in.
PLACES = [ROOT, CONTEXT, CONTEXT + 0x1000, TABLES, TABLES + 0x1000, TABLES + 0x2000, QUEUE, TABLES + 0x3000]
INDEXES = [0, 1, 0x18 * 2, 0x20 * 2, 0x20 * 4, 511, 510, 3]

benches = [Bench(), ScalableBench()]
benches += [Bench(params="caching_mode = true"), ScalableBench(params="caching_mode = true")]


def word(source: Input) -> int:
    """Of a table or a descriptor: where it leads, low bits, or anything."""
    kind = source.number(1)
    if kind & 0x80:
        return source.number(8)
    return PLACES[kind & 7] | source.number(2 if kind & 8 else 1) | (source.number(1) << 56 if kind & 16 else 0)


def one_input(data: bytes) -> None:
    """A byte for the mode, then what the guest does."""
    source = Input(data)
    mode = source.number(1)
    bench = benches[mode & 1 | (mode & 4) >> 1]
    for place in PLACES:
        bench.ram[place : place + 4096] = bytes(4096)
    bench.unit.backend.reset_device()
    bench.place(bench.unit.base)
    if mode & 2:
        bench.on(ROOT | (SCALABLE if mode & 1 else 0))
    for _ in range(24):
        if not source.left:
            break
        what = source.number(1)
        match what & 7:
            case 0 | 1:
                size = 8 if what & 8 else 4
                bench.put(REGISTERS[source.number(1) % len(REGISTERS)], source.number(size), size)
            case 2 | 3:
                place = PLACES[what >> 3 & 7] + 8 * INDEXES[source.number(1) & 7]
                bench.words(place & ~7, word(source))
            case 4 | 5:
                for _ in range(1 + (what >> 3 & 7)):
                    descriptor = [word(source) if what & 64 else source.number(1) | source.number(1) << 4, word(source)]
                    bench.queue(tuple(descriptor))  # type: ignore[arg-type]
            case 6:
                dma = bench.machine.devices["edu1" if what & 8 else "edu0"].dma
                if what & 16:
                    dma = dma.with_pasid(source.number(1))
                with contextlib.suppress(DmaFault):
                    if what & 32:
                        dma.write(source.address(), bytes(8))
                    else:
                        assert len(dma.read(source.address(), 8)) == 8
            case _:
                bench.get(REGISTERS[source.number(1) % len(REGISTERS)], 4 + (what & 8) // 2)
        bench.run()
    assert bench.unit.errors == 0


if __name__ == "__main__":
    fuzz(one_input)
