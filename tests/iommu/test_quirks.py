"""Isolation and requester ids that depend on vendor and device id, as in Linux (drivers/pci/quirks.c)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.iommu.world import World, iommu
from vmodel.iommu.driver import topmost
from vmodel.pci.config import Identity
from vmodel.pci.ports import ISOLATION, AcsFlags, PortType
from vmodel.pci.quirks import (
    ACS_QUIRKS,
    ALIAS_QUIRKS,
    BRIDGE_QUIRKS,
    BROKEN_SOURCE_VALIDATION,
    acs_quirk,
    alias_quirk,
    bridge_quirk,
    missing_acs,
)
from vmodel.pci.topology import Bdf, Function, dma_aliases

END, CONV, UP, DOWN = PortType.ENDPOINT, PortType.CONVENTIONAL, PortType.UPSTREAM, PortType.DOWNSTREAM
ROOT, INTEGRATED, P2P, PCI = PortType.ROOT_PORT, PortType.INTEGRATED, PortType.PCIE_TO_PCI, PortType.PCI_BRIDGE
ALL = frozenset(range(0x10000))


def ids(vendor: int, device: int, class_code: int = 0, **more: int) -> Identity:
    return Identity(vendor, device, class_code, **more)


# ---- the tables are Linux's ------------------------------------------------------------------------


def _linux() -> dict[tuple[str, int], tuple[frozenset[int], bool]]:
    """(function, vendor) to (device ids, whether the entry is for any), in Linux's order."""
    found = {}
    for line in Path(__file__).with_name("linux_quirks.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        head, _, rest = line.partition(": ")
        origin, vendor = head.split()
        devices: set[int] = set()
        for word in rest.replace("any", "").split():
            first, _, last = word.partition("-")
            devices |= set(range(int(first, 16), int(last or first, 16) + 1))
        found[origin, int(vendor, 16)] = (frozenset(devices), "any" in rest)
    return found


LINUX = _linux()


def _merged(rows: object) -> dict[tuple[str, int], frozenset[int]]:
    found: dict[tuple[str, int], frozenset[int]] = {}
    for row in rows:  # type: ignore[attr-defined]
        found[row.origin, row.vendor] = found.get((row.origin, row.vendor), frozenset()) | row.devices
    return found


def test_each_entry_of_linux_is_there() -> None:
    """And no other one; each table is in Linux's order."""
    broken = {("pci_disable_broken_acs_cap", vendor): devices for vendor, devices in BROKEN_SOURCE_VALIDATION.items()}
    ours = _merged(ACS_QUIRKS) | _merged(ALIAS_QUIRKS) | _merged(BRIDGE_QUIRKS) | broken
    theirs = {key: ALL if is_any else devices for key, (devices, is_any) in LINUX.items()}
    assert ours.keys() == theirs.keys()
    for key, devices in theirs.items():
        assert ours[key] == devices, key
    assert list(_merged(ACS_QUIRKS)) == [key for key in theirs if key[0].startswith("pci_quirk_")]


#: Kinds that the function of Linux checks; for the others: any.
ONLY = {
    "pci_quirk_rciep_acs": {INTEGRATED},
    "pci_quirk_cavium_acs": {ROOT},
    "pci_quirk_al_acs": {ROOT},
    "pci_quirk_intel_pch_acs": {ROOT},
    "pci_quirk_intel_spt_pch_acs": {ROOT},
    "pci_quirk_zhaoxin_pcie_ports_acs": {ROOT, DOWN},
}


@pytest.mark.parametrize("key", [key for key in LINUX if key[0].startswith("pci_quirk_")], ids=lambda key: f"{key[0]}")
def test_who_decides(key: tuple[str, int]) -> None:
    """For each id and kind of port the first row of Linux that applies to it, and for no other id."""
    origin, vendor = key
    devices, is_any = LINUX[key]
    rows = [(o, LINUX[o, v][0], LINUX[o, v][1]) for o, v in LINUX if v == vendor and o.startswith("pci_quirk_")]
    sample = sorted(devices | {d + n for d in devices for n in (-1, 1) if d + n in ALL} | {0, 0xFFFF})
    for kind in (ROOT, DOWN, INTEGRATED, END, CONV):
        for device in sample:
            first = next(
                (o for o, listed, wild in rows if (wild or device in listed) and kind in ONLY.get(o, {kind})), None
            )
            found = acs_quirk(ids(vendor, device), kind, southbridge=True)
            assert (None if found is None else found.origin) == first
            if found is not None and is_any and devices and found.origin == origin:
                assert found.isolates is (device in devices)
            elif found is not None and found.origin != "pci_quirk_intel_spt_pch_acs":
                assert found.isolates is not None


def test_aliases_of_each_id() -> None:
    """(devfn of the function, devfns of its aliases) by Linux's function."""
    vca = tuple(slot << 3 | n for slot in range(32) for n in range(5))
    expected = {
        "quirk_dma_func0_alias": {0x1B: (0x18,), 0x18: ()},
        "quirk_dma_func1_alias": {0x18: (0x19,), 0x19: (), 0x1F: (0x19,)},
        "quirk_mic_x200_dma_alias": {0x00: (0x80, 0x88, 0x93), 0x88: (0x80, 0x93)},
        "quirk_pex_vca_alias": {0x07: vca, 0x00: vca[1:]},
        "quirk_plx_ntb_dma_alias": {0x00: tuple(range(1, 256)), 0xFF: tuple(range(255))},
        "quirk_switchtec_ntb_dma_alias": {0x00: ()},
        "quirk_fixed_dma_alias": {0x70: (8,)},
    }
    entries = [(key, device) for key in LINUX for device in LINUX[key][0] if key[0] in expected]
    assert len(entries) > 100
    for (origin, vendor), device in entries:
        subsystem = {"subsystem_vendor_id": 0x9005, "subsystem_id": 0x02BB}
        quirk = alias_quirk(ids(vendor, device, 0x068000, **subsystem))
        assert quirk is not None and quirk.origin == origin
        for devfn, found in expected[origin].items():
            assert quirk.aliases(devfn) == found
            assert Function(Bdf.of(0, devfn), identity=ids(vendor, device, 0x068000, **subsystem)).dma_aliases == found


@pytest.mark.parametrize(
    "identity",
    [
        ids(0x1180, 0xE833),
        ids(0x8086, 0x9230),
        ids(0x8086, 0x2957),
        ids(0x11F8, 0x8531, 0x058000),  # the management function of a Switchtec
        ids(0x9005, 0x0285, subsystem_vendor_id=0x9005, subsystem_id=0x02BD),
        ids(0x9005, 0x0285, subsystem_vendor_id=0x1014, subsystem_id=0x02BB),
    ],
)
def test_no_alias(identity: Identity) -> None:
    assert alias_quirk(identity) is None
    assert bridge_quirk(identity) is None
    assert not missing_acs(identity)


# ---- groups ----------------------------------------------------------------------------------------


ISOLATED = "00:1c.0|01:00.0|00:1c.1|02:00.0"
TOGETHER = "00:1c.0 01:00.0 00:1c.1 02:00.0"
#: Root ports: ids, the controls that they have enabled, Linux's groups, and the quirk that `why` names.
ROOT_PORTS = [
    (ids(0x8086, 0x1C10), None, ISOLATED, "pci_quirk_intel_pch_acs"),
    (ids(0x8086, 0x1D11), None, TOGETHER, ""),
    (ids(0x8086, 0xA110), ISOLATION, ISOLATED, ""),
    (ids(0x8086, 0xA110), None, TOGETHER, ""),
    (ids(0x177D, 0xAF84), None, ISOLATED, "pci_quirk_cavium_acs"),
    (ids(0x1DEF, 0xE005), None, ISOLATED, "pci_quirk_xgene_acs"),
    (ids(0x17CB, 0x0400), None, ISOLATED, "pci_quirk_qcom_rp_acs"),
    (ids(0x1957, 0x8D81), None, ISOLATED, "pci_quirk_nxp_rp_acs"),
    (ids(0x1C36, 0x0031), None, ISOLATED, "pci_quirk_al_acs"),
    (ids(0x14E4, 0xD714), None, ISOLATED, "pci_quirk_brcm_acs"),
    (ids(0x0014, 0x7A69), None, ISOLATED, "pci_quirk_loongson_acs"),
    (ids(0x1D17, 0x0721), None, ISOLATED, "pci_quirk_zhaoxin_pcie_ports_acs"),
    (ids(0x1D17, 0x0722), ISOLATION, TOGETHER, "pci_quirk_zhaoxin_pcie_ports_acs"),
    (ids(0x111D, 0x80B5), ISOLATION & ~AcsFlags.SOURCE_VALIDATION, ISOLATED, "pci_disable_broken_acs_cap"),
    (ids(0x111D, 0x80B5), ISOLATION & ~AcsFlags.REQUEST_REDIRECT, TOGETHER, ""),
    (ids(0x111D, 0x80B4), ISOLATION & ~AcsFlags.SOURCE_VALIDATION, TOGETHER, ""),
]


@pytest.mark.parametrize(("identity", "acs", "expected", "quirk"), ROOT_PORTS)
def test_root_ports(world: World, identity: Identity, acs: AcsFlags | None, expected: str, quirk: str) -> None:
    for n in (0, 1):
        world.function(f"00:1c.{n}", ROOT, n + 1, identity=identity, acs=acs)
        world.function(f"0{n + 1}:00.0", END)
    assert groups(world) == expect(expected)
    _named(world, quirk)


def groups(world: World) -> set[frozenset[str]]:
    """Names of the members of each group, with all functions plugged in as a guest enumerates them."""
    for function in world.topology.functions():
        world.plug(function)
    assert all(endpoint.group is not None for endpoint in world.system.endpoints)
    return {frozenset(endpoint.name for endpoint in group.endpoints) for group in world.system.groups}


def expect(text: str) -> set[frozenset[str]]:
    return {frozenset(one.split()) for one in text.split("|")}


def _named(world: World, quirk: str) -> None:
    """Some device's reason names the quirk; none has one if there is none."""
    reasons = [endpoint.why for endpoint in world.system.endpoints]
    assert (
        any(f"by a quirk: {quirk} of " in why for why in reasons) if quirk else not any("quirk" in w for w in reasons)
    )


#: Functions 0 and 1 of one device: ids, kind, controls that they have enabled, whether Linux isolates them, the quirk.
DEVICES = [
    (ids(0x8086, 0x1521), END, None, True, "pci_quirk_mf_endpoint_acs"),
    (ids(0x8086, 0x1520), END, None, False, ""),
    (ids(0x8086, 0x1520), INTEGRATED, None, True, "pci_quirk_rciep_acs"),
    (ids(0x8086, 0x1520), CONV, None, False, ""),
    (ids(0x1234, 0x1520), INTEGRATED, None, False, ""),
    (ids(0x19A2, 0x0710), END, None, True, "pci_quirk_mf_endpoint_acs"),
    (ids(0x8088, 0x0100), END, None, True, "pci_quirk_wangxun_nic_acs"),
    (ids(0x8088, 0x0110), END, ISOLATION, False, "pci_quirk_wangxun_nic_acs"),
    (ids(0x1D17, 0x3104), CONV, None, True, "pci_quirk_mf_endpoint_acs"),
    (ids(0x177D, 0xA026), END, None, True, "pci_quirk_mf_endpoint_acs"),
    # Aliases join what ACS isolates.
    (ids(0x1180, 0xE832), END, ISOLATION, False, "quirk_dma_func0_alias"),
    (ids(0x1B4B, 0x9230), END, ISOLATION, False, "quirk_dma_func1_alias"),
    (ids(0x8086, 0x2954), END, ISOLATION, False, "quirk_pex_vca_alias"),
    (ids(0x10B5, 0x87B0), END, ISOLATION, False, "quirk_plx_ntb_dma_alias"),
    (ids(0x10B5, 0x87B2), END, ISOLATION, True, ""),
    (ids(0x8086, 0x2260), END, ISOLATION, False, "quirk_mic_x200_dma_alias"),
]


@pytest.mark.parametrize(("identity", "kind", "acs", "isolated", "quirk"), DEVICES)
def test_functions_of_a_device(
    world: World, identity: Identity, kind: PortType, acs: AcsFlags | None, isolated: bool, quirk: str
) -> None:
    place = "00:03"
    if kind is END:
        world.port("00:01.0", 1)
        place = "01:00"
    for n in (0, 1):
        world.function(f"{place}.{n}", kind, identity=identity, acs=acs)
    expected = f"{place}.0|{place}.1" if isolated else f"{place}.0 {place}.1"
    assert groups(world) == expect(expected + ("|00:01.0" if kind is END else ""))
    _named(world, quirk)


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def one(*args: object) -> World:
        made.append(World(*args))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for world in made:
        world.close()


@pytest.mark.parametrize(("kind", "isolated"), [("amd-vi", True), ("vt-d", False)])
def test_southbridge(make: Callable[..., World], kind: str, isolated: bool) -> None:
    """AMD's isolates its functions in a machine with an AMD IOMMU, as its IVRS table shows (pci_quirk_amd_sb_acs)."""
    world = make(iommu(kind))
    world.function("00:14.0", CONV, identity=ids(0x1002, 0x4385))
    world.function("00:14.2", CONV, identity=ids(0x1002, 0x4383))
    world.function("00:14.4", PCI, 1, identity=ids(0x1002, 0x4384))
    world.function("01:05.0", CONV)
    apart, joined = "00:14.0|00:14.2|00:14.4 01:05.0", "00:14.0 00:14.2 00:14.4 01:05.0"
    assert groups(world) == expect(apart if isolated else joined)
    _named(world, "pci_quirk_amd_sb_acs" if isolated else "")


def test_southbridge_behind_a_port(make: Callable[..., World]) -> None:
    """The quirk is for the root bus only."""
    world = make(iommu("amd-vi"))
    world.port("00:01.0", 1)
    for n in (0, 1):
        world.function(f"01:00.{n}", END, identity=ids(0x1022, 0x7809))
    assert groups(world) == expect("00:01.0|01:00.0 01:00.1")


def test_switch(world: World) -> None:
    """Ports of a switch of Zhaoxin: those that Linux lists isolate without ACS, another one does not with it."""
    world.port("00:01.0", 1)
    world.port("01:00.0", 2, kind=UP)
    for n in (0, 1):
        world.function(f"02:0{n}.0", DOWN, n + 3, identity=ids(0x1D17, 0x0710))
        world.function(f"0{n + 3}:00.0", END)
    assert groups(world) == expect("00:01.0|01:00.0|02:00.0|03:00.0|02:01.0|04:00.0")
    _named(world, "pci_quirk_zhaoxin_pcie_ports_acs")


def test_switch_with_a_port_that_is_not_listed(world: World) -> None:
    world.port("00:01.0", 1)
    world.port("01:00.0", 2, kind=UP)
    for n, device in enumerate((0x0710, 0x0722)):
        world.function(f"02:0{n}.0", DOWN, n + 3, identity=ids(0x1D17, device), acs=ISOLATION)
        world.function(f"0{n + 3}:00.0", END)
    assert groups(world) == expect("00:01.0|01:00.0|02:00.0 03:00.0 02:01.0 04:00.0")
    _named(world, "pci_quirk_zhaoxin_pcie_ports_acs")


# ---- requester ids behind bridges ------------------------------------------------------------------


def seen(function: Function) -> str:
    return str(topmost(function))[5:]


@pytest.mark.parametrize(
    ("identity", "found"),
    [(None, "01:00.0"), *((ids(v, d), "02:00.0") for (o, v), (ds, _) in LINUX.items() for d in ds if "use_pcie" in o)],
)
def test_bridge_that_hides_its_capability(world: World, identity: Identity | None, found: str) -> None:
    world.port("00:01.0", 1)
    world.function("01:00.0", PCI, 2, identity=identity)
    device = world.function("02:05.0", CONV)
    assert seen(device) == found
    assert groups(world) == expect("00:01.0|01:00.0 02:05.0")
    assert f"id of conventional PCI bridge 01:00.0, 0000:{found}" in world.system.endpoints[-1].why
    _named(world, "quirk_use_pcie_bridge_dma_alias" if identity else "")


def test_bridge_that_hides_nothing(world: World) -> None:
    """On the root bus, or on a conventional one, it is what it says."""
    identity = ids(0x1B21, 0x1080)
    world.function("00:1e.0", PCI, 1, identity=identity)
    assert seen(world.function("01:05.0", CONV)) == "00:1e.0"
    world.port("00:01.0", 2)
    world.function("02:00.0", P2P, 3)
    inner = world.function("03:01.0", PCI, 4, identity=identity)
    aliases = [str(alias.bdf)[5:] for alias in dma_aliases(world.function("04:00.0", CONV))]
    assert aliases == ["04:00.0", "03:01.0", "03:00.0"]
    assert not inner.bridge_quirk


def test_bridge_without_alias(world: World) -> None:
    """AST1150: devices behind it keep their ids; without ACS on the way they share a group."""
    world.port("00:01.0", 1)
    world.function("01:00.0", P2P, 2, identity=ids(0x1A03, 0x1150))
    vga, usb = world.function("02:00.0", CONV), world.function("02:01.0", CONV)
    assert (seen(vga), seen(usb)) == ("02:00.0", "02:01.0")
    assert groups(world) == expect("00:01.0|01:00.0 02:00.0 02:01.0")


def test_translation_root(world: World) -> None:
    """ThunderX2: its IOMMU is at the root port below a bridge, whose id no request carries."""
    world.function("00:00.0", PortType.PCI_TO_PCIE, 1)
    world.function("01:00.0", ROOT, 2, identity=ids(0x14E4, 0x9084))
    assert seen(world.function("02:00.0", END)) == "02:00.0"
    with pytest.raises(ValueError, match="must be on a root bus"):
        world.function("01:01.0", ROOT, 3)


def test_bridge_with_an_iommu_at_itself(world: World) -> None:
    world.function("00:00.0", PortType.PCI_TO_PCIE, 1, identity=ids(0x14E4, 0x9000))
    assert seen(world.function("01:00.0", END)) == "01:00.0"
    world.function("00:01.0", PortType.PCI_TO_PCIE, 2)
    assert seen(world.function("02:00.0", END)) == "00:01.0"


def test_ids_of_a_fixed_alias(world: World) -> None:
    """Adaptec 3405: a hidden device of its bus has the DMA engine."""
    world.function("00:1e.0", P2P, 1)
    more = {"subsystem_vendor_id": 0x9005, "subsystem_id": 0x02BB}
    raid = world.function("01:0e.0", CONV, identity=ids(0x9005, 0x0285, **more))
    assert [str(alias.bdf)[5:] for alias in dma_aliases(raid)] == ["01:0e.0", "01:01.0", "01:00.0"]


@pytest.mark.parametrize(
    ("identity", "found"),
    [
        (ids(0x1180, 0xE832), "00:03.0"),  # it uses the alias
        (ids(0x10B5, 0x87B0), "00:03.2"),  # its own requests have its own id
        (ids(0x8086, 0x2954), "00:03.2"),
        (ids(0x8086, 0x2260), "00:03.2"),
    ],
)
def test_id_that_the_iommu_sees(world: World, identity: Identity, found: str) -> None:
    assert seen(world.function("00:03.2", identity=identity)) == found


def test_aliases_that_are_given_count_too(world: World) -> None:
    """As for a Switchtec NTB, whose registers have the proxy ids."""
    ntb = world.function("00:03.0", INTEGRATED, identity=ids(0x11F8, 0x8531, 0x068000), dma_aliases=(0x21, 0x22))
    world.function("00:04.1", INTEGRATED)
    world.function("00:04.0", INTEGRATED, acs=ISOLATION)
    assert ntb.dma_aliases == (0x21, 0x22)
    assert seen(ntb) == "00:03.0"
    assert groups(world) == expect("00:03.0 00:04.1|00:04.0")
    _named(world, "quirk_switchtec_ntb_dma_alias")
