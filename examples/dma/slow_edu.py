"""edu with transfers that take time, as on hardware: so that a driver may be removed while one is in flight."""

from __future__ import annotations

from vmodel.devices.edu import BUFFER_SIZE, Edu

#: Seconds that a transfer of the whole buffer takes; a smaller one takes less.
WHOLE_BUFFER = 0.2


class SlowEdu(Edu):
    """edu, with a delay before each transfer."""

    def _transfer(self) -> None:
        self.after(WHOLE_BUFFER * min(self.regs.DMA_COUNT / BUFFER_SIZE, 1), super()._transfer)
