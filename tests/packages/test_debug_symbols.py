"""Debug information of modules: picked from Debian's package while that is downloaded; no network, no apt."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import lzma
import random
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.packages.archive import RELEASE, Archive, cached, fake_qemu
from vmodel.cli import doctor
from vmodel.guest import artifacts, debug_symbols, get_qemu, streamed
from vmodel.guest.artifacts import ArtifactError, find_kernel
from vmodel.guest.debug_symbols import find_debug, pick_debug
from vmodel.guest.streamed import Download, Remote, members, opener

PACKAGE = f"linux-image-{RELEASE}-dbg"
#: More than a piece of a download, and nothing that xz makes small.
NVME, CORE = random.Random(1).randbytes(700_000), random.Random(2).randbytes(100_000)
HOME = f"./usr/lib/debug/lib/modules/{RELEASE}/kernel/drivers/nvme/host"
FILES = {
    f"./usr/lib/debug/vmlinux-{RELEASE}": b"the kernel",
    "./usr/lib/debug/lib/modules/6.1.0/kernel/drivers/nvme/host/nvme.ko": b"of another kernel",
    f"./usr/share/doc/{RELEASE}/nvme.ko": b"no debug file",
    f"{HOME}/nvme-core.ko": CORE,
    f"{HOME}/nvme.ko": NVME,
    f"{HOME}/nvme-tcp.ko.xz": lzma.compress(b"tcp"),
}


def deb(files: dict[str, bytes] = FILES, mode: str = "xz") -> bytes:
    """A package as dpkg-deb makes it (deb(5)): an ar archive of a version and two tar files."""

    def ar(name: str, content: bytes) -> bytes:
        head = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        return head + content + b"\n" * (len(content) % 2)

    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{mode}") as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo(f"{HOME}/fabrics.ko")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    return b"!<arch>\n" + b"".join(ar(name, content) for name, content in parts.items())


class Mirror:
    """A web server with one file, which can break connections."""

    def __init__(self) -> None:
        self.content = deb()
        #: After how many bytes each of the next connections ends too early.
        self.breaks: list[int] = []
        self.status = 0
        self.continues = True
        self.asked: list[dict[str, str]] = []
        mirror = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.answer(self)

            def log_message(self, *args: object) -> None: ...

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=functools.partial(self._server.serve_forever, 0.05), daemon=True).start()
        self.netloc = f"127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        self.asked.append(dict(handler.headers))
        if self.status:
            handler.send_error(self.status)
            return
        first = int(handler.headers.get("Range", "bytes=0-")[6:-1]) if self.continues else 0
        handler.send_response(206 if first else 200)
        handler.send_header("Content-Length", str(len(self.content) - first))
        handler.end_headers()
        end = first + self.breaks.pop(0) if self.breaks else len(self.content)
        handler.wfile.write(self.content[first:end])

    def remote(self, sha256: str = "", netloc: str = "") -> Remote:
        digest = sha256 or hashlib.sha256(self.content).hexdigest()
        return Remote(f"http://{netloc or self.netloc}/x.deb", "x.deb", len(self.content), digest)


@pytest.fixture
def mirror(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    mirror = Mirror()
    yield mirror
    mirror.close()


@pytest.fixture
def there(cache: Path) -> Path:
    """A cache with QEMU, busybox and a kernel of four modules."""
    fake_qemu(cached(cache, "qemu", version="QEMU emulator version 11.1.3") / "qemu-system-x86_64")
    (cached(cache, "busybox") / "busybox").touch()
    part = cached(cache, "kernel-stable", release=RELEASE)
    folder = part / "lib/modules" / RELEASE / "kernel"
    folder.mkdir(parents=True)
    for name in ("nvme", "nvme-core", "nvme-tcp", "fabrics", "edu"):
        (folder / f"{name}.ko.xz").touch()
    (part / "boot").mkdir()
    (part / "boot" / f"vmlinuz-{RELEASE}").touch()
    return cache


@pytest.fixture
def archive(there: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Archive:
    archive = Archive(monkeypatch, tmp_path)
    archive.move_to("7.2.12")
    remote = mirror.remote()
    archive.symbols[PACKAGE] = f"'{remote.uri}' {PACKAGE}_1_amd64.deb {remote.size} SHA256:{remote.sha256}\n"
    return archive


def get(*words: str) -> int:
    return get_qemu.main(["--mirror", "http://m.example/", "--kernel", "stable", *words])


def symbols(*names: str) -> list[str]:
    return [word for name in names for word in ("--debug-symbols", name)]


def test_only_the_wanted_files_are_kept(archive: Archive, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert get(*symbols("nvme", "nvme-core", "nvme_tcp")) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    assert f"debug-stable ({RELEASE}): to be fetched, 1 MB, of which a few are kept\n" in said
    assert "download of debug-stable: 1 of 1 MB" in said
    kernel, part = find_kernel("stable"), there / "debug-stable"
    found = {name: find_debug(kernel, name) for name in ("nvme", "nvme_core", "nvme-core", "nvme_tcp")}
    assert {name: path.read_bytes() for name, path in found.items() if path} == {
        "nvme": NVME,
        "nvme_core": CORE,
        "nvme-core": CORE,
        "nvme_tcp": b"tcp",
    }
    files = sorted(str(path.relative_to(part)) for path in part.rglob("*") if path.is_file())
    assert files == ["modules/nvme.ko", "modules/nvme_core.ko", "modules/nvme_tcp.ko", "stamp.json"]
    assert list(there.glob("tmp-*")) == []
    assert find_debug(kernel, "vmlinux") is None and find_debug(kernel, "edu") is None
    assert find_debug(kernel, "../modules/nvme") is None
    assert archive.downloads == [], "apt would write the whole package"


def test_of_the_kernel_itself(archive: Archive) -> None:
    assert get(*symbols("vmlinux")) == 0
    path = find_debug(find_kernel("stable"), "vmlinux")
    assert path is not None and path.read_bytes() == b"the kernel"


def test_a_second_run_downloads_nothing_and_another_module_adds(
    archive: Archive, mirror: Mirror, capsys: pytest.CaptureFixture[str]
) -> None:
    assert get(*symbols("nvme")) == 0
    assert len(mirror.asked) == 1
    assert get(*symbols("nvme")) == 0
    assert len(mirror.asked) == 1
    capsys.readouterr()
    assert get(*symbols("nvme"), "--refresh", "--dry-run") == 0
    assert f"debug-stable ({RELEASE}): up to date\n" in capsys.readouterr().err
    assert get(*symbols("nvme-core")) == 0
    kernel = find_kernel("stable")
    assert len(mirror.asked) == 2 and find_debug(kernel, "nvme") and find_debug(kernel, "nvme_core")


def test_debug_files_are_of_one_release(archive: Archive, there: Path) -> None:
    assert get(*symbols("nvme")) == 0
    (there / "kernel-stable" / "stamp.json").write_text(
        json.dumps({"packages": "p", "release": "6.12.108+deb13-amd64"})
    )
    (there / "kernel-stable/lib/modules" / RELEASE).rename(there / "kernel-stable/lib/modules/6.12.108+deb13-amd64")
    assert find_debug(find_kernel("stable"), "nvme") is None
    assert debug_symbols.missing_debug("stable", ["nvme"])


def test_dry_run_and_print(archive: Archive, mirror: Mirror, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert get(*symbols("nvme"), "--dry-run") == 0
    assert "debug-stable" in capsys.readouterr().err and mirror.asked == []
    assert get(*symbols("nvme"), "--print") == 1
    assert capsys.readouterr().err == (
        f"get-qemu: no debug symbols of nvme of kernel {RELEASE} in the cache;"
        " run scripts/get-qemu --debug-symbols nvme\n"
    )
    assert get(*symbols("nvme")) == 0
    capsys.readouterr()
    assert get(*symbols("nvme"), "--print") == 0
    assert f"debug-stable-nvme={there}/debug-stable/modules/nvme.ko\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "nvmee",
            f"kernel {RELEASE} has no module 'nvmee': did you mean 'nvme'? write vmlinux for code that is built in",
        ),
        ("zq", f"kernel {RELEASE} has no module 'zq': write vmlinux for code that is built in"),
        ("fabrics", f"the package of debug symbols of {RELEASE} has none of fabrics"),
    ],
)
def test_unknown_modules(
    archive: Archive, there: Path, capsys: pytest.CaptureFixture[str], mirror: Mirror, name: str, said: str
) -> None:
    assert get(*symbols("nvme", name)) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"get-qemu: {said}"
    assert bool(mirror.asked) == (name == "fabrics"), "what the kernel can say is said before a gigabyte is fetched"
    assert not (there / "debug-stable").exists()


@pytest.mark.parametrize("name", ["../nvme", "a b", "", "nvme.ko"])
def test_no_names_of_modules(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        get("--debug-symbols", name)
    assert "must be the name of a kernel module, such as nvme, or vmlinux" in capsys.readouterr().err


def test_the_archive_has_no_such_package(archive: Archive, capsys: pytest.CaptureFixture[str]) -> None:
    archive.symbols.clear()
    assert get(*symbols("nvme")) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"get-qemu: Debian's archive has no debug symbols of kernel {RELEASE} any more;"
        " fetch its newer kernel with them: scripts/get-qemu --debug-symbols MODULE --refresh"
    )


def test_a_broken_download_is_continued(archive: Archive, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed.time, "sleep", lambda seconds: None)
    mirror.breaks = [1000, 0, 100]
    assert get(*symbols("nvme")) == 0
    assert [asked.get("Range") for asked in mirror.asked] == [None, "bytes=1000-", "bytes=1000-", "bytes=1100-"]


def test_a_download_that_ends_leaves_nothing(
    archive: Archive, mirror: Mirror, there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(streamed.time, "sleep", lambda seconds: None)
    mirror.breaks = [len(mirror.content) - 50, *[0] * 10]
    assert get(*symbols("nvme")) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("get-qemu: the download ended after 1 MB: IncompleteRead")
    assert not (there / "debug-stable").exists() and list(there.glob("tmp-*")) == []
    mirror.breaks, mirror.continues = [1000], False
    assert get(*symbols("nvme")) == 1
    assert "the mirror cannot continue it" in capsys.readouterr().err
    mirror.status = 404
    assert get(*symbols("nvme")) == 1
    assert "get-qemu: cannot fetch linux-image" in capsys.readouterr().err
    assert not (there / "debug-stable").exists()


def test_what_was_there_outlives_a_failure(archive: Archive, mirror: Mirror, there: Path) -> None:
    assert get(*symbols("nvme")) == 0
    mirror.status = 500
    assert get(*symbols("nvme-core")) == 1
    assert find_debug(find_kernel("stable"), "nvme")


def test_a_changed_package_is_refused(archive: Archive, there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = archive.symbols[PACKAGE]
    archive.symbols[PACKAGE] = text[:-6] + ("0" if text[-6] != "0" else "1") + text[-5:]
    assert get(*symbols("nvme")) == 1
    assert "is not the file that the archive's signed lists name" in capsys.readouterr().err
    assert not (there / "debug-stable").exists()


@pytest.mark.parametrize("content", [b"no xz at all", lzma.compress(b"tcp" * 100)[:-20]])
def test_a_damaged_file_of_a_package(content: bytes, tmp_path: Path) -> None:
    """What a mirror sends is decompressed before its checksum is known."""
    path = f"{HOME}/nvme-tcp.ko.xz"
    package: Any = io.BytesIO(deb({path: content}))
    with pytest.raises(ArtifactError) as error:
        pick_debug(package, tmp_path, RELEASE, ["nvme-tcp"])
    assert str(error.value) == f"the package of debug symbols of {RELEASE} is damaged: {path.removeprefix('./')}"


def test_a_full_disk(
    archive: Archive, there: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(debug_symbols.shutil, "copyfileobj", full)
    assert get(*symbols("nvme")) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "get-qemu: [Errno 28] No space left on device; no incomplete part is in the cache"
    )
    assert not (there / "debug-stable").exists()


# ---- packages and downloads ----------------------------------------------------------------------


def named(data: bytes) -> dict[str, bytes]:
    return {name: content.read() for name, content in members(io.BytesIO(data))}


def test_members() -> None:
    assert named(deb()) == {name.removeprefix("./"): content for name, content in FILES.items()}, "and no links"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no Debian package"),
        (b"<html>not found</html>", "no Debian package"),
        (deb()[:40], "damaged"),
        (deb().replace(b"`\n", b"x\n"), "damaged"),
        (b"!<arch>\n", "has no files"),
        (deb().replace(b"data.tar.xz ", b"data.tar.lz4"), "data.tar.lz4 cannot be read"),
    ],
)
def test_damaged_packages(data: bytes, said: str) -> None:
    with pytest.raises(ArtifactError, match=said):
        named(data)


@pytest.mark.parametrize("cut", [200, 500])
def test_a_package_that_ends_early(cut: int) -> None:
    with pytest.raises((ArtifactError, tarfile.TarError, EOFError, lzma.LZMAError)):
        named(deb()[:cut])


def test_proxies_are_apts(mirror: Mirror) -> None:
    """The proxy answers for a host that does not exist; DIRECT is no proxy."""
    line = f'Acquire::http::Proxy "http://{mirror.netloc}";'
    with Download(mirror.remote(netloc="mirror.invalid"), opener([line]), lambda text: None) as download:
        download.verify()
    with Download(mirror.remote(), opener(['Acquire::http::Proxy "DIRECT";']), lambda text: None) as download:
        assert download.read() == mirror.content


def test_passwords_are_no_part_of_the_address(mirror: Mirror) -> None:
    with Download(mirror.remote(netloc=f"me:p%40ss@{mirror.netloc}"), opener([]), lambda text: None) as download:
        download.verify()
    assert mirror.asked[0]["Authorization"] == "Basic bWU6cEBzcw=="
    assert mirror.asked[0]["Host"] == mirror.netloc


def test_other_schemes() -> None:
    with pytest.raises(ArtifactError, match="cannot read cdrom: URIs"):
        Download(Remote("cdrom://x/y", "y", 1, "0"), opener([]), lambda text: None)


def test_doctor(there: Path, archive: Archive) -> None:
    found = doctor._debug_symbols()
    assert (found.ok, found.needed, found.fix) == (False, False, "scripts/get-qemu --debug-symbols nvme")
    assert get(*symbols("nvme", "nvme-core")) == 0
    assert doctor._debug_symbols().detail == "stable: nvme, nvme_core"
    assert artifacts.read_stamp(there / "debug-stable")["release"] == RELEASE
