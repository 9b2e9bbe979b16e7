"""vmodel doctor.  It must run even if nothing else does, so it imports neither the shim nor a module that needs it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import mmap
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import typer

import vmodel
from vmodel.cli.output import AsJson, console
from vmodel.guest import artifacts
from vmodel.guest.artifacts import ArtifactError
from vmodel.guest.debug_symbols import debug_names


@dataclass(frozen=True)
class Diagnosis:
    """The result of a check.  `fix` is the command that fixes it."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    #: False: vmodel works without it, except for some commands.
    needed: bool = True


def shim_command() -> str:
    """The command that builds the C shim for this Python."""
    root = Path(vmodel.__file__).resolve().parents[1]
    source = ["--editable", str(root)] if (root / "setup.py").is_file() else ["--force-reinstall", "PATH-OF-YOUR-CLONE"]
    return shlex.join([sys.executable, "-m", "pip", "install", *source])


def _shim() -> Diagnosis:
    try:
        importlib.import_module("vmodel._shim")  # and not only _vmshim, which may be older than it
    except ImportError as error:
        return Diagnosis("C shim", False, str(error), shim_command())
    return Diagnosis("C shim", True, "loaded")


def _qemu() -> Diagnosis:
    name = "QEMU with vfio-user-pci"
    try:
        qemu = artifacts.find_qemu()
        # A cached QEMU was probed when it was unpacked; a library that it needs may have been removed since.
        qemu = artifacts.probe_qemu(qemu.path)
    except ArtifactError as error:
        return _artifact(name, error)
    return Diagnosis(name, True, f"{'.'.join(map(str, qemu.version))}, {qemu.path}")


def _kernel(short: str) -> Diagnosis:
    name, needed = f"guest kernel {short}", short == artifacts.KERNELS[0]
    try:
        kernel = artifacts.find_kernel(short)
    except ArtifactError as error:
        return _artifact(name, error, needed)
    if not kernel.image.is_file() or kernel.modules is None or not kernel.modules.is_dir():
        fix = f"{artifacts.FETCH_COMMAND} --refresh --kernel {short}"
        return Diagnosis(name, False, f"{kernel.image} or its modules are missing", fix, needed)
    return Diagnosis(name, True, str(kernel.image))


def _busybox() -> Diagnosis:
    try:
        return Diagnosis("static busybox", True, str(artifacts.find_busybox()))
    except ArtifactError as error:
        return _artifact("static busybox", error)


def _artifact(name: str, error: ArtifactError, needed: bool = True) -> Diagnosis:
    # The message of an ArtifactError ends with the command that fixes it; here the command has a line of its own.
    detail, _, fix = str(error).rpartition("; ")
    command = fix.removeprefix("run ")
    if command == artifacts.FETCH_COMMAND:
        command += f" --kernel {artifacts.STABLE}"  # sufficient; by default it also fetches the optional kernel
    return Diagnosis(name, False, detail or fix, command, needed)


def _debug_symbols() -> Diagnosis:
    """Coverage has lines of modules with debug information, and only functions of others."""
    name = "debug symbols"
    found = {
        part.name.removeprefix("debug-"): debug_names(part) for part in sorted(artifacts.cache_dir().glob("debug-*"))
    }
    if not found:
        fix = f"{artifacts.FETCH_COMMAND} --debug-symbols nvme"
        return Diagnosis(name, False, "none: coverage has functions, and no lines", fix, needed=False)
    return Diagnosis(name, True, "; ".join(f"{kernel}: {', '.join(names)}" for kernel, names in found.items()))


def _memory() -> Diagnosis:
    """Guest RAM is a memfd that QEMU and vmodel both map; /dev/shm is not needed."""
    try:
        fd = os.memfd_create("vmodel-doctor")
        try:
            os.ftruncate(fd, mmap.PAGESIZE)
            with mmap.mmap(fd, mmap.PAGESIZE) as one, mmap.mmap(fd, mmap.PAGESIZE) as other:
                one[:4] = b"seen"
                shared = other[:4] == b"seen"
        finally:
            os.close(fd)
    except OSError as error:
        return Diagnosis(
            "shared memory", False, f"memfd: {error.strerror}", "uname -r  # Linux 3.17 or newer is needed"
        )
    return Diagnosis("shared memory", shared, "memfd works" if shared else "two mappings of a memfd differ")


def _compiler() -> Diagnosis:
    # The shim is built by now: a compiler is only needed to rebuild it, and to build C programs for the guest.
    found = shutil.which("cc") or shutil.which("gcc")
    if not found:
        return Diagnosis("C compiler", False, "no cc in PATH", "apt-get install gcc libc6-dev", needed=False)
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return Diagnosis("C compiler", False, f"{found}, but no Python.h", "apt-get install python3-dev", needed=False)
    return Diagnosis("C compiler", True, found)


def _documents() -> Diagnosis:
    """The documents and examples: those of the checkout, or of the wheel, which installs them below share/doc."""
    name, root = "documents, examples", Path(vmodel.__file__).resolve().parents[1]
    if (root / "docs" / "index.md").is_file():
        return Diagnosis(name, True, str(root))
    try:
        for file in metadata.files("vmodel") or ():
            if file.match("share/doc/vmodel/README.md"):
                return Diagnosis(name, True, str(Path(str(file.locate())).resolve().parent))
    except metadata.PackageNotFoundError:
        pass
    return Diagnosis(name, False, "not installed", needed=False)


def _checks() -> Iterator[Diagnosis]:
    yield _shim()
    yield _qemu()
    yield from map(_kernel, artifacts.KERNELS)
    yield _busybox()
    yield _debug_symbols()
    yield _memory()
    yield _compiler()
    yield _documents()


def doctor(as_json: AsJson = False) -> None:
    """Check that everything that vmodel needs is installed.

    The exit status is 1 if something that vmodel cannot work without is missing.
    """
    findings = list(_checks())
    healthy = all(f.ok or not f.needed for f in findings)
    if as_json:
        print(json.dumps({"ok": healthy, "checks": [dataclasses.asdict(f) for f in findings]}, indent=1))
        raise typer.Exit(0 if healthy else 1)
    out = console()
    for f in findings:
        state = "[green]ok     [/]" if f.ok else "[red]MISSING[/]" if f.needed else "[yellow]absent [/]"
        out.print(f"{state}  {f.name:<24} ", end="")
        out.print(f.detail, markup=False, highlight=False)
        if not f.ok and f.fix:
            optional = "" if f.needed else " (optional)"
            out.print(f"         {'':<24} to fix it{optional}: {f.fix}", markup=False, highlight=False)
    raise typer.Exit(0 if healthy else 1)
