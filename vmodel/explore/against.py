"""`Against`: what the runs of another folder have reached, to compare a search with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from vmodel.campaign.store import ResultStore
from vmodel.explore.reached import code_of
from vmodel.explore.search import Feature


@dataclass(frozen=True)
class Against:
    """A campaign's or another search's folder, its number of runs that have ended, and what they executed."""

    folder: Path
    runs: int
    code: frozenset[Feature]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """ConfigError: it is no campaign's folder, or what a run reached is damaged."""
        with ResultStore.open(folder) as store:
            rows = [row for row in store.rows() if row.result is not None]
            return cls(folder, len(rows), frozenset().union(*map(code_of, rows)))
