"""NVMe with stock kernels: their driver, file systems, fio, nvme-cli; plain and behind IOMMUs that they drive.

One guest for each kernel and IOMMU has all these tests; each of them leaves the controllers in order for the next.
"""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from tests.guest.kernels import CHOSEN
from tests.guest.nvme_rig import ADMIN, DATA, FILE, MEMORY, PORT, Rig, boot
from vmodel.patience import patience
from vmodel.span import MiB

pytestmark = pytest.mark.guest
ROOT = Path(__file__).parents[2]
#: fio: writes that are read again, with a checksum and a number in each block.
FIO = (
    "fio --minimal --ioengine=libaio --direct=1 --thread --group_reporting --rw=randwrite --verify=crc32c"
    " --verify_fatal=1"
)
PAIRS = [(kernel, kind) for kernel in CHOSEN for kind in (None, "virtio-iommu", "vt-d")]


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
        f"""
        written() {{ set -- $(cat /sys/block/{disk.removeprefix("/dev/")}/stat); echo $5; }}
        before=$(written)
        fio --minimal --ioengine=libaio --direct=1 --thread --name=v --filename={disk} --allow_file_create=0 \\
            --rw=randwrite --bs=4k --size=16M --iodepth=8 --time_based --runtime=100 >log 2>&1 &
        fio=$!
        while [ "$(written)" = "$before" ]; do sleep 0.1; done
        kill -0 $fio
        """
    )
    asyncio.run(_device_del(rig.guest.qmp, "nvme1"))
    # The port's button has been pressed: the guest waits 5 s in which one may press it again.
    rig.shell.run(f"for i in $(seq 150); do [ -e /sys/bus/pci/devices/{PORT} ] || break; sleep 0.1; done")
    rig.shell.fails("wait $fio")
    # The driver makes the disk empty before it is gone.
    assert re.search(r"Input/output error|No space left on device|No such device", rig.shell.run("cat log"))
    rig.shell.run(f"[ ! -e {disk} ] && [ ! -e /sys/bus/pci/devices/{PORT} ]")
    rig.shell.run(f"{FIO} --name=v --filename={rig.block(DATA, 2)} --bs=4k --size=1M --iodepth=8")


@pytest.mark.parametrize("kind", [None, "virtio-iommu", "vt-d"])
def test_warm_reboot(kind: str | None, kernel: str, tmp_path: Path, artifacts: Path) -> None:
    """The guest goes down just after a load of writes; what was flushed before is there when it is up again."""
    with boot(tmp_path, artifacts, kernel, kind, reboot=True) as rig:
        disk = rig.block(DATA, 1)
        rig.shell.run(f"dd if=/dev/urandom of={disk} bs=64k count=64 oflag=direct conv=fsync")
        before = rig.shell.run(f"dd if={disk} bs=64k count=64 iflag=direct 2>/dev/null | sha256sum")
        rig.shell.run(
            f"{FIO} --name=v --filename={rig.block(DATA, 2)} --bs=4k --size=16M --iodepth=16 --loops=100 >log 2>&1 &"
        )
        # The load ends first: Linux takes the virtio-iommu away before the disk, and a CPU that waits for an answer of
        # the IOMMU's then waits forever (see docs/drivers-under-faults.md; QEMU's devices show the same).
        rig.shell.start("sleep 1; kill $!; wait $!; reboot -f")
        rig.booted()
        disk = rig.block(DATA, 1)
        assert rig.shell.run(f"dd if={disk} bs=64k count=64 iflag=direct 2>/dev/null | sha256sum") == before
        rig.shell.run(f"{FIO} --name=v --filename={rig.block(DATA, 2)} --bs=4k --size=1M --iodepth=16")
        assert rig.guest.boots == 2
        for iommu in rig.machine.system.iommus:
            assert iommu.faults.total == 0, iommu.faults.peek()


async def _device_del(socket: Path, name: str) -> None:
    client = QMPClient("test")
    await client.connect(str(socket))
    try:
        await client.execute("device_del", {"id": name})
    finally:
        await client.disconnect()


# ---- the nvme command -----------------------------------------------------------------------------

#: A file of 4 KiB with random contents; ones and zeroes of the same size.
FILES = (
    "head -c 4096 /dev/urandom >random; head -c 4096 /dev/zero >zeroes; tr '\\000' '\\377' <zeroes >ones;"
    "printf 'image-2 ' >image; cat random random >>image; truncate -s 12K image"
)


@pytest.fixture
def admin(rig: Rig) -> Nvme:
    """The third controller."""
    rig.shell.run(FILES)
    return Nvme(rig)


class Nvme:
    """The nvme command on the controller for administration, and on its namespaces."""

    def __init__(self, rig: Rig) -> None:
        self.rig, self.shell = rig, rig.shell
        self.name = rig.controller(ADMIN)
        self.device = f"/dev/{self.name}"

    def __call__(self, command: str, arguments: str = "", nsid: int = 0) -> str:
        """Runs it on the controller, or a namespace; what it says."""
        return self.shell.run(self.line(command, arguments, nsid))

    def line(self, command: str, arguments: str = "", nsid: int = 0) -> str:
        device = self.rig.block(ADMIN, nsid) if nsid else self.device
        return f"nvme {command} {device} {arguments}"

    def fails(self, command: str, arguments: str, said: str, nsid: int = 0) -> None:
        """It must end with that status."""
        self.shell.fails(self.line(command, arguments, nsid), said)

    def json(self, command: str, arguments: str = "", nsid: int = 0) -> dict[str, Any]:
        found = json.loads(self(command, f"{arguments} -o json", nsid))
        assert isinstance(found, dict)
        return found

    def namespaces(self, arguments: str = "") -> list[int]:
        return [entry["nsid"] for entry in self.json("list-ns", arguments)["nsid_list"]]

    def holds(self, lba: int, file: str, nsid: int = 1) -> None:
        """8 blocks of 512 bytes, or one of 4096, are equal to a file of the guest's."""
        self("read", f"-s {lba} -c {7 if nsid == 1 else 0} -z 4096 -d read", nsid)
        self.shell.run(f"cmp read {file}")

    def write(self, lba: int, file: str, nsid: int = 1) -> None:
        self("write", f"-s {lba} -c {7 if nsid == 1 else 0} -z 4096 -d {file}", nsid)


#: Where 8 blocks are in arguments of most commands.
BLOCKS = "-s 64 -c 7"


def test_list_and_identify(admin: Nvme) -> None:
    found = json.loads(admin.shell.run("nvme list -o json"))["Devices"]
    ours = {entry["NameSpace"]: entry for entry in found if entry["SerialNumber"] == "ADMIN"}
    assert {nsid: (entry["PhysicalSize"], entry["SectorSize"]) for nsid, entry in ours.items()} == {
        1: (32 * MiB, 512),
        2: (16 * MiB, 4096),
    }
    assert {(entry["ModelNumber"], entry["Firmware"]) for entry in ours.values()} == {("A model", "1.5")}
    identity = admin.json("id-ctrl")
    assert [identity[key].strip() for key in ("sn", "mn", "fr")] == ["ADMIN", "A model", "1.5"]
    assert (identity["sqes"], identity["cqes"], identity["ver"] >> 8) == (0x66, 0x44, 0x104)
    # Security is absent; format, firmware, namespaces, self-test are there.
    assert identity["oacs"] & 0x1F == 0x1E
    # Compare, write uncorrectable, dataset management, write zeroes, verify, copy.
    assert identity["oncs"] & 0x18F == 0x18F
    assert identity["tnvmcap"] == 112 * MiB and identity["unvmcap"] == 64 * MiB
    assert identity["sanicap"] & 7
    block = admin.json("id-ns", nsid=2)
    assert (block["nsze"] * 4096, [1 << f["ds"] for f in block["lbafs"]], block["flbas"]) == (16 * MiB, [512, 4096], 1)


def test_smart_log_counts(admin: Nvme) -> None:
    before = admin.json("smart-log")
    for n in range(3):
        admin.write(8 * n, "random")
        admin.holds(8 * n, "random")
    after = admin.json("smart-log")
    for key in ("host_read_commands", "host_write_commands"):
        assert after[key] == before[key] + 3, key
    # In 1000 times 512 bytes, rounded up.
    admin.shell.run(f"dd if=/dev/zero of={admin.rig.block(ADMIN, 1)} bs=64k count=32 oflag=direct")
    assert 4 <= admin.json("smart-log")["data_units_written"] - after["data_units_written"] <= 5
    assert after["critical_warning"] == 0 and 273 < after["temperature"] < 373


def test_error_log(admin: Nvme) -> None:
    before = admin.json("smart-log")["num_err_log_entries"]
    admin.fails("read", "-s 0x10000 -c 7 -z 4096 -d read", "LBA Out of Range", nsid=1)
    last = admin.json("error-log", "-e 4")["errors"][0]
    # The status field: code 80h, type 0; do not retry.
    assert (last["status_field"] & 0x7FF, last["nsid"], last["lba"]) == (0x80, 1, 0x10000)
    assert admin.json("smart-log")["num_err_log_entries"] == last["error_count"] == before + 1


def test_features(admin: Nvme) -> None:
    def current(feature: int) -> int:
        return int(admin("get-feature", f"-f {feature}").rpartition("value:")[2], 16)

    assert current(7) == 0x0001_0001  # two queues of each kind, counted from 0
    threshold = current(4)
    admin("set-feature", "-f 4 --value=0x150")
    assert current(4) == 0x150
    admin("set-feature", f"-f 4 --value={threshold:#x}")
    assert current(6) == 1
    admin("set-feature", "-f 6 --value=0")
    assert current(6) == 0
    admin("set-feature", "-f 6 --value=1")
    admin.fails("get-feature", "-f 0x77", "Invalid Field in Command")
    # Newer kernels do not even pass that on.
    admin.fails("set-feature", "-f 7 --value=0", "Command Sequence Error|Permission denied")


def test_flush_compare_write_zeroes_and_deallocate(admin: Nvme) -> None:
    for nsid in (1, 2):
        where = f"-s 64 -c {7 if nsid == 1 else 0}"
        admin.write(64, "random", nsid)
        assert "success" in admin("flush", nsid=nsid)
        admin("compare", f"{where} -z 4096 -d random", nsid)
        admin.fails("compare", f"{where} -z 4096 -d ones", "Compare Failure", nsid)
        admin("verify", where, nsid)
        admin("write-zeroes", where, nsid)
        admin.holds(64, "zeroes", nsid)
        admin.write(64, "ones", nsid)
        admin("dsm", f"--ad --slbs=64 --blocks={8 if nsid == 1 else 1}", nsid)
        admin.holds(64, "zeroes", nsid)


def test_write_uncorrectable(admin: Nvme) -> None:
    """Reads, compares and verifies fail until the blocks are written again."""
    admin("write-uncor", BLOCKS, 1)
    for command in ("read", "compare"):
        admin.fails(command, f"{BLOCKS} -z 4096 -d ones", "Unrecovered Read Error", 1)
    admin.fails("verify", BLOCKS, "Unrecovered Read Error", 1)
    admin.write(64, "random")
    admin.holds(64, "random")


def test_copy(admin: Nvme) -> None:
    admin.write(64, "random")
    admin.write(128, "ones")
    admin("copy", "--sdlba=256 --slbs=64,128 --blocks=7,7 --format=0", 1)
    admin.holds(256, "random")
    admin.holds(264, "ones")


def test_firmware(admin: Nvme) -> None:
    assert "(1.5" in admin("fw-log")
    admin("fw-download", "-f image")
    admin("fw-commit", "-s 2 -a 1")
    log = admin("fw-log")
    assert re.search(r"frs1.*\(1\.5", log) and re.search(r"frs2.*\(image-2", log), log
    assert admin.json("id-ctrl")["fr"].strip() == "1.5"
    admin("reset")
    assert admin.json("id-ctrl")["fr"].strip() == "image-2"
    admin("fw-commit", "-s 1 -a 2")
    admin("reset")
    assert admin.json("id-ctrl")["fr"].strip() == "1.5"
    admin.fails("fw-commit", "-s 7 -a 2", "Invalid Firmware Slot")


def test_subsystem_reset(admin: Nvme) -> None:
    """Where a parameter offers it; the driver notices it by the controller reset that follows (docs/nvme.md)."""
    admin.shell.fails(f"nvme subsystem-reset /dev/{admin.rig.controller(DATA)}")
    admin.write(64, "random")
    admin("subsystem-reset")
    admin("reset")
    assert admin.shell.run(f"cat /sys/class/nvme/{admin.name}/state") == "live\n"
    admin.holds(64, "random")


def test_namespace_management(admin: Nvme) -> None:
    assert admin.namespaces() == [1, 2]
    controller = admin.json("id-ctrl")["cntlid"]
    made = re.search(r"created nsid:(\d+)", admin("create-ns", "--nsze=2048 --ncap=2048 --flbas=1"))
    assert made is not None
    nsid = int(made[1])
    assert admin.json("id-ctrl")["unvmcap"] == 56 * MiB
    assert (admin.namespaces(), admin.namespaces("-a")) == ([1, 2], [1, 2, nsid])
    admin("attach-ns", f"-n {nsid} -c {controller}")
    assert admin.namespaces() == [1, 2, nsid]
    name = admin.rig.block(ADMIN, nsid).removeprefix("/dev/")
    assert admin.shell.run(f"cat /sys/block/{name}/size /sys/block/{name}/queue/logical_block_size").split() == [
        "16384",
        "4096",
    ]
    admin.shell.run(f"{FIO} --name=v --filename=/dev/{name} --bs=16k --size=1M --iodepth=8")
    admin("detach-ns", f"-n {nsid} -c {controller}")
    assert (admin.namespaces(), admin.namespaces("-a")) == ([1, 2], [1, 2, nsid])
    admin.shell.run(f"[ ! -e /sys/block/{name} ]")
    admin("delete-ns", f"-n {nsid}")
    assert admin.namespaces("-a") == [1, 2]
    assert admin.json("id-ctrl")["unvmcap"] == 64 * MiB
    admin.fails("create-ns", "--nsze=0x1000000 --ncap=0x1000000 --flbas=0", "Namespace Insufficient Capacity")


def test_format(admin: Nvme) -> None:
    """Another size of blocks, which the driver sees at once; and back."""
    admin.write(64, "random")
    name = admin.rig.block(ADMIN, 1).removeprefix("/dev/")
    for number, lba in ((1, 4096), (0, 512)):
        admin("format", f"--lbaf={number} --force", 1)
        found = admin.shell.run(f"cat /sys/block/{name}/size /sys/block/{name}/queue/logical_block_size")
        assert [int(line) for line in found.split()] == [32 * MiB // 512, lba]
        assert admin.json("id-ns", nsid=1)["flbas"] == number
    admin.holds(64, "zeroes")


def test_self_test(admin: Nvme) -> None:
    for code in (1, 2):
        admin("device-self-test", f"-n 0xffffffff -s {code}")
        log = until(lambda: admin.json("self-test-log"), lambda log: not log["Current Device Self-Test Operation"])
        result = log["List of Valid Reports"][0]
        assert (result["Self test result"], result["Self test code"]) == (0, code)


def test_sanitize(admin: Nvme) -> None:
    for nsid in (1, 2):
        admin.write(64, "random", nsid)
    for action in ("start-block-erase", "start-crypto-erase", "start-overwrite --owpass=1 --ovrpat=0xffffffff"):
        admin("sanitize", f"-a {action}")
        log = until(lambda: admin.json("sanitize-log")[admin.name], lambda log: log["sprog"] == 65535)
        assert log["sstat"]["status"].startswith("(1) Most Recent Sanitize Command Completed Successfully"), log
        for nsid in (1, 2):
            admin.holds(64, "ones" if "overwrite" in action else "zeroes", nsid)


def until(ask: Callable[[], dict[str, Any]], what: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Asks until the answer is right; at most 10 s."""
    deadline = time.monotonic() + patience(10)
    while not what(found := ask()):
        assert time.monotonic() < deadline, found
    return found


# ---- afterwards -----------------------------------------------------------------------------------


def test_nothing_went_wrong_unseen(rig: Rig) -> None:
    """After all that: no timeouts in the guest's log, and no DMA where the guest had not mapped it."""
    log = rig.shell.run("dmesg")
    bad = r"I/O tag|timeout|timed out|I/O error|controller is down|Oops|WARNING|BUG:|DMAR:.*fault|page fault from EP"
    lines = [line for line in log.splitlines() if re.search(bad, line)]
    # The disk that was pulled out may be mentioned.
    assert [line for line in lines if PORT not in line and "nvme1n1" not in line] == []
    for iommu in rig.machine.system.iommus:
        assert iommu.faults.total == 0, iommu.faults.peek()
