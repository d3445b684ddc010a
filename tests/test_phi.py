import math

import mpmath
import pytest

from diffedu.phi import phi

SIZES = [1e-300, 1e-12, 1e-8, 1e-4, 0.01, 0.3, 1.0, 1.999999, 2.0, 2.000001, 5.0, 20.0]


@pytest.mark.parametrize("k", range(5))
@pytest.mark.parametrize("sign", [1, -1])
def test_phi_keeps_its_digits_for_steps_of_any_size(k, sign):
    with mpmath.workdps(60):
        for h in (0.0, *(sign * size for size in SIZES)):
            exact = mpmath.nsum(lambda j, h=h: mpmath.mpf(h) ** j / mpmath.factorial(j + k), [0, mpmath.inf])
            assert phi(k, h) == pytest.approx(float(exact), rel=1e-14)


@pytest.mark.equation("eq-phi-recursion")
def test_phi_is_the_integral_that_a_step_takes():
    # audit S93: int e^(-l) (l - s)^n / n! dl over [s, t] = (sigma_t / alpha_t) h^(n+1) phi_(n+1)(h)
    s, t = -0.4, 1.1
    h = t - s
    for n in range(4):
        want = mpmath.quad(lambda l, n=n: mpmath.exp(-l) * (l - s) ** n / math.factorial(n), [s, t])
        assert math.exp(-t) * h ** (n + 1) * phi(n + 1, h) == pytest.approx(float(want), rel=1e-13)


def test_the_recursion_taken_literally_loses_small_steps():
    h, value = 1e-6, math.exp(1e-6)
    for k in range(3):
        value = (value - 1 / math.factorial(k)) / h
    assert abs(value - phi(3, h)) > 1.0


@pytest.mark.parametrize("k", [-1, 1.5, True])
def test_phi_refuses_what_is_no_count(k):
    with pytest.raises(ValueError, match=f"k must be an int of at least 0; got {k}"):
        phi(k, 0.5)
