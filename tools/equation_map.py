"""Write book/equation-map.md from book/equations.csv: every item of the survey, and where it is in this book.

    python tools/equation_map.py

A row names the item's verdict, the page and target that treat it, the objects of diffedu that implement
it and the test that checks it; a cell that begins with `none:` says why there is nothing to name.
"""

import ast
import csv
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE, PAGE = ROOT / "book" / "equations.csv", ROOT / "book" / "equation-map.md"
VERDICTS = {  # code: (in the table, in the legend)
    "OK": ("right", "right as printed."),
    "OK*": (
        "right, with conditions",
        "right under conditions that the slide does not state; the chapter states them.",
    ),
    "A": ("wrong", "mathematically wrong; code written from the printed formula fails, and a test shows it."),
    "B": ("unsound", "a step of the argument is missing, or a claim in the text does not hold."),
    "C": ("slip", "a slip of index, name or citation; the intention is clear."),
    "text": ("text", "a title, or something that the slides leave out: nothing to judge."),
}
STYLE = """<style>
.equation-map tr { background: none !important; }
.equation-map td { vertical-align: top; overflow-wrap: anywhere; }
.equation-map td p { margin: 0; }
@media (max-width: 800px) {
  .equation-map thead { position: absolute; clip-path: inset(50%); }
  .equation-map tr { display: block; padding: 0.6rem 0; border-top: 1px solid currentColor; }
  .equation-map td { display: block; border: 0; padding: 0.1rem 0; }
  .equation-map colgroup { display: none; }
}
</style>"""


@dataclass(frozen=True)
class Row:
    """One item of the survey; the fields are the columns of equations.csv."""

    id: str
    slug: str
    title: str
    survey_number: str
    verdict: str
    anchor: str
    object: str
    test: str

    def names(self, column: str) -> list[str]:
        """What a cell names, or nothing where it says `none: reason`."""
        cell: str = getattr(self, column)
        return [] if cell.startswith("none: ") else cell.split()


def read(table: Path = TABLE) -> list[Row]:
    """The rows; ValueError for an unknown verdict or a cell that names nothing and gives no reason."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = [Row(**row) for row in csv.DictReader(file)]
    for row in rows:
        unknown = set(row.verdict.split()) - set(VERDICTS)
        if unknown or not row.verdict:
            raise ValueError(f"{row.id}: verdicts are {list(VERDICTS)}; got {row.verdict!r}")
        for column in ("anchor", "object", "test"):
            if not re.fullmatch(r"none: \S.*|(?!none)\S+( \S+)*", getattr(row, column)):
                came = getattr(row, column)
                raise ValueError(f"{row.id}: {column} must name something or say 'none: why'; got {came!r}")
    return rows


def line_of(test: str) -> int:
    """The line of a test named path::function; ValueError if there is none."""
    path, _, name = test.partition("::")
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node.lineno
    raise ValueError(f"{path} has no test {name}")


def render(rows: list[Row]) -> str:
    """The page, in MyST Markdown."""
    source = re.search(r"^\s+url: (\S+)", (ROOT / "_config.yml").read_text(encoding="utf-8"), re.MULTILINE)
    if source is None:
        raise ValueError("_config.yml names no repository url")
    counts = Counter(code for row in rows for code in row.verdict.split())
    legend = "\n".join(
        f"`{code}`\n: {counts[code]} {'item' if counts[code] == 1 else 'items'}: {meaning}\n"
        for code, (_, meaning) in VERDICTS.items()
        if counts[code]
    )
    placed, coded, tested = (
        sum(bool(r.names(column)) for r in rows) for column in ("anchor", "object", "test")
    )
    lines = [
        "# Equation map",
        "",
        "Every formula and every claim of the survey {cite}`zhousurvey` that carries weight has a number, "
        f"from {rows[0].id} to {rows[-1].id}, in the order of the slides. "
        f"Of these {len(rows)} items, {placed} are treated at a marked place in a chapter, {coded} have an "
        f"object of [diffedu](api.md) that implements them, and {tested} have a test that runs them. "
        "The build writes this page from one table; tests check that each place, object and test is there.",
        "",
        "What the verdicts mean; an item can have several:",
        "",
        legend,
        "For each item with an A or a B, [Reading the survey critically](reading-critically.ipynb) or its "
        "[second part](reading-critically-2.ipynb) runs the printed form; its verdict links there.",
        "",
        STYLE,
        "",
        "```{list-table}",
        ":header-rows: 1",
        ":class: equation-map",
        ":widths: 34 20 18 28",
        "",
        "* - Item",
        "  - Verdict",
        "  - Treated in",
        "  - Code and test",
    ]
    for row in rows:
        lines += cells(row, source[1])
    return "\n".join([*lines, "```", ""])


def cells(row: Row, repository: str) -> list[str]:
    """One row of the table: item, verdict, place, code and test."""
    number = f" · the survey's {row.survey_number}" if row.survey_number else ""
    codes = row.verdict.split()
    verdict = "; ".join(f"`{code}` {VERDICTS[code][0]}" for code in codes if code != "text") or "text"
    if {"A", "B"} & set(codes):
        verdict = f"[{verdict}](#{row.id.lower()})"
    anchors = (anchor.partition("#") for anchor in row.names("anchor"))
    places = [f"[chapter {int(page.split('-')[0])}](#{target})" for page, _, target in anchors]
    place = "; ".join(places) or reason(row.anchor)
    objects = [f"{{py:obj}}`{short(name)} <{name}>`" for name in row.names("object")]
    tests = [
        f"[{name.split('::')[1]}]({repository}/blob/main/{name.split('::')[0]}#L{line_of(name)})"
        for name in row.names("test")
    ]
    code = "; ".join([*objects, *tests]) or reason(row.object)
    return [f"* - **{row.id}** {row.title}{number}", f"  - {verdict}", f"  - {place}", f"  - {code}"]


def short(name: str) -> str:
    """The last parts of a dotted name: a class, a function, or a method with its class."""
    return ".".join(part for part in name.split(".")[1:] if not part.islower() or part == name.split(".")[-1])


def reason(cell: str) -> str:
    """The reason in `none: reason`."""
    return cell.removeprefix("none: ")


def main() -> None:
    """Write the page in one move."""
    new = PAGE.with_suffix(".md.new")
    new.write_text(render(read()), encoding="utf-8")
    os.replace(new, PAGE)


if __name__ == "__main__":
    main()
