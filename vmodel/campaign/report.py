"""A campaign's report: one self-contained HTML page, JSON for tools, JUnit XML for CI."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jinja2

from vmodel.campaign import chart
from vmodel.campaign.coverage import BuildCoverage
from vmodel.campaign.coverage_page import coverage_part
from vmodel.campaign.dma import DmaTable, dma_part, tables
from vmodel.campaign.statistics import quantile
from vmodel.campaign.summary import Ended, Summary
from vmodel.coverage.document import document
from vmodel.coverage.sections import asset
from vmodel.coverage.sources import Sources
from vmodel.experiment.oracle import Outcome
from vmodel.files import cache_dir

#: Characters that XML 1.0 cannot represent, even escaped (XML 1.0, 2.2).
_NO_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
#: For each outcome: its CSS class, its mark, and a short name.
MARKS = {
    Outcome.NOT_ACTIVATED: ("void", "·", "not activated"),
    Outcome.MASKED: ("masked", "○", "masked"),
    Outcome.RECOVERED: ("recovered", "✓", "recovered"),
    Outcome.FAILED: ("failed", "!", "failed"),
    Outcome.CORRUPTION: ("corruption", "≠", "corruption"),
    Outcome.HANG: ("hang", "…", "hang"),
    Outcome.CRASH: ("crash", "×", "crash"),
    Outcome.HARNESS: ("harness", "?", "harness error"),
}


def html(summary: Summary, sources: Sequence[Path] = ()) -> str:
    """The report as one HTML page without external resources.

    It shows source files that are below `sources`, and those that debug information names beside the campaign's folder
    or in the cache, which has kernel headers.
    """
    text = files("vmodel.campaign").joinpath("page.html.jinja").read_text(encoding="utf-8")
    # The page contains text from guests: autoescape.  StrictUndefined: a misspelt name is an error.
    engine = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    engine.filters |= {"seconds": lambda value: "" if value is None else chart.seconds(value)}
    return engine.from_string(text).render(
        summary=summary,
        base=asset("base.css"),
        marks=MARKS,
        outcomes=[outcome for outcome in Outcome if summary.outcomes[outcome]],
        rate=lambda rate, outcome: chart.interval(rate, f"--{MARKS[outcome][0]}"),
        survival=lambda rate: chart.interval(rate, "--recovered"),
        times=chart.times([(_title(summary, fault), fault.recover) for fault in summary.faults]),
        quantiles=_quantiles(summary),
        coverage=coverage_part(summary.coverage, _rules(summary), _sources(summary, sources)),
        dma=dma_part(summary),
        sort=asset("sort.js"),
        several_machines=len({run.row.run.machine for run in summary.runs}) > 1,
        several_workloads=len({run.row.run.workload for run in summary.runs}) > 1,
    )


def _title(summary: Summary, fault: Any) -> str:
    same = [other for other in summary.faults if other.plan == fault.plan]
    return fault.plan if len(same) == 1 else f"{fault.plan} ({fault.machine}, {fault.workload})"


def _rules(summary: Summary) -> dict[str, list[str]]:
    """The rules of each plan that inject faults."""
    found: dict[str, list[str]] = {}
    for run in summary.runs:
        what = run.row.run
        if what.plan not in found and what.case.plan is not None:
            found[what.plan] = [rule.text() for rule in what.case.plan.rule if rule.do.name != "watch"]
    return found


def _sources(summary: Summary, roots: Sequence[Path]) -> Sources:
    return Sources(roots, within=[summary.folder.parent, cache_dir()])


def _quantiles(summary: Summary) -> dict[str, float]:
    values = [value for fault in summary.faults for value in fault.recover]
    if not values:
        return {}
    return {"median": quantile(values, 0.5), "90 %": quantile(values, 0.9), "longest": max(values)}


def as_json(summary: Summary) -> str:
    """The report as JSON, for tools; times in seconds, rates from 0 to 1 with Wilson's 95 % interval."""
    content: dict[str, Any] = {
        "kind": summary.kind,
        "name": summary.name,
        "started": summary.started,
        "ended": summary.ended,
        "total": summary.total,
        "outcomes": {
            outcome.value: {"runs": summary.outcomes[outcome], **_rate(summary.rate(outcome))} for outcome in Outcome
        },
        "faults": [
            {
                "machine": fault.machine,
                "workload": fault.workload,
                "plan": fault.plan,
                "rules": list(fault.rules),
                "outcomes": {o.value: fault.count(o) for o in Outcome if fault.count(o)},
                "survived": {"runs": fault.survived.hits, **_rate(fault.survived)},
                "time_to_recover": fault.recover,
            }
            for fault in summary.faults
        ],
        "signatures": [
            {
                "signature": signature.text,
                "effect": signature.effect.value,
                "sign": signature.sign,
                "runs": [run.row.id for run in signature.runs],
                "plans": signature.plans,
                "kernels": signature.kernels,
                "example": signature.example,
            }
            for signature in summary.signatures
        ],
        "versions": summary.versions,
        "runs": [_run(run) for run in summary.runs],
    }
    if summary.coverage:
        content["coverage"] = {
            "builds": [_build(build) for build in summary.coverage.builds],
            "notes": list(summary.coverage.notes),
        }
    if found := tables(summary):
        content["dma"] = [_dma(table) for table in found]
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _dma(table: DmaTable) -> dict[str, Any]:
    return {
        "machine": table.machine,
        "workload": table.workload,
        "recorded": table.recorded,
        "signs": {
            sign: {
                kernel: {
                    "runs": [run.row.id for run in count.runs],
                    "of": count.of,
                    "first": None if count.first is None else count.first.model_dump(mode="json"),
                }
                for kernel, count in counts.items()
            }
            for sign, _, counts in table.rows
        },
    }


def _build(build: BuildCoverage) -> dict[str, Any]:
    runs = {"runs": len(build.new), "clean_runs": build.clean_runs}
    content = document(build.comparison)
    for fault in content["faults"]:
        fault["first"] = len(build.first[fault["name"]])
    return {"kernels": build.kernels, **runs, **content}


def _rate(rate: Any) -> dict[str, Any]:
    low, high = rate.interval
    return {"of": rate.of, "rate": round(rate.share, 6), "low": round(low, 6), "high": round(high, 6)}


def _run(run: Ended) -> dict[str, Any]:
    what, result = run.row.run, run.result
    return {
        "id": run.row.id,
        "machine": what.machine,
        "kernel": run.kernel,
        "workload": what.workload,
        "plan": what.plan,
        "seed": what.seed,
        "outcome": result.outcome.value,
        "expected": run.row.expected,
        "evidence": [finding.model_dump(mode="json") for finding in result.evidence],
        "injections": result.injected,
        "time_to_detect": result.time_to_detect,
        "time_to_recover": result.time_to_recover,
        "wall": result.wall,
        "versions": result.versions,
        "artefacts": run.links,
        "command": run.command,
    }


def junit(summary: Summary) -> str:
    """JUnit XML: a suite for each machine, kernel and workload; a case for each plan and seed.

    "failure": the outcome is not an expected one; "skipped": the fault was not activated; "error": a harness error.
    """
    root = ElementTree.Element("testsuites", name=_xml(summary.name))
    suites: dict[str, ElementTree.Element] = {}
    for run in summary.runs:
        what, result = run.row.run, run.result
        place = ".".join(part for part in (what.machine, run.kernel, what.workload) if part)
        suite = suites.get(place)
        if suite is None:
            suite = suites[place] = ElementTree.SubElement(root, "testsuite", name=_xml(place))
        name = what.plan if what.control else f"{what.plan} [seed {what.seed}]"
        case = ElementTree.SubElement(
            suite, "testcase", classname=_xml(place), name=_xml(name), time=f"{result.wall:.3f}"
        )
        text = "\n".join([*(f"{f.oracle}: {f.text}" for f in result.evidence), "", run.command])
        if result.outcome is Outcome.HARNESS:
            verdict = "error"
        elif result.outcome is Outcome.NOT_ACTIVATED and not what.control:
            verdict = "skipped"
        elif not run.row.expected:
            verdict = "failure"
        else:
            continue
        ElementTree.SubElement(case, verdict, message=_xml(result.outcome.value)).text = _xml(text)
    for suite in suites.values():
        suite.set("tests", str(len(suite)))
        for verdict, key in (("error", "errors"), ("failure", "failures"), ("skipped", "skipped")):
            suite.set(key, str(len(suite.findall(f"testcase/{verdict}"))))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _xml(text: str) -> str:
    return _NO_XML.sub("�", text)


FORMATS: Mapping[str, Callable[[Summary], str]] = {"html": html, "json": as_json, "junit": junit}
