"""Tests of the autopsy of inputs: on phantoms each fault is found, with its way out, and nothing else is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gvsl_zoo import load, model_info, save_pretrained, write_volume
from gvsl_zoo.autopsy import PERCENTS, autopsy, input_statistics, read_all
from gvsl_zoo.cli import main
from gvsl_zoo.demo import as_volume
from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.film import read_film
from gvsl_zoo.pretrain.anatomy import sample_film, sample_subject
from gvsl_zoo.registry import ModelEntry
from gvsl_zoo.volume import Volume

NANO = "gvsl-unet-ct-nano"
CT, MR, FILM = (model_info(name) for name in (NANO, "gemini-unet-brain", "gemini-unet-xray"))
DATA = Path(__file__).parents[2] / "shared" / "data"
QUESTIONS = ["file", "intensity", "orientation", "spacing", "field of view", "slices", "front and back"]


@pytest.fixture(scope="module")
def scan():
    """A thorax of 64 x 64 x 64 voxels of 5 mm, in HU."""
    return as_volume(sample_subject((64, 64, 64), torch.Generator().manual_seed(0), (5.0, 5.0, 5.0)))


@pytest.fixture(scope="module")
def labels():
    subject = sample_subject((64, 64, 64), torch.Generator().manual_seed(0), (5.0, 5.0, 5.0))
    return replace(as_volume(subject), data=subject.labels.permute(2, 1, 0).numpy())


def faults(checks):
    """What is not PASS: {what: (verdict, seen, fix)}."""
    return {one.what: (one.verdict, one.seen, one.fix) for one in checks if one.verdict != "PASS"}


def with_data(scan, change):
    return replace(scan, data=change(scan.data))


# --- A good scan -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_a_good_scan_passes_every_question(seed):
    subject = sample_subject((64, 64, 64), torch.Generator().manual_seed(seed), (5.0, 5.0, 5.0))
    checks = autopsy(as_volume(subject), CT)
    assert faults(checks) == {}
    assert [one.what for one in checks] == QUESTIONS


@pytest.mark.parametrize("codes", ["LPS", "SRA", "PIR"])
def test_a_scan_stored_with_other_axes_passes_too(codes, scan):
    image = nib.Nifti1Image(scan.data, scan.affine)
    target = nib.orientations.axcodes2ornt(codes)
    turned = image.as_reoriented(nib.orientations.ornt_transform(nib.orientations.io_orientation(scan.affine), target))
    checks = autopsy(Volume(np.asarray(turned.dataobj), turned.affine), CT)
    assert faults(checks) == {} and checks[2].seen.startswith(f"axes {codes}")


@pytest.mark.skipif(not DATA.is_dir(), reason="real scans are not here")
@pytest.mark.slow
def test_no_real_scan_fails_and_most_have_nothing_off():
    found = [faults(autopsy(path, CT)) for path in sorted((DATA / "ct").glob("*.nii.gz")) if "seg" not in path.name]
    assert len(found) == 15 and sum(not one for one in found) >= 12
    assert not [verdict for one in found for verdict, *_ in one.values() if verdict == "FAIL"]


# --- Intensities -----------------------------------------------------------------------------------------------

INTENSITIES = {
    "to [0, 1]": (lambda x: ((x + 1024) / 2048).clip(0, 1).astype(np.float32), "already scaled", "x * 2048 + -1024"),
    "to [-1, 1]": (lambda x: (x / 1024).clip(-1, 1).astype(np.float32), "already scaled", "give the original scan"),
    "shifted": (lambda x: (x.clip(-1024) + 1024).astype(np.uint16), "HU shifted by 1024", "subtract 1024"),
    "8 bits": (lambda x: ((x + 1024) / 8).clip(0, 255).astype(np.uint8), "8 bits", "give the original scan"),
    "MR": (lambda x: np.abs(x // 2).astype(np.int16) % 700, "not CT in HU, perhaps MR", "choose an MR model"),
    "windowed": (lambda x: x.clip(-160, 240), "nothing below -200: windowed", "give the original scan"),
    "clipped above": (lambda x: x.clip(-1024, 50), "at the upper end: windowed", "give the original scan"),
    "masked": (lambda x: np.where(x < -200, 0, x), "nothing below -200", "outside a mask write -1024"),
    "constant": (lambda x: np.zeros_like(x), "every voxel is 0", "give the original scan"),
    "wrong slope": (lambda x: 4.0 * x.astype(np.float32) - 3000, "where tissue lies", "slope and intercept"),
}


@pytest.mark.parametrize("fault", INTENSITIES)
def test_intensities_that_are_not_hu_are_named_with_their_way_out(fault, scan):
    change, seen, fix = INTENSITIES[fault]
    found = faults(autopsy(with_data(scan, change), CT))
    assert seen in found["intensity"][1] and fix in found["intensity"][2]
    assert set(found) <= {"intensity", "slices", "front and back"}


def test_the_way_out_of_a_shift_is_one(scan):
    shifted = with_data(scan, lambda x: x.clip(-1024) + 1024)
    assert faults(autopsy(with_data(shifted, lambda x: x - 1024), CT)) == {}


def test_a_label_map_is_no_image(labels):
    verdict, seen, fix = faults(autopsy(labels, CT))["intensity"]
    assert verdict == "FAIL" and seen.endswith("a label map") and "the image that the labels belong to" in fix
    assert "label map" in faults(autopsy(labels, MR))["intensity"][1]


def test_ct_for_a_model_of_mr_is_the_wrong_modality(scan):
    verdict, seen, fix = faults(autopsy(scan, MR))["intensity"]
    assert verdict == "FAIL" and "CT in HU, the model is for MR" in seen and "--modality CT" in fix


def test_mr_passes_for_a_model_of_mr(scan):
    assert faults(autopsy(with_data(scan, lambda x: (x - x.min()) // 3), MR)) == {}


def test_missing_air_is_told_against_the_training_data(scan):
    air, *_ = CT.input_statistics.air
    inside = with_data(scan, lambda x: np.where(np.random.RandomState(0).rand(*x.shape) < 0.9, x.clip(-100), x))
    verdict, seen, fix = faults(autopsy(inside, CT))["intensity"]
    assert verdict == "WARN" and f"in training {100 * air:.0f} to" in seen and "leave the air" in fix


def test_voxels_that_are_no_number_are_told(scan, tmp_path):
    data = scan.data.astype(np.float32)
    data[3, 4, 5] = np.nan
    write_volume(replace(scan, data=data), tmp_path / "scan.nii.gz")
    verdict, seen, fix = faults(autopsy(tmp_path / "scan.nii.gz", CT))["values"]
    assert verdict == "WARN" and "1 of 262144 voxels were NaN or infinite" in seen and "replace them by air" in fix
    assert faults(autopsy(replace(scan, data=data), CT))["values"][0] == "FAIL"  # not yet filled


# --- Geometry ----------------------------------------------------------------------------------------------------


def test_an_unknown_orientation_fails(scan, tmp_path):
    image = nib.Nifti1Image(scan.data, scan.affine)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "scan.nii.gz")
    found = faults(autopsy(tmp_path / "scan.nii.gz", CT))
    verdict, seen, fix = found["orientation"]
    assert verdict == "FAIL" and "codes are both 0" in seen and "sform with code 1" in fix


@pytest.mark.parametrize(
    ("factor", "what", "fix"),
    [
        ((0.1, 0.1, 0.1), {"spacing", "field of view"}, "give a larger part of the body"),
        ((1, 1, 4), {"spacing", "field of view"}, "crop to the part that training saw"),
    ],
)
def test_spacing_and_field_of_view_far_from_training_are_told(factor, what, fix, scan):
    affine = scan.affine @ np.diag([*factor, 1.0])
    found = faults(autopsy(replace(scan, affine=affine), CT))
    assert set(found) == what and found["field of view"][2].endswith(fix)
    assert "in training 1.5 x 1.5 x 1.5 to" in found["spacing"][1] and "the header" in found["spacing"][2]


def test_without_statistics_nothing_is_said_of_spacing(scan):
    entry = replace(CT, input_statistics=None)
    assert faults(autopsy(replace(scan, affine=np.diag([0.1, 0.1, 0.1, 1.0])), entry)) == {}


@pytest.mark.parametrize("seed", range(3))
def test_slices_out_of_order_fail(seed, scan):
    order = np.random.RandomState(seed).permutation(64)
    verdict, seen, fix = faults(autopsy(with_data(scan, lambda x: x[:, :, order]), CT))["slices"]
    assert verdict == "FAIL" and "out of order" in seen and "ImagePositionPatient" in fix


def test_two_halves_of_a_series_one_after_the_other_are_a_jump(scan):
    order = np.r_[0:64:2, 1:64:2]
    verdict, seen, _ = faults(autopsy(with_data(scan, lambda x: x[:, :, order]), CT))["slices"]
    assert verdict == "WARN" and "one pair of neighbours" in seen


@pytest.mark.parametrize("seed", range(4))
def test_front_and_back_exchanged_is_told_by_the_spine(seed):
    subject = sample_subject((64, 64, 64), torch.Generator().manual_seed(seed), (5.0, 5.0, 5.0))
    flipped = with_data(as_volume(subject), lambda x: np.ascontiguousarray(x[:, ::-1]))
    verdict, seen, fix = faults(autopsy(flipped, CT))["front and back"]
    assert verdict == "WARN" and "before the middle" in seen and "mend the affine" in fix


def test_a_file_that_cannot_be_read_is_the_only_finding(tmp_path):
    (tmp_path / "scan.nii.gz").write_bytes(b"no scan")
    [found] = autopsy(tmp_path / "scan.nii.gz", CT)
    assert (found.what, found.verdict) == ("file", "FAIL") and "not a NIfTI file" in found.seen


def test_several_channels_are_not_one_scan(scan):
    assert "2 channels" in autopsy(replace(scan, data=np.stack([scan.data] * 2, -1)), CT)[0].seen


# --- Films --------------------------------------------------------------------------------------------------------


def a_film(seed, path, change=lambda x: x):
    from PIL import Image

    pixels = sample_film((128, 128), torch.Generator().manual_seed(seed)).image.mul(255).round().byte().numpy()
    Image.fromarray(change(pixels)).save(path)
    return path


@pytest.mark.parametrize("seed", range(4))
def test_a_good_film_passes_and_an_inverted_one_fails(seed, tmp_path):
    pytest.importorskip("PIL")
    assert faults(autopsy(a_film(seed, tmp_path / "good.png"), FILM)) == {}
    verdict, seen, fix = faults(autopsy(a_film(seed, tmp_path / "bad.png", lambda x: 255 - x), FILM))["inversion"]
    assert verdict == "FAIL" and "bones are dark" in seen and "255 - x" in fix


@pytest.mark.parametrize("shape", [(1, 1), (3, 40), (40, 3)], ids=str)
def test_nothing_is_said_of_the_middle_of_a_film_that_has_none(shape):
    film = Volume(np.arange(np.prod(shape), dtype=np.uint8).reshape(*shape, 1), np.eye(4))
    assert not any(check.what == "inversion" for check in autopsy(film, FILM))


@pytest.mark.parametrize("frontal", [np.diag([-1.0, -1, 1]), np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])])
def test_a_film_in_a_nifti_file_is_looked_at_as_it_lies(frontal, tmp_path):
    pytest.importorskip("PIL")
    film = read_film(a_film(0, tmp_path / "good.png"))
    affine = np.eye(4)
    affine[:3, :3] = frontal
    turned = replace(film, affine=affine)
    assert [check.seen for check in autopsy(turned, FILM)] == [check.seen for check in autopsy(film, FILM)]


def test_a_film_in_colour_is_refused_with_its_way_out(tmp_path):
    pytest.importorskip("PIL")
    path = a_film(0, tmp_path / "rgb.png", lambda x: np.stack([x, x // 2, x // 3], -1))
    [found] = autopsy(path, FILM)
    assert found.verdict == "FAIL" and "a picture in colour" in found.seen and found.fix == "give grey films"


def test_a_volume_is_no_film(scan, tmp_path):
    write_volume(scan, tmp_path / "scan.nii.gz")
    [found] = autopsy(tmp_path / "scan.nii.gz", FILM)
    assert "64 slices for a model of films" in found.seen and "choose a 3D model" in found.fix


def test_a_film_is_no_volume(tmp_path):
    pytest.importorskip("PIL")
    [found] = autopsy(a_film(0, tmp_path / "film.png"), CT)
    assert "is a film, the model one of volumes" in found.seen and "choose a 2D model" in found.fix


# --- Statistics ---------------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_images(scan):
    coarse = replace(scan, affine=scan.affine @ np.diag([1.0, 1.0, 2.0, 1.0]))
    found = input_statistics([scan, coarse], "HU")
    assert found.images == 2 and found.orientations == ("RAS",)
    np.testing.assert_allclose(found.percentiles, np.percentile(scan.data, PERCENTS), rtol=1e-3)
    assert found.air == (round(float((scan.data < -200).mean()), 3),) * 2
    assert found.spacing_mm == ((5.0, 5.0, 5.0), (5.0, 5.0, 10.0))
    assert found.field_of_view_mm == ((320.0, 320.0, 320.0), (320.0, 320.0, 640.0))


def test_statistics_speak_of_x_y_z_whatever_the_files_axes():
    affine = np.array([[0, 0, 3.0, 0], [1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 1]])  # i to the front, j up, k right
    found = input_statistics([Volume(np.arange(24.0).reshape(2, 3, 4), affine)], "arbitrary")
    assert found.spacing_mm == ((3.0, 1.0, 2.0),) * 2 and found.field_of_view_mm == ((12.0, 2.0, 6.0),) * 2
    assert found.orientations == ("ASR",) and found.air is None


def test_statistics_of_films_have_no_millimetres(tmp_path):
    pytest.importorskip("PIL")
    found = input_statistics(read_all([a_film(seed, tmp_path / f"{seed}.png") for seed in range(3)], 2), "grey")
    assert (found.images, found.spacing_mm, found.air, found.orientations) == (3, None, None, ())
    assert 0 <= found.percentiles[0] < found.percentiles[-1] <= 255


def test_statistics_travel_in_an_entry(scan):
    entry = replace(CT, input_statistics=input_statistics([scan], "HU"))
    assert ModelEntry.from_dict(entry.to_dict()) == entry


def test_no_image_has_no_statistics():
    with pytest.raises(ArgumentError, match="no image to take statistics of; give at least one"):
        input_statistics([], "HU")


# --- The command --------------------------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_prints_findings_and_fails_where_one_does(scan, tmp_path):
    write_volume(scan, tmp_path / "good.nii.gz")
    write_volume(with_data(scan, lambda x: x.clip(-1024) + 1024), tmp_path / "bad.nii.gz")
    good = run("doctor", "--input", tmp_path / "good.nii.gz", "--model", NANO, "--json")
    assert good.exit_code == 0 and {row["verdict"] for row in json.loads(good.output)} == {"PASS"}
    bad = run("doctor", "-i", tmp_path / "bad.nii.gz")
    assert bad.exit_code == 1 and "FAIL  intensity: 0 to" in bad.output and "-> subtract 1024" in bad.output


def test_the_command_takes_a_models_own_file(scan, tmp_path):
    write_volume(scan, tmp_path / "scan.nii.gz")
    path = save_pretrained(load(NANO), tmp_path / "mine", entry=replace(CT, input_statistics=None))
    result = run("doctor", "-i", tmp_path / "scan.nii.gz", "--model", path)
    assert result.exit_code == 0 and "that of the training data is not stated" in result.output


def test_options_of_a_scan_without_one_are_a_wrong_call():
    result = run("doctor", "--model", NANO)
    assert result.exit_code == 2 and "--model and --infer-preprocessing go with --input" in result.output


def test_a_film_of_one_value_is_not_asked_for_its_bones(tmp_path):
    film = Volume(np.full((64, 64, 1), 100, np.uint8), np.eye(4))
    with np.errstate(all="raise"):
        checks = autopsy(film, model_info("gvsl-unet-xray-nano"))
    assert "inversion" not in {check.what for check in checks} and "FAIL" in {check.verdict for check in checks}
