import math

import numpy as np
import pytest
import torch
from problems import within
from scipy.integrate import quad
from sklearn.datasets import make_swiss_roll

from diffedu import idx, mirrors, mnist_files
from diffedu.data import checkerboard, mnist, moons, moons_law, ring, ring_law, swiss_roll, swiss_roll_law
from diffedu.metrics import sliced_w2

SAMPLERS = (swiss_roll, moons, checkerboard, ring)
LAWS = {"swiss-roll": (swiss_roll, swiss_roll_law), "moons": (moons, moons_law), "ring": (ring, ring_law)}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_generator_decides_and_nothing_else(sampler, generator, global_rng_untouched):
    legacy = np.random.get_state()[1].copy()  # noqa: NPY002 - scikit-learn could use it
    x = sampler(100, generator)
    assert (x.shape, x.dtype) == ((100, 2), torch.float32)
    assert torch.equal(x, sampler(100, torch.Generator().manual_seed(0)))
    assert not torch.equal(x, sampler(100, generator))
    assert len(sampler(1, generator)) == 1
    assert np.array_equal(legacy, np.random.get_state()[1])  # noqa: NPY002


def test_the_swiss_roll_is_scikit_learns():
    # the same law: every quantile band of the radius and of both coordinates, by two independent samples
    n = 3_000
    raw, _ = make_swiss_roll(n, noise=0.5, random_state=1)
    want = torch.from_numpy(raw[:, [0, 2]] / 7).float()
    got = swiss_roll(n, torch.Generator().manual_seed(1))
    assert sliced_w2(got, want) < 4 * floor(swiss_roll_law(), n)


def floor(law, n, pairs=4):
    """Mean sliced W2 of two samples of one law."""
    g = torch.Generator().manual_seed(99)
    return sum(sliced_w2(law.sample(n, g), law.sample(n, g)) for _ in range(pairs)) / pairs


@pytest.mark.parametrize("name", LAWS)
def test_a_sampler_draws_from_its_law(name):
    sampler, law = LAWS[name]
    law, n, pairs = law(), 2_000, 8
    g = torch.Generator().manual_seed(7)
    x = [sampler(n, g).double() for _ in range(pairs)]
    # sliced W2 at its floor: mean squared distances of law-sampler and law-law pairs agree
    mixed = torch.tensor([sliced_w2(a, law.sample(n, g)) ** 2 for a in x])
    own = torch.tensor([sliced_w2(law.sample(n, g), law.sample(n, g)) ** 2 for _ in x])
    se = math.sqrt((mixed.var() + own.var()) / pairs)
    assert abs(mixed.mean() - own.mean()) < 4 * se
    # and the moments, to 4 standard errors of all draws together
    x = torch.cat(x)
    mean = law.weights @ law.means
    second = torch.einsum("k,kde->de", law.weights, law.covs + law.means[:, :, None] * law.means[:, None, :])
    products = torch.einsum("bd,be->bde", x, x)
    assert within(x.mean(0), mean, x.std(0) / math.sqrt(len(x)))
    assert within(products.mean(0), second, products.std(0) / math.sqrt(len(x)))
    # mean log-density of the draws = minus the entropy, known by draws from the law itself
    fit, same = law.log_prob(x[:n]), law.log_prob(law.sample(n, g))
    assert within(fit.mean(), same.mean(), math.sqrt((fit.var() + same.var()) / n))


@pytest.mark.parametrize(
    ("law", "nodes"), [(swiss_roll_law, 400), (moons_law, 200)], ids=["swiss-roll", "moons"]
)
def test_twice_as_many_nodes_change_nothing_where_the_data_lie(law, nodes, generator):
    coarse, fine = law(), law(2 * nodes)
    assert len(fine.weights) == 2 * len(coarse.weights)
    x = fine.sample(1_000, generator)
    assert float((coarse.log_prob(x) - fine.log_prob(x)).abs().max()) < 1e-9
    assert float((coarse.score(x) - fine.score(x)).abs().max()) < 1e-8


def test_the_law_of_the_roll_is_the_integral_over_its_curve():
    law, std = swiss_roll_law(), 0.5 / 7
    for point in ([0.0, -0.65], [0.05, 2.0], [1.2, -0.4], [-0.8, 1.1]):  # the ends of the curve, two more

        def density(u, point=point):
            angle = 1.5 * math.pi * (1 + 2 * u)
            x, y = point[0] - angle * math.cos(angle) / 7, point[1] - angle * math.sin(angle) / 7
            return math.exp(-0.5 * (x * x + y * y) / std**2) / (2 * math.pi * std**2)

        want = quad(density, 0, 1, epsabs=1e-15, epsrel=1e-11, limit=1000)[0]
        got = float(law.log_prob(torch.tensor([point], dtype=torch.float64)).exp())
        assert got == pytest.approx(want, rel=1e-8, abs=1e-13)


def test_moons_are_two_half_circles(generator):
    x = moons(40_000, generator) / 1.45 + torch.tensor([0.5, 0.25])
    upper = (x[:, 0] ** 2 + x[:, 1] ** 2).sqrt() - 1
    lower = ((x[:, 0] - 1) ** 2 + (x[:, 1] - 0.5) ** 2).sqrt() - 1
    on_upper = upper.abs() < lower.abs()
    distance = torch.where(on_upper, upper, lower).double()
    # noise 0.06 across the circle; the overlap of the moons and the ends cost a little
    assert float(distance.std()) == pytest.approx(0.06, rel=0.05)
    share = on_upper.double()
    assert within(share.mean(), 0.5, share.std() / 200)
    # the angle is uniform: two windows of 0.8 rad, away from where the lower circle crosses the upper one
    angle = torch.atan2(x[on_upper, 1], x[on_upper, 0])
    windows = torch.stack([(angle > low) & (angle < low + 0.8) for low in (0.3, 2.04)]).double()
    assert within(windows.mean(1), 0.8 / math.pi, windows[0].std() / math.sqrt(len(angle)))


def test_the_checkerboard_is_uniform_on_eight_squares(generator):
    n = 80_000
    x = checkerboard(n, generator)
    assert float(x.min()) >= -2
    assert float(x.max()) <= 2
    cell = (x + 2).floor().long().clamp(0, 3)
    assert bool(((cell.sum(1) % 2) == 0).all())
    counts = torch.bincount(4 * cell[:, 0] + cell[:, 1], minlength=16)
    dark = counts[counts > 0].double()
    assert len(dark) == 8
    assert within(dark / n, 1 / 8, math.sqrt(1 / 8 * 7 / 8 / n))
    inside = (x + 2) - cell
    assert within(inside.mean(0), 0.5, math.sqrt(1 / 12 / n))
    assert within((inside**2).mean(0), 1 / 3, math.sqrt(4 / 45 / n))


def test_the_ring_has_eight_equal_beads(generator):
    law = ring_law()
    torch.testing.assert_close(law.means.norm(dim=1), torch.full((8,), 1.4, dtype=torch.float64))
    gaps = torch.pdist(law.means).sort().values[:8]
    torch.testing.assert_close(gaps, torch.full((8,), 2.8 * math.sin(math.pi / 8), dtype=torch.float64))
    torch.testing.assert_close(law.covs, 0.01 * torch.eye(2, dtype=torch.float64).expand(8, 2, 2))


def test_mnist_is_of_the_types_and_shapes_of_the_contract(monkeypatch, tmp_path, capsys):
    images, labels = mnist_files.subset("test")
    for name, array in zip(mnist_files.FILES["test"], (images, labels), strict=True):
        (tmp_path / name).write_bytes(idx.encode(array))
    monkeypatch.setattr(mnist_files, "FULL", mnist_files.SUBSET)
    got = mnist("test", tmp_path)
    assert (got[0].dtype, got[0].shape) == (torch.uint8, (2000, 28, 28))
    assert (got[1].dtype, got[1].shape) == (torch.int64, (2000,))
    assert torch.equal(got[0], images)
    assert got[1].tolist() == labels.tolist()
    monkeypatch.setenv("DIFFEDU_DATA", str(tmp_path))
    assert torch.equal(mnist("test", full=True)[0], images)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(TypeError):
        mnist("test", tmp_path, True)


def test_mnist_without_a_source_is_the_subset_or_an_error(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("DIFFEDU_DATA", raising=False)
    monkeypatch.setattr(mnist_files, "MIRRORS", ())
    monkeypatch.setattr(mirrors, "cache", lambda: tmp_path)
    images, labels = mnist("train")
    assert (images.shape, labels.dtype) == ((8000, 28, 28), torch.int64)
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ValueError, match="DIFFEDU_DATA"):
        mnist("train", full=True)
    with pytest.raises(ValueError, match="split must be one of"):
        mnist("validation")
