"""`SysfsFolder`: a folder that is made equal to a tree of folders, files and links, again and again."""

from __future__ import annotations

import contextlib
import enum
import errno
import fcntl
import os
from pathlib import Path
from typing import NamedTuple

from vmodel.closing import Closing
from vmodel.errors import IommuError


class EntryKind(enum.StrEnum):
    """What a path of a tree is.  They are removed in this order, and made in the opposite one."""

    LINK = "link"
    FILE = "file"
    FOLDER = "folder"


class SysfsEntry(NamedTuple):
    """`text`: what is in a file, or where a link leads."""

    kind: EntryKind
    text: str = ""


#: Paths relative to the folder, each with all folders above it.
Entries = dict[str, SysfsEntry]

_ORDER = list(EntryKind)
#: Where files and links are made, before they are renamed.
_NEW = ".new"


class SysfsFolder(Closing):
    """A folder, and what it has of a tree.

    One at a time can have a folder.  A file or link is made under another name, and renamed; no reader sees a part.
    Folders have the mode 0755, files 0444.  `close` removes all of it again, and the folder if it was made here, unless
    `keep`.  Not thread-safe.
    """

    def __init__(self, path: Path, *, keep: bool = False) -> None:
        """`path` must not exist or be empty. OSError: EEXIST it is not empty; EBUSY another one has it."""
        self.path = path
        self._keep = keep
        self._now: Entries = {}
        self.closed = False
        self._made = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise IommuError(errno.EBUSY, "another process writes to it: choose another folder") from None
            if any(path.iterdir()):
                raise IommuError(errno.EEXIST, "is not empty: choose another folder")
        except BaseException:
            os.close(self._fd)
            raise

    def update(self, tree: Entries) -> None:
        """Makes the folder equal to `tree`.  OSError: ENOENT it was removed; others as of writing files."""
        self.check()
        for name in sorted(self._now, key=self._removal):
            if (new := tree.get(name)) is None or new.kind is not self._now[name].kind:
                self._remove(name)
        for name in sorted(tree, key=lambda name: (-_ORDER.index(tree[name].kind), name)):
            if self._now.get(name) != tree[name]:
                self._write(name, tree[name])

    def check(self) -> None:
        """OSError(ENOENT): the folder was removed."""
        if not os.fstat(self._fd).st_nlink:
            raise IommuError(errno.ENOENT, "it was removed")

    def _removal(self, name: str) -> tuple[int, int]:
        """The order in which what is there is removed: what is in a folder before the folder."""
        return _ORDER.index(self._now[name].kind), -name.count("/")

    def _remove(self, name: str) -> None:
        if self._now[name].kind is EntryKind.FOLDER:
            os.rmdir(name, dir_fd=self._fd)
        else:
            os.unlink(name, dir_fd=self._fd)
        del self._now[name]

    def _write(self, name: str, entry: SysfsEntry) -> None:
        if entry.kind is EntryKind.FOLDER:
            os.mkdir(name, 0o755, dir_fd=self._fd)
            self._now[name] = entry
            return
        try:
            if entry.kind is EntryKind.LINK:
                os.symlink(entry.text, _NEW, dir_fd=self._fd)
            else:
                new = os.open(_NEW, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444, dir_fd=self._fd)
                with os.fdopen(new, "w", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(entry.text)
            os.rename(_NEW, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(_NEW, dir_fd=self._fd)
            raise
        self._now[name] = entry

    def make_read_only(self) -> None:
        """Takes the permission to write from the folders of groups: a snapshot does not change.  OSError."""
        for name in sorted(self._now, key=self._removal):
            if self._now[name].kind is EntryKind.FOLDER and name.startswith("iommu_groups/"):
                os.chmod(name, 0o555, dir_fd=self._fd)

    def close(self) -> None:
        """Ends it.  OSError: what was written cannot be removed, as somebody else has put something there."""
        if self.closed:
            return
        self.closed = True
        try:
            if not self._keep and os.fstat(self._fd).st_nlink:
                for name in sorted(self._now, key=self._removal):
                    with contextlib.suppress(FileNotFoundError):
                        self._remove(name)
                if self._made:
                    self.path.rmdir()
        finally:
            os.close(self._fd)


def checked(found: object) -> Entries:
    """A tree that another process has sent, as JSON.  ValueError: it is none, or would lead out of the folder."""
    tree: Entries = {}
    if not isinstance(found, dict):
        raise ValueError("no tree")
    for name, entry in found.items():
        kind, text = entry
        tree[name] = SysfsEntry(EntryKind(kind), text)
        parts = name.split("/")
        if not isinstance(text, str) or name == _NEW or any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise ValueError(f"no entry of a tree: {name!r}")
    for name in tree:
        parent = name.rpartition("/")[0]
        if parent and tree.get(parent, ("",))[0] is not EntryKind.FOLDER:
            raise ValueError(f"{name!r} is in no folder")
    return tree
