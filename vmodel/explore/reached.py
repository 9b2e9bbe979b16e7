"""What a stored run has reached of the driver's code."""

from __future__ import annotations

import json
from pathlib import Path

from vmodel.campaign.store import Row
from vmodel.errors import ConfigError
from vmodel.explore.search import Feature
from vmodel.files import pieces
from vmodel.mistakes import short

#: The limit of an artefact with coverage, in bytes.
_LARGEST = 16 << 20


def code_of(row: Row) -> frozenset[Feature]:
    """The instructions that a run executed, as (module, address).

    A rig of the user's may write them as the artefact "reached": JSON, {"module": [address, ...]}.  ConfigError: the
    artefact is damaged, or is not there any more.
    """
    coverage = row.coverage
    if coverage is not None:
        return frozenset(coverage)
    assert row.result is not None
    name = row.result.artefacts.get("reached")
    return frozenset() if name is None else _numbers(row.folder / name)


def features_of(row: Row) -> frozenset[Feature]:
    """What a search compares: the instructions of a run, and the signatures of its evidence."""
    assert row.result is not None
    return code_of(row) | {("signature", signature) for signature in row.result.signatures}


def _numbers(path: Path) -> frozenset[Feature]:
    """The content of an artefact "reached".  ConfigError: it cannot be read, or is something else."""
    try:
        said = json.loads(b"".join(pieces(path, _LARGEST)))
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", file=path) from None
    except (ValueError, RecursionError):
        raise ConfigError("is not JSON", file=path) from None
    if not isinstance(said, dict) or not all(isinstance(found, list) for found in said.values()):
        raise ConfigError('must be as {"module": [1, 2]}', file=path)
    for module, found in said.items():
        if wrong := [at for at in found if type(at) is not int]:
            raise ConfigError(
                f"numbers must be integers, as [1, 2], not {short(wrong[0])}", file=path, key=short(module)
            )
    return frozenset((module, at) for module, found in said.items() for at in found)
