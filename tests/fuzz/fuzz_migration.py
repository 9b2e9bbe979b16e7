"""Migration: states that are not ours, in pieces, and requests in any order.

What is refused is a PeerError and changes nothing; what was saved can be restored.
"""

from __future__ import annotations

import atheris

with atheris.instrument_imports(include=["vmodel"]):
    from tests.proto.toy import Toy
    from vmodel.devices.edu import Edu
    from vmodel.errors import PeerError
    from vmodel.vfio_user.migration import SAVING, Migration
    from vmodel.vfio_user.wire import DeviceState

from tests.fuzz.harness import Input, fuzz

STATES = list(DeviceState)
devices = [Edu("edu").backend, Toy().backend]
first = [device.save() for device in devices]


def one_input(data: bytes) -> None:
    """A byte for the device, then what is asked of it."""
    source = Input(data)
    which = source.number(1) & 1
    device = devices[which]
    migration = Migration(device)
    device.restore(first[which])
    saved = bytearray(device.save())
    for _ in range(32):
        if not source.left:
            break
        what = source.number(1)
        state, before = migration.state, device.save()
        try:
            match what & 7:
                case 0 | 1 | 2:
                    migration.move(STATES[source.number(1) % len(STATES)])
                    if migration.state in SAVING and state not in SAVING:
                        saved = bytearray(before)
                case 3:  # a piece of what was saved
                    at, size = source.number(2) << 5 if what & 8 else 0, source.number(2)
                    migration.write(bytes(saved[at : at + size]))
                case 4:  # all of it
                    migration.write(bytes(saved))
                case 5:
                    at = source.number(2) % len(saved)
                    saved[at] ^= source.number(1)
                case 6:
                    migration.write(source.bytes(source.number(1)))
                case _:
                    size = source.number(2)
                    assert len(migration.read(size)) <= size
        except PeerError:
            assert device.save() == before, "what was refused has changed the device"
        assert migration.state is not DeviceState.ERROR
    migration.reset()
    assert migration.state is DeviceState.RUNNING


if __name__ == "__main__":
    fuzz(one_input)
