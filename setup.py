"""Only here because cffi's API mode hooks into setuptools by keyword; all else is in pyproject.toml."""

from setuptools import setup

setup(
    cffi_modules=["c_shim/build.py:ffi"],
    # cffi builds for the stable ABI of Python 3.11: the wheel's name says so.
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
