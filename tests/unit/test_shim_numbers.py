"""Numbers that Python has in words of its own are those of vmshim.h and wire.h; all of them, and no others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from vmodel._vmshim import ffi, lib

from vmodel.errors import Access, Reason
from vmodel.iommu.pgtable import Table, TableFlag, TableFormat
from vmodel.vfio_user.wire import Command, DmaUnmapFlags, HeaderFlags, Region

WIRE = (Path(__file__).parents[2] / "c_shim/wire.h").read_text()
#: What Command calls otherwise than wire.h.
LONGER = {"SET_IRQS": "DEVICE_SET_IRQS", "WRITE_MULTI": "REGION_WRITE_MULTI"}


def numbers(prefix: str) -> dict[str, int]:
    """The header's constants that begin so, by the rest of their name."""
    return {name.removeprefix(prefix): getattr(lib, name) for name in dir(lib) if name.startswith(prefix)}


def test_reasons() -> None:
    header = numbers("VMS_REASON_")
    assert header.pop("NONE") == 0
    # From 100 on there are those that the shim does not know.
    assert header == {reason.name: int(reason) for reason in Reason if reason < 100}


def test_access() -> None:
    header = numbers("VMS_PROT_")
    assert header.pop("NONE") not in {int(a | b) for a in Access for b in Access}
    assert header == {access.name: int(access) for access in Access}


def test_tables() -> None:
    formats = {f.name: int(f) for f in TableFormat}
    flags = {(f.name or "").removeprefix("PAGES_"): int(f) for f in TableFlag}
    assert numbers("VMS_TABLE_") == {**formats, **flags}
    assert [name for name, _ in ffi.typeof("vms_table").fields] == list(Table.__dataclass_fields__)


def test_regions() -> None:
    assert max(Region) + 1 == lib.VMS_REGIONS


def test_commands() -> None:
    found = re.findall(r"^ *CMD_(\w+) = (\d+),$", WIRE, re.MULTILINE)
    assert len(found) == WIRE.count("CMD_")
    for name, number in found:
        assert Command[LONGER.get(name, name)] == int(number), name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TYPE_MASK", HeaderFlags.TYPE),
        ("TYPE_COMMAND", HeaderFlags.COMMAND),
        ("TYPE_REPLY", HeaderFlags.REPLY),
        ("FLAG_NO_REPLY", HeaderFlags.NO_REPLY),
        ("FLAG_ERROR", HeaderFlags.ERROR),
        ("UNMAP_FLAG_ALL", DmaUnmapFlags.ALL),
    ],
)
def test_header_flags(name: str, value: int) -> None:
    found = re.search(rf"^#define {name} (\w+)u\b", WIRE, re.MULTILINE)
    assert found is not None and int(found[1], 0) == value
