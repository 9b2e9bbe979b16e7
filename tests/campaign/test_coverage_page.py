"""The coverage of a campaign on its page: of one kernel and of several, with hostile names, of bounded size."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, check_contrast, once
from tests.cli.commands import refused, vmodel
from tests.coverage.card import CLEAN, FAILED, SOURCE, TEXT, card, lined, with_lines
from tests.coverage.objects import function, program
from vmodel.campaign.matrix import Run
from vmodel.campaign.report import as_json, html
from vmodel.campaign.rig import harness_error
from vmodel.campaign.store import ResultStore
from vmodel.campaign.summary import Summary
from vmodel.coverage.addresses import AddressSet
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.growth import growth
from vmodel.coverage.registry import programs
from vmodel.coverage.sources import Sources
from vmodel.experiment.case import Case
from vmodel.experiment.oracle import Outcome
from vmodel.inject import FaultPlan, parse_rule

#: A run: its kernel, its plan, whether a fault was injected, and what it reached.
Ran = tuple[str, str, int, Coverage | None]
EVIL = "<script>alert(1)</script>\"'&{{ 7 * 7 }}%"


def store(folder: Path, runs: Sequence[Ran]) -> Path:
    """A campaign's folder with these runs."""
    with ResultStore.create(folder, {"kind": "campaign", "name": "card"}) as made:
        for n, (kernel, plan, injected, reached) in enumerate(runs):
            rules = FaultPlan().extended([parse_rule("doorbell nth=2 do=drop")] * injected) if injected else None
            case = Case(machine=Path("m"), workload="w", seed=n, plan=rules)
            (id,) = made.add([Run(machine="m", kernel=kernel, workload="w", plan=plan, seed=n, case=case)])
            part = made.part(id)
            part.mkdir()
            kept = {}
            if reached is not None:
                (part / "coverage.json").write_text(json.dumps(reached.to_json()))
                kept = {"coverage": "coverage.json"}
            outcome = Outcome.MASKED if injected else Outcome.NOT_ACTIVATED
            result = harness_error(case, "status", "x").model_copy(
                update={"outcome": outcome, "artefacts": kept, "injected": int(injected), "evidence": ()}
            )
            made.finish(id, part, result, "", 1.0)
    return folder


def page_of(folder: Path) -> str:
    with ResultStore.open(folder) as opened:
        return html(Summary(opened, folder.parent))


def other() -> Coverage:
    """Of another build of the card's module, as another kernel has: probe() of it."""
    made = programs.add(program(SOURCE + function("suspend", "nop\nret"), "card"))
    assert made.build_id != card().build_id
    return Coverage.of_ranges(made, [(a, a + 1) for a in made.function("probe").addresses[:4]])


RUNS: list[Ran] = [
    ("6.12", "no faults", False, CLEAN),
    ("6.12", "lost", True, CLEAN),
    ("6.12", "stuck", True, FAILED),
]


class Tags(HTMLParser):
    """That every tag is closed in order; ids, links inside of the page, and scripts that run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.inside: list[str] = []
        self.scripts = 0
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.scripts += tag == "script" and "type" not in found
        self.ids += [value for name, value in attrs if name == "id" and value]
        self.inside += [v[1:] for name, v in attrs if name == "href" and v and v.startswith("#")]
        assert not any(name.startswith("on") for name in found)
        if tag not in ("meta", "input", "br", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "polyline"):
            assert self.open.pop() == tag


def code_of(page: str, prefix: str = "c1-") -> Any:
    found = re.search(rf'<script type="text/plain" id="{prefix}data">([\w+/=]*)</script>', page)
    assert found
    return json.loads(zlib.decompress(base64.b64decode(found[1])))


def section(page: str, id: str) -> str:
    found = re.search(rf'<section id="{id}">.*?</section>', page, re.DOTALL)
    assert found, id
    return found[0]


# ---- what it shows -----------------------------------------------------------------------------------


def test_what_the_page_says(tmp_path: Path) -> None:
    page = page_of(store(tmp_path / "c.runs", RUNS))
    tags = Tags(page)
    assert len(set(tags.ids)) == len(tags.ids) and tags.scripts == 1
    assert '<a href="#coverage">Coverage</a>' in page and "<h3>6.12</h3>" in page
    for said in (
        "<b>3</b>runs, 1 without faults",
        "of 13 instructions ran",
        "<b>3</b>instructions only under faults",
    ):
        assert said in page
    functions = section(page, "c1-functions")
    assert "9 without faults" not in functions
    assert 'title="7 without faults, 3 only under faults, 0 never"' in functions
    assert 'title="0 without faults, 0 only under faults, 1 never"' in functions
    faults = section(page, "c1-faults")
    assert faults.index(">stuck<") < faults.index(">lost<")
    assert faults.count("doorbell do=drop nth=2") == 2
    assert '<span class="sign" title="card">probe 3</span>' in faults
    assert "run 3: stuck: 3 new, 12 in all" in section(page, "c1-growth")
    address = card().function("probe").address
    assert f"c1-code=card/{address:x}" in tags.inside
    data = code_of(page)
    assert data["faults"] is True and [row[2] for row in data["functions"][f"card/{address:x}"][4]] == [2] * 7 + [1] * 3


def test_the_branches_that_no_run_has_taken(tmp_path: Path) -> None:
    page = page_of(store(tmp_path / "c.runs", RUNS[:2]))
    branches = section(page, "c1-branches")
    assert '<tr data-kind="error">' in branches and "returns -EINVAL" in branches
    assert "test eax, eax; js" in branches
    assert "<b>1</b>branches never taken, 1 to error handling" in page


def test_what_others_reached_later_was_first(tmp_path: Path) -> None:
    """As in a search, where many plans reach the same."""
    page = page_of(store(tmp_path / "c.runs", [*RUNS, ("6.12", "again", True, FAILED)]))
    faults = section(page, "c1-faults")
    first, *_ = re.findall(r'<th scope="row">(\w+)', faults)
    assert first == "stuck"
    assert '<span class="muted">first:</span> <span class="sign" title="card">probe 3</span>' in faults


def test_without_coverage_there_is_nothing_of_it(tmp_path: Path) -> None:
    plain = [(kernel, plan, injected, None) for kernel, plan, injected, _ in RUNS]
    page = page_of(store(tmp_path / "c.runs", plain))
    assert Tags(page).scripts == 1
    for sign in ("#coverage", ">Coverage<", "<dialog", "--clean", ".reach", "DecompressionStream", 'type="text/plain"'):
        assert sign not in page, sign


def test_two_kernels(tmp_path: Path) -> None:
    page = page_of(store(tmp_path / "c.runs", [*RUNS, ("7.3", "no faults", False, other())]))
    tags = Tags(page)
    assert len(set(tags.ids)) == len(tags.ids)
    assert page.index("<h3>6.12</h3>") < page.index("<h3>7.3</h3>")
    assert {name for name in tags.inside if name.endswith("functions")} == {"c1-functions", "c2-functions"}
    assert ">suspend<" in section(page, "c2-functions") and ">suspend<" not in section(page, "c1-functions")
    assert (code_of(page)["faults"], code_of(page, "c2-")["faults"]) == (True, False)
    assert 'id="c2-faults"' not in page, "that kernel had no fault"


def test_many_builds_are_a_few(tmp_path: Path) -> None:
    runs: list[Ran] = [
        (f"6.{n}", "no faults", False, Coverage({"nvme": AddressSet([n])}, {"nvme": f"{n:08x}"})) for n in range(6)
    ]
    page = page_of(store(tmp_path / "c.runs", runs))
    assert page.count("<h3>") == 4 + page.count('<h3 id="view-title">') - 1
    assert "2 more builds of the code are in the JSON" in page and 'id="c5-' not in page


def test_code_that_is_not_here(tmp_path: Path) -> None:
    gone = Coverage({"gone": AddressSet([1, 2])}, {"gone": "ab"})
    page = page_of(store(tmp_path / "c.runs", [("", "no faults", False, gone), ("", "lost", True, gone)]))
    tags = Tags(page)
    assert "gone with build id ab: this file is not here, so its functions are unknown" in page
    assert "<b>2</b>instructions ran, of code that is not here" in page and "0 %" not in section(page, "coverage")
    assert {"c1-faults", "c1-growth"} <= {*tags.ids} and not {"c1-functions", "c1-branches"} & {*tags.ids}
    assert {name for name in tags.inside if name.startswith("c1-")} <= {*tags.ids}


def test_coverage_that_is_damaged(tmp_path: Path) -> None:
    folder = store(tmp_path / "c.runs", RUNS)
    for n in (1, 2, 3):
        (folder / str(n) / "coverage.json").write_text("{")
    page = page_of(folder)
    Tags(page)
    assert page.count("is damaged: it is not JSON") == 3 and "<h3>6.12" not in page


# ---- others' names, and sizes --------------------------------------------------------------------------


def test_hostile_names(tmp_path: Path) -> None:
    evil = Coverage({EVIL: AddressSet([1]), **CLEAN.reached}, {EVIL: "ab", **CLEAN.build_ids})
    page = page_of(store(tmp_path / "c.runs", [(EVIL, EVIL, False, evil), (EVIL, f"{EVIL}2", True, evil)]))
    tags = Tags(page)
    assert tags.scripts == 1 and "<script>alert" not in page and "{{ 7 * 7 }}" in section(page, "c1-faults")
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&amp;") > 6


def test_long_names_are_cut(tmp_path: Path) -> None:
    name = "x" * 100_000
    page = page_of(store(tmp_path / "c.runs", [("", "no faults", False, CLEAN), ("", name, True, FAILED)]))
    assert "x" * 201 not in section(page, "c1-faults") + section(page, "c1-growth")


def test_many_rules_are_folded(tmp_path: Path) -> None:
    """A survey has a rule for each point: it would be most of the page."""
    page = page_of(store(tmp_path / "c.runs", [("", "survey", 11, CLEAN), ("", "few", 10, CLEAN)]))
    assert page.count("<summary>11 rules</summary><code>doorbell") == 1 and "10 rules" not in page


def test_long_tables_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, most in (("_FUNCTIONS", 2), ("_BRANCHES", 0), ("_FAULTS", 3)):
        monkeypatch.setattr(f"vmodel.coverage.sections.{name}", most)
    runs = [*RUNS, *(("6.12", f"plan {n}", True, CLEAN) for n in range(9))]
    folder = store(tmp_path / "c.runs", runs)
    page = page_of(folder)
    functions = section(page, "c1-functions")
    assert functions.count("<tr data-kind") == 2 and ">remove<" not in functions, "those that ran stay"
    assert "And 1 more, which never ran; they are in the JSON." in functions
    assert "And 8 more, which reached nothing alone or first; they are in the JSON." in section(page, "c1-faults")
    with ResultStore.open(folder) as opened:
        (build,) = json.loads(as_json(Summary(opened, folder.parent)))["coverage"]["builds"]
    assert (len(build["modules"][0]["functions"]), len(build["faults"])) == (3, 11)


def test_much_code_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmodel.coverage.page_code._INSTRUCTIONS", 11)
    known = code_of(page_of(store(tmp_path / "c.runs", RUNS)))["functions"]
    assert [value[0] for value in known.values()] == ["probe", "remove"], "helper does not fit after probe"


def test_a_growth_of_many_runs_is_a_line_of_few_points() -> None:
    flat = growth([(f"run {n}: p", 5 if n < 50_000 else 9) for n in range(100_000)])
    assert flat.count(",") < 100 and flat.count("<circle") == 2 and ">run 99999<" in flat
    steep = growth([(f"run {n}: p", n + 1) for n in range(100_000)])
    assert len(steep) < 100_000 and ">100,000<" in steep


# ---- source ----------------------------------------------------------------------------------------------


def test_growth_has_the_numbers_of_runs() -> None:
    drawn = growth([("run 4: a", 3), ("run 9: b", 5)])
    assert ">run 4</text>" in drawn and ">run 9</text>" in drawn and "<title>run 9: b: 2 new, 5 in all<" in drawn
    drawn = growth([("no fault", 3), ("running: late", 5), ("run 1", 6)])
    assert ">run 1</text>" in drawn and ">run 3</text>" in drawn and "<title>run 2, running: late: 2 new" in drawn


def test_source_beside_the_campaign(tmp_path: Path) -> None:
    """Debug information may name any file: only those beside the campaign's folder are shown, and what one asks for."""
    for inside in (True, False):
        home = tmp_path / str(inside)
        home.mkdir()
        (home / "card.c").write_text(TEXT)
        (home / "link.c").symlink_to(tmp_path / "elsewhere.c")
    (tmp_path / "elsewhere.c").write_text("secret")
    sources = Sources(within=[tmp_path / "True"])
    assert sources.text(str(tmp_path / "True" / "card.c")) == TEXT.split("\n")
    assert sources.text(str(tmp_path / "False" / "card.c")) is None
    assert sources.text(str(tmp_path / "True" / "link.c")) is None
    asked = Sources([tmp_path / "False"], within=[tmp_path / "True"])
    assert asked.text("/x/y/../card.c") is None and asked.text(str(tmp_path / "False" / "card.c")) is not None


def with_source(folder: Path) -> Path:
    """A store of a module with lines."""
    reached = with_lines()
    stuck = reached.faults["stuck"]
    return store(folder, [("6.12", "no faults", False, reached.clean), ("6.12", "stuck", True, stuck)])


def test_source_on_the_page(tmp_path: Path) -> None:
    folder = with_source(tmp_path / "c.runs")
    (tmp_path / "tree" / "driver").mkdir(parents=True)
    (tmp_path / "tree" / "driver" / "card.c").write_text(TEXT)
    with ResultStore.open(folder) as opened:
        summary = Summary(opened, tmp_path)
        without, page = html(summary), html(summary, [tmp_path / "tree"])
    assert code_of(without)["files"][0][1] is None
    ((file, text, lines),) = code_of(page)["files"]
    assert file.endswith("driver/card.c") and "\n".join(text) == TEXT
    assert lines == {"2": 2, "3": 2, "4": 1, "5": 2, "8": 2}
    assert "driver/card.c" in section(page, "c1-source")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--coverage-source", "gone"], "--coverage-source gone: is no folder"),
        (["--coverage-source", ".", "--format", "json"], "--coverage-source: --format json shows no source, only html"),
    ],
)
def test_mistakes(tmp_path: Path, arguments: list[str], said: str) -> None:
    store(tmp_path / "c.runs", [])
    assert refused(vmodel("report", "c.runs", *arguments, cwd=tmp_path)).startswith(said)


# ---- in a browser ----------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path) -> Path:
    """Of two kernels, one of them with lines."""
    reached = with_lines()
    long = "a plan with a long name " * 6
    folder = store(
        tmp_path / "c.runs",
        [
            *RUNS,
            ("6.12", long, True, FAILED),
            ("7.3", "no faults", False, reached.clean),
            ("7.3", "stuck", True, reached.faults["stuck"]),
        ],
    )
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "card.c").write_text(TEXT)
    path = tmp_path / "report.html"
    with ResultStore.open(folder) as opened:
        path.write_text(html(Summary(opened, tmp_path), [tmp_path]))
    return path


@pytest.mark.slow
def test_code_of_either_kernel_in_chromium(page: Path, browser: Browser) -> None:
    title = "document.getElementById('view-title').textContent"
    rows = "[...document.querySelectorAll('#code div')].map(row => row.className)"
    browser.open(page, f"#c1-code=card/{card().function('probe').address:x}")
    assert browser.js(once("document.getElementById('view').open", title)) == "probe (card)"
    assert browser.js(rows) == ["r2"] * 7 + ["r1"] * 3
    browser.js(f"location.hash = '#c2-code=lined/{lined().function('probe').address:x}'")
    assert browser.js(once(f"{title}.includes('lined')", title)) == "probe (lined), card.c"
    assert "r1" in browser.js(rows)
    browser.js("location.hash = '#c2-code=lined/999999'")
    assert "no code of this function" in browser.js(once(f"{title}.startsWith('999999')", "code.textContent"))
    browser.js("document.getElementById('close').click()")
    assert browser.js(once("!location.hash"))
    # The campaign's own links and filters work beside it.
    browser.js("location.hash = '#run-2'")
    assert browser.js("document.getElementById('view').open") is False
    assert browser.js("document.getElementById('shown').textContent") == "6 of 6"
    shown = "document.querySelector('[data-shown=c2-function-table]').textContent"
    assert browser.js(shown) == "3 of 3"
    browser.js(
        "{ const choice = document.querySelector('[data-choose=c2-function-table]');"
        " choice.value = 'none'; choice.dispatchEvent(new Event('input')); }"
    )
    assert browser.js(shown) == "1 of 3"
    browser.js("document.querySelector('#c1-function-table th:nth-child(4) button').click()")
    names = "[...document.querySelectorAll('#c1-function-table tbody td.name')].map(cell => cell.textContent)"
    assert browser.js(names) == ["remove", "helper", "probe"]
    assert browser.said == [] and browser.requests == [page.as_uri()]


@pytest.mark.slow
@pytest.mark.parametrize("width", [600, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_and_can_be_read(page: Path, browser: Browser, width: int, scheme: str) -> None:
    browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    browser.media(prefers_color_scheme=scheme)
    browser.open(page)
    assert browser.js("document.documentElement.scrollWidth") <= width
    colour = browser.js("getComputedStyle(document.querySelector('#coverage i.clean')).backgroundColor")
    assert colour == {"light": "rgb(67, 165, 115)", "dark": "rgb(63, 160, 109)"}[scheme]
    check_contrast(browser, "#coverage :is(p, li, th, td, a, code, .sign, .muted)", pairs=4)
    bar = browser.js("document.querySelector('#c1-function-table .reach').getBoundingClientRect().height")
    assert 5 < bar < 20, "the campaign's own bar is another"
