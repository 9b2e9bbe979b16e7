"""What the runs of a campaign have reached: clean, and under each fault, for each build of the code by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from vmodel.campaign.store import Row
from vmodel.coverage.comparison import Comparison
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.registry import programs
from vmodel.errors import ConfigError
from vmodel.files import regular
from vmodel.guest.artifacts import Kernel, find_kernel, find_kernels
from vmodel.guest.kernel_code import CodeFinder
from vmodel.guest.modules import is_path, is_source

#: The limits of different builds of the code, and of damaged files that are named: a store may be somebody else's.
_MOST_BUILDS, _MOST_NOTES = 32, 5
#: The limit of what all plans together have reached, in pages of addresses, which take half a kB each.  A plan has
#: about 50 of nvme and nvme_core.
_MOST_PAGES = 1 << 19
#: The limit of a kernel's image, in bytes.
_LARGEST = 1 << 30


@dataclass
class BuildCoverage:
    """What runs whose code was the same build have reached.  `kernels`: as reports name them."""

    build_ids: dict[str, str]
    kernels: list[str] = field(default_factory=list)
    clean: Coverage = field(default_factory=Coverage)
    #: By plan: of the runs in which it injected a fault.
    faults: dict[str, Coverage] = field(default_factory=dict)
    #: Of each run: its number, its plan, and how many instructions it was the first to reach.
    new: list[tuple[int, str, int]] = field(default_factory=list)
    #: By plan: what the runs in which it injected a fault were the first to reach.
    first: dict[str, Coverage] = field(default_factory=dict)
    clean_runs: int = 0
    _everything: Coverage = field(default_factory=Coverage)

    def add(self, id: int, plan: str, kernel: str, injected: bool, reached: Coverage) -> int:
        """Adds a run.  Returns by how many pages it has grown; -1: the run was left out, as all would be too large."""
        everything = self._everything | reached
        if not everything.readable:
            return -1
        if kernel not in self.kernels:
            self.kernels.append(kernel)
        self.new.append((id, plan, len(everything) - len(self._everything)))
        if injected:
            self.first[plan] = self.first.get(plan, Coverage()) | (reached - self._everything)
        self._everything = everything
        before = self.faults.get(plan, Coverage()) if injected else self.clean
        after = before | reached
        if injected:
            self.faults[plan] = after
        else:
            self.clean = after
            self.clean_runs += 1
        return after.pages - before.pages

    @property
    def title(self) -> str:
        """What it is of."""
        return ", ".join(filter(None, self.kernels)) or ", ".join(self.build_ids)

    @cached_property
    def comparison(self) -> Comparison:
        """The same for people."""
        growth, reached = [], 0
        for id, plan, new in self.new:
            reached += new
            growth.append((f"run {id}: {plan}", reached))
        return Comparison(self.clean, self.faults, self.title, growth)


@dataclass(frozen=True)
class CampaignCoverage:
    """The coverage of a campaign's runs, by build of the code; `notes`: what is missing, a line each."""

    builds: Sequence[BuildCoverage] = ()
    notes: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.builds or self.notes)


def gather(rows: Iterable[Row], kernels: dict[int, str]) -> CampaignCoverage:
    """Reads what the runs have stored, one after the other.  `kernels`: the kernel's name of each run, by its number.

    A run in which no fault was injected counts as clean, whatever its plan was: no rule fired, or its rules only watch.
    """
    found: dict[tuple[tuple[str, str], ...], BuildCoverage] = {}
    damaged: list[str] = []
    kept = []
    pages = 0
    for row in rows:
        if row.result is None:
            continue
        try:
            reached = row.coverage
        except ConfigError as error:
            damaged.append(str(error))
            continue
        if reached is None:
            continue
        key = tuple(sorted(reached.build_ids.items()))
        if key not in found and len(found) >= _MOST_BUILDS:
            damaged.append(f"run {row.id}: its code is another build than that of {_MOST_BUILDS} others")
            continue
        build = found.setdefault(key, BuildCoverage(dict(key)))
        grown = -1
        if pages + reached.pages <= _MOST_PAGES:
            grown = build.add(row.id, row.run.plan, kernels[row.id], row.injected, reached)
        if grown < 0:
            damaged.append(f"run {row.id}: its coverage is left out: with that of the runs before it is too large")
            continue
        pages += grown
        kept.append(row)
    if kept:
        programs.add_finder(_finder(kept))
    notes = damaged[:_MOST_NOTES]
    if len(damaged) > _MOST_NOTES:
        notes.append(f"the coverage of {len(damaged) - _MOST_NOTES} more runs is left out, too")
    for build in found.values():
        if not build.clean_runs:
            notes.append(f"{build.title}: no run without faults: what is shown as “only under faults” may be usual")
    return CampaignCoverage(list(found.values()), notes)


def _finder(rows: Sequence[Row]) -> CodeFinder:
    """Finds the code that ran, as far as it is on this host."""
    kernels = list(find_kernels().values())
    images = {row.run.case.kernel for row in rows if row.run.case.kernel is not None and "/" in row.run.case.kernel}
    files: dict[Path, None] = {}
    folders = {Path(): None, rows[0].folder.parent.parent: None}
    for row in rows:
        case = row.run.case
        folders[case.machine.parent] = None
        for entry in (*case.coverage, *case.modules, *case.extra_modules):
            if is_path(entry) and not is_source(entry):
                release = (row.result.versions if row.result is not None else {}).get("kernel", "")
                files[Path(entry.replace("{release}", release))] = None
    return CodeFinder([*kernels, *_kernels_at(images)], files, folders)


def _kernels_at(images: Iterable[str]) -> Iterator[Kernel]:
    for image in sorted(images):
        try:
            regular(Path(image), _LARGEST)
            yield find_kernel(image)
        except (ConfigError, OSError, ValueError):  # it is not on this host: the report says so
            continue
