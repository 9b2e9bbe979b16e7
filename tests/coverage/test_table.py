"""Coverage as tables for a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tests.coverage.card import CLEAN, card, comparison, with_lines
from tests.coverage.objects import function, program
from vmodel.coverage.addresses import AddressSet
from vmodel.coverage.comparison import Comparison, Tally
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.registry import programs
from vmodel.coverage.table import percent, table


def shown(comparison: Comparison, limit: int = 20, width: int = 80) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table(comparison, limit))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def test_one_coverage() -> None:
    assert shown(Comparison(CLEAN)) == "\n".join(
        [
            f"{'Module':<49}{'Functions':>9}  {'Instructions reached':>20}",
            f"{'card':<49}{'2 of 3':>9}  {'9 of 13  69 %':>20}",
            "",
            "card: functions that ran in part",
            f"{'Function':<65}{'Instructions':>15}",
            f"{'probe':<65}{'7 of 10  70 %':>15}",
            "",
            "card: 1 function ran as a whole",
            "",
            "card: 1 function did not run",
            "remove",
        ]
    ).replace("card:", "card:")


def test_with_faults() -> None:
    lines = shown(comparison()).splitlines()
    assert lines[0].split() == ["Module", "Functions", "Instructions", "reached", "Faults", "only"]
    assert lines[1].split() == ["card", "2", "of", "3", "12", "of", "13", "92", "%", "3"]


def test_with_lines() -> None:
    lines = shown(with_lines()).splitlines()
    assert lines[0].split() == ["Module", "Functions", "Instructions", "reached", "Lines", "Faults", "only"]
    assert " ".join(lines[1].split()) == "lined 2 of 3 12 of 13 92 % 5 of 5 100 % 3"
    (clean,) = [
        " ".join(line.split()) for line in shown(Comparison(with_lines().clean)).splitlines() if "card.c" in line
    ]
    assert clean == "probe card.c:2 7 of 10 70 % 3 of 4 75 %"


def many(count: int) -> Comparison:
    """A module of many functions of two instructions; of the first half, one ran."""
    names = [f"a_rather_long_name_of_a_function_{n:03}" for n in range(count)]
    own = programs.add(program("\n".join(function(name, "push %rbx\nret") for name in names), f"many{count}"))
    addresses = [function.address for function in own.functions[: count // 2]]
    return Comparison(Coverage({own.name: AddressSet(addresses)}, {own.name: own.build_id}))


def test_long_lists_are_cut_and_say_by_how_much() -> None:
    text = shown(many(100), limit=7)
    lines = text.splitlines()
    assert sum("1 of 2  50 %" in line for line in lines) == 7
    assert "and 43 more" in lines
    assert "many100: 50 functions did not run" in lines
    names = [word for word in text.partition("did not run")[2].replace(",", " ").split() if word.startswith("a_rather")]
    assert 5 < len(names) < 50 and f"and {50 - len(names)} more" in " ".join(text.split())
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("width", [40, 80, 200])
def test_any_width(width: int) -> None:
    assert max(map(len, shown(comparison(), width=width).splitlines())) <= min(width, 80)


def test_a_module_whose_file_is_not_here() -> None:
    gone = Coverage({"gone": AddressSet([1, 2])}, {"gone": "ab"})
    text = " ".join(shown(Comparison(gone | CLEAN)).split())
    assert "gone with build id ab: this file is not here, so its functions are unknown" in text


def test_names_are_text_and_no_markup() -> None:
    odd = programs.add(program(function("probe", "nop\nret"), "[bold]odd"))
    found = Comparison(Coverage({odd.name: AddressSet([odd.functions[0].address])}, {odd.name: odd.build_id}))
    assert "[bold]odd: functions that ran in part" in shown(found)
    assert card().name == "card"


def test_percent() -> None:
    assert [percent(Tally(1000, n)) for n in (0, 1, 10, 999, 1000)] == ["  0 %", "  1 %", "  1 %", " 99 %", "100 %"]
