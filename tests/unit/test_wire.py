"""wire.py against the tables of the specification: each field's offset and size, in the text's order."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from construct import ConstructError
from hypothesis import given
from hypothesis import strategies as st

from vmodel.vfio_user import wire

#: Structure, its fields as (name, offset, size), and its fixed size: typed in from the specification.
TABLES: dict[str, tuple[Any, list[tuple[str, int, int]], int]] = {
    "Header": (
        wire.Header,
        [("id", 0, 2), ("command", 2, 2), ("size", 4, 4), ("flags", 8, 4), ("error", 12, 4)],
        16,
    ),
    "VFIO_USER_VERSION": (wire.Version, [("major", 0, 2), ("minor", 2, 2)], 4),
    "VFIO_USER_DMA_MAP": (
        wire.DmaMap,
        [("argsz", 0, 4), ("flags", 4, 4), ("offset", 8, 8), ("address", 16, 8), ("size", 24, 8)],
        32,
    ),
    "VFIO_USER_DMA_UNMAP": (
        wire.DmaUnmap,
        [("argsz", 0, 4), ("flags", 4, 4), ("address", 8, 8), ("size", 16, 8)],
        24,
    ),
    "VFIO_USER_DEVICE_GET_INFO": (
        wire.DeviceInfo,
        [("argsz", 0, 4), ("flags", 4, 4), ("num_regions", 8, 4), ("num_irqs", 12, 4)],
        16,
    ),
    "VFIO_USER_DEVICE_GET_REGION_INFO": (
        wire.RegionInfoHead,
        [("argsz", 0, 4), ("flags", 4, 4), ("index", 8, 4), ("cap_offset", 12, 4), ("size", 16, 8), ("offset", 24, 8)],
        32,
    ),
    "VFIO cap header": (wire.CapHeader, [("id", 0, 2), ("version", 2, 2), ("next", 4, 4)], 8),
    "VFIO_USER_DEVICE_GET_REGION_IO_FDS": (
        wire.RegionIoFds,
        [("argsz", 0, 4), ("flags", 4, 4), ("index", 8, 4), ("count", 12, 4)],
        16,
    ),
    "Sub-Region IO FD info": (
        wire.SubRegion,
        [
            ("offset", 0, 8),
            ("size", 8, 8),
            ("fd_index", 16, 4),
            ("type", 20, 4),
            ("flags", 24, 4),
            ("datamatch", 32, 8),
        ],
        40,
    ),
    "VFIO_USER_DEVICE_GET_IRQ_INFO": (
        wire.IrqInfoWire,
        [("argsz", 0, 4), ("flags", 4, 4), ("index", 8, 4), ("count", 12, 4)],
        16,
    ),
    "VFIO_USER_DEVICE_SET_IRQS": (
        wire.IrqSet,
        [("argsz", 0, 4), ("flags", 4, 4), ("index", 8, 4), ("start", 12, 4), ("count", 16, 4)],
        20,
    ),
    "VFIO_USER_REGION_READ, _WRITE": (wire.RegionAccess, [("offset", 0, 8), ("region", 8, 4), ("count", 12, 4)], 16),
    "VFIO_USER_DMA_READ, _WRITE": (wire.DmaAccess, [("address", 0, 8), ("count", 8, 8)], 16),
    "VFIO_USER_DEVICE_FEATURE": (wire.DeviceFeature, [("argsz", 0, 4), ("flags", 4, 4)], 8),
    "VFIO_DEVICE_FEATURE_MIGRATION": (wire.Migration, [("flags", 0, 8)], 8),
    "VFIO_DEVICE_FEATURE_MIG_DEVICE_STATE": (wire.MigState, [("device_state", 0, 4), ("data_fd", 4, 4)], 8),
    "VFIO_DEVICE_FEATURE_DMA_LOGGING_START": (
        wire.DmaLoggingStart,
        [("page_size", 0, 8), ("num_ranges", 8, 4), ("reserved", 12, 4)],
        16,
    ),
    "VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT": (
        wire.DmaLoggingReport,
        [("iova", 0, 8), ("length", 8, 8), ("page_size", 16, 8)],
        24,
    ),
    "VFIO_USER_MIG_DATA_READ, _WRITE": (wire.MigData, [("argsz", 0, 4), ("size", 4, 4)], 8),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_field_is_where_the_specification_says(name: str) -> None:
    structure, fields, size = TABLES[name]
    for field, offset, width in fields:
        raw = bytearray(size)
        raw[offset : offset + width] = bytes(range(1, width + 1))
        parsed = structure.parse(bytes(raw))
        assert parsed[field] == int.from_bytes(raw[offset : offset + width], "little"), field
        for other, _, _ in fields:
            assert other == field or parsed[other] == 0, (field, other)


@pytest.mark.parametrize("name", TABLES)
def test_a_byte_less_is_too_short(name: str) -> None:
    structure, _, size = TABLES[name]
    structure.parse(bytes(size))
    with pytest.raises(ConstructError):
        structure.parse(bytes(size - 1))


@pytest.mark.parametrize("name", TABLES)
@given(data=st.binary(min_size=40, max_size=40))
def test_what_is_parsed_builds_the_same_bytes(name: str, data: bytes) -> None:
    structure, fields, size = TABLES[name]
    parsed = structure.parse(data[:size])
    built = structure.build(parsed)
    for _, offset, width in fields:
        assert built[offset : offset + width] == data[offset : offset + width]
    assert len(built) == size


def test_arrays() -> None:
    areas = struct.pack("<II4Q", 2, 0, 0x1000, 0x2000, 0x5000, 0x1000)
    sparse = wire.SparseMmap.parse(areas)
    assert [(area.offset, area.size) for area in sparse.areas] == [(0x1000, 0x2000), (0x5000, 0x1000)]
    with pytest.raises(ConstructError):
        wire.SparseMmap.parse(areas[:-1])
    # One device write of REGION_WRITE_MULTI: 8, 4, 4 and always 8 bytes of data.
    multi = struct.pack("<QQII8s", 1, 0x10, 2, 3, b"abc")
    (write,) = wire.WriteMulti.parse(multi).wrs
    assert (write.offset, write.region, write.count, write.data) == (0x10, 2, 3, b"abc" + bytes(5))
    ranges = wire.DmaLoggingStart.parse(struct.pack("<QII4Q", 4096, 2, 0, 1, 2, 3, 4)).ranges
    assert [(entry.iova, entry.length) for entry in ranges] == [(1, 2), (3, 4)]


def test_numbers_of_the_specification() -> None:
    assert {c.name: int(c) for c in wire.Command} == {
        "VERSION": 1,
        "DMA_MAP": 2,
        "DMA_UNMAP": 3,
        "DEVICE_GET_INFO": 4,
        "DEVICE_GET_REGION_INFO": 5,
        "DEVICE_GET_REGION_IO_FDS": 6,
        "DEVICE_GET_IRQ_INFO": 7,
        "DEVICE_SET_IRQS": 8,
        "REGION_READ": 9,
        "REGION_WRITE": 10,
        "DMA_READ": 11,
        "DMA_WRITE": 12,
        "DEVICE_RESET": 13,
        "REGION_WRITE_MULTI": 15,
        "DEVICE_FEATURE": 16,
        "MIG_DATA_READ": 17,
        "MIG_DATA_WRITE": 18,
    }
    assert (wire.HeaderFlags.REPLY, wire.HeaderFlags.NO_REPLY, wire.HeaderFlags.ERROR) == (1, 1 << 4, 1 << 5)
    assert (wire.FeatureFlags.GET, wire.FeatureFlags.SET, wire.FeatureFlags.PROBE) == (1 << 16, 1 << 17, 1 << 18)
    assert [int(flag) for flag in wire.IrqSetFlags] == [1, 2, 4, 8, 16, 32]
    assert [int(flag) for flag in wire.IrqFlags] == [1, 2, 4, 8]
    assert [int(flag) for flag in wire.RegionFlags] == [1, 2, 4, 8]
    assert [state.name for state in sorted(wire.DeviceState)] == [
        "ERROR",
        "STOP",
        "RUNNING",
        "STOP_COPY",
        "RESUMING",
        "RUNNING_P2P",
        "PRE_COPY",
        "PRE_COPY_P2P",
    ]
    assert {feature.name: int(feature) for feature in wire.Feature} == {
        "MIGRATION": 1,
        "MIG_DEVICE_STATE": 2,
        "DMA_LOGGING_START": 6,
        "DMA_LOGGING_STOP": 7,
        "DMA_LOGGING_REPORT": 8,
    }
