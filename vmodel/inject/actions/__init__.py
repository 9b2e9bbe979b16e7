"""All actions; plans may use those in `ACTIONS`."""

from vmodel.inject.action import Action
from vmodel.inject.actions.access import (
    Abort,
    Corrupt,
    Flip,
    IommuFault,
    Observe,
    Overrun,
    Partial,
    Poison,
    Stale,
    Toctou,
    Torn,
    UseAfterUnmap,
)
from vmodel.inject.actions.command import Complete, Fail
from vmodel.inject.actions.interrupt import OtherVector, Spurious, Storm
from vmodel.inject.actions.life import AerError, Disconnect, NoBar, Unplug
from vmodel.inject.actions.ordering import Delay, Drop, Duplicate, Late, Reorder
from vmodel.inject.actions.register import Cut, Hide, Ones, Stuck, Value

#: Actions by the name that plans use.
ACTIONS: dict[str, type[Action]] = {
    kind.name: kind
    for kind in (
        Abort,
        AerError,
        Complete,
        Corrupt,
        Cut,
        Delay,
        Disconnect,
        Drop,
        Duplicate,
        Fail,
        Flip,
        Hide,
        IommuFault,
        Late,
        NoBar,
        Ones,
        OtherVector,
        Overrun,
        Partial,
        Poison,
        Reorder,
        Spurious,
        Stale,
        Storm,
        Stuck,
        Toctou,
        Torn,
        Unplug,
        UseAfterUnmap,
        Value,
        Observe,
    )
}
