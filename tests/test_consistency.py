"""Consistency functions, losses and sampling against the exact solution map, itself against DOP853."""

import math

import pytest
import torch
from problems import MAIN, asym3, exact, flow, gaussian, mix
from torch import nn

from diffedu.consistency import (
    ConsistencyFunction,
    PseudoHuber,
    SolutionMap,
    SquaredL2,
    cd_loss,
    ct_loss,
    euler_step,
    heun_step,
    multistep,
)
from diffedu.denoiser import NetDenoiser, Prediction
from diffedu.exponential import DDIM
from diffedu.metrics import empirical_order, sliced_w2
from diffedu.networks import MLP
from diffedu.sampling import prior, sample
from diffedu.schedules import VE, VP
from diffedu.sde import perturb

SCHEDULES = pytest.mark.parametrize("schedule", MAIN.values(), ids=MAIN)
EDM = VE(0.002, 80.0, t_min=0.0)  # alpha = 1: t_of_lam(-log r) is the time of noise level r


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def net(dtype=torch.float64):
    torch.manual_seed(0)
    return MLP(width=16, depth=1).to(dtype)


@pytest.mark.equation("eq-boundary-condition")
@SCHEDULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_at_t_min_the_function_is_the_identity_to_the_last_bit(schedule, dtype, scale):
    f = ConsistencyFunction(net(dtype), schedule, scale)
    x = 3 * torch.randn(7, 2, dtype=dtype, generator=seeded())
    times = [schedule.t_min, *(torch.tensor(schedule.t_min, dtype=d) for d in (torch.float32, torch.float64))]
    for t in [*times, times[1].expand(7), times[2].expand(7)]:
        assert torch.equal(f(x, t), x)
    assert not torch.allclose(f(x, schedule.t_max), x)


@pytest.mark.equation("eq-boundary-condition")
def test_the_scalings_are_those_of_song_et_al():
    # S107 in the EDM clock: t = r, epsilon = .002, sigma_d = .5
    f = ConsistencyFunction(net(), EDM, scale=0.5)
    for r in (0.01, 0.5, 3.0, 60.0):
        skip, out, into = f.coefficients(EDM.t_of_lam(-math.log(r)))
        assert skip == pytest.approx(0.25 / ((r - 0.002) ** 2 + 0.25), rel=1e-9)
        assert out == pytest.approx(0.5 * (r - 0.002) / math.sqrt(r**2 + 0.25), rel=1e-9)
        assert into == pytest.approx(1 / math.sqrt(r**2 + 0.25), rel=1e-9)


@SCHEDULES
def test_every_schedule_has_one_function_in_scaled_variables(schedule):
    # f / alpha_min of x / alpha depends on r alone: S107 with r for t, on every clock
    f, t = ConsistencyFunction(net(), schedule), 0.37
    a, r = schedule.alpha(t), schedule.sigma(t) / schedule.alpha(t)
    first = schedule.alpha(schedule.t_min)
    r_min = schedule.sigma(schedule.t_min) / first
    x = torch.randn(5, 2, dtype=torch.float64, generator=seeded())
    y = x / a
    value = f.net(y / math.sqrt(1 + r**2), torch.full((5,), -math.log(r), dtype=torch.float64))
    want = y / ((r - r_min) ** 2 + 1) - (r - r_min) / math.sqrt(r**2 + 1) * value
    torch.testing.assert_close(f(x, t) / first, want, rtol=1e-9, atol=1e-9)


def test_for_vp_a_teachers_network_gives_its_x0_to_begin_with():
    vp, v = VP(t_min=1e-6), net()
    x = torch.randn(50, 2, dtype=torch.float64, generator=seeded())
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    teacher, student = NetDenoiser(v, vp, "v")(x, t).x0, ConsistencyFunction(v, vp)(x, t)
    assert (teacher - student).abs().max() < 2e-3  # r_min is 3e-4
    rows = torch.cat([ConsistencyFunction(v, vp)(x[i : i + 1], float(t[i])) for i in range(50)])
    torch.testing.assert_close(rows, student)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf])
def test_a_scale_that_is_no_size_is_refused(scale):
    with pytest.raises(ValueError, match="scale must be positive"):
        ConsistencyFunction(net(), VP(), scale)


class Flow:
    """The solution map by DOP853 at 1e-12, in numpy."""

    def __init__(self, law, schedule):
        self.law, self.schedule = law, schedule

    def __call__(self, x, t):
        return torch.from_numpy(flow(self.law, self.schedule, x.numpy(), t, self.schedule.t_min))


def test_the_solution_map_is_that_of_an_adaptive_solver():
    vp, law = VP(), asym3()
    f = SolutionMap(exact(law, vp), steps=400)
    x = torch.randn(60, 2, dtype=torch.float64, generator=seeded())
    t = torch.tensor([1.0, 0.4, 0.05], dtype=torch.float64).repeat(20)
    found = f(x, t)
    for time in (1.0, 0.4, 0.05):
        error = (found[t == time] - Flow(law, vp)(x[t == time], time)).norm(dim=1)
        assert error.median() < 1e-6
    assert torch.equal(f(x, vp.t_min), x)
    assert torch.equal(f(x.float(), torch.full((60,), vp.t_min)), x.float())


@pytest.mark.parametrize("t", [0.0, -3.0, VP().t_min * 0.999, 1.1, math.nan])
def test_the_solution_map_refuses_times_that_the_ode_does_not_have(t):
    f, x = SolutionMap(exact(asym3(), VP()), steps=2), torch.zeros(3, 2, dtype=torch.float64)
    for time in (t, torch.full((3,), t, dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"must lie in \["):
            f(x, time)


def pairs_at(schedule, law, t, n):
    g = seeded(5)
    x0 = law.sample(n, g)
    return x0, perturb(schedule, x0, t, torch.randn(x0.shape, dtype=torch.float64, generator=g))


@pytest.mark.parametrize(("step", "order"), [(euler_step, 1), (heun_step, 2)], ids=["euler", "heun"])
def test_at_the_exact_map_the_distillation_loss_falls_with_the_solvers_order(step, order):
    # one step errs by O(h^(p + 1)), and the map carries the error to the end
    vp, law, t = VP(), asym3(), 0.5
    f, (_, x) = Flow(law, vp), pairs_at(vp, law, t, 100)
    hs, roots = [0.2, 0.1, 0.05, 0.025], []
    for h in hs:
        s = vp.t_of_lam(vp.lam(t) + h)
        roots.append(float(cd_loss(f, f, exact(law, vp), x, t, s, step=step).sqrt().median()))
    assert empirical_order(hs, roots) == pytest.approx(order + 1, abs=0.15)


@pytest.mark.equation("eq-training-pair")
@pytest.mark.equation("eq-consistency-loss")
def test_the_losses_at_the_exact_map_are_the_audits():
    # S109, in the EDM clock on the toy law: distillation 3.9e-6 and 4.5e-10, training 1.5e-2 and 2.8e-4
    law, s, n = mix(), EDM.t_of_lam(0.0), 20_000
    f, g = SolutionMap(exact(law, EDM), steps=100), seeded(6)
    x0 = law.sample(n, g)
    eps = torch.randn(x0.shape, dtype=torch.float64, generator=g)
    sizes = {1.1: (3.9e-6, 1.5e-2), 1.01: (4.5e-10, 2.8e-4)}
    for r, (distilled, trained) in sizes.items():
        t = EDM.t_of_lam(-math.log(r))
        x = perturb(EDM, x0, t, eps)
        cd = cd_loss(f, f, exact(law, EDM), x, t, s, step=euler_step)
        ct = ct_loss(f, f, EDM, x0, t, s, eps, distance=SquaredL2())
        assert float(cd.mean()) == pytest.approx(distilled, rel=0.35)
        assert float(ct.mean()) == pytest.approx(trained, rel=0.2)


def test_for_a_gaussian_the_training_loss_has_a_closed_form():
    # f is linear: in scaled variables k(r) = sqrt((S^2 + r_min^2) / (S^2 + r^2)) about the mean
    vp, std, t, s, n = VP(), 0.5, 0.6, 0.5, 100_000

    def r(u):
        return vp.sigma(u) / vp.alpha(u)

    def k(u):
        return math.sqrt((std**2 + r(vp.t_min) ** 2) / (std**2 + r(u) ** 2))

    want = (std * (k(t) - k(s))) ** 2 + (k(t) * r(t) - k(s) * r(s)) ** 2
    want *= vp.alpha(vp.t_min) ** 2
    f, g = SolutionMap(exact(gaussian(std=std), vp), steps=60), seeded(7)
    x0, eps = torch.randn(2, n, 1, dtype=torch.float64, generator=g)
    found = ct_loss(f, f, vp, std * x0, t, s, eps, distance=SquaredL2())
    assert want > 1e-3
    assert float(found.mean()) == pytest.approx(want, abs=4 * float(found.std()) / math.sqrt(n))


def test_the_pair_of_training_is_eulers_step_with_the_datum_for_the_denoiser():
    vp, f = VP(), ConsistencyFunction(net(), VP())
    x0, eps = torch.randn(2, 9, 2, dtype=torch.float64, generator=seeded())
    t, s = torch.linspace(0.3, 1, 9, dtype=torch.float64), torch.linspace(0.1, 0.9, 9, dtype=torch.float64)

    class Known:
        schedule = vp

        def __call__(self, x, t):
            return Prediction(x, vp.alpha(t)[:, None], vp.sigma(t)[:, None], "x0", x0)

    distance = PseudoHuber(0.1)
    trained = ct_loss(f, f, vp, x0, t, s, eps, distance=distance)
    x = perturb(vp, x0, t, eps)
    distilled = cd_loss(f, f, Known(), x, t, s, step=euler_step, distance=distance)
    torch.testing.assert_close(trained, distilled, rtol=1e-10, atol=1e-12)


def test_eulers_step_is_ddim_and_substeps_divide_lam_evenly():
    vp, teacher = VP(), exact(asym3(), VP())
    x = torch.randn(20, 2, dtype=torch.float64, generator=seeded())
    t, s = 0.8, 0.3
    ts = [t, *(vp.t_of_lam(vp.lam(t) + (vp.lam(s) - vp.lam(t)) * k / 3) for k in (1, 2)), s]
    seen = []

    def target(x, t):
        seen.append((x, t))
        return x

    def f(x, t):
        return torch.zeros_like(x)

    cd_loss(f, target, teacher, x, t, s, step=euler_step, substeps=3)
    ((landed, time),) = seen
    assert time == s
    torch.testing.assert_close(landed, sample(teacher, DDIM(), x, ts), rtol=1e-11, atol=1e-12)
    rows = [torch.full((20,), u, dtype=torch.float64) for u in (t, s)]
    cd_loss(f, target, teacher, x, *rows, step=euler_step, substeps=3)
    torch.testing.assert_close(seen[1][0], landed, rtol=1e-11, atol=1e-12)


def test_heuns_step_is_of_second_order():
    vp, law = VP(), gaussian(0.3, 0.5)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
    want = torch.from_numpy(flow(law, vp, x.numpy(), 0.6, 0.2))
    hs, errors = [1 / 8, 1 / 16, 1 / 32, 1 / 64], []
    for h in hs:
        ts = [vp.t_of_lam(vp.lam(0.6) + (vp.lam(0.2) - vp.lam(0.6)) * u * h) for u in range(round(1 / h) + 1)]
        z = x
        for a, b in zip(ts, ts[1:], strict=False):  # noqa: RUF007
            z = heun_step(exact(law, vp), z, a, b)
        errors.append(float((z - want).norm()))
    assert empirical_order(hs, errors) == pytest.approx(2, abs=0.1)


def test_no_gradient_flows_through_the_target():
    vp, f = VP(), ConsistencyFunction(net(), VP())
    still = ConsistencyFunction(net().requires_grad_(False), vp)
    x0, eps = torch.randn(2, 9, 2, dtype=torch.float64, generator=seeded())
    teacher = NetDenoiser(net(), vp, "v")
    for loss in (
        lambda target: ct_loss(f, target, vp, x0, 0.5, 0.4, eps),
        lambda target: cd_loss(f, target, teacher, x0, 0.5, 0.4, substeps=2),
    ):
        values, grads = [], []
        for target in (f, still):
            f.net.zero_grad()
            values.append(loss(target))
            values[-1].mean().backward()
            grads.append([p.grad.clone() for p in f.net.parameters()])
        assert values[0].shape == (9,)
        assert torch.equal(values[0], values[1])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
        assert all(p.grad is None for p in teacher.net.parameters())


@pytest.mark.equation("eq-training-pair")
def test_the_loss_as_the_survey_prints_it_is_met_by_a_constant():
    # S108 puts one t on both sides: a function that is constant above t_min has no loss and knows nothing
    vp, law = VP(), asym3()

    def constant(x, t):
        return x if t == vp.t_min else torch.full_like(x, 0.3)

    x0, x = pairs_at(vp, law, 0.5, 50)
    s = 0.4
    estimate = euler_step(exact(law, vp), x, 0.5, s)
    exactly = perturb(vp, x0, s, torch.randn(x0.shape, dtype=torch.float64, generator=seeded()))
    assert float((constant(estimate, s) - constant(exactly, s)).abs().max()) == 0
    # with adjacent times the last interval ends at t_min, where the boundary condition speaks
    near = vp.t_of_lam(vp.lam(vp.t_min) - 0.1)
    x = perturb(vp, x0, near, torch.zeros_like(x0))
    assert cd_loss(constant, constant, exact(law, vp), x, near, vp.t_min).mean() > 0.1


@pytest.mark.equation("eq-consistency-algorithms")
def test_multistep_with_the_exact_map_gives_the_law():
    vp, law, n = VP(), asym3(), 4000
    f, end = SolutionMap(exact(law, vp), steps=40), law.marginal(vp, vp.t_min)
    floors = torch.tensor(
        [sliced_w2(end.sample(n, seeded(k)), end.sample(n, seeded(k + 50))) for k in range(8)]
    )
    for ts in ([1.0], [1.0, 0.4], [1.0, 0.6, 0.3, 0.1]):
        x = multistep(f, prior(vp, (n, 2), seeded(20), torch.float64), ts, vp, seeded(21))
        assert sliced_w2(x, end.sample(n, seeded(22))) < floors.mean() + 4 * floors.std()


def test_multistep_adds_the_forward_processs_noise_from_t_min_on():
    vp, seen = VP(t_min=0.1), []

    def f(x, t):
        seen.append((x, t))
        return torch.full_like(x, 2.0)

    ts = torch.tensor([1.0, 0.5])
    x = multistep(f, torch.zeros(50_000, 2), ts, vp, seeded())
    assert torch.equal(x, torch.full_like(x, 2.0))
    (_, (noisy, t)) = seen
    assert t == 0.5
    ratio = vp.alpha(0.5) / vp.alpha(0.1)
    std = math.sqrt(vp.sigma(0.5) ** 2 - (ratio * vp.sigma(0.1)) ** 2)
    assert float(noisy.mean()) == pytest.approx(2 * ratio, abs=4 * std / math.sqrt(1e5))
    assert float(noisy.std()) == pytest.approx(std, rel=4 / math.sqrt(2e5))
    assert torch.equal(multistep(f, x, ts, vp, seeded()), x)
    assert len(seen) == 4


@pytest.mark.parametrize("ts", [[], [0.5, 0.5], [0.4, 0.5], [1.0, 1e-3], [1.1]])
def test_times_that_no_sampler_can_use_are_refused(ts):
    with pytest.raises(ValueError, match="times"):
        multistep(lambda x, t: x, torch.zeros(3, 2), ts, VP())


def test_the_distances():
    a, b = (
        torch.tensor([[3.0, 4.0], [1e-4, 0.0]], dtype=torch.float64),
        torch.zeros(2, 2, dtype=torch.float64),
    )
    assert SquaredL2()(a, b).tolist() == pytest.approx([25.0, 1e-8])
    for c in (0.03, 2.0):
        want = [math.sqrt(25 + c**2) - c, math.hypot(1e-4, c) - c]
        assert PseudoHuber(c)(a, b).tolist() == pytest.approx(want, rel=1e-6)
    with pytest.raises(ValueError, match=r"c must be positive; got 0\.0"):
        PseudoHuber(0.0)


@pytest.mark.cuda
def test_the_losses_stay_on_the_device():
    vp = VP()
    f = ConsistencyFunction(net(torch.float32).cuda(), vp)
    x0, eps = torch.randn(2, 9, 2, device="cuda")
    assert ct_loss(f, f, vp, x0, 0.5, 0.4, eps).device.type == "cuda"
    assert isinstance(f.net, nn.Module)
