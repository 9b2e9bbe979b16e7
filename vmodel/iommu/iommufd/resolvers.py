"""`Resolvers`: whom an IOMMU asks about an access that fails (Iommu.resolver), when there are several."""

from __future__ import annotations

from collections.abc import Callable

from vmodel.errors import DmaFault
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.iommu import Iommu

Resolver = Callable[[Endpoint, DmaFault], bool]


class Resolvers:
    """Asks each in turn, until one says that the access is to be tried again."""

    def __init__(self, first: Resolver | None) -> None:
        self._all: list[Resolver] = [] if first is None else [first]

    def __call__(self, endpoint: Endpoint, fault: DmaFault) -> bool:
        return any(resolver(endpoint, fault) for resolver in list(self._all))

    def add(self, resolver: Resolver) -> Callable[[], None]:
        """Asks one more; the function that it returns removes it."""
        self._all.append(resolver)
        return lambda: self._all.remove(resolver)


def resolvers_of(iommu: Iommu) -> Resolvers:
    """Those of an IOMMU; one that is there already stays the first."""
    if not isinstance(iommu.resolver, Resolvers):
        iommu.resolver = Resolvers(iommu.resolver)
    return iommu.resolver
