"""Experiments: a workload in a stock guest under a plan of faults, and the outcome."""

from vmodel.experiment.case import Case, Result
from vmodel.experiment.oracle import Effect, Finding, Outcome
from vmodel.experiment.rig import LastingRig, Rig, run

__all__ = ["Case", "Effect", "Finding", "LastingRig", "Outcome", "Result", "Rig", "run"]
