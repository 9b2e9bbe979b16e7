"""All namespaces of the subsystem, and the space that is left for more (NVMe 1.4, 8.12)."""

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
    """What is behind a namespace of a machine file.  ConfigError."""
    if params.memory is not None:
        try:
            return MemoryBackend(params.memory)
        except OSError as error:
            raise ConfigError(f"{params.memory} bytes of memory for a namespace: {error.strerror}") from error
    assert params.path is not None  # as the parameters are checked
    return FileBackend(params.path, params.size, read_only=params.read_only, workers=workers)


class Inventory:
    """Namespaces by their id, which is 1 to `MAX_NAMESPACES`; they outlive resets."""

    def __init__(self, identity: str, capacity: int) -> None:
        """`identity`: what the names of namespaces come from; `capacity`: bytes of memory for those of the guest's."""
        self._identity = identity
        self._by_id: dict[int, Namespace] = {}
        self.unallocated = capacity

    def open(self, params: Sequence[NamespaceParams], workers: Workers) -> None:
        """Makes the namespaces of a machine file, from id 1 on; `workers` wait for files.

        ConfigError: a file is not to be had.
        """
        with ExitStack() as opened:
            for nsid, one in enumerate(params, 1):
                made = backend(one, workers)
                opened.callback(made.close)
                self._by_id[nsid] = Namespace(nsid, made, one.lba, uuid.uuid5(_NAMES, f"{self._identity} {nsid}"))
            opened.pop_all()

    def close(self) -> None:
        """Gives back what the namespaces hold."""
        for namespace in self._by_id.values():
            namespace.backend.close()
        self._by_id.clear()

    @property
    def total(self) -> int:
        """Bytes of all namespaces, and of what is left."""
        return sum(namespace.backend.size for namespace in self._by_id.values()) + self.unallocated

    @property
    def allocated(self) -> list[Namespace]:
        """All that there are, by id."""
        return [self._by_id[nsid] for nsid in sorted(self._by_id)]

    @property
    def active(self) -> list[Namespace]:
        """Those that are attached, by id."""
        return [namespace for namespace in self.allocated if namespace.attached]

    def check(self, nsid: int) -> None:
        """CommandError unless `nsid` is one that a namespace can have."""
        if not 1 <= nsid <= MAX_NAMESPACES:
            raise CommandError(NvmeStatus.INVALID_NAMESPACE, location=4)

    def find(self, nsid: int) -> Namespace | None:
        """A namespace, attached or not.  CommandError: none can have that id."""
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
        """The attached namespace, or with FFFFFFFFh all that are.  CommandError."""
        return self.active if nsid == BROADCAST else [self.attached(nsid)]

    def create(self, blocks: int, lba_format: int) -> Namespace:
        """A new namespace, not attached, in memory.  CommandError."""
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
        except OSError as error:  # the host's memory is less than the machine file says
            raise CommandError(NvmeStatus.INSUFFICIENT_CAPACITY, information=size) from error
        namespace = Namespace(nsid, made, LBA_SIZES[lba_format], uuid.uuid4())
        namespace.attached = False
        self._by_id[nsid] = namespace
        self.unallocated -= size
        return namespace

    def delete(self, namespace: Namespace) -> None:
        """Takes a namespace away.  Memory can be used anew; a file is closed, and stays as it is."""
        del self._by_id[namespace.nsid]
        if isinstance(namespace.backend, MemoryBackend):
            self.unallocated += namespace.backend.size
        namespace.backend.close()
