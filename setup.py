"""What pyproject.toml cannot say: cffi hooks into setuptools by keyword, and folders are found by walking."""

import os

from setuptools import Extension, setup


def documents():
    """In a wheel: the documents and examples, below share/doc, so that their links to each other work."""
    found = [("share/doc/vmodel", ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"])]
    for top in ("ci", "docs", "examples"):
        for folder, folders, files in os.walk(top):
            # Not what tests and builds leave there.
            unwanted = ("__pycache__", "artifacts", "build")
            folders[:] = sorted(name for name in folders if name not in unwanted and not name.endswith(".runs"))
            files = [f"{folder}/{name}" for name in sorted(files) if not name.startswith(".")]
            found.append((f"share/doc/vmodel/{folder}", files))
    return found


setup(
    cffi_modules=["c_shim/build.py:ffi"],
    # No module of Python's: QEMU loads it.
    ext_modules=[
        Extension(
            "vmodel._coverage_plugin",
            ["c_shim/coverage/plugin.c"],
            depends=["c_shim/coverage/log.h"],
            extra_compile_args=["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden"],
            py_limited_api=True,
        )
    ],
    data_files=documents(),
    # cffi builds for the stable ABI of Python 3.11: the wheel's name says so.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
