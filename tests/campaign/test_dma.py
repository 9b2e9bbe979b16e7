"""The DMA of drivers in a campaign: its file, which runs are as expected, and the report; without guests, by a rig."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.browser import Browser, check_contrast
from tests.campaign.files import MACHINE
from tests.campaign.runs import rows
from tests.cli.commands import refused, vmodel
from tests.dma_report.made import RW, Made
from vmodel.campaign.matrix import Matrix
from vmodel.campaign.schema import load
from vmodel.experiment.oracle import Outcome
from vmodel.span import PAGE

#: A case's report is in a file, named by the kernel and the workload.
RIG = """
import gzip
from vmodel.campaign.rig import harness_error
from vmodel.dma_report import DmaReport
from vmodel.dma_report.finding import signs_of
from vmodel.experiment.oracle import classify, of_dma

class Lab:
    def run(self, case, folder):
        result = harness_error(case, "none", "none")
        made = {"versions": {"kernel": case.kernel + ".1"}, "artefacts": {}, "evidence": (), "signatures": ()}
        if case.watches_dma:
            text = case.machine.with_name(f"{case.workload}-{case.kernel}.json").read_text()
            (folder / "dma.json.gz").write_bytes(gzip.compress(text.encode()))
            wrong = tuple(finding for _, finding in DmaReport.model_validate_json(text).findings)
            found = tuple(of_dma(wrong, signs_of(case.dma_fails)))
            made |= {"artefacts": {"dma": "dma.json.gz"}, "findings": wrong, "evidence": found}
            made["signatures"] = tuple(one.signature for one in found)
        return result.model_copy(update={**made, "outcome": classify(made["evidence"], injected=False)})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass
"""
CAMPAIGN = """
[campaign]
name = "dma"
kernels = ["6.12", "7.3"]
rig = "lab.py:Lab"
{keys}
[[machine]]
file = "edu.toml"
[[workload]]
name = "copy"
run = "copy"
[[plan]]
name = "late"
faults = ["dma.write do=delay(ms=1)"]
"""


def user_folder(path: Path) -> Path:
    """With the machine, the rig, and what it is to find: a leak on 6.12."""
    (path / "edu.toml").write_text(MACHINE)
    (path / "lab.py").write_text(RIG)
    for kernel, leaks in (("6.12", True), ("7.3", False)):
        with Made() as made:
            for n in range(4):
                made.domain.map(0x10000 + n * PAGE, 0x2000, PAGE, RW)
                made.dma.write(0x10000 + n * PAGE, bytes(100))
                if n or not leaks:
                    made.unmap(0x10000 + n * PAGE, PAGE)
            made.dma.bus_master = False
            (path / f"copy-{kernel}.json").write_text(made.report().model_dump_json())
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return user_folder(tmp_path)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's folder with a campaign that has recorded the DMA; tests only read it."""
    folder = user_folder(tmp_path_factory.mktemp("user"))
    write(folder, "dma_report = true")
    assert vmodel("campaign", "c.toml", cwd=folder).returncode == 0
    return folder


def write(folder: Path, keys: str) -> Path:
    path = folder / "c.toml"
    path.write_text(CAMPAIGN.format(keys=keys))
    return path


def test_without_it_keys_of_runs_stay_and_nothing_is_recorded(folder: Path) -> None:
    path = write(folder, "")
    cases = [run.case.model_dump(exclude_defaults=True) for run in Matrix(load(path)[0], path).runs()]
    assert cases and not any({"dma_report", "dma_fails"} & case.keys() for case in cases)
    assert vmodel("campaign", "c.toml", cwd=folder).returncode == 0
    assert 'id="dma"' not in vmodel("report", "c.runs", cwd=folder).stdout
    assert "dma" not in json.loads(vmodel("report", "c.runs", "--format", "json", cwd=folder).stdout)


def test_findings_alone_change_no_outcome(recorded: Path) -> None:
    found = rows(recorded / "c.runs")
    assert {row.result.outcome for row in found if row.result} == {Outcome.NOT_ACTIVATED}
    assert {(row.run.kernel, "dma-leak" in row.result.signs) for row in found if row.result} == {
        ("6.12", True),
        ("7.3", False),
    }


def test_a_sign_that_is_a_failure_is_not_as_expected(folder: Path) -> None:
    """Though a reported error is, by default: what is wrong is not the answer to a fault."""
    write(folder, 'dma_fails = ["error"]')
    done = vmodel("campaign", "c.toml", cwd=folder)
    assert done.returncode == 1
    assert "dma-leak: edu0: 1 mapping of 4 KiB still there, though the driver released the device" in done.stderr
    failed = [row for row in rows(folder / "c.runs") if not row.expected]
    assert [(row.run.kernel, row.run.plan) for row in failed] == [("6.12", "no faults"), ("6.12", "late")]
    assert {row.result.outcome for row in failed if row.result} == {Outcome.FAILED}


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            'dma_fails = ["dma-leek"]',
            "dma_fails[0]: 'dma-leek': is no sign of a DMA finding: did you mean 'dma-leak'?",
        ),
        ("dma_report = 3", "dma_report: 3: input should be a valid boolean, unable to interpret input"),
    ],
)
def test_mistakes_in_the_file(folder: Path, keys: str, said: str) -> None:
    write(folder, keys)
    assert refused(vmodel("campaign", "c.toml", cwd=folder)).endswith(f"c.toml: campaign.{said}")


@pytest.mark.slow
def test_the_report_has_tables_and_drawings(recorded: Path, tmp_path: Path, browser: Browser) -> None:
    [table] = json.loads(vmodel("report", "c.runs", "--format", "json", cwd=recorded).stdout)["dma"]
    assert (table["machine"], table["workload"], table["recorded"]) == ("edu", "copy", {"6.12": 2, "7.3": 2})
    leak = table["signs"]["dma-leak"]
    assert (leak["6.12"]["runs"], leak["6.12"]["of"], leak["7.3"]["runs"]) == ([1, 2], 2, [])
    assert leak["6.12"]["first"]["endpoint"] == "edu0"
    page = tmp_path / "r.html"
    assert vmodel("report", "c.runs", "-o", page, cwd=recorded).stderr == ""
    browser.open(page)
    assert browser.said == []
    shown = browser.js('[...document.querySelectorAll("#dma tbody tr")].map(row => row.innerText)')
    assert shown[0].split("\t")[:4] == ["error", "dma-leak", "2 of 2", "0 of 2"]
    assert browser.js('document.querySelectorAll("#dma svg").length') == 2  # one for each kernel
    assert browser.js('document.querySelectorAll("#dma .dma-bad").length') > 0
    for width in (1100, 400):
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        assert browser.js("document.documentElement.scrollWidth") <= width
        for scheme in ("light", "dark"):
            browser.media(prefers_color_scheme=scheme)
            check_contrast(browser, "#dma td, #dma th, #dma h3, #dma p", 2)


def test_a_damaged_record_is_said_and_the_rest_is_shown(recorded: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(recorded, folder)
    (folder / "c.runs" / "1" / "dma.json.gz").write_bytes(b"\x1f\x8bnot")
    page = vmodel("report", "c.runs", cwd=folder).stdout
    assert "run 1: dma.json.gz is damaged" in page and page.count("<svg viewBox") == 1
