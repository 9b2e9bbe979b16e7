"""A user's data for nested HWPTs, by kind of IOMMU (Linux enum iommu_hwpt_data_type), and what it leads to."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from dataclasses import dataclass

from vmodel import _shim
from vmodel.errors import IommuError
from vmodel.iommu.allocate import nested_domain_alloc
from vmodel.iommu.domain import Domain, DomainType, PagingDomain
from vmodel.iommu.endpoint import Endpoint
from vmodel.iommu.pgtable import Table, TableFormat
from vmodel.memory import GuestMemory

_PAGE_MASK = ~0xFFF


@dataclass(frozen=True)
class VtdStage1:
    """struct iommu_hwpt_vtd_s1: an x86-64 table at GPA `pgtbl_addr`; `addr_width` 48 or 57 bits.

    `flags`: VtdStage1.SRE, EAFE, WPE.  IommuError(EINVAL): a value is wider than its field.
    """

    pgtbl_addr: int
    addr_width: int = 48
    flags: int = 0

    SRE = 1
    EAFE = 2
    WPE = 4

    def __post_init__(self) -> None:
        check_words("a stage 1 of VT-d", (self.pgtbl_addr, self.flags))
        check_words("a stage 1 of VT-d", (self.addr_width,), 32)


@dataclass(frozen=True)
class SmmuV3Ste:
    """struct iommu_hwpt_arm_smmuv3: the first two words of a stream table entry (IHI 0070, 5.2).

    IommuError(EINVAL): a word has more than 64 bits.
    """

    word0: int
    word1: int = 0

    def __post_init__(self) -> None:
        check_words("a stream table entry", (self.word0, self.word1))


@dataclass(frozen=True)
class AmdGuestDte:
    """struct iommu_hwpt_amd_guest: a guest's device table entry (48882, 2.2.2.1).

    IommuError(EINVAL): not four words of 64 bits.
    """

    words: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        if len(self.words) != 4:
            raise IommuError(errno.EINVAL, f"a device table entry of {len(self.words)} words")
        check_words("a device table entry", self.words)


NestedData = VtdStage1 | SmmuV3Ste | AmdGuestDte


def check_words(what: str, words: tuple[int, ...], bits: int = 64) -> None:
    """IommuError(EINVAL): one of the words of `what` does not have `bits` bits."""
    if any(not 0 <= word < 1 << bits for word in words):
        raise IommuError(errno.EINVAL, f"{what}: a word is not one of {bits} bits")


class Stage1(ABC):
    """Stage 1 of a nested HWPT: the user's data, and what the IOMMU has read from guest memory by it."""

    #: Why it cannot be attached; None: it can.
    unfit: str | None = None
    #: Whether each device that is attached needs a vDEVICE.
    needs_vdevice = False

    @abstractmethod
    def read(self) -> Domain:
        """Reads what the data points to, as the IOMMU does at the first access; returns the domain of accesses."""

    def read_pasid(self, pasid: int) -> Domain | None:
        """As `read`, of accesses with a PASID; None: the data do not lead to tables of PASIDs."""
        return None

    def drop_pasids(self) -> None:
        """What was read of PASIDs is not valid any more; nothing is attached to it."""
        return


class Aborting(Domain):
    """The domain of a nested HWPT whose tables cannot be used: blocks all accesses."""

    def __init__(self, name: str) -> None:
        super().__init__(DomainType.NESTED, _shim.Domain.plain(_shim.DOMAIN_BLOCKED), None, name)


class GuestTables:
    """Reads a guest's tables at the addresses that stage 2 translates."""

    def __init__(self, parent: PagingDomain, memory: GuestMemory) -> None:
        self._requester = _shim.Requester(memory.shim)
        self._requester.enable(True)
        self._requester.attach(parent.shim)

    def words(self, at: int, count: int) -> list[int]:
        """`count` words of 8 bytes.  DmaFault: stage 2 does not map them, or there is no memory."""
        data = self._requester.read(at, 8 * count)
        return [int.from_bytes(data[n : n + 8], "little") for n in range(0, len(data), 8)]


class VtdNested(Stage1):
    """VT-d's stage 1 (Linux intel_iommu_domain_alloc_nested); a guest's table needs no further reads."""

    def __init__(self, endpoint: Endpoint, parent: PagingDomain, memory: GuestMemory, data: VtdStage1) -> None:
        """IommuError as nested_domain_alloc."""
        assert endpoint.iommu is not None
        can = endpoint.iommu.capabilities
        # Linux checks these when it attaches (intel_pasid_setup_nested).
        if data.addr_width not in (48, 57) or (data.addr_width == 57 and can.input_bits < 57):
            self.unfit = f"its tables have {data.addr_width} bits"
        elif data.flags & (VtdStage1.SRE | VtdStage1.EAFE):
            self.unfit = "the unit has neither supervisor requests nor extended access flags"
        wide = self.unfit is None and data.addr_width == 57
        levels, bits = (5, 57) if wide else (4, 48)
        table = Table(TableFormat.X86, levels, data.pgtbl_addr & _PAGE_MASK, bits, min(can.output_bits, 52))
        self.domain = nested_domain_alloc(endpoint, parent, memory, table)

    def read(self) -> Domain:
        return self.domain
