"""What the debug kernel finds in a driver with planted bugs, with file and line.  scripts/build-kernel builds it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from tests import needs
from vmodel.experiment.kernel_log import findings
from vmodel.guest.artifacts import DEBUG, find_kernel
from vmodel.guest.booted import BootedGuest
from vmodel.guest.headers import debug_modules
from vmodel.guest.kernel_lines import lines_of
from vmodel.guest.places import Places, finder

pytestmark = [pytest.mark.guest(timeout=600.0), pytest.mark.machine("buggy.toml")]
SOURCE = Path(__file__).parent / "buggy" / "driver" / "buggy.c"
HOW = "/sys/module/buggy/parameters/how"
DEBUGFS = "/sys/kernel/debug"
UNBIND = "/sys/bus/pci/drivers/buggy/unbind"
#: In this order, as lockdep stops with the first report of any kind: what happens, its sign, how its text begins.
BUGS = (
    ("lock-order", "lockdep", "WARNING: possible circular locking dependency detected ("),
    ("sleep", "bug", "BUG: sleeping function called from invalid context at "),
    ("dma-size", "dma-api", "DMA-API: buggy 0000:00:03.0: device driver frees DMA memory with different size "),
    ("index", "ubsan", "UBSAN: array-index-out-of-bounds in "),
    ("shift", "ubsan", "UBSAN: shift-out-of-bounds in "),
    ("timer", "debug-objects", "ODEBUG: free active (active state 0) object: "),
    ("out-of-bounds", "kasan", "BUG: KASAN: slab-out-of-bounds in out_of_bounds"),
    ("use-after-free", "kasan", "BUG: KASAN: slab-use-after-free in use_after_free"),
)


@pytest.fixture(autouse=True)
def debug_kernel() -> None:
    needs.debug_kernel()


def line_of(what: str) -> str:
    """The place in the source that has this comment."""
    text = SOURCE.read_text().splitlines()
    return f"buggy.c:{next(n for n, line in enumerate(text, 1) if f'/* {what} */' in line)}"


@pytest.mark.guest(append="kasan_multi_shot")
def test_planted_bugs(vm_booted: BootedGuest) -> None:
    """Each is one finding with the name of what found it and the place in the source; nothing else is one."""
    vm_booted.dmesg()
    for how, sign, begins in BUGS:
        done = vm_booted.run(f"echo {how} > {HOW}", 180)
        assert done.status == 0, (how, done.output)
        log = vm_booted.dmesg()
        found = findings(lines_of(log, "kernel log"), where=vm_booted.guest.places.of)
        assert [one.sign for one in found] == [sign], f"{how}: {found}\n{log}"
        assert found[0].text.startswith(begins) and f"{line_of(how)}" in found[0].text, f"{found[0]}\n{log}"


@pytest.mark.guest(append="kmemleak=on")
def test_leaks(vm_booted: BootedGuest) -> None:
    """Of a mapping when the driver releases its device, and of memory when kmemleak is asked."""
    vm_booted.dmesg()
    for _ in range(3):
        assert vm_booted.run(f"echo leak > {HOW}", 180).status == 0
    vm_booted.run(f"echo scan > {DEBUGFS}/kmemleak; sleep 6; echo scan > {DEBUGFS}/kmemleak", 300)
    log = vm_booted.dmesg()
    found = findings(lines_of(log, "kernel log"))
    assert [one.sign for one in found] == ["kmemleak"], log
    assert b"[buggy]" in vm_booted.run(f"cat {DEBUGFS}/kmemleak", 180).output
    assert vm_booted.run(f"echo dma-leak > {HOW}; echo 0000:00:03.0 > {UNBIND}", 180).status == 0
    log = vm_booted.dmesg()
    found = findings(lines_of(log, "kernel log"), where=vm_booted.guest.places.of)
    assert [one.sign for one in found] == ["dma-api"], log
    assert "device driver has pending DMA allocations while released from device" in found[0].text


def test_failures_that_are_asked_for(vm_booted: BootedGuest) -> None:
    """They fail, and are no finding."""
    vm_booted.dmesg()
    script = f"echo Y > {DEBUGFS}/failslab/task-filter && echo 2 > {DEBUGFS}/failslab/verbose && "
    script += (
        f"for n in 1 2 3; do sh -c 'echo '$n' > /proc/self/fail-nth; cat {HOW}x /proc/version' > /dev/null; done; true"
    )
    assert vm_booted.run(script, 180).status == 0
    log = vm_booted.dmesg()
    assert "FAULT_INJECTION: forcing a failure." in log
    assert findings(lines_of(log, "kernel log")) == [], log


def test_its_own_modules_have_places_too() -> None:
    kernel = find_kernel(DEBUG)
    (folder,) = debug_modules(kernel)
    with (folder / "nvme.ko").open("rb") as file:
        (probe,) = ELFFile(file).get_section_by_name(".symtab").get_symbol_by_name("nvme_probe")
    line = f"  nvme_probe+0x40/{probe['st_size']:#x} [nvme]"
    found = Places(finder({}, [folder], kernel.release)).of(line)
    assert re.fullmatch(r"linux/drivers/nvme/host/pci\.c:\d+", found)
