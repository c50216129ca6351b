"""Correspondence: for any point of one scan the point of another that shows the same anatomy, and how sure that is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, VolumeError, listed
from ..film import FilmPreprocessing, flattened, lay_frames, read_for
from ..models.backbone import Backbone
from ..transforms import LPS, Affine, Chain, Displacement, Grid, PointTable, Transform
from ..volume import MAX_BYTES, Prepared, Volume
from .features import backbone_of, body, device_of, prepare_for, recipe_of, repeated
from .refine import LINEAR
from .segment import Scan
from .sliding import Progress, Windows, evaluate, ready_copy

# Chosen with a nano CT model on four pairs of synthetic subjects that no test and no number of the docs uses.
STRIDE = 16  # voxels: windows begin at multiples of it, so that every level of a backbone falls on its own grid
MARGIN = 2  # strides of the border repeated around a scan: zeros there would tell the network where it is, not what
WINDOW, OVERLAP = {2: 36, 3: 10}, 0.4  # strides, and the least share of a window; a film of 512 pixels is one
POOLED = (1, 2, 4, 8)  # levels made of the one map of a module that has no levels
MOST_BLOCKS = 2**15  # of a scan that are compared with all of the other
SCALES_MM = (80.0, 40.0, 24.0, 20.0, 20.0, 20.0, 20.0, 20.0)  # residual that quarters a block's vote, round by round
RIGIDITY_MM = 100.0  # what a linear part that departs from the identity by 1 costs
SOFTNESS, SHARPEST = 0.3, 0.001  # temperature of the soft-argmax: a share of what the best lacks to 1, and the least
FINEST = 0.5  # voxels: the last step of the search
RETURN_VOXELS = 2.0  # of the model's grid: a way back that ends so far from the point lowers the confidence to 61 %
EDGE = 1e-3  # voxels: rounding may not decide whether a point lies in a scan
CHUNK = 2048  # points searched at once
AVERAGE = {2: F.avg_pool2d, 3: F.avg_pool3d}
IDENTITY = Affine(np.eye(4))


@dataclass(frozen=True, eq=False)
class Correspondence:
    """Matches of N points.

    points_mm: (N, 3) float64, world (x, y, z) of the other scan, in RAS+ millimetres; NaN for a point outside its own
        scan, or whose match would lie outside the other one.
    confidence: (N,) in [0, 1]: similarity, at least 0, times exp(-(return_mm / (2 voxels))^2 / 2), the voxels being
        those of the model's grid; 0 where there is no match.
    similarity: (N,) mean over the feature levels of the cosine similarity of point and match; NaN without a match.
    return_mm: (N,) how far from the point the match of its match lies, 0 for mutual nearest neighbours; NaN likewise.
    heat: when asked for, how alike each point is to every place of the other scan, on the grid of that scan, float32
        in [-1, 1]; None for a point outside its own scan.
    """

    points_mm: np.ndarray
    confidence: np.ndarray
    similarity: np.ndarray
    return_mm: np.ndarray
    heat: tuple[Volume | None, ...] = ()

    def to_list(self, *, lps: bool = False) -> list[dict[str, Any]]:
        """The matches one by one, for JSON: match_mm (None without a match), confidence, similarity, return_mm."""
        points = self.points_mm @ LPS[:3, :3] if lps else self.points_mm
        numbers = zip(points, self.confidence, self.similarity, self.return_mm, strict=True)
        return [
            {"match_mm": None, "confidence": 0.0, "similarity": None, "return_mm": None}
            if np.isnan(point).any()
            else {
                "match_mm": point.tolist(),
                "confidence": float(confidence),
                "similarity": float(similarity),
                "return_mm": float(return_mm),
            }
            for point, confidence, similarity, return_mm in numbers
        ]


def correspond(
    points_mm: np.ndarray,
    fixed: Scan,
    moving: Scan,
    model: nn.Module,
    *,
    start: Transform | None = None,
    heat: bool = False,
    precision: str = "float32",
    progress: Progress | None = None,
) -> Correspondence:
    """Find points of the fixed scan in the moving one; `Matcher` says how, and answers again for the same two scans.

    Args:
        points_mm: (N, 3), world (x, y, z) of the fixed scan, in RAS+ millimetres; of a film see `film`, z is 0.
        fixed, moving, model, start, precision, progress: see `Matcher`.
        heat: see `Matcher.match`.
    """
    matcher = Matcher(fixed, moving, model, start=start, precision=precision, progress=progress)
    return matcher.match(points_mm, heat=heat)


class Matcher:
    """Two scans whose features are computed, ready to be asked for matches in either direction.

    Features are the encoder's levels below full resolution and the local features, each standardised over the body and
    scaled to length 1; two places are as alike as the mean cosine over the levels. Then, coarse to fine:

    1. Blocks of the two bodies that are mutual nearest neighbours vote for an affine map. A `start` stands in for this
       step and the next.
    2. Around it, similarity is averaged over neighbouring blocks; a soft-argmax over a window gives a smooth field.
    3. Around that, every point is searched by itself, at last in steps of half a voxel, with a soft-argmax.

    Args:
        fixed, moving: scans or their paths; for a 2D model films, which are first laid frame on frame (`lay_frames`).
        model: with `preprocessing`; a Backbone, a module that has one as `unet` or `backbone`, or any module
            (B, C, *spatial) -> (B, K, *spatial).
        start: from the fixed scan's world to the moving one's, such as a registration's.
        precision: of the backbone, see `sliding_slabs`.
        max_bytes: the most memory that the features of one scan may take.
        progress: called with (windows done, windows in all) of both scans.

    Memory: the features of both scans (of a U-Net 1.4 * width float32 a voxel), the activations of one window of 160
        voxels an axis, and similarities of 2048 blocks to at most 32,768.
    Errors: ArgumentError for a model that takes no scans; VolumeError for a scan that cannot be read or used.
    """

    def __init__(
        self,
        fixed: Scan,
        moving: Scan,
        model: nn.Module,
        *,
        start: Transform | None = None,
        precision: str = "float32",
        max_bytes: int = MAX_BYTES,
        progress: Progress | None = None,
    ) -> None:
        backbone = ready_copy(backbone_of(model))
        recipe = recipe_of(model)
        together = IDENTITY, IDENTITY
        if isinstance(recipe, FilmPreprocessing):
            *prepared, together = lay_frames(read_for(fixed, recipe), read_for(moving, recipe), recipe)
        else:
            prepared = [prepare_for(scan, model) for scan in (fixed, moving)]
        bodies = [flattened(body(scan, model), recipe) for scan in prepared]
        windows = [_windows(inside.shape, _stride(backbone)) for inside in bodies]
        first, total = len(windows[0]), sum(map(len, windows))

        def after(done_before: int) -> Progress | None:
            return None if progress is None else lambda done, _: progress(done_before + done, total)

        self.fixed, self.moving = (
            _describe(scan, inside, place, backbone, tiles, precision, max_bytes, after(before))
            for scan, inside, place, tiles, before in zip(prepared, bodies, together, windows, (0, first), strict=True)
        )
        self._there: Transform
        self._back: Transform
        if start is None:
            affine = align(self.fixed, self.moving)
            self._there = _refine(self.fixed, self.moving, affine)
            self._back = _refine(self.moving, self.fixed, affine.inverse())
        else:
            self._there = Chain((together[0].inverse(), start, together[1]))
            self._back = self._there.inverse()

    def match(self, points_mm: np.ndarray, *, back: bool = False, heat: bool = False) -> Correspondence:
        """Find points of the fixed scan in the moving one; with `back`, points of the moving scan in the fixed one.

        Args:
            points_mm: (N, 3), world (x, y, z) in RAS+ millimetres.
            heat: also give the similarity of every point to all of the other scan: one float32 image of it a point.

        Errors: ArgumentError for points of another shape, not finite, or none of which lies in the scan.
        """
        source, target = (self.moving, self.fixed) if back else (self.fixed, self.moving)
        there, home = (self._back, self._there) if back else (self._there, self._back)
        points, inside = source.checked(points_mm)
        found, similarity, return_mm = (np.full((len(points), *n), np.nan) for n in ((3,), (), ()))
        for rows in np.array_split(np.flatnonzero(inside), max(1, -(-len(points) // CHUNK))):
            matched, alike = _search(source, target, there, source.together(points[rows]))
            seen = target.contains(target.index(matched)).numpy()
            rows, matched = rows[seen], matched[seen]
            returned, _ = _search(target, source, home, matched)
            found[rows], similarity[rows] = target.together.inverse()(matched), alike[seen]
            return_mm[rows] = np.linalg.norm(source.together.inverse()(returned) - points[rows], axis=1)
        voxel_mm = float(np.mean(source.prepared.spacing_mm[-source.body.ndim :]))
        confidence = np.clip(similarity, 0, 1) * np.exp(-np.square(return_mm / (RETURN_VOXELS * voxel_mm)) / 2)
        maps: tuple[Volume | None, ...] = ()
        if heat:
            maps = tuple(self.heat(p, back=back) if ok else None for p, ok in zip(points, inside, strict=True))
        return Correspondence(found, np.nan_to_num(confidence), similarity, return_mm, maps)

    def heat(self, point_mm: np.ndarray, *, back: bool = False, grid: str = "scan") -> Volume:
        """How alike one point (3,) is to every place of the other scan: the similarity that `match` searches, float32.

        Args: grid: "scan" for the other scan's own grid, "model" for the model's.
        Errors: ArgumentError for a point outside its scan.
        """
        source, target = (self.moving, self.fixed) if back else (self.fixed, self.moving)
        points, _ = source.checked(np.asarray(point_mm)[None])
        query = source.at(source.index(source.together(points))).split([len(level) for level in target.maps])
        total = torch.zeros(target.body.shape)
        inside = tuple(slice(0, size) for size in total.shape)
        for level, vector, step in zip(target.maps, query, target.steps, strict=True):
            cosine = torch.tensordot(vector[:, 0], level, 1)[None, None] / math.sqrt(len(target.maps))
            if step > 1:
                cosine = F.interpolate(cosine, scale_factor=step, mode=LINEAR[total.ndim], align_corners=False)
            total += cosine[(0, 0, *inside)]
        total = total.view(target.prepared.shape)
        return target.prepared.restore(total) if grid == "scan" else target.prepared.place(total)


@dataclass(frozen=True, eq=False)
class Described:
    """A scan and its features, n = 3, or those of a film, n = 2.

    body: (*shape) bool. together: from the scan's world to the one in which both scans are matched, whose points are
    meant below. maps: a level each, (C, *coarse) float32, unit vectors; `steps` voxels of the model's grid are one of
    theirs, and the first ones of both begin at the same place.
    """

    prepared: Prepared
    body: Tensor
    together: Affine
    maps: tuple[Tensor, ...]
    steps: tuple[int, ...]

    @cached_property
    def affine(self) -> np.ndarray:
        """Voxel (z, y, x) -> point (x, y, z), (4, 4)."""
        return self.together.matrix @ self.prepared.affine

    def index(self, points_mm: np.ndarray) -> Tensor:
        """Voxels (z, y, x), of a film (y, x), of the model's grid, (N, n) float32, of points."""
        inverse = np.linalg.inv(self.affine)
        index = torch.from_numpy(points_mm @ inverse[:3, :3].T + inverse[:3, 3]).float()
        return index[:, -self.body.ndim :]

    def world(self, index: Tensor) -> np.ndarray:
        """Points (N, 3) of voxels."""
        voxels = F.pad(index, (3 - self.body.ndim, 0)).double().numpy()
        return voxels @ self.affine[:3, :3].T + self.affine[:3, 3]

    def contains(self, index: Tensor) -> Tensor:
        """Whether voxels (..., n) lie in the field of view."""
        return ((index >= -0.5 - EDGE) & (index <= torch.tensor(self.body.shape) - 0.5 + EDGE)).all(-1)

    def checked(self, points_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Points of the scan's own world as float64, and which of them lie in the scan; some must."""
        points = np.asarray(points_mm, np.float64)
        if points.ndim != 2 or points.shape[1] != 3 or not np.isfinite(points).all():
            raise ArgumentError(f"points of shape {points.shape}", "give finite (N, 3): x, y, z in millimetres")
        inside = self.contains(self.index(self.together(points))).numpy()
        if len(points) and not inside.any():
            corners = self.world(torch.tensor(list(itertools.product(*((0.0, n - 1.0) for n in self.body.shape)))))
            corners = self.together.inverse()(corners)
            spans = ", ".join(f"{a:.0f} to {b:.0f}" for a, b in zip(corners.min(0), corners.max(0), strict=True))
            raise ArgumentError("no point lies in the scan", f"it spans {spans} mm along x, y, z (RAS+)")
        return points, inside

    def at(self, index: Tensor) -> Tensor:
        """Feature vectors at voxels (..., n), interpolated linearly, levels one after another: (F, ...), length 1."""
        ndim = self.body.ndim
        points, found = index.reshape(1, -1, *[1] * (ndim - 1), ndim), []
        for level, step in zip(self.maps, self.steps, strict=True):
            unit = (2 * points + 1) / (step * torch.tensor(level.shape[1:])) - 1
            values = F.grid_sample(level[None], unit.flip(-1), padding_mode="border", align_corners=False)
            found.append(F.normalize(values.view(len(level), *index.shape[:-1]), dim=0))
        return torch.cat(found).div_(math.sqrt(len(found)))

    def blocks(self, edge: int) -> tuple[Tensor, Tensor]:
        """Middles of blocks of `edge` voxels that tile the grid, (*blocks, n), and whether half of each is body."""
        axes = [torch.arange(-(-n // edge)) * edge + (edge - 1) / 2 for n in self.body.shape]
        share = AVERAGE[self.body.ndim](_covering(self.body.float(), edge)[None], edge)[0]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1), share >= min(0.5, float(share.max()))


# ---- tables of points


def parse_points(texts: Sequence[str], *, lps: bool = False, film: bool = False) -> PointTable:
    """Points written as "x,y,z", of a film as "x,y", as a table. Errors: ArgumentError for anything else."""
    rows, axes = [text.split(",") for text in texts], "xy" if film else "xyz"
    points = np.zeros((len(rows), 3))
    try:
        for point, row in zip(points, rows, strict=True):
            for k, cell in zip(range(len(axes)), row, strict=True):
                point[k] = float(cell)
    except ValueError:
        remedy = f"write each as {','.join(axes)} in millimetres"
        raise ArgumentError(f"points {listed(texts, ' ')}", remedy) from None
    return PointTable(points @ LPS[:3, :3] if lps else points, list(axes), rows)


def match_table(table: PointTable, found: Correspondence) -> PointTable:
    """The rows of the points with the places of their matches ("nan" without one), and a column `confidence`."""
    kept = [place for place, column in enumerate(table.columns) if column != "confidence"]
    rows = [[row[k] for k in kept] + [f"{c:.4f}"] for row, c in zip(table.rows, found.confidence, strict=True)]
    return PointTable(found.points_mm, [table.columns[k] for k in kept] + ["confidence"], rows)


# ---- features


def describe(
    scan: Prepared, inside: Tensor, model: nn.Module, precision: str = "float32", together: Affine = IDENTITY
) -> Described:
    """A scan with its features, standardised over `inside`, (*shape) bool; `together` as of `Described`."""
    backbone = ready_copy(backbone_of(model))
    windows = _windows(inside.shape, _stride(backbone))
    return _describe(scan, inside, together, backbone, windows, precision, MAX_BYTES, None)


def _stride(backbone: nn.Module) -> int:
    return max(STRIDE, backbone.stride) if isinstance(backbone, Backbone) else STRIDE


def _windows(shape: Sequence[int], stride: int) -> Windows:
    """Windows over a scan with its margin, in strides."""
    return Windows(tuple(-(-n // stride) + 2 * MARGIN for n in shape), (WINDOW[len(shape)],) * len(shape), OVERLAP)


def _levels(backbone: nn.Module, x: Tensor) -> list[Tensor]:
    """Feature maps of x (1, C, *shape), a multiple of the stride, each (1, C, *shape / step)."""
    if isinstance(backbone, Backbone):
        local = [len(backbone.levels) - 1] if backbone.has_decoder else []
        return backbone.forward_intermediates(x, [*range(1, backbone.encoder_levels), *local])
    found = backbone(x)
    return [AVERAGE[x.ndim - 2](found, step) for step in POOLED]


def _describe(
    scan: Prepared,
    inside: Tensor,
    together: Affine,
    backbone: nn.Module,
    windows: Windows,
    precision: str,
    max_bytes: int,
    progress: Progress | None,
) -> Described:
    """A scan with every feature level, blended over the windows."""
    stride, device = _stride(backbone), device_of(backbone)
    ndim = inside.ndim
    behind = [stride * n - size - stride * MARGIN for n, size in zip(windows.shape, inside.shape, strict=True)]
    sides = [side for n in reversed(behind) for side in (stride * MARGIN, n)]
    image = repeated(scan.image, backbone)
    image = F.pad(image.view(*image.shape[:2], *inside.shape), sides, mode="replicate")
    maps: list[Tensor] = []
    for done, (box, share) in enumerate(windows, 1):
        patch = image[(slice(None), slice(None), *_finer(box, stride))].to(device)
        levels = evaluate(lambda x: _levels(backbone, x), patch, precision)
        per_stride = [level.shape[2] // share.shape[0] for level in levels]  # voxels of a level
        if not maps:
            count = sum(level.shape[1] * n**ndim for level, n in zip(levels, per_stride, strict=True))
            _check_bytes(4 * count * math.prod(windows.shape), max_bytes)
            maps = [
                torch.zeros(level.shape[1], *(n * size for size in windows.shape))
                for level, n in zip(levels, per_stride, strict=True)
            ]
        for target, level, n in zip(maps, levels, per_stride, strict=True):
            weight = F.interpolate(share[None, None], scale_factor=n)[0]
            target[(slice(None), *_finer(box, n))] += level[0].float().cpu() * weight
        if progress:
            progress(done, len(windows))
    steps = tuple(stride * windows.shape[0] // level.shape[1] for level in maps)
    vectors = [_unit_vectors(level, step, inside, stride) for level, step in zip(maps, steps, strict=True)]
    return Described(scan, inside, together, tuple(vectors), steps)


def _finer(box: Sequence[slice], factor: int) -> tuple[slice, ...]:
    """The box on a grid so many times finer."""
    return tuple(slice(s.start * factor, s.stop * factor) for s in box)


def _unit_vectors(level: Tensor, step: int, inside: Tensor, stride: int) -> Tensor:
    """A level without its margin; every channel gets mean 0 and SD 1 over the body, then every voxel length 1."""
    margin, spatial = MARGIN * stride // step, tuple(range(1, level.ndim))
    level = level[(slice(None), *[slice(margin, -margin)] * inside.ndim)]
    weight = AVERAGE[inside.ndim](_covering(inside.float(), stride)[None], step)[0]
    weight /= weight.sum()
    level = level - (level * weight).sum(spatial, keepdim=True)
    level /= (level.square() * weight).sum(spatial, keepdim=True).sqrt().clamp_min(1e-6)
    return F.normalize(level, dim=0)


def _covering(image: Tensor, multiple: int) -> Tensor:
    """An image (*shape) with zeros behind it up to a multiple of voxels an axis."""
    return F.pad(image, [side for n in reversed(image.shape) for side in (0, -n % multiple)])


def _check_bytes(needed: int, max_bytes: int) -> None:
    if needed > max_bytes:
        cause = f"the features of a scan take {needed / 2**30:.3g} GiB, more than {max_bytes / 2**30:.3g}"
        raise VolumeError(cause, "crop the scans, choose a narrower or coarser model, or raise max_bytes")


# ---- the search, coarse to fine


def align(fixed: Described, moving: Described, start: Affine | None = None) -> Affine:
    """The affine map on which blocks that are mutual nearest neighbours agree; counted first from all, or a start."""
    edge = _edge(fixed, moving)
    (a, in_a), (b, in_b) = (scan.blocks(edge) for scan in (fixed, moving))
    a, b = a[in_a], b[in_b]
    there, back = _nearest(fixed.at(a), moving.at(b))
    missed = (a[back[there]] - a).norm(dim=1) / edge
    vote = torch.exp(-missed.square() / 2).double().numpy()
    points, targets = fixed.world(a), moving.world(b[there])
    affine = start or _fit_affine(points, targets, vote)
    for scale in SCALES_MM:
        rest = np.linalg.norm(affine(points) - targets, axis=1)
        affine = _fit_affine(points, targets, vote / (1 + (rest / scale) ** 2) ** 2)
    return affine


def _edge(fixed: Described, moving: Described) -> int:
    """Voxels of a block: the fewest of 4, 8, 16, ... that make no more than `MOST_BLOCKS`."""
    voxels, edge = max(math.prod(scan.body.shape) for scan in (fixed, moving)), 4
    while voxels > MOST_BLOCKS * edge**fixed.body.ndim:
        edge *= 2
    return edge


def _nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of vectors (F, N) and (F, M): for each of the first the index of the nearest of the second, and the other way."""
    there, best, back = [], torch.full((b.shape[1],), -math.inf), torch.zeros(b.shape[1], dtype=torch.int64)
    for start in range(0, a.shape[1], CHUNK):
        cosine = a[:, start : start + CHUNK].T @ b
        there.append(cosine.argmax(1))
        value, index = cosine.max(0)
        back = torch.where(value > best, index + start, back)
        best = torch.maximum(value, best)
    return torch.cat(there), back


def _fit_affine(points: np.ndarray, targets: np.ndarray, weight: np.ndarray) -> Affine:
    """Weighted least squares, (N, 3) each; few points leave the linear part near the identity."""
    middle, centre = (np.average(array, 0, weight) for array in (points, targets))
    moved, aimed = points - middle, targets - centre
    rigid = RIGIDITY_MM**2 * np.eye(3)
    matrix = np.eye(4)
    matrix[:3, :3] = np.linalg.solve((moved.T * weight) @ moved + rigid, (moved.T * weight) @ aimed + rigid).T
    matrix[:3, 3] = centre - matrix[:3, :3] @ middle
    return Affine(matrix)


def _refine(source: Described, target: Described, affine: Affine) -> Chain:
    """The affine map after a smooth displacement of the source's blocks."""
    edge = _edge(source, target)
    middles, _ = source.blocks(edge)
    *shape, ndim = middles.shape
    sides = (1,) * (2 * ndim)
    points = middles.view(-1, ndim)
    query = source.at(points)
    start = target.index(affine(source.world(points)))
    place = start
    for offsets in (BALL[ndim] * edge, CROSS[ndim] * edge / 2):
        alike = torch.stack([_similarity(query, target, place + offset) for offset in offsets]).view(-1, 1, *shape)
        # The pooling's own padding refuses axes of fewer than 3 blocks.
        total, count = (AVERAGE[ndim](F.pad(x, sides), 3, 1) for x in (alike, torch.ones_like(alike[:1])))
        moved = place + _soft_argmax((total / count).flatten(1).T, offsets) - start
        for _ in range(2):
            padded = F.pad(moved.T.view(1, ndim, *shape), sides, mode="replicate")
            moved = AVERAGE[ndim](padded, 3, 1).view(ndim, -1).T
        place = start + moved
    field = affine.inverse()(target.world(place)) - source.world(points)
    voxel = np.eye(4)
    along = slice(3 - ndim, 3)
    voxel[along, along] *= edge
    voxel[along, 3] = (edge - 1) / 2
    d, h, w = (1, *shape)[-3:]
    grid = Grid((w, h, d), (source.affine @ voxel)[:, [2, 1, 0, 3]])
    return Chain((Displacement(field.reshape(d, h, w, 3).transpose(2, 1, 0, 3), grid), affine))


def _search(
    source: Described, target: Described, start: Transform, points_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Search the points (N, 3) around where `start` sends them: matches (N, 3) in the world, and similarities (N,)."""
    query = source.at(source.index(points_mm))
    place = target.index(start.map(points_mm).points_mm)
    step, ball = _edge(source, target) / 2, BALL[source.body.ndim]
    while step >= FINEST:
        around = place[:, None] + ball * step
        place = place + _soft_argmax(_similarity(query[..., None], target, around), ball * step)
        step /= 2
    return target.world(place), _similarity(query, target, place).double().numpy()


def _similarity(query: Tensor, target: Described, place: Tensor) -> Tensor:
    """Mean cosine of the query (F, ...) with the target at voxels (..., n); -1, the least, outside its view."""
    return torch.where(target.contains(place), (query * target.at(place)).sum(0), -1.0)


def _soft_argmax(alike: Tensor, offsets: Tensor) -> Tensor:
    """The mean of offsets (K, n) weighted by similarity (N, K): (N, n); the more alike the best, the sharper."""
    temperature = SOFTNESS * (1 - alike.amax(1, keepdim=True)).clamp_min(0) + SHARPEST
    return F.softmax(alike / temperature, 1) @ offsets


def _ball(radius: int, ndim: int) -> Tensor:
    """The whole-numbered offsets within a radius, (K, ndim) float32."""
    axis = torch.arange(-radius, radius + 1.0)
    offsets = torch.stack(torch.meshgrid(*[axis] * ndim, indexing="ij"), -1).view(-1, ndim)
    return offsets[offsets.norm(dim=1) <= radius]


BALL, CROSS = ({ndim: _ball(radius, ndim) for ndim in (2, 3)} for radius in (2, 1))  # in steps
