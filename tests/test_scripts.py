"""What the built pages do with their scripts: one file, run once the page is read; letters in ASCII."""

import html
from html.parser import HTMLParser

import pytest

import scripts

PAGE = """<html><head>
<script src="{up}_static/first.js?v=1"></script>
<script src="{up}_static/second.js"></script>
<script src="{up}_static/searchtools.js"></script>
<script defer="defer" src="{up}_static/mathjax.js?v=2"></script>
</head><body>{body}</body></html>
"""
SLIDER = '<div class="de-explorer" id="de-7"></div>'


class Tags(HTMLParser):
    """The attributes of a page's script and link elements, in their order."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "link"):
            self.found.append((tag, dict(attrs)))


@pytest.fixture
def site(tmp_path):
    static = tmp_path / "_static"
    static.mkdir()
    for name, text in {"first": "a = 1", "second": "(b)()", "searchtools": "s()", "mathjax": "m()"}.items():
        (static / f"{name}.js").write_text(text)
    (tmp_path / "book").mkdir()
    (tmp_path / "search.html").write_text(PAGE.format(up="", body=""))
    (tmp_path / "book" / "tour.html").write_text(PAGE.format(up="../", body=SLIDER))
    scripts.join_scripts(tmp_path)
    return tmp_path


def test_all_pages_run_one_file_when_they_are_read(site):
    for page, up in (("search.html", ""), ("book/tour.html", "../")):
        tags = [attrs for tag, attrs in Tags((site / page).read_text()).found if tag == "script"]
        run = [attrs for attrs in tags if "src" in attrs]
        assert [attrs["src"] for attrs in run] == [f"{up}_static/site.js", f"{up}_static/searchtools.js"]
        assert all("defer" in attrs for attrs in run)


def test_the_file_holds_each_script_once_and_a_missing_semicolon_joins_none(site):
    joined = (site / "_static" / "site.js").read_text()
    assert [line.strip(";") for line in joined.splitlines()] == ["a = 1", "(b)()"]
    assert ";(b)()" in joined
    assert {file.name for file in (site / "_static").iterdir()} == {"site.js", "searchtools.js", "mathjax.js"}


def test_only_a_page_with_a_slider_near_its_top_waits_with_its_first_paint(site):
    def waits(page):
        return [attrs["href"] for _, attrs in Tags(page).found if attrs.get("rel") == "expect"]

    assert waits((site / "book" / "tour.html").read_text()) == ["#de-7"]
    assert waits((site / "search.html").read_text()) == []
    far = PAGE.format(up="", body="x" * scripts.NEAR + SLIDER)
    assert waits(scripts.paint_together(far)) == []


def test_a_page_in_ascii_reads_the_same_and_its_scripts_are_left_alone():
    page = "<p>Fokker–Planck, σ²</p><script>let a = 'σ';</script><style>q { content: '–' }</style><p>é</p>"
    found = scripts.as_ascii(page)
    assert html.unescape(found) == page
    assert found.startswith("<p>Fokker&#8211;Planck, &#963;&#178;</p><script>let a = 'σ';</script>")
    assert found.endswith("<style>q { content: '–' }</style><p>&#233;</p>")
