"""Messages of the vfio-user protocol, in the order of its specification.

Integers are in the host's byte order, which here is little-endian; sizes are in bytes.  Only the client uses the
structures of the commands that the shim serves (DMA_MAP, DMA_UNMAP, REGION_*).
"""

from __future__ import annotations

import enum

from construct import Array, Bytes, GreedyBytes, GreedyRange, Int16ul, Int32ul, Int64ul, Padding, Struct, this

# ---- Commands, Header ----------------------------------------------------------------------------


class Command(enum.IntEnum):
    """Section "Commands"; 14 is not assigned."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    REGION_WRITE_MULTI = 15
    DEVICE_FEATURE = 16
    MIG_DATA_READ = 17
    MIG_DATA_WRITE = 18


class HeaderFlags(enum.IntFlag):
    """Section "Header": the type is in the low four bits."""

    COMMAND = 0
    REPLY = 1
    TYPE = 15
    NO_REPLY = 16
    ERROR = 32


Header = Struct("id" / Int16ul, "command" / Int16ul, "size" / Int32ul, "flags" / Int32ul, "error" / Int32ul)
HEADER_SIZE: int = Header.sizeof()

# ---- VFIO_USER_VERSION ---------------------------------------------------------------------------

Version = Struct("major" / Int16ul, "minor" / Int16ul, "data" / GreedyBytes)

# ---- VFIO_USER_DMA_MAP, VFIO_USER_DMA_UNMAP ------------------------------------------------------


class DmaMapFlags(enum.IntFlag):
    """Flags of DMA_MAP."""

    READABLE = 1
    WRITEABLE = 2


DmaMap = Struct("argsz" / Int32ul, "flags" / Int32ul, "offset" / Int64ul, "address" / Int64ul, "size" / Int64ul)


class DmaUnmapFlags(enum.IntFlag):
    """Flags of DMA_UNMAP.  The specification defines none; ALL is Linux's VFIO_DMA_UNMAP_FLAG_ALL."""

    ALL = 2


DmaUnmap = Struct("argsz" / Int32ul, "flags" / Int32ul, "address" / Int64ul, "size" / Int64ul)

# ---- VFIO_USER_DEVICE_GET_INFO -------------------------------------------------------------------


class DeviceFlags(enum.IntFlag):
    """VFIO_DEVICE_FLAGS_*."""

    RESET = 1
    PCI = 2


DeviceInfo = Struct("argsz" / Int32ul, "flags" / Int32ul, "num_regions" / Int32ul, "num_irqs" / Int32ul)

# ---- VFIO_USER_DEVICE_GET_REGION_INFO ------------------------------------------------------------


class Region(enum.IntEnum):
    """VFIO_PCI_*_REGION_INDEX."""

    BAR0 = 0
    BAR1 = 1
    BAR2 = 2
    BAR3 = 3
    BAR4 = 4
    BAR5 = 5
    ROM = 6
    CONFIG = 7
    VGA = 8


class RegionFlags(enum.IntFlag):
    """VFIO_REGION_INFO_FLAG_*."""

    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


RegionInfoHead = Struct(
    "argsz" / Int32ul,
    "flags" / Int32ul,
    "index" / Int32ul,
    "cap_offset" / Int32ul,
    "size" / Int64ul,
    "offset" / Int64ul,
)

#: VFIO_REGION_INFO_CAP_SPARSE_MMAP.
CAP_SPARSE_MMAP = 1

CapHeader = Struct("id" / Int16ul, "version" / Int16ul, "next" / Int32ul)
SparseMmap = Struct(
    "nr_areas" / Int32ul,
    Padding(4),
    "areas" / Array(this.nr_areas, Struct("offset" / Int64ul, "size" / Int64ul)),
)

# ---- VFIO_USER_DEVICE_GET_REGION_IO_FDS ----------------------------------------------------------

RegionIoFds = Struct("argsz" / Int32ul, "flags" / Int32ul, "index" / Int32ul, "count" / Int32ul)

#: VFIO_USER_IO_FD_TYPE_IOEVENTFD.
IO_FD_TYPE_IOEVENTFD = 0
#: KVM_IOEVENTFD_FLAG_DATAMATCH.
IOEVENTFD_DATAMATCH = 1

SubRegion = Struct(
    "offset" / Int64ul,
    "size" / Int64ul,
    "fd_index" / Int32ul,
    "type" / Int32ul,
    "flags" / Int32ul,
    Padding(4),
    "datamatch" / Int64ul,
)

# ---- VFIO_USER_DEVICE_GET_IRQ_INFO ---------------------------------------------------------------


class Irq(enum.IntEnum):
    """VFIO_PCI_*_IRQ_INDEX."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class IrqFlags(enum.IntFlag):
    """VFIO_IRQ_INFO_*."""

    EVENTFD = 1
    MASKABLE = 2
    AUTOMASKED = 4
    NORESIZE = 8


IrqInfoWire = Struct("argsz" / Int32ul, "flags" / Int32ul, "index" / Int32ul, "count" / Int32ul)

# ---- VFIO_USER_DEVICE_SET_IRQS -------------------------------------------------------------------


class IrqSetFlags(enum.IntFlag):
    """VFIO_IRQ_SET_*: one DATA flag and one ACTION flag."""

    DATA_NONE = 1
    DATA_BOOL = 2
    DATA_EVENTFD = 4
    MASK = 8
    UNMASK = 16
    TRIGGER = 32


IrqSet = Struct(
    "argsz" / Int32ul,
    "flags" / Int32ul,
    "index" / Int32ul,
    "start" / Int32ul,
    "count" / Int32ul,
    "data" / GreedyBytes,
)

# ---- VFIO_USER_REGION_READ, _WRITE, VFIO_USER_DMA_READ, _WRITE, REGION_WRITE_MULTI ---------------

RegionAccess = Struct("offset" / Int64ul, "region" / Int32ul, "count" / Int32ul, "data" / GreedyBytes)
DmaAccess = Struct("address" / Int64ul, "count" / Int64ul, "data" / GreedyBytes)
WriteMulti = Struct(
    "wr_cnt" / Int64ul,
    "wrs" / GreedyRange(Struct("offset" / Int64ul, "region" / Int32ul, "count" / Int32ul, "data" / Bytes(8))),
)

# ---- VFIO_USER_DEVICE_FEATURE --------------------------------------------------------------------


class Feature(enum.IntEnum):
    """VFIO_DEVICE_FEATURE_*."""

    MIGRATION = 1
    MIG_DEVICE_STATE = 2
    DMA_LOGGING_START = 6
    DMA_LOGGING_STOP = 7
    DMA_LOGGING_REPORT = 8


class FeatureFlags(enum.IntFlag):
    """The method of DEVICE_FEATURE; the feature's index is in the low 16 bits."""

    GET = 1 << 16
    SET = 1 << 17
    PROBE = 1 << 18


FEATURE_MASK = 0xFFFF

DeviceFeature = Struct("argsz" / Int32ul, "flags" / Int32ul, "data" / GreedyBytes)


class MigrationFlags(enum.IntFlag):
    """VFIO_MIGRATION_*."""

    STOP_COPY = 1
    P2P = 2
    PRE_COPY = 4


Migration = Struct("flags" / Int64ul)


class DeviceState(enum.IntEnum):
    """enum vfio_device_mig_state; the P2P states are not used in vfio-user."""

    ERROR = 0
    STOP = 1
    RUNNING = 2
    STOP_COPY = 3
    RESUMING = 4
    RUNNING_P2P = 5
    PRE_COPY = 6
    PRE_COPY_P2P = 7


MigState = Struct("device_state" / Int32ul, "data_fd" / Int32ul)
DmaLoggingStart = Struct(
    "page_size" / Int64ul,
    "num_ranges" / Int32ul,
    "reserved" / Int32ul,
    "ranges" / GreedyRange(Struct("iova" / Int64ul, "length" / Int64ul)),
)
DmaLoggingReport = Struct("iova" / Int64ul, "length" / Int64ul, "page_size" / Int64ul)

# ---- VFIO_USER_MIG_DATA_READ, VFIO_USER_MIG_DATA_WRITE -------------------------------------------

MigData = Struct("argsz" / Int32ul, "size" / Int32ul, "data" / GreedyBytes)
