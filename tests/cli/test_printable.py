"""What others say reaches terminals without control characters, by whatever command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands import EXAMPLE, in_terminal, serving, vmodel
from tests.hostile import EVIL, is_clean
from vmodel.campaign.matrix import Run
from vmodel.campaign.rig import harness_error
from vmodel.campaign.store import ResultStore
from vmodel.experiment.case import Case
from vmodel.printable import printable

pytestmark = pytest.mark.slow


@pytest.fixture
def evil(tmp_path: Path) -> Path:
    """A folder of files in which every text is hostile, a campaign's database among them."""
    quoted = json.dumps(EVIL)  # TOML has the same escapes
    (tmp_path / "m.toml").write_text(f'[[device]]\nname = {quoted}\nmodel = "edu"\n')
    (tmp_path / "model.toml").write_text(f'[[device]]\nname = "d"\nmodel = {quoted}\n')
    (tmp_path / "p.toml").write_text(f'[[rule]]\nname = {quoted}\npoint = "dma.write"\ndo = "drop"\n')
    (tmp_path / "q.toml").write_text(f"[[rule]]\npoint = {quoted}\n")
    (tmp_path / "c.toml").write_text(f"[campaign]\nname = {quoted}\n")
    case = Case(machine=tmp_path / "m.toml", workload="w", name=EVIL)
    with ResultStore.create(tmp_path / "x.runs", {"kind": "campaign", "name": EVIL, "file": EVIL}) as store:
        (id,) = store.add(
            [Run(machine=EVIL, kernel="", workload=EVIL, plan=EVIL, seed=0, case=case, rig=f"{EVIL}.py:X")]
        )
        result = harness_error(case, EVIL, "x").model_copy(update={"versions": {EVIL: EVIL}})
        store.finish(id, store.part(id), result, "", 1.0)
    return tmp_path


COMMANDS = [
    ["serve", "m.toml"],
    ["serve", "model.toml"],
    ["qemu-args", "m.toml"],
    ["groups", "m.toml"],
    ["groups", "m.toml", "--json"],
    ["guest", "model.toml", "--", "true"],
    ["run", "model.toml"],
    ["acpi", "m.toml", "--table", "viot"],
    ["iommu", "show", "m.toml"],
    ["log", "m.toml"],
    ["inject", "list", "m.toml"],
    ["inject", "add", "m.toml", EVIL],
    ["plan", "check", "p.toml"],
    ["plan", "check", "q.toml", "p.toml"],
    ["plan", "check", "p.toml", "--machine", "m.toml"],
    ["campaign", "c.toml"],
    ["campaign", "c.toml", "--dry-run"],
    ["sweep", "m.toml", "--point", EVIL, "--workload", EVIL],
    ["report", "x.runs"],
    ["report", "x.runs", "--format", "json"],
    ["report", "x.runs", "--format", "junit"],
    ["report", "x.runs", "--format", EVIL],
    ["reproduce", "x.runs/1"],
    ["reproduce", "x.runs/1", "--trust"],
    ["minimise", "x.runs/1", "--trust"],
    ["regs", EVIL],
    [EVIL],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: printable(" ".join(words))[:40])
def test_commands(evil: Path, command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evil)
    done = vmodel(*command, cwd=evil)
    assert is_clean((done.stdout + done.stderr).encode(errors="surrogatepass")), done
    assert "Traceback" not in done.stderr


def test_in_a_terminal(evil: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(evil)
    for command in (["report", "x.runs"], ["reproduce", "x.runs/1"], ["plan", "check", "p.toml"]):
        shown = in_terminal(*command)
        assert is_clean(shown) and b"\\u001b]0;title" in shown, shown


def test_a_running_server(evil: Path) -> None:
    """Names of rules go to the server and come back in tables."""
    with serving(EXAMPLE, "--run-dir", evil / "run", "--plan", evil / "p.toml"):
        said = in_terminal("inject", "list", EXAMPLE, "--run-dir", evil / "run")
    assert is_clean(said) and b"\\u001b]0;" in said, said
