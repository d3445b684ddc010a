import math

import numpy as np
import pytest
import torch
from problems import MAIN, asym3, exact, gaussian, mix, within
from torch import nn

from diffedu.denoiser import KINDS, NetDenoiser, Prediction
from diffedu.objectives import dsm_loss, ism_loss, ssm_loss
from diffedu.schedules import VP

every = pytest.mark.parametrize("schedule", MAIN.values(), ids=MAIN)


class Affine:
    """The denoiser whose score is a x + c."""

    def __init__(self, schedule, a, c=0.0):
        self.schedule, self.a, self.c = schedule, a, c

    def __call__(self, x, t):
        return Prediction(x, self.schedule.alpha(t), self.schedule.sigma(t), "score", self.a * x + self.c)


class AtTime:
    """A denoiser asked at one time, whatever the time."""

    def __init__(self, denoiser, t):
        self.denoiser, self.t, self.schedule = denoiser, t, denoiser.schedule

    def __call__(self, x, t):
        return self.denoiser(x, self.t)


def halving(kind):
    """The denoiser of a network that halves its input."""

    class Half(nn.Module):
        def forward(self, x, lam):
            return 0.5 * x

    return NetDenoiser(Half(), VP(), kind)


def hermite(n=80):
    """Nodes and weights for the mean over a standard Gaussian."""
    z, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(z), torch.from_numpy(w / math.sqrt(2 * math.pi))


def mean_over_mix(loss):
    """The mean of loss(x0 (n, 1), eps (n, 1)) over the audit's mixture and eps, by quadrature."""
    z, w = hermite()
    total = 0.0
    for weight, m, s in ((0.3, -1.5, 0.3), (0.7, 0.8, 0.4)):
        x0, eps = torch.meshgrid(m + s * z, z, indexing="ij")
        each = loss(x0.reshape(-1, 1), eps.reshape(-1, 1))
        total = total + weight * (torch.outer(w, w).reshape(-1) * each).sum()
    return total


@every
def test_the_weights_are_factors_of_one_error(schedule, generator):
    x0 = asym3().sample(50, generator)
    eps = torch.randn(50, 2, dtype=torch.float64, generator=generator)
    denoiser = Affine(schedule, -0.3, 0.2)
    for t in (0.2, 0.6):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        plain = dsm_loss(denoiser, x0, t, eps, "score")
        want = (-0.3 * (alpha * x0 + sigma * eps) + 0.2 + eps / sigma).square().sum(1)
        torch.testing.assert_close(plain, want, rtol=1e-11, atol=0)
        factors = {
            "score": 1.0,
            "eps": sigma**2,
            "x0": sigma**4 / alpha**2,
            "v": sigma**2 * (alpha**2 + sigma**2) ** 2 / alpha**2,
        }
        assert set(factors) == set(KINDS)
        for weight, factor in factors.items():
            got = dsm_loss(denoiser, x0, t, eps, weight)
            torch.testing.assert_close(got, factor * plain, rtol=1e-9, atol=1e-12)
    assert torch.equal(dsm_loss(denoiser, x0, 0.2, eps), dsm_loss(denoiser, x0, 0.2, eps, "eps"))


def test_each_sample_has_its_own_time(generator):
    x0 = torch.randn(4, 1, 3, 3, generator=generator)
    eps = torch.randn(4, 1, 3, 3, generator=generator)
    t = torch.tensor([0.1, 0.3, 0.5, 0.9])

    class Net(nn.Module):
        def forward(self, x, lam):
            return x * lam.reshape(-1, 1, 1, 1)

    for weight in KINDS:
        for kind in KINDS:
            denoiser = NetDenoiser(Net(), VP(), kind)
            losses = dsm_loss(denoiser, x0, t, eps, weight)
            assert (losses.shape, losses.dtype) == ((4,), torch.float32)
            each = [dsm_loss(denoiser, x0[i : i + 1], t[i : i + 1], eps[i : i + 1], weight) for i in range(4)]
            torch.testing.assert_close(losses, torch.cat(each))


def test_dsm_is_the_fisher_divergence_plus_a_constant():
    # audit S46: the constant d / sigma^2 - E|grad log p_t|^2 is 0.6957071945 for the mixture, VP, t = 0.3
    schedule, t = VP(), 0.3
    truth = exact(mix(), schedule)
    sigma = schedule.sigma(t)
    z, w = hermite()

    def fisher(denoiser):
        total = 0.0
        for weight, m, s in ((0.3, -1.5, 0.3), (0.7, 0.8, 0.4)):
            alpha = schedule.alpha(t)
            x = (alpha * m + math.sqrt((alpha * s) ** 2 + sigma**2) * z)[:, None]
            gap = denoiser(x, t).score - truth(x, t).score
            total = total + weight * float((w * gap[:, 0] ** 2).sum())
        return total

    constant = 1 / sigma**2 - fisher(Affine(schedule, 0.0))
    assert constant == pytest.approx(0.6957071945, abs=1e-9)
    for denoiser in (truth, Affine(schedule, -1.0), Affine(schedule, 0.5, -2.0)):
        dsm = float(mean_over_mix(lambda x0, eps, d=denoiser: dsm_loss(d, x0, t, eps, "score")))
        assert dsm - fisher(denoiser) == pytest.approx(constant, abs=1e-8)


@every
def test_for_gaussian_data_the_exact_score_is_the_minimiser_with_a_known_value(schedule):
    m, s, t = 0.4, 0.7, 0.5
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    variance = (alpha * s) ** 2 + sigma**2
    z, w = hermite(20)
    x0, eps = (v.reshape(-1, 1) for v in torch.meshgrid(m + s * z, z, indexing="ij"))
    weight = torch.outer(w, w).reshape(-1)

    def mean(a, c):
        return (weight * dsm_loss(Affine(schedule, a, c), x0, t, eps, "score")).sum()

    a = torch.tensor(-1 / variance, dtype=torch.float64, requires_grad=True)
    c = torch.tensor(alpha * m / variance, dtype=torch.float64, requires_grad=True)
    value = mean(a, c)
    slopes, value = torch.autograd.grad(value, (a, c)), float(value.detach())
    assert value == pytest.approx(1 / sigma**2 - 1 / variance, rel=1e-9)
    for slope in slopes:
        assert abs(float(slope)) < 1e-9 * (1 + variance)
    for da, dc in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.1), (0.0, -0.1)):
        assert float(mean(a.detach() + da, c.detach() + dc)) > value
    denoiser = exact(gaussian(m, s), schedule)
    same = (weight * dsm_loss(denoiser, x0, t, eps, "score")).sum()
    assert float(same) == pytest.approx(value, rel=1e-9)


def test_gradients_reach_the_network_and_nothing_else(generator):
    net = nn.Linear(2, 2)

    class Net(nn.Module):
        def forward(self, x, lam):
            return net(x)

    x0, eps = torch.randn(2, 8, 2, generator=generator)
    dsm_loss(NetDenoiser(Net(), VP(), "v"), x0, 0.5, eps, "v").mean().backward()
    assert bool((net.weight.grad != 0).all())
    assert not x0.requires_grad


def test_implicit_score_matching_is_the_fisher_divergence_less_a_constant():
    schedule, t = VP(), 0.3
    truth, z, w = exact(mix(), schedule), *hermite()
    differences = []
    for a, c in ((-1.0, 0.0), (0.5, -2.0), (-3.0, 1.0)):
        total = 0.0
        for weight, m, s in ((0.3, -1.5, 0.3), (0.7, 0.8, 0.4)):
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            x = (alpha * m + math.sqrt((alpha * s) ** 2 + sigma**2) * z)[:, None]
            fisher = (a * x + c - truth(x, t).score)[:, 0] ** 2
            implicit = ism_loss(Affine(schedule, a, c), x, t).detach()
            total += weight * float((w * (fisher - implicit)).sum())
        differences.append(total)
    # E|grad log p_t|^2 = 1 / sigma^2 - 0.6957071945
    want = 1 / VP().sigma(0.3) ** 2 - 0.6957071945
    assert differences == pytest.approx([want] * 3, abs=1e-8)


def test_implicit_score_matching_has_the_exact_trace(generator):
    denoiser = exact(asym3(), VP())
    x = asym3().sample(5, generator)
    score = lambda y: denoiser(y[None], 0.2).score[0]  # noqa: E731
    want = [2 * torch.autograd.functional.jacobian(score, y).trace() + score(y).square().sum() for y in x]
    torch.testing.assert_close(ism_loss(denoiser, x, 0.2), torch.stack(want))


def test_sliced_score_matching_is_unbiased(generator):
    denoiser, n = exact(asym3(), VP()), 20_000
    x = asym3().sample(1, generator)
    many = x.expand(n, 2)
    v = torch.randn(n, 2, dtype=torch.float64, generator=generator)
    losses = ssm_loss(denoiser, many, 0.2, v)
    assert losses.shape == (n,)
    assert within(losses.mean(), ism_loss(denoiser, x, 0.2), losses.std() / math.sqrt(n))
    # along +-1 coin tosses in one dimension it is exact
    line = mix().sample(10, generator)
    sign = torch.ones(10, 1, dtype=torch.float64)
    truth = exact(mix(), VP())
    torch.testing.assert_close(ssm_loss(truth, line, 0.2, sign), ism_loss(truth, line, 0.2))


def test_implicit_score_matching_by_simulation_where_quadrature_is_dear(generator):
    # in the plane: ISM's mean plus E|grad log p_t|^2 against the Fisher divergence, within 4 standard errors
    schedule, t, n = VP(), 0.2, 20_000
    law = asym3()
    truth, x = exact(law, schedule), law.marginal(schedule, t).sample(n, generator)
    exactly = truth(x, t).score
    frozen = exact(law, schedule)(x, schedule.t_min).score  # the score of (almost) the data
    for model, values in (
        (truth, exactly),
        (Affine(schedule, -0.8, 0.3), -0.8 * x + 0.3),
        (AtTime(truth, schedule.t_min), frozen),
    ):
        fisher = (values - exactly).square().sum(1)
        gap = ism_loss(model, x, t).detach() + exactly.square().sum(1) - fisher
        assert within(gap.mean(), 0, gap.std() / math.sqrt(n))
        assert float(gap.std()) > 0.1  # equal in the mean, not draw by draw


@pytest.mark.parametrize("schedule", [VP(), MAIN["subvp"], MAIN["cosine"]], ids=repr)
def test_the_three_objectives_differ_by_constants(schedule):
    # for one law and three models: Fisher, implicit and denoising values, by quadrature
    t, m, s = 0.4, 0.5, 0.6
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    variance = (alpha * s) ** 2 + sigma**2
    z, w = hermite(20)
    x = (alpha * m + math.sqrt(variance) * z)[:, None]
    x0, eps = (v.reshape(-1, 1) for v in torch.meshgrid(m + s * z, z, indexing="ij"))
    for a, c in ((-1 / variance, alpha * m / variance), (-1.0, 0.0), (0.4, -1.5)):
        model = Affine(schedule, a, c)
        fisher = float(w @ (a * x + c + (x - alpha * m) / variance)[:, 0] ** 2)
        implicit = float(w @ ism_loss(model, x, t).detach())
        sliced = float(w @ ssm_loss(model, x, t, torch.ones_like(x)).detach())
        denoising = float(torch.outer(w, w).reshape(-1) @ dsm_loss(model, x0, t, eps, "score"))
        assert implicit + 1 / variance == pytest.approx(fisher, abs=1e-8)  # E|grad log p|^2 = 1 / variance
        assert sliced == pytest.approx(implicit, abs=1e-10)
        assert denoising - (1 / sigma**2 - 1 / variance) == pytest.approx(fisher, abs=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_losses_follow_the_dtype_of_their_input(dtype, generator):
    x = torch.randn(4, 2, generator=generator).to(dtype)
    t = torch.rand(4, generator=generator)
    for when in (0.3, t):
        for loss in (
            *(ism_loss(halving(kind), x, when) for kind in KINDS),
            *(ssm_loss(halving(kind), x, when, x) for kind in KINDS),
            *(dsm_loss(halving(kind), x, when, x, kind) for kind in KINDS),
        ):
            assert (loss.shape, loss.dtype) == ((4,), dtype)


@pytest.mark.cuda
def test_the_device_follows_the_input():
    x = torch.randn(4, 2, device="cuda")
    for t in (0.3, torch.tensor(0.3, device="cuda"), torch.linspace(0.1, 0.9, 4, device="cuda")):
        for kind in KINDS:
            denoiser = halving(kind)
            assert ism_loss(denoiser, x, t).device == x.device
            assert ssm_loss(denoiser, x, t, x).device == x.device
            assert dsm_loss(denoiser, x, t, x, kind).device == x.device
            host = dsm_loss(denoiser, x.cpu(), t.cpu() if isinstance(t, torch.Tensor) else t, x.cpu(), kind)
            torch.testing.assert_close(dsm_loss(denoiser, x, t, x, kind).cpu(), host)
