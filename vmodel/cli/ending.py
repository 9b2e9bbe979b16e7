"""How `vmodel guest` and `vmodel run` end: their own exit statuses, and what they are given for."""

from __future__ import annotations

import enum
import sys
from collections.abc import Collection
from typing import Annotated

import typer

from vmodel.errors import ConfigError
from vmodel.experiment.kernel_log import Where, findings
from vmodel.experiment.oracle import Finding
from vmodel.guest.kernel_lines import lines_of
from vmodel.guest.running import GuestPanic, GuestRunError, GuestTimeout, ModuleError
from vmodel.machine import Machine

#: As of timeout(1), env(1) and others, which also run a command and return its status.
TIMED_OUT, OWN_FAILURE = 124, 125


class Kind(enum.StrEnum):
    """What can go wrong in a guest even if its command succeeds."""

    PANIC = "panic"
    MODEL = "model"
    OOPS = "oops"
    WARN = "warn"


#: By kind, the first that is found first.  70 is EX_SOFTWARE of sysexits.h.
STATUS = {Kind.PANIC: 71, Kind.MODEL: 70, Kind.OOPS: 72, Kind.WARN: 73}
#: The signs of `kernel_log` that are of a kind.
_SIGNS = {
    "panic": Kind.PANIC,
    **dict.fromkeys(("oops", "bug", "kasan", "memory"), Kind.OOPS),
    **dict.fromkeys(("warn", "softlockup", "hardlockup", "hung-task", "rcu-stall"), Kind.WARN),
    **dict.fromkeys(("lockdep", "ubsan", "dma-api", "debug-objects", "kmemleak"), Kind.WARN),
}

FailOn = Annotated[
    str,
    typer.Option(
        "--fail-on",
        metavar="KIND,...",
        help="What fails a run although its command succeeds: some of panic, model, oops, warn.  A panic always does.",
    ),
]
FAIL_ON = "panic,model,oops"


def kinds(text: str) -> set[Kind]:
    """The kinds of --fail-on.  ConfigError: there is no such kind."""
    words = text.replace(" ", "").split(",")
    if unknown := set(words) - set(Kind):
        raise ConfigError(f"--fail-on {text}: {', '.join(sorted(unknown))!r}: must be some of {', '.join(Kind)}")
    return {Kind(word) for word in words}


def kernel_findings(console: str, where: Where) -> list[tuple[Kind, Finding]]:
    """The panics, oopses and warnings that a kernel has printed on its console; `where` finds their source."""
    found = findings(lines_of(console), unknown=False, where=where)
    return [(_SIGNS[one.sign], one) for one in found if one.sign in _SIGNS]


def status_of(command: int, found: Collection[Kind], fail_on: Collection[Kind]) -> int:
    """The exit status: 71 after a panic; else the command's; if that is 0, that of the first kind in `fail_on`."""
    if Kind.PANIC in found:
        return STATUS[Kind.PANIC]
    return command or next((status for kind, status in STATUS.items() if kind in found and kind in fail_on), 0)


def status_of_error(error: GuestRunError, found: Collection[Kind], fail_on: Collection[Kind]) -> int:
    """The exit status for a command that did not run to its end.  An oops may be why a module did not load."""
    if isinstance(error, GuestPanic):
        return STATUS[Kind.PANIC]
    if isinstance(error, ModuleError) and Kind.OOPS in found and Kind.OOPS in fail_on:
        return STATUS[Kind.OOPS]
    return TIMED_OUT if isinstance(error, GuestTimeout) else OWN_FAILURE


def model_errors(machine: Machine) -> bool:
    """Prints what models have failed with on stderr, a line for each; returns whether there is any."""
    for name, device in machine.devices.items():
        found = device.backend.model_errors
        for error in found:
            print(f"vmodel: model error: {name}: {error}", file=sys.stderr)
        if more := device.backend.bugs - len(found):
            print(f"vmodel: model error: {name}: {more} more", file=sys.stderr)
        if device.backend.abandoned:
            print(f"vmodel: model error: {name}: a hook or callback did not return", file=sys.stderr)
    return any(device.backend.bugs or device.backend.abandoned for device in machine.devices.values())
