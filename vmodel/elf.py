"""ELF files are read by pyelftools; those of users may be damaged."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from elftools.common.exceptions import ELFError


@contextlib.contextmanager
def reading_elf() -> Iterator[None]:
    """Turns every exception of pyelftools, for a file that is not ELF or damaged, into ValueError."""
    try:
        yield
    except ELFError as error:
        raise ValueError(f"not an ELF file: {error}") from None
    except Exception as error:
        # The list is open: pyelftools raises errors of struct, construct, Unicode and file offsets for damaged files.
        raise ValueError(f"a damaged ELF file: {type(error).__name__}: {error}") from None
