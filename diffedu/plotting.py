"""One look for every figure of the book, in Jupyter and in the light and the dark page.

A figure is drawn once, in `INK` on a transparent ground. The page gets it twice, with ink and paper
exchanged for those of its light and its dark theme; Jupyter gets one PNG on white paper.
"""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from IPython.display import display
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import Collection, PathCollection
from matplotlib.colors import to_rgb, to_rgba_array
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Annotation, Text
from PIL import Image

INK, PAPER = "#222832", "#ffffff"  # text and ground of the page's light theme
DARK_INK, DARK_PAPER = "#ced6dd", "#121212"  # and of its dark one

# Seven hues, each at least 3:1 against both papers and told apart with every colour vision.
_BLUE, _SKY, _GREEN, _BROWN = "#2a66f0", "#1e9bd6", "#197456", "#84622a"
_ORANGE, _PURPLE, _GREY = "#e9640f", "#b6319e", "#8f9297"
COLORS = {
    "data": _BLUE,
    "noise": _GREY,
    "exact": _GREEN,
    "learned": _ORANGE,
    "forward": _SKY,
    "reverse": _PURPLE,
    "accent": _BROWN,
    "EulerMaruyama": _PURPLE,
    "Euler": _BROWN,
    "DDIM": _SKY,
}

PIXELS_PER_INCH = 92  # of the page: a figure 7 inches wide fills the text column
_SHARPNESS = 1.7  # image pixels per page pixel
_GLUE_PREFIX = "application/papermill.record/"  # where myst-nb looks for `{glue:text}` values


def use_style() -> None:
    """Set matplotlib's defaults to the book's: ink on a transparent ground, readable on a phone."""
    plt.rcParams.update(
        {
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
            "grid.color": INK,
            "axes.edgecolor": INK,
            "axes.labelcolor": INK,
            "axes.titlecolor": INK,
            "patch.edgecolor": INK,
            "figure.figsize": (7.0, 4.0),
            "figure.facecolor": "none",
            "figure.constrained_layout.use": True,
            "axes.facecolor": "none",
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": cycler(color=[_BLUE, _ORANGE, _GREEN, _PURPLE, _SKY, _BROWN, _GREY]),
            "axes.titlelocation": "left",
            "grid.alpha": 0.15,
            "font.size": 13,
            "axes.titlesize": 13.5,
            "axes.labelsize": 13,
            "xtick.labelsize": 12,
            "ytick.labelsize": 12,
            "legend.fontsize": 12,
            "legend.facecolor": PAPER,
            "legend.edgecolor": "none",
            "legend.framealpha": 0.8,
            "lines.linewidth": 2.0,
        }
    )


def in_page() -> bool:
    """Whether output is made for the published page (`DIFFEDU_PAGE=1`) and not for a kernel."""
    return os.environ.get("DIFFEDU_PAGE") == "1"


def png(fig: Figure) -> bytes:
    """The figure as a PNG on white paper, as Jupyter shows it."""
    drawn = _draw(fig)
    paper = Image.new("RGBA", drawn.size, PAPER)
    paper.alpha_composite(drawn)
    return _encode(paper.convert("RGB"), "png")


def webp_pair(fig: Figure) -> tuple[bytes, bytes]:
    """The figure as two transparent WebP images: for the light page and for the dark one."""
    light = _webp(_draw(fig))
    with _recoloured(fig, {INK: DARK_INK, PAPER: DARK_PAPER}):
        return light, _webp(_draw(fig))


def page_size(fig: Figure) -> tuple[int, int]:
    """Width and height of the figure in the page, in CSS pixels."""
    width, height = fig.get_size_inches() * PIXELS_PER_INCH
    return round(width), round(height)


def data_uri(image: bytes, kind: str = "webp") -> str:
    """The image as a `data:` address, so that a page needs no other file."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"


def show(fig: Figure, alt: str) -> None:
    """Display a figure with a text that says what it shows, and close it.

    Raises TypeError if `fig` is not a matplotlib figure, ValueError if `alt` is blank.
    """
    if not isinstance(fig, Figure):
        raise TypeError(f"show needs a matplotlib Figure, got {type(fig).__name__}")
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(f"alt must be a sentence that says what the figure shows, got {alt!r}")
    if in_page():
        pair = zip(("light", "dark"), webp_pair(fig), strict=True)
        size = page_size(fig)
        images = "".join(page_image(data_uri(image), alt, theme, size) for theme, image in pair)
        bundle = {"text/html": f'{PAGE_STYLE}<div class="de-figure">{images}</div>'}
        metadata: dict[str, Any] = {}
    else:
        bundle = {"image/png": base64.b64encode(png(fig)).decode("ascii")}
        metadata = {"image/png": {"width": page_size(fig)[0], "alt": alt}}
    plt.close(fig)
    display({**bundle, "text/plain": alt}, raw=True, metadata=metadata)  # type: ignore[no-untyped-call]


def page_image(source: str, alt: str, theme: str, size: tuple[int, int]) -> str:
    """One image element, shown in one theme ("light" or "dark") of the page."""
    return (
        f'<img class="only-{theme}" src="{source}" alt="{escape(alt)}" '
        f'width="{size[0]}" height="{size[1]}" decoding="sync">'
    )


# The theme puts a light card behind the outputs of a dark page; these figures need none.
PAGE_STYLE = (
    "<style>.cell_output .output:has(.de-figure){background:none!important;padding:0!important}"
    ".de-figure img{display:block;max-width:100%;height:auto;margin:0 auto!important;"
    "padding:0!important;background:none!important}"
    "html:not([data-theme=dark]) .de-figure .only-dark{display:none}</style>"
)


def glue(name: str, value: str) -> None:
    """Store a formatted string for the text, where `` {glue:text}`name` `` prints it.

    Raises TypeError if `value` is not a string: the cell decides how a number is printed.
    """
    if not isinstance(value, str):
        raise TypeError(f"glue needs a formatted string, such as f'{{x:.3f}}', got {value!r}")
    scrapbook = {"name": name, "mime_prefix": _GLUE_PREFIX}
    literal = repr(value)  # myst-nb evaluates literals: unquoted, "0.500" would become 0.5
    display({f"{_GLUE_PREFIX}text/plain": literal}, raw=True, metadata={"scrapbook": scrapbook})  # type: ignore[no-untyped-call]


def scatter(ax: Axes, x: Any, color: str = COLORS["data"], **kw: Any) -> PathCollection:
    """Draw points (n, 2), a tensor or an array, on axes of equal scale.

    Raises ValueError if `x` is not of shape (n, 2).
    """
    points = np.asarray(x.detach().cpu() if hasattr(x, "detach") else x)
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"scatter draws points of shape (n, 2), got {points.shape}")
    ax.set_aspect("equal")
    return ax.scatter(*points.T, **{"s": 4, "color": color, "linewidths": 0, **kw})


def _draw(fig: Figure) -> Image.Image:
    fig.set_dpi(PIXELS_PER_INCH * _SHARPNESS)
    canvas = FigureCanvasAgg(fig)
    canvas.draw()  # type: ignore[no-untyped-call]
    if fig.get_layout_engine() is not None:
        fig.set_layout_engine("none")  # the layout stands, and drawing again is faster
    pixels = np.array(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return Image.fromarray(pixels)


def _webp(image: Image.Image) -> bytes:
    """A lossless palette (best for lines, points, text) or, if that is large, a lossy image."""
    palette = image.quantize(256, method=Image.Quantize.FASTOCTREE).convert("RGBA")
    lossless = _encode(palette, "webp", lossless=True)
    if len(lossless) < 30_000:
        return lossless
    return min(lossless, _encode(image, "webp", quality=88), key=len)


def _encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


_COLOURED: dict[type[Artist], tuple[str, ...]] = {
    Text: ("color",),
    Line2D: ("color", "markerfacecolor", "markeredgecolor"),
    Patch: ("facecolor", "edgecolor"),
    Collection: ("facecolor", "edgecolor"),
}


@contextmanager
def _recoloured(fig: Figure, colours: dict[str, str]) -> Iterator[None]:
    """Exchange colours in every artist of the figure for a while; transparency stays as it is."""
    undo = []
    for part in _parts(fig):
        names = next((names for kind, names in _COLOURED.items() if isinstance(part, kind)), ())
        for name in names:
            before = to_rgba_array(getattr(part, f"get_{name}")())
            after = before.copy()
            for old, new in colours.items():
                match = (np.abs(before[:, :3] - to_rgb(old)) < 1e-3).all(axis=1)
                after[match, :3] = to_rgb(new)
            if (before != after).any():
                many = isinstance(part, Collection)
                setter = getattr(part, f"set_{name}")
                undo.append((setter, before if many else tuple(before[0])))
                setter(after if many else tuple(after[0]))
    try:
        yield
    finally:
        for setter, value in reversed(undo):
            setter(value)


def _parts(fig: Figure) -> Iterator[Artist]:
    for artist in fig.findobj():
        yield artist
        if isinstance(artist, Text) and (box := artist.get_bbox_patch()):
            yield box
        if isinstance(artist, Annotation) and artist.arrow_patch:
            yield artist.arrow_patch
