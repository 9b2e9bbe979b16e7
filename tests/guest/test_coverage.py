"""Coverage of a module whose branches are known one by one: tests/guest/branches says what they are.

What is expected is written down from paths.S, where each instruction has a label, not from what ran.
"""

from __future__ import annotations

import io
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile

from tests.cli.commands import EXAMPLE, refused, vmodel
from tests.guest.kernels import CHOSEN
from tests.packages.archive import fake_qemu
from vmodel.coverage.coverage import Coverage
from vmodel.guest.artifacts import STABLE, Kernel, find_kernel
from vmodel.guest.booted import BootedGuest
from vmodel.guest.kbuild import build
from vmodel.guest.running import Guest, GuestPanic, GuestSpec

pytestmark = pytest.mark.guest
SOURCE = Path(__file__).parent / "branches"
#: Another module, to be loaded before so that "branches" is elsewhere.
OTHER = "dummy"

#: By ioctl (0x700 is added, as the kernel has ioctls 1 and 2 of its own) and value: the labels of paths.S that run.
PATHS = {
    (1, 3): "p00 p01 p06 p07",
    (1, 2): "p00 p01 p02 p08 p09 p10 p15 p16",
    (1, 1): "p00 p01 p02 p03 p04 p05 p14 p15 p16",
    (1, 0): "p00 p01 p02 p03 p04 p11 p12 p13 p14 p15 p16",
    (2, 0): "l00 l01 l02 l06",
    (2, 3): "l00 l01 l02 l03 l04 l05 l06",
    (3, 0): "a00 a01 a02 a03",
}
LABELS = {label for labels in PATHS.values() for label in labels.split()} | {"n00", "n01"}


@pytest.fixture(scope="module", params=CHOSEN)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return find_kernel(request.param)


@pytest.fixture(scope="module")
def module(kernel: Kernel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (path,) = build(SOURCE, kernel, tmp_path_factory.mktemp("build")).modules
    return path


@pytest.fixture(scope="module")
def labels(module: Path) -> dict[str, int]:
    """Where each label is in the module's file."""
    file: Any = ELFFile(io.BytesIO(module.read_bytes()))
    symbols = file.get_section_by_name(".symtab")
    return {
        symbol.name: file.get_section(symbol["st_shndx"])["sh_offset"] + symbol["st_value"]
        for symbol in symbols.iter_symbols()
        if symbol.name in LABELS
    }


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("check") / "branches_check"
    source = SOURCE.parent / "branches_check.c"
    subprocess.run(["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", target, source], check=True)
    return target


def booted(kernel: Kernel, module: Path, check: Path, *, cpus: int = 1) -> BootedGuest:
    spec = GuestSpec(
        command="",
        kernel=kernel,
        extra_modules=[str(module), OTHER],
        files=[check],
        qemu_args=["-m", "512M", "-smp", str(cpus)],
        coverage=["branches"],
        timeout=90,
    )
    return BootedGuest(spec)


def ran(guest: BootedGuest, script: str) -> Coverage:
    """What a script makes run."""
    recorded = guest.guest.coverage
    assert recorded is not None
    recorded.clear()
    done = guest.run(script)
    assert done.status == 0, done.output
    return recorded.taken()


def labels_in(coverage: Coverage, labels: dict[str, int]) -> set[str]:
    reached = coverage.instructions["branches"]
    return {label for label, address in labels.items() if address in reached}


@pytest.mark.parametrize("cpus", [1, 2])
def test_each_branch(kernel: Kernel, module: Path, labels: dict[str, int], check: Path, cpus: int) -> None:
    assert labels.keys() == LABELS
    with booted(kernel, module, check, cpus=cpus) as guest:
        ran(guest, "modprobe branches")
        for (which, value), expected in PATHS.items():
            found = ran(guest, f"./branches_check {which} {value}")
            assert labels_in(found, labels) == set(expected.split()), (which, value)
        both = ran(guest, "./branches_check 1 3 2 0")
        assert labels_in(both, labels) == {*PATHS[1, 3].split(), *PATHS[2, 0].split()}
        assert not labels_in(ran(guest, "true"), labels)


def test_a_module_elsewhere(kernel: Kernel, module: Path, labels: dict[str, int], check: Path) -> None:
    """It is the same code wherever it is loaded, and when it is loaded again; what it was before is not lost."""
    where = "cat /sys/module/branches/sections/.text"
    with booted(kernel, module, check) as guest:
        ran(guest, "modprobe branches")
        first, at = ran(guest, "./branches_check 1 2"), guest.run(where).output
        recorded = guest.guest.coverage
        assert recorded is not None
        recorded.clear()
        assert guest.run(f"./branches_check 1 3 && rmmod branches && modprobe {OTHER} && modprobe branches").status == 0
        again = guest.run(where).output
        assert again != at
        assert guest.run("./branches_check 1 0").status == 0
        found = recorded.taken()
        assert labels_in(found, labels) == {*PATHS[1, 3].split(), *PATHS[1, 0].split()}
        assert ran(guest, "./branches_check 1 2") == first


def test_functions(kernel: Kernel, module: Path, check: Path) -> None:
    with booted(kernel, module, check) as guest:

        def functions(script: str) -> dict[str, int]:
            return {f.name: f.reached for f in ran(guest, script).functions() if f.reached}

        # A parameter is set before the module's init runs, in memory that the init of another module had before.
        loaded = functions(f"modprobe {OTHER} && modprobe branches early=1")
        assert loaded.keys() == {"branches_set", "branches_loop", "branches_init"}
        usual, unlikely = functions("./branches_check 4 1"), functions("./branches_check 4 3")
        assert usual.keys() == {"branches_ioctl", "branches_cold"}
        assert unlikely.keys() == {"branches_ioctl", "branches_cold", "branches_error"}
        assert unlikely["branches_cold"] != usual["branches_cold"]
        assert functions("rmmod branches").keys() == {"branches_exit"}
        # Of the module that is gone.
        assert functions("true") == {}


def test_a_whole_run(kernel: Kernel, module: Path, check: Path) -> None:
    """From the boot to the end, also of a guest that panics."""
    spec = GuestSpec(
        command="./branches_check 1 3; echo c > /proc/sysrq-trigger",
        kernel=kernel,
        modules=[str(module)],
        files=[check],
        coverage=["branches", "vmlinux:sysrq_handle_crash", "vmlinux:misc_register"],
        timeout=90,
    )
    with Guest(spec) as guest, pytest.raises(GuestPanic):
        guest.wait()
    assert guest.coverage is not None
    found = guest.coverage.taken()
    reached = {(f.module, f.name) for f in found.functions() if f.reached}
    assert {("branches", "branches_init"), ("branches", "branches_ioctl"), ("branches", "branches_path")} <= reached
    assert ("branches", "branches_never") not in reached
    # Of the kernel itself: what runs at boot, and what ends it.
    assert ("vmlinux:sysrq_handle_crash", "sysrq_handle_crash") in reached
    assert ("vmlinux:misc_register", "misc_register") in reached


# ---- the command ------------------------------------------------------------------------------


def guest(*arguments: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return vmodel("guest", EXAMPLE, "--run-dir", cwd / "run", *arguments, cwd=cwd, **env)


def test_the_command(tmp_path: Path) -> None:
    """The table comes at the end, on stderr; also if the command fails."""
    done = guest("--module", "dummy", "--coverage", "dummy", "--coverage-out", "out", "--", "false", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search(r"^Module +Functions +Instructions reached$", done.stderr, re.M)
    assert re.search(r"^dummy +\d+ of \d+ +\d+ of \d+ +\d+ %$", done.stderr, re.M)
    lines = done.stderr.splitlines()
    assert {len(line) for line in lines if line.endswith(" %")} == {80}
    assert lines[-1] == f"vmodel: {tmp_path}/out/index.html shows it; beside it: coverage.info, coverage.json, dummy.s"
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"index.html", "coverage.info", "coverage.json"} <= written
    info = (tmp_path / "out" / "coverage.info").read_text()
    assert re.search(r"^FNDA:[1-9]\d*,dummy_init_module$", info, re.M)
    assert re.search(r"^FNDA:0,dummy_cleanup_module$", info, re.M)


@pytest.mark.parametrize(("command", "status"), [("true", 125), ("sh -c 'echo oh; exit 3'", 3)])
def test_a_report_that_cannot_be_written_hides_nothing(command: str, status: int, tmp_path: Path) -> None:
    """The command has ended: its output, its status and the table are there."""
    (tmp_path / "file").touch()
    arguments = ("--module", "dummy", "--coverage", "dummy", "--coverage-out", "file/out")
    done = guest(*arguments, "--", *shlex.split(command), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (status, "oh\n" if status == 3 else "")
    assert re.search(r"^dummy +\d+ of \d+ +\d+ of \d+ +\d+ %$", done.stderr, re.M)
    said = f"vmodel: {tmp_path}/file/out: cannot write the coverage: Not a directory"
    assert done.stderr.splitlines()[-1] == said and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments, env, said",
    [
        (
            ["--coverage", "nvmee"],
            {},
            "kernel {release} has no module 'nvmee': did you mean 'nvme'? write vmlinux:PREFIX for code that is built"
            " in",
        ),
        (["--coverage", "ext4x.ko"], {}, "--coverage ext4x.ko: there is no file 'ext4x.ko'"),
        (
            ["--coverage", "virtio_pci"],
            {},
            "virtio_pci is built into kernel {release}: write vmlinux:PREFIX, with which its functions begin",
        ),
        (
            ["--coverage", "nvme"],
            {"VMODEL_ACCEL": "kvm"},
            "coverage needs TCG, as QEMU does not see what runs under KVM: unset VMODEL_ACCEL",
        ),
        (["--coverage", "nvme", "--coverage-out", "/dev/full"], {}, "--coverage-out /dev/full: is no folder"),
        (["--coverage-out", "out"], {}, "--coverage-out: there is no --coverage, as --coverage nvme"),
        (
            ["--coverage", "dummy", "--coverage-source", "."],
            {},
            "--coverage-source: there is no --coverage-out, which shows the source",
        ),
        (
            ["--coverage", "dummy", "--coverage-out", "out", "--coverage-source", "gone"],
            {},
            "--coverage-source gone: is no folder",
        ),
    ],
)
def test_what_is_wrong(arguments: list[str], env: dict[str, str], said: str, tmp_path: Path) -> None:
    release = find_kernel(STABLE).release
    done = guest(*arguments, "--", "true", cwd=tmp_path, **env)
    assert refused(done) == said.format(release=release)


@pytest.mark.parametrize(
    ("driver", "env", "said"),
    [
        ("nvmee", {}, "--driver nvmee: kernel {release} has no module 'nvmee': did you mean 'nvme'? {inside}"),
        (
            "virtio-pci",
            {},
            "--driver virtio_pci: virtio_pci is built into kernel {release}: write vmlinux:PREFIX, with which its"
            " functions begin",
        ),
        (
            "vmlinux:nosuch_",
            {},
            "--driver vmlinux:nosuch_: kernel {release} has no function whose name begins with 'nosuch_'",
        ),
        (
            "nvme",
            {"VMODEL_ACCEL": "kvm"},
            "coverage needs TCG, as QEMU does not see what runs under KVM: unset VMODEL_ACCEL",
        ),
    ],
)
def test_what_explore_refuses_before_it_begins(driver: str, env: dict[str, str], said: str, tmp_path: Path) -> None:
    release = find_kernel(STABLE).release
    shutil.copy(EXAMPLE, tmp_path)
    line = ("explore", EXAMPLE.name, "--driver", driver, "--workload", "true", "--runs", "3", "--kernel", STABLE)
    done = vmodel(*line, cwd=tmp_path, **env)
    assert refused(done) == said.format(release=release, inside="write vmlinux:PREFIX for code that is built in")
    assert [path.name for path in tmp_path.iterdir()] == [EXAMPLE.name]


def test_explore_suggests_a_module_of_the_machine_file(tmp_path: Path) -> None:
    folder = tmp_path / "driver"
    shutil.copytree(EXAMPLE.parent / "driver", folder, ignore=shutil.ignore_patterns("build", "*.runs"))
    line = ("explore", "memcard.toml", "--driver", "memcrad", "--workload", "true", "--runs", "3", "--kernel", STABLE)
    said = "--driver memcrad: no module 'memcrad': did you mean 'memcard', which the guest loads?"
    assert refused(vmodel(*line, cwd=folder)) == said


def test_a_qemu_that_is_too_old(tmp_path: Path) -> None:
    old = fake_qemu(tmp_path / "qemu", version="11.0.0")
    done = guest("--coverage", "nvme", "--", "true", cwd=tmp_path, VMODEL_QEMU=str(old))
    assert refused(done) == "coverage needs QEMU 11.1 or newer, not 11.0.0: ./scripts/get-qemu fetches one"


def test_a_qemu_without_plugins(tmp_path: Path) -> None:
    """One that was built without them says that it has no such option."""
    qemu = tmp_path / "qemu"
    qemu.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --version ] && echo "QEMU emulator version 11.1.3" && exit\n'
        '[ "$1" = -device ] && echo \'name "vfio-user-pci"\' && exit\n'
        'echo "qemu: -plugin: invalid option" >&2; exit 1\n'
    )
    qemu.chmod(0o755)
    done = guest("--coverage", "nvme", "--", "true", cwd=tmp_path, VMODEL_QEMU=str(qemu))
    assert refused(done, 125) == (
        "QEMU ended with status 1, as it does not take vmodel's plugin for coverage, before the command:"
        " qemu: -plugin: invalid option"
    )
