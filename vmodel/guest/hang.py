"""Why a guest hangs, seen from outside: which tasks are blocked, and where each CPU is.

The kernel prints both by SysRq: a break on its serial console, then a key (Linux's admin-guide/sysrq.rst).  That needs
a CPU which takes the console's interrupt.  If none does, an NMI makes the kernel panic and print where all CPUs are.
QEMU knows the registers of all CPUs in any case.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from vmodel.guest.monitor import Monitor, MonitorError
from vmodel.patience import patience

#: Kernel arguments that it needs: SysRq whatever the kernel's default is, a panic at an NMI without another cause, and
#: the backtraces of all CPUs at a panic (panic_print's bit 6): QEMU's NMI reaches only the boot CPU.
APPEND = "sysrq_always_enabled unknown_nmi_panic panic_print=0x40"
#: Seconds until the kernel begins to answer; without a further line, the answer is over; the most that it takes then.
_BEGIN, _QUIET, _MOST = 2.0, 0.5, 5.0
#: How often it is asked for blocked tasks, if there seem to be none: one that polls the device is not always asleep.
_TIMES = 4
#: Seconds until it prints a panic by an NMI: Linux 6.12 does so once it has stopped the other CPUs, or given that up.
_PANIC = 15.0
_TASK = re.compile(r"task:(\S+)\s+state:D\b.*?\bpid:(\d+)")
_CPU = re.compile(r"NMI backtrace for cpu (\d+)( skipped: idling)?")
_RIP = re.compile(r"RIP: [0-9a-f]{4}:(\S+(?: \[\w+\])?)")
_COMM = re.compile(r"\bCPU: (\d+) .*?PID: (\d+) Comm: (\S+)")
_FUNCTION = re.compile(r"\] +(?!\?)([A-Za-z_][\w.]*\+0x[0-9a-f]+/0x[0-9a-f]+(?: \[\w+\])?)$")
#: Functions in which any task sleeps.
_SLEEPS = re.compile(r"^(__|io_|preempt_)?schedule|^(__)?wait_for_|^bit_wait|^(__)?mutex_|^rwsem_|^__down|^down_")
#: QEMU's registers of a CPU: its number, RIP, RFLAGS, privilege level, and whether it has halted.
_REGISTERS = re.compile(r"CPU#(\d+)\r?\n.*?\bRIP=([0-9a-f]+) RFL=([0-9a-f]+).*?\bCPL=(\d).*?\bHLT=(\d)", re.DOTALL)
_IF = 0x200


@dataclass(frozen=True)
class Cpus:
    """Where each CPU is, a line for each; and QEMU's text of all registers."""

    lines: tuple[str, ...]
    registers: str


class Examiner:
    """Examines a guest that hangs.  What the kernel prints is on the guest's console, too."""

    def __init__(self, monitor: Monitor, send: Callable[[bytes], None], console: Callable[[], str]) -> None:
        """`send` sends to the console's serial port, whose chardev is "console"; `console` is its text so far."""
        self._monitor = monitor
        self._send = send
        self._console = console

    def blocked(self) -> list[str]:
        """The tasks in uninterruptible sleep, as "NAME:PID in FUNCTION".  MonitorError: QEMU does not answer."""
        self._press(b"9")  # all levels on the console, as the kernel prints stacks at a low one
        for _ in range(_TIMES):
            said = self._press(b"w")
            # One that does not answer would not the next time.
            if (found := _blocked(said)) or not said:
                return found
        return []

    def cpus(self, *, nmi: bool) -> Cpus:
        """Where each CPU is.  `nmi`: if the kernel does not answer, makes it panic.  MonitorError."""
        registers = str(self._monitor.execute("human-monitor-command", {"command-line": "info registers -a"}))
        said = self._press(b"l")
        if not said and nmi:
            before = len(self._console())
            self._monitor.execute("inject-nmi")
            said = self._answer(before, "Kernel panic", _PANIC)
        places = _places(said)
        return Cpus(tuple(_line(cpu, places.get(int(cpu[1]), "")) for cpu in _REGISTERS.finditer(registers)), registers)

    def _press(self, key: bytes) -> str:
        before = len(self._console())
        self._monitor.execute("chardev-send-break", {"id": "console"})
        self._send(key)
        return self._answer(before, "sysrq: ", _BEGIN)

    def _answer(self, before: int, begin: str, within: float) -> str:
        """The console's text since `before`, once it contains `begin` and has ended; empty: not `within` seconds."""
        start = begun = changed = time.monotonic()
        size = before
        while True:
            time.sleep(0.02)
            text, now = self._console()[before:], time.monotonic()
            if len(text) + before != size:
                size, changed = len(text) + before, now
            if begin not in text:
                if now - start > patience(within):
                    return ""
                begun = now
            elif now - changed > patience(_QUIET) or now - begun > patience(_MOST):
                return text


def _blocked(said: str) -> list[str]:
    """The tasks of the kernel's list, as "NAME:PID in FUNCTION"."""
    found: list[str] = []
    open_ = False
    for line in said.splitlines():
        if task := _TASK.search(line):
            found.append(f"{task[1]}:{task[2]}")
            open_ = True
        elif open_ and (function := _FUNCTION.search(line)) and not _SLEEPS.match(function[1]):
            found[-1] += f" in {function[1]}"
            open_ = False
    return found


def _places(said: str) -> dict[int, str]:
    """By CPU, what it runs: "TASK:PID in FUNCTION"; CPUs that idle are left out."""
    found: dict[int, str] = {}
    cpu: int | None = None
    task = ""
    for line in said.splitlines():
        if begin := _CPU.search(line):
            cpu = None if begin[2] else int(begin[1])
        if comm := _COMM.search(line):
            cpu, task = int(comm[1]), f"{comm[3]}:{comm[2]}"
        elif cpu is not None and (rip := _RIP.search(line)):
            found.setdefault(cpu, f"{task} in {rip[1]}" if not rip[1].startswith("0x") else task)
            cpu = None
    return found


def _line(cpu: re.Match[str], place: str) -> str:
    number, rip, flags, level, halted = cpu.groups()
    if halted == "1":
        return f"CPU {number}: idle"
    where = "in user space" if level == "3" else "in the kernel"
    off = "" if int(flags, 16) & _IF else ", interrupts off"
    return f"CPU {number}: {where} at 0x{rip}{off}{f': {place}' if place else ''}"


def examine(examiner: Examiner) -> tuple[list[str], str]:
    """Lines about a guest that hangs, for people; and the registers of its CPUs, empty if QEMU does not answer.

    The guest cannot be used afterwards.
    """
    try:
        blocked = examiner.blocked()
        cpus = examiner.cpus(nmi=True)
    except MonitorError as error:
        return [f"QEMU does not say where its CPUs are: {error}"], ""
    return [*cpus.lines, *(f"blocked: {task}" for task in blocked)], cpus.registers
