"""What a test needs of the machine: where that is missing, the test is skipped and says what it is.

Call one at the beginning of a test, or of a helper that needs it: `needs.pty()`.
"""

from __future__ import annotations

import multiprocessing.synchronize
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmodel.guest.artifacts import DEBUG, ArtifactError, find_kernel


def _need(what: str, try_it: Callable[[], object]) -> None:
    try:
        try_it()
    except (OSError, ImportError, subprocess.SubprocessError) as error:
        pytest.skip(f"needs {what}, which this machine has not: {error}")


def pty() -> None:
    """A pseudo-terminal."""

    def make() -> None:
        for fd in os.openpty():
            os.close(fd)

    _need("a pty", make)


def semaphores() -> None:
    """POSIX semaphores, which need a /dev/shm that one can write to: pools of processes have them."""
    _need("POSIX semaphores (/dev/shm)", lambda: multiprocessing.get_context("spawn").Semaphore())


def user_namespaces() -> None:
    """Namespaces of a user's own, by `unshare`."""
    _need(
        "user namespaces",
        lambda: subprocess.run(
            ["unshare", "--user", "--map-root-user", "true"], check=True, capture_output=True, timeout=60
        ),
    )


def ipv6() -> None:
    """A loopback interface with IPv6."""

    def make() -> None:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))

    _need("IPv6 on the loopback interface", make)


def fuse() -> None:
    """/dev/fuse, and a program that mounts by it."""

    def make() -> None:
        os.close(os.open("/dev/fuse", os.O_RDWR))

    _need("FUSE", make)


def debug_kernel() -> None:
    """The debug kernel, which takes half an hour to build, and whose boots take minutes: never in CI."""
    if os.environ.get("VMODEL_DEBUG_KERNEL") == "0":  # .ci/run
        pytest.skip("the debug kernel is not for CI: $VMODEL_DEBUG_KERNEL is 0")
    try:
        find_kernel(DEBUG)
    except ArtifactError as error:
        pytest.skip(f"needs the debug kernel: {error}")


def program(name: str) -> None:
    """A program of this name."""

    def find() -> None:
        if shutil.which(name) is None:
            raise FileNotFoundError(f"no {name} in $PATH")

    _need(f"the program {name}", find)


def checkout(variable: str, of: str, *parts: str) -> Path:
    """The folder that an environment variable names, which has these parts."""
    if not (folder := os.environ.get(variable)):
        pytest.skip(f"needs {of}: ${variable} is not set")
    for part in parts:
        assert (Path(folder) / part).exists(), f"${variable} has no {part}"
    return Path(folder).absolute()
