"""Geometry of images: grids, affine matrices, warps, composition, Jacobians; differentiable, batched, 2D and 3D.

Points and displacements are voxels in index order: (z, y, x) in 3D, (y, x) in 2D. An affine is (B, n, n + 1) and acts
about the centre c of the grid: p -> M (p - c) + c + t. All transforms pull back: they say where an output voxel reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError

MAX_ROTATION = math.pi / 9  # 20 degrees an axis; ranges of the affine head: released code of He et al. 2023
MAX_SCALING = 0.25  # scale 0.75 to 1.25
MAX_SHEAR = math.pi / 18  # 10 degrees
MATRIX_PRODUCTS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]


def identity_grid(shape: Sequence[int], like: Tensor) -> Tensor:
    """Coordinates of every voxel of a grid of `shape`, (n, *shape), in the float32 of the device of `like`."""
    axes = [torch.arange(size, device=like.device, dtype=torch.float32) for size in shape]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


def sample(image: Tensor, coordinates: Tensor, *, mode: str = "bilinear", padding: str = "zeros") -> Tensor:
    """Read `image` (B, C, *shape) at voxel `coordinates` (B, n, *out): (B, C, *out).

    mode: "bilinear" (linear along every axis) or "nearest", which keeps the type of whole numbers. padding: "zeros" or
    "border" outside the image.
    """
    if mode == "nearest" and not image.is_floating_point():  # float32 rounds labels beyond 2^24
        return sample(image.double(), coordinates.double(), mode=mode, padding=padding).to(image.dtype)
    sizes = _vector(image.shape[2:], coordinates).view(1, -1, *[1] * (coordinates.ndim - 2))
    unit = coordinates.flip(1).mul_(2).add_(1).div_(sizes.flip(1)).sub_(1)  # centres lie half a voxel inside [-1, 1]
    grid = unit.movedim(1, -1)  # grid_sample wants (x, y, z) last
    image = image.to(grid.dtype)
    threads = _idle_threads(image, grid)
    if threads > 1 and image.requires_grad and torch.is_grad_enabled():
        return _sample_channels(image, grid, math.gcd(threads, image.shape[1]), mode, padding)
    if threads > 1:
        return _sample_points(image, grid, math.gcd(threads, grid[0, ..., 0].numel()), mode, padding)
    return F.grid_sample(image, grid, mode=mode, padding_mode=padding, align_corners=False)


def _idle_threads(image: Tensor, grid: Tensor) -> int:
    """Threads that could share one image; 1 where grid_sample uses all: on the CPU it has one an entry of the batch."""
    if grid.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return 1
    threads = torch.get_num_threads()
    return threads if 0 < len(grid) == len(image) < threads and grid.numel() > 0 else 1


def _sample_channels(image: Tensor, grid: Tensor, parts: int, mode: str, padding: str) -> Tensor:
    """Each thread reads a part of the channels: nothing of the image's gradient is summed in another order."""
    images = image.unflatten(1, (parts, -1)).flatten(0, 1)
    grids = grid.repeat_interleave(parts, 0)
    values = F.grid_sample(images, grids, mode=mode, padding_mode=padding, align_corners=False)
    return values.unflatten(0, (-1, parts)).flatten(1, 2)


def _sample_points(image: Tensor, grid: Tensor, parts: int, mode: str, padding: str) -> Tensor:
    """Each thread reads a part of the points."""
    read = []
    for one, points in zip(image, grid, strict=True):
        points = points.reshape(parts, -1, *[1] * (points.ndim - 2), points.shape[-1])
        one = one.expand(parts, *one.shape)
        values = F.grid_sample(one, points, mode=mode, padding_mode=padding, align_corners=False)
        read.append(values.transpose(0, 1).reshape(len(image[0]), *grid.shape[1:-1]))
    return torch.stack(read)


def warp(moving: Tensor, displacement: Tensor, *, mode: str = "bilinear") -> Tensor:
    """Resample `moving` at x + displacement(x), once.

    Args:
        moving: image, (B, C, *shape).
        displacement: offsets in voxels, (B, n, *shape), channels in index order (z, y, x).
        mode: "bilinear" (linear along every axis), or "nearest" for label maps, which keep their type.

    Returns: warped image, (B, C, *shape); zero outside the field of view.
    Source: He et al. 2023, app. D.3.
    """
    ndim = moving.ndim - 2
    if displacement.shape != (moving.shape[0], ndim, *moving.shape[2:]):
        raise ArgumentError(
            f"displacement has shape {tuple(displacement.shape)} for an image of {tuple(moving.shape)}",
            f"expected {(moving.shape[0], ndim, *moving.shape[2:])}: one channel an axis, on the image's grid",
        )
    displacement = displacement.float()
    return sample(moving, displacement + identity_grid(displacement.shape[2:], displacement), mode=mode)


@contextmanager
def exact(*operations: Any) -> Iterator[None]:
    """float32 in full in some of PyTorch's backends (`torch.backends`), whatever the process has chosen: no TF32."""
    lowered = [(one, one.fp32_precision) for one in operations if one.fp32_precision not in ("none", "ieee")]
    try:
        for operation, _ in lowered:
            operation.fp32_precision = "ieee"
        yield
    finally:
        for operation, precision in lowered:
            operation.fp32_precision = precision


@contextmanager
def full_precision(tensor: Tensor) -> Iterator[None]:
    """float32 in full: coordinates and local variances survive neither mixed precision nor products in TF32."""
    with torch.autocast(tensor.device.type, enabled=False):
        if torch.compiler.is_compiling():  # which knows no other precision than that of its start
            yield
        else:
            with exact(*MATRIX_PRODUCTS):
                yield


class _Bounded(torch.autograd.Function):
    """Clamp to [-1, 1] whose gradient is dropped only where it leads farther out.

    That of `clamp` is 0 outside, from where no number would ever come back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        outward = ((x > 1) & (grad < 0)) | ((x < -1) & (grad > 0))
        return grad.masked_fill(outward, 0)


def affine_matrix(parameters: Tensor) -> Tensor:
    """Affine matrices from the raw numbers of the affine head.

    Args:
        parameters: (B, 15) in 3D: rotation 3, scale 3, translation 3, shear 6; (B, 7) in 2D: 1, 2, 2, 2.
            Rotation, scale and shear are clamped to [-1, 1] and span +-20 degrees, 0.75-1.25 and the tangents of
            +-10 degrees; translation is in voxels, unbounded. Each group is in index order (z, y, x); shear entries
            fill the matrix off its diagonal, row by row. Zeros give the identity.

    Returns: (B, n, n + 1) = [Shear @ Scale @ Rotation | translation], float32 at least.
    Source: He et al. 2023, app. D.3, and released code.
    """
    if parameters.ndim != 2 or parameters.shape[1] not in (7, 15):
        raise ArgumentError(
            f"affine parameters have shape {tuple(parameters.shape)}",
            "expected (B, 15) in 3D or (B, 7) in 2D",
        )
    ndim = 3 if parameters.shape[1] == 15 else 2
    planes = [(1, 2), (2, 0), (0, 1)] if ndim == 3 else [(0, 1)]
    with full_precision(parameters):
        parameters = parameters.to(torch.promote_types(parameters.dtype, torch.float32))
        rotation, scale, translation, shear = parameters.split([len(planes), ndim, ndim, ndim * (ndim - 1)], 1)
        eye = torch.eye(ndim, dtype=parameters.dtype, device=parameters.device)
        angle = _Bounded.apply(rotation) * MAX_ROTATION
        linear = eye
        for (i, j), theta in zip(planes, angle.unbind(1), strict=True):  # about axis 0 first, axis 2 last
            linear = _plane_rotation(eye, i, j, theta) @ linear
        linear = (_Bounded.apply(scale) * MAX_SCALING + 1)[:, :, None] * linear
        slots = torch.eye(ndim * ndim, dtype=eye.dtype, device=eye.device)  # one-hot rows
        slots = slots[1:].view(ndim - 1, ndim + 1, -1)[:, :-1].flatten(0, 1)  # those off the diagonal
        tangent = (_Bounded.apply(shear) * MAX_SHEAR).tan()
        shears = eye + (tangent @ slots).view(-1, ndim, ndim)
        return torch.cat([shears @ linear, translation[..., None]], -1)


def _plane_rotation(eye: Tensor, i: int, j: int, theta: Tensor) -> Tensor:
    """Rotations by theta (B,) in the plane of axes i and j, (B, n, n): e_i turns towards e_j."""
    projection = eye[i, :, None] * eye[i] + eye[j, :, None] * eye[j]
    turn = eye[j, :, None] * eye[i] - eye[i, :, None] * eye[j]
    theta = theta[:, None, None]
    return eye + (theta.cos() - 1) * projection + theta.sin() * turn


def affine_coordinates(affine: Tensor, shape: Sequence[int]) -> Tensor:
    """Where the affine sends every voxel of a grid of `shape`: (B, n, *shape), voxels."""
    grid = identity_grid(shape, affine)
    centre = _vector([(size - 1) / 2 for size in shape], grid)[:, None]
    with full_precision(affine):
        affine = affine.float()
        mapped = affine[:, :, :-1] @ (grid.flatten(1) - centre) + centre + affine[:, :, -1:]
    return mapped.view(len(affine), *grid.shape)


def _vector(numbers: Sequence[float], like: Tensor) -> Tensor:
    """Numbers as a tensor beside `like`, filled there: a copy from the host would wait for the GPU."""
    return torch.stack([like.new_full((), number) for number in numbers])


def affine_warp(moving: Tensor, affine: Tensor) -> Tensor:
    """Resample `moving` (B, C, *shape) at affine(x); zero outside the field of view."""
    return sample(moving, affine_coordinates(affine, moving.shape[2:]))


def compose(affine: Tensor, displacement: Tensor) -> Tensor:
    """Fuse an affine and a dense displacement into one displacement field.

    psi(p) = displacement(p_hat) + p_hat - p with p_hat = affine(p), so that one warp by psi equals a warp by
    `displacement` followed by the affine one, without the blur of the second resampling.

    Args:
        affine: (B, n, n + 1), voxels about the centre.
        displacement: (B, n, *shape), voxels; beyond its grid it continues with the values of the border.

    Returns: (B, n, *shape), voxels.
    Source: He et al. 2023, app. D.3, eq. 11-12.
    """
    displacement = displacement.float()
    mapped = affine_coordinates(affine, displacement.shape[2:])
    return sample(displacement, mapped, padding="border") + mapped - identity_grid(displacement.shape[2:], mapped)


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """Local volume change of x -> x + displacement(x), (B, *shape); at most 0 where the map folds.

    Args: displacement: (B, n, *shape), voxels, at least 2 voxels an axis; central differences, one-sided at the border.
    """
    ndim = displacement.shape[1]
    spatial = list(range(2, 2 + ndim))
    gradients = torch.stack(torch.gradient(displacement.float(), dim=spatial), 2)  # (B, component, axis, *shape)
    jacobian = gradients.flatten(3).permute(0, 3, 1, 2) + torch.eye(ndim, device=displacement.device)
    a = jacobian.unbind(-1)
    if ndim == 2:
        determinant = a[0][..., 0] * a[1][..., 1] - a[0][..., 1] * a[1][..., 0]
    else:
        determinant = (torch.linalg.cross(a[0], a[1]) * a[2]).sum(-1)
    return determinant.view(displacement.shape[0], *displacement.shape[2:])
