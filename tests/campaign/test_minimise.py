"""vmodel minimise and reproduce, and the algorithm below."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.campaign.runs import rows, write
from tests.cli.commands import refused, vmodel
from vmodel.campaign.matrix import Run
from vmodel.campaign.minimise import Minimiser, ddmin
from vmodel.campaign.repeat import code
from vmodel.campaign.rig import harness_error
from vmodel.campaign.store import Row
from vmodel.campaign.toml import plan_text
from vmodel.experiment.case import Case, Result
from vmodel.experiment.oracle import Outcome
from vmodel.inject import FaultPlan, parse_rule

pytestmark = pytest.mark.slow


@given(st.integers(1, 40), st.data())
def test_ddmin(count: int, data: st.DataObject) -> None:
    """What is needed together is found, and nothing else; each part is tried once at most."""
    needed = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=6))
    tried: list[tuple[int, ...]] = []

    def holds(part: list[int]) -> bool:
        tried.append(tuple(part))
        return needed <= set(part)

    assert ddmin(range(count), holds) == sorted(needed)
    assert all(len(part) < count for part in tried)
    assert len(tried) <= count * count + 3 * count


@given(st.integers(2, 12), st.data())
def test_ddmin_is_minimal_whatever_holds(count: int, data: st.DataObject) -> None:
    """Also where causes stand in for each other, or cancel: nothing can be left out of what is found."""
    causes = data.draw(st.lists(st.sets(st.integers(0, count - 1), min_size=1), min_size=1, max_size=3))
    spoilt = data.draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=4))

    def holds(part: list[int]) -> bool:
        found = set(part)
        return len(part) == count or (any(cause <= found for cause in causes) and not spoilt <= found)

    found = ddmin(range(count), holds)
    assert holds(found)
    if len(found) > 1:
        assert not any(holds(found[:n] + found[n + 1 :]) for n in range(len(found)))


RULES = [
    "dma.read device=edu0 iova=0x1000-0x1fff probability=0.3 do=flip(2)",
    "mmio.read register=DMA_CMD between=[irq,reset] do=value(1)",
    "dma.write after=2s until=4s nth=1,5 do=delay(ms=5)",
    "completion queue=1-3 status=0 phase=running do=complete(status=1)",
    "irq vector=2 once do=drop",
]


def test_plans_as_text(tmp_path: Path) -> None:
    rules = []
    for n, text in enumerate(RULES):
        if "between" in text:
            rule = parse_rule(text.replace("between=[irq,reset] ", "between=irq..reset "))
        else:
            rule = parse_rule(text.replace("queue=1-3", "queue=1,3"))
        rules.append(rule.model_copy(update={"name": f'rule "{n}" \\ é'}))
    plan = FaultPlan.model_validate({"seed": 2**63 + 5, "rule": rules, "heal": {"on": {"point": "reset"}}})
    text = plan_text(plan, "two\nlines")
    assert text.startswith("# two\n# lines\nseed = 9223372036854775813\n\n[[rule]]\n")
    assert FaultPlan.parse(text, tmp_path / "x.toml").plain() == plan.plain()
    assert plan_text(FaultPlan()) == "\n"


def test_the_limit() -> None:
    plan = FaultPlan(rule=tuple(parse_rule(f"irq nth={n} do=drop") for n in range(1, 9)))

    def run(tried: FaultPlan) -> Result:
        found = harness_error(Case(machine=Path("x"), workload=""), "x", "x")
        needed = any(rule.nth == (3,) for rule in tried.rule)
        return found.model_copy(update={"outcome": Outcome.HANG if needed else Outcome.MASKED})

    for most, ended in ((4, False), (100, True)):
        said: list[str] = []
        minimiser = Minimiser(Outcome.HANG, run, most, said.append)
        assert minimiser.minimise(plan) is ended
        assert len(said) == minimiser.runs <= most
        assert minimiser.best is not None and any(rule.nth == (3,) for rule in minimiser.best[0].rule)
    assert [rule.nth for rule in minimiser.best[0].rule] == [(3,)]
    with pytest.raises(ValueError, match="another outcome"):
        Minimiser(Outcome.CRASH, run, 9, said.append).minimise(plan)


@pytest.fixture
def campaign(folder: Path) -> Path:
    """Its run 2 ends with silent corruption, by some of many faults."""
    (folder / "many.toml").write_text(
        "\n".join(
            f"[[rule]]\n{rule}\n"
            for rule in (
                'point = "dma.write"\ndo = "delay(ms=1)"',
                'point = "dma.write"\nprobability = 0.6\ndo = "flip(2)"',
                'point = "mmio.read"\nregister = "LIVENESS"\ndo = "ones"',
                'point = "dma.read"\nnth = 90\ndo = "abort"',
            )
        )
        + '[heal]\nafter = "20s"\n'
    )
    path = write(folder, "copy 8", seeds=1, faults={})
    path.write_text(path.read_text() + '[[plan]]\nfile = "many.toml"\n')
    assert vmodel("campaign", "c.toml", cwd=folder).returncode == 1
    assert [row.result.outcome for row in rows(folder / "c.runs") if row.result][1] is Outcome.CORRUPTION
    return folder


def test_minimise(campaign: Path) -> None:
    done = vmodel("minimise", "c.runs/2", "--trust", cwd=campaign)
    assert done.returncode == 0
    assert done.stderr.splitlines()[0].endswith("faults: silent corruption")
    text = (campaign / "c.runs" / "2-minimised" / "plan.toml").read_text()
    assert done.stdout == text
    plan = FaultPlan.parse(text, campaign / "x.toml")
    # One event of one rule, and no part that heals.
    assert plan.heal is None and [rule.do.name for rule in plan.rule] == ["flip"]
    (rule,) = plan.rule
    assert rule.nth is not None and len(rule.nth) == 1 and rule.probability is None
    # And it is enough.
    (campaign / "many.toml").write_text(text)
    assert vmodel("campaign", "c.toml", "-o", "again", cwd=campaign).returncode == 1
    result = rows(campaign / "again")[1].result
    assert result is not None and (result.outcome, result.injected) == (Outcome.CORRUPTION, 1)


def test_minimise_has_limits(campaign: Path) -> None:
    done = vmodel("minimise", "c.runs/2", "--trust", "--runs", "3", "-o", "small", cwd=campaign)
    assert done.returncode == 0
    assert "vmodel: stopped after 3 runs (--runs): a smaller plan may exist" in done.stderr
    assert sorted(path.name for path in (campaign / "small").iterdir()) == ["1", "2", "3", "plan.toml"]
    assert "has no faults to leave out" in refused(vmodel("minimise", "c.runs/1", "--trust", cwd=campaign))
    assert "c.runs: has no run 7" in refused(vmodel("minimise", "c.runs/7", cwd=campaign))


def test_reproduce(campaign: Path) -> None:
    done = vmodel("reproduce", "c.runs/2/", "--trust", cwd=campaign)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "c.runs/2: silent corruption, as before; c.runs/2-again"
    assert len(done.stdout.splitlines()) == 2, "nothing is different"
    records = [(campaign / "c.runs" / name / "injections.jsonl").read_text() for name in ("2", "2-again")]
    untimed = [re.sub(r'"t": [\d.]+', "", text) for text in records]
    assert untimed[0] == untimed[1] and untimed[0].count('"flip') > 2, "the same bits at the same events"


@pytest.mark.parametrize("command", ["reproduce", "minimise"])
def test_what_a_campaign_names_is_used_if_somebody_says_so(campaign: Path, command: str) -> None:
    """A folder may be somebody else's: Python, files that devices write and QEMU's arguments reach this host."""
    (campaign / "lab.py").write_text("raise SystemExit('imported')\n")
    line = refused(vmodel(command, "c.runs/2", cwd=campaign))
    assert re.fullmatch(
        r"c\.runs/2: would use .*/lab\.py:Lab of this host: if you trust this campaign, add --trust", line
    )
    assert not (campaign / "c.runs" / f"2-{'again' if command == 'reproduce' else 'minimised'}").exists()


@pytest.mark.parametrize(
    ("machine", "changes", "named"),
    [
        ('model = "edu"', {}, []),
        ('model = "toy.py:Toy"', {}, ["toy.py:Toy"]),
        ('model = "os.path:Toy"', {}, ["os.path:Toy"]),
        ('model = "nvme"\nparams = { namespaces = [{ path = "/etc/motd", size = "1M" }] }', {}, ["/etc/motd"]),
        ('model = "nvme"\nparams = { namespaces = [{ path = "/a", read_only = true }] }', {}, []),
        ("model = 3\nparams = [[1]]", {}, []),
        ('model = "edu"', {"qemu_args": ("-monitor", "stdio")}, ["QEMU -monitor stdio"]),
        (
            'model = "edu"',
            {"plan": FaultPlan().extended([parse_rule("dma.write when=odd.py:odd do=drop")])},
            ["odd.py"],  # counts from the plan's folder, here none
        ),
    ],
)
def test_what_reaches_this_host(tmp_path: Path, machine: str, changes: dict[str, Any], named: list[str]) -> None:
    (tmp_path / "m.toml").write_text(f"[[device]]\n{machine}\n")
    case = Case(machine=tmp_path / "m.toml", workload="rm -rf /", **changes)
    run = Run(machine="m", kernel="", workload="w", plan="p", seed=0, case=case)
    assert list(code(Row(1, run, tmp_path))) == named


def test_reproduce_tells_of_changes(campaign: Path) -> None:
    (campaign / "edu.toml").write_text((campaign / "edu.toml").read_text() + "# changed\n")
    (campaign / "lab.py").write_text((campaign / "lab.py").read_text().replace("DATA_WRONG if wrong", "0 if wrong"))
    done = vmodel("reproduce", "c.runs/2", "--trust", "--with-history", cwd=campaign)
    assert done.returncode == 1
    assert [line.rpartition("/")[2] for line in done.stderr.splitlines()] == [
        "edu.toml has changed since the run",
        "lab.py has changed since the run",
    ]
    assert done.stdout.splitlines() == [
        "c.runs/2: masked, was silent corruption; c.runs/2-again",
        "  outcome: silent corruption -> masked",
        "  status: 65 -> 0",
        "  no longer seen: data",
    ]
    assert (campaign / "c.runs" / "2-again" / "before-1" / "kernel.log").exists()
    line = refused_after_warnings(vmodel("minimise", "c.runs/2", "--trust", cwd=campaign).stderr)
    assert line.startswith("vmodel: c.runs/2: the outcome was silent corruption, and is a different one now: ")
    (campaign / "edu.toml").unlink()
    line = refused_after_warnings(vmodel("reproduce", "c.runs/2", "--trust", cwd=campaign).stderr)
    assert line.endswith("edu.toml: cannot be read: No such file or directory")


def refused_after_warnings(stderr: str) -> str:
    return stderr.splitlines()[-1]
