"""examples/xdma in guests: AMD's driver, its own tests on its own card, and what it does about faults.

The driver is not here: examples/xdma/README.md has the commands that make the folder which $VMODEL_XDMA names.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.guest.kernels import CHOSEN
from vmodel.guest.artifacts import CLOUD, find_kernel
from vmodel.patience import patience

pytestmark = pytest.mark.guest
EXAMPLE = Path(__file__).parents[2] / "examples" / "xdma"
DRIVER = "dma_ip_drivers/XDMA/linux-kernel"
TESTS = "cd tests && ./run_test.sh"


def vmodel(folder: Path, *line: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vmodel", *map(str, line)]
    return subprocess.run(
        command,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=patience(400),
        check=False,
    )


@pytest.fixture(scope="module", params=[name for name in CHOSEN if name != CLOUD])
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kernel: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the example with the driver, which is built, and what its tests need."""
    source = needs.checkout("VMODEL_XDMA", "AMD's driver of XDMA", DRIVER)
    folder = tmp_path_factory.mktemp("xdma")
    shutil.copytree(EXAMPLE, folder, dirs_exist_ok=True)
    shutil.copytree(source / DRIVER, folder / DRIVER)
    make = ["make", "-C", "tools", "clean", "all", "CC=gcc -static"]
    subprocess.run(make, cwd=folder / DRIVER, check=True, capture_output=True, timeout=patience(120))
    # Linux 6.15 no longer reads the variable in which the driver's Makefile has this.
    new = find_kernel(kernel).version >= (6, 15)
    options = ["--make", f"ccflags-y=-I{folder / DRIVER / 'include'}"] if new else []
    done = vmodel(folder, "build", f"{DRIVER}/xdma", "--kernel", kernel, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.parametrize("mode", ["interrupt_mode=3", "interrupt_mode=1", "interrupt_mode=2", "poll_mode=1"])
def test_the_drivers_own_tests(folder: Path, kernel: str, mode: str) -> None:
    """By MSI-X, MSI, the pin, and polling."""
    options = ["--kernel", kernel, "--run-dir", folder / "run", "--append", f"xdma.{mode}"]
    done = vmodel(folder, "guest", "xdma.toml", *options, "--fail-on", "panic,model,oops,warn", "--", "sh", "-c", TESTS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Data check passed") == 4
    assert done.stdout.endswith("Info: All tests in run_tests.sh passed.\n")


def test_a_line_of_the_cards_logic(folder: Path, kernel: str) -> None:
    """A user interrupt reaches the program that waits for it."""
    wait = "dd if=/dev/xdma0_events_2 bs=4 count=1 2>/dev/null | hexdump -e '1/4 \"%u\\n\"' & sleep 1"
    raise_ = "tools/reg_rw /dev/xdma0_user 0x4 w 0x4 >/dev/null; wait"
    options = ["--kernel", kernel, "--run-dir", folder / "run", "--timeout", 60]
    done = vmodel(folder, "guest", "xdma.toml", *options, "--", "sh", "-c", f"{wait}; {raise_}")
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_faults(folder: Path, kernel: str) -> None:
    """The campaign, on one kernel: everything is as it expects, and so as docs/case-study.md says."""
    campaign = folder / "campaign.toml"
    campaign.write_text(campaign.read_text().replace('["stable", "backports"]', f'["{kernel}"]'))
    done = vmodel(folder, "campaign", campaign, "-j", "2", "--output", folder / f"{kernel}.runs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 of 5 runs are not as expected" in done.stdout + done.stderr
    results = [json.loads(path.read_text()) for path in (folder / f"{kernel}.runs").glob("*/result.json")]
    assert [result["check_status"] for result in results] == [0] * 5  # the next copy works
