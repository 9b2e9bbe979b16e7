"""A search in a store: any number of jobs, interruptions and what it finds."""

from __future__ import annotations

import json
import random
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.campaign.files import MACHINE
from tests.explore.simulated import BUGS, CLEAN, Simulated
from tests.explore.trial import DEVICES
from vmodel.campaign import database
from vmodel.campaign.executor import Answer, Task
from vmodel.campaign.runner import Runner
from vmodel.campaign.store import ResultStore, Row
from vmodel.campaign.sweep import CleanRunError
from vmodel.coverage.addresses import AddressSet
from vmodel.coverage.coverage import Coverage
from vmodel.errors import ConfigError
from vmodel.experiment.case import Case
from vmodel.experiment.oracle import Effect, Finding, Outcome
from vmodel.explore.against import Against
from vmodel.explore.explorer import CLEAN as TITLES
from vmodel.explore.explorer import Exploration, Explorer, SearchBudget, spent, times
from vmodel.explore.finds import REPEATS, Find, Shrinking, problems
from vmodel.explore.search import LAG
from vmodel.explore.space import identity
from vmodel.explore.summary import document
from vmodel.explore.text import text_of
from vmodel.inject import FaultPlan, parse_rule


class Shuffled:
    """Runs tasks here, and answers in an order of its own: an executor."""

    def __init__(self, jobs: int, seed: int = 0, interrupt: int | None = None) -> None:
        """`interrupt`: Ctrl-C arrives after so many answers."""
        self.jobs = jobs
        self.ran = 0
        self.tasks: list[Task] = []
        self._random = random.Random(seed)
        self._interrupt = interrupt
        self._rig = Simulated()

    @property
    def free(self) -> int:
        return self.jobs - len(self.tasks)

    def submit(self, task: Task) -> None:
        self.tasks.append(task)

    def wait(self) -> Sequence[Answer]:
        if self._interrupt is not None and self.ran >= self._interrupt:
            raise KeyboardInterrupt
        task = self.tasks.pop(self._random.randrange(len(self.tasks)))
        self.ran += 1
        return [Answer(task, self._rig.run(task.case, task.folder), f"rig{self.ran}")]

    def close(self) -> None:
        pass


class Notes:
    """Progress, as a list."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.rows: list[Row] = []

    def total(self, done: int, of: int | None) -> None:
        assert of is None or done <= of

    def ended(self, row: Row) -> None:
        self.rows.append(row)

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """No power fails here: the database need not wait for the disk."""
    connect = database.connect

    def faster(path: Path, *, write: bool) -> sqlite3.Connection:
        opened = connect(path, write=write)
        opened.execute("PRAGMA synchronous = OFF")
        return opened

    monkeypatch.setattr(database, "connect", faster)


@pytest.fixture
def what(tmp_path: Path) -> Exploration:
    path = tmp_path / "edu.toml"
    path.write_text(MACHINE)
    return Exploration(Case(machine=path, workload="run"), DEVICES, ("simulated",), rig="x:Simulated")


@pytest.fixture
def explored(what: Exploration, tmp_path: Path) -> Callable[..., Explorer]:
    """Runs a search, and returns its explorer; its folder is called `name`."""

    def explore(name: str = "runs", *, runs: int = 80, on: Shuffled | None = None, of: Exploration = what) -> Explorer:
        with ResultStore.create(tmp_path / name, of.definition()) as store:
            notes = Notes()
            explorer = Explorer(of, store, Runner(store, on or Shuffled(1), notes), notes, SearchBudget(runs))
            explorer.run()
            return explorer

    return explore


def plans(explorer: Explorer) -> list[dict[str, object]]:
    return [attempt.plan.plain() for attempt in explorer.attempts]


def test_any_number_of_jobs_tries_the_same_plans(explored: Callable[..., Explorer]) -> None:
    one = explored("one")
    for jobs, seed in ((2, 1), (16, 3)):
        several = explored(f"{jobs}", on=Shuffled(jobs, seed))
        assert plans(several) == plans(one)
        assert several.growth == one.growth and several.code == one.code
        assert [find.signature for find in several.finds] == [find.signature for find in one.finds]
        assert [find.shrunk.plan for find in several.finds] == [find.shrunk.plan for find in one.finds]
    assert len(one.attempts) == len(one.growth) == 80 and one.ended == "runs"


def test_what_is_found_is_minimised_and_repeated(explored: Callable[..., Explorer]) -> None:
    explorer = explored(runs=300, on=Shuffled(3))
    assert len(explorer.finds) >= 3
    assert {bug for bug in BUGS for find in explorer.finds if bug in find.signature}
    for find in explorer.finds:
        assert find.shrunk.minimised and find.shrunk.again == [True] * REPEATS
        assert len(find.shrunk.plan.rule) <= len(find.first.run.case.plan.rule)  # type: ignore[union-attr]
        assert find.runs[0] == find.first.id and find.first.result.outcome is find.outcome  # type: ignore[union-attr]
    # A plan of one rule is as small as can be.
    loops = [find for find in explorer.finds if "endless loop" in find.signature]
    assert loops and len(loops[0].shrunk.plan.rule) == 1 and loops[0].outcome is Outcome.HANG


def test_the_search_does_not_wait_for_minimising(explored: Callable[..., Explorer]) -> None:
    """As long as plans are tried, half of the runs under way are of the search."""
    under_way: list[tuple[int, int]] = []

    class Watched(Shuffled):
        def submit(self, task: Task) -> None:
            super().submit(task)
            minimising = sum(task.case.name.startswith("find ") for task in self.tasks)
            under_way.append((minimising, len(self.tasks) - minimising))

    explored(runs=200, on=Watched(2))
    last = max(n for n, (_, searching) in enumerate(under_way) if searching)
    assert all(minimising <= max(searching, 1) for minimising, searching in under_way[: last - LAG])
    assert any(minimising and searching for minimising, searching in under_way)


def test_what_ended_is_taken_when_the_time_is_over(what: Exploration, tmp_path: Path) -> None:
    """The same command says the same again after its budget of seconds, and runs nothing."""

    def explore(budget: SearchBudget, on: Shuffled) -> Explorer:
        with ResultStore.create(tmp_path / "runs", what.definition()) as store:
            notes = Notes()
            explorer = Explorer(what, store, Runner(store, on, notes), notes, budget)
            explorer.run()
            return explorer

    whole, idle = explore(SearchBudget(60), Shuffled(2)), Shuffled(2)
    again = explore(SearchBudget(None, 1e-6), idle)
    assert idle.ran == 0 and again.ended == "time"
    assert plans(again) == plans(whole) and again.growth == whole.growth
    assert [(find.signature, find.shrunk) for find in again.finds] == [
        (find.signature, find.shrunk) for find in whole.finds
    ]
    # A folder of somebody else may have a run with any number.
    with ResultStore.create(tmp_path / "runs", what.definition()) as store:
        waiting = [store.row(id) for id in store.add([what.run("999999999 fresh", FaultPlan())])]
        Runner(store, Shuffled(1), Notes()).feed(lambda: waiting.pop() if waiting else None)
        count = len(store.rows())
    assert 60 <= len(explore(SearchBudget(None, 1e-6), Shuffled(2)).attempts) <= count + LAG


def test_a_search_that_is_interrupted_continues(explored: Callable[..., Explorer], tmp_path: Path) -> None:
    whole = explored("whole", on=Shuffled(2))
    for after in (1, 4, 20, 40):
        with pytest.raises(KeyboardInterrupt):
            explored("parts", on=Shuffled(2, after, interrupt=after))
    with ResultStore.open(tmp_path / "parts") as store:
        ended = sum(row.result is not None for row in store.rows())
    assert ended >= 60
    rest = Shuffled(2, 9)
    parts = explored("parts", on=rest)
    assert plans(parts) == plans(whole) and parts.growth == whole.growth
    assert [(f.signature, f.shrunk.plan, f.shrunk.again) for f in parts.finds] == [
        (f.signature, f.shrunk.plan, f.shrunk.again) for f in whole.finds
    ]
    with ResultStore.open(tmp_path / "parts") as store:
        assert len(store.rows()) == ended + rest.ran  # nothing that had ended ran twice
    # It has ended: the same again runs nothing; more runs continue it.
    idle = Shuffled(2)
    assert plans(explored("parts", on=idle)) == plans(whole) and idle.ran == 0
    more = explored("parts", runs=100, on=idle)
    assert plans(more)[:80] == plans(whole) and len(more.attempts) == 100 and idle.ran >= 20


def test_an_interrupted_search_has_a_summary(what: Exploration, tmp_path: Path) -> None:
    with ResultStore.create(tmp_path / "runs", what.definition()) as store:
        notes = Notes()
        explorer = Explorer(what, store, Runner(store, Shuffled(2, interrupt=70), notes), notes, SearchBudget(500))
        with pytest.raises(KeyboardInterrupt):
            explorer.run()
        said = document(explorer, store.rows(), 2)
    assert said["ended"] == "interrupted" and 40 < said["runs"] <= 70
    assert "it was interrupted: the same command continues" in text_of(said)


def test_an_interruption_of_the_last_minimising_is_one(what: Exploration, tmp_path: Path) -> None:
    """All plans were tried, and minimising what they found goes on."""

    class Last(Shuffled):
        def wait(self) -> Sequence[Answer]:
            if len(explorer.attempts) == 20 and all(task.case.name.startswith("find ") for task in self.tasks):
                raise KeyboardInterrupt
            return super().wait()

    with ResultStore.create(tmp_path / "runs", what.definition()) as store:
        notes = Notes()
        explorer = Explorer(what, store, Runner(store, Last(2), notes), notes, SearchBudget(20))
        with pytest.raises(KeyboardInterrupt):
            explorer.run()
        assert document(explorer, store.rows(), 2)["ended"] == explorer.ended == "interrupted"
        assert len(explorer.growth) == 20 and explorer.finds


def test_the_budget_in_time_ends_it(what: Exploration, tmp_path: Path) -> None:
    now = [1000.0]

    def clock() -> float:
        now[0] += 1.0
        return now[0]

    with ResultStore.create(tmp_path / "runs", what.definition()) as store:
        notes = Notes()
        explorer = Explorer(what, store, Runner(store, Shuffled(1), notes), notes, SearchBudget(None, 100.0), clock)
        explorer.run()
    assert explorer.ended == "time" and 5 < len(explorer.attempts) < 100
    assert len(explorer.growth) == len(explorer.attempts)


def test_a_random_search_needs_another_folder(what: Exploration, explored: Callable[..., Explorer]) -> None:
    explored(runs=1)
    with pytest.raises(ConfigError, match=r"runs: belongs to the search 'edu: simulated, seed 0': name another"):
        explored(of=replace(what, feedback=False))
    with pytest.raises(ConfigError, match="belongs to the search"):
        explored(of=replace(what, seed=1))


def test_a_changed_workload_needs_another_folder(what: Exploration, explored: Callable[..., Explorer]) -> None:
    explored(runs=1)
    changed = replace(what, case=what.case.model_copy(update={"workload": "other"}))
    with pytest.raises(ConfigError, match="contains another version of this search"):
        explored(of=changed)


def test_a_workload_that_fails_without_faults(what: Exploration, explored: Callable[..., Explorer]) -> None:
    broken = replace(what, case=what.case.model_copy(update={"workload": "fail"}))
    with pytest.raises(CleanRunError, match=r"/1: the workload fails without faults: harness error: exit status 7"):
        explored(of=broken)


def test_a_workload_that_does_not_use_the_device(what: Exploration, explored: Callable[..., Explorer]) -> None:
    with pytest.raises(ConfigError, match="causes no event at any fault point"):
        explored(of=replace(what, devices={}))


def test_runs_are_those_of_a_campaign(what: Exploration, explored: Callable[..., Explorer], tmp_path: Path) -> None:
    explored(runs=40)
    with ResultStore.open(tmp_path / "runs") as store:
        rows = store.rows()
        assert store.definition.kind == "explore"
    assert [row.run.plan for row in rows[:3]] == list(TITLES)
    assert all(row.result is not None and (row.folder / "injections.jsonl").exists() for row in rows)
    assert all(row.run.case.fresh == ("again" in row.run.plan and row.run.plan.startswith("find")) for row in rows)
    assert rows[3].run.plan == "1 fresh"
    # Each is another run for the store, repetitions too.
    assert len({row.run.key for row in rows}) == len(rows)


def finding(effect: Effect, sign: str, signature: str) -> Finding:
    return Finding(oracle="kernel log", effect=effect, sign=sign, text=signature.upper(), signature=signature)


@pytest.mark.parametrize(
    ("findings", "expected"),
    [
        ([], []),
        # What reports the fault itself is no problem.
        ([(Effect.NOTICED, "nvme-timeout", "t"), (Effect.ERROR, "status", "s")], []),
        ([(Effect.NOTICED, "warn", "w"), (Effect.NOTICED, "warn", "w")], ["w"]),
        ([(Effect.CRASH, "panic", "p"), (Effect.CRASH, "oops", "o")], ["crash: o"]),
        ([(Effect.CORRUPTION, "data", "data"), (Effect.NOTICED, "lockdep", "l")], ["corruption: data", "l"]),
        ([(Effect.HANG, "status", "time status")], ["hang: time status"]),
        # Where it hangs, as the kernel says it.
        ([(Effect.HANG, "status", "h"), (Effect.NOTICED, "hung-task", "t")], ["hang: h: t"]),
        (
            [(Effect.HANG, "status", "h"), (Effect.NOTICED, "rcu-stall", "r"), (Effect.NOTICED, "hung-task", "t")],
            ["hang: h: t"],
        ),
        # A stall of RCU says only that there is one.
        ([(Effect.HANG, "status", "h"), (Effect.NOTICED, "rcu-stall", "r")], ["hang: h"]),
        ([(Effect.CRASH, "oops", "o"), (Effect.NOTICED, "hung-task", "t")], ["crash: o", "t"]),
        # The tasks that the kernel lists on request say where a hang is, and are no problem by themselves.
        ([(Effect.HANG, "status", "h"), (Effect.NOTICED, "blocked-task", "b")], ["hang: h: b"]),
        ([(Effect.CRASH, "oops", "o"), (Effect.NOTICED, "blocked-task", "b")], ["crash: o"]),
        # Code that still runs says it better: it is the same each time.
        (
            [(Effect.HANG, "status", "h"), (Effect.NOTICED, "blocked-task", "b"), (Effect.NOTICED, "polling", "p")],
            ["hang: h: p"],
        ),
        # Which check sees a double free first is chance: where it is, is the same.
        ([(Effect.CRASH, "memory", "memory: BUG kmalloc-#: Object already free in f < g")], ["crash in f < g"]),
        ([(Effect.CRASH, "kasan", "kasan: BUG: KFENCE: invalid free in f [m] in f < g")], ["crash in f < g"]),
        # As without faults.
        ([(Effect.NOTICED, "warn", "clean")], []),
    ],
)
def test_problems(
    what: Exploration, tmp_path: Path, findings: list[tuple[Effect, str, str]], expected: list[str]
) -> None:
    result = (
        Simulated()
        .run(what.case, tmp_path)
        .model_copy(update={"outcome": Outcome.FAILED, "evidence": tuple(finding(*one) for one in findings)})
    )
    assert [signature for signature, _ in problems(result, {"clean"})] == expected
    for nothing in (Outcome.HARNESS, Outcome.NOT_ACTIVATED):
        assert list(problems(result.model_copy(update={"outcome": nothing}))) == []


def test_a_hang_is_one_wherever_the_kernel_sees_it(what: Exploration, tmp_path: Path) -> None:
    """What the kernel says of a hang depends on when: only that it hangs is the same each time."""
    plan = FaultPlan(rule=(parse_rule("irq do=drop nth=1"),))
    own = (
        Simulated()
        .run(what.case, tmp_path)
        .model_copy(update={"outcome": Outcome.HANG, "rules": ({"name": "rule1", "matched": 1, "fired": 1},)})
    )
    at = [finding(Effect.HANG, "status", "h"), finding(Effect.NOTICED, "hung-task", "t")]
    first = Row(7, what.run("1 fresh", plan), tmp_path, 0, own.model_copy(update={"evidence": tuple(at)}))
    (signature, text), *_ = problems(first.result, ())  # type: ignore[arg-type]
    find = Find(1, signature, text, Outcome.HANG, first)
    nothing = own.model_copy(update={"outcome": Outcome.NOT_ACTIVATED, "evidence": ()})
    shrinking = Shrinking(find, (), {identity(FaultPlan()): nothing})
    while (wanted := shrinking.wanted()) is not None:
        again = len(find.shrunk.again)
        # It hangs twice, as seen from outside only; the third time it does not.
        result = own.model_copy(update={"evidence": tuple(at[:1])}) if again < 2 else nothing
        shrinking.take(wanted, replace(first, id=8 + shrinking.runs, result=result))
    assert signature == "hang: h: t" and find.shrunk.again == [True, True, False] and find.shrunk.plan.rule


@pytest.mark.parametrize(
    ("other", "same"), [("polling: f()", True), ("polling: g()", False), ("blocked-task: g", True)]
)
def test_hangs_in_which_other_code_runs_are_different(
    what: Exploration, tmp_path: Path, other: str, same: bool
) -> None:
    plan = FaultPlan(rule=(parse_rule("irq do=drop nth=1"),))

    def hung(runs: str) -> Row:
        evidence = (
            finding(Effect.HANG, "status", "time status"),
            finding(Effect.NOTICED, runs.partition(":")[0], runs),
        )
        result = Simulated().run(what.case, tmp_path).model_copy(update={"outcome": Outcome.HANG, "evidence": evidence})
        return Row(7, what.run("1 fresh", plan), tmp_path, 0, result)

    first = hung("polling: f()")
    (signature, text), *_ = problems(first.result, ())  # type: ignore[arg-type]
    assert signature == "hang: time status: polling: f()"
    find = Find(1, signature, text, Outcome.HANG, first)
    shrinking = Shrinking(find, (), {})
    shrinking.shrunk.minimised = True
    assert shrinking.wanted() == plan
    shrinking.take(plan, replace(hung(other), id=8))
    assert find.shrunk.again == [same]


def test_a_plan_that_shows_it_each_time_is_looked_for(what: Exploration, tmp_path: Path) -> None:
    """The first run's plan shows the problem one time of three; that of a later run does each time."""
    own = (
        Simulated()
        .run(what.case, tmp_path)
        .model_copy(
            update={
                "outcome": Outcome.CRASH,
                "evidence": (finding(Effect.CRASH, "oops", "o"),),
                "rules": ({"name": "rule1", "matched": 1, "fired": 1},),
            }
        )
    )
    nothing = own.model_copy(update={"outcome": Outcome.NOT_ACTIVATED, "evidence": ()})
    plans = [FaultPlan(rule=(parse_rule(f"{point} do=drop nth=1"),)) for point in ("irq", "completion", "doorbell")]
    rows = [Row(7 + n, what.run(f"{n} fresh", plan), tmp_path, 0, own) for n, plan in enumerate(plans)]
    find = Find(1, "crash: o", "O", Outcome.CRASH, rows[0], [row.id for row in rows])
    without = {identity(FaultPlan()): nothing}

    def carried_out(shrinking: Shrinking, most: int) -> None:
        while (wanted := shrinking.wanted()) is not None:
            assert find.candidate() is None  # one at a time
            result = own if len(shrinking.shrunk.again) < most else nothing
            shrinking.take(wanted, replace(rows[0], id=20 + shrinking.runs, result=result))

    carried_out(Shrinking(find, (), without), 1)
    assert find.shrunk.again == [True, False, False] and find.candidate() == 8
    carried_out(Shrinking(find, (), without, rows[1]), 3)
    assert find.shrunk.again == [True] * 3 and find.shrunk.plan == plans[1] and find.tried == [7, 8]
    assert find.candidate() is None


def test_the_time_by_kind(explored: Callable[..., Explorer], tmp_path: Path) -> None:
    explored(runs=20)
    with ResultStore.open(tmp_path / "runs") as store:
        rows = [replace(row, started=100.0 + row.id, ended=102.0 + row.id) for row in store.rows()]
    # Runs that overlap are counted once.
    assert spent(rows) == pytest.approx(len(rows) + 1.0)
    found = times(rows, 10.0, 2)
    assert sum(found.values()) == pytest.approx(20.0)
    walls = sum(row.result.wall for row in rows if row.result is not None)
    assert found["boot"] + found["workload"] + found["minimise"] == pytest.approx(walls)


def test_another_build_is_not_compared(explored: Callable[..., Explorer], tmp_path: Path) -> None:
    """The same addresses are other code there."""
    explorer = explored(runs=5)
    with ResultStore.open(tmp_path / "runs") as store:
        first, *rows = store.rows()
        assert first.result is not None
        artefacts = {**first.result.artefacts, "coverage": "coverage.json"}
        first = replace(first, result=first.result.model_copy(update={"artefacts": artefacts}))
        kept = Coverage({"card": AddressSet([1, 2])}, {"card": "ab"})
        (first.folder / "coverage.json").write_text(json.dumps(kept.to_json()))
        for id, builds in (("ab", []), ("cd", ["card"])):
            other = Against(tmp_path, 1, explorer.code, frozenset({("card", id), ("other", "ef")}))
            said = document(explorer, [first, *rows], 1, other)
            assert said["against"]["other_builds"] == builds
            assert said["against"]["only_there"] == (None if builds else 0)
    assert "not compared, as it has another build of card." in " ".join(text_of(said).split())


def test_what_has_no_coverage_of_the_driver(explored: Callable[..., Explorer], tmp_path: Path) -> None:
    """All is only here, which is no merit of the search."""
    explorer = explored(runs=5)
    with ResultStore.open(tmp_path / "runs") as store:
        rows = store.rows()
    said = document(explorer, rows, 1, Against(tmp_path, 1, frozenset({("other", 1)}), frozenset()))
    assert said["against"]["lacks"] == ["simulated"]
    assert "only here, 1 only there; its runs kept no coverage of simulated." in " ".join(text_of(said).split())


def test_the_summary(explored: Callable[..., Explorer], what: Exploration, tmp_path: Path) -> None:
    explorer = explored(runs=200, on=Shuffled(2))
    explored("other", runs=30, of=replace(what, feedback=False))
    with ResultStore.open(tmp_path / "runs") as store:
        said = document(explorer, store.rows(), 2, Against.read(tmp_path / "other"))
    assert said["reached"]["clean"] == len(CLEAN) and said["reached"]["new"] == sum(said["reached"]["growth"]) > 5
    assert said["reached"]["last_new"] <= said["runs"] == 200
    assert said["against"]["runs"] >= 33 and said["against"]["only_here"] > 0
    text = text_of(said)
    assert all(len(line) <= 80 for line in text.splitlines() if not line.startswith("   vmodel reproduce "))
    for find in said["found"]:
        assert find["signature"] and f"{find['number']}. {find['outcome']}: " in text
        assert (tmp_path / "runs" / Path(find["reproduce"]).name).is_dir()
        # The command as it works: the rig of these runs is code of this host.
        assert find["trust"] and f"   vmodel reproduce {find['reproduce']} --trust\n" in text
    assert "Reached" in text and "only here" in text and "functions and branches are unknown" in text.replace("\n", " ")
