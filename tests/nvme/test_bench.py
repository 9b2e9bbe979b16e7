"""vmodel bench nvme, for a moment; its percentiles and its plot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from vmodel.cli.bench import BLOCKS, DEPTHS, Figure, percentiles, plot
from vmodel.cli.chart import Chart, Series, draw
from vmodel.testing.nvme import Latency

pytestmark = pytest.mark.slow

SVG = "{http://www.w3.org/2000/svg}"


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmodel", "bench", "nvme", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_run_of_a_moment(tmp_path: Path) -> None:
    done = bench("--seconds", "0.02", "--json", "--svg", str(tmp_path / "plot.svg"))
    assert done.returncode == 0, done.stderr
    figures = [Figure(**figure) for figure in json.loads(done.stdout)]
    kinds = [(what, block, depth) for block in BLOCKS for what in ("random read", "random write") for depth in DEPTHS]
    assert [(f.what, f.block, f.depth) for f in figures] == kinds
    for f in figures:
        assert f.iops > 0 and f.per_core > 0 and f.over_memcpy > 0
        assert 0 < f.p50 <= f.p99 <= f.p99_9
    root = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert len(root.findall(f".//{SVG}circle")) == 3 * len(figures)


def test_in_a_file(tmp_path: Path) -> None:
    done = bench("--seconds", "0.02", "--file", str(tmp_path / "disk.img"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("128 KiB") == 2 * len(DEPTHS)
    assert not (tmp_path / "disk.img").exists()
    (tmp_path / "mine.img").write_text("mine")
    done = bench("--file", str(tmp_path / "mine.img"))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert (tmp_path / "mine.img").read_text() == "mine"


def test_percentiles_count_commands() -> None:
    found = [Latency(1, 9000), Latency(98, 1000), Latency(1, 5000)]
    assert percentiles(found, (0.5, 0.98, 0.99, 1.0)) == [1.0, 1.0, 5.0, 9.0]


def test_lines_are_where_they_should_be() -> None:
    text = draw("a & b", [Chart("x < y", "x", "y", [Series("one", [(1, 10), (4, 1000)]), Series("two", [(2, 100)])])])
    root = ElementTree.fromstring(text)
    places = [(float(c.get("cx", "")), float(c.get("cy", ""))) for c in root.iter(f"{SVG}circle")]
    (left, bottom), (right, top), (middle, half) = places
    assert left < middle < right and bottom > half > top
    assert abs(middle - (left + right) / 2) < 0.2 and abs(half - (top + bottom) / 2) < 0.2
    assert root.findtext(f"{SVG}title") == "a & b"


def test_a_plot_has_a_line_for_each_kind() -> None:
    figures = [Figure("random read", 4096, depth, 100.0 * depth, 1.0, 1.0, 1.0, 10, 20, 30) for depth in (1, 2)]
    root = ElementTree.fromstring(plot(figures))
    assert len(root.findall(f".//{SVG}circle")) == 6
