"""Guests that are used again after a driver has recovered, too: a boot takes longer than most cases."""

from __future__ import annotations

from vmodel.experiment import Rig
from vmodel.experiment.oracle import Outcome


class Lab(Rig):
    """All workloads here have a check: "recovered" says that it found the device at work, and data right."""

    def __init__(self) -> None:
        super().__init__(reuse=(Outcome.NOT_ACTIVATED, Outcome.MASKED, Outcome.RECOVERED))
