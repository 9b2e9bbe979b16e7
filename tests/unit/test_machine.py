"""Machine files: what is right becomes devices and QEMU arguments, what is wrong becomes a line each."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from vmodel.errors import ConfigError
from vmodel.machine import Machine, MachineErrors, load, load_model, parse
from vmodel.server import MAX_SOCKET_PATH

MACHINE = '[machine]\nname = "m"\n'

MODEL = """
from pydantic import Field
from vmodel.device import MmioBar, Params as BaseParams, PciDevice
from vmodel.regs import Reg32, RegisterBank

class Bank(RegisterBank, size=16):
    SCRATCH = Reg32(0)

class Toy(PciDevice):
    '''A toy.'''
    vendor_id, device_id, class_code = 0x1234, 1, 0xFF0000
    bar0 = MmioBar(0, size=4096)
    regs = bar0.bank(Bank)

    class Params(BaseParams):
        lanes: int = Field(default=4, ge=1, le=16)
        label: str

class Fragile(Toy):
    class Params(BaseParams):
        pass

    def setup(self):
        raise RuntimeError("no\\nluck")

class Abstract(PciDevice):
    pass

class Unrelated:
    pass
"""


def device(name: str = "edu0", model: str = "edu", address: str = "0000:00:03.0", more: str = "") -> str:
    return f'[[device]]\nname = "{name}"\nmodel = "{model}"\naddress = "{address}"\n{more}\n'


def lines(text: str, folder: Path) -> list[str]:
    """What is said of a wrong file, without the file's name."""
    file = folder / "m.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(file)
    said = str(caught.value).splitlines()
    assert all(line.startswith(f"{file}: ") for line in said)
    return [line.removeprefix(f"{file}: ") for line in said]


# ---- what is right --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "devices"),
    [
        ("edu", ["edu0"]),
        ("edu-demo", ["edu0", "edu1", "edu2", "nvme0", "vtd0"]),
        ("edu-viommu", ["edu0", "viommu0"]),
        ("edu-vtd", ["edu0", "vtd0"]),
        (
            "iommu-groups",
            ["alone", "left", "right", "switched0", "switched1", "function0", "function1", "outside"],
        ),
        ("nvme", ["nvme0"]),
    ],
)
def test_the_examples_of_the_repository(name: str, devices: list[str]) -> None:
    machine = load(Path(__file__).parents[2] / "examples" / f"{name}.toml")
    assert (machine.name, machine.memory, list(machine.devices)) == (name, "512M", devices)
    machine.close()


def test_defaults_and_parameters(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(MODEL)
    text = MACHINE + device(model="toy.py:Toy", more='params = { label = "x" }') + device("b", address="0000:00:1E.0")
    machine = parse(text, tmp_path / "m.toml")
    assert machine.memory == "512M"
    assert machine.devices["edu0"].params.model_dump() == {"lanes": 4, "label": "x"}
    assert type(machine.devices["edu0"]).__doc__ == "A toy."
    assert machine.content.device[1].address == "0000:00:1e.0"
    machine.close()


def test_a_machine_without_devices() -> None:
    assert parse(MACHINE, Path("m.toml")).devices == {}


def test_two_devices_of_one_file_share_the_class(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(MODEL)
    model = load_model("toy.py:Toy", tmp_path)
    assert load_model("toy.py:Toy", tmp_path) is model
    assert load_model(f"{tmp_path}/toy.py:Toy") is model


def test_a_model_imports_what_is_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a script does: `vmodel regs import` writes such modules.  None of them hides one of Python's."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "toy.py").write_text(f"import colorsys\nfrom toy_regs_beside import MEANING\n{MODEL}")
    (tmp_path / "toy_regs_beside.py").write_text("MEANING = 42\n")
    (tmp_path / "colorsys.py").write_text("1 / 0\n")
    assert load_model("toy.py:Toy", tmp_path).__name__ == "Toy"


def test_a_model_by_its_module() -> None:
    assert load_model("vmodel.devices.edu:Edu") is load_model("edu")


def test_byte_order_mark_and_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_bytes(b"\xef\xbb\xbf" + (MACHINE + device()).replace("\n", "\r\n").encode())
    assert list(load(file).devices) == ["edu0"]


# ---- QEMU's arguments -----------------------------------------------------------------------------


def devices_of(args: list[str]) -> list[dict[str, object]]:
    return [json.loads(args[n + 1]) for n, arg in enumerate(args) if arg == "-device"]


def test_qemu_arguments() -> None:
    machine = parse(MACHINE + 'memory = "1G"\n' + device(address="0000:00:1a.0"), Path("m.toml"))
    args = machine.qemu_args(Path("/run/x"))
    assert args[:2] == ["-object", "memory-backend-memfd,id=vmodel-ram,size=1G,share=on"]
    assert args[2:4] == ["-machine", "q35,memory-backend=vmodel-ram"]
    assert args[args.index("-m") + 1] == "1G"
    assert devices_of(args) == [
        {
            "driver": "vfio-user-pci",
            "id": "edu0",
            "socket": {"type": "unix", "path": "/run/x/edu0.sock"},
            "bus": "pcie.0",
            "addr": "1a.0",
        }
    ]


def test_what_the_firmware_boots_from() -> None:
    text = MACHINE + device(more="bootindex = 3") + device("b", address="0000:00:04.0")
    found = devices_of(parse(text, Path("m.toml")).qemu_args(Path("/run")))
    assert [d.get("bootindex") for d in found] == [3, None]


def test_functions_of_one_slot() -> None:
    text = MACHINE + device("b", address="0000:00:03.1") + device("a") + device("c", address="0000:00:04.0")
    machine = parse(text, Path("m.toml"))
    found = {d["id"]: (d["addr"], d.get("multifunction")) for d in devices_of(machine.qemu_args(Path("/run")))}
    assert found == {"a": ("3.0", True), "b": ("3.1", None), "c": ("4.0", None)}
    # Header type, bit 7: this function is one of several.
    assert {name: d.backend.region_read(7, 0x0E, 1) for name, d in machine.devices.items()} == {
        "a": 0x80,
        "b": 0x80,
        "c": 0,
    }


@pytest.mark.parametrize(
    ("slot", "gone"), [("01", ["-vga", "none", "-nic", "none"]), ("02", ["-nic", "none"]), ("03", [])]
)
def test_default_devices_make_room(slot: str, gone: list[str]) -> None:
    args = parse(MACHINE + device(address=f"0000:00:{slot}.0"), Path("m.toml")).qemu_args(Path("/run"))
    assert args[args.index("-device") - len(gone) : args.index("-device")] == gone
    assert ("-nic" in args, "-vga" in args) == ("-nic" in gone, "-vga" in gone)


def test_socket_paths_have_a_limit() -> None:
    machine = parse(MACHINE + device(), Path("m.toml"))
    folder = Path("/" + "x" * (MAX_SOCKET_PATH - len("//edu0.sock")))
    assert len(str(machine.socket("edu0", folder))) == MAX_SOCKET_PATH
    with pytest.raises(ConfigError, match=r"^m\.toml: device\[0\]\.name: .* 108 bytes, at most 107 .* --run-dir$"):
        machine.socket("edu0", Path(f"{folder}x"))
    with pytest.raises(ConfigError):  # bytes, not letters
        machine.socket("edu0", Path(f"{folder}"[:-1] + "é"))


# ---- what is wrong --------------------------------------------------------------------------------

ADDRESS = 'must be "SSSS:BB:DD.F" (segment, bus, device 00-1f, function 0-7), as "0000:00:03.0"'
NAME = "must be a letter, then up to 39 letters, digits, '_', '.' or '-': it names a socket file"
NO_MACHINE = 'a machine file needs a [machine] table with name = "edu-demo"'
BUILTINS = 'Built-ins are edu, idio16, nvme; else "path/file.py:Class", or "package.module:Class"'

WRONG = {
    "": f"is empty: {NO_MACHINE}",
    " \n\t\n": f"is empty: {NO_MACHINE}",
    "# only this\n": f"machine: is missing: {NO_MACHINE}",
    device(): f"machine: is missing: {NO_MACHINE}",
    'machine = "m"\n': f"machine: 'm': {NO_MACHINE}",
    '[[machine]]\nname = "m"\n': f"machine: [{{'name': 'm'}}]: {NO_MACHINE}",
    '[machin]\nname = "m"\n': "machin: unknown key: did you mean 'machine'?",
    "[machine]\n": 'machine.name: is missing, as name = "edu-demo"',
    '[machine]\nnam = "m"\n': "machine.nam: unknown key: did you mean 'name'?",
    MACHINE + "cpus = 2\n": "machine.cpus: unknown key: known are group_mf, memory, name",
    MACHINE + '"a\\nb" = 2\n': "machine.'a\\nb': unknown key: known are group_mf, memory, name",
    "[machine]\nname = 3\n": 'machine.name: 3: must be text in quotes, as name = "edu-demo"',
    '[machine]\nname = ""\n': f"machine.name: '': {NAME}",
    '[machine]\nname = "a/b"\n': f"machine.name: 'a/b': {NAME}",
    '[machine]\nname = "a\\nb"\n': f"machine.name: 'a\\nb': {NAME}",
    MACHINE + "memory = 512\n": 'machine.memory: 512: must be text in quotes, as memory = "512M"',
    MACHINE + "memory = 1979-05-27\n": 'machine.memory: 1979-05-27: must be text in quotes, as memory = "512M"',
    MACHINE + 'memory = "512"\n': "machine.memory: '512': must be a number and K, M or G, as \"512M\"",
    MACHINE + 'memory = "٥M"\n': "machine.memory: '٥M': must be a number and K, M or G, as \"512M\"",
    MACHINE + 'memory = "2048G"\n': 'machine.memory: \'2048G\': must be from "32M" to "1024G"',
    MACHINE + 'memory = "31M"\n': 'machine.memory: \'31M\': must be from "32M" to "1024G"',
    MACHINE + 'memory = "33000K"\n': "machine.memory: '33000K': must be whole mebibytes, as \"512M\"",
    MACHINE + "[device]\nname = 1\n": "device: {'name': 1}: must be written [[device]], in two brackets, as there may"
    " be several",
    "device = [1]\n" + MACHINE: "device[0]: 1: must be a table",
    MACHINE + "[[devices]]\n": "devices: unknown key: did you mean 'device'?",
    MACHINE + device(more='adress = "x"'): "device[0].adress: unknown key: did you mean 'address'?",
    MACHINE + device("../x"): f"device[0].name: '../x': {NAME}",
    MACHINE + device("x" * 41): f"device[0].name: '{'x' * 41}': {NAME}",
    MACHINE + device(address="3"): f"device[0].address: '3': {ADDRESS}",
    MACHINE + device(address="0000:00:20.0"): f"device[0].address: '0000:00:20.0': {ADDRESS}",
    MACHINE + device(address="0000:00:03.8"): f"device[0].address: '0000:00:03.8': {ADDRESS}",
    MACHINE + device(address="0000:01:03.0"): "device[0].address: '0000:01:03.0': there is no bus 01: "
    "add a [[bridge]] with secondary = 1",
    MACHINE + device(address="0001:00:03.0"): "device[0].address: '0001:00:03.0': not possible: QEMU's q35 machine has "
    'segment 0000 only, as "0000:00:03.0"',
    MACHINE + device(address="0000:00:1f.0"): "device[0].address: '0000:00:1f.0': is QEMU's own on the q35 machine"
    " (host bridge, LPC bridge): use device 01 to 1e",
    MACHINE + device(address="0000:00:03.1"): "device[0].address: '0000:00:03.1' needs a device at function 0 of its"
    " slot, 0000:00:03.0",
    MACHINE + device() + device("b"): "device[1].address: '0000:00:03.0' is taken by 'edu0': give each device its own",
    MACHINE + device(address="0000:00:0a.0") + device("b", address="0000:00:0A.0"): "device[1].address: '0000:00:0a.0'"
    " is taken by 'edu0': give each device its own",
    MACHINE + device() + device(address="0000:00:04.0"): "device[1].name: 'edu0' is the name of device[0] already:"
    " give each its own",
    MACHINE + device(more="bootindex = 2") + device("b", address="0000:00:04.0", more="bootindex = 2"): "device[1]."
    "bootindex: 2 is taken by 'edu0': give each device its own",
    MACHINE + device(more="bootindex = 0"): "device[0].bootindex: 0: input should be greater than or equal to 1",
    MACHINE + device(model="ed"): f"device[0].model: unknown model 'ed': did you mean 'edu'? {BUILTINS}",
    MACHINE + device(model=""): f"device[0].model: unknown model '': {BUILTINS}",
    MACHINE + device(model="toy.py"): "device[0].model: model 'toy.py': lacks the class, as \"toy.py:Class\"",
    MACHINE + device(model=".:X"): "device[0].model: model '.:X': must be a built-in (edu, idio16, nvme),"
    ' "path/file.py:Class", or "package.module:Class"',
    MACHINE + device(model="no.such:X"): "device[0].model: model 'no.such:X': there is no module 'no'",
    MACHINE + device(model="vmodel.such:X"): "device[0].model: model 'vmodel.such:X': there is no module 'vmodel.such'",
    MACHINE + device(model="json:loads"): "device[0].model: model 'json:loads': loads must be a class derived from"
    " vmodel.device.PciDevice",
    MACHINE + device(model="toy.py:Tox"): "device[0].model: model 'toy.py:Tox': no class 'Tox' in toy.py;"
    " did you mean 'Toy'?",
    MACHINE + device(model="toy.py:Unrelated"): "device[0].model: model 'toy.py:Unrelated': Unrelated must be a class"
    " derived from vmodel.device.PciDevice",
    MACHINE + device(model="toy.py:Abstract"): "device[0].model: model 'toy.py:Abstract': Abstract must declare"
    " vendor_id, device_id and class_code",
    MACHINE + device(model="toy.py:Fragile"): "device[0].model: model 'toy.py:Fragile' cannot be made:"
    " RuntimeError: no luck (toy.py line 24)",
    MACHINE + device(more="params = 3"): "device[0].params: 3: must be a table, as params = { }",
    MACHINE + device(more="params = { dma_mas = 1 }"): "device[0].params.dma_mas: unknown key: did you mean"
    " 'dma_mask'?",
    MACHINE + device(more="params = { dma_mask = -1 }"): "device[0].params.dma_mask: -1: input should be greater than"
    " or equal to 0",
    MACHINE + device(model="toy.py:Toy"): "device[0].params.label: is missing",
    MACHINE + "x = = 3\n": "line 3: 'x = = 3': is not valid TOML: invalid value",
    "[machine\n": "line 1: '[machine': is not valid TOML: expected ']' at the end of a table declaration",
    MACHINE + 'name = "n"\n': "line 3: 'name = \"n\"': is not valid TOML: cannot overwrite a value",
    MACHINE + 'memory = """\n': 'line 3: \'memory = """\': is not valid TOML: unterminated string',
    f"x = {'[' * 3000}": "is nested too deeply",
}


@pytest.mark.parametrize("text", WRONG, ids=[re.sub(r"\W+", " ", said)[:70] for said in WRONG.values()])
def test_one_line_for_a_mistake(text: str, tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(MODEL)
    said = WRONG[text]
    if said == "is nested too deeply" and (found := lines(text, tmp_path)) != [said]:
        assert len(found) == 1 and "is not valid TOML" in found[0]  # newer Pythons find the end of the file instead
        return
    assert lines(text, tmp_path) == [said]


def test_every_mistake_is_reported(tmp_path: Path) -> None:
    text = '[machine]\nmemory = "x"\n' + device("b", "eduu", "3") + device("c", more="params = { z = 1 }") + device("c")
    assert [line.partition(": ")[0] for line in lines(text, tmp_path)] == [
        "machine.name",
        "machine.memory",
        "device[0].address",
        "device[0].model",
        "device[1].params.z",
        "device[2].name",
        "device[2].address",
    ]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("class Toy(\n", "SyntaxError: '(' was never closed (bad.py, line 1)"),
        ("\nimport no_such_module\n", "ModuleNotFoundError: No module named 'no_such_module' (bad.py line 2)"),
        ("def f():\n    1 / 0\nf()\n", "ZeroDivisionError: division by zero (bad.py line 2)"),
        ("import sys\nsys.exit(5)\n", "SystemExit: 5 (bad.py line 2)"),
        ("\nraise ValueError('two\\nlines')\n", "ValueError: two lines (bad.py line 2)"),
        (
            "from vmodel.device import MmioBar, PciDevice\nclass Toy(PciDevice):\n    bar0 = MmioBar(0, size=3000)\n",
            "RegisterError: BAR0: size 0xbb8 is no power of two of at least 16 (bad.py line 3)",
        ),
    ],
)
def test_models_that_do_not_load(code: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(code)
    expected = f"device[0].model: model 'bad.py:Toy' cannot be loaded: {said}"
    assert lines(MACHINE + device(model="bad.py:Toy"), tmp_path) == [expected]
    # It is tried again, not taken from a half-made module.
    assert lines(MACHINE + device(model="bad.py:Toy"), tmp_path) == [expected]


def test_model_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "folder.py").mkdir()
    for name in ("missing", "folder"):
        said = f"device[0].model: model '{name}.py:Toy': there is no file '{tmp_path}/{name}.py'"
        assert lines(MACHINE + device(model=f"{name}.py:Toy"), tmp_path) == [said]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path, said in (
        (tmp_path / "missing.toml", "cannot be read: No such file or directory"),
        (tmp_path, "cannot be read: Is a directory"),
        (Path("nul\0"), "cannot be read: embedded null byte"),
    ):
        with pytest.raises(ConfigError) as caught:
            load(path)
        assert str(caught.value) == f"{path}: {said}"
    (tmp_path / "latin.toml").write_bytes(b'[machine]\nname = "\xe4"\n')
    with pytest.raises(ConfigError, match="line 2: is not UTF-8 text: save the file as UTF-8"):
        load(tmp_path / "latin.toml")


@settings(max_examples=examples(300), deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(["edu", "0000:00:03.1"]),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ),
    st.sampled_from(
        [
            "machine",
            "device",
            "device.0",
            "machine.name",
            "device.0.name",
            "device.0.model",
            "device.0.address",
            "device.0.params",
            "device.0.params.dma_mask",
        ]
    ),
)
def test_anything_is_a_machine_or_a_line(value: object, where: str) -> None:
    """Whatever TOML may hold at any place: no other exception, and one line for each mistake."""
    raw: dict[str, object] = {
        "machine": {"name": "m"},
        "device": [{"name": "a", "model": "edu", "address": "0000:00:03.0", "params": {}}],
    }
    target: object = raw
    *path, last = where.split(".")
    for part in path:
        target = target[int(part)] if isinstance(target, list) else target[part]  # type: ignore[index]
    target[int(last) if isinstance(target, list) else last] = value  # type: ignore[index]
    try:
        Machine(raw, Path("m.toml")).close()
    except MachineErrors as error:
        assert error.errors
        assert len(str(error).splitlines()) == len(error.errors)
        assert all(str(mistake).startswith("m.toml: ") and mistake.key for mistake in error.errors)
