"""`Target`: what a user wants coverage of: a module by its name, a module's file, or functions of the kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vmodel.coverage.errors import CoverageError

#: A module's name may have 55 characters (<linux/moduleparam.h>, MODULE_NAME_LEN), and no others than a C identifier.
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,54}")
_PREFIX = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,127}")
_KERNEL = "vmlinux"
_RIGHT = 'a module\'s name as "nvme", a module\'s file as "./card.ko", or "vmlinux:PREFIX" for functions of the kernel'


@dataclass(frozen=True)
class Target:
    """What coverage is wanted of.

    `name`: that of the program: the module's, with _ for -, or "vmlinux:PREFIX".  `prefix`: with which the names of the
    kernel's functions begin, "" for a module.  `file`: a module's own file, None: that of the guest's kernel.
    """

    name: str
    prefix: str = ""
    file: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """Of "nvme", "vmlinux:PREFIX" or "path/to/x.ko".  CoverageError: it is none of these."""
        kernel, colon, prefix = text.partition(":")
        if kernel == _KERNEL:
            if not colon:
                raise CoverageError('"vmlinux" is all of the kernel: say which functions, as "vmlinux:pci_"')
            if not _PREFIX.fullmatch(prefix):
                raise CoverageError(
                    f'{text!r} must have the beginning of a function\'s name behind the colon, as "vmlinux:pci_"'
                )
            return cls(text, prefix)
        if "/" in text or text.endswith(".ko"):
            path = Path(text)
            name = path.name.removesuffix(".ko")
            if path.suffix != ".ko" or not _MODULE.fullmatch(name):
                raise CoverageError(f"{text!r} must be a module's name, or its file, NAME.ko")
            return cls(name.replace("-", "_"), file=path)
        if not _MODULE.fullmatch(text):
            raise CoverageError(f"{text!r} must be {_RIGHT}")
        return cls(text.replace("-", "_"))

    @property
    def kernel(self) -> bool:
        """Whether it is code of the kernel itself."""
        return bool(self.prefix)

    def __str__(self) -> str:
        return str(self.file) if self.file else self.name
