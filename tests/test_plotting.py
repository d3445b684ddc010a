import base64
import io
import itertools
import re
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from diffedu import plotting
from diffedu.plotting import COLORS, glue, scatter, show, use_style


@pytest.fixture(autouse=True)
def style(monkeypatch):
    monkeypatch.delenv("DIFFEDU_PAGE", raising=False)
    with matplotlib.rc_context():
        use_style()
        yield
    plt.close("all")


@pytest.fixture
def shown(monkeypatch):
    """What is displayed: a list of (bundle, metadata)."""
    seen = []
    monkeypatch.setattr(plotting, "display", lambda data, raw, metadata: seen.append((data, metadata)))
    return seen


def figure():
    fig, ax = plt.subplots(figsize=(4, 3))
    ax.plot([0, 1], [0, 1], color=COLORS["exact"], label="exact")
    ax.plot([0, 1], [1, 0], "o", color=plotting.INK)
    ax.annotate("here", (0.5, 0.5), (0.2, 0.9), arrowprops={"color": plotting.INK})
    ax.text(0.5, 0.1, "boxed", bbox={"facecolor": plotting.PAPER})
    ax.set(xlabel="x", title="a title")
    ax.legend()
    return fig


def pixels(image, paper):
    drawn = Image.open(io.BytesIO(image)).convert("RGBA")
    ground = Image.new("RGBA", drawn.size, paper)
    ground.alpha_composite(drawn)
    return np.asarray(ground)[..., :3] / 255


def luminance(colour):
    c = np.array(to_rgb(colour))
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(a, b):
    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


def theme_backgrounds():
    theme = pytest.importorskip("sphinx_book_theme", reason="the theme is needed to read its colours")
    base = pytest.importorskip("pydata_sphinx_theme")
    sheets = [f for m in (theme, base) for f in Path(m.__file__).parent.rglob("styles/*theme.css")]
    found = set()
    for sheet in sheets:
        found |= set(re.findall(r"--pst-color-background:(#[0-9a-f]+)", sheet.read_text()))
    return found


def test_every_colour_stands_out_on_every_background_of_the_theme():
    backgrounds = theme_backgrounds()
    assert {"#fff", plotting.DARK_PAPER} <= backgrounds
    for (name, colour), ground in itertools.product(COLORS.items(), backgrounds):
        assert contrast(colour, ground) >= 3, (name, ground)
    assert contrast(plotting.INK, plotting.PAPER) >= 7
    assert contrast(plotting.DARK_INK, plotting.DARK_PAPER) >= 7


# Machado, Oliveira, Fernandes (2009), full severity, on linear RGB.
VISIONS = {
    "all cones": np.eye(3),
    "no red cones": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "no green cones": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "no blue cones": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


def lab(colour, vision):
    c = np.array(to_rgb(colour))
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    rgb = np.clip(np.array(vision) @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ rgb / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISIONS)
def test_different_colours_stay_different_without_some_cones(vision):
    for a, b in itertools.combinations(sorted(set(COLORS.values())), 2):
        assert np.linalg.norm(lab(a, VISIONS[vision]) - lab(b, VISIONS[vision])) > 15, (a, b)


def test_jupyter_gets_an_opaque_png_with_its_text(shown):
    show(figure(), alt="A cross.")
    ((bundle, metadata),) = shown
    image = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 255, 255)
    assert set(bundle) == {"image/png", "text/plain"}
    assert metadata["image/png"]["alt"] == "A cross."
    assert not plt.get_fignums()


def test_the_page_gets_a_light_and_a_dark_image_with_the_same_text(shown, monkeypatch):
    monkeypatch.setenv("DIFFEDU_PAGE", "1")
    show(figure(), alt='Where x < 1 & y > "0".')
    ((bundle, _),) = shown
    html = bundle["text/html"]
    assert re.findall(r'<img class="([^"]+)"', html) == ["only-light", "only-dark"]
    assert html.count('alt="Where x &lt; 1 &amp; y &gt; &quot;0&quot;."') == 2
    assert html.count("data:image/webp;base64,") == 2
    assert html.count('width="368" height="276"') == 2
    assert not plt.get_fignums()


def test_the_dark_image_is_the_light_one_with_ink_and_paper_exchanged():
    fig = figure()
    before = plotting.png(fig)
    light, dark = plotting.webp_pair(fig)
    on_light, on_dark = pixels(light, plotting.PAPER), pixels(dark, plotting.DARK_PAPER)
    assert on_light.shape == on_dark.shape

    def has(image, colour):
        near = np.abs(image - to_rgb(colour)).max(axis=-1) < 0.03
        return near.sum() > 100  # the edge of a stroke may come near any grey

    assert has(on_light, plotting.INK)
    assert not has(on_light, plotting.DARK_INK)
    assert has(on_dark, plotting.DARK_INK)
    assert not has(on_dark, plotting.INK)
    assert not has(on_dark, plotting.PAPER)
    assert has(on_light, COLORS["exact"])
    assert has(on_dark, COLORS["exact"])
    assert plotting.png(fig) == before  # the figure itself is as it was


def test_the_images_have_no_ground_of_their_own():
    for image in plotting.webp_pair(figure()):
        assert Image.open(io.BytesIO(image)).convert("RGBA").getpixel((0, 0))[3] == 0


@pytest.mark.parametrize("alt", ["", "  ", None, 3])
def test_a_figure_without_a_text_is_refused(alt):
    with pytest.raises(ValueError, match="alt must be a sentence"):
        show(figure(), alt=alt)


def test_what_is_not_a_figure_is_refused():
    with pytest.raises(TypeError, match="needs a matplotlib Figure, got list"):
        show([], alt="Nothing.")


def test_glue_is_what_myst_nb_reads(shown):
    execute = pytest.importorskip("myst_nb.core.variables").format_plain_text
    glue("order", "0.500")
    ((bundle, metadata),) = shown
    prefix = metadata["scrapbook"]["mime_prefix"]
    assert metadata["scrapbook"]["name"] == "order"
    assert execute(bundle[f"{prefix}text/plain"], "") == "0.500"
    assert prefix == pytest.importorskip("myst_nb.ext.glue").GLUE_PREFIX


def test_glue_refuses_a_bare_number():
    with pytest.raises(TypeError, match=r"formatted string.*got 0\.5"):
        glue("order", 0.5)


def test_scatter_takes_tensors_and_keeps_circles_round():
    fig, ax = plt.subplots()
    points = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    drawn = scatter(ax, points, color=COLORS["noise"], s=9)
    np.testing.assert_allclose(drawn.get_offsets(), points.detach().numpy())
    assert ax.get_aspect() == 1
    assert drawn.get_sizes() == [9]
    plt.close(fig)


@pytest.mark.parametrize("shape", [(5,), (5, 3), (2, 5, 2)])
def test_scatter_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match=re.escape(f"got {shape}")):
        scatter(plt.figure().gca(), np.zeros(shape))
