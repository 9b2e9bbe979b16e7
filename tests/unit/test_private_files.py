"""Files and sockets in folders that others may write to: docs/robustness.md."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from vmodel.campaign.rig import GUESTS
from vmodel.campaign.runner import executor
from vmodel.control import Control
from vmodel.files import append, create
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


def test_a_log_in_a_foreign_folder(tmp_path: Path) -> None:
    """Somebody else's folder: what is there is appended to only if it is a file, and no link leads out of it."""
    (tmp_path / "mine").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("mine")
    (tmp_path / "nowhere").symlink_to("created")
    for name in ("link", "nowhere"):
        with pytest.raises(OSError, match=f"is a symbolic link: '{tmp_path}/{name}'"):
            append(tmp_path / name)
    assert (tmp_path / "mine").read_bytes() == b"mine" and not (tmp_path / "created").exists()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="No such device"):
        append(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(OSError, match="is not a regular file"):
        append(tmp_path / "fifo")
    os.close(reader)
    for text in (b"one", b"two"):
        with append(tmp_path / "log") as file:
            file.write(text)
    assert (tmp_path / "log").read_bytes() == b"onetwo"
    (tmp_path / "workers.log").symlink_to("mine")
    with pytest.raises(OSError, match="is a symbolic link"), executor(GUESTS, tmp_path):
        pass
