"""Programs for guests: which libraries they need, from ELF files made here; unpacking them from a package."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.packages.program_files import elf
from vmodel.guest import debian, tools
from vmodel.guest.artifacts import ArtifactError, Kernel
from vmodel.guest.initramfs import build
from vmodel.guest.tools import LIBS, find_tools, needed, program_files, programs


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tools' folder of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vmodel" / "tools"


def test_needed() -> None:
    assert needed(io.BytesIO(elf("libc.so.6", "libz.so.1"))) == ["libc.so.6", "libz.so.1"]
    assert needed(io.BytesIO(elf())) == []
    static = elf()[:0x38] + b"\0\0" + elf()[0x3A:]  # no segments at all
    assert needed(io.BytesIO(static)) == []


@given(st.integers(0, len(elf("libc.so.6", "x")) - 1), st.binary(max_size=8))
@example(at=34, junk=b"\0\0\0\0\0\x80")  # the table of segments at 2**63 and beyond
def test_a_broken_program_is_a_value_error(at: int, junk: bytes) -> None:
    data = elf("libc.so.6", "x")
    for broken in (data[:at], data[:at] + junk + data[at + len(junk) :]):
        with contextlib.suppress(ValueError):
            assert all(isinstance(name, str) for name in needed(io.BytesIO(broken)))


@pytest.mark.parametrize("data", [b"", b"#!/bin/sh\n", b"\x7fEL"])
def test_no_program(data: bytes) -> None:
    with pytest.raises(ValueError, match="not an ELF file"):
        needed(io.BytesIO(data))


def test_libraries_of_libraries(tmp_path: Path) -> None:
    put(tmp_path / "usr/bin/fio", elf("liba.so.1", "libc.so.6"))
    put(tmp_path / "usr/sbin/nvme", elf("libc.so.6"))
    put(tmp_path / LIBS / "own" / "libb.so.2.3", elf("liba.so.1", "libc.so.6"))  # in a loop with liba
    (tmp_path / LIBS / "own" / "libb.so.2").symlink_to("libb.so.2.3")
    put(tmp_path / LIBS / "liba.so.1", elf("libb.so.2"))
    put(tmp_path / LIBS / "libc.so.6", elf("ld-linux-x86-64.so.2"))
    put(tmp_path / LIBS / "ld-linux-x86-64.so.2", elf())
    found = dict(program_files(tmp_path, ["fio", "nvme", "fio"]))
    assert list(found) == [
        "bin/fio",
        "bin/nvme",
        "lib64/ld-linux-x86-64.so.2",
        f"{LIBS}/liba.so.1",
        f"{LIBS}/libb.so.2",
        f"{LIBS}/libc.so.6",
    ]
    assert all(path.is_file() for path in found.values())
    assert f"{LIBS}/liba.so.1" not in dict(program_files(tmp_path, ["nvme"]))
    (tmp_path / LIBS / "own" / "libb.so.2").unlink()
    with pytest.raises(ArtifactError, match=r"^liba.so.1 needs the library libb.so.2, .*get-qemu --tools --refresh$"):
        list(program_files(tmp_path, ["fio"]))
    with pytest.raises(ArtifactError, match=r"no tool 'gdb' for guests .tools are: blockdev, e2fsck, fio, "):
        list(program_files(tmp_path, ["gdb"]))
    put(tmp_path / "usr/bin/fio", b"#!")
    with pytest.raises(ArtifactError, match="fio: not an ELF file"):
        list(program_files(tmp_path, ["fio"]))


def test_a_guest_gets_what_it_asks_for(tmp_path: Path, cache: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"busybox")
    kernel = Kernel("1-test", tmp_path / "vmlinuz", None)
    with pytest.raises(ArtifactError, match=r"no tools for guests found; run scripts/get-qemu --tools$"):
        build(kernel, busybox, "true", tools=["nvme"])
    put(cache / "root/usr/sbin/nvme", elf("libc.so.6"))
    put(cache / "root" / LIBS / "libc.so.6", elf())
    (cache / "stamp.json").write_text(json.dumps({"packages": "p"}))
    assert find_tools() == cache / "root"
    archive = build(kernel, busybox, "true", tools=["nvme"])
    for name in ("bin/nvme", f"{LIBS}/libc.so.6"):
        assert name.encode() + b"\0" in archive
    assert b"bin/nvme\0" not in build(kernel, busybox, "true")


def test_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs and what they need; nothing else of the packages stays."""
    monkeypatch.setattr(tools, "TOOLS", {"x": ("mkfs.ext4",), "y": ("sfdisk",)})
    content: dict[str, bytes | str] = {
        "./usr/sbin/mke2fs": elf("liba.so.1"),
        "./usr/sbin/mkfs.ext4": "mke2fs",
        "./sbin/sfdisk": elf("liba.so.1"),  # before the merge of /usr
        "./usr/sbin/other": elf("liba.so.1"),
        f"./{LIBS}/liba.so.1.0": elf(),
        f"./{LIBS}/liba.so.1": "liba.so.1.0",
        f"./{LIBS}/unwanted.so.1.0": elf(),
        f"./{LIBS}/unwanted.so.1": "unwanted.so.1.0",
        f"./{LIBS}/data/file.txt": b"text",
    }
    deb, scratch = tmp_path / "p.deb", tmp_path / "scratch"
    with tarfile.open(deb, "w") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname = tarfile.SYMTYPE, data
                archive.addfile(member)
                continue
            member.size = len(data)
            scratch.write_bytes(data)
            with scratch.open("rb") as file:
                archive.addfile(member, file)
    tool = tmp_path / "bin" / "dpkg-deb"
    tool.parent.mkdir()
    tool.write_text('#!/bin/sh\n/bin/cat "$2"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    debian.unpack_tools([deb], tmp_path / "tools")
    root = tmp_path / "tools" / "root"
    there = sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())
    libraries = [f"{LIBS}/liba.so.1", f"{LIBS}/liba.so.1.0"]
    assert there == [*libraries, "usr/sbin/mke2fs", "usr/sbin/mkfs.ext4", "usr/sbin/sfdisk"]
    assert programs() == ["mkfs.ext4", "sfdisk"]
