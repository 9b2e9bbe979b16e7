"""Exit statuses of `vmodel guest`: --fail-on, and what a console shows."""

from __future__ import annotations

import pytest

from vmodel.cli.ending import FAIL_ON, Kind, kernel_findings, kinds, status_of, status_of_error
from vmodel.errors import ConfigError
from vmodel.guest.running import GuestOff, GuestPanic, GuestTimeout, LogError, ModuleError, QemuDied


@pytest.mark.parametrize(
    ("command", "found", "fail_on", "status"),
    [
        (0, "", "panic,model,oops,warn", 0),
        (0, "model", FAIL_ON, 70),
        (0, "oops", FAIL_ON, 72),
        (0, "warn", FAIL_ON, 0),
        (0, "warn", "warn", 73),
        (0, "warn,oops,model", "panic,model,oops,warn", 70),
        (0, "oops,warn", "model", 0),
        (3, "oops,warn,model", "panic,model,oops,warn", 3),
        (0, "panic", "model", 71),
        (3, "panic", "model", 71),
    ],
)
def test_a_status(command: int, found: str, fail_on: str, status: int) -> None:
    kinds_found = kinds(found) if found else set()
    assert status_of(command, kinds_found, kinds(fail_on)) == status


def test_statuses_of_commands_that_do_not_end() -> None:
    ends = {GuestPanic: 71, GuestTimeout: 124, GuestOff: 125, LogError: 125, ModuleError: 125, QemuDied: 125}
    for found, more in ((set(), {}), ({Kind.OOPS}, {ModuleError: 72})):
        assert {kind: status_of_error(kind(""), found, kinds(FAIL_ON)) for kind in ends} == ends | more
    assert status_of_error(ModuleError(""), {Kind.OOPS}, {Kind.MODEL}) == 125


@pytest.mark.parametrize("text", ["", "panic,", "Panic", "all", "oops;warn"])
def test_unknown_kinds(text: str) -> None:
    with pytest.raises(ConfigError, match=r"must be some of panic, model, oops, warn$"):
        kinds(text)


def test_spaces_and_repetitions() -> None:
    assert kinds("warn, oops,warn") == {Kind.WARN, Kind.OOPS}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("Kernel panic - not syncing: Fatal exception", Kind.PANIC),
        ("BUG: unable to handle page fault for address: ffffc90000000000", Kind.OOPS),
        ("Oops: general protection fault, probably for non-canonical address 0x1: 0000 [#1] SMP NOPTI", Kind.OOPS),
        ("kernel BUG at mm/slub.c:1!", Kind.OOPS),
        ("BUG: KASAN: slab-out-of-bounds in probe+0x1/0x2", Kind.OOPS),
        ("list_add corruption. next->prev should be prev", Kind.OOPS),
        ("WARNING: CPU: 0 PID: 1 at kernel/x.c:5 probe+0x1/0x2 [card]", Kind.WARN),
        ("WARNING: possible circular locking dependency detected", Kind.WARN),
        ("UBSAN: array-index-out-of-bounds in card.c:5:6", Kind.WARN),
        ("DMA-API: card 0000:00:03.0: device driver frees DMA memory with different size", Kind.WARN),
        ("watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [sh:1]", Kind.WARN),
        ("INFO: task sh:55 blocked for more than 120 seconds.", Kind.WARN),
        ("rcu: INFO: rcu_preempt self-detected stall on CPU", Kind.WARN),
    ],
)
def test_kinds_of_a_console(line: str, kind: Kind) -> None:
    ((found, finding),) = kernel_findings(
        f"[    1.000000] fine\n[    2.000000] {line}\nnot of the kernel\n", lambda place: ""
    )
    assert (found, finding.text) == (kind, line)


def test_what_is_no_failure() -> None:
    """Reports of buses and drivers are the command's to judge."""
    assert not kernel_findings(
        "[    1.000000] pcieport 0000:00:01.0: AER: Correctable error\n"
        "[    2.000000] nvme nvme0: I/O tag 1 (1001) QID 1 timeout, aborting\n"
        "BUG: unable to handle, says the command\n",
        lambda place: "",
    )
