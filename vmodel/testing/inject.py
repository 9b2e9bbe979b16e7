"""`Inject`: arms faults on the devices of a test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vmodel.device import PciDevice
from vmodel.errors import ConfigError
from vmodel.inject import Engine, FaultPlan, parse_rule

#: For pytest: what fails here is shown at the line of the test that called.
__tracebackhide__ = True


class Inject:
    """Injects faults into a test's devices: call it with a rule ("dma.write nth=3 do=drop"), a plan, or its file."""

    def __init__(self, devices: Mapping[str, PciDevice], seed: int, artifacts: Path, base: Path) -> None:
        self._devices = devices
        self._seed = seed
        self._artifacts = artifacts
        self._base = base
        self._engines: list[Engine] = []

    def __call__(self, faults: str | Path | FaultPlan) -> None:
        """Arms faults, in addition to those that are armed.  ConfigError: the rule or plan is wrong.

        Paths are relative to the test's folder.  A plan without a seed gets that of --vmodel-seed.
        """
        plan = plan_of(faults, self._base)
        self._artifacts.mkdir(parents=True, exist_ok=True)
        path = self._artifacts / f"injections-{len(self._engines) + 1}.jsonl"
        self._engines.append(Engine(plan.extended((), plan.seed or self._seed), dict(self._devices), path=path))

    @property
    def log(self) -> list[dict[str, Any]]:
        """The injections so far: the records of the plans' journals, in the order of the plans."""
        return [record for engine in self._engines for record in engine.journal.since(0, len(engine.journal))]

    @property
    def rules(self) -> list[dict[str, Any]]:
        """The armed rules, with how often each matched and fired."""
        return [rule for engine in self._engines for rule in engine.describe()]

    def heal(self) -> None:
        """Disarms all faults."""
        for engine in self._engines:
            engine.close()


def plan_of(faults: str | Path | FaultPlan, base: Path) -> FaultPlan:
    """A plan, from a rule, a plan's file or a plan.  ConfigError."""
    try:
        if isinstance(faults, Path) or (isinstance(faults, str) and faults.endswith(".toml")):
            return FaultPlan.load(base / faults)
        if isinstance(faults, str):
            return FaultPlan().extended([parse_rule(faults, "the rule")])
    except ConfigError as error:
        raise error.with_traceback(None) from None  # its text says where the mistake is
    return faults
