import math

import numpy as np
import pytest
import torch
from problems import within
from scipy.linalg import sqrtm
from scipy.optimize import linear_sum_assignment
from scipy.stats import energy_distance as scipy_energy
from scipy.stats import wasserstein_distance

from diffedu.metrics import (
    Moments,
    empirical_order,
    energy_distance,
    frechet_distance,
    mmd,
    moments,
    sliced_energy,
    sliced_w2,
)

DISTANCES = {
    "sliced_w2": sliced_w2,
    "sliced_energy": sliced_energy,
    "energy": lambda x, y: math.sqrt(max(0.0, energy_distance(x, y))),
    "frechet": lambda x, y: math.sqrt(max(0.0, frechet_distance(x, y))),
}
every = pytest.mark.parametrize("distance", DISTANCES.values(), ids=DISTANCES)


@pytest.fixture
def draw(generator):
    def _draw(n=60, d=2, dtype=torch.float64):
        return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)

    return _draw


def optimal(x, y):
    """Squared W2 of two clouds of equal size, by solving the assignment problem."""
    cost = ((np.asarray(x)[:, None] - np.asarray(y)[None]) ** 2).reshape(len(x), len(y), -1).sum(-1)
    rows, columns = linear_sum_assignment(cost)
    return cost[rows, columns].mean()


def test_sliced_w2_on_the_line_is_w2(draw):
    x, y = draw(40, 1), 2 * draw(40, 1) + 1
    assert sliced_w2(x, y) == pytest.approx(math.sqrt(optimal(x, y)), rel=1e-12)
    # never below W1 (Jensen)
    assert sliced_w2(x, y) >= wasserstein_distance(x[:, 0].numpy(), y[:, 0].numpy())


def test_sliced_w2_in_the_plane_is_the_mean_over_128_equispaced_directions(draw):
    x, y = draw(15), 2 * draw(15) + 1
    turns = np.arange(128) * np.pi / 128
    squares = [optimal(x.numpy() @ u, y.numpy() @ u) for u in np.stack([np.cos(turns), np.sin(turns)], 1)]
    assert sliced_w2(x, y) == pytest.approx(math.sqrt(np.mean(squares)), rel=1e-12)


def test_sliced_w2_of_a_shift_and_of_a_scaling(draw):
    x, shift = draw(), torch.tensor([0.3, -0.4], dtype=torch.float64)
    assert sliced_w2(x, x + shift) == pytest.approx(0.5 / math.sqrt(2), rel=1e-12)
    size = float(x.square().sum(1).mean())
    assert sliced_w2(x, 1.7 * x) == pytest.approx(0.7 * math.sqrt(size / 2), rel=1e-12)


def test_beyond_the_plane_directions_come_from_a_fixed_seed(draw, global_rng_untouched):
    x, y = draw(50, 6), draw(50, 6)
    first = sliced_w2(x, y)
    torch.rand(3, generator=torch.Generator().manual_seed(5))
    assert sliced_w2(x, y) == first
    # E (u.d)^2 = |d|^2 / D; 128 directions, relative standard error of the square sqrt(2 (D-1) / (D+2) / 128)
    shift = torch.full((6,), 0.5, dtype=torch.float64)
    square = sliced_w2(x, x + shift) ** 2
    assert within(square, 1.5 / 6, 1.5 / 6 * math.sqrt(2 * 5 / 8 / 128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sliced_w2_takes_low_precision_and_gradients(dtype):
    x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    want = sliced_w2(x, 2 * x)
    assert sliced_w2(x.to(dtype), 2 * x.to(dtype)) == pytest.approx(want, rel=0.02)  # 8 bits and more
    assert sliced_w2(x.requires_grad_(), 2 * x) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("m", [60, 23])
def test_energy_distances_on_the_line_are_scipys(draw, m):
    x, y = draw(60, 1), 0.5 * draw(m, 1) + 0.3
    y[:5] = x[:5]  # ties
    want = scipy_energy(x[:, 0].numpy(), y[:, 0].numpy())
    assert sliced_energy(x, y) == pytest.approx(want, rel=1e-9)
    assert energy_distance(x, y) == pytest.approx(want**2, rel=1e-9)


@pytest.mark.parametrize("d", [2, 5])
def test_energy_distance_by_hand(draw, d):
    x, y = draw(12, d), draw(9, d) + 0.4

    def mean(a, b):
        return np.mean([math.dist(p, q) for p in a.tolist() for q in b.tolist()])

    want = 2 * mean(x, y) - mean(x, x) - mean(y, y)
    assert energy_distance(x, y) == pytest.approx(want, rel=1e-12)
    # single-precision data far from the origin keep their digits
    far = energy_distance((x + 1000).float(), (y + 1000).float())
    assert far == pytest.approx(want, rel=1e-3)


def test_sliced_energy_in_the_plane_is_a_mean_over_directions(draw):
    x, y = draw(30), draw(20) + 0.3
    turns = np.arange(128) * np.pi / 128
    lines = [
        scipy_energy(x.numpy() @ u, y.numpy() @ u) ** 2 for u in np.stack([np.cos(turns), np.sin(turns)], 1)
    ]
    assert sliced_energy(x, y) == pytest.approx(math.sqrt(np.mean(lines)), rel=1e-9)


def test_mmd_by_hand(draw):
    x, y, b = draw(12, 3), draw(9, 3) + 0.4, 0.8

    def k(p, q):
        return math.exp(-(math.dist(p, q) ** 2) / (2 * b * b))

    def own(a):
        a = a.tolist()
        return np.mean([k(p, q) for i, p in enumerate(a) for j, q in enumerate(a) if i != j])

    cross = np.mean([k(p, q) for p in x.tolist() for q in y.tolist()])
    assert mmd(x, y, b) == pytest.approx(own(x) + own(y) - 2 * cross, rel=1e-10)


def test_mmd_is_unbiased_for_two_gaussians(generator):
    # E exp(-(x-y)^2 / (2 b^2)) for x - y ~ N(m, v) is b / sqrt(b^2 + v) exp(-m^2 / (2 (b^2 + v)))
    b, m = 0.7, 0.5

    def k(mean, variance):
        return b / math.sqrt(b * b + variance) * math.exp(-(mean**2) / (2 * (b * b + variance)))

    for shift in (0.0, m):
        values = torch.tensor(
            [
                mmd(
                    torch.randn(20, 1, generator=generator),
                    shift + torch.randn(30, 1, generator=generator),
                    b,
                )
                for _ in range(400)
            ]
        )
        want = 2 * k(0, 2) - 2 * k(shift, 2)
        assert within(values.mean(), want, values.std() / 20)


@pytest.mark.parametrize("d", [1, 2, 4])
def test_frechet_distance_of_fitted_gaussians(draw, d):
    x, y = draw(50, d), draw(70, d) @ draw(d, d) + 0.3
    a, b = (np.cov(v.numpy().T).reshape(d, d) for v in (x, y))
    gap = (x.mean(0) - y.mean(0)).numpy()
    want = gap @ gap + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-9)
    assert frechet_distance(x, x + 2) == pytest.approx(4 * d, rel=1e-9)
    assert frechet_distance(x, 3 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(4 * np.trace(a), rel=1e-9)


def test_frechet_distance_on_the_line_and_of_a_degenerate_law(draw):
    x, y = draw(50, 1), 2 * draw(40, 1) + 1
    want = (x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2
    assert frechet_distance(x, y) == pytest.approx(float(want), rel=1e-9)
    flat = torch.cat([x, torch.zeros_like(x)], dim=1)
    assert frechet_distance(flat, flat + 1) == pytest.approx(2, rel=1e-9)


def test_frechet_distance_of_gaussians_whose_covariances_commute(draw):
    # C = U diag(c) U^T with one U: |m|^2 + sum of (sqrt(a) - sqrt(b))^2
    turn = torch.linalg.qr(draw(5, 5)).Q
    a, b = (torch.tensor(v, dtype=torch.float64) for v in ([4, 1, 0.25, 9, 0], [1, 1, 4, 2.25, 0.01]))
    mean = torch.tensor([0.5, 0, 0, -1, 2], dtype=torch.float64)
    x = Moments(mean, turn @ torch.diag(a) @ turn.mT, 100)
    y = Moments(torch.zeros_like(mean), turn @ torch.diag(b) @ turn.mT, 7)
    want = 5.25 + 1 + 0 + 2.25 + 2.25 + 0.01
    assert frechet_distance(x, y) == pytest.approx(want, rel=1e-7)  # the root of a rounded 0 is 1e-8
    assert frechet_distance(y, x) == pytest.approx(want, rel=1e-7)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("d", [1, 3])
def test_moments_and_samples_are_at_one_distance(draw, d):
    x, y = draw(50, d), draw(40, d) @ draw(d, d) + 0.3
    a, b = moments(x), moments(y.float())
    assert (a.n, b.n) == (50, 40)
    np.testing.assert_allclose(a.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(a.cov, np.cov(x.numpy().T).reshape(d, d), rtol=1e-12)
    assert b.mean.dtype == b.cov.dtype == torch.float64
    values = [frechet_distance(p, q) for p in (x, a) for q in (y.float(), b)]
    assert values == [values[0]] * 4
    assert frechet_distance(a, x) == pytest.approx(0, abs=1e-9)


def test_the_bias_of_the_frechet_distance_falls_as_one_over_n(generator):
    # two samples of N(0, I): the means give 2 D / n, the covariances, to first order, (D^2 + D) / (2 n)
    def mean(d, n):
        pairs = torch.randn(200, 2, n, d, generator=generator, dtype=torch.float64)
        found = torch.tensor([frechet_distance(x, y) for x, y in pairs], dtype=torch.float64)
        return found.mean(), found.std() / math.sqrt(len(found))

    for n in (200, 800):
        value, error = mean(3, n)
        assert within(value, (2 * 3 + (3**2 + 3) / 2) / n, error + 0.05 / n)


@pytest.mark.parametrize(
    ("mean", "cov", "n", "message"),
    [
        (torch.zeros(2, 1), torch.eye(2), 5, r"of shape \(D,\) and \(D, D\); got \(2, 1\), \(2, 2\)"),
        (torch.zeros(3), torch.eye(2), 5, r"got \(3,\), \(2, 2\)"),
        (torch.zeros(2), torch.eye(2), 1, "n must be an int of at least 2; got 1"),
        (torch.zeros(2), torch.eye(2) / 0, 5, "cov must be finite and float64; got torch.float64, 4 nan or"),
        (torch.zeros(2), torch.tensor([[1.0, 0.5], [0.4, 1.0]]), 5, r"cov must be symmetric; .* 0\.09"),
    ],
)
def test_moments_that_are_none_are_refused(mean, cov, n, message):
    with pytest.raises(ValueError, match=message):
        Moments(mean.double(), cov.double(), n)


def test_moments_in_single_precision_and_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match=r"mean must be finite and float64; got torch\.float32"):
        Moments(torch.zeros(2), torch.eye(2), 5)
    x, y = Moments(torch.zeros(2).double(), torch.eye(2).double(), 5), torch.randn(6, 3)
    with pytest.raises(ValueError, match=r"same D; got \(5, 2\) and \(6, 3\)"):
        frechet_distance(x, y)


@every
@pytest.mark.parametrize("d", [1, 2, 5])
def test_they_are_metrics(distance, draw, d):
    x, y, z = draw(60, d), 0.5 * draw(60, d) + 0.5, draw(60, d) - 1
    assert distance(x, x.clone()) == pytest.approx(0, abs=1e-6)
    assert distance(x, x[torch.arange(59, -1, -1)]) == pytest.approx(0, abs=1e-6)
    assert distance(x, y) > 0.1
    assert distance(x, y) == pytest.approx(distance(y, x), rel=1e-9)
    assert distance(x, z) <= distance(x, y) + distance(y, z) + 1e-12
    # moving both moves nothing
    assert distance(x + 5, y + 5) == pytest.approx(distance(x, y), rel=1e-6)
    assert distance(2 * x, 2 * y) > distance(x, y)


@every
def test_single_precision_agrees_with_double(distance, draw):
    x, y = draw(), draw() + 1
    assert distance(x.float(), y.float()) == pytest.approx(distance(x, y), rel=1e-5)
    assert type(distance(x, y)) is float


@pytest.mark.parametrize("order", [0.5, 1, 2, 3.3])
def test_the_order_of_a_power_law_is_its_power(order):
    h = torch.tensor([0.1, 0.05, 0.02, 0.01], dtype=torch.float64)
    assert empirical_order(h, 7 * h**order) == pytest.approx(order, rel=1e-12)
    assert empirical_order(h.tolist(), (7 * h**order).tolist()) == pytest.approx(order, rel=1e-12)


def test_the_order_is_the_least_squares_slope(draw):
    h, err = draw(20, 1).exp()[:, 0], draw(20, 1).exp()[:, 0]
    assert empirical_order(h, err) == pytest.approx(np.polyfit(h.log(), err.log(), 1)[0], rel=1e-9)
