"""Exact log-likelihood along the probability-flow ODE."""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from scipy.integrate import RK45
from torch import Tensor

from diffedu.checks import require_count, require_state
from diffedu.denoiser import Denoiser


class Density(Protocol):
    """A law that has a density: any object with this method."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats at x (B, *): (B,)."""


def log_likelihood(
    denoiser: Denoiser,
    x: Tensor,
    prior: Density | None = None,
    trace: str = "exact",
    rtol: float = 1e-8,
    *,
    generator: torch.Generator | None = None,
    probes: int = 1,
) -> Tensor:
    """Log-density in nats at x (B, *) of the law at t_min that the ODE carries from `prior` at t_max: (B,).

    log p(x) = log prior(x_T) + the integral of div(dx/dt) from t_min to t_max along the path from x to x_T.
    prior: default N(0, sigma(t_max)^2 I). trace: "exact", one backward pass for each dimension, or
    "hutchinson", the mean of v.(J v) over `probes` vectors v of random signs for each sample, drawn from the
    generator and kept for the whole path, which makes it unbiased. The state is float64; each sample has its
    own steps, and the error of a step, absolute and relative, is at most rtol / 10 or the eps of x's dtype,
    in which the denoiser is called. No gradients are recorded. Raises ValueError for an infinite lam at t_min
    or t_max, an unknown trace, an rtol outside (0, 1), fewer than one probe, values that are not finite.
    Source: Chen et al. 2018, theorem 1; Song et al. 2021, eq. 39; trace, Hutchinson 1989.
    Equations: eq-continuous-flow
    """
    require_state(x)
    require_count("probes", probes)
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie in (0, 1); got {rtol!r}")
    schedule, dims = denoiser.schedule, math.prod(x.shape[1:])
    ends = schedule.t_min, schedule.t_max
    lam1, lam0 = (schedule.lam(t) for t in ends)
    if math.isinf(lam0) or math.isinf(lam1):
        raise ValueError(
            f"a likelihood needs a finite lam at both ends; got lam={lam0} at t_max={schedule.t_max} and "
            f"lam={lam1} at t_min={schedule.t_min}: move t_max or t_min inwards"
        )
    if trace == "exact":  # tr J is the sum of e.(J e) over the unit vectors e
        directions = torch.eye(dims).to(x).reshape(dims, 1, *x.shape[1:]).expand(dims, *x.shape)
    elif trace == "hutchinson":
        bits = torch.randint(2, (probes, *x.shape), generator=generator, device=x.device)
        directions = (2 * bits - 1).to(x) / math.sqrt(probes)
    else:
        raise ValueError(f'trace must be "exact" or "hutchinson"; got {trace!r}')

    def slope(u: Tensor, state: Tensor, rows: Tensor) -> Tensor:
        """d/du of z = x / rho and of its log-volume; u = log(sigma / alpha), rho^2 = alpha^2 + sigma^2.

        z = x_0 cos(a) + eps sin(a) with a = arctan(sigma / alpha), so that dz/da = v / rho, and
        da/du = sin(a) cos(a): bounded everywhere and gone at both ends.
        """
        t = schedule.t_of_lam(-u)
        alpha, sigma = schedule.alpha(t).unsqueeze(1), schedule.sigma(t).unsqueeze(1)
        rho = torch.hypot(alpha, sigma)
        with torch.enable_grad():
            x_t = (rho * state[:, :-1]).to(x.dtype).reshape(-1, *x.shape[1:]).requires_grad_()
            v = denoiser(x_t, t).v
            divergence = torch.zeros_like(u)
            for e in directions:
                e = e[rows]
                (e_J,) = torch.autograd.grad((e * v).sum(), x_t, retain_graph=True)
                divergence += (e_J * e).flatten(1).sum(1)
        found = torch.cat([v.detach().flatten(1) / rho, divergence.unsqueeze(1)], 1)
        bad = ~found.isfinite().all(1)
        if bool(bad.any()):
            raise ValueError(f"the denoiser must give finite values; got others at t = {float(t[bad][0])!r}")
        return alpha * sigma / rho**2 * found

    with torch.inference_mode(False), torch.no_grad():
        start, end = (math.hypot(schedule.alpha(t), schedule.sigma(t)) for t in ends)
        state = torch.cat([x.flatten(1).double() / start, x.new_zeros(len(x), 1).double()], 1)
        state = _dormand_prince(slope, state, -lam1, -lam0, max(rtol / 10, torch.finfo(x.dtype).eps))
        x_T = end * state[:, :-1]
        if prior is None:
            sigma = schedule.sigma(schedule.t_max)
            log_prior = -0.5 * (x_T / sigma).square().sum(1) - dims * math.log(sigma * math.sqrt(2 * math.pi))
        else:
            log_prior = prior.log_prob(x_T.reshape(x.shape).to(x.dtype))
            if log_prior.shape != x.shape[:1]:
                raise ValueError(
                    f"prior.log_prob must give one value per sample, {tuple(x.shape[:1])}; got "
                    f"{tuple(log_prior.shape)}"
                )
        return (log_prior + state[:, -1] + dims * math.log(end / start)).to(x.dtype)


def _dormand_prince(
    slope: Callable[[Tensor, Tensor, Tensor], Tensor], state: Tensor, u0: float, u1: float, tol: float
) -> Tensor:
    """The state (B, m) at u1 of d state/du = slope(u (b,), state (b, m), rows (b,)), from u0 < u1.

    Every row has its own steps, so that a hard one neither slows the others nor hides among them: the largest
    error of a step is at most tol (1 + |state|). Source: Dormand & Prince 1980, the pair 5(4), from scipy.
    """
    A, B, C, E = (state.new_tensor(c.tolist()) for c in (RK45.A, RK45.B, RK45.C, RK45.E))
    rows = torch.arange(len(state), device=state.device)  # those not yet at u1
    u, step = torch.full_like(state[:, 0], u0), torch.full_like(state[:, 0], 0.01 * (u1 - u0))
    k = state.new_empty(len(E), *state.shape)
    if len(rows):
        k[0] = slope(u, state, rows)
    while len(rows):
        y, now, h, stages = state[rows], u[rows], step[rows], k[:, rows]
        last = now + h >= u1
        h = torch.where(last, u1 - now, h)
        for i in range(1, len(B)):
            y_i = y + h.unsqueeze(1) * torch.tensordot(A[i, :i], stages[:i], 1)
            stages[i] = slope(now + C[i] * h, y_i, rows)
        new, later = y + h.unsqueeze(1) * torch.tensordot(B, stages[:-1], 1), torch.where(last, u1, now + h)
        stages[-1] = slope(later, new, rows)  # the first stage of the next step
        scale = tol * (1 + torch.maximum(y.abs(), new.abs()))
        error = (h.unsqueeze(1) * torch.tensordot(E, stages, 1) / scale).abs().amax(1)
        step[rows] = h * (0.9 * error.clamp_min(1e-9) ** -0.2).clamp(0.2, 5.0)
        taken = error <= 1
        done = rows[taken]
        state[done], u[done], k[0, done] = new[taken], later[taken], stages[-1, taken]
        rows = rows[~(taken & last)]
    return state
