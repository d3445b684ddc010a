import math

import numpy as np
import pytest
import torch
from problems import LAWS, MAIN, asym3, exact, gaussian, mix, mixture, score, within
from scipy import stats
from scipy.integrate import quad
from scipy.special import logsumexp

from diffedu.mixtures import EmpiricalDenoiser, GaussianMixture
from diffedu.schedules import VE, VP, Cosine

every_law = pytest.mark.parametrize("law", [make() for make in LAWS.values()], ids=LAWS)
every_schedule = pytest.mark.parametrize("schedule", MAIN.values(), ids=MAIN)


def normal(x, mean, std):
    return math.exp(-0.5 * ((x - mean) / std) ** 2) / (std * math.sqrt(2 * math.pi))


def gradient(law, x):
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(law.log_prob(x).sum(), x)[0]


def points(law, generator, n=200):
    """Where the data lie, and far outside."""
    x = law.sample(n, generator)
    return torch.cat([x, 3 * x + 1])


@every_law
def test_log_prob_is_the_log_density(law, generator):
    x = points(law, generator)
    parts = [
        stats.multivariate_normal(m, c).logpdf(x.numpy())
        for m, c in zip(law.means.numpy(), law.covs.numpy(), strict=True)
    ]
    want = logsumexp(np.array(parts).reshape(len(parts), -1).T, axis=1, b=law.weights.numpy())
    np.testing.assert_allclose(law.log_prob(x).numpy(), want, rtol=1e-12, atol=1e-12)


@every_law
def test_score_is_the_gradient_of_log_prob(law, generator):
    x = points(law, generator)
    torch.testing.assert_close(law.score(x), gradient(law, x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        law.score(x), torch.from_numpy(score(law, 1.0, 0.0, x.numpy())), rtol=1e-9, atol=1e-9
    )


@every_law
@every_schedule
@pytest.mark.equation("eq-kernel")
def test_the_exact_denoiser_has_the_score_of_the_noised_law(law, schedule, generator):
    denoiser = exact(law, schedule)
    for t in (schedule.t_min, 0.05, 0.5, schedule.t_max):
        x = points(law.marginal(schedule, t), generator, 50)
        want = gradient(law.marginal(schedule, t), x)
        scale = want.abs().max()
        torch.testing.assert_close(denoiser(x, t).score / scale, want / scale, rtol=0, atol=1e-12)
        for same in (torch.tensor(t, dtype=torch.float64), torch.full((len(x),), t, dtype=torch.float64)):
            torch.testing.assert_close(denoiser(x, same).score, denoiser(x, t).score, rtol=1e-12, atol=1e-14)
    t = torch.linspace(schedule.t_min, schedule.t_max, len(x), dtype=torch.float64)
    each = [denoiser(x[i : i + 1], float(t[i])).x0 for i in range(len(x))]
    torch.testing.assert_close(denoiser(x, t).x0, torch.cat(each), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["vp", "subvp", "ve", "cosine"])
def test_the_posterior_mean_on_the_line_is_tweedies_by_quadrature(name):
    schedule, law = MAIN[name], mix()
    for t in (0.05, 0.3, 0.6):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)

        def joint(x0, x, power, alpha=alpha, sigma=sigma):
            density = sum(w * normal(x0, m, s) for w, m, s in ((0.3, -1.5, 0.3), (0.7, 0.8, 0.4)))
            return x0**power * density * normal(x, alpha * x0, sigma)

        for x in (-1.0, 0.3, 1.7):
            x_t = torch.tensor([[x]], dtype=torch.float64)
            # the integrand lives near the two components and near x / alpha
            stops = sorted({-1.5, 0.8, min(max(x / alpha, -5.0), 5.0)})
            z, first = (
                quad(joint, -6, 6, (x, power), points=stops, epsabs=1e-14, epsrel=1e-12, limit=200)[0]
                for power in (0, 1)
            )
            assert float(law.marginal(schedule, t).log_prob(x_t)) == pytest.approx(math.log(z), abs=1e-9)
            prediction = exact(law, schedule)(x_t, t)
            assert float(prediction.x0) == pytest.approx(first / z, abs=1e-9)
            # -E[eps | x] / sigma = score
            eps = (x - alpha * first / z) / sigma
            assert float(prediction.score) == pytest.approx(-eps / sigma, abs=1e-9 / sigma**2)


def test_the_numbers_of_the_audit_on_the_line():
    prediction = exact(mix(), VP())(torch.tensor([[0.3]], dtype=torch.float64), 0.3)
    assert float(prediction.score) == pytest.approx(0.0382656134, abs=1e-10)
    assert float(prediction.x0) == pytest.approx(0.5132232231, abs=1e-10)


@every_law
@every_schedule
def test_marginal_is_the_law_of_the_noised_data(law, schedule, generator):
    t, n = 0.4, 40_000
    noised = law.marginal(schedule, t)
    x0 = law.sample(n, generator)
    eps = torch.randn(x0.shape, dtype=x0.dtype, generator=generator)
    x = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
    # E e^{i u.x} is a product of what x0 and eps contribute; for a mixture it is a closed form
    for u in torch.tensor([[0.3], [1.0]], dtype=torch.float64) * torch.ones(1, x.shape[1]):
        u = u / noised.covs.diagonal(dim1=-2, dim2=-1).max().sqrt()
        phase = noised.means @ u
        decay = torch.exp(-0.5 * torch.einsum("d,kde,e->k", u, noised.covs, u))
        for wave in (torch.cos, torch.sin):
            draws = wave(x @ u)
            want = (noised.weights * decay * wave(phase)).sum()
            assert within(draws.mean(), want, draws.std() / math.sqrt(n))


@every_law
def test_draws_have_the_moments_of_the_law(law, generator, global_rng_untouched):
    n = 40_000
    x = law.sample(n, generator)
    assert (x.shape, x.dtype) == ((n, law.means.shape[1]), torch.float64)
    mean = law.weights @ law.means
    spread = law.means - mean
    cov = torch.einsum("k,kde->de", law.weights, law.covs) + torch.einsum(
        "k,kd,ke->de", law.weights, spread, spread
    )
    assert within(x.mean(0), mean, x.std(0) / math.sqrt(n))
    products = torch.einsum("bd,be->bde", x - mean, x - mean)
    assert within(products.mean(0), cov, products.std(0) / math.sqrt(n))
    again = law.sample(n, torch.Generator().manual_seed(0))
    assert torch.equal(x, again)
    assert not torch.equal(x, law.sample(n, generator))


def test_draws_come_from_each_component_with_its_covariance(generator):
    law = mixture(
        [0.25, 0.75],
        [[-50.0, 0.0], [50.0, 0.0]],
        [[[2.0, 0.9], [0.9, 1.0]], [[0.5, -0.3], [-0.3, 0.4]]],
    )
    n = 40_000
    x = law.sample(n, generator)
    left = x[:, 0] < 0
    share = left.double()
    assert within(share.mean(), 0.25, share.std() / math.sqrt(n))
    for part, mean, cov in zip((x[left], x[~left]), law.means, law.covs, strict=True):
        products = torch.einsum("bd,be->bde", part - mean, part - mean)
        assert within(products.mean(0), cov, products.std(0) / math.sqrt(len(part)))


def test_a_law_of_one_precision_serves_states_of_another(generator):
    law = asym3()
    single = GaussianMixture(law.weights.float(), law.means.float(), law.covs.float())
    assert single.sample(3, generator).dtype == torch.float32
    x = law.sample(20, generator)
    for dtype in (torch.float32, torch.float64):
        for one in (law, single):
            assert one.log_prob(x.to(dtype)).dtype == dtype
            assert exact(one, VP())(x.to(dtype), 0.4).x0.dtype == dtype
            t = torch.full((20,), 0.4, dtype=torch.float64)
            assert exact(one, VP())(x.to(dtype), t).score.dtype == dtype
    torch.testing.assert_close(single.score(x.float()), law.score(x).float(), rtol=1e-4, atol=1e-4)


@every_schedule
def test_a_point_cloud_is_a_mixture_without_width(schedule, generator):
    centres = asym3().sample(30, generator)
    width = 1e-6
    narrow = mixture(np.full(30, 1 / 30), centres, np.tile(width**2 * np.eye(2), (30, 1, 1)))
    for t in (0.05, 0.3, 0.7, schedule.t_max):
        x = narrow.marginal(schedule, t).sample(100, generator)
        got, want = EmpiricalDenoiser(centres, schedule)(x, t), exact(narrow, schedule)(x, t)
        torch.testing.assert_close(got.eps, want.eps, rtol=1e-6, atol=1e-6)
        same = EmpiricalDenoiser(centres, schedule)(x, torch.full((100,), t, dtype=torch.float64))
        torch.testing.assert_close(same.x0, got.x0, rtol=1e-10, atol=1e-10)


def test_a_point_cloud_at_the_ends_of_time(generator):
    centres = asym3().sample(30, generator)
    # at t -> 0 the nearest point, at alpha = 0 the mean of all
    near = EmpiricalDenoiser(centres, VP(t_min=1e-9))(centres + 1e-6, 1e-9)
    torch.testing.assert_close(near.x0, centres, rtol=0, atol=1e-9)
    whole = Cosine(t_max=1.0)
    far = EmpiricalDenoiser(centres, whole)(centres, 1.0)
    torch.testing.assert_close(far.x0, centres.mean(0).expand(30, 2), rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match="sigma > 0; got t = 0"):
        EmpiricalDenoiser(centres, VP(t_min=0.0))(centres, 0.0)
    torch.testing.assert_close(exact(asym3(), whole)(centres, 1.0).score, -centres)


def test_a_denoiser_is_defined_between_t_min_and_t_max(generator):
    law = gaussian(dim=2)
    x = law.sample(4, generator)
    for denoiser in (exact(law, VE()), EmpiricalDenoiser(x, VE())):
        for t in (0.0, torch.tensor(0.0), torch.tensor([0.5, 0.5, 0.5, 1e-4])):
            with pytest.raises(ValueError, match=r"t must lie in \[0.001, 1\]"):
                denoiser(x, t)


@pytest.mark.cuda
def test_the_device_follows_the_state():
    law = asym3()
    x = law.sample(10).cuda()
    for denoiser in (exact(law, VP()), EmpiricalDenoiser(law.sample(5), VP())):
        assert denoiser(x, torch.linspace(0.1, 0.9, 10)).eps.device == x.device
    assert law.log_prob(x).device == x.device
    assert law.sample(3, torch.Generator("cuda")).shape == (3, 2)
