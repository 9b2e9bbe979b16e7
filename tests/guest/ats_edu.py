"""edu as an integrated PCI Express endpoint with a TLB of its own."""

from __future__ import annotations

from vmodel.device import Pcie
from vmodel.devices.edu import Edu
from vmodel.pci.extcaps import Ats, Pasid, Pri


class AtsEdu(Edu):
    """An operating system may switch on ATS, PASIDs and page requests."""

    pcie = Pcie(integrated=True, tlp_prefix=True)
    ats = Ats()
    pasid = Pasid(width=16)
    pri = Pri(pasid=True)
