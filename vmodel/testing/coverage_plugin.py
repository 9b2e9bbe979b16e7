"""The hooks of `--vmodel-coverage`: what the guests of a test run have run of the kernel, as one report."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from vmodel.config_file import parse_toml, read_text
from vmodel.errors import ConfigError
from vmodel.guest.options import coverage_target
from vmodel.testing.coverage import MergedCoverage

#: Of what a worker process of pytest-xdist returns: its coverage, or what is wrong with the option.
_RETURNED, _WRONG = "vmodel_coverage", "vmodel_coverage_wrong"


class CoveragePlugin:
    """Registered if the option is given.  `merged` gets what guests ran."""

    def __init__(self, config: pytest.Config) -> None:
        """pytest.UsageError: the option is wrong."""
        given = config.getoption("--vmodel-coverage")
        try:
            # Worker processes of pytest-xdist get the option as it is now.
            config.option.vmodel_coverage = [coverage_target(text, config.invocation_params.dir) for text in given]
            self.merged = MergedCoverage(config.option.vmodel_coverage)
        except ConfigError as error:
            raise pytest.UsageError(f"--vmodel-coverage: {error}") from None
        self._folder = config.rootpath / config.getoption("--vmodel-coverage-out")
        if self._folder.exists() and not self._folder.is_dir():
            raise pytest.UsageError(f"--vmodel-coverage-out {self._folder}: is no folder")
        self._collects_only = bool(config.option.collectonly)
        #: What a worker process has found wrong with the option.
        self._wrong = ""
        self._lines: list[str] = []

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Ends the run if no guest of the selected tests can have what the option names."""
        guests = [item for item in session.items if item.get_closest_marker("guest") is not None]
        if self._collects_only or not guests:
            return
        if wrong := self.merged.wrong(_kernel_and_modules(item) for item in guests):
            if not hasattr(session.config, "workeroutput"):
                raise pytest.UsageError(wrong)
            # An error in each process of pytest-xdist would be a long one.
            session.config.workeroutput[_WRONG] = wrong
            session.items.clear()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Takes the coverage of a worker process of pytest-xdist that has ended."""
        returned = getattr(node, "workeroutput", {})
        if _RETURNED in returned:
            self.merged.merge(returned[_RETURNED])
        elif _WRONG in returned:
            self._wrong = returned[_WRONG]
        else:
            self.merged.note(f"a process of pytest-xdist, {node.gateway.id}, died: what its tests ran is missing")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Writes the report; a worker process of pytest-xdist returns what it has instead."""
        config = session.config
        if self._collects_only or exitstatus == pytest.ExitCode.USAGE_ERROR:
            return
        if hasattr(config, "workeroutput"):
            if _WRONG not in config.workeroutput:
                config.workeroutput[_RETURNED] = self.merged.to_json()
        elif self._wrong:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
            self._lines = [f"ERROR: {self._wrong}"]
        else:
            self._lines = list(self.merged.write(self._folder))

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Prints how much was reached, and where the report is."""
        if self._lines:
            terminalreporter.section("coverage")
            for line in self._lines:
                terminalreporter.line(line)


def _kernel_and_modules(item: pytest.Item) -> tuple[str | None, list[str]]:
    """The name of the kernel of a test's guests, None for the default one, and the modules that its marks name."""
    called = getattr(item, "callspec", None)
    kernel: str | None = None if called is None else called.params.get("guest_kernel")
    modules: list[str] = []
    for mark in item.iter_markers("guest"):
        modules += [*mark.kwargs.get("modules", ()), *mark.kwargs.get("extra_modules", ())]
    named = item.get_closest_marker("machine")
    if named is not None:
        path = item.path.parent / named.args[0]
        with contextlib.suppress(ConfigError, OSError):  # the test reports it
            table = parse_toml(read_text(path), path).get("guest", {})
            modules += [*table.get("modules", ()), *table.get("extra_modules", ())]
            kernel = kernel or table.get("kernel")
    return kernel, [str(item.path.parent / entry) if "/" in entry else entry for entry in modules]
