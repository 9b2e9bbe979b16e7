"""Fault injection: plans of rules, and the engine that applies them.  docs/injection.md is the user's page."""

from vmodel.inject.action import Action, Injection
from vmodel.inject.actions import ACTIONS
from vmodel.inject.engine import Engine
from vmodel.inject.journal import Journal
from vmodel.inject.plan import FaultPlan, Heal, PlanErrors, Rule
from vmodel.inject.predicate import Match
from vmodel.inject.terse import parse_rule
from vmodel.points import (
    CompletionEvent,
    ConfigEvent,
    ConnectionEvent,
    DmaEvent,
    DoorbellEvent,
    Event,
    InterruptEvent,
    InvalidationEvent,
    MappingEvent,
    MmioEvent,
    Phase,
    Point,
    ResetEvent,
    TranslationEvent,
)

__all__ = [
    "ACTIONS",
    "Action",
    "CompletionEvent",
    "ConfigEvent",
    "ConnectionEvent",
    "DmaEvent",
    "DoorbellEvent",
    "Engine",
    "Event",
    "FaultPlan",
    "Heal",
    "Injection",
    "InterruptEvent",
    "InvalidationEvent",
    "Journal",
    "MappingEvent",
    "Match",
    "MmioEvent",
    "Phase",
    "PlanErrors",
    "Point",
    "ResetEvent",
    "Rule",
    "TranslationEvent",
    "parse_rule",
]
