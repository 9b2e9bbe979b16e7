"""A guest that takes scripts: what the plugin's `vm_booted` and experiments stand on."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from vmodel.errors import ConfigError
from vmodel.guest.booted import BootedGuest
from vmodel.guest.monitor import MonitorError
from vmodel.guest.running import GuestRunError
from vmodel.guest.served import Served
from vmodel.testing.vm import Vm

pytestmark = [pytest.mark.guest, pytest.mark.machine("plugged.toml")]


@pytest.mark.guest(tools=["pciutils:lspci"])
def test_scripts_one_after_the_other(vm_booted: BootedGuest, caplog: pytest.LogCaptureFixture) -> None:
    """Output, status, time, the kernel's log, a tool, a long script, and one that does not end: in one guest."""
    # A name from pci.ids, and the capabilities, which busybox's lspci does not print.
    done = vm_booted.run("lspci -vv -s 00:04.0")
    assert done.status == 0 and b"PCI bridge: Red Hat, Inc. QEMU PCIe Root port" in done.output
    assert b"Express (v2) Root Port (Slot+)" in done.output
    for n in range(30):
        done = vm_booted.run(f"echo {n}; echo error >&2; exit {n}", 20)
        assert (done.status, done.output) == (n, b"%d\nerror\n" % n)
        assert done.started < done.came[0] <= done.ended
    vm_booted.clear()
    done = vm_booted.run("printf '\\036 control'; echo '<3>a line' > /dev/kmsg; cat; " + "# 123456789\n" * 1500)
    assert (done.status, done.output) == (0, b"\x1e control")
    log = vm_booted.dmesg()
    assert "a line" in log and vm_booted.dmesg() == ""
    lines = [line for line in vm_booted.lines() if line.text == "a line"]
    assert len(lines) == 1 and lines[0].at is not None and done.started < lines[0].at < done.ended + 1
    with pytest.raises(ConfigError, match="more than 24576"):
        vm_booted.run("#" * 30_000)
    mark = vm_booted.mark()
    with caplog.at_level(logging.WARNING):
        done = vm_booted.run("echo so far; sleep 100", 0.5)
    assert (done.status, done.output) == (None, b"so far\n") and done.ended - done.started < 60
    assert "the console's end:\n" in done.hang and "\n  CPU 0: " in done.hang
    (said,) = caplog.messages
    assert said.startswith("the script: did not end in 0.5 s") and said.endswith(done.hang)
    assert vm_booted.alive()
    assert "Show Blocked State" in vm_booted.console(mark)
    assert vm_booted.run("sleep 100", 0.5, examine=False).hang == ""
    assert vm_booted.run("exit 5").status == 5
    result = vm_booted.power_off()
    assert result.powered_off and not vm_booted.alive(1)
    with pytest.raises(GuestRunError):
        vm_booted.dmesg()


def test_from_boot_to_power_off(vm: Vm, artifacts: Path) -> None:
    result = vm.run("cat /sys/bus/pci/devices/0000:00:03.0/device; cat /proc/cmdline; nproc; exit 3", append="one=more")
    assert (result.status, result.powered_off) == (3, True)
    assert result.output.startswith(b"0x11e8\n") and b" one=more\n1\n" in result.output
    assert (artifacts / "guest-1" / "output.log").read_bytes() == result.output


@pytest.mark.guest(without=["edu1"], allow_reboot=True)
def test_plug_unplug_and_reset(vm_booted: BootedGuest, vmodel_served: Served) -> None:
    """A script asks the host for a device and gets it; the machine is reset, and boots again."""
    wait = "for i in $(seq 100); do [ {} -e $card ] && break; sleep 0.1; done; [ {} -e $card ]"
    script = "card=/sys/bus/pci/devices/0000:01:00.0; [ ! -e $card ] || exit 9; vmodel-host plug edu1; echo $?;"
    done = vm_booted.run(script + wait.format("", ""), 40)
    assert (done.status, done.output) == (0, b"0\n")
    assert vm_booted.monitor.execute("query-status")["running"] is True
    done = vm_booted.run("card=/sys/bus/pci/devices/0000:01:00.0; vmodel-host unplug edu1;" + wait.format("!", "!"), 40)
    assert done.status == 0, vm_booted.console()
    vm_booted.monitor.wait("DEVICE_DELETED", 0, device="edu1")
    with pytest.raises(MonitorError, match="did not report"):
        vm_booted.monitor.wait("DEVICE_DELETED", 0, device="edu0")
    with pytest.raises(MonitorError, match="edu7"):
        vm_booted.monitor.execute("device_del", {"id": "edu7"})
    with pytest.raises(ConfigError, match="no device is called 'edu7'"):
        vmodel_served.plug(vm_booted.monitor, "edu7")
    assert vm_booted.run("vmodel-host dance", 10).status == 127
    assert vm_booted.run("vmodel-host plug edu7", 10).status == 1
    points = vmodel_served.machine.devices["edu0"].points
    assert vm_booted.run("vmodel-host suspend begin", 10).status == 0 and points.suspended
    for wrong in ("now", "", "begin end"):
        assert vm_booted.run(f"vmodel-host suspend {wrong}", 10).status == 1 and points.suspended
    assert vm_booted.run("vmodel-host suspend end", 10).status == 0 and not points.suspended
    vm_booted.reset()
    assert vm_booted.guest.boots == 2 and vm_booted.run("exit 4").status == 4
