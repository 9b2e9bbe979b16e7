"""Kernel modules for a guest: ELF files made here, in a kernel's folder or given by their path."""

from __future__ import annotations

import gzip
import lzma
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import zstandard

from tests.packages.module_files import RELEASE, elf, kernel_with
from vmodel.errors import ConfigError
from vmodel.guest.artifacts import ArtifactError, Kernel
from vmodel.guest.modules import Module, files_of, in_order, is_path, is_source, modinfo


def names(kernel: Kernel, entries: Sequence[str]) -> list[str]:
    return [module.name for module in in_order(kernel, files_of(entries, kernel))]


def test_dependencies_first_and_builtin_left_out(tmp_path: Path) -> None:
    kernel = kernel_with(
        tmp_path,
        {
            "top-dog.ko": elf(depends="mid-a,mid_b", softdep="pre: helper no-such-module post: later"),
            "mid-a.ko.xz": lzma.compress(elf(depends="base,core")),
            "mid_b.ko.gz": gzip.compress(elf(depends="base")),
            "packed.ko.zst": zstandard.compress(elf(depends="base")),
            "base.ko": elf(license="GPL"),
            "helper.ko": elf(depends=""),
            "later.ko": elf(depends=""),
        },
        builtin="kernel/lib/core.ko\n",
    )
    for name in ("top_dog", "top-dog"):
        assert names(kernel, [name]) == [
            "base",
            "mid_a",
            "mid_b",
            "helper",
            "top_dog",
        ]
    assert names(kernel, ["mid_b", "top_dog", "mid_b"])[:2] == ["base", "mid_b"]
    assert names(kernel, ["packed"]) == ["base", "packed"]
    assert names(kernel, ["core"]) == []
    assert in_order(kernel, {"mid_a": None})[-1] == Module("mid_a", elf(depends="base,core"), ("base",))


def test_depends_is_read_from_modinfo_alone(tmp_path: Path) -> None:
    """The same text elsewhere in the file means nothing."""
    data = elf(depends="") + b"\0depends=nothing_such\0"
    assert names(kernel_with(tmp_path, {"m.ko": data}), ["m"]) == ["m"]


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    kernel = kernel_with(
        tmp_path,
        {
            "a.ko": elf(depends="b"),
            "b.ko": elf(depends="a"),
            "orphan.ko": elf(depends="gone"),
            "junk.ko": b"not an ELF file",
            "short.ko": elf(depends="")[:70],
            "odd.ko.lzo": b"",
            "torn.ko.xz": lzma.compress(elf())[:-9],
            "torn-too.ko.zst": zstandard.compress(elf())[:-9],
            "misnamed.ko.gz": elf(),
        },
    )
    for name, text in {
        "a": "depend on each other: a > b > a",
        "orphan": "no module 'gone' .needed by orphan.",
        "nowhere": "no module 'nowhere'$",
        "junk": "junk.ko: not an ELF file",
        "short": "short.ko: not an ELF file",
        "odd": r"odd.ko.lzo: unknown compression .lzo",
        "torn": "torn.ko.xz: ends early$",
        "torn_too": "torn-too.ko.zst: ends early$",
        "misnamed": "misnamed.ko.gz: is compressed with something unknown, and not with zstd, xz or gzip$",
    }.items():
        with pytest.raises(ArtifactError, match=text):
            names(kernel, [name])


def test_a_kernel_without_modules(tmp_path: Path) -> None:
    kernel = Kernel("1.0", tmp_path / "bzImage", None)
    assert names(kernel, []) == []
    with pytest.raises(ArtifactError, match="has no module 'x': it has none beside"):
        names(kernel, ["x"])


def test_modinfo_of_every_truncation_ends() -> None:
    whole = elf(depends="x", alias=["a", "b"])
    assert list(modinfo(whole)) == [("depends", "x"), ("alias", "a"), ("alias", "b")]
    for size in range(len(whole)):
        try:
            list(modinfo(whole[:size]))
        except ValueError:
            continue


# ---- one's own -----------------------------------------------------------------------------------


def test_a_module_by_its_path(tmp_path: Path) -> None:
    """It may depend on the kernel's modules, and on others of one's own; it replaces the kernel's of the same name."""
    kernel = kernel_with(tmp_path / "kernel", {"base.ko": elf(), "mycard.ko": elf(license="old")})
    own = elf(depends="base,my-lib", vermagic=f"{RELEASE} SMP mod_unload ")
    (tmp_path / "mycard.ko").write_bytes(own)
    library = tmp_path / "my-lib.ko.xz"
    library.write_bytes(lzma.compress(elf(vermagic=f"{RELEASE} SMP")))
    wanted = files_of([f"{tmp_path}/mycard.ko", str(library)], kernel)
    assert wanted == {"mycard": tmp_path / "mycard.ko", "my_lib": library}
    assert in_order(kernel, wanted)[-1] == Module("mycard", own, ("base", "my_lib"))
    assert [module.name for module in in_order(kernel, wanted)] == ["base", "my_lib", "mycard"]
    # It needs no modules beside the kernel.
    alone = Kernel(RELEASE, tmp_path / "bzImage", None)
    assert [module.name for module in in_order(alone, {"my_lib": library})] == ["my_lib"]


def test_a_name_and_a_path_of_one_module(tmp_path: Path) -> None:
    kernel = kernel_with(tmp_path / "kernel", {"a.ko": elf()})
    for entries in (["a", "./x/a.ko"], ["./x/a.ko", "a"]):
        assert files_of(entries, kernel) == {"a": Path("x/a.ko")}


def test_a_module_of_another_kernel(tmp_path: Path) -> None:
    kernel = kernel_with(tmp_path / "kernel", {})
    path = tmp_path / "mycard.ko"
    for magic, said in (
        ("6.12.107+deb13-amd64 SMP", "6.12.107.deb13-amd64"),
        ("", "unknown"),
        (f"{RELEASE}x SMP", "9.9"),
    ):
        path.write_bytes(elf(vermagic=magic) if magic else elf())
        with pytest.raises(
            ArtifactError, match=f"mycard.ko: was built for kernel {said}.*, but the guest's is {RELEASE};"
        ):
            in_order(kernel, {"mycard": path})


@pytest.mark.parametrize(
    ("entry", "path"),
    [("nvme", False), ("nvme-core", False), ("x.ko", True), ("./x.ko.xz", True), ("driver/", True), (".", False)],
)
def test_what_is_a_path(entry: str, path: bool) -> None:
    assert is_path(entry) == path
    assert is_source(entry) == (entry == "driver/")


def test_a_path_where_nothing_is(tmp_path: Path) -> None:
    kernel = kernel_with(tmp_path / "kernel", {})
    with pytest.raises(ArtifactError, match=r"gone.ko: cannot be read: .*No such file"):
        names(kernel, [f"{tmp_path}/gone.ko"])
    with pytest.raises(ConfigError, match="driver: there is no such folder; a module's folder has a Kbuild"):
        names(kernel, [f"{tmp_path}/driver/"])


def test_a_path_of_no_regular_file(tmp_path: Path) -> None:
    """Reading a FIFO may wait without end, and a device may have none."""
    kernel = kernel_with(tmp_path, {})
    os.mkfifo(tmp_path / "card.ko")
    (tmp_path / "zeros.ko").symlink_to("/dev/zero")
    for name in ("card.ko", "zeros.ko"):
        path = tmp_path / name
        with pytest.raises(ArtifactError) as raised:
            names(kernel, [str(path)])
        assert str(raised.value) == f"{path}: cannot be read: is not a regular file"
