import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from problems import LAWS, MAIN, asym3, exact, flow, mix, ring8, within
from torch import nn

from diffedu.denoiser import Counted, NetDenoiser, Prediction
from diffedu.likelihood import log_likelihood
from diffedu.schedules import VE, VP, Cosine, Schedule, SubVP


def points(law, n, generator):
    """Draws of the law at t_min and as many points spread over the plane around it."""
    spread = torch.randn(n, law.means.shape[1], dtype=torch.float64, generator=generator)
    return torch.cat([law.sample(n, generator), spread])


@dataclass(frozen=True)
class Isotropic:
    """Data N(0, std^2 I) in any shape, its score by hand."""

    schedule: Schedule
    std: float

    def __call__(self, x, t):
        shape = (-1, *[1] * (x.ndim - 1))
        alpha, sigma = (
            c(t.double()).to(x).reshape(shape) for c in (self.schedule.alpha, self.schedule.sigma)
        )
        return Prediction(x, alpha, sigma, "score", -x / (alpha**2 * self.std**2 + sigma**2))


class Bend(nn.Module):
    """A smooth network that knows nothing of any data."""

    def __init__(self, dim, generator):
        super().__init__()
        self.inner, self.outer = nn.Linear(dim + 1, 16).double(), nn.Linear(16, dim).double()
        for p in self.parameters():
            nn.init.normal_(p, std=0.35, generator=generator)

    def forward(self, x, lam):
        return self.outer(torch.tanh(self.inner(torch.cat([x, 0.3 * lam[:, None]], 1))))


def bend(dim, schedule):
    return NetDenoiser(Bend(dim, torch.Generator().manual_seed(0)), schedule, "v")


@pytest.mark.parametrize("schedule", MAIN.values(), ids=MAIN)
@pytest.mark.parametrize("law", LAWS)
@pytest.mark.equation("eq-continuous-flow")
def test_with_its_exact_prior_a_mixture_has_its_own_density(law, schedule, generator):
    law = LAWS[law]()
    x = points(law, 10, generator)
    found = log_likelihood(exact(law, schedule), x, law.marginal(schedule, schedule.t_max))
    expected = law.marginal(schedule, schedule.t_min).log_prob(x)
    assert float((found - expected).abs().max()) < 1e-6


@pytest.mark.parametrize("law", [asym3(), mix()], ids=["asym3", "mix"])
@pytest.mark.parametrize("schedule", [VP(), VE(sigma_max=3.0), Cosine(t_max=0.9), SubVP()], ids=repr)
def test_the_default_prior_costs_what_it_differs_from_the_law_at_t_max(law, schedule, generator):
    x = law.sample(20, generator)
    end, sigma = schedule.t_max, schedule.sigma(schedule.t_max)
    x_T = torch.from_numpy(flow(law, schedule, x.numpy(), schedule.t_min, end))
    gaussian = torch.distributions.Normal(0.0, sigma).log_prob(x_T).sum(1)
    cost = gaussian - law.marginal(schedule, end).log_prob(x_T)
    found = log_likelihood(exact(law, schedule), x) - law.marginal(schedule, schedule.t_min).log_prob(x)
    assert float(cost.abs().max()) > 1e-4  # there is something to see
    assert float((found - cost).abs().max()) < 1e-6


@pytest.mark.parametrize("schedule", [VP(), Cosine()], ids=repr)
@pytest.mark.parametrize("shape", [(3,), (1, 3, 3)])
def test_data_of_any_shape_and_both_traces_on_a_gaussian(schedule, shape, generator):
    std, dims = 0.4, math.prod(shape)
    x = 0.5 * torch.randn(5, *shape, dtype=torch.float64, generator=generator)

    def log_normal(x, t):
        variance = schedule.alpha(t) ** 2 * std**2 + schedule.sigma(t) ** 2
        return -0.5 * (x.flatten(1).square().sum(1) / variance + dims * math.log(2 * math.pi * variance))

    prior = SimpleNamespace(log_prob=lambda x: log_normal(x, schedule.t_max))
    for trace in ("exact", "hutchinson"):  # random signs are exact where J is a multiple of 1
        found = log_likelihood(Isotropic(schedule, std), x, prior, trace, generator=generator)
        assert float((found - log_normal(x, schedule.t_min)).abs().max()) < 1e-6


@pytest.mark.parametrize(("dim", "spacing"), [(1, 0.05), (2, 0.15)])
def test_the_density_of_any_network_integrates_to_1(dim, spacing):
    line = torch.arange(-9, 9, spacing, dtype=torch.float64)
    x = torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
    denoiser = bend(dim, VP())
    p = log_likelihood(denoiser, x, rtol=1e-6).exp()
    assert float(p.sum()) * spacing**dim == pytest.approx(1, abs=1e-6)
    gaussian = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum(1).exp()
    assert float((p - gaussian).abs().sum()) * spacing**dim > 0.1  # and is no Gaussian


def test_hutchinson_is_unbiased_and_its_variance_falls_with_the_probes(generator, global_rng_untouched):
    denoiser, n = exact(asym3(), VP()), 400
    for x in ([[-1.0, 0.6]], [[0.4, -0.9]]):
        x = torch.tensor(x, dtype=torch.float64).expand(n, -1)
        truth = log_likelihood(denoiser, x[:1], rtol=1e-5)
        draws = log_likelihood(denoiser, x, None, "hutchinson", 1e-5, generator=generator)
        assert float(draws.std()) > 0.005
        assert within(draws.mean(), truth, draws.std() / math.sqrt(n))
        many = log_likelihood(denoiser, x, None, "hutchinson", 1e-5, generator=generator, probes=16)
        assert within(many.mean(), truth, many.std() / math.sqrt(n))
        # a variance is known to sqrt(2 / n) or better, the ratio of two to sqrt(4 / n)
        assert float(draws.var() / many.var()) == pytest.approx(16, rel=4 * math.sqrt(4 / n))


def test_the_generator_decides_the_probes_and_the_line_needs_none(generator):
    x = mix().sample(10, generator)
    denoiser = exact(mix(), VP())
    one = log_likelihood(denoiser, x, None, "hutchinson", generator=generator)
    torch.testing.assert_close(one, log_likelihood(denoiser, x), rtol=1e-12, atol=1e-12)
    x, denoiser = asym3().sample(10, generator), exact(asym3(), VP())
    seeds = [torch.Generator().manual_seed(s) for s in (1, 1, 2)]
    first, again, other = (log_likelihood(denoiser, x, None, "hutchinson", 1e-4, generator=g) for g in seeds)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_sample_is_judged_by_itself(generator):
    """Its value does not depend on the batch, and a hard point far away costs the others nothing."""
    law, hard = asym3(), torch.tensor([[2.5, -2.0]], dtype=torch.float64)
    x = law.sample(3, generator)
    denoiser = exact(law, VP())
    together = log_likelihood(denoiser, torch.cat([x, hard]))
    for i in range(3):
        torch.testing.assert_close(log_likelihood(denoiser, x[i : i + 1])[0], together[i], rtol=0, atol=1e-10)
    assert log_likelihood(denoiser, x[:0]).shape == (0,)
    sizes = []

    def watched(x, t):
        sizes.append(len(x))
        return denoiser(x, t)

    watched.schedule = VP()
    log_likelihood(watched, torch.cat([x, hard]))
    assert sizes[0] == 4
    assert sizes[-1] == 1
    assert sizes == sorted(sizes, reverse=True)


def test_rtol_governs_the_error_and_the_cost(generator):
    law, errors, calls = ring8(), [], []
    x = law.sample(30, generator)
    expected = law.marginal(VP(), 1e-3).log_prob(x)
    for rtol in (1e-4, 1e-6, 1e-8):
        counted = Counted(exact(law, VP()))
        found = log_likelihood(counted, x, law.marginal(VP(), 1.0), rtol=rtol)
        errors.append(float((found - expected).abs().max()))
        calls.append(counted.nfe)
    assert all(error < 30 * rtol for error, rtol in zip(errors, (1e-4, 1e-6, 1e-8), strict=True))
    assert calls == sorted(calls)
    assert calls[2] < 900


@pytest.mark.parametrize("prior", [None, asym3().marginal(VP(), 1.0)], ids=["default", "exact"])
def test_single_precision_stays_single_and_good(prior, generator):
    x = asym3().sample(20, generator)
    double = log_likelihood(exact(asym3(), VP()), x, prior)
    seen = []

    def watched(x, t):
        seen.append(x.dtype)
        return exact(asym3(), VP())(x, t)

    watched.schedule = VP()
    single = log_likelihood(watched, x.float(), prior)
    assert single.dtype == torch.float32
    assert set(seen) == {torch.float32}
    assert len(seen) < 900  # rounding does not drive the steps down
    assert float((single - double).abs().max()) < 1e-4


def test_no_gradients_are_recorded_and_none_are_needed(generator):
    denoiser, x = bend(2, VP()), torch.randn(4, 2, dtype=torch.float64, generator=generator)
    plain = log_likelihood(denoiser, x, rtol=1e-4)
    for trace in ("exact", "hutchinson"):
        assert not log_likelihood(denoiser, x.requires_grad_(), None, trace, 1e-4).requires_grad
    assert all(p.grad is None for p in denoiser.net.parameters())
    assert x.grad is None
    with torch.inference_mode():
        assert torch.equal(log_likelihood(denoiser, x, rtol=1e-4), plain)
        log_likelihood(denoiser, torch.randn(4, 2, dtype=torch.float64), None, "hutchinson", 1e-4)
    with torch.no_grad():
        assert torch.equal(log_likelihood(denoiser, x, rtol=1e-4), plain)


@pytest.mark.cuda
def test_the_device_follows_the_state():
    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(4, 2, device="cuda", generator=g)
    for trace in ("exact", "hutchinson"):
        found = log_likelihood(exact(asym3(), VP()), x, None, trace, generator=g)
        assert (found.device.type, found.dtype) == ("cuda", torch.float32)


X, D = torch.zeros(4, 2), exact(asym3(), VP())


def spoilt(x, t):
    return Prediction(x, 0.5, 0.5, "v", x * math.nan)


spoilt.schedule = VP()
REFUSED = {
    "no tensor": (lambda: log_likelihood(D, [[0.0]]), "x must be a floating tensor", "list"),
    "integers": (lambda: log_likelihood(D, X.long()), "x must be a floating tensor", "torch.int64"),
    "flat": (lambda: log_likelihood(D, X[:, 0]), "x must be of shape (B, *)", "(4,)"),
    "nan": (lambda: log_likelihood(D, X / 0), "x must be finite", "8 nan or inf"),
    "trace": (lambda: log_likelihood(D, X, trace="hutch"), '"exact" or "hutchinson"', "'hutch'"),
    "rtol 0": (lambda: log_likelihood(D, X, rtol=0.0), "rtol must lie in (0, 1)", "0.0"),
    "rtol nan": (lambda: log_likelihood(D, X, rtol=math.nan), "rtol must lie in (0, 1)", "nan"),
    "probes": (lambda: log_likelihood(D, X, probes=0), "probes must be an int of at least 1", "0"),
    "t_min 0": (
        lambda: log_likelihood(exact(asym3(), VP(t_min=0.0)), X),
        "needs a finite lam at both ends",
        "lam=inf at t_min=0.0",
    ),
    "t_max 1": (
        lambda: log_likelihood(exact(asym3(), Cosine(t_max=1.0)), X),
        "finite lam",
        "lam=-inf at t_max",
    ),
    "prior": (
        lambda: log_likelihood(D, X, torch.distributions.Normal(0.0, 1.0), rtol=1e-2),
        "one value per sample, (4,)",
        "(4, 2)",
    ),
    "denoiser": (lambda: log_likelihood(spoilt, X), "the denoiser must give finite values", "t = 0.001"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_with_what_is_allowed_and_what_came(case):
    call, *fragments = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as refusal:
        call()
    for fragment in fragments:
        assert fragment in str(refusal.value)
