"""The survey's models of few steps, S104-S120, S122, S123: run as `test_survey_forward` runs the rest.

Each test applies one check to the package; where the audit's verdict is A or B the printed form goes through
the same check and must fail it, for the reason that `match` names. On a line the exact consistency function
is F_eps^-1(F_t(x)), of the marginals' distribution functions, with no ODE; progressive distillation is held
against DDIM steps in numpy. Further oracles: closed forms for Gaussians, quadrature and sympy.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import sympy
import torch
from problems import exact, gaussian, mix, point_mass
from scipy.integrate import quad, solve_ivp
from scipy.stats import norm
from test_survey_backward import MIX_PARTS, mix_score
from test_survey_forward import equal, generator, near
from test_survey_ode import amp, column, ddim, dev, errors, noise_at, quantile, run
from torch import nn

from diffedu.consistency import (
    ConsistencyFunction,
    SolutionMap,
    SquaredL2,
    cd_loss,
    ct_loss,
    euler_step,
    heun_step,
    multistep,
)
from diffedu.denoiser import NetDenoiser, Prediction
from diffedu.distillation import progressive_loss, progressive_target, snr_plus_one, truncated_snr
from diffedu.exponential import DDIM, DPMSolver
from diffedu.metrics import empirical_order
from diffedu.refinement import Refinement
from diffedu.sampling import encode
from diffedu.schedules import VE, VP, Cosine
from diffedu.sde import perturb
from diffedu.students import SWISS_ROLL_DISTILLED

EDM = VE(0.002, 80.0, t_min=0.0)  # alpha = 1: t_of_lam(-log r) is the time of noise level r
EPSILON = 0.002  # and where its paths end
VP0, COSINE = VP(t_min=0.0), Cosine(t_min=0.0, t_max=1.0)
DENOISER = exact(mix(), VP())
SHARES = (np.arange(400) + 0.5) / 400


def time_of_level(r):
    return EDM.t_of_lam(-math.log(r))


# the exact consistency function on a line, by distribution functions


def below(x, r):
    """The share of x_0 + r z below x."""
    return sum(p * norm.cdf(x, m, math.hypot(s, r)) for p, m, s in MIX_PARTS)


def quantile_at(u, r):
    """The point of x_0 + r z below which the share u lies: the path of the EDM ODE."""
    low, high = np.full(np.shape(u), -500.0), np.full(np.shape(u), 500.0)
    for _ in range(70):
        middle = (low + high) / 2
        under = below(middle, r) < u
        low, high = np.where(under, middle, low), np.where(under, high, middle)
    return (low + high) / 2


def origin(x, r):
    """f(x, r), the point at EPSILON of the path through x at level r."""
    return quantile_at(below(np.asarray(x), r), EPSILON)


def of_columns(x, t):
    """The same as a `Map` on the EDM schedule."""
    return column(origin(x[:, 0].numpy(), EDM.sigma(t)))


def draws_of_mix(n, seed):
    """n draws of x_0, and as many of the noise."""
    rng = np.random.default_rng(seed)
    part = rng.choice(2, size=n, p=[p for p, _, _ in MIX_PARTS])
    _, means, stds = (np.array(v) for v in zip(*MIX_PARTS, strict=True))
    return means[part] + stds[part] * rng.standard_normal(n), rng.standard_normal(n)


# 11 Consistency models


@pytest.mark.equation("eq-recap")
def test_recap():
    def check(denoiser):  # five steps of the model against its own ODE
        x = quantile(SHARES, 1.0)
        few = run(denoiser, DDIM(), x, VP().grid(5))
        many = run(denoiser, DPMSolver(3), x, VP().grid(200))
        gap = float(np.abs(few - many).max())
        assert gap < 1e-9, f"five steps leave an error of {gap:.2f}"

    check(point_mass(VP(), [0.8]))  # straight paths
    untrained = point_mass(VP(), [-3.0])
    check(untrained)  # and as straight for a model that knows nothing of the data
    y = quantile(SHARES, 0.5)
    assert np.abs(untrained(column(y), 0.5).eps[:, 0].numpy() - noise_at(y, 0.5)).max() > 0.5
    with pytest.raises(AssertionError, match=r"five steps leave an error of [01]\.\d"):  # the exact model
        check(DENOISER)
    assert errors(DDIM(), VP().grid(5)).max() > 5 * errors(DPMSolver(3), VP().grid(20)).max()


@pytest.mark.equation("eq-consistency-idea")
def test_consistency_idea():
    f = SolutionMap(DENOISER)
    for t in (1.0, 0.5, 0.1, 0.01):
        on_paths = column(quantile(SHARES, t))
        np.testing.assert_allclose(f(on_paths, t)[:, 0], quantile(SHARES, 1e-3), rtol=0, atol=2e-5)
        if t < 1:
            ends = encode(DENOISER, DPMSolver(3), on_paths, VP(t_min=t).grid(200).flip(0))
            np.testing.assert_allclose(ends[:, 0], quantile(SHARES, 1.0), rtol=0, atol=2e-5)

    # the condition: one path through each point. Where all paths end in one datum the end names none of them
    schedule = VP(t_min=1e-12)
    ends = SolutionMap(point_mass(schedule, [0.8]), DDIM(), 20)(column([-2.0, 2.0]), 1.0)
    assert float(ends.diff(dim=0).abs()) < 1e-5


@pytest.mark.equation("eq-consistency-function")
def test_consistency_function():
    mean, std, last = 0.7, 0.5, 80.0

    def closed(x, r):
        return mean + math.sqrt((std**2 + EPSILON**2) / (std**2 + r**2)) * (x - mean)

    levels = np.geomspace(EPSILON, last, 9)
    levels[0], levels[-1] = EPSILON, last
    path = solve_ivp(
        lambda r, x: r * (x - mean) / (std**2 + r**2),  # dx / dr = - r score
        (last, EPSILON),
        [-52.1],
        t_eval=levels[::-1],
        method="DOP853",
        rtol=1e-13,
        atol=1e-13,
    ).y[0, ::-1]
    assert closed(path[-1], last) == pytest.approx(path[0], abs=1e-11)

    def check(f):
        values = [f(x, r) for x, r in zip(path, levels, strict=True)]
        spread = max(values) - min(values)
        assert spread < 1e-5, f"along the path f varies by {spread:.1f}"
        off = abs(values[0] - path[0])
        assert off < 1e-5, f"at its own end f is off by {off:.2f}"

    check(closed)
    solution = SolutionMap(exact(gaussian(mean, std), EDM), steps=200)
    check(lambda x, r: float(solution(column([x]), time_of_level(r) if r > EPSILON else 0.0)))
    network = ConsistencyFunction(Constant(), EDM)  # defined on the closed interval
    assert float(network(column([path[0]]), EDM.t_min)) == path[0]
    with pytest.raises(AssertionError, match=r"along the path f varies by 5\d\.\d"):  # "from x_0 to x_T"
        check(lambda x, r: x)
    # on (epsilon, T] alone nothing ties f to the path
    with pytest.raises(AssertionError, match=r"at its own end f is off by 1\.\d"):
        check(lambda x, r: path[0] + 1.5)


class Constant(nn.Module):
    """A network that answers 0.3 to everything."""

    def forward(self, x, lam):
        return torch.full_like(x, 0.3)


@pytest.mark.equation("eq-boundary-condition")
def test_boundary_condition():
    f, x = ConsistencyFunction(Constant(), EDM, 0.5), column(np.linspace(-3, 3, 7))
    assert torch.equal(f(x, 0.0), x)
    skip, out, _ = f.coefficients(0.0)
    assert (skip, out) == (1.0, 0.0)
    plain = 0.25 / (EPSILON**2 + 0.25), 0.5 * EPSILON / math.hypot(EPSILON, 0.5)
    assert plain == pytest.approx((0.999984, 0.0020), abs=1e-6)  # EDM's own scalings do not hold it

    # at a fixed epsilon: in the limit f(x, 0) = x says nothing of levels that no network sees
    later = ConsistencyFunction(Constant(), VE(0.1, 80.0, t_min=0.0), 0.5)
    assert torch.equal(later(x, 0.0), x)

    # without it a constant has no loss
    t, s = (time_of_level(r) for r in (1.1, 1.0))

    def constant(x, t):
        return torch.full_like(x, 0.3)

    assert float(cd_loss(constant, constant, exact(mix(), EDM), x, t, s).max()) == 0
    assert float(cd_loss(f, f, exact(mix(), EDM), x, t, s).mean()) > 1e-4


def pair(level, n=12_000):
    """x_0 + level z, Euler's estimate of the path's point at level 1 from there, and x_0 + z."""
    x0, z = draws_of_mix(n, 6)
    x = x0 + level * z
    return x, x + (1 - level) * -level * mix_score(x, 1.0, level), x0 + z


@pytest.mark.equation("eq-training-pair")
def test_training_pair():
    def check(level, size, one, other):
        """Whether the exact function has next to no loss on a pair of points, each with its level."""
        loss = float(((origin(*one) - origin(*other)) ** 2).mean())
        assert loss < 2 * size, f"the exact function costs {loss:.1e}"

    for level, size, printed in ((1.1, 3.9e-6, r"1\.[45]e-02"), (1.01, 4.5e-10, r"2\.[5-9]e-04")):
        x, estimate, same_time = pair(level)
        found = float(((origin(x, level) - origin(estimate, 1.0)) ** 2).mean())
        assert found == pytest.approx(size, rel=0.35)  # the audit's
        check(level, size, (x, level), (estimate, 1.0))  # adjacent times
        # the package's pair is this one
        t, s = time_of_level(level), time_of_level(1.0)
        landed = euler_step(exact(mix(), EDM), column(x), t, s)
        np.testing.assert_allclose(landed[:, 0].numpy(), estimate, rtol=1e-9, atol=1e-9)
        loss = cd_loss(of_columns, of_columns, exact(mix(), EDM), column(x), t, s, step=euler_step)
        assert float(loss.mean()) == pytest.approx(found, rel=1e-3)
        with pytest.raises(AssertionError, match=rf"the exact function costs {printed}"):  # both at t
            check(level, size, (same_time, 1.0), (estimate, 1.0))


STD, LEVELS = 0.5, 6  # Gaussian data N(0, STD^2); f(x, t_n) = k_n x is then the exact form


def learn(loss, steps=110):
    """k_0 = 1, ..., k_LEVELS by gradient descent on loss(f, t, s), summed over neighbouring times of VP."""
    ts = VP().grid(LEVELS).flip(0).tolist()
    free = torch.full((LEVELS,), 0.8, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([free], lr=0.05)
    slower = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, steps)
    for _ in range(steps):
        k = torch.cat([torch.ones(1, dtype=torch.float64), free])

        def f(x, t, k=k):
            return k[ts.index(t)] * x

        optimiser.zero_grad()
        sum(loss(f, t, s).mean() for s, t in pairwise(ts)).backward()
        optimiser.step()
        slower.step()
    return free.tolist(), ts[1:]


@pytest.mark.equation("eq-consistency-loss")
def test_consistency_loss():
    # training's pair: the score is a mean over the data, which one datum stands for
    for x in (-1.5, 0.2, 1.1):

        def joint(x0, x=x):
            return sum(p * norm.pdf(x0, m, s) for p, m, s in MIX_PARTS) * norm.pdf(x, x0, 1.0)

        def pull(x0, x=x):
            return -(x - x0) * joint(x0)

        mean = quad(pull, -6, 6, epsabs=1e-13)[0] / quad(joint, -6, 6, epsabs=1e-13)[0]
        assert mean == pytest.approx(float(mix_score(np.array(x), 1.0, 1.0)), abs=1e-9)
    for level, size in ((1.1, 1.5e-2), (1.01, 2.8e-4)):  # so its loss is not 0 at the exact function
        x, _, same = pair(level)
        loss = float(((origin(x, level) - origin(same, 1.0)) ** 2).mean())
        assert loss == pytest.approx(size, rel=0.2)
        x0, z = (column(v) for v in draws_of_mix(12_000, 6))
        t, s = time_of_level(level), time_of_level(1.0)
        found = ct_loss(of_columns, of_columns, EDM, x0, t, s, z, distance=SquaredL2())
        assert float(found.mean()) == pytest.approx(loss, rel=1e-6)

    # what is learned: k, known in closed form
    teacher, z = exact(gaussian(std=STD), VP()), column(norm.ppf((np.arange(24) + 0.5) / 24))

    def width(t):
        return math.hypot(amp(t) * STD, dev(t))

    def check(loss):
        k, ts = learn(loss)  # at t = 1 no later point is left to estimate the printed pair from
        equal("the learned f", k[:-1], [width(1e-3) / width(t) for t in ts[:-1]], 0.03)

    def distilled(f, t, s):
        return cd_loss(f, f, teacher, width(t) * z, t, s, substeps=3)

    shuffled = z[torch.randperm(24, generator=generator(3))]

    def printed(f, t, s):  # one s on both sides: the noisy datum, and the solver's estimate from t
        estimate = heun_step(teacher, perturb(VP(), STD * z, t, shuffled), t, s)
        return (f(perturb(VP(), STD * z, s, shuffled), s) - f(estimate, s)).abs()

    check(distilled)
    with pytest.raises(AssertionError, match=r"the learned f is off by up to (0\.9\d*|1) of"):
        check(printed)

    # and whose gradient: in training without a teacher f must not pull its own target
    levels = np.linspace(EPSILON, 3.0, 400)
    s, t = levels[:-1], levels[1:]

    def check_training(k):
        equal("f", [k], [math.sqrt((STD**2 + EPSILON**2) / (STD**2 + 9.0))], 0.02)

    check_training(np.prod((STD**2 + s * t) / (STD**2 + t**2)))  # the target fixed, level after level
    size = len(t)  # the same f twice: one least-squares problem in k_1 ... k_n
    matrix, right = np.zeros((size, size)), np.zeros(size)
    for n in range(size):
        matrix[n, n] += STD**2 + t[n] ** 2
        if n:
            matrix[n - 1, n - 1] += STD**2 + s[n] ** 2
            matrix[n, n - 1] = matrix[n - 1, n] = -(STD**2 + s[n] * t[n])
    right[0] = STD**2 + s[0] * t[0]
    with pytest.raises(AssertionError, match=r"f is off by up to 0\.[3-9]"):
        check_training(np.linalg.solve(matrix, right)[-1])


@pytest.mark.equation("eq-one-step")
def test_one_step():
    f = SolutionMap(DENOISER)

    def check(place, where):
        """Whether one evaluation of f leads along the paths, from `place` to `where`."""
        found = multistep(f, column(quantile(SHARES, place)), [place], VP())[:, 0].numpy()
        gap = float(np.abs(found - quantile(SHARES, where)).max())
        assert gap < 1e-4, f"f leads {gap:.1f} away"

    for place in (1.0, 0.6, 0.1):
        check(place, 1e-3)
    for place in (0.6, 0.1):
        with pytest.raises(AssertionError, match=r"f leads [1-4]\.\d away"):  # "the noise image"
            check(place, 1.0)
    # f is the identity where a path ends; its x_T is elsewhere, and the ODE run upwards finds it
    assert np.allclose(origin(quantile_at(SHARES, EPSILON), EPSILON), quantile_at(SHARES, EPSILON))
    assert np.abs(quantile_at(SHARES, 80.0) - quantile_at(SHARES, EPSILON)).max() > 52
    up = encode(DENOISER, DPMSolver(3), column(quantile(SHARES, 0.1)), VP(t_min=0.1).grid(100).flip(0))
    np.testing.assert_allclose(up[:, 0].numpy(), quantile(SHARES, 1.0), rtol=0, atol=1e-3)

    # "theoretically": with no loss on N intervals f is the solver's path, of the solver's order
    for step, order in ((euler_step, 1), (heun_step, 2)):
        counts, off = [80, 160, 320], []
        for n in counts:
            x = column(quantile(SHARES, 1.0))
            for t, s in pairwise(VP().grid(n).tolist()):
                x = step(DENOISER, x, t, s)
            off.append(np.median(np.abs(x[:, 0].numpy() - quantile(SHARES, 1e-3))))
        assert empirical_order([1 / n for n in counts], off) == pytest.approx(order, abs=0.25)


@pytest.mark.equation("eq-consistency-algorithms")
def test_consistency_algorithms():
    # A.12 with the exact function: the law, whatever the number of evaluations
    n, data = 4000, quantile_at((np.arange(4000) + 0.5) / 4000, EPSILON)
    for levels in ([80.0], [80.0, 1.0], [80.0, 10.0, 1.0, 0.3]):
        rng = np.random.default_rng(7)
        x = origin(quantile_at(rng.uniform(size=n), 80.0), 80.0)
        for r in levels[1:]:
            x = origin(x + math.sqrt(r**2 - EPSILON**2) * rng.standard_normal(n), r)
        assert np.abs(np.sort(x) - data).mean() < 0.06
        start = column(quantile_at(np.random.default_rng(7).uniform(size=n), 80.0))
        ts = [1.0, *(time_of_level(r) for r in levels[1:])]
        found = multistep(of_columns, start, ts, EDM, generator(8))[:, 0].numpy()
        assert np.abs(np.sort(found) - data).mean() < 0.06
    # A.11: N levels are N - 1 intervals
    k, total = np.arange(0, 1000, 37), 1000
    want = np.ceil(np.sqrt(k / total * (151**2 - 2**2) + 2**2) - 1) + 1
    refinement = Refinement(total, 2, 150, 0.95)
    assert [refinement.intervals_at(int(i)) for i in k] == [max(int(N) - 1, 2) for N in want]
    decay = math.exp(2 * math.log(0.95) / refinement.intervals_at(500))
    assert refinement.decay_at(500) == pytest.approx(decay)


# 12 Progressive distillation


class Targeted:
    """A student that meets its target exactly on the times ts."""

    def __init__(self, teacher, ts):
        self.teacher, self.schedule, self.ts = teacher, teacher.schedule, ts

    def __call__(self, x, t):
        s = self.ts[self.ts.index(t) + 1]
        target = progressive_target(self.teacher, x, t, s, middle_of(self.teacher, t, s))
        return Prediction(x, self.schedule.alpha(t), self.schedule.sigma(t), "x0", target)


def middle_of(teacher, t, s):
    """The time between t and s that the teacher knows, to the last bit."""
    return teacher.ts[teacher.ts.index(t) + 1] if isinstance(teacher, Targeted) else (t + s) / 2


@pytest.mark.equation("eq-step-halving")
def test_step_halving():
    fine = VP().grid(16, "t").tolist()
    x = quantile(SHARES, 1.0)
    y = x
    for t, s in pairwise(fine):
        y = ddim(y, t, s, noise_at(y, t))
    student = DENOISER
    for n in (8, 4, 2, 1):  # each from the one before
        ts = fine[:: 16 // n]
        student = Targeted(student, ts)
        np.testing.assert_allclose(run(student, DDIM(), x, ts), y, rtol=0, atol=1e-11)
    assert [n for n, _ in SWISS_ROLL_DISTILLED.generations] == [2**k for k in range(9, -1, -1)]


@pytest.mark.equation("eq-clean-and-noisy")
def test_clean_and_noisy():
    x, eps = draws_of_mix(20_000, 9)
    for t in (0.01, 0.4, 1.0):
        z = perturb(VP(), column(x), t, column(eps))[:, 0].numpy()
        np.testing.assert_allclose(z, amp(t) * x + dev(t) * eps, rtol=1e-10, atol=1e-12)
        shares = (np.arange(len(z)) + 0.5) / len(z)
        assert np.abs(np.sort(z) - quantile(shares, t)).mean() < 0.03


def cosine(t):
    return math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)


def x0_at(z, t):
    """The exact clean value on the cosine schedule, in numpy."""
    a, b = cosine(t)
    if a < 1e-9:
        return np.full_like(z, 0.11)
    return (z + b**2 * mix_score(z, a, b)) / a


def step(x0, z, t, s):
    """DDIM from t to s with the clean value x0 (S116, S118)."""
    (a, b), (c, d) = cosine(t), cosine(s)
    return c * x0 + d / b * (z - a * x0)


def two_steps(z, t, s):
    middle = (t + s) / 2
    half = step(x0_at(z, t), z, t, middle)
    return step(x0_at(half, middle), half, middle, s)


class Cosined:
    """The exact denoiser by `x0_at`; the places where it was asked."""

    schedule = COSINE

    def __init__(self):
        self.asked = []

    def __call__(self, x, t):
        self.asked.append((x, t))
        a, b = cosine(t)
        return Prediction(x, a, b, "x0", column(x0_at(x[:, 0].numpy(), t)))


def target_of(z, t, s):
    return progressive_target(Cosined(), column(z), t, s)[:, 0].numpy()


def noisy(t, n=400):
    """Points of the cosine schedule's marginal at t, at even shares."""
    a, b = cosine(t)
    u = (np.arange(n) + 0.5) / n
    return a * quantile_at(u, b / a) if a > 1e-9 else norm.ppf(u)


@pytest.mark.equation("eq-distillation-target")
def test_distillation_target():
    n, t = 4, 0.75
    s, z = t - 1 / n, noisy(t)

    def check(target):
        gap = float(np.sqrt(((step(target, z, t, s) - two_steps(z, t, s)) ** 2).mean()))
        assert gap < 1e-12, f"the student lands {gap:.2f} away"

    check(target_of(z, t, s))
    final = z
    for i in (3, 2, 1):
        final = two_steps(final, i / n, (i - 1) / n)
    for output in (two_steps(z, t, s), final):  # "the output of the teacher's sampling"
        with pytest.raises(AssertionError, match=r"the student lands 0\.[1-5]\d away"):
            check(output)
    with pytest.raises(AssertionError, match=r"the student lands 0\.0[4-7] away"):  # nor its prediction
        check(x0_at(z, t))

    # a mean of two predictions, and nothing else of z_t
    x, y, z_t = sympy.symbols("x y z_t")
    a, b, a1, b1, a2, b2 = sympy.symbols("a b a1 b1 a2 b2", positive=True)
    half = a1 * x + b1 / b * (z_t - a * x)
    end = a2 * y + b2 / b1 * (half - a1 * y)
    solved = (end - b2 / b * z_t) / (a2 - b2 / b * a)
    w = (a1 / b1 - a / b) / (a2 / b2 - a / b)  # e^lambda = alpha / sigma
    assert sympy.simplify(solved - (w * x + (1 - w) * y)) == 0

    class Marked:  # 1 at t, 0 in the middle: what comes out is w
        schedule = COSINE

        def __call__(self, x, t):
            return Prediction(x, 1.0, 1.0, "x0", torch.full_like(x, float(t * 4 == round(t * 4))))

    shares = [float(progressive_target(Marked(), column([0.0]), i / 4, (i - 1) / 4)) for i in range(1, 5)]
    assert shares == pytest.approx([0, 0.3512, 0.4335, 0.4802], abs=5e-5)


@pytest.mark.equation("eq-half-steps")
def test_half_steps():
    for n in (1, 4, 8):
        coarse, fine = (SWISS_ROLL_DISTILLED.grid(k).numpy() for k in (n, 2 * n))
        np.testing.assert_allclose(fine[::2], coarse, rtol=0, atol=1e-12)
        np.testing.assert_allclose(fine[1::2], (coarse[:-1] + coarse[1:]) / 2, rtol=0, atol=1e-12)
        ts = VP0.grid(n, "t").numpy()  # down to 0: the slide's
        np.testing.assert_allclose(ts[:-1] - ts[1:], 1 / n, rtol=1e-12)
        assert (np.diff(fine) < 0).all()  # earlier, less noisy
        assert (np.diff([VP().lam(t) for t in fine]) > 0).all()


@pytest.mark.equation("eq-first-teacher-step")
def test_first_teacher_step():
    z, teacher = noisy(0.75), Cosined()
    progressive_target(teacher, column(z), 0.75, 0.5)
    (_, first), (half, second) = teacher.asked
    assert (first, second) == (0.75, 0.625)
    printed = step(x0_at(z, 0.75), z, 0.75, 0.625)
    np.testing.assert_allclose(half[:, 0].numpy(), printed, rtol=0, atol=1e-13)
    np.testing.assert_allclose(run(Cosined(), DDIM(), z, [0.75, 0.625]), printed, rtol=0, atol=1e-12)
    # the prediction needs the time that the slide leaves out
    assert np.abs(x0_at(z, 0.75) - x0_at(z, 0.5)).max() > 0.1


@pytest.mark.equation("eq-second-teacher-step")
def test_second_teacher_step():
    def check(second, t, s):
        z, middle = noisy(t), (t + s) / 2
        x = x0_at(z, t)
        half = step(x, z, t, middle)
        end = second(z, half, t, middle, s)
        (a, b), (c, d) = cosine(t), cosine(s)
        target = (end - d / b * z) / (c - d / b * a)
        to_learn = float(np.abs(target - x).max())
        assert to_learn > 1e-2, f"the target is the teacher's prediction, to {to_learn:.0e}"
        if s > 0:
            steps = run(Cosined(), DDIM(), z, [t, middle, s])
            np.testing.assert_allclose(end, steps, rtol=0, atol=1e-12)
        np.testing.assert_allclose(target, target_of(z, t, s), rtol=0, atol=1e-12)

    def right(z, half, t, middle, s):
        return step(x0_at(half, middle), half, middle, s)

    def printed(z, half, t, middle, s):  # from z_t, with its prediction
        return step(x0_at(z, t), z, t, s)

    gaps = []
    for t, s in ((0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
        check(right, t, s)
        with pytest.raises(
            AssertionError, match=r"the target is the teacher's prediction, to (0e\+00|\de-1[56])"
        ):
            check(printed, t, s)
        z = noisy(t)
        gaps.append(float(np.sqrt(((printed(z, 0, t, 0, s) - two_steps(z, t, s)) ** 2).mean())))
    assert all(0.02 < gap < 0.1 for gap in gaps)
    a, b, c, d, x, z = sympy.symbols("a b c d x z", positive=True)
    assert sympy.simplify((c * x + d / b * (z - a * x) - d / b * z) / (c - d / b * a) - x) == 0


@pytest.mark.equation("eq-student-step")
def test_student_step():
    t, s = 0.5, 0.25
    z = noisy(t)

    def check(value):
        """Whether S118's step with that value meets the constraint of S119, z~ = z''."""
        gap = float(np.abs(step(value, z, t, s) - two_steps(z, t, s)).max())
        assert gap < 1e-12, f"the step ends {gap:.2f} from the teacher's"

    check(target_of(z, t, s))
    # the step is DDIM's, for a student that predicts the target
    student = Targeted(Cosined(), [t, s])
    np.testing.assert_allclose(run(student, DDIM(), z, [t, s]), two_steps(z, t, s), rtol=0, atol=1e-12)
    with pytest.raises(AssertionError, match=r"the step ends 0\.\d\d from the teacher's"):
        check(x0_at(z, t))  # "the student's prediction": before training it is the teacher's


@pytest.mark.equation("eq-target-solved")
def test_target_solved():
    def solved(z, t, s):
        (a, b), (c, d) = cosine(t), cosine(s)
        return (two_steps(z, t, s) - d / b * z) / (c - d / b * a)

    for i in (4, 3, 2, 1):
        t, s = i / 4, (i - 1) / 4
        z = noisy(t)
        target = target_of(z, t, s)
        np.testing.assert_allclose(target, solved(z, t, s), rtol=0, atol=1e-12)
        np.testing.assert_allclose(step(target, z, t, s), two_steps(z, t, s), rtol=0, atol=2e-15 * 8)
    z = noisy(0.25)  # at t'' = 0 it is the second prediction
    half = step(x0_at(z, 0.25), z, 0.25, 0.125)
    np.testing.assert_allclose(target_of(z, 0.25, 0.0), x0_at(half, 0.125), rtol=0, atol=1e-14)

    def smallest(n):
        t, s = np.arange(1, n + 1) / n, np.arange(n) / n
        (a, b), (c, d) = ((np.cos(np.pi * u / 2), np.sin(np.pi * u / 2)) for u in (t, s))
        return float((c - d / b * a).min())

    found = [smallest(n) for n in (4, 64, 1024, 8192)]
    assert found == pytest.approx([0.383, 0.0245, 1.5e-3, 1.9e-4], rel=0.03)
    assert found[-1] == pytest.approx(math.pi / 2 / 8192, rel=1e-3)


class Fixed:
    """A student that answers c to everything."""

    schedule = COSINE

    def __init__(self, c):
        self.c = c

    def __call__(self, x, t):
        return Prediction(x, *cosine(t), "x0", torch.full_like(x, self.c))


class Linear(nn.Module):
    """A v-prediction k x."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor(0.4, dtype=torch.float64))

    def forward(self, x, lam):
        return self.k * x


@pytest.mark.equation("eq-distillation-loss")
def test_distillation_loss():
    # targets 0, 0 and 3: a teacher that knows the datum, a student that can only give one answer
    x0 = column([0.0, 0.0, 3.0])

    class Knows:
        schedule = COSINE

        def __call__(self, x, t):
            return Prediction(x, *cosine(t), "x0", x0)

    c = np.linspace(-1, 4, 501)
    z = column([0.3, -0.2, 0.5])
    squared = [progressive_loss(Fixed(v), Knows(), x0, 0.5, 0.25, z).mean() for v in c]
    weight = truncated_snr(COSINE, 0.5)

    def check(values):
        near(minimiser=(c[np.argmin(values)], 1.0, 1e-3))

    check(squared)
    with pytest.raises(AssertionError, match=r"minimiser (-\d\.?\d*e-1\d|0), not 1"):  # the norm: a median
        check([weight * float(np.abs(x0.numpy() - v).mean()) for v in c])

    # the gradient: the student's alone, even where student and teacher are one network
    net = Linear()
    model, x0, eps = NetDenoiser(net, VP(), "v"), column([0.5, -1.0, 2.0]), column([0.1, 0.7, -1.2])
    t, s = 0.8, 0.4
    noised = perturb(VP(), x0, t, eps)
    goal = progressive_target(model, noised, t, s)

    def through(k):
        """The loss with the student's k and the target fixed, and with k in both."""
        a, b = float(amp(t)), float(dev(t))
        a1, b1, a2, b2 = (float(v(u)) for u in ((t + s) / 2, s) for v in (amp, dev))
        x = a * noised - b * k * noised
        half = a1 * x + b1 / b * (noised - a * x)
        y = a1 * half - b1 * k * half
        end = a2 * y + b2 / b1 * (half - a1 * y)
        target = (end - b2 / b * noised) / (a2 - b2 / b * a)
        weight = truncated_snr(VP(), t)
        return tuple((weight * (v - x).square()).mean() for v in (goal, target))

    progressive_loss(model, model, x0, t, s, eps).mean().backward()

    def check_gradient(which):
        k = net.k.detach().clone().requires_grad_(True)
        through(k)[which].backward()
        equal("the gradient", [float(k.grad)], [float(net.k.grad)], 1e-6)

    check_gradient(0)
    with pytest.raises(AssertionError, match=r"the gradient is off by up to \d"):  # not detached
        check_gradient(1)


@pytest.mark.equation("eq-algorithm-2")
def test_algorithm_2():
    # the body of the loop, line by line, in numpy
    x, eps = draws_of_mix(50, 10)
    n, i = 4, np.random.default_rng(11).integers(1, 5, size=50)
    for count in range(1, n + 1):
        rows = i == count
        t = count / n
        (a, b), s = cosine(t), t - 1 / n
        z = a * x[rows] + b * eps[rows]
        end = two_steps(z, t, s)
        c, d = cosine(s)
        target = (end - d / b * z) / (c - d / b * a)
        for weight, name in (((a / b) ** 2, truncated_snr), ((a / b) ** 2 + 1, snr_plus_one)):
            w = max(weight, 1.0) if name is truncated_snr else weight
            found = progressive_loss(Fixed(0.2), Cosined(), column(x[rows]), t, s, column(eps[rows]), name)
            np.testing.assert_allclose(found.numpy(), w * (target - 0.2) ** 2, rtol=1e-9, atol=1e-12)

    # the weights: the larger of the errors in x and eps; the error in v. The SNR alone is 0 at t = 1
    for t in (0.1, 0.6, 0.95):
        a, b = cosine(t)
        of_x = 0.3  # an error in x makes one of a / b in eps and of -(a^2 / b + b) in v
        assert truncated_snr(COSINE, t) * of_x**2 == pytest.approx(max(of_x**2, (a / b * of_x) ** 2))
        assert snr_plus_one(COSINE, t) * of_x**2 == pytest.approx(((a * a / b + b) * of_x) ** 2)
    assert (COSINE.alpha(1.0) / COSINE.sigma(1.0)) ** 2 == 0
    assert truncated_snr(COSINE, 1.0) == snr_plus_one(COSINE, 1.0) == 1

    # t = 1 is there: an error in eps is 637 times as large in x shortly before, and undefined there
    a, b = cosine(0.999)
    assert b / a == pytest.approx(637, abs=0.5)
    z = column([1.0, -0.5])
    assert float(Prediction(z, a, b, "eps", z).x0.abs().max()) < float(
        Prediction(z, a, b, "eps", 0.99 * z).x0.abs().max()
    )
    with pytest.raises(ValueError, match="alpha"):
        _ = Prediction(z, 0.0, 1.0, "eps", z).x0
    assert torch.equal(Prediction(z, 0.0, 1.0, "v", z).x0, -z)  # x = alpha z - sigma v
    a, b = cosine(0.3)
    x0, noise = column([0.7, -2.0]), column([0.1, 1.3])
    there = a * x0 + b * noise
    v = a * noise - b * x0
    torch.testing.assert_close(a * there - b * v, x0, rtol=0, atol=1e-15)
    torch.testing.assert_close(b * there + a * v, noise, rtol=0, atol=1e-15)
    angle = math.pi / 2 * 0.1  # DDIM in the angle's form
    turned = math.cos(angle) * there - math.sin(angle) * v
    stepped = step(x0[:, 0].numpy(), there[:, 0].numpy(), 0.3, 0.2)
    np.testing.assert_allclose(turned[:, 0], stepped, rtol=0, atol=1e-14)


@pytest.mark.equation("eq-two-lambdas")
def test_two_lambdas():
    t = 0.25
    a, b = cosine(t)
    full, half = math.log(a**2 / b**2), COSINE.lam(t)
    assert (full, half) == pytest.approx((1.763, 0.881), abs=1e-3)
    assert full == pytest.approx(2 * half)
    assert math.exp(full) == pytest.approx(truncated_snr(COSINE, t), rel=1e-12)
    assert truncated_snr(COSINE, t) == pytest.approx(5.83, abs=0.01)
    assert math.exp(half) == pytest.approx(2.41, abs=0.01)  # the other reading
