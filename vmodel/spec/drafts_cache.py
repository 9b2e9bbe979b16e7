"""Drafts that have been read before: most of a `load` is the start of the compiler, not the reading.

An entry is named by what is asked for and by all programs involved, and is good while each file that was read has the
same content.  Anything wrong with it, and it is as if it were not there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pickle
import stat
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from vmodel import modes
from vmodel.files import cache_dir, create
from vmodel.spec.draft import FileDraft

#: Most entries; when there are more, the oldest go.
MOST = 256
#: The largest entry, in bytes.
_LARGEST = 64 << 20
#: A file that was changed so shortly before it was read may have been changed again meanwhile.
_RECENT_NS = 2_000_000_000

#: What an entry that is absent, damaged or another's raises.
_NO_ENTRY = (OSError, ValueError, LookupError, TypeError, AttributeError, importlib.metadata.PackageNotFoundError)

#: By path: the SHA-256 of the content.
Digests = dict[str, str]


def digests(files: Iterable[Path], begun_ns: int) -> Digests | None:
    """Of the files that were read from `begun_ns` (time.time_ns) on; None: one has been changed just now."""
    found = {}
    try:
        for path in files:
            if path.stat().st_mtime_ns > begun_ns - _RECENT_NS:
                return None
            found[str(path.absolute())] = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # it has been removed
        return None
    return found


@functools.cache
def _programs() -> str:
    """Identifies all that makes a draft of a file.  PackageNotFoundError: the compiler is not installed."""
    sources = [*sorted(Path(__file__).parent.glob("*.py")), Path(modes.__file__)]
    of_vmodel = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    versions = [importlib.metadata.version(name) for name in ("systemrdl-compiler", "peakrdl-ipxact")]
    return json.dumps([sys.version, of_vmodel, versions])


def _entry(kind: str, path: Path, name: str | None) -> Path:
    key = json.dumps([kind, str(path), str(path.absolute()), name, _programs()])
    return cache_dir() / "specifications" / hashlib.sha256(key.encode()).hexdigest()


def find(kind: str, path: Path, name: str | None) -> FileDraft | None:
    """The draft, if the same was read before and no file has changed since."""
    with contextlib.suppress(*_NO_ENTRY):
        head, _, pickled = _own(_entry(kind, path, name)).partition(b"\n")
        said = json.loads(head)
        if said["draft"] == hashlib.sha256(pickled).hexdigest() and all(
            hashlib.sha256(Path(file).read_bytes()).hexdigest() == digest for file, digest in said["files"].items()
        ):
            found: FileDraft = pickle.loads(pickled)
            return found
    return None


def _own(path: Path) -> bytes:
    """An entry's content.  OSError: there is none, or another user could have written it: unpickling runs code."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(f"{path} is not only this user's")
        return file.read(_LARGEST)


def store(kind: str, path: Path, name: str | None, files: Digests, draft: FileDraft) -> None:
    """Keeps a draft.  Without a cache that can be written, nothing happens."""
    pickled = pickle.dumps(draft)
    head = json.dumps({"files": files, "draft": hashlib.sha256(pickled).hexdigest()})
    with contextlib.suppress(OSError, importlib.metadata.PackageNotFoundError):
        entry = _entry(kind, path, name)
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent.parent) as folder:
            with create(Path(folder) / "entry") as file:
                file.write(head.encode() + b"\n" + pickled)
            (Path(folder) / "entry").replace(entry)
        entries = sorted(entry.parent.iterdir(), key=lambda other: other.lstat().st_mtime_ns)
        for old in entries[:-MOST]:
            old.unlink()
