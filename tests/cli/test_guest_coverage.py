"""What `vmodel guest --coverage` says about modules of which nothing ran, and about source lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.coverage.card import CLEAN, card, with_lines
from vmodel.cli import guest_coverage
from vmodel.cli.guest import first_step
from vmodel.cli.guest_coverage import hints
from vmodel.coverage.comparison import Comparison
from vmodel.coverage.coverage import Coverage
from vmodel.guest.artifacts import FETCH_COMMAND, Kernel
from vmodel.guest.running import GuestSpec


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Has the modules card and lined, and no debug information."""
    for name in ("card", "lined"):
        (tmp_path / f"{name}.ko.xz").touch()
    found = Kernel("6.12.1", tmp_path / "vmlinuz", tmp_path)
    monkeypatch.setattr(guest_coverage, "find_kernels", lambda: {"stable": found})
    monkeypatch.setattr(guest_coverage, "find_debug", lambda *_: None)
    return found


def test_a_module_that_was_not_loaded(kernel: Kernel) -> None:
    none = Comparison(Coverage.of_ranges(card(), []))
    said = "card: nothing of it ran: the guest did not load it; --module card does, at boot"
    assert list(hints(none, kernel)) == [said]


def test_source_lines_that_can_be_fetched(kernel: Kernel) -> None:
    said = f"for source lines, once (1 GB): {FETCH_COMMAND} --kernel stable --debug-symbols card"
    assert list(hints(Comparison(CLEAN), kernel)) == [said]
    assert list(hints(with_lines(), kernel)) == []


def test_source_lines_of_other_kernels_and_modules(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(hints(Comparison(CLEAN), None)) == []
    (kernel.modules or Path()).joinpath("card.ko.xz").unlink()
    assert list(hints(Comparison(CLEAN), kernel)) == []
    monkeypatch.setattr(guest_coverage, "find_kernels", dict)
    assert list(hints(Comparison(CLEAN), kernel)) == []


def test_a_build_is_not_called_a_boot(tmp_path: Path) -> None:
    (tmp_path / "driver").mkdir()
    built = GuestSpec(command=["true"], modules=["nvme"], extra_modules=[f"{tmp_path}/driver/"])
    assert first_step(built, "6.12.1") == f"building {tmp_path}/driver/ for 6.12.1"
    assert first_step(GuestSpec(command=["true"], modules=["nvme"]), "6.12.1") == "booting 6.12.1"
