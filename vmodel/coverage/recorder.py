"""`Recorder`: what QEMU's plugin (c_shim/coverage/plugin.c) records about a running guest, read from this side.

Both share a file in memory (c_shim/coverage/log.h).  The plugin appends a record when QEMU translates a block of the
kernel's code, and when the kernel boots, loads a module or frees one.  So an address belongs to the module that was
there when its block was translated, however often modules come and go.
"""

from __future__ import annotations

import importlib.util
import logging
import mmap
import os
import struct
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from construct import Array, Bytes, Int32ul, Int64ul, PaddedString, Padding, Struct

from vmodel.closing import Closing
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.kernel_image import KernelImage
from vmodel.coverage.module_layout import ModuleLayout

log = logging.getLogger(__name__)

_RANGES = _WATCHES = 4
_HEADER = Struct(
    "magic" / Bytes(8),
    "cells" / Int64ul,
    "log_size" / Int64ul,
    "module_size" / Int32ul,
    "ranges" / Int32ul,
    "watches" / Int32ul,
    Padding(4),
    "range" / Array(_RANGES, Struct("start" / Int64ul, "end" / Int64ul)),
    "watch" / Array(_WATCHES, Struct("address" / Int64ul, "kind" / Int32ul, Padding(4))),
    "argument" / PaddedString(16, "ascii"),
    "used" / Int64ul,
    "cells_used" / Int64ul,
    "lost" / Int64ul,
    "loaded" / Int32ul,
    Padding(3884),
)
_MAGIC = b"VMCVLOG1"
#: A record: address, value, kind.
_RECORD = struct.Struct("<QII")
_U64, _U32 = struct.Struct("<Q"), struct.Struct("<I")
#: Bytes of a module's name (MODULE_NAME_LEN, include/linux/moduleparam.h).
_NAME = 56
_BLOCK, _BOOT, _LOAD, _READY, _FREE = range(1, 6)
#: The functions at whose begin the plugin notes something: their first argument is a struct module.
_WATCHED = {"start_kernel": _BOOT, "do_init_module": _LOAD, "trim_init_extable": _READY, "free_module": _FREE}
#: Blocks, and bytes of the log.  Only what is used takes memory; all of Debian's kernel has some 200,000 blocks.
_CELLS, _LOG = 4 << 20, 128 << 20
#: The most blocks that wait for a module that is not announced yet.  BPF's programs are among modules, and none comes.
_MOST_PENDING = 1 << 16
#: Where x86-64 has modules, and the kernel itself (Documentation/arch/x86/x86_64/mm.rst of Linux).
_MODULES = (0xFFFFFFFFC0000000, 0xFFFFFFFFFF000000)
_KERNEL = (0xFFFFFFFF80000000, 0xFFFFFFFFC0000000)


@dataclass(frozen=True, eq=False)
class LoadedModule:
    """A module that the guest's kernel has loaded, and where: (address, size in bytes) of its code.

    One that is unloaded and loaded again is another one.
    """

    name: str
    text: tuple[int, int]
    init: tuple[int, int]


@dataclass
class Executed:
    """Code that ran, as (first address, address behind it), of a module; None: of the kernel itself."""

    module: LoadedModule | None
    ranges: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class _Place:
    """A range of addresses that a module has."""

    start: int
    end: int
    module: LoadedModule
    pointer: int


class Recorder(Closing):
    """Records which code of a guest's kernel runs; for a QEMU with `qemu_args` that has `fd`.  One thread at a time.

    The guest's kernel needs the argument `nokaslr`, and QEMU needs TCG and plugins of API version 7 (11.1 and newer).
    """

    def __init__(self, image: KernelImage, *, kernel_too: bool = False) -> None:
        """`image`: the guest's kernel.  `kernel_too`: also the code that is built in, not only that of modules.

        CoverageError: the kernel has not the functions that load modules.
        """
        self._layout: ModuleLayout = image.module_layout
        watches = [{"address": image.symbols.address(name), "kind": kind} for name, kind in _WATCHED.items()]
        ranges = [_MODULES, *([_KERNEL] if kernel_too else [])]
        header = _HEADER.build(
            {
                "magic": _MAGIC,
                "cells": _CELLS,
                "log_size": _LOG,
                "module_size": self._layout.size,
                "ranges": len(ranges),
                "watches": len(watches),
                "range": _filled([{"start": start, "end": end} for start, end in ranges], {"start": 0, "end": 0}),
                "watch": _filled(watches, {"address": 0, "kind": 0}),
                "argument": "rdi",
                "used": 0,
                "cells_used": 0,
                "lost": 0,
                "loaded": 0,
            }
        )
        #: For QEMU, which must inherit it.
        self.fd = os.memfd_create("vmodel-coverage", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, len(header) + _CELLS + _LOG)
        self._map = mmap.mmap(self.fd, 0)
        self._map[: len(header)] = header
        self._log_at = len(header) + _CELLS
        self._read = 0
        self._places: list[_Place] = []
        #: Of each cell: its block's addresses, and its module; "" is that of no module.
        self._blocks: list[tuple[int, int, LoadedModule | None]] = []
        #: The cells whose module is not known yet: a module's parameters are set before it is announced.
        self._pending: deque[int] = deque(maxlen=_MOST_PENDING)
        self._overflowed = False

    def qemu_args(self) -> list[str]:
        """QEMU's arguments.  CoverageError: vmodel was installed without its plugin."""
        return ["-plugin", f"file={str(plugin()).replace(',', ',,')},log=/proc/self/fd/{self.fd}"]

    @property
    def loaded(self) -> bool:
        """Whether QEMU has loaded the plugin."""
        return bool(self._header().loaded)

    @property
    def lost(self) -> int:
        """How many records found no place: coverage is incomplete unless it is 0."""
        return int(self._header().lost)

    @property
    def used(self) -> float:
        """The part of the place for records that is used, 0 to 1."""
        header = self._header()
        return float(max(header.cells_used / _CELLS, header.used / _LOG))

    def _header(self) -> Any:
        return _HEADER.parse(self._map[: _HEADER.sizeof()])

    def close(self) -> None:
        """Frees the memory."""
        self._map.close()
        os.close(self.fd)

    # ---- reading ----------------------------------------------------------------------------

    def clear(self) -> None:
        """Clears what ran so far; blocks that run meanwhile may be lost or not."""
        start = _HEADER.sizeof()
        used = self._header().cells_used
        self._map[start : start + used] = bytes(used)

    def executed(self) -> list[Executed]:
        """What ran since the last `clear`, by module, in the order of loading.

        A module that is unloaded has it still; one that was loaded twice has two entries.
        """
        self._follow()
        start = _HEADER.sizeof()
        cells = self._map[start : start + len(self._blocks)]
        found: dict[LoadedModule | None, Executed] = {}
        at = cells.find(1)
        while at >= 0:
            address, end, module = self._blocks[at]
            if module is not None or address < _KERNEL[1]:
                found.setdefault(module, Executed(module)).ranges.append((address, end))
            at = cells.find(1, at + 1)
        return list(found.values())

    def _follow(self) -> None:
        """Reads the records that are new."""
        used = self._header().used
        log = self._map[self._log_at + self._read : self._log_at + used]
        self._read = used
        at = 0
        while at < len(log):
            address, value, kind = _RECORD.unpack_from(log, at)
            at += _RECORD.size
            if kind == _BLOCK:
                self._block(address, value)
            elif kind == _BOOT:
                self._places.clear()
                self._pending.clear()
            elif kind == _READY:
                self._places = [p for p in self._places if p.pointer != address or p.start != p.module.init[0]]
            elif kind == _FREE:
                self._places = [place for place in self._places if place.pointer != address]
            else:
                self._load(address, log[at : at + value])
                at += -(-value // 16) * 16

    def _block(self, address: int, size: int) -> None:
        module = next((p.module for p in reversed(self._places) if p.start <= address < p.end), None)
        if module is None and address >= _MODULES[0]:
            if len(self._pending) == _MOST_PENDING and not self._overflowed:
                self._overflowed = True
                log.warning(
                    "coverage: more than %d blocks of code outside of modules ran, as BPF's: what a module runs before"
                    " it is announced, such as the setting of its parameters, may be missing",
                    _MOST_PENDING,
                )
            self._pending.append(len(self._blocks))
        self._blocks.append((address, address + size, module))

    def _load(self, pointer: int, data: bytes) -> None:
        if len(data) < self._layout.size:
            raise CoverageError("QEMU could not read what the guest's kernel says about a module that it loads")
        module = self._module(data)
        new = [_Place(start, start + size, module, pointer) for start, size in (module.text, module.init) if size]
        # What is still known at these addresses has gone.
        self._places = [
            old
            for old in self._places
            if old.pointer != pointer and not any(old.start < place.end and place.start < old.end for place in new)
        ]
        self._places += new
        left: deque[int] = deque(maxlen=_MOST_PENDING)
        for cell in self._pending:
            start, end, _ = self._blocks[cell]
            if any(place.start <= start < place.end for place in new):
                self._blocks[cell] = (start, end, module)
            else:
                left.append(cell)
        self._pending = left

    def _module(self, data: bytes) -> LoadedModule:
        """The module with this struct module."""
        layout = self._layout
        name = data[layout.name : layout.name + _NAME].partition(b"\0")[0].decode(errors="replace")
        parts = ((layout.text_base, layout.text_size), (layout.init_base, layout.init_size))
        text, init = ((_U64.unpack_from(data, base)[0], _U32.unpack_from(data, size)[0]) for base, size in parts)
        return LoadedModule(name, text, init)


def _filled(entries: list[dict[str, int]], empty: dict[str, int]) -> list[dict[str, int]]:
    return [*entries, *[empty] * (_RANGES - len(entries))]


def plugin() -> Path:
    """The plugin's file.  CoverageError: it was not installed."""
    spec = importlib.util.find_spec("vmodel._coverage_plugin")
    if spec is None or spec.origin is None:
        raise CoverageError("vmodel was installed without its plugin for QEMU: install it again, with a C compiler")
    return Path(spec.origin)
