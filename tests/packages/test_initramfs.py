"""initramfs: the archive is read back by a reader of its own."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from tests.packages.cpio import read_back
from tests.packages.module_files import elf, kernel_with
from tests.packages.program_files import elf as program_elf
from vmodel.errors import ConfigError
from vmodel.guest import initramfs
from vmodel.guest.artifacts import ArtifactError
from vmodel.guest.initramfs import Cpio, build
from vmodel.guest.shares import Share
from vmodel.guest.tools import LOADER

# ---- cpio --------------------------------------------------------------------------------------------


def test_every_kind_of_entry_and_every_padding() -> None:
    archive = Cpio()
    for size in range(9):
        archive.file(f"/a/{'n' * (size + 1)}", bytes(range(size)), 0o640)
    archive.folder("a")
    archive.folder("empty/deep/")
    archive.link("bin/sh", "busybox")
    archive.node("dev/console", 5, 1)
    found = read_back(archive.finish())
    for size in range(9):
        entry = found[f"a/{'n' * (size + 1)}"]
        assert (entry.mode, entry.data) == (stat.S_IFREG | 0o640, bytes(range(size)))
    assert found["empty/deep"].mode == stat.S_IFDIR | 0o755
    assert (found["bin/sh"].mode, found["bin/sh"].data) == (stat.S_IFLNK | 0o777, b"busybox")
    assert (found["dev/console"].mode, found["dev/console"].device) == (stat.S_IFCHR | 0o600, (5, 1))


def test_names_are_utf8_and_slashes_are_tidied() -> None:
    archive = Cpio()
    archive.file("//etc//./größe", b"x")
    assert list(read_back(archive.finish())) == ["etc", "etc/größe"]


@pytest.mark.parametrize("path", ["", "/", ".", "../x", "a/../../x", "a\0b", "n" * 4096])
def test_paths_that_cannot_be(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot be the path of a file"):
        Cpio().file(path, b"")


def test_a_path_is_taken_once() -> None:
    archive = Cpio()
    archive.file("a/b", b"")
    for taken in ("a/b", "/a//b", "a"):
        with pytest.raises(ConfigError, match="twice"):
            archive.file(taken, b"")
    with pytest.raises(ConfigError, match="a file and a folder"):
        archive.file("a/b/c", b"")


# ---- the whole ---------------------------------------------------------------------------------------


@pytest.fixture
def busybox(tmp_path: Path) -> Path:
    path = tmp_path / "busybox"
    path.write_bytes(b"ELF, so to speak")
    return path


def test_build(tmp_path: Path, busybox: Path) -> None:
    kernel = kernel_with(
        tmp_path / "modules",
        {"nvme.ko": elf(depends="nvme-core"), "nvme-core.ko": elf(depends="auth"), "auth.ko": elf(), "x.ko": elf()},
    )
    tool = tmp_path / "tool"
    tool.write_bytes(b"\0\1")
    tool.chmod(0o751)
    command = ["sh", "-c", "echo 'it''s' \"$HOME\"; exit 3", ""]
    found = read_back(build(kernel, busybox, command, ["nvme"], [tool, (tool, "/opt/t")], ["x", "nvme"]))
    assert stat.S_ISDIR(found["proc"].mode)
    assert found["bin/busybox"].mode == stat.S_IFREG | 0o755
    assert found["bin/sh"].data == b"/bin/busybox"
    assert found["dev/console"].device == (5, 1)
    for place in ("root/tool", "opt/t"):
        assert (found[place].mode, found[place].data) == (stat.S_IFREG | 0o751, b"\0\1")
    assert found["vmodel-command"].data == b"""sh -c 'echo '"'"'it'"'"''"'"'s'"'"' "$HOME"; exit 3' ''\n"""
    init = found["init"].data.decode()
    assert found["init"].mode & 0o111
    assert "load auth\nload nvme_core\nload nvme\ncd /root" in init, "loaded: in order; extra ones: not"
    assert "{" not in re.sub(r"(finish|load|own|gdb|share)\(\) {|\${\w+##\*/}", "", init)
    # modprobe loads a line's names from its end to its start.
    assert found["lib/modules/9.9-test/modules.dep"].data.decode().splitlines() == [
        "auth.ko:",
        "nvme_core.ko: auth.ko",
        "nvme.ko: nvme_core.ko auth.ko",
        "x.ko:",
    ]
    assert found["lib/modules/9.9-test/x.ko"].data == elf()


def test_a_script_is_taken_as_it_is(tmp_path: Path, busybox: Path) -> None:
    """Also if it, or a path, is no UTF-8, as any word on a command line may be."""
    script = "echo $((1 + 1)) {a} %s\n# ünï \udcff"
    share = Share(tmp_path, "/\udcff")
    kernel = kernel_with(tmp_path / "m", {"9p.ko": elf(), "9pnet_virtio.ko": elf()})
    found = read_back(build(kernel, busybox, script, shares=[share]))
    assert found["vmodel-command"].data == os.fsencode(script) + b"\n"
    assert b"'/\xff'" in found["init"].data


@pytest.mark.parametrize("target", ["init", "/init", "bin/busybox", "vmodel-command", "bin", "init/x", "../x", ""])
def test_files_do_not_replace_the_harness(tmp_path: Path, busybox: Path, target: str) -> None:
    with pytest.raises(ConfigError):
        build(kernel_with(tmp_path / "m", {}), busybox, ["true"], files=[(busybox, target)])


def test_a_folder_is_copied(tmp_path: Path, busybox: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all files and empty folders; a link to a file is the file, as what it leads to may be outside."""
    source = tmp_path / "tests"
    (source / "sub" / "empty").mkdir(parents=True)
    (source / "sub" / "run").write_text("#!/bin/sh\n")
    (source / "sub" / "run").chmod(0o755)
    (source / "outside").symlink_to(busybox)
    (source / "gone").symlink_to("nowhere")
    (source / "again").symlink_to("sub")
    kernel = kernel_with(tmp_path / "m", {})
    found = read_back(build(kernel, busybox, "true", files=[source, (source / "sub", "/opt/s")]))
    assert (found["root/tests/sub/run"].mode, found["opt/s/run"].data) == (stat.S_IFREG | 0o755, b"#!/bin/sh\n")
    assert stat.S_ISDIR(found["root/tests/sub/empty"].mode) and stat.S_ISDIR(found["opt/s/empty"].mode)
    assert found["root/tests/outside"].data == busybox.read_bytes()
    for name, target in (("gone", b"nowhere"), ("again", b"sub")):
        assert (found[f"root/tests/{name}"].mode, found[f"root/tests/{name}"].data) == (stat.S_IFLNK | 0o777, target)
    monkeypatch.setattr(initramfs, "_LARGEST_FOLDER", 8)
    with pytest.raises(ConfigError, match=r"tests: has more than .*: share it instead"):
        build(kernel, busybox, "true", files=[source])
    os.mkfifo(source / "fifo")
    with pytest.raises(ConfigError, match="fifo: cannot be copied into the guest: not a file"):
        build(kernel, busybox, "true", files=[(source, "x")])


def test_programs_that_cannot_run(tmp_path: Path, busybox: Path) -> None:
    """One line says what a dynamic program lacks, instead of the shell's "not found"."""
    program, library = tmp_path / "program", tmp_path / "libmine.so.1"
    program.write_bytes(program_elf("libmine.so.1", loader=f"/{LOADER}"))
    library.write_bytes(program_elf())
    kernel = kernel_with(tmp_path / "m", {})
    lacks = f"program: needs the loader /{LOADER}, which is not in the guest: link it with -static"
    with pytest.raises(ConfigError, match=lacks):
        build(kernel, busybox, "true", files=[program])
    loader = (library, LOADER)
    with pytest.raises(ConfigError, match=r"program: needs the library libmine.so.1, which is not in the guest"):
        build(kernel, busybox, "true", files=[program, loader])
    build(kernel, busybox, "true", files=[program, loader, (library, "opt/libmine.so.1")])
    program.write_bytes(program_elf("libmine.so.1", loader=f"/{LOADER}")[:90])  # damaged: the guest's business
    build(kernel, busybox, "true", files=[program])


def test_shares_are_mounted_before_modules_are_loaded(tmp_path: Path, busybox: Path) -> None:
    nine = {"9p.ko": elf(depends="9pnet"), "9pnet.ko": elf(), "9pnet_virtio.ko": elf(depends="9pnet"), "x.ko": elf()}
    kernel = kernel_with(tmp_path / "modules", nine)
    shares = [Share(tmp_path, "/root/my tests"), Share(tmp_path, "/opt/w", writable=True)]
    found = read_back(build(kernel, busybox, "true", ["x"], shares=shares))
    init = found["init"].data.decode().splitlines()
    at = init.index("load 9pnet_virtio")
    assert init[at + 1] == "load 9p" and init[at + 4] == "load x"
    assert re.fullmatch(r"share share0 '/root/my tests' ro,trans=virtio,\S+", init[at + 2])
    assert re.fullmatch(r"share share1 /opt/w rw,trans=virtio,\S+", init[at + 3])
    assert b"9p.ko: 9pnet.ko\n" in found["lib/modules/9.9-test/modules.dep"].data
    with pytest.raises(ConfigError, match=r"would both be /opt/w in the guest"):
        build(kernel, busybox, "true", shares=[shares[1], shares[1]])
    with pytest.raises(ArtifactError, match=r"^kernel 9.9-test has no module '9p', which a shared folder needs; "):
        build(kernel_with(tmp_path / "m", {"x.ko": elf()}), busybox, "true", shares=shares)
    builtin = kernel_with(tmp_path / "b", {}, "kernel/fs/9p/9p.ko\nkernel/net/9p/9pnet_virtio.ko\n")
    assert b"load 9p\n" in read_back(build(builtin, busybox, "true", shares=shares))["init"].data


def test_missing_files(tmp_path: Path, busybox: Path) -> None:
    kernel = kernel_with(tmp_path / "m", {})
    with pytest.raises(ConfigError, match="gone: cannot be copied into the guest: No such file"):
        build(kernel, busybox, ["true"], files=[tmp_path / "gone"])
    with pytest.raises(ConfigError, match="nobusybox"):
        build(kernel, tmp_path / "nobusybox", ["true"])
