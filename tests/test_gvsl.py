"""GVSL: agreement with the released code, gradients everywhere, and the geometry it gets right where that does not."""

from __future__ import annotations

import json

import pytest
import torch
from formula import DATA, assert_as_recorded, image, recorded, rnd
from torch import nn

from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.losses import local_ncc_loss, restoration_loss, smoothness_loss
from gvsl_zoo.models.gvsl import GVSL, released_affine_warp, released_warp
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.models.xmorpher import XMorpher
from gvsl_zoo.pretrain.config import PretrainConfig
from gvsl_zoo.pretrain.objective import Batch, Pretraining
from gvsl_zoo.spatial import affine_warp, compose, warp

HEADS = ("fc_rot", "fc_scl", "fc_trans", "fc_shear")


def gvsl(ndim=3, **settings):
    generator = torch.Generator().manual_seed(0)
    return GVSL(UNet(ndim, 8, generator=generator), affine_width=16, generator=generator, **settings).eval()


def pair(*size, batch=2, seed=1):
    return torch.rand(2, batch, 1, *size, generator=torch.Generator().manual_seed(seed))


def identity(ndim, batch=1):
    return torch.eye(ndim, ndim + 1).expand(batch, -1, -1)


def translation(*voxels):
    return torch.cat([torch.eye(len(voxels)), torch.tensor(voxels)[:, None]], 1)[None]


@pytest.fixture(scope="module", params=[("cube32", (32, 32, 32)), ("odd", (24, 40, 56))], ids=lambda p: p[0])
def run(request, released):
    """A case's name, its recorded numbers, images A and B, and what the module says of them."""
    case, shape = request.param
    a, b = image(f"{case}/A", shape), image(f"{case}/B", shape)
    with torch.no_grad():
        return case, recorded("official_unet_gvsl.npz", f"{case}/"), a, b, released(a, b)


def test_matching_and_restoration_are_those_of_the_released_code(run):
    case, golden, _, _, match = run
    torch.testing.assert_close(match.affine, torch.from_numpy(golden["affine"]), rtol=1e-4, atol=1e-5)
    assert_as_recorded(match.displacement, golden, "flow", f"{case}flow")
    assert_as_recorded(match.warped, golden, "warped", f"{case}warped")
    assert_as_recorded(match.restored, golden, "restored", f"{case}restored")


def test_losses_are_those_of_the_released_code(run):
    _, golden, a, b, match = run
    found = {
        "loss_ncc": local_ncc_loss(match.warped, a),
        "loss_mse": restoration_loss(match.restored, a),
        "loss_smooth": smoothness_loss(match.displacement),
        "ncc_AB": local_ncc_loss(a, b),
        "ncc_AA": local_ncc_loss(a, a),
    }
    for name, loss in found.items():
        assert loss.item() == pytest.approx(float(golden[name]), rel=1e-4, abs=1e-6), name


def test_tensors_have_the_released_names_and_shapes():
    official = json.loads((DATA / "official_state_dict.json").read_text())
    assert len(official) == 104
    ours = GVSL(UNet(device="meta"), device="meta").state_dict()
    assert {name: list(tensor.shape) for name, tensor in ours.items()} == official


@pytest.mark.parametrize(("ndim", "count"), [(3, 32_440_739), (2, 10_820_970)])
def test_the_whole_module_has_the_published_number_of_parameters(ndim, count):
    assert sum(p.numel() for p in GVSL(UNet(ndim, device="meta"), device="meta").parameters()) == count


@pytest.mark.parametrize(("tag", "shape"), [("geo_cube", (20, 20, 20)), ("geo_box", (12, 20, 28))])
def test_the_released_convention_has_the_released_geometry(tag, shape):
    golden = recorded("official_geometry.npz", f"{tag}/")
    x, flow = image(tag, shape), 2 * rnd(f"{tag}/flow", (1, 3, *shape))
    found = {
        "stn": released_warp(x, flow),
        "stn_zero": released_warp(x, torch.zeros_like(flow)),
        "atn": released_affine_warp(x, torch.from_numpy(golden["mat"])),
        "atn_id": released_affine_warp(x, identity(3)),
    }
    for name, warped in found.items():
        assert_as_recorded(warped, golden, name, f"{tag}{name}")


def losses(model, fixed, damaged, moving, bf16):
    """The terms of a pre-training step."""
    config = PretrainConfig(steps=1, ndim=fixed.ndim - 2, crop=tuple(fixed.shape[2:]), bf16=bf16)
    nothing = fixed[:, :0]
    return Pretraining(model, config)(Batch(fixed, damaged, moving, nothing, nothing))


def loss_of(model, fixed, moving, bf16=False):
    """The loss of a pre-training step, the fixed image undamaged."""
    return sum(losses(model, fixed, fixed, moving, bf16).values())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("size", [(32, 32, 32), (32, 48)], ids=str)
def test_every_parameter_of_gvsl_gets_a_gradient(size, bf16):
    model = gvsl(len(size))
    loss_of(model, *pair(*size), bf16).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("size", "outputs"), [((32, 32, 32), 15), ((32, 48), 7)], ids=str)
def test_every_output_of_the_affine_head_gets_a_gradient(size, outputs):
    model = gvsl(len(size))
    loss_of(model, *pair(*size)).backward()
    gradient = torch.cat([getattr(model, head).bias.grad for head in HEADS])
    assert gradient.shape == (outputs,)
    assert (gradient != 0).all()


@pytest.mark.parametrize("size", [(32, 32, 32), (32, 48)], ids=str)
def test_a_fresh_module_begins_at_the_identity(size):
    fixed, moving = pair(*size)
    answer = GVSL(UNet(len(size), 8, generator=torch.Generator().manual_seed(0)))(fixed, moving)
    assert 0 < answer.displacement.abs().max() < 0.01
    torch.testing.assert_close(answer.warped, moving, rtol=0, atol=0.01)


@pytest.mark.parametrize("term", ["ncc", "restoration"])
def test_every_term_reaches_the_first_layer(term):
    model, (fixed, moving) = gvsl(2), pair(32, 32)
    losses(model, fixed, fixed, moving, False)[term].backward()
    assert model.unet.inc.double_conv[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("convention", ["correct", "released"])
@pytest.mark.parametrize("size", [(16, 20, 24), (24, 37)], ids=str)
def test_a_batch_of_two_equals_two_single_pairs(size, convention):
    model, (fixed, moving) = gvsl(len(size), convention=convention), pair(*size)
    with torch.no_grad():
        both = model(fixed, moving)
        single = [model(fixed[i : i + 1], moving[i : i + 1]) for i in range(2)]
    for name, together, *apart in zip(both._fields, both, *single, strict=True):
        torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("size", [(21, 16, 33), (16, 50)], ids=str)
def test_the_warped_image_is_one_resampling_through_the_fused_displacement(size):
    model, (fixed, moving) = gvsl(len(size)), pair(*size)
    with torch.no_grad():
        match = model(fixed, moving)
        affine, flow = model.match(*model.features(fixed, moving))
    assert match.warped.shape == match.restored.shape == fixed.shape
    assert match.displacement.shape == (2, len(size), *size)
    assert match.affine.shape == (2, len(size), len(size) + 1)
    assert torch.equal(match.warped, warp(moving, match.displacement))
    assert torch.equal(match.displacement, compose(affine, flow))


def test_the_released_convention_resamples_twice():
    model, (fixed, moving) = gvsl(convention="released"), pair(16, 16, 24)
    with torch.no_grad():
        match = model(fixed, moving)
        twice = released_warp(released_affine_warp(moving, match.affine), match.displacement)
    assert torch.equal(match.warped, twice)


@pytest.mark.parametrize("size", [(16, 20, 24), (24, 37)], ids=str)
def test_heads_that_say_nothing_leave_the_moving_image_alone_unless_released(size):
    fixed, moving = pair(*size)
    errors = {}
    for convention in ("correct", "released"):
        model = gvsl(len(size), convention=convention)
        for head in (*HEADS, "out_flow"):
            getattr(model, head).requires_grad_(False).weight.zero_()
            getattr(model, head).bias.zero_()
        with torch.no_grad():
            match = model(fixed, moving)
        torch.testing.assert_close(match.affine, identity(len(size), 2))
        assert match.displacement.abs().max() < 1e-5
        errors[convention] = (match.warped - moving).abs().max().item()
    assert errors["correct"] < 1e-5
    assert errors["released"] > 0.1


def test_a_zero_flow_is_the_identity_but_was_not_in_the_released_code():
    x = image("geo_cube", (20, 20, 20))
    zero = torch.zeros(1, 3, 20, 20, 20)
    assert (warp(x, zero) - x).abs().max() < 1e-5
    assert (released_warp(x, zero) - x).abs().max() == pytest.approx(
        0.76, abs=0.005
    )  # as measured on the authors' code
    assert (released_affine_warp(x, identity(3)) - x).abs().max() < 1e-5


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_translation_is_in_voxels_of_its_axis_but_was_not_in_the_released_code(axis):
    x = image("geo_box", (12, 20, 28))
    voxels = [0.0, 0.0, 0.0]
    voxels[axis] = 2.0
    shifted = torch.zeros_like(x)
    shifted.narrow(2 + axis, 0, x.shape[2 + axis] - 2).copy_(x.narrow(2 + axis, 2, x.shape[2 + axis] - 2))
    assert (affine_warp(x, translation(*voxels)) - shifted).abs().max() < 1e-5
    # There, entry i is divided by size i but moves axis 2 - i, whose half width is the unit.
    half = [0.0, 0.0, 0.0]
    half[2 - axis] = voxels[axis] / x.shape[2 + axis] * x.shape[4 - axis] / 2
    torch.testing.assert_close(
        released_affine_warp(x, translation(*voxels)), affine_warp(x, translation(*half)), rtol=0, atol=1e-5
    )


def test_bf16_features_do_not_make_bf16_geometry():
    model, (fixed, moving) = gvsl(), pair(16, 16, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        match = model(fixed, moving)
    assert match.affine.dtype == match.displacement.dtype == match.warped.dtype == torch.float32
    assert torch.equal(match.warped, warp(moving, match.displacement))


@pytest.mark.parametrize("size", [(48, 32, 32), (32, 48, 48), (16, 16, 16), (32, 48)], ids=str)
def test_the_gradient_in_bf16_is_nearly_that_in_float32(size):
    gradients = []
    for bf16 in (False, True):
        model = gvsl(len(size))
        losses(model, *torch.rand(3, 2, 1, *size, generator=torch.Generator().manual_seed(1)), bf16)[
            "restoration"
        ].backward()
        gradients.append({name: p.grad for name, p in model.unet.named_parameters()})
    for name, plain in gradients[0].items():
        assert (gradients[1][name] - plain).norm() < 0.35 * plain.norm(), name


def test_a_frozen_backbone_stays_in_evaluation_mode_inside_gvsl_and_gets_no_gradient():
    model, (fixed, moving) = gvsl(2), pair(32, 32)
    model.unet.freeze()
    model.train()
    assert model.sp_conv.training
    assert not model.unet.training
    loss_of(model, fixed, moving).backward()
    assert all((p.grad is None) == name.startswith("unet.") for name, p in model.named_parameters())


def test_checkpointing_changes_no_gradient_of_gvsl():
    gradients = []
    for enable in (False, True):
        model = gvsl()
        model.unet.set_grad_checkpointing(enable)
        loss_of(model, *pair(16, 16, 16)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_images_on_different_grids_are_refused():
    with pytest.raises(ArgumentError, match=r"fixed image of shape .* with a moving one of .*; bring both to one grid"):
        gvsl(2)(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 32))


def test_an_unknown_convention_is_refused():
    with pytest.raises(ArgumentError, match='unknown convention \'old\'; use "correct" or "released"'):
        gvsl(2, convention="old")


@pytest.mark.gpu
def test_matching_on_a_gpu_is_that_on_the_cpu():
    model, (fixed, moving) = gvsl(), pair(16, 20, 24)
    with torch.no_grad():
        here = model(fixed, moving)
        there = model.cuda()(fixed.cuda(), moving.cuda())
    for ours, theirs in zip(here, there, strict=True):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=0.05, atol=0.05)  # convolutions may run in TF32


@pytest.mark.parametrize("width", range(8, 136, 8))
def test_every_width_that_a_backbone_takes_has_heads(width):
    for ndim in (2, 3):
        assert GVSL(UNet(ndim, width, device="meta"), device="meta").unet.num_features == width
    if width % 16 == 0:
        GVSL(XMorpher(2, width, device="meta"), device="meta")


def test_groups_are_those_of_the_released_model_where_its_width_has_them():
    groups = [layer.num_groups for layer in UNet(2, 32, device="meta").modules() if isinstance(layer, nn.GroupNorm)]
    assert set(groups) == {4, 8, 16, 32, 64}
