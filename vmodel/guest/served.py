"""A machine file that is served, in a folder of its own: for guests of tests and experiments."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Self

from vmodel import machine as machines
from vmodel.errors import ConfigError
from vmodel.guest.booted import HostCommand
from vmodel.guest.monitor import Monitor, MonitorError
from vmodel.qemu import device_args

log = logging.getLogger(__name__)


class Served:
    """A machine and its server; a context manager.  Sockets are in a short temporary folder, as their paths must be."""

    def __init__(self, file: Path) -> None:
        """Loads and serves it.  ConfigError, one line for each mistake in the file."""
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
        """What makes QEMU this machine; devices `without` can be plugged in later."""
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
        """Hot-plugs a device; it must be behind a root port.  MonitorError: QEMU refuses."""
        self._known(name)
        function = next(f for f in self.machine.topology.functions() if f.name == name)
        made = device_args(name, self.machine.socket(name, self.folder), function)
        monitor.execute("device_add", json.loads(made[1]))

    def unplug(self, monitor: Monitor, name: str, timeout: float = 20.0) -> None:
        """Hot-unplugs a device, and waits until the guest has let it go.  MonitorError: it does not in `timeout` s.

        QEMU 11.1 aborts when a device with MSI-X goes: give those that are to be unplugged MSI.
        """
        self._known(name)
        monitor.forget("DEVICE_DELETED")
        monitor.execute("device_del", {"id": name})
        monitor.wait("DEVICE_DELETED", timeout, device=name)

    def host_commands(self, monitor: Callable[[], Monitor]) -> dict[str, HostCommand]:
        """What scripts in a guest may ask for by `vmodel-host plug NAME` and `unplug NAME`."""

        def command(work: Callable[[Monitor, str], None]) -> HostCommand:
            def run(words: list[str]) -> int:
                try:
                    work(monitor(), " ".join(words))
                except (ConfigError, MonitorError) as error:
                    log.warning("vmodel-host: %s", error)
                    return 1
                return 0

            return run

        return {"plug": command(self.plug), "unplug": command(self.unplug)}

    def close(self) -> None:
        """Ends the server, gives back what the devices hold."""
        self.server.stop()
        self.machine.close()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
