"""Tests of the synthetic anatomy: a map that is one to one, a known correspondence, plausible HU."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.pretrain.anatomy import (
    FILM_LABELS,
    LABELS,
    TISSUES,
    WATER_PER_MM,
    Film,
    Subject,
    canonical_paths,
    sample_film,
    sample_subject,
    true_displacement,
)

CUBE = (64, 64, 64)
SHEET = (128, 128)


def subject(seed: int, shape: tuple[int, int, int] = CUBE, **settings: object) -> Subject:
    return sample_subject(shape, torch.Generator().manual_seed(seed), **settings)  # type: ignore[arg-type]


def film(seed: int, shape: tuple[int, int] = SHEET, **settings: object) -> Film:
    return sample_film(shape, torch.Generator().manual_seed(seed), **settings)  # type: ignore[arg-type]


def positions(displacement: Tensor) -> Tensor:
    """x + u(x) in voxels, (n, *shape)."""
    axes = [torch.arange(float(n)) for n in displacement.shape[1:]]
    return torch.stack(torch.meshgrid(axes, indexing="ij")) + displacement


def within(points: Tensor, shape: tuple[int, ...]) -> Tensor:
    last = torch.tensor(shape).view(-1, *[1] * len(shape)) - 1
    return ((points >= 0) & (points <= last)).all(0)


def look_up(image: Tensor, points: Tensor) -> Tensor:
    """Image (C, *shape) at voxel positions (n, *grid), linearly along every axis."""
    last = torch.tensor(image.shape[1:]).view(-1, *[1] * (points.ndim - 1)) - 1
    grid = (2 * points / last - 1).flip(0).movedim(0, -1)
    return F.grid_sample(image[None], grid[None], align_corners=True)[0]


def jacobian(canonical: Tensor) -> Tensor:
    """Forward differences d canonical / d voxel, (D-1, H-1, W-1, 3, 3) or (H-1, W-1, 2, 2)."""
    inner = (slice(None), *[slice(n - 1) for n in canonical.shape[1:]])
    slopes = torch.stack([canonical.diff(dim=axis)[inner] for axis in range(1, canonical.ndim)])
    return slopes.movedim((0, 1), (-1, -2))


def dice(a: Tensor, b: Tensor) -> float:
    return (2 * (a & b).sum() / (a.sum() + b.sum())).item()


@pytest.mark.parametrize("seed", range(12))
def test_the_canonical_map_never_folds(seed: int) -> None:
    assert torch.linalg.det(jacobian(subject(seed).canonical)).min() > 0


@pytest.mark.parametrize("variation", [2.0, 5.0, 20.0])
def test_the_canonical_map_never_folds_however_strong_the_variation(variation: float) -> None:
    assert torch.linalg.det(jacobian(subject(3, variation=variation).canonical)).min() > 0


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_the_true_displacement_joins_equal_canonical_points(seed: int) -> None:
    fixed, moving = subject(seed), subject(seed + 1)
    points = positions(true_displacement(fixed, moving))
    inside = within(points, CUBE)
    assert inside.float().mean() > 0.3
    miss = look_up(moving.canonical, points)[:, inside] - fixed.canonical[:, inside]
    voxel = jacobian(moving.canonical).mean((0, 1, 2))  # canonical units for a step of one voxel
    assert torch.linalg.solve(voxel, miss).norm(dim=0).max() < 0.05


def test_a_subject_is_its_own_correspondence() -> None:
    one = subject(4)
    assert true_displacement(one, one).abs().max() < 0.05


def test_going_there_and_back_is_the_identity() -> None:
    a, b = subject(5), subject(6)
    there, back = true_displacement(a, b), true_displacement(b, a)
    points = positions(there)
    inside = within(points, CUBE)
    assert (there + look_up(back, points))[:, inside].abs().max() < 0.1


def test_labels_agree_after_the_true_warp() -> None:
    shape, spacing_mm = (80, 96, 96), (2.0, 2.0, 2.0)  # around the heart, voxels well below its chambers
    fixed, moving = subject(7, shape, spacing_mm=spacing_mm), subject(8, shape, spacing_mm=spacing_mm)
    points = positions(true_displacement(fixed, moving))
    inside = within(points, shape)
    large = ("lung_left", "lung_right", "spine")
    small = ("left_ventricle", "right_ventricle", "left_atrium", "right_atrium", "aorta", "pulmonary_artery")
    for organ in (*large, *small):
        own = moving.labels == LABELS[organ]
        truth = fixed.labels == LABELS[organ]
        warped = look_up(own[None].float(), points)[0] > 0.5
        before, after = dice(own & inside, truth & inside), dice(warped & inside, truth & inside)
        # The map itself is exact; sampling labels at voxels costs a fraction of a voxel along the surface.
        assert after > max(0.95 if organ in large else 0.90, before), (organ, before, after)


def test_the_same_seed_gives_the_same_bits() -> None:
    a, b = subject(11), subject(11)
    assert a.spacing_mm == b.spacing_mm
    for name in ("hu", "labels", "canonical"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_other_randomness_leaves_a_subject_alone() -> None:
    a = subject(11)
    torch.manual_seed(99)
    assert torch.equal(a.hu, subject(11).hu)


def test_different_seeds_differ_in_shape_and_in_contrast() -> None:
    a, b = subject(12), subject(13)
    assert not torch.equal(a.labels, b.labels)
    aorta = [s.hu[s.labels == LABELS["aorta"]].mean().item() for s in map(subject, range(16))]
    assert min(aorta) < 60 and max(aorta) > 200


def test_one_generator_yields_one_subject_after_the_other() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = sample_subject(CUBE, generator), sample_subject(CUBE, generator)
    assert not torch.equal(first.canonical, second.canonical)


@pytest.mark.parametrize("seed", range(6))
def test_every_label_is_in_a_typical_subject(seed: int) -> None:
    assert set(subject(seed).labels.unique().tolist()) == set(LABELS.values())


@pytest.mark.parametrize("seed", range(6))
def test_tissues_have_plausible_hu(seed: int) -> None:
    one = subject(seed)
    mean = {name: one.hu[one.labels == index].mean().item() for name, index in LABELS.items()}
    assert one.hu.min() >= -1024 and one.hu.isfinite().all()
    assert mean["background"] < -950
    assert max(mean["lung_left"], mean["lung_right"]) < -500
    assert -130 < mean["fat"] < -50
    assert -20 < mean["soft_tissue"] < 80
    assert 20 < mean["liver"] < 150
    assert min(mean["spine"], mean["ribs"]) > 150


def test_organs_lie_where_they_belong() -> None:
    one = subject(0, variation=0.0)

    def middle(organ: str) -> Tensor:
        return (one.labels == LABELS[organ]).nonzero().float().mean(0)  # (z, y, x)

    assert middle("liver")[2] > middle("spleen")[2]  # x grows to the patient's right
    assert middle("left_ventricle")[2] < middle("right_atrium")[2]
    assert middle("lung_left")[2] < middle("lung_right")[2]
    assert middle("spine")[1] < middle("left_atrium")[1] < middle("right_ventricle")[1]  # y grows to the front
    assert middle("liver")[0] < middle("left_ventricle")[0] < middle("airway")[0]  # z grows to the head


def test_without_variation_the_map_is_the_plain_grid_in_millimetres() -> None:
    canonical = subject(0, spacing_mm=(4.0, 5.0, 6.0), variation=0.0).canonical
    expected = torch.diag(torch.tensor([4.0, 5.0, 6.0])) / 400.0  # the canonical cube is 400 mm wide
    torch.testing.assert_close(jacobian(canonical), expected.expand(63, 63, 63, 3, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(canonical.mean((1, 2, 3)), torch.full((3,), 0.5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shape", [(48, 64, 64), (20, 33, 41), (2, 64, 48)])
def test_any_shape_works(shape: tuple[int, int, int]) -> None:
    one, other = subject(1, shape), subject(2, CUBE)
    assert one.hu.shape == one.labels.shape == shape and one.canonical.shape == (3, *shape)
    assert (one.hu.dtype, one.labels.dtype, one.canonical.dtype) == (torch.float32, torch.uint8, torch.float32)
    displacement = true_displacement(one, other)
    assert displacement.shape == (3, *shape) and displacement.isfinite().all()


def test_the_given_spacing_is_kept() -> None:
    one = subject(1, (24, 48, 48), spacing_mm=(10.0, 6.0, 6.0))
    assert one.spacing_mm == (10.0, 6.0, 6.0)
    lungs_ml = (one.labels == LABELS["lung_left"]).sum().item() * math.prod(one.spacing_mm) / 1000
    assert 800 < lungs_ml < 4000  # a lung of an adult


def test_a_shape_that_is_no_volume_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"shape \(64, 64\) is not a volume; give \(D, H, W\)"):
        subject(0, (64, 64))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("variation", [1.0, 20.0])
def test_the_canonical_map_of_a_film_never_folds(seed: int, variation: float) -> None:
    assert torch.linalg.det(jacobian(film(seed, variation=variation).canonical)).min() > 0


@pytest.mark.parametrize("seed", [0, 10, 20])
def test_the_true_displacement_of_films_joins_equal_canonical_points(seed: int) -> None:
    fixed, moving = film(seed), film(seed + 1)
    points = positions(true_displacement(fixed, moving))
    inside = within(points, SHEET)
    assert inside.float().mean() > 0.5
    miss = look_up(moving.canonical, points)[:, inside] - fixed.canonical[:, inside]
    pixel = jacobian(moving.canonical).mean((0, 1))
    assert torch.linalg.solve(pixel, miss).norm(dim=0).max() < 0.05


@pytest.mark.parametrize("seed", [0, 10])
def test_masks_and_grey_values_of_films_agree_after_the_true_warp(seed: int) -> None:
    fixed, moving = film(seed), film(seed + 1)
    points = positions(true_displacement(fixed, moving))
    inside = within(points, SHEET)
    warped = look_up(torch.cat([moving.masks.float(), moving.image[None]]), points)
    for index, organ in enumerate(FILM_LABELS):
        after = dice((warped[index] > 0.5) & inside, fixed.masks[index] & inside)
        before = dice(moving.masks[index] & inside, fixed.masks[index] & inside)
        assert after > max(0.95, before), (organ, before, after)

    def likeness(image: Tensor) -> float:
        ranks = [x[inside].argsort().argsort().float() for x in (image, fixed.image)]
        return torch.stack(ranks).corrcoef()[0, 1].item()

    assert likeness(warped[-1]) > max(0.98, likeness(moving.image))  # the same order of grey: all but the display


def test_a_film_is_the_projection_of_the_canonical_thorax() -> None:
    paths = canonical_paths()
    assert paths.shape == (len(TISSUES), 200, 200)
    assert (paths.sum(0) == 400).all()  # a ray crosses the whole cube
    air = list(TISSUES).index("air")
    assert paths[air, 100, 0] == 400 and 100 < 400 - paths[air, 100, 100] < 260  # a chest, mm from back to front


def test_the_densest_rays_of_a_film_are_the_brightest() -> None:
    one = film(0, spacing_mm=(400 / 128,) * 2, variation=0.0)
    middle_hu = torch.tensor([(t.low + t.high) / 2 for t in TISSUES.values()])
    attenuation = torch.tensordot(WATER_PER_MM * (1 + middle_hu / 1000).clamp_min(0), canonical_paths(), dims=1)
    attenuation = F.interpolate(attenuation.flip(0, 1)[None, None], size=SHEET, mode="bilinear")[0, 0]
    body = attenuation > 0.5
    ranks = [x[body].argsort().argsort().float() for x in (one.image, attenuation)]
    assert torch.stack(ranks).corrcoef()[0, 1] > 0.95


@pytest.mark.parametrize("seed", range(6))
def test_films_look_like_chest_films(seed: int) -> None:
    one = film(seed)
    lung = one.masks[:2].any(0) & ~one.masks[2:].any(0)
    below = torch.arange(SHEET[0])[:, None] > 0.8 * SHEET[0]  # under the domes the lung is behind the liver
    lungs, heart, spine = (one.image[m & ~below].median() for m in (lung, one.masks[2] & ~one.masks[3], one.masks[3]))
    assert lungs + 0.1 < heart < spine  # bones are bright
    assert one.image.min() == pytest.approx(0, abs=0.05) and 0.9 < one.image.max() <= 1
    share = one.masks.float().mean((1, 2))
    assert (share > torch.tensor([0.08, 0.08, 0.02, 0.06])).all() and (share < 0.35).all()


def test_a_film_shows_the_head_above_and_the_right_side_on_the_left() -> None:
    one = film(0, variation=0.0)
    right, left, heart = (
        one.masks[list(FILM_LABELS).index(n)].nonzero().float().mean(0) for n in ("lung_right", "lung_left", "heart")
    )
    assert right[1] < heart[1] < left[1]
    assert heart[0] > right[0]  # rows run from the head down
    assert (one.canonical.diff(dim=1)[0] < 0).all() and (one.canonical.diff(dim=2)[1] < 0).all()


def test_the_same_seed_gives_the_same_film_and_another_seed_another() -> None:
    a, b, c = film(11), film(11), film(12)
    for name in ("image", "masks", "canonical"):
        assert torch.equal(getattr(a, name), getattr(b, name))
        assert not torch.equal(getattr(a, name), getattr(c, name))


@pytest.mark.parametrize("shape", [(48, 64), (31, 2)])
def test_a_film_of_any_shape_has_the_spacing_asked_for(shape: tuple[int, int]) -> None:
    one = film(1, shape, spacing_mm=(5.0, 6.0))
    assert one.image.shape == shape and one.masks.shape == (4, *shape) and one.canonical.shape == (2, *shape)
    assert (one.image.dtype, one.masks.dtype, one.canonical.dtype) == (torch.float32, torch.bool, torch.float32)
    assert one.spacing_mm == (5.0, 6.0) and one.image.isfinite().all()


def test_a_shape_that_is_no_film_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"shape \(8, 8, 8\) is not a film; give \(H, W\)"):
        film(0, (8, 8, 8))  # type: ignore[arg-type]


def test_a_subject_and_a_film_are_no_pair() -> None:
    with pytest.raises(ArgumentError, match=r"no true displacement; give two subjects or two films"):
        true_displacement(subject(0), film(0))
