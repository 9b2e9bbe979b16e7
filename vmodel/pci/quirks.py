"""Functions whose isolation or requester ids differ from what their config space says.

The facts are those of Linux 7.3, drivers/pci/quirks.c; each row names the function of Linux that it is from. For ACS
the first row that applies decides, as in pci_dev_specific_acs_enabled. Linux itself enables the controls of Intel's
PCHs when an IOMMU is used (pci_dev_specific_enable_acs), which is taken to succeed. The proxy ids of a Switchtec NTB
are in its registers: they are given as `Function(dma_aliases=...)`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from vmodel.pci.ports import ISOLATION, AcsFlags, PortType

if TYPE_CHECKING:
    from vmodel.pci.config import Identity


def _ids(*parts: int | range) -> frozenset[int]:
    return frozenset(n for part in parts for n in (part if isinstance(part, range) else (part,)))


def _to(first: int, last: int) -> range:
    return range(first, last + 1)


_ANY = frozenset(range(0x10000))
_ROOT_PORT = frozenset((PortType.ROOT_PORT,))
_PORTS = frozenset((PortType.ROOT_PORT, PortType.DOWNSTREAM))


# ---- ACS -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AcsQuirk:
    """Functions that isolate as with the controls `provides` enabled, whatever their ACS capability says.

    `origin`: the function of Linux; `provides` None: the controls of their capability; `kinds`: the port types that it
    applies to, empty: any; `southbridge`: only to functions of a multi-function device on a root bus, in a machine with
    an IVRS table; `relevant`: the controls that matter there.
    """

    origin: str
    vendor: int
    devices: frozenset[int]
    provides: AcsFlags | None = ISOLATION
    kinds: frozenset[PortType] = frozenset()
    southbridge: bool = False
    relevant: AcsFlags = ISOLATION

    @property
    def isolates(self) -> bool | None:
        """Whether `provides` has all that isolation needs; None: the capability decides."""
        wanted = ISOLATION & self.relevant
        return None if self.provides is None else self.provides & wanted == wanted


_REDIRECT = AcsFlags.REQUEST_REDIRECT | AcsFlags.COMPLETION_REDIRECT
#: Controls that have no meaning for endpoints with several functions, or that they need only with peer-to-peer.
_MULTI_FUNCTION = ISOLATION | AcsFlags.TRANSLATION_BLOCKING | AcsFlags.DIRECT_TRANSLATED


def _southbridge(vendor: int, devices: frozenset[int]) -> AcsQuirk:
    relevant = _REDIRECT | AcsFlags.EGRESS_CONTROL | AcsFlags.DIRECT_TRANSLATED
    return AcsQuirk("pci_quirk_amd_sb_acs", vendor, devices, _REDIRECT, southbridge=True, relevant=relevant)


def _endpoints(vendor: int, *devices: int | range) -> AcsQuirk:
    return AcsQuirk("pci_quirk_mf_endpoint_acs", vendor, _ids(*devices), _MULTI_FUNCTION)


_INTEL_NICS = _ids(
    *(_to(0x105E, 0x1060), 0x10D9),  # 82571
    *(0x10A7, 0x10A9, 0x10D6),  # 82575
    *(0x10C9, _to(0x10E6, 0x10E8), 0x150A, 0x150D, 0x1518, 0x1526),  # 82576
    *(0x10C6, 0x10DB, 0x10DD, 0x10E1, 0x10F1),  # 82598
    *(_to(0x10F7, 0x10FC), 0x1507, 0x1514, 0x151C, 0x1529, 0x152A, 0x154D, 0x154F, 0x1551, 0x1558),  # 82599 and others
    *(0x1509, _to(0x150E, 0x1511), 0x1516, 0x1527),  # 82580
    _to(0x1521, 0x1524),  # I350
    *(0x15B7, 0x15B8),  # I219
)
#: Root ports of chipsets without an ACS capability, which other registers isolate.
_INTEL_PCH = _ids(
    _to(0x3B42, 0x3B51),  # Ibex Peak
    _to(0x1C10, 0x1C1F),  # Cougar Point
    _to(0x1E10, 0x1E1F),  # Panther Point
    _to(0x8C10, 0x8C1F),  # Lynx Point-H
    _to(0x9C10, 0x9C1B),  # Lynx Point-LP
    _to(0x9C90, 0x9C9B),  # Wildcat Point
    range(0x1D10, 0x1D20, 2),  # Patsburg
    _to(0x8D10, 0x8D1E),  # Wellsburg
    range(0x8C90, 0x8CA0, 2),  # Lynx Point, 9 series
)
#: Root ports whose ACS control register is at offset 8 of the capability, not 6. Linux uses it there.
_INTEL_SPT = _ids(
    _to(0x9D10, 0x9D1B),  # 7th and 8th generation, mobile
    *(_to(0xA110, 0xA11F), _to(0xA167, 0xA16A)),  # Sunrise Point
    *(_to(0xA290, 0xA29F), _to(0xA2E7, 0xA2EE)),  # Union Point
)
#: Layerscape LX2.
_NXP = _ids(
    *(_to(first, first + 3) for first in (0x8D80, 0x8D88, 0x8D90, 0x8D98)),
    *(_to(first, first + 1) for first in (0x8DA0, 0x8DA8, 0x8DB0, 0x8DB8)),
)
_LOONGSON = _ids(0x3C09, 0x3C19, 0x3C29, *range(0x7A09, 0x7A6A, 0x10))
_WANGXUN = _ids(_to(0x0100, 0x010F), 0x1001, 0x2001, 0x5010, 0x5025, 0x5040, 0x5110, 0x5125, 0x5140)
_ZHAOXIN = _ids(_to(0x0710, 0x071E), 0x0721, _to(0x0723, 0x0752))

ACS_QUIRKS = (
    _southbridge(0x1002, _ids(_to(0x4383, 0x4385), 0x4399, 0x439C, 0x439D)),  # ATI
    _southbridge(0x1022, _ids(0x7809, 0x780F)),  # AMD
    _endpoints(0x1924, 0x0903, 0x0923, 0x0A03),  # Solarflare
    _endpoints(0x8086, *_INTEL_NICS),
    # Intel's integrated endpoints: VT-d 3.16 allows them peer-to-peer requests only with translated addresses.
    AcsQuirk("pci_quirk_rciep_acs", 0x8086, _ANY, kinds=frozenset((PortType.INTEGRATED,))),
    AcsQuirk("pci_quirk_qcom_rp_acs", 0x17CB, _ids(0x0111, 0x0115, 0x0120, 0x0400, 0x0401)),  # Qualcomm
    AcsQuirk("pci_quirk_qcom_rp_acs", 0x1DBF, _ids(0x0401)),  # HXT
    AcsQuirk("pci_quirk_intel_pch_acs", 0x8086, _INTEL_PCH, kinds=_ROOT_PORT),
    AcsQuirk("pci_quirk_intel_spt_pch_acs", 0x8086, _INTEL_SPT, None, _ROOT_PORT),
    _endpoints(0x19A2, 0x0710),  # Emulex
    _endpoints(0x10DF, 0x0720),
    AcsQuirk("pci_quirk_cavium_acs", 0x177D, _ids(_to(0xA000, 0xA7FF), 0xAF84, 0xB884), kinds=_ROOT_PORT),
    _endpoints(0x177D, 0xA026, 0xA059, 0xA060),
    AcsQuirk("pci_quirk_xgene_acs", 0x10E8, _ids(0xE004)),  # AppliedMicro
    AcsQuirk("pci_quirk_xgene_acs", 0x1DEF, _ids(_to(0xE005, 0xE00C))),  # Ampere
    _endpoints(0x14E4, 0x16D7, _to(0x1750, 0x1752), _to(0x1760, 0x1763)),  # Broadcom
    AcsQuirk("pci_quirk_brcm_acs", 0x14E4, _ids(0xD714)),
    AcsQuirk("pci_quirk_loongson_acs", 0x0014, _LOONGSON),
    AcsQuirk("pci_quirk_al_acs", 0x1C36, _ids(0x0031), kinds=_ROOT_PORT),  # Annapurna Labs
    _endpoints(0x1D17, 0x3038, 0x3104, 0x9083),  # Zhaoxin
    AcsQuirk("pci_quirk_nxp_rp_acs", 0x1957, _NXP),
    # Linux trusts no other port of Zhaoxin, and no other function of Wangxun, even with an ACS capability.
    AcsQuirk("pci_quirk_zhaoxin_pcie_ports_acs", 0x1D17, _ZHAOXIN, kinds=_PORTS),
    AcsQuirk("pci_quirk_zhaoxin_pcie_ports_acs", 0x1D17, _ANY - _ZHAOXIN, AcsFlags.NONE, _PORTS),
    AcsQuirk("pci_quirk_wangxun_nic_acs", 0x8088, _WANGXUN),
    AcsQuirk("pci_quirk_wangxun_nic_acs", 0x8088, _ANY - _WANGXUN, AcsFlags.NONE),
)

#: Switches of IDT with a source validation that Linux does not use, nor ask for (pci_disable_broken_acs_cap).
BROKEN_SOURCE_VALIDATION = {0x111D: _ids(0x8090, 0x80B5)}


def acs_quirk(identity: Identity, kind: PortType, southbridge: bool) -> AcsQuirk | None:
    """The quirk that decides whether a function isolates; None: its capability does (pci_dev_specific_acs_enabled).

    `southbridge`: it is what a row with `southbridge` asks for.
    """
    for quirk in _of(ACS_QUIRKS, identity):
        if (not quirk.kinds or kind in quirk.kinds) and (southbridge or not quirk.southbridge):
            return quirk
    return None


def missing_acs(identity: Identity) -> AcsFlags:
    """Controls that a function offers and that Linux treats as not offered (pci_disable_broken_acs_cap)."""
    broken = identity.device_id in BROKEN_SOURCE_VALIDATION.get(identity.vendor_id, ())
    return AcsFlags.SOURCE_VALIDATION if broken else AcsFlags.NONE


# ---- requester ids -------------------------------------------------------------------------------


@dataclass(frozen=True)
class AliasQuirk:
    """Functions whose DMA carries other devfns of their bus: `devfns` of the function's own one.

    `proxy`: these are of devices on the other side of an NTB; its own DMA has its own id. `class_code`, `subsystems`
    (vendor, device): which functions with those ids it applies to; None and empty: all.
    """

    origin: str
    vendor: int
    devices: frozenset[int]
    devfns: Callable[[int], Iterable[int]]
    proxy: bool = False
    class_code: int | None = None
    subsystems: frozenset[tuple[int, int]] = frozenset()

    def aliases(self, devfn: int) -> tuple[int, ...]:
        """The devfns, without the function's own."""
        return tuple(alias for alias in self.devfns(devfn) if alias != devfn)

    def applies(self, identity: Identity) -> bool:
        """Whether the rest of a function's identity is as the quirk asks."""
        subsystem = (identity.subsystem_vendor_id, identity.subsystem_id)
        right_class = self.class_code is None or identity.class_code >> 8 == self.class_code
        return right_class and (not self.subsystems or subsystem in self.subsystems)


def _function_0(vendor: int, *devices: int | range) -> AliasQuirk:
    return AliasQuirk("quirk_dma_func0_alias", vendor, _ids(*devices), lambda devfn: (devfn & ~7,))


def _function_1(vendor: int, *devices: int | range) -> AliasQuirk:
    return AliasQuirk("quirk_dma_func1_alias", vendor, _ids(*devices), lambda devfn: (devfn & ~7 | 1,))


def _switchtec(vendor: int, *devices: int | range) -> AliasQuirk:
    """Bridges of class "other"; which devfns depends on their registers."""
    return AliasQuirk("quirk_switchtec_ntb_dma_alias", vendor, _ids(*devices), lambda devfn: (), True, 0x0680)


_LANES = (0x28, 0x36, 0x52, 0x68, 0x84)
_SWITCHTEC = _ids(
    *(_to(first, first + 5) for first in range(0x8531, 0x8572, 0x10)),  # generation 3: PFX, PSX, PAX, PFXL, PFXI
    *(model + lanes for model in (0x4000, 0x4100, 0x4200) for lanes in (0, *_LANES)),  # 4
    *(model + lanes for model in (0x4300, 0x4400, 0x4500) for lanes in _LANES[:3]),
    *(model + lanes for model in range(0x5000, 0x5600, 0x100) for lanes in (0, *_LANES)),  # 5
)

ALIAS_QUIRKS = (
    _function_0(0x1180, 0xE476, 0xE832),  # Ricoh
    _function_0(0x6766, 0x3D40, 0x3D41),  # Glenfly
    _function_1(0x1B4B, 0x9120, 0x9123, 0x9125, 0x9128, 0x9130, 0x9170, 0x9172, 0x917A),  # Marvell SATA
    _function_1(0x1B4B, 0x9182, 0x9183, 0x91A0, 0x9215, 0x9220, 0x9230, 0x9235),
    _function_1(0x1103, 0x0642, 0x0645),  # HighPoint
    _function_1(0x197B, 0x2392),  # JMicron
    _function_1(0x1C28, 0x0122),  # Lite-On
    # Adaptec 3405, 3805: a hidden device 1 has the DMA engine.
    AliasQuirk(
        *("quirk_fixed_dma_alias", 0x9005, _ids(0x0285), lambda devfn: (1 << 3,)),
        subsystems=frozenset(((0x9005, 0x02BB), (0x9005, 0x02BC))),
    ),
    # Intel MIC x200, VCA: NTBs.
    AliasQuirk(
        *("quirk_mic_x200_dma_alias", 0x8086, _ids(0x2260, 0x2264)),
        lambda devfn: (0x10 << 3, 0x11 << 3, 0x12 << 3 | 3),
        True,
    ),
    AliasQuirk(
        *("quirk_pex_vca_alias", 0x8086, _ids(_to(0x2954, 0x2956), _to(0x2958, 0x295A))),
        lambda devfn: (slot << 3 | function for slot in range(32) for function in range(5)),
        True,
    ),
    AliasQuirk("quirk_plx_ntb_dma_alias", 0x10B5, _ids(0x87B0, 0x87B1), lambda devfn: range(256), True),
    _switchtec(0x11F8, *_SWITCHTEC),
    _switchtec(0x1055, _to(0x1001, 0x1006), 0x1008),  # EFAR
)


def alias_quirk(identity: Identity) -> AliasQuirk | None:
    """The quirk by which a function's DMA carries other devfns."""
    return next((quirk for quirk in _of(ALIAS_QUIRKS, identity) if quirk.applies(identity)), None)


class BridgeEffect(enum.Enum):
    """What a bridge does with the requester ids of the devices behind it."""

    #: They carry (secondary bus, devfn 0): a bridge from PCIe to PCI, which may hide that it is one.
    SECONDARY_ALIAS = "secondary alias"
    #: They carry the bridge's id: one from PCI to PCIe or to PCI.
    OWN_ID = "own id"
    #: They stay as they are.
    NO_ALIAS = "no alias"
    #: The IOMMU is at this bridge: what is above does not change what it sees.
    TRANSLATION_ROOT = "translation root"


@dataclass(frozen=True)
class BridgeQuirk:
    """Bridges with an effect that their kind does not have."""

    origin: str
    vendor: int
    devices: frozenset[int]
    effect: BridgeEffect


BRIDGE_QUIRKS = (
    *(
        BridgeQuirk("quirk_use_pcie_bridge_dma_alias", vendor, devices, BridgeEffect.SECONDARY_ALIAS)
        for vendor, devices in (
            (0x1B21, _ids(0x1080)),  # ASMedia ASM1083, ASM1085
            (0x10E3, _ids(0x8113)),  # Tundra
            (0x1283, _ids(0x8892, 0x8893)),  # ITE
            (0x8086, _ids(0x244E)),  # Intel 82801
        )
    ),
    # Broadcom Vulcan, Cavium ThunderX2
    BridgeQuirk("quirk_bridge_cavm_thrx2_pcie_root", 0x14E4, _ids(0x9000, 0x9084), BridgeEffect.TRANSLATION_ROOT),
    BridgeQuirk("quirk_aspeed_pci_bridge_no_alias", 0x1A03, _ids(0x1150), BridgeEffect.NO_ALIAS),  # AST1150
)


def bridge_quirk(identity: Identity) -> BridgeQuirk | None:
    """The quirk of a bridge."""
    return next(iter(_of(BRIDGE_QUIRKS, identity)), None)


class _ForIds(Protocol):
    @property
    def vendor(self) -> int: ...
    @property
    def devices(self) -> frozenset[int]: ...


_R = TypeVar("_R", bound=_ForIds)


def _of(rows: Iterable[_R], identity: Identity) -> Iterable[_R]:
    return (row for row in rows if row.vendor == identity.vendor_id and identity.device_id in row.devices)
