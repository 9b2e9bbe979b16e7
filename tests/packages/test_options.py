"""What a guest is booted with: the machine file's [guest] table, and what is added to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.packages.archive import cached
from tests.packages.module_files import RELEASE
from vmodel import machine as machines
from vmodel.errors import ConfigError
from vmodel.guest.artifacts import Kernel
from vmodel.guest.options import at_option, coverage_target, guest_file, module_at, module_files, spec_of
from vmodel.guest.shares import Share, qemu_args, share_at
from vmodel.machine import Machine

KERNEL = Kernel(RELEASE, Path("bzImage"), None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "driver" / "sub").mkdir(parents=True)
    for name in ("driver/Kbuild", "driver/main.c", "driver/main.o", "driver/sub/x.c", "driver/.hidden", "check.sh"):
        (tmp_path / name).touch()
    for release in ("6.12.117+deb13-amd64", "7.3.4+deb13-amd64"):
        (tmp_path / "build" / release).mkdir(parents=True)
        (tmp_path / "build" / release / "mycard.ko").touch()
    return tmp_path


def test_files_of_modules(folder: Path) -> None:
    sources = [folder / "driver" / name for name in ("Kbuild", "main.c", "sub/x.c")]
    assert module_files(f"{folder}/driver/") == sources
    each = module_files(f"{folder}/build/{{release}}/mycard.ko")
    assert [path.parent.name for path in each] == ["6.12.117+deb13-amd64", "7.3.4+deb13-amd64"]
    assert module_files(f"{folder}/build/*/mycard.ko") == []


def test_places(folder: Path) -> None:
    assert module_at("nvme", folder) == "nvme"
    assert module_at("driver/", folder) == module_at("./driver", folder) == f"{folder}/driver/"
    assert module_at("build/{release}/mycard.ko", folder) == f"{folder}/build/{{release}}/mycard.ko"
    assert guest_file("check.sh", folder) == folder / "check.sh"
    assert guest_file("check.sh:/bin/check", folder) == (folder / "check.sh", "/bin/check")
    for entry in ("gone.ko", "gone/", "build/{release}/other.ko"):
        with pytest.raises(ConfigError, match="there is no module or source folder"):
            module_at(entry, folder)
    assert guest_file("driver", folder) == folder / "driver"
    assert guest_file(".", folder) == folder
    for gone in ("gone", "", ":/x"):
        with pytest.raises(ConfigError, match="there is no file"):
            guest_file(gone, folder)
    with pytest.raises(ConfigError, match="must be FILE, or FILE:PLACE"):
        guest_file("check.sh:/", folder)


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("vmlinux:", 'must have the beginning of a function\'s name behind the colon, as "vmlinux:pci_"'),
        ("--", "must be a module's name as"),
        ("driver/", "must be a module's name, or its file, NAME.ko"),
        ("gone.ko", "there is no file 'gone.ko'"),
    ],
)
def test_a_mistake_has_its_option_and_its_text_once(entry: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        at_option("--coverage", coverage_target, entry)
    assert str(error.value).startswith(f"--coverage {entry}: {says}")


def test_a_mistake_of_an_empty_option() -> None:
    with pytest.raises(ConfigError, match=r"^--coverage '': must be a module's name"):
        at_option("--coverage", coverage_target, "")


def test_shares(folder: Path) -> None:
    build = folder / "build"
    assert share_at("build", folder) == Share(build, "/root/build")
    assert share_at("build/", folder) == share_at("./driver/../build", folder) == Share(build, "/root/build")
    assert share_at("build:rw", folder) == Share(build, "/root/build", writable=True)
    assert share_at("build:/opt/x/", folder) == Share(build, "/opt/x")
    assert share_at(f"{build}:/b:rw", Path("/elsewhere")) == Share(build, "/b", writable=True)
    assert share_at(".", build) == Share(build, "/root/build")
    for text in ("gone", "check.sh", ""):
        with pytest.raises(ConfigError, match=f"there is no folder '{text}'"):
            share_at(text, folder)
    for text in (
        "build:x",
        "build:ro",
        "build:rw:rw",
        "build:/",
        "build:/../x",
        "build:/a:/b",
        "build:",
        "build::rw",
        "build:/a\0",
    ):
        with pytest.raises(ConfigError, match=r"must be DIR\[:PATH\]\[:rw\]"):
            share_at(text, folder)


def test_a_share_for_qemu(tmp_path: Path) -> None:
    """In QEMU's options a comma in a value is written twice."""
    fs, first, device, second = qemu_args([Share(tmp_path / "a,b", "/a")])
    assert (fs, device, second) == ("-fsdev", "-device", "virtio-9p-pci,fsdev=share0,mount_tag=share0")
    assert f"path={tmp_path}/a,,b," in first and first.endswith("readonly=on")
    assert qemu_args([Share(tmp_path, "/a", writable=True)])[1].endswith("readonly=off")


@pytest.fixture
def machine(folder: Path) -> Iterator[Machine]:
    (folder / "m.toml").write_text(
        """
[machine]
name = "m"
[guest]
kernel = "9.9"
modules = ["driver/", "nvme"]
files = ["check.sh"]
shares = ["build:rw"]
tools = ["pciutils:lspci"]
append = "mycard.debug=1"
cpus = 2
qemu_args = ["-rtc", "base=utc"]
"""
    )
    made = machines.load(folder / "m.toml")
    yield made
    made.close()


def test_lists_and_kernel_arguments_add_up(machine: Machine, folder: Path) -> None:
    shared = Share(folder / "driver", "/opt/d")
    more = {
        "shares": [shared],
        "modules": ["uio"],
        "files": [folder / "x"],
        "tools": ["fio:fio"],
        "append": "quiet",
        "timeout": 7.0,
    }
    spec = spec_of(machine, ["-m", "1G"], KERNEL, command="true", **more)
    assert spec.modules == [f"{folder}/driver/", "nvme", "uio"]
    assert (spec.extra_modules, spec.files) == ([], [folder / "check.sh", folder / "x"])
    assert spec.shares == [Share(folder / "build", "/root/build", writable=True), shared]
    assert spec.tools == ["pciutils:lspci", "fio:fio"]
    assert (spec.append, spec.timeout, spec.kernel) == ("mycard.debug=1 quiet", 7.0, KERNEL)
    assert spec.qemu_args == ["-smp", "2", "-rtc", "base=utc", "-m", "1G"]


def test_the_kernel(machine: Machine, cache: Path) -> None:
    """What is asked for comes before the machine file's."""
    cached(cache, "kernel-9.9", release=RELEASE)
    cached(cache, "kernel-stable", release="6.12.117+deb13-amd64")
    for asked, release in ((None, RELEASE), ("stable", "6.12.117+deb13-amd64"), (KERNEL, RELEASE)):
        found = spec_of(machine, (), asked, command="").kernel
        assert found is not None and found.release == release


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('modules = ["gone/"]', r"m.toml: guest.modules\[0\]: there is no module or source folder 'gone/'"),
        ('extra_modules = ["nvme", "a.ko"]', r"m.toml: guest.extra_modules\[1\]: there is no module .*'a.ko'"),
        ('files = ["gone"]', r"m.toml: guest.files\[0\]: there is no file 'gone'"),
        (
            'tools = ["fio:fio", "lspci"]',
            r"m.toml: guest.tools\[1\]: 'lspci': must be PACKAGE:PROGRAM, as pciutils:lspci",
        ),
        ('shares = ["check.sh"]', r"m.toml: guest.shares\[0\]: there is no folder 'check.sh'"),
    ],
)
def test_mistakes_name_file_and_key(folder: Path, line: str, said: str) -> None:
    (folder / "m.toml").write_text(f'[machine]\nname = "m"\n[guest]\n{line}\n')
    made = machines.load(folder / "m.toml")
    with pytest.raises(ConfigError, match=said):
        spec_of(made, (), KERNEL, command="")
    made.close()


@pytest.mark.parametrize(("memory", "boots"), [("32M", False), ("95M", False), ("96M", True), ("1G", True)])
def test_memory_in_which_no_kernel_boots(tmp_path: Path, memory: str, boots: bool) -> None:
    file = tmp_path / "m.toml"
    file.write_text(f'[machine]\nname = "m"\nmemory = "{memory}"\n')
    made = machines.load(file)
    try:
        debian = Kernel("6.12.117+deb13-amd64", Path("bzImage"), None)
        own = Kernel("6.12.0-mine", Path("bzImage"), None)  # may be a small one
        assert spec_of(made, (), own, command="true").kernel is own
        if boots:
            assert spec_of(made, (), debian, command="true").kernel is debian
        else:
            with pytest.raises(ConfigError) as raised:
                spec_of(made, (), debian, command="true")
            said = f'{file}: machine.memory: {memory!r}: Debian\'s kernel {debian.release} needs "96M" or more to boot'
            assert str(raised.value) == said
        # KASAN takes an eighth of it, and more.
        debug = Kernel("6.12.117-vmodel-debug", Path("bzImage"), None)
        if memory == "1G":
            assert spec_of(made, (), debug, command="true").kernel is debug
        else:
            with pytest.raises(ConfigError, match=r'the debug kernel 6\.12\.117-vmodel-debug needs "128M" or more'):
                spec_of(made, (), debug, command="true")
    finally:
        made.close()
