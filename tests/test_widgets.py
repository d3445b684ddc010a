import json
import re

import matplotlib

matplotlib.use("agg")

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
from bs4 import BeautifulSoup

from diffedu.plotting import use_style
from diffedu.widgets import StepExplorer


@pytest.fixture(autouse=True)
def style(monkeypatch):
    monkeypatch.delenv("DIFFEDU_PAGE", raising=False)
    with matplotlib.rc_context():
        use_style()
        yield
    assert not plt.get_fignums()  # no figure is left to be shown twice


def draw(steps, solver="DDIM"):
    fig, ax = plt.subplots(figsize=(2, 1.5))
    ax.plot([0, steps], [0, len(solver)])
    return fig


def alt(steps, solver="DDIM"):
    return f"A line to {steps} & {solver} <b>"


def one(**kw):
    return StepExplorer(draw, {"steps": [1, 2, 5, 10]}, **{"alt": alt, **kw})


def two(**kw):
    controls = {"steps": np.array([1, 2, 5]), "solver": ["DDIM", "<Euler>"]}
    return StepExplorer(draw, controls, **{"alt": alt, **kw})


@pytest.fixture
def page(monkeypatch):
    """The explorer's page, parsed."""
    monkeypatch.setenv("DIFFEDU_PAGE", "1")

    def parse(explorer):
        bundle = explorer._repr_mimebundle_()
        assert set(bundle) == {"text/html", "text/plain"}
        return BeautifulSoup(bundle["text/html"], "html.parser")

    return parse


# In Jupyter


def test_jupyter_gets_widgets():
    bundle = one()._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert "text/html" not in bundle


def parts(explorer):
    def walk(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    return {type(widget).__name__: widget for widget in walk(explorer.live)}


def test_moving_the_live_slider_changes_picture_and_sentence():
    live = parts(one(start={"steps": 5}))
    slider, image, caption = (live[name] for name in ("SelectionSlider", "Image", "HTML"))
    assert slider.value == 5
    assert caption.value == "A line to 5 &amp; DDIM &lt;b&gt;"
    first = bytes(image.value)
    assert first.startswith(b"\x89PNG")
    slider.value = 10
    assert image.value != first
    assert "to 10" in caption.value
    slider.value = 5
    assert image.value == first
    assert image.layout.width  # JupyterLab shows nothing without


def test_the_live_choice_changes_the_picture():
    live = parts(two())
    first = bytes(live["Image"].value)
    live["Dropdown"].value = "<Euler>"
    assert live["Image"].value != first


def test_live_frames_are_drawn_when_asked_for_and_once():
    drawn = []

    def count(steps):
        drawn.append(steps)
        return draw(steps)

    live = parts(StepExplorer(count, {"steps": [1, 2, 5, 10]}, alt=alt))
    for value in (2, 1, 2, 10, 1):
        live["SelectionSlider"].value = value
    assert drawn == [1, 2, 10]


def test_play_runs_through_the_live_slider():
    live = parts(one(play="steps"))
    assert live["Play"].max == 3
    assert "Play" not in parts(one())
    assert isinstance(live["Play"], ipywidgets.Play)


def test_nothing_is_drawn_before_it_is_displayed():
    StepExplorer(lambda steps: 1 / 0, {"steps": [1, 2]}, alt=alt)


# In the page


def test_the_page_has_no_widget_and_every_frame(page):
    html = page(two(start={"steps": 2, "solver": "<Euler>"}))
    data = json.loads(html.find("script", type="application/json").string)
    assert data["shape"] == [3, 2]
    assert data["start"] == 3
    assert data["labels"] == [["1", "2", "5"], ["DDIM", "<Euler>"]]
    assert data["captions"][5] == "A line to 5 & <Euler> <b>"
    embedded = [pair for pair in data["frames"] if pair]
    assert len(embedded) == 5  # and the one that stands in the page
    assert len({image for pair in embedded for image in pair}) == 10
    images = html.select(".de-figure img")
    assert [image["class"] for image in images] == [["only-light"], ["only-dark"]]
    assert {image["alt"] for image in images} == {"A line to 2 & <Euler> <b>"}
    assert {(image["width"], image["height"]) for image in images} == {("184", "138")}


def test_inputs_are_native_and_labelled(page):
    html = page(two(start={"steps": 2}, task="Look < here."))
    slider, choice = html.find("input"), html.find("select")
    assert (slider["type"], slider["min"], slider["max"]) == ("range", "0", "2")
    assert (slider["value"], slider["aria-valuetext"]) == ("1", "2")
    assert html.find("label", {"for": slider["id"]}).text == "steps"
    assert html.find("label", {"for": choice["id"]}).text == "solver"
    assert [option.text for option in choice.find_all("option")] == ["DDIM", "<Euler>"]
    assert html.find("output")["for"] == [slider["id"], choice["id"]]
    assert html.find(class_="de-task").text == "Look < here."


def test_without_scripts_a_frame_and_its_sentence_remain(page):
    html = page(one(start={"steps": 5}, play="steps"))
    assert html.find(class_="de-controls").has_attr("hidden")
    assert html.find("output").text == "A line to 5 & DDIM <b>"
    assert len(html.find_all("button")) == 1


def test_no_text_can_end_the_script_or_ask_another_host(page):
    explorer = StepExplorer(
        draw, {"steps": [1, 2]}, alt=lambda steps: f"</script><script>alert({steps})</script>"
    )
    html = page(explorer)
    assert len(html.find_all("script")) == 2
    assert not re.search(r"https?://", str(html))
    assert "eval(" not in str(html)


def test_explorers_of_one_page_do_not_meet(page):
    first, second = page(one()), page(one())
    ids = [tag["id"] for html in (first, second) for tag in html.find_all(id=True)]
    assert len(ids) == len(set(ids)) == 4


def test_a_label_reads_as_words(page):
    html = page(
        StepExplorer(lambda n_steps: draw(n_steps), {"n_steps": [0.5, 0.25]}, alt=lambda n_steps: "A.")
    )
    assert html.find("label").text == "n steps"
    assert html.find("input")["aria-valuetext"] == "0.5"


# Bad input


@pytest.mark.parametrize(
    ("controls", "error", "message"),
    [
        ({}, ValueError, "one to three controls, got 0"),
        ({name: [1, 2] for name in "abcd"}, ValueError, "one to three controls, got 4"),
        ({"steps": []}, ValueError, "two values or more"),
        ({"steps": [1]}, ValueError, "two values or more"),
        ({"steps": [1, 2, 1]}, ValueError, "must differ"),
        ({"steps": [1.0000001, 1.0000002]}, ValueError, "must differ"),
        ({"steps": [1, "two"]}, TypeError, "all numbers or all strings"),
        ({"steps": [None, 2]}, TypeError, "all numbers or all strings"),
        ({"steps": range(61)}, ValueError, "60 combinations, got 61"),
    ],
)
def test_bad_controls_are_refused(controls, error, message):
    with pytest.raises(error, match=message):
        StepExplorer(draw, controls, alt=alt)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": {"steps": 3}}, r"one of \(1, 2, 5, 10\), got 3"),
        ({"start": {"step": 1}}, r"start names \['step'\]; the controls are \['steps'\]"),
        ({"play": "t"}, r"play must be one of .*\['steps'\], got 't'"),
    ],
)
def test_bad_start_and_play_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        one(**options)


def test_a_choice_of_words_cannot_be_played():
    with pytest.raises(ValueError, match=r"\['steps'\], got 'solver'"):
        two(play="solver")


def test_draw_must_return_a_figure():
    with pytest.raises(TypeError, match="return a matplotlib Figure, got NoneType"):
        _ = StepExplorer(lambda steps: None, {"steps": [1, 2]}, alt=alt).live


@pytest.mark.parametrize("sentence", ["", " ", None])
def test_alt_must_return_a_sentence(sentence):
    with pytest.raises(ValueError, match=r"must return a sentence, got .* for {'steps': 1}"):
        _ = one(alt=lambda steps: sentence).live


def test_figures_must_be_of_one_size(page):
    def grows(steps):
        return plt.figure(figsize=(steps, 1))

    with pytest.raises(ValueError, match=r"one size, got \(92, 92\) and \(184, 92\)"):
        page(StepExplorer(grows, {"steps": [1, 2]}, alt=alt))
