"""What is read from a kernel's image is what the running kernel has: its symbols, and where struct module has what."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path

import pytest

from tests.guest.kernels import CHOSEN, WITH_CLOUD, is_there
from vmodel.coverage.kernel_image import KernelImage
from vmodel.guest.artifacts import CLOUD, find_kernel
from vmodel.guest.booted import BootedGuest
from vmodel.guest.running import GuestSpec

pytestmark = pytest.mark.guest
#: The kernel's symbols without those of modules: serial ports are slow, so the guest says how many, and a digest.
SYMBOLS = "grep -v '\\[' /proc/kallsyms > /tmp/symbols && wc -l < /tmp/symbols && md5sum < /tmp/symbols"


#: A module that says where struct module has what, as the compiler sees it.
MODULE = """
#include <linux/module.h>
#include <linux/stddef.h>

#define AT(member) ((int)offsetof(struct module, member))

static int __init layout_init(void)
{
    pr_alert("struct module: %d %d %d %d %d %d\\n", (int)sizeof(struct module), AT(name), AT(mem[MOD_TEXT].base),
             AT(mem[MOD_TEXT].size), AT(mem[MOD_INIT_TEXT].base), AT(mem[MOD_INIT_TEXT].size));
    return 0;
}
module_init(layout_init);

static void __exit layout_exit(void)
{
}
module_exit(layout_exit);

MODULE_DESCRIPTION("Says where struct module has what");
MODULE_LICENSE("GPL");
"""


@pytest.mark.parametrize("kernel", WITH_CLOUD)
def test_symbols(kernel: str) -> None:
    """Each address, type and name, in order.  With nokaslr the kernel is at its link addresses."""
    if not is_there(kernel):
        pytest.skip(f"no kernel {kernel} in the cache")
    found = find_kernel(kernel)
    with BootedGuest(GuestSpec(command="", kernel=found, append="nokaslr")) as guest:
        done = guest.run(SYMBOLS)
        assert done.status == 0, done.output
    count, digest, _ = done.output.decode().split()
    symbols = KernelImage.load(found.image).symbols
    text = "".join(f"{address:016x} {kind} {name}\n" for address, kind, name in symbols)
    assert (int(count), digest) == (len(symbols), hashlib.md5(text.encode()).hexdigest())
    code = [symbol for symbol in symbols if symbol[1] in "tTwW"]
    assert len(code) > 100_000
    # All of them are functions but ends of sections, and what is in 7.3's .data.
    functions = {(address, name) for address, _, name in symbols.functions()}
    data = range(symbols.address("_sdata"), symbols.address("_edata") + 1)
    outside = {name for address, _, name in code if (address, name) not in functions and address not in data}
    assert outside <= {"_etext", "__static_call_text_end", "__inittext_end", "__end_rodata"}


@pytest.mark.parametrize("kernel", [name for name in CHOSEN if name != CLOUD])
def test_where_a_module_has_what(kernel: str, tmp_path: Path) -> None:
    """The same as the compiler sees from the kernel's headers."""
    found = find_kernel(kernel)
    source = tmp_path / "layout"
    source.mkdir()
    (source / "Kbuild").write_text("obj-m := layout.o\n")
    (source / "layout.c").write_text(MODULE)
    with BootedGuest(GuestSpec(command="", kernel=found, modules=[f"{source}/"])) as guest:
        log = guest.dmesg()
    said = re.search(r"struct module: ([\d ]+)", log)
    assert said, log
    assert tuple(map(int, said[1].split())) == dataclasses.astuple(KernelImage.load(found.image).module_layout)
