"""A debugger in a hook: `breakpoint()` stops the device, QEMU and the guest wait, and go on."""

from __future__ import annotations

import os
import select
import time
from pathlib import Path

import pytest

from tests.cli.commands import on_terminal
from vmodel.patience import patience

pytestmark = pytest.mark.guest

CARD = """
from vmodel.device import MmioBar, PciDevice, on_read
from vmodel.regs import Reg32, RegisterBank

class Regs(RegisterBank, size=0x1000):
    ANSWER = Reg32(0)

class Card(PciDevice):
    vendor_id, device_id, class_code = 0x1234, 0x5678, 0x058000
    bar0 = MmioBar(0, size=0x1000)
    regs = bar0.bank(Regs)

    @on_read(Regs.ANSWER)
    def on_answer(self, stored):
        answer = 0x77
        breakpoint()
        return answer
"""
MACHINE = '[machine]\nname = "m"\n[[device]]\nname = "c0"\nmodel = "card.py:Card"\naddress = "0000:00:03.0"\n'
SCRIPT = 'cd /sys/bus/pci/devices/0000:00:03.0; echo 1 > enable; devmem $(head -1 resource | cut -d" " -f1) 32'
#: Longer than QEMU waits for an answer by default.
THINKING = 6.0


def test_a_breakpoint_in_a_hook(tmp_path: Path) -> None:
    """The user looks at a variable, thinks for longer than QEMU waits otherwise, and changes what the guest reads."""
    (tmp_path / "card.py").write_text(CARD)
    (tmp_path / "m.toml").write_text(MACHINE)
    line = ["-m", "vmodel", "guest", f"{tmp_path}/m.toml", "--run-dir", f"{tmp_path}/run"]
    line += ["--debug-model", "--", "sh", "-c", SCRIPT]
    run, fd = on_terminal(*line, env=os.environ)
    steps = [(b"(Pdb) ", b"p hex(answer)\n"), (b"'0x77'", b"answer = 0x99\n"), (b"(Pdb) ", b"c\n")]
    shown, seen, deadline = b"", 0, time.monotonic() + patience(120)
    while time.monotonic() < deadline:
        if not select.select([fd], [], [], 1)[0]:
            continue
        try:
            shown += os.read(fd, 4096)
        except OSError:  # EIO: it has ended
            break
        if steps and (at := shown.find(steps[0][0], seen)) >= 0:
            seen = at + len(steps[0][0])
            if len(steps) == 3:
                time.sleep(THINKING)
            os.write(fd, steps.pop(0)[1])
    else:
        run.kill()
    os.close(fd)
    status = run.wait(patience(30))
    assert status == 0 and b"\n0x00000099\r\n" in shown, shown.decode(errors="replace")
    assert b"has not returned" not in shown, "a debugger is no hang"
