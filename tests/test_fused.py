"""What CUDA computes in ways of its own, against the definitions: the fused norm, convolutions, the upsampling."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gvsl_zoo.models.backbone import CHANNELS_LAST, Conv2d, Conv3d
from gvsl_zoo.models.unet import Layers, UNet, upsample
from gvsl_zoo.models.xmorpher import XMorpher

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
EXACT, HALF = 1e-5, 2e-2  # relative to the largest value
SHAPES = [
    ((2, 16, 5, 6, 7), 2),
    ((1, 24, 9, 8, 3), 3),  # channels that are no power of two
    ((3, 512, 3, 3, 3), 64),
    ((2, 8, 33, 20), 2),  # 2D, two groups of four
    ((2, 8, 1, 1, 1), 1),
    ((1, 32, 70, 66, 64), 4),  # more than one part of a sum
]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(CUDA, dtype)


def near(found, expected, tolerance):
    assert (found.double() - expected.double()).abs().max() <= tolerance * expected.double().abs().max()


def layers(channels, groups):
    made = Layers(nn.GroupNorm(groups, channels), nn.LeakyReLU(0.2, inplace=True)).to(CUDA)
    with torch.no_grad():
        made[0].weight.copy_(random(channels, seed=1))
        made[0].bias.copy_(random(channels, seed=2))
    return made


def plain(made, x):
    """The definition, in float64."""
    norm = made[0]
    weight, bias = (p.detach().double().requires_grad_() for p in norm.parameters())
    x = x.detach().double().requires_grad_()
    return F.leaky_relu(F.group_norm(x, norm.num_groups, weight, bias, norm.eps), 0.2), (x, weight, bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_a_norm_with_its_activation_has_the_values_and_gradients_of_the_two(shape, groups, channels_last, dtype):
    made = layers(shape[1], groups)
    x = (3 + 2 * random(*shape)).to(dtype)
    x = (x.contiguous(memory_format=CHANNELS_LAST[x.ndim]) if channels_last else x).requires_grad_()
    grad = random(*shape, seed=3, dtype=dtype)
    y = made(x)
    slopes = torch.autograd.grad(y, (x, *made[0].parameters()), grad)
    expected, of = plain(made, x)
    tolerance = EXACT if dtype == torch.float32 else HALF
    assert y.dtype == dtype and y.is_contiguous(memory_format=CHANNELS_LAST[x.ndim])
    near(y, expected, tolerance)
    for found, wanted in zip(slopes, torch.autograd.grad(expected, of, grad.double()), strict=True):
        near(found, wanted, tolerance)


def test_a_large_mean_does_not_spoil_the_variance():
    made, x = layers(16, 2), 1000 + random(1, 16, 40, 40, 40)
    near(made(x), plain(made, x)[0], 1e-3)  # 1000 +- 1 has 13 bits left


def test_a_second_derivative_is_that_of_the_two():
    made, x = layers(8, 1), random(1, 8, 4, 4, 4).requires_grad_()
    expected, (x64, *_) = plain(made, x)
    seconds = []
    for y, leaf in ((made(x), x), (expected, x64)):
        [slope] = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        seconds += torch.autograd.grad(slope.square().sum(), leaf)
    near(*seconds, EXACT)


def test_a_hook_and_a_transform_still_see_both_layers():
    made, x = layers(8, 1), random(2, 8, 4, 4, 4)
    seen = []
    handle = made[0].register_forward_hook(lambda _layer, _args, out: seen.append(out.clone()))
    hooked = made(x)
    handle.remove()
    near(F.leaky_relu(seen[0], 0.2), hooked, EXACT)
    near(made(x), hooked, EXACT)
    near(torch.func.vmap(made)(x[:, None])[:, 0], hooked, EXACT)
    tangent = torch.func.jvp(made, (x,), (torch.ones_like(x),))[1]
    assert tangent.isfinite().all()


@pytest.mark.parametrize("kind", [Conv2d, Conv3d])
@pytest.mark.parametrize(("channels", "kernel"), [((1, 16), 3), ((16, 1), 1), ((8, 5), 1)])
def test_a_convolution_in_bf16_has_the_gradients_of_its_definition(kind, channels, kernel):
    conv = kind(*channels, kernel, padding=kernel // 2).to(CUDA)
    with torch.no_grad():
        conv.weight.copy_(random(*conv.weight.shape, seed=1))
        conv.bias.copy_(random(channels[1], seed=2))
    shape = [20] * (conv.weight.ndim - 2)
    x = random(2, channels[0], *shape).requires_grad_()
    grad = random(2, channels[1], *shape, seed=3, dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        y = conv(x)
    slopes = torch.autograd.grad(y, (x, *conv.parameters()), grad)
    of = [t.detach().double().requires_grad_() for t in (x, *conv.parameters())]
    convolve = F.conv3d if kind is Conv3d else F.conv2d
    expected = convolve(*of, padding=kernel // 2)
    assert y.dtype == torch.bfloat16
    near(y, expected, HALF)
    for found, wanted in zip(slopes, torch.autograd.grad(expected, of, grad.double()), strict=True):
        near(found, wanted, HALF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_upsampling_has_the_values_and_the_gradient_of_pytorchs(dtype):
    x = random(2, 8, 5, 6, 7, dtype=dtype).requires_grad_()
    grad = random(2, 8, 10, 12, 14, seed=1, dtype=dtype)
    y = upsample(x)
    [slope] = torch.autograd.grad(y, x, grad)
    leaf = x.detach().double().requires_grad_()
    expected = F.interpolate(leaf, scale_factor=2, mode="trilinear", align_corners=True)
    tolerance = EXACT if dtype == torch.float32 else HALF
    assert y.dtype == dtype
    near(y, expected, tolerance)
    near(slope, torch.autograd.grad(expected, leaf, grad.double())[0], tolerance)


@pytest.mark.parametrize("kind", [partial(UNet, width=8), partial(XMorpher, width=16)], ids=["unet", "xmorpher"])
def test_a_whole_network_under_autocast_has_the_gradients_of_float64(kind):
    net, exact = (kind(generator=torch.Generator().manual_seed(0)).to(CUDA).eval() for _ in range(2))
    net.to(memory_format=torch.channels_last_3d)
    x = random(1, 1, 48, 48, 48)  # of tokens there are two along an axis of the coarsest stage
    with torch.autocast("cuda", torch.bfloat16):
        loss = net(x).float().square().mean()
    loss.backward()
    exact.double()(x.double()).square().mean().backward()
    for (name, p), q in zip(net.named_parameters(), exact.parameters(), strict=True):
        if p.ndim > 1:
            cosine = F.cosine_similarity(p.grad.double().flatten(), q.grad.flatten(), dim=0)
            assert cosine > 0.9, name
