"""Interrupt vectors that a model's code names by number, checked against what its class declares.

    self.msix.fire(3)    # with msix = Msix(vectors=3): a RegisterError when the class is made

A number that is computed is checked when the vector is raised.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any

from vmodel.pci.caps import Msi, Msix
from vmodel.regs import RegisterError

#: Methods of Msi and Msix whose first argument is a vector.
_METHODS = frozenset(("fire", "pending", "withdraw"))


def check_vectors(model: type[Any], capabilities: Mapping[str, Any]) -> None:
    """RegisterError: a method of `model` or of its bases names a vector that is not there."""
    parts = {name: part for name, part in capabilities.items() if isinstance(part, Msi | Msix)}
    if not parts:
        return
    for base in model.__mro__:
        for value in vars(base).values():
            if isinstance(value, FunctionType) and _may_be_wrong(value, parts):
                for name, vector, line in _named(value, parts):
                    raise RegisterError(
                        f"{model.__name__}.{value.__name__}, line {line}: {name} has no vector {vector}: it has 0 to"
                        f" {parts[name].vectors - 1}"
                    )


def _may_be_wrong(method: FunctionType, parts: Mapping[str, Any]) -> bool:
    """Whether it is worth reading a method's source: it names such a part, and a number that is too large."""
    code = method.__code__
    named = [part.vectors for name, part in parts.items() if name in code.co_names]
    # A method that asks how many there are may well know what it does.
    if not named or not _METHODS.intersection(code.co_names) or "vectors" in code.co_names:
        return False
    return any(isinstance(number, int) and number >= min(named) for number in code.co_consts)


def _named(method: FunctionType, parts: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
    """(part, vector, line) of each call `self.PART.fire(N)` with a vector that is not there."""
    try:
        lines, first = inspect.getsourcelines(method)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return  # without its source, it is checked when the vector is raised
    for node in ast.walk(tree):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Attribute(value=ast.Name(id="self"), attr=name), attr=called),
                args=[ast.Constant(value=int(vector)), *_],
            ) if called in _METHODS and name in parts and vector >= parts[name].vectors:
                yield name, vector, first + node.lineno - 1
