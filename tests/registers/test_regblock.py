"""The judge of access modes: the RTL that PeakRDL-regblock makes of the same file, simulated by Icarus Verilog.

Both get the same accesses: writes of some bytes, and reads of whole registers, as regblock's bus has no other reads.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("systemrdl", reason="pip install 'vmodel[registers]'")
pytest.importorskip("peakrdl_regblock", reason="pip install peakrdl-regblock")

from peakrdl_regblock import RegblockExporter
from peakrdl_regblock.cpuif.passthrough import PassthroughCpuif
from peakrdl_regblock.udps import ALL_UDPS
from systemrdl.compiler import RDLCompiler

from tests.examples import examples
from vmodel.device import MmioBar, PciDevice
from vmodel.patience import patience
from vmodel.spec.draft import build
from vmodel.spec.systemrdl import read_systemrdl

pytestmark = pytest.mark.skipif(shutil.which("iverilog") is None, reason="there is no iverilog: apt install iverilog")

WRITES = ["", "woclr", "woset", "wot", "wzc", "wzs", "wzt", "wclr", "wset"]
READS = ["", "rclr", "rset"]
FIELDS = [
    "sw = rw; hw = na;" + (f" onwrite = {write};" if write else "") + (f" onread = {read};" if read else "")
    for write in WRITES
    for read in READS
] + ["sw = r; hw = na;"]
RESETS = [0x5A, 0xFF, 0x3C, 0x81]
TOP = """
module top;
  reg clk = 0, rst = 1, req = 0, wr = 0;
  reg [AMSB:0] addr = 0;
  reg [31:0] data = 0, enabled = 0, at = 0;
  wire [31:0] seen;
  wire rd_ack, wr_ack;
  integer file, count, writing;
  card card(.clk(clk), .rst(rst), .s_cpuif_req(req), .s_cpuif_req_is_wr(wr), .s_cpuif_addr(addr),
    .s_cpuif_wr_data(data), .s_cpuif_wr_biten(enabled), .s_cpuif_rd_ack(rd_ack), .s_cpuif_rd_data(seen),
    .s_cpuif_wr_ack(wr_ack));
  always #5 clk = ~clk;
  initial begin
    repeat (4) @(negedge clk);
    rst = 0;
    @(negedge clk);
    file = $fopen("accesses", "r");
    count = $fscanf(file, "%d %h %h %h", writing, at, data, enabled);
    while (count == 4) begin
      req = 1; wr = writing; addr = at;
      #1;
      if (!writing) $display("%h", rd_ack ? seen : 32'hx);
      @(negedge clk);
      req = 0;
      @(negedge clk);
      count = $fscanf(file, "%d %h %h %h", writing, at, data, enabled);
    end
    $finish;
  end
endmodule
"""


def specification() -> str:
    registers = []
    for n in range(0, len(FIELDS), 4):
        fields = " ".join(
            f"field {{ {properties} }} F{i}[{8 * i + 7}:{8 * i}] = {RESETS[(n + i) % 4]:#x};"
            for i, properties in enumerate(FIELDS[n : n + 4])
        )
        registers.append(f"reg {{ {fields} }} R{n // 4} @ {n};")
    return f"addrmap card {{ {' '.join(registers)} }};"


def run(*line: str, folder: Path) -> str:
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=patience(120), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder with the compiled RTL, and the bank."""
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
    width = re.search(r"input wire \[(\d+):0\] s_cpuif_addr", text)
    assert width is not None
    (folder / "top.sv").write_text(TOP.replace("AMSB", width[1]))
    run("iverilog", "-g2012", "-s", "top", "-o", "simulation", "card.sv", "top.sv", folder=folder)
    return folder, build(read_systemrdl(folder / "card.rdl", None))


accesses = st.tuples(
    st.integers(0, (len(FIELDS) - 1) // 4),
    st.sampled_from([None, (0, 4), (0, 2), (2, 2), (0, 1), (1, 1), (2, 1), (3, 1)]),
    st.integers(0, 2**32 - 1),
)


@settings(max_examples=examples(60), deadline=None)
@given(st.lists(accesses, min_size=1, max_size=60))
def test_the_bank_answers_as_the_rtl(simulated: tuple[Path, Any], taken: list[tuple[int, Any, int]]) -> None:
    folder, bank = simulated
    bar0 = MmioBar(0, size=4096)
    parts = {"vendor_id": 1, "device_id": 2, "class_code": 3, "bar0": bar0, "regs": bar0.bank(bank)}
    device: PciDevice = type("Judged", (PciDevice,), parts)()
    lines, answers = [], []
    # At the end, what is stored is read once more.
    for number, written, value in [*taken, *((n, None, 0) for n in range((len(FIELDS) + 3) // 4))]:
        if written is None:
            lines.append(f"0 {4 * number:x} 0 0")
            answers.append(device.backend.region_read(0, 4 * number, 4))
        else:
            first, count = written
            mask = ((1 << 8 * count) - 1) << 8 * first
            lines.append(f"1 {4 * number:x} {value:x} {mask:x}")
            device.backend.region_write(0, 4 * number + first, count, (value & mask) >> 8 * first)
    device.close()
    (folder / "accesses").write_text("".join(f"{line}\n" for line in lines))
    seen = run("vvp", "-n", "simulation", folder=folder).split()
    assert [f"{answer:08x}" for answer in answers] == seen
