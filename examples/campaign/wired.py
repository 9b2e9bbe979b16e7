"""A PCI-IDIO-16 with a cable from each output to the input of the same number."""

from __future__ import annotations

from vmodel.device import ResetKind
from vmodel.devices.idio16 import Idio16


class Wired(Idio16):
    """The driver reads its outputs back as inputs, and each change raises an interrupt."""

    def on_reset(self, kind: ResetKind) -> None:
        super().on_reset(kind)
        self.on_output = self.set_inputs
