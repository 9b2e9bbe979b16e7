"""Coverage as files in a folder, and their content: JSON, the page."""

from __future__ import annotations

import base64
import errno
import json
import os
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, once
from tests.coverage.card import CLEAN, TEXT, card, comparison, lined, with_lines
from vmodel.coverage.addresses import AddressSet
from vmodel.coverage.comparison import Comparison
from vmodel.coverage.coverage import Coverage
from vmodel.coverage.document import document
from vmodel.coverage.errors import CoverageError
from vmodel.coverage.folder import write
from vmodel.coverage.page import html
from vmodel.coverage.sources import Sources


def test_files(tmp_path: Path) -> None:
    written = write(CLEAN, tmp_path / "a" / "b", title="card")
    assert [path.name for path in written] == ["index.html", "coverage.info", "coverage.json", "card.s"]
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == sorted(path.name for path in written)
    source = next(line for line in written[1].read_text().splitlines() if line.startswith("SF:"))
    assert Path(source[3:]).read_text().startswith("# card, build id")


def test_names_of_modules_are_no_paths(tmp_path: Path) -> None:
    odd = Coverage({"../../x": AddressSet([1])}, {"../../x": "ab"}) | CLEAN
    write(odd, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(CLEAN, tmp_path, title="before")
    write_text, count = Path.write_text, 0

    def full(path: Path, *args: Any, **kwargs: Any) -> int:
        nonlocal count
        count += 1
        if count == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(CoverageError) as raised:
        write(CLEAN, tmp_path, title="after")
    assert str(raised.value) == f"{tmp_path}: cannot write the coverage: No space left on device"
    assert json.loads((tmp_path / "coverage.json").read_text())["title"] == "before"
    assert "<h1>before</h1>" in (tmp_path / "index.html").read_text()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_old_listings_go_and_what_is_not_ours_stays(tmp_path: Path) -> None:
    write(CLEAN, tmp_path)
    text = (tmp_path / "card.s").read_text()
    for name in ("old", "vmlinux:pci_"):
        (tmp_path / f"{name.replace(':', '-')}.s").write_text(text.replace("# card,", f"# {name},", 1))
    (tmp_path / "renamed.s").write_text(text)
    (tmp_path / "start.s").write_text(".globl _start\n_start: ret\n")
    (tmp_path / "empty.s").write_text("")
    (tmp_path / "binary.s").write_bytes(b"\xff" * 10_000)
    (tmp_path / "folder.s").mkdir()
    (tmp_path / "target").write_text(text.replace("# card,", "# link,", 1))
    (tmp_path / "link.s").symlink_to("target")
    os.mkfifo(tmp_path / "fifo.s")
    before = {path.name for path in tmp_path.iterdir()}
    write(CLEAN, tmp_path)
    assert before - {path.name for path in tmp_path.iterdir()} == {"old.s", "vmlinux-pci_.s"}
    assert (tmp_path / "target").is_file()


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CoverageError, match=r"cannot write the coverage: (Not a directory|File exists)"):
        write(CLEAN, tmp_path / "file" / "x")


# ---- JSON --------------------------------------------------------------------------------------------


def test_document() -> None:
    found = document(comparison())
    assert json.loads(json.dumps(found)) == found
    assert (found["kind"], found["version"], found["title"]) == ("coverage", 1, "card")
    (module,) = found["modules"]
    assert module["instructions"] == {"total": 13, "clean": 9, "only_faults": 3, "never": 1}
    assert module["lines"] is None and module["notes"] == [] and module["build_id"] == card().build_id
    assert module["functions"][0] == {
        "name": "probe",
        "section": ".text",
        "address": card().function("probe").address,
        "file": None,
        "line": None,
        "instructions": {"total": 10, "clean": 7, "only_faults": 3, "never": 0},
        "lines": None,
    }
    assert [(fault["name"], fault["reached"], fault["only"]) for fault in found["faults"]] == [
        ("stuck", 9, 3),
        ("lost", 9, 0),
    ]
    assert found["faults"][0]["functions"] == [{"module": "card", "name": "probe", "only": 3}]
    assert found["growth"][-1] == {"run": "stuck", "reached": 12}
    assert found["never_taken"] == []
    assert Coverage.from_json(found["coverage"]) == CLEAN


def test_branches_never_taken() -> None:
    (branch,) = document(Comparison(CLEAN))["never_taken"]
    assert (branch["module"], branch["function"], branch["behind"]) == ("card", "probe", 3)
    assert (branch["guard"], branch["signs"], branch["taken"]) == ("test eax, eax; js", ["returns -EINVAL"], True)


# ---- the page ------------------------------------------------------------------------------------------


class _Tags(HTMLParser):
    """That every tag is closed, in order; and what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "data", "poster", "action")]
        self.fetched += [v or "" for name, v in attrs if name == "href" and not (v or "").startswith("#")]
        if tag not in ("meta", "input", "line", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "circle", "polyline"):
            assert self.open.pop() == tag


def code_of(page: str) -> Any:
    found = re.search(r'<script type="text/plain" id="data">([\w+/=]*)</script>', page)
    assert found
    return json.loads(zlib.decompress(base64.b64decode(found[1])))


@pytest.mark.parametrize("of", [Comparison(CLEAN), Comparison(Coverage()), comparison()])
def test_the_page_is_whole_and_alone(of: Comparison) -> None:
    tags = _Tags()
    tags.feed(html(of))
    assert tags.open == [] and tags.fetched == []


def test_text_of_others_is_text() -> None:
    evil = "<script>alert(1)</script>&\"'"
    page = html(Comparison(CLEAN, {evil: CLEAN}, evil, [(evil, 1), (evil, 2)]))
    assert "<script>alert" not in page and page.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;") >= 4


def test_code_in_the_page() -> None:
    data = code_of(html(comparison()))
    probe = data["functions"][f"card/{card().function('probe').address:x}"]
    assert probe[:4] == ["probe", None, 0, 0]
    assert [row[1:3] for row in probe[4]][3:8] == [
        ["js probe+0xe", 2],
        ["xor eax, eax", 2],
        ["pop rbx", 2],
        ["ret", 2],
        ["mov eax, 0xffffffea", 1],
    ]


def test_source_in_the_page(tmp_path: Path) -> None:
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "card.c").write_text(TEXT)
    data = code_of(html(with_lines(), Sources([tmp_path])))
    ((file, text, lines),) = data["files"]
    assert file.endswith("driver/card.c") and "\n".join(text) == TEXT
    assert lines == {"2": 2, "3": 2, "4": 1, "5": 2, "8": 2}
    name, home, first, last, rows = data["functions"][f"lined/{lined().function('probe').address:x}"]
    assert (name, home, first, last) == ("probe", 0, 2, 5)
    assert rows[1][1:] == ["call helper", 2, 0, 3]
    assert code_of(html(with_lines()))["files"][0][1] is None, "the file is not here"


def test_lines_in_json() -> None:
    (module,) = document(with_lines())["modules"]
    assert module["lines"] == {"total": 5, "clean": 4, "only_faults": 1, "never": 0}
    assert module["functions"][0]["line"] == 2 and module["functions"][0]["file"].endswith("driver/card.c")


# ---- source files ---------------------------------------------------------------------------------------


def test_sources(tmp_path: Path) -> None:
    tree = tmp_path / "linux"
    (tree / "drivers/nvme").mkdir(parents=True)
    (tree / "drivers/nvme/pci.c").write_text("int x;\nint y;")
    (tree / "Makefile.c").write_text("a file of this name alone is nobody's")
    sources = Sources([tree])
    assert sources.text("/build/path/linux-6.12/drivers/nvme/pci.c") == ["int x;", "int y;"]
    assert sources.path("/build/path/linux-6.12/Makefile.c") is None
    assert sources.path(str(tree / "Makefile.c")) == tree / "Makefile.c"
    assert sources.text("/build/path/linux-6.12/drivers/nvme/gone.c") is None


@pytest.mark.parametrize(
    "file", ["/etc/passwd", "/etc/../etc/hosts.c", "/dev/zero.c", "", "x", "a\0b/c.c", "/x/" * 3000]
)
def test_debug_information_cannot_name_any_file(file: str, tmp_path: Path) -> None:
    assert Sources([tmp_path]).path(file) is None


# ---- in a browser ---------------------------------------------------------------------------------------


#: The title of the view of code, once it is open.
OPENED = once("view.open", "document.getElementById('view-title').textContent")
#: The view's rows.
ROWS = "[...document.querySelectorAll('#code div')].map(row => row.className + row.textContent)"


@pytest.mark.slow
def test_source_in_chromium(tmp_path: Path, browser: Browser) -> None:
    (tmp_path / "driver").mkdir()
    (tmp_path / "driver" / "card.c").write_text(TEXT)
    write(with_lines(), tmp_path / "out", sources=[tmp_path])
    address = lined().function("probe").address
    browser.open(tmp_path / "out" / "index.html", f"#code=lined/{address:x}")
    assert browser.js(OPENED) == "probe (lined), card.c"
    assert browser.js(ROWS)[2:5] == ["r23●    if (helper() < 0)", "r14◐        return -EINVAL;", "r25●    return 0;"]
    browser.js("document.getElementById('as-instructions').click()")
    shown = browser.js(once("code.children.length > 7", ROWS))
    assert shown[0].startswith("where") and shown[0].endswith("driver/card.c:2  {") and shown[1].endswith("●push rbx")
    browser.js("document.querySelector('#source-table a').click()")
    assert browser.js(once("code.children.length === 10"))
    assert browser.said == []


@pytest.mark.slow
def test_the_page_in_chromium(tmp_path: Path, browser: Browser) -> None:
    write(comparison(), tmp_path / "out")
    page = tmp_path / "out" / "index.html"
    browser.open(page)
    shown = "document.querySelector('[data-shown=function-table]').textContent"
    assert browser.js(shown) == "3 of 3"
    browser.js(
        "for (const input of document.querySelectorAll('[data-filter=function-table]'))"
        " { input.value = 'pro'; input.dispatchEvent(new Event('input')); }"
    )
    assert browser.js(shown) == "1 of 3"
    assert browser.js("document.getElementById('view').open") is False
    address = card().function("probe").addresses[7]
    browser.js(f"location.hash = '#code=card/{card().function('probe').address:x}/{address:x}'")
    assert browser.js(OPENED) == "probe (card)"
    assert browser.js("document.querySelector('.here').textContent") == f"{address:x}◐mov eax, 0xffffffea"
    assert (
        browser.js("[...document.querySelectorAll('#code div')].map(row => row.className.split(' ')[0]).join('')")
        == "r2" * 7 + "r1" * 3
    )
    browser.js("document.getElementById('close').click()")
    assert browser.js(once("!location.hash"))
    browser.js("document.querySelector('#function-table thead th:nth-child(4) button').click()")
    names = "[...document.querySelectorAll('#function-table tbody td.name')].map(cell => cell.textContent).join(' ')"
    assert browser.js(names) == "remove helper probe"
    assert browser.said == [] and len(browser.requests) == 1
