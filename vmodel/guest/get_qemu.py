"""scripts/get-qemu: fetches QEMU >= 10.1, Debian kernels and a static busybox into the cache folder."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import FrameType

from vmodel.guest.artifacts import (
    CLOUD,
    KERNEL_NAME,
    KERNELS,
    ROLES,
    ArtifactError,
    cache_dir,
    cached_qemu,
    find_browser,
    find_busybox,
    find_clang,
    find_iasl,
    find_kernel,
    find_qemu,
    host_qemu,
    probe_qemu,
    read_stamp,
)
from vmodel.guest.debian import (
    BACKPORTS,
    BROWSER_PACKAGE,
    BUSYBOX_PACKAGE,
    CLANG_PACKAGES,
    IASL_PACKAGE,
    QEMU_PACKAGE,
    SUITE,
    Apt,
    check_host,
    host_mirror,
    transport,
    unpack,
    unpack_browser,
    unpack_clang,
    unpack_iasl,
    unpack_kernel,
    unpack_qemu,
    unpack_tools,
)
from vmodel.guest.tools import TOOLS, find_tools

#: Parts that are fetched on request only, and the function that finds each.
OPTIONAL = {"iasl": find_iasl, "tools": find_tools, "browser": find_browser, "clang": find_clang}
#: Debian's packages of parts other than kernels.
PACKAGES = {
    "qemu": [QEMU_PACKAGE],
    "busybox": [BUSYBOX_PACKAGE],
    "iasl": [IASL_PACKAGE],
    "tools": list(TOOLS),
    "browser": [BROWSER_PACKAGE],
    "clang": list(CLANG_PACKAGES),
}


class Steps:
    """Progress as text: one line for each completed step, and in a terminal the state of the running one."""

    def __init__(self, out: Callable[[str], object] | None = None, terminal: bool | None = None) -> None:
        self._out = out or sys.stderr.write
        self._terminal = sys.stderr.isatty() if terminal is None else terminal

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[Callable[[str], None]]:
        """A step, as a context manager; yields a function that shows the step's state, such as "12 of 38 MB"."""
        start = time.monotonic()
        state = ""

        def show(now: str) -> None:
            nonlocal state
            state = f" {now}"
            if self._terminal:
                self._out(f"\r\033[K{what} ...{state}")

        if self._terminal:
            self._out(f"{what} ...")
        try:
            yield show
        except BaseException:
            if self._terminal:
                self._out("\r\033[K")
            raise
        self._out(
            f"{chr(13) + chr(27) + '[K' if self._terminal else ''}{what}:{state or ' done'},"
            f" {time.monotonic() - start:.1f} s\n"
        )

    def note(self, text: str) -> None:
        """Prints a line."""
        self._out(f"{text}\n")


def fetch(
    kernels: Sequence[str] = KERNELS,
    *,
    mirror: str | None = None,
    refresh: bool = False,
    dry_run: bool = False,
    optional: Collection[str] = (),
    steps: Steps | None = None,
) -> None:
    """Fetches what is missing in the cache: QEMU (unless the host's is suitable), busybox, kernels by role or version.

    `optional`: more parts, of OPTIONAL.  `mirror`: a URI; by default that of the host's apt.  `refresh`: also fetches
    parts of the cache again if the archive has other packages now, or if a file is missing.  `dry_run`: fetches package
    lists only, and prints what else would be fetched.
    Nothing is downloaded if nothing is missing.  A second call, in any process, waits for the first.  ArtifactError.
    """
    steps = steps or Steps()
    cache = cache_dir()
    if not missing_parts(kernels, refresh, optional):
        return
    if re.search(r"[:;]", str(cache)):
        raise ArtifactError("a cache folder with ':' or ';' in its path cannot hold libraries; set XDG_CACHE_HOME")
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock", steps):
        for left in cache.glob("tmp-*"):  # of a run that was killed; the holder of the lock owns all of them
            shutil.rmtree(left, ignore_errors=True)
        parts = missing_parts(kernels, refresh, optional)  # again: another run may have fetched them meanwhile
        if parts:
            keyring = check_host()
            with tempfile.TemporaryDirectory(prefix="tmp-", dir=cache, ignore_cleanup_errors=True) as work:
                _fetch_parts(parts, Path(work), mirror or host_mirror(), keyring, steps, dry_run)


def missing_parts(kernels: Sequence[str], refresh: bool = False, optional: Collection[str] = ()) -> list[str]:
    """The names of the cache's folders that must be fetched."""
    missing = [] if read_stamp(cache_dir() / "busybox") and not refresh else ["busybox"]
    missing += [f"kernel-{name}" for name in dict.fromkeys(kernels) if refresh or not _has(find_kernel, name)]
    missing += [part for part in optional if refresh or not _has(OPTIONAL[part])]
    try:
        suitable = (None if refresh else cached_qemu()) or host_qemu()
    except ArtifactError:
        suitable = None
    return missing if suitable else ["qemu", *missing]


def _has(find: Callable[..., object], *arguments: object) -> bool:
    try:
        find(*arguments)
    except ArtifactError:
        return False
    return True


def _is_current(part: str, packages: str) -> bool:
    """Whether a part was made of these packages, and its main files still exist."""
    stamp, folder = read_stamp(cache_dir() / part), cache_dir() / part
    if stamp.get("packages") != packages:
        return False
    if part == "qemu":
        return _has(probe_qemu, folder / "qemu-system-x86_64")
    if release := stamp.get("release"):
        return (folder / f"boot/vmlinuz-{release}").is_file() and (folder / "lib/modules" / release).is_dir()
    return any(path.name != "stamp.json" for path in folder.iterdir())


def _fetch_parts(
    parts: Sequence[str], work: Path, mirror: str, keyring: Path, steps: Steps, dry_run: bool = False
) -> None:
    apt = Apt(work / "apt", mirror, keyring, transport())
    with steps.step(f"package lists of {SUITE} and {BACKPORTS}"):
        apt.update()

    releases: dict[str, str] = {}
    files: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    downloads: list[str] = []
    for part in parts:
        packages: list[str] = []
        if part in PACKAGES:
            found = apt.install_files(PACKAGES[part])
        else:
            releases[part], packages = apt.kernel_packages(part.removeprefix("kernel-"))
            found = apt.files(packages)
        what = f"{part}{f' ({releases[part]})' if part in releases else ''}"
        if _is_current(part, " ".join(found)):
            steps.note(f"{what}: up to date")
            continue
        steps.note(f"{what}: to be fetched, {sum(found.values()) / 1e6:.0f} MB")
        downloads += packages
        files[part] = list(found)
        sizes |= found
    parts = list(files)
    if dry_run or not parts:
        return

    total = sum(sizes.values()) / 1e6
    with steps.step(f"download of {len(sizes)} packages") as show:

        def tick() -> None:
            got = sum(path.stat().st_size for path in apt.archives.rglob("*.deb") if path.is_file()) / 1e6
            show(f"{got:.0f} of {total:.0f} MB")

        if install := [package for part in parts for package in PACKAGES.get(part, ())]:
            apt.install(install, tick)
        if downloads:
            apt.download(downloads, tick)
        show(f"{total:.0f} MB")

    for part in parts:
        folder = work / part
        folder.mkdir()
        with steps.step(f"unpacking {part}"):
            debs = [apt.archives / name for name in files[part]]
            facts = {"packages": " ".join(files[part])}
            if part == "qemu":
                facts["version"] = unpack_qemu(debs, folder)
            elif part == "iasl":
                facts["version"] = unpack_iasl(debs, folder)
            elif part == "browser":
                facts["version"] = unpack_browser(debs, folder)
            elif part == "clang":
                facts["version"] = unpack_clang(debs, folder)
            elif part == "tools":
                unpack_tools(debs, folder)
            elif part == "busybox":
                for deb in debs:
                    unpack(deb, folder, lambda name: "busybox" if name in ("bin/busybox", "usr/bin/busybox") else None)
            else:
                facts["release"] = releases[part]
                unpack_kernel(debs, folder, releases[part])
            (folder / "stamp.json").write_text(json.dumps(facts, indent=1) + "\n")
            target = cache_dir() / part
            if target.exists():
                target.rename(work / f"old-{part}")
            folder.rename(target)


@contextlib.contextmanager
def _locked(path: Path, steps: Steps) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            steps.note("waiting for another get-qemu")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def paths(kernels: Sequence[str], optional: Collection[str] = ()) -> dict[str, str]:
    """The output of `--print`: qemu, qemu-version, busybox, [iasl, tools, browser, clang,] kernel-NAME, modules-NAME.

    ArtifactError: a part is missing.
    """
    qemu = find_qemu()
    rows = {
        "qemu": str(qemu.path),
        "qemu-version": ".".join(map(str, qemu.version)),
        "busybox": str(find_busybox()),
    }
    rows |= {part: str(OPTIONAL[part]()) for part in optional}
    for name in kernels:
        kernel = find_kernel(name)
        rows |= {f"kernel-{name}": str(kernel.image), f"modules-{name}": str(kernel.modules)}
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs scripts/get-qemu; returns the exit status.  Messages go to stderr, paths to stdout."""
    parser = argparse.ArgumentParser(
        prog="get-qemu",
        description="Fetch QEMU >= 10.1, Debian kernels and a static busybox into the cache folder, without root and "
        "without changes to the system. A suitable QEMU of the host is used instead. A second run downloads nothing.",
    )
    parser.add_argument(
        "--kernel",
        action="append",
        metavar="NAME",
        help=f"a kernel to fetch: {', '.join(ROLES)}, or a version; repeatable; default {' '.join(KERNELS)}",
    )
    parser.add_argument("--iasl", action="store_true", help="also fetch ACPICA's iasl, which only tests need")
    parser.add_argument(
        "--tools", action="store_true", help="also fetch programs for guests: nvme, fio, mkfs.ext4, ..."
    )
    parser.add_argument("--browser", action="store_true", help="also fetch Chromium, which only tests need")
    parser.add_argument("--clang", action="store_true", help="also fetch clang for fuzz targets, which only tests need")
    parser.add_argument("--all", action="store_true", help="fetch everything that the tests need")
    parser.add_argument("--print", action="store_true", help="fetch nothing; print NAME=PATH for each part")
    parser.add_argument(
        "--mirror", metavar="URI", help="a mirror of Debian's archive; default: that of this host's apt"
    )
    parser.add_argument("--refresh", action="store_true", help="also fetch parts that are newer in the archive")
    parser.add_argument("--dry-run", action="store_true", help="print what would be fetched, and its size")
    options = parser.parse_args(argv)
    kernels: list[str] = options.kernel or list(KERNELS)
    if options.all:
        kernels = list(dict.fromkeys([*(options.kernel or ()), *KERNELS, CLOUD]))
    optional = [part for part in OPTIONAL if options.all or getattr(options, part)]
    for name in kernels:
        if not KERNEL_NAME.fullmatch(name):
            parser.error(f"--kernel {name!r}: must be {', '.join(ROLES)}, or a version such as 6.12")

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)  # so that SIGTERM, too, removes the temporary folder
    try:
        if not options.print:
            fetch(kernels, mirror=options.mirror, refresh=options.refresh, dry_run=options.dry_run, optional=optional)
        if options.dry_run:
            return 0
        found = paths(kernels, optional)
        if options.print:
            for key, value in found.items():
                print(f"{key}={value}")
        else:
            releases = ", ".join(find_kernel(name).release for name in kernels)
            print(f"get-qemu: QEMU {found['qemu-version']} at {found['qemu']}; kernels {releases}", file=sys.stderr)
    except ArtifactError as error:
        print(f"get-qemu: {error}", file=sys.stderr)
        return 1
    except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
        print(f"get-qemu: {error}; no incomplete part is in the cache", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("get-qemu: interrupted; no incomplete part is in the cache", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
