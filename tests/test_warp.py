"""Tests of the command warp: scans, label maps and points through saved transforms, with SimpleITK as the judge."""

from __future__ import annotations

import csv
import json
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gvsl_zoo.cli import main
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.transforms import Affine, Chain, Displacement, Grid, read_transform, warp_volume, write_transform
from gvsl_zoo.volume import InputWarning, Volume, read_volume, write_volume

DATA = Path(__file__).parents[2] / "shared" / "data"
LPS = np.array([-1.0, -1.0, 1.0])
TURN = np.array([[0.96, -0.28, 0, 0], [0.28, 0.96, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
MOVING = np.array([[-5.0, 0, 0, 90], [0, 5, 0, -85], [0, 0, 6, -75], [0, 0, 0, 1]])
FIXED = Grid((30, 26, 34), TURN @ np.array([[0, 0, 5.0, -75], [-6, 0, 0, 80], [0, 5, 0, -60], [0, 0, 0, 1]]))
SHEARED = Affine(np.array([[1.05, 0.1, 0, 6], [-0.06, 0.97, 0.03, -9], [0.02, 0, 1.0, 4], [0, 0, 0, 1]]))


def wave(grid: Grid) -> Displacement:
    x, y, z = grid.points().T
    moves = 9 * np.stack([np.sin(y / 40), np.cos(z / 50), np.sin(x / 45)], -1)
    return Displacement(moves.reshape(*grid.shape, 3), grid)


def run(*args):
    return CliRunner().invoke(main, ["warp", *map(str, args)])


def done(*args):
    """What a command said in JSON that went well."""
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def points_of(path: Path) -> np.ndarray:
    with path.open() as file:
        return np.array([[float(row[axis]) for axis in "xyz"] for row in csv.DictReader(file)])


@pytest.fixture
def folder(tmp_path):
    """A moving scan with its labels, a fixed scan on another grid, transforms, and named points."""
    subject = sample_subject((24, 36, 36), torch.Generator().manual_seed(1), (6.0, 5.0, 5.0))
    write_volume(Volume(subject.hu.numpy().T.astype(np.int16), MOVING), tmp_path / "moving.nii.gz")
    write_volume(Volume(subject.labels.numpy().T, MOVING), tmp_path / "labels.nii.gz")
    write_volume(Volume(np.zeros(FIXED.shape, np.int16), FIXED.affine), tmp_path / "fixed.nii.gz")
    write_transform(wave(FIXED), tmp_path / "wave.nii.gz")
    write_transform(SHEARED, tmp_path / "affine.mat")
    rows = ["name,x,y,z,note", "carina,1.5,-20,30,", 'apex,"-30",40,-10,"a, b"', "far,900,0,0,"]
    (tmp_path / "points.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def test_a_scan_lands_on_the_fixed_scans_grid(folder):
    facts = done(
        "-i", folder / "moving.nii.gz", "--fixed", folder / "fixed.nii.gz",
        "--transform", folder / "affine.mat", "-o", folder / "out.nii.gz",
    )  # fmt: skip
    assert facts == {"output": str(folder / "out.nii.gz"), "shape": [30, 26, 34]}
    warped, fixed = read_volume(folder / "out.nii.gz"), read_volume(folder / "fixed.nii.gz")
    np.testing.assert_array_equal(warped.affine, fixed.affine)
    wanted = warp_volume(read_volume(folder / "moving.nii.gz"), SHEARED, Grid.of(fixed))
    np.testing.assert_allclose(warped.data, wanted.data, atol=1e-3)


def test_a_chain_is_applied_in_itks_order(folder):
    sitk = pytest.importorskip("SimpleITK", reason="the judge is SimpleITK")
    for name, labels in (("moving", False), ("labels", True)):
        done(
            "-i", folder / f"{name}.nii.gz", "--fixed", folder / "fixed.nii.gz",
            "--transform", folder / "affine.mat", "--transform", folder / "wave.nii.gz",
            *["--labels"] * labels, "-o", folder / "out.nii.gz", "--overwrite",
        )  # fmt: skip
        field = sitk.ReadImage(str(folder / "wave.nii.gz"), sitk.sitkVectorFloat64)
        chain = sitk.CompositeTransform(
            [sitk.ReadTransform(str(folder / "affine.mat")), sitk.DisplacementFieldTransform(field)]
        )
        moving, fixed = (sitk.ReadImage(str(folder / f"{n}.nii.gz")) for n in (name, "fixed"))
        lowest = 0 if labels else float(sitk.GetArrayViewFromImage(moving).min())
        kind = (sitk.sitkNearestNeighbor, sitk.sitkUInt8) if labels else (sitk.sitkLinear, sitk.sitkFloat32)
        wanted = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, chain, kind[0], lowest, kind[1])).T
        found = read_volume(folder / "out.nii.gz").data
        assert (wanted != lowest).mean() > 0.3 and found.dtype == wanted.dtype
        assert (np.abs(found.astype(float) - wanted) > 0.05).mean() < 1e-4


def test_a_label_map_keeps_its_type_and_its_labels(folder):
    done(
        "-i", folder / "labels.nii.gz", "--fixed", folder / "fixed.nii.gz", "--labels",
        "--transform", folder / "wave.nii.gz", "-o", folder / "out.nii",
    )  # fmt: skip
    before, after = read_volume(folder / "labels.nii.gz").data, read_volume(folder / "out.nii").data
    assert after.dtype == np.uint8 and after.any()
    assert set(np.unique(after)) <= {*np.unique(before), 0}


def test_a_scan_warped_there_and_back_is_the_scan(folder):
    """Two resamplings of labels cost their surfaces only."""
    chain = ("--transform", folder / "affine.mat", "--transform", folder / "wave.nii.gz")
    to_fixed = ("-i", folder / "labels.nii.gz", "--fixed", folder / "fixed.nii.gz", "--labels")
    to_moving = ("-i", folder / "there.nii.gz", "--fixed", folder / "labels.nii.gz", "--labels")
    done(*to_fixed, *chain, "-o", folder / "there.nii.gz")
    done(*to_moving, *chain, "--inverse", "-o", folder / "back.nii.gz")
    done(*to_moving, *chain, "-o", folder / "further.nii.gz")
    core = (slice(10, -10), slice(10, -10), slice(8, -8))
    before, back, further = (read_volume(folder / f"{n}.nii.gz").data[core] for n in ("labels", "back", "further"))
    assert (before == back).mean() > 0.8 > 0.5 > (before == further).mean()


@pytest.mark.parametrize("lps", [False, True])
def test_points_go_where_their_anatomy_is(folder, lps):
    facts = done(
        "--points", folder / "points.csv", "--transform", folder / "affine.mat",
        "-o", folder / "moved.csv", *["--lps"] * lps,
    )  # fmt: skip
    given, sign = points_of(folder / "points.csv"), LPS if lps else 1
    np.testing.assert_allclose(points_of(folder / "moved.csv"), SHEARED(given * sign) * sign, atol=1e-4)
    assert facts["points"] == 3
    lines = (folder / "moved.csv").read_text().splitlines()
    assert lines[0] == "name,x,y,z,note" and lines[1].startswith("carina,") and lines[2].endswith(',"a, b"')


def test_points_go_back_by_the_inverse_and_those_outside_are_told(folder):
    chain = ("--transform", folder / "affine.mat", "--transform", folder / "wave.nii.gz")
    facts = done("--points", folder / "points.csv", "--fixed", folder / "fixed.nii.gz", *chain, "-o", folder / "a.csv")
    assert facts["outside the fixed scan"] == facts["beyond the displacement"] == [3]
    facts = done(
        "--points", folder / "a.csv", "--fixed", folder / "fixed.nii.gz", *chain, "--inverse", "-o", folder / "b.csv"
    )
    assert facts["outside the fixed scan"] == [3] and facts["without an inverse"] == []
    np.testing.assert_allclose(points_of(folder / "b.csv"), points_of(folder / "points.csv"), atol=0.2)
    grid = Grid.of(read_volume(folder / "fixed.nii.gz"))
    moved = Chain((wave(grid), SHEARED))(points_of(folder / "points.csv"))
    np.testing.assert_allclose(points_of(folder / "a.csv"), moved, atol=1e-3)


def test_a_point_and_the_image_move_together(folder):
    """A bright voxel of the moving scan appears in the warped one where --inverse sends its point."""
    data = np.zeros((36, 36, 24), np.float32)
    data[17, 20, 11] = 1000
    write_volume(Volume(data, MOVING), folder / "spot.nii.gz")
    (folder / "spot.csv").write_text("x,y,z\n" + ",".join(map(str, (MOVING @ (17, 20, 11, 1))[:3])) + "\n")
    chain = ("--transform", folder / "affine.mat", "--transform", folder / "wave.nii.gz")
    done("-i", folder / "spot.nii.gz", "--fixed", folder / "fixed.nii.gz", *chain, "-o", folder / "out.nii.gz")
    done("--points", folder / "spot.csv", *chain, "--inverse", "-o", folder / "out.csv")
    warped = read_volume(folder / "out.nii.gz")
    index = Grid.of(warped).index(points_of(folder / "out.csv"))[0]
    peak = np.argwhere(warped.data > 0.5 * warped.data.max())
    assert np.linalg.norm(peak.mean(0) - index) < 0.7  # voxels


def test_a_displacement_that_does_not_cover_the_fixed_scan_warns(folder):
    small = Grid((5, 5, 5), np.diag([10.0, 10, 10, 1]))
    write_transform(Displacement(np.zeros((5, 5, 5, 3)), small), folder / "small.nii.gz")
    result = run(
        "-i", folder / "moving.nii.gz", "--fixed", folder / "fixed.nii.gz",
        "--transform", folder / "small.nii.gz", "-o", folder / "out.nii.gz",
    )  # fmt: skip
    assert result.exit_code == 0
    assert "warning: " in result.stderr and "lie beyond the displacement's grid" in result.stderr


def test_the_help_states_order_direction_and_border():
    text = " ".join(run("--help").output.split())
    for told in ("the last one is applied to a fixed point first", "--inverse sends them back", "values of its border"):
        assert told in text


# ---- what cannot be done: one line, and nothing written


@pytest.mark.parametrize(
    ("args", "code", "match"),
    [
        (("-i", "moving.nii.gz"), 2, "warp needs -i with --fixed [--labels], or --points"),
        (("--labels", "--points", "points.csv"), 2, "warp needs -i with --fixed"),
        (("-i", "moving.nii.gz", "--points", "points.csv"), 2, "warp needs -i with --fixed"),
        (("-i", "moving.nii.gz", "--fixed", "fixed.nii.gz", "--lps"), 2, "warp needs -i with --fixed"),
        (("--points", "points.csv"), 2, "has no ending for this; end it in .csv"),
        (("-i", "none.nii.gz", "--fixed", "fixed.nii.gz"), 1, "none.nii.gz': no such file; check the path"),
        (("-i", "moving.nii.gz", "--fixed", "points.csv"), 1, "not a NIfTI file"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(folder, monkeypatch, args, code, match):
    monkeypatch.chdir(folder)
    result = run(*args, "--transform", "affine.mat", "-o", "out.nii.gz")
    assert result.exit_code == code and match in result.stderr and result.stderr.count("\n") == 1
    assert not (folder / "out.nii.gz").exists()


@pytest.mark.parametrize(
    ("transform", "match"),
    [
        ("moving.nii.gz", "no displacement; give ITK's vector image"),
        ("points.csv", "its ending is not one of a transform; give a file of ITK or ANTs"),
        ("none.tfm", "no such file; check the path"),
        ("flat.tfm", "the affine is singular"),
        ("nan.nii.gz", "the displacement is not finite: 1 of"),
        ("away.tfm", "the transform sends no voxel of the grid into the moving scan; check that it belongs"),
    ],
)
def test_a_file_that_is_no_usable_transform_is_told(folder, monkeypatch, transform, match):
    monkeypatch.chdir(folder)
    head = "#Insight Transform File V1.0\nTransform: AffineTransform_double_3_3\nFixedParameters: 0 0 0\nParameters: "
    Path("flat.tfm").write_text(head + "1 0 0 0 1 0 0 0 0 0 0 0\n")
    Path("away.tfm").write_text(head + "1 0 0 0 1 0 0 0 1 4000 0 0\n")
    image = nib.load("wave.nii.gz")
    data = image.get_fdata(dtype=np.float32)
    data[1, 2, 3, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(data, image.affine, image.header), "nan.nii.gz")
    result = run("-i", "moving.nii.gz", "--fixed", "fixed.nii.gz", "--transform", transform, "-o", "out.nii.gz")
    assert result.exit_code in (1, 2) and f"{match}" in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ") and not Path("out.nii.gz").exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "no column x, y, z among none; name the columns x, y, z in the first line"),
        ("x,y\n1,2\n", "no column z among 'x', 'y'; name"),
        ("x;y;z\n1;2;3\n", "no column x, y, z among 'x;y;z'; name the columns x, y, z in the first line, commas"),
        ("x,y,z\n1,2,3\n1,two,3\n", "row 2 is not 3 cells with numbers in x, y, z; mend it or leave it out"),
        ("x,y,z\n1,2\n", "row 1 is not 3 cells with numbers"),
        ("x,y,z\n1,2,3,4\n", "row 1 is not 3 cells with numbers"),
        ("x,y,z\n1,nan,3\n", "row 1 is not 3 cells with numbers"),
    ],
)
def test_points_that_are_none_are_told_with_their_row(folder, text, match):
    (folder / "bad.csv").write_text(text)
    result = run("--points", folder / "bad.csv", "--transform", folder / "affine.mat", "-o", folder / "out.csv")
    assert result.exit_code == 1 and match in result.stderr
    assert not (folder / "out.csv").exists()


def test_columns_of_one_name_and_names_with_spaces_stay_what_they_are(folder):
    (folder / "odd.csv").write_text("note, x, y, z,note,x\na,1,2,3,b,c\n")
    done("--points", folder / "odd.csv", "--transform", folder / "affine.mat", "-o", folder / "out.csv")
    head, row = (line.split(",") for line in (folder / "out.csv").read_text().splitlines())
    assert head == ["note", "x", "y", "z", "note", "x"] and [row[n] for n in (0, 4, 5)] == ["a", "b", "c"]
    np.testing.assert_allclose([float(n) for n in row[1:4]], SHEARED(np.array([[1.0, 2, 3]]))[0], atol=1e-4)


def test_an_empty_table_of_points_stays_one(folder):
    (folder / "none.csv").write_text("name,x,y,z\n")
    facts = done("--points", folder / "none.csv", "--transform", folder / "wave.nii.gz", "-o", folder / "out.csv")
    assert facts["points"] == 0 and (folder / "out.csv").read_text() == "name,x,y,z\n"


def test_an_output_that_exists_is_replaced_only_when_asked(folder):
    call = ("--points", folder / "points.csv", "--transform", folder / "affine.mat", "-o", folder / "out.csv")
    (folder / "out.csv").write_text("precious")
    result = run(*call)
    assert result.exit_code == 1 and "it exists already" in result.stderr
    assert (folder / "out.csv").read_text() == "precious"
    done(*call, "--overwrite")
    assert len(points_of(folder / "out.csv")) == 3
    result = run("--points", folder / "points.csv", *call[2:4], "-o", folder / "points.csv", "--overwrite")
    assert result.exit_code == 1 and "it is the input itself" in result.stderr


# ---- real scans


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "ct" / "ts_abdomen.nii.gz").exists(), reason="real scans lie beside the checkout")
def test_real_scans_are_warped_as_simpleitk_warps_them(tmp_path):
    sitk = pytest.importorskip("SimpleITK", reason="the judge is SimpleITK")
    moving_path, fixed_path = DATA / "ct" / "ts_abdomen.nii.gz", DATA / "ct" / "acrin_flt_001.nii.gz"
    grid, source = Grid.of(read_volume(fixed_path)), Grid.of(read_volume(moving_path))
    shift = np.eye(4)
    shift[:3, 3] = source.centre_mm - grid.centre_mm
    with warnings.catch_warnings():
        warnings.simplefilter("error", InputWarning)
        write_transform(wave(grid), tmp_path / "wave.nii.gz")
        write_transform(Affine(shift), tmp_path / "shift.tfm")
        assert isinstance(read_transform(tmp_path / "wave.nii.gz"), Displacement)
    done(
        "-i", moving_path, "--fixed", fixed_path, "--transform", tmp_path / "shift.tfm",
        "--transform", tmp_path / "wave.nii.gz", "-o", tmp_path / "out.nii",
    )  # fmt: skip
    field = sitk.ReadImage(str(tmp_path / "wave.nii.gz"), sitk.sitkVectorFloat64)
    chain = sitk.CompositeTransform(
        [sitk.ReadTransform(str(tmp_path / "shift.tfm")), sitk.DisplacementFieldTransform(field)]
    )
    moving, fixed = sitk.ReadImage(str(moving_path)), sitk.ReadImage(str(fixed_path))
    wanted = sitk.GetArrayFromImage(sitk.Resample(moving, fixed, chain, sitk.sitkLinear, -1024, sitk.sitkFloat32)).T
    apart = np.abs(read_volume(tmp_path / "out.nii").data - wanted)
    assert (wanted > -1024).mean() > 0.2
    assert np.quantile(apart, 0.9999) < 0.2 and apart.mean() < 0.01  # HU


def test_voxels_that_are_no_number_stay_where_they_are():
    data = np.ones((10, 10, 24), np.float32)
    data[..., :3] = np.nan
    moving = Volume(data, np.eye(4))
    shift = np.eye(4)
    shift[2, 3] = 10
    found = warp_volume(moving, Affine(shift), Grid.of(moving)).data
    assert np.isfinite(found).all() and (found[..., 15:] == 1).all()
