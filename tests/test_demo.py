"""Tests of the demonstration and of its pictures: complete, repeatable, nothing half written."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from gvsl_zoo import demo, report
from gvsl_zoo.demo import DemoResult, run_demo
from gvsl_zoo.errors import ArgumentError, GvslZooError, VolumeError
from gvsl_zoo.film import FilmPreprocessing, prepare_film
from gvsl_zoo.inference.features import prepare_for
from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.volume import Preprocessing, Volume, read_volume, write_volume

pytest.importorskip("matplotlib", reason="pictures need matplotlib")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demonstration at a quarter of its size."""
    for name, value in {
        "SHAPE": (24, 24, 24),
        "MATCH_SHAPE": (24, 24, 24),
        "FILM_SHAPE": (32, 32),
        "CROP": {3: 16, 2: 16},
        "DAMAGES": 2,
        "PAIRS": 1,
    }.items():
        monkeypatch.setattr(demo, name, value)


@pytest.fixture
def model() -> GVSL:
    generator = torch.Generator().manual_seed(0)
    model = GVSL(UNet(3, 8, generator=generator), affine_width=8, generator=generator).eval()
    model.preprocessing = Preprocessing((16.0, 16.0, 16.0))  # type: ignore[assignment]
    return model


def width_and_height(png: Path) -> tuple[int, int]:
    head = png.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")


def numbers(result: DemoResult) -> dict:
    return {name: value for name, value in result._asdict().items() if not isinstance(value, Path)}


def test_the_demo_leaves_a_picture_features_and_its_synthetic_scan(model: GVSL, tmp_path: Path) -> None:
    said: list[str] = []
    result = run_demo(model, tmp_path / "new" / "folder", progress=said.append)
    assert sorted(p.name for p in result.picture.parent.iterdir()) == ["demo.png", "features.nii.gz", "input.nii.gz"]
    assert width_and_height(result.picture)[0] == 1920
    scan, found = read_volume(result.input), read_volume(result.features, channels=True)  # type: ignore[arg-type]
    assert found.data.shape == (*scan.shape, 8) == (24, 24, 24, result.feature_channels)
    np.testing.assert_allclose(found.affine, scan.affine, atol=1e-4)
    assert scan.data.min() < -900 and scan.data.max() > 200
    assert len(said) == 5
    for before, after in result.organs.values():
        assert 0 <= before <= 1 and 0 <= after <= 1
    for value in (result.ncc_before, result.ncc_after, result.dice_before, result.dice_after, result.folded):
        assert 0 <= value <= 1


def test_the_demo_says_the_same_twice(model: GVSL, tmp_path: Path) -> None:
    first = run_demo(model, tmp_path)
    picture = first.picture.read_bytes()
    torch.manual_seed(99)
    assert numbers(run_demo(model, tmp_path)) == numbers(first)
    assert first.picture.read_bytes() == picture


def test_a_scan_of_ones_own_is_used_and_stays_as_it_was(model: GVSL, tmp_path: Path) -> None:
    affine = np.array([[-5.0, 0, 0, 60], [0, 0, 6.0, -40], [0, -7.0, 0, 90], [0, 0, 0, 1]])
    data = np.random.default_rng(0).integers(-1000, 800, (30, 26, 9), dtype=np.int16)
    write_volume(Volume(data, affine), tmp_path / "scan.nii.gz")
    before = (tmp_path / "scan.nii.gz").read_bytes()
    result = run_demo(model, tmp_path / "out", read_volume(tmp_path / "scan.nii.gz"))
    assert result.input is None and not (tmp_path / "out" / "input.nii.gz").exists()
    assert (tmp_path / "scan.nii.gz").read_bytes() == before
    assert read_volume(result.features, channels=True).shape == (9, 3, 11)  # x, y, z at 16 mm
    assert numbers(run_demo(model, tmp_path / "other"))["organs"] == result.organs  # pairs do not depend on the scan


@pytest.fixture
def film_model() -> GVSL:
    generator = torch.Generator().manual_seed(0)
    model = GVSL(UNet(2, 8, generator=generator), affine_width=8, generator=generator).eval()
    model.preprocessing = FilmPreprocessing()  # type: ignore[assignment]
    return model


def test_the_demo_of_a_model_of_films_draws_one_and_says_the_same_twice(film_model: GVSL, tmp_path: Path) -> None:
    result = run_demo(film_model, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.png", "features.nii.gz", "input.png"]
    assert width_and_height(result.picture)[0] == 1920 and width_and_height(result.input) == (32, 32)  # type: ignore[arg-type]
    assert read_volume(result.features, channels=True).data.shape == (32, 32, 1, 8)
    assert set(result.organs) <= {"lung_left", "lung_right", "heart", "spine"} and len(result.organs) > 1
    assert numbers(run_demo(film_model, tmp_path)) == numbers(result)


def test_a_film_of_ones_own_is_shown_at_the_models_size(film_model: GVSL, tmp_path: Path) -> None:
    film_model.preprocessing = FilmPreprocessing((16, 24))  # type: ignore[assignment]
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30, 1), dtype=np.uint8)
    result = run_demo(film_model, tmp_path / "out", Volume(pixels, np.eye(4)))
    assert result.input is None
    assert read_volume(result.features, channels=True).data.shape == (24, 16, 1, 8)


def test_files_of_no_demonstration_are_kept(model: GVSL, tmp_path: Path) -> None:
    (tmp_path / "features.nii.gz").write_text("of a week's work")
    with pytest.raises(VolumeError, match=r"has features\.nii\.gz and no demo\.png.*; choose another folder"):
        run_demo(model, tmp_path)
    assert (tmp_path / "features.nii.gz").read_text() == "of a week's work"


def test_a_volume_is_no_film(film_model: GVSL, tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="slice"):
        run_demo(film_model, tmp_path, ball())


def test_the_organs_of_a_drawn_subject_lie_where_the_model_sees_them(model: GVSL, film_model: GVSL) -> None:
    for whole, shape in ((model, (24, 24, 24)), (film_model, (1, 32, 32))):
        scan, organs = demo.subject(whole, (24, 24, 24), torch.Generator().manual_seed(1))
        image = prepare_for(scan, whole).image[0, 0]
        lungs = organs["lung_left"] | organs["lung_right"]
        assert image.shape == lungs.shape == shape
        assert image[lungs].mean() < image[organs["spine"] & ~lungs].mean()


def test_only_a_whole_module_can_be_shown(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r'UNet has no matching and restoration heads; .*task="pretraining"'):
        run_demo(UNet(3, 8), tmp_path)  # type: ignore[arg-type]


def test_a_folder_that_cannot_be_made_is_refused(model: GVSL, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(VolumeError, match=r"cannot make the folder .*choose another"):
        run_demo(model, tmp_path / "file" / "out")


# ---- pictures


def ball(shape: tuple[int, int, int] = (10, 20, 30), affine: np.ndarray | None = None) -> Volume:
    """Air with a bright block towards the patient's right, front and head."""
    data = np.full(shape, -1000, np.int16)
    data[-3:, -5:, -6:] = 700
    return Volume(data, np.diag([2.0, 3.0, 4.0, 1.0]) if affine is None else affine)


@pytest.mark.parametrize("name", report.PLANES)
def test_planes_are_seen_as_radiologists_do(model: GVSL, name: str) -> None:
    model.preprocessing = Preprocessing()  # type: ignore[assignment]
    image = prepare_for(ball(), model).image[0, 0]
    rows, columns = np.nonzero(report.plane(image, name, image.shape[report.PLANES.index(name)] - 1) > 0.5)
    left, right, top, bottom = report.LETTERS[name]
    height, width = report.plane(image, name, 0).shape
    assert "RAS".find(left) >= 0 and columns.mean() < width / 2  # the block lies at R, A, S
    assert "RAS".find(top) >= 0 and rows.mean() < height / 2
    assert {left + right, top + bottom} <= {"RL", "AP", "SI"}


def test_a_features_picture_has_true_proportions(model: GVSL, tmp_path: Path) -> None:
    model.preprocessing = Preprocessing()  # type: ignore[assignment]
    prepared = prepare_for(ball(), model)
    for row in report.scan_rows(prepared, torch.rand(3, *prepared.shape)):
        assert [panel.size_mm for panel in row.panels] == [(60.0, 20.0), (120.0, 20.0), (120.0, 60.0)]
    report.features_picture(prepared, torch.rand(3, *prepared.shape), tmp_path / "bild größe.png")
    assert width_and_height(tmp_path / "bild größe.png")[0] == 1920
    assert [p.name for p in tmp_path.iterdir()] == ["bild größe.png"]


def test_a_film_is_shown_as_it_lies_with_its_components_beside_it(tmp_path: Path) -> None:
    pixels = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4)  # rows, columns
    prepared = prepare_film(Volume(pixels.T[:, :, None], np.diag([2.0, 3.0, 1.0, 1.0])), FilmPreprocessing())
    [row] = report.scan_rows(prepared, torch.rand(3, 1, 6, 4), film=True)
    assert [panel.size_mm for panel in row.panels] == [(18.0, 8.0)] * 2 and not any(p.letters for p in row.panels)
    np.testing.assert_allclose(row.panels[0].pixels, pixels / 255, atol=1e-6)


def test_a_volume_of_one_slice_is_no_film(model: GVSL) -> None:
    model.preprocessing = Preprocessing()  # type: ignore[assignment]
    prepared = prepare_for(Volume(ball().data[..., -1:], ball().affine), model)
    scan, _ = report.scan_rows(prepared, torch.rand(3, *prepared.shape))
    assert [panel.letters for panel in scan.panels] == [*report.LETTERS.values()]
    assert scan.panels[0].pixels[0, 0] > scan.panels[0].pixels[-1, -1]  # the block is at the patient's right, in front
    image = prepared.image[0, 0]
    images = dict.fromkeys(("original", "damaged", "restored", "fixed", "moving", "warped"), image)
    restored = report.restoration_row(images, prepared.spacing_mm, "")
    matched = report.matching_row(images | {"displacement": torch.zeros(3, *image.shape)}, prepared.spacing_mm, "")
    assert (restored.panels[0].letters, matched.panels[0].letters) == ("RLAP", "RLSI")


def test_specks_of_noisy_air_are_left_out_of_the_components(model: GVSL) -> None:
    model.preprocessing = Preprocessing()  # type: ignore[assignment]
    prepared = prepare_for(ball(), model)
    body = torch.zeros(1, *prepared.shape)
    body[:, :, 10:] = 1
    specks = torch.zeros_like(body)
    z, _, x = report.middle(prepared.image[0, 0])
    specks[0, z, 2, 2] = specks[0, 2, 2, x] = 1  # in the axial and in the sagittal plane
    clean, dusty = (report.scan_rows(prepared, mask.expand(3, -1, -1, -1))[1] for mask in (body, body + specks))
    for a, b in zip(clean.panels, dusty.panels, strict=True):
        assert np.array_equal(a.pixels, b.pixels)
    assert all(panel.pixels.any() for panel in clean.panels[:1])


def test_matched_films_are_shown_whole_with_their_displacement_in_millimetres() -> None:
    image = torch.rand(1, 6, 4)
    displacement = torch.stack([torch.full((1, 6, 4), 3.0), torch.full((1, 6, 4), 4.0)])
    images = {"fixed": image, "moving": image, "warped": image, "displacement": displacement}
    panels = report.matching_row(images, (2.0, 2.0, 2.0), "").panels
    assert torch.equal(torch.from_numpy(panels[0].pixels), image[0]) and panels[-1].bar == "mm"
    np.testing.assert_allclose(panels[-1].pixels, 10.0)


def test_components_on_another_grid_are_refused(model: GVSL, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"components of shape \(3, 2, 2, 2\); expected \(3, "):
        report.features_picture(prepare_for(ball(), model), torch.rand(3, 2, 2, 2), tmp_path / "x.png")


def test_a_picture_that_cannot_be_written_leaves_nothing(model: GVSL, tmp_path: Path) -> None:
    prepared = prepare_for(ball(), model)
    target = tmp_path / "none" / "x.png"
    with pytest.raises(GvslZooError, match=f"cannot write {re.escape(repr(str(target)))}.*check the folder"):
        report.features_picture(prepared, torch.rand(3, *prepared.shape), target)
    (tmp_path / "x.png").mkdir()
    with pytest.raises(GvslZooError, match="cannot write"):
        report.features_picture(prepared, torch.rand(3, *prepared.shape), tmp_path / "x.png")
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_without_matplotlib_the_remedy_is_named(model: GVSL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gvsl_zoo.errors.find_spec", lambda name: None)
    prepared = prepare_for(ball(), model)
    with pytest.raises(GvslZooError, match=re.escape('pip install "gvsl-zoo[viz]"')):
        report.features_picture(prepared, torch.rand(3, *prepared.shape), tmp_path / "x.png")
