"""Namespaces: storage, LBA format and state (NVMe 1.4, 6.1)."""

from __future__ import annotations

import enum
import uuid

from vmodel.devices.nvme.backend import BlockBackend
from vmodel.devices.nvme.extents import Extents
from vmodel.devices.nvme.params import LBA_SIZES


class Protection(enum.IntEnum):
    """Namespace Write Protection (8.19.1)."""

    NONE = 0
    WRITE_PROTECT = 1
    UNTIL_POWER_CYCLE = 2


class Namespace:
    """One namespace of the subsystem, attached to the controller or not.

    `blocks` is its size in logical blocks of 1 << `lba_shift` bytes; size and capacity are equal.
    """

    def __init__(self, nsid: int, backend: BlockBackend, lba_size: int, identity: uuid.UUID) -> None:
        self.nsid = nsid
        self.backend = backend
        self.uuid = identity
        self.attached = True
        self.protection = Protection.NONE
        #: Blocks that Write Uncorrectable has made unreadable, until they are written again.
        self.uncorrectable = Extents()
        #: Whether Format NVM is erasing its blocks.
        self.formatting = False
        self.lba_shift = 0
        self.set_format(LBA_SIZES.index(lba_size))

    def set_format(self, index: int) -> None:
        """Sets the LBA format by index; the stored bytes do not change."""
        self.lba_format = index
        self.lba_shift = LBA_SIZES[index].bit_length() - 1
        self.blocks = self.backend.size >> self.lba_shift
        self.uncorrectable.clear()

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.blocks << self.lba_shift

    @property
    def read_only(self) -> bool:
        """Whether writes are refused: by write protection, or because the storage is read-only."""
        return self.backend.read_only or self.protection is not Protection.NONE

    @property
    def plain(self) -> bool:
        """Whether Reads and Writes need no check of the namespace's state."""
        return self.attached and not (self.uncorrectable or self.formatting or self.read_only)
