"""What a stock NVMe driver does when its controller misbehaves: known truths, on one guest for each kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.guest.kernels import CHOSEN
from tests.guest.shell import LOOP, Shell
from vmodel.guest.artifacts import find_kernel
from vmodel.guest.running import Guest, GuestSpec
from vmodel.inject import Engine, FaultPlan, parse_rule
from vmodel.machine import parse

pytestmark = pytest.mark.guest

MACHINE = """
[machine]
name = "faults"

[[device]]
name = "nvme0"
model = "nvme"
address = "0000:00:03.0"
params = { queues = 2, namespaces = [ { memory = "16M", lba = 4096 } ] }
"""
#: One block of zeros to the disk, and one from it, past the page cache.
WRITE = "dd if=/dev/zero of=/dev/nvme0n1 bs=4096 count=1 seek=3 conv=fsync 2>&1"
READ = "echo 3 >/proc/sys/vm/drop_caches; dd if=/dev/nvme0n1 bs=4096 count=1 skip=3 2>&1 >/tmp/block"


class Lab:
    """A guest with a controller, and rules for it."""

    def __init__(self, engine: Engine, shell: Shell) -> None:
        self.engine, self.shell = engine, shell

    @contextmanager
    def armed(self, rule: str) -> Iterator[None]:
        name = self.engine.add(parse_rule(rule))
        self.shell.run("dmesg -c >/dev/null")
        try:
            yield
        finally:
            self.engine.remove(name)

    @property
    def log(self) -> str:
        return self.shell.run("dmesg")


@pytest.fixture(scope="module", params=CHOSEN)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("faults")
    machine = parse(MACHINE, folder / "m.toml")
    try:
        with Engine(FaultPlan(), machine.devices, path=folder / "log.jsonl") as engine, machine.serve(folder):
            spec = GuestSpec(
                command=LOOP,
                kernel=find_kernel(request.param),
                modules=["nvme"],
                qemu_args=machine.qemu_args(folder),
                timeout=240,
            )
            with Guest(spec, artifacts=folder / "logs") as guest:
                made = Lab(engine, Shell(guest))
                # The driver waits for 30 s otherwise.
                made.shell.run("echo 3000 >/sys/block/nvme0n1/queue/io_timeout")
                yield made
    finally:
        machine.close()


def test_an_aborted_read_of_memory_is_an_io_error(lab: Lab) -> None:
    """And no corruption: what was there before stays."""
    lab.shell.run(WRITE)
    with lab.armed("dma.read device=nvme0 size=4096 do=abort"):
        lab.shell.fails(WRITE.replace("/dev/zero", "/dev/urandom"), "error|Input/output")
        assert "I/O error" in lab.log
    lab.shell.run(f"{READ}; cmp -n 4096 /tmp/block /dev/zero")


def test_one_that_is_aborted_once_is_tried_again(lab: Lab) -> None:
    with lab.armed("dma.read device=nvme0 size=4096 once do=abort"):
        lab.shell.run(WRITE)
    lab.shell.run(f"{READ}; cmp -n 4096 /tmp/block /dev/zero")


def test_a_flipped_bit_is_silent(lab: Lab) -> None:
    lab.shell.run(WRITE)
    with lab.armed("dma.write device=nvme0 size=4096 do=flip"):
        lab.shell.run(READ)
        lab.shell.fails("cmp -n 4096 /tmp/block /dev/zero", "differ")
        assert "rror" not in lab.log
    lab.shell.run(f"{READ}; cmp -n 4096 /tmp/block /dev/zero")


def test_a_lost_interrupt_is_polled_for(lab: Lab) -> None:
    with lab.armed("irq device=nvme0 phase=running once do=drop"):
        lab.shell.run(READ)
        assert "completion polled" in lab.log


def test_a_lost_completion_ends_in_a_reset(lab: Lab) -> None:
    with lab.armed("completion device=nvme0 queue=1,2 opcode=2 once do=drop"):
        lab.shell.run(READ)
        log = lab.log
        assert "timeout" in log and ("reset controller" in log or "aborting" in log.lower())
    lab.shell.run(f"{READ}; cmp -n 4096 /tmp/block /dev/zero")


def test_surprise_removal(lab: Lab) -> None:
    """The last one: QEMU does not connect again."""
    with lab.armed("doorbell device=nvme0 queue=1,2 once do=disconnect"):
        lab.shell.fails(READ, timeout=90)
    lab.shell.run("true")
