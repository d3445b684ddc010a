"""Laws whose score is known exactly: Gaussian mixtures and point clouds, noised by any schedule."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffedu.checks import per_sample, require_count
from diffedu.denoiser import Prediction
from diffedu.schedules import Schedule


class GaussianMixture:
    """A mixture of K Gaussians in D dimensions.

    weights (K,), means (K, D), covs (K, D, D), of one floating dtype. Raises ValueError for weights that are
    negative or do not sum to one, covariances that are not symmetric positive definite, shapes that disagree.
    """

    def __init__(self, weights: Tensor, means: Tensor, covs: Tensor) -> None:
        for name, value in (("weights", weights), ("means", means), ("covs", covs)):
            if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} must be finite floats; got {value}")
        if not weights.dtype == means.dtype == covs.dtype:
            raise ValueError(
                "weights, means and covs must have one dtype; got "
                f"{weights.dtype}, {means.dtype}, {covs.dtype}"
            )
        k, d = means.shape if means.ndim == 2 else (-1, -1)
        if weights.shape != (k,) or covs.shape != (k, d, d):
            raise ValueError(
                "shapes must be weights (K,), means (K, D), covs (K, D, D); got "
                f"{tuple(weights.shape)}, {tuple(means.shape)}, {tuple(covs.shape)}"
            )
        tolerance = 100 * torch.finfo(weights.dtype).eps
        excess = float(weights.sum()) - 1
        if bool((weights < 0).any()) or abs(excess) > tolerance * math.sqrt(k):
            raise ValueError(
                "weights must be non-negative and sum to 1; got a smallest of "
                f"{float(weights.min()) if k else math.nan:.3g} and the sum 1 {excess:+.3g}"
            )
        variances, axes = torch.linalg.eigh(covs)
        asymmetry = float((covs - covs.mT).abs().max())
        if float(variances.min()) <= 0 or asymmetry > tolerance * float(covs.abs().max()):
            raise ValueError(
                "covariances must be symmetric and positive definite; got a smallest eigenvalue "
                f"{float(variances.min()):.3g} and an asymmetry {asymmetry:.3g}"
            )
        self.weights, self.means, self.covs = weights, means, covs
        self._variances, self._axes = variances, axes  # covs = axes diag(variances) axes^T

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n independent draws, (n, D)."""
        require_count("n", n)
        device = generator.device if generator is not None else self.weights.device
        which = torch.multinomial(self.weights.to(device), n, replacement=True, generator=generator)
        z = torch.randn(n, self.means.shape[1], dtype=self.means.dtype, device=device, generator=generator)
        which, z = which.to(self.means.device), z.to(self.means.device)
        roots = self._axes * self._variances.sqrt().unsqueeze(1)  # roots roots^T = covs
        draws: Tensor = self.means[which] + (roots[which] @ z.unsqueeze(-1)).squeeze(-1)
        return draws

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density in nats at x (B, D): (B,). Equations: eq-gaussian-density"""
        return self._log_joint(x, 1.0, 0.0)[0].logsumexp(-1)

    def score(self, x: Tensor) -> Tensor:
        """Gradient of the log-density at x (B, D): (B, D). Equations: eq-score"""
        return self.noised_score(x, 1.0, 0.0)

    def marginal(self, schedule: Schedule, t: float) -> "GaussianMixture":
        """The law of alpha_t x_0 + sigma_t eps, a mixture again; t a scalar. Equations: eq-kernel"""
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        eye = torch.eye(self.means.shape[1]).to(self.covs)
        return GaussianMixture(self.weights, alpha * self.means, alpha**2 * self.covs + sigma**2 * eye)

    def noised_score(self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor) -> Tensor:
        """The score of alpha x_0 + sigma eps at x (B, D): (B, D); alpha, sigma numbers or (B, 1).

        Equations: eq-unknown-score
        """
        log_joint, y, variances = self._log_joint(x, alpha, sigma)
        responsibility = log_joint.softmax(-1)
        # sum_k r_k axes_k (-y_k / variances_k)
        return -torch.einsum("bk,kde,bke->bd", responsibility, self._axes.to(x), y / variances)

    def _log_joint(
        self, x: Tensor, alpha: float | Tensor, sigma: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """log(weight_k N_k(x)) (B, K), x in the axes of each component (B, K, D), variances there."""
        if x.ndim != 2 or x.shape[1] != self.means.shape[1]:
            raise ValueError(f"x must be of shape (B, {self.means.shape[1]}); got {tuple(x.shape)}")
        weights, means, axes = self.weights.to(x), self.means.to(x), self._axes.to(x)
        if isinstance(alpha, Tensor) and alpha.ndim:  # (B, 1) -> (B, 1, 1)
            alpha = alpha.unsqueeze(-1)
        if isinstance(sigma, Tensor) and sigma.ndim:
            sigma = sigma.unsqueeze(-1)
        variances = alpha**2 * self._variances.to(x) + sigma**2
        in_axes = torch.einsum("bd,kde->bke", x, axes)
        y = in_axes - alpha * torch.einsum("kd,kde->ke", means, axes)
        quadratic = (y * y / variances + variances.log()).sum(-1)
        constant = x.shape[1] * math.log(2 * math.pi)
        return weights.log() - 0.5 * (quadratic + constant), y, variances


@dataclass(frozen=True)
class ExactDenoiser:
    """The exact prediction for data from a Gaussian mixture; t scalar or (B,).

    Source: score of a Gaussian mixture; E[x0 | x_t] by Tweedie's formula (Efron 2011).
    """

    law: GaussianMixture
    schedule: Schedule

    def __call__(self, x: Tensor, t: float | Tensor) -> Prediction:
        """The prediction at x (B, D) and t: float, 0-dim or (B,)."""
        self.schedule.lam(t)  # refuses times at which a denoiser is not defined
        alpha, sigma = per_sample(self.schedule.alpha(t), x), per_sample(self.schedule.sigma(t), x)
        return Prediction(x, alpha, sigma, "score", self.law.noised_score(x, alpha, sigma))


@dataclass(frozen=True)
class EmpiricalDenoiser:
    """The exact prediction for data that is one of n given points (n, D), each equally likely.

    x0 is the softmax-weighted mean of the points (Karras et al. 2022, eq. 57): it memorises the data.
    Raises ValueError where sigma = 0.
    """

    points: Tensor
    schedule: Schedule

    def __post_init__(self) -> None:
        p = self.points
        if p.ndim != 2 or len(p) == 0 or not p.is_floating_point() or not bool(p.isfinite().all()):
            raise ValueError(
                f"points must be finite floats of shape (n, D), n > 0; got {tuple(p.shape)}, {p.dtype}"
            )

    def __call__(self, x: Tensor, t: float | Tensor) -> Prediction:
        """The prediction at x (B, D) and t: float, 0-dim or (B,)."""
        if x.ndim != 2 or x.shape[1] != self.points.shape[1]:
            raise ValueError(f"x must be of shape (B, {self.points.shape[1]}); got {tuple(x.shape)}")
        self.schedule.lam(t)
        alpha, sigma = per_sample(self.schedule.alpha(t), x), per_sample(self.schedule.sigma(t), x)
        if bool((sigma == 0).any()) if isinstance(sigma, Tensor) else sigma == 0:
            raise ValueError(f"the posterior of a point cloud needs sigma > 0; got t = {t!r}")
        points = self.points.to(x)
        # |x - alpha p|^2 less the part that does not depend on p, which the softmax ignores
        squared = alpha**2 * (points * points).sum(-1) - 2 * alpha * (x @ points.mT)
        x0 = (-0.5 * squared / sigma**2).softmax(-1) @ points
        return Prediction(x, alpha, sigma, "x0", x0)
