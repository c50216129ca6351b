"""Tests of gvsl_zoo.transforms: theorems of maps in world millimetres, and SimpleITK as the judge of their files."""

from __future__ import annotations

import gzip
import struct
import sys
import tracemalloc
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from gvsl_zoo import spatial
from gvsl_zoo.errors import ArgumentError, VolumeError
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.transforms import (
    BLOCK,
    INVERSE_TOLERANCE,
    Affine,
    Chain,
    Displacement,
    Grid,
    Transform,
    affine_from_voxels,
    displacement_from_voxels,
    jacobian,
    read_transform,
    to_displacement,
    warp_volume,
    write_transform,
)
from gvsl_zoo.volume import InputWarning, Preprocessing, Volume, prepare, write_volume

LPS = np.array([-1.0, -1.0, 1.0])
CENTRE = np.array([12.0, -35.0, 80.0])  # mm; where all grids of these tests have their middle


def grid(
    shape: tuple[int, int, int],
    spacing: tuple[float, float, float],
    order: tuple[int, ...] = (0, 1, 2),
    signs: tuple[int, ...] = (1, 1, 1),
    tilt_degrees: float = 0,
) -> Grid:
    """Own axis n runs along world axis order[n] in direction signs[n]; then all is tilted about `CENTRE`."""
    axes = np.zeros((3, 3))
    for own, (world, sign) in enumerate(zip(order, signs, strict=True)):
        axes[world, own] = sign * spacing[own]
    axis = np.array([0.48, 0.6, 0.64]) * np.sin(np.radians(tilt_degrees / 2))
    affine = np.eye(4)
    affine[:3, :3] = nib.quaternions.quat2mat([np.cos(np.radians(tilt_degrees / 2)), *axis]) @ axes
    affine[:3, 3] = CENTRE - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return Grid(shape, affine)


FIXED = grid((44, 71, 38), (4.4, 3.1, 5.2), (1, 2, 0), (1, -1, -1), -17)  # more than one block, oblique, flipped
MOVING = grid((40, 36, 48), (5.0, 5.5, 4.0), (0, 1, 2), (-1, 1, 1), 12)


def affine(angle_degrees: float = 9, scale: float = 1.05) -> Affine:
    """A rotation about an oblique axis through `CENTRE`, a scaling, a shear, a shift."""
    axis = np.array([0.6, -0.64, 0.48]) * np.sin(np.radians(angle_degrees / 2))
    matrix = np.eye(4)
    matrix[:3, :3] = nib.quaternions.quat2mat([np.cos(np.radians(angle_degrees / 2)), *axis]) * scale
    matrix[:3, :3] += [[0, 0.05, 0], [0, 0, -0.04], [0.02, 0, 0.03]]
    matrix[:3, 3] = CENTRE - matrix[:3, :3] @ CENTRE + (4.0, -7.0, 5.0)
    return Affine(matrix)


def wave(on: Grid, amplitude_mm: float = 10) -> Displacement:
    """A smooth displacement; its strain stays below amplitude / 25 mm."""
    x, y, z = (on.points() - CENTRE).T
    moves = np.stack([np.sin(y / 40), np.cos(z / 50) * np.sin(x / 60), np.sin((x + y) / 60)], -1)
    return Displacement((amplitude_mm * moves).reshape(*on.shape, 3), on)


def cloud(n: int = 500, radius_mm: float = 60) -> np.ndarray:
    return CENTRE + np.random.default_rng(0).uniform(-radius_mm, radius_mm, (n, 3))


@pytest.fixture(scope="module")
def scan() -> Volume:
    """A CT-like volume, int16, on MOVING."""
    return Volume(subject().hu.numpy().T.astype(np.int16), MOVING.affine)


@pytest.fixture(scope="module")
def organs() -> Volume:
    """Its labels."""
    return Volume(subject().labels.numpy().T.copy(), MOVING.affine)


def subject():
    return sample_subject(MOVING.shape[::-1], torch.Generator().manual_seed(3), (4.0, 5.5, 5.0))


def reoriented(volume: Volume, order: tuple[int, int, int], flips: tuple[int, int, int]) -> Volume:
    """The same scan in a file with other axes."""
    image = nib.Nifti1Image(volume.data, volume.affine)
    image = image.as_reoriented(np.array(list(zip(order, flips, strict=True))))
    return Volume(np.asarray(image.dataobj), image.affine)


# ---- theorems


@pytest.mark.parametrize("transform", [Affine(np.eye(4)), Displacement(np.zeros((*FIXED.shape, 3)), FIXED), Chain(())])
def test_the_identity_changes_neither_points_nor_images(transform, scan, organs):
    np.testing.assert_allclose(transform(cloud()), cloud(), atol=1e-12)
    np.testing.assert_allclose(transform.inverse()(cloud()), cloud(), atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)  # MOVING reaches beyond FIXED
        np.testing.assert_allclose(warp_volume(scan, transform, MOVING).data, scan.data, atol=0.01)
        same = warp_volume(organs, transform, MOVING, nearest=True)
    np.testing.assert_array_equal(same.data, organs.data)
    assert same.data.dtype == organs.data.dtype


def test_a_translation_by_whole_voxels_shifts_an_image(scan):
    step = Affine(np.eye(4))
    step.matrix[:3, 3] = MOVING.affine[:3, :3] @ (3, -2, 1)  # a voxel reads 3 further along i, 2 back along j
    moved = warp_volume(scan, step, MOVING).data
    np.testing.assert_allclose(moved[:-3, 2:, :-1], scan.data[3:, :-2, 1:], atol=0.01)
    assert (moved[-3:] == scan.data.min()).all() and (moved[:, :2] == scan.data.min()).all()


@pytest.mark.parametrize("order, flips", [((0, 1, 2), (-1, 1, -1)), ((2, 0, 1), (1, -1, 1)), ((1, 0, 2), (-1, -1, -1))])
@pytest.mark.parametrize("nearest", [False, True])
def test_the_axes_in_which_a_file_stores_a_scan_do_not_matter(scan, organs, order, flips, nearest):
    volume = organs if nearest else scan
    chain = Chain((wave(FIXED), affine()))
    wanted = warp_volume(volume, chain, FIXED, nearest=nearest)
    same = warp_volume(reoriented(volume, order, flips), chain, FIXED, nearest=nearest)
    np.testing.assert_allclose(same.data, wanted.data, atol=0.01)

    turned = reoriented(wanted, order, flips)
    found = warp_volume(volume, chain, Grid.of(turned), nearest=nearest)
    np.testing.assert_allclose(found.data, turned.data, atol=0.01)


@pytest.mark.parametrize("transform", [affine(), affine(150, 0.4), Chain((affine(), affine(40)))])
def test_an_affine_and_its_inverse_undo_each_other(transform):
    np.testing.assert_allclose(transform.inverse()(transform(cloud())), cloud(), atol=1e-9)
    np.testing.assert_allclose(transform(transform.inverse()(cloud())), cloud(), atol=1e-9)


@pytest.mark.parametrize("angle", [0, 9, 80])  # a rotation by more than 60 degrees has a strain above 1
def test_a_displacement_and_its_inverse_undo_each_other(angle):
    whole = to_displacement(Chain((wave(FIXED), affine(angle))), FIXED)
    tolerance_mm = INVERSE_TOLERANCE * min(FIXED.spacing_mm)
    inverse = whole.inverse()
    there = inverse.map(cloud())
    assert not there.unsolved.any()
    np.testing.assert_array_less(np.linalg.norm(whole(there.points_mm) - cloud(), axis=1), tolerance_mm + 1e-9)
    np.testing.assert_array_less(np.linalg.norm(inverse(whole(cloud())) - cloud(), axis=1), 4 * tolerance_mm)
    assert inverse.inverse() is whole


def test_an_inverse_is_found_where_the_plain_iteration_diverges():
    """The slope of x -> x + 19.2 tanh(x / 12) is 1 far away and 2.6 in the middle, more than twice."""
    on = grid((90, 6, 6), (2.0, 10.0, 10.0))
    x = on.points()[:, 0] - CENTRE[0]
    moves = np.zeros((len(x), 3))
    moves[:, 0] = 19.2 * np.tanh(x / 12)
    steep = Displacement(moves.reshape(*on.shape, 3), on)
    mapped = steep.inverse().map(steep(cloud(radius_mm=25)))
    assert not mapped.unsolved.any()
    np.testing.assert_allclose(mapped.points_mm, cloud(radius_mm=25), atol=0.05)


def test_where_a_map_folds_an_inverse_is_right_or_told():
    """Whatever is not marked as unsolved maps back onto its point."""
    on = grid((60, 6, 6), (2.0, 10.0, 10.0))
    x = on.points()[:, 0] - CENTRE[0]
    moves = np.zeros((len(x), 3))
    moves[:, 0] = -30 * np.tanh(x / 12)  # turns back between -11 and 11 mm
    folded = Displacement(moves.reshape(*on.shape, 3), on)
    assert jacobian(folded).data.min() < -0.5
    mapped = folded.inverse().map(cloud())
    error = np.linalg.norm(folded(mapped.points_mm) - cloud(), axis=1)
    np.testing.assert_array_equal(mapped.unsolved, error > INVERSE_TOLERANCE * min(on.spacing_mm))
    assert mapped.unsolved.mean() < 0.5


def test_a_displacement_that_flattens_space_has_no_inverse_and_says_so():
    on = grid((20, 20, 20), (5.0, 5.0, 5.0))
    moves = np.zeros((*on.shape, 3))
    moves[..., 0] = CENTRE[0] - on.points()[:, 0].reshape(on.shape)  # all x become one
    flat = Displacement(moves, on)
    away = CENTRE + np.array([[20.0, 0, 0], [-20.0, 5, 5]])
    assert flat.inverse().map(away).unsolved.all()
    with pytest.warns(InputWarning, match=r"2 of 2 points have no inverse within 0\.01 voxel \(a fold\)"):
        flat.inverse()(away)


def test_a_chain_applies_its_parts_first_to_last_and_is_associative():
    a, b, c = wave(FIXED), affine(), wave(MOVING, 6)
    wanted = c(b(a(cloud())))
    for chain in (Chain((a, b, c)), Chain((Chain((a, b)), c)), Chain((a, Chain((b, c))))):
        np.testing.assert_array_equal(chain(cloud()), wanted)
    np.testing.assert_allclose(Chain((a, b, c)).inverse()(wanted), cloud(), atol=0.15)


@pytest.mark.filterwarnings("ignore::gvsl_zoo.volume.InputWarning")  # MOVING does not cover FIXED
def test_one_displacement_on_the_grid_does_what_the_chain_does(scan, organs):
    chain = Chain((wave(FIXED), affine(), wave(MOVING, 6)))
    fused = to_displacement(chain, FIXED)
    np.testing.assert_allclose(fused(FIXED.points()), chain(FIXED.points()), atol=1e-4)
    np.testing.assert_allclose(warp_volume(scan, fused, FIXED).data, warp_volume(scan, chain, FIXED).data, atol=0.05)
    labels = [warp_volume(organs, transform, FIXED, nearest=True).data for transform in (fused, chain)]
    np.testing.assert_array_equal(*labels)


def test_a_chain_resamples_once(scan):
    """There and back again is the identity; two resamplings would blur."""
    half = Affine(np.eye(4))
    half.matrix[:3, 3] = MOVING.affine[:3, :3] @ (0.5, 0.5, 0.5)
    core = (slice(2, -2),) * 3
    once = warp_volume(scan, Chain((half, half.inverse())), MOVING).data
    twice = warp_volume(warp_volume(scan, half, MOVING), half.inverse(), MOVING).data
    np.testing.assert_allclose(once, scan.data, atol=0.01)
    assert np.abs(twice - scan.data)[core].mean() > 20


@pytest.mark.parametrize("on", [FIXED, MOVING, grid((2, 9, 5), (3.0, 1.0, 2.0))])
def test_the_jacobian_of_an_affine_is_its_determinant_everywhere(on):
    for transform in (Affine(np.eye(4)), affine(), affine(80, 0.6)):
        found = jacobian(to_displacement(transform, on))
        np.testing.assert_allclose(found.data, np.linalg.det(transform.matrix), rtol=1e-4)
        np.testing.assert_array_equal(found.affine, on.affine)


def test_the_jacobian_of_one_slice_is_the_change_of_its_area():
    on = grid((9, 7, 1), (0.5, 0.25, 1))
    x, y, _ = np.moveaxis(on.points().reshape(9, 7, 1, 3), -1, 0)
    field = np.stack([0.2 * x + 0.1 * y, -0.3 * y, np.zeros_like(x)], -1)
    np.testing.assert_allclose(jacobian(Displacement(field, on)).data, 1.2 * 0.7, atol=1e-5)


def test_the_jacobian_of_a_stretch_is_its_slope_on_any_grid():
    """x -> x + x^2 / 400: central differences of a parabola are exact inside."""
    for on in (grid((30, 20, 25), (2.0, 3.0, 2.5)), grid((30, 20, 25), (2.0, 3.0, 2.5), (2, 0, 1), (-1, 1, -1))):
        x = (on.points()[:, 0] - CENTRE[0]).reshape(on.shape)
        field = np.stack([x**2 / 400, 0 * x, 0 * x], -1)
        core = (slice(1, -1),) * 3
        np.testing.assert_allclose(jacobian(Displacement(field, on)).data[core], (1 + x / 200)[core], atol=1e-4)
    folded = jacobian(Displacement(np.stack([-2 * x, 0 * x, 0 * x], -1), on))
    np.testing.assert_allclose(folded.data, -1, atol=1e-4)


# ---- resampling


def test_a_voxel_of_a_result_is_the_moving_scan_at_the_transformed_point(scan):
    """Block by block or one by one, the same."""
    chain = Chain((wave(FIXED), affine()))
    assert max(FIXED.shape) > BLOCK
    warped = warp_volume(scan, chain, FIXED).data
    index = np.random.default_rng(1).integers(0, FIXED.shape, (300, 3))
    where = MOVING.index(chain(FIXED.points().reshape(*FIXED.shape, 3)[tuple(index.T)]))
    inside = ((where >= 0) & (where <= np.array(MOVING.shape) - 1)).all(1)
    assert inside.sum() > 100
    for (i, j, k), at in zip(index[inside], where[inside], strict=True):
        low = np.minimum(np.floor(at).astype(int), np.array(MOVING.shape) - 2)
        cube = scan.data[tuple(slice(n, n + 2) for n in low)].astype(float)
        for part in at - low:
            cube = cube[0] * (1 - part) + cube[1] * part
        assert warped[i, j, k] == pytest.approx(cube, abs=0.02)


def test_coordinates_stay_exact_along_512_voxels_far_from_the_origin():
    long = Grid((512, 3, 3), np.diag([0.45, 1, 1, 1.0]) + np.pad([[1500.0], [-900.0], [700.0]], ((0, 1), (3, 0))))
    ramp = Volume(np.broadcast_to(np.arange(512.0)[:, None, None], long.shape).astype(np.float32), long.affine)
    shift = np.eye(4)
    shift[0, 3] = 0.45 / 4
    for transform in (Affine(shift), to_displacement(Affine(shift), long)):
        warped = warp_volume(ramp, transform, long).data
        np.testing.assert_allclose(warped[:-1], ramp.data[:-1] + 0.25, atol=5e-4)


def test_memory_is_that_of_the_result_and_a_block(scan):
    on = grid((1024, 64, 32), (0.2, 3.0, 6.0))
    tracemalloc.start()
    warped = warp_volume(scan, affine(), on)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    room = 200 * BLOCK**3
    assert peak < warped.data.nbytes + room
    assert room < 48 * warped.data.size  # what the coordinates of all voxels alone would take, before and after


def test_outside_the_field_of_view_are_no_labels_and_the_images_lowest_value(scan, organs):
    large = grid((30, 30, 30), (20.0, 20.0, 20.0))
    index = MOVING.index(large.points())
    outside = ~MOVING.contains(index).reshape(large.shape)
    identity = Affine(np.eye(4))
    assert (warp_volume(scan, identity, large).data[outside] == scan.data.min()).all()
    padded = Volume(np.where(scan.data < -900, -3024, scan.data), scan.affine)
    assert (warp_volume(padded, identity, large).data[outside] == -1024).all()
    marked = Volume(organs.data + np.uint8(1), organs.affine)
    assert ((warp_volume(marked, identity, large, nearest=True).data == 0) == outside).all()


def test_channels_are_resampled_like_images_of_their_own(scan):
    pair = Volume(np.stack([scan.data, 7 - scan.data], -1), scan.affine)
    warped = warp_volume(pair, affine(), FIXED)
    core = warp_volume(scan, affine(), FIXED).data
    inside = MOVING.contains(MOVING.index(affine()(FIXED.points()))).reshape(FIXED.shape)
    np.testing.assert_allclose(warped.data[inside, 0], core[inside], atol=0.01)
    np.testing.assert_allclose(warped.data[inside, 1], 7 - core[inside], atol=0.01)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.int64, np.float64])
def test_labels_of_any_type_keep_their_type_and_values(kind, organs):
    top = 2**24 + 1 if np.dtype(kind).itemsize >= 4 else 100  # beyond what float32 counts
    marked = Volume(organs.data.astype(kind) + kind(top), organs.affine)
    warped = warp_volume(marked, affine(), FIXED, nearest=True)
    plain = warp_volume(Volume(organs.data + np.uint8(1), organs.affine), affine(), FIXED, nearest=True)
    assert warped.data.dtype == kind
    np.testing.assert_array_equal(warped.data, np.where(plain.data == 0, 0, plain.data + kind(top - 1)))


def test_a_label_map_keeps_the_names_of_its_labels(organs):
    named = Volume(organs.data, organs.affine, comment='{"labels": []}')
    assert warp_volume(named, affine(), FIXED, nearest=True).comment == named.comment


def test_beyond_its_grid_a_displacement_goes_on_with_its_border_and_a_warning_says_so(scan):
    small = grid((5, 5, 5), (10.0, 10.0, 10.0))
    field = np.zeros((5, 5, 5, 3))
    field[..., 2] = np.arange(5)[:, None, None]  # mm, by i
    local = Displacement(field, small)
    far = CENTRE + np.array([[500.0, 0, 0], [-500.0, 0, 0], [0, 300, -300]])
    np.testing.assert_allclose((local(far) - far)[:, 2], (4, 0, 2), atol=1e-5)
    mapped = local.map(np.concatenate([far, CENTRE[None]]))
    np.testing.assert_array_equal(mapped.beyond, (True, True, True, False))
    with pytest.warns(InputWarning, match=r"\d+ of 118712 voxels lie beyond the displacement's grid"):
        warp_volume(scan, local, FIXED)


def test_a_transform_that_misses_the_moving_scan_is_an_error(scan):
    matrix = np.eye(4)
    matrix[0, 3] = 5000
    with pytest.raises(ArgumentError, match="sends no voxel of the grid into the moving scan; check that it belongs"):
        warp_volume(scan, Affine(matrix), FIXED)


# ---- from a model's voxels


def test_a_models_displacement_and_affine_do_in_the_world_what_they_do_on_the_grid(scan):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        prepared = prepare(scan, Preprocessing((5.0, 4.5, 5.5)))
    generator = torch.Generator().manual_seed(0)
    parameters = 0.3 * torch.randn(1, 15, generator=generator)
    parameters[:, 6:9] *= 10
    linear = spatial.affine_matrix(parameters)
    coarse = torch.randn(1, 3, 4, 4, 4, generator=generator)
    flow = 3 * torch.nn.functional.interpolate(coarse, prepared.shape, mode="trilinear")
    displacement = spatial.compose(linear, flow)

    on_grid = prepared.place(prepared.image)
    whole = displacement_from_voxels(displacement, prepared)
    parts = Chain((affine_from_voxels(linear, prepared), displacement_from_voxels(flow, prepared)))
    for moves, transform in (
        (displacement, whole),
        (displacement, parts),
        (spatial.compose(linear, 0 * flow), affine_from_voxels(linear, prepared)),
    ):
        wanted, seen = (spatial.warp(x, moves) for x in (prepared.image, torch.ones_like(prepared.image)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)
            found = warp_volume(Volume(on_grid.data[..., 0], on_grid.affine), transform, Grid.of(on_grid))
        core = prepared.place(seen).data[..., 0] > 0.9999  # at the edge models blend with 0
        assert core.mean() > 0.3
        np.testing.assert_allclose(found.data[core], prepared.place(wanted).data[..., 0][core], atol=2e-4)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda p: displacement_from_voxels(torch.zeros(1, 3, 4, 4, 4), p),
            r"shape \(1, 3, 4, 4, 4\); expected \(1, 3, 4",
        ),
        (lambda p: affine_from_voxels(torch.zeros(1, 2, 3), p), r"shape \(1, 2, 3\); expected \(1, 3, 4\)"),
        (lambda p: affine_from_voxels(torch.zeros(1, 3, 4), p), "the affine is singular"),
        (lambda p: Displacement(np.zeros((4, 4, 4)), MOVING), r"shape \(4, 4, 4\); expected \(40, 36, 48, 3\)"),
        (lambda p: Displacement(np.full((*MOVING.shape, 3), np.nan), MOVING), "not finite in 69120 voxels"),
        (lambda p: Affine(np.ones((3, 4))), "give 4 x 4 finite numbers"),
        (lambda p: Affine(np.diag([1, 1, 1, 2.0])), "the last row 0 0 0 1"),
        (lambda p: Affine(np.diag([1, np.nan, 1, 1])), "give 4 x 4 finite numbers"),
        (lambda p: Affine(np.diag([1, 0, 1, 1.0])), "singular"),
        (lambda p: Grid((3, 0, 3), np.eye(4)), "a grid of shape"),
        (lambda p: affine()(np.zeros(3)), r"points of shape \(3,\); expected \(N, 3\)"),
        (lambda p: affine()(np.full((2, 3), np.inf)), "2 of 2 points are not finite"),
    ],
)
def test_what_does_not_fit_is_told(scan, call, match):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        prepared = prepare(scan, Preprocessing())
    with pytest.raises(ArgumentError, match=match):
        call(prepared)


def test_no_points_are_no_trouble():
    for transform in (affine(), wave(FIXED), wave(FIXED).inverse(), Chain((affine(), wave(FIXED)))):
        assert transform(np.zeros((0, 3))).shape == (0, 3)


# ---- SimpleITK, the judge


@pytest.fixture
def sitk():
    module = pytest.importorskip("SimpleITK", reason="the judge of the files is SimpleITK")
    module.ProcessObject.SetGlobalWarningDisplay(False)
    return module


def itks_transform(sitk, path: Path):
    """As its users read it: a displacement through its image, anything else through ReadTransform."""
    if path.name.endswith((".nii", ".nii.gz")):
        return sitk.DisplacementFieldTransform(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
    return sitk.ReadTransform(str(path))


WRITTEN = [
    ("affine.tfm", affine()),
    ("affine.txt", affine()),
    ("0GenericAffine.mat", affine()),
    ("affine.h5", affine(80, 0.7)),
    ("1Warp.nii.gz", wave(FIXED)),
    ("warp.nii", wave(FIXED)),
    ("warp.h5", wave(FIXED)),
    ("affines.tfm", Chain((affine(), affine(30, 0.9)))),
    ("composite.h5", Chain((wave(FIXED), affine()))),
]


@pytest.mark.parametrize(("name", "transform"), WRITTEN, ids=[name for name, _ in WRITTEN])
def test_simpleitk_reads_what_we_write_and_resamples_to_the_same_image(sitk, tmp_path, scan, organs, name, transform):
    write_transform(transform, tmp_path / name)
    theirs = itks_transform(sitk, tmp_path / name)
    points = cloud(200)
    seen = np.array([theirs.TransformPoint(p) for p in (points * LPS).tolist()]) * LPS
    np.testing.assert_allclose(transform(points), seen, atol=1e-4)  # mm

    write_volume(Volume(np.zeros(FIXED.shape, np.uint8), FIXED.affine), tmp_path / "fixed.nii")
    fixed = sitk.ReadImage(str(tmp_path / "fixed.nii"))
    lowest = float(scan.data.min())
    for volume, nearest, kind, outside in (
        (scan, False, sitk.sitkLinear, lowest),
        (organs, True, sitk.sitkNearestNeighbor, 0),
    ):
        write_volume(volume, tmp_path / "moving.nii", overwrite=True)
        moving = sitk.ReadImage(str(tmp_path / "moving.nii"))
        judged = sitk.Resample(moving, fixed, theirs, kind, outside, sitk.sitkUInt8 if nearest else sitk.sitkFloat32)
        judged = sitk.GetArrayFromImage(judged).T
        ours = warp_volume(volume, transform, FIXED, nearest=nearest).data
        assert (judged != outside).mean() > 0.1
        if nearest:
            assert (judged != ours).mean() < 1e-4
        else:
            apart = np.abs(judged - ours)
            assert np.quantile(apart, 0.9999) < 0.1 and apart.mean() < 0.01  # HU


@pytest.mark.parametrize("name, transform", WRITTEN, ids=[name for name, _ in WRITTEN])
def test_what_is_written_is_read_again(tmp_path, name, transform):
    if name.endswith(".h5"):
        pytest.importorskip("SimpleITK", reason=".h5 needs SimpleITK")
    write_transform(transform, tmp_path / name)
    again = read_transform(tmp_path / name)
    assert type(again) is type(transform)
    np.testing.assert_allclose(again(cloud()), transform(cloud()), atol=1e-4)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    if isinstance(transform, Affine):
        np.testing.assert_allclose(again.matrix, transform.matrix, rtol=1e-12, atol=1e-12)


def itk_written(sitk, folder: Path) -> dict[str, object]:
    """Files as SimpleITK writes them, with what it holds them for."""
    linear = sitk.AffineTransform(3)
    linear.SetMatrix([1.1, 0.1, 0, -0.05, 0.9, 0.2, 0.05, 0, 1.0])
    linear.SetTranslation([1, -20, 3])
    linear.SetCenter([10, 200, -30])
    rigid = sitk.Euler3DTransform([5, 6, 7], 0.3, -0.2, 0.5, [3, 2, 1])
    similar = sitk.Similarity3DTransform(1.2, [0, 0.6, 0.8], 0.4, [1, 2, 3], [9, 8, 7])
    reference = sitk.Image([21, 24, 18], sitk.sitkUInt8)
    reference.SetSpacing([6, 5, 9])
    reference.SetOrigin([-70, -30, 10])
    reference.SetDirection(sitk.Euler3DTransform([0, 0, 0], 0.2, 0.1, -0.3).GetMatrix())
    field = sitk.TransformToDisplacementField(
        similar,
        sitk.sitkVectorFloat64,
        reference.GetSize(),
        reference.GetOrigin(),
        reference.GetSpacing(),
        reference.GetDirection(),
    )
    dense = sitk.DisplacementFieldTransform(sitk.Image(field))
    written = {
        "affine.tfm": linear,
        "affine.mat": linear,
        "rigid.tfm": rigid,
        "rigid.mat": rigid,
        "shift.txt": sitk.TranslationTransform(3, [4, 5, 6]),
        "similar.tfm": similar,
        "both.tfm": sitk.CompositeTransform([linear, rigid]),
        "lines.tfm": sitk.CompositeTransform([linear, sitk.AffineTransform(linear)]),
        "all.h5": sitk.CompositeTransform([rigid, dense]),
        "dense.h5": dense,
    }
    for name, transform in written.items():
        sitk.WriteTransform(transform, str(folder / name))
    sitk.WriteImage(field, str(folder / "dense.nii.gz"))
    sitk.WriteImage(sitk.Cast(field, sitk.sitkVectorFloat32), str(folder / "dense.nii"))
    return written | {"dense.nii.gz": dense, "dense.nii": dense}


def test_what_simpleitk_writes_is_read_as_it_means_it(sitk, tmp_path):
    written = itk_written(sitk, tmp_path)
    field = written["dense.h5"].GetDisplacementField()
    corners = [(0, 0, 0), (20, 23, 17), (3.5, 20.25, 7), (19, 2, 11.75)]  # voxels; in the field of view
    inside = np.array([field.TransformContinuousIndexToPhysicalPoint(c) for c in corners]) * LPS
    for name, theirs in written.items():
        wanted = np.array([theirs.TransformPoint(p) for p in (inside * LPS).tolist()]) * LPS
        found = read_transform(tmp_path / name).map(inside)
        assert not found.beyond.any(), name
        np.testing.assert_allclose(found.points_mm, wanted, atol=2e-4, err_msg=name)


def test_a_spline_is_refused_with_a_way_out(sitk, tmp_path):
    image = sitk.Image([20, 20, 20], sitk.sitkUInt8)
    sitk.WriteTransform(sitk.BSplineTransformInitializer(image, [3, 3, 3]), str(tmp_path / "spline.tfm"))
    with pytest.raises(VolumeError, match=r"neither linear nor a displacement; sample it .*ToDisplacementField"):
        read_transform(tmp_path / "spline.tfm")


def test_both_intents_of_a_displacement_are_read_as_itk_reads_them(sitk, tmp_path):
    write_transform(wave(FIXED), tmp_path / "vector.nii")
    image = nib.load(tmp_path / "vector.nii")
    assert image.header.get_intent()[0] == "vector" and image.shape == (*FIXED.shape, 1, 3)
    for intent in ("vector", "displacement vector"):
        image.header.set_intent(intent)
        nib.save(image, tmp_path / "either.nii")
        theirs = itks_transform(sitk, tmp_path / "either.nii")
        seen = np.array([theirs.TransformPoint(p) for p in (cloud() * LPS).tolist()]) * LPS
        np.testing.assert_allclose(read_transform(tmp_path / "either.nii")(cloud()), seen, atol=1e-4)


def test_a_mat_file_is_what_scipy_and_ants_hold_it_for(tmp_path):
    write_transform(affine(), tmp_path / "a.mat")
    loadmat = pytest.importorskip("scipy.io", reason="scipy reads MATLAB's files").loadmat
    stored = loadmat(tmp_path / "a.mat")
    matrix = np.eye(4)
    matrix[:3, :3] = stored["AffineTransform_double_3_3"][:9].reshape(3, 3)
    matrix[:3, 3] = stored["AffineTransform_double_3_3"][9:, 0]
    flip = np.diag([*LPS, 1])
    np.testing.assert_allclose(flip @ matrix @ flip, affine().matrix, atol=1e-12)
    assert stored["fixed"].shape == (3, 1) and not stored["fixed"].any()


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("kind", [0, 10])  # float64, float32
@pytest.mark.parametrize("name", ["AffineTransform", "MatrixOffsetTransformBase"])
def test_every_variety_of_an_ants_affine_is_read(tmp_path, order, kind, name):
    """LPS, a centre, either precision and byte order."""
    number = f"{order}f{4 if kind else 8}"
    label = f"{name}_{'float' if kind else 'double'}_3_3".encode() + b"\0"
    turn, shift, centre = (
        np.array([[0, -1, 0], [1, 0, 0], [0, 0, 2.0]]),
        np.array([1, 2, 3.0]),
        np.array([10, 20, 30.0]),
    )
    content = b""
    for text, column in ((label, [*turn.ravel(), *shift]), (b"fixed\0", centre)):
        content += struct.pack(f"{order}5i", kind + 1000 * (order == ">"), len(column), 1, 0, len(text))
        content += text + np.array(column, number).tobytes()
    (tmp_path / "a.mat").write_bytes(content)
    lps = cloud() * LPS
    wanted = (lps - centre) @ turn.T + centre + shift
    np.testing.assert_allclose(read_transform(tmp_path / "a.mat")(cloud()), wanted * LPS, atol=1e-9)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_writing_a_displacement_takes_no_second_copy_of_it(tmp_path, name):
    field = np.random.default_rng(0).normal(size=(60, 50, 40, 3)).astype(np.float32)
    displacement = Displacement(field, Grid((60, 50, 40), np.eye(4)))
    tracemalloc.start()
    write_transform(displacement, tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < field.nbytes / 2
    np.testing.assert_array_equal(read_transform(tmp_path / name).field_mm, field)


def test_an_affine_about_a_centre_is_read_from_text(tmp_path):
    text = (
        "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
        "Parameters: 2 0 0 0 1 0 0 0 1 0 0 5\nFixedParameters: 10 0 0\n"
    )
    (tmp_path / "a.tfm").write_text(text)
    found = read_transform(tmp_path / "a.tfm")(np.array([[-10.0, 7, 0], [-11, 7, 1]]))  # x doubles about LPS 10
    np.testing.assert_allclose(found, [[-10, 7, 5], [-12, 7, 6]])


# ---- files that cannot be used


HEAD = "#Insight Transform File V1.0\n"
ONES = "Parameters: 1 0 0 0 1 0 0 0 1 0 0 0\nFixedParameters: 0 0 0\n"
LINE = "Transform: AffineTransform_double_3_3\n"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.tfm", b"", "not ITK's text"),
        ("a.tfm", b"\x89PNG\r\n", "not ITK's text: it begins with"),
        ("a.tfm", HEAD, "holds no transform; give a file of ITK or ANTs"),
        ("a.tfm", HEAD + LINE, "has 0 and 0 numbers; expected 12 and 3"),
        ("a.tfm", HEAD + LINE + ONES.replace("1", "one"), "not numbers: 'Parameters: one"),
        ("a.tfm", HEAD + LINE + ONES.replace("1", "0"), "the affine is singular"),
        ("a.tfm", HEAD + LINE + ONES.replace("1", "nan"), "4 x 4 finite numbers"),
        ("a.txt", HEAD + (LINE + ONES) * 2, "2 transforms and no CompositeTransform; give each a file of its own"),
        ("a.tfm", HEAD + "Transform: CompositeTransform_double_3_3\n", "holds no transform"),
        ("a.mat", b"", "it holds nothing; expected one transform"),
        ("a.mat", b"MATLAB 5.0 MAT-file, Platform: PCWIN", "not a MATLAB 4 file"),
        ("a.mat", struct.pack("<5i", 0, 12, 1, 0, 4), "a matrix of 12 x 1 in 20 bytes"),
        ("a.mat", bytes(9), "truncated"),
        (
            "a.mat",
            struct.pack("<5i", 0, 1, 1, 0, 2) + b"x\0" + bytes(8),
            "it holds x; expected one transform and 'fixed'",
        ),
        ("a.nii", b"nothing of the kind", "not a NIfTI file"),
        ("a.png", b"\x89PNG", r"its ending is not one of a transform; give .*\.tfm"),
    ],
)
def test_a_file_that_is_no_transform_is_refused_by_name(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(VolumeError, match=f"cannot read '.*{name}': .*{match}|cannot read '.*{name}': {match}"):
        read_transform(tmp_path / name)


def test_a_missing_file_and_a_folder_are_told(tmp_path):
    for path in (tmp_path / "a.tfm", tmp_path):
        with pytest.raises(VolumeError, match="no such file; check the path"):
            read_transform(path)


def test_a_damaged_hdf5_file_is_told_in_one_line(sitk, tmp_path):
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200))
    with pytest.raises(VolumeError, match=r"^cannot read '.*a\.h5': .*; give a file of ITK or ANTs .*$") as caught:
        read_transform(tmp_path / "a.h5")
    assert "\n" not in str(caught.value)


def test_without_simpleitk_only_what_needs_it_fails(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    for name in ("a.tfm", "a.mat"):
        write_transform(affine(), tmp_path / name)
        np.testing.assert_allclose(read_transform(tmp_path / name).matrix, affine().matrix, atol=1e-12)
    with pytest.raises(VolumeError, match="this kind of transform needs SimpleITK; pip install 'gvsl-zoo"):
        write_transform(affine(), tmp_path / "a.h5")
    euler = HEAD + "Transform: Euler3DTransform_double_3_3\nParameters: 0 0 0 1 2 3\nFixedParameters: 0 0 0 0\n"
    (tmp_path / "rigid.tfm").write_text(euler)
    with pytest.raises(VolumeError, match="this kind of transform needs SimpleITK"):
        read_transform(tmp_path / "rigid.tfm")


def test_an_image_is_not_taken_for_a_displacement(tmp_path, scan):
    write_volume(scan, tmp_path / "scan.nii.gz")
    write_volume(Volume(np.zeros((4, 4, 4, 3), np.float32), np.eye(4)), tmp_path / "colours.nii.gz")
    for name, shape in (("scan", r"\(40, 36, 48\)"), ("colours", r"\(4, 4, 4, 3\)")):
        with pytest.raises(
            VolumeError, match=rf"an image of shape {shape}, intent 0: no displacement; give ITK's vector"
        ):
            read_transform(tmp_path / f"{name}.nii.gz")


@pytest.mark.filterwarnings("ignore::gvsl_zoo.volume.InputWarning")
def test_a_displacement_with_nan_is_refused(tmp_path):
    write_transform(wave(FIXED), tmp_path / "a.nii")
    image = nib.load(tmp_path / "a.nii")
    data = image.get_fdata(dtype=np.float32)
    data[3, 4, 5, 0, 1] = np.nan
    nib.save(nib.Nifti1Image(data, image.affine, image.header), tmp_path / "nan.nii.gz")
    with pytest.raises(VolumeError, match=r"cannot read '.*nan\.nii\.gz': the displacement is not finite: 1 of "):
        read_transform(tmp_path / "nan.nii.gz")


def test_a_truncated_displacement_is_refused(tmp_path):
    write_transform(wave(FIXED), tmp_path / "a.nii.gz")
    content = gzip.decompress((tmp_path / "a.nii.gz").read_bytes())
    (tmp_path / "short.nii").write_bytes(content[:-100])
    with pytest.raises(VolumeError, match=r"cannot read '.*short\.nii': .*truncated"):
        read_transform(tmp_path / "short.nii")


@pytest.mark.parametrize(
    ("name", "transform", "match"),
    [
        ("a.tfm", wave(FIXED), "'a.tfm' cannot hold a Displacement; merge it with to_displacement"),
        ("a.nii.gz", affine(), "'a.nii.gz' cannot hold a Affine; merge it"),
        ("a.mat", Chain((affine(), affine())), "'a.mat' cannot hold a Chain"),
        ("a.nii.gz", wave(FIXED).inverse(), "'a.nii.gz' cannot hold a Inverse; merge it with to_displacement"),
        ("a.csv", affine(), "'a.csv' has not the ending of a transform; end it in .tfm"),
    ],
)
def test_a_file_that_cannot_hold_a_transform_is_not_written(tmp_path, name, transform, match):
    with pytest.raises(ArgumentError, match=match):
        write_transform(transform, tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_replaced_only_when_asked(tmp_path):
    write_transform(affine(), tmp_path / "a.tfm")
    with pytest.raises(VolumeError, match="it exists already; choose another name, or pass overwrite=True"):
        write_transform(affine(30), tmp_path / "a.tfm")
    write_transform(affine(30), tmp_path / "a.tfm", overwrite=True)
    np.testing.assert_allclose(read_transform(tmp_path / "a.tfm").matrix, affine(30).matrix, atol=1e-12)


def test_a_sheared_grid_cannot_be_written_for_itk_but_its_transform_can(tmp_path):
    sheared = np.diag([2.0, 2, 2, 1])
    sheared[0, 1] = 1.5
    displacement = Displacement(np.ones((5, 6, 7, 3)), Grid((5, 6, 7), sheared))
    with pytest.raises(ArgumentError, match="the grid is sheared, which ITK's images cannot be; use to_displacement"):
        write_transform(displacement, tmp_path / "a.nii.gz")
    assert not list(tmp_path.iterdir())


def test_a_transform_without_an_inverse_of_its_own_cannot_be_made():
    with pytest.raises(TypeError, match="abstract"):
        Transform()
