"""`Context`: what one open /dev/iommu holds, and `Object`, what it holds (Linux drivers/iommu/iommufd/main.c)."""

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
    """Something with an id, which cannot go while it is used."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.id = context.register(self)
        self.users = 0

    def release(self) -> None:
        """What goes with the object."""

    def check(self, context: Context | None = None) -> None:
        """IommuError(ENOENT): it is gone, or of another context than `context`."""
        if (context or self.context).find(self.id) is not self:
            raise IommuError(errno.ENOENT, f"{context or self.context} has no {self}")

    def destroy(self) -> None:
        """IOMMU_DESTROY.  IommuError: EBUSY it is in use; ENOENT it is gone."""
        self.context.destroy(self.id)

    def __str__(self) -> str:
        return f"{type(self).__name__.lower()} {self.id}"


class Context:
    """One open /dev/iommu; owner of the groups of the devices that are bound to it."""

    def __init__(self) -> None:
        self._objects: dict[int, Object] = {}
        self._ids = itertools.count(1)
        self._number = next(_contexts)
        #: The devices bound to it.
        self.devices: list[Device] = []
        #: What the devices of a group are attached to together.
        self.attached: dict[tuple[Group, int | None], Hwpt] = {}

    def register(self, item: Object) -> int:
        """Gives an object its id."""
        number = next(self._ids)
        self._objects[number] = item
        return number

    def find(self, number: int) -> Object | None:
        """The object with an id, if there is one."""
        return self._objects.get(number)

    def __getitem__(self, number: int) -> Object:
        """The object with an id.  IommuError(ENOENT)."""
        if (item := self.find(number)) is None:
            raise IommuError(errno.ENOENT, f"{self} has no object {number}")
        return item

    def destroy(self, number: int) -> None:
        """IOMMU_DESTROY.  IommuError: EBUSY it is in use; ENOENT there is none."""
        item = self[number]
        if item.users:
            raise IommuError(errno.EBUSY, f"{item} is in use")
        item.release()
        del self._objects[number]

    def forget(self, item: Object) -> None:
        """Takes an id back from an object that could not be made."""
        del self._objects[item.id]

    def __str__(self) -> str:
        return f"iommufd context {self._number}"
