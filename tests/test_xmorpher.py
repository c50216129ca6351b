"""XMorpher: what its attention is by definition, agreement with the released network, and its life as a backbone."""

from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from functools import partial

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from formula import DATA, assert_as_recorded, image, recorded, weight
from torch import nn

from gvsl_zoo import Volume, features, load, model_info, pooled_features, register, save_pretrained, segment
from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.integrations.onnx import export_onnx
from gvsl_zoo.models import xmorpher as room
from gvsl_zoo.models.backbone import FeatureList
from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.models.xmorpher import (
    CrossAttention,
    ReleasedXMorpher,
    XMorpher,
    attend,
    expand,
    from_windows,
    gathered,
    merge,
    neighbours,
    to_windows,
)
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.pretrain.config import PRESETS, PretrainConfig, settings_of
from gvsl_zoo.pretrain.data import Pairs
from gvsl_zoo.pretrain.objective import Batch, Pretraining, make_batch
from gvsl_zoo.zoo import build

CPU = torch.device("cpu")
SIZES = [(8, 8, 8), (9, 8, 11), (13, 16, 27), (33, 8, 50), (8, 8), (9, 17), (37, 50), (1, 5)]
PARTS = {  # parameters of the modules at the released width, 3D and 2D, from the released code
    "patch_embed": (3_120, 816),
    "layers.0": (93_696, 75_264),
    "layers.1": (371_712, 297_984),
    "layers.2": (3_260_160, 2_965_248),
    "layers.3": (3_548_928, 3_548_928),
    "norm": (768, 768),
    "up_layers.0": (4_139_328, 3_844_416),
    "up_layers.1": (2_816_928, 2_743_200),
    "up_layers.2": (260_688, 242_256),
    "up_layers.3": (56_544, 56_544),
    "concat_back_dim.1": (73_920, 73_920),
    "concat_back_dim.2": (18_528, 18_528),
    "concat_back_dim.3": (4_656, 4_656),
    "local": (98_432, 24_704),
}


def seed(number):
    return torch.Generator().manual_seed(number)


def xmorpher(ndim=3, width=16, **settings):
    return XMorpher(ndim, width, generator=seed(0), **settings).eval()


def noise(*shape, number=1):
    return torch.rand(shape, generator=seed(number))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())


def attention(width=32, released=False):
    made = CrossAttention(width, released, None)
    for name, parameter in made.named_parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=seed(len(name))) / math.sqrt(parameter.shape[-1]))
    return made


# --- Windows and attention, by definition ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "window"), [((6, 4, 8), (2, 2, 2)), ((5, 7, 3), (2, 2, 2)), ((5, 1, 9), (2, 1, 4)), ((10, 13), (4, 4))]
)
def test_windows_hold_every_token_once_and_zeros_beyond(shape, window):
    x = noise(2, *shape, 3) + 1
    windows = to_windows(x, window)
    count = math.prod(-(-n // w) for n, w in zip(shape, window, strict=True))
    assert windows.shape == (2, count, math.prod(window), 3)
    assert torch.equal(from_windows(windows, window, shape), x)
    assert (windows != 0).sum() == x.numel()
    place = torch.cartesian_prod(*map(torch.arange, shape)) // torch.tensor(window) + 1
    for own in to_windows(place.view(1, *shape, -1), window)[0]:
        assert len(own[own.all(1)].unique(dim=0)) == 1


CASES = [
    ((6, 4, 8), 2, False),
    ((5, 7, 3), 2, False),
    ((6, 5, 4), 2, True),
    ((1, 3, 9), 4, True),
    ((10, 13), 4, False),
    ((9, 2), 2, True),
]


@pytest.mark.parametrize(("shape", "size", "cross"), CASES, ids=str)
def test_a_token_attends_to_all_tokens_of_the_windows_around_its_own(shape, size, cross):
    """By definition: attention over all tokens of an image, masked to windows at most 1 apart along every axis."""
    made, C, window = attention(), 32, [min(size, n) for n in shape]
    x, y = noise(4, *shape, C), noise(4, *shape, C, number=2)
    near = neighbours(4, shape, window, cross, CPU)
    with torch.no_grad():
        found = made(to_windows(x, window), to_windows(y, window), near)
        q, (k, v) = made.q(x), made.kv(y).chunk(2, -1)
        own = torch.cartesian_prod(*map(torch.arange, shape)) // torch.tensor(window)  # window of each token
        mask = ((own[:, None] - own[None]).abs() <= 1).all(-1)
        q, k, v = (t.reshape(4, -1, 2, 16).transpose(1, 2) for t in (q, k, v))
        if cross:
            k, v = (t.roll(2, 0) for t in (k, v))
        dense = made.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(4, *shape, C))
    close(from_windows(found, window, shape), dense)


def test_the_mask_changes_nothing_in_the_interior_but_at_the_border():
    shape, window = (10, 12), (2, 2)
    near, x = neighbours(1, shape, window, False, CPU), noise(1, 30, 4, 32)
    with torch.no_grad():
        masked, zeros = attention()(x, x, near), attention(released=True)(x, x, near)
    interior = near.inside.all(1)
    assert interior.sum() == 3 * 4
    close(masked[0, interior], zeros[0, interior])
    assert ((masked - zeros)[0, ~interior].abs().amax((1, 2)) > 1e-4).all()


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_block_moves_with_its_input_by_whole_windows_in_the_interior(ndim):
    block, shape, window = xmorpher(ndim).layers[0].blocks[1], (12, 10, 14)[:ndim], (2,) * ndim
    x = noise(1, *(n + 2 for n in shape), 16)

    def run(x):
        with torch.no_grad():
            out = block(to_windows(x, window), neighbours(1, shape, window, False, CPU))
        return from_windows(out, window, shape)

    here = run(x[(slice(None), *(slice(0, n) for n in shape))])
    there = run(x[(slice(None), *(slice(2, n + 2) for n in shape))])
    inner, moved = (slice(None), *[slice(4, -2)] * ndim), (slice(None), *[slice(2, -4)] * ndim)
    close(here[inner], there[moved])
    by_one = run(x[(slice(None), *(slice(1, n + 1) for n in shape))])
    off = (slice(None), *[slice(3, -3)] * ndim)
    assert (here[inner] - by_one[off]).abs().max() > 1e-4  # windows have places


@pytest.mark.parametrize("numbers", [1, 10_000, 2**20])
def test_attention_does_not_depend_on_how_much_is_gathered_at_once(monkeypatch, numbers):
    made, near, x = attention(), neighbours(2, (9, 7), (2, 2), False, CPU), noise(2, 20, 4, 32)
    q, k, v = (t.flatten(0, 1) for t in (made.q(x), *made.kv(x).chunk(2, -1)))
    plain = made.proj(attend(q, gathered(k, near.windows), gathered(v, near.windows), near.mask))
    expected = torch.autograd.grad(plain.square().sum(), made.parameters())
    monkeypatch.setattr(room, "GATHERED", numbers)
    found = made(x, x, near)
    close(found, plain.view_as(found))
    gradients = torch.autograd.grad(found.square().sum(), made.parameters())
    for ours, theirs in zip(gradients, expected, strict=True):
        close(ours, theirs)


def test_the_gradient_of_attention_is_that_of_its_values():
    near = neighbours(2, (3, 4), (2, 2), True, CPU)
    q, k, v = (torch.randn(8, 4, 16, generator=seed(n), dtype=torch.float64, requires_grad=True) for n in range(3))
    assert torch.autograd.gradcheck(room._WindowAttention.apply, (q, k, v, near.windows, near.mask), fast_mode=True)


@pytest.mark.parametrize("ndim", [2, 3])
def test_products_of_matrices_are_the_convolutions_between_the_stages(ndim):
    model, x = xmorpher(ndim), noise(2, *(8, 6, 10)[:ndim], 16)
    by_conv = model.layers[0].downsample.down_conv(x.movedim(-1, 1)).movedim(1, -1)
    close(merge(model.layers[0].downsample.down_conv, x), by_conv)
    by_conv = model.local.conv(x.movedim(-1, 1)).movedim(1, -1)
    close(expand(model.local.conv, x), by_conv)


# --- The released network -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released():
    """The released registration network with formula weights, halved where they have two axes or more."""
    model = ReleasedXMorpher(device="meta").to_empty(device="cpu").eval()
    official = json.loads((DATA / "xmorpher_state_dict.json").read_text())
    state = {name: weight(name, shape) * (0.5 if len(shape) > 1 else 1.0) for name, shape in official.items()}
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(("case", "shape"), [("cube48", (48, 48, 48)), ("odd", (40, 52, 36))])
def test_the_released_network_says_what_it_said(released, case, shape):
    golden = recorded("official_xmorpher.npz", f"{case}/")
    with torch.no_grad():
        joint, flow = released(image(f"{case}/A", shape), image(f"{case}/B", shape))
    assert_as_recorded(joint, golden, "joint", f"{case}joint", 1e-5)
    assert_as_recorded(flow, golden, "flow", f"{case}flow", 1e-5)


def test_each_fault_of_the_released_code_matters_and_is_gone_by_default(released):
    faulty, correct = released.swin, XMorpher(device="meta").to_empty(device="cpu").eval()
    shared = {name: t for name, t in faulty.state_dict().items() if name in correct.state_dict()}
    correct.load_state_dict(shared, strict=False)
    x = image("cube48/A", (48, 48, 48))
    with torch.no_grad():
        ours, theirs = (model.forward_intermediates(x, (0,))[0] for model in (correct, faulty))
    assert (ours - theirs).abs().max() > 0.1 * theirs.abs().max()


def test_the_released_network_has_its_tensors_and_parameters():
    state = ReleasedXMorpher(device="meta").state_dict()
    official = json.loads((DATA / "xmorpher_state_dict.json").read_text())
    assert {name: list(tensor.shape) for name, tensor in state.items()} == official and len(official) == 378
    assert sum(tensor.numel() for tensor in state.values()) == 15_093_891


@pytest.mark.parametrize(("ndim", "total"), [(3, 14_747_408), (2, 13_897_232)])
def test_the_released_width_has_the_published_numbers_of_parameters(ndim, total):
    model = XMorpher(ndim, device="meta")
    found = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in PARTS}
    assert found == {name: numbers[3 - ndim] for name, numbers in PARTS.items()}
    assert sum(p.numel() for p in model.parameters()) == sum(found.values()) == total


# --- One image and two ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_local_features_have_the_size_of_the_image(size):
    with torch.no_grad():
        found = xmorpher(len(size)).forward_features(noise(2, 1, *size))
    assert found.local.shape == (2, 8, *size) and found.local.isfinite().all()
    assert found.bottleneck.shape == (2, 128, *(math.ceil(n / 32) for n in size))


@pytest.mark.parametrize("ndim", [2, 3])
def test_every_size_from_8_to_40_gives_ceiled_maps(ndim):
    model = xmorpher(ndim)
    for size in range(8, 41, 1 if ndim == 2 else 5):
        with torch.no_grad():
            maps = model.forward_intermediates(noise(1, 1, size, *[8] * (ndim - 1)), range(9))
        for level, found in zip(model.levels, maps, strict=True):
            expected = [math.ceil(n / level.reduction) for n in (size, *[8] * (ndim - 1))]
            assert found.shape == (1, level.channels, *expected), level.module


@pytest.mark.parametrize("size", [(13, 16, 27), (37, 50)], ids=str)
def test_an_image_paired_with_itself_is_seen_as_if_it_were_alone(size):
    model, x = xmorpher(len(size)), noise(2, 1, *size)
    with torch.no_grad():
        alone, pair = model.forward_features(x), model.forward_pair(x, x)
    for features_ in pair:
        close(features_.bottleneck, alone.bottleneck)
        close(features_.local, alone.local)


@pytest.mark.parametrize("size", [(13, 16, 27), (37, 50)], ids=str)
def test_swapping_a_pair_swaps_what_is_seen_and_a_partner_changes_it(size):
    model, a, b = xmorpher(len(size)), noise(2, 1, *size), noise(2, 1, *size, number=2)
    with torch.no_grad():
        (first, second), (again_second, again_first), alone = (
            model.forward_pair(a, b),
            model.forward_pair(b, a),
            model.forward_features(a),
        )
    close(again_first.local, first.local)
    close(again_second.local, second.local)
    close(again_first.bottleneck, first.bottleneck)
    assert (first.local - alone.local).abs().max() > 0.01 * alone.local.abs().max()


@pytest.mark.parametrize("size", [(16, 20, 9), (40, 24)], ids=str)
def test_images_of_a_batch_do_not_see_each_other(size):
    model, x, y = xmorpher(len(size)), noise(4, 1, *size), noise(4, 1, *size, number=2)
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        close(model(x[order]), model(x)[order])
        close(model(x[:1]), model(x)[:1])
        pairs, turned = model.forward_pair(x, y), model.forward_pair(x[order], y[order])
        close(turned[0].local, pairs[0].local[order])
        close(turned[1].local, pairs[1].local[order])


def test_a_pair_on_two_grids_is_refused_and_a_unet_sees_one_image_at_a_time():
    with pytest.raises(ArgumentError, match=r"a pair of images of shape .*; bring both to one grid"):
        xmorpher(2).forward_pair(noise(1, 1, 16, 16), noise(1, 1, 16, 8))
    with pytest.raises(ArgumentError, match="a UNet sees one image at a time; take an XMorpher"):
        UNet(2, 8).forward_pair(noise(1, 1, 16, 16), noise(1, 1, 16, 16))


def test_padding_is_zeros_at_the_far_end():
    model, x = xmorpher(2), noise(1, 1, 13, 18)
    with torch.no_grad():
        close(model(x), model(F.pad(x, (0, 2, 0, 3)))[..., :13, :18])


# --- A backbone as every other ----------------------------------------------------------------------------------------


def test_the_default_levels_are_the_encoder_finest_first():
    model = xmorpher(2, 48)
    assert model.feature_info.channels() == [48, 96, 192, 384]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    assert model.feature_info.module_name() == [f"layers.{i}" for i in range(4)]
    assert model.num_features == 32
    assert [xmorpher(2, width).num_features for width in (16, 32, 64)] == [8, 16, 40]


def test_first_and_last_level_are_what_forward_features_returns():
    model, x = xmorpher(), noise(1, 1, 21, 18, 9)
    with torch.no_grad():
        both, (bottleneck, local) = model.forward_features(x), model.forward_intermediates(x, (-1, 8))
        assert torch.equal(local, model(x))
    assert torch.equal(bottleneck, both.bottleneck)
    assert torch.equal(local, both.local)


@pytest.mark.parametrize("last", range(9))
def test_nothing_behind_the_last_level_asked_for_runs(last):
    model, ran = xmorpher(2), []
    for level in model.levels:
        model.get_submodule(level.module).register_forward_hook(lambda *_, name=level.module: ran.append(name))
    model.forward_intermediates(noise(1, 1, 16, 16), (0, last))
    assert ran == [level.module for level in model.levels[: last + 1]]


def test_the_encoder_alone_gives_the_maps_of_the_whole():
    whole, encoder, x = xmorpher(), XMorpher(3, 16, decoder=False).eval(), noise(1, 1, 17, 20, 33)
    encoder.load_state_dict({name: whole.state_dict()[name] for name in encoder.state_dict()})
    assert not any(name.startswith(("up_layers", "concat_back_dim", "local")) for name in encoder.state_dict())
    with torch.no_grad():
        maps = FeatureList(encoder)(x)
        assert all(map(torch.equal, whole.forward_intermediates(x), maps))
    with pytest.raises(ArgumentError, match="without its decoder; use forward_intermediates"):
        encoder.forward_pair(x, x)


@pytest.mark.parametrize("ndim", [2, 3])
def test_parameter_groups_hold_every_parameter_once_and_learn_slower_towards_the_input(ndim):
    model = xmorpher(ndim)
    groups = model.parameter_groups(1e-3, 0.5)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(map(id, model.parameters()))
    assert [group["name"] for group in groups] == model.levels.module_name()
    assert [group["lr"] for group in groups] == [1e-3 * 0.5**k for k in range(8, -1, -1)]


@pytest.mark.parametrize("last", range(9))
def test_parameter_groups_up_to_a_level_hold_what_gets_a_gradient_from_it(last):
    features = FeatureList(xmorpher(2), (last,))
    features(noise(1, 1, 64, 64))[0].square().sum().backward()
    grouped = {id(p) for group in features.parameter_groups(1e-3) for p in group["params"]}
    assert grouped == {id(p) for p in features.parameters() if p.grad is not None}


@pytest.mark.parametrize("cross", [False, True])
def test_checkpointing_changes_no_gradient_whatever_paths_are_dropped(cross):
    x, gradients = noise(2, 1, 16, 20, 24), []
    for enable in (False, True):
        model = xmorpher().train()
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        found = model.forward_pair(*x.split(1))[0].local if cross else model(x)
        found.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_paths_are_dropped_in_training_alone_by_the_global_generator():
    model, x = xmorpher(2), noise(4, 1, 32, 32)
    rates = [block.drop_path for stage in model.layers for block in stage.blocks]
    assert rates == pytest.approx(np.linspace(0, 0.2, 12).tolist())
    for ours, twin in zip(model.up_layers, reversed(model.layers), strict=True):
        assert [b.drop_path for b in ours.blocks] == [b.drop_path for b in twin.blocks]
    with torch.no_grad():
        still = model(x)
        model.train()
        torch.manual_seed(0)
        first, second = model(x), model(x)
        torch.manual_seed(0)
        assert torch.equal(model(x), first) and not torch.equal(first, second) and not torch.equal(first, still)
        assert torch.equal(model.eval()(x), still)


def test_a_dropped_path_leaves_an_image_its_short_cut_and_the_mean_as_it_is():
    block = xmorpher(2).layers[3].blocks[1].train()
    block.drop_path = 0.5
    torch.manual_seed(0)
    kept = block._kept(torch.ones(4000, 3, 2))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    assert (kept.flatten(1).std(1) == 0).all() and kept.mean().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(("size", "cross"), [((32, 24, 40), False), ((32, 24, 40), True), ((48, 40), True)], ids=str)
def test_autocast_in_bf16_is_near_float32(size, cross):
    model, x = xmorpher(len(size), 48), noise(2, 1, *size)
    run = (lambda: model.forward_pair(*x.split(1))[0]) if cross else (lambda: model.forward_features(x))
    with torch.no_grad():
        plain = run()
        with torch.autocast("cpu", torch.bfloat16):
            half = run()
    assert half.local.dtype == torch.bfloat16
    for ours, theirs in zip(half, plain, strict=True):
        assert (ours.float() - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize("in_chans", [2, 3])
def test_copies_of_a_channel_give_its_response(tmp_path, in_chans):
    model = load("gvsl-xmorpher-xray", pretrained=False)
    path, x = model.save_pretrained(tmp_path), noise(1, 1, 20, 36)
    wide = load(path, in_chans=in_chans)
    assert wide.patch_embed.proj.weight.shape[1] == in_chans
    with torch.no_grad():
        close(wide(x.expand(-1, in_chans, -1, -1)), model(x))


@pytest.mark.parametrize(
    "settings",
    [{"ndim": 1}, {"ndim": 4}, {"width": 8}, {"width": 24}, {"in_chans": 0}, {"window": 0}, {"width": 0}],
    ids=str,
)
def test_an_xmorpher_that_cannot_be_built_is_refused(settings):
    with pytest.raises(ArgumentError, match=r"no XMorpher with .*width a multiple of 16"):
        XMorpher(**settings)


def test_an_unknown_convention_and_wrong_axes_are_refused():
    with pytest.raises(ArgumentError, match='unknown convention \'old\'; use "correct" or "released"'):
        XMorpher(convention="old")
    with pytest.raises(ArgumentError, match=r"input has shape .*, but this model takes \(B, C, D, H, W\) with C = 1"):
        xmorpher()(noise(1, 1, 16, 16))


def test_a_seed_decides_all_weights_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    first, same, other = (XMorpher(2, 16, generator=seed(k)).state_dict() for k in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(not torch.equal(first[n], other[n]) for n in first if first[n].ndim > 1)


def test_features_start_with_the_spread_of_noise_and_without_a_pattern_inside_tokens():
    with torch.no_grad():
        local = XMorpher(2, 48, generator=seed(0)).eval()(noise(1, 1, 64, 64))
    assert 0.3 < local.std() < 3
    close(local, F.interpolate(local[..., ::4, ::4], scale_factor=4))


@pytest.mark.slow
def test_compiled_is_the_same_on_an_odd_size():
    model, x = xmorpher(2), noise(1, 1, 37, 50)
    torch.compiler.reset()
    with torch.no_grad():
        close(torch.compile(model, backend="aot_eager")(x), model(x))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
def test_compiled_to_machine_code_is_the_same_on_an_odd_size():
    model, x = xmorpher(2), noise(1, 1, 37, 50)
    torch.compiler.reset()
    with torch.no_grad():
        close(torch.compile(model)(x), model(x), 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(13, 16, 27), (37, 50)], ids=str)
def test_exported_is_the_same_on_odd_sizes(size):
    model, x = xmorpher(len(size)), noise(1, 1, *size)
    with torch.no_grad():
        close(torch.export.export(model, (x,)).module()(x), model(x))


@pytest.mark.filterwarnings("ignore")  # the tracer's
def test_a_trace_is_the_same_as_what_was_traced():
    model, x = xmorpher(2), noise(1, 1, 19, 33)
    close(torch.jit.trace(model, x)(x), model(x))


@pytest.mark.gpu
def test_the_device_is_that_of_the_tensor():
    model, x = xmorpher(), noise(2, 1, 21, 32, 19)
    with torch.no_grad():
        close(model.cuda()(x.cuda()).cpu(), model.cpu()(x), 1e-2)


# --- GVSL on it -------------------------------------------------------------------------------------------------------

TINY = {"backbone": "xmorpher", "width": 16, "affine_width": 8, "spacing_mm": 12.0, "save_every": 2, "warmup_steps": 2}
VOLUMES = TINY | {"crop": (16, 16, 16), "bf16": False}
FILMS = TINY | {"ndim": 2, "crop": (32, 32), "bf16": False}


def gvsl(ndim):
    return GVSL(xmorpher(ndim), affine_width=8, generator=seed(1))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("size", [(64, 32, 36), (64, 72)], ids=str)
def test_every_parameter_gets_a_gradient(size, cross, bf16):
    model, (fixed, moving) = gvsl(len(size)), noise(2, 1, 1, *size)
    config = PretrainConfig(1, **TINY, ndim=len(size), crop=size, bf16=bf16)
    batch = Batch(fixed, fixed, moving, fixed[:, :0], fixed[:, :0], cross)
    sum(Pretraining(model, config)(batch).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_its_bottleneck_and_local_features_feed_the_heads_of_the_unet():
    model = GVSL(XMorpher(device="meta"), device="meta")
    assert model.f_conv.double_conv[0].in_channels == 768
    unet = GVSL(UNet(device="meta"), device="meta")
    for head in ("sp_conv", "out_flow", "res_conv"):
        ours, theirs = (getattr(m, head).state_dict() for m in (model, unet))
        assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}


@pytest.mark.parametrize("ndim", [2, 3])
def test_images_see_each_other_on_request_and_never_in_evaluation(ndim):
    model, (fixed, moving) = gvsl(ndim).eval(), noise(2, 1, 1, *(16, 20, 24)[:ndim])
    with torch.no_grad():
        alone, crossed = model.features(fixed, moving), model.features(fixed, moving, cross=True)
        close(alone[0].local, model.unet(fixed))
        close(alone[1].local, model.unet(moving))
        close(crossed[0].local, model.unet.forward_pair(fixed, moving)[0].local)
        close(model(fixed, moving).restored, model.restore(fixed))
    assert (crossed[0].local - alone[0].local).abs().max() > 1e-3


def crosses(**changed):
    config = PretrainConfig(1, **VOLUMES | changed)
    pair = Pairs(config, None, 1)[0]
    return [make_batch([pair], [number], config, CPU).cross for number in range(40)]


@pytest.mark.parametrize(
    ("changed", "share"),
    [
        ({}, (12, 28)),
        ({"pair_mode": "self"}, (0, 0)),
        ({"pair_mode": "cross"}, (40, 40)),
        ({"objective": "restoration"}, (0, 0)),
        ({"backbone": "unet"}, (0, 0)),
    ],
    ids=str,
)
def test_the_pair_mode_decides_in_how_many_passes_images_see_each_other(changed, share):
    drawn = crosses(**changed)
    assert share[0] <= sum(drawn) <= share[1]
    assert drawn == crosses(**changed)


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"backbone": "resnet"}, "backbone 'resnet'"),
        ({"pair_mode": "all"}, "pair_mode 'all'"),
        ({"backbone": "unet", "window": 2}, "window 2 with a U-Net"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(changed, match):
    with pytest.raises(ArgumentError, match=match):
        PretrainConfig(1, **VOLUMES | changed)


def test_presets_have_the_width_whose_local_features_are_those_of_the_unet():
    for preset, width in (("nano", 16), ("small", 32), ("base", 48)):
        config = settings_of(PRESETS[preset], 1, {"backbone": "xmorpher"})
        unet = settings_of(PRESETS[preset], 1, {})
        assert config.width == width
        assert XMorpher(width=width, device="meta").num_features == unet.width
    assert settings_of(PRESETS["base"], 1, {}, ("backbone=xmorpher", "width=96")).width == 96


# --- Loaded, saved, used ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "count"), [("gvsl-xmorpher-ct", 14_747_408), ("gvsl-xmorpher-xray", 13_897_232)])
def test_the_announced_models_can_be_built(name, count):
    model = build(model_info(name), device="meta")
    assert sum(p.numel() for p in model.parameters()) == count == model_info(name).parameters
    assert model.window == (2 if model.ndim == 3 else 4)
    encoder = build(model_info(name), features=(), device="meta")
    assert encoder.feature_info.reduction() == [4, 8, 16, 32] and not encoder.backbone.has_decoder


def test_the_released_registration_network_is_not_taken_for_a_backbone():
    entry = replace(model_info("gvsl-xmorpher-ct"), objective="registration")
    with pytest.raises(ArgumentError, match="is a xmorpher with the objective registration, which this version lacks"):
        build(entry)


@pytest.fixture(scope="module", params=[VOLUMES, FILMS], ids=["3D", "2D"])
def run(request, tmp_path_factory):
    """The folder of a short run, and its module."""
    pytest.importorskip("accelerate")
    from gvsl_zoo.pretrain.loop import pretrain

    folder = tmp_path_factory.mktemp("runs") / "mine"
    return folder, pretrain(PretrainConfig(2, **request.param), folder, device="cpu")


def test_a_run_opens_for_every_task_and_its_card_says_how_pairs_were_seen(run):
    folder, model = run
    again = load(folder, task="pretraining")
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    assert again.entry.architecture == "xmorpher" and again.entry.config["width"] == 16
    assert "pair_mode mixed" in again.entry.training.recipe
    assert "pair_mode mixed" in (folder / "README.md").read_text() and "XMorpher" in again.cite()
    size = (20, 33, 17)[: again.entry.ndim]
    x = noise(1, 1, *size)
    with torch.no_grad():
        assert load(folder)(x).shape == (1, 8, *size)
        assert load(folder, task="segmentation", num_classes=3)(x).shape == (1, 3, *size)
        assert load(folder, task="classification", num_classes=4)(x).shape == (1, 4)
        assert load(folder, task="registration")(x, x).displacement.shape == (1, len(size), *size)
        assert [m.shape[1] for m in load(folder, features_only=True)(x)] == [16, 32, 64, 128]


def test_what_is_saved_loads_as_it_was(run, tmp_path):
    backbone = load(run[0])
    again = load(save_pretrained(backbone, tmp_path))
    assert again.state_dict().keys() == backbone.state_dict().keys()
    assert all(map(torch.equal, again.state_dict().values(), backbone.state_dict().values()))


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """The folder of a model for volumes of 12 mm, not trained, and two scans."""
    model = gvsl(3)
    entry = model_info("gvsl-xmorpher-ct")
    entry = replace(entry, status="available", config={"ndim": 3, "width": 16, "affine_width": 8})
    entry = replace(entry, heads=("affine", "deformable", "restoration"), limits=None)
    entry = replace(entry, input=replace(entry.input, spacing_mm=(12.0,) * 3))
    path = save_pretrained(model, tmp_path_factory.mktemp("models"), entry=entry)
    subjects = [sample_subject((20, 18, 24), seed(k), (12.0,) * 3) for k in range(2)]
    grid = np.diag([12.0, 12.0, 12.0, 1.0])
    return path, [Volume(s.hu.round().short().numpy().transpose(2, 1, 0), grid) for s in subjects], subjects


def test_features_pooled_features_and_registration_work_on_it(volumes):
    path, (fixed, moving), _ = volumes
    model = load(path)
    dense = features(fixed, model)
    assert dense.data.shape == (*fixed.data.shape, 8) and np.isfinite(dense.data).all()
    pooled = pooled_features(fixed, model, mask=Volume(np.ones(fixed.data.shape, np.uint8), fixed.affine))
    x = model.preprocess(fixed)
    with torch.no_grad():
        seen = model.forward_features(x)
    np.testing.assert_allclose(pooled.local, seen.local.mean((0, 2, 3, 4)), rtol=1e-3, atol=1e-4)
    weight = F.avg_pool3d(F.pad(torch.ones_like(x), [n for s in x.shape[:1:-1] for n in (0, -s % 32)]), 32)
    mean = (seen.bottleneck * weight).sum((0, 2, 3, 4)) / weight.sum()
    np.testing.assert_allclose(pooled.bottleneck, mean, rtol=1e-3, atol=1e-4)
    found = register(moving, fixed, load(path, task="registration"), refine=2)
    assert np.isfinite(found.warped.data).all() and found.warped.data.shape == fixed.data.shape


def test_fine_tuning_and_segmentation_work_on_it_and_go_on_bit_for_bit(volumes, tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    from gvsl_zoo.transfer import finetune as rooms
    from gvsl_zoo.transfer.cases import read_cases
    from gvsl_zoo.transfer.config import FinetuneConfig

    path, scans, subjects = volumes
    for number, subject in enumerate(subjects):
        for kind, array in (("images", subject.hu.round().short()), ("labels", (subject.labels == 1).byte())):
            (tmp_path / kind).mkdir(exist_ok=True)
            volume = nib.Nifti1Image(array.numpy().transpose(2, 1, 0), np.diag([12.0, 12.0, 12.0, 1.0]))
            nib.save(volume, tmp_path / kind / f"s{number}.nii.gz")
    cases = read_cases(tmp_path)
    config = FinetuneConfig(4, model=str(path), crop=(16, 16, 16), save_every=2, bf16=False, validation=0.0)
    run = partial(rooms.finetune, cases, config, device="cpu")
    whole = run(tmp_path / "whole").state_dict()
    with monkeypatch.context() as patch:
        original, left = rooms.Supervised.forward, iter(range(3))

        def cut(*arguments):
            if next(left, None) is None:
                raise KeyboardInterrupt("power cut")
            return original(*arguments)

        patch.setattr(rooms.Supervised, "forward", cut)
        with pytest.raises(KeyboardInterrupt, match="power cut"):
            run(tmp_path / "cut")
    torch.manual_seed(99)
    again = run(tmp_path / "cut")
    assert all(torch.equal(whole[name], tensor) for name, tensor in again.state_dict().items())
    assert segment(scans[0], load(tmp_path / "cut", task="segmentation")).data.shape == scans[0].data.shape


def test_an_onnx_file_of_any_size_is_refused(tmp_path):
    model = load("gvsl-xmorpher-xray", pretrained=False)
    with pytest.raises(ArgumentError, match="lays out its windows for one size; give shape="):
        export_onnx(model, tmp_path / "net.onnx")


def test_a_linear_probe_of_films_works_on_it():
    model = load("gvsl-xmorpher-xray", task="segmentation", num_classes=2, pretrained=False, frozen=True).train()
    assert not model.backbone.training
    logits = model(noise(1, 1, 40, 33))
    logits.square().mean().backward()
    assert model.head.weight.grad.abs().max() > 0 and all(p.grad is None for p in model.backbone.parameters())


def test_a_classification_leaves_no_gradient_in_the_decoder():
    model = load("gvsl-xmorpher-ct", task="classification", num_classes=2, pretrained=False)
    assert not model.backbone.has_decoder
    whole = xmorpher(2)
    for level in whole.levels[whole.encoder_levels :]:
        for parameter in whole.level_parameters(level):
            parameter.requires_grad_(False)
    whole.forward_intermediates(noise(1, 1, 64, 64), (-1,))[0].square().sum().backward()
    assert all((p.grad is None) != p.requires_grad for p in whole.parameters())


def test_an_adapter_in_the_place_of_a_layer_is_called():
    """As LoRA puts one there."""

    class Adapter(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer, self.gain = layer, nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.gain * self.layer(x)

    model = xmorpher()
    wrapped = [block.cross_attn for block in model.modules() if hasattr(block, "cross_attn")]
    for attention in wrapped:
        attention.q, attention.kv = Adapter(attention.q), Adapter(attention.kv)
    model(noise(1, 1, 16, 16, 16)).sum().backward()
    assert wrapped and all(layer.gain.grad is not None for a in wrapped for layer in (a.q, a.kv))
