"""A file imports only from layers above its own, or from its own folder: the table of CONTRIBUTING.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vmodel"

#: Lower may not import higher; the longest prefix counts.
LAYERS = {
    "vmodel": 1,
    "vmodel.errors": 1,
    "vmodel.span": 1,
    "vmodel.regs": 2,
    "vmodel._shim": 2,
    "vmodel.memory": 3,
    "vmodel.timers": 3,
    "vmodel.vfio_user": 3,
    "vmodel.pci": 4,
    "vmodel.dma": 5,
    "vmodel.device": 5,
    "vmodel.server": 6,
    "vmodel.qemu": 7,
    "vmodel.devices": 7,
    "vmodel.machine": 7,
    "vmodel.testing": 8,
    "vmodel.cli": 8,
    "vmodel.__main__": 8,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> int:
    while module not in LAYERS:
        module = module.rpartition(".")[0]
    return LAYERS[module]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "vmodel"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_upwards(path: Path) -> None:
    module = name_of(path)
    assert module == "vmodel" or layer(module) >= 1
    for imported in imports(path):
        if imported == "vmodel._vmshim" or imported.startswith("vmodel._vmshim."):
            assert module == "vmodel._shim", f"{module} imports the compiled shim"
            continue
        folder = ".".join(module.split(".")[:2])
        if not imported.startswith(f"{folder}."):
            assert layer(imported) <= layer(module), f"{module} imports {imported}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "vfio_user").glob("*.py")), ids=name_of)
def test_the_protocol_stands_alone(path: Path) -> None:
    for imported in imports(path):
        assert imported.startswith("vmodel.vfio_user") or layer(imported) == 1, imported


@pytest.mark.parametrize("path", sorted((PACKAGE / "devices").glob("*.py")), ids=name_of)
def test_devices_know_no_transport(path: Path) -> None:
    for imported in imports(path):
        assert not imported.startswith(("vmodel.server", "vmodel.vfio_user", "vmodel._shim")), imported


def test_every_module_has_a_layer() -> None:
    top = {".".join(name_of(path).split(".")[:2]) for path in FILES}
    assert top == set(LAYERS)
