"""Augmentation on tensors: one pose for all images of a pair, and damage for the restoration head to undo.

Every draw comes from the passed generator; images are (B, C, *shape) in [0, 1], on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spatial import affine_coordinates, affine_matrix, sample

KNOT_VOXELS = 8.0  # distance of the control points of the elastic field, and the SD of its Gaussian basis
ELASTIC_VOXELS = 1.5  # SD of the elastic displacement
SHUFFLE_PROBABILITY, BEZIER_PROBABILITY, MAX_PAINTED_BOXES = 0.8, 0.9, 10  # He et al. 2025, sec. on augmentation


def sample_pose(shape: Sequence[int], generator: torch.Generator, batch: int = 1) -> Tensor:
    """Draw where each voxel of a posed image reads: coordinates in voxels, (batch, n, *shape).

    Rotation up to 20 degrees an axis and scale 0.75-1.25 (He et al. 2023), and a smooth elastic field.
    """
    ndim = len(shape)
    turns = 3 if ndim == 3 else 1
    numbers = torch.zeros(batch, 15 if ndim == 3 else 7, device=generator.device)
    random = torch.rand(batch, turns + ndim, generator=generator, device=generator.device)
    numbers[:, : turns + ndim] = 2 * random - 1
    coordinates = affine_coordinates(affine_matrix(numbers), shape)
    return coordinates + ELASTIC_VOXELS * _smooth_noise((batch, ndim), shape, generator)


def apply_pose(x: Tensor, pose: Tensor, *, mode: str = "bilinear") -> Tensor:
    """Resample x (B, C, *shape) once at the pose (B or 1, n, *out); zero (air) outside."""
    return sample(x, pose.to(x.device).expand(len(x), *pose.shape[1:]), mode=mode)


def _smooth_noise(lead: Sequence[int], shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Gaussian noise of unit variance, correlated over about `KNOT_VOXELS`, (*lead, *shape)."""
    bases = []
    for size in shape:
        knots = torch.arange(-KNOT_VOXELS, size + KNOT_VOXELS, KNOT_VOXELS, device=generator.device)
        distance = torch.arange(size, device=generator.device)[:, None] - knots
        basis = torch.exp(-0.5 * (distance / KNOT_VOXELS) ** 2)
        bases.append(basis / basis.norm(dim=1, keepdim=True))
    noise = torch.randn(*lead, *[b.shape[1] for b in bases], generator=generator, device=generator.device)
    for axis, basis in enumerate(bases, start=len(lead)):
        noise = torch.tensordot(noise, basis, dims=([axis], [1])).movedim(-1, axis)
    return noise


def damage(x: Tensor, generator: torch.Generator) -> Tensor:
    """A copy of x (B, C, *shape) with its appearance spoiled: intensities bent, blocks shuffled, boxes painted over.

    Source: the appearance transform of He et al. 2023, sec. 3.1 (after Zhou et al. 2019, Models Genesis).
    """
    spoiled = [_paint(_shuffle(_bend(image, generator), generator), generator) for image in x]
    return torch.stack(spoiled)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def _bend(image: Tensor, generator: torch.Generator) -> Tensor:
    """Map intensities along a random monotone cubic Bezier curve, half of the time a falling one."""
    if float(_uniform(generator, 1)) >= BEZIER_PROBABILITY:
        return image
    t = torch.linspace(0, 1, 256, device=generator.device)
    weights = torch.stack([3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t)])  # of the two inner control points
    curve_x, curve_y = _uniform(generator, 2, 2) @ weights + t**3
    if float(_uniform(generator, 1)) < 0.5:
        curve_y = 1 - curve_y
    levels = torch.linspace(0, 1, 1024, device=generator.device)
    right = torch.searchsorted(curve_x.contiguous(), levels).clamp(1, 255)
    left_x, right_x = curve_x[right - 1], curve_x[right]
    share = ((levels - left_x) / (right_x - left_x).clamp_min(1e-6)).clamp(0, 1)
    table = torch.lerp(curve_y[right - 1], curve_y[right], share).to(image.device)
    return table[(image.clamp(0, 1) * 1023).round().long()].to(image.dtype)


def _shuffle(image: Tensor, generator: torch.Generator) -> Tensor:
    """Permute the voxels inside a random half of small blocks (2 to 5 voxels an axis)."""
    if float(_uniform(generator, 1)) >= SHUFFLE_PROBABILITY:
        return image
    shape = image.shape[1:]
    edges = [min(2 + int(4 * float(_uniform(generator, 1))), size) for size in shape]
    counts = [size // edge for size, edge in zip(shape, edges, strict=True)]
    box = tuple(slice(0, count * edge) for count, edge in zip(counts, edges, strict=True))
    split = [n for pair in zip(counts, edges, strict=True) for n in pair]
    ndim = len(shape)
    order = [0, *range(1, 2 * ndim, 2), *range(2, 2 * ndim + 1, 2)]  # channel, blocks, voxels inside
    region = image[(slice(None), *box)]
    blocks = region.reshape(len(image), *split).permute(order)
    flat = blocks.flatten(1 + ndim).flatten(1, ndim)  # (C, blocks, voxels of a block)
    permutation = _uniform(generator, *flat.shape[1:]).argsort(-1)
    kept = _uniform(generator, flat.shape[1], 1) < 0.5
    permutation = torch.where(kept, torch.arange(flat.shape[2], device=generator.device), permutation)
    mixed = flat.gather(2, permutation.to(image.device).expand(len(image), -1, -1)).reshape(blocks.shape)
    out = image.clone()
    out[(slice(None), *box)] = mixed.permute([order.index(i) for i in range(2 * ndim + 1)]).reshape(region.shape)
    return out


def _paint(image: Tensor, generator: torch.Generator) -> Tensor:
    """Fill up to ten boxes, each a sixth to a third of an axis wide, with noise."""
    out = image.clone()
    for _ in range(int(float(_uniform(generator, 1)) * (MAX_PAINTED_BOXES + 1))):
        box = []
        for size, share, start in zip(
            image.shape[1:], _uniform(generator, image.ndim - 1), _uniform(generator, image.ndim - 1), strict=True
        ):
            extent = max(1, round(size * (1 + float(share)) / 6))
            first = int(float(start) * (size - extent + 1))
            box.append(slice(first, first + extent))
        patch = out[(slice(None), *box)]
        out[(slice(None), *box)] = _uniform(generator, *patch.shape).to(patch.device, patch.dtype)
    return out
