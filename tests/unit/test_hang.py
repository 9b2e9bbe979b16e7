"""A guest that hangs is examined from outside: what QEMU and a kernel print, with the pauses that they make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from vmodel.guest import hang
from vmodel.guest.hang import Examiner, examine
from vmodel.guest.monitor import MonitorError

REGISTERS = "\r\n".join(
    f"\r\nCPU#{n}\r\nRAX=0000000000000000 RBX=0000000000000000\r\n"
    f"RIP={rip} RFL={flags} [----A--] CPL={level} II=0 A20=1 SMM=0 HLT={halted}"
    for n, (rip, flags, level, halted) in enumerate(
        [
            ("ffffffffb7f0fa3f", "00000212", 0, 1),
            ("ffffffffc0496051", "00000046", 0, 0),
            ("00007fffdeadbeef", "00000246", 3, 0),
        ]
    )
)
BLOCKED = """
[    9.250585] sysrq: Show Blocked State
[    9.251169] task:provoke-block   state:D stack:0     pid:133   tgid:133   ppid:2      flags:0x00004000
[    9.252314] Call Trace:
[    9.253403]  <TASK>
[    9.254114]  __schedule+0x4ea/0xbe0
[    9.255725]  __wait_for_common+0x8e/0x1e0
[    9.256384]  ? __pfx_provoke_block+0x10/0x10 [provoke]
[    9.256578]  provoke_block+0x15/0x30 [provoke]
[    9.256737]  kthread+0xcf/0x100
[    9.258185]  </TASK>
"""
CPUS = """
[   10.754128] sysrq: Show backtrace of all active CPUs
[   10.754674] NMI backtrace for cpu 1
[   10.755205] CPU: 1 UID: 0 PID: 135 Comm: provoke-spin Tainted: G           OE      6.12.117+deb13-amd64 #1
[   10.765711] RIP: 0010:provoke_spin+0x11/0x20 [provoke]
[   10.784569] NMI backtrace for cpu 2
[   10.788341] CPU: 2 UID: 0 PID: 140 Comm: sh Tainted: G           OE      6.12.117+deb13-amd64 #1
[   10.788964] RIP: 0033:0x7fffdeadbeef
[   10.789000] NMI backtrace for cpu 0 skipped: idling at pv_native_safe_halt+0xf/0x20
"""
PANIC = """
[   38.400000] Kernel panic - not syncing: NMI: Not continuing
[   38.401000] CPU: 1 UID: 0 PID: 126 Comm: provoke-spin Tainted: G           OE      6.12.117+deb13-amd64 #1
[   38.401944] RIP: 0010:provoke_spin+0x11/0x20 [provoke]
[   38.408148]  ? provoke_spin+0x11/0x20 [provoke]
"""


NOBODY = "[    9.250585] sysrq: Show Blocked State\n"


class Fake:
    """QEMU's monitor and a kernel: what it prints by the key that follows a break."""

    def __init__(self, answers: Mapping[bytes, str]) -> None:
        self.answers = dict(answers)
        self.keys: list[bytes] = []
        self.console = "[    1.000000] before\n"
        self.broken = False

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> str:
        if command == "chardev-send-break":
            assert arguments == {"id": "console"}
            self.broken = True
        elif command == "inject-nmi":
            self.console += self.answers[b"nmi"]
        return REGISTERS if command == "human-monitor-command" else ""

    def send(self, key: bytes) -> None:
        assert self.broken, "a key without a break is the input of a program"
        self.broken = False
        self.keys.append(key)
        self.console += self.answers.get(key, "")

    def examiner(self) -> Examiner:
        return Examiner(self, self.send, lambda: self.console)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_BEGIN", "_QUIET", "_PANIC"):
        monkeypatch.setattr(hang, name, 0.05)


def test_a_kernel_that_answers() -> None:
    fake = Fake({b"9": "[    9.0] sysrq: Changing Loglevel\n", b"w": BLOCKED, b"l": CPUS, b"nmi": PANIC})
    lines, registers = examine(fake.examiner())
    assert lines == [
        "CPU 0: idle",
        "CPU 1: in the kernel at 0xffffffffc0496051, interrupts off: provoke-spin:135 in provoke_spin+0x11/0x20"
        " [provoke]",
        "CPU 2: in user space at 0x00007fffdeadbeef: sh:140",
        "blocked: provoke-block:133 in provoke_block+0x15/0x30 [provoke]",
    ]
    assert registers == REGISTERS
    assert "panic" not in fake.console


def test_a_kernel_that_takes_no_interrupt() -> None:
    lines, _ = examine(Fake({b"nmi": PANIC}).examiner())
    assert lines[1].endswith("interrupts off: provoke-spin:126 in provoke_spin+0x11/0x20 [provoke]")
    assert lines[2] == "CPU 2: in user space at 0x00007fffdeadbeef"


@pytest.mark.parametrize(("asleep", "asked"), [(1, 1), (3, 3), (9, 4)])
def test_a_task_that_polls_is_not_asleep_each_time(asleep: int, asked: int) -> None:
    class Polling(Fake):
        def send(self, key: bytes) -> None:
            self.answers[b"w"] = BLOCKED if self.keys.count(b"w") + 1 >= asleep else NOBODY
            super().send(key)

    fake = Polling({})
    assert len(fake.examiner().blocked()) == (asleep <= 4)
    assert fake.keys.count(b"w") == asked


def test_a_kernel_that_does_not_answer_is_asked_once() -> None:
    fake = Fake({})
    assert fake.examiner().blocked() == [] and fake.keys == [b"9", b"w"]


def test_without_an_nmi_it_stays_as_it_is() -> None:
    cpus = Fake({}).examiner().cpus(nmi=False)
    assert cpus.lines[1] == "CPU 1: in the kernel at 0xffffffffc0496051, interrupts off"


def test_a_qemu_that_does_not_answer() -> None:
    class Dead(Fake):
        def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> str:
            raise MonitorError("QMP: TimeoutError")

    assert examine(Dead({}).examiner()) == (["QEMU does not say where its CPUs are: QMP: TimeoutError"], "")
