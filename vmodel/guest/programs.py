"""What each program of a Debian package needs in a guest: from the package and those that it depends on.

A program gets the libraries that it needs, and the data of its package.  Dependencies are followed to the data of other
packages: of those whose libraries it needs, and of those that have only data, such as pci.ids of lspci.  They end at a
package that has programs of its own, which this program may or may not call.  A script gets its
interpreter, and the data of all that its package depends on.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vmodel.guest.artifacts import ArtifactError, output
from vmodel.guest.debian import unpack
from vmodel.guest.tools import LIBS, MANIFEST, PROGRAMS, interpreter, needed

#: What no program of a guest needs: documents, translations, build files, what shells, systemd and the C library's
#: iconv read.
_LEFT_OUT = re.compile(
    r"usr/share/(doc|man|info|locale|lintian|bug|doc-base|bash-completion|zsh|fish|applications|icons|pixmaps|menu"
    r"|apport|gdb|gcc)/|usr/include/|usr/lib/(systemd|udev|tmpfiles\.d|sysusers\.d)/|/gconv/|/pkgconfig/"
)
#: Folders that are links to those below /usr since Debian merged them.
_MERGED = re.compile(r"(s?bin|lib|lib64)/")
_LIBRARY = re.compile(rf"{LIBS}/[^/]+\.so(\.[^/]*)?")


@dataclass
class _Package:
    depends: list[str] = field(default_factory=list)
    #: Paths in the root folder, with what they are there for.
    programs: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)


def unpack_tool(debs: Sequence[Path], folder: Path, package: str) -> None:
    """Unpacks a package's programs into `folder`/root, with what they need of the packages `debs`, and nothing else.

    MANIFEST says which files belong to which program.  ArtifactError: it has no programs, or lacks a library.
    """
    root = folder / "root"
    packages: dict[str, _Package] = {}
    provided: dict[str, str] = {}
    for deb in debs:
        name, names, depends = _control(deb)
        found = packages[name] = _Package(depends)
        provided |= dict.fromkeys(names, name)
        _unpack_files(deb, root, found)
    for found in packages.values():
        found.depends = [real for name in found.depends if (real := provided.get(name)) in packages and real]
    own = packages.get(package, _Package())
    # With those of what it depends on itself: perl's program perl is in perl-base.
    of = [own, *(packages[name] for name in own.depends)]
    select = _Selection(root, package, packages)
    paths = {Path(path).name: path for one in reversed(of) for path in reversed(one.programs) if select.real(path)}
    if not paths:
        raise ArtifactError(f"the package {package!r} has no programs")
    programs = {name: select.of(path) for name, path in sorted(paths.items())}
    # Programs share most of their files.
    table = sorted({path for files in programs.values() for path in files})
    number = {path: n for n, path in enumerate(table)}
    # A link to a file becomes that file, so that what is between them may go.
    for path, real in [(path, select.real(path)) for path in table]:
        if (root / path).is_symlink() and not (root / real).is_dir():
            (root / path).unlink()
            os.link(root / real, root / path)
    for found_path in list(root.rglob("*")):
        if str(found_path.relative_to(root)) not in number and (found_path.is_symlink() or not found_path.is_dir()):
            found_path.unlink()
    indices = {name: [number[path] for path in files] for name, files in programs.items()}
    (folder / MANIFEST).write_text(json.dumps({"files": table, "programs": indices}, separators=(",", ":")))


def _control(deb: Path) -> tuple[str, list[str], list[str]]:
    """(its name, all names by which others depend on it, the names that it depends on)."""
    text = output(["dpkg-deb", "--field", str(deb), "Package", "Provides", "Pre-Depends", "Depends"])
    fields = {key: value for key, _, value in (line.partition(": ") for line in text.splitlines())}
    depends = ", ".join(fields.get(key, "") for key in ("Pre-Depends", "Depends"))
    name = fields["Package"]
    return name, [name, *_names(fields.get("Provides", ""))], _names(depends)


def _names(text: str) -> list[str]:
    """The packages in a field, as "a (>= 1), b:any | c"."""
    return [match[1] for part in re.split(r"[,|]", text) if (match := re.match(r"\s*([a-z0-9][a-z0-9+.-]+)", part))]


def _unpack_files(deb: Path, root: Path, package: _Package) -> None:
    files: dict[str, None] = {}

    def place(name: str) -> str | None:
        path = f"usr/{name}" if _MERGED.match(name) else name
        if not path.startswith(("usr/", "etc/", "var/lib/")) or _LEFT_OUT.search(path):
            return None
        files[path] = None
        return path

    unpack(deb, root, place)
    for path in files:
        if (root / path).is_symlink() or (root / path).is_file():  # else a folder, perhaps one whose files are left out
            (package.programs if path.startswith(PROGRAMS) else package.data).append(path)


class _Selection:
    """Finds the files that a program needs."""

    def __init__(self, root: Path, package: str, packages: Mapping[str, _Package]) -> None:
        self._root = root.resolve()
        self._package = package
        self._packages = packages
        self._owner = {path: name for name, one in packages.items() for path in (*one.programs, *one.data)}
        self._needs: dict[str, list[str]] = {}
        self._real: dict[str, str] = {}
        #: Libraries in folders below LIBS, by their names.
        self._private: dict[str, list[str]] = {}
        for path in sorted(self._owner):
            if path.startswith(f"{LIBS}/") and ".so" in path:
                self._private.setdefault(Path(path).name, []).append(path)

    def real(self, path: str) -> str:
        """The path of the file or folder to which links lead; "" if there is none in the root folder."""
        if path not in self._real:
            found = (self._root / path).resolve()
            inside = found.exists() and found.is_relative_to(self._root)
            self._real[path] = str(found.relative_to(self._root)) if inside else ""
        return self._real[path]

    def of(self, program: str) -> list[str]:
        """The files of a program, itself first.  ArtifactError: a library is missing."""
        files: dict[str, None] = {}
        used: dict[str, None] = {self._package: None}
        if named := interpreter(self._root / program):
            used |= dict.fromkeys(self._packages.get(self._package, _Package()).depends)
            # One that is not among them is another tool's, or busybox.
            self._add(
                [path for place in PROGRAMS if (path := f"{place}{Path(named).name}") in self._owner], files, used
            )
        self._add([program], files, used)
        done: set[str] = set()
        while left := [name for name in used if name not in done]:
            for name in left:
                done.add(name)
                used |= dict.fromkeys(self._followed(name))
                data = self._packages[name].data
                if name != self._package:  # whose libraries its programs may open without naming them in the file
                    data = [path for path in data if not _LIBRARY.fullmatch(path)]
                self._add(data, files, used, plugins=True)
        return [program, *sorted(files.keys() - {program})]

    def _add(self, paths: list[str], files: dict[str, None], used: dict[str, None], plugins: bool = False) -> None:
        """Adds files with the libraries that they need, and the packages that all of these are from.

        `plugins`: a library that is missing leaves out only what needs it.
        """
        todo = list(paths)
        while todo:
            path = todo.pop()
            if path in files or not (real := self.real(path)):
                continue
            files[path] = None
            used |= {self._owner[owned]: None for owned in (path, real) if owned in self._owner}
            for name in self._needed(real) if (self._root / real).is_file() else ():
                library = self._library(name, real)
                if library is None and not plugins:
                    raise ArtifactError(f"{path} needs the library {name}, which no package has that it depends on")
                todo += [library] if library else []

    def _needed(self, real: str) -> list[str]:
        if real not in self._needs:
            self._needs[real] = []
            with (self._root / real).open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    try:
                        self._needs[real] = needed(file)
                    except ValueError as error:
                        raise ArtifactError(str(error), file=real) from None
        return self._needs[real]

    def _library(self, name: str, user: str) -> str | None:
        # Some are in a folder of their own, which their users' RUNPATH names.
        places = [f"{LIBS}/{name}", f"{Path(user).parent}/{name}", *self._private.get(name, ())]
        return next((path for path in places if self.real(path)), None)

    def _followed(self, package: str) -> Iterator[str]:
        """The dependencies of a package that have data for it."""
        for name in self._packages[package].depends:
            if name.startswith("lib") or not self._packages[name].programs:
                yield name
