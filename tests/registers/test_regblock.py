"""The judge of access modes: the RTL that PeakRDL-regblock makes of the same file, in Icarus Verilog with cocotb.

Both get the same accesses: writes of some bytes, and reads of whole registers, as regblock's bus has no other reads.
"""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("systemrdl", reason="pip install 'vmodel[registers]'")
pytest.importorskip("peakrdl_regblock", reason="pip install peakrdl-regblock")
pytest.importorskip("cocotb", reason="pip install cocotb")

from find_libpython import find_libpython
from peakrdl_regblock import RegblockExporter
from peakrdl_regblock.cpuif.passthrough import PassthroughCpuif
from peakrdl_regblock.udps import ALL_UDPS
from systemrdl.compiler import RDLCompiler

from tests.examples import examples
from tests.pages import ROOT
from tests.waiting import until
from vmodel.device import MmioBar, PciDevice
from vmodel.patience import patience
from vmodel.spec.draft import build
from vmodel.spec.systemrdl import read_systemrdl

pytestmark = [
    pytest.mark.skipif(shutil.which("iverilog") is None, reason="there is no iverilog: apt install iverilog"),
    pytest.mark.skipif(find_libpython() is None, reason="cocotb needs libpython: apt install python3-dev"),
]

WRITES = ["", "woclr", "woset", "wot", "wzc", "wzs", "wzt", "wclr", "wset"]
READS = ["", "rclr", "rset"]
FIELDS = [
    "sw = rw; hw = na;" + (f" onwrite = {write};" if write else "") + (f" onread = {read};" if read else "")
    for write in WRITES
    for read in READS
] + ["sw = r; hw = na;", "sw = rw; hw = na; singlepulse;"]
RESETS = [0x5A, 0xFF, 0x3C, 0x81]
#: Builds the RTL and runs the simulation, until the test closes the connection.
RUN = """
import sys
from cocotb_tools.runner import get_runner
runner, folder = get_runner("icarus"), sys.argv[1]
runner.build(sources=[f"{folder}/card.sv"], hdl_toplevel="card", build_dir=folder, timescale=("1ns", "1ns"))
runner.test(hdl_toplevel="card", test_module="tests.registers.simulated", build_dir=folder, test_dir=folder)
"""


def specification() -> str:
    registers = []
    for n in range(0, len(FIELDS), 4):
        fields = " ".join(
            f"field {{ {properties} }} F{i}[{8 * i + 7}:{8 * i}] = {RESETS[(n + i) % 4]:#x};"
            if "singlepulse" not in properties
            else f"field {{ {properties} }} F{i}[{8 * i}:{8 * i}] = 0;"
            for i, properties in enumerate(FIELDS[n : n + 4])
        )
        registers.append(f"reg {{ {fields} }} R{n // 4} @ {n};")
    return f"addrmap card {{ {' '.join(registers)} }};"


class Simulation:
    """The simulated card; `answers` carries out accesses from a reset on."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile("rw")

    def answers(self, accesses: list[list[int]]) -> list[str]:
        self._lines.write(json.dumps(accesses) + "\n")
        self._lines.flush()
        return [*json.loads(self._lines.readline())]

    def close(self) -> None:
        self._lines.close()


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Simulation, Any]]:
    """The simulation, and the bank."""
    folder = tmp_path_factory.mktemp("rtl")
    (folder / "card.rdl").write_text(specification())
    compiler = RDLCompiler()
    for udp in ALL_UDPS:
        compiler.register_udp(udp)
    compiler.compile_file(str(folder / "card.rdl"))
    RegblockExporter().export(compiler.elaborate(), str(folder), cpuif_cls=PassthroughCpuif)
    # Icarus has no unpacked structs; that they are packed changes nothing, nor does where a variable is.
    text = (folder / "card.sv").read_text().replace("struct {", "struct packed {")
    text = re.sub(r"^( *)automatic ", r"\1", text, flags=re.MULTILINE)
    (folder / "card.sv").write_text(text)
    environ = {**os.environ, "VMODEL_JUDGE": str(folder / "socket"), "PYTHONPATH": str(ROOT)}
    with socket.socket(socket.AF_UNIX) as listener, (folder / "log").open("w") as log:
        listener.bind(environ["VMODEL_JUDGE"])
        listener.listen()
        running = subprocess.Popen([sys.executable, "-c", RUN, str(folder)], env=environ, stdout=log, stderr=log)

        def ready() -> bool:
            return running.poll() is not None or bool(select.select([listener], [], [], 0)[0])

        try:
            until(ready, "the simulation runs", 60)
            assert running.poll() is None, (folder / "log").read_text()
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(patience(60))
                simulation = Simulation(connection)
                yield simulation, build(read_systemrdl(folder / "card.rdl", None))
                simulation.close()
            running.wait(patience(30))
        finally:
            running.kill()
            running.wait()
    assert "TESTS=1 PASS=1 FAIL=0" in (folder / "log").read_text()


accesses = st.tuples(
    st.integers(0, (len(FIELDS) - 1) // 4),
    st.sampled_from([None, (0, 4), (0, 2), (2, 2), (0, 1), (1, 1), (2, 1), (3, 1)]),
    st.integers(0, 2**32 - 1),
)


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(accesses, min_size=1, max_size=60))
def test_the_bank_answers_as_the_rtl(simulated: tuple[Simulation, Any], taken: list[tuple[int, Any, int]]) -> None:
    simulation, bank = simulated
    bar0 = MmioBar(0, size=4096)
    parts = {"vendor_id": 1, "device_id": 2, "class_code": 3, "bar0": bar0, "regs": bar0.bank(bank)}
    device: PciDevice = type("Judged", (PciDevice,), parts)()
    carried_out, answers = [], []
    # At the end, what is stored is read once more.
    for number, written, value in [*taken, *((n, None, 0) for n in range((len(FIELDS) + 3) // 4))]:
        if written is None:
            carried_out.append([4 * number])
            answers.append(f"{device.backend.region_read(0, 4 * number, 4):032b}")
        else:
            first, count = written
            mask = ((1 << 8 * count) - 1) << 8 * first
            carried_out.append([4 * number, value, mask])
            device.backend.region_write(0, 4 * number + first, count, (value & mask) >> 8 * first)
    device.close()
    assert answers == simulation.answers(carried_out)
