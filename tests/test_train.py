"""The command, run as a user runs it."""

import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from diffedu import train, weights
from diffedu.refinement import Refinement
from diffedu.teachers import MOONS, SWISS_ROLL
from diffedu.training import Recipe


@pytest.fixture
def short(monkeypatch):
    """The command with recipes of a few steps."""
    for name, teacher in (("SWISS_ROLL", SWISS_ROLL), ("MOONS", MOONS)):
        recipe = Recipe(steps=20, lr=1e-2, ema=0.9)
        small = replace(teacher, recipe=recipe, points=1000)
        monkeypatch.setattr(train, name, small)
        distilled = replace(
            getattr(train, f"{name}_DISTILLED"),
            teacher=small,
            generations=((2, recipe), (1, recipe)),
            kept=(2, 1),
        )
        monkeypatch.setattr(train, f"{name}_DISTILLED", distilled)
        for kind in ("CONSISTENCY", "CONSISTENCY_TRAINED"):
            student = getattr(train, f"{name}_{kind}")
            few = replace(student, teacher=small, recipe=recipe, division=Refinement(20, 2, 4))
            monkeypatch.setattr(train, f"{name}_{kind}", few)


STUDENTS = [
    f"{data}-{kind}" for data in ("swiss-roll", "moons") for kind in ("consistency", "consistency-training")
]


@pytest.mark.parametrize("name", ["swiss-roll", "moons", *STUDENTS])
def test_one_command_trains_and_writes(name, short, tmp_path, capsys):
    out = tmp_path / "deep" / "net.safetensors"
    assert train.main([name, "--seed", "4", "--out", str(out), "--device", "cpu"]) == 0
    tensors, metadata = weights.read(out)
    assert metadata["command"] == f"python -m diffedu.train {name} --seed 4"
    assert metadata["digest"] == weights.digest(tensors)
    said = capsys.readouterr().out
    assert f"{name}, seed 4" in said
    assert metadata["digest"][:16] in said


def test_a_distillation_writes_a_file_for_each_student(short, tmp_path, capsys):
    out = tmp_path / "net.safetensors"
    assert train.main(["moons-distill", "--seed", "4", "--out", str(out), "--device", "cpu"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["net-1.safetensors", "net-2.safetensors"]
    said = capsys.readouterr().out
    for n in (1, 2):
        tensors, metadata = weights.read(tmp_path / f"net-{n}.safetensors")
        assert metadata["command"] == "python -m diffedu.train moons-distill --seed 4"
        assert metadata["digest"] == weights.digest(tensors)
        assert metadata["digest"][:16] in said


def test_the_same_command_writes_the_same_network(short, tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        assert train.main(["moons", "--out", str(file), "--device", "cpu"]) == 0
    (one, made_one), (two, made_two) = (weights.read(file) for file in files)
    assert made_one == made_two
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_finished_checkpoint_is_not_trained_again(short, tmp_path):
    state, out = tmp_path / "state.safetensors", tmp_path / "net.safetensors"
    for _ in range(2):
        assert train.main(["moons", "--checkpoint", str(state), "--out", str(out), "--device", "cpu"]) == 0
        first = out.read_bytes()
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "net.pt"], r"--out must end in \.safetensors; got net\.pt"),
        (["--device", "gpu"], "--device must be one that this machine has; got 'gpu'"),
        (["--checkpoint", "{file}"], "is not a readable safetensors file"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(
    options, message, short, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a checkpoint")
    assert train.main(["moons", *(option.format(file="file") for option in options)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("python -m diffedu.train: ")
    assert re.search(message, error)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_asked_for_by_name_and_absent_is_an_error(short, tmp_path, capsys):
    assert train.main(["moons", "--device", "cuda", "--out", str(tmp_path / "x.safetensors")]) == 1
    assert "--device must be one that this machine has; got 'cuda'" in capsys.readouterr().err
    assert train.pick_device(None) == torch.device("cpu")


def test_help_names_every_network():
    done = subprocess.run(
        [sys.executable, "-m", "diffedu.train", "--help"], capture_output=True, text=True, check=True
    )
    names = [network.name for network in train.networks()]
    assert len(names) == 8
    assert all(name in done.stdout for name in names)
