"""Augmentation of a pair against a plain transcription of the released formulation: python -m benchmarks.augment

Our own transcription, from measurements of the released code: elastic noise smoothed at full size by one long Gaussian
convolution an axis; fixed, damaged and moving image each resampled twice; 5,000 blocks shuffled and boxes painted in
Python loops; Bezier curves interpolated voxel by voxel. Image after image, where ours takes the batch. On CUDA ours
runs there, from draws of the CPU, and the released part stays on the CPU, as released. Where the
released numbers are not known (smoothing, block sizes) both sides use ours, so that both do the same work.

The second yardstick of the spatial part is MONAI's Rand3DElastic with an affine, drawn once a pair and applied to its
fixed, damaged and moving image as channels of one call; it is left out where MONAI is not installed.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import add_device, alternate, report
from gvsl_zoo.pretrain.augment import (
    BEZIER_PROBABILITY,
    ELASTIC_VOXELS,
    FALLING_PROBABILITY,
    KNOT_VOXELS,
    SHUFFLE_PROBABILITY,
    SHUFFLED_BLOCKS,
    SHUFFLED_EDGES,
    _painted_boxes,
    _smooth_noise,
    apply_pose,
    damage,
    sample_pose,
)
from gvsl_zoo.spatial import affine_coordinates, affine_matrix, identity_grid, sample

TRUNCATE = 4  # SDs on either side of the Gaussian: 65 taps


def released_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """White noise under a Gaussian of KNOT_VOXELS, SD 1: (3, *shape)."""
    radius = int(TRUNCATE * KNOT_VOXELS)
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1.0) / KNOT_VOXELS) ** 2)
    kernel /= kernel.norm()
    noise = torch.randn(3, 1, *shape, generator=generator)
    for axis in range(3):
        along = [len(kernel) if d == axis else 1 for d in range(3)]
        noise = F.conv3d(noise, kernel.view(1, 1, *along), padding=[n // 2 for n in along])
    return noise[:, 0]


def released_spatial(images: list[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Each image (1, 1, *shape) of a pair resampled at the affine, then at the elastic field."""
    shape = images[0].shape[2:]
    numbers = torch.zeros(1, 15)
    numbers[:, :6] = 2 * torch.rand(1, 6, generator=generator) - 1
    affine = affine_coordinates(affine_matrix(numbers), shape)
    elastic = identity_grid(shape, affine)[None] + ELASTIC_VOXELS * released_noise(tuple(shape), generator)
    return [sample(sample(image, affine), elastic) for image in images]


def monai_spatial(batch: Tensor, device: str) -> Callable[[], list[Tensor]]:
    """Each pair (3, *shape) of a batch under one random affine and elastic field of the same ranges as ours."""
    from monai.transforms import Rand3DElastic

    voxels = (
        ELASTIC_VOXELS * (2 * math.sqrt(math.pi) * KNOT_VOXELS) ** 1.5 * math.sqrt(3)
    )  # MONAI smooths uniform noise
    transform = Rand3DElastic(
        sigma_range=(KNOT_VOXELS, KNOT_VOXELS),
        magnitude_range=(voxels, voxels),
        prob=1.0,
        rotate_range=[math.radians(20)] * 3,
        scale_range=[0.25] * 3,
        mode="bilinear",
        padding_mode="zeros",
        device=torch.device(device),
    )
    transform.set_random_state(0)
    return lambda: [transform(pair) for pair in batch.to(device)]


def released_damage(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """One image (D, H, W) bent, shuffled and painted."""
    out = image.copy()
    if random.random() < BEZIER_PROBABILITY:
        t = np.linspace(0, 1, 1000)
        weights = np.stack([3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t)])
        curve_x, curve_y = random.random((2, 2)) @ weights + t**3
        curve_y = 1 - curve_y if random.random() < FALLING_PROBABILITY else curve_y
        out = np.interp(out, curve_x, curve_y).astype(np.float32)
    if random.random() < SHUFFLE_PROBABILITY:
        source = out.copy()
        edges = random.integers(SHUFFLED_EDGES[0], SHUFFLED_EDGES[1] + 1, 3)
        for _ in range(SHUFFLED_BLOCKS):
            corner = [random.integers(0, size - edge + 1) for size, edge in zip(out.shape, edges, strict=True)]
            box = tuple(slice(a, a + n) for a, n in zip(corner, edges, strict=True))
            window = source[box].flatten()
            random.shuffle(window)
            out[box] = window.reshape(edges)
    for box in _painted_boxes(1, out.shape, torch.Generator().manual_seed(int(random.integers(2**31))))[0]:
        out[box] = random.random(out[box].shape)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)  # as in a worker of a data loader
    add_device(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator, random = torch.Generator().manual_seed(0), np.random.default_rng(0)
    shape = (options.size,) * 3
    fixed, moving = (torch.rand(options.batch, 1, *shape, generator=generator) for _ in range(2))
    damaged = fixed.clone()
    images = torch.cat([fixed, moving], 1).to(options.device)
    alone = fixed.to(options.device)
    each = range(options.batch)

    def ours() -> None:  # the fixed image is damaged after it is posed: nothing is resampled for it
        apply_pose(images, sample_pose(shape, generator, options.batch, device=options.device))

    parts = {
        "elastic field": (
            lambda: [released_noise(shape, generator) for _ in each],
            lambda: _smooth_noise((options.batch, 3), shape, generator, device=options.device),
        ),
        "spatial": (
            lambda: [released_spatial([x[i : i + 1] for x in (fixed, damaged, moving)], generator) for i in each],
            ours,
        ),
        "appearance": (
            lambda: [released_damage(fixed[i, 0].numpy(), random) for i in each],
            lambda: damage(alone, generator),
        ),
    }
    medians: dict[str, float] = {}
    for part, (released, own) in parts.items():
        medians |= alternate({f"{part}, released": released, f"{part}, ours": own}, options.rounds)
    ratios = {part: round(medians[f"{part}, released"] / medians[f"{part}, ours"], 1) for part in parts}
    if find_spec("monai"):
        monai = monai_spatial(torch.cat([fixed, damaged, moving], 1), options.device)
        medians |= alternate({"spatial, MONAI": monai, "spatial, ours beside MONAI": ours}, options.rounds)
        ratios["spatial, against MONAI"] = round(medians["spatial, MONAI"] / medians["spatial, ours beside MONAI"], 1)
    facts = {"size": options.size, "batch": options.batch, "ratios": ratios}
    report("augment", medians, "spatial, released", device=options.device, **facts)


if __name__ == "__main__":
    main()
