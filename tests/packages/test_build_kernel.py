"""scripts/build-kernel, with a make that only pretends; no network, no apt."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.packages.archive import RELEASE, REPO, cached, fake_deb, fake_qemu
from tests.waiting import until
from vmodel.errors import ConfigError
from vmodel.guest import artifacts, build_kernel, debian, get_qemu
from vmodel.guest.artifacts import ArtifactError
from vmodel.guest.build_kernel import FRAGMENT, check_options, complaint, missing_packages, read_options
from vmodel.guest.headers import debug_modules, find_headers

pytestmark = pytest.mark.usefixtures("cache")
DEBUG_RELEASE = "6.12.117-vmodel-debug"
#: Takes the place of make: "builds" a kernel with one module, whose configuration has not got CONFIG_GONE.
MAKE = """#!/bin/sh
PATH=/usr/bin:/bin
echo "$@" >> CACHE/said
for word in "$@"; do
    case $word in
    KCONFIG_ALLCONFIG=*) grep -v CONFIG_GONE "${word#*=}" > .config ;;
    INSTALL_MOD_PATH=*) into="${word#*=}/lib/modules/RELEASE" ;;
    modules)
        [ ! -e CACHE/wait ] || { touch CACHE/waits; exec sleep 300; }
        [ ! -e CACHE/fail ] || { echo "x.c:1:2: error: no such thing"; echo "make: *** [x]"; exit 2; }
        mkdir -p include/config scripts arch/x86/include arch/x86/boot tools/objtool drivers
        echo "RELEASE" > include/config/kernel.release
        echo drivers/x.o > modules.order
        for file in Makefile Kbuild Module.symvers System.map vmlinux arch/x86/Makefile arch/x86/Makefile_32.cpu \\
            tools/objtool/objtool drivers/x.ko arch/x86/boot/bzImage scripts/mod.o scripts/modpost; do
            echo $file > $file
        done
        echo "  CC x.o" ;;
    esac
done
[ -z "$into" ] || { mkdir -p "$into" && touch "$into/modules.builtin"; }
"""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with all programs."""
    monkeypatch.setattr(build_kernel, "missing_packages", list)


@pytest.fixture
def source(cache: Path, host: None) -> Path:
    """A cache in which nothing has to be fetched; returns Linux's source there."""
    fake_qemu(cached(cache, "qemu", version="QEMU emulator version 11.1.3") / "qemu-system-x86_64")
    cached(cache, "busybox")
    cached(cache, "kernel-stable", release=RELEASE)
    cached(cache, "headers-stable", release=RELEASE, compiler="14")
    programs = cached(cache, "gcc-14", version="14") / "usr/bin"
    programs.mkdir(parents=True)
    (programs / "make").write_text(MAKE.replace("CACHE", str(cache)).replace("RELEASE", DEBUG_RELEASE))
    (programs / "make").chmod(0o755)
    linux = cached(cache, "source") / "linux"
    linux.mkdir()
    return linux


# ---- options -----------------------------------------------------------------------------------------


def test_options_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "x.config"
    file.write_text(
        '# why\n\nCONFIG_A=y\n  CONFIG_B=m \nCONFIG_N=64\nCONFIG_H=0xfF\nCONFIG_S="-a b"\n# CONFIG_OFF is not set\n'
    )
    wanted = {"A": "y", "B": "m", "N": "64", "H": "0xfF", "S": '"-a b"', "OFF": "n"}
    assert read_options(file) == {f"CONFIG_{name}": value for name, value in wanted.items()}


@pytest.mark.parametrize("line", ["CONFIG_A", "A=y", "CONFIG_A=yes", "CONFIG_A = y", "CONFIG_A=y CONFIG_B=y", "\x00"])
def test_what_is_no_option(tmp_path: Path, line: str) -> None:
    file = tmp_path / "x.config"
    file.write_text(f"CONFIG_B=y\n{line}\n")
    with pytest.raises(ConfigError, match=r"x\.config: line 2: .*must be CONFIG_X=VALUE") as caught:
        read_options(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x\.config: cannot be read: .*No such file"):
        read_options(tmp_path / "x.config")
    (tmp_path / "x.config").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"x\.config: cannot be read"):
        read_options(tmp_path / "x.config")


def test_what_the_debug_kernel_finds() -> None:
    """What issue and documentation promise, and what a guest cannot do without."""
    options = read_options(FRAGMENT)
    on = {name.removeprefix("CONFIG_") for name, value in options.items() if value in ("y", "m")}
    assert on >= {"KASAN_GENERIC", "PROVE_LOCKING", "DMA_API_DEBUG", "DMA_API_DEBUG_SG", "KCOV", "UBSAN_BOUNDS"}
    assert on >= {"FAULT_INJECTION", "FAULT_INJECTION_DEBUG_FS", "FAILSLAB", "FAIL_PAGE_ALLOC", "DEBUG_KMEMLEAK"}
    assert on >= {"DEBUG_INFO_DWARF_TOOLCHAIN_DEFAULT", "DEBUG_FS", "SERIAL_8250_CONSOLE", "BLK_DEV_INITRD"}
    assert options["CONFIG_LOCALVERSION"] == f'"{artifacts.DEBUG_RELEASE}"'
    lines = [line for line in FRAGMENT.read_text().splitlines() if "CONFIG_" in line and " only" not in line]
    assert len(lines) == len(options), "an option is there twice"


def test_an_option_that_is_not_taken() -> None:
    wanted = {"CONFIG_A": "y", "CONFIG_B": "m", "CONFIG_N": "64", "CONFIG_OFF": "n"}
    check_options(wanted, {"CONFIG_A": "y", "CONFIG_B": "m", "CONFIG_N": "64", "CONFIG_MORE": "y"})
    with pytest.raises(
        ArtifactError, match=r"not take CONFIG_A=y \(it is n\), CONFIG_B=m \(it is y\), CONFIG_OFF=n \("
    ):
        check_options(wanted, {"CONFIG_B": "y", "CONFIG_N": "64", "CONFIG_OFF": "y"})


# ---- before ------------------------------------------------------------------------------------------


def test_what_the_host_lacks(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    programs = ["gcc", "bc"]
    found = missing_packages(lambda name: name if name in programs else None, lambda name: name != "gelf.h")
    assert found == ["flex", "bison", "libelf-dev"]
    assert missing_packages(str, lambda name: True) == []
    monkeypatch.setattr(build_kernel, "missing_packages", lambda: found)
    assert build_kernel.main(["--yes"]) == 1
    said = capsys.readouterr().err
    assert said == "build-kernel: this host lacks what Linux is built with: apt-get install flex bison libelf-dev\n"


def test_nothing_is_there(tmp_path: Path) -> None:
    """$PATH is empty here."""
    assert missing_packages()[:4] == ["gcc", "flex", "bison", "bc"]


@pytest.mark.usefixtures("host")
def test_the_price_comes_first(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_kernel.main(["--dry-run", "--jobs", "2"]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f" minutes with 2 compilers at a time; a download of 153 MB; 3.6 GB in {cache} meanwhile (" in said
    assert not list(cache.glob("*"))


@pytest.mark.usefixtures("host")
def test_too_little_room(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: SimpleNamespace(free=2_000_000_000))
    assert build_kernel.main(["--yes"]) == 1
    assert f"needs 3.6 GB in {cache}, and 2.0 GB are free; make room" in capsys.readouterr().err


class Stdin(io.StringIO):
    def __init__(self, text: str, terminal: bool) -> None:
        super().__init__(text)
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


@pytest.mark.usefixtures("host")
@pytest.mark.parametrize(("stdin", "status"), [(Stdin("", False), 1), (Stdin("n\n", True), 0), (Stdin("", True), 0)])
def test_nobody_says_yes(
    stdin: Stdin, status: int, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    assert build_kernel.main([]) == status
    said = capsys.readouterr().err
    assert said.endswith("run it with --yes\n" if status else "go on? [y/N] ")
    assert not list(cache.glob("*"))


def test_jobs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_kernel.main(["--jobs", "0"])
    assert "--jobs 0: must be from 1 to 1024" in capsys.readouterr().err


# ---- the build ---------------------------------------------------------------------------------------


def test_a_build(
    source: Path, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin("y\n", True))
    assert build_kernel.main(["--jobs", "3"]) == 0, capsys.readouterr().err
    assert capsys.readouterr().err.endswith(f"build-kernel: {DEBUG_RELEASE} is there: --kernel debug\n")
    assert " -j3 bzImage modules\n" in (cache / "said").read_text()
    kernel = artifacts.find_kernel("debug")
    assert (kernel.release, kernel.image.read_text()) == (DEBUG_RELEASE, "arch/x86/boot/bzImage\n")
    assert kernel.modules and (kernel.modules / "modules.builtin").exists()
    headers = find_headers(kernel)
    assert headers.programs == cache / "gcc-14/usr/bin"
    assert (headers.folder / "scripts/modpost").exists() and not (headers.folder / "scripts/mod.o").exists()
    assert "override CC = x86_64-linux-gnu-gcc-14\n" in (headers.folder / ".kernelvariables").read_text()
    assert [folder / "x.ko" for folder in debug_modules(kernel)] == list(headers.folder.parents[2].rglob("x.ko"))
    assert debug_modules(artifacts.find_kernel("stable")) == []
    assert not source.exists(), "it is large"
    assert get_qemu.main(["--kernel", "debug", "--headers"]) == 0, "it is there, and needs no archive"
    # With the same options there is nothing to do; with others there is.
    capsys.readouterr()
    assert build_kernel.main([]) == 0
    assert capsys.readouterr().err == f"build-kernel: {DEBUG_RELEASE} is there with these options already\n"


def test_it_goes_on_from_where_it_was(source: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cache / "fail").touch()
    assert build_kernel.main(["--yes"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"build-kernel: make failed: x.c:1:2: error: no such thing; all of it is in {cache}/source/build.log"
    with pytest.raises(ArtifactError, match=r"no debug kernel in the cache; run scripts/build-kernel"):
        artifacts.find_kernel("debug")
    (cache / "fail").unlink()
    assert source.exists()
    assert build_kernel.main(["--yes", "--keep"]) == 0
    assert source.exists()


def test_more_options(source: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the user's file come last; one that Linux does not take is an error, before anything is compiled."""
    mine = tmp_path / "mine.config"
    mine.write_text("CONFIG_KCOV=n\nCONFIG_USB=m\n")
    assert build_kernel.main(["--yes", "--keep", "--config", str(mine)]) == 0
    config = read_options(next((cache / "kernel-debug/boot").glob("config-*")))
    assert (config["CONFIG_KCOV"], config["CONFIG_USB"], config["CONFIG_KASAN"]) == ("n", "m", "y")
    (cache / "said").unlink()
    mine.write_text("CONFIG_GONE=y\n")
    assert build_kernel.main(["--yes", "--config", str(mine)]) == 1
    assert "does not take CONFIG_GONE=y (it is n)" in capsys.readouterr().err
    assert "modules" not in (cache / "said").read_text()
    assert artifacts.find_kernel("debug").release == DEBUG_RELEASE, "the one before stays"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(number: signal.Signals, source: Path, cache: Path, tmp_path: Path) -> None:
    """make ends, too, and what it has made stays."""
    (cache / "wait").touch()
    code = (
        "import sys; from vmodel.guest import build_kernel as b; b.missing_packages = list; sys.exit(b.main(['--yes']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=REPO,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
    ) as process:
        until((cache / "waits").exists, "make runs")
        process.send_signal(number)
        _, said = process.communicate(timeout=60)  # the pipe ends with the last process that has it
    assert (process.returncode, source.exists()) == (130, True)
    assert said.endswith("build-kernel: interrupted; the same command goes on from there\n")


def test_complaints() -> None:
    assert complaint("  CC a.o\nld: cannot write: No space left on device\nmake: *** [x] Error 1\n").startswith("ld: ")
    assert complaint("/bin/sh: 1: bison: not found\nmake: *** [x] Error 127\n") == "/bin/sh: 1: bison: not found"
    assert complaint("  CC a.o\n") == "CC a.o"
    assert complaint("") == "it printed nothing"
    assert len(complaint("error " * 1000)) == 400


# ---- its name ----------------------------------------------------------------------------------------


def test_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    """All that takes a kernel's name says how it is made, in one line; it is never fetched."""
    for call in (
        lambda: artifacts.find_kernel("debug"),
        lambda: get_qemu.fetch(["debug"]),
        lambda: get_qemu.fetch(["stable"], headers=["debug"], refresh=True),
    ):
        with pytest.raises(
            ArtifactError, match=r"^no debug kernel in the cache; run scripts/build-kernel, which builds"
        ):
            call()
    assert get_qemu.main(["--kernel", "debug"]) == 1
    assert capsys.readouterr().err.startswith("get-qemu: no debug kernel in the cache; run scripts/build-kernel,")


def test_only_its_name_selects_it(cache: Path) -> None:
    """It is slow: nobody gets it for a version, or for no name at all."""
    cached(cache, "kernel-debug", release=DEBUG_RELEASE)
    assert artifacts.KERNEL_NAME.fullmatch("debug")
    assert artifacts.find_kernel("debug").release == DEBUG_RELEASE
    for name in (None, "6.12", "6.12.117"):
        with pytest.raises(
            ArtifactError, match=r"kernels there: debug .6\.12\.117-vmodel-debug\)\); run scripts/get-qemu"
        ):
            artifacts.find_kernel(name)


# ---- the source, and progress ------------------------------------------------------------------------


def inner(tmp_path: Path, members: dict[str, bytes]) -> bytes:
    file = tmp_path / "inner.tar.xz"
    with tarfile.open(file, "w:xz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.read_bytes()


def test_source_of_a_package(tmp_path: Path) -> None:
    data = inner(tmp_path, {"linux-source-6.12/Makefile": b"all:", "linux-source-6.12/kernel/fork.c": b"int x;"})
    deb = fake_deb(tmp_path, [("./usr/src/linux-source-6.12.tar.xz", data, 0o644), ("./usr/share/doc/x", b"x", 0o644)])
    debian.unpack_source(deb, tmp_path / "part" / "linux")
    assert (tmp_path / "part/linux/kernel/fork.c").read_bytes() == b"int x;"
    assert [path.name for path in (tmp_path / "part").iterdir()] == ["linux"]
    with pytest.raises(ArtifactError, match="no source of Linux"):
        debian.unpack_source(fake_deb(tmp_path, [("./usr/share/doc/x", b"x", 0o644)]), tmp_path / "other" / "linux")
    data = inner(tmp_path, {"linux-source-6.12/../../../evil": b"x"})
    deb = fake_deb(tmp_path, [("./usr/src/linux-source-6.12.tar.xz", data, 0o644)])
    with pytest.raises(tarfile.TarError):
        debian.unpack_source(deb, tmp_path / "third" / "linux")
    assert not list(tmp_path.rglob("evil"))


def test_progress_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of a CI job is not silent for half an hour, and has not a line for each file."""
    said: list[str] = []
    now = SimpleNamespace(time=0.0)
    monkeypatch.setattr("time.monotonic", lambda: now.time)
    with get_qemu.Steps(said.append, terminal=False).step("work") as show:
        for n in range(700):
            now.time = float(n)
            show(f"{n} of 700")
    assert said == ["work ... 301 of 700\n", "work ... 602 of 700\n", "work: 699 of 700, 699.0 s\n"]
