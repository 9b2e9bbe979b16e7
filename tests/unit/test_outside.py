"""Calls of a model's methods from outside: which can be called, with what, where they run, and how they end."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vmodel.device import MmioBar, PciDevice, outside
from vmodel.device.outside import CallTimeout, OutsideError, call, methods_of, signature_of
from vmodel.machine import Machine, load
from vmodel.patience import patience
from vmodel.regs import RegisterError
from vmodel.testing.fakes import FakeDriver, FakeMemory


class Uart(PciDevice):
    vendor_id, device_id, class_code = 0x1234, 0x0002, 0x070000
    bar0 = MmioBar(0, size=4096)

    def setup(self) -> None:
        self.received: list[str] = []
        self.gate = threading.Event()

    @outside
    def feed(self, text: str, times: int = 1) -> int:
        """Receives text."""
        self.received += [text] * times
        return len(self.received)

    @outside
    def thread(self) -> str:
        return threading.current_thread().name

    @outside
    def reject(self, why: str) -> None:
        raise LookupError(why)

    @outside
    def leave(self) -> None:
        raise SystemExit(3)

    @outside
    def hang(self) -> None:
        self.gate.wait(patience(30))

    @outside
    def strange(self, what: NotDefined) -> None:  # type: ignore[name-defined]  # noqa: F821
        pass

    def inner(self) -> None:
        """Not for the outside."""


class Modem(Uart):
    vendor_id = 0x1235

    def thread(self) -> str:
        return f"modem: {super().thread()}"


@pytest.fixture
def uart() -> Iterator[FakeDriver]:
    device = Uart("uart0")
    with FakeMemory() as memory, FakeDriver(device, memory) as driver:
        yield driver
        device.gate.set()
    device.close()


def test_it_runs_on_the_device_s_thread(uart: FakeDriver) -> None:
    assert uart.call("thread") == "vmodel-uart0"
    assert uart.call("feed", "x") == 1
    assert uart.call("feed", "y", times=2) == 3
    assert uart.call("feed", text="z") == 4
    assert uart.device.received == ["x", "y", "y", "z"]  # type: ignore[attr-defined]


def test_its_exception_is_the_caller_s(uart: FakeDriver) -> None:
    """The caller has it: the device goes on, and it is no error of the model's that nobody knows of."""
    with pytest.raises(LookupError, match=r"^no luck$"):
        uart.call("reject", "no luck")
    with pytest.raises(SystemExit):
        uart.call("leave")
    assert uart.call("feed", "x") == 1 and uart.device.errors == 0


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("fed", [], "uart0 has no method 'fed' for the outside: did you mean 'feed'?"),
        (
            "inner",
            [],
            "uart0 has no method 'inner' for the outside: known are feed, hang, leave, reject, strange, thread",
        ),
        ("reset", [], "uart0 has no method 'reset' for the outside: did you mean 'reject'?"),
        ("__init__", [], "uart0 has no method '__init__' for the outside: known are"),
        ("feed", [], "uart0.feed(text: str, times: int = 1) -> int: text: Missing required argument"),
        ("feed", [5], "text: Input should be a valid string"),
        ("feed", ["x", "y"], "times: Input should be a valid integer, unable to parse string as an integer"),
        ("feed", ["x", 1, 2], "argument 3: Unexpected positional argument"),
        ("strange", ["x"], "uart0.strange(what: NotDefined) -> None: an annotation cannot be understood: name 'NotD"),
    ],
)
def test_wrong_calls(uart: FakeDriver, name: str, arguments: list[object], said: str) -> None:
    with pytest.raises(OutsideError) as error:
        uart.call(name, *arguments)
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not uart.device.received  # type: ignore[attr-defined]


def test_wrong_names_of_arguments(uart: FakeDriver) -> None:
    with pytest.raises(OutsideError, match="txet: Unexpected keyword argument"):
        uart.call("feed", "x", txet="y")
    with pytest.raises(OutsideError, match="text: Got multiple values for argument"):
        uart.call("feed", "x", text="y")


def test_a_model_without_such_methods() -> None:
    class Bare(PciDevice):
        vendor_id, device_id, class_code = 0x1234, 0x0003, 0xFF0000

    with pytest.raises(OutsideError, match=r"^bare0 has no methods for the outside: a model marks them with @outside$"):
        call(Bare("bare0"), "feed")


def test_a_call_that_does_not_return_has_an_end(uart: FakeDriver) -> None:
    """One that waits behind it is revoked: it must not happen later, when its caller has gone."""
    with pytest.raises(CallTimeout, match=r"^uart0\.hang has not returned in .* s: it is in wait .*threading\.py"):
        uart.call("hang", timeout=0.05)
    with pytest.raises(CallTimeout, match=r"^uart0\.feed has not begun in .* s, .*: its thread is in .*called by hang"):
        uart.call("feed", "late", timeout=0.05)
    uart.device.gate.set()  # type: ignore[attr-defined]
    assert uart.call("feed", "next") == 1


def test_a_server_that_stops_ends_calls() -> None:
    device = Uart("uart0")
    with FakeMemory() as memory, FakeDriver(device, memory):
        pass
    with pytest.raises(CallTimeout, match="has not begun"):
        call(device, "feed", ["x"], seconds=3600)
    device.close()


def test_a_method_that_overrides_one_is_one(uart: FakeDriver) -> None:
    assert set(methods_of(Modem)) == set(methods_of(Uart))
    assert signature_of("feed", Uart.feed) == "feed(text: str, times: int = 1) -> int"


@pytest.mark.parametrize("what", [staticmethod(lambda: 0), 5])
def test_only_methods_are_marked(what: object) -> None:
    with pytest.raises(RegisterError, match="@outside is for methods"):
        outside(what)  # type: ignore[type-var]


def test_coroutines_are_refused() -> None:
    async def feed(self: object) -> None:
        pass

    with pytest.raises(RegisterError, match="feed is a coroutine or generator, and would not run"):
        outside(feed)


def test_a_machine_calls_by_device_and_method() -> None:
    with pytest.raises(OutsideError, match=r"^no device is called 'edu1': did you mean 'edu0'"):
        _edu().call("edu1.x")
    with pytest.raises(OutsideError, match=r"^'edu0': must name a device and a method, as uart0.feed$"):
        _edu().call("edu0")


def _edu() -> Machine:
    return load(Path(__file__).parents[2] / "examples" / "edu.toml")
