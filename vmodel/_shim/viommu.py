"""The hot loop of virtio-iommu; see vms_viommu_run."""

from __future__ import annotations

from collections.abc import Mapping

from vmodel._shim import Domain, Requester, check
from vmodel._vmshim import ffi, lib


class RequestQueue:
    """A virtqueue's addresses and indexes, as the loop takes them and leaves them."""

    def __init__(self, requester: Requester) -> None:
        self._requester = requester
        self.state = ffi.new("vms_virtqueue *")
        self._domains: list[Domain] = []
        self._table = ffi.new("vms_viommu_domain[]", 0)

    def set_domains(self, domains: Mapping[int, Domain]) -> None:
        """The domains that have mappings, by their ids."""
        self._domains = list(domains.values())  # kept alive
        self._table = ffi.new("vms_viommu_domain[]", [(id, domain.handle) for id, domain in domains.items()])

    def run(self) -> int:
        """How many requests were carried out; OSError: the used ring is gone."""
        return check(lib.vms_viommu_run(self._requester.handle, self.state, self._table, len(self._domains)))
