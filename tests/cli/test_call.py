"""`vmodel call`: a method of a model in a running server, as a user calls it."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.cli.commands import EXAMPLE, refused, serving, vmodel
from vmodel.calls import MOST_CALLS
from vmodel.control import ask, socket_of
from vmodel.errors import ConfigError
from vmodel.patience import patience

pytestmark = pytest.mark.slow

MODEL = """
import time
from vmodel.device import MmioBar, PciDevice, outside

class Uart(PciDevice):
    vendor_id, device_id, class_code = 0x1234, 0x0002, 0x070000
    bar0 = MmioBar(0, size=4096)

    @outside
    def feed(self, text: str, times: int = 1) -> list[str]:
        \'\'\'Receives [text].\'\'\'
        return [text] * times

    @outside
    def fail(self):
        return 1 // 0

    @outside
    def data(self):
        return b"x"

    @outside
    def nap(self, seconds: float) -> None:
        time.sleep(seconds)
"""
MACHINE = """
[machine]
name = "m"

[[device]]
name = "uart0"
model = "uart.py:Uart"
address = "0000:00:04.0"
"""


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    (tmp_path / "uart.py").write_text(MODEL)
    path = tmp_path / "m.toml"
    path.write_text(MACHINE)
    return path


def test_long_arguments(machine: Path, tmp_path: Path) -> None:
    """As long as a command line may be; what is longer is refused with its length."""
    run = tmp_path / "run"
    with serving(machine, "--run-dir", run):
        text = "x" * 120_000
        done = vmodel("call", machine, "uart0.feed", f'"{text}"', "--run-dir", run)
        assert (done.returncode, done.stdout) == (0, f'["{text}"]\n')
        with pytest.raises(ConfigError, match=r"^1,\d{3},\d{3} bytes for the server in .*: at most 1,048,576"):
            ask(socket_of(run, "m"), "call", method="uart0.feed", arguments=["x" * (1 << 20)], named={}, seconds=1)


def test_calls(machine: Path, tmp_path: Path) -> None:
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return vmodel("call", "--run-dir", tmp_path, machine, *words)

    assert "no server runs in" in refused(call("uart0.feed"))
    with serving(machine, "--run-dir", tmp_path) as (server, _):
        done = call("uart0.feed", '"x é"', "times=2")
        assert (done.returncode, done.stderr, done.stdout) == (0, "", '["x \\u00e9", "x \\u00e9"]\n')
        done = call("uart0.nap", "0")
        assert (done.returncode, done.stderr, done.stdout) == (0, "", "")
        lines = [line.split(maxsplit=1) for line in call().stdout.splitlines()]
        assert lines[1][0] == "uart0.data()" and any("Receives [text]." in " ".join(line) for line in lines)
        where = f"the server in {tmp_path}: "
        assert refused(call("uart0.feed", "x")) == "'x' is not JSON: text needs quotes of its own, as '\"x\"'"
        assert refused(call("uart0.feed", 'text="x"', 'text="y"')) == "text is given twice"
        assert refused(call("uart0.fed")) == f"{where}uart0 has no method 'fed' for the outside: did you mean 'feed'?"
        assert refused(call("uart.feed")) == f"{where}no device is called 'uart': did you mean 'uart0'?"
        assert refused(call("uart0")) == f"{where}'uart0': must name a device and a method, as uart0.feed"
        assert refused(call("uart0.feed", "--", "-5")) == (
            f"{where}uart0.feed(text: str, times: int = 1) -> list[str]: text: Input should be a valid string"
        )
        assert refused(call("uart0.fail"), status=1).startswith("uart0.fail: ZeroDivisionError: ")
        assert refused(call("uart0.fail"), status=1).endswith("(uart.py line 16)")
        assert refused(call("uart0.data"), status=1) == (
            "uart0.data: the result is not JSON: Object of type bytes is not JSON serializable"
        )
        hung = refused(call("uart0.nap", "20", "--timeout", "0.2"), status=1)
        assert hung.startswith("uart0.nap has not returned in 0.2 s: it is in nap (") and "uart.py:24)" in hung
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=patience(10))
    # The server says it, too, with its traceback.
    assert said.count("uart0: fail failed for a caller from outside") == 2 and "ZeroDivisionError" in said


def test_other_requests_do_not_wait_for_a_call(machine: Path, tmp_path: Path) -> None:
    ended = threading.Event()
    with ending(ended), serving(machine, "--run-dir", tmp_path):
        socket = socket_of(tmp_path, "m")
        request = {"method": "uart0.nap", "arguments": [patience(60)], "named": {}, "seconds": patience(60)}
        for _ in range(MOST_CALLS):
            threading.Thread(target=_nap, args=(socket, request, ended), daemon=True).start()
        deadline = time.monotonic() + patience(10)
        said = ""
        while "calls have not returned yet" not in said and time.monotonic() < deadline:
            assert ask(socket, "log", since=0) == []
            try:
                answer = ask(socket, "call", **{**request, "seconds": 0.01})
            except ConfigError as error:
                said = str(error)
            else:
                assert "has not" in answer["failed"]
        assert f"{MOST_CALLS} calls have not returned yet" in said


@contextmanager
def ending(event: threading.Event) -> Iterator[None]:
    try:
        yield
    finally:
        event.set()


def _nap(socket: Path, request: dict[str, object], ended: threading.Event) -> None:
    """A call that does not return, begun again when it is refused: a short call of the test may have the last place."""
    while not ended.wait(0.01):
        with suppress(ConfigError):  # refused, or its server was killed
            ask(socket, "call", patience=patience(60), **request)


@pytest.mark.parametrize(
    "wrong",
    [
        {"method": 5},
        {"arguments": {}},
        {"named": []},
        {"seconds": "1"},
        {"seconds": 0},
        {"seconds": 1e9},
        {"seconds": True},
        {"method": None},
    ],
)
def test_requests_that_are_wrong(tmp_path: Path, wrong: dict[str, object]) -> None:
    request: dict[str, object] = {"method": "edu0.x", "arguments": [], "named": {}, "seconds": 1.0}
    with (
        serving(EXAMPLE, "--run-dir", tmp_path),
        pytest.raises(ConfigError, match=r"a call needs a method|a call may take|for the outside"),
    ):
        ask(socket_of(tmp_path, "edu"), "call", **{**request, **wrong})
