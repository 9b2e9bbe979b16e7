"""`Process` and `User`, whom pinned memory is counted against (Linux drivers/iommu/iommufd/pages.c)."""

from __future__ import annotations

import enum
import errno
import threading

from vmodel.errors import IommuError
from vmodel.span import PAGE


class AccountMode(enum.IntEnum):
    """What counts the pinned pages of a mapping (Linux IOPT_PAGES_ACCOUNT_*)."""

    #: Nothing: the process has CAP_IPC_LOCK.
    NONE = 0
    #: `User.locked`, of all processes of the user.
    USER = 1
    #: `Process.locked`, of the process's own memory.
    MM = 2


class User:
    """The user of one or more processes.  `locked`: pages that AccountMode.USER counts."""

    def __init__(self) -> None:
        #: Held while counts of the user and its processes change: contexts have locks of their own.
        self.lock = threading.Lock()
        self.locked = 0


class Process:
    """A process that uses contexts; `exit` ends it.

    `locked` are pages that AccountMode.MM counts, and `pinned` all that are pinned for it (VmLck and VmPin in Linux).
    """

    def __init__(
        self,
        user: User | None = None,
        *,
        locked_limit: int | None = None,
        ipc_lock: bool = False,
        sys_resource: bool = False,
    ) -> None:
        """`locked_limit`: RLIMIT_MEMLOCK in bytes, None: unlimited; `ipc_lock`, `sys_resource`: its capabilities.

        ValueError: a negative limit.
        """
        if locked_limit is not None and locked_limit < 0:
            raise ValueError(f"a limit of {locked_limit} bytes")
        self.user = User() if user is None else user
        self.locked_limit = locked_limit
        self.ipc_lock = ipc_lock
        self.sys_resource = sys_resource
        self.locked = 0
        self.pinned = 0
        #: Whether its address space is gone.
        self.exited = False

    def exit(self) -> None:
        """Ends it: what is pinned stays pinned, and no more of its memory can be; files remain."""
        self.exited = True

    def charge(self, mode: AccountMode, pages: int) -> None:
        """Counts more pinned pages.  IommuError(ENOMEM): the limit is exceeded; nothing changes.

        (Linux incr_user_locked_vm, __account_locked_vm)
        """
        with self.user.lock:
            counted = {AccountMode.USER: self.user.locked, AccountMode.MM: self.locked}.get(mode)
            limit = self.locked_limit
            if counted is not None and limit is not None and counted + pages > limit // PAGE:
                text = f"{counted} pages are locked, {pages} more exceed the limit of {limit:#x} bytes"
                raise IommuError(errno.ENOMEM, text)
            self._add(mode, pages)

    def uncharge(self, mode: AccountMode, pages: int) -> None:
        """Takes back what `charge` has counted."""
        with self.user.lock:
            self._add(mode, -pages)

    def _add(self, mode: AccountMode, pages: int) -> None:
        self.pinned += pages
        if mode is AccountMode.USER:
            self.user.locked += pages
        elif mode is AccountMode.MM:
            self.locked += pages
