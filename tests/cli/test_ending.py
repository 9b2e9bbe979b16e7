"""What ends a server, whatever clients, models and folders do: docs/robustness.md."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.commands import serving, until_ready, vmodel
from vmodel.patience import patience
from vmodel.vfio_user.client import Client

pytestmark = pytest.mark.slow

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


def file(folder: Path, model: str = "edu") -> Path:
    path = folder / "m.toml"
    path.write_text(MACHINE.format(model=model))
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


#: In place of QEMU: it writes the register whose hook does not return, and ends with the status of its last argument.
CLIENT = """#!{python}
import sys
if sys.argv[1] in ("--version", "-device"):
    print('QEMU emulator version 10.2.0, name "vfio-user-pci", bus PCI')
    sys.exit()
from vmodel.vfio_user.client import Client

client = Client.connect("{run}/a.sock")
client.negotiate()
client.region_write(7, 4, b"\\x07\\x00")
client.region_write(0, 0, bytes(4), posted=True)
sys.exit(int(sys.argv[-1]))
"""
RAISES = """
from vmodel.device import PciDevice

class Stuck(PciDevice):
    vendor_id, device_id, class_code = 0x1B36, 0x0F0F, 0x058000

    def on_reset(self, kind):
        raise ValueError("broken")
"""


@pytest.mark.parametrize(
    ("model", "said"),
    [(MODEL, "a: a hook or callback did not return"), (RAISES, "a: on_reset: ValueError: broken (stuck.py line 8)")],
)
@pytest.mark.parametrize(("status", "expected"), [(0, 70), (9, 9)])
def test_run_says_that_a_model_failed(model: str, said: str, status: int, expected: int, tmp_path: Path) -> None:
    """Status 70 if QEMU has succeeded; QEMU's own if not."""
    (tmp_path / "stuck.py").write_text(model)
    qemu = tmp_path / "qemu"
    qemu.write_text(CLIENT.replace("{python}", sys.executable).replace("{run}", f"{tmp_path}/run"))
    qemu.chmod(0o755)
    line = ["run", file(tmp_path, "stuck.py:Stuck"), "--run-dir", tmp_path / "run", "--", str(status)]
    done = vmodel(*line, VMODEL_QEMU=str(qemu))
    assert done.returncode == expected, done.stderr
    assert f"vmodel: model error: {said}\n" in done.stderr


#: What blocks comes after the context: at first the interpreter's shutdown.
AFTER = """
import atexit, os, signal, threading
from vmodel.cli.serve import Stop

atexit.register(threading.Event().wait)
with Stop.on_signals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    stop.wait()
print("after", stop.number, flush=True)
"""


def test_a_signal_ends_the_process_even_in_its_shutdown() -> None:
    done = subprocess.run([sys.executable, "-c", AFTER], capture_output=True, text=True, timeout=patience(60))
    assert (done.returncode, done.stdout) == (1, "after 15\n")
    assert "Timeout" in done.stderr and "threading.py" in done.stderr


def test_a_client_at_its_maximum_of_fds(tmp_path: Path) -> None:
    """As R11 was: floods of fds on one device, RLIMIT_NOFILE low; another's client connects and gets its eventfds."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "vmodel", "serve", str(file(tmp_path)), "--run-dir", str(run)]
    low = lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 100))  # noqa: E731
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=low)
    try:
        until_ready(server)
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
        assert server.stdout is not None
        server.stdout.close()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits


def test_ctrl_c_again_and_again(tmp_path: Path) -> None:
    """The first ends it, with status 0; those that come meanwhile change nothing, however late they are."""
    with serving(file(tmp_path), "--run-dir", tmp_path / "run") as (server, _):
        deadline = time.monotonic() + patience(20)
        while server.poll() is None:
            assert time.monotonic() < deadline, "the server does not end"
            server.send_signal(signal.SIGINT)
            time.sleep(0.002)
        assert server.returncode == 0
        assert not (tmp_path / "run" / "a.sock").exists()
