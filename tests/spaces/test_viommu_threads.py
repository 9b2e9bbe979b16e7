"""A VM's device does DMA, with and without PASIDs, while its VMM invalidates, reads events, and replaces its HWPT."""

from __future__ import annotations

import threading

from tests.spaces.vm import ASID, ATC, CD, CD_ALL, CD_ONE, DATA, NH_ASID, S1, VSID, Guest, V, command
from tests.spaces.world import World
from tests.waiting import until

PASIDS = (1, 2, 3)
ROUNDS = 150


def test_nothing_waits_for_another(world: World) -> None:
    """Each thread comes to its end, and no access reaches anything but the VM's page."""
    guest = Guest(world)
    guest.put(DATA, DATA)
    guest.tables()
    for n in range(4):
        guest.descriptor(at=CD + 64 * n)
    guest.viommu.vdevice_alloc(guest.bound, VSID)
    nested = [guest.ste(V | S1 | 3 << 59, 2) for _ in range(2)]
    guest.attach(nested[0])
    done = threading.Event()
    seen: set[int | None] = set()
    queue = guest.events(4)
    read = 0

    def access(pasid: int | None) -> None:
        while not done.is_set():
            seen.add(guest.sees(pasid=pasid))

    threads = [threading.Thread(target=access, args=(pasid,)) for pasid in (None, *PASIDS)]
    for thread in threads:
        thread.start()
    for n in range(ROUNDS):
        guest.bound.replace(nested[n % 2] if n % 5 else guest.parent)
        guest.viommu.invalidate([command(NH_ASID | ASID << 48), command(CD_ALL | VSID << 32)])
        guest.viommu.invalidate([command(CD_ONE | 2 << 12 | VSID << 32), command(ATC | VSID << 32, 52)])
        read += len(queue.read(1 << 10))
    guest.bound.replace(nested[0])
    until(lambda: DATA in seen, "an access that is translated")
    done.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert seen <= {DATA, None}
    guest.context.close()
    assert guest.device.group.pasids == {}
