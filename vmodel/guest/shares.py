"""Folders of the host that a guest sees as they are: 9p over virtio.  QEMU serves them itself, so no daemon is needed.

A guest with a share has one more PCI device, which QEMU puts into a free slot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vmodel.errors import ConfigError
from vmodel.guest.artifacts import ArtifactError, Kernel
from vmodel.guest.modules import has_module

#: The kernel's modules for it.
MODULES = ("9pnet_virtio", "9p")
# Without a cache, the guest sees a change of the host's at once.  Longer messages than the default's are faster.
_OPTIONS = "trans=virtio,version=9p2000.L,cache=none,msize=262144"


@dataclass(frozen=True)
class Share:
    """A folder of the host, its absolute path in the guest, and whether the guest may write to it."""

    source: Path
    target: str
    writable: bool = False


def share_at(text: str, base: Path) -> Share:
    """A share from "DIR[:PATH][:rw]"; PATH is by default /root/NAME, and only with "rw" the guest may write to it.

    ConfigError: there is no such folder, or the text has another form.

    >>> share_at("build:rw", Path("/project"))  # doctest: +SKIP
    Share(source=PosixPath('/project/build'), target='/root/build', writable=True)
    """
    name, *rest = text.split(":")
    source = (base / name).resolve()
    if not name or not source.is_dir():
        raise ConfigError(f"there is no folder {name!r}")
    writable = rest[-1:] == ["rw"]
    if writable:
        rest.pop()
    target = rest.pop() if rest else f"/root/{source.name}"
    path = PurePosixPath(target)
    if rest or not path.is_absolute() or ".." in path.parts or "\0" in target or str(path) in ("/", "/root/"):
        raise ConfigError(f"{text!r}: must be DIR[:PATH][:rw]; PATH is absolute, in the guest")
    return Share(source, str(path), writable)


def check(shares: Iterable[Share], kernel: Kernel) -> None:
    """ConfigError: two shares have one path.  ArtifactError: the kernel has no 9p."""
    seen: dict[str, Share] = {}
    for share in shares:
        if share.target in seen:
            raise ConfigError(
                f"{seen[share.target].source} and {share.source} would both be {share.target} in the guest"
            )
        seen[share.target] = share
    # A kernel without a folder of modules may have it built in: mount will tell.
    if seen and kernel.modules is not None and not all(has_module(kernel, name) for name in MODULES):
        text = "which a shared folder needs; choose another kernel, or copy the folder by --file"
        raise ArtifactError(f"kernel {kernel.release} has no module '9p', {text}")


def qemu_args(shares: Iterable[Share]) -> list[str]:
    """QEMU's arguments; they have to be behind those of devices with an address, whose slots QEMU would use."""
    args: list[str] = []
    for n, share in enumerate(shares):
        path = str(share.source).replace(",", ",,")  # QEMU's escape
        readonly = "off" if share.writable else "on"
        # Files that the guest creates belong to QEMU's user, whatever their owner is in the guest.
        args += ["-fsdev", f"local,id=share{n},path={path},security_model=none,multidevs=remap,readonly={readonly}"]
        args += ["-device", f"virtio-9p-pci,fsdev=share{n},mount_tag=share{n}"]
    return args


def mount_lines(shares: Iterable[Share]) -> list[tuple[str, str, str]]:
    """(mount tag, path in the guest, options of mount) of each."""
    return [
        (f"share{n}", share.target, f"{'rw' if share.writable else 'ro'},{_OPTIONS}") for n, share in enumerate(shares)
    ]
