"""Addresses, buses and bridges; requester ids on the way up; ACS."""

from __future__ import annotations

import pytest

from tests.iommu.world import World
from vmodel.pci.topology import (
    ISOLATION,
    AcsFlags,
    Bdf,
    Function,
    PortType,
    Topology,
    acs_on_path,
    bridges_above,
    dma_aliases,
    isolates,
)


def aliases(function: Function) -> list[str]:
    return [str(alias.bdf)[5:] for alias in dma_aliases(function)]


def test_bdf() -> None:
    bdf = Bdf.parse("12Ab:fe:1d.6")
    assert bdf == Bdf(0x12AB, 0xFE, 0x1D, 6)
    assert (str(bdf), bdf.devfn, bdf.rid) == ("12ab:fe:1d.6", 0xEE, 0xFEEE)
    assert Bdf.of(0x12AB, 0xFEEE) == bdf
    assert bdf.slot == Bdf(0x12AB, 0xFE, 0x1D, 0).slot != Bdf(0x12AB, 0xFE, 0x1C, 6).slot
    assert Bdf(0, 1, 0, 0) > Bdf(0, 0, 31, 7)


@pytest.mark.parametrize("text", ["", "00:03.0", "0000:00:20.0", "0000:00:03.8", "0000:00:03.0 ", "0000:00:3.0"])
def test_no_bdf(text: str) -> None:
    with pytest.raises(ValueError, match="PCI address"):
        Bdf.parse(text)


@pytest.mark.parametrize("numbers", [(1 << 16, 0, 0, 0), (0, 256, 0, 0), (0, 0, 32, 0), (0, 0, 0, 8), (-1, 0, 0, 0)])
def test_bdf_out_of_range(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError):
        Bdf(*numbers)


def fill(world: World) -> None:
    world.port("00:1c.0", 1)
    world.port("01:00.0", 2, kind=PortType.UPSTREAM)
    world.port("02:00.0", 3, kind=PortType.DOWNSTREAM)
    world.port("02:01.0", 4, kind=PortType.DOWNSTREAM)
    world.port("04:00.0", 5, kind=PortType.PCIE_TO_PCI)


@pytest.mark.parametrize(
    ("bdf", "kind", "text"),
    [
        ("09:00.0", PortType.ENDPOINT, "no bus 0000:09"),
        ("0001:00:00.0", PortType.ENDPOINT, "no bus 0001:00"),
        ("00:1c.0", PortType.INTEGRATED, "is taken"),
        ("03:01.0", PortType.ENDPOINT, "one device only"),
        ("03:00.0", PortType.INTEGRATED, "root bus"),
        ("02:02.0", PortType.ENDPOINT, "only downstream ports"),
        ("05:01.0", PortType.ENDPOINT, "conventional bus"),
        ("00:02.0", PortType.ROOT_PORT, "needs a secondary bus"),
    ],
)
def test_no_place_for_a_function(world: World, bdf: str, kind: PortType, text: str) -> None:
    fill(world)
    before = list(world.topology.functions())
    with pytest.raises(ValueError, match=text):
        world.function(bdf, kind)
    assert list(world.topology.functions()) == before


@pytest.mark.parametrize(
    ("bdf", "kind", "secondary", "text"),
    [
        ("03:00.0", PortType.ROOT_PORT, 9, "root bus"),
        ("00:02.0", PortType.UPSTREAM, 9, "root port"),
        ("00:02.0", PortType.DOWNSTREAM, 9, "upstream port"),
        ("05:02.0", PortType.PCIE_TO_PCI, 9, "conventional bus"),
        ("03:00.0", PortType.PCI_TO_PCIE, 9, "must be on a conventional bus"),
        ("00:02.0", PortType.ROOT_PORT, 0, "come after"),
        ("00:02.0", PortType.ROOT_PORT, 4, "there already"),
        ("00:02.0", PortType.INTEGRATED, 9, "has no secondary bus"),
    ],
)
def test_no_place_for_a_bridge(world: World, bdf: str, kind: PortType, secondary: int, text: str) -> None:
    fill(world)
    before = list(world.topology.functions())
    with pytest.raises(ValueError, match=text):
        world.function(bdf, kind, secondary)
    assert list(world.topology.functions()) == before
    assert (0, 9) not in world.topology


def test_order_and_removal(world: World) -> None:
    fill(world)
    device = world.function("03:00.0", PortType.ENDPOINT)
    world.function("00:02.0")
    topology = world.topology
    names = ["00:02.0", "00:1c.0", "01:00.0", "02:00.0", "03:00.0", "02:01.0", "04:00.0"]
    assert [f.name for f in topology.functions()] == names
    assert [f.name for f in bridges_above(device)] == ["02:00.0", "01:00.0", "00:1c.0"]
    port = topology[Bdf(0, 2, 0, 0)]
    with pytest.raises(ValueError, match="on its secondary bus"):
        topology.remove(port)
    topology.remove(device)
    with pytest.raises(ValueError, match="not there"):
        topology.remove(device)
    with pytest.raises(ValueError, match="in no topology"):
        _ = device.home
    topology.remove(port)
    assert (0, 3) not in topology
    assert port.bdf not in topology
    world.port("02:00.0", 3, kind=PortType.DOWNSTREAM)  # the address and the bus are free again


def test_roots() -> None:
    topology = Topology()
    for place in ((1, 0), (0, 0x80), (0, 0)):
        topology.add_root(*place)
    assert [(bus.segment, bus.number) for bus in topology.roots] == [(0, 0), (0, 0x80), (1, 0)]
    with pytest.raises(ValueError, match="there already"):
        topology.add_root(1, 0)


def test_virtual_functions(world: World) -> None:
    world.port("00:1c.0", 1)
    physical = world.function("01:00.0", PortType.ENDPOINT)
    stranger = Function(Bdf(0, 1, 0, 1), PortType.ENDPOINT)
    with pytest.raises(ValueError, match="physical function"):
        world.function("01:00.2", PortType.ENDPOINT, physical=stranger)
    virtual = world.function("01:00.2", PortType.ENDPOINT, physical=physical)
    # Their ids run on over device numbers, as with ARI (SR-IOV 2.1.2): a port leads to them all.
    world.function("01:01.0", PortType.ENDPOINT, physical=physical)
    assert not physical.multifunction
    assert not virtual.multifunction
    assert virtual.has_acs
    with pytest.raises(ValueError, match="has virtual functions"):
        world.topology.remove(physical)


def test_own_id_through_ports(world: World) -> None:
    fill(world)
    assert aliases(world.function("03:00.0", PortType.ENDPOINT)) == ["03:00.0"]


def test_ids_behind_bridges(world: World) -> None:
    fill(world)
    world.port("05:02.0", 6, kind=PortType.PCI_BRIDGE)
    world.port("00:1e.0", 7, kind=PortType.PCI_BRIDGE)
    world.port("07:00.0", 8, kind=PortType.PCI_TO_PCIE)
    conventional = PortType.CONVENTIONAL
    assert aliases(world.function("05:03.0", conventional)) == ["05:03.0", "05:00.0"]
    assert aliases(world.function("06:03.1", conventional)) == ["06:03.1", "05:02.0", "05:00.0"]
    assert aliases(world.function("07:03.0", conventional)) == ["07:03.0", "00:1e.0"]
    assert aliases(world.function("08:00.0", PortType.ENDPOINT)) == ["08:00.0", "07:00.0", "00:1e.0"]
    assert [a.by.name for a in dma_aliases(world.topology[Bdf(0, 6, 3, 1)])] == ["06:03.1", "05:02.0", "04:00.0"]


def test_aliases_of_its_own(world: World) -> None:
    assert aliases(world.function("00:03.2", dma_aliases=(0x18, 0x41))) == ["00:03.2", "00:03.0", "00:08.1"]


@pytest.mark.parametrize("missing", [*ISOLATION])
def test_acs_needs_each_bit(world: World, missing: AcsFlags) -> None:
    port = world.port("00:1c.0", 1)
    assert port.has_acs
    port.acs = ISOLATION & ~missing
    assert not port.has_acs
    # What it does not offer is hard-wired (PCIe 7.7.11.2; Linux pci_acs_flags_enabled).
    port.acs_offered = ISOLATION & ~missing
    assert port.has_acs


def test_acs_of_bits_that_do_not_matter(world: World) -> None:
    port = world.port("00:1c.0", 1)
    port.acs = AcsFlags.TRANSLATION_BLOCKING | AcsFlags.EGRESS_CONTROL | AcsFlags.DIRECT_TRANSLATED
    assert not port.has_acs


def test_acs_of_kinds(world: World) -> None:
    fill(world)
    bare = world.port("00:1d.0", 8, acs=False)
    assert not bare.has_acs  # a single function, but a port
    pcie_to_pci = world.topology[Bdf(0, 4, 0, 0)]
    assert pcie_to_pci.acs == ISOLATION
    assert not pcie_to_pci.has_acs
    assert not world.function("05:01.0", PortType.CONVENTIONAL, acs=ISOLATION).has_acs
    single = world.function("08:00.0", PortType.ENDPOINT)
    assert single.has_acs  # there is nobody to reach
    second = world.function("08:00.1", PortType.ENDPOINT)
    assert single.multifunction
    assert not single.has_acs
    second.acs = ISOLATION
    assert second.has_acs
    assert not single.has_acs
    world.topology.remove(second)
    assert single.has_acs


def test_path(world: World) -> None:
    fill(world)
    root, up, down, other = (
        world.topology[Bdf.parse(f"0000:{b}")] for b in ("00:1c.0", "01:00.0", "02:00.0", "02:01.0")
    )
    assert acs_on_path(down)
    other.acs = None
    assert not isolates(down)  # docs/decisions/0004
    assert not acs_on_path(down)
    assert acs_on_path(up)
    other.acs, root.acs = ISOLATION, None
    assert isolates(down)
    assert not acs_on_path(down)
    assert not acs_on_path(up)
