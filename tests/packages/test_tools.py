"""Programs for guests: what they need of Debian's packages, which are made here; how they come into a guest."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.packages.archive import URI, Archive, cached, fake_deb, fake_qemu
from tests.packages.cpio import read_back
from tests.packages.program_files import elf
from vmodel.errors import ConfigError
from vmodel.guest import get_qemu
from vmodel.guest.artifacts import ArtifactError, Kernel
from vmodel.guest.initramfs import build
from vmodel.guest.programs import unpack_tool
from vmodel.guest.tools import LIBS, LOADER, needed, program_path, tool, tool_files

Members = dict[str, bytes | str]


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


# ---- what programs need ------------------------------------------------------------------------------

LIBC: dict[str, bytes | str] = {
    f"{LIBS}/libc.so.6": elf("ld-linux-x86-64.so.2"),
    f"{LIBS}/ld-linux-x86-64.so.2": elf(),
    f"{LIBS}/gconv/EUC-JP.so": elf("libc.so.6"),
    "usr/share/doc/libc6/copyright": b"text",
}


class Packages:
    """Packages in a folder, and a cache in which they become parts."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder, self.cache = folder, cache
        self.debs: list[Path] = []
        self.add("libc6", LIBC)

    def add(self, name: str, members: Members, depends: str = "Depends: libc6 (>= 2.34)", **fields: str) -> None:
        made = [(f"./{path}", data, 0o755 if "bin/" in path else 0o644) for path, data in members.items()]
        more = "".join(f"\n{key}: {value}" for key, value in fields.items())
        self.debs.append(fake_deb(self.folder, made, name=name, depends=depends + more))

    def unpack(self, package: str) -> Path:
        part = cached(self.cache, f"tool-{package}")
        unpack_tool(self.debs, part, package)
        return part


@pytest.fixture
def packages(tmp_path: Path, cache: Path) -> Packages:
    return Packages(tmp_path, cache)


def needs(text: str) -> list[str]:
    """The paths of a tool in the guest, without the C library's."""
    found = tool_files([text])
    assert all(path.exists() for path in found.values()), "no link leads nowhere"
    return sorted(found.keys() - {LOADER, f"{LIBS}/libc.so.6"})


def test_a_program_its_libraries_and_data(packages: Packages) -> None:
    """As lspci: its library's package depends on one that has only data."""
    packages.add("pci.ids", {"usr/share/misc/pci.ids": b"ids", "usr/share/doc/pci.ids/x": b"text"}, "")
    packages.add(
        "libpci3",
        {f"{LIBS}/libpci.so.3.1": elf("libz.so.1", "libc.so.6"), f"{LIBS}/libpci.so.3": "libpci.so.3.1"},
        "Depends: libc6 (>= 2.34), pci.ids (>= 0.0~20), zlib1g",
    )
    packages.add("zlib1g", {f"{LIBS}/libz.so.1": elf("libc.so.6")})
    packages.add("debconf", {"usr/bin/debconf": b"#!/usr/bin/perl\n", "usr/share/debconf/data": b"not for lspci"}, "")
    packages.add("unwanted", {f"{LIBS}/unwanted.so.1": elf("libc.so.6"), "usr/share/unwanted": b"x"})
    packages.add(
        "pciutils",
        {
            "usr/bin/lspci": elf("libpci.so.3", "libc.so.6"),
            "usr/sbin/update-pciids": b"#!/bin/sh\n",
            "etc/pci.conf": b"conf",
            f"{LIBS}/libplugin.so.0": elf("libc.so.6"),
            "usr/share/man/man8/lspci.8.gz": b"page",
            "usr/lib/systemd/system/x.service": b"unit",
        },
        "Depends: libc6 (>= 2.34), libpci3 (= 1:3.13.0-2), debconf (>= 0.5) | debconf-2.0",
    )
    part = packages.unpack("pciutils")
    data = [
        f"{LIBS}/libplugin.so.0",
        "etc/pci.conf",
        "usr/bin/lspci",
        f"{LIBS}/libpci.so.3",
        f"{LIBS}/libz.so.1",
        "usr/share/misc/pci.ids",
    ]
    assert needs("pciutils:lspci") == sorted(data)
    assert program_path("pciutils:lspci") == "usr/bin/lspci"
    assert LOADER in tool_files(["pciutils:lspci"]), "where programs look for it"
    assert "usr/share/debconf/data" in needs("pciutils:update-pciids"), "a script may call what is in each of them"
    left = {str(path.relative_to(part / "root")) for path in part.rglob("root/**/*") if path.is_file()}
    assert not left & {f"{LIBS}/unwanted.so.1", f"{LIBS}/libpci.so.3.1", "usr/share/doc/pci.ids/x"}
    assert (part / "root/usr/bin/lspci").stat().st_mode & 0o777 == 0o755


def test_libraries_of_libraries(packages: Packages) -> None:
    """In a loop; in a folder of their own; behind links; from before the merge of /usr."""
    packages.add(
        "fio",
        {
            "sbin/fio": elf("liba.so.1", "libc.so.6"),
            "usr/bin/fio-link": "../sbin/fio",
            f"{LIBS}/fio/engine.so": elf("libplugin.so.7", "libgone.so.1"),
            f"{LIBS}/libplugin.so.7": elf("libc.so.6"),
        },
        "Depends: liba1",
    )
    packages.add(
        "liba1",
        {
            f"{LIBS}/liba.so.1": elf("libb.so.2"),
            f"{LIBS}/own/libb.so.2.3": elf("liba.so.1", "libc.so.6"),
            f"{LIBS}/own/libb.so.2": "libb.so.2.3",
        },
    )
    packages.unpack("fio")
    libraries = ["fio/engine.so", "liba.so.1", "libplugin.so.7", "own/libb.so.2", "own/libb.so.2.3"]
    assert needs("fio:fio") == sorted(["usr/sbin/fio", *(f"{LIBS}/{name}" for name in libraries)])
    link = tool_files(["fio:fio-link"])["usr/bin/fio-link"]
    assert link.is_file() and not link.is_symlink()


def test_scripts_get_their_interpreter_and_its_modules(packages: Packages) -> None:
    """As python3: its modules are in packages without programs, and in folders behind links."""
    packages.add(
        "python3.13-minimal", {"usr/bin/python3.13": elf("libc.so.6")}, "Depends: libc6, libpython3.13-minimal"
    )
    packages.add("libpython3.13-minimal", {"usr/lib/python3.13/os.py": b"import sys", "usr/lib/python3/x": b"x"}, "")
    packages.add("libpython3-stdlib", {"usr/lib/python3.13/ssl.so": elf("libssl.so.3")}, "Depends: libssl3")
    packages.add("libssl3", {f"{LIBS}/libssl.so.3": elf("libc.so.6")})
    packages.add(
        "python3", {"usr/bin/python3": "python3.13"}, "Pre-Depends: python3.13-minimal\nDepends: libpython3-stdlib"
    )
    packages.add(
        "python3-yaml",
        {"usr/lib/python3/yaml.py": b"", "usr/lib/python3.link": "python3"},
        "Depends: python3:any",
        Provides="yaml-virtual (= 1), yaml-other",
    )
    packages.add(
        "mytool",
        {
            "usr/bin/mytool": b"#!/usr/bin/env python3\n",
            "usr/bin/mybash": b"#! /bin/bash -e\n",
            "usr/bin/elf": elf("libc.so.6"),
        },
        "Depends: yaml-virtual, python3 (>= 3.9~)",
    )
    part = packages.unpack("mytool")
    modules = ["usr/lib/python3.13/os.py", "usr/lib/python3.13/ssl.so", "usr/lib/python3/x", "usr/lib/python3/yaml.py"]
    found = tool_files(["mytool:mytool"])
    assert {*modules, "usr/bin/python3", f"{LIBS}/libssl.so.3", "usr/lib/python3.link"} < found.keys()
    assert (part / "root/usr/lib/python3.link").readlink() == Path("python3"), "a link to a folder stays one"
    assert needs("mytool:elf") == ["usr/bin/elf", "usr/lib/python3.link", "usr/lib/python3/yaml.py"]
    assert needs("mytool:python3").count("usr/bin/python3") == 1, "a program of a package that it depends on"


def test_packages_that_do_not_serve(packages: Packages) -> None:
    packages.add("empty", {"usr/share/x": b"", "usr/bin/dangling": "/etc/alternatives/x"}, "")
    with pytest.raises(ArtifactError, match=r"^the package 'empty' has no programs$"):
        packages.unpack("empty")
    packages.add("lacking", {"usr/bin/x": elf("libgone.so.2")})
    with pytest.raises(ArtifactError, match=r"^usr/bin/x needs the library libgone.so.2, which no package has that it"):
        packages.unpack("lacking")
    packages.add("broken", {"usr/bin/x": b"\x7fELF\x02"})
    with pytest.raises(ArtifactError, match=r"^usr/bin/x: a? ?(not an|damaged) ELF file"):
        packages.unpack("broken")


# ---- how they are named ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "lspci",
        "",
        ":",
        "pciutils:",
        ":lspci",
        "-o=x:lspci",
        "../x:y",
        "pciutils:../x",
        "pciutils:a:b",
        "P:x",
        "a b:c",
        "pci:.",
    ],
)
def test_other_forms_are_refused(cache: Path, text: str) -> None:
    """No text of a machine file becomes an option of apt, or a path."""
    said = f"^{re.escape(repr(text))}: must be PACKAGE:PROGRAM, as pciutils:lspci$"
    for call in (tool, program_path, lambda entry: tool_files([entry])):
        with pytest.raises(ConfigError, match=said):
            call(text)


def test_mistakes_say_what_would_be_right(packages: Packages) -> None:
    with pytest.raises(
        ArtifactError, match=r"^no programs of the package 'pciutils' found; run .*get-qemu --tool pciutils$"
    ):
        program_path("pciutils:lspci")
    packages.add("pciutils", {"usr/bin/lspci": elf("libc.so.6"), "usr/bin/setpci": elf("libc.so.6")})
    part = packages.unpack("pciutils")
    with pytest.raises(
        ArtifactError, match=r"no program 'lspcii': did you mean pciutils:lspci\? It has lspci, setpci$"
    ):
        program_path("pciutils:lspcii")
    with pytest.raises(ArtifactError, match=r"^the package 'pciutils' has no program 'gdb': it has lspci, setpci$"):
        tool_files(["pciutils:gdb"])
    with pytest.raises(ConfigError, match=r"^'setpci': must be PACKAGE:PROGRAM, as pciutils:setpci$"):
        tool("setpci")
    for text in ("", "[]", '{"files": [], "programs": {"lspci": [0]}}', '{"files": {}, "programs": 1}'):
        (part / "manifest.json").write_text(text)
        with pytest.raises(ArtifactError, match=r"tool-pciutils is damaged; remove it$"):
            program_path("pciutils:lspci")


def test_fetching(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The size comes first; a second call fetches nothing; a package that is not there is named with one that is."""
    archive = Archive(monkeypatch, cache)
    monkeypatch.setattr(get_qemu, "unpack_tool", lambda debs, folder, package: (folder / "root").mkdir())
    fake_qemu(cached(cache, "qemu", version="QEMU emulator version 11.1.3") / "qemu-system-x86_64")
    (cached(cache, "busybox") / "busybox").touch()
    archive.packages = ["pciutils", "strace"]
    get_qemu.fetch((), tools=["pciutils", "pciutils"], mirror=URI)
    assert "tool-pciutils: to be fetched, 5 MB\n" in capsys.readouterr().err
    assert archive.downloads == ["pciutils"]
    get_qemu.fetch((), tools=["pciutils"], mirror=URI)
    assert (archive.downloads, capsys.readouterr().err) == (["pciutils"], "")
    with pytest.raises(
        ArtifactError, match=r"^trixie and trixie-backports have no package 'stracee': did you mean 'strace'\?$"
    ):
        get_qemu.fetch((), tools=["stracee"], mirror=URI)
    assert get_qemu.missing_parts([], tools=["pciutils", "strace"]) == ["tool-strace"]
    with pytest.raises(SystemExit):
        get_qemu.main(["--tool", "-o=x"])


# ---- in a guest --------------------------------------------------------------------------------------


def test_a_guest_gets_what_it_asks_for(packages: Packages, tmp_path: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_bytes(b"busybox")
    kernel = Kernel("1-test", tmp_path / "vmlinuz", None)

    def names(**options: Any) -> set[str]:
        return set(read_back(build(kernel, busybox, "true", **options)))

    assert {"bin/sh", "bin/mount", "usr/bin/env"} <= names()
    packages.add(
        "util-linux", {"usr/bin/mount": elf("libc.so.6"), "etc/x.conf": b"theirs", "usr/bin/s": b"#!/bin/bash\n"}
    )
    packages.unpack("util-linux")
    packages.add("bash", {"bin/bash": elf("libc.so.6"), "etc/x.conf": b"theirs, too"})
    packages.unpack("bash")
    made = read_back(build(kernel, busybox, "true", tools=["util-linux:mount", "util-linux:mount", "bash:bash"]))
    assert made["bin/mount"].data == b"/usr/bin/mount" and made["bin/sh"].data == b"/bin/busybox"
    assert made[LOADER].data == elf() and made["etc/x.conf"].data == b"theirs"
    (tmp_path / "mine").write_bytes(b"mine")
    made = read_back(build(kernel, busybox, "true", tools=["bash:bash"], files=[(tmp_path / "mine", "/etc/x.conf")]))
    assert made["etc/x.conf"].data == b"mine"
    with pytest.raises(ConfigError, match=r"^util-linux:s is a script for /bin/bash, .* add the tool bash:bash$"):
        names(tools=["util-linux:s"])
    assert {"usr/bin/s", "bin/bash"} <= names(tools=["util-linux:s", "bash:bash"])
