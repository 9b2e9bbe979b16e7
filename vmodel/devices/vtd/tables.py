"""Root, context and PASID tables in guest memory (9.1 to 9.6): how they translate a request."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from vmodel.devices.vtd.codes import FaultCode, Stage
from vmodel.devices.vtd.regs import RootAddress, TranslationTableMode
from vmodel.dma import Dma
from vmodel.errors import DmaFault
from vmodel.iommu.drivers.vtd_capability import Ecap, VtdCap
from vmodel.regs import Bit, Bits, Layout


class _Pointer(Layout):
    """Root entry, either half in scalable mode (9.1, 9.2)."""

    P = Bit(0)
    TABLE = Bits(12, 63)


class _Legacy(Layout):
    """Context entry (9.3), its first word."""

    P = Bit(0)
    FPD = Bit(1)
    TT = Bits(2, 3)
    SECOND = Bits(12, 63)


class _LegacyDomain(Layout):
    """Its second word."""

    AW = Bits(0, 2)
    AVAIL = Bits(3, 6)
    DID = Bits(8, 23)


class _Context(Layout):
    """Scalable-mode context entry (9.4), its first word."""

    P = Bit(0)
    FPD = Bit(1)
    DTE = Bit(2)
    PASIDE = Bit(3)
    PRE = Bit(4)
    PDTS = Bits(9, 11)
    DIRECTORY = Bits(12, 63)


class _ContextRequest(Layout):
    """Its second word."""

    RID_PASID = Bits(0, 19)


class _Directory(Layout):
    """PASID directory entry (9.5)."""

    P = Bit(0)
    FPD = Bit(1)
    TABLE = Bits(12, 63)


class _Pasid(Layout):
    """PASID table entry (9.6), its first word."""

    P = Bit(0)
    FPD = Bit(1)
    AW = Bits(2, 4)
    PGTT = Bits(6, 8)
    SSADE = Bit(9)
    SECOND = Bits(12, 63)


class _DomainWord(Layout):
    """Its second word."""

    DID = Bits(0, 15)
    PWSNP = Bit(23)
    PGSNP = Bit(24)


class _First(Layout):
    """Its third word."""

    FSPM = Bits(2, 3)
    WPE = Bit(4)
    NXE = Bit(5)
    FIRST = Bits(12, 63)


_ADDRESS = (1 << 64) - (1 << 12)
#: By translation type of a legacy context entry (9.3): type 1 is type 0 for devices with their own TLB.
_LEGACY_STAGES = {0: Stage.SECOND, 1: Stage.SECOND, 2: Stage.PASS_THROUGH}
#: FSPM: levels of first-stage tables.
_FIRST_LEVELS = {0: 4, 1: 5}
#: (GPA, value) of the words that were read.
Words = tuple[tuple[int, int], ...]


class Refused(Exception):
    """An entry blocks a request; `code` is the fault reason.  `quiet`: FPD is set, so the fault is not reported."""

    def __init__(self, code: FaultCode, quiet: bool = False) -> None:
        super().__init__(code.name)
        self.code = code
        self.quiet = quiet


@dataclass(frozen=True)
class Directory:
    """A scalable-mode context entry: the PASID directory of a device.

    `table`: address of the directory; `pasids`: number of PASIDs that it has; `enabled`: requests may carry a PASID;
    `rid_pasid`: the PASID of requests without one; `device_tlb`, `page_requests`: the device may use them; `quiet`:
    FPD; `words`: the memory that was read.
    """

    table: int
    pasids: int
    enabled: bool
    rid_pasid: int
    device_tlb: bool
    page_requests: bool
    quiet: bool
    words: Words

    def pasid_of(self, asked: int | None) -> int:
        """The PASID whose entry translates requests with PASID `asked`, None: without one.  Refused."""
        if asked is None:
            if self.rid_pasid >= self.pasids:
                raise Refused(FaultCode.RID_PASID, self.quiet)
            return self.rid_pasid
        if not self.enabled:
            raise Refused(FaultCode.PASID_OFF, self.quiet)
        if asked >= self.pasids:
            raise Refused(FaultCode.PASID_TOO_LARGE, self.quiet)
        return asked


@dataclass(frozen=True)
class Entry:
    """How requests are translated: a legacy context entry, or an entry of a PASID table.

    `second` is the root of second-stage tables with `second_levels`, `first` that of first-stage tables; `pasid` tags
    the translations, None in legacy mode; `sets_flags`: SSADE; `device_tlb`: the device may use its own TLB (legacy
    mode); `quiet`: FPD; `words`: the memory that was read.  Entries with the same translation are equal.
    """

    stage: Stage
    domain_id: int
    second: int
    second_levels: int
    first: int = 0
    first_levels: int = 0
    pasid: int | None = None
    sets_flags: bool = False
    device_tlb: bool = field(default=False, compare=False)
    quiet: bool = field(default=False, compare=False)
    words: Words = field(default=(), compare=False)


class Tables:
    """Reads entries from guest memory, without a cache.  All methods raise Refused."""

    def __init__(self, dma: Dma, cap: VtdCap, ecap: Ecap, output_bits: int) -> None:
        self._dma = dma
        self._cap, self._ecap = cap, ecap
        self._output_bits = output_bits
        #: RTADDR's value at the last Set Root Table Pointer command.
        self.root = 0

    @property
    def scalable(self) -> bool:
        """Whether the unit is in scalable mode, which decides tables and fault reasons."""
        return RootAddress(self.root).TTM != TranslationTableMode.LEGACY

    def _read(self, at: int, count: int, code: FaultCode, quiet: bool = False) -> Words:
        try:
            data = self._dma.read(at, 8 * count)
        except DmaFault:
            raise Refused(code, quiet) from None
        return tuple((at + 8 * n, word) for n, (word,) in enumerate(struct.iter_unpack("<Q", data)))

    def _check(self, words: Words, known: tuple[int, ...], code: FaultCode, quiet: bool = False) -> None:
        """Checks reserved bits, which are those not in `known`, and that addresses are within the output width."""
        for n, (_, word) in enumerate(words):
            mask = known[n] if n < len(known) else 0
            if word & ~mask or (mask & _ADDRESS == _ADDRESS and word >> self._output_bits):
                raise Refused(code, quiet)

    # ---- legacy mode -----------------------------------------------------------------------

    def legacy(self, source: int) -> Entry:
        """A device's context entry."""
        root = self._read((self.root & _ADDRESS) + 16 * (source >> 8 & 0xFF), 2, FaultCode.ROOT_ACCESS)
        if not _Pointer(root[0][1]).P:
            raise Refused(FaultCode.ROOT_NOT_PRESENT)
        self._check(root, (_mask(_Pointer),), FaultCode.ROOT_RESERVED)
        words = self._read((root[0][1] & _ADDRESS) + 16 * (source & 0xFF), 2, FaultCode.CONTEXT_ACCESS)
        entry, domain = _Legacy(words[0][1]), _LegacyDomain(words[1][1])
        quiet = bool(entry.FPD)
        if not entry.P:
            raise Refused(FaultCode.CONTEXT_NOT_PRESENT, quiet)
        self._check(words, (_mask(_Legacy), _mask(_LegacyDomain)), FaultCode.CONTEXT_RESERVED, quiet)
        if entry.TT not in _LEGACY_STAGES or (entry.TT == 1 and not self._ecap.DT) or not self._has_levels(domain.AW):
            raise Refused(FaultCode.CONTEXT_INVALID, quiet)
        return Entry(
            _LEGACY_STAGES[entry.TT],
            domain.DID,
            words[0][1] & _ADDRESS,
            domain.AW + 2,
            device_tlb=entry.TT == 1,
            quiet=quiet,
            words=root + words,
        )

    def _has_levels(self, width: int) -> bool:
        return bool(self._cap.SAGAW >> width & 1)

    # ---- scalable mode ---------------------------------------------------------------------

    def directory(self, source: int) -> Directory:
        """A device's scalable-mode context entry."""
        if RootAddress(self.root).TTM != TranslationTableMode.SCALABLE:
            raise Refused(FaultCode.MODE)
        # Devices 0 to 15 of a bus have one context table, 16 to 31 another.
        half = (source >> 8 & 0xFF) * 2 + (source >> 7 & 1)
        root = self._read((self.root & _ADDRESS) + 8 * half, 1, FaultCode.SM_ROOT_ACCESS)
        if not _Pointer(root[0][1]).P:
            raise Refused(FaultCode.SM_ROOT_NOT_PRESENT)
        self._check(root, (_mask(_Pointer),), FaultCode.SM_ROOT_RESERVED)
        words = self._read((root[0][1] & _ADDRESS) + 32 * (source & 0x7F), 4, FaultCode.SM_CONTEXT_ACCESS)
        entry, request = _Context(words[0][1]), _ContextRequest(words[1][1])
        quiet = bool(entry.FPD)
        if not entry.P:
            raise Refused(FaultCode.SM_CONTEXT_NOT_PRESENT, quiet)
        unknown = (
            (0 if self._ecap.DT else _Context.DTE.mask)
            | (0 if self._ecap.PASID else _Context.PASIDE.mask)
            | (0 if self._ecap.PRS else _Context.PRE.mask)
        )
        self._check(words, (_mask(_Context) & ~unknown, _mask(_ContextRequest)), FaultCode.SM_CONTEXT_RESERVED, quiet)
        return Directory(
            words[0][1] & _ADDRESS,
            # The directory has 2**(PDTS + 7) entries, each for 64 PASIDs.
            min(1 << entry.PDTS + 7 + 6, 1 << self._ecap.PSS + 1),
            bool(entry.PASIDE),
            request.RID_PASID,
            bool(entry.DTE),
            bool(entry.PRE),
            quiet,
            root + words,
        )

    def entry(self, directory: Directory, pasid: int) -> Entry:
        """The PASID table entry of `pasid`, which is below `directory.pasids`."""
        above = self._read(directory.table + 8 * (pasid >> 6), 1, FaultCode.DIRECTORY_ACCESS, directory.quiet)
        quiet = directory.quiet or bool(_Directory(above[0][1]).FPD)
        if not _Directory(above[0][1]).P:
            raise Refused(FaultCode.DIRECTORY_NOT_PRESENT, quiet)
        self._check(above, (_mask(_Directory),), FaultCode.DIRECTORY_RESERVED, quiet)
        words = self._read((above[0][1] & _ADDRESS) + 64 * (pasid & 0x3F), 8, FaultCode.PASID_ACCESS, quiet)
        low, domain, first = _Pasid(words[0][1]), _DomainWord(words[1][1]), _First(words[2][1])
        quiet = quiet or bool(low.FPD)
        if not low.P:
            raise Refused(FaultCode.PASID_NOT_PRESENT, quiet)
        unknown = (
            0 if self._ecap.SSADS else _Pasid.SSADE.mask,
            (0 if self._ecap.SMPWCS else _DomainWord.PWSNP.mask) | (0 if self._ecap.SC else _DomainWord.PGSNP.mask),
            0,
        )
        known = tuple(_mask(t) & ~u for t, u in zip((_Pasid, _DomainWord, _First), unknown, strict=True))
        self._check(words, known, FaultCode.PASID_RESERVED, quiet)
        if not self._can(low.PGTT, low.AW, first.FSPM):
            raise Refused(FaultCode.PASID_INVALID, quiet)
        # Fields that the stage does not use are set to 0, as software may have any value there.
        stage = Stage(low.PGTT)
        by_first, by_second = stage in (Stage.FIRST, Stage.NESTED), stage in (Stage.SECOND, Stage.NESTED)
        return Entry(
            stage,
            domain.DID,
            words[0][1] & _ADDRESS if by_second else 0,
            low.AW + 2 if by_second else 0,
            words[2][1] & _ADDRESS if by_first else 0,
            _FIRST_LEVELS[first.FSPM] if by_first else 0,
            pasid,
            by_second and bool(low.SSADE),
            quiet=quiet,
            words=directory.words + above + words,
        )

    def _can(self, stage: int, width: int, first_mode: int) -> bool:
        if stage not in list(Stage) or (stage == Stage.NESTED and not self._ecap.NEST):
            return False
        if stage in (Stage.FIRST, Stage.NESTED) and (
            first_mode not in _FIRST_LEVELS or (first_mode and not self._cap.FS5LP)
        ):
            return False
        return stage not in (Stage.SECOND, Stage.NESTED) or self._has_levels(width)


def _mask(layout: type[Layout]) -> int:
    return sum(field.mask for field in layout.fields)
