"""What mkdocs.yml adds to MkDocs: links out of docs/, folders in the navigation, and a look at what pages load.

Pages are written for the repository: they link to files beside docs/, such as ../CONTRIBUTING.md, and to folders.
Each such file has a copy below project/ in the site, a Markdown file as a page, another as a page with its text, a
folder as a page with its files.  Whatever is wrong is a warning, which ends `mkdocs build --strict`.
"""

from __future__ import annotations

import logging
import posixpath
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

log = logging.getLogger("mkdocs.hooks.docs")

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()([^)\s#]+)")
#: A fenced block, which is no place of links.
FENCED = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)
LANGUAGES = {"c": "c", "h": "c", "py": "python", "sh": "sh", "toml": "toml"}
#: What makes a browser fetch something when it shows the page; a link that one clicks on does not.
LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}


def in_repository(uri: str) -> str:
    """Where in the repository the page of a URI comes from."""
    if not uri.startswith("project/"):
        return f"docs/{uri}"
    path = uri.removeprefix("project/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def in_site(path: str) -> str:
    """The URI of a file of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/") + ("/index.md" if (ROOT / path).is_dir() else "")
    return f"project/{path}" if path.endswith(".md") else f"project/{path}.md"


def target_of(uri: str, link: str) -> str | None:
    """The file of the repository that a link of a page leads to, for links that MkDocs does not follow by itself."""
    if re.match(r"[a-z]+:|/", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository(uri)), link))
    if path.startswith("../"):
        return None
    if path.startswith("docs/") and not (uri.startswith("project/") or (ROOT / path).is_dir()):
        return None
    return path


def replace_links(uri: str, text: str) -> str:
    """The page's text with links to where things are in the site."""

    def replace(match: re.Match[str]) -> str:
        path = target_of(uri, match[2])
        if path is None or not (ROOT / path).exists():
            return match[0]  # MkDocs warns of what is not there
        return match[1] + posixpath.relpath(in_site(path), posixpath.dirname(uri) or ".")

    parts, at = [], 0
    for fence in FENCED.finditer(text):
        parts += [LINK.sub(replace, text[at : fence.start()]), fence[0]]
        at = fence.end()
    return "".join([*parts, LINK.sub(replace, text[at:])])


def links(uri: str, text: str) -> set[str]:
    """What a page links to that MkDocs does not find by itself: files outside docs/, and folders."""
    found = (target_of(uri, match[2]) for match in LINK.finditer(FENCED.sub("", text)))
    return {path for path in found if path and (ROOT / path).exists()}


def title_of(file: Path) -> str:
    """What a link to it says."""
    if file.suffix != ".md":
        return file.name
    return file.read_text().partition("\n")[0].removeprefix("# ")


def page_for(path: str) -> str:
    """The Markdown of a file or folder outside docs/."""
    source = ROOT / path
    if path.endswith(".md"):
        return source.read_text()
    if source.is_dir():
        inside = sorted(entry for entry in source.iterdir() if entry.is_file() and not entry.name.startswith("."))
        below = "" if path.startswith("docs/") else f"{source.name}/"
        return f"# {path}\n\n" + "".join(f"- [{title_of(entry)}]({below}{entry.name})\n" for entry in inside)
    text = source.read_text()
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or ["``"]))
    return f"# {path}\n\n{fence}{LANGUAGES.get(path.rpartition('.')[2], 'text')}\n{text}{fence}\n"


def on_config(config: MkDocsConfig) -> None:
    """Puts the pages of a folder where the navigation names the folder."""

    def expand(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {title: expand(inside) for title, inside in entry.items()}
        if isinstance(entry, list):
            return [expand(inside) for inside in entry]
        if isinstance(entry, str) and entry.endswith("/"):
            return [f"{entry}index.md"] + [
                f"{entry}{page.name}" for page in sorted(Path(config.docs_dir, entry).glob("*.md"))
            ]
        return entry

    config.nav = expand(config.nav)  # None: there is none


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to outside docs/, and what that links to."""

    def named(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for inside in (entry.values() if isinstance(entry, dict) else entry) for name in named(inside)]

    wanted = {in_repository(uri).removesuffix("/index.md") for uri in named(config.nav or [])}
    for file in files.documentation_pages():
        wanted |= links(file.src_uri, file.content_string)
    while wanted:
        path = wanted.pop()
        uri = in_site(path)
        if uri in files.src_uris or not (ROOT / path).exists():
            continue
        text = page_for(path)
        files.append(File.generated(config, uri, content=text, inclusion=InclusionLevel.NOT_IN_NAV))
        wanted |= links(uri, text)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites its links."""
    return replace_links(page.file.src_uri, markdown)


class _Loads(HTMLParser):
    """What a page loads from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        address = dict(attrs).get(LOADS.get(tag, "")) or ""
        if re.match(r"(https?:)?//", address) and dict(attrs).get("rel") != "canonical":
            self.found.append(address)


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Warns of pages that need a network."""
    parser = _Loads()
    parser.feed(output)
    for address in parser.found:
        log.warning("%s loads %s: pages are to do without a network", page.file.src_uri, address)
    return output
