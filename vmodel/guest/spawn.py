"""Starting QEMU so that it ends with this process, however that ends.

QEMU asks Linux for a signal when its parent ends (PR_SET_PDEATHSIG), and the parent is the thread that started it: QEMU
would end with that thread.  So threads other than the main one have another thread start it, which stays.
"""

from __future__ import annotations

import os
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vmodel.guest.artifacts import Qemu

#: The first QEMU with this option.
_SINCE = (10, 2)

_stays: ThreadPoolExecutor | None = None


def ends_with_parent(qemu: Qemu) -> list[str]:
    """QEMU's arguments for that; none for an older QEMU, which goes on if this process is killed."""
    return ["-run-with", "exit-with-parent=on"] if qemu.version >= _SINCE else []


def start(line: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """subprocess.Popen, on a thread that lives as long as this process.  OSError: as for Popen."""
    global _stays

    def started() -> subprocess.Popen[bytes]:
        return subprocess.Popen(line, **options)

    if threading.current_thread() is threading.main_thread():
        return started()
    if _stays is None:
        _stays = ThreadPoolExecutor(1, "vmodel-spawn")
    return _stays.submit(started).result()


def _forked() -> None:
    """A child of fork has none of its parent's threads but the one that forked."""
    global _stays
    _stays = None


os.register_at_fork(after_in_child=_forked)
