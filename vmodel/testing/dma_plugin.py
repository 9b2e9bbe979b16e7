"""The hooks of `--vmodel-dma-report` and `--vmodel-dma-fails`: what is wrong with the DMA of drivers in guests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from vmodel.dma_report.finding import DmaFinding, signs_of

#: The property of a test's report that has a finding, as one line.
_FOUND = "vmodel_dma"
#: The mark of tests that have findings on purpose.
_ALLOWED = "allow_dma"


class DmaPlugin:
    """Registered if one of the options is given.  Tests pass the findings of their guests to `add`."""

    def __init__(self, config: pytest.Config) -> None:
        """pytest.UsageError: an option is wrong."""
        try:
            self._fails = signs_of(config.getoption("--vmodel-dma-fails") or ())
        except ValueError as error:
            raise pytest.UsageError(f"--vmodel-dma-fails: {error}") from None

    def add(self, item: pytest.Item, found: Iterable[DmaFinding]) -> None:
        """Reports findings as the test's; fails it if one is a failure, and no mark of the test allows that."""
        allowed: set[str] = set()
        for mark in item.iter_markers(_ALLOWED):
            try:
                allowed |= signs_of(mark.args)
            except ValueError as error:
                pytest.fail(f"the mark {_ALLOWED}: {error}", pytrace=False)
        lines: list[str] = []
        for finding in found:
            line = f"{finding.severity}: {finding.sign}: {finding.endpoint}: {finding.text}"
            if (_FOUND, line) not in item.user_properties:
                item.user_properties.append((_FOUND, line))
            if finding.sign in self._fails - allowed:
                lines.append(line)
        if lines:
            pytest.fail("the DMA is wrong: " + "\n".join(dict.fromkeys(lines)), pytrace=False)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Prints the findings, with the tests that have them."""
        tests: dict[str, dict[str, None]] = {}
        for reports in terminalreporter.stats.values():
            for report in reports:
                for key, value in getattr(report, "user_properties", ()):
                    if key == _FOUND:
                        tests.setdefault(value, {})[report.nodeid] = None
        terminalreporter.section("DMA")
        if not tests:
            terminalreporter.line("nothing is wrong with the DMA of guests whose devices are behind an IOMMU")
        for line, names in sorted(tests.items()):
            first, *more = sorted(names)
            terminalreporter.line(line)
            terminalreporter.line(f"    {first}" + (f" and {len(more)} more" if more else ""))
