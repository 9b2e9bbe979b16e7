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


@cache
def card() -> Program:
    """The program."""
    return programs.add(program(SOURCE, "card"))


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
