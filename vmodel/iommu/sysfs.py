"""Groups as files in the layout of Linux's /sys/kernel/iommu_groups, for tools and tests that read it."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

from vmodel.closing import Closing
from vmodel.iommu.capabilities import RegionType, ReservedRegion
from vmodel.iommu.changes import Change, ChangeKind
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.group import Group
from vmodel.iommu.sysfs_folder import Entries, EntryKind, SysfsEntry, SysfsFolder
from vmodel.iommu.system import System
from vmodel.pci.topology import Function, bridges_above

log = logging.getLogger(__name__)

#: Changes that no file shows.
_UNSEEN = (ChangeKind.DOMAIN, ChangeKind.OWNER, ChangeKind.REQUEST)


def tree(system: System) -> Entries:
    """iommu_groups/N/{type,reserved_regions,name,devices/} and devices/, as Linux has them below /sys and /sys/kernel.

    (drivers/iommu/iommu.c, iommu_group_alloc and iommu_group_add_device)
    """
    found: Entries = {}
    with system.changes:
        for endpoint in system.endpoints:
            _add(found, _place(endpoint))
        for group in system.groups:
            _add_group(found, group)
    return found


def _add(found: Entries, folder: Path) -> None:
    for parent in [*folder.parents][-2::-1]:  # but "."
        found[str(parent)] = SysfsEntry(EntryKind.FOLDER)
    found[str(folder)] = SysfsEntry(EntryKind.FOLDER)


def _add_group(found: Entries, group: Group) -> None:
    here = Path("iommu_groups", str(group.number))
    _add(found, here / "devices")
    texts = {
        "type": f"{group.default_domain.type.value}\n",
        "reserved_regions": "".join(_line(region) for region in group.reserved_regions),
        "name": f"{group.name}\n" if group.name else None,
    }
    for name, text in texts.items():
        if text is not None:
            found[str(here / name)] = SysfsEntry(EntryKind.FILE, text)
    for endpoint in group.endpoints:
        place = _place(endpoint)
        found[str(here / "devices" / place.name)] = SysfsEntry(EntryKind.LINK, str(Path("../../..") / place))
        up = Path(*[".."] * len(place.parts))
        found[str(place / "iommu_group")] = SysfsEntry(EntryKind.LINK, str(up / here))


def _line(region: ReservedRegion) -> str:
    kind = RegionType.MSI if region.type is RegionType.SW_MSI else region.type  # as Linux: tools look for "msi"
    return f"{region.span.start:#018x} {region.span.last:#018x} {kind.value}\n"


def _place(endpoint: Endpoint) -> Path:
    """A device's path below /sys: devices/pci0000:00/0000:00:04.0/0000:01:00.0, or devices/platform/NAME."""
    source = endpoint.source
    if not isinstance(source, Function):
        return Path("devices", "platform", source.folder)
    above = [str(bridge.bdf) for bridge in bridges_above(source)][::-1]
    root = next((b for b in bridges_above(source) if b.home.bridge is None), source)
    return Path("devices", f"pci{root.bdf.segment:04x}:{root.bdf.bus:02x}", *above, str(source.bdf))


def export(system: System, folder: Path) -> None:
    """Writes `tree` to `folder`, a snapshot of the system.

    `folder` must not exist or be empty; all in it is read-only.  OSError: EEXIST (IommuError) it is not empty; EBUSY
    (IommuError) somebody follows it.
    """
    with SysfsFolder(folder, keep=True) as written:
        written.update(tree(system))
        written.make_read_only()


class Following(Closing):
    """A folder with `tree`, which follows the changes of a system until `close`, which removes it.

    `error`: why it does not follow any more, or None.
    """

    def __init__(self, system: System, folder: Path) -> None:
        """OSError as `export`."""
        self.error: OSError | None = None
        self._system = system
        self._lock = threading.Lock()
        self._folder = SysfsFolder(folder)
        self._unsubscribe = system.subscribe(self._changed)
        try:
            with self._lock:
                self._folder.update(tree(system))
        except BaseException:
            self.close()
            raise

    def _changed(self, change: Change) -> None:
        if change.kind in _UNSEEN:
            return
        with self._lock:
            if self.error is not None or self._folder.closed:
                return
            try:
                self._folder.update(tree(self._system))
            except OSError as error:
                self.error = error
                self._unsubscribe()
                log.error("%s does not follow any more: %s", self._folder.path, error.strerror)

    def close(self) -> None:
        """Ends it, and removes what it has written.  OSError: that is not possible."""
        self._unsubscribe()
        with self._lock:
            self._folder.close()


def follow(system: System, folder: Path) -> Following:
    """Writes `tree` to `folder`, and again whatever changes: each file and link by a rename, so that it is whole.

    `folder` must not exist or be empty.  A subscriber of the system does it, before the call that makes the change
    returns.  OSError as `export`; one later ends it: a line in the log, and `Following.error`.

    >>> with follow(system, Path("sys")):  # doctest: +SKIP
    ...     system.remove(endpoint)
    """
    return Following(system, folder)
