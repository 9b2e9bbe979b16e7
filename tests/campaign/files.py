"""Files that a user would have written."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
LAB = Path(__file__).with_name("lab.py")
MACHINE = (ROOT / "examples" / "edu.toml").read_text()

#: By outcome of the workload `copy`; `careful` recovers from some.
FAULTS = {
    "aborted read": "dma.read device=edu0 nth=3 do=abort",
    "aborted reads": "dma.read probability=0.4 do=abort",
    "flipped <b>bits</b>": "dma.write probability=0.3 do=flip(2)",
    "stuck command": "mmio.read register=DMA_CMD do=value(1)",
    "gone": "mmio.read register=ID do=ones",
    "delay": "dma.write do=delay(ms=1)",
    "never": "dma.write nth=500 do=drop",
}


def campaign_file(
    *,
    name: str = "lab",
    seeds: str = "2",
    workloads: dict[str, str] | None = None,
    faults: dict[str, str] | None = None,
) -> str:
    """A campaign over the lab."""
    lines = [f'[campaign]\nname = "{name}"\nseeds = {seeds}\nrig = "lab.py:Lab"', '[[machine]]\nfile = "edu.toml"']
    runs = {"copy": "copy 8", "careful": "careful 8", "broken": "break it"} if workloads is None else workloads
    for title, run in runs.items():
        lines.append(f'[[workload]]\nname = "{title}"\nrun = "{run}"\ntimeout = 0.3')
    for title, rule in (FAULTS if faults is None else faults).items():
        selected = 'workloads = ["c*"]' if "copy" in runs else ""
        lines.append(f'[[plan]]\nname = "{title}"\nfaults = ["{rule}"]\n{selected}')
    return "\n\n".join(lines) + "\n"
