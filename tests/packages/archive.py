"""Fakes of what guests are made from: a QEMU, parts of the cache, packages, and Debian's archive."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from vmodel.guest import debian, get_qemu

RELEASE = "6.12.107+deb13-amd64"
#: What a cache has in these tests, by role.
RELEASES = {"stable": RELEASE, "backports": "7.2.12+deb13-amd64"}
REPO = Path(__file__).resolve().parents[2]
URI = "http://mirror.example/debian/"


def fake_qemu(path: Path, version: str = "10.1.0", devices: str = "vfio-user-pci") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "QEMU emulator version {version} (x)" || echo "name \\"{devices}\\""\n'
    )
    path.chmod(0o755)
    return path


def cached(cache: Path, part: str, **stamp: str) -> Path:
    (cache / part).mkdir()
    (cache / part / "stamp.json").write_text(json.dumps({"packages": "p", **stamp}))
    return cache / part


def image(path: Path, release: str = RELEASE) -> Path:
    """The header of a bzImage."""
    data = bytearray(0x1000)
    data[0x202:0x206] = b"HdrS"
    data[0x20E:0x210] = (0x300).to_bytes(2, "little")
    text = f"{release} (builder) #1 SMP".encode() + b"\0"
    data[0x500 : 0x500 + len(text)] = text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def fake_deb(
    tmp_path: Path,
    members: list[tuple[str, bytes | str, int]],
    status: int = 0,
    name: str = "package",
    depends: str = "",
) -> Path:
    """A "package": a tar file, and a dpkg-deb in PATH that prints it. A str is a link's target; "=x" a hard link's."""
    path = tmp_path / f"{name}.deb"
    (tmp_path / f"{name}.deb.control").write_text(f"Package: {name}\n{depends}\n")
    with tarfile.open(path, "w") as archive:
        for name, content, mode in members:
            member = tarfile.TarInfo(name)
            member.mode = mode
            if isinstance(content, str):
                member.type = tarfile.LNKTYPE if content.startswith("=") else tarfile.SYMTYPE
                member.linkname = content.removeprefix("=")
                archive.addfile(member)
            else:
                member.size = len(content)
                (tmp_path / "content").write_bytes(content)
                with (tmp_path / "content").open("rb") as file:
                    archive.addfile(member, file)
    tool = tmp_path / "bin" / "dpkg-deb"
    tool.write_text(
        f'#!/bin/sh\ncase $1 in --field) /bin/cat "$2.control" ;; *) /bin/cat "$2" ;; esac\nexit {status}\n'
    )
    tool.chmod(0o755)
    return path


class Archive:
    """Debian's archive as apt prints it: by suite, the kernel that each package of a role depends on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.suites: dict[str, dict[str, str]] = {}
        #: Packages that are no kernels.
        self.packages: list[str] = []
        self.downloads: list[str] = []
        #: Packages with debug symbols: what apt prints of each.
        self.symbols: dict[str, str] = {}
        monkeypatch.setattr(debian.Apt, "_run", self.run)
        monkeypatch.setattr(get_qemu, "check_host", lambda: Path("/k.gpg"))
        monkeypatch.setattr(get_qemu, "transport", list)
        monkeypatch.setattr(get_qemu, "unpack_kernel", self.unpack)

    def move_to(self, backports: str, stable: str = "6.12.107") -> None:
        """What the suites have from now on, and nothing else."""
        kernel = {
            "linux-image-amd64": f"{stable}+deb13-amd64",
            "linux-image-cloud-amd64": f"{stable}+deb13-cloud-amd64",
        }
        newer = {name: release.replace(stable, backports) for name, release in kernel.items()}
        self.suites = {"trixie-backports": newer, "trixie": kernel}

    def unpack(self, debs: list[Path], folder: Path, release: str) -> None:
        (folder / "boot").mkdir()
        (folder / "boot" / f"vmlinuz-{release}").write_text(" ".join(deb.name for deb in debs))
        (folder / "lib/modules" / release).mkdir(parents=True)

    def run(self, argv: list[str], tick: object = None) -> str:
        match argv:
            case ["apt-get", "update"]:
                return ""
            case ["apt-cache", "pkgnames"]:
                return "\n".join(self.packages)
            case ["apt-cache", "pkgnames", _]:
                releases = {release for suite in self.suites.values() for release in suite.values()}
                return "".join(f"linux-image-{n}\n" for n in ["amd64", "cloud-amd64", *releases]) + "\n".join(
                    self.symbols
                )
            case ["apt-cache", "madison", package]:
                rows = [(suite[package].partition("+")[0], name) for name, suite in self.suites.items()]
                return "".join(f" {package} | {v}-1 | {URI} {name}/main amd64 Packages\n" for v, name in rows)
            case ["apt-cache", "show", asked] if "=" in asked:
                package, version = asked.split("=")
                release = next(s[package] for s in self.suites.values() if s[package].startswith(version[:-2] + "+"))
                return f"Package: {package}\nDepends: linux-base (>= 4), linux-image-{release} (= {version})\n"
            case ["apt-cache", "show", _, package]:
                return f"Package: {package}\nDepends: kmod, linux-base\n"
            case ["apt-get", "install", *_, package, "--print-uris"]:
                return f"'{URI}{package}.deb' {package}.deb 5000000 SHA256:0\n"
            case ["apt-get", "install", "--download-only", *_, package]:
                self.downloads.append(package)
                return ""
            case ["apt-get", "download", package, "--print-uris"] if package in self.symbols:
                return self.symbols[package]
            case ["apt-get", "download", *packages, "--print-uris"]:
                return "".join(f"'{URI}{name}.deb' {name}.deb 5000000 SHA256:0\n" for name in packages)
            case ["apt-get", "download", *packages]:
                self.downloads += packages
                return ""
        raise AssertionError(argv)
