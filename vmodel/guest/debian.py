"""Debian's packages: fetched and verified by apt with a root folder of its own, and unpacked without being installed.

The mirror, proxies and passwords are those of the host's apt configuration.  Package lists, sources and the list of
installed packages (empty) are separate: nothing on the host is changed, and no root is needed.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

from vmodel.guest.artifacts import (
    CLOUD,
    FETCH_COMMAND,
    NEWEST,
    ROLES,
    STABLE,
    ArtifactError,
    has_fuzzer,
    is_cloud,
    natural,
    output,
    pick_release,
    probe_qemu,
)
from vmodel.guest.groups import end
from vmodel.guest.streamed import Remote
from vmodel.guest.tools import LIBS, nearest

SUITE = "trixie"
BACKPORTS = f"{SUITE}-backports"
#: By role: the package that depends on its kernel, and the suites to look in, in this order.
_ROLES = {
    STABLE: ("linux-image-amd64", (f"{SUITE}-updates", SUITE)),
    NEWEST: ("linux-image-amd64", (BACKPORTS,)),
    CLOUD: ("linux-image-cloud-amd64", (f"{SUITE}-updates", SUITE)),
}
QEMU_PACKAGE = "qemu-system-x86"
BUSYBOX_PACKAGE = "busybox-static"
IASL_PACKAGE = "acpica-tools"
BROWSER_PACKAGE = "chromium-headless-shell"
CLANG = "19"
CLANG_PACKAGES = (f"clang-{CLANG}", f"libclang-rt-{CLANG}-dev")
#: Files of Chromium's packages that it does not need without a graphics card, more than half of all bytes.
_NOT_DRAWN = re.compile(r"libLLVM|libgallium|libz3|/dri/|/gconv/|/locales/|libVk|libvk_|crashpad|\.TOC$")
#: What apt's tools on Ubuntu know of Debian's archive.
TEMPLATE = Path("/usr/share/python-apt/templates/Debian.info")
KEYRINGS = ("debian-archive-keyring.pgp", "debian-archive-keyring.gpg")
#: The host's settings of apt that concern how to reach the archive.  None of them weakens verification: the settings
#: for signatures (Allow*) and dates (Check-*) keep apt's defaults.
TRANSPORT = re.compile(r"Acquire::(?:https?(?:::|\s)|Retries|ForceIPv|Proxy|Queue-)")
#: Names of Debian's releases in a sources list: only a hint, as apt checks the signature.
DEBIAN_RELEASES = frozenset(
    ["bullseye", "bookworm", "trixie", "forky", "duke", "sid", "oldstable", "stable", "testing", "unstable"]
)
#: Debian's folders of firmware.  Started by ld.so, QEMU does not find them relative to its binary: -L names them.
FIRMWARE = ("usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu")


class Apt:
    """apt with its own root folder in `work`: nothing is installed; its sources are Debian's SUITE and backports."""

    def __init__(self, work: Path, mirror: str, keyring: Path, transport: Sequence[str]) -> None:
        self.archives = work / "cache" / "archives"
        self._log = work / "apt.log"
        for folder in (work / "state" / "lists" / "partial", self.archives / "partial", work / "sources"):
            folder.mkdir(parents=True)
        (work / "status").touch()
        (work / "sources" / "debian.sources").write_text(
            f"Types: deb\nURIs: {mirror}\nSuites: {SUITE} {SUITE}-updates {BACKPORTS}\n"
            f"Components: main\nArchitectures: amd64\nSigned-By: {keyring}\n"
        )
        settings = {
            "Dir::State": work / "state",
            "Dir::State::status": work / "status",
            "Dir::Cache": work / "cache",
            "Dir::Cache::archives": self.archives,
            "Dir::Etc::sourcelist": "/dev/null",
            "Dir::Etc::sourceparts": work / "sources",
            # The host's hooks and pins do not apply to this root.  Its netrc (passwords of mirrors) does.
            "Dir::Etc::main": "/dev/null",
            "Dir::Etc::parts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Install-Recommends": "false",
            # Without this, an unreachable mirror is only a warning, and `apt-get update` succeeds.
            "APT::Update::Error-Mode": "any",
            "Acquire::Languages": "none",
        }
        if os.geteuid() == 0:
            # Run by root, apt downloads as the user _apt, who cannot enter root's home, where the cache is.
            settings["APT::Sandbox::User"] = "root"
        config = work / "apt.conf"
        config.write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()) + "".join(transport))
        self._environ = {**os.environ, "APT_CONFIG": str(config), "LC_ALL": "C.UTF-8"}

    def update(self) -> None:
        """Fetches the package lists; apt verifies their signatures.  ArtifactError: apt fails, as for all methods."""
        self._run(["apt-get", "update"])

    def install_files(self, packages: Sequence[str]) -> dict[str, int]:
        """The files of `packages` and of everything they depend on: {file name: bytes}."""
        return self._uris(["apt-get", "install", *self._install(packages)])

    def install(self, packages: Sequence[str], tick: Callable[[], None]) -> None:
        """Downloads `packages` and everything they depend on into `archives`; calls `tick` every 0.3 s meanwhile."""
        self._run(["apt-get", "install", "--download-only", *self._install(packages)], tick)

    def files(self, packages: Sequence[str]) -> dict[str, int]:
        """The files of `packages` alone: {file name: bytes}."""
        return self._uris(["apt-get", "download", *packages])

    def download(self, packages: Sequence[str], tick: Callable[[], None]) -> None:
        """Downloads `packages` alone into `archives`; calls `tick` every 0.3 s meanwhile."""
        self._run(["apt-get", "download", *packages], tick)

    def kernel_packages(self, name: str) -> tuple[str, list[str]]:
        """(release, packages) of the kernel of a role, or of the newest whose version starts with `name`."""
        release = self._role_release(name) if name in ROLES else self._version_release(name)
        depends = self._run(["apt-cache", "show", "--no-all-versions", f"linux-image-{release}"])
        # Since about 6.17 the image package is empty, and the files are in linux-{base,binary,modules}-RELEASE.
        split = {name for name in re.findall(r"\blinux-[^\s,|]+", depends) if name.endswith(f"-{release}")}
        return release, sorted(split | {f"linux-image-{release}"})

    def source_package(self) -> str:
        """The package with the source of stable's kernel."""
        return f"linux-source-{'.'.join(self._role_release(STABLE).split('.')[:2])}"

    def debug_package(self, release: str) -> Remote:
        """The package with a kernel's debug symbols.  ArtifactError: the archive does not have it any more."""
        package = f"linux-image-{release}-dbg"
        if package not in self._run(["apt-cache", "pkgnames", package]).split():
            raise ArtifactError(
                f"Debian's archive has no debug symbols of kernel {release} any more; fetch its newer kernel with them:"
                f" {FETCH_COMMAND} --debug-symbols MODULE --refresh"
            )
        text = self._run(["apt-get", "download", package, "--print-uris"])
        found = re.search(r"^'([^']+)' (\S+\.deb) (\d+) SHA256:([0-9a-f]+)$", text, re.MULTILINE)
        if found is None:
            raise ArtifactError(f"apt does not say where the package {package} is")
        return Remote(found[1], found[2], int(found[3]), found[4])

    def header_packages(self, release: str) -> tuple[list[str], str]:
        """The packages of a kernel's headers with kbuild, and the number of its compiler.

        ArtifactError: the archive does not have them any more.
        """
        package = f"linux-headers-{release}"
        if package not in self._run(["apt-cache", "pkgnames", package]).split():
            raise ArtifactError(
                f"Debian's archive has no headers of kernel {release} any more; fetch its newer kernel with them:"
                f" {FETCH_COMMAND} --headers --refresh"
            )
        depends = self._run(["apt-cache", "show", "--no-all-versions", package])
        needed = re.findall(r"\b(linux-headers-[^\s,|()]+-common|linux-kbuild-[^\s,|()]+)", depends)
        compiler = re.search(r"\bgcc-(\d+)\b", depends)
        if compiler is None:
            raise ArtifactError(f"the package {package} names no compiler: its layout changed")
        return [package, *sorted(set(needed))], compiler[1]

    def check_package(self, name: str) -> None:
        """ArtifactError: the archive has no package of this name."""
        names = self._run(["apt-cache", "pkgnames"]).split()
        if name not in names:
            close = nearest(name, names)
            hint = f": did you mean {close!r}?" if close else ""
            raise ArtifactError(f"{SUITE} and {BACKPORTS} have no package {name!r}{hint}")

    def _role_release(self, role: str) -> str:
        package, suites = _ROLES[role]
        versions = package_versions(self._run(["apt-cache", "madison", package]))
        version = next((versions[suite] for suite in suites if suite in versions), None)
        if version is not None:
            # It has one dependency of this form: the image of the newest release.
            text = self._run(["apt-cache", "show", f"{package}={version}"])
            if releases := kernel_releases(re.findall(r"\blinux-image-[^\s,|]+", text)):
                return releases[-1]
        raise ArtifactError(f"{' and '.join(suites)} have no {package}: there is no kernel {role!r}", key="--kernel")

    def _version_release(self, prefix: str) -> str:
        releases = kernel_releases(self._run(["apt-cache", "pkgnames", "linux-image-"]).split())
        release = pick_release(releases, prefix)
        if release is None:
            same = [found for found in releases if is_cloud(found) == is_cloud(prefix)]
            have = ", ".join(sorted({".".join(found.split(".")[:2]) for found in same}, key=natural))
            raise ArtifactError(f"{SUITE} and {BACKPORTS} have no kernel {prefix} (they have: {have})", key="--kernel")
        return release

    def _install(self, packages: Sequence[str]) -> list[str]:
        return ["--yes", "--no-install-recommends", "--target-release", BACKPORTS, *packages]

    def _uris(self, argv: Sequence[str]) -> dict[str, int]:
        found = re.findall(r"^'[^']+' (\S+\.deb) (\d+)", self._run([*argv, "--print-uris"]), re.MULTILINE)
        return {name: int(size) for name, size in found}

    def _run(self, argv: Sequence[str], tick: Callable[[], None] | None = None) -> str:
        """Runs an apt program, and calls `tick` every 0.3 s meanwhile; returns its output.  ArtifactError: it fails."""
        with self._log.open("w+") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environ,
                cwd=self.archives,
                start_new_session=True,  # Ctrl-C in a terminal reaches only this process, which then ends apt
            )
            try:
                while process.poll() is None:
                    if tick:
                        tick()
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.3)
            finally:
                end(process)
            log.seek(0)
            text = log.read()
        if process.returncode:
            raise ArtifactError(apt_complaint(text) or f"{' '.join(argv[:2])} failed with status {process.returncode}")
        return text


def kernel_releases(packages: Sequence[str]) -> list[str]:
    """The releases of generic and cloud kernels among package names, oldest first; without rt, unsigned and dbg."""
    found = (re.fullmatch(r"linux-image-(\d+\.\d+[^-]*(?:-cloud)?-amd64)", name) for name in packages)
    return sorted((match[1] for match in found if match), key=natural)


def package_versions(text: str) -> dict[str, str]:
    """The newest version in each suite, as {"trixie": "6.12.117-1"}, from the output of `apt-cache madison PACKAGE`."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        _, version, source = [*(part.strip() for part in line.split("|")), "", "", ""][:3]
        places = [word for word in source.split() if word.endswith("/main")]
        if version and places:
            found.setdefault(places[0].removesuffix("/main"), version)  # the newest comes first
    return found


def apt_complaint(text: str) -> str:
    """The errors in apt's output, as one line; "" if it has none."""
    if re.search(r"NO_PUBKEY|EXPKEYSIG|is not signed", text):
        return "the Debian keys on this host are too old for the archive; upgrade the package debian-archive-keyring"
    errors = [line[2:].strip() for line in text.splitlines() if line.startswith("E:")]
    return "; ".join(dict.fromkeys(errors))[:400]


def pick_mirror(rows: Sequence[str]) -> str | None:
    """The URI of the Debian archive among lines of `apt-get indextargets`; None: it is not among them.

    A line is "ORIGIN|URI|RELEASE|COMPONENT".  ORIGIN is from a downloaded Release file.  Without one (images of
    containers have no lists) the field has its placeholder, and the URI's last folder decides: apt's signature check
    refuses a wrong guess.
    """
    candidates = []
    for row in rows:
        origin, uri, release, component = [*row.split("|"), "", "", ""][:4]
        if component != "main" or uri.startswith("cdrom:") or "security" in release:
            continue
        if origin == "Debian":
            candidates.append((0, "-" in release, uri))
        elif origin.startswith("$") and uri.rstrip("/").endswith("/debian"):
            candidates.append((1, release.split("-")[0] not in DEBIAN_RELEASES, uri))
    return min(candidates, default=(0, False, None), key=lambda entry: entry[:2])[2]


def host_mirror() -> str:
    """The URI of the Debian archive that this host's apt uses, or on Ubuntu that its tools know.  ArtifactError."""
    ask = [
        "apt-get",
        "indextargets",
        "--format",
        "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)",
        "Created-By: Packages",
    ]
    for argv in (ask, [*ask, "--no-release-info"]):
        with contextlib.suppress(subprocess.SubprocessError):
            mirror = pick_mirror(output(argv).splitlines())
            if mirror:
                return mirror
    with contextlib.suppress(OSError, ValueError):
        if found := re.search(r"^BaseURI: (\S+)$", TEMPLATE.read_text(), re.MULTILINE):
            return found[1]
    raise ArtifactError(
        "this host's apt uses no Debian archive: apt-get install python-apt-common, which knows it, or name a mirror:"
        f" {FETCH_COMMAND} --mirror URI"
    )


def transport() -> list[str]:
    """The lines of the host's apt configuration that concern how to reach the archive."""
    return [line for line in output(["apt-config", "dump"]).splitlines(keepends=True) if TRANSPORT.match(line)]


def check_host() -> Path:
    """Checks that this host can fetch packages; returns the keyring that verifies them.  ArtifactError: it cannot."""
    if platform.machine() != "x86_64":
        raise ArtifactError(f"Debian's QEMU for x86-64 does not run on {platform.machine()}; install QEMU >= 10.1")
    for tool in ("apt-get", "apt-cache", "apt-config", "dpkg-deb"):
        if not shutil.which(tool):
            raise ArtifactError(
                f"no {tool} on this host: install QEMU >= 10.1 with the system's package manager, set VMODEL_BUSYBOX"
                " to the path of a static busybox, and name kernels by path"
            )
    for name in KEYRINGS:
        keyring = Path("/usr/share/keyrings") / name
        if keyring.is_file():
            return keyring
    raise ArtifactError("no keys to verify Debian's packages; install the package debian-archive-keyring")


def unpack_qemu(debs: Sequence[Path], folder: Path) -> str:
    """Unpacks QEMU and its libraries into `folder`/root, writes the wrapper and tests it.

    Returns the first line of `--version`.  ArtifactError: it does not run here, or is unsuitable.
    """
    wanted = ("usr/bin/qemu-system-x86_64", f"{LIBS}/", *(f"{place}/" for place in FIRMWARE))
    for deb in debs:
        unpack(deb, folder / "root", lambda name: name if name.startswith(wanted) else None)
    firmware = " ".join(f'-L "$root/{place}"' for place in FIRMWARE)
    wrapper = _wrapper(folder, "qemu-system-x86_64", firmware, f'export QEMU_MODULE_DIR="$root/{LIBS}/qemu"\n')
    probe_qemu(wrapper)
    return output([str(wrapper), "--version"]).splitlines()[0]


def unpack_iasl(debs: Sequence[Path], folder: Path) -> str:
    """Unpacks iasl and its libraries into `folder`/root, writes the wrapper and tests it; returns its version.

    ArtifactError: it does not run here.
    """
    wanted = ("usr/bin/iasl", f"{LIBS}/")
    for deb in debs:
        unpack(deb, folder / "root", lambda name: name if name.startswith(wanted) else None)
    try:
        text = output([str(_wrapper(folder, "iasl")), "-v"])
    except (OSError, subprocess.SubprocessError) as error:
        raise ArtifactError(f"Debian's iasl does not run here: {error}") from None
    found = re.search(r"version (\d{8})", text)
    if not found:
        raise ArtifactError(f"Debian's iasl does not look like iasl, it prints {text[:80]!r}")
    return found[1]


def unpack_browser(debs: Sequence[Path], folder: Path) -> str:
    """Unpacks Chromium, its libraries and fonts into `folder`/root, writes the wrapper and tests it.

    Returns its version.  ArtifactError: it does not run here.
    """
    root, home = folder / "root", "usr/lib/chromium"
    wanted = (f"{home}/", f"{LIBS}/", "usr/share/fonts/")
    for deb in debs:
        unpack(deb, root, lambda name: name if name.startswith(wanted) and not _NOT_DRAWN.search(name) else None)
    program = root / home / BROWSER_PACKAGE
    # It executes itself again for each page, so the wrapper cannot run it by its loader, as it does for the others.
    # Instead the program's header names that loader, relative to the current folder.
    host, own = b"/lib64/ld-linux-x86-64.so.2\0", b"ld-linux-x86-64.so.2"
    with program.open("r+b") as file:
        at = file.read(4096).find(host)
        if at < 0:
            raise ArtifactError("Debian's Chromium does not have the expected loader", file=program.name)
        file.seek(at)
        file.write(own.ljust(len(host), b"\0"))
    fonts = '<?xml version="1.0"?><fontconfig><dir prefix="relative">usr/share/fonts</dir></fontconfig>\n'
    (root / "fonts.conf").write_text(fonts)
    wrapper = folder / BROWSER_PACKAGE
    wrapper.write_text(
        f"""#!/bin/sh
# Chromium of Debian's packages with their own loader, libraries and fonts; paths on its command line must be absolute.
root=$(dirname "$(readlink -f "$0")")/root
unset LD_PRELOAD
export LD_LIBRARY_PATH="$root/{LIBS}:$root/{LIBS}/pulseaudio" FONTCONFIG_FILE="$root/fonts.conf"
cd "$root/{LIBS}" && exec "$root/{home}/{BROWSER_PACKAGE}" "$@"
"""
    )
    wrapper.chmod(0o755)
    try:
        text = output([str(wrapper), "--no-sandbox", "--version"])
    except (OSError, subprocess.SubprocessError) as error:
        raise ArtifactError(f"Debian's Chromium does not run here: {error}") from None
    found = re.search(r"\d+(\.\d+){3}", text)
    if not found:
        raise ArtifactError(f"Debian's Chromium does not look like Chromium, it prints {text[:80]!r}")
    return found[0]


def unpack_clang(debs: Sequence[Path], folder: Path) -> str:
    """Unpacks clang, its libraries, headers and linker into `folder`/root, writes the wrappers and tests it.

    Returns its version.  Programs that it builds use the C library in `folder`.  ArtifactError: it does not run here.
    """
    home = f"usr/lib/llvm-{CLANG}"
    binutils = {"ld": "ld.bfd", "addr2line": "addr2line"}
    wanted = [f"{home}/", f"{LIBS}/", "usr/lib64/", "usr/lib/gcc/", "usr/lib/linux/", "usr/include/"]
    wanted += [f"usr/bin/x86_64-linux-gnu-{name}" for name in binutils.values()]
    root = folder / "root"
    for deb in debs:
        unpack(deb, root, lambda name: name if name.startswith(tuple(wanted)) and "/c++/" not in name else None)
    for name in ("lib", "lib64"):  # the folders in the linker's scripts
        (root / name).symlink_to(f"usr/{name}")
    tools = folder / "bin"
    tools.mkdir()
    run = f'"$root/{LIBS}/ld-linux-x86-64.so.2" --argv0 "$0" --library-path "$root/{LIBS}"'
    for name, program in binutils.items():
        script = f"""#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/../root
unset LD_PRELOAD LD_LIBRARY_PATH
exec {run} "$root/usr/bin/x86_64-linux-gnu-{program}" "$@"
"""
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    wrapper = folder / "clang"
    # With -no-canonical-prefixes it executes itself again by this script's name.
    wrapper.write_text(
        f"""#!/bin/sh
# clang of Debian's packages with their own C library, headers and linker; nothing of the host's is used.
here=$(dirname "$(readlink -f "$0")")
root=$here/root
unset LD_PRELOAD LD_LIBRARY_PATH
case ${{1-}} in
-cc1*) ;;
*)
    set -- --sysroot="$root" -resource-dir "$root/{home}/lib/clang/{CLANG}" -no-canonical-prefixes \
        -Wno-unused-command-line-argument -B"$here/bin" -Wl,-rpath,"$root/{LIBS}" \
        -Wl,--dynamic-linker,"$root/{LIBS}/ld-linux-x86-64.so.2" "$@"
    ;;
esac
exec {run} "$root/{home}/bin/clang" "$@"
"""
    )
    wrapper.chmod(0o755)
    try:
        text = output([str(wrapper), "--version"])
    except (OSError, subprocess.SubprocessError) as error:
        raise ArtifactError(f"Debian's clang does not run here: {error}") from None
    found = re.search(r"version (\d+(?:\.\d+)+)", text)
    if not found or not has_fuzzer(wrapper):
        raise ArtifactError(f"Debian's clang builds no fuzz targets here; it prints {text[:80]!r}")
    return found[1]


def _wrapper(folder: Path, name: str, arguments: str = "", before: str = "") -> Path:
    """A script `folder`/`name` that runs the program `name` of `folder`/root with the loader and libraries there."""
    wrapper = folder / name
    # exec: the program replaces the script, so a signal to the process that the caller started reaches it.
    wrapper.write_text(
        f"""#!/bin/sh
# {name} of Debian's packages with their own loader and libraries; nothing of the host's is used.
root=$(dirname "$(readlink -f "$0")")/root
unset LD_PRELOAD LD_LIBRARY_PATH
{before}exec "$root/{LIBS}/ld-linux-x86-64.so.2" --argv0 "$0" --library-path "$root/{LIBS}" \\
    "$root/usr/bin/{name}" {arguments} "$@"
"""
    )
    wrapper.chmod(0o755)
    return wrapper


def unpack_kernel(debs: Sequence[Path], folder: Path, release: str) -> None:
    """Unpacks a kernel into `folder`: boot/ and lib/modules/.  ArtifactError: the packages do not contain it."""
    modules = f"lib/modules/{release}"
    renamed = {  # in the split packages these two are beside the modules
        f"{modules}/vmlinuz": f"boot/vmlinuz-{release}",
        f"{modules}/config": f"boot/config-{release}",
    }

    def place(name: str) -> str | None:
        name = name.removeprefix("usr/")
        name = renamed.get(name, name)
        return name if name in renamed.values() or name.startswith(f"{modules}/") else None

    for deb in debs:
        unpack(deb, folder, place)
    for name in (
        f"boot/vmlinuz-{release}",
        f"{modules}/modules.order",
        f"{modules}/modules.builtin",
        f"{modules}/kernel",
    ):
        if not (folder / name).exists():
            raise ArtifactError(f"the packages of kernel {release} have no {name}: their layout has changed")


def unpack_source(deb: Path, folder: Path) -> None:
    """Unpacks Linux's source into `folder`, from the archive inside of its package.  ArtifactError: it has none."""
    inner = folder.with_name(f"{folder.name}.tar.xz")
    unpack(
        deb, folder.parent, lambda name: inner.name if re.fullmatch(r"usr/src/linux-source-.*\.tar\.xz", name) else None
    )
    if not inner.is_file():
        raise ArtifactError("has no source of Linux: its layout changed", file=deb.name)
    with tarfile.open(inner) as archive:
        for member in archive:
            member.name = member.name.partition("/")[2]  # without linux-source-6.12/
            if member.name:
                archive.extract(member, folder, filter="data")
    inner.unlink()


def unpack(deb: Path, folder: Path, place: Callable[[str], str | None]) -> None:
    """Unpacks a package's files to the paths in `folder` that `place(name)` returns; None leaves a file out.

    Both paths are relative, without "./".  Modes are reduced to 755 and 644: `dpkg-deb -x` run by root would write
    setuid programs into a cache folder.  ArtifactError: a path leads out of the folder, or the package is damaged.
    """
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                path = place(member.name.removeprefix("./"))
                if path is None or member.isdir():
                    continue
                if ".." in Path(path).parts or path.startswith("/"):
                    raise ArtifactError(f"path {path!r} leads out of the folder", file=deb.name)
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if member.issym():
                    link = member.linkname
                    if link.startswith("/"):  # relative to the package's root, which is `folder`
                        link = os.path.relpath(folder / link.lstrip("/"), target.parent)
                    target.symlink_to(link)
                elif member.islnk():
                    first = place(member.linkname.removeprefix("./"))
                    if first is not None:
                        os.link(folder / first, target)
                elif source := archive.extractfile(member):
                    with target.open("wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                    target.chmod(0o755 if member.mode & 0o111 else 0o644)
        process.stdout.read()  # padding after the archive's end: a closed pipe would kill dpkg-deb
    if process.returncode:
        raise ArtifactError(f"dpkg-deb failed with status {process.returncode}", file=deb.name)
