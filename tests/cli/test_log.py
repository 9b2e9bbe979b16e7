"""`vmodel log -f`, and --verbose: what the devices of a running server do, as a user sees it."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue

import pytest

from tests.cli.commands import EXAMPLE, environ, in_terminal, refused, serving, vmodel
from tests.waiting import until
from vmodel.control import ask, socket_of
from vmodel.errors import ConfigError
from vmodel.patience import patience
from vmodel.trace import VERBOSE_BURST
from vmodel.vfio_user.client import Client

pytestmark = pytest.mark.slow

MACHINE = """
[machine]
name = "nvme"

[[device]]
name = "nvme0"
model = "nvme"
address = "0000:00:04.0"
params = { namespaces = [ { memory = "1M" } ] }
"""
#: As Linux's driver writes it: enabled, with entries of 64 and 16 bytes.
CC = 0x0046_0001
LINE = "nvme0 write CC = 0x00460001 (EN=1 IOSQES=6 IOCQES=4)"


def written(folder: Path) -> Path:
    """The machine's file."""
    path = folder / "nvme.toml"
    path.write_text(MACHINE)
    return path


def drive(folder: Path, floods: int = 0) -> None:
    """A client that enables memory space, reads NVMe's CAP, writes CC, and then reads VS `floods` times."""
    with Client.connect(folder / "nvme0.sock") as client:
        client.negotiate()
        client.region_write(7, 4, b"\x06\x00")
        client.region_read(0, 0, 8)
        client.region_write(0, 0x14, CC.to_bytes(4, "little"))
        for _ in range(floods):
            client.region_read(0, 8, 4)


class Follower:
    """`vmodel log -f` in a process of its own, once it follows."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self._lines: Queue[str] = Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for text in self.process.stdout:
            self._lines.put(text.rstrip("\n"))

    def line(self) -> str:
        """The next line."""
        return self._lines.get(timeout=patience(30))

    def lines(self, last: str) -> list[str]:
        """The lines up to one that ends with `last`, without their times."""
        found: list[str] = []
        while not found or not found[-1].endswith(last):
            found.append(self.line().partition(" ")[2])
        return found

    def end(self) -> tuple[int, list[str], str]:
        """Its status, the lines that are left, and its stderr; call it when it has to end."""
        assert self.process.stderr is not None
        status, said = self.process.wait(patience(20)), self.process.stderr.read()
        self._reader.join(patience(10))
        return status, list(self._lines.queue), said


@contextmanager
def following(folder: Path, *options: str) -> Iterator[Follower]:
    line = [sys.executable, "-m", "vmodel", "log", str(written(folder)), "--run-dir", str(folder), "-f", *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, env=environ(), text=True, **pipes) as process:
        try:
            yield Follower(process)
        finally:
            process.kill()


def followers(folder: Path, number: int) -> None:
    """Waits until so many follow."""
    socket = socket_of(folder, "nvme")
    until(lambda: ask(socket, "trace.followers") == number, f"{number} follow", seconds=30, pause=0.05)


def test_two_follow_until_the_server_ends(tmp_path: Path) -> None:
    with (
        serving(written(tmp_path), "--run-dir", tmp_path) as (server, _),
        following(tmp_path) as everything,
        following(tmp_path, "--device", "nvme0", "--register", "CC", "--json") as one,
    ):
        followers(tmp_path, 2)
        drive(tmp_path)
        assert everything.lines("client gone") == [
            "nvme0 client connected",
            "nvme0 config write COMMAND = 0x0006 (MEMORY=1 BUS_MASTER=1)",
            "nvme0 read CAP = 0x00400020140303ff (MQES=0x3ff CQR=1 AMS=1 TO=0x14 CSS=1 MPSMAX=4)",
            LINE,
            "nvme0 client gone",
        ]
        record = json.loads(one.line())
        server.send_signal(signal.SIGTERM)
        assert server.wait(patience(20)) == 0
        assert everything.end() == (0, [], "")
        assert one.end() == (0, [], "")
        assert record["registers"] == [
            {"name": "CC", "value": "0x00460001", "fields": {"EN": 1, "IOSQES": 6, "IOCQES": 4}}
        ]


def test_ctrl_c_disarms(tmp_path: Path) -> None:
    with serving(written(tmp_path), "--run-dir", tmp_path), following(tmp_path) as follower:
        followers(tmp_path, 1)
        follower.process.send_signal(signal.SIGINT)
        assert follower.end() == (130, [], "")
        followers(tmp_path, 0)


def test_a_flood_is_counted(tmp_path: Path) -> None:
    """A follower that is stopped for a moment gets the first events, and the number of the others."""
    with serving(written(tmp_path), "--run-dir", tmp_path), following(tmp_path, "--point", "mmio") as follower:
        followers(tmp_path, 1)
        follower.process.send_signal(signal.SIGSTOP)
        drive(tmp_path, floods=7000)
        follower.process.send_signal(signal.SIGCONT)
        lines = follower.lines("or --point)")
        assert lines[1] == LINE
        more = re.fullmatch(r"more, not kept: follow fewer with --device, --register or --point\)", lines[-1])
        assert more and 5000 <= len(lines) <= 7003


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["-f", "--device", "nmve0"], "the server in {}: no device is called 'nmve0': did you mean 'nvme0'?"),
        (["-f", "--register", "CSTSS"], "the server in {}: no register is called 'CSTSS': did you mean 'CSTS'?"),
        (
            ["-f", "--point", "mmio.wirte"],
            "the server in {}: no point is called 'mmio.wirte': did you mean 'mmio.write'?",
        ),
        (["--register", "CC"], "--register: only with --follow"),
        (["-f", "--injections", "--point", "irq"], "--injections: not together with --register or --point"),
    ],
)
def test_mistakes(tmp_path: Path, options: list[str], said: str) -> None:
    with serving(written(tmp_path), "--run-dir", tmp_path):
        assert refused(vmodel("log", written(tmp_path), "--run-dir", tmp_path, *options)) == said.format(tmp_path)


def test_requests_that_are_wrong(tmp_path: Path) -> None:
    with serving(written(tmp_path), "--run-dir", tmp_path):
        socket = socket_of(tmp_path, "nvme")
        for command, arguments in (
            ("trace.follow", {"devices": "nvme0"}),
            ("trace.follow", {"registers": [3]}),
            ("trace.take", {}),
            ("trace.take", {"follower": "1"}),
            ("trace.leave", {"follower": [1]}),
        ):
            with pytest.raises(ConfigError, match="must be"):
                ask(socket, command, **arguments)
        assert ask(socket, "trace.take", follower=-1) is None


def test_in_a_terminal(tmp_path: Path) -> None:
    """Ctrl-C ends it; nothing is coloured, and a line of a register fits into 80 columns."""
    with serving(written(tmp_path), "--run-dir", tmp_path):
        drives = threading.Timer(0, lambda: (followers(tmp_path, 1), drive(tmp_path)))
        drives.start()
        options = ("log", written(tmp_path), "--run-dir", tmp_path, "-f")
        shown = in_terminal(*options, env={"NO_COLOR": "1"}, keys=b"\x03", until=b"client gone").decode()
        drives.join(patience(30))
    assert shown.endswith("status 130") and "\x1b" not in shown and "Traceback" not in shown
    (line,) = (line for line in shown.splitlines() if line.endswith(LINE))
    assert len(line) <= 80


@pytest.mark.parametrize("options", [["--register", "CC"], []])
def test_verbose_servers_log_the_same(tmp_path: Path, options: list[str]) -> None:
    with serving(written(tmp_path), "--run-dir", tmp_path, "-v", *options) as (server, _):
        drive(tmp_path)
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=patience(20))
    lines = [line.partition("vmodel.trace: ")[2] for line in said.splitlines() if "vmodel.trace: " in line]
    assert LINE in lines and (len(lines) == 1) is bool(options)


def test_a_flood_of_a_verbose_server_is_counted(tmp_path: Path) -> None:
    count = VERBOSE_BURST + 200
    with serving(written(tmp_path), "--run-dir", tmp_path, "-v", "--register", "VS") as (server, _):
        drive(tmp_path, count)  # what is logged fits into a pipe: it is not read meanwhile
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=patience(20))
    kept = said.count("read VS = 0x00010400\n")
    held = sum(int(n) for n in re.findall(r"(\d+) lines (?:before it )?were held back", said))
    assert kept + held == count and held > 0


@pytest.mark.parametrize("command", ["serve", "run", "guest"])
def test_filters_are_for_verbose(tmp_path: Path, command: str) -> None:
    words = ["--", "true"] if command == "guest" else []
    done = vmodel(command, EXAMPLE, "--run-dir", tmp_path, "--device", "edu0", *words)
    assert refused(done) == "--device: only with --verbose"
    done = vmodel(command, EXAMPLE, "--run-dir", tmp_path, "-v", "--register", "SATTUS", *words)
    assert refused(done) == "no register is called 'SATTUS': did you mean 'STATUS'?"
