"""vmodel new."""

from __future__ import annotations

import ast
import contextlib
import keyword
import os
import re
import shlex
import sys
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from vmodel.errors import ConfigError
from vmodel.files import naming
from vmodel.guest import kbuild

Target = Annotated[
    Path, typer.Argument(metavar="NAME", help="The device's name, and the folder to create.", show_default=False)
]

#: What the template calls the device.
_NAME = "mycard"
#: Names that would hide a module which the project needs.
_TAKEN = frozenset(("driver", "plan", "pytest", "test", "tests", "vmodel")) | sys.stdlib_module_names
#: C's keywords, and names whose functions or macros, such as pci_driver and PAGE_SIZE, the kernel's headers have.
_TAKEN_IN_C = frozenset(
    re.findall(
        r"\w+",
        "auto bool case char const default do double enum extern float goto inline int long register restrict short"
        " signed sizeof static struct switch typedef typeof union unsigned void volatile"
        " apic array attribute block builtin bus class clocksource current dev device hrtimer iommu klist link linux"
        " match memory mod module page pci pmd pud sched set spinlock task thread time tls unix uuid workqueue",
    )
)


def new(target: Target) -> None:
    """Create a project: the model of a card, its driver, and tests.

    The driver is a kernel module.  NAME may be a path; its last part is the device's name.  `vmodel test` in the new
    folder builds and tests all of it.
    """
    name = target.name or target.absolute().name  # "." has none
    if not re.fullmatch(r"(?=.{1,31}$)[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ConfigError(
            f"{name!r}: must be lower-case words of letters and digits, joined by _, at most 31 long in all"
        )
    if keyword.iskeyword(name) or name in _TAKEN:
        raise ConfigError(f"{name!r}: this name is taken by a Python module or keyword; choose another one")
    if name in _TAKEN_IN_C or _class(name) in _classes():
        raise ConfigError(
            f"{name!r}: this name is taken by what the driver or the model is made from; choose another one"
        )
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: exists already")
    kbuild.check_path(target)
    created: list[Path] = []
    try:
        _copy(files("vmodel") / "template", target, name, created)
    except BaseException:
        # Half a project would be in the way of the next attempt.
        for path in reversed(created):
            with contextlib.suppress(OSError):
                path.rmdir() if path.is_dir() else path.unlink()
        raise
    for path in created:
        if not path.is_dir():
            print(path)
    print(f"next: cd {shlex.quote(str(target))} && vmodel test", file=sys.stderr)


def _classes() -> set[str]:
    """The names that the template's model uses already."""
    tree = ast.parse((files("vmodel") / "template" / f"{_NAME}.py.in").read_text(encoding="utf-8"))
    used = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    return used | {node.name for node in tree.body if isinstance(node, ast.ClassDef)} - {_class(_NAME)}


def _copy(source: Traversable, target: Path, name: str, created: list[Path]) -> None:
    """Copies a folder of the template; names in files, and of files, become the device's.

    `created` gets what is new, before it is complete.
    """
    _make_folder(target, created)
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.is_dir(), entry.name)):
        path = target / _renamed(entry.name, name).removesuffix(".in")
        if entry.is_dir():
            _copy(entry, path, name, created)
            continue
        if path.name == "gitignore":  # packaging tools leave out a file .gitignore
            path = path.with_name(".gitignore")
        created.append(path)
        with naming(path):
            path.write_text(_renamed(entry.read_text(encoding="utf-8"), name), encoding="utf-8")


def _make_folder(folder: Path, created: list[Path]) -> None:
    if not folder.exists():
        _make_folder(folder.parent, created)
        folder.mkdir(exist_ok=True)
        created.append(folder)


def _renamed(text: str, name: str) -> str:
    return text.replace(_NAME, name).replace(_NAME.upper(), name.upper()).replace(_NAME.capitalize(), _class(name))


def _class(name: str) -> str:
    """The device's class: dma_engine gives DmaEngine.

    From the class, `vmodel regs --format c` gets back where the words begin; a _ stays where it could not.
    """
    found, before = "", ""
    for word in name.split("_"):
        found += f"{'_' if len(before) == 1 or (before and word[0].isdigit()) else ''}{word.capitalize()}"
        before = word
    return found
