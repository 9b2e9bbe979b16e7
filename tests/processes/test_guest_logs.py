"""A guest without QEMU: its artefacts on a full disk, and what the environment asks of it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from vmodel.cli.screen import Screen
from vmodel.errors import ConfigError
from vmodel.guest import initramfs, running
from vmodel.guest.artifacts import Kernel, Qemu
from vmodel.guest.running import Guest, GuestOff, GuestSpec, GuestTimeout, LogError

#: Writes more than a socket holds on the command's port, then the command's status if it has one.
QEMU = f"""#!{sys.executable}
import os, re, sys
port = dict(re.findall(r"id=(\\w+),fd=([0-9]+)", " ".join(sys.argv)))
data = b"line\\n" * 400_000
while data:
    data = data[os.write(int(port["output"]), data):]
os.write(int(port["status"]), b"{{status}}")
"""


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GuestSpec:
    monkeypatch.setattr(initramfs, "build", lambda *_: b"")
    monkeypatch.setattr(running, "find_busybox", lambda: None)
    (tmp_path / "qemu").write_text(QEMU.format(status="status 3\\n"))
    (tmp_path / "qemu").chmod(0o755)
    kernel = Kernel("0", tmp_path / "vmlinuz", None)
    return GuestSpec(command="true", qemu=Qemu(tmp_path / "qemu", (11, 0)), kernel=kernel, timeout=60)


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """A folder in which the command's output cannot be stored."""
    folder = tmp_path / "logs"
    folder.mkdir()
    (folder / "output.log").symlink_to("/dev/full")
    return folder


def test_all_output_is_read(spec: GuestSpec, logs: Path) -> None:
    said = f"the command ended with status 3, but {logs}/output.log cannot be written: No space left on device"
    with Guest(spec, artifacts=logs) as guest:
        with pytest.raises(LogError) as error:
            guest.wait()
        assert str(error.value) == said
        assert len(guest.output) == 5 * 400_000
    assert (logs / "status.log").exists()


def test_the_accelerator(spec: GuestSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, used in (("", "tcg"), ("tcg", "tcg"), ("kvm", "kvm")):
        monkeypatch.setenv("VMODEL_ACCEL", given)
        with Guest(spec) as guest:
            assert guest.line[1:3] == ["-accel", used]
    monkeypatch.setenv("VMODEL_ACCEL", "kmv")
    with pytest.raises(ConfigError, match="VMODEL_ACCEL='kmv': must be tcg or kvm"), Guest(spec):
        pass


@pytest.mark.parametrize(("accelerator", "said"), [("kvm", True), ("tcg", False)])
def test_a_kvm_with_which_no_guest_boots(
    accelerator: str, said: bool, spec: GuestSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "qemu").write_text("#!/bin/sh\nexec sleep 1000\n")
    monkeypatch.setenv("VMODEL_ACCEL", accelerator)
    monkeypatch.setattr(Guest, "hang", lambda self: "")  # this QEMU has no monitor
    spec.timeout = 0.2
    with Guest(spec) as guest, pytest.raises(GuestTimeout) as error:
        guest.wait()
    assert ("its kernel has printed nothing: VMODEL_ACCEL=tcg boots it without KVM" in str(error.value)) is said


def test_another_reason_comes_first(spec: GuestSpec, logs: Path, tmp_path: Path) -> None:
    (tmp_path / "qemu").write_text(QEMU.format(status=""))
    with Guest(spec, artifacts=logs) as guest, pytest.raises(GuestOff) as error:
        guest.wait()
    assert str(error.value).endswith(f"; {logs}/output.log cannot be written: No space left on device")


@pytest.mark.parametrize("name", ["qemu.line", "initramfs"])
def test_an_error_names_the_file(name: str, spec: GuestSpec, logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = Guest(spec, artifacts=logs)
    for folder in (logs, guest.qmp.parent):
        (folder / name).symlink_to("/dev/full")
    monkeypatch.setattr(initramfs, "build", lambda *_: b"image")
    with pytest.raises(OSError, match=f"No space left on device: '.*/{name}'"), guest:
        pass


def test_a_screen_that_cannot_be_written() -> None:
    """The line of one source that never ends delays the other's; the error of its late write is raised, not printed."""
    with Path("/dev/full").open("wb") as full:
        screen = Screen(full.fileno())
        screen._open, screen._waiting = "console", [("output", b"x\n")]
        screen._late()
        with pytest.raises(OSError, match="No space left on device: 'descriptor"):
            screen.close()
