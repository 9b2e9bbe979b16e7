"""Coverage without faults beside coverage by fault, and branches that were never taken."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.coverage.card import CLEAN, FAILED, card, comparison, ran, with_lines
from tests.coverage.objects import compiled, function, program
from vmodel.coverage.addresses import AddressSet
from vmodel.coverage.comparison import Comparison, Reach, Tally
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.frontier import Untaken, untaken
from vmodel.coverage.program import Program
from vmodel.coverage.registry import programs

#: The end of the path in debug information; DWARF 5 has the compiler's folder before it.
CARD = "driver/card.c"


def test_a_single_coverage() -> None:
    (module,) = Comparison(CLEAN).modules
    assert (module.name, module.build_id, module.note) == ("card", card().build_id, "")
    assert module.instructions == Tally(13, 9, 0) and module.functions_reached == 2
    assert {row.name: row.instructions for row in module.functions} == {
        "probe": Tally(10, 7, 0),
        "helper": Tally(2, 2, 0),
        "remove": Tally(1, 0, 0),
    }


def test_faults_beside_it() -> None:
    found = comparison()
    (module,) = found.modules
    assert module.instructions == Tally(13, 9, 3)
    assert (module.instructions.reached, module.instructions.never) == (12, 1)
    addresses = card().function("probe").addresses
    assert [found.reach("card", addresses[n]) for n in (0, 4, 7)] == [Reach.CLEAN, Reach.CLEAN, Reach.FAULTS]
    assert found.reach("card", card().function("remove").address) is Reach.NEVER
    assert found.growth == [("no fault", 9), ("no fault", 9), ("lost", 9), ("stuck", 12)]


def test_what_only_one_fault_reached() -> None:
    stuck, lost = comparison().by_fault
    assert (stuck.name, stuck.reached, len(stuck.only), stuck.functions) == ("stuck", 9, 3, (("card", "probe", 3),))
    assert (lost.name, lost.reached, len(lost.only), lost.functions) == ("lost", 9, 0, ())
    both = Comparison(CLEAN, {"one": FAILED, "two": FAILED})
    assert [len(row.only) for row in both.by_fault] == [0, 0]


@given(
    st.dictionaries(st.text(max_size=3), st.frozensets(st.integers(0, 9)), max_size=6), st.frozensets(st.integers(0, 9))
)
def test_what_only_one_reached_as_the_definition_says(faults: dict[str, frozenset[int]], clean: frozenset[int]) -> None:
    def made(numbers: frozenset[int]) -> Coverage:
        return Coverage({"nowhere": AddressSet(numbers)}, {"nowhere": "ab"})

    found = Comparison(made(clean), {name: made(numbers) for name, numbers in faults.items()}).by_fault
    for row in found:
        others = frozenset().union(*(numbers for name, numbers in faults.items() if name != row.name))
        assert {at for _, at in row.only} == faults[row.name] - clean - others
    assert {row.name for row in found} == faults.keys()


def test_thousands_of_faults_take_seconds() -> None:
    """Not their number squared."""
    faults = {str(n): Coverage({"nowhere": AddressSet(range(n, n + 200_000, 4001))}) for n in range(2000)}
    begun = time.process_time()
    assert len(Comparison(Coverage(), faults).by_fault) == 2000
    assert time.process_time() - begun < 20  # it takes 0.5 s


def test_percent_is_rounded_down() -> None:
    assert Tally(1000, 998, 1).percent == 99.9
    assert Tally(10_000, 9_999).percent == 99.9
    assert Tally(3, 1, 2).percent == 100.0
    assert Tally().percent == 0.0


def test_a_module_whose_file_is_not_here() -> None:
    gone = Coverage({"gone": AddressSet([1, 2])}, {"gone": "ab"})
    found = Comparison(CLEAN | gone, {"lost": gone})
    assert [module.name for module in found.modules] == ["card", "gone"]
    assert found.modules[1].note == "gone with build id ab: this file is not here, so its functions are unknown"
    assert found.by_fault[0].reached == 2


def test_different_builds_do_not_mix() -> None:
    other = Coverage({"card": AddressSet([1])}, {"card": "ab"})
    with pytest.raises(CoverageError, match="different builds does not mix"):
        _ = Comparison(CLEAN, {"lost": other}).modules


# ---- source lines --------------------------------------------------------------------------------------


def test_lines() -> None:
    found = with_lines()
    (module,) = found.modules
    assert module.lines == Tally(5, 4, 1) and module.notes == ()
    rows = {
        row.name: (row.lines, row.place and (row.place[0].endswith(CARD), row.place[1])) for row in module.functions
    }
    assert rows == {
        "probe": (Tally(4, 3, 1), (True, 2)),
        "helper": (Tally(1, 1, 0), (True, 8)),
        "remove": (Tally(0, 0, 0), None),
    }
    ((file, lines),) = found.lines.items()
    assert file.endswith(CARD)
    assert lines == {2: Reach.CLEAN, 3: Reach.CLEAN, 4: Reach.FAULTS, 5: Reach.CLEAN, 8: Reach.CLEAN}


def test_without_debug_information_lines_are_unknown() -> None:
    (module,) = comparison().modules
    assert module.lines is None and {row.lines for row in module.functions} == {None}
    assert comparison().lines == {}


def test_debug_information_of_another_build(tmp_path: Path) -> None:
    other = tmp_path / "other.ko"
    other.write_bytes(
        compiled(function("f", "ret") + '.section .note.gnu.build-id,"a",@note\n.long 4, 4, 3, 0x554e47, 1\n')
    )
    own = programs.add(Program.of_module("another", compiled(function("f", "nop\nret")), other))
    (module,) = Comparison(Coverage.of_ranges(own, [(0, 1 << 20)])).modules
    assert module.lines is None and module.instructions == Tally(2, 2, 0)
    (note,) = module.notes
    assert note.startswith(f"{other}: is not the debug information of this another: its build id is 01000000")


# ---- branches that were never taken --------------------------------------------------------------------


def branches(body: str, only: range = range(99)) -> list[Untaken]:
    """Of a function f() of which these instructions ran."""
    own = program(function("f", body))
    return untaken(
        own, AddressSet(own.function("f").addresses[n] for n in only if n < len(own.function("f").addresses))
    )


def test_a_branch_that_was_never_taken() -> None:
    (branch,) = Comparison(CLEAN).untaken
    addresses = card().function("probe").addresses
    assert (branch.module, branch.function.name, branch.address) == ("card", "probe", addresses[3])
    assert (branch.to, branch.taken, branch.behind) == (addresses[7], True, 3)
    assert (branch.guard, branch.signs) == ("test eax, eax; js", ("returns -EINVAL",))
    assert comparison().untaken == []


def test_the_side_without_a_jump() -> None:
    (branch,) = Comparison(FAILED).untaken
    assert (branch.taken, branch.behind, branch.signs) == (False, 3, ())


def test_code_that_did_not_run_has_no_branches() -> None:
    assert Comparison(ran("helper")).untaken == []
    assert Comparison(ran("probe", only=range(3))).untaken == [], "the jump itself did not run"


def test_behind_ends_at_code_that_ran() -> None:
    body = """
    cmp $1, %edi
    je 2f
    ret
2:  mov $-12, %rax
    cmp $2, %edi
    jne 3f
    call _dev_err
3:  ret
    """
    found = branches(body, range(3))
    assert [(branch.behind, branch.guard, branch.signs) for branch in found] == [
        (5, "cmp edi, 1; je", ("returns -ENOMEM", "calls _dev_err"))
    ]
    # Its last instruction is also reached otherwise.
    own = program(function("f", body))
    addresses = own.function("f").addresses
    (branch,) = untaken(own, AddressSet([*addresses[:3], addresses[7]]))
    assert branch.behind == 4


def test_the_stack_check_is_no_branch_of_the_driver() -> None:
    body = "mov %gs:0x28, %rax\nsub (%rsp), %rax\njne 1f\nret\n1: call __stack_chk_fail\n"
    assert branches(body, range(4)) == []
    assert len(branches(body.replace("__stack_chk_fail", "complain"), range(4))) == 1


@pytest.mark.parametrize(
    ("instruction", "sign"),
    [
        ("mov $-5, %eax", "returns -EIO"),
        ("mov $-110, %r12", "returns -ETIMEDOUT"),
        ("mov $-4096, %eax", None),
        ("mov $-1, %eax", None),
        ("mov $5, %eax", None),
        ("call _dev_warn", "calls _dev_warn"),
        ("call __warn_printk", "calls __warn_printk"),
        ("call dev_name", None),
        ("jmp _printk", "calls _printk"),
        ("ud2", "warns (ud2)"),
    ],
)
def test_signs(instruction: str, sign: str | None) -> None:
    (branch,) = branches(f"test %edi, %edi\nje 1f\nret\n1: {instruction}\nret\n", range(3))
    assert branch.signs == (() if sign is None else (sign,))


def test_loops_end() -> None:
    (branch,) = branches("test %edi, %edi\nje 1f\nret\n1: dec %eax\njne 1b\nret\n", range(3))
    assert branch.behind == 3
