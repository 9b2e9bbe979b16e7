"""Where a kernel's loader puts the sections of modules: what `TextLayout` computes, against what kernels say."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmodel.coverage.program import Program
from vmodel.guest.artifacts import find_kernel
from vmodel.guest.booted import BootedGuest
from vmodel.guest.kbuild import build
from vmodel.guest.modules import in_order, load_module
from vmodel.guest.running import GuestSpec

pytestmark = pytest.mark.guest
SOURCE = Path(__file__).parent / "placed"


def test_sections_are_where_the_kernel_says(kernel: str, tmp_path: Path) -> None:
    """/sys/module/NAME/sections has each section's address; /proc/modules, the begin of the memory for text."""
    chosen = find_kernel(kernel)
    (own,) = build(SOURCE, chosen, tmp_path).modules
    files = {module.name: module.elf for module in in_order(chosen, {"nvme": None})}
    files["placed"] = load_module(own)
    with BootedGuest(GuestSpec(command="", kernel=chosen, modules=["nvme", str(own)])) as guest:

        def rows(script: str) -> list[list[str]]:
            return [line.split() for line in guest.run(script).output.decode().splitlines()]

        bases = {words[0]: int(words[5], 16) for words in rows("cat /proc/modules")}
        for name, elf in files.items():
            program = Program.of_module(name, elf)
            said = dict(rows(f"cd /sys/module/{name}/sections; for f in .[a-z]* _*; do echo $f $(cat $f); done"))
            there = {s.name: int(said[s.name], 16) for s in program.text.sections if s.size}
            init = min((at for section, at in there.items() if section.startswith(".init")), default=None)
            assert init is None or init % 4096 == 0
            assert program.text.loaded(bases[name], init) == there
            if name == "placed":
                assert {".mine.text", ".init.text", ".init.more", ".exit.text"} <= there.keys()
                assert ".altinstr_replacement" in there
                assert there[".init.more"] > there[".init.text"]
