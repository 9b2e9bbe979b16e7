"""Files and sockets in folders that others may write to: docs/robustness.md."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from vmodel.control import Control
from vmodel.files import create
from vmodel.inject.journal import Journal
from vmodel.machine import parse

MACHINE = """
[machine]
name = "m"
[[device]]
name = "a"
model = "edu"
address = "0000:00:03.0"
[[iommu]]
name = "iommu0"
kind = "virtio-iommu"
address = "0000:00:02.0"
"""


def test_files_do_not_follow_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    machine = parse(MACHINE, tmp_path / "m.toml")
    for name in ("m.viot", "m.injections.jsonl"):
        (run / name).symlink_to(victim)
    server = machine.serve(run)
    server.stop()
    assert (run / "m.viot").read_bytes()[:4] == b"VIOT"
    journal = Journal(run / "m.injections.jsonl")
    journal.put({"a": 1})
    assert json.loads((run / "m.injections.jsonl").read_text()) == {"n": 1, "a": 1}
    journal.close()
    for name in ("m.viot", "m.injections.jsonl"):
        assert (run / name).lstat().st_mode & 0o7777 == 0o600
        assert not (run / name).is_symlink()
    assert victim.read_text() == "precious"
    machine.close()


def test_a_socket_is_private_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No chmod of a path: by then it may be a link of somebody else's."""
    monkeypatch.setattr(Path, "chmod", None)
    before = os.umask(0)
    try:
        with Control(tmp_path, "m", {}):
            assert (tmp_path / "m.control").lstat().st_mode & 0o777 == 0o600
    finally:
        os.umask(before)


def test_create_is_exclusive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who puts a link there between the removal and the making gets an error, not our bytes."""
    victim = tmp_path / "victim"
    monkeypatch.setattr(Path, "unlink", lambda self, missing_ok=False: None)
    (tmp_path / "file").symlink_to(victim)
    with pytest.raises(OSError) as caught:
        create(tmp_path / "file")
    assert caught.value.errno == errno.EEXIST
    assert not victim.exists()
