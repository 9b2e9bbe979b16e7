"""QEMU ends with what drives it, also if that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import environ
from tests.waiting import runs, until
from vmodel.guest.keeper import Keeper, removing
from vmodel.patience import patience

DRIVES = """
import subprocess, sys, time
from pathlib import Path
from vmodel.guest.keeper import Keeper
process = subprocess.Popen(["sleep", "1000"])
keeper = Keeper(process, Path(sys.argv[1]))
print(process.pid, flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_driver_that_is_killed(number: int, tmp_path: Path) -> None:
    scratch = tmp_path / "the scratch's"
    scratch.mkdir()
    (scratch / "initramfs").write_text("large")
    line = [sys.executable, "-c", DRIVES, str(scratch)]
    with subprocess.Popen(line, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as driver:
        assert driver.stdout is not None
        pid = int(driver.stdout.readline())
        os.kill(pid, 0)
        driver.send_signal(number)
        driver.wait(patience(20))
    until(lambda: not runs(pid), "the end of its process")
    until(lambda: not scratch.exists(), "the removal of its folder")


def test_a_keeper_that_is_closed(tmp_path: Path) -> None:
    """It does nothing; closing it twice is fine."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        keeper = Keeper(process, tmp_path)
        keeper.close()
        keeper.close()
        assert process.communicate(b"alive")[0] == b"alive"
    assert tmp_path.exists()


REMOVES = """
import os, sys, time
from pathlib import Path
from vmodel.guest.keeper import removing
with removing(Path(sys.argv[1])):
    print("there", flush=True)
    time.sleep(1000)
"""


def test_a_folder_goes_with_a_group_that_is_killed(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    (scratch / "initramfs").write_text("large")
    line = [sys.executable, "-c", REMOVES, str(scratch)]
    with subprocess.Popen(line, env=environ(), stdout=subprocess.PIPE, start_new_session=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"there\n" and scratch.exists()
        os.killpg(driver.pid, signal.SIGKILL)
    until(lambda: not scratch.exists(), "the removal of the folder")


def test_a_folder_goes_at_the_end_of_a_block(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with pytest.raises(ZeroDivisionError), removing(scratch):
        _ = 1 / 0
    assert not scratch.exists()
