"""Only here because cffi's API mode hooks into setuptools by keyword; all else is in pyproject.toml."""

from setuptools import setup

setup(cffi_modules=["c_shim/build.py:ffi"])
