"""`MergedCoverage`: what the guests of all tests have run, merged by kernel, of all processes of pytest-xdist."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vmodel.coverage.comparison import Comparison
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.folder import write
from vmodel.coverage.registry import programs
from vmodel.coverage.table import percent
from vmodel.coverage.target import Target
from vmodel.errors import ConfigError
from vmodel.experiment import Case, Result, Rig
from vmodel.guest.artifacts import ArtifactError, Kernel, find_kernel, find_kernels, find_qemu
from vmodel.guest.coverage import GuestCoverage, check_emulator
from vmodel.guest.kbuild import BuildError
from vmodel.guest.kernel_code import CodeFinder, check_target
from vmodel.guest.modules import files_of
from vmodel.guest.running import accelerator

#: Most lines about what is missing.
_MOST_NOTES = 10


class MergedCoverage:
    """The coverage of `--vmodel-coverage`, by kernel release."""

    def __init__(self, targets: Sequence[str]) -> None:
        """`targets`: as of `Target.parse`.  CoverageError: one is none."""
        self.targets = {text: Target.parse(text) for text in dict.fromkeys(targets)}
        #: By kernel release; another build of the same code has a coverage of its own.
        self._merged: dict[str, list[Coverage]] = {}
        self._notes: dict[str, None] = {}
        self._known: dict[tuple[Kernel, str], bool] = {}

    def __bool__(self) -> bool:
        return bool(self.targets)

    def of_guest(self, kernel: Kernel, modules: Iterable[str]) -> list[str]:
        """The targets that a guest has, with this kernel and these modules of its own (as of `GuestSpec.modules`).

        Modules given as source are built for that.  BuildError.
        """
        own = {name for name, path in files_of(modules, kernel).items() if path is not None}
        return [text for text, target in self.targets.items() if target.name in own or self._has(kernel, text)]

    def _has(self, kernel: Kernel, text: str) -> bool:
        """Whether the kernel itself has it."""
        key = kernel, text
        if key not in self._known:
            try:
                check_target(text, kernel)
                self._known[key] = True
            except CoverageError:  # the module of another test
                self._known[key] = False
        return self._known[key]

    def wrong(self, guests: Iterable[tuple[str | None, Sequence[str]]]) -> str:
        """A line if a target is in none of the guests, each given by its kernel's name and its modules; else "".

        Or if no guest of this host can tell what it runs.  Modules that are given as source are built for that, if no
        other is meant.
        """
        try:
            check_emulator(find_qemu(), accelerator())
        except CoverageError as error:
            return f"--vmodel-coverage: {error}"
        except ConfigError:  # the tests report it
            return ""
        missing: dict[str, str] = {}
        left = dict.fromkeys(self.targets)
        for kernel, modules in dict.fromkeys((kernel, tuple(modules)) for kernel, modules in guests):
            for text in list(left):
                try:
                    check_target(text, find_kernel(kernel), modules)
                    del left[text]
                except CoverageError as error:
                    missing[text] = str(error)
                except (ArtifactError, BuildError):  # the tests report it
                    return ""
        return "; ".join(f"--vmodel-coverage {text}: {missing[text]}" for text in left)

    def add(self, release: str, coverage: Coverage) -> None:
        """Adds what a guest with a kernel of this release has run."""
        builds = self._merged.setdefault(release, [])
        for n, build in enumerate(builds):
            try:
                builds[n] = build | coverage
                return
            except CoverageError:  # a module that was changed and built again
                continue
        builds.append(coverage)

    def add_guest(self, release: str, recorded: GuestCoverage | None) -> None:
        """Adds what a guest that has ended ran; None: nothing was recorded."""
        try:
            if recorded is not None:
                self.add(release, recorded.taken())
        except CoverageError as error:
            self.note(str(error))

    def note(self, text: str) -> None:
        """A line for the summary: what is missing."""
        self._notes[text] = None

    def run(self, rig: Rig, case: Case, folder: Path, kernel: Kernel, modules: Iterable[str]) -> Result:
        """Runs a case, and adds what it ran; its result has no more than the case itself asks for.

        `modules`: those of the guest beside the case's.
        """
        modules = [*modules, *case.modules, *case.extra_modules]
        wanted = tuple(dict.fromkeys((*case.coverage, *self.of_guest(kernel, modules))))
        result = rig.run(case.model_copy(update={"coverage": wanted}), folder)
        if result.coverage is None:
            return result
        names = {Target.parse(text).name for text in case.coverage}
        self.add(kernel.release, only(result.coverage, {target.name for target in self.targets.values()}))
        return result.model_copy(update={"coverage": only(result.coverage, names) if names else None})

    # ---- from process to process --------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """As plain data, for another process."""
        merged = {release: [build.to_json() for build in builds] for release, builds in self._merged.items()}
        return {"merged": merged, "notes": list(self._notes)}

    def merge(self, content: dict[str, Any]) -> None:
        """Adds what another process has: its `to_json`."""
        for release, builds in content["merged"].items():
            for build in builds:
                self.add(release, Coverage.from_json(build))
        for text in content["notes"]:
            self.note(text)

    # ---- the report ---------------------------------------------------------------------------

    def write(self, folder: Path) -> Iterator[str]:
        """Writes a report for each kernel below `folder`; returns lines for the terminal."""
        if self._merged:
            programs.add_finder(
                CodeFinder(find_kernels().values(), filter(None, (t.file for t in self.targets.values())))
            )
        for release, builds in sorted(self._merged.items()):
            for n, build in enumerate(builds):
                name = release if not n else f"{release}-{n + 1}"
                comparison = Comparison(build, title=f"tests with kernel {release}")
                if n:
                    yield f"kernel {release}, another build"
                else:
                    yield f"kernel {release}"
                yield from _rows(comparison)
                try:
                    yield f"  report: {write(comparison, folder / name)[0]}"
                except CoverageError as error:
                    self.note(str(error))
        for text, target in self.targets.items():
            if not any(target.name in build.modules() for builds in self._merged.values() for build in builds):
                yield f"--vmodel-coverage {text}: no guest of these tests had it"
        notes = list(self._notes)
        yield from notes[:_MOST_NOTES]
        if len(notes) > _MOST_NOTES:
            yield f"and {len(notes) - _MOST_NOTES} more lines about what is missing"


def only(coverage: Coverage, names: Collection[str]) -> Coverage:
    """The part that is of the programs with these names."""
    reached = {name: addresses for name, addresses in coverage.reached.items() if name in names}
    return Coverage(reached, coverage.build_ids)


def _rows(comparison: Comparison) -> Iterator[str]:
    width = max((len(module.name) for module in comparison.modules), default=0)
    for module in comparison.modules:
        if module.note:
            yield f"  {module.name:{width}}  {module.note}"
            continue
        count = module.instructions
        instructions = f"{count.reached:,} of {count.total:,} instructions"
        functions = f"{module.functions_reached} of {len(module.functions)} functions"
        yield f"  {module.name:{width}}  {percent(count)}  {instructions}, {functions}"
