"""Scalable mode of the VT-d unit: PASID tables, first-stage, nested and second-stage tables, and their caches."""

from __future__ import annotations

import contextlib
import logging
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.iommu.vtd_bench import (
    CAP,
    CONTEXT,
    DATA,
    ECAP,
    FSTS,
    GCMD,
    IQA,
    IQE,
    IQER,
    IQH,
    IQT,
    OUTSIDE,
    PASIDE,
    PRESENT,
    QIE,
    QUEUE,
    RECORDS,
    ROOT,
    RTADDR,
    SCALABLE,
    SM_SID,
    SRTP,
    STATUS,
    TABLES,
    TE,
    THROUGH,
    USER,
    WIDE,
    Bench,
    ScalableBench,
    code,
    context,
    iotlb,
    pasid_cache,
    pasid_iotlb,
    read,
    refused,
)
from vmodel.devices.vtd import contexts as contexts_module
from vmodel.devices.vtd.codes import FaultCode
from vmodel.errors import ConfigError, DmaFault, Reason
from vmodel.iommu.domain import DomainType, IdentityDomain, TableDomain

IOVA = 0x1234_5678_9000


# ---- what there is -----------------------------------------------------------------------------------


def ecap(capabilities: str = "", params: str = "") -> tuple[int, int]:
    bench = Bench(capabilities, params)
    found = bench.get(CAP, 8), bench.get(ECAP, 8)
    bench.close()
    return found


def test_the_switches() -> None:
    """Bits of ECAP: DT 2, NEST 26, PRS 29, PSS 35:39, PASID 40, PDS 42, SMTS 43, SSADS 45, SSTS, FSTS, SMPWCS, RPS."""
    plain_cap, plain = ecap()
    assert plain >> 18 == 0 and not plain & 1 << 2
    cap, found = ecap(params="scalable = true")
    assert found & (1 << 18) - 1 == plain and cap == plain_cap | 1 << 56
    high = 1 << 26 | 19 << 35 | 1 << 40 | 1 << 43 | 0b11111 << 45
    assert found == plain | high
    _, found = ecap(params="scalable = true, ats = true")
    assert found == plain | high | 1 << 2 | 1 << 29 | 1 << 42
    assert ecap(params="ats = true") == (plain_cap, plain | 1 << 2)
    less = "nesting = false, page_requests = false, dirty_tracking = false, pasid_bits = 8"
    _, found = ecap(less, "scalable = true, ats = true")
    assert found == plain | 1 << 2 | 7 << 35 | 1 << 40 | 1 << 43 | 0b11110 << 45
    _, found = ecap("pasid_bits = 0", "scalable = true, ats = true")
    assert found == plain | 1 << 2 | 1 << 26 | 1 << 43 | 0b11111 << 45
    cap, _ = ecap("input_bits = 57", "scalable = true")
    assert (cap >> 8 & 31, cap >> 16 & 63, cap >> 60 & 1) == (0b1110, 56, 1)


def test_no_such_unit() -> None:
    with pytest.raises(ConfigError, match=r"^m.toml: iommu\[0\].capabilities: input_bits 47: .* at least 48$"):
        ScalableBench("input_bits = 47")


def test_what_legacy_units_do_not_have(bench: Bench) -> None:
    bench.put(RTADDR, ROOT | SCALABLE, 8)
    bench.put(IQA, QUEUE | WIDE, 8)
    assert (bench.get(RTADDR, 8), bench.get(IQA, 8)) == (ROOT, QUEUE)


# ---- translation -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["edu0", "edu1"])
@pytest.mark.parametrize("rid_pasid", [0, 5])
def test_first_stage(scalable: ScalableBench, name: str, rid_pasid: int) -> None:
    scalable.device(name, rid_pasid=rid_pasid)
    scalable.map_first(scalable.first(name, rid_pasid), IOVA, DATA)
    scalable.on()
    scalable.ram[DATA : DATA + 4] = b"data"
    assert read(scalable, name, IOVA) == b"data"
    group = scalable.system[name].group
    assert group is not None and isinstance(group.domain, TableDomain)
    assert group.domain.iova_to_phys(IOVA + 5) == DATA + 5
    assert f"first stage, pasid {rid_pasid}" in group.domain.name


@pytest.mark.parametrize("levels", [3, 4])
def test_second_stage(scalable: ScalableBench, levels: int) -> None:
    iova = 0x12_3456_7000
    scalable.map(scalable.second_stage("edu0", levels=levels), iova, DATA, levels=levels)
    scalable.on()
    scalable.ram[DATA : DATA + 4] = b"data"
    assert read(scalable, "edu0", iova) == b"data"


@pytest.mark.parametrize("stage", ["first", "second"])
def test_five_levels(stage: str) -> None:
    bench = ScalableBench("input_bits = 57")
    iova = 0xAB_1234_5678_9000
    if stage == "first":
        bench.map_first(bench.first("edu0", levels=5), iova, DATA, levels=5)
    else:
        bench.map(bench.second_stage("edu0", levels=5), iova, DATA, levels=5)
    bench.on()
    bench.ram[DATA : DATA + 4] = b"five"
    assert read(bench, "edu0", iova) == b"five"
    bench.close()


def test_nested(scalable: ScalableBench) -> None:
    """Where the first stage's tables are, and what they lead to, is for the second stage to say."""
    first, second = scalable.nested("edu0")
    scalable.map_first(first, IOVA, 0x50_0000)
    table, slot = first, 0
    for level in (4, 3, 2):  # identity for the tables on the way
        slot = table + 8 * (IOVA >> 3 + 9 * level & 511)
        table = struct.unpack_from("<Q", scalable.ram, slot)[0] & ~0xFFF
        scalable.map(second, table, table)
    scalable.on()
    assert refused(scalable, "edu0", IOVA) is Reason.NOT_MAPPED
    assert code(scalable) == FaultCode.SECOND_PERMISSION
    scalable.map(second, 0x50_0000, DATA)
    scalable.ram[DATA : DATA + 4] = b"nest"
    assert read(scalable, "edu0", IOVA) == b"nest"
    group = scalable.system["edu0"].group
    assert group is not None and group.domain.type is DomainType.NESTED


def test_pass_through(scalable: ScalableBench) -> None:
    scalable.entry("edu0", 0, THROUGH | PRESENT, 3)
    scalable.on()
    scalable.ram[DATA : DATA + 4] = b"pass"
    assert read(scalable, "edu0", DATA) == b"pass"
    group = scalable.system["edu0"].group
    assert group is not None and isinstance(group.domain, IdentityDomain)
    assert refused(scalable, "edu0", OUTSIDE) is Reason.NO_WINDOW
    assert scalable.get(FSTS) == 0


def test_accessed_and_dirty(scalable: ScalableBench) -> None:
    root = scalable.second_stage("edu0", flags=1 << 9)
    scalable.map(root, IOVA, DATA)
    slot = scalable.slot(root, IOVA, 4)
    scalable.on()
    read(scalable, "edu0", IOVA)
    assert struct.unpack_from("<Q", scalable.ram, slot)[0] == DATA | 0x103
    scalable.machine.devices["edu0"].dma.write(IOVA, b"x")
    assert struct.unpack_from("<Q", scalable.ram, slot)[0] == DATA | 0x303


def test_pasids(scalable: ScalableBench) -> None:
    """Each has its own tables, and so have requests without one."""
    for pasid, at in ((0, 0), (1, 0x1000), (63, 0x2000)):
        scalable.map_first(scalable.first("edu0", pasid, domain_id=7), IOVA, DATA + at)
        scalable.ram[DATA + at : DATA + at + 4] = b"%4d" % pasid
    scalable.on()
    assert [read(scalable, "edu0", IOVA, pasid) for pasid in (None, 1, 63)] == [b"   0", b"   1", b"  63"]
    group = scalable.system["edu0"].group
    assert group is not None and set(group.pasids) == {1, 63}
    assert refused(scalable, "edu0", IOVA, 2) is Reason.PASID
    page, info = scalable.get(RECORDS, 8), scalable.get(RECORDS + 8, 8)
    assert page == IOVA and info == 3 << 62 | 2 << 40 | FaultCode.PASID_NOT_PRESENT << 32 | 1 << 31 | 0x18
    scalable.put(GCMD, 0)
    assert not group.pasids
    assert refused(scalable, "edu0", IOVA, 1) is Reason.PASID
    scalable.put(GCMD, TE)
    assert read(scalable, "edu0", IOVA, 1) == b"   1"
    scalable.unit.backend.reset_device()
    assert not group.pasids and isinstance(group.domain, IdentityDomain)


def test_one_entry_for_requests_with_and_without(scalable: ScalableBench) -> None:
    scalable.device("edu0", rid_pasid=3)
    scalable.map_first(scalable.first("edu0", 3), IOVA, DATA)
    scalable.on()
    assert read(scalable, "edu0", IOVA) == read(scalable, "edu0", IOVA, 3)
    group = scalable.system["edu0"].group
    assert group is not None and group.domain is group.pasids[3] and group.domain.users == 2
    scalable.entry("edu0", 3)
    scalable.queue(pasid_cache(3))
    for pasid in (None, 3):
        assert refused(scalable, "edu0", IOVA, pasid) in (Reason.BLOCKED, Reason.PASID)


def test_caches_do_not_grow_for_ever(scalable: ScalableBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts_module, "_MOST", 4)
    for pasid in range(1, 9):
        scalable.map_first(scalable.first("edu0", pasid), IOVA, DATA)
    scalable.on()
    for _ in range(2):
        for pasid in range(1, 9):
            read(scalable, "edu0", IOVA, pasid)
            assert len(scalable.contexts.entries) <= 4
    for pasid in range(10, 20):
        refused(scalable, "edu0", IOVA, pasid)
    group = scalable.system["edu0"].group
    assert group is not None and set(group.pasids) == {5, 6, 7, 8}


# ---- caches ------------------------------------------------------------------------------------------


PAGES_4 = 0x2002  # with AM 2, from address 0 on


@pytest.mark.parametrize(
    "stage,descriptor,gone",
    [
        ("first", iotlb(1), True),
        ("first", iotlb(2, 7), True),
        ("first", iotlb(2, 8), False),
        ("first", iotlb(3, 7, 0x9000), True),
        ("first", pasid_iotlb(2, 7, 1), True),
        ("first", pasid_iotlb(2, 7, 2), False),
        ("first", pasid_iotlb(2, 8, 1), False),
        ("first", pasid_iotlb(3, 7, 1, 0x1000), True),
        ("first", pasid_iotlb(3, 7, 1, PAGES_4), True),
        ("first", pasid_iotlb(3, 7, 1, 0x9000), False),
        ("second", iotlb(2, 7), True),
        ("second", iotlb(3, 7, 0x1000), True),
        ("second", iotlb(3, 7, 0x9000), False),
        ("second", pasid_iotlb(2, 7, 1), True),
        ("second", pasid_iotlb(3, 7, 1, 0x9000), True),
        ("second", pasid_iotlb(3, 7, 2, 0x1000), False),
        ("first", pasid_cache(0, 8), False),
        ("first", context(3, 0x19), False),
    ],
)
def test_translations_are_stale_until_flushed(
    scalable: ScalableBench, stage: str, descriptor: tuple[int, int], gone: bool
) -> None:
    if stage == "first":
        root = scalable.first("edu0", 1)
        scalable.map_first(root, 0x1000, DATA)
    else:
        root = scalable.second_stage("edu0", 1)
        scalable.map(root, 0x1000, DATA)
    scalable.on()
    scalable.ram[DATA : DATA + 4] = b"old "
    scalable.ram[DATA + 0x1000 : DATA + 0x1004] = b"new "
    assert read(scalable, "edu0", 0x1000, 1) == b"old "
    scalable.words(scalable.slot(root, 0x1000, 4), DATA + 0x1000 | USER)
    assert read(scalable, "edu0", 0x1000, 1) == b"old "
    scalable.queue(descriptor)
    assert scalable.get(IQH, 8) == scalable.get(IQT, 8)
    assert read(scalable, "edu0", 0x1000, 1) == (b"new " if gone else b"old ")


@pytest.mark.parametrize(
    "descriptor,gone",
    [
        (pasid_cache(3), True),
        (pasid_cache(0, 7), True),
        (pasid_cache(0, 8), False),
        (pasid_cache(1, 7, 1), True),
        (pasid_cache(1, 7, 2), False),
        (pasid_cache(1, 8, 1), False),
        # The context cache is another one, and so are translations.
        (context(1), False),
        (context(3, 0x18), False),
        (iotlb(1), False),
    ],
)
def test_entries_are_stale_until_invalidated(scalable: ScalableBench, descriptor: tuple[int, int], gone: bool) -> None:
    scalable.map_first(scalable.first("edu0", 1), 0x1000, DATA)
    scalable.on()
    scalable.ram[DATA : DATA + 4] = b"old "
    scalable.ram[DATA + 0x1000 : DATA + 0x1004] = b"new "
    assert read(scalable, "edu0", 0x1000, 1) == b"old "
    scalable.map_first(scalable.first("edu0", 1), 0x1000, DATA + 0x1000)
    scalable.queue(descriptor)
    assert read(scalable, "edu0", 0x1000, 1) == (b"new " if gone else b"old ")


@pytest.mark.parametrize(
    "descriptor,gone", [(context(1), True), (context(2), True), (context(3, 0x18), True), (context(3, 0xA0), False)]
)
def test_context_entries(scalable: ScalableBench, descriptor: tuple[int, int], gone: bool) -> None:
    scalable.map_first(scalable.first("edu0"), 0x1000, DATA)
    scalable.on()
    read(scalable, "edu0", 0x1000)
    scalable.words(scalable.context_at("edu0"), 0)
    read(scalable, "edu0", 0x1000)
    scalable.queue(descriptor)
    if gone:
        assert refused(scalable, "edu0", 0x1000) is Reason.BLOCKED
        assert code(scalable) == FaultCode.SM_CONTEXT_NOT_PRESENT
    else:
        read(scalable, "edu0", 0x1000)


# ---- a guest that omits invalidations ------------------------------------------------------------------


def test_forgotten_invalidations(caplog: pytest.LogCaptureFixture) -> None:
    """Counted and reported: a translation, a PASID table entry, a context entry."""
    bench = ScalableBench(params="report_stale = true")
    root = bench.first("edu0", 1)
    bench.map_first(root, 0x1000, DATA)
    bench.on()
    dma = bench.machine.devices["edu0"].dma
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            read(bench, "edu0", 0x1000, 1)
        assert dma.stats.stale == 0 and not caplog.messages
        bench.words(bench.slot(root, 0x1000, 4), 0)
        read(bench, "edu0", 0x1000, 1)
        bench.queue(pasid_iotlb(3, 7, 1, 0x1000))
        assert dma.stats.stale == 1
        bench.map_first(root, 0x1000, DATA)
        read(bench, "edu0", 0x1000, 1)
        read(bench, "edu0", 0x1000, 1)
        assert dma.stats.stale == 1
        bench.entry("edu0", 1)
        read(bench, "edu0", 0x1000, 1)
        assert dma.stats.stale == 2
        bench.first("edu0", 1)
        bench.queue(context(1))  # does not fetch the entry again
        bench.words(bench.pasid_tables["edu0"] + 64, 0)
        read(bench, "edu0", 0x1000, 1)
        assert dma.stats.stale == 3
    first, second, _ = caplog.messages
    assert "edu0 [0x18] pasid 0x1: READ at iova 0x1000 is stale: cached is gpa 0x800000" in first
    assert f"its entry was read from {bench.pasid_tables['edu0'] + 64:#x}" in second
    bench.close()


@pytest.mark.parametrize("at", [ROOT, CONTEXT + 16 * 0x18, CONTEXT + 16 * 0x18 + 8])
def test_forgotten_context_entries_of_legacy_mode(at: int) -> None:
    bench = Bench(params="report_stale = true")
    bench.map(bench.translate("edu0"), 0x5000, DATA)
    bench.on()
    dma = bench.machine.devices["edu0"].dma
    for _ in range(2):
        dma.read(0x5000, 4)
    assert dma.stats.stale == 0
    bench.words(at, 0)
    dma.read(0x5000, 4)
    assert dma.stats.stale == 1
    bench.close()


# ---- the queue ---------------------------------------------------------------------------------------


def test_widths_of_descriptors(scalable: ScalableBench) -> None:
    scalable.on()
    scalable.put(IQA, QUEUE, 8)
    scalable.put(GCMD, TE | QIE)
    scalable.words(QUEUE, 5, 0)
    scalable.put(IQT, 16, 8)
    assert scalable.get(FSTS) == IQE and scalable.get(IQER, 8) == 5
    scalable.put(GCMD, TE)
    scalable.put(FSTS, IQE)
    scalable.put(IQA, QUEUE | WIDE, 8)
    scalable.put(GCMD, TE | QIE)
    assert scalable.get(IQER, 8) == 6  # the tail is between two
    scalable.put(IQT, 32, 8)
    scalable.words(QUEUE, 5 | 1 << 5 | 9 << 32, STATUS, 0, 0)
    scalable.put(FSTS, IQE)
    assert scalable.get(FSTS) == 0 and scalable.get(IQH, 8) == 32 and scalable.ram[STATUS] == 9


@pytest.mark.parametrize(
    "words,why",
    [
        ((9,), 3),  # page group responses without ECAP.PRS
        ((4,), 3),
        ((10,), 3),
        ((5, 0, 1), 4),
        ((5, 0, 0, 1), 4),
        ((5 | 1 << 7,), 4),  # draining
        ((6 | 1 << 4,), 4),
        ((6 | 3 << 4, 19), 4),
        ((6 | 2 << 4 | 1 << 52,), 4),
        ((7 | 2 << 4,), 4),
        ((7 | 3 << 4, 1), 4),
        ((8, 2), 4),
        ((1 | 1 << 4, 0, 1), 4),
    ],
)
def test_descriptors_that_are_wrong(scalable: ScalableBench, words: tuple[int, ...], why: int) -> None:
    scalable.queue((5,), words)
    assert scalable.get(FSTS) == IQE and scalable.get(IQER, 8) == why and scalable.get(IQH, 8) == 32


def test_narrow_descriptors_in_legacy_mode(scalable: ScalableBench) -> None:
    """A guest may leave the mode alone."""
    root = scalable.translate("edu0")
    scalable.map(root, 0x5000, DATA)
    Bench.on(scalable, ROOT)
    scalable.read("edu0", 0x5000)
    Bench.queue(scalable, (2 | 1 << 4, 0), (5 | 1 << 5 | 1 << 32, STATUS))
    assert scalable.ram[STATUS] == 1


# ---- life --------------------------------------------------------------------------------------------


def test_state(scalable: ScalableBench) -> None:
    scalable.map_first(scalable.first("edu0", 1), 0x1000, DATA)
    scalable.on()
    scalable.queue((5,))
    state = scalable.unit.backend.save()
    other = ScalableBench()
    other.ram[:] = scalable.ram[:]
    other.unit.backend.restore(state)
    other.ram[DATA : DATA + 4] = b"move"
    assert read(other, "edu0", 0x1000, 1) == b"move"
    other.queue((5 | 1 << 5 | 3 << 32, STATUS))
    assert other.ram[STATUS] == 3
    other.close()


D, T = TABLES + 0x10_0000, TABLES + 0x11_0000  # a directory, a table of PASIDs
NUMBERS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([ROOT | SCALABLE, QUEUE | WIDE, OUTSIDE, TE, TE | SRTP, TE | QIE, 0x20, 0x1000 | PASIDE | 1]),
)
OFFSETS = [GCMD, RTADDR, FSTS, IQT, IQA, 0xC0, 0xC8, 0xD0, 0xDC, 0xE0, 0xE8]
KINDS = st.integers(0, 15)


@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.sampled_from(OFFSETS), NUMBERS), max_size=20),
    st.lists(st.tuples(KINDS, NUMBERS, NUMBERS, NUMBERS), max_size=10),
    st.lists(st.tuples(st.sampled_from([ROOT, CONTEXT + 32 * 0x18, D, T]), NUMBERS), max_size=10),
    st.sampled_from(["ats = true", "ats = true, caching_mode = true"]),
)
def test_nothing_that_a_guest_writes_is_our_failure(
    writes: list[tuple[int, int]],
    descriptors: list[tuple[int, int, int, int]],
    words: list[tuple[int, int]],
    params: str,
) -> None:
    bench = ScalableBench(params=params, model="tests.guest.ats_edu:AtsEdu")
    bench.map_first(bench.first("edu0", 1), 0x1000, DATA)
    bench.on()
    for n, (kind, *rest) in enumerate(descriptors):
        bench.words(QUEUE + 32 * n, rest[0] & ~0xF | kind, *rest[1:], 0)
    for at, value in words:
        bench.words(at, value)
    for at, value in writes:
        size = 8 if at in (RTADDR, IQT, IQA, 0xC0, 0xC8, 0xD0) else 4
        bench.put(at, value % (1 << 8 * size), size)
        for pasid in (None, 1):
            with contextlib.suppress(DmaFault):
                read(bench, "edu0", 0x1000, pasid)
        bench.run()
    bench.close()


def test_the_tables_of_one_device_are_not_the_others(scalable: ScalableBench) -> None:
    scalable.map_first(scalable.first("edu0", 1), 0x1000, DATA)
    scalable.device("edu1")
    scalable.on()
    read(scalable, "edu0", 0x1000, 1)
    refused(scalable, "edu1", 0x1000, 1)
    assert scalable.record() == (0x1000, FaultCode.PASID_NOT_PRESENT, SM_SID["edu1"], True)
