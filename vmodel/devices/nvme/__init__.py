"""NVMe (base specification 1.4) with the NVM command set."""

from vmodel.devices.nvme.controller import Nvme

__all__ = ["Nvme"]
