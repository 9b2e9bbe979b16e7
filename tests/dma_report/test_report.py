"""Findings, text and page of the DMA sanitizer, by a machine whose mappings the test makes."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from tests.dma_report.made import MACHINE, RW, Made
from vmodel.dma_report import SIGNS, DmaReport, Severity
from vmodel.dma_report.analysis import size
from vmodel.dma_report.files import write_report
from vmodel.dma_report.finding import signs_of
from vmodel.dma_report.page import page
from vmodel.dma_report.text import text
from vmodel.errors import Access, DmaFault
from vmodel.machine import parse
from vmodel.span import PAGE


@pytest.fixture
def made() -> Iterator[Made]:
    with Made() as made:
        yield made


def test_what_is_right_is_no_finding(made: Made) -> None:
    made.domain.map(0x10000, 0x2000, PAGE, Access.READ)
    made.dma.read(0x10000, PAGE)
    made.unmap(0x10000, PAGE)
    (endpoint,) = made.report().endpoints
    assert (endpoint.findings, endpoint.known, endpoint.totals.mapped) == ((), "reported", 1)
    assert endpoint.totals.uses == {"r": {"r": 1}}
    assert "nothing is wrong with them" in printed(made.report())


def test_an_access_with_bus_mastering_off(made: Made) -> None:
    made.domain.map(0x10000, 0x2000, PAGE, Access.READ)
    made.dma.bus_master = False
    with pytest.raises(DmaFault):
        made.dma.read(0x10000, 8)
    assert made.texts()["dma-in-flight"] == "1 read with bus mastering off"


def test_what_stays_mapped_is_a_leak_while_bus_mastering_is_off_and_else_held(made: Made) -> None:
    made.domain.map(0x10000, 0x2000, 2 * PAGE, RW)
    assert made.texts() == {}
    made.dma.bus_master = False
    assert made.texts() == {"dma-leak": "1 mapping of 8 KiB still there, though the driver released the device"}
    made.dma.bus_master = True
    assert made.texts() == {"dma-held": "1 mapping of 8 KiB still there since before a reset"}
    assert made.report().signs == []  # a note is no finding to fail for
    made.dma.read(0x10000, 8)
    assert made.texts() == {}


def test_accesses_that_are_refused(made: Made) -> None:
    made.domain.map(0x10000, 0x2000, PAGE, Access.READ)
    for iova in (0x10000, 0x50000):
        with pytest.raises(DmaFault):
            made.dma.write(iova, b"x")
    made.dma.read(0x10000, PAGE)
    made.unmap(0x10000, PAGE)
    for _ in range(2):
        with pytest.raises(DmaFault):
            made.dma.read(0x10010, 8)
    assert made.texts() == {
        "dma-after-unmap": "2 reads of memory that was unmapped",
        "dma-unmapped": "1 write of addresses that were never mapped",
        "dma-direction": "1 write that the mapping does not allow",
    }
    findings = {finding.sign: finding for _, finding in made.report().findings}
    (shown, _) = findings["dma-after-unmap"].examples
    assert (shown.iova, shown.size, shown.gpa) == (0x10000, PAGE, 0x2000)
    assert "r at 0x10010" in shown.text and "after the unmap of 0x10000 (4 KiB)" in shown.text


def test_mappings_that_are_too_wide(made: Made) -> None:
    made.domain.map(0x10000, 0x2000, 4 * PAGE, RW)
    made.dma.write(0x10000, bytes(100))
    made.domain.map(0x20000, 0x8000, PAGE, Access.READ)
    made.unmap(0x10000, 4 * PAGE)
    made.unmap(0x20000, PAGE)
    assert made.texts() == {
        "dma-both-directions": "1 mapping for both directions: 1 only written",
        "dma-too-large": "1 mapping with 12 KiB in pages that the device never touched",
        "dma-unused": "1 mapping that the device never touched",
    }


def test_a_sealed_report_stays(made: Made) -> None:
    made.domain.map(0x10000, 0x2000, PAGE, RW)
    made.watch.seal(settle=60)  # nothing was released, so it does not wait
    made.dma.bus_master = False
    assert made.texts() == {}


def test_more_incidents_than_are_kept_are_at_least_so_many(made: Made) -> None:
    for _ in range(300):
        with pytest.raises(DmaFault):
            made.dma.read(0x50000, 1)
    assert made.texts()["dma-unmapped"].startswith("at least 256 reads")


def test_a_report_that_nobody_asked_for() -> None:
    machine = parse(MACHINE, Path("made.toml"))
    with pytest.raises(RuntimeError, match=r"watch_dma\(\)"):
        machine.dma_report()
    machine.close()


def printed(report: DmaReport) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(text(report))
    return out.getvalue()


def test_text_page_and_json_have_the_findings(made: Made, tmp_path: Path) -> None:
    made.domain.map(0x10000, 0x2000, 4 * PAGE, RW)
    made.dma.write(0x10000, bytes(100))
    made.unmap(0x10000, 4 * PAGE)
    made.domain.map(0x20000, 0x2000, PAGE, Access.READ)
    made.dma.bus_master = False
    report = made.report()
    shown = printed(report)
    assert all(len(line) <= 80 for line in shown.splitlines())
    content = page(report)
    for sign in ("dma-leak", "dma-both-directions", "dma-too-large"):
        assert sign in shown and sign in content
    assert content.count('<rect class="dma-mapped') == 2 and content.count('<rect class="dma-rw') == 1  # one was used
    assert '<rect class="dma-off"' in content and "http" not in content
    for name in ("r.json", "r.html"):
        write_report(report, tmp_path / name)
    assert DmaReport.model_validate_json((tmp_path / "r.json").read_text()) == report
    assert (tmp_path / "r.html").read_text() == content


def test_kinds_are_ordered_by_severity() -> None:
    order = list(Severity)
    ranks = [order.index(sign.severity) for sign in SIGNS.values()]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize(("count", "words"), [(0, "0 bytes"), (1, "1 byte"), (4096, "4 KiB"), (3 << 19, "1.5 MiB")])
def test_sizes_for_people(count: int, words: str) -> None:
    assert size(count) == words


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["dma-leek"], "'dma-leek' is no sign of a DMA finding: did you mean 'dma-leak'?"),
        (["dma-held"], "'dma-held' is no sign of a DMA finding: did you mean "),
        (["error", ""], "'' is no sign of a DMA finding: known are dma-after-unmap, "),
    ],
)
def test_names_of_signs_that_are_wrong(names: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        signs_of(names)


def test_a_severity_is_all_signs_as_grave() -> None:
    errors, warnings = signs_of(["error"]), signs_of(["warning"])
    assert {"dma-leak", "dma-in-flight"} < errors < warnings and "dma-unused" in warnings - errors
    assert signs_of(["error", "dma-unused"]) == errors | {"dma-unused"}
    assert "dma-held" not in warnings
