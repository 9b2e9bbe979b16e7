"""`Program`: functions, instructions and branches of modules, against objects whose code is known.

Symbols, relocations and section headers are the System V ABI's (gABI 4, AMD64 supplement 4.4).
"""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tests.coverage.objects import compiled, function, program, texts
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.program import Program


def offset_of(elf: bytes, symbol: str) -> int:
    """A symbol's place in the file, found by the bytes that the tests put there: a mov with a number of its own."""
    at = elf.index(b"\xb8" + struct.pack("<I", int(symbol, 0)))
    assert elf.find(b"\xb8" + struct.pack("<I", int(symbol, 0)), at + 1) < 0
    return at


def test_an_address_is_the_offset_in_the_file() -> None:
    source = function("one", "mov $0x11223344, %eax\nret")
    source += function("two", "mov $0x55667788, %eax\nret", section=".init.text")
    elf = compiled(source)
    found = Program.of_module("own", elf)
    assert {f.name: f.address for f in found.functions} == {
        "one": offset_of(elf, "0x11223344"),
        "two": offset_of(elf, "0x55667788"),
    }
    assert [f.section for f in found.functions] == [".text", ".init.text"]
    assert found.instructions() == {address + add for f in found.functions for address in [f.address] for add in (0, 5)}


def test_the_cold_part_belongs_to_its_function() -> None:
    """It is reached by a jump whose relocation names another section."""
    source = function("probe", "test %edi, %edi\njne probe.cold\nmov $1, %eax\nret")
    source += function("probe.cold", "mov $2, %eax\nret", section=".text.unlikely")
    found = program(source)
    (probe,) = found.functions
    assert texts(found, "probe") == ["test edi, edi", "jne probe.cold", "mov eax, 1", "ret", "mov eax, 2", "ret"]
    (branch,) = found.branches()
    assert branch.address == probe.instructions[1].address
    assert (branch.taken, branch.not_taken) == (probe.instructions[4].address, probe.instructions[2].address)
    assert branch.function is probe
    assert found.function_at(branch.taken) is probe


def test_a_cold_part_belongs_to_the_function_that_jumps_there() -> None:
    """Static functions of two files have the same names: the linker keeps both."""
    source = ""
    for number in (1, 2):
        source += f".text\n.type s{number}, @function\ns{number}: test %edi, %edi\njne c{number}\nret\n"
        source += f".size s{number}, .-s{number}\n"
    for number in (2, 1):
        source += (
            f'.section .text.unlikely,"ax",@progbits\n.type c{number}, @function\nc{number}: mov ${number}, %eax\n'
        )
        source += f"ret\n.size c{number}, .-c{number}\n"
    elf = compiled(source)
    # Both pairs get the same names, in a string table that only this test makes.
    renamed = _renamed(elf, {"s1": "f", "s2": "f", "c1": "f.cold", "c2": "f.cold"})
    found = Program.of_module("own", renamed)
    assert [f.name for f in found.functions] == ["f", "f"]
    assert [str(f.instructions[3]) for f in found.functions] == ["mov eax, 1", "mov eax, 2"]


def _renamed(elf: bytes, names: dict[str, str]) -> bytes:
    """The ELF file with another string table, at its end, and other names of symbols."""
    data = bytearray(elf)
    table, count = struct.unpack_from("<Q", data, 40)[0], struct.unpack_from("<H", data, 60)[0]
    headers = [list(struct.unpack_from("<IIQQQQIIQQ", data, table + 64 * i)) for i in range(count)]
    symtab = next(header for header in headers if header[1] == 2)
    strings = headers[symtab[6]]
    old = bytes(data[strings[4] : strings[4] + strings[5]])
    new = bytearray(old)
    for at in range(symtab[4], symtab[4] + symtab[5], 24):
        start = struct.unpack_from("<I", data, at)[0]
        name = old[start : old.index(b"\0", start)].decode()
        if name in names:
            struct.pack_into("<I", data, at, len(new))
            new += names[name].encode() + b"\0"
    struct.pack_into("<QQ", data, table + 64 * symtab[6] + 24, len(data), len(new))
    return bytes(data + new)


def test_compilers_suffixes_are_functions_of_their_own() -> None:
    source = "".join(function(name, "ret") for name in ("f", "f.part.0", "f.isra.0", "f.constprop.1", "f.part.0.cold"))
    assert [f.name for f in program(source).functions] == ["f", "f.part.0", "f.isra.0", "f.constprop.1"]


def test_a_cold_part_of_nothing_is_a_function() -> None:
    assert [f.name for f in program(function("gone.cold", "ret")).functions] == ["gone.cold"]


def test_nops_in_front_of_functions_are_no_code() -> None:
    source = function("__pfx_f", ".rept 16\nnop\n.endr") + function("f", "ret")
    found = program(source)
    assert [f.name for f in found.functions] == ["f"]
    assert len(found.instructions()) == 1


def test_padding_is_no_code() -> None:
    """Behind a return or a jump, if nothing jumps there; what is fallen into is executed."""
    body = (
        "nop\n1: jmp 2f\n.byte 0x66, 0x90\nnopw 8(%rax)\n2: int3\nnop\nje 3f\nret\nint3\nnop\n3: nop\njmp *%rax\nint3"
    )
    assert texts(program(function("f", body)), "f")[0] == "nop"
    assert [text.split()[0] for text in texts(program(function("f", body)), "f")] == [
        *("nop", "jmp", "int3", "nop", "je", "ret", "nop", "jmp"),
    ]


def test_aliases_are_one_function() -> None:
    """<linux/module.h> names a module's init function a second time: init_module."""
    source = ".globl init_module\n.set init_module, start\n.type init_module, @function\n" + function("start", "ret")
    assert [f.name for f in program(source).functions] == ["start"]
    source = ".globl public\n.set public, private\n.type public, @function\n" + function("private", "ret")
    assert [f.name for f in program(source).functions] == ["public"]


def test_a_symbol_without_size_ends_at_the_next() -> None:
    source = function("first", "nop\nret", size=False) + function("second", "ret", size=False)
    found = program(source)
    assert [(f.name, len(f.instructions)) for f in found.functions] == [("first", 2), ("second", 1)]


def test_an_entry_inside_of_a_function_is_no_other_function() -> None:
    source = ".text\n.type f, @function\nf: nop\n.type inner, @function\ninner: nop\nret\n.size inner, .-inner\n"
    source += "dec %eax\nret\n.size f, .-f\n"
    found = program(source)
    assert [(f.name, len(f.instructions)) for f in found.functions] == [("f", 5)]


def test_a_size_that_is_too_large_ends_with_the_section() -> None:
    source = function("f", "nop\nret", size=False) + ".size f, 0x7fffffffffffffff\n"
    assert len(program(source).function("f").instructions) == 2


def test_what_is_not_in_the_program_is_no_target() -> None:
    source = function("f", "call dma_map\njne stop\ncall *%rax\njmp *8(%rip)\ncall *table(%rip)")
    found = program(source)
    assert texts(found, "f")[:2] == ["call dma_map", "jne stop"]
    assert [i.target for i in found.function("f").instructions] == [None] * 5
    assert found.branches() == []


def test_calls_name_what_they_call() -> None:
    """Also through the symbol of a section, as compilers call static functions of another section."""
    source = function("f", "call .init.text+1\ncall g\njmp g+1") + function("g", "nop\nret", section=".init.text")
    found = program(source)
    g = found.function("g").address
    assert texts(found, "f") == ["call g+0x1", "call g", "jmp g+0x1"]
    assert [i.target for i in found.function("f").instructions] == [g + 1, g, g + 1]


@pytest.mark.parametrize("jump", ["je", "jne", "ja", "jbe", "js", "jrcxz", "jecxz", "loop", "loope", "loopne"])
def test_conditional_jumps_are_branches(jump: str) -> None:
    found = program(function("f", f"{jump} 1f\nnop\n1: ret"))
    (branch,) = found.branches()
    a, b, c = found.function("f").addresses
    assert (branch.address, branch.taken, branch.not_taken) == (a, c, b)


def test_blocks_and_what_follows_them() -> None:
    body = "test %edi, %edi\nje 1f\ncall outside\nnop\n0: dec %esi\njnz 0b\n1: ret"
    found = program(function("f", body))
    a = found.function("f").addresses
    assert [(b.address, len(b.instructions), b.successors) for b in found.function("f").blocks()] == [
        (a[0], 2, (a[2], a[6])),
        (a[2], 2, (a[4],)),
        (a[4], 2, (a[6], a[4])),
        (a[6], 1, ()),
    ]


def test_a_block_may_go_on_in_the_cold_part() -> None:
    source = function("f", "jmp f.cold\n") + function("f.cold", "ret", section=".text.unlikely")
    first, second = program(source).function("f").blocks()
    assert (first.successors, second.successors) == ((second.address,), ())


def test_bytes_that_are_no_instruction_lose_only_themselves() -> None:
    """It goes on where a table of the kernel says that an instruction begins; 0x06 is none in 64-bit mode."""
    body = "nop\n.byte 0x06, 0x06\n1: mov $7, %eax\nret"
    table = '.section .return_sites,"a",@progbits\n.long 1b - .\n'
    found = program(function("f", body) + function("g", "ret") + table)
    assert texts(found, "f") == ["nop", "mov eax, 7", "ret"]
    assert texts(found, "g") == ["ret"]
    (note,) = found.notes
    assert "cannot decode" in note and f"{found.function('f').address + 1:#x}" in note


def test_without_such_a_table_the_next_function_goes_on() -> None:
    found = program(function("f", "nop\n.byte 0x06\nmov $7, %eax\nret") + function("g", "ret"))
    assert (texts(found, "f"), texts(found, "g")) == (["nop"], ["ret"])


@pytest.mark.parametrize(
    ("bytes_", "size"),
    [
        ("0x0f,0xb9,0xcc", 3),
        ("0x0f,0xb9,0x3a", 3),
        ("0x67,0x48,0x0f,0xb9,0x7a,0x10", 6),
        ("0x0f,0xb9,0x44,0x24,8", 5),
        ("0x0f,0xff,0x05,1,2,3,4", 7),
        ("0x0f,0xb9,0x80,1,2,3,4", 7),
        ("0x0f,0xb9,0x04,0x25,1,2,3,4", 8),
    ],
)
def test_undefined_instructions_have_operands(bytes_: str, size: int) -> None:
    """Intel SDM 2, UD0 and UD1 /r: 7.3's warnings and static calls use ud1, and go on behind it."""
    found = program(function("f", f".byte {bytes_}\nret"))
    undefined, ret = found.function("f").instructions
    assert (undefined.size, ret.mnemonic) == (size, "ret")


def test_replacements_of_alternatives_are_no_functions() -> None:
    source = function("f", "ret") + '.section .altinstr_replacement,"ax",@progbits\nnop\nnop\n'
    found = program(source)
    assert [f.name for f in found.functions] == ["f"]
    assert ".altinstr_replacement" in [section.name for section in found.text.sections]


def test_what_belongs_to_an_address() -> None:
    found = program(function("f", "mov $1, %eax\nret") + "\n.balign 64\n" + function("g", "ret"))
    f, g = found.functions
    assert found.function_at(f.address + 4) is f
    assert found.function_at(f.address + 6) is None
    assert found.function_at(f.address - 1) is None
    assert found.function_at(g.address) is g
    assert str(found.instruction(f.address)) == "mov eax, 1"
    with pytest.raises(KeyError):
        found.instruction(f.address + 1)
    with pytest.raises(KeyError):
        found.function("h")


def test_the_build_id() -> None:
    """A note of GNU's, NT_GNU_BUILD_ID (3), whatever its section is called: the kernel's is .notes."""
    note = '.section .note.gnu.build-id,"a",@note\n.long 4, 3, 3\n.asciz "GNU"\n.byte 0xab, 0xcd, 0x01\n'
    assert program(function("f", "ret") + note).build_id == "abcd01"
    assert program(function("f", "ret") + note.replace(".note.gnu.build-id", ".notes")).build_id == "abcd01"


def test_code_without_a_build_id_is_distinct_from_other_code() -> None:
    one, two = program(function("f", "ret")), program(function("f", "nop\nret"))
    assert one.build_id == program(function("f", "ret"), "other").build_id != two.build_id


# ---- files that are wrong ------------------------------------------------------------------


def refused(elf: bytes) -> str:
    with pytest.raises(CoverageError) as error:
        Program.of_module("own", elf)
    assert str(error.value).startswith("own: ") and "\n" not in str(error.value)
    return str(error.value)


def test_no_elf_file() -> None:
    assert "not an ELF file" in refused(b"")
    assert "not an ELF file" in refused(b"MZ")


def test_another_processor() -> None:
    elf = bytearray(compiled(function("f", "ret")))
    struct.pack_into("<H", elf, 18, 183)  # EM_AARCH64
    assert "x86-64" in refused(bytes(elf))


def test_a_program_is_no_module() -> None:
    elf = bytearray(compiled(function("f", "ret")))
    struct.pack_into("<H", elf, 16, 2)  # ET_EXEC
    assert "no kernel module" in refused(bytes(elf))


def test_no_symbols() -> None:
    assert "stripped" in refused(compiled(".text\nret\n"))
    with pytest.raises(CoverageError, match=r"^folder/own\.ko: has no functions "):
        Program.of_module("own", compiled(".text\nret\n"), path=Path("folder/own.ko"))


def test_every_cut_of_a_file_is_refused_or_read() -> None:
    source = function("f", "jne g\ncall h\nret") + function("g", "ret", section=".init.text")
    elf = compiled(source)
    for size in range(0, len(elf) - 1, 7):
        try:
            Program.of_module("own", elf[:size])
        except CoverageError:
            continue
        pytest.fail(f"{size} of {len(elf)} bytes were taken")


def test_every_byte_may_be_wrong() -> None:
    source = function("f", "jne g\ncall h\nret") + function("g", "ret", section=".init.text")
    elf = compiled(source)
    for at in range(len(elf)):
        for wrong in (0, 0xFF, elf[at] ^ 1):
            damaged = elf[:at] + bytes([wrong]) + elf[at + 1 :]
            try:
                found = Program.of_module("own", damaged)
                found.branches()
                for each in found.functions:
                    each.blocks()
            except CoverageError:
                pass
