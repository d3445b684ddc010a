"""MathJax in one file, of the installed package's components, without what no page uses.

The combined file that MathJax ships also holds a context menu. And every one of its modules carries its own
copy of the same five helpers of the TypeScript compiler, a sixth of all bytes; here they share one. Its fonts
carry hints for screens of the last century, an eighth of their bytes; here they do not.
"""

import logging
import re
import shutil
from pathlib import Path

from fontTools import subset, ttLib

PARTS = ["core", "input/tex", "output/chtml", "output/chtml/fonts/tex", "a11y/assistive-mml"]
FOLDERS = ["output/chtml/fonts/woff-v2", "input/tex/extensions"]
# Those that use nothing of the module they stand in.
HELPER = re.compile(r"this&&this\.(__assign|__extends|__read|__spreadArray|__values)\|\|")


def expression_end(text: str, start: int) -> int:
    """Where the expression that begins at ``start`` ends."""
    depth, i = 0, start
    while True:
        char = text[i]
        if char in "\"'":
            i = text.index(char, i + 1)
        elif char in "([{":
            depth += 1
        elif depth == 0 and char in ")]},;":
            return i
        elif char in ")]}":
            depth -= 1
        i += 1


def share_helpers(text: str, shared: dict[str, str]) -> str:
    """Let every module use the helper that the first one brought, which goes into ``shared``."""
    out, position = [], 0
    for match in HELPER.finditer(text):
        if match.start() < position:
            continue
        end = expression_end(text, match.end())
        body = text[match.end() : end]
        first = shared.setdefault(match[1], body)
        if anonymous(first) == anonymous(body):
            out += [text[position : match.start()], f"tslib.{match[1]}"]
            position = end
    return "".join([*out, text[position:]])


def anonymous(code: str) -> str:
    """The code up to the names of its one-letter variables."""
    return re.sub(r"\b[a-z]\b", "_", code)


def bundle(source: Path) -> str:
    """The text of the one file."""
    shared: dict[str, str] = {}
    parts = [share_helpers((source / f"{name}.js").read_text(), shared) for name in ["startup", *PARTS]]
    # __extends assigns to a variable of its module: each helper gets a scope with such names.
    scoped = [f"{name}:function(){{var n,o,r,i,a,s,l,c,u;return {body}}}()" for name, body in shared.items()]
    preloaded = ",".join(f'"{name}"' for name in PARTS)
    # Loading nothing, MathJax starts when this script is through, by which time the parts are there.
    parts.append(f"MathJax.loader.preLoad({preloaded})")
    return ";\n".join([f"window.tslib={{{','.join(scoped)}}}", *parts])


def drop_hints(path: Path) -> None:
    """Write the font anew with all of its glyphs and without hinting."""
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    font = ttLib.TTFont(path)
    cutter = subset.Subsetter(
        subset.Options(hinting=False, name_IDs=[], drop_tables=["FFTM", "TeX ", "PfEd"])
    )
    cutter.populate(unicodes=list(font.getBestCmap()))
    cutter.subset(font)
    font.flavor = "woff"
    font.save(path)


def install(source: Path, target: Path) -> None:
    """Write ``mathjax.js`` and what it loads on demand into ``target``."""
    for name in FOLDERS:
        shutil.copytree(source / name, target / name, dirs_exist_ok=True)
    for font in (target / FOLDERS[0]).glob("*.woff"):
        drop_hints(font)
    (target / "mathjax.js").write_text(bundle(source))
