"""All access modes, in a register by itself, in fields, with and without hooks, against one obvious model of a bit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.examples import examples
from vmodel.device import MmioBar, PciDevice, on_read, on_write
from vmodel.modes import Mode
from vmodel.regs import Bits, Layout, Reg32, RegisterBank

MODES = [mode for mode in Mode if mode is not Mode.RESERVED]
#: Two fields of each mode, 16 modes of two bits in a register.
LAYOUTS = [
    type(f"Modes{n}", (Layout,), {f"F{i}": Bits(2 * i, 2 * i + 1, mode) for i, mode in enumerate(MODES[n : n + 16])})
    for n in range(0, len(MODES), 16)
]
RESET = 0x9C63_5A3C


def registers() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for n, layout in enumerate(LAYOUTS):
        found[f"PLAIN{n}"] = Reg32(8 * n, layout=layout, reset=RESET)
        found[f"HOOKED{n}"] = Reg32(8 * n + 4, layout=layout, reset=RESET)
    for n, mode in enumerate(MODES):
        found[mode.name] = Reg32(0x80 + 4 * n, mode, reset=RESET)
    return found


Regs: Any = type(RegisterBank)("Regs", (RegisterBank,), registers(), size=0x100)


class Device(PciDevice):
    """Its hooks change nothing."""

    vendor_id, device_id, class_code = 1, 2, 3
    bar0 = MmioBar(0, size=4096)
    regs = bar0.bank(Regs)

    @on_read(*(Regs.by_name[f"HOOKED{n}"] for n in range(len(LAYOUTS))))
    def _read(self, stored: int) -> int:
        return stored

    @on_write(*(Regs.by_name[f"HOOKED{n}"] for n in range(len(LAYOUTS))))
    def _write(self, new: int) -> None:
        pass


def bit_after_write(mode: str, stored: int, written: int | None) -> int:
    """A bit after a write to its register; None: the write leaves its byte out.  From the names of UVM 1.2's modes."""
    name = mode.removesuffix("RC").removesuffix("RS") or mode
    name = {"": "RO", "W": "RW"}.get(name, name)
    if name == "WC":
        return 0
    if name == "WS":
        return 1
    if written is None or name in ("RO", "WO", "RC", "RS"):
        return stored
    if name == "RW":
        return written
    active, action = int(name[1]), name[2]
    if written != active:
        return stored
    return {"C": 0, "S": 1, "T": 1 - stored}[action]


def bit_after_read(mode: str, stored: int) -> int:
    return 0 if mode.endswith("RC") else 1 if mode.endswith("RS") else stored


steps = st.tuples(
    st.sampled_from(Regs.registers),
    st.booleans(),
    st.sampled_from([(0, 4), (0, 2), (2, 2), (0, 1), (1, 1), (2, 1), (3, 1)]),
    st.integers(0, 2**32 - 1),
)


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(steps, max_size=40))
def test_accesses_agree_with_a_model_of_a_bit(taken: list[tuple[Any, bool, tuple[int, int], int]]) -> None:
    device = Device()
    try:
        model = {register.name: [RESET >> n & 1 for n in range(32)] for register in Regs.registers}
        modes = {
            register.name: [
                next((f.mode for f in register.fields if f.lo <= n <= f.hi), register.mode).name for n in range(32)
            ]
            for register in Regs.registers
        }
        for register, writing, (first, count), value in taken:
            bits, names = model[register.name], modes[register.name]
            inside = range(8 * first, 8 * (first + count))
            value &= (1 << 8 * count) - 1
            if writing:
                device.backend.region_write(0, register.offset + first, count, value)
                written = {n: value >> n - 8 * first & 1 for n in inside}
                bits[:] = [bit_after_write(names[n], bits[n], written.get(n)) for n in range(32)]
            else:
                seen = device.backend.region_read(0, register.offset + first, count)
                assert seen == sum(bits[n] << n - 8 * first for n in inside), register
                bits[:] = [bit_after_read(names[n], bits[n]) if n in inside else bits[n] for n in range(32)]
        for register in Regs.registers:
            assert device.regs.cells[32][register.offset // 4] == sum(
                b << n for n, b in enumerate(model[register.name])
            )
        assert device.errors == 0
    finally:
        device.close()


def test_each_mode_is_one_pair_of_effects() -> None:
    assert len({(mode.write, mode.read) for mode in MODES}) == len(MODES)
    assert [Mode.of(mode.write, mode.read) for mode in MODES] == MODES
    with pytest.raises(KeyError):
        Mode.of(Mode.WO.write, Mode.RC.read)
