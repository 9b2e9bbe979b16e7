"""`VfioCompat`: the calls of VFIO's containers, answered by a context (Linux drivers/iommu/iommufd/vfio_compat.c).

A user that knows only /dev/vfio/vfio can use /dev/iommu in its place.  The calls act on one IOAS, the compatibility
IOAS, and answer as iommufd does: ENOENT where `Container` has EINVAL, and ENODEV as long as there is no IOAS.
"""

from __future__ import annotations

import errno
import struct
import threading
from enum import IntEnum, IntFlag

from vmodel.errors import Access, IommuError
from vmodel.iommu.iommufd.context import Context
from vmodel.iommu.iommufd.ioas import Ioas
from vmodel.iommu.locking import locked
from vmodel.span import PAGE, Span

#: VFIO_GET_API_VERSION.
API_VERSION = 0
#: Sizes of structures up to their last field that must be there: vfio_iommu_type1_dma_map, _dma_unmap and _info.
_MAP, _UNMAP, _INFO = 32, 24, 16
#: struct vfio_iommu_type1_info: argsz, flags, iova_pgsizes, cap_offset, pad.
_HEAD = struct.Struct("<IIQII")
#: struct vfio_iommu_type1_info_dma_avail: id, version, next; avail.
_AVAIL = struct.Struct("<HHII")
#: struct vfio_iommu_type1_info_cap_iova_range: id, version, next; nr_iovas, reserved.
_RANGES = struct.Struct("<HHIII")
_RANGE = struct.Struct("<QQ")
_CAP_IOVA_RANGE, _CAP_DMA_AVAIL = 1, 3
_PGSIZES, _CAPS = 1, 2
_ALL_BITS = (1 << 64) - 1


class Extension(IntEnum):
    """What VFIO_CHECK_EXTENSION and VFIO_SET_IOMMU name."""

    TYPE1 = 1
    TYPE1V2 = 3
    DMA_CC = 4
    NOIOMMU = 8
    UNMAP_ALL = 9
    UPDATE_VADDR = 10


class VfioMapFlags(IntFlag):
    """VFIO_DMA_MAP_FLAG_*; VADDR is refused."""

    READ = 1
    WRITE = 2
    VADDR = 4


class VfioUnmapFlags(IntFlag):
    """VFIO_DMA_UNMAP_FLAG_*; only ALL is accepted."""

    GET_DIRTY_BITMAP = 1
    ALL = 2
    VADDR = 4


class VfioCompat:
    """VFIO's calls on one open /dev/iommu.  Any thread may call it.

    `argsz` is the size, in bytes, that the caller gives for its structure; by default that of the whole one.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._ioas: Ioas | None = None

    @property
    def lock(self) -> threading.RLock:
        """The context's."""
        return self.context.lock

    # ---- the IOAS --------------------------------------------------------------------------

    @locked
    def get_ioas(self) -> Ioas:
        """IOMMU_VFIO_IOAS_GET.  IommuError(ENODEV): there is none, or it has been destroyed."""
        if self._ioas is None or self.context.find(self._ioas.id) is not self._ioas:
            raise IommuError(errno.ENODEV, f"{self.context} has no IOAS for VFIO's calls")
        return self._ioas

    @locked
    def set_ioas(self, ioas_id: int) -> None:
        """IOMMU_VFIO_IOAS_SET.  IommuError(ENOENT): there is no IOAS with this id."""
        ioas = self.context.find(ioas_id)
        if not isinstance(ioas, Ioas):
            raise IommuError(errno.ENOENT, f"{self.context} has no IOAS {ioas_id}")
        self._ioas = ioas

    @locked
    def clear_ioas(self) -> None:
        """IOMMU_VFIO_IOAS_CLEAR: it has none from now on; the IOAS stays."""
        self._ioas = None

    @locked
    def create_ioas(self) -> Ioas:
        """Makes one if there is none, as a group that is added to the container does (VFIO_GROUP_SET_CONTAINER).

        IommuError(EBADF): the context is closed.  (Linux iommufd_vfio_compat_ioas_create)
        """
        try:
            return self.get_ioas()
        except IommuError:
            self._ioas = Ioas(self.context)
            return self._ioas

    # ---- what there is ---------------------------------------------------------------------

    def get_api_version(self) -> int:
        """VFIO_GET_API_VERSION."""
        return API_VERSION

    @locked
    def check_extension(self, extension: int) -> int:
        """VFIO_CHECK_EXTENSION: 1 or 0.  DMA_CC: whether DMA of all devices snoops caches.

        IommuError(ENODEV): DMA_CC without an IOAS.
        """
        if extension == Extension.DMA_CC:
            return int(all(hwpt.paging.enforces_snoop for hwpt in self.get_ioas().hwpts))
        return int(extension in (Extension.TYPE1, Extension.TYPE1V2, Extension.UNMAP_ALL))

    @locked
    def set_iommu(self, kind: int) -> None:
        """VFIO_SET_IOMMU: TYPE1V2, or TYPE1, which may unmap parts of mappings.

        IommuError: EINVAL another type, or TYPE1 with mappings in a HWPT; ENODEV no IOAS.
        """
        if kind not in (Extension.TYPE1, Extension.TYPE1V2):
            raise IommuError(errno.EINVAL, f"VFIO_SET_IOMMU: {kind} is not type 1")
        ioas = self.get_ioas()
        if kind == Extension.TYPE1:
            ioas.set_large_pages(False)

    @locked
    def get_info(self, argsz: int = _HEAD.size) -> bytes:
        """VFIO_IOMMU_GET_INFO: the bytes that are written to the caller's structure of `argsz` bytes.

        Its field argsz says how much the whole answer takes.  With less, there is no offset of a capability, and of the
        capabilities only what fits.  IommuError: EINVAL `argsz` is less than 16; ENODEV no IOAS.
        """
        if argsz < _INFO:
            raise IommuError(errno.EINVAL, f"VFIO_IOMMU_GET_INFO: {argsz} bytes")
        ioas = self.get_ioas()
        ranges = ioas.iova_ranges()
        capabilities = [
            (_AVAIL.pack(_CAP_DMA_AVAIL, 1, 0, (1 << 32) - 1), []),
            (_RANGES.pack(_CAP_IOVA_RANGE, 1, 0, len(ranges), 0), [_RANGE.pack(r.start, r.last) for r in ranges]),
        ]
        data, at, last = bytearray(), _HEAD.size, None
        data += bytes(_HEAD.size)
        for header, items in capabilities:
            if last is not None and argsz >= at:
                struct.pack_into("<I", data, last + 4, at)
            data += _filled(header, items, max(argsz - at, 0))
            last, at = at, len(data)
        offset = _HEAD.size if argsz >= at else 0
        data[: _HEAD.size] = _HEAD.pack(at, _PGSIZES | _CAPS, _page_sizes(ioas), offset, 0)
        return bytes(data[:argsz])

    # ---- the map ---------------------------------------------------------------------------

    def map_dma(
        self,
        iova: int,
        gpa: int,
        size: int,
        flags: int = VfioMapFlags.READ | VfioMapFlags.WRITE,
        *,
        argsz: int = _MAP,
    ) -> None:
        """VFIO_IOMMU_MAP_DMA, with a GPA instead of a process's address.

        IommuError: EINVAL `argsz` is less than 32, or unknown flags; ENODEV no IOAS; else as Ioas.map.
        """
        if argsz < _MAP or flags & ~(VfioMapFlags.READ | VfioMapFlags.WRITE).value:
            raise IommuError(errno.EINVAL, f"VFIO_IOMMU_MAP_DMA: {argsz} bytes, flags {flags:#x}")
        access = Access(0)
        if flags & VfioMapFlags.READ:
            access |= Access.READ
        if flags & VfioMapFlags.WRITE:
            access |= Access.WRITE
        self.get_ioas().map(gpa, size, access, iova)

    def unmap_dma(self, iova: int, size: int, flags: int = 0, *, argsz: int = _UNMAP) -> int:
        """VFIO_IOMMU_UNMAP_DMA; returns the bytes removed, 0 if nothing is mapped there.

        After VFIO_SET_IOMMU of TYPE1 a mapping that is partly in the range is cut.  IommuError: EINVAL `argsz` is less
        than 24, unknown flags, ALL with an IOVA or a size, no size, or a cut that is not at a page; ENODEV no IOAS;
        EOVERFLOW wraps; ENOENT a mapping is only partly in the range (those before it are removed).
        """
        if argsz < _UNMAP or flags & ~VfioUnmapFlags.ALL.value:
            raise IommuError(errno.EINVAL, f"VFIO_IOMMU_UNMAP_DMA: {argsz} bytes, flags {flags:#x}")
        ioas = self.get_ioas()
        if flags & VfioUnmapFlags.ALL:
            if iova or size:
                raise IommuError(errno.EINVAL, "VFIO_IOMMU_UNMAP_DMA of all: IOVA and size must be 0")
            return ioas.unmap_all()
        if not ioas.large_pages:
            ioas.cut(iova, size)
        try:
            return ioas.unmap(iova, size)
        except IommuError as error:
            if error.errno != errno.ENOENT:
                raise
            span = Span.sized(iova, size)
            if any(mapping.span.overlaps(span) for mapping in self.get_ioas().mappings()):
                raise  # one is cut
            return 0

    def dirty_pages(self) -> None:
        """VFIO_IOMMU_DIRTY_PAGES: iommufd has HWPTs for it.  IommuError(ENOTTY), always."""
        raise IommuError(errno.ENOTTY, "VFIO_IOMMU_DIRTY_PAGES: use Hwpt.set_dirty_tracking")


def _filled(header: bytes, items: list[bytes], room: int) -> bytes:
    """A capability of a user that has `room` bytes for it: items as far as they fit, the header if all do."""
    whole = len(header) + len(b"".join(items))
    data = bytearray((whole + 7) // 8 * 8)
    at = len(header)
    for item in items:
        if at + len(item) <= room:
            data[at : at + len(item)] = item
        at += len(item)
    if room >= whole:
        data[: len(header)] = header
    return bytes(data)


def _page_sizes(ioas: Ioas) -> int:
    """The page sizes of all HWPTs as a bitmap (iommufd_get_pagesizes)."""
    bitmap = _ALL_BITS
    for hwpt in ioas.hwpts:
        bitmap &= sum(hwpt.paging.page_sizes)
    if bitmap & (PAGE - 1):
        bitmap = bitmap & -PAGE | PAGE
    return max(bitmap, ioas.alignment)
