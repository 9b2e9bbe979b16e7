"""`vmodel guest --gdb`: the printed line starts gdb with the module's symbols, in time for a breakpoint in probe."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests import needs
from tests.cli.commands import EXAMPLE, environ
from tests.guest.kernels import CHOSEN
from vmodel.guest.artifacts import CLOUD
from vmodel.patience import patience

pytestmark = pytest.mark.guest
SOURCE = Path(__file__).parent / "driver"
STEPS = ("break factorial_probe", "continue", "print number", "delete", "break factorial", "continue", "backtrace 2")
END = ("delete", "detach")


def line_of(file: str, text: str) -> int:
    return next(n for n, line in enumerate((SOURCE / file).read_text().splitlines(), 1) if text in line)


@pytest.mark.parametrize("kernel", [name for name in CHOSEN if name != CLOUD])
def test_a_breakpoint_in_probe(kernel: str, tmp_path: Path) -> None:
    """Also where the kernel links modules with a section at another address than 0, as 6.12 does."""
    needs.program("gdb")
    shutil.copytree(SOURCE, tmp_path / "driver")
    line = [sys.executable, "-m", "vmodel", "guest", str(EXAMPLE), "--run-dir", "run", "--kernel", kernel, "--gdb"]
    with subprocess.Popen(
        [*line, "--module", "driver/", "--", "sh", "-c", "dmesg | grep -c '4! = 24'"],
        cwd=tmp_path,
        env=environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        watchdog = threading.Timer(patience(90), run.kill)
        watchdog.start()
        assert run.stderr is not None and run.stdout is not None
        for said in run.stderr:
            if said.startswith("gdb "):
                break
        else:
            pytest.fail("it does not print how to start gdb")
        done = subprocess.run(
            [*shlex.split(said), "-batch", *(word for step in (*STEPS, *END) for word in ("-ex", step))],
            capture_output=True,
            text=True,
            timeout=patience(60),
            cwd=tmp_path,
            check=False,
        )
        shown = done.stdout + done.stderr
        assert re.search(r"^Breakpoint 1(\.\d)?, factorial_probe \(dev=0x", shown, re.MULTILINE), shown
        assert "$1 = 4\n" in shown, "a static variable of the module, which is in .data"
        called = line_of("main.c", "factorial(registers, number)")
        assert re.search(r"^#0  factorial \(.* at (.*/)?registers\.c:\d+$", shown, re.MULTILINE), shown
        assert re.search(rf"^#1  .*factorial_probe \(.* at (.*/)?main\.c:{called}$", shown, re.MULTILINE), shown
        assert (run.stdout.read(), run.wait(patience(60))) == ("1\n", 0)
        watchdog.cancel()
