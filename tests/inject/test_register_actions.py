"""What actions do to the guest's accesses: BARs and config space, plain registers of the shim's included."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.inject.lab import COUNT, HOOKED, PLAIN, RAISE, Bench, armed, bench, fired
from vmodel.pci.extcaps import Uncorrectable
from vmodel.vfio_user.client import Client
from vmodel.vfio_user.wire import Region

RESET_VALUE = 0x1111_1111


def test_plain_registers_are_intercepted_only_while_armed(lab: Bench) -> None:
    def exits() -> int:
        before = lab.lab.backend.function.stats().served
        for _ in range(10):
            assert lab.get(PLAIN) == RESET_VALUE
        return 10 - (lab.lab.backend.function.stats().served - before)

    assert exits() == 0
    with armed(lab, "mmio.read nth=1000 do=ones"):
        assert exits() == 10
    assert exits() == 0


@pytest.mark.parametrize("offset", [PLAIN, HOOKED, 0x2000, 0x80000, 0x24])
def test_listening_changes_nothing(tmp_path: Path, offset: int) -> None:
    """Registers, RAM, a hole, and one that a read clears; of all sizes."""

    def look(lab: Bench) -> list[bytes]:
        found = []
        for size in (1, 2, 4, 8, 3, 64):
            found.append(lab.client.region_read(0, offset, size))
            lab.client.region_write(0, offset, bytes(range(size)))
            found.append(lab.client.region_read(0, offset, size))
        return found

    with bench(tmp_path) as lab:
        plain = look(lab)
    with bench(tmp_path) as lab, armed(lab, "mmio.read nth=999 do=ones", "mmio.write nth=999 do=drop"):
        assert look(lab) == plain
        lab.client.region_write(Region.CONFIG, 4, b"\x04\x00")  # memory off: it does not even get here
        assert lab.client.region_read(0, offset, 4) == b"\xff" * 4


def test_value(lab: Bench) -> None:
    with armed(lab, "mmio.read register=PLAIN nth=2 do=value(0xabcd)") as engine:
        assert [lab.get(PLAIN) for _ in range(3)] == [RESET_VALUE, 0xABCD, RESET_VALUE]
        assert lab.get(HOOKED) != 0xABCD
        (record,) = fired(engine)
        assert (record["before"], record["after"], record["address"]) == ("11111111", "cdab0000", "0x0")


def test_only_the_registers_bytes_change(lab: Bench) -> None:
    with armed(lab, "mmio.read register=regs.HOOKED do=ones"):
        hooked = lab.client.region_read(0, 0, 12)
    assert hooked == RESET_VALUE.to_bytes(4, "little") + b"\xff" * 4 + bytes(4)


def test_written_value(lab: Bench) -> None:
    with armed(lab, "mmio.write register=PLAIN do=value(7)"):
        lab.put(PLAIN, 1)
    assert lab.get(PLAIN) == 7


def test_ones(lab: Bench) -> None:
    with armed(lab, "mmio.read once do=ones"):
        assert [lab.get(PLAIN), lab.get(PLAIN)] == [0xFFFF_FFFF, RESET_VALUE]


def test_stuck(lab: Bench) -> None:
    lab.put(PLAIN, 5)
    with armed(lab, "mmio.read register=PLAIN do=stuck"):
        assert lab.get(PLAIN) == 5
        lab.put(PLAIN, 6)
        assert lab.get(PLAIN) == 5
    assert lab.get(PLAIN) == 6
    with armed(lab, "mmio.write register=PLAIN do=stuck"):
        lab.put(PLAIN, 9)
    assert lab.get(PLAIN) == 6


def test_flip_and_corrupt(lab: Bench) -> None:
    with armed(lab, "mmio.read once do=flip(2)"):
        assert (lab.get(PLAIN) ^ RESET_VALUE).bit_count() == 2
    with armed(lab, "mmio.write once do=corrupt(55)"):
        lab.put(PLAIN, 0)
    assert lab.get(PLAIN) == 0x5555_5555


def test_stale(lab: Bench) -> None:
    with armed(lab, "mmio.read register=COUNT nth=3 do=stale"):
        assert [lab.get(COUNT) for _ in range(4)] == [1, 2, 2, 4]


def test_abort_and_drop(lab: Bench) -> None:
    with armed(lab, "mmio.read once do=abort", "mmio.write once do=abort(completer)"):
        lab.put(PLAIN, 3)
        assert [lab.get(PLAIN), lab.get(PLAIN)] == [0xFFFF_FFFF, RESET_VALUE]
    with armed(lab, "mmio.read once do=drop", "mmio.write once do=drop"):
        lab.put(PLAIN, 3, posted=True)
        assert [lab.get(COUNT), lab.get(COUNT), lab.get(PLAIN)] == [0xFFFF_FFFF, 1, RESET_VALUE]


def test_duplicate(lab: Bench) -> None:
    with armed(lab, "mmio.read do=duplicate"):
        assert [lab.get(COUNT), lab.get(COUNT)] == [2, 4]
    with armed(lab, "mmio.write register=RAISE do=duplicate"):
        lab.put(RAISE, 1)
    assert lab.raised(1) == 2


def test_delay(lab: Bench) -> None:
    with armed(lab, "mmio.read do=delay(100)"):
        assert lab.get(PLAIN) == RESET_VALUE
        assert lab.clock.slept == [0.1]


def test_late_and_reordered_writes(lab: Bench) -> None:
    with armed(lab, "mmio.write nth=1 do=reorder"):
        lab.put(PLAIN, 1, posted=True)
        lab.put(PLAIN, 2, posted=True)
        assert lab.get(PLAIN) == 1  # the first came last
    with armed(lab, "mmio.write nth=1 do=late(10min)"):
        lab.put(PLAIN, 3, posted=True)
        assert lab.get(PLAIN) == 1
        lab.elapse(600)
        assert lab.get(PLAIN) == 3


def test_poison(lab: Bench) -> None:
    with armed(lab, "mmio.read once do=poison"):
        assert lab.get(PLAIN) == 0xFFFF_FFFF
    assert Uncorrectable.POISONED_TLP.mask == lab.lab.aer.regs.UNCORRECTABLE


# ---- config space -------------------------------------------------------------------------------


def test_config_registers(lab: Bench) -> None:
    with armed(lab, "config.read register=VENDOR_ID do=value(0xffff)", "config.write register=COMMAND do=drop"):
        assert lab.client.region_read(Region.CONFIG, 0, 4) == b"\xff\xff\x0f\x0f"
        lab.client.region_write(Region.CONFIG, 4, b"\x00\x00")
        assert lab.client.region_read(Region.CONFIG, 4, 2) == b"\x07\x00"
        whole = lab.client.region_read(Region.CONFIG, 0, 4096)
        assert whole[:4] == b"\xff\xff\x0f\x0f" and whole[8] == 3


def capabilities(client: Client) -> list[int]:
    """The ids in the list, as a driver walks it."""
    config = client.region_read(Region.CONFIG, 0, 256)
    found, at = [], config[0x34]
    while at:
        found.append(config[at])
        at = config[at + 1]
    return found


def test_hidden_and_cut_capabilities(lab: Bench) -> None:
    whole = capabilities(lab.client)
    assert whole == [0x01, 0x05, 0x11, 0x10]
    with armed(lab, "config.read do=hide(msix)"):
        assert capabilities(lab.client) == [0x01, 0x05, 0x10]
    with armed(lab, "config.read do=hide(pm)", "config.read do=hide(pcie)"):
        assert capabilities(lab.client) == [0x05, 0x11]
    with armed(lab, "config.read do=cut(msix)") as engine:
        assert capabilities(lab.client) == [0x01, 0x05]
        assert (fired(engine)[0]["before"], fired(engine)[0]["after"]) == ("0x49=0x60", "0x49=0x0")
    assert capabilities(lab.client) == whole


def test_another_capability_id(lab: Bench) -> None:
    with armed(lab, "config.read register=msi.ID do=value(9)", "config.read register=pm.NEXT do=value(0x60)"):
        assert capabilities(lab.client) == [0x01, 0x11, 0x10]
    with armed(lab, "config.read register=msi.ID do=value(9)"):
        assert capabilities(lab.client) == [0x01, 0x09, 0x11, 0x10]


def test_no_bar(tmp_path: Path) -> None:
    with bench(tmp_path, enabled=False) as lab:
        lab.client.close()
        with armed(lab, "connection once do=no-bar(1)") as engine, Client.connect(tmp_path / "lab.sock") as client:
            client.negotiate()
            assert [client.region_info(n).size for n in (0, 1)] == [1 << 20, 0]
            assert [record["before"] for record in fired(engine)] == [16]
            client.close()
            with Client.connect(tmp_path / "lab.sock") as again:
                again.negotiate()
                assert again.region_info(1).size == 16
