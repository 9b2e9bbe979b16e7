"""One valid request of each kind, for tests that cut, join and mutate them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmodel.vfio_user.wire import Command, Feature, FeatureFlags


@dataclass(frozen=True)
class Request:
    """A request that succeeds on a fresh toy; `fds`: how many eventfds (SET_IRQS) or memory files go with it."""

    name: str
    command: Command
    payload: bytes
    fds: int = 0


def _access(region: int, offset: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<QII", offset, region, count) + data


def _feature(feature: Feature, method: FeatureFlags, data: bytes = b"", argsz: int = 4096) -> bytes:
    return struct.pack("<II", argsz, feature | method) + data


GET, SET, PROBE = FeatureFlags.GET, FeatureFlags.SET, FeatureFlags.PROBE
REPORT = struct.pack("<3Q", 0, 4096, 4096)

#: In an order in which all of them succeed on one connection.
REQUESTS = [
    Request("map", Command.DMA_MAP, struct.pack("<IIQQQ", 32, 3, 0, 0x10000, 4096)),
    Request("map with fd", Command.DMA_MAP, struct.pack("<IIQQQ", 32, 3, 4096, 0x20000, 4096), 1),
    Request("unmap", Command.DMA_UNMAP, struct.pack("<IIQQ", 24, 0, 0, 0x30000)),
    Request("info", Command.DEVICE_GET_INFO, struct.pack("<4I", 16, 0, 0, 0)),
    Request("region info", Command.DEVICE_GET_REGION_INFO, struct.pack("<4IQQ", 64, 0, 0, 0, 0, 0)),
    Request("io fds", Command.DEVICE_GET_REGION_IO_FDS, struct.pack("<4I", 56, 0, 0, 0)),
    Request("irq info", Command.DEVICE_GET_IRQ_INFO, struct.pack("<4I", 16, 0, 2, 0)),
    Request("irqs off", Command.DEVICE_SET_IRQS, struct.pack("<5I", 20, 1 | 32, 2, 0, 0)),
    Request("irqs by bools", Command.DEVICE_SET_IRQS, struct.pack("<5I", 22, 2 | 32, 2, 0, 2) + b"\1\0"),
    Request("irqs by eventfds", Command.DEVICE_SET_IRQS, struct.pack("<5I", 20, 4 | 32, 2, 3, 2), 2),
    Request("read config", Command.REGION_READ, _access(7, 0, 64)),
    Request("write config", Command.REGION_WRITE, _access(7, 4, 2, b"\7\0")),
    Request("read", Command.REGION_READ, _access(0, 4, 4)),
    Request("write", Command.REGION_WRITE, _access(0, 4, 4, b"abcd")),
    Request("write RAM", Command.REGION_WRITE, _access(0, 0x2000, 300, bytes(300))),
    Request(
        "write multi",
        Command.REGION_WRITE_MULTI,
        struct.pack("<Q", 2) + _access(0, 0, 4, b"\1".ljust(8, b"\0")) + _access(0, 4, 2, b"\2".ljust(8, b"\0")),
    ),
    Request("probe", Command.DEVICE_FEATURE, _feature(Feature.MIGRATION, PROBE | GET)),
    Request("migration flags", Command.DEVICE_FEATURE, _feature(Feature.MIGRATION, GET)),
    Request("log", Command.DEVICE_FEATURE, _feature(Feature.DMA_LOGGING_START, SET, struct.pack("<QII", 4096, 0, 0))),
    Request("report", Command.DEVICE_FEATURE, _feature(Feature.DMA_LOGGING_REPORT, GET, REPORT)),
    Request("log no more", Command.DEVICE_FEATURE, _feature(Feature.DMA_LOGGING_STOP, SET)),
    Request("save", Command.DEVICE_FEATURE, _feature(Feature.MIG_DEVICE_STATE, SET, struct.pack("<II", 3, 0))),
    Request("read state", Command.MIG_DATA_READ, struct.pack("<II", 8 + 100, 100)),
    Request("resume", Command.DEVICE_FEATURE, _feature(Feature.MIG_DEVICE_STATE, SET, struct.pack("<II", 4, 0))),
    Request("write state", Command.MIG_DATA_WRITE, struct.pack("<II", 12, 4) + b"abcd"),
    Request("reset", Command.DEVICE_RESET, b""),
]
