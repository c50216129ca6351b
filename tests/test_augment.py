"""Augmentation: one pose for all that must agree, damage that spoils appearance, all of it from the generator."""

from __future__ import annotations

import pytest
import torch
from formula import image

from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.pretrain.augment import (
    ELASTIC_VOXELS,
    KNOT_VOXELS,
    _blocks,
    _paint,
    _painted_boxes,
    _shuffle,
    _smooth_noise,
    apply_pose,
    bend,
    damage,
    sample_pose,
)
from gvsl_zoo.spatial import identity_grid, jacobian_determinant, sample

SHAPES = [(24, 20, 28), (32, 27)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(shape, batch=3):
    return torch.cat([image(f"scan{i}", shape) for i in range(batch)])


@each_shape
def test_a_seed_decides_the_pose(shape):
    first, same, other = (sample_pose(shape, seeded(seed), 2) for seed in (1, 1, 2))
    assert first.shape == (2, len(shape), *shape)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])


def distance_from_uniform(values, low, high):
    """Kolmogorov and Smirnov's: largest gap between the empirical and the uniform distribution, times sqrt(n)."""
    ranks = (torch.arange(values.numel()) + 0.5) / values.numel()
    expected = (values.flatten().sort().values - low) / (high - low)
    return (expected - ranks).abs().max() * values.numel() ** 0.5


@each_shape
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_a_zero_pose_is_the_identity_exactly(shape, mode):
    x, pose = images(shape), sample_pose(shape, seeded(), 3, strength=0)
    assert torch.equal(pose, identity_grid(shape, x).expand_as(pose))
    assert torch.equal(apply_pose(x, pose, mode=mode), x)
    assert torch.equal(apply_pose(x, pose[:1], mode=mode), x)


@each_shape
def test_a_pose_of_whole_voxels_copies_them_exactly(shape):
    x = images(shape, 1)
    moved = apply_pose(x, identity_grid(shape, x)[None] + 3)
    inside = tuple(slice(size - 3) for size in shape)
    assert torch.equal(moved[(..., *inside)], x[(..., *[slice(3, None) for _ in shape])])
    assert (moved[..., -3:] == 0).all()  # air comes in


@each_shape
def test_images_stacked_as_channels_are_posed_as_if_alone(shape):
    x, pose = images(shape, 4), sample_pose(shape, seeded(), 2)
    pairs = x.view(2, 2, *shape)
    stacked = apply_pose(pairs, pose)
    assert torch.equal(stacked, torch.stack([apply_pose(pairs[:, i : i + 1], pose)[:, 0] for i in range(2)], 1))


def test_as_many_poses_as_images_or_one_are_needed():
    with pytest.raises(ArgumentError, match=r"poses of shape \(2, 2, 8, 9\) .*; give one pose, or one an image"):
        apply_pose(images((8, 9)), sample_pose((8, 9), seeded(), 2))


@pytest.mark.parametrize("shape", [(4, 5, 6), (5, 4)], ids=str)
def test_rotation_and_scale_are_uniform_in_their_ranges(shape):
    poses = sample_pose(shape, seeded(), 2000, elastic_voxels=0.0).double()
    origin = (..., *[0] * len(shape))
    steps = [poses.select(2 + axis, 1)[(..., *[0] * (len(shape) - 1))] - poses[origin] for axis in range(len(shape))]
    linear = torch.stack(steps, -1)  # (B, n, n) = scale @ rotation
    scale = linear.norm(dim=-1)
    rotation = linear / scale[..., None]
    if len(shape) == 3:
        angles = [
            torch.atan2(rotation[:, 2, 1], rotation[:, 2, 2]),
            -torch.asin(rotation[:, 2, 0]),
            torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0]),
        ]
    else:
        angles = [torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0])]
    for values in angles:
        assert distance_from_uniform(values.rad2deg(), -20, 20) < 1.6  # exceeded once in a hundred
    for values in scale.unbind(1):
        assert distance_from_uniform(values, 0.75, 1.25) < 1.6
    numbers = torch.stack([*angles, *scale.unbind(1)])
    assert (numbers.corrcoef() - torch.eye(len(numbers))).abs().max() < 0.09  # 4 standard errors
    middle = poses.flatten(2).mean(-1)  # no translation
    torch.testing.assert_close(middle, (torch.tensor(shape) - 1).double().div(2).expand_as(middle), rtol=0, atol=1e-5)


@each_shape
def test_elastic_displacements_have_the_sd_asked_for(shape):
    still, bent = (sample_pose(shape, seeded(), 300, elastic_voxels=sd) for sd in (0.0, ELASTIC_VOXELS))
    displacement = bent - still
    assert displacement.std() == pytest.approx(ELASTIC_VOXELS, rel=0.05)
    assert sample_pose(shape, seeded(), 300, elastic_voxels=3.0).sub(still).std() == pytest.approx(3.0, rel=0.05)
    assert displacement.mean().abs() < 0.1


@pytest.mark.parametrize("shape", [(33, 1, 2), (3, 33)], ids=str)
@pytest.mark.parametrize("distance", [4, 8, 16, 32])
def test_elastic_noise_correlates_like_white_noise_under_a_gaussian(shape, distance):
    noise = _smooth_noise((4000, 2), shape, seeded())
    axis = 2 + shape.index(33)
    first, second = (noise.select(axis, index).flatten() for index in (0, distance))
    expected = torch.tensor(-(distance**2) / (2 * KNOT_VOXELS) ** 2).exp()
    assert (first * second).mean() == pytest.approx(expected.item(), abs=0.04)  # 4 standard errors
    assert (noise[:, 0] * noise[:, 1]).mean().abs() < 0.04  # axes move independently


@each_shape
def test_a_single_pose_serves_the_whole_batch(shape):
    x, pose = images(shape), sample_pose(shape, seeded())
    one_by_one = torch.cat([apply_pose(x[i : i + 1], pose) for i in range(len(x))])
    assert torch.equal(apply_pose(x, pose), one_by_one)


@each_shape
def test_image_and_labels_agree_after_one_pose(shape):
    labels, pose = (images(shape) > 0.5).float(), sample_pose(shape, seeded(3), 3)
    soft, hard = apply_pose(labels, pose), apply_pose(labels, pose, mode="nearest")
    corners = 2.0 ** len(shape)  # the nearest one weighs at least 1 / corners
    assert set(hard.unique().tolist()) == {0, 1}
    assert (hard[soft > 1 - 1 / corners + 1e-4] == 1).all()
    assert (hard[soft < 1 / corners - 1e-4] == 0).all()


@each_shape
def test_a_pose_keeps_the_range_and_fills_with_air(shape):
    posed = apply_pose(images(shape) + 0.1, sample_pose(shape, seeded(1), 3))
    assert posed.min() == 0
    assert posed.max() <= 1.1 + 1e-5


@each_shape
def test_poses_bend_but_do_not_fold(shape):
    poses = sample_pose(shape, seeded(), 16)
    volume = jacobian_determinant(poses - identity_grid(shape, poses))
    assert volume.min() > 0
    assert volume.std() > 0.05


@pytest.mark.parametrize("shape", [(9, 17), (8, 1, 5)], ids=str)
def test_elastic_noise_has_unit_variance_everywhere(shape):
    noise = _smooth_noise((4000,), shape, seeded())
    assert noise.shape == (4000, *shape)
    assert (noise.var(0) - 1).abs().max() < 0.12  # 5 standard errors
    assert noise.mean(0).abs().max() < 0.08


def test_elastic_noise_is_smooth():
    noise = _smooth_noise((200,), (32, 40), seeded())
    assert noise.diff(dim=1).square().mean() < 0.02  # a Gaussian basis of 8 voxels: 1 / (2 * 8^2) = 0.008
    assert ELASTIC_VOXELS * noise.std() == pytest.approx(ELASTIC_VOXELS, rel=0.15)


@each_shape
@pytest.mark.parametrize("seed", range(6))
def test_damage_keeps_shape_and_range_and_leaves_the_original_alone(shape, seed):
    x = images(shape)
    before = x.clone()
    damaged = damage(x, seeded(seed))
    assert damaged.shape == x.shape
    assert damaged.dtype == x.dtype
    assert damaged.min() >= 0
    assert damaged.max() <= 1
    assert torch.equal(x, before)
    assert not torch.equal(damaged, x)


@each_shape
def test_a_seed_decides_the_damage(shape):
    first, same, other = (damage(images(shape), seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_nine_images_of_ten_are_bent_half_of_them_downwards():
    ramp = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    x = ramp.repeat(1000, 1, 1, 1)
    bend(x, seeded())
    values = x.flatten(1)
    still = (values == ramp.flatten()).all(1)
    rising, falling = (values.diff(dim=1) >= -1e-6).all(1), (values.diff(dim=1) <= 1e-6).all(1)
    assert (rising | falling).all()
    assert 0.87 < 1 - still.float().mean() < 0.93
    assert 0.45 < falling[~still].float().mean() < 0.55
    ends = values[~still][:, [0, -1]].sort(1).values
    torch.testing.assert_close(ends, torch.tensor([0.0, 1.0]).expand_as(ends), rtol=0, atol=2e-3)


def test_bent_intensities_lie_on_a_cubic_bezier_curve():
    x = torch.rand(20, 1, 16, 16, generator=seeded())
    bent = x.clone()
    bend(bent, seeded(5))
    numbers = torch.rand(20, 6, generator=seeded(5)).double()
    t = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    for before, after, (chance, falls, x1, y1, x2, y2) in zip(x, bent, numbers, strict=True):
        inner = 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t)
        curve_x, curve_y = x1 * inner[0] + x2 * inner[1] + t**3, y1 * inner[0] + y2 * inner[1] + t**3
        place = torch.searchsorted(curve_x, before.double().flatten()).clamp_max(200_000)
        expected = 1 - curve_y[place] if falls < 0.5 else curve_y[place]
        expected = before.double().flatten() if chance >= 0.9 else expected
        grey_level = 0.5 / 4095 * (curve_y.diff() / curve_x.diff().clamp_min(1e-9)).max()
        assert (after.flatten() - expected).abs().max() < grey_level + 1e-3


def test_four_images_of_five_are_shuffled():
    x = torch.rand(1000, 1, 12, 12, generator=seeded())
    before = x.clone()
    _shuffle(x, seeded(1))
    assert 0.76 < (x != before).flatten(1).any(1).float().mean() < 0.84


@each_shape
def test_shuffling_moves_voxels_a_few_steps_within_blocks(shape):
    place = identity_grid(shape, torch.zeros(1))[None].repeat(20, 1, *[1] * len(shape))  # a voxel says whence it is
    before = place.clone()
    _shuffle(place, seeded())
    step = (place - before).abs().flatten(2)
    moved = step.amax((1, 2)) > 0
    assert step.max() == 4  # the widest block has 5 voxels
    share = (step.amax(1) > 0).float().mean(1)[moved]
    assert 0.3 < share.mean() < 0.55  # half of the voxels lie in a block, few of them stay where they were
    means = (place - before).flatten(2).mean(-1)
    assert means.abs().max() < 0.3


@pytest.mark.parametrize(("voxels", "block", "expected"), [(96**3, 27, 5000), (48**3, 27, 2839), (9, 8, 1)])
def test_as_many_blocks_are_shuffled_as_hide_half_of_a_small_image(voxels, block, expected):
    assert _blocks(voxels, block) == expected


@pytest.mark.parametrize("shape", [(40, 41, 42), (50, 60)], ids=str)
def test_augmentation_gives_the_same_bits_with_any_number_of_threads(shape):
    x = torch.rand(1, 2, *shape, generator=seeded())
    pose = sample_pose(shape, seeded())
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append((damage(x, seeded()), apply_pose(x, pose)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for several in results[1:] for a, b in zip(results[0], several, strict=True))


@pytest.mark.parametrize("shape", [(6, 7, 8), (10, 9)], ids=str)
def test_a_pose_reads_what_grid_sample_reads(shape):
    x, pose = images(shape, 2), sample_pose(shape, seeded(), 2, elastic_voxels=4.0)
    for mode in ("bilinear", "nearest"):
        torch.testing.assert_close(apply_pose(x, pose, mode=mode), sample(x, pose, mode=mode), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(12, 7, 8), (20, 9)], ids=str)
def test_sharing_points_out_among_threads_leaves_values_and_gradients_as_they_are(shape):
    x, pose = images(shape, 1), sample_pose(shape, seeded())
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            place = pose.clone().requires_grad_()
            read = sample(x, place)
            read.square().sum().backward()
            results.append((read.detach(), place.grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for several in results[1:] for a, b in zip(results[0], several, strict=True))


@each_shape
def test_up_to_ten_boxes_are_painted_a_sixth_to_a_third_of_an_axis_wide(shape):
    several = _painted_boxes(2000, shape, seeded())
    counts = torch.tensor([len(boxes) for boxes in several])
    shares = counts.bincount(minlength=11) / 2000
    assert len(shares) == 11
    assert (shares - 1 / 11).abs().max() < 0.025  # 4 standard errors
    for axis, size in enumerate(shape):
        edges = torch.tensor([box[axis].stop - box[axis].start for boxes in several for box in boxes])
        starts = torch.tensor([box[axis].start for boxes in several for box in boxes])
        assert edges.min() - size / 6 < 1 and size / 3 - edges.max() < 1
        assert edges.min() >= int(size / 6) and edges.max() <= round(size / 3)
        assert edges.float().mean() == pytest.approx(size / 4, rel=0.02)
        assert starts.min() == 0 and (starts + edges).max() == size


def test_painted_boxes_are_uniform_noise_and_the_rest_is_left_alone():
    x = torch.full((50, 1, 24, 24, 24), 2.0)
    _paint(x, seeded(4))
    noise = x[x != 2]
    assert distance_from_uniform(noise[:20000], 0, 1) < 1.6
    outside = torch.ones_like(x, dtype=torch.bool)
    for index, boxes in enumerate(_painted_boxes(50, (24, 24, 24), seeded(4))):
        for box in boxes:
            outside[(index, slice(None), *box)] = False
    assert torch.equal(outside, x == 2)


def test_damage_passes_no_gradient_and_takes_any_layout():
    x = images((16, 16, 16), 2)
    wanted = damage(x, seeded())
    again = x.to(memory_format=torch.channels_last_3d).requires_grad_()
    assert torch.equal(damage(again, seeded()), wanted)
    assert not damage(again, seeded()).requires_grad


@each_shape
def test_images_of_a_batch_are_damaged_differently(shape):
    damaged = damage(images(shape, 1).expand(2, -1, *shape), seeded())
    assert not torch.equal(damaged[0], damaged[1])


@each_shape
def test_damage_changes_intensities_and_texture(shape):
    x = images(shape, 1).expand(40, -1, *shape)
    damaged = damage(x, seeded())
    histograms = torch.stack([torch.histc(d, 10, 0, 1) for d in damaged]) / x[0].numel()
    moved = (histograms - torch.histc(x[0], 10, 0, 1) / x[0].numel()).abs().sum(1) / 2
    assert moved.median() > 0.1  # share of voxels that change their bin
    assert damaged.diff(dim=-1).abs().mean() > 1.2 * x.diff(dim=-1).abs().mean()


@each_shape
def test_channels_of_an_image_are_damaged_alike_but_for_the_noise(shape):
    x = images(shape, 1).repeat(1, 2, *[1] * len(shape))
    damaged = damage(x, seeded(2))
    assert damaged.shape == x.shape
    assert (damaged[:, 0] == damaged[:, 1]).float().mean() > 0.3


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 9), (1, 5)], ids=str)
def test_tiny_images_can_be_posed_and_damaged(shape):
    x = torch.rand(1, 1, *shape, generator=seeded())
    assert apply_pose(damage(x, seeded()), sample_pose(shape, seeded())).shape == x.shape


@pytest.mark.gpu
@each_shape
def test_a_cuda_generator_draws_on_the_gpu(shape):
    generator = torch.Generator("cuda").manual_seed(0)
    pose = sample_pose(shape, generator, 3)
    damaged = damage(images(shape).cuda(), generator)
    assert pose.is_cuda
    assert apply_pose(damaged, pose).is_cuda


@pytest.mark.gpu
@each_shape
def test_a_cpu_generator_gives_the_same_augmentation_on_the_gpu(shape):
    x = images(shape)
    here, there = (sample_pose(shape, seeded(), 3, device=device) for device in ("cpu", "cuda"))
    torch.testing.assert_close(there.cpu(), here, rtol=0, atol=1e-4)
    torch.testing.assert_close(apply_pose(x.cuda(), here).cpu(), apply_pose(x, here), rtol=0, atol=1e-4)
    torch.testing.assert_close(damage(x.cuda(), seeded()).cpu(), damage(x, seeded()), rtol=0, atol=1e-6)


@pytest.mark.gpu
@each_shape
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_seed_decides_the_augmentation_on_the_gpu(shape, device):
    x = images(shape).cuda()
    first, same = (
        (sample_pose(shape, generator, 3, device="cuda"), damage(x, generator))
        for generator in (torch.Generator(device).manual_seed(7) for _ in range(2))
    )
    assert torch.equal(first[0], same[0]) and torch.equal(first[1], same[1])


@pytest.mark.gpu
@each_shape
def test_a_zero_pose_is_the_identity_exactly_on_the_gpu(shape):
    x = images(shape).cuda()
    assert torch.equal(apply_pose(x, sample_pose(shape, seeded(), 3, strength=0, device="cuda")), x)
