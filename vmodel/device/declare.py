"""`Declaration`: the hardware that a model's class declares, checked when the class is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from vmodel.pci.bar import BankSlot, Bar, RamSlot
from vmodel.pci.caps import Capability, Msi, Msix
from vmodel.pci.config import HeaderRegs, Identity
from vmodel.pci.express import Pcie
from vmodel.pci.extcaps import ExtendedCapability, Pasid
from vmodel.pci.irq import Intx
from vmodel.regs import Hook, Register, RegisterBank, RegisterError, hooks_of
from vmodel.span import KiB, MiB, Span

#: The types of parts; every other attribute of a class is the model's own.
PARTS = (Bar, BankSlot, RamSlot, Capability, Intx)
#: An expansion ROM has at least 2 KiB (bits of its register) and at most 16 MiB (PCIe 5.0, 7.5.1.2.4).
_ROM_SIZES = range(2 * KiB, 16 * MiB + 1)
_WIDTHS = {"vendor_id": 16, "device_id": 16, "class_code": 24, "revision": 8}


@dataclass(frozen=True)
class Declaration:
    """The parts of one model, by the name of the attribute that declares each."""

    model: str
    doc: str
    identity: Identity
    rom: bytes
    #: By index; includes the BAR that MSI-X makes for itself.
    bars: tuple[Bar, ...]
    banks: Mapping[str, BankSlot]
    rams: Mapping[str, RamSlot]
    #: In the order in which config space has them.
    capabilities: Mapping[str, Capability]
    #: The interrupt pin; at most one.
    pins: Mapping[str, Intx]
    #: The name of each hook's method.
    hooks: Mapping[Hook, str]

    @classmethod
    def of(cls, model: type[Any]) -> Declaration:
        """Collects the parts of `model` and its bases; a subclass adds parts or replaces them by name.

        RegisterError: the declaration is wrong.
        """
        parts, hooks = _collect(model)
        name = model.__name__
        for what, width in _WIDTHS.items():
            value = getattr(model, what, None)
            if not isinstance(value, int) or not 0 <= value < 1 << width:
                raise RegisterError(f"{name}.{what} is not a {width}-bit number: {value!r}")

        def of_kind(kind: type[Any]) -> dict[str, Any]:
            return {key: part for key, part in parts.items() if isinstance(part, kind)}

        bars = [*of_kind(Bar).values(), *(m.bar for m in of_kind(Msix).values() if m.owns_bar)]
        pins = of_kind(Intx)
        declared = cls(
            name,
            (model.__doc__ or "").strip().partition("\n")[0],
            Identity(
                model.vendor_id,
                model.device_id,
                model.class_code,
                model.revision,
                model.subsystem_vendor_id,
                model.subsystem_id,
                interrupt_pin=max((pin.pin for pin in pins.values()), default=0),
            ),
            model.rom,
            tuple(sorted(bars, key=lambda bar: bar.index)),
            of_kind(BankSlot),
            of_kind(RamSlot),
            of_kind(Capability),
            pins,
            hooks,
        )
        declared._check()
        return declared

    def _check(self) -> None:
        if self.identity.vendor_id == 0xFFFF:
            raise RegisterError(f"{self.model}.vendor_id is 0xffff, which says that there is no function")
        if self.rom and (len(self.rom) not in _ROM_SIZES or len(self.rom) & (len(self.rom) - 1)):
            raise RegisterError(
                f"{self.model}: an expansion ROM of {len(self.rom)} bytes is no power of two of 2048 to 16 MiB"
            )
        self._check_express()
        if len(self.pins) > 1:
            raise RegisterError(f"{self.model}: a function has one interrupt pin, not {len(self.pins)}")
        in_bars = [slot.bank for slot in self.banks.values()]
        if len(set(in_bars)) != len(in_bars):
            raise RegisterError(f"{self.model}: one bank class in two places: its hooks would be ambiguous")
        banks = {*in_bars, *self.config_banks()}
        for hook in self.hooks:
            if hook.register.bank not in banks:
                raise RegisterError(
                    f"{self.model}: a hook on {hook.register}, whose bank is in no BAR and no capability"
                )
        taken = [n for bar in self.bars for n in range(bar.index, bar.index + bar.registers)]
        for n in taken:
            if taken.count(n) > 1:
                raise RegisterError(f"{self.model}: BAR{n} is declared twice (a 64-bit BAR takes two registers)")
        for what, slot in self._slots():
            self.bar(slot.bar.index).holds(f"{self.model}.{what}", slot.span.start, slot.span.size)
        for bar in self.bars:
            for (one, span), (other, at) in combinations(self._spans(bar.index), 2):
                if span.overlaps(at):
                    raise RegisterError(f"BAR{bar.index}: {other} at {at} overlaps {one} at {span}")

    def _check_express(self) -> None:
        capabilities = self.capabilities.values()
        express = [part for part in capabilities if isinstance(part, Pcie)]
        for bar in self.bars:
            if express and not bar.io and bar.size < 128:
                raise RegisterError(f"BAR{bar.index}: on PCI Express a memory BAR has at least 128 bytes (7.5.1.2.1)")
        if any(isinstance(part, Pasid) for part in capabilities) and not all(part.tlp_prefix for part in express):
            raise RegisterError(f"{self.model}: PASIDs travel in TLP prefixes: Pcie(tlp_prefix=True)")

    def _slots(self) -> list[tuple[str, BankSlot | RamSlot]]:
        return [*self.banks.items(), *self.rams.items()]

    def _spans(self, index: int) -> Iterator[tuple[str, Span]]:
        """(name, bytes) of each part in a BAR."""
        for name, slot in self._slots():
            if slot.bar.index == index:
                yield f"{self.model}.{name}", slot.span
        for name, part in self.capabilities.items():
            if isinstance(part, Msix) and part.bar.index == index:
                yield f"the table of {self.model}.{name}", Span.sized(part.table_offset, part.table_size)
                yield f"the PBA of {self.model}.{name}", Span.sized(part.pba_offset, part.pba_size)

    @property
    def names(self) -> frozenset[str]:
        """The names of all attributes that are parts."""
        return frozenset((*self.banks, *self.rams, *self.capabilities, *self.pins))

    def bar(self, index: int) -> Bar:
        """The BAR of that index.  RegisterError when none is declared."""
        for bar in self.bars:
            if bar.index == index:
                return bar
        raise RegisterError(f"{self.model}: something is placed in BAR{index}, which {self.model} does not declare")

    def mappable(self, index: int) -> tuple[Span, ...]:
        """The areas of a BAR that the client may map."""
        return tuple(slot.span for slot in self.rams.values() if slot.bar.index == index and slot.mappable)

    def config_banks(self) -> list[type[RegisterBank]]:
        """The banks of config space: the header's, and one for each capability."""
        return [HeaderRegs, *(part.bank for part in self.capabilities.values())]

    def hooked(self, bank: type[RegisterBank], kind: str) -> set[Register]:
        """The registers of a bank with a hook of this kind, "read" or "write"."""
        return {hook.register for hook in self.hooks if hook.register.bank is bank and hook.kind == kind}

    def describe(self) -> dict[str, Any]:
        """The declaration as plain data, for `vmodel regs`."""
        return {
            "vendor_id": self.identity.vendor_id,
            "device_id": self.identity.device_id,
            "class_code": self.identity.class_code,
            "revision": self.identity.revision,
            "subsystem_vendor_id": self.identity.subsystem_vendor_id,
            "subsystem_id": self.identity.subsystem_id,
            "doc": self.doc,
            "interrupt_pin": self.identity.interrupt_pin,
            "rom": len(self.rom),
            "capabilities": [self._describe_capability(name, part) for name, part in self.capabilities.items()],
            "bars": [self._describe_bar(bar) for bar in self.bars],
        }

    def _registers(self, bank: type[RegisterBank]) -> list[dict[str, Any]]:
        """The registers of a bank, each with the kinds of its hooks."""
        hooks: dict[str, list[str]] = {}
        for hook in self.hooks:
            if hook.register.bank is bank:
                hooks.setdefault(hook.register.name, []).append(hook.kind)
        return [{**register, "hooks": sorted(hooks.get(register["name"], ()))} for register in bank.describe()]

    def _describe_capability(self, name: str, part: Capability) -> dict[str, Any]:
        vectors = {"vectors": part.vectors} if isinstance(part, Msi | Msix) else {}
        if isinstance(part, Msix):
            vectors |= {"bar": part.bar.index, "table": part.table_offset, "pba": part.pba_offset}
        return {
            "name": name,
            "kind": type(part).__name__,
            "id": part.id,
            "extended": isinstance(part, ExtendedCapability),
            **vectors,
            "registers": self._registers(part.bank),
        }

    def _describe_bar(self, bar: Bar) -> dict[str, Any]:
        return {
            "index": bar.index,
            "size": bar.size,
            "kind": "io" if bar.io else "memory64" if bar.is_64bit else "memory32",
            "banks": [
                {
                    "name": slot.bank.__name__,
                    "offset": slot.at,
                    "size": slot.bank.size,
                    "registers": self._registers(slot.bank),
                }
                for slot in self.banks.values()
                if slot.bar.index == bar.index
            ],
            "ram": [
                {"offset": slot.at, "size": slot.size, "mappable": slot.mappable}
                for slot in self.rams.values()
                if slot.bar.index == bar.index
            ],
        }


def _collect(model: type[Any]) -> tuple[dict[str, Any], dict[Hook, str]]:
    """Parts and hooks of a class and its bases.  A subclass's attribute replaces one of the same name in a base."""
    parts: dict[str, Any] = {}
    hooks: dict[Hook, str] = {}
    for base in reversed(model.__mro__):
        for name, value in vars(base).items():
            parts.pop(name, None)
            if name in _CALLED_WITH and inspect.isfunction(value):
                _check_arguments(model, name, value)
            if isinstance(value, PARTS):
                parts[name] = value
            for hook in [hook for hook, method in hooks.items() if method == name]:
                del hooks[hook]
            for hook in hooks_of(value):
                if hook in hooks:
                    raise RegisterError(f"{model.__name__}: {hook.register} has two on_{hook.kind} hooks")
                _check_arguments(model, name, value, hook)
                hooks[hook] = name
    return parts, hooks


#: The arguments of methods that a model may replace, without `self`.
_CALLED_WITH = {"on_reset": "kind: ResetKind", "setup": "", "save_extra": "", "restore_extra": "data: bytes"}


#: What a hook gets, by its kind.
_GIVEN = {"read": "stored: int", "write": "new: int"}


def _check_arguments(model: type[Any], name: str, method: Callable[..., Any], hook: Hook | None = None) -> None:
    """RegisterError: a hook, or a method that the framework calls, cannot be called with the arguments that it gets."""
    if hook is None:
        arguments = _CALLED_WITH[name]
    elif hook.index is not None:
        arguments = f"index: int, {_GIVEN[hook.kind]}"
    else:
        arguments = _GIVEN[hook.kind]
    wanted = ["self", *filter(None, arguments.split(", "))]
    try:
        inspect.signature(method).bind(*wanted)
    except TypeError as error:
        raise RegisterError(f"{model.__name__}.{name}: must be {name}({', '.join(wanted)}): {error}") from None
