"""Films matched: what holds for any weights, organs brought together, the way through files, and what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from gvsl_zoo import (
    Matcher,
    Volume,
    correspond,
    features,
    load,
    model_info,
    pooled_features,
    register,
    save_pretrained,
    segment,
    write_volume,
)
from gvsl_zoo.cli import main
from gvsl_zoo.errors import ArgumentError, VolumeError
from gvsl_zoo.film import (
    FRAME_MM,
    FilmPreprocessing,
    is_film,
    lay_frames,
    on_film,
    own_plane,
    read_film,
    read_scan,
    together,
    write_film,
)
from gvsl_zoo.inference.refine import Images, exponential, fit, fit_affine
from gvsl_zoo.inference.register import lay_over
from gvsl_zoo.models.gemini import GEMINI
from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.heads import SegmentationModel
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.models.xmorpher import XMorpher
from gvsl_zoo.pretrain.anatomy import Film, sample_film, true_displacement
from gvsl_zoo.registry import Label
from gvsl_zoo.report import _moved_mm
from gvsl_zoo.spatial import affine_coordinates, identity_grid, jacobian_determinant, sample, warp
from gvsl_zoo.transfer.cases import read_cases
from gvsl_zoo.transfer.data import prepare_cases
from gvsl_zoo.transforms import Affine, Grid, read_transform, to_displacement, warp_volume, write_transform
from gvsl_zoo.volume import own_locale

XRAY = Path(__file__).parents[2] / "shared" / "data" / "xray"
SHAPE, MM = (112, 96), 3.4  # of a film, (H, W), which then shows all of a chest
KINDS = [("gvsl", "unet"), ("gemini", "unet"), ("gvsl", "xmorpher"), ("gemini", "xmorpher")]


def as_film(pixels: np.ndarray) -> Volume:
    """Pixels (H, W) of unknown size as a volume of one slice."""
    return Volume(np.ascontiguousarray(pixels.T[:, :, None]), np.eye(4))


def grey(film: Film) -> np.ndarray:
    return (255 * film.image).round().to(torch.uint8).numpy()


def build(objective: str = "gvsl", backbone: str = "unet") -> nn.Module:
    """A whole 2D module with random weights."""
    generator = torch.Generator().manual_seed(0)
    inner = UNet(2, 8, generator=generator) if backbone == "unet" else XMorpher(2, 16, generator=generator)
    if objective == "gemini":
        return GEMINI(inner, generator=generator).eval()
    return GVSL(inner, affine_width=8, generator=generator).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return with_recipe(build())


def with_recipe(module: nn.Module, **settings) -> nn.Module:
    module.preprocessing = FilmPreprocessing(**settings)
    return module


@pytest.fixture(scope="module")
def drawn() -> list[Film]:
    return [sample_film(SHAPE, torch.Generator().manual_seed(seed), (MM, MM)) for seed in (1, 2)]


@pytest.fixture(scope="module")
def pair(drawn: list[Film]) -> list[Volume]:
    return [as_film(grey(film)) for film in drawn]


@pytest.fixture(scope="module")
def registered(pair, model):
    fixed, moving = pair
    return register(moving, fixed, model, refine=60)


def mean_dice(a: np.ndarray, b: np.ndarray) -> float:
    """Of masks (K, H, W)."""
    both, size = (a & b).sum((1, 2)), a.sum((1, 2)) + b.sum((1, 2))
    return float((2 * both / size).mean())


def carried(masks: torch.Tensor, transform, fixed: Volume) -> np.ndarray:
    """Masks (K, H, W) of the moving film on the fixed one."""
    films = (as_film(mask.numpy().astype(np.uint8)) for mask in masks)
    warped = [warp_volume(film, transform, Grid.of(fixed), nearest=True).data[:, :, 0].T for film in films]
    return np.stack(warped) > 0


# --- Theorems of the fit in the plane -------------------------------------------------------------------------------


def test_the_exponential_of_a_plane_is_that_of_a_space_whose_slices_are_alike(generator):
    flat = torch.randn(1, 2, 7, 9, generator=generator)
    space = torch.cat([torch.zeros(1, 1, 7, 9), flat], 1)[:, :, None].expand(-1, -1, 5, -1, -1)
    found = exponential(space.contiguous())
    torch.testing.assert_close(found[:, 1:], exponential(flat)[:, :, None].expand(-1, -1, 5, -1, -1))
    assert found[:, 0].abs().max() == 0


def test_the_affine_of_an_affine_displacement_is_found_again(generator):
    affine = torch.eye(2, 3)[None] + 0.1 * torch.randn(1, 2, 3, generator=generator)
    displacement = affine_coordinates(affine, (9, 11)) - identity_grid((9, 11), affine)
    torch.testing.assert_close(fit_affine(displacement, torch.ones(1, 1, 9, 11)), affine, atol=1e-5, rtol=0)


def test_a_fit_undoes_a_known_displacement_without_folding():
    fixed = sample_film((64, 64), torch.Generator().manual_seed(3)).image[None, None]
    y, x = identity_grid((64, 64), fixed)
    known = torch.stack([3 * torch.sin(x / 12), 3 * torch.cos(y / 15)])[None]
    moving = warp(fixed, -known)
    ones = torch.ones_like(fixed)
    _, found = fit(Images(fixed, moving, None, (ones, ones)), 60)
    inside = (..., slice(10, -10), slice(10, -10))
    truth = sample(known, identity_grid((64, 64), known) + known)  # u = known(x + u), one step from known(x)
    assert (found - truth)[inside].norm(dim=1).mean() < 0.4 * truth[inside].norm(dim=1).mean()
    assert (jacobian_determinant(found) > 0).all()


# --- Registration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_a_film_registered_to_itself_stays(pair, kind):
    found = register(pair[0], pair[0], with_recipe(build(*kind)), refine=12)
    assert np.linalg.norm(found.displacement_mm.field_mm, axis=-1).mean() < 0.05
    assert found.report["ncc_after"] == pytest.approx(found.report["ncc_before"], abs=1e-4)
    assert found.report["folded"] == 0


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_every_kind_of_model_brings_organs_together(drawn, pair, kind):
    (fixed, moving), (a, b) = pair, drawn
    found = register(moving, fixed, with_recipe(build(*kind)), refine=40)
    dice = mean_dice(a.masks.numpy(), carried(b.masks, found.displacement_mm, fixed))
    assert dice > mean_dice(a.masks.numpy(), b.masks.numpy()) + 0.08
    assert found.report["folded"] < 0.005 and found.report["unit"] == "pixels"


def test_what_is_found_is_nearer_to_the_truth_than_nothing(drawn, registered):
    truth = true_displacement(*drawn).numpy()  # (y, x), (2, H, W)
    found = registered.displacement_mm.field_mm[:, :, 0]
    error = np.hypot(found[..., 0].T - truth[1], found[..., 1].T - truth[0])
    seen = drawn[0].masks.any(0).numpy()
    assert np.median(error[seen]) < 0.3 * np.median(np.hypot(*truth)[seen])
    assert (found[..., 2] == 0).all()


def test_a_model_of_one_size_gives_the_films_their_own_back(pair, registered):
    fixed, moving = pair
    found = register(moving, fixed, with_recipe(build(), size=(96, 96)), refine=60)
    assert found.warped.shape == fixed.shape
    apart = found.displacement_mm.field_mm - registered.displacement_mm.field_mm
    assert np.median(np.linalg.norm(apart, axis=-1)) < 2


def test_films_of_different_sizes_are_laid_frame_on_frame(drawn, pair, model):
    fixed = pair[0]
    wide = as_film(grey(drawn[0]).repeat(2, 0).repeat(2, 1))  # every pixel four times
    found = register(wide, fixed, model, refine=0)
    grid = Grid.of(fixed)
    np.testing.assert_allclose(found.displacement_mm(grid.points()), 2 * grid.points() + [0.5, 0.5, 0], atol=0.1)
    assert found.report["ncc_before"] > 0.95 and found.report["displacement_mm"] < 0.1
    np.testing.assert_allclose(found.warped.data, fixed.data, atol=12)  # means of pixels twice as far apart


@pytest.mark.parametrize("turn", [np.diag([-1.0, -1, 1]), np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])])
def test_a_film_in_a_nifti_file_is_laid_frame_on_frame_in_its_own_world(pair, model, turn):
    fixed, affine = pair[0], np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn, (20, -30, 40)
    moving = replace(fixed, affine=affine)
    found = register(moving, fixed, model, refine=0)
    points = Grid.of(fixed).points()
    np.testing.assert_allclose(found.displacement_mm(points), Grid.of(moving).points(), atol=0.1)
    assert found.report["displacement_mm"] < 0.1 and found.report["folded"] == 0
    np.testing.assert_allclose(found.jacobian.data, 1, atol=0.1)
    np.testing.assert_allclose(found.warped.data, fixed.data, atol=12)
    places = _moved_mm(found, own_plane(moving).affine @ np.linalg.inv(affine))  # the lattice of the picture
    np.testing.assert_allclose(places.reshape(-1, 3), points, atol=0.1)
    matched = correspond(points[[5050, 6060]], fixed, moving, model)
    np.testing.assert_allclose(matched.points_mm, Grid.of(moving).points()[[5050, 6060]], atol=0.5)


def test_films_that_know_their_millimetres_are_matched_in_them():
    sizes = {"fine": (200, 160), "coarse": (100, 100)}
    fine, coarse = (Volume(255 * np.random.default_rng(0).random((*s, 1)), np.eye(4)) for s in sizes.values())
    in_mm = [replace(film, affine=np.diag([mm, mm, 1, 1])) for film, mm in ((fine, 1.5), (coarse, 2.5))]
    for film, affine in zip(in_mm, together(*in_mm), strict=True):
        ends = affine(Grid.of(film).points()[[0, -1]])
        np.testing.assert_allclose(ends[1], -ends[0], atol=1e-9)  # centre on centre
        np.testing.assert_allclose(affine.matrix[:3, :3], np.eye(3))
    for film, affine in zip((fine, coarse), together(fine, coarse), strict=True):
        corners = affine(np.array([[-0.5, -0.5, 0], [n - 0.5 for n in film.shape[:2]] + [0]]))
        assert np.ptp(corners, 0).max() == pytest.approx(FRAME_MM)
    laid = lay_frames(*in_mm, FilmPreprocessing())
    assert laid.fixed.shape == (1, 160, 200) and laid.moving.shape == (1, 167, 167)  # square pixels of 1.5 mm


def test_the_shift_between_two_frames_is_found():
    film = sample_film((96, 96), torch.Generator().manual_seed(4), (4.0, 4.0), variation=0)
    pixels = grey(film)
    laid = lay_frames(as_film(pixels[:, :80]), as_film(pixels[:, 12:92]), FilmPreprocessing())
    masks = tuple(torch.ones_like(prepared.image) for prepared in laid[:2])
    start = lay_over(laid.fixed, laid.moving, masks, ndim=2)
    assert start.matrix[0, 3] == pytest.approx(-12, abs=4) and start.matrix[1, 3] == pytest.approx(0, abs=4)


def test_what_a_mask_leaves_out_does_not_count(pair, model):
    fixed, moving = pair
    mask = as_film(np.vstack([np.ones((70, 96)), np.zeros((42, 96))]).astype(np.uint8))
    spoiled = fixed.data.copy()
    spoiled[:, 90:] = 255
    a, b = (
        register(moving, scan, model, fixed_mask=mask, refine=0).report["ncc_start"]
        for scan in (fixed, replace(fixed, data=spoiled))
    )
    assert a == pytest.approx(b, abs=0.01)


def test_a_backbone_alone_registers_films_by_its_features(pair, model):
    fixed, moving = pair
    found = register(moving, fixed, with_recipe(UNet(2, 8, generator=torch.Generator().manual_seed(0)).eval()))
    assert found.report["ncc_after"] > found.report["ncc_start"] + 0.1


# --- Files ---------------------------------------------------------------------------------------------------------


def write_png(path: Path, pixels: np.ndarray) -> Path:
    pytest.importorskip("PIL.Image", reason="needs gvsl-zoo[io]").fromarray(pixels).save(path)
    return path


def write_dicom(path: Path, pixels: np.ndarray, spacing_mm: tuple[float, float] = (1.0, 1.0)) -> Path:
    """A DICOM picture whose pixels are so wide along x and y."""
    sitk = pytest.importorskip("SimpleITK", reason="needs gvsl-zoo[io]")
    image = sitk.GetImageFromArray(pixels)
    image.SetSpacing(spacing_mm)
    with own_locale():
        sitk.WriteImage(image, str(path))
    return path


def test_a_written_transform_sends_points_where_it_did_and_inverts(registered, pair, tmp_path):
    write_transform(registered.displacement_mm, tmp_path / "transform.nii.gz")
    again = read_transform(tmp_path / "transform.nii.gz")
    assert np.array_equal(again.field_mm, registered.displacement_mm.field_mm)
    points = np.array([[30.3, 40.7, 0], [60, 80.5, 0]])
    np.testing.assert_allclose(again.inverse()(again(points)), points, atol=0.02)


@pytest.mark.parametrize("name", ["transform.nii.gz", "transform.h5"])
def test_simpleitk_warps_films_as_we_do(registered, pair, tmp_path, name):
    sitk = pytest.importorskip("SimpleITK", reason="the judge is SimpleITK")
    path = tmp_path / name
    write_transform(registered.displacement_mm, path)
    if path.suffix == ".h5":
        transform = sitk.ReadTransform(str(path))
    else:  # SimpleITK drops the axis of one voxel
        field = sitk.JoinSeries(sitk.ReadImage(str(path), sitk.sitkVectorFloat64))
        transform = sitk.DisplacementFieldTransform(field)

    def read(film: Volume, name: str):
        path = write_png(tmp_path / name, film.data[:, :, 0].T)
        image = sitk.JoinSeries(sitk.ReadImage(str(path), sitk.sitkFloat32))
        image.SetDirection([-1, 0, 0, 0, -1, 0, 0, 0, 1])
        return image

    fixed, moving = (read(film, name) for film, name in zip(pair, ("a.png", "b.png"), strict=True))
    theirs = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, transform, sitk.sitkLinear, float(pair[1].data.min())))
    difference = np.abs(theirs[0] - registered.warped.data[:, :, 0].T)[4:-4, 4:-4]
    assert np.percentile(difference, 99) < 0.5  # grey values of 255


@pytest.mark.parametrize(("kind", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_a_film_is_written_with_the_bits_of_another(kind, top, tmp_path):
    pytest.importorskip("PIL", reason="needs gvsl-zoo[io]")
    values = np.linspace(0, top, 12).reshape(4, 3, 1)
    write_film(Volume(values, np.eye(4)), tmp_path / "a.png", like=np.dtype(kind))
    again = read_film(tmp_path / "a.png")
    assert again.data.dtype == kind and np.array_equal(again.data, values.round())
    with pytest.raises(VolumeError, match="it is the input itself"):
        write_film(again, tmp_path / "a.png", like=again.data.dtype, overwrite=True)
    with pytest.raises(VolumeError, match="exists already"):
        write_film(replace(again, path=None), tmp_path / "a.png", like=again.data.dtype)
    with pytest.raises(VolumeError, match=r"a PNG has no place for float64 pixels; end the output in \.nii\.gz"):
        write_film(again, tmp_path / "b.png", like=np.dtype(float))
    with pytest.raises(
        VolumeError, match=r"values from -1 to .* have no place in a PNG.*; end the output in \.nii\.gz"
    ):
        write_film(Volume(values - 1, np.eye(4)), tmp_path / "b.png", like=np.dtype(kind))


def test_a_dicom_film_lies_in_the_millimetres_of_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 56)).astype(np.uint16)
    path = write_dicom(tmp_path / "a.dcm", pixels, (0.5, 0.25))
    assert is_film(path)
    film = read_scan(path)
    np.testing.assert_array_equal(film.affine, np.diag([0.5, 0.25, 1, 1]))
    assert np.array_equal(film.data[:, :, 0].T, pixels)
    np.testing.assert_array_equal(read_scan(write_dicom(tmp_path / "b.dcm", pixels)).affine, np.eye(4))


def test_features_masks_and_labels_of_a_dicom_film_lie_in_its_millimetres(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4096, (40, 56)).astype(np.uint16)
    path, affine = write_dicom(tmp_path / "a.dcm", pixels, (0.5, 0.25)), np.diag([0.5, 0.25, 1, 1])
    net = with_recipe(UNet(2, 8, generator=torch.Generator().manual_seed(0)).eval())
    np.testing.assert_array_equal(features(path, net).affine, affine)
    whole = pooled_features(path, net, mask=as_film(np.ones((40, 56), np.uint8)))
    own = replace(read_scan(path), data=np.ones((56, 40, 1), np.uint8))
    np.testing.assert_array_equal(whole.local, pooled_features(path, net, mask=own).local)
    found = segment(path, with_recipe(SegmentationModel(net, 2)), labels=[Label("background", 0), Label("lung", 1)])
    np.testing.assert_array_equal(found.affine, affine)


# --- Correspondence ------------------------------------------------------------------------------------------------


def test_labels_of_a_dicom_film_count_by_its_pixels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 4000, (40, 30)).astype(np.uint16)
    labels = (pixels > 2000).astype(np.uint8)
    write_dicom(tmp_path / "a.dcm", pixels, (0.5, 0.25))
    write_png(tmp_path / "picture.png", labels)
    write_volume(Volume(labels.T[:, :, None], np.diag([0.5, 0.25, 1, 1])), tmp_path / "map.nii.gz")
    given = load("gvsl-unet-xray-nano").entry.input
    targets = []
    for name in ("picture.png", "map.nii.gz"):
        (tmp_path / "data.csv").write_text(f"image,label\na.dcm,{name}\n")
        cases = read_cases(tmp_path / "data.csv", labels={"bright": 1})
        assert [case.name for case in cases] == ["a"]  # as the label map of segment is called
        [example] = prepare_cases(cases.cases, cases.labels, given, tmp_path)
        targets.append(example.target)
    assert torch.equal(*targets) and targets[0].shape == example.image.shape[1:]


def test_points_of_a_film_are_found_in_its_copy_of_another_size(drawn, pair, model):
    points = np.array([[30, 40, 0], [60.5, 70.25, 0], [48, 30, 0]])
    wide = as_film(grey(drawn[0]).repeat(2, 0).repeat(2, 1))
    found = correspond(points, pair[0], wide, model, heat=True)
    np.testing.assert_allclose(found.points_mm, 2 * points + [0.5, 0.5, 0], atol=2)
    assert (found.confidence > 0.8).all() and (found.points_mm[:, 2] == 0).all()
    assert found.heat[0].shape == wide.shape and np.array_equal(found.heat[0].affine, wide.affine)
    x, y, _ = np.unravel_index(found.heat[0].data.argmax(), wide.shape)
    assert np.hypot(x - 60.5, y - 80.5) < 6


def test_a_registration_guides_the_matches(drawn, pair, model, registered):
    matcher = Matcher(*pair, model, start=registered.displacement_mm)
    rows, columns = np.nonzero(drawn[0].masks.any(0).numpy())
    points = np.stack([columns, rows, 0 * rows], -1)[::97].astype(float)
    found = matcher.match(points)
    truth = true_displacement(*drawn).numpy()[:, points[:, 1].astype(int), points[:, 0].astype(int)]
    error = np.hypot(*(found.points_mm - points)[:, :2].T - truth[::-1])
    assert np.nanmedian(error) < 4
    back = matcher.match(found.points_mm[np.isfinite(found.points_mm).all(1)], back=True)
    assert np.nanmedian(np.abs(back.points_mm - points[np.isfinite(found.points_mm).all(1)])) < 2


def test_a_point_beside_the_film_is_told_in_its_own_coordinates(pair, model):
    with pytest.raises(ArgumentError, match=r"no point lies in the scan; it spans 0 to 95, 0 to 111, 0 to 0 mm"):
        correspond(np.array([[900.0, 0, 0]]), *pair, model)


# --- Bad input -----------------------------------------------------------------------------------------------------


def test_films_and_volumes_do_not_mix(pair, model, tmp_path):
    path = write_png(tmp_path / "a.png", pair[0].data[:, :, 0].T)
    volume = Volume(np.zeros((8, 9, 7)), np.eye(4))
    ct = load("gvsl-unet-ct-nano")
    for call in (
        lambda: register(path, path, ct),
        lambda: Matcher(path, path, ct),
        lambda: features(path, ct),
        lambda: ct.preprocess(path),
    ):
        with pytest.raises(ArgumentError, match=r"a\.png' is a film, the model one of volumes; choose a 2D model"):
            call()
    for call in (
        lambda: register(volume, path, model),
        lambda: register(path, volume, model),
        lambda: Matcher(volume, path, model),
    ):
        with pytest.raises(VolumeError, match="a volume of 7 slices for a model of films"):
            call()


def test_a_mask_of_another_size_is_refused(pair, model):
    with pytest.raises(VolumeError, match=r"of \(5, 4\) pixels for a film of \(96, 112\) .*a value for every pixel"):
        register(pair[1], pair[0], model, fixed_mask=as_film(np.ones((4, 5), np.uint8)))
    with pytest.raises(VolumeError, match="no voxel above 0"):
        register(pair[1], pair[0], model, moving_mask=as_film(np.zeros(SHAPE, np.uint8)))


def test_labels_take_the_place_of_their_film():
    film = Volume(np.zeros((5, 4, 1)), np.diag([0.2, 0.3, 1, 1]))
    assert np.array_equal(on_film(as_film(np.ones((4, 5))), film).affine, film.affine)


# --- The commands --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(drawn, tmp_path, monkeypatch):
    """Two films of 8 and 16 bits with labels, points, and a model in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    write_png(Path("fixed.png"), grey(drawn[0]))
    write_png(Path("moving.png"), grey(drawn[1]).astype(np.uint16) * 257)
    for film, name in zip(drawn, ("fixed", "moving"), strict=True):
        write_png(Path(f"{name}_labels.png"), film.masks[0].numpy().astype(np.uint8) * 7)
    Path("points.csv").write_text("name,x,y\nhilum,40,50\n")
    entry = replace(model_info("gemini-unet-xray"), config={"ndim": 2, "width": 8}, status="available", sources=())
    entry = replace(entry, input=replace(entry.input, size=None), heads=("deformer", "restoration"))
    save_pretrained(build("gemini"), "model", entry=entry)
    return tmp_path


def run(line: str):
    return CliRunner().invoke(main, line.split())


def done(line: str) -> dict:
    result = run(line + " --json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


REGISTER = "register --fixed fixed.png --moving moving.png --model ./model --device cpu"


def test_the_commands_register_warp_and_bring_the_bits_of_the_moving_film(drawn, folder):
    facts = done(
        f"{REGISTER} --refine 30 -o warped.png --transform-out t.nii.gz --affine-out a.tfm --save-inverse i.nii.gz "
        "--jacobian-out j.nii.gz --picture picture.png --moving-labels moving_labels.png --labels-out labels.png"
    )
    assert facts["ncc_after"] > facts["ncc_before"] and facts["unit"] == "pixels" and len(facts["outputs"]) == 7
    assert (folder / "picture.png").stat().st_size > 10_000
    warped, labels = read_film("warped.png"), read_film("labels.png")
    assert warped.data.dtype == np.uint16 and labels.data.dtype == np.uint8 and warped.shape == (96, 112, 1)
    truth, before = (read_film(f"{name}_labels.png").data > 0 for name in ("fixed", "moving"))
    assert mean_dice(truth.T, (labels.data > 0).T) > mean_dice(truth.T, before.T) + 0.05

    done("warp -i moving.png --fixed fixed.png --transform t.nii.gz -o again.png")
    done("warp -i moving_labels.png --labels --fixed fixed.png --transform t.nii.gz -o labels-again.png")
    assert np.array_equal(read_film("again.png").data, warped.data)  # bit for bit
    assert np.array_equal(read_film("labels-again.png").data, labels.data)
    done("warp -i fixed.png --fixed moving.png --transform i.nii.gz -o back.png")
    assert read_film("back.png").data.dtype == np.uint8
    done("warp --points points.csv --fixed fixed.png --transform t.nii.gz -o moved.csv")
    done("warp --points points.csv --transform t.nii.gz -o unseen.csv")  # the displacement is known to be of a film
    assert Path("unseen.csv").read_text() == Path("moved.csv").read_text()
    [row] = csv.DictReader(Path("moved.csv").read_text().splitlines())
    sent = read_transform("t.nii.gz")(np.array([[40.0, 50, 0]]))[0]
    assert list(row) == ["name", "x", "y"] and [float(row[a]) for a in "xy"] == pytest.approx(sent[:2], abs=1e-3)


def test_the_command_finds_points_of_a_film(folder):
    found = done(
        "correspond --fixed fixed.png --moving moving.png --model ./model --points points.csv -o m.csv --heat h"
    )
    assert found[0]["match_mm"][2] == 0 and 0 <= found[0]["confidence"] <= 1
    assert Path("m.csv").read_text().startswith("name,x,y,confidence\nhilum,") and Path("h/point-1.nii.gz").is_file()
    [match] = done("correspond --fixed fixed.png --moving fixed.png --model ./model --point 40,50")
    assert match["match_mm"] == pytest.approx([40, 50, 0], abs=0.5)


def test_every_point_of_the_film_gets_its_heat_map_with_a_match_or_without(folder):
    far = np.eye(4)
    far[:3, 3] = 1000
    write_transform(Affine(far), "far.tfm")
    Path("points.csv").write_text("x,y\n40,50\n900,0\n")
    call = "correspond --fixed fixed.png --moving moving.png --model ./model --points points.csv"
    assert [one["match_mm"] for one in done(f"{call} --transform far.tfm --heat h")] == [None, None]
    assert [path.name for path in Path("h").iterdir()] == ["point-1.nii.gz"]


def test_a_png_that_is_warped_onto_a_film_of_known_size_is_warned_about(drawn, folder):
    write_dicom(Path("fixed.dcm"), grey(drawn[0]).astype(np.uint16), (MM, MM))
    write_transform(Affine(np.eye(4)), "t.tfm")
    told = "the pixels of a PNG count as 1 mm"
    for fixed, warned in (("fixed.dcm", True), ("fixed.png", False)):
        result = run(f"warp -i moving_labels.png --labels --fixed {fixed} --transform t.tfm -o l.png --overwrite")
        assert result.exit_code == 0, result.output
        assert (told in result.stderr) is ("--moving-labels --labels-out" in result.stderr) is warned


@pytest.mark.parametrize("affine", [np.diag([0.7, 0.7, 1, 1]), np.diag([-1.0, 1, 1, 1])], ids=["fine", "mirrored"])
def test_labels_of_a_film_in_a_nifti_file_lie_on_its_pixels(drawn, folder, affine):
    write_volume(Volume(read_film("moving.png").data, affine), "moving.nii.gz")
    call = f"{REGISTER} --refine 0 --moving-labels moving_labels.png --labels-out".replace(
        "moving.png", "moving.nii.gz"
    )
    done(f"{call} labels.nii.gz")
    done(f"{REGISTER} --refine 0 --moving-labels moving_labels.png --labels-out plain.png")
    labels = read_scan("labels.nii.gz").data
    assert labels.any() and mean_dice(labels.T > 0, read_film("plain.png").data.T > 0) > 0.98


def test_a_dicom_pair_is_registered_in_millimetres(drawn, folder):
    for film, name in zip(drawn, ("fixed", "moving"), strict=True):
        write_dicom(Path(f"{name}.dcm"), grey(film).astype(np.uint16), (MM, MM))
    call = REGISTER.replace("png", "dcm") + " --moving-labels moving_labels.png --labels-out labels.png -o warped.png"
    facts = done(call + " --refine 10 --transform-out t.nii.gz")
    assert facts["unit"] == "mm"
    grid = read_transform("t.nii.gz").grid
    assert grid.shape == (96, 112, 1) and grid.spacing_mm == pytest.approx((MM, MM, 1))
    done("warp -i moving.dcm --fixed fixed.dcm --transform t.nii.gz -o again.png")
    assert Path("again.png").read_bytes() == Path("warped.png").read_bytes()


@pytest.mark.parametrize(
    ("line", "code", "cause"),
    [
        (REGISTER.replace(" --model ./model", ""), 2, "choose a 2D model"),
        (REGISTER + " -o warped.jpg", 2, "has no ending for this; end it in .nii or .nii.gz or .png"),
        (REGISTER + " -o moving.png --overwrite", 1, "it is the input itself"),
        (REGISTER + " --transform-out t.png", 2, "has no ending for this"),
        (REGISTER.replace("moving.png", "volume.nii.gz"), 1, "a volume of 3 slices for a model of films"),
        (REGISTER.replace("moving.png", "nowhere.png"), 1, "nowhere.png"),
        (REGISTER + " --moving-labels volume.nii.gz --labels-out l.png", 1, "for a film of"),
        ("warp -i volume.nii.gz --fixed volume.nii.gz --transform t.nii.gz -o w.png", 2, "has no ending for this"),
        ("correspond --fixed fixed.png --moving moving.png --model ./model --point 1,2,3", 2, "write each as x,y in"),
        ("correspond --fixed fixed.png --moving moving.png --point 40,50", 2, "choose a 2D model"),
        ("view fixed.png moving.png --model ./model", 2, "the page shows volumes, not the film 'fixed.png'; look at"),
    ],
)  # fmt: skip
def test_a_call_that_cannot_be_is_refused_with_its_remedy(folder, line, code, cause):
    write_volume(Volume(np.zeros((6, 5, 3), np.int16), np.eye(4)), "volume.nii.gz")
    result = run(line)
    assert result.exit_code == code and cause in result.output, result.output
    assert "unexpected" not in result.output


# --- Real films ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not XRAY.is_dir(), reason="needs the shared films")
def test_real_chest_films_agree_more_after_registration(model):
    paths = sorted(XRAY.glob("no_findings*.png"))[:3]
    for moving in paths[1:]:
        found = register(moving, paths[0], model, refine=60)
        assert found.report["ncc_after"] > found.report["ncc_before"] + 0.03
        assert found.report["folded"] < 0.005
        warped = to_displacement(found.displacement_mm, Grid.of(read_film(paths[0])))
        np.testing.assert_allclose(warped.field_mm, found.displacement_mm.field_mm, rtol=0, atol=1e-4)
