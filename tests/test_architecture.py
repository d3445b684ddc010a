"""The map of the house holds: who imports whom, how long a module is, what has a docstring."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "diffedu"
MODULES = sorted(path for path in PACKAGE.glob("*.py") if path.stem != "__init__")
MAX_LINES = 250
# A module imports only from those before it.
ORDER = [
    "checks",
    "schedule",
    "schedules",
    "denoiser",
    "mixtures",
    "idx",
    "mirrors",
    "mnist_files",
    "data",
    "metrics",
    "sde",
    "networks",
    "objectives",
    "weights",
    "recipes",
    "training",
    "teachers",
    "sampling",
    "affine",
    "runge_kutta",
    "solvers",
    "phi",
    "multistep",
    "exponential",
    "likelihood",
    "fokker_planck",
    "tableau",
    "consistency",
    "distillation",
    "students",
    "refinement",
    "consistency_students",
    "runlog",
    "digit_training",
    "digits",
    "digit_students",
    "classifier",
    "digit_metrics",
    "train",
]
# These take arrays and know nothing of diffusion.
APART = ("plotting", "widgets")


def imports(tree: ast.AST) -> set[str]:
    """The modules of diffedu that are imported anywhere in it, by whatever form."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["diffedu" if node.level else "", node.module or ""]))
            names += [module] if module != "diffedu" else [f"diffedu.{alias.name}" for alias in node.names]
    return {name.split(".")[1] for name in names if name.startswith("diffedu.")}


def undocumented(tree: ast.Module, name: str) -> list[str]:
    """The public things in a module that have no docstring."""
    missing = [] if ast.get_docstring(tree) else [name]

    def visit(node: ast.AST, path: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and not child.name.startswith("_"):
                if not ast.get_docstring(child):
                    missing.append(f"{path}.{child.name}")
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{path}.{child.name}")

    visit(tree, name)
    return missing


def test_the_order_names_every_module() -> None:
    assert {path.stem for path in MODULES} <= {*ORDER, *APART}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_module_imports_only_from_those_before_it(path: Path) -> None:
    allowed = set(APART) if path.stem in APART else set(ORDER[: ORDER.index(path.stem)])
    assert imports(ast.parse(path.read_text())) <= allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_a_module_does_one_job_in_bearable_length(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_everything_public_has_a_docstring(path: Path) -> None:
    assert not undocumented(ast.parse(path.read_text()), path.stem)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_nothing_is_pickled(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert not imported & {"pickle", "joblib", "shelve", "dill"}
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not called & {"torch.load", "torch.save", "np.load", "np.save"}


def test_an_import_is_seen_in_each_of_its_forms() -> None:
    text = (
        "import diffedu.a\nfrom diffedu import b\nfrom diffedu.c import x\nfrom . import d\nfrom .e import y"
    )
    assert imports(ast.parse(text)) == set("abcde")


def test_the_book_documents_every_module() -> None:
    page = (PACKAGE.parent / "book" / "api.md").read_text()
    documented = {path.stem for path in MODULES if f"automodule:: diffedu.{path.stem}\n" in page}
    assert documented == {path.stem for path in MODULES} - {"checks"}
