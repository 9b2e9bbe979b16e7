"""The texts of errors name errno values as Linux's kernel does."""

from __future__ import annotations

import errno

import pytest

from vmodel.errors import IommuError
from vmodel.iommu.iommufd import Context, Ioas, KernelAccess, MemoryFile, Option, Process
from vmodel.memory import GuestMemory


def test_names_of_errno_values() -> None:
    assert str(IommuError(errno.EOPNOTSUPP, "no")) == "no (EOPNOTSUPP)"
    assert str(IommuError(errno.EINVAL, "no")) == "no (EINVAL)"
    assert str(IommuError(99999, "no")) == "no (99999)"


def test_what_is_wrong_with_an_option() -> None:
    with Context(process=Process(sys_resource=True)) as context:
        with pytest.raises(IommuError, match="there is no option 7 of object 0"):
            context.set_option(7, 1)  # type: ignore[arg-type]
        with pytest.raises(IommuError, match="RLIMIT_MODE is 0 or 1, not 2"):
            context.set_option(Option.RLIMIT_MODE, 2)


def test_what_is_beyond_the_end_of_a_file() -> None:
    with Context() as context:
        ioas, access = Ioas(context), KernelAccess(context, GuestMemory(), lambda iova, size: None)
        access.attach(ioas)
        iova = ioas.map_file(MemoryFile(0, 0x4000), 0x3000, 0x2000)
        with pytest.raises(IommuError, match="the file has 0x4000 bytes: page 0x4000 is not in it"):
            access.pin_pages(iova, 0x2000)
