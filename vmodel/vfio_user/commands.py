"""The server's commands, without I/O: payload and fds of a request in, payload and fds of the reply out.

DMA_MAP, DMA_UNMAP and the REGION accesses are not here: the shim serves them once the handshake is done.  An invalid
command raises `PeerError` with the errno of its header-only error reply.  The specification names few errnos; the
others are those of Linux's VFIO and of libvfio-user:

======= =============================================================================================
EINVAL  malformed: wrong size, flags, index, state or order; DMA_READ and DMA_WRITE, which a server sends
ENOTTY  an unknown feature (as Linux; libvfio-user gives EINVAL)
ENOTSUP an unknown command (libvfio-user gives EINVAL, the same as for a malformed command)
EBUSY   DMA logging is on already
ENOSPC  more data or fds than one side accepts
======= =============================================================================================

Clients such as SPDK send the whole buffer of an ioctl that has an `argsz`.  So such a request may be as long as its
argsz; bytes after the structure are ignored.  Fds are closed if the command takes none.
"""

from __future__ import annotations

import dataclasses
import enum
import errno
import os
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from construct import ConstructError

from vmodel.errors import PeerError
from vmodel.span import PAGE, Span
from vmodel.vfio_user import wire
from vmodel.vfio_user.migration import Migration, Saved
from vmodel.vfio_user.version import HandshakeError, Limits, Negotiated, Proposal
from vmodel.vfio_user.wire import Command, DeviceFlags, DeviceState, Feature, FeatureFlags, IrqFlags, IrqSetFlags

__all__ = [
    "Backend",
    "DirtyLog",
    "FdList",
    "HandshakeError",
    "IoEventFd",
    "IrqAction",
    "IrqInfo",
    "Limits",
    "Negotiated",
    "RegionInfo",
    "Reply",
    "Session",
    "SetIrqs",
]


@dataclass(frozen=True)
class RegionInfo:
    """A region as the client sees it; size 0: there is no such region.  `mmap_areas` are offsets in the region."""

    size: int
    readable: bool = True
    writable: bool = True
    mmap_fd: int | None = None
    mmap_areas: tuple[Span, ...] = ()


@dataclass(frozen=True)
class IrqInfo:
    """An interrupt type: `count` of its vectors, and flags."""

    count: int
    flags: IrqFlags = IrqFlags.EVENTFD


class IrqAction(enum.Enum):
    """The action of SET_IRQS."""

    MASK = enum.auto()
    UNMASK = enum.auto()
    TRIGGER = enum.auto()


@dataclass(frozen=True)
class SetIrqs:
    """A well-formed SET_IRQS for vectors `start`..`start + count - 1` of type `index`.

    `data`: None (DATA_NONE), a byte for each bool, or eventfds, where -1 removes the vector's eventfd.  `count` 0
    disables the whole type.
    """

    index: int
    action: IrqAction
    start: int
    count: int
    data: bytes | tuple[int, ...] | None


@dataclass(frozen=True)
class IoEventFd:
    """A register that the client may signal by an eventfd instead of a write."""

    offset: int
    size: int
    fd: int
    datamatch: int | None = None


class DirtyLog(Protocol):
    """What DMA logging needs of guest memory; OSError as in vmshim.h."""

    def dirty_start(self, spans: Sequence[Span]) -> None: ...
    def dirty_stop(self) -> None: ...
    def dirty_report(self, span: Span, page_size: int) -> bytes: ...


class Backend(Saved, Protocol):
    """What a connection needs of a device."""

    @property
    def region_infos(self) -> Sequence[RegionInfo]:
        """All regions, by VFIO region index."""

    @property
    def memory(self) -> DirtyLog:
        """The guest memory that DMA logging is about."""

    def irq_info(self, index: int) -> IrqInfo:
        """The interrupt type `index` of wire.Irq, 0 to 4."""

    def set_irqs(self, request: SetIrqs) -> None:
        """Carries out SET_IRQS; owns the eventfds if it returns.  PeerError."""

    def reset_device(self) -> None:
        """Carries out DEVICE_RESET."""

    def io_event_fds(self, region: int) -> Sequence[IoEventFd]:
        """The registers of a region that the client may write by an eventfd; the device keeps the eventfds."""


class FdList:
    """The fds of a message; `close` closes those that were not taken."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def take(self) -> tuple[int, ...]:
        """Returns all fds; the caller owns them from now on."""
        taken, self._fds = tuple(self._fds), []
        return taken

    def close(self) -> None:
        """Closes the fds that were not taken."""
        for fd in self.take():
            os.close(fd)


@dataclass(frozen=True)
class Reply:
    """A success reply.  `fds` stay open, except those in `temporary`, which are closed once the reply was sent."""

    payload: bytes = b""
    fds: tuple[int, ...] = ()
    temporary: tuple[int, ...] = ()


def _invalid(message: str) -> PeerError:
    return PeerError(errno.EINVAL, message)


def _parse(structure: Any, payload: bytes) -> Any:
    """Parses `payload` as `structure`.  EINVAL: it is too short.  The caller checks for extra bytes."""
    try:
        return structure.parse(payload)
    except ConstructError as error:
        raise _invalid(f"payload of {len(payload)} bytes is too short") from error


def _parse_exactly(structure: Any, payload: bytes) -> Any:
    if len(payload) != structure.sizeof():
        raise _invalid(f"payload of {len(payload)} bytes, not {structure.sizeof()}")
    return structure.parse(payload)


def _parse_query(structure: Any, payload: bytes) -> Any:
    """Parses a request that is answered by the same structure.

    EINVAL: argsz is smaller than the structure, or the payload is longer than argsz.
    """
    parsed = _parse(structure, payload)
    if parsed.argsz < structure.sizeof() or len(payload) > parsed.argsz:
        raise _invalid(f"argsz {parsed.argsz}, payload of {len(payload)} bytes")
    return parsed


class Session:
    """The protocol state of one connection."""

    def __init__(self, device: Backend, limits: Limits | None = None) -> None:
        self.device = device
        self.limits = limits or Limits()
        self.migration = Migration(device)
        #: Set by a successful VERSION.
        self.negotiated: Negotiated | None = None
        self._twin: socket.socket | None = None
        self._logging = False
        self._commands: dict[int, Callable[[bytes, FdList], Reply]] = {
            Command.DEVICE_GET_INFO: self._get_info,
            Command.DEVICE_GET_REGION_INFO: self._get_region_info,
            Command.DEVICE_GET_REGION_IO_FDS: self._get_region_io_fds,
            Command.DEVICE_GET_IRQ_INFO: self._get_irq_info,
            Command.DEVICE_SET_IRQS: self._set_irqs,
            Command.DEVICE_RESET: self._reset,
            Command.DEVICE_FEATURE: self._feature,
            Command.MIG_DATA_READ: self._mig_data_read,
            Command.MIG_DATA_WRITE: self._mig_data_write,
        }
        self._features: dict[int, dict[FeatureFlags, Callable[[bytes, int], bytes]]] = {
            Feature.MIGRATION: {FeatureFlags.GET: self._get_migration},
            Feature.MIG_DEVICE_STATE: {FeatureFlags.GET: self._get_state, FeatureFlags.SET: self._set_state},
            Feature.DMA_LOGGING_START: {FeatureFlags.SET: self._logging_start},
            Feature.DMA_LOGGING_STOP: {FeatureFlags.SET: self._logging_stop},
            Feature.DMA_LOGGING_REPORT: {FeatureFlags.GET: self._logging_report},
        }

    def handle(self, command: int, payload: bytes, fds: FdList) -> Reply:
        """Carries out a command; takes the fds that it uses out of `fds`.

        PeerError: the command is invalid; HandshakeError: the connection has to end as well.
        """
        if self.negotiated is None:
            if command != Command.VERSION:
                raise HandshakeError(errno.EINVAL, f"command {command} before VERSION")
            return self._version(payload)
        if command == Command.VERSION:
            raise _invalid("VERSION twice")
        if command in (Command.DMA_READ, Command.DMA_WRITE):
            raise _invalid(f"command {command} goes from server to client")
        handler = self._commands.get(command)
        if handler is None:
            raise PeerError(errno.ENOTSUP, f"unknown command {command}")
        if len(fds) and command != Command.DEVICE_SET_IRQS:
            fds.close()  # they are ignored: the command is valid all the same
        return handler(payload, fds)

    def take_twin(self) -> int:
        """Returns the server's end of the twin socket, -1: there is none.  The caller owns it from now on."""
        if self._twin is None:
            return -1
        twin, self._twin = self._twin, None
        return twin.detach()

    def close(self) -> None:
        """Ends the session after the client has disconnected: twin socket, DMA logging and migration."""
        if self._twin is not None:
            self._twin.close()
            self._twin = None
        if self._logging:
            self.device.memory.dirty_stop()
            self._logging = False
        if self.migration.state is DeviceState.ERROR:
            self.device.reset_device()  # the next client could not know that the device needs a reset
        self.migration.reset()

    # ---- VERSION ----------------------------------------------------------------------------

    def _version(self, payload: bytes) -> Reply:
        proposal = Proposal.parse(payload)
        negotiated = proposal.negotiate(self.limits)
        fds: tuple[int, ...] = ()
        if negotiated.twin:
            try:
                self._twin, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
                fds = (theirs.detach(),)
            except OSError:  # out of fds.  "The server may optionally set up a separate command channel"
                negotiated = dataclasses.replace(negotiated, twin=False)
        try:
            text = proposal.reply(self.limits, 0 if fds else None)
        except HandshakeError:
            for fd in fds:
                os.close(fd)
            self.close()
            raise
        self.negotiated = negotiated
        return Reply(text, fds, temporary=fds)

    # ---- information ------------------------------------------------------------------------

    def _get_info(self, payload: bytes, fds: FdList) -> Reply:
        _parse_query(wire.DeviceInfo, payload)
        info = {
            "argsz": wire.DeviceInfo.sizeof(),
            "flags": DeviceFlags.RESET | DeviceFlags.PCI,
            "num_regions": len(self.device.region_infos),
            "num_irqs": len(wire.Irq),
        }
        return Reply(wire.DeviceInfo.build(info))

    def _region(self, index: int) -> RegionInfo:
        if index >= len(self.device.region_infos):
            raise _invalid(f"region {index}")
        return self.device.region_infos[index]

    def _get_region_info(self, payload: bytes, fds: FdList) -> Reply:
        head = wire.RegionInfoHead.sizeof()
        request = _parse_query(wire.RegionInfoHead, payload)
        region = self._region(request.index)
        flags = wire.RegionFlags(0)
        if region.size:
            flags |= wire.RegionFlags.READ if region.readable else 0
            flags |= wire.RegionFlags.WRITE if region.writable else 0
        capabilities = b""
        reply_fds: tuple[int, ...] = ()
        takes_fds = self.negotiated is None or self.negotiated.max_msg_fds > 0
        if region.mmap_fd is not None and takes_fds:
            flags |= wire.RegionFlags.MMAP
            reply_fds = (region.mmap_fd,)
            if region.mmap_areas != (Span.sized(0, region.size),):
                flags |= wire.RegionFlags.CAPS
                areas = [{"offset": area.start, "size": area.size} for area in region.mmap_areas]
                capabilities = wire.CapHeader.build({"id": wire.CAP_SPARSE_MMAP, "version": 1, "next": 0})
                capabilities += wire.SparseMmap.build({"nr_areas": len(areas), "areas": areas})
        info = {
            "argsz": head + len(capabilities),
            "flags": flags,
            "index": request.index,
            # Set even if the list does not fit: QEMU checks it before it sends the request again.
            "cap_offset": head if capabilities else 0,
            "size": region.size,
            "offset": 0,
        }
        body = wire.RegionInfoHead.build(info)
        if request.argsz >= head + len(capabilities):
            body += capabilities
        return Reply(body, reply_fds)

    def _get_region_io_fds(self, payload: bytes, fds: FdList) -> Reply:
        head, entry = wire.RegionIoFds.sizeof(), wire.SubRegion.sizeof()
        request = _parse_query(wire.RegionIoFds, payload)
        if request.flags or request.count:
            raise _invalid(f"flags {request.flags:#x}, count {request.count}")
        self._region(request.index)
        events = self.device.io_event_fds(request.index)
        info = {"argsz": head + entry * len(events), "flags": 0, "index": request.index, "count": len(events)}
        body = wire.RegionIoFds.build(info)
        if not events or request.argsz < info["argsz"]:
            return Reply(body)
        distinct = tuple(dict.fromkeys(event.fd for event in events))
        negotiated = self.negotiated
        if negotiated is not None and len(distinct) > negotiated.max_msg_fds:
            raise PeerError(errno.ENOSPC, f"{len(distinct)} fds, the client accepts {negotiated.max_msg_fds}")
        for event in events:
            body += wire.SubRegion.build(
                {
                    "offset": event.offset,
                    "size": event.size,
                    "fd_index": distinct.index(event.fd),
                    "type": wire.IO_FD_TYPE_IOEVENTFD,
                    "flags": 0 if event.datamatch is None else wire.IOEVENTFD_DATAMATCH,
                    "datamatch": event.datamatch or 0,
                }
            )
        return Reply(body, distinct)

    # ---- interrupts -------------------------------------------------------------------------

    def _irq(self, index: int) -> IrqInfo:
        if index >= len(wire.Irq):
            raise _invalid(f"interrupt type {index}")
        return self.device.irq_info(index)

    def _get_irq_info(self, payload: bytes, fds: FdList) -> Reply:
        size = wire.IrqInfoWire.sizeof()
        request = _parse_query(wire.IrqInfoWire, payload)
        info = self._irq(request.index)
        return Reply(
            wire.IrqInfoWire.build({"argsz": size, "flags": info.flags, "index": request.index, "count": info.count})
        )

    def _set_irqs(self, payload: bytes, fds: FdList) -> Reply:
        request = _parse(wire.IrqSet, payload)
        if request.argsz < len(payload):
            raise _invalid(f"argsz {request.argsz}, payload of {len(payload)} bytes")
        if request.flags not in _SET_IRQS:
            raise _invalid(f"flags {request.flags:#x}: one DATA and one ACTION flag each")
        kind, action = _SET_IRQS[request.flags]
        info = self._irq(request.index)
        start, count = request.start, request.count
        if start >= info.count or count > info.count - start:
            raise _invalid(f"vectors {start}+{count} of {info.count}")
        if action is not IrqAction.TRIGGER and not info.flags & IrqFlags.MASKABLE:
            raise _invalid(f"interrupt type {request.index} cannot be masked")
        data: bytes | tuple[int, ...] | None = None
        if kind is IrqSetFlags.DATA_BOOL:
            data = request.data
            if len(data) != count:
                raise _invalid(f"{len(data)} bools for {count} vectors")
        elif request.data:
            raise _invalid("data without DATA_BOOL")
        if kind is IrqSetFlags.DATA_EVENTFD:
            if len(fds) not in (0, count):
                raise _invalid(f"{len(fds)} eventfds for {count} vectors")
            data = fds.take() if len(fds) else (-1,) * count
        elif len(fds):
            raise _invalid("fds without DATA_EVENTFD")
        if not count and (data is not None or start or action is not IrqAction.TRIGGER):
            _close(data)
            raise _invalid("no vectors")
        try:
            self.device.set_irqs(SetIrqs(request.index, action, start, count, data))
        except BaseException:
            _close(data)
            raise
        return Reply()

    # ---- reset and features -----------------------------------------------------------------

    def _reset(self, payload: bytes, fds: FdList) -> Reply:
        if payload:
            raise _invalid("DEVICE_RESET with a payload")
        self.device.reset_device()
        self.migration.reset()
        return Reply()

    def _feature(self, payload: bytes, fds: FdList) -> Reply:
        request = _parse(wire.DeviceFeature, payload)
        feature, flags = request.flags & wire.FEATURE_MASK, request.flags & ~wire.FEATURE_MASK
        if request.argsz < _FEATURE_HEAD or flags & ~_FEATURE_METHODS or not flags:
            raise _invalid(f"argsz {request.argsz}, flags {request.flags:#x}")
        methods = self._features.get(feature)
        if methods is None:
            raise PeerError(errno.ENOTTY, f"feature {feature}")
        wanted = [flag for flag in (FeatureFlags.GET, FeatureFlags.SET) if flags & flag]
        if not set(wanted) <= methods.keys():
            raise _invalid(f"feature {feature} has no such method")
        # "The reply payload must be the same as the request payload for setting or probing a feature": it has to fit.
        if wanted != [FeatureFlags.GET] and len(payload) > request.argsz:
            raise _invalid(f"argsz {request.argsz}, payload of {len(payload)} bytes")
        if flags & FeatureFlags.PROBE:
            return Reply(payload)
        if len(wanted) != 1:
            raise _invalid("GET and SET at once")
        try:
            data = methods[wanted[0]](request.data, request.argsz - _FEATURE_HEAD)
        except OSError as error:  # raised by the dirty log
            raise PeerError(error.errno or errno.EINVAL, str(error)) from error
        argsz = request.argsz if wanted == [FeatureFlags.SET] else _FEATURE_HEAD + len(data)
        return Reply(wire.DeviceFeature.build({"argsz": argsz, "flags": request.flags, "data": data}))

    def _get_migration(self, data: bytes, room: int) -> bytes:
        return _fitting(wire.Migration.build({"flags": wire.MigrationFlags.STOP_COPY}), room)

    def _get_state(self, data: bytes, room: int) -> bytes:
        return _fitting(wire.MigState.build({"device_state": self.migration.state, "data_fd": 0}), room)

    def _set_state(self, data: bytes, room: int) -> bytes:
        request = _parse_exactly(wire.MigState, data)
        try:
            goal = DeviceState(request.device_state)
        except ValueError as error:
            raise _invalid(f"device state {request.device_state}") from error
        self.migration.move(goal)
        return data

    def _logging_ranges(self, data: bytes) -> list[Span]:
        request = _parse(wire.DmaLoggingStart, data)
        if len(data) != 16 + 16 * request.num_ranges or request.reserved:
            raise _invalid(f"{len(data)} bytes for {request.num_ranges} ranges")
        spans = []
        for entry in request.ranges:
            if not entry.length:
                raise _invalid("an empty range")
            if entry.iova + entry.length > 1 << 64:
                raise PeerError(errno.EOVERFLOW, f"range {entry.iova:#x}+{entry.length:#x} wraps")
            spans.append(Span.sized(entry.iova, entry.length))
        return spans

    def _logging_start(self, data: bytes, room: int) -> bytes:
        self.device.memory.dirty_start(self._logging_ranges(data))
        self._logging = True
        # The requested page size is a hint; the reply names the one in use.
        return struct.pack("<Q", PAGE) + data[8:]

    def _logging_stop(self, data: bytes, room: int) -> bytes:
        # The specification gives START and STOP the same structure, Linux takes no data for STOP: both are accepted,
        # and the ranges are ignored.
        if data:
            self._logging_ranges(data)
        self.device.memory.dirty_stop()
        self._logging = False
        return data

    def _logging_report(self, data: bytes, room: int) -> bytes:
        request = _parse_exactly(wire.DmaLoggingReport, data)
        page = request.page_size
        if page < PAGE or page & (page - 1) or request.iova % page or request.length % page or not request.length:
            raise _invalid(f"length {request.length:#x} in pages of {page:#x}")
        if request.iova + request.length > 1 << 64:
            raise PeerError(errno.EOVERFLOW, "the range wraps")
        # Checked before the log is read, as reading clears it.
        size = (request.length // page + 63) // 64 * 8
        if len(data) + size > min(room, self._transfer):
            raise _invalid(f"a bitmap of {size} bytes does not fit")
        return data + self.device.memory.dirty_report(Span.sized(request.iova, request.length), page)

    # ---- migration data ---------------------------------------------------------------------

    @property
    def _transfer(self) -> int:
        """Most bytes of data in one reply."""
        peer = self.negotiated.max_data_xfer_size if self.negotiated else self.limits.max_data_xfer_size
        return min(peer, self.limits.max_data_xfer_size)

    def _mig_data_read(self, payload: bytes, fds: FdList) -> Reply:
        request, head = _parse(wire.MigData, payload), _MIG_DATA_HEAD
        if request.data or request.size > self._transfer or request.argsz < head + request.size:
            raise _invalid(f"MIG_DATA_READ of {request.size} bytes, argsz {request.argsz}")
        data = self.migration.read(request.size)
        return Reply(wire.MigData.build({"argsz": head + len(data), "size": len(data), "data": data}))

    def _mig_data_write(self, payload: bytes, fds: FdList) -> Reply:
        request = _parse(wire.MigData, payload)
        if len(request.data) != request.size or request.size > self.limits.max_data_xfer_size:
            raise _invalid(f"MIG_DATA_WRITE of {request.size} bytes with {len(request.data)}")
        # argsz is "the maximum size of the reply payload".  The reply has no payload, so any value is valid.
        self.migration.write(request.data)
        return Reply()


#: The valid flags of SET_IRQS, one DATA and one ACTION flag each, and their meaning.
_SET_IRQS = {
    int(data | flag): (data, action)
    for data in (IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, IrqSetFlags.DATA_EVENTFD)
    for flag, action in (
        (IrqSetFlags.MASK, IrqAction.MASK),
        (IrqSetFlags.UNMASK, IrqAction.UNMASK),
        (IrqSetFlags.TRIGGER, IrqAction.TRIGGER),
    )
}

#: Bytes before the data in DEVICE_FEATURE and in MIG_DATA_*.
_FEATURE_HEAD = _MIG_DATA_HEAD = 8
_FEATURE_METHODS = int(FeatureFlags.GET | FeatureFlags.SET | FeatureFlags.PROBE)


def _close(data: bytes | tuple[int, ...] | None) -> None:
    for fd in data if isinstance(data, tuple) else ():
        if fd >= 0:
            os.close(fd)


def _fitting(data: bytes, room: int) -> bytes:
    if len(data) > room:
        raise _invalid(f"{len(data)} bytes of data do not fit into argsz")
    return data
