"""The handshake: section "VFIO_USER_VERSION".

Capabilities are a table: for each number, what a client may say, and what we answer.  Anything about the
handshake that is wrong ends the connection, after an error reply: a client that cannot say who it is would not
be understood later either.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vmodel.errors import PeerError
from vmodel.span import PAGE, MiB

#: Protocol version that we speak.
MAJOR, MINOR = 0, 0

#: The most that QEMU accepts of a server's limits.
MOST_MSG_FDS, MOST_XFER, MOST_DMA_MAPS = 16, 64 * MiB, 65535

_VERSION = struct.Struct("<HH")


class HandshakeError(PeerError):
    """The handshake failed: an error reply, and the connection ends."""


@dataclass(frozen=True)
class Limits:
    """What this server takes; sizes in bytes."""

    max_msg_fds: int = MOST_MSG_FDS
    max_data_xfer_size: int = 1 * MiB
    max_dma_maps: int = MOST_DMA_MAPS
    #: Whether to set up a twin socket with a client that can.
    twin_socket: bool = True
    #: Seconds that a client has for its VERSION, from when it connects.
    handshake_timeout: float = 5.0
    #: Seconds that it has to take what we send, and to answer a DMA_READ or DMA_WRITE.
    message_timeout: float = 5.0


@dataclass(frozen=True)
class Negotiated:
    """What the client said of itself, or the specification's defaults; sizes in bytes."""

    max_msg_fds: int = 1
    max_data_xfer_size: int = 1 * MiB
    max_dma_maps: int = MOST_DMA_MAPS
    pgsizes: int = PAGE
    write_multiple: bool = False
    #: Our commands go over a twin socket: the client can, and so can we.
    twin: bool = False


@dataclass(frozen=True)
class _Number:
    """A capability that is a number: what a client may say (least..most), and our answer to it."""

    least: int
    most: int
    answer: Callable[[Limits, int], int]


def _pgsizes(limits: Limits, theirs: int) -> int:
    # Windows are made of 4 KiB pages.  A client whose pages are all larger sends such windows as well.
    common = PAGE if theirs & PAGE else theirs & -PAGE
    if not common:
        raise HandshakeError(errno.EINVAL, f"pgsizes {theirs:#x}: none of 4 KiB or more")
    return common


#: "The capability list must be a subset of those proposed": no value above the client's own either, which QEMU
#: would refuse.
_NUMBERS: Mapping[str, _Number] = {
    "max_msg_fds": _Number(0, (1 << 31) - 1, lambda ours, n: min(ours.max_msg_fds, MOST_MSG_FDS, n)),
    "max_data_xfer_size": _Number(1, (1 << 32) - 1, lambda ours, n: min(ours.max_data_xfer_size, MOST_XFER, n)),
    "max_dma_maps": _Number(0, (1 << 64) - 1, lambda ours, n: min(ours.max_dma_maps, MOST_DMA_MAPS, n)),
    "pgsizes": _Number(1, (1 << 64) - 1, _pgsizes),
}


@dataclass(frozen=True)
class Proposal:
    """A well-formed VERSION request."""

    minor: int
    #: Only capabilities that we know, each of the right type.
    numbers: Mapping[str, int]
    write_multiple: bool
    twin: bool

    @classmethod
    def parse(cls, payload: bytes) -> Proposal:
        """HandshakeError(EINVAL): too short, another major version, or version data that are not as they should."""
        if len(payload) < _VERSION.size:
            raise HandshakeError(errno.EINVAL, "VERSION without a version")
        major, minor = _VERSION.unpack_from(payload)
        if major != MAJOR:
            raise HandshakeError(errno.EINVAL, f"protocol version {major}.{minor}, not {MAJOR}.x")
        offered = _capabilities(payload[_VERSION.size :])
        return cls(
            minor,
            {key: _number(key, offered[key]) for key in _NUMBERS if key in offered},
            _boolean(offered, "write_multiple"),
            _boolean(_object(offered, "twin_socket"), "supported"),
        )

    def negotiate(self, limits: Limits) -> Negotiated:
        """What holds from now on.  Twin sockets need a client that takes at least one fd."""
        numbers: dict[str, Any] = dict(self.numbers)
        said = Negotiated(**numbers, write_multiple=self.write_multiple)
        return dataclasses.replace(said, twin=self.twin and limits.twin_socket and said.max_msg_fds > 0)

    def reply(self, limits: Limits, twin_index: int | None) -> bytes:
        """The reply's payload; `twin_index`: where the twin socket is among its fds, None without one.

        HandshakeError(EINVAL): there is nothing that both sides can do.
        """
        answer: dict[str, Any] = {key: _NUMBERS[key].answer(limits, value) for key, value in self.numbers.items()}
        if self.write_multiple:
            answer["write_multiple"] = True
        if twin_index is not None:
            answer["twin_socket"] = {"supported": True, "fd_index": twin_index}
        # Without spaces: QEMU takes no reply that is longer than its request.
        text = json.dumps({"capabilities": answer}, separators=(",", ":")).encode()
        return _VERSION.pack(MAJOR, min(self.minor, MINOR)) + text + b"\0"


def _capabilities(data: bytes) -> dict[str, Any]:
    """The capabilities object of the optional version data."""
    if not data:
        return {}
    if data[-1:] != b"\0":
        raise HandshakeError(errno.EINVAL, "version data without its NUL")
    try:
        parsed = json.loads(data[:-1].decode())
    except (ValueError, RecursionError) as error:
        raise HandshakeError(errno.EINVAL, "version data is no JSON") from error
    if not isinstance(parsed, dict):
        raise HandshakeError(errno.EINVAL, "version data is no object")
    return _object(parsed, "capabilities")


def _object(parent: dict[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key, {})
    if not isinstance(value, dict):
        raise HandshakeError(errno.EINVAL, f"{key} is no object")
    return value


def _boolean(parent: dict[str, Any], key: str) -> bool:
    value = parent.get(key, False)
    if not isinstance(value, bool):
        raise HandshakeError(errno.EINVAL, f"{key} is no boolean")
    return value


def _number(key: str, value: object) -> int:
    limit = _NUMBERS[key]
    if not isinstance(value, int) or isinstance(value, bool) or not limit.least <= value <= limit.most:
        raise HandshakeError(errno.EINVAL, f"{key} is no number from {limit.least} to {limit.most}")
    return value
