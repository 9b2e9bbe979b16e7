"""`KvmVfio`: KVM's VFIO device, which decides whether a guest's WBINVD has an effect (Linux virt/kvm/vfio.c).

The contract: files whose DMA is made to snoop need no WBINVD, and KVM may ignore it.  KVM asks what the devices can
(vfio_file_enforced_coherent), not what their domains do.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

from vmodel.closing import Closing
from vmodel.errors import IommuError
from vmodel.iommu.group import Group
from vmodel.iommu.iommufd.device import Device
from vmodel.iommu.locking import locked

#: What is a file of VFIO: a group's, or that of a device which is bound to an iommufd context.
VfioFile = Group | Device


class KvmVfio(Closing):
    """The files that a VMM has added, for one guest.  Any thread may call it; a context manager."""

    def __init__(self, wbinvd: Callable[[], None] | None = None) -> None:
        """`wbinvd`: writes back and invalidates the caches of the CPU, as `CpuCache.wbinvd`."""
        self.lock = threading.RLock()
        self._wbinvd = wbinvd
        self._files: list[VfioFile] = []
        self._noncoherent = False

    @locked
    def add(self, file: VfioFile) -> None:
        """KVM_DEV_VFIO_FILE_ADD.  IommuError: EINVAL it is no file of VFIO; EEXIST it was added before."""
        if not isinstance(file, VfioFile):
            raise IommuError(errno.EINVAL, f"{file}: neither a group nor a device of VFIO")
        if any(known is file for known in self._files):
            raise IommuError(errno.EEXIST, f"{file} was added before")
        self._files.append(file)
        self._update()

    @locked
    def remove(self, file: VfioFile) -> None:
        """KVM_DEV_VFIO_FILE_DEL.  IommuError(ENOENT): it was not added."""
        if not any(known is file for known in self._files):
            raise IommuError(errno.ENOENT, f"{file} was not added")
        self._files = [known for known in self._files if known is not file]
        self._update()

    @locked
    def close(self) -> None:
        """Removes all files, as the end of the guest does (kvm_vfio_release)."""
        self._files = []
        self._update()

    def _update(self) -> None:
        """As in Linux only when a file comes or goes (kvm_vfio_update_coherency)."""
        self._noncoherent = not all(map(enforced_coherent, self._files))

    @property
    def noncoherent_dma(self) -> bool:
        """Whether the guest's DMA may bypass caches (kvm_arch_has_noncoherent_dma)."""
        return self._noncoherent

    def guest_wbinvd(self) -> bool:
        """The guest executes WBINVD (need_emulate_wbinvd); returns whether it had an effect."""
        if not self.noncoherent_dma:
            return False
        if self._wbinvd is not None:
            self._wbinvd()
        return True


def enforced_coherent(file: VfioFile) -> bool:
    """Whether all DMA of a file can be made to snoop (Linux vfio_file_enforced_coherent)."""
    endpoints = file.endpoints if isinstance(file, Group) else [file.endpoint]
    return all(endpoint.can_enforce_snoop for endpoint in endpoints)
