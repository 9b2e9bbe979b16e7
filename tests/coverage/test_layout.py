"""`TextLayout`: Linux's kernel/module/main.c, layout_sections() and __layout_sections(), as in 6.12 and 7.3."""

from __future__ import annotations

from tests.coverage.objects import function, program

TEXT, INIT = 0xFFFFFFFFC0200000, 0xFFFFFFFFC0300000


def sections(*names: str) -> str:
    """A function in each section; each with 5 bytes, the second and following ones aligned to 16."""
    return "".join(
        f'.section {name},"ax",@progbits\n.balign 16\n' + function(f"f{n}", "mov $1, %eax", section=name)
        for n, name in enumerate(names)
    )


def test_sections_are_in_the_order_of_their_headers_and_aligned() -> None:
    found = program(sections(".text", ".init.text", ".text.unlikely", ".exit.text", ".noinstr.text", ".initial"))
    assert found.text.loaded(TEXT, INIT) == {
        ".text": TEXT,
        ".init.text": INIT,
        ".text.unlikely": TEXT + 16,
        ".exit.text": TEXT + 32,
        ".noinstr.text": TEXT + 48,
        ".initial": INIT + 16,  # module_init_section(): what begins with .init
    }


def test_what_is_not_code_has_no_place_in_between() -> None:
    source = sections(".text") + '.section .data.a,"aw"\n.zero 100\n.section .rodata.a,"a"\n.zero 50\n'
    source += '.section .discard.x,"",@progbits\n.zero 30\n' + sections(".text.unlikely").replace("f0", "g0")
    found = program(source)
    assert found.text.loaded(TEXT, INIT) == {".text": TEXT, ".text.unlikely": TEXT + 16}


def test_replacements_of_alternatives_take_space() -> None:
    """They have SHF_EXECINSTR: the kernel loads them with the rest."""
    source = sections(".text") + '.section .altinstr_replacement,"ax"\n.zero 21\n'
    source += sections(".text.unlikely").replace("f0", "g0")
    loaded = program(source).text.loaded(TEXT, INIT)
    assert loaded == {".text": TEXT, ".altinstr_replacement": TEXT + 5, ".text.unlikely": TEXT + 32}


def test_addresses_in_memory_become_addresses_in_the_file() -> None:
    found = program(sections(".text", ".init.text", ".text.unlikely"))
    first, init, unlikely = (found.function(f"f{n}").address for n in range(3))
    of = found.text.address_of
    assert of(TEXT, INIT, TEXT) == first
    assert of(TEXT, INIT, TEXT + 4) == first + 4
    assert of(TEXT, INIT, TEXT + 5) is None  # between two sections
    assert of(TEXT, INIT, TEXT + 16) == unlikely
    assert of(TEXT, INIT, TEXT + 21) is None
    assert of(TEXT, INIT, TEXT - 1) is None
    assert of(TEXT, INIT, INIT + 1) == init + 1
    assert of(TEXT, None, INIT + 1) is None


def test_a_range_may_span_sections() -> None:
    found = program(sections(".text", ".text.unlikely"))
    first, second = (found.function(f"f{n}").address for n in range(2))
    assert found.text.ranges_of(TEXT, None, [(TEXT - 9, TEXT + 99)]) == [(first, first + 5), (second, second + 5)]
    assert found.text.ranges_of(TEXT, None, [(TEXT + 3, TEXT + 17)]) == [(first + 3, first + 5), (second, second + 1)]
    assert found.text.ranges_of(TEXT, None, [(TEXT + 5, TEXT + 16), (0, TEXT), (TEXT + 21, 1 << 64)]) == []
