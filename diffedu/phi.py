"""The phi functions, by which exponential integrators weigh a polynomial."""

import math

from diffedu.checks import require_count

SERIES_BELOW, SERIES_TERMS = 2.0, 30


def phi(k: int, h: float) -> float:
    """phi_k(h) = sum over j >= 0 of h^j / (j + k)!, the integral of e^((1-u) h) u^(k-1) / (k-1)! over [0, 1].

    phi_0 = e^h, phi_(k+1) = (phi_k - 1/k!) / h; where |h| is small, and the recursion loses all digits, by
    the series. Raises ValueError for k that is no int of at least 0.
    Source: Hochbruck & Ostermann 2010, section 2.1; Lu et al. 2022 (DPM-Solver), appendix B.
    Equations: eq-phi-recursion
    """
    require_count("k", k, 0)
    if abs(h) < SERIES_BELOW:
        value = 1.0
        for j in range(SERIES_TERMS, 0, -1):  # 1 + h/(k+1) (1 + h/(k+2) (1 + ...))
            value = 1 + h / (k + j) * value
        return value / math.factorial(k)
    if k == 0:
        return math.exp(h)
    value = math.expm1(h) / h
    for j in range(1, k):
        value = (value - 1 / math.factorial(j)) / h
    return value
