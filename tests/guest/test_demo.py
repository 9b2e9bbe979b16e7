"""scripts/demo, and the commands that start QEMU, as a user runs them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.waiting import until
from vmodel.control import ask, socket_of
from vmodel.guest.artifacts import find_kernel
from vmodel.patience import patience

pytestmark = pytest.mark.guest
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "edu.toml"
VMODEL = [sys.executable, "-m", "vmodel"]
#: The slots that q35's default devices would take, all functions that a slot may have, the last slot.
CROWDED = """
[machine]
name = "crowded"
memory = "256M"
""" + "".join(
    f'[[device]]\nname = "d{n}"\nmodel = "{model}"\naddress = "0000:00:{address}"\n'
    for n, (model, address) in enumerate(
        [("edu", "01.0"), ("idio16", "01.1"), ("edu", "01.7"), ("edu", "02.0"), ("edu", "1e.0")]
    )
)


def run(*line: str | Path, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, line)),
        input=stdin,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=patience(200),
    )


def counters(table: str) -> dict[str, list[str]]:
    """The summary's rows: label to values."""
    rows = (re.fullmatch(r" *(\S.*?)  +(\S.*)", line) for line in table.splitlines())
    return {row[1]: row[2].split() for row in rows if row}


# ---- scripts/demo -----------------------------------------------------------------------------------

in_venv = pytest.mark.skipif(
    Path(sys.prefix) != ROOT / ".venv", reason="scripts/demo makes .venv: run scripts/test, which has made it"
)


@in_venv
def test_the_demo() -> None:
    done = run(ROOT / "scripts" / "demo")
    assert done.returncode == 0, done
    steps = re.findall(
        r"^\[(\d)/4\]|^(group|round trip|device|id|liveness|factorial|refused|DMA|namespace|4 KiB reads|4 KiB writes) "
        r"|^(all is well|demo: all is well)"
        r"|(?<= )(refused): ",
        done.stdout,
        re.MULTILINE,
    )
    assert ["".join(step) for step in steps] == [
        "1", "2", "3", "4",
        "group", "round trip", "refused", "refused", "round trip", "refused", "round trip", "all is well",
        "device", "id", "liveness", "factorial", "DMA",
        "device", "id", "liveness", "factorial", "refused", "DMA",
        "namespace", "round trip", "4 KiB reads", "4 KiB writes", "demo: all is well",
    ]  # fmt: skip
    # What the guest's own IOMMU driver says of a fault.
    line = r"DMAR: \[DMA Write NO_PASID\] Request device \[00:05\.0\] fault addr 0x123402000 \[fault reason 0x05\]"
    assert re.search(line, done.stdout)
    assert "vtd0: 3 faults recorded\n  vtd0: edu2 [0x28]: WRITE at iova 0x123402000: NOT_MAPPED" in done.stderr
    # By listed mappings: IOVA != GPA, and the access that was refused is in the IOMMU's record.
    iova, page = re.search(r"equal: iova (0x\w+) leads to page (0x\w+)", done.stdout).groups()
    assert int(iova, 16) == int(page, 16) + (1 << 30)
    refused = re.search(r"^refused +DMA to iova (0x\w+),", done.stdout, re.MULTILINE)[1]
    assert f"iommu0: 1 fault recorded\n  iommu0: edu1 [0x20]: WRITE at iova {refused}: NOT_MAPPED" in done.stderr
    # The kernel's own driver, by IOVAs of the guest's: each byte went once to the controller and once back.
    assert re.search(r"^namespace +nvme0n1: 64 MiB in blocks of 512 bytes; IOMMU: DMA", done.stdout, re.MULTILINE)
    assert re.search(
        r"^round trip .* written with \d+ MB/s and flushed, read with \d+ MB/s, equal$", done.stdout, re.MULTILINE
    )
    found = counters(done.stderr)
    for way in ("guest to device", "device to guest"):
        assert int(found[f"DMA bytes, {way}"][3].replace(",", "")) > 32 << 20
    assert found["interrupts"][:2] == ["3", "3"]
    assert found["DMA bytes, guest to device"][:3] == found["DMA bytes, device to guest"][:3]
    assert found["DMA bytes, guest to device"][:2] == ["4,096", "4,096"]
    assert found["DMA faults"][:2] == ["0", "1"]
    reads, writes, all_ = (int(found[key][0].replace(",", "")) for key in ("reads", "writes", "accesses by the guest"))
    assert reads + writes == all_ > 2000
    assert found["wall time, boot to power-off"][1] == "s"


@in_venv
def test_a_demo_that_fails_says_where_the_logs_are(tmp_path: Path) -> None:
    """A compiler that makes a program that fails in the guest."""
    cc = tmp_path / "cc"
    cc.write_text('#!/bin/sh\necho "#!/bin/sh\necho went wrong; exit 3" > "$4"\nchmod 755 "$4"\n')
    cc.chmod(0o755)
    # Sockets will be in there: tmp_path is too long for that.
    with tempfile.TemporaryDirectory(prefix="vmodel-") as short:
        done = run(ROOT / "scripts" / "demo", PATH=f"{tmp_path}:{os.environ['PATH']}", TMPDIR=short)
        assert done.returncode == 3, done
        assert "all is well" not in done.stdout
        logs = re.search(r"^demo: FAILED with status 3; .* are in (\S+)$", done.stderr, re.MULTILINE)
        assert logs is not None, done.stderr
        assert (Path(logs[1]) / "output.log").read_text() == "went wrong\n"
        assert {"console.log", "qemu.line", "qemu.log"} <= {path.name for path in Path(logs[1]).iterdir()}


# ---- vmodel guest -----------------------------------------------------------------------------------


def test_status_and_streams(kernel: str, compiled: Callable[[str], Path], tmp_path: Path) -> None:
    """What the command prints is all there is on stdout, what the kernel says is on stderr."""
    script = "./edu_check >log && uname -r && ls tool && echo '<3>a word of the kernel' >/dev/kmsg; sleep 0.2; exit 7"
    check = compiled("examples/edu_check.c")
    line = [*VMODEL, "guest", EXAMPLE, "--run-dir", tmp_path / "run", "--artifacts", tmp_path / "logs"]
    line += ["--kernel", kernel, "--module", "uio_pci_generic", "--file", check, "--file", f"{check}:/root/tool"]
    done = run(*line, "--stats", "--append", "loglevel=5", "--", "sh", "-c", script)
    assert done.returncode == 7, done
    assert done.stdout == f"{find_kernel(kernel).release}\ntool\n"
    assert "a word of the kernel\n" in done.stderr
    assert counters(done.stderr)["interrupts"] == ["3"]
    assert list((tmp_path / "run").iterdir()) == []
    assert (tmp_path / "logs" / "output.log").read_text() == done.stdout
    assert "loglevel=5" in (tmp_path / "logs" / "qemu.line").read_text()


def test_every_device_is_at_its_address(tmp_path: Path) -> None:
    machine = tmp_path / "m.toml"
    machine.write_text(CROWDED)
    script = 'cd /sys/bus/pci/devices; for d in *; do echo "$d $(cat $d/vendor $d/device | tr -d "\\n")"; done'
    done = run(*VMODEL, "guest", machine, "--run-dir", tmp_path, "--", "sh", "-c", script)
    found = dict(line.split() for line in done.stdout.splitlines())
    ours = {address: ids for address, ids in found.items() if not ids.startswith("0x8086")}
    assert ours == {
        "0000:00:01.0": "0x12340x11e8",
        "0000:00:01.1": "0x494f0x0dc8",
        "0000:00:01.7": "0x12340x11e8",
        "0000:00:02.0": "0x12340x11e8",
        "0000:00:1e.0": "0x12340x11e8",
    }


def test_standard_input_and_what_a_driver_does(tmp_path: Path) -> None:
    """The driver begins once somebody follows: `vmodel log -f` and -v have its accesses, each by its own filter."""
    shutil.copytree(Path(__file__).parent / "driver", tmp_path / "driver")
    folder = tmp_path / "run"
    here = ["guest", str(EXAMPLE), "--run-dir", str(folder), "--interactive", "--extra-module", "driver/"]
    filters = ["--verbose", "--device", "edu0", "--register", "regs.STATUS"]
    script = ["--", "sh", "-c", "read a; modprobe factorial number=5; echo got $a"]
    log = ["log", str(EXAMPLE), "--run-dir", str(folder), "-f", "--device", "edu0", "--register", "FACTORIAL"]

    def started(line: list[str]) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([*VMODEL, *line], cwd=tmp_path, stdin=pipe, stdout=pipe, stderr=pipe, text=True)

    with started([*here, *filters, *script]) as guest:
        try:
            socket = socket_of(folder, "edu")
            until(socket.exists, "the server is there", seconds=60)
            with started(log) as follower:
                try:
                    until(lambda: ask(socket, "trace.followers") == 1, "somebody follows", seconds=30, pause=0.05)
                    out, err = guest.communicate("a line\n", timeout=patience(90))
                    found, said = follower.communicate(timeout=patience(20))
                finally:
                    follower.kill()
        finally:
            guest.kill()
    assert (guest.returncode, out) == (0, "got a line\n"), err
    accesses = ["edu0 write FACTORIAL = 0x00000005", "edu0 read FACTORIAL = 0x00000078"]
    assert ([line.partition(" ")[2] for line in found.splitlines()], follower.returncode, said) == (accesses, 0, "")
    logged = [line.partition("vmodel.trace: ")[2] for line in err.splitlines() if "vmodel.trace: " in line]
    assert logged and all(line.startswith("edu0 read STATUS = 0x000000") for line in logged), err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_guest_that_is_stopped(number: int, tmp_path: Path) -> None:
    line = [*VMODEL, "guest", EXAMPLE, "--run-dir", tmp_path / "run", "--artifacts", tmp_path / "logs", "--"]
    command = list(map(str, [*line, "sh", "-c", "echo up; sleep 100"]))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as guest:
        assert guest.stdout is not None
        assert guest.stdout.readline() == "up\n"
        start = time.monotonic()
        guest.send_signal(number)
        out, err = guest.communicate(timeout=patience(30))
        assert time.monotonic() - start < patience(20)
    assert (guest.returncode, out, err) == (128 + number, "", "")
    assert list((tmp_path / "run").iterdir()) == []
    # QEMU has gone with it: nobody has this run's socket in their command line.
    lines = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if os.access(p, os.R_OK)]
    assert not [line for line in lines if b"vfio-user-pci" in line and os.fsencode(tmp_path) in line]


# ---- vmodel run -------------------------------------------------------------------------------------


def test_run_with_qemus_default_devices(tmp_path: Path) -> None:
    """QEMU's display and network card make room for ours; `quit` ends it with status 0; -v logs one device."""
    machine = tmp_path / "m.toml"
    machine.write_text(CROWDED)
    line = ["run", machine, "--run-dir", tmp_path / "run", "-v", "--device", "d1", "--register", "COMMAND"]
    done = run(*VMODEL, *line, "--", "-display", "none", "-monitor", "stdio", "-S", stdin="info pci\nquit\n")
    assert done.returncode == 0, done
    assert len(re.findall("PCI device 1234:11e8", done.stdout)) == 4
    logged = re.findall(r"vmodel\.trace: (.*)", done.stderr)
    assert logged and all(line.startswith("d1 config ") for line in logged), done.stderr
    assert list((tmp_path / "run").iterdir()) == []


def test_run_hands_on_what_qemu_says_of_its_arguments(tmp_path: Path) -> None:
    done = run(*VMODEL, "run", EXAMPLE, "--run-dir", tmp_path, "--", "-no-such-option")
    assert done.returncode == 1
    assert "-no-such-option: invalid option" in done.stderr
