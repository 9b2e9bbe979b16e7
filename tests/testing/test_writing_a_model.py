"""docs/writing-a-model.md: its blocks make a device that does what the page says, and withstands wrong drivers."""

from __future__ import annotations

import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import pytest

from tests.pages import files_of, write_files
from vmodel.device import PciDevice, ResetKind
from vmodel.errors import PeerError
from vmodel.patience import patience
from vmodel.testing.fakes import FakeDriver, FakeMemory
from vmodel.vfio_user.wire import Irq

PAGE = "docs/writing-a-model.md"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(PAGE, tmp_path)
    return tmp_path


@pytest.fixture
def page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """The page's modules."""
    monkeypatch.syspath_prepend(folder)
    for name in ("copier", "ring"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import copier
    import ring

    yield types.SimpleNamespace(Copier=copier.Copier, Regs=copier.CopierRegs, Ring=ring.Ring)
    for name in ("copier", "ring"):
        sys.modules.pop(name, None)


def test_it_loads_after_each_step() -> None:
    steps = files_of(PAGE)["copier.py"]
    assert len(steps) > 8
    for number, text in enumerate(steps):
        module = types.ModuleType(f"copier_{number}")
        sys.modules[module.__name__] = module
        try:
            exec(compile(text, f"step {number}", "exec"), vars(module))
        finally:
            del sys.modules[module.__name__]
        if number:
            vars(module)["Copier"]().close()


def test_the_tests_on_the_page(folder: Path) -> None:
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_copier.py"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=patience(120), check=False)
    assert "3 passed" in done.stdout, done.stdout + done.stderr


Make = Callable[..., FakeDriver]


@pytest.mark.parametrize(
    ("source", "target", "length", "flags", "status"),
    [
        (0x2000, 0x3000, 0, 0, "BAD"),
        (0x2000, 0x3000, 64 * 1024 + 1, 0, "BAD"),
        (0x2000, 0x3000, 0xFFFF_FFFF, 0, "BAD"),
        (0x2000, 0x3000, 16, 8, "BAD"),
        (0x2000, 0x3000, 16, 0xFFFF_FFFF, "BAD"),
        (4096, 0x3000, 1, 2, "BAD"),
        (0x2000, 4081, 16, 4, "BAD"),
        (0xFFFF_FFFF_FFFF_FFFF, 0x3000, 16, 2, "BAD"),
        (1 << 40, 0x3000, 16, 0, "FAULT"),
        (0x2000, 1 << 40, 16, 0, "FAULT"),
        (16 * 1024 * 1024 - 8, 0x3000, 16, 0, "FAULT"),
        (0xFFFF_FFFF_FFFF_FFF8, 0x3000, 16, 0, "FAULT"),
        (0x2000, 0xFFFF_FFFF_FFFF_FFF8, 16, 0, "FAULT"),
    ],
)
def test_descriptors_that_are_wrong(
    page: Any, fake_driver: Make, source: int, target: int, length: int, flags: int, status: str
) -> None:
    card = fake_driver(page.Copier("copier0"))
    ring = page.Ring(card)
    wrong = ring.add(source, target, length, flags)
    good = ring.add(card.memory.alloc(b"good"), there := card.memory.alloc(4), 4)
    ring.ring()
    assert card.interrupt(0) == 1
    assert card.interrupt(1) == 1
    assert ring.status(wrong) == page.Copier.Status[status]
    assert ring.status(good) == page.Copier.Status.DONE
    assert card.memory.read(there, 4) == b"good"
    assert card.read(page.Regs.IRQ_STATUS) == 0b011
    assert card.device.errors == 0


@pytest.mark.parametrize("base", [1 << 40, 2**64 - 32, 2**64 - 8, 16 * 1024 * 1024 - 16])
def test_a_ring_that_cannot_be_reached(page: Any, fake_driver: Make, base: int) -> None:
    card = fake_driver(page.Copier("copier0"))
    card.write(page.Regs.RING_BASE, base)
    card.write(page.Regs.RING_SIZE, 8)
    card.write(page.Regs.CONTROL, 1)
    card.write(page.Regs.TAIL, 3)
    assert card.interrupt(1) == 1
    assert (card.read(page.Regs.CONTROL), card.read(page.Regs.HEAD)) == (0, 0)
    assert card.device.errors == 0
    # It works again once the driver has put that right.
    ring = page.Ring(card)
    ring.add(card.memory.alloc(b"x"), card.memory.alloc(1), 1)
    ring.ring()
    assert card.interrupt(0) == 1


@pytest.mark.parametrize("size", [0, 1, 1025, 0xFFFF_FFFF])
def test_a_ring_of_a_wrong_size(page: Any, fake_driver: Make, size: int) -> None:
    card = fake_driver(page.Copier("copier0"))
    card.write(page.Regs.RING_SIZE, size)
    card.write(page.Regs.CONTROL, 1)
    assert card.read(page.Regs.CONTROL) == 0
    assert card.device.errors == 1


def test_doorbells_that_are_wrong(page: Any, fake_driver: Make) -> None:
    card = fake_driver(page.Copier("copier0"))
    card.write(page.Regs.TAIL, 1)  # does not run
    ring = page.Ring(card)
    for tail in (8, 0xFFFF_FFFF):
        card.write(page.Regs.TAIL, tail)
    assert card.read(page.Regs.TAIL) == 0
    assert card.device.errors == 3
    card.write(page.Regs.RING_SIZE, 1024)  # fixed while it runs
    card.write(page.Regs.RING_BASE, 0)
    assert (card.read(page.Regs.RING_SIZE), card.read(page.Regs.RING_BASE)) == (8, ring.base)


def test_round_and_round(page: Any, fake_driver: Make) -> None:
    card = fake_driver(page.Copier("copier0"))
    ring = page.Ring(card)
    (where,) = (at for name, at, _ in card.device.config.places if name == "cap")
    assert card.config_read(where, 1) == 0x09 and card.config_read(where + 2, 2) == 0x0108
    for asked, given in ((0, 1), (3, 3), (1000, 64), (2, 2)):
        card.config_write(where + 4, 2, asked)
        assert card.config_read(where + 4, 2) == given
    source, target = card.memory.alloc(64), card.memory.alloc(64)
    for turn in range(5):
        card.memory.write(source, bytes([turn] * 64))
        numbers = [ring.add(source + 8 * n, target + 8 * n, 8, 1 if n == 6 else 0) for n in range(7)]
        ring.ring()
        assert card.interrupt(0) == 1
        assert [ring.status(n) for n in numbers] == [1] * 7
        assert card.memory.read(target, 56) == bytes([turn] * 56)
    assert card.device.errors == 0


def test_the_ram(page: Any, fake_driver: Make) -> None:
    card = fake_driver(page.Copier("copier0"))
    ring = page.Ring(card)
    there = card.memory.alloc(8)
    ring.add(card.memory.alloc(b"abcdefgh"), 16, 8, 4)
    ring.add(16, 18, 6, 2 | 4)  # to a place that overlaps it
    ring.add(16, there, 8, 1 | 2)
    ring.ring()
    assert card.interrupt(0) == 1
    assert card.memory.read(there, 8) == b"ababcdef"
    assert card.read((2, 16), 8) == int.from_bytes(b"ababcdef", "little")
    card.write((2, 4088), 7, 8)
    assert card.device.ram[4088] == 7


def test_msi_and_the_pin(page: Any, fake_driver: Make) -> None:
    card = fake_driver(page.Copier("copier0"))
    places = {name: at for name, at, _ in card.device.config.places}
    ring = page.Ring(card)
    source, target = card.memory.alloc(b"x"), card.memory.alloc(1)

    def once(source: int = source) -> None:
        ring.add(source, target, 1)
        ring.ring()

    card.config_write(places["msix"] + 2, 2, 0)
    card.config_write(places["msi"] + 2, 2, 2 << 4 | 1)  # four vectors
    four = card.client.eventfds(Irq.MSI, 4)
    once()
    once(1 << 40)
    assert four[0].wait() == 1 and four[1].wait() == 1
    card.config_write(places["msi"] + 2, 2, 1)  # one vector, which all causes share
    once(1 << 40)
    assert four[0].wait() == 1 and four[1].quiet()
    card.config_write(places["msi"] + 2, 2, 0)
    card.write(page.Regs.IRQ_STATUS, 7)
    (pin,) = card.client.eventfds(Irq.INTX, 1)
    once()
    assert pin.wait() == 1 and card.device.intx.level
    card.write(page.Regs.IRQ_STATUS, 1)
    assert not card.device.intx.level
    for event in (*four, pin):
        event.close()


def test_the_timer(page: Any, fake_driver: Make) -> None:
    card = fake_driver(page.Copier("copier0"))
    card.write(page.Regs.TICK_US, 1)
    assert card.read(page.Regs.TICK_US) == 100
    for _ in range(3):
        assert card.interrupt(2) >= 1
    card.write(page.Regs.TICK_US, 0)
    card.settle()
    if not card.interrupts[2].quiet(0):
        card.interrupt(2)
    assert card.device.timer is None and card.quiet([2])


# ---- a device that nobody serves: its thread is the test's, and so is the order of things ------------------------


class Alone:
    """A copier with memory, and a queued descriptor that it has not processed yet."""

    def __init__(self, page: Any, memory: FakeMemory, *, go: bool = True) -> None:
        self.regs, self.memory = page.Regs, memory
        self.device: PciDevice | Any = page.Copier("copier0")
        memory.attach(self.device)
        if go:
            self.ring, self.source, self.target = memory.alloc(256), memory.alloc(b"data"), memory.alloc(4)
            line = self.source.to_bytes(8, "little") + self.target.to_bytes(8, "little")
            memory.write(self.ring, line + (4).to_bytes(4, "little") + (1).to_bytes(4, "little"))
            self.write(page.Regs.RING_SIZE, 8)
            self.write(page.Regs.RING_BASE, self.ring)
            self.write(page.Regs.CONTROL, 1)
            self.write(page.Regs.TAIL, 1)

    def write(self, register: Any, value: int) -> None:
        self.device.backend.region_write(0, register.offset, register.size, value)

    def run(self) -> None:
        self.device.backend.run_due(time.monotonic_ns())


@pytest.mark.parametrize("kind", list(ResetKind))
def test_a_reset_drops_what_is_going_on(page: Any, fake_memory: FakeMemory, kind: ResetKind) -> None:
    card = Alone(page, fake_memory)
    card.write(card.regs.TICK_US, 100)
    card.device.ram[0] = 5
    card.device.reset(kind)
    card.device.config.write(4, b"\x06\0")  # off after a reset: memory space, bus mastering
    time.sleep(0.001)
    card.run()
    assert fake_memory.read(card.target, 4) == bytes(4)
    assert card.device.regs.IRQ_STATUS == 0 and card.device.timer is None
    assert card.device.ram[0] == (0 if kind is ResetKind.DEVICE else 5)
    card.device.close()
    again = Alone(page, fake_memory)
    again.run()
    assert fake_memory.read(again.target, 4) == b"data"
    again.device.close()


def test_migration_in_the_middle_of_work(page: Any, fake_memory: FakeMemory) -> None:
    source, target = Alone(page, fake_memory), Alone(page, fake_memory, go=False)
    source.write(source.regs.TICK_US, 50_000)
    source.device.ram[:4] = b"kept"
    target.device.backend.quiesce(True)
    target.device.backend.restore(source.device.backend.save())
    source.device.close()
    assert bytes(target.device.ram[:4]) == b"kept"
    assert fake_memory.read(source.target, 4) == bytes(4)
    target.device.backend.quiesce(False)
    target.run()
    assert fake_memory.read(source.target, 4) == b"data"
    assert target.device.regs.IRQ_STATUS == 1
    left = target.device.timer.deadline_ns - time.monotonic_ns()
    assert left <= 50_000_000
    time.sleep(max(0, left) / 1e9 + 0.001)
    target.run()
    assert target.device.regs.IRQ_STATUS == 0b101
    target.device.close()


def test_states_that_are_wrong(page: Any, fake_memory: FakeMemory) -> None:
    source, target = Alone(page, fake_memory), Alone(page, fake_memory, go=False)
    good = source.device.backend.save()
    for extra in (b"\xfe" + 7 * b"\xff", b"\0\0\0\0\1\0\0\1", b""):
        with pytest.raises(PeerError, match="EINVAL"):
            target.device.backend.restore(good[: len(good) - 8] + extra)
    assert target.device.regs.CONTROL == 0 and target.device.timer is None
    # Registers that no driver could have set: the engine stops, and says so.
    for head, tail in ((0, 8), (9, 0), (0xFFFF_FFFF, 1)):
        source.device.regs.HEAD, source.device.regs.TAIL = head, tail
        target.device.backend.restore(source.device.backend.save())
        target.run()
        assert target.device.regs.CONTROL == 0 and target.device.regs.IRQ_STATUS == 0b010
    source.device.close()
    target.device.close()


def test_parameters(page: Any) -> None:
    small, large = page.Copier("a"), page.Copier("b", {"ram": 65536, "max_length": 1})
    assert (len(small.ram), len(large.ram)) == (4096, 65536)
    assert isinstance(large, page.Copier) and large.params.max_length == 1
    for wrong in ({"ram": 5}, {"max_length": 0}, {"lenght": 1}):
        with pytest.raises(pydantic.ValidationError):
            page.Copier("c", wrong)
    small.close()
    large.close()
