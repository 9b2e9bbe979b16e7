"""Runs a command in a real guest: stock QEMU (TCG), a stock Debian kernel, an initramfs made on the spot.

The guest has three serial ports: the console, what the command prints (8-bit clean, both ways), and its exit
status.  Everything is bounded in time, and the artefacts (console, output, QEMU's own words, its command line) are
kept in a folder if one is given.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import shlex
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from vmodel.testing import initramfs
from vmodel.testing.artifacts import Kernel, Qemu, find_busybox, find_kernel, find_qemu

#: Kernel arguments: quick to boot under TCG, and a panic ends the run.
_APPEND = "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off random.trust_cpu=on no_timer_check tsc=reliable"


class GuestError(Exception):
    """The guest did not run the command to its end: panic, timeout, or QEMU died."""


@dataclass
class GuestSpec:
    """What to run.  `qemu_args` attaches devices and may replace the memory."""

    #: Words, or a shell script.
    command: Sequence[str] | str
    kernel: Kernel | None = None
    modules: Sequence[str] = ()
    #: (path here, path in the guest).
    files: Sequence[tuple[Path, str]] = ()
    #: More kernel arguments.
    append: str = ""
    qemu_args: Sequence[str] = ("-m", "512M")
    #: Seconds for the whole run.
    timeout: float = 120.0
    #: Whether a reboot of the guest is one, or its end.
    allow_reboot: bool = False
    qemu: Qemu | None = None


@dataclass
class GuestResult:
    """How it went: the command's exit status, what it printed, the console, seconds."""

    status: int
    output: bytes
    console: str
    wall: float


@dataclass
class _Port:
    """One serial port: our end of it, and what has come."""

    ours: socket.socket
    theirs: socket.socket
    received: bytearray = field(default_factory=bytearray)

    @classmethod
    def make(cls) -> _Port:
        return cls(*socket.socketpair())


class Guest:
    """A guest while it runs; a context manager that ends it in any case."""

    def __init__(
        self,
        spec: GuestSpec,
        *,
        artifacts: Path | None = None,
        on_output: Callable[[bytes], None] | None = None,
        on_console: Callable[[bytes], None] | None = None,
    ) -> None:
        """`artifacts`: a folder for logs.  The callbacks get what comes, on a thread of the guest's."""
        self.spec = spec
        self.artifacts = artifacts
        self._callbacks = {"output": on_output, "console": on_console}
        self._scratch = tempfile.TemporaryDirectory(prefix="vmodel-guest-")
        folder = Path(self._scratch.name)
        #: QMP's unix socket.
        self.qmp = folder / "qmp.sock"
        self._ports = {name: _Port.make() for name in ("console", "output", "status")}
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="vmodel-guest", daemon=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._qemu_log = folder / "qemu.log"
        self._started = 0.0
        self.line: list[str] = []

    # ---- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Boots it.  ArtifactError: QEMU, a kernel, busybox or a module is missing."""
        spec, folder = self.spec, Path(self._scratch.name)
        qemu, kernel = spec.qemu or find_qemu(), spec.kernel or find_kernel()
        image = folder / "initramfs"
        image.write_bytes(initramfs.build(kernel, find_busybox(), spec.command, spec.modules, spec.files))
        self.line = [str(qemu.path), "-accel", "tcg", "-cpu", "max", "-nodefaults", "-no-user-config"]
        self.line += ["-display", "none", "-kernel", str(kernel.image), "-initrd", str(image)]
        self.line += ["-append", f"{_APPEND} {spec.append}".strip()]
        if not any("memory-backend=" in arg for arg in spec.qemu_args):
            self.line += ["-machine", "q35"]
        if not spec.allow_reboot:
            self.line += ["-no-reboot"]
        for name, port in self._ports.items():
            self.line += ["-chardev", f"socket,id={name},fd={port.theirs.fileno()}", "-serial", f"chardev:{name}"]
        self.line += ["-qmp", f"unix:{self.qmp},server=on,wait=off", *spec.qemu_args]
        self._keep("qemu.line", shlex.join(self.line) + "\n")
        with self._qemu_log.open("wb") as log:
            self._started = time.monotonic()
            self._process = subprocess.Popen(
                self.line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[port.theirs.fileno() for port in self._ports.values()],
            )
        for port in self._ports.values():
            port.theirs.close()
        self._reader.start()

    def _read(self) -> None:
        with selectors.DefaultSelector() as selector:
            for name, port in self._ports.items():
                selector.register(port.ours, selectors.EVENT_READ, name)
            while selector.get_map():
                for key, _ in selector.select():
                    name = key.data
                    port = self._ports[name]
                    try:
                        data = port.ours.recv(65536)
                    except OSError:
                        data = b""
                    if not data:
                        selector.unregister(port.ours)
                    with self._changed:
                        port.received += data
                        self._changed.notify_all()
                    callback = self._callbacks.get(name)
                    if callback and data:
                        callback(data)

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        if self._process is None:
            raise RuntimeError("the guest has not been started")
        return self._process.pid

    def running(self) -> bool:
        """Whether QEMU is alive."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Ends QEMU at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Ends QEMU if it runs, keeps the artefacts, removes scratch files."""
        self.kill()
        if self._reader.ident is not None:
            self._reader.join(10)
        for port in self._ports.values():
            port.ours.close()
            port.theirs.close()
        for name, port in self._ports.items():
            self._keep(f"{name}.log", bytes(port.received))
        if self._qemu_log.exists():
            self._keep("qemu.log", self._qemu_log.read_bytes())
        self._scratch.cleanup()

    def _keep(self, name: str, data: bytes | str) -> None:
        if self.artifacts is not None:
            self.artifacts.mkdir(parents=True, exist_ok=True)
            (self.artifacts / name).write_bytes(data.encode() if isinstance(data, str) else data)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- talking to it ----------------------------------------------------------------------

    @property
    def console(self) -> str:
        """What the kernel has said so far."""
        with self._changed:
            return self._ports["console"].received.decode(errors="replace").replace("\r\n", "\n")

    @property
    def output(self) -> bytes:
        """What the command has printed so far."""
        with self._changed:
            return bytes(self._ports["output"].received)

    def send(self, data: bytes) -> None:
        """To the command's standard input."""
        self._ports["output"].ours.sendall(data)

    def expect(self, pattern: bytes, timeout: float = 60.0, *, port: str = "output") -> re.Match[bytes]:
        """Waits until what the command (or the "console") has printed matches; GuestError when it never does."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                match = re.search(pattern, bytes(self._ports[port].received))
                if match:
                    return match
                left = deadline - time.monotonic()
                if left <= 0 or not self.running():
                    raise GuestError(f"{pattern!r} did not come on {port} in {timeout} s{self._tail()}")
                self._changed.wait(min(left, 0.5))

    def wait(self) -> GuestResult:
        """Waits for the guest's end.  GuestError: panic, timeout, or no exit status."""
        assert self._process is not None
        left = self.spec.timeout - (time.monotonic() - self._started)
        try:
            code = self._process.wait(max(left, 0))
        except subprocess.TimeoutExpired:
            self.kill()
            raise GuestError(f"the guest did not end in {self.spec.timeout} s{self._tail()}") from None
        self._reader.join(10)
        wall = time.monotonic() - self._started
        match = re.search(rb"status (\d+)", bytes(self._ports["status"].received))
        if match:
            return GuestResult(int(match[1]), self.output, self.console, wall)
        if panic := re.search(r"Kernel panic[^\n]*", self.console):
            raise GuestError(f"{panic[0].strip()}{self._tail()}")
        said = self._qemu_log.read_text(errors="replace").strip()
        raise GuestError(f"QEMU ended with status {code} before the command did: {said or 'it said nothing'}")

    def _tail(self) -> str:
        lines = [line for line in self.console.splitlines() if line.strip()][-5:]
        kept = f"; logs are in {self.artifacts}" if self.artifacts else ""
        return f"{kept}; the console's end:\n  " + "\n  ".join(lines) if lines else kept


def run_guest(spec: GuestSpec, *, artifacts: Path | None = None) -> GuestResult:
    """Boots, runs the command, returns when the guest is off.  GuestError as in `Guest.wait`."""
    with Guest(spec, artifacts=artifacts) as guest:
        return guest.wait()


def writer(fd: int) -> Callable[[bytes], None]:
    """A callback that passes what comes on to a file descriptor."""

    def write(data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            while data:
                data = data[os.write(fd, data) :]

    return write
