"""Interrupts, resets, connections: what actions do there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.inject.lab import PLAIN, RAISE, Bench, armed, bench, eventually, fired
from tests.proto.toy import Toy
from vmodel.errors import Reason
from vmodel.inject import Engine, FaultPlan, parse_rule
from vmodel.points import Phase, Points
from vmodel.vfio_user.client import Client, Closed
from vmodel.vfio_user.wire import Irq, IrqSetFlags


def test_lost(lab: Bench) -> None:
    with armed(lab, "irq nth=1 do=drop"):
        lab.put(RAISE, 2)
        assert lab.raised(2) == 0
        lab.put(RAISE, 2)
        assert lab.raised(2) == 1


def test_late(lab: Bench) -> None:
    with armed(lab, "irq vector=1 do=late(10min)"):
        lab.put(RAISE, 1)
        assert lab.raised(1) == 0
        lab.elapse(600)
        assert lab.raised(1) == 1


def test_delayed(lab: Bench) -> None:
    seen: list[int] = []
    lab.clock.while_asleep = lambda: seen.append(lab.raised(1))
    with armed(lab, "irq do=delay(80)"):
        lab.put(RAISE, 1)
        assert (lab.clock.slept, seen, lab.raised(1)) == ([0.08], [0], 1)


def test_repeated(lab: Bench) -> None:
    with armed(lab, "irq do=duplicate"):
        lab.put(RAISE, 3)
    assert lab.raised(3) == 2


def test_reordered(lab: Bench) -> None:
    with armed(lab, "irq nth=1 do=reorder"):
        lab.put(RAISE, 0)
        assert lab.raised(0) == 0
        lab.put(RAISE, 1)
        assert (lab.raised(0), lab.raised(1)) == (1, 1)


def test_wrong_vector(lab: Bench) -> None:
    with armed(lab, "irq vector=0 do=vector(3)", "irq vector=1 do=vector(9)") as engine:
        lab.put(RAISE, 0)
        assert (lab.raised(0), lab.raised(3)) == (0, 1)
        lab.put(RAISE, 1)
        assert lab.raised(1) == 0
        assert [record["result"] for record in fired(engine)] == ["ok", "no such vector"]


def test_a_vector_that_the_guest_has_not_given(lab: Bench) -> None:
    """PCI 3.0, 6.8.1.3: with Multiple Message Enable at 0 there is one message."""
    with armed(lab, "irq do=vector(3)", "mmio.read do=spurious(vector=1)") as engine:
        lab.messages(0x01)
        lab.put(RAISE, 0)
        lab.get(PLAIN)
        assert [record["result"] for record in fired(engine)] == ["no such vector"] * 2
        lab.messages(0x31)
        assert [lab.raised(n) for n in range(4)] == [0] * 4


def test_storm(lab: Bench) -> None:
    with armed(lab, "irq once do=storm(20, ms=10min)"):
        lab.put(RAISE, 1)
        for expected in [1] * 21 + [0] * 2:
            assert lab.raised(1) == expected
            lab.elapse(600)


def test_a_storm_ends_with_its_rule(lab: Bench) -> None:
    with armed(lab, "irq once do=storm(100000, ms=10min)") as engine:
        lab.put(RAISE, 1)
        lab.elapse(600)
        assert lab.raised(1) == 2
        engine.remove("rule1")
        lab.elapse(600)
        assert lab.raised(1) == 0


def test_spurious(lab: Bench) -> None:
    with armed(lab, "mmio.read nth=2 do=spurious(vector=2)", "mmio.read nth=3 do=spurious(vector=1, ms=10min)"):
        lab.get(PLAIN)
        assert lab.raised(2) == 0
        lab.get(PLAIN)
        assert lab.raised(2) == 1
        lab.get(PLAIN)
        assert lab.raised(1) == 0
        lab.elapse(600)
        assert lab.raised(1) == 1


def test_pin(tmp_path: Path) -> None:
    """INTx: lost; and a spurious one is a pulse, which is not signalled again when it is unmasked."""
    with bench(tmp_path, enabled=False) as lab:
        lab.enable(msi=False)
        with armed(lab, "irq nth=1 do=drop", "mmio.read do=spurious"):
            lab.put(RAISE, 0)
            assert lab.raised() == 0
            lab.get(PLAIN)
            assert lab.raised() == 1
            lab.client.set_irqs(Irq.INTX, IrqSetFlags.DATA_NONE | IrqSetFlags.UNMASK)
            assert lab.raised() == 0
            lab.put(RAISE, 0)
            assert lab.raised() == 1


def test_ignored_reset(lab: Bench) -> None:
    lab.put(PLAIN, 5)
    with armed(lab, "reset kind=DEVICE_RESET once do=drop"):
        lab.client.reset()
        assert lab.lab.regs.PLAIN == 5
        lab.client.reset()
        assert lab.lab.regs.PLAIN == 0x1111_1111


def test_slow_and_late_reset(lab: Bench) -> None:
    lab.put(PLAIN, 5)
    seen: list[int] = []
    lab.clock.while_asleep = lambda: seen.append(lab.lab.regs.PLAIN)
    with armed(lab, "reset once do=delay(100)"):
        lab.client.reset()
        assert lab.clock.slept == [0.1] and seen == [5] and lab.lab.regs.PLAIN != 5
    lab.lab.regs.PLAIN = 6
    with armed(lab, "reset do=late(10min)"):
        lab.client.reset()
        assert lab.lab.regs.PLAIN == 6
        lab.elapse(600)
        assert lab.lab.regs.PLAIN != 6


def test_flr_is_a_reset(lab: Bench) -> None:
    at = next(at for name, at, _ in lab.lab.config.places if name == "pcie")
    with armed(lab, "reset kind=FLR do=drop") as engine:
        lab.put(PLAIN, 5)
        lab.client.region_write(7, at + 8, b"\x00\x80")
        assert lab.get(PLAIN) == 5
        assert [record["kind"] for record in fired(engine)] == ["FLR"]


def test_surprise_disconnect(tmp_path: Path) -> None:
    with bench(tmp_path) as lab, armed(lab, "mmio.write nth=2 do=disconnect"):
        lab.put(PLAIN, 1)
        with pytest.raises((Closed, OSError)):
            lab.put(PLAIN, 2)
            lab.client.info()
        with Client.connect(tmp_path / "lab.sock") as again:
            again.negotiate()
            assert again.info().num_regions == 9


def test_what_a_device_has_in_hand_is_lost_with_it(tmp_path: Path) -> None:
    with bench(tmp_path) as lab, armed(lab, "dma.write once do=disconnect"):
        with pytest.raises((Closed, OSError)):
            lab.copy(b"data")
            lab.client.info()
        assert lab.target(4) == bytes(4) and not lab.raised()
        assert [fault.reason for fault in lab.lab.faults] == [Reason.NO_WINDOW]


def test_disconnect_later_and_at_the_start(tmp_path: Path) -> None:
    with bench(tmp_path) as lab:
        with armed(lab, "mmio.write once do=disconnect(10min)"):
            lab.put(PLAIN, 1)
            assert lab.get(PLAIN) == 1
            lab.elapse(600)
            with pytest.raises((Closed, OSError)):
                lab.client.info()
        with armed(lab, "connection do=disconnect") as engine, Client.connect(tmp_path / "lab.sock") as again:
            with pytest.raises((Closed, OSError)):
                again.negotiate()
            assert eventually(lambda: [record["point"] for record in fired(engine)] == ["connection"])


def test_no_device_is_removed_once_the_plan_is_over(lab: Bench) -> None:
    with armed(lab, "mmio.write once do=disconnect(10min)") as engine:
        lab.put(PLAIN, 1)
        assert engine.unfinished
    lab.elapse(600)
    assert lab.get(PLAIN) == 1


def test_what_is_held_back_is_unfinished(tmp_path: Path) -> None:
    with bench(tmp_path) as lab:
        with armed(lab, "mmio.write register=PLAIN first=2 do=late(1min)") as engine:
            assert not engine.unfinished
            lab.put(PLAIN, 1)
            lab.put(PLAIN, 2)
            assert engine.unfinished
            lab.elapse(60)
            assert lab.get(PLAIN) == 2 and not engine.unfinished
        with armed(lab, "mmio.write register=PLAIN once do=reorder") as engine:
            lab.put(PLAIN, 3)
            assert engine.unfinished
            lab.put(PLAIN, 4)
            assert lab.get(PLAIN) == 3 and not engine.unfinished


def test_unplug_request(lab: Bench) -> None:
    (req,) = lab.client.eventfds(Irq.REQ, 1)
    with armed(lab, "mmio.write once do=unplug"):
        lab.put(PLAIN, 1)
    assert req.wait() == 1
    req.close()


def test_the_client_goes(tmp_path: Path) -> None:
    with bench(tmp_path) as lab, armed(lab, "unplug do=delay(1)", "connection do=delay(1)") as engine:
        lab.client.close()
        assert eventually(lambda: [record["point"] for record in fired(engine)] == ["unplug"])
        with Client.connect(tmp_path / "lab.sock") as again:
            again.negotiate()
        assert eventually(lambda: len(fired(engine)) == 3)


def test_a_driver_that_is_expected_probes() -> None:
    """A removal and the next probe look alike on the bus: whoever loads a driver says so."""
    points, phases = Points("edu0"), []
    # At work, then expected although it is; removed, which two writes may say; expected.
    for on in (True, None, False, False, None):
        if on is None:
            points.begin()
        else:
            points.config_changed(master=on, interrupts=on)
        phases.append(points.phase)
    assert phases == [Phase.RUNNING, Phase.RUNNING, Phase.REMOVE, Phase.REMOVE, Phase.PROBE]


def test_phase(tmp_path: Path) -> None:
    """Derived from bus mastering and MSI, and from resets."""
    with bench(tmp_path, enabled=False) as lab:
        phases = []
        with armed(
            lab, *(f"mmio.write phase={phase} do=delay(0)" for phase in ("probe", "running", "remove"))
        ) as engine:

            def step(command: int) -> None:
                lab.client.region_write(7, 4, command.to_bytes(2, "little"))
                lab.put(PLAIN, 1)
                phases.append(fired(engine)[-1]["rule"] if fired(engine) else "")

            step(2)
            step(6)
            lab.enable()
            step(6)
            step(2)
            step(6)
            lab.client.reset()
            step(2)
    assert phases == ["rule1", "rule1", "rule2", "rule3", "rule2", "rule1"]


def test_the_phase_of_suspending(tmp_path: Path) -> None:
    """It hides the driver's phase, which goes on meanwhile; a new case begins without it."""
    with bench(tmp_path) as lab:
        with armed(lab, *(f"mmio.write phase={phase} do=delay(0)" for phase in ("running", "suspend"))) as engine:
            for lab.lab.points.suspended in (False, True, False):
                lab.put(PLAIN, 1)
            assert [record["rule"] for record in fired(engine)] == ["rule1", "rule2", "rule1"]
        lab.lab.points.suspended = True
        lab.lab.points.begin()
        assert not lab.lab.points.suspended


def test_a_log_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """10 lines in 5 s say so; the end counts the others."""
    toy = Toy()
    plan = FaultPlan(rule=(parse_rule("mmio.read device=toy do=ones"),))
    with Engine(plan, [toy], path=tmp_path / "nowhere" / "log.jsonl"):
        for _ in range(300):
            toy.backend.region_read(0, 0, 4)
    lines = [line for line in caplog.messages if line.startswith("cannot write the log of injections: ")]
    assert caplog.messages[-1] == f"vmodel.inject.engine: {300 - len(lines)} lines were held back"
    toy.close()
