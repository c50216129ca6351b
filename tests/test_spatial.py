"""Geometry: theorems of warps, affine matrices, composition and the Jacobian, in 2D and 3D."""

from __future__ import annotations

import math

import pytest
import torch
from formula import image, rnd

from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.spatial import (
    MATRIX_PRODUCTS,
    affine_coordinates,
    affine_matrix,
    affine_warp,
    compose,
    exact,
    full_precision,
    identity_grid,
    jacobian_determinant,
    sample,
    warp,
)

SHAPES = [(12, 16, 21), (16, 23)]
AXES = [(shape, axis) for shape in SHAPES for axis in range(len(shape))]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
each_axis = pytest.mark.parametrize(("shape", "axis"), AXES, ids=str)


def numbers(ndim, **groups):
    """Raw affine numbers (1, 15) or (1, 7), zero but for the groups given."""
    sizes = {"rotation": 3 if ndim == 3 else 1, "scale": ndim, "translation": ndim, "shear": ndim * (ndim - 1)}
    return torch.cat([torch.tensor(groups.get(name, [0.0] * size)) for name, size in sizes.items()])[None]


def some_affine(ndim, strength=0.4, batch=2):
    return affine_matrix(strength * rnd("affine", (batch, 15 if ndim == 3 else 7)))


def some_flow(shape, voxels=1.0, batch=2):
    """A smooth displacement of up to `voxels`, half a wave to a wave and a half an axis, (batch, n, *shape)."""
    grid = identity_grid(shape, torch.zeros(())) / torch.tensor(shape).view(-1, *[1] * len(shape))
    waves = 3 * rnd("waves", (batch * len(shape), len(shape) + 1))
    phase = torch.tensordot(waves[:, :-1], grid, 1) + waves[:, -1].view(-1, *[1] * len(shape))
    return voxels * phase.sin().view(batch, len(shape), *shape)


def bumps(shape):
    """A smooth image that dies out before the border, (2, 1, *shape)."""
    grid = identity_grid(shape, torch.zeros(()))
    offset = torch.tensor([(size - 1) / 2 for size in shape]).view(-1, *[1] * len(shape))
    distance2 = ((grid - offset) / torch.tensor(shape).view(offset.shape) * 4).square().sum(0)
    wave = 1 + 0.5 * torch.cos(0.2 * grid.sum(0))
    return torch.stack([torch.exp(-distance2), torch.exp(-distance2) * wave])[:, None]


def shifted(x, axis, voxels):
    """x moved so that voxel p shows p + voxels along an axis, zeros entering."""
    out, size = torch.zeros_like(x), x.shape[axis] - abs(voxels)
    out.narrow(axis, max(-voxels, 0), size).copy_(x.narrow(axis, max(voxels, 0), size))
    return out


def constant(shape, axis, value):
    displacement = torch.zeros(1, len(shape), *shape)
    displacement[:, axis] = value
    return displacement


@each_shape
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_a_zero_displacement_is_the_identity(shape, mode):
    x = torch.cat([image("a", shape), image("b", shape)])
    torch.testing.assert_close(warp(x, torch.zeros(2, len(shape), *shape), mode=mode), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_labels_keep_their_type_and_every_number(dtype):
    labels = torch.tensor([614454277, 2**24 + 1, 7, 0]).to(dtype).view(1, 1, 2, 2)
    still = warp(labels, torch.zeros(1, 2, 2, 2), mode="nearest")
    assert still.dtype == dtype and torch.equal(still, labels)


@each_axis
@pytest.mark.parametrize("voxels", [1, -1, 3])
def test_a_constant_displacement_shifts_by_whole_voxels_and_lets_zeros_in(shape, axis, voxels):
    x = image("a", shape)
    torch.testing.assert_close(warp(x, constant(shape, axis, voxels)), shifted(x, 2 + axis, voxels), rtol=0, atol=2e-5)


@each_axis
def test_half_a_voxel_is_the_mean_of_two_neighbours(shape, axis):
    x = image("a", shape)
    mean = (x + shifted(x, 2 + axis, 1)) / 2
    torch.testing.assert_close(warp(x, constant(shape, axis, 0.5)), mean, rtol=0, atol=2e-5)


@each_shape
def test_a_far_displacement_leaves_nothing(shape):
    assert warp(image("a", shape), constant(shape, 0, 1000.0)).abs().max() == 0


@each_shape
def test_nearest_warping_makes_no_new_labels(shape):
    labels = (5 * image("a", shape)).floor() * 3
    assert set(warp(labels, some_flow(shape, batch=1), mode="nearest").unique().tolist()) <= {
        0,
        *labels.unique().tolist(),
    }


@each_shape
def test_images_of_a_batch_are_warped_each_by_its_own_field(shape):
    x, flow = torch.cat([image("a", shape), image("b", shape)]), some_flow(shape)
    single = torch.cat([warp(x[i : i + 1], flow[i : i + 1]) for i in range(2)])
    assert torch.equal(warp(x, flow), single)


@each_shape
def test_border_padding_repeats_the_last_voxel(shape):
    x = image("a", shape)
    beyond = identity_grid(shape, x)[None].clone()
    beyond[:, 0] += 100
    last = x.select(2, shape[0] - 1).unsqueeze(2).expand_as(x)
    torch.testing.assert_close(sample(x, beyond, padding="border"), last, rtol=0, atol=2e-5)


@pytest.mark.parametrize("wrong", [(1, 2, 8, 8, 8), (1, 3, 8, 8, 9), (2, 3, 8, 8, 8)])
def test_a_displacement_that_is_not_the_image_s_is_refused(wrong):
    with pytest.raises(
        ArgumentError, match=r"displacement has shape .*expected \(1, 3, 8, 8, 8\): one channel an axis"
    ):
        warp(torch.zeros(1, 1, 8, 8, 8), torch.zeros(wrong))


@pytest.mark.parametrize("shape", [(1, 6), (15,), (2, 14), (1, 15, 1)])
def test_affine_numbers_of_another_count_are_refused(shape):
    with pytest.raises(ArgumentError, match=r"expected \(B, 15\) in 3D or \(B, 7\) in 2D"):
        affine_matrix(torch.zeros(shape))


@pytest.mark.parametrize("ndim", [2, 3])
def test_zeros_give_the_identity_matrix(ndim):
    assert torch.equal(affine_matrix(numbers(ndim)), torch.eye(ndim, ndim + 1)[None])


@each_axis
def test_the_translation_of_an_axis_moves_that_axis_by_voxels(shape, axis):
    voxels = [0.0] * len(shape)
    voxels[axis] = 2.0
    x = image("a", shape)
    moved = affine_warp(x, affine_matrix(numbers(len(shape), translation=voxels)))
    torch.testing.assert_close(moved, shifted(x, 2 + axis, 2), rtol=0, atol=2e-5)


@pytest.mark.parametrize("ndim", [2, 3])
def test_rotations_are_orthogonal_and_keep_orientation(ndim):
    angles = rnd("angles", (20, 3 if ndim == 3 else 1))
    linear = torch.cat([affine_matrix(numbers(ndim, rotation=row))[..., :-1] for row in angles.tolist()])
    torch.testing.assert_close(linear @ linear.mT, torch.eye(ndim).expand_as(linear), rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.linalg.det(linear), torch.ones(20), rtol=0, atol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_full_rotation_turns_20_degrees_about_its_axis(axis):
    rotation = [0.0, 0.0, 0.0]
    rotation[axis] = 1.0
    linear = affine_matrix(numbers(3, rotation=rotation))[0, :, :3]
    axes = torch.eye(3)
    torch.testing.assert_close(linear @ axes[axis], axes[axis])
    first, second = axes[(axis + 1) % 3], axes[(axis + 2) % 3]
    cos, sin = math.cos(math.pi / 9), math.sin(math.pi / 9)
    torch.testing.assert_close(linear @ first, cos * first + sin * second)


@pytest.mark.parametrize("ndim", [2, 3])
def test_scale_spans_a_quarter_each_way_on_the_diagonal(ndim):
    scale = [-1.0, 0.4, 1.0][:ndim]
    linear = affine_matrix(numbers(ndim, scale=scale))[0, :, :-1]
    torch.testing.assert_close(linear, torch.diag(1 + 0.25 * torch.tensor(scale)))


@pytest.mark.parametrize("ndim", [2, 3])
def test_shears_are_tangents_of_10_degrees_off_the_diagonal_row_by_row(ndim):
    shear = [0.1 * (i + 1) for i in range(ndim * (ndim - 1))]
    linear = affine_matrix(numbers(ndim, shear=shear))[0, :, :-1]
    torch.testing.assert_close(linear[~torch.eye(ndim, dtype=torch.bool)], (torch.tensor(shear) * math.pi / 18).tan())
    torch.testing.assert_close(linear.diagonal(), torch.ones(ndim))


@pytest.mark.parametrize("ndim", [2, 3])
def test_the_matrix_is_shear_times_scale_times_rotation_and_the_translation_as_given(ndim):
    groups = {
        "rotation": [0.3, -0.8, 0.5][: 3 if ndim == 3 else 1],
        "scale": [0.9, -0.5, 0.2][:ndim],
        "translation": [3.0, -70.0, 11.0][:ndim],
        "shear": [0.5, -0.4, 0.3, 0.9, -1.0, 0.2][: ndim * (ndim - 1)],
    }
    shear, scale, rotation = (
        affine_matrix(numbers(ndim, **{k: groups[k]}))[0, :, :-1] for k in ("shear", "scale", "rotation")
    )
    whole = affine_matrix(numbers(ndim, **groups))[0]
    torch.testing.assert_close(whole[:, :-1], shear @ scale @ rotation)
    assert whole[:, -1].tolist() == groups["translation"]


@pytest.mark.parametrize("ndim", [2, 3])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_all_but_the_translation_is_clamped(ndim, sign):
    far, edge = (torch.full((1, 15 if ndim == 3 else 7), sign * value) for value in (7.0, 1.0))
    assert torch.equal(affine_matrix(far)[..., :-1], affine_matrix(edge)[..., :-1])
    assert (affine_matrix(far)[..., -1] == 7 * sign).all()


@pytest.mark.parametrize(("way", "kept"), [(1.0, False), (-1.0, True)])
def test_a_clamped_number_still_gets_the_gradient_that_leads_back(way, kept):
    far = numbers(3, rotation=[3.0, 0, 0], scale=[0, 3.0, 0], shear=[0, 0, 3.0, 0, 0, 0]).requires_grad_()
    inside = numbers(3, rotation=[0.9, 0, 0], scale=[0, 0.9, 0], shear=[0, 0, 0.9, 0, 0, 0]).requires_grad_()
    goal = affine_matrix(far).detach() + way * (affine_matrix(far) - affine_matrix(inside)).detach()
    (affine_matrix(far) - goal).square().sum().backward()
    outside = far.grad[0, far[0] == 3]
    assert len(outside) == 3 and ((outside > 0) == kept).all() and ((outside == 0) != kept).all()


@pytest.mark.parametrize("count", [7, 15])
def test_the_affine_matrix_has_the_gradient_of_finite_differences_within_its_bounds(count):
    parameters = (0.4 * rnd("gradient", (2, count))).clamp(-0.95, 0.95).double().requires_grad_()
    assert torch.autograd.gradcheck(affine_matrix, parameters)


@each_shape
def test_the_centre_of_the_grid_stays_where_it_is_but_for_the_translation(shape):
    affine = some_affine(len(shape))
    corners = affine_coordinates(affine, shape).flatten(2)
    middle = (corners[..., 0] + corners[..., -1]) / 2
    centre = torch.tensor([(size - 1) / 2 for size in shape])
    torch.testing.assert_close(middle, centre + affine[..., -1], rtol=0, atol=1e-4)


def test_sizes_do_not_change_which_voxel_an_affine_reads_about_the_centre():
    affine = some_affine(3)
    small, large = (affine_coordinates(affine, s) - identity_grid(s, affine) for s in ((4, 6, 8), (8, 6, 12)))
    torch.testing.assert_close(small, large[:, :, 2:6, :, 2:10], rtol=0, atol=1e-5)


@each_shape
def test_the_inverse_affine_undoes_it(shape):
    affine = some_affine(len(shape), 0.2)
    linear = torch.linalg.inv(affine[..., :-1])
    inverse = torch.cat([linear, -linear @ affine[..., -1:]], -1)
    zero = torch.zeros(2, len(shape), *shape)
    residue = compose(inverse, compose(affine, zero))
    inside = affine_coordinates(inverse, shape)
    last = torch.tensor(shape).view(-1, *[1] * len(shape)) - 1
    inside = ((inside >= 0) & (inside <= last)).all(1)
    assert inside.float().mean() > 0.5
    assert residue.norm(dim=1)[inside].max() < 1e-4


@each_shape
def test_composing_with_the_identity_leaves_the_displacement(shape):
    flow = some_flow(shape)
    torch.testing.assert_close(
        compose(affine_matrix(numbers(len(shape))).expand(2, -1, -1), flow), flow, rtol=0, atol=2e-5
    )


@each_shape
def test_composing_with_a_zero_displacement_leaves_the_affine(shape):
    affine = some_affine(len(shape))
    moved = affine_coordinates(affine, shape) - identity_grid(shape, affine)
    torch.testing.assert_close(compose(affine, torch.zeros(2, len(shape), *shape)), moved)


@each_axis
def test_composing_adds_constant_displacements(shape, axis):
    translation = [0.0] * len(shape)
    translation[axis] = 2.5
    affine = affine_matrix(numbers(len(shape), translation=translation))
    total = compose(affine, constant(shape, axis, 1.25))
    torch.testing.assert_close(total, constant(shape, axis, 3.75), rtol=0, atol=2e-5)


@each_shape
def test_one_fused_warp_equals_the_displacement_then_the_affine(shape):
    # On coordinates as the image both are exact, since linear interpolation reproduces a linear function.
    grid = identity_grid(shape, torch.zeros(())).expand(2, -1, *[-1] * len(shape))
    affine, flow = some_affine(len(shape), 0.2), some_flow(shape, 2.0)
    fused, twice = warp(grid, compose(affine, flow)), affine_warp(warp(grid, flow), affine)
    inside = affine_warp(warp(torch.ones_like(grid), flow), affine) > 1 - 1e-5
    assert inside.float().mean() > 0.3
    torch.testing.assert_close(fused[inside], twice[inside], rtol=0, atol=1e-3)
    for other in (warp(affine_warp(grid, affine), flow), warp(grid, flow), affine_warp(grid, affine)):
        assert (fused - other)[inside].abs().max() > 0.3


@pytest.mark.parametrize("shape", [(32, 40, 36), (48, 64)], ids=str)
def test_on_a_smooth_image_the_fused_warp_differs_from_two_by_their_blur_alone(shape):
    x, affine, flow = bumps(shape), some_affine(len(shape), 0.2), some_flow(shape, 2.0)
    fused, twice = warp(x, compose(affine, flow)), affine_warp(warp(x, flow), affine)
    assert (fused - twice).abs().max() < 0.05
    assert (fused - twice).abs().mean() < 0.3 * (fused - warp(affine_warp(x, affine), flow)).abs().mean()


@each_shape
def test_the_affine_warp_is_the_warp_by_its_displacement(shape):
    x, affine = image("a", shape).expand(2, -1, *shape), some_affine(len(shape))
    displacement = compose(affine, torch.zeros(2, len(shape), *shape))
    torch.testing.assert_close(affine_warp(x, affine), warp(x, displacement), rtol=0, atol=1e-4)


@each_shape
def test_gradients_through_the_fused_warp_are_those_of_finite_differences(shape):
    x, target = bumps(shape), bumps(shape).flip(2)

    def loss(parameters, flow):
        return (warp(x, compose(affine_matrix(parameters), flow)) - target).square().sum()

    inputs = [0.2 * rnd("p", (2, 15 if len(shape) == 3 else 7)), some_flow(shape, 0.5)]
    leaves = [value.clone().requires_grad_() for value in inputs]
    loss(*leaves).backward()
    for i, leaf in enumerate(leaves):
        direction = leaf.grad / leaf.grad.norm()  # steepest ascent: its slope is the norm of the gradient
        step = 0.02
        ends = [loss(*(v + s * direction if j == i else v for j, v in enumerate(inputs))) for s in (-step, step)]
        assert ((ends[1] - ends[0]) / (2 * step)).item() == pytest.approx(leaf.grad.norm().item(), rel=0.05)


@each_shape
def test_a_translation_has_jacobian_one(shape):
    for displacement in (torch.zeros(1, len(shape), *shape), constant(shape, 1, 2.5)):
        torch.testing.assert_close(jacobian_determinant(displacement), torch.ones(1, *shape))


@each_shape
def test_stretching_the_axes_has_the_product_of_the_factors_as_jacobian(shape):
    factors = torch.tensor([1.5, 0.4, 2.0][: len(shape)]).view(-1, *[1] * len(shape))
    displacement = (factors - 1) * identity_grid(shape, factors)
    expected = torch.full((1, *shape), factors.prod().item())
    torch.testing.assert_close(jacobian_determinant(displacement[None]), expected, rtol=1e-4, atol=1e-4)


@each_shape
def test_an_affine_has_the_determinant_of_its_matrix_as_jacobian(shape):
    affine = some_affine(len(shape), 0.8)
    displacement = compose(affine, torch.zeros(2, len(shape), *shape))
    found = jacobian_determinant(displacement).flatten(1)
    expected = torch.linalg.det(affine[..., :-1])[:, None]
    torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-4, atol=1e-4)


@each_axis
def test_a_fold_has_a_negative_jacobian(shape, axis):
    displacement = torch.zeros(1, len(shape), *shape)
    displacement[:, axis] = -2 * identity_grid(shape, displacement)[axis]
    torch.testing.assert_close(jacobian_determinant(displacement), -torch.ones(1, *shape), rtol=1e-4, atol=1e-4)


@each_shape
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mixed_precision_does_not_change_the_geometry(shape, device):
    x, flow = bumps(shape).to(device), some_flow(shape).to(device)
    parameters = 0.4 * rnd("affine", (2, 15 if len(shape) == 3 else 7)).to(device)

    def geometry():
        affine = affine_matrix(parameters)
        psi = compose(affine, flow)
        return affine, psi, warp(x, psi), affine_warp(x, affine), jacobian_determinant(psi)

    plain = geometry()
    with torch.autocast(device, torch.bfloat16):
        mixed = geometry()
    for a, b in zip(mixed, plain, strict=True):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


@each_shape
def test_bf16_features_are_warped_in_float32(shape):
    x, flow = bumps(shape).bfloat16(), some_flow(shape)
    assert torch.equal(warp(x, flow), warp(x.float(), flow))
    half = some_affine(len(shape)).bfloat16()
    assert torch.equal(affine_coordinates(half, shape), affine_coordinates(half.float(), shape))


@pytest.mark.parametrize("wanted", [True, False], ids=["image needs a gradient", "image needs none"])
def test_sharing_an_image_out_to_threads_changes_neither_values_nor_gradients(wanted, generator):
    image, noise = (torch.randn(1, count, 5, 6, 7, generator=generator) for count in (4, 3))
    coordinates = (identity_grid((5, 6, 7), noise) + noise).requires_grad_()
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaf = image.clone().requires_grad_(wanted)
            read = sample(leaf, coordinates)
            inputs = (leaf, coordinates) if wanted else (coordinates,)
            results.append((read.detach(), *torch.autograd.grad(read.square().sum(), inputs)))
    finally:
        torch.set_num_threads(threads)
    for alone, shared in zip(*results, strict=True):
        torch.testing.assert_close(shared, alone)


@pytest.fixture
def lowered():
    """A process that has chosen TF32 for every product of matrices and convolution."""
    torch.backends.fp32_precision = "tf32"
    yield
    torch.backends.fp32_precision = "none"


def test_what_needs_float32_in_full_gets_it_whatever_the_process_has_chosen(lowered):
    def chosen():
        return [operation.fp32_precision for operation in MATRIX_PRODUCTS]

    assert chosen() == ["tf32"] * 2
    with full_precision(torch.ones(1)):
        assert chosen() == ["ieee"] * 2
    assert chosen() == ["tf32"] * 2
    with pytest.raises(ZeroDivisionError, match="zero"), exact(*MATRIX_PRODUCTS):
        _ = 1 / 0
    assert chosen() == ["tf32"] * 2


def test_a_process_that_has_chosen_nothing_is_left_alone():
    class Operation:
        fp32_precision = "none"

    operation = Operation()
    with exact(operation):
        assert operation.fp32_precision == "none"
