"""Kernel arguments with which stock kernels find more: memory that is used after it was freed, or beside its bounds.

All are compiled into Debian's kernels and off by default.  Together they cost some MiB, and little time where a
driver waits for its card.
"""

from __future__ import annotations

#: By argument: what it does.
ARGUMENTS = {
    # setup_slub_debug in mm/slub.c.  Caches with these flags are not merged with others, and bypass the lists of free
    # objects that each CPU has, in which 7.3 notices no double free.
    "slub_debug=FZPU": "each object of the slab allocators has red zones, is filled when it is freed, is checked when "
    "it is allocated and freed, and has the stacks of both",
    # mm/page_poison.c.  It takes precedence over init_on_alloc, which is on in Debian's kernels, and init_on_free
    # (mem_debugging_and_hardening_init in mm/mm_init.c): so init_on_free=1 beside it would do nothing.
    "page_poison=1": "each page is filled when it is freed, and checked when it is allocated",
    # mm/kfence/core.c.  CONFIG_KFENCE_SAMPLE_INTERVAL is 0 in Debian's kernels: off.  In milliseconds.
    "kfence.sample_interval=10": "every 10 ms an object lies between guard pages: a wrong access, also one that only "
    "reads, is reported where it happens",
}


def with_sanitizers(append: str) -> str:
    """Kernel arguments with those of ARGUMENTS before them, so that those in `append` take precedence."""
    return " ".join([*ARGUMENTS, *filter(None, (append,))])
