"""The VT-d unit: who it is, what it translates by, what it keeps, its life; see test_vtd_*.py for the rest."""

from __future__ import annotations

import contextlib
import functools
import logging
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.examples import examples
from tests.iommu.vtd_bench import (
    BY,
    CAP,
    CCMD,
    DATA,
    ECAP,
    FEADDR,
    FECTL,
    FSTS,
    GCMD,
    GSTS,
    ICS,
    IECTL,
    IOTLB,
    IQA,
    IQT,
    IVA,
    MACHINE,
    OUTSIDE,
    PFO,
    PHMBASE,
    PHMLIMIT,
    PLMBASE,
    PLMLIMIT,
    PMEN,
    PPF,
    QIE,
    QUEUE,
    QUEUED,
    RAM,
    RECORDS,
    ROOT,
    RTADDR,
    SID,
    SRTP,
    TE,
    VER,
    Bench,
    flush,
    invalidate,
)
from tests.waiting import meanwhile
from vmodel.devices.vtd.codes import FaultCode
from vmodel.errors import ConfigError, DmaFault, PeerError, Reason
from vmodel.iommu.domain import IdentityDomain, TableDomain
from vmodel.machine import parse
from vmodel.span import KiB, MiB
from vmodel.vfio_user.wire import Region

# ---- who it is ---------------------------------------------------------------------------------------


def test_it_hides_once_it_is_known(bench: Bench) -> None:
    header = bench.unit.config.header
    assert bench.get(VER) == 0x10 and header.VENDOR_ID == 0x1234
    assert bench.get(CAP, 8) and bench.get(ECAP, 8)
    assert bench.unit.backend.region_read(Region.CONFIG, 0, 4) == 0xFFFF_FFFF
    assert bench.get(VER) == 0x10  # the BAR goes on
    bench.unit.backend.reset_device()
    assert header.VENDOR_ID == 0x1234


def test_capabilities(bench: Bench) -> None:
    cap, ecap = bench.get(CAP, 8), bench.get(ECAP, 8)
    assert bench.get(CAP) | bench.get(CAP + 4) << 32 == cap
    assert (cap & 7, cap >> 8 & 31, cap >> 16 & 63, cap >> 34 & 15) == (6, 0b110, 47, 3)
    assert (cap >> 24 & 0x3FF, cap >> 40 & 0xFF, cap >> 7 & 1) == (0x20, 7, 0)
    assert (ecap & 3, ecap >> 3 & 1, ecap >> 6 & 3, ecap >> 8 & 0x3FF) == (3, 0, 3, 0x10)


def test_capabilities_of_the_machine_file() -> None:
    bench = Bench(
        'input_bits = 39, page_sizes = ["4K", "2M"], coherent = false, enforce_snoop = false, fault_queue_depth = 2'
    )
    cap, ecap = bench.get(CAP, 8), bench.get(ECAP, 8)
    assert (cap >> 8 & 31, cap >> 16 & 63, cap >> 34 & 15, cap >> 40 & 0xFF) == (0b010, 38, 1, 1)
    assert (ecap & 3, ecap >> 6 & 3) == (2, 1)
    bench.on()
    bench.translate("edu0")  # four levels are not there
    bench.refused("edu0", 0)
    assert bench.record() == (0, FaultCode.CONTEXT_INVALID, 0x18, True)
    bench.close()


@pytest.mark.parametrize("wrong", ["input_bits = 30", 'page_sizes = ["2M"]'])
def test_no_such_unit(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.partition(" ")[0]):
        Bench(wrong)


def test_one_unit_a_machine() -> None:
    second = '[[iommu]]\nname = "vtd1"\nkind = "vt-d"\naddress = "0000:00:05.0"\n[[device]]'
    with pytest.raises(ConfigError, match="one vt-d only"):
        parse((MACHINE % ("", "", "edu", "edu")).replace("[[device]]", second, 1), Path("m.toml"))


def test_the_firmware_puts_it_elsewhere(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        bench.place(0xC000_0000)
        bench.place(0xC000_0000)
    (line,) = caplog.messages
    assert "0xc0000000" in line and "0xe0000000" in line
    assert bench.get(CAP, 8) == bench.get(ECAP, 8) == (1 << 64) - 1  # "returns all ones", says Linux
    assert bench.unit.config.header.VENDOR_ID == 0x1234
    bench.place(bench.unit.base)
    assert bench.get(CAP, 8) != (1 << 64) - 1


# ---- translation -------------------------------------------------------------------------------------


def test_identity_until_it_is_on(bench: Bench) -> None:
    bench.ram[DATA : DATA + 4] = b"here"
    assert bench.read("edu0", DATA) == b"here"
    bench.on()
    assert bench.refused("edu0", DATA) is Reason.BLOCKED
    bench.put(GCMD, 0)
    assert not bench.get(GSTS) & TE
    assert bench.read("edu0", DATA) == b"here"
    group = bench.system["edu0"].group
    assert group is not None and isinstance(group.domain, IdentityDomain)


@pytest.mark.parametrize("levels", [3, 4])
def test_second_stage(bench: Bench, levels: int) -> None:
    iova = 0x12_3456_7000 if levels == 3 else 0x1234_5678_9000
    bench.map(bench.translate("edu0", levels=levels), iova, DATA, levels=levels)
    bench.on()
    bench.ram[DATA : DATA + 4] = b"data"
    assert bench.read("edu0", iova) == b"data"
    bench.machine.devices["edu0"].dma.write(iova + 8, b"more")
    assert bench.ram[DATA + 8 : DATA + 12] == b"more"
    group = bench.system["edu0"].group
    assert group is not None and isinstance(group.domain, TableDomain)
    assert group.domain.iova_to_phys(iova + 5) == DATA + 5
    assert bench.refused("edu1", iova) is Reason.BLOCKED
    assert bench.get(FSTS) == PPF and bench.record() == (iova, FaultCode.CONTEXT_NOT_PRESENT, 0x20, True)


def test_large_pages(bench: Bench) -> None:
    root = bench.translate("edu0", levels=3)
    middle = bench.new_table()
    bench.words(root, middle | 3)
    bench.words(middle + 8 * 5, 2 * MiB | 0x83)
    bench.on()
    bench.ram[2 * MiB + 0x1234 : 2 * MiB + 0x1238] = b"wide"
    assert bench.read("edu0", 5 * 2 * MiB + 0x1234) == b"wide"


def test_pass_through(bench: Bench) -> None:
    bench.context("edu0", 2 << 2 | 1, 3 << 8 | 2)
    bench.on()
    bench.ram[DATA : DATA + 4] = b"pass"
    assert bench.read("edu0", DATA) == b"pass"
    assert bench.refused("edu0", OUTSIDE) is Reason.NO_WINDOW
    assert bench.get(FSTS) == 0  # that is not the unit's to report


def test_one_domain_for_two_devices(bench: Bench) -> None:
    root = bench.translate("edu0")
    bench.translate("edu1", root=root)
    bench.map(root, 0, DATA)
    bench.on()
    assert bench.read("edu0", 0) == bench.read("edu1", 0)
    groups = [bench.system[name].group for name in SID]
    assert groups[0] is not groups[1] and groups[0] and groups[1] and groups[0].domain is groups[1].domain
    assert groups[0].domain.users == 2
    # Another domain-id is another domain, whatever the table.
    bench.translate("edu1", domain_id=8, root=root)
    bench.put(CCMD, 1 << 63 | 3 << 61 | SID["edu1"] << 16, 8)
    bench.read("edu1", 0)
    assert groups[0].domain is not groups[1].domain and groups[0].domain.users == 1


def test_what_is_not_present_is_not_cached(bench: Bench) -> None:
    bench.on()
    bench.refused("edu0", 0x5000)
    assert bench.record() == (0x5000, FaultCode.ROOT_NOT_PRESENT, 0x18, True)
    root = bench.translate("edu0")
    bench.refused("edu0", 0x5000)
    assert bench.record(1) == (0x5000, FaultCode.NO_READ, 0x18, True)
    bench.map(root, 0x5000, DATA)
    bench.read("edu0", 0x5000)


# ---- what is cached ----------------------------------------------------------------------------------


@BY
@pytest.mark.parametrize(
    "kind,domain_id,page,mask,gone",
    [
        (1, 0, 0, 0, True),
        (2, 7, 0, 0, True),
        (2, 8, 0, 0, False),
        (3, 7, 0x5000, 0, True),
        (3, 7, 0x6000, 0, False),
        (3, 7, 0x6000, 1, False),
        (3, 7, 0x6000, 2, True),  # 4 pages from 0x4000 on: addresses are rounded down
        (3, 8, 0x5000, 0, False),
    ],
)
def test_translations_are_stale_until_flushed(
    bench: Bench, by: str, kind: int, domain_id: int, page: int, mask: int, gone: bool
) -> None:
    root = bench.translate("edu0")
    bench.map(root, 0x5000, DATA)
    bench.on()
    bench.ram[DATA : DATA + 4] = b"old "
    bench.ram[DATA + 0x1000 : DATA + 0x1004] = b"new "
    assert bench.read("edu0", 0x5000) == b"old "
    bench.map(root, 0x5000, DATA + 0x1000)
    assert bench.read("edu0", 0x5000) == b"old "
    flush(bench, by, kind, domain_id, page, mask)
    assert bench.read("edu0", 0x5000) == (b"new " if gone else b"old ")


@BY
@pytest.mark.parametrize(
    "kind,domain_id,source,mask,gone",
    [
        (1, 0, 0, 0, True),
        (2, 7, 0, 0, True),
        (2, 8, 0, 0, False),
        (3, 7, 0x18, 0, True),
        (3, 7, 0x19, 0, False),
        (3, 7, 0x1F, 3, True),
        (3, 7, 0x1F, 2, False),
        (3, 7, 0x1C, 1, True),
        (3, 7, 0x20, 3, False),
    ],
)
def test_contexts_are_stale_until_invalidated(
    bench: Bench, by: str, kind: int, domain_id: int, source: int, mask: int, gone: bool
) -> None:
    bench.map(bench.translate("edu0"), 0x5000, DATA)
    bench.on()
    bench.read("edu0", 0x5000)
    bench.context("edu0", 0, 0)
    bench.read("edu0", 0x5000)
    invalidate(bench, by, kind, domain_id, source, mask)
    if gone:
        assert bench.refused("edu0", 0x5000) is Reason.BLOCKED
    else:
        bench.read("edu0", 0x5000)


def test_the_root_is_taken_over_by_command_only(bench: Bench) -> None:
    bench.map(bench.translate("edu0"), 0, DATA)
    bench.on()
    bench.put(RTADDR, 0x9000, 8)
    bench.put(CCMD, 1 << 63 | 1 << 61, 8)
    bench.read("edu0", 0)
    bench.put(GCMD, TE | SRTP)
    bench.read("edu0", 0)  # still cached
    bench.put(CCMD, 1 << 63 | 1 << 61, 8)
    assert bench.refused("edu0", 0) is Reason.BLOCKED
    assert bench.get(RTADDR, 8) == 0x9000


def test_no_such_granularity(bench: Bench) -> None:
    bench.put(CCMD, 1 << 63, 8)
    assert bench.get(CCMD, 8) == 0
    bench.put(IOTLB, 1 << 63, 8)
    assert bench.get(IOTLB, 8) == 0
    bench.put(IVA, 19, 8)  # more pages than CAP.MAMV allows
    bench.put(IOTLB, 1 << 63 | 3 << 60, 8)
    assert bench.get(IOTLB, 8) == 3 << 60
    # The halves of a command may come one by one.
    bench.put(IOTLB, 0)
    bench.put(IOTLB + 4, 1 << 31 | 1 << 28)
    assert bench.get(IOTLB, 8) == 1 << 60 | 1 << 57


# ---- protected memory --------------------------------------------------------------------------------


def test_protected_memory(bench: Bench) -> None:
    bench.put(PLMBASE, 0xFFFF_FFFF)
    assert bench.get(PLMBASE) == 0xFFE0_0000  # by which software finds the granule
    bench.put(PLMBASE, 4 * MiB)
    bench.put(PLMLIMIT, 6 * MiB)
    bench.put(PHMBASE, 12 * MiB, 8)
    bench.put(PHMLIMIT, 12 * MiB, 8)
    bench.put(PMEN, 1 << 31)
    assert bench.get(PMEN) == 1 << 31 | 1
    inside = [4 * MiB, 8 * MiB - 1, 12 * MiB, 14 * MiB - 1]
    outside = [0, 4 * MiB - 1, 8 * MiB, 12 * MiB - 1, 14 * MiB, RAM - 1]

    def check() -> None:
        for address in inside:
            bench.refused("edu0", address)
        for address in outside:
            bench.read("edu0", address, 1)
        assert bench.get(FSTS) == 0  # not reported

    check()
    bench.context("edu0", 2 << 2 | 1, 3 << 8 | 2)
    bench.on()
    check()
    # What is translated is up to the tables.
    bench.map(bench.translate("edu1"), 0, 4 * MiB)
    bench.read("edu1", 0)
    bench.put(PMEN, 0)
    assert bench.get(PMEN) == 0
    bench.read("edu0", 4 * MiB)


# ---- life --------------------------------------------------------------------------------------------


def test_reset(bench: Bench) -> None:
    bench.map(bench.translate("edu0"), 0, DATA)
    bench.on()
    bench.read("edu0", 0)
    bench.refused("edu0", 0x1000)
    bench.unit.backend.reset_device()
    assert bench.get(GSTS) == bench.get(FSTS) == 0 and bench.record() is None
    bench.ram[DATA : DATA + 4] = b"flat"
    assert bench.read("edu0", DATA) == b"flat"
    assert not bench.unit.config.command.MEMORY  # the firmware's turn
    bench.place(bench.unit.base)
    assert bench.get(CAP, 8)


def test_state(bench: Bench) -> None:
    bench.map(bench.translate("edu0"), 0x5000, DATA)
    bench.on()
    bench.get(CAP, 8)
    bench.refused("edu0", 0x1000)
    bench.put(PLMBASE, 2 * MiB)
    bench.put(PLMLIMIT, 2 * MiB)
    bench.put(PMEN, 1 << 31)
    state = bench.unit.backend.save()
    other = Bench()
    other.ram[:] = bench.ram[:]
    with pytest.raises(PeerError):
        other.unit.restore_extra(b"x")
    other.unit.backend.restore(state)
    other.run()
    other.ram[DATA : DATA + 4] = b"move"
    assert other.read("edu0", 0x5000) == b"move"
    assert other.unit.config.header.VENDOR_ID == 0xFFFF
    other.refused("edu0", 0x2000)
    assert other.record(0) == (0x1000, FaultCode.NO_READ, 0x18, True)
    assert other.record(1) == (0x2000, FaultCode.NO_READ, 0x18, True)
    other.put(GCMD, 0)
    other.refused("edu0", 2 * MiB)  # protected
    other.close()


OFFSETS = [GCMD, RTADDR, CCMD, FSTS, FECTL, FEADDR, PMEN, PLMBASE, PLMLIMIT, PHMBASE, PHMLIMIT, IQT, IQA, ICS, IECTL]
OFFSETS += [IVA, IOTLB, IOTLB + 4, CCMD + 4, RECORDS + 8, RECORDS + 12, 0, 0x300, 0xFFC, 4 * KiB]
NUMBERS = st.one_of(
    st.integers(0, (1 << 64) - 1),
    st.sampled_from([ROOT, QUEUE, QUEUE | 7, OUTSIDE, TE, SRTP, QIE, TE | QIE, 0x10, 0x7FFF0, (1 << 64) - 4096]),
)
WRITES = st.lists(st.tuples(st.sampled_from(OFFSETS), st.sampled_from([1, 2, 4, 8]), NUMBERS), max_size=30)


@settings(max_examples=examples(150), deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(WRITES, st.lists(st.tuples(st.integers(0, 511), NUMBERS), max_size=20), st.booleans())
def test_nothing_that_a_guest_writes_is_our_failure(
    writes: list[tuple[int, int, int]], words: list[tuple[int, int]], caching_mode: bool
) -> None:
    bench = Bench(params="caching_mode = true" if caching_mode else "")
    bench.map(bench.translate("edu0"), 0, DATA)
    for at, value in words:
        bench.words(QUEUE + 8 * at, value)
    for at, size, value in writes:
        bench.put(at, value % (1 << 8 * size), size)
        for name in SID:
            dma = bench.machine.devices[name].dma
            with contextlib.suppress(DmaFault):
                dma.read(0x1000, 4)
        bench.run()
    for at in range(0, 0x300, 8):
        bench.get(at, 8)
    bench.close()


def test_dma_and_commands_at_once(bench: Bench) -> None:
    """Two devices do DMA while the guest turns everything over; at the end all is as the tables say."""
    root = bench.translate("edu0")
    bench.translate("edu1", root=root)
    bench.map(root, 0x5000, DATA)
    bench.on()
    bench.ram[DATA : DATA + 4] = b"data"

    def work(name: str) -> None:
        try:
            assert bench.read(name, 0x5000) in (b"data", bytes(4))  # without translation there are zeros
        except DmaFault as fault:
            assert fault.reason is Reason.BLOCKED, fault

    with meanwhile(*(functools.partial(work, name) for name in SID)):
        for n in range(300):
            invalidate(bench, "registers" if n % 2 else QUEUED, 1 + n % 2, 7)
            flush(bench, "registers" if n % 2 else QUEUED, 1 + n % 3, 7, 0x5000)
            if n % 10 == 0:
                queued = bench.get(GSTS) & QIE
                bench.put(GCMD, queued)
                bench.put(GCMD, queued | TE)
    assert bench.read("edu0", 0x5000) == bench.read("edu1", 0x5000) == b"data"
    bench.run()
    assert bench.get(FSTS) & ~0xFF00 in (0, PPF, PPF | PFO)
