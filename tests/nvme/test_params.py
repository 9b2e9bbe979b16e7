"""What machine files say of NVMe controllers."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmodel.devices.nvme import Nvme
from vmodel.errors import ConfigError
from vmodel.machine import Machine, load, parse

EXAMPLE = Path(__file__).parents[2] / "examples" / "nvme.toml"


def machine(folder: Path, params: str) -> Machine:
    text = (
        '[machine]\nname = "m"\n[[device]]\nname = "nvme0"\nmodel = "nvme"\naddress = "0000:00:04.0"\n'
        f"params = {{ {params} }}\n"
    )
    return parse(text, folder / "m.toml")


def test_the_example() -> None:
    before = set(EXAMPLE.parent.iterdir())
    found = load(EXAMPLE)
    device = found.devices["nvme0"]
    assert isinstance(device, Nvme)
    assert (device.serial, device.params.queues) == ("VM0001", 16)
    first, second = device.params.namespaces
    assert (first.path, first.size, first.lba) == (EXAMPLE.parent / "disk.img", 1 << 30, 4096)
    assert (second.memory, second.lba) == (256 << 20, 512)
    found.close()
    # Only serving it makes the file.
    assert set(EXAMPLE.parent.iterdir()) == before


def test_paths_count_from_the_machine_file(tmp_path: Path) -> None:
    found = machine(tmp_path, 'namespaces = [ { path = "disk.img", size = "1M" } ]')
    server = found.serve(tmp_path)
    assert (tmp_path / "disk.img").stat().st_size == 1 << 20
    server.stop()
    found.close()


def test_a_file_that_two_machines_have(tmp_path: Path) -> None:
    text = 'namespaces = [ { memory = "64K" }, { path = "disk.img", size = "1M" } ]'
    first, second = machine(tmp_path, text), machine(tmp_path, text)
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    server = first.serve(tmp_path / "1")
    with pytest.raises(ConfigError, match=r"disk.img is in use by another server"):
        second.serve(tmp_path / "2")
    server.stop()
    first.close()
    second.serve(tmp_path / "2").stop()
    second.close()


@pytest.mark.parametrize("params", ['path = "disk.img"', 'path = "disk.img", read_only = true'])
def test_files_that_are_not_there(tmp_path: Path, params: str) -> None:
    found = machine(tmp_path, f"namespaces = [ {{ {params} }} ]")
    with pytest.raises(ConfigError, match=r"disk\.img: No such file or directory") as caught:
        found.serve(tmp_path)
    assert "\n" not in str(caught.value)
    found.close()


def test_names_without_a_serial(tmp_path: Path) -> None:
    found = machine(tmp_path, "")
    assert found.devices["nvme0"].serial == "nvme0"  # type: ignore[attr-defined]
    found.close()


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ("queues = 0", "device[0].params.queues: 0: input should be greater than or equal to 1"),
        ("queues = 65", "device[0].params.queues: 65: input should be less than or equal to 64"),
        ("queus = 4", "device[0].params.queus: unknown key: did you mean 'queues'?"),
        ('serial = ""', "device[0].params.serial: ''"),
        ('serial = "123456789012345678901"', "device[0].params.serial: '123456789012345678901'"),
        ('serial = "ü"', "device[0].params.serial: 'ü': must be printable ASCII characters"),
        ('interrupts = "intx"', "device[0].params.interrupts: 'intx': input should be 'msix' or 'msi'"),
        ("queue_entries = 1", "device[0].params.queue_entries: 1"),
        ("doorbell_stride = 7", "device[0].params.doorbell_stride: 7"),
        ('max_transfer = "3K"', "device[0].params.max_transfer: '3K': must be a power of two"),
        ("namespaces = [ { } ]", "device[0].params.namespaces[0]: {}: a namespace needs either memory"),
        (
            'namespaces = [ { memory = "1M", path = "x" } ]',
            "device[0].params.namespaces[0]: {'memory': '1M', 'path': 'x'}: a namespace needs either memory",
        ),
        (
            'namespaces = [ { memory = "1M", size = "1M" } ]',
            "device[0].params.namespaces[0]: {'memory': '1M', 'size': '1M'}: size and read_only go with path",
        ),
        (
            'namespaces = [ { path = "x", read_only = true, size = "1M" } ]',
            "device[0].params.namespaces[0]: {'path': 'x', 'read_only': True, 'size': '1M'}: size does not go with",
        ),
        ('namespaces = [ { memory = "0" } ]', "device[0].params.namespaces[0].memory: '0': must be a multiple of 4096"),
        ("namespaces = [ { memory = 513 } ]", "device[0].params.namespaces[0].memory: 513: must be a multiple"),
        ('namespaces = [ { memory = "1M", lba = 520 } ]', "device[0].params.namespaces[0].lba: 520: input should be"),
        ('namespaces = [ { path = "" } ]', "device[0].params.namespaces[0].path: ''"),
        (
            'namespaces = [ { path = "a", size = "1M" }, { path = "a", size = "1M" } ]',
            "two namespaces have the file",
        ),
        ('capacity = "1"', "device[0].params.capacity: '1': must be a multiple of 4096"),
    ],
)
def test_mistakes(tmp_path: Path, params: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        machine(tmp_path, params)
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
