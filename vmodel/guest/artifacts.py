"""The places of QEMU, guest kernels and busybox.  `scripts/get-qemu` fetches them.

The cache, `${XDG_CACHE_HOME:-~/.cache}/vmodel`, has one folder for each part.  A part is prepared elsewhere, its
`stamp.json` is written last, and the folder is renamed into the cache: so a part is complete or absent.

    qemu/          qemu-system-x86_64 (wrapper), root/ (from Debian's packages, with every library that it needs)
    busybox/       busybox (static)
    iasl/          iasl (wrapper), root/ (as for qemu); for the tests only
    tool-fio/      root/: the programs of Debian's package fio for guests, see tools.py; optional
    browser/       chromium-headless-shell (wrapper), root/ (as for qemu); for the tests only
    clang/         clang (wrapper), root/ (with headers, too), bin/: ld, addr2line; for the tests only
    kernel-stable/ boot/vmlinuz-RELEASE, boot/config-RELEASE, lib/modules/RELEASE/; the stamp has the RELEASE
    kernel-backports/, kernel-cloud/: the same for the other roles; kernel-6.6/: for a requested version
    headers-stable/, gcc-14/: what modules for a kernel are built with, see headers.py; optional
    debug-stable/  modules/: debug information of some modules, see debug_symbols.py; optional
    kernel-debug/, headers-debug/: the debug kernel, which scripts/build-kernel builds
    source/        linux/: Linux's source, while that is being built

A kernel is named by its role in Debian's archive, as releases come and go there, or by the start of its version, which
selects any kernel in the cache whose release begins with it, in whatever folder.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vmodel.errors import ConfigError
from vmodel.files import cache_dir as cache_dir
from vmodel.patience import patience

#: The command that fetches missing parts; errors that it fixes name it.  An installed wheel has no scripts/.
FETCH_COMMAND = (
    "scripts/get-qemu"
    if (Path(__file__).parents[2] / "scripts" / "get-qemu").exists()
    else "python -m vmodel.guest.get_qemu"
)
#: The command that builds the debug kernel.
BUILD_COMMAND = FETCH_COMMAND.replace("get-qemu", "build-kernel").replace("get_qemu", "build_kernel")
#: The first QEMU with vfio-user-pci.
MIN_QEMU = (10, 1)
#: Roles of kernels: Debian stable's, the newest of its backports, and stable's for virtual machines (fewer drivers).
STABLE, NEWEST, CLOUD = ROLES = ("stable", "backports", "cloud")
#: The kernels that are fetched by default.
KERNELS = (STABLE, NEWEST)
#: The kernel that is built and not fetched, with options that find bugs of drivers; and the end of its release.
DEBUG = "debug"
DEBUG_RELEASE = "-vmodel-debug"
#: Names of kernels that are no versions.
NAMES = (*ROLES, DEBUG)
#: How a kernel may be named, other than by a path: one of those names, or the start of a version.
KERNEL_NAME = re.compile(rf"{'|'.join(NAMES)}|\d+(\.\d+)+(-cloud)?")
#: The same as text for `--help`.
KERNEL_HELP = "stable, backports, cloud, debug, a version, or a vmlinuz's path."


class ArtifactError(ConfigError):
    """A part that a guest needs is missing, or could not be fetched.  The text is one line, with what to do."""


@dataclass(frozen=True)
class Qemu:
    """A QEMU that has vfio-user-pci: its path, and its version, such as (11, 1, 3)."""

    path: Path
    version: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.path} ({'.'.join(map(str, self.version))})"


@dataclass(frozen=True)
class Kernel:
    """A guest kernel: its release (`uname -r`), its bzImage, and lib/modules/RELEASE; None if it has no modules."""

    release: str
    image: Path
    modules: Path | None

    @property
    def version(self) -> tuple[int, int]:
        """(major, minor) of its release.  Code that depends on the kernel compares this, never a name."""
        numbers = re.match(r"(\d+)\.(\d+)", self.release)
        return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def parse_qemu_version(text: str) -> tuple[int, ...]:
    """The version in the output of `qemu --version`, such as (11, 1, 3); () where there is none."""
    found = re.search(r"version (\d+(?:\.\d+)+)", text)
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def probe_qemu(path: Path) -> Qemu:
    """The QEMU at `path`.  ArtifactError: it does not run, is too old, or has no vfio-user-pci."""
    try:
        said = output([str(path), "--version"])
        version = parse_qemu_version(said)
        if not version:
            raise ArtifactError(f"{path} does not look like QEMU, it prints {said[:80]!r}; run {FETCH_COMMAND}")
        if version < MIN_QEMU:
            raise ArtifactError(f"{path} is QEMU {'.'.join(map(str, version))}, older than 10.1; run {FETCH_COMMAND}")
        if "vfio-user-pci" not in output([str(path), "-device", "help"]):
            raise ArtifactError(f"{path} was built without vfio-user-pci; run {FETCH_COMMAND}")
    except OSError as error:
        raise ArtifactError(f"{path} cannot be run ({error.strerror}); run {FETCH_COMMAND}") from None
    except subprocess.SubprocessError as error:
        raise ArtifactError(f"{path} does not run ({error}); run {FETCH_COMMAND}") from None
    return Qemu(path, version)


def find_qemu() -> Qemu:
    """The QEMU of guests: $VMODEL_QEMU, else the one in PATH if it is suitable, else the cache's.  ArtifactError.

    An unsuitable $VMODEL_QEMU is an error: another QEMU in its place would hide the user's mistake.
    """
    if chosen := os.environ.get("VMODEL_QEMU"):
        return probe_qemu(Path(chosen).absolute())
    unfit = "no QEMU found"
    try:
        if host := host_qemu():
            return host
    except ArtifactError as error:
        unfit = str(error).removesuffix(f"; run {FETCH_COMMAND}")
    if cached := cached_qemu():
        return cached
    raise ArtifactError(f"{unfit}; run {FETCH_COMMAND}")


def find_busybox() -> Path:
    """A static busybox: $VMODEL_BUSYBOX, else the cache's.  ArtifactError: there is none."""
    if chosen := os.environ.get("VMODEL_BUSYBOX"):
        if not Path(chosen).is_file():
            raise ArtifactError(f"VMODEL_BUSYBOX={chosen} is not a file; unset it and run {FETCH_COMMAND}")
        return Path(chosen)
    part = cache_dir() / "busybox"
    if not read_stamp(part):
        raise ArtifactError(f"no static busybox found; run {FETCH_COMMAND}")
    return part / "busybox"


def find_iasl() -> Path:
    """ACPICA's compiler and disassembler of ACPI tables: the one in PATH, else the cache's.  ArtifactError."""
    part = cache_dir() / "iasl"
    if host := shutil.which("iasl"):
        return Path(host)
    if not read_stamp(part):
        raise ArtifactError(f"no iasl found; run {FETCH_COMMAND} --iasl")
    return part / "iasl"


#: Names of Chromium in distributions.
_BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def find_browser() -> Path:
    """Chromium, for tests of HTML pages: the one in PATH, else the cache's.  ArtifactError: there is none."""
    part = cache_dir() / "browser"
    if host := next(filter(None, map(shutil.which, _BROWSERS)), None):
        return Path(host)
    if not read_stamp(part):
        raise ArtifactError(f"no Chromium found; run {FETCH_COMMAND} --browser")
    return part / "chromium-headless-shell"


def find_clang() -> Path:
    """A clang that builds fuzz targets (libFuzzer, ASan, UBSan): the one in PATH, else the cache's.  ArtifactError."""
    part = cache_dir() / "clang"
    host = shutil.which("clang")
    if host and has_fuzzer(Path(host)):
        return Path(host)
    if not read_stamp(part):
        raise ArtifactError(f"no clang with libFuzzer found; run {FETCH_COMMAND} --clang")
    return part / "clang"


def has_fuzzer(clang: Path) -> bool:
    """Whether this clang builds fuzz targets: some distributions leave out the runtimes."""
    code = "int LLVMFuzzerTestOneInput(const char *data, long size) { return data && size < 0; }"
    with tempfile.TemporaryDirectory() as work:
        line = [str(clang), "-x", "c", "-fsanitize=fuzzer,address,undefined", "-o", f"{work}/target", "-"]
        return (
            subprocess.run(
                line, input=code, text=True, capture_output=True, timeout=patience(60), check=False
            ).returncode
            == 0
        )


def find_source() -> Path:
    """The source of Linux that the debug kernel is built from.  ArtifactError: it is not in the cache."""
    part = cache_dir() / "source"
    if not read_stamp(part):
        raise ArtifactError(f"no source of Linux in the cache; run {BUILD_COMMAND}")
    return part / "linux"


def find_kernels() -> dict[str, Kernel]:
    """The cache's kernels by the names of their folders, such as "stable" or "6.6", the oldest release first."""
    found = {part.name.removeprefix("kernel-"): _cached_kernel(part) for part in cache_dir().glob("kernel-*")}
    there = [(natural(kernel.release), name, kernel) for name, kernel in found.items() if kernel]
    return {name: kernel for _, name, kernel in sorted(there, key=lambda entry: entry[:2])}


def find_kernel(name: str | os.PathLike[str] | None = None) -> Kernel:
    """A kernel by its name ("stable", "debug"), by the start of its version ("6.12", "6.12-cloud"), or by its path.

    None selects stable's, else the oldest generic kernel.  A version selects the newest kernel that it matches, and
    never the debug kernel.
    A Path, or a text with a / in it, is a path.  Modules are in lib/modules/RELEASE, beside the image or one folder up
    (as for /boot/vmlinuz-*); a kernel without modules is allowed.  ArtifactError: there is no such kernel.
    """
    if isinstance(name, os.PathLike) or (name and "/" in name):
        return _kernel_at(Path(name))
    kernels = find_kernels()
    if name is None:
        generic = [kernel for name, kernel in kernels.items() if name != DEBUG and not is_cloud(kernel.release)]
        if found := kernels.get(STABLE) or next(iter(generic), None):
            return found
    elif name in NAMES:
        if name in kernels:
            return kernels[name]
        if name == DEBUG:
            raise ArtifactError(f"no debug kernel in the cache; run {BUILD_COMMAND}, which builds it")
    elif release := pick_release([kernel.release for kernel in kernels.values()], name):
        return next(kernel for kernel in kernels.values() if kernel.release == release)
    have = ", ".join(f"{short} ({kernel.release})" for short, kernel in kernels.items()) or "none"
    missing = f"no kernel{f' {name}' if name else ''} in the cache (kernels there: {have})"
    if name and KERNEL_NAME.fullmatch(name):
        raise ArtifactError(f"{missing}; run {FETCH_COMMAND} --kernel {name}")
    if close := difflib.get_close_matches(name or "", NAMES, n=1):
        raise ArtifactError(f"{missing}; did you mean {close[0]}?")
    raise ArtifactError(f"{missing}; run {FETCH_COMMAND}")


def kernel_release(image: Path) -> str:
    """The release (`uname -r`), from the header of a bzImage.  ArtifactError: it is not a bzImage.

    Linux, Documentation/arch/x86/boot.rst: "HdrS" is at 0x202; the word at 0x20e plus 0x200 is the offset of the text.
    """
    try:
        with image.open("rb") as file:
            head = file.read(0x8000)
    except OSError as error:
        raise ArtifactError(f"cannot read the kernel: {error.strerror}", file=image) from None
    if head[0x202:0x206] != b"HdrS":
        raise ArtifactError("is not a Linux bzImage", file=image)
    at = int.from_bytes(head[0x20E:0x210], "little") + 0x200
    words = head[at : at + 256].split(b"\0")[0].decode("ascii", "replace").split()
    if not words:
        raise ArtifactError("is a bzImage without a version", file=image)
    return words[0]


def pick_release(releases: Sequence[str], prefix: str) -> str | None:
    """The newest release whose version is `prefix` or starts with it at a dot: "6.1" is not "6.12".

    A prefix that ends in "-cloud" selects cloud kernels only, any other prefix selects none of them.  None: no match.
    """
    version = re.escape(prefix.removesuffix("-cloud")) + r"(?!\d)"
    matching = [
        found
        for found in releases
        if re.match(version, found) and is_cloud(found) == is_cloud(prefix) and not found.endswith(DEBUG_RELEASE)
    ]
    return max(matching, key=natural, default=None)


def is_cloud(name: str) -> bool:
    """Whether a release, or a name such as "6.12-cloud", is that of a cloud kernel."""
    return "-cloud" in name


def natural(text: str) -> list[tuple[int, str]]:
    """A sorting key that compares numbers inside a text as numbers: 6.9 is before 6.12."""
    return [(int(number or 0), word) for number, word in re.findall(r"(\d+)|(\D+)", text)]


def read_stamp(part: Path) -> dict[str, str]:
    """A part's stamp; {} if the part must be fetched again: it is absent, or its stamp is damaged or of another place.

    A stamp has a `folder` if the part's files contain the path of the cache, so that the part cannot be moved.
    """
    try:
        stamp = json.loads((part / "stamp.json").read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) and stamp.get("folder", str(part)) == str(part) else {}


def host_qemu() -> Qemu | None:
    """The QEMU in PATH; None: there is none.  ArtifactError: it is unsuitable, as for `probe_qemu`."""
    path = shutil.which("qemu-system-x86_64")
    return probe_qemu(Path(path)) if path else None


def cached_qemu() -> Qemu | None:
    """The cache's QEMU; None: there is none.  It is not run: it was probed before its stamp was written."""
    path = cache_dir() / "qemu" / "qemu-system-x86_64"
    version = parse_qemu_version(read_stamp(path.parent).get("version", ""))
    return Qemu(path, version) if version and path.is_file() else None


def _cached_kernel(part: Path) -> Kernel | None:
    release = read_stamp(part).get("release")
    return Kernel(release, part / "boot" / f"vmlinuz-{release}", part / "lib/modules" / release) if release else None


def _kernel_at(image: Path) -> Kernel:
    release = kernel_release(image)
    places = (folder / "lib" / "modules" / release for folder in (image.parent, image.resolve().parent.parent))
    return Kernel(release, image, next((place for place in places if place.is_dir()), None))


def output(argv: Sequence[str]) -> str:
    """A program's stdout.  OSError: it cannot be run; SubprocessError: it took 30 s, or its exit status is not 0."""
    return subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=patience(30), check=True
    ).stdout
