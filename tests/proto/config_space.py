"""Config space as a client reads it."""

from __future__ import annotations

from vmodel.vfio_user.client import Client
from vmodel.vfio_user.wire import Region


def capability(client: Client, wanted: int) -> int:
    """Where a capability is; also checks that the list has an end."""
    at, seen = client.region_read(Region.CONFIG, 0x34, 1)[0], set()
    while at:
        assert at not in seen
        seen.add(at)
        id, following = client.region_read(Region.CONFIG, at, 2)
        if id == wanted:
            return at
        at = following
    raise AssertionError(f"no capability {wanted:#x}")
