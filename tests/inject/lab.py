"""A device that does on request what plans interfere with, served and driven by vmodel's own client."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.proto.toy import Toy
from vmodel.device import PciDevice, on_read, on_write
from vmodel.errors import DmaFault
from vmodel.inject import Engine, FaultPlan, parse_rule
from vmodel.patience import patience
from vmodel.regs import Reg32, RegisterBank
from vmodel.server import Server
from vmodel.vfio_user.client import Client, EventFd
from vmodel.vfio_user.wire import Irq, Region

#: Where things are in the guest's memory: what the device reads, what it writes, and its completion.
SOURCE, TARGET, DONE = 0x1000, 0x2000, 0x3000
RAM = 0x10000
PLAIN, HOOKED = 0x00, 0x04
RAISE, COUNT, COPY, LAST = 0x1000, 0x1004, 0x1008, 0x100C
_MSI_ENABLE = 0x31  # 8 vectors are not there: 4 of them, enabled


class LabRegs(RegisterBank, size=0x100):
    """What the lab does."""

    RAISE = Reg32(0x0, doc="raises this vector")
    COUNT = Reg32(0x4, doc="one more at each read")
    COPY = Reg32(0x8, doc="copies so many bytes from SOURCE to TARGET, says 1 at DONE, and raises vector 0")
    LAST = Reg32(0xC, doc="the first bytes of the last copy, as the device has seen them")


class Lab(Toy):
    """The toy, and more."""

    lab = Toy.bar0.bank(LabRegs, at=0x1000)

    def setup(self) -> None:
        super().setup()
        self.faults: list[DmaFault] = []

    @on_write(LabRegs.RAISE)
    def _raise(self, new: int) -> None:
        if self.msi.enabled:
            self.msi.fire(new)
        else:
            self.intx.raise_()

    @on_read(LabRegs.COUNT)
    def _count(self, stored: int) -> int:
        self.lab.COUNT = stored + 1
        return stored + 1

    @on_write(LabRegs.COPY)
    def _copy_all(self, new: int) -> None:
        try:
            data = self.dma.read(SOURCE, new)
            self.lab.LAST = int.from_bytes(data[:4], "little")
            self.dma.write(TARGET, data)
            self.dma.write(DONE, b"\1\0\0\0")
        except DmaFault as fault:
            self.faults.append(fault)
            return
        if self.msi.enabled:
            self.msi.fire(0)


class Clock:
    """The time of a plan: it passes when a test says so, and when a rule blocks a device."""

    def __init__(self) -> None:
        self.now = 0.0
        #: How long rules have blocked, each time; and what happens meanwhile.
        self.slept: list[float] = []
        self.while_asleep: Callable[[], object] = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        self.while_asleep()


def elapse(device: PciDevice, seconds: float) -> None:
    """Runs what a device is to do by then, as if so many seconds had passed.  On the device's thread."""
    device.backend.run_due(time.monotonic_ns() + int(seconds * 1e9))


class Bench:
    """The lab, its client as a driver would leave it, memory and four vectors."""

    def __init__(self, lab: Lab, client: Client, by_fd: bool = True) -> None:
        self.lab = lab
        self.client = client
        self.ram = client.share(0, RAM, by_fd=by_fd)
        self.events: list[EventFd] = []
        self.clock = Clock()

    def enable(self, *, msi: bool = True) -> None:
        """Memory, bus mastering, and interrupts."""
        self.client.region_write(Region.CONFIG, 4, b"\x07\x00")
        if msi:
            self.messages(_MSI_ENABLE)
        self.events = self.client.eventfds(Irq.MSI if msi else Irq.INTX, 4 if msi else 1)

    def messages(self, control: int) -> None:
        """Writes MSI's Message Control."""
        at = next(at for name, at, _ in self.lab.config.places if name == "msi")
        self.client.region_write(Region.CONFIG, at + 2, control.to_bytes(2, "little"))

    def get(self, offset: int) -> int:
        return int.from_bytes(self.client.region_read(0, offset, 4), "little")

    def put(self, offset: int, value: int, *, posted: bool = False) -> None:
        self.client.region_write(0, offset, value.to_bytes(4, "little"), posted=posted)

    def settle(self) -> None:
        """What was posted before has been done."""
        self.client.info()

    def elapse(self, seconds: float) -> None:
        """So much time passes for the plan, and for the device's timers: those that are due run."""
        self.clock.now += seconds
        done = threading.Event()

        def run() -> None:
            try:
                elapse(self.lab, seconds)
            finally:
                done.set()

        self.lab.post(run)
        assert done.wait(patience(20)), "the device's thread does not run what was posted to it"

    def copy(self, data: bytes) -> None:
        """The device copies `data` from SOURCE to TARGET."""
        self.ram.view[SOURCE : SOURCE + len(data)] = data
        self.put(COPY, len(data))

    def target(self, size: int, at: int = TARGET) -> bytes:
        return bytes(self.ram.view[at : at + size])

    @property
    def done(self) -> bool:
        return self.target(4, DONE) == b"\1\0\0\0"

    def raised(self, vector: int = 0) -> int:
        """How often it was signalled since it was last asked."""
        return 0 if self.events[vector].quiet() else self.events[vector].wait()


def eventually(check: Callable[[], Any], seconds: float = 5.0) -> bool:
    """Whether it becomes true."""
    deadline = time.monotonic() + patience(seconds)
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


@contextmanager
def bench(folder: Path, *, enabled: bool = True, by_fd: bool = True) -> Iterator[Bench]:
    """A lab that is served."""
    lab = Lab()
    server = Server()
    server.add(lab, folder / "lab.sock")
    with server, Client.connect(folder / "lab.sock") as client:
        client.negotiate()
        made = Bench(lab, client, by_fd)
        if enabled:
            made.enable()
        yield made
        for event in made.events:
            event.close()
    lab.close()


@contextmanager
def armed(bench: Bench, *rules: str, seed: int = 0, heal: dict[str, Any] | None = None) -> Iterator[Engine]:
    """Rules in the command line's form, at work on a lab, by its own clock."""
    plan = FaultPlan(seed=seed, rule=tuple(parse_rule(rule) for rule in rules))
    if heal is not None:
        plan = FaultPlan.model_validate({"heal": heal, "rule": list(plan.rule), "seed": seed})
    with Engine(plan, [bench.lab], clock=bench.clock, sleep=bench.clock.sleep) as engine:
        yield engine


def fired(engine: Engine) -> list[dict[str, Any]]:
    """What was logged."""
    return engine.journal.since()
