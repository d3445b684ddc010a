"""What this site needs from Sphinx besides Jupyter Book.

- each executed page says how long it ran, and on what;
- MathJax comes from the installed package, only the parts that are used;
- no script that a page does not need, one stylesheet, one script run last (`slim`, `scripts`);
- solutions are native ``<details>``, `align*` reaches MathJax untouched;
- docstrings are plain text, in which `Equations: eq-slug` links to the equation.
"""

import csv
import importlib.metadata
import importlib.util
import platform
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from pygments.formatters import HtmlFormatter
from pygments.token import Token
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.highlighting import PygmentsBridge

from mathjax import install
from slim import slim

PLAIN = {Token.Name, Token.Operator, Token.Punctuation, Token.Text.Whitespace}
ROOT = Path(__file__).resolve().parent.parent
UNUSED = re.compile(r"thebe|togglebutton|design-tabs|let toggle", re.IGNORECASE)


def use_local_mathjax(app: Sphinx, config: Config) -> None:
    """Let the pages load the file that `copy_mathjax` writes."""
    config.mathjax_path = "mathjax/mathjax.js"


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Put MathJax into the site, from the installed package."""
    spec = importlib.util.find_spec("sphinx-mathjax-offline")
    if not error and app.builder.format == "html" and spec and spec.origin:
        install(Path(spec.origin).parent / "static" / "mathjax", Path(app.outdir) / "_static" / "mathjax")


def leave_align_alone(app: Sphinx, doctree: nodes.document) -> None:
    """An align environment is display mathematics by itself; Sphinx would wrap it in a split."""
    for block in doctree.findall(nodes.math_block):
        if block.astext().lstrip().startswith(r"\begin{align"):
            block["nowrap"] = True


def say_run_time(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put the measured run time of an executed page under its title."""
    executed = getattr(app.env, "nb_metadata", {}).get(docname, {}).get("exec_data")
    title = next(doctree.findall(nodes.title), None)
    if not executed or not executed.get("runtime") or title is None:
        return
    torch = importlib.metadata.version("torch").split("+")[0]
    line = (
        f"This page ran in {executed['runtime']:.0f} s on one core "
        f"with torch {torch} (Python {platform.python_version()})."
    )
    place = title.parent
    place.insert(place.index(title) + 1, nodes.paragraph("", line, classes=["run-time"]))


def visit_solution(self: Any, node: nodes.Element) -> None:
    """Open a solution: closed until the reader asks for it, without any script."""
    node["classes"] = [c for c in node["classes"] if c != "dropdown"]
    self.body.append(self.starttag(node, "details", CLASS="admonition"))
    title = node.pop(0)
    self.body.append(f'<summary class="admonition-title">{title.astext()}</summary>\n')


def depart_solution(self: Any, node: nodes.Element) -> None:
    """Close a solution."""
    self.body.append("</details>\n")


def collect_assets(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: Any
) -> None:
    """Take the stylesheets off the page (they go into site.css) and the scripts that it can do without."""
    sheets: dict[str, None] = app.env.__dict__.setdefault("diffedu_sheets", {})
    for sheet in context.get("css_files", []):
        name = str(getattr(sheet, "filename", sheet)).split("?")[0]
        if not UNUSED.search(name):
            sheets[name.removeprefix("_static/")] = None
    context["css_files"] = []

    def needed(script: Any) -> bool:
        attributes = getattr(script, "attributes", {})
        text = f"{getattr(script, 'filename', script)} {attributes.get('body', '')}"
        return not UNUSED.search(text)

    context["script_files"] = [s for s in context.get("script_files", []) if needed(s)]


def slim_site(app: Sphinx, error: Exception | None) -> None:
    """Run `slim` over the finished pages."""
    if not error and app.builder.format == "html":
        slim(Path(app.outdir), list(app.env.__dict__.get("diffedu_sheets", {})))


class LeanFormatter(HtmlFormatter):  # type: ignore[misc]  # untyped in some versions
    """Leave names, operators and punctuation unmarked: most of the markup, and no colour of its own."""

    def _get_css_classes(self, ttype: Any) -> str:
        return "" if ttype in PLAIN else str(super()._get_css_classes(ttype))


def known_slugs() -> set[str]:
    """The slugs in equations.csv: the targets that exist in the book."""
    table = ROOT / "book" / "equations.csv"
    if not table.exists():
        return set()
    with table.open(newline="") as rows:
        return {row["slug"] for row in csv.DictReader(rows)}


def plain_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Turn a plain docstring into reStructuredText: escaped, indented parts kept as they stand."""
    slugs = known_slugs()

    def text(line: str) -> str:
        parts = re.split(r"(``?[^`]+``?)", line)
        parts = [p if p.startswith("`") else re.sub(r"([\\*_|])", r"\\\1", p) for p in parts]
        parts = [f"``{p.strip('`')}``" if p.startswith("`") else p for p in parts]
        return re.sub(
            r"\beq-[\w-]+",
            lambda m: f":ref:`{m[0]} <{m[0]}>`" if m[0] in slugs else m[0],
            "".join(parts),
        )

    out: list[str] = []
    for line in lines:
        indented = line.startswith(" ")
        if indented and (not out or not out[-1].startswith(" ")):
            out += ["", "::", ""]
        elif line and out and out[-1].startswith(" "):
            out.append("")
        out.append(f"    {line}" if indented else text(line))
    lines[:] = [*out, ""]


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect the above."""
    from sphinx_exercise.nodes import solution_node

    PygmentsBridge.html_formatter = LeanFormatter
    app.setup_extension("sphinx_exercise")
    app.add_node(solution_node, override=True, html=(visit_solution, depart_solution))
    app.connect("config-inited", use_local_mathjax)
    app.connect("doctree-read", leave_align_alone)
    app.connect("doctree-resolved", say_run_time)
    app.connect("html-page-context", collect_assets, priority=900)
    app.connect("autodoc-process-docstring", plain_docstring)
    app.connect("build-finished", copy_mathjax)
    app.connect("build-finished", slim_site, priority=900)
    return {"parallel_read_safe": False, "parallel_write_safe": True}
