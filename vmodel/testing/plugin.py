"""The pytest plugin: fixtures for tests of device models and of drivers.  docs/testing.md is the user's page.

From the fastest to the slowest; choose the first that is sufficient:

`fake_memory`   guest memory, for a model that is not served
`fake_driver`   a served model, driven by vfio-user from the test: without a guest, in milliseconds
`machine`       a served machine file, which the mark `machine` names
`vm`            runs a command in a stock guest with that machine
`vm_booted`     a booted guest that runs scripts, one after the other
`experiment`    runs a workload under a plan of faults, and classifies the outcome; tests share guests
`inject`        arms faults on the devices of any of these

Options are `--vmodel-...`.  Each test has its own sockets and folders, so tests may run in parallel (pytest-xdist).
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

#: For pytest: what fails here is shown at the line of the test that called.
__tracebackhide__ = True

# Fixtures import what they need when they are used, as pytest loads this file at each start.
if TYPE_CHECKING:
    from vmodel.device import PciDevice
    from vmodel.dma_report import DmaFinding
    from vmodel.experiment import Result, Rig
    from vmodel.guest.artifacts import Kernel
    from vmodel.guest.booted import BootedGuest
    from vmodel.guest.served import Served
    from vmodel.inject import FaultPlan
    from vmodel.machine import Machine
    from vmodel.testing.coverage import MergedCoverage
    from vmodel.testing.dma_plugin import DmaPlugin
    from vmodel.testing.fakes import FakeDriver, FakeMemory
    from vmodel.testing.inject import Inject
    from vmodel.testing.vm import Vm

#: Fixtures that boot a guest.  Their tests get the mark `guest`, so that `-m "not guest"` deselects them.
_GUESTS = frozenset(("vm", "vm_booted", "experiment"))


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)


_TEXTS = ("a list of texts", _is_texts)
#: The arguments of the mark `guest`: what each must be.
_SPEC: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("modules", "extra_modules", "files", "shares", "tools", "qemu_args", "without"), _TEXTS),
    "append": ("a text", lambda value: isinstance(value, str)),
    "cpus": ("a number from 1 to 64", lambda value: type(value) is int and 1 <= value <= 64),
    "timeout": ("a number of seconds", lambda value: type(value) in (int, float) and value > 0),
    **dict.fromkeys(("allow_reboot", "sanitize"), ("True or False", lambda value: isinstance(value, bool))),
}
#: The property of a test's report that has the release of its guests' kernel.
_KERNEL = "vmodel_kernel"
_failed = pytest.StashKey[bool]()
_kept = pytest.StashKey[Path]()
_booted = pytest.StashKey["list[BootedGuest]"]()
#: What the guests of all tests ran, with --vmodel-coverage.
_coverage: pytest.StashKey[MergedCoverage] = pytest.StashKey()
#: What looks at their DMA, with --vmodel-dma-report.
_dma: pytest.StashKey[DmaPlugin] = pytest.StashKey()
#: Most messages of kernels in the report of a test.
_MOST_MESSAGES = 10


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options --vmodel-...."""
    group = parser.getgroup("vmodel")
    group.addoption("--vmodel-seed", type=int, default=0, metavar="N", help="seed of injected faults, default 0")
    group.addoption("--vmodel-qemu", metavar="PATH", help="QEMU of guests, default: that of `vmodel doctor`")
    group.addoption(
        "--vmodel-kernel",
        action="append",
        metavar="NAME|PATH",
        help="kernel of guests: stable, backports, cloud, debug, a version, or a vmlinuz's path; repeatable: each"
        " guest test runs with each kernel",
    )
    group.addoption(
        "--vmodel-artifacts",
        default="artifacts",
        metavar="DIR",
        help="folder for logs of failed tests, default artifacts, in pytest's root directory",
    )
    group.addoption(
        "--vmodel-coverage",
        action="append",
        metavar="MODULE",
        help="report what guests run of a module, a .ko file, or vmlinux:PREFIX; repeatable",
    )
    group.addoption(
        "--vmodel-coverage-out",
        default="coverage",
        metavar="DIR",
        help="folder for that report, default coverage, in pytest's root directory",
    )
    group.addoption(
        "--vmodel-dma-report",
        action="store_true",
        help="report what is wrong with the DMA of the drivers in guests",
    )
    group.addoption(
        "--vmodel-dma-fails",
        action="append",
        metavar="SIGN",
        help="fail tests with such a finding: a sign, as dma-leak, or error or warning for all of them; repeatable",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Sets VMODEL_QEMU by --vmodel-qemu, and declares the marks `machine` and `guest`."""
    if qemu := config.getoption("--vmodel-qemu"):
        patch = pytest.MonkeyPatch()
        patch.setenv("VMODEL_QEMU", str(Path(qemu).absolute()))
        config.add_cleanup(patch.undo)
    if config.getoption("--vmodel-coverage"):
        from vmodel.testing.coverage_plugin import CoveragePlugin

        plugin = CoveragePlugin(config)
        config.pluginmanager.register(plugin, "vmodel-coverage")
        config.stash[_coverage] = plugin.merged
    if config.getoption("--vmodel-dma-report") or config.getoption("--vmodel-dma-fails"):
        from vmodel.testing.dma_plugin import DmaPlugin

        config.stash[_dma] = dma = DmaPlugin(config)
        config.pluginmanager.register(dma, "vmodel-dma")
    config.addinivalue_line(
        "markers", "allow_dma(sign, ...): the test does not fail for these findings, with --vmodel-dma-fails"
    )
    config.addinivalue_line(
        "markers",
        "allow_model_errors(): the test does not fail if a hook or callback of a model raises an exception",
    )
    config.addinivalue_line("markers", "machine(file): the machine of a test; relative to the test's folder")
    config.addinivalue_line(
        "markers",
        "guest(modules, extra_modules, files, shares, tools, append, cpus, qemu_args, timeout, without,"
        " allow_reboot, sanitize): boots a real kernel in QEMU (slow); the arguments describe the guest",
    )


def pytest_report_header(config: pytest.Config) -> str:
    """Prints the seed of injected faults."""
    return f"vmodel: seed {config.getoption('--vmodel-seed')}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Repeats each test with a guest for each --vmodel-kernel."""
    if "guest_kernel" in metafunc.fixturenames:
        kernels = metafunc.config.getoption("--vmodel-kernel")
        if kernels:
            metafunc.parametrize("guest_kernel", kernels, indirect=True, ids=[_file_name(name) for name in kernels])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests whose fixtures boot guests, and checks the arguments of the mark `guest`."""
    for item in items:
        for mark in item.iter_markers("guest"):
            if unknown := mark.kwargs.keys() - _SPEC.keys():
                known = ", ".join(sorted(_SPEC))
                raise pytest.UsageError(f"{item.nodeid}: guest({', '.join(sorted(unknown))}): arguments are {known}")
            for name, value in mark.kwargs.items():
                if not _SPEC[name][1](value):
                    raise pytest.UsageError(f"{item.nodeid}: guest({name}={value!r}): must be {_SPEC[name][0]}")
            if mark.args:
                raise pytest.UsageError(
                    f"{item.nodeid}: guest({mark.args[0]!r}): arguments have names, as modules=[...]"
                )
        for mark in item.iter_markers("machine"):
            if len(mark.args) != 1 or not isinstance(mark.args[0], str | Path) or mark.kwargs:
                raise pytest.UsageError(f'{item.nodeid}: machine takes a file, as machine("edu.toml")')
        names = getattr(item, "fixturenames", ())
        if _GUESTS.intersection(names) and item.get_closest_marker("guest") is None:
            item.add_marker(pytest.mark.guest)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Records whether a test has failed; adds what its guests' kernels reported, and the folder of its logs."""
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed  # type: ignore[attr-defined]
    if report.failed and call.when == "call" and (said := _kernels_said(item)):  # type: ignore[attr-defined]
        report.sections.append(("the guest's kernel", "\n".join(said[:_MOST_MESSAGES])))  # type: ignore[attr-defined]
    if report.failed and _kept in item.stash:  # type: ignore[attr-defined]
        report.sections.append(("vmodel", f"logs will be in {item.stash[_kept]}"))  # type: ignore[attr-defined]
    return report


def _kernels_said(item: pytest.Item) -> list[str]:
    """Oopses, warnings and other problems that the kernels of a test's guests have reported, with file and line."""
    guests = [booted.guest for booted in item.stash.get(_booted, [])]
    if not guests:
        return []
    from vmodel.experiment.kernel_log import findings
    from vmodel.guest.kernel_lines import lines_of

    return [
        finding.text
        for guest in guests
        for finding in findings(lines_of(guest.console), unknown=False, where=guest.places.of)
    ]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the results of tests with guests for each kernel, if there are several, with the exact releases."""
    kernels: dict[str, Counter[str]] = {}
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == _KERNEL and outcome:  # "" is for the phases around a test
                    kernels.setdefault(value, Counter())[outcome] += 1
    if len(kernels) > 1:
        terminalreporter.section("kernels")
        width = max(map(len, kernels))
        for name, counts in sorted(kernels.items()):
            terminalreporter.line(f"{name:{width}}  {', '.join(f'{n} {what}' for what, n in sorted(counts.items()))}")


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "_", text).strip("_")


@contextlib.contextmanager
def _on_one_line() -> Iterator[None]:
    """Reports a ConfigError (a wrong file or name) as its text, without a traceback through vmodel."""
    from vmodel.errors import ConfigError

    try:
        yield
    except ConfigError as error:
        raise pytest.fail.Exception(str(error), pytrace=False) from None


# ---- for all tests --------------------------------------------------------------------------------


@pytest.fixture
def artifacts(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder for logs, which does not exist yet; copied to artifacts/TEST if the test fails."""
    folder = tmp_path / "vmodel-logs"
    base = request.config.rootpath / request.config.getoption("--vmodel-artifacts")
    kept = base / _file_name(request.node.nodeid)
    request.node.stash[_kept] = kept
    yield folder
    shutil.rmtree(kept, ignore_errors=True)
    if request.node.stash.get(_failed, True) and folder.exists():
        shutil.copytree(folder, kept)


@pytest.fixture(scope="session")
def vmodel_seed(request: pytest.FixtureRequest) -> int:
    """The seed of injected faults: --vmodel-seed."""
    return int(request.config.getoption("--vmodel-seed"))


@pytest.fixture
def vmodel_devices() -> dict[str, PciDevice]:
    """The devices of this test by name: those on which `inject` arms faults."""
    return {}


@pytest.fixture
def inject(
    request: pytest.FixtureRequest, vmodel_devices: dict[str, PciDevice], vmodel_seed: int, artifacts: Path
) -> Iterator[Inject]:
    """Arms faults on the devices of `fake_driver` or `machine`, until the test ends."""
    from vmodel.testing.inject import Inject

    made = Inject(vmodel_devices, vmodel_seed, artifacts, request.path.parent)
    yield made
    made.heal()


def _check_models(request: pytest.FixtureRequest, devices: Iterable[PciDevice]) -> None:
    """Fails a test in which a model has raised an exception that is a bug, unless it has the mark for that."""
    found = [f"{device.name}: {error}" for device in devices for error in device.backend.model_errors]
    if found and request.node.get_closest_marker("allow_model_errors") is None:
        pytest.fail("the model failed: " + "\n".join(found), pytrace=False)  # the summary has the first line


# ---- without a guest ------------------------------------------------------------------------------


@pytest.fixture
def fake_memory() -> Iterator[FakeMemory]:
    """16 MiB of guest memory from address 0 on."""
    from vmodel.testing.fakes import FakeMemory

    with FakeMemory() as memory:
        yield memory


@pytest.fixture
def fake_driver(
    request: pytest.FixtureRequest, fake_memory: FakeMemory, vmodel_devices: dict[str, PciDevice]
) -> Iterator[Callable[..., FakeDriver]]:
    """`fake_driver(device)` serves a device and returns a FakeDriver for it.

    The driver enables the device, as a kernel's driver would, unless `enable=False`.  All drivers of a test share
    `fake_memory`.  Devices are closed at the end.
    """
    from vmodel.testing.fakes import FakeDriver

    made: list[FakeDriver] = []

    def make(device: PciDevice, *, enable: bool = True) -> FakeDriver:
        driver = FakeDriver(device, fake_memory, enable=enable)
        vmodel_devices[device.name] = device
        made.append(driver)
        return driver

    yield make
    for driver in made:
        driver.close()
        driver.device.close()
    _check_models(request, [driver.device for driver in made])


# ---- with a guest -----------------------------------------------------------------------------------


@pytest.fixture
def guest_kernel(request: pytest.FixtureRequest) -> Kernel:
    """The kernel of this test's guests: one of --vmodel-kernel, else the machine file's, else stable's."""
    from vmodel.guest.artifacts import find_kernel

    name = getattr(request, "param", None)
    if name is None and "vmodel_served" in request.fixturenames:
        name = request.getfixturevalue("vmodel_served").machine.content.guest.kernel
    with _on_one_line():
        kernel = find_kernel(name)
    request.node.user_properties.append((_KERNEL, kernel.release))
    return kernel


@pytest.fixture
def vmodel_machine_file(request: pytest.FixtureRequest) -> Path:
    """The machine file that the mark `machine` names."""
    mark = request.node.get_closest_marker("machine")
    if mark is None or len(mark.args) != 1:
        pytest.fail(f'{request.node.nodeid}: needs a machine, as @pytest.mark.machine("edu.toml")', pytrace=False)
    file: Path = request.path.parent / mark.args[0]
    return file


@pytest.fixture
def vmodel_served(
    request: pytest.FixtureRequest, vmodel_machine_file: Path, vmodel_devices: dict[str, PciDevice]
) -> Iterator[Served]:
    """The test's machine, served."""
    from vmodel.guest.served import Served

    with _on_one_line():
        made = Served(vmodel_machine_file)
    with made as served:
        vmodel_devices.update(served.machine.devices)
        yield served
    _check_models(request, served.machine.devices.values())


@pytest.fixture
def machine(vmodel_served: Served) -> Machine:
    """The machine of the mark `machine`, served."""
    return vmodel_served.machine


def _marked(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The arguments of a test's `guest` marks; the nearest mark takes precedence."""
    from vmodel.guest.options import module_at
    from vmodel.guest.shares import share_at
    from vmodel.guest.tools import program_path

    found: dict[str, Any] = {}
    for mark in request.node.iter_markers("guest"):
        found = {**mark.kwargs, **found}
    for key in {"modules", "extra_modules"} & found.keys():
        with _on_one_line():
            found[key] = [module_at(entry, request.path.parent) for entry in found[key]]
    if "shares" in found:
        with _on_one_line():
            found["shares"] = [share_at(entry, request.path.parent) for entry in found["shares"]]
    for entry in found.get("tools", ()):
        with _on_one_line():
            program_path(entry)
    if "files" in found:
        found["files"] = [_file(request.path.parent, entry) for entry in found["files"]]
    return found


def _file(base: Path, entry: Any) -> Path | tuple[Path, str]:
    if isinstance(entry, str | Path):
        return base / entry
    source, target = entry
    return base / source, target


@pytest.fixture
def vm(request: pytest.FixtureRequest, vmodel_served: Served, guest_kernel: Kernel, artifacts: Path) -> Iterator[Vm]:
    """Guests with the machine: `vm.run(command)` for one command, `with vm.boot() as guest` for several scripts."""
    from vmodel.testing.vm import Vm

    dma = request.config.stash.get(_dma, None)
    coverage = request.config.stash.get(_coverage, None)
    made = Vm(vmodel_served, guest_kernel, _marked(request), artifacts, coverage, watch_dma=dma is not None)
    request.node.stash[_booted] = made.booted
    yield made
    made.add_coverage()
    if dma is not None:
        dma.add(request.node, made.dma_findings())


@pytest.fixture
def vm_booted(vm: Vm, vmodel_served: Served) -> Iterator[BootedGuest]:
    """A booted guest with the machine: `vm_booted.run(script)` runs scripts, one after the other."""
    with vm.boot() as guest:
        yield guest


@pytest.fixture(scope="session")
def vmodel_rig() -> Iterator[Rig]:
    """Runs the experiments of all tests, which so share guests."""
    from vmodel.experiment import Rig

    with Rig() as rig:
        yield rig


@pytest.fixture
def experiment(
    request: pytest.FixtureRequest,
    vmodel_machine_file: Path,
    guest_kernel: Kernel,
    vmodel_rig: Rig,
    vmodel_seed: int,
    artifacts: Path,
) -> Iterator[Callable[..., Result]]:
    """`experiment(workload, "dma.write nth=3 do=drop", check=...)` runs a case and returns its `Result`.

    The second argument is a rule, a plan's file, a FaultPlan, or None; keywords are fields of `Case`.
    """
    from vmodel.config_file import parse_toml, read_text
    from vmodel.errors import ConfigError
    from vmodel.experiment import Case
    from vmodel.testing.inject import plan_of
    from vmodel.testing.vm import smp_of

    options = _marked(request)
    with _on_one_line():
        table = parse_toml(read_text(vmodel_machine_file), vmodel_machine_file).get("guest")
    table = table if isinstance(table, dict) else {}  # the rig reports mistakes in it
    smp = smp_of(options, table.get("cpus"), table.get("qemu_args", ()))
    options["qemu_args"] = (*smp, *options.get("qemu_args", ()))
    if "timeout" in options:
        options["boot_timeout"] = options.pop("timeout")
    if unfit := {"without", "allow_reboot", "shares"} & set(options):
        pytest.fail(f"{request.node.nodeid}: experiments do not support {' and '.join(sorted(unfit))}", pytrace=False)
    merged = request.config.stash.get(_coverage, None)
    own = [*options.get("modules", ()), *options.get("extra_modules", ())]
    for key in ("modules", "extra_modules"):
        own += [str(vmodel_machine_file.parent / entry) if "/" in entry else entry for entry in table.get(key, ())]
    count = 0
    dma = request.config.stash.get(_dma, None)
    wrong: list[DmaFinding] = []

    def run(workload: str, faults: str | Path | FaultPlan | None = None, **fields: Any) -> Result:
        __tracebackhide__ = True
        nonlocal count
        count += 1
        plan = None if faults is None else plan_of(faults, request.path.parent)
        seed = None if plan is None or plan.seed else vmodel_seed
        case = Case(
            machine=vmodel_machine_file,
            workload=workload,
            plan=plan,
            kernel=str(guest_kernel.image),
            **{"seed": seed, "dma_report": dma is not None, **options, **fields},
        )
        logs = artifacts / f"experiment-{count}"
        try:
            result = (
                vmodel_rig.run(case, logs) if merged is None else merged.run(vmodel_rig, case, logs, guest_kernel, own)
            )
        except ConfigError as error:  # its text says all: no traceback through vmodel
            raise error.with_traceback(None) from None
        wrong.extend(result.findings)
        return result

    yield run
    if dma is not None:
        dma.add(request.node, wrong)
