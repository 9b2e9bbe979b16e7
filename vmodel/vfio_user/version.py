"""The handshake: section "VFIO_USER_VERSION".

The table `_NUMBERS` has, for each numeric capability, the values that a client may propose and the server's answer.
Any mistake in the handshake is answered by an error reply, and then the connection ends: client and server might
understand later messages differently.
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

#: The server's protocol version.
MAJOR, MINOR = 0, 0

#: The largest limits of a server that QEMU accepts.
MOST_MSG_FDS, MOST_XFER, MOST_DMA_MAPS = 16, 64 * MiB, 65535

_VERSION = struct.Struct("<HH")


class HandshakeError(PeerError):
    """The handshake failed: the connection ends after an error reply."""


@dataclass(frozen=True)
class Limits:
    """The server's limits; sizes in bytes, times in seconds."""

    max_msg_fds: int = MOST_MSG_FDS
    max_data_xfer_size: int = 1 * MiB
    max_dma_maps: int = MOST_DMA_MAPS
    #: Whether to set up a twin socket with a client that supports it.
    twin_socket: bool = True
    #: Time from connecting until a client has to have sent its VERSION.
    handshake_timeout: float = 5.0
    #: Time in which a client has to receive a message, and to answer a DMA_READ or DMA_WRITE.
    message_timeout: float = 5.0


@dataclass(frozen=True)
class Negotiated:
    """The client's capabilities, with the specification's defaults for those that it left out; sizes in bytes."""

    max_msg_fds: int = 1
    max_data_xfer_size: int = 1 * MiB
    max_dma_maps: int = MOST_DMA_MAPS
    pgsizes: int = PAGE
    write_multiple: bool = False
    #: Whether the server's commands go over a twin socket, as both sides support it.
    twin: bool = False


@dataclass(frozen=True)
class _Number:
    """A numeric capability: the values that a client may propose (least..most), and the server's answer."""

    least: int
    most: int
    answer: Callable[[Limits, int], int]


def _pgsizes(limits: Limits, theirs: int) -> int:
    # Windows consist of 4 KiB pages; windows of a client whose smallest page is larger do, too.
    common = PAGE if theirs & PAGE else theirs & -PAGE
    if not common:
        raise HandshakeError(errno.EINVAL, f"pgsizes {theirs:#x}: none of 4 KiB or more")
    return common


#: "The capability list must be a subset of those proposed".  An answer is never above the client's own value, which
#: QEMU would refuse.
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
    #: The known numeric capabilities that the client has proposed.
    numbers: Mapping[str, int]
    write_multiple: bool
    twin: bool

    @classmethod
    def parse(cls, payload: bytes) -> Proposal:
        """Parses VERSION.  HandshakeError(EINVAL): too short, another major version, or invalid version data."""
        if len(payload) < _VERSION.size:
            raise HandshakeError(errno.EINVAL, "VERSION is too short")
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
        """The result of the negotiation.  A twin socket needs a client that accepts at least one fd."""
        numbers: dict[str, Any] = dict(self.numbers)
        client = Negotiated(**numbers, write_multiple=self.write_multiple)
        return dataclasses.replace(client, twin=self.twin and limits.twin_socket and client.max_msg_fds > 0)

    def reply(self, limits: Limits, twin_index: int | None) -> bytes:
        """Builds the reply's payload; `twin_index`: the twin socket's index among its fds, None: there is none.

        HandshakeError(EINVAL): client and server have no page size in common.
        """
        answer: dict[str, Any] = {key: _NUMBERS[key].answer(limits, value) for key, value in self.numbers.items()}
        if self.write_multiple:
            answer["write_multiple"] = True
        if twin_index is not None:
            answer["twin_socket"] = {"supported": True, "fd_index": twin_index}
        # Without spaces, as QEMU refuses a reply that is longer than its request.
        text = json.dumps({"capabilities": answer}, separators=(",", ":")).encode()
        return _VERSION.pack(MAJOR, min(self.minor, MINOR)) + text + b"\0"


def _capabilities(data: bytes) -> dict[str, Any]:
    """The capabilities object of the optional version data."""
    if not data:
        return {}
    if data[-1:] != b"\0":
        raise HandshakeError(errno.EINVAL, "version data does not end with NUL")
    try:
        parsed = json.loads(data[:-1].decode())
    except (ValueError, RecursionError) as error:
        raise HandshakeError(errno.EINVAL, "version data is not JSON") from error
    if not isinstance(parsed, dict):
        raise HandshakeError(errno.EINVAL, "version data is not an object")
    return _object(parsed, "capabilities")


def _object(parent: dict[str, Any], key: str) -> dict[str, Any]:
    value = parent.get(key, {})
    if not isinstance(value, dict):
        raise HandshakeError(errno.EINVAL, f"{key} is not an object")
    return value


def _boolean(parent: dict[str, Any], key: str) -> bool:
    value = parent.get(key, False)
    if not isinstance(value, bool):
        raise HandshakeError(errno.EINVAL, f"{key} is not a boolean")
    return value


def _number(key: str, value: object) -> int:
    limit = _NUMBERS[key]
    if not isinstance(value, int) or isinstance(value, bool) or not limit.least <= value <= limit.most:
        raise HandshakeError(errno.EINVAL, f"{key} is not a number from {limit.least} to {limit.most}")
    return value
