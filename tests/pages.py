"""The code in docs/, as files: a block that begins with `# FILE: NAME` is one, `# FILE: NAME, continued` more."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```\w+\n# FILE: (\S+?)(, continued)?\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def files_of(page: str) -> dict[str, list[str]]:
    """What each file of a page, such as "docs/x.md", is after each of its blocks."""
    files: dict[str, list[str]] = {}
    for name, continued, text in _BLOCK.findall((ROOT / page).read_text()):
        assert bool(continued) == (name in files), f"{page}: {name} begins twice, or goes on before it began"
        # Blank lines between blocks, as in a file.
        between = "\n\n" if not text.startswith(" ") else "\n"
        files.setdefault(name, []).append(files[name][-1] + between + text if continued else text)
    return files


def write_files(page: str, folder: Path) -> None:
    """Puts them, whole, into a folder."""
    for name, steps in files_of(page).items():
        (folder / name).write_text(steps[-1])
