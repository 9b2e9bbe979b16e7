"""SystemRDL 2.0 files as banks: what software sees follows the standard, the rest is refused with file and line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("systemrdl", reason="needs the extra `registers`")

from vmodel.errors import ConfigError
from vmodel.modes import Mode
from vmodel.spec import load, reading
from vmodel.spec.draft import build
from vmodel.spec.systemrdl import read_systemrdl


def made(text: str, folder: Path, name: str | None = None) -> Any:
    path = folder / "card.rdl"
    path.write_text(text)
    return build(read_systemrdl(path, name))


def refused(text: str, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        made(text, folder)
    said = str(caught.value)
    assert "\n" not in said
    return said.removeprefix(f"{folder / 'card.rdl'}: ")


@pytest.mark.parametrize(
    ("properties", "mode"),
    [
        # 9.4: sw is rw by default.
        ("", "RW"),
        ("sw = r;", "RO"),
        # A field that software cannot read gives 0; what is written goes to the hook.
        ("sw = w;", "WO"),
        # 9.6: what reads and writes do besides.
        ("rclr;", "WRC"),
        ("onread = rset;", "WRS"),
        ("sw = r; rclr;", "RC"),
        ("sw = r; onread = rset;", "RS"),
        ("woclr;", "W1C"),
        ("woset;", "W1S"),
        ("onwrite = wot;", "W1T"),
        ("onwrite = wzs;", "W0S"),
        ("onwrite = wzc;", "W0C"),
        ("onwrite = wzt;", "W0T"),
        ("onwrite = wclr;", "WC"),
        ("onwrite = wset;", "WS"),
        ("onwrite = woclr; onread = rset;", "W1CRS"),
        ("sw = w; woset;", "WO"),
        # The hardware's side is the model's work.
        ("sw = r; hw = rw; we; counter; incrvalue = 2; threshold = 3;", "RO"),
        ("intr; woclr;", "W1C"),
        ("hwset; hwclr; swmod; swacc; anded; precedence = hw;", "RW"),
    ],
)
def test_access_modes(properties: str, mode: str, tmp_path: Path) -> None:
    card = made(f"addrmap card {{ reg {{ field {{ {properties} }} F[3:0] = 0; }} R; }};", tmp_path)
    assert (card.R.layout.F.mode or card.R.mode) is Mode[mode]
    assert card.R.mask(Mode.RO) & 0xFFFF_FFF0 == 0xFFFF_FFF0


@pytest.mark.parametrize(
    ("properties", "mode"),
    [
        # What they do is for a hook.
        ("onwrite = wuser;", "RW"),
        ("onread = ruser;", "RW"),
        # 9.6: it is written as 1 and is 0 again: what is left of it is the call of the hook.
        ("singlepulse;", "WO"),
    ],
)
def test_access_modes_of_external_bits(properties: str, mode: str, tmp_path: Path) -> None:
    card = made(f"addrmap card {{ external reg {{ field {{ {properties} }} F[0:0] = 0; }} R @ 0; }};", tmp_path)
    assert card.R.layout.F.mode is Mode[mode] or (card.R.mode, mode) == (Mode.RW, "RW")


def test_reset_values(tmp_path: Path) -> None:
    card = made(
        "addrmap card { reg { field {} A[3:0] = 5; field { reset = 0x7; } B[6:4]; field {} C[7:7];"
        " field { sw = w; } D[15:8] = 0xFF; field { sw = r; hw = na; } E[31:24] = 0xAB; } R; };",
        tmp_path,
    )
    # C has none; D cannot be read.
    assert card.R.reset == 0xAB00_0075


def test_the_hierarchy(tmp_path: Path) -> None:
    card = made(
        """
        addrmap part {
            reg { regwidth = 16; field {} F[15:0]; } R[2] @ 4 += 4;
            external mem { mementries = 4; memwidth = 32; } M @ 0x10;
        };
        addrmap card {
            desc = "A
                card.";
            reg plain { desc = "One of several."; field { desc = "A field."; } F[8]; };
            plain A @ 0;
            plain B[2][3] @ 0x10;
            regfile {
                regfile { plain A; } INNER[2];
                reg { regwidth = 64; field {} F[63:0]; } WIDE @ 8;
            } OUTER[2] @ 0x40 += 0x20;
            part PARTS[2] @ 0x100 += 0x80;
            external mem { mementries = 8; memwidth = 8; sw = r; } ROM @ 0x200;
        };
        """,
        tmp_path,
    )
    assert card.__name__ == "CardRegs" and card.__doc__ == "A card." and card.size == 0x208
    assert [(r.name, r.offset, r.width) for r in card.registers] == [
        ("A", 0, 32),
        *((f"B[{n}][{m}]", 0x10 + 12 * n + 4 * m, 32) for n in range(2) for m in range(3)),
        *(
            (f"OUTER[{n}].{name}", 0x40 + 0x20 * n + at, width)
            for n in range(2)
            for name, at, width in (("INNER[0].A", 0, 32), ("INNER[1].A", 4, 32), ("WIDE", 8, 64))
        ),
        *((f"PARTS[{n}].R[{m}]", 0x104 + 0x80 * n + 4 * m, 16) for n in range(2) for m in range(2)),
    ]
    assert [(m.name, m.offset, m.size, m.mode.name) for m in card.memories] == [
        ("PARTS[0].M", 0x110, 16, "RW"),
        ("PARTS[1].M", 0x190, 16, "RW"),
        ("ROM", 0x200, 8, "RO"),
    ]
    assert (card.A.doc, card.A.layout.F.doc) == ("One of several.", "A field.")
    assert card.OUTER[1].INNER[0].A.offset == 0x60
    assert build(read_systemrdl(tmp_path / "card.rdl", "part")).__name__ == "PartRegs"


def test_names_that_python_or_vmodel_use(tmp_path: Path) -> None:
    card = made(
        "addrmap card { reg { field {} value[0:0]; field {} in[1:1]; field {} __x[2:2]; } size @ 0;"
        " reg { field {} F[0:0]; } RO @ 4; reg Status { field {} F[0:0]; } Status @ 8; };",
        tmp_path,
    )
    assert [r.name for r in card.registers] == ["size_", "RO_", "Status"]
    assert [f.name for f in card.size_.fields] == ["value_", "in_", "n__x"]
    assert card.Status.layout.__name__ == "Status2"  # an attribute of that name hides a class of that name


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("addrmap card {\n reg { field {\n sw = rw1; } F; } R; };", "line 3: card.R.F: sw has no meaning here: rw1"),
        ("addrmap card { reg { field { swwe; } F; } R; };", "line 1: card.R.F: swwe has no meaning here"),
        ("addrmap card { reg { field {} F; field {} G; F->swwel = G; } R; };", "swwel has no meaning here"),
        ("addrmap card { bigendian; reg { field {} F; } R; };", "line 1: card: bigendian has no meaning here"),
        ("addrmap card { msb0; reg { field {} F; } R; };", "msb0 has no meaning here"),
        ("addrmap card { signal { activehigh; } s; reg { field { resetsignal = s; } F; } R; };", "resetsignal has no"),
        ("addrmap card { reg { field {} F; field {} G; F->reset = G; } R; };", "reset has no meaning here: a reset"),
        ("addrmap card { reg { regwidth = 128; field {} F; } R; };", "regwidth = 128: a register here has 8, 16, 32"),
        ("addrmap card { reg t { field {} F; }; t A; alias A t B; };", "alias has no meaning here"),
        ("addrmap card { reg { field { sw = w; onwrite = wot; } F; } R; };", "onwrite has no meaning here: wot of a"),
        ("addrmap card { external mem { mementries = 1; memwidth = 8; sw = w; } M; };", "a memory is rw or r, not w"),
        ("addrmap card { reg { regwidth = 32; field {} F; } R @ 2; };", "line 1"),
        ("addrmap card { reg { field {} F; } R[1000000]; };", "line 1: card.R: Array: more than 65536 elements"),
        ("addrmap card { reg { field {} F; } A; reg { field {} F; } B @ 0x10000000; };", "a bank has at most 16 MiB"),
        ("addrmap card { regfile { reg { field {} F; } R[1000]; } A[1000]; };", "more than 65536 registers"),
        ("addrmap card {\n\n reg { field {} F } R; };", "line 3: "),
        ("addrmap card {", "line 1: "),
        ("", "has no address map"),
        ("reg t { field {} F; };", "has no address map"),
        ("addrmap card { reg { nonsense = 1; field {} F; } R; };", "line 1: "),
        ("<%= `id` %>", "line 1: embedded Perl is not run: expand it first"),
        ("`include \"/dev/zero\"\n", ""),
        ("`include \"nothing.rdl\"\n", "line 1: "),
        ("addrmap card { reg { field {} F; } \\\x1b[31m; };", "line 1: "),
        ("addrmap card { reg { field {} F[2:0]; field {} G[1:1]; } R; };", "line 1: "),
        ("addrmap card { reg { field {} F; } R @ (1/0); };", "line 1: "),
        (
            "reg r0 { field {} F; };\n"
            + "".join(f"regfile r{n} {{ {' '.join(f'r{n - 1} m{k};' for k in range(8))} }};\n" for n in range(1, 15))
            + "addrmap card { r14 x; };",
            "components, more than 65536",
        ),
    ],
)  # fmt: skip
def test_files_that_are_refused(text: str, said: str, tmp_path: Path) -> None:
    assert said in refused(text, tmp_path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a specification of registers is a"):
        load(tmp_path / "card.txt")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_systemrdl(tmp_path / "none.rdl", None)
    (tmp_path / "big.rdl").write_text("//" + " " * (5 << 20))
    with pytest.raises(ConfigError, match="larger than 4 MiB"):
        read_systemrdl(tmp_path / "big.rdl", None)
    (tmp_path / "latin.rdl").write_bytes(b"// \xff\n")
    with pytest.raises(ConfigError, match="line 1: is not UTF-8"):
        read_systemrdl(tmp_path / "latin.rdl", None)


def test_an_address_map_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"it has no address map crad; did you mean card\?"):
        made("addrmap card { reg { field {} F; } R; };", tmp_path, "crad")


def test_a_file_that_takes_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text macros of text macros: each line doubles the text."""
    monkeypatch.setattr(reading, "CPU_SECONDS", 2)
    lines = "".join(f"`define M{n} `M{n - 1} `M{n - 1}\n" for n in range(1, 60))
    path = tmp_path / "card.rdl"
    path.write_text(f"`define M0 field {{}} F;\n{lines}addrmap card {{ reg {{ `M59 }} R; }};")
    with pytest.raises(ConfigError, match=r"takes more than 2 s of a CPU, or 2048 MiB of memory"):
        load(path)


def test_it_is_read_in_a_process_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "card.rdl"
    path.write_text("addrmap card { reg { field {} F; } R; };")
    assert load(path).R.layout.F.mask == 1
    path.write_text("addrmap card { reg { field { swwe; } F; } R; };")
    with pytest.raises(ConfigError, match=r"card.rdl: line 1: card.R.F: swwe has no meaning here") as caught:
        load(path)
    assert str(caught.value).count("card.rdl") == 1


def test_included_files(tmp_path: Path) -> None:
    (tmp_path / "part.rdl").write_text("reg part { field {} F; };\n")
    assert made('`include "part.rdl"\naddrmap card { part R; };', tmp_path).R.offset == 0
    (tmp_path / "part.rdl").write_text("<% system('touch made') %> reg part { field {} F; };\n")
    refused('`include "part.rdl"\naddrmap card { part R; };', tmp_path)
    assert not list(tmp_path.glob("made"))
