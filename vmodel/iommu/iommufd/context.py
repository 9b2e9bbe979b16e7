"""`Context`, one open /dev/iommu, and `Object`, the base of its objects (Linux drivers/iommu/iommufd/main.c)."""

from __future__ import annotations

import enum
import errno
import itertools
import threading
from typing import TYPE_CHECKING

from vmodel.closing import Closing, call_all
from vmodel.errors import IommuError
from vmodel.iommu.group import Group
from vmodel.iommu.iommufd.process import AccountMode, Process
from vmodel.iommu.locking import locked

if TYPE_CHECKING:
    from vmodel.iommu.iommufd.device import Device
    from vmodel.iommu.iommufd.hwpt import Hwpt
    from vmodel.iommu.iommufd.ioas import Ioas
    from vmodel.iommu.iommufd.pages import Pages

_contexts = itertools.count(1)


class Option(enum.IntEnum):
    """Options of a context (Linux IOMMU_OPTION_*)."""

    #: 0: pinned memory counts against the limit of the user; 1: against that of the process.
    RLIMIT_MODE = 0
    #: Of an IOAS.  1: as large entries of tables as possible; 0: only the smallest pages.
    HUGE_PAGES = 1


class Object:
    """An object with an id, which cannot be destroyed while `users` is not 0."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.lock = context.lock
        self.id = context.register(self)
        self.users = 0

    def release(self) -> None:
        """Called when the object is destroyed: a subclass releases its resources here."""

    def stop(self) -> None:
        """Called first when the context is closed, without its lock: a kernel driver destroys its object here."""

    def check(self, context: Context | None = None) -> None:
        """IommuError(ENOENT): the object has been destroyed, or is not of `context` (by default its own)."""
        if (context or self.context).find(self.id) is not self:
            raise IommuError(errno.ENOENT, f"{context or self.context} has no {self}")

    def destroy(self) -> None:
        """IOMMU_DESTROY.  IommuError: EBUSY it is in use; ENOENT it has been destroyed."""
        self.context.destroy(self.id)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()} {self.id}"


class Context(Closing):
    """One open /dev/iommu; it owns the groups of the devices that are bound to it.

    Any thread may call it and its objects.  A context manager: `close` gives everything back.

    >>> with Context() as context:  # doctest: +SKIP
    ...     device = Device(context, endpoint)
    """

    def __init__(self, *, allow_unsafe_interrupts: bool = False, process: Process | None = None) -> None:
        """`allow_unsafe_interrupts`: also devices whose MSIs are not isolated (iommufd's module parameter).

        `process` uses the context: pinned memory counts against its limit.  None: one of root, with all capabilities.
        """
        self.allow_unsafe_interrupts = allow_unsafe_interrupts
        #: The process that calls.  It may be replaced at any time, as processes can share a context.
        self.process = Process(ipc_lock=True, sys_resource=True) if process is None else process
        #: What counts the memory that is mapped from now on, if the process has no CAP_IPC_LOCK.
        self.account_mode = AccountMode.USER
        #: Held by each call of the context and its objects, not while a page request waits.
        self.lock = threading.RLock()
        self._closed = False
        self._objects: dict[int, Object] = {}
        self._ids = itertools.count(1)
        self._number = next(_contexts)
        #: Its address spaces.
        self.spaces: list[Ioas] = []
        #: The devices bound to it.
        self.devices: list[Device] = []
        #: The HWPT of each group, and of each PASID of a group.
        self.attached: dict[tuple[Group, int | None], Hwpt] = {}

    @locked
    def register(self, item: Object) -> int:
        """Adds an object; returns its id.  IommuError(EBADF): the context is closed."""
        if self._closed:
            raise IommuError(errno.EBADF, f"{self} is closed")
        number = next(self._ids)
        self._objects[number] = item
        return number

    def find(self, number: int) -> Object | None:
        """The object with an id, or None."""
        return self._objects.get(number)

    def __getitem__(self, number: int) -> Object:
        """The object with an id.  IommuError(ENOENT)."""
        if (item := self.find(number)) is None:
            raise IommuError(errno.ENOENT, f"{self} has no object {number}")
        return item

    @locked
    def destroy(self, number: int) -> None:
        """IOMMU_DESTROY.  IommuError: EBUSY it is in use; ENOENT there is no such object."""
        item = self[number]
        if item.users:
            raise IommuError(errno.EBUSY, f"{item} is in use")
        item.release()
        del self._objects[number]

    @locked
    def unregister(self, item: Object) -> None:
        """Removes an object whose creation failed."""
        del self._objects[item.id]

    # ---- options, processes ----------------------------------------------------------------

    @locked
    def get_option(self, option: Option, object_id: int = 0) -> int:
        """IOMMU_OPTION_OP_GET.  IommuError: EOPNOTSUPP, ENOENT as `set_option`."""
        if option is Option.HUGE_PAGES:
            return int(self._space(object_id).large_pages)
        self._check_global(option, object_id)
        return int(self.account_mode is AccountMode.MM)

    @locked
    def set_option(self, option: Option, value: int, object_id: int = 0) -> None:
        """IOMMU_OPTION_OP_SET; `object_id`: the IOAS for HUGE_PAGES, else 0.

        IommuError: EOPNOTSUPP an object for RLIMIT_MODE, or no such option; ENOENT no such IOAS; EPERM RLIMIT_MODE
        without CAP_SYS_RESOURCE; EBUSY the context has an object; EINVAL another value than 0 and 1, or HUGE_PAGES 0 of
        an IOAS with mappings and a HWPT; EADDRINUSE HUGE_PAGES 0, and a mapping is not aligned to 4 KiB.
        """
        if option is Option.HUGE_PAGES:
            space = self._space(object_id)
            if value not in (0, 1):
                raise IommuError(errno.EINVAL, f"{self}: {option.name} is 0 or 1, not {value}")
            space.set_large_pages(bool(value))
            return
        self._check_global(option, object_id)
        if not self.process.sys_resource:
            raise IommuError(errno.EPERM, f"{self}: the process has no CAP_SYS_RESOURCE")
        if self._objects:
            raise IommuError(errno.EBUSY, f"{self} has objects")
        if value not in (0, 1):
            raise IommuError(errno.EINVAL, f"{self}: {option.name} is 0 or 1, not {value}")
        self.account_mode = AccountMode.MM if value else AccountMode.USER

    def _check_global(self, option: Option, object_id: int) -> None:
        if option is not Option.RLIMIT_MODE or object_id:
            raise IommuError(errno.EOPNOTSUPP, f"{self}: there is no option {int(option)} of object {object_id}")

    def _space(self, number: int) -> Ioas:
        for space in self.spaces:
            if space.id == number:
                return space
        raise IommuError(errno.ENOENT, f"{self} has no ioas {number}")

    @locked
    def change_process(self, process: Process) -> None:
        """IOMMU_IOAS_CHANGE_PROCESS, called by `process`: what is pinned counts against it, and it uses the context.

        IommuError: EINVAL a mapping is not of a MemoryFile; ENOMEM the limit of `process` is exceeded.  On an error
        nothing changes.
        """
        moved: dict[int, Pages] = {}
        for space in self.spaces:
            for pages in space.memory():
                if not pages.of_file:
                    raise IommuError(errno.EINVAL, f"{space} has a mapping that is not of a file in memory")
                if pages.process is not process:
                    moved[id(pages)] = pages
        charged: list[tuple[AccountMode, int]] = []
        try:
            for mode in AccountMode:
                if pinned := sum(pages.pinned for pages in moved.values() if pages.mode is mode):
                    process.charge(mode, pinned)
                    charged.append((mode, pinned))
        except IommuError:
            for mode, pinned in charged:
                process.uncharge(mode, pinned)
            raise
        for pages in moved.values():
            pages.move(process)
        self.process = process

    def close(self) -> None:
        """Detaches and unbinds all devices, and destroys all objects; their groups have no owner any more.

        As the end of a process does it: first the fds of its devices, then that of /dev/iommu (iommufd_fops_release).
        What `unmap` of kernel accesses raises is raised at the end, several as an ExceptionGroup: all is given back.
        """
        call_all([*(item.stop for item in self._begin_close()), self._destroy_all])

    @locked
    def _begin_close(self) -> list[Object]:
        self._closed = True
        for device in list(self.devices):
            device.detach_all()
        return list(self._objects.values())

    @locked
    def _destroy_all(self) -> None:
        while free := [item for item in self._objects.values() if not item.users]:
            for item in free:
                if self.find(item.id) is item:  # a vDEVICE goes with its device
                    self.destroy(item.id)

    def __str__(self) -> str:
        return f"iommufd context {self._number}"
