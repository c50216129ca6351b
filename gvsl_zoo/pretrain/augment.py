"""Augmentation on tensors: one pose for all images of a pair, and damage for the restoration head to undo.

Every draw comes from the passed generator, on its device; images are (B, C, *shape) in [0, 1], 2D or 3D, on any device.
With a generator on the CPU nothing here waits for a GPU, and the draws are the same on every device.
Numbers with a source beside them are the papers'. All others are our choice: the papers' are not public knowledge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from ..spatial import affine_matrix, full_precision

# Spatial. Rotation uniform within 20 degrees an axis, scale uniform in 0.75-1.25 an axis (He et al. 2023, 2025: the
# ranges of `spatial.affine_matrix`); no translation, no shear. Elastic: white noise under a Gaussian of SD
# KNOT_VOXELS, so that two displacements d voxels apart correlate by exp(-d^2 / (2 KNOT_VOXELS)^2).
KNOT_VOXELS = 8.0  # also the distance of the control points
ELASTIC_VOXELS = 1.5  # SD of the displacement along each axis

PIECE_VOXELS = 2**17  # resampled at a time, so that what lies between stays in the cache

# Appearance (He et al. 2025): share of images bent and shuffled; boxes painted, uniformly 0 to 10. No out-painting.
SHUFFLE_PROBABILITY, BEZIER_PROBABILITY, MAX_PAINTED_BOXES = 0.8, 0.9, 10
PAINTED_SHARE = (1 / 6, 1 / 3)  # edge of a box, uniform, of the image's (Zhou et al. 2019, Models Genesis)
FALLING_PROBABILITY = 0.5  # of a curve that inverts: bright to dark
CURVE_POINTS, GREY_LEVELS = 1024, 4096  # of a Bezier curve, and of its look-up table: finer than one HU
SHUFFLED_BLOCKS = 5000  # He et al. 2023, released code: its crops have 128^3 voxels or fewer
SHUFFLED_EDGES = (2, 5)  # voxels, uniform, an axis
SHUFFLED_SHARE = 0.5  # of a small image: as many blocks as hide this share of it, 5,000 at most


def sample_pose(
    shape: Sequence[int],
    generator: torch.Generator,
    batch: int = 1,
    *,
    elastic_voxels: float = ELASTIC_VOXELS,
    strength: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw where each voxel of a posed image reads: coordinates in voxels, (batch, n, *shape), float32.

    Args:
        shape: of the posed image, 2D or 3D.
        generator: its device need not be that of the pose.
        elastic_voxels: SD of the elastic displacement along each axis.
        strength: in [0, 1], multiplies angles, scalings and displacements; 0 gives the identity, exactly.
        device: of the pose; by default the generator's.
    """
    ndim, device = len(shape), device or generator.device
    turns = 3 if ndim == 3 else 1
    numbers = torch.zeros(batch, 15 if ndim == 3 else 7, device=generator.device)
    numbers[:, : turns + ndim] = strength * (2 * _uniform(generator, batch, turns + ndim) - 1)
    matrix = moved(affine_matrix(numbers)[:, :, :-1], device)  # (B, n, n): no translation
    coordinates = _smooth_noise((batch, ndim), shape, generator, strength * elastic_voxels, device)
    for axis, size in enumerate(shape):
        reach = torch.arange(size, device=device) - (size - 1) / 2
        turned = matrix[:, :, axis, None] * reach  # (B, n, size)
        turned[:, axis] += (size - 1) / 2  # once for each coordinate
        coordinates += turned.view(batch, ndim, *[size if d == axis else 1 for d in range(ndim)])
    return coordinates


@torch.no_grad()
def apply_pose(x: Tensor, pose: Tensor, *, mode: str = "bilinear") -> Tensor:
    """Resample x (B, C, *shape) once at the pose (B or 1, n, *out): (B, C, *out) float32, zero (air) outside.

    Images that share a pose cost one look-up when stacked as channels. Whole-number coordinates copy voxels exactly,
    which grid_sample's scaling to [-1, 1] and back does not; in 3D on a CPU it also takes longer.

    Args:
        mode: "bilinear" (linear along every axis), or "nearest" for label maps.
    """
    ndim = x.ndim - 2
    if len(pose) not in (1, len(x)) or pose.shape[1:2] != (ndim,) or pose.ndim != x.ndim:
        raise ArgumentError(
            f"poses of shape {tuple(pose.shape)} for images of {tuple(x.shape)}",
            f"give one pose, or one an image, each ({ndim}, *shape)",
        )
    pose = pose.to(x.device, torch.float32)
    framed = F.pad(x.float(), [1] * 2 * ndim)  # a frame of air
    out = torch.empty(*x.shape[:2], *pose.shape[2:], device=x.device)
    together = 1 if len(pose) == len(x) else len(x)  # images that share a pose
    sources = framed.view(-1, together * x.shape[1], *framed.shape[2:])
    targets = out.view(-1, together * x.shape[1], *out.shape[2:])
    rows = pose.shape[2]
    if x.device.type == "cpu":  # pieces that fit the cache
        rows = max(1, PIECE_VOXELS // max(1, pose[0, 0, :1].numel()))
    for source, target, coordinates in zip(sources, targets, pose, strict=True):
        for start in range(0, pose.shape[2], rows):
            _read(source, coordinates[:, start : start + rows], target[:, start : start + rows], mode)
    return out


def _read(framed: Tensor, coordinates: Tensor, out: Tensor, mode: str) -> None:
    """Fill out (C, *part) from an image in a frame of air at coordinates (n, *part) counted without the frame."""
    index = torch.zeros((), dtype=torch.int32, device=framed.device)
    shares = []
    for axis, (size, stride) in enumerate(zip(framed.shape[1:], framed.stride()[1:], strict=True)):
        place = (coordinates[axis] + 1).clamp_(0, size - 1)
        first = (place.round() if mode == "nearest" else place.floor().clamp_max_(size - 2)).int()
        shares.append((place.sub_(first), stride))
        index = index + first.mul_(stride)
    index = index.flatten()

    def corner(channels: Tensor, like: Tensor, offset: int, axis: int) -> Tensor:
        if mode == "nearest" or axis == len(shares):
            return channels[..., offset:].index_select(-1, index).view(like.shape)
        share, stride = shares[axis]
        near, far = (corner(channels, like, offset + step, axis + 1) for step in (0, stride))
        return near.lerp_(far, share)

    source = framed.flatten(1)
    parts = zip(source, out, strict=True) if source.is_cpu else [(source, out)]  # a cache holds one, a launch takes all
    for channels, target in parts:
        target.copy_(corner(channels, target, 0, 0))


def damage(x: Tensor, generator: torch.Generator) -> Tensor:
    """A copy of x (B, C, *shape) with its appearance spoiled: intensities bent, blocks shuffled, boxes painted over.

    Each image is damaged on its own, its channels alike but for the painted noise. No gradient flows back.

    Source: the appearance transform of He et al. 2023, sec. 3.1 (after Zhou et al. 2019, Models Genesis).
    """
    spoiled = x.detach().clone(memory_format=torch.contiguous_format)
    bend(spoiled, generator)
    _shuffle(spoiled, generator)
    _paint(spoiled, generator)
    return spoiled


def moved(x: Tensor, device: torch.device | str) -> Tensor:
    """x on a device; to CUDA through pinned memory, so that the copy waits for its turn there, and nobody here."""
    if x.is_cpu and torch.device(device).type == "cuda":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def _smooth_noise(
    lead: Sequence[int],
    shape: Sequence[int],
    generator: torch.Generator,
    sd: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Gaussian noise of one SD everywhere, smooth over `KNOT_VOXELS`, (*lead, *shape).

    Drawn at knots and expanded axis by axis in products with small Gaussian bases: white noise smoothed at full size
    has the same law but for a ripple of 1e-4 in the correlation, and takes hundreds of times longer.
    """
    device = device or generator.device
    bases = []
    for size in shape:
        knots = torch.arange(-3 * KNOT_VOXELS, size + 3 * KNOT_VOXELS, KNOT_VOXELS, device=device)
        distance = torch.arange(size, device=device)[:, None] - knots
        basis = torch.exp(-0.5 * (distance / KNOT_VOXELS) ** 2)
        bases.append(basis / basis.norm(dim=1, keepdim=True))  # (size, knots)
    knots_of = [basis.shape[1] for basis in bases]
    noise = sd * moved(torch.randn(*lead, *knots_of, generator=generator, device=generator.device), device)
    with full_precision(noise):
        noise = noise @ bases[-1].T
        for axis in reversed(range(len(shape) - 1)):
            noise = bases[axis] @ noise.reshape(-1, knots_of[axis], math.prod(shape[axis + 1 :]))
    return noise.view(*lead, *shape)


def bend(x: Tensor, generator: torch.Generator) -> None:
    """Map the intensities of most images (B, C, *shape), in place, along random monotone cubic Bezier curves."""
    numbers = _uniform(generator, len(x), 6)
    chosen = (numbers[:, 0] < BEZIER_PROBABILITY).nonzero()[:, 0].tolist()
    t = torch.linspace(0, 1, CURVE_POINTS, device=generator.device)
    inner = numbers[:, 2:].view(-1, 2, 2, 1)  # x and y of the two inner control points, between (0, 0) and (1, 1)
    curve_x, curve_y = (3 * t * (1 - t) ** 2 * inner[:, 0] + 3 * t**2 * (1 - t) * inner[:, 1] + t**3).unbind(1)
    curve_y = torch.where(numbers[:, 1:2] < FALLING_PROBABILITY, 1 - curve_y, curve_y)
    levels = torch.linspace(0, 1, GREY_LEVELS, device=generator.device).expand(len(x), -1).contiguous()
    right = torch.searchsorted(curve_x.contiguous(), levels).clamp(1, CURVE_POINTS - 1)
    left_x, right_x = curve_x.gather(1, right - 1), curve_x.gather(1, right)
    share = ((levels - left_x) / (right_x - left_x).clamp_min(1e-6)).clamp(0, 1)
    tables = torch.lerp(curve_y.gather(1, right - 1), curve_y.gather(1, right), share).clamp(0, 1)
    tables = moved(tables, x.device)
    for index in chosen:
        entry = x[index].float().clamp(0, 1).mul_(GREY_LEVELS - 1).add_(0.5).int()
        x[index] = tables[index].index_select(0, entry.flatten()).view_as(entry)


def _shuffle(x: Tensor, generator: torch.Generator) -> None:
    """Permute the voxels inside many small blocks at random places of most images, in place.

    All blocks of an image have one size and one permutation; where blocks overlap the later one counts, and every block
    reads the image as it was.
    """
    shape = x.shape[2:]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    low, high = SHUFFLED_EDGES
    for image, (chance, *edges_of) in zip(x, _uniform(generator, len(x), 1 + len(shape)).tolist(), strict=True):
        if chance >= SHUFFLE_PROBABILITY:
            continue
        edges = [min(low + int((high - low + 1) * share), size) for share, size in zip(edges_of, shape, strict=True)]
        first, inner = (torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(2))
        blocks = _blocks(shape.numel(), math.prod(edges))
        corners = moved(_uniform(generator, len(shape), blocks), x.device)
        for corner, edge, size, stride in zip(corners, edges, shape, strides, strict=True):
            first = first + (corner * (size - edge + 1)).long().clamp_max(size - edge) * stride
            steps = torch.arange(edge, device=x.device) * stride
            inner = (inner[:, None] + steps).flatten()
        order = torch.randperm(math.prod(edges), generator=generator, device=generator.device)
        mixed = inner[moved(order, x.device)]
        places, origins = ((first[:, None] + offsets).flatten() for offsets in (inner, mixed))
        turn = torch.arange(len(places), dtype=torch.int32, device=x.device)
        last = turn.new_zeros(shape.numel()).scatter_reduce_(0, places, turn, "amax")
        flat = image.view(len(image), -1)
        flat[:, places] = flat[:, origins[last[places]]]  # whoever writes a voxel writes the same


def _blocks(voxels: int, block: int) -> int:
    """How many blocks to shuffle: random places cover 1 - exp(-count * block / voxels) of an image."""
    enough = -math.log1p(-SHUFFLED_SHARE) * voxels / block
    return max(1, min(SHUFFLED_BLOCKS, round(enough)))


def _paint(x: Tensor, generator: torch.Generator) -> None:
    """Fill boxes of each image with uniform noise, in place."""
    boxes = _painted_boxes(len(x), x.shape[2:], generator)
    patches = [x[index][(slice(None), *box)] for index, several in enumerate(boxes) for box in several]
    sizes = [patch.numel() for patch in patches]
    noise = moved(_uniform(generator, sum(sizes)).to(x.dtype), x.device)
    for patch, values in zip(patches, noise.split(sizes), strict=True):
        patch.copy_(values.view_as(patch))


def _painted_boxes(batch: int, shape: Sequence[int], generator: torch.Generator) -> list[list[tuple[slice, ...]]]:
    """The boxes of each image."""
    counts = (_uniform(generator, batch) * (MAX_PAINTED_BOXES + 1)).int().tolist()
    low, high = PAINTED_SHARE
    numbers = _uniform(generator, batch, MAX_PAINTED_BOXES, len(shape), 2).tolist()
    boxes = []
    for count, rows in zip(counts, numbers, strict=True):
        several = []
        for row in rows[: min(count, MAX_PAINTED_BOXES)]:
            extents = [max(1, round(size * (low + (high - low) * u))) for size, (u, _) in zip(shape, row, strict=True)]
            free = [size - extent + 1 for size, extent in zip(shape, extents, strict=True)]
            starts = [min(int(u * n), n - 1) for n, (_, u) in zip(free, row, strict=True)]
            several.append(tuple(slice(a, a + n) for a, n in zip(starts, extents, strict=True)))
        boxes.append(several)
    return boxes
