"""The command, run as a user runs it."""

import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from diffedu import train, weights
from diffedu.digit_students import MNIST_CONSISTENCY, MNIST_DISTILLED
from diffedu.digits import MNIST
from diffedu.networks import MLP
from diffedu.refinement import Refinement
from diffedu.teachers import MOONS, SWISS_ROLL
from diffedu.training import Recipe, fit


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
    few = Recipe(steps=4, lr=1e-3, ema=0.9, beta2=0.99, warmup=1)
    monkeypatch.setattr(train, "MNIST", replace(MNIST, batch=4, recipe=few))
    halving = replace(MNIST_DISTILLED, batch=4, generations=((2, few), (1, few)))
    monkeypatch.setattr(train, "MNIST_DISTILLED", halving)
    consistency = replace(MNIST_CONSISTENCY, batch=4, recipe=few, division=Refinement(4, 2, 4))
    monkeypatch.setattr(train, "MNIST_CONSISTENCY", consistency)


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


def digits(tmp_path, *options):
    """The command on the shipped subset; the file that it writes."""
    out = tmp_path / "net.safetensors"
    assert train.main(["mnist", "--subset", "--device", "cpu", "--out", str(out), *options]) == 0
    return weights.read(out)


def test_the_digits_command_takes_its_budget_in_images_and_keeps_a_log(short, tmp_path):
    log = tmp_path / "logs" / "run.jsonl"
    options = ["--images", "10", "--lr", "2e-3", "--ema", "0.5", "--every", "2", "--log", str(log)]
    tensors, made = digits(tmp_path, *options)
    assert made["digest"] == weights.digest(tensors)
    command = "python -m diffedu.train mnist --seed 0 --images 12 --batch 4 --lr 0.002 --ema 0.5 --subset"
    assert made["command"] == command
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["step"], line["samples"]) for line in lines] == [(2, 8), (3, 12)]
    for line in lines:
        with Image.open(log.with_name(line["picture"])) as picture:
            assert picture.size == (8 * 28, 7 * 28)  # fifty digits


def test_the_students_command_writes_a_file_and_a_log_for_each_generation(short, tmp_path, capsys):
    out, log = tmp_path / "net.safetensors", tmp_path / "run.jsonl"
    options = ["--images", "16", "--log", str(log), "--subset", "--device", "cpu", "--out", str(out)]
    assert train.main(["mnist-distill", *options]) == 0
    said = capsys.readouterr().out
    for n in (2, 1):
        tensors, made = weights.read(tmp_path / f"net-{n}.safetensors")
        command = "python -m diffedu.train mnist-distill --seed 0 --images 16 --batch 4 --subset"
        assert made["command"] == command
        assert made["digest"] == weights.digest(tensors)
        assert made["digest"][:16] in said
        (line,) = (tmp_path / f"run-{n}.jsonl").read_text().splitlines()
        assert json.loads(line)["samples"] == 8


def test_the_consistency_command_writes_one_file(short, tmp_path):
    out = tmp_path / "net.safetensors"
    options = ["--images", "8", "--lr", "2e-3", "--subset", "--device", "cpu", "--out", str(out)]
    assert train.main(["mnist-consistency", *options]) == 0
    tensors, made = weights.read(out)
    command = "python -m diffedu.train mnist-consistency --seed 0 --images 8 --batch 4"
    assert made["command"] == f"{command} --lr 0.002 --ema 0.9 --subset"
    assert made["digest"] == weights.digest(tensors)
    assert tensors.keys() == weights.shipped("mnist")[0].keys()


def test_a_killed_digits_command_ends_where_an_unbroken_one_ends(short, tmp_path):
    whole = digits(tmp_path)
    state = tmp_path / "state.safetensors"
    script = (
        "import os, sys; from dataclasses import replace; from diffedu import train, training;"
        "save = training._Run.save;"
        "training._Run.save = lambda run, path: (save(run, path), os.kill(os.getpid(), 9));"
        "recipe = training.Recipe(steps=4, lr=1e-3, ema=0.9, beta2=0.99, warmup=1);"
        "train.MNIST = replace(train.MNIST, batch=4, recipe=recipe); train.main(sys.argv[1:])"
    )
    command = ["mnist", "--subset", "--device", "cpu", "--checkpoint", str(state), "--every", "2"]
    killed = subprocess.run([sys.executable, "-c", script, *command], cwd=tmp_path, check=False)
    assert killed.returncode == -9
    assert len(weights.read(state)[0]["losses"]) == 2
    resumed = digits(tmp_path, "--checkpoint", str(state))
    assert resumed[1]["digest"] == whole[1]["digest"]


@pytest.mark.parametrize("training", [MNIST, MNIST_CONSISTENCY])
def test_two_processes_make_the_network_that_one_makes(training, tmp_path):
    """Same global batches, same gradients: what accelerate launches, and one process, write one network."""
    options = [training.name, "--subset", "--device", "cpu", "--images", "24", "--batch", "8", "--ema", "0"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    state = tmp_path / "two-state.safetensors"
    script = tmp_path / "single.py"  # without bf16, whose rounding depends on the batch
    script.write_text(
        "import contextlib, sys\nfrom diffedu import digit_students, digits, train\n"
        "for module in (digit_students, digits):\n"
        "    module.half_precision = lambda device: contextlib.nullcontext()\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    for name, way in (("two", [*launch, str(script)]), ("one", [str(script)])):
        place = ["--out", f"{name}.safetensors", "--checkpoint", f"{name}-state.safetensors"]
        done = subprocess.run(
            [sys.executable, *way, *options, *place],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("digest") == 1  # the first process alone speaks
    two, one = (weights.read(tmp_path / f"{name}-state.safetensors")[0] for name in ("two", "one"))
    assert state.exists()
    torch.testing.assert_close(two["losses"], one["losses"], rtol=1e-5, atol=0)
    assert torch.equal(two["generator"], one["generator"])
    start = dict(training.start(0).requires_grad_(False).named_parameters())
    for name in one:
        if name.endswith("exp_avg"):  # linear in the gradients, as the weights are not
            assert float((two[name] - one[name]).norm()) <= 1e-3 * float(one[name].norm()) + 1e-9, name
    for name, value in start.items():
        moved = (one[f"net.{name}"] - value).norm()
        # Adam's first steps are the gradient's sign: rounding alone turns some that are almost 0
        assert float((two[f"net.{name}"] - one[f"net.{name}"]).norm()) <= 0.02 * float(moved), name


def test_one_network_of_the_toys_is_trained_by_one_process(short, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train.main(["moons", "--out", str(tmp_path / "net.safetensors"), "--device", "cpu"]) == 1
    assert "moons is trained by one process; got WORLD_SIZE=2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "0"], "images must be an int of at least 1; got 0"),
        (["--batch", "0"], "--batch must be an int of at least 1; got 0"),
        (["--lr", "0"], "lr must be positive; got 0.0"),
        (["--ema", "1"], r"ema must lie in \[0, 1\); got 1.0"),
        (["--every", "0"], "every must be an int of at least 1; got 0"),
        (["--checkpoint", "file/state"], "file"),
        (["--log", "file/log"], "file"),
        (["--out", "file/net.safetensors"], "file"),
        (["--checkpoint", "toy"], r"toy .*holds a network of .*layers.*this one has"),
    ],
)
def test_bad_options_of_the_digits_command_are_refused(
    options, message, short, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file where a folder is needed")
    if "toy" in options:  # a checkpoint of a network of another shape, by the same recipe
        fit(
            MLP(),
            lambda net, generator: net(torch.ones(1, 2), torch.ones(1)).square().sum(1),
            train.MNIST.recipe,
            torch.Generator(),
            checkpoint="toy",
            progress=False,
        )
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert train.main(["mnist", "--subset", "--device", "cpu", *options]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error.splitlines()[-1])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_folder_asked_for_must_hold_mnist(short, tmp_path, capsys):
    assert train.main(["mnist", "--root", str(tmp_path), "--out", str(tmp_path / "net.safetensors")]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_help_for_the_digits_says_what_a_newcomer_asks():
    done = subprocess.run(
        [sys.executable, "-m", "diffedu.train", "mnist", "--help"], capture_output=True, text=True, check=True
    )
    for option in (
        "--images",
        "--batch",
        "--checkpoint",
        "--device",
        "--seed",
        "--log",
        "--root",
        "--subset",
    ):
        assert option in done.stdout
    said = " ".join(done.stdout.split())
    assert "goes on where it stood" in said
    restart = f"{MNIST.recipe.restart * MNIST.batch:,}"
    assert f"second time from image {restart} on; any other budget or batch has one such cycle" in said


def test_help_speaks_of_a_second_cycle_where_there_is_one():
    done = subprocess.run(
        [sys.executable, "-m", "diffedu.train", MNIST_CONSISTENCY.name, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "second time" not in done.stdout


def test_help_names_every_network():
    done = subprocess.run(
        [sys.executable, "-m", "diffedu.train", "--help"], capture_output=True, text=True, check=True
    )
    names = [network.name for network in train.networks()]
    assert len(names) == 12
    assert all(name in done.stdout for name in names)
