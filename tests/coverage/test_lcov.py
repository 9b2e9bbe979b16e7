"""lcov's format, as its geninfo(1) describes it under "TRACEFILE FORMAT"; genhtml 1.16 and 2.3 read the same output."""

from __future__ import annotations

from pathlib import Path

from tests.coverage.card import CLEAN, TEXT, card, comparison, lined, with_lines
from vmodel.coverage.comparison import Comparison
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.lcov import lcov
from vmodel.coverage.listing import listing
from vmodel.coverage.sources import Sources


def records(text: str) -> list[dict[str, list[str]]]:
    """Each record's lines by their key; its end is one of them."""
    found: list[dict[str, list[str]]] = []
    for part in text.split("end_of_record\n")[:-1]:
        found.append({})
        for line in part.splitlines():
            key, colon, rest = line.partition(":")
            assert colon, line
            found[-1].setdefault(key, []).append(rest)
    assert text.endswith("end_of_record\n")
    return found


def of(comparison: Comparison) -> list[dict[str, list[str]]]:
    return records(lcov(comparison, {"card": (Path("/out/card.s"), listing(card()))}, Sources()))


def test_listing() -> None:
    rows = listing(card()).text.splitlines()
    assert rows[0] == f"# card, build id {card().build_id or 'none'}"
    assert rows[3] == "probe:  # .text"
    assert [row.split(maxsplit=1)[1] for row in rows[4:14]] == [
        "push rbx",
        "call helper",
        "test eax, eax",
        "js probe+0xe",
        "xor eax, eax",
        "pop rbx",
        "ret",
        "mov eax, 0xffffffea",
        "pop rbx",
        "ret",
    ]
    lines = listing(card()).lines
    assert [lines[address] for address in card().function("probe").addresses] == list(range(5, 15))


def test_without_lines_the_listing_is_the_source() -> None:
    (record,) = of(Comparison(CLEAN))
    assert record["TN"] == ["clean"] and record["SF"] == ["/out/card.s"]
    assert record["FN"] == ["5,probe", "17,helper", "21,remove"]
    assert record["FNDA"] == ["1,probe", "1,helper", "0,remove"]
    assert (record["FNF"], record["FNH"]) == (["3"], ["2"])
    assert record["DA"][:10] == [f"{line},{int(line < 12)}" for line in range(5, 15)]
    assert (record["LF"], record["LH"]) == (["13"], ["9"])
    assert record["BRDA"] == ["8,0,0,0", "8,0,1,1"]
    assert (record["BRF"], record["BRH"]) == (["2"], ["1"])


def test_every_function_begins_at_a_line_with_code() -> None:
    """genhtml 2 refuses others ("unexpected category UNK")."""
    (record,) = of(Comparison(CLEAN))
    assert {row.split(",")[0] for row in record["FN"]} <= {row.split(",")[0] for row in record["DA"]}


def test_faults_are_a_second_test() -> None:
    clean, faults = of(comparison())
    assert (clean["TN"], faults["TN"]) == (["clean"], ["faults"])
    assert clean["LH"] == ["9"] and faults["LH"] == ["12"]
    assert faults["BRDA"] == ["8,0,0,1", "8,0,1,1"]


def test_lines_of_source(tmp_path: Path) -> None:
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "card.c").write_text(TEXT)
    clean, faults = records(lcov(with_lines(), {}, Sources([tmp_path])))
    assert clean["SF"] == faults["SF"] == [f"{tmp_path}/driver/card.c"]
    assert clean["FN"] == ["2,probe", "8,helper"] and clean["FNH"] == ["2"]
    assert clean["DA"] == ["2,1", "3,1", "4,0", "5,1", "8,1"]
    assert faults["DA"] == ["2,1", "3,1", "4,1", "5,1", "8,1"]
    assert clean["BRDA"] == ["3,0,0,0", "3,0,1,1"] and faults["BRDA"] == ["3,0,0,1", "3,0,1,1"]


def test_source_that_is_not_here_keeps_its_path() -> None:
    record = records(lcov(with_lines(), {}, Sources()))[0]
    assert record["SF"][0].endswith("driver/card.c")


def test_a_line_that_ran_without_its_jump_says_nothing_of_branches() -> None:
    """genhtml 2 refuses others ("line is hit but no branches on line have been evaluated")."""
    call = lined().function("probe").addresses[1]
    (record,) = records(lcov(Comparison(Coverage.of_ranges(lined(), [(call, call + 1)])), {}, Sources()))
    assert "3,1" in record["DA"] and "BRDA" not in record and record["BRF"] == ["0"]


def test_a_jump_that_did_not_run_has_no_counts() -> None:
    (record,) = of(Comparison(CLEAN - CLEAN))
    assert record["BRDA"] == ["8,0,0,-", "8,0,1,-"] and record["BRH"] == ["0"]
    assert record["LH"] == ["0"] and record["FNH"] == ["0"]
