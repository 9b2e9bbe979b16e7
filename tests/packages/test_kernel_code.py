"""Whether a guest has the code whose coverage is wanted: it is said before the guest boots."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.packages.module_files import RELEASE, elf, kernel_with
from vmodel.coverage.errors import CoverageError
from vmodel.guest import kernel_code
from vmodel.guest.artifacts import Kernel
from vmodel.guest.kernel_code import check_target


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return kernel_with(tmp_path / "modules", {"nvme.ko": elf()}, builtin="kernel/drivers/virtio/virtio-pci.ko\n")


@pytest.fixture
def builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The source folders that were built; each has the module `card`."""
    built: list[str] = []

    def files_of(entries: Iterable[str], kernel: Kernel) -> dict[str, Path | None]:
        built.extend(entries)
        return {"card": Path("card.ko")} if built else {}

    monkeypatch.setattr(kernel_code, "files_of", files_of)
    (tmp_path / "driver").mkdir()
    return built


def test_what_is_there(kernel: Kernel, tmp_path: Path, builds: list[str]) -> None:
    check_target("nvme", kernel)
    check_target("./any.ko", kernel)
    check_target("my-own", kernel, ["other", "build/my-own.ko", f"{tmp_path}/driver"])
    assert builds == []
    check_target("card", kernel, ["other", f"{tmp_path}/driver"])
    assert builds == [f"{tmp_path}/driver"]


@pytest.mark.parametrize(
    ("target", "modules", "says"),
    [
        (
            "nvmee",
            [],
            f"kernel {RELEASE} has no module 'nvmee': did you mean 'nvme'? write vmlinux:PREFIX for code that is"
            " built in",
        ),
        (
            "virtio-pci",
            [],
            f"virtio_pci is built into kernel {RELEASE}: write vmlinux:PREFIX, with which its functions begin",
        ),
        (
            "qcrad",
            ["driver", "x/zz.ko"],
            "no module 'qcrad': did you mean 'card', which the guest loads?",
        ),
        (
            "scsi",
            ["driver", "x/zz.ko"],
            f"kernel {RELEASE} has no module 'scsi': write vmlinux:PREFIX for code that is built in; the guest's"
            " own modules are card, zz",
        ),
    ],
)
def test_what_is_not_there(
    kernel: Kernel, tmp_path: Path, builds: list[str], target: str, modules: list[str], says: str
) -> None:
    with pytest.raises(CoverageError) as error:
        check_target(target, kernel, [f"{tmp_path}/{entry}" for entry in modules])
    assert str(error.value) == says
