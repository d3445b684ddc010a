"""The survey's reverse half, S34-S60 and S121: run as `test_survey_forward` runs the forward half.

Each test applies one check to the package; where the audit's verdict is A or B the printed form goes through
the same check and must fail it, for the reason that `match` names. Oracles: conditioning of Gaussians,
quadrature, autodiff and recursions of the moments, with scores that share no code with the package.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import affine_step, asym3, exact, gaussian, mix, propagate, score
from scipy.integrate import quad
from test_survey_forward import ALPHA_BAR, BETAS, HALF, equal, generator, near, start_at, times
from torch import nn

from diffedu.denoiser import KINDS, NetDenoiser, Prediction
from diffedu.metrics import empirical_order
from diffedu.mixtures import ExactDenoiser
from diffedu.objectives import dsm_loss, ism_loss, ssm_loss
from diffedu.sampling import sample
from diffedu.schedules import VE, VP, Cosine, SubVP
from diffedu.sde import forward_drift, perturb, reverse_drift
from diffedu.solvers import Ancestral, AnnealedLangevin, EulerMaruyama, ReverseDiffusion
from diffedu.training import Recipe, fit

T = 0.3  # where the audit takes its quadratures; VP has sigma^2 = 0.6037 there
ALPHA, SIGMA = VP().alpha(T), VP().sigma(T)
MIX_PARTS = ((0.3, -1.5, 0.3), (0.7, 0.8, 0.4))  # weight, mean, standard deviation
MIX_MEAN, MIX_VARIANCE = 0.11, 1.2499
MIX_RIPPLE = sum(p * math.cos(3 * m) * math.exp(-4.5 * s * s) for p, m, s in MIX_PARTS)
DOWN = times(400)[::-1]
BETA = BETAS.numpy()


def mix_score(x, alpha, sigma):
    """The score of alpha x_0 + sigma eps at the array x, for data from the mixture."""
    joint, pull = [], []
    for p, m, s in MIX_PARTS:
        v = (alpha * s) ** 2 + sigma**2
        pull.append(-(x - alpha * m) / v)
        joint.append(math.log(p) - 0.5 * math.log(v) - 0.5 * pull[-1] ** 2 * v)
    share = 1 / (1 + np.exp(np.clip(joint[0] - joint[1], -700, 700)))  # of the second part
    return (1 - share) * pull[0] + share * pull[1]


def hermite(n=80):
    """Nodes and weights of the mean over a standard Gaussian."""
    z, w = np.polynomial.hermite_e.hermegauss(n)
    return z, w / math.sqrt(2 * math.pi)


def mean_of_mix(values, alpha=ALPHA, sigma=SIGMA):
    """E values(x) over the law of alpha x_0 + sigma eps."""
    z, w = hermite()
    parts = ((p, alpha * m + math.sqrt((alpha * s) ** 2 + sigma**2) * z) for p, m, s in MIX_PARTS)
    return sum(p * float(w @ values(x)) for p, x in parts)


def mean_of_pairs(values):
    """E values(x_0, eps) over the mixture and the noise; arrays (n, 1)."""
    z, w = hermite()
    total = 0.0
    for p, m, s in MIX_PARTS:
        x0, eps = np.meshgrid(m + s * z, z, indexing="ij")
        total += p * float(np.outer(w, w).ravel() @ values(x0.reshape(-1, 1), eps.reshape(-1, 1)).ravel())
    return total


class Model:
    """A denoiser whose score at (x, t) is function(x, t)."""

    schedule = VP()

    def __init__(self, function):
        self.function = function

    def __call__(self, x, t):
        return Prediction(x, VP().alpha(t), VP().sigma(t), "score", self.function(x, t))


def of_arrays(function):
    """The denoiser whose score is function(x), of and to an array."""
    return Model(lambda x, t: torch.from_numpy(function(x.detach().numpy())))


def exact_score(x):
    return mix_score(x, ALPHA, SIGMA)


SCORES = [exact_score, lambda x: -x, lambda x: 0.5 * x - 2, lambda x: 0 * x, np.sin]  # models at time T


def dsm(model):
    """E |s - grad log q(x_t | x_0)|^2 at T, from the definition."""
    return mean_of_pairs(lambda x0, eps: (model(ALPHA * x0 + SIGMA * eps) + eps / SIGMA) ** 2)


def esm(model):
    """E |s - grad log p_t|^2 at T."""
    return mean_of_mix(lambda x: (model(x) - exact_score(x)) ** 2)


def packaged(model, weight):
    """E of the package's loss at T."""

    def loss(x0, eps):
        return dsm_loss(of_arrays(model), torch.from_numpy(x0), T, torch.from_numpy(eps), weight).numpy()

    return mean_of_pairs(loss)


def walk(step, ts, x, seed):
    """x <- step(x, t, s, z) through the times ts; x an array."""
    rng = np.random.default_rng(seed)
    for t, s in pairwise(ts):
        x = step(x, t, s, rng.standard_normal(x.shape))
    return x


def draws(n, scale=1.0):
    return scale * np.random.default_rng(99).standard_normal(n)


def near_mix(x):
    """Mean, variance and E cos 3x of draws that should be the mixture's."""
    n = len(x)
    near(
        mean=(x.mean(), MIX_MEAN, math.sqrt(MIX_VARIANCE / n)),
        variance=(x.var(), MIX_VARIANCE, math.sqrt(1.4125 / n)),  # the fourth central moment is 2.975
        ripple=(
            np.cos(3 * x).mean(),
            MIX_RIPPLE,
            math.sqrt(0.5 / n),
        ),  # E cos 3x, which sees the modes' width
    )


def unit_variance(a, noise):
    """What the steps x <- a_i x + noise_i z, last index first, make of N(0, 1)."""
    v = 1.0
    for factor, deviation in zip(a[::-1], noise[::-1], strict=True):
        v = factor**2 * v + deviation**2
    return v


def back(schedule, std, t, s):
    """(A, c, n) of the law of x_s given x_t = x for data N(0.4, std^2): A x + c + n z, s < t, by Bayes."""
    mean = [schedule.alpha(u) * 0.4 for u in (t, s)]
    variance = [(schedule.alpha(u) * std) ** 2 + schedule.sigma(u) ** 2 for u in (t, s)]
    covariance = schedule.alpha(t) / schedule.alpha(s) * variance[1]
    a = covariance / variance[0]
    return a, mean[1] - a * mean[0], math.sqrt(variance[1] - a * covariance)


# 4 The reverse SDE


@pytest.mark.equation("eq-sampling-goal")
def test_sampling_goal():
    law = gaussian(0.4, 0.7)

    def end(schedule, mean, variance):  # of Euler-Maruyama from that start, exactly
        ts = np.linspace(1.0, schedule.t_min, 401)
        return propagate(EulerMaruyama(), exact(law, schedule), ts, mean, variance)

    for schedule, forgets in ((VP(), True), (VP(beta_max=1.0), False)):
        there, here = law.marginal(schedule, 1.0), law.marginal(schedule, schedule.t_min)
        from_law = end(schedule, float(there.means), float(there.covs))
        assert from_law == pytest.approx((float(here.means), float(here.covs)), abs=0.01)
        from_prior = end(schedule, 0.0, schedule.sigma(1.0) ** 2)  # x(T) must follow p_T, or nearly
        assert (abs(from_prior[0] - from_law[0]) < 0.005) == forgets


@pytest.mark.equation("eq-forward-sde-again")
def test_forward_sde_again():
    x, h = torch.tensor([[1.7]], dtype=torch.float64), 1e-6
    for schedule in (VP(), SubVP(), VE(), Cosine()):
        for t in (0.1, 0.5, 0.9):  # f and g^2 from the kernel from t to t + h
            a = schedule.alpha(t + h) / schedule.alpha(t)
            v = schedule.sigma(t + h) ** 2 - a**2 * schedule.sigma(t) ** 2
            equal("drift", forward_drift(schedule, x, t) + 1, 1 + (a - 1) / h * x, 1e-4)
            equal("variance rate", schedule.g2(t), v / h, 1e-4)


@pytest.mark.equation("eq-reverse-sde")
def test_reverse_sde():
    x, h, t, std = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], 1e-5, 0.4, 0.7
    for schedule in (VP(), SubVP(), VE(), Cosine()):  # the drift and the noise of x_s given x_t
        a, c, n = back(schedule, std, t, t - h)
        drift = reverse_drift(exact(gaussian(0.4, std), schedule), x, t)
        torch.testing.assert_close(drift, (a * x + c - x) / -h, rtol=2e-3, atol=2e-3)
        assert n**2 / h == pytest.approx(schedule.g2(t), rel=2e-3)

    start = torch.from_numpy(draws(4000))[:, None]
    near_mix(
        sample(ExactDenoiser(mix(), VP()), EulerMaruyama(), start, VP().grid(200), generator(7))[:, 0].numpy()
    )

    def run(sign):
        def step(x, t, s, z):
            dt = sign * (t - s)
            drift = VP().f(t) * x - VP().g2(t) * mix_score(x, VP().alpha(t), VP().sigma(t))
            return x + drift * dt + math.sqrt(VP().g2(t) * (t - s)) * z

        near_mix(walk(step, DOWN, draws(4000), 8))

    run(-1)
    with pytest.raises(AssertionError, match=r"variance 1\.\d*e\+06, not 1\.2499"):  # dt, the sign unstated
        run(+1)


@pytest.mark.equation("eq-score")
def test_score():
    law, x, h = asym3(), asym3().sample(200, generator(9)), 1e-5
    difference = torch.stack(
        [(law.log_prob(x + h * e) - law.log_prob(x - h * e)) / (2 * h) for e in torch.eye(2)], 1
    )
    torch.testing.assert_close(law.score(x), difference, rtol=1e-6, atol=1e-6)
    step = 1e-3 * law.score(x) / law.score(x).norm(dim=1, keepdim=True)
    assert bool((law.log_prob(x + step) > law.log_prob(x - step)).all())  # towards more density


@pytest.mark.equation("eq-reverse-intuition")
def test_reverse_intuition():
    # With f = 0 only the score moves: the mean step back, by Bayes, against g^2 score dt.
    x, t, h, std = np.linspace(-2, 2, 8), 0.4, 1e-5, 0.7
    a, c, _ = back(VE(), std, t, t - h)
    pull = score(gaussian(0.4, std), 1.0, VE().sigma(t), x[:, None])[:, 0]

    def check(direction):
        equal("displacement", direction * VE().g2(t) * pull * h, (a - 1) * x + c, 1e-3)

    check(+1)
    drift = reverse_drift(exact(gaussian(0.4, std), VE()), torch.from_numpy(x)[:, None], t)[:, 0]
    equal("displacement", -h * drift, (a - 1) * x + c, 1e-3)
    with pytest.raises(AssertionError, match="displacement is off by up to 2 "):  # down the gradient
        check(-1)

    def run(direction):
        def step(x, t, s, z):
            up = mix_score(x, VP().alpha(t), VP().sigma(t))
            move = -VP().f(t) * x + direction * VP().g2(t) * up
            return x + move * (t - s) + math.sqrt(VP().g2(t) * (t - s)) * z

        near_mix(walk(step, DOWN, draws(4000), 10))

    run(+1)
    with pytest.raises(AssertionError, match=r"variance \d\.\d*e\+14, not 1\.2499"):
        run(-1)


@pytest.mark.equation("eq-unknown-score")
def test_unknown_score():
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for t in (0.01, 0.3, 0.9):
        alpha, sigma = VP().alpha(t), VP().sigma(t)
        found = mix().noised_score(x, alpha, sigma)
        torch.testing.assert_close(
            found, torch.from_numpy(mix_score(x.numpy(), alpha, sigma)), rtol=1e-9, atol=1e-9
        )

    def run(known):
        def step(x, t, s, z):
            drift = VP().f(t) * x - VP().g2(t) * known(x, t)
            return x - drift * (t - s) + math.sqrt(VP().g2(t) * (t - s)) * z

        return walk(step, DOWN, draws(4000), 11)

    near_mix(run(lambda x, t: mix_score(x, VP().alpha(t), VP().sigma(t))))
    frozen = run(lambda x, t: mix_score(x, 1.0, 0.0))  # grad log p_data at every t
    with pytest.raises(AssertionError, match="ripple"):
        near_mix(frozen)


# 5 Learning the score


@pytest.mark.equation("eq-fisher-divergence")
def test_fisher_divergence():
    ts = (0.05, 0.3, 0.8)

    def right(model):  # E_t E_{p_t} |grad log p_t - s(x, t)|^2
        gaps = []
        for t in ts:
            a, s = VP().alpha(t), VP().sigma(t)
            gaps.append(mean_of_mix(lambda x, a=a, s=s, t=t: (mix_score(x, a, s) - model(x, t)) ** 2, a, s))
        return sum(gaps) / 3

    def printed(model):  # E_{p_data} |grad log p_data - s(x, t)|^2
        return (
            sum(mean_of_mix(lambda x, t=t: (mix_score(x, 1.0, 0.0) - model(x, t)) ** 2, 1.0, 0.0) for t in ts)
            / 3
        )

    def at_its_time(x, t):
        return mix_score(x, VP().alpha(t), VP().sigma(t))

    def frozen(x, t):
        return mix_score(x, 1.0, 0.0)

    def check(objective):
        wrong, exact = objective(frozen), objective(at_its_time)
        assert exact < wrong, f"the exact score costs {exact:.3g}, the wrong one {wrong:.3g}"

    check(right)
    assert right(at_its_time) == 0
    with pytest.raises(AssertionError, match=r"the exact score costs \d\S*, the wrong one 0"):
        check(printed)


@pytest.mark.equation("eq-ism")
def test_ism():
    # N(0, S) in the plane, S = [[1, 1/2], [1/2, 1]], and affine scores: Fisher divergence in closed form.
    covariance = np.array([[1.0, 0.5], [0.5, 1.0]])
    inverse, root = np.linalg.inv(covariance), np.linalg.cholesky(covariance)
    z, w = hermite(8)
    x = torch.from_numpy(np.stack(np.meshgrid(z, z, indexing="ij"), -1).reshape(-1, 2) @ root.T)
    weight = torch.from_numpy(np.outer(w, w).ravel())
    rng = np.random.default_rng(12)
    models = [(rng.standard_normal((2, 2)), rng.standard_normal(2)) for _ in range(6)]

    def fisher(a, c):
        gap = a + inverse
        return np.trace(gap @ covariance @ gap.T) + c @ c

    def check(divergence):  # less twice (divergence + |s|^2 / 2): one constant, E |grad log p|^2
        squares = [np.trace(a @ covariance @ a.T) + c @ c for a, c in models]
        differences = [
            fisher(a, c) - 2 * divergence(a) - s for (a, c), s in zip(models, squares, strict=True)
        ]
        equal("the difference", differences, 2.6666666667, 1e-8)

    assert np.trace(inverse) == pytest.approx(2.6666666667)
    check(np.trace)
    for a, c in models:
        affine = Model(lambda x, t, a=a, c=c: x @ torch.from_numpy(a).T + torch.from_numpy(c))
        found = float((weight * ism_loss(affine, x, T).detach()).sum())
        assert fisher(a, c) - found == pytest.approx(2.6666666667, abs=1e-8)
    for jacobian in (np.sum, np.linalg.norm):  # grad s, the matrix, read as a number
        with pytest.raises(AssertionError, match="the difference is off"):
            check(jacobian)

    # The boundary term: p = e^-x on x > 0 and s = c, whose difference is 1 + 2 c.
    differences = []
    for c in (-1, 0, 0.5, 2):
        divergence = quad(lambda x, c=c: math.exp(-x) * (c + 1) ** 2, 0, 60)[0]
        differences.append(divergence - quad(lambda x, c=c: math.exp(-x) * c**2, 0, 60)[0])
    assert differences == pytest.approx([-1, 1, 2, 5], abs=1e-8)
    with pytest.raises(AssertionError, match="the difference is off"):
        equal("the difference", differences, 1, 1e-8)


@pytest.mark.equation("eq-training-samples")
@pytest.mark.equation("eq-empirical-ism")
def test_empirical_ism():
    # A linear score in the plane on draws of p_t: the mean over n draws against the expectation.
    n, a = 20_000, torch.tensor([[-1.0, 0.6], [0.2, -0.5]], dtype=torch.float64)
    law = gaussian(0.4, 0.3, dim=2)

    model = Model(lambda x, t: x @ a.T)

    def second_moment(law):
        return torch.einsum("k,kij->ij", law.weights, law.covs) + torch.einsum(
            "k,ki,kj->ij", law.weights, law.means, law.means
        )

    squares = torch.trace(a @ second_moment(law.marginal(VP(), T)) @ a.T)
    noisy = perturb(
        VP(), law.sample(n, generator(13)), T, torch.randn(n, 2, dtype=torch.float64, generator=generator(14))
    )

    def check(losses):
        near(loss=(losses.mean(), 2 * torch.trace(a) + squares, losses.std() / math.sqrt(n)))

    check(ism_loss(model, noisy, T).detach())
    check(ssm_loss(model, noisy, T, torch.randn(n, 2, dtype=torch.float64, generator=generator(15))).detach())
    squared = (noisy @ a.T).square().sum(1)
    with pytest.raises(AssertionError, match="loss"):  # all entries of grad s instead of its trace
        check(2 * a.sum() + squared)
    with pytest.raises(AssertionError, match="loss"):  # x_i of the data instead of x_t
        check(ism_loss(model, law.sample(n, generator(16)), T).detach())


@pytest.mark.equation("eq-law-of-large-numbers")
def test_law_of_large_numbers():
    # s = -x, p = N(0, 1): L - const = -1, and the empirical loss has the variance 2 / n.
    model = Model(lambda x, t: -x)

    for n, runs in ((100, 2000), (10_000, 100)):
        x = torch.randn(runs * n, 1, dtype=torch.float64, generator=generator(17))
        means = ism_loss(model, x, T).detach().reshape(runs, n).mean(1)
        near(
            mean=(means.mean(), -1, math.sqrt(2 / n / runs)),
            spread=(means.std(), math.sqrt(2 / n), math.sqrt(2 / n) / math.sqrt(2 * runs)),
        )
        equals = int((means == -1).sum())
        with pytest.raises(AssertionError, match=r"equal in 0 of \d+"):  # "almost surely equal"
            assert equals == runs, f"equal in {equals} of {runs}"


@pytest.mark.equation("eq-readings")
def test_readings():
    x = torch.randn(50, 2, dtype=torch.float64, generator=generator(18))
    value = torch.randn(50, 2, dtype=torch.float64, generator=generator(19))
    for schedule in (VP(), SubVP(), VE(sigma_max=5.0), Cosine()):
        alpha, sigma = schedule.alpha(T), schedule.sigma(T)
        s = Prediction(x, alpha, sigma, "score", value)
        eps = -sigma * value
        x0 = (x - sigma * eps) / alpha
        for reading, want in (("eps", eps), ("x0", x0), ("v", alpha * eps - sigma * x0), ("score", value)):
            torch.testing.assert_close(getattr(s, reading), want, rtol=1e-12, atol=1e-12)
            round_trip = Prediction(x, alpha, sigma, reading, getattr(s, reading)).score
            torch.testing.assert_close(round_trip, value, rtol=1e-10, atol=1e-12)


@pytest.mark.equation("eq-dsm")
def test_dsm():
    constant = 1 / SIGMA**2 - mean_of_mix(lambda x: exact_score(x) ** 2)
    assert constant == pytest.approx(0.6957071945, abs=1e-9)
    for model in SCORES:
        assert dsm(model) - esm(model) == pytest.approx(constant, abs=1e-8)
        assert packaged(model, "score") == pytest.approx(dsm(model), abs=1e-8)
    # sigma inside or outside of the norm is the same
    assert mean_of_mix(lambda x: (SIGMA * x + SIGMA * exact_score(x)) ** 2) / SIGMA**2 == pytest.approx(
        esm(lambda x: -x)
    )

    def check(loss):  # the loss of the slide is 0 at the exact score
        value = loss(exact_score)
        assert value < 1e-12, f"the exact score costs {value:.10f}"

    check(esm)
    with pytest.raises(AssertionError, match=r"the exact score costs 0\.6957071945"):
        check(dsm)  # the conditional score in the place of the marginal one
    gap = mean_of_pairs(lambda x0, eps: (exact_score(ALPHA * x0 + SIGMA * eps) + eps / SIGMA) ** 2)
    rms = [math.sqrt(v) for v in (gap, mean_of_mix(lambda x: exact_score(x) ** 2))]
    assert rms == pytest.approx([0.834, 0.980], abs=2e-3)


@pytest.mark.equation("eq-gaussian-density")
def test_gaussian_density():
    x0 = 0.8

    def check(density):
        total = quad(density, ALPHA * x0 - 12 * SIGMA, ALPHA * x0 + 12 * SIGMA, epsabs=1e-12)[0]
        assert abs(total - 1) < 1e-9, f"integrates to {total:.4f}"

    law = gaussian(x0, 1e-9).marginal(VP(), T)
    check(lambda x: math.exp(float(law.log_prob(torch.tensor([[x]], dtype=torch.float64)))))
    with pytest.raises(AssertionError, match=r"integrates to 1\.9475"):  # sqrt(2 pi) sigma
        check(lambda x: math.exp(-0.5 * (x - ALPHA * x0) ** 2 / SIGMA**2))
    # nor is x_t that number: the printed right side never exceeds 1
    x_t = perturb(
        VP(), start_at(x0, 1000), T, torch.randn(1000, 1, dtype=torch.float64, generator=generator(20))
    )
    assert not bool((x_t == torch.exp(-0.5 * (x_t - ALPHA * x0) ** 2 / SIGMA**2)).any())


@pytest.mark.equation("eq-conditional-score")
def test_conditional_score():
    x0 = mix().sample(50, generator(21))
    eps = torch.randn(50, 1, dtype=torch.float64, generator=generator(22))
    x = perturb(VP(), x0, T, eps).requires_grad_(True)
    log_q = -0.5 * (x - ALPHA * x0) ** 2 / SIGMA**2 - math.log(math.sqrt(2 * math.pi) * SIGMA)
    log_p = mix().marginal(VP(), T).log_prob(x)
    conditional, marginal = (torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in (log_q, log_p))

    def check(labelled):
        equal("the score", -(x - ALPHA * x0).detach() / SIGMA**2, labelled, 1e-9)

    check(conditional)
    zero = of_arrays(lambda x: 0 * x)  # whose loss is the square of the conditional score
    torch.testing.assert_close(dsm_loss(zero, x0, T, eps, "score"), conditional[:, 0] ** 2)
    with pytest.raises(AssertionError, match="the score is off"):  # labelled grad log p_data(x, t)
        check(marginal)


@pytest.mark.equation("eq-score-noise")
def test_score_noise():
    x = 0.3
    moments = np.zeros(3)
    for p, m, s in MIX_PARTS:  # 1, eps and x_0 over q(x_t | x_0) p(x_0), for x_t = 0.3
        z, w = hermite(200)
        x0 = m + s * z
        eps = (x - ALPHA * x0) / SIGMA
        moments += p * np.stack([np.ones_like(eps), eps, x0]) @ (w * np.exp(-(eps**2) / 2))
    mean_eps, mean_x0 = moments[1:] / moments[0]
    found = ExactDenoiser(mix(), VP())(torch.tensor([[x]], dtype=torch.float64), T)
    assert -mean_eps / SIGMA == pytest.approx(0.0382656134, abs=1e-10)
    assert mean_x0 == pytest.approx(0.5132232231, abs=1e-10)
    assert float(found.score) == pytest.approx(0.0382656134, abs=1e-10)
    assert float(found.eps) == pytest.approx(mean_eps, abs=1e-10)
    assert float(found.x0) == pytest.approx(0.5132232231, abs=1e-10)


@pytest.mark.equation("eq-noise-loss")
def test_noise_loss():
    def check(form):
        found = [mean_of_pairs(lambda x0, eps, m=m: form(m(ALPHA * x0 + SIGMA * eps), eps)) for m in SCORES]
        equal("the loss", found, [dsm(m) for m in SCORES], 1e-9)

    check(lambda s, eps: (eps + SIGMA * s) ** 2 / SIGMA**2)
    for model in SCORES:
        assert packaged(model, "eps") / SIGMA**2 == pytest.approx(dsm(model), rel=1e-9)

    def printed(s, eps):
        return (eps - s) ** 2 / SIGMA**2

    with pytest.raises(AssertionError, match="the loss is off"):  # -sigma is missing
        check(printed)
    at_exact = mean_of_pairs(lambda x0, eps: printed(exact_score(ALPHA * x0 + SIGMA * eps), eps))
    assert at_exact == pytest.approx(5.72674, rel=2e-3)  # the audit's, by simulation


@pytest.mark.equation("eq-eps-definition")
def test_eps_definition():
    n = 200
    x0, t = (
        mix().sample(n, generator(23)),
        0.01 + 0.98 * torch.rand(n, dtype=torch.float64, generator=generator(24)),
    )
    eps = torch.randn(n, 1, dtype=torch.float64, generator=generator(25))
    denoiser = ExactDenoiser(mix(), VP())
    x_t = perturb(VP(), x0, t, eps)
    prediction = denoiser(x_t, t)
    torch.testing.assert_close(prediction.eps, -VP().sigma(t)[:, None] * prediction.score, rtol=1e-12, atol=0)

    def check(loss):  # L_simple, sample by sample
        equal("the loss", loss, (eps - prediction.eps)[:, 0] ** 2, 1e-7)

    as_scores = dsm_loss(denoiser, x0, t, eps, "score")
    check(dsm_loss(denoiser, x0, t, eps, "eps"))
    check(VP().sigma(t) ** 2 * as_scores)
    with pytest.raises(AssertionError, match="the loss is off"):  # "exactly the objective of DDPM"
        check(as_scores)


@pytest.mark.equation("eq-data-loss")
def test_data_loss():
    def data_error(model):
        def error(x0, eps):
            x = ALPHA * x0 + SIGMA * eps
            return (x0 - (x + SIGMA**2 * model(x)) / ALPHA) ** 2

        return mean_of_pairs(error)

    errors, losses = (np.array([f(m) for m in SCORES]) for f in (data_error, dsm))
    equal("the loss", errors, [packaged(m, "x0") for m in SCORES], 1e-8)

    def check(factor):
        equal("the loss", factor * errors, losses, 1e-8)

    check(ALPHA**2 / SIGMA**4)
    with pytest.raises(AssertionError, match=r"the loss is off by up to 0\.396 "):  # 1 - sigma^2
        check(ALPHA**2 / SIGMA**2)
    assert ALPHA**2 / SIGMA**2 * errors[0] == pytest.approx(0.418548, rel=5e-3)  # the audit's, by simulation
    assert VP().snr(T) * errors[0] == pytest.approx(packaged(exact_score, "eps"), rel=1e-9)


@pytest.mark.equation("eq-equivalence")
def test_equivalence():
    # The score model -a x for N(0, 0.7^2) data: at one time every weight has the same best a; over two times
    # that share one a, the weights pull it apart.
    z, w = hermite(12)
    x0, eps = (torch.from_numpy(v.reshape(-1, 1)) for v in np.meshgrid(0.7 * z, z, indexing="ij"))
    weight = torch.from_numpy(np.outer(w, w).ravel())

    def best(kind, ts):
        def mean(a):
            model = Model(lambda x, t: -a * x)
            return sum(float((weight * dsm_loss(model, x0, t, eps, kind)).sum()) for t in ts)

        left, middle, right = mean(0.0), mean(1.0), mean(2.0)  # a parabola
        return 1 + (left - right) / (2 * (left - 2 * middle + right))

    for t in (0.1, 0.5):
        want = 1 / (0.49 * VP().alpha(t) ** 2 + VP().sigma(t) ** 2)
        assert [best(kind, [t]) for kind in KINDS] == pytest.approx([want] * 4, rel=1e-9)
    shared = {kind: best(kind, [0.1, 0.5]) for kind in KINDS}
    assert max(shared.values()) - min(shared.values()) > 0.1


@pytest.mark.equation("eq-algorithm-1")
def test_algorithm_1():
    ts, m, std = [0.1, 0.3, 0.6], 0.4, 0.7
    lams = torch.tensor([VP().lam(t) for t in ts])

    class PerTime(nn.Module):
        """a z + b with a and b of each of the three times."""

        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.zeros(3)) for _ in range(2))

        def forward(self, z, lam):
            which = (lam[:, None] - lams).abs().argmin(1)
            return self.a[which, None] * z + self.b[which, None]

    def loss(net, g):
        x = m + std * torch.randn(256, 1, generator=g)
        t = torch.tensor(ts)[torch.randint(3, (256,), generator=g)]
        return dsm_loss(NetDenoiser(net, VP(), "x0"), x, t, torch.randn(256, 1, generator=g), "x0")

    def expected(a, b):  # E (x - a z - b)^2, mean over the times
        total = 0.0
        for t, a_t, b_t in zip(ts, a.tolist(), b.tolist(), strict=True):
            gain = 1 - a_t * VP().alpha(t)
            total += (gain * std) ** 2 + (a_t * VP().sigma(t)) ** 2 + (gain * m - b_t) ** 2
        return total / 3

    net = PerTime()
    before = expected(net.a.detach(), net.b.detach())
    fit(net, loss, Recipe(1, lr=0.01, ema=0.0), generator(26), progress=False)
    assert expected(net.a.detach(), net.b.detach()) < before
    net = fit(PerTime(), loss, Recipe(300, lr=0.1, ema=0.95), generator(27), progress=False).net
    for t, a, b in zip(ts, net.a.tolist(), net.b.tolist(), strict=True):  # E[x | z_t] is linear
        gain = VP().alpha(t) * std**2 / ((VP().alpha(t) * std) ** 2 + VP().sigma(t) ** 2)
        assert (a, b) == pytest.approx((gain, m - gain * VP().alpha(t) * m), abs=0.03)


# 6 Discretising backward


@pytest.mark.equation("eq-reverse-em")
def test_reverse_em():
    x, t, s = torch.randn(30, 2, dtype=torch.float64, generator=generator(28)), 0.5, 0.49
    z = torch.randn(30, 2, dtype=torch.float64, generator=generator(29))
    for schedule in (VP(), SubVP(), VE(), Cosine()):
        denoiser = exact(asym3(), schedule)
        score_there = torch.from_numpy(score(asym3(), schedule.alpha(t), schedule.sigma(t), x.numpy()))

        def printed(f, g, score_there=score_there):  # the slide's line
            return x - f * x + g**2 * score_there + g * z

        def package(solver, schedule=schedule, denoiser=denoiser):
            (record,) = solver.coefficients(schedule, [t, s])
            return solver.step(denoiser, x, record, None, lambda: z)[0]

        # f_i = f dt and g_i = g sqrt(dt); or those of the forward chain x_t = a x_s + sqrt(v) z
        h, a = t - s, schedule.alpha(t) / schedule.alpha(s)
        em = printed(schedule.f(t) * h, math.sqrt(schedule.g2(t) * h))
        torch.testing.assert_close(package(EulerMaruyama()), em, rtol=1e-12, atol=1e-12)
        chain = printed(a - 1, math.sqrt(schedule.sigma(t) ** 2 - (a * schedule.sigma(s)) ** 2))
        torch.testing.assert_close(package(ReverseDiffusion()), chain, rtol=1e-9, atol=1e-9)
        literally = printed(schedule.f(t), math.sqrt(schedule.g2(t)))
        assert float((literally - em).abs().max()) > 1  # without the convention it is another step


@pytest.mark.equation("eq-vp-reverse-sde")
def test_vp_reverse_sde():
    x, t = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], 0.4
    there = torch.from_numpy(mix_score(x.numpy(), VP().alpha(t), VP().sigma(t)))
    beta = 0.1 + 19.9 * t
    found = reverse_drift(ExactDenoiser(mix(), VP()), x, t)
    torch.testing.assert_close(found, -beta * (x / 2 + there), rtol=1e-10, atol=1e-10)

    def check(drift):  # unit data, whose score is -x, have variance 1 at all times
        v = unit_variance([1 - drift(1.0, -1.0) * b for b in BETA], np.sqrt(BETA))
        near(variance=(v, 1, 1e-3))

    check(lambda x, s: -(x / 2 + s))
    with pytest.raises(AssertionError, match=r"variance (6\.[5-9]|7\.)\d*e\+08, not 1"):
        check(lambda x, s: -(x - s) / 2)


@pytest.mark.equation("eq-vp-reverse-em")
def test_vp_reverse_em():
    def check(step):  # coefficients of x and of the score
        a = [step(b)[0] - step(b)[1] for b in BETA]
        near(variance=(unit_variance(a, np.sqrt(BETA)), 1, 1e-3))

    check(lambda b: (1 + b / 2, b))
    assert unit_variance(1 - BETA / 2, np.sqrt(BETA)) == pytest.approx(1.0014, abs=2e-4)
    with pytest.raises(AssertionError, match=r"variance 11\.05\d*, not 1"):  # half of the score
        check(lambda b: (1 + b / 2, b / 2))
    assert unit_variance(np.ones(1000), np.sqrt(BETA)) == pytest.approx(1 + BETA.sum(), rel=1e-12)
    # line (a) is line (b), and neither is a step of the SDE of S55, whose score has the other sign
    for x, s in ((0.7, -1.2), (-0.3, 2.0)):
        assert x + 0.01 * (x - s) + 0.02 * s == pytest.approx(1.01 * x + 0.01 * s)

    solver = EulerMaruyama()
    (record,) = solver.coefficients(VP(), [0.5, 0.499])
    b = (0.1 + 19.9 * 0.5) * 0.001
    assert (record.a, record.b, record.n) == pytest.approx(
        (1 + b / 2, -b / VP().sigma(0.5), math.sqrt(b)), rel=1e-9
    )

    def run(share):
        def step(x, t, s, z):
            beta = VP().g2(t) * (t - s)
            pull = mix_score(x, VP().alpha(t), VP().sigma(t))
            return (1 + beta / 2) * x + share * beta * pull + math.sqrt(beta) * z

        return walk(step, DOWN, draws(4000), 30)

    near_mix(run(1))
    with pytest.raises(AssertionError, match=r"variance 4\.\d*, not 1\.2499"):
        near_mix(run(0.5))


@pytest.mark.equation("eq-ancestral")
def test_ancestral():
    t, s, x0, x = 0.5, 0.4, 0.7, -1.1
    a = VP().alpha(t) / VP().alpha(s)
    v = 1 - a**2
    precision = a**2 / v + 1 / VP().sigma(s) ** 2  # of x_s given x_t and x_0, by Bayes
    mean = (a * x / v + VP().alpha(s) * x0 / VP().sigma(s) ** 2) / precision
    eps = (x - VP().alpha(t) * x0) / VP().sigma(t)
    score_there = -eps / VP().sigma(t)

    def check(found, variance):
        near(mean=(found, mean, 1e-12), variance=(variance, 1 / precision, 1e-12))

    (record,) = Ancestral().coefficients(VP(), [t, s])
    check(record.a * x + record.b * eps, record.n**2)
    check((x + v * score_there) / math.sqrt(1 - v), v * VP().sigma(s) ** 2 / VP().sigma(t) ** 2)
    with pytest.raises(AssertionError, match="mean"):  # the Euler-Maruyama step, even with all of its score
        check((1 + v / 2) * x + v * score_there, v * VP().sigma(s) ** 2 / VP().sigma(t) ** 2)
    with pytest.raises(AssertionError, match="mean"):  # and as printed
        check((1 + v / 2) * x + v / 2 * score_there, v)

    betas = [0.04, 0.02, 0.01, 0.005]  # the two means differ by O(beta^2)
    gaps = [abs((1.3 - 0.8 * b) / math.sqrt(1 - b) - (1 + b / 2) * 1.3 + 0.8 * b) for b in betas]
    assert empirical_order(betas, gaps) == pytest.approx(2.01, abs=0.02)
    posterior = (1 - ALPHA_BAR[499]) / (1 - ALPHA_BAR[500]) * BETA[500]
    assert (posterior, BETA[500], 1 - ALPHA_BAR[500]) == pytest.approx(
        (0.0100513, 0.0100596, 0.9222), rel=1e-4
    )
    start = torch.from_numpy(draws(4000))[:, None]
    near_mix(
        sample(ExactDenoiser(mix(), VP()), Ancestral(), start, VP().grid(300), generator(31))[:, 0].numpy()
    )


VE_LADDER = 0.01 * 5000.0 ** (np.arange(1001) / 1000)  # sigma_0 ... sigma_1000
LADDER_GAP = np.diff(VE_LADDER**2, prepend=0)  # d sigma^2 over one step
VE_RATE = 2 * math.log(5000) * VE_LADDER**2  # d sigma^2 / dt


def ve_run(step):
    """The mixture from N(0, 50^2) down the ladder: step(i, score, z) is what is added."""

    def whole(x, i, j, z):
        return x + step(i, mix_score(x, 1.0, VE_LADDER[i]), z)

    return walk(whole, range(1000, 0, -1), draws(3000, 50.0), 32)


@pytest.mark.equation("eq-ve-reverse-sde")
def test_ve_reverse_sde():
    x, t = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], 0.4
    there = torch.from_numpy(mix_score(x.numpy(), 1.0, VE().sigma(t)))
    found = reverse_drift(ExactDenoiser(mix(), VE()), x, t)
    torch.testing.assert_close(found, -2 * math.log(5000) * VE().sigma(t) ** 2 * there, rtol=1e-9, atol=1e-9)
    near_mix(ve_run(lambda i, s, z: VE_RATE[i] * s / 1000 + math.sqrt(VE_RATE[i] / 1000) * z))
    printed = ve_run(lambda i, s, z: LADDER_GAP[i] * (s + z))
    near(mean=(printed.mean(), 0.418, 0.02), variance=(printed.var(), 0.564, 0.02))  # the audit's
    with pytest.raises(AssertionError, match=r"mean 0\.\d*, not 0\.11; variance 0\.\d*, not 1\.2499"):
        near_mix(printed)  # the diffusion without its root


@pytest.mark.equation("eq-ve-reverse-em")
def test_ve_reverse_em():
    near_mix(ve_run(lambda i, s, z: LADDER_GAP[i] * s + math.sqrt(LADDER_GAP[i]) * z))
    t, s = 0.4, 0.399
    (record,) = ReverseDiffusion().coefficients(VE(), [t, s])
    v = VE().sigma(t) ** 2 - VE().sigma(s) ** 2
    assert (record.a, record.b, record.n) == pytest.approx((1, -v / VE().sigma(t), math.sqrt(v)), rel=1e-9)
    (record,) = Ancestral().coefficients(VE(), [t, s])  # the ancestral step has a little less noise
    assert record.n == pytest.approx(math.sqrt(v) * VE().sigma(s) / VE().sigma(t), rel=1e-9)

    def check(drift, noise):  # five steps for Gaussian data of variance 1
        v = VE_LADDER[-1] ** 2 + 1
        for i in range(1000, 995, -1):
            v = (1 - drift(i) / (VE_LADDER[i] ** 2 + 1)) ** 2 * v + noise(i) ** 2
        near(variance=(v, VE_LADDER[995] ** 2 + 1, 0.01 * v))

    check(lambda i: LADDER_GAP[i], lambda i: math.sqrt(LADDER_GAP[i]))
    with pytest.raises(AssertionError, match=r"variance \d\.\d*e\+15, not 229"):  # both dt missing
        check(lambda i: VE_RATE[i], lambda i: math.sqrt(VE_RATE[i]))
    with pytest.raises(AssertionError, match=r"variance 194\d\d\d, not 229"):  # one mended, not the other
        check(lambda i: LADDER_GAP[i], lambda i: math.sqrt(VE_RATE[i]))


@pytest.mark.equation("eq-annealed-langevin")
def test_annealed_langevin():
    # At a fixed level whose law is N(0, 1), score -x: where does x <- a x + n z settle?
    def settled(a, n):
        v = 5.0
        for _ in range(5000):
            v = a**2 * v + n**2
        return v

    def langevin(c):
        snr = math.sqrt(c) / (2 * VP().sigma(HALF))  # 2 (snr sigma)^2 = c / 2
        a, _, n = affine_step(AnnealedLangevin(1, snr), exact(gaussian(), VP()), 0.51, HALF)
        return settled(a, n)

    def predictor(c):
        return settled(1 - c, math.sqrt(c))

    sizes = (0.5, 0.1, 0.01)
    assert [langevin(c) for c in sizes] == pytest.approx([1 / (1 - c / 4) for c in sizes], rel=1e-9)
    assert [langevin(c) for c in sizes] == pytest.approx([1.143, 1.026, 1.0025], abs=1e-3)
    assert [predictor(c) for c in sizes] == pytest.approx([0.667, 0.526, 0.5025], abs=1e-3)

    def check(method):  # of invariant variance 1 as its step goes to 0
        near(variance=(method(0.01), 1, 0.01))

    check(langevin)
    with pytest.raises(AssertionError, match=r"variance 0\.502\d*, not 1"):  # a reverse step, repeated
        check(predictor)
