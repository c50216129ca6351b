"""The U-Net and what every backbone shares: any size, feature levels, freezing, learning rates, checkpointing."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formula import assert_as_recorded, image, recorded
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.models.backbone import Conv3d, FeatureList, initialise, pad_to_multiple
from gvsl_zoo.models.unet import UNet, _may_fuse, has_triton, upsample
from gvsl_zoo.models.xmorpher import XMorpher

SIZES = [(37, 50, 61), (8, 8, 8), (5, 17, 3), (1, 1, 1), (37, 50), (8, 8), (5, 17), (1, 1)]


def unet(ndim=3, width=8, seed=0, **settings):
    return UNet(ndim, width, generator=torch.Generator().manual_seed(seed), **settings).eval()


def noise(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize(("case", "shape"), [("cube32", (32, 32, 32)), ("odd", (24, 40, 56))])
def test_features_are_those_of_the_released_code(released, case, shape):
    golden = recorded("official_unet_gvsl.npz", f"{case}/")
    with torch.no_grad():
        features = released.unet.forward_features(image(f"{case}/A", shape))
    assert_as_recorded(features.bottleneck, golden, "f_g", f"{case}f_g")
    assert_as_recorded(features.local, golden, "f_l", f"{case}f_l")


@pytest.mark.parametrize(("ndim", "count"), [(3, 23_538_144), (2, 7_851_936)])
def test_the_released_width_has_the_published_number_of_parameters(ndim, count):
    assert sum(p.numel() for p in UNet(ndim, device="meta").parameters()) == count


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_local_features_have_the_size_of_the_image(size):
    with torch.no_grad():
        assert unet(len(size))(noise(2, 1, *size)).shape == (2, 8, *size)


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("width", [8, 16, 32])
def test_every_level_has_the_channels_and_size_that_it_declares(ndim, width):
    model, size = unet(ndim, width), (11, 19, 23)[-ndim:]
    with torch.no_grad():
        maps = model.forward_intermediates(noise(1, 1, *size), range(len(model.levels)))
    for level, found in zip(model.levels, maps, strict=True):
        assert found.shape == (1, level.channels, *(math.ceil(s / level.reduction) for s in size)), level.module


def test_every_size_from_1_to_40_gives_ceiled_maps():
    model = unet(2)
    for size in range(1, 41):
        with torch.no_grad():
            maps = model.forward_intermediates(noise(1, 1, size, 16), range(9))
        assert [m.shape[2] for m in maps] == [math.ceil(size / level.reduction) for level in model.levels]


class BlockMeans(UNet):
    """Each of its maps holds the means of the image over the voxels that one of the map spans."""

    def _maps(self, x, last):
        return [F.avg_pool2d(x, level.reduction) for level in self.levels[: last + 1]]


def test_maps_of_every_size_lie_on_the_image_to_half_a_voxel_of_theirs():
    model = BlockMeans(2, 8, in_chans=2)
    for size in range(1, 65):
        x = torch.stack([torch.arange(size, dtype=torch.float32), torch.ones(size)])[None, :, :, None]
        for level, found in zip(model.feature_info, model.forward_intermediates(x.expand(-1, -1, -1, 16)), strict=True):
            place, inside = found[0, :, :, 0]
            expected = torch.arange(len(place)) * level.reduction + (level.reduction - 1) / 2
            assert ((place - expected).abs() <= level.reduction / 2)[inside == 1].all(), (size, level.module)


def test_the_default_levels_are_the_encoder_finest_first():
    model = unet(2)
    assert model.feature_info.channels() == [8, 16, 32, 64, 128]
    assert model.feature_info.reduction() == [1, 2, 4, 8, 16]
    assert model.feature_info.module_name() == ["inc", "down1", "down2", "down3", "down4"]
    assert model.num_features == 8
    assert [m.shape[1] for m in model.forward_intermediates(noise(1, 1, 16, 16))] == model.feature_info.channels()


def test_first_and_last_level_are_what_forward_features_returns():
    model, x = unet(), noise(1, 1, 21, 18, 9)
    with torch.no_grad():
        features, (bottleneck, local) = model.forward_features(x), model.forward_intermediates(x, (4, 8))
    assert torch.equal(bottleneck, features.bottleneck)
    assert torch.equal(local, features.local)
    assert torch.equal(local, model(x))


def test_levels_come_in_the_order_asked_for_and_negative_ones_count_from_the_bottleneck():
    model, x = unet(2), noise(1, 1, 32, 32)
    with torch.no_grad():
        first, again = model.forward_intermediates(x, (-1, 0)), model.forward_intermediates(x, (4, 0))
    assert [m.shape[1] for m in first] == [128, 8]
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("indices", [(9,), (-6,), ()])
def test_a_level_that_does_not_exist_is_refused(indices):
    with pytest.raises(ArgumentError, match=r"feature levels .* asked for, but this model has 9: 0 inc"):
        unet(2).forward_intermediates(noise(1, 1, 16, 16), indices)


@pytest.mark.parametrize("indices", [3, (2.5,), "34", (None,), torch.tensor([0.0])], ids=repr)
def test_levels_that_are_no_sequence_of_whole_numbers_are_refused(indices):
    with pytest.raises(ArgumentError, match=r"feature levels .*; give a sequence of whole numbers"):
        FeatureList(unet(2), indices)


@pytest.mark.parametrize("last", range(9))
def test_nothing_behind_the_last_level_asked_for_runs(last):
    model, ran = unet(2), []
    for level in model.levels:
        model.get_submodule(level.module).register_forward_hook(lambda *_, name=level.module: ran.append(name))
    model.forward_intermediates(noise(1, 1, 16, 16), (0, last))
    assert ran == [level.module for level in model.levels[: last + 1]]


def test_the_encoder_alone_gives_the_maps_of_the_whole():
    whole, encoder, x = unet(), unet(decoder=False, seed=7), noise(1, 1, 17, 20, 33)
    encoder.load_state_dict({k: v for k, v in whole.state_dict().items() if not k.startswith("up")})
    with torch.no_grad():
        assert all(map(torch.equal, whole.forward_intermediates(x), encoder.forward_intermediates(x)))


def test_a_feature_list_returns_the_maps_that_its_feature_info_describes():
    model, x = unet(2), noise(1, 1, 33, 16)
    features = FeatureList(model, (1, -1, 8))
    maps = features(x)
    assert [m.shape[1] for m in maps] == features.feature_info.channels() == [16, 128, 8]
    assert [m.shape[2] for m in maps] == [math.ceil(33 / r) for r in features.feature_info.reduction()]
    assert {id(p) for p in features.parameters()} == {id(p) for p in model.parameters()}


def test_a_feature_list_groups_the_parameters_that_get_a_gradient_and_the_last_of_its_levels_learns_fastest():
    features = FeatureList(unet(2), (2, 0))
    sum(found.square().mean() for found in features(noise(1, 1, 32, 32))).backward()
    groups = features.parameter_groups(1e-3, 0.5)
    assert [(group["name"], group["lr"]) for group in groups] == [
        ("inc", 1e-3 * 0.25),
        ("down1", 1e-3 * 0.5),
        ("down2", 1e-3),
    ]
    grouped = {id(p) for group in groups for p in group["params"]}
    assert grouped == {id(p) for p in features.parameters() if p.grad is not None}


def test_a_feature_list_is_frozen_and_checkpointed_as_its_backbone():
    features, runs = FeatureList(unet(2), (0, 3)), []
    features.freeze().train()
    assert not any(p.requires_grad for p in features.parameters()) and not features.backbone.training
    features.unfreeze().train()
    assert all(p.requires_grad for p in features.parameters()) and features.backbone.training
    features.backbone.down2.register_forward_pre_hook(lambda *_: runs.append(1))
    features.set_grad_checkpointing()
    features(noise(1, 1, 16, 16))[1].sum().backward()
    assert len(runs) == 2


@pytest.mark.parametrize("size", [(13, 16, 27), (18, 31)], ids=str)
def test_padding_is_zeros_the_smaller_half_in_front(size):
    model, x = unet(len(size)), noise(1, 1, *size)
    missing = [-s % 16 for s in size]
    by_hand = F.pad(x, [n for m in reversed(missing) for n in (m // 2, m - m // 2)])
    inside = (..., *(slice(m // 2, m // 2 + s) for m, s in zip(missing, size, strict=True)))
    with torch.no_grad():
        close(model(x), model(by_hand)[inside])
    padded, front = pad_to_multiple(x, 16)
    assert torch.equal(padded, by_hand)
    assert front == [m // 2 for m in missing]


@pytest.mark.parametrize("size", [(16, 20, 24), (40, 24)], ids=str)
def test_images_of_a_batch_do_not_see_each_other(size):
    model, x, order = unet(len(size)), noise(4, 1, *size), torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        close(model(x[order]), model(x)[order])
        close(model(x[:1]), model(x)[:1])


def test_evaluation_and_training_mode_agree():
    model, x = unet(2), noise(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.train()(x), model.eval()(x))


def test_a_frozen_backbone_stays_frozen_through_train_until_unfrozen():
    model = unet(2)
    parent = torch.nn.Sequential(model.freeze()).train()
    assert parent.training
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    model.unfreeze()
    parent.train()
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("ndim", [2, 3])
def test_parameter_groups_hold_every_parameter_once_and_learn_slower_towards_the_input(ndim):
    model = unet(ndim)
    groups = model.parameter_groups(1e-3, 0.5)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    assert [group["name"] for group in groups] == model.levels.module_name()
    assert [group["lr"] for group in groups] == [1e-3 * 0.5**k for k in range(8, -1, -1)]
    torch.optim.AdamW(groups)


def test_parameter_groups_leave_frozen_levels_out():
    model = unet(2)
    model.down1.requires_grad_(False)
    assert "down1" not in [group["name"] for group in model.parameter_groups(1e-3)]
    assert model.freeze().parameter_groups(1e-3) == []


def test_parameter_groups_up_to_a_level_are_those_of_the_encoder_that_ends_there():
    rates = [
        [(g["name"], g["lr"]) for g in groups]
        for groups in (unet(2).parameter_groups(1e-3, 0.5, last=4), unet(2, decoder=False).parameter_groups(1e-3, 0.5))
    ]
    assert rates[0] == rates[1]


@pytest.mark.parametrize(
    ("dtype", "mixed"), [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)], ids=str
)
def test_in_bf16_a_convolution_over_two_slices_has_the_gradient_of_float32(dtype, mixed):
    layer, x = Conv3d(8, 16, 3, padding=1), noise(2, 8, 2, 6, 5)
    initialise(layer, torch.Generator().manual_seed(0))
    [exact] = torch.autograd.grad(layer(x).square().mean(), layer.weight)
    layer.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        out = layer(x.to(dtype))
    [found] = torch.autograd.grad(out.float().square().mean(), layer.weight)
    assert out.dtype == found.dtype == dtype
    close(found.float(), exact, 0.02)


def test_checkpointing_changes_no_gradient():
    x, gradients = noise(1, 1, 16, 20, 24), []
    for enable in (False, True):
        model = unet()
        model.set_grad_checkpointing(enable)
        model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_checkpointing_runs_every_block_again_in_the_backward_pass():
    model, runs = unet(2), []
    model.down2.register_forward_pre_hook(lambda *_: runs.append(1))
    model.set_grad_checkpointing()
    model(noise(1, 1, 16, 16)).sum().backward()
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("ndim", "shape"),
    [(3, (1, 2, 16, 16, 16)), (3, (1, 1, 16, 16)), (3, (16, 16, 16)), (2, (1, 3, 16, 16))],
)
def test_wrong_axes_or_channels_are_refused(ndim, shape):
    with pytest.raises(ArgumentError, match=r"input has shape .*, but this model takes \(B, C, .*with C = 1"):
        unet(ndim)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 1, 0, 16), (0, 1, 16, 16)])
def test_an_empty_input_is_refused(shape):
    with pytest.raises(ArgumentError, match=r"an empty input of shape \(.*; give one image or more"):
        unet(2)(torch.zeros(shape))


@pytest.mark.parametrize("settings", [{"ndim": 1}, {"ndim": 4}, {"width": 4}, {"width": 12}, {"in_chans": 0}])
def test_a_unet_that_cannot_be_built_is_refused(settings):
    with pytest.raises(ArgumentError, match=r"no U-Net with .*width a multiple of 8"):
        UNet(**settings)


@pytest.mark.parametrize("settings", [{"ndim": 3.0}, {"width": 8.0}, {"in_chans": "1"}, {"in_chans": None}], ids=str)
@pytest.mark.parametrize("kind", [UNet, XMorpher])
def test_numbers_that_are_not_whole_are_refused(kind, settings):
    [(name, value)] = settings.items()
    with pytest.raises(ArgumentError, match=re.escape(f"{name}={value!r}; give a whole number")):
        kind(**settings)


def test_whole_numbers_of_numpy_s_are_taken_as_plain_ones():
    model = UNet(np.int64(2), np.int64(8), np.int64(1))
    assert [type(number) for number in (model.ndim, model.width, model.in_chans)] == [int] * 3


def test_several_channels_are_taken():
    assert unet(2, in_chans=3)(noise(1, 3, 20, 20)).shape == (1, 8, 20, 20)


def test_a_seed_decides_all_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, same, other = (unet(2, seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["inc.double_conv.0.weight"], other["inc.double_conv.0.weight"])


def test_convolutions_start_kaiming_normal():
    for name, parameter in unet().named_parameters():
        if parameter.ndim == 5 and parameter.numel() > 10_000:
            sigma = math.sqrt(2 / parameter[0].numel())
            assert parameter.std().item() == pytest.approx(sigma, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * sigma, name


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_to_machine_code_is_the_same_on_an_odd_size():
    model, x = unet(2), noise(1, 1, 37, 50)
    torch.compiler.reset()
    with torch.no_grad():
        close(torch.compile(model)(x), model(x), 1e-4)


@pytest.mark.slow
def test_compiled_takes_a_second_odd_size():
    model = unet()
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")  # the graph alone, without a C++ compiler
    for size in ((13, 16, 27), (20, 17, 16)):
        x = noise(1, 1, *size)
        with torch.no_grad():
            close(compiled(x), model(x))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(13, 16, 27), (37, 50)], ids=str)
def test_exported_is_the_same_on_odd_sizes(size):
    model, x = unet(len(size)), noise(1, 1, *size)
    with torch.no_grad():
        close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.gpu
def test_the_device_is_that_of_the_tensor():
    model, x = unet(), noise(1, 1, 21, 32, 19)
    with torch.no_grad():
        close(model.cuda()(x.cuda()).cpu(), model.cpu()(x), 1e-2)  # convolutions may run in TF32


@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 6), (1, 2, 1, 2, 3)])
def test_upsampling_has_the_gradient_of_its_values_forward_backward_and_twice(shape, generator):
    x = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(upsample, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(upsample, x, fast_mode=True)


def test_gradients_of_each_image_come_at_once():
    model, x = unet(), noise(2, 1, 16, 9, 12)
    parameters = dict(model.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, x[None]).square().mean()

    together = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for n in range(2):
        alone = torch.autograd.grad(model(x[n : n + 1]).square().mean(), list(parameters.values()))
        for name, gradient in zip(parameters, alone, strict=True):
            close(together[name][n], gradient, 1e-4)


@pytest.mark.parametrize("ndim, mode", [(2, "bilinear"), (3, "trilinear")])
def test_upsampling_is_pytorch_s_with_the_corners_of_the_released_models(ndim, mode, generator):
    x = torch.randn(2, 8, *(5, 6, 7)[:ndim], generator=generator)
    expected = F.interpolate(x, scale_factor=2, mode=mode, align_corners=ndim == 3)
    assert torch.equal(upsample(x), expected)
    assert torch.equal(upsample(x.requires_grad_()), expected)


def test_where_no_kernel_can_be_compiled_the_layers_of_pytorch_run(monkeypatch):
    monkeypatch.setattr("gvsl_zoo.models.unet.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "gvsl_zoo.models.fused", SimpleNamespace(norm_leaky=no_compiler))
    with pytest.warns(UserWarning, match=r"Triton does not work here, PyTorch's own kernels are used: "):
        assert not has_triton.__wrapped__()


def no_compiler(*_):
    raise RuntimeError("Failed to find C compiler")


def test_norm_and_activation_are_one_only_where_nobody_would_see_it(monkeypatch):
    monkeypatch.setattr("gvsl_zoo.models.unet.has_triton", lambda: True)
    on_a_gpu = SimpleNamespace(is_cuda=True, ndim=5, dtype=torch.float32, shape=(1, 8, 2, 2, 2))
    layers = torch.nn.GroupNorm(1, 8), torch.nn.LeakyReLU(0.2)
    assert _may_fuse(*layers, on_a_gpu)
    with forward_ad.dual_level():
        assert not _may_fuse(*layers, on_a_gpu)
    with FakeTensorMode():  # tensors without memory
        assert not _may_fuse(*layers, on_a_gpu)
    layers[1].register_forward_hook(lambda *_: None)
    assert not _may_fuse(*layers, on_a_gpu)
