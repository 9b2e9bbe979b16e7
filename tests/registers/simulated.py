"""Runs inside Icarus Verilog, by cocotb: carries out what the test sends on the bus of PeakRDL-regblock's RTL.

The socket named by $VMODEL_JUDGE gets a JSON list of accesses a line: [offset] reads a register, [offset, value,
mask] writes the bytes in the mask.  Each list begins with a reset, and its answer is the list of what was read.
"""

from __future__ import annotations

import json
import os
import socket
from typing import Any

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import FallingEdge, Timer


@cocotb.test()
async def serve(card: Any) -> None:
    cocotb.start_soon(Clock(card.clk, 10, unit="ns").start())
    card.s_cpuif_req.value = 0
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(os.environ["VMODEL_JUDGE"])
        # While it waits for a line, simulated time stands still.
        with connection.makefile("rw") as test:
            for line in test:
                test.write(json.dumps(await carry_out(card, json.loads(line))) + "\n")
                test.flush()


async def carry_out(card: Any, accesses: list[list[int]]) -> list[str]:
    """The values that were read, in binary: a bit may be x."""
    card.rst.value = 1
    for _ in range(2):
        await FallingEdge(card.clk)
    card.rst.value = 0
    await FallingEdge(card.clk)
    answers = []
    for offset, *written in accesses:
        card.s_cpuif_req.value = 1
        card.s_cpuif_req_is_wr.value = int(len(written) == 2)
        card.s_cpuif_addr.value = offset
        if len(written) == 2:
            card.s_cpuif_wr_data.value, card.s_cpuif_wr_biten.value = written
        else:
            await Timer(1, "ns")
            assert card.s_cpuif_rd_ack.value == 1
            answers.append(str(card.s_cpuif_rd_data.value))
        await FallingEdge(card.clk)
        card.s_cpuif_req.value = 0
        await FallingEdge(card.clk)
    return answers
