"""DPM-Solver-1, -2, -3 as the survey's audit prints them (appendix A.7 to A.9), apart from the package.

Written before the package's solvers and from the page alone, line for line, on 0-dim float64 tensors;
DPM-Solver++(2M) and (3M) follow Lu et al. 2022 (DPM-Solver++) and its official code. eps(x, t) is any noise
model. Only VP, with its closed forms.
"""

from itertools import pairwise

import torch

BETA_0, BETA_1 = 0.1, 20.0


def alpha(t):
    return torch.exp(-0.5 * (BETA_0 * t + 0.5 * (BETA_1 - BETA_0) * t**2))


def sigma(t):
    return torch.sqrt(-torch.expm1(-(BETA_0 * t + 0.5 * (BETA_1 - BETA_0) * t**2)))


def lam(t):
    return torch.log(alpha(t) / sigma(t))


def t_lambda(l):
    log = torch.log(torch.exp(-2 * l) + 1)
    return 2 * log / (torch.sqrt(BETA_0**2 + 2 * (BETA_1 - BETA_0) * log) + BETA_0)


def dpm_solver_1(eps, x_s, s, t):
    h = lam(t) - lam(s)
    return alpha(t) / alpha(s) * x_s - sigma(t) * (torch.exp(h) - 1) * eps(x_s, s)


def dpm_solver_2(eps, x_s, s, t, r_1=0.5):
    h = lam(t) - lam(s)
    s_1 = t_lambda(lam(s) + r_1 * h)
    e_0 = eps(x_s, s)
    u = alpha(s_1) / alpha(s) * x_s - sigma(s_1) * (torch.exp(r_1 * h) - 1) * e_0
    e_1 = eps(u, s_1)
    return (
        alpha(t) / alpha(s) * x_s
        - sigma(t) * (torch.exp(h) - 1) * e_0
        - sigma(t) / (2 * r_1) * (torch.exp(h) - 1) * (e_1 - e_0)
    )


def dpm_solver_3(eps, x_s, s, t, r_1=1 / 3, r_2=2 / 3):
    h = lam(t) - lam(s)
    s_1, s_2 = t_lambda(lam(s) + r_1 * h), t_lambda(lam(s) + r_2 * h)
    e_0 = eps(x_s, s)
    u_1 = alpha(s_1) / alpha(s) * x_s - sigma(s_1) * (torch.exp(r_1 * h) - 1) * e_0
    D_1 = eps(u_1, s_1) - e_0
    u_2 = (
        alpha(s_2) / alpha(s) * x_s
        - sigma(s_2) * (torch.exp(r_2 * h) - 1) * e_0
        - r_2 / r_1 * sigma(s_2) * ((torch.exp(r_2 * h) - 1) / (r_2 * h) - 1) * D_1
    )
    D_2 = eps(u_2, s_2) - e_0
    return (
        alpha(t) / alpha(s) * x_s
        - sigma(t) * (torch.exp(h) - 1) * e_0
        - sigma(t) / r_2 * ((torch.exp(h) - 1) / h - 1) * D_2
    )


def dpm_solver_fast_orders(K):
    if K % 3 == 0:
        return [3] * (K // 3 - 1) + [2] + [1]
    if K % 3 == 1:
        return [3] * (K // 3) + [1]
    return [3] * (K // 3) + [2]


def single_step(eps, x, ts, orders):
    """The steps of those orders over the times ts (0-dim tensors), one after the other."""
    steps = {1: dpm_solver_1, 2: dpm_solver_2, 3: dpm_solver_3}
    for s, t, order in zip(ts[:-1], ts[1:], orders, strict=True):
        x = steps[order](eps, x, s, t)
    return x


def dpm_solver_pp_2m(eps, x, ts):
    def x_theta(x, t):
        return (x - sigma(t) * eps(x, t)) / alpha(t)

    before = h_before = None
    for s, t in pairwise(ts):
        h = lam(t) - lam(s)
        now = D = x_theta(x, s)
        if before is not None:
            r = h_before / h
            D = (1 + 1 / (2 * r)) * now - 1 / (2 * r) * before
        x = sigma(t) / sigma(s) * x - alpha(t) * (torch.exp(-h) - 1) * D
        before, h_before = now, h
    return x


def dpm_solver_pp_3m(eps, x, ts, factor):
    """DPM-Solver++(3M) with `factor` times D2: 1 is what the official code has, 2 the second derivative."""

    def x_theta(x, t):
        return (x - sigma(t) * eps(x, t)) / alpha(t)

    models, times = [], []
    for s, t in pairwise(ts):
        models, times = [x_theta(x, s), *models[:2]], [s, *times[:2]]
        h = lam(t) - lam(s)
        phi_1 = torch.expm1(-h)
        phi_2 = phi_1 / h + 1
        phi_3 = phi_2 / h - 0.5
        x = sigma(t) / sigma(s) * x - alpha(t) * phi_1 * models[0]
        if len(models) == 1:
            continue
        r_0 = (lam(s) - lam(times[1])) / h
        D1_0 = (models[0] - models[1]) / r_0
        if len(models) == 2:
            x = x - 0.5 * alpha(t) * phi_1 * D1_0
            continue
        r_1 = (lam(times[1]) - lam(times[2])) / h
        D1_1 = (models[1] - models[2]) / r_1
        D1 = D1_0 + r_0 / (r_0 + r_1) * (D1_0 - D1_1)
        D2 = (D1_0 - D1_1) / (r_0 + r_1)
        x = x + alpha(t) * phi_2 * D1 - alpha(t) * phi_3 * factor * D2
    return x
