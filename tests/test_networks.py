import pytest
import torch

from diffedu.networks import LAM_LIMIT, MLP, FourierEmbedding
from diffedu.schedules import VE, VP


def test_the_embedding_is_sines_and_cosines_of_lam():
    lam = torch.linspace(-10, 10, 201, dtype=torch.float64)
    features = FourierEmbedding(32).double()(lam)
    assert features.shape == (201, 32)
    sines, cosines = features[:, :16], features[:, 16:]
    torch.testing.assert_close(sines**2 + cosines**2, torch.ones(201, 16, dtype=torch.float64))
    # the slowest wave has the length 8 times 20, the fastest 2: measured by their phases
    turn = torch.atan2(sines, cosines)[100 + 1] / 0.1  # from lam = 0 to 0.1
    assert float(2 * torch.pi / turn[0]) == pytest.approx(160, rel=1e-5)
    assert float(2 * torch.pi / turn[-1]) == pytest.approx(2, rel=1e-5)
    ratios = turn[1:] / turn[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(15), rtol=1e-5, atol=0)


def test_the_embedding_tells_every_noise_level_from_every_other():
    for schedule in (VP(), VE()):
        lam = schedule.lam(torch.linspace(1e-3, 1, 300))
        features = FourierEmbedding(32)(lam)
        gaps = torch.cdist(features, features) + 10 * torch.eye(300)
        assert float(gaps.min()) > 1e-3


def test_lam_is_clipped():
    embed = FourierEmbedding(8)
    ends = torch.tensor([LAM_LIMIT, 30.0, torch.inf, -LAM_LIMIT, -30.0, -torch.inf])
    features = embed(ends)
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0], features[2])
    assert torch.equal(features[3], features[5])
    assert not torch.equal(features[0], features[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mlp_maps_x_and_lam_to_the_shape_of_x(dtype, generator):
    net = MLP(dim=3, width=16, depth=2, embedding=8).to(dtype)
    x = torch.randn(5, 3, generator=generator).to(dtype)
    lam = torch.linspace(-5, 5, 5, dtype=dtype)
    y = net(x, lam)
    assert (y.shape, y.dtype) == ((5, 3), dtype)
    # each row on its own, and both inputs matter
    torch.testing.assert_close(net(x[2:3], lam[2:3]), y[2:3])
    assert not torch.allclose(net(x, lam + 1), y)
    assert not torch.allclose(net(x + 1, lam), y)


def test_the_mlp_has_the_size_that_was_asked_for():
    shapes = [tuple(p.shape) for p in MLP(dim=2, width=7, depth=3, embedding=4).parameters()]
    assert shapes == [(7, 6), (7,), (7, 7), (7,), (7, 7), (7,), (2, 7), (2,)]
    assert "embed.frequencies" not in MLP().state_dict()


def test_the_seed_decides_the_weights():
    nets = []
    with torch.random.fork_rng():
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            nets.append(MLP(width=8, depth=1, embedding=4))
    first, same, other = ([p.detach() for p in net.parameters()] for net in nets)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
