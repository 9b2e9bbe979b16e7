"""What the server does for each command: payload and fds in, payload and fds out, no I/O.

DMA_MAP, DMA_UNMAP and the REGION accesses are served in the shim once the handshake is done, so they are not
here.  A command that is wrong raises `PeerError` with the errno for its header-only error reply.  The
specification names hardly any; where it does not, Linux's VFIO and libvfio-user decide:

======= ==================================================================================================
EINVAL  malformed: wrong size, flags, index, state or order; DMA_READ and DMA_WRITE, which are ours to send
ENOTTY  a feature that is not there (Linux; libvfio-user says EINVAL)
ENOTSUP a command that is none (libvfio-user says EINVAL, which would not tell it from a malformed one)
EBUSY   DMA logging is on already
ENOSPC  more data or fds than one side takes
======= ==================================================================================================

Where the ioctl has an `argsz`, real clients send its whole buffer (SPDK does): such a request may be as long as
its argsz, and what follows the structure means nothing.  Fds with a command that takes none are closed.
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
    """A region as the client sees it; size 0: not there.  `mmap_areas` count from the region's start."""

    size: int
    readable: bool = True
    writable: bool = True
    mmap_fd: int | None = None
    mmap_areas: tuple[Span, ...] = ()


@dataclass(frozen=True)
class IrqInfo:
    """An interrupt type: how many, and IrqFlags."""

    count: int
    flags: IrqFlags = IrqFlags.EVENTFD


class IrqAction(enum.Enum):
    """What SET_IRQS does."""

    MASK = enum.auto()
    UNMASK = enum.auto()
    TRIGGER = enum.auto()


@dataclass(frozen=True)
class SetIrqs:
    """A well-formed SET_IRQS for vectors `start`..`start + count - 1` of type `index`.

    `data`: None, bools as bytes, or eventfds; -1 stands for "take away".  count 0: disable the whole type.
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
    """Guest memory, as far as DMA logging needs it; OSError as in vmshim.h."""

    def dirty_start(self, spans: Sequence[Span]) -> None: ...
    def dirty_stop(self) -> None: ...
    def dirty_report(self, span: Span, page_size: int) -> bytes: ...


class Backend(Saved, Protocol):
    """What a connection needs of a device."""

    @property
    def region_infos(self) -> Sequence[RegionInfo]:
        """By VFIO region index."""

    @property
    def memory(self) -> DirtyLog: ...

    def irq_info(self, index: int) -> IrqInfo:
        """For index 0..4 of wire.Irq."""

    def set_irqs(self, request: SetIrqs) -> None:
        """Takes the eventfds over if it returns."""

    def reset_device(self) -> None:
        """DEVICE_RESET."""

    def io_event_fds(self, region: int) -> Sequence[IoEventFd]: ...


class FdList:
    """The fds that came with a message; what nobody takes is closed."""

    def __init__(self, fds: Sequence[int]) -> None:
        self._fds = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def take(self) -> tuple[int, ...]:
        """All of them; now the caller's."""
        taken, self._fds = tuple(self._fds), []
        return taken

    def close(self) -> None:
        """Closes what was not taken."""
        for fd in self.take():
            os.close(fd)


@dataclass(frozen=True)
class Reply:
    """A success reply; `fds` stay the device's, but for those in `temporary`, to be closed once sent."""

    payload: bytes = b""
    fds: tuple[int, ...] = ()
    temporary: tuple[int, ...] = ()


def _invalid(message: str) -> PeerError:
    return PeerError(errno.EINVAL, message)


def _parse(structure: Any, payload: bytes) -> Any:
    """`payload` as `structure`; EINVAL when it is too short.  What is too long is for the caller to judge."""
    try:
        return structure.parse(payload)
    except ConstructError as error:
        raise _invalid(f"payload of {len(payload)} bytes is too short") from error


def _parse_exactly(structure: Any, payload: bytes) -> Any:
    if len(payload) != structure.sizeof():
        raise _invalid(f"payload of {len(payload)} bytes, not {structure.sizeof()}")
    return structure.parse(payload)


def _parse_query(structure: Any, payload: bytes) -> Any:
    """A request that asks for a structure of the same form: argsz has room for it, and is not exceeded."""
    parsed = _parse(structure, payload)
    if parsed.argsz < structure.sizeof() or len(payload) > parsed.argsz:
        raise _invalid(f"argsz {parsed.argsz}, payload of {len(payload)} bytes")
    return parsed


class Session:
    """One connection's state."""

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
        """Carries a command out.

        Raises PeerError for what is wrong with it, HandshakeError when the connection cannot go on.
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
            fds.close()  # they mean nothing here, but do not make the command wrong
        return handler(payload, fds)

    def take_twin(self) -> int:
        """Our end of the twin socket, now the caller's; -1 without one."""
        if self._twin is None:
            return -1
        twin, self._twin = self._twin, None
        return twin.detach()

    def close(self) -> None:
        """The client is gone: what the session has set up ends with it."""
        if self._twin is not None:
            self._twin.close()
            self._twin = None
        if self._logging:
            self.device.memory.dirty_stop()
            self._logging = False
        if self.migration.state is DeviceState.ERROR:
            self.device.reset_device()  # the next client would not know that it has to
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
            except OSError:  # out of fds: "the server may optionally set up a separate command channel"
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
            # Also when the list does not fit: QEMU checks it before it asks again.
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
            raise PeerError(errno.ENOSPC, f"{len(distinct)} fds, the client takes {negotiated.max_msg_fds}")
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
            raise _invalid("data, but not DATA_BOOL")
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
        # "The reply payload must be the same as the request payload for setting or probing a feature."
        if wanted != [FeatureFlags.GET] and len(payload) > request.argsz:
            raise _invalid(f"argsz {request.argsz}, payload of {len(payload)} bytes")
        if flags & FeatureFlags.PROBE:
            return Reply(payload)
        if len(wanted) != 1:
            raise _invalid("GET and SET at once")
        try:
            data = methods[wanted[0]](request.data, request.argsz - _FEATURE_HEAD)
        except OSError as error:  # of the dirty log
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
        # The page size is a hint; ours is always the smallest.
        return struct.pack("<Q", PAGE) + data[8:]

    def _logging_stop(self, data: bytes, room: int) -> bytes:
        # The text gives START and STOP one structure, which means nothing here; Linux takes no data.
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
        # Before the log is read, which clears it.
        size = (request.length // page + 63) // 64 * 8
        if len(data) + size > min(room, self._transfer):
            raise _invalid(f"a bitmap of {size} bytes does not fit")
        return data + self.device.memory.dirty_report(Span.sized(request.iova, request.length), page)

    # ---- migration data ---------------------------------------------------------------------

    @property
    def _transfer(self) -> int:
        """Most data in one reply, in bytes."""
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
        # argsz is "the maximum size of the reply payload", and there is none: any value will do.
        self.migration.write(request.data)
        return Reply()


#: The legal flags of SET_IRQS: one of each kind.
_SET_IRQS = {
    int(data | flag): (data, action)
    for data in (IrqSetFlags.DATA_NONE, IrqSetFlags.DATA_BOOL, IrqSetFlags.DATA_EVENTFD)
    for flag, action in (
        (IrqSetFlags.MASK, IrqAction.MASK),
        (IrqSetFlags.UNMASK, IrqAction.UNMASK),
        (IrqSetFlags.TRIGGER, IrqAction.TRIGGER),
    )
}

#: Bytes of DEVICE_FEATURE, and of MIG_DATA_*, before their data.
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
