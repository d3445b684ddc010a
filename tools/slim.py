"""Slim a built site: one small stylesheet, an icon font of the icons used, trimmed pages.

A default page loads half a megabyte of CSS and an icon font of 1,400 glyphs, of which it uses a
few per cent. What stays is decided by the built site itself: a rule stays unless each of its selectors
names a class or id that occurs in no page and no script.
"""

import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tinycss2
from fontTools import subset, ttLib

from scripts import as_ascii, join_scripts

NAME = re.compile(r"[.#](-?[A-Za-z_](?:[\w-]|\\.)*)")
OPTIONAL = re.compile(r":(?:not|is|where|has)\((?:[^()]|\([^()]*\))*\)")
NAMES_NOTHING = {"bootstrap.js", "design-tabs.js", "mathjax", "searchindex.js", "vendor"}
# What Bootstrap's script sets on the menus and tooltips of the header; its other components are not used.
BOOTSTRAP = {"active", "collapse", "collapsing", "disabled", "dropend", "dropstart", "dropup", "fade", "show"}
BOOTSTRAP |= {"tooltip", "tooltip-arrow", "tooltip-inner"}
BOOTSTRAP |= {f"bs-tooltip-{side}" for side in ("auto", "bottom", "end", "start", "top")}
FACES = {"fa-solid-900": "solid", "fa-regular-400": "regular", "fa-brands-400": "brands"}


def names_in_use(site: Path) -> set[str]:
    """Class names and ids of the pages, and the words in the scripts' strings, which may set some."""
    used = set(BOOTSTRAP)
    scripts = [file.read_text() for file in site.rglob("*.js") if not NAMES_NOTHING & set(file.parts)]
    for page in site.rglob("*.html"):
        text = page.read_text()
        for value in re.findall(r'\b(?:class|id)="([^"]*)"', text):
            used.update(value.split())
        scripts += re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    for script in scripts:
        for string in re.findall(r"\"[^\"\n]*\"|'[^'\n]*'|`[^`]*`", script):
            used.update(re.findall(r"[\w-]+", string))
    return used


def keep(selector: str, used: set[str]) -> bool:
    """Whether a selector can match: all classes and ids that it demands are in use."""
    return used.issuperset(NAME.findall(OPTIONAL.sub("", selector)))


def purge(css: str, used: set[str], pages: str) -> str:
    """The rules that can match something, without properties and key frames that nothing refers to."""
    while True:
        referred = set(re.findall(r"var\(\s*(--[\w-]+)", css + pages))
        for animation in re.findall(r"animation(?:-name)?:([^;}]*)", css):
            referred.update(animation.split())
        rules = tinycss2.parse_stylesheet(css, skip_comments=True, skip_whitespace=True)
        fewer = "\n".join(kept_rules(rules, used, referred))
        if fewer == css:
            return css
        css = fewer


def kept_rules(rules: Iterable[Any], used: set[str], referred: set[str]) -> Iterator[str]:
    """The text of those of the rules that stay."""
    for rule in rules:
        keyword = rule.lower_at_keyword if rule.type == "at-rule" else ""
        if rule.type == "qualified-rule":
            selectors = re.split(r",(?![^()]*\))", tinycss2.serialize(rule.prelude))
            kept = [s.strip() for s in selectors if keep(s, used)]
            body = ";".join(declarations(rule.content, referred))
            if kept and body:
                yield f"{','.join(kept)}{{{body}}}"
        elif keyword in ("media", "supports"):
            inner = tinycss2.parse_rule_list(rule.content, skip_comments=True, skip_whitespace=True)
            if text := "\n".join(kept_rules(inner, used, referred)):
                yield f"@{keyword}{tinycss2.serialize(rule.prelude)}{{{text}}}"
        elif "keyframes" in keyword:
            if tinycss2.serialize(rule.prelude).strip() in referred:
                yield rule.serialize()
        elif keyword not in ("charset", "import", "font-face", ""):
            yield rule.serialize()


def declarations(content: Sequence[Any], referred: set[str]) -> Iterator[str]:
    """The declarations of a rule but for custom properties that nothing uses."""
    for item in tinycss2.parse_declaration_list(content, skip_comments=True, skip_whitespace=True):
        if item.type == "declaration" and (not item.name.startswith("--") or item.name in referred):
            value = re.sub(r"\s+", " ", tinycss2.serialize(item.value)).strip()
            important = "!important" if item.important else ""
            yield f"{item.name}:{value or ' '}{important}"


def inline_urls(css: str, folder: Path, static: Path) -> str:
    """Rewrite relative url(...) of a sheet in ``folder`` so that it holds from ``static``."""

    def rewrite(match: re.Match[str]) -> str:
        target = match[1].strip("\"'")
        if re.match(r"data:|#|/|\w+:", target):
            return match[0]
        path = (folder / target).resolve().relative_to(static.resolve())
        return f'url("{path.as_posix()}")'

    return re.sub(r"url\(([^)]+)\)", rewrite, css)


def icon_faces(fonts: Path, css: str, static: Path) -> str:
    """Write fonts with the icons that ``css`` names; return their @font-face rules."""
    logging.getLogger("fontTools").setLevel(logging.WARNING)
    codes = {int(code, 16) for code in re.findall(r"\\(f[0-9a-f]{3}|[0-9a-f]{2})\b", css)}
    codes |= {ord(char) for char in css if char >= "\ue000"}
    rules = []
    for stem, style in FACES.items():
        font = ttLib.TTFont(fonts / f"{stem}.ttf")
        present = codes & set(font.getBestCmap())
        if not present:
            continue
        cutter = subset.Subsetter(subset.Options(desubroutinize=True))
        cutter.populate(unicodes=present)
        cutter.subset(font)
        font.flavor = "woff"
        font.save(static / f"icons-{style}.woff")
        family = "Font Awesome 6 Brands" if style == "brands" else "Font Awesome 6 Free"
        weight = 900 if style == "solid" else 400
        rules.append(
            f'@font-face{{font-family:"{family}";font-style:normal;font-weight:{weight};'
            f'font-display:block;src:url("icons-{style}.woff") format("woff")}}'
        )
    return "\n".join(rules)


def trim(page: str) -> str:
    """A page without what it does not need: repeated styles, a kernel's settings, logos of a closed menu."""
    seen: set[str] = set()

    def once(match: re.Match[str]) -> str:
        first = match[0] not in seen
        seen.add(match[0])
        return match[0] if first else ""

    page = re.sub(r"<style>[^<]*</style>", once, page)
    page = re.sub(r'<script type="text/x-thebe-config">.*?</script>', "", page, flags=re.DOTALL)
    page = re.sub(r'<span class="pre">([^<]*)</span>', r"\1", page)
    page = page.replace(' role="doc-biblioentry"', ' role="listitem"')
    page = page.replace('container">Binder<', 'container">JupyterLab on Binder<')
    return as_ascii(re.sub(r'<img (?=alt="[^"]* logo")', '<img loading="lazy" ', page))


def slim(site: Path, sheets: Sequence[str]) -> None:
    """Write ``_static/site.css`` from ``sheets`` (paths under _static) and remove what it replaces."""
    static = site / "_static"
    for page in site.rglob("*.html"):
        page.write_text(trim(page.read_text()))
    used = names_in_use(site)
    fonts = next(static.glob("vendor/fontawesome/*/webfonts"))
    icons = next(static.glob("vendor/fontawesome/*/css/all.min.css"))
    order = ["basic.css", "styles/bootstrap.css", "styles/pydata-sphinx-theme.css"]
    paths = [*(static / name for name in order), icons, *(static / name for name in sheets)]
    css = "\n".join(inline_urls(path.read_text(), path.parent, static) for path in paths)
    pages = "".join(file.read_text() for kind in ("*.html", "*.js") for file in site.rglob(kind))
    css = purge(css, used, pages)
    faces = icon_faces(fonts, css, static)
    (static / "site.css").write_text(f'@charset "utf-8";\n{faces}\n{css}')
    for path in paths:
        path.unlink(missing_ok=True)
    shutil.rmtree(static / "vendor")
    for leftover in (f for kind in ("*.map", "*.scss", "*macros.html") for f in static.rglob(kind)):
        leftover.unlink()
    join_scripts(site)
