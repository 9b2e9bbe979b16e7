"""`--vmodel-coverage`: what all guests of a test run have run, as one report for each kernel."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.coverage.objects import function, program
from tests.packages.archive import fake_qemu
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.program import Program
from vmodel.coverage.registry import programs
from vmodel.files import cache_dir
from vmodel.guest.artifacts import find_kernel, find_kernels
from vmodel.guest.kernel_code import CodeFinder
from vmodel.testing.coverage import MergedCoverage, only

pytest_plugins = "pytester"

#: Runs of pytest have another HOME.
CACHE = cache_dir().parent
MACHINE = """
[machine]
name = "nvme"
[[device]]
name = "nvme0"
model = "nvme"
address = "0000:00:04.0"
params = { queues = 1, namespaces = [{ memory = "4M", lba = 512 }] }
"""
GUESTS = """
    import pytest

    pytestmark = [pytest.mark.machine("nvme.toml"), pytest.mark.guest(modules=["nvme"])]
    READ = "dd if=/dev/nvme0n1 of=/dev/null bs=4k count=64 iflag=direct"
    LOST = "completion queue=1 nth=3 do=drop"

    def test_without(experiment):
        assert experiment(READ).coverage is None

    def test_with(experiment):
        clean = experiment(READ, coverage=["nvme"]).coverage
        broken = experiment(READ, LOST, coverage=["nvme"], append="nvme_core.io_timeout=2").coverage
        assert clean.modules() == broken.modules() == ["nvme"]
        assert ("nvme", "nvme_timeout") in (broken - clean).functions_reached()
        assert ("nvme", "nvme_irq") in clean.functions_reached()

    def test_boot(vm):
        assert vm.run("true").status == 0
"""


@pytest.mark.guest
def test_guests_of_all_tests(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    release = find_kernel().release
    (pytester.path / "nvme.toml").write_text(MACHINE)
    pytester.makepyfile(GUESTS)
    done = pytester.runpytest_subprocess(
        "-n",
        "2",
        "--vmodel-coverage",
        "nvme",
        "--vmodel-coverage",
        "nvme-core",
        "--vmodel-coverage-out",
        "c",
    )
    done.assert_outcomes(passed=3)
    text = done.stdout.str()
    assert f"kernel {release}" in text
    counts = re.findall(r"^  (\w+) +(\d+) %  [\d,]+ of [\d,]+ instructions, (\d+) of (\d+) functions$", text, re.M)
    assert [name for name, *_ in counts] == ["nvme", "nvme_core"]
    assert all(0 < int(reached) < int(total) for _, _, reached, total in counts)
    folder = pytester.path / "c" / release
    assert f"  report: {folder}/index.html" in text
    programs.add_finder(CodeFinder(find_kernels().values()))
    reached = Coverage.from_json(json.loads((folder / "coverage.json").read_text())["coverage"])
    # The driver's probe is of the guest of `vm`, its time-out of an experiment.
    assert {("nvme", "nvme_probe"), ("nvme", "nvme_timeout")} <= reached.functions_reached()
    assert (folder / "coverage.info").stat().st_size > 0


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("nv me", "'nv me' must be a module's name as"),
        ("vmlinux", '"vmlinux" is all of the kernel: say which functions, as "vmlinux:pci_"'),
        ("./card.ko", "there is no file './card.ko'"),
    ],
)
def test_what_is_no_target(pytester: pytest.Pytester, option: str, said: str) -> None:
    pytester.makepyfile("def test_nothing():\n    pass\n")
    done = pytester.runpytest_subprocess("--vmodel-coverage", option)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert [line for line in done.errlines if line] == [line for line in done.errlines if said in line]


@pytest.mark.guest
@pytest.mark.parametrize("processes", [0, 2])
def test_a_module_that_no_guest_has(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, processes: int) -> None:
    """One line before the first test, not one error for each."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    (pytester.path / "nvme.toml").write_text(MACHINE)
    pytester.makepyfile(GUESTS)
    done = pytester.runpytest_subprocess("-n", str(processes), "--vmodel-coverage", "nvm")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    lines = [line for line in (*done.outlines, *done.errlines) if "ERROR" in line]
    assert len(lines) == 1 and "--vmodel-coverage nvm: kernel" in lines[0] and "did you mean 'nvme'?" in lines[0]
    assert not (pytester.path / "coverage").exists()
    done.assert_outcomes()


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize(
    ("version", "accelerator", "said"),
    [
        ("11.1.3", "kvm", "coverage needs TCG, as QEMU does not see what runs under KVM: unset VMODEL_ACCEL"),
        ("11.0.0", "tcg", "coverage needs QEMU 11.1 or newer, not 11.0.0: ./scripts/get-qemu fetches one"),
    ],
)
def test_a_host_that_cannot_see_what_runs(
    pytester: pytest.Pytester,
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    accelerator: str,
    said: str,
    processes: int,
) -> None:
    """One line before the first test, not one error for each."""
    monkeypatch.setenv("VMODEL_QEMU", str(fake_qemu(pytester.path / "qemu", version=version)))
    monkeypatch.setenv("VMODEL_ACCEL", accelerator)
    (pytester.path / "nvme.toml").write_text(MACHINE)
    pytester.makepyfile(GUESTS)
    done = pytester.runpytest_subprocess("-n", str(processes), "--vmodel-coverage", "nvme")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    lines = [line for line in (*done.outlines, *done.errlines) if "ERROR" in line]
    assert lines == [f"ERROR: --vmodel-coverage: {said}"]
    done.assert_outcomes()


def test_no_guests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_nothing():\n    pass\n")
    done = pytester.runpytest_subprocess("--vmodel-coverage", "nvme")
    assert done.ret == 0
    done.stdout.fnmatch_lines(["--vmodel-coverage nvme: no guest of these tests had it"])


# ---- merging ---------------------------------------------------------------------------------------

BUILD = '.section .note.gnu.build-id,"a",@note\n.long 4, 4, 3\n.asciz "GNU"\n.byte 0, 0, 0, {}\n'


def made(build: int) -> Program:
    return programs.add(program(function("one", "nop\nret") + function("two", "ret") + BUILD.format(build), "card"))


def of(card: Program, name: str) -> Coverage:
    return Coverage.of_ranges(card, [(a, a + 1) for a in card.function(name).addresses])


def test_processes_are_merged(tmp_path: Path) -> None:
    card = made(1)
    first, second, all = (MergedCoverage(["card", "other"]) for _ in range(3))
    first.add("6.12", of(card, "one"))
    second.add("6.12", of(card, "two"))
    second.add("7.3", of(card, "one"))
    second.note("something is missing")
    for one in (first, second):
        all.merge(json.loads(json.dumps(one.to_json())))
    assert list(all.write(tmp_path)) == [
        "kernel 6.12",
        "  card  100 %  3 of 3 instructions, 2 of 2 functions",
        f"  report: {tmp_path}/6.12/index.html",
        "kernel 7.3",
        "  card   66 %  2 of 3 instructions, 1 of 2 functions",
        f"  report: {tmp_path}/7.3/index.html",
        "--vmodel-coverage other: no guest of these tests had it",
        "something is missing",
    ]


def test_a_module_that_is_built_again(tmp_path: Path) -> None:
    """Another build's instructions are at other addresses."""
    merged = MergedCoverage(["card"])
    for build in (1, 2, 1):
        merged.add("6.12", of(made(build), "one"))
    lines = list(merged.write(tmp_path))
    assert [line for line in lines if not line.startswith(" ")] == ["kernel 6.12", "kernel 6.12, another build"]
    assert (tmp_path / "6.12" / "index.html").exists() and (tmp_path / "6.12-2" / "index.html").exists()


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    merged = MergedCoverage(["card"])
    merged.add("6.12", of(made(1), "one"))
    lines = list(merged.write(tmp_path / "out"))
    assert lines[-1] == f"{tmp_path}/out/6.12: cannot write the coverage: Not a directory"


def test_only() -> None:
    card = made(1)
    assert only(of(card, "one"), {"other"}).modules() == []
    assert only(of(card, "one"), {"card"}) == of(card, "one")


def test_a_folder_of_reports_that_is_a_file(pytester: pytest.Pytester) -> None:
    """Said before the first test, and not after the last."""
    pytester.makepyfile("def test_nothing():\n    pass\n")
    (pytester.path / "out").touch()
    done = pytester.runpytest_subprocess("--vmodel-coverage", "nvme", "--vmodel-coverage-out=out")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert f"--vmodel-coverage-out {pytester.path / 'out'}: is no folder" in done.stderr.str()
