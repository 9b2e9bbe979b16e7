"""`released`: asks the owner of a group to release it, before a device of it is unbound or removed.

As VFIO's drivers do in Linux (vfio_unregister_group_dev): a user is asked again and again (VFIO_PCI_REQ_ERR_IRQ), and
the unbind waits for it, there without a bound.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from vmodel.errors import IommuError
from vmodel.iommu.changes import ChangeKind

if TYPE_CHECKING:
    from vmodel.iommu.endpoint import Endpoint

#: Seconds between two requests (vfio_unregister_group_dev).
EVERY = 10.0


@contextlib.contextmanager
def released(endpoint: Endpoint) -> Iterator[None]:
    """The block runs with the System's lock, when the group has no owner, or at once if nobody is to wait for it.

    Meanwhile the owner gets a Change REQUEST at once and every ten seconds.  IommuError(EBUSY): it has not released the
    group in `endpoint.unbind_waits` seconds; also at once for a call of a subscriber, as its owner would get nothing.
    """
    changes, deadline = endpoint.changes, time.monotonic() + endpoint.unbind_waits
    while True:
        with changes:
            if not _must_wait(endpoint):
                yield
                return
            group = endpoint.group
            assert group is not None
            owner = group.owner
            left = deadline - time.monotonic()
            if left <= 0 or changes.delivering:
                raise IommuError(errno.EBUSY, f"{endpoint.name}: {group} is still owned by {owner}")
            changes.notify(ChangeKind.REQUEST, endpoint, group, owner)
        changes.wait_for(lambda: not _must_wait(endpoint), min(left, EVERY))


def wait_for_owner(endpoint: Endpoint) -> None:
    """As `released`, for what subscribers get before the change.  IommuError(EBUSY)."""
    with released(endpoint):
        pass


def _must_wait(endpoint: Endpoint) -> bool:
    return bool(
        endpoint.unbind_waits
        and endpoint.group is not None
        and endpoint.group.owner is not None
        and not endpoint.bound_without_dma
    )
