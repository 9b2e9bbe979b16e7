"""All namespaces of the subsystem, and the unallocated capacity (NVMe 1.4, 8.12)."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from contextlib import ExitStack

from vmodel._shim.store import Workers
from vmodel.devices.nvme.backend import BlockBackend, FileBackend, MemoryBackend
from vmodel.devices.nvme.command import BROADCAST
from vmodel.devices.nvme.namespace import Namespace
from vmodel.devices.nvme.params import LBA_SIZES, MAX_NAMESPACES, NamespaceParams
from vmodel.devices.nvme.status import CommandError, NvmeStatus
from vmodel.errors import ConfigError

_NAMES = uuid.UUID("6d6f6465-6c20-4e56-8d65-206e616d6573")


def backend(params: NamespaceParams, workers: Workers) -> BlockBackend:
    """Makes the storage of a namespace from its parameters.  ConfigError."""
    if params.memory is not None:
        try:
            return MemoryBackend(params.memory)
        except OSError as error:
            raise ConfigError(f"{params.memory} bytes of memory for a namespace: {error.strerror}") from error
    assert params.path is not None  # NamespaceParams has checked this
    return FileBackend(params.path, params.size, read_only=params.read_only, workers=workers)


class Inventory:
    """The namespaces by id, 1 to `MAX_NAMESPACES`; they survive resets."""

    def __init__(self, identity: str, capacity: int) -> None:
        """Namespaces' UUIDs derive from `identity`; `capacity`: bytes of memory for namespaces that the guest makes."""
        self._identity = identity
        self._by_id: dict[int, Namespace] = {}
        self.unallocated = capacity

    def open(self, params: Sequence[NamespaceParams], workers: Workers) -> None:
        """Makes the namespaces of a machine file, from id 1 on; `workers` carry out jobs on files.

        ConfigError: a file cannot be opened.
        """
        with ExitStack() as opened:
            for nsid, one in enumerate(params, 1):
                made = backend(one, workers)
                opened.callback(made.close)
                self._by_id[nsid] = Namespace(nsid, made, one.lba, uuid.uuid5(_NAMES, f"{self._identity} {nsid}"))
            opened.pop_all()

    def close(self) -> None:
        """Releases the storage of all namespaces."""
        for namespace in self._by_id.values():
            namespace.backend.close()
        self._by_id.clear()

    @property
    def total(self) -> int:
        """Bytes of all namespaces and of the unallocated capacity."""
        return sum(namespace.backend.size for namespace in self._by_id.values()) + self.unallocated

    @property
    def allocated(self) -> list[Namespace]:
        """All namespaces, by ascending id."""
        return [self._by_id[nsid] for nsid in sorted(self._by_id)]

    @property
    def active(self) -> list[Namespace]:
        """The attached namespaces, by ascending id."""
        return [namespace for namespace in self.allocated if namespace.attached]

    def check(self, nsid: int) -> None:
        """CommandError if no namespace can have the id `nsid`."""
        if not 1 <= nsid <= MAX_NAMESPACES:
            raise CommandError(NvmeStatus.INVALID_NAMESPACE, location=4)

    def find(self, nsid: int) -> Namespace | None:
        """The namespace of that id, attached or not; None: there is none.  CommandError: the id is invalid."""
        self.check(nsid)
        return self._by_id.get(nsid)

    def attached(self, nsid: int) -> Namespace:
        """An attached namespace.  CommandError: there is none (Invalid Namespace), or it is not attached."""
        namespace = self.find(nsid)
        if namespace is None or not namespace.attached:
            # An id that is valid and not active (6.1.4).
            raise CommandError(NvmeStatus.INVALID_FIELD, location=4)
        return namespace

    def chosen(self, nsid: int) -> list[Namespace]:
        """The attached namespace of that id as a list; FFFFFFFFh: all attached namespaces.  CommandError."""
        return self.active if nsid == BROADCAST else [self.attached(nsid)]

    def create(self, blocks: int, lba_format: int) -> Namespace:
        """Makes a namespace in memory, not attached.  CommandError."""
        if lba_format >= len(LBA_SIZES):
            raise CommandError(NvmeStatus.INVALID_FORMAT)
        if not blocks:
            raise CommandError(NvmeStatus.INVALID_FIELD)
        size = blocks * LBA_SIZES[lba_format]
        if size > self.unallocated:
            raise CommandError(NvmeStatus.INSUFFICIENT_CAPACITY, information=min(size, (1 << 64) - 1))
        nsid = next((n for n in range(1, MAX_NAMESPACES + 1) if n not in self._by_id), None)
        if nsid is None:
            raise CommandError(NvmeStatus.NAMESPACE_ID_UNAVAILABLE)
        try:
            made = MemoryBackend(size)
        except OSError as error:  # the host has less memory than the machine file allows
            raise CommandError(NvmeStatus.INSUFFICIENT_CAPACITY, information=size) from error
        namespace = Namespace(nsid, made, LBA_SIZES[lba_format], uuid.uuid4())
        namespace.attached = False
        self._by_id[nsid] = namespace
        self.unallocated -= size
        return namespace

    def delete(self, namespace: Namespace) -> None:
        """Deletes a namespace.  Its memory becomes unallocated capacity; a file is closed and keeps its contents."""
        del self._by_id[namespace.nsid]
        if isinstance(namespace.backend, MemoryBackend):
            self.unallocated += namespace.backend.size
        namespace.backend.close()
