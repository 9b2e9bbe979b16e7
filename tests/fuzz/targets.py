"""Fuzz targets: what there is, how each is built and run.

A target is c/fuzz_NAME.c, built by clang with all of c_shim (libFuzzer, ASan, UBSan), or fuzz_NAME.py, run by Atheris.
corpus/NAME has the inputs that a run begins with; crashes/NAME has inputs that once were found to break something.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmodel.guest.artifacts import cache_dir, find_clang

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Where inputs that broke something are kept; `.gitignore` has it.
ARTIFACTS = ROOT / "artifacts" / "fuzz"
C_FLAGS = "-std=gnu11 -O2 -g -fno-omit-frame-pointer -fsanitize=fuzzer,address,undefined"
C_FLAGS += " -fno-sanitize-recover=all -Wall -Wextra -Werror"
#: Seconds that one input may take, and MB that a target may use.
TIMEOUT = 10
MEMORY = 1024


@dataclass(frozen=True)
class Target:
    """One target, by its file."""

    source: Path

    @property
    def name(self) -> str:
        return self.source.stem.removeprefix("fuzz_")

    @property
    def is_c(self) -> bool:
        return self.source.suffix == ".c"

    @property
    def corpus(self) -> Path:
        return HERE / "corpus" / self.name

    @property
    def crashes(self) -> Path:
        return HERE / "crashes" / self.name

    def command(self) -> list[str]:
        """What runs it, built if need be; libFuzzer's flags and corpora come after it."""
        return [str(build(self))] if self.is_c else [sys.executable, str(self.source)]

    def environment(self) -> dict[str, str]:
        """Its environment variables."""
        found = {**os.environ, "PYTHONPATH": str(ROOT), "UBSAN_OPTIONS": "print_stacktrace=1"}
        if self.is_c:
            found["ASAN_OPTIONS"] = "handle_sigbus=0:quarantine_size_mb=8:malloc_context_size=8"
            symbolizer = find_clang().parent / "bin" / "addr2line"  # a host's clang finds its own
            if symbolizer.exists():
                found["ASAN_SYMBOLIZER_PATH"] = str(symbolizer)
        return found


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    target: Target
    executions: int
    seconds: float
    coverage: int
    status: int
    log: str
    artifact: Path | None

    @property
    def ok(self) -> bool:
        return self.status == 0

    def __str__(self) -> str:
        speed = self.executions / self.seconds if self.seconds else 0
        line = f"{self.target.name:15} {self.executions:12} executions {speed:9.0f}/s  coverage {self.coverage:5}"
        return line if self.ok else f"{line}  FAILED, status {self.status}"


def targets(names: Sequence[str] = ()) -> list[Target]:
    """All targets by name, or those that are asked for.  ValueError: there is no such target."""
    files = [*(HERE / "c").glob("fuzz_*.c"), *HERE.glob("fuzz_*.py")]
    found = {target.name: target for target in map(Target, sorted(files, key=lambda path: path.stem))}
    if wrong := set(names) - set(found):
        raise ValueError(f"no target {', '.join(sorted(wrong))}; there are {', '.join(found)}")
    return [found[name] for name in names] if names else list(found.values())


def build(target: Target) -> Path:
    """The program of a C target, rebuilt only if clang or a source has changed."""
    clang = find_clang()
    sources = sorted((ROOT / "c_shim").glob("*.c"))
    version = subprocess.run([clang, "--version"], capture_output=True, text=True, check=True).stdout
    everything = [*sources, *(ROOT / "c_shim").glob("*.h"), *(HERE / "c").glob("*.h")]
    digest = hashlib.sha256(f"{clang}{version}{C_FLAGS}".encode())
    for path in sorted(everything):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two tests build at once
        library = folder / f"shim-{digest.hexdigest()[:16]}"
        if not (library / "done").exists():
            library.mkdir(exist_ok=True)
            for source in sources:
                _compile(clang, source, library / f"{source.stem}.o")
            (library / "done").touch()
        digest.update(target.source.read_bytes())
        program = folder / f"{target.name}-{digest.hexdigest()[:16]}"
        if not program.exists():
            for old in folder.glob(f"{target.name}-*"):
                old.unlink()
            _compile(clang, target.source, library / f"{target.source.stem}.o")
            objects = [str(library / f"{source.stem}.o") for source in [*sources, target.source]]
            _run([str(clang), *C_FLAGS.split(), *objects, "-lpthread", "-o", f"{program}.new"])
            Path(f"{program}.new").rename(program)
    return program


def _compile(clang: Path, source: Path, to: Path) -> None:
    _run([str(clang), *C_FLAGS.split(), f"-I{ROOT / 'c_shim'}", "-c", str(source), "-o", str(to)])


def _run(line: Sequence[str]) -> None:
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(line)}\n{done.stderr}")


def run(target: Target, work: Path, *, seconds: int | None = None, seed: int = 0, more: Sequence[str] = ()) -> Outcome:
    """Fuzz for `seconds`, beginning with the target's corpora; new inputs go to `work`.  seed 0: a random one.

    None: no fuzzing, only the inputs that are there.
    """
    work.mkdir(parents=True, exist_ok=True)
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    try:
        command = target.command()
    except RuntimeError as error:
        return Outcome(target, 0, 0, 0, -2, f"it does not build: {error}", None)
    line = [
        *command,
        f"-timeout={TIMEOUT}",
        f"-rss_limit_mb={MEMORY}",
        f"-seed={seed}",
        "-print_final_stats=1",
    ]
    line += [f"-artifact_prefix={ARTIFACTS / target.name}-", *more, str(work)]
    line += [str(folder) for folder in (target.corpus, target.crashes) if folder.is_dir()]
    line += ["-runs=0"] if seconds is None else [f"-max_total_time={seconds}"]
    limit = (seconds or 0) + 300
    try:
        done = subprocess.run(
            line, cwd=ROOT, env=target.environment(), capture_output=True, timeout=limit, check=False, errors="replace"
        )
        status, log = done.returncode, done.stderr + done.stdout
    except subprocess.TimeoutExpired as late:
        status, log = -1, f"{(late.stderr or b'').decode(errors='replace')}\nstill running after {limit} s"
    return read_outcome(target, status, log)


def read_outcome(target: Target, status: int, log: str) -> Outcome:
    """What libFuzzer's log says."""

    def last(pattern: str) -> int:
        return max((int(found) for found in re.findall(pattern, log)), default=0)

    executions = last(r"stat::number_of_executed_units: (\d+)") or last(r"(?m)^#(\d+)")
    artifact = re.search(r"Test unit written to (\S+)", log)
    speed = last(r"stat::average_exec_per_sec: +(\d+)")
    done = re.search(r"Done \d+ runs in (\d+) second", log)
    seconds = float(done[1]) if done else executions / speed if speed else 0.0
    return Outcome(
        target, executions, seconds, last(r"cov: (\d+)"), status, log, Path(artifact[1]) if artifact else None
    )


def long_corpus(target: Target) -> Path:
    """Where inputs that long runs have found are kept from one run to the next."""
    return cache_dir() / "fuzz" / target.name


def merge(target: Target) -> tuple[int, int]:
    """Rebuilds the repository's corpus from itself and the findings of long runs: (files before, files after).

    It has the fewest inputs that reach all that is reached, however often each: a few dozen small files.
    """
    target.corpus.mkdir(parents=True, exist_ok=True)
    before = list(target.corpus.iterdir())
    folders = [folder for folder in (target.corpus, long_corpus(target)) if folder.is_dir()]
    with tempfile.TemporaryDirectory(dir=target.corpus.parent, prefix=".merge-") as work:
        if target.is_c:
            line = [*target.command(), "-set_cover_merge=1", "-use_counters=0", f"-timeout={TIMEOUT}", work]
            _checked(target, line + [str(folder) for folder in folders])
        else:
            # Atheris' merge does not end; the shortest inputs that reach new lines are nearly as good.
            files = sorted((path for folder in folders for path in folder.iterdir()), key=_by_size)
            said = _checked(target, [*target.command(), "--reach", *map(str, files)])
            for line_ in said.splitlines():
                count, _, path = line_.partition(" ")
                if count.isdigit() and int(count):
                    data = Path(path).read_bytes()
                    (Path(work) / hashlib.sha1(data).hexdigest()).write_bytes(data)
        found = list(Path(work).iterdir())
        if not found:
            raise RuntimeError(f"{target.name}: no input reaches anything")
        for old in before:
            old.unlink()
        for new in found:
            new.rename(target.corpus / new.name)
    return len(before), len(list(target.corpus.iterdir()))


def _by_size(path: Path) -> tuple[int, str]:
    return path.stat().st_size, path.name


def _checked(target: Target, line: Sequence[str]) -> str:
    done = subprocess.run(
        line, cwd=ROOT, env=target.environment(), capture_output=True, timeout=1800, check=False, errors="replace"
    )
    if done.returncode:
        raise RuntimeError(f"{target.name}: status {done.returncode}\n{done.stderr[-4000:]}")
    return done.stdout
