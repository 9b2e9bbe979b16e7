"""`Context`, one open /dev/iommu, and `Object`, the base of its objects (Linux drivers/iommu/iommufd/main.c)."""

from __future__ import annotations

import errno
import itertools
from typing import TYPE_CHECKING

from vmodel.errors import IommuError
from vmodel.iommu.group import Group

if TYPE_CHECKING:
    from vmodel.iommu.iommufd import Device, Hwpt

_contexts = itertools.count(1)


class Object:
    """An object with an id, which cannot be destroyed while `users` is not 0."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.id = context.register(self)
        self.users = 0

    def release(self) -> None:
        """Called when the object is destroyed: a subclass releases its resources here."""

    def check(self, context: Context | None = None) -> None:
        """IommuError(ENOENT): the object has been destroyed, or is not of `context` (by default its own)."""
        if (context or self.context).find(self.id) is not self:
            raise IommuError(errno.ENOENT, f"{context or self.context} has no {self}")

    def destroy(self) -> None:
        """IOMMU_DESTROY.  IommuError: EBUSY it is in use; ENOENT it has been destroyed."""
        self.context.destroy(self.id)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()} {self.id}"


class Context:
    """One open /dev/iommu; it owns the groups of the devices that are bound to it."""

    def __init__(self) -> None:
        self._objects: dict[int, Object] = {}
        self._ids = itertools.count(1)
        self._number = next(_contexts)
        #: The devices bound to it.
        self.devices: list[Device] = []
        #: The HWPT of each group, and of each PASID of a group.
        self.attached: dict[tuple[Group, int | None], Hwpt] = {}

    def register(self, item: Object) -> int:
        """Adds an object; returns its id."""
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

    def destroy(self, number: int) -> None:
        """IOMMU_DESTROY.  IommuError: EBUSY it is in use; ENOENT there is no such object."""
        item = self[number]
        if item.users:
            raise IommuError(errno.EBUSY, f"{item} is in use")
        item.release()
        del self._objects[number]

    def unregister(self, item: Object) -> None:
        """Removes an object whose creation failed."""
        del self._objects[item.id]

    def __str__(self) -> str:
        return f"iommufd context {self._number}"
