"""The PCI-IDIO-16 under Linux's own, unmodified driver."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.conftest import Boot
from vmodel.devices.idio16 import Idio16

pytestmark = pytest.mark.guest


@pytest.mark.parametrize(
    "properties", [{}, {"fds": False}, {"x-no-posted-writes": True}], ids=["fds", "no fds", "no posted writes"]
)
def test_inputs_and_outputs(
    boot: Boot, compiled: Callable[[str], Path], kernel: str, properties: dict[str, object]
) -> None:
    card = Idio16("card")
    seen: list[int] = []
    card.on_output = seen.append
    program = compiled("tests/guest/idio16_check.c")
    guest = boot(card, "./idio16_check", kernel=kernel, modules=["gpio_pci_idio_16"], files=[program], **properties)
    with guest:
        guest.expect(rb"outputs set")
        assert card.outputs == 0xA5C3
        assert seen[-1] == 0xA5C3
        time.sleep(0.3)
        card.set_inputs(0x8421)
        result = guest.wait()
    assert result.status == 0, result.output
    assert b"inputs 8421" in result.output
    assert card.backend.irqs.raised >= 1
    assert card.errors == 0
