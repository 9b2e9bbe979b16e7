"""NVMe with stock kernels: their driver, file systems, fio, nvme-cli; plain and behind IOMMUs that they drive.

One guest for each kernel and IOMMU has all these tests; each of them leaves the controllers in order for the next.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from qemu.qmp import QMPClient

from tests.guest.nvme_rig import ADMIN, DATA, FILE, MEMORY, PORT, Rig, boot
from vmodel.span import MiB
from vmodel.testing.artifacts import KERNELS

pytestmark = pytest.mark.guest
ROOT = Path(__file__).parents[2]
#: fio: writes that are read again, with a checksum and a number in each block.
FIO = (
    "fio --minimal --ioengine=libaio --direct=1 --thread --group_reporting --rw=randwrite --verify=crc32c"
    " --verify_fatal=1"
)
PAIRS = [(kernel, kind) for kernel in KERNELS for kind in (None, "virtio-iommu", "vt-d")]


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1] or 'plain'}")
def rig(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """A guest that has booted; its logs are kept if a test fails."""
    folder = tmp_path_factory.mktemp("nvme")
    failed = request.session.testsfailed
    try:
        with boot(folder, folder / "logs", *request.param) as made:
            yield made
    finally:
        if request.session.testsfailed > failed:
            kept = ROOT / "artifacts" / f"nvme-{'-'.join(filter(None, request.param))}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(folder / "logs", kept)


def used(path: Path) -> int:
    """Bytes of a sparse file."""
    return path.stat().st_blocks * 512


# ---- data -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("nsid", "size", "lba"), [(1, FILE, 512), (2, MEMORY, 4096)])
def test_namespaces(rig: Rig, nsid: int, size: int, lba: int) -> None:
    block = rig.block(DATA, nsid)
    name = block.removeprefix("/dev/")
    queue = rig.shell.run(f"cd /sys/block/{name} && cat size queue/logical_block_size ro; cd")
    assert [int(line) for line in queue.split()] == [size // 512, lba, 0]
    found = rig.json(f"id-ns {block}")
    assert (found["nsze"], found["ncap"]) == (size // lba, size // lba)
    assert [1 << format_["ds"] for format_ in found["lbafs"]] == [512, 4096]
    assert (1 << found["lbafs"][found["flbas"] & 15]["ds"], found["lbafs"][0]["ms"]) == (lba, 0)


def test_filesystem_and_trim(rig: Rig) -> None:
    """What is copied there is there after a remount, and fsck finds nothing; trimmed blocks leave the file."""
    disk, image = rig.block(DATA, 1), rig.folder / "disk.img"
    rig.shell.run(f"echo ',,L' | sfdisk -q {disk} && mkfs.ext4 -q {disk}p1 && mkdir -p /mnt && mount {disk}p1 /mnt")
    empty = used(image)
    rig.shell.run("cp -r /usr/lib /mnt/tree && umount /mnt")
    full = used(image)
    assert full > empty + 40 * MiB
    assert "clean" in rig.shell.run(f"e2fsck -fn {disk}p1 && e2fsck -n {disk}p1")
    rig.shell.run(f"mount {disk}p1 /mnt && diff -r /usr/lib /mnt/tree")
    assert re.search(r"[1-9]\d+ bytes trimmed", rig.shell.run("rm -r /mnt/tree && sync && fstrim -v /mnt"))
    rig.shell.run(f"umount /mnt && e2fsck -fn {disk}p1")
    assert used(image) < empty + 10 * MiB


@pytest.mark.parametrize("nsid", [1, 2])
@pytest.mark.parametrize(
    "how",
    [
        "--bs=4k --size=1M --iodepth=1",
        "--bsrange=4k-64k --size=2M --iodepth=16 --numjobs=4 --offset_increment=2M",
        "--bssplit=4k/60:16k/20:128k/20 --size=512k --iodepth=64 --numjobs=16 --offset_increment=512k",
        "--bs=1M --size=4M --iodepth=4",
    ],
)
def test_verify(rig: Rig, nsid: int, how: str) -> None:
    """Blocks of 4 KiB to 1 MiB, 1 to 16 jobs, queues 1 to 64 deep."""
    rig.shell.run(f"{FIO} --name=v --filename={rig.block(DATA, nsid)} {how}")


RESETS = {
    "controller": "/sys/class/nvme/$name/reset_controller",
    "function": f"/sys/bus/pci/devices/{DATA}/reset",
}


@pytest.mark.parametrize("what", RESETS)
def test_resets_under_load(rig: Rig, what: str) -> None:
    """The driver repeats what was under way: nothing may be lost, and nothing old may come back."""
    if what == "function":
        methods = rig.shell.run(f"cat /sys/bus/pci/devices/{DATA}/reset_method")
        assert methods.split()[0] == "flr"
    output = rig.shell.run(
        f"""
        name=$(controller {DATA}); resets=0
        {FIO} --name=v --filename={rig.block(DATA, 2)} --filename={rig.block(DATA, 1)} --bsrange=4k-64k --size=6M \\
            --iodepth=16 --numjobs=4 --offset_increment=6M --loops=3 >log 2>&1 &
        fio=$!
        while kill -0 $fio 2>/dev/null; do
            sleep 0.2
            echo 1 >{RESETS[what]} && resets=$((resets + 1))
        done
        wait $fio; status=$?
        [ $status = 0 ] || cat log
        echo $resets resets, now $(cat /sys/class/nvme/$name/state)
        (exit $status)
        """,
        120,
    )
    found = re.search(r"^(\d+) resets, now live$", output, re.MULTILINE)
    assert found is not None and int(found[1]) >= 3, output


def test_hot_remove_under_load(rig: Rig) -> None:
    """A controller with MSI goes while fio writes: fio gets errors, the guest lives on, other controllers too."""
    disk = rig.block(PORT, 1)
    rig.shell.run(f"{FIO} --name=v --filename={disk} --bs=4k --size=1M --iodepth=8")
    rig.shell.run(
        f"fio --minimal --ioengine=libaio --direct=1 --thread --name=v --filename={disk} --rw=randwrite --bs=4k"
        " --size=16M --iodepth=8 --time_based --runtime=100 >log 2>&1 & fio=$!; sleep 0.5; kill -0 $fio"
    )
    asyncio.run(_device_del(rig.guest.qmp, "nvme1"))
    # The port's button has been pressed: the guest waits 5 s in which one may press it again.
    rig.shell.run(f"for i in $(seq 150); do [ -e /sys/bus/pci/devices/{PORT} ] || break; sleep 0.1; done")
    rig.shell.fails("wait $fio")
    # The driver makes the disk empty before it is gone.
    assert re.search(r"Input/output error|No space left on device|No such device", rig.shell.run("cat log"))
    rig.shell.run(f"[ ! -e {disk} ] && [ ! -e /sys/bus/pci/devices/{PORT} ]")
    rig.shell.run(f"{FIO} --name=v --filename={rig.block(DATA, 2)} --bs=4k --size=1M --iodepth=8")


async def _device_del(socket: Path, name: str) -> None:
    client = QMPClient("test")
    await client.connect(str(socket))
    try:
        await client.execute("device_del", {"id": name})
    finally:
        await client.disconnect()
