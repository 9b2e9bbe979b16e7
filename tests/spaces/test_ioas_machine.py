"""Two IOASes and devices behind several kinds of IOMMUs: any order of calls against a dict, by what DMA reaches."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.examples import examples
from tests.spaces.world import RAM, Device, World
from vmodel.errors import Access, DmaFault, IommuError
from vmodel.iommu.iommufd import Context, Ioas
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

    @property
    def pages(self) -> range:
        return range(self.start, self.start + self.size)


#: GPA and size in pages, and whether it is writable.
Piece = tuple[int, int, bool]


def too_much(pieces: list[Piece], access: Access) -> bool:
    """Whether `access` has WRITE, and a piece is read-only."""
    return Access.WRITE in access and not all(writable for _, _, writable in pieces)


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
        context = Context()
        self.spaces = [Space(Ioas(context)), Space(Ioas(context))]
        for space in self.spaces:
            space.ioas.allow_iovas([ROOM])
        self.devices: list[Device] = [self.world.add(self.world.iommu(kind)) for kind in KINDS]
        self.bound = [Bound(context, device.endpoint) for device in self.devices]
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
        size = sum(size for _, size, _ in pieces)
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
        for gpa, size, writable in pieces:
            space.areas.append(Area(start, size, gpa, access, writable))
            start += size

    # ---- the map ---------------------------------------------------------------------------

    @rule(n=SPACES, start=PAGE_NUMBERS, size=SIZES, gpa=GPA_PAGES, access=ACCESS)
    def map_fixed(self, n: int, start: int, size: int, gpa: int, access: Access) -> None:
        wrong = errno.EINVAL if not size or not access else self.placing(n, start, size)
        ioas = self.spaces[n].ioas
        at = self.verdict(lambda: ioas.map(gpa * PAGE, size * PAGE, access, start * PAGE), wrong)
        if not wrong:
            assert at == start * PAGE
            self.note(self.spaces[n], start, [(gpa, size, Access.WRITE in access)], access)

    @rule(n=SPACES, size=st.integers(1, 4), gpa=GPA_PAGES, access=st.sampled_from([RW, R]))
    def map_chosen(self, n: int, size: int, gpa: int, access: Access) -> None:
        ioas = self.spaces[n].ioas
        piece = gpa, size, Access.WRITE in access
        self.chosen(n, lambda: ioas.map(gpa * PAGE, size * PAGE, access), [piece], access)

    @rule(n=SPACES, start=PAGE_NUMBERS | st.integers(64, 79), size=st.integers(0, 12))
    def unmap(self, n: int, start: int, size: int) -> None:
        space, wanted, gone, cut = self.spaces[n], range(start, start + size), list[Area](), False
        for area in sorted(space.areas, key=lambda area: area.start):
            if any(page in wanted for page in area.pages) and not cut:
                cut = any(page not in wanted for page in area.pages)
                if not cut:
                    gone.append(area)
        wrong = errno.EINVAL if not size else errno.ENOENT if cut or not gone else 0
        removed = self.verdict(lambda: space.ioas.unmap(start * PAGE, size * PAGE), wrong)
        if size:
            space.areas = [area for area in space.areas if area not in gone]
        assert wrong or removed == sum(area.size for area in gone) * PAGE

    @rule(n=SPACES)
    def unmap_all(self, n: int) -> None:
        space = self.spaces[n]
        assert space.ioas.unmap_all() == sum(area.size for area in space.areas) * PAGE
        space.areas = []

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
                pieces[-1] = pieces[-1][0], pieces[-1][1] + 1, area.writable
            else:
                pieces.append((area.gpa + page - area.start, 1, area.writable))
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

    # ---- what must hold --------------------------------------------------------------------

    @invariant()
    def one_domain_for_a_kind(self) -> None:
        for n, space in enumerate(self.spaces):
            kinds = {kind for kind, where in zip(KINDS, self.where, strict=True) if where == n}
            assert len(space.ioas.hwpts) == space.ioas.users == len(kinds)
            found = [
                (m.span.start // PAGE, m.span.size // PAGE, m.gpa // PAGE, m.access) for m in space.ioas.mappings()
            ]
            assert found == sorted((area.start, area.size, area.gpa, area.access) for area in space.areas)

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
