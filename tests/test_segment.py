"""Tests of segmentation: labels on the scan's own grid whatever its axes; files, folders, clusters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_dicom import write_series
from test_film import film_model, write_png
from torch import nn

from gvsl_zoo import load, model_info, report, save_pretrained, segment
from gvsl_zoo.cli import main
from gvsl_zoo.errors import ArgumentError, GvslZooError, VolumeError
from gvsl_zoo.inference.features import prepare_for
from gvsl_zoo.inference.segment import (
    Job,
    comment_labels,
    find_scans,
    label_volumes,
    mirrored,
    segment_file,
    segment_folder,
)
from gvsl_zoo.inference.sliding import sliding_window
from gvsl_zoo.models.heads import SegmentationModel
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.registry import Label
from gvsl_zoo.report import labels_picture
from gvsl_zoo.volume import Preprocessing, Volume, read_volume, write_volume

LABELS = (Label("background", 0), Label("soft tissue", 4, (200, 120, 100)), Label("bone", 9))
SMALL = (16, 16, 16)
RAS = np.diag([2.0, 2.5, 3.0, 1.0])


class Thresholds(nn.Module):
    """Three classes by the smoothed intensity alone: below -200 HU, up to 150 HU, above."""

    def __init__(self, spacing_mm: float | None = 4.0) -> None:
        super().__init__()
        self.preprocessing = Preprocessing(None if spacing_mm is None else (spacing_mm,) * 3)
        self.labels = LABELS

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, high = ((hu + 1024) / 2048 for hu in (-200, 150))
        return torch.cat([low - x, torch.minimum(x - low, high - x), x - high], 1)


def phantom(shape: tuple[int, int, int] = (40, 36, 30), affine: np.ndarray = RAS) -> Volume:
    """A synthetic chest, (i, j, k) = (x, y, z), int16."""
    subject = sample_subject(shape[::-1], torch.Generator().manual_seed(3), (9.0, 9.0, 9.0))
    return Volume(subject.hu.round().to(torch.int16).numpy().T, affine)


def trained(width: int = 8, **labels: int) -> nn.Module:
    """A network with a head of fixed random weights, as `load` gives it."""
    generator = torch.Generator().manual_seed(5)
    model = SegmentationModel(UNet(3, width, generator=generator), len(LABELS), generator=generator).eval()
    model.entry = replace(model_info("gvsl-unet-ct-nano"), heads=("segmentation",), labels=LABELS)  # type: ignore[assignment]
    model.preprocessing = Preprocessing((4.0, 4.0, 4.0))  # type: ignore[assignment]
    return model


# ---- theorems


@pytest.mark.parametrize("spacing_mm", [None, 1.7, 4.0, 11.0])
@pytest.mark.parametrize("window", [(16, 16, 16), (5, 40, 12), (96, 96, 96)])
def test_labels_are_the_argmax_of_the_logits_brought_onto_the_scans_grid(
    spacing_mm: float | None, window: tuple[int, int, int]
) -> None:
    scan, model = phantom(), Thresholds(spacing_mm)
    prepared = prepare_for(scan, model)
    logits = prepared.restore(sliding_window(prepared.image, model, window=window, overlap=0.5)[0])
    expected = np.array([0, 4, 9])[logits.data.argmax(-1)]
    found = segment(scan, model, window=window)
    assert found.data.dtype == np.uint8 and (found.data == expected).mean() > 0.9999  # ties of rounded sums
    assert set(np.unique(expected)) >= {0, 4}


@pytest.mark.parametrize("turn", [(2, 0, 1), (1, 0, 2), (0, 2, 1)])
@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, 1, -1), (-1, -1, 1)])
def test_a_turned_and_flipped_file_gives_the_turned_and_flipped_labels(
    turn: tuple[int, int, int], flip: tuple[int, int, int]
) -> None:
    scan, model = phantom(), trained()
    own = nib.Nifti1Image(scan.data, scan.affine)
    turned = own.as_reoriented(np.array([[axis, sign] for axis, sign in zip(turn, flip, strict=True)]))
    found = segment(Volume(np.asarray(turned.dataobj), turned.affine), model, window=SMALL)
    expected = nib.Nifti1Image(segment(scan, model, window=SMALL).data, scan.affine).as_reoriented(
        np.array([[axis, sign] for axis, sign in zip(turn, flip, strict=True)])
    )
    np.testing.assert_array_equal(found.data, np.asarray(expected.dataobj))
    np.testing.assert_array_equal(found.affine, turned.affine)


@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 30, 2), (17, 16, 33)])
def test_any_size_of_scan_works(shape: tuple[int, int, int]) -> None:
    scan = Volume(np.linspace(-1000, 900, np.prod(shape)).reshape(shape), RAS)
    found = segment(scan, trained())
    assert found.shape == shape and set(np.unique(found.data)) <= {0, 4, 9}


def test_windows_of_air_are_not_computed_and_nothing_changes_in_the_body() -> None:
    data = np.full((48, 20, 20), -1000, np.int16)
    data[4:12, 4:16, 4:16] = phantom((8, 12, 12)).data
    scan, model, calls = Volume(data, RAS), trained(), []
    model.preprocessing = Preprocessing()  # type: ignore[assignment]
    model.register_forward_hook(lambda *_: calls.append(1))
    found = segment(scan, model, window=SMALL)
    skipping = len(calls)
    prepared = prepare_for(scan, model)
    whole = sliding_window(prepared.image, model, window=SMALL, overlap=0.5)[0].argmax(0)
    body = prepared.image[0, 0] > 0.03
    expected = np.array([0, 4, 9], np.uint8)[whole.numpy()]
    np.testing.assert_array_equal(found.data.T[body], expected[body])
    assert 1 < skipping < len(calls) - skipping
    assert not found.data[40:].any()  # background beyond every window that was computed


def test_an_axis_of_one_voxel_is_not_mirrored() -> None:
    seen: list[torch.Tensor] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        seen.append(x)
        return 2 * x

    film = torch.rand(1, 1, 1, 4, 6)
    assert torch.allclose(mirrored(note)(film), 2 * film) and len(seen) == 4
    seen.clear()
    mirrored(note)(torch.rand(1, 1, 2, 4, 6))
    assert len(seen) == 8


def test_mirroring_makes_labels_equivariant_to_mirrors() -> None:
    scan, model = phantom((16, 16, 16)), trained()
    model.preprocessing = Preprocessing()  # type: ignore[assignment]
    straight = segment(scan, model, mirror=True)
    for axis in range(3):
        mirrored = segment(replace(scan, data=np.flip(scan.data, axis).copy()), model, mirror=True)
        assert (np.flip(mirrored.data, axis) == straight.data).mean() > 0.999
    assert (segment(scan, model).data != straight.data).any()


def test_windows_are_as_large_as_in_training() -> None:
    counts = {}
    for window in (None, SMALL):
        model = Thresholds(None)
        model.entry = SimpleNamespace(labels=LABELS, input=SimpleNamespace(window=window))
        segment(phantom(), model, progress=lambda done, total, window=window: counts.update({window: total}))
    assert counts[None] == 1 < counts[SMALL]


def test_batches_of_windows_give_the_same_labels() -> None:
    scan, model = phantom(), trained()
    expected = segment(scan, model, window=SMALL)
    assert (segment(scan, model, window=SMALL, batch_size=3).data == expected.data).mean() > 0.9999


def test_bf16_gives_nearly_the_same_labels() -> None:
    scan, model = phantom(), trained()
    exact, quick = (segment(scan, model, precision=p).data for p in ("float32", "bf16"))
    assert 0.97 < (quick == exact).mean() < 1


def test_a_model_of_several_channels_takes_a_scan_a_channel_or_one_in_each() -> None:
    class Difference(Thresholds):
        in_chans = 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[:, :1] - x[:, 1:], x[:, 1:] - x[:, :1], 0 * x[:, :1] - 9], 1)

    first, model = phantom(), Difference(None)
    second = replace(first, data=first.data[::-1].copy())
    found = segment([first, second], model, window=SMALL)
    inside = np.minimum(first.data, second.data) > -900
    np.testing.assert_array_equal(found.data[inside] == 4, (second.data > first.data)[inside])
    assert not segment(first, model, window=SMALL).data.any()


def test_recorded_voxel_counts_of_a_phantom() -> None:
    subject = sample_subject((48, 56, 64), torch.Generator().manual_seed(11), (6.0, 6.0, 6.0))
    scan = Volume(subject.hu.round().to(torch.int16).numpy().T, np.diag([6.0, 6.0, 6.0, 1.0]))
    counts = [row["voxels"] for row in label_volumes(segment(scan, Thresholds(6.0)), LABELS)]
    np.testing.assert_allclose(counts, [98557, 66638, 6837], rtol=1e-3)  # rounding of the phantom differs by machine
    counts = [row["voxels"] for row in label_volumes(segment(scan, trained()), LABELS)]
    np.testing.assert_allclose(counts, [8009, 99656, 64367], rtol=1e-3)


# ---- labels


def test_volumes_add_up_to_the_scan() -> None:
    found = segment(phantom(), Thresholds())
    rows = label_volumes(found, LABELS)
    assert sum(row["voxels"] for row in rows) == found.data.size
    assert sum(row["ml"] for row in rows) == pytest.approx(found.data.size * 2.0 * 2.5 * 3.0 / 1000)


def test_names_and_colours_travel_in_the_files_header(tmp_path: Path) -> None:
    write_volume(segment(phantom(), Thresholds()), tmp_path / "labels.nii.gz")
    [extension] = nib.load(tmp_path / "labels.nii.gz").header.extensions
    assert extension.get_code() == 6  # comment
    assert [label["name"] for label in json.loads(extension.get_content())["labels"]] == [
        "background",
        "soft tissue",
        "bone",
    ]
    assert comment_labels(read_volume(tmp_path / "labels.nii.gz")) == LABELS
    assert comment_labels(phantom()) == ()


def test_values_above_255_make_a_map_of_16_bits_and_beyond_that_none() -> None:
    model = Thresholds()
    model.labels = (LABELS[0], Label("a", 300), Label("b", 65535))
    found = segment(phantom(), model)
    assert found.data.dtype == np.uint16 and set(np.unique(found.data)) == {0, 300, 65535}
    model.labels = (LABELS[0], Label("a", 1), Label("b", 65536))
    with pytest.raises(ArgumentError, match="label values 0, 1, 65536; give different ones, 0 to 65535"):
        segment(phantom(), model)


def test_header_and_affine_stay_those_of_the_scan(tmp_path: Path) -> None:
    affine = np.array([[0, 0, -4.0, 40], [-3.0, 0, 0, 20], [0, 5.0, 0, -30], [0, 0, 0, 1]])
    image = nib.Nifti1Image(phantom().data, affine)
    image.header["descrip"] = b"of a scanner"
    image.header.set_sform(affine, 4)
    nib.save(image, tmp_path / "scan.nii.gz")
    write_volume(segment(tmp_path / "scan.nii.gz", Thresholds()), tmp_path / "labels.nii.gz")
    before, after = (nib.load(tmp_path / name).header for name in ("scan.nii.gz", "labels.nii.gz"))
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    assert changed <= {"datatype", "bitpix", "vox_offset", "scl_slope", "scl_inter", "magic"}


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ()}, r"this Thresholds has no trained segmentation head; train one .* or give a labelled scan"),
        ({"labels": LABELS[:2]}, "scores of 3 classes for 2 labels"),
        ({"labels": (*LABELS[:2], LABELS[1])}, "label values 0, 4, 4; give different ones"),
        ({"preprocessing": None}, "does not say what input it expects"),
    ],
)
def test_a_model_that_cannot_segment_is_refused(change: dict, message: str) -> None:
    model = Thresholds()
    for name, value in change.items():
        setattr(model, name, value)
    with pytest.raises(ArgumentError, match=message):
        segment(phantom(), model)


def test_scans_that_do_not_fit_are_refused() -> None:
    with pytest.raises(VolumeError, match="2 channels; prepare one at a time"):
        segment(Volume(np.zeros((4, 4, 4, 2)), RAS), Thresholds())
    with pytest.raises(ArgumentError, match="2 scans for a model of 1 channels"):
        segment([phantom(), phantom()], Thresholds())
    model = Thresholds()
    model.in_chans = 2  # type: ignore[assignment]
    with pytest.raises(VolumeError, match=r"channel 1 has \(40, 36, 31\) voxels, channel 0 .*; resample channel 1"):
        segment([phantom(), phantom((40, 36, 31))], model)


# ---- pictures


def test_the_picture_shows_the_labels_and_names_them(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib.image", reason="pictures need matplotlib")
    scan = phantom()
    found = segment(scan, Thresholds())
    labels_picture(scan, found, LABELS, tmp_path / "labels.png")
    pixels = matplotlib.imread(tmp_path / "labels.png")[..., :3]
    assert pixels.shape[1] == 1920
    coloured = (np.ptp(pixels, axis=2) > 0.2).mean()
    labels_picture(scan, replace(found, data=0 * found.data), LABELS, tmp_path / "none.png")
    assert coloured > 0.05 > (np.ptp(matplotlib.imread(tmp_path / "none.png")[..., :3], axis=2) > 0.2).mean()
    with pytest.raises(ArgumentError, match="give labels on its grid"):
        labels_picture(phantom((4, 4, 4)), found, LABELS, tmp_path / "other.png")


def rows_of_labels(scan: Volume, found: Volume, monkeypatch: pytest.MonkeyPatch, *, film: bool) -> list[report.Row]:
    drawn: list[report.Row] = []
    monkeypatch.setattr(report, "draw", lambda rows, *_: drawn.extend(rows))
    labels_picture(scan, found, LABELS, "never.png", film=film)
    return drawn


@pytest.mark.parametrize("mm", [1.0, 0.5])
def test_labels_of_a_film_lie_on_it_as_one_looks_at_it(mm: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.arange(6 * 4, dtype=np.uint8).reshape(4, 6, 1)  # columns, rows
    film = Volume(pixels, np.diag([mm, mm, 1.0, 1.0]))
    found = Volume(np.full_like(pixels, LABELS[0].value), film.affine)
    found.data[0, 5] = LABELS[1].value  # at the left, below
    [row] = rows_of_labels(film, found, monkeypatch, film=True)
    shown, laid = row.panels
    assert (np.diff(shown.pixels[..., 0], axis=0) >= 0).all() and shown.pixels[0, 0, 0] < shown.pixels[-1, -1, 0]
    assert np.argwhere((laid.pixels != shown.pixels).any(-1)).tolist() == [[5, 0]]
    assert not shown.letters and shown.scale == (mm != 1) and [name for name, _ in row.legend] == [LABELS[1].name]


def test_labels_of_a_volume_of_one_slice_lie_as_in_any_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = Volume(np.zeros((4, 6, 1), np.int16), RAS)
    found = Volume(np.full((4, 6, 1), LABELS[0].value, np.uint8), RAS)
    found.data[-1, -1] = LABELS[1].value  # at the patient's right, in front
    shown, laid = (row.panels[0] for row in rows_of_labels(scan, found, monkeypatch, film=False))
    assert np.argwhere((laid.pixels != shown.pixels).any(-1)).tolist() == [[0, 0]] and laid.letters == "RLAP"


@pytest.mark.parametrize("letters", [5, 40])
def test_a_legend_keeps_to_the_page_and_counts_what_it_leaves_out(
    letters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(report, "_save", lambda figure, _: figures.append(figure))
    legend = [(f"{n:02}{'m' * letters}", report.LABEL_COLOURS[0]) for n in range(30)]
    report.draw(
        [report.Row("Labels", "", [report.Panel(np.zeros((9, 9)), (1, 1), "")], legend)], "", tmp_path / "x.png"
    )
    (figure,) = figures
    named = [text for text in figure.texts if text.get_text().startswith("■")]
    (more,) = (text for text in figure.texts if text.get_text().endswith("more"))
    assert more.get_text() == f"and {30 - len(named)} more" and len(named) > 2
    assert more.get_window_extent().x1 < figure.get_window_extent().x1
    assert all(text.get_text().endswith("…") for text in named) == (letters > report.LONGEST_NAME)


# ---- files and folders


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A saved model with a trained head."""
    model = trained()
    save_pretrained(model, tmp_path / "run", entry=model.entry)  # type: ignore[arg-type]
    return tmp_path / "run"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Three scans, one of them in a folder of its own, and a file that is none."""
    folder = tmp_path / "scans"
    (folder / "later").mkdir(parents=True)
    for name, shape in {"a.nii.gz": (20, 18, 16), "b.1.nii": (12, 10, 14), "later/c.nii.gz": (9, 9, 9)}.items():
        write_volume(phantom(shape), folder / name)
    (folder / "bad.nii.gz").write_bytes(b"no scan")
    return folder


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["segment", *map(str, args)])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_segments_one_scan(tmp_path: Path, run_folder: Path, scans: Path) -> None:
    out, picture = tmp_path / "labels.nii.gz", tmp_path / "labels.png"
    settings = ("--model", run_folder, "--device", "cpu")
    code, text, _ = run("-i", scans / "a.nii.gz", "-o", out, "--picture", picture, "--json", *settings)
    facts = json.loads(text)
    assert code == 0 and picture.read_bytes().startswith(b"\x89PNG") and facts["output"] == str(out)
    expected = segment(scans / "a.nii.gz", load(run_folder, task="segmentation"))
    np.testing.assert_array_equal(read_volume(out).data, expected.data)
    assert facts == json.loads((tmp_path / "labels.json").read_text())
    assert [row["voxels"] for row in facts["labels"]] == [(expected.data == label.value).sum() for label in LABELS]
    code, _, error = run("-i", scans / "a.nii.gz", "-o", out, *settings)
    assert code == 1 and "it exists already" in error
    code, text, _ = run(
        "-i", scans / "a.nii.gz", "-o", out, "--overwrite", "--mirror", "--precision", "bf16", *settings
    )
    assert code == 0 and text.startswith(f"{out}: ") and " ml" in text


def test_a_sidecar_of_the_users_is_kept_unless_told(tmp_path: Path, run_folder: Path, scans: Path) -> None:
    sidecar, settings = tmp_path / "out" / "a.json", ("--model", run_folder, "--device", "cpu")
    sidecar.parent.mkdir()
    sidecar.write_text('{"Modality": "CT"}')
    one, all_scans = (("-i", scans / name, "-o", tmp_path / "out" / name, *settings) for name in ("a.nii.gz", ""))
    code, _, error = run(*one)
    assert code == 1 and "a.json': it exists already; choose another name" in error
    code, _, error = run(*all_scans)
    assert code == 1 and "a.json': it exists already" in error and "2 of 4 scans failed" in error  # and bad.nii.gz
    assert sidecar.read_text() == '{"Modality": "CT"}' and not (tmp_path / "out" / "a.nii.gz").exists()
    assert run(*one, "--overwrite")[0] == 0 and "labels" in json.loads(sidecar.read_text())
    (tmp_path / "out" / "a.nii.gz").unlink()  # as a call leaves it that was killed between the two files
    assert run(*one)[0] == 0


def test_a_scan_is_not_segmented_over_itself(scans: Path) -> None:
    before = (scans / "a.nii.gz").read_bytes()
    with pytest.raises(VolumeError, match="it is the input itself"):
        segment_file(Job((scans / "a.nii.gz",), scans / "a.nii.gz"), Thresholds(), overwrite=True)
    assert (scans / "a.nii.gz").read_bytes() == before


def test_labelled_scans_among_the_outputs_are_not_overwritten(tmp_path: Path, scans: Path) -> None:
    (tmp_path / "out").mkdir()
    write_volume(phantom((9, 9, 9)), tmp_path / "out" / "a.nii.gz")
    before = (tmp_path / "out" / "a.nii.gz").read_bytes()
    support = ("--support", scans / "a.nii.gz", tmp_path / "out" / "a.nii.gz")
    code, _, error = run("-i", scans, "-o", tmp_path / "out", *support, "--overwrite")
    assert code == 2 and "--overwrite with a labelled scan in" in error
    assert (tmp_path / "out" / "a.nii.gz").read_bytes() == before


def test_the_command_draws_the_labels_of_a_film_and_carries_none_over(tmp_path: Path) -> None:
    film = write_png(tmp_path / "a.png", np.random.default_rng(0).integers(0, 256, (40, 56)).astype(np.uint8))
    entry, unet = film_model()
    net = SegmentationModel(unet, len(LABELS), generator=torch.Generator().manual_seed(1)).eval()
    entry = replace(entry, heads=("segmentation",), labels=LABELS, input=replace(entry.input, window=(64, 64)))
    save_pretrained(net, tmp_path / "net", entry=entry)
    call = ("-i", film, "-o", tmp_path / "labels.nii.gz", "--model", tmp_path / "net", "--device", "cpu")
    for source in ("--support", "--atlas"):
        code, _, error = run(*call, source, film, film)
        assert code == 2 and "labels are carried over between volumes" in error
    code, _, error = run(*call, "--picture", tmp_path / "labels.png")
    assert code == 0 and (tmp_path / "labels.png").read_bytes().startswith(b"\x89PNG"), error


def test_one_bad_scan_of_a_folder_is_named_and_the_others_are_done(
    tmp_path: Path, run_folder: Path, scans: Path
) -> None:
    arguments = ("-i", scans, "-o", tmp_path / "out", "--model", run_folder, "--device", "cpu")
    code, text, error = run(*arguments, "--json")
    records = json.loads(text)
    assert code == 1 and "bad.nii.gz: cannot read" in error and "1 of 4 scans failed; the others are done" in error
    outputs = sorted(str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.nii.gz"))
    assert outputs == ["a.nii.gz", "b.1.nii.gz", "later/c.nii.gz"]
    assert [Path(record["input"]).name for record in records] == ["a.nii.gz", "b.1.nii", "bad.nii.gz", "c.nii.gz"]
    made = (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns
    (scans / "bad.nii.gz").unlink()
    code, text, _ = run(*arguments)
    assert code == 0 and text.count("done before") == 3 and (tmp_path / "out" / "a.nii.gz").stat().st_mtime_ns == made
    assert run(*arguments, "--overwrite")[1].count("done before") == 0


def test_outputs_within_the_folder_of_scans_are_not_segmented_again(tmp_path: Path, scans: Path) -> None:
    (scans / "bad.nii.gz").unlink()
    for _ in range(2):
        assert len(segment_folder(scans, scans / "out", Thresholds())) == 3


def test_a_dicom_series_in_a_folder_of_its_own_is_a_scan(tmp_path: Path) -> None:
    write_series(tmp_path / "scans" / "series", phantom((12, 16, 6)).data.T)
    write_volume(phantom((9, 9, 9)), tmp_path / "scans" / "a.nii.gz")
    other, series = segment_folder(tmp_path / "scans", tmp_path / "out", Thresholds())
    assert Path(series["output"]).name == "series.nii.gz" and "error" not in series and "error" not in other
    found = read_volume(series["output"])
    np.testing.assert_array_equal(found.data, segment(tmp_path / "scans" / "series", Thresholds()).data)
    np.testing.assert_allclose(found.spacing_mm, (0.5, 0.75, 2.0))


def test_no_scan_below_a_folder_is_passed_over_in_silence(tmp_path: Path) -> None:
    for name in ("scans/A.NII.GZ", "scans/b.Nii", "scans/series/c.nii.gz", "elsewhere/deep/d.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "scans" / "series" / "1.dcm").touch()
    (tmp_path / "scans" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "scans")
    (tmp_path / "elsewhere" / "deep" / "itself").symlink_to(tmp_path / "elsewhere" / "deep")
    jobs = find_scans(tmp_path / "scans", tmp_path / "out")
    assert {str(job.scans[0].relative_to(tmp_path)): str(job.output.relative_to(tmp_path)) for job in jobs} == {
        "scans/A.NII.GZ": "out/A.nii.gz",
        "scans/b.Nii": "out/b.nii.gz",
        "scans/series": "out/series.nii.gz",
        "scans/series/c.nii.gz": "out/series/c.nii.gz",
        "scans/link/deep/d.nii": "out/link/deep/d.nii.gz",
    }


def test_channels_of_one_scan_lie_beside_each_other(tmp_path: Path) -> None:
    for name in ("x_0000.nii.gz", "x_0001.nii.gz", "y_0000.nii.gz", "y_0001.nii.gz"):
        (tmp_path / name).touch()
    jobs = find_scans(tmp_path, tmp_path / "out", channels=2)
    assert [(len(job.scans), job.output.name) for job in jobs] == [(2, "x.nii.gz"), (2, "y.nii.gz")]
    assert [job.output.name for job in find_scans(tmp_path, tmp_path / "out")][:2] == ["x_0000.nii.gz", "x_0001.nii.gz"]


@pytest.mark.parametrize(
    ("files", "error"),
    [
        (("x_0000", "x_0001"), None),
        (("x",), None),  # in both channels
        (("x_0000",), "x_0000.nii.gz for a model of 2 channels; add x_0001"),
        (("x_0001",), "x_0001.nii.gz for a model of 2 channels; add x_0000"),
        (("x_0001", "x_0002"), "x_0001.nii.gz, x_0002.nii.gz for a model of 2 channels; add x_0000"),
        (
            ("x", "x_0000"),
            "x.nii.gz, x_0000.nii.gz for a model of 2 channels; give one file a channel, in order: x_0000, x_0001",
        ),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_a_scan_that_lacks_a_channel_is_told_and_stops_no_other(
    tmp_path: Path, files: tuple[str, ...], error: str | None
) -> None:
    model = Thresholds(None)
    model.in_chans = 2  # type: ignore[assignment]
    model.forward = lambda x: Thresholds.forward(model, x[:, :1])  # type: ignore[method-assign]
    (tmp_path / "scans").mkdir()
    for name in (*files, "y"):
        write_volume(phantom((6, 6, 6)), tmp_path / "scans" / f"{name}.nii.gz")
    found, other = segment_folder(tmp_path / "scans", tmp_path / "out", model)
    assert found.get("error") == error and "error" not in other
    assert (tmp_path / "out" / "x.nii.gz").exists() == (error is None)


@pytest.mark.parametrize(
    ("files", "remedy"),
    [
        (("x_0000",), "add x_0001"),
        (("x_0001", "x_0000"), "give one file a channel, in order: x_0000, x_0001"),
        (("x_0000", "x_0001"), None),
        (("t1", "t2"), None),
    ],
)
def test_the_channels_of_scans_given_by_hand_are_what_their_names_say(
    tmp_path: Path, files: tuple[str, ...], remedy: str | None
) -> None:
    model = Thresholds(None)
    model.in_chans = 2  # type: ignore[assignment]
    model.forward = lambda x: Thresholds.forward(model, x[:, :1])  # type: ignore[method-assign]
    for name in files:
        write_volume(phantom((6, 6, 6)), tmp_path / f"{name}.nii.gz")
    job = Job(tuple(tmp_path / f"{name}.nii.gz" for name in files), tmp_path / "out.nii.gz")
    if remedy:
        with pytest.raises(ArgumentError, match=remedy):
            segment_file(job, model)
    else:
        segment_file(job, model)
    assert (tmp_path / "out.nii.gz").exists() == (remedy is None)


@pytest.mark.parametrize("output", ["scans", "scans/../scans/", "absolute"])
def test_label_maps_do_not_go_among_the_scans(tmp_path: Path, scans: Path, monkeypatch, output: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match="is the folder of the scans; give the label maps another folder"):
        segment_folder(Path("scans"), scans if output == "absolute" else Path(output), Thresholds())


@pytest.mark.parametrize("absolute", ["scans", "output"])
def test_the_output_within_the_folder_of_scans_is_known_however_it_is_written(
    tmp_path: Path, scans: Path, monkeypatch, absolute: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (scans / "out").mkdir()
    (scans / "out" / "a.nii.gz").touch()
    given = (scans, Path("scans/out")) if absolute == "scans" else (Path("scans"), scans / "out")
    assert [job.scans[0].name for job in find_scans(*given)] == ["a.nii.gz", "b.1.nii", "bad.nii.gz", "c.nii.gz"]


def test_a_file_says_the_labels_that_were_asked_for(tmp_path: Path, scans: Path) -> None:
    named = tuple(Label(label.name.upper(), label.value + 1) for label in LABELS)
    model = Thresholds()
    model.labels = ()
    facts = segment_file(Job((scans / "a.nii.gz",), tmp_path / "a.nii.gz"), model, labels=named)
    voxels = read_volume(tmp_path / "a.nii.gz").data
    assert [(row["name"], row["voxels"]) for row in facts["labels"]] == [
        (label.name, (voxels == label.value).sum()) for label in named
    ]
    with pytest.raises(ArgumentError, match="no trained segmentation head"):
        segment_file(Job((tmp_path / "nowhere.nii",), tmp_path / "b.nii.gz"), model)


def test_folders_that_cannot_be_segmented_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"holds no \.nii, \.nii\.gz or DICOM file"):
        find_scans(tmp_path, tmp_path / "out")
    for name in ("x.nii", "x.nii.gz"):
        (tmp_path / name).touch()
    with pytest.raises(ArgumentError, match="would become one label map; rename one"):
        find_scans(tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_a_dask_cluster_makes_what_one_process_makes(tmp_path: Path, scans: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="needs gvsl-zoo[cluster]")
    model = trained()
    alone = segment_folder(scans, tmp_path / "1", model, window=SMALL)
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=tmp_path / "dask"
    ) as cluster:
        seen: list[tuple[int, int]] = []
        records = segment_folder(
            scans,
            tmp_path / "2",
            model,
            window=SMALL,
            cluster=cluster.scheduler_address,
            progress=lambda *now: seen.append(now),
        )
    assert seen == [(n, 4) for n in (1, 2, 3, 4)]
    assert [r.get("labels") for r in records] == [r.get("labels") for r in alone]
    assert [r.get("error") for r in records] == [r.get("error") for r in alone] and "error" in records[2]
    for record, other in zip(records, alone, strict=True):
        if "error" not in record:
            np.testing.assert_array_equal(read_volume(record["output"]).data, read_volume(other["output"]).data)


def test_a_cluster_that_is_not_there_says_so(tmp_path: Path, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(VolumeError, match="no cluster at 'nonsense://x'"):
        segment_folder(scans, tmp_path / "out", Thresholds(), cluster="nonsense://x")
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(GvslZooError, match=r'a cluster needs distributed; pip install "gvsl-zoo\[cluster\]"'):
        segment_folder(scans, tmp_path / "out", Thresholds(), cluster="tcp://127.0.0.1:1")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("-o", "x.nii.gz"), 2, "this UNet has no trained segmentation head"),
        (("-o", "x.png"), 2, "the output 'x.png' is no label map"),
        (("-o", "x.nii.gz", "--cluster", "tcp://127.0.0.1:1"), 2, "--cluster with a folder of scans"),
        (("-o", "nowhere/x.nii.gz"), 1, "the folder 'nowhere' does not exist"),
    ],
)
def test_a_wrong_call_is_one_line(
    scans: Path, arguments: tuple[str, ...], code: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(scans)
    found, _, error = run("-i", "a.nii.gz", "--device", "cpu", *arguments)
    assert found == code and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "comment",
    [
        "[" * 100_000,
        json.dumps({"labels": [{"name": "a", "value": 1, "colour": [999, "a"]}]}),
        json.dumps({"labels": [{"name": "a", "value": 1, "colour": [999, 0, 0]}]}),
    ],
)
def test_a_header_that_tells_no_labels_tells_none(comment):
    assert comment_labels(Volume(np.zeros((2, 2, 2)), np.eye(4), comment=comment)) == ()


def test_a_name_from_a_header_is_fit_for_a_terminal():
    comment = json.dumps({"labels": [{"name": "\x1b]0;x\x07foie\n#" + "é" * 999, "value": 1, "colour": None}]})
    [label] = comment_labels(Volume(np.zeros((2, 2, 2)), np.eye(4), comment=comment))
    assert label.name.startswith("]0;xfoie#é") and len(label.name) == 200
