"""A driver that is a Python program: what of it runs depends on the plan of faults alone, and five bugs are planted.

It makes the events of a device by itself, and passes them through the real engine; so plans mean what they mean for
guests, in a millisecond a run.  Its coverage are the numbers of `reached`, its bugs those of BUGS.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from vmodel.campaign.rig import host_versions
from vmodel.devices.edu import Edu
from vmodel.errors import DmaFault
from vmodel.experiment.case import Case, Result
from vmodel.experiment.oracle import DATA_WRONG, Effect, Finding, classify, of_status
from vmodel.inject import (
    CompletionEvent,
    DmaEvent,
    DoorbellEvent,
    Engine,
    Event,
    FaultPlan,
    InterruptEvent,
    MmioEvent,
    Phase,
    Point,
)

ID, STATUS, IRQ_ACK = 0x00, 0x20, 0x64
BUSY = 0x01
COMMANDS = 6
VERSIONS = {**host_versions(), "kernel": "none"}
#: What each planted bug is called in its finding's signature.
BUGS = ("double free", "use after free", "endless loop", "data", "not checked")
#: After how many cases of a process the disk is full, with the workload "full".
FULL = 12
#: The parts of the program that run without faults.
CLEAN = frozenset((0, 1, 3, 8, 10, 11, 12, 40, 41))


class Bug(Exception):
    """A planted bug that crashes."""


class Endless(Exception):
    """A planted bug that never ends."""


class Driver:
    """Loads, does COMMANDS commands, and is removed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.reached: set[int] = {0}
        self.phase = Phase.PROBE
        self.status = 0
        self.outstanding = 0
        self.resets = 0
        self.freed = False

    def _event(self, event: Event, proceed: Callable[[Event], bytes]) -> bytes:
        event.device, event.phase = "edu0", self.phase.value
        return self._engine(event, proceed)

    def get(self, register: int, value: int) -> int:
        event = MmioEvent(Point.MMIO_READ, region=0, address=register, size=4)
        return int.from_bytes(self._event(event, lambda _: value.to_bytes(4, "little")), "little")

    def put(self, register: int, value: int) -> None:
        event = MmioEvent(Point.MMIO_WRITE, region=0, address=register, size=4, data=value.to_bytes(4, "little"))
        self._event(event, lambda _: b"")

    def interrupts(self) -> int:
        """How many interrupts arrive of one."""
        came = []

        def arrive(_: Event) -> bytes:
            came.append(1)
            return b""

        self._event(InterruptEvent(Point.IRQ, vector=0, kind="msi"), arrive)
        return len(came)

    def moved(self, size: int, write: bool) -> bool:
        """Whether a transfer of the device arrives whole."""
        came = []

        def arrive(event: Event) -> bytes:
            assert isinstance(event, DmaEvent)
            came.append(event.data if write else b"\1" * event.size)
            return b"" if write else b"\1" * event.size

        point = Point.DMA_WRITE if write else Point.DMA_READ
        event = DmaEvent(point, address=0x1000, size=size, gpa=lambda: None, data=b"\1" * size if write else None)
        try:
            self._event(event, arrive)
        except DmaFault:
            return False
        return came[-1:] == [b"\1" * size]

    def command(self, queue: int, id: int, opcode: int) -> tuple[int, int] | None:
        """The (id, status) of a command's completion; None: there is none."""
        came = []

        def arrive(event: Event) -> bytes:
            assert isinstance(event, CompletionEvent)
            came.append((event.id, event.status or 0))
            return b""

        self._event(DoorbellEvent(Point.DOORBELL, queue=queue), lambda _: b"")
        self._event(CompletionEvent(Point.COMPLETION, queue=queue, id=id, opcode=opcode, status=0), arrive)
        return came[0] if came else None

    # ---- the driver --------------------------------------------------------------------------

    def run(self) -> int:
        """The exit status of the workload."""
        if self.probe():
            return 1
        self.phase = Phase.RUNNING
        status = max(self.io(n) for n in range(COMMANDS))
        self.phase = Phase.REMOVE
        self.remove()
        return status

    def probe(self) -> int:
        self.reached.add(1)
        if self.get(ID, 0x010000ED) != 0x010000ED:
            self.reached.add(2)
            return 1
        self.reached.add(3)
        for _ in range(10):
            if not self.get(STATUS, 0) & BUSY:
                break
            self.reached.add(4)
        else:
            self.reached.add(5)
            self.put(STATUS, 0)
            if self.get(STATUS, 0) & BUSY:
                self.reached.add(6)
                return 1
            self.reached.add(7)
        self.reached.add(8)
        if not self.moved(64, write=False):
            self.reached.add(9)
            raise Bug("not checked")
        return 0

    def io(self, n: int) -> int:
        self.reached.add(10)
        for attempt in range(2):
            answer = self.command(1, n, 1 + n % 2)
            if answer is None:
                self.reached.add(20)
                self.outstanding += 1
                if not self.aborted(n):
                    continue
            elif answer[0] != n:
                self.reached.add(21)
                return 5
            elif answer[1]:
                self.reached.add(22 + attempt)
                continue
            break
        else:
            self.reached.add(24)
            return 5
        self.reached.add(11)
        if not self.moved(256, write=True):
            self.reached.add(12)
            # Without a reset before, a checksum finds it.
            return DATA_WRONG if self.resets else 5
        self.reached.add(12)
        if not self.interrupts():
            self.reached.add(13)
            self.get(STATUS, 0)
        return 0

    def aborted(self, n: int) -> bool:
        answer = self.command(0, 0x80 + n, 8)
        if answer is not None and not answer[1]:
            self.reached.add(25)
            return False
        self.reached.add(26)
        if answer is None:
            self.reached.add(27)
            self.resets += 1
            if self.get(STATUS, 0) & BUSY:
                self.reached.add(28)
                raise Bug("double free")
        return False

    def remove(self) -> None:
        self.reached.add(40)
        for _ in range(100):
            if not self.get(STATUS, 0) & BUSY:
                break
            self.reached.add(42)
        else:
            raise Endless
        self.put(IRQ_ACK, 1)
        if self.outstanding:
            self.reached.add(43)
            if self.interrupts() > 1:
                self.reached.add(44)
                raise Bug("use after free")
        self.reached.add(41)


class Simulated:
    """A rig that runs the program.

    With the workload "full", the disk is full after so many cases; with "breaks", it fails once.
    """

    def __init__(self) -> None:
        self._cases = 0

    def __enter__(self) -> Simulated:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, case: Case, folder: Path) -> Result:
        """Runs the program under the case's plan."""
        if case.workload == "full" and self._cases >= FULL:
            Path("/dev/full").write_text("x")
        if case.workload == "breaks" and self._cases == FULL:
            self._cases += 1
            raise RuntimeError("the harness broke")
        result, reached, log = run(case, self._cases)
        self._cases += 1
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "injections.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in log))
        (folder / "reached.json").write_text(json.dumps({"simulated": sorted(reached)}))
        return result.model_copy(update={"artefacts": {"injections": "injections.jsonl", "reached": "reached.json"}})


def run(case: Case, nth: int = 0) -> tuple[Result, frozenset[int], list[dict[str, object]]]:
    """The result of a case, what of the program it reached, and the log of its injections."""
    findings: list[Finding] = []
    status: int | None = None
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    with Engine(case.seeded() or FaultPlan(), [Edu("edu0")], clock=lambda: now, sleep=sleep) as engine:
        driver = Driver(engine)
        try:
            status = 7 if case.workload == "fail" else driver.run()
            findings += [found for found in (of_status("status", status, 1.0),) if found]
        except Endless:
            text = "the workload did not end in 30 s"
            findings.append(
                Finding(oracle="time", effect=Effect.HANG, sign="status", text=text, signature="endless loop")
            )
        except Bug as bug:
            text = f"BUG: {bug}: edu_probe+0x42/0x100"
            findings.append(
                Finding(oracle="kernel log", effect=Effect.CRASH, sign="bug", text=text, signature=str(bug), at=1.0)
            )
        rules, log = tuple(engine.describe()), engine.journal.since(most=100_000)
    made = Result(
        outcome=classify(findings, injected=bool(log)),
        evidence=tuple(findings),
        signatures=tuple(dict.fromkeys(finding.signature for finding in findings)),
        status=status,
        check_status=None,
        injected=len(log),
        injections=tuple(log[:1000]),
        rules=rules,
        time_to_detect=None,
        time_to_recover=None,
        workload_time=0.001,
        wall=0.002,
        artefacts={},
        versions=VERSIONS,
        seed=case.seed,
        nth=nth + 1,
    )
    return made, frozenset(driver.reached), log
