"""vmodel reproduce and minimise: repeat one run of a campaign, or shrink its plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vmodel.campaign.minimise import Minimiser
from vmodel.campaign.repeat import changed_inputs, check_files, code, differences, free_folder
from vmodel.campaign.repeat import repeat as run_again
from vmodel.campaign.rig import GUESTS, LASTING_GUESTS, load_rig, perform
from vmodel.campaign.store import Row, find_run, history
from vmodel.campaign.toml import plan_text
from vmodel.cli.campaign import check_host
from vmodel.cli.output import log_to_stderr
from vmodel.errors import ConfigError
from vmodel.experiment.case import Result
from vmodel.inject import FaultPlan

Trust = Annotated[bool, typer.Option("--trust", help="Allow code and files of this host that the campaign names.")]
RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as edu.runs/17.", show_default=False)]


def reproduce(
    path: RunPath,
    with_history: Annotated[
        bool, typer.Option("--with-history", help="First repeat the earlier runs of the same guest.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Store artefacts in DIR instead of RUN-again.")
    ] = None,
    trust: Trust = False,
) -> None:
    """Repeat one run exactly, and print the differences.

    The exit status is 0 if the outcome is the same, else 1.
    """
    log_to_stderr(False)
    row, before, others = _ended(path, trust)
    folder = free_folder(output or row.folder.with_name(f"{row.id}-again"))
    with load_rig(row.run.rig)() as rig:
        now = run_again(rig, row, folder, others if with_history else [])
    same = now.outcome is before.outcome
    print(f"{path}: {now.outcome.value}{', as before' if same else f', was {before.outcome.value}'}; {folder}")
    for finding in now.evidence:
        print(f"  {finding.oracle}: {finding.text}")
    for line in differences(before, now):
        print(f"  {line}")
    if not same and others and not with_history:
        print(f"  its guest had {len(others)} earlier runs: --with-history repeats them first")
    raise typer.Exit(0 if same else 1)


def minimise(
    path: RunPath,
    most: Annotated[int, typer.Option("--runs", metavar="N", min=1, help="Make at most N runs.")] = 100,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="DIR", help="Store artefacts in DIR instead of RUN-minimised."),
    ] = None,
    trust: Trust = False,
) -> None:
    """Shrink a run's plan as far as its outcome stays the same.

    Rules are removed first, then single events of the remaining rules.  The smallest plan is printed.
    """
    log_to_stderr(False)
    row, before, _ = _ended(path, trust)
    plan = row.run.case.plan
    if plan is None or not plan.rule:
        raise ConfigError(f"{path}: has no faults to leave out")
    folder = free_folder(output or row.folder.with_name(f"{row.id}-minimised"))
    with load_rig(row.run.rig)() as rig:
        count = 0

        def attempt(candidate: FaultPlan) -> Result:
            nonlocal count
            count += 1
            return perform(rig, row.run.case.model_copy(update={"plan": candidate}), folder / str(count))

        minimiser = Minimiser(before.outcome, attempt, most, lambda text: print(text, file=sys.stderr, flush=True))
        try:
            ended = minimiser.minimise(plan)
        except ValueError:
            raise ConfigError(
                f"{path}: the outcome was {before.outcome.value}, and is a different one now:"
                f" see vmodel reproduce {path}"
            ) from None
    if not ended:
        print(f"vmodel: stopped after {most} runs (--runs): a smaller plan may exist", file=sys.stderr)
    assert minimiser.best is not None  # the plan itself was tried
    smallest = minimiser.best[0].model_copy(update={"seed": (row.run.case.seeded() or plan).seed})
    text = plan_text(smallest, f"From {path}: {before.outcome.value}.  {minimiser.runs} runs.")
    (folder / "plan.toml").write_text(text, encoding="utf-8")
    print(text, end="")
    print(f"vmodel: the plan is also in {folder / 'plan.toml'}", file=sys.stderr)


def _ended(path: Path, trust: bool) -> tuple[Row, Result, list[Row]]:
    """A run, its result, and the earlier runs of its guest.

    ConfigError: the run has not ended yet, or it names code or files of this host without `trust`.
    """
    store, row = find_run(path)
    with store:
        if row.result is None:
            raise ConfigError(f"{path}: has not run yet")
        others = list(history(store.rows(), row))
    named = dict.fromkeys(part for each in (row, *others) for part in code(each))
    if named and not trust:
        raise ConfigError(f"{path}: would use {', '.join(named)} of this host: if you trust this campaign, add --trust")
    for each in (row, *others):
        check_files(each)
    for name in changed_inputs(row):
        print(f"vmodel: warning: {name} has changed since the run", file=sys.stderr)
    if row.run.rig in (GUESTS, LASTING_GUESTS):
        check_host({row.run.case.kernel}, row.run.case.tools)
    return row, row.result, others
