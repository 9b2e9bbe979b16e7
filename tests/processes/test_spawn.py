"""What is started for a guest ends with the process, and not with the thread that started it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

from tests.waiting import until
from vmodel.guest import spawn
from vmodel.guest.artifacts import Qemu
from vmodel.patience import patience

#: As QEMU's exit-with-parent=on; prints a line when it is so.
CHILD = "import ctypes, time; assert ctypes.CDLL(None).prctl(1, 9) == 0; print('set', flush=True); time.sleep(600)"
#: Starts it on a thread that ends, and waits for a line.
PARENT = f"""
import subprocess, sys, threading
from vmodel.guest import spawn
def work():
    run = spawn.start([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
    assert run.stdout.readline() == b"set\\n"
    print(run.pid, flush=True)
thread = threading.Thread(target=work)
thread.start()
thread.join()
sys.stdin.readline()
"""


def runs(pid: int) -> bool:
    """Whether a process runs: one that ended may be left as a zombie, as nobody in a container waits for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_it_lives_longer_than_the_thread_and_not_than_the_process() -> None:
    line = [sys.executable, "-c", PARENT]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        try:
            # The thread has ended: its children would have got the signal by now.
            until(lambda: len(list(Path(f"/proc/{parent.pid}/task").iterdir())) == 2, "the end of the thread")
            assert runs(child)
        finally:
            parent.kill()
    until(lambda: not runs(child), "the end of the child")


def test_threads_share_one_that_stays() -> None:
    started: list[subprocess.Popen[bytes]] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: started.append(spawn.start([sys.executable, "-c", CHILD])))
        thread.start()
        thread.join(patience(30))
    try:
        assert all(run.poll() is None for run in started) and len(started) == 3
        assert sum(thread.name.startswith("vmodel-spawn") for thread in threading.enumerate()) == 1
    finally:
        for run in started:
            run.send_signal(signal.SIGKILL)
            run.wait()


def test_a_missing_program_is_an_error_on_each_thread() -> None:
    errors: list[OSError] = []

    def work() -> None:
        try:
            spawn.start(["/no/such/program"])
        except OSError as error:
            errors.append(error)

    work()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(patience(30))
    assert [error.filename for error in errors] == ["/no/such/program"] * 2


def test_a_child_of_fork_starts_a_thread_of_its_own() -> None:
    code = """
import os, subprocess, sys, threading
from vmodel.guest import spawn
def work():
    assert spawn.start(["true"]).wait() == 0
def on_thread():
    thread = threading.Thread(target=work)
    thread.start()
    thread.join(20)
    return thread.is_alive()
assert not on_thread()
child = os.fork()
if not child:
    os._exit(on_thread())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=patience(60), check=False
    )
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_which_qemus_can() -> None:
    for version, can in (((10, 1, 3), False), ((10, 2), True), ((11, 1, 3), True)):
        assert bool(spawn.ends_with_parent(Qemu(Path("qemu"), version))) is can
