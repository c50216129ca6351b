"""Tests of correspondence: copies give the place where the point went; confidence and heat map are what they say."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

from gvsl_zoo import load
from gvsl_zoo.cli import main
from gvsl_zoo.demo import as_volume
from gvsl_zoo.errors import ArgumentError, VolumeError
from gvsl_zoo.inference import correspond as room
from gvsl_zoo.inference.correspond import Correspondence, Matcher, correspond
from gvsl_zoo.pretrain.anatomy import Subject, sample_subject, true_displacement
from gvsl_zoo.transforms import Affine, Grid, write_transform
from gvsl_zoo.volume import InputWarning, Preprocessing, Volume, read_volume, write_volume

SHAPE, SPACING_MM = (34, 30, 34), 6.0  # z, y, x
VOXEL_MM = 4.0  # of the embedded model's grid
SHIFT_MM = np.array([31.0, -12.5, 47.0])
CARINA = np.array([2.0, -10.0, 30.0])
OUTSIDE = [900.0, 0.0, 0.0]


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return load("gvsl-unet-ct-nano")


@pytest.fixture(scope="module")
def subjects() -> list[Subject]:
    generator = torch.Generator().manual_seed(101)
    return [sample_subject(SHAPE, generator, (SPACING_MM,) * 3) for _ in range(2)]


@pytest.fixture(scope="module")
def scan(subjects: list[Subject]) -> Volume:
    return as_volume(subjects[0])


@pytest.fixture(scope="module")
def points(subjects: list[Subject], scan: Volume) -> np.ndarray:
    return drawn(subjects[0], scan, 60)


@pytest.fixture(scope="module")
def itself(scan: Volume, net: nn.Module) -> Matcher:
    return Matcher(scan, scan, net)


@pytest.fixture(scope="module")
def turned(scan: Volume) -> Volume:
    """The same voxels, their axes permuted and flipped, shifted in the world."""
    data = scan.data.transpose(2, 0, 1)[:, ::-1]
    affine = scan.affine[:, [2, 0, 1, 3]] @ np.array(
        [[1, 0, 0, 0], [0, -1, 0, data.shape[1] - 1], [0, 0, 1, 0], [0, 0, 0, 1]]
    )
    affine[:3, 3] += SHIFT_MM
    return Volume(np.ascontiguousarray(data), affine)


@pytest.fixture(scope="module")
def to_turned(scan: Volume, turned: Volume, net: nn.Module) -> Matcher:
    return Matcher(scan, turned, net)


def drawn(subject: Subject, volume: Volume, count: int) -> np.ndarray:
    """Points in the body, off the voxels' middles, two voxels or more inside the scan: (N, 3) mm."""
    generator = torch.Generator().manual_seed(5)
    inside = torch.zeros_like(subject.labels, dtype=torch.bool)
    inside[2:-2, 2:-2, 2:-2] = subject.labels[2:-2, 2:-2, 2:-2] > 0
    voxels = inside.nonzero()
    index = voxels[torch.randperm(len(voxels), generator=generator)[:count]] + torch.rand(count, 3, generator=generator)
    return index.flip(1).double().numpy() @ volume.affine[:3, :3].T + volume.affine[:3, 3]


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a - b, axis=1)


def hit(found: Correspondence, truth: np.ndarray, half_within: float = 0.1, most_within: float = 0.5) -> bool:
    """Whether a copy is matched, in voxels: half of the points, and all but a few that lie in even tissue."""
    error = distance(found.points_mm, truth) / VOXEL_MM
    near = np.median(error) < half_within and np.quantile(error, 0.95) < most_within
    return bool(near and np.median(found.confidence) > 0.9)


# ---- what must hold whatever the weights


def test_a_scan_matched_to_itself_gives_every_point_back(itself: Matcher, points: np.ndarray) -> None:
    found = itself.match(points)
    assert hit(found, points)
    assert found.similarity.max() < 1 + 1e-4


def test_rounding_makes_no_confidence_above_1(
    itself: Matcher, points: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    similarity = room._similarity
    monkeypatch.setattr(room, "_similarity", lambda *given: similarity(*given) + 1e-3)
    assert 0.99 < itself.match(points).confidence.max() <= 1


def test_a_copy_turned_flipped_and_shifted_gives_the_moved_points(to_turned: Matcher, points: np.ndarray) -> None:
    found = to_turned.match(points)
    assert hit(found, points + SHIFT_MM)


def test_the_way_back_leads_from_the_copy_to_the_scan(to_turned: Matcher, points: np.ndarray) -> None:
    assert hit(to_turned.match(points + SHIFT_MM, back=True), points)


def test_a_copy_on_another_grid_gives_the_same_points(scan: Volume, points: np.ndarray, net: nn.Module) -> None:
    from gvsl_zoo.transforms import warp_volume

    affine = np.diag([5.1, 7.5, 4.25, 1.0])  # the field of view stays
    affine[:3, 3] = scan.affine[:3, 3] - SPACING_MM / 2 + affine.diagonal()[:3] / 2
    copy = warp_volume(scan, Affine(np.eye(4)), Grid((40, 24, 48), affine))
    assert hit(correspond(points, scan, copy, net), points, 0.75, 1.5)


def test_what_the_other_scan_does_not_show_has_no_match(scan: Volume, net: nn.Module) -> None:
    half = Volume(scan.data[:, :, :20], scan.affine)  # from the feet to the middle
    middle = np.array([-30.0, 0.0, 0.0])
    low, high = middle - np.array([0, 0, 70]), middle + np.array([0, 0, 80])  # the half ends at 0 mm
    found = correspond(np.stack([low, high]), scan, half, net)
    assert np.linalg.norm(found.points_mm[0] - low) < 2 * VOXEL_MM
    assert np.isnan(found.points_mm[1]).all() and found.confidence[1] == 0


@pytest.mark.slow
def test_a_scan_of_several_windows_is_matched_as_in_one(
    scan: Volume, points: np.ndarray, net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(room.WINDOW, 3, 6)
    seen = []
    matcher = Matcher(scan, scan, net, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 4 and seen == [(n, seen[0][1]) for n in range(1, seen[0][1] + 1)]
    assert hit(matcher.match(points), points)


def test_any_module_of_dense_features_will_do(scan: Volume, points: np.ndarray) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv3d(1, 8, 5, padding=2), nn.ReLU(), nn.Conv3d(8, 12, 5, padding=2))
    module.preprocessing = Preprocessing((VOXEL_MM,) * 3)  # type: ignore[assignment]
    assert hit(correspond(points, scan, scan, module.eval()), points)


@pytest.mark.parametrize("slices", [1, 5, 8])  # a block has 4 an axis
def test_a_scan_of_a_few_slices_is_matched(slices: int) -> None:
    torch.manual_seed(0)
    module = nn.Conv3d(1, 8, 5, padding=2).eval()
    module.preprocessing = Preprocessing((VOXEL_MM,) * 3)  # type: ignore[assignment]
    smooth = F.avg_pool3d(torch.randn(1, 1, 32, 32, slices + 4), 5, (1, 1, 1), (2, 2, 0))[0, 0]
    thin = Volume((4000 * smooth).numpy().astype(np.int16), np.diag([VOXEL_MM, VOXEL_MM, VOXEL_MM, 1]))
    points = VOXEL_MM * np.random.default_rng(0).uniform(2, 29, (20, 3))
    points[:, 2] = VOXEL_MM * (slices - 1) / 2
    assert hit(correspond(points, thin, thin, module), points, 0.25, 0.75)


# ---- confidence, heat, order


def test_confidence_is_the_stated_function_of_similarity_and_way_back(
    subjects: list[Subject], net: nn.Module, points: np.ndarray
) -> None:
    fixed, moving = map(as_volume, subjects)
    found = correspond(points, fixed, moving, net)
    expected = np.maximum(0, found.similarity) * np.exp(-((found.return_mm / (2 * VOXEL_MM)) ** 2) / 2)
    seen = np.isfinite(found.similarity)
    np.testing.assert_allclose(found.confidence[seen], expected[seen], rtol=1e-6)
    assert found.confidence.min() >= 0 and found.confidence.max() <= 1
    assert 0.3 < np.median(found.confidence) < 0.95  # more than in an empty scan, less than in a copy


def test_a_point_outside_the_scan_has_no_match_and_leaves_the_others_alone(itself: Matcher, points: np.ndarray) -> None:
    found = itself.match(np.vstack([points[:2], [OUTSIDE], points[2:3]]), heat=True)
    np.testing.assert_allclose(found.points_mm[[0, 1, 3]], itself.match(points[:3]).points_mm, atol=1e-4)
    assert np.isnan(found.points_mm[2]).all() and np.isnan(found.similarity[2]) and found.confidence[2] == 0
    assert found.heat[2] is None and found.heat[3] is not None


def test_points_are_matched_each_by_itself(
    itself: Matcher, points: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = itself.match(points[:7])
    monkeypatch.setattr(room, "CHUNK", 3)
    np.testing.assert_allclose(itself.match(points[:7]).points_mm, together.points_mm, atol=1e-4)
    assert itself.match(np.empty((0, 3))).points_mm.shape == (0, 3)


def test_the_heat_map_lies_on_the_other_scans_grid_and_is_hottest_at_the_match(
    to_turned: Matcher, turned: Volume, points: np.ndarray
) -> None:
    for point, heat in zip(points[:3], to_turned.match(points[:3], heat=True).heat, strict=True):
        assert heat is not None and heat.shape == turned.shape and np.array_equal(heat.affine, turned.affine)
        assert heat.data.min() >= -1 and heat.data.max() <= 1 + 1e-5
        i, j, k = Grid.of(turned).index(point[None] + SHIFT_MM).round().astype(int)[0]
        assert heat.data[i, j, k] > heat.data.max() - 0.05
    at_model = to_turned.heat(points[0], grid="model")
    np.testing.assert_allclose(at_model.spacing_mm, VOXEL_MM, rtol=0.05)


def test_a_registration_is_searched_around(scan: Volume, turned: Volume, net: nn.Module, points: np.ndarray) -> None:
    matrix = np.eye(4)
    matrix[:3, 3] = SHIFT_MM + 4.0
    matcher = Matcher(scan, turned, net, start=Affine(matrix))
    assert hit(matcher.match(points), points + SHIFT_MM, 0.25, 0.75)
    matrix[:3, 3] = SHIFT_MM + np.array([0, 0, 100.0])
    far = Matcher(scan, turned, net, start=Affine(matrix)).match(points)
    close = np.isfinite(far.points_mm[:, 0])
    assert distance(far.points_mm[close], points[close] + SHIFT_MM).min() > 50  # it stays near the start


# ---- what the embedded model is worth


@pytest.mark.slow
def test_matches_between_subjects_are_nearer_to_the_truth_than_the_same_place(net: nn.Module) -> None:
    generator = torch.Generator().manual_seed(202)
    pair = [sample_subject((64, 64, 76), generator, (5.0,) * 3) for _ in range(2)]
    fixed, moving = map(as_volume, pair)
    points = drawn(pair[0], fixed, 1000)
    index = Grid.of(fixed).index(points)
    displacement = true_displacement(*pair).permute(3, 2, 1, 0).flip(-1).numpy()  # (i, j, k, x y z) voxels
    i, j, k = index.round().astype(int).T
    truth = points + displacement[i, j, k] * 5.0
    shown = Grid.of(moving).contains(Grid.of(moving).index(truth))
    found = correspond(points[shown], fixed, moving, net)
    error, still = distance(found.points_mm, truth[shown]), distance(points[shown], truth[shown])
    assert np.nanmedian(error) < 0.6 * np.median(still)


# ---- bounded memory, and errors with a way out


def test_no_grid_makes_more_blocks_than_may_be_compared() -> None:
    for shape in ((96, 96, 96), (512, 512, 600), (40, 2000, 40)):
        sizes = type("Scan", (), {"body": torch.zeros(1, dtype=torch.bool).expand(shape)})
        edge = room._edge(sizes, sizes)  # type: ignore[arg-type]
        assert math.prod(shape) / edge**3 <= room.MOST_BLOCKS and edge >= 4


def test_wrong_points_are_refused(itself: Matcher) -> None:
    with pytest.raises(ArgumentError, match=r"shape \(3,\); give finite \(N, 3\)"):
        itself.match(np.zeros(3))
    with pytest.raises(ArgumentError, match="give finite"):
        itself.match(np.array([[0, 0, np.nan]]))
    with pytest.raises(ArgumentError, match=r"no point lies in the scan; it spans -100 to 100, -88 to 88, "):
        itself.match(np.array([OUTSIDE]))


def test_features_that_would_not_fit_are_refused(scan: Volume, net: nn.Module) -> None:
    with pytest.raises(VolumeError, match=r"take .* GiB, more than .*; crop the scans"):
        Matcher(scan, scan, net, max_bytes=10**6)


def test_an_empty_scan_gives_no_confidence(scan: Volume, points: np.ndarray, net: nn.Module) -> None:
    empty = Volume(np.full(scan.shape, -1000, np.int16), scan.affine)
    with pytest.warns(InputWarning, match="every voxel is -1000"):
        found = correspond(points[:5], scan, empty, net)
    assert found.confidence.max() < 0.3


# ---- the command line


@pytest.fixture
def files(tmp_path: Path, scan: Volume, turned: Volume, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_volume(scan, "fixed.nii.gz")
    write_volume(turned, "moving.nii.gz")


def run(*words: str) -> str:
    result = CliRunner().invoke(main, ["correspond", "--fixed", "fixed.nii.gz", "--moving", "moving.nii.gz", *words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.usefixtures("files")
def test_the_command_moves_the_rows_of_a_table_and_adds_their_confidence() -> None:
    Path("points.csv").write_text("name,x,y,z\ncarina,2,-10,30\nnowhere,900,0,0\n")
    lines = run("--points", "points.csv", "-o", "matches.csv", "--heat", "heat").splitlines()
    assert "confidence 0.9" in lines[0] or "confidence 1.0" in lines[0]
    assert lines[1].split(None, 1)[1] == "no match  confidence 0.00"
    carina, nowhere = csv.DictReader(Path("matches.csv").read_text().splitlines())
    np.testing.assert_allclose([float(carina[a]) for a in "xyz"], CARINA + SHIFT_MM, atol=2)
    assert carina["name"] == "carina" and float(carina["confidence"]) > 0.95
    assert nowhere["x"] == "nan" and float(nowhere["confidence"]) == 0
    assert read_volume("heat/point-1.nii.gz").shape == read_volume("moving.nii.gz").shape
    assert not Path("heat/point-2.nii.gz").exists()


@pytest.mark.usefixtures("files")
def test_the_command_takes_points_one_by_one_in_lps_around_a_transform() -> None:
    matrix = np.eye(4)
    matrix[:3, 3] = SHIFT_MM
    write_transform(Affine(matrix), "start.tfm")
    found = json.loads(run("--point", "-2,10,30", "--point", "900,0,0", "--lps", "--transform", "start.tfm", "--json"))
    np.testing.assert_allclose(np.array(found[0]["match_mm"]) * [-1, -1, 1], CARINA + SHIFT_MM, atol=2)
    assert found[1] == {"match_mm": None, "confidence": 0.0, "similarity": None, "return_mm": None}


@pytest.mark.usefixtures("files")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "needs --points or --point"),
        (["--point", "1,2"], "points 1,2; write each as x,y,z"),
        (["--point", "1,2,3", "-o", "matches.txt"], "end it in .csv"),
        (["--point", "1,2,3", "--fixed", "none.nii.gz"], "no such file"),
        (["--point", "1,2,3", "--point", "1,nan,3"], "a point that is not finite; give its millimetres in numbers"),
        (["--point", "900,0,0", "--heat", "heat"], "no point lies in the fixed scan; it spans "),
    ],
)
def test_wrong_calls_are_refused_with_a_remedy_before_the_work(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gvsl_zoo.inference.correspond._describe", lambda *_: pytest.fail("features were computed"))
    call = ["correspond", "--fixed", "fixed.nii.gz", "--moving", "moving.nii.gz", *words]
    result = CliRunner().invoke(main, call)
    assert result.exit_code in (1, 2) and message in result.output and not Path("heat").exists()
