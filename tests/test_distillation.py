"""Progressive distillation against the two steps themselves, and against its formula at high precision."""

import math
from itertools import pairwise

import pytest
import torch
from problems import MAIN, asym3, exact, mix
from torch import nn

from diffedu.denoiser import NetDenoiser, Prediction
from diffedu.distillation import progressive_loss, progressive_target, snr_plus_one, truncated_snr
from diffedu.exponential import DDIM
from diffedu.sampling import prior, sample
from diffedu.schedules import VP, Cosine
from diffedu.teachers import SWISS_ROLL


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def ddim(schedule, x0, z, t, s):
    """One DDIM step as S118 prints it."""
    a, b, a2, b2 = (
        torch.as_tensor(f(u), dtype=z.dtype) for u in (t, s) for f in (schedule.alpha, schedule.sigma)
    )
    return a2 * x0 + b2 / b * (z - a * x0)


def two_steps(teacher, z, t, middle, s):
    half = ddim(teacher.schedule, teacher(z, t).x0, z, t, middle)
    return ddim(teacher.schedule, teacher(half, middle).x0, half, middle, s)


class Targeted:
    """A student that meets its target exactly on the grid ts."""

    def __init__(self, teacher, ts):
        self.teacher, self.schedule, self.ts = teacher, teacher.schedule, ts.tolist()

    def __call__(self, x, t):
        s = self.ts[self.ts.index(t) + 1]
        x0 = progressive_target(self.teacher, x, t, s)
        return Prediction(x, self.schedule.alpha(t), self.schedule.sigma(t), "x0", x0)


@pytest.mark.parametrize("schedule", MAIN.values(), ids=MAIN)
def test_one_step_to_the_target_lands_where_two_steps_of_the_teacher_do(schedule):
    teacher = exact(mix(), schedule)
    z = prior(schedule, (500, 1), seeded(), dtype=torch.float64)
    for t, s in ((schedule.t_max, 0.6), (0.7, 0.2), (0.3, schedule.t_min), (0.11, 0.1)):
        target = progressive_target(teacher, z, t, s)
        landed, want = ddim(schedule, target, z, t, s), two_steps(teacher, z, t, (t + s) / 2, s)
        torch.testing.assert_close(landed, want, rtol=0, atol=1e-12 * float(1 + z.abs().max()))


@pytest.mark.equation("eq-algorithm-2")
def test_a_student_that_meets_its_target_makes_the_teachers_trajectory():
    # N = 8 steps of the student are the teacher's 16, all the way: Algorithm 2 with nothing left to learn
    teacher, vp = exact(asym3(), VP()), VP()
    fine = vp.grid(16, "t")
    z = prior(vp, (300, 2), seeded(1), dtype=torch.float64)
    found = sample(Targeted(teacher, fine[::2]), DDIM(), z, fine[::2])
    assert (found - sample(teacher, DDIM(), z, fine)).abs().max() < 1e-12


def test_times_may_differ_from_sample_to_sample_and_the_middle_may_be_chosen():
    teacher, vp = exact(asym3(), VP()), VP()
    z = torch.randn(4, 2, dtype=torch.float64, generator=seeded())
    t, m, s = (
        torch.tensor(v, dtype=torch.float64)
        for v in ([0.9, 0.5, 0.3, 0.1], [0.6, 0.45, 0.1, 0.06], [0.5, 0.3, 0.0, 0.05])
    )
    rows = progressive_target(teacher, z, t, s, m)
    for i in range(4):
        one = progressive_target(teacher, z[i : i + 1], float(t[i]), float(s[i]), float(m[i]))
        torch.testing.assert_close(rows[i : i + 1], one, rtol=1e-12, atol=1e-14)
        want = two_steps(teacher, z[i : i + 1], float(t[i]), float(m[i]), float(s[i]))
        torch.testing.assert_close(
            ddim(vp, one, z[i : i + 1], float(t[i]), float(s[i])), want, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("schedule", [VP(), Cosine()], ids=["vp", "cosine"])
def test_at_time_0_the_target_is_the_second_prediction(schedule):
    teacher = exact(asym3(), schedule)
    z = 0.3 * torch.randn(200, 2, dtype=torch.float64, generator=seeded())
    t, middle = 1 / 8, 1 / 16
    half = ddim(schedule, teacher(z, t).x0, z, t, middle)
    target = progressive_target(teacher, z, t, 0.0)
    # alpha_0 = 1 and sigma_0 = 0: x0 is where the last step lands
    torch.testing.assert_close(target, teacher(half, middle).x0, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(target, two_steps(teacher, z, t, middle, 0.0), rtol=1e-12, atol=1e-13)


def test_where_alpha_is_0_the_target_is_finite():
    class Centre:  # of a law with one point: x0 is known even where the noise hides it
        schedule = Cosine(t_max=1.0)

        def __call__(self, x, t):
            return Prediction(
                x, self.schedule.alpha(t), self.schedule.sigma(t), "x0", torch.full_like(x, 0.7)
            )

    z = torch.randn(10, 2, dtype=torch.float64, generator=seeded())
    assert torch.equal(progressive_target(Centre(), z, 1.0, 0.5), torch.full_like(z, 0.7))


class Sharp:
    """The exact denoiser whose x0 has no rounding but the last: what is lost is lost by the target."""

    def __init__(self, law, schedule):
        self.schedule, self.denoiser = schedule, exact(law, schedule)

    def __call__(self, x, t):
        x0 = self.denoiser(x.double(), t.double()).x0.to(x)
        return Prediction(x, self.schedule.alpha(t), self.schedule.sigma(t), "x0", x0)


@pytest.mark.equation("eq-target-solved")
@pytest.mark.parametrize("schedule", [VP(t_min=1e-5), Cosine(t_min=1e-5)], ids=["vp", "cosine"])
def test_no_digits_are_lost_in_float32_at_8192_steps(schedule):
    # S119's own form divides by a difference that falls to 2e-4 here (audit) and keeps two or three digits
    n, law = 8192, asym3()
    i = torch.tensor([1, 2, 3, 10, 100, 1000, 4096, 8000, 8180])
    g = seeded(3)
    x0 = law.sample(len(i), g)
    t, s = (i / n).double(), ((i - 1) / n).double()
    z = schedule.alpha(t)[:, None] * x0 + schedule.sigma(t)[:, None] * torch.randn(
        x0.shape, dtype=torch.float64, generator=g
    )
    z = z.float()
    teacher = Sharp(law, schedule)
    want = progressive_target(teacher, z.double(), t, s)
    found = progressive_target(teacher, z, t.float(), s.float())
    assert found.dtype == torch.float32
    error = ((found.double() - want).norm(dim=1) / want.norm(dim=1)).max()
    assert error < 1e-5

    def printed(z, t, s):  # S116, S117 corrected, S119
        def of(u):
            return schedule.alpha(u)[:, None], schedule.sigma(u)[:, None]

        (a, b), (a1, b1), (a2, b2) = (of(u) for u in (t, (t + s) / 2, s))
        x = teacher(z, t).x0
        z1 = a1 * x + b1 / b * (z - a * x)
        y = teacher(z1, (t + s) / 2).x0
        z2 = a2 * y + b2 / b1 * (z1 - a1 * y)
        return (z2 - b2 / b * z) / (a2 - b2 / b * a)

    torch.testing.assert_close(printed(z.double(), t, s), want, rtol=1e-8, atol=1e-8)
    bad = printed(z, t.float(), s.float()).double()
    assert ((bad - want).norm(dim=1) / want.norm(dim=1)).max() > 1e-4


@pytest.mark.equation("eq-second-teacher-step")
def test_the_target_as_the_survey_prints_it_is_the_teachers_own_prediction():
    # S117's second step starts from z_t with the first prediction: one step in two halves, nothing to learn
    schedule, teacher = Cosine(), exact(asym3(), Cosine())
    z = torch.randn(200, 2, dtype=torch.float64, generator=seeded())
    for t, s in ((0.75, 0.5), (0.5, 0.25), (0.25, 0.0)):
        a, b, a2, b2 = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
        x = teacher(z, t).x0
        printed_z2 = a2 * x + b2 / b * (z - a * x)
        printed_target = (printed_z2 - b2 / b * z) / (a2 - b2 / b * a)
        assert (printed_target - x).abs().max() < 1e-14 * float(1 + 10 * x.abs().max())
        ours = progressive_target(teacher, z, t, s)
        assert (ours - x).square().mean().sqrt() > 0.01
        # and it is not where the teacher's two steps lead
        assert (printed_z2 - two_steps(teacher, z, t, (t + s) / 2, s)).square().mean().sqrt() > 0.01


@pytest.mark.equation("eq-distillation-target")
def test_the_shares_are_the_audits():
    # S114: cosine, N = 4, w_1 = 0, .3512, .4335, .4802; read off with predictions 1 at t and 0 in the middle
    class Marked:
        schedule = Cosine()

        def __call__(self, x, t):
            return Prediction(x, 1.0, 1.0, "x0", torch.full_like(x, float(t * 4 == round(t * 4))))

    shares = [
        float(progressive_target(Marked(), torch.zeros(1, 1, dtype=torch.float64), i / 4, (i - 1) / 4))
        for i in (1, 2, 3)
    ]
    assert shares == pytest.approx([0.0, 0.3512, 0.4335], abs=5e-5)


@pytest.mark.parametrize(
    "times", [(0.5, 0.5, None), (0.3, 0.4, None), (0.5, 0.3, 0.5), (0.5, 0.3, 0.2), (0.5, 0.3, 0.7)]
)
def test_times_that_do_not_fall_are_refused(times):
    t, s, middle = times
    with pytest.raises(ValueError, match="t > middle > s"):
        progressive_target(exact(mix(), VP()), torch.zeros(3, 1, dtype=torch.float64), t, s, middle)


@pytest.mark.equation("eq-two-lambdas")
def test_the_weights():
    # S123: for the cosine schedule at t = 1/4 the truncated SNR is 5.83
    assert truncated_snr(Cosine(), 0.25) == pytest.approx(5.828, abs=1e-3)
    assert truncated_snr(Cosine(), 0.9) == 1.0
    t = torch.tensor([0.25, 0.9])
    assert truncated_snr(Cosine(), t).tolist() == pytest.approx([5.8284, 1.0], rel=1e-4)
    assert snr_plus_one(Cosine(), t).tolist() == pytest.approx(
        [6.8284, 1 + math.tan(0.05 * math.pi) ** 2], rel=1e-4
    )


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x, lam):
        return self.layer(x)


def test_the_loss_weighs_the_error_in_x0():
    torch.manual_seed(0)
    vp, teacher, net = VP(), exact(asym3(), VP()), Net()
    student = NetDenoiser(net, vp, "v")
    g = seeded(4)
    x0, eps = asym3().sample(6, g).float(), torch.randn(6, 2, generator=g)
    t, s = torch.linspace(0.3, 1.0, 6), torch.linspace(0.1, 0.8, 6)
    a, b = vp.alpha(t)[:, None], vp.sigma(t)[:, None]
    z = a * x0 + b * eps
    target = progressive_target(teacher, z, t, s)
    values = progressive_loss(student, teacher, x0, t, s, eps)
    assert values.shape == (6,)
    worse = torch.maximum(
        (target - student(z, t).x0).square().sum(1),
        ((z - a * target) / b - student(z, t).eps).square().sum(1),
    )
    torch.testing.assert_close(values, worse, rtol=1e-3, atol=1e-5)
    in_v = ((a * (z - a * target) / b - b * target) - student(z, t).v).square().sum(1)
    torch.testing.assert_close(
        progressive_loss(student, teacher, x0, t, s, eps, snr_plus_one), in_v, rtol=1e-3, atol=1e-5
    )


def test_no_gradient_flows_through_the_target():
    net = Net()
    model, g = NetDenoiser(net, VP(), "v"), seeded()
    x0, eps = torch.randn(2, 5, 2, generator=g)
    progressive_loss(model, model, x0, 0.8, 0.4, eps).mean().backward()
    ours = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    z = VP().alpha(0.8) * x0 + VP().sigma(0.8) * eps
    fixed = progressive_target(model, z, 0.8, 0.4)
    assert not fixed.requires_grad
    (truncated_snr(VP(), 0.8) * (fixed - model(z, 0.8).x0).square().sum(1)).mean().backward()
    assert all(torch.allclose(a, p.grad) for a, p in zip(ours, net.parameters(), strict=True))


def test_the_shipped_teacher_has_something_to_teach_at_every_step():
    teacher, grid = SWISS_ROLL.load(), SWISS_ROLL.schedule.grid(4, "t").tolist()
    z = prior(SWISS_ROLL.schedule, (500, 2), seeded())
    for t, s in pairwise(grid):
        gap = progressive_target(teacher, z, t, s) - teacher(z, t).x0
        assert gap.detach().square().mean().sqrt() > 0.01
