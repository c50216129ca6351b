"""Tests of gvsl_zoo.volume on DICOM: the geometry against the standard's formula, HU, and the faults one by one."""

from __future__ import annotations

import json
import locale
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from gvsl_zoo.cli import main
from gvsl_zoo.errors import VolumeError
from gvsl_zoo.volume import own_locale, read_volume, write_volume

STEP_MM = 2.0  # between slices; pixels are 0.5 x 0.75 mm (x, y)
ORIGIN_MM = (-10.0, -20.0, 30.0)  # LPS, of the first pixel of the first slice
UPRIGHT = (1, 0, 0, 0, 1, 0)  # ImageOrientationPatient: along a row, along a column
TILTED = (1, 0, 0, 0, 0.866025, 0.5)
SLOPE = b"\x28\x00\x53\x10\x02\x00\x00\x00"  # RescaleSlope, two letters, implicit VR


@own_locale()
def write_series(
    folder: Path,
    hu: np.ndarray,
    *,
    direction=UPRIGHT,
    along=(0, 0, 1),
    skip: int = -1,
    series: int = 1,
    tags: dict[str, str] | None = None,
) -> None:
    """Slices of `hu`, (D, H, W), STEP_MM apart in the direction `along`, written from the last to the first."""
    sitk = pytest.importorskip("SimpleITK", reason="needs gvsl-zoo[io]")
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z in reversed(range(len(hu))):
        if z == skip:
            continue
        image = sitk.GetImageFromArray(hu[z], isVector=hu.ndim == 4)  # the writer takes intercept and slope off
        image.SetSpacing((0.5, 0.75))
        uid = f"1.2.826.0.1.3680043.2.1125.{series}"
        place = [o + STEP_MM * z * step for o, step in zip(ORIGIN_MM, along, strict=True)]
        described = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{uid}.{z + 1}",
            "0008|0060": "CT",
            "0020|000d": f"{uid}.900",
            "0020|000e": f"{uid}.901",
            "0020|0013": str(z + 1),
            "0020|0032": "\\".join(map(str, place)),
            "0020|0037": "\\".join(map(str, direction)),
            "0028|1052": "-1024",
            "0028|1053": "1",
        }
        for tag, value in (described | (tags or {})).items():
            image.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"s{series}_{len(hu) - z:03d}.dcm"))
        writer.Execute(image)


@pytest.fixture
def hu():
    return np.random.default_rng(0).integers(-1000, 1500, (6, 16, 12)).astype(np.int16)


# ---- where voxels lie, and what they are


@pytest.mark.parametrize(
    ("row", "column"), [((1, 0, 0), (0, 1, 0)), ((0, 1, 0), (0, 0, -1)), ((0.8, 0.6, 0), (-0.48, 0.64, 0.6))]
)
def test_a_voxel_lies_where_the_standard_says(tmp_path, hu, row, column):
    """PS3.3 C.7.6.2.1.1: ImagePositionPatient + x * spacing * row + y * spacing * column, in LPS; ours is RAS."""
    along = np.cross(row, column)
    write_series(tmp_path / "s", hu, direction=(*row, *column), along=along.tolist())
    volume = read_volume(tmp_path / "s")
    np.testing.assert_array_equal(volume.data, hu.T)
    for x, y, z in ((0, 0, 0), (11, 0, 0), (3, 15, 5)):
        lps = ORIGIN_MM + 0.5 * x * np.array(row) + 0.75 * y * np.array(column) + STEP_MM * z * along
        np.testing.assert_allclose(volume.affine @ (x, y, z, 1), [-lps[0], -lps[1], lps[2], 1], atol=1e-5)
    np.testing.assert_allclose(volume.spacing_mm, (0.5, 0.75, STEP_MM), rtol=1e-6)


@pytest.mark.parametrize("slopes", [(".5", "2 ", "1 ", "3 ", "1 ", ".5"), ("1 ", ".5", "3 ", ".5", "40", "1 ")])
def test_the_numbers_stored_become_hu_by_each_slices_own_slope(tmp_path, hu, slopes):
    write_series(tmp_path / "s", hu)
    first = (tmp_path / "s" / "s1_006.dcm").read_bytes()
    stored = np.frombuffer(first[-2 * hu[0].size :], "<i2").reshape(hu[0].shape)
    np.testing.assert_array_equal(stored, hu[0] + 1024)
    for z, slope in enumerate(slopes):
        path = tmp_path / "s" / f"s1_{6 - z:03d}.dcm"
        assert path.read_bytes().count(SLOPE + b"1 ") == 1
        path.write_bytes(path.read_bytes().replace(SLOPE + b"1 ", SLOPE + slope.encode()))
        hu = hu.astype(np.float32)
        hu[z] = (hu[z] + 1024) * float(slope) - 1024
    np.testing.assert_allclose(read_volume(tmp_path / "s").data, hu.T, atol=1e-3)


def test_the_positions_order_the_slices_and_not_the_names(tmp_path, hu):
    write_series(tmp_path / "s", hu)
    for path, name in zip(sorted((tmp_path / "s").iterdir()), "cafbed", strict=True):
        path.rename(path.with_name(f"{name}.dcm"))
    np.testing.assert_array_equal(read_volume(tmp_path / "s").data, hu.T)


def test_a_file_stands_for_its_own_series(tmp_path, hu):
    for series in (1, 2):
        write_series(tmp_path / "s", hu + np.int16(series), series=series)
    for series in (1, 2):
        volume = read_volume(tmp_path / "s" / f"s{series}_003.dcm")
        np.testing.assert_array_equal(volume.data, hu.T + series)
    with pytest.raises(VolumeError, match=r"2 DICOM series in one folder; .*or give one file of the series wanted"):
        read_volume(tmp_path / "s")


def test_files_without_a_suffix_are_known_by_their_content(tmp_path, hu):
    write_series(tmp_path / "s", hu)
    for n, path in enumerate(sorted((tmp_path / "s").iterdir())):
        path.rename(path.with_name(f"IM{n:04d}"))
    (tmp_path / "s" / "README").write_text("not a slice")
    np.testing.assert_array_equal(read_volume(tmp_path / "s" / "IM0002").data, hu.T)


def test_a_series_written_as_nifti_is_the_same_volume(tmp_path, hu):
    write_series(tmp_path / "s", hu, direction=(0.8, 0.6, 0, -0.6, 0.8, 0))
    volume = read_volume(tmp_path / "s")
    write_volume(volume, tmp_path / "a.nii.gz")
    image = nib.load(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), volume.data)
    np.testing.assert_allclose(image.affine, volume.affine, atol=1e-5)


def test_reading_leaves_the_locale_alone(tmp_path, hu):
    write_series(tmp_path / "s", hu)
    before = locale.setlocale(locale.LC_ALL)
    read_volume(tmp_path / "s")
    assert locale.setlocale(locale.LC_ALL) == before


def test_the_command_takes_a_series_as_it_takes_a_file(tmp_path, hu):
    write_series(tmp_path / "s", hu)
    write_volume(read_volume(tmp_path / "s"), tmp_path / "a.nii.gz")
    found = []
    for n, source in enumerate((tmp_path / "s", tmp_path / "s" / "s1_001.dcm", tmp_path / "a.nii.gz")):
        out = tmp_path / f"{n}.json"
        arguments = ["features", "--model", "gvsl-unet-ct-nano", "-i", str(source), "-o", str(out), "--pool"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        found.append(json.loads(out.read_text())["bottleneck"])
    assert found[0] == found[1]
    np.testing.assert_allclose(found[0], found[2], rtol=1e-3, atol=1e-5)


# ---- what is no volume


def no_position(folder: Path, hu: np.ndarray) -> None:
    write_series(folder, hu, tags={"0020|0032": ""})


def other_size(folder: Path, hu: np.ndarray) -> None:
    write_series(folder, hu)
    write_series(folder / "other", hu[:, :8])
    (folder / "other" / "s1_003.dcm").replace(folder / "s1_003.dcm")


def colours(folder: Path, hu: np.ndarray) -> None:
    write_series(folder, np.stack([hu % 256] * 3, -1).astype(np.uint8), tags={"0028|1052": "0"})


def cut(folder: Path, hu: np.ndarray) -> None:
    write_series(folder, hu)
    path = folder / "s1_001.dcm"
    path.write_bytes(path.read_bytes()[:-200])


def headless(folder: Path, hu: np.ndarray) -> None:
    write_series(folder, hu)
    (folder / "s1_001.dcm").write_bytes(b"not DICOM")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda folder, hu: write_series(folder, hu, skip=2), "unevenly spaced, sheared .gantry tilt., or have no pos"),
        (lambda folder, hu: write_series(folder, hu, direction=TILTED), "unevenly spaced, sheared .gantry tilt."),
        (no_position, "or have no position; convert the series to NIfTI with dcm2niix"),
        (headless, "1 of 6 DICOM files are damaged; copy them again"),
        (other_size, r"cannot read .*; the file is damaged"),
        (cut, "1 of 6 DICOM files are damaged; copy them again"),
        (lambda folder, hu: folder.mkdir(), "it holds no DICOM series; give a NIfTI"),
        (colours, "the DICOM series is not one grey volume; convert the series to NIfTI with dcm2niix"),
    ],
)
def test_a_faulty_series_is_refused_with_its_cause(tmp_path, hu, write, message):
    pytest.importorskip("SimpleITK", reason="needs gvsl-zoo[io]")
    write(tmp_path / "s", hu)
    with pytest.raises(VolumeError, match=message) as caught:
        read_volume(tmp_path / "s")
    assert repr(str(tmp_path / "s")) in caught.value.cause and "\n" not in str(caught.value)


def test_a_series_larger_than_the_memory_allowed_is_refused_before_it_is_read(tmp_path, hu):
    write_series(tmp_path / "s", hu)
    with pytest.raises(VolumeError, match=r"6 slices take 4608 bytes, more than 1.86e-06 GiB; choose"):
        read_volume(tmp_path / "s", max_bytes=2000)
    path = tmp_path / "s" / "s1_001.dcm"
    path.write_bytes(path.read_bytes().replace(SLOPE + b"1 ", SLOPE + b".5"))
    with pytest.raises(VolumeError, match="6 slices take 9216 bytes"):  # one of fractions makes all float64
        read_volume(tmp_path / "s", max_bytes=5000)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(VolumeError, match=r"cannot read .*a.dcm': no such file; check the path"):
        read_volume(tmp_path / "a.dcm")
