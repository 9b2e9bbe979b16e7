"""The only importer of the compiled shim: handles as objects, errno as exceptions.

`c_shim/vmshim.h` says what each call does; here are only lifetimes and types, in a file for each part of the header.
Handles are freed by the garbage collector, in any order: what was made from an object keeps it alive on the shim's
side.

This is the namespace of all; the hot loops of device models are imported by themselves: `nvme`, `store`, `viommu`.
"""

try:
    from vmodel._shim.channel import (
        ACCESS,
        BATCH,
        EXIT_CLOSED,
        EXIT_COMMAND,
        EXIT_EVENT,
        EXIT_POSTED,
        EXIT_READ,
        EXIT_REPLY,
        EXIT_TIMEOUT,
        EXIT_WAKE,
        EXIT_WRITE,
        FOREVER,
        Channel,
        key,
    )
    from vmodel._shim.domain import (
        DOMAIN_BLOCKED,
        DOMAIN_IDENTITY,
        FLUSH_KEEP_OWN,
        MAP_NO_CACHE,
        MAP_SNOOP,
        UNMAP_DEFER,
        Budget,
        Domain,
        Mapped,
    )
    from vmodel._shim.fault import NO_PASID, ByMessage
    from vmodel._shim.function import (
        ALL_SIZES,
        EXIT_ON_READ,
        EXIT_ON_WRITE,
        EXIT_REFUSED,
        MISALIGNED,
        REGIONS,
        SIZE_ODD,
        FunctionRegions,
        FunctionStats,
        Policy,
    )
    from vmodel._shim.handle import check
    from vmodel._shim.ledger import (
        LEDGER_ENDED,
        LEDGER_INCIDENTS,
        LEDGER_LIVE,
        LONG_NS,
        REUSE_NS,
        SET_SPANS,
        DmaIncident,
        IncidentKind,
        Ledger,
        LedgerTotals,
        MappingUse,
        UseFlag,
    )
    from vmodel._shim.memory import Files, Memory
    from vmodel._shim.requester import (
        ATOMIC_CAS,
        ATOMIC_FETCH_ADD,
        ATOMIC_SWAP,
        DMA_WRITE,
        MOST_BYTES,
        PROT_NONE,
        STALE_ROUTE,
        Pin,
        Requester,
        StaleNote,
        TooLarge,
    )
except AttributeError as error:
    if "cffi library" not in str(error):
        raise
    # The sources were updated, and the shim was not built again.
    raise ImportError(f"it is older than vmodel's Python files: {error}", name="vmodel._vmshim") from error

__all__ = [
    "ACCESS",
    "ALL_SIZES",
    "ATOMIC_CAS",
    "ATOMIC_FETCH_ADD",
    "ATOMIC_SWAP",
    "BATCH",
    "DMA_WRITE",
    "DOMAIN_BLOCKED",
    "DOMAIN_IDENTITY",
    "EXIT_CLOSED",
    "EXIT_COMMAND",
    "EXIT_EVENT",
    "EXIT_ON_READ",
    "EXIT_ON_WRITE",
    "EXIT_POSTED",
    "EXIT_READ",
    "EXIT_REFUSED",
    "EXIT_REPLY",
    "EXIT_TIMEOUT",
    "EXIT_WAKE",
    "EXIT_WRITE",
    "FLUSH_KEEP_OWN",
    "FOREVER",
    "LEDGER_ENDED",
    "LEDGER_INCIDENTS",
    "LEDGER_LIVE",
    "LONG_NS",
    "MAP_NO_CACHE",
    "MAP_SNOOP",
    "MISALIGNED",
    "MOST_BYTES",
    "NO_PASID",
    "PROT_NONE",
    "REGIONS",
    "REUSE_NS",
    "SET_SPANS",
    "SIZE_ODD",
    "STALE_ROUTE",
    "UNMAP_DEFER",
    "Budget",
    "ByMessage",
    "Channel",
    "DmaIncident",
    "Domain",
    "Files",
    "FunctionRegions",
    "FunctionStats",
    "IncidentKind",
    "Ledger",
    "LedgerTotals",
    "Mapped",
    "MappingUse",
    "Memory",
    "Pin",
    "Policy",
    "Requester",
    "StaleNote",
    "TooLarge",
    "UseFlag",
    "check",
    "key",
]
