"""Builds vmodel._vmshim from the C files beside it (cffi, API mode); setup.py names `ffi`.

The declarations come from vmshim.h itself, between its CDEF markers, so that they exist once.
"""

import re
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
#: Lower files first: each calls, and includes the headers of, only those before it (tests/unit/test_layers.py).
SOURCES = [
    "span_tree.c",
    "budget.c",
    "node_pool.c",
    "mapping_tree.c",
    "backing.c",
    "files.c",
    "dirty.c",
    "guest_memory.c",
    "domain.c",
    "pgtable.c",
    "stale.c",
    "span_set.c",
    "page_uses.c",
    "ledger.c",
    "requester.c",
    "dma.c",
    "pin.c",
    "eventfd.c",
    "func.c",
    "stream.c",
    "sleep.c",
    "channel.c",
    "store.c",
    "workers.c",
    "nvme_command.c",
    "nvme.c",
    "viommu.c",
]


def declarations() -> str:
    """The part of vmshim.h that cffi reads, each #define's value left for the compiler to tell."""
    text = (HERE / "vmshim.h").read_text()
    match = re.search(r"/\* CDEF-BEGIN \*/(.*)/\* CDEF-END \*/", text, re.DOTALL)
    if match is None:
        raise RuntimeError("vmshim.h has lost its CDEF markers")
    return re.sub(r"(?m)^(#define\s+\w+)\s.*$", r"\1 ...", match.group(1))


ffi = FFI()
# Array sizes must be numbers for cffi's parser.
ffi.cdef(declarations().replace("accesses[VMS_BATCH]", "accesses[...]"))
ffi.set_source(
    "vmodel._vmshim",
    '#include "vmshim.h"',
    # Relative to the project's root, where setuptools runs: absolute paths would end up in the sdist.
    sources=[f"c_shim/{name}" for name in SOURCES],
    include_dirs=["c_shim"],
    extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
    libraries=["pthread"],
)

if __name__ == "__main__":
    ffi.compile(tmpdir=str(HERE.parent), verbose=True)
