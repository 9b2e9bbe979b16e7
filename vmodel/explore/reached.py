"""What a stored run has reached of the driver's code."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from vmodel.campaign.store import Row
from vmodel.coverage.coverage import Coverage
from vmodel.errors import ConfigError
from vmodel.explore.search import Feature

#: The limit of an artefact with coverage, in bytes, after decompression.
_LARGEST = 1 << 26


def coverage_of(row: Row) -> Coverage | None:
    """The coverage of a run that has ended; None: none was recorded.  ConfigError: its artefact is damaged."""
    assert row.result is not None
    if row.result.coverage is not None:
        return row.result.coverage
    path = _artefact(row, "coverage")
    return None if path is None else Coverage.from_json(_json(path))


def code_of(row: Row) -> frozenset[Feature]:
    """The instructions that a run executed, as (module, address).

    A rig of the user's may write them as the artefact "reached": JSON, {"module": [address, ...]}.  ConfigError: the
    artefact is damaged.
    """
    coverage = coverage_of(row)
    if coverage is not None:
        return frozenset(coverage)
    path = _artefact(row, "reached")
    if path is None:
        return frozenset()
    said = _json(path)
    try:
        return frozenset((str(module), int(at)) for module, found in said.items() for at in found)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f'must be JSON, as {{"module": [1, 2]}}: {error}', file=path) from error


def features_of(row: Row) -> frozenset[Feature]:
    """What a search compares: the instructions of a run, and the signatures of its evidence."""
    assert row.result is not None
    return code_of(row) | {("signature", signature) for signature in row.result.signatures}


def _artefact(row: Row, name: str) -> Path | None:
    assert row.result is not None
    found = row.result.artefacts.get(name)
    path = None if found is None else row.folder / found
    return path if path is not None and path.is_file() else None


def _json(path: Path) -> Any:
    """The content of a JSON file, which gzip may have compressed.  ConfigError: it is damaged, or too large."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(_LARGEST + 1)
        if len(data) > _LARGEST:
            raise ConfigError(f"has more than {_LARGEST >> 20} MiB", file=path)
        return json.loads(data)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ConfigError(f"cannot be read: {error}", file=path) from error
