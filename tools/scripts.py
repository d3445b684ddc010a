"""The scripts of a built site: one file, run after the page is there; mathematics last of all.

By default a page stops nine times while it is read, to fetch and run a script that it needs only once it
is there, and MathJax is compiled while the page is drawn. Here the reader's first key press on a slider
waits for neither.
"""

import re
from pathlib import Path

OWN = {"searchtools.js", "language_data.js"}  # of the search page alone
SCRIPT = re.compile(r'<script src="([^"]*?)_static/([^"?]+\.js)[^"]*"></script>\n?')
INDEX = '<script src="searchindex.js"'
MATHJAX = re.compile(r'<script defer="defer" src="([^"]*mathjax\.js)[^"]*"></script>')
# For a switch of versions, which this site has not.
PAGE_NAME = re.compile(r"<script>DOCUMENTATION_OPTIONS\.pagename[^<]*</script>\n?")

NEAR = 100_000  # characters of the page before its first slider; further down, the text is painted at once
EXPLORER = re.compile(r'<div class="de-explorer" id="([^"]*)"')
# Half-read pages are not painted, each time at the cost of a layout, if the whole is there soon.
PAINT_TOGETHER = """<link rel="expect" blocking="render" href="#{}">
    <script>setTimeout(() => document.querySelector("link[rel=expect]").remove(), 600);</script>
"""


def join_scripts(site: Path) -> None:
    """Write ``_static/site.js`` from the scripts of all pages and let each page run it when it is read."""
    order: dict[str, None] = {}
    for page in site.rglob("*.html"):
        page.write_text(with_one_script(page.read_text(), order))
    static = site / "_static"
    # A semicolon, because a file may end without one and the next begin with a bracket.
    (static / "site.js").write_text("\n;".join((static / name).read_text() for name in order))
    for name in order:
        (static / name).unlink()


def with_one_script(page: str, order: dict[str, None]) -> str:
    """The page with site.js instead of its scripts, whose names go into ``order``."""
    found = [match for match in SCRIPT.finditer(page) if match[2] not in OWN]
    if not found:
        return page
    order.update(dict.fromkeys(match[2] for match in found))
    first = found[0]

    def once(match: re.Match[str]) -> str:
        if match[2] in OWN:
            return match[0].replace("<script", "<script defer")
        is_first = match.start() == first.start()
        return f'<script defer src="{first[1]}_static/site.js"></script>\n' if is_first else ""

    page = SCRIPT.sub(once, page).replace(INDEX, INDEX.replace("<script", "<script defer"))
    # Fetched meanwhile, compiled when book.js asks for it.
    page = MATHJAX.sub(r'<link rel="preload" as="script" fetchpriority="low" href="\1">', page)
    return paint_together(PAGE_NAME.sub("", page))


def paint_together(page: str) -> str:
    """The page, first painted with a slider near its top, at work, but after 0.6 s at the latest."""
    explorer = EXPLORER.search(page, 0, NEAR)
    return page.replace("</head>", PAINT_TOGETHER.format(explorer[1]) + "</head>", 1) if explorer else page


def as_ascii(page: str) -> str:
    """The page in ASCII: a browser reads that several times faster, and a megabyte of frames with it."""
    parts = re.split(r"(<(?:script|style)\b.*?</(?:script|style)>)", page, flags=re.DOTALL)
    text = [part.encode("ascii", "xmlcharrefreplace").decode() for part in parts[::2]]
    parts[::2] = text  # no references within scripts and styles
    return "".join(parts)
