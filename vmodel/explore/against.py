"""`Against`: what the runs of another folder have reached, to compare a search with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vmodel.campaign.store import ResultStore, Row
from vmodel.errors import ConfigError
from vmodel.explore.reached import code_of
from vmodel.explore.search import Feature


@dataclass(frozen=True)
class Against:
    """A campaign's or another search's folder, its number of runs that have ended, and what they executed."""

    folder: Path
    runs: int
    code: frozenset[Feature]
    #: Modules with the build ids that they had: addresses of different builds cannot be compared.
    builds: frozenset[tuple[str, str]]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """ConfigError: it is no campaign's folder, no run in it says what it reached, or what one says is damaged."""
        with ResultStore.open(folder) as store:
            rows = [row for row in store.rows() if row.result is not None]
            code: frozenset[Feature] = frozenset().union(*map(code_of, rows))
            if not code:
                raise ConfigError('no run says what it reached: a campaign needs coverage = ["MODULE"]', file=folder)
            return cls(folder, len(rows), code, builds_of(rows))

    def other_builds(self, rows: Iterable[Row]) -> list[str]:
        """The modules of which the folder's runs and these had different builds."""
        builds = self.builds | builds_of(rows)
        return sorted({name for name, id in builds if any(name == other and id != ids for other, ids in builds)})


def builds_of(rows: Iterable[Row]) -> frozenset[tuple[str, str]]:
    """The modules that runs kept coverage of, with their build ids."""
    return frozenset(pair for row in rows if (kept := row.coverage) is not None for pair in kept.build_ids.items())
