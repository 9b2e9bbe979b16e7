"""Which devices share a group, for each kind of IOMMU, in each order of hot-plug; and the reasons that are printed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pydantic
import pytest

from tests.iommu.world import World, group_of, iommu
from vmodel.iommu import Coverage, Endpoint
from vmodel.iommu.driver import PlatformDevice, Source
from vmodel.iommu.drivers import KINDS
from vmodel.pci.topology import ISOLATION, Bdf, Function, PortType

END, CONV, UP, DOWN = PortType.ENDPOINT, PortType.CONVENTIONAL, PortType.UPSTREAM, PortType.DOWNSTREAM
P2P, PCI_BRIDGE = PortType.PCIE_TO_PCI, PortType.PCI_BRIDGE
#: Kinds whose groups follow the topology alone, for these devices.
BY_TOPOLOGY = ["vt-d", "amd-vi", "smmu-v3", "riscv", "virtio-iommu"]
Groups = set[frozenset[str]]


@pytest.fixture(params=BY_TOPOLOGY)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make() -> Iterator[Callable[..., World]]:
    made: list[World] = []

    def one(*args: object, **kwargs: object) -> World:
        made.append(World(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield one
    for world in made:
        world.close()


def groups(world: World) -> Groups:
    """Names of the members of each group, and of each device that has none as "-NAME"."""
    system = world.system
    alone = [frozenset((f"-{e.name}",)) for e in system.endpoints if e.group is None]
    return {frozenset(e.name for e in group.endpoints) for group in system.groups} | set(alone)


def expect(*sets: str) -> Groups:
    return {frozenset(one.split()) for one in sets}


def plug_all(world: World) -> dict[str, Endpoint]:
    """All functions, as a guest enumerates them."""
    return {f.name: world.plug(f) for f in world.topology.functions()}


# ---- by topology -----------------------------------------------------------------------------------


def root_bus(world: World) -> Groups:
    world.function("00:02.0")
    world.function("00:03.0", acs=ISOLATION)
    world.function("00:03.1")
    world.function("00:03.2")
    return expect("00:02.0", "00:03.0", "00:03.1 00:03.2")


def multi_function_with_acs(world: World) -> Groups:
    world.function("00:03.0", acs=ISOLATION)
    world.function("00:03.1", acs=ISOLATION)
    return expect("00:03.0", "00:03.1")


def root_ports(world: World) -> Groups:
    for n, acs in enumerate((True, True, False)):
        world.port(f"00:0{n + 1}.0", n + 1, acs=acs)
        world.function(f"0{n + 1}:00.0", END)
    return expect("00:01.0", "01:00.0", "00:02.0", "02:00.0", "00:03.0 03:00.0")


def root_ports_of_one_device(world: World) -> Groups:
    for n, acs in enumerate((False, False, True)):
        world.port(f"00:1c.{n}", n + 1, acs=acs)
        world.function(f"0{n + 1}:00.0", END)
    return expect("00:1c.0 01:00.0 00:1c.1 02:00.0", "00:1c.2", "03:00.0")


def switch(world: World) -> Groups:
    _switch(world, (True, True))
    return expect("00:01.0", "01:00.0", "02:00.0", "02:01.0", "03:00.0", "04:00.0")


def _switch(world: World, acs: tuple[bool, bool], root: bool = True) -> None:
    world.port("00:01.0", 1, acs=root)
    world.port("01:00.0", 2, kind=UP)
    for n, one in enumerate(acs):
        world.port(f"02:0{n}.0", n + 3, kind=DOWN, acs=one)
        world.function(f"0{n + 3}:00.0", END)


def switch_without_acs(world: World) -> Groups:
    _switch(world, (False, False))
    return expect("00:01.0", "01:00.0", "02:00.0 02:01.0 03:00.0 04:00.0")


def switch_with_a_port_without_acs(world: World) -> Groups:
    _switch(world, (True, False))
    return expect("00:01.0", "01:00.0", "02:00.0 02:01.0 03:00.0 04:00.0")


def switch_below_a_port_without_acs(world: World) -> Groups:
    _switch(world, (True, True), root=False)
    return expect("00:01.0 01:00.0 02:00.0 02:01.0 03:00.0 04:00.0")


def pcie_to_pci(world: World) -> Groups:
    world.port("00:01.0", 1)
    world.function("01:00.0", P2P, 2)
    world.function("02:01.0", CONV)
    world.function("02:02.0", PCI_BRIDGE, 3)
    world.function("03:01.0", CONV)
    world.function("00:02.0")
    return expect("00:01.0", "01:00.0 02:01.0 02:02.0 03:01.0", "00:02.0")


def legacy_bridge(world: World) -> Groups:
    world.function("00:1e.0", PCI_BRIDGE, 1)
    world.function("01:01.0", CONV)
    world.function("01:02.0", CONV)
    world.function("00:02.0")
    return expect("00:1e.0 01:01.0 01:02.0", "00:02.0")


def virtual_functions(world: World) -> Groups:
    world.port("00:01.0", 1)
    physical = world.function("01:00.0", END)
    for n in (1, 2):
        world.function(f"01:00.{n}", END, physical=physical)
    return expect("00:01.0", "01:00.0", "01:00.1", "01:00.2")


def virtual_functions_below_a_port_without_acs(world: World) -> Groups:
    world.port("00:01.0", 1, acs=False)
    physical = world.function("01:00.0", END)
    world.function("01:00.1", END, physical=physical)
    return expect("00:01.0 01:00.0 01:00.1")


def ricoh(world: World) -> Groups:
    world.port("00:01.0", 1)
    world.function("01:00.0", END, acs=ISOLATION)
    world.function("01:00.1", END, acs=ISOLATION, dma_aliases=(0,))
    world.function("01:00.2", END, acs=ISOLATION, dma_aliases=(0,))
    world.function("01:00.3", END, acs=ISOLATION)
    return expect("00:01.0", "01:00.0 01:00.1 01:00.2", "01:00.3")


def phantom(world: World) -> Groups:
    """Both use the id of a function that does not exist."""
    world.function("00:03.0", acs=ISOLATION, dma_aliases=(0x1F,))
    world.function("00:03.2", acs=ISOLATION, dma_aliases=(0x1F,))
    world.function("00:03.3", acs=ISOLATION)
    return expect("00:03.0 00:03.2", "00:03.3")


MACHINES = [
    root_bus,
    multi_function_with_acs,
    root_ports,
    root_ports_of_one_device,
    switch,
    switch_without_acs,
    switch_with_a_port_without_acs,
    switch_below_a_port_without_acs,
    pcie_to_pci,
    legacy_bridge,
    virtual_functions,
    virtual_functions_below_a_port_without_acs,
    ricoh,
    phantom,
]


@pytest.mark.parametrize("machine", MACHINES)
def test_groups(make: Callable[..., World], kind: str, machine: Callable[[World], Groups]) -> None:
    world = make(iommu(kind))
    expected = machine(world)
    plug_all(world)
    assert groups(world) == expected


@pytest.mark.parametrize("machine", MACHINES)
def test_in_any_order(make: Callable[..., World], machine: Callable[[World], Groups]) -> None:
    """Unplugged and plugged again in any order (some 40 of them), the groups are the same."""
    world = make(iommu())
    expected = machine(world)
    functions = list(world.topology.functions())
    orders = list(itertools.permutations(functions))
    for order in orders[:: max(1, len(orders) // 37)]:
        endpoints = [world.plug(function) for function in order]
        assert groups(world) == expected, order
        for endpoint in endpoints:
            world.system.remove(endpoint)
        assert not world.system.groups


@pytest.mark.parametrize("machine", MACHINES)
def test_bridges_that_no_iommu_covers(make: Callable[..., World], machine: Callable[[World], Groups]) -> None:
    """They do no DMA: only what is behind them counts, and it is grouped as before."""
    one = iommu()
    world = make(one)
    expected = machine(world)
    functions = list(world.topology.functions())
    devices = {f.name for f in functions if not f.kind.is_bridge}
    one.covers = [Coverage.pci(f.bdf, f.bdf) for f in functions if f.name in devices]
    plug_all(world)
    left = {group & devices for group in expected} - {frozenset()}
    assert {group for group in groups(world) if not next(iter(group)).startswith("-")} == left


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_group_mf(make: Callable[..., World], kind: str, order: tuple[int, ...]) -> None:
    world = make(iommu(kind), group_mf=True)
    world.port("00:01.0", 1)
    physical = world.function("01:00.0", END, acs=ISOLATION)
    functions = [
        physical,
        world.function("01:00.1", END, acs=ISOLATION),
        world.function("01:00.2", END, physical=physical),
    ]
    for n in order:
        world.plug(functions[n])
    assert groups(world) == expect("01:00.0 01:00.1", "01:00.2")
    assert any(e.why.endswith("are functions of one device (group_mf)") for e in world.system.endpoints)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_group_mf_of_one_device(world: World, order: tuple[int, ...]) -> None:
    """One function's bit joins those of its device, in whatever order they come, and no other device's."""
    functions = [world.function(f"00:03.{n}", acs=ISOLATION, group_mf=n == 1) for n in range(3)]
    for n in order:
        world.plug(functions[n])
    for n in range(2):
        world.plug(world.function(f"00:04.{n}", acs=ISOLATION))
    assert groups(world) == expect("00:03.0 00:03.1 00:03.2", "00:04.0", "00:04.1")


WHY: list[tuple[Callable[[World], Groups], str, str]] = [
    (root_bus, "00:02.0", "on the root bus, with a requester id of its own"),
    (root_bus, "00:03.2", "00:03.2 and 00:03.1 are functions of one device, without ACS"),
    (root_ports, "01:00.0", "isolated by ACS up to the root"),
    (root_ports, "03:00.0", "no ACS on the path from root port 00:03.0 to the root, as 00:03.0"),
    (
        root_ports_of_one_device,
        "02:00.0",
        "no ACS on the path from root port 00:1c.1 to the root; 00:1c.1 and 00:1c.0 are",
    ),
    (root_ports_of_one_device, "00:1c.1", "00:1c.1 and 00:1c.0 are functions of one device, without ACS"),
    (switch_without_acs, "02:01.0", "02:01.0 and 02:00.0 are ports of one switch, of which one has no ACS"),
    (switch_with_a_port_without_acs, "04:00.0", "no ACS on the path from switch downstream port 02:01.0 to the root"),
    (switch_below_a_port_without_acs, "04:00.0", "no ACS on the path from root port 00:01.0 to the root, as 00:01.0"),
    (pcie_to_pci, "03:01.0", "its DMA carries the id of PCIe-to-PCI bridge 01:00.0, 0000:02:00.0, as 01:00.0"),
    (legacy_bridge, "01:02.0", "its DMA carries the id of conventional PCI bridge 00:1e.0, 0000:00:1e.0, as 00:1e.0"),
    (virtual_functions, "01:00.2", "a virtual function, isolated by ACS"),
    (ricoh, "01:00.2", "01:00.2 and 01:00.0 have a requester id in common (DMA alias)"),
]


@pytest.mark.parametrize(("machine", "name", "why"), WHY)
def test_why(make: Callable[..., World], machine: Callable[[World], Groups], name: str, why: str) -> None:
    world = make(iommu())
    machine(world)
    assert plug_all(world)[name].why.startswith(why)


def test_why_when_the_bridge_comes_last(world: World) -> None:
    port = world.port("00:01.0", 1, acs=False)
    world.plug(world.function("01:00.0", END))
    assert world.plug(port).why == "01:00.0: no ACS on the path from root port 00:01.0 to the root, as 01:00.0"


def test_one_that_would_join_two(world: World) -> None:
    """A group cannot be two: whoever owns one of them would reach the other's memory."""
    world.device("00:03.0", acs=ISOLATION)
    world.device("00:03.1", acs=ISOLATION)
    both = world.plug(world.function("00:03.2", acs=ISOLATION, dma_aliases=(0x18, 0x19)))
    assert both.group is None
    assert both.why.startswith("no isolation: it belongs to groups 0 and 1: 00:03.2 and 00:03.0 have a")
    assert groups(world) == expect("00:03.0", "00:03.1", "-00:03.2")


def test_one_beside_a_device_without_group(world: World) -> None:
    """Nobody shares with what is not translated, be it the same IOMMU's."""
    world.device("00:03.0", acs=ISOLATION)
    world.device("00:03.1", acs=ISOLATION)
    world.plug(world.function("00:03.2", acs=ISOLATION, dma_aliases=(0x18, 0x19)))
    last = world.plug(world.function("00:03.3", acs=ISOLATION, dma_aliases=(0x1A,)))
    text = "00:03.3 and 00:03.2 have a requester id in common (DMA alias), which has no group"
    assert (last.group, last.why) == (None, f"no isolation: {text}")


def test_bridge_of_another_iommu(make: Callable[..., World]) -> None:
    """It does no DMA: what is behind it may have its own IOMMU."""
    a, b = iommu("vt-d", "a"), iommu("vt-d", "b")
    world = make(a, b)
    port = world.plug(world.port("00:01.0", 1, acs=False))
    behind = world.plug(world.function("01:00.0", END), iommu=b)
    assert (group_of(port).iommu, group_of(behind).iommu) == (a, b)
    assert behind.why == "no ACS on the path from root port 00:01.0 to the root; the first one there"


def test_a_second_function_comes(world: World) -> None:
    """Without ACS it reaches the first, which had nobody to reach before."""
    first, _ = world.device("00:03.0")
    assert first.why == "on the root bus, with a requester id of its own"
    second, _ = world.device("00:03.1")
    assert second.group is first.group


# ---- what an IOMMU covers -------------------------------------------------------------------------


def test_coverage() -> None:
    part = Coverage.pci(Bdf(0, 1, 0, 0), Bdf(0, 1, 31, 7))
    ins: list[Source] = [Function(Bdf(0, 1, 0, 0)), Function(Bdf(0, 1, 31, 7))]
    outs: list[Source] = [
        Function(Bdf(0, 0, 31, 7)),
        Function(Bdf(0, 2, 0, 0)),
        Function(Bdf(1, 1, 0, 0)),
        PlatformDevice("uart"),
    ]
    assert all(source in part for source in ins)
    assert not any(source in part for source in outs)
    assert PlatformDevice("uart") in Coverage.platform("uart", "dma")
    assert PlatformDevice("gpu") not in Coverage.platform("uart", "dma")
    assert Function(Bdf(1, 255, 31, 7)) in Coverage.segment(1)
    for first, last in ((Bdf(0, 2, 0, 0), Bdf(0, 1, 0, 0)), (Bdf(0, 1, 0, 0), Bdf(1, 2, 0, 0))):
        with pytest.raises(ValueError, match="not a range of one segment"):
            Coverage.pci(first, last)


def test_several_iommus(make: Callable[..., World]) -> None:
    """Different ones, each with a part; numbers are unique over the machine."""
    vtd, arm = iommu("vt-d", "a"), iommu("smmu-v3", "b", params={"platform": {"uart": 5}})
    vtd.covers = [Coverage.pci(Bdf(0, 0, 0, 0), Bdf(0, 0, 3, 7))]
    arm.covers = [Coverage.segment(1), Coverage.platform("uart")]
    world = make(vtd, arm)
    world.topology.add_root(1, 0)
    sources: list[Source] = [
        world.function("00:03.0"),
        world.function("0001:00:03.0"),
        PlatformDevice("uart"),
        world.function("00:04.0"),
        PlatformDevice("gpu"),
    ]
    endpoints = [world.plug(source) for source in sources]
    assert [e.iommu and e.iommu.name for e in endpoints] == ["a", "b", "b", None, None]
    assert [e.group and e.group.number for e in endpoints] == [0, 1, 2, None, None]
    assert [e.why for e in endpoints[3:]] == ["no IOMMU covers it"] * 2
    assert endpoints[2].why == "it has an id of its own"
    world.dmas["00:04.0"].write(0x1000, b"straight")
    assert world.ram[0x1000:0x1008] == b"straight"
    with pytest.raises(OSError, match="already"):
        world.system.add_iommu(iommu(name="a"))
    with pytest.raises(OSError, match="already"):
        world.plug(sources[0])


def test_numbers_are_not_used_again(world: World) -> None:
    first, _ = world.device("00:03.0")
    world.system.remove(first)
    second, _ = world.device("00:04.0")
    assert group_of(second).number == 1
    assert world.system["00:04.0"] is second
    with pytest.raises(KeyError):
        _ = world.system["00:03.0"]


def test_no_group_shared_over_iommus(make: Callable[..., World]) -> None:
    a, b = iommu("vt-d", "a"), iommu("vt-d", "b")
    world = make(a, b)
    functions = [world.function(f"00:03.{n}") for n in range(4)]
    first = world.plug(functions[0])
    foreign = world.plug(functions[1], iommu=b)
    assert first.group is not None
    assert foreign.group is None
    text = "00:03.1 and 00:03.0 are functions of one device, without ACS, which is behind a"
    assert foreign.why == f"no isolation: {text}"
    outside = world.plug(functions[2], bypass=True)
    assert (outside.iommu, outside.group, outside.why) == (None, None, "it bypasses the IOMMUs")
    last = world.plug(functions[3])
    assert last.group is None
    assert "which is behind b" in last.why


def test_neighbour_that_no_iommu_covers(world: World) -> None:
    world.plug(world.function("00:03.0"), bypass=True)
    second, _ = world.device("00:03.1")
    assert second.group is None
    assert second.why.endswith("without ACS, which no IOMMU covers")


# ---- by kind --------------------------------------------------------------------------------------


def endpoint_of(world: World, name: str) -> Endpoint:
    return world.system[name]


@pytest.mark.parametrize(
    ("kind", "device", "behind", "text"),
    [
        ("vt-d", 0x0018, 0x0200, "0000:02:00.0"),
        ("amd-vi", 0x0018, 0x0200, "0000:02:00.0"),
        ("smmu-v3", 0x0018, 0x0200, "stream 0x200"),
        ("riscv", 0x0018, 0x0200, "device id 0x200"),
        ("virtio-iommu", 0x0018, 0x0200, "endpoint 0x200"),
        ("power-pe", 0, 2, "PE 0000:02"),
    ],
)
def test_requester_ids(make: Callable[..., World], kind: str, device: int, behind: int, text: str) -> None:
    world = make(iommu(kind))
    world.port("00:01.0", 1)
    world.function("01:00.0", P2P, 2)
    world.function("02:02.0", CONV)
    world.function("00:03.0")
    endpoints = plug_all(world)
    assert endpoints["00:03.0"].requester_id == device
    assert endpoints["02:02.0"].requester_id == behind
    assert world.system.iommus[0].driver.describe_id(behind) == text


def test_vtd_namespace(make: Callable[..., World]) -> None:
    """An ACPI device whose requests carry a PCI function's address is in that one's group."""
    one = iommu("vt-d", params={"namespace": {"I2C0": "0000:00:15.0", "UART0": "0000:f0:00.0"}})
    one.covers.append(Coverage.platform("I2C0", "UART0", "SPI0"))
    world = make(one)
    world.device("00:15.0")
    i2c, uart, spi = (world.plug(PlatformDevice(name)) for name in ("I2C0", "UART0", "SPI0"))
    assert i2c.why == "same requester id as 00:15.0: 0000:00:15.0"
    assert groups(world) == expect("00:15.0 I2C0", "UART0", "-SPI0")
    assert uart.requester_id == 0xF000
    assert spi.why == "no isolation: Intel VT-d has no id for it"


def test_amd_aliases(make: Callable[..., World]) -> None:
    params = {"aliases": {"0000:00:03.0": "0000:00:05.0"}, "acpi_hid": {"AMDI0020": "0000:00:05.0"}, "device_table": 64}
    one = iommu("amd-vi", params=params)
    one.covers.append(Coverage.platform("AMDI0020"))
    world = make(one)
    for bdf in ("00:03.0", "00:05.0", "00:07.0", "00:08.0"):
        world.device(bdf)
    world.plug(PlatformDevice("AMDI0020"))
    assert groups(world) == expect("00:03.0 00:05.0 AMDI0020", "00:07.0", "-00:08.0")
    assert endpoint_of(world, "00:05.0").why == "same requester id as 00:03.0: 0000:00:05.0"
    assert endpoint_of(world, "00:08.0").why == "no isolation: it has no entry in the device table of 64 entries"
    with pytest.raises(pydantic.ValidationError, match="each segment has a table of its own"):
        KINDS["amd-vi"]({"aliases": {"0000:00:03.0": "0001:00:05.0"}})


def test_amd_alias_of_what_is_behind_a_bridge(make: Callable[..., World]) -> None:
    """The table has it by the device's own address or by that of the bridge."""
    for alias in ("0000:02:02.0", "0000:02:00.0"):
        world = make(iommu("amd-vi", params={"aliases": {alias: "0000:00:05.0"}}))
        world.port("00:01.0", 1)
        world.function("01:00.0", P2P, 2)
        world.function("02:02.0", CONV)
        assert plug_all(world)["02:02.0"].requester_id == 0x28


def test_smmu_streams(make: Callable[..., World]) -> None:
    streams = [
        {"first_rid": 0x18, "count": 8, "first_stream": 0x100},
        {"first_rid": 0x20, "count": 1, "first_stream": 0x100},  # the same as of 00:03.0
        {"segment": 1, "first_rid": 0x18, "first_stream": 0},
    ]
    one = iommu("smmu-v3", params={"streams": streams, "platform": {"mmc": 0x107, "dma": 1 << 16}, "stream_bits": 16})
    one.covers.append(Coverage.platform("mmc", "dma"))
    world = make(one)
    for bdf in ("00:03.0", "00:03.7", "00:04.0", "00:05.0"):
        world.device(bdf, acs=ISOLATION)
    for name in ("mmc", "dma"):
        world.plug(PlatformDevice(name))
    assert groups(world) == expect("00:03.0 00:04.0", "00:03.7 mmc", "-00:05.0", "-dma")
    assert endpoint_of(world, "00:04.0").why == "same requester id as 00:03.0: stream 0x100"
    assert endpoint_of(world, "dma").why == "no isolation: it has no stream id of 16 bits"


@pytest.mark.parametrize(
    ("levels", "extended", "bits"),
    [(1, True, 6), (2, True, 15), (3, True, 24), (1, False, 7), (2, False, 16), (3, False, 24)],
)
def test_riscv_directory(make: Callable[..., World], levels: int, extended: bool, bits: int) -> None:
    """Linux riscv_iommu_get_dc: ids beyond what the levels of the device directory resolve have no context."""
    last = (1 << bits) - 1
    params = {"directory_levels": levels, "extended": extended, "platform": {"mmc": last, "dma": last + 1}}
    one = iommu("riscv", params=params)
    one.covers.append(Coverage.platform("mmc", "dma"))
    world = make(one)
    mmc, dma = world.plug(PlatformDevice("mmc")), world.plug(PlatformDevice("dma"))
    assert (mmc.requester_id, mmc.why) == (last, "it has an id of its own")
    assert (dma.group, dma.why) == (None, f"no isolation: it has no device id of {bits} bits")


def test_riscv_device_ids(make: Callable[..., World]) -> None:
    devices = [
        {"first_rid": 0x18, "count": 2, "first_device": 0x100},
        {"first_rid": 0x20, "count": 1, "first_device": 0x101},
    ]
    world = make(iommu("riscv", params={"devices": devices}))
    for bdf in ("00:03.0", "00:03.1", "00:04.0", "00:05.0"):
        world.device(bdf, acs=ISOLATION)
    assert groups(world) == expect("00:03.0", "00:03.1 00:04.0", "-00:05.0")
    assert endpoint_of(world, "00:04.0").why == "same requester id as 00:03.1: device id 0x101"


def test_virtio_endpoints(make: Callable[..., World]) -> None:
    one = iommu("virtio-iommu", params={"first_endpoint": 0x1000, "mmio": {"net0": 0x1018, "net1": 7}})
    one.covers.append(Coverage.platform("net0", "net1", "net2"))
    world = make(one)
    device, _ = world.device("00:03.0")
    for name in ("net0", "net1", "net2"):
        world.plug(PlatformDevice(name))
    assert device.requester_id == 0x1018
    assert groups(world) == expect("00:03.0 net0", "net1", "-net2")
    assert endpoint_of(world, "net2").why == "no isolation: VIOT assigns no endpoint id to it"


def test_power(make: Callable[..., World]) -> None:
    """A PE for each bus, whatever ACS says; below a bridge to PCI one for all buses; one for a bridge without PEs."""
    one = iommu("power-pe", params={"without_pe": [1]})
    one.covers += [Coverage.segment(1), Coverage.platform("vas")]
    world = make(one)
    world.topology.add_root(1, 0)
    pcie_to_pci(world)
    world.port("00:04.0", 4, acs=False)
    world.function("04:00.0", END)
    world.function("0001:00:01.0")
    world.function("0001:00:02.0", PortType.ROOT_PORT, 1)
    world.function("0001:01:00.0", END)
    plug_all(world)
    vas = world.plug(PlatformDevice("vas"))
    assert groups(world) == expect(
        "00:01.0 00:02.0 00:04.0",
        "01:00.0",
        "02:01.0 02:02.0 03:01.0",
        "04:00.0",
        "0001:00:01.0 0001:00:02.0 0001:01:00.0",
        "-vas",
    )
    assert endpoint_of(world, "03:01.0").why == "bus 0000:02 is one PE"
    assert endpoint_of(world, "0001:01:00.0").why == "the host bridge of segment 0001 has no PEs"
    assert vas.why == "no isolation: it is not behind a host bridge"


def test_power_and_a_neighbour_outside(make: Callable[..., World]) -> None:
    world = make(iommu("power-pe"))
    world.plug(world.function("00:01.0"), bypass=True)
    second, _ = world.device("00:02.0")
    assert second.why == "no isolation: bus 0000:00 is one PE, which no IOMMU covers"


def test_pamu(make: Callable[..., World]) -> None:
    """Partitioned controllers: as the topology has it, by LIODN.  Platform devices: by LIODN."""
    liodns = {"0000:00:01.0": 10, "0000:00:02.0": 11, "0000:00:02.1": 12, "0000:00:04.0": 10, "dma0": 20, "dma1": 20}
    one = iommu("pamu", params={"liodns": liodns | {"fman": 21}})
    one.covers.append(Coverage.platform("dma0", "dma1", "fman", "sec"))
    world = make(one)
    for bdf in ("00:01.0", "00:02.0", "00:02.1", "00:03.0", "00:04.0"):
        world.device(bdf)
    for name in ("dma0", "dma1", "fman", "sec"):
        world.plug(PlatformDevice(name))
    assert groups(world) == expect("00:01.0 00:04.0", "00:02.0 00:02.1", "dma0 dma1", "fman", "-00:03.0", "-sec")
    assert endpoint_of(world, "00:04.0").why == "same requester id as 00:01.0: LIODN 10"
    assert endpoint_of(world, "00:03.0").why == "no isolation: it has no LIODN: params.liodns has no '0000:00:03.0'"


def test_pamu_with_one_liodn_for_a_controller(make: Callable[..., World]) -> None:
    one = iommu("pamu", params={"partitioned": False, "liodns": {"0000": 10, "0001": 11, "0002": 10, "dma0": 20}})
    one.covers += [Coverage.segment(1), Coverage.segment(2), Coverage.platform("dma0")]
    world = make(one)
    world.topology.add_root(1, 0)
    world.topology.add_root(2, 0)
    world.port("00:01.0", 1)
    for bdf in ("00:02.0", "01:00.0", "0001:00:02.0", "0002:00:02.0"):
        world.function(bdf, END)
    plug_all(world)
    world.plug(PlatformDevice("dma0"))
    assert groups(world) == expect("00:01.0 00:02.0 01:00.0 0002:00:02.0", "0001:00:02.0", "dma0")
    assert endpoint_of(world, "01:00.0").why == "its PCI controller has one LIODN for all functions"


def test_order_for_people(world: World) -> None:
    """Endpoints as a guest enumerates them, whatever order they came in."""
    port = world.port("00:04.0", 1)
    for source in (world.function("00:05.0"), PlatformDevice("b"), PlatformDevice("a"), port):
        world.plug(source)
    world.device("01:00.0", END)
    assert [e.name for e in world.system.settle()] == ["00:04.0", "01:00.0", "00:05.0", "a", "b"]
