"""Every refusal: the type of the error, what was wrong, what is allowed, which value came."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
from problems import asym3, exact, gaussian
from torch import nn

from diffedu import data
from diffedu.checks import per_sample
from diffedu.denoiser import Guided, NetDenoiser
from diffedu.exponential import DDIM
from diffedu.metrics import (
    empirical_order,
    energy_distance,
    frechet_distance,
    mmd,
    sliced_energy,
    sliced_w2,
)
from diffedu.mixtures import EmpiricalDenoiser, GaussianMixture
from diffedu.networks import MLP, FourierEmbedding
from diffedu.objectives import dsm_loss, ssm_loss
from diffedu.sampling import encode, sample, trajectory
from diffedu.schedules import VE, VP, Cosine, Custom, SubVP
from diffedu.sde import (
    BrownianPath,
    ddpm_chain,
    euler_maruyama,
    forward_drift,
    ncsn_chain,
    perturb,
    reverse_drift,
)
from diffedu.solvers import Euler, EulerMaruyama
from diffedu.training import Recipe, fit

NAN, INF = math.nan, math.inf
X = torch.zeros(4, 2)
D = exact(gaussian(dim=2), VP())
G = SimpleNamespace(w=torch.tensor([0.5, 0.5]), m=torch.zeros(2, 2), c=torch.eye(2).repeat(2, 1, 1))


class Net(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x, lam):
        return self.answer(x)


def one(x):
    return torch.ones_like(x)


def euler(x, ts):
    return euler_maruyama(VP(), x, ts)


def down(x, ts):
    return sample(D, Euler(), x, ts)


def up(x, ts):
    return encode(D, Euler(), x, ts)


def spoilt(value):
    x = X.clone()
    x[1, 1] = value
    return x


def asymmetric():
    c = G.c.clone()
    c[1, 0, 1] = 0.3
    return c


TABLE = {
    # schedules
    "beta negative": (lambda: VP(-0.1, 20.0), "0 <= beta_min <= beta_max", "-0.1"),
    "beta swapped": (lambda: VP(20.0, 0.1), "0 <= beta_min <= beta_max", "beta_min=20.0, beta_max=0.1"),
    "beta zero": (lambda: SubVP(0.0, 0.0), "beta_max > 0", "beta_max=0.0"),
    "beta nan": (lambda: VP(NAN, 20.0), "0 <= beta_min <= beta_max", "nan"),
    "beta infinite": (lambda: VP(0.1, INF), "beta_max", "inf"),
    "subvp swapped": (lambda: SubVP(3.0, 2.0), "0 <= beta_min <= beta_max", "3.0"),
    "sigma swapped": (lambda: VE(50.0, 0.01), "0 < sigma_min < sigma_max", "sigma_min=50.0, sigma_max=0.01"),
    "sigma equal": (lambda: VE(1.0, 1.0), "0 < sigma_min < sigma_max", "1.0"),
    "sigma zero": (lambda: VE(0.0, 1.0), "0 < sigma_min < sigma_max", "0.0"),
    "sigma nan": (lambda: VE(0.01, NAN), "0 < sigma_min < sigma_max", "nan"),
    "t_min negative": (lambda: VP(t_min=-0.1), "0 <= t_min < t_max <= 1", "-0.1"),
    "t_max above 1": (lambda: Cosine(t_max=1.5), "0 <= t_min < t_max <= 1", "1.5"),
    "t_min above t_max": (lambda: VE(t_min=0.7, t_max=0.2), "0 <= t_min < t_max <= 1", "0.7"),
    "t_min nan": (lambda: VP(t_min=NAN), "0 <= t_min < t_max <= 1", "nan"),
    "custom rises": (
        lambda: Custom(one, lambda t: 0.5 + (t - 0.5) ** 2),
        "signal-to-noise ratio must fall",
        "between t = 0.001 and t =",
    ),
    "custom flat": (lambda: Custom(one, one), "signal-to-noise ratio must fall", "t = 0.001"),
    "custom alpha 0": (lambda: Custom(lambda t: 1 - t, one), "alpha must be positive", "alpha(1) = 0"),
    "custom sigma nan": (lambda: Custom(one, lambda t: t * NAN), "sigma must be positive and finite", "nan"),
    "custom sigma negative": (lambda: Custom(one, lambda t: -t), "sigma must be positive", "= -0.001"),
    "custom shape": (lambda: Custom(lambda t: t.sum(), one), "alpha must map times (n,) to", "got ()"),
    "custom no tensor": (lambda: Custom(one, lambda t: 0.3), "sigma must map times (n,) to", "float"),
    "t outside": (lambda: VP().alpha(1.5), "t must lie in [0, 1]", "1.5"),
    "t below t_min": (lambda: VP().lam(1e-5), "t must lie in [0.001, 1]", "1e-05"),
    "t above t_max": (lambda: Cosine().f(1.0), "t must lie in [0.001, 0.999]", "1.0"),
    "t nan": (lambda: VP().g2(NAN), "t must lie in [0.001, 1]", "nan"),
    "t tensor outside": (lambda: VP().lam(torch.tensor([0.5, -0.25])), "t must lie in", "-0.25"),
    "t tensor nan": (lambda: VP().lam(torch.tensor([0.5, NAN])), "t must lie in", "nan"),
    "t integers": (lambda: VP().alpha(torch.tensor([0, 1])), "floating tensor", "torch.int64"),
    "t no number": (lambda: VP().alpha("0.5"), "must be a float or a floating tensor", "'0.5'"),
    "lam outside": (lambda: VP().t_of_lam(50.0), "lam must lie in [-5.02", "50.0"),
    "grid 0": (lambda: VP().grid(0), "n must be an int of at least 1", "0"),
    "grid 2.5": (lambda: VP().grid(2.5), "n must be an int of at least 1", "2.5"),
    "grid -3": (lambda: VP().grid(-3), "n must be an int of at least 1", "-3"),
    "grid true": (lambda: VP().grid(True), "n must be an int of at least 1", "True"),
    "spacing unknown": (lambda: VP().grid(5, "log"), '"lam", "t", "edm" or a finite number p > 0', "'log'"),
    "spacing 0": (lambda: VP().grid(5, 0), "number p > 0", "0"),
    "spacing negative": (lambda: VP().grid(5, -2.0), "number p > 0", "-2.0"),
    "spacing nan": (lambda: VP().grid(5, NAN), "number p > 0", "nan"),
    "spacing none": (lambda: VP().grid(5, None), "spacing must be", "None"),
    "grid without lam": (lambda: VP(t_min=0.0).grid(5), "needs a finite lam at both ends", "lam=inf"),
    # denoisers
    "kind unknown": (lambda: NetDenoiser(MLP(), VP(), "epsilon"), "('eps', 'x0', 'score', 'v')", "'epsilon'"),
    "kind none": (lambda: NetDenoiser(MLP(), VP(), None), "kind must be one of", "None"),
    "net shape": (
        lambda: NetDenoiser(Net(lambda x: x[:, :1]), VP())(X, 0.5),
        "must return the shape of x, (4, 2)",
        "(4, 1)",
    ),
    "x without data": (lambda: NetDenoiser(MLP(), VP())(X[:, 0], 0.5), "x must be of shape (B, *)", "(4,)"),
    "one time too many": (lambda: D(X, torch.full((5,), 0.5)), "one time per sample of x (4, 2)", "(5,)"),
    "times as a column": (lambda: D(X, torch.full((4, 1), 0.5)), "of shape (B,)", "(4, 1)"),
    "denoise at t < t_min": (lambda: D(X, 0.0), "t must lie in [0.001, 1]", "0.0"),
    "denoise integers": (lambda: D(X.long(), 0.5), "x must be a floating tensor", "torch.int64"),
    "x of other D": (lambda: D(torch.zeros(4, 3), 0.5), "x must be of shape (B, 2)", "(4, 3)"),
    "guidance nan": (lambda: Guided(D, D, NAN), "weight must be a finite number", "nan"),
    "guidance schedules": (
        lambda: Guided(D, exact(gaussian(dim=2), VE()), 1.0),
        "must share one schedule",
        "sigma_max=50.0",
    ),
    # laws
    "weight negative": (
        lambda: GaussianMixture(torch.tensor([1.5, -0.5]), G.m, G.c),
        "non-negative and sum to 1",
        "-0.5",
    ),
    "weights sum": (
        lambda: GaussianMixture(torch.tensor([0.5, 0.6]), G.m, G.c),
        "non-negative and sum to 1",
        "1 +0.1",
    ),
    "weights nan": (
        lambda: GaussianMixture(torch.tensor([0.5, NAN]), G.m, G.c),
        "weights must be fin",
        "nan",
    ),
    "weights integers": (lambda: GaussianMixture(torch.tensor([1, 0]), G.m, G.c), "finite floats", "[1, 0]"),
    "weights count": (lambda: GaussianMixture(torch.ones(3) / 3, G.m, G.c), "shapes must be", "(3,)"),
    "means shape": (lambda: GaussianMixture(G.w, torch.zeros(2, 3), G.c), "means (K, D)", "(2, 3)"),
    "means 1-D": (lambda: GaussianMixture(G.w, torch.zeros(2), G.c), "means (K, D)", "(2,)"),
    "covs shape": (lambda: GaussianMixture(G.w, G.m, G.c[:1]), "covs (K, D, D)", "(1, 2, 2)"),
    "covs singular": (lambda: GaussianMixture(G.w, G.m, 0 * G.c), "positive definite", "eigenvalue 0"),
    "covs indefinite": (lambda: GaussianMixture(G.w, G.m, -2 * G.c), "positive definite", "-2"),
    "covs asymmetric": (lambda: GaussianMixture(G.w, G.m, asymmetric()), "symmetric", "asymmetry 0.3"),
    "covs nan": (lambda: GaussianMixture(G.w, G.m, G.c * NAN), "covs must be finite", "nan"),
    "mixed dtypes": (lambda: GaussianMixture(G.w, G.m.double(), G.c), "one dtype", "torch.float64"),
    "draws 0": (lambda: asym3().sample(0), "n must be an int of at least 1", "0"),
    "density of other D": (lambda: asym3().log_prob(torch.zeros(3)), "x must be of shape (B, 2)", "(3,)"),
    "marginal outside": (lambda: asym3().marginal(VP(), 2.0), "t must lie in [0, 1]", "2.0"),
    "points 1-D": (lambda: EmpiricalDenoiser(X[:, 0], VP()), "shape (n, D), n > 0", "(4,)"),
    "points none": (lambda: EmpiricalDenoiser(X[:0], VP()), "n > 0", "(0, 2)"),
    "points nan": (lambda: EmpiricalDenoiser(spoilt(NAN), VP()), "points must be finite", "(4, 2)"),
    "points integers": (lambda: EmpiricalDenoiser(X.long(), VP()), "points must be finite", "torch.int64"),
    "points D": (lambda: EmpiricalDenoiser(X, VP())(torch.zeros(4, 3), 0.5), "shape (B, 2)", "(4, 3)"),
    # data
    "roll 0": (lambda: data.swiss_roll(0), "n must be an int of at least 1", "0"),
    "moons 2.5": (lambda: data.moons(2.5), "n must be an int of at least 1", "2.5"),
    "checkerboard -1": (lambda: data.checkerboard(-1), "n must be an int of at least 1", "-1"),
    "ring 0": (lambda: data.ring(0), "n must be an int of at least 1", "0"),
    "nodes 0": (lambda: data.swiss_roll_law(0), "nodes must be an int of at least 1", "0"),
    # the forward SDE
    "eta negative": (
        lambda: reverse_drift(D, X, 0.5, -0.5),
        "eta must be a finite number of at least 0",
        "-0.5",
    ),
    "path 0": (lambda: BrownianPath(0, (2,)), "n must be an int of at least 1", "0"),
    "path outside": (lambda: BrownianPath(2, (2,)).increment(0.5, 1.5), "defined on [0, 1]", "1.5"),
    "path nan": (lambda: BrownianPath(2, (2,))(NAN), "defined on [0, 1]", "nan"),
    "path shape": (
        lambda: euler_maruyama(VP(), X, [0.1, 0.2], BrownianPath(2, (2,))),
        "the shape of x0, (4, 2)",
        "(2,)",
    ),
    "perturb eps": (lambda: perturb(VP(), X, 0.5, X[:1]), "eps must have the shape of x0, (4, 2)", "(1, 2)"),
    "perturb shape": (lambda: perturb(VP(), X, torch.ones(3), X), "one time per sample", "(3,)"),
    "perturb integers": (
        lambda: perturb(VP(), X.long(), 0.5, X),
        "x must be a floating tensor",
        "torch.int64",
    ),
    "drift integers": (
        lambda: forward_drift(VP(), X.long(), 0.5),
        "x must be a floating tensor",
        "torch.int64",
    ),
    "ddpm beta 1": (lambda: ddpm_chain(X, [0.1, 1.0]), "every beta must lie in [0, 1)", "1.0"),
    "ddpm beta negative": (
        lambda: ddpm_chain(X, torch.tensor([-0.5])),
        "every beta must lie in [0, 1)",
        "-0.5",
    ),
    "ddpm beta nan": (lambda: ddpm_chain(X, [NAN]), "every beta must lie in [0, 1)", "nan"),
    "ncsn falls": (lambda: ncsn_chain(X, [0.5, 0.25]), "sigmas must be positive and rise", "0.25 after 0.5"),
    "ncsn repeats": (lambda: ncsn_chain(X, [0.5, 0.5]), "positive and rise", "0.5 after 0.5"),
    "ncsn zero": (lambda: ncsn_chain(X, [0.0]), "positive and rise", "0.0 after 0.0"),
    "ncsn nan": (lambda: ncsn_chain(X, [NAN]), "positive and rise", "nan"),
    "chain nan": (lambda: ddpm_chain(spoilt(NAN), [0.1]), "x0 must be finite", "1 nan or inf"),
    "chain integers": (lambda: ncsn_chain(X.long(), [0.1]), "x0 must be a floating tensor", "torch.int64"),
    # solvers and sampling
    "em eta negative": (lambda: EulerMaruyama(-0.1), "eta must be a finite number of at least 0", "-0.1"),
    "em eta nan": (lambda: EulerMaruyama(NAN), "eta must be a finite number of at least 0", "nan"),
    "ddim eta negative": (lambda: DDIM(-1.0), "eta must be a finite number of at least 0", "-1.0"),
    "ddim eta infinite": (lambda: DDIM(INF), "eta must be a finite number of at least 0", "inf"),
    "ddim eta large": (lambda: sample(D, DDIM(3.0), X, [0.9, 0.1]), "more noise than sigma", "3.0"),
    "trajectory x": (
        lambda: trajectory(D, Euler(), X[:, 0], [0.9, 0.1]),
        "x must be of shape (B, *)",
        "(4,)",
    ),
    "no tensor": (
        lambda: sample(D, Euler(), [[0.0, 1.0]], [0.9, 0.1]),
        "x must be a floating tensor",
        "list",
    ),
    "encode stochastic": (lambda: encode(D, DDIM(0.5), X, [0.1, 0.9]), "deterministic solver", "eta=0.5"),
    # objectives
    "weight unknown": (lambda: dsm_loss(D, X, 0.5, X, "snr"), "('eps', 'x0', 'score', 'v')", "'snr'"),
    "dsm shapes": (lambda: dsm_loss(D, X, 0.5, X[:3]), "x0 and eps must have one shape", "(3, 2)"),
    "dsm times": (lambda: dsm_loss(D, X, torch.ones(2), X), "one time per sample", "(2,)"),
    "ssm shapes": (lambda: ssm_loss(D, X, 0.5, X[:3]), "v must have the shape of x_t, (4, 2)", "(3, 2)"),
    # networks and training
    "mlp width": (lambda: MLP(width=0), "width must be an int of at least 1", "0"),
    "mlp depth": (lambda: MLP(depth=1.5), "depth must be an int of at least 1", "1.5"),
    "embedding odd": (lambda: FourierEmbedding(7), "dim must be even", "7"),
    "steps": (lambda: Recipe(0), "steps must be an int of at least 1", "0"),
    "lr": (lambda: Recipe(10, lr=-1e-3), "lr must be positive", "-0.001"),
    "lr nan": (lambda: Recipe(10, lr=NAN), "lr must be positive", "nan"),
    "ema": (lambda: Recipe(10, ema=1.0), "ema must lie in [0, 1)", "1.0"),
    "stop_after": (
        lambda: fit(MLP(), None, Recipe(3), torch.Generator(), stop_after=0),
        "stop_after must be an int of at least 1",
        "0",
    ),
    "every": (
        lambda: fit(MLP(), None, Recipe(3), torch.Generator(), every=0.5),
        "every must be an int",
        "0.5",
    ),
    # metrics
    "sizes": (lambda: sliced_w2(X, X[:3]), "x and y must have the same shape", "(3, 2)"),
    "bandwidth": (lambda: mmd(X, X, 0.0), "bandwidth must be positive", "0.0"),
    "bandwidth nan": (lambda: mmd(X, X, NAN), "bandwidth must be positive", "nan"),
    "order of one": (lambda: empirical_order([0.1], [0.2]), "two or more", "(1,)"),
    "order lengths": (lambda: empirical_order([0.1, 0.2], [0.2]), "equally many", "(2,) and (1,)"),
    "order zero": (lambda: empirical_order([0.1, 0.2], [0.0, 0.1]), "must be positive", "[0.0, 0.1]"),
    "order nan": (lambda: empirical_order([0.1, NAN], [0.1, 0.1]), "must be positive", "nan"),
    "order same h": (lambda: empirical_order([0.1, 0.1], [0.1, 0.2]), "two different values", "[0.1, 0.1]"),
}
for name, march, order in (("euler", euler, 1), ("sample", down, -1), ("encode", up, 1)):
    word = "ascend" if order == 1 else "descend"
    for case, ts, fragments in (
        ("repeat", [0.1, 0.5, 0.5, 0.9][::order], (f"strictly {word}", "0.5 followed by 0.5")),
        ("turn", [0.1, 0.5, 0.4, 0.9][::order], (f"strictly {word}",)),
        ("wrong way", [0.9, 0.1][::order], (f"strictly {word}",)),
        ("too early", [0.0, 0.5][::order], ("[t_min, t_max] = [0.001, 1]", "got 0.0")),
        ("too late", [0.5, 1.25][::order], ("[t_min, t_max] = [0.001, 1]", "got 1.25")),
        ("nan", [0.5, NAN][::order], ("[t_min, t_max] = [0.001, 1]", "got nan")),
        ("single", [0.5], ("two times or more", "[0.5]")),
        ("none", [], ("two times or more", "[]")),
        ("number", 0.5, ("two or more", "0.5")),
        ("0-dim", torch.tensor(0.5), ("two or more", "0.5")),
        ("matrix", torch.ones(2, 2), ("one row of times", "1., 1.")),
    ):
        TABLE[f"{name} times {case}"] = (lambda march=march, ts=ts: march(X, ts), *fragments)
    for case, x, fragments in (
        ("integers", X.long(), ("must be a floating tensor", "torch.int64")),
        ("nan", spoilt(NAN), ("must be finite", "1 nan or inf")),
        ("infinite", spoilt(-INF), ("must be finite", "1 nan or inf")),
        ("flat", X[:, 0], ("must be of shape (B, *)", "(4,)")),
    ):
        ts = [0.1, 0.9][::order]
        TABLE[f"{name} state {case}"] = (lambda march=march, x=x, ts=ts: march(x, ts), *fragments)
for metric in (sliced_w2, sliced_energy, energy_distance, frechet_distance, lambda x, y: mmd(x, y, 1.0)):
    for case, x, y, fragments in (
        ("nan", X, spoilt(NAN), ("y must be finite", "1 nan or inf")),
        ("integers", X.long(), X, ("x must be floats of shape (n, D)", "torch.int64")),
        ("one", X[:1], X[:1], ("n >= 2", "(1, 2)")),
        ("1-D", X[:, 0], X[:, 0], ("shape (n, D)", "(4,)")),
        ("D", X, torch.zeros(4, 3), ("the same", "(4, 3)")),
    ):
        key = f"{metric.__name__} {case}"
        TABLE[key] = (lambda metric=metric, x=x, y=y: metric(x, y), *fragments)


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_is_refused_with_what_is_allowed_and_what_came(case):
    call, *fragments = TABLE[case]
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as refusal:
        call()
    for fragment in fragments:
        assert fragment in str(refusal.value)


def test_good_input_at_the_edges_is_taken():
    VP(0.0, 20.0), VP(2.0, 2.0), VP(t_min=0.0), Cosine(t_max=1.0)
    assert len(VP().grid(1)) == 2
    GaussianMixture(torch.tensor([1.0, 0.0]), G.m, G.c)
    GaussianMixture(torch.full((7,), 1 / 7), torch.zeros(7, 1), torch.ones(7, 1, 1))
    assert down(X, [1.0, 1e-3]).shape == X.shape
    assert down(X[:0], [1.0, 1e-3]).shape == (0, 2)
    assert down(X, torch.tensor([1.0, 1e-3])).shape == X.shape
    assert sum(1 for _ in ddpm_chain(X, [])) == 1


def test_times_are_put_in_one_place():
    x = torch.zeros(3, 1, 2, 2)
    assert per_sample(0.5, x) == 0.5
    assert per_sample(torch.tensor(0.5).double(), x).dtype == x.dtype
    c = per_sample(torch.tensor([0.1, 0.2, 0.3]).double(), x)
    assert (c.shape, c.dtype) == ((3, 1, 1, 1), x.dtype)
