from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.campaign.files import LAB, MACHINE, campaign_file
from tests.cli.commands import vmodel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: a machine, and the rig that runs cases on it without a guest."""
    (tmp_path / "edu.toml").write_text(MACHINE)
    shutil.copy(LAB, tmp_path / "lab.py")
    return tmp_path


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a campaign that has ended with every outcome; tests only read it."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "edu.toml").write_text(MACHINE)
    shutil.copy(LAB, folder / "lab.py")
    (folder / "all.toml").write_text(campaign_file())
    done = vmodel("campaign", "all.toml", "-j", "2", cwd=folder)
    assert done.returncode == 1, done.stderr
    return folder / "all.runs"
