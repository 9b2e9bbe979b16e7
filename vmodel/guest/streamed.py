"""A package of Debian's archive that is read while it is downloaded, and never on disk as a whole.

A package is an `ar` archive (deb(5)): debian-binary, control.tar.*, data.tar.*.  What it contains is to be trusted only
after `verify`, as its checksum covers all of it.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import re
import tarfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from vmodel.guest.artifacts import ArtifactError
from vmodel.patience import patience

_PROXY = re.compile(r'Acquire::(https?)::Proxy "([^"]*)";')
#: What a broken connection raises; OSError has the errors of urllib, sockets and TLS.
_BROKEN = (OSError, http.client.HTTPException)
_PIECE = 1 << 18
#: How often a broken connection is opened again, if the server can continue where it was.
_TRIES = 5
#: By the end of the name of `data.tar.*`: tarfile's mode.
_MODES = {b"": "r|", b".xz": "r|xz", b".gz": "r|gz", b".bz2": "r|bz2"}


@dataclass(frozen=True)
class Remote:
    """A package file of the archive, as its signed lists describe it; `size` in bytes."""

    uri: str
    name: str
    size: int
    sha256: str


def opener(transport: Sequence[str]) -> urllib.request.OpenerDirector:
    """Opens URIs through the proxies of apt's configuration (its lines), else those of the environment."""
    proxies = urllib.request.getproxies()
    for line in transport:
        if found := _PROXY.match(line):
            proxies.pop(found[1], None)
            if found[2] and found[2] != "DIRECT":
                proxies[found[1]] = found[2]
    return urllib.request.build_opener(urllib.request.ProxyHandler(proxies))


class Download(io.RawIOBase):
    """A remote package as a file to be read once, from its start to its end; `show` is called with its state.

    A connection that breaks is continued where it was.  ArtifactError: it cannot be, or is not what the lists describe.
    """

    def __init__(self, remote: Remote, opener: urllib.request.OpenerDirector, show: Callable[[str], None]) -> None:
        super().__init__()
        self._remote, self._opener, self._show = remote, opener, show
        self._hash = hashlib.sha256()
        self._got, self._shown, self._tries = 0, 0.0, 0
        self._answer = self._connect()

    def readable(self) -> bool:
        """True."""
        return True

    def close(self) -> None:
        """Ends the connection; harmless if repeated."""
        if not self.closed and hasattr(self, "_answer"):
            self._answer.close()
        super().close()

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes, all that are left if it is negative; b"" at the end."""
        left = self._remote.size - self._got
        wanted = left if size < 0 else min(size, left)
        pieces = []
        while wanted:
            piece = self._piece(wanted)
            wanted -= len(piece)
            pieces.append(piece)
        return b"".join(pieces)

    def verify(self) -> None:
        """Reads what is left.  ArtifactError: this is not the file that the archive's signed lists name."""
        while self.read(_PIECE):
            pass
        if self._hash.hexdigest() != self._remote.sha256:
            raise ArtifactError("is not the file that the archive's signed lists name", file=self._remote.name)

    def _piece(self, size: int) -> bytes:
        while True:
            try:
                piece = bytes(self._answer.read(min(size, _PIECE)))
                if not piece:
                    raise http.client.IncompleteRead(b"")
                break
            except _BROKEN as error:
                self._again(error)
        self._got += len(piece)
        self._hash.update(piece)
        now = time.monotonic()
        if now - self._shown > 0.3 or self._got == self._remote.size:
            self._shown = now
            self._show(f"{self._got / 1e6:.0f} of {self._remote.size / 1e6:.0f} MB")
        return piece

    def _again(self, error: Exception) -> None:
        self._tries += 1
        if self._tries > _TRIES:
            raise ArtifactError(f"the download ended after {self._got / 1e6:.0f} MB: {_text(error)}") from None
        time.sleep(0.2 * self._tries)
        self._answer.close()
        self._answer = self._connect()

    def _connect(self) -> BinaryIO:
        parts = urllib.parse.urlsplit(self._remote.uri)
        if parts.scheme not in ("http", "https"):
            raise ArtifactError(f"cannot read {parts.scheme}: URIs; name another mirror: --mirror http://...")
        place = parts.netloc.rpartition("@")
        request = urllib.request.Request(parts._replace(netloc=place[2]).geturl(), headers={"User-Agent": "vmodel"})
        if place[0]:
            user = urllib.parse.unquote(place[0]).encode()
            request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(user).decode()}")
        if self._got:
            request.add_header("Range", f"bytes={self._got}-")
        try:
            answer = self._opener.open(request, timeout=patience(60))
        except _BROKEN as error:
            raise ArtifactError(f"cannot fetch {self._remote.name}: {_text(error)}") from None
        if self._got and answer.status != 206:
            answer.close()
            raise ArtifactError(f"the download broke after {self._got / 1e6:.0f} MB, and the mirror cannot continue it")
        return answer  # type: ignore[no-any-return]


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class _Limited(io.RawIOBase):
    """The next `size` bytes of a file."""

    def __init__(self, file: BinaryIO | io.RawIOBase, size: int) -> None:
        super().__init__()
        self._file, self._left = file, size

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1, /) -> bytes:
        data = self._file.read(self._left if size < 0 else min(size, self._left)) or b""
        self._left -= len(data)
        return data


def members(package: BinaryIO | io.RawIOBase) -> Iterator[tuple[str, BinaryIO]]:
    """(path without "./", content) of the regular files of a package, in its order; each is to be read before the next.

    ArtifactError: it is no package, damaged, or compressed in an unknown way.
    """
    if package.read(8) != b"!<arch>\n":
        raise ArtifactError("the download is no Debian package")
    while head := package.read(60):
        name, size = head[:16].strip().rstrip(b"/"), head[48:58].strip()
        if len(head) < 60 or head[58:] != b"`\n" or not size.isdigit():
            raise ArtifactError("the package is damaged")
        content = _Limited(package, int(size) + int(size) % 2)
        if name.startswith(b"data.tar"):
            yield from _files(content, name.removeprefix(b"data.tar"))
            return
        content.read()
    raise ArtifactError("the package has no files")


def _files(content: _Limited, suffix: bytes) -> Iterator[tuple[str, BinaryIO]]:
    if suffix not in _MODES:
        raise ArtifactError(f"packages with data.tar{suffix.decode(errors='replace')} cannot be read")
    # typeshed has the modes as literals only.
    with tarfile.open(fileobj=content, mode=_MODES[suffix], bufsize=_PIECE) as archive:  # type: ignore[call-overload]
        for member in archive:
            if member.isreg() and (file := archive.extractfile(member)):
                yield member.name.removeprefix("./"), file
