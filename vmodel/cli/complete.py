"""Shell completion of arguments: machine files, models.  Where nothing matches, the shell proposes file names."""

from __future__ import annotations

import re
from pathlib import Path

from vmodel.config_file import read_text
from vmodel.devices import BUILTIN
from vmodel.errors import ConfigError

#: Proposals at most: a folder may have any number of files.
_MOST = 1000


def machine_files(incomplete: str) -> list[str]:
    """Machine files whose path begins with `incomplete`: TOML files with a table [machine]."""
    folder, slash, start = incomplete.rpartition("/")
    found: list[str] = []
    try:
        for path in Path(folder + slash).iterdir():
            if path.name.startswith(start) and path.suffix == ".toml" and len(found) < _MOST and _is_machine(path):
                found.append(folder + slash + path.name)
    except OSError:  # there is no such folder, or it cannot be read: there is nothing to propose
        return []
    return sorted(found)


def _is_machine(path: Path) -> bool:
    # Not the parsed file: one that is half written is to be proposed, too.
    try:
        return bool(re.search(r"^\s*\[machine\]", read_text(path), re.MULTILINE))
    except ConfigError:
        return False


def models(incomplete: str) -> list[str]:
    """Built-in models whose name begins with `incomplete`."""
    return sorted(name for name in BUILTIN if name.startswith(incomplete))
