"""examples/uart.py under Linux's own serial driver: bytes go both ways between the guest's port and the host's pty."""

from __future__ import annotations

import hashlib
import os
import select
import threading
import time

import pytest

from tests import needs
from vmodel.guest.booted import BootedGuest
from vmodel.machine import Machine
from vmodel.patience import patience

TEXT = bytes(range(256)) * 40
PORT = """
for port in /sys/class/tty/ttyS*; do
    case $(readlink $port) in */0000:00:03.0/*) echo -n /dev/${port##*/} ;; esac
done
"""


@pytest.mark.guest(cpus=1)
@pytest.mark.machine("../../examples/uart.toml")
def test_the_host_s_pty_and_the_guest_s_port(vm_booted: BootedGuest, machine: Machine) -> None:
    needs.pty()
    port = vm_booted.run(PORT).output.decode()
    assert port.startswith("/dev/ttyS"), port
    far = os.open(machine.call("uart0.line"), os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    try:
        # One open, as the driver drops what a port received that is closed.
        take = "dd bs=1 <&3 2>/dev/null"  # unlike head, it takes no more than it passes on
        script = f"exec 3<>{port}; stty -F {port} 115200 raw -echo; echo ready >&3; {take} count={len(TEXT)} | md5sum; "
        script += f"{take} count=5; head -c 10240 /dev/zero | tr '\\0' x >&3"
        got = bytearray()
        sender = threading.Thread(target=_talk, args=(far, machine, got))
        sender.start()
        done = vm_booted.run(script, 60)
        sender.join(patience(60))
    finally:
        os.close(far)
    assert done.status == 0, done
    assert done.output.decode().split() == [hashlib.md5(TEXT).hexdigest(), "-", "typed"]
    assert bytes(got) == b"ready\n" + b"x" * 10240
    assert machine.devices["uart0"].errors == 0


def _talk(far: int, machine: Machine, got: bytearray) -> None:
    """The other end: sends once the port is ready, then types, and reads all the time."""
    left, typed = TEXT, False
    deadline = time.monotonic() + patience(60)
    while len(got) < 6 + 10240 and time.monotonic() < deadline:
        ready = got.startswith(b"ready\n")
        readable, writable, _ = select.select([far], [far] if ready and left else [], [], 0.1)
        if readable:
            got += os.read(far, 4096)
        if writable:
            left = left[os.write(far, left[:512]) :]
        if not left and not typed:
            typed = machine.call("uart0.feed", "typed") == 5
