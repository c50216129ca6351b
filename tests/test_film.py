"""Films: PNG and DICOM pictures in, and what a 2D model makes of them: features, labels, one vector."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gvsl_zoo import Volume, features, load, pooled_features, save_pretrained, segment
from gvsl_zoo.cli import main
from gvsl_zoo.errors import VolumeError
from gvsl_zoo.film import FilmPreprocessing, prepare_film, read_film, read_pixels
from gvsl_zoo.models.heads import SegmentationModel
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.registry import Label, model_info
from gvsl_zoo.volume import InputWarning, own_locale


@pytest.fixture
def pixels():
    """A grey picture, (H, W) = (40, 56), of 8 bits."""
    return np.random.default_rng(0).integers(0, 256, (40, 56)).astype(np.uint8)


def write_png(path, pixels):
    pytest.importorskip("PIL.Image", reason="needs gvsl-zoo[io]").fromarray(pixels).save(path)
    return path


def write_dicom(path, pixels, photometric=b"MONOCHROME2"):
    """A DICOM file of a grey (H, W) or colour (H, W, 3) picture."""
    sitk = pytest.importorskip("SimpleITK", reason="needs gvsl-zoo[io]")
    with own_locale():
        sitk.WriteImage(sitk.GetImageFromArray(pixels, isVector=pixels.ndim == 3), str(path))
    path.write_bytes(path.read_bytes().replace(b"MONOCHROME2", photometric))  # which the writer always says
    return path


def film_model():
    """A small 2D model with random weights, and an entry with the intensities of the released one."""
    entry = replace(model_info("gemini-unet-xray"), config={"ndim": 2, "width": 8}, status="available", sources=())
    entry = replace(entry, input=replace(entry.input, size=None))
    return entry, UNet(2, 8, generator=torch.Generator().manual_seed(0)).eval()


@pytest.fixture
def model(tmp_path):
    entry, unet = film_model()
    save_pretrained(unet, tmp_path / "model", entry=entry)
    return load(tmp_path / "model")


# --- In -----------------------------------------------------------------------------------------------------------


def test_a_png_and_a_dicom_film_are_the_same_volume_of_one_slice(pixels, tmp_path):
    png, dicom = write_png(tmp_path / "a.png", pixels), write_dicom(tmp_path / "a.dcm", pixels)
    for film in (read_film(png), read_film(dicom)):
        assert film.shape == (56, 40, 1)
        assert np.array_equal(film.data[:, :, 0].T, pixels)


def test_a_film_whose_lowest_value_is_white_is_turned(pixels, tmp_path):
    turned = read_pixels(write_dicom(tmp_path / "a.dcm", pixels, b"MONOCHROME1"), "grey")
    assert np.array_equal(turned, 255 - pixels)


def test_a_signed_film_whose_lowest_value_is_white_is_turned_and_keeps_its_values(pixels, tmp_path):
    path = write_dicom(tmp_path / "a.dcm", pixels.astype(np.int16) - 7, b"MONOCHROME1")
    assert np.array_equal(read_pixels(path), pixels.max() - pixels.astype(int))
    image = prepare_film(read_film(path), FilmPreprocessing()).image
    assert image.min() == 0 and image.max() > 0.9


AFFINES = {
    "LPS": np.diag([-0.5, -0.7, 1, 1.0]),  # as SimpleITK writes a PNG
    "j is -z": np.array([[0.5, 0, 0, 3], [0, 0, 1, 4], [0, -0.7, 0, 5], [0, 0, 0, 1]]),
    "j is x": np.array([[0, 0.7, 0, 0], [-0.5, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
}


@pytest.mark.parametrize("name", AFFINES)
def test_a_film_lies_as_its_file_stores_it_whatever_its_affine(name, model, pixels, tmp_path):
    affine = AFFINES[name]
    nib.save(nib.Nifti1Image(pixels.T[:, :, None], affine), tmp_path / "a.nii.gz")
    film, png = read_film(tmp_path / "a.nii.gz"), write_png(tmp_path / "a.png", pixels)
    np.testing.assert_allclose(film.affine, affine, atol=1e-6)
    recipe = FilmPreprocessing(size=(20, 28))
    assert torch.equal(prepare_film(film, recipe).image, prepare_film(read_film(png), recipe).image)
    mask = Volume((film.data > 99).astype(np.uint8), np.eye(4))
    found, wanted = features(film, model), features(png, model)
    np.testing.assert_array_equal(found.data, wanted.data)  # voxel on voxel, in the world of the file
    np.testing.assert_array_equal(found.affine, film.affine)
    own = features(film, model, grid="model")
    index = np.array([3, 5, 0, 1])
    np.testing.assert_array_equal(own.data[3, 5], found.data[3, 5])
    np.testing.assert_allclose(own.affine @ index, film.affine @ index, atol=1e-6)
    of_mask = [pooled_features(scan, model, mask=mask).local for scan in (film, png)]
    np.testing.assert_allclose(*of_mask, atol=1e-6)


@pytest.mark.parametrize(
    ("recipe", "low", "high"),
    [(FilmPreprocessing(), 0, 255), (FilmPreprocessing(window=(None, None)), 30, 200)],
    ids=["8 bits", "extremes"],
)
def test_intensities_are_mapped_from_the_window(recipe, low, high, pixels):
    clipped = pixels.clip(30, 200)
    image = prepare_film(Volume(clipped.T[:, :, None], np.eye(4)), recipe).image
    np.testing.assert_allclose(image[0, 0, 0], (clipped - low) / (high - low), atol=1e-6)


def test_a_film_of_more_bits_than_the_window_is_mapped_from_its_extremes(pixels):
    wide = pixels.astype(np.uint16) * 100
    image = prepare_film(Volume(wide.T[:, :, None], np.eye(4)), FilmPreprocessing()).image
    assert image.min() == 0 and image.max() == 1


def test_a_film_that_is_scaled_already_is_warned_about(pixels):
    scaled = Volume((pixels / 255).T[:, :, None], np.eye(4))
    with pytest.warns(
        InputWarning, match="expected values up to 255, but values span 0 to 1: already scaled"
    ) as caught:
        prepared = prepare_film(scaled, FilmPreprocessing())
    assert prepared.warnings == (str(caught[0].message),)
    for film, recipe in (
        (scaled, FilmPreprocessing(window=(0, 1))),
        (replace(scaled, data=pixels.T[:, :, None]), None),
    ):
        assert prepare_film(film, recipe or FilmPreprocessing()).warnings == ()


@pytest.mark.parametrize("size", [(20, 28), (80, 56), (33, 17)], ids=str)
def test_a_film_gets_the_size_of_the_model_whatever_its_own(size, pixels):
    prepared = prepare_film(Volume(pixels.T[:, :, None], np.eye(4)), FilmPreprocessing(size=size))
    assert prepared.image.shape == (1, 1, 1, *size)
    back = prepared.restore(prepared.image[0, 0])
    assert back.shape == (56, 40, 1)
    assert back.data.mean() == pytest.approx(pixels.mean() / 255, abs=0.01)


def test_what_is_no_film_is_refused(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "bad.dcm").write_bytes(b"nothing")
    grey = write_png(tmp_path / "grey.png", np.full((4, 4), 7, np.uint8)).read_bytes()
    start, data = struct.pack(">IIBBBBB", 4, 4, 16, 4, 0, 0, 0), zlib.compress((b"\0" + b"\0\7\xff\xff" * 4) * 4)
    chunks = [(b"IHDR", start), (b"IDAT", data), (b"IEND", b"")]
    parts = [struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks]
    (tmp_path / "alpha.png").write_bytes(grey[:8] + b"".join(parts))
    with pytest.raises(VolumeError, match=r"16 bits in colour or with transparency, .*; save it as grey alone"):
        read_film(tmp_path / "alpha.png")
    for name in ("bad.png", "bad.dcm", "missing.png"):
        with pytest.raises(VolumeError, match=rf"{name}.*; give a grey PNG or DICOM file"):
            read_film(tmp_path / name)
    with pytest.raises(VolumeError, match="a volume of 3 slices for a model of films"):
        prepare_film(Volume(np.zeros((4, 5, 3)), np.eye(4)), FilmPreprocessing())


# --- What a model makes of it --------------------------------------------------------------------------------------


def test_preprocess_gives_the_tensor_that_the_model_takes(model, pixels, tmp_path):
    x = model.preprocess(write_png(tmp_path / "a.png", pixels))
    assert x.shape == (1, 1, 40, 56)
    np.testing.assert_allclose(x[0, 0], pixels / 255, atol=1e-6)
    assert model(x).shape == (1, 8, 40, 56)


def test_features_of_a_film_are_those_of_its_tensor(model, pixels, tmp_path):
    path = write_png(tmp_path / "a.png", pixels)
    found = features(path, model)
    with torch.no_grad():
        expected = model(model.preprocess(path))[0]
    assert found.data.shape == (56, 40, 1, 8)
    np.testing.assert_allclose(found.data[:, :, 0].transpose(2, 1, 0), expected, atol=1e-5)


def test_pooled_features_of_a_film_are_the_means_of_its_maps(model, pixels, tmp_path):
    path = write_png(tmp_path / "a.png", pixels[:32, :48].clip(20))  # no air, a multiple of the stride
    found = pooled_features(path, model)
    with torch.no_grad():
        bottleneck, local = model.forward_features(model.preprocess(path))
    np.testing.assert_allclose(found.bottleneck, bottleneck[0].flatten(1).mean(1), atol=1e-5)
    np.testing.assert_allclose(found.local, local[0].flatten(1).mean(1), atol=1e-5)


@pytest.mark.parametrize("mirror", [False, True])
def test_a_film_is_segmented_as_its_tensor(pixels, tmp_path, mirror):
    entry, unet = film_model()
    net = SegmentationModel(unet, 3, generator=torch.Generator().manual_seed(1)).eval()
    labels = tuple(Label(f"part {value}", value) for value in (0, 4, 7))
    window = replace(entry.input, window=(64, 64))
    save_pretrained(net, tmp_path / "net", entry=replace(entry, heads=("segmentation",), labels=labels, input=window))
    model, path = load(tmp_path / "net", task="segmentation"), write_png(tmp_path / "a.png", pixels)
    found = segment(path, model, mirror=mirror)
    x = model.preprocess(path)
    with torch.no_grad():
        turns = [(), (2,), (3,), (2, 3)] if mirror else [()]
        logits = sum(model(x.flip(turn)).flip(turn) for turn in turns)
    values = np.array([0, 4, 7])[logits[0].argmax(0)]
    assert found.data.shape == (56, 40, 1)
    assert (values == found.data[:, :, 0].T).mean() > 0.999


def test_the_command_writes_features_of_a_film(model, pixels, tmp_path):
    path = write_png(tmp_path / "a.png", pixels)
    call = ["features", "-i", path, "-o", tmp_path / "out.nii.gz", "--model", tmp_path / "model", "--device", "cpu"]
    result = CliRunner().invoke(main, list(map(str, call)))
    assert result.exit_code == 0, result.output
    assert nib.load(tmp_path / "out.nii.gz").shape == (56, 40, 1, 8)


def test_a_pixel_that_is_no_number_does_not_change_the_window():
    data = np.full((24, 20, 1), 200.0, np.float32)
    data[:, :4] = 0
    plain = prepare_film(Volume(data, np.eye(4)), FilmPreprocessing())
    data = data.copy()
    data[0, 0] = np.nan
    with pytest.warns(InputWarning, match=r"(?i)nan|finite"):
        found = prepare_film(Volume(data, np.eye(4)), FilmPreprocessing())
    assert found.image.max() == plain.image.max() == pytest.approx(200 / 255, abs=1e-3)
