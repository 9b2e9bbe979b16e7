"""A module whose code and lines are known one by one: what reports say about it can be written down."""

from __future__ import annotations

from functools import cache

from tests.coverage.objects import program
from vmodel.coverage.comparison import Comparison
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.program import Program
from vmodel.coverage.registry import programs

#: probe() of 10 instructions in 3 blocks and a moved part, helper() of 2, and remove() of 1.
SOURCE = """
.text
.type probe, @function
probe:
    push %rbx
    call helper
    test %eax, %eax
    js 1f
    xor %eax, %eax
    pop %rbx
    ret
1:  mov $-22, %eax
    pop %rbx
    ret
.size probe, .-probe

.type helper, @function
helper:
    mov $1, %eax
    ret
.size helper, .-helper

.type remove, @function
remove:
    ret
.size remove, .-remove
"""


#: The source that `lined` says it is from; line 3 is that of the call, the comparison and the jump.
TEXT = """int probe(void)
{
    if (helper() < 0)
        return -EINVAL;
    return 0;
}

int helper(void) { return 1; }
void remove(void) {}
"""
_LINES = {"push": 2, "call": 3, "xor": 5, "1:": 4, "mov $1": 8}


@cache
def card() -> Program:
    """The program."""
    return programs.add(program(SOURCE, "card"))


@cache
def lined() -> Program:
    """The same with debug information, but for remove()."""
    rows = ['.file 1 "driver/card.c"']
    for row in SOURCE.splitlines():
        rows += [f".loc 1 {line}" for word, line in _LINES.items() if row.strip().startswith(word)]
        if row == ".type remove, @function":
            rows.append('.section .text.remove,"ax",@progbits')  # of a section without lines
        rows.append(row)
    return programs.add(program("\n".join(rows), "lined"))


def with_lines() -> Comparison:
    """As `comparison`, of `lined`."""

    def same(coverage: Coverage) -> Coverage:
        ranges = []
        for name in ("probe", "helper", "remove"):
            pairs = zip(card().function(name).addresses, lined().function(name).addresses, strict=True)
            ranges += [(there, there + 1) for here, there in pairs if ("card", here) in coverage]
        return Coverage.of_ranges(lined(), ranges)

    return Comparison(same(CLEAN), {"lost": same(CLEAN), "stuck": same(FAILED)}, title="card")


def ran(*functions: str, without: range = range(0), only: range = range(99)) -> Coverage:
    """Coverage of whole functions; of probe, of the instructions whose numbers are in `only` and not in `without`."""
    addresses = []
    for name in functions:
        for n, address in enumerate(card().function(name).addresses):
            if name != "probe" or (n in only and n not in without):
                addresses.append((address, address + 1))
    return Coverage.of_ranges(card(), addresses)


#: probe() that succeeds: all but the last three instructions.
CLEAN = ran("probe", "helper", without=range(7, 10))
#: probe() in which helper() failed.
FAILED = ran("probe", "helper", without=range(4, 7))


def comparison() -> Comparison:
    """Two runs without faults, and two with faults of which one reaches something."""
    return Comparison.of_runs([CLEAN, CLEAN], [("lost", CLEAN), ("stuck", FAILED)], title="card")
