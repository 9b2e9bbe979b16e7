"""Lines of kernels to findings and signatures."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmodel.experiment.kernel_log import findings, normal
from vmodel.experiment.oracle import Effect, Finding
from vmodel.guest.kernel_lines import Line, lines_of, merged

#: What kernels print, in the formats of 6.12 ("_new": of 7.2), with made-up addresses.  Those with levels are of the
#: debug kernel and the driver with planted bugs (tests/guest/buggy), without registers.
SPLATS = {path.stem: path.read_text() for path in (Path(__file__).parent / "splats").glob("*.log")}


def of(text: str) -> list[Finding]:
    return findings(lines_of(text))


def signs(text: str) -> list[str]:
    return [finding.sign for finding in of(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SPLATS["oops"], ["oops", "panic"]),
        (SPLATS["oops_summary"], ["oops"]),
        (SPLATS["protection"], ["oops"]),
        (SPLATS["bug_at"], ["memory", "bug"]),
        (SPLATS["kasan"], ["kasan"]),
        (SPLATS["kasan_debug"], ["kasan"]),
        (SPLATS["lockdep"], ["lockdep"]),
        (SPLATS["atomic"], ["bug"]),
        (SPLATS["dma_api"], ["dma-api", "dma-api"]),
        (SPLATS["ubsan"], ["ubsan", "ubsan"]),
        (SPLATS["debug_objects"], ["debug-objects"]),
        (SPLATS["slub_poison"], ["memory"]),
        (SPLATS["slub_redzone_new"], ["memory"]),
        (SPLATS["slub_free"], ["memory"]),
        (SPLATS["page_poison"], ["memory"]),
        (SPLATS["page_poison_new"], ["memory"]),
        (SPLATS["kfence"], ["kasan"]),
        (SPLATS["asked_for"], []),
        (SPLATS["warn"], ["warn"]),
        (SPLATS["warn_new"], ["warn"]),
        (SPLATS["hung_task"], ["hung-task", "hung-task"]),
        (SPLATS["blocked"], ["blocked-task", "blocked-task"]),
        (SPLATS["lockups"], ["softlockup", "rcu-stall", "hardlockup"]),
        (
            SPLATS["others"],
            ["interrupt", "interrupt", "probe", "probe", "pci", "virtio", "virtio", "filesystem", "pci"],
        ),
    ],
)
def test_signs(text: str, expected: list[str]) -> None:
    assert signs(text) == expected


@pytest.mark.parametrize(
    ("text", "sign"),
    [
        ("kmemleak: 3 new suspected memory leaks (see /sys/kernel/debug/kmemleak)", "kmemleak"),
        ("WARNING: possible recursive locking detected", "lockdep"),
        ("WARNING: possible irq lock inversion dependency detected", "lockdep"),
        ("WARNING: inconsistent lock state", "lockdep"),
        ("WARNING: HARDIRQ-safe -> HARDIRQ-unsafe lock order detected", "lockdep"),
        ("WARNING: bad unlock balance detected!", "lockdep"),
        ("WARNING: held lock freed!", "lockdep"),
        ("WARNING: sh/69 still has locks held!", "lockdep"),
        ("WARNING: lock held when returning to user space!", "lockdep"),
        ("WARNING: suspicious RCU usage", "lockdep"),
        ("[ BUG: Invalid wait context ]", "lockdep"),
        ("BUG: MAX_LOCKDEP_ENTRIES too low!", "lockdep"),
        ("BUG: scheduling while atomic: sh/69/0x00000002", "bug"),
        ("DMA-API: preallocated 65536 debug entries", None),
        ("DMA-API: debugging enabled by kernel config", None),
        ("kmemleak: Kernel memory leak detector initialized (mem pool available: 15183)", None),
    ],
)
def test_lines_of_the_debug_kernel(text: str, sign: str | None) -> None:
    """Their texts are those of 6.12."""
    assert signs(f"[    1.000001] {text}") == ([sign] if sign else [])


def test_each_line_of_iommus() -> None:
    found = of(SPLATS["iommu"])
    assert {finding.sign for finding in found} == {"iommu-fault"}
    # The two of VT-d differ in how they write the device, and in the address alone.
    assert [finding.count for finding in found] == [1, 2, 1, 1, 1, 1, 1]


def test_each_line_of_nvme() -> None:
    assert signs(SPLATS["nvme"]) == [
        "nvme-timeout",
        "nvme-abort",
        "nvme-timeout",
        "nvme-reset",
        "nvme-error",
        "io-error",
        "io-error",
        "nvme-error",
        "nvme-reset",
        "nvme-reset",
    ]


def test_each_line_of_aer() -> None:
    assert signs(SPLATS["aer"]) == ["aer", "aer", "nvme-reset", "aer", "aer"]


def test_effects() -> None:
    crash = {
        sign
        for text in SPLATS.values()
        for sign in (finding.sign for finding in of(text) if finding.effect is Effect.CRASH)
    }
    assert crash == {"oops", "panic", "bug", "memory", "kasan"}


@pytest.mark.parametrize(
    ("text", "signature"),
    [
        (
            SPLATS["oops"],
            "oops: BUG: kernel NULL pointer dereference, address: # in nvme_complete_rq < nvme_pci_complete_rq <"
            " nvme_irq",
        ),
        (SPLATS["kasan"], "kasan: BUG: KASAN: slab-out-of-bounds in edu_read [edu] in edu_read < vfs_read"),
        (
            SPLATS["warn"],
            "warn: WARNING: drivers/iommu/dma-iommu.c __iommu_dma_unmap in __iommu_dma_unmap <"
            " iommu_dma_unmap_page < nvme_unmap_data",
        ),
        (
            SPLATS["lockdep"],
            "lockdep: WARNING: possible circular locking dependency detected in lock_order < __mutex_lock < buggy_set",
        ),
        (
            SPLATS["dma_api"],
            "dma-api: DMA-API: buggy PCI: device driver frees DMA memory with different size [device address=#] [map"
            " size=# bytes] [unmap size=# bytes] in mapped < buggy_set < param_attr_store",
        ),
        (
            SPLATS["hung_task"],
            "hung-task: INFO: task dd:# blocked for more than # seconds. in folio_wait_bit_common < filemap_read",
        ),
        (SPLATS["blocked"], "blocked-task: kworker/#:# in nvme_wait_freeze"),
        (
            SPLATS["lockups"],
            "softlockup: watchdog: BUG: soft lockup - CPU## stuck for #s! [modprobe:#] in idio_16_probe <"
            " local_pci_probe",
        ),
    ],
)
def test_signatures(text: str, signature: str) -> None:
    assert of(text)[0].signature == signature


def test_a_warning_has_one_signature_in_all_kernels() -> None:
    assert [f.signature for f in of(SPLATS["warn"])] == [f.signature for f in of(SPLATS["warn_new"])]


def test_levels_of_what_no_sign_names() -> None:
    raw = "<3>[    1.000001] foo 0000:00:03.0: bad thing 17\n<4>[    1.000002] foo: hm\n<6>[    1.000003] foo: fine\n"
    found = findings(lines_of(raw, "kernel log"))
    assert [(f.sign, f.effect, f.signature) for f in found] == [
        ("error", Effect.NOTICED, "error: foo PCI: bad thing #"),
        ("warning", Effect.NOTICED, "warning: foo: hm"),
    ]
    assert findings(lines_of(raw, "kernel log"), unknown=False) == []
    assert of(raw.replace("<3>", "").replace("<4>", "").replace("<6>", "")) == []  # a console knows no levels


def test_what_programs_write_is_not_the_kernels() -> None:
    assert findings(lines_of("<11>[    1.000001] my script failed\n", "kernel log")) == []


def test_noise_of_a_slow_host() -> None:
    text = "<4>[    1.000001] hrtimer: interrupt took 2400000 ns\n<4>[    1.000002] clocksource: 'tsc' is unstable\n"
    assert findings(lines_of(text, "kernel log")) == []


def test_registers_in_a_log_with_levels_are_part_of_the_splat() -> None:
    text = "".join(f"<4>{line}\n" for line in SPLATS["warn"].splitlines())
    assert [f.sign for f in findings(lines_of(text, "kernel log"))] == ["warn"]


@pytest.mark.parametrize("name", ["warn", "warn_new", "oops_summary", "bug_at"])
def test_messages_of_others_do_not_end_a_splat(name: str) -> None:
    """Another CPU, or an interrupt, reports while the registers are printed."""
    lines = [f"<4>{line}\n" for line in SPLATS[name].splitlines()]
    known = [f.signature for f in findings(lines_of("".join(lines), "kernel log"))]
    others = [
        "<3>[    5.300007] memcard 0000:00:03.0: block 0: error 3\n",
        "<6>[    5.300007] usb 1-1: new device\n",
        "<3>[    5.300007] virtio_iommu virtio0: page fault from EP 24 at 0x1000 [R]\n",
    ]
    begin = next(n for n, line in enumerate(lines) if "RIP: " in line)
    for at in range(begin, len(lines) - 2):
        found = findings(lines_of("".join(lines[:at] + others + lines[at:]), "kernel log"))
        assert [f.signature for f in found if f.sign not in ("error", "iommu-fault")] == known
        assert {"error", "iommu-fault"} <= {f.sign for f in found}


@pytest.mark.parametrize(
    "between",
    [
        "<3>[    5.300001] virtio_iommu virtio0: page fault from EP 24 at 0xffff0000 [R]",
        "<3>[    5.300001] memcard 0000:00:03.0: block 3: error 5",
    ],
)
def test_what_comes_before_a_warns_first_line_does_not_hide_it(between: str) -> None:
    """Another CPU's message, between the line that announces a WARN and the WARN."""
    cut, _, *splat = SPLATS["warn"].splitlines()
    [alone] = findings(lines_of("\n".join((cut, *splat))))
    found = findings(lines_of("\n".join((cut, between, *splat))))
    assert alone.sign == "warn" and alone.signature in [one.signature for one in found]
    assert {one.sign for one in found} <= {"warn", "iommu-fault"}


def test_equal_ones_are_counted() -> None:
    text = "".join(f"[    1.{n:06}] I/O error, dev sda, sector {n} op 0x0:(READ)\n" for n in range(9))
    lines = [Line(line.text, line.stamp, at=float(n)) for n, line in enumerate(lines_of(text))]
    (found,) = findings(lines)
    assert (found.count, found.at, found.last) == (9, 0.0, 8.0)


def test_console_and_log_are_one() -> None:
    """The console knows when a line came, the log its level; a line of a dead guest is on the console alone."""
    console = [Line("a", "1.000001", at=5.0), Line("b", "1.000002", at=6.0)]
    log = lines_of("<3>[    1.000001] a\n<6>[    0.500000] early\n", "kernel log")
    early, a, b = merged(console, log)
    assert (early.text, early.at, early.level) == ("early", None, 6)
    assert (a.at, a.level, a.oracle) == (5.0, 3, "kernel log")
    assert (b.at, b.level, b.oracle) == (6.0, None, "console")


def test_what_is_no_line_of_the_kernel() -> None:
    assert lines_of("SeaBIOS (version 1.17)\r\n[ x ] y\n\n") == []
    assert lines_of("[    1.000001][    T1] with a caller") == [Line("with a caller", "1.000001")]


def test_normal() -> None:
    assert normal("foo+0x1b/0x1f0 at 0x10, 0000:00:03.0 took 12ms, nvme0n1") == "foo at #, PCI took #ms, nvme0n1"


def test_a_report_of_slub_is_one_finding() -> None:
    """Of all its lines: what comes before "BUG", its WARN, and what it does about it.  What follows is none of it."""
    (found, after) = of(SPLATS["slub_poison"] + "<3>[   20.0] mycard 0000:00:03.0: time-out\n")
    assert found.text.startswith("BUG write_after_free (Tainted: ")
    assert found.text.endswith("First byte 0x1 instead of 0x6b")
    assert found.signature == (
        "memory: BUG write_after_free: Object corrupt: [Poison overwritten] #-# @offset=#. First byte # instead of #"
        " in write_after_free < bug_store < kernfs_fop_write_iter"
    )
    assert after.text == "mycard 0000:00:03.0: time-out"


def test_two_reports_of_slub() -> None:
    """The second begins with its own line before "BUG"; the taint, which differs by then, is no part of a signature."""
    (found,) = of(SPLATS["slub_poison"] + SPLATS["slub_poison"].replace("G           OE", "G    B   W  OE"))
    assert found.count == 2
    assert [one.sign for one in of(SPLATS["slub_poison"] + SPLATS["slub_free"])] == ["memory", "memory"]


def test_a_page_that_was_written_is_named_by_who_noticed() -> None:
    (found,) = of(SPLATS["page_poison"])
    assert found.signature.startswith("memory: pagealloc: memory corruption in write_free_page < bug_store")


def test_the_warning_beside_slubs_is_one_of_its_own() -> None:
    text = SPLATS["slub_free"] + "<4>[   20.0] WARNING: CPU: 0 PID: 9 at drivers/pci/msi.c:5 f+0x1/0x2\n"
    assert signs(text) == ["memory", "warn"]
