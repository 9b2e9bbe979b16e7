"""QEMU, guest kernels and busybox: where they are, and how to get Debian's packages of them.

`scripts/get-qemu` runs this file before anything is installed, so it needs nothing but the standard library.

Packages come from the mirror that the host's apt is configured with, through apt itself with a private root in
the cache: so proxies hold, signatures are checked, and the system stays as it is.  They are unpacked, not
installed; QEMU runs with its own loader and libraries.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

#: The first QEMU with vfio-user-pci.
MIN_QEMU = (10, 1)
#: Kernels that the tests run on, by the start of their version.
KERNELS = ("6.12", "7.2")
_SUITES = ("trixie", "trixie-backports")
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_MEND = "run scripts/get-qemu"


class ArtifactError(Exception):
    """Something is missing, or could not be got; one line, with what mends it."""


@dataclass(frozen=True)
class Qemu:
    """A QEMU that attaches vfio-user devices."""

    path: Path
    version: tuple[int, int, int]

    def __str__(self) -> str:
        return f"{self.path} ({'.'.join(map(str, self.version))})"


@dataclass(frozen=True)
class Kernel:
    """A guest kernel: its release (uname -r), image, and /lib/modules/RELEASE."""

    release: str
    image: Path
    modules: Path


def cache_dir() -> Path:
    """$XDG_CACHE_HOME/vmodel."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vmodel"


# ---- finding ---------------------------------------------------------------------------------------


def probe_qemu(path: Path) -> Qemu:
    """The QEMU at `path`.  ArtifactError: it does not run, is too old, or has no vfio-user-pci."""
    try:
        first = _run([path, "--version"], timeout=60).partition("\n")[0]
        match = re.search(r"version (\d+)\.(\d+)\.(\d+)", first)
        if match is None:
            raise ArtifactError(f"{path} does not look like QEMU: it says {first!r}")
        version = (int(match[1]), int(match[2]), int(match[3]))
        if version[:2] < MIN_QEMU:
            raise ArtifactError(f"{path} is QEMU {match[1]}.{match[2]}, older than 10.1: {_MEND}")
        if "vfio-user-pci" not in _run([path, "-device", "help"], timeout=60):
            raise ArtifactError(f"{path} was built without vfio-user-pci: {_MEND}")
    except OSError as error:
        raise ArtifactError(f"{path} cannot be run: {error.strerror}") from error
    return Qemu(path, version)


def find_qemu() -> Qemu:
    """$VMODEL_QEMU, else the one in PATH if it will do, else the cache's.  ArtifactError without one."""
    if named := os.environ.get("VMODEL_QEMU"):
        return probe_qemu(Path(named))
    found = shutil.which("qemu-system-x86_64")
    unfit = "no QEMU found"
    if found:
        try:
            return probe_qemu(Path(found))
        except ArtifactError as error:
            unfit = str(error).removesuffix(f": {_MEND}")
    cached = cache_dir() / "qemu" / "qemu-system-x86_64"
    if cached.exists():
        return probe_qemu(cached)
    raise ArtifactError(f"{unfit}: {_MEND}")


def find_kernels() -> dict[str, Kernel]:
    """The cache's kernels by short version, as "6.12"."""
    found = {}
    for short in KERNELS:
        home = cache_dir() / f"kernel-{short}"
        for image in sorted(home.glob("boot/vmlinuz-*")):
            release = image.name.removeprefix("vmlinuz-")
            found[short] = Kernel(release, image, home / "lib" / "modules" / release)
    return found


def find_kernel(name: str | None = None) -> Kernel:
    """A kernel by short version, or by the path of its image; None: the oldest of the cache.

    An image's modules are looked for beside it (../lib/modules/RELEASE) and in /lib/modules.
    """
    kernels = find_kernels()
    if name is None:
        if not kernels:
            raise ArtifactError(f"no guest kernel found: {_MEND}")
        return next(iter(kernels.values()))
    if name in kernels:
        return kernels[name]
    image = Path(name)
    if image.is_file():
        release = image.name.removeprefix("vmlinuz-")
        for root in (image.parent.parent, Path("/")):
            if (modules := root / "lib" / "modules" / release).is_dir():
                return Kernel(release, image, modules)
        raise ArtifactError(f"kernel {image}: no modules in lib/modules/{release} beside it or in /")
    known = ", ".join(kernels) or "none"
    raise ArtifactError(f"no kernel {name!r}: neither a file nor one of those fetched ({known}); {_MEND}")


def find_busybox() -> Path:
    """A static busybox."""
    cached = cache_dir() / "busybox" / "busybox"
    if cached.exists():
        return cached
    raise ArtifactError(f"no static busybox found: {_MEND}")


# ---- getting ---------------------------------------------------------------------------------------


def _run(command: Sequence[str | Path], *, timeout: float, cwd: Path | None = None) -> str:
    """Its output; ArtifactError with the last line of what it complained about."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"},
    )
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise ArtifactError(f"{Path(command[0]).name}: {lines[-1] if lines else f'status {done.returncode}'}")
    return done.stdout


def _mirror() -> str:
    """The Debian archive that the host's apt uses."""
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise ArtifactError(
            "this host has no apt: install QEMU 10.1 or newer by its own means, and name it in VMODEL_QEMU"
        )
    if not _KEYRING.exists():
        raise ArtifactError("Debian's keys are not here: apt-get install debian-archive-keyring")
    output = _run(["apt-get", "indextargets", "--format", "$(ORIGIN)|$(REPO_URI)", "Created-By: Packages"], timeout=60)
    candidates = list(dict.fromkeys(line.partition("|")[::2] for line in output.splitlines()))
    for origin, uri in candidates:
        # Before the first `apt-get update` the origin is not known; then the archive's usual path is.
        if (origin == "Debian" or not origin) and uri.rstrip("/").endswith("/debian"):
            return uri
    for origin, uri in candidates:
        if origin == "Debian" and "security" not in uri:
            return uri
    raise ArtifactError(
        "apt on this host knows no Debian archive: install QEMU 10.1 or newer and name it in VMODEL_QEMU"
    )


class _Apt:
    """apt with a root of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for part in ("state/lists/partial", "cache/archives/partial", "etc"):
            (root / part).mkdir(parents=True, exist_ok=True)
        (root / "status").touch()
        sources = "".join(f"deb [signed-by={_KEYRING}] {_mirror()} {suite} main\n" for suite in _SUITES)
        (root / "etc" / "sources.list").write_text(sources)
        # Read after the host's own configuration, whose proxies are wanted and whose hooks are not.
        (root / "apt.conf").write_text(
            f'Dir::State "{root}/state";\n'
            f'Dir::State::status "{root}/status";\n'
            f'Dir::Cache "{root}/cache";\n'
            f'Dir::Etc::sourcelist "{root}/etc/sources.list";\n'
            'Dir::Etc::sourceparts "/dev/null";\n'
            'Dir::Etc::preferencesparts "/dev/null";\n'
            'APT::Architecture "amd64";\n'
            'APT::Architectures { "amd64"; };\n'
            'APT::Sandbox::User "";\n'
            'APT::Install-Recommends "false";\n'
            'Acquire::Retries "3";\n'
            'Acquire::Languages "none";\n'
            "#clear APT::Update;\n#clear DPkg;\n"
        )

    def run(self, *args: str, timeout: float = 1200, cwd: Path | None = None) -> str:
        program, *rest = args
        return _run([program, "-c", self.root / "apt.conf", *rest], timeout=timeout, cwd=cwd)

    def with_dependencies(self, package: str, suite: str) -> list[Path]:
        """Downloads a package and all it needs; the files."""
        archives = self.root / "cache" / "archives"
        self.run("apt-get", "-y", "-q", "--download-only", "-t", suite, "install", package)
        return sorted(archives.glob("*.deb"))

    def alone(self, package: str, into: Path) -> Path:
        """Downloads one package, without what it depends on."""
        into.mkdir(parents=True, exist_ok=True)
        self.run("apt-get", "-q", "download", package, cwd=into)
        (found,) = into.glob("*.deb")
        return found

    def kernel_package(self, short: str) -> str:
        """The package of the newest kernel of a version."""
        for stanza in self.run("apt-cache", "show", "linux-image-amd64", timeout=60).split("\n\n"):
            match = re.search(rf"linux-image-{re.escape(short)}\.[\w.+~-]*-amd64", stanza)
            if match:
                return match[0]
        raise ArtifactError(f"Debian's {' and '.join(_SUITES)} have no kernel {short} (any more)")


_WRAPPER = """#!/bin/sh
# Runs Debian's QEMU with the loader and the libraries that were unpacked beside it.
here=$(dirname "$(readlink -f "$0")")
lib=$here/root/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="$lib/qemu"
exec "$lib/ld-linux-x86-64.so.2" --argv0 qemu-system-x86_64 --library-path "$lib" \\
    "$here/root/usr/bin/qemu-system-x86_64" \\
    -L "$here/root/usr/share/qemu" -L "$here/root/usr/share/seabios" -L "$here/root/usr/lib/ipxe/qemu" "$@"
"""


def _unpack(package: Path, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    _run(["dpkg-deb", "-x", package, into], timeout=600)


def _say(message: str) -> None:
    print(message, flush=True)


@contextlib.contextmanager
def _exclusive(cache: Path) -> Iterator[None]:
    """One fetch at a time: a second one waits, and then finds all there."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another fetch is under way: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _atomic(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` only when all of it is there."""
    work = target.with_name(f"{target.name}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        shutil.rmtree(target, ignore_errors=True)
        work.rename(target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _fetch_qemu(apt: _Apt, cache: Path) -> None:
    packages = apt.with_dependencies("qemu-system-x86", "trixie-backports")
    _say(f"unpacking {len(packages)} packages")
    with _atomic(cache / "qemu") as work:
        root = work / "root"
        # Debian's merged /usr, so that packages which still ship /lib land where the others do.
        for name in ("lib", "lib64", "bin", "sbin"):
            (root / "usr" / name).mkdir(parents=True)
            (root / name).symlink_to(f"usr/{name}")
        for package in packages:
            _unpack(package, root)
        for unneeded in ("share/doc", "share/man", "share/locale", "share/perl"):
            shutil.rmtree(root / "usr" / unneeded, ignore_errors=True)
        wrapper = work / "qemu-system-x86_64"
        wrapper.write_text(_WRAPPER)
        wrapper.chmod(0o755)
        _say(f"QEMU {'.'.join(map(str, probe_qemu(wrapper).version))}")
    for package in packages:
        package.unlink()


def _fetch_kernel(apt: _Apt, cache: Path, short: str) -> None:
    name = apt.kernel_package(short)
    _say(f"downloading {name}")
    with _atomic(cache / f"kernel-{short}") as work:
        package = apt.alone(name, work / "download")
        _unpack(package, work)
        # Since 6.19 or so image and modules are packages of their own, which this one only depends on.
        depends = _run(["dpkg-deb", "-f", package, "Depends"], timeout=60)
        for part in re.findall(r"linux-(?:binary|modules)-[\w.+~-]+", depends):
            _unpack(apt.alone(part, work / "download" / part), work)
        if not (work / "lib").exists():  # newer packages ship /usr/lib/modules
            (work / "lib").symlink_to("usr/lib")
        for image in list(work.glob("usr/lib/modules/*/vmlinuz")):
            (work / "boot").mkdir(exist_ok=True)
            image.rename(work / "boot" / f"vmlinuz-{image.parent.name}")
        if not any(work.glob("boot/vmlinuz-*")) or not any(work.glob("lib/modules/*/kernel")):
            raise ArtifactError(f"{name} is not laid out as expected: no image or no modules in it")
        shutil.rmtree(work / "download")


def _fetch_busybox(apt: _Apt, cache: Path) -> None:
    with _atomic(cache / "busybox") as work:
        _unpack(apt.alone("busybox-static", work / "download"), work / "root")
        (found,) = [p for p in (work / "root").rglob("busybox") if p.is_file() and os.access(p, os.X_OK)]
        shutil.copy2(found, work / "busybox")
        shutil.rmtree(work / "root")
        shutil.rmtree(work / "download")


def fetch(kernels: Sequence[str] = KERNELS) -> None:
    """Gets what is missing of QEMU, `kernels` and busybox; says what it does."""
    cache = cache_dir()
    with _exclusive(cache):
        missing = []
        try:
            _say(f"QEMU: {find_qemu()}")
        except ArtifactError as error:
            _say(f"QEMU: {error}".removesuffix(f": {_MEND}"))
            missing.append("qemu")
        have = find_kernels()
        for short in kernels:
            if short in have:
                _say(f"kernel {short}: {have[short].release}")
            else:
                missing.append(short)
        if not (cache / "busybox" / "busybox").exists():
            missing.append("busybox")
        if not missing:
            return
        _say(f"getting Debian's packages of {', '.join(missing)} into {cache}")
        apt = _Apt(cache / "apt")
        apt.run("apt-get", "-q", "update", timeout=600)
        for what in missing:
            if what == "qemu":
                _say("downloading QEMU and its libraries")
                _fetch_qemu(apt, cache)
            elif what == "busybox":
                _say("downloading busybox")
                _fetch_busybox(apt, cache)
            else:
                _fetch_kernel(apt, cache, what)
        _say("done")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of scripts/get-qemu."""
    parser = argparse.ArgumentParser(
        prog="get-qemu",
        description="Finds QEMU >= 10.1, guest kernels and busybox, or gets Debian's packages into the cache.",
    )
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="only this one (default: all)")
    parser.add_argument("--print", action="store_true", help="get nothing, print what is there as JSON")
    options = parser.parse_args(argv)
    try:
        if options.print:
            found = {"kernels": {k: str(v.image) for k, v in find_kernels().items()}}
            try:
                found["qemu"] = str(find_qemu().path)  # type: ignore[assignment]
            except ArtifactError as error:
                found["missing"] = str(error)  # type: ignore[assignment]
            print(json.dumps(found, indent=2))
        else:
            fetch(options.kernel or KERNELS)
    except (ArtifactError, subprocess.TimeoutExpired, OSError) as error:
        print(f"get-qemu: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("get-qemu: interrupted; nothing half-done is left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
