"""Linux's messages about problems: turns the lines of its log into findings; a splat of many lines is one finding.

The texts are those in the binaries of 6.12 to 7.2; where versions differ, the patterns match both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from vmodel.experiment.oracle import Effect, Finding
from vmodel.guest.kernel_lines import Line


class Sign(NamedTuple):
    """A kind of message: its name, what it means for the run, and its pattern."""

    name: str
    effect: Effect
    pattern: re.Pattern[str]


def _sign(name: str, effect: Effect, *patterns: str) -> Sign:
    return Sign(name, effect, re.compile("|".join(f"(?:{pattern})" for pattern in patterns)))


#: The first sign that matches a line applies.
SIGNS = (
    _sign("panic", Effect.CRASH, r"^Kernel panic - not syncing"),
    _sign("kasan", Effect.CRASH, r"^BUG: (KASAN|KFENCE|KMSAN):"),
    _sign(
        "memory",
        Effect.CRASH,
        r"^BUG: Bad (page|rss)",
        r"^list_(add|del) corruption",
        r"^pagealloc: (memory corruption|single bit error)",
        r"^BUG \S+ \((Not tainted|Tainted)",
        # What SLUB prints before its BUG line, from 6.12 on.
        r"^\[[\w ]+ overwritten\] 0x",
        r"^SLUB:? \S+:? \d+ (partial )?slabs counted but counter=",
        r"^slab: .*(corrupt|overwritten)",
        r"^usercopy: Kernel memory (overwrite|exposure) attempt",
    ),
    _sign("softlockup", Effect.NOTICED, r"BUG: soft lockup - CPU#\d+ stuck"),
    _sign("hardlockup", Effect.NOTICED, r"Watchdog detected hard LOCKUP"),
    _sign("hung-task", Effect.NOTICED, r"^INFO: task \S.*:\d+ blocked.* for more than \d+ seconds"),
    _sign("rcu-stall", Effect.NOTICED, r"^(rcu: )?INFO: \S+ (self-)?detected (expedited )?stalls?\b"),
    _sign(
        "oops",
        Effect.CRASH,
        r"^BUG: (unable to handle|kernel NULL pointer dereference)",
        r"^Oops\b",
        r"^(stack segment|general protection fault|double fault|traps: PANIC)\b.*\[#\d+\]",
    ),
    # The kernel's limits for lockdep's tables are no bug of a driver.
    _sign(
        "lockdep",
        Effect.NOTICED,
        r"^WARNING: (possible (circular|recursive|irq lock)|inconsistent lock|\S+-safe -> |Nested lock was not)",
        r"^WARNING: (bad (unlock balance|contention)|held lock freed|.* still has locks held|lock held when returning)",
        r"^WARNING: (suspicious RCU usage|chain_key collision)",
        r"^\[ BUG: Invalid wait context \]",
        r"^BUG: (MAX_LOCK\w*|MAX_STACK_TRACE_ENTRIES) too low",
    ),
    _sign("bug", Effect.CRASH, r"^kernel BUG at ", r"^BUG: "),
    _sign("warn", Effect.NOTICED, r"^WARNING: (CPU: \d+ PID: \d+ )?(at )?\S+:\d+", r"^WARNING: at \S+\+0x"),
    _sign("ubsan", Effect.NOTICED, r"^UBSAN: "),
    _sign("dma-api", Effect.NOTICED, r"^DMA-API: (?!debugging|preallocated|dma_debug_entry pool|Mapped at)"),
    _sign("debug-objects", Effect.NOTICED, r"^ODEBUG: (?!.*selftest)"),
    _sign("kmemleak", Effect.NOTICED, r"^kmemleak: \d+ new suspected memory leaks"),
    _sign("blocked-task", Effect.NOTICED, r"^task:\S.* state:D\b"),
    _sign(
        "aer",
        Effect.NOTICED,
        r"\bAER: (?!enabled with)",
        r"\b(PCIe|CXL) Bus Error: severity=",
        r"\bDPC: (containment|unmasked)",
    ),
    _sign(
        "iommu-fault",
        Effect.NOTICED,
        r"\bDMAR: \[.*(fault addr|fault index)",
        r"\bDMAR: VT-d detected \w+",
        r"\bDMAR: DRHD: handling fault status",
        r"\bvirtio_iommu \S+ (page|domain|mapping|unknown|\w+) fault from EP",
        r"\bvirtio_iommu \S+ \w+ fault from EP",
        r"\bAMD-Vi: Event logged \[",
        r"\bAMD-Vi: Completion-Wait loop timed out",
        r"\barm-smmu(-v3)? \S+ (event|Unhandled context fault)",
    ),
    _sign("nvme-timeout", Effect.NOTICED, r"\bI/O (tag )?\d+ .*QID \d+ timeout", r"\bFw activation timeout"),
    _sign("nvme-abort", Effect.NOTICED, r"\bAbort status: 0x"),
    _sign(
        "nvme-reset",
        Effect.NOTICED,
        r"\bnvme\S*: (resetting controller|restart after slot reset|frozen state error|controller is down; will reset)",
        r"\bnvme\S*: Disabling device after reset failure",
        r"\bnvme\S*: Device not ready; aborting",
        r"\bnvme\S*: Removing after probe failure",
    ),
    _sign(
        "nvme-error",
        Effect.NOTICED,
        r"\binvalid id \d+ completed on queue",
        r"\bgenctr mismatch",
        r"\bcould not locate request for tag",
        r"\bnvme\S*: .*(I/O Error|Cmd\(.*\), I/O|Admin Cmd\()",
    ),
    _sign("io-error", Effect.NOTICED, r"\berror, dev \S+, sector \d+", r"^Buffer I/O error on dev"),
    _sign(
        "filesystem",
        Effect.NOTICED,
        r"^EXT4-fs (error|warning)",
        r"^EXT4-fs .*: (Remounting|error)",
        r"^JBD2: .*(rror|abort)",
        r"^XFS .*(orrupt|rror|shutdown|Shutting down)",
        r"^BTRFS (error|critical|warning)",
        r"^Aborting journal",
    ),
    _sign(
        "interrupt",
        Effect.NOTICED,
        r"^irq \d+: nobody cared",
        r"^Disabling IRQ #",
        r"[Nn]o irq handler for",
        r"^spurious (APIC )?interrupt",
    ),
    _sign("probe", Effect.NOTICED, r"\bprobe (with driver \S+|of \S+) failed with error"),
    _sign(
        "pci",
        Effect.NOTICED,
        r"\bnot ready \d+ms after ",
        r"Unable to change power state from",
        r"\bpciehp: Slot\(\S+\): (Link Down|Card not present|No link)",
        r"\bBAR \d.*: (failed to assign|can't )",
    ),
    _sign("virtio", Effect.NOTICED, r"\bid \d+ is not a head!", r"\bid \d+ out of range"),
)

#: Failures that somebody has asked for, in debugfs or /proc/PID/fail-nth: with a stack, and no finding.
_ASKED_FOR = _sign("asked-for", Effect.NOTICED, r"^FAULT_INJECTION: forcing a failure")

#: Messages about a slow or busy host that emulates the CPU, not about drivers.
_NOISE = re.compile(
    r"^hrtimer: interrupt took|^clocksource: |^perf: interrupt took|^workqueue: .*hogged CPU|^TSC |^tsc: |^random: "
    r"|^sched: |^kauditd|^audit: |^sysrq: |^-+\[ (cut here|end trace)|^psi: |^Loading of module with unavailable key"
    r"|: loading out-of-tree module taints|module verification failed|^SMP alternatives|^sched_clock:"
    r"|^printk: |^process '.*' started with executable stack"
    # what frames a report
    r"|^={20,}$|^Disabling lock debugging due to kernel taint"
)
_CUT = re.compile(r"^-+\[ cut here \]-+")
_END = re.compile(r"^-+\[ end trace|^</TASK>|^ </TASK>")
#: What may come behind the end; lockdep's kernels have the first four there.
_AFTER = re.compile(r"^(irq event stamp: |(hard|soft)irqs last +(en|dis)abled at |-+\[ end trace|DMA-API: Mapped at)")
#: What an oops has behind its stack: the modules, and all registers again (oops_end in arch/x86/kernel/dumpstack.c).
_SUMMARY = re.compile(
    r"^(?:Modules linked in|CR2: |-+\[ end trace|RIP: |Code: |[ER]?[A-D]X: |RSP: |RBP: |R\d\d: |FS: |CS: |DR\d: |PKRU: "
    r"|Kernel Offset|note: )"
)
#: What a report about a page has behind its stack (dump_page in mm/debug.c).
_PAGE = re.compile(r"^(?:(?:page|flags|raw|head): |page_type: |page dumped because)")
#: Lines that belong to a splat if they follow its first line.
_BODY = re.compile(
    r"^(?:\s|$|Call Trace|\S+\+0x[0-9a-f]+/0x|\[<|Stack|task:"
    # registers and the task
    r"|RIP|[ER]?[A-D]X|RSP|RBP|RS[IP]|R\d\d|RA|FS:|CS:|CR\d|DR\d|PKRU|Code:|CPU: |CPU#|Hardware|Tainted|Workqueue"
    # the page fault and the oops after the first line
    r"|Oops|general protection fault|#PF|PGD|P4D|-+\[|Modules linked|Kernel Offset|note: |Disabling lock debugging"
    # watchdogs, interrupts
    r"|Sending NMI|NMI |rcu: |\(|handlers:|\w+ event stamp|hardirqs|softirqs|Show|\"echo"
    # what the debug kernel adds
    r"|in_atomic\(\): |preempt_count: |RCU nest depth|\d+ locks? held by|no locks held by|Preemption disabled at"
    r"|INFO: lockdep is turned off"
    # KASAN, KFENCE, bad pages, what page poisoning has found
    r"|[0-9a-f]{8,16}: (?:[0-9a-f]{2} )+"
    r"|=====|(?:Read|Write) of|The buggy|which belongs|Allocated by|Freed by|Memory state|addr:|vma"
    r"|(?:page|flags|raw): |page dumped|kfence-#)"
)
#: SLUB's report about an object or a slab (slab_bug, slab_err and object_err in mm/slub.c): its first line, the line
#: that may come before that, and those that follow, with a WARN of its own and what it did about it.
_SLUB = re.compile(r"^BUG \S+ \((?:Not tainted|Tainted)")
_BEFORE_SLUB = re.compile(r"^\[[\w ]+ overwritten\] 0x")
_OF_SLUB = re.compile(
    r"^(?:-{12,}|(?:Allocated|Freed) in |Slab 0x|(?:Object|Redzone|Padding|Bytes b4)\s|FIX \S+: |Slab disabled"
    r"|0x[0-9a-f]+-0x[0-9a-f]+ @offset=|WARNING: .*\bmm/slub\.c:)"
)
#: Reports of which each line belongs to them, whatever it says, until one of these: at most so many.
_WHOLE = {"kasan": re.compile(r"^={20,}$"), **dict.fromkeys(("lockdep", "ubsan", "asked-for"), _END)}
_LONGEST = 300
#: Messages of other CPUs, and of interrupts, may come between the lines of a splat: at most so many.
_OTHERS = 4
#: A WARN's message has at most so many lines.
_MESSAGE = 4
_FUNCTION = re.compile(r"(\?\s+)?\b([A-Za-z_][\w.]*)\+0x[0-9a-f]+/0x[0-9a-f]+")
#: Functions that print a splat, or in which any task sleeps: they do not identify a bug.
_GENERIC = re.compile(
    r"^(show_\w+|dump_stack\w*|__?die\w*|page_fault_oops|kernelmode_fixup_or_oops|\w*exc_\w+|panic|vpanic|__warn\w*|report_bug"
    r"|handle_bug|warn_slowpath\w*|(__)?schedule|io_schedule\w*|schedule_\w+|__wait_for_common|bit_wait\w*"
    r"|preempt_schedule\w*|kasan_\w+|__kasan\w+|print_\w*report\w*|watchdog\w*|__hrtimer\w*|hrtimer\w*|sched_show_task\w*"
    r"|asm_\w+|entry_\w+|do_syscall_64|x64_sys_call|ret_from_fork\w*"
    # the debug kernel's checks
    r"|__asan_\w+|(__)?ubsan_\w+|check_(noncircular|prev\w*|unmap|sync|wait_context)|validate_chain|mark_lock\w*"
    r"|(__)?lock_acquire[.\w]*|__might_\w+[.\w]*|lockdep_\w+|debug_\w+|__debug_\w+|should_fail\w*)$"
)
#: Functions of the allocators, which do not identify what they report.
_ALLOCATOR = re.compile(
    r"^(__)?(slab_(err|bug)|object_err|slab_fix|check_\w*(object|slab|bytes|pad)\w*|(free|alloc)_(debug_processing|to_partial_list)"
    r"|slab_alloc\w*|_*slab_free\w*|___slab_alloc|kfree\w*|kmem_cache_(alloc|free)\w*|kmalloc\w*|kernel_(un)?poison_pages"
    r"|prep_new_page|post_alloc_hook|get_page_from_freelist|alloc_(frozen_)?pages\w*|get_free_pages\w*)(\.\w+)*$"
)
_MOST_FUNCTIONS = 3


#: Returns the file and line of a place in a line of the log, "" if it is unknown.
Where = Callable[[str], str]


def _nowhere(text: str) -> str:
    return ""


@dataclass
class _Splat:
    """Collects the lines of a finding."""

    sign: Sign
    line: Line
    functions: list[str] = field(default_factory=list)
    #: Finds the source of a place in a module, and the first that it has found.
    where: Where = _nowhere
    place: str = ""
    #: Whether more lines may belong to it.
    open: bool = True
    #: Whether it was the message of a WARN so far, and how many lines it has after that.
    message: bool = False
    lines: int = 0
    #: How many lines of others came between its own.
    others: int = 0

    @property
    def of_slub(self) -> bool:
        """Whether it is a report of SLUB's."""
        return bool(_SLUB.match(self.line.text))

    def begins(self, text: str) -> bool:
        """Whether this is what comes before a report of SLUB's, and the next line its first; if so, joins them."""
        if not _BEFORE_SLUB.match(self.line.text) or not _SLUB.match(text):
            return False
        self.line = replace(self.line, text=f"{text}: {self.line.text}")
        return True

    def takes(self, text: str) -> bool:
        """Whether the next line belongs to it; if so, collects the line."""
        if self.of_slub:
            if not _OF_SLUB.match(text) and not _BODY.match(text):
                return False
            self._collect(text)
            return True
        if after := _AFTER.match(text):
            self.open = after[0].startswith("DMA-API")  # the stack of the mapping follows
            return True
        if not self.open:
            behind = {"oops": _SUMMARY, "bug": _SUMMARY, "memory": _PAGE}.get(self.sign.name)
            return behind is not None and bool(behind.match(text))
        if text.startswith("task:") and self.sign.name != "hung-task":
            return False
        end = _WHOLE.get(self.sign.name)
        self.lines += 1
        if not _BODY.match(text) and (end is None or self.lines > _LONGEST):
            return False
        if (end or _END).match(text):
            self.open = False
        self._collect(text)
        return True

    def waits(self) -> bool:
        """Whether it goes on behind a line of another; if so, counts the line."""
        self.others += self.open and self.sign.name in _SPLATS
        return self.open and 0 < self.others <= _OTHERS

    def _collect(self, text: str) -> None:
        """Notes the functions of a line, and the first place in a module."""
        self.place = self.place or self.where(text)
        for unsure, name in _FUNCTION.findall(text):
            generic = _GENERIC.match(name) or (self.sign.name == "memory" and _ALLOCATOR.match(name))
            if not unsure and not generic and name not in self.functions:
                self.functions.append(name)

    def finding(self) -> Finding:
        head = _FUNCTION.search(self.line.text)
        names = self.functions[:_MOST_FUNCTIONS]
        if head and head[2] in names[1:]:
            names.remove(head[2])
        place = f" in {' < '.join(names)}" if names else ""
        source = self.place or self.where(self.line.text)
        # A WARN names its place itself.
        known = not source or source.rpartition("/")[2] in self.line.text
        return Finding(
            oracle=self.line.oracle,
            effect=self.sign.effect,
            sign=self.sign.name,
            text=self.line.text if known else f"{self.line.text} ({source})",
            signature=f"{self.sign.name}: {normal(self.line.text)}{place}",
            at=self.line.at,
            last=self.line.at,
        )


_SPLATS = frozenset(
    (
        *("panic", "oops", "bug", "kasan", "memory", "warn"),
        *("lockdep", "ubsan", "dma-api", "debug-objects", "asked-for"),
        *("softlockup", "hardlockup", "rcu-stall", "hung-task", "blocked-task"),
    )
)
#: The kernel's log levels.  A message that matches no sign counts if it is a warning or more severe.
_ERROR, _WARNING = 3, 4
_UNKNOWN = {
    True: Sign("error", Effect.NOTICED, re.compile("")),
    False: Sign("warning", Effect.NOTICED, re.compile("")),
}


def findings(lines: Iterable[Line], *, unknown: bool = True, where: Where = _nowhere) -> list[Finding]:
    """The findings in these lines, in their order.

    `unknown`: includes errors and warnings that match no sign.  `where`: what finds the source of an oops.
    """
    made: list[_Splat] = []
    current: _Splat | None = None
    cut = False
    for line in lines:
        text = line.text
        if current is not None and current.begins(text):
            continue
        if current is not None and current.of_slub and current.takes(text):
            continue
        if _CUT.match(text):
            current, cut = None, True
            continue
        sign = next((sign for sign in (_ASKED_FOR, *SIGNS) if sign.pattern.search(text)), None)
        if current is not None and current.message:
            current.lines += 1
            current.message = sign is None and current.lines < _MESSAGE and not _BODY.match(text)
            if current.message or (sign is not None and sign.name == "warn"):
                continue  # the rest of the message, and the WARN of it
        inside = current is not None and current.takes(text)
        # "Oops: 0002 [#1]" and "general protection fault" begin a splat, or are the second line of an oops or a BUG.
        if inside and (sign is None or sign.name in ("oops", "blocked-task", "rcu-stall")):
            continue
        if sign is None and cut:
            cut = False  # the message of a WARN, whose splat begins with the next line
            continue
        # Other CPUs' messages may come between the line that announces a WARN and the WARN.
        splat = sign is not None and sign.name in _SPLATS
        message, cut = cut and splat, cut and not splat
        if sign is None and not line.foreign and line.level is not None and line.level <= _WARNING:
            counts = unknown and not inside and text.strip() and not _NOISE.search(text)
            sign = _UNKNOWN[line.level <= _ERROR] if counts else None
        if sign is None:
            if not inside and current is not None and not current.waits():
                current = None
            continue
        found = _Splat(sign, line, open=sign.name in _SPLATS, where=where, message=message)
        made.append(found)
        if current is None or sign.name in _SPLATS or inside or not current.waits():
            current = found
    return summed(splat.finding() for splat in made if splat.sign is not _ASKED_FOR)


def summed(found: Iterable[Finding]) -> list[Finding]:
    """Merges findings with the same signature: `count` is their number, `last` the time of the last one."""
    first: dict[str, Finding] = {}
    for one in found:
        before = first.get(one.signature)
        if before is None:
            first[one.signature] = one
        else:
            times = [at for at in (before.last, one.last) if at is not None]
            first[one.signature] = before.model_copy(
                update={"count": before.count + one.count, "last": max(times, default=None)}
            )
    return list(first.values())


_NORMAL = (
    (re.compile(r"\+0x[0-9a-f]+/0x[0-9a-f]+"), ""),
    (re.compile(r"\b(?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]\b"), "PCI"),
    (re.compile(r"\bCPU: \d+ PID: \d+ at "), ""),
    (re.compile(r" \((?:Not tainted|Tainted: [^)]*)\)"), ""),
    (re.compile(r", CPU#\d+: .*$"), ""),
    (re.compile(r"(\.[ch]):\d+(?: at\b)?"), r"\1"),
    (re.compile(r"^task:(\S+)\s+state:.*"), r"\1"),
    (re.compile(r"\b0x[0-9a-f]+\b|\b[0-9a-f]{8,}\b|\([0-9a-f]{4}\)"), "#"),
    (re.compile(r"\b\d+(?:\.\d+)?(?=[a-z]{0,3}\b)"), "#"),
)


def normal(text: str) -> str:
    """A message without the parts that differ between runs and kernels: addresses, numbers, CPUs, line numbers."""
    for pattern, instead in _NORMAL:
        text = pattern.sub(instead, text)
    return " ".join(text.split())
