"""The bar of a campaign that runs, in a terminal of 80 columns."""

from __future__ import annotations

import re
from io import StringIO
from pathlib import Path

from rich.console import Console

from vmodel.campaign.matrix import Run
from vmodel.campaign.progress import ProgressBar, line
from vmodel.campaign.rig import harness_error
from vmodel.campaign.store import Row
from vmodel.experiment.case import Case
from vmodel.experiment.oracle import Effect, Finding, Outcome


def test_times_stay_whole_beside_many_outcomes() -> None:
    out = StringIO()
    case = Case(machine=Path("m"), workload="w")
    run = Run(machine="m", kernel="", workload="w", plan="p", seed=0, case=case)
    with ProgressBar(Console(file=out, force_terminal=True, width=80, color_system=None)) as bar:
        bar.total(0, 100)
        for outcome in Outcome:
            result = harness_error(case, "status", "x").model_copy(update={"outcome": outcome})
            bar.ended(Row(1, run, Path("1"), result=result))
    last = out.getvalue()[-400:]
    assert re.search(r" 8/100 \d:\d\d:\d\d (\d:\d\d:\d\d|-:--:--) 1 not activated", last), last


def test_notes_have_one_colour() -> None:
    out = StringIO()
    text = "run 5: 10 new instructions: irq device=0000:00:03.0 do=drop"
    with ProgressBar(Console(file=out, force_terminal=True, width=80, color_system="standard")) as bar:
        bar.note(text)
    assert text in out.getvalue()


def test_the_line_of_a_crash_has_the_oops() -> None:
    """And not what the driver said before; of a hang, what the kernel said first."""
    case = Case(machine=Path("m"), workload="w")
    run = Run(machine="m", kernel="", workload="w", plan="p", seed=0, case=case)
    first = Finding(oracle="kernel log", effect=Effect.NOTICED, sign="warning", text="block 0: time-out", signature="a")
    oops = Finding(
        oracle="kernel log", effect=Effect.CRASH, sign="oops", text="Oops: general protection", signature="b"
    )
    hang = Finding(oracle="time", effect=Effect.HANG, sign="time", text="did not end in 15 s", signature="c")
    for outcome, evidence, why in (
        (Outcome.CRASH, (first, hang, oops), "crash: Oops: general protection"),
        (Outcome.HANG, (first, hang), "hang: block 0: time-out"),
    ):
        changed = {"outcome": outcome, "evidence": evidence}
        result = harness_error(case, "status", "x").model_copy(update=changed)
        assert why in line(Row(1, run, Path("1"), result=result))
