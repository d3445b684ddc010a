import pytest
import torch

from diffedu import weights

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(3),
    "c": torch.ones(2, dtype=torch.float16),
}


def test_what_is_written_is_read(tmp_path):
    file = tmp_path / "new" / "folder" / "x.safetensors"
    weights.write(file, TENSORS, {"seed": "3"})
    tensors, metadata = weights.read(file)
    assert metadata == {"seed": "3"}
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        torch.testing.assert_close(tensors[name], value, rtol=0, atol=0)
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_views_and_gradients_are_written_as_plain_values(tmp_path):
    file, whole = tmp_path / "x.safetensors", torch.arange(12.0, requires_grad=True).reshape(3, 4)
    weights.write(file, {"column": whole[:, 1], "turned": whole.T}, {})
    tensors, _ = weights.read(file)
    assert tensors["column"].tolist() == [1.0, 5.0, 9.0]
    assert torch.equal(tensors["turned"], whole.detach().T)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path):
    with pytest.raises(AttributeError):
        weights.write(tmp_path / "x.safetensors", {"a": "no tensor"}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"x" * 300, None])
def test_a_file_that_is_none_is_refused(content, tmp_path):
    file = tmp_path / "x.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors is not a readable safetensors file"):
        weights.read(file)


def test_the_digest_is_of_names_types_shapes_and_values():
    whole = weights.digest(TENSORS)
    assert weights.digest(dict(reversed(TENSORS.items()))) == whole
    assert (
        weights.digest({"a": torch.arange(6.0).reshape(3, 2).T.contiguous().T} | {"b": TENSORS["b"]}) != whole
    )
    others = [
        {**TENSORS, "a": TENSORS["a"].reshape(3, 2)},
        {**TENSORS, "b": torch.tensor(4)},
        {**TENSORS, "b": torch.tensor(3, dtype=torch.int32)},
        {"d" if name == "c" else name: value for name, value in TENSORS.items()},
    ]
    assert len({whole, *(weights.digest(other) for other in others)}) == 5
    strided = torch.arange(6.0).reshape(3, 2).T
    assert weights.digest({"a": strided}) == weights.digest({"a": strided.contiguous()})


def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"name must be one of \[.*'moons'.*'swiss-roll'.*\]; got 'spiral'"):
        weights.shipped("spiral")


def test_a_damaged_shipped_file_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "pretrained"
    tensors, metadata = weights.shipped("moons")
    first = next(iter(tensors))
    tensors[first] = tensors[first] + 1e-3
    weights.write(folder / "moons.safetensors", tensors, metadata)
    monkeypatch.setattr(weights, "files", lambda package: tmp_path)
    with pytest.raises(ValueError, match=r"moons\.safetensors is damaged"):
        weights.shipped("moons")
