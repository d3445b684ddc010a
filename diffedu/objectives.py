"""Score-matching objectives, one value per sample."""

from torch import Tensor

from diffedu.checks import per_sample
from diffedu.denoiser import KINDS, Denoiser, Prediction


def dsm_loss(denoiser: Denoiser, x0: Tensor, t: float | Tensor, eps: Tensor, weight: str = "eps") -> Tensor:
    """Denoising score matching: |s(x_t, t) - grad log q(x_t | x_0)|^2 times a weight, (B,).

    x0, eps (B, *); t float, 0-dim or (B,). The weight names the reading in which the error is measured:
    "score" (1), "eps" (sigma^2), "x0" (sigma^4 / alpha^2), "v" (sigma^2 (alpha^2 + sigma^2)^2 / alpha^2).
    Raises ValueError for an unknown weight or shapes that disagree.
    Source: Vincent 2011; weights, Ho et al. 2020 and Salimans & Ho 2022.
    """
    if weight not in KINDS:
        raise ValueError(f"weight must be one of {KINDS}; got {weight!r}")
    if x0.shape != eps.shape:
        raise ValueError(f"x0 and eps must have one shape; got {tuple(x0.shape)}, {tuple(eps.shape)}")
    c, schedule = per_sample(t, x0), denoiser.schedule
    alpha, sigma = schedule.alpha(c), schedule.sigma(c)
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
