"""Finding and fetching QEMU, kernels and busybox: no network, no apt; what apt would say is given."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.packages.archive import RELEASE, RELEASES, REPO, URI, cached, fake_deb, fake_qemu, image
from vmodel.guest import artifacts, debian, get_qemu
from vmodel.guest.artifacts import ArtifactError
from vmodel.patience import patience

pytestmark = pytest.mark.usefixtures("cache")


# ---- finding -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("QEMU emulator version 11.1.3 (Debian 1:11.1.3+ds-1~bpo13+1)\nCopyright", (11, 1, 3)),
        ("QEMU emulator version 10.1.50 (v10.1.0-100-gabcdef)", (10, 1, 50)),
        ("QEMU emulator version 7.2", (7, 2)),
        ("no such thing 1.2", ()),
        ("", ()),
    ],
)
def test_version_of_qemu(text: str, version: tuple[int, ...]) -> None:
    assert artifacts.parse_qemu_version(text) == version


def test_nothing_found_names_the_command() -> None:
    for find in (artifacts.find_qemu, artifacts.find_busybox, artifacts.find_kernel):
        with pytest.raises(ArtifactError, match=r"run scripts/get-qemu$") as caught:
            find()
        assert "\n" not in str(caught.value)
    assert artifacts.find_kernels() == {}


def test_qemu_of_the_host_comes_before_the_cache(tmp_path: Path, cache: Path) -> None:
    part = cached(cache, "qemu", version="QEMU emulator version 11.1.3 (Debian)")
    own = fake_qemu(part / "qemu-system-x86_64", "11.1.3")
    assert artifacts.find_qemu() == artifacts.Qemu(own, (11, 1, 3))
    host = fake_qemu(tmp_path / "bin" / "qemu-system-x86_64", "10.1.0")
    assert artifacts.find_qemu() == artifacts.Qemu(host, (10, 1, 0))
    fake_qemu(host, "10.0.9")
    assert artifacts.find_qemu().path == own
    fake_qemu(host, "10.2.0", devices="vfio-pci")
    assert artifacts.find_qemu().path == own
    host.write_text("#!/bin/sh\nexit 1\n")
    assert artifacts.find_qemu().path == own
    shutil.rmtree(part)
    with pytest.raises(ArtifactError, match="does not run"):
        artifacts.find_qemu()


def test_a_chosen_qemu_is_used_or_refused(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is never replaced by another one in silence."""
    part = cached(cache, "qemu", version="QEMU emulator version 11.1.3")
    fake_qemu(part / "qemu-system-x86_64", "11.1.3")
    chosen = fake_qemu(tmp_path / "mine", "10.1.1")
    monkeypatch.setenv("VMODEL_QEMU", str(chosen))
    assert artifacts.find_qemu() == artifacts.Qemu(chosen, (10, 1, 1))
    for version, devices, text in (
        ("9.2.0", "vfio-user-pci", "older than 10.1"),
        ("10.1.0", "e1000", "without vfio-user-pci"),
        ("none", "", "does not look like QEMU"),
    ):
        fake_qemu(chosen, version, devices)
        with pytest.raises(ArtifactError, match=text):
            artifacts.find_qemu()
    chosen.unlink()
    with pytest.raises(ArtifactError, match=r"cannot be run .No such file"):
        artifacts.find_qemu()


@pytest.mark.parametrize("stamp", ["", "{", "[]", '"text"', "{}", "\xff"])
def test_a_spoilt_stamp_is_a_missing_part(cache: Path, stamp: str) -> None:
    for part in ("qemu", "busybox", "kernel-stable"):
        (cache / part).mkdir()
        (cache / part / "stamp.json").write_bytes(stamp.encode("latin-1"))
    fake_qemu(cache / "qemu" / "qemu-system-x86_64")
    assert get_qemu.missing_parts(["stable"]) == ["qemu", "busybox", "kernel-stable"]
    assert artifacts.find_kernels() == {}


def test_headers_and_compiler_of_a_cache_that_was_moved(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their scripts and Makefiles contain the cache's path: they are fetched again, and everything else stays."""
    apt: Any = SimpleNamespace(header_packages=lambda release: (["headers"], "14"))
    monkeypatch.setattr(get_qemu, "unpack_gcc", lambda *arguments: None)
    monkeypatch.setattr(get_qemu, "unpack_headers", lambda *arguments: None)
    cached(cache, "busybox")
    cached(cache, "kernel-stable", release=RELEASE)
    for part in get_qemu._headers_parts("stable", RELEASE, apt):
        cached(cache, part.name, **part.unpack([], cache))
    assert get_qemu.missing_parts(["stable"], headers=["stable"]) == ["qemu"]
    moved = cache.parent.rename(cache.parent.with_name("moved"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(moved))
    assert get_qemu.missing_parts(["stable"], headers=["stable"]) == ["qemu", "headers-stable"]
    assert not get_qemu._is_current("gcc-14", "p")


def test_kernels_by_name(cache: Path) -> None:
    cloud = "6.12.117+deb13-cloud-amd64"
    for name, release in {**RELEASES, "cloud": cloud, "6.6": "6.6.9-amd64", "10.1": "10.1.0-amd64"}.items():
        cached(cache, f"kernel-{name}", release=release)
    (cache / "kernel-9.9").mkdir()  # without a stamp: not there
    assert list(artifacts.find_kernels()) == ["6.6", "stable", "cloud", "backports", "10.1"]
    kernel = artifacts.find_kernels()["stable"]
    assert (kernel.release, kernel.version) == (RELEASE, (6, 12))
    assert kernel.image == cache / "kernel-stable" / "boot" / f"vmlinuz-{RELEASE}"
    assert kernel.modules == cache / "kernel-stable" / "lib" / "modules" / RELEASE
    for name in ("stable", "6.12", "6.12.107", None):
        assert artifacts.find_kernel(name) == kernel
    assert artifacts.find_kernel("backports").release == artifacts.find_kernel("7.2").release == RELEASES["backports"]
    assert artifacts.find_kernel("cloud").release == artifacts.find_kernel("6.12-cloud").release == cloud
    for name in ("6.1", "6.12.10", "6.13", "2", "", "bogus", "7.2-cloud"):
        with pytest.raises(ArtifactError, match=r"there: 6.6 .6.6.9-amd64., stable .6.12.107.*; run scripts/get-qemu"):
            artifacts.find_kernel(name)


def test_a_cache_of_before_roles_serves(cache: Path) -> None:
    """Its folders have versions for names: those and no role find them; a role is fetched beside them."""
    for name, release in (("6.12", RELEASE), ("7.2", "7.2.12+deb13-amd64"), ("6.12-cloud", "6.12.107-cloud-amd64")):
        cached(cache, f"kernel-{name}", release=release)
    assert artifacts.find_kernel().release == RELEASE
    assert artifacts.find_kernel("7.2").release == "7.2.12+deb13-amd64"
    with pytest.raises(ArtifactError, match=r"no kernel backport in the cache .*; did you mean backports\?$"):
        artifacts.find_kernel("backport")
    with pytest.raises(ArtifactError, match=r"no kernel stable in the cache .*; run scripts/get-qemu --kernel stable$"):
        artifacts.find_kernel("stable")
    assert "kernel-stable" in get_qemu.missing_parts(["stable", "6.12"])
    cached(cache, "kernel-stable", release="6.12.120+deb13-amd64")
    assert artifacts.find_kernel("6.12").release == artifacts.find_kernel().release == "6.12.120+deb13-amd64"
    assert artifacts.find_kernel("6.12.107").release == RELEASE


def test_kernel_by_path(tmp_path: Path) -> None:
    path = image(tmp_path / "boot" / "mine")
    assert artifacts.find_kernel(str(path)) == artifacts.Kernel(RELEASE, path, None)
    modules = tmp_path / "lib" / "modules" / RELEASE
    modules.mkdir(parents=True)
    assert artifacts.find_kernel(path).modules == modules
    for data, text in ((b"", "is not a Linux bzImage"), (b"\0" * 600, "is not a Linux bzImage")):
        path.write_bytes(data)
        with pytest.raises(ArtifactError, match=f"mine: {text}"):
            artifacts.find_kernel(path)
    image(path, "")
    path.write_bytes(path.read_bytes().replace(b" (builder) #1 SMP", b" " * 17))
    with pytest.raises(ArtifactError, match="without a version"):
        artifacts.find_kernel(path)
    path.write_bytes(path.read_bytes()[:0x210])
    with pytest.raises(ArtifactError, match="without a version"):
        artifacts.find_kernel(path)
    with pytest.raises(ArtifactError, match="cannot read the kernel: No such file"):
        artifacts.find_kernel(tmp_path / "gone")


def test_cache_folder() -> None:
    assert artifacts.cache_dir({"XDG_CACHE_HOME": "/x/y"}) == Path("/x/y/vmodel")
    for unset in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative/is/ignored"}):
        assert artifacts.cache_dir(unset) == Path("~/.cache/vmodel").expanduser()


# ---- the script --------------------------------------------------------------------------------------


def whole_cache(cache: Path) -> None:
    fake_qemu(cached(cache, "qemu", version="QEMU emulator version 11.1.3") / "qemu-system-x86_64")
    cached(cache, "busybox")
    for name, release in RELEASES.items():
        cached(cache, f"kernel-{name}", release=release)


def test_a_second_run_needs_no_apt(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole_cache(cache)
    before = sorted(cache.rglob("*"))
    assert get_qemu.main([]) == 0
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(
        f"get-qemu: QEMU 11.1.3 at {cache}/qemu/qemu-system-x86_64; kernels {RELEASE}, {RELEASES['backports']}\n"
    )
    assert get_qemu.main(["--print"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"qemu={cache}/qemu/qemu-system-x86_64\nqemu-version=11.1.3\n" in out
    assert f"kernel-backports={cache}/kernel-backports/boot/vmlinuz-{RELEASES['backports']}\n" in out
    assert sorted(cache.rglob("*")) == before, "not even a lock file"
    assert get_qemu.missing_parts(["stable", "6.12", "7", "6.6", "6.6", "cloud"]) == ["kernel-6.6", "kernel-cloud"]
    assert get_qemu.missing_parts(["stable"], refresh=True) == ["qemu", "busybox", "kernel-stable"]


def test_no_apt_is_one_line(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert get_qemu.main([]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"get-qemu: no apt-get on this host: install QEMU >= 10\.1 [^\n]*\n", err)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert get_qemu.main([]) == 1
    assert "does not run on aarch64" in capsys.readouterr().err


def test_no_debian_archive_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "output", lambda argv: "Ubuntu|http://u.example/ubuntu/|noble|main\n")
    monkeypatch.setattr(debian, "TEMPLATE", template := tmp_path / "Debian.info")
    for text in (None, "ChangelogURI: http://c.example/\n", b"\xff"):
        if text is not None:
            template.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ArtifactError, match=r"python-apt-common.* scripts/get-qemu --mirror URI$"):
            debian.host_mirror()


def test_ubuntu_knows_debians_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its package python-apt-common, in whose file this is the entry of one release."""
    monkeypatch.setattr(debian, "output", lambda argv: "Ubuntu|http://u.example/ubuntu/|noble|main\n")
    monkeypatch.setattr(debian, "TEMPLATE", template := tmp_path / "Debian.info")
    template.write_text(
        "ChangelogURI: https://c.example/%s\n\nSuite: sid\nBaseURI: https://d.example/debian/\nMatchURI: x\n"
    )
    assert debian.host_mirror() == "https://d.example/debian/"


def test_a_failed_fetch_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk or Ctrl-C in the middle; what a killed run left goes with the next one."""
    (cache / "tmp-left" / "x").mkdir(parents=True)

    failures: list[BaseException] = []

    def fail(parts: list[str], work: Path, *rest: object) -> None:
        (work / "half").mkdir()
        raise failures[-1]

    monkeypatch.setattr(get_qemu, "_fetch_parts", fail)
    monkeypatch.setattr(get_qemu, "check_host", lambda: Path("/k.gpg"))
    for failure, status in ((OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)):
        failures.append(failure)
        assert get_qemu.main(["--mirror", URI]) == status
        assert [path.name for path in cache.iterdir()] == ["lock"]


def test_print_fetches_nothing(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert get_qemu.main(["--print"]) == 1
    assert list(cache.iterdir()) == []
    whole_cache(cache)
    assert get_qemu.main(["--print", "--kernel", "7.2", "--kernel", "stable"]) == 0
    keys = [line.partition("=")[0] for line in capsys.readouterr().out.splitlines()]
    assert keys == ["qemu", "qemu-version", "busybox", "kernel-7.2", "modules-7.2", "kernel-stable", "modules-stable"]


def test_iasl_is_for_who_asks(tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole_cache(cache)
    assert get_qemu.missing_parts(artifacts.KERNELS) == []
    assert get_qemu.missing_parts(artifacts.KERNELS, optional=["iasl"]) == ["iasl"]
    with pytest.raises(ArtifactError, match=r"no iasl found; run scripts/get-qemu --iasl$"):
        artifacts.find_iasl()
    assert get_qemu.main(["--print", "--iasl"]) == 1
    assert capsys.readouterr().out == ""
    cached(cache, "iasl", version="20250404")
    assert get_qemu.missing_parts(artifacts.KERNELS, optional=["iasl"]) == []
    assert get_qemu.missing_parts([], refresh=True, optional=["iasl"])[-1] == "iasl"
    assert get_qemu.main(["--print", "--iasl"]) == 0
    assert f"\niasl={cache}/iasl/iasl\n" in capsys.readouterr().out
    host = fake_qemu(tmp_path / "bin" / "iasl")
    assert artifacts.find_iasl() == host, "the host's comes first"


def test_all_is_what_the_tests_need(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[str] = []
    monkeypatch.setattr(get_qemu, "_fetch_parts", lambda parts, *rest: wanted.extend(parts))
    monkeypatch.setattr(get_qemu, "check_host", lambda: Path("/k.gpg"))
    assert get_qemu.main(["--all", "--mirror", URI]) == 1, "nothing has come"
    kernels = ["kernel-stable", "kernel-backports", "kernel-cloud"]
    tools = [f"tool-{package}" for package in get_qemu.TEST_TOOLS]
    assert wanted == ["qemu", "busybox", *kernels, "headers-stable", "headers-backports", *tools, *get_qemu.OPTIONAL]


@pytest.mark.parametrize(
    ("loader", "outcome"),
    [
        ("echo 'ASL+ Optimizing Compiler/Disassembler version 20250404'", "20250404"),
        ("echo something else", "does not look like iasl"),
        ("exit 3", "does not run here"),
    ],
)
def test_unpacking_iasl(tmp_path: Path, loader: str, outcome: str) -> None:
    """Its own loader runs it, given the libraries that came with it."""
    script = f'#!/bin/sh\n[ "${{5##*/root/}} $6" = "usr/bin/iasl -v" ] || exit 9\n{loader}\n'.encode()
    members: list[tuple[str, bytes | str, int]] = [
        ("./usr/bin/iasl", b"program", 0o755),
        ("./usr/bin/acpidump", b"not wanted", 0o755),
        (f"./{debian.LIBS}/ld-linux-x86-64.so.2", script, 0o755),
        (f"./{debian.LIBS}/libc.so.6", b"library", 0o644),
    ]
    deb, folder = fake_deb(tmp_path, members), tmp_path / "iasl"
    for tool in ("dirname", "readlink"):
        (tmp_path / "bin" / tool).symlink_to(f"/usr/bin/{tool}")
    if outcome.isdigit():
        assert debian.unpack_iasl([deb], folder) == outcome
    else:
        with pytest.raises(ArtifactError, match=outcome):
            debian.unpack_iasl([deb], folder)
    assert sorted(path.name for path in (folder / "root").rglob("*") if path.is_file()) == [
        "iasl",
        "ld-linux-x86-64.so.2",
        "libc.so.6",
    ]


def fake_browser(tmp_path: Path, says: str, loader: str = "/lib64/ld-linux-x86-64.so.2") -> Path:
    """A package of a "Chromium" that says which loader it names, and where it was started."""
    program = f"#!/bin/sh\n# {loader}\0\n{says}\n".encode()
    members: list[tuple[str, bytes | str, int]] = [
        ("./usr/lib/chromium/chromium-headless-shell", program, 0o755),
        ("./usr/lib/chromium/chrome_crashpad_handler", b"not wanted", 0o755),
        (f"./{debian.LIBS}/libLLVM.so.19", b"not wanted", 0o644),
        (f"./{debian.LIBS}/libnss3.so", b"library", 0o644),
        ("./usr/share/fonts/truetype/sans.ttf", b"font", 0o644),
        ("./usr/share/doc/chromium", b"not wanted", 0o644),
    ]
    for tool in ("dirname", "readlink"):
        (tmp_path / "bin" / tool).symlink_to(f"/usr/bin/{tool}")
    return fake_deb(tmp_path, members)


def test_unpacking_a_browser(tmp_path: Path) -> None:
    """It is started in the folder of its libraries, and names the loader there."""
    says = '[ "$PWD" = "${LD_LIBRARY_PATH%%:*}" ] && [ -f libnss3.so ] && echo "Chromium 150.0.1.2 $*"'
    deb, folder = fake_browser(tmp_path, says), tmp_path / "browser"
    assert debian.unpack_browser([deb], folder) == "150.0.1.2"
    assert sorted(path.name for path in (folder / "root").rglob("*") if path.is_file()) == [
        "chromium-headless-shell",
        "fonts.conf",
        "libnss3.so",
        "sans.ttf",
    ]
    program = (folder / "root/usr/lib/chromium/chromium-headless-shell").read_bytes()
    assert b"# ld-linux-x86-64.so.2\0\0\0\0\0\0\0\0\n" in program
    folder.rename(tmp_path / "moved")
    assert "--version" in artifacts.output([str(tmp_path / "moved" / "chromium-headless-shell"), "--version"])


@pytest.mark.parametrize(
    ("says", "loader", "outcome"),
    [
        ("echo something else", "/lib64/ld-linux-x86-64.so.2", "does not look like Chromium"),
        ("exit 3", "/lib64/ld-linux-x86-64.so.2", "does not run here"),
        ("exit 0", "/lib/ld-musl.so", "the expected loader"),
    ],
)
def test_a_browser_that_does_not_run(tmp_path: Path, says: str, loader: str, outcome: str) -> None:
    with pytest.raises(ArtifactError, match=outcome):
        debian.unpack_browser([fake_browser(tmp_path, says, loader)], tmp_path / "browser")


def test_the_browser_is_for_who_asks(tmp_path: Path, cache: Path) -> None:
    assert get_qemu.missing_parts([], optional=["browser"])[-1] == "browser"
    with pytest.raises(ArtifactError, match=r"no Chromium found; run scripts/get-qemu --browser$"):
        artifacts.find_browser()
    cached(cache, "browser", version="150.0.1.2")
    assert artifacts.find_browser() == cache / "browser" / "chromium-headless-shell"
    host = fake_qemu(tmp_path / "bin" / "chromium")
    assert artifacts.find_browser() == host, "the host's comes first"


def fake_clang(tmp_path: Path, says: str, builds: bool = True) -> Path:
    """A package of a "clang" that is started by its "loader", with the program's path last before its arguments."""
    home = f"./usr/lib/llvm-{debian.CLANG}"
    loader = '#!/bin/sh\nshift 4\nexec "$@"\n'
    program = f'#!/bin/sh\ncase $* in *--version) {says} ;; *fuzzer*) exit {int(not builds)} ;; *) echo "$@" ;; esac\n'
    members: list[tuple[str, bytes | str, int]] = [
        (f"{home}/bin/clang", program.encode(), 0o755),
        (f"./{debian.LIBS}/ld-linux-x86-64.so.2", loader.encode(), 0o755),
        (f"./{debian.LIBS}/libc.so", b"script", 0o644),
        ("./usr/include/stdio.h", b"header", 0o644),
        ("./usr/include/c++/14/vector", b"not wanted", 0o644),
        ("./usr/bin/x86_64-linux-gnu-ld.bfd", b"#!/bin/sh\necho linker", 0o755),
        ("./usr/bin/x86_64-linux-gnu-addr2line", b"#!/bin/sh\necho lines", 0o755),
        ("./usr/bin/strip", b"not wanted", 0o755),
    ]
    for tool in ("dirname", "readlink"):
        (tmp_path / "bin" / tool).symlink_to(f"/usr/bin/{tool}")
    return fake_deb(tmp_path, members)


def test_unpacking_clang(tmp_path: Path) -> None:
    """Options name its own headers, libraries and linker, but not when it starts itself again."""
    deb, folder = fake_clang(tmp_path, "echo Debian clang version 19.1.7"), tmp_path / "clang"
    folder.mkdir()
    assert debian.unpack_clang([deb], folder) == "19.1.7"
    assert sorted(path.name for path in (folder / "root").rglob("*") if path.is_file() and not path.is_symlink()) == [
        "clang",
        "ld-linux-x86-64.so.2",
        "libc.so",
        "stdio.h",
        "x86_64-linux-gnu-addr2line",
        "x86_64-linux-gnu-ld.bfd",
    ]
    folder = folder.rename(tmp_path / "moved")
    assert f"--sysroot={folder}/root" in artifacts.output([str(folder / "clang"), "-c", "x.c"])
    assert artifacts.output([str(folder / "clang"), "-cc1", "x.c"]) == "-cc1 x.c\n"


@pytest.mark.parametrize(("says", "builds"), [("exit 3", True), ("echo nothing", True), ("echo version 19.1", False)])
def test_a_clang_that_does_not_serve(tmp_path: Path, says: str, builds: bool) -> None:
    (tmp_path / "clang").mkdir()
    with pytest.raises(ArtifactError, match=r"clang does not run|builds no fuzz targets"):
        debian.unpack_clang([fake_clang(tmp_path, says, builds)], tmp_path / "clang")


def test_clang_is_for_who_asks(tmp_path: Path, cache: Path) -> None:
    assert get_qemu.missing_parts([], optional=["clang"])[-1] == "clang"
    with pytest.raises(ArtifactError, match=r"no clang with libFuzzer found; run scripts/get-qemu --clang$"):
        artifacts.find_clang()
    cached(cache, "clang", version="19.1.7")
    assert artifacts.find_clang() == cache / "clang" / "clang"
    host = tmp_path / "bin" / "clang"
    host.write_text("#!/bin/sh\nexit 1\n")
    host.chmod(0o755)
    assert artifacts.find_clang() == cache / "clang" / "clang", "the host's has no libFuzzer"
    host.write_text("#!/bin/sh\nexit 0\n")
    assert artifacts.find_clang() == host, "the host's comes first"


@pytest.mark.parametrize("name", ["", "6", "../6.12", "6.12;x", "6.12 7.2", "latest"])
def test_bad_kernel_names(name: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        get_qemu.main(["--kernel", name])


def test_progress_lines() -> None:
    for terminal in (False, True):
        text: list[str] = []
        steps = get_qemu.Steps(text.append, terminal)
        with steps.step("work") as show:
            show("1 of 2 MB")
            show("2 MB")
        with pytest.raises(ValueError), steps.step("more"):
            raise ValueError
        last = "".join(text).split("\n")[0].rpartition("\r\033[K")[2]
        assert re.fullmatch(r"work: 2 MB, \d\.\d s", last)
        assert ("\r" in "".join(text)) == terminal
        assert "more:" not in "".join(text), "a failed step is not reported as done"


def test_the_fetcher_needs_no_shim(cache: Path) -> None:
    """It repairs hosts on which the compiled part does not load."""
    whole_cache(cache)
    code = (
        "import sys; sys.modules['vmodel._vmshim'] = None; import vmodel.guest.get_qemu as m; m.main(['--print']);"
        "print([n for n in sys.modules if n == 'vmodel._shim' or 'cffi' in n])"
    )
    environ = {"XDG_CACHE_HOME": str(cache.parent), "PATH": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environ, cwd="/", capture_output=True, text=True, timeout=patience(60)
    )
    assert done.stdout.endswith("\n[]\n"), done.stderr
    assert os.access(REPO / "scripts" / "get-qemu", os.X_OK)
