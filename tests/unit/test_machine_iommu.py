"""Machine files with IOMMUs, bridges and groups: what becomes of them, and a line for each mistake."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmodel.errors import Access, ConfigError, DmaFault, Reason
from vmodel.iommu.domain import DomainType
from vmodel.machine import Machine, parse
from vmodel.machine.schema import coverage, number
from vmodel.span import GiB, KiB, MiB, Span

MACHINE = '[machine]\nname = "m"\n'
IOMMU = '[[iommu]]\nname = "iommu0"\nkind = "vt-d"\n'
EDU = '[[device]]\nname = "edu0"\nmodel = "edu"\naddress = "0000:00:03.0"\n'
GROUP = '[[group]]\ndevice = "edu0"\ndomain = "paging"\n'


def bridge(name: str, kind: str, address: str, secondary: int, more: str = "") -> str:
    head = f'[[bridge]]\nname = "{name}"\nkind = "{kind}"\naddress = "{address}"\n'
    return f"{head}secondary = {secondary}\n{more}\n"


def edu(name: str, address: str, more: str = "") -> str:
    return f'[[device]]\nname = "{name}"\nmodel = "edu"\naddress = "{address}"\n{more}\n'


def mapping(iova: object = '"0x1000"', gpa: object = 0, size: object = '"4K"', prot: str = '"rw"') -> str:
    return f"[[group.mapping]]\niova = {iova}\ngpa = {gpa}\nsize = {size}\nprot = {prot}\n"


def machine(text: str) -> Machine:
    return parse(MACHINE + text, Path("m.toml"))


def lines(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        machine(text)
    said = str(caught.value).splitlines()
    assert all(line.startswith("m.toml: ") for line in said)
    return [line.removeprefix("m.toml: ") for line in said]


def with_memory(made: Machine, name: str = "edu0", size: int = 1 * MiB) -> int:
    """Memory for a device, as a client would give it; the fd."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
    made.devices[name].memory.map(0, size, fd=fd)
    made.devices[name].config.write(4, b"\x06\x00")
    return fd


# ---- what is right --------------------------------------------------------------------------------


def test_a_paging_domain_translates_what_is_listed() -> None:
    made = machine(IOMMU + EDU + GROUP + mapping('"0x4000_0000"', '"64K"', '"8K"') + mapping('"2G"', 0, 4096, '"r"'))
    fd = with_memory(made)
    dma, faults = made.devices["edu0"].dma, made.system.iommus[0].faults
    dma.write(0x4000_0FFE, b"abcd")
    assert os.pread(fd, 4, 64 * KiB + 0xFFE) == b"abcd"
    assert dma.read(2 * GiB, 4) == bytes(4)
    for iova, access, reason in (
        (0x4000_2000, "read", Reason.NOT_MAPPED),
        (0x1000, "write", Reason.NOT_MAPPED),
        (2 * GiB, "write", Reason.PERMISSION),
        (1 << 50, "read", Reason.INPUT_WIDTH),
    ):
        with pytest.raises(DmaFault) as caught:
            dma.read(iova, 1) if access == "read" else dma.write(iova, b"x")
        (record,) = faults.drain()
        assert (caught.value.reason, caught.value.iova) == (reason, iova)
        assert (record.reason, record.iova, record.requester, record.access) == (
            reason,
            iova,
            "edu0",
            Access[access.upper()],
        )
        assert (record.requester_id, record.group, record.domain, record.iommu) == (0x18, 0, "DMA-FQ", "iommu0")
    made.close()
    os.close(fd)


@pytest.mark.parametrize(("domain", "reaches"), [("identity", True), ("blocked", False)])
def test_identity_and_blocked(domain: str, reaches: bool) -> None:
    made = machine(IOMMU + EDU + f'[[group]]\ndevice = "edu0"\ndomain = "{domain}"\n')
    fd = with_memory(made)
    try:
        assert made.devices["edu0"].dma.read(0, 4) == bytes(4) and reaches
    except DmaFault as fault:
        assert fault.reason is Reason.BLOCKED and not reaches
    assert len(made.system.iommus[0].faults) == (0 if reaches else 1)
    made.close()
    os.close(fd)


def test_without_a_group_table_it_is_identity() -> None:
    made = machine(IOMMU + EDU)
    group = made.system["edu0"].group
    assert group is not None and group.domain.type is DomainType.IDENTITY
    made.close()


@pytest.mark.parametrize(("more", "why"), [('iommu = "none"', "it bypasses the IOMMUs"), ("", "no IOMMU covers it")])
def test_a_device_that_no_iommu_covers(more: str, why: str) -> None:
    covers = 'covers = ["0000:00:04.0"]\n' if not more else ""
    made = machine(IOMMU + covers + EDU + more)
    endpoint = made.system["edu0"]
    assert (endpoint.iommu, endpoint.group, endpoint.why) == (None, None, why)
    fd = with_memory(made)
    made.devices["edu0"].dma.write(0, b"x")  # as it is
    made.close()
    os.close(fd)


def test_several_iommus_and_a_choice() -> None:
    text = (
        IOMMU
        + 'covers = ["0000:00:03.0-0000:00:04.7"]\ncapabilities = { strict = true, page_sizes = ["4K"] }\n'
        + '[[iommu]]\nname = "other"\nkind = "smmu-v3"\nparams = { stream_bits = 16 }\n'
        + EDU
        + edu("b", "0000:00:04.0", 'iommu = "other"')
        + edu("c", "0000:00:05.0")
    )
    made = machine(text)
    groups = {name: made.system[name].group for name in ("edu0", "b", "c")}
    assert {name: group.iommu.name for name, group in groups.items() if group} == {
        "edu0": "iommu0",
        "b": "other",
        "c": "other",
    }
    can = made.system.iommus[0].capabilities
    assert (can.strict, can.page_sizes) == (True, frozenset((4 * KiB,)))
    made.close()


def test_group_mf() -> None:
    model = EDU + edu("f1", "0000:00:03.1")
    for policy in ("true", "false"):
        made = parse(f"{MACHINE}group_mf = {policy}\n{IOMMU}{model}", Path("m.toml"))
        assert made.system["edu0"].group is made.system["f1"].group  # edu has no ACS: together in any case
        made.close()


@pytest.mark.parametrize(
    ("vendor", "acs", "apart", "why"),
    [
        # QEMU makes a PCIe endpoint on the root bus an integrated one, and Linux knows that Intel's are isolated.
        ("0x8086, 0x0001", "", True, "by a quirk: pci_quirk_rciep_acs of f1"),
        ("0x1234, 0x0001", "", False, "f1 and f0 are functions of one device, without ACS"),
        ("0x1180, 0xe832", "acs = Acs()", False, "(DMA alias), by a quirk: quirk_dma_func0_alias of f1"),
        ("0x1180, 0xe833", "acs = Acs()", True, "on the root bus, with a requester id of its own"),
    ],
)
def test_quirks_by_the_ids_of_a_model(tmp_path: Path, vendor: str, acs: str, apart: bool, why: str) -> None:
    text = f"    vendor_id, device_id = {vendor}\n    class_code = 0xff0000\n    pcie = Pcie()\n    {acs}\n"
    imports = (
        "from vmodel.device import PciDevice\nfrom vmodel.pci.express import Pcie\nfrom vmodel.pci.extcaps import Acs\n"
    )
    (tmp_path / "card.py").write_text(f"{imports}class Card(PciDevice):\n{text}")
    devices = [edu(f"f{n}", f"0000:00:03.{n}").replace('"edu"', '"card.py:Card"') for n in (0, 1)]
    made = parse(MACHINE + IOMMU + "".join(devices), tmp_path / "m.toml")
    groups = [made.system[name].group for name in ("f0", "f1")]
    assert (groups[0] is not groups[1]) is apart
    assert made.system["f1"].why.endswith(why)
    made.close()


def test_qemu_arguments_of_bridges(tmp_path: Path) -> None:
    text = (
        bridge("rp0", "root-port", "0000:00:04.0", 1)
        + bridge("rp1", "root-port", "0000:00:05.0", 4, "acs = false")
        + bridge("b0", "pcie-to-pci", "0000:01:00.0", 2)
        + bridge("b1", "pci-bridge", "0000:02:01.0", 3)
        + edu("x", "0000:03:02.0")
        + edu("y", "0000:04:00.0")
        + edu("z", "0000:04:00.1")
    )
    made = machine(text)
    args = made.qemu_args(tmp_path)
    devices = [json.loads(args[n + 1]) for n, arg in enumerate(args) if arg == "-device"]
    assert [(d["id"], d["driver"], d["bus"], d["addr"], d.get("multifunction")) for d in devices] == [
        ("rp0", "pcie-root-port", "pcie.0", "4.0", None),
        ("b0", "pcie-pci-bridge", "rp0", "0.0", None),
        ("b1", "pci-bridge", "b0", "1.0", None),
        ("rp1", "ioh3420", "pcie.0", "5.0", None),
        ("x", "vfio-user-pci", "b1", "2.0", None),
        ("y", "vfio-user-pci", "rp1", "0.0", True),
        ("z", "vfio-user-pci", "rp1", "0.1", None),
    ]
    assert len({d["chassis"] for d in devices if "chassis" in d}) == 2
    made.close()


@pytest.mark.parametrize(
    ("text", "value"),
    [(4096, 4096), ("4096", 4096), ("4K", 4096), ("0x1_000", 4096), ("2M", 2 * MiB), ("1T", 1024 * GiB), ("0", 0)],
)
def test_numbers(text: object, value: int) -> None:
    assert number(text) == value


@given(st.one_of(st.text(), st.floats(), st.booleans(), st.none(), st.integers()))
def test_numbers_are_numbers_or_value_errors(text: object) -> None:
    try:
        assert 0 <= number(text) < 1 << 64
    except ValueError as error:
        assert "must be" in str(error)


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("0000", "0000:00:00.0", "0000:ff:1f.7"),
        ("0001:02", "0001:02:00.0", "0001:02:1f.7"),
        ("0000:00:03.0", "0000:00:03.0", "0000:00:03.0"),
        ("0000:00:03.0-0000:01:1f.7", "0000:00:03.0", "0000:01:1f.7"),
    ],
)
def test_coverage(text: str, first: str, last: str) -> None:
    assert tuple(map(str, coverage(text))) == (first, last)


@given(st.text(alphabet="0123456789abcdef:.-", max_size=30))
def test_coverage_is_addresses_or_a_value_error(text: str) -> None:
    try:
        first, last = coverage(text)
        assert first <= last and first.segment == last.segment
    except ValueError as error:
        assert re.match("must be a segment|runs backwards", str(error))


# ---- what is wrong --------------------------------------------------------------------------------

RP0 = bridge("rp0", "root-port", "0000:00:04.0", 1)
COVERS = 'must be a segment "0000", a bus "0000:01", an address "0000:00:03.0", or two with "-" between'
APERTURE = "(pages of 0x1000 bytes, aperture 0x0..0xffffffffffff)"

WRONG = {
    # [[iommu]]
    '[[iommu]]\nname = "a"\n': 'iommu[0].kind: is missing, as kind = "vt-d"',
    '[iommu]\nname = "a"\n': "iommu: {'name': 'a'}: must be written [[iommu]], in two brackets, as there may be "
    "several",
    IOMMU.replace("vt-d", "vtd"): "iommu[0].kind: 'vtd': did you mean 'vt-d'? "
    "Kinds are vt-d, amd-vi, smmu-v3, riscv, power-pe, pamu, virtio-iommu",
    IOMMU.replace("vt-d", "vtd") + 'address = "0000:00:02.0"\n': "iommu[0].kind: 'vtd': did you mean 'vt-d'? "
    "Kinds are vt-d, amd-vi, smmu-v3, riscv, power-pe, pamu, virtio-iommu",
    IOMMU + "cover = []\n": "iommu[0].cover: unknown key: did you mean 'covers'?",
    IOMMU + 'covers = ["0000:00"]\ncapabilities = { page_sizes = ["3K"] }\n': "iommu[0].capabilities: "
    "page sizes must be powers of two of at least 4 KiB",
    IOMMU + 'covers = ["x"]\n': f"iommu[0].covers[0]: 'x': {COVERS}",
    IOMMU + 'covers = ["0000:00:04.0-0000:00:03.0"]\n': "iommu[0].covers[0]: '0000:00:04.0-0000:00:03.0': "
    "runs backwards or over two segments",
    IOMMU.replace("vt-d", "pamu")
    + "params = { liodns = { a = -1 } }\n": "iommu[0].params.liodns.a: -1: input should be greater than or equal to 0",
    IOMMU.replace("vt-d", "smmu-v3") + "params = { platform = { a = 0x1_0000_0000 } }\n": "iommu[0].params.platform.a: "
    "4294967296: input should be less than 4294967296",
    IOMMU + "params = { namespce = {} }\n": "iommu[0].params.namespce: unknown key: did you mean 'namespace'?",
    IOMMU
    + "params = { ats = true }\n": "iommu[0].params.ats: is for an IOMMU that a guest drives: give it an address, "
    "or leave this out",
    IOMMU + 'address = "0000:00:02.0"\nparams = { scalable = true }\ncapabilities = { input_bits = 39 }\n'
    "": "iommu[0].capabilities: input_bits 39: a VT-d unit with scalable mode needs at least 48",
    IOMMU + "capabilities = { stricct = true }\n": "iommu[0].capabilities.stricct: unknown key: did you mean 'strict'?",
    IOMMU + "capabilities = { pasid_bits = 21 }\n": "iommu[0].capabilities: pasid_bits must be from 0 to 20, not 21",
    IOMMU + 'capabilities = { aperture = ["8K", "4K"] }\n': "iommu[0].capabilities: aperture: runs backwards",
    IOMMU + EDU + 'iommu = "iommu1"\n': "device[0].iommu: 'iommu1' is no [[iommu]]: iommu0; or \"none\"",
    EDU + 'iommu = "iommu1"\n': "device[0].iommu: 'iommu1' is no [[iommu]]: there is no [[iommu]]; or \"none\"",
    IOMMU + EDU.replace("edu0", "iommu0"): "device[0].name: 'iommu0' is the name of iommu[0] already: "
    "give each its own",
    IOMMU.replace("vt-d", "pamu")
    + 'address = "0000:00:02.0"\n': "iommu[0].address: no guest can drive an IOMMU of kind "
    "pamu, only virtio-iommu, vt-d: leave the address out",
    IOMMU
    + 'address = "0000:00:02.0"\n'
    + IOMMU.replace("iommu0", "b")
    + 'address = "0000:00:05.0"\n': "iommu[1].address: "
    "a guest can drive one vt-d only, and 'iommu0' is one: leave one of the addresses out",
    IOMMU.replace("vt-d", "riscv")
    + "capabilities = { input_bits = 40 }\n": "iommu[0].capabilities: input_bits must be 39, 48 or 57 "
    "(Sv39, Sv48, Sv57), not 40",
    RP0 + IOMMU + 'address = "0000:01:00.0"\n': "iommu[0].address: '0000:01:00.0': an IOMMU must be on bus 00",
    IOMMU + 'address = "0000:00:02.0"\n' + EDU + GROUP: "group[0].device: 'edu0' is behind 'iommu0', which the guest "
    "drives",
    # [[bridge]]
    bridge("b", "root_port", "0000:00:04.0", 1): "bridge[0].kind: 'root_port': input should be 'root-port', "
    "'switch-upstream', 'switch-downstream', 'pcie-to-pci' or 'pci-bridge'",
    bridge("b", "root-port", "0000:00:04.0", 0): "bridge[0].secondary: 0: input should be greater than or equal to 1",
    bridge("b", "root-port", "0000:00:04.0", 2): "bridge[0].secondary: 2: the firmware numbers the bus behind 'b' 1: "
    "buses in order of the bridges' addresses",
    RP0 + bridge("b", "root-port", "0000:01:00.0", 2): "bridge[1].address: 0000:01:00.0: a root port must be on a "
    "root bus",
    RP0 + edu("x", "0000:01:01.0"): "device[0].address: 0000:01:01.0: a conventional PCI device must have device "
    "number 00: a root port leads to one device only",
    bridge("b", "switch-downstream", "0000:00:04.0", 1): "bridge[0].address: 0000:00:04.0: a switch downstream port "
    "must be behind an upstream port",
    bridge("b", "pcie-to-pci", "0000:00:04.0", 1, "acs = true"): "bridge[0].acs: QEMU's PCIe-to-PCI bridge has no "
    "ACS: only root ports can have acs = true",
    RP0 + edu("x", "0000:02:00.0"): "device[0].address: '0000:02:00.0': there is no bus 02: "
    "add a [[bridge]] with secondary = 2",
    RP0 + edu("x", "0000:00:04.0"): "device[0].address: '0000:00:04.0' is taken by 'rp0': give each device its own",
    # [[group]]
    EDU + GROUP: "group[0].device: 'edu0' is in no group: no IOMMU covers it",
    IOMMU + EDU + GROUP.replace("edu0", "edu1"): "group[0].device: there is no device 'edu1': did you mean 'edu0'?",
    IOMMU + EDU + GROUP.replace("paging", "page"): "group[0].domain: 'page': input should be 'identity', 'blocked' or "
    "'paging'",
    IOMMU + EDU + GROUP + GROUP: "group[1].device: 'edu0' is in one group with 'edu0': give it once",
    IOMMU + EDU + GROUP.replace("paging", "identity") + mapping(): 'group[0].mapping: a domain "identity" has no '
    'mappings: only "paging" has',
    IOMMU + EDU + GROUP + mapping(iova='"0x800"'): "group[0].mapping[0]: map of 0x1000 bytes at iova 0x800 to gpa 0x0: "
    f"not whole pages {APERTURE}",
    IOMMU + EDU + GROUP + mapping() + mapping(gpa='"8K"'): "group[0].mapping[1]: map of 0x1000 bytes at iova 0x1000 to "
    f"gpa 0x2000: overlaps a mapping {APERTURE}",
    IOMMU + EDU + GROUP + mapping(iova='"1024T"'): "group[0].mapping[0]: map of 0x1000 bytes at iova 0x4000000000000 "
    f"to gpa 0x0: outside of the aperture or beyond the output width {APERTURE}",
    IOMMU
    + EDU
    + GROUP
    + mapping(iova='"0xfee0_0000"'): "group[0].mapping[0].iova: 0xfee00000..0xfee00fff reaches into "
    "0xfee00000..0xfeefffff, which is reserved (msi)",
    IOMMU + EDU + GROUP + mapping(size=0): "group[0].mapping[0].size: 0x0: must be at least 1, and end below 2**64",
    IOMMU + EDU + GROUP + mapping(size="-1"): "group[0].mapping[0].size: -1: must be from 0 to 2**64 - 1",
    IOMMU + EDU + GROUP + mapping(size='"4 pages"'): "group[0].mapping[0].size: '4 pages': must be a number with K, M, "
    'G or T behind it, or 0x before it, as "4K" or "0x4000_0000"',
    IOMMU + EDU + GROUP + mapping(prot='"x"'): 'group[0].mapping[0].prot: \'x\': must be "r", "w" or "rw"',
    IOMMU
    + EDU
    + GROUP
    + "[[group.mapping]]\niova = 0\nsize = 4096\n": "group[0].mapping[0].gpa: is missing, as gpa = 0",
}


@pytest.mark.parametrize("text", WRONG, ids=[re.sub(r"\W+", " ", said)[:70] for said in WRONG.values()])
def test_one_line_for_a_mistake(text: str) -> None:
    assert lines(text) == [WRONG[text]]


def test_all_mistakes_of_a_file_at_once() -> None:
    text = IOMMU.replace("vt-d", "x") + bridge("b", "root-port", "0", 1) + EDU.replace('"edu"', '"edx"') + "[[group]]\n"
    keys = [line.split(": ")[0] for line in lines(text)]
    assert keys == ["iommu[0].kind", "bridge[0].address", "device[0].model", "group[0].device", "group[0].domain"]


def test_a_mapping_is_a_span() -> None:
    made = machine(IOMMU + EDU + GROUP + mapping('"1G"', '"1M"', '"512M"'))
    group = made.system["edu0"].group
    assert group is not None
    (found,) = group.domain.mappings()  # type: ignore[attr-defined]
    assert (found.span, found.gpa) == (Span.sized(GiB, 512 * MiB), MiB)
    made.close()


@pytest.mark.parametrize(
    "covers,expected",
    [
        ("0000", [(1, 0, b"\6\0"), (2, 0, b"\4\0")]),  # rp0 stands for what is below, rp1 would for `outside`, too
        ("0000:01", [(1, 0, b"\4\0\0\0")]),  # by way of rp0, which is not covered itself
    ],
)
def test_dmar_scopes(covers: str, expected: list[tuple[int, int, bytes]]) -> None:
    """Type, bus and path of each scope: a bridge (2) is there only if all that is below it is behind the unit."""
    text = f"""
[machine]
name = "m"
[[iommu]]
name = "vtd0"
kind = "vt-d"
address = "0000:00:02.0"
covers = ["{covers}"]
[[bridge]]
name = "rp0"
kind = "root-port"
address = "0000:00:04.0"
secondary = 1
[[device]]
name = "below"
model = "edu"
address = "0000:01:00.0"
[[bridge]]
name = "rp1"
kind = "root-port"
address = "0000:00:05.0"
secondary = 2
[[device]]
name = "outside"
model = "edu"
address = "0000:02:00.0"
iommu = "none"
[[device]]
name = "plain"
model = "edu"
address = "0000:00:06.0"
"""
    made = parse(text, Path("m.toml"))
    table = made.acpi_tables()["DMAR"]
    made.close()
    scopes, at = [], 48 + 16  # DMAR's head, and DRHD's
    while at < len(table):
        scopes.append((table[at], table[at + 5], bytes(table[at + 6 : at + table[at + 1]])))
        at += table[at + 1]
    assert sorted(scopes) == expected


# ---- default domains -------------------------------------------------------------------------------


def types(made: Machine) -> dict[str, str | None]:
    """The type of each device's default domain."""
    return {e.name: None if e.group is None else e.group.default_domain.type.value for e in made.system.endpoints}


@pytest.mark.parametrize(
    ("value", "type_"), [("", "identity"), ("identity", "identity"), ("dma", "DMA"), ("dma-fq", "DMA-FQ")]
)
def test_default_domains(value: str, type_: str) -> None:
    """Linux: identity is iommu.passthrough=1, dma iommu.strict=1, dma-fq iommu.strict=0."""
    made = machine(IOMMU + (f'default_domain = "{value}"\n' if value else "") + EDU)
    assert types(made) == {"edu0": type_}
    fd = with_memory(made)
    try:
        if type_ == "identity":
            assert made.devices["edu0"].dma.read(0x1000, 4) == bytes(4)
        else:  # nobody maps anything
            with pytest.raises(DmaFault) as fault:
                made.devices["edu0"].dma.read(0x1000, 4)
            assert fault.value.reason is Reason.NOT_MAPPED
    finally:
        os.close(fd)
        made.close()


def test_each_iommu_has_its_own_default() -> None:
    """A [[group]] decides for its group; a device without an IOMMU has none."""
    first = '[[iommu]]\nname = "a"\nkind = "vt-d"\ndefault_domain = "dma"\ncovers = ["0000:00:03.0-0000:00:04.0"]\n'
    second = '[[iommu]]\nname = "b"\nkind = "smmu-v3"\ncovers = ["0000:00:05.0"]\n'
    devices = "".join(edu(f"edu{n}", f"0000:00:0{n}.0") for n in (3, 4, 5, 6))
    made = machine(first + second + devices + '[[group]]\ndevice = "edu4"\ndomain = "blocked"\n')
    assert types(made) == {"edu3": "DMA", "edu4": "blocked", "edu5": "identity", "edu6": None}
    made.close()


UNTRUSTED = "untrusted = true\n"


@pytest.mark.parametrize("default", ["", 'default_domain = "identity"\n', 'default_domain = "dma-fq"\n'])
def test_untrusted_devices(default: str) -> None:
    """iommu_get_default_domain_type: DMA, whatever the default is; also where only one member is untrusted."""
    port = bridge("rp0", "root-port", "0000:00:04.0", 1, UNTRUSTED)
    devices = edu("in0", "0000:01:00.0") + edu("out0", "0000:00:05.0", UNTRUSTED) + edu("plain", "0000:00:06.0")
    shared = edu("one", "0000:00:07.0") + edu("two", "0000:00:07.1", UNTRUSTED)
    made = machine(IOMMU + default + port + devices + shared)
    plain = "DMA-FQ" if "fq" in default else "identity"
    assert types(made) == dict.fromkeys(("rp0", "in0", "out0", "one", "two"), "DMA") | {"plain": plain}
    assert [e.name for e in made.system.endpoints if e.untrusted] == ["rp0", "in0", "out0", "two"]
    assert made.system["one"].group is made.system["two"].group
    made.close()


def test_mappings_of_an_untrusted_device() -> None:
    """Its unmaps are never deferred."""
    made = machine(IOMMU + EDU + UNTRUSTED + GROUP + mapping())
    assert types(made) == {"edu0": "DMA"}
    made.close()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            IOMMU + 'default_domain = "DMA"\n' + EDU,
            "iommu[0].default_domain: 'DMA': input should be 'identity', 'dma' or 'dma-fq'",
        ),
        (
            IOMMU + 'address = "0000:00:02.0"\ndefault_domain = "dma"\n' + EDU,
            "iommu[0].default_domain: the guest drives this IOMMU, and chooses (iommu.passthrough, iommu.strict): "
            "leave it out",
        ),
        (
            IOMMU + 'address = "0000:00:02.0"\n' + EDU + UNTRUSTED,
            "device[0].untrusted: 'edu0': the guest drives 'iommu0', and chooses its domain: leave this out",
        ),
        (
            EDU + UNTRUSTED,
            "device[0].untrusted: 'edu0': no IOMMU covers it, so it reaches all memory: leave this out",
        ),
        (
            IOMMU + EDU + 'iommu = "none"\n' + UNTRUSTED,
            "device[0].untrusted: 'edu0': no IOMMU covers it, so it reaches all memory: leave this out",
        ),
        (
            bridge("rp0", "root-port", "0000:00:04.0", 1, UNTRUSTED) + edu("in0", "0000:01:00.0"),
            "bridge[0].untrusted: 'rp0': no IOMMU covers it, so it reaches all memory: leave this out",
        ),
        (
            IOMMU + EDU + UNTRUSTED + '[[group]]\ndevice = "edu0"\ndomain = "identity"\n',
            'group[0].domain: "identity": \'edu0\' is untrusted, and would reach all memory: "paging" or "blocked"',
        ),
        (
            '[[iommu]]\nname = "i"\nkind = "power-pe"\ndefault_domain = "dma"\n' + EDU,
            "iommu[0].default_domain: no group of it can have one: POWER PE needs identity",
        ),
        (
            '[[iommu]]\nname = "i"\nkind = "power-pe"\n' + EDU + UNTRUSTED,
            "device[0]: edu0 is untrusted: POWER PE cannot translate it",
        ),
    ],
)
def test_default_domains_that_cannot_be(text: str, said: str) -> None:
    (line,) = lines(text)
    assert line.startswith(said)
