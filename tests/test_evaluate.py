"""Tests of the evaluation: metrics against their definitions, what is absent is said, and the command."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gvsl_zoo import load, save_pretrained
from gvsl_zoo.cli import main
from gvsl_zoo.errors import ArgumentError, GvslZooError, VolumeError
from gvsl_zoo.ledger import ledger_of
from gvsl_zoo.pretrain.anatomy import LABELS, sample_subject
from gvsl_zoo.transfer.cases import read_cases
from gvsl_zoo.transfer.evaluate import evaluate, lines, overlap
from gvsl_zoo.transfer.statistics import mean_interval
from gvsl_zoo.volume import Volume, write_volume

AFFINE = np.diag([1.5, 2.0, 4.0, 1.0])
SPACINGS = [(1.0, 1.0, 1.0), (0.8, 1.7, 5.0)]


def cube(start, size=10, shape=(24, 24, 24)):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(s, s + size) for s in start)] = True
    return mask


def blob(seed, shape=(14, 13, 11)):
    """A smooth random region."""
    noise = torch.randn(1, 1, *shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool3d(noise, 5, 1, 2)[0, 0].numpy() > 0.02


def distances_by_definition(a, b, spacing_mm):
    """From every boundary voxel of each mask to the nearest of the other, by comparing all pairs."""

    def boundary(mask):
        padded, inner, inside = np.pad(mask, 1), mask.copy(), (slice(1, -1),) * mask.ndim
        for axis in range(mask.ndim):
            for step in (-1, 1):
                inner &= np.roll(padded, step, axis)[inside]
        return np.argwhere(mask & ~inner) * spacing_mm

    apart = np.linalg.norm(boundary(a)[:, None] - boundary(b)[None], axis=-1)
    return apart.min(1), apart.min(0)


@pytest.mark.parametrize("spacing_mm", SPACINGS)
@pytest.mark.parametrize("seeds", [(0, 1), (2, 3), (4, 5)])
def test_the_metrics_are_those_of_their_definitions(seeds, spacing_mm):
    a, b = map(blob, seeds)
    there, back = distances_by_definition(a, b, spacing_mm)
    found = overlap(a, b, spacing_mm, tolerance_mm=1.6)
    assert found.dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert found.hd95_mm == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
    close = (there <= 1.6 + 1e-9).sum() + (back <= 1.6 + 1e-9).sum()
    assert found.surface_dice == pytest.approx(close / (len(there) + len(back)))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("spacing_mm", SPACINGS)
def test_a_shifted_cube_has_the_distance_of_its_shift_in_millimetres(axis, spacing_mm):
    start = [5, 5, 5]
    start[axis] += 3
    found = overlap(cube(start), cube([5, 5, 5]), spacing_mm, tolerance_mm=3 * spacing_mm[axis] + 0.01)
    assert found.dice == pytest.approx(0.7)
    assert found.hd95_mm == pytest.approx(3 * spacing_mm[axis])
    assert found.surface_dice == 1


def test_the_surface_dice_says_what_share_lies_within_the_tolerance():
    a, b = cube([5, 5, 5]), cube([5, 5, 7])
    moved = overlap(a, b, (1.0, 1.0, 1.0), tolerance_mm=1.0).surface_dice
    assert 0.5 < moved < 1  # four of six faces slide along themselves
    assert overlap(a, b, (1.0, 1.0, 0.5), tolerance_mm=1.0).surface_dice == 1


def test_a_perfect_prediction_is_perfect_and_the_metrics_are_symmetric():
    a, b = blob(0), blob(1)
    assert overlap(a, a, (1.0, 2.0, 3.0)) == ("both", 1.0, 0.0, 1.0)
    assert overlap(a, b, (1.0, 2.0, 3.0)) == pytest.approx(overlap(b, a, (1.0, 2.0, 3.0)))


def test_a_film_is_measured_in_its_plane():
    a, b = blob(0)[:, :, 4], blob(1)[:, :, 4]
    there, back = distances_by_definition(a, b, (0.5, 2.0))
    found = overlap(a[:, :, None], b[:, :, None], (0.5, 2.0, 9.0), tolerance_mm=0.6)
    assert found.hd95_mm == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
    assert found.surface_dice == pytest.approx(((there < 0.6).sum() + (back < 0.6).sum()) / (len(there) + len(back)))


@pytest.mark.parametrize("shape", [(1, 9, 1), (1, 1, 1)], ids=str)
def test_a_line_or_a_voxel_is_measured_too(shape):
    mask = np.ones(shape, bool)
    assert overlap(mask, mask, (1.0, 2.0, 3.0)) == ("both", 1.0, 0.0, 1.0)
    if shape[1] > 1:
        other = mask.copy()
        other[0, 0, 0] = False
        assert overlap(other, mask, (1.0, 2.0, 3.0), tolerance_mm=1.0).surface_dice == pytest.approx(16 / 17)


def test_what_is_absent_is_named_and_no_number_is_made_up():
    full, empty = blob(0), np.zeros_like(blob(0))
    assert overlap(empty, full, (1.0, 1.0, 1.0)) == ("missed", 0.0, None, 0.0)
    assert overlap(full, empty, (1.0, 1.0, 1.0)) == ("invented", 0.0, None, 0.0)
    assert overlap(empty, empty, (1.0, 1.0, 1.0)) == ("absent", None, None, None)


def write(folder, name, labels, affine=AFFINE):
    folder.mkdir(parents=True, exist_ok=True)
    write_volume(Volume(np.asarray(labels, np.uint8), affine), folder / f"{name}.nii.gz")


@pytest.fixture
def folders(tmp_path):
    """Three cases: one perfect, one with label 2 missed and 3 invented, one whose prediction is not there."""
    truth = cube([2, 2, 2]) + 2 * cube([13, 13, 13])
    for name in "abc":
        write(tmp_path / "truth", name, truth)
    write(tmp_path / "predicted", "a", truth)
    write(tmp_path / "predicted", "b", np.where(truth == 2, 3, truth))
    return tmp_path


def test_means_count_the_cases_that_have_a_value(folders):
    found = evaluate(folders / "predicted", folders / "truth")
    assert found.missing == ("c",) and found.labels == ("1", "2", "3")
    rows = found.summary["labels"]
    assert rows["1"]["dice"]["mean"] == 1 and rows["1"]["found"]["both"] == 2
    assert rows["2"]["dice"]["mean"] == 0.5 and rows["2"]["found"] == {
        "both": 1,
        "missed": 1,
        "invented": 0,
        "absent": 0,
    }
    assert rows["2"]["hd95_mm"] == {"mean": 0.0, "low": None, "high": None, "n": 1}
    assert rows["3"]["found"]["invented"] == 1 and rows["3"]["found"]["absent"] == 1
    assert rows["3"]["dice"] == {"mean": 0.0, "low": None, "high": None, "n": 1}
    assert rows["3"]["hd95_mm"]["mean"] is None
    assert found.summary["mean over labels"]["dice"]["mean"] == pytest.approx((1 + 1 / 3) / 2)


def test_named_labels_are_the_ones_scored(folders):
    found = evaluate(folders / "predicted", folders / "truth", labels={"liver": 1})
    assert {score.label for score in found.scores} == {"liver"}
    assert found.scores[0].reference_ml == pytest.approx(1000 * 1.5 * 2 * 4 / 1000)


def test_of_a_data_set_its_test_cases_count_under_their_names(folders):
    scans, predicted = folders / "set", folders / "predicted"
    for part, names in (("Tr", "ab"), ("Ts", "c")):
        for name in names:
            write(scans / f"labels{part}", name, cube([2, 2, 2]))
            write(scans / f"images{part}", f"{name}_0000", cube([2, 2, 2]))
    (scans / "dataset.json").write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "liver": 1}, "file_ending": ".nii.gz"})
    )
    write(predicted, "c_0000", cube([2, 2, 2]))  # as gvsl-zoo segment names it
    assert [(s.case, s.label, s.overlap.dice) for s in evaluate(predicted, scans).scores] == [("c", "liver", 1.0)]


def test_scans_of_one_subject_are_averaged_before_the_interval_where_the_data_set_knows_subjects(folders):
    truth = folders / "truth"
    write(folders / "predicted", "c", cube([4, 2, 2]))
    rows = [f"truth/{name}.nii.gz,truth/{name}.nii.gz,{name},{'other' if name == 'c' else 'one'}" for name in "abc"]
    (folders / "cases.csv").write_text("\n".join(["image,label,case,subject", *rows]))
    found, unknown = (
        evaluate(folders / "predicted", references, labels={"one": 1, "two": 2})
        for references in (read_cases(folders / "cases.csv", labels={"one": 1, "two": 2}), truth)
    )
    values = {(score.case, score.label): score.overlap.dice for score in found.scores}
    of_subjects = [(values["a", "two"] + values["b", "two"]) / 2, values["c", "two"]]
    assert found.summary["labels"]["two"]["dice"] == mean_interval(of_subjects, (0, 1))._asdict()
    of_cases = [(values[case, "one"] + values[case, "two"]) / 2 for case in "abc"]
    of_subjects = [(of_cases[0] + of_cases[1]) / 2, of_cases[2]]
    assert found.summary["mean over labels"]["dice"] == pytest.approx(mean_interval(of_subjects, (0, 1))._asdict())
    assert (found.summary["cases"], found.summary["subjects"]) == (3, 2)
    assert unknown.summary["mean over labels"]["dice"] == pytest.approx(mean_interval(of_cases, (0, 1))._asdict())


def test_a_prediction_on_another_grid_is_refused_by_the_name_of_its_case(folders):
    moved = AFFINE.copy()
    moved[0, 3] = 1.0
    write(folders / "predicted", "c", cube([2, 2, 2]), moved)
    with pytest.raises(VolumeError, match=r"the prediction 'c.nii.gz' lies up to 1 mm beside the reference"):
        evaluate(folders / "predicted", folders / "truth")
    (folders / "predicted/c.nii.gz").unlink()
    write(folders / "predicted", "c", cube([2, 2, 2], shape=(24, 24, 20)))
    with pytest.raises(VolumeError, match=r"the prediction 'c.nii.gz' has \(24, 24, 20\) voxels"):
        evaluate(folders / "predicted", folders / "truth")


def test_probabilities_are_not_taken_for_labels(folders):
    write_volume(Volume(np.full((24, 24, 24), 0.4, np.float32), AFFINE), folders / "predicted/c.nii.gz")
    with pytest.raises(VolumeError, match="holds fractions, not labels"):
        evaluate(folders / "predicted", folders / "truth")


def test_hidden_files_are_no_cases(folders):
    for folder in ("truth", "predicted"):
        (folders / folder / "._a.nii.gz").write_bytes(b"of macOS")
    assert {score.case for score in evaluate(folders / "predicted", folders / "truth").scores} == {"a", "b"}


def test_names_that_do_not_meet_are_shown(tmp_path):
    write(tmp_path / "truth", "a", cube([2, 2, 2]))
    write(tmp_path / "predicted", "b", cube([2, 2, 2]))
    with pytest.raises(ArgumentError, match="has b, the references are a"):
        evaluate(tmp_path / "predicted", tmp_path / "truth")


def test_two_files_belong_together_whatever_their_names(tmp_path):
    write(tmp_path, "a", cube([2, 2, 2]))
    write(tmp_path, "b", cube([3, 2, 2]))
    found = evaluate(tmp_path / "b.nii.gz", tmp_path / "a.nii.gz")
    assert [(s.case, s.overlap.dice) for s in found.scores] == [("a", pytest.approx(0.9))]


def test_the_command_scores_synthetic_organs_and_its_exit_code_tells_of_a_missing_case(tmp_path):
    for seed, name in enumerate("ab"):
        labels = sample_subject((24, 24, 28), torch.Generator().manual_seed(seed), (10.0, 10.0, 10.0)).labels
        write(tmp_path / "truth", name, labels.permute(2, 1, 0), np.diag([10.0, 10.0, 10.0, 1.0]))
        if name == "a":
            write(tmp_path / "predicted", name, labels.permute(2, 1, 0), np.diag([10.0, 10.0, 10.0, 1.0]))
    named = ",".join(f"{organ}={LABELS[organ]}" for organ in ("liver", "aorta"))
    words = ["evaluate", "--predictions", str(tmp_path / "predicted"), "--references", str(tmp_path / "truth")]
    result = CliRunner().invoke(main, [*words, "--labels", named, "-o", str(tmp_path / "out")])
    assert result.exit_code == 1, result.output
    assert "liver" in result.output and "without a prediction: b" in result.output
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["missing"] == ["b"] and summary["labels"]["aorta"]["dice"]["mean"] == 1
    with (tmp_path / "out/scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(r["case"], r["label"], r["found"], r["hd95_mm"]) for r in rows] == [
        ("a", "liver", "both", "0.0"),
        ("a", "aorta", "both", "0.0"),
    ]
    assert (tmp_path / "out/scores.png").read_bytes().startswith(b"\x89PNG")


def test_a_label_that_a_data_set_calls_by_its_number_is_scored(tmp_path):
    values = (cube([2, 2, 2]) + 2 * cube([12, 12, 12])).astype(np.uint8)
    write(tmp_path / "set/labelsTr", "a", values)
    write(tmp_path / "set/imagesTr", "a_0000", values)
    named = {"labels": {"background": 0, "1": 1, "tumour": 2}, "channel_names": {"0": "CT"}, "file_ending": ".nii.gz"}
    (tmp_path / "set/dataset.json").write_text(json.dumps(named))
    write(tmp_path / "predicted", "a", values)
    assert evaluate(tmp_path / "predicted", tmp_path / "set").labels == ("1", "tumour")


def test_where_a_data_set_names_no_labels_those_of_the_predictions_count(tmp_path):
    """As after `finetune --labels`, for which other values are background."""
    values = (cube([2, 2, 2]) + 2 * cube([12, 12, 12])).astype(np.uint8)
    write(tmp_path / "set/labels", "a", values)
    write(tmp_path / "set/images", "a", values)
    comment = json.dumps({"labels": [{"name": "cube", "value": 1, "colour": None}]})
    (tmp_path / "predicted").mkdir()
    write_volume(Volume(values % 2, AFFINE, comment=comment), tmp_path / "predicted/a.nii.gz")
    for references in (tmp_path / "set", tmp_path / "set/labels"):
        assert evaluate(tmp_path / "predicted", references).labels == ("cube",)
    assert evaluate(tmp_path / "predicted", tmp_path / "set", labels={"other": 2}).labels == ("other",)
    with pytest.raises(ArgumentError, match="nowhere does not exist"):
        evaluate(tmp_path / "nowhere", tmp_path / "set")


# --- What the model has seen ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two cases, each a scan, its labels and the same as prediction; and a model that saw the scan of b."""
    folder, random = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in "ab":
        write_volume(Volume(random.integers(-1024, 1024, (24, 24, 24)).astype(np.int16), AFFINE), _made(folder, name))
        write(folder / "labels", name, cube([5, 5, 5]))
    model = load("gvsl-unet-ct-nano")
    entry = replace(model.entry, ledger=ledger_of([folder / "images/b.nii.gz"]))
    save_pretrained(model, folder / "model", entry=entry)
    return folder


def _made(folder, name):
    (folder / "images").mkdir(exist_ok=True)
    return folder / f"images/{name}.nii.gz"


def test_cases_that_the_model_has_seen_are_refused_and_allowed_ones_are_reported(data):
    words = {"predictions": data / "labels", "references": data, "model": data / "model"}
    with pytest.raises(ArgumentError, match=r"has seen 1 of 2 test cases in training: .*images/b\.nii\.gz"):
        evaluate(**words)
    found = evaluate(**words, allow_overlap=True)
    assert found.seen == ("b",) and found.to_dict()["seen in training"] == ["b"]
    assert lines(found)[-1] == "the model saw 1 of 2 cases in training: b"
    new = evaluate(data / "labels", data, model="gvsl-unet-ct-nano")
    assert new.seen == () and len(lines(new)) == len(lines(found)) - 1
    assert evaluate(data / "labels", data).seen is None


def test_scans_are_known_from_what_segment_wrote_beside_its_label_maps(data, tmp_path):
    for name in "ab":
        write(tmp_path, name, cube([5, 5, 5]))
    words = {"predictions": tmp_path, "references": data / "labels", "model": data / "model"}
    with pytest.raises(ArgumentError, match=r"the scans of a, b are not known, and so not whether .* has seen them"):
        evaluate(**words)
    for name in "ab":
        (tmp_path / f"{name}.json").write_text(json.dumps({"input": str(data / f"images/{name}.nii.gz")}))
    assert evaluate(**words, allow_overlap=True).seen == ("b",)


def test_a_classification_of_scans_that_the_model_has_seen_is_refused_too(data, tmp_path):
    (tmp_path / "p.csv").write_text("case,healthy,ill\na,0.2,0.8\nb,0.9,0.1\n")
    rows = [f"{data / 'images'}/{name}.nii.gz,{label}" for name, label in (("a", "ill"), ("b", "healthy"))]
    (tmp_path / "r.csv").write_text("\n".join(["image,label", *rows]))
    words = ["evaluate", "--predictions", str(tmp_path / "p.csv"), "--references", str(tmp_path / "r.csv")]
    words += ["--task", "classification", "--model", str(data / "model"), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and "images/b.nii.gz" in result.output and not (tmp_path / "out").exists()
    result = CliRunner().invoke(main, [*words, "--allow-overlap", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["seen in training"] == ["b"]


@pytest.mark.filterwarnings("ignore::gvsl_zoo.volume.InputWarning")
def test_nothing_outside_a_mask_is_background(tmp_path):
    mask = cube([2, 2, 2])
    write(tmp_path / "found", "a", mask)
    write_volume(Volume(np.where(mask, 1, np.nan).astype(np.float32), AFFINE), tmp_path / "a.nii.gz")
    assert evaluate(tmp_path / "found", tmp_path / "a.nii.gz").scores[0].overlap.dice == 1


@pytest.mark.parametrize("swapped", [False, True])
def test_a_picture_has_the_millimetres_of_the_film_that_it_is_compared_with(tmp_path, swapped):
    image = pytest.importorskip("PIL.Image")
    mask = cube([2, 2], shape=(24, 24)).astype(np.uint8)
    image.fromarray(mask.T).save(tmp_path / "a.png")
    write(tmp_path / "other", "a", np.roll(mask, 3, 0)[:, :, None], np.diag([0.5, 0.5, 1, 1]))
    files = [tmp_path / "other", tmp_path / "a.png"]
    [score] = evaluate(*files[:: -1 if swapped else 1]).scores
    assert score.overlap.hd95_mm == pytest.approx(1.5) and score.reference_ml == pytest.approx(0.025)


# --- Classification -------------------------------------------------------------------------------------------------


def tables(folder, probabilities, truth):
    (folder / "p.csv").write_text(
        "case,healthy,ill\n" + "".join(f"c{i},{1 - p},{p}\n" for i, p in enumerate(probabilities))
    )
    (folder / "r.csv").write_text("case,label\n" + "".join(f"c{i},{t}\n" for i, t in enumerate(truth)))
    return folder / "p.csv", folder / "r.csv"


def test_auc_is_the_share_of_pairs_in_order_ties_counting_half(tmp_path):
    random = np.random.default_rng(0)
    scores, ill = random.integers(0, 10, 40) / 10, random.random(40) < 0.4
    found = evaluate(*tables(tmp_path, scores, ["ill" if i else "healthy" for i in ill]), task="classification")
    above, equal = (f(scores[ill][:, None], scores[~ill]).mean() for f in (np.greater, np.equal))
    for name in ("healthy", "ill"):
        assert found.summary["labels"][name]["auc"]["mean"] == pytest.approx(above + equal / 2)
    assert found.summary["accuracy"]["mean"] == pytest.approx(((scores > 0.5) == ill).mean())


def test_numbers_in_the_references_are_named_by_the_labels(tmp_path):
    predictions, references = tables(tmp_path, [0.2, 0.7, 0.6], [0, 1, 0])
    for name in "abc":
        write(tmp_path, name, cube([2, 2, 2]))
    named = {"task": "classification", "labels": {"healthy": 0, "ill": 1}}
    tall = evaluate(predictions, references, **named)
    references.write_text("case,image,label\nc0,a.nii.gz,0\nc1,b.nii.gz,1\nc2,c.nii.gz,0\n")
    assert evaluate(predictions, references, **named) == tall
    assert tall.summary["accuracy"]["mean"] == pytest.approx(2 / 3) and tall.summary["labels"]["ill"]["cases"] == 1


def test_of_a_table_of_scans_and_classes_the_test_cases_count_under_whatever_columns(tmp_path):
    for name in "ab":
        write(tmp_path, name, cube([2, 2, 2]))
    rows = "c0,a.nii.gz,healthy,train\nc1,b.nii.gz,ill,test\n"
    predictions, references = tables(tmp_path, [0.9, 0.8], ["healthy", "ill"])
    references.write_text("case,image,label,split\n" + rows)
    found = evaluate(predictions, references, task="classification")
    assert list(found.probabilities) == ["c1"] and found.summary["accuracy"]["mean"] == 1


@pytest.mark.parametrize("which", [0, 1], ids=["predictions", "references"])
def test_a_mark_at_the_beginning_of_a_table_is_no_part_of_its_first_column(tmp_path, which):
    files = tables(tmp_path, [0.2, 0.7], ["healthy", "ill"])
    files[which].write_text(files[which].read_text(), encoding="utf-8-sig")
    assert evaluate(*files, task="classification").summary["accuracy"]["mean"] == 1


def test_without_monai_nothing_is_read_and_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "monai", None)
    with pytest.raises(GvslZooError, match=r'scoring needs monai; pip install "gvsl-zoo\[train\]"'):
        evaluate(tmp_path / "nowhere", tmp_path / "nowhere")


def test_a_class_without_a_case_has_no_auc(tmp_path):
    found = evaluate(*tables(tmp_path, [0.2, 0.7], ["ill", "ill"]), task="classification")
    assert found.summary["labels"]["ill"]["auc"]["mean"] is None and found.summary["mean auc"] is None


@pytest.mark.parametrize("wrong", ["nan", "1.2", "", "yes"])
def test_what_is_no_probability_is_refused_by_the_name_of_its_case(tmp_path, wrong):
    predictions, references = tables(tmp_path, [0.2], ["ill", "ill"])
    predictions.write_text(predictions.read_text() + f"c1,0.5,{wrong}\n")
    with pytest.raises(ArgumentError, match=r"case 'c1' has no probabilities"):
        evaluate(predictions, references, task="classification")


def test_the_command_scores_classes(tmp_path):
    predictions, references = tables(tmp_path, [0.2, 0.7, 0.6, 0.1], ["healthy", "ill", "healthy", "healthy"])
    words = ["evaluate", "--predictions", str(predictions), "--references", str(references), "--task", "classification"]
    result = CliRunner().invoke(main, [*words, "-o", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.output)
    assert printed["accuracy"]["mean"] == 0.75 and printed["labels"]["ill"]["auc"]["mean"] == 1
    assert {path.name for path in Path(tmp_path / "out").iterdir()} == {"scores.csv", "summary.json", "scores.png"}


def test_the_exact_name_of_a_case_goes_before_that_of_a_first_channel(folders):
    write(folders / "predicted", "a_0000", 0 * cube([2, 2, 2]))  # the image, say, beside its prediction
    assert evaluate(folders / "predicted", folders / "truth").scores[0].overlap.dice == 1


def test_the_background_is_no_label_whoever_names_it(folders):
    found = evaluate(folders / "predicted", folders / "truth", labels={"background": 0, "one": 1})
    assert found.labels == ("one",)


@pytest.mark.parametrize(
    ("references", "message"),
    [
        ("case,label\nc0,ill\nc1,\n", r"c1 without a label; name the true class of each"),
        ("case,label\nc0,ill\nc0,healthy\n", r"r.csv has several rows of c0; keep one of each"),
        ("", r"lacks the column image or label|has no rows"),
    ],
    ids=["no label", "twice", "empty"],
)
def test_a_table_of_classes_that_says_nothing_or_two_things_of_a_case_is_refused(tmp_path, references, message):
    files = tables(tmp_path, [0.2, 0.7], ["ill", "ill"])
    files[1].write_text(references)
    with pytest.raises(ArgumentError, match=message):
        evaluate(*files, task="classification")


def test_space_about_a_name_is_no_part_of_it_and_one_class_can_be_scored(tmp_path):
    predictions, references = tables(tmp_path, [0.2, 0.7], ["ill", "ill"])
    references.write_text("case,label\n c0 , ill\nc1,ill \n")
    assert evaluate(predictions, references, task="classification").missing == ()
    for name in "ab":
        write(tmp_path, name, cube([2, 2, 2]))
    references.write_text("case,image,label\nc0,a.nii.gz,ill\nc1,b.nii.gz,ill\n")
    assert evaluate(predictions, references, task="classification").summary["accuracy"]["mean"] == 0.5


def test_the_command_replaces_no_input(tmp_path):
    predictions, references = tables(tmp_path, [0.2, 0.7], ["ill", "ill"])
    predictions = predictions.rename(tmp_path / "scores.csv")
    words = ["evaluate", "--predictions", str(predictions), "--references", str(references), "-o", str(tmp_path)]
    before = predictions.read_bytes()
    result = CliRunner().invoke(main, [*words, "--task", "classification"])
    assert result.exit_code == 2 and "would replace the input" in result.stderr and predictions.read_bytes() == before
