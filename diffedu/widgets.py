"""One explorer of figures with two faces: live widgets in Jupyter, plain HTML in the page.

The page needs no kernel, no network and, for its first frame, no scripts: every combination of the
controls' values is drawn when the book is built, and native inputs choose among the pictures.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.resources import files
from math import prod
from numbers import Real
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .plotting import PAGE_STYLE, data_uri, in_page, page_image, page_size, png, webp_pair

Value = Any  # a number or a string
Where = tuple[int, ...]  # one index for each control

MAX_FRAMES = 60  # more would weigh the page down
_count = itertools.count(1)


class StepExplorer:
    """A figure with one to three controls; the last expression of a cell displays it.

    `draw(**values)` returns the figure and `alt(**values)` the sentence that says what it shows, for
    one value of each of the `controls`, a mapping of names to sequences of values. Numbers give a
    slider, strings a list to choose from. `start` names the first values (default: the first of
    each), `play` the control that a play button runs through, `task` says what to look for.

    With `DIFFEDU_PAGE=1` all frames are drawn at once and displayed as HTML; otherwise a frame is
    drawn when it is first asked for and displayed by ipywidgets.

    Raises ValueError or TypeError for no control or more than three, for a control with fewer than
    two values, with equal values or with values that are neither all numbers nor all strings, for
    more than 60 frames, for a start or play that is not there and, when a frame is drawn, for a
    `draw` without a figure, for an `alt` without a sentence and for figures of different sizes.
    """

    def __init__(
        self,
        draw: Callable[..., Figure],
        controls: Mapping[str, Sequence[Value]],
        *,
        alt: Callable[..., str],
        start: Mapping[str, Value] | None = None,
        play: str | None = None,
        task: str = "",
    ) -> None:
        """Check the controls; nothing is drawn yet."""
        if not 1 <= len(controls) <= 3:
            raise ValueError(f"an explorer has one to three controls, got {len(controls)}")
        self.controls = [_Control(name, tuple(values)) for name, values in controls.items()]
        self._shape = tuple(len(control.values) for control in self.controls)
        if prod(self._shape) > MAX_FRAMES:
            raise ValueError(f"the controls may have {MAX_FRAMES} combinations, got {prod(self._shape)}")
        unknown = set(start or {}) - set(controls)
        if unknown:
            raise ValueError(f"start names {sorted(unknown)}; the controls are {list(controls)}")
        self._start = tuple(
            control.index((start or {}).get(control.name, control.values[0])) for control in self.controls
        )
        sliders = [control.name for control in self.controls if control.is_numeric]
        if play is not None and play not in sliders:
            raise ValueError(f"play must be one of the controls with numbers {sliders}, got {play!r}")
        self._play = play
        self._task = task
        self._draw = draw
        self._alt = alt
        self._size: tuple[int, int] | None = None
        self._live_frames: dict[Where, bytes] = {}

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        if in_page():
            return {"text/html": self._page, "text/plain": self.sentence(self._start)}
        return self.live._repr_mimebundle_(include=include, exclude=exclude)

    def values(self, where: Where) -> dict[str, Value]:
        """The value of each control at these indices."""
        pairs = zip(self.controls, where, strict=True)
        return {control.name: control.values[k] for control, k in pairs}

    def figure(self, where: Where) -> Figure:
        """The figure at these indices, drawn anew; all of them are of one size."""
        fig = self._draw(**self.values(where))
        if not isinstance(fig, Figure):
            raise TypeError(f"draw must return a matplotlib Figure, got {type(fig).__name__}")
        plt.close(fig)  # or a notebook would show it a second time
        size = page_size(fig)
        if self._size not in (None, size):
            raise ValueError(f"all figures must be of one size, got {self._size} and {size}")
        self._size = size
        return fig

    def sentence(self, where: Where) -> str:
        """What the figure at these indices shows."""
        alt = self._alt(**self.values(where))
        if not isinstance(alt, str) or not alt.strip():
            raise ValueError(f"alt must return a sentence, got {alt!r} for {self.values(where)}")
        return alt

    @cached_property
    def live(self) -> Any:
        """The explorer as an ipywidgets box; its parts are in `live.children`."""
        import ipywidgets as w

        inputs = [control.widget(k) for control, k in zip(self.controls, self._start, strict=True)]
        image = w.Image(format="png", layout=w.Layout(width="100%"))  # JupyterLab needs a width
        caption = w.HTML(layout=w.Layout(width="100%"))

        def update(change: Any = None) -> None:
            where = tuple(each.index for each in inputs)
            if where not in self._live_frames:
                self._live_frames[where] = png(self.figure(where))
            image.value = self._live_frames[where]
            caption.value = escape(self.sentence(where))

        for each in inputs:
            each.observe(update, "index")
        update()
        assert self._size is not None
        image.layout.max_width = f"{self._size[0]}px"
        rows: list[Any] = []
        for control, each in zip(self.controls, inputs, strict=True):
            row = [each]
            if control.name == self._play:
                player = w.Play(max=len(control.values) - 1, interval=300, value=each.index)
                w.jslink((player, "value"), (each, "index"))
                row.append(player)
            rows.append(w.HBox(row))
        task = [w.HTML(f"<b>{escape(self._task)}</b>")] if self._task else []
        return w.VBox([*task, *rows, image, caption])

    @cached_property
    def _page(self) -> str:
        uid = f"de-explorer-{next(_count)}"
        places = list(itertools.product(*map(range, self._shape)))
        pairs = [webp_pair(self.figure(where)) for where in places]
        captions = [self.sentence(where) for where in places]
        first = places.index(self._start)
        data = {
            "shape": self._shape,
            "start": first,
            "labels": [control.labels for control in self.controls],
            "captions": captions,
            "frames": [
                [] if k == first else [base64.b64encode(image).decode("ascii") for image in pair]
                for k, pair in enumerate(pairs)
            ],
        }
        payload = json.dumps(data).replace("<", "\\u003c")  # no tag can end the script early
        assert self._size is not None
        images = [
            page_image(data_uri(image), captions[first], theme, self._size)
            for image, theme in zip(pairs[first], ("light", "dark"), strict=True)
        ]
        inputs = [
            control.html(f"{uid}-{axis}", k, control.name == self._play)
            for axis, (control, k) in enumerate(zip(self.controls, self._start, strict=True))
        ]
        names = " and ".join(control.label for control in self.controls)
        ids = " ".join(f"{uid}-{axis}" for axis in range(len(self.controls)))
        task = f'<p class="de-task">{escape(self._task)}</p>' if self._task else ""
        return (
            f"{PAGE_STYLE}<style>{_asset('explorer.css')}</style>"
            f'<div class="de-explorer" id="{uid}" role="group" '
            f'aria-label="Figure with a choice of {escape(names)}">{task}'
            f'<div class="de-controls" hidden>{"".join(inputs)}</div>'
            f'<div class="de-figure">{"".join(images)}</div>'
            f'<p class="de-caption" data-longest="{escape(max(captions, key=len))}">'
            f'<output for="{ids}" aria-live="polite">{escape(captions[first])}</output></p>'
            f'<script type="application/json">{payload}</script>'
            f"<script>{_asset('explorer.js')}({json.dumps(uid)});</script></div>"
        )


@dataclass(frozen=True)
class _Control:
    name: str
    values: tuple[Value, ...]

    def __post_init__(self) -> None:
        if len(self.values) < 2:
            raise ValueError(f"control {self.name!r} needs two values or more, got {self.values}")
        numeric = [isinstance(value, Real) for value in self.values]
        if not all(numeric) and not all(isinstance(value, str) for value in self.values):
            raise TypeError(
                f"the values of control {self.name!r} must be all numbers or all strings, got {self.values}"
            )
        if len(set(self.values)) < len(self.values) or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"the values of control {self.name!r} must differ, got {self.values}")

    @property
    def is_numeric(self) -> bool:
        return not isinstance(self.values[0], str)

    @property
    def label(self) -> str:
        return self.name.replace("_", " ")

    @property
    def labels(self) -> list[str]:
        return [f"{value:g}" if self.is_numeric else value for value in self.values]

    def index(self, value: Value) -> int:
        if value not in self.values:
            raise ValueError(f"start of {self.name!r} must be one of {self.values}, got {value!r}")
        return self.values.index(value)

    def widget(self, k: int) -> Any:
        import ipywidgets as w

        kind = w.SelectionSlider if self.is_numeric else w.Dropdown
        options = list(zip(self.labels, self.values, strict=True))
        return kind(options=options, index=k, description=self.label, style={"description_width": "initial"})

    def html(self, uid: str, k: int, plays: bool) -> str:
        label = f'<label for="{uid}">{escape(self.label)}</label>'
        if not self.is_numeric:
            options = "".join(
                f'<option value="{i}"{" selected" if i == k else ""}>{escape(text)}</option>'
                for i, text in enumerate(self.labels)
            )
            choice = f'<select id="{uid}" autocomplete="off">{options}</select>'
            return f'<div class="de-control de-choice">{label}{choice}</div>'
        button = f'<button type="button" aria-controls="{uid}">Play</button>' if plays else ""
        return (
            f'<div class="de-control">{label}<input type="range" id="{uid}" min="0" step="1" '
            f'max="{len(self.values) - 1}" value="{k}" autocomplete="off" '
            f'aria-valuetext="{self.labels[k]}"><span class="de-value" aria-hidden="true" '
            f'style="min-width:{max(map(len, self.labels))}ch">{self.labels[k]}</span>{button}</div>'
        )


def _asset(name: str) -> str:
    text = files("diffedu").joinpath(name).read_text(encoding="utf-8")
    return "\n".join(line.strip() for line in text.splitlines())
