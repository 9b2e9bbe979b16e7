"""What ends a server, whatever clients, models and folders do: docs/robustness.md."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.unit.test_cli import serving
from vmodel.control import Control, ask
from vmodel.files import create
from vmodel.inject.journal import Journal
from vmodel.logs import BURST, SECONDS, Limiter, limited, report_held
from vmodel.machine import parse
from vmodel.patience import patience
from vmodel.vfio_user.client import Client

MODEL = """
import time
from vmodel.device import MmioBar, PciDevice, on_write
from vmodel.regs import Reg32, RegisterBank

class Regs(RegisterBank, size=0x1000):
    GO = Reg32(0)

class Stuck(PciDevice):
    vendor_id, device_id, class_code = 0x1B36, 0x0F0F, 0x058000
    bar0 = MmioBar(0, size=0x1000)
    regs = bar0.bank(Regs)

    @on_write(Regs.GO)
    def _never_returns(self, new):
        while True:
            time.sleep(0.01)
"""
MACHINE = """
[machine]
name = "m"
[limits]
handshake_timeout = 0.5
[[device]]
name = "a"
model = "{model}"
address = "0000:00:03.0"
[[device]]
name = "b"
model = "edu"
address = "0000:00:04.0"
"""
IOMMU = """
[[iommu]]
name = "iommu0"
kind = "virtio-iommu"
address = "0000:00:02.0"
"""


def file(folder: Path, model: str = "edu", more: str = "") -> Path:
    path = folder / "m.toml"
    path.write_text(MACHINE.format(model=model) + more)
    return path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stuck_model_is_named_and_the_process_ends(number: int, tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(MODEL)
    with serving(file(tmp_path, "stuck.py:Stuck"), "--run-dir", tmp_path / "run") as (server, _):
        client = Client.connect(tmp_path / "run" / "a.sock")
        client.negotiate()
        client.region_write(7, 4, b"\x07\x00")
        client.region_write(0, 0, bytes(4), posted=True)
        time.sleep(0.3)
        server.send_signal(number)
        _, err = server.communicate(timeout=20)
        client.close()
    assert server.returncode == 1
    assert "a: abandoned" in err
    assert "_never_returns" in err
    assert not list((tmp_path / "run").glob("*.sock"))


def test_a_client_at_its_maximum_of_fds(tmp_path: Path) -> None:
    """As R11 was: floods of fds on one device, RLIMIT_NOFILE low; another's client connects and gets its eventfds."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "vmodel", "serve", str(file(tmp_path)), "--run-dir", str(run)]
    low = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 100))  # noqa: E731
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=low)
    try:
        assert server.stdout is not None
        while server.stdout.readline() != "ready\n":
            assert server.poll() is None
        event = os.eventfd(0)
        with Client.connect(run / "a.sock") as a:
            a.negotiate(max_msg_fds=16)
            header = a.message(4, bytes(16))
            for n in range(6):
                socket.send_fds(a.main.sock, [header[n : n + 1]], [event] * 250)
            with Client.connect(run / "b.sock") as b:
                b.negotiate()
                for one in b.eventfds(1, 1):
                    one.close()
            soft = Path(f"/proc/{server.pid}/limits").read_text()
            assert "Max open files            100 " in soft
        os.close(event)
    finally:
        server.terminate()
        assert server.wait(20) == 0
        server.stdout.close()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


# ---- the control socket ------------------------------------------------------------------------------


def test_control_survives_what_the_system_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = 3
    plain = threading.Thread.start

    def start(self: threading.Thread) -> None:
        nonlocal left
        if self.name == "vmodel-control-client" and left:
            left -= 1
            raise RuntimeError("can't start new thread")
        plain(self)

    with Control(tmp_path, "m", {"yes": lambda _: 1}):
        monkeypatch.setattr(threading.Thread, "start", start)
        for _ in range(3):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(5)
                sock.connect(str(tmp_path / "m.control"))
                assert sock.recv(1) == b""  # dropped, nothing else
        assert ask(tmp_path / "m.control", "yes") == 1
    assert left == 0


def test_a_command_that_does_not_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    over = threading.Event()
    with socket.socket(socket.AF_UNIX) as sock:
        with Control(tmp_path, "m", {"stuck": lambda _: over.wait()}):
            sock.connect(str(tmp_path / "m.control"))
            sock.sendall(json.dumps({"command": "stuck"}).encode() + b"\n")
            time.sleep(0.2)
            began = time.monotonic()
        assert time.monotonic() - began < 10
    assert "control: abandoned" in caplog.text
    over.set()


# ---- folders that others may write to ----------------------------------------------------------------


def test_files_do_not_follow_links(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    run = tmp_path / "run"
    run.mkdir()
    machine = parse(file(tmp_path, more=IOMMU).read_text(), tmp_path / "m.toml")
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


# ---- logs ----------------------------------------------------------------------------------------------


def test_limited_logs(caplog: pytest.LogCaptureFixture) -> None:
    log = limited("vmodel.test.limited")
    now = [0.0]
    (old,) = log.filters
    log.removeFilter(old)
    log.addFilter(Limiter(lambda: now[0]))
    with caplog.at_level(logging.DEBUG, "vmodel.test.limited"):
        for n in range(100):
            log.warning("%s: %d", "a", n)
        log.warning("%s: %d", "b", 0)  # another device's are not held back
        assert len(caplog.records) == BURST + 1
        now[0] += SECONDS
        log.warning("%s: %d", "a", 100)
        assert caplog.messages[-1] == f"a: 100 ({100 - BURST} lines before it were held back)"
        for n in range(1000):
            log.warning(f"a name that a guest chooses {n}")
        assert len(caplog.records) == 2 * BURST + 2
        for n in range(5000):
            log.warning("%s", f"a name that a guest chooses {n}")
        assert len(log.filters[0]._limits) <= 66  # type: ignore[union-attr]
        report_held(log)
        assert "lines were held back" in caplog.messages[-1]


def test_ctrl_c_again_and_again(tmp_path: Path) -> None:
    """The first ends it, with status 0; those that come meanwhile change nothing, however late they are."""
    with serving(file(tmp_path), "--run-dir", tmp_path / "run") as (server, _):
        deadline = time.monotonic() + patience(20)
        while server.poll() is None:
            assert time.monotonic() < deadline
            server.send_signal(signal.SIGINT)
            time.sleep(0.002)
        assert server.returncode == 0
        assert not (tmp_path / "run" / "a.sock").exists()
