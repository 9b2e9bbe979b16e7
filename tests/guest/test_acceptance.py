"""Both IOMMUs that stock kernels drive, by what a user does with them: drivers, VFIO, reboots, hot-plug, mixtures."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from tests.guest.kernels import WITH_CLOUD, is_there
from tests.guest.rng import MARK
from tests.waiting import until
from vmodel.guest.artifacts import CLOUD, STABLE, find_kernel
from vmodel.guest.running import Guest, GuestResult, GuestSpec
from vmodel.iommu.domain import DomainType
from vmodel.machine import Machine, parse
from vmodel.memory import shared_files
from vmodel.qemu import device_args

pytestmark = pytest.mark.guest
Compiled = Callable[[str], Path]
PROGRAM = "examples/vfio_edu.c"
VFIO = ["vfio_iommu_type1", "vfio-pci"]
MEMORY = 512 << 20

MODULES: dict[str, list[str]] = {"virtio-iommu": ["virtio_iommu"], "vt-d": []}
#: What the kernel's line about a fault begins with.
SAID = {"virtio-iommu": "virtio_iommu virtio0: page fault", "vt-d": "DMAR: [DMA"}

HEAD = """
[machine]
name = "m"
memory = "512M"
"""
IOMMU = """
[[iommu]]
name = "{name}"
kind = "{kind}"
address = "{address}"
covers = ["{covers}"]
"""
EDU = """
[[device]]
name = "{name}"
model = "edu"
address = "{address}"
params = {{ dma_mask = 0xffff_ffff_ffff }}
"""


@pytest.fixture(params=["virtio-iommu", "vt-d"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def one_iommu(kind: str, more: str = "", covers: str = "0000") -> str:
    return HEAD + IOMMU.format(name="iommu0", kind=kind, address="0000:00:02.0", covers=covers) + more


EDU0 = EDU.format(name="edu0", address="0000:00:03.0")


@pytest.fixture(params=WITH_CLOUD)
def kernel(request: pytest.FixtureRequest) -> str:
    """Each of the guest kernels, and Debian's for virtual machines, if it is there."""
    if request.param == CLOUD and not is_there(CLOUD):
        pytest.skip(f"no cloud kernel in the cache: scripts/get-qemu --kernel {CLOUD}")
    return str(request.param)


class Runs:
    """Serves machines and boots guests with them."""

    def __init__(self, folder: Path, artifacts: Path, program: Path) -> None:
        self.folder, self.artifacts, self.program = folder, artifacts, program

    @contextmanager
    def __call__(
        self,
        text: str,
        kernel: str,
        command: str,
        modules: Sequence[str],
        *,
        without: str = "",
        first: Sequence[str] = (),
        **spec: Any,
    ) -> Iterator[tuple[Machine, Guest]]:
        """`without`: a device that is served but not plugged in; `first`: arguments of QEMU's before ours."""
        machine = parse(text, Path(__file__).parent / "m.toml")
        try:
            with machine.serve(self.folder):
                args = machine.qemu_args(self.folder)
                if without:
                    unwanted = next(n for n, arg in enumerate(args) if f'"id": "{without}"' in arg)
                    del args[unwanted - 1 : unwanted + 1]
                made = GuestSpec(
                    command=command,
                    kernel=find_kernel(kernel),
                    modules=modules,
                    files=[self.program],
                    qemu_args=[*first, *args],
                    **spec,
                )
                with Guest(made, artifacts=self.artifacts) as guest:
                    yield machine, guest
        finally:
            machine.close()


@pytest.fixture
def run(tmp_path: Path, artifacts: Path, compiled: Compiled) -> Runs:
    return Runs(tmp_path, artifacts, compiled(PROGRAM))


def off_in_time(guest: Guest) -> GuestResult:
    """The command ends now, and the guest powers off by itself."""
    result = guest.wait()
    assert result.powered_off
    return result


# ---- drivers that use the DMA API ---------------------------------------------------------------

RNG = """
[[device]]
name = "rng0"
model = "rng.py:Rng"
address = "0000:00:03.0"
"""


#: A device that waits for its IOMMU is probed some time after that is there.
RNG_IS_THERE = "for i in $(seq 200); do grep -q virtio /sys/class/misc/hw_random/rng_current && break; sleep 0.1; done;"
TYPES = [("", "DMA-FQ"), ("iommu.strict=1", "DMA"), ("iommu=pt", "identity")]


@pytest.mark.parametrize(("append", "type_"), TYPES)
def test_a_stock_driver(run: Runs, kind: str, kernel: str, append: str, type_: str) -> None:
    """virtio-rng, which asks the DMA API for addresses: by IOVAs of the kernel's, or by physical addresses."""
    script = (
        "cat /sys/bus/pci/devices/0000:00:03.0/iommu_group/type;"
        f"{RNG_IS_THERE} cat /sys/class/misc/hw_random/rng_current;"
        "dd if=/dev/hwrng bs=64 count=200 2>/dev/null; read go"
    )
    with run(one_iommu(kind, RNG), kernel, script, [*MODULES[kind], "virtio-rng"], append=append) as (machine, guest):
        guest.expect(rb"virtio_rng\.0\n")
        got = guest.expect(rb"(?s)(.{12800})")[1]
        group = machine.system["rng0"].group
        assert group is not None
        domain = group.domain.type
        guest.send(b"\n")
        result = off_in_time(guest)
        seen = machine.devices["rng0"].seen  # type: ignore[attr-defined]
        assert machine.system.iommus[0].faults.total == machine.devices["rng0"].dma.stats.faults == 0
    assert (result.output.split()[0].decode(), result.status) == (type_, 0)
    assert {got[at : at + 6] for at in range(0, len(got), 8)} == {MARK}
    # The kernel gives IOVAs from 4 GiB downwards; this machine's memory ends at 512 MiB.
    if type_ == "identity":
        assert max(seen) < MEMORY and domain is DomainType.IDENTITY
    else:
        assert min(seen) >= MEMORY and domain is not DomainType.IDENTITY


# ---- VFIO ---------------------------------------------------------------------------------------


def test_vfio(run: Runs, kind: str, kernel: str) -> None:
    """MSI by eventfd, scattered pages, read-only mappings, faults, unmap and the program's end while DMA runs."""
    script = (
        f'./vfio_edu 0000:00:03.0 "{SAID[kind]}" more && ./vfio_edu 0000:00:03.0 "{SAID[kind]}" die; '
        "s=$?; echo end; exit $s"
    )
    with run(one_iommu(kind, EDU0), kernel, script, MODULES[kind] + VFIO, first=["-smp", "2"]) as (machine, guest):
        guest.expect(rb"end\n", 100)
        result = off_in_time(guest)
        text = result.output.decode()
        assert result.status == 0, text
        assert machine.devices["iommu0"].errors == 0
        assert machine.system["edu0"].group is not None
    for line in (
        "MSI by eventfd: 4 of 4",
        "over borders of scattered pages: equal",
        "unmap while DMA runs: 50 times",
        "killed while DMA runs: 5 times",
    ):
        assert line in text
    for what, virtio, address in (
        ("write to the read-only mapping", "W", 3 * 0x1_2340_0000),
        ("read after unmap", "R", 3 * 0x1_2340_0000),
        ("write outside", "W", 0x1_2340_2000),
    ):
        if kind == "virtio-iommu":
            wanted = rf"from EP 24 at {address:#x} \[{virtio}\]"
        else:
            name, code = {"W": ("Write", "05"), "R": ("Read", "06")}[virtio]
            wanted = rf" {name} NO_PASID\] Request device \[(0000:)?00:03.0\] "
            wanted += rf"fault addr {address:#x} \[fault reason 0x{code}\]"
        assert re.search(rf"^{what} refused: {re.escape(SAID[kind])} ?{wanted}", text, re.MULTILINE), text


RNG1 = RNG.replace("rng0", "rng1").replace("03.0", "05.0")


def test_warm_reboot(run: Runs, kind: str, kernel: str) -> None:
    """VFIO and a driver of the kernel's, before and after; when the guest goes down both do DMA.

    Behind virtio-iommu that may hang Linux, with QEMU's own too (docs/drivers-under-faults.md): there it ends before.
    """
    end = "kill %1 %2; wait; " if kind == "virtio-iommu" else ""
    script = f"""
        {RNG_IS_THERE}
        dd if=/dev/hwrng bs=64 count=10 2>/dev/null | hexdump -C | head -n 1
        ./vfio_edu 0000:00:03.0 "{SAID[kind]}" || exit 1
        [ $VMODEL_BOOT = 2 ] && exit
        dd if=/dev/hwrng of=/dev/null bs=64 2>/dev/null &
        ./vfio_edu 0000:00:03.0 "{SAID[kind]}" loop &
        sleep 1; {end}echo down; reboot -f; sleep 10
    """
    modules = [*MODULES[kind], *VFIO, "virtio-rng"]
    with run(one_iommu(kind, EDU0 + RNG1), kernel, script, modules, allow_reboot=True) as (_, guest):
        guest.expect(rb"xdown")
        guest.expect(rb"vmodel")
        result = guest.wait()
    assert (result.status, result.boots) == (0, 2), result.output
    assert result.output.count(b"|vmodel..vmodel") == 2
    assert result.output.count(b"all is well") == 2


def test_a_guest_that_is_killed(run: Runs, kind: str) -> None:
    """The next one finds all as it should be, though DMA was running."""
    first = f'./vfio_edu 0000:00:03.0 "{SAID[kind]}" loop'
    with run(one_iommu(kind, EDU0), STABLE, first, MODULES[kind] + VFIO) as (machine, guest):
        guest.expect(rb"x")
        guest.kill()
        until(lambda: not any(len(device.memory) for device in machine.devices.values()), "the client's unmaps")
        assert shared_files().mapped == 0
        with Guest(replace(guest.spec, command=f'./vfio_edu 0000:00:03.0 "{SAID[kind]}"')) as second:
            assert second.wait().status == 0, second.output
        until(lambda: not shared_files().mapped, "the end of the shared mappings")


# ---- hot-plug, and drivers that come late ---------------------------------------------------------

BEHIND_A_PORT = """
[[bridge]]
name = "rp0"
kind = "root-port"
address = "0000:00:04.0"
secondary = 1
""" + EDU.format(name="edu1", address="0000:01:00.0")


async def _qmp(socket: Path, command: str, arguments: dict[str, object]) -> object:
    client = QMPClient("test")
    await client.connect(str(socket))
    try:
        return await client.execute(command, arguments)
    finally:
        await client.disconnect()


def qmp(guest: Guest, command: str, arguments: dict[str, object]) -> object:
    return asyncio.run(_qmp(guest.qmp, command, arguments))


def test_hot_add(run: Runs, kind: str, kernel: str, tmp_path: Path) -> None:
    """An endpoint that comes when the IOMMU's driver has long been there."""
    script = (
        "echo ready; for i in $(seq 100); do [ -e /sys/bus/pci/devices/0000:01:00.0 ] && break; sleep 0.1; done;"
        f'./vfio_edu 0000:01:00.0 "{SAID[kind]}" && ./vfio_edu 0000:00:03.0 "{SAID[kind]}" raw'
    )
    text = one_iommu(kind, EDU0.replace("params", 'iommu = "none"\nparams') + BEHIND_A_PORT)
    with run(text, kernel, script, MODULES[kind] + VFIO, without="edu1") as (machine, guest):
        guest.expect(rb"ready\n")
        function = next(f for f in machine.topology.functions() if f.name == "edu1")
        qmp(guest, "device_add", json.loads(device_args("edu1", machine.socket("edu1", tmp_path), function)[1]))
        result = guest.wait()
    assert result.status == 0, result.output.decode() + result.console
    assert result.output.count(b"all is well") == 2


def test_dma_before_the_driver(run: Runs, kernel: str) -> None:
    """virtio-iommu's endpoints bypass it until its driver comes, which takes them over."""
    script = (
        "./vfio_edu 0000:00:03.0 x raw && [ ! -e /sys/bus/pci/devices/0000:00:03.0/iommu_group ] &&"
        "sleep 12 && modprobe virtio_iommu && modprobe vfio_iommu_type1 && modprobe vfio-pci &&"
        f'./vfio_edu 0000:00:03.0 "{SAID["virtio-iommu"]}"'
    )
    extra = ["virtio_iommu", *VFIO]
    with run(one_iommu("virtio-iommu", EDU0), kernel, script, [], extra_modules=extra) as (_, guest):
        result = guest.wait()
    assert result.status == 0, result.output.decode() + result.console
    assert b"raw DMA equal" in result.output and b"round trip 3 equal" in result.output


# ---- mixtures -----------------------------------------------------------------------------------


def test_two_iommus_and_none(run: Runs, kernel: str) -> None:
    """One of each kind with a device of its own, and a device without: at the same time."""
    text = (
        HEAD
        + IOMMU.format(name="iommu0", kind="virtio-iommu", address="0000:00:02.0", covers="0000:00:03.0")
        + IOMMU.format(name="iommu1", kind="vt-d", address="0000:00:04.0", covers="0000:00:05.0")
        + EDU0
        + EDU.format(name="edu1", address="0000:00:05.0")
        + EDU.format(name="edu2", address="0000:00:06.0")
    )
    script = (
        f'./vfio_edu 0000:00:03.0 "{SAID["virtio-iommu"]}" >one 2>&1 & one=$!;'
        f'./vfio_edu 0000:00:05.0 "{SAID["vt-d"]}" >two 2>&1 & two=$!;'
        "for i in 1 2 3 4 5 6 7 8; do ./vfio_edu 0000:00:06.0 x raw || s=1; done;"
        "wait $one || s=1; wait $two || s=1; cat one two; exit $s"
    )
    with run(text, kernel, script, ["virtio_iommu", *VFIO]) as (machine, guest):
        result = guest.wait()
        faults = {iommu.name: iommu.faults.total for iommu in machine.system.iommus}
    assert result.status == 0, result.output.decode() + result.console
    assert result.output.count(b"all is well") == 10
    assert faults == {"iommu0": 3, "iommu1": 3}


def test_qemus_own_iommu(run: Runs, kernel: str) -> None:
    """QEMU's intel-iommu with caching-mode passes each of 10,000 windows on: all are removed again."""

    def held() -> tuple[int, int, int]:
        fds = list(Path("/proc/self/fd").iterdir())
        return len(fds), shared_files().mapped, len(machine.devices["edu0"].memory)

    qemu = ["-device", "intel-iommu,caching-mode=on,intremap=off"]
    script = "./vfio_edu 0000:00:03.0 x many"
    with run(HEAD + EDU0, kernel, script, VFIO, first=qemu, append="intel_iommu=on") as (machine, guest):
        guest.expect(rb"ready\n")
        fds, files, windows = held()
        guest.send(b"\n")
        guest.expect(rb"mapped\n")
        assert held() == (fds, 1, windows + 10_000)  # the guest's memory is one file, mapped once
        guest.send(b"\n")
        guest.expect(rb"unmapped\n")
        assert held() == (fds, files, windows)
        guest.send(b"\n")
        result = guest.wait()
        assert result.status == 0, result.output.decode()
