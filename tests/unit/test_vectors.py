"""Vectors that a model names by number, checked when its class is made."""

from __future__ import annotations

from typing import Any

import pytest

from vmodel.device import Msi, Msix, PciDevice
from vmodel.pci.bar import MmioBar
from vmodel.regs import RegisterError


class Base(PciDevice):
    vendor_id, device_id, class_code = 0x1234, 1, 0xFF0000
    bar1 = MmioBar(1, size=8192)
    msix = Msix(vectors=3, bar=bar1)
    msi = Msi(vectors=4)


def test_one_that_is_not_there() -> None:
    with pytest.raises(RegisterError, match=r"^Card\.ring, line \d+: msix has no vector 3: it has 0 to 2$"):

        class Card(Base):
            def ring(self) -> None:
                self.msi.fire(3)
                self.msix.fire(3)


@pytest.mark.parametrize("call", ["pending", "withdraw"])
def test_other_calls(call: str) -> None:
    with pytest.raises(RegisterError, match=r"msi has no vector 7: it has 0 to 3"):
        if call == "pending":

            class Pending(Base):
                def ring(self) -> bool:
                    return self.msi.pending(7)

        else:

            class Withdraw(Base):
                def ring(self) -> None:
                    self.msi.withdraw(7)


def test_a_base_whose_vectors_a_subclass_replaces() -> None:
    class Many(Base):
        msix = Msix(vectors=8, bar=Base.bar1)

        def ring(self) -> None:
            self.msix.fire(7)

    with pytest.raises(RegisterError, match=r"Few\.ring, line \d+: msix has no vector 7: it has 0 to 1"):

        class Few(Many):
            msix = Msix(vectors=2, bar=Base.bar1)


def test_what_is_right() -> None:
    """Numbers that are there, that are of something else, that are computed, and code that asks first."""

    class Card(Base):
        def ring(self, other: Any) -> None:
            self.msix.fire(2)
            self.msix.fire()
            other.msix.fire(9)
            self.msix.fire(10 - len("12345678"))

        def ask(self) -> None:
            if self.msix.vectors > 5:
                self.msix.fire(5)

    assert Card.declaration.capabilities["msix"].vectors == 3  # type: ignore[attr-defined]


def test_a_class_whose_parameters_change_its_vectors() -> None:
    class Card(Base):
        @classmethod
        def for_params(cls, params: Any) -> Any:
            return type("Large", (cls,), {"msix": Msix(vectors=16, bar=Base.bar1)})

        def ring(self) -> None:
            self.msix.fire(15)

    assert Card.declaration.capabilities["msix"].vectors == 3  # type: ignore[attr-defined]
