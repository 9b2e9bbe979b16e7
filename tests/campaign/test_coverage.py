"""Coverage in a campaign: its file, what a run keeps, and the report; without guests, by the lab."""

from __future__ import annotations

import json
import os
import zlib
from base64 import b64encode
from pathlib import Path
from typing import Any

import pytest

from tests.campaign.files import campaign_file
from tests.campaign.runs import rows
from tests.cli.commands import refused, vmodel
from tests.coverage.objects import compiled, function
from vmodel.campaign.matrix import Matrix
from vmodel.campaign.report import as_json, html
from vmodel.campaign.schema import load
from vmodel.campaign.store import ResultStore, Row
from vmodel.campaign.summary import Summary
from vmodel.coverage.addresses import AddressSet
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.errors import CoverageError
from vmodel.errors import ConfigError
from vmodel.experiment.oracle import Outcome

#: `copy` has a branch that never runs, to an error: three instructions.
CODE = "".join(
    [
        function("probe", "ret"),
        function("copy", "test %edi, %edi\njs 1f\nret\n1:\nmov $-22, %eax\nnop\nret"),
        function("careful", "nop\nret"),
        function("retry", "nop\nnop\nret"),
        function("fail", "nop\nnop\nnop\nret"),
        '.section .note.gnu.build-id,"a",@note\n.long 4, 4, 3\n.asciz "GNU"\n.long 0x04030201\n',
    ]
)
SIZES = {"probe": 1, "copy": 6, "careful": 2, "retry": 3, "fail": 4}


@pytest.fixture
def module(folder: Path) -> Path:
    path = folder / "edu.ko"
    path.write_bytes(compiled(CODE))
    return path


def text(targets: str = '["./edu.ko"]', **more: Any) -> str:
    made = campaign_file(**{"workloads": {"copy": "copy 4", "careful": "careful 4"}, **more})
    return made.replace("seeds =", f"coverage = {targets}\nseeds =")


def wrong(folder: Path, content: str) -> str:
    path = folder / "c.toml"
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        Matrix(load(path)[0], path)
    return str(error.value).removeprefix(f"{folder}/")


# ---- the file ------------------------------------------------------------------------------------


def test_each_run_has_it(folder: Path, module: Path) -> None:
    path = folder / "c.toml"
    path.write_text(text('["nvme-core", "vmlinux:pci_", "./edu.ko"]'))
    found = Matrix(load(path)[0], path).runs()
    assert {run.case.coverage for run in found} == {("nvme_core", "vmlinux:pci_", str(module))}
    assert all(str(module) in run.inputs for run in found)
    keys = [run.key for run in found]
    module.write_bytes(compiled(CODE + function("more", "ret")))
    assert not {run.key for run in Matrix(load(path)[0], path).runs()} & set(keys)


def test_without_it_nothing_changes(folder: Path) -> None:
    """The keys of runs are those that older versions wrote."""
    path = folder / "c.toml"
    path.write_text(campaign_file(workloads={"copy": "copy 2"}))
    before = [run.key for run in Matrix(load(path)[0], path).runs()]
    path.write_text(text("[]", workloads={"copy": "copy 2"}))
    found = Matrix(load(path)[0], path).runs()
    assert [run.key for run in found] == before
    assert "coverage" not in found[0].case.model_dump(mode="json", exclude_defaults=True)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ('["nvme", "nv me"]', "campaign.coverage[1]: 'nv me' must be a module's name as"),
        ('["vmlinux"]', 'campaign.coverage[0]: "vmlinux" is all of the kernel: say which functions, as "vmlinux:pci_"'),
        ('["./gone.ko"]', "campaign.coverage[0]: there is no file './gone.ko'"),
        ('["nvme", "nvme"]', "campaign.coverage[1]: 'nvme' is named twice"),
        ('["nvme-core", "nvme_core"]', "campaign.coverage[1]: 'nvme_core' is named twice"),
        ('"nvme"', "campaign.coverage: "),
    ],
)
def test_mistakes(folder: Path, targets: str, said: str) -> None:
    found = wrong(folder, text(targets))
    assert found.startswith(f"c.toml: {said}") and "\n" not in found


def test_code_that_no_guest_has(folder: Path) -> None:
    """It is found before the first run."""
    path = folder / "c.toml"
    path.write_text(text('["nvme", "nvm"]').replace('rig = "lab.py:Lab"', 'kernels = ["stable"]'))
    said = refused(vmodel("campaign", path, cwd=folder))
    assert said.startswith(f"{path}: campaign.coverage[1]: kernel 6.") and "did you mean 'nvme'?" in said
    assert not (folder / "c.runs").exists()


# ---- what is kept, and reported --------------------------------------------------------------------


@pytest.fixture
def campaign(folder: Path, module: Path) -> Path:
    """The folder of a campaign that has ended."""
    faults = {
        "aborted": "dma.read device=edu0 nth=3 do=abort",
        "flipped": "dma.write probability=0.5 do=flip(2)",
        "never": "dma.write nth=500 do=drop",
    }
    (folder / "c.toml").write_text(text(faults=faults))
    done = vmodel("campaign", "c.toml", cwd=folder)
    assert done.returncode in (0, 1), done.stderr
    return folder / "c.runs"


def summary(folder: Path) -> Summary:
    with ResultStore.open(folder) as store:
        found = Summary(store, folder.parent)
    assert found.coverage is not None
    return found


def test_each_run_keeps_its_own(campaign: Path) -> None:
    summary(campaign)  # it knows where the module's file is
    found = rows(campaign)
    assert len(found) == 14
    for row in found:
        reached = row.coverage
        assert reached is not None and reached.build_ids == {"edu": "01020304"}
        names = {name for _, name in reached.functions_reached()}
        assert {"probe", row.run.workload} <= names
        assert ("fail" in names) is (row.result is not None and row.result.status != 0)


def test_the_summary(campaign: Path) -> None:
    found = summary(campaign).coverage
    (build,) = found.builds
    assert (len(build.new), found.notes) == (14, [])
    # A plan that never injected anything ran without faults.
    assert build.clean_runs == 2 + 4
    assert build.faults.keys() == {"aborted", "flipped"}
    comparison = build.comparison
    (row,) = comparison.modules
    counts = {f.name: (f.instructions.clean, f.instructions.faults, f.instructions.never) for f in row.functions}
    for name in ("probe", "copy", "careful"):
        assert counts[name] == (SIZES[name], 0, 0), name
    assert counts["retry"] == (0, SIZES["retry"], 0)
    assert counts["fail"] == (0, SIZES["fail"], 0)
    growth = [reached for _, reached in comparison.growth]
    assert growth == sorted(growth) and growth[-1] == sum(SIZES.values()) == len(comparison.everything)
    assert comparison.growth[0] == ("run 1: no faults", SIZES["probe"] + SIZES["copy"])


def test_json(campaign: Path) -> None:
    done = vmodel("report", campaign, "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["coverage"]
    assert found["notes"] == []
    (build,) = found["builds"]
    assert (build["runs"], build["clean_runs"], build["kernels"]) == (14, 6, [""])
    functions = {entry["name"]: entry["instructions"] for entry in build["modules"][0]["functions"]}
    assert functions["fail"] == {"total": 4, "clean": 0, "only_faults": 4, "never": 0}
    assert {fault["name"] for fault in build["faults"]} == {"aborted", "flipped"}
    assert sum(fault["first"] for fault in build["faults"]) == build["modules"][0]["instructions"]["only_faults"]
    assert Coverage.from_json(build["coverage"]).modules() == ["edu"]
    assert len(build["growth"]) == 14


def test_a_report_without_it_is_as_before(folder: Path) -> None:
    (folder / "c.toml").write_text(campaign_file(workloads={"copy": "copy 2"}, faults={"never": "irq nth=99 do=drop"}))
    assert vmodel("campaign", "c.toml", cwd=folder).returncode == 0
    assert all(row.coverage is None for row in rows(folder / "c.runs"))
    found = summary(folder / "c.runs")
    assert not found.coverage
    assert "coverage" not in json.loads(as_json(found))


def test_the_module_is_gone(campaign: Path, module: Path) -> None:
    """Its functions are unknown, and the report says so; what was reached, by how much, is still known."""
    module.unlink()
    done = vmodel("report", campaign, "--format", "json")
    assert done.returncode == 0, done.stderr
    (build,) = json.loads(done.stdout)["coverage"]["builds"]
    (entry,) = build["modules"]
    assert entry["functions"] == [] and "this file is not here" in entry["notes"][0]
    assert build["growth"][-1]["reached"] == sum(SIZES.values())


# ---- stores from somebody else ---------------------------------------------------------------------


def _bomb() -> str:
    data = b64encode(zlib.compress(bytes(1 << 28), 9)).decode()
    return json.dumps({"version": 1, "programs": {"edu": {"build_id": "ab", "instructions": data}}})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is damaged: it is not JSON"),
        ("[" * 100_000, "is damaged: it is not JSON"),
        ("[]", "is damaged: not coverage as vmodel writes it"),
        (_bomb(), "is damaged: coverage of edu: damaged instructions: too many"),
        ("x" * (17 << 20), "cannot be read: is larger than 16,777,216 bytes"),
    ],
)
def test_damaged_coverage(campaign: Path, content: str, said: str) -> None:
    path = campaign / "3" / "coverage.json"
    path.write_text(content)
    row = next(row for row in rows(campaign) if row.id == 3)
    with pytest.raises(CoverageError) as error:
        assert row.coverage
    assert str(error.value).startswith(f"{path}: {said}") and "\n" not in str(error.value)
    # The report has that of the other runs, and says what is missing.
    found = summary(campaign).coverage
    assert found.notes == [str(error.value)]
    assert [id for id, _, _ in found.builds[0].new] == [1, 2, *range(4, 15)]


def test_files_that_have_no_end(campaign: Path) -> None:
    for id, path in ((3, campaign / "3" / "coverage.json"), (4, campaign / "4" / "coverage.json")):
        path.unlink()
        if id == 3:
            os.mkfifo(path)
        else:
            path.symlink_to("/dev/zero")
    found = summary(campaign).coverage
    assert len(found.notes) == 2 and all(note.endswith("is not a regular file") for note in found.notes)


def test_many_notes_are_a_few(campaign: Path) -> None:
    for id in range(1, 11):
        (campaign / str(id) / "coverage.json").write_text("{")
    found = summary(campaign).coverage
    assert len(found.notes) == 6 and found.notes[-1] == "the coverage of 5 more runs is left out, too"


def _far_apart(first: int, pages: int) -> str:
    """Coverage of one address in each of so many pages: a file of few bytes."""
    reached = Coverage({"edu": AddressSet(range(first << 12, first + pages << 12, 1 << 12))}, {"edu": "01020304"})
    return json.dumps(reached.to_json())


def test_coverage_that_grows_from_run_to_run(campaign: Path) -> None:
    """Each file alone is small, and can be read; what all have reached, and what the report holds, has a limit."""
    for id in range(3, 13):
        path = campaign / str(id) / "coverage.json"
        path.write_text(_far_apart(id * 10_000, 10_000))
        assert path.stat().st_size < 2000
    found = summary(campaign).coverage
    (build,) = found.builds
    assert [id for id, _, _ in build.new] == [1, 2, 3, 4, 5, 13, 14]
    assert found.notes[0] == "run 6: its coverage is left out: with that of the runs before it is too large"
    assert len(found.notes) == 6


def test_many_plans_with_large_coverage(campaign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmodel.campaign.coverage._MOST_PAGES", 25_000)
    for id in range(1, 15):
        (campaign / str(id) / "coverage.json").write_text(_far_apart(0, 10_000))
    found = summary(campaign).coverage
    (build,) = found.builds
    held = build.clean.pages + sum(coverage.pages for coverage in build.faults.values())
    assert held == 20_000 and 2 <= len(build.new) < 14 and "is too large" in found.notes[0]


def test_rules_that_watch_are_no_faults(folder: Path, module: Path) -> None:
    watched = {"watched": "dma.write do=watch", "aborted": "dma.read device=edu0 nth=3 do=abort"}
    (folder / "c.toml").write_text(text(faults=watched, workloads={"copy": "copy 4"}))
    assert vmodel("campaign", "c.toml", cwd=folder).returncode in (0, 1)
    assert {row.run.plan for row in rows(folder / "c.runs") if row.result and row.result.injected} == {*watched}
    found = summary(folder / "c.runs")
    (build,) = found.coverage.builds
    assert (build.clean_runs, [*build.faults]) == (3, ["aborted"])
    # Nor has the driver survived them.
    assert {row.plan: str(row.survived)[:4] for row in found.faults} == {
        "no faults": "none",
        "watched": "none",
        "aborted": "0 % ",
    }
    assert found.outcomes[Outcome.MASKED] and found.rate(Outcome.MASKED).hits == 0
    assert [rate.of for rate in found.by_kernel().values()] == [2], "two seeds"
    assert html(found).count(">not counted<") == 2


def test_other_builds_are_apart(campaign: Path) -> None:
    path = campaign / "14" / "coverage.json"
    content = json.loads(path.read_text())
    content["programs"]["edu"]["build_id"] = "ab"
    path.write_text(json.dumps(content))
    found = summary(campaign).coverage
    assert [len(build.new) for build in found.builds] == [13, 1]
    assert found.builds[1].comparison.modules[0].note.startswith("edu with build id ab: this file is not here")


def test_a_run_that_names_a_file_elsewhere(campaign: Path) -> None:
    """An artefact outside of the run's folder is none."""
    with ResultStore.open(campaign) as store:
        row = store.row(1)
    assert row.result is not None
    outside = row.result.model_copy(update={"artefacts": {}})
    assert Row(1, row.run, row.folder, result=outside).coverage is None
