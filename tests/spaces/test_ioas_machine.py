"""Two IOASes, devices behind several kinds of IOMMUs, and a kernel access: any order of calls against a dict.

What DMA and the access reach is compared, and how much memory is pinned.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.examples import examples
from tests.spaces.world import RAM, Device, World
from vmodel.errors import Access, DmaFault, IommuError
from vmodel.iommu.iommufd import Context, Ioas, KernelAccess, Process
from vmodel.iommu.iommufd import Device as Bound
from vmodel.span import PAGE, Span

R, RW, NONE = Access.READ, Access.READ | Access.WRITE, Access(0)
#: Pages from here to the first of SMMUv3's doorbells, which are the second half.
FIRST, HALF = 0x0800_0000 // PAGE - 8, 8
PAGES = 2 * HALF
GPAS = RAM // PAGE
#: Chosen IOVAs come from these pages, which are not FIRST and on.
ROOM = Span.sized(64 * PAGE, 16 * PAGE)

PAGE_NUMBERS = st.integers(FIRST, FIRST + PAGES - 1)
SIZES = st.integers(0, 4)
GPA_PAGES = st.integers(0, GPAS - 4)
ACCESS = st.sampled_from([RW, RW, R, NONE])
SPACES = st.integers(0, 1)
KINDS = ["vt-d", "vt-d", "pamu", "smmu-v3"]
DEVICES = st.integers(0, len(KINDS) - 1)


@dataclass
class Area:
    start: int
    size: int
    gpa: int
    access: Access
    #: Whether copies of it may have WRITE.
    writable: bool
    #: The call that it is from: copies have that of their source.
    memory: int
    #: Whether an unmap found it pinned, and the driver kept it.
    leaving: bool = False

    @property
    def pages(self) -> range:
        return range(self.start, self.start + self.size)


#: GPA and size in pages, whether it is writable, and its memory.
Piece = tuple[int, int, bool, int]


def too_much(pieces: list[Piece], access: Access) -> bool:
    """Whether `access` has WRITE, and a piece is read-only."""
    return Access.WRITE in access and not all(writable for _, _, writable, _ in pieces)


@dataclass
class Space:
    ioas: Ioas
    areas: list[Area] = field(default_factory=list)

    def at(self, page: int) -> Area | None:
        return next((area for area in self.areas if page in area.pages), None)

    def taken(self, pages: range) -> bool:
        return any(self.at(page) for page in pages)


class IoasMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.process = Process()
        context = Context(process=self.process)
        self.spaces = [Space(Ioas(context)), Space(Ioas(context))]
        for space in self.spaces:
            space.ioas.allow_iovas([ROOM])
        self.devices: list[Device] = [self.world.add(self.world.iommu(kind)) for kind in KINDS]
        self.bound = [Bound(context, device.endpoint) for device in self.devices]
        self.access = KernelAccess(context, self.world.memory, self.asked_to_unpin)
        #: Where the access is attached, what it has pinned, in pages, and whether it unpins when it is notified.
        self.at: int | None = 0
        self.access.attach(self.spaces[0].ioas)
        self.pins: list[tuple[int, int]] = []
        self.willing = True
        self.memories = itertools.count()
        #: Where each device is attached.
        self.where: list[int | None] = [None] * len(KINDS)
        for page in range(GPAS):
            self.world.ram[page * PAGE : page * PAGE + 8] = page.to_bytes(8, "little")

    def teardown(self) -> None:
        self.world.close()

    def reserved(self, n: int, pages: range) -> bool:
        doorbells = range(FIRST + HALF, FIRST + PAGES + 4)
        return self.where[KINDS.index("smmu-v3")] == n and any(page in doorbells for page in pages)

    def verdict(self, call: object, expected: int) -> int | None:
        """What the call gives; it must end with the errno that is expected."""
        try:
            result: int | None = call()  # type: ignore[operator]
        except IommuError as error:
            assert error.errno == expected, (error, expected)
            return None
        assert not expected, errno.errorcode[expected]
        return result

    def placing(self, n: int, start: int, size: int) -> int:
        """The errno of a map or copy to a fixed place."""
        pages = range(start, start + size)
        if self.reserved(n, pages):
            return errno.EINVAL
        return errno.EEXIST if self.spaces[n].taken(pages) else 0

    def chosen(self, n: int, call: Callable[[], int], pieces: list[Piece], access: Access) -> None:
        """A map or copy to wherever there is room: there is, or there was none; then, it must not be read-only."""
        size = sum(size for _, size, _, _ in pieces)
        space = self.spaces[n]
        free = [page for page in range(ROOM.start // PAGE, ROOM.last // PAGE + 1) if not space.at(page)]
        gpa = pieces[0][0]
        align = 1 << (size - 1).bit_length()
        align = min(align, gpa & -gpa) if gpa else align
        fits = [page for page in free if page % align == 0 and all(page + k in free for k in range(size))]
        wrong = errno.ENOSPC if not fits else errno.EPERM if too_much(pieces, access) else 0
        at = self.verdict(call, wrong)
        if not wrong:
            assert at == fits[0] * PAGE
            self.note(space, fits[0], pieces, access)

    def note(self, space: Space, start: int, pieces: list[Piece], access: Access) -> None:
        for gpa, size, writable, memory in pieces:
            space.areas.append(Area(start, size, gpa, access, writable, memory))
            start += size

    # ---- the map ---------------------------------------------------------------------------

    @rule(n=SPACES, start=PAGE_NUMBERS, size=SIZES, gpa=GPA_PAGES, access=ACCESS)
    def map_fixed(self, n: int, start: int, size: int, gpa: int, access: Access) -> None:
        wrong = errno.EINVAL if not size or not access else self.placing(n, start, size)
        ioas = self.spaces[n].ioas
        at = self.verdict(lambda: ioas.map(gpa * PAGE, size * PAGE, access, start * PAGE), wrong)
        if not wrong:
            assert at == start * PAGE
            self.note(self.spaces[n], start, [(gpa, size, Access.WRITE in access, next(self.memories))], access)

    @rule(n=SPACES, size=st.integers(1, 4), gpa=GPA_PAGES, access=st.sampled_from([RW, R]))
    def map_chosen(self, n: int, size: int, gpa: int, access: Access) -> None:
        ioas = self.spaces[n].ioas
        piece = gpa, size, Access.WRITE in access, next(self.memories)
        self.chosen(n, lambda: ioas.map(gpa * PAGE, size * PAGE, access), [piece], access)

    @rule(n=SPACES, start=PAGE_NUMBERS | st.integers(64, 79), size=st.integers(0, 12))
    def unmap(self, n: int, start: int, size: int) -> None:
        space, wanted, gone, wrong = self.spaces[n], range(start, start + size), list[Area](), 0
        for area in sorted(space.areas, key=lambda area: area.start):
            if any(page in wanted for page in area.pages) and not wrong:
                if any(page not in wanted for page in area.pages):
                    wrong = errno.ENOENT
                elif self.kept(n, area):
                    wrong, area.leaving = errno.EDEADLOCK, True
                else:
                    gone.append(area)
        wrong = errno.EINVAL if not size else wrong or (0 if gone else errno.ENOENT)
        removed = self.verdict(lambda: space.ioas.unmap(start * PAGE, size * PAGE), wrong)
        if size:
            space.areas = [area for area in space.areas if area not in gone]
        assert wrong or removed == sum(area.size for area in gone) * PAGE

    def pinned(self, n: int, area: Area) -> bool:
        """Whether the access has pinned a part of it."""
        return self.at == n and any(start < area.start + area.size and area.start < end for start, end in self.pins)

    def kept(self, n: int, area: Area) -> bool:
        """Whether it stays when it is unmapped."""
        return self.pinned(n, area) and not self.willing

    @rule(n=SPACES)
    def unmap_all(self, n: int) -> None:
        space = self.spaces[n]
        ordered = sorted(space.areas, key=lambda area: area.start)
        stop = next((area for area in ordered if self.kept(n, area)), None)
        removed = self.verdict(space.ioas.unmap_all, errno.EDEADLOCK if stop else 0)
        assert stop or removed == sum(area.size for area in space.areas) * PAGE
        if stop is not None:
            stop.leaving = True
        space.areas = ordered[ordered.index(stop) :] if stop else []

    @precondition(lambda self: any(space.areas for space in self.spaces))
    @rule(data=st.data(), to=SPACES, size=st.integers(0, 5), access=ACCESS, fixed=st.booleans(), place=PAGE_NUMBERS)
    def copy(self, data: st.DataObject, to: int, size: int, access: Access, fixed: bool, place: int) -> None:
        source = data.draw(st.sampled_from([space for space in self.spaces if space.areas]))
        start = data.draw(st.sampled_from(sorted(page for area in source.areas for page in area.pages)))
        pages = range(start, start + size)
        areas = [source.at(page) for page in pages]
        pieces: list[Piece] = []
        last: Area | None = None
        for page, area in zip(pages, areas, strict=True):
            if area is None:
                break
            if area is last:
                pieces[-1] = pieces[-1][0], pieces[-1][1] + 1, area.writable, area.memory
            else:
                pieces.append((area.gpa + page - area.start, 1, area.writable, area.memory))
            last = area
        wrong = 0
        if not size or not access:
            wrong = errno.EINVAL
        elif None in areas:
            wrong = errno.ENOENT
        elif fixed:
            wrong = self.placing(to, place, size) or (errno.EPERM if too_much(pieces, access) else 0)
        ioas = self.spaces[to].ioas
        if wrong or fixed:
            iova = place * PAGE if fixed else None
            self.verdict(lambda: ioas.copy(source.ioas, start * PAGE, size * PAGE, access, iova), wrong)
            if not wrong:
                self.note(self.spaces[to], place, pieces, access)
            return
        self.chosen(to, lambda: ioas.copy(source.ioas, start * PAGE, size * PAGE, access), pieces, access)

    # ---- devices ---------------------------------------------------------------------------

    def joining(self, device: int, n: int) -> int:
        doorbells = range(FIRST + HALF, FIRST + PAGES + 4)
        refused = KINDS[device] == "smmu-v3" and self.spaces[n].taken(doorbells)
        return errno.EADDRINUSE if refused else 0

    @rule(device=DEVICES, n=SPACES)
    def attach(self, device: int, n: int) -> None:
        wrong = errno.EBUSY if self.where[device] is not None else self.joining(device, n)
        self.verdict(lambda: self.bound[device].attach(self.spaces[n].ioas) and 0, wrong)
        if not wrong:
            self.where[device] = n

    @rule(device=DEVICES, n=SPACES)
    def replace(self, device: int, n: int) -> None:
        was = self.where[device]
        wrong = errno.EINVAL if was is None else 0 if was == n else self.joining(device, n)
        self.verdict(lambda: self.bound[device].replace(self.spaces[n].ioas) and 0, wrong)
        if not wrong:
            self.where[device] = n

    @rule(device=DEVICES)
    def detach(self, device: int) -> None:
        self.verdict(self.bound[device].detach, 0)
        self.where[device] = None

    # ---- the kernel access -----------------------------------------------------------------

    def asked_to_unpin(self, iova: int, size: int) -> None:
        """The driver: it unpins what it has in the range, if it is willing, or all if it is detached."""
        for start, end in list(self.pins):
            inside = start * PAGE < iova + size and iova < end * PAGE
            if (self.willing and inside) or iova + size == (1 << 64) - 1:
                self.pins.remove((start, end))
                self.access.unpin_pages(start * PAGE, (end - start) * PAGE)

    @rule(n=SPACES)
    def attach_access(self, n: int) -> None:
        self.verdict(lambda: self.access.attach(self.spaces[n].ioas), errno.EINVAL if self.at is not None else 0)
        self.at = n if self.at is None else self.at

    @rule(n=SPACES)
    def replace_access(self, n: int) -> None:
        self.verdict(lambda: self.access.replace(self.spaces[n].ioas), errno.ENOENT if self.at is None else 0)
        assert self.pins == [] or self.at == n
        self.at = n if self.at is not None else None

    @rule()
    def detach_access(self) -> None:
        self.access.detach()
        assert self.pins == []
        self.at = None

    def reaching(self, start: int, size: int, access: Access) -> int:
        """The errno of an access to a range: that of the first page that does not allow it."""
        if not size:
            return errno.EINVAL
        if self.at is None:
            return errno.ENOENT
        for page in range(start, start + size):
            area = self.spaces[self.at].at(page)
            if area is None:
                return errno.ENOENT
            if area.leaving:
                return errno.EINVAL
            if access not in area.access:
                return errno.EPERM
        return 0

    @rule(start=PAGE_NUMBERS | st.integers(64, 79), size=SIZES, access=st.sampled_from([R, Access.WRITE]))
    def pin(self, start: int, size: int, access: Access) -> None:
        wrong = self.reaching(start, size, access)
        found: list[Span] = []
        self.verdict(lambda: found.extend(self.access.pin_pages(start * PAGE, size * PAGE, access)), wrong)
        if not wrong:
            assert self.at is not None
            areas = [self.spaces[self.at].at(page) for page in range(start, start + size)]
            gpas = [area.gpa + start + k - area.start for k, area in enumerate(areas) if area]
            assert [gpa // PAGE for span in found for gpa in range(span.start, span.last, PAGE)] == gpas
            self.pins.append((start, start + size))

    @precondition(lambda self: self.at is not None and self.spaces[self.at].areas)
    @rule(data=st.data(), beyond=st.integers(0, 1))
    def pin_a_mapping(self, data: st.DataObject, beyond: int) -> None:
        assert self.at is not None
        area = data.draw(st.sampled_from(self.spaces[self.at].areas))
        start = data.draw(st.integers(area.start, area.start + area.size - 1))
        self.pin(start=start, size=area.start + area.size - start + beyond, access=R)

    @precondition(lambda self: self.at is not None)
    @rule(start=PAGE_NUMBERS, size=st.integers(1, 4), gpa=GPA_PAGES, more=st.integers(0, 6), willing=st.booleans())
    def unmap_what_is_pinned(self, start: int, size: int, gpa: int, more: int, willing: bool) -> None:
        assert self.at is not None
        self.map_fixed(n=self.at, start=start, size=size, gpa=gpa, access=RW)
        area = self.spaces[self.at].at(start)
        if area is not None:
            self.pin(start=start, size=1, access=R)
            self.willing = willing
            self.unmap(n=self.at, start=area.start, size=area.size + more)
            if area.leaving:
                self.pin(start=start, size=1, access=R)
                self.read_by_access(page=start, size=1)

    @precondition(lambda self: self.pins)
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        start, end = data.draw(st.sampled_from(self.pins))
        self.pins.remove((start, end))
        self.access.unpin_pages(start * PAGE, (end - start) * PAGE)

    @rule(page=PAGE_NUMBERS | st.integers(62, 82), size=st.integers(1, 2))
    def read_by_access(self, page: int, size: int) -> None:
        """The number at the start of the last page, as that of a page behind it."""
        got: list[bytes] = []
        wrong = self.reaching(page, size, R)
        self.verdict(lambda: got.append(self.access.read(page * PAGE + 3, size * PAGE - 3)), wrong)
        if not wrong and size > 1:
            assert self.at is not None
            area = self.spaces[self.at].at(page + 1)
            assert area is not None and int.from_bytes(got[0][PAGE - 3 : PAGE + 5], "little") == (
                area.gpa + page + 1 - area.start
            )

    @rule(page=PAGE_NUMBERS | st.integers(62, 82))
    def write_by_access(self, page: int) -> None:
        wrong, mark = self.reaching(page, 1, Access.WRITE), b"by the access"
        self.verdict(lambda: self.access.write(page * PAGE + 1001, mark), wrong)
        at = self.world.ram.find(mark)
        if wrong:
            assert at < 0
            return
        assert self.at is not None
        area = self.spaces[self.at].at(page)
        assert area is not None and at == (area.gpa + page - area.start) * PAGE + 1001
        self.world.ram[at : at + len(mark)] = bytes(len(mark))

    # ---- what must hold --------------------------------------------------------------------

    @invariant()
    def one_domain_for_a_kind(self) -> None:
        for n, space in enumerate(self.spaces):
            kinds = {kind for kind, where in zip(KINDS, self.where, strict=True) if where == n}
            assert len(space.ioas.hwpts) == space.ioas.users - (self.at == n) == len(kinds)
            found = [
                (m.span.start // PAGE, m.span.size // PAGE, m.gpa // PAGE, m.access) for m in space.ioas.mappings()
            ]
            assert found == sorted((area.start, area.size, area.gpa, area.access) for area in space.areas)

    @invariant()
    def a_page_counts_once(self) -> None:
        pages = set[tuple[int, int]]()
        for n, space in enumerate(self.spaces):
            for area in space.areas:
                for page in area.pages:
                    by_access = self.at == n and any(start <= page < end for start, end in self.pins)
                    if by_access or n in self.where:
                        pages.add((area.memory, area.gpa + page - area.start))
        assert self.process.pinned == self.process.user.locked == len(pages)

    @rule(device=DEVICES, page=PAGE_NUMBERS | st.integers(62, 82))
    def write(self, device: int, page: int) -> None:
        where = self.where[device]
        area = None if where is None else self.spaces[where].at(page)
        mark = b"written!"
        try:
            self.devices[device].dma.write(page * PAGE + 64, mark)
        except DmaFault:
            assert area is None or Access.WRITE not in area.access
            assert self.world.ram.find(mark) < 0
            return
        assert area is not None and Access.WRITE in area.access
        at = (area.gpa + page - area.start) * PAGE + 64
        assert self.world.ram.find(mark) == at
        self.world.ram[at : at + 8] = bytes(8)

    @invariant()
    def reads(self) -> None:
        for device, where in zip(self.devices, self.where, strict=True):
            mapped = self.spaces[where].areas if where is not None else []
            expected = {page: area.gpa + page - area.start for area in mapped for page in area.pages}
            for page in (*range(FIRST, FIRST + PAGES, 3), *range(64, 80, 3), *expected):
                try:
                    found = int.from_bytes(device.dma.read(page * PAGE, 8), "little")
                except DmaFault:
                    found = None
                assert found == expected.get(page), (device.endpoint.name, hex(page * PAGE))


IoasMachine.TestCase.settings = settings(
    max_examples=examples(120), stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestIoas = IoasMachine.TestCase
