"""scripts/build-kernel: builds the debug kernel, which is Debian's source with the options of debug.config.

It is built in the cache's part `source`, by the compiler that modules are built with.  HOST_PACKAGES are for programs
that Linux's own build makes and runs.  At the end there are two parts as for Debian's kernels, `kernel-debug` and
`headers-debug`; the latter also has vmlinux, and in `modules` the modules, with debug information.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from vmodel.errors import ConfigError
from vmodel.guest.artifacts import (
    BUILD_COMMAND,
    DEBUG,
    DEBUG_RELEASE,
    STABLE,
    ArtifactError,
    cache_dir,
    find_kernel,
    find_source,
    read_stamp,
)
from vmodel.guest.get_qemu import SOURCE, Steps, fetch
from vmodel.guest.groups import output
from vmodel.guest.headers import find_headers
from vmodel.guest.kbuild import check_path
from vmodel.interrupts import interruptible
from vmodel.patience import patience, spoken

#: The options of the debug kernel; all others are off.
FRAGMENT = Path(__file__).with_name("debug.config")
#: What the host must have: a program, or a header of C; and Debian's package with it.
HOST_PACKAGES = {
    "gcc": "gcc",
    "flex": "flex",
    "bison": "bison",
    "bc": "bc",
    "stdlib.h": "libc6-dev",
    "gelf.h": "libelf-dev",
}
# Measured: the processor's minutes, bytes of Debian's package, of the folder at its fullest, and of what stays.
_CPU_MINUTES = 24
_DOWNLOAD = 153e6
_DISK = 3.6e9
_KEPT = 0.35e9
#: About as many lines make prints.
_LINES = 1950
#: Seconds for make on a machine at rest.
_TIMEOUT = 4 * 3600.0
#: Bytes that make may print.
_LARGEST = 64 << 20
#: What building modules needs of the tree, beside Makefiles and what make wrote: folders, and single files.
_TREE = ("include", "scripts", "arch/x86/include")
_FILES = (
    "Makefile",
    "Kbuild",
    ".config",
    ".kernelvariables",
    "Module.symvers",
    "System.map",
    "vmlinux",
    "arch/x86/Makefile",
    "arch/x86/Makefile_32.cpu",
    "tools/objtool/objtool",
)
_OPTION = re.compile(r"(CONFIG_\w+)=(y|m|n|\d+|0x[0-9a-fA-F]+|\"[^\"]*\")")
_OFF = re.compile(r"# (CONFIG_\w+) is not set")


# ---- options -----------------------------------------------------------------------------------------


def read_options(file: Path) -> dict[str, str]:
    """The options of a file in the form of Linux's .config: {"CONFIG_X": "y"}; "n" for `# CONFIG_X is not set`.

    ConfigError: it cannot be read, or a line is no option.
    """
    try:
        text = file.read_text()
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot be read: {error}", file=file) from None
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if option := _OPTION.fullmatch(line):
            found[option[1]] = option[2]
        elif off := _OFF.fullmatch(line):
            found[off[1]] = "n"
        elif line and not line.startswith("#"):
            raise ConfigError(
                f"line {number}: {line[:80]!r}: must be CONFIG_X=VALUE, or # CONFIG_X is not set", file=file
            )
    return found


def check_options(wanted: Mapping[str, str], got: Mapping[str, str]) -> None:
    """ArtifactError unless `got`, which Linux's configuration made of the wanted options, has them all.

    It drops silently what depends on an option that is off, and what this version has not got.
    """
    pairs = {name: (value, got.get(name, "n")) for name, value in wanted.items()}
    if lost := [f"{name}={value} (it is {there})" for name, (value, there) in pairs.items() if there != value]:
        raise ArtifactError(
            f"Linux's configuration does not take {', '.join(lost)}: it depends on another option, or this version has"
            " no such option"
        )


# ---- before ------------------------------------------------------------------------------------------


def missing_packages(
    which: Callable[[str], str | None] = shutil.which, has_header: Callable[[str], bool] | None = None
) -> list[str]:
    """Debian's packages with what a build needs and this host has not."""
    has_header = has_header or _has_header
    return [
        package
        for need, package in HOST_PACKAGES.items()
        if not (has_header(need) if need.endswith(".h") else which(need))
    ]


def _has_header(name: str) -> bool:
    if not shutil.which("gcc"):
        return Path("/usr/include", name).is_file()
    line = ["gcc", "-fsyntax-only", "-xc", "-"]
    text = f"#include <{name}>\n"
    return (
        subprocess.run(line, input=text, text=True, capture_output=True, timeout=patience(60), check=False).returncode
        == 0
    )


def price(options: int, jobs: int, free: float, download: bool) -> str:
    """What a build costs, as text."""
    minutes = max(5, round(_CPU_MINUTES / jobs / 5) * 5)
    source = f"a download of {_DOWNLOAD / 1e6:.0f} MB" if download else "the source is there"
    return (
        f"builds Linux with {options} options set: about {minutes} minutes with {jobs} compilers at a time; {source};"
        f" {_DISK / 1e9:.1f} GB in {cache_dir()} meanwhile ({free / 1e9:.1f} GB are free), {_KEPT / 1e6:.0f} MB"
        " afterwards"
    )


def _check_space(free: float) -> None:
    there = sum(path.lstat().st_size for path in (cache_dir() / SOURCE).rglob("*"))
    if free + there < _DISK:
        raise ArtifactError(
            f"the build needs {_DISK / 1e9:.1f} GB in {cache_dir()}, and {free / 1e9:.1f} GB are free; make room, or"
            " set XDG_CACHE_HOME"
        )


def _agreed() -> bool:
    if not sys.stdin.isatty():
        raise ArtifactError("stdin is no terminal that could answer; run it with --yes")
    print("build-kernel: go on? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# ---- the build ---------------------------------------------------------------------------------------


def build(options: Mapping[str, str], jobs: int, keep: bool, steps: Steps) -> None:
    """Builds the debug kernel with these options from the source in the cache, and puts it into the cache.

    ArtifactError: Linux's configuration does not take the options, or make fails.
    """
    linux = find_source()
    number = read_stamp(find_headers(find_kernel(STABLE)).folder.parents[2])["compiler"]
    make = _Make(linux, cache_dir() / f"gcc-{number}" / "usr/bin", number)
    with steps.step("configuration"):
        given = linux / "vmodel.config"
        given.write_text("".join(f"{name}={value}\n" for name, value in options.items()))
        make.run("allnoconfig", KCONFIG_ALLCONFIG=str(given))
        check_options(options, read_options(linux / ".config"))
    with steps.step("compilation") as show:
        start = time.monotonic()

        def on_line(count: int) -> None:
            show(f"{count} of about {_LINES} steps, {(time.monotonic() - start) / 60:.0f} min")

        make.run(f"-j{jobs}", "bzImage", "modules", on_line=on_line)
    with steps.step("installation"):
        _install(make, options, number)
    if not keep:
        with steps.step("removal of what was compiled"):
            shutil.rmtree(cache_dir() / SOURCE)


class _Make:
    """Runs make in Linux's source, with the cache's compiler."""

    def __init__(self, linux: Path, programs: Path, compiler: str) -> None:
        self.linux = linux
        self._programs = programs
        self._log = linux.parent / "build.log"
        # Debian's Makefile reads this file; so builds of modules have the same compiler.
        (linux / ".kernelvariables").write_text(
            "override ARCH = x86\n"
            "override CROSS_COMPILE = x86_64-linux-gnu-\n"
            f"override CC = x86_64-linux-gnu-gcc-{compiler}\n"
        )

    def run(self, *words: str, on_line: Callable[[int], None] | None = None, **variables: str) -> None:
        """Runs it.  `on_line` gets the number of lines that it has printed.  ArtifactError: it fails."""
        # Debug information says linux/FILE: the folder goes away.
        prefix = f"KCFLAGS=-fdebug-prefix-map={self.linux}=linux"
        line = [str(self._programs / "make"), "--no-print-directory", "ARCH=x86", prefix, *words]
        line += [f"{name}={value}" for name, value in variables.items()]
        environ = {
            "PATH": f"{self._programs}:{os.environ.get('PATH', '/usr/bin:/bin')}",
            "LC_ALL": "C.UTF-8",
            "HOME": os.environ.get("HOME", "/"),
            "KBUILD_BUILD_USER": "vmodel",
            "KBUILD_BUILD_HOST": "vmodel",
        }
        run = output(line, environ=environ, folder=self.linux, seconds=patience(_TIMEOUT), most=_LARGEST)
        try:
            with self._log.open("w", buffering=1) as log, run as (process, printed):
                for count, data in enumerate(printed, 1):
                    log.write(f"{(text := data.decode(errors='replace'))}\n")
                    if on_line and text.startswith("  "):
                        on_line(count)
        except TimeoutError:
            text = f"make did not end in {spoken(_TIMEOUT)}; {BUILD_COMMAND} goes on from there"
            raise ArtifactError(text) from None
        if process.returncode:
            raise ArtifactError(f"make failed: {complaint(self._log.read_text())}; all of it is in {self._log}")


def complaint(log: str) -> str:
    """The first error in what make printed, else its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = (line for line in lines if re.search(r"\berror\b|\*\*\*|No space left|not found", line, re.IGNORECASE))
    return next(errors, lines[-1] if lines else "it printed nothing")[:400]


def _install(make: _Make, options: Mapping[str, str], compiler: str) -> None:
    """Makes the parts kernel-debug and headers-debug of what was built."""
    linux, new = make.linux, make.linux.parent / "new"
    shutil.rmtree(new, ignore_errors=True)
    release = (linux / "include/config/kernel.release").read_text().strip()
    if not release.endswith(DEBUG_RELEASE):
        raise ArtifactError(f"the kernel's release is {release}, which does not end in {DEBUG_RELEASE}")
    kernel, headers = new / f"kernel-{DEBUG}", new / f"headers-{DEBUG}"
    (kernel / "boot").mkdir(parents=True)
    shutil.copy(linux / "arch/x86/boot/bzImage", kernel / "boot" / f"vmlinuz-{release}")
    shutil.copy(linux / ".config", kernel / "boot" / f"config-{release}")
    # Without debug information: modules take the guest's memory.
    make.run("modules_install", INSTALL_MOD_PATH=str(kernel), INSTALL_MOD_STRIP="1", DEPMOD="true")
    (kernel / "lib/modules" / release / "build").unlink(missing_ok=True)
    tree = headers / "usr/src" / f"linux-headers-{release}"
    left_out = shutil.ignore_patterns("*.o", "*.a", ".*.cmd", ".*.d")
    for folder in _TREE:
        shutil.copytree(linux / folder, tree / folder, symlinks=True, ignore=left_out)
    for name in _FILES:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(linux / name, tree / name)
    (headers / "modules").mkdir()
    for name in modules(linux):
        shutil.copy(linux / name, headers / "modules")
    stamp = {"release": release, "compiler": compiler, "options": digest(options)}
    for part in (headers, kernel):
        (part / "stamp.json").write_text(json.dumps(stamp, indent=1) + "\n")
        target = cache_dir() / part.name
        if target.exists():
            target.rename(new / f"old-{part.name}")
        part.rename(target)
    shutil.rmtree(new)


def modules(linux: Path) -> list[str]:
    """The paths of the modules that were built, from the source's folder."""
    return [str(Path(line).with_suffix(".ko")) for line in (linux / "modules.order").read_text().split()]


def digest(options: Mapping[str, str]) -> str:
    """What tells two sets of options apart."""
    return hashlib.sha256(json.dumps(sorted(options.items())).encode()).hexdigest()[:16]


# ---- the command -------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace, steps: Steps) -> None:
    options = read_options(FRAGMENT)
    for file in arguments.config:
        options |= read_options(file)
    stamp = read_stamp(cache_dir() / f"kernel-{DEBUG}")
    if stamp.get("options") == digest(options) and not arguments.refresh:
        steps.note(f"build-kernel: {stamp['release']} is there with these options already")
        return
    if missing := missing_packages():
        raise ArtifactError(f"this host lacks what Linux is built with: apt-get install {shlex.join(missing)}")
    place = cache_dir()
    place.mkdir(parents=True, exist_ok=True)
    check_path(place)
    free = shutil.disk_usage(place).free
    download = arguments.refresh or not read_stamp(place / SOURCE)
    steps.note(f"build-kernel: {price(len(options), arguments.jobs, free, download)}")
    _check_space(free)
    if arguments.dry_run or not (arguments.yes or _agreed()):
        return
    with _locked(place / "build-kernel.lock"):
        # The compiler is that of stable's headers.
        fetch([STABLE], headers=[STABLE], mirror=arguments.mirror, steps=steps)
        fetch([], optional=[SOURCE], mirror=arguments.mirror, refresh=arguments.refresh, steps=steps)
        build(options, arguments.jobs, arguments.keep, steps)
    steps.note(f"build-kernel: {find_kernel(DEBUG).release} is there: --kernel {DEBUG}")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError("another build-kernel is at work") from None
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/build-kernel; returns the exit status.  Messages go to stderr."""
    parser = argparse.ArgumentParser(
        prog="build-kernel",
        description="Build the debug kernel (KASAN, lockdep, DMA-API, ...), for --kernel debug. "
        "It is Debian's source with options that find bugs of drivers, and goes into the cache folder. "
        "How long that takes, and how large it is, it says before. Interrupted, it goes on from there the next time.",
    )
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.add_argument(
        "--config",
        action="append",
        type=Path,
        default=[],
        metavar="FILE",
        help="more options, as lines CONFIG_X=y; repeatable",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="compilers at a time; default: as many as there are processors",
    )
    parser.add_argument(
        "--keep",
        action="store_true",
        help="keep the source and all that was compiled: another build with other options is faster",
    )
    parser.add_argument(
        "--mirror", metavar="URI", help="a mirror of Debian's archive; default: that of this host's apt"
    )
    parser.add_argument("--refresh", action="store_true", help="build from the source that the archive has now")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    arguments = parser.parse_args(argv)
    if not 1 <= arguments.jobs <= 1024:
        parser.error(f"--jobs {arguments.jobs}: must be from 1 to 1024")

    try:
        with interruptible():
            _run(arguments, Steps())
    except (ConfigError, OSError, subprocess.SubprocessError, tarfile.TarError) as error:
        print(f"build-kernel: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("build-kernel: interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
