"""Shell completion of arguments: machine files, models.  Where nothing matches, the shell proposes file names."""

from __future__ import annotations

from pathlib import Path

from vmodel.devices import BUILTIN

#: Proposals at most: a folder may have any number of files.
_MOST = 1000


def machine_files(incomplete: str) -> list[str]:
    """TOML files whose path begins with `incomplete`."""
    folder, slash, start = incomplete.rpartition("/")
    found: list[str] = []
    try:
        for path in Path(folder + slash).iterdir():
            if path.name.startswith(start) and path.suffix == ".toml" and len(found) < _MOST:
                found.append(folder + slash + path.name)
    except OSError:  # there is no such folder, or it cannot be read: there is nothing to propose
        return []
    return sorted(found)


def models(incomplete: str) -> list[str]:
    """Built-in models whose name begins with `incomplete`."""
    return sorted(name for name in BUILTIN if name.startswith(incomplete))
