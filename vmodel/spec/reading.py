"""Reads a specification in a child process, whose time and memory are limited; what was read before, from the cache.

A few lines of SystemRDL, such as text macros of text macros, make a compiler work for years.
"""

from __future__ import annotations

import importlib
import os
import pickle
import resource
import subprocess
import sys
import time
from pathlib import Path

from vmodel.errors import ConfigError
from vmodel.spec import drafts_cache
from vmodel.spec.draft import FileDraft, SourcePlace

#: What the child may use: seconds of a CPU, bytes of address space.
CPU_SECONDS = 60
MEMORY = 2 << 30
#: The extra `registers`, by its packages: vmodel itself is not on PyPI.
_EXTRA = "pip install systemrdl-compiler peakrdl-ipxact"


def read_in_child(kind: str, path: Path, name: str | None) -> FileDraft:
    """What `read_systemrdl` or `read_ipxact` of vmodel.spec.systemrdl returns.  ConfigError."""
    if (found := drafts_cache.find(kind, path, name)) is not None:
        return found
    limits = [str(CPU_SECONDS), str(MEMORY)]
    done = subprocess.run(
        [sys.executable, "-m", __name__, kind, str(path), name or "", *limits],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        check=False,
    )
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        if done.returncode > 0 and not last.startswith("MemoryError"):
            raise SourcePlace(path).error(f"cannot be read: {last}")
        raise SourcePlace(path).error(f"takes more than {CPU_SECONDS} s of a CPU, or {MEMORY >> 20} MiB of memory")
    made: FileDraft | ConfigError
    made, files = pickle.loads(done.stdout)
    if isinstance(made, ConfigError):
        raise made
    if files is not None:
        drafts_cache.store(kind, path, name, files, made)
    return made


def _main(kind: str, path: str, name: str, seconds: str, memory: str) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
    resource.setrlimit(resource.RLIMIT_AS, (int(memory), int(memory)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    made: FileDraft | ConfigError
    begun, read, files = time.time_ns(), list[Path](), None
    try:
        module = importlib.import_module("vmodel.spec.systemrdl")
        made = getattr(module, f"read_{kind}")(Path(path), name or None, read)
        files = drafts_cache.digests(read, begun)
    except ConfigError as error:
        made = ConfigError(str(error))
    except ModuleNotFoundError as error:
        made = SourcePlace(Path(path)).error(f"needs the Python package {error.name}: {_EXTRA}")
    sys.stdout.buffer.write(pickle.dumps((made, files)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
