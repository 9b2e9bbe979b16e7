"""What others say reaches terminals without control characters: text, logs, tables, a guest's screen."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from tests.hostile import EVIL, is_clean
from vmodel.cli.output import console, log_to_stderr, safely, show
from vmodel.cli.screen import Log, Screen, decoded, unix_lines
from vmodel.printable import printable


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
    got = b""  # by the timer
    for _ in range(len(b"\nwarning\n")):
        if len(got) < len(b"\nwarning\n"):
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


@given(st.lists(st.sampled_from([b"a", b"\n", b"\r", b"\r\n"]), max_size=12))
def test_line_ends_of_a_console_in_any_pieces(pieces: list[bytes]) -> None:
    """No CR is left before an LF, wherever a read ends; a CR that overwrites a line stays."""
    got: list[bytes] = []
    take = unix_lines(got.append)
    for piece in pieces:
        take(piece)
    take(b".")
    assert b"".join(got) == re.sub(rb"\r+", b"\r", b"".join(pieces) + b".").replace(b"\r\n", b"\n")


def test_only_carriage_returns_take_no_memory() -> None:
    got: list[bytes] = []
    take = unix_lines(got.append)
    for _ in range(1000):
        take(b"\r" * 1000)
    take(b"end\n")
    assert b"".join(got) == b"\rend\n"


def test_another_line_of_the_terminal_is_erased_first(screen: tuple[Screen, Callable[[], bytes]]) -> None:
    """For example a spinner, also before a line of the log."""
    made, seen = screen
    order: list[str] = []
    made.erase = lambda: order.append("erased")
    written = made._write
    made._write = lambda data: (order.append(data.decode()), written(data))[1]
    Log(made, sys.stderr).write("07:05:26 ERROR\n")
    assert order == ["erased", "07:05:26 ERROR\n"] and seen() == b"07:05:26 ERROR\n"
