"""Sweeps: the 1st, 2nd, 3rd ... event at one point fails, each in a run of its own, until each has failed once."""

from __future__ import annotations

from vmodel.campaign.matrix import ACCEPTABLE, CONTROL, Run, inputs, opened
from vmodel.campaign.progress import Reporter
from vmodel.campaign.rig import GUESTS
from vmodel.campaign.runner import Runner
from vmodel.campaign.store import ResultStore, Row
from vmodel.errors import ConfigError
from vmodel.experiment.case import Case
from vmodel.experiment.oracle import Outcome
from vmodel.inject import ACTIONS, Engine, FaultPlan, Rule, parse_rule
from vmodel.inject.terse import split
from vmodel.mistakes import gist
from vmodel.points import Point

#: The default action is the first of these that the point supports.
_DEFAULTS = ("abort", "fault", "drop", "disconnect", "delay")
#: Keys of a rule that a sweep sets itself.
_OWN = ("nth", "every", "first", "probability", "once", "times", "name")


class CleanRunError(Exception):
    """The run without a fault is not as expected: a sweep would say nothing."""


class Sweep:
    """The runs of a sweep."""

    def __init__(self, case: Case, where: str, do: str | None = None, *, rig: str = GUESTS, seed: int = 0) -> None:
        """`where`: a rule in the command line's form, without action and schedule.

        ConfigError: `where` or `do` is wrong, or the case's machine cannot be loaded.
        """
        for word in split(where):
            key = word.partition("=")[0]
            if key in _OWN:
                raise ConfigError(f"--point {where!r}: the sweep sets {key}: leave it out")
            if key == "do":
                raise ConfigError(f"--point {where!r}: name the action with --do")
        self.where = where
        self.do = do or _default(where)
        self.case = case
        self.seed = seed
        self._rig = rig
        with opened(case.machine) as machine:
            try:
                Engine(FaultPlan(rule=(self._rule("nth=1"),)), machine.devices).close()
            except ConfigError as error:
                raise ConfigError(f"--point {str(error).removeprefix('--point ')}") from error

    def _rule(self, schedule: str) -> Rule:
        return parse_rule(f"{self.where} do={self.do} {schedule}", "--point")

    def _run(self, title: str, schedule: str) -> Run:
        plan = FaultPlan(seed=self.seed, rule=(self._rule(schedule),))
        expect = (Outcome.NOT_ACTIVATED,) if title == CONTROL else ACCEPTABLE
        case = self.case.model_copy(update={"name": title, "plan": plan, "seed": self.seed})
        return Run(
            machine=self.case.machine.stem,
            kernel=self.case.kernel or "",
            workload="sweep",
            plan=title,
            seed=self.seed,
            case=case,
            expect=expect,
            inputs=inputs(case, self._rig),
            rig=self._rig,
        )

    def clean(self) -> Run:
        """The run without faults, which counts the events."""
        return self._run(CONTROL, "probability=0")

    def nth(self, n: int) -> Run:
        """The run in which event `n` fails, from 1."""
        return self._run(f"{self.where} do={self.do} nth={n}", f"nth={n}")

    def definition(self) -> dict[str, str]:
        """The sweep's definition for `ResultStore.create`."""
        return {"kind": "sweep", "name": f"{self.case.machine.stem}: {self.where} do={self.do}"}


def carry_out(sweep: Sweep, store: ResultStore, runner: Runner, reporter: Reporter, most: int) -> int:
    """Runs a sweep, with at most `most` events failed; returns how many events the clean run had.

    CleanRunError: the run without a fault fails, too.  ConfigError: the store has another version of this sweep.
    """
    clean = sweep.clean()
    first = store.rows()[:1]
    if first and first[0].run.key != clean.key:
        text = (
            f"{store.folder}: contains another version of this sweep (its workload, machine or a program has changed)"
        )
        raise ConfigError(f"{text}: name another folder with -o")
    (id,) = store.add([clean])
    runner.finish()
    row = store.row(id)
    assert row.result is not None
    if not row.expected:
        why = "; ".join(gist(finding.text) for finding in row.result.evidence[:3])
        raise CleanRunError(f"{row.folder}: the run without a fault fails, too: {row.result.outcome.value}: {why}")
    count = sum(int(rule.get("matched", 0)) for rule in row.result.rules)
    if count > most:
        reporter.note(f"{count} events: only the first {most} will fail (--most)")
    else:
        reporter.note(f"{count} events")
    last = _finish(store, runner, [sweep.nth(n) for n in range(1, min(count, most) + 1)])
    # After a fault, a driver may cause more events than without one.
    n = count
    while last is not None and fired(last) and n < most:
        n += 1
        last = _finish(store, runner, [sweep.nth(n)])
    return count


def _finish(store: ResultStore, runner: Runner, runs: list[Run]) -> Row | None:
    ids = store.add(runs)
    runner.finish()
    return store.row(ids[-1]) if ids else None


def fired(row: Row) -> bool:
    """Whether a rule of the run's plan fired."""
    return row.result is not None and any(rule.get("fired") for rule in row.result.rules)


def _default(where: str) -> str:
    name = split(where)[:1]
    try:
        point = Point(name[0]) if name else None
    except ValueError:
        point = None
    if point is None:
        known = ", ".join(point.value for point in Point)
        raise ConfigError(f"--point {where!r}: must begin with a point: {known}")
    return next(do for do in _DEFAULTS if point in ACTIONS[do].points)
