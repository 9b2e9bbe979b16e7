"""Checks of HWPTs and PASIDs, from the cases of Linux's iommufd selftest."""

from __future__ import annotations

from tests.linux.mock import APERTURE, PASID_BITS, WITH_DOMAIN, Mock, Row, Stacked
from vmodel.iommu.domain import AllocFlags
from vmodel.iommu.iommufd import FaultObject, Hwpt, Ioas, VtdS1Invalidate
from vmodel.iommu.pgtable import Table, TableFormat

ONE, TWO, BOTH = ("one_domain",), ("two_domains",), ("one_domain", "two_domains")
NESTED = "iommufd_ioas.alloc_hwpt_nested"
ARM = Table(TableFormat.ARM_S1, 4, APERTURE.start, 48, 48)


def gone(mock: Stacked) -> FaultObject:
    fault = FaultObject(mock.context)
    fault.destroy()
    return fault


def switched(mock: Stacked) -> Hwpt:
    """From the first nested HWPT to the second."""
    mock.device.replace(mock.nested[0])
    return mock.device.replace(mock.nested[1])


def drop(mock: Stacked) -> list[None]:
    """Detaches from the second nested HWPT by way of the parent, and destroys all of them."""
    switched(mock)
    mock.device.replace(mock.parent)
    free = [item.destroy() for item in (*mock.nested, mock.waiting)]
    mock.device.replace(mock.ioas)
    return [*free, *(item.destroy() for item in (mock.parent, mock.plain, mock.fault))]


ALLOC_NESTED = [
    Row(NESTED, says, call, expect, variants=WITH_DOMAIN)
    for says, call, expect in (
        (
            "a parent with page requests",
            lambda mock: mock.device.hwpt_alloc(mock.ioas, AllocFlags.NEST_PARENT, fault=mock.fault),
            "EOPNOTSUPP",
        ),
        ("data without a type", lambda mock: mock.nest(table=None), "EINVAL"),
        ("a type without data", lambda mock: mock.nest(memory=None), "EINVAL"),
        ("a type of another IOMMU", lambda mock: mock.nest(table=ARM), "EOPNOTSUPP"),
        ("a parent in turn", lambda mock: mock.nest(AllocFlags.NEST_PARENT), "EOPNOTSUPP"),
        ("over one that is no parent", lambda mock: mock.nest(parent=mock.plain), "EINVAL"),
        ("over a nested one", lambda mock: mock.nest(parent=mock.nested[0]), "EINVAL"),
        ("a fault object that is gone", lambda mock: mock.nest(fault=gone(mock)), "ENOENT"),
        ("three of one parent", lambda mock: mock.parent.users, 3),
        ("the parent is in use", lambda mock: mock.parent.destroy(), "EBUSY"),
        ("the fault object is in use", lambda mock: mock.fault.destroy(), "EBUSY"),
        ("only a nested one is invalidated", lambda mock: mock.parent.invalidate(), "EINVAL"),
        ("no entries", lambda mock: mock.nested[0].invalidate([]), 0),
        ("two entries", lambda mock: mock.nested[0].invalidate([VtdS1Invalidate(), VtdS1Invalidate(npages=1)]), 2),
        ("an entry of another type", lambda mock: mock.nested[0].invalidate([b"entry"]), "EINVAL"),
        ("too many entries", lambda mock: mock.nested[0].invalidate([VtdS1Invalidate()] * ((1 << 19) + 1)), "EINVAL"),
        ("flags of an entry", lambda mock: mock.nested[0].invalidate([VtdS1Invalidate(flags=2)]), "EOPNOTSUPP"),
        ("the address of an entry", lambda mock: mock.nested[0].invalidate([VtdS1Invalidate(1, 1)]), "EINVAL"),
        ("each is free at last", drop, [None] * 6),
        ("attached: in use", lambda mock: mock.device.replace(mock.nested[0]) and mock.nested[0].destroy(), "EBUSY"),
        ("the other: in use", lambda mock: switched(mock) and mock.nested[1].destroy(), "EBUSY"),
        ("no longer attached: free", lambda mock: switched(mock) and mock.nested[0].destroy(), None),
    )
]


def without_device(mock: Mock) -> None:
    mock.add().destroy()


DEVICE_GONE = [
    Row(
        NESTED,
        "the device is gone",
        lambda mock: mock.bound[-1].hwpt_alloc(mock.ioas),
        "ENOENT",
        before=without_device,
        variants=("no_domain",),
    ),
    Row(
        NESTED,
        "replace, but the device is gone",
        lambda mock: mock.bound[-1].replace(mock.ioas),
        "ENOENT",
        before=without_device,
        variants=("no_domain",),
    ),
]


def moved(mock: Mock) -> Ioas:
    """The first device goes to another IOAS."""
    other = Ioas(mock.context)
    mock.bound[0].replace(other)
    return other


def back(mock: Mock, target: str) -> bool:
    """From another IOAS to the HWPT, or to the IOAS, that was before; the other one is destroyed."""
    other, wanted = moved(mock), mock.hwpts[1] if target == "hwpt" else mock.ioas
    mock.bound[0].replace(other)
    found = mock.bound[0].replace(wanted)
    assert mock.bound[0].replace(wanted) is found and found.users == len(mock.devices)
    other.destroy()
    return found is mock.hwpts[-1]


REPLACE = [
    Row(
        "iommufd_mock_domain.replace",
        "the old IOAS's HWPT is gone",
        lambda mock: mock.bound[0].replace(mock.hwpts[0]),
        "ENOENT",
        before=moved,
        variants=ONE,
    ),
    Row("iommufd_mock_domain.replace", "to another device's HWPT", lambda mock: back(mock, "hwpt"), True, variants=TWO),
    Row("iommufd_mock_domain.replace", "to another device's IOAS", lambda mock: back(mock, "ioas"), True, variants=TWO),
    Row("iommufd_mock_domain.replace", "and back: a new HWPT", lambda mock: back(mock, "ioas"), False, variants=ONE),
]


def rotated(mock: Mock) -> list[Hwpt]:
    """Two HWPTs by hand; the first device was attached to one after the other."""
    device = mock.bound[0]
    made = [device.hwpt_alloc(mock.ioas), device.hwpt_alloc(mock.ioas, AllocFlags.NEST_PARENT)]
    for hwpt in made:
        device.replace(hwpt)
    return made


def shared(mock: Mock) -> None:
    """Another device comes to the first HWPT by hand, and goes; the HWPTs are destroyed."""
    first, second = rotated(mock)
    mock.bound[0].replace(mock.ioas)
    second.destroy()
    other = mock.add()
    other.attach(first)
    other.detach()
    other.destroy()
    first.destroy()


ALLOC = [
    Row("iommufd_mock_domain.alloc_hwpt", says, call, expect, variants=BOTH)
    for says, call, expect in (
        (
            "unknown flags",
            lambda mock: mock.bound[0].hwpt_alloc(mock.ioas, AllocFlags(0xFFFF_FFFF & ~AllocFlags.NEST_PARENT)),
            "EOPNOTSUPP",
        ),
        ("the attached one is in use", lambda mock: rotated(mock)[1].destroy(), "EBUSY"),
        ("the one before is free", lambda mock: rotated(mock)[0].destroy(), None),
        ("another device comes and goes", shared, None),
    )
]

PASIDS = "iommufd_device_pasid.pasid_attach"
PASID = 100


def special(mock: Stacked) -> None:
    """The device's HWPT without PASID is one that may meet PASIDs."""
    mock.device.replace(mock.special)


def attached(mock: Stacked) -> None:
    special(mock)
    mock.device.attach(mock.special, PASID)


def then(mock: Stacked, hwpt: Hwpt) -> bool:
    """Whether the PASID has the domain of `hwpt` and of no other."""
    return mock.domain(PASID) is hwpt.domain


ATTACH = [
    Row(PASIDS, says, call, expect, before=before, variants=("has_pasid", "no_pasid"))
    for says, before, call, expect in (
        ("detach of what is not attached", lambda mock: None, lambda mock: mock.device.detach(PASID), None),
        (
            "beside a HWPT that is not for PASIDs",
            lambda mock: mock.device.replace(mock.parent),
            lambda mock: mock.device.attach(mock.special, PASID),
            "EINVAL",
        ),
        ("a HWPT for PASIDs", attached, lambda mock: then(mock, mock.special), True),
        (
            "a nested HWPT for PASIDs",
            special,
            lambda mock: then(mock, mock.device.attach(mock.nested[0], PASID)),
            True,
        ),
        ("beside it one that is not for PASIDs", attached, lambda mock: mock.device.replace(mock.parent), "EINVAL"),
        ("nothing after detach", attached, lambda mock: mock.device.detach(PASID) or mock.domain(PASID), None),
        ("a HWPT that is not for PASIDs", special, lambda mock: mock.device.attach(mock.parent, PASID), "EINVAL"),
        ("an IOAS", special, lambda mock: mock.device.attach(mock.ioas, PASID), "EINVAL"),
        ("another HWPT", attached, lambda mock: mock.device.attach(mock.nested[0], PASID), "EBUSY"),
        ("the same HWPT", attached, lambda mock: mock.device.attach(mock.special, PASID), "EBUSY"),
        ("replace of nothing", special, lambda mock: mock.device.replace(mock.special, 200), "EINVAL"),
        ("replace by an IOAS", attached, lambda mock: mock.device.replace(mock.ioas, PASID), "EINVAL"),
        (
            "replace by nested HWPTs",
            attached,
            lambda mock: [then(mock, mock.device.replace(hwpt, PASID)) for hwpt in mock.nested],
            [True, True],
        ),
    )
] + [
    Row(PASIDS, says, call, expect, variants=("no_pasid",))
    for says, call, expect in (
        (
            "a device without PASIDs: a HWPT for them",
            lambda mock: mock.bound[1].replace(mock.nested[0]) and mock.bound[1].replace(mock.ioas) is mock.hwpts[1],
            True,
        ),
        (
            "a device without PASIDs: a PASID",
            lambda mock: mock.bound[1].attach(mock.parent, PASID),
            "EINVAL",
        ),
        (
            "a device without PASIDs: a PASID, and a HWPT for them",
            lambda mock: mock.bound[1].attach(mock.special, PASID),
            "EINVAL",
        ),
    )
]

DIRTY = "iommufd_dirty_tracking."
TRACKING = AllocFlags.DIRTY_TRACKING


def without_tracking(mock: Mock) -> None:
    """A second device: its IOMMU cannot track writes (MOCK_FLAGS_DEVICE_NO_DIRTY)."""
    mock.add(mock.make_iommu(dirty_tracking=False), 1 << PASID_BITS)


def tracked(mock: Mock, flags: AllocFlags = AllocFlags.NONE) -> Hwpt:
    return mock.bound[0].hwpt_alloc(mock.ioas, TRACKING | flags)


def on_and_off(mock: Mock, pasid: int | None = None) -> list[bool]:
    """Whether writes are tracked after each call, with another device on the HWPT."""
    hwpt = tracked(mock, AllocFlags.PASID)
    device = mock.add(max_pasids=1 << PASID_BITS)
    device.attach(hwpt)
    if pasid is not None:
        device.attach(hwpt, pasid)
    found = []
    for on in (True, False):
        hwpt.set_dirty_tracking(on)
        found.append(hwpt.paging.tracking)
    device.detach_all()
    hwpt.destroy()
    return found


TRACK = [
    Row(DIRTY + case, says, call, expect, before=before, variants=ONE)
    for case, says, before, call, expect in (
        (
            "enforce_dirty",
            "a device whose IOMMU cannot, on a HWPT that does",
            without_tracking,
            lambda mock: mock.bound[1].attach(tracked(mock)),
            "EINVAL",
        ),
        (
            "enforce_dirty",
            "a HWPT of an IOMMU that cannot",
            without_tracking,
            lambda mock: mock.bound[1].hwpt_alloc(Ioas(mock.context), TRACKING),
            "EOPNOTSUPP",
        ),
        ("set_dirty_tracking", "on and off", lambda mock: None, on_and_off, [True, False]),
        (
            "pasid_set_dirty_tracking",
            "on and off",
            lambda mock: None,
            lambda mock: on_and_off(mock, PASID),
            [True, False],
        ),
        (
            "pasid_set_dirty_tracking",
            "a PASID of a device whose IOMMU cannot",
            without_tracking,
            lambda mock: mock.bound[1].attach(tracked(mock, AllocFlags.PASID), PASID),
            "EINVAL",
        ),
        (
            "device_dirty_capability",
            "an IOMMU that can",
            lambda mock: None,
            lambda mock: mock.bound[0].get_info().dirty_tracking,
            True,
        ),
    )
]

ROWS = [*ALLOC_NESTED, *DEVICE_GONE, *REPLACE, *ALLOC, *ATTACH, *TRACK]
DIFFERENCES: list[Row] = []
#: Cases of functions of test_hwpt.py, in which each step counts on those before it.
WHOLE = [NESTED, PASIDS, DIRTY + "get_dirty_bitmap", DIRTY + "get_dirty_bitmap_no_clear"]
