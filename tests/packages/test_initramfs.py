"""initramfs: the archive is read back by a reader of its own; modules are ELF files made here."""

from __future__ import annotations

import gzip
import lzma
import shutil
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest

from vmodel.errors import ConfigError
from vmodel.guest.artifacts import ArtifactError, Kernel
from vmodel.guest.initramfs import Cpio, build, load_module, modinfo, modules_in_order


@dataclass
class Entry:
    mode: int
    data: bytes
    device: tuple[int, int]


def read_back(archive: bytes) -> dict[str, Entry]:
    """A reader of "newc" that knows nothing of the writer; it asserts what the kernel's unpacker relies on."""
    found: dict[str, Entry] = {}
    inodes = set()
    at = 0
    while True:
        assert at % 4 == 0
        head = archive[at : at + 110]
        assert head[:6] == b"070701"
        fields = [int(head[6 + 8 * i : 14 + 8 * i], 16) for i in range(13)]
        inode, mode, _, _, links, _, size, _, _, major, minor, name_size, _ = fields
        raw = archive[at + 110 : at + 110 + name_size]
        assert raw[-1:] == b"\0"
        assert b"\0" not in raw[:-1]
        at = (at + 110 + name_size + 3) & ~3
        data = archive[at : at + size]
        assert len(data) == size
        at = (at + size + 3) & ~3
        name = raw[:-1].decode()
        if name == "TRAILER!!!":
            assert archive[at:] == b""
            return found
        assert name not in found
        assert inode not in inodes
        assert links == 1
        parent = name.rpartition("/")[0]
        assert not parent or stat.S_ISDIR(found[parent].mode), "a folder has to come before what is in it"
        inodes.add(inode)
        found[name] = Entry(mode, data, (major, minor))


def elf(**info: str | list[str]) -> bytes:
    """A minimal ELF64 with a .modinfo section."""
    pairs = [
        (key, value) for key, values in info.items() for value in ([values] if isinstance(values, str) else values)
    ]
    text = b"".join(f"{key}={value}".encode() + b"\0" for key, value in pairs)
    names = b"\0.modinfo\0.shstrtab\0"
    head = b"\x7fELF\2\1\1".ljust(16, b"\0") + struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, 64, 0, 64, 0, 0, 64, 3, 2)
    body = 64 + 3 * 64

    def section(name: int, offset: int, size: int) -> bytes:
        return struct.pack("<IIQQQQIIQQ", name, 1, 0, 0, offset, size, 0, 0, 1, 0)

    table = bytes(64) + section(1, body, len(text)) + section(10, body + len(text), len(names))
    return head + table + text + names


def kernel_with(folder: Path, modules: dict[str, bytes], builtin: str = "") -> Kernel:
    for name, data in modules.items():
        path = folder / "kernel" / "drivers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    folder.mkdir(exist_ok=True)
    (folder / "modules.builtin").write_text(builtin)
    return Kernel("9.9-test", folder / "vmlinuz", folder)


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


# ---- modules -----------------------------------------------------------------------------------------


def test_dependencies_first_and_builtin_left_out(tmp_path: Path) -> None:
    kernel = kernel_with(
        tmp_path,
        {
            "top-dog.ko": elf(depends="mid-a,mid_b", softdep="pre: helper no-such-module post: later"),
            "mid-a.ko.xz": lzma.compress(elf(depends="base,core")),
            "mid_b.ko.gz": gzip.compress(elf(depends="base")),
            "base.ko": elf(license="GPL"),
            "helper.ko": elf(depends=""),
            "later.ko": elf(depends=""),
        },
        builtin="kernel/lib/core.ko\n",
    )
    for name in ("top_dog", "top-dog"):
        assert [found for found, _ in modules_in_order(kernel, [name])] == [
            "base",
            "mid_a",
            "mid_b",
            "helper",
            "top_dog",
        ]
    assert [found for found, _ in modules_in_order(kernel, ["mid_b", "top_dog", "mid_b"])][:2] == ["base", "mid_b"]
    assert modules_in_order(kernel, ["core"]) == []
    assert dict(modules_in_order(kernel, ["mid-a"]))["mid_a"] == elf(depends="base,core")


def test_depends_is_read_from_modinfo_alone(tmp_path: Path) -> None:
    """The same text elsewhere in the file means nothing."""
    data = elf(depends="") + b"\0depends=nothing_such\0"
    assert [name for name, _ in modules_in_order(kernel_with(tmp_path, {"m.ko": data}), ["m"])] == ["m"]


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    kernel = kernel_with(
        tmp_path,
        {
            "a.ko": elf(depends="b"),
            "b.ko": elf(depends="a"),
            "orphan.ko": elf(depends="gone"),
            "junk.ko": b"not an ELF file",
            "short.ko": elf(depends="")[:70],
            "odd.ko.lzo": b"",
            "torn.ko.xz": lzma.compress(elf())[:-9],
        },
    )
    for name, text in {
        "a": "depend on each other: a > b > a",
        "orphan": "no module 'gone' .needed by orphan.",
        "nowhere": "no module 'nowhere'$",
        "junk": "junk.ko: not an ELF file",
        "short": "short.ko: not an ELF file",
        "odd": r"odd.ko.lzo: unknown compression .lzo",
        "torn": "torn.ko.xz: cannot be read",
    }.items():
        with pytest.raises(ArtifactError, match=text):
            modules_in_order(kernel, [name])


def test_a_kernel_without_modules(tmp_path: Path) -> None:
    kernel = Kernel("1.0", tmp_path / "bzImage", None)
    assert modules_in_order(kernel, []) == []
    with pytest.raises(ArtifactError, match="has no modules beside"):
        modules_in_order(kernel, ["x"])


def test_modinfo_of_every_truncation_ends() -> None:
    whole = elf(depends="x", alias=["a", "b"])
    assert list(modinfo(whole)) == [("depends", "x"), ("alias", "a"), ("alias", "b")]
    for size in range(len(whole)):
        try:
            list(modinfo(whole[:size]))
        except ValueError:
            continue


def test_zstd_without_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.ko.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ArtifactError, match="install the program zstd"):
        load_module(tmp_path / "m.ko.zst")


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
    assert found["bin/sh"].data == b"busybox"
    assert found["dev/console"].device == (5, 1)
    for place in ("root/tool", "opt/t"):
        assert (found[place].mode, found[place].data) == (stat.S_IFREG | 0o751, b"\0\1")
    assert found["vmodel-command"].data == b"""sh -c 'echo '"'"'it'"'"''"'"'s'"'"' "$HOME"; exit 3' ''\n"""
    init = found["init"].data.decode()
    assert found["init"].mode & 0o111
    assert "for module in auth nvme_core nvme; do" in init, "loaded: in order; extra ones: not"
    assert "{" not in init.replace("finish() {", "")
    # modprobe loads a line's names from its end to its start.
    assert found["lib/modules/9.9-test/modules.dep"].data.decode().splitlines() == [
        "auth.ko:",
        "nvme_core.ko: auth.ko",
        "nvme.ko: nvme_core.ko auth.ko",
        "x.ko:",
    ]
    assert found["lib/modules/9.9-test/x.ko"].data == elf()


def test_a_script_is_taken_as_it_is(tmp_path: Path, busybox: Path) -> None:
    script = "echo $((1 + 1)) {a} %s\n# ünï"
    found = read_back(build(kernel_with(tmp_path / "m", {}), busybox, script))
    assert found["vmodel-command"].data == script.encode() + b"\n"


@pytest.mark.parametrize("target", ["init", "/init", "bin/busybox", "vmodel-command", "bin", "init/x", "../x", ""])
def test_files_do_not_replace_the_harness(tmp_path: Path, busybox: Path, target: str) -> None:
    with pytest.raises(ConfigError):
        build(kernel_with(tmp_path / "m", {}), busybox, ["true"], files=[(busybox, target)])


def test_missing_files(tmp_path: Path, busybox: Path) -> None:
    kernel = kernel_with(tmp_path / "m", {})
    with pytest.raises(ConfigError, match="gone: cannot be copied into the guest: No such file"):
        build(kernel, busybox, ["true"], files=[tmp_path / "gone"])
    with pytest.raises(ConfigError, match="Is a directory"):
        build(kernel, busybox, ["true"], files=[tmp_path])
    with pytest.raises(ConfigError, match="nobusybox"):
        build(kernel, tmp_path / "nobusybox", ["true"])
