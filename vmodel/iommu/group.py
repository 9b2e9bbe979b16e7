"""Groups: devices that the IOMMU cannot distinguish, or that can reach each other without passing it.

Domains are attached to groups, and owners own groups.  Linux: drivers/iommu/iommu.c (struct iommu_group).
"""

from __future__ import annotations

import errno
import logging
from typing import TYPE_CHECKING

from vmodel.errors import IommuError
from vmodel.iommu.capabilities import ReservedRegion
from vmodel.iommu.changes import ChangeKind, Changes
from vmodel.iommu.direct import map_direct, unmap_direct
from vmodel.iommu.domain import DEFAULT_TYPES, Domain, DomainType, PagingDomain, TableDomain
from vmodel.iommu.driver import Refusal
from vmodel.span import Span

if TYPE_CHECKING:
    from vmodel.iommu.endpoint import Endpoint
    from vmodel.iommu.iommu import Iommu

log = logging.getLogger(__name__)


def can_attach(domain: Domain, endpoint: Endpoint, pasid: int | None = None) -> str | None:
    """The reason why `domain` cannot be attached to a device; None: it can.  With `pasid`: for that PASID."""
    iommu = endpoint.iommu
    if iommu is None or endpoint.group is None:
        return f"no IOMMU isolates {endpoint.name}: {endpoint.why}"
    can = iommu.capabilities
    if pasid is not None:
        if not can.pasid_bits:
            return f"{iommu.name} has no PASIDs"
        last = min(endpoint.max_pasids or 1 << 20, 1 << can.pasid_bits) - 1
        if not 1 <= pasid <= last:
            return f"PASID {pasid} is not from 1 to {last}"
    elif domain.type is DomainType.SVA:
        return "an SVA domain is for a PASID"
    if domain.type is DomainType.BLOCKED and endpoint.needs_direct:
        return f"{endpoint.name} has a direct-mapped region, which must stay mapped"
    if domain.made_for is None:
        return None  # identity and blocked
    if domain.made_for.driver.kind != iommu.driver.kind:
        return f"format: it has tables of {domain.made_for.driver.title}, {iommu.name} is {iommu.driver.title}"
    if domain.made_for is not iommu and iommu.driver.own_tables:
        return f"instance: its tables are {domain.made_for.name}'s, and {iommu.driver.title} shares none"
    if isinstance(domain, TableDomain):
        return _can_walk(domain, iommu, endpoint)
    assert isinstance(domain, PagingDomain)
    wanted = (
        (domain.page_sizes <= can.page_sizes, "page sizes: it has some that {} lacks"),
        (can.usable.covers(domain.aperture), "aperture: its {domain.aperture} is more than {}'s"),
        (domain.output_bits <= can.output_bits, "output width: its {domain.output_bits} bits are more than {}'s"),
        (can.coherent or not domain.coherent, "coherency: {}'s walks do not snoop the CPU's caches"),
        (endpoint.can_enforce_snoop or not domain.enforces_snoop, "snoop: {} cannot make DMA snoop"),
        (can.dirty_tracking or not domain.tracks, "dirty tracking: {} has none"),
        (can.nesting or not domain.nests, "nesting: {} has none"),
    )
    texts = (text.format(iommu.name, domain=domain) for good, text in wanted if not good)
    return next((Refusal(text, iommu.driver.misfit) for text in texts), None)


def shares_tables(domain: PagingDomain, group: Group) -> bool:
    """Whether a domain fits all members of a group (Linux iommufd_device_auto_get_domain)."""
    return all(can_attach(domain, endpoint) is None for endpoint in group.endpoints)


def _can_walk(domain: TableDomain, iommu: Iommu, endpoint: Endpoint) -> str | None:
    can, table = iommu.capabilities, domain.table
    if table.format not in (iommu.driver.formats if domain.parent is None else iommu.driver.nested_formats):
        return f"format: {iommu.name} does not walk {table.format.name} tables at this stage"
    if domain.type is DomainType.SVA:
        why = iommu.driver.refuses_sva(can, table, has_ats=endpoint.has_ats)
        if why is not None:
            return why
    return None if domain.parent is None else can_attach(domain.parent, endpoint)


class Group:
    """Devices that share a domain and an owner.  `number` is unique in the machine, and for people only."""

    def __init__(self, iommu: Iommu, number: int, default: Domain, changes: Changes) -> None:
        self.iommu = iommu
        self.number = number
        self._name = ""
        self.endpoints: list[Endpoint] = []
        #: The kernel's domain, attached unless a user attaches another one.
        self.default_domain = default
        self.domain = default
        self.pasids: dict[int, Domain] = {}
        #: The owner that has claimed it, or None; `_claims` counts its claims.
        self.owner: object | None = None
        self._claims = 0
        #: The lock of all groups of a System, which reports changes.
        self._lock = self.changes = changes
        default.groups.append(self)
        default.defaults.add(self)

    @property
    def name(self) -> str:
        """The name, for people and sysfs; none at first (Linux iommu_group_set_name)."""
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name
        self.changes.notify(ChangeKind.NAME, group=self, value=name)

    # ---- domains ---------------------------------------------------------------------------

    def _check(self, domain: Domain, pasid: int | None = None) -> None:
        if not self.endpoints:
            raise IommuError(errno.ENODEV, f"group {self.number} has no devices left")
        for endpoint in self.endpoints:
            if (why := can_attach(domain, endpoint, pasid)) is not None:
                code = why.code if isinstance(why, Refusal) else errno.EINVAL
                raise IommuError(code, f"group {self.number}, {endpoint.name}: {why}")

    def _attach_all(self, domain: Domain | None, pasid: int | None = None) -> None:
        """Attaches all members.  Each access of a member sees either the old domain or the new one, never none."""
        old = self.domain_of(pasid)
        try:
            for endpoint in self._users_of(pasid):
                endpoint.attach(domain, pasid)
        except OSError:  # out of memory: members that were attached already go back
            self._back(old, pasid)
            raise
        if domain is not None:
            domain.groups.append(self)
        if old is not None:
            old.groups.remove(self)

    def _users_of(self, pasid: int | None) -> list[Endpoint]:
        """The members that a domain is attached to: with `pasid`, those that have PASIDs."""
        return [endpoint for endpoint in self.endpoints if pasid is None or endpoint.max_pasids != 0]

    def _back(self, old: Domain | None, pasid: int | None) -> None:
        """Attaches all members to `old`.  One for which there is no memory is blocked until the next attachment."""
        for endpoint in self._users_of(pasid):
            try:
                endpoint.attach(old, pasid)
            except OSError:
                log.warning("%s: no memory for its domain: its accesses are blocked", endpoint.name)
                endpoint.block()

    def _switch(self, domain: Domain) -> None:
        self._attach_all(domain)
        self.domain = domain
        self.changes.notify(ChangeKind.DOMAIN, group=self, value=domain)

    def _restore_default(self) -> None:
        """Attaches the default domain, or without memory for it the blocked one, which needs none.

        A user's domain must not stay when the user has gone.  (Linux __iommu_group_set_domain_nofail)
        """
        try:
            self._switch(self.default_domain)
        except OSError:
            log.warning("%s: no memory for its default domain: it is blocked until `detach`", self)
            self._switch(self.iommu.blocked)

    def attach(self, domain: Domain) -> None:
        """Attaches a domain in place of the default or the blocked one (Linux iommu_attach_group).

        IommuError: EBUSY another domain is attached, see `replace`; EINVAL the domain does not fit a member, with
        can_attach's reason; ENODEV the group has no members left, or its RISC-V IOMMU has not the domain's levels.  On
        an error nothing changes.
        """
        with self._lock:
            if self.domain not in (self.default_domain, self.iommu.blocked):
                raise IommuError(errno.EBUSY, f"group {self.number}: {self.domain.name} is attached: replace it")
            self.replace(domain)

    def replace(self, domain: Domain) -> None:
        """Attaches a domain in place of any other, without a moment in between (Linux iommu_replace_group_handle).

        IommuError as `attach`, but EBUSY.
        """
        with self._lock:
            self._check(domain)
            self._switch(domain)

    def detach(self) -> None:
        """Attaches the default domain, or with an owner the blocked one (Linux iommu_detach_group).  It cannot fail."""
        with self._lock:
            if self.owner is not None:
                self._switch(self.iommu.blocked)
            else:
                self._restore_default()

    def set_default(self, domain: Domain, *, forced: bool = False) -> None:
        """Sets the default domain, which is attached at once unless a user's is (Linux: the file `type` in sysfs).

        Direct-mapped regions of the members are mapped in it.  `forced`: whatever domain and whoever owns the group, as
        an IOMMU that a guest drives does it, and a machine file.  IommuError: EINVAL the domain is not IDENTITY, DMA or
        DMA_FQ, not what Driver.default_domain_type needs, or does not fit a member; EPERM a driver is bound, or the
        group has an owner; EEXIST a direct-mapped region overlaps a different mapping.
        """
        with self._lock:
            if not forced:
                self._check_default(domain)
            if not forced or domain.type is not DomainType.BLOCKED:  # hardware knows no region that must stay mapped
                self._check(domain)
            for endpoint in self.endpoints:
                map_direct(domain, endpoint)
            if self.domain is self.default_domain and self.owner is None:
                self._switch(domain)
            self.default_domain.defaults.discard(self)
            self.default_domain = domain
            domain.defaults.add(self)
            self.changes.notify(ChangeKind.DEFAULT_DOMAIN, group=self, value=domain)

    def _check_default(self, domain: Domain) -> None:
        if domain.type not in DEFAULT_TYPES:
            raise IommuError(errno.EINVAL, f"group {self.number}: {domain.type.value} is no type of default domains")
        if self.owner is not None:
            raise IommuError(errno.EPERM, f"group {self.number} is owned by {self.owner}")
        for endpoint in self.endpoints:
            if endpoint.uses_default_domain():
                raise IommuError(errno.EPERM, f"group {self.number}: {endpoint.name} is bound to {endpoint.driver}")
        for endpoint in self.endpoints:
            needed = self.iommu.driver.default_domain_type(endpoint.source, endpoint.max_pasids)
            if needed not in (None, domain.type):
                text = f"group {self.number}: {endpoint.name}: {self.iommu.driver.title} needs a domain of type "
                raise IommuError(errno.EINVAL, text + needed.value)
            if endpoint.untrusted and domain.type is not DomainType.DMA:
                raise IommuError(errno.EINVAL, f"group {self.number}: {endpoint.name} is untrusted: only a DMA domain")

    def attach_pasid(self, domain: Domain, pasid: int) -> None:
        """Attaches `domain` to a PASID: accesses with `pasid` go through it.

        IommuError: EINVAL as `attach`; EOPNOTSUPP the IOMMU has no PASIDs; EBUSY the PASID already has a domain.
        """
        with self._lock:
            if not self.iommu.capabilities.pasid_bits:
                raise IommuError(errno.EOPNOTSUPP, f"group {self.number}: {self.iommu.name} has no PASIDs")
            if pasid in self.pasids:
                raise IommuError(errno.EBUSY, f"group {self.number}: PASID {pasid} has {self.pasids[pasid].name}")
            self._check(domain, pasid)
            self._set_pasid(domain, pasid)

    def replace_pasid(self, domain: Domain, pasid: int) -> None:
        """As attach_pasid, in place of the PASID's current domain.  IommuError(EINVAL): it has none."""
        with self._lock:
            if pasid not in self.pasids:
                raise IommuError(errno.EINVAL, f"group {self.number}: PASID {pasid} has no domain")
            self._check(domain, pasid)
            self._set_pasid(domain, pasid)

    def _set_pasid(self, domain: Domain | None, pasid: int) -> None:
        self._attach_all(domain, pasid)
        self.pasids.pop(pasid, None)
        if domain is not None:
            self.pasids[pasid] = domain
        self.changes.notify(ChangeKind.DOMAIN, group=self, value=domain, pasid=pasid)

    def detach_pasid(self, pasid: int) -> None:
        """Detaches a PASID: accesses with `pasid` fail from now on.  IommuError(EINVAL): it has no domain."""
        with self._lock:
            if pasid not in self.pasids:
                raise IommuError(errno.EINVAL, f"group {self.number}: PASID {pasid} has no domain")
            self._set_pasid(None, pasid)

    def domain_of(self, pasid: int | None = None) -> Domain | None:
        """The domain of accesses without a PASID, or with `pasid`; None: the PASID has no domain."""
        with self.changes.reading:  # while it changes, members may have the new one already
            return self.domain if pasid is None else self.pasids.get(pasid)

    # ---- members ---------------------------------------------------------------------------

    def join(self, endpoint: Endpoint) -> None:
        """Adds a device, maybe hot-plugged; it has the group's domains before its first DMA.

        IommuError(EINVAL): an attached domain does not fit it.  OSError(ENOMEM): no memory for an attachment.  On
        either the device is blocked, and no member.
        """
        with self._lock:
            endpoint.group = self
            self.endpoints.append(endpoint)
            direct: list[Span] = []
            try:
                self._check(self.domain)
                for pasid, domain in self.pasids.items():
                    self._check(domain, pasid)
                direct = map_direct(self.default_domain, endpoint)
                for pasid, domain in self.pasids.items():
                    if endpoint in self._users_of(pasid):
                        endpoint.attach(domain, pasid)
                endpoint.attach(self.domain)
            except OSError:  # IommuError is one
                self._take_away(endpoint)
                unmap_direct(self.default_domain, direct)
                raise

    def _take_away(self, endpoint: Endpoint) -> None:
        endpoint.block()
        self.endpoints.remove(endpoint)
        endpoint.group = None

    def leave(self, endpoint: Endpoint) -> None:
        """Removes a device: it is detached from all domains, and its accesses are blocked."""
        with self._lock:
            self._take_away(endpoint)
            if not self.endpoints and self.owner is None:  # an owner must detach and release itself
                self._switch(self.iommu.blocked)
                for pasid in list(self.pasids):
                    self._set_pasid(None, pasid)

    @property
    def reserved_regions(self) -> list[ReservedRegion]:
        """The reserved regions of all members, ascending.

        Overlapping regions of the same type and access are merged (Linux iommu_insert_resv_region).
        """
        found = {region for endpoint in self.endpoints for region in endpoint.reserved}
        merged: list[ReservedRegion] = []
        for region in sorted(found, key=lambda r: (r.type.value, int(r.access), r.span)):
            last = merged[-1] if merged else None
            alike = last is not None and (last.type, last.access) == (region.type, region.access)
            if last is not None and alike and last.span.overlaps(region.span):
                span = Span(last.span.start, max(last.span.last, region.span.last))
                merged[-1] = ReservedRegion(span, region.type, region.access)
            else:
                merged.append(region)
        return sorted(merged, key=lambda region: (region.span, region.type.value))

    # ---- ownership -------------------------------------------------------------------------

    @property
    def in_use(self) -> bool:
        """Whether a domain other than the kernel's default is attached."""
        return self.domain is not self.default_domain or bool(self.pasids)

    def viable(self, owner: object) -> bool:
        """Whether each member is bound to `owner`, to no driver, or to one that does no DMA by itself.

        (Linux struct pci_driver.driver_managed_dma)
        """
        return not any(endpoint.uses_default_domain(owner) for endpoint in self.endpoints)

    def claim_dma_owner(self, owner: object) -> None:
        """Claims the group: it is blocked until the owner attaches a domain (Linux iommu_group_claim_dma_owner).

        IommuError: EPERM it has an owner, also if it is this one, or is not viable; EBUSY a domain other than the
        default is attached; EINVAL `owner` is None, or a member has a region that must stay mapped 1:1; ENODEV it has
        no members left.
        """
        if owner is None:
            raise IommuError(errno.EINVAL, f"{self}: nobody cannot own it")
        with self._lock:
            if self.owner is not None:
                raise IommuError(errno.EPERM, f"group {self.number} is owned by {self.owner}")
            self._claim(owner)

    def claim_for_device(self, owner: object) -> None:
        """Claims the group for one of its devices: the same owner may claim it for each of them.

        IommuError as `claim_dma_owner`, but EPERM for another owner only.  (Linux iommu_device_claim_dma_owner)
        """
        if owner is None:
            raise IommuError(errno.EINVAL, f"{self}: nobody cannot own it")
        with self._lock:
            if self.owner is not None and self.owner != owner:
                raise IommuError(errno.EPERM, f"group {self.number} is owned by {self.owner}")
            if self.owner is None:
                self._claim(owner)
            else:
                self._check_viable(owner)
                self._claims += 1

    def _check_viable(self, owner: object) -> None:
        if not self.viable(owner):
            others = ", ".join(f"{e.name} ({e.driver})" for e in self.endpoints if e.uses_default_domain(owner))
            raise IommuError(errno.EPERM, f"group {self.number} is not viable: in use by others: {others}")

    def _claim(self, owner: object) -> None:
        self._check_viable(owner)
        self._check(self.iommu.blocked)
        if self.in_use:
            raise IommuError(errno.EBUSY, f"group {self.number}: a domain is already attached")
        self._switch(self.iommu.blocked)
        self.owner, self._claims = owner, 1
        self.changes.notify(ChangeKind.OWNER, group=self, value=owner)

    def release_dma_owner(self, owner: object) -> None:
        """Releases the group, however often it was claimed, and restores the default domain; without memory for it the
        group is blocked.

        IommuError: EINVAL `owner` is not the owner; EBUSY a domain of the owner's is still attached.  (Linux
        iommu_group_release_dma_owner)
        """
        with self._lock:
            self._check_owner(owner)
            if self.domain is not self.iommu.blocked or self.pasids:
                raise IommuError(errno.EBUSY, f"group {self.number}: a domain is still attached")
            self._restore_default()
            self.owner, self._claims = None, 0
            self.changes.notify(ChangeKind.OWNER, group=self)
        self.changes.owner_released()

    def release_for_device(self, owner: object) -> None:
        """Takes back one `claim_for_device`; the last one releases the group.

        IommuError as `release_dma_owner`.  (Linux iommu_device_release_dma_owner)
        """
        with self._lock:
            self._check_owner(owner)
            if self._claims > 1:
                self._claims -= 1
            else:
                self.release_dma_owner(owner)

    def _check_owner(self, owner: object) -> None:
        if self.owner is None or self.owner != owner:
            raise IommuError(errno.EINVAL, f"group {self.number} is not owned by {owner}")

    def __str__(self) -> str:
        return f"group {self.number}"

    def __repr__(self) -> str:
        return f"<group {self.number} of {self.iommu.name}: {', '.join(e.name for e in self.endpoints)}>"
