"""Comments, docstrings and documents use the field's terms: vocabulary.toml lists words with what to write instead."""

from __future__ import annotations

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = tomllib.loads((Path(__file__).parent / "vocabulary.toml").read_text())
WORDS = [(re.compile(rf"(?<!\w)({word['find']})(?!\w)", re.IGNORECASE), word["write"]) for word in TABLE["word"]]
#: Any of them: most files have none, and need not be parsed.
ANY_WORD = re.compile(rf"(?<!\w)(?:{'|'.join(word['find'] for word in TABLE['word'])})(?!\w)", re.IGNORECASE)
NAMES = [(re.compile(rf"(?:^|_)({name['find']})(?:_|$)"), name["write"]) for name in TABLE["name"]]
#: A line number, and its text.
Lines = Iterator[tuple[int, str]]


def python(text: str) -> Lines:
    """Comments and docstrings."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if ast.get_docstring(node) is None:
            continue
        first = node.body[0]
        docstring = ast.get_docstring(node, clean=False)
        assert docstring is not None
        yield from enumerate(docstring.split("\n"), first.lineno)


def c(text: str) -> Lines:
    """Comments."""
    for found in re.finditer(r'"(?:\\.|[^"\\\n])*"|/\*.*?\*/|//[^\n]*', text, re.DOTALL):
        if not found[0].startswith('"'):
            yield from enumerate(found[0].split("\n"), text.count("\n", 0, found.start()) + 1)


def markdown(text: str) -> Lines:
    """All but blocks of code."""
    in_block = False
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("```"):
            in_block = not in_block
        elif not in_block and not line.startswith("    "):
            yield number, line


def shell(text: str) -> Lines:
    for number, line in enumerate(text.split("\n"), 1):
        if line.lstrip().startswith("#"):
            yield number, line


def mistakes(lines: Lines) -> Iterator[str]:
    """Words of the table, with line and replacement.  Code between backquotes is no prose."""
    for number, line in lines:
        prose = re.sub(r"`[^`]*`", "`", line)
        for pattern, instead in WORDS:
            for found in pattern.finditer(prose):
                yield f"{number}: {found[0]!r}; write: {instead}"


def wrong_names(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for pattern, instead in NAMES:
                if pattern.search(node.name):
                    yield f"{node.lineno}: def {node.name}; write: {instead}"


def files(root: Path = ROOT) -> list[tuple[Path, Callable[[str], Lines]]]:
    found: list[tuple[Path, Callable[[str], Lines]]] = []
    for folder in ("vmodel", "tests", "examples", "c_shim"):
        for ending, reader in ((".py", python), (".c", c), (".h", c)):
            found += [(path, reader) for path in (root / folder).rglob(f"*{ending}")]
    found += [(path, markdown) for path in [*root.glob("*.md"), *(root / "docs").rglob("*.md")]]
    found += [
        (path, python if path.suffix == ".py" else shell) for path in (root / "scripts").iterdir() if path.is_file()
    ]
    # An editor's lock is a link that leads nowhere.
    return sorted(((path, reader) for path, reader in found if path.is_file()), key=lambda item: item[0])


def test_the_words() -> None:
    wrong = []
    for path, reader in files():
        text = path.read_text()
        where = path.relative_to(ROOT)
        if ANY_WORD.search(text):
            wrong += [f"{where}:{mistake}" for mistake in mistakes(reader(text))]
        if path.suffix == ".py" and where.parts[0] == "vmodel":
            wrong += [f"{where}:{mistake}" for mistake in wrong_names(text)]
    assert not wrong, "\n" + "\n".join(wrong)


def test_a_link_that_leads_nowhere_is_no_file(tmp_path: Path) -> None:
    """As editors leave them beside a file that is open."""
    for folder in ("vmodel", "docs", "scripts"):
        (tmp_path / folder).mkdir()
    for name in ("vmodel/.#dma.py", "docs/.#index.md", ".#README.md", "scripts/.#test"):
        (tmp_path / name).symlink_to("user@host.1234")
    (tmp_path / "vmodel" / "dma.py").touch()
    assert [path.name for path, _ in files(tmp_path)] == ["dma.py"]


def test_every_kind_of_file_is_read() -> None:
    found = {(path.relative_to(ROOT).parts[0], path.suffix) for path, _ in files()}
    assert found >= {("vmodel", ".py"), ("c_shim", ".c"), ("c_shim", ".h"), ("tests", ".py"), ("tests", ".c")}
    assert found >= {("examples", ".c"), ("README.md", ".md"), ("docs", ".md"), ("scripts", "")}


@pytest.mark.parametrize(
    ("reader", "text", "line"),
    [
        (python, '"""A sink.\n\nIt hears of them.\n"""\n', 3),
        (python, "class A:\n    def f(self) -> None:\n        '''Hears of it.'''\n", 3),
        (python, "x = 1\ny = 2  # who hears of it\n", 2),
        (c, "/* one\n * hears */\nint a = 1;\n", 2),
        (c, "int a; // hears\n", 1),
        (markdown, "# Title\n\nWho hears of it\n", 3),
        (shell, "#!/bin/sh\necho\n# hears of it\n", 3),
    ],
)
def test_a_word_is_found(reader: Callable[[str], Lines], text: str, line: int) -> None:
    (mistake,) = mistakes(reader(text))
    assert re.fullmatch(rf"{line}: '[Hh]ears'; write: is notified of; receives; the sink", mistake)


@pytest.mark.parametrize(
    ("reader", "text"),
    [
        (python, 'word = "hears"\n'),
        (python, '"""`hears` is a name."""\n'),
        (python, "# shears\n"),
        (c, 'const char *s = "/* hears */";\n'),
        (markdown, "```\nhears\n```\n\n    hears\n"),
        (shell, "echo hears\n"),
    ],
)
def test_code_is_no_prose(reader: Callable[[str], Lines], text: str) -> None:
    assert not list(mistakes(reader(text)))


def test_a_name_is_found() -> None:
    text = "class A:\n    def forget_errors(self): ...\n    def unforgettable(self): ...\n"
    assert list(wrong_names(text)) == ["2: def forget_errors; write: invalidate, drop, clear"]


@pytest.mark.parametrize("entry", [*TABLE["word"], *TABLE["name"]], ids=lambda entry: entry["find"])
def test_an_entry_says_what_to_write(entry: dict[str, str]) -> None:
    assert entry.keys() == {"find", "write"} and entry["write"]
    for pattern, _ in WORDS if entry in TABLE["word"] else []:
        assert not pattern.fullmatch(entry["write"])
