"""The control socket of a running server, and `vmodel iommu show`, which asks it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.test_cli import ELSE, ROOT, environ, in_terminal, refused, serving, vmodel
from vmodel import control
from vmodel.control import Control, ask
from vmodel.errors import ConfigError, DmaFault
from vmodel.machine import Machine, parse
from vmodel.patience import patience
from vmodel.status import MAX_MAPPINGS, commands

MACHINE = """
[machine]
name = "m"
[[iommu]]
name = "iommu0"
kind = "vt-d"
[[device]]
name = "a"
model = "edu"
address = "0000:00:03.0"
[[device]]
name = "b"
model = "edu"
address = "0000:00:04.0"
[[group]]
device = "a"
domain = "paging"
"""
MAPPING = '[[group.mapping]]\niova = {}\ngpa = {}\nsize = "4K"\nprot = "rw"\n'


def text(mappings: int = 5) -> str:
    return MACHINE + "".join(MAPPING.format(0x100000 + n * 0x2000, n * 0x1000) for n in range(mappings))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "m.toml"
    path.write_text(text())
    return path


# ---- vmodel iommu show -------------------------------------------------------------------------------


@contextlib.contextmanager
def told(tmp_path: Path, file: Path) -> Iterator[Machine]:
    """The machine in this process, with a control socket for `vmodel iommu show`."""
    machine = parse(file.read_text(), file)
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 1 << 20)
    for device in machine.devices.values():
        device.memory.map(0, 1 << 20, fd=fd)
        device.config.write(4, b"\x06\x00")
    with Control(tmp_path, machine.name, commands(machine)):
        yield machine
    machine.close()
    os.close(fd)


def busy(machine: Machine) -> None:
    """Three hits, a miss and a fault."""
    for _ in range(4):
        machine.devices["a"].dma.read(0x100000, 4)
    with pytest.raises(DmaFault):
        machine.devices["a"].dma.write(0x101000, b"x")


def test_table(tmp_path: Path, file: Path) -> None:
    with told(tmp_path, file) as machine:
        busy(machine)
        stats = machine.devices["a"].dma.stats
        assert (stats.iotlb_hits, stats.faults) == (3, 1)
        rate = f"{100 * 3 / (3 + stats.iotlb_misses):.1f} %"
        done = vmodel("iommu", "show", file, "--run-dir", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    head, a, b, faults, last = done.stdout.splitlines()
    assert head.split() == ["group", "IOMMU", "devices", "domain", "mappings", "IOTLB", "hits", "faults"]
    shown = ", ".join(f"{0x100000 + n * 0x2000:#x}..{0x100FFF + n * 0x2000:#x} -> {n * 0x1000:#x}" for n in range(4))
    assert a.split(None, 3)[:3] == ["0", "iommu0", "a"]
    assert f" 5: {shown}, ... " in a and a.endswith(" 1") and f" {rate} " in a
    assert b.split() == ["1", "iommu0", "b", "identity", "-", "0"]
    assert faults == "iommu0: 1 faults"
    assert last == "  iommu0: a [0x18]: WRITE at iova 0x101000: NOT_MAPPED (DMA-FQ domain, group 0)"


def test_stale_uses_and_pasids(tmp_path: Path, file: Path) -> None:
    """Where somebody looks at them they have a column."""
    more = 'kind = "vt-d"\nparams = { report_stale = true }\ncapabilities = { flush_ms = 100000.0 }\n'
    file.write_text(file.read_text().replace('kind = "vt-d"\n', more, 1))
    with told(tmp_path, file) as machine:
        busy(machine)
        group = machine.system["a"].group
        assert group is not None
        group.attach_pasid(group.iommu.identity, 5)
        group.domain.unmap(0x100000, 0x1000)  # type: ignore[attr-defined]
        machine.devices["a"].dma.read(0x100000, 4)
        done = vmodel("iommu", "show", file, "--run-dir", tmp_path)
        found = ask(tmp_path / "m.control", "iommu")
    head, a, b, *_ = done.stdout.splitlines()
    assert head.split()[-2:] == ["faults", "stale"]
    assert a.split()[-2:] == ["1", "1"] and "; pasid 5: identity" in a
    assert b.split()[-2:] == ["0", "0"]
    assert found["devices"]["a"]["stale"] == 1 and found["iommus"][0]["report_stale"] is True


def test_json(tmp_path: Path, file: Path) -> None:
    with told(tmp_path, file) as machine:
        busy(machine)
        done = vmodel("iommu", "show", file, "--run-dir", tmp_path, "--json")
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)
    found = json.loads(done.stdout)
    assert list(found) == ["machine", "iommus", "groups", "devices"]
    assert found["machine"] == "m"
    (iommu,) = found["iommus"]
    assert (iommu["name"], iommu["kind"], iommu["faults"], iommu["lost"]) == ("iommu0", "vt-d", 1, 0)
    assert len(iommu["last_faults"]) == 1
    a, b = found["groups"]
    assert (a["number"], a["iommu"], a["devices"], a["pasids"], a["mapping_count"]) == (0, "iommu0", ["a"], {}, 5)
    assert a["mappings"][1] == {"iova": 0x102000, "last": 0x102FFF, "gpa": 0x1000, "access": 3}
    assert (b["type"], b["devices"]) == ("identity", ["b"]) and "mappings" not in b
    assert found["devices"]["a"]["iotlb_hits"] == 3 and found["devices"]["a"]["faults"] == 1


def test_more_mappings_than_are_told_of(tmp_path: Path, file: Path) -> None:
    with told(tmp_path, file) as machine:
        group = machine.system["a"].group
        assert group is not None
        for n in range(MAX_MAPPINGS):
            group.domain.map(0x4000_0000 + n * 0x2000, 0, 0x1000)  # type: ignore[attr-defined]
        shown = ask(tmp_path / "m.control", "iommu")["groups"][0]
    assert (shown["mapping_count"], len(shown["mappings"])) == (MAX_MAPPINGS + 5, MAX_MAPPINGS)


def test_watch_until_ctrl_c(tmp_path: Path, file: Path) -> None:
    """In a terminal a table; for tools a line a second."""
    with serving(file, "--run-dir", tmp_path / "run"):
        line = ["iommu", "show", file, "--run-dir", tmp_path / "run", "--watch"]
        shown = in_terminal(*line, keys=b"\x03", until=b"identity")
        assert shown.endswith(b"status 130") and b"Traceback" not in shown
        assert b"\x1b[?25h" in shown, "the cursor is there again"
        command = [sys.executable, "-m", "vmodel", *map(str, line), "--json"]
        with subprocess.Popen(command, env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None and run.stderr is not None
            for _ in range(2):
                assert json.loads(run.stdout.readline())["machine"] == "m"
            run.send_signal(signal.SIGINT)
            assert (run.wait(20), run.stderr.read()) == (130, "")


def test_watch_of_a_server_that_ends(tmp_path: Path, file: Path) -> None:
    with serving(file, "--run-dir", tmp_path / "run") as (server, _):
        command = [sys.executable, "-m", "vmodel", "iommu", "show", str(file), "--run-dir", str(tmp_path / "run"), "-w"]
        with subprocess.Popen(
            [*command, "--json"], env=environ(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as run:
            assert run.stdout is not None and run.stderr is not None
            run.stdout.readline()
            server.terminate()
            assert run.wait(20) == 2
            assert run.stderr.read().startswith(f"vmodel: no server runs in {tmp_path}/run: ")


def test_no_server(tmp_path: Path, file: Path) -> None:
    line = ["iommu", "show", file, "--run-dir", tmp_path]
    said = f"no server runs in {tmp_path}: start `vmodel serve` or `run`, or name its --run-dir"
    for extra in ([], ["--json"], ["--watch"]):
        assert refused(vmodel(*line, *extra)) == said
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "m.control"))
    assert refused(vmodel(*line)) == said
    assert refused(vmodel("iommu", "show", tmp_path / "x.toml")).endswith("cannot be read: No such file or directory")


# ---- what a server makes of its clients --------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Path]:
    """The socket of one with two commands."""

    def fails(_: object) -> None:
        raise RuntimeError("no luck")

    with Control(tmp_path, "m", {"echo": lambda request: request.get("what"), "fails": fails}) as running:
        yield running.path
    assert not (tmp_path / "m.control").exists()


def raw(path: Path, data: bytes, end: bool = True) -> bytes:
    """The answer to some bytes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        answer = b""
        # It may hang up on what it has not read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            sock.sendall(data)
            if end:
                sock.shutdown(socket.SHUT_WR)
            while piece := sock.recv(65536):
                answer += piece
        return answer


def test_ask(server: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert ask(server, "echo", what={"é": [1]}) == {"é": [1]}
    for command, said in (("nix", "unknown request: known are echo, fails"), ("fails", "RuntimeError: no luck")):
        with pytest.raises(ConfigError, match=f"^the server in {server.parent}: {said}$"):
            ask(server, command)
    assert "control: fails failed" in caplog.text  # with its traceback: it is a bug
    assert oct(server.stat().st_mode & 0o777) == "0o600"


NO_SUCH = {"error": "unknown request: known are echo, fails"}


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"\n",
        b"\0\xff\xfe\n",
        b"{\n",
        b"[]\n",
        b'"echo"\n',
        b"1\n",
        b"null\n",
        b"{}\n",
        b'{"command": ["echo"]}\n',
        b'{"command": {}}\n',
        b'{"command": null}\n',
        b'{"command": "' + b"x" * 60000 + b'"}\n',
        b"[" * 60000 + b"\n",
        b"9" * 6000 + b"\n",
        b'{"command": "echo"',
    ],
)
def test_garbage(server: Path, request_: bytes) -> None:
    assert json.loads(raw(server, request_)) == NO_SUCH
    assert ask(server, "echo", what=1) == 1


def test_requests_without_end(server: Path) -> None:
    """64 KiB without the end of a line are refused; what follows is not read."""
    answer = raw(server, b" " * (4 << 20), end=False)
    assert not answer or json.loads(answer) == NO_SUCH
    assert ask(server, "echo", what=1) == 1


def test_two_requests_in_one_go(server: Path) -> None:
    assert raw(server, b'{"command": "echo", "what": 1}\n{"command": "echo", "what": 2}\n') == b'{"result": 1}\n'


def test_silent_clients_block_nobody(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as stack:
        for n in range(control._MAX_CLIENTS - 1):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(server))
            sock.sendall(b"{" * (n % 2))
        start = time.monotonic()
        assert ask(server, "echo", what=1) == 1
        assert time.monotonic() - start < patience(2)


def test_a_crowd_of_silent_clients_is_sent_away(server: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those that send a byte now and then."""
    monkeypatch.setattr(control, "_TIMEOUT", 0.5)
    stop = threading.Event()

    def dribble(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.1):
                sock.sendall(b" ")

    with contextlib.ExitStack() as stack:
        for n in range(control._MAX_CLIENTS):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(server))
            if n % 2:
                thread = threading.Thread(target=dribble, args=(sock,))
                thread.start()
                stack.callback(thread.join)
        stack.callback(stop.set)
        answer = raw(server, b'{"command": "echo", "what": 1}\n')
    assert answer == b'{"result": 1}\n'


def test_it_ends_while_clients_are_there(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        with Control(tmp_path, "m", {}) as running:
            for _ in range(control._MAX_CLIENTS + 2):
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(str(running.path))
            start = time.monotonic()
        assert time.monotonic() - start < patience(2)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("vmodel-control")]


@pytest.mark.parametrize(
    "answer", [b"", b"\xff\n", b"[]\n", b"1\n", b"{}\n", b'"error"\n', b"null\n", b"[" * 100_000, None]
)
def test_servers_that_are_none(tmp_path: Path, answer: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """None: it says nothing at all."""
    monkeypatch.setattr(control, "_TIMEOUT", 0.5)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "m.control"))
        listener.listen()

        def serve() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(4096)
                if answer is None:
                    time.sleep(1)
                else:
                    sock.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(ConfigError, match=f"^the server in {tmp_path} does not answer: [^\n]+$"):
            ask(tmp_path / "m.control", "iommu")
        thread.join()


# ---- more than one server ----------------------------------------------------------------------------


def files(folder: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def test_two_servers_of_one_machine(tmp_path: Path) -> None:
    """The second is refused, and takes nothing from the first."""
    run, file = tmp_path / "run", ROOT / "examples" / "edu-viommu.toml"
    with serving(file, "--run-dir", run):
        before = files(run)
        assert sorted(before) == ["edu-viommu.control", "edu-viommu.viot", "edu0.sock", "viommu0.sock"]
        said = refused(vmodel("serve", file, "--run-dir", run))
        assert said == f"machine 'edu-viommu' is being served already on {run}/edu-viommu.control: {ELSE}"
        assert files(run) == before
        assert vmodel("iommu", "show", file, "--run-dir", run).returncode == 0


def test_two_machines_in_one_run_dir(tmp_path: Path) -> None:
    """Each has its sockets and its ACPI tables, as long as no two devices have one name."""
    run = tmp_path / "run"
    one, other, clash = tmp_path / "one.toml", tmp_path / "other.toml", tmp_path / "clash.toml"
    example = (ROOT / "examples" / "edu-viommu.toml").read_text().replace("0000:00:03.0", "0000:00:05.0")
    one.write_text((ROOT / "examples" / "edu-viommu.toml").read_text().replace('name = "edu-viommu"', 'name = "one"'))
    other.write_text(example.replace('"edu-viommu"', '"other"').replace("edu0", "edu1").replace("viommu0", "viommu1"))
    clash.write_text(example.replace('"edu-viommu"', '"clash"').replace("viommu0", "viommu2"))
    with serving(one, "--run-dir", run):
        with serving(other, "--run-dir", run) as (second, _):
            both = files(run)
            assert {name for name, content in both.items() if content} == {"one.viot", "other.viot"}
            assert both["one.viot"] != both["other.viot"]
            for file, name in ((one, "one"), (other, "other")):
                assert f"{run}/{name}.viot" in vmodel("qemu-args", file, "--run-dir", run).stdout
                shown = json.loads(vmodel("iommu", "show", file, "--run-dir", run, "--json").stdout)
                assert shown["machine"] == name
            said = refused(vmodel("serve", clash, "--run-dir", run))
            assert said == f"device 'edu0' is being served already on {run}/edu0.sock: {ELSE}"
            assert files(run) == both
            second.terminate()
            assert second.wait(20) == 0
        assert sorted(files(run)) == ["edu0.sock", "one.control", "one.viot", "viommu0.sock"]
        assert files(run)["one.viot"] == both["one.viot"]


def test_run_dirs_that_qemu_would_misread(tmp_path: Path) -> None:
    file = ROOT / "examples" / "edu-vtd.toml"
    words = vmodel("qemu-args", file, "--run-dir", tmp_path / "a,b").stdout
    assert f"file={tmp_path}/a,,b/edu-vtd.dmar" in words
    assert "use another --run-dir" in refused(vmodel("qemu-args", file, "--run-dir", tmp_path / "a:b"))
