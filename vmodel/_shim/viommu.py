"""The hot loop of virtio-iommu; see vms_viommu_run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vmodel._shim.domain import Domain
from vmodel._shim.handle import check
from vmodel._shim.requester import Requester
from vmodel._vmshim import ffi, lib


class RequestQueue:
    """A virtqueue's addresses and indexes, as the loop takes them and leaves them."""

    def __init__(self, requester: Requester) -> None:
        self._requester = requester
        self.state = ffi.new("vms_virtqueue *")
        self._kept: list[object] = []
        self.set_domains(())

    def set_domains(self, domains: Iterable[tuple[int, Domain, Sequence[tuple[int, int]]]]) -> None:
        """The domains that have mappings: id, domain, and what is not to be mapped there (first, last)."""
        rows, self._kept = [], []
        for id, domain, reserved in domains:
            ranges = ffi.new("vms_range[]", list(reserved))
            self._kept += [domain, ranges]
            rows.append((id, len(reserved), domain.handle, ranges))
        self._table = ffi.new("vms_viommu_domain[]", rows)

    def run(self) -> int:
        """How many requests were carried out; OSError: the used ring is gone."""
        return check(lib.vms_viommu_run(self._requester.handle, self.state, self._table, len(self._table)))
