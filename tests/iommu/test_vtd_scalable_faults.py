"""Which faults the VT-d unit reports in scalable mode."""

from __future__ import annotations

import struct

import pytest

from tests.iommu.vtd_bench import (
    CONTEXT,
    DATA,
    FIRST,
    FSTS,
    IQE,
    IQER,
    NESTED,
    OUTSIDE,
    PRESENT,
    ROOT,
    SCALABLE,
    SECOND,
    TABLES,
    USER,
    ScalableBench,
    code,
    refused,
)
from vmodel.devices.vtd.codes import FaultCode

IOVA = 0x1234_5678_9000


# ---- faults ------------------------------------------------------------------------------------------

D, T = TABLES + 0x10_0000, TABLES + 0x11_0000  # a directory, a table of PASIDs
ROOTS, ENTRY = (CONTEXT | 1, 0), (FIRST | 1, 7, TABLES)


@pytest.mark.parametrize(
    "wanted,root,words,directory,entry",
    [
        (FaultCode.SM_ROOT_NOT_PRESENT, (CONTEXT, CONTEXT | 1), (), (), ()),
        (FaultCode.SM_ROOT_RESERVED, (CONTEXT | 3, 0), (), (), ()),
        (FaultCode.SM_ROOT_RESERVED, (CONTEXT | 1 | 1 << 60, 0), (), (), ()),
        (FaultCode.SM_CONTEXT_ACCESS, (OUTSIDE | 1, 0), (), (), ()),
        (FaultCode.SM_CONTEXT_NOT_PRESENT, ROOTS, (D,), (), ()),
        (FaultCode.SM_CONTEXT_RESERVED, ROOTS, (D | 1 | 4,), (), ()),  # DTE without ECAP.DT
        (FaultCode.SM_CONTEXT_RESERVED, ROOTS, (D | 1 | 16,), (), ()),  # PRE without ECAP.PRS
        (FaultCode.SM_CONTEXT_RESERVED, ROOTS, (D | 1 | 32,), (), ()),
        (FaultCode.SM_CONTEXT_RESERVED, ROOTS, (D | 1, 1 << 20), (), ()),
        (FaultCode.SM_CONTEXT_RESERVED, ROOTS, (D | 1, 0, 0, 1), (), ()),
        (FaultCode.RID_PASID, ROOTS, (D | 1, 1 << 13), (), ()),
        (FaultCode.DIRECTORY_ACCESS, ROOTS, (OUTSIDE | 1,), (), ()),
        (FaultCode.DIRECTORY_NOT_PRESENT, ROOTS, (D | 1,), (T,), ()),
        (FaultCode.DIRECTORY_RESERVED, ROOTS, (D | 1,), (T | 5,), ()),
        (FaultCode.PASID_ACCESS, ROOTS, (D | 1,), (OUTSIDE | 1,), ()),
        (FaultCode.PASID_NOT_PRESENT, ROOTS, (D | 1,), (T | 1,), (FIRST, 7, TABLES)),
        (FaultCode.PASID_RESERVED, ROOTS, (D | 1,), (T | 1,), (FIRST | 1 | 1 << 5, 7, TABLES)),
        (FaultCode.PASID_RESERVED, ROOTS, (D | 1,), (T | 1,), (FIRST | 1, 7 | 1 << 32, TABLES)),
        (FaultCode.PASID_RESERVED, ROOTS, (D | 1,), (T | 1,), (FIRST | 1, 7, TABLES | 1)),  # SRE
        (FaultCode.PASID_RESERVED, ROOTS, (D | 1,), (T | 1,), (*ENTRY, 0, 0, 0, 0, 1)),
        (FaultCode.PASID_INVALID, ROOTS, (D | 1,), (T | 1,), (1, 7)),
        (FaultCode.PASID_INVALID, ROOTS, (D | 1,), (T | 1,), (5 << 6 | 1, 7)),
        (FaultCode.PASID_INVALID, ROOTS, (D | 1,), (T | 1,), (FIRST | 1, 7, TABLES | 1 << 2)),  # 5 levels
        (FaultCode.PASID_INVALID, ROOTS, (D | 1,), (T | 1,), (FIRST | 1, 7, TABLES | 3 << 2)),
        (FaultCode.PASID_INVALID, ROOTS, (D | 1,), (T | 1,), (SECOND | 1, 7)),  # 2 levels
        (FaultCode.PASID_INVALID, ROOTS, (D | 1,), (T | 1,), (NESTED | 3 << 2 | 1, 7)),
        (FaultCode.FIRST_ACCESS, ROOTS, (D | 1,), (T | 1,), (FIRST | 1, 7, OUTSIDE)),
        (FaultCode.FIRST_NOT_PRESENT, ROOTS, (D | 1,), (T | 1,), ENTRY),
        # PWSNP, PGSNP, WPE and NXE mean nothing here.
        (FaultCode.FIRST_NOT_PRESENT, ROOTS, (D | 1,), (T | 1,), (FIRST | 1, 7 | 3 << 23, TABLES | 3 << 4)),
        (FaultCode.SECOND_ACCESS, ROOTS, (D | 1,), (T | 1,), (OUTSIDE | SECOND | 2 << 2 | 1, 7)),
    ],
)
def test_tables_of_devices(
    scalable: ScalableBench,
    wanted: FaultCode,
    root: tuple[int, ...],
    words: tuple[int, ...],
    directory: tuple[int, ...],
    entry: tuple[int, ...],
) -> None:
    scalable.words(ROOT, *root)
    scalable.words(CONTEXT + 32 * 0x18, *words)
    scalable.words(D, *directory)
    scalable.words(T, *entry)
    scalable.on()
    refused(scalable, "edu0", 0x7123)
    assert scalable.record() == (0x7000, wanted, 0x18, True)


def test_the_root_is_nowhere(scalable: ScalableBench) -> None:
    scalable.on(OUTSIDE | SCALABLE)
    refused(scalable, "edu0", 0)
    assert code(scalable) == FaultCode.SM_ROOT_ACCESS


def test_pasids_that_cannot_be(scalable: ScalableBench) -> None:
    scalable.device("edu0", PRESENT)
    scalable.device("edu1")
    scalable.on()
    refused(scalable, "edu0", 0, 1)
    refused(scalable, "edu1", 0, 1 << 13)
    refused(scalable, "edu1", 0, 64)
    assert [code(scalable, n) for n in range(3)] == [
        FaultCode.PASID_OFF,
        FaultCode.PASID_TOO_LARGE,
        FaultCode.DIRECTORY_NOT_PRESENT,
    ]


def test_pasid_zero_is_for_requests_without(scalable: ScalableBench) -> None:
    scalable.first("edu0")
    scalable.on()
    refused(scalable, "edu0", 0, 0)
    assert code(scalable) == FaultCode.PASID_INVALID


def test_a_unit_with_few_pasids() -> None:
    bench = ScalableBench("pasid_bits = 4")
    bench.first("edu0", 16)
    bench.on()
    refused(bench, "edu0", 0, 16)
    assert code(bench) == FaultCode.PASID_TOO_LARGE
    bench.close()


@pytest.mark.parametrize("stage", ["context", "directory", "pasid"])
def test_no_report_is_wanted(scalable: ScalableBench, stage: str) -> None:
    scalable.device("edu0")
    directory = struct.unpack_from("<Q", scalable.ram, scalable.context_at("edu0"))[0] & ~0xFFF
    scalable.first("edu0")
    at = {"context": scalable.context_at("edu0"), "directory": directory, "pasid": scalable.pasid_tables["edu0"]}[stage]
    scalable.ram[at] |= 2
    scalable.on()
    refused(scalable, "edu0", IOVA)
    assert scalable.get(FSTS) == 0


@pytest.mark.parametrize(
    "flags,iova,write,wanted",
    [
        (0, 0x1000, True, FaultCode.FIRST_NOT_PRESENT),
        (5, 0x1000, True, FaultCode.SM_NO_WRITE),
        (3, 0x1000, False, FaultCode.PRIVILEGE),
        (USER | 1 << 51, 0x1000, False, FaultCode.FIRST_RESERVED),
        (USER, 1 << 47, False, FaultCode.NOT_CANONICAL),
    ],
)
def test_first_stage_pages(scalable: ScalableBench, flags: int, iova: int, write: bool, wanted: FaultCode) -> None:
    bench = ScalableBench("output_bits = 46") if flags >> 51 else scalable
    bench.map_first(bench.first("edu0"), 0x1000, DATA, flags)
    bench.on()
    refused(bench, "edu0", iova, write=write)
    assert bench.record() == (iova, wanted, 0x18, not write)
    if bench is not scalable:
        bench.close()


@pytest.mark.parametrize(
    "flags,iova,write,wanted",
    [
        (0, 0x1000, False, FaultCode.SECOND_PERMISSION),
        (1, 0x1000, True, FaultCode.SM_NO_WRITE),
        (2, 0x1000, False, FaultCode.SM_NO_READ),
        (3 | 1 << 62, 0x1000, False, FaultCode.SECOND_RESERVED),
        (3, 1 << 39, False, FaultCode.SM_TOO_WIDE),
    ],
)
def test_second_stage_pages(scalable: ScalableBench, flags: int, iova: int, write: bool, wanted: FaultCode) -> None:
    scalable.map(scalable.second_stage("edu0", levels=3), 0x1000, DATA, flags, levels=3)
    scalable.on()
    refused(scalable, "edu0", iova, write=write)
    assert scalable.record() == (iova, wanted, 0x18, not write)


def test_the_first_stage_leads_too_far(scalable: ScalableBench) -> None:
    first, second = scalable.nested("edu0")
    scalable.words(first, 1 << 50 | USER)
    scalable.on()
    refused(scalable, "edu0", 0)
    assert code(scalable) == FaultCode.SECOND_TOO_WIDE
    scalable.words(first, 0x60_0000 | USER)
    refused(scalable, "edu0", 0)
    assert code(scalable, 1) == FaultCode.SECOND_PERMISSION
    scalable.map(second, 0x60_0000, OUTSIDE)
    refused(scalable, "edu0", 0)
    assert code(scalable, 2) == FaultCode.FIRST_ACCESS


@pytest.mark.parametrize(
    "mode,wanted,why", [(0, FaultCode.PASID_IN_LEGACY, 0), (2, FaultCode.MODE, 7), (3, FaultCode.MODE, 7)]
)
def test_other_modes(scalable: ScalableBench, mode: int, wanted: FaultCode, why: int) -> None:
    scalable.device("edu0")
    scalable.on(ROOT | mode << 10)
    refused(scalable, "edu0", 0, 1)
    assert code(scalable) == wanted
    scalable.clear()
    scalable.queue((5, 0))
    assert scalable.get(FSTS) == (IQE if why else 0) and scalable.get(IQER, 8) == why
