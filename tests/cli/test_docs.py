"""scripts/docs: what is wrong with a page fails the build."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vmodel.patience import patience

ROOT = Path(__file__).parents[2]
MISSING = [
    name for name in ("griffe_sphinx", "material", "mkdocs", "mkdocstrings") if not importlib.util.find_spec(name)
]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs the extra `docs` (scripts/docs): {', '.join(MISSING)}")


def build(tmp_path: Path, text: str) -> subprocess.CompletedProcess[str]:
    """A site of one page, with the settings of ours, beside two files that are not in docs/."""
    settings, nav, _ = (ROOT / "mkdocs.yml").read_text().partition("\n# A folder stands")
    assert nav
    (tmp_path / "mkdocs.yml").write_text(settings)
    for folder in ("scripts", "docs", "examples"):
        (tmp_path / folder).mkdir()
    for script in ("docs", "docs-hook.py"):
        shutil.copy(ROOT / "scripts" / script, tmp_path / "scripts")
    (tmp_path / "scripts" / "setup").write_text(f"set -eu\nroot={tmp_path}\nvenv={sys.prefix}\ninstall() {{ :; }}\n")
    shutil.copy(ROOT / "docs" / "site.css", tmp_path / "docs")
    (tmp_path / "README.md").write_text("# Read me\n\n[back](docs/index.md#first), [on](examples/a.toml)\n")
    (tmp_path / "examples" / "a.toml").write_text('[machine]\nname = "a"\n')
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n## First\n\n{text}\n")
    return subprocess.run(
        [tmp_path / "scripts" / "docs"], capture_output=True, text=True, timeout=patience(120), check=False
    )


def test_files_beside_the_pages_are_copied(tmp_path: Path) -> None:
    text = "[up](#first), [read](../README.md#read-me), [a file](../examples/a.toml), [a folder](../examples)"
    done = build(tmp_path, f"{text}\n\n```\n[no link](missing.md)\n```")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"docs: open {tmp_path}/site/index.html; ")
    page = (tmp_path / "site" / "index.html").read_text()
    for link in ("project/index.html#read-me", "project/examples/a.toml.html", "project/examples.html"):
        assert f'href="{link}"' in page
        assert (tmp_path / "site" / link.partition("#")[0]).exists()
    assert 'href="../index.html#first"' in (tmp_path / "site" / "project" / "index.html").read_text()
    assert "a.toml" in (tmp_path / "site" / "project" / "examples.html").read_text()


def test_what_is_wrong_fails_the_build(tmp_path: Path) -> None:
    wrong = {
        "[there](missing.md)": "missing.md",
        "[there](#second)": "#second",
        "[there](../missing.md)": "../missing.md",
        "[there](../missing)": "../missing",
        "[there](../examples/b.toml)": "../examples/b.toml",
        "[there](../../elsewhere.md)": "../../elsewhere.md",
        "[there](../README.md#unread)": "unread",
        "![drawing](missing.svg)": "missing.svg",
        "![drawing](https://example.org/a.svg)": "https://example.org/a.svg",
        '<script src="//example.org/a.js"></script>': "//example.org/a.js",
    }
    done = build(tmp_path, "\n\n".join(wrong))
    warnings = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert done.returncode != 0
    for said in wrong.values():
        assert any(said in line for line in warnings), (said, done.stderr)
    assert len(warnings) == len(wrong), done.stderr


def test_one_is_enough(tmp_path: Path) -> None:
    done = build(tmp_path, "[there](#second)")
    assert done.returncode != 0 and "#second" in done.stderr
