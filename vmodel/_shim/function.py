"""One PCI function's regions; see vms_func_*, vms_region_*, vms_area_* and vms_bank_policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vmodel._shim.handle import check, create
from vmodel._vmshim import ffi, lib

REGIONS: int = lib.VMS_REGIONS
EXIT_ON_READ: int = lib.VMS_EXIT_ON_READ
EXIT_ON_WRITE: int = lib.VMS_EXIT_ON_WRITE
EXIT_REFUSED: int = lib.VMS_EXIT_REFUSED
SIZE_ODD: int = lib.VMS_SIZE_ODD
MISALIGNED: int = lib.VMS_MISALIGNED
#: Every size from 1 to 8 bytes, aligned or not; the bits 1, 2, 4 and 8 are those sizes.
ALL_SIZES: int = lib.VMS_SIZE_1 | lib.VMS_SIZE_2 | lib.VMS_SIZE_4 | lib.VMS_SIZE_8 | SIZE_ODD | MISALIGNED

_signal = lib.vms_signal
_REFUSALS = {
    lib.VMS_REFUSED_OFF: "its space is off in the Command register, or the function is in D3hot",
    lib.VMS_REFUSED_SIZE: "size or alignment not allowed there",
}


class Policy:
    """What a write or a read of each byte of a bank does; see vms_bank_policy.  Everything allowed at first."""

    def __init__(self, size: int) -> None:
        self.store, self.w1c, self.w1s, self.rc, self.exits = (bytearray(size) for _ in range(5))
        self.sizes = bytearray([ALL_SIZES]) * size

    def __len__(self) -> int:
        return len(self.store)

    def arrays(self) -> tuple[bytearray, ...]:
        """In the order of vms_policy's members."""
        return self.store, self.w1c, self.w1s, self.rc, self.exits, self.sizes


@dataclass(frozen=True)
class FunctionStats:
    """Counters of one function since it was made; see vms_func_stats."""

    messages: int
    reads: int
    writes: int
    served: int
    exits: int
    rejected: int


class FunctionRegions:
    """One PCI function's regions: backing store and who answers each byte."""

    def __init__(self) -> None:
        self.handle = create(lib.vms_func_create, lib.vms_func_destroy, "vms_func")
        self._stats = ffi.new("vms_func_stats *")

    def define_region(self, region: int, size: int, *, fill: int = 0xFF, writable: bool = True) -> None:
        check(lib.vms_region_define(self.handle, region, size, fill, writable))

    def enable_region(self, region: int, on: bool) -> None:
        check(lib.vms_region_enable(self.handle, region, on))

    def tap_region(self, region: int, exits: int) -> None:
        """All accesses of these kinds (EXIT_ON_*, EXIT_REFUSED) exit; 0: as their policy says."""
        check(lib.vms_region_tap(self.handle, region, exits))

    def refusal(self, region: int, offset: int, count: int) -> tuple[str, bytes] | None:
        """Why an access has no effect, and what it reads; None: it is not refused."""
        why, fill = ffi.new("uint32_t *"), ffi.new("uint8_t *")
        check(lib.vms_region_refuses(self.handle, region, offset, count, why, fill))
        return (_REFUSALS[why[0]], bytes([fill[0]]) * count) if why[0] else None

    def _view(self, pointer: Any, size: int) -> memoryview:
        # The view keeps the function alive, not only its memory's address.
        handle = self.handle
        owner = ffi.gc(ffi.cast("uint8_t *", pointer), lambda _: handle)
        return memoryview(ffi.buffer(owner, size)).cast("B")

    def add_bank(self, region: int, start: int, size: int) -> memoryview:
        out = ffi.new("uint8_t **")
        check(lib.vms_area_bank(self.handle, region, start, size, out))
        return self._view(out[0], size)

    def add_ram(self, region: int, start: int, size: int, *, mappable: bool = False) -> memoryview:
        out = ffi.new("uint8_t **")
        check(lib.vms_area_ram(self.handle, region, start, size, mappable, out))
        return self._view(out[0], size)

    def add_hook(self, region: int, start: int, size: int) -> None:
        check(lib.vms_area_hook(self.handle, region, start, size))

    def set_policy(self, region: int, start: int, policy: Policy) -> None:
        """Sets the policy of the bytes from `start` on; all of them in one bank."""
        arrays = [ffi.from_buffer("uint8_t[]", array) for array in policy.arrays()]
        check(lib.vms_bank_policy(self.handle, region, start, len(policy), ffi.new("vms_policy *", arrays)))

    def region_fd(self, region: int) -> int | None:
        out = ffi.new("int *")
        try:
            check(lib.vms_region_fd(self.handle, region, out))
        except FileNotFoundError:
            return None
        return int(out[0])

    def plain_read(self, region: int, offset: int, count: int) -> bytes:
        buffer = bytearray(count)
        check(lib.vms_region_read(self.handle, region, offset, ffi.from_buffer("uint8_t[]", buffer), count))
        return bytes(buffer)

    def plain_write(self, region: int, offset: int, data: bytes) -> None:
        check(lib.vms_region_write(self.handle, region, offset, data, len(data)))

    def wake(self) -> None:
        """Any thread: ends the wait of the function's loop."""
        check(lib.vms_wake(self.handle))

    def watch(self, eventfd: int, cookie: int) -> None:
        check(lib.vms_watch(self.handle, eventfd, cookie))

    def unwatch(self, eventfd: int) -> None:
        check(lib.vms_unwatch(self.handle, eventfd))

    def signal(self, eventfd: int) -> None:
        """Adds 1 to a client's eventfd, full or not; never waits."""
        rc = _signal(eventfd)
        if rc:
            check(rc)

    def idle(self, listener: int, deadline_ns: int) -> tuple[int, int]:
        """Waits without a connection: (EXIT_*, cookie); EXIT_COMMAND means that the listener is readable."""
        cookie = ffi.new("uint16_t *")
        return check(lib.vms_idle(self.handle, listener, deadline_ns, cookie)), int(cookie[0])

    def stats(self) -> FunctionStats:
        lib.vms_func_stats_get(self.handle, self._stats)
        s = self._stats
        return FunctionStats(s.messages, s.reads, s.writes, s.served, s.exits, s.rejected)
