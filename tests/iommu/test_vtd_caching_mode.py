"""Caching mode (CAP.CM, 6.1): the guest invalidates all that it changes, and the unit reads entries then.

6.1 and 11.4.2: with CM set, entries that are not present and entries that cause faults may be cached, so software
invalidates after each change of a table, except of first-stage ones.  Hardware has CM clear; an emulation may set it,
to learn of each change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.iommu.vtd_bench import (
    BY,
    CAP,
    CONTEXT,
    DATA,
    ECAP,
    FSTS,
    GCMD,
    GSTS,
    OUTSIDE,
    PASIDE,
    PLMBASE,
    PLMLIMIT,
    PMEN,
    PPF,
    PRESENT,
    ROOT,
    RTADDR,
    SID,
    SRTP,
    TE,
    THROUGH,
    Bench,
    ScalableBench,
    code,
    context,
    flush,
    invalidate,
    pasid_cache,
    read,
    refused,
)
from tests.iommu.world import failing_attach
from vmodel.devices.vtd import contexts as contexts_module
from vmodel.devices.vtd.codes import FaultCode
from vmodel.errors import Reason
from vmodel.iommu.domain import BlockedDomain, IdentityDomain, TableDomain
from vmodel.iommu.group import Group
from vmodel.machine import MachineErrors, parse
from vmodel.span import MiB, Span

CM = "caching_mode = true"


@pytest.fixture
def caching() -> Iterator[Bench]:
    """A unit in legacy mode, on, without any entry."""
    made = Bench(params=CM)
    made.on()
    yield made
    made.close()


@pytest.fixture
def pasids() -> Iterator[ScalableBench]:
    """One in scalable mode, on, without any entry."""
    made = ScalableBench(params=CM)
    made.on()
    yield made
    made.close()


def group_of(bench: Bench, name: str) -> Group:
    group = bench.system[name].group
    assert group is not None
    return group


def name_of(bench: Bench, name: str) -> str:
    """The domain that a device is attached to."""
    return group_of(bench, name).domain.name


NOTHING = "no context entry read"


# ---- what the guest sees -------------------------------------------------------------------------------


def test_the_capability() -> None:
    """11.4.2: CM is bit 7.  Nothing else depends on it."""
    found = []
    for params in ("", CM):
        bench = Bench(params=params)
        found.append((bench.get(CAP, 8), bench.get(ECAP, 8)))
        bench.close()
    (cap, ecap), (cached, same) = found
    assert not cap >> 7 & 1 and cached == cap | 1 << 7 and same == ecap


def test_it_is_for_a_unit_that_a_guest_drives() -> None:
    text = '[machine]\nname = "m"\n[[iommu]]\nname = "i"\nkind = "vt-d"\ncovers = ["0000"]\n'
    with pytest.raises(MachineErrors, match=r"iommu\[0\].params.caching_mode: is for an IOMMU that a guest drives"):
        parse(f"{text}params = {{ {CM} }}\n", Path("m.toml"))


# ---- contexts are read at the invalidation -------------------------------------------------------------


def test_without_it_the_first_access_reads(bench: Bench) -> None:
    bench.on()
    bench.translate("edu0")
    invalidate(bench, "registers", 1)
    assert name_of(bench, "edu0") == NOTHING


def test_when_translation_is_turned_on() -> None:
    bench = Bench(params=CM)
    bench.map(bench.translate("edu0"), 0x5000, DATA)
    assert isinstance(group_of(bench, "edu0").domain, IdentityDomain)
    bench.on()
    domain = group_of(bench, "edu0").domain
    assert isinstance(domain, TableDomain) and domain.name == "domain-id 7"
    assert domain.iova_to_phys(0x5000) == DATA and domain.users == 1
    assert name_of(bench, "edu1") == NOTHING
    bench.put(GCMD, 0)
    assert isinstance(group_of(bench, "edu0").domain, IdentityDomain)
    bench.put(GCMD, TE)
    assert name_of(bench, "edu0") == "domain-id 7" and group_of(bench, "edu0").domain is not domain
    bench.close()


@BY
@pytest.mark.parametrize(
    "kind,domain_id,source,mask,there",
    [
        (1, 0, 0, 0, True),
        (2, 7, 0, 0, True),
        # 6.2.2: what is cached of entries that are not present, or cause faults, has domain-id 0, which is reserved for
        # them when CM is set: software invalidates that domain, or the device with that domain-id, as Linux does.
        (2, 0, 0, 0, True),
        (3, 0, 0x18, 0, True),
        (3, 7, 0x18, 0, True),
        (3, 0, 0x1F, 3, True),
        (3, 0, 0x19, 0, False),
        (3, 0, 0x20, 3, False),
    ],
)
def test_an_entry_that_was_not_present(
    caching: Bench, by: str, kind: int, domain_id: int, source: int, mask: int, there: bool
) -> None:
    caching.translate("edu0")
    assert name_of(caching, "edu0") == NOTHING
    invalidate(caching, by, kind, domain_id, source, mask)
    assert name_of(caching, "edu0") == ("domain-id 7" if there else NOTHING)
    assert caching.get(FSTS) == 0


def test_maps_are_seen_before_the_first_access(caching: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever observes invalidations of the attached domain can translate what was mapped, then what was unmapped."""
    seen: list[tuple[Span | None, int | None]] = []
    plain = TableDomain.flush

    def observed(domain: TableDomain, span: Span | None = None, *, own: bool = True) -> None:
        assert domain is group_of(caching, "edu0").domain
        seen.append((span, domain.iova_to_phys(0x5000)))
        plain(domain, span, own=own)

    root = caching.translate("edu0")
    invalidate(caching, "queued", 3, 0, SID["edu0"])
    monkeypatch.setattr(TableDomain, "flush", observed)
    flush(caching, "queued", 2, 7)
    caching.map(root, 0x5000, DATA)
    flush(caching, "queued", 3, 7, 0x5000)
    caching.words(caching.slot(root, 0x5000, 4), 0)
    flush(caching, "registers", 3, 7, 0x5000)
    page = Span.sized(0x5000, 0x1000)
    assert seen == [(None, None), (page, DATA), (page, None)]


@BY
def test_an_entry_that_changes(caching: Bench, by: str) -> None:
    """From one domain to another and to none, at the invalidation and not before."""
    first, second = caching.translate("edu0"), caching.new_table()
    caching.map(first, 0x5000, DATA)
    caching.map(second, 0x5000, DATA + 0x1000)
    caching.ram[DATA : DATA + 4], caching.ram[DATA + 0x1000 : DATA + 0x1004] = b"one ", b"two "
    invalidate(caching, by, 1)
    assert caching.read("edu0", 0x5000) == b"one "
    caching.translate("edu0", domain_id=8, root=second)
    assert name_of(caching, "edu0") == "domain-id 7"
    invalidate(caching, by, 2, 7)
    assert name_of(caching, "edu0") == "domain-id 8" and caching.read("edu0", 0x5000) == b"two "
    caching.context("edu0", 0, 0)
    invalidate(caching, by, 3, 8, SID["edu0"])
    assert name_of(caching, "edu0") == NOTHING
    assert caching.refused("edu0", 0x5000) is Reason.BLOCKED
    assert caching.record() == (0x5000, FaultCode.CONTEXT_NOT_PRESENT, SID["edu0"], True)


def test_devices_with_one_entry_share_a_domain(caching: Bench) -> None:
    root = caching.translate("edu0")
    caching.translate("edu1", root=root)
    invalidate(caching, "registers", 1)
    domain = group_of(caching, "edu0").domain
    assert group_of(caching, "edu1").domain is domain and domain.users == 2
    # One of the two is invalidated: the other one's entry stays, and is what the new one shares.
    invalidate(caching, "registers", 3, 7, SID["edu0"])
    assert group_of(caching, "edu0").domain is domain and domain.users == 2
    invalidate(caching, "registers", 2, 7)
    assert group_of(caching, "edu0").domain is group_of(caching, "edu1").domain is not domain


def test_the_root_table_is_taken_over_by_command(caching: Bench) -> None:
    caching.translate("edu0")
    caching.words(0x9000, 0)
    caching.put(RTADDR, 0x9000, 8)
    invalidate(caching, "registers", 1)
    assert name_of(caching, "edu0") == "domain-id 7"
    caching.put(GCMD, TE | SRTP)
    assert name_of(caching, "edu0") == "domain-id 7"
    invalidate(caching, "registers", 1)
    assert name_of(caching, "edu0") == NOTHING


# ---- what cannot be read -------------------------------------------------------------------------------

DAMAGES: dict[str, tuple[Callable[[Bench], None], FaultCode]] = {
    "no root entry": (lambda b: b.words(ROOT, 0, 0), FaultCode.ROOT_NOT_PRESENT),
    "reserved bits of the root entry": (lambda b: b.words(ROOT, CONTEXT | 3, 0), FaultCode.ROOT_RESERVED),
    "no context table": (lambda b: b.words(ROOT, OUTSIDE | 1, 0), FaultCode.CONTEXT_ACCESS),
    "not present": (lambda b: b.context("edu0", 0, 0), FaultCode.CONTEXT_NOT_PRESENT),
    "reserved bits": (lambda b: b.context("edu0", 0x9000 | 1, 7 << 8 | 1 << 30), FaultCode.CONTEXT_RESERVED),
    "no such width": (lambda b: b.context("edu0", 0x9000 | 1, 7 << 8 | 6), FaultCode.CONTEXT_INVALID),
    "no such type": (lambda b: b.context("edu0", 0x9000 | 0xD, 7 << 8 | 2), FaultCode.CONTEXT_INVALID),
    "a table that is not there": (lambda b: b.context("edu0", OUTSIDE | 1, 7 << 8 | 2), FaultCode.TABLE_ACCESS),
}


@pytest.mark.parametrize("params", ["", CM], ids=["plain", "caching mode"])
@pytest.mark.parametrize("damage,why", DAMAGES.values(), ids=DAMAGES)
def test_the_access_has_the_fault(damage: Callable[[Bench], None], why: FaultCode, params: str) -> None:
    """Not the invalidation; and there is one for each access, as without caching mode."""
    bench = Bench(params=params)
    damage(bench)
    bench.on()
    for kind in (1, 2, 3):
        invalidate(bench, "queued", kind, 0, SID["edu0"])
    bench.run()
    assert bench.get(FSTS) == 0 and bench.record() is None
    for n in range(2):
        bench.refused("edu0", 0x5000)
        assert bench.record(n) == (0x5000, why, SID["edu0"], True)
    assert bench.record(2) is None and bench.get(FSTS) & 0xFF == PPF
    # A guest that omits the invalidation has no entry of the past: what is not present is not cached.
    bench.map(bench.translate("edu0"), 0x5000, DATA)
    if why is not FaultCode.TABLE_ACCESS:
        bench.read("edu0", 0x5000)
    bench.close()


def test_no_memory_for_an_attachment(caching: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next access tries again."""
    caching.map(caching.translate("edu0"), 0x5000, DATA)
    with failing_attach(monkeypatch, 1):
        invalidate(caching, "registers", 3, 0, SID["edu0"])
    assert name_of(caching, "edu0") == NOTHING
    caching.read("edu0", 0x5000)
    assert name_of(caching, "edu0") == "domain-id 7"


def test_no_memory_at_an_access(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without caching mode: likewise."""
    bench.map(bench.translate("edu0"), 0x5000, DATA)
    bench.on()
    for _ in range(2):
        with failing_attach(monkeypatch, 1):
            assert bench.refused("edu0", 0x5000) is Reason.BLOCKED
    bench.read("edu0", 0x5000)


class OneGroup(Bench):
    """Two functions of one device: one group, with two source-ids."""

    second = "0000:00:03.1"


@pytest.mark.parametrize("nth", range(1, 9))
def test_a_group_with_two_entries(nth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each function has its own domain, also if there is no memory for the n-th attachment."""
    bench = OneGroup(params=CM)
    monkeypatch.setitem(SID, "edu1", 0x19)
    assert group_of(bench, "edu0") is group_of(bench, "edu1")
    for name, at in (("edu0", 0), ("edu1", 0x1000)):
        bench.map(bench.translate(name, domain_id=7 + at // 0x1000), 0x5000, DATA + at)
        bench.ram[DATA + at : DATA + at + 4] = name.encode()
    bench.on()
    with failing_attach(monkeypatch, nth):
        invalidate(bench, "registers", 1)
    for name in ("edu0", "edu1", "edu0"):
        assert bench.read(name, 0x5000) == name.encode()
    bench.close()


# ---- protected memory, and life ------------------------------------------------------------------------


def test_pass_through_without_protected_memory(caching: Bench) -> None:
    caching.context("edu0", 2 << 2 | 1, 3 << 8 | 2)
    invalidate(caching, "registers", 1)
    assert isinstance(group_of(caching, "edu0").domain, IdentityDomain)
    caching.put(PLMBASE, 4 * MiB)
    caching.put(PLMLIMIT, 4 * MiB)
    caching.put(PMEN, 1 << 31)
    assert name_of(caching, "edu0") == "identity but protected memory"
    caching.put(PMEN, 0)
    assert isinstance(group_of(caching, "edu0").domain, IdentityDomain)


def test_state_and_reset(caching: Bench) -> None:
    caching.translate("edu0")
    invalidate(caching, "registers", 1)
    state = caching.unit.backend.save()
    other = Bench(params=CM)
    other.ram[:] = caching.ram[:]
    other.unit.backend.restore(state)
    other.run()
    assert name_of(other, "edu0") == "domain-id 7"
    other.unit.backend.reset_device()
    assert not other.get(GSTS) & TE and isinstance(group_of(other, "edu0").domain, IdentityDomain)
    invalidate(other, "registers", 1)
    assert isinstance(group_of(other, "edu0").domain, IdentityDomain)  # translation is off
    other.close()


# ---- scalable mode -------------------------------------------------------------------------------------


def test_as_linux_attaches_a_device(pasids: ScalableBench) -> None:
    """A context entry, without a PASID entry; then that, which is invalidated by PASID, and by its own domain-id."""
    pasids.device("edu0")
    pasids.queue(context(3, SID["edu0"]), pasid_cache(3), (2 | 1 << 4, 0))
    assert name_of(pasids, "edu0") == NOTHING and pasids.get(FSTS) == 0
    root = pasids.first("edu0")
    pasids.queue(pasid_cache(1, 7, 0), (6 | 2 << 4 | 7 << 16, 0))
    assert name_of(pasids, "edu0") == "domain-id 7, first stage, pasid 0"
    pasids.map_first(root, 0x5000, DATA)
    read(pasids, "edu0", 0x5000)
    pasids.second_stage("edu0", domain_id=8)
    pasids.queue(pasid_cache(0, 7))
    assert name_of(pasids, "edu0") == "domain-id 8, second stage, pasid 0"
    pasids.entry("edu0", 0)
    pasids.queue(pasid_cache(1, 8, 0))
    assert name_of(pasids, "edu0") == NOTHING
    assert refused(pasids, "edu0", 0x5000) is Reason.BLOCKED and code(pasids) == FaultCode.PASID_NOT_PRESENT


def test_a_pasid(pasids: ScalableBench) -> None:
    """Of each device that has it; those that an invalidation does not name wait for an access."""
    for name in ("edu0", "edu1"):
        pasids.device(name, rid_pasid=9)
        pasids.first(name, 5, domain_id=3)
        pasids.first(name, 6, domain_id=3)
    pasids.device("edu1", PRESENT)  # requests may have no PASID
    pasids.queue(pasid_cache(1, 3, 5))
    assert set(group_of(pasids, "edu0").pasids) == {5} and not group_of(pasids, "edu1").pasids
    # Invalidated entries of PASIDs that were attached are read again, whatever the granularity.
    for descriptor in (pasid_cache(3), pasid_cache(0, 3), pasid_cache(1, 3, 5), context(1), context(3, SID["edu0"])):
        before = group_of(pasids, "edu0").pasids[5]
        pasids.queue(descriptor)
        after = group_of(pasids, "edu0").pasids[5]
        assert (after is before) is (descriptor[0] & 15 == 1)  # the PASID cache keeps its entries
    pasids.entry("edu0", 5)
    pasids.queue(pasid_cache(1, 3, 5))
    assert not group_of(pasids, "edu0").pasids and pasids.get(FSTS) == 0
    assert refused(pasids, "edu1", 0, 5) is Reason.PASID and code(pasids) == FaultCode.PASID_OFF


def test_the_pasid_of_requests_without_one(pasids: ScalableBench) -> None:
    pasids.device("edu1", PRESENT | PASIDE, rid_pasid=9)
    pasids.entry("edu1", 9, THROUGH | PRESENT, 4)
    pasids.queue(pasid_cache(1, 4, 9))
    assert isinstance(group_of(pasids, "edu1").domain, IdentityDomain)


def test_no_pasid_zero(pasids: ScalableBench) -> None:
    """Requests with PASID 0 in the prefix are not implemented."""
    pasids.device("edu0", rid_pasid=1)
    pasids.first("edu0", 0)
    pasids.queue(pasid_cache(1, 7, 0))
    assert not group_of(pasids, "edu0").pasids and not pasids.contexts.entries


def test_pasids_are_read_ahead_up_to_a_limit(pasids: ScalableBench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One invalidation has bounded work; the other PASIDs are attached by their next access."""
    monkeypatch.setattr(contexts_module, "_MOST_AHEAD", 3)
    for pasid in range(8):
        pasids.map_first(pasids.first("edu0", pasid), 0x1000, DATA)
        pasids.queue(pasid_cache(1, 7, pasid))
    group = group_of(pasids, "edu0")
    assert set(group.pasids) == set(range(1, 8))
    for descriptor in (pasid_cache(3), context(1)):
        pasids.queue(descriptor)
        assert len(group.pasids) == 3 and isinstance(group.domain, TableDomain)
        for pasid in range(1, 8):
            read(pasids, "edu0", 0x1000, pasid)
        assert set(group.pasids) == set(range(1, 8))


def test_reading_ahead_drops_nothing_that_is_cached(pasids: ScalableBench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contexts_module, "_MOST", 4)
    for pasid in range(8):
        pasids.map_first(pasids.first("edu0", pasid), 0x1000, DATA)
        pasids.queue(pasid_cache(1, 7, pasid))
    assert {pasid for _, pasid in pasids.contexts.entries} == {0, 1, 2, 3}
    read(pasids, "edu0", 0x1000, 7)
    assert {pasid for _, pasid in pasids.contexts.entries} == {1, 2, 3, 7}


@pytest.mark.parametrize(
    "value", [ROOT | 1, ROOT | 9, (1 << 64) - 1, OUTSIDE | 9, THROUGH | ROOT | 1, THROUGH | ROOT | PASIDE | 1]
)
def test_tables_that_contain_themselves(pasids: ScalableBench, value: int) -> None:
    """Root, context, directory and PASID tables in one page: each invalidation ends, and reports nothing."""
    pasids.words(ROOT, *[value] * 512)
    pasids.queue(context(1), pasid_cache(3), *[pasid_cache(1, 7, pasid) for pasid in (0, 1, 63, 64, (1 << 20) - 1)])
    assert pasids.get(FSTS) == 0
    for mode in range(4):  # TTM
        pasids.put(RTADDR, ROOT | mode << 10, 8)
        pasids.put(GCMD, TE | SRTP)
        invalidate(pasids, "registers", 1)
        assert pasids.get(FSTS) == 0


def test_what_blocks_stays_blocked(pasids: ScalableBench) -> None:
    pasids.queue(context(1), pasid_cache(3))
    for name in ("edu0", "edu1"):
        assert isinstance(group_of(pasids, name).domain, BlockedDomain)
