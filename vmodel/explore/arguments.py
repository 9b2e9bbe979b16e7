"""Which actions a search tries at a site, and with which arguments."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin

from vmodel.device import PciDevice
from vmodel.explore.survey import Site
from vmodel.inject import ACTIONS, Action
from vmodel.points import ConfigEvent, Point

#: What the device reads of the driver: changed, the device does what nobody asked it for, perhaps anywhere in memory.
_TO_DEVICE = frozenset((Point.DMA_READ, Point.MMIO_WRITE, Point.CONFIG_WRITE))
_CHANGES = frozenset(("flip", "corrupt", "stale", "partial", "value"))
#: Actions that write where no command leads: no driver survives them without an IOMMU.
_WILD = frozenset(("overrun", "use-after-unmap"))
#: Actions after which QEMU does not have the device any more: the next run needs a new guest.
ENDING = frozenset(("disconnect", "unplug", "no-bar"))
#: Actions whose effect depends on the moment, and not on the event at which they are carried out.
ANYWHERE = frozenset((*ENDING, "spurious"))
#: While QEMU starts, it does not survive these at config reads: docs/injection.md.
_AT_START = frozenset(("ones", "value", "flip", "corrupt", "stale", "stuck"))
#: Values by the name of the argument; where one differs by action, by "action.argument".
_CHOICES: Mapping[str, Sequence[Any]] = {
    "ms": (1, 10, 100, 1000),
    "storm.ms": (1,),
    "storm.count": (2, 20, 500),
    "bits": (1, 2, 8),
    "pattern": ("00", "ff", "deadbeef", "01"),
    "overrun.size": (4, -4, 64),
    "vector": (0, 1, 2, 3),
    "done": (0, 1, 8),
    "complete.id": (0, 1, 0xFFFF, 0x7FFF),
    "complete.status": (1, 2, 4, 6, 7, 0x81, 0x280, 0x371),
    "complete.length": (0, 1, 0xFFFFFFFF),
}
#: How many different arguments of one action are tried at most.
_TRIES = 8


def offered(site: Site, arm: str, devices: Mapping[str, PciDevice], *, wild: bool = False) -> list[str]:
    """The actions that make sense at a site of runs that are armed at `arm`: names, and some with their arguments.

    `wild`: also those whose effect on the guest's memory is not the driver's fault.
    """
    found = []
    for name, kind in sorted(ACTIONS.items()):
        if site.point not in kind.points or name == "watch":
            continue
        if not wild and (name in _WILD or (name in _CHANGES and site.point in _TO_DEVICE)):
            continue
        if arm == "boot" and site.point in ConfigEvent.points and name in _AT_START:
            continue
        if action_text(kind, site, devices, random.Random(0)) is not None:
            found.append(name)
            # All ones is an action of its own; all zeros would be one value of many.
            if name == "value" and set(site.values) != {0}:
                found.append("value(0)")
    return found


def action_text(kind: type[Action], site: Site, devices: Mapping[str, PciDevice], random: random.Random) -> str | None:
    """An action with arguments for a site, as plans write it; None: its devices lack what it needs."""
    named = devices.get(site.device or "")
    owned = list(devices.values()) if named is None else [named]
    given: dict[str, Any] = {}
    chosen = random.choice(("id", "status", "length"))
    for name, info in kind.model_fields.items():
        if kind.name == "complete" and name != chosen:
            continue
        choices = _choices(kind.name, name, info.annotation, site, owned, random)
        if not choices:
            if info.is_required():
                return None
            continue
        # Defaults are short to read, and as good as any other value.
        if info.is_required() or random.random() < 0.5 or kind.name == "complete":
            given[name] = random.choice(choices)
    for _ in range(_TRIES):
        try:
            action = kind.model_validate(given)
            action.check(owned)
        except ValueError:
            if "capability" not in given:
                return None
            given["capability"] = random.choice(_choices(kind.name, "capability", str, site, owned, random))
            continue
        return str(action)
    return None


def _choices(
    kind: str, name: str, annotation: Any, site: Site, devices: Sequence[PciDevice], random: random.Random
) -> Sequence[Any]:
    """Values for one argument."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if name == "capability":
        return sorted({place for device in devices for place, at, _ in device.config.places if 0x40 <= at < 0x100})
    if name == "bar":
        return sorted({bar.index for device in devices for bar in device.declaration.bars})
    if name == "value":
        return _values(site, random)
    if name == "size" and kind in ("partial", "torn"):
        return sorted({0, 1, 4, 8, site.size // 2, max(site.size - 1, 0)})
    return _CHOICES.get(f"{kind}.{name}", _CHOICES.get(name, ()))


def _values(site: Site, random: random.Random) -> list[int]:
    """Values for a register: zeros, ones and others that mean something; or those of the survey with one bit inverted.

    There are many of the latter: they are offered every second time.
    """
    bits = 8 * min(site.size or 4, 8)
    most = (1 << bits) - 1
    seen = site.values or (0,)
    if random.randrange(2):
        return sorted({0, 1, most, *((value + step) & most for value in seen for step in (-1, 1))})
    return sorted({(value ^ 1 << bit) & most for value in seen for bit in range(bits)})
