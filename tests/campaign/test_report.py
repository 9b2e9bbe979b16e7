"""What reports say, for people and for tools; hostile texts in them."""

from __future__ import annotations

import json
import re
import sqlite3
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.cli.commands import vmodel
from vmodel.campaign.chart import interval, seconds, times
from vmodel.campaign.matrix import Run
from vmodel.campaign.report import FORMATS
from vmodel.campaign.rig import harness_error
from vmodel.campaign.statistics import Rate
from vmodel.campaign.store import ResultStore
from vmodel.campaign.summary import Summary
from vmodel.experiment.case import Case
from vmodel.experiment.oracle import Outcome

pytestmark = pytest.mark.slow

#: What a guest may have printed.
EVIL = "<script>alert(1)</script> \x00\x1b[31m ]]> \ud800 \uffff \" ' & {{ 7 * 7 }} " + "x" * 5000


def report(folder: Path, form: str) -> str:
    done = vmodel("report", folder, "--format", form, cwd=folder.parent)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_json(finished: Path) -> None:
    said = json.loads(report(finished, "json"))
    assert (said["kind"], said["name"], said["total"], len(said["runs"])) == ("campaign", "lab", 31, 31)
    counts = {outcome: row["runs"] for outcome, row in said["outcomes"].items()}
    assert sum(counts.values()) == 31
    assert (counts["crash"], counts["hang"], counts["harness error"]) == (4, 4, 1)
    crash = said["outcomes"]["crash"]
    injected = 31 - counts["not activated"] - counts["harness error"]
    assert (crash["of"], crash["rate"]) == (injected, round(4 / injected, 6))
    low, high = Rate(4, injected).interval
    assert (crash["low"], crash["high"]) == (round(low, 6), round(high, 6))
    (gone,) = [f for f in said["faults"] if (f["plan"], f["workload"]) == ("gone", "copy")]
    assert gone["outcomes"] == {"crash": 2} and gone["rules"] == ["mmio.read register=ID do=ones"]
    assert gone["survived"]["runs"] == 0 and gone["survived"]["of"] == 2
    (bug,) = [s for s in said["signatures"] if s["signature"] == "BUG edu_probe"]
    assert (len(bug["runs"]), bug["plans"], bug["effect"]) == (4, ["gone"], "crash")
    run = said["runs"][bug["runs"][0] - 1]
    assert run["command"] == f"vmodel reproduce {finished}/{run['id']} --trust", "its rig is code of this host"
    assert (finished.parent / run["artefacts"]["kernel log"]).read_text().startswith("kernel BUG at edu.c")
    recovered = [r for r in said["runs"] if r["outcome"] == "detected and recovered"]
    assert recovered and all(0 < r["time_to_detect"] <= r["time_to_recover"] for r in recovered)


def test_the_command_repeats_the_run(finished: Path) -> None:
    said = json.loads(report(finished, "json"))
    run = next(run for run in said["runs"] if run["outcome"] == "crash")
    done = vmodel(*run["command"].split()[1:], "-o", finished.parent / "repeated", cwd="/")  # type: ignore[arg-type]
    assert done.returncode == 0 and "crash, as before" in done.stdout


def test_junit(finished: Path) -> None:
    root = ElementTree.fromstring(report(finished, "junit").encode())
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites) == ["edu.copy", "edu.careful", "edu.broken"]
    copy = suites["edu.copy"]
    assert (copy.get("tests"), copy.get("errors"), copy.get("skipped")) == ("15", "0", "2")
    verdicts = {case.get("name"): [child.tag for child in case] for case in copy}
    assert verdicts["no faults"] == [] and verdicts["delay [seed 0]"] == []
    assert verdicts["aborted read [seed 1]"] == [], "the driver has told of it: that is no failure"
    assert verdicts["gone [seed 0]"] == verdicts["flipped <b>bits</b> [seed 1]"] == ["failure"]
    assert verdicts["never [seed 0]"] == ["skipped"]
    assert [child.tag for child in suites["edu.broken"][0]] == ["error"]
    failure = next(case for case in copy if case.get("name") == "gone [seed 0]")[0]
    assert failure.get("message") == "crash"
    assert re.search(
        r"kernel log: kernel BUG at edu.c.*\nvmodel reproduce .*/all.runs/\d+", failure.text or "", re.DOTALL
    )


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, tag


def test_the_page_is_well_formed(finished: Path) -> None:
    parser = _Tags()
    parser.feed(report(finished, "html"))
    assert (parser.open, parser.scripts) == ([], 1)


@pytest.fixture
def evil(tmp_path: Path) -> ResultStore:
    """A store in which every text is hostile."""
    name = 'a <b> & "c" \''
    with ResultStore.create(
        tmp_path / "e <v> il.runs", {"kind": "campaign", "name": name, "file": EVIL[:40].replace("\ud800", "")}
    ) as store:
        case = Case(machine=Path("m"), workload="w", seed=2**64 - 1)
        run = Run(machine=name, kernel=name, workload=name, plan=name, seed=2**64 - 1, case=case)
        (id,) = store.add([run])
        text = EVIL.replace("\ud800", "")
        result = harness_error(case, "status", text).model_copy(
            update={"outcome": Outcome.CRASH, "artefacts": {name: "a b#c"}}
        )
        part = store.part(id)
        part.mkdir()
        (part / "a b#c").touch()
        store.finish(id, part, result, "", 1.0)
    return ResultStore.open(tmp_path / "e <v> il.runs")


def test_hostile_texts(evil: ResultStore, tmp_path: Path) -> None:
    with evil as store:
        said = {form: make(Summary(store, tmp_path)) for form, make in FORMATS.items()}
    parser = _Tags()
    parser.feed(said["html"])
    assert (parser.open, parser.scripts) == ([], 1)
    assert "{{ 7 * 7 }}" in said["html"] and "alert(1)&lt;/script&gt;" in said["html"]
    assert 'href="e%20%3Cv%3E%20il.runs/1/a%20b%23c"' in said["html"]
    assert json.loads(said["json"])["runs"][0]["seed"] == 2**64 - 1
    failure = ElementTree.fromstring(said["junit"].encode()).find(".//failure")
    assert failure is not None and "<script>alert(1)</script>" in (failure.text or "")


def test_artefacts_are_in_the_runs_folder(tmp_path: Path) -> None:
    """A database may say anything: what leads out of the folder is no artefact."""
    case = Case(machine=Path("m"), workload="w")
    bad = {
        "a": "../../../../etc/passwd",
        "b": "/etc/passwd",
        "c": "x/../../1",
        "d": "..",
        "e": "ok.log",
        "f": "sub/ok.log",
    }
    with ResultStore.create(tmp_path / "x.runs", {"kind": "campaign", "name": "x"}) as store:
        (id,) = store.add([Run(machine="m", kernel="", workload="w", plan="p", seed=0, case=case)])
        result = harness_error(case, "status", "x").model_copy(update={"artefacts": bad})
        row = store.finish(id, store.part(id), result, "", 1.0)
        assert row.result is not None and row.result.artefacts == {"e": "ok.log", "f": "sub/ok.log"}
        page, table, _ = (make(Summary(store, tmp_path)) for make in FORMATS.values())
    assert json.loads(table)["runs"][0]["artefacts"] == {"e": "x.runs/1/ok.log", "f": "x.runs/1/sub/ok.log"}
    assert "passwd" not in page and ".." not in table


def test_a_role_is_said_with_its_release(tmp_path: Path) -> None:
    """The archive moved on between two runs; a third one never booted."""
    case = Case(machine=Path("m"), workload="w")
    with ResultStore.create(tmp_path / "x.runs", {"kind": "campaign", "name": "x"}) as store:
        said = [("backports", "7.2.12+x"), ("backports", "7.3.4+x"), ("backports", None), ("6.12", "6.12.9+x")]
        for seed, (kernel, release) in enumerate(said):
            run = Run(machine="m", kernel=kernel, workload="w", plan="p", seed=seed, case=case)
            (id,) = store.add([run])
            result = harness_error(case, "status", "x")
            versions = {**result.versions, **({"kernel": release} if release else {})}
            store.finish(id, store.part(id), result.model_copy(update={"versions": versions}), "", 1.0)
        page, table, tests = (make(Summary(store, tmp_path)) for make in FORMATS.values())
    named = ["backports (7.2.12+x)", "backports (7.3.4+x)", "backports (7.3.4+x)", "6.12"]
    assert [run["kernel"] for run in json.loads(table)["runs"]] == named
    for name in named:
        assert f">{name}</th>" in page and f'name="m.{name}.w"' in tests


def test_before_anything_has_ended(tmp_path: Path) -> None:
    with ResultStore.create(tmp_path / "x.runs", {"kind": "campaign", "name": "x"}) as store:
        case = Case(machine=Path("m"), workload="w")
        store.add([Run(machine="m", kernel="", workload="w", plan="p", seed=0, case=case)])
        page, table, tests = (make(Summary(store, tmp_path)) for make in FORMATS.values())
    assert "0 of 1 runs have ended" in page and "No run was detected and recovered" in page
    assert json.loads(table)["runs"] == [] and ElementTree.fromstring(tests.encode()).tag == "testsuites"


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.011, 0.024], ["0", "5 ms", "10 ms", "15 ms", "20 ms", "25 ms"]),
        ([2.0, 3.1], ["0", "500 ms", "1 s", "1.5 s", "2 s", "2.5 s", "3 s", "3.5 s"]),
        ([0.02, 31.0], ["10 ms", "100 ms", "1 s", "10 s", "100 s"]),
        ([0.0], ["0", "0.2 ms", "0.4 ms", "0.6 ms", "0.8 ms", "1 ms"]),
        ([5.0], ["0", "1 s", "2 s", "3 s", "4 s", "5 s"]),
    ],
)
def test_the_axis(values: list[float], ticks: list[str]) -> None:
    drawn = ElementTree.fromstring(str(times([("a < b", values), ("none", [])])))
    labels = [text.text for text in drawn.iter("text") if text.get("text-anchor") == "middle" and text.text]
    assert [label for label in labels if not label.isdecimal() or label == "0"] == ticks
    width = float(drawn.get("viewBox", "").split()[2])
    dots = list(drawn.iter("circle"))
    assert len(dots) == len(values)
    assert all(0 < float(dot.get("cx", "nan")) < width for dot in dots)
    bars = [int(title.text.split()[0]) for bar in drawn.iter("rect") for title in bar if title.text]
    assert sum(bars) == len(values)


def test_a_rate_as_a_drawing() -> None:
    drawn = ElementTree.fromstring(str(interval(Rate(1, 4), "--crash")))
    assert drawn.get("aria-label") == "25 % (5–70 %)"
    assert str(interval(Rate(0, 0), "--crash")) == ""
    assert [seconds(t) for t in (0, 0.0123, 1, 12.345)] == ["0", "12.3 ms", "1 s", "12.3 s"]


def test_a_store_of_an_older_vmodel(tmp_path: Path) -> None:
    """Its runs name the rig of guests as it was called then; they are reported, and a campaign resumes with them."""
    run = Run(machine="m", kernel="", workload="w", plan="p", seed=0, case=Case(machine=Path("m"), workload="w"))
    definition = {"kind": "campaign", "name": "x"}
    with ResultStore.create(tmp_path / "x.runs", definition) as store:
        (id,) = store.add([run])
        store.finish(id, store.part(id), harness_error(run.case, "status", "x"), "", 1.0)
    with sqlite3.connect(tmp_path / "x.runs" / "campaign.db") as database:
        old = run.model_copy(update={"rig": "vmodel.testing.experiment:Rig"})
        assert old.key != run.key
        database.execute(
            "UPDATE run SET key = ?, run = replace(run, 'vmodel.experiment:Rig', 'vmodel.testing.experiment:Rig')",
            (old.key,),
        )
        assert database.execute("SELECT run FROM run").fetchone()[0].count(old.rig) == 1
    database.close()

    with ResultStore.open(tmp_path / "x.runs") as store:
        assert store.row(id).run.rig == "vmodel.experiment:Rig"
        assert json.loads(FORMATS["json"](Summary(store, tmp_path)))["outcomes"]["harness error"]["runs"] == 1
    with ResultStore.create(tmp_path / "x.runs", definition) as store:
        store.keep_only([run])
        assert store.add([run]) == [id] and len(store.rows()) == 1
