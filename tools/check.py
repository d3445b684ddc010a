"""Run every check of the project, one after the other; fail at the end if one failed.

python tools/check.py          all of them
python tools/check.py --fast   without the browser
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from browser import HOW_TO_INSTALL, find_browser
from steps import step

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
NEED_THE_SITE = ["tests/book/test_links.py", "tests/book/test_browser.py"]
TIMED = "tests/book/test_browser.py::test_a_page_is_ready_in_time"  # needs the machine for itself


def commands(fast: bool) -> dict[str, list[list[str]]]:
    """What is run, under the name that is printed; a name's commands stop at the first failure."""
    pytest = [str(BIN / "pytest"), "--quiet", "--numprocesses=auto"]
    site_tests = NEED_THE_SITE[:1] if fast else NEED_THE_SITE
    apart = [f"--deselect={TIMED}"]
    timed = [] if fast else [[str(BIN / "pytest"), "--quiet", TIMED]]
    without_site = [f"--ignore={path}" for path in NEED_THE_SITE]
    return {
        "Style": [
            [str(BIN / "ruff"), "check", "--quiet"],
            [str(BIN / "ruff"), "format", "--check", "--quiet"],
            [
                str(BIN / "codespell"),
                "benchmarks",
                "book",
                "diffedu",
                "tests",
                "tools",
                "README.md",
                "CONTRIBUTING.md",
            ],
        ],
        "Types": [[str(BIN / "mypy")]],
        "Unit tests": [[*pytest, "tests", *without_site]],
        # executes every notebook and fails at the first error, as nbval would in the weekly workflow
        "The book": [[sys.executable, "tools/build.py", "book"]],
        "The site": [[*pytest, "--dist=loadgroup", *apart, *site_tests], *timed],
    }


def main() -> None:
    """Run them all and say which failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fast", action="store_true", help="leave the browser out")
    fast = parser.parse_args().fast
    if not fast and not find_browser():
        sys.exit(HOW_TO_INSTALL)
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"))
    start = time.monotonic()
    failed = []
    for name, parts in commands(fast).items():
        with step(name):
            if not all(subprocess.run(part, cwd=ROOT).returncode == 0 for part in parts):
                failed.append(name)
                print(f"   {name}: FAILED", flush=True)
    print(
        f"{time.monotonic() - start:.0f} s in all. "
        + ("Failed: " + ", ".join(failed) if failed else "All is well.")
    )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
