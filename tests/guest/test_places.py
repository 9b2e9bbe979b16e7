"""An oops or a WARN in a module names file and line of its source: on the terminal, in logs and in reports."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import EXAMPLE, environ, vmodel
from tests.guest.kernels import CHOSEN
from vmodel.guest.artifacts import CLOUD, find_kernel
from vmodel.guest.booted import BootedGuest
from vmodel.guest.kbuild import build
from vmodel.guest.running import GuestSpec
from vmodel.guest.shares import Share
from vmodel.patience import patience

pytestmark = pytest.mark.guest
SOURCE = Path(__file__).parent / "broken" / "driver"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(SOURCE, tmp_path / "broken")
    (tmp_path / "edu.toml").write_text(EXAMPLE.read_text())
    return tmp_path


def line_of(what: str) -> str:
    """The file and line that has this comment."""
    text = (SOURCE / "broken.c").read_text().splitlines()
    return f"broken/broken.c:{next(n for n, line in enumerate(text, 1) if f'/* {what} */' in line)}"


@pytest.mark.parametrize("kernel", [name for name in CHOSEN if name != CLOUD])
def test_on_the_terminal(kernel: str, folder: Path) -> None:
    """A WARN is printed at all, though the console of a guest has errors only: the module is the user's."""
    script = "for how in warn oops; do (echo $how > /sys/module/broken/parameters/how); done; true"
    line = [sys.executable, "-m", "vmodel", "guest", "edu.toml", "--run-dir", "run", "--kernel", kernel]
    done = subprocess.run(
        [*line, "--module", "broken/", "--", "sh", "-c", script],
        cwd=folder,
        env=environ(),
        capture_output=True,
        text=True,
        timeout=patience(120),
    )
    said = done.stderr.splitlines()
    assert any("RIP: 0010:broken_check+" in line and line.endswith(f" ({line_of('the warning')})") for line in said)
    assert any("RIP: 0010:broken_read" in line and line.endswith(f" ({line_of('the oops')})") for line in said)
    assert any("]  broken_check+" in line and line.endswith(f" ({line_of('the call')})") for line in said)
    (oops,) = (line for line in said if line.startswith("vmodel: kernel oops: "))
    assert oops.endswith(f" ({line_of('the oops')})")
    assert done.returncode == 72


def test_a_module_from_a_shared_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No option names it: its file is found in the folder that insmod has it from."""
    monkeypatch.chdir(folder)
    kernel = find_kernel(CHOSEN[0])
    build(folder / "broken", kernel, folder / "build")
    with BootedGuest(GuestSpec(command="", kernel=kernel, shares=[Share(folder / "build", "/root/build")])) as guest:
        done = guest.run("insmod build/*/broken.ko; echo warn > /sys/module/broken/parameters/how")
        assert done.status == 0, done.output
        assert f" ({line_of('the warning')})" in guest.guest.places.in_text(guest.dmesg())


def test_in_a_campaign(folder: Path) -> None:
    """Modules are built for the campaign, from its `modules`; the report and its logs name the source."""
    (folder / "broken.campaign.toml").write_text(
        """
[campaign]
name = "broken"
kernels = ["stable"]
seeds = [1]
[[machine]]
file = "edu.toml"
modules = ["broken/"]
[[workload]]
name = "oops"
run = "echo oops > /sys/module/broken/parameters/how"
[[plan]]
name = "lost"
faults = ["dma.write nth=1 do=drop"]
"""
    )
    line = [sys.executable, "-m", "vmodel", "campaign", "broken.campaign.toml", "-o", "runs"]
    ran = subprocess.run(line, cwd=folder, env=environ(), capture_output=True, timeout=patience(240), check=False)
    assert ran.returncode in (0, 1), ran.stderr
    said = json.loads(vmodel("report", "runs", "--format", "json", cwd=folder).stdout)
    oops = [one for one in said["signatures"] if one["signature"].startswith("oops: ")]
    assert oops and oops[0]["example"].endswith(f"({line_of('the oops')})"), said["signatures"]
    log = (folder / said["runs"][0]["artefacts"]["kernel log"]).read_text()
    assert f"({line_of('the oops')})\n" in log and f"({line_of('the call')})\n" in log


def test_in_a_test_that_fails(folder: Path) -> None:
    """pytest's report has what the kernel said, be it of a guest that has ended."""
    (folder / "tests").mkdir()
    (folder / "tests" / "test_it.py").write_text(
        """
import pytest

pytestmark = [pytest.mark.machine("../edu.toml"), pytest.mark.guest(modules=["../broken/"])]
OOPS = "echo oops > /sys/module/broken/parameters/how"


def test_runs(vm_booted):
    assert vm_booted.run(OOPS).status == 0


def test_ended(vm):
    with vm.boot() as guest:
        guest.run(OOPS)
    assert 0
"""
    )
    line = [sys.executable, "-m", "pytest", "-q", "tests"]
    ran = subprocess.run(line, cwd=folder, env=environ(), capture_output=True, text=True, timeout=patience(240))
    said = [line for line in ran.stdout.splitlines() if line.startswith("BUG: kernel NULL pointer dereference")]
    assert ran.returncode == 1 and len(said) == 2, ran.stdout
    assert all(line.endswith(f" ({line_of('the oops')})") for line in said), said
    assert ran.stdout.count("- the guest's kernel -") == 2
