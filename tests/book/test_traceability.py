"""From the survey to the code and back: what equations.csv names is there, and nothing else claims a slug."""

import ast
import csv
import importlib
import importlib.util
import inspect
import pkgutil
import re
from functools import cache
from pathlib import Path

import nbformat
import pytest

import diffedu

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
with (BOOK / "equations.csv").open(newline="", encoding="utf-8") as table:
    ROWS = list(csv.DictReader(table))
SLUGS = [row["slug"] for row in ROWS]

# The audit's verdicts, in the survey's order. They change when the audit does, not when a page does.
VERDICTS = {
    "survey-title": "text",
    "survey-contents": "C",
    "eq-generative-model": "OK",
    "eq-three-phases": "OK*",
    "eq-forward-sde": "B C",
    "eq-linear-sde": "B",
    "eq-noising": "OK*",
    "eq-snr": "OK C",
    "eq-snr-monotone": "OK*",
    "eq-kernel": "OK* C",
    "eq-coefficients": "OK",
    "eq-integral-form": "OK",
    "eq-mean-integral": "C",
    "eq-ito-mean-zero": "B C",
    "eq-mean-ode": "C",
    "eq-variance-ode": "B",
    "eq-gaussianity": "B",
    "eq-ivp": "OK C",
    "eq-euler": "C",
    "eq-euler-maruyama": "OK C",
    "eq-markov-chain": "OK",
    "eq-vp-sde": "A",
    "eq-vp-coefficients": "A",
    "eq-variance-preserving": "OK* B",
    "eq-vp-prior": "B",
    "eq-ddpm-chain": "A B",
    "eq-ddpm-taylor": "A",
    "eq-ddpm-forward": "OK*",
    "eq-ve-sde": "OK B",
    "eq-ve-coefficients": "OK",
    "eq-ve-sigma": "OK* B",
    "eq-ve-euler-maruyama": "A B",
    "eq-ncsn-forward": "OK* B C",
    "eq-sampling-goal": "OK* C",
    "eq-forward-sde-again": "OK",
    "eq-reverse-sde": "OK* B",
    "eq-score": "OK",
    "eq-reverse-intuition": "B",
    "eq-unknown-score": "B C",
    "eq-fisher-divergence": "B",
    "eq-ism": "A",
    "eq-training-samples": "C",
    "eq-empirical-ism": "A C",
    "eq-law-of-large-numbers": "B",
    "eq-readings": "OK*",
    "eq-dsm": "OK B",
    "eq-gaussian-density": "A",
    "eq-conditional-score": "OK B",
    "eq-score-noise": "OK*",
    "eq-noise-loss": "A",
    "eq-eps-definition": "OK B",
    "eq-data-loss": "A",
    "eq-equivalence": "OK*",
    "eq-reverse-em": "OK* C",
    "eq-vp-reverse-sde": "A",
    "eq-vp-reverse-em": "A",
    "eq-ancestral": "B",
    "eq-ve-reverse-sde": "A",
    "eq-ve-reverse-em": "A",
    "eq-annealed-langevin": "A B",
    "eq-many-steps": "OK*",
    "eq-one-density": "B",
    "eq-sde-restated": "OK",
    "eq-fokker-planck": "OK",
    "eq-split-diffusion": "OK C",
    "eq-log-derivative": "OK",
    "eq-fokker-planck-family": "OK",
    "eq-family-sde": "OK*",
    "eq-same-marginals": "OK* B",
    "eq-probability-flow": "OK",
    "eq-invertible": "OK* B",
    "eq-continuous-flow": "OK C",
    "eq-one-ode": "OK C",
    "eq-score-to-noise": "A",
    "eq-noise-ode": "OK",
    "eq-semi-linear": "OK",
    "eq-variation-of-constants": "OK C",
    "eq-plain-integral": "OK",
    "eq-black-box": "OK C",
    "eq-linear-term": "B",
    "eq-exact-linear": "OK",
    "eq-half-log-snr": "OK*",
    "eq-g2-lambda": "OK",
    "eq-f-restated": "OK",
    "eq-lambda-integral": "OK",
    "eq-change-of-variable": "A C",
    "eq-exponential-integral": "OK C",
    "eq-time-grid": "B",
    "eq-exact-step": "OK C",
    "eq-lambda-derivatives": "OK",
    "eq-taylor": "OK* C",
    "eq-taylor-step": "OK",
    "eq-phi-recursion": "OK C",
    "eq-derivative-estimate": "B",
    "eq-least-error": "B",
    "eq-four-parts": "OK",
    "eq-first-order": "OK C",
    "eq-dpm-solver-1": "A",
    "eq-dpm-solver-23": "OK",
    "eq-ddim": "A C",
    "eq-deterministic-ddim": "OK*",
    "eq-sigma-alpha": "A",
    "eq-ddim-is-dpm-1": "OK B",
    "eq-recap": "B",
    "eq-consistency-idea": "OK* C",
    "eq-consistency-function": "B C",
    "eq-boundary-condition": "OK*",
    "eq-training-pair": "A",
    "eq-consistency-loss": "A B",
    "eq-one-step": "A",
    "eq-consistency-algorithms": "text",
    "eq-step-halving": "OK",
    "eq-clean-and-noisy": "OK",
    "eq-distillation-target": "B",
    "eq-half-steps": "OK",
    "eq-first-teacher-step": "OK C",
    "eq-second-teacher-step": "A",
    "eq-student-step": "OK B",
    "eq-target-solved": "OK",
    "eq-distillation-loss": "A B C",
    "eq-algorithm-1": "OK",
    "eq-algorithm-2": "OK",
    "eq-two-lambdas": "C",
    "survey-bibliography": "C",
}


def wrong(row):
    return bool({"A", "B"} & set(row["verdict"].split()))


def names(row, column):
    return [] if row[column].startswith("none: ") else row[column].split()


each_row = pytest.mark.parametrize("row", ROWS, ids=[row["id"] for row in ROWS])


@cache
def markdown(page):
    """The text of a page of the book, without its code."""
    source = next((p for p in (BOOK / f"{page}.ipynb", BOOK / f"{page}.md") if p.exists()), None)
    assert source is not None, f"the book has no page {page}"
    if source.suffix == ".md":
        return source.read_text(encoding="utf-8")
    cells = nbformat.read(source, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def pages():
    return sorted(
        p.stem for kind in ("ipynb", "md") for p in BOOK.glob(f"*.{kind}") if p.stem != "equation-map"
    )


def targets(page):
    return re.findall(r"^\(([\w-]+)\)=\s*$", markdown(page), re.MULTILINE)


@cache
def marked_tests():
    """{path::function: its node, and the slugs of its marks} for every test."""
    found = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            marks = [d for d in node.decorator_list if isinstance(d, ast.Call)]
            slugs = [d.args[0].value for d in marks if ast.unparse(d.func) == "pytest.mark.equation"]
            found[f"{path.relative_to(ROOT).as_posix()}::{node.name}"] = (node, slugs)
    return found


def slugs_of(docstring):
    """The slugs after `Equations:`, to the end of the sentence or list."""
    found = re.findall(r"Equations:((?:\s*,?\s*[a-z][\w-]*-[\w-]+)+)", docstring or "")
    return {slug for run in found for slug in re.findall(r"[\w-]+", run)}


@cache
def docstrings():
    """{name: docstring} of every module, class, function and method that diffedu defines."""
    found = {}
    for info in pkgutil.walk_packages(diffedu.__path__, "diffedu."):
        if info.name.endswith("__main__"):
            continue
        module = importlib.import_module(info.name)
        found[info.name] = module.__doc__
        for name, thing in vars(module).items():
            if getattr(thing, "__module__", "") != info.name or not callable(thing):
                continue
            found[f"{info.name}.{name}"] = thing.__doc__
            if inspect.isclass(thing):
                for part, method in vars(thing).items():
                    found[f"{info.name}.{name}.{part}"] = getattr(method, "__doc__", None)
    return found


def resolve(path):
    """The object of a dotted path: a module, and attributes from there."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            thing = getattr(thing, name)
        return thing
    raise ModuleNotFoundError(path)


def test_rows_are_the_audits():
    assert [row["id"] for row in ROWS] == [f"S{k:02d}" for k in range(1, 125)]
    assert list(ROWS[0]) == ["id", "slug", "title", "survey_number", "verdict", "anchor", "object", "test"]
    assert len(set(SLUGS)) == len(SLUGS)
    assert {row["slug"]: row["verdict"] for row in ROWS} == VERDICTS
    assert list(VERDICTS) == SLUGS
    numbers = [row["survey_number"] for row in ROWS if row["survey_number"]]
    assert numbers == [f"({k})" for k in range(1, len(numbers) + 1)]
    for row in ROWS:
        for column in ("anchor", "object", "test"):
            assert re.fullmatch(r"none: \S.*|(?!none)\S+( \S+)*", row[column]), (row["id"], column)


@each_row
def test_anchor_is_there(row):
    for anchor in names(row, "anchor"):
        page, _, target = anchor.partition("#")
        assert target == row["slug"]
        assert targets(page).count(target) == 1, f"{page} must have the target ({target})= once"
        if row["survey_number"]:
            number = re.escape(row["survey_number"][1:-1])
            after = markdown(page).split(f"({target})=", 1)[1][:1200]
            assert re.search(rf"\\tag\{{{number}\}}|\({number}\)", after), (
                f"{page} must show the survey's number {row['survey_number']} at {target}"
            )


@each_row
def test_object_is_there_and_says_so(row):
    for name in names(row, "object"):
        assert row["slug"] in slugs_of(resolve(name).__doc__), (
            f"{name}: 'Equations: {row['slug']}' is missing"
        )


@each_row
def test_test_is_there_and_says_so(row):
    for name in names(row, "test"):
        assert name in marked_tests(), f"there is no test {name}"
        node, slugs = marked_tests()[name]
        assert row["slug"] in slugs, f"{name} needs @pytest.mark.equation({row['slug']!r})"
        if wrong(row):
            code = ast.unparse(node)
            assert "pytest.raises(AssertionError, match=" in code, (
                f"{name} must run the printed form and say why it fails"
            )


@pytest.mark.parametrize("row", [row for row in ROWS if wrong(row)], ids=lambda row: row["id"])
def test_what_is_wrong_is_read_critically(row):
    page = "reading-critically" if int(row["id"][1:]) <= 60 else "reading-critically-2"
    assert targets(page).count(row["id"].lower()) == 1
    assert f"](#{row['slug']})" in markdown(page), f"{page} must link to the right form, #{row['slug']}"


def test_nothing_else_claims_a_slug():
    in_pages = {t: page for page in pages() for t in targets(page) if t.startswith("eq-")}
    assert set(in_pages) <= set(SLUGS), "targets in the pages that equations.csv does not have"
    for row in ROWS:
        homes = [page for page in pages() if row["slug"] in targets(page)]
        assert homes == [anchor.partition("#")[0] for anchor in names(row, "anchor")]
    for page in pages():
        referred = set(
            re.findall(r"\]\(#?(eq-[\w-]+)\)|\{(?:ref|eq)\}`(?:[^`<]*<)?(eq-[\w-]+)", markdown(page))
        )
        assert {slug for pair in referred for slug in pair if slug} <= set(SLUGS), page
    claimed = {slug: name for name, text in docstrings().items() for slug in slugs_of(text)}
    assert claimed, "no docstring of diffedu names an equation"
    assert set(claimed) <= set(SLUGS), "docstrings that name an unknown slug"
    for name, (_, slugs) in marked_tests().items():
        assert set(slugs) <= set(SLUGS), f"{name} names an unknown slug"


def test_docstring_slugs_are_seen():
    assert slugs_of("x. Equations: eq-a, eq-b\n\n more eq-c") == {"eq-a", "eq-b"}
    assert slugs_of("Equations: eq-a,\n    eq-b.") == {"eq-a", "eq-b"}


def test_map_shows_every_row():
    spec = importlib.util.spec_from_file_location("equation_map", ROOT / "tools" / "equation_map.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = tool.render(tool.read())
    for row in ROWS:
        assert text.count(f"**{row['id']}**") == 1
        for anchor in names(row, "anchor"):
            assert f"](#{anchor.partition('#')[2]})" in text
        for name in names(row, "object"):
            assert f"<{name}>`" in text
        for name in names(row, "test"):
            assert re.search(rf"/blob/main/{re.escape(name.split('::')[0])}#L\d+\)", text)
    assert len(re.findall(r"^\* - \*\*S\d", text, re.MULTILINE)) == len(ROWS)
