"""Debian's packages: what apt says of them, and how they are unpacked; no network, no apt."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.packages.archive import RELEASE, URI, Archive, cached, fake_deb, fake_qemu
from vmodel.guest import artifacts, debian, get_qemu
from vmodel.guest.artifacts import ArtifactError

pytestmark = pytest.mark.usefixtures("cache")


# ---- what apt says -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "mirror"),
    [
        (["Debian|http://mirror.example/debian/|bookworm|main"], URI),
        # The security archive and its like are no mirror of the suites that are wanted.
        (
            ["Debian|http://s.example/debian-security/|bookworm-security|main", f"Debian|{URI}|bookworm-updates|main"],
            URI,
        ),
        (["Debian|http://s.example/x|bookworm/updates|contrib", f"Debian|{URI}|sid|main"], URI),
        (["Ubuntu|http://u.example/ubuntu/|noble|main"], None),
        (["Other|http://o.example/debian/|stable|main"], None),
        (["Debian|cdrom:[Debian 13]/|trixie|main"], None),
        # Nothing downloaded yet: the placeholder stays, the folder's name decides.
        (["$(ORIGIN)|http://o.example/apt/|noble|main", f"$(ORIGIN)|{URI}|trixie|main"], URI),
        (["$(ORIGIN)|http://o.example/debian|plucky|main", f"$(ORIGIN)|{URI}|trixie|main"], URI),
        (["$(ORIGIN)|http://u.example/ubuntu/|noble|main"], None),
        # What is known comes before what is guessed.
        ([f"$(ORIGIN)|{URI}|trixie|main", "Debian|https://known.example/d|sid|main"], "https://known.example/d"),
        (["", "|||", "nonsense", "Debian|"], None),
        ([], None),
    ],
)
def test_mirror(rows: list[str], mirror: str | None) -> None:
    assert debian.pick_mirror(rows) == mirror


def test_transport_takes_nothing_that_weakens_checks() -> None:
    taken = [
        'Acquire::http::Proxy "http://p.example:3128";',
        'Acquire::https::Proxy "DIRECT";',
        'Acquire::http "";',
        'Acquire::Retries "5";',
        'Acquire::ForceIPv4 "true";',
    ]
    left = [
        'Acquire::AllowInsecureRepositories "1";',
        'Acquire::AllowWeakRepositories "1";',
        'Acquire::AllowDowngradeToInsecureRepositories "1";',
        'Acquire::Check-Valid-Until "false";',
        'Acquire::Check-Date "false";',
        'APT::Get::AllowUnauthenticated "1";',
        'APT::Update::Post-Invoke:: "rm -rf /";',
        'DPkg::Pre-Install-Pkgs:: "x";',
        'Dir::Etc::sourcelist "sources.list";',
    ]
    assert [line for line in taken + left if debian.TRANSPORT.match(line)] == taken


def test_private_root(tmp_path: Path) -> None:
    apt = debian.Apt(tmp_path / "work", URI, Path("/usr/share/keyrings/k.gpg"), ['Acquire::Retries "5";\n'])
    work = str(tmp_path / "work")
    assert str(apt.archives).startswith(work)
    config = (tmp_path / "work" / "apt.conf").read_text()
    for key in ("Dir::State", "Dir::State::status", "Dir::Cache", "Dir::Cache::archives", "Dir::Etc::sourceparts"):
        assert f'{key} "{work}' in config
    assert config.endswith('Acquire::Retries "5";\n')
    sources = (tmp_path / "work" / "sources" / "debian.sources").read_text()
    assert f"URIs: {URI}\n" in sources
    assert "Signed-By: /usr/share/keyrings/k.gpg\n" in sources
    assert not re.search(r"(?i)trusted|allow|unauthenticated|insecure|check-", config + sources)


def test_kernel_package_names() -> None:
    names = [
        "linux-image-6.12.94+deb13-amd64",
        "linux-image-6.12.107+deb13-amd64",
        "linux-image-6.12.108+deb13-amd64-unsigned",
        "linux-image-6.12.109+deb13-cloud-amd64",
        "linux-image-6.12.109+deb13-rt-amd64",
        "linux-image-6.12.109+deb13-amd64-dbg",
        "linux-image-6.1.200+deb13-amd64",
        "linux-image-amd64",
        "linux-headers-6.12.110+deb13-amd64",
    ]
    releases = debian.kernel_releases(names)
    cloud = "6.12.109+deb13-cloud-amd64"
    assert releases == ["6.1.200+deb13-amd64", "6.12.94+deb13-amd64", RELEASE, cloud]
    assert artifacts.pick_release(releases, "6.12") == RELEASE
    assert artifacts.pick_release(releases, "6.12.94") == "6.12.94+deb13-amd64"
    assert artifacts.pick_release(releases, "6.1") == "6.1.200+deb13-amd64"
    assert artifacts.pick_release(releases, "6.12-cloud") == cloud
    for none in ("6.12.9", "6.12.109", "6.13", "7.2", "6.1-cloud"):
        assert artifacts.pick_release(releases, none) is None


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("Reading...\nE: Unable to locate package x\nE: Unable to locate package x\n", "Unable to locate package x"),
        ("W: GPG error: InRelease: NO_PUBKEY 0123\nE: The repository is not signed.\n", "debian-archive-keyring$"),
        ("W: something\n", "^$"),
        ("E: " + "long " * 1000, "^.{400}$"),
    ],
)
def test_complaints_are_one_line(said: str, complaint: str) -> None:
    assert re.search(complaint, debian.apt_complaint(said))


def test_the_archive_moves_on(cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """7.2 has gone from it, and 7.3 is there: roles find it, what is here goes on to work, a refresh brings it."""
    archive = Archive(monkeypatch, cache)
    archive.move_to("7.2.12")
    fake_qemu(cached(cache, "qemu", version="QEMU emulator version 11.1.3") / "qemu-system-x86_64")
    (cached(cache, "busybox") / "busybox").touch()
    monkeypatch.setattr(get_qemu, "missing_parts", kernels_only(get_qemu.missing_parts))
    asked = ["--mirror", URI, *(word for role in artifacts.ROLES for word in ("--kernel", role))]
    assert get_qemu.main(asked) == 0, capsys.readouterr().err
    assert artifacts.find_kernel("backports").version == (7, 2)
    assert artifacts.find_kernel("cloud").release == "6.12.107+deb13-cloud-amd64"
    assert archive.downloads == [
        "linux-image-6.12.107+deb13-amd64",
        "linux-image-7.2.12+deb13-amd64",
        "linux-image-6.12.107+deb13-cloud-amd64",
    ]
    archive.downloads.clear()
    archive.move_to("7.3.4")
    assert get_qemu.main(asked) == 0
    assert artifacts.find_kernel("backports").version == (7, 2), "what is there serves, until somebody asks"
    capsys.readouterr()
    assert get_qemu.main([*asked, "--refresh", "--dry-run"]) == 0
    said = capsys.readouterr().err
    assert "kernel-stable (6.12.107+deb13-amd64): up to date\n" in said
    assert "kernel-backports (7.3.4+deb13-amd64): to be fetched, 5 MB\n" in said
    assert archive.downloads == []
    assert get_qemu.main([*asked, "--refresh"]) == 0
    assert archive.downloads == ["linux-image-7.3.4+deb13-amd64"]
    assert artifacts.find_kernel("backports").version == (7, 3)
    assert artifacts.find_kernel("stable").version == (6, 12)
    assert get_qemu.main(["--mirror", URI, "--kernel", "7.2"]) == 1
    assert "have no kernel 7.2 (they have: 6.12, 7.3)" in capsys.readouterr().err
    # A part of which something has gone is not what the archive has.
    artifacts.find_kernel("stable").image.unlink()
    assert get_qemu.main([*asked, "--refresh"]) == 0
    assert archive.downloads[1:] == ["linux-image-6.12.107+deb13-amd64"]
    assert artifacts.find_kernel("stable").image.is_file()
    archive.suites.pop("trixie-backports")
    assert get_qemu.main([*asked, "--refresh"]) == 1
    assert "trixie-backports have no linux-image-amd64: there is no kernel 'backports'" in capsys.readouterr().err
    assert artifacts.find_kernel("backports").version == (7, 3), "what is there stays"


def kernels_only(missing: Callable[..., list[str]]) -> Callable[..., list[str]]:
    return lambda *asked: [part for part in missing(*asked) if part.startswith("kernel-")]


# ---- unpacking ---------------------------------------------------------------------------------------


def test_unpack(tmp_path: Path) -> None:
    deb = fake_deb(
        tmp_path,
        [
            ("./usr/bin/tool", b"#!", 0o4755),
            ("./usr/bin/alias", "=./usr/bin/tool", 0o755),
            ("./usr/share/data", b"d", 0o666),
            ("./usr/share/absolute", "/usr/bin/tool", 0o777),
            ("./usr/share/relative", "data", 0o777),
            ("./etc/passwd", b"not wanted", 0o644),
        ],
    )
    root = tmp_path / "root"
    debian.unpack(deb, root, lambda name: name if name.startswith("usr/") else None)
    assert not (root / "etc").exists()
    assert (root / "usr/bin/tool").stat().st_mode & 0o7777 == 0o755, "no setuid in a cache"
    assert (root / "usr/bin/alias").samefile(root / "usr/bin/tool")
    assert (root / "usr/share/data").stat().st_mode & 0o7777 == 0o644
    assert (root / "usr/share/absolute").resolve() == root / "usr/bin/tool", "inside, not the host's"
    assert (root / "usr/share/relative").read_bytes() == b"d"


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/evil"])
def test_unpack_stays_inside(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match="leads out of the folder"):
        debian.unpack(fake_deb(tmp_path, [(name, b"x", 0o644)]), tmp_path / "root", lambda path: path)
    assert not (tmp_path / "evil").exists()


def test_unpack_of_a_broken_package(tmp_path: Path) -> None:
    deb = fake_deb(tmp_path, [("./a", b"x" * 5000, 0o644)], status=2)
    with pytest.raises(ArtifactError, match=r"package.deb: dpkg-deb failed with status 2"):
        debian.unpack(deb, tmp_path / "root", lambda path: path)
    deb.write_bytes(deb.read_bytes()[:1000])
    with pytest.raises((ArtifactError, tarfile.TarError)):
        debian.unpack(deb, tmp_path / "root2", lambda path: path)


@pytest.mark.parametrize("split", [False, True])
def test_both_layouts_of_kernel_packages(tmp_path: Path, split: bool) -> None:
    modules = f"usr/lib/modules/{RELEASE}"

    def boot(name: str) -> str:
        return f"./{modules}/{name}" if split else f"./boot/{name}-{RELEASE}"

    members: list[tuple[str, bytes | str, int]] = [
        (boot("vmlinuz"), b"image", 0o644),
        (boot("config"), b"CONFIG", 0o644),
        (f"./{modules}/modules.order", b"", 0o644),
        (f"./{modules}/modules.builtin", b"", 0o644),
        (f"./{modules}/kernel/drivers/x.ko.xz", b"x", 0o644),
        ("./usr/share/doc/x", b"x", 0o644),
    ]
    folder = tmp_path / "kernel"
    debian.unpack_kernel([fake_deb(tmp_path, members)], folder, RELEASE)
    assert (folder / "boot" / f"vmlinuz-{RELEASE}").read_bytes() == b"image"
    assert (folder / "lib" / "modules" / RELEASE / "kernel/drivers/x.ko.xz").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["boot", "lib"]
    for missing in (0, 2, 3, 4):
        deb = fake_deb(tmp_path, [member for i, member in enumerate(members) if i != missing])
        with pytest.raises(ArtifactError, match="their layout has changed"):
            debian.unpack_kernel([deb], tmp_path / f"without-{missing}", RELEASE)
