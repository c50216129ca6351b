"""Synthetic anatomy: an endless, seeded supply of thorax-like CT and chest films whose true correspondence is known.

One canonical thorax is drawn from analytic shapes, in millimetres around the middle of the chest. A subject is
a smooth invertible map from its own voxels into that canonical space, plus an appearance: HU of every tissue,
contrast agent, texture, noise, blur. All subjects share the topology, so any two are matched exactly through
the canonical space. Arrays are (D, H, W) = (z, y, x), growing towards the head, the front and the patient's
right (RAS+, stored in reverse). Films are (H, W) as one looks at them: from the head down, the patient's right
on the left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError

CANONICAL_MM = 400.0  # edge of the canonical unit cube; its middle is the middle of the chest
ATLAS_EDGE = 200  # voxels along the cube: 2 mm, finer than the subjects drawn from it
FIELD_OF_VIEW_MM = 350.0  # width seen when no spacing is given: that of a chest scan
CONTROL_MM = 45.0  # knots of the elastic deformation: the size of a heart chamber
MAX_STRAIN = 0.7  # bound on |dv/dx| (row sum) of the elastic part: below 1 the map x + v(x) is one to one
ELASTIC_MM = (12.0, 4.0)  # SD of its coefficients with knots 90 and 45 mm apart: moves tissue 4 mm (SD) an axis
TOLERANCE_VOXELS = 0.03  # last step of the inversion; each step leaves less than `MAX_STRAIN` of the error
BLOOD_HU = (40.0, 350.0)  # from no contrast agent to CT angiography
WATER_PER_MM = 0.019  # attenuation of water at 70 keV, about the mean energy of a chest film (NIST: 0.193 / cm)
FILM_PHOTONS = (1e4, 2e5)  # a pixel of the unattenuated beam: noise of 1 % over the lungs and 1 to 10 % over the spine
FILM_LABELS: dict[str, tuple[str, ...]] = {  # channels of `Film.masks`, and the `LABELS` that each shows
    "lung_left": ("lung_left",),
    "lung_right": ("lung_right",),
    "heart": ("myocardium", "left_ventricle", "right_ventricle", "left_atrium", "right_atrium"),
    "spine": ("spine",),
}
SEEN_MM = 6.0  # a mask holds the pixels whose ray passes at least so much of the organ


@dataclass(frozen=True)
class Subject:
    """One synthetic scan.

    hu: intensities in HU, (D, H, W) float32. labels: ids of `LABELS`, (D, H, W) uint8.
    canonical: where each voxel lies in the canonical unit cube, (3, D, H, W) float32, channels (z, y, x).
    spacing_mm: voxel size (z, y, x).
    """

    hu: Tensor
    labels: Tensor
    canonical: Tensor
    spacing_mm: tuple[float, float, float]


@dataclass(frozen=True)
class Film:
    """One synthetic chest film.

    image: grey values in [0, 1], bones bright, (H, W) float32. masks: whether the ray of a pixel passes
    through each of `FILM_LABELS`, (4, H, W) bool; organs overlap. canonical: where each ray passes through the plane of
    the canonical unit cube, (2, H, W) float32, channels (z, x). spacing_mm: pixel size (rows, columns).
    """

    image: Tensor
    masks: Tensor
    canonical: Tensor
    spacing_mm: tuple[float, float]


class Tissue(NamedTuple):
    """A material: its label, its range of HU over subjects, its texture (SD in HU), and its share of the
    contrast agent in the blood of the right (venous) and left (arterial) heart."""

    label: str
    low: float
    high: float
    texture: float = 6.0
    venous: float = 0.0
    arterial: float = 0.0


# HU: Hounsfield's scale as tabulated in radiology textbooks, at 120 kV.
TISSUES: dict[str, Tissue] = {
    "air": Tissue("background", -1000, -1000, 0),
    "skin": Tissue("soft_tissue", 0, 40),
    "fat": Tissue("fat", -115, -90, 10),
    "muscle": Tissue("soft_tissue", 40, 60, 14, 0, 0.03),
    "mediastinum": Tissue("soft_tissue", -85, 0, 30),
    "viscera": Tissue("soft_tissue", -60, 30, 50),
    "lung_left": Tissue("lung_left", -860, -760, 25),
    "lung_right": Tissue("lung_right", -860, -760, 25),
    "vessel_left": Tissue("lung_left", 40, 40, 5, 0.5, 0.5),
    "vessel_right": Tissue("lung_right", 40, 40, 5, 0.5, 0.5),
    "airway": Tissue("airway", -1000, -960, 4),
    "myocardium": Tissue("myocardium", 40, 60, 8, 0, 0.25),
    "left_ventricle": Tissue("left_ventricle", 35, 45, 5, 0, 1),
    "right_ventricle": Tissue("right_ventricle", 35, 45, 5, 1, 0),
    "left_atrium": Tissue("left_atrium", 35, 45, 5, 0, 1),
    "right_atrium": Tissue("right_atrium", 35, 45, 8, 0.9, 0),
    "aorta": Tissue("aorta", 35, 45, 4, 0, 0.97),
    "pulmonary_artery": Tissue("pulmonary_artery", 35, 45, 4, 1, 0),
    "vena_cava": Tissue("vena_cava", 35, 45, 12, 0.9, 0),
    "liver": Tissue("liver", 45, 65, 8, 0.05, 0.15),
    "spleen": Tissue("spleen", 40, 55, 6, 0.05, 0.25),
    "stomach": Tissue("stomach", 0, 50, 25),
    "canal": Tissue("spine", 20, 40),
    "disc": Tissue("spine", 60, 110),
    "marrow": Tissue("spine", 150, 280, 40),
    "cortex": Tissue("spine", 350, 650, 60),
    "rib": Tissue("ribs", 300, 650, 80),
}
TISSUE_IDS = {name: index for index, name in enumerate(TISSUES)}
LABELS: dict[str, int] = {  # in the order of the table, from 0
    label: index for index, label in enumerate(dict.fromkeys(t.label for t in TISSUES.values()))
}

# Ellipsoids: tissue, centre (z, y, x) mm, radii mm; with an axis given the radii are (along it, across it).
# Tubes: tissue, first and last radius mm, points (z, y, x) mm. Later shapes cover earlier ones.
Point = tuple[float, float, float]
ELLIPSOIDS: tuple[tuple[str, Point, tuple[float, ...], Point | None], ...] = (
    ("mediastinum", (-30, 22, -18), (64, 52, 62), None),  # pericardial fat
    ("myocardium", (-38, 42, 2), (40, 30, 38), None),  # wall of the right ventricle
    ("myocardium", (-26, 22, 34), (34, 29, 27), None),  # wall of the right atrium
    ("myocardium", (-8, -14, -4), (26, 22, 34), None),  # wall of the left atrium
    ("left_atrium", (-8, -14, -4), (23, 19, 31), None),
    ("right_atrium", (-26, 22, 34), (31, 26, 24), None),
    ("right_ventricle", (-38, 42, 2), (36, 26, 34), None),
    ("right_ventricle", (-12, 46, -14), (26, 16, 18), None),  # its outflow tract
    ("myocardium", (-40, 22, -36), (52, 33), (-0.45, 0.55, -0.70)),
    ("left_ventricle", (-37, 18, -31), (42, 22), (-0.45, 0.55, -0.70)),
    ("liver", (-128, 40, 0), (30, 42, 62), None),  # left lobe
    ("stomach", (-138, 22, -62), (34, 38, 36), None),
    ("spleen", (-136, -42, -84), (36, 34, 22), None),
)
TUBES: tuple[tuple[str, float, float, tuple[Point, ...]], ...] = (
    ("viscera", 8, 8, ((200, -30, -3), (60, -42, -4), (-60, -40, -8), (-120, -20, -20))),  # oesophagus
    ("vena_cava", 9, 11, ((120, 8, 40), (95, 18, 30), (40, 22, 32), (0, 22, 34))),  # superior
    ("vena_cava", 12, 12, ((-40, 10, 32), (-90, -2, 28), (-150, -20, 22), (-200, -30, 20))),  # inferior
    ("vena_cava", 7, 7, ((95, 20, 28), (100, 28, -10), (120, 12, -42))),  # left brachiocephalic vein
    ("pulmonary_artery", 15, 14, ((-8, 46, -18), (12, 40, -22), (30, 22, -20), (34, 6, -14))),
    ("pulmonary_artery", 12, 9, ((34, 6, -14), (32, -4, 12), (26, -12, 44))),
    ("pulmonary_artery", 12, 9, ((34, 6, -14), (36, -10, -34), (30, -22, -52))),
    ("aorta", 14, 15, ((-18, 16, -6), (5, 26, 8), (30, 32, 18), (55, 26, 18))),
    ("aorta", 15, 12, ((55, 26, 18), (72, 14, 10), (78, -8, -8), (70, -32, -22), (50, -46, -27))),
    ("aorta", 12, 10, ((50, -46, -27), (0, -50, -27), (-80, -48, -22), (-140, -40, -12), (-200, -36, -8))),
    ("aorta", 6, 5, ((80, 6, 4), (110, 4, 16), (200, -8, 24))),  # brachiocephalic and right carotid
    ("aorta", 5, 5, ((82, -10, -10), (120, -8, -24), (200, -10, -26))),  # left carotid
    ("airway", 9, 8, ((200, -14, 0), (120, -18, 0), (62, -26, 2))),
    ("airway", 7, 5, ((62, -26, 2), (42, -30, 26), (26, -34, 48))),
    ("airway", 7, 5, ((62, -26, 2), (36, -34, -28), (18, -38, -52))),
    ("rib", 6, 6, ((112, 74, 22), (122, 70, 60), (138, 40, 105), (142, 10, 135))),  # clavicles
    ("rib", 6, 6, ((112, 74, -22), (122, 70, -60), (138, 40, -105), (142, 10, -135))),
)


class _Canvas:
    """The canonical space in 2 mm voxels, painted tissue over tissue; coordinates are millimetres from its middle."""

    def __init__(self) -> None:
        axis = (torch.arange(ATLAS_EDGE) + 0.5) / ATLAS_EDGE * CANONICAL_MM - CANONICAL_MM / 2
        self.z, self.y, self.x = axis[:, None, None], axis[None, :, None], axis[None, None, :]
        self.atlas = torch.zeros((ATLAS_EDGE,) * 3, dtype=torch.uint8)

    def paint(self, tissue: str, mask: Tensor, box: tuple[slice, ...] = (slice(None),) * 3) -> None:
        self.atlas[box].masked_fill_(mask, TISSUE_IDS[tissue])

    def box_around(self, low: Tensor, high: Tensor) -> tuple[tuple[slice, ...], tuple[Tensor, Tensor, Tensor]]:
        """The part of the grid within [low, high] mm, as slices and as coordinates."""
        edges = torch.stack((low, high)) / CANONICAL_MM * ATLAS_EDGE + ATLAS_EDGE / 2
        box = tuple(slice(max(int(a), 0), max(int(b) + 1, 0)) for a, b in edges.T.tolist())
        return box, (self.z[box[0]], self.y[:, box[1]], self.x[:, :, box[2]])

    def ellipsoid(self, tissue: str, centre: Point, radii: Sequence[float], direction: Point | None) -> None:
        reach = torch.tensor(radii if direction is None else (max(radii),) * 3)
        box, here = self.box_around(torch.tensor(centre) - reach, torch.tensor(centre) + reach)
        dz, dy, dx = (a - c for a, c in zip(here, centre, strict=True))
        if direction is None:
            level = (dz / radii[0]) ** 2 + (dy / radii[1]) ** 2 + (dx / radii[2]) ** 2
        else:
            along2 = (dz * direction[0] + dy * direction[1] + dx * direction[2]) ** 2
            level = along2 / radii[0] ** 2 + (dz**2 + dy**2 + dx**2 - along2) / radii[1] ** 2
        self.paint(tissue, level < 1, box)

    def tube(self, tissue: str, first: float, last: float, points: Sequence[Sequence[float]], only: str = "") -> None:
        radii = torch.linspace(first, last, len(points)).tolist()
        for a, b, ra, rb in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
            ends = torch.tensor((a, b))
            box, here = self.box_around(ends.amin(0) - max(ra, rb), ends.amax(0) + max(ra, rb))
            step = ends[1] - ends[0]
            dz, dy, dx = (h - c for h, c in zip(here, a, strict=True))
            t = ((dz * step[0] + dy * step[1] + dx * step[2]) / (step @ step)).clamp(0, 1)
            distance2 = (dz - t * step[0]) ** 2 + (dy - t * step[1]) ** 2 + (dx - t * step[2]) ** 2
            mask = distance2 < (ra + (rb - ra) * t) ** 2
            self.paint(tissue, mask & (self.atlas[box] == TISSUE_IDS[only]) if only else mask, box)


@lru_cache(maxsize=1)
def canonical_tissues() -> Tensor:
    """The canonical thorax, drawn once in a process: `TISSUE_IDS`, (200, 200, 200) uint8, 2 mm voxels."""
    canvas = _Canvas()
    inside = _draw_trunk(canvas)
    _draw_lung_vessels(canvas)
    _draw_organs(canvas, inside)
    _draw_spine(canvas)
    return canvas.atlas


def _draw_trunk(canvas: _Canvas) -> Tensor:
    """Body wall, rib cage and lungs; returns the inside of the cage."""
    z, y, x = canvas.z, canvas.y, canvas.x
    # Trunk: skin, fat, muscle; a superellipse that closes over the shoulders, and a neck.
    trunk = (x.abs() / 172) ** 2.4 + (y.abs() / 120) ** 2.4 + ((z - 40).clamp_min(0) / 172) ** 3
    neck = (x / 58) ** 2 + ((y + 10) / 60) ** 2 + (z < 60) * 9.0
    body = torch.minimum(trunk, neck)
    for tissue, level in (("skin", 1.0), ("fat", 0.96), ("muscle", 0.78)):
        canvas.paint(tissue, body < level)

    # Rib cage: its hull holds lungs above and viscera below; ribs are slanted bands around it.
    cage = (x / 134) ** 2 + (y / 88) ** 2 + ((z + 40).clamp_min(0) / 176) ** 2.4
    canvas.paint("fat", (cage > 1.18) & (cage < 1.25) & (body < 0.78))  # between the layers of muscle
    slant = z + 0.5 * y  # ribs descend towards the front
    ribs = (cage > 0.99) & (cage < 1.14) & (slant > -150) & (z < 120) & ((slant / 27) % 1 < 0.4)
    canvas.paint("rib", ribs & ((x.abs() > 24) | (y < 0)))
    sternum = (x.abs() < 17) & (z > -70) & (z < 100) & (((y - 88 + (z - 20).abs() * 0.12) / 6).abs() < 1)
    canvas.paint("rib", sternum)
    blade = (cage > 1.30) & (cage < 1.42) & (y < -15) & (x.abs() > 75 - 0.3 * z) & (z > 0) & (z < 120)
    canvas.paint("rib", blade)  # scapulae
    inside = cage < 0.95
    canvas.paint("viscera", inside)
    canvas.paint("lung_left", inside & (z > -150) & (x < 0))
    canvas.paint("lung_right", inside & (z > -150) & (x >= 0))
    return inside


def _draw_lung_vessels(canvas: _Canvas) -> None:
    """Two trees that fork from the hila, the same in every subject."""
    generator = torch.Generator().manual_seed(0)

    def grow(side: str, start: Tensor, direction: Tensor, length: float, radius: float) -> None:
        end = start + length * direction
        points = (start.tolist(), end.tolist())
        canvas.tube(f"vessel_{side}", radius, 0.75 * radius, points, only=f"lung_{side}")
        if radius > 2.0:
            for _ in range(3):
                turned = F.normalize(direction + 0.75 * torch.randn(3, generator=generator), dim=0)
                grow(side, end, turned, 0.8 * length, 0.75 * radius)

    for side, sign in (("left", -1.0), ("right", 1.0)):
        for up, front in ((0.8, 0.3), (0.1, 0.7), (-0.7, 0.3), (-0.5, -0.6), (0.4, -0.7)):
            direction = F.normalize(torch.tensor((up, front, 0.7 * sign)), dim=0)
            grow(side, torch.tensor((15.0, -15.0, 34.0 * sign)), direction, 38.0, 5.5)


def _draw_organs(canvas: _Canvas, inside: Tensor) -> None:
    """What lies between and below the lungs."""
    z, y, x = canvas.z, canvas.y, canvas.x
    canvas.paint("mediastinum", inside & ((x / (30 - 0.07 * z)) ** 2 + ((y + 5) / 100) ** 2 < 1))
    right_dome = ((z + 160) / 88) ** 2 + (y / 94) ** 2 + ((x - 60) / 80) ** 2
    left_dome = ((z + 165) / 80) ** 2 + ((y + 5) / 88) ** 2 + ((x + 68) / 74) ** 2
    canvas.paint("muscle", inside & (torch.minimum(left_dome, right_dome) < 1))  # diaphragm
    canvas.paint("viscera", inside & (left_dome < 0.93))
    canvas.paint("liver", inside & (right_dome < 0.93))
    for ellipsoid in ELLIPSOIDS:
        canvas.ellipsoid(*ellipsoid)
    for tube in TUBES:
        canvas.tube(*tube)


def _draw_spine(canvas: _Canvas) -> None:
    """A curved column of vertebrae and discs, 25 mm a level, with canal, arches and processes."""
    z, y, x = canvas.z, canvas.y, canvas.x
    middle = -60 - 12 * torch.cos(math.pi * (z + 20) / 260)
    behind, vertebra = y - middle, (z / 25) % 1
    column = (x / 19) ** 2 + (behind / 16) ** 2
    arch = (x / 17) ** 2 + ((behind + 24) / 13) ** 2
    spinous = (x.abs() < 5) & (behind < -30) & (behind > -46)
    transverse = (x.abs() < 36) & ((behind + 24).abs() < 6)
    canvas.paint("cortex", (arch < 1) | ((spinous | transverse) & (vertebra < 0.5)))
    canvas.paint("cortex", column < 1)
    canvas.paint("marrow", column < 0.72)
    canvas.paint("disc", (column < 1) & (vertebra > 0.8))
    canvas.paint("canal", (x / 10) ** 2 + ((behind + 23) / 8) ** 2 < 1)


def _spline(coefficients: Tensor, positions: Sequence[Tensor]) -> Tensor:
    """Cubic B-spline field (C, a, b[, c]) at a grid of positions, in knots from the first: -> (C, *grid)."""
    weights = []
    for axis, count in zip(positions, coefficients.shape[1:], strict=True):
        gap = (axis[:, None] - torch.arange(-1, count - 1)).abs()
        weights.append(torch.where(gap < 1, 2 / 3 - gap**2 + gap**3 / 2, (2 - gap).clamp_min(0) ** 3 / 6))
    field = weights[-2] @ (coefficients @ weights[-1].T)
    return torch.einsum("zi,ciyx->czyx", weights[0], field) if len(weights) == 3 else field


def _noise(channels: int, extent_mm: Sequence[float], knot_mm: float, generator: torch.Generator) -> Tensor:
    """White noise as coefficients of a B-spline over the extent: (channels, a, b[, c]), SD 1."""
    return torch.randn(channels, *(math.ceil(e / knot_mm) + 4 for e in extent_mm), generator=generator)


def _elastic(extent_mm: Sequence[float], strength: float, generator: torch.Generator) -> Tensor:
    """Coefficients (n, a, b[, c]) in mm of a displacement v, weakened if |dv/dx| exceeds `MAX_STRAIN`."""
    ndim = len(extent_mm)
    fine = _noise(ndim, extent_mm, CONTROL_MM, generator)
    coarse = _noise(ndim, extent_mm, 2 * CONTROL_MM, generator)
    coarse = _resize(coarse, fine.shape[1:])
    v = strength * (ELASTIC_MM[0] * coarse + ELASTIC_MM[1] * fine)
    step = 0.25  # knots between samples: the slope of a cubic spline hardly changes in between
    sampled = _spline(v, [torch.arange(0, e / CONTROL_MM + 2 * step, step) for e in extent_mm])
    inner = tuple(slice(n - 1) for n in sampled.shape[1:])
    changes = torch.stack([sampled.diff(dim=d)[(slice(None), *inner)] for d in range(1, ndim + 1)])  # (n, n, ...)
    strain = changes.abs().sum(0).max().item() / (step * CONTROL_MM)  # largest row sum of dv/dx
    return v * min(1.0, MAX_STRAIN / max(strain, 1e-6))


def _resize(field: Tensor, shape: Sequence[int]) -> Tensor:
    """A field (C, *grid) at another number of points from its first to its last, linearly."""
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    return F.interpolate(field[None], size=list(shape), mode=mode, align_corners=True)[0]


def _pose(variation: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Affine part, mm around the middle of the view -> canonical mm: matrix (3, 3), offset (3,)."""
    noise = variation * torch.randn(4, 3, generator=generator)
    az, ay, ax = (0.06 * noise[0]).tolist()  # rad, SD 3.5 degrees about each axis
    matrix = torch.linalg.matrix_exp(torch.tensor([[0.0, -ax, ay], [ax, 0.0, -az], [-ay, az, 0.0]]))
    scale = torch.exp(0.06 * noise[1] + 0.06 * noise[2, 0])  # build: each axis 6 %, size 6 %
    return matrix * scale, noise[3] * torch.tensor([14.0, 6.0, 6.0])


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator).item()


def _palette(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean HU and texture SD of every tissue in one subject, (len(TISSUES),) each."""
    enhanced = float(_uniform(0, 1, generator) < 0.65)  # about a third of chest scans go without contrast agent
    venous, arterial = (enhanced * _uniform(0, BLOOD_HU[1] - BLOOD_HU[0], generator) for _ in range(2))
    table = torch.tensor([t[1:] for t in TISSUES.values()])
    low, high, texture, venous_share, arterial_share = table.T
    hu = low + (high - low) * torch.rand(len(TISSUES), generator=generator)
    return hu + venous * venous_share + arterial * arterial_share, texture


def sample_subject(
    shape: tuple[int, int, int],
    generator: torch.Generator,
    spacing_mm: tuple[float, float, float] | None = None,
    variation: float = 1.0,
) -> Subject:
    """Draw one subject; the same generator state gives the same bits.

    Args:
        shape: (D, H, W) in voxels, at least 2 each.
        generator: CPU generator, the only source of randomness.
        spacing_mm: voxel size (z, y, x); by default isotropic, the wider of H and W spanning about 350 mm.
        variation: strength of pose and deformation; 0 puts the canonical thorax in the middle of the view.
    """
    if len(shape) != 3 or min(shape) < 2:
        raise ArgumentError(f"shape {tuple(shape)} is not a volume", "give (D, H, W), at least 2 voxels each")
    if spacing_mm is None:
        spacing_mm = (FIELD_OF_VIEW_MM * _uniform(0.9, 1.1, generator) / max(shape[1:]),) * 3
    extent_mm = [(n - 1) * s for n, s in zip(shape, spacing_mm, strict=True)]
    position_mm = [torch.arange(n) * s for n, s in zip(shape, spacing_mm, strict=True)]

    # Shape: x -> matrix @ (x + v(x)) + offset, x in mm around the middle of the view.
    moved = _spline(_elastic(extent_mm, variation, generator), [p / CONTROL_MM for p in position_mm])
    for axis, (position, extent) in enumerate(zip(position_mm, extent_mm, strict=True)):
        moved[axis] += (position - extent / 2).view([-1 if d == axis else 1 for d in range(3)])
    matrix, offset_mm = _pose(variation, generator)
    canonical = (matrix @ moved.flatten(1)).add_(offset_mm[:, None]).div_(CANONICAL_MM).add_(0.5)
    index = (canonical * ATLAS_EDGE).clamp_(0, ATLAS_EDGE - 1).long()
    tissue = canonical_tissues().flatten()[(index[0] * ATLAS_EDGE + index[1]) * ATLAS_EDGE + index[2]].long()

    # Appearance: HU of every tissue, smooth texture within it, noise, and the blur of the scanner.
    hu_of, texture_of = _palette(generator)
    knot_mm = _uniform(8.0, 20.0, generator)
    texture = _spline(_noise(1, extent_mm, knot_mm, generator), [p / knot_mm for p in position_mm])
    hu = hu_of[tissue].addcmul_(texture_of[tissue], texture.flatten(), value=2.0)  # the spline of noise has SD 0.4
    noise_hu = math.exp(_uniform(math.log(5.0), math.log(60.0), generator))  # before the blur
    hu = hu.add_(torch.randn(hu.shape, generator=generator), alpha=noise_hu).view(shape)
    hu = _blur(hu, _uniform(0.1, 0.45, generator))
    label_of = torch.tensor([LABELS[t.label] for t in TISSUES.values()], dtype=torch.uint8)
    return Subject(hu.clamp_(-1024), label_of[tissue].view(shape), canonical.view(3, *shape), spacing_mm)


def _blur(image: Tensor, weight: float) -> Tensor:
    """Give each voxel's neighbours `weight` along every axis: 0.1 to 0.45 is an SD of 0.3 to 0.7 voxel."""
    for axis, size in enumerate(image.shape):
        first, last = image.narrow(axis, 0, 1), image.narrow(axis, -1, 1)
        neighbours = torch.cat((first, image.narrow(axis, 0, size - 1)), axis)
        neighbours += torch.cat((image.narrow(axis, 1, size - 1), last), axis)
        image = torch.lerp(image, neighbours / 2, weight)
    return image


@lru_cache(maxsize=1)
def canonical_paths() -> Tensor:
    """How far a ray from back to front passes through each of `TISSUES`, (tissues, 200, 200) mm, axes (z, x)."""
    atlas = canonical_tissues()
    return torch.stack([(atlas == i).sum(1) for i in range(len(TISSUES))]) * (CANONICAL_MM / ATLAS_EDGE)


def sample_film(
    shape: tuple[int, int],
    generator: torch.Generator,
    spacing_mm: tuple[float, float] | None = None,
    variation: float = 1.0,
) -> Film:
    """Draw one chest film; the same generator state gives the same bits.

    A film is the canonical thorax projected from back to front by parallel rays. Its subject is deformed across the
    rays only, by a smooth invertible map of (z, x) that is the same at all depths, and stretched along them; so the
    projection of the deformed thorax is exactly the deformed projection, and two films match exactly through the
    canonical plane: see `true_displacement`. (Under a general 3D deformation no 2D displacement would be true.)

    Args:
        shape: (H, W) in pixels, at least 2 each.
        generator: CPU generator, the only source of randomness.
        spacing_mm: pixel size (rows, columns); by default the same, the wider axis spanning about 350 mm.
        variation: strength of pose and deformation; 0 puts the canonical thorax in the middle of the film.
    """
    if len(shape) != 2 or min(shape) < 2:
        raise ArgumentError(f"shape {tuple(shape)} is not a film", "give (H, W), at least 2 pixels each")
    if spacing_mm is None:
        spacing_mm = (FIELD_OF_VIEW_MM * _uniform(0.9, 1.1, generator) / max(shape),) * 2
    extent_mm = [(n - 1) * s for n, s in zip(shape, spacing_mm, strict=True)]
    position_mm = [torch.arange(n) * s for n, s in zip(shape, spacing_mm, strict=True)]

    # Shape: as of a subject, but in the plane, and turned round: rows run from the head down, columns to the left.
    moved = _spline(_elastic(extent_mm, variation, generator), [p / CONTROL_MM for p in position_mm])
    for axis, (position, extent) in enumerate(zip(position_mm, extent_mm, strict=True)):
        moved[axis] += (position - extent / 2).view([-1 if d == axis else 1 for d in range(2)])
    noise = variation * torch.randn(7, generator=generator)
    angle = 0.06 * noise[0]  # rad, SD 3.5 degrees
    matrix = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos())).view(2, 2)
    matrix = -matrix * torch.exp(0.06 * noise[1:3] + 0.06 * noise[3])  # build: each axis 6 %, size 6 %
    offset_mm = noise[4:6] * torch.tensor([14.0, 6.0])
    canonical = (matrix @ moved.flatten(1)).add_(offset_mm[:, None]).div_(CANONICAL_MM).add_(0.5).view(2, *shape)

    # Beer-Lambert: the logarithm of what is left of the beam is the sum of attenuation over the path.
    low, high = (torch.tensor([getattr(t, name) for t in TISSUES.values()]) for name in ("low", "high"))
    hu = low + (high - low) * torch.rand(len(TISSUES), generator=generator)
    per_mm = WATER_PER_MM * torch.exp(0.08 * noise[6]) * (1 + hu / 1000).clamp_min(0)  # a deeper chest: 8 %
    paths = canonical_paths()
    within = [[float(t.label in labels) for t in TISSUES.values()] for labels in FILM_LABELS.values()]
    layers = torch.tensordot(torch.cat([per_mm[None], torch.tensor(within)]), paths, dims=1)  # (1 + 4, 200, 200)
    grid = (2 * canonical - 1).flip(0).movedim(0, -1)  # canonical voxels are cells: their centres lie inside
    read = F.grid_sample(layers[None], grid[None], padding_mode="border", align_corners=False)[0]

    # Appearance: uneven soft tissue, photons counted, the detector's blur, and the S-shaped curve of a film.
    knot_mm = _uniform(8.0, 20.0, generator)
    texture = _spline(_noise(1, extent_mm, knot_mm, generator), [p / knot_mm for p in position_mm])[0]
    attenuation = read[0] * (1 + 0.02 * texture)
    photons = math.exp(_uniform(math.log(FILM_PHOTONS[0]), math.log(FILM_PHOTONS[1]), generator))
    counts = torch.poisson(photons * torch.exp(-attenuation), generator=generator).clamp_min(1)
    measured = _blur(math.log(photons) - counts.log(), _uniform(0.1, 0.45, generator))
    middle, width = _uniform(0.48, 0.62, generator), _uniform(0.12, 0.2, generator)  # of the strongest attenuation
    grey = torch.sigmoid((measured / attenuation.max() - middle) / width)
    black, white = (1 / (1 + math.exp((middle - end) / width)) for end in (0.0, 1.0))
    image = ((grey - black) / (white - black)).clamp(0, 1)
    return Film(image, read[1:] >= SEEN_MM, canonical, spacing_mm)


def _voxels(shape: Sequence[int]) -> Tensor:
    """Voxel positions, (n, *shape) float32, channels in index order."""
    return torch.stack(torch.meshgrid([torch.arange(float(n)) for n in shape], indexing="ij"))


def _affine_fit(canonical: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares affine map voxel -> canonical, (n, n) and (n,); on a full grid the axes decouple."""
    voxels, values = _voxels(canonical.shape[1:]).flatten(1), canonical.flatten(1)
    middle = voxels.mean(1, keepdim=True)
    centred = voxels - middle
    matrix = values @ centred.T / centred.square().sum(1)
    return matrix, values.mean(1) - (matrix @ middle).squeeze(1)


def _sample(canonical: Tensor, affine: Tensor, points: Tensor) -> Tensor:
    """Canonical map (n, *shape) at voxel positions (n, *grid), continued along `affine` outside."""
    last = torch.tensor(canonical.shape[1:]).sub(1).view(-1, *[1] * (points.ndim - 1))
    inside = torch.minimum(points.clamp_min(0), last)
    grid = (2 * inside / last - 1).flip(0).movedim(0, -1)  # (*grid, n), x first
    value = F.grid_sample(canonical[None], grid[None], mode="bilinear", align_corners=True)[0]
    return value + _apply(affine, points - inside)


def _apply(matrix: Tensor, points: Tensor) -> Tensor:
    """Matrix (n, n) on a field (n, *grid)."""
    return torch.einsum("ij,j...->i...", matrix, points)


def true_displacement(fixed: Subject | Film, moving: Subject | Film) -> Tensor:
    """The u that puts `moving` onto `fixed`: moving at x + u(x) is the anatomical point of fixed at x.

    The canonical map of `moving` is inverted by fixed-point iteration, y <- y + A^-1 (c_fixed(x) - c_moving(y))
    with A its affine part, at every fourth voxel and then at all. Where the point lies outside the moving field
    of view so does x + u(x), found by continuing the map affinely: leave such points out of a score.

    Returns: (3, D, H, W) for subjects or (2, H, W) for films, on the grid of `fixed`, in voxels of `moving`, channels
        in index order, exact to 0.05 voxel.
    """
    shape = list(fixed.canonical.shape[1:])
    if len(shape) != moving.canonical.ndim - 1:
        raise ArgumentError("a subject and a film have no true displacement", "give two subjects or two films")
    affine, constant = _affine_fit(moving.canonical)
    inverse = torch.linalg.inv(affine)

    def solve(target: Tensor, points: Tensor) -> Tensor:
        for _ in range(40):
            step = _apply(inverse, target - _sample(moving.canonical, affine, points))
            points = points + step
            if step.abs().max() < TOLERANCE_VOXELS:
                break
        return points

    target = _resize(fixed.canonical, [max(2, math.ceil(n / 4)) for n in shape])
    start = solve(target, _apply(inverse, target - constant.view(-1, *[1] * len(shape))))
    return solve(fixed.canonical, _resize(start, shape)) - _voxels(shape)
