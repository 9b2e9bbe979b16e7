"""scripts/get-qemu: fetches QEMU >= 10.1, Debian kernels and a static busybox into the cache folder."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmodel.guest.artifacts import (
    CLOUD,
    DEBUG,
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
    find_source,
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
    unpack_source,
)
from vmodel.guest.debug_symbols import (
    MODULE_NAME,
    check_modules,
    debug_file,
    debug_names,
    has_module,
    missing_debug,
    pick_debug,
)
from vmodel.guest.headers import Headers, find_headers, gcc_packages, unpack_gcc, unpack_headers
from vmodel.guest.programs import unpack_tool
from vmodel.guest.streamed import Download, opener
from vmodel.guest.tools import PACKAGE_NAME, find_tool
from vmodel.interrupts import interruptible

#: Parts that are fetched on request only, and the function that finds each.
OPTIONAL = {"iasl": find_iasl, "browser": find_browser, "clang": find_clang}
#: Linux's source, which is fetched for scripts/build-kernel only.
SOURCE = "source"
_FIND = {**OPTIONAL, SOURCE: find_source}
#: The packages whose programs our tests run in guests.
TEST_TOOLS = ("e2fsprogs", "fdisk", "fio", "nvme-cli", "pciutils", "util-linux")
#: Seconds between lines with the state of a step, where there is no terminal.
_QUIET = 300.0


class Steps:
    """Progress as text: one line for each completed step, and the state of the running one.

    A terminal shows the state as it is; anything else gets a line with it every five minutes.
    """

    def __init__(self, out: Callable[[str], object] | None = None, terminal: bool | None = None) -> None:
        self._out = out or sys.stderr.write
        self._terminal = sys.stderr.isatty() if terminal is None else terminal

    @contextlib.contextmanager
    def step(self, what: str) -> Iterator[Callable[[str], None]]:
        """A step, as a context manager; yields a function that shows the step's state, such as "12 of 38 MB"."""
        start = last = time.monotonic()
        state = ""

        def show(now: str) -> None:
            nonlocal state, last
            state = f" {now}"
            if self._terminal:
                self._out(f"\r\033[K{what} ...{state}")
            elif time.monotonic() - last > _QUIET:
                last = time.monotonic()
                self._out(f"{what} ...{state}\n")

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
    headers: Collection[str] = (),
    tools: Collection[str] = (),
    symbols: Collection[str] = (),
    steps: Steps | None = None,
) -> None:
    """Fetches what is missing in the cache: QEMU (unless the host's is suitable), busybox, kernels by role or version.

    `optional`: more parts, of OPTIONAL or SOURCE.  `headers`: the kernels for which modules are to be built.  The debug
    kernel is not fetched: it must be there, which has its headers, too.  `tools`: packages with programs for guests.
    `symbols`: modules of these kernels whose debug information is wanted.
    `mirror`: a URI; by default that of the host's apt.  `refresh`: also fetches parts of the cache again if the archive
    has other packages now, or if a file is missing.  `dry_run`: fetches package lists only, and prints what else would
    be fetched.
    Nothing is downloaded if nothing is missing.  A second call, in any process, waits for the first.  ArtifactError.
    """
    steps = steps or Steps()
    cache = cache_dir()
    if DEBUG in (*kernels, *headers, tools):
        check_modules(find_kernel(DEBUG), symbols)
        kernels, headers = ([name for name in names if name != DEBUG] for names in (kernels, headers))
    if not missing_parts(kernels, refresh, optional, headers, tools, symbols):
        return
    if re.search(r"[:;]", str(cache)):
        raise ArtifactError("a cache folder with ':' or ';' in its path cannot hold libraries; set XDG_CACHE_HOME")
    cache.mkdir(parents=True, exist_ok=True)
    with _locked(cache / "lock", steps):
        for left in cache.glob("tmp-*"):  # of a run that was killed; the holder of the lock owns all of them
            shutil.rmtree(left, ignore_errors=True)
        # Again: another run may have fetched them meanwhile.
        parts = missing_parts(kernels, refresh, optional, headers, tools, symbols)
        if parts:
            keyring = check_host()
            with tempfile.TemporaryDirectory(prefix="tmp-", dir=cache, ignore_cleanup_errors=True) as work:
                _fetch_parts(parts, Path(work), mirror or host_mirror(), keyring, steps, dry_run, symbols)


def missing_parts(
    kernels: Sequence[str],
    refresh: bool = False,
    optional: Collection[str] = (),
    headers: Collection[str] = (),
    tools: Collection[str] = (),
    symbols: Collection[str] = (),
) -> list[str]:
    """The names of the cache's folders that must be fetched.  ArtifactError: a kernel has no module of `symbols`."""
    missing = [] if read_stamp(cache_dir() / "busybox") and not refresh else ["busybox"]
    missing += [f"kernel-{name}" for name in dict.fromkeys(kernels) if refresh or not _has(find_kernel, name)]
    missing += [f"headers-{name}" for name in dict.fromkeys(headers) if refresh or not _has(_headers_of, name)]
    missing += [f"tool-{name}" for name in dict.fromkeys(tools) if refresh or not _has(find_tool, name)]
    missing += [
        f"debug-{name}" for name in dict.fromkeys(kernels) if missing_debug(name, symbols) or (refresh and symbols)
    ]
    missing += [part for part in optional if refresh or not _has(_FIND[part])]
    try:
        suitable = (None if refresh else cached_qemu()) or host_qemu()
    except ArtifactError:
        suitable = None
    return missing if suitable else ["qemu", *missing]


def _headers_of(name: str) -> Headers:
    return find_headers(find_kernel(name))


def _has(find: Callable[..., object], *arguments: object) -> bool:
    try:
        find(*arguments)
    except ArtifactError:
        return False
    return True


def _is_current(part: str, packages: str, symbols: Collection[str] = ()) -> bool:
    """Whether a part was made of these packages, and its main files still exist, with those of `symbols`."""
    stamp, folder = read_stamp(cache_dir() / part), cache_dir() / part
    if stamp.get("packages") != packages:
        return False
    if part == "qemu":
        return _has(probe_qemu, folder / "qemu-system-x86_64")
    if part.startswith("kernel-"):
        release = stamp.get("release", "")
        return (folder / f"boot/vmlinuz-{release}").is_file() and (folder / "lib/modules" / release).is_dir()
    if part.startswith("debug-"):
        return not missing_debug(part.removeprefix("debug-"), symbols)
    return any(path.name != "stamp.json" for path in folder.iterdir())


@dataclass
class _Part:
    """One folder of the cache that is to be made: from which packages, and how."""

    name: str
    #: Packages that come with all that they depend on, and packages that come alone.
    install: list[str] = field(default_factory=list)
    download: list[str] = field(default_factory=list)
    #: Unpacks package files into a folder; returns what the stamp says beside the names of these files.
    unpack: Callable[[Sequence[Path], Path], dict[str, str]] = lambda debs, folder: {}
    #: For people, behind the name.
    note: str = ""
    #: Makes the part from a package that is not stored: fills a folder, and shows its state meanwhile.
    stream: Callable[[Path, Callable[[str], None]], dict[str, str]] | None = None
    #: Names and bytes of the package files.
    files: dict[str, int] = field(default_factory=dict)


def _unpack_busybox(debs: Sequence[Path], folder: Path) -> dict[str, str]:
    for deb in debs:
        unpack(deb, folder, lambda name: "busybox" if name in ("bin/busybox", "usr/bin/busybox") else None)
    return {}


def _unpack_source(debs: Sequence[Path], folder: Path) -> dict[str, str]:
    for deb in debs:
        unpack_source(deb, folder / "linux")
    return {}


def _versioned(unpack: Callable[[Sequence[Path], Path], str]) -> Callable[[Sequence[Path], Path], dict[str, str]]:
    return lambda debs, folder: {"version": unpack(debs, folder)}


#: Debian's packages of the parts that are the same for all kernels, and what unpacks each.
_FIXED = {
    "qemu": ([QEMU_PACKAGE], _versioned(unpack_qemu)),
    "busybox": ([BUSYBOX_PACKAGE], _unpack_busybox),
    "iasl": ([IASL_PACKAGE], _versioned(unpack_iasl)),
    "browser": ([BROWSER_PACKAGE], _versioned(unpack_browser)),
    "clang": (list(CLANG_PACKAGES), _versioned(unpack_clang)),
}


def _kernel_part(name: str, apt: Apt) -> _Part:
    release, packages = apt.kernel_packages(name)

    def unpacked(debs: Sequence[Path], folder: Path) -> dict[str, str]:
        unpack_kernel(debs, folder, release)
        return {"release": release}

    return _Part(f"kernel-{name}", [], packages, unpacked, f" ({release})")


def _headers_parts(name: str, release: str, apt: Apt) -> list[_Part]:
    """The headers of a kernel, and its compiler."""
    packages, compiler = apt.header_packages(release)
    gcc, headers = cache_dir() / f"gcc-{compiler}", cache_dir() / f"headers-{name}"

    def unpacked(debs: Sequence[Path], folder: Path) -> dict[str, str]:
        unpack_headers(debs, folder, headers, release, gcc)
        return {"release": release, "compiler": compiler, "folder": str(headers)}

    def unpacked_gcc(debs: Sequence[Path], folder: Path) -> dict[str, str]:
        unpack_gcc(debs, folder, gcc, compiler)
        return {"version": compiler, "folder": str(gcc)}

    return [
        _Part(gcc.name, gcc_packages(compiler), [], unpacked_gcc),
        _Part(headers.name, [], packages, unpacked, f" ({release})"),
    ]


def _tool_part(package: str, apt: Apt) -> _Part:
    """The programs of a package.  ArtifactError: the archive has no such package."""
    apt.check_package(package)

    def unpacked(debs: Sequence[Path], folder: Path) -> dict[str, str]:
        unpack_tool(debs, folder, package)
        return {}

    return _Part(f"tool-{package}", [package], [], unpacked)


def _symbols_part(name: str, release: str, apt: Apt, symbols: Collection[str]) -> _Part:
    """The debug information of modules; what the cache has for the same package already is kept."""
    remote, part = apt.debug_package(release), cache_dir() / f"debug-{name}"

    def stream(folder: Path, show: Callable[[str], None]) -> dict[str, str]:
        kernel = find_kernel(name)
        check_modules(kernel, symbols)  # of a kernel that was fetched only now
        with contextlib.closing(Download(remote, opener(transport()), show)) as download:
            kept = [module for module in debug_names(part) if has_module(kernel, module)]
            pick_debug(download, folder, release, {*symbols, *kept})
        return {"release": release}

    return _Part(part.name, note=f" ({release})", stream=stream, files={remote.name: remote.size})


def _parts(names: Sequence[str], apt: Apt, symbols: Collection[str]) -> list[_Part]:
    """What these parts are made of, as the archive has it now; without those that are there already."""
    found: dict[str, _Part] = {}
    for name in names:
        kind, _, which = name.partition("-")
        if name in _FIXED:
            packages, unpack = _FIXED[name]
            new = [_Part(name, packages, [], unpack)]
        elif name == SOURCE:
            new = [_Part(name, [], [apt.source_package()], _unpack_source)]
        elif kind == "kernel":
            new = [_kernel_part(which, apt)]
        elif kind == "tool":
            new = [_tool_part(which, apt)]
        else:
            # A kernel that is fetched now may be another than the one that is there.
            fetched = f"kernel-{which}" in names
            release = apt.kernel_packages(which)[0] if fetched else find_kernel(which).release
            new = (
                _headers_parts(which, release, apt)
                if kind == "headers"
                else [_symbols_part(which, release, apt, symbols)]
            )
        found |= {part.name: part for part in new if part.name not in found}
    for part in found.values():
        if not part.stream:
            part.files = apt.install_files(part.install) if part.install else apt.files(part.download)
    return list(found.values())


def _fetch_parts(
    names: Sequence[str],
    work: Path,
    mirror: str,
    keyring: Path,
    steps: Steps,
    dry_run: bool = False,
    symbols: Collection[str] = (),
) -> None:
    apt = Apt(work / "apt", mirror, keyring, transport())
    with steps.step(f"package lists of {SUITE} and {BACKPORTS}"):
        apt.update()

    parts = []
    for part in _parts(names, apt, symbols):
        if _is_current(part.name, " ".join(part.files), symbols):
            steps.note(f"{part.name}{part.note}: up to date")
        else:
            few = ", of which a few are kept" if part.stream else ""
            steps.note(f"{part.name}{part.note}: to be fetched, {sum(part.files.values()) / 1e6:.0f} MB{few}")
            parts.append(part)
    if dry_run or not parts:
        return

    _download([part for part in parts if not part.stream], apt, steps)
    for part in parts:
        folder = work / part.name
        folder.mkdir()
        with steps.step(f"{'download of' if part.stream else 'unpacking'} {part.name}") as show:
            if part.stream:
                facts = part.stream(folder, show)
            else:
                facts = part.unpack([apt.archives / name for name in part.files], folder)
            stamp = {"packages": " ".join(part.files), **facts}
            (folder / "stamp.json").write_text(json.dumps(stamp, indent=1) + "\n")
            target = cache_dir() / part.name
            if target.exists():
                target.rename(work / f"old-{part.name}")
            folder.rename(target)


def _download(parts: Sequence[_Part], apt: Apt, steps: Steps) -> None:
    """Downloads the packages of these parts into apt's folder."""
    sizes = {name: size for part in parts for name, size in part.files.items()}
    if not sizes:
        return
    total = sum(sizes.values()) / 1e6
    with steps.step(f"download of {len(sizes)} packages") as show:

        def tick() -> None:
            got = sum(path.stat().st_size for path in apt.archives.rglob("*.deb") if path.is_file()) / 1e6
            show(f"{got:.0f} of {total:.0f} MB")

        if install := [package for part in parts for package in part.install]:
            apt.install(install, tick)
        if download := [package for part in parts for package in part.download]:
            apt.download(download, tick)
        show(f"{total:.0f} MB")


@contextlib.contextmanager
def _locked(path: Path, steps: Steps) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            steps.note("waiting for another get-qemu")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def paths(
    kernels: Sequence[str],
    optional: Collection[str] = (),
    tools: Collection[str] = (),
    symbols: Collection[str] = (),
) -> dict[str, str]:
    """The output of `--print`: qemu, qemu-version, busybox, [iasl, browser, clang, tool-PACKAGE,] kernel-NAME,
    modules-NAME[, debug-NAME-MODULE].

    ArtifactError: a part is missing.
    """
    qemu = find_qemu()
    rows = {
        "qemu": str(qemu.path),
        "qemu-version": ".".join(map(str, qemu.version)),
        "busybox": str(find_busybox()),
    }
    rows |= {part: str(OPTIONAL[part]()) for part in optional}
    rows |= {f"tool-{package}": str(find_tool(package)) for package in tools}
    for name in kernels:
        kernel = find_kernel(name)
        rows |= {f"kernel-{name}": str(kernel.image), f"modules-{name}": str(kernel.modules)}
        check_modules(kernel, symbols)
        rows |= {f"debug-{name}-{module}": str(debug_file(kernel, module)) for module in symbols}
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
    parser.add_argument(
        "--headers", action="store_true", help="also fetch what modules for these kernels are built with"
    )
    parser.add_argument("--iasl", action="store_true", help="also fetch ACPICA's iasl, which only tests need")
    parser.add_argument(
        "--tool",
        action="append",
        default=[],
        metavar="PACKAGE",
        help="also fetch the programs of a Debian package for guests, as nvme-cli; repeatable",
    )
    parser.add_argument(
        "--debug-symbols",
        action="append",
        default=[],
        metavar="MODULE",
        help="also fetch the debug information of a module of these kernels, as nvme, or of vmlinux: about 1 GB is"
        " downloaded for each kernel, and a few MB are kept; repeatable",
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
    tools: list[str] = list(dict.fromkeys([*options.tool, *(TEST_TOOLS if options.all else ())]))
    for name in tools:
        if not PACKAGE_NAME.fullmatch(name):
            parser.error(f"--tool {name!r}: must be the name of a Debian package, such as nvme-cli")
    symbols: list[str] = list(dict.fromkeys(options.debug_symbols))
    for name in symbols:
        if not MODULE_NAME.fullmatch(name):
            parser.error(f"--debug-symbols {name!r}: must be the name of a kernel module, such as nvme, or vmlinux")
    for name in kernels:
        if not KERNEL_NAME.fullmatch(name):
            parser.error(f"--kernel {name!r}: must be {', '.join(ROLES)}, or a version such as 6.12")

    try:
        with interruptible():
            return _carry_out(options, kernels, optional, tools, symbols)
    except ArtifactError as error:
        print(f"get-qemu: {error}", file=sys.stderr)
        return 1
    except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
        print(f"get-qemu: {error}; no incomplete part is in the cache", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("get-qemu: interrupted; no incomplete part is in the cache", file=sys.stderr)
        return 130


def _carry_out(
    options: argparse.Namespace,
    kernels: Sequence[str],
    optional: Sequence[str],
    tools: Sequence[str],
    symbols: Sequence[str],
) -> int:
    if not options.print:
        fetch(
            kernels,
            mirror=options.mirror,
            refresh=options.refresh,
            dry_run=options.dry_run,
            optional=optional,
            headers=kernels if options.headers else KERNELS if options.all else (),
            tools=tools,
            symbols=symbols,
        )
    if options.dry_run:
        return 0
    found = paths(kernels, optional, tools, symbols)
    if options.print:
        for key, value in found.items():
            print(f"{key}={value}")
    else:
        releases = ", ".join(find_kernel(name).release for name in kernels)
        print(f"get-qemu: QEMU {found['qemu-version']} at {found['qemu']}; kernels {releases}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
