"""A served machine file, with its sockets in a temporary folder: for guests of tests and experiments."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from vmodel import machine as machines
from vmodel.closing import Closing
from vmodel.errors import ConfigError
from vmodel.guest.booted import HostCommand
from vmodel.guest.monitor import Monitor, MonitorError
from vmodel.qemu import device_args

log = logging.getLogger(__name__)


class Served(Closing):
    """A machine and its server; a context manager.  Sockets are in a temporary folder, as their paths must be short."""

    def __init__(self, file: Path) -> None:
        """Loads and serves a machine file.  ConfigError: one line for each mistake in it."""
        self.machine = machines.load(file)
        self._folder = tempfile.TemporaryDirectory(prefix="vmodel-")
        self.folder = Path(self._folder.name)
        try:
            self.server = self.machine.serve(self.folder)
        except BaseException:
            self.machine.close()
            self._folder.cleanup()
            raise
        self.server.start()

    def qemu_args(self, without: Collection[str] = ()) -> list[str]:
        """QEMU's arguments for the machine, except the devices `without`, which `plug` adds later.  ConfigError."""
        args = self.machine.qemu_args(self.folder)
        for name in without:
            self._known(name)
            at = next(n for n, arg in enumerate(args) if f'"id": "{name}"' in arg)
            del args[at - 1 : at + 1]
        return args

    def _known(self, name: str) -> None:
        if name not in self.machine.devices:
            raise ConfigError(f"no device is called {name!r}: devices are {', '.join(self.machine.devices)}")

    def plug(self, monitor: Monitor, name: str) -> None:
        """Hot-plugs a device, which must be behind a root port.  MonitorError: QEMU refuses it."""
        self._known(name)
        function = next(f for f in self.machine.topology.functions() if f.name == name)
        made = device_args(name, self.machine.socket(name, self.folder), function)
        monitor.execute("device_add", json.loads(made[1]))

    def unplug(self, monitor: Monitor, name: str, timeout: float = 20.0) -> None:
        """Hot-unplugs a device, and waits until the guest has released it.  MonitorError: it has not in `timeout` s.

        QEMU 11.1 aborts when a device with MSI-X is unplugged: such a device needs MSI instead.
        """
        self._known(name)
        monitor.clear("DEVICE_DELETED")
        monitor.execute("device_del", {"id": name})
        monitor.wait("DEVICE_DELETED", timeout, device=name)

    def host_commands(self, monitor: Callable[[], Monitor]) -> dict[str, HostCommand]:
        """The requests that scripts in a guest make: `vmodel-host plug NAME`, `unplug NAME`, `suspend begin`, `end`."""

        def command(work: Callable[[Monitor, str], None]) -> HostCommand:
            def run(words: list[str]) -> int:
                try:
                    work(monitor(), " ".join(words))
                except (ConfigError, MonitorError) as error:
                    log.warning("vmodel-host: %s", error)
                    return 1
                return 0

            return run

        return {
            "plug": command(self.plug),
            "unplug": command(self.unplug),
            "suspend": command(lambda _, what: self.suspend(what)),
        }

    def suspend(self, what: str) -> None:
        """At "begin" the guest suspends its devices, for rules with `phase = "suspend"`; at "end" it has resumed them.

        ConfigError: it is another word.
        """
        if what not in ("begin", "end"):
            raise ConfigError(f"suspend {what}: must be suspend begin, or suspend end")
        for device in self.machine.devices.values():
            device.points.suspended = what == "begin"

    def close(self) -> None:
        """Stops the server, and releases the devices' resources."""
        self.server.stop()
        self.machine.close()
        self._folder.cleanup()
