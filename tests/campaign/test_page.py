"""The report's page in a browser."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.browser import Browser, check_contrast, luminance
from tests.cli.commands import vmodel
from vmodel.experiment.oracle import Outcome

pytestmark = pytest.mark.slow

SHOWN = '[...document.querySelectorAll("#run-table tbody tr")].filter(row => row.offsetParent).map(row => row.id)'
COLUMN = '[...document.querySelectorAll("#run-table tbody tr")].map(row => row.cells[{}].textContent.trim())'


@pytest.fixture
def page(finished: Path) -> Path:
    path = finished.parent / "report.html"
    done = vmodel("report", finished, "-o", path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return path


def test_it_needs_nothing_else(page: Path, browser: Browser) -> None:
    browser.open(page)
    assert browser.said == []
    assert browser.requests == [page.as_uri()]
    assert browser.js("document.scripts.length") == 1
    assert browser.js("getComputedStyle(document.querySelector('.mark.crash')).backgroundColor") == "rgb(226, 100, 100)"


def test_what_it_says(page: Path, browser: Browser) -> None:
    browser.open(page)
    text = browser.js("document.body.innerText")
    for words in (
        "all 31 runs have ended",
        "silent corruption",
        "flipped <b>bits</b>",
        "mmio.read register=ID do=ones",
        "BUG edu_probe",
        "Dots are runs, bars are medians",
        "RuntimeError: the lab is broken: it (lab.py line",
        "not as expected",
    ):
        assert words in text, words
    assert f"vmodel reproduce {page.parent}/all.runs/7 --trust" in text
    assert browser.js("document.querySelectorAll('b').length") == 4, "only the page's own"
    # Each run is once in the matrix, and its mark leads to its row.
    targets = browser.js('[...document.querySelectorAll("#matrix .mark")].map(mark => mark.getAttribute("href"))')
    assert sorted(targets) == sorted(f"#run-{n}" for n in range(1, 32))
    assert browser.js('[...document.querySelectorAll("#matrix .mark")].every(m => document.querySelector(m.hash))')


def test_the_links_lead_to_artefacts(page: Path, browser: Browser) -> None:
    browser.open(page)
    links = browser.js('[...document.links].map(link => link.href).filter(link => !link.includes("#"))')
    assert len(links) > 62
    for link in links:
        assert Path(unquote(urlsplit(link).path)).exists(), link


def test_sorting(page: Path, browser: Browser) -> None:
    browser.open(page)
    heads = browser.js('[...document.querySelectorAll("#run-table th")].map(head => head.innerText.trim())')

    def severity(text: str) -> int:
        return next(n for n, outcome in enumerate(Outcome) if text[1:].startswith(outcome.value))

    for name, by in (("Run", float), ("Outcome", severity), ("Fault", str), ("Seed", float)):
        column = next(n for n, head in enumerate(heads) if head.startswith(name))
        click = f'document.querySelectorAll("#run-table th")[{column}].querySelector("button").click()'
        for order, reverse in (("ascending", False), ("descending", True)):
            browser.js(click)
            found = browser.js(COLUMN.format(column))
            values = [by(text) for text in found]
            assert len(values) == 31 and values == sorted(values, reverse=reverse), (name, order)
            sort = f'document.querySelectorAll("#run-table th")[{column}].getAttribute("aria-sort")'
            assert browser.js(sort) == order


def test_filters(page: Path, browser: Browser) -> None:
    browser.open(page)
    assert len(browser.js(SHOWN)) == 31

    def set_to(control: str, what: str) -> list[str]:
        browser.js(
            f'{{ const c = document.getElementById("{control}"); {what}; c.dispatchEvent(new Event("input")); }}'
        )
        found: list[str] = browser.js(SHOWN)
        assert browser.js('document.getElementById("shown").textContent') == f"{len(found)} of 31"
        return found

    hangs = set_to("outcome", 'c.value = "hang"')
    assert len(hangs) == 4
    assert len(set_to("filter", 'c.value = "CAREFUL stuck"')) == 2
    set_to("outcome", 'c.value = ""')
    set_to("filter", 'c.value = ""')
    assert 0 < len(set_to("unexpected", "c.checked = true")) < 31
    # A mark in the matrix finds its run whatever the filter hides.
    hidden = next(f"#run-{n}" for n in range(1, 32) if f"run-{n}" not in browser.js(SHOWN))
    browser.js(f"new Promise(done => {{ addEventListener('hashchange', done); location.hash = '{hidden}'; }})")
    assert len(browser.js(SHOWN)) == 31


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read(page: Path, browser: Browser, scheme: str) -> None:
    """Text stands out against what is behind it: by WCAG 2.1, 4.5 to 1."""
    browser.media(prefers_color_scheme=scheme)
    browser.open(page)
    check_contrast(browser, "p, th, td, a, code, .mark, h1, .muted", pairs=9)
    assert (luminance(browser.js("getComputedStyle(document.body).backgroundColor")) < 0.1) is (scheme == "dark")


def test_print(page: Path, browser: Browser) -> None:
    browser.media(prefers_color_scheme="dark")
    browser.open(page)
    browser.media("print", prefers_color_scheme="dark")
    assert browser.js("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.js("getComputedStyle(document.querySelector('.tools')).display") == "none"
    assert browser.pdf().startswith(b"%PDF-")
    assert browser.js("[...document.querySelectorAll('details')].every(details => details.open)")


def test_narrow_and_wide(page: Path, browser: Browser) -> None:
    """Tables scroll in themselves; the page does not sideways."""
    for width in (400, 1350, 2500):
        browser.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        browser.open(page)
        assert browser.js("document.documentElement.scrollWidth") <= width


def test_captions_fit(page: Path, browser: Browser) -> None:
    """A table that is wider than a telephone scrolls below its caption, which can be read as a whole."""
    browser.call("Emulation.setDeviceMetricsOverride", width=400, height=900, deviceScaleFactor=1, mobile=False)
    browser.open(page)
    assert browser.js("document.querySelector('#outcomes table').getBoundingClientRect().right") > 400
    shown = "[...document.querySelectorAll('caption')].map(caption => caption.getBoundingClientRect().right)"
    for right in (browser.js(shown), browser.js(f"document.querySelector('#outcomes .wide').scrollLeft = 99, {shown}")):
        assert right and max(right) <= 400
    # Nor does the last column become one of single words.
    assert browser.js("document.querySelector('#outcomes tbody tr').getBoundingClientRect().height") < 60


def test_a_long_name_of_a_kernel_leaves_room(page: Path, browser: Browser) -> None:
    """It wraps, so that the share that survived is on the screen."""
    browser.open(page)
    browser.js('document.querySelector("#matrix th.kernel").textContent = "stable (6.12.117+deb13-amd64)"')
    assert browser.js('document.querySelector("#matrix th.kernel").getBoundingClientRect().width') < 230
