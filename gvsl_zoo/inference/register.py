"""Registration: the anatomy of one scan or film brought onto another, in world millimetres; no training."""

from __future__ import annotations

import itertools
import math
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArgumentError, VolumeError
from ..film import FilmPreprocessing, flattened, known_size, lay_frames, read_for
from ..losses import local_correlation
from ..models.gemini import GEMINI, WholeModule
from ..spatial import identity_grid, sample
from ..transforms import (
    Affine,
    Chain,
    Displacement,
    Grid,
    affine_from_voxels,
    displacement_from_voxels,
    jacobian,
    to_displacement,
    warp_volume,
)
from ..volume import Prepared, Preprocessing, Volume, canonical_view, prepare
from .correspond import IDENTITY, Described, align, describe
from .features import body, mask_on_grid, preprocessing_of, recipe_of, repeated
from .refine import Images, Progress, fit, fit_affine
from .sliding import device_of, evaluate, ready_copy

MAX_VOXELS = 176**3  # of a grid that is matched on; larger scans are matched at a coarser spacing
# Chosen with the embedded CT model on pairs of the chests that its training saw.
PASSES = 4  # of the matching heads at most, where no fit follows
SMOOTHING = 1.25  # voxels, of their displacement
REFINING_STEPS = 90  # where nothing is said and a model has no matching heads
SMALLEST_OVERLAP = 0.05  # of the fixed scan that the moving one must cover, once both are laid over each other
SEARCH_VOXELS = 24  # of the coarse grid along its longest axis, on which shifts are tried
SEARCH_WINDOW = 5
MOST_STRETCH = 2.0  # of one body's axis to the other's, when the features vote
COMPONENTS = 24  # principal components of all feature levels that the fit compares: 94 % of the variance
COMPONENT_STEP = 2  # voxels between those that the fit compares
BODY_STEP = 4  # voxels between those that the components are taken from
CHUNK = 2**13  # voxels whose features are read at once
Scan = Volume | str | os.PathLike[str]


@dataclass(frozen=True)
class Registration:
    """Where each point of the fixed scan lies in the moving one.

    warped: the moving scan on the fixed one's grid, resampled once.
    displacement_mm: the whole transform on the fixed scan's grid; `transforms.write_transform` writes it for ITK.
    affine: the affine part, world to world, from what lays the scans over each other on.
    jacobian: local volume change on the fixed scan's grid, of films that of area beyond what lays frame on frame; at
        most 0 where the map folds.
    report: ncc_before (as the headers have it, films frame on frame), ncc_start (laid over each other), ncc_after: mean
        local squared correlation in [0, 1]; folded: share of voxels; displacement_mm: mean, of films beyond what lays
        frame on frame; unit: "mm", or "pixels" for a fixed film of unknown pixel size, which count as 1 mm; answer:
        what the result rests on; seconds.
    """

    warped: Volume
    displacement_mm: Displacement
    affine: Affine
    jacobian: Volume
    report: dict[str, Any]


def register(
    moving: Scan,
    fixed: Scan,
    model: nn.Module,
    *,
    fixed_mask: Scan | None = None,
    moving_mask: Scan | None = None,
    refine: int | None = None,
    precision: str = "float32",
    progress: Progress | None = None,
) -> Registration:
    """Register two scans of any grids, spacings, orientations and fields of view, or two films of any size.

    First the shift between the scans is sought, from the headers and from the bodies' centres; with `refine`, also
    the affine map for which the features vote. Then the model's matching heads answer: in one pass where a fit
    follows, else in up to four, each of what the last has brought nearer; an answer that correlates worse than none is
    not taken. Last, with `refine`, affine and displacement are fitted to this pair, to the images and to the features
    of the model. Films are at first laid frame on frame: see `film.lay_frames`.

    Args:
        moving, fixed: scans of one channel, or paths; for a 2D model films.
        model: loaded with task="registration"; or any model with `preprocessing` that gives dense features, which then
            drive the fit alone.
        fixed_mask, moving_mask: on the grids of their scans; only where they are above 0 the images and
            their features count; the features there still see what lies around.
        refine: steps of the fit; 0 takes the heads' answer as it is. Default 0 with heads, 90 without.
        precision: of the model, "float32" or "bf16".
        progress: called with (steps done, steps in all).

    Errors: VolumeError for a scan or mask that cannot be used, or scans that do not overlap; ArgumentError for no
        refinement without heads.
    """
    began = time.perf_counter()
    model = getattr(model, "_orig_mod", model)  # what torch.compile hides
    heads = isinstance(model, WholeModule)
    steps = (0 if heads else REFINING_STEPS) if refine is None else refine
    if steps < 0 or not (steps or heads):
        raise ArgumentError(f"refine={steps} with a {type(model).__name__}", "without matching heads give 1 or more")
    pair = made_ready(fixed, moving, fixed_mask, moving_mask, model)
    target, counted, frames = pair.target, pair.counted, pair.to_world(IDENTITY)
    start = lay_over(pair.on_fixed, pair.on_moving, pair.masks, frames, pair.ndim)
    described = pair.described(model, precision) if steps else None
    if described:
        start = voted(pair, described, start)
    image, inside = pair.read(pair.on_moving.image, start), pair.read(pair.masks[1], start)
    overlap = float((inside * counted).sum() / counted.sum())
    if overlap < SMALLEST_OVERLAP:
        cause = f"the moving scan covers {100 * overlap:.1f} % of the fixed one"
        raise VolumeError(cause, "check that both show one part of the body, or crop the fixed scan to what both show")

    affine = torch.eye(pair.ndim, pair.ndim + 1)[None]
    displacement = torch.zeros(1, pair.ndim, *target.shape[2:])
    answer = "the scans laid over each other"
    if isinstance(model, WholeModule):
        found = answered(model, target, image, counted, precision, 1 if steps else PASSES)
        if found:
            (affine, displacement), answer = found, "the model's matching heads"
    if described:
        images = Images(target, image, common_features(*described, start), (counted, inside))
        fitted_affine, fitted = fit(images, steps, displacement, progress)
        if fitted is not displacement:
            affine, displacement, answer = fitted_affine, fitted, "fitted to the pair"

    grid = Grid.of(pair.fixed)
    merged = to_displacement(Chain((displacement_from_voxels(displacement, pair.on_fixed), start)), grid)
    warped = warp_volume(pair.moving, merged, grid)
    beyond = _beyond(merged, frames) if pair.ndim == 2 else merged
    volume_change = jacobian(beyond)
    before = pair.read(pair.on_moving.image, frames)
    report = {
        "ncc_before": correlation(before, target, counted),
        "ncc_start": correlation(image, target, counted),
        "ncc_after": correlation(moved(image, displacement), target, counted),
        "folded": float((volume_change.data <= 0).mean()),
        "displacement_mm": float(np.linalg.norm(beyond.field_mm, axis=-1).mean()),
        "overlap": overlap,
        "answer": answer,
        "unit": "pixels" if pair.ndim == 2 and not known_size(pair.fixed) else "mm",
        "spacing_mm": pair.on_fixed.spacing_mm,
        "seconds": time.perf_counter() - began,
    }
    linear = affine_from_voxels(affine, pair.on_fixed)
    return Registration(warped, merged, Affine(start.matrix @ linear.matrix), volume_change, report)


@dataclass(frozen=True)
class Pair:
    """Two scans as they are and on grids of one spacing.

    masks: the part of every voxel that counts, (1, 1, D, H, W), of either grid.
    together: what brings each world into one in which the scans lie together: films frame on frame, scans as they are.
    """

    fixed: Volume
    moving: Volume
    on_fixed: Prepared
    on_moving: Prepared
    masks: tuple[Tensor, Tensor]
    together: tuple[Affine, Affine]
    recipe: Preprocessing | FilmPreprocessing

    @property
    def ndim(self) -> int:
        return 2 if isinstance(self.recipe, FilmPreprocessing) else 3

    @property
    def target(self) -> Tensor:
        """The fixed image as a model takes it, (1, 1, *shape)."""
        return flattened(self.on_fixed.image, self.recipe)

    @property
    def counted(self) -> Tensor:
        """The fixed mask, (1, 1, *shape)."""
        return flattened(self.masks[0], self.recipe)

    def to_world(self, between: Affine) -> Affine:
        """A map in the world in which the scans lie together as one from the fixed world to the moving one."""
        return Affine(np.linalg.inv(self.together[1].matrix) @ between.matrix @ self.together[0].matrix)

    def from_world(self, transform: Affine) -> Affine:
        """The inverse of `to_world`."""
        return Affine(self.together[1].matrix @ transform.matrix @ np.linalg.inv(self.together[0].matrix))

    def read(self, image: Tensor, transform: Affine) -> Tensor:
        """An image of the moving grid on the fixed one, (1, 1, *shape), through a map from world to world."""
        return flattened(read_at(image, self.on_fixed, self.on_moving, transform), self.recipe)

    def described(self, model: nn.Module, precision: str) -> tuple[Described, Described]:
        """What a model's features say of both scans."""
        still, other = (
            describe(scan, flattened(_counted(scan, mask, model), self.recipe), model, precision, place)
            for scan, mask, place in zip((self.on_fixed, self.on_moving), self.masks, self.together, strict=True)
        )
        return still, other


def made_ready(fixed: Scan, moving: Scan, fixed_mask: Scan | None, moving_mask: Scan | None, model: nn.Module) -> Pair:
    """Read two scans and their masks, and bring them to what the model takes."""
    recipe = recipe_of(model)
    together = IDENTITY, IDENTITY
    if isinstance(recipe, FilmPreprocessing):
        fixed, moving = (read_for(scan, recipe) for scan in (fixed, moving))
        on_fixed, on_moving, together = lay_frames(fixed, moving, recipe)
    else:
        recipe = preprocessing_of(model)
        fixed, moving = (read_for(scan, recipe) for scan in (fixed, moving))
        recipe = replace(recipe, spacing_mm=_spacing(fixed, moving, recipe))
        on_fixed, on_moving = prepare(fixed, recipe), prepare(moving, recipe)
    masks = _mask(fixed_mask, on_fixed, recipe), _mask(moving_mask, on_moving, recipe)
    return Pair(fixed, moving, on_fixed, on_moving, masks, together, recipe)


def voted(pair: Pair, described: tuple[Described, Described], start: Affine) -> Affine:
    """The affine map for which the features vote, world to world, or the start where that correlates as much."""
    votes = align(*described)
    if not _likely(votes):
        votes = align(*described, pair.from_world(start))
    if not _likely(votes):
        return start
    tried = start, pair.to_world(votes)
    before, after = (correlation(pair.read(pair.on_moving.image, each), pair.target, pair.counted) for each in tried)
    return tried[after > before]


def answered(
    model: WholeModule, fixed: Tensor, moving: Tensor, mask: Tensor, precision: str, passes: int = PASSES
) -> tuple[Tensor, Tensor] | None:
    """What the matching heads answer, and answer again of what they have brought nearer, as long as it correlates more.

    The displacement is smoothed after every pass: that unfolds most of what folds, and costs next to no overlap.

    Returns: affine and displacement as of `match`, after several passes the affine nearest to the displacement; None
        where no pass correlates more.
    """
    affines = []
    displacement = torch.zeros(1, fixed.ndim - 2, *fixed.shape[2:])
    best = correlation(moving, fixed, mask)
    for _ in range(passes):
        found_affine, found = match(model, fixed, moved(moving, displacement), mask, precision)
        further = smoothed(found + moved(displacement, found))
        score = correlation(moved(moving, further), fixed, mask)
        if not score > best:
            break
        best, displacement = score, further
        affines.append(found_affine)
    if not affines:
        return None
    return affines[0] if len(affines) == 1 else fit_affine(displacement, mask), displacement


def smoothed(displacement: Tensor) -> Tensor:
    """A displacement (1, n, *shape) under a Gaussian, its border going on outside."""
    reach = math.ceil(3 * SMOOTHING)
    offsets = torch.arange(-reach, reach + 1)
    weights = (-offsets.square() / (2 * SMOOTHING**2)).softmax(0)
    for axis, size in enumerate(displacement.shape[2:], 2):
        places = (offsets[:, None] + torch.arange(size)).clamp(0, size - 1)
        total = torch.zeros_like(displacement)
        for weight, place in zip(weights.tolist(), places, strict=True):
            total.add_(displacement.index_select(axis, place), alpha=weight)
        displacement = total
    return displacement


def match(model: WholeModule, fixed: Tensor, moving: Tensor, mask: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Affine (1, n, n + 1) and displacement (1, n, *shape) that bring the moving image onto the fixed one, on the CPU.

    GEMINI has no affine head: there the affine is the one nearest to the displacement where the mask says so.
    """
    ready = ready_copy(model)
    pair = repeated(torch.cat([fixed, moving]), model).to(device_of(model))
    answer = evaluate(lambda pair: ready(*pair.split(1)), pair, precision)
    if isinstance(model, GEMINI):
        displacement = answer.displacement_ba.float().cpu()
        return fit_affine(displacement, mask), displacement
    return answer.affine.float().cpu(), answer.displacement.float().cpu()


def correlation(image: Tensor, fixed: Tensor, mask: Tensor) -> float:
    """Mean local squared correlation where the mask says so, in [0, 1]; all (1, 1, *shape).

    Beyond the border both are 0 for it, which agrees: in a thin slab images that share nothing have more than 0.
    """
    return float((local_correlation(image, fixed) * mask).sum() / mask.sum())


def moved(image: Tensor, displacement: Tensor) -> Tensor:
    """An image (1, C, *shape) read at x + displacement(x), voxels, its border going on outside."""
    return sample(image, identity_grid(image.shape[2:], image) + displacement, padding="border")


def read_at(image: Tensor, on_fixed: Prepared, on_moving: Prepared, transform: Affine) -> Tensor:
    """An image (1, C, D, H, W) of the moving grid on the fixed grid, through a transform of the world; 0 outside."""
    matrix = np.linalg.inv(on_moving.affine) @ transform.matrix @ on_fixed.affine  # voxels (z, y, x) to voxels
    points = identity_grid(on_fixed.shape, image)
    linear, shift = (torch.from_numpy(part).float() for part in (matrix[:3, :3], matrix[:3, 3:]))
    return sample(image, (linear @ points.flatten(1) + shift).view(1, *points.shape))


def lay_over(
    on_fixed: Prepared, on_moving: Prepared, masks: tuple[Tensor, Tensor], base: Affine = IDENTITY, ndim: int = 3
) -> Affine:
    """The base and the shift after it that lay the moving scan over the fixed one, world to world.

    Tried are none, and that of the bodies' centres with shifts around it: along z as far as the scans reach, as one may
    show more of the body; the best mean local correlation wins, and none on a tie. The base is as the headers have it,
    of films (ndim 2) frame on frame.
    """
    factor = max(1, round(max(on_fixed.shape) / SEARCH_VOXELS))
    still, moved = (_coarse(prepared, factor) for prepared in (on_fixed, on_moving))
    weights = [_coarse(replace(p, image=m), factor).image for p, m in ((on_fixed, masks[0]), (on_moving, masks[1]))]
    centres = [_centre_mm(p, w) for p, w in zip((still, moved), weights, strict=True)]
    step = np.abs(base.matrix[:3, :3]) @ np.array(still.spacing_mm)[::-1]  # x, y, z of the moving world
    reach = int(max(still.shape[0], moved.shape[0])) // 2
    shifts = [np.zeros(3), centres[1] - base(centres[0][None])[0]]
    for z, y, x in itertools.product(range(-reach, reach + 1), (-2, 0, 2), (-2, 0, 2)):
        shifts.append(shifts[1] + step * np.array([x, y, z]))
    best, best_score = base, -1.0
    target, counted = (x[:, :, 0] if ndim == 2 else x for x in (still.image, weights[0]))
    both = torch.cat([moved.image, weights[1]], 1)
    for shift in shifts:
        matrix = base.matrix.copy()
        matrix[:3, 3] += shift
        read = read_at(both, still, moved, Affine(matrix))
        image, inside = (read[:, :, 0] if ndim == 2 else read).split(1, 1)
        score = float((local_correlation(image, target, SEARCH_WINDOW) * inside * counted).mean())
        if score > best_score + 1e-6:
            best, best_score = Affine(matrix), score
    return best


def _likely(affine: Affine) -> bool:
    """Whether an affine map may be one between two people: no mirror, no axis beyond `MOST_STRETCH` or its inverse."""
    stretch = np.linalg.svd(affine.matrix[:3, :3], compute_uv=False)
    mirrored = np.linalg.det(affine.matrix[:3, :3]) < 0
    return not mirrored and bool(((stretch < MOST_STRETCH) & (stretch > 1 / MOST_STRETCH)).all())


def common_features(fixed: Described, moving: Described, start: Affine) -> tuple[Tensor, Tensor]:
    """What the features of both scans show, on every other voxel of the fixed grid, (1, K, *shape / 2) each.

    All levels together are many channels; their first principal components over both bodies say nearly the same.
    """
    bodies = [scan.at(middles[inside]) for scan in (fixed, moving) for middles, inside in [scan.blocks(BODY_STEP)]]
    vectors = torch.cat(bodies, 1).double()
    mean = vectors.mean(1, keepdim=True)
    axes = torch.linalg.eigh((vectors - mean) @ (vectors - mean).T).eigenvectors  # the last have the largest variance
    basis, mean = axes[:, -COMPONENTS:].T.float(), mean.float()
    shape = fixed.body.shape
    size = [-(-n // COMPONENT_STEP) for n in shape]
    places = [(torch.arange(m) + 0.5) * (n / m) - 0.5 for m, n in zip(size, shape, strict=True)]
    index = torch.stack(torch.meshgrid(*places, indexing="ij"), -1).view(-1, len(shape))
    to_moving = moving.together.matrix @ start.matrix @ np.linalg.inv(fixed.together.matrix)
    a, b = (
        torch.cat([basis @ (scan.at(part) - mean) for part in points.split(CHUNK)], 1).view(1, -1, *size)
        for scan, points in ((fixed, index), (moving, moving.index(Affine(to_moving)(fixed.world(index)))))
    )
    return a, b


def _coarse(prepared: Prepared, factor: int) -> Prepared:
    """The same image on voxels `factor` times as wide an axis."""
    D, H, W = (-(-size // factor) for size in prepared.shape)
    shape = (D, H, W)
    image = nn.functional.adaptive_avg_pool3d(prepared.image, shape)
    ratio = np.array([a / b for a, b in zip(prepared.shape, shape, strict=True)])
    to_fine = np.diag([*ratio, 1.0])
    to_fine[:3, 3] = (ratio - 1) / 2
    return replace(prepared, image=image, affine=prepared.affine @ to_fine)


def _centre_mm(prepared: Prepared, weight: Tensor) -> np.ndarray:
    """World point (x, y, z) of the centre of what is not air."""
    mass = ((prepared.image - prepared.image.min()) * weight)[0, 0].double()
    mass = mass if mass.any() else torch.ones_like(mass)
    centre = [
        (mass.sum([d for d in range(3) if d != axis]) @ torch.arange(n).double() / mass.sum()).item()
        for axis, n in enumerate(mass.shape)
    ]
    return (prepared.affine @ np.array([*centre, 1.0]))[:3]


def _spacing(fixed: Volume, moving: Volume, recipe: Preprocessing) -> tuple[float, float, float]:
    """The model's spacing (z, y, x), or a multiple of it where one of the scans would have more than MAX_VOXELS."""
    _, own = canonical_view(fixed)
    wanted = np.array(recipe.spacing_mm or own)
    voxels = max(np.prod(np.array(one.shape) * one.spacing_mm) for one in (fixed, moving)) / np.prod(wanted)
    z, y, x = (max(1.0, (voxels / MAX_VOXELS) ** (1 / 3)) * wanted).tolist()
    return z, y, x


def _counted(prepared: Prepared, mask: Tensor, model: nn.Module) -> Tensor:
    """The body where the mask says so, or where it says so at all if that is air: (D, H, W) bool."""
    masked = mask[0, 0] > 0
    inside = body(prepared, model) & masked
    return inside if inside.any() else masked


def _beyond(displacement: Displacement, start: Affine) -> Displacement:
    """What a displacement does after another map."""
    grid = displacement.grid
    points = grid.points()
    moves = start.inverse()(points + displacement.field_mm.reshape(-1, 3)) - points
    return Displacement(moves.reshape(*grid.shape, 3).astype(np.float32), grid)


def _mask(mask: Scan | None, prepared: Prepared, recipe: Preprocessing | FilmPreprocessing) -> Tensor:
    """The part of every voxel that counts, (1, 1, D, H, W)."""
    return torch.ones_like(prepared.image) if mask is None else mask_on_grid(mask, prepared, recipe)[None, None]
