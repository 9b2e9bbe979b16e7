"""`Coverage`: a value with the laws of sets, JSON that may come from anybody, and functions of programs."""

from __future__ import annotations

import base64
import json
import pickle
import time
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.coverage.objects import function, program
from vmodel.coverage.addresses import AddressSet
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.registry import Programs
from vmodel.coverage.registry import programs as known

ADDRESSES = st.frozensets(
    st.one_of(st.integers(0, 20), st.integers(4090, 4100), st.integers((1 << 64) - 9, (1 << 64) - 1))
)
SETS = st.dictionaries(st.sampled_from(["nvme", "nvme_core", "vmlinux:pci"]), ADDRESSES)


def coverage(sets: dict[str, frozenset[int]], build: str = "ab") -> Coverage:
    return Coverage({name: AddressSet(s) for name, s in sets.items()}, dict.fromkeys(sets, build))


def pairs(sets: dict[str, frozenset[int]]) -> set[tuple[str, int]]:
    return {(name, address) for name, addresses in sets.items() for address in addresses}


@given(ADDRESSES, ADDRESSES)
def test_address_sets_are_sets(one: frozenset[int], two: frozenset[int]) -> None:
    a, b = AddressSet(one), AddressSet(two)
    assert list(a) == sorted(one)
    assert len(a) == len(one) and bool(a) == bool(one)
    assert set(a | b) == one | two
    assert set(a & b) == one & two
    assert set(a - b) == one - two
    assert (a <= b) == (one <= two)
    assert (a == b) == (one == two)
    assert hash(a | b) == hash(b | a) and a | b == b | a
    assert a - b == AddressSet(one - two) and a & b == AddressSet(one & two)
    assert all((address in a) == (address in one) for address in one | two)
    assert pickle.loads(pickle.dumps(a)) == a


@given(SETS, SETS)
def test_coverages_are_sets(one: dict[str, frozenset[int]], two: dict[str, frozenset[int]]) -> None:
    a, b = coverage(one), coverage(two)
    assert list(a) == sorted(pairs(one))
    assert len(a) == len(pairs(one)) and bool(a) == bool(pairs(one))
    assert set(a | b) == pairs(one) | pairs(two)
    assert set(a & b) == pairs(one) & pairs(two)
    assert set(a - b) == pairs(one) - pairs(two)
    assert (a <= b) == (pairs(one) <= pairs(two))
    assert (a == b) == (pairs(one) == pairs(two))
    assert (a - b) | (a & b) == a
    assert hash((a - b) | (a & b)) == hash(a)
    assert all(place in a | b for place in pairs(one) | pairs(two))
    assert (a | b).modules() == sorted({*one, *two})
    assert {name: set(s) for name, s in a.instructions.items()} == {name: set(s) for name, s in one.items()}


@given(SETS)
def test_it_survives_json_and_pickle(sets: dict[str, frozenset[int]]) -> None:
    before = coverage(sets)
    for after in (Coverage.from_json(json.loads(json.dumps(before.to_json()))), pickle.loads(pickle.dumps(before))):
        assert after == before
        assert after.modules() == before.modules()
        assert after.build_ids == before.build_ids


def test_builds_do_not_mix() -> None:
    one, two = coverage({"nvme": frozenset({1})}, "aa11"), coverage({"nvme": frozenset({1})}, "bb22")
    assert one != two
    for operation in (lambda: one | two, lambda: one & two, lambda: one - two, lambda: one <= two):
        with pytest.raises(CoverageError, match=r"nvme: .* build ids (aa11 and bb22|bb22 and aa11)$"):
            operation()


def test_it_is_immutable() -> None:
    one = coverage({"nvme": frozenset({1})})
    with pytest.raises((AttributeError, TypeError)):
        one.reached["nvme"] = AddressSet()  # type: ignore[index]
    two = one | coverage({"nvme": frozenset({2})})
    assert (len(one), len(two)) == (1, 2)


def test_many_unions_are_fast() -> None:
    """A campaign has thousands of runs: a union of two sets of 40,000 instructions takes no millisecond."""
    one = coverage({"nvme": frozenset(range(0x2000, 0x2000 + 160000, 4))})
    two = coverage({"nvme": frozenset(range(0x2002, 0x2002 + 160000, 4))})
    start = time.process_time()
    for _ in range(100):
        both = one | two
    assert time.process_time() - start < 1.0  # it takes 2 ms
    assert len(both) == 80000


# ---- of a program ---------------------------------------------------------------------------


SOURCE = (
    function("probe", "test %edi, %edi\njne probe.cold\nmov $1, %eax\nret")
    + function("remove", "mov $3, %eax\nret", section=".exit.text")
    + function("probe.cold", "mov $2, %eax\nret", section=".text.unlikely")
)


def test_an_instruction_counts_if_its_first_byte_was_executed() -> None:
    """So a place that the kernel has patched counts, however its instruction was patched."""
    own = program(SOURCE, "counted")
    test, jne, mov, *_ = own.function("probe").addresses
    assert set(Coverage.of_ranges(own, [(test, test + 1)])) == {("counted", test)}
    assert set(Coverage.of_ranges(own, [(test + 1, mov + 1)])) == {("counted", jne), ("counted", mov)}
    assert not Coverage.of_ranges(own, [(test + 1, jne), (mov, mov), (0, test)])
    assert Coverage.of_ranges(own, []).modules() == ["counted"]


def test_functions() -> None:
    own = program(SOURCE, "functions")
    first, last = own.function("probe").addresses[0], own.function("probe").addresses[-1]
    found = Coverage.of_ranges(own, [(first, first + 1), (last, last + 1)])
    assert [(f.module, f.name, f.reached, f.total) for f in found.functions()] == [
        ("functions", "probe", 2, 6),
        ("functions", "remove", 0, 2),
    ]
    assert found.functions_reached() == {("functions", "probe")}
    assert found.programs == {"functions": own}


def test_without_the_file_only_functions_are_unknown() -> None:
    lost = coverage({"lost": frozenset({1})}, "1234")
    assert len(lost | lost) == 1
    with pytest.raises(CoverageError, match="lost with build id 1234"):
        lost.functions()


def test_a_program_is_found_when_it_is_needed() -> None:
    own = program(SOURCE, "later")
    registry = Programs()
    asked = []

    def find(name: str, build_id: str) -> Any:
        asked.append((name, build_id))
        return own if name == "later" else None

    registry.add_finder(find)
    registry.add_finder(find)
    assert registry.find("later", own.build_id) is own
    assert registry.find("later", own.build_id) is own
    assert asked == [("later", own.build_id)]
    for name, build_id in (("later", "12"), ("never", "")):
        with pytest.raises(CoverageError, match=name):
            registry.find(name, build_id)


def test_equal_programs_are_one() -> None:
    one, two = program(SOURCE, "same"), program(SOURCE, "same")
    assert known.add(one) is one
    assert known.add(two) is one


# ---- JSON from anybody ----------------------------------------------------------------------


def packed(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data)).decode()


def document(instructions: Any, build_id: Any = "ab", name: Any = "nvme") -> dict[str, Any]:
    return {"version": 1, "programs": {name: {"build_id": build_id, "instructions": instructions}}}


def test_the_format() -> None:
    """Stores keep it: gaps in LEB128."""
    assert Coverage.from_json(document(packed(b"\x05\x80\x01"))) == coverage({"nvme": frozenset({5, 133})})


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        {"version": 2, "programs": {}},
        {"version": 1},
        {"version": 1, "programs": []},
        {"version": 1, "programs": {"nvme": 5}},
        {"version": 1, "programs": {str(n): {} for n in range(300)}},
        document(5),
        document("%%"),
        document("é"),
        document(base64.b64encode(b"no zlib").decode()),
        document(base64.b64encode(zlib.compress(b"\1\2\3")[:-3]).decode()),
        document(packed(b"\x80")),
        document(packed(b"\1\0")),
        document(packed(b"\x80" * 10 + b"\1")),
        document(packed(b"\xff" * 9 + b"\x7f")),
        document(packed(b"\xff" * 9 + b"\1" + b"\1")),
        document(packed(b"\1" * (5 << 20))),
        document(packed(bytes(1 << 30))),
        document("A" * (20 << 20)),
        document(packed(b"\1"), "xyz"),
        document(packed(b"\1"), 5),
        document(packed(b"\1"), "a" * 300),
        document(packed(b"\1"), name=""),
        document(packed(b"\1"), name="x" * 300),
        document(packed(b"\1"), name="\x1b[2J"),
        document(packed(b"\1"), name="a\nb"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_json_is_refused_with_one_line(value: Any) -> None:
    with pytest.raises(CoverageError) as error:
        Coverage.from_json(value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_addresses_that_are_far_apart_take_no_memory_without_end() -> None:
    """A page of them takes half a kB, so a file of few kB could take GBs: in one program, or in many."""
    far = packed(b"\x81\x20" * (1 << 20))
    assert len(far) < 6000
    begun = time.process_time()
    with pytest.raises(CoverageError, match=r"coverage of nvme: damaged instructions: .* more than 128 MiB of code"):
        Coverage.from_json(document(far))
    some = {"build_id": "", "instructions": packed(b"\x81\x20" * 20_000)}
    one = Coverage.from_json({"version": 1, "programs": {"a": some}})
    assert (one.pages, len(one), one.readable) == (20_000, 20_000, True)
    with pytest.raises(CoverageError, match=r"coverage of b: damaged instructions: .* more than 128 MiB of code"):
        Coverage.from_json({"version": 1, "programs": {"a": some, "b": some}})
    assert time.process_time() - begun < 10  # it takes 0.1 s


def test_all_programs_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmodel.coverage.coverage._MAX_INSTRUCTIONS", 4000)
    many = {"build_id": "", "instructions": packed(b"\1" * 3000)}
    with pytest.raises(CoverageError, match="coverage of b: damaged instructions: more than 4,000 in all"):
        Coverage.from_json({"version": 1, "programs": {"a": many, "b": many}})
    large = Coverage.from_json({"version": 1, "programs": {"a": many}})
    moved = Coverage({"a": AddressSet(range(4000, 6000))})
    assert large.readable and not (large | moved).readable


@given(st.binary(max_size=40))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        found = Coverage.from_json(document(packed(data)))
    except CoverageError:
        return
    assert Coverage.from_json(found.to_json()) == found
