"""Augmentation: one pose for all that must agree, damage that spoils appearance, all of it from the generator."""

from __future__ import annotations

import pytest
import torch
from formula import image

from gvsl_zoo.pretrain.augment import ELASTIC_VOXELS, _smooth_noise, apply_pose, damage, sample_pose
from gvsl_zoo.spatial import identity_grid, jacobian_determinant

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


@each_shape
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_identity_coordinates_keep_the_image(shape, mode):
    x = images(shape)
    torch.testing.assert_close(apply_pose(x, identity_grid(shape, x)[None], mode=mode), x, rtol=0, atol=2e-5)


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
