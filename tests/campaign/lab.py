"""An experiment without a guest: vmodel's own client drives the served edu device as a driver would, under a plan.

Workloads: `copy N` moves N blocks to the device and back, and only then looks at them; `careful N` looks at each and
tries again.  Before them may stand `note FILE`, which appends a line to a file, `kill FILE`, which kills this process
unless the file is there (and makes it), `sleep SECONDS`, `die now`, `refuse WORD`, which is the
user's mistake, and `break WORD`, which is one of this file.

A case's coverage is of a module's file: of its function `probe`, and of those of the same names as what the driver did,
`copy` or `careful`, `retry` and `fail`.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
from pathlib import Path

from vmodel import machine as machines
from vmodel.campaign.rig import host_versions
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.program import Program
from vmodel.errors import ConfigError
from vmodel.experiment.case import Case, Result
from vmodel.experiment.oracle import DATA_WRONG, Effect, Finding, classify, of_status
from vmodel.inject import Engine, FaultPlan
from vmodel.vfio_user.client import Client, Ram

ID, IRQ_STATUS, IRQ_ACK, SRC, DST, COUNT, CMD = 0x00, 0x24, 0x64, 0x80, 0x88, 0x90, 0x98
BUFFER, DONE, SIZE = 0x40000, 0x100, 256


class Panic(Exception):
    """The driver has met what it holds for impossible."""


class Stuck(Exception):
    """The driver waits for what never comes."""


class Driver:
    """Drives edu."""

    def __init__(self, client: Client, case: Case) -> None:
        self.client = client
        self.case = case
        self.ram: Ram = client.share(0, 0x10000)
        self.findings: list[Finding] = []
        self.start = time.monotonic()
        client.region_write(7, 4, b"\6\0")  # Command: memory space and bus mastering

    def get(self, register: int, size: int = 4) -> int:
        return int.from_bytes(self.client.region_read(0, register, size), "little")

    def put(self, register: int, value: int, size: int = 8) -> None:
        self.client.region_write(0, register, value.to_bytes(size, "little"))

    def now(self) -> float:
        return time.monotonic() - self.start

    def transfer(self, source: int, target: int, to_ram: bool) -> bool:
        """One transfer; whether the device says that it is done."""
        for register, value in ((SRC, source), (DST, target), (COUNT, SIZE)):
            self.put(register, value)
        self.put(CMD, 1 | to_ram << 1 | 4)
        while self.get(CMD, 8) & 1:
            if self.now() > self.case.timeout:
                raise Stuck
        done = bool(self.get(IRQ_STATUS) & DONE)
        self.put(IRQ_ACK, DONE, 4)
        return done

    def block(self, n: int) -> bool:
        """There and back; whether the device was content."""
        data = bytes((n + k) & 0xFF for k in range(SIZE))
        self.ram.view[0x1000 : 0x1000 + SIZE] = data
        self.ram.view[0x2000 : 0x2000 + SIZE] = bytes(SIZE)
        return self.transfer(0x1000, BUFFER, False) and self.transfer(BUFFER, 0x2000, True)

    def right(self, n: int) -> bool:
        return bytes(self.ram.view[0x2000 : 0x2000 + SIZE]) == bytes((n + k) & 0xFF for k in range(SIZE))

    def noticed(self, what: str, n: int) -> None:
        self.findings.append(
            Finding(
                oracle="kernel log",
                effect=Effect.NOTICED,
                sign="edu",
                text=f"edu0: block {n}: {what}",
                signature=f"edu: block: {what}",
                at=self.now(),
            )
        )

    def copy(self, count: int) -> int:
        wrong = 0
        for n in range(count):
            if not self.block(n):
                return 5
            wrong += not self.right(n)
        return DATA_WRONG if wrong else 0

    def careful(self, count: int) -> int:
        for n in range(count):
            for _ in range(3):
                done = self.block(n)
                if done and self.right(n):
                    break
                self.noticed("checksum" if done else "no completion", n)
            else:
                return 5
        return 0

    def run(self) -> int:
        """The workload's exit status."""
        if self.get(ID) != 0x010000ED:
            raise Panic
        words = self.case.workload.split()
        while words:
            verb, argument, *words = words
            if verb in ("copy", "careful"):
                return self.copy(int(argument)) if verb == "copy" else self.careful(int(argument))
            if verb == "note":
                with Path(argument).open("a") as file:
                    file.write(f"{self.case.name}\n")
            elif verb == "sleep":
                time.sleep(float(argument))
            elif verb == "kill" and not Path(argument).exists():
                Path(argument).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            elif verb == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif verb == "refuse":
                raise ConfigError(argument)
            elif verb == "break":
                raise RuntimeError(f"the lab is broken: {argument}")
        return 0


def coverage(module: Path, case: Case, retried: bool, failed: bool) -> Coverage:
    """What a driver with this code would have run."""
    program = Program.of_module(module.stem, module.read_bytes())
    names = ["probe", *case.workload.split()[:1], *(["retry"] if retried else []), *(["fail"] if failed else [])]
    functions = [function for function in program.functions if function.name in names]
    return Coverage.of_ranges(program, [(i.address, i.address + 1) for f in functions for i in f.instructions])


class Lab:
    """The rig."""

    def __init__(self) -> None:
        self._cases = 0

    def __enter__(self) -> Lab:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, case: Case, folder: Path) -> Result:
        self._cases += 1
        began = time.monotonic()
        machine = machines.load(case.machine)
        plan = case.seeded() or FaultPlan()
        with tempfile.TemporaryDirectory() as sockets:
            try:
                with machine.serve(Path(sockets)):
                    return self._drive(case, machine, plan, Path(sockets), folder, began)
            finally:
                machine.close()

    def _drive(
        self, case: Case, machine: machines.Machine, plan: FaultPlan, sockets: Path, folder: Path, began: float
    ) -> Result:
        findings: list[Finding] = []
        status: int | None = None
        with Client.connect(machine.socket("edu0", sockets)) as client:
            client.negotiate()
            driver = Driver(client, case)
            with Engine(plan, machine.devices) as engine:
                try:
                    status = driver.run()
                    findings += [found for found in (of_status("status", status, driver.now()),) if found]
                except Stuck:
                    text = f"no end after {case.timeout:g} s"
                    findings.append(
                        Finding(oracle="time", effect=Effect.HANG, sign="time", text=text, signature="hang")
                    )
                except Panic:
                    text = "kernel BUG at edu.c:17: edu_probe+0x42/0x100"
                    findings.append(
                        Finding(
                            oracle="kernel log",
                            effect=Effect.CRASH,
                            sign="bug",
                            text=text,
                            signature="BUG edu_probe",
                            at=driver.now(),
                        )
                    )
                ended = driver.now()
                rules, records = tuple(engine.describe()), tuple(engine.journal.since(most=10_000))
        findings = sorted([*driver.findings, *findings], key=lambda f: f.at or 0)
        outcome = classify(findings, injected=bool(records))
        first = records[0]["t"] if records else None
        seen = [f.at for f in findings if f.at is not None]
        recovered = first is not None and outcome.name == "RECOVERED"
        (folder / "kernel.log").write_text("".join(f"{f.text}\n" for f in findings))
        (folder / "injections.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
        kept = {"kernel log": "kernel.log", "injections": "injections.jsonl"}
        if case.coverage:
            reached = coverage(Path(case.coverage[0]), case, bool(driver.findings), status != 0)
            (folder / "coverage.json").write_text(json.dumps(reached.to_json()))
            kept["coverage"] = "coverage.json"
        return Result(
            outcome=outcome,
            evidence=tuple(findings),
            signatures=tuple(dict.fromkeys(f.signature for f in findings)),
            status=status,
            check_status=None,
            injected=len(records),
            injections=records,
            rules=rules,
            time_to_detect=max(seen[0] - first, 0.0) if seen and first is not None else None,
            time_to_recover=max(ended - first, 0.0) if recovered and first is not None else None,
            workload_time=ended,
            wall=time.monotonic() - began,
            artefacts=kept,
            versions={**host_versions(), "kernel": "none"},
            seed=case.seed,
            nth=self._cases,
        )
