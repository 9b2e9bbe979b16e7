"""Campaign files: what they mean, and one line for each mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.campaign.files import FAULTS, campaign_file
from vmodel.campaign.matrix import CONTROL, Matrix, Run
from vmodel.campaign.rig import load_rig
from vmodel.campaign.schema import load, seed_numbers
from vmodel.cli.campaign import at_work
from vmodel.errors import ConfigError
from vmodel.experiment.oracle import Outcome

GOOD = campaign_file(faults={"lost": "dma.write nth=1 do=drop"})


def runs(folder: Path, text: str) -> list[Run]:
    path = folder / "c.toml"
    path.write_text(text)
    return Matrix(load(path)[0], path).runs()


def lines(folder: Path, text: str) -> list[str]:
    """What is wrong with a file, without the file's name."""
    with pytest.raises(ConfigError) as error:
        runs(folder, text)
    found = str(error.value).splitlines()
    assert all(line.startswith(f"{folder}/") for line in found), found
    return [line.removeprefix(f"{folder}/") for line in found]


def test_the_matrix(folder: Path) -> None:
    found = runs(folder, campaign_file(seeds="[7, 9]", workloads={"copy": "copy 1", "careful": "careful 2"}))
    assert len(found) == 2 * (1 + 2 * len(FAULTS))
    # What can share a guest is together, and begins without faults.
    assert [run.plan for run in found[:5]] == [
        CONTROL,
        "aborted read",
        "aborted read",
        "aborted reads",
        "aborted reads",
    ]
    assert [run.workload for run in found] == ["copy"] * 15 + ["careful"] * 15
    run = found[2]
    assert (run.seed, run.case.seed, run.case.workload, run.case.timeout) == (9, 9, "copy 1", 0.3)
    assert run.case.plan is not None and run.case.plan.rule[0].text() == "dma.read device=edu0 do=abort nth=3"
    assert found[0].case.plan is None and found[0].expect == (Outcome.NOT_ACTIVATED,)
    assert len({run.key for run in found}) == len(found)


def test_modules_and_tools_of_machine_and_workload(folder: Path) -> None:
    """A workload's own come after the machine's, and only for that workload; paths count from the campaign's file."""
    (folder / "driver").mkdir()
    for name in ("Kbuild", "main.c"):
        (folder / "driver" / name).write_text(name)
    machine = 'file = "edu.toml"\nmodules = ["uio"]\ntools = ["pciutils:lspci"]\n'
    own = 'modules = ["driver/", "nvme"]\nextra_modules = ["ext4"]\ntools = ["nvme-cli:nvme"]\n'
    text = GOOD.replace('file = "edu.toml"\n', machine).replace("timeout = 0.3\n", f"timeout = 0.3\n{own}", 1)
    found = {run.workload: run for run in runs(folder, text)}
    case = found["copy"].case
    assert case.modules == ("uio", f"{folder}/driver/", "nvme")
    assert (case.extra_modules, case.tools) == (("ext4",), ("pciutils:lspci", "nvme-cli:nvme"))
    assert f"{folder}/driver/main.c" in found["copy"].inputs
    case = found["careful"].case
    assert (case.modules, case.extra_modules, case.tools) == (("uio",), (), ("pciutils:lspci",))
    (folder / "driver" / "main.c").write_text("changed")
    again = {run.workload: run for run in runs(folder, text)}
    assert again["copy"].key != found["copy"].key and again["careful"].key == found["careful"].key
    for wrong, said in (
        (("driver/", "gone/"), "workload[0].modules[0]: there is no module or source folder 'gone/'"),
        (("nvme-cli:nvme", "none"), "workload[0].tools[0]: 'none': must be PACKAGE:PROGRAM, as pciutils:lspci"),
        (("pciutils:lspci", ":x"), "machine[0].tools[0]: ':x': must be PACKAGE:PROGRAM, as pciutils:lspci"),
    ):
        assert lines(folder, text.replace(*wrong)) == [f"c.toml: {said}"]


def test_what_is_left_out(folder: Path) -> None:
    (folder / "b.toml").write_text((folder / "edu.toml").read_text())
    text = GOOD.replace("seeds = 2", "seeds = 1\ncontrol = false").replace(
        '[[workload]]\nname = "broken"', '[[machine]]\nfile = "b.toml"\n[[workload]]\nmachines = ["b"]\nname = "broken"'
    )
    found = [(run.machine, run.workload, run.plan) for run in runs(folder, text)]
    assert found == [
        ("edu", "copy", "lost"),
        ("edu", "careful", "lost"),
        ("b", "copy", "lost"),
        ("b", "careful", "lost"),
    ]


def test_plan_files(folder: Path) -> None:
    (folder / "plans").mkdir()
    (folder / "asks.py").write_text("def wanted(event):\n    return True\n")
    for name in ("one", "two"):
        text = '[[rule]]\npoint = "irq"\ndo = "drop"\nwhen = "../asks.py:wanted"\n[heal]\nafter = "2s"\n'
        (folder / "plans" / f"{name}.toml").write_text(text)
    text = campaign_file(faults={}, workloads={"copy": "copy 1"}, seeds="1")
    found = runs(folder, text + '[[plan]]\nfile = "plans/*.toml"\nexpect = ["hang"]\narm = "boot"\n')
    assert [run.plan for run in found] == [CONTROL, "one", "two"]
    run = found[1]
    assert run.case.plan is not None and run.case.plan.heal is not None and run.case.plan.heal.after == 2
    assert (run.expect, run.case.arm) == ((Outcome.HANG,), "boot")
    # A function that the plan asks is one of the run's files.
    key = run.key
    (folder / "asks.py").write_text("def wanted(event):\n    return False\n")
    again = runs(folder, (folder / "c.toml").read_text())
    assert again[1].key != key and again[0].key == found[0].key


def test_what_a_run_is(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The same files elsewhere are the same runs; another content is another run."""
    other = tmp_path_factory.mktemp("elsewhere")
    for name in ("edu.toml", "lab.py"):
        (other / name).write_bytes((folder / name).read_bytes())
    first, second = runs(folder, GOOD), runs(other, GOOD)
    assert [run.key for run in first] == [run.key for run in second]
    (other / "edu.toml").write_text((other / "edu.toml").read_text() + "\n# changed\n")
    assert not {run.key for run in first} & {run.key for run in runs(other, GOOD)}
    again = Run.model_validate_json(first[1].model_dump_json())
    assert (again.key, again.case) == (first[1].key, first[1].case)


@pytest.mark.parametrize(
    ("value", "meant"), [(3, (0, 1, 2)), ([5, 1], (5, 1)), ("10-12", (10, 11, 12)), ([2**64 - 1], (2**64 - 1,))]
)
def test_seeds(value: object, meant: tuple[int, ...]) -> None:
    assert seed_numbers(value) == meant


@pytest.mark.parametrize("value", [0, -1, True, "x", "3-1", "-1", [], [1, 1], [-1], [2**64], [1.5], 10**9, None])
def test_bad_seeds(value: object) -> None:
    with pytest.raises(ValueError, match=r"seed|must be"):
        seed_numbers(value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("[campaign]", "[campain]"), r"c\.toml: campain: unknown key: did you mean 'campaign'\?"),
        (('name = "lab"\n', ""), r'c\.toml: campaign\.name: is missing, as name = "edu"'),
        (
            ("seeds = 2", 'seeds = "two"'),
            r"c\.toml: campaign\.seeds: 'two': must be a number of seeds, as 3, or .*",
        ),
        (
            ("seeds = 2", 'seeds = 2\nkernels = ["new"]'),
            r"c\.toml: campaign\.kernels\[0\]: 'new': must be stable, .*",
        ),
        (("seeds", "seedz"), r"c\.toml: campaign\.seedz: unknown key: did you mean 'seeds'\?"),
        (("edu.toml", "nothing.toml"), r"c\.toml: machine\[0\]\.file: there is no file 'nothing\.toml'"),
        (("lab.py:Lab", "lab.py"), r"c\.toml: campaign\.rig: rig 'lab\.py': must be .*"),
        (("lab.py:Lab", "lab.py:Labor"), r"c\.toml: campaign\.rig: rig '.*lab\.py:Labor': Labor must be a class .*"),
        (("lab.py:Lab", "gone.py:Lab"), r"c\.toml: campaign\.rig: rig '.*gone\.py:Lab': there is no file .*"),
        (("nth=1", "nth=0"), r"c\.toml: plan\[0\]\.faults\[0\]: 'dma\.write nth=0 do=drop': nth: the first event is 1"),
        (("do=drop", "do=dorp"), r".* there is no action 'dorp': did you mean 'drop'\? .*"),
        (
            ("nth=1", "device=edu9"),
            r"c\.toml: plan 'lost': .*device: no device is called 'edu9': did you mean .* \(on machine 'edu'\)",
        ),
        (('name = "lost"\n', ""), r'c\.toml: plan\[0\]\.name: is missing, as name = "torn write"'),
        (
            ('name = "lost"', 'name = "no faults"'),
            r"c\.toml: plan\.name: 'no faults' is reserved for runs without a plan",
        ),
        (
            ('["c*"]', '["x*"]'),
            r"c\.toml: plan\[0\]\.workloads: 'x\*' matches none of the workloads: copy, careful, broken",
        ),
        (('name = "careful"', 'name = "copy"'), r"c\.toml: workload\.name: 'copy' is used twice: .*"),
        (("timeout = 0.3", "timeout = 0"), r"c\.toml: workload\[\d\]\.timeout: 0: .*greater than 0"),
        (("timeout = 0.3", 'files = ["x"]'), r"c\.toml: workload\[\d\]\.files\[0\]: there is no file 'x'"),
        (
            ('faults = ["dma.write nth=1 do=drop"]', 'file = "p*.toml"'),
            r"c\.toml: plan\[0\]\.file: there is no file .*",
        ),
        (('faults = ["dma.write nth=1 do=drop"]', 'file = "edu.toml"'), r"edu\.toml: .*"),
        (
            ('workloads = ["c*"]', 'expect = ["hung"]'),
            r"c\.toml: plan\[0\]\.expect\[0\]: 'hung': did you mean 'hang'\? .*",
        ),
        (("[[plan]]", "[plan]"), r"c\.toml: plan: .*: must be written \[\[plan\]\], .*"),
        (("[[plan]]", "[[plan"), r"c\.toml: line [0-9]+: .*: is not valid TOML: .*"),
    ],
)
def test_mistakes(folder: Path, change: tuple[str, str], says: str) -> None:
    assert change[0] in GOOD
    for line in lines(folder, GOOD.replace(*change)):
        assert re.fullmatch(says, line), line


def test_all_mistakes_at_once(folder: Path) -> None:
    text = GOOD.replace("seeds = 2", "seeds = 0").replace("do=drop", "do=dorp").replace('run = "copy 8"', "run = 8")
    assert len(lines(folder, text)) == 3


def test_files_that_are_none(folder: Path) -> None:
    for name, content, says in (
        ("missing.toml", None, "cannot be read: No such file or directory"),
        ("binary.toml", b"\xff\xfe", "line 1: is not UTF-8 text: save the file as UTF-8"),
        ("empty.toml", b"", "campaign: is missing"),
    ):
        path = folder / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError) as error:
            load(path)
        assert str(error.value).startswith(f"{path}: {says}")


def test_a_full_disk(folder: Path) -> None:
    """The database cannot grow: the error names it."""
    found = runs(folder, GOOD)
    with (
        pytest.raises(
            OSError,
            match=r"disk is full: what has ended is stored, and the same command continues: '.*/x\.runs/campaign\.db'",
        ),
        at_work(folder / "x.runs", {"kind": "campaign", "name": "lab"}, found[0].rig, 1, None) as (store, _, _),
    ):
        store._db.execute("PRAGMA max_page_count = 1")
        store.add([run.model_copy(update={"seed": n}) for n in range(500) for run in found])


def test_a_rig_that_is_no_context_manager(tmp_path: Path) -> None:
    (tmp_path / "lab.py").write_text("class Lab:\n    def run(self, case, folder):\n        pass\n")
    with pytest.raises(ConfigError, match=r"^rig '.*lab\.py:Lab': Lab must be a context manager, with __enter__ and"):
        load_rig(f"{tmp_path}/lab.py:Lab")
