"""A search on the simulated program, without a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tests.explore.simulated import BUGS, run
from vmodel.devices.edu import Edu
from vmodel.experiment.case import Case
from vmodel.explore.search import LAG, Attempt, Observation, Search
from vmodel.explore.space import PlanSpace
from vmodel.explore.survey import Site, sites, survey_plan
from vmodel.inject import FaultPlan

DEVICES = {"edu0": Edu("edu0")}


def case(plan: FaultPlan | None) -> Case:
    return Case(machine=Path("edu.toml"), workload="", plan=plan)


def surveyed() -> list[Site]:
    """The sites of the run without faults."""
    _, _, log = run(case(survey_plan(DEVICES)))
    return sites(log, DEVICES)


def space(**options: bool) -> PlanSpace:
    return PlanSpace(surveyed(), "workload", DEVICES, **options)


def observed(attempt: Attempt) -> Observation:
    """The attempt's run."""
    result, reached, log = run(case(attempt.plan))
    code = {("simulated", number) for number in reached}
    found = sites(log, DEVICES) if attempt.how == "survey" else ()
    features = frozenset(code | {("signature", text) for text in result.signatures})
    return Observation(result.outcome, features, found, [int(rule["fired"]) for rule in result.rules])


def searched(
    budget: int,
    *,
    seed: int = 0,
    feedback: bool = True,
    observe: Callable[[Attempt], Observation] = observed,
) -> tuple[Search, list[tuple[Attempt, Observation]]]:
    """A search of so many runs, and its runs."""
    _, clean, _ = run(case(None))
    known = frozenset(("simulated", number) for number in clean)
    search = Search(space(), DEVICES, known, seed=seed, feedback=feedback)
    done: list[tuple[Attempt, Observation]] = []
    for number in range(1, budget + 1):
        if number > LAG:
            search.take(*done[number - LAG - 1])
        attempt = search.propose(number)
        if attempt is None:
            break
        done.append((attempt, observe(attempt)))
    return search, done


def bugs(done: Sequence[tuple[Attempt, Observation]]) -> set[str]:
    """The planted bugs that runs have found."""
    return {str(text) for _, seen in done for kind, text in seen.features if kind == "signature"} & set(BUGS)
