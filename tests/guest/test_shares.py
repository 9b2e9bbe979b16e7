"""A folder of the host in a guest: what changes on one side is seen on the other, without a boot."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.guest.kernels import CHOSEN
from vmodel.errors import ConfigError
from vmodel.guest.artifacts import CLOUD, Kernel, find_kernel
from vmodel.guest.booted import BootedGuest
from vmodel.guest.initramfs import build as build_initramfs
from vmodel.guest.kbuild import build
from vmodel.guest.running import GuestSpec, ShareError, run_guest
from vmodel.guest.shares import Share

pytestmark = pytest.mark.guest
SOURCE = Path(__file__).parent / "driver"


@pytest.mark.parametrize("kernel", [name for name in CHOSEN if name != CLOUD])
def test_a_module_is_replaced_without_a_boot(kernel: str, tmp_path: Path) -> None:
    """rmmod in the guest, make on the host, insmod in the guest."""
    source, found = Path(shutil.copytree(SOURCE, tmp_path / "driver")), find_kernel(kernel)
    results = tmp_path / "results"
    results.mkdir()
    build(source, found, tmp_path / "build")
    shares = [Share(tmp_path / "build", "/root/build"), Share(results, "/opt/results", writable=True)]
    with BootedGuest(GuestSpec(command="", kernel=found, shares=shares)) as guest:
        insmod = "insmod build/$(uname -r)/factorial.ko && cat /sys/module/factorial/parameters/*"
        assert guest.run(insmod).output == b"4\n"
        main = source / "main.c"
        main.write_text(main.read_text().replace("number = 4;", "number = 5;"))
        build(source, found, tmp_path / "build")
        assert guest.run(f"rmmod factorial && {insmod}").output == b"5\n"
        assert guest.run("echo x > build/x").status == 1 and not (tmp_path / "build" / "x").exists()
        assert guest.run("lsmod > /opt/results/lsmod").status == 0
    assert "factorial" in (results / "lsmod").read_text()


def test_a_share_that_cannot_be_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends, with the folder's name: the command would not find its files."""

    def without(kernel: Kernel, *arguments: object) -> bytes:
        return build_initramfs(kernel, *arguments).replace(b"mount -t 9p", b"mount -t 9q")  # type: ignore[arg-type]

    monkeypatch.setattr("vmodel.guest.initramfs.build", without)
    with pytest.raises(ShareError, match=f"the folder {tmp_path} was not mounted at /opt/x"):
        run_guest(GuestSpec(command="true", shares=[Share(tmp_path, "/opt/x")]))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    """Linux would panic: it unpacks them into at most half of the memory that is left beside them."""
    (tmp_path / "large").write_bytes(bytes(180 << 20))
    with pytest.raises(ConfigError, match="more than a third of its memory, 512 MiB: give it more, or share a folder"):
        run_guest(GuestSpec(command="true", files=[tmp_path / "large"]))
