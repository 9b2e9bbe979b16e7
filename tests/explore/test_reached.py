"""What a rig of the user's says that a run has reached: any file may be there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmodel.campaign.matrix import Run
from vmodel.campaign.rig import harness_error
from vmodel.campaign.store import Row
from vmodel.errors import ConfigError
from vmodel.experiment.case import Case
from vmodel.explore.reached import code_of


def row(folder: Path, artefact: str = "reached") -> Row:
    case = Case(machine=folder / "edu.toml", workload="true")
    run = Run(machine="edu", kernel="", workload="w", plan="p", seed=0, case=case, expect=(), inputs={}, rig="r.py:R")
    result = harness_error(case, "rig", "none").model_copy(update={"artefacts": {artefact: "reached.json"}})
    return Row(7, run, folder, result=result)


def test_numbers_by_module(tmp_path: Path) -> None:
    (tmp_path / "reached.json").write_text('{"card": [17, 42, 17], "core": []}')
    assert code_of(row(tmp_path)) == {("card", 17), ("card", 42)}
    assert code_of(row(tmp_path, "another")) == frozenset()


_FORM = 'must be as {"module": [1, 2]}'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is not JSON"),
        ("[" * 200_000, "is not JSON"),
        ('{"c": [' + "9" * 5000 + "]}", "is not JSON"),
        ("\udcff", "is not JSON"),
        ("[1]", _FORM),
        ('{"card": 5}', _FORM),
        ('{"card": "123"}', _FORM),
        ('{"card": {"1": 2}}', _FORM),
        ('{"card": [1, 1e999]}', "'card': numbers must be integers, as [1, 2], not inf"),
        ('{"card": [NaN]}', "'card': numbers must be integers, as [1, 2], not nan"),
        ('{"card": [true]}', "'card': numbers must be integers, as [1, 2], not True"),
        ('{"card": [1.5]}', "'card': numbers must be integers, as [1, 2], not 1.5"),
        ('{"card": [null]}', "'card': numbers must be integers, as [1, 2], not None"),
    ],
)
def test_what_is_damaged_is_one_line(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "reached.json"
    path.write_text(content, errors="surrogateescape")
    with pytest.raises(ConfigError) as error:
        code_of(row(tmp_path))
    assert str(error.value) == f"{path}: {says}"


def test_what_is_no_file_of_a_sound_size_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "reached.json"
    for make, says in (
        (lambda: None, "cannot be read: No such file or directory"),
        (lambda: os.mkfifo(path), "cannot be read: is not a regular file"),
        (lambda: path.symlink_to("/dev/zero"), "cannot be read: is not a regular file"),
        (lambda: (path.touch(), os.truncate(path, 17 << 20)), "cannot be read: is larger than 16,777,216 bytes"),
    ):
        make()
        with pytest.raises(ConfigError) as error:
            code_of(row(tmp_path))
        assert str(error.value) == f"{path}: {says}"
        path.unlink(missing_ok=True)
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"reached\.json: is damaged: not coverage as vmodel writes it"):
        code_of(row(tmp_path, "coverage"))
