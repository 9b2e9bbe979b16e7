"""The shim's and the protocol's tests once more, with the shim built for ASan and UBSan."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1 -Werror"


def library(name: str) -> str:
    """The path of a sanitizer's runtime, which must be loaded before Python."""
    found = subprocess.run(
        ["cc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        pytest.fail(f"the compiler has no {name}: apt-get install gcc")
    return found


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project whose shim is built with the sanitizers."""
    return build(tmp_path_factory.mktemp("sanitized"), FLAGS, "-fsanitize=address,undefined")


def build(root: Path, flags: str, link: str) -> Path:
    """A copy of the project in `root`, with a shim that is built with these flags."""
    for name in ("vmodel", "c_shim", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    environment = {**os.environ, "CFLAGS": flags, "LDFLAGS": link}
    subprocess.run(
        [sys.executable, "c_shim/build.py"], cwd=root, env=environment, check=True, timeout=300, capture_output=True
    )
    # Only now: it is for pytest, and an old setuptools would stumble over it when it builds.
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def run(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "VMODEL_SANITIZED": "1",  # see tests/iommu/tables.py
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        # Python itself leaks on exit, on purpose.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
        "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=99",
    }
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize(
    "tests",
    [
        "tests/unit/test_memory.py tests/unit/test_files.py tests/processes/test_limits.py",
        "tests/unit/test_channel.py",
        "tests/proto",
        "tests/iommu",
        "tests/nvme/test_fast.py tests/nvme/test_backend.py tests/nvme/test_io.py",
        "tests/nvme/test_bounds.py tests/nvme/test_shadow.py tests/nvme/test_queues.py",
    ],
)
def test_no_complaints(sanitized: Path, tests: str) -> None:
    done = run(sanitized, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests.split())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


def test_they_would_complain(sanitized: Path) -> None:
    """That the build really is instrumented: a read past a heap buffer ends the process."""
    code = (
        "from vmodel._vmshim import ffi, lib; p = ffi.new('vms_range[1]'); m = ffi.new('vms_memory **'); f = ffi.new("
    )
    code += (
        "'vms_files **'); lib.vms_files_create(f); lib.vms_memory_create(f[0], 1, m); lib.vms_dirty_start(m[0], p, 9)"
    )
    done = run(sanitized, "-c", code)
    assert done.returncode == 99
    assert "AddressSanitizer" in done.stderr


def test_threads_on_files_that_shrink(tmp_path: Path) -> None:
    """The handler of SIGBUS reads nothing that another thread gives back, by TSan, which needs no luck for it."""
    program = tmp_path / "shrinking_files"
    sources = [ROOT / "tests/sanitized/shrinking_files.c", *sorted((ROOT / "c_shim").glob("*.c"))]
    library("libtsan.so")
    # It knows no fences (-Wtsan); what is tested here has none.
    command = ["cc", "-std=gnu11", "-O1", "-g", "-Wno-tsan", "-fsanitize=thread", f"-I{ROOT / 'c_shim'}", "-pthread"]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True, timeout=300)
    # Some kernels spread addresses wider than TSan bears.
    layout = ["setarch", "-R"] if shutil.which("setarch") else []
    done = subprocess.run([*layout, str(program)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


#: The guest's memory is the only thing that threads may write at once: a device does not know whether the guest, or
#: another device, uses the same bytes. The shim copies such bytes by memcpy, and nothing else that threads share.
GUEST_MEMORY = "race_top:^memcpy$\nrace_top:^__interceptor_memcpy$\n"
#: glibc frees the thread-local variables of a thread that has ended when another thread gets its stack.  A lock of
#: glibc's own orders the two, which TSan does not see.
STACKS = "race:^_dl_deallocate_tls$\nrace:^__GI__dl_deallocate_tls$\n"


def run_threads(tmp_path: Path, root: Path, suppressions: str) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "suppressions"
    file.write_text(STACKS + suppressions)
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "VMODEL_SANITIZED": "1",
        "LD_PRELOAD": library("libtsan.so"),
        "TSAN_OPTIONS": f"exitcode=66:suppressions={file}",
    }
    layout = ["setarch", "-R"] if shutil.which("setarch") else []
    return subprocess.run(
        [*layout, sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "tests/iommu/test_threads.py"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_threads_that_do_dma(tmp_path: Path) -> None:
    """Devices in two threads, a driver that maps and attaches in a third: TSan sees races for guest memory only."""
    root = build(tmp_path / "threads", "-fsanitize=thread -g -O1 -Wno-tsan", "-fsanitize=thread")
    done = run_threads(tmp_path, root, GUEST_MEMORY)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    # That it is instrumented: both devices do write the same bytes.
    done = run_threads(tmp_path, root, "")
    assert done.returncode == 66 and "dma_transfer" in done.stderr, done.stdout[-4000:]
