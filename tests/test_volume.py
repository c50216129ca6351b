"""Tests of gvsl_zoo.volume: the geometry against definitions, the files against nibabel, the faults one by one."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import pickle
import resource
import struct
import sys
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

from gvsl_zoo.errors import ArgumentError, VolumeError
from gvsl_zoo.volume import (
    CT_WINDOW_HU,
    InputWarning,
    Prepared,
    Preprocessing,
    Volume,
    laid_on,
    prepare,
    read_volume,
    write_volume,
)

DATA = Path(__file__).parents[2] / "shared" / "data"
SHAPE = (9, 12, 7)  # odd, even, odd
SPACING = (0.8, 1.5, 3.0)  # mm, unequal
ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))
KEEP_MR = Preprocessing(unit="arbitrary", window=(0, 8192), scale=(0, 8192))  # a power of two: exact in float32


def turned_affine(order: tuple[int, ...], signs: tuple[int, ...], tilt_degrees: int = 0) -> np.ndarray:
    """Own axis n runs along world axis order[n] in direction signs[n]; then all is tilted about an oblique axis."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for own, (world, sign) in enumerate(zip(order, signs, strict=True)):
        affine[world, own] = sign * SPACING[own]
    axis = np.array([0.48, 0.6, 0.64]) * np.sin(np.radians(tilt_degrees / 2))
    rotation = nib.quaternions.quat2mat([np.cos(np.radians(tilt_degrees / 2)), *axis])
    affine[:3, :3] = rotation @ affine[:3, :3]
    affine[:3, 3] = (-31.5, 12.25, 77.0)
    return affine


def world_field(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A value that tells where in the world a voxel lies: 2000 + x + 3 y - 5 z, at every index of `shape`."""
    index = np.stack([*np.indices(shape), np.ones(shape)], -1)
    x, y, z = np.moveaxis(index @ affine.T, -1, 0)[:3]
    return 2000 + x + 3 * y - 5 * z


def labels_with_a_different_corner_each(shape: tuple[int, ...], dtype: type = np.int16) -> np.ndarray:
    """Eight blobs of different size and label, one a corner: any flip or exchange of axes shows."""
    labels = np.zeros(shape, dtype)
    for number, corner in enumerate(itertools.product((0, 1), repeat=3), start=1):
        box = tuple(
            slice(0, n // 3) if end == 0 else slice(-(n // 4) or None, None)
            for n, end in zip(shape, corner, strict=True)
        )
        labels[box] = number
    return labels


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None, **header: object) -> Path:
    image = nib.Nifti1Image(data, np.diag([*SPACING, 1]) if affine is None else affine, dtype=data.dtype)
    for name, value in header.items():
        image.header[name] = value
    nib.save(image, path)
    return path


def quietly(volume: Volume, preprocessing: Preprocessing) -> Prepared:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        return prepare(volume, preprocessing)


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


# ---- geometry


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_every_orientation_comes_back_exactly_and_has_its_landmarks_where_they_are(tmp_path, order, signs):
    for tilt in (0, 17):
        affine = turned_affine(order, signs, tilt)
        labels = labels_with_a_different_corner_each(SHAPE)
        volume = read_volume(save(tmp_path / f"{tilt}.nii.gz", labels, affine))
        np.testing.assert_array_equal(volume.data, labels)
        np.testing.assert_allclose(volume.affine, affine, atol=1e-5)

        kept = quietly(volume, KEEP_MR)
        back = kept.restore(kept.image[0, 0].to(torch.int16), nearest=True)
        np.testing.assert_array_equal(back.data, labels)
        assert back.data.dtype == labels.dtype
        np.testing.assert_array_equal(kept.restore(kept.image).data[..., 0], labels.astype(np.float32))
        write_volume(back, tmp_path / f"back{tilt}.nii.gz")
        reread, original = nib.load(tmp_path / f"back{tilt}.nii.gz"), nib.load(volume.path)
        np.testing.assert_array_equal(reread.affine, original.affine)
        assert reread.header == original.header

        canonical = nib.as_closest_canonical(original)  # nibabel's own canonical grid, axes (x, y, z)
        np.testing.assert_array_equal(kept.image[0, 0].numpy(), np.asarray(canonical.dataobj).T)
        np.testing.assert_allclose(kept.affine[:, [2, 1, 0, 3]], canonical.affine, atol=1e-4)


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS[::7])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (2.0, 0.7, 1.1), (0.5, 3.5, 2.0)])
def test_a_resampled_voxel_lies_where_the_affine_says(order, signs, spacing):
    affine = turned_affine(order, signs, 9)
    volume = Volume(world_field(affine, (24, 19, 21)), affine)  # linear in the world, so that interpolation is exact
    prepared = quietly(volume, Preprocessing(spacing, unit="arbitrary", window=(0, 10000), scale=(0, 10000)))
    for got, wanted in zip(prepared.spacing_mm, spacing, strict=True):
        assert got == pytest.approx(wanted, rel=0.1)
    voxel = np.abs(np.array([1, 3, -5]) @ prepared.affine[:3, :3]).sum()  # change of the field over one voxel
    expected = world_field(prepared.affine, prepared.shape)
    inner = tuple(
        slice(n // 4, n - n // 4) for n in prepared.shape
    )  # the filter is one-sided at the edges, and ripples a little
    np.testing.assert_allclose(prepared.image[0, 0].numpy()[inner], expected[inner], atol=0.06 * voxel)
    restored = prepared.restore(prepared.image[0, 0])
    inner = tuple(slice(n // 4, n - n // 4) for n in volume.shape)
    np.testing.assert_allclose(restored.data[inner], volume.data[inner], atol=0.06 * voxel)
    np.testing.assert_array_equal(restored.affine, volume.affine)
    placed = prepared.place(prepared.image[0, 0])
    np.testing.assert_allclose(placed.affine @ (3, 4, 5, 1), prepared.affine @ (5, 4, 3, 1))
    assert placed.data[3, 4, 5] == prepared.image[0, 0, 5, 4, 3]


@pytest.mark.parametrize("thin", [0, 1, 2])
@pytest.mark.parametrize("spacing", [3.7, 0.6])
def test_a_slice_is_resampled_as_each_of_a_thick_volume_of_its_like(thin, spacing, generator):
    plane = torch.randn((13, 17), generator=generator).numpy().astype(np.float32)
    recipe = Preprocessing((spacing,) * 3, unit="arbitrary", window=(-5, 5), scale=(-5, 5))
    one, many = (quietly(Volume(np.repeat(np.expand_dims(plane, thin), n, thin), np.eye(4)), recipe) for n in (1, 20))
    axis = 4 - thin  # of (1, 1, z, y, x)
    expected = many.image.select(axis, many.image.shape[axis] // 2)
    assert one.image.shape[axis] == 1 or spacing < 1
    np.testing.assert_allclose(one.image.select(axis, 0), expected, atol=1e-5)
    back = one.restore((one.image[0, 0] > 0).to(torch.uint8), nearest=True)
    assert 0.3 < back.data.mean() < 0.7


def test_the_edges_of_the_field_of_view_stay_where_they_are():
    affine = turned_affine((1, 2, 0), (-1, 1, -1), 20)
    prepared = quietly(Volume(np.zeros((5, 8, 11), np.uint8), affine), Preprocessing((1.0, 2.0, 4.0)))
    ends = [
        np.array([(*c, 1) for c in itertools.product(*((-0.5, n - 0.5) for n in shape))])
        for shape in ((5, 8, 11), prepared.shape)
    ]
    before, after = ends[0] @ affine.T, ends[1] @ prepared.affine.T
    np.testing.assert_allclose(*(sorted(corners.round(6).tolist()) for corners in (before, after)), atol=1e-5)


@pytest.mark.parametrize("seed", range(12))
def test_labels_are_brought_where_the_share_of_their_mask_is_the_largest(seed):
    generator = np.random.default_rng(seed)
    order, signs = generator.permutation(3), generator.choice([-1, 1], 3)
    shape, spacing = generator.integers(1, 30, 3), generator.uniform(0.5, 4, 3)
    labels = np.kron(generator.integers(0, 6, -(-shape // 4)), np.ones((4, 4, 4), int))
    labels = labels[tuple(map(slice, shape))].astype(np.uint8)
    labels[labels == 4] = 5  # of one there is nothing, and one is small
    labels[tuple(slice(n // 3, n // 3 + 2) for n in shape)] = 6
    affine = turned_affine(tuple(order), tuple(signs))
    prepared = quietly(Volume(generator.normal(size=shape), affine), Preprocessing(tuple(spacing), unit="arbitrary"))
    recipe = Preprocessing(tuple(spacing), unit="arbitrary", window=(0.0, 1.0))
    shares = [quietly(Volume((labels == k).astype(np.uint8), affine), recipe).image[0, 0] for k in range(7)]
    found = prepared.bring_labels(labels, 7)
    ordered = torch.stack(shares).sort(0, descending=True).values
    clear = (ordered[0] - ordered[1] > 1e-5).numpy()
    np.testing.assert_array_equal(found[clear], torch.stack(shares).argmax(0).numpy()[clear])
    assert found.dtype == np.uint8 and clear.mean() > 0.5


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, -1, 1), (1, -1, -1)])
def test_a_label_map_is_laid_on_a_scan_of_other_axes_voxel_on_voxel(order, signs):
    labels = np.random.default_rng(0).integers(0, 9, (4, 5, 6)).astype(np.uint8)
    label_map = Volume(labels, turned_affine((0, 1, 2), (1, 1, 1)), comment="names")
    axes = [[axis, sign] for axis, sign in zip(order, signs, strict=True)]
    turned = nib.Nifti1Image(labels, label_map.affine).as_reoriented(
        nib.orientations.ornt_transform(nib.orientations.io_orientation(label_map.affine), np.array(axes))
    )
    scan = Volume(np.zeros(turned.shape, np.int16), turned.affine)
    found = laid_on(label_map, "the label map", scan, "the scan")
    np.testing.assert_array_equal(found.data, np.asarray(turned.dataobj))
    np.testing.assert_allclose(found.affine, turned.affine)
    assert found.comment == "names"
    with pytest.raises(VolumeError, match=r"the label map lies up to .* beside the scan; resample"):
        laid_on(
            replace(label_map, affine=label_map.affine + np.diag([0, 0, 0.5, 0])), "the label map", scan, "the scan"
        )


@pytest.mark.parametrize("factor", [2, 3])
def test_labels_come_back_exactly_from_a_grid_finer_by_an_integer_factor(factor):
    labels = labels_with_a_different_corner_each((8, 9, 10), np.uint8)
    volume = Volume(labels, turned_affine((2, 0, 1), (1, -1, -1)))
    fine = quietly(volume, Preprocessing(tuple(s / factor for s in (0.8, 3.0, 1.5))))
    assert fine.shape == (8 * factor, 10 * factor, 9 * factor)
    upsampled = fine.source.data.transpose(0, 2, 1)[:, ::-1, ::-1]
    for axis in range(3):
        upsampled = upsampled.repeat(factor, axis)
    back = fine.restore(torch.from_numpy(upsampled.copy()), nearest=True)
    np.testing.assert_array_equal(back.data, labels)


def triangle_filter(n_in: int, n_out: int) -> np.ndarray:
    """The definition, (n_out, n_in): as wide as an output voxel but not narrower than an input voxel."""
    ratio = n_in / n_out
    centres = (np.arange(n_out)[:, None] + 0.5) * ratio - 0.5
    weights = np.clip(1 - np.abs(np.arange(n_in) - centres) / max(ratio, 1), 0, None)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("size", [(37, 20, 9), (13, 40, 9), (26, 17, 3), (60, 9, 20), (1, 20, 10)])
def test_interpolation_is_the_definition_axis_by_axis(size):
    data = np.random.default_rng(0).normal(size=(26, 20, 9)).astype(np.float32)
    volume = Volume(data, np.diag([*np.divide(size, data.shape), 1]))
    prepared = quietly(volume, Preprocessing((1, 1, 1), window=(-8, 8), scale=(-8, 8)))
    filters = [triangle_filter(n, new) for n, new in zip(data.shape, size, strict=True)]
    expected = np.einsum("xyz,ax,by,cz->cba", data, *filters, optimize=True)
    np.testing.assert_allclose(prepared.image[0, 0].numpy(), expected, atol=1e-5)


def test_a_smooth_image_survives_a_coarser_grid_and_back():
    grid = np.indices((40, 36, 30))
    smooth = (500 + 400 * np.sin(grid[0] / 9) * np.cos(grid[1] / 8) * np.sin(grid[2] / 7)).astype(np.int16)
    prepared = quietly(Volume(smooth, np.eye(4)), Preprocessing((1.5, 1.5, 1.5), unit="arbitrary", window=(0, 1000)))
    difference = prepared.restore(prepared.image[0, 0]).data * 1000 - smooth
    assert np.abs(difference).mean() < 5 and np.abs(difference[3:-3, 3:-3, 3:-3]).max() < 20  # of an amplitude of 400


@pytest.mark.parametrize("n", range(1, 16))
def test_short_axes_survive_there_and_back(n):
    volume = Volume(np.arange(n * 20, dtype=np.int16).reshape(1, n, 20), np.diag([5, 0.9, 2, 1]))
    prepared = quietly(volume, Preprocessing((1, 1, 1)))
    assert prepared.shape == (40, max(1, round(0.9 * n)), 5)
    assert prepared.restore(torch.zeros(2, *prepared.shape)).data.shape == (1, n, 20, 2)


def test_channels_and_types_of_outputs():
    prepared = quietly(Volume(np.zeros((6, 5, 4), np.int16), np.eye(4)), Preprocessing((2, 2, 2)))
    shape = prepared.shape
    assert prepared.restore(torch.rand(3, *shape, dtype=torch.bfloat16)).data.dtype == np.float32
    for dtype in (torch.uint8, torch.int64, torch.bool):
        assert (
            prepared.restore(torch.zeros(shape, dtype=dtype), nearest=True).data.dtype
            == torch.zeros(0, dtype=dtype).numpy().dtype
        )
    with pytest.raises(ArgumentError, match=r"labels \(int64\) cannot be interpolated; pass nearest=True"):
        prepared.restore(torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(ArgumentError, match=r"shape \(9, 9, 9\); expected \(2, 2, 3\) or"):
        prepared.restore(torch.zeros(9, 9, 9))


def test_torchs_global_defaults_change_nothing():
    volume = Volume(np.broadcast_to(np.arange(7, dtype=np.float32), (5, 6, 7)), np.eye(4))
    expected = quietly(volume, Preprocessing((2, 2, 2))).image
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        image = quietly(volume, Preprocessing((2, 2, 2))).image
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert image.dtype == torch.float32 and image.device.type == "cpu" and torch.equal(image, expected)


# ---- intensities


def test_hounsfield_units_become_the_official_formula_bit_for_bit():
    hu = np.arange(-1500, 1500, dtype=np.int16).reshape(10, 20, 15)
    image = prepare(Volume(hu, np.eye(4)), Preprocessing()).image
    official = np.clip(hu.T.astype(np.float32) + 1024, 0, 2048) / 2048
    np.testing.assert_array_equal(image[0, 0].numpy(), official)
    assert Preprocessing().window == CT_WINDOW_HU == (-1024, 1024)


def test_arbitrary_units_lose_negatives_and_span_0_to_1():
    mr = np.linspace(-50, 200, 60, dtype=np.float64).reshape(3, 4, 5)
    image = prepare(Volume(mr, np.eye(4)), Preprocessing(unit="arbitrary")).image
    np.testing.assert_allclose(image[0, 0].numpy(), np.clip(mr.T, 0, None) / 200, rtol=1e-6)


@pytest.mark.parametrize("unit", ["HU", "arbitrary"])
@pytest.mark.parametrize("value", [0, 37, -2000])
def test_a_constant_image_divides_by_nothing(unit, value):
    with pytest.warns(InputWarning, match=f"every voxel is {value}"):
        image = prepare(
            Volume(np.full((4, 5, 6), value, np.int16), np.eye(4)), Preprocessing((2, 2, 2), unit=unit)
        ).image
    assert image.isfinite().all() and (image == image[0, 0, 0, 0, 0]).all() and 0 <= image.min() <= image.max() <= 1


@pytest.mark.parametrize(
    ("low", "high", "unit", "message"),
    [
        (0, 1, "HU", "expected HU, but values span 0 to 1: already scaled"),
        (0, 255, "HU", "values span 0 to 255: an 8-bit picture, or MR"),
        (0, 3071, "HU", "values span 0 to 3071: shifted by 1024"),
        (-47, 833, "HU", "values span -47 to 833 with next to nothing below -200"),
        (-1024, 2000, "arbitrary", "expected MR, but values span -1024 to 2000 and 27 % lie below -200"),
    ],
)
def test_values_that_do_not_look_like_the_modality_are_named(low, high, unit, message):
    data = np.linspace(low, high, 1000).reshape(10, 10, 10)
    with pytest.warns(InputWarning, match=message):
        prepared = prepare(Volume(data, np.eye(4)), Preprocessing(unit=unit))
    assert message in prepared.warnings[0]


def test_nan_voxels_of_an_array_are_filled_without_touching_it():
    data = np.linspace(-1000, 1000, 216).reshape(6, 6, 6)
    data[2, 3, 4], data[5, 5, 5] = np.nan, np.inf
    with pytest.warns(InputWarning, match="2 of 216 voxels were NaN or infinite and are now -1000"):
        prepared = prepare(Volume(data, np.eye(4)), Preprocessing((2, 2, 2)))
    assert prepared.image.isfinite().all() and np.isnan(data[2, 3, 4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spacing_mm": (1, 0, 1)}, "three positive millimetres"),
        ({"orientation": "LPS"}, "only 'RAS'"),
        ({"unit": "grey"}, "give 'HU' or 'arbitrary'"),
        ({"window": (5, 5)}, "low < high"),
    ],
)
def test_impossible_preprocessing_is_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        Preprocessing(**arguments)


def test_a_grid_beyond_the_memory_limit_is_refused_before_it_is_made():
    before = peak_mib()
    with pytest.raises(VolumeError, match=r"900 x 900 x 900 mm resampled to 0.5 x 0.5 x 0.5 mm takes .* GiB"):
        prepare(Volume(np.zeros((9, 9, 9), np.int16), np.diag([900, 900, 900, 1])), Preprocessing((0.5, 0.5, 0.5)))
    assert peak_mib() - before < 50
    with pytest.raises(VolumeError, match="3 channels; prepare one at a time"):
        prepare(Volume(np.zeros((4, 4, 4, 3)), np.eye(4)), Preprocessing())


# ---- files read


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_every_real_type_and_byte_order_reads_exactly(tmp_path, dtype, order, name):
    kind = np.dtype(order + dtype)
    info = np.iinfo(kind) if kind.kind in "iu" else None
    ends = (info.min, info.max) if info else (-1e4, 3.25)
    data = (
        np.array([*ends, *range(118)]).astype(kind)
        if info is None
        else np.array([*ends, *range(118)], dtype=object).astype(kind)
    )
    data = data.reshape(4, 5, 6)
    header = nib.Nifti1Header(endianness=order)
    header.set_data_dtype(kind)
    nib.save(nib.Nifti1Image(data, np.diag([*SPACING, 1]), header, dtype=kind), tmp_path / name)
    volume = read_volume(tmp_path / name)
    np.testing.assert_array_equal(volume.data, data)
    assert volume.data.dtype == kind.newbyteorder("=") and volume.data.dtype.isnative
    np.testing.assert_allclose(volume.spacing_mm, SPACING, rtol=1e-6)
    write_volume(volume, tmp_path / "out.nii")
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "out.nii").dataobj), data)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_slope_and_intercept_are_applied_as_nibabel_does(tmp_path, dtype):
    path = save(tmp_path / "a.nii", np.arange(120).reshape(4, 5, 6).astype(dtype))
    path.write_bytes(patched(path.read_bytes(), 112, "<ff", 0.37, -1024.5))
    np.testing.assert_array_equal(read_volume(path).data.astype(np.float32), nib.load(path).get_fdata(dtype=np.float32))


def test_nifti_2_several_gzip_members_and_wrong_suffixes_read(tmp_path):
    data = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    nib.save(nib.Nifti2Image(data, np.eye(4)), tmp_path / "two.nii.gz")
    np.testing.assert_array_equal(read_volume(tmp_path / "two.nii.gz").data, data)
    raw = save(tmp_path / "a.nii", data).read_bytes()
    for cut in (100, 348, 352, 500):
        (tmp_path / "members.nii").write_bytes(gzip.compress(raw[:cut]) + gzip.compress(raw[cut:]) + b"\0" * 64)
        np.testing.assert_array_equal(read_volume(tmp_path / "members.nii").data, data)


def test_one_volume_of_four_axes_is_squeezed_and_channels_come_on_request(tmp_path):
    data = np.arange(240, dtype=np.int16).reshape(4, 5, 6, 2)
    assert read_volume(save(tmp_path / "one.nii", data[..., :1])).data.shape == (4, 5, 6)
    path = save(tmp_path / "two.nii", data)
    np.testing.assert_array_equal(read_volume(path, channels=True).data, data)
    with pytest.raises(VolumeError, match=r"2 volumes in one file, shape \(4, 5, 6, 2\); choose one"):
        read_volume(path)


def test_an_uncompressed_file_is_mapped_and_never_changed(tmp_path):
    path = save(tmp_path / "a.nii", np.arange(120, dtype=np.int16).reshape(4, 5, 6))
    before, volume = path.read_bytes(), read_volume(path)
    assert isinstance(volume.data.base, np.memmap)
    volume.data[...] = 7
    assert path.read_bytes() == before


def test_names_with_spaces_and_other_alphabets_work(tmp_path):
    folder = tmp_path / "Üb ung 影像 'x'"
    folder.mkdir()
    path = save(folder / "scan №1.nii.gz", np.ones((3, 4, 5), np.int16))
    write_volume(read_volume(path), folder / ("й" * 120 + ".nii.gz"))
    assert len(list(folder.iterdir())) == 2
    with pytest.raises(VolumeError, match="File name too long"):
        read_volume(folder / ("x" * 300 + ".nii"))


@pytest.mark.parametrize(("code", "factor"), [(1, 1000), (3, 0.001)])
def test_metres_and_microns_become_millimetres(tmp_path, code, factor):
    path = save(
        tmp_path / "a.nii", np.ones((3, 4, 5), np.int16), np.diag([*np.divide(SPACING, factor), 1]), xyzt_units=code
    )
    with pytest.warns(InputWarning, match="now in millimetres"):
        volume = read_volume(path)
    np.testing.assert_allclose(volume.spacing_mm, SPACING, rtol=1e-6)
    write_volume(volume, tmp_path / "b.nii")
    np.testing.assert_allclose(read_volume(tmp_path / "b.nii").spacing_mm, SPACING, rtol=1e-6)
    assert nib.load(tmp_path / "b.nii").header.get_xyzt_units()[0] == "mm"


# ---- files doubted: used, with a note


def test_nan_and_infinite_voxels_are_filled_and_reported(tmp_path):
    data = np.linspace(-3, 9, 120, dtype=np.float32).reshape(4, 5, 6)
    data[1, 2, 3], data[0, 0, 1], data[3, 3, 3] = np.nan, np.inf, -np.inf
    for name in ("a.nii", "a.nii.gz"):
        with pytest.warns(InputWarning, match="3 of 120 voxels were NaN or infinite and are now -3"):
            volume = read_volume(save(tmp_path / name, data))
        assert volume.data[1, 2, 3] == volume.data[0, 0, 1] == -3 and len(volume.notes) == 1
        np.testing.assert_array_equal(volume.data[2], data[2])
        with pytest.warns(InputWarning, match="3 of 120 voxels were NaN or infinite and are now 0"):
            assert read_volume(tmp_path / name, fill=0.0).data[1, 2, 3] == 0


@pytest.mark.parametrize(
    ("offset", "values", "note"),
    [
        (252, ("<hh", 0, 0), "codes are both 0: orientation unknown"),
        (256, ("<f", 0.7), "sform and qform disagree by up to"),
        (256, ("<f", 3.0), "sform and qform disagree by up to nan mm"),
        (268, ("<f", 500.0), "sform and qform disagree by up to"),
        (80, ("<fff", 1, 1, 1), "pixdim says 1 x 1 x 1 mm, the affine 0.8 x 1.5 x 3 mm"),
    ],
    ids=["codes 0", "rotated", "bad quaternion", "shifted", "pixdim"],
)
@pytest.mark.filterwarnings("ignore::gvsl_zoo.volume.InputWarning")  # a second note of the same file
def test_a_doubtful_geometry_is_used_reported_and_written_back_as_it_was(tmp_path, offset, values, note):
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.diag([*SPACING, 1]))
    image.set_qform(image.affine, 1)
    image.set_sform(image.affine, 1)
    path = tmp_path / "a.nii"
    nib.save(image, path)
    path.write_bytes(patched(path.read_bytes(), offset, *values))
    with pytest.warns(InputWarning, match=note):
        volume = read_volume(path)
    assert note in volume.notes[0]
    reference = nib.load(path)
    np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-6)
    prepared = quietly(volume, Preprocessing((1, 1, 1)))
    assert note in prepared.warnings[0]
    write_volume(prepared.restore(torch.rand(3, *prepared.shape)), tmp_path / "b.nii")
    written = nib.load(tmp_path / "b.nii")
    np.testing.assert_allclose(written.affine, reference.affine, atol=1e-6)
    for field in ("sform_code", "qform_code", "pixdim", "srow_x", "quatern_b", "xyzt_units"):
        np.testing.assert_array_equal(written.header[field], reference.header[field])


# ---- files refused


def patched(raw: bytes, offset: int, layout: str, *values: float) -> bytes:
    new = struct.pack(layout, *values)
    return raw[:offset] + new + raw[offset + len(new) :]


GOOD = io.BytesIO()
nib.Nifti1Image(
    np.random.default_rng(1).integers(-1000, 1000, (16, 16, 16)).astype(np.int16), np.diag([*SPACING, 1])
).to_stream(GOOD)
RAW = GOOD.getvalue()
PACKED = gzip.compress(RAW)


def extended(claimed: int) -> bytes:
    """RAW with a header extension of 32 bytes that claims another length."""
    header = patched(RAW, 108, "<f", 384)[:348]
    return header + b"\1\0\0\0" + struct.pack("<ii", claimed, 6) + bytes(24) + RAW[352:]


CONTENTS = {
    "empty": (b"", "the file is empty"),
    "text": (b"not an image at all\n" * 50, "not a NIfTI file: it begins with b'not an image at "),
    "html": (b"<!DOCTYPE html><html>" * 40, "not a NIfTI file: it begins with b'<!DOCTYPE html><'"),
    "pickle": (pickle.dumps({"a": list(range(999))}), "not a NIfTI file"),
    "packed text": (gzip.compress(b"hello " * 500), "not a NIfTI file: it begins with b'hello hello"),
    "pair": (patched(RAW, 344, "<4s", b"ni1\0"), "magic b'ni1.*' is not that of a single-file"),
    "short header": (RAW[:300], "the header ends after 300 of 348 bytes"),
    "only header": (RAW[:348], "ends before its first voxel"),
    "truncated": (RAW[:5000], "needs|is 8192 bytes, but the file has only 5000"),
    "too long": (RAW + b"\0", "8193 follow the header"),
    "packed truncated": (PACKED[:5000], "gzip stream is damaged .*end-of-stream"),
    "packed without its end": (PACKED[:-8], "gzip stream is damaged"),
    "packed too short": (gzip.compress(RAW[:-10]), "ends after 8182 of 8192 bytes"),
    "packed too long": (gzip.compress(RAW + b"\0"), "goes on after the 8192 bytes"),
    "checksum": (PACKED[:-8] + b"\1\2\3\4" + PACKED[-4:], "gzip stream is damaged .*CRC"),
    "length": (PACKED[:-4] + b"\1\2\3\4", "gzip stream is damaged"),
    "bit flip": (PACKED[:4000] + bytes([PACKED[4000] ^ 16]) + PACKED[4001:], "is damaged|ends after|goes on"),
    "garbage after": (PACKED + b"garbage", "gzip stream is damaged"),
    "long quaternion": (patched(patched(RAW, 252, "<hh", 1, 0), 256, "<f", 3), "the qform is invalid: w2 should be"),
    "no axes": (patched(RAW, 40, "<h", 0), "claims 0 dimensions"),
    "nine axes": (patched(RAW, 40, "<h", 9), "claims 9 dimensions"),
    "negative count": (patched(RAW, 40, "<h", -3), "claims -3 dimensions"),
    "zero dim": (patched(RAW, 44, "<h", 0), r"shape \(16, 0, 16\)"),
    "negative dim": (patched(RAW, 44, "<h", -16), r"shape \(16, -16, 16\)"),
    "two axes": (patched(RAW, 40, "<h", 2), "a 2-D image"),
    "several volumes": (patched(RAW, 40, "<5h", 4, 16, 16, 8, 2), "2 volumes in one file"),
    "wrong dim": (patched(RAW, 42, "<h", 15), "a wrong header"),
    "huge dims": (patched(RAW, 42, "<3h", 32767, 32767, 32767), "the file has only 8544: truncated, or a wrong header"),
    "huge dims packed": (gzip.compress(patched(RAW, 42, "<3h", 9999, 9999, 9999)), "the file has only"),
    "zero spacing": (patched(RAW, 80, "<f", 0), "voxel spacing 0 x 1.5 x 3 mm"),
    "negative spacing": (patched(RAW, 84, "<f", -1.5), "voxel spacing 0.8 x -1.5 x 3 mm"),
    "nan spacing": (patched(RAW, 88, "<f", np.nan), "voxel spacing 0.8 x 1.5 x nan mm"),
    "absurd spacing": (patched(RAW, 280, "<f", 1e9), "the affine's voxel spacing is 1e\\+09"),
    "singular affine": (patched(RAW, 296, "<4f", 0.8, 0, 0, 0), "the affine is singular"),
    "nearly singular": (patched(RAW, 280, "<8f", 1, 1, 0, 0, 1, 1, 0, 0), "the affine is singular"),
    "nan affine": (patched(RAW, 284, "<f", np.nan), "the affine is not 4 x 4 finite numbers"),
    "infinite affine": (patched(RAW, 292, "<f", np.inf), "the affine is not 4 x 4 finite numbers"),
    "nan quaternion": (patched(patched(RAW, 252, "<hh", 1, 0), 256, "<f", np.nan), "the qform is invalid|finite"),
    "complex": (patched(RAW, 70, "<hh", 32, 64), "voxel type complex64"),
    "rgb": (patched(RAW, 70, "<hh", 128, 24), "voxel type RGB"),
    "float128": (patched(RAW, 70, "<hh", 1536, 128), "code 1536"),
    "unknown type": (patched(RAW, 70, "<h", 999), "voxel type unknown .code 999"),
    "nan slope": (patched(RAW, 112, "<f", np.nan), "scl_slope nan"),
    "infinite slope": (patched(RAW, 112, "<f", np.inf), "scl_slope inf"),
    "huge slope": (patched(RAW, 112, "<f", 1e30), "scl_slope 1e\\+30"),
    "nan intercept": (patched(RAW, 112, "<ff", 1, np.nan), "scl_inter nan"),
    "huge intercept": (patched(RAW, 112, "<ff", 1, -1e20), "scl_inter -1e\\+20"),
    "offset below": (patched(RAW, 108, "<f", 40), "vox_offset 40 is absurd"),
    "offset negative": (patched(RAW, 108, "<f", -352), "vox_offset -352 is absurd"),
    "offset nan": (patched(RAW, 108, "<f", np.nan), "vox_offset nan is absurd"),
    "offset huge": (patched(RAW, 108, "<f", 3e38), "vox_offset 3e\\+38 is absurd"),
    "offset fraction": (patched(RAW, 108, "<f", 352.5), "vox_offset 352.5 is absurd"),
    "offset behind": (patched(RAW, 108, "<f", 9e6), "ends before its first voxel"),
    "extension": (extended(2**30), "a header extension claims 1073741824 of 32 bytes"),
    "extension negative": (extended(-16), "a header extension claims -16 of 32 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("unpacker", ["gzip.GzipFile", "isal.igzip.IGzipFile"])
@pytest.mark.parametrize("name", CONTENTS)
def test_a_faulty_file_is_refused_and_named(tmp_path, name, unpacker, monkeypatch):
    module, _, reader = unpacker.rpartition(".")
    monkeypatch.setattr("gvsl_zoo.volume._Gzip", getattr(pytest.importorskip(module), reader))
    content, message = CONTENTS[name]
    path = tmp_path / "fault.nii.gz"
    path.write_bytes(content)
    before = peak_mib()
    with pytest.raises(VolumeError, match=message) as caught:
        read_volume(path)
    assert "cannot read" in str(caught.value) and "fault.nii.gz" in str(caught.value) and caught.value.remedy
    assert peak_mib() - before < 50


def test_any_single_changed_byte_of_a_packed_file_is_refused_or_harmless(tmp_path):
    path, good = tmp_path / "a.nii.gz", np.frombuffer(RAW[352:], "<i2").reshape(16, 16, 16, order="F")
    random = np.random.default_rng(5)
    for place in random.integers(10, len(PACKED), 150):  # behind the gzip header, whose time stamp means nothing
        changed = bytearray(PACKED)
        changed[place] ^= 1 << int(random.integers(8))
        path.write_bytes(bytes(changed))
        try:
            volume = read_volume(path)
        except VolumeError:
            continue
        np.testing.assert_array_equal(volume.data, good)


def test_any_changed_header_gives_a_volume_or_a_volume_error(tmp_path):
    path, random = tmp_path / "a.nii", np.random.default_rng(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(400):
            changed = bytearray(RAW)
            for place in random.integers(0, 352, int(random.integers(1, 4))):
                changed[place] = int(random.choice([0, 1, 127, 128, 255, int(random.integers(256))]))
            path.write_bytes(bytes(changed))
            try:
                volume = read_volume(path)
            except VolumeError:
                continue
            assert np.isfinite(volume.affine).all() and volume.data.ndim == 3 and min(volume.spacing_mm) > 0


def test_a_missing_file_and_a_folder_of_no_series_are_refused(tmp_path):
    with pytest.raises(VolumeError, match="no such file; check the path"):
        read_volume(tmp_path / "none.nii")
    pytest.importorskip("SimpleITK", reason="needs gvsl-zoo[io]")
    with pytest.raises(VolumeError, match="it holds no DICOM series; give a NIfTI-1 or NIfTI-2 file"):
        read_volume(tmp_path)


def test_all_nan_and_astronomical_voxels_are_refused(tmp_path):
    with pytest.raises(VolumeError, match="no voxel has a finite value"):
        read_volume(save(tmp_path / "nan.nii", np.full((3, 4, 5), np.nan, np.float32)))
    with pytest.raises(VolumeError, match=r"values from 0 to 1e\+35 are beyond any image"):
        read_volume(save(tmp_path / "far.nii", np.linspace(0, 1e35, 60).reshape(3, 4, 5)))


def test_scaled_integers_beyond_double_precision_are_refused(tmp_path):
    path = save(tmp_path / "a.nii", np.full((3, 4, 5), 2**60, np.int64))
    path.write_bytes(patched(path.read_bytes(), 112, "<ff", 2.0, 0))
    with pytest.raises(VolumeError, match="beyond 2\\^53 with a scaling lose digits"):
        read_volume(path)


def test_bombs_and_empty_promises_take_no_memory(tmp_path):
    squeeze = zlib.compressobj(9, wbits=31)
    zeros = b"".join(squeeze.compress(bytes(2**20)) for _ in range(300)) + squeeze.flush()
    promise = patched(RAW, 42, "<3h", 2000, 1000, 900)[:352]  # 3.6 GB of int16
    files = {
        "goes on after the 8192 bytes": gzip.compress(RAW) + zeros,
        "ends after": gzip.compress(promise + np.random.default_rng(0).bytes(4 * 2**20), 1),
        "3600000000 bytes, more than 1 GiB": gzip.compress(promise + np.random.default_rng(0).bytes(4 * 2**20), 1),
    }
    for message, content in files.items():
        (tmp_path / "bomb.nii.gz").write_bytes(content)
        before = peak_mib()
        with pytest.raises(VolumeError, match=message):
            read_volume(tmp_path / "bomb.nii.gz", max_bytes=2**30 if "more than" in message else 2**32)
        assert peak_mib() - before < 60


def test_a_large_mapped_volume_is_prepared_in_bounded_memory(tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((2, 2, 2), np.int16), np.eye(4))
    shape = (512, 512, 400)
    with path.open("r+b") as file:  # 200 MiB, a hole on disk
        file.seek(40)
        file.write(struct.pack("<4h", 3, *shape))
        file.truncate(352 + 2 * int(np.prod(shape)))
        file.seek(352)
        file.write(b"\x18\xfc")  # -1000: not a constant image
    volume = read_volume(path)
    before = peak_mib()
    prepared = quietly(volume, Preprocessing((4, 4, 4)))
    assert prepared.shape == (100, 128, 128)
    assert peak_mib() - before < 200 + 100  # the mapped pages, and far less than the 400 MiB of one float32 copy


# ---- files written


@pytest.fixture
def volume(tmp_path) -> Volume:
    return read_volume(save(tmp_path / "in.nii.gz", np.arange(60, dtype=np.int16).reshape(3, 4, 5)))


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_is_written_is_what_nibabel_reads(tmp_path):
    affine = turned_affine((2, 0, 1), (-1, 1, -1), 12)
    data = np.random.default_rng(0).normal(size=(4, 5, 6, 3)).astype(np.float32)
    for name in ("a.nii", "a.nii.gz"):
        write_volume(Volume(data, affine), tmp_path / name)
        image = nib.load(tmp_path / name)
        np.testing.assert_array_equal(np.asarray(image.dataobj), data)
        np.testing.assert_allclose(image.affine, affine, atol=1e-5)
        np.testing.assert_allclose(image.get_qform(), affine, atol=1e-4)
        assert (
            image.header.get_xyzt_units()[0] == "mm" and image.header["sform_code"] == image.header["qform_code"] == 2
        )
    first = (tmp_path / "a.nii.gz").read_bytes()
    write_volume(Volume(data, affine), tmp_path / "a.nii.gz", overwrite=True)
    assert (tmp_path / "a.nii.gz").read_bytes() == first  # no time stamp inside


@pytest.mark.parametrize("packer", ["gzip.GzipFile", "isal.igzip.IGzipFile"])
def test_a_packed_file_is_the_same_whoever_packs_it(tmp_path, packer, monkeypatch):
    module, _, kind = packer.rpartition(".")
    monkeypatch.setattr("gvsl_zoo.volume._Gzip", getattr(pytest.importorskip(module), kind))
    data = np.random.default_rng(0).integers(-1000, 1000, (30, 20, 10)).astype(np.int16)
    for name in ("a.nii", "a.nii.gz", "b.nii.gz"):
        write_volume(Volume(data, np.eye(4)), tmp_path / name)
    packed = (tmp_path / "a.nii.gz").read_bytes()
    assert gzip.decompress(packed) == (tmp_path / "a.nii").read_bytes() and len(packed) < data.nbytes
    assert packed == (tmp_path / "b.nii.gz").read_bytes()


def test_what_is_true_of_the_scan_alone_is_not_said_of_what_is_made_from_it(tmp_path):
    image = nib.Nifti1Image(np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4))
    image.header.set_dim_info(0, 1, 2)
    image.header.set_intent("label", name="tissue")
    given = {"slice_code": 1, "slice_end": 4, "slice_duration": 0.1, "toffset": 3, "aux_file": b"lut"}
    for field, value in given.items():
        image.header[field] = value
    nib.save(image, tmp_path / "a.nii")
    volume = read_volume(tmp_path / "a.nii")
    prepared = quietly(volume, Preprocessing((2, 2, 2)))
    plain = nib.Nifti1Header()
    for made in (prepared.restore(prepared.image), prepared.place(prepared.image)):
        write_volume(made, tmp_path / "b.nii", overwrite=True)
        header = nib.load(tmp_path / "b.nii").header
        for field in ("dim_info", "intent_code", "intent_name", *given):
            assert header[field] == plain[field], field
    write_volume(volume, tmp_path / "c.nii")
    assert nib.load(tmp_path / "c.nii").header == image.header


@pytest.mark.parametrize("dtype", [bool, np.float16, ">i2"])
def test_types_that_nifti_has_not_are_written_as_the_next_wider(tmp_path, dtype):
    data = np.array([0, 1, 1, 0, 1, 0]).reshape(1, 2, 3).astype(dtype)
    write_volume(Volume(data, np.eye(4)), tmp_path / "a.nii")
    np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / "a.nii").dataobj), data)


def test_outputs_that_must_not_be_written_are_refused(tmp_path, volume):
    (tmp_path / "there.nii").write_bytes(b"precious")
    (tmp_path / "link.nii.gz").symlink_to(tmp_path / "in.nii.gz")
    (tmp_path / "folder.nii").mkdir()
    for name, message in {
        "in.nii.gz": "it is the input itself",
        "link.nii.gz": "it is the input itself",
        "no/out.nii": "the folder .* does not exist; make it first",
        "out.nrrd": "does not end in .nii or .nii.gz",
        "folder.nii": "it exists already",
    }.items():
        before = files(tmp_path)
        with pytest.raises(VolumeError, match=f"cannot write .*{name}.*{message}"):
            write_volume(volume, tmp_path / name, overwrite=True)
        assert files(tmp_path) == before
    with pytest.raises(VolumeError, match="it exists already; choose another name, or pass overwrite=True"):
        write_volume(volume, tmp_path / "there.nii")
    assert (tmp_path / "there.nii").read_bytes() == b"precious"
    write_volume(volume, tmp_path / "there.nii", overwrite=True)
    np.testing.assert_array_equal(read_volume(tmp_path / "there.nii").data, volume.data)
    with pytest.raises(VolumeError, match="NIfTI has no place for complex64 voxels"):
        write_volume(Volume(np.zeros((2, 2, 2), np.complex64), np.eye(4)), tmp_path / "c.nii")


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, volume, name):
    write_volume(volume, tmp_path / name)
    before, content = files(tmp_path), (tmp_path / name).read_bytes()
    large = Volume(np.random.default_rng(0).normal(size=(64, 64, 64)), np.eye(4))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
    try:
        with pytest.raises(VolumeError, match="File too large; check the path, the permissions and the free space"):
            write_volume(large, tmp_path / name, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == before and (tmp_path / name).read_bytes() == content


def test_what_a_killed_run_left_is_gone_after_the_next(tmp_path, volume, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *a, **k: None)  # as if killed before it could clean up
        patch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt("stopped")))
        with pytest.raises(KeyboardInterrupt, match="stopped"):
            write_volume(volume, tmp_path / "out.nii.gz")
    [left] = files(tmp_path) - {"in.nii.gz"}
    os.utime(tmp_path / left, (0, 0))  # long ago
    write_volume(volume, tmp_path / "out.nii.gz")
    assert files(tmp_path) == {"in.nii.gz", "out.nii.gz"}


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz"])
def test_two_that_write_one_output_at_once_both_write_it_whole(tmp_path, volume, name, monkeypatch):
    sync, other = os.fsync, replace(volume, data=volume.data + 1)

    def while_the_first_still_writes(number: int) -> None:
        monkeypatch.setattr("os.fsync", sync)
        write_volume(other, tmp_path / name)
        np.testing.assert_array_equal(read_volume(tmp_path / name).data, other.data)
        sync(number)

    monkeypatch.setattr("os.fsync", while_the_first_still_writes)
    write_volume(volume, tmp_path / name)
    np.testing.assert_array_equal(read_volume(tmp_path / name).data, volume.data)
    assert files(tmp_path) == {"in.nii.gz", name}


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 5, 6, 7), (3, 0, 5)])
def test_an_array_that_is_no_volume_is_refused(shape):
    with pytest.raises(VolumeError, match=r"data has shape .* give \(i, j, k\)"):
        Volume(np.zeros(shape), np.eye(4))


def test_an_affine_with_its_translation_in_the_last_row_is_refused():
    with pytest.raises(VolumeError, match=r"with the last row 0 0 0 1: .*; give 4 x 4 finite numbers"):
        Volume(np.zeros((3, 4, 5)), turned_affine((0, 1, 2), (1, 1, 1)).T)


# ---- real scans


@pytest.mark.skipif(not DATA.is_dir(), reason="the shared real scans are not beside this repository")
@pytest.mark.parametrize("name", ["ct/lungdx_a0002", "ct/ts_abdomen", "mr/tcga_lihc_4073_haste"])
def test_real_scans_come_back_onto_their_own_grid(tmp_path, name):
    path = DATA / f"{name}.nii.gz"
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)  # nothing doubtful about them
        volume = read_volume(path)
        prepared = prepare(volume, Preprocessing((2, 2, 2), unit="HU" if name.startswith("ct") else "arbitrary"))
    assert (
        prepared.spacing_mm == pytest.approx((2, 2, 2), abs=0.05)
        and 0 <= prepared.image.min() <= prepared.image.max() <= 1
    )
    write_volume(prepared.restore(prepared.image[0, 0]), tmp_path / "back.nii.gz")
    back, original = nib.load(tmp_path / "back.nii.gz"), nib.load(path)
    assert back.shape == original.shape and back.header.get_xyzt_units() == original.header.get_xyzt_units()
    np.testing.assert_array_equal(back.affine, original.affine)
    same = np.corrcoef(
        back.get_fdata().ravel(),
        np.clip(original.get_fdata(), -1024, 1024 if volume.data.min() < -900 else None).ravel(),
    )
    assert same[0, 1] > 0.97
