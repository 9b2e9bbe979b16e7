"""The guest runner itself: statuses, streams, and guests that do not end well."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmodel.testing.artifacts import ArtifactError, find_kernel
from vmodel.testing.guest import Guest, GuestError, GuestSpec, run_guest

pytestmark = pytest.mark.guest


def test_status_and_output_are_passed_on(artifacts: Path) -> None:
    result = run_guest(GuestSpec(command="printf 'a\\tb\\r\\n\\001\\377'; echo err >&2; exit 7"), artifacts=artifacts)
    assert (result.status, result.output) == (7, b"a\tb\r\n\x01\xfferr\n")
    assert "a\tb" not in result.console
    assert {file.name for file in artifacts.iterdir()} >= {"console.log", "output.log", "qemu.log", "qemu.line"}


def test_files_modules_and_words(tmp_path: Path) -> None:
    script = tmp_path / "it's a script"
    script.write_text('#!/bin/sh\necho "$1|$2"\ngrep -c ^uio_pci_generic /proc/modules\nuname -r\n')
    script.chmod(0o755)
    spec = GuestSpec(
        command=["/root/it's a script", "one word", "$HOME'"],
        kernel=find_kernel("7.2"),
        modules=["uio_pci_generic"],
        files=[(script, "root/it's a script")],
    )
    result = run_guest(spec)
    assert result.status == 0, result.output
    assert result.output.splitlines()[:2] == [b"one word|$HOME'", b"1"]
    assert result.output.splitlines()[2].startswith(b"7.2.")


def test_a_panic(artifacts: Path) -> None:
    with pytest.raises(GuestError, match="Kernel panic"):
        run_guest(GuestSpec(command="echo c >/proc/sysrq-trigger; sleep 60", timeout=60), artifacts=artifacts)


def test_a_guest_that_does_not_end() -> None:
    with pytest.raises(GuestError, match=r"did not end in 8 s"):
        run_guest(GuestSpec(command="sleep 1000", timeout=8))


def test_qemu_that_does_not_start() -> None:
    with pytest.raises(GuestError, match="no-such-device"):
        run_guest(GuestSpec(command="true", qemu_args=["-device", "no-such-device"]))


def test_a_module_that_is_not_there() -> None:
    with (
        pytest.raises(ArtifactError, match="no module 'nonesuch'"),
        Guest(GuestSpec(command="true", modules=["nonesuch"])),
    ):
        pass
