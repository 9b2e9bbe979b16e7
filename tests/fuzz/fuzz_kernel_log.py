"""A guest's console and kernel log: whatever a guest prints, there are findings, and not more than lines."""

from __future__ import annotations

from dataclasses import replace

import atheris

with atheris.instrument_imports(include=["vmodel.experiment.kernel_log", "vmodel.guest.kernel_lines"]):
    from vmodel.experiment.kernel_log import findings
    from vmodel.guest.kernel_lines import lines_of, merged

from tests.fuzz.harness import fuzz


def one_input(data: bytes) -> None:
    """Two texts, a zero byte between them: the console, and the log."""
    console, _, log = data.decode("utf-8", "replace").partition("\0")
    lines = [replace(line, at=number / 8) for number, line in enumerate(lines_of(console))]
    both = merged(lines, lines_of(log, "kernel log"))
    assert len(both) <= len(lines) + log.count("\n") + 1
    for unknown in (True, False):
        found = findings(both, unknown=unknown)
        assert sum(one.count for one in found) <= len(both)
        assert len({one.signature for one in found}) == len(found)


if __name__ == "__main__":
    fuzz(one_input)
