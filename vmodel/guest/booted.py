"""A booted guest that runs scripts, one after the other, and reports what its kernel logged meanwhile.

The guest's command is an agent, a shell script.  It receives a line for each request, and answers on the same serial
port, between the output of the scripts: an answer starts with a control character and a token unique to the guest.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from vmodel.closing import Starting
from vmodel.errors import ConfigError
from vmodel.guest.artifacts import find_kernel
from vmodel.guest.kernel_lines import Line, lines_of
from vmodel.guest.monitor import Monitor
from vmodel.guest.running import Guest, GuestOff, GuestResult, GuestRunError, GuestSpec, GuestTimeout
from vmodel.patience import patience, spoken

log = logging.getLogger("vmodel.guest")

#: The largest script, in bytes.  A longer one has to be a file of the guest.
MAX_SCRIPT = 24 * 1024
#: Seconds that a guest gets after an oops, to print the rest of it.
_GRACE = 2.0
#: The end of a console's line in which a crash is looked for, in bytes.  The kernel's lines are shorter.
_LONGEST_LINE = 4096
_CRASH = re.compile(rb"Oops\b|Kernel panic|kernel BUG at|BUG: (unable to handle|kernel NULL)")
#: Marks in the kernel's log where a script begins.
BEGIN = "vmodel: a script begins:"
#: With this module the kernel also reports a panic by QMP.
PVPANIC = "pvpanic-mmio"

# The console gets every message, as the time of its arrival there is known.  The kernel reports a hung task after a
# third of the script's time limit.  The script is not a child of the agent: a child's exit interrupts `read`, which
# then loses the part of a line that it has read.
_AGENT = r"""
dmesg -n 8
echo -1 > /proc/sys/kernel/hung_task_warnings
mkdir -p /run/vmodel
cat > /bin/vmodel-host <<'END'
HOST
END
chmod +x /bin/vmodel-host
say() { printf '\036%s %s\n' TOKEN "$*"; }
say ready $VMODEL_BOOT
while read -r verb id limit script; do
    case $verb in
    run)
        echo "$script" | base64 -d > /run/vmodel/$id
        echo $limit > /proc/sys/kernel/hung_task_timeout_secs
        echo 1 > /sys/kernel/debug/clear_warn_once
        echo "<6>BEGIN $id" > /dev/kmsg
        ((sh /run/vmodel/$id </dev/null 2>&1; say done $id $?) &)
        ;;
    log) say log $id "$(dmesg -r | base64 | tr -d '\n')"; dmesg -c > /dev/null ;;
    clear) dmesg -c > /dev/null; say clear $id ;;
    ping) say pong $id ;;
    answer) echo $limit > /run/vmodel/answer && mv /run/vmodel/answer /run/vmodel/answer.$id ;;
    off) exit 0 ;;
    esac
done 2>/dev/null
"""
# Scripts send requests to the host by this program.
_HOST = r"""#!/bin/sh
printf '\036%s host %s %s\n' TOKEN $$ "$*" > /dev/ttyS1
until [ -e /run/vmodel/answer.$$ ]; do sleep 0.05; done
read status < /run/vmodel/answer.$$
rm /run/vmodel/answer.$$
exit $status
"""


@dataclass(frozen=True)
class Done:
    """The result of a script.  Times are in seconds, of time.monotonic()."""

    #: Its exit status, 0 to 255; None: it did not end within its time limit, or the guest has ended.
    status: int | None
    output: bytes
    started: float
    ended: float
    #: When each piece of its output arrived.
    came: tuple[float, ...] = ()
    #: If it did not end within its time limit: the console's end, where each CPU is, and the blocked tasks, as lines.
    hang: str = ""


#: Carries out a request of a script on the host: takes its arguments, returns the exit status.
HostCommand = Callable[[list[str]], int]


class BootedGuest(Starting):
    """Boots a guest, and runs scripts in it, one after the other; a context manager.

    `spec.command` is not used, and `spec.timeout` is the time for the boot.
    """

    def __init__(
        self,
        spec: GuestSpec,
        *,
        artifacts: Path | None = None,
        host: Mapping[str, HostCommand] | None = None,
    ) -> None:
        """`host`: the requests that scripts may make by `vmodel-host VERB ARGUMENTS`, by verb."""
        self._token = secrets.token_hex(8)
        self._host = dict(host or {})
        kernel = spec.kernel or find_kernel()
        self._boot_timeout = spec.timeout
        panic: list[str] = []
        modules = list(spec.modules)
        if kernel.modules is not None and any(kernel.modules.rglob(f"{PVPANIC}.ko*")):
            panic = ["-device", "pvpanic", "-action", "panic=none"]
            modules.append(PVPANIC)
        self.spec = replace(
            spec,
            command=_AGENT.replace("HOST", _HOST.strip()).replace("BEGIN", BEGIN).replace("TOKEN", self._token),
            kernel=kernel,
            modules=modules,
            qemu_args=[*panic, *spec.qemu_args],
            timeout=float("inf"),
        )
        self._changed = threading.Condition()
        #: The pieces of the console's text, with the time of each; likewise of the output, without the agent's answers.
        self._console: list[tuple[float, bytes]] = []
        self._output: list[tuple[float, bytes]] = []
        #: Output from the first mark on that is not answered yet: an answer of the agent's, as far as it has arrived.
        self._rest = bytearray()
        self._answers: dict[str, str] = {}
        self._asked: list[tuple[str, list[str]]] = []
        #: The console's last line, as far as it has arrived, and the time of the last sign of a crash.
        self._line = b""
        self._crashed = 0.0
        self._boots = 0
        self._number = 0
        self.guest = Guest(self.spec, artifacts=artifacts, on_output=self._on_output, on_console=self._on_console)

    # ---- life -------------------------------------------------------------------------------

    def start(self) -> None:
        """Boots the guest, and waits until it takes scripts.  GuestRunError: it did not boot.  See also Guest.start."""
        self.guest.start()
        self._await_boot(0, self._boot_timeout, "boot")

    def _await_boot(self, before: int, timeout: float, name: str) -> None:
        try:
            self._await(lambda: self._boots > before, timeout, name)
        except GuestTimeout as error:
            raise GuestTimeout(f"{error}{self.guest.stuck()}") from None

    @property
    def monitor(self) -> Monitor:
        """QEMU's monitor (QMP), connected at the first use.  MonitorError: QEMU does not answer."""
        return self.guest.monitor

    def close(self) -> None:
        """Ends QEMU, after `spec.on_end`."""
        try:
            if self.spec.on_end is not None and self.guest.running():
                self.spec.on_end()
        finally:
            self.guest.close()

    # ---- callbacks, on the guest's thread -----------------------------------------------------

    def _on_console(self, data: bytes) -> None:
        now = time.monotonic()
        with self._changed:
            self._console.append((now, data))
            *lines, rest = (self._line + data).split(b"\n")
            self._line = rest[-_LONGEST_LINE:]
            if any(map(_CRASH.search, lines)):
                self._crashed = now
            self._changed.notify_all()

    def _on_output(self, data: bytes) -> None:
        now = time.monotonic()
        mark = b"\x1e" + self._token.encode() + b" "
        with self._changed:
            rest, seen, start, at = self._rest, len(self._rest), 0, 0
            rest += data
            # Each byte is looked at once, also in a flood of marks or of an answer's bytes.
            while (at := rest.find(b"\x1e", at)) >= 0:
                if not rest.startswith(mark[: len(rest) - at], at):
                    at += 1  # output of a script
                    continue
                end = rest.find(b"\n", max(at, seen))
                if end < 0:
                    break
                if at > start:
                    self._output.append((now, bytes(rest[start:at])))
                self._answered(rest[at + len(mark) : end].decode(errors="replace"))
                start = at = end + 1
            at = len(rest) if at < 0 else at
            if at > start:
                self._output.append((now, bytes(rest[start:at])))
            del rest[:at]
            self._changed.notify_all()

    def _answered(self, line: str) -> None:
        verb, _, rest = line.partition(" ")
        if verb == "ready":
            self._boots += 1
        elif verb == "host":
            id, _, words = rest.partition(" ")
            self._asked.append((id, words.split()))
        else:
            id, _, value = rest.partition(" ")
            self._answers[f"{verb} {id}"] = value

    # ---- requests ---------------------------------------------------------------------------

    def _await(self, what: Callable[[], object], timeout: float, name: str) -> None:
        """Waits until `what` is true, and serves the scripts' requests meanwhile.

        GuestRunError: it did not become true in `timeout` seconds, or the guest has ended.
        """
        deadline = time.monotonic() + patience(timeout)
        while True:
            alive = self.guest.running()
            with self._changed:
                if what():
                    return
                if alive and time.monotonic() >= deadline:  # also while the guest keeps sending requests
                    raise GuestTimeout(f"{name}: did not end in {spoken(timeout)}")
                asked, self._asked = self._asked, []
                if not asked and alive:
                    self._changed.wait(min(0.2, max(deadline - time.monotonic(), 0)))
                    if what():
                        return
            for id, words in asked:
                self._answer(id, words)
            if not alive:
                self.guest.wait()  # raises the reason
                raise GuestOff(f"{name}: the guest powered off before it ended")

    def _answer(self, id: str, words: list[str]) -> None:
        verb = self._host.get(words[0]) if words else None
        status = 127 if verb is None else verb(words[1:])
        self._send(f"answer {id} {status}")

    def _send(self, line: str) -> None:
        with contextlib.suppress(OSError):  # QEMU has ended: _await() reports it
            self.guest.send(line.encode() + b"\n")

    def _ask(self, verb: str, timeout: float) -> str:
        self._number += 1
        key = f"{ {'ping': 'pong'}.get(verb, verb) } {self._number}"
        self._send(f"{verb} {self._number}")
        self._await(lambda: key in self._answers, timeout, verb)
        return self._answers.pop(key)

    def run(self, script: str, timeout: float = 60.0, *, examine: bool = True) -> Done:
        """Runs a shell script in /root, for up to `timeout` seconds.

        A script that exceeds them is not ended, and the guest is examined unless `examine` says otherwise: the result
        and the log say why it hangs.  A guest that takes no interrupts any more panics then.
        ConfigError: the script is longer than MAX_SCRIPT.
        """
        encoded = base64.b64encode(script.encode() + b"\n")
        if len(script.encode()) > MAX_SCRIPT:
            raise ConfigError(f"the script has {len(script.encode())} bytes, more than {MAX_SCRIPT}: copy it as a file")
        self._number += 1
        key, first = f"done {self._number}", len(self._output)
        started = time.monotonic()
        limit = max(int(patience(timeout) / 3), 1)

        def over() -> bool:
            return key in self._answers or started < self._crashed < time.monotonic() - _GRACE

        status, hang = None, ""
        self._send(f"run {self._number} {limit} {encoded.decode()}")
        error: GuestRunError | None = None
        try:
            self._await(over, timeout, "the script")
        except GuestRunError as raised:
            error = raised
        ended = time.monotonic()
        with self._changed:
            if key in self._answers:
                status = int(self._answers.pop(key))
        with self._changed:
            came = self._output[first:]
        output = b"".join(data for _, data in came)
        if examine and isinstance(error, GuestTimeout):
            hang = self.guest.stuck()
            log.warning("%s%s", error, hang)
        return Done(status, output, started, ended, tuple(at for at, _ in came), hang)

    def alive(self, timeout: float = 5.0) -> bool:
        """Whether the agent answers within `timeout` seconds."""
        try:
            self._ask("ping", timeout)
        except GuestRunError:
            return False
        return True

    def clear(self, timeout: float = 20.0) -> None:
        """Empties the kernel's log.  GuestRunError: the guest does not answer."""
        self._ask("clear", timeout)

    def dmesg(self, timeout: float = 20.0) -> str:
        """The kernel's log since the last call, as text of `dmesg -r`.  GuestRunError: the guest does not answer."""
        try:
            return base64.b64decode(self._ask("log", timeout)).decode(errors="replace")
        except binascii.Error as error:
            raise GuestRunError(f"the kernel's log did not arrive complete: {error}") from error

    def reset(self, timeout: float | None = None) -> None:
        """Resets the machine, and waits until it has booted again; needs `spec.allow_reboot`.

        `timeout` is in seconds; by default that of the boot.  GuestRunError: it did not boot.  MonitorError.
        """
        before = self._boots
        self.monitor.execute("system_reset")
        self._await_boot(before, timeout or self._boot_timeout, "reset")

    def power_off(self) -> GuestResult:
        """Makes the guest power off, and returns its result.  GuestRunError: it does not power off."""
        self._send("off")
        deadline = time.monotonic() + patience(self._boot_timeout)
        while self.guest.running():
            with self._changed:
                self._changed.wait(0.1)
            if time.monotonic() > deadline:
                raise GuestTimeout(f"the guest did not power off in {spoken(self._boot_timeout)}{self.guest.stuck()}")
        return self.guest.wait()

    # ---- the console ------------------------------------------------------------------------

    def mark(self) -> int:
        """The present end of the console, for `console` and `lines`."""
        with self._changed:
            return len(self._console)

    def console(self, mark: int = 0) -> str:
        """The console's text since `mark`."""
        with self._changed:
            data = b"".join(piece for _, piece in self._console[mark:])
        return data.decode(errors="replace").replace("\r\n", "\n")

    def lines(self, mark: int = 0) -> list[Line]:
        """The kernel's lines on the console since `mark`, with the time of arrival of each (time.monotonic())."""
        with self._changed:
            pieces = self._console[mark:]
        found: list[Line] = []
        rest = b""
        for at, data in pieces:
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                found += [replace(one, at=at) for one in lines_of(line.decode(errors="replace"))]
        return found + lines_of(rest.decode(errors="replace"))
