"""The B+ tree behind paging domains: many mappings in any order, so that nodes split, join and go away."""

from __future__ import annotations

import errno
import gc
import random
from collections.abc import Callable, Iterable

import pytest

from tests.examples import examples
from vmodel import _shim
from vmodel.errors import DmaFault, Reason
from vmodel.span import PAGE, KiB

N = examples(20_000)
LAST = 2**64 - 1
Order = Callable[[int], Iterable[int]]


def shuffled(seed: int) -> Order:
    def order(n: int) -> list[int]:
        numbers = list(range(n))
        random.Random(seed).shuffle(numbers)
        return numbers

    return order


def inwards(n: int) -> list[int]:
    """0, n-1, 1, n-2, ..."""
    return [i // 2 if i % 2 == 0 else n - 1 - i // 2 for i in range(n)]


def strides(n: int) -> list[int]:
    """Every 64th, then those beside them, ...: each leaf is filled from within."""
    return [i for first in range(64) for i in range(first, n, 64)]


def into_gaps(n: int) -> list[int]:
    """A few ascending, then descending into the gap before the next few."""
    return [i for first in range(0, n, 126) for part in (range(42), range(125, 41, -1)) for at in part
            if (i := first + at) < n]  # fmt: skip


ORDERS: dict[str, Order] = {
    "sequential": range,
    "reverse": lambda n: range(n - 1, -1, -1),
    "random": shuffled(1),
    "other random": shuffled(2),
    "inwards": inwards,
    "outwards": lambda n: inwards(n)[::-1],
    "strides": strides,
    "into gaps": into_gaps,
}


def paging(last: int = LAST, room: int = 2**63) -> _shim.Domain:
    return _shim.Domain.paging(PAGE, 0, last, LAST, room)


def check_memory(domain: _shim.Domain) -> None:
    """Invariants of the tree, and the bytes that vmshim.h promises."""
    domain.check()
    count, taken = domain.count()
    assert taken <= 57 * count + 64 * KiB


def item(i: int, step: int = 2 * PAGE) -> tuple[int, int, int, int, int]:
    """What list() says of mapping i: one page, and a hole behind it."""
    return i * step, i * step + PAGE - 1, (i ^ 0x5A5A) * PAGE, 1 + i % 3, 0


def add(domain: _shim.Domain, i: int) -> None:
    start, _, gpa, prot, _ = item(i)
    domain.map(start, gpa, PAGE, prot)


@pytest.mark.parametrize("remove", ORDERS)
@pytest.mark.parametrize("insert", ORDERS)
def test_orders(insert: str, remove: str) -> None:
    n = N if insert == remove else N // 4
    domain = paging()
    there: set[int] = set()

    def check() -> None:
        assert list(domain.list()) == [item(i) for i in sorted(there)]
        assert domain.count()[0] == len(there)
        check_memory(domain)

    for done, i in enumerate(ORDERS[insert](n)):
        add(domain, i)
        there.add(i)
        if done % (n // 5) == 7:
            check()
    check()
    for done, i in enumerate(ORDERS[remove](n)):
        assert domain.unmap(i * 2 * PAGE, PAGE) == PAGE
        there.discard(i)
        if done % (n // 5) == 7:
            check()
    check()
    assert not there
    for i in ORDERS[insert](n):
        add(domain, i)
    check_memory(domain)
    for i in ORDERS[remove](n):
        domain.unmap(i * 2 * PAGE, PAGE)
    check_memory(domain)
    for i in ORDERS[remove](n):
        add(domain, i)
    assert domain.unmap(0, n * 2 * PAGE) == PAGE  # up to the first hole
    assert domain.count()[0] == n - 1


def test_inserts_and_removals_mixed() -> None:
    """Grows and shrinks for a while, at random, against a dict; neighbours are looked at with every call."""
    rng = random.Random(3)
    domain, there = paging(), set[int]()
    for phase in range(12):
        growing = phase % 2 == 0
        for step in range(5000):
            i = rng.randrange(6000)
            if i not in there and (growing or step % 8 == 0):
                add(domain, i)
                there.add(i)
            elif i in there and (not growing or step % 8 == 0):
                assert domain.unmap(i * 2 * PAGE, PAGE) == PAGE
                there.discard(i)
            if i in there:
                assert domain.walk(i * 2 * PAGE + 5, 0) == item(i)
                with pytest.raises(FileExistsError):
                    domain.map(i * 2 * PAGE, 0, PAGE, 3)
            else:
                assert domain.unmap(i * 2 * PAGE, PAGE) == 0
            with pytest.raises(DmaFault) as caught:
                domain.walk(i * 2 * PAGE + PAGE, 0)
            assert caught.value.reason == Reason.NOT_MAPPED
        assert list(domain.list()) == [item(i) for i in sorted(there)]
        assert domain.count()[0] == len(there)
    assert there


@pytest.mark.parametrize("seed", range(4))
def test_overlaps(seed: int) -> None:
    """Mappings of any size: what overlaps is EEXIST, wherever the leaves begin and end."""
    rng = random.Random(seed)
    domain, model = paging(), dict[int, int]()  # page to the start of its mapping
    sizes: dict[int, int] = {}
    for _ in range(6000):
        first, count = rng.randrange(1 << 16), rng.choice((1, 1, 2, 3, 10, 100))
        pages = range(first, first + count)
        if any(page in model for page in pages):
            with pytest.raises(FileExistsError):
                domain.map(first * PAGE, 0, count * PAGE, 3)
        else:
            domain.map(first * PAGE, first * PAGE, count * PAGE, 3)
            model |= dict.fromkeys(pages, first)
            sizes[first] = count
        if sizes and rng.random() < 0.4:
            start = rng.choice(list(sizes)) if len(sizes) < 50 else model[rng.choice((*pages, first))] \
                if all(page in model for page in pages) else None  # fmt: skip
            if start is not None:
                assert domain.unmap(start * PAGE, sizes[start] * PAGE) == sizes[start] * PAGE
                for page in range(start, start + sizes.pop(start)):
                    del model[page]
    expected = [(s * PAGE, (s + n) * PAGE - 1, s * PAGE, 3, 0) for s, n in sorted(sizes.items())]
    assert list(domain.list()) == expected
    assert len(expected) > 100
    for start in sizes:
        assert domain.walk((start + sizes[start] - 1) * PAGE, 0)[0] == start * PAGE


def test_holes_punched_into_one_mapping() -> None:
    """Each unmap cuts a mapping in two, or takes an end off, or all of it."""
    n = 8192
    domain = paging()
    domain.map(0, 0, n * PAGE, 3)
    left = set(range(n))
    for page in shuffled(5)(n):
        assert domain.unmap(page * PAGE, PAGE) == PAGE
        left.discard(page)
        if page % 512 == 0:
            runs: list[tuple[int, int, int, int, int]] = []
            for one in sorted(left):
                if runs and runs[-1][1] + 1 == one * PAGE:
                    runs[-1] = (runs[-1][0], (one + 1) * PAGE - 1, *runs[-1][2:])
                else:
                    runs.append((one * PAGE, (one + 1) * PAGE - 1, one * PAGE, 3, 0))
            assert list(domain.list()) == runs
    assert domain.count()[0] == 0
    assert list(domain.list()) == []


def pages_of(domain: _shim.Domain) -> list[tuple[int, int]]:
    return [(start // PAGE, last // PAGE) for start, last, *_ in domain.list()]


def test_a_mapping_across_leaves_is_cut_in_front() -> None:
    """What is left of it lies behind the place where the next leaf once began."""
    domain = paging()
    for page in range(61):
        domain.map(page * PAGE, page * PAGE, PAGE, 3)
    for page in range(41, 45):
        domain.unmap(page * PAGE, PAGE)
    domain.map(41 * PAGE, 41 * PAGE, 4 * PAGE, 3)
    assert domain.unmap(41 * PAGE, 2 * PAGE) == 2 * PAGE
    assert domain.walk(43 * PAGE, 0)[:2] == (43 * PAGE, 45 * PAGE - 1)
    domain.check()
    assert domain.unmap(43 * PAGE, PAGE) == PAGE
    assert domain.unmap(44 * PAGE, PAGE) == PAGE
    assert pages_of(domain) == [(page, page) for page in [*range(41), *range(45, 61)]]
    domain.check()


@pytest.mark.parametrize("first", range(3, 70))
@pytest.mark.parametrize("count", [2, 5, 30])
def test_cuts_at_every_place(first: int, count: int) -> None:
    """Pages are joined to one mapping, which goes page by page, from the front or from behind."""
    for front in (True, False):
        domain = paging()
        for page in range(110):
            domain.map(page * PAGE, page * PAGE, PAGE, 3)
        assert domain.unmap(first * PAGE, count * PAGE) == count * PAGE
        domain.map(first * PAGE, first * PAGE, count * PAGE, 3)
        others = [(page, page) for page in range(110) if not first <= page < first + count]
        left = list(range(first, first + count))
        while left:
            page = left.pop(0 if front else -1)
            assert domain.unmap(page * PAGE, PAGE) == PAGE
            expected = [*others, (left[0], left[-1])] if left else others
            assert pages_of(domain) == sorted(expected)
            domain.check()


@pytest.mark.parametrize("seed", range(3))
def test_memory_follows_the_mappings(seed: int) -> None:
    """Most go, at random: so does their memory, at once, not when the last of a chunk is gone."""
    domain = paging()
    left = shuffled(seed)(N)
    for i in left:
        add(domain, i)
    while left:
        check_memory(domain)
        for i in left[len(left) // 3 :]:
            domain.unmap(i * 2 * PAGE, PAGE)
        del left[len(left) // 3 :]
    check_memory(domain)


def test_a_few_up_then_down_to_them() -> None:
    """Where a split leaves all but one mapping in one node, each mapping of the descent has a leaf to itself."""
    domain = paging()
    for i in range(42):
        add(domain, i)
    for i in range(N, 41, -1):
        add(domain, i)
    assert domain.count()[0] == N + 1
    check_memory(domain)


def test_mappings_towards_a_gap() -> None:
    """Ascending up to it and descending down to it, twice as many each time."""
    domain = paging()
    low, high = 0, 2**40
    for exponent in range(13):
        for _ in range(2**exponent):
            domain.map(low, 0, PAGE, 3)
            low += 2 * PAGE
        for _ in range(2**exponent):
            domain.map(high, 0, PAGE, 3)
            high -= 2 * PAGE
        check_memory(domain)


def test_a_budget_is_shared_and_its_end_changes_nothing() -> None:
    budget = _shim.Budget(256 * KiB)
    one, two = (_shim.Domain.paging(PAGE, 0, LAST, LAST, 2**63, budget) for _ in range(2))
    two.map(0, 0, 10 * PAGE, 3)
    before = list(two.list())
    made = 0
    with pytest.raises(OSError) as caught:
        for made in range(100_000):
            add(one, made)
    assert caught.value.errno == errno.ENOMEM
    assert made >= (256 * KiB - 2 * 64 * KiB) // 57
    assert len(list(one.list())) == made
    check_memory(one)
    assert budget.taken == one.count()[1] + two.count()[1] <= 256 * KiB
    assert list(two.list()) == before
    for i in range(made):  # an unmap needs no memory
        assert one.unmap(i * 2 * PAGE, PAGE) == PAGE
    for i in range(200):
        add(two, 100 + i)
    del one, two, caught  # its traceback has a domain, too
    gc.collect()
    assert budget.taken == 0


def test_a_cut_that_has_no_memory_changes_nothing() -> None:
    """An unmap in the middle needs room for one mapping more, and takes it before it changes anything."""
    budget = _shim.Budget(64 * KiB)
    domain = _shim.Domain.paging(PAGE, 0, LAST, LAST, 2**63, budget)
    made = 0
    with pytest.raises(OSError):
        while made < 64 * KiB:  # each takes a byte at least
            domain.map(made * 8 * PAGE, 0, 3 * PAGE, 3)
            made += 1
    before = list(domain.list())
    refused = 0
    for i in range(made):
        try:
            assert domain.unmap((i * 8 + 1) * PAGE, PAGE) == PAGE
        except OSError as error:
            assert error.errno == errno.ENOMEM
            refused += 1
            assert domain.first(before[i][0]) == before[i]
        domain.check()
    assert refused
    assert len(list(domain.list())) == 2 * made - refused


def test_unmap_of_many_mappings_at_once() -> None:
    domain = paging()
    for i in range(N):
        domain.map(i * PAGE, i * PAGE, PAGE, 3)
    assert domain.unmap(5 * PAGE, (N - 10) * PAGE) == (N - 10) * PAGE
    assert [m[0] // PAGE for m in domain.list()] == [*range(5), *range(N - 5, N)]


def test_the_ends_of_the_address_space() -> None:
    domain = paging()
    domain.map(0, 0, PAGE, 1)
    domain.map(2**64 - PAGE, 2**64 - PAGE, PAGE, 2)
    for i in range(1, 3000):
        domain.map(2**63 + i * PAGE, 0, PAGE, 3)
    assert domain.walk(LAST, 0) == (2**64 - PAGE, LAST, 2**64 - PAGE, 2, 0)
    found = list(domain.list())
    assert (found[0][0], found[-1][1], len(found)) == (0, LAST, 3001)
    assert domain.unmap(2**64 - PAGE, PAGE) == PAGE
    assert domain.unmap(0, PAGE) == PAGE
    whole = paging()
    whole.map(0, 0, 2**63, 3)
    whole.map(2**63, 2**63, 2**63, 3)
    assert whole.unmap(2**63 - PAGE, 2 * PAGE) == 2 * PAGE
    assert [m[:2] for m in whole.list()] == [(0, 2**63 - PAGE - 1), (2**63 + PAGE, LAST)]


def test_limits() -> None:
    domain = paging(room=100)
    for i in range(100):
        add(domain, i)
    with pytest.raises(OSError) as caught:
        add(domain, 100)
    assert caught.value.errno == errno.ENOSPC
    domain.unmap(0, PAGE)
    add(domain, 100)
    none = paging(room=0)
    with pytest.raises(OSError):
        add(none, 0)


@pytest.mark.parametrize(
    ("iova", "gpa", "size", "code"),
    [
        (0x1000, 0x9000, PAGE, 0),
        (0x8000, 0xF000, PAGE, 0),
        (0, 0, PAGE, errno.ERANGE),
        (0x9000, 0, PAGE, errno.ERANGE),
        (0x8000, 0, 2 * PAGE, errno.ERANGE),
        (0x1000, 0x1_0000, PAGE, errno.ERANGE),
        (0x1000, 0xF000, 2 * PAGE, errno.ERANGE),
        (2**64 - PAGE, 0, 2 * PAGE, errno.ERANGE),
        (0x1000, 2**64 - PAGE, 2 * PAGE, errno.ERANGE),
        (0x1000, 0, 0, errno.EINVAL),
        (0x1000, 0, 0x800, errno.EINVAL),
        (0x1800, 0, PAGE, errno.EINVAL),
        (0x1000, 0x800, PAGE, errno.EINVAL),
    ],
)
def test_where_mappings_may_be(iova: int, gpa: int, size: int, code: int) -> None:
    domain = _shim.Domain.paging(PAGE, 0x1000, 0x8FFF, 0xFFFF, 9)
    if not code:
        domain.map(iova, gpa, size, 3)
        return
    with pytest.raises(OSError) as caught:
        domain.map(iova, gpa, size, 3)
    assert caught.value.errno == code
    assert domain.count()[0] == 0


@pytest.mark.parametrize("arguments", [
    (0, 0, LAST, LAST, 1), (2048, 0, LAST, LAST, 1), (PAGE | 1, 0, LAST, LAST, 1), (PAGE, 1, 0, LAST, 1),
])  # fmt: skip
def test_domains_that_cannot_be(arguments: tuple[int, int, int, int, int]) -> None:
    with pytest.raises(OSError) as caught:
        _shim.Domain.paging(*arguments)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("kind", [2, 3, 4, 2**32 - 1])
def test_plain_domains_are_of_two_kinds(kind: int) -> None:
    with pytest.raises(OSError) as caught:
        _shim.Domain.plain(kind)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize("kind", [_shim.DOMAIN_IDENTITY, _shim.DOMAIN_BLOCKED])
def test_plain_domains_have_no_mappings(kind: int) -> None:
    domain = _shim.Domain.plain(kind)
    for call in (
        lambda: domain.map(0, 0, PAGE, 3),
        lambda: domain.unmap(0, PAGE),
        domain.dirty_start,
        domain.dirty_stop,
        lambda: domain.dirty_report(0, PAGE, PAGE, False),
    ):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EINVAL
    assert list(domain.list()) == []
    assert domain.count() == (0, 0)
    if kind == _shim.DOMAIN_IDENTITY:
        assert domain.walk(0x1234, 3) == (0, LAST, 0, 3, 0)
    else:
        with pytest.raises(DmaFault) as fault:
            domain.walk(0x1234, 0)
        assert fault.value.reason == Reason.BLOCKED


def test_numbers_that_are_no_addresses() -> None:
    domain = paging()
    for call in (
        lambda: domain.map(-PAGE, 0, PAGE, 3),
        lambda: domain.map(0, 2**64, PAGE, 3),
        lambda: domain.unmap(2**64, PAGE),
        lambda: domain.unmap(0, -1),
        lambda: domain.flush(0, 2**64),
        lambda: domain.walk(-1, 0),
        lambda: domain.walk(0, -1),
    ):
        with pytest.raises(OverflowError):
            call()
