"""A file imports only from rows above its own, or from its own folder: the table of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "vmodel"


def _table() -> dict[str, int]:
    """CONTRIBUTING.md's table: module to layer.  What has no layer of its own is the package itself."""
    rows = re.findall(
        r"^\| (\d+) \| ((?:`[\w/]+` ?)+)\|", (PACKAGE.parent / "CONTRIBUTING.md").read_text(), re.MULTILINE
    )
    found = {f"vmodel.{name}": int(number) for number, cell in rows for name in re.findall(r"`(\w+)/?`", cell)}
    return {**found, "vmodel": 1, "vmodel.__main__": max(found.values()) + 1}


#: Lower may not import higher; the longest prefix counts.
LAYERS = _table()
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer(module: str) -> int:
    while module not in LAYERS:
        module = module.rpartition(".")[0]
    return LAYERS[module]


def all_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path} line {node.lineno}: a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(path: Path) -> set[str]:
    return {name for name in all_imports(path) if name.split(".")[0] == "vmodel"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_upwards(path: Path) -> None:
    module = name_of(path)
    for imported in imports(path):
        if imported == "vmodel._vmshim" or imported.startswith("vmodel._vmshim."):
            assert module.startswith("vmodel._shim"), f"{module} imports the compiled shim"
            continue
        folder = ".".join(module.split(".")[:2])
        if not f"{imported}.".startswith(f"{folder}."):
            assert layer(imported) < layer(module), f"{module} imports {imported}"


@pytest.mark.parametrize("path", sorted((PACKAGE / "vfio_user").glob("*.py")), ids=name_of)
def test_the_protocol_stands_alone(path: Path) -> None:
    for imported in imports(path):
        assert imported.startswith("vmodel.vfio_user") or layer(imported) == 1, imported


@pytest.mark.parametrize("path", sorted((PACKAGE / "devices").rglob("*.py")), ids=name_of)
def test_devices_know_no_transport(path: Path) -> None:
    """Hot loops of theirs may be in the shim; the channel, too, but that is none of their business."""
    for imported in imports(path):
        assert not imported.startswith(("vmodel.server", "vmodel.vfio_user", "vmodel._shim.Channel")), imported


def test_the_fetcher_needs_nothing_built() -> None:
    """`doctor` and get-qemu say what is missing even where the shim does not load: nothing above layer 1."""
    seen, todo = set(), ["vmodel.guest.get_qemu", "vmodel.cli.doctor"]
    while todo:
        module = todo.pop()
        path = next((p for p in FILES if name_of(p) == module), None)
        if path is None or module in seen:
            continue
        seen.add(module)
        todo += imports(path)
        assert layer(module) in (1, LAYERS["vmodel.guest"], LAYERS["vmodel.cli"]), module
    assert "vmodel.guest.artifacts" in seen


def test_every_module_has_a_layer() -> None:
    top = {".".join(name_of(path).split(".")[:2]) for path in FILES}
    assert top == set(LAYERS)
