"""Banks as Python source, SystemRDL and C: what is written means what was read."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("systemrdl", reason="pip install 'vmodel[registers]'")

from tests.examples import examples
from vmodel.machine import load_model
from vmodel.regs import Reg32, RegisterBank
from vmodel.spec import load_path
from vmodel.spec.draft import build
from vmodel.spec.header import c_header
from vmodel.spec.rdl_text import rdl_text
from vmodel.spec.source import python_source
from vmodel.spec.svd_text import svd_text
from vmodel.spec.systemrdl import read_systemrdl
from vmodel.spec.tables import html_page, markdown

EXAMPLE = Path(__file__).parents[2] / "examples/registers/card.rdl"
PROPERTIES = (
    "sw = rw;",
    "sw = r; hw = rw;",
    "sw = w; hw = r;",
    "onwrite = woclr;",
    "onwrite = woset; onread = rclr;",
    "onwrite = wzt; onread = rset;",
    "onwrite = wclr;",
    "sw = r; hw = rw; onread = rclr;",
)
texts = st.sampled_from(["", "Short.", 'He said "no" to it', "C:\\temp 'x'", '"""', "so " * 60, "é */ /* ??/"])


@st.composite
def registers(draw: st.DrawFn, name: str) -> str:
    width = draw(st.sampled_from([8, 16, 32, 64]))
    fields, at = [], draw(st.integers(0, 3))
    while at < width and len(fields) < 5:
        size = draw(st.integers(1, width - at))
        properties, doc = draw(st.sampled_from(PROPERTIES)), draw(texts)
        properties += draw(st.sampled_from(["", "", "encode = speed_e;", "encode = Status;"])) if size > 1 else ""
        reset = draw(st.integers(0, (1 << size) - 1))
        fields.append(
            f"field {{ {described(doc)} {properties} }} \\F{len(fields)}[{at + size - 1}:{at}] = 0x{reset:x};"
        )
        at += size + draw(st.integers(0, 4))
    array = draw(st.sampled_from(["", "[2]", "[2][3]"]))
    return f"reg {{ {described(draw(texts))} regwidth = {width}; {' '.join(fields)} }} {name}{array};"


def described(doc: str) -> str:
    escaped = doc.replace("\\", "\\\\").replace('"', '\\"')
    return f'desc = "{escaped}";' if doc else ""


@st.composite
def address_maps(draw: st.DrawFn) -> str:
    names = ["RO", "size", "Status", "in", "r1", "lower_case", "_x", "STATUS"]
    inner = " ".join(
        draw(registers(f"\\{name}"))
        for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    )
    outer = " ".join(
        draw(registers(f"\\{name}"))
        for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
    )
    ram = "external mem { mementries = 4; memwidth = 32; } BUFFER @ 0x8000;" if draw(st.booleans()) else ""
    files = draw(st.sampled_from(["", "file_t ONE @ 0x4000;", "file_t MANY[2][2] @ 0x4000 += 0x400;"]))
    enums = (
        f"enum speed_e {{ SLOW = 0 {{ {described(draw(texts))} }}; \\in = 2; _x = 3; }}; enum Status {{ mro = 1; }};"
    )
    return f"{enums} regfile file_t {{ {inner} }}; addrmap card {{ {described(draw(texts))} {outer} {files} {ram} }};"


def loaded(text: str, folder: Path) -> Any:
    (folder / "card.rdl").write_text(text)
    return build(read_systemrdl(folder / "card.rdl", None))


def ruff(*arguments: str, text: str) -> str:
    program = Path(sys.executable).with_name("ruff")
    if not program.exists():
        pytest.skip("ruff is not installed")
    options = ["--isolated", "--no-cache", "--line-length", "120", "--stdin-filename", "regs.py", "-"]
    return subprocess.run(
        [program, *arguments, *options], input=text, text=True, capture_output=True, check=True
    ).stdout


def executed(source: str, name: str) -> type[RegisterBank]:
    space: dict[str, Any] = {}
    exec(source, space)
    found: type[RegisterBank] = space[name]
    return found


def everything(bank: type[RegisterBank]) -> Any:
    """All that a bank says."""
    return list(bank.describe()), [(m.name, m.offset, m.size, m.mode) for m in bank.memories], bank.size


def normal(doc: str | None) -> str:
    return " ".join((doc or "").split())


@settings(max_examples=examples(100), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(address_maps())
def test_source_and_rdl_are_the_loaded_bank(tmp_path: Path, text: str) -> None:
    bank = loaded(text, tmp_path)
    source = python_source(bank, "card.rdl")
    imported = executed(source, bank.__name__)
    assert everything(imported) == everything(bank)
    assert normal(imported.__doc__) == normal(bank.__doc__)
    assert python_source(imported, "card.rdl") == source
    again = rdl_text(bank)
    assert rdl_text(imported) == again
    back = loaded(again, tmp_path)
    assert everything(back) == everything(bank) and back.__name__ == bank.__name__
    assert rdl_text(back) == again


@settings(max_examples=examples(15), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(address_maps())
def test_source_is_formatted(tmp_path: Path, text: str) -> None:
    source = python_source(loaded(text, tmp_path), "card.rdl")
    assert ruff("format", text=source) == source
    ruff("check", "--select", "F,I,W", text=source)


def compiled(header: str, folder: Path, checks: str, *options: str) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    (folder / "regs.h").write_text(header)
    (folder / "check.c").write_text(f'#include "regs.h"\n#include "regs.h"\n{checks}\nint main(void) {{ return 0; }}\n')
    done = subprocess.run(
        [compiler, "-Wall", "-Wextra", "-Werror", *options, "-c", "-o", "/dev/null", "check.c"],
        cwd=folder, text=True, capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@settings(max_examples=examples(10), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(address_maps())
def test_any_header_compiles(tmp_path: Path, text: str) -> None:
    header = c_header("card", [(0, 0x100, loaded(text, tmp_path))])
    outside = re.sub(r"/\*.*?\*/", "", header)
    assert all(line.startswith("#") for line in outside.splitlines() if line.strip())
    compiled(header, tmp_path, "", "-std=c11", "-pedantic")


@pytest.mark.parametrize("options", [("-std=c11", "-pedantic"), ("-std=gnu89", "-ffreestanding", "-nostdinc")])
def test_what_a_header_says(options: tuple[str, ...], tmp_path: Path) -> None:
    """The second options are about a kernel's."""
    header = c_header("Timers", [(0, 0x1000, build(read_systemrdl(EXAMPLE, None)))])
    expected = {
        "TIMERS_BAR": 0,
        "TIMERS_ID": 0x1000,
        "TIMERS_ID_RESET": 0xCA4D0001,
        "TIMERS_STATUS": 0x1004,
        "TIMERS_STATUS_EXPIRED_MASK": 0xF,
        "TIMERS_STATUS_EXPIRED_SHIFT": 0,
        "TIMERS_STATUS_EXPIRED(0x13)": 3,
        "TIMERS_TIMER_CONTROL(3)": 0x1070,
        "TIMERS_TIMER_PERIOD(1 + 1)": 0x1064,
        "TIMERS_TIMER_CONTROL_RUNNING": 0x100,
        "TIMERS_TIMER_COUNT_VALUE_MASK": 0xFFFF,
        "TIMERS_SCRATCH": 0x1100,
        "TIMERS_SCRATCH_SIZE": 0x100,
    }
    checks = "".join(
        f"extern char check{n}[{name} == {value:#x} ? 1 : -1];\n" for n, (name, value) in enumerate(expected.items())
    )
    compiled(header, tmp_path, checks, *options)


@pytest.mark.parametrize("name", ["edu", "nvme", "idio16"])
def test_built_in_models(name: str, tmp_path: Path) -> None:
    """What SystemRDL cannot say of them is lost once: after that, it is the same text."""
    banks = [slot.bank for slot in load_model(name).declaration.banks.values()]
    compiled(c_header(name, [(0, 0x1000 * n, bank) for n, bank in enumerate(banks)]), tmp_path, "", "-std=c11")
    for bank in banks:
        first = loaded(rdl_text(bank), tmp_path)
        assert [(r.name, r.offset, r.width) for r in first.registers] == [
            (r.name, r.offset, r.width) for r in bank.registers
        ]
        assert all(
            a.writes == b.writes and a.reads == b.reads for a, b in zip(first.registers, bank.registers, strict=True)
        )
        assert rdl_text(loaded(rdl_text(first), tmp_path)) == rdl_text(first)
        assert everything(executed(python_source(bank, name), bank.__name__)) == everything(bank)


NAMED = """
enum speed_e { SLOW = 0 { desc = "up to 1 m"; }; FAST = 3 { name = "full speed"; }; };
addrmap card {
  reg {
    field { encode = speed_e; } SPEED[5:4] = 3;
    field { encode = speed_e; } OTHER[7:6] = 0;
    enum side_e { LEFT = 0; RIGHT = 1; };
    field { encode = side_e; } SIDE[8:8] = 0;
  } CONTROL @ 0;
};
"""


def named_values(bank: Any) -> list[list[tuple[str, int, str]]]:
    return [[(v["name"], v["value"], v["doc"]) for v in field["values"]] for field in next(bank.describe())["fields"]]


def test_names_of_values(tmp_path: Path) -> None:
    """SystemRDL: `encode`; SVD: enumeratedValues.  In C they are not shifted, as for FIELD_PREP of Linux."""
    bank = loaded(NAMED, tmp_path)
    speed, side = [("SLOW", 0, "up to 1 m"), ("FAST", 3, "full speed")], [("LEFT", 0, ""), ("RIGHT", 1, "")]
    assert named_values(bank) == [speed, speed, side]
    control = bank.CONTROL.layout
    assert control.SPEED.values is control.OTHER.values and control.SPEED.values.FAST == 3
    assert named_values(executed(python_source(bank, "card.rdl"), bank.__name__)) == [speed, speed, side]
    assert named_values(loaded(rdl_text(bank), tmp_path)) == [speed, speed, side]
    (tmp_path / "card.svd").write_text(svd_text("Card", "", [(0, bank)]))
    assert named_values(load_path(tmp_path / "card.svd")) == [speed, speed, side]
    checks = "".join(
        f"extern char check{n}[{name} == {value} ? 1 : -1];\n"
        for n, (name, value) in enumerate(
            {
                "CARD_CONTROL_SPEED_SLOW": 0,
                "CARD_CONTROL_SPEED(CARD_CONTROL_SPEED_FAST)": 0x30,
                "CARD_CONTROL_OTHER_FAST": 3,
                "CARD_CONTROL_SIDE": 0x100,
                "CARD_CONTROL_SIDE_RIGHT": 1,
            }.items()
        )
    )
    compiled(c_header("card", [(0, 0, bank)]), tmp_path, checks)
    assert "<td>.SPEED = 3</td>" in html_page("Card", "", [(0, 0, bank)])
    assert "| .SPEED = 3 |  |  | FAST: full speed |" in markdown("Card", "", [(0, 0, bank)])


def test_svd(tmp_path: Path) -> None:
    bank = build(read_systemrdl(EXAMPLE, None))
    path = tmp_path / "card.svd"
    path.write_text(svd_text("Timers", "A card.", [(1 << 32, bank)]))
    back = load_path(path)
    assert [(r.offset, r.width, r.reset, r.writes, r.reads, r.doc) for r in back.registers] == [
        (r.offset, r.width, r.reset, r.writes, r.reads, r.doc) for r in bank.registers
    ]
    assert [r.name for r in back.registers if r.offset == 0x64] == ["TIMER_2.PERIOD"]
    assert back.STATUS.layout.EXPIRED.doc == "timer n has expired"


def test_tables() -> None:
    class Odd(RegisterBank, size=8):
        """A <b>bank</b> | with marks."""

        A = Reg32(0, doc="<script>alert(1)</script> | `x`")

    page = html_page("<Card>", "a & b", [(0, 0x10, Odd)])
    assert "<script>" not in page and "&lt;script&gt;alert(1)" in page and "<td>0x10</td><td>32</td><td>A</td>" in page
    text = markdown("Card", "a", [(2, 0x10, Odd)])
    row = next(line for line in text.splitlines() if line.startswith("| 0x10 "))
    assert row.replace("\\|", "").count("|") == 7 and "\\<script\\>" in row and "## Odd, BAR2" in text


def vmodel(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "vmodel", *arguments], cwd=folder, text=True, capture_output=True, check=False
    )


def test_the_command(tmp_path: Path) -> None:
    shutil.copy(EXAMPLE, tmp_path / "card.rdl")
    done = vmodel("regs", "import", "card.rdl", folder=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    bank = build(read_systemrdl(EXAMPLE, None))
    assert done.stdout == python_source(bank, "card.rdl")
    assert vmodel("regs", "edu", "--format", "c", folder=tmp_path).stdout.startswith("/* Registers of Edu;")
    for to, begins in (("svd", "<?xml"), ("html", "<!DOCTYPE html>"), ("md", "# Edu")):
        assert vmodel("regs", "edu", "--format", to, folder=tmp_path).stdout.startswith(begins)
    assert "addrmap EduRegs {" in vmodel("regs", "edu", "--format", "rdl", folder=tmp_path).stdout
    for arguments, said in (
        (("import",), "regs import needs a file"),
        (("import", "none.rdl"), "none.rdl: cannot be read: No such file or directory"),
        (("import", "card.rdl", "--name", "crad"), "card.rdl: it has no address map crad; did you mean card?"),
        (("edu", "card.rdl"), "a FILE and --name are for vmodel regs import"),
    ):
        done = vmodel("regs", *arguments, folder=tmp_path)
        assert (done.returncode, done.stdout) == (2, "") and said in done.stderr and done.stderr.count("\n") == 1
