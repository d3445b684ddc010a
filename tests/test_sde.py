import math
from itertools import pairwise

import pytest
import torch
from problems import MAIN, exact, gaussian, mix, within

from diffedu.metrics import empirical_order
from diffedu.schedules import VE, VP
from diffedu.sde import (
    BrownianPath,
    ddpm_chain,
    euler_maruyama,
    forward_drift,
    ncsn_chain,
    perturb,
    reverse_drift,
)

every = pytest.mark.parametrize("schedule", MAIN.values(), ids=MAIN)


class Fixed:
    """A path whose every increment is given."""

    def __init__(self, shape, dw):
        self.shape, self.dw = torch.Size(shape), dw

    def increment(self, t, s):
        return torch.full(self.shape, self.dw, dtype=torch.float64)


# ---- Brownian paths


@pytest.mark.equation("eq-forward-sde")
def test_brownian_increments_are_independent_and_of_variance_h(generator, global_rng_untouched):
    n, draws = 16, 20_000
    path = BrownianPath(n, (draws,), generator)
    w = torch.stack([path.increment(k / n, (k + 1) / n) for k in range(n)])
    assert w.dtype == torch.float64
    products = w @ w.T / draws
    # variances 1/n, covariances 0; standard errors sqrt(2) / n and 1 / n over the root of the draws
    se = (torch.ones(n, n) + (math.sqrt(2) - 1) * torch.eye(n)) / n / math.sqrt(draws)
    assert within(products, torch.eye(n) / n, se)
    assert within(w.mean(1), 0, math.sqrt(1 / n / draws))
    kurtosis = (w**4).mean() * n**2
    assert within(kurtosis, 3, math.sqrt(96 / w.numel()))


@pytest.mark.equation("eq-forward-sde")
def test_refining_a_path_keeps_its_law(generator):
    draws = 20_000
    path = BrownianPath(1, (draws,), generator)
    times = [0.5, 0.1, 0.9, 0.3, 0.30001, 0.75, 1.0]  # in an order that no grid has
    w = torch.stack([path(t) for t in times])
    s = torch.tensor(times, dtype=torch.float64)
    cov = torch.minimum(s[:, None], s)
    # Isserlis: Var(W_s W_t) = s t + min(s, t)^2
    assert within(w @ w.T / draws, cov, ((s[:, None] * s + cov**2) / draws).sqrt())


def test_refining_a_path_changes_nothing_that_was_asked_before(generator):
    path = BrownianPath(4, (50, 2), generator)
    known = {t: path(t).clone() for t in (0.0, 0.2, 0.25, 0.5, 0.61, 1.0)}
    assert torch.equal(known[0.0], torch.zeros(50, 2, dtype=torch.float64))
    whole = path.increment(0.2, 0.61)
    pieces = [0.2, 0.21, 0.25, 0.3333, 0.5, 0.6, 0.61]
    total = sum(path.increment(t, s) for t, s in pairwise(pieces))
    torch.testing.assert_close(total, whole, rtol=0, atol=1e-14)
    for t, value in known.items():
        assert torch.equal(path(t), value)
    assert torch.equal(path.increment(0.61, 0.2), -whole)
    assert torch.equal(path.increment(0.3, 0.3), torch.zeros(50, 2, dtype=torch.float64))


def test_a_path_comes_from_its_generator():
    paths = [BrownianPath(8, (3,), torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    values = [path(0.37) for path in paths]
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[0], values[2])


# ---- drifts


def density(schedule, x, t):
    """p_t of the audit's mixture on the line, differentiable in x and t."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    total = 0
    for w, m, s in ((0.3, -1.5, 0.3), (0.7, 0.8, 0.4)):
        variance = alpha**2 * s**2 + sigma**2
        total = (
            total + w * torch.exp(-0.5 * (x - alpha * m) ** 2 / variance) / (2 * math.pi * variance).sqrt()
        )
    return total


def grad(values, wrt):
    return torch.autograd.grad(values.sum(), wrt, create_graph=True)[0]


@every
@pytest.mark.parametrize("eta", ["forward", 0.0, 0.5, 1.0, 2.0])
@pytest.mark.equation("eq-linear-sde")
def test_every_drift_moves_the_density_as_fokker_planck_says(schedule, eta):
    for now in (0.1, 0.5):
        spread = 4 * math.sqrt(1.25 * schedule.alpha(now) ** 2 + schedule.sigma(now) ** 2)
        x = torch.linspace(-spread, spread, 101, dtype=torch.float64).requires_grad_(True)
        t = torch.full((101,), now, dtype=torch.float64, requires_grad=True)
        p, g2 = density(schedule, x, t), schedule.g2(now)
        if eta == "forward":
            drift = forward_drift(schedule, x[:, None], t.detach())[:, 0]
            diffusion = 0.5 * g2
        else:  # run in reverse time, the noise eta g enters with the other sign
            drift = reverse_drift(exact(mix(), schedule), x[:, None], t.detach(), eta)[:, 0]
            diffusion = -0.5 * eta**2 * g2
        change = -grad(drift * p, x) + diffusion * grad(grad(p, x), x)
        scale = grad(p, t).abs().max()
        torch.testing.assert_close(change / scale, grad(p, t) / scale, rtol=0, atol=1e-10)


def test_drifts_take_one_time_or_one_each(generator):
    x, law = torch.randn(4, 2, dtype=torch.float64, generator=generator), gaussian(dim=2)
    t = torch.tensor([0.1, 0.3, 0.5, 0.9], dtype=torch.float64)
    for drift in (
        lambda x, t: forward_drift(VP(), x, t),
        lambda x, t: reverse_drift(exact(law, VP()), x, t),
        lambda x, t: perturb(VP(), x, t, torch.ones_like(x)),
    ):
        each = torch.cat([drift(x[i : i + 1], float(t[i])) for i in range(4)])
        torch.testing.assert_close(drift(x, t), each, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(drift(x, t[0]), drift(x, float(t[0])), rtol=1e-12, atol=1e-14)
        for single in (drift(x.float(), t), drift(x.float(), 0.3)):
            assert single.dtype == torch.float32
    # the standard Gaussian stays what it is under VP: with eta = 0 nothing moves
    torch.testing.assert_close(reverse_drift(exact(law, VP()), x, 0.4, 0.0), 0 * x, rtol=0, atol=1e-12)


@every
@pytest.mark.equation("eq-kernel")
@pytest.mark.equation("eq-noising")
def test_perturb_draws_from_the_kernel(schedule, generator):
    images = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=generator)
    eps = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=generator)
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64)
    x = perturb(schedule, images, t, eps)
    for i in range(3):
        now = float(t[i])
        torch.testing.assert_close(x[i], schedule.alpha(now) * images[i] + schedule.sigma(now) * eps[i])


# ---- Euler-Maruyama


def recursion(schedule, ts, mean, variance):
    """Moments of Euler-Maruyama from probes of single steps with the noises 0 and 1."""
    x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for t, s in pairwise(ts):
        silent, noisy = (euler_maruyama(schedule, x, [t, s], Fixed((2, 1), dw)) for dw in (0.0, 1.0))
        a, g = float(silent[1] - silent[0]), float((noisy - silent)[0])
        mean, variance = a * mean, a * a * variance + g * g * (s - t)
    return mean, variance


def grid(schedule, n, end):
    return torch.linspace(schedule.t_min, end, n + 1, dtype=torch.float64).tolist()


@pytest.mark.equation("eq-euler-maruyama")
def test_the_weak_order_of_euler_maruyama_is_1():
    steps = [250, 500, 1000, 2000]
    schedule, errors = VP(t_min=0.0), []
    for n in steps:
        mean, variance = recursion(schedule, grid(schedule, n, 0.5), 1.0, 0.0)
        errors.append((abs(mean - schedule.alpha(0.5)), abs(variance - schedule.sigma(0.5) ** 2)))
    means, variances = zip(*errors, strict=True)
    h = [1 / n for n in steps]
    assert empirical_order(h, means) == pytest.approx(1, abs=0.02)
    assert empirical_order(h, variances) == pytest.approx(1, abs=0.02)
    # the audit's figures
    assert list(variances) == pytest.approx([3.65e-3, 1.82e-3, 9.1e-4, 4.6e-4], rel=0.011)


@pytest.mark.equation("eq-euler-maruyama")
def test_the_strong_order_of_euler_maruyama_is_1_for_additive_noise(generator):
    schedule, steps, draws = VP(t_min=0.0), [16, 32, 64, 128], 1000
    path = BrownianPath(2048, (draws, 1), generator)
    x0 = torch.ones(draws, 1, dtype=torch.float64)
    fine = euler_maruyama(schedule, x0, grid(schedule, 2048, 0.5), path)
    errors = [
        float((euler_maruyama(schedule, x0, grid(schedule, n, 0.5), path) - fine).abs().mean()) for n in steps
    ]
    assert empirical_order([1 / n for n in steps], errors) == pytest.approx(1, abs=0.1)
    # the noise was shared: with another path the distance does not shrink
    other = BrownianPath(128, (draws, 1), generator)
    apart = (euler_maruyama(schedule, x0, grid(schedule, 128, 0.5), other) - fine).abs().mean()
    assert float(apart) > 50 * errors[-1]


@every
@pytest.mark.equation("eq-euler-maruyama")
@pytest.mark.equation("eq-markov-chain")
def test_simulated_moments_are_those_of_the_recursion_and_near_the_kernel(
    schedule, generator, global_rng_untouched
):
    n, draws, end = 200, 20_000, 0.5
    ts = grid(schedule, n, end)
    x = euler_maruyama(schedule, torch.ones(draws, 1, dtype=torch.float64), ts, generator=generator)
    mean, variance = recursion(schedule, ts, 1.0, 0.0)
    assert within(x.mean(), mean, math.sqrt(variance / draws))
    assert within(x.var(), variance, variance * math.sqrt(2 / draws))
    # given x at t_min, the exact kernel has the mean a and the variance sigma^2 - a^2 sigma(t_min)^2
    a = schedule.alpha(end) / schedule.alpha(schedule.t_min)
    exact_variance = schedule.sigma(end) ** 2 - (a * schedule.sigma(schedule.t_min)) ** 2
    assert mean == pytest.approx(a, rel=0.01)
    assert variance == pytest.approx(exact_variance, rel=0.025)


@pytest.mark.equation("eq-euler-maruyama")
def test_many_steps_reach_the_kernel(generator):
    # audit, appendix E: 1000 steps suffice up to 2e5 draws; the bias is 9e-4, the standard error 5.8e-3
    schedule, draws = VP(), 50_000
    start = perturb(
        schedule, torch.full((draws, 1), 1.2), schedule.t_min, torch.randn(draws, 1, generator=generator)
    )
    x = euler_maruyama(schedule, start, grid(schedule, 1000, 0.5), generator=generator).double()
    alpha, sigma = schedule.alpha(0.5), schedule.sigma(0.5)
    assert within(x.mean(), 1.2 * alpha, sigma / math.sqrt(draws))
    assert within(x.var(), sigma**2, sigma**2 * math.sqrt(2 / draws))
    z = (x - x.mean()) / x.std()
    assert within((z**3).mean(), 0, math.sqrt(6 / draws))
    assert within((z**4).mean(), 3, math.sqrt(24 / draws))


def test_euler_maruyama_takes_lists_tensors_images_and_generators(generator):
    x0 = torch.ones(2, 1, 3, 3)
    ts = torch.tensor([0.1, 0.2, 0.7])
    runs = [euler_maruyama(VE(), x0, t, generator=generator.manual_seed(3)) for t in (ts, ts.tolist())]
    assert torch.equal(*runs)
    assert (runs[0].shape, runs[0].dtype) == (x0.shape, torch.float32)
    path = BrownianPath(4, x0.shape, generator)
    assert euler_maruyama(VE(), x0, ts, path).dtype == torch.float32
    assert torch.equal(euler_maruyama(VE(), x0, ts, path), euler_maruyama(VE(), x0, ts, path))
    assert torch.equal(x0, torch.ones(2, 1, 3, 3))


# ---- the discrete chains

BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)


@pytest.mark.equation("eq-ddpm-chain")
def test_ddpm_keeps_the_root_of_alpha_bar_of_the_signal(generator):
    # two runs with the same noise differ by what is left of the signal
    x0 = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    runs = [list(ddpm_chain(start, BETAS, generator.manual_seed(4))) for start in (x0, 0 * x0)]
    assert len(runs[0]) == 1001
    alpha_bar = torch.cumprod(1 - BETAS, 0)
    for i in (1, 50, 100, 200, 1000):
        torch.testing.assert_close(
            runs[0][i] - runs[1][i], alpha_bar[i - 1].sqrt() * x0, rtol=1e-9, atol=1e-12
        )
    assert float(alpha_bar[-1]) == pytest.approx(4.04e-5, rel=2e-3)  # the audit's figure


@pytest.mark.equation("eq-ddpm-chain")
@pytest.mark.equation("eq-ddpm-forward")
def test_ddpm_has_the_variance_1_minus_alpha_bar(generator, global_rng_untouched):
    draws, betas = 40_000, [0.1, 0.0, 0.3, 0.02, 0.5]
    chain = list(ddpm_chain(torch.ones(draws, 1, dtype=torch.float64), betas, generator))
    alpha_bar = 1.0
    for x, beta in zip(chain[1:], betas, strict=True):
        alpha_bar *= 1 - beta
        assert within(x.mean(), math.sqrt(alpha_bar), math.sqrt((1 - alpha_bar) / draws))
        assert within(x.var(), 1 - alpha_bar, (1 - alpha_bar) * math.sqrt(2 / draws))
    # unit variance stays unit variance
    z = torch.randn(draws, 1, dtype=torch.float64, generator=generator)
    for x in ddpm_chain(z, betas, generator):
        assert within(x.var(), 1, math.sqrt(2 / draws))


@pytest.mark.equation("eq-ve-euler-maruyama")
@pytest.mark.equation("eq-ncsn-forward")
def test_ncsn_has_the_law_of_its_ladder_at_every_level(generator, global_rng_untouched):
    draws, sigmas = 40_000, torch.tensor([0.01, 0.1, 0.5, 0.50001, 3.0, 50.0], dtype=torch.float64)
    chain = list(ncsn_chain(torch.ones(draws, 1, dtype=torch.float64), sigmas, generator))
    assert len(chain) == 7
    assert torch.equal(chain[0], torch.ones(draws, 1, dtype=torch.float64))
    for x, sigma in zip(chain[1:], sigmas, strict=True):
        assert within(x.mean(), 1, sigma / math.sqrt(draws))
        assert within(x.var(), sigma**2, sigma**2 * math.sqrt(2 / draws))
    # independent increments
    steps = torch.stack([b - a for a, b in pairwise(chain)])[..., 0]
    correlation = torch.corrcoef(steps) - torch.eye(6)
    assert within(correlation, 0, 1 / math.sqrt(draws))


@pytest.mark.cuda
def test_the_device_follows_the_state():
    x0 = torch.ones(3, 2, device="cuda")
    g = torch.Generator("cuda").manual_seed(0)
    assert euler_maruyama(VP(), x0, [0.1, 0.2], generator=g).device == x0.device
    assert euler_maruyama(VP(), x0, [0.1, 0.2], BrownianPath(4, (3, 2))).device == x0.device
    assert list(ddpm_chain(x0, [0.1], g))[-1].device == x0.device
    assert perturb(VP(), x0, torch.tensor([0.1, 0.2, 0.3]), x0).device == x0.device
