"""What is in a folder, as vmodel.iommu.sysfs describes it."""

from __future__ import annotations

from pathlib import Path

from vmodel.iommu.sysfs_folder import Entries, EntryKind, SysfsEntry


def found(folder: Path) -> Entries:
    """What is in a folder."""
    entries: Entries = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            entry = SysfsEntry(EntryKind.LINK, str(path.readlink()))
        elif path.is_dir():
            entry = SysfsEntry(EntryKind.FOLDER)
        else:
            entry = SysfsEntry(EntryKind.FILE, path.read_text())
        entries[str(path.relative_to(folder))] = entry
    return entries
