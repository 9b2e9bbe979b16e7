"""vmodel new."""

from __future__ import annotations

import keyword
import re
import sys
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Annotated

import typer

from vmodel.errors import ConfigError

Target = Annotated[
    Path, typer.Argument(metavar="NAME", help="The device's name, and the folder to create.", show_default=False)
]

#: What the template calls the device.
_NAME = "mycard"
#: Names that would hide a module which the project needs.
_TAKEN = frozenset(("driver", "plan", "pytest", "test", "tests", "vmodel")) | sys.stdlib_module_names


def new(target: Target) -> None:
    """Create a project: the model of a card, its driver, and tests.

    The driver is a kernel module.  NAME may be a path; its last part is the device's name.  `vmodel test` in the new
    folder builds and tests all of it.
    """
    name = target.name
    if not re.fullmatch(r"(?=.{1,31}$)[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ConfigError(
            f"{name!r}: must be lower-case words of letters and digits, joined by _, at most 31 long in all"
        )
    if keyword.iskeyword(name) or name in _TAKEN:
        raise ConfigError(f"{name!r}: this name is taken by a Python module or keyword; choose another one")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(f"{target}: exists already")
    for path in _copy(files("vmodel") / "template", target, name):
        print(path)
    print(f"next: cd {target} && vmodel test", file=sys.stderr)


def _copy(source: Traversable, target: Path, name: str) -> list[Path]:
    """Copies a folder of the template; names in files, and of files, become the device's."""
    target.mkdir(parents=True, exist_ok=True)
    created = []
    for entry in sorted(source.iterdir(), key=lambda entry: (entry.is_dir(), entry.name)):
        path = target / _renamed(entry.name, name).removesuffix(".in")
        if entry.is_dir():
            created += _copy(entry, path, name)
            continue
        if path.name == "gitignore":  # packaging tools leave out a file .gitignore
            path = path.with_name(".gitignore")
        path.write_text(_renamed(entry.read_text(encoding="utf-8"), name), encoding="utf-8")
        created.append(path)
    return created


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
