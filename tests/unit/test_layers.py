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
TESTS = PACKAGE.parent / "tests"


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
        assert not imported.startswith(
            ("vmodel.server", "vmodel.vfio_user", "vmodel._shim.channel", "vmodel._shim.Channel")
        ), imported


def test_the_fetcher_needs_nothing_built() -> None:
    """`doctor` and get-qemu say what is missing even where the shim does not load."""
    seen, todo = set(), ["vmodel.guest.get_qemu", "vmodel.cli.doctor"]
    while todo:
        module = todo.pop()
        path = next((p for p in FILES if name_of(p) == module), None)
        if path is None or module in seen:
            continue
        seen.add(module)
        todo += imports(path)
        known = module == "vmodel.patience"  # the rest of layer 2 has the shim
        assert known or layer(module) in (1, LAYERS["vmodel.guest"], LAYERS["vmodel.cli"]), module
    assert "vmodel.guest.artifacts" in seen


# ---- the C shim ------------------------------------------------------------------------------

SHIM = PACKAGE.parent / "c_shim"
ORDER = [name.removesuffix(".c") for name in re.findall(r'^    "(\w+\.c)",$', (SHIM / "build.py").read_text(), re.M)]
DEFINITION = re.compile(r"^(?!static|typedef|#)(?:\w[\w *]*?[ *])(\w+)\([^;{}]*\)\n\{", re.MULTILINE)


def _code(path: Path) -> str:
    """A C file without its comments."""
    return re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)


def _rank(header: str) -> int:
    """Of the header's own C file; one without is as high as what it includes."""
    if header in ORDER:
        return ORDER.index(header)
    included = re.findall(r'#include "(\w+)\.h"', _code(SHIM / f"{header}.h"))
    return max((_rank(name) for name in included), default=-1)


def test_the_order_of_c_files_is_complete() -> None:
    assert sorted(ORDER) == sorted(path.stem for path in SHIM.glob("*.c"))


@pytest.mark.parametrize("path", sorted(SHIM.glob("*.[ch]")), ids=lambda path: path.name)
def test_c_files_include_lower_ones(path: Path) -> None:
    rank = ORDER.index(path.stem) if path.suffix == ".c" else _rank(path.stem)
    for header in re.findall(r'#include "(\w+)\.h"', _code(path)):
        assert _rank(header) <= rank, f"{path.name} includes {header}.h"


@pytest.mark.parametrize("name", ORDER)
def test_c_files_call_lower_ones(name: str) -> None:
    home = {function: other for other in ORDER for function in DEFINITION.findall(_code(SHIM / f"{other}.c"))}
    assert len(home) > 150 and home["memory_find"] == "guest_memory" and home["vms_dma_rw"] == "dma"
    used = set(re.findall(r"\b\w+\b", _code(SHIM / f"{name}.c"))) & set(home)
    higher = {function for function in used if ORDER.index(home[function]) > ORDER.index(name)}
    assert not higher, f"{name}.c calls {sorted(higher)}"


def test_every_module_has_a_layer() -> None:
    top = {".".join(name_of(path).split(".")[:2]) for path in FILES}
    assert top == set(LAYERS)


def test_unit_tests_start_no_process() -> None:
    """Tests that do are in other folders: tests/cli, tests/processes, tests/packages."""
    starts = {"subprocess", "multiprocessing", "pty", "tests.cli.commands"}
    units = sorted((TESTS / "unit").glob("*.py"))
    assert {name_of(path): found for path in units if (found := all_imports(path) & starts)} == {}


def test_tests_import_no_tests() -> None:
    """What several files of tests use is in a module that is called by what it holds."""
    files = sorted(TESTS.rglob("*.py"))
    tests = {name_of(path): path.stem for path in files if path.name.startswith("test_")}
    named = re.compile(rf"\b(?:{'|'.join(set(tests.values()))})\b")  # few files are worth parsing
    suspects = [path for path in files if named.search(path.read_text())]
    assert suspects
    assert {name_of(path): found for path in suspects if (found := all_imports(path) & set(tests))} == {}
