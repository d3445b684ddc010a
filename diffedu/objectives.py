"""Score-matching objectives, one value per sample."""

import torch
from torch import Tensor

from diffedu.checks import per_sample
from diffedu.denoiser import KINDS, Denoiser, Prediction


def ism_loss(denoiser: Denoiser, x_t: Tensor, t: float | Tensor) -> Tensor:
    """Implicit score matching: 2 tr(grad s) + |s|^2 with the exact trace, (B,).

    x_t (B, *); t float, 0-dim or (B,). One backward pass per data dimension. Its mean plus E|grad log p_t|^2
    is the Fisher divergence E|s - grad log p_t|^2, where p_t s vanishes at infinity.
    Source: Hyvärinen 2005, theorem 1 (twice its value). Equations: eq-ism, eq-empirical-ism
    """
    with torch.enable_grad():
        x = x_t.detach().requires_grad_(True)
        score = denoiser(x, t).score
        columns = score.flatten(1).unbind(1)
        trace = torch.stack([_gradient(column, x).flatten(1)[:, i] for i, column in enumerate(columns)])
        values = 2 * trace.sum(0) + score.square().flatten(1).sum(1)
    return values if torch.is_grad_enabled() else values.detach()


def ssm_loss(denoiser: Denoiser, x_t: Tensor, t: float | Tensor, v: Tensor) -> Tensor:
    """Sliced score matching: 2 v.grad(v.s) + |s|^2, (B,), unbiased for `ism_loss` where E[v v^T] = I.

    x_t, v (B, *); t float, 0-dim or (B,). One backward pass. Raises ValueError for shapes that disagree.
    Source: Song et al. 2019 (UAI), eq. 8 with variance reduction; the trace, Hutchinson 1989.
    Equations: eq-empirical-ism
    """
    if v.shape != x_t.shape:
        raise ValueError(f"v must have the shape of x_t, {tuple(x_t.shape)}; got {tuple(v.shape)}")
    with torch.enable_grad():
        x = x_t.detach().requires_grad_(True)
        score = denoiser(x, t).score
        trace = (v * _gradient((v * score).flatten(1).sum(1), x)).flatten(1).sum(1)
        values = 2 * trace + score.square().flatten(1).sum(1)
    return values if torch.is_grad_enabled() else values.detach()


def _gradient(values: Tensor, x: Tensor) -> Tensor:
    """Gradient of each sample's value (B,) with respect to its own x (B, *), itself differentiable."""
    total = values.sum() + 0 * x.sum()  # a value that does not depend on x has gradient 0
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    return gradient


def dsm_loss(denoiser: Denoiser, x0: Tensor, t: float | Tensor, eps: Tensor, weight: str = "eps") -> Tensor:
    """Denoising score matching: |s(x_t, t) - grad log q(x_t | x_0)|^2 times a weight, (B,).

    x0, eps (B, *); t float, 0-dim or (B,). The weight names the reading in which the error is measured:
    "score" (1), "eps" (sigma^2), "x0" (sigma^4 / alpha^2), "v" (sigma^2 (alpha^2 + sigma^2)^2 / alpha^2).
    Raises ValueError for an unknown weight or shapes that disagree.
    Source: Vincent 2011; weights, Ho et al. 2020 and Salimans & Ho 2022.
    Equations: eq-dsm, eq-conditional-score, eq-noise-loss, eq-data-loss, eq-equivalence
    """
    if weight not in KINDS:
        raise ValueError(f"weight must be one of {KINDS}; got {weight!r}")
    if x0.shape != eps.shape:
        raise ValueError(f"x0 and eps must have one shape; got {tuple(x0.shape)}, {tuple(eps.shape)}")
    schedule = denoiser.schedule
    alpha, sigma = per_sample(schedule.alpha(t), x0), per_sample(schedule.sigma(t), x0)
    x_t = alpha * x0 + sigma * eps
    match weight:
        case "eps":
            target = eps
        case "x0":
            target = x0
        case "v":
            target = alpha * eps - sigma * x0
        case _:
            target = Prediction(x_t, alpha, sigma, "eps", eps).score  # grad log q(x_t | x_0)
    error: Tensor = getattr(denoiser(x_t, t), weight) - target
    return error.square().flatten(1).sum(1)
