"""Registration: identity, shifts, orientations, masks and fields of view; phantoms of a known anatomy."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
from click.testing import CliRunner
from scipy.ndimage import gaussian_filter

from benchmarks import register as bench
from benchmarks.timing import RESULTS
from gvsl_zoo import Volume, load, read_volume, write_volume
from gvsl_zoo.cli import main
from gvsl_zoo.errors import ArgumentError, VolumeError
from gvsl_zoo.inference.atlas import segment_by_atlas
from gvsl_zoo.inference.refine import Images, exponential, fit, fit_affine
from gvsl_zoo.inference.register import (
    MAX_VOXELS,
    PASSES,
    SMOOTHING,
    _spacing,
    answered,
    lay_over,
    made_ready,
    match,
    moved,
    register,
    smoothed,
)
from gvsl_zoo.models.gemini import GEMINI
from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.models.xmorpher import XMorpher
from gvsl_zoo.pretrain.anatomy import LABELS, sample_subject
from gvsl_zoo.report import _moved_mm
from gvsl_zoo.spatial import affine_coordinates, identity_grid, jacobian_determinant, sample
from gvsl_zoo.transforms import LPS, Displacement, Grid, warp_volume, write_transform
from gvsl_zoo.volume import Preprocessing, prepare

MM = 4.0
SHAPE = (64, 64, 64)


def subject(seed, shape=SHAPE):
    """A synthetic scan of 4 mm and its label map, axes (x, y, z)."""
    found = sample_subject(shape, torch.Generator().manual_seed(seed), (MM,) * 3)
    affine = np.diag([MM, MM, MM, 1.0])
    scan = found.hu.round().to(torch.int16).numpy().transpose(2, 1, 0)
    return Volume(scan, affine), Volume(found.labels.numpy().astype(np.uint8).transpose(2, 1, 0), affine)


@pytest.fixture(scope="module")
def heads():
    return load("gvsl-unet-ct-nano", task="registration")


@pytest.fixture(scope="module")
def pair():
    return subject(1), subject(2)


def mean_dice(a, b):
    organs = [number for label, number in LABELS.items() if label not in ("background", "soft_tissue", "fat")]
    scores = []
    for number in organs:
        x, y = a.data == number, b.data == number
        if min(x.sum(), y.sum()) >= 50:
            scores.append(2 * (x & y).sum() / (x.sum() + y.sum()))
    return float(np.mean(scores))


def moved_by(volume, shift_mm):
    affine = volume.affine.copy()
    affine[:3, 3] += shift_mm
    return Volume(volume.data, affine)


# --- Theorems of the fit -------------------------------------------------------------------------------------------


def test_the_exponential_of_no_velocity_is_the_identity_and_of_a_constant_one_its_shift():
    shift = torch.tensor([1.5, -2.0, 0.25]).view(1, 3, 1, 1, 1).expand(1, 3, 6, 7, 8)
    assert torch.equal(exponential(torch.zeros(1, 3, 6, 7, 8)), torch.zeros(1, 3, 6, 7, 8))
    torch.testing.assert_close(exponential(shift.contiguous()), shift)


def test_the_exponential_does_not_fold_and_that_of_the_opposite_velocity_undoes_it(generator):
    rough = torch.randn(1, 3, 4, 4, 4, generator=generator)
    velocity = 1.5 * torch.nn.functional.interpolate(rough, size=(24, 24, 24), mode="trilinear", align_corners=True)
    there, back = exponential(velocity), exponential(-velocity)
    assert (jacobian_determinant(there) > 0).all()
    grid = identity_grid((24, 24, 24), there)
    error = there + sample(back, grid + there, padding="border")
    assert error[..., 8:-8, 8:-8, 8:-8].norm(dim=1).max() < 0.2


def test_the_affine_of_an_affine_displacement_is_found_again(generator):
    affine = torch.eye(3, 4)[None] + 0.1 * torch.randn(1, 3, 4, generator=generator)
    displacement = affine_coordinates(affine, (9, 10, 11)) - identity_grid((9, 10, 11), affine)
    torch.testing.assert_close(fit_affine(displacement, torch.ones(1, 1, 9, 10, 11)), affine, atol=1e-5, rtol=0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_affine_of_a_displacement_of_one_slice_leaves_the_axis_across_it(generator, axis):
    shape = [9, 10, 11]
    shape[axis] = 1
    affine = torch.eye(3, 4)[None] + 0.1 * torch.randn(1, 3, 4, generator=generator)
    affine[..., axis] = torch.eye(3)[axis]
    displacement = affine_coordinates(affine, torch.Size(shape)) - identity_grid(torch.Size(shape), affine)
    torch.testing.assert_close(fit_affine(displacement, torch.ones(1, 1, *shape)), affine, atol=1e-5, rtol=0)


def test_a_fit_that_is_no_better_than_its_start_gives_the_start():
    image = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    ones, start = torch.ones_like(image), torch.zeros(1, 3, 16, 16, 16)
    _, found = fit(Images(image, image, None, (ones, ones)), 3, start)
    assert torch.equal(found, start)


# --- Registration --------------------------------------------------------------------------------------------------


def test_the_grid_that_is_matched_on_has_the_scans_axes_and_size_however_it_is_turned():
    own, generator = np.array([1.2, 1.5, 8.0]), np.random.default_rng(0)
    for _ in range(100):  # of every tenth turn, two axes are nearest to one of the world's
        affine = np.eye(4)
        affine[:3, :3] = np.linalg.qr(generator.normal(size=(3, 3))).Q * own
        small = Volume(np.arange(60, dtype=np.int16).reshape(3, 4, 5), affine)
        as_it_is = Preprocessing(unit="arbitrary")
        assert _spacing(small, small, as_it_is) == pytest.approx(prepare(small, as_it_is).spacing_mm)
        large = Volume(np.broadcast_to(np.int16(0), (500, 500, 400)), affine)
        spacing = _spacing(small, large, Preprocessing((2.0, 1.0, 1.0)))
        assert spacing == pytest.approx(spacing[0] * np.array([1, 0.5, 0.5]))
        assert np.prod(np.array(large.shape) * own) / np.prod(spacing) == pytest.approx(MAX_VOXELS)


@pytest.mark.parametrize("shape", [(7, 9, 11), (1, 5, 6), (12, 10)])
def test_a_displacement_is_smoothed_as_scipy_does(shape, generator):
    displacement = torch.randn(1, len(shape), *shape, generator=generator)
    reach = math.ceil(3 * SMOOTHING)
    sigma = (0, 0) + (SMOOTHING,) * len(shape)
    wanted = gaussian_filter(displacement.numpy(), sigma, mode="nearest", truncate=reach / SMOOTHING)
    assert np.abs(smoothed(displacement).numpy() - wanted).max() < 1e-6


@pytest.mark.parametrize(("shift", "asked"), [(4.0, PASSES), (0.0, 1)])
def test_heads_answer_again_of_what_they_have_brought_nearer_and_no_longer_than_that_helps(monkeypatch, shift, asked):
    image = subject(1)[0].data[::2, ::2, ::2].astype(np.float32)
    fixed = ((torch.from_numpy(image.T.copy()) + 1024) / 2048)[None, None]
    moving = moved(fixed, torch.tensor([0.0, 0.0, -shift]).view(1, 3, 1, 1, 1).expand(1, 3, *fixed.shape[2:]))
    asks = []

    def halfway(model, fixed, image, mask, precision):
        left = shift / 2 ** len(asks) if shift else 1.0
        asks.append(image)
        there = torch.tensor([0.0, 0.0, left / 2]).view(1, 3, 1, 1, 1).expand(1, 3, *fixed.shape[2:]).contiguous()
        return torch.full((1, 3, 4), float(len(asks))), there

    monkeypatch.setattr("gvsl_zoo.inference.register.match", halfway)
    found = answered(None, fixed, moving, torch.ones_like(fixed), "float32")
    assert len(asks) == asked
    if not shift:
        assert found is None
        return
    affine, displacement = found
    expected = shift * (1 - 0.5**PASSES)
    whole = torch.eye(3, 4)[None]
    whole[0, 2, 3] = expected  # not the 1s that the first pass said
    torch.testing.assert_close(affine, whole, rtol=0, atol=1e-3)
    assert displacement[:, 2].sub(expected).abs().max() < 1e-4 and displacement[:, :2].abs().max() < 1e-4
    assert torch.equal(asks[0], moving) and not torch.equal(asks[1], moving)


@pytest.mark.parametrize("kind", ["gvsl", "gemini", "xmorpher"])
def test_heads_of_several_channels_get_the_scan_in_each(generator, kind):
    def build(in_chans):
        drawn = torch.Generator().manual_seed(0)
        if kind == "xmorpher":
            return GVSL(XMorpher(3, 16, in_chans=in_chans, generator=drawn), affine_width=8, generator=drawn).eval()
        backbone = UNet(3, 8, in_chans, generator=drawn)
        return GEMINI(backbone).eval() if kind == "gemini" else GVSL(backbone, affine_width=8, generator=drawn).eval()

    one, three = build(1), build(3)
    state = one.state_dict()
    name = f"unet.{one.unet.input_weight}"
    three.load_state_dict(state | {name: state[name].repeat_interleave(3, 1) / 3})
    fixed, moving = torch.rand(2, 1, 1, 16, 16, 16, generator=generator)
    (affine, found), wanted = (match(m, fixed, moving, torch.ones_like(fixed), "float32") for m in (three, one))
    torch.testing.assert_close(affine, wanted[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found, wanted[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("refine", [0, 12])
def test_a_scan_is_registered_to_itself_by_less_than_a_twentieth_of_a_voxel(heads, pair, refine):
    scan = pair[0][0]
    found = register(scan, scan, heads, refine=refine)
    assert np.linalg.norm(found.displacement_mm.field_mm, axis=-1).mean() < 0.05 * MM
    assert found.report["ncc_after"] > 0.99 and found.report["folded"] == 0


def test_the_shift_between_two_headers_is_found(heads, pair):
    scan = pair[0][0]
    shift = np.array([40.0, -120.0, 300.0])
    found = register(moved_by(scan, shift), scan, heads)
    field = found.displacement_mm.field_mm.reshape(-1, 3).mean(0)
    assert np.abs(field - shift).max() < MM
    assert found.report["ncc_after"] > 0.5


def test_refinement_brings_organs_together_without_folding(heads, pair):
    (fixed, fixed_labels), (moving, moving_labels) = pair
    before = warp_volume(moving_labels, lay_over_of(fixed, moving, heads), Grid.of(fixed), nearest=True)
    found = register(moving, fixed, heads, refine=60)
    after = warp_volume(moving_labels, found.displacement_mm, Grid.of(fixed), nearest=True)
    assert mean_dice(after, fixed_labels) > mean_dice(before, fixed_labels) + 0.2
    assert found.report["folded"] < 0.005
    assert found.report["answer"] == "fitted to the pair"


def lay_over_of(fixed, moving, model):
    still, other = (prepare(volume, model.preprocessing) for volume in (fixed, moving))
    return lay_over(still, other, (torch.ones_like(still.image), torch.ones_like(other.image)))


def test_another_orientation_and_spacing_of_the_moving_file_changes_little(heads, pair):
    (fixed, _), (moving, _) = pair
    turned = nib.as_closest_canonical(nib.Nifti1Image(moving.data, moving.affine)).as_reoriented(
        nib.orientations.axcodes2ornt("PIR")
    )
    other = Volume(np.asanyarray(turned.dataobj), turned.affine)
    a, b = (register(volume, fixed, heads).displacement_mm.field_mm for volume in (moving, other))
    assert np.abs(a - b).max() < 0.01


@pytest.mark.slow
def test_a_backbone_without_heads_registers_by_its_features(pair):
    (fixed, _), (moving, _) = pair
    found = register(moving, fixed, load("gvsl-unet-ct-nano"), refine=30)
    assert found.report["ncc_after"] > found.report["ncc_start"] + 0.1


def test_the_same_pair_gives_the_same_bits(heads, pair):
    (fixed, _), (moving, _) = pair
    a, b = (register(moving, fixed, heads, refine=6).displacement_mm.field_mm for _ in range(2))
    assert np.array_equal(a, b)


@pytest.mark.slow
def test_the_images_are_compared_where_the_mask_says_and_what_it_leaves_out_does_not_mislead(pair):
    (fixed, _), (moving, _) = pair
    mask = np.zeros(fixed.shape, np.uint8)
    mask[:, :, :40] = 1
    spoiled = fixed.data.copy()
    spoiled[:, :, 56:] = 1000
    scans = (fixed, Volume(spoiled, fixed.affine))
    a, b = (
        register(moving, scan, load("gvsl-unet-ct-nano"), fixed_mask=Volume(mask, fixed.affine), refine=12)
        for scan in scans
    )
    assert abs(a.report["ncc_before"] - b.report["ncc_before"]) < 1e-4
    for found in (a, b):  # the features see what lies around them, so that the results differ
        assert found.report["ncc_after"] > found.report["ncc_start"] + 0.2 > found.report["ncc_before"] + 0.3


@pytest.mark.slow
def test_a_turned_and_shifted_header_is_undone(heads, pair):
    scan = pair[0][0]
    pose = bench.pose(np.radians([6.0, -8.0, 7.0]), np.array([30.0, -20.0, 80.0]))
    found = register(Volume(scan.data, pose @ scan.affine), scan, heads, refine=30)
    points = Grid.of(scan).points()[scan.data.ravel() > -500]
    truth = points @ pose[:3, :3].T + pose[:3, 3]
    assert np.median(np.linalg.norm(found.displacement_mm(points) - truth, axis=1)) < 0.25 * MM
    assert np.median(np.linalg.norm(found.affine(points) - truth, axis=1)) < 0.5 * MM


def test_simpleitk_sends_points_where_the_written_transform_does(heads, pair, tmp_path):
    (fixed, _), (moving, _) = pair
    found = register(moving, fixed, heads)
    write_transform(found.displacement_mm, tmp_path / "transform.nii.gz")
    theirs = sitk.DisplacementFieldTransform(sitk.ReadImage(str(tmp_path / "transform.nii.gz"), sitk.sitkVectorFloat64))
    points = Grid.of(fixed).points((slice(1, -1, 7),) * 3) + 0.3 * MM
    sent = np.array([theirs.TransformPoint(point) for point in (points @ LPS[:3, :3]).tolist()]) @ LPS[:3, :3]
    assert np.linalg.norm(found.displacement_mm(points) - sent, axis=1).max() < 0.1 * MM


# --- Bad input -----------------------------------------------------------------------------------------------------


def test_without_heads_and_without_refinement_there_is_nothing_to_do(pair):
    with pytest.raises(ArgumentError, match="without matching heads give 1 or more"):
        register(pair[1][0], pair[0][0], load("gvsl-unet-ct-nano"), refine=0)


def test_several_channels_are_refused(heads, pair):
    scan = pair[0][0]
    several = Volume(np.stack([scan.data] * 3, -1), scan.affine)
    with pytest.raises(VolumeError, match="3 channels; prepare one at a time"):
        register(scan, several, heads)


def test_an_empty_mask_and_one_on_another_grid_are_refused(heads, pair):
    (fixed, _), (moving, _) = pair
    with pytest.raises(VolumeError, match="no voxel above 0"):
        register(moving, fixed, heads, fixed_mask=Volume(np.zeros(fixed.shape, np.uint8), fixed.affine))
    with pytest.raises(VolumeError, match=r"the mask has \(8, 8, 8\) voxels, the scan \(64, 64, 64\)"):
        register(moving, fixed, heads, moving_mask=Volume(np.ones((8, 8, 8), np.uint8), fixed.affine))


def test_a_film_is_refused(heads, pair, tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((32, 32), np.int16), np.eye(4)), tmp_path / "film.nii.gz")
    with pytest.raises(VolumeError, match=r"film\.nii\.gz"):
        register(tmp_path / "film.nii.gz", pair[0][0], heads)


# --- The command ---------------------------------------------------------------------------------------------------


def test_the_command_writes_what_simpleitk_applies_to_the_same_result(pair, tmp_path):
    for name, (scan, labels) in zip(("fixed", "moving"), pair, strict=True):
        write_volume(scan, tmp_path / f"{name}.nii.gz")
        write_volume(labels, tmp_path / f"{name}_labels.nii.gz")
    paths = {
        "--warped-out": "warped.nii.gz",
        "--transform-out": "transform.nii.gz",
        "--affine-out": "affine.tfm",
        "--save-inverse": "inverse.nii.gz",
        "--jacobian-out": "jacobian.nii.gz",
        "--labels-out": "labels.nii.gz",
        "--picture": "picture.png",
    }
    call = ["register", "--fixed", tmp_path / "fixed.nii.gz", "--moving", tmp_path / "moving.nii.gz", "--json"]
    call += ["--moving-labels", tmp_path / "moving_labels.nii.gz", "--refine", 12]
    call += [part for option, path in paths.items() for part in (option, tmp_path / path)]
    done = CliRunner().invoke(main, list(map(str, call)))
    assert done.exit_code == 0, done.output
    assert all((tmp_path / path).exists() for path in paths.values())
    assert json.loads(done.stdout)["ncc_after"] > json.loads(done.stdout)["ncc_start"]

    field = sitk.ReadImage(str(tmp_path / "transform.nii.gz"), sitk.sitkVectorFloat64)
    fixed, moving = (sitk.ReadImage(str(tmp_path / f"{name}.nii.gz"), sitk.sitkFloat32) for name in ("fixed", "moving"))
    theirs = sitk.Resample(
        moving, fixed, sitk.DisplacementFieldTransform(field), sitk.sitkLinear, float(pair[1][0].data.min())
    )
    ours = read_volume(tmp_path / "warped.nii.gz").data
    inside = slice(4, -4)
    difference = np.abs(sitk.GetArrayFromImage(theirs).transpose(2, 1, 0) - ours)[inside, inside, inside]
    assert np.percentile(difference, 99) < 1.0  # HU


def test_scans_whose_headers_put_them_far_apart_get_their_picture(pair, tmp_path):
    fixed, moving = pair[0][0], pair[1][0]
    affine = moving.affine.copy()
    affine[:3, 3] += 5000
    write_volume(fixed, tmp_path / "fixed.nii.gz")
    write_volume(Volume(moving.data, affine), tmp_path / "moving.nii.gz")
    call = ["register", "--fixed", tmp_path / "fixed.nii.gz", "--moving", tmp_path / "moving.nii.gz", "--picture"]
    done = CliRunner().invoke(main, [*map(str, call), str(tmp_path / "picture.png")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_labels_without_a_place_to_go_and_outputs_of_another_kind_are_refused(pair, tmp_path):
    for name, (scan, _) in zip(("fixed", "moving"), pair, strict=True):
        write_volume(scan, tmp_path / f"{name}.nii.gz")
    call = ["register", "--fixed", str(tmp_path / "fixed.nii.gz"), "--moving", str(tmp_path / "moving.nii.gz")]
    for more, cause in (
        (["--moving-labels", str(tmp_path / "fixed.nii.gz")], "go together"),
        (["--affine-out", str(tmp_path / "a.nii.gz")], "has no ending for this"),
        (["--warped-out", str(tmp_path / "moving.nii.gz")], "moving.nii.gz"),
    ):
        done = CliRunner().invoke(main, call + more)
        assert done.exit_code in (1, 2) and cause in done.output


def test_labels_beside_the_moving_scan_are_refused_before_the_work(pair, tmp_path, monkeypatch):
    monkeypatch.setattr("gvsl_zoo.inference.register.register", lambda *_, **__: pytest.fail("it was registered"))
    (fixed, _), (moving, labels) = pair
    for name, volume in (("fixed", fixed), ("moving", moving), ("labels", moved_by(labels, (8, 0, 0)))):
        write_volume(volume, tmp_path / f"{name}.nii.gz")
    call = ["register", "--fixed", tmp_path / "fixed.nii.gz", "--moving", tmp_path / "moving.nii.gz"]
    call += ["--moving-labels", tmp_path / "labels.nii.gz", "--labels-out", tmp_path / "out.nii.gz"]
    done = CliRunner().invoke(main, list(map(str, call)))
    assert done.exit_code == 1
    assert "the label map 'labels.nii.gz' lies up to 8 mm beside the moving scan 'moving.nii.gz'" in done.output


@pytest.mark.parametrize("small", ["fixed", "moving"])
def test_both_scans_are_matched_at_a_spacing_at_which_neither_is_too_large(pair, heads, monkeypatch, small):
    monkeypatch.setattr("gvsl_zoo.inference.register.MAX_VOXELS", 32**3)
    scans = {"fixed": pair[0][0], "moving": pair[1][0]}
    scans[small] = replace(scans[small], data=scans[small].data[:16, :16, :16])
    ready = made_ready(scans["fixed"], scans["moving"], None, None, heads)
    assert ready.on_fixed.spacing_mm == ready.on_moving.spacing_mm == pytest.approx((8, 8, 8))
    assert {ready.on_fixed.shape, ready.on_moving.shape} == {(32, 32, 32), (8, 8, 8)}


def test_the_picture_finds_where_each_voxel_went_without_a_table_of_points(generator):
    affine = np.array([[0, 2.0, 0.3, 5], [-1.5, 0, 0, 7], [0, 0.2, 4, -9], [0, 0, 0, 1]])
    field = torch.randn(5, 6, 7, 3, generator=generator).numpy()
    found = SimpleNamespace(displacement_mm=Displacement(field, Grid((5, 6, 7), affine)))
    expected = found.displacement_mm.grid.points() + field.reshape(-1, 3)
    np.testing.assert_allclose(_moved_mm(found, np.eye(4)).reshape(-1, 3), expected, atol=1e-4)


@pytest.mark.parametrize(("sheared", "option"), [("fixed", "--transform-out"), ("moving", "--save-inverse")])
def test_a_sheared_scan_whose_displacement_has_no_place_in_nifti_is_said_before_the_work(
    pair, tmp_path, monkeypatch, sheared, option
):
    monkeypatch.setattr("gvsl_zoo.inference.register.register", lambda *_, **__: pytest.fail("it was registered"))
    shear = np.eye(4)
    shear[0, 1] = 0.01
    for name, (scan, _) in zip(("fixed", "moving"), pair, strict=True):
        affine = scan.affine @ shear if name == sheared else scan.affine
        write_volume(Volume(scan.data, affine), tmp_path / f"{name}.nii.gz")
    call = ["register", "--fixed", tmp_path / "fixed.nii.gz", "--moving", tmp_path / "moving.nii.gz", option]
    done = CliRunner().invoke(main, [*map(str, call), str(tmp_path / "out.nii.gz")])
    assert done.exit_code == 2 and "no place for the grid of a sheared scan; end it in .h5" in done.output


# --- Labels by atlases ---------------------------------------------------------------------------------------------


def test_a_scan_that_is_its_own_atlas_keeps_its_labels(heads, pair):
    scan, labels = pair[0]
    assert np.array_equal(segment_by_atlas(scan, [(scan, labels)], heads, refine=3).data, labels.data)


def test_labels_by_atlas_say_nothing_that_is_true_of_the_scan_alone(heads, pair, tmp_path):
    scan, labels = pair[0]
    write_volume(scan, tmp_path / "scan.nii.gz")
    scan = read_volume(tmp_path / "scan.nii.gz")
    scan.header["cal_max"], scan.header["aux_file"] = 240, b"lut.txt"
    found = segment_by_atlas(scan, [(scan, labels)], heads, refine=0)
    assert found.header["cal_max"] == 0 and not found.header["aux_file"] and scan.header["cal_max"] == 240
    with pytest.raises(VolumeError, match="it is the input itself"):
        write_volume(found, tmp_path / "scan.nii.gz", overwrite=True)


@pytest.mark.parametrize(("value", "kind"), [(7, np.uint8), (255, np.uint8), (300, np.uint16)])
def test_labels_by_atlas_have_8_bits_where_they_fit(value, kind):
    scan = Volume(np.random.default_rng(0).integers(-1000, 1000, (8, 8, 8)).astype(np.int16), np.diag([MM, MM, MM, 1]))
    labels = Volume(np.where(scan.data > 0, value, 0).astype(np.uint16), scan.affine)
    model = torch.nn.Conv3d(1, 4, 3, padding=1).eval()
    model.preprocessing = Preprocessing((MM,) * 3)
    assert segment_by_atlas(scan, [(scan, labels)], model, refine=1).data.dtype == kind


@pytest.mark.slow
def test_atlases_bring_more_of_the_labels_than_lie_there_already(heads, pair):
    (fixed, truth), atlas = pair
    found = segment_by_atlas(fixed, [atlas, subject(3)], heads, refine=45)
    assert mean_dice(found, truth) > mean_dice(atlas[1], truth) + 0.2
    assert set(np.unique(found.data)) <= set(LABELS.values())


def test_atlases_without_labels_on_their_grid_are_refused(heads, pair):
    scan, labels = pair[0]
    with pytest.raises(ArgumentError, match="give a labelled scan"):
        segment_by_atlas(scan, [], heads)
    off = labels.affine.copy()
    off[:3, 3] += 0.02  # mm, as files of another program lie
    assert segment_by_atlas(scan, [(scan, Volume(labels.data, off))], heads, refine=0).shape == scan.shape
    with pytest.raises(VolumeError, match=r"the label map has .63, 64, 64. voxels, its scan .64, 64, 64.; resample"):
        segment_by_atlas(scan, [(scan, Volume(labels.data[:-1], labels.affine))], heads)
    with pytest.raises(ArgumentError, match="nothing but background"):
        segment_by_atlas(scan, [(scan, Volume(np.zeros_like(labels.data), labels.affine))], heads)


# --- The evidence --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known():
    return bench.synthetic_pair(0)


def test_the_truth_of_a_synthetic_pair_brings_the_labels_onto_each_other(known):
    grid = Grid.of(known.fixed)
    points = grid.points().reshape(*grid.shape, 3)
    seen = np.isfinite(known.truth_mm).all(-1)
    truth = Displacement(np.where(seen[..., None], known.truth_mm - points, 0).astype(np.float32), grid)
    agreement = [
        (warp_volume(known.moving_labels, moved, grid, nearest=True).data == known.fixed_labels.data)[seen].mean()
        for shift in (np.zeros(3), *(MM * np.eye(3)), *(-MM * np.eye(3)))
        for moved in [Displacement(truth.field_mm + shift.astype(np.float32), grid)]
    ]
    assert agreement[0] > 0.85 and agreement[0] > max(agreement[1:]) + 0.02
    assert bench.measure(known, lambda pair: truth)["error_mm"] < 1e-3


def test_a_scan_measured_against_itself_by_the_identity_is_without_error(known):
    same = bench.Pair("", "", known.fixed, known.fixed, *[known.fixed_labels] * 2, known.organs, MM)
    row = bench.measure(same, bench.identity)
    assert row["dice"] == 1 and row["folded"] == 0 and set(row["organs"].values()) == {1.0}


def test_moments_undo_a_turn_and_a_shift(known):
    pose = bench.pose(np.radians([6.0, -8.0, 7.0]), np.array([20.0, -30.0, 40.0]))
    moved = Volume(known.fixed.data, pose @ known.fixed.affine)
    pair = bench.Pair("", "", known.fixed, moved, known.fixed_labels, known.fixed_labels, known.organs, MM)
    np.testing.assert_allclose(bench.moments(pair).matrix, pose, atol=1e-3)


def test_the_page_holds_the_tables_of_the_measurements():
    page = bench.PAGE.read_text()
    assert bench.with_tables(page, json.loads((RESULTS / "register.json").read_text())) == page


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_fit_needs_no_gradients_of_its_caller(pair, mode):
    (fixed, _), (moving, _) = pair
    model = load("gvsl-unet-ct-nano")
    plain = register(moving, fixed, model, refine=3)
    with mode():
        found = register(moving, fixed, model, refine=3)
    np.testing.assert_array_equal(found.warped.data, plain.warped.data)


def test_the_heads_of_a_compiled_model_are_seen(pair):
    (fixed, _), (moving, _) = pair
    model = load("gvsl-unet-ct-nano", task="registration")
    plain = register(moving, fixed, model)
    found = register(moving, fixed, torch.compile(model, backend="eager"))
    np.testing.assert_array_equal(found.warped.data, plain.warped.data)
