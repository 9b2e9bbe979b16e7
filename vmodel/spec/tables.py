"""Banks as tables for readers: Markdown and HTML."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator

from vmodel.regs import RegisterBank

_COLUMNS = ("offset", "bits", "name", "mode", "reset", "description")
_STYLE = "body{font:15px sans-serif;margin:2em}td,th{padding:.2em .8em;text-align:left}tr.field{color:#555}"


def _rows(bank: type[RegisterBank], at: int) -> Iterator[tuple[str, ...]]:
    """Yields the cells of each register, field and memory, in ascending order; `at`: the bank's offset in its BAR."""
    for register in bank.registers:
        reset = f"{register.reset:#0{register.width // 4 + 2}x}"
        mode = "" if register.fields else register.mode.name  # with fields: that of bits without one
        yield f"{at + register.offset:#x}", str(register.width), register.name, mode, reset, register.doc
        for field in register.fields:
            bits = str(field.lo) if field.lo == field.hi else f"{field.hi}:{field.lo}"
            yield "", bits, f".{field.name}", (field.mode or register.mode).name, "", field.doc
            for value in field.values or ():
                yield "", "", f".{field.name} = {int(value)}", "", "", f"{value.name}: {value.doc}".removesuffix(": ")
    for memory in bank.memories:
        yield (
            f"{at + memory.offset:#x}",
            "",
            memory.name,
            memory.mode.name,
            "",
            memory.doc or f"{memory.size} bytes of RAM",
        )


def _cell(escape: Callable[[str], str], text: str) -> str:
    return escape(" ".join(text.split()))


def _markdown(text: str) -> str:
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>|#" else c for c in text)


def markdown(name: str, doc: str, places: list[tuple[int, int, type[RegisterBank]]]) -> str:
    """A page with a table for each of `places`: (BAR, offset in it, bank)."""
    lines = [f"# {_cell(_markdown, name)}", "", _cell(_markdown, doc), ""]
    for bar, at, bank in places:
        lines += [f"## {_cell(_markdown, bank.__name__)}, BAR{bar}", "", _cell(_markdown, bank.__doc__ or ""), ""]
        lines += [f"| {' | '.join(_COLUMNS)} |", "|" + "---|" * len(_COLUMNS)]
        lines += [f"| {' | '.join(_cell(_markdown, cell) for cell in row)} |" for row in _rows(bank, at)]
        lines.append("")
    return "\n".join(lines)


def html_page(name: str, doc: str, places: list[tuple[int, int, type[RegisterBank]]]) -> str:
    """The same as a page of HTML, which loads nothing."""
    title = _cell(html.escape, name)
    lines = ["<!DOCTYPE html>", f'<html lang="en"><head><meta charset="utf-8"><title>{title}</title>']
    lines += [f"<style>{_STYLE}</style></head><body>", f"<h1>{title}</h1>", f"<p>{_cell(html.escape, doc)}</p>"]
    for bar, at, bank in places:
        lines += [
            f"<h2>{_cell(html.escape, bank.__name__)}, BAR{bar}</h2>",
            f"<p>{_cell(html.escape, bank.__doc__ or '')}</p>",
        ]
        lines += ["<table>", f"<tr>{''.join(f'<th>{column}</th>' for column in _COLUMNS)}</tr>"]
        for row in _rows(bank, at):
            kind = "" if row[0] else ' class="field"'
            lines.append(f"<tr{kind}>{''.join(f'<td>{_cell(html.escape, cell)}</td>' for cell in row)}</tr>")
        lines.append("</table>")
    return "\n".join([*lines, "</body></html>", ""])
