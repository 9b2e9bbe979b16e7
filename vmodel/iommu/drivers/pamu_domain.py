"""Domains of a PAMU that are made of windows: Linux 3.14 to 5.12, drivers/iommu/fsl_pamu_domain.c.

Newer kernels have removed the calls (domain_window_enable, the attributes GEOMETRY, WINDOWS, FSL_PAMU_STASH and
FSL_PAMU_ENABLE of domains); the hardware is the same.
"""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass

from vmodel.errors import Access, IommuError
from vmodel.iommu.domain import NO_ACCESS, AllocFlags, DomainType, PagingDomain
from vmodel.iommu.drivers.pamu import Pamu, StashCache
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.iommu import Iommu
from vmodel.span import PAGE, Span

#: The most windows of a domain (Linux pamu_get_max_subwin_cnt).
MAX_WINDOWS = 256


@dataclass(frozen=True)
class PamuWindow:
    """A window that is enabled: the first `size` bytes of its IOVAs lead to GPAs from `gpa` on."""

    gpa: int
    size: int
    access: Access


class PamuDomain(PagingDomain):
    """A domain whose geometry, a span of IOVAs, is divided into windows of one size; while enabled, DMA passes.

    It is set up in this order: `set_geometry`, `set_windows`, `enable_window`, `set_enabled(True)`.
    """

    def __init__(self, made_for: Iommu) -> None:
        super().__init__(DomainType.UNMANAGED, made_for, AllocFlags.NONE)
        #: Whether the geometry was set, and whether DMA passes.
        self.configured = self.enabled = False
        #: The number that the caches' device tree node has for writes to go to; None: memory.
        self.stash: int | None = None
        self._pamu: Pamu = made_for.driver  # type: ignore[assignment]
        self._windows: list[PamuWindow | None] = []
        self._state = threading.RLock()

    @property
    def windows(self) -> tuple[PamuWindow | None, ...]:
        """The windows, each with its contents, or None while it is disabled."""
        with self._state:
            return tuple(self._windows)

    def set_geometry(self, span: Span, *, force_aperture: bool = True) -> None:
        """DOMAIN_ATTR_GEOMETRY: the IOVAs that windows divide; there are no windows until `set_windows`.

        IommuError: EINVAL the size is no power of two of at least 4 KiB, `span` is not aligned to it, is more than the
        PAMU can address, or DMA outside is to pass (`force_aperture` False); EBUSY the domain is enabled.
        """
        whole = self.made_for.capabilities.usable if self.made_for is not None else self.aperture
        _check_size(span.size, span.start)
        if not force_aperture or not whole.covers(span):
            raise IommuError(errno.EINVAL, f"{self.name}: DMA outside of {span}, or beyond {whole}")
        with self._state:
            self._check_disabled()
            self.aperture, self.configured, self._windows = span, True, []

    def set_windows(self, count: int) -> None:
        """DOMAIN_ATTR_WINDOWS: divides the geometry into `count` windows, which are all disabled.

        IommuError: EBUSY the domain is enabled; EINVAL there is no geometry, or `count` is no power of two from 1 to
        256, or windows would have less than 4 KiB.
        """
        with self._state:
            self._check_disabled()
            if not self.configured:
                raise IommuError(errno.EINVAL, f"{self.name} has no geometry")
            if not 1 <= count <= MAX_WINDOWS or count & (count - 1):
                raise IommuError(errno.EINVAL, f"{self.name}: {count} windows: a power of two up to {MAX_WINDOWS}")
            _check_size(self.aperture.size // count, self.aperture.start)
            self._windows = [None] * count

    def enable_window(self, number: int, gpa: int, size: int, access: Access = Access.READ | Access.WRITE) -> None:
        """Lets the first `size` bytes of a window lead to `gpa` (Linux iommu_domain_window_enable).

        Without access, DMA to the window faults.  IommuError: ENODEV there are no windows yet; EINVAL no such window, a
        size that is more than the window's or no power of two of at least 4 KiB, or a GPA that is not on a page; EBUSY
        the window is enabled already, or the domain is, and has a single window; ERANGE GPAs of more than 36 bits.
        """
        with self._state:
            if not self._windows:
                raise IommuError(errno.ENODEV, f"{self.name} has no windows yet")
            self._check_number(number)
            if size > self.aperture.size // len(self._windows):
                raise IommuError(errno.EINVAL, f"{self.name}: {size:#x} bytes are more than a window")
            if len(self._windows) == 1:
                self._check_disabled()
            _check_size(size, self.aperture.start)
            if self._windows[number] is not None:
                raise IommuError(errno.EBUSY, f"{self.name}: window {number} is enabled already")
            if gpa < 0 or gpa % PAGE:
                raise IommuError(errno.EINVAL, f"{self.name}: gpa {gpa:#x} is not on a page")
            if gpa + size > 1 << self.output_bits:
                raise IommuError(errno.ERANGE, f"{self.name}: gpa {gpa:#x} has more than {self.output_bits} bits")
            window = PamuWindow(gpa, size, access)
            if self.enabled:
                self._fill(number, window)
            self._windows[number] = window

    def disable_window(self, number: int) -> None:
        """Disables a window (Linux iommu_domain_window_disable); a single one disables the domain.

        As in Linux, a window that is disabled already is no error.  IommuError(EINVAL): there is no such window.
        """
        with self._state:
            self._check_number(number)
            if len(self._windows) == 1:
                self._close()
            self.clear(self._place(number))
            self._windows[number] = None

    def set_enabled(self, on: bool) -> None:
        """DOMAIN_ATTR_FSL_PAMU_ENABLE: whether DMA passes through the windows, or is blocked.

        IommuError: ENODEV no window is enabled; ENOMEM `max_memory` of the IOMMU is used up.
        """
        with self._state:
            if not on:
                self._close()
                return
            if not any(self._windows):
                raise IommuError(errno.ENODEV, f"{self.name} has no window that is enabled")
            if self.enabled:
                return
            try:
                for number, window in enumerate(self._windows):
                    if window is not None:
                        self._fill(number, window)
            except IommuError:
                self._close()
                raise
            self.enabled = True

    def set_stash(self, cache: StashCache, cpu: int = 0) -> None:
        """DOMAIN_ATTR_FSL_PAMU_STASH: writes go to a cache, too, of a CPU or (L3) of the platform.

        IommuError(EINVAL): the machine has no such cache (`params.stash`), or groups are attached and there are no
        windows.  (Linux get_stash_id, update_liodn_stash)
        """
        key = cache.value if cache is StashCache.L3 else f"{cache.value}.{cpu}"
        with self._state:
            number = self._pamu.params.stash.get(key)
            if number is None:
                raise IommuError(errno.EINVAL, f"{self.name}: no cache {key} has a stash id")
            if self.users and not self._windows:
                raise IommuError(errno.EINVAL, f"{self.name} has no windows")
            self.stash = number

    def map(
        self, iova: int, gpa: int, size: int, access: Access = Access.READ | Access.WRITE, *, cache: bool = True
    ) -> None:
        """Always IommuError(ENODEV): only windows make mappings, as in Linux, where the driver has no `map`."""
        raise IommuError(errno.ENODEV, f"{self.name}: a PAMU's domain has windows")

    def unmap(self, iova: int, size: int) -> int:
        """Always 0, as in Linux (iommu_unmap, of a driver without `unmap`)."""
        return 0

    def _check_disabled(self) -> None:
        if self.enabled:
            raise IommuError(errno.EBUSY, f"{self.name} is enabled")

    def _check_number(self, number: int) -> None:
        if not 0 <= number < len(self._windows):
            raise IommuError(errno.EINVAL, f"{self.name} has no window {number}")

    def _place(self, number: int) -> Span:
        size = self.aperture.size // len(self._windows)
        return Span.sized(self.aperture.start + number * size, size)

    def _fill(self, number: int, window: PamuWindow) -> None:
        # Without access it is mapped all the same: each access to it faults, as by PAACE_AP_PERMS_DENIED.
        super().map(self._place(number).start, window.gpa, window.size, window.access or NO_ACCESS)

    def _close(self) -> None:
        self.clear(self.aperture)
        self.enabled = False


def _check_size(size: int, iova: int) -> None:
    """Linux check_size."""
    if size < PAGE or size & (size - 1):
        raise IommuError(errno.EINVAL, f"{size:#x} bytes: a power of two of at least {PAGE:#x}")
    if iova % size:
        raise IommuError(errno.EINVAL, f"iova {iova:#x} is not aligned to {size:#x}")


def pamu_domain_alloc(endpoint: Endpoint) -> PamuDomain:
    """A domain of windows for a device behind a PAMU.

    Its geometry is all 36 bits, but without windows.  IommuError: ENODEV the device has no group; EOPNOTSUPP its IOMMU
    is no PAMU.
    """
    if endpoint.iommu is None or endpoint.group is None:
        raise IommuError(errno.ENODEV, f"{endpoint.name} has no group: {endpoint.why}")
    if not isinstance(endpoint.iommu.driver, Pamu):
        raise IommuError(errno.EOPNOTSUPP, f"{endpoint.iommu.name} has no windows: it is {endpoint.iommu.driver.title}")
    return PamuDomain(endpoint.iommu)
