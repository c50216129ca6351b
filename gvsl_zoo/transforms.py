"""Transforms between scans in world millimetres, and their files.

Points are (x, y, z) in NIfTI's RAS+ millimetres; ITK's files hold LPS. A transform pulls back, as ITK's do: it sends a
point of the fixed scan's world to the point of the moving scan's world that shows the same anatomy, so that
`warped(p) = moving(T(p))`. Coordinates are float64 throughout; only interpolation weights are float32.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import os
import re
import struct
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, GvslZooError, VolumeError, listed
from .spatial import sample
from .volume import (
    CT_WINDOW_HU,
    SINGULAR,
    InputWarning,
    Prepared,
    Volume,
    check_output,
    checked_affine,
    nifti_stream,
    read_volume,
)
from .weights import write_whole

BLOCK = 64  # voxels an axis that are mapped at once: coordinates of a block stay in the cache
INVERSE_TOLERANCE = 0.01  # voxels of the displacement's finest axis: |T(q) - p| of an inverse q of p
INVERSE_STEPS = 100  # a strain of 0.9 needs 65 from 10 voxels away
FIT_POINTS = 16  # an axis; enough for the affine part of a displacement
EDGE = 1e-6  # voxels: rounding may not decide on which side of a voxel's face a point lies
MAX_TEXT_BYTES = 64 * 2**20
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
INTENT_DISPLACEMENT, INTENT_VECTOR = 1006, 1007  # NIfTI's: ITK takes the first as RAS, and writes and takes 1007 as LPS
AFFINE_KINDS = ("AffineTransform", "MatrixOffsetTransformBase")  # 9 numbers of the matrix, 3 of the translation
SUFFIXES = (".tfm", ".txt", ".mat", ".h5", ".hdf5", ".nii", ".nii.gz")
NOT_A_TRANSFORM = f"give a file of ITK or ANTs ({', '.join(SUFFIXES)})"
NO_PLACE = "merge it with to_displacement(transform, grid) and write .nii.gz, or write .h5"


# ---- where voxels lie


@dataclass(frozen=True, eq=False)
class Grid:
    """Voxels in the world.

    Args:
        shape: voxels along i, j, k.
        affine: (4, 4) float64, voxel (i, j, k) -> world (x, y, z) in RAS+ millimetres; any directions and shears.

    Errors: ArgumentError for an empty axis or an affine that is not finite and invertible.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise ArgumentError(f"a grid of shape {tuple(self.shape)}", "give three axes, all at least 1")
        object.__setattr__(self, "affine", checked_affine(self.affine, ArgumentError))

    @classmethod
    def of(cls, volume: Volume) -> Grid:
        """The grid of a volume."""
        return cls(volume.shape, volume.affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Millimetres between voxels along i, j, k."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0).tolist()
        return i, j, k

    @property
    def centre_mm(self) -> np.ndarray:
        """The middle of the field of view, (3,)."""
        return _moved(self.affine, (np.array([self.shape]) - 1) / 2)[0]

    def points(self, box: tuple[slice, slice, slice] | None = None) -> np.ndarray:
        """World points of the voxels, or of a box of them: (N, 3), k fastest."""
        box = box or (slice(None), slice(None), slice(None))
        axes = [np.arange(n, dtype=np.float64)[s] for n, s in zip(self.shape, box, strict=True)]
        index = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        return _moved(self.affine, index)

    def index(self, points_mm: np.ndarray) -> np.ndarray:
        """Voxel coordinates (i, j, k) of world points, both (N, 3)."""
        return _moved(np.linalg.inv(self.affine), points_mm)

    def contains(self, index: np.ndarray) -> np.ndarray:
        """Whether voxel coordinates (N, 3) lie in the field of view: up to half a voxel outside the outer centres."""
        i, j, k = ((index >= -0.5 - EDGE) & (index <= np.array(self.shape) - 0.5 + EDGE)).T
        return i & j & k

    def blocks(self) -> Iterator[tuple[slice, slice, slice]]:
        """Boxes of at most `BLOCK` voxels an axis that tile the grid."""
        for corner in np.ndindex(*(-(-n // BLOCK) for n in self.shape)):
            i, j, k = (slice(c * BLOCK, (c + 1) * BLOCK) for c in corner)
            yield i, j, k


def _moved(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    return points @ matrix[:3, :3].T + matrix[:3, 3]


# ---- transforms


class Mapped(NamedTuple):
    """Points and what is doubtful about each.

    points_mm: (N, 3) float64. beyond: (N,) bool, a displacement was read outside its grid, where it goes on with the
    values of its border. unsolved: (N,) bool, no inverse within `INVERSE_TOLERANCE` was found; the nearest is given.
    """

    points_mm: np.ndarray
    beyond: np.ndarray
    unsolved: np.ndarray


class Transform(ABC):
    """A map from the fixed scan's world to the moving scan's."""

    def __call__(self, points_mm: np.ndarray) -> np.ndarray:
        """Send points to where they belong, (N, 3) -> (N, 3) float64; `map` tells what is doubtful about each.

        Errors: ArgumentError for another shape or points that are not finite. Warns where an inverse is not found.
        """
        mapped = self.map(_checked_points(points_mm))
        _warn_of(0, int(mapped.unsolved.sum()), len(mapped.unsolved), "points")
        return mapped.points_mm

    @abstractmethod
    def map(self, points_mm: np.ndarray) -> Mapped:
        """Send finite float64 points (N, 3) to where they belong, in silence."""

    @abstractmethod
    def inverse(self) -> Transform:
        """The map back, from the moving scan's world to the fixed one's."""


@dataclass(frozen=True, eq=False)
class Affine(Transform):
    """A linear map and a translation.

    Args: matrix: (4, 4) float64, RAS+ millimetres to RAS+ millimetres.
    Errors: ArgumentError for a matrix that is not finite or singular.
    """

    matrix: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "matrix", checked_affine(self.matrix, ArgumentError))

    def map(self, points_mm: np.ndarray) -> Mapped:
        return _certain(_moved(self.matrix, points_mm))

    def inverse(self) -> Affine:
        """Exact."""
        return Affine(np.linalg.inv(self.matrix))


@dataclass(frozen=True, eq=False)
class Displacement(Transform):
    """A point moves by the displacement at its place: linear between voxels, the border's value outside the grid.

    ITK reads zero outside the grid instead; the two differ only where a field does not cover what it is applied to.

    Args:
        field_mm: (i, j, k, 3) float32, millimetres along x, y, z (RAS+).
        grid: where its voxels lie.

    Errors: ArgumentError for another shape, or values that are not finite.
    """

    field_mm: np.ndarray
    grid: Grid

    def __post_init__(self) -> None:
        field = np.asarray(self.field_mm, np.float32)
        if field.shape != (*self.grid.shape, 3):
            raise ArgumentError(f"a displacement of shape {field.shape}", f"expected {(*self.grid.shape, 3)}")
        if bad := sum(int((~np.isfinite(plane)).any(-1).sum()) for plane in field):
            raise ArgumentError(f"the displacement is not finite in {bad} voxels", "compute it anew")
        object.__setattr__(self, "field_mm", field)

    def map(self, points_mm: np.ndarray) -> Mapped:
        index = self.grid.index(points_mm)
        beyond = ~self.grid.contains(index)
        return Mapped(points_mm + _linear(self.field_mm, index), beyond, np.zeros_like(beyond))

    def inverse(self) -> Inverse:
        """By iteration, at every point anew: no second field, and no grid that it would have to cover."""
        return Inverse(self)

    @cached_property
    def affine_part(self) -> Affine:
        """The affine map nearest to this one over its grid (least squares); the identity where that is singular."""
        step = [-(-n // FIT_POINTS) for n in self.grid.shape]
        i, j, k = (slice(0, n, s) for n, s in zip(self.grid.shape, step, strict=True))
        points, moves = self.grid.points((i, j, k)), self.field_mm[i, j, k].reshape(-1, 3).astype(np.float64)
        middle, mean = points.mean(0), moves.mean(0)
        matrix = np.eye(4)  # the smallest solution leaves an axis of one voxel alone
        matrix[:3, :3] += np.linalg.lstsq(points - middle, moves - mean, rcond=None)[0].T
        if np.linalg.cond(matrix[:3, :3]) > 1 / SINGULAR:
            matrix = np.eye(4)
        matrix[:3, 3] = middle + mean - matrix[:3, :3] @ middle
        return Affine(matrix)


@dataclass(frozen=True, eq=False)
class Inverse(Transform):
    """The inverse q of a displacement T at points p, by fixed-point iteration on q -> q + step A^-1 (p - T(q)).

    A is the affine part of T, so that rotations and scalings between the scans cost nothing; what remains converges
    fast when its strain is below 1, and a point's step is halved whenever it overshoots, which also reaches steeper
    maps that are one to one. Points that are not within `INVERSE_TOLERANCE` after `INVERSE_STEPS` (a fold) are
    told by `map`.

    Args: of: the displacement to invert.
    """

    of: Displacement

    def map(self, points_mm: np.ndarray) -> Mapped:
        tolerance = INVERSE_TOLERANCE * min(self.of.grid.spacing_mm)
        back = self.of.affine_part.inverse().matrix
        found = _moved(back, points_mm)
        rest = points_mm - self.of.map(found).points_mm
        error = np.linalg.norm(rest, axis=1)
        step = np.ones(len(found))
        for _ in range(INVERSE_STEPS):
            active = np.flatnonzero(error > tolerance)
            if not len(active):
                break
            tried = found[active] + step[active, None] * (rest[active] @ back[:3, :3].T)
            new_rest = points_mm[active] - self.of.map(tried).points_mm
            new_error = np.linalg.norm(new_rest, axis=1)
            better = new_error < error[active]
            overshot = (new_rest * rest[active]).sum(1) < 0
            step[active[overshot | ~better]] /= 2
            active = active[better]
            found[active], rest[active], error[active] = tried[better], new_rest[better], new_error[better]
        return Mapped(found, ~self.of.grid.contains(self.of.grid.index(found)), error > tolerance)

    def inverse(self) -> Displacement:
        """The displacement itself."""
        return self.of


@dataclass(frozen=True, eq=False)
class Chain(Transform):
    """Transforms one after another.

    Args: parts: applied first to last to a point; ITK's CompositeTransform and its files list them the other way round.
    """

    parts: tuple[Transform, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))

    def map(self, points_mm: np.ndarray) -> Mapped:
        mapped = _certain(points_mm)
        for part in self.parts:
            points, beyond, unsolved = part.map(mapped.points_mm)
            mapped = Mapped(points, mapped.beyond | beyond, mapped.unsolved | unsolved)
        return mapped

    def inverse(self) -> Chain:
        """The parts' inverses, last to first."""
        return Chain(tuple(part.inverse() for part in reversed(self.parts)))


def _certain(points_mm: np.ndarray) -> Mapped:
    no = np.zeros(len(points_mm), bool)
    return Mapped(points_mm, no, no)


def _checked_points(points_mm: np.ndarray) -> np.ndarray:
    points = np.asarray(points_mm, np.float64)
    if points.ndim != 2 or points.shape[1] != 3:
        raise ArgumentError(f"points of shape {points.shape}", "expected (N, 3): x, y, z in millimetres")
    if bad := int((~np.isfinite(points)).any(1).sum()):
        raise ArgumentError(f"{bad} of {len(points)} points are not finite", "leave them out")
    return points


def _linear(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Read (i, j, k, C) at voxel coordinates (N, 3), linearly, border values outside: (N, C) float32."""
    if not len(index):
        return np.empty((0, array.shape[3]), np.float32)
    last = np.array(array.shape[:3])[:, None] - 1
    axes = np.ascontiguousarray(index.T).clip(0, last)  # a reduction over a short last axis is slow
    low = axes.min(1).astype(int)
    i, j, k = (slice(a, b) for a, b in zip(low, axes.max(1).astype(int) + 2, strict=True))
    near = torch.from_numpy(np.array(array[i, j, k], np.float32)).movedim(-1, 0)[None]  # only what these points need
    local = torch.from_numpy((axes - low[:, None]).astype(np.float32))[None, :, :, None, None]
    return sample(near, local, padding="border")[0, :, :, 0, 0].T.numpy()


def _nearest(array: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Read (i, j, k, C) at the voxels nearest to coordinates (N, 3), halves up: (N, C), in the array's type."""
    i, j, k = np.floor(index + (0.5 + EDGE)).astype(int).clip(0, np.array(array.shape[:3]) - 1).T
    return array[i, j, k]


def _over(transform: Transform, grid: Grid) -> Iterator[tuple[tuple[slice, slice, slice], np.ndarray, np.ndarray]]:
    """Map a grid block by block: (box, its points, where they go); warns of doubtful ones at the end."""
    beyond = unsolved = 0
    for box in grid.blocks():
        points = grid.points(box)
        mapped = transform.map(points)
        beyond, unsolved = beyond + int(mapped.beyond.sum()), unsolved + int(mapped.unsolved.sum())
        yield box, points, mapped.points_mm
    _warn_of(beyond, unsolved, math.prod(grid.shape), "voxels")


def _warn_of(beyond: int, unsolved: int, total: int, what: str) -> None:
    if unsolved:
        message = f"{unsolved} of {total} {what} have no inverse within {INVERSE_TOLERANCE} voxel (a fold)"
        warnings.warn(message, InputWarning, stacklevel=3)
    if beyond:
        message = f"{beyond} of {total} {what} lie beyond the displacement's grid: its border's values go on there"
        warnings.warn(message, InputWarning, stacklevel=3)


# ---- what is done with them


def warp_volume(moving: Volume, transform: Transform, grid: Grid, *, nearest: bool = False) -> Volume:
    """Resample a volume on the fixed scan's grid, once, however long the chain.

    Args:
        moving: (i, j, k) or (i, j, k, C), any directions, spacing and field of view.
        transform: from the world of `grid` to that of `moving`.
        grid: `Grid.of(fixed)`.
        nearest: take the nearest voxel and keep the type (labels); otherwise interpolate linearly to float32.

    Returns: the volume on `grid`; outside the moving field of view 0 for labels, otherwise the image's minimum, but
        not below -1024 (scanners pad CT with less than air).
    Memory: the result, one block of the grid, and the part of `moving` that it shows.
    Errors: ArgumentError when the transform sends no voxel into the moving scan. Warns (InputWarning) of voxels beyond
        a displacement's grid or without an inverse.
    """
    channels = moving.data if moving.data.ndim == 4 else moving.data[..., None]
    source = Grid.of(moving)
    outside = 0.0 if nearest else max(float(np.fmin.reduce(moving.data, None)), CT_WINDOW_HU[0])  # NaN is no minimum
    kind = moving.data.dtype if nearest else np.dtype(np.float32)
    out = np.full((*grid.shape, channels.shape[3]), outside, kind, order="F")
    shown = False
    for box, _, moved in _over(transform, grid):
        index = source.index(moved)
        inside = source.contains(index)
        if inside.any():
            shown = True
            block = np.full((len(index), channels.shape[3]), outside, kind)
            block[inside] = (_nearest if nearest else _linear)(channels, index[inside])
            out[box] = block.reshape(out[box].shape)
    if not shown:
        remedy = "check that it belongs to these scans, its direction (inverse) and the order of a chain"
        raise ArgumentError("the transform sends no voxel of the grid into the moving scan", remedy)
    data = out if moving.data.ndim == 4 else out[..., 0]
    return Volume(data, grid.affine, comment=moving.comment if nearest else "")


def to_displacement(transform: Transform, grid: Grid) -> Displacement:
    """One displacement that does what any transform does, at the voxels of a grid; between them it is linear.

    For the file of a chain, the grid of the fixed scan; for that of an inverse, the grid of the moving one.
    Warns (InputWarning) of voxels beyond a displacement's grid or without an inverse.
    """
    field = np.empty((*grid.shape, 3), np.float32)
    for box, points, moved in _over(transform, grid):
        field[box] = (moved - points).reshape(field[box].shape)
    return Displacement(field, grid)


def jacobian(displacement: Displacement) -> Volume:
    """Local volume change of the map on the displacement's grid, float32; at most 0 where the map folds.

    Derivatives in world millimetres: central differences, one-sided at the border; exact for affine maps. Along an axis
    of one voxel nothing changes: of a film, it is the change of area.
    """
    grid, field = displacement.grid, displacement.field_mm
    to_world = np.linalg.inv(grid.affine[:3, :3])  # derivatives along i, j, k -> along x, y, z
    out = np.empty(grid.shape, np.float32)
    for start in range(0, grid.shape[0], BLOCK // 8):
        stop = min(start + BLOCK // 8, grid.shape[0])
        first = max(0, start - 1)
        slab = field[first : stop + 1].astype(np.float64)
        slopes = [_slope(slab, axis)[start - first :][: stop - start] for axis in range(3)]
        out[start:stop] = np.linalg.det(np.stack(slopes, -1) @ to_world + np.eye(3))  # (i, j, k, component, axis)
    return Volume(out, grid.affine)


def _slope(slab: np.ndarray, axis: int) -> np.ndarray:
    return np.gradient(slab, axis=axis) if slab.shape[axis] > 1 else np.zeros_like(slab)


def displacement_from_voxels(displacement: Tensor, prepared: Prepared) -> Displacement:
    """A model's displacement in the world, on the grid of the prepared scan.

    Args:
        displacement: (1, 3, D, H, W), voxels, channels (z, y, x); such as `Matching.displacement`, which has the affine
            in it. Of a film (1, 2, H, W).
        prepared: the fixed scan as the model saw it, and the moving one resampled onto the same grid.

    Returns: axes (x, y, z), as of `prepared.place`.
    Errors: ArgumentError for another shape.
    """
    D, H, W = prepared.shape
    if D == 1 and displacement.shape == (1, 2, H, W):
        displacement = torch.cat([torch.zeros_like(displacement[:, :1]), displacement], 1)[:, :, None]
    if displacement.shape != (1, 3, D, H, W):
        raise ArgumentError(f"a displacement of shape {tuple(displacement.shape)}", f"expected {(1, 3, D, H, W)}")
    voxels = displacement[0].detach().float().cpu().numpy().transpose(3, 2, 1, 0)  # (W, H, D, 3)
    field = voxels @ prepared.affine[:3, :3].T.astype(np.float32)
    return Displacement(field, Grid((W, H, D), prepared.affine[:, [2, 1, 0, 3]]))


def affine_from_voxels(affine: Tensor, prepared: Prepared) -> Affine:
    """A model's affine in the world.

    Args:
        affine: (1, 3, 4), voxels (z, y, x) about the centre of the grid: p -> M (p - c) + c + t; see `spatial`. Of a
            film (1, 2, 3).
        prepared: as for `displacement_from_voxels`.

    Errors: ArgumentError for another shape.
    """
    first = 1 if prepared.shape[0] == 1 and affine.shape == (1, 2, 3) else 0  # a film keeps z
    if not first and affine.shape != (1, 3, 4):
        raise ArgumentError(f"an affine of shape {tuple(affine.shape)}", "expected (1, 3, 4)")
    voxels, centre = np.eye(4), (np.array(prepared.shape) - 1) / 2
    voxels[first:3, first:] = affine[0].detach().double().cpu().numpy()
    voxels[:3, 3] += centre - voxels[:3, :3] @ centre
    return Affine(prepared.affine @ voxels @ np.linalg.inv(prepared.affine))


# ---- files of ITK and ANTs


def read_transform(path: str | os.PathLike[str]) -> Transform:
    """Read a transform that ITK, SimpleITK, ANTs or `write_transform` wrote.

    - .nii, .nii.gz: a displacement, ITK's vector image of five axes (i, j, k, 1, 3): intent 1007 holds LPS, 1006 RAS.
    - .tfm, .txt, .mat: an affine, or a composite of them.
    - .h5, and other linear transforms (Euler, Versor, Similarity, ...): read by SimpleITK.

    Errors: VolumeError for a file that cannot be read, is no such transform, or holds a singular or non-finite one.
    """
    path = Path(path)
    with _typed("read", path):
        if not path.is_file():
            raise VolumeError("no such file", "check the path")
        if path.name.endswith((".nii", ".nii.gz")):
            return _read_field(path)
        if path.suffix in (".h5", ".hdf5"):
            return _read_with_sitk(path)
        if path.suffix not in SUFFIXES:
            raise VolumeError("its ending is not one of a transform", NOT_A_TRANSFORM)
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise VolumeError(f"{path.stat().st_size} bytes", "give a displacement as .nii.gz")
        content = path.read_bytes()
        blocks = _read_mat(content) if path.suffix == ".mat" else _read_text(content)
        composite = bool(blocks) and blocks[0][0].startswith("CompositeTransform")
        parts = blocks[1:] if composite else blocks
        if not parts:
            raise VolumeError("it holds no transform", NOT_A_TRANSFORM)
        if len(parts) > 1 and not composite:
            raise VolumeError(f"{len(parts)} transforms and no CompositeTransform", "give each a file of its own")
        if not all(re.fullmatch(rf"({'|'.join(AFFINE_KINDS)})_(double|float)_3_3", name) for name, *_ in parts):
            return _read_with_sitk(path)
        affines = tuple(_affine_from_itk(*block) for block in reversed(parts))
        return Chain(affines) if composite else affines[0]


def write_transform(transform: Transform, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a transform for ITK, SimpleITK and ANTs, in LPS: all of it or nothing.

    An affine goes into .tfm, .txt, .mat (ANTs' own) or .h5; a displacement into .nii, .nii.gz or .h5; a chain into .h5,
    one of affines alone also into .tfm and .txt. .h5 needs SimpleITK.

    Errors: VolumeError when the file exists (without `overwrite`) or cannot be written; ArgumentError for a transform
        that such a file cannot hold.
    """
    path = Path(path)
    check_output(path, None, overwrite)
    parts = transform.parts if isinstance(transform, Chain) else (transform,)
    affine = all(isinstance(part, Affine) for part in parts)
    with _typed("write", path):
        if path.suffix in (".h5", ".hdf5"):
            _write_with_sitk(transform, path)
        elif path.suffix in (".tfm", ".txt") and affine:
            write_whole(path, _text(transform))
        elif path.suffix == ".mat" and isinstance(transform, Affine):
            write_whole(path, _mat(transform))
        elif path.name.endswith((".nii", ".nii.gz")) and isinstance(transform, Displacement):
            _write_field(transform, path)
        elif path.name.endswith(SUFFIXES):
            raise ArgumentError(f"{path.name!r} cannot hold a {type(transform).__name__}", NO_PLACE)
        else:
            raise ArgumentError(f"{path.name!r} has not the ending of a transform", f"end it in {', '.join(SUFFIXES)}")


@contextmanager
def _typed(action: str, path: Path) -> Iterator[None]:
    """Every failure that a file can cause becomes a VolumeError that names the file; a wrong call stays one."""
    what = f"cannot {action} {str(path)!r}"
    try:
        yield
    except GvslZooError as error:
        kind = ArgumentError if isinstance(error, ArgumentError) and action == "write" else VolumeError
        cause = error.cause if error.cause.startswith(what) else f"{what}: {error.cause}"
        raise kind(cause, error.remedy) from error
    except OSError as error:
        raise VolumeError(f"{what}: {error.strerror or error}", "check path, permissions and free space") from error
    except RuntimeError as error:  # ITK's own: several lines, the cause in the last
        cause = str(error).strip().splitlines()[-1]
        raise VolumeError(f"{what}: {cause}", NOT_A_TRANSFORM if action == "read" else "") from error


Stored = tuple[str, list[float], list[float]]  # ITK's name of a transform, parameters, fixed parameters


def _affine_from_itk(name: str, parameters: Sequence[float], fixed: Sequence[float]) -> Affine:
    """p -> M (p - c) + c + t in LPS: 9 numbers of M row by row and t; c is fixed."""
    if len(parameters) != 12 or len(fixed) != 3:
        raise VolumeError(f"{name} has {len(parameters)} and {len(fixed)} numbers", "expected 12 and 3")
    matrix, centre = np.eye(4), np.array(fixed)
    matrix[:3, :3] = np.reshape(parameters[:9], (3, 3))
    matrix[:3, 3] = np.array(parameters[9:]) + centre - matrix[:3, :3] @ centre
    return Affine(LPS @ matrix @ LPS)


def _itk_parameters(affine: Affine) -> list[float]:
    """12 numbers, about the origin."""
    matrix = LPS @ affine.matrix @ LPS
    return [*matrix[:3, :3].ravel().tolist(), *matrix[:3, 3].tolist()]


def _read_text(content: bytes) -> list[Stored]:
    """The transforms of an ITK text file, in its order."""
    lines = content.decode("utf-8", errors="replace").splitlines()
    if not lines or not lines[0].startswith("#Insight Transform File"):
        raise VolumeError(f"not ITK's text: it begins with {content[:24]!r}", NOT_A_TRANSFORM)
    blocks: list[Stored] = []
    for line in lines[1:]:
        key, _, rest = line.partition(":")
        if key == "Transform":
            blocks.append((rest.strip(), [], []))
        elif key in ("Parameters", "FixedParameters") and blocks:
            _, parameters, fixed = blocks[-1]
            try:
                (parameters if key == "Parameters" else fixed).extend(map(float, rest.split()))
            except ValueError:
                raise VolumeError(f"not numbers: {line[:60]!r}", "write the file anew") from None
    return blocks


def _text(transform: Transform) -> bytes:
    parts = list(reversed(transform.parts)) if isinstance(transform, Chain) else [transform]
    lines = ["#Insight Transform File V1.0"]
    if isinstance(transform, Chain):
        lines += ["#Transform 0", "Transform: CompositeTransform_double_3_3"]
    for number, part in enumerate(parts, start=int(isinstance(transform, Chain))):
        assert isinstance(part, Affine)
        numbers = " ".join(map(repr, _itk_parameters(part)))
        lines += [f"#Transform {number}", "Transform: AffineTransform_double_3_3"]
        lines += [f"Parameters: {numbers}", "FixedParameters: 0 0 0"]
    return ("\n".join(lines) + "\n").encode()


def _read_mat(content: bytes) -> list[Stored]:
    """The transform of a MATLAB 4 file: a column of parameters under the transform's name, then one named 'fixed'."""
    columns, position = [], 0
    while position < len(content):
        if len(content) - position < 20:
            raise VolumeError("the file ends inside a matrix: truncated", "copy or write it anew")
        order = ">" if content[position + 2] else "<"  # the type is 0 or 10; with 1000 added in big-endian
        kind, rows, cols, imaginary, letters = struct.unpack_from(f"{order}5i", content, position)
        if kind % 1000 not in (0, 10) or kind // 1000 != (order == ">"):  # float64 or float32
            raise VolumeError(f"not a MATLAB 4 file: {content[:24]!r}", "write it with ITK or ANTs, or save -v4")
        number = np.dtype(f"{order}f{4 if kind % 1000 else 8}")
        start = position + 20 + letters
        position = start + rows * cols * number.itemsize
        if imaginary or min(rows, cols) < 0 or letters < 1 or position > len(content):
            raise VolumeError(f"a matrix of {rows} x {cols} in {len(content)} bytes", "copy or write it anew")
        name = content[start - letters : start].rstrip(b"\0").decode("ascii", errors="replace")
        columns.append((name, np.frombuffer(content, number, rows * cols, start).tolist()))
    if len(columns) != 2 or columns[1][0] != "fixed":
        names = listed([name for name, _ in columns]) or "nothing"
        raise VolumeError(f"it holds {names}", "expected one transform and 'fixed'")
    return [(columns[0][0], columns[0][1], columns[1][1])]


def _mat(affine: Affine) -> bytes:
    content = b""
    for name, column in (("AffineTransform_double_3_3", _itk_parameters(affine)), ("fixed", [0.0] * 3)):
        letters = name.encode() + b"\0"
        content += struct.pack("<5i", 0, len(column), 1, 0, len(letters)) + letters + np.array(column, "<f8").tobytes()
    return content


def _read_field(path: Path) -> Displacement:
    """Five axes tell a displacement from a series or a colour image."""
    volume = read_volume(path, channels=True)
    dims, intent = [int(n) for n in volume.header["dim"][:6]], int(volume.header["intent_code"])
    if dims[0] != 5 or dims[4:] != [1, 3] or intent not in (INTENT_DISPLACEMENT, INTENT_VECTOR):
        remedy = "give ITK's vector image: five axes (i, j, k, 1, 3) and intent 1007"
        raise VolumeError(f"an image of shape {tuple(dims[1 : dims[0] + 1])}, intent {intent}: no displacement", remedy)
    if filled := [note for note in volume.notes if "NaN" in note]:
        raise VolumeError(f"the displacement is not finite: {filled[0]}", "compute it anew")
    signs = np.diag(LPS)[:3] if intent == INTENT_VECTOR else np.ones(3)
    return Displacement(np.ascontiguousarray(volume.data, np.float32) * signs.astype(np.float32), Grid.of(volume))


def is_sheared(grid: Grid) -> bool:
    """Whether an image of ITK, whose axes are at right angles, puts a voxel a hundredth of one elsewhere, or more."""
    header = nib.Nifti1Header()
    header.set_qform(grid.affine, code=1)
    apart = np.abs((header.get_qform() - grid.affine) @ [*grid.shape, 1]).max()
    return bool(apart > 0.01 * min(grid.spacing_mm))


def _write_field(displacement: Displacement, path: Path) -> None:
    """A NIfTI file, plane by plane; qform and sform say the same."""
    header = nib.Nifti1Header(endianness="<")
    header.set_data_dtype(np.float32)
    header.set_data_shape((*displacement.grid.shape, 1, 3))
    header.set_intent(INTENT_VECTOR, allow_unknown=True)
    header.set_xyzt_units("mm")
    header.set_qform(displacement.grid.affine, code=1)
    header.set_sform(displacement.grid.affine, code=1)
    header.set_slope_inter(1, 0)
    header["pixdim"][4:] = 1
    header["vox_offset"], header["magic"] = header.single_vox_offset, header.single_magic
    if is_sheared(displacement.grid):
        raise ArgumentError("the grid is sheared, which ITK's images cannot be", "use to_displacement on another grid")
    with nifti_stream(path) as stream:
        stream.write(header.binaryblock + bytes(4))
        for component, plane in itertools.product(range(3), range(displacement.grid.shape[2])):
            values = displacement.field_mm[:, :, plane, component] * LPS[component, component]
            stream.write(values.astype("<f4").tobytes("F"))


def _sitk() -> Any:
    try:
        import SimpleITK as sitk
    except ImportError:
        raise VolumeError("this kind of transform needs SimpleITK", "pip install 'gvsl-zoo[io]'") from None
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    return sitk


def _read_with_sitk(path: Path) -> Transform:
    sitk = _sitk()
    return _from_sitk(sitk, sitk.ReadTransform(str(path)))


def _from_sitk(sitk: Any, transform: Any) -> Transform:
    if transform.GetDimension() != 3:
        raise VolumeError(f"a transform of {transform.GetDimension()} dimensions", "give one of three")
    kind = transform.GetTransformEnum()
    if kind == sitk.sitkComposite:
        parts = sitk.CompositeTransform(transform)
        count = parts.GetNumberOfTransforms()
        return Chain(tuple(_from_sitk(sitk, parts.GetNthTransform(n)) for n in reversed(range(count))))
    if kind == sitk.sitkDisplacementField:
        image = sitk.DisplacementFieldTransform(transform).GetDisplacementField()
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
        affine[:3, 3] = image.GetOrigin()
        field = sitk.GetArrayFromImage(image).transpose(2, 1, 0, 3) * np.diag(LPS)[:3]
        return Displacement(np.ascontiguousarray(field, np.float32), Grid(image.GetSize(), LPS @ affine))
    if not transform.IsLinear():
        remedy = "sample it on the fixed scan's grid with SimpleITK.TransformToDisplacementField"
        raise VolumeError(f"{transform.GetName()} is neither linear nor a displacement", remedy)
    matrix, origin = np.eye(4), np.array(transform.TransformPoint((0.0, 0.0, 0.0)))
    matrix[:3, :3] = np.array([transform.TransformPoint(axis) for axis in np.eye(3).tolist()]).T - origin[:, None]
    matrix[:3, 3] = origin
    return Affine(LPS @ matrix @ LPS)


def _write_with_sitk(transform: Transform, path: Path) -> None:
    sitk = _sitk()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"transform{path.suffix}"
        sitk.WriteTransform(_to_sitk(sitk, transform), str(file))
        write_whole(path, file.read_bytes())


def _to_sitk(sitk: Any, transform: Transform) -> Any:
    if isinstance(transform, Affine):
        made = sitk.AffineTransform(3)
        made.SetParameters(_itk_parameters(transform))
        return made
    if isinstance(transform, Displacement):
        grid = transform.grid
        matrix = LPS @ grid.affine
        field = transform.field_mm.transpose(2, 1, 0, 3) * np.diag(LPS)[:3]
        image = sitk.GetImageFromArray(field, isVector=True)
        image.SetSpacing(grid.spacing_mm)
        image.SetOrigin(matrix[:3, 3].tolist())
        image.SetDirection((matrix[:3, :3] / grid.spacing_mm).ravel().tolist())
        return sitk.DisplacementFieldTransform(image)
    if isinstance(transform, Chain):
        return sitk.CompositeTransform([_to_sitk(sitk, part) for part in reversed(transform.parts)])
    raise ArgumentError(f"no file holds a {type(transform).__name__}", "use to_displacement(transform, grid)")


# ---- files of points


class PointTable(NamedTuple):
    """A CSV of points: (N, 3) in RAS+ millimetres, the names of its columns, and its rows as they were."""

    points_mm: np.ndarray
    columns: list[str]
    rows: list[list[str]]


def read_points(path: str | os.PathLike[str], *, lps: bool = False, film: bool = False) -> PointTable:
    """Points of a CSV with columns x, y, z in millimetres; other columns may stand beside them.

    Args:
        lps: the file holds ITK's LPS, as ANTs' point files do.
        film: the points lie in a film, z is 0 where there is no column of it.

    Errors: VolumeError for a file that is not such a table, with the row at fault.
    """
    path = Path(path)
    with _typed("read", path):
        try:
            with path.open(newline="", encoding="utf-8-sig") as file:
                first, *rows = [row for row in csv.reader(file) if row] or [[]]
        except (UnicodeDecodeError, csv.Error) as error:
            raise VolumeError(f"not a CSV file: {error}", "give a CSV with columns x, y, z") from None
        columns = [name.strip() for name in first]
        axes = "xy" if film and "z" not in columns else "xyz"
        if missing := [axis for axis in axes if axis not in columns]:
            cause = f"no column {listed(missing)} among {listed([repr(name) for name in columns]) or 'none'}"
            raise VolumeError(cause, f"name the columns {', '.join(axes)} in the first line, commas between them")
        places = [columns.index(axis) for axis in axes]
        points = np.zeros((len(rows), 3))
        for number, row in enumerate(rows):
            points[number, : len(axes)] = math.nan
            with suppress(ValueError, IndexError):
                points[number, : len(axes)] = [float(row[place]) for place in places]
            if len(row) != len(columns) or not np.isfinite(points[number]).all():
                cause = f"row {number + 1} is not {len(columns)} cells with numbers in {', '.join(axes)}"
                raise VolumeError(cause, "mend it or leave it out")
        return PointTable(points * np.diag(LPS)[:3] if lps else points, columns, rows)


def write_points(
    table: PointTable, path: str | os.PathLike[str], *, lps: bool = False, overwrite: bool = False
) -> None:
    """Write points into the rows of a CSV, in millimetres to 0.0001; all other columns stay."""
    path = Path(path)
    check_output(path, None, overwrite)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table.columns)
    places = [(table.columns.index(axis), n) for n, axis in enumerate("xyz") if axis in table.columns]
    for row, point in zip(table.rows, table.points_mm * np.diag(LPS)[:3] if lps else table.points_mm, strict=True):
        cells = list(row)
        for place, n in places:
            cells[place] = f"{point[n]:.4f}"
        writer.writerow(cells)
    with _typed("write", path):
        write_whole(path, text.getvalue().encode())
