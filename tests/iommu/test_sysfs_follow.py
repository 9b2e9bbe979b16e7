"""A folder that follows the groups of a system."""

from __future__ import annotations

import errno
import logging
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.iommu.folder import found
from tests.iommu.world import World, group_of, iommu
from vmodel.iommu import dma_domain_alloc, sysfs
from vmodel.iommu.driver import PlatformDevice
from vmodel.iommu.sysfs_folder import EntryKind, SysfsEntry, SysfsFolder, checked


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def world() -> Iterator[World]:
    world = World(iommu())
    yield world
    world.close()


def refused(code: int, call: Callable[[], object]) -> str:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == code
    return caught.value.strerror


def test_each_change(world: World, tmp_path: Path) -> None:
    """After each call the folder is what export would write."""
    top = tmp_path / "sys"

    def same() -> None:
        fresh = tmp_path / "fresh"
        sysfs.export(world.system, fresh)
        assert found(top) == found(fresh) == sysfs.tree(world.system)
        for path in sorted(fresh.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        fresh.rmdir()

    with sysfs.follow(world.system, top) as following:
        same()
        first, _ = world.device("00:03.0")
        same()
        second, _ = world.device("00:03.1")
        same()
        group = group_of(first)
        group.name = "nets"
        same()
        assert (top / "iommu_groups/0/name").read_text() == "nets\n"
        group.set_default(dma_domain_alloc(first))
        same()
        assert (top / "iommu_groups/0/type").read_text() == "DMA-FQ\n"
        world.system.remove(first)
        same()
        assert listed(top / "iommu_groups/0/devices") == ["0000:00:03.1"]
        world.device("00:05.0")
        same()
        world.system.remove(second)
        same()
        assert listed(top / "iommu_groups") == ["1"]
        assert following.error is None
    assert not top.exists()
    world.device("00:06.0")
    assert not top.exists()


def test_a_type_that_changes_in_place(tmp_path: Path) -> None:
    """DMA becomes DMA-FQ, with the same domain."""
    world = World(iommu(strict=True))
    endpoint, _ = world.device("00:03.0")
    domain = dma_domain_alloc(endpoint)
    group_of(endpoint).set_default(domain)
    with sysfs.follow(world.system, tmp_path / "sys"):
        assert (tmp_path / "sys/iommu_groups/0/type").read_text() == "DMA\n"
        domain.defer_flushes()
        assert (tmp_path / "sys/iommu_groups/0/type").read_text() == "DMA-FQ\n"
    world.close()


def test_modes(world: World, tmp_path: Path) -> None:
    world.device("00:03.0")
    with sysfs.follow(world.system, tmp_path / "sys"):
        assert (tmp_path / "sys/iommu_groups/0/type").stat().st_mode & 0o777 == 0o444
        assert (tmp_path / "sys/iommu_groups/0").stat().st_mode & 0o022 == 0


def test_a_folder_that_was_there_stays(world: World, tmp_path: Path) -> None:
    with sysfs.follow(world.system, tmp_path):
        world.device("00:03.0")
        assert listed(tmp_path / "iommu_groups") == ["0"]
    assert listed(tmp_path) == []


def test_no_reader_sees_a_part(world: World, tmp_path: Path) -> None:
    """A file has an old text or a new one at any time, and a link leads somewhere."""
    endpoint, _ = world.device("00:03.0")
    group, top = group_of(endpoint), tmp_path / "sys"
    one, other = dma_domain_alloc(endpoint), group.iommu.identity
    texts: set[str] = set()
    done = threading.Event()
    with sysfs.follow(world.system, top):

        def read() -> None:
            while not done.is_set():
                texts.add((top / "iommu_groups/0/type").read_text())
                assert (top / "devices/pci0000:00/0000:00:03.0/iommu_group").exists()
            texts.add("end")

        reader = threading.Thread(target=read)
        reader.start()
        for n in range(200):
            group.set_default(one if n % 2 else other)
        done.set()
        reader.join(10)
    assert texts == {"identity\n", "DMA-FQ\n", "end"}


def test_two_of_one_folder(world: World, tmp_path: Path) -> None:
    world.device("00:03.0")
    with sysfs.follow(world.system, tmp_path):
        before = found(tmp_path)
        assert "another process" in refused(errno.EBUSY, lambda: sysfs.follow(world.system, tmp_path))
        refused(errno.EBUSY, lambda: sysfs.export(world.system, tmp_path))
        assert found(tmp_path) == before
    with sysfs.follow(world.system, tmp_path):
        assert found(tmp_path) == before


def test_never_over_something_else(world: World, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    refused(errno.EEXIST, lambda: sysfs.follow(world.system, tmp_path))
    assert listed(tmp_path) == ["precious"]
    world.device("00:03.0")  # nobody follows


def test_a_folder_that_is_removed(world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line; the system goes on."""
    with sysfs.follow(world.system, tmp_path / "sys") as following:
        (tmp_path / "sys").rmdir()
        for slot in range(3, 6):
            world.device(f"00:0{slot}.0")
        assert following.error is not None and following.error.errno == errno.ENOENT
        assert len(world.system.groups) == 3
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert lines == [f"{tmp_path}/sys does not follow any more: it was removed"]
    assert listed(tmp_path) == []


def test_a_full_disk(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line; what was there is whole, and is removed at the end."""
    top = tmp_path / "sys"

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with sysfs.follow(world.system, top) as following:
        world.device("00:03.0")
        before = found(top / "iommu_groups/0")
        monkeypatch.setattr(os, "rename", full)
        for slot in range(4, 6):
            world.device(f"00:0{slot}.0")
        assert following.error is not None and following.error.errno == errno.ENOSPC
        assert found(top / "iommu_groups/0") == before
        assert ".new" not in listed(top)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == [
        f"{top} does not follow any more: No space left on device"
    ]
    assert not top.exists()
    monkeypatch.setattr(os, "symlink", full)
    refused(errno.ENOSPC, lambda: sysfs.follow(world.system, top))
    assert not top.exists()


def test_files_of_others_stay(world: World, tmp_path: Path) -> None:
    world.device("00:03.0")
    following = sysfs.follow(world.system, tmp_path / "sys")
    (tmp_path / "sys/iommu_groups/0/mine").write_text("data")
    refused(errno.ENOTEMPTY, following.close)
    following.close()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("mine")] == ["sys/iommu_groups/0/mine"]
    with SysfsFolder(tmp_path / "other"):
        pass  # the lock is gone


def test_a_kind_that_changes(tmp_path: Path) -> None:
    """A folder in place of a file, and the other way round."""
    folder, file, link = SysfsEntry(EntryKind.FOLDER), SysfsEntry(EntryKind.FILE, "x"), SysfsEntry(EntryKind.LINK, "y")
    with SysfsFolder(tmp_path / "sys") as written:
        for tree in ({"a": folder, "a/b": file}, {"a": file, "b": link}, {"a": link, "b": folder}, {}):
            written.update(tree)
            assert found(tmp_path / "sys") == tree


@pytest.mark.parametrize(
    "tree",
    [
        None,
        [],
        {"a": ["file"]},
        {"a": ["pipe", ""]},
        {"a": ["file", 3]},
        {"a": 3},
        {"/etc/passwd": ["file", "x"]},
        {"../a": ["file", "x"]},
        {"..": ["folder", ""], "../a": ["file", "x"]},
        {"a": ["folder", ""], "a/.": ["folder", ""]},
        {"a": ["folder", ""], "a//b": ["file", ""]},
        {".new": ["folder", ""]},
        {"a\0b": ["file", "x"]},
        {"a/b": ["file", "x"]},
        {"a": ["link", "/etc"], "a/b": ["file", "x"]},
    ],
)
def test_a_tree_of_another_process(tree: object) -> None:
    """None leads out of the folder."""
    with pytest.raises((ValueError, TypeError)):
        checked(tree)


def test_a_tree_of_a_system_is_one(world: World) -> None:
    world.device("00:03.0")
    tree = sysfs.tree(world.system)
    assert checked({name: list(entry) for name, entry in tree.items()}) == tree


@pytest.mark.parametrize("name", ["", ".", "..", "a\0b", "\0", "x" * 256, "é" * 128, "\ud800"])
def test_what_cannot_be_a_folder_is_no_platform_device(name: str, world: World, tmp_path: Path) -> None:
    """It is refused when it is named: a folder that follows goes on."""
    with sysfs.follow(world.system, tmp_path / "sys") as following:
        with pytest.raises(ValueError, match="a platform device named"):
            world.system.add(PlatformDevice(name))
        world.system.add(PlatformDevice("dma.0"))
        assert following.error is None and listed(tmp_path / "sys/devices/platform") == ["dma.0"]


@pytest.mark.parametrize("name", ["...", ".new", "a b", "soc/dma@4000", "x" * 255, "é", "\n"])
def test_what_can_be_a_folder(name: str, world: World, tmp_path: Path) -> None:
    world.system.add(PlatformDevice(name))
    with sysfs.follow(world.system, tmp_path / "sys"):
        assert listed(tmp_path / "sys/devices/platform") == [name.replace("/", "!")]
    tree = sysfs.tree(world.system)
    assert checked({name: list(entry) for name, entry in tree.items()}) == tree


def test_one_folder_for_each_platform_device(world: World) -> None:
    world.system.add(PlatformDevice("soc/dma"))
    for name in ("soc/dma", "soc!dma"):
        assert "exists" in refused(errno.EEXIST, lambda name=name: world.system.add(PlatformDevice(name)))  # type: ignore[misc]
    assert len(world.system.endpoints) == 1


def test_a_name_that_is_no_text(world: World, tmp_path: Path) -> None:
    first, _ = world.device("00:03.0")
    with sysfs.follow(world.system, tmp_path / "sys") as following:
        group_of(first).name = "net\ud800"
        assert (tmp_path / "sys/iommu_groups/0/name").read_text() == "net\\ud800\n"
        group_of(first).name = "net"
        assert (tmp_path / "sys/iommu_groups/0/name").read_text() == "net\n" and following.error is None
