"""The command line as a user meets it: each command in a process of its own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.commands import ELSE, EXAMPLE, ROOT, environ, in_terminal, refused, serving, vmodel
from vmodel.cli import main, serve
from vmodel.errors import ConfigError
from vmodel.patience import patience
from vmodel.vfio_user.client import Client

#: Stands in for QEMU: says what it was asked, connects to the device, and does what the arguments say.
FAKE_QEMU = f"""#!{sys.executable}
import json, os, signal, socket, sys, time
if "--version" in sys.argv:
    print("QEMU emulator version 11.0.0")
elif "help" in sys.argv:
    print('name "vfio-user-pci", bus PCI')
else:
    device = json.loads(sys.argv[sys.argv.index("-device") + 1])
    socket.socket(socket.AF_UNIX).connect(device["socket"]["path"])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(33))
    print("qemu", sys.argv[-1], flush=True)
    if sys.argv[-1] == "sleep":
        while True:
            time.sleep(0.01)  # Python handles a signal that comes just before a sleep only when that is over
    elif sys.argv[-1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(sys.argv[-1]))
"""


@pytest.fixture
def qemu(tmp_path: Path) -> Path:
    path = tmp_path / "fake-qemu"
    path.write_text(FAKE_QEMU)
    path.chmod(0o755)
    return path


# ---- the command line itself ----------------------------------------------------------------------


@pytest.mark.slow
def test_help_lists_the_commands() -> None:
    for arguments in ([], ["--help"], ["-h"]):
        done = vmodel(*arguments)
        assert done.returncode == 0
        for command in ("serve", "run", "qemu-args", "guest", "devices", "regs", "doctor"):
            assert re.search(rf"^  {command} ", done.stdout, re.MULTILINE)


def test_version() -> None:
    assert re.match(r"vmodel \S+", vmodel("--version").stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("servee x.toml", "no such command 'servee'. Did you mean 'serve'? (see vmodel --help)"),
        ("serve", "missing argument 'MACHINE.toml' (see vmodel serve --help)"),
        ("serve a b", "got unexpected extra argument(s) (b) (see vmodel serve --help)"),
        ("guest x.toml", "missing argument '-- COMMAND...' (see vmodel guest --help)"),
        ("guest x.toml --timeout 0 -- true", "--timeout 0: must be more than 0 seconds"),
        ("serve nix.toml", "nix.toml: cannot be read: No such file or directory"),
        ("regs ed", "unknown model 'ed': did you mean 'edu'? Built-ins are edu, idio16, nvme; else"
         ' "path/file.py:Class", or "package.module:Class"'),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(line: str, said: str, tmp_path: Path) -> None:
    assert refused(vmodel(*line.split(), cwd=tmp_path)) == said


def test_a_misspelt_option() -> None:
    assert re.search(r"no such option:? '?--rundir.*--run-dir", refused(vmodel("serve", "x.toml", "--rundir", "y")))


@pytest.mark.slow
def test_each_mistake_of_a_machine_is_a_line(tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text('[machine]\nname = "a/b"\nmemory = "1"\n')
    for command in (["serve", file], ["run", file], ["qemu-args", file], ["guest", file, "--", "true"]):
        done = vmodel(*command)
        assert (done.returncode, done.stdout) == (2, "")
        assert [line.split(": ")[:3] for line in done.stderr.splitlines()] == [
            ["vmodel", str(file), "machine.name"],
            ["vmodel", str(file), "machine.memory"],
        ]


def test_a_reader_that_goes_away() -> None:
    line = f"{sys.executable} -m vmodel regs edu | head -1"
    done = subprocess.run(["sh", "-c", line], env=environ(), capture_output=True, text=True, timeout=patience(60))
    assert done.stdout.startswith("1234:11e8") and done.stderr == ""


#: In place of the shim: nothing, and one that was built before the sources were updated.
_SHIMS = {
    "missing": "sys.modules['vmodel._vmshim'] = None\n",
    "old": """
import vmodel._vmshim as shim
class Old:
    def __getattr__(self, name):
        return getattr(lib, "VMS_NOT_YET" if name == "VMS_EXIT_REPLY" else name)
lib, shim.lib = shim.lib, Old()
""",
}


@pytest.mark.parametrize("shim", _SHIMS)
def test_without_the_shim(shim: str) -> None:
    """doctor says what to do, the others say so in a line."""
    code = f"import sys\n{_SHIMS[shim]}from vmodel.cli import main; sys.exit(main(sys.argv[1:]))"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", code, *arguments]
        return subprocess.run(line, env=environ(), capture_output=True, text=True, timeout=patience(60))

    assert re.match(r"the C shim cannot be loaded \(.*\): .* -m pip install --editable ", refused(run("devices"), 1))
    done = run("doctor", "--json")
    check = json.loads(done.stdout)["checks"][0]
    assert (done.returncode, check["name"], check["ok"]) == (1, "C shim", False)
    assert "pip install" in check["fix"]


# ---- serve ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve(number: int, tmp_path: Path) -> None:
    path = tmp_path / "run" / "edu0.sock"
    with serving(EXAMPLE, "--run-dir", tmp_path / "run") as (server, said):
        assert said == [f"edu0 {path}"]
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        with Client.connect(path) as client:
            client.negotiate()
            assert client.region_read(7, 0, 4) == bytes.fromhex("3412e811")
            server.send_signal(number)
            out, err = server.communicate(timeout=patience(10))
    assert (server.returncode, out, err) == (0, "", "")
    assert list(path.parent.iterdir()) == []


#: The signal goes to a thread that is not the main one.  So it does not interrupt a call in which the main thread
#: blocks, as a signal does not that comes just before the call.
TO_A_THREAD = """
import signal, sys, threading, time
from vmodel.cli.serve import Stop

def send():
    time.sleep(0.3)
    signal.pthread_kill(threading.get_ident(), int(sys.argv[1]))

with Stop.on_signals() as stop:
    threading.Thread(target=send).start()
    print(stop.wait(float(sys.argv[2])), stop.number)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_seen_that_interrupts_nothing(number: int) -> None:
    line = [sys.executable, "-c", TO_A_THREAD, str(int(number)), str(patience(10))]
    done = subprocess.run(line, capture_output=True, text=True, timeout=patience(30))
    assert (done.stdout, done.stderr) == (f"True {int(number)}\n", "")


@pytest.mark.slow
def test_a_dead_servers_socket_is_replaced_and_a_live_ones_is_not(tmp_path: Path) -> None:
    path = tmp_path / "edu0.sock"
    with serving(EXAMPLE, "--run-dir", tmp_path) as (first, _):
        first.kill()
        first.wait(10)
        assert path.exists()
    with serving(EXAMPLE, "--run-dir", tmp_path) as (second, _):
        said = refused(vmodel("serve", EXAMPLE, "--run-dir", tmp_path))
        assert said == f"machine 'edu' is being served already on {tmp_path}/edu.control: {ELSE}"
        with Client.connect(path) as client:  # the one that is alive does not mind
            client.negotiate()
        assert second.poll() is None


@pytest.mark.slow
def test_run_dir_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = refused(vmodel("serve", EXAMPLE, "--run-dir", tmp_path / "file"))
    assert said == f"run directory {tmp_path}/file: File exists: choose another --run-dir"
    said = refused(vmodel("serve", EXAMPLE, "--run-dir", tmp_path / ("x" * 100)))
    assert re.match(r".*: device\[0\]\.name: 'edu0': its socket .* at most 107 work: use --run-dir", said)


@pytest.mark.slow
def test_default_run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, tmp = tmp_path / "runtime", tmp_path / "tmp"
    runtime.mkdir()
    tmp.mkdir()
    with serving(EXAMPLE, XDG_RUNTIME_DIR=str(runtime)) as (_, said):
        assert said == [f"edu0 {runtime}/vmodel/edu/edu0.sock"]
    for unset in ({}, {"XDG_RUNTIME_DIR": str(tmp_path / "gone")}, {"XDG_RUNTIME_DIR": "relative"}):
        with serving(EXAMPLE, TMPDIR=str(tmp), **unset) as (_, said):
            folder = tmp / f"vmodel-{os.getuid()}" / "edu"
            assert said == [f"edu0 {folder}/edu0.sock"]
            assert [stat.S_IMODE(f.stat().st_mode) for f in (folder, folder.parent)] == [0o700, 0o700]


def test_a_default_run_dir_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    base = tmp_path / f"vmodel-{os.getuid()}"
    for make in (
        lambda: base.symlink_to(tmp_path),
        lambda: base.mkdir() or base.chmod(0o777),  # type: ignore[func-returns-value]
        lambda: base.write_text(""),
    ):
        make()
        with pytest.raises(ConfigError, match="a folder that only you can write to"):
            serve.prepare_run_dir(None, "m")
        base.rmdir() if base.is_dir() and not base.is_symlink() else base.unlink()


def test_verbose_logs_go_to_stderr(tmp_path: Path) -> None:
    with serving(EXAMPLE, "--run-dir", tmp_path, "--verbose") as (server, _):
        with Client.connect(tmp_path / "edu0.sock") as client:
            client.negotiate()
        time.sleep(0.2)
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=patience(10))
    assert re.search(r"^\d\d:\d\d:\d\d DEBUG vmodel\.\S+: edu0: ", err, re.MULTILINE)


# ---- qemu-args, run -------------------------------------------------------------------------------


def test_qemu_args_are_for_a_shell(tmp_path: Path) -> None:
    done = vmodel("qemu-args", EXAMPLE, "--run-dir", "a b", cwd=tmp_path)
    words = subprocess.run(
        ["sh", "-c", f"for word in {done.stdout.strip()}; do echo \"$word\"; done"], capture_output=True, text=True
    ).stdout.splitlines()  # fmt: skip
    device = json.loads(words[words.index("-device") + 1])
    assert device["socket"] == {"type": "unix", "path": f"{tmp_path}/a b/edu0.sock"}
    assert "share=on" in words[words.index("-object") + 1]
    assert not (tmp_path / "a b").exists()


@pytest.mark.parametrize(("argument", "status"), [("0", 0), ("7", 7), ("die", 137)])
def test_run_hands_on_qemus_status(argument: str, status: int, qemu: Path, tmp_path: Path) -> None:
    done = vmodel("run", EXAMPLE, "--run-dir", tmp_path / "run", "--", argument, VMODEL_QEMU=str(qemu))
    assert (done.returncode, done.stdout, done.stderr) == (status, f"qemu {argument}\n", "")
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_ends_qemu_when_it_is_ended(number: int, qemu: Path, tmp_path: Path) -> None:
    line = [sys.executable, "-m", "vmodel", "run", EXAMPLE, "--run-dir", tmp_path / "run", "--", "sleep"]
    env = environ(VMODEL_QEMU=str(qemu))
    with subprocess.Popen(line, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "qemu sleep\n"
        run.send_signal(number)
        assert run.wait(patience(10)) == 33
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
def test_no_qemu(tmp_path: Path) -> None:
    campaign = tmp_path / "c.toml"
    campaign.write_text(
        f"[campaign]\nname = 'c'\n[[machine]]\nfile = '{EXAMPLE}'\n[[workload]]\nname = 'w'\nrun = 'true'\n"
        "[[plan]]\nname = 'lost'\nfaults = ['irq do=drop']\n"
    )
    cases = (
        ["run", EXAMPLE],
        ["guest", EXAMPLE, "--", "true"],
        ["campaign", str(campaign)],
        ["sweep", EXAMPLE, "--point", "irq", "--workload", "true"],
        ["explore", EXAMPLE, "--driver", "vmlinux:pci", "--workload", "true", "--runs", "1"],
    )
    for command in cases:
        done = vmodel(*command, HOME=str(tmp_path), PATH="/nonexistent")
        assert re.match(r"no (QEMU|kernel).*; run scripts/get-qemu$", refused(done, 125))
    said = refused(vmodel("run", EXAMPLE, VMODEL_QEMU="/nonexistent"), 125)
    assert said == "/nonexistent cannot be run (No such file or directory); run scripts/get-qemu"


# ---- devices, regs, doctor ------------------------------------------------------------------------


def test_devices() -> None:
    assert re.search(r"^ edu +1234:11e8  QEMU's educational PCI device\.$", vmodel("devices").stdout, re.MULTILINE)
    found = json.loads(vmodel("devices", "--json").stdout)
    assert found["idio16"] == {
        "vendor_id": 0x494F,
        "device_id": 0x0DC8,
        "class_code": 0x110000,
        "class": "vmodel.devices.idio16:Idio16",
    }


def test_regs() -> None:
    text = vmodel("regs", "edu").stdout
    assert re.search(r"^ 0x0004  32 +LIVENESS +RW +0x00000000 +write  reads as the inverse", text, re.MULTILINE)
    assert re.search(r"^ +7 +\.IRQ_FACTORIAL +RW ", text, re.MULTILINE)
    assert all(line == line.rstrip() for line in text.splitlines())
    (bar,) = json.loads(vmodel("regs", "edu", "--json").stdout)["bars"]
    (bank,) = bar["banks"]
    registers = {r["name"]: r for r in bank["registers"]}
    assert registers["ID"]["reset"] == 0x010000ED and registers["ID"]["hooks"] == []
    assert registers["LIVENESS"]["hooks"] == ["write"]
    assert registers["STATUS"]["fields"][0]["name"] == "COMPUTING"


WHOLE_CARD = """
from typing import Literal
from pydantic import Field
from vmodel.device import Intx, MmioBar, Msi, Msix, PciDevice, VendorSpecific, on_write
from vmodel.device import Params as BaseParams
from vmodel.regs import RO, Bits, Layout, Reg8, Reg16, RegisterBank, Values

class Speed(Values):
    SLOW = 0
    FAST = 1, "with [red]care[/red]"

class Quota(Layout):
    SPEED = Bits(0, 3, values=Speed)

class CapRegs(RegisterBank, size=8):
    VERSION = Reg8(3, RO, reset=1)
    QUOTA = Reg16(4, layout=Quota)

class D(PciDevice):
    "A card."
    vendor_id, device_id, class_code, revision = 1, 2, 3, 0x10
    rom = bytes(2048)
    cap = VendorSpecific(CapRegs)
    msix, msi, intx = Msix(vectors=3), Msi(vectors=1), Intx(pin=2)

    class Params(BaseParams):
        ram: Literal[4096, 65536] = Field(default=4096, description="bytes of [b]RAM[/b]")
        key: str | None = None
        must: int

    @on_write(CapRegs.QUOTA)
    def quota(self, new: int) -> None: ...
"""


def test_regs_shows_the_whole_function(tmp_path: Path) -> None:
    (tmp_path / "whole.py").write_text(WHOLE_CARD)
    lines = [" ".join(line.split()) for line in vmodel("regs", "whole.py:D", cwd=tmp_path).stdout.splitlines()]
    for line in (
        "0001:0002 A card.",
        "class 000003, revision 10, subsystem 0000:0000, interrupt pin INTB, expansion ROM of 0x800 bytes",
        "cap VendorSpecific 0x09",
        "msix Msix 0x11 3 vectors; table in BAR4 at 0x0, PBA at 0x1000",
        "msi Msi 0x05 1 vector",
        "0x0004 16 QUOTA 0x0000 write",
        "1 FAST: with [red]care[/red]",
        "ram 4096 or 65536 4096 bytes of [b]RAM[/b]",
        "key string or null null",
        "must integer (required)",
        "BAR4, 0x2000 bytes, memory32",
    ):
        assert line in lines
    found = json.loads(vmodel("regs", "whole.py:D", "--json", cwd=tmp_path).stdout)
    assert [(c["name"], c["id"], c.get("vectors")) for c in found["capabilities"]] == [
        ("cap", 9, None),
        ("msix", 0x11, 3),
        ("msi", 5, 1),
    ]
    (version, quota) = found["capabilities"][0]["registers"]
    assert version["reset"] == 1 and quota["hooks"] == ["write"]
    assert quota["fields"][0]["values"][1] == {"name": "FAST", "value": 1, "doc": "with [red]care[/red]"}
    assert found["params"]["ram"]["default"] == 4096 and found["interrupt_pin"] == 2 and found["rom"] == 2048


def test_regs_of_a_file_here(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from vmodel.device import MmioBar, PciDevice\nfrom vmodel.regs import Reg8, RegisterBank\n"
        "class B(RegisterBank, size=4):\n    R = Reg8(0, doc='bits [7:0] of [red]it[/red]')\n"
        "class D(PciDevice):\n    vendor_id, device_id, class_code = 1, 2, 3\n"
        "    bar0 = MmioBar(0, size=4096)\n    regs = bar0.bank(B)\n"
    )
    assert "bits [7:0] of [red]it[/red]\n" in vmodel("regs", "mine.py:D", cwd=tmp_path).stdout


@pytest.mark.slow
def test_doctor(qemu: Path, tmp_path: Path) -> None:
    done = vmodel("doctor", "--json", HOME=str(tmp_path), VMODEL_QEMU=str(qemu))
    found = json.loads(done.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert (done.returncode, found["ok"]) == (1, False)
    assert checks["C shim"]["ok"] and checks["shared memory"]["ok"]
    assert checks["QEMU with vfio-user-pci"]["detail"] == f"11.0.0, {qemu}"
    kernel = checks["guest kernel stable"]
    assert (kernel["ok"], kernel["fix"]) == (False, "scripts/get-qemu --kernel stable")
    text = vmodel("doctor", HOME=str(tmp_path), VMODEL_QEMU=str(qemu)).stdout
    assert "ok       QEMU with vfio-user-pci  11.0.0" in text
    assert re.search(r"^MISSING  static busybox .*\n +to fix it: scripts/get-qemu --kernel stable$", text, re.MULTILINE)


@pytest.mark.slow
def test_doctor_finds_an_old_qemu(qemu: Path, tmp_path: Path) -> None:
    for old, new, said in (
        ("version 11.0.0", "version 9.2.1", "is QEMU 9.2.1, older than 10.1"),
        ("vfio-user-pci", "vfio-pci", "was built without vfio-user-pci"),
    ):
        qemu.write_text(FAKE_QEMU.replace(old, new))
        found = json.loads(vmodel("doctor", "--json", HOME=str(tmp_path), VMODEL_QEMU=str(qemu)).stdout)
        check = next(c for c in found["checks"] if c["name"].startswith("QEMU"))
        assert (check["ok"], check["detail"], check["fix"]) == (
            False,
            f"{qemu} {said}",
            "scripts/get-qemu --kernel stable",
        )


# ---- in a terminal --------------------------------------------------------------------------------


def test_ctrl_c(tmp_path: Path) -> None:
    shown = in_terminal("serve", EXAMPLE, "--run-dir", tmp_path, keys=b"\x03", until=b"ready\r\n")
    assert shown.replace(b"\r\n", b"\n") == b"edu0 %s/edu0.sock\nready\n^Cstatus 0" % os.fsencode(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_colours_are_for_terminals(tmp_path: Path, qemu: Path) -> None:
    assert b"\x1b[32mok" in in_terminal("doctor", env={"HOME": str(tmp_path)})
    assert "\x1b" not in vmodel("doctor").stdout + vmodel("regs", "edu").stdout


def test_ctrl_c_while_a_model_loads(tmp_path: Path) -> None:
    # Short sleeps: Python handles a signal that comes just before a sleep only when that sleep is over.
    (tmp_path / "slow.py").write_text("import time\nprint('loading', flush=True)\nwhile True:\n    time.sleep(0.01)\n")
    shown = in_terminal("regs", f"{tmp_path}/slow.py:X", keys=b"\x03", until=b"loading\r\n")
    assert shown == b"loading\r\n^Cstatus 130"


def test_main_in_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["devices"]) == 0
    assert "idio16" in capsys.readouterr().out
    assert main(["nonsense"]) == 2


def test_the_probe_of_a_live_socket_is_no_client(tmp_path: Path) -> None:
    """A socket of another program that listens on it is not replaced either."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "edu0.sock"))
        other.listen(1)
        assert "is being served already" in refused(vmodel("serve", EXAMPLE, "--run-dir", tmp_path))
    assert (tmp_path / "edu0.sock").exists()


# ---- groups ---------------------------------------------------------------------------------------

GROUPS = ROOT / "examples" / "iommu-groups.toml"


def test_groups() -> None:
    shown = vmodel("groups", GROUPS)
    assert (shown.returncode, shown.stderr) == (0, "")
    tree = shown.stdout.splitlines()
    assert tree[0] == "segment 0000, bus 00"
    assert tree[1].startswith("├── 0000:00:04.0 rp0, root port  group 0 (identity) ")
    assert any(line.endswith("0000:00:08.0 outside  no group: it bypasses the IOMMUs") for line in tree)
    assert any("right  group 3 (identity) its DMA carries the id of PCIe-to-PCI bridge to-pci" in line for line in tree)
    assert tree[-1] == "8 groups; IOMMUs: vtd0 (Intel VT-d)"
    assert not any(line != line.rstrip() for line in tree)


def test_groups_with_another_default(tmp_path: Path) -> None:
    """As by iommu.strict on Linux's command line; a key of the file and untrusted devices have priority."""
    file = tmp_path / "m.toml"
    head = '[machine]\nname = "m"\n[[iommu]]\nname = "a"\nkind = "vt-d"\ncovers = ["0000:00:03.0"]\n'
    other = '[[iommu]]\nname = "b"\nkind = "vt-d"\ncovers = ["0000:00:04.0-0000:00:05.0"]\ndefault_domain = "dma"\n'
    more = ("", "", "untrusted = true\n")
    devices = [
        f'[[device]]\nname = "edu{n}"\nmodel = "edu"\naddress = "0000:00:0{n}.0"\n{text}'
        for n, text in zip((3, 4, 5), more, strict=True)
    ]
    file.write_text(head + other + "".join(devices))
    shown = vmodel("groups", file, "--default-domain", "dma-fq").stdout
    assert [re.search(r"\((.*?)\)", line)[1] for line in shown.splitlines()[1:4]] == [  # type: ignore[index]
        "DMA-FQ",
        "DMA",
        "DMA, untrusted",
    ]
    found = json.loads(vmodel("groups", file, "--json").stdout)
    assert [group["type"] for group in found["groups"]] == ["identity", "DMA", "DMA"]
    assert [device["untrusted"] for device in found["devices"]] == [False, False, True]
    said = refused(vmodel("groups", file, "--default-domain", "DMA"))
    assert said == "--default-domain 'DMA': must be identity, dma, dma-fq"


@pytest.mark.slow
def test_groups_for_tools(tmp_path: Path) -> None:
    found = json.loads(vmodel("groups", GROUPS, "--json").stdout)
    members = {tuple(group["devices"]) for group in found["groups"]}
    assert ("function0", "function1") in members and ("to-pci", "left", "right") in members
    assert {device["name"]: device["group"] for device in found["devices"]}["outside"] is None
    done = vmodel("groups", GROUPS, "--svg", tmp_path / "g.svg", "--sysfs", tmp_path / "sys")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    drawn = (tmp_path / "g.svg").read_text()
    assert drawn == (ROOT / "docs" / "iommu-groups.svg").read_text()  # vmodel groups ... --svg docs/iommu-groups.svg
    device = tmp_path / "sys" / "iommu_groups" / "1" / "devices" / "0000:01:00.0"
    assert (device / "iommu_group").resolve() == tmp_path / "sys" / "iommu_groups" / "1"


@pytest.mark.slow
def test_groups_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("")
    said = refused(vmodel("groups", GROUPS, "--sysfs", tmp_path / "there"))
    assert said == f"--sysfs {tmp_path}/there: is not empty: choose another folder"
    (tmp_path / "file").touch()
    assert (
        refused(vmodel("groups", GROUPS, "--sysfs", tmp_path / "file"))
        == f"--sysfs {tmp_path}/file: it is not a folder"
    )
    said = refused(vmodel("groups", GROUPS, "--svg", tmp_path / "no" / "g.svg"))
    assert said == f"--svg {tmp_path}/no/g.svg: No such file or directory"
