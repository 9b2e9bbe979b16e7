"""A guest's shell, driven from a test: one script after the other, each with its status and what it printed."""

from __future__ import annotations

import base64
import re

from vmodel.guest.running import Guest

#: The guest's command. A script comes as one line; its end is marked by a line that no program prints.
LOOP = """
echo ready
while read -r line; do
    eval "$(echo "$line" | base64 -d)" </dev/null 2>&1
    printf '\\n\\001%d\\n' $?
done
"""


class Shell:
    """Runs scripts in a guest whose command is `LOOP`; variables and jobs of one are there for the next."""

    def __init__(self, guest: Guest, timeout: float = 60.0) -> None:
        self.guest = guest
        guest.expect(rb"ready\n", timeout)

    def try_(self, script: str, timeout: float = 60.0) -> tuple[int, str]:
        """(status, output)."""
        self.start(script)
        return self.end(timeout)

    def run(self, script: str, timeout: float = 60.0) -> str:
        """The output of a script that must succeed."""
        status, output = self.try_(script, timeout)
        assert status == 0, f"{script}: status {status}: {output}\n{self.guest.console[-2000:]}"
        return output

    def fails(self, script: str, said: str = "", timeout: float = 60.0) -> str:
        """The output of a script that must not succeed, and must say something that matches `said`."""
        status, output = self.try_(script, timeout)
        assert status != 0, f"{script}: must not succeed: {output}"
        assert re.search(said, output), f"{script}: {output}"
        return output

    def start(self, script: str) -> None:
        """Begins a script; `end` is its end."""
        self.guest.send(base64.b64encode(script.encode()) + b"\n")

    def end(self, timeout: float = 60.0) -> tuple[int, str]:
        """(status, output) of the script that was begun."""
        # Anchored: else each attempt on a long output would take a time that is quadratic in it.
        found = self.guest.expect(rb"(?s)\A(.*?)\n\x01(\d+)\n", timeout)
        return int(found[2]), found[1].decode(errors="replace")

    def off(self) -> None:
        """Powers the guest off; its status must be 0."""
        self.start("exit 0")
        result = self.guest.wait()
        assert result.status == 0 and result.powered_off, result.console[-2000:]
