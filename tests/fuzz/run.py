"""What scripts/fuzz does."""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import subprocess
import sys
import time

from tests.fuzz.targets import ROOT, Outcome, Target, long_corpus, merge, run, targets

HOUR = 3600


def report(outcome: Outcome) -> None:
    """A line; for a failure also what was said, and how to see it again."""
    print(outcome, flush=True)
    if outcome.ok:
        return
    print(outcome.log[-6000:])
    if outcome.artifact:
        print(f"once more:  scripts/fuzz --input {outcome.artifact.relative_to(ROOT)} {outcome.target.name}")
        print(f"when it is fixed, keep the input as a test: tests/fuzz/crashes/{outcome.target.name}/")


def once(target: Target, path: str) -> int:
    """Feeds one input to a target."""
    return subprocess.run([*target.command(), path], cwd=ROOT, env=target.environment(), check=False).returncode


def main() -> int:
    """The exit status: 1 when a target failed."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Coverage-guided fuzzing of what reads others' bytes.")
    parser.add_argument("target", nargs="*", help="default: all")
    parser.add_argument("--seconds", type=int, metavar="N", help="for each target; default: an hour in all")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="targets at once; default: CPUs")
    parser.add_argument("--list", action="store_true", help="print the targets, and fuzz nothing")
    parser.add_argument("--input", metavar="FILE", help="feed this input to the one target, and fuzz nothing")
    parser.add_argument("--merge", action="store_true", help="bring what long runs found into tests/fuzz/corpus")
    options = parser.parse_args()
    try:
        chosen = targets(options.target)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        print(*(target.name for target in chosen), sep="\n")
        return 0
    if options.input:
        if len(chosen) != 1:
            parser.error("--input is for one target")
        return once(chosen[0], options.input)
    if options.merge:
        for target in chosen:
            before, after = merge(target)
            print(f"{target.name:15} {before} -> {after} inputs")
        return 0
    seconds = options.seconds or max(1, HOUR * options.jobs // len(chosen))
    print(f"{len(chosen)} targets, {seconds} s each, {options.jobs} at once", flush=True)
    began = time.monotonic()
    outcomes = []
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        work = [pool.submit(run, target, long_corpus(target), seconds=seconds) for target in chosen]
        for done in concurrent.futures.as_completed(work):
            outcomes.append(done.result())
            report(outcomes[-1])
    failed = [outcome.target.name for outcome in outcomes if not outcome.ok]
    total = sum(outcome.executions for outcome in outcomes)
    verdict = f"failed: {', '.join(failed)}" if failed else "none failed"
    print(f"{total} executions in {time.monotonic() - began:.0f} s; {verdict}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
