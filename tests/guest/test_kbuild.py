"""Kernel modules are built from their source for each kernel, and loaded in its guest."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.guest.kernels import CHOSEN
from tests.waiting import runs, until
from vmodel.guest import kbuild
from vmodel.guest.artifacts import CLOUD, cache_dir, find_kernel
from vmodel.guest.kbuild import BuildError, build
from vmodel.patience import patience

pytestmark = pytest.mark.guest
pytest_plugins = "pytester"
#: pytester changes $HOME.
CACHE = cache_dir().parent
SOURCE = Path(__file__).parent / "driver"
EDU = Path(__file__).parents[2] / "examples" / "edu.toml"


@pytest.fixture(params=[name for name in CHOSEN if name != CLOUD])
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(SOURCE, tmp_path / "project" / "driver"))


def all_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_build(source: Path, kernel: str, tmp_path: Path) -> None:
    """Warnings name the source; nothing is written into it; what has not changed is not built again."""
    main = source / "main.c"
    main.write_text(main.read_text() + '#include "../shared.h"\nstatic int nobody_uses_this;\n')
    (source.parent / "shared.h").write_text("#define SHARED 1\n")
    before, found, said = all_of(source.parent), find_kernel(kernel), list[str]()
    built = build(source, found, tmp_path / "build", said.append)
    (module,) = built.modules
    assert module == tmp_path / "build" / found.release / "factorial.ko"
    line = len(main.read_text().splitlines())
    assert built.warnings == (
        f"{main}:{line}:12: warning: 'nobody_uses_this' defined but not used [-Wunused-variable]",
    )
    assert built.warnings[0] in said
    assert all_of(source.parent) == before
    commands = json.loads((tmp_path / "build" / "compile_commands.json").read_text())
    assert [entry["file"] for entry in commands] == [str(main), str(source / "registers.c")]
    assert all(Path(entry["directory"]).is_dir() and Path(entry["arguments"][0]).is_file() for entry in commands)
    time = module.stat().st_mtime_ns
    assert build(source, found, tmp_path / "build").modules == (module,)
    assert module.stat().st_mtime_ns == time
    main.write_text(main.read_text().replace("nobody_uses_this", "nobody"))
    assert "'nobody'" in build(source, found, tmp_path / "build").warnings[0]


def test_a_copied_build_folder_is_built_again(source: Path, tmp_path: Path) -> None:
    """A copy that followed the links has files in their place, and objects that name the other sources."""
    found = find_kernel(CHOSEN[0])
    build(source, found, source / "build")
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    assert (copy / "build" / found.release / "main.c").is_file()
    (module,) = build(copy, found, copy / "build").modules
    assert (module.parent / "main.c").readlink() == copy / "main.c"
    assert str(copy).encode() in module.read_bytes() and str(source).encode() not in module.read_bytes()


def test_a_build_that_does_not_end(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes end with it, and the error says the limit."""
    pid_file = tmp_path / "pid"
    kbuild_file = source / "Kbuild"
    kbuild_file.write_text(kbuild_file.read_text() + f"\n$(shell echo $$$$ > {pid_file}; exec sleep 1000)\n")
    for limit in (1, 4, 16, 64):  # s: a busy machine has not come to that line after one
        monkeypatch.setattr(kbuild, "_TIMEOUT", limit)
        with pytest.raises(BuildError, match=rf"^the build of \S+driver did not end in {limit} s"):
            build(source, find_kernel(CHOSEN[0]), tmp_path / "build")
        if pid_file.exists() and pid_file.read_text():
            break
    until(lambda: not alive(pid_file), "the end of its processes")


def test_a_makefile_that_looks_above_its_folder(source: Path, kernel: str, tmp_path: Path) -> None:
    """As out-of-tree drivers do: the driver in one folder, headers in another beside it."""
    (source.parent / "include").mkdir()
    header = source.parent / "include" / "above.h"
    header.write_text("static int nobody_uses_this;\n")
    # What is called as an output folder is no neighbour.
    (source.parent / find_kernel(kernel).release).write_text("")
    kbuild_file, main = source / "Kbuild", source / "main.c"
    with kbuild_file.open("a") as file:
        file.write("top := $(shell cd $(src)/.. && pwd)\nccflags-y := -I$(top)/include\n")
    main.write_text(main.read_text() + "#include <above.h>\n")
    before, output = all_of(source.parent), tmp_path / "build"
    built = build(source, find_kernel(kernel), output)
    assert built.modules == (output / find_kernel(kernel).release / "factorial.ko",)
    assert built.warnings == (f"{header}:1:12: warning: 'nobody_uses_this' defined but not used [-Wunused-variable]",)
    assert all_of(source.parent) == before
    header.write_text("static int nobody;\n")
    assert "'nobody'" in build(source, find_kernel(kernel), output).warnings[0]


def test_an_object_above_the_folder(source: Path, tmp_path: Path) -> None:
    """kbuild would write it into the source."""
    (source / "Kbuild").write_text("obj-m := factorial.o\nfactorial-y := main.o \\\n ../common/registers.o\n")
    with pytest.raises(BuildError, match=r"Kbuild: \.\./common/registers\.o is outside the module's folder"):
        build(source, find_kernel(CHOSEN[0]), tmp_path / "build")


def test_variables_of_make(source: Path, kernel: str, tmp_path: Path) -> None:
    (source / "Kbuild").write_text("obj-$(CONFIG_FACTORIAL) := factorial.o\nfactorial-y := main.o registers.o\n")
    (source / "main.c").write_text((source / "main.c").read_text() + "static int a = A, b = B;\n")
    command = [sys.executable, "-m", "vmodel", "build", str(source), "--kernel", kernel]
    own = ["--make", "CONFIG_FACTORIAL=m", "--make", "ccflags-y=-DA=1 -DC", "--make", "KCFLAGS=-DB=2"]

    def run(*options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=patience(120), check=False
        )

    done = run(*own)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert done.stdout.endswith(f"build/{find_kernel(kernel).release}/factorial.ko\n")
    assert "obj-m names no module" in run().stderr
    for wrong in ("clean", "-B", "M"):
        done = run("--make", wrong)
        assert (done.returncode, done.stderr) == (2, f"vmodel: {wrong!r}: must be NAME=VALUE, a variable of make's\n")


def test_flags_that_newer_kernels_ignore(source: Path, kernel: str, tmp_path: Path) -> None:
    """kbuild itself says nothing, and the compiler then lacks a header or a definition."""
    with (source / "Kbuild").open("a") as file:
        file.write("EXTRA_CFLAGS := -DREGISTERS\n")
    found = find_kernel(kernel)
    said = f"{source}/Kbuild: warning: kbuild ignores EXTRA_CFLAGS since Linux 6.15; ccflags-y is what it reads"
    assert build(source, found, tmp_path / "build").warnings == ((said,) if found.version >= (6, 15) else ())


def test_files_come_and_go(source: Path, tmp_path: Path) -> None:
    found = find_kernel(CHOSEN[0])
    build(source, found, tmp_path / "build")
    (source / "registers.c").rename(source / "moved.c")
    with pytest.raises(BuildError, match=r"No rule to make target .*registers.o"):
        build(source, found, tmp_path / "build")
    (source / "Kbuild").write_text("obj-m := factorial.o\nfactorial-y := main.o moved.o\n")
    build(source, found, tmp_path / "build")


def test_errors_name_the_source(source: Path, kernel: str, tmp_path: Path) -> None:
    (source / "registers.c").write_text('#include "registers.h"\nu32 factorial(void) { return x; }\n')
    with pytest.raises(BuildError) as error:
        build(source, find_kernel(kernel), tmp_path / "build")
    assert f"{source}/registers.c:2:5: error: conflicting types for 'factorial'" in str(error.value)
    assert f"{source}/registers.c:2:30: error: 'x' undeclared (first use in this function)" in str(error.value)


def test_a_symbol_that_no_kernel_has(source: Path, kernel: str, tmp_path: Path) -> None:
    (source / "registers.c").unlink()
    (source / "Kbuild").write_text("obj-m := factorial.o\nfactorial-y := main.o\n")
    with pytest.raises(BuildError, match=r"ERROR: modpost: .*factorial.* undefined!"):
        build(source, find_kernel(kernel), tmp_path / "build")


def test_a_guest_with_a_module_from_its_source(kernel: str, source: Path, tmp_path: Path) -> None:
    """In one command; parameters of modules are kernel arguments."""
    vmodel = [sys.executable, "-m", "vmodel", "guest", str(EDU), "--run-dir", str(tmp_path / "run")]
    options = ["--kernel", kernel, "--module", "driver/", "--append", "factorial.number=6"]
    done = subprocess.run(
        [*vmodel, *options, "--", "sh", "-c", "dmesg | grep 'factorial.*!'; lsmod | grep -c factorial"],
        cwd=source.parent,
        capture_output=True,
        text=True,
        timeout=patience(120),
    )
    assert done.returncode == 0, done.stderr
    assert "factorial 0000:00:03.0: 6! = 720\n" in done.stdout and done.stdout.endswith("\n1\n")
    assert (source.parent / "build" / find_kernel(kernel).release / "factorial.ko").is_file()


@pytest.mark.parametrize("folder", ["build here", "a:b", "$(touch made)", "a;b", "a'b", "\udcff"])
def test_folders_that_kbuild_does_not_take(source: Path, tmp_path: Path, folder: str) -> None:
    """They would be commands of make or a shell."""
    found, said = find_kernel(CHOSEN[0]), r"kbuild takes no path with ['\"]"
    with pytest.raises(BuildError, match=said):
        build(source, found, tmp_path / folder)
    with pytest.raises(BuildError, match=said):
        build(source.rename(tmp_path / folder), found, tmp_path / "build")
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(BuildError, match=said):
        build(tmp_path / "link", found, tmp_path / "build")


def test_what_a_build_leaves_behind_ends(source: Path, tmp_path: Path) -> None:
    """Also if it keeps make's output open: a compiler's server does so."""
    kbuild_file = source / "Kbuild"
    kbuild_file.write_text(
        kbuild_file.read_text() + f"\n$(shell (echo $$$$ > {tmp_path}/pid; exec sleep 1000 >&2) &)\n"
    )
    assert build(source, find_kernel(CHOSEN[0]), tmp_path / "build").modules
    until(lambda: (tmp_path / "pid").exists(), "the start of its process")
    until(lambda: not alive(tmp_path / "pid"), "the end of its process")


def alive(pid_file: Path) -> bool:
    return runs(int(pid_file.read_text()))


def test_a_build_that_prints_without_end(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a line nor all of them take more memory than a limit."""
    monkeypatch.setattr(kbuild, "_LARGEST", 1 << 20)
    for text in ("$(foreach n,$(A)$(A)$(A)$(A)$(A)$(A)$(A)$(A),$(info $(A)))", "$(shell yes | tr -d '\\n' >&2)"):
        (source / "Kbuild").write_text(f"A := $(shell seq 1000)\n{text}\nobj-m := factorial.o\n")
        with pytest.raises(BuildError, match=r"driver was stopped: more than 1 MiB of output"):
            build(source, find_kernel(CHOSEN[0]), tmp_path / "build")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_build(number: int, source: Path, tmp_path: Path) -> None:
    """make and what it has started end with vmodel, also if a second signal follows at once."""
    kbuild_file = source / "Kbuild"
    kbuild_file.write_text(kbuild_file.read_text() + f"\n$(shell echo $$$$ > {tmp_path}/pid; exec sleep 1000)\n")
    line = [sys.executable, "-m", "vmodel", "build", "driver", "--kernel", CHOSEN[0]]
    with subprocess.Popen(line, cwd=source.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "", "the start of make")
        run.send_signal(number)
        time.sleep(0.03)
        run.send_signal(number)
        said, _ = run.communicate(timeout=patience(60))
    assert said == b"" and run.returncode in (128 + number, -number)  # the second may come when all is done
    until(lambda: not alive(tmp_path / "pid"), "the end of its processes")


def test_a_module_from_its_source_in_tests_and_experiments(
    pytester: pytest.Pytester, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths of marks count from the test's folder, those of a machine file from the machine file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(CACHE))
    text = EDU.read_text() + '[guest]\nappend = "factorial.number=5"\n'
    (pytester.path / "edu.toml").write_text(text)
    (pytester.path / "loaded.toml").write_text(text + 'modules = ["driver/"]\n')
    shutil.copytree(source, pytester.path / "driver")
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.machine("edu.toml")
        @pytest.mark.guest(modules=["driver/"])
        def test_mark(vm):
            output = vm.run("dmesg | grep factorial; nproc").output
            assert b"5! = 120" in output and output.split()[-1] == b"2"

        @pytest.mark.machine("loaded.toml")
        def test_machine_file(experiment):
            assert experiment("exit $(cat /sys/module/factorial/parameters/number)$(nproc)").status == 52
        """
    )
    pytester.runpytest().assert_outcomes(passed=2)


def test_a_kernel_by_its_path(source: Path, tmp_path: Path) -> None:
    """An image outside the cache, with its modules beside it: a module is built for its release, and loaded."""
    found = find_kernel(CHOSEN[0])
    assert found.modules is not None
    image = tmp_path / "own" / "bzImage"
    (image.parent / "lib" / "modules").mkdir(parents=True)
    image.write_bytes(found.image.read_bytes())
    (image.parent / "lib" / "modules" / found.release).symlink_to(found.modules)
    line = [sys.executable, "-m", "vmodel", "guest", str(EDU), "--run-dir", str(tmp_path / "run")]
    done = subprocess.run(
        [*line, "--kernel", str(image), "--module", "driver/", "--", "sh", "-c", "dmesg | grep -c '4! = 24'"],
        cwd=source.parent,
        capture_output=True,
        text=True,
        timeout=patience(120),
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
