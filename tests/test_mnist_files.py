"""No test here asks a mirror or the user's cache; the real files are read where DIFFEDU_DATA names them."""

import gzip
import hashlib
import math
import os
import shutil
from fractions import Fraction
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import torch

from diffedu import idx, mirrors, mnist_files
from diffedu.mnist_files import FILES, FULL, SUBSET, arrays, subset
from mnist_subset import evenly_of_each_class

REAL = os.environ.get("DIFFEDU_DATA")
IMAGES, LABELS = FILES["test"]
# As published and printed in many places: the first labels, and how many digits of each class there are.
FIRST = {"train": [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], "test": [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]}
COUNTS = {
    "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
}
GREY = {"train": (0.1307, 0.3081), "test": (0.1325, 0.3105)}  # with which many normalise


@pytest.fixture(autouse=True)
def nothing_of_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("DIFFEDU_DATA", raising=False)
    monkeypatch.setattr(mirrors, "cache", lambda: tmp_path / "cache")
    monkeypatch.setattr(mnist_files, "MIRRORS", ())
    mirrors.forget()
    yield
    mirrors.forget()


@pytest.fixture(scope="module")
def test_files():
    """Two real files of digits, by name: the subset's test part, uncompressed."""
    return {name: idx.encode(array) for name, array in zip((IMAGES, LABELS), subset("test"), strict=True)}


@pytest.fixture
def folder(tmp_path, monkeypatch, test_files):
    """A folder of these files, which pass for the originals."""
    monkeypatch.setattr(mnist_files, "FULL", SUBSET)
    return fill(tmp_path / "given", test_files)


def fill(folder, contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


def same(got, want):
    return all(a.dtype == torch.uint8 and torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("split", "n"), [("train", 800), ("test", 200)])
def test_the_subset_is_balanced_and_as_grey_as_mnist(split, n):
    images, labels = subset(split)
    assert (images.shape, images.dtype, labels.dtype) == ((10 * n, 28, 28), torch.uint8, torch.uint8)
    assert labels.bincount().tolist() == 10 * [n]
    # mean and standard deviation as of the whole split; the first 200 test digits of each class miss them
    grey, (mean, std) = images.double() / 255, GREY[split]
    assert float(grey.mean()) == pytest.approx(mean, abs=5e-4)
    assert float(grey.std()) == pytest.approx(std, abs=5e-4)


def test_the_subset_takes_no_more_room_than_it_may():
    folder = Path(mnist_files.__file__).parent / "mnist"
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{name}.xz" for name in FULL)
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 1_500_000


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("damage", [lambda c: c[:-20], lambda c: c[:300] + bytes([c[300] ^ 4]) + c[301:]])
def test_a_damaged_subset_is_refused(name, damage, tmp_path, monkeypatch):
    folder = shutil.copytree(Path(mnist_files.__file__).parent / "mnist", tmp_path / "mnist")
    (folder / f"{name}.xz").write_bytes(damage((folder / f"{name}.xz").read_bytes()))
    monkeypatch.setattr(mnist_files, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=rf"{name}\.xz cannot be read, or is cut short or damaged"):
        subset("train" if name.startswith("train") else "test")


def test_the_rows_of_the_subset_are_evenly_spaced_in_each_class():
    assert evenly_of_each_class(torch.arange(70) % 10, 7).tolist() == list(range(70))
    assert evenly_of_each_class(torch.arange(70) % 10, 1).tolist() == list(range(10))
    # class 4 has the rows 0 to 4 here; of five, two are the first and the third
    labels = torch.tensor([4] * 5 + [0, 1, 2, 3, 5, 6, 7, 8, 9] * 2)
    assert evenly_of_each_class(labels, 2).tolist() == [0, 2, *range(5, 23)]


@pytest.mark.skipif(not REAL, reason="DIFFEDU_DATA names no folder of the original files")
@pytest.mark.parametrize("split", FILES)
def test_the_original_files(split):
    images, labels = arrays(split, REAL)
    assert images.shape == (sum(COUNTS[split]), 28, 28)
    assert labels.bincount().tolist() == COUNTS[split]
    assert labels[:10].tolist() == FIRST[split]
    grey = images.double() / 255
    assert [float(grey.mean()), float(grey.std())] == pytest.approx(GREY[split], abs=6e-5)
    # and the subset: in each class of m digits those at floor(i m / n)
    small, small_labels = subset(split)
    n, rows = len(small_labels) // 10, []
    for c in range(10):
        of_class = np.flatnonzero(labels.numpy() == c)
        rows += [of_class[math.floor(Fraction(i * len(of_class), n))] for i in range(n)]
    rows.sort()
    assert np.array_equal(small.numpy(), images.numpy()[rows])
    assert np.array_equal(small_labels.numpy(), labels.numpy()[rows])


def test_a_folder_is_found_in_each_of_its_forms(folder, test_files, tmp_path, monkeypatch, capsys):
    want = subset("test")
    packed = {f"{name}.gz": gzip.compress(content) for name, content in test_files.items()}
    assert same(arrays("test", folder), want)
    assert same(arrays("test", str(folder), full=True), want)
    assert same(arrays("test", fill(tmp_path / "packed", packed)), want)
    assert same(arrays("test", fill(tmp_path / "torch" / "MNIST" / "raw", packed).parents[1]), want)
    fill(tmp_path / "torch" / "MNIST" / "raw", test_files)
    assert same(arrays("test", tmp_path / "torch"), want)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert same(arrays("test", "~/given"), want)
    monkeypatch.setenv("DIFFEDU_DATA", str(folder))
    assert same(arrays("test"), want)
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "cache").exists()


def test_root_goes_before_the_environment_and_that_before_the_cache(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DIFFEDU_DATA", str(tmp_path / "none"))
    assert len(arrays("test", folder)[0]) == 2000
    with pytest.raises(ValueError, match=rf"root, or DIFFEDU_DATA, must be a folder .*got {tmp_path}/none"):
        arrays("test")
    fill(tmp_path / "cache", {name: (folder / name).read_bytes() for name in (IMAGES, LABELS)})
    with pytest.raises(ValueError, match=f"got {tmp_path}/none"):
        arrays("test")
    monkeypatch.setenv("DIFFEDU_DATA", "")
    assert same(arrays("test", full=True), subset("test"))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", [IMAGES, LABELS])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:-1], r"must be \d+ bytes long for an array of shape \(2000"),
        (lambda c: c + b"\0", r"must be \d+ bytes long"),
        (lambda c: c[:6], "ends within its header"),
        (lambda c: b"", "is not an IDX file of unsigned bytes.*an empty file"),
        (lambda c: b"PK" + c[2:], "is not an IDX file of unsigned bytes.*got 50 4b 08"),
        (lambda c: c[:3] + bytes([c[3] + 1]) + c[4:], "must be|ends within"),
        (
            lambda c: c[:1000] + bytes([c[1000] ^ 1]) + c[1001:],
            "damaged or not MNIST's: .*SHA-256 [0-9a-f]{64}",
        ),
        (lambda c: c[:-1] + bytes([c[-1] ^ 128]), "damaged or not MNIST's"),
        (lambda c: c[:4] + bytes([0, 0, 0, 1]) + c[8:16] + c[16:800], "must be|damaged"),
    ],
)
def test_a_damaged_file_of_the_folder_is_named_and_never_replaced(name, damage, message, folder):
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(ValueError, match=rf"(?s){folder / name} .*{message}"):
        arrays("test", folder)


def test_a_damaged_packed_file_is_named(test_files, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist_files, "FULL", SUBSET)
    packed = {f"{name}.gz": gzip.compress(content) for name, content in test_files.items()}
    folder = fill(tmp_path / "packed", packed)
    for damage in (packed[f"{IMAGES}.gz"][:-100], b"no gzip", b""):
        (folder / f"{IMAGES}.gz").write_bytes(damage)
        with pytest.raises(ValueError, match=rf"{IMAGES}\.gz (cannot be read|is not an IDX file)"):
            arrays("test", folder)


def test_a_folder_without_the_files_is_refused(folder, tmp_path):
    for root in (tmp_path / "none", folder / IMAGES, tmp_path):
        with pytest.raises(ValueError, match=rf"holds {IMAGES} or {IMAGES}\.gz, .*; got {root}, where"):
            arrays("test", root)
    (folder / LABELS).unlink()
    with pytest.raises(ValueError, match=rf"holds {LABELS} or"):
        arrays("test", folder)
    with pytest.raises(ValueError, match=f"holds {FILES['train'][0]} or"):
        arrays("train", folder)


def test_other_files_of_the_same_form_are_not_mnist(folder, monkeypatch):
    monkeypatch.setattr(mnist_files, "FULL", FULL)
    with pytest.raises(ValueError, match=f"must have the SHA-256 {FULL[IMAGES]}; got {SUBSET[IMAGES]}"):
        arrays("test", folder)


@pytest.mark.parametrize("split", ["val", "Train", "", None, 0, ["train"]])
def test_an_unknown_split_is_refused(split):
    for call in (arrays, subset):
        with pytest.raises(ValueError, match=r"split must be one of \['test', 'train'\]; got "):
            call(split)


@pytest.mark.parametrize(("split", "n"), [("train", "8,000"), ("test", "2,000")])
def test_without_network_and_cache_the_subset_comes_with_one_line(split, n, capsys):
    assert same(arrays(split), subset(split))
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    for part in (f"only the {n} {split} digits", "no mirror", "full=True", "root", "DIFFEDU_DATA"):
        assert part in err


def test_without_network_and_cache_the_full_set_is_an_error_that_says_what_to_do(capsys, tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match=r"no mirror.*connect to the network.*root .*DIFFEDU_DATA"):
            arrays("test", full=True)
    assert capsys.readouterr() == ("", "")
    assert not list((tmp_path / "cache").glob("*"))


def test_only_the_full_set_asked_for_asks_the_mirrors_anew(monkeypatch):
    asked = []
    monkeypatch.setattr(mirrors, "forget", lambda: asked.append("forget"))
    arrays("test")
    assert asked == []
    with pytest.raises(ValueError, match="no mirror"):
        arrays("test", full=True)
    assert asked == ["forget"]


def test_a_cache_with_half_of_the_files_is_no_cache(folder, tmp_path, capsys):
    fill(tmp_path / "cache", {IMAGES: (folder / IMAGES).read_bytes()})
    arrays("test")
    assert f"because {LABELS} is not in the cache" in capsys.readouterr().err


def test_a_damaged_cache_is_not_used(folder, tmp_path, capsys):
    content = (folder / IMAGES).read_bytes()
    fill(tmp_path / "cache", {IMAGES: content[:-1] + b"\1", LABELS: (folder / LABELS).read_bytes()})
    assert same(arrays("test"), subset("test"))
    assert f"because {IMAGES} is not in the cache" in capsys.readouterr().err


def test_the_mirrors_are_asked_over_tls_for_files_of_the_published_names(monkeypatch):
    monkeypatch.undo()
    assert len(mnist_files.MIRRORS) >= 2
    for mirror in mnist_files.MIRRORS:
        assert mirror.startswith("https://")
        assert mirror.endswith("/")
    assert sorted(FULL) == sorted(SUBSET) == sorted(name for names in FILES.values() for name in names)
    assert all(
        len(digest) == 2 * hashlib.sha256().digest_size for digest in (*FULL.values(), *SUBSET.values())
    )


def test_the_mirrors_fill_the_cache_and_the_cache_serves(folder, test_files, tmp_path, monkeypatch, capsys):
    packed = {f"{name}.gz": gzip.compress(content) for name, content in test_files.items()}
    damaged = {name: content[:-9] + bytes(9) for name, content in packed.items()}
    fill(tmp_path / "site" / "good", packed)
    fill(tmp_path / "site" / "bad", damaged)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = partial(Quiet, directory=str(tmp_path / "site"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(
            mnist_files, "MIRRORS", (f"{address}/none/", f"{address}/bad/", f"{address}/good/")
        )
        assert same(arrays("test"), subset("test"))
        server.shutdown()
        thread.join()
    assert "only the" not in capsys.readouterr().err  # which has the progress of the download
    assert {p.name: p.read_bytes() for p in (tmp_path / "cache").iterdir()} == test_files
    mirrors.forget()
    assert same(arrays("test", full=True), subset("test"))
    assert capsys.readouterr() == ("", "")


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass
