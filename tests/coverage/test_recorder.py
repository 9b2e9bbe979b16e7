"""The recorder's side of c_shim/coverage/log.h, against a plugin that the test plays."""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from vmodel.coverage import recorder as module
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.module_layout import ModuleLayout
from vmodel.coverage.recorder import Recorder, plugin

HEADER_FILE = Path(__file__).parents[2] / "c_shim" / "coverage" / "log.h"
LAYOUT = ModuleLayout(size=128, name=0, text_base=64, text_size=72, init_base=80, init_size=88)
BLOCK, BOOT, LOAD, READY, FREE = range(1, 6)
TEXT = 0xFFFFFFFFC0200000


class Plugin:
    """Writes what QEMU's plugin writes."""

    def __init__(self, recorder: Recorder) -> None:
        self.map = mmap.mmap(recorder.fd, 0)
        (self.cells,) = struct.unpack_from("<Q", self.map, 8)

    def _add(self, offset: int, value: int) -> int:
        (old,) = struct.unpack_from("<Q", self.map, offset)
        struct.pack_into("<Q", self.map, offset, old + value)
        return int(old)

    def record(self, kind: int, address: int, value: int = 0, data: bytes = b"") -> None:
        record = struct.pack("<QII", address, value, kind) + data + bytes(-len(data) % 16)
        at = self._add(184, len(record))
        start = 4096 + self.cells + at
        self.map[start : start + len(record)] = record

    def block(self, address: int, size: int = 4) -> int:
        self.record(BLOCK, address, size)
        cell = self._add(192, 1)
        self.run(cell)
        return cell

    def run(self, cell: int) -> None:
        self.map[4096 + cell] = 1

    def load(self, name: str, text: int, init: int = 0, pointer: int = 0) -> None:
        data = bytearray(LAYOUT.size)
        data[: len(name)] = name.encode()
        struct.pack_into("<QI", data, LAYOUT.text_base, text, 0x1000)
        struct.pack_into("<QI", data, LAYOUT.init_base, init, 0x1000 if init else 0)
        self.record(LOAD, pointer or text, LAYOUT.size, bytes(data))


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    image = SimpleNamespace(module_layout=LAYOUT, symbols=SimpleNamespace(address=lambda name: 0xFFFFFFFF81000000))
    with Recorder(cast(Any, image), kernel_too=True) as made:
        yield made


@pytest.fixture
def played(recorder: Recorder) -> Plugin:
    return Plugin(recorder)


def found(recorder: Recorder) -> list[tuple[str, list[int]]]:
    return [
        (part.module.name if part.module else "", [start for start, _ in part.ranges]) for part in recorder.executed()
    ]


def test_the_header_is_that_of_the_plugin() -> None:
    """Names and order are those of struct coverage_header."""
    text = HEADER_FILE.read_text().partition("struct coverage_header {")[2].partition("\n};")[0]
    fields = re.findall(r"^    (?:_Atomic |struct )?\w+ (\w+)(?:\[\w+\])?;", text, re.M)
    assert [name for name in fields if name not in ("reserved", "pad")] == [
        field.name for field in module._HEADER.subcons if field.name
    ]


def test_modules_by_the_order_of_records(recorder: Recorder, played: Plugin) -> None:
    played.record(BOOT, 0)
    played.load("first", TEXT, TEXT + 0x2000)
    played.block(TEXT + 0x10)
    played.block(TEXT + 0x2010)
    assert found(recorder) == [("first", [TEXT + 0x10, TEXT + 0x2010])]
    played.record(READY, TEXT)
    # Its init code has gone: a parameter of the next module is set there before the module is announced.
    played.block(TEXT + 0x2020)
    assert found(recorder) == [("first", [TEXT + 0x10, TEXT + 0x2010])]
    played.load("second", TEXT + 0x2000)
    played.block(TEXT + 0x2030)
    assert found(recorder) == [
        ("first", [TEXT + 0x10, TEXT + 0x2010]),
        ("second", [TEXT + 0x2020, TEXT + 0x2030]),
    ]


def test_unloaded_and_loaded_elsewhere(recorder: Recorder, played: Plugin) -> None:
    played.load("one", TEXT)
    cell = played.block(TEXT + 8)
    played.record(FREE, TEXT)
    played.load("other", TEXT)
    played.block(TEXT + 8)
    played.load("one", TEXT + 0x8000)
    played.block(TEXT + 0x8008)
    assert found(recorder) == [("one", [TEXT + 8]), ("other", [TEXT + 8]), ("one", [TEXT + 0x8008])]
    recorder.clear()
    assert found(recorder) == []
    played.run(cell)
    assert found(recorder) == [("one", [TEXT + 8])]


def test_a_boot_forgets_all_modules(recorder: Recorder, played: Plugin) -> None:
    played.load("one", TEXT)
    played.record(BOOT, 0)
    played.block(TEXT + 8)
    assert found(recorder) == []
    played.load("two", TEXT)
    assert found(recorder) == [("two", [TEXT + 8])]


def test_the_kernel_itself(recorder: Recorder, played: Plugin) -> None:
    played.block(0xFFFFFFFF81000010, 6)
    (part,) = recorder.executed()
    assert part.module is None and part.ranges == [(0xFFFFFFFF81000010, 0xFFFFFFFF81000016)]


def test_code_that_is_no_modules_is_nobodys(recorder: Recorder, played: Plugin) -> None:
    """BPF has its code among the modules'."""
    played.block(TEXT)
    assert found(recorder) == []


def test_code_outside_of_modules_is_bounded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, recorder: Recorder, played: Plugin
) -> None:
    """What BPF compiles waits for a module that never comes; what a module runs before it is announced came last."""
    for n in range(module._MOST_PENDING):
        played.record(BLOCK, TEXT + 0x100000 + 4 * n, 4)
    played.block(TEXT + 0x10)
    assert found(recorder) == [] and len(recorder._pending) == module._MOST_PENDING
    assert [record.getMessage().partition(",")[0] for record in caplog.records] == [
        "coverage: more than 65536 blocks of code outside of modules ran"
    ]
    played.load("late", TEXT)
    played._add(192, module._MOST_PENDING)
    cell = module._MOST_PENDING
    played.run(cell)
    assert found(recorder) == [("late", [TEXT + 0x10])]
    assert len(caplog.records) == 1


def test_a_module_that_cannot_be_read(recorder: Recorder, played: Plugin) -> None:
    played.record(LOAD, TEXT, 0)
    with pytest.raises(CoverageError, match="could not read what the guest's kernel says about a module"):
        recorder.executed()


def test_the_plugin_is_installed(recorder: Recorder) -> None:
    assert plugin().is_file()
    option, value = recorder.qemu_args()
    assert option == "-plugin" and value == f"file={plugin()},log=/proc/self/fd/{recorder.fd}"
    assert not recorder.loaded and recorder.lost == 0 and recorder.used == 0
