"""`Target`: what a user may write."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmodel.coverage.errors import CoverageError
from vmodel.coverage.target import Target


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("nvme", Target("nvme")),
        ("nvme-core", Target("nvme_core")),
        ("vmlinux:intel_iommu", Target("vmlinux:intel_iommu", "intel_iommu")),
        ("./own/my-card.ko", Target("my_card", file=Path("own/my-card.ko"))),
        ("card.ko", Target("card", file=Path("card.ko"))),
    ],
)
def test_targets(text: str, target: Target) -> None:
    assert Target.parse(text) == target
    assert target.kernel == text.startswith("vmlinux:")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("", "vmlinux:PREFIX"),
        ("nvme core", "vmlinux:PREFIX"),
        ("nvme:probe", "vmlinux:PREFIX"),
        ("x" * 56, "vmlinux:PREFIX"),
        ("\x1b[2J", "vmlinux:PREFIX"),
        ("vmlinux", "vmlinux:pci_"),
        ("vmlinux:", "pci_"),
        ("vmlinux:a b", "pci_"),
        ("vmlinux:" + "x" * 200, "pci_"),
        ("driver/", "NAME.ko"),
        ("driver/card.c", "NAME.ko"),
        ("driver/.ko", "NAME.ko"),
        ("a\nb/card.o", "NAME.ko"),
    ],
)
def test_others_are_refused_with_what_would_be_right(text: str, right: str) -> None:
    with pytest.raises(CoverageError) as error:
        Target.parse(text)
    assert right in str(error.value)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
