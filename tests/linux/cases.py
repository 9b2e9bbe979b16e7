"""All cases (TEST_F) of Linux 7.3's iommufd selftest, and what vmodel makes of each.

tools/testing/selftests/iommu/iommufd.c; a case counts once, whatever variants its fixture has.
`python -m tests.linux.cases` prints the tables of docs/iommu-and-linux.md.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Verdict(enum.Enum):
    """What holds of a case; the values are the columns of the table."""

    HOLDS = "hold"
    #: The rest of it needs what vmodel does not have.
    IN_PART = "in part"
    #: vmodel answers one of its checks differently: a row of DIFFERENCES beside the others.
    DIFFERS = "differ"
    NOT_MODELLED = "not modelled"


@dataclass(frozen=True)
class Case:
    """`name` is "fixture.name"; `why` it does not hold, or not all of it."""

    name: str
    verdict: Verdict
    why: str

    @property
    def fixture(self) -> str:
        return self.name.split(".")[0]


ABI = "the layout of ioctls: sizes, pointers and their alignment, flags and arrays in them, ids of a wrong type"
UNSHARE = "private mappings of a file, which a write replaces by a copy: a mapping leads to a GPA"
MMAP = "mmap of /dev/iommu"
MEMORY = "a GPA need not be memory, so that `map` does not fail with EFAULT; DMA to it faults"

_WHAT = {
    Verdict.HOLDS: {
        "": """
            iommufd.simple_close iommufd.simple_ioctls iommufd.unmap_cmd iommufd.map_cmd iommufd.info_cmd
            iommufd.set_iommu_cmd iommufd.vfio_ioas
            vfio_compat_mock_domain.simple_close vfio_compat_mock_domain.get_info vfio_compat_mock_domain.map
            vfio_compat_mock_domain.huge_map
            iommufd_ioas.ioas_auto_destroy iommufd_ioas.ioas_destroy iommufd_ioas.hwpt_attach
            iommufd_ioas.ioas_area_destroy iommufd_ioas.ioas_area_auto_destroy iommufd_ioas.area
            iommufd_ioas.unmap_fully_contained_areas iommufd_ioas.area_auto_iova iommufd_ioas.reserved_overflow
            iommufd_ioas.area_allowed iommufd_ioas.copy_area iommufd_ioas.ioas_iova_alloc iommufd_ioas.copy_sweep
            iommufd_ioas.access_domain_destory iommufd_ioas.access_pin iommufd_ioas.access_pin_unmap
            iommufd_ioas.access_rw iommufd_ioas.access_rw_unaligned iommufd_mock_domain.user_copy
            iommufd_mock_domain.all_aligns iommufd_mock_domain.all_aligns_copy
            iommufd.global_options iommufd_ioas.ioas_option_huge_pages iommufd_ioas.ioas_align_change
            vfio_compat_mock_domain.option_huge_pages
            change_process.basic iommufd_ioas.fork_gone iommufd_ioas.fork_present
            iommufd_ioas.dmabuf_simple iommufd_ioas.dmabuf_revoke
            iommufd_mock_domain.replace iommufd_mock_domain.alloc_hwpt
            iommufd_dirty_tracking.enforce_dirty iommufd_dirty_tracking.set_dirty_tracking
            iommufd_dirty_tracking.pasid_set_dirty_tracking iommufd_dirty_tracking.device_dirty_capability
            iommufd_device_pasid.pasid_attach
            iommufd_viommu.viommu_auto_destroy iommufd_viommu.viommu_negative_tests
            iommufd_viommu.viommu_alloc_nested_iopf iommufd_viommu.vdevice_alloc
            iommufd_viommu.hw_queue iommufd_viommu.vdevice_tombstone
            """,
    },
    Verdict.IN_PART: {
        ABI: """
            iommufd.cmd_fail iommufd.cmd_ex_fail iommufd_ioas.get_hw_info iommufd_ioas.alloc_hwpt_nested
            iommufd_dirty_tracking.get_dirty_bitmap iommufd_dirty_tracking.get_dirty_bitmap_no_clear
            iommufd_viommu.vdevice_cache iommufd_ioas.iova_ranges
            """,
        MMAP: "iommufd_viommu.viommu_alloc_with_data",
    },
    Verdict.DIFFERS: {
        MEMORY: "iommufd_mock_domain.basic",
    },
    Verdict.NOT_MODELLED: {
        ABI: "iommufd.cmd_length",
        UNSHARE: "iommufd_mock_domain.ro_unshare",
    },
}
CASES = [
    Case(name, verdict, why)
    for verdict, reasons in _WHAT.items()
    for why, names in reasons.items()
    for name in names.split()
]


def tables() -> str:
    """Both tables of docs/iommu-and-linux.md: how many cases of each fixture hold, and why the others do not."""
    shown = [verdict for verdict in Verdict if any(case.verdict is verdict for case in CASES)]
    lines = [
        "| fixture | cases | " + " | ".join(verdict.value for verdict in shown) + " |",
        "|---" * (len(shown) + 2) + "|",
    ]
    for fixture in [*dict.fromkeys(case.fixture for case in CASES), ""]:
        found = [case for case in CASES if fixture in ("", case.fixture)]
        counts = [len(found), *(sum(case.verdict is verdict for case in found) for verdict in shown)]
        lines.append(f"| {f'`{fixture}`' if fixture else 'all'} | " + " | ".join(str(n or "–") for n in counts) + " |")
    lines += ["", "| cases that do not hold, or not all of it | | why |", "|---|---|---|"]
    for why in dict.fromkeys(case.why for case in CASES if case.why):
        for verdict in shown:
            if names := [f"`{case.name}`" for case in CASES if (case.why, case.verdict) == (why, verdict)]:
                lines.append(f"| {', '.join(names)} | {verdict.value} | {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(tables(), end="")
