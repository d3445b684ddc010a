"""Progressive distillation: a student learns to make two of its teacher's DDIM steps in one."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffedu.checks import per_sample
from diffedu.denoiser import Denoiser
from diffedu.schedules import Schedule
from diffedu.sde import perturb

Weight = Callable[[Schedule, float | Tensor], float | Tensor]  # of the squared error in x0, at t


@torch.no_grad()
def progressive_target(
    teacher: Denoiser,
    z: Tensor,
    t: float | Tensor,
    s: float | Tensor,
    middle: float | Tensor | None = None,
) -> Tensor:
    """The x0 value (B, *) whose one DDIM step from z (B, *) at t to s lands where the teacher's two do.

    t, s, middle: floats, 0-dim or (B,), t > middle > s >= 0; the middle is (t + s) / 2 unless given. With
    x = teacher(z, t).x0 and x' = teacher(z', middle).x0 the target is c x + (1 - c) x', a mean of the two:
    c = (e^lam' - e^lam_t) / (e^lam_s - e^lam_t), lam the half log-SNR. It holds at sigma_s = 0 (c = 0) and
    alpha_t = 0, and loses no digits where t and s are close. Raises ValueError for other times.
    Source: Salimans & Ho 2022, algorithm 2 and appendix G, which have the quotient; the mean is ours.
    Equations: eq-distillation-target, eq-first-teacher-step, eq-second-teacher-step, eq-target-solved
    """
    schedule = teacher.schedule
    if middle is None:
        middle = (t + s) / 2
    # in float64: the differences of a short interval keep their digits
    (a, b), (a1, b1), (a2, b2) = (_alpha_sigma(schedule, u) for u in (t, middle, s))
    first, whole = b * a1 - b1 * a, b * a2 - b2 * a  # alpha alpha' (r_t - r'), alpha alpha_s (r_t - r_s)
    ordered = torch.as_tensor(first > 0) & torch.as_tensor(b1 * a2 - b2 * a1 > 0)
    if not bool(ordered.all()):
        raise ValueError(f"times must fall: t > middle > s; got t = {t}, middle = {middle}, s = {s}")
    x = teacher(z, t).x0
    z1 = per_sample(b1 / b, z) * z + per_sample(first / b, z) * x
    x1 = teacher(z1, middle).x0
    return x1 + per_sample(b2 * first / (b1 * whole), z) * (x - x1)


def _alpha_sigma(schedule: Schedule, t: float | Tensor) -> tuple[float | Tensor, float | Tensor]:
    wide = t.double() if isinstance(t, Tensor) and t.device.type != "mps" else t
    return schedule.alpha(wide), schedule.sigma(wide)


def require_halving(counts: Sequence[int]) -> None:
    """Raise ValueError unless the generations' numbers of steps halve from one to the next."""
    if not counts or any(a != 2 * b for a, b in pairwise(counts)):
        raise ValueError(f"each generation must make half the steps of the one before; got {list(counts)}")


def truncated_snr(schedule: Schedule, t: float | Tensor) -> float | Tensor:
    """max(alpha^2 / sigma^2, 1): the larger of the errors in x0 and eps (Salimans & Ho 2022, section 4).

    Equations: eq-two-lambdas
    """
    a, b = schedule.alpha(t), schedule.sigma(t)
    snr = (a / b) ** 2
    return snr.clamp(min=1) if isinstance(snr, Tensor) else max(snr, 1.0)


def snr_plus_one(schedule: Schedule, t: float | Tensor) -> float | Tensor:
    """alpha^2 / sigma^2 + 1: for a VP schedule the error in v (Salimans & Ho 2022, section 4).

    Equations: eq-two-lambdas
    """
    a, b = schedule.alpha(t), schedule.sigma(t)
    return (a / b) ** 2 + 1


def progressive_loss(
    student: Denoiser,
    teacher: Denoiser,
    x0: Tensor,
    t: float | Tensor,
    s: float | Tensor,
    eps: Tensor,
    weight: Weight = truncated_snr,
    middle: float | Tensor | None = None,
) -> Tensor:
    """weight times |target - student(z, t).x0|^2 at z = alpha_t x0 + sigma_t eps, (B,).

    x0, eps (B, *); times as for `progressive_target`, through which no gradient flows. weight(schedule, t):
    `truncated_snr` or `snr_plus_one`; the SNR alone would leave t = 1 unlearned.
    Source: Salimans & Ho 2022, algorithm 2. Equations: eq-distillation-loss
    """
    z = perturb(teacher.schedule, x0, t, eps)
    error = progressive_target(teacher, z, t, s, middle) - student(z, t).x0
    return weight(teacher.schedule, t) * error.square().flatten(1).sum(1)


def step_shares(schedule: Schedule, ts: Tensor) -> Tensor:
    """How often a training draws each of the n steps between the times ts (n + 1,): (n,), of sum 1.

    Half evenly, half by the angle that the step turns: with tan(phi) = sigma / alpha and
    alpha^2 + sigma^2 = 1 a DDIM step moves its end by sin(phi_t - phi_s) times an error in v.
    """
    turned = -torch.atan2(schedule.sigma(ts), schedule.alpha(ts)).diff()
    return 0.5 / len(turned) + 0.5 * turned / turned.sum()
