"""Tests of gvsl_zoo.volume on DICOM: the geometry against the standard's formula, HU, and the faults one by one."""

from __future__ import annotations

import json
import locale
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from click.testing import CliRunner

from gvsl_zoo.cli import main
from gvsl_zoo.errors import VolumeError
from gvsl_zoo.volume import InputWarning, own_locale, read_volume, write_volume

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
    places: Sequence[float] | None = None,
    series: int = 1,
    tags: dict[str, str] | None = None,
) -> None:
    """Slices of `hu`, (D, H, W), in the direction `along`, at `places` or STEP_MM apart, written from last to first."""
    sitk = pytest.importorskip("SimpleITK", reason="needs gvsl-zoo[io]")
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    places = places or [STEP_MM * z for z in range(len(hu))]
    for z in reversed(range(len(hu))):
        image = sitk.GetImageFromArray(hu[z], isVector=hu.ndim == 4)  # the writer takes intercept and slope off
        image.SetSpacing((0.5, 0.75))
        uid = f"1.2.826.0.1.3680043.2.1125.{series}"
        place = [o + places[z] * step for o, step in zip(ORIGIN_MM, along, strict=True)]
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


# ---- what lies beside the slices, and what they do not say


def without_image(path: Path) -> None:
    """A file of a class that is no image, such as a structure set: SimpleITK cannot read it."""
    uid = b"1.2.840.10008.5.1.4.1.1.481.3\0"
    path.write_bytes(bytes(128) + b"DICM\2\0\2\0UI" + len(uid).to_bytes(2, "little") + uid + bytes(64))


def test_what_is_no_slice_beside_the_slices_is_left_out(tmp_path, hu):
    write_series(tmp_path / "s", hu)
    write_series(tmp_path / "s", hu[:2], series=2, tags={"0008|0060": "SEG"})
    without_image(tmp_path / "s" / "structures.dcm")
    (tmp_path / "s" / "s1_001.dcm.bak").write_bytes((tmp_path / "s" / "s1_001.dcm").read_bytes())
    for path in (tmp_path / "s", tmp_path / "s" / "s1_002.dcm"):
        np.testing.assert_array_equal(read_volume(path).data, hu.T)


def test_positions_rounded_to_a_tenth_of_a_millimetre_are_even(tmp_path, hu):
    write_series(tmp_path / "s", hu, places=[0, 0.6, 1.3, 1.9, 2.5, 3.1])
    volume = read_volume(tmp_path / "s")
    np.testing.assert_array_equal(volume.data, hu.T)
    assert volume.spacing_mm[2] == pytest.approx(0.62)


@pytest.mark.parametrize(
    ("tag", "mm", "notes"),
    [
        (b"\x18\0\x50\0", 3.5, ()),  # SliceThickness
        (b"\x18\0\x88\0", 3.5, ()),  # SpacingBetweenSlices
        (b"\x18\0\x51\0", 1, ("one slice that does not say how thick it is: 1 mm is assumed",)),
    ],
)
def test_a_single_slice_is_as_thick_as_it_says(tmp_path, hu, tag, mm, notes):
    write_series(tmp_path / "s", hu[:1], tags={"0018|0050": "3.5"})
    path = tmp_path / "s" / "s1_001.dcm"
    content = path.read_bytes().replace(b"\x18\0\x88\0", b"\x18\0\x89\0")  # which the writer may add
    path.write_bytes(content.replace(b"\x18\0\x50\0", tag))
    with pytest.warns(InputWarning, match="1 mm is assumed") if notes else nullcontext():
        volume = read_volume(tmp_path / "s")
    assert volume.shape == (12, 16, 1) and volume.spacing_mm == pytest.approx((0.5, 0.75, mm)) and volume.notes == notes


# ---- what is no volume


def patched(old: bytes, new: bytes, name: str = "*"):
    """A series in whose files, or the one of that name, bytes of the header are others."""

    def write(folder: Path, hu: np.ndarray) -> None:
        write_series(folder, hu)
        for path in folder.glob(name):
            head, found, rest = path.read_bytes().partition(old)
            assert found
            path.write_bytes(head + new + rest)

    return write


def placed(*places: float):
    return lambda folder, hu: write_series(folder, hu, places=places)


def series_of(*series: int):
    return lambda folder, hu: [write_series(folder, hu, series=number) for number in series]


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


def structures(folder: Path, hu: np.ndarray) -> None:
    folder.mkdir()
    without_image(folder / "a.dcm")


def headless(folder: Path, hu: np.ndarray) -> None:
    write_series(folder, hu)
    (folder / "s1_001.dcm").write_bytes(b"not DICOM")


FAULTS = {
    "gap": (placed(0, 2, 4, 8, 10, 12), "s1_004.dcm and s1_003.dcm lie 4 mm apart, others 2 mm; add what is missing"),
    "far": (placed(0, 2, 4, 6, 8, 100), "s1_002.dcm and s1_001.dcm lie 92 mm apart, others 2 mm; add what is missing"),
    "twice": (placed(0, 2, 2, 4, 6, 8), "s1_00.*dcm and s1_00.*dcm lie at one place, 0 mm apart; keep one of"),
    "two times": (placed(0, 2, 4, 0, 2, 4), "lie at one place, 0 mm apart; keep one of two copies or time points"),
    "tilt": (lambda f, hu: write_series(f, hu, direction=TILTED), r"sheared by 30 degrees .gantry tilt.; convert the"),
    "no position": (patched(b"\x20\0\x32\0", b"\x20\0\x31\0"), "s1_001.dcm has no ImagePositionPatient.*dcm2niix"),
    "no direction": (patched(b"\x20\0\x37\0", b"\x20\0\x36\0"), "s1_001.dcm has no ImageOrientationPatient.*dcm2niix"),
    "no spacing": (patched(b"\x28\0\x30\0", b"\x28\0\x31\0"), "s1_001.dcm has no PixelSpacing.*dcm2niix"),
    "not at right angles": (patched(b"1\\0\\0\\0\\1\\0", b"1\\0\\0\\1\\0\\0"), "give unit vectors at right angles"),
    "other spacing": (patched(b".75\\.5", b".85\\.5", "*3.dcm"), "PixelSpacing .0.75, 0.5., s1_003.dcm .0.85, 0.5."),
    "other direction": (patched(b"0\\1\\0 ", b"0\\-1\\0", "*3.dcm"), "ImageOrientationPatient .*, s1_003.dcm .*; give"),
    "other size": (other_size, "has the size .12, 16., s1_003.dcm .12, 8.; give the slices that belong together"),
    "white where lowest": (patched(b"CHROME2", b"CHROME1"), "s1_001.dcm is MONOCHROME1, whose values SimpleITK turns"),
    "no DICOM": (headless, "1 of 6 DICOM files are damaged: s1_001.dcm; copy them again"),
    "cut": (cut, "1 of 6 DICOM files are damaged: s1_001.dcm; copy them again"),
    "empty": (lambda folder, hu: folder.mkdir(), "it holds no DICOM series; give a NIfTI"),
    "structures alone": (structures, "it holds no DICOM series: a.dcm cannot be read as an image"),
    "colours": (colours, "s1_001.dcm is not one grey slice; convert the series to NIfTI with dcm2niix"),
    "two": (series_of(1, 2), "2 DICOM series in one folder; give each series a folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_series_is_refused_with_its_cause(tmp_path, hu, name):
    pytest.importorskip("SimpleITK", reason="needs gvsl-zoo[io]")
    write, message = FAULTS[name]
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
