import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffedu.runlog import RunLog, save_grid
from diffedu.training import Fitted


def draw(net):
    return torch.zeros(3, 1, 4, 4)


def log(path, batch=10):
    return RunLog(path, batch, lambda step: 0.5 / step, draw)


def stage(n):
    """A run after n steps, whose k-th loss is k."""
    return Fitted(nn.Identity(), [float(k) for k in range(n)])


def test_a_line_says_where_the_run_stands(tmp_path):
    path, watch = tmp_path / "run.jsonl", log(tmp_path / "run.jsonl")
    watch(stage(4))
    watch(stage(6))
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert (first["step"], first["samples"], first["loss"], first["lr"]) == (4, 40, 1.5, 0.125)
    assert (second["step"], second["samples"], second["loss"]) == (6, 60, 4.5)  # losses 4 and 5
    assert first["samples_per_second"] is None
    assert second["samples_per_second"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run-000004.png", "run-000006.png", "run.jsonl"]
    assert second["picture"] == "run-000006.png"


def test_steps_made_again_after_an_interruption_replace_their_lines(tmp_path):
    path = tmp_path / "run.jsonl"
    for steps in ([2, 4, 6], [4, 6, 8]):  # another process goes on from the checkpoint of step 2
        watch = log(path)
        for n in steps:
            watch(stage(n))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert [line["loss"] for line in lines] == [0.5, 2.5, 4.5, 6.5]


@pytest.mark.parametrize("text", ["not json\n", '{"loss": 1}\n', '{"step": "4"}\n', "[1]\n"])
def test_a_file_that_is_no_log_is_refused_and_left_alone(text, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"notes\.txt is not the log of a run"):
        log(path)(stage(3))
    assert path.read_text() == text


def test_a_grid_shows_the_images_in_rows_black_to_white(tmp_path):
    images = torch.linspace(-1, 1, 5).reshape(5, 1, 1, 1).expand(5, 1, 2, 3).clone()
    images[0] = -7.0  # clipped
    save_grid(tmp_path / "grid.png", images)
    board = np.asarray(Image.open(tmp_path / "grid.png"))
    assert board.shape == (2 * 2, 3 * 3)
    tiles = board.reshape(2, 2, 3, 3).swapaxes(1, 2).reshape(6, 2, 3)
    assert [int(tile[0, 0]) for tile in tiles] == [0, 64, 128, 191, 255, 0]
    assert (tiles == tiles[:, :1, :1]).all()


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 3, 4, 4), (2, 4, 4)])
def test_other_shapes_are_refused(shape, tmp_path):
    with pytest.raises(ValueError, match=r"images must be of shape \(n, 1, H, W\), n >= 1; got"):
        save_grid(tmp_path / "grid.png", torch.zeros(shape))
    assert not list(tmp_path.iterdir())
