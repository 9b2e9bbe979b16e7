"""The list of the selftest's cases, the rows and functions that check them, and the documented tables agree."""

from __future__ import annotations

from pathlib import Path

from tests.linux import access, compat, hwpt, ioas, options, type1, viommu
from tests.linux.cases import CASES, Verdict, tables

MODULES = [ioas, hwpt, type1, compat, viommu, access, options]
DOCUMENT = Path(__file__).parents[2] / "docs" / "iommu-and-linux.md"
#: How many TEST_F tools/testing/selftests/iommu/iommufd.c of Linux 7.3 has.
ALL = 66


def test_each_case_is_listed_once() -> None:
    assert len({case.name for case in CASES}) == len(CASES) == ALL
    assert all(bool(case.why) == (case.verdict is not Verdict.HOLDS) for case in CASES)


def test_what_is_said_to_hold_has_checks() -> None:
    checked = {name for module in MODULES for name in [*(row.case for row in module.ROWS), *module.WHOLE]}
    differ = {row.case for module in MODULES for row in module.DIFFERENCES}
    assert differ == {case.name for case in CASES if case.verdict is Verdict.DIFFERS}
    assert checked | differ == {
        case.name for case in CASES if case.verdict in (Verdict.HOLDS, Verdict.IN_PART, Verdict.DIFFERS)
    }


def test_the_document_has_the_tables() -> None:
    """`python -m tests.linux.cases` prints them."""
    assert tables() in DOCUMENT.read_text()
