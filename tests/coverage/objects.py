"""Small object files for x86-64, made by the machine's compiler: their functions are known one by one."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from vmodel.coverage.program import Program


@cache
def compiled(source: str, suffix: str = ".s", *flags: str) -> bytes:
    """An object file of assembler (".s") or C (".c"); the test is skipped where there is no compiler for x86-64."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs cc, which this machine has not")
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"source{suffix}"
        path.write_text(source)
        run = subprocess.run(
            [compiler, "-c", "-m64", *flags, path.name, "-o", "object.o"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr
        return (Path(folder) / "object.o").read_bytes()


def program(source: str, name: str = "own") -> Program:
    """The program of assembler text."""
    return Program.of_module(name, compiled(source))


def function(name: str, body: str, *, section: str = ".text", size: bool = True) -> str:
    """Assembler text of a function."""
    return f'.section {section},"ax",@progbits\n.type {name}, @function\n{name}:\n{body}\n' + (
        f".size {name}, .-{name}\n" if size else ""
    )


def texts(of: Program, name: str) -> list[str]:
    """The instructions of a function."""
    return [str(instruction) for instruction in of.function(name).instructions]
