"""What vmodel's own models declare, against what PCI wants of any function."""

from __future__ import annotations

import importlib

import pytest

from vmodel.device import Msi, Msix, Pcie
from vmodel.device.declare import Declaration
from vmodel.devices import BUILTIN, IOMMUS

MODELS = {**BUILTIN, **IOMMUS}


@pytest.fixture(params=MODELS)
def declared(request: pytest.FixtureRequest) -> Declaration:
    module, _, name = MODELS[request.param].partition(":")
    declaration = getattr(importlib.import_module(module), name).declaration
    assert isinstance(declaration, Declaration)
    return declaration


def test_subsystems(declared: Declaration) -> None:
    """7.5.1.2.3: required of all but bridges (class 06h) and some system peripherals (08h, 00h to 03h)."""
    assert declared.identity.subsystem_vendor_id not in (0, 0xFFFF)
    assert declared.identity.subsystem_id


def test_pins(declared: Declaration) -> None:
    """7.5.1.1.13: a device of one function uses INTA only."""
    assert declared.identity.interrupt_pin in (0, 1)


def test_messages(declared: Declaration) -> None:
    """1.3.2.2: on PCI Express an endpoint with interrupts must have MSI or MSI-X, and MSI with 64-bit addresses."""
    parts = declared.capabilities.values()
    messages = [part for part in parts if isinstance(part, Msi | Msix)]
    if any(isinstance(part, Pcie) for part in parts) and declared.pins:
        assert messages
    assert all(part.address_64 for part in messages if isinstance(part, Msi))


def test_prefetchable_memory(declared: Declaration) -> None:
    """1.3.2.2: a BAR that is prefetchable must take 64-bit addresses."""
    assert all(bar.is_64bit for bar in declared.bars if bar.prefetchable)
