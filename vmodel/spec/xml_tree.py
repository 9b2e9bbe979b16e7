"""XML as a tree whose elements know their lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

from vmodel.config_file import read_text
from vmodel.spec.draft import SourcePlace

_MAX_DEPTH = 64


class Element:
    """One element; tags have no namespace."""

    def __init__(self, tag: str, attributes: dict[str, str], line: int) -> None:
        self.tag, self.attributes, self.line = tag, attributes, line
        self.children: list[Element] = []
        self.text = ""

    def all(self, *tags: str) -> Iterator[Element]:
        """Yields the children with one of these tags."""
        return (child for child in self.children if child.tag in tags)

    def every(self, tag: str) -> Iterator[Element]:
        """Yields all elements with that tag, at any depth."""
        for child in self.children:
            if child.tag == tag:
                yield child
            yield from child.every(tag)

    def find(self, tag: str) -> Element | None:
        """The first child with that tag."""
        return next(self.all(tag), None)


def parse(path: Path) -> Element:
    """The root of a file.  ConfigError: it is no XML, or declares entities."""
    root = Element("", {}, 0)
    stack = [root]
    parser = expat.ParserCreate()

    def refuse(message: str) -> NoReturn:
        raise SourcePlace(path, parser.CurrentLineNumber).error(message)

    def start(name: str, attributes: dict[str, str]) -> None:
        if len(stack) > _MAX_DEPTH:
            refuse("is nested too deeply")
        element = Element(name.rpartition(":")[2], attributes, parser.CurrentLineNumber)
        stack[-1].children.append(element)
        stack.append(element)

    def data(text: str) -> None:
        stack[-1].text += text

    parser.StartElementHandler = start
    parser.EndElementHandler = lambda name: stack.pop()
    parser.CharacterDataHandler = data
    parser.EntityDeclHandler = lambda *_: refuse("declares entities: write their text instead")
    parser.buffer_text = True
    try:
        parser.Parse(read_text(path).encode(), True)
    except expat.ExpatError as error:
        raise SourcePlace(path, error.lineno).error(f"is no XML: {expat.ErrorString(error.code)}") from error
    return root.children[0]
