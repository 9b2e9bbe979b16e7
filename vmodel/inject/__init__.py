"""Fault injection: plans of rules, and the engine that applies them.  docs/injection.md is the user's page."""

from vmodel.inject.action import Action, Injection
from vmodel.inject.actions import ACTIONS
from vmodel.inject.engine import Engine
from vmodel.inject.journal import Journal
from vmodel.inject.plan import FaultPlan, Heal, PlanErrors, Rule
from vmodel.inject.predicate import Match
from vmodel.inject.terse import parse_rule
from vmodel.points import Event, Phase, Point

__all__ = [
    "ACTIONS",
    "Action",
    "Engine",
    "Event",
    "FaultPlan",
    "Heal",
    "Injection",
    "Journal",
    "Match",
    "Phase",
    "PlanErrors",
    "Point",
    "Rule",
    "parse_rule",
]
