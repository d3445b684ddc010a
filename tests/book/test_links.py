"""The built site's links lead somewhere, and no page asks another host for anything.

`make book` first; DIFFEDU_SITE names another place to look.
"""

import os
import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(os.environ.get("DIFFEDU_SITE", Path(__file__).parents[2] / "_build" / "html")).resolve()
RESOURCES = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "img": "src",
    "input": "src",
    "object": "data",
    "script": "src",
    "source": "src",
    "video": "src",
}
RESOURCE_LINKS = {"icon", "modulepreload", "preload", "prefetch", "stylesheet"}


class Links(HTMLParser):
    """The ids of a page, where its anchors lead, what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.anchors: list[str] = []
        self.resources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found[name] for name in ("id", "name") if found.get(name)}
        if tag == "a" and found.get("href"):
            self.anchors.append(found["href"])
        if tag == "link" and RESOURCE_LINKS & set(found.get("rel", "").split()):
            self.resources.append(found.get("href", ""))
        if found.get(RESOURCES.get(tag, "")):
            self.resources.append(found[RESOURCES[tag]])
        self.resources += [s.split()[0] for s in found.get("srcset", "").split(", ") if s.split()]


def without_data(text: str) -> str:
    """The page without its embedded pictures, which are most of its bytes and hold no link."""
    return re.sub(r"data:[\w/+.-]+;base64,[A-Za-z0-9+/=]+", "data:,", text)


@pytest.fixture(scope="module")
def pages() -> dict[Path, Links]:
    if not (SITE / "index.html").exists():
        pytest.fail(f"The site is not built: there is no {SITE / 'index.html'}. Run `make book` first.")
    return {page: Links(without_data(page.read_text())) for page in SITE.rglob("*.html")}


def is_foreign(url: str) -> bool:
    parts = urlsplit(url)
    return bool(parts.netloc) or parts.scheme not in ("", "data")


def test_every_internal_link_leads_somewhere(pages: dict[Path, Links]) -> None:
    broken = []
    for page, links in pages.items():
        for url in [*links.anchors, *links.resources]:
            parts = urlsplit(url)
            if is_foreign(url) or parts.scheme == "data":
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            fragment = unquote(parts.fragment)
            if not target.is_file():
                broken.append(f"{page.relative_to(SITE)}: no file for {url}")
            elif fragment and target in pages and fragment not in pages[target].ids:
                broken.append(f"{page.relative_to(SITE)}: no anchor for {url}")
    assert pages
    assert not broken, "\n".join(broken)


def test_no_page_loads_anything_from_another_host(pages: dict[Path, Links]) -> None:
    asked = [(page.name, url) for page, links in pages.items() for url in links.resources]
    for sheet in SITE.rglob("*.css"):
        urls = re.findall(r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)", sheet.read_text())
        asked += [(sheet.name, url) for pair in urls for url in pair if url]
    foreign = [f"{name}: {url}" for name, url in asked if is_foreign(url)]
    assert not foreign, "\n".join(foreign)
