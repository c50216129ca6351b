"""Instance optimisation: an affine map and a diffeomorphic displacement, fitted to one pair of images, 2D or 3D."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..losses import local_correlation, smoothness_loss
from ..spatial import affine_coordinates, identity_grid, sample

LINEAR = {2: "bilinear", 3: "trilinear"}


class Level(NamedTuple):
    """Voxels of the scan that are one of the images compared, and one of the velocity; its part of the steps."""

    image: int
    velocity: int
    part: int


# Chosen with a nano CT model on pairs of synthetic subjects and of patients that no number of the docs uses.
SQUARINGS = 6  # of scaling and squaring: 64 small steps (Arsigny et al. 2006)
AFFINE_LEVEL, AFFINE_PART = 4, 3  # as of the levels
LEVELS = (Level(8, 8, 2), Level(4, 4, 2), Level(2, 4, 2), Level(1, 2, 1))
WINDOW = 5  # voxels of a level, of the local correlation
RATE = 0.4  # voxels of a level a step, of Adam
AFFINE_RATE = 0.03  # a step, of the linear part; a step of the shift moves as many voxels as that does half way out
SMOOTHNESS = 2.0  # of the velocity, against a correlation and a feature distance of weight 1
EPSILON = 1e-6  # of Adam: gradients of mere rounding make no steps

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Images:
    """What is compared of two images on one grid.

    fixed, moving: (1, 1, *shape) in [0, 1]. masks: where fixed and moving image count, each (1, 1, *shape) in [0, 1].
    features: of both, or none, (1, C, *any) over the same extent; they count on no grid finer than theirs.
    """

    fixed: Tensor
    moving: Tensor
    features: tuple[Tensor, Tensor] | None
    masks: tuple[Tensor, Tensor]

    def recorded(self) -> Images:
        """The same, of which gradients may be taken."""
        features = None if self.features is None else tuple(map(recorded, self.features))
        masks = tuple(map(recorded, self.masks))
        return Images(recorded(self.fixed), recorded(self.moving), features, masks)  # type: ignore[arg-type]

    def coarse(self, factor: int) -> Images:
        """The same on a grid `factor` times coarser, feature vectors scaled to length 1."""
        shape = _coarser(self.fixed.shape[2:], factor)
        fixed, moving, *masks = (averaged(x, shape) for x in (self.fixed, self.moving, *self.masks))
        features = None
        if self.features is not None and all(a <= b for a, b in zip(shape, self.features[0].shape[2:], strict=True)):
            a, b = (F.normalize(averaged(f.float(), shape), dim=1) for f in self.features)
            features = (a, b)
        return Images(fixed, moving, features, (masks[0], masks[1]))

    def distance(self, coordinates: Tensor) -> Tensor:
        """1 - mean local correlation, and the mean cosine distance of the features, where both masks say so; scalar.

        coordinates: where the voxels of the fixed image read in the moving one, (1, n, *shape), voxels.
        """
        fields = [self.moving, self.masks[1], *(self.features or ())[1:]]
        warped = sample(torch.cat(fields, 1), coordinates)
        weight = self.masks[0] * warped[:, 1:2].detach()
        total = weight.sum().clamp_min(1e-6)
        cost = 1 - (local_correlation(warped[:, :1], self.fixed, WINDOW) * weight).sum() / total
        if self.features is not None:
            cosine = (warped[:, 2:] * self.features[0]).sum(1, keepdim=True)
            cost = cost + ((1 - cosine) * weight).sum() / total
        return cost


def fit(
    images: Images, steps: int, start: Tensor | None = None, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Fit an affine map A and a velocity v so that moving(A(exp(v)(x))) looks like fixed(x).

    Args:
        steps: of Adam, 3 of 10 on the affine map.
        start: displacement to start from, (1, n, *shape), voxels; default none.
        progress: called with (steps done, steps in all).

    Returns: affine (1, n, n + 1) about the grid's centre, and the whole displacement (1, n, *shape), voxels. What does
        not come out better than the start on the finest level is not taken: then it is the start.
    Source: exponential of a stationary velocity by scaling and squaring (Arsigny et al. 2006).
    """
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        return _fit(images.recorded(), steps, None if start is None else recorded(start), progress)


def recorded(x: Tensor) -> Tensor:
    """A tensor that a gradient may be taken of, as is not allowed of one made in inference mode."""
    return x.clone() if x.is_inference() else x


def _fit(images: Images, steps: int, start: Tensor | None, progress: Progress | None) -> tuple[Tensor, Tensor]:
    shape = images.fixed.shape[2:]
    start = images.fixed.new_zeros(1, len(shape), *shape) if start is None else start.float()
    affine = fit_affine(start, images.masks[0])
    done = 0
    for_affine, *for_levels = _shared_out(steps)

    def step(optimizer: torch.optim.Optimizer, cost: Tensor) -> None:
        nonlocal done
        optimizer.zero_grad()
        cost.backward()
        optimizer.step()
        done += 1
        if progress:
            progress(done, steps)

    coarse = images.coarse(AFFINE_LEVEL)
    change = torch.zeros_like(affine).requires_grad_()
    reach = torch.tensor(coarse.fixed.shape[2:]).max() / 4
    optimizer = torch.optim.Adam([change], lr=AFFINE_RATE, eps=EPSILON)
    for _ in range(for_affine):
        moved = affine_on(affine, shape, coarse.fixed.shape[2:]) + torch.cat(
            [change[..., :-1], change[..., -1:] * reach], -1
        )
        step(optimizer, coarse.distance(affine_coordinates(moved, coarse.fixed.shape[2:])))
    ratio = _ratio(shape, coarse.fixed.shape[2:], affine)
    affine = affine + torch.cat([change[..., :-1], change[..., -1:] * reach * ratio], -1).detach()

    velocity = _residual(start, affine)
    for (factor, knots, _), count in zip(LEVELS, for_levels, strict=True):
        level = images.coarse(factor)
        size = level.fixed.shape[2:]
        velocity = _resize(velocity, _coarser(shape, knots)).requires_grad_()
        optimizer = torch.optim.Adam([velocity], lr=RATE, eps=EPSILON)
        mapped = affine_on(affine, shape, size)
        for _ in range(count):
            inner = identity_grid(size, velocity) + _resize(exponential(velocity), size)
            cost = level.distance(_apply(mapped, inner)) + SMOOTHNESS * smoothness_loss(velocity)
            step(optimizer, cost)
        velocity = velocity.detach()
    with torch.no_grad():
        inner = identity_grid(shape, start) + _resize(exponential(velocity), shape)
        found = _apply(affine, inner) - identity_grid(shape, start)
        finest = images.coarse(LEVELS[-1].image)
        size = finest.fixed.shape[2:]
        before, after = (finest.distance(identity_grid(size, u) + _resize(u, size)) for u in (start, found))
        return (affine, found) if after < before else (fit_affine(start, images.masks[0]), start)


def _shared_out(steps: int) -> list[int]:
    """Steps of the affine map and of every level, in proportion to their parts, and all of them in the end."""
    totals = list(itertools.accumulate([AFFINE_PART, *(level.part for level in LEVELS)], initial=0))
    ends = [round(steps * total / totals[-1]) for total in totals]
    return [end - begin for begin, end in itertools.pairwise(ends)]


def _coarser(shape: torch.Size, factor: int) -> torch.Size:
    """The shape of a grid `factor` times coarser over the same extent."""
    return torch.Size(-(-size // factor) for size in shape)


def averaged(x: Tensor, size: torch.Size) -> Tensor:
    """Means of an image (1, C, *shape) over the cells of a coarser grid."""
    return F.adaptive_avg_pool2d(x, size) if len(size) == 2 else F.adaptive_avg_pool3d(x, size)  # type: ignore[arg-type]


def exponential(velocity: Tensor) -> Tensor:
    """Displacement (1, n, *shape) of the flow along a stationary velocity, both in voxels."""
    displacement = velocity / 2**SQUARINGS
    grid = identity_grid(velocity.shape[2:], velocity)
    for _ in range(SQUARINGS):
        displacement = displacement + sample(displacement, grid + displacement, padding="border")
    return displacement


def fit_affine(displacement: Tensor, mask: Tensor) -> Tensor:
    """The affine map nearest to x + displacement(x) by least squares of the mask, (1, n, n + 1) about the centre.

    Of those that are equally near, as there are along an axis of one voxel, the one nearest to the identity.
    """
    shape = displacement.shape[2:]
    grid = identity_grid(shape, displacement)
    centre = grid.new_tensor([(size - 1) / 2 for size in shape])[:, None]
    points = grid.flatten(1) - centre  # (n, voxels)
    moves = displacement[0].flatten(1).double()
    known = torch.cat([points, torch.ones_like(points[:1])]).double()
    weighted = known * (mask.flatten().double() + 1e-6)
    change = torch.linalg.pinv(weighted @ known.T, hermitian=True) @ (weighted @ moves.T)
    return (torch.eye(len(shape), len(shape) + 1).to(change) + change.T)[None].float()


def affine_on(affine: Tensor, shape: torch.Size, size: torch.Size) -> Tensor:
    """An affine map of a grid of `shape` as one of the grid of `size` over the same extent."""
    ratio = _ratio(shape, size, affine)
    linear = affine[..., :-1] / ratio * ratio.mT
    return torch.cat([linear, affine[..., -1:] / ratio], -1)


def _ratio(shape: torch.Size, size: torch.Size, like: Tensor) -> Tensor:
    """Voxels of a grid of `shape` in one of `size` along each axis, (n, 1)."""
    return like.new_tensor([[a / b] for a, b in zip(shape, size, strict=True)])


def _apply(affine: Tensor, coordinates: Tensor) -> Tensor:
    """An affine map about the grid's centre of coordinates (1, n, *shape)."""
    shape = coordinates.shape[2:]
    centre = coordinates.new_tensor([(size - 1) / 2 for size in shape])[:, None]
    moved = affine[..., :-1] @ (coordinates.flatten(2) - centre) + centre + affine[..., -1:]
    return moved.view_as(coordinates)


def _residual(displacement: Tensor, affine: Tensor) -> Tensor:
    """w with affine(x + w(x)) = x + displacement(x), (1, n, *shape), voxels."""
    grid = identity_grid(displacement.shape[2:], displacement)
    inverse = torch.linalg.inv(affine[..., :-1])
    back = torch.cat([inverse, -inverse @ affine[..., -1:]], -1)
    return _apply(back, grid + displacement) - grid


def _resize(displacement: Tensor, size: torch.Size) -> Tensor:
    """A displacement on another grid over the same extent, in that grid's voxels."""
    shape = displacement.shape[2:]
    if shape == size:
        return displacement
    ratio = _ratio(size, shape, displacement).view(1, -1, *[1] * len(shape))
    coarser = all(a <= b for a, b in zip(size, shape, strict=True))
    resized = (
        averaged(displacement, size)
        if coarser
        else F.interpolate(displacement, size=size, mode=LINEAR[len(size)], align_corners=False)
    )
    return resized * ratio
