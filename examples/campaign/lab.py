"""A rig that uses a guest again after a driver has recovered: a boot takes longer than most cases."""

from __future__ import annotations

from vmodel.experiment import Rig
from vmodel.experiment.oracle import Outcome


class Lab(Rig):
    """All workloads here have a check, so after "recovered" the device works and its data is right."""

    def __init__(self) -> None:
        super().__init__(reuse=(Outcome.NOT_ACTIVATED, Outcome.MASKED, Outcome.RECOVERED))
