"""Logs that outsiders cannot flood."""

from __future__ import annotations

import logging

import pytest

from vmodel.logs import BURST, SECONDS, Limiter, limited, report_held


def test_limited_logs(caplog: pytest.LogCaptureFixture) -> None:
    log = limited("vmodel.test.limited")
    now = [0.0]
    (old,) = log.filters
    log.removeFilter(old)
    log.addFilter(Limiter(lambda: now[0]))
    with caplog.at_level(logging.DEBUG, "vmodel.test.limited"):
        for n in range(100):
            log.warning("%s: %d", "a", n)
        log.warning("%s: %d", "b", 0)  # another device's are not held back
        assert len(caplog.records) == BURST + 1
        now[0] += SECONDS
        log.warning("%s: %d", "a", 100)
        assert caplog.messages[-1] == f"a: 100 ({100 - BURST} lines before it were held back)"
        for n in range(1000):
            log.warning(f"a name that a guest chooses {n}")
        assert len(caplog.records) == 2 * BURST + 2
        for n in range(5000):
            log.warning("%s", f"a name that a guest chooses {n}")
        assert len(log.filters[0]._limits) <= 66  # type: ignore[union-attr]
        report_held()
        assert "lines were held back" in caplog.messages[-1]
