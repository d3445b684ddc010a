"""What a reader sees of the sources: computed numbers only, code of a bearable length, no stored output."""

import json
import re
from pathlib import Path

import pytest

BOOK = Path(__file__).resolve().parents[2] / "book"
NOTEBOOKS = sorted(BOOK.glob("*.ipynb"))
PAGES = sorted(path for path in BOOK.glob("*.md") if path.stem != "equation-map")
HIDDEN = {"hide-cell", "hide-input", "remove-cell", "remove-input"}
MAX_VISIBLE_LINES = 130

NOT_PROSE = [
    r"(?s)\\begin\{(\w+\*?)\}.*?\\end\{\1\}",
    r"(?s)\$\$.*?\$\$",
    r"(?s)(?<!\\)\$.*?(?<!\\)\$",
    r"(?s)(`+)(?!`).*?(?<!`)\1(?!`)",  # code spans, and with them the roles: citations, glued values
    r"<!--(?s:.*?)-->",
    r"\]\([^)]*\)",
    r"https?://\S+",
]
FENCE = re.compile(r" *(`{3,}|~{3,}|:{3,})(?:\{([\w:-]+)\})?(.*)")
HOLDS_NO_PROSE = {"", "bibliography", "code", "code-block", "eval-rst", "literalinclude", "math", "raw"}


def without_fenced_code(markdown: str) -> str:
    """Without the lines of fenced code and mathematics; what other directives hold is prose and stays."""
    kept: list[str] = []
    closing = ""
    for line in markdown.splitlines():
        fence = FENCE.fullmatch(line)
        if closing:
            closing = "" if line.strip() == closing else closing
        elif fence and fence[3].strip("`~: ") == "" and not fence[2] and fence[1] in open_fences(kept):
            kept.append(line)
        elif fence and (fence[2] or "") in HOLDS_NO_PROSE:
            closing = fence[1]
        else:
            kept.append(line)
    return "\n".join(FENCE.sub(lambda m: m[3], line) for line in kept)


def open_fences(lines: list[str]) -> list[str]:
    """The fences of directives that these lines open and do not close."""
    stack: list[str] = []
    for fence in filter(None, map(FENCE.fullmatch, lines)):
        if fence[2]:
            stack.append(fence[1])
        elif fence[1] in stack:
            del stack[stack.index(fence[1]) :]
    return stack


def prose(markdown: str) -> str:
    """The words that the reader reads."""
    markdown = without_fenced_code(markdown)
    for pattern in NOT_PROSE:
        markdown = re.sub(pattern, " ", markdown)
    return markdown


def cells(notebook: Path, kind: str) -> list[dict]:
    content = json.loads(notebook.read_text())
    return [
        {"source": "".join(cell["source"]), "tags": set(cell["metadata"].get("tags", [])), "cell": cell}
        for cell in content["cells"]
        if cell["cell_type"] == kind
    ]


def markdown_of(page: Path) -> list[str]:
    return [c["source"] for c in cells(page, "markdown")] if page.suffix == ".ipynb" else [page.read_text()]


def visible_lines(notebook: Path) -> int:
    """Lines of code that the page shows before the reader opens anything."""
    total, in_solution = 0, False
    for cell in json.loads(notebook.read_text())["cells"]:
        source, tags = "".join(cell["source"]), cell["metadata"].get("tags", [])
        if cell["cell_type"] == "markdown":
            for directive in re.findall(r"\{solution-(start|end)\}", source):
                in_solution = directive == "start"
        elif cell["cell_type"] == "code" and not in_solution and not HIDDEN & set(tags):
            total += sum(bool(line.strip()) for line in source.splitlines())
    return total


@pytest.mark.parametrize(
    ("markdown", "found"),
    [
        ("It takes 0.5 s.", True),
        ("```{note}\nIt takes 0.5 s.\n```", True),
        ("The value $0.5$, `0.5`, {glue:text}`x-0.5`, {cite}`a2.5`, [x](a-0.5.html).", False),
        ("```{math}\n0.5\n```\n$$\n0.5\n$$\n\\begin{align*}\n0.5\n\\end{align*}", False),
        ("```python\nx = 0.5\n```", False),
        ("````{dropdown} Proof\nIt is\n```{math}\n0.5\n```\nthat is\n````\nand so 0.5", True),
        ("````{dropdown} Proof\nIt is\n```{math}\n0.5\n```\nthat is\n````\nand so", False),
        ("```{solution-start} ex\n```\nwhich is 0.5\n```{solution-end}\n```", True),
        ("Costs \\$2 and 0.5 more \\$.", True),
    ],
)
def test_the_search_for_decimal_numbers_finds_them(markdown: str, found: bool) -> None:
    assert bool(re.search(r"\d\.\d", prose(markdown))) is found


@pytest.mark.parametrize("page", [*NOTEBOOKS, *PAGES], ids=lambda p: p.name)
def test_no_decimal_number_is_typed_into_prose(page: Path) -> None:
    typed = [
        f"...{text[max(0, m.start() - 30) : m.end() + 10]!r}..."
        for text in map(prose, markdown_of(page))
        for m in re.finditer(r"\d\.\d", text)
    ]
    assert not typed, f"compute these in a cell and glue them: {typed}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_hold_no_output(notebook: Path) -> None:
    for code in cells(notebook, "code"):
        assert not code["cell"]["outputs"]
        assert code["cell"]["execution_count"] is None


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_the_first_cell_installs_the_package_where_it_is_missing(notebook: Path) -> None:
    first = cells(notebook, "code")[0]
    assert "remove-cell" in first["tags"]
    assert re.search(
        r"try:\n +import diffedu.*\nexcept ModuleNotFoundError:\n +%pip install .*diffedu", first["source"]
    )


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_a_page_shows_a_bearable_amount_of_code(notebook: Path) -> None:
    assert visible_lines(notebook) <= MAX_VISIBLE_LINES
