"""Registers from a specification: SystemRDL, IP-XACT and CMSIS-SVD files become register banks, and banks such files.

```python
CardRegs = load("card.rdl")

class Card(PciDevice):
    bar0 = MmioBar(0, size=4096)
    regs = bar0.bank(CardRegs)

    @on_write(CardRegs.CONTROL)
    def _control(self, new: int) -> None: ...
```
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

from vmodel.config_file import read_text
from vmodel.errors import ConfigError
from vmodel.regs import RegisterBank
from vmodel.spec.draft import FileDraft, build
from vmodel.spec.reading import read_in_child


def load(file: str | os.PathLike[str], name: str | None = None) -> Any:
    """The register bank that a file specifies, a class derived from RegisterBank.

    `file`: SystemRDL (.rdl), IP-XACT (.xml) or CMSIS-SVD (.svd, .xml); a relative path starts in the folder of the
    calling source file.  `name`: the address map, memory map or peripheral, by default the last one of the file.  The
    result is `Any` for type checkers: only the file knows its registers (`vmodel regs import` writes them as Python).
    ConfigError: the file is wrong, or says what a bank cannot do; the text has file and line.
    """
    path = Path(file)
    if not path.is_absolute():
        frame = inspect.currentframe()
        caller = frame.f_back.f_code.co_filename if frame is not None and frame.f_back is not None else ""
        path = Path(caller).parent / path if Path(caller).is_file() else path
    return load_path(path, name)


def load_path(path: Path, name: str | None = None) -> type[RegisterBank]:
    """As `load`; a relative path starts in the current folder."""
    return build(_draft(path, name))


def _draft(path: Path, name: str | None) -> FileDraft:
    kind = path.suffix.lower()
    if kind in (".xml", ".svd"):
        head = re.search(r"<(?:\w+:)?(component|device)[\s>]", read_text(path))
        if head is None:
            raise ConfigError("is neither IP-XACT (<component>) nor CMSIS-SVD (<device>)", file=path)
        kind = ".svd" if head[1] == "device" else ".xml"
    elif kind != ".rdl":
        raise ConfigError("a specification of registers is a .rdl, .xml or .svd file", file=path)
    if kind == ".svd":
        from vmodel.spec.svd import read_svd

        return read_svd(path, name)
    return read_in_child("systemrdl" if kind == ".rdl" else "ipxact", path, name)
