"""`Nvme`: the controller as a PCI function; its registers, resets, queues and interrupts (NVMe 1.4, 3, 7)."""

from __future__ import annotations

import errno
import functools
import os
import uuid
from collections.abc import Iterable
from typing import Self, cast

from vmodel._shim import FunctionRegions
from vmodel.device import Intx, MmioBar, Msi, Msix, PciDevice, Pcie, Pm, ResetKind, on_write, on_write_each
from vmodel.devices.nvme.admin import AdminCommands
from vmodel.devices.nvme.arbiter import Arbiter
from vmodel.devices.nvme.backend import Job, Op
from vmodel.devices.nvme.command import COMPLETION_SIZE, SUBMISSION_SIZE, NvmeCommand
from vmodel.devices.nvme.events import AsyncEvent, Events
from vmodel.devices.nvme.fast import FastPath
from vmodel.devices.nvme.features import Features
from vmodel.devices.nvme.firmware import Firmware
from vmodel.devices.nvme.health import Health
from vmodel.devices.nvme.identify import KEEP_ALIVE_GRANULARITY
from vmodel.devices.nvme.inventory import Inventory
from vmodel.devices.nvme.io import IoCommands
from vmodel.devices.nvme.namespace import Namespace, Protection
from vmodel.devices.nvme.params import NvmeParams
from vmodel.devices.nvme.queue import CompletionQueue, SubmissionQueue
from vmodel.devices.nvme.regs import (
    DOORBELLS_AT,
    QUEUE_PAIRS,
    SUBSYSTEM_RESET,
    Aqa,
    Cc,
    ControllerRegs,
    Csts,
    NvmeCap,
    doorbells,
)
from vmodel.devices.nvme.sanitize import Sanitize
from vmodel.devices.nvme.selftest import DeviceSelfTest
from vmodel.devices.nvme.status import CommandError, NvmeStatus
from vmodel.devices.nvme.work import Failure, Work
from vmodel.errors import DmaFault, PeerError
from vmodel.points import Point
from vmodel.span import PAGE
from vmodel.timers import Timer

#: Vectors of MSI; MSI-X has one for each completion queue.
_MSI_VECTORS = 32
#: Longest time to become ready (CAP.TO), in units of 500 ms.
_TIMEOUT = 20
_SHUTTING_DOWN, _SHUT_DOWN = 1, 2
_READY = Csts.RDY.mask
_WORKING = _READY | Csts.CFS.mask
_NAMES = uuid.UUID("6d6f6465-6c20-4e56-8d65-206e616d6573")
#: Statuses that tell the host nothing that it did not ask for: not for the error log.
_ASKED_FOR = (NvmeStatus.ABORT_REQUESTED, NvmeStatus.ABORTED_SQ_DELETION, NvmeStatus.COMPARE_FAILURE)

_Doorbells = doorbells(0)


class Nvme(PciDevice):
    """NVMe 1.4 controller."""

    vendor_id, device_id, class_code, revision = 0x1234, 0x4E56, 0x010802, 0x01
    subsystem_vendor_id, subsystem_id = 0x1234, 0x4E56

    bar0 = MmioBar(0, size=0x4000, is_64bit=True, fill=0)  # what is reserved returns 0 (3.1)
    regs = bar0.bank(ControllerRegs)
    doorbells = bar0.bank(_Doorbells, at=DOORBELLS_AT)
    pm = Pm(no_soft_reset=False)
    msix: Msix | None = Msix(vectors=QUEUE_PAIRS, own_bar=4)
    msi: Msi | None = None
    pcie = Pcie()
    intx = Intx()

    Params = NvmeParams
    params: NvmeParams
    #: The parameters (interrupts, doorbell stride) that this class's declaration is for.
    _declared_for = ("msix", 0)

    @classmethod
    def for_params(cls, params: NvmeParams) -> type[Self]:
        """The class with the interrupt type and the doorbell stride that the parameters choose."""
        # mypy does not see that a class is hashable.
        return cast(type[Self], _variant(cls, params.interrupts, params.doorbell_stride))  # type: ignore[arg-type]

    def setup(self) -> None:
        self.serial = self.params.serial or self.name[:20]
        # The name makes it unique even if two controllers have the same serial number.
        identity = f"{self.serial} {self.name}"
        self.uuid = uuid.uuid5(_NAMES, identity)
        self.health = Health()
        self.firmware = Firmware(self.params.firmware)
        self.inventory = Inventory(identity, self.params.capacity or 0)
        self.features = Features(self)
        self.events = Events()
        self.sanitize = Sanitize(self)
        self.self_test = DeviceSelfTest(self)
        self.max_transfer = self.params.max_transfer
        self.fast = FastPath(self, enabled=self.params.fast_path)
        self.admin = AdminCommands(self)
        self.io = IoCommands(self)
        self.arbiter = Arbiter(self)
        #: Queues by id; 0 is the admin queue.
        self.submission: dict[int, SubmissionQueue] = {}
        self.completion: dict[int, CompletionQueue] = {}
        self.page_size = 4096
        self._shadow: tuple[int, int] | None = None
        #: The flush that a shutdown waits for.
        self._flushing: Work | None = None
        self._was_shut_down = False
        self._keep_alive: Timer | None = None
        self._keep_alive_ms = 0
        #: The vectors that INTMS masks, and those that are pending behind the mask.
        self._masked = self._pending = 0
        self._opened = False

    @property
    def function(self) -> FunctionRegions:
        """The shim's function, which the fast path's workers wake."""
        return self.backend.function

    # ---- resets ----------------------------------------------------------------------------

    def open(self) -> None:
        if not self._opened:
            self.inventory.open(self.params.namespaces, self.fast.workers)
            self._opened = True

    def close(self) -> None:
        self._drop_queues()
        super().close()
        self.fast.close()
        self.inventory.close()
        self._opened = False

    def save_extra(self) -> bytes:
        # The state would include queues, commands in progress and the blocks of all namespaces.
        raise PeerError(errno.ENOTSUP, f"{self.name}: an NVMe controller cannot be migrated")

    def restore_extra(self, data: bytes) -> None:
        raise PeerError(errno.EINVAL, f"{self.name}: an NVMe controller has no state that could be restored")

    def on_reset(self, kind: ResetKind) -> None:
        if kind is ResetKind.DEVICE:
            self.health.power_cycles += 1
            self.health.unsafe_shutdowns += bool(self.submission) and not self._was_shut_down
            for namespace in self.inventory.allocated:
                if namespace.protection is Protection.UNTIL_POWER_CYCLE:
                    namespace.protection = Protection.NONE
        self._controller_reset()
        self._load_capabilities()
        # The reset has dropped the deferred work of these.
        self.admin.resume()
        self.sanitize.resume()

    def _load_capabilities(self) -> None:
        params = self.params
        cap = NvmeCap.MQES.put(0, params.queue_entries - 1)
        for field, value in (
            (NvmeCap.CQR, 1),
            (NvmeCap.AMS, 1),
            (NvmeCap.TO, _TIMEOUT),
            (NvmeCap.DSTRD, params.doorbell_stride),
            (NvmeCap.NSSRS, int(params.subsystem_reset)),
            (NvmeCap.CSS, 1),
            (NvmeCap.MPSMAX, params.max_page_shift - 12),
        ):
            cap = field.put(cap, value)
        self.regs.CAP = cap

    def _drop_queues(self) -> None:
        for queue in self.submission.values():
            queue.close()
        for cq in self.completion.values():
            cq.close()
        self.submission.clear()
        self.completion.clear()
        self._drive_pin()
        self.io.reset()
        self.fast.reset()

    def _controller_reset(self) -> None:
        """Controller Level Reset (7.3.2), without the registers."""
        self._drop_queues()
        if self._flushing is not None:
            self._flushing.cancel()
            self._flushing = None
        self.arbiter.reset()
        self.events.clear()
        self.features.reset()
        self.firmware.reset()
        self.self_test.reset()
        self._shadow = None
        self._masked = self._pending = 0
        self.keep_alive(0)

    def _subsystem_reset(self) -> None:
        """NVM Subsystem Reset (7.3.1); the subsystem has only this controller.  Config space keeps its values."""
        self._controller_reset()
        self.regs.load_reset()
        self._load_capabilities()
        self.regs.CSTS = Csts.NSSRO.mask

    def on_wake(self) -> None:
        self.fast.collect()

    # ---- registers -------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """Whether the controller carries out commands: it is ready and has not failed."""
        status: int = self.regs.CSTS & _WORKING
        return status == _READY

    @on_write(ControllerRegs.CC)
    def _configure(self, new: int) -> int:
        before, after = Cc(self.regs.CC), Cc(new)
        if before.EN and not after.EN:
            self._disable()
        elif after.EN and not before.EN:
            self.regs.CC = new  # the queues look at it
            self._enable(after)
        elif after.EN:
            # These fields must not change while the controller is enabled: they keep their values.
            for field in (Cc.CSS, Cc.MPS, Cc.AMS):
                new = field.put(new, field.of(before.value))
        if after.SHN and after.SHN != before.SHN:
            self._shutdown()
        return new

    def _enable(self, cc: Cc) -> None:
        wrong = self._misuse(cc)
        if wrong is not None:
            self._fail(f"it cannot be enabled: {wrong}")
            return
        self.page_size = 4096 << cc.MPS
        attributes = Aqa(self.regs.AQA)
        cq = CompletionQueue(self, 0, self.regs.ACQ, attributes.ACQS + 1, 0, True)
        self.completion[0] = cq
        self.submission[0] = SubmissionQueue(self, 0, self.regs.ASQ, attributes.ASQS + 1, cq)
        self.arbitrate()
        self._was_shut_down = False
        # Enabling ends a shutdown.
        status = Csts.SHST.put(self.regs.CSTS, 0) if self._flushing is None else self.regs.CSTS
        self.regs.CSTS = Csts.RDY.put(status, 1)

    def _misuse(self, cc: Cc) -> str | None:
        """Why the controller cannot be enabled; None: it can."""
        if Csts(self.regs.CSTS).CFS:
            return "it has failed, and was not reset"
        if cc.CSS:
            return f"command set {cc.CSS}"
        if cc.AMS > 1:
            return f"arbitration {cc.AMS}"
        if cc.MPS > NvmeCap(self.regs.CAP).MPSMAX:
            return f"page size {4096 << cc.MPS}"
        attributes = Aqa(self.regs.AQA)
        if not attributes.ASQS or not attributes.ACQS:
            return "an admin queue with one entry"
        sizes = (attributes.ASQS + 1) * SUBMISSION_SIZE, (attributes.ACQS + 1) * COMPLETION_SIZE
        for address, size in zip((self.regs.ASQ, self.regs.ACQ), sizes, strict=True):
            if address % (4096 << cc.MPS):
                return f"an admin queue at {address:#x}, which is not page-aligned"
            if address + size > 1 << 64:
                return f"an admin queue at {address:#x}, which extends past the last address"
        return None

    def _disable(self) -> None:
        self._controller_reset()
        self.regs.INTMS = self.regs.INTMC = 0
        self.regs.CSTS &= Csts.NSSRO.mask

    def _shutdown(self) -> None:
        """Shutdown, normal or abrupt (7.6.2): once it is complete, all written data is durable."""
        if self._flushing is not None:
            return
        self.regs.CSTS = Csts.SHST.put(self.regs.CSTS, _SHUTTING_DOWN)
        syncs = [(namespace, Job(Op.SYNC)) for namespace in self.inventory.allocated if not namespace.backend.read_only]
        self._flushing = Work(self, syncs, self._shut_down)
        self._flushing.resume()

    def _shut_down(self, failure: Failure | None) -> None:
        self._flushing = None
        if failure is not None:
            self.log.warning("%s: namespace %d could not be flushed", self.name, failure.namespace.nsid)
            self._fail(f"shutdown: {os.strerror(failure.code)}")
            return
        self._was_shut_down = True
        self.regs.CSTS = Csts.SHST.put(self.regs.CSTS, _SHUT_DOWN)

    @on_write(ControllerRegs.NSSR)
    def _reset_subsystem(self, new: int) -> int:
        if new == SUBSYSTEM_RESET and self.params.subsystem_reset:
            # Deferred, as the hooked register is among those that the reset changes.
            self.defer(self._subsystem_reset)
        return 0

    @on_write(ControllerRegs.INTMS)
    def _mask(self, new: int) -> int:
        self._masked |= new
        self.regs.INTMC = self._masked
        self._drive_pin()
        return self._masked

    @on_write(ControllerRegs.INTMC)
    def _unmask(self, new: int) -> int:
        self._masked &= ~new
        self.regs.INTMS = self._masked
        due, self._pending = self._pending & ~self._masked, self._pending & self._masked
        for vector in range(_MSI_VECTORS):
            if due >> vector & 1:
                self.interrupt(vector)
        self._drive_pin()
        return self._masked

    @on_write_each(*_Doorbells.registers)
    def _ring(self, n: int, new: int) -> None:
        if self.points.armed(Point.DOORBELL):
            kind = "completion" if n & 1 else "submission"
            self.points.doorbell(lambda _: self._rung(n, new), queue=n >> 1, kind=kind)
        else:
            self._rung(n, new)

    def _rung(self, n: int, new: int) -> None:
        queue = (self.completion if n & 1 else self.submission).get(n >> 1)
        if queue is None:
            if self.enabled:
                self.events.report(AsyncEvent.INVALID_DOORBELL_REGISTER)
        elif self.enabled and not queue.doorbell(new):
            self.events.report(AsyncEvent.INVALID_DOORBELL_VALUE)
        elif n & 1:
            self._taken(self.completion[n >> 1])

    def _taken(self, cq: CompletionQueue) -> None:
        """Withdraws a pending interrupt whose completions the driver has taken.

        A pending bit is cleared when the cause is gone (PCIe 5.0, 6.1.4.5); the pin is lowered (7.5.1).
        """
        vector, messages = cq.vector, self._messages
        if messages is None and self.intx.level:
            self._drive_pin()
        if self._pending >> vector & 1 or (messages is not None and messages.pending(vector)):
            users = (other for other in self.completion.values() if other.vector == vector and other.interrupts)
            if not any(other.pending for other in users):
                self._pending &= ~(1 << vector)
                if messages is not None:
                    messages.withdraw(vector)

    @property
    def _messages(self) -> Msi | Msix | None:
        """The message interrupts that the driver has enabled; None: it uses the pin."""
        if self.msix is not None and self.msix.enabled:
            return self.msix
        return self.msi if self.msi is not None and self.msi.enabled else None

    # ---- what queues and commands need -----------------------------------------------------

    @property
    def vectors(self) -> int:
        """Number of interrupt vectors for completion queues; with MSI, those that the guest has allocated (5.3)."""
        if self.msix is not None:
            return self.msix.vectors
        if self.msi is not None and self.msi.enabled:
            return self.msi.allocated
        return _MSI_VECTORS

    @property
    def has_io_queues(self) -> bool:
        """Whether there are queues besides the admin queues."""
        return len(self.submission) > 1 or len(self.completion) > 1

    def interrupt(self, vector: int) -> None:
        """Raises an interrupt vector, or the pin."""
        if self.msix is not None and self.msix.enabled:
            self.msix.fire(vector)
        elif vector < _MSI_VECTORS and self._masked >> vector & 1:
            self._pending |= 1 << vector
        elif self.msi is not None and self.msi.enabled:
            self.msi.fire(vector)
        else:
            self._drive_pin()

    def _drive_pin(self) -> None:
        """Sets the pin's level: asserted while completions wait for the driver and MSI(-X) is disabled (7.5.1)."""
        queues = self.completion.values()
        if self._messages is None and any(
            cq.interrupts and cq.pending and not self._masked >> cq.vector & 1 for cq in queues
        ):
            self.intx.raise_()
        elif self.intx.level:
            self.intx.lower()

    def arbitrate(self) -> None:
        """Applies CC.AMS and the feature Arbitration to the arbiter."""
        self.arbiter.weights = self.features.weights if Cc(self.regs.CC).AMS else None
        self.arbiter.set_burst(self.features.burst)

    def coalesced(self, vector: int) -> tuple[int, float]:
        """(completions, seconds) to coalesce before the vector is raised; (1, 0): no coalescing."""
        return self.features.coalescing(vector)

    def failed(self, sq: SubmissionQueue, command: NvmeCommand, error: CommandError) -> bool:
        """Records a failed command; returns whether the error log has an entry for it."""
        if error.status in _ASKED_FOR:
            return False
        self.health.failed(sq.qid, command, error)
        return True

    def fatal(self, what: str, fault: DmaFault) -> None:
        """Sets CSTS.CFS, as the memory of a queue cannot be accessed; `what` names it for the log."""
        self._fail(f"{what}: {fault}")

    def _fail(self, why: str) -> None:
        self.log.warning("%s: fatal: %s", self.name, why)
        self.regs.CSTS = Csts.CFS.put(self.regs.CSTS, 1)
        self._drop_queues()

    @property
    def write_cache(self) -> bool:
        """Feature Volatile Write Cache."""
        return self.features.write_cache

    def namespace(self, nsid: int) -> Namespace:
        """An attached namespace that commands may access.  CommandError: its id is invalid, inactive or not ready."""
        namespace = self.inventory.attached(nsid)
        self.sanitize.check()
        if namespace.formatting:
            raise CommandError(NvmeStatus.FORMAT_IN_PROGRESS, dnr=False)
        return namespace

    def namespaces(self) -> Iterable[Namespace]:
        """All attached namespaces."""
        return self.inventory.active

    def namespace_changed(self, nsid: int) -> None:
        """Reports that a namespace was attached, detached or changed."""
        self.admin.logs.changed.add(nsid)
        self.notice(AsyncEvent.NAMESPACE_CHANGED)

    def notice(self, event: AsyncEvent) -> None:
        """Reports an event, unless the host has disabled its notices."""
        if self.features.notices(event):
            self.events.report(event)

    # ---- shadow doorbells (5.7, 7.13) ------------------------------------------------------

    @property
    def has_shadow_doorbells(self) -> bool:
        """Whether Doorbell Buffer Config is supported: the entries of all queues must fit into a page (5.7)."""
        size = 2 * (self.params.queues + 1) * (4 << self.params.doorbell_stride)
        return self.params.shadow_doorbells and size <= PAGE

    def set_shadow(self, tails: int, indexes: int) -> None:
        """Sets the addresses of the shadow doorbells and of the EventIdx entries.

        DmaFault: the pages cannot be accessed; nothing has changed then.
        """
        queues: list[SubmissionQueue | CompletionQueue] = [*self.submission.values(), *self.completion.values()]
        self._shadow = tails, indexes
        try:
            for queue in queues:
                self.shadow_queue(queue)
        except DmaFault:
            self._shadow = None
            for queue in queues:
                queue.clear_shadow()
            raise

    def shadow_queue(self, queue: SubmissionQueue | CompletionQueue) -> None:
        """Sets a queue's entries in the shadow doorbell buffers; entries 0 and 1 are the admin queues'."""
        if self._shadow is None:
            return
        n = 2 * queue.qid + isinstance(queue, CompletionQueue)
        at = n * (4 << self.params.doorbell_stride)
        queue.set_shadow(self._shadow[0] + at, self._shadow[1] + at)

    # ---- keep alive (7.12) -----------------------------------------------------------------

    def keep_alive(self, milliseconds: int) -> None:
        """Starts the Keep Alive timer, rounded up to its granularity (5.21.1.15); 0 stops it."""
        unit = 100 * KEEP_ALIVE_GRANULARITY
        self._keep_alive_ms = -(-milliseconds // unit) * unit
        self.restart_keep_alive()

    def restart_keep_alive(self) -> None:
        """Restarts the Keep Alive timer, after a Keep Alive command."""
        if self._keep_alive is not None:
            self._keep_alive.cancel()
            self._keep_alive = None
        if self._keep_alive_ms:
            self._keep_alive = self.after(self._keep_alive_ms / 1000, self._expired)

    def _expired(self) -> None:
        """Fails the controller; after a reset the host can read the reason in the error log."""
        self.health.record(NvmeStatus.KEEP_ALIVE_EXPIRED)
        self._fail(f"no Keep Alive for {self._keep_alive_ms} ms")


@functools.cache
def _variant(base: type[Nvme], interrupts: str, stride: int) -> type[Nvme]:
    """A subclass whose declaration has this interrupt type and doorbell stride."""
    if base._declared_for == (interrupts, stride):
        return base
    bank = doorbells(stride)
    end = DOORBELLS_AT + bank.size
    bar = MmioBar(0, size=max(1 << (end - 1).bit_length(), base.bar0.size), is_64bit=True, fill=0)

    class Variant(base):  # type: ignore[valid-type, misc]
        bar0 = bar
        regs = bar.bank(ControllerRegs)
        doorbells = bar.bank(bank, at=DOORBELLS_AT)
        msix = Msix(vectors=QUEUE_PAIRS, own_bar=4) if interrupts == "msix" else None
        msi = Msi(vectors=_MSI_VECTORS) if interrupts == "msi" else None
        _declared_for = (interrupts, stride)

        @on_write_each(*bank.registers)
        def _ring(self, n: int, new: int) -> None:
            super()._ring(n, new)

    Variant.__name__ = base.__name__
    return Variant
