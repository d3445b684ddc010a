import pytest
import torch
from problems import MAIN, asym3, exact
from torch import nn

from diffedu.denoiser import KINDS, Counted, Guided, NetDenoiser, Prediction, calls_per_evaluation
from diffedu.schedules import VE, VP, Cosine, SubVP

every = pytest.mark.parametrize("schedule", MAIN.values(), ids=MAIN)
TINY = {"rtol": 1e-12, "atol": 1e-12}


def readings(schedule, t, generator, shape=(50, 2)):
    """x and what the four readings must be, from the definitions."""
    x0, eps = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    t = torch.as_tensor(t, dtype=torch.float64)
    alpha, sigma = (c(t).reshape(-1, *[1] * (len(shape) - 1)) for c in (schedule.alpha, schedule.sigma))
    x = alpha * x0 + sigma * eps
    values = {"x0": x0, "eps": eps, "score": -(x - alpha * x0) / sigma**2, "v": alpha * eps - sigma * x0}
    return x, alpha, sigma, values


@every
@pytest.mark.parametrize("kind", KINDS)
def test_any_reading_gives_the_other_three(schedule, kind, generator):
    for t in (0.3, [0.2 + 0.012 * i for i in range(50)]):
        x, alpha, sigma, values = readings(schedule, t, generator)
        prediction = Prediction(x, alpha, sigma, kind, values[kind])
        for reading in KINDS:
            got, scale = getattr(prediction, reading), values[reading].abs().max()
            torch.testing.assert_close(got / scale, values[reading] / scale, **TINY)
            # and back again
            again = getattr(Prediction(x, alpha, sigma, reading, got), kind)
            scale = values[kind].abs().max()
            torch.testing.assert_close(again / scale, values[kind] / scale, **TINY)


@pytest.mark.parametrize("schedule", [VE(sigma_max=5.0), SubVP(), VP()], ids=repr)
def test_x0_from_v_for_every_schedule(schedule, generator):
    x, alpha, sigma, values = readings(schedule, 0.6, generator)
    x0 = (alpha * x - sigma * values["v"]) / (alpha**2 + sigma**2)
    torch.testing.assert_close(Prediction(x, alpha, sigma, "v", values["v"]).x0, x0, **TINY)
    torch.testing.assert_close(x0, values["x0"], **TINY)


@pytest.mark.parametrize(
    ("alpha", "sigma", "kind", "defined"),
    [
        (0.0, 1.0, "eps", {"eps", "score"}),
        (0.0, 1.0, "score", {"eps", "score"}),
        (0.0, 1.0, "x0", set(KINDS)),
        (0.0, 1.0, "v", set(KINDS)),
        (1.0, 0.0, "eps", {"eps", "x0", "v"}),
        (1.0, 0.0, "score", set(KINDS)),
        (1.0, 0.0, "x0", {"x0"}),
        (1.0, 0.0, "v", {"eps", "x0", "v"}),
    ],
)
def test_an_undefined_reading_raises(alpha, sigma, kind, defined):
    x = torch.ones(3, 2)
    for as_tensor in (False, True):
        # in a batch, one sample at the singular time suffices
        a, s = (torch.tensor([[0.6], [0.6], [c]]) if as_tensor else c for c in (alpha, sigma))
        prediction = Prediction(x, a, s, kind, 2 * x)
        for reading in KINDS:
            if reading in defined:
                assert bool(getattr(prediction, reading).isfinite().all())
            else:
                name = "alpha" if alpha == 0 else "sigma"
                with pytest.raises(ValueError, match=f"undefined at {name} = 0"):
                    getattr(prediction, reading)


class Recording(nn.Module):
    """A network that remembers what it was called with."""

    def __init__(self, value=0.5):
        super().__init__()
        self.value, self.calls = value, []

    def forward(self, x, lam):
        self.calls.append((x, lam))
        return torch.full_like(x, self.value)


@every
@pytest.mark.parametrize("shape", [(4, 2), (4, 3, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_network_is_called_with_x_and_lam(schedule, shape, dtype, generator):
    x = torch.randn(shape, dtype=dtype, generator=generator)
    per_sample = torch.tensor([0.1, 0.35, 0.6, 0.95], dtype=torch.float64)
    for t in (0.35, torch.tensor(0.35), torch.tensor(0.35, dtype=torch.float64), per_sample):
        net = Recording()
        denoiser = NetDenoiser(net, schedule, "v")
        prediction = denoiser(x, t)
        ((seen, lam),) = net.calls
        assert seen is x
        assert (lam.shape, lam.dtype) == ((4,), dtype)
        want = schedule.lam(torch.as_tensor(t, dtype=torch.float64)).expand(4).to(dtype)
        torch.testing.assert_close(lam, want, rtol=1e-6, atol=1e-6)
        for reading in KINDS:
            value = getattr(prediction, reading)
            assert (value.shape, value.dtype) == (shape, dtype)
        each = [denoiser(x[i : i + 1], t if per_sample is not t else t[i : i + 1]).x0 for i in range(4)]
        torch.testing.assert_close(prediction.x0, torch.cat(each))


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_says_what_the_network_returns(kind, generator):
    x = torch.randn(4, 2, generator=generator)
    prediction = NetDenoiser(Recording(0.5), VP(), kind)(x, 0.4)
    assert torch.equal(getattr(prediction, kind), torch.full_like(x, 0.5))


def test_eps_is_the_default_kind():
    assert NetDenoiser(Recording(), VP()).kind == "eps"


def test_gradients_reach_the_network(generator):
    net = nn.Linear(2, 2)

    class Net(nn.Module):
        def forward(self, x, lam):
            return net(x)

    NetDenoiser(Net(), VP(), "v")(torch.randn(4, 2, generator=generator), 0.4).x0.sum().backward()
    assert float(net.weight.grad.abs().sum()) > 0


def test_one_batch_call_counts_one_and_a_guided_call_two(generator):
    x = torch.randn(7, 2, dtype=torch.float64, generator=generator)
    schedule = VP()
    plain = Counted(exact(asym3(), schedule))
    assert (plain.nfe, plain.schedule) == (0, schedule)
    for n in (1, 2, 3):
        torch.testing.assert_close(plain(x, 0.4).x0, exact(asym3(), schedule)(x, 0.4).x0)
        assert plain.nfe == n
    parts = Counted(exact(asym3(), schedule)), Counted(exact(asym3(), schedule))
    guided = Counted(Guided(*parts, 1.5))
    guided(x, 0.4)
    guided(x, torch.full((7,), 0.4))
    assert (guided.nfe, parts[0].nfe, parts[1].nfe) == (4, 2, 2)
    assert calls_per_evaluation(Counted(guided)) == 2
    nested = Counted(Guided(Guided(plain, plain, 0.5), plain, 2.0))
    nested(x, 0.4)
    assert nested.nfe == 3


@every
@pytest.mark.parametrize("kinds", [("eps", "v"), ("v", "x0"), ("score", "eps"), ("x0", "x0")])
def test_guidance_is_linear_in_its_weight_in_every_reading(schedule, kinds, generator):
    class Net(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x, lam):
            return torch.sin(self.factor * x)

    conditional, unconditional = (
        NetDenoiser(Net(f), schedule, k) for f, k in zip((1.0, -2.0), kinds, strict=True)
    )
    x = torch.randn(20, 2, dtype=torch.float64, generator=generator)
    t = torch.linspace(0.2, 0.8, 20, dtype=torch.float64)
    for reading in KINDS:
        c, u = (getattr(d(x, t), reading) for d in (conditional, unconditional))
        scale = c.abs().max() + u.abs().max()
        for weight in (0.0, 0.3, 1.0, 1.5, 7.0, -1.0):
            got = getattr(Guided(conditional, unconditional, weight)(x, t), reading)
            torch.testing.assert_close(got / scale, (u + weight * (c - u)) / scale, rtol=0, atol=1e-11)


def test_guidance_needs_one_schedule():
    law = asym3()
    with pytest.raises(ValueError, match=r"share one schedule; got VP.*Cosine"):
        Guided(exact(law, VP()), exact(law, Cosine()), 1.0)


@pytest.mark.cuda
def test_the_device_follows_the_state():
    x = torch.randn(4, 2, device="cuda")
    for t in (0.3, torch.tensor(0.3), torch.linspace(0.1, 0.9, 4), torch.linspace(0.1, 0.9, 4).cuda()):
        prediction = NetDenoiser(Recording(), VP(), "x0")(x, t)
        assert all(getattr(prediction, reading).device == x.device for reading in KINDS)
