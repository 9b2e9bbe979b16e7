"""Fixtures for tests in real guests, beside those of the plugin."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.guest.kernels import CHOSEN
from vmodel.device import PciDevice
from vmodel.guest.artifacts import CLOUD, STABLE, ArtifactError, find_kernel
from vmodel.guest.running import Guest, GuestSpec
from vmodel.pci.topology import Bdf, Function, Topology
from vmodel.qemu import device_args, memory_args
from vmodel.server import Server

ROOT = Path(__file__).parents[2]


def _without_driver(item: pytest.Item, error: ArtifactError) -> None:
    """Skips a test for which the kernel for virtual machines has no driver, and says which."""
    params = getattr(item, "callspec", None)
    if params is not None and CLOUD in repr(params.params) and "has no module" in str(error):
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        _without_driver(item, error)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        yield
    except ArtifactError as error:
        _without_driver(item, error)
        raise


@pytest.fixture(params=CHOSEN)
def kernel(request: pytest.FixtureRequest) -> str:
    """Each of the guest kernels."""
    return str(request.param)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Compiles a C program of the repository for the guest."""
    folder = tmp_path_factory.mktemp("programs")

    def compile_(source: str) -> Path:
        target = folder / Path(source).stem
        if not target.exists():
            subprocess.run(
                ["cc", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-o", target, ROOT / source], check=True
            )
        return target

    return compile_


Boot = Callable[..., Guest]


@pytest.fixture
def boot(artifacts: Path, tmp_path: Path) -> Iterator[Boot]:
    """Serves a device and makes a guest (not yet started) with it in slot 3."""
    servers: list[Server] = []
    devices: list[PciDevice] = []

    def make(
        device: PciDevice | Path,
        command: str,
        *,
        kernel: str = STABLE,
        fds: bool = True,
        modules: Sequence[str] = (),
        files: Sequence[Path] = (),
        reboot: bool = False,
        **properties: object,
    ) -> Guest:
        if isinstance(device, PciDevice):
            path = tmp_path / "device.sock"
            server = Server()
            server.add(device, path)
            server.start()
            servers.append(server)
            devices.append(device)
        else:
            path = device
        topology = Topology()
        topology.add_root()
        args = device_args("device", path, topology.add(Function(Bdf(0, 0, 3, 0))))
        args[1] = json.dumps({**json.loads(args[1]), **properties})
        spec = GuestSpec(
            command=command,
            kernel=find_kernel(kernel),
            modules=modules,
            files=[(file, f"root/{file.name}") for file in files],
            qemu_args=[*(memory_args("512M") if fds else ["-m", "512M"]), *args],
            allow_reboot=reboot,
            timeout=90,
        )
        return Guest(spec, artifacts=artifacts)

    yield make
    for server in servers:
        server.stop()
    for device in devices:
        device.close()
