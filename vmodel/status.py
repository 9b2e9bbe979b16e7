"""The status that a running machine reports on its control socket, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from vmodel.control import Command
from vmodel.iommu import sysfs
from vmodel.iommu.domain import PagingDomain
from vmodel.iommu.group import Group
from vmodel.machine import Machine

#: Most mappings of one domain that are listed; `mapping_count` is the number of all.
MAX_MAPPINGS = 1000


def described(machine: Machine) -> dict[str, Any]:
    """Groups, domains, mappings, IOTLBs and faults as plain data: the answer to "iommu" on the control socket."""
    devices = machine.devices
    return {
        "machine": machine.name,
        "iommus": [
            {
                "name": iommu.name,
                "kind": iommu.driver.kind,
                "faults": iommu.faults.total,
                "lost": iommu.faults.lost,
                "report_stale": iommu.report_stale,
                "last_faults": [str(record) for record in iommu.faults.peek()[-8:]],
            }
            for iommu in machine.system.iommus
        ],
        "groups": [_group(group) for group in machine.system.groups],
        "devices": {
            endpoint.name: {
                "iotlb_hits": stats.iotlb_hits,
                "iotlb_misses": stats.iotlb_misses,
                "stale": stats.stale,
                "faults": stats.faults,
            }
            for endpoint in machine.system.endpoints
            if endpoint.name in devices and (stats := devices[endpoint.name].dma.stats)
        },
    }


def _group(group: Group) -> dict[str, Any]:
    domain = group.domain
    found: dict[str, Any] = {
        "number": group.number,
        "iommu": group.iommu.name,
        "devices": [endpoint.name for endpoint in group.endpoints],
        "domain": domain.name,
        "type": domain.type.value,
        "pasids": {str(pasid): other.name for pasid, other in group.pasids.items()},
    }
    if isinstance(domain, PagingDomain):
        found["mapping_count"] = len(domain)
        found["mappings"] = [
            {"iova": m.span.start, "last": m.span.last, "gpa": m.gpa, "access": int(m.access)}
            for m in islice(domain.mappings(), MAX_MAPPINGS)
        ]
    return found


def dma(machine: Machine, request: Mapping[str, Any]) -> dict[str, Any]:
    """What was recorded of the DMA, and whether the record has just begun: the answer to "dma".

    `restart` in the request begins a new record; `mappings`: the report has the mappings, too.
    """
    restart = bool(request.get("restart"))
    began = restart or not machine.watches_dma
    report = machine.watch_dma(restart=restart).report().model_dump(mode="json")
    if not request.get("mappings"):
        for endpoint in report["endpoints"]:
            endpoint["mappings"] = []
    return {"began": began, "report": report}


def commands(machine: Machine) -> dict[str, Command]:
    """The commands of a server's control socket."""
    return {
        "iommu": lambda _: described(machine),
        "sysfs": lambda _: sysfs.tree(machine.system),
        "dma": lambda request: dma(machine, request),
    }
