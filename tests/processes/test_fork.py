"""A process that uses the shim and forks."""

from __future__ import annotations

import subprocess
import sys

from vmodel.patience import patience

FORK = """
import os
from vmodel import _shim

function, event = _shim.FunctionRegions(), os.eventfd(0)
function.signal(event)
child = os.fork()
function.signal(event)
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    print(os.eventfd_read(event))
"""


def test_a_child_signals_after_fork() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=patience(60))
    assert (done.stdout, done.stderr) == ("3\n", "")
