"""Runs a command in a real guest: stock QEMU, a stock Debian kernel, and an initramfs built for the run.

The guest has three serial ports: the console; the command's stdin, stdout and stderr (8-bit clean); and the harness's
own, for the exit status.  So kernel messages do not mix with the other two.  Every wait has a time limit.  Artefacts
(console, output, QEMU's messages and command line) are written to a folder while the guest runs, if one is given.
"""

from __future__ import annotations

import contextlib
import itertools
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
from typing import BinaryIO

from vmodel.closing import Starting
from vmodel.errors import ConfigError
from vmodel.files import naming
from vmodel.guest import hang, initramfs
from vmodel.guest import shares as folders
from vmodel.guest.artifacts import Kernel, Qemu, find_busybox, find_kernel, find_qemu
from vmodel.guest.coverage import GuestCoverage
from vmodel.guest.gdb import READY, Gdb
from vmodel.guest.headers import debug_modules
from vmodel.guest.keeper import Keeper
from vmodel.guest.modules import built
from vmodel.guest.monitor import Monitor, MonitorError
from vmodel.guest.places import Places, finder
from vmodel.guest.shares import Share
from vmodel.patience import patience, spoken
from vmodel.printable import printable
from vmodel.span import number

#: Kernel arguments: a quick boot under TCG (the crypto self-tests alone take 0.7 s), and a panic ends the run.
_APPEND = (
    "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off random.trust_cpu=on no_timer_check tsc=reliable"
    f" cryptomgr.notests printk.time=1 {hang.APPEND}"
)
#: Seconds that a guest gets to power off after its command has ended, and to print the rest of a panic.
_GRACE_OFF = 20.0
_GRACE_PANIC = 1.0
#: The same if there was no command, as a module did not load: after an oops in it no guest powers off.
_GRACE_FAILED = 3.0


# A terminal is hung up when its session's first process ends, which loses output that has not been sent: so this is a
# shell that survives Ctrl-C, and stty waits for the output.  The loop takes sizes from the harness's own port, until
# the command has ended.
_ON_TERMINAL = r"""
(while read -r rows columns; do stty rows $rows cols $columns <&4; done) 4</dev/ttyS1 </dev/ttyS2 >/dev/null 2>&1 &
echo $! > /vmodel-sizes
stty sane rows {rows} cols {columns}
export TERM={term}
exec setsid -c sh -c 'trap : INT QUIT TSTP; "$@"; status=$?; stty raw -echo; exit $status' sh {command}
"""


def _memory(qemu_args: Sequence[str]) -> int:
    """The guest's memory in bytes; 0: it is not said in a simple form."""
    found = 0
    for option, value in itertools.pairwise(qemu_args):
        if option == "-m":
            with contextlib.suppress(ValueError):
                found = number(value)
    return found


class GuestRunError(Exception):
    """The guest did not run the command to its end, for the reason of a subclass.  The text has the console's end."""


class GuestPanic(GuestRunError):
    """The guest's kernel panicked."""


class GuestTimeout(GuestRunError):
    """The time limit was reached before the command ended."""


class QemuDied(GuestRunError):
    """QEMU ended with an error, or by a signal."""


class GuestOff(GuestRunError):
    """The guest powered off before its command ended, or rebooted without `allow_reboot`."""


class ModuleError(GuestRunError):
    """A kernel module did not load."""


class ShareError(GuestRunError):
    """A shared folder was not mounted."""


class LogError(GuestRunError):
    """The command ran to its end, but not all of its artefacts could be written."""


def accelerator() -> str:
    """QEMU's accelerator, $VMODEL_ACCEL: "kvm", or "tcg", which is the default and works everywhere.  ConfigError."""
    value = os.environ.get("VMODEL_ACCEL") or "tcg"
    if value not in ("tcg", "kvm"):
        raise ConfigError(f"VMODEL_ACCEL={value!r}: must be tcg or kvm")
    return value


@dataclass
class GuestSpec:
    """A guest to boot, and its command."""

    #: Words, or a shell script.  It runs again after each reboot of the guest; $VMODEL_BOOT is 1 in the first boot.
    command: Sequence[str] | str
    #: None: as of `find_kernel`.
    kernel: Kernel | None = None
    #: Loaded before the command, with their dependencies.  A module that does not load ends the run (ModuleError).
    modules: Sequence[str] = ()
    #: A path on the host, which becomes /root/NAME, or (path on the host, path in the guest).  Folders are copied.
    files: Sequence[Path | tuple[Path, str]] = ()
    #: More kernel arguments, and parameters of modules (MODULE.NAME=VALUE).  They are last, so they take precedence.
    append: str = ""
    #: These attach devices, and may replace memory and machine type.
    qemu_args: Sequence[str] = ("-m", "512M")
    #: Seconds for the whole run; multiplied by $VMODEL_SLOW, as all time-outs of guests are.
    timeout: float = 120.0
    #: Whether the guest may reboot; otherwise a reboot ends it.
    allow_reboot: bool = False
    #: None: as of `find_qemu`.
    qemu: Qemu | None = None
    #: Kernel modules that `modprobe` can load in the guest.
    extra_modules: Sequence[str] = ()
    #: Debian's programs that the command uses, as "pciutils:lspci": see tools.py.
    tools: Sequence[str] = ()
    #: Folders of the host that the guest sees as they are, without a copy.
    shares: Sequence[Share] = ()
    #: Whether it waits for gdb before PCI devices are bound, see gdb.py and `Guest.wait_for_gdb`.
    gdb: bool = False
    #: The kernel code whose execution is recorded, as "nvme" or "vmlinux:pci", see `Guest.coverage`.
    coverage: Sequence[str] = ()
    #: Called on the guest's thread when the command has ended, before the guest powers off; it waits for that.
    on_end: Callable[[], None] | None = None


@dataclass
class GuestResult:
    """The result of a guest's run."""

    #: The command's exit status, 0 to 255; 128 + N for signal N, as in a shell.
    status: int
    #: The command's stdout and stderr.
    output: bytes
    #: The text of the console.
    console: str
    #: Seconds from QEMU's start to its end.
    wall: float
    #: Whether the guest powered off; if not, a driver's shutdown hung, and QEMU was killed.
    powered_off: bool = True
    #: How often the guest booted: 1 if it never rebooted.
    boots: int = 1
    #: Finds the source of places in modules, which the console names.
    places: Places = field(default_factory=lambda: Places(lambda name: None))


@dataclass
class _SerialPort:
    """A serial port: both ends of its socket, the bytes received, how many `expect` has consumed, and a log file."""

    ours: socket.socket
    theirs: socket.socket
    received: bytearray = field(default_factory=bytearray)
    consumed: int = 0
    log: BinaryIO | None = None

    @classmethod
    def make(cls) -> _SerialPort:
        return cls(*socket.socketpair())


class Guest(Starting):
    """A running guest; a context manager that always ends it."""

    def __init__(
        self,
        spec: GuestSpec,
        *,
        artifacts: Path | None = None,
        on_output: Callable[[bytes], None] | None = None,
        on_console: Callable[[bytes], None] | None = None,
    ) -> None:
        """`artifacts`: a folder for logs.  The callbacks receive output and console, on the guest's own thread.

        An exception in a callback ends QEMU, and `wait` raises it again.
        """
        self.spec = spec
        self.artifacts = artifacts
        #: QEMU's command line, after `start`.
        self.line: list[str] = []
        #: How often the guest has booted so far.
        self.boots = 0
        self._callbacks = {"output": on_output, "console": on_console}
        self._callback_error: BaseException | None = None
        self._ended = False
        #: Finds the source of places in modules, after `start`.
        self.places = Places(lambda name: None)
        self._scratch = tempfile.TemporaryDirectory(prefix="vmodel-guest-")
        folder = Path(self._scratch.name)
        #: QMP's unix socket.
        self.qmp = folder / "qmp.sock"
        self._ports = {name: _SerialPort.make() for name in ("console", "output", "status")}
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="vmodel-guest", daemon=True)
        self._process: subprocess.Popen[bytes] | None = None
        self._qemu_log = folder / "qemu.log"
        self._log_error = ""
        self._started = 0.0
        self._monitor: Monitor | None = None
        self._keeper: Keeper | None = None
        self._connecting = threading.Lock()
        self._gdb: Gdb | None = None
        #: Which of the code of `GuestSpec.coverage` has run, after `start`; also when the guest has ended.
        self.coverage: GuestCoverage | None = None

    # ---- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts QEMU.  ArtifactError: QEMU, kernel, busybox or a module is missing; ConfigError: a file is missing.

        OSError: a temporary file or an artefact cannot be written.
        """
        spec, folder = self.spec, Path(self._scratch.name)
        qemu, kernel = spec.qemu or find_qemu(), spec.kernel or find_kernel()
        image = folder / "initramfs"
        (loaded, own), (extra, more) = built(spec.modules, kernel), built(spec.extra_modules, kernel)
        self._gdb = Gdb(folder, kernel, own) if spec.gdb else None
        if spec.coverage:
            self.coverage = GuestCoverage(spec.coverage, qemu, kernel, more | own, accelerator())
        searched = [*(share.source for share in spec.shares), *debug_modules(kernel)]
        self.places = Places(finder(more | own, searched, kernel.release))
        made = initramfs.build(
            kernel,
            find_busybox(),
            spec.command,
            loaded,
            spec.files,
            extra,
            spec.tools,
            spec.shares,
            spec.gdb,
        )
        # Linux unpacks it into a file system of at most half of the memory that is left.
        if 3 * len(made) > (memory := _memory(spec.qemu_args)) > 0:
            raise ConfigError(
                f"the guest's files have {len(made) >> 20} MiB, more than a third of its memory, {memory >> 20} MiB:"
                " give it more, or share a folder instead"
            )
        with naming(image):
            image.write_bytes(made)
        self.line = [str(qemu.path), "-accel", accelerator(), "-cpu", "max", "-nodefaults", "-no-user-config"]
        self.line += ["-display", "none", "-kernel", str(kernel.image), "-initrd", str(image)]
        self.line += ["-append", f"{_APPEND}{' nokaslr' if spec.gdb or spec.coverage else ''} {spec.append}".strip()]
        if not any("memory-backend=" in arg for arg in spec.qemu_args):
            self.line += ["-machine", "q35"]
        if not spec.allow_reboot:
            self.line += ["-no-reboot"]
        for name, port in self._ports.items():
            self.line += ["-chardev", f"socket,id={name},fd={port.theirs.fileno()}", "-serial", f"chardev:{name}"]
        self.line += ["-qmp", f"unix:{self.qmp},server=on,wait=off", *spec.qemu_args]
        self.line += folders.qemu_args(spec.shares)
        if self._gdb is not None:
            self.line += self._gdb.qemu_args()
        passed = [port.theirs.fileno() for port in self._ports.values()]
        if self.coverage is not None:
            self.line += self.coverage.recorder.qemu_args()
            passed.append(self.coverage.recorder.fd)
        if self.artifacts is not None:
            self.artifacts.mkdir(parents=True, exist_ok=True)
            with naming(written := self.artifacts / "qemu.line"):
                written.write_text(shlex.join(self.line) + "\n", errors="surrogateescape")
            self._qemu_log = self.artifacts / "qemu.log"
            for name, port in self._ports.items():
                port.log = (self.artifacts / f"{name}.log").open("wb", buffering=0)
        with self._qemu_log.open("wb") as log:
            self._started = time.monotonic()
            self._process = subprocess.Popen(
                self.line,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=passed,
            )
        self._keeper = Keeper(self._process, folder)
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
                    self._keep(name, port, data)
                    with self._changed:
                        port.received += data
                        self._changed.notify_all()
                    if name == "status":
                        self._answer(port)
                    self._call_back(name, data)

    def _keep(self, name: str, port: _SerialPort, data: bytes) -> None:
        if port.log is None or self._log_error:
            return
        try:
            while data:
                data = data[port.log.write(data) :]
        except OSError as error:  # the ports are read on, else the guest would wait; wait() raises it
            self._log_error = f"{self.artifacts}/{name}.log cannot be written: {error.strerror}"

    def _answer(self, port: _SerialPort) -> None:
        # How often has it booted? It cannot know, its memory is new each time.
        boots = bytes(port.received).count(b"boot\n")
        while self.boots < boots:
            self.boots += 1
            with contextlib.suppress(OSError):
                port.ours.sendall(b"%d\n" % self.boots)
        # The command has ended: may the guest power off?
        if not self._ended and self._verdict():
            self._ended = True
            self._call_end()
            with contextlib.suppress(OSError):
                port.ours.sendall(b"off\n")

    def _call_end(self) -> None:
        if self.spec.on_end is not None and self._callback_error is None:
            try:
                self.spec.on_end()
            except BaseException as error:  # as of other callbacks
                self._callback_error = error
                self.kill()

    def _call_back(self, name: str, data: bytes) -> None:
        callback = self._callbacks.get(name)
        if callback and data and self._callback_error is None:
            try:
                callback(data)
            except BaseException as error:  # wait() raises it again, on the caller's thread
                self._callback_error = error
                self.kill()

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        if self._process is None:
            raise RuntimeError("the guest has not been started")
        return self._process.pid

    @property
    def monitor(self) -> Monitor:
        """QEMU's monitor (QMP), connected at the first use.  MonitorError: QEMU does not answer."""
        with self._connecting:
            if self._monitor is None:
                self._monitor = Monitor(self.qmp)
            return self._monitor

    def running(self) -> bool:
        """Whether QEMU is alive."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Kills QEMU."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """Ends QEMU if it runs, and removes temporary files."""
        self.kill()
        if self._keeper is not None:
            self._keeper.close()
        if self._monitor is not None:  # after QEMU's end, which it does not wait for
            self._monitor.close()
        if self._reader.ident is not None:
            self._reader.join(10)
        for port in self._ports.values():
            port.ours.close()
            port.theirs.close()
            if port.log:
                port.log.close()
        if self.coverage is not None:
            self.coverage.close()
        self._scratch.cleanup()

    # ---- input and output -------------------------------------------------------------------

    @property
    def console(self) -> str:
        """The text of the console so far."""
        with self._changed:
            return self._ports["console"].received.decode(errors="replace").replace("\r\n", "\n")

    @property
    def output(self) -> bytes:
        """The output of the command so far."""
        with self._changed:
            return bytes(self._ports["output"].received)

    def send(self, data: bytes) -> None:
        """Sends bytes to the command's stdin.  It has no end of file: a command that reads up to one never ends."""
        self._ports["output"].ours.sendall(data)

    def wait_for_gdb(self, say: Callable[[str, str], None]) -> None:
        """Lets a guest of `GuestSpec.gdb` go on once gdb has attached and continued it; returns then, or when it ends.

        When modules have been loaded, `say` gets the line that starts gdb, and the text of the script that gdb reads.
        MonitorError: QEMU does not answer.  ArtifactError, OSError: as of `Gdb.prepare`.
        """
        assert self._gdb is not None
        port, monitor = self._ports["status"], self.monitor
        with self._changed:
            while READY not in port.received:
                if not self.running():
                    return
                self._changed.wait(0.2)
            report = bytes(port.received)
        say(*self._gdb.prepare(report))
        while self.running():
            names = [name for _, name, _ in list(monitor.events)]  # it stops when gdb attaches
            if "STOP" in names and "RESUME" in names[names.index("STOP") :]:
                port.ours.sendall(b"go\n")
                return
            time.sleep(0.1)

    def resize(self, rows: int, columns: int) -> None:
        """Tells a command of `on_terminal` the size of its terminal, which the guest's kernel reports by SIGWINCH."""
        self._ports["status"].ours.sendall(b"%d %d\n" % (rows, columns))

    def expect(self, pattern: bytes, timeout: float = 60.0, *, port: str = "output") -> re.Match[bytes]:
        """Waits until the output (or the "console") since the last match contains `pattern`; returns the match.

        GuestTimeout: it did not in `timeout` seconds.  If the guest ends before: as for `wait`, or GuestOff.
        """
        here, deadline = self._ports[port], time.monotonic() + patience(timeout)
        while True:
            alive = self.running()
            if not alive:
                self._reader.join(10)  # for its last output
            with self._changed:
                match = re.search(pattern, bytes(here.received[here.consumed :]))
                if match:
                    here.consumed += match.end()
                    return match
                left = deadline - time.monotonic()
                if left <= 0:
                    raise GuestTimeout(f"no {pattern!r} on {port} in {spoken(timeout)}{self._tail()}")
                if alive:
                    self._changed.wait(min(left, 0.5))
            if not alive:
                self.wait()
                raise GuestOff(f"the command ended without {pattern!r} on {port}{self._tail()}")

    def wait(self) -> GuestResult:
        """Waits until the guest has ended.  GuestRunError: the command did not run to its end; see its subclasses."""
        if self._process is None:
            raise RuntimeError("the guest has not been started")
        deadline = self._started + patience(self.spec.timeout)
        killed: str | None = None
        verdict: re.Match[bytes] | None = None
        panic: re.Match[str] | None = None
        while self._process.poll() is None and killed is None:
            with self._changed:
                self._changed.wait(0.1)
            now = time.monotonic()
            if verdict is None and (verdict := self._verdict()):
                grace = _GRACE_OFF if verdict[1] == b"status" else _GRACE_FAILED
                deadline = min(deadline, now + patience(grace))
            if panic is None and (panic := self._panic()):
                # By its arguments the kernel reboots after a panic, or halts.
                deadline = min(deadline, now + patience(_GRACE_PANIC))
            if now >= deadline:
                killed = self._tail() if panic or verdict else self.stuck()
                self.kill()
        self._reader.join(10)
        wall = time.monotonic() - self._started
        if self._callback_error is not None:
            raise self._callback_error
        verdict, code = self._verdict(), self._process.returncode
        if killed is None:  # else hang() may have caused it
            panic = self._panic()
        if panic:  # also one at power-off, after the command has ended
            # It was perhaps seen when only the begin of its line had arrived.
            whole = next((line for line in self.console.splitlines() if panic[0] in line), panic[0])
            raise GuestPanic(f"{whole[whole.index(panic[0]) :].strip()}{self._tail()}")
        if verdict and verdict[1] == b"status":
            if self._log_error:
                raise LogError(f"the command ended with status {int(verdict[2])}, but {self._log_error}")
            boots = max(self.boots, 1)
            return GuestResult(
                int(verdict[2]), self.output, self.console, wall, killed is None, boots, places=self.places
            )
        if verdict:
            name = verdict[2].decode()
            if verdict[1] == b"share":
                share = self.spec.shares[int(name.removeprefix("share"))]
                raise ShareError(f"the folder {share.source} was not mounted at {share.target}{self._tail()}")
            raise ModuleError(f"module {name} did not load{self._tail()}")
        if killed is not None:
            raise GuestTimeout(f"the guest did not end in {spoken(self.spec.timeout)}{killed}")
        messages = self._qemu_log.read_text(errors="replace").strip() if self._qemu_log.exists() else ""
        if code:
            how = f"by signal {-code}" if code < 0 else f"with status {code}"
            if self.coverage is not None and not self.coverage.recorder.loaded:
                how = f"{how}, as it does not take vmodel's plugin for coverage,"
            raise QemuDied(f"QEMU ended {how} before the command: {messages or 'without a message'}{self._tail()}")
        why = f": {messages}" if messages else ""
        raise GuestOff(f"the guest powered off or rebooted before the command ended{why}{self._tail()}")

    def examiner(self) -> hang.Examiner:
        """Examines the guest while it hangs.  MonitorError: QEMU does not answer."""
        return hang.Examiner(self.monitor, self._ports["console"].ours.sendall, lambda: self.console)

    def stuck(self) -> str:
        """The console's end, and then as `hang`: what continues the text about a time-out."""
        return f"{self._tail()}{self.hang()}"

    def hang(self) -> str:
        """Why the guest hangs, as lines that continue an error's text; it cannot be used afterwards.

        What the kernel prints about it is on the console; registers.log among the artefacts has the CPUs' registers.
        """
        try:
            lines, registers = hang.examine(self.examiner())
        except MonitorError as error:
            lines, registers = [f"QEMU does not say where its CPUs are: {error}"], ""
        if self.artifacts is not None and registers:
            with naming(path := self.artifacts / "registers.log"):
                path.write_text(registers)
        return "".join(f"\n  {printable(self.places.in_text(line))}" for line in lines)

    def _verdict(self) -> re.Match[bytes] | None:
        with self._changed:
            return re.search(rb"^(status|module|share) (\w+)\n", bytes(self._ports["status"].received), re.MULTILINE)

    def _panic(self) -> re.Match[str] | None:
        return re.search(r"Kernel panic - not syncing[^\n]*", self.console)

    def _tail(self) -> str:
        lines = [printable(line) for line in self.console.splitlines() if line.strip()][-5:]
        kept = f"; logs are in {self.artifacts}" if self.artifacts else ""
        kept = f"; {self._log_error}" if self._log_error else kept
        if not lines and self.line[1:3] == ["-accel", "kvm"]:
            # In a virtual machine there may be a /dev/kvm with which no guest boots.
            return f"{kept}; its kernel has printed nothing: VMODEL_ACCEL=tcg boots it without KVM"
        return f"{kept}; the console's end:\n  " + "\n  ".join(lines) if lines else kept


def run_guest(
    spec: GuestSpec,
    *,
    artifacts: Path | None = None,
    on_output: Callable[[bytes], None] | None = None,
    on_console: Callable[[bytes], None] | None = None,
) -> GuestResult:
    """Boots a guest, runs its command, and returns when the guest has powered off.  GuestRunError: see `Guest.wait`."""
    with Guest(spec, artifacts=artifacts, on_output=on_output, on_console=on_console) as guest:
        return guest.wait()


def on_terminal(command: Sequence[str], rows: int, columns: int, term: str) -> str:
    """A command for GuestSpec that runs `command` with the serial port as its controlling terminal.

    Its input is that of a terminal: keys such as Ctrl-C are signals.  `term` is its $TERM.  See `Guest.resize`.
    """
    return _ON_TERMINAL.format(rows=rows, columns=columns, term=shlex.quote(term), command=shlex.join(command))


def writer(fd: int) -> Callable[[bytes], None]:
    """A callback that writes all data to a file descriptor."""

    name = {1: "stdout", 2: "stderr"}.get(fd, f"descriptor {fd}")

    def write(data: bytes) -> None:
        with naming(name), contextlib.suppress(BrokenPipeError):
            while data:
                data = data[os.write(fd, data) :]

    return write
