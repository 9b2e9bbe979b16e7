"""Every public module, class, function and method of vmodel has a docstring.

What needs none of its own: names with an underscore in front, and whatever is inside of those; special methods, whose
meaning is Python's; overloads and setters of a property, which share the docstring of the other; a method that
overrides one with a docstring; a method of a Protocol that a class of vmodel documents.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import vmodel

ROOT = Path(vmodel.__file__).parent

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Class:
    """A class as its source has it."""

    bases: list[str]
    methods: dict[str, bool] = field(default_factory=dict)


def name_of(node: ast.expr) -> str:
    """The last part of a name: `Area` of `regions.Area`, of `Area` and of `Area[int]`."""
    if isinstance(node, ast.Subscript | ast.Call):
        return name_of(node.value if isinstance(node, ast.Subscript) else node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def shares_docstring(function: Function) -> bool:
    return any(name_of(decorator) in ("overload", "setter", "deleter") for decorator in function.decorator_list)


def has_docstring(node: ast.Module | ast.ClassDef | Function) -> bool:
    return bool((ast.get_docstring(node) or "").strip())


class Sources:
    """The classes of vmodel, by name; where several share one, what one of them documents counts."""

    def __init__(self, trees: list[ast.Module]) -> None:
        self.classes: dict[str, list[Class]] = {}
        for tree in trees:
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    known = Class([name_of(base) for base in node.bases])
                    for part in node.body:
                        if isinstance(part, Function) and not shares_docstring(part):
                            known.methods[part.name] = has_docstring(part)
                    self.classes.setdefault(node.name, []).append(known)

    def inherits(self, names: list[str], method: str) -> bool:
        """Whether a base documents the method."""
        return any(
            known.methods.get(method, False) or self.inherits([base for base in known.bases if base != name], method)
            for name in names
            for known in self.classes.get(name, ())
        )

    def documents(self, method: str) -> bool:
        """Whether any class does."""
        return any(known.methods.get(method, False) for found in self.classes.values() for known in found)


def lacking(tree: ast.Module, sources: Sources) -> Iterator[tuple[int, str]]:
    """(line, name) of what has no docstring."""
    if not has_docstring(tree) and tree.body:
        yield 1, "the module"

    def visit(body: list[ast.stmt], prefix: str, bases: list[str]) -> Iterator[tuple[int, str]]:
        for node in body:
            if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
                continue
            if isinstance(node, ast.ClassDef):
                if not has_docstring(node):
                    yield node.lineno, prefix + node.name
                yield from visit(node.body, f"{prefix}{node.name}.", [name_of(base) for base in node.bases])
            elif not has_docstring(node) and not shares_docstring(node):
                shared = "Protocol" in bases and sources.documents(node.name)
                if not (shared or sources.inherits(bases, node.name)):
                    yield node.lineno, prefix + node.name

    yield from visit(tree.body, "", [])


def test_what_is_public_has_a_docstring() -> None:
    files = sorted(file for file in ROOT.rglob("*.py"))
    trees = {file: ast.parse(file.read_text()) for file in files}
    sources = Sources(list(trees.values()))
    public = [
        file
        for file in files
        if not any(part.startswith("_") and part != "__init__.py" for part in file.relative_to(ROOT).parts)
    ]
    assert public
    found = [f"{file}:{line}: {name}" for file in public for line, name in lacking(trees[file], sources)]
    assert not found, "no docstring:\n" + "\n".join(found)


def test_lacking_finds_what_lacks_one() -> None:
    tree = ast.parse(
        '''
class Base:
    """Has one."""
    def documented(self): "Does this."
    def bare(self): ...
class Derived(Base):
    """Has one."""
    def documented(self): ...
    def bare(self): ...
    def _private(self): ...
    def __len__(self): ...
    @property
    def value(self): "What is there."
    @value.setter
    def value(self, new): ...
class Shape(Protocol):
    """Has one."""
    def documented(self): ...
    def unheard_of(self): ...
class NoDocstring: ...
def function(): ...
'''
    )
    names = [name for _, name in lacking(tree, Sources([tree]))]
    assert names == ["the module", "Base.bare", "Derived.bare", "Shape.unheard_of", "NoDocstring", "function"]
