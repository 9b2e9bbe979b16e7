"""A virtio-rng with recognisable numbers: for tests of DMA that a stock driver sets up by the DMA API."""

from __future__ import annotations

import struct

from vmodel.device import Msix, ResetKind
from vmodel.virtio.pci import VENDOR, VirtioDevice
from vmodel.virtio.queue import Virtqueue

#: VIRTIO 1.3, 6: the driver is to ask the platform for addresses, so to go through the IOMMU.
ACCESS_PLATFORM = 1 << 33
#: Every 8 bytes are this and a serial number.
MARK = b"vmodel"


class Rng(VirtioDevice):
    """Entropy device (5.4) without entropy."""

    vendor_id, device_id, class_code = VENDOR, 0x1044, 0x00FF00
    queue_sizes = (8,)
    offered = ACCESS_PLATFORM
    msix = Msix(vectors=2, own_bar=2)

    def setup(self) -> None:
        super().setup()
        #: Addresses as the driver gave them.
        self.seen: set[int] = set()
        self.serial = 0

    def on_reset(self, kind: ResetKind) -> None:
        super().on_reset(kind)
        self.serial = 0

    def on_queue(self, queue: Virtqueue) -> None:
        while (chain := queue.pop()) is not None:
            self.seen |= {address for address, _ in chain.writable}
            first, self.serial = self.serial, self.serial + chain.write_size // 8
            data = b"".join(struct.pack("<6sH", MARK, n & 0xFFFF) for n in range(first, self.serial))
            queue.answer(chain, data)
