"""Builds a kernel module from its source, out of tree, for one of the cache's kernels.

kbuild writes beside the files that it reads.  So a build has a folder of its own for each kernel, OUTPUT/RELEASE, with
links to the source files: nothing is written into the source, and builds for several kernels do not mix.  A Makefile
that looks above its folder, as in `ccflags-y := -I$(src)/../include`, finds in OUTPUT what is beside the source.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmodel.errors import ConfigError
from vmodel.guest.artifacts import Kernel
from vmodel.guest.groups import output
from vmodel.guest.headers import Headers, find_headers
from vmodel.patience import patience, spoken

#: The folder of builds, if the user names none: in the current folder, as of other build tools.
OUTPUT = Path("build")
#: What marks an output folder (https://bford.info/cachedir/): a build of the folder above does not take it for source.
_MARK = "CACHEDIR.TAG"
#: Seconds for a build on a machine at rest.
_TIMEOUT = 600.0
#: Bytes that make may print.
_LARGEST = 32 << 20
_NOT_IN_PATHS = re.compile(r"[^\w./+@=~-]")
#: Where kbuild looks for its instructions, the first that is there.
_MAKEFILES = ("Kbuild", "Makefile")
_NAMES_A_MODULE = re.compile(r"^[^#]*\bobj-(m|\$\([^)]*\))\s*[:+]?=", re.MULTILINE)
#: In a Makefile: the folder above, and an object of it.
_ABOVE = re.compile(r"^[^#\n]*\.\.", re.MULTILINE)
_OBJECT_ABOVE = re.compile(r"^[^#\n]*?(\.\./\S*\.o)\b", re.MULTILINE)
_OLD_FLAGS = re.compile(r"^[^#\n]*\bEXTRA_CFLAGS\b", re.MULTILINE)
#: A variable of make's, with its value.
_VARIABLE = re.compile(r"[\w.-]+=.*")
#: What kbuild writes, if somebody has built in the source folder.
_WRITTEN = re.compile(r".*\.(o|ko|mod|mod\.c|cmd|symvers|order|o\.d)$|\..*")
#: What make and kbuild print, beside the compiler's messages.
_NOISE = re.compile(r"make(\[\d+\])?: |  [A-Z]+( \[M\])? ")


class BuildError(ConfigError):
    """A module was not built.  The text has the compiler's errors, each in a line with file and line number."""

    @property
    def summary(self) -> str:
        """One line: the number of errors, or the only one."""
        lines = str(self).splitlines()
        return lines[0] if len(lines) == 1 else f"{len(lines)} errors"


@dataclass(frozen=True)
class Build:
    """A module that was built: for which kernel, its .ko files, and the compiler's warnings, a line each."""

    kernel: Kernel
    folder: Path
    modules: tuple[Path, ...]
    warnings: tuple[str, ...]


def build(
    source: Path,
    kernel: Kernel,
    output: Path,
    on_line: Callable[[str], None] | None = None,
    variables: Sequence[str] = (),
) -> Build:
    """Builds the modules that `source`/Kbuild, or its Makefile, names; in the folder `output`/RELEASE.

    Only what has changed since the last time is compiled.  `on_line` gets each message of the compiler, with the
    source's own paths.  `variables`: of make, such as "CONFIG_MYCARD=m".  ArtifactError: the cache has no headers for
    the kernel.  BuildError: the source is wrong.

        >>> build(Path("driver"), find_kernel("stable"), Path("build")).modules  # doctest: +SKIP
        (PosixPath('build/6.12.117+deb13-amd64/mycard.ko'),)
    """
    check_source(source)
    headers = find_headers(kernel)
    folder = (output / kernel.release).absolute()
    check_path(source)
    check_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (output / _MARK).write_text("Signature: 8a477f597d28d172789f06886806bc55\n# What `vmodel build` made.\n")
    (output / ".gitignore").write_text("*\n")
    with _locked(folder):
        _mirror(source, folder)
        if _looks_above(source):
            _link_neighbours(source.absolute(), folder.parent)
        said = _old_flags(source, kernel)
        if on_line:
            for text in said:
                on_line(text)
        said += _make(source, folder, headers, on_line, variables)
        modules = tuple(_modules(folder))
        _write_compile_commands(source, folder, headers, output.absolute())
    if not modules:
        raise BuildError(f"{_makefile(source)}: obj-m names no module")
    return Build(kernel, folder, modules, tuple(line for line in said if ": warning: " in line))


def check_source(source: Path) -> None:
    """BuildError unless this is a folder whose Kbuild or Makefile names a module."""
    if not source.is_dir():
        raise BuildError(f"{source}: there is no such folder; a module's folder has a Kbuild or a Makefile")
    makefile = _makefile(source)
    text = makefile.read_text(errors="replace").replace("\\\n", " ")
    if not _NAMES_A_MODULE.search(text):
        raise BuildError(f"{makefile}: names no module; for NAME.c it needs a line `obj-m := NAME.o`")
    if found := _OBJECT_ABOVE.search(text):
        raise BuildError(f"{makefile}: {found[1]} is outside the module's folder, where kbuild would write it")


def check_variable(text: str) -> str:
    """The text, `NAME=VALUE`.  BuildError: it is something else, which make would take for an option or a target."""
    if not _VARIABLE.fullmatch(text):
        raise BuildError(f"{text!r}: must be NAME=VALUE, a variable of make's")
    return text


def check_path(path: Path) -> None:
    """BuildError if kbuild would not understand this path: it puts paths into lists and commands of a shell, unquoted.

    Newer kernels follow symlinks first.
    """
    for place in (path.absolute(), path.resolve()):
        if wrong := _NOT_IN_PATHS.search(str(place)):
            raise BuildError(
                f"{place}: kbuild takes no path with {wrong[0]!r}, only letters, digits and / . _ - + @ = ~"
            )


def _makefile(source: Path) -> Path:
    for name in _MAKEFILES:
        if (source / name).is_file():
            return source / name
    raise BuildError(f"{source}: has neither a Kbuild nor a Makefile; for NAME.c a Kbuild says `obj-m := NAME.o`")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Two builds in one folder wait for each other."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def source_files(source: Path) -> list[Path]:
    """The files of a source folder, without hidden ones and those that kbuild writes; sorted."""
    found = []
    for place, folders, files in os.walk(source.absolute()):
        # The output folder has a link to each file: it is none of the source.
        folders[:] = [
            name for name in folders if not name.startswith(".") and not (Path(place) / name / _MARK).exists()
        ]
        found += [Path(place) / name for name in files if not _WRITTEN.fullmatch(name)]
    return sorted(found)


def _mirror(source: Path, folder: Path) -> None:
    """Makes `folder` have a link to each source file, and none to one that has gone."""
    wanted = {folder / path.relative_to(source.absolute()): path for path in source_files(source)}
    for path in folder.rglob("*"):
        if path.is_symlink() and wanted.get(path) != path.readlink():
            path.unlink()
            # make would go on to use it.
            path.with_suffix(".o").unlink(missing_ok=True)
    for path, target in wanted.items():
        if not path.is_symlink():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_file():
                # The folder was copied with what its links name: what was built of that names other sources.
                path.unlink()
                path.with_suffix(".o").unlink(missing_ok=True)
            path.symlink_to(target)


def _old_flags(source: Path, kernel: Kernel) -> list[str]:
    """A warning if the Makefile has flags in a variable that kbuild no longer reads, without a word: Linux 6.15."""
    makefile = _makefile(source)
    if kernel.version < (6, 15) or not _OLD_FLAGS.search(makefile.read_text(errors="replace")):
        return []
    return [f"{makefile}: warning: kbuild ignores EXTRA_CFLAGS since Linux 6.15; ccflags-y is what it reads"]


def _looks_above(source: Path) -> bool:
    """Whether the module's Makefile names the folder above its own."""
    return _ABOVE.search(_makefile(source).read_text(errors="replace")) is not None


def _link_neighbours(source: Path, output: Path) -> None:
    """Makes `output`, which is above the folder of the build, have a link to all that is beside the source folder."""
    for path in source.parent.iterdir():
        link = output / path.name
        if path.name.startswith(".") or path in (source, output) or (link.is_symlink() and link.readlink() == path):
            continue
        if link.is_symlink() or not link.exists():  # what is no link is a build
            new = output / f".{path.name}.{os.getpid()}"
            new.symlink_to(path)
            new.rename(link)  # another build may do the same now


def _make(
    source: Path,
    folder: Path,
    headers: Headers,
    on_line: Callable[[str], None] | None,
    variables: Sequence[str],
) -> list[str]:
    """Runs kbuild; returns the compiler's messages, which name source files."""
    own = [check_variable(text) for text in variables]
    flags = [text.partition("=")[2] for text in own if text.startswith("KCFLAGS=")]
    above = f"-ffile-prefix-map={folder.parent}={source.absolute().parent} " if _looks_above(source) else ""
    line = [
        str(headers.programs / "make"),
        f"-j{len(os.sched_getaffinity(0))}",
        "--no-print-directory",
        "-C",
        str(headers.folder),
        f"M={folder}",
        # The package of headers has a vmlinux for the types of BTF, which would need pahole.
        "CONFIG_DEBUG_INFO_BTF_MODULES=",
        # The version of pahole is compared with the kernel's, although nothing uses it then.
        "PAHOLE_VERSION=$(CONFIG_PAHOLE_VERSION)",
        # Debug information and __FILE__ name the source, and #include "..." finds what is beside its folder.
        # The last map that fits counts.
        f"KCFLAGS={above}-ffile-prefix-map={folder}={source.absolute()} -iquote {source.absolute()} {' '.join(flags)}",
        *(text for text in own if not text.startswith("KCFLAGS=")),
        "modules",
    ]
    environ = {"PATH": f"{headers.programs}:/usr/bin:/bin", "LC_ALL": "C.UTF-8", "TMPDIR": str(folder)}
    said: list[str] = []
    others: list[str] = []
    run = output(line, environ=environ, folder=folder, seconds=patience(_TIMEOUT), most=_LARGEST)
    try:
        with run as (process, printed):
            for data in printed:
                text = _in_source(data.decode(errors="replace").rstrip(), source, folder)
                if _NOISE.match(text):
                    others.append(text)
                    continue
                said.append(text)
                if on_line:
                    on_line(text)
    except TimeoutError:
        raise BuildError(f"the build of {source} did not end in {spoken(_TIMEOUT)}") from None
    except OSError as error:
        if error.errno != errno.EFBIG:
            raise
        raise BuildError(f"the build of {source} was stopped: {error.strerror}") from None
    if process.returncode:
        errors = [text for text in said if re.search(r"\berror: |^ERROR: ", text)]
        raise BuildError("\n".join(errors or said[-10:] or others[-10:] or ["make was stopped"]))
    return said


def _in_source(text: str, source: Path, folder: Path) -> str:
    """A line of the compiler's with the paths of the source for those of the build folder."""
    text = text.replace(f"{folder}/", f"{source}/").replace(f"{folder.parent}/", f"{source.parent}/")
    # Newer kernels compile in the build folder, so paths are relative to it.
    found = re.match(r"([^\s:]+)(:\d+(:\d+)?: .*|: In function .*|: At top level:)", text)
    if found and not found[1].startswith("/") and (source / found[1]).is_file() and not text.startswith(f"{source}/"):
        return f"{source / found[1]}{found[2]}"
    return text


def _modules(folder: Path) -> Iterator[Path]:
    order = folder / "modules.order"
    for line in order.read_text(errors="surrogateescape").split() if order.is_file() else ():
        yield (folder / line).with_suffix(".ko")  # older kernels write absolute paths


def _write_compile_commands(source: Path, folder: Path, headers: Headers, output: Path) -> None:
    """Writes compile_commands.json for editors, of the kernel that was built last."""
    commands = []
    for path in sorted(folder.rglob(".*.o.cmd")):
        text = path.read_text(errors="replace")
        command = re.search(r"^savedcmd_\S+ := +(.*)$", text, re.MULTILINE)
        file = re.search(r"^source_\S+ := +(\S+)$", text, re.MULTILINE)
        # Without the commands that kbuild adds behind it.
        if command and file and (folder / file[1]).is_symlink():
            words = shlex.split(command[1].partition(" ; ")[0])
            words[0] = str(headers.programs / words[0])
            place = headers.folder if Path(file[1]).is_absolute() else folder
            commands.append({"directory": str(place), "file": str((folder / file[1]).readlink()), "arguments": words})
    new = output / f".compile_commands.{os.getpid()}"
    new.write_text(json.dumps(commands, indent=1) + "\n")
    new.rename(output / "compile_commands.json")
