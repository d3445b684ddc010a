"""Build the book, or one page of it: execute the notebooks that changed, then run Sphinx.

    python tools/build.py book                  the site, in _build/html
    python tools/build.py page 02-coefficients  one page, in _build/page/02-coefficients/html

Executed notebooks are kept in a jupyter-cache whose folder is named by a digest of everything
besides the cells that their outputs depend on, so no stale output survives a change in diffedu or
in the pins. Sphinx always starts afresh (an incremental build hides warnings) and in a folder of
its own; the finished site takes the old one's place in one move, so an interrupted build leaves
the last good site.
"""

import argparse
import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from steps import step

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "_build"
REDIRECT = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Diffusion Models through SDEs</title>
<meta http-equiv="refresh" content="0; url=book/index.html"></head>
<body><a href="book/index.html">Diffusion Models through SDEs</a></body></html>
"""


def digest(files: Iterable[Path]) -> str:
    """A name for the content of these files under this interpreter."""
    total = hashlib.sha256(platform.python_version().encode())
    for file in sorted(set(files)):
        total.update(f"\0{file.relative_to(ROOT)}\0".encode())
        total.update(file.read_bytes())
    return total.hexdigest()[:16]


def outside_the_cells() -> list[Path]:
    """What a notebook's outputs depend on besides its own cells."""
    data = (f for kind in ("csv", "json", "npz") for f in (ROOT / "book").glob(f"*.{kind}"))
    kinds = ("py", "js", "css", "safetensors", "xz")
    package = (f for kind in kinds for f in (ROOT / "diffedu").rglob(f"*.{kind}"))
    measured = (ROOT / "benchmarks" / "results").glob("*.json")
    return [*package, *measured, ROOT / "requirements.txt", *data]


def everything() -> list[Path]:
    """What the site depends on."""
    folders = [p for name in ("book", "tools", "_static", "_templates") for p in (ROOT / name).rglob("*")]
    kept = [p for p in folders if p.is_file() and not {"__pycache__", ".ipynb_checkpoints"} & {*p.parts}]
    return [*kept, *outside_the_cells(), ROOT / "_config.yml", ROOT / "_toc.yml"]


def notebooks_of(toc: Path) -> list[Path]:
    """The notebooks that a table of contents names, in its order."""
    names = re.findall(r"(?:root|file):\s*(\S+)", toc.read_text())
    return [file for name in names if (file := ROOT / f"{name}.ipynb").exists()]


def execute(notebook: Path, cache: Any) -> str:
    """Execute one notebook into the cache unless it is there; return its error, or nothing."""
    import nbformat
    from jupyter_cache.base import CacheBundleIn
    from jupyter_cache.executors.utils import single_nb_execution
    from traitlets.config import Config

    content = nbformat.read(notebook, as_version=4)
    try:
        cache.match_cache_notebook(content)
        return ""
    except KeyError:
        pass
    config = Config({"KernelManager": {"transport_encryption": "auto"}})  # else each kernel warns
    result = single_nb_execution(
        content, str(notebook.parent), timeout=300, allow_errors=False, config=config
    )
    if result.err is not None:
        print(f"   {notebook.name} failed after {result.time:.1f} s", flush=True)
        return f"{notebook.relative_to(ROOT)}:\n{result.err}"
    bundle = CacheBundleIn(result.nb, str(notebook), data={"execution_seconds": result.time})
    cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)
    print(f"   {notebook.name} ran in {result.time:.1f} s", flush=True)
    return ""


def execute_all(notebooks: list[Path], caches: Path) -> Path:
    """Execute what is not cached, one notebook a core; return the cache's folder."""
    from jupyter_cache import get_cache

    os.environ["DIFFEDU_PAGE"] = "1"
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    folder = caches / digest(outside_the_cells())
    for old in caches.glob("*"):
        if old != folder:
            shutil.rmtree(old)
    cache = get_cache(str(folder))
    cache.list_cache_records()  # makes the data base before the threads share it
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            # from the end: the long ones are there, and at last short ones keep all cores busy
            errors = [error for error in pool.map(lambda n: execute(n, cache), notebooks[::-1]) if error]
        except KeyboardInterrupt:
            print("Interrupted; what was executed is kept.", flush=True)
            os._exit(130)  # do not wait for the running notebooks; their kernels end with this process
    if errors:
        sys.exit("\n\n".join(errors))
    return folder


def sphinx(toc: Path, out: Path, cache: Path, *, strict: bool) -> int:
    """Run Sphinx afresh into ``out/html``; return its status."""
    from jupyter_book.sphinx import build_sphinx

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    status = build_sphinx(
        ROOT,
        out / "html",
        noconfig=True,
        path_config=ROOT / "_config.yml",
        confoverrides={
            "external_toc_path": str(toc),
            "latex_individualpages": False,
            "nb_execution_cache_path": str(cache),
            "nitpicky": strict,
        },
        doctreedir=out / "doctrees",
        warningiserror=strict,
        keep_going=True,
        freshenv=True,
        quiet=True,
    )
    (out / "html" / "index.html").write_text(REDIRECT)
    return status if isinstance(status, int) else 1


def book() -> None:
    """The whole site into _build/html; warnings are errors, dangling references too."""
    equation_map = ROOT / "tools" / "equation_map.py"
    if equation_map.exists():
        with step("Generating the equation map"):
            subprocess.run([sys.executable, equation_map], cwd=ROOT, check=True)
    site, mark = BUILD / "html", BUILD / "html.digest"
    wanted = digest(everything())
    if site.is_dir() and mark.exists() and mark.read_text() == wanted:
        print(f"Nothing has changed: {site / 'index.html'}")
        return
    with step("Executing the notebooks"):
        cache = execute_all(notebooks_of(ROOT / "_toc.yml"), BUILD / "cache")
    with step("Building the pages"):
        status = sphinx(ROOT / "_toc.yml", BUILD / "new", cache, strict=True)
    if status:
        sys.exit(f"The build has warnings, listed above; its pages are in {BUILD / 'new' / 'html'}")
    mark.unlink(missing_ok=True)
    shutil.rmtree(site, ignore_errors=True)
    (BUILD / "new" / "html").rename(site)
    mark.write_text(wanted)
    print(f"The book is at {site / 'index.html'}")


def page(name: str) -> None:
    """One page alone; references to other pages stay unresolved and are not warned of."""
    stem = name.removeprefix("book/").removesuffix(".ipynb").removesuffix(".md")
    out = BUILD / "page" / stem
    toc = out / "_toc.yml"
    cited = "chapters: [{file: book/bibliography}]\n" if stem != "bibliography" else ""
    toc.write_text(f"format: jb-book\nroot: book/{stem}\n" + cited)
    with step(f"Executing book/{stem}"):
        cache = execute_all(notebooks_of(toc), out / "cache")
    with step(f"Building book/{stem}"):
        status = sphinx(toc, out / "built", cache, strict=False)
    print(out / "built" / "html" / "book" / f"{stem}.html")
    sys.exit(status)


def main() -> None:
    """Take a lock for what is built, so that two runs of the same cannot meet, and build it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=["book", "page"])
    parser.add_argument("name", nargs="?", default="")
    args = parser.parse_args()
    stem = args.name.removeprefix("book/").removesuffix(".ipynb").removesuffix(".md")
    sources = [ROOT / "book" / f"{stem}{suffix}" for suffix in (".ipynb", ".md")]
    if args.what == "page" and not any(s.exists() for s in sources):
        pages = sorted(p.stem for p in (ROOT / "book").glob("[a-z0-9]*.*") if p.suffix in {".md", ".ipynb"})
        sys.exit(f"PAGE={args.name!r} is no page of the book; there are: {', '.join(pages)}")
    place = BUILD / "page" / stem if args.what == "page" else BUILD
    place.mkdir(parents=True, exist_ok=True)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    with (place / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        page(stem) if args.what == "page" else book()


if __name__ == "__main__":
    main()
