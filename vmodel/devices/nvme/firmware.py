"""Firmware images: download, commit to slots, activation (NVMe 1.4, 5.11 and 5.12).

An image does not change the model's behaviour.  Its revision is its first 8 bytes, if they are printable ASCII, else
the first 8 digits of its SHA-256.
"""

from __future__ import annotations

import enum
import hashlib

from vmodel.devices.nvme.extents import Extents
from vmodel.devices.nvme.status import CommandError, NvmeStatus
from vmodel.span import MiB

#: Number of slots; all can be written.
SLOTS = 3
#: Largest image in bytes, and the granularity of its parts (FWUG, in 4 KiB).
MAX_IMAGE, GRANULARITY = 16 * MiB, 1


class CommitAction(enum.IntEnum):
    """Commit Action."""

    REPLACE = 0
    REPLACE_ACTIVATE_AT_RESET = 1
    ACTIVATE_AT_RESET = 2
    ACTIVATE_NOW = 3


class Firmware:
    """The slots, which survive resets, and the image that is being downloaded."""

    def __init__(self, revision: str) -> None:
        #: Revisions by slot.
        self.slots = {1: revision}
        self.active = 1
        #: The slot that the next reset activates; 0: no change.
        self.pending = 0
        self._image = bytearray()
        self._parts = Extents()

    @property
    def revision(self) -> str:
        """The revision of the active slot."""
        return self.slots[self.active]

    def reset(self) -> None:
        """At a controller reset: activates the pending slot, and discards a download that was not committed."""
        if self.pending:
            self.active, self.pending = self.pending, 0
        self._discard()

    def _discard(self) -> None:
        self._image = bytearray()
        self._parts.clear()

    def download(self, offset: int, size: int) -> None:
        """Checks a part of `size` bytes at `offset` before it is transferred.  CommandError."""
        if (offset | size) % (GRANULARITY << 12) or offset + size > MAX_IMAGE:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
        if offset and self._parts.first_in(offset, size) is not None:
            raise CommandError(NvmeStatus.OVERLAPPING_RANGE)

    def store(self, offset: int, data: bytes) -> None:
        """Stores a part that `download` has checked, in any order; the part at 0 again begins a new image."""
        if self._parts.first_in(offset, len(data)) is not None:
            self._discard()
        if len(self._image) < offset + len(data):
            self._image.extend(bytes(offset + len(data) - len(self._image)))
        self._image[offset : offset + len(data)] = data
        self._parts.add(offset, len(data))

    def commit(self, slot: int, action: int) -> bool:
        """Carries out Firmware Commit; slot 0: the first free one, or else one that is not active.  CommandError.

        Returns whether the command has activated an image.
        """
        if action > CommitAction.ACTIVATE_NOW:
            raise CommandError(NvmeStatus.INVALID_FIELD, location=40)
        if slot > SLOTS:
            raise CommandError(NvmeStatus.INVALID_FIRMWARE_SLOT, location=40)
        downloaded = bool(self._parts)
        if not slot:
            free = [n for n in range(1, SLOTS + 1) if n not in self.slots]
            slot = (free or [n for n in self.slots if n != self.active])[0]
        if action in (CommitAction.REPLACE, CommitAction.REPLACE_ACTIVATE_AT_RESET) or (
            action == CommitAction.ACTIVATE_NOW and downloaded
        ):
            self.slots[slot] = self._take()
        elif slot not in self.slots:
            raise CommandError(NvmeStatus.INVALID_FIRMWARE_SLOT, location=40)
        if action in (CommitAction.REPLACE_ACTIVATE_AT_RESET, CommitAction.ACTIVATE_AT_RESET):
            self.pending = slot
        if action == CommitAction.ACTIVATE_NOW:
            self.active, self.pending = slot, 0
            return True
        return False

    def _take(self) -> str:
        """Ends the download; returns the image's revision.  CommandError: there is no image, or a part is missing."""
        image, spans = bytes(self._image), list(self._parts)
        self._discard()
        if spans != [(0, len(image))]:
            raise CommandError(NvmeStatus.INVALID_FIRMWARE_IMAGE)
        name = image[:8].rstrip(b"\0 ")
        if name and all(0x20 < byte < 0x7F for byte in name):
            return name.decode("ascii")
        return hashlib.sha256(image).hexdigest()[:8]
