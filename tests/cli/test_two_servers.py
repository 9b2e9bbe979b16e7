"""Two servers at once: of one machine, of two machines in one run directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands import ELSE, ROOT, refused, serving, vmodel

pytestmark = pytest.mark.slow


def files(folder: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes() if path.is_file() else None for path in folder.iterdir()}


def test_two_servers_of_one_machine(tmp_path: Path) -> None:
    """The second is refused, and takes nothing from the first."""
    run, file = tmp_path / "run", ROOT / "examples" / "edu-viommu.toml"
    with serving(file, "--run-dir", run):
        before = files(run)
        assert sorted(before) == ["edu-viommu.control", "edu-viommu.viot", "edu0.sock", "viommu0.sock"]
        said = refused(vmodel("serve", file, "--run-dir", run))
        assert said == f"machine 'edu-viommu' is being served already on {run}/edu-viommu.control: {ELSE}"
        assert files(run) == before
        assert vmodel("iommu", "show", file, "--run-dir", run).returncode == 0


def test_two_machines_in_one_run_dir(tmp_path: Path) -> None:
    """Each has its sockets and its ACPI tables, as long as no two devices have one name."""
    run = tmp_path / "run"
    one, other, clash = tmp_path / "one.toml", tmp_path / "other.toml", tmp_path / "clash.toml"
    example = (ROOT / "examples" / "edu-viommu.toml").read_text().replace("0000:00:03.0", "0000:00:05.0")
    one.write_text((ROOT / "examples" / "edu-viommu.toml").read_text().replace('name = "edu-viommu"', 'name = "one"'))
    other.write_text(example.replace('"edu-viommu"', '"other"').replace("edu0", "edu1").replace("viommu0", "viommu1"))
    clash.write_text(example.replace('"edu-viommu"', '"clash"').replace("viommu0", "viommu2"))
    with serving(one, "--run-dir", run):
        with serving(other, "--run-dir", run) as (second, _):
            both = files(run)
            assert {name for name, content in both.items() if content} == {"one.viot", "other.viot"}
            assert both["one.viot"] != both["other.viot"]
            for file, name in ((one, "one"), (other, "other")):
                assert f"{run}/{name}.viot" in vmodel("qemu-args", file, "--run-dir", run).stdout
                shown = json.loads(vmodel("iommu", "show", file, "--run-dir", run, "--json").stdout)
                assert shown["machine"] == name
            said = refused(vmodel("serve", clash, "--run-dir", run))
            assert said == f"device 'edu0' is being served already on {run}/edu0.sock: {ELSE}"
            assert files(run) == both
            second.terminate()
            assert second.wait(20) == 0
        assert sorted(files(run)) == ["edu0.sock", "one.control", "one.viot", "viommu0.sock"]
        assert files(run)["one.viot"] == both["one.viot"]


def test_run_dirs_that_qemu_would_misread(tmp_path: Path) -> None:
    file = ROOT / "examples" / "edu-vtd.toml"
    words = vmodel("qemu-args", file, "--run-dir", tmp_path / "a,b").stdout
    assert f"file={tmp_path}/a,,b/edu-vtd.dmar" in words
    assert "use another --run-dir" in refused(vmodel("qemu-args", file, "--run-dir", tmp_path / "a:b"))
