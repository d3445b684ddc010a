import pytest
import torch

from diffedu.networks import LAM_LIMIT, MLP, FourierEmbedding, ResidualBlock, UNet
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


def unet(**sizes):
    """A small U-Net whose blocks all do something."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = UNet(widths=(8, 16), condition=8, **sizes)
        for module in net.modules():
            if isinstance(module, ResidualBlock):
                torch.nn.init.normal_(module.conv2.weight, std=0.1)
    return net


def test_a_unet_keeps_the_shape_of_its_images(generator):
    for size, channels in (((28, 28), 1), ((8, 12), 3)):
        x = torch.randn(2, channels, *size, generator=generator)
        assert unet(channels=channels)(x, torch.zeros(2)).shape == x.shape


def test_without_labels_the_class_is_unknown(generator):
    net, x, lam = unet(classes=4), torch.randn(3, 1, 8, 8, generator=generator), torch.zeros(3)
    unknown = net(x, lam)
    torch.testing.assert_close(net(x, lam, torch.full((3,), 4)), unknown, rtol=0, atol=1e-4)
    for label in range(4):
        assert float((net(x, lam, torch.full((3,), label)) - unknown).detach().abs().max()) > 1e-3


def test_a_unet_treats_each_image_by_itself(generator):
    net, x, lam = unet(), torch.randn(4, 1, 28, 28, generator=generator), torch.linspace(-3, 3, 4)
    labels = torch.tensor([1, 2, 3, 10])
    whole = net(x, lam, labels)
    for i in range(4):
        one = net(x[i : i + 1], lam[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(one, whole[i : i + 1], rtol=0, atol=1e-4)


def test_a_change_of_the_noise_level_or_of_any_pixel_changes_the_output(generator):
    net, x = unet(), torch.randn(1, 1, 12, 12, generator=generator).requires_grad_()
    lam = torch.zeros(1, requires_grad=True)
    output = net(x, lam)
    slopes = torch.autograd.grad(output.square().sum(), [x, lam])
    assert float(slopes[0].abs().min()) > 0
    assert float(slopes[1].abs()) > 1e-4


def test_a_residual_block_starts_as_the_identity_plus_a_constant_for_each_channel(generator):
    with torch.random.fork_rng():
        block = ResidualBlock(8, 4)
    x, condition = torch.randn(2, 8, 5, 5, generator=generator), torch.randn(2, 4, generator=generator)
    want = block.conv2.bias[:, None, None].expand(2, 8, 5, 5)
    torch.testing.assert_close(block(x, condition) - x, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(30, 28), (28, 26), (27, 28)])
def test_sides_that_do_not_halve_twice_are_refused(size):
    with pytest.raises(ValueError, match=r"H and W multiples of 4; got \(2, 1, "):
        unet()(torch.zeros(2, 1, *size), torch.zeros(2))


def test_the_network_of_the_digits_has_about_two_million_weights():
    count = sum(p.numel() for p in UNet().parameters())
    # the convolutions: stem, 4 at 64, down, 10 at 128, up, head; the rest is little
    convolutions = 4 * 64 + 4 * 9 * 64**2 + 9 * 64 * 128 + 10 * 9 * 128**2 + 128 * 64 + 9 * 64 * 4
    assert 1.9e6 < count < 2.0e6
    assert convolutions < count < 1.15 * convolutions
