"""The picture of groups: XML that parses, with everything in it, nothing over something else."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

from tests.iommu.world import World, iommu
from vmodel.cli.drawing import draw
from vmodel.iommu import Coverage
from vmodel.iommu.driver import PlatformDevice
from vmodel.pci.topology import Bdf, Function, PortType

SVG = "{http://www.w3.org/2000/svg}"
END, DOWN = PortType.ENDPOINT, PortType.DOWNSTREAM


def big() -> World:
    one = iommu("smmu-v3", params={"platform": {"mmc": 0xF0000}})
    one.covers += [Coverage.segment(1), Coverage.platform("mmc")]
    world = World(one)
    world.topology.add_root(1, 0)
    world.topology.add_root(2, 0)  # an empty one
    world.port("00:01.0", 1)
    world.port("01:00.0", 2, kind=PortType.UPSTREAM)
    for n in range(3):
        world.port(f"02:0{n}.0", n + 3, kind=DOWN, acs=n != 1)
        world.function(f"0{n + 3}:00.0", END)
    world.port("00:02.0", 9)  # nothing behind it
    world.function("0001:00:03.0")
    for function in world.topology.functions():
        world.plug(function, bypass=function.name == "0001:00:03.0")
    world.plug(PlatformDevice("mmc"))
    return world


def boxes(root: ElementTree.Element) -> dict[str, tuple[float, float, float, float, str]]:
    """Place, size and colour of each box by the first line in it."""
    found = {}
    for group in root.iter(f"{SVG}g"):
        rect, text = group.find(f"{SVG}rect"), group.find(f"{SVG}text")
        assert rect is not None
        assert text is not None
        x, y, w, h = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
        found[str(text.text)] = (x, y, w, h, rect.attrib["fill"])
    return found


def test_everything_is_there() -> None:
    world = big()
    root = ElementTree.fromstring(draw(world.system))
    assert root.tag == f"{SVG}svg"
    there = boxes(root)
    names = {f"{function.bdf} {function.name}" for function in world.topology.functions()}
    assert set(there) == names | {"segment 0000", "segment 0001", "segment 0002"}
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    for group in world.system.groups:
        members = ", ".join(endpoint.name for endpoint in group.endpoints)
        assert f"group {group.number} (iommu0): {members}" in texts
    assert len(world.system.groups) == 5
    titles = {title.text for title in root.iter(f"{SVG}title")}
    assert {endpoint.why for endpoint in world.system.endpoints if isinstance(endpoint.source, Function)} <= titles
    world.close()


def test_places_and_colours() -> None:
    world = big()
    root = ElementTree.fromstring(draw(world.system))
    there = boxes(root)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for (_, one), (_, other) in itertools.combinations(there.items(), 2):
        apart = one[0] + one[2] <= other[0] or other[0] + other[2] <= one[0]
        assert apart or one[1] + one[3] <= other[1] or other[1] + other[3] <= one[1]
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h, _ in there.values())
    colours = {e.source: there[f"{e.source.bdf} {e.source.name}"][4] for e in world.system.endpoints
               if isinstance(e.source, Function)}  # fmt: skip
    by_group: dict[object, set[str]] = {}
    for endpoint in world.system.endpoints:
        if isinstance(endpoint.source, Function):
            by_group.setdefault(endpoint.group, set()).add(colours[endpoint.source])
    assert all(len(one) == 1 for one in by_group.values())
    assert len({next(iter(one)) for one in by_group.values()}) == len(by_group)
    world.close()


def test_strange_names(world: World) -> None:
    function = world.topology.add(Function(Bdf(0, 0, 3, 0), name="<a&b \"c\">'d'" + "x" * 50))
    endpoint = world.plug(function)
    endpoint.why = "a <b> & c"
    root = ElementTree.fromstring(draw(world.system))
    assert f"group 0 (iommu0): {function.name}" in [text.text for text in root.iter(f"{SVG}text")]
    assert "a <b> & c" in [title.text for title in root.iter(f"{SVG}title")]


def test_what_the_system_does_not_know(world: World) -> None:
    """A function that is not plugged in yet has no group; a machine may be empty."""
    assert list(boxes(ElementTree.fromstring(draw(world.system)))) == ["segment 0000"]
    world.function("00:03.0")
    there = boxes(ElementTree.fromstring(draw(world.system)))
    assert there["0000:00:03.0 00:03.0"][4] == "#eeeeee"
