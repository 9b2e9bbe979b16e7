"""What others say reaches terminals without control characters, by whatever command."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from tests.unit.test_cli import EXAMPLE, in_terminal, serving, vmodel
from vmodel.campaign.matrix import Run
from vmodel.campaign.rig import harness_error
from vmodel.campaign.store import Store
from vmodel.cli.output import console, log_to_stderr, safely, show
from vmodel.cli.screen import Screen, decoded
from vmodel.experiment.case import Case
from vmodel.printable import printable

#: ESC sequences (a title, a colour), C1's CSI, a bell, a backspace, a carriage return, and "abc" from right to left.
EVIL = "a\x1b]0;title\x07b\x1b[31mc\x9b2Jd\be\rf\u202eabc\u202c"


def test_what_is_written_out() -> None:
    assert printable(EVIL) == ("a\\u001b]0;title\\u0007b\\u001b[31mc\\u009b2Jd\\u0008e\\u000df\\u202eabc\\u202c")
    assert printable("\tä €\n\u00a0\U0001f600") == "\tä €\n\u00a0\U0001f600"
    assert printable("\ud800\U000e0041") == "\\ud800\\udb40\\udc41"


@given(st.text(st.characters(codec=None, exclude_categories=())))
def test_nothing_that_moves_is_left(text: str) -> None:
    said = printable(text)
    assert not any(
        (ord(c) < 32 and c not in "\t\n") or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in said
    )
    assert printable(said) == said
    # JSON stays the same JSON.
    assert json.loads(printable(json.dumps(text, ensure_ascii=False))) == json.loads(json.dumps(text))


# ---- commands ---------------------------------------------------------------------------------------


def is_clean(shown: bytes) -> bool:
    """Whether only rich's own colours are in it, and what a terminal makes of newlines."""
    text = shown.decode()
    return not any(part in text for part in ("\x1b]", "\x07", "\x9b", "\b", "\u202e", "\x1b[2J", "title\x07"))


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A folder of files in which every text is hostile, a campaign's database among them."""
    quoted = json.dumps(EVIL)  # TOML has the same escapes
    (tmp_path / "m.toml").write_text(f'[[device]]\nname = {quoted}\nmodel = "edu"\n')
    (tmp_path / "model.toml").write_text(f'[[device]]\nname = "d"\nmodel = {quoted}\n')
    (tmp_path / "p.toml").write_text(f'[[rule]]\nname = {quoted}\npoint = "dma.write"\ndo = "drop"\n')
    (tmp_path / "q.toml").write_text(f"[[rule]]\npoint = {quoted}\n")
    (tmp_path / "c.toml").write_text(f"[campaign]\nname = {quoted}\n")
    case = Case(machine=tmp_path / "m.toml", workload="w", name=EVIL)
    with Store.create(tmp_path / "x.runs", {"kind": "campaign", "name": EVIL, "file": EVIL}) as store:
        (id,) = store.add(
            [Run(machine=EVIL, kernel="", workload=EVIL, plan=EVIL, seed=0, case=case, rig=f"{EVIL}.py:X")]
        )
        result = harness_error(case, EVIL, "x").model_copy(update={"versions": {EVIL: EVIL}})
        store.finish(id, store.part(id), result, "", 1.0)
    return tmp_path


COMMANDS = [
    ["serve", "m.toml"],
    ["serve", "model.toml"],
    ["qemu-args", "m.toml"],
    ["groups", "m.toml"],
    ["groups", "m.toml", "--json"],
    ["guest", "model.toml", "--", "true"],
    ["run", "model.toml"],
    ["acpi", "m.toml", "--table", "viot"],
    ["iommu", "show", "m.toml"],
    ["log", "m.toml"],
    ["inject", "list", "m.toml"],
    ["inject", "add", "m.toml", EVIL],
    ["plan", "check", "p.toml"],
    ["plan", "check", "q.toml", "p.toml"],
    ["plan", "check", "p.toml", "--machine", "m.toml"],
    ["campaign", "c.toml"],
    ["campaign", "c.toml", "--dry-run"],
    ["sweep", "m.toml", "--point", EVIL, "--workload", EVIL],
    ["report", "x.runs"],
    ["report", "x.runs", "--format", "json"],
    ["report", "x.runs", "--format", "junit"],
    ["report", "x.runs", "--format", EVIL],
    ["reproduce", "x.runs/1"],
    ["reproduce", "x.runs/1", "--trust"],
    ["minimise", "x.runs/1", "--trust"],
    ["regs", EVIL],
    [EVIL],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: printable(" ".join(words))[:40])
def test_commands(evil: Path, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evil)
    done = vmodel(*command, cwd=evil)
    assert is_clean((done.stdout + done.stderr).encode(errors="surrogatepass")), done
    assert "Traceback" not in done.stderr


def test_in_a_terminal(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evil)
    for command in (["report", "x.runs"], ["reproduce", "x.runs/1"], ["plan", "check", "p.toml"]):
        shown = in_terminal(*command)
        assert is_clean(shown) and b"\\u001b]0;title" in shown, shown


def test_a_running_server(evil: Path) -> None:
    """Names of rules go to the server and come back in tables."""
    with serving(EXAMPLE, "--run-dir", evil / "run", "--plan", evil / "p.toml"):
        said = in_terminal("inject", "list", EXAMPLE, "--run-dir", evil / "run")
    assert is_clean(said) and b"\\u001b]0;" in said, said


def test_tables_and_logs(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], logging.getLogger("vmodel").level
    try:
        with safely():
            table = Table("x")
            table.add_row(EVIL)
            show(table, console())
            log_to_stderr(False)
            logging.getLogger("vmodel.x").warning("%s", EVIL)
            print(EVIL, file=sys.stderr)
    finally:
        root.handlers[:] = handlers
        logging.getLogger("vmodel").setLevel(level)
    out, err = capfd.readouterr()
    assert is_clean(out.encode()) and is_clean(err.encode())
    assert "\\u009b2J" in out and err.count("\\u009b2J") == 2


# ---- a screen ---------------------------------------------------------------------------------------


@pytest.fixture
def screen() -> Iterator[tuple[Screen, Callable[[], bytes]]]:
    reader, fd = os.pipe()
    made = Screen(fd)
    yield made, lambda: os.read(reader, 1 << 16)
    made.close()
    os.close(fd)
    os.close(reader)


def test_lines_stay_whole(screen: tuple[Screen, Callable[[], bytes]]) -> None:
    """A log line waits for the end of the guest's line."""
    made, seen = screen
    made.put("output", b"round trip 1 ")
    assert seen() == b"round trip 1 ", "what comes is shown at once"
    made.put("log", b"warning\n")
    made.put("console", b"[1] kernel\n")
    made.put("output", b"equal\nround trip 2 ")
    assert seen() == b"equal\nwarning\n[1] kernel\nround trip 2 "
    made.put("output", b"equal\n")
    made.put("log", b"done\n")
    assert seen() == b"equal\ndone\n"


def test_a_line_that_does_not_end(screen: tuple[Screen, Callable[[], bytes]]) -> None:
    """A prompt: what waits begins a line of its own after a while, or at the end."""
    made, seen = screen
    made.put("output", b"name? ")
    assert seen() == b"name? "
    made.put("log", b"warning\n")
    got = seen()  # by the timer
    while len(got) < len(b"\nwarning\n"):
        got += seen()
    assert got == b"\nwarning\n"
    made.put("output", b"again? ")
    made.put("log", b"late")
    made.put("console", b"last\n")
    made.close()
    assert seen() == b"again? \nlate\nlast\n"
    made.put("output", b"end")
    made.end_line()
    made.end_line()
    assert seen() == b"end\n"


def test_much_does_not_wait(screen: tuple[Screen, Callable[[], bytes]]) -> None:
    made, seen = screen
    made.put("output", b"x")
    made.put("log", b"y" * (1 << 14) + b"\n")
    assert seen() == b"x"
    for _ in range(4):
        made.put("log", b"y" * (1 << 14) + b"\n")
        if (got := seen()).startswith(b"\n"):
            break
    assert got.startswith(b"\n")


@given(st.lists(st.binary(max_size=20)))
def test_who_is_alone_is_passed_on_byte_for_byte(chunks: list[bytes]) -> None:
    reader, fd = os.pipe()
    made = Screen(fd)
    for chunk in chunks:
        made.put("output", chunk)
    made.close()
    os.close(fd)
    with os.fdopen(reader, "rb") as file:
        assert file.read() == b"".join(chunks)


def test_a_console_in_pieces() -> None:
    got: list[bytes] = []
    take = decoded(got.append)
    for piece in ("ä\x1b[2J€\n".encode()[n : n + 1] for n in range(10)):
        take(piece)
    take(b"\xff\n")
    assert b"".join(got).decode() == "ä\\u001b[2J€\n\\xff\n"


# ---- how commands look --------------------------------------------------------------------------------


def test_no_color(tmp_path: Path) -> None:
    """https://no-color.org: no colours; and rich's bold is one of its attributes."""
    assert b"\x1b[32m" in in_terminal("doctor")
    shown = in_terminal("doctor", env={"NO_COLOR": "1"})
    assert b"ok" in shown and b"\x1b[" not in shown, shown


def test_help_says_whole_sentences() -> None:
    """In 80 columns no command's line is cut."""

    def look(*path: str) -> None:
        text = vmodel(*path, "--help", COLUMNS="80").stdout
        assert max(map(len, text.splitlines())) <= 80, path
        _, found, commands = text.partition("\nCommands:\n")
        for line in commands.splitlines():
            name, _, said = line.strip().partition(" ")
            assert said.strip().endswith(".") and not said.endswith("..."), line
            look(*path, name)
        assert found or path, "there are commands"

    look()


def test_several_plans(tmp_path: Path) -> None:
    for name, text in (("a", 'point = "dma.write"\ndo = "drop"'), ("b", 'point = "nope"'), ("c", "x = 1\ny = 2")):
        (tmp_path / f"{name}.toml").write_text(f"[[rule]]\n{text}\n")
    done = vmodel("plan", "check", "a.toml", "b.toml", "gone.toml", "c.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.splitlines()[-1] == "a.toml: 1 rule, seed 0"
    lines = done.stderr.splitlines()
    assert all(line.startswith(("vmodel: b.toml: ", "vmodel: gone.toml: ", "vmodel: c.toml: ")) for line in lines), (
        lines
    )
    assert len({line.split(": ")[1] for line in lines}) == 3
    done = vmodel("plan", "check", "a.toml", "a.toml", cwd=tmp_path)
    assert (done.returncode, done.stdout.count("1 rule")) == (0, 2)
