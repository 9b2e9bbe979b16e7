"""Checks of the calls of Linux's iommu core, from drivers/iommu/iommu.c of Linux 7.3; `case` is the line of each.

Linux's own tests have none for these: its selftest drives iommufd only.
"""

from __future__ import annotations

import errno

from tests.iommu.world import World, group_of, iommu
from tests.linux.mock import Difference, Row
from vmodel.errors import DmaFault, IommuError
from vmodel.iommu import Domain, DomainType, Endpoint, PagingDomain, dma_domain_alloc, paging_domain_alloc
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.domain import AllocFlags
from vmodel.iommu.group import Group
from vmodel.span import PAGE, MiB, Span

IOVA, GPA = 0x40_0000, 0x20_0000
_IOMMU, _PT = "drivers/iommu/iommu.c:", "drivers/iommu/generic_pt/iommu_pt.h:"


class Core:
    """A VT-d with `lone`, `direct`, whose firmware needs a 1:1 mapping, and `pair` and `other`, which share a group.

    `other` has no PASIDs.  `theirs` is a domain of an SMMUv3.
    """

    def __init__(self) -> None:
        self.world = World(iommu("vt-d"))
        self.lone = self._plug("00:04.0", max_pasids=16)
        region = ReservedRegion(Span.sized(0x10_0000, PAGE), RegionType.DIRECT)
        self.direct = self._plug("00:05.0", reserved=[region])
        self.pair, self.other = self._plug("00:03.0", max_pasids=8), self._plug("00:03.1", max_pasids=0)
        self.group, self.shared = group_of(self.lone), group_of(self.pair)
        self.mine, self.next = paging_domain_alloc(self.lone), paging_domain_alloc(self.lone)
        arm = iommu("smmu-v3", "smmu0")
        self.theirs = PagingDomain(DomainType.UNMANAGED, arm, AllocFlags.NONE)

    def _plug(self, bdf: str, **more: object) -> Endpoint:
        return self.world.plug(self.world.function(bdf), **more)

    def attach(self, domain: Domain | None = None) -> None:
        self.group.attach(self.mine if domain is None else domain)

    def attached(self, group: Group | None = None) -> str:
        """Which domain a group has."""
        group = group or self.group
        names = {id(self.mine): "mine", id(self.next): "next", id(group.iommu.blocked): "blocked"}
        return names.get(id(group.domain), "default" if group.domain is group.default_domain else "another")

    def then(self, *calls: object) -> str:
        """Which domain `group` has after these calls."""
        return self.attached()

    def blocked(self, name: str, pasid: int | None = None) -> bool:
        """Whether a device's read faults."""
        dma = self.world.dmas[name]
        try:
            (dma if pasid is None else dma.with_pasid(pasid)).read(IOVA, 1)
        except DmaFault:
            return True
        return False

    def block(self, endpoint: Endpoint) -> None:
        """Attaches the blocked domain."""
        group_of(endpoint).attach(group_of(endpoint).iommu.blocked)

    def claimed(self, owner: str) -> tuple[str, bool]:
        """Claims `group`; its domain then, and whether DMA is blocked."""
        self.group.claim_dma_owner(owner)
        return self.attached(), self.blocked("00:04.0")

    def without_pasids(self) -> None:
        """Attaches a domain to a PASID behind an IOMMU that has none."""
        world = World(iommu("vt-d", pasid_bits=0))
        try:
            endpoint = world.plug(world.function("00:04.0"))
            group_of(endpoint).attach_pasid(paging_domain_alloc(endpoint), 1)
        finally:
            world.close()

    def one_large_page(self) -> PagingDomain:
        """A domain with 4 MiB from IOVA 4 MiB on, which are two entries of 2 MiB."""
        self.mine.map(4 * MiB, 0, 4 * MiB)
        return self.mine

    def refusal(self, domain: Domain) -> bool:
        """Whether a second attach is refused, and changes nothing."""
        before = self.group.domain
        try:
            self.group.attach(domain)
        except IommuError as error:
            return error.errno == errno.EBUSY and self.group.domain is before
        return False


ATTACH = [
    Row(_IOMMU + "2364", "over the default domain", lambda c: c.then(c.attach()), "mine"),
    Row(_IOMMU + "2360", "over another one", lambda c: c.attach(c.next), "EBUSY", lambda c: c.attach()),
    Row(_IOMMU + "2360", "which changes nothing", lambda c: c.refusal(c.next), True, lambda c: c.attach()),
    Row(_IOMMU + "2360", "over itself", lambda c: c.attach(), "EBUSY", lambda c: c.attach()),
    Row(_IOMMU + "2366", "one of another driver's", lambda c: c.attach(c.theirs), "EINVAL"),
    Row(
        _IOMMU + "2361",
        "over the blocked one of an owner",
        lambda c: c.then(c.attach()),
        "mine",
        lambda c: c.group.claim_dma_owner("vm"),
    ),
    Row(
        _IOMMU + "2489",
        "each member",
        lambda c: [c.blocked(name) for name in ("00:03.0", "00:03.1")],
        [True, True],
        lambda c: c.shared.attach(paging_domain_alloc(c.pair)),
    ),
    Row(_IOMMU + "2416", "blocked, to what firmware uses", lambda c: c.block(c.direct), "EINVAL"),
    Row(_IOMMU + "2542", "and detach", lambda c: c.then(c.group.detach()), "default", lambda c: c.attach()),
    Row(
        _IOMMU + "2155",
        "and detach, with an owner",
        lambda c: c.then(c.group.detach()),
        "blocked",
        lambda c: (c.group.claim_dma_owner("vm"), c.attach()),
    ),
    Row(_IOMMU + "3992", "replace", lambda c: c.then(c.group.replace(c.next)), "next", lambda c: c.attach()),
    Row(_IOMMU + "2468", "replace by itself", lambda c: c.then(c.group.replace(c.mine)), "mine", lambda c: c.attach()),
]

OWNER = [
    Row(_IOMMU + "3405", "claim: all DMA is blocked", lambda c: c.claimed("vm"), ("blocked", True)),
    Row(
        _IOMMU + "3431",
        "claim, of another's",
        lambda c: c.group.claim_dma_owner("vm2"),
        "EPERM",
        lambda c: c.group.claim_dma_owner("vm"),
    ),
    Row(
        _IOMMU + "3431",
        "claim, with a driver",
        lambda c: c.group.claim_dma_owner("vm"),
        "EPERM",
        lambda c: c.lone.bind("nvme"),
    ),
    Row(
        _IOMMU + "3431",
        "claim, with a driver of a neighbour's",
        lambda c: c.shared.claim_dma_owner("vm"),
        "EPERM",
        lambda c: c.other.bind("nvme"),
    ),
    Row(
        _IOMMU + "3398", "claim, over a domain", lambda c: c.group.claim_dma_owner("vm"), "EBUSY", lambda c: c.attach()
    ),
    Row(
        _IOMMU + "3399",
        "claim, over a domain of a PASID",
        lambda c: c.group.claim_dma_owner("vm"),
        "EBUSY",
        lambda c: c.group.attach_pasid(c.mine, 1),
    ),
    Row(_IOMMU + "2416", "claim of what firmware uses", lambda c: group_of(c.direct).claim_dma_owner("vm"), "EINVAL"),
    Row(
        _IOMMU + "3331",
        "bind a driver, with an owner",
        lambda c: c.lone.bind("nvme"),
        "EBUSY",
        lambda c: c.group.claim_dma_owner("vm"),
    ),
    Row(
        _IOMMU + "3331",
        "bind a driver to a neighbour, with an owner",
        lambda c: c.other.bind("nvme"),
        "EBUSY",
        lambda c: c.shared.claim_dma_owner("vm"),
    ),
    Row(
        _IOMMU + "3331",
        "two drivers in a group",
        lambda c: (c.pair.bind("nvme"), c.other.bind("e1000e")),
        (None, None),
    ),
    Row(
        _IOMMU + "3490",
        "release",
        lambda c: c.then(c.group.release_dma_owner("vm")),
        "default",
        lambda c: c.group.claim_dma_owner("vm"),
    ),
]

PASID = [
    Row(_IOMMU + "3643", "attach, without PASIDs", lambda c: c.without_pasids(), "EOPNOTSUPP"),
    Row(_IOMMU + "3646", "attach to PASID 0", lambda c: c.group.attach_pasid(c.mine, 0), "EINVAL"),
    Row(_IOMMU + "3646", "attach one of another driver's", lambda c: c.group.attach_pasid(c.theirs, 1), "EINVAL"),
    Row(_IOMMU + "3667", "attach to the last PASID of the device", lambda c: c.group.attach_pasid(c.mine, 15), None),
    Row(_IOMMU + "3667", "attach beyond the last", lambda c: c.group.attach_pasid(c.mine, 16), "EINVAL"),
    Row(
        _IOMMU + "3667",
        "attach beyond the last of one member",
        lambda c: c.shared.attach_pasid(c.mine, 8),
        "EINVAL",
    ),
    Row(_IOMMU + "3666", "attach, where another member has none", lambda c: c.shared.attach_pasid(c.mine, 7), None),
    Row(
        _IOMMU + "3679",
        "attach twice",
        lambda c: c.group.attach_pasid(c.mine, 1),
        "EBUSY",
        lambda c: c.group.attach_pasid(c.mine, 1),
    ),
    Row(_IOMMU + "3765", "replace nothing", lambda c: c.group.replace_pasid(c.mine, 1), "EINVAL"),
    Row(
        _IOMMU + "3785",
        "replace",
        lambda c: (c.group.replace_pasid(c.next, 1), c.group.domain_of(1) is c.next),
        (None, True),
        lambda c: c.group.attach_pasid(c.mine, 1),
    ),
    Row(
        _IOMMU + "3821",
        "detach: its accesses fault",
        lambda c: (c.blocked("00:04.0", 1), c.group.detach_pasid(1), c.blocked("00:04.0", 1)),
        (False, None, True),
        lambda c: (c.mine.map(IOVA, GPA, PAGE), c.group.attach_pasid(c.mine, 1)),
    ),
]

TYPE = [
    Row(_IOMMU + "3274", "a type that has no name", lambda c: c.group.set_default(c.mine), "EINVAL"),
    Row(_IOMMU + "3274", "blocked", lambda c: c.group.set_default(c.group.iommu.blocked), "EINVAL"),
    Row(
        _IOMMU + "3291",
        "with a driver",
        lambda c: c.group.set_default(dma_domain_alloc(c.lone)),
        "EPERM",
        lambda c: c.lone.bind("nvme"),
    ),
    Row(
        _IOMMU + "3291",
        "with an owner",
        lambda c: c.group.set_default(dma_domain_alloc(c.lone)),
        "EPERM",
        lambda c: c.group.claim_dma_owner("vm"),
    ),
    Row(_IOMMU + "3295", "DMA", lambda c: c.then(c.group.set_default(dma_domain_alloc(c.lone))), "default"),
]

UNMAP = [
    Row(_PT + "1115", "of nothing", lambda c: c.mine.unmap(IOVA, PAGE), 0),
    Row(_PT + "1026", "from inside of an entry", lambda c: c.one_large_page().unmap(4 * MiB + PAGE, 2 * MiB), 0),
    Row(_PT + "1075", "to inside of an entry", lambda c: c.one_large_page().unmap(4 * MiB, PAGE), 2 * MiB),
    Row(_PT + "1075", "of one entry and a bit", lambda c: c.one_large_page().unmap(4 * MiB, 2 * MiB + PAGE), 4 * MiB),
    Row(_PT + "1037", "past the end of what is mapped", lambda c: c.one_large_page().unmap(4 * MiB, 8 * MiB), 4 * MiB),
    Row(_PT + "1037", "from before what is mapped", lambda c: c.one_large_page().unmap(2 * MiB, 8 * MiB), 0),
]

ROWS = [*ATTACH, *OWNER, *PASID, *TYPE, *UNMAP]

DIFFERENCES = [
    Difference(
        _IOMMU + "3814",
        "detach a PASID that has no domain",
        lambda c: c.group.detach_pasid(1),
        "EINVAL",
        linux=None,
        why="Linux's callers know what they have attached; here it is a mistake that is named",
    ),
    Difference(
        _IOMMU + "3484",
        "release of another's group",
        lambda c: c.group.release_dma_owner("vm2"),
        "EINVAL",
        lambda c: c.group.claim_dma_owner("vm"),
        linux="released",
        why="Linux's call does not say whose it is",
    ),
    Difference(
        _PT + "1109",
        "unmap of parts of pages",
        lambda c: c.mine.unmap(IOVA + 1, PAGE),
        "EINVAL",
        linux=0,
        why="Linux's caller sees only that nothing was unmapped",
    ),
]
