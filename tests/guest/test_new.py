"""The first page of the documentation: a project from nothing, its driver in a stock guest."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import environ
from tests.guest.kernels import CHOSEN
from vmodel.patience import patience

pytestmark = pytest.mark.guest


def vmodel(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmodel", *arguments],
        cwd=cwd,
        env=environ(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=patience(400),
        check=False,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    done = vmodel("new", "mycard", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    return tmp_path / "mycard"


def test_a_new_project_passes(project: Path) -> None:
    """On all kernels: the driver is built for each, and the report has both releases."""
    done = vmodel("test", *(word for name in CHOSEN for word in ("--kernel", name)), cwd=project)
    assert done.returncode == 0, done.stdout
    assert len(re.findall(r"^driver: built for ", done.stdout, re.MULTILINE)) == len(CHOSEN)
    if len(CHOSEN) > 1:
        assert re.findall(r"^\S+  +(.*)$", done.stdout.partition(" kernels ")[2], re.MULTILINE) == ["7 passed"] * len(
            CHOSEN
        )
    assert not (project / "artifacts").exists()


def test_what_goes_wrong_is_seen(project: Path) -> None:
    """A driver that ignores the card's error, and one that does not compile."""
    driver = project / "driver" / "mycard.c"
    good = driver.read_text()
    driver.write_text(good.replace("card->status & MYCARD_STATUS_ERROR ? -EIO : 0", "0"))
    done = vmodel("test", "--kernel", CHOSEN[0], "--", "-k", "dma.read", cwd=project)
    assert done.returncode == 1 and "1 failed" in done.stdout
    assert (project / "artifacts").is_dir()
    driver.write_text(good.replace("complete(&card->done);", "complete(&card->gone);"))
    done = vmodel("test", "--kernel", CHOSEN[0], cwd=project)
    assert done.returncode == 2
    assert re.search(r"^driver/mycard.c:\d+:\d+: error: .* has no member named 'gone'", done.stdout, re.MULTILINE)
    assert "passed" not in done.stdout
