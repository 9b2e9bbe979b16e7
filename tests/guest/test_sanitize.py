"""With `sanitize`, a stock kernel finds a bug of each kind (tests/guest/planted); without, it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.kernels import CHOSEN
from vmodel.experiment.kernel_log import findings
from vmodel.experiment.oracle import Effect, Finding
from vmodel.guest.artifacts import find_kernel
from vmodel.guest.booted import BootedGuest
from vmodel.guest.kernel_lines import lines_of
from vmodel.guest.running import GuestSpec
from vmodel.guest.sanitize import ARGUMENTS, with_sanitizers

pytestmark = pytest.mark.guest
MODULE = f"{Path(__file__).parent}/planted/driver/"
#: By bug: the argument that finds it, and parts of the finding's signature.
BUGS = {
    "write_after_free": ("slub_debug=FZPU", "memory: BUG write_after_free", "[Poison overwritten]"),
    "one_too_many": ("slub_debug=FZPU", "memory: BUG one_too_many", "[Right Redzone overwritten]"),
    "double_free": ("slub_debug=FZPU", "memory: BUG double_free", "are to be freed"),
    "read_after_free": ("slub_debug=FZPU", "oops: Oops: general protection fault", "in read_after_free"),
    "read_free_page": ("page_poison=1", "oops: Oops: general protection fault", "in read_free_page"),
    "write_free_page": ("page_poison=1", "memory: pagealloc: memory corruption in write_free_page", ""),
    "read_beside": ("kfence.sample_interval=10", "kasan: BUG: KFENCE: out-of-bounds read in read_beside", ""),
    "read_just_freed": ("kfence.sample_interval=10", "kasan: BUG: KFENCE: use-after-free read in read_just_freed", ""),
}
#: What freed memory is filled with, where the signature does not say it.
FILLED = {"read_after_free": "0x6b6b6b", "read_free_page": "0xaaaaaa"}


def booted(kernel: str, append: str) -> BootedGuest:
    args = ("-m", "256M")
    return BootedGuest(
        GuestSpec("", kernel=find_kernel(kernel), modules=[MODULE], append=append, timeout=120, qemu_args=args)
    )


def report(guest: BootedGuest, bug: str) -> list[Finding]:
    """What the kernel says when this happens."""
    guest.clear()
    guest.run(f"echo {bug} > /sys/kernel/planted/bug", 30)
    return findings(lines_of(guest.dmesg(), "kernel log"))


@pytest.fixture(scope="module", params=CHOSEN)
def sanitized(request: pytest.FixtureRequest) -> Iterator[BootedGuest]:
    with booted(request.param, with_sanitizers("")) as guest:
        yield guest


@pytest.fixture(scope="module", params=CHOSEN)
def stock(request: pytest.FixtureRequest) -> Iterator[BootedGuest]:
    with booted(request.param, "") as guest:
        yield guest


@pytest.mark.parametrize("bug", BUGS)
def test_is_found(sanitized: BootedGuest, bug: str) -> None:
    """As one finding, which is a crash."""
    _, start, part = BUGS[bug]
    (found,) = report(sanitized, bug)
    assert found.effect is Effect.CRASH
    assert found.signature.startswith(start) and part in found.signature, found
    assert FILLED.get(bug, "") in found.text, found


@pytest.mark.parametrize("bug", BUGS)
def test_is_not_without(stock: BootedGuest, bug: str) -> None:
    assert report(stock, bug) == []


def test_each_argument_finds_something() -> None:
    assert {argument for argument, _, _ in BUGS.values()} == set(ARGUMENTS)


def test_the_kernel_knows_the_arguments(sanitized: BootedGuest) -> None:
    """What it does not know it hands to init, as a variable of the environment; and KFENCE says that it runs."""
    done = sanitized.run("cat /proc/cmdline; tr '\\0' '\\n' < /proc/1/environ; cat /sys/module/kfence/parameters/*")
    line, *rest = done.output.decode().splitlines()
    assert all(argument in line for argument in ARGUMENTS)
    assert not set(rest) & set(ARGUMENTS)
    assert "10" in rest
