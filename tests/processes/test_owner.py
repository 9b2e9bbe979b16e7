"""Who owns a device: docs/threads.md."""

from __future__ import annotations

import os
import subprocess
import sys

from vmodel.patience import patience

#: A model's method that another thread calls without defer(), as a test bench's or an IOMMU's.
WRONG = """
import pathlib, sys, tempfile
from vmodel.devices.edu import Edu
from vmodel.server import Server
from vmodel.threads import WrongThread
from vmodel.vfio_user.client import Client

edu, server = Edu("edu0"), Server()
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "edu0.sock"
    server.add(edu, path)
    edu.backend.reset_device()  # nobody serves it yet
    with server, Client.connect(path) as client:
        client.negotiate()
        for call in (edu.backend.reset_device, lambda: edu.backend.region_write(0, 0x60, 4, 1)):
            try:
                call()
            except WrongThread as error:
                print(error)
        edu.defer(edu.backend.reset_device)
        client.info()
    edu.backend.reset_device()  # nor any more
print(edu.errors)
"""


def run(**environ: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", WRONG],
        env={**{k: v for k, v in os.environ.items() if k != "VMODEL_CHECK_THREADS"}, **environ},
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=True,
    )
    return done.stdout.splitlines()


def test_the_wrong_thread_is_named() -> None:
    lines = run(VMODEL_CHECK_THREADS="1")
    assert lines == [
        "VfioBackend.reset of edu0 belongs to the thread that serves it, not to MainThread: use defer()",
        "Regions.write of edu0 belongs to the thread that serves it, not to MainThread: use defer()",
        "0",
    ]


def test_without_the_check_it_costs_nothing() -> None:
    assert run() == ["0"]
    code = "from vmodel.device.regions import Regions; print(hasattr(Regions.read, '__wrapped__'))"
    for value, wrapped in (("", "False"), ("1", "True")):
        environ = {**os.environ, "VMODEL_CHECK_THREADS": value}
        done = subprocess.run(
            [sys.executable, "-P", "-c", code], env=environ, capture_output=True, text=True, timeout=patience(60)
        )
        assert done.stdout.strip() == wrapped, done.stderr
