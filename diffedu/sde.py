"""The stochastic side: drifts, Brownian paths, forward Euler-Maruyama, the DDPM and NCSN chains."""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from diffedu.checks import per_sample, require_count, require_eta, require_state, require_times
from diffedu.denoiser import Denoiser
from diffedu.schedules import Schedule


def randn_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of the shape, dtype and device of x, from the generator."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def perturb(schedule: Schedule, x0: Tensor, t: float | Tensor, eps: Tensor) -> Tensor:
    """x_t = alpha_t x0 + sigma_t eps, all (B, *); t float, 0-dim or (B,).

    Raises ValueError for shapes that disagree. Equations: eq-kernel, eq-noising
    """
    if eps.shape != x0.shape:
        raise ValueError(f"eps must have the shape of x0, {tuple(x0.shape)}; got {tuple(eps.shape)}")
    return per_sample(schedule.alpha(t), x0) * x0 + per_sample(schedule.sigma(t), x0) * eps


def forward_drift(schedule: Schedule, x: Tensor, t: float | Tensor) -> Tensor:
    """The drift f(t) x of the forward SDE, (B, *) (Song et al. 2021).

    Equations: eq-linear-sde, eq-forward-sde-again, eq-sde-restated
    """
    return per_sample(schedule.f(t), x) * x


def reverse_drift(denoiser: Denoiser, x: Tensor, t: float | Tensor, eta: float = 1.0) -> Tensor:
    """dx/dt of the reverse-time family with noise eta g, to be integrated with dt < 0: (B, *).

    f x - (1 + eta^2) g^2 score / 2; eta = 1 is Anderson's reverse SDE, eta = 0 the probability-flow ODE.
    Raises ValueError for eta < 0. Source: Anderson 1982; Song et al. 2021, eq. 6 and 13.
    Equations: eq-reverse-sde, eq-reverse-intuition, eq-vp-reverse-sde, eq-ve-reverse-sde, eq-family-sde,
    eq-probability-flow, eq-one-ode
    """
    require_eta(eta)
    f, g2 = per_sample(denoiser.schedule.f(t), x), per_sample(denoiser.schedule.g2(t), x)
    return f * x - 0.5 * (1 + eta**2) * g2 * denoiser(x, t).score


class BrownianPath:
    """A Brownian path on [0, 1], shape `shape`, known at k/n and refined by Brownian bridges on demand.

    `increment(t, s)` is W_s - W_t. A value once asked for never changes, so increments over adjoining
    intervals add up to the increment over both, to rounding, whatever was asked between.
    Raises ValueError outside [0, 1]. Equations: eq-forward-sde
    """

    def __init__(
        self,
        n: int,
        shape: Sequence[int],
        generator: torch.Generator | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        require_count("n", n)
        self.generator, self.shape = generator, torch.Size(shape)
        device = generator.device if generator is not None else None
        steps = torch.randn(n, *shape, dtype=dtype, device=device, generator=generator)
        self._times = [k / n for k in range(n + 1)]
        path = torch.cat([torch.zeros_like(steps[:1]), steps.cumsum(0) / math.sqrt(n)])
        self._values: list[Tensor] = list(path)

    def __call__(self, t: float) -> Tensor:
        """W_t, of the path's shape."""
        if not 0.0 <= t <= 1.0:
            raise ValueError(f"a Brownian path is defined on [0, 1]; got t = {t!r}")
        i = bisect_left(self._times, t)
        if self._times[i] == t:
            return self._values[i]
        left, right = self._times[i - 1], self._times[i]
        w = (t - left) / (right - left)
        bridge_std = math.sqrt(w * (1 - w) * (right - left))
        z = randn_like(self._values[i], self.generator)
        value: Tensor = torch.lerp(self._values[i - 1], self._values[i], w) + bridge_std * z
        self._times.insert(i, t)
        self._values.insert(i, value)
        return value

    def increment(self, t: float, s: float) -> Tensor:
        """W_s - W_t, of the path's shape; for t < s it is N(0, (s - t) I)."""
        return self(s) - self(t)


def euler_maruyama(
    schedule: Schedule,
    x0: Tensor,
    ts: Tensor | Sequence[float],
    path: BrownianPath | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Forward Euler-Maruyama from x0 (B, *) at ts[0] through ascending ts; the state at ts[-1], (B, *).

    x <- x + f(t) x dt + g(t) dw; dw comes from `path` if given, else from `generator`. Strong and weak
    order 1 (the noise is additive). Source: Kloeden & Platen 1992, 9.1.
    Raises ValueError for times that do not ascend within [t_min, t_max], for states that are not finite and
    for a path of another shape than x0.
    Equations: eq-integral-form, eq-euler-maruyama, eq-markov-chain
    """
    require_state(x0, "x0")
    if path is not None and path.shape != x0.shape:
        raise ValueError(f"the path must have the shape of x0, {tuple(x0.shape)}; got {tuple(path.shape)}")
    times = require_times(ts, schedule.t_min, schedule.t_max, descending=False)
    x = x0
    for t, s in pairwise(times):
        dt = s - t
        dw = math.sqrt(dt) * randn_like(x, generator) if path is None else path.increment(t, s).to(x)
        x = x + schedule.f(t) * dt * x + math.sqrt(schedule.g2(t)) * dw
    return x


def ddpm_chain(
    x0: Tensor, betas: Tensor | Sequence[float], generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """DDPM's forward chain x <- sqrt(1 - beta_i) x + sqrt(beta_i) z: yields x_0, x_1, ..., x_N, (B, *).

    Raises ValueError unless every beta lies in [0, 1). Source: Ho et al. 2020, eq. 2.
    Equations: eq-ddpm-chain, eq-ddpm-forward
    """
    require_state(x0, "x0")
    steps = [float(b) for b in betas]
    for b in steps:
        if not 0 <= b < 1:
            raise ValueError(f"every beta must lie in [0, 1); got {b!r}")
    return _chain(x0, [(math.sqrt(1 - b), math.sqrt(b)) for b in steps], generator)


def ncsn_chain(
    x0: Tensor, sigmas: Tensor | Sequence[float], generator: torch.Generator | None = None
) -> Iterator[Tensor]:
    """NCSN's noise ladder x <- x + sqrt(sigma_i^2 - sigma_{i-1}^2) z with sigma_0 = 0: yields N + 1 states.

    The i-th has the law N(x0, sigma_i^2 I) given x0. Raises ValueError unless the sigmas are positive and
    rise. Source: Song & Ermon 2019; as a chain, Song et al. 2021, eq. 20.
    Equations: eq-ve-euler-maruyama, eq-ncsn-forward
    """
    require_state(x0, "x0")
    levels = [0.0, *(float(s) for s in sigmas)]
    for low, high in pairwise(levels):
        if not low < high < math.inf:
            raise ValueError(f"sigmas must be positive and rise; got {high!r} after {low!r}")
    gaps = [math.sqrt((high - low) * (high + low)) for low, high in pairwise(levels)]
    return _chain(x0, [(1.0, gap) for gap in gaps], generator)


def _chain(
    x: Tensor, steps: list[tuple[float, float]], generator: torch.Generator | None
) -> Iterator[Tensor]:
    yield x
    for signal, noise in steps:
        x = signal * x + noise * randn_like(x, generator)
        yield x
