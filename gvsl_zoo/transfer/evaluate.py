"""Predictions against references: Dice, HD95 and surface Dice a case and label; accuracy and AUC of classes."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import ArgumentError, GvslZooError, listed, needs
from ..film import on_film, read_labels
from ..inference.segment import comment_labels
from ..ledger import check_unseen
from ..report import classes_picture, scores_picture
from ..volume import Volume, laid_on
from ..weights import write_whole
from ..zoo import load
from .cases import ENDINGS, Case, Cases, named_files, read_cases, without_ending
from .statistics import Interval, auc_interval, mean_interval, proportion_interval, subject_means

TOLERANCE_MM = 2.0  # of the surface Dice
METRICS = {"dice": (0.0, 1.0), "hd95_mm": (0.0, math.inf), "surface_dice": (0.0, 1.0)}  # and their limits
FOUND = ("both", "missed", "invented", "absent")
WRITTEN = ("scores.csv", "summary.json", "scores.png")
Scans = dict[str, tuple[Path, ...]]  # of a case, a file a channel


class Overlap(NamedTuple):
    """How well two masks agree; what is not defined is None.

    found: "both", "missed" (in the reference alone), "invented" (in the prediction alone) or "absent" (in neither).
    dice, surface_dice: in [0, 1]; 0 when missed or invented, None when absent.
    hd95_mm: None unless found in both, for lack of a surface to measure to.
    """

    found: str
    dice: float | None
    hd95_mm: float | None
    surface_dice: float | None


ABSENT = Overlap("absent", None, None, None)


class Score(NamedTuple):
    """One label of one case, and the volumes of its masks."""

    case: str
    label: str
    overlap: Overlap
    reference_ml: float
    prediction_ml: float


@dataclass(frozen=True)
class Evaluation:
    """What came out, case by case and in sum.

    labels: those scored, in order; of a classification the classes.
    summary: see `summarise` and `summarise_classes`.
    missing: cases without a prediction; they are in no mean.
    seen: cases whose scans the model saw in training; None where this was not looked at.
    scores: of a segmentation, one a case and label.
    probabilities: of a classification, by case: the true class and the probability of each class.
    """

    task: str
    labels: tuple[str, ...]
    summary: dict[str, Any]
    missing: tuple[str, ...]
    seen: tuple[str, ...] | None = None
    scores: tuple[Score, ...] = ()
    probabilities: dict[str, tuple[str, tuple[float, ...]]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        facts = {"task": self.task, **self.summary, "missing": list(self.missing)}
        return facts if self.seen is None else facts | {"seen in training": list(self.seen)}

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write scores.csv (a row a case and label, or a case), summary.json and, with matplotlib, scores.png."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "scores.csv", self._table().encode(errors="surrogateescape"))
            write_whole(folder / "summary.json", (json.dumps(self.to_dict(), indent=2) + "\n").encode())
        except OSError as error:
            cause = f"cannot write to {folder}: {error.strerror or error}"
            raise GvslZooError(cause, "choose another folder, or free space") from error
        if find_spec("matplotlib"):
            picture = scores_picture if self.task == "segmentation" else classes_picture
            picture(self, folder / "scores.png")

    def _table(self) -> str:
        if self.task == "segmentation":
            rows: list[Sequence[Any]] = [("case", "label", *Overlap._fields, "reference_ml", "prediction_ml")]
            rows += [(s.case, s.label, *s.overlap, s.reference_ml, s.prediction_ml) for s in self.scores]
        else:
            rows = [("case", "truth", *self.labels)]
            rows += [(case, truth, *row) for case, (truth, row) in self.probabilities.items()]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)  # None is an empty field
        return text.getvalue()


def evaluate(
    predictions: str | os.PathLike[str],
    references: str | os.PathLike[str] | Cases,
    *,
    task: str = "segmentation",
    labels: Mapping[str, int] | None = None,
    tolerance_mm: float = TOLERANCE_MM,
    model: str | os.PathLike[str] | None = None,
    allow_overlap: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score the predictions of a segmentation or of a classification.

    Args:
        predictions: a label file, or a folder of them named as the cases are; of a classification a CSV with the column
            `case` and a column of probabilities a class.
        references: a label file, a folder of them, or a data set (see `read_cases`), of which the test cases count if
            it has any, otherwise all that have a label. Of a classification a CSV with the columns `case` and `label`
            and none `image`, or a data set.
        labels: values in label files by name: these are scored, and other values are background. Default: those that
            the data set names, or those that the first prediction names in its header, or every value that occurs. Of
            a classification names of the numbers that the references have for classes.
        tolerance_mm: how far apart surfaces may lie that the surface Dice counts as the same.
        model: whose predictions these are, as `load` takes it. Its training saw none of the scans then, as far as its
            ledger knows; the scans are those of the data set, or those that `segment` noted beside its label maps.
        allow_overlap: score all the same, and say which cases were seen.
        progress: called with (cases done, cases in all).

    Errors: VolumeError for a file that cannot be read, or the two of a case on different grids; ArgumentError for what
        does not fit together, and for a case that the model has seen; GvslZooError without MONAI and SciPy.
    """
    needs("train", "scoring", "monai", "scipy")
    if not 0 <= tolerance_mm < math.inf:
        raise ArgumentError(f"a tolerance of {tolerance_mm} mm", "give a length in millimetres")
    if task == "classification":
        truth, scans = _true_classes(references, labels)
        seen = _seen(model, scans, truth, allow_overlap)
        return replace(_evaluate_classes(Path(predictions), truth), seen=seen)
    files, known, scans, subjects = _reference_files(references, labels)
    pairs, missing = _pairs(Path(predictions), files)
    seen = _seen(model, _noted_scans(pairs) | scans, pairs, allow_overlap)
    scores: dict[tuple[str, str], Score] = {}
    for done, (case, (prediction, reference)) in enumerate(pairs.items(), 1):
        masks = read_labels(prediction), read_labels(reference)
        if done == 1 and not known:
            known = {label.name: label.value for label in comment_labels(masks[0]) if label.value}
        for score in _score_case(case, *masks, known, tolerance_mm):
            scores[case, score.label] = score
        if progress:
            progress(done, len(pairs))
    names = tuple(known or sorted({name for _, name in scores}, key=int))
    if not names:
        raise ArgumentError("every voxel of every case is background", "check that these are label files")
    table = tuple(scores.get(key) or Score(*key, ABSENT, 0.0, 0.0) for key in itertools.product(pairs, names))
    summary = summarise(table, names, tolerance_mm, subjects)
    return Evaluation("segmentation", names, summary, missing, seen, table)


def overlap(
    prediction: np.ndarray, reference: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float = TOLERANCE_MM
) -> Overlap:
    """Dice, HD95 and surface Dice of two masks, bool of one shape, by MONAI; a mask of one slice is taken as 2D.

    Surfaces are the boundary voxels of a mask (those that one erosion takes away). HD95 is the larger of the two
    directed 95th percentiles; the surface Dice is the share of both surfaces within `tolerance_mm` of the other.
    """
    found = FOUND[2 * (not reference.any()) + (not prediction.any())]
    if found != "both":
        return ABSENT if found == "absent" else Overlap(found, 0.0, None, 0.0)
    from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice

    flat = [axis for axis, size in enumerate(reference.shape) if size == 1][: reference.ndim - 2]
    spacing_mm = np.delete(spacing_mm, flat).tolist()
    prediction, reference = prediction.squeeze(tuple(flat)), reference.squeeze(tuple(flat))
    box = _bounding_box(prediction | reference)
    a, b = (torch.from_numpy(np.ascontiguousarray(mask[box]))[None, None] for mask in (prediction, reference))
    tolerance_mm *= 1 + 1e-5  # MONAI's distances are float32, and one of exactly the tolerance is within it
    of_mask: dict[str, Any] = {"include_background": True}  # there is one channel, and it is the label
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 warns of its own calls
        dice = compute_dice(a, b, **of_mask)
        hd95 = compute_hausdorff_distance(a, b, percentile=95, spacing=spacing_mm, **of_mask)
        surface = compute_surface_dice(a, b, [tolerance_mm], spacing=spacing_mm, **of_mask)
    return Overlap(found, dice.item(), hd95.item(), surface.item())


def summarise(
    scores: Sequence[Score], labels: Sequence[str], tolerance_mm: float, subjects: Mapping[str, str]
) -> dict[str, Any]:
    """Means over subjects with their 95 % intervals, a label and over labels; in how many cases a label was found.

    The mean over labels is taken in each case first, then that over the cases of a subject. Each metric counts the
    subjects in which it is defined (`n`): a label missed or invented is 0 in the Dice and does not occur in HD95, which
    is why `found` belongs beside it.

    Args:
        subjects: by case; of one that is not there it is taken for the only scan, and the intervals hold only then.
    """

    def intervals(some: Sequence[Score]) -> dict[str, Any]:
        return {metric: _interval(some, metric, subjects)._asdict() for metric in METRICS}

    rows = {}
    for name in labels:
        own = [score for score in scores if score.label == name]
        counts = Counter(score.overlap.found for score in own)
        rows[name] = {"found": {found: counts[found] for found in FOUND}} | intervals(own)
    cases = {score.case for score in scores}
    return {
        "cases": len(cases),
        "subjects": len({subjects.get(case, case) for case in cases}),
        "tolerance_mm": tolerance_mm,
        "mean over labels": intervals(scores),
        "labels": rows,
    }


def _interval(scores: Sequence[Score], metric: str, subjects: Mapping[str, str]) -> Interval:
    by_case: dict[str, list[float]] = {}
    for score in scores:
        if (value := getattr(score.overlap, metric)) is not None:
            by_case.setdefault(score.case, []).append(value)
    means = {case: float(np.mean(values)) for case, values in by_case.items()}
    return mean_interval(subject_means(means, subjects), METRICS[metric])


def lines(evaluation: Evaluation) -> list[str]:
    """The summary as a table, a line each, and whether the model saw test cases in training."""
    seen = evaluation.seen or ()
    told = f"the model saw {len(seen)} of {evaluation.summary['cases']} cases in training: {listed(seen)}"
    return [*_table(evaluation), *([told] if seen else [])]


def _table(evaluation: Evaluation) -> list[str]:
    summary = evaluation.summary
    width = max(map(len, ("mean over labels", *evaluation.labels)))
    if evaluation.task == "classification":
        rows = [(f"{name} ({row['cases']})", "AUC", row["auc"]) for name, row in summary["labels"].items()]
        return [f"{n:<{width + 8}}  {m} {_cell(i)}" for n, m, i in [("all", "accuracy", summary["accuracy"]), *rows]]
    heads = ("Dice", "HD95, mm", f"surface Dice, {summary['tolerance_mm']:g} mm")
    out = [f"{'':<{width}}  " + "".join(f"{head:<24}" for head in heads) + "both, missed, invented, absent"]
    for name, row in (*summary["labels"].items(), ("mean over labels", summary["mean over labels"])):
        counts = ", ".join(str(row["found"][found]) for found in FOUND) if "found" in row else ""
        out.append(f"{name:<{width}}  " + "".join(f"{_cell(row[metric]):<24}" for metric in METRICS) + counts)
    return [line.rstrip() for line in out]


def _cell(interval: Mapping[str, Any]) -> str:
    """`0.912 [0.880, 0.944]`"""
    if interval["mean"] is None:
        return "undefined"
    if interval["low"] is None:
        return f"{interval['mean']:.3f}"
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


# --- Files ----------------------------------------------------------------------------------------------------------


def _reference_files(
    references: str | os.PathLike[str] | Cases, labels: Mapping[str, int] | None
) -> tuple[dict[str, Path], dict[str, int], Scans, dict[str, str]]:
    """Label files by case, the values to score by name, and scans and subjects by case, as far as these are known."""
    if not isinstance(references, Cases):
        path = Path(references)
        folders = any((path / name).is_dir() for name in ("imagesTr", "images"))  # of a data set
        if not folders and (files := _label_files(path)):
            return files, {name: value for name, value in (labels or {}).items() if value}, {}, {}
        references = read_cases(path, labels=labels)
    cases = _to_score(references, Path)
    files = {case.name: Path(str(case.label)) for case in cases}
    named = labels or ({label.name: label.value for label in references.labels} if references.named else {})
    scans = {case.name: case.images for case in cases}
    subjects = {case.name: case.subject for case in cases}
    return files, {name: value for name, value in named.items() if value}, scans, subjects  # 0 is background


def _to_score(data: Cases, kind: type) -> list[Case]:
    """The test cases with a label of this kind, or all with one if there are none."""
    labelled = [case for case in data if isinstance(case.label, kind)]
    return [case for case in labelled if case.split == "test"] or labelled


def _noted_scans(pairs: Mapping[str, tuple[Path, Path]]) -> Scans:
    """The scans that `segment` noted beside its label maps, by case."""
    scans: Scans = {}
    for case, (prediction, _) in pairs.items():
        name, _ = without_ending(prediction.name)
        with suppress(OSError, ValueError, KeyError, TypeError):
            noted = json.loads(prediction.with_name(f"{name}.json").read_bytes())
            paths = tuple(map(Path, noted.get("channels") or [noted["input"]]))
            if all(path.exists() for path in paths):
                scans[case] = paths
    return scans


def _seen(
    model: str | os.PathLike[str] | None, scans: Scans, cases: Collection[str], allow: bool
) -> tuple[str, ...] | None:
    """Of the cases those that the model saw in training; None without a model."""
    if model is None:
        return None
    if unknown := [case for case in cases if case not in scans]:
        cause = f"the scans of {listed(unknown)} are not known, and so not whether {model} has seen them"
        raise ArgumentError(cause, "give the data set as references, or leave the model out")
    entry: Any = load(model).entry
    found = check_unseen({case: scans[case] for case in cases}, {entry.name: entry.ledger}, allow=allow)
    return found.get(entry.name, ())


def _label_files(path: Path) -> dict[str, Path]:
    """Label files by name: one, those directly in a folder, or none if there are none."""
    if path.is_dir():
        return named_files(path, ENDINGS)
    name, ending = without_ending(path.name)
    return {name: path} if ending in ENDINGS else {}


def _pairs(predictions: Path, references: dict[str, Path]) -> tuple[dict[str, tuple[Path, Path]], tuple[str, ...]]:
    """(prediction, reference) by case, and the cases without a prediction; two single files belong together."""
    if not predictions.exists():
        raise ArgumentError(f"{predictions} does not exist", "give the label maps that segment wrote")
    files = _label_files(predictions)
    if predictions.is_file() and len(references) == 1:
        files = dict(zip(references, files.values(), strict=True))
    files = {name.removesuffix("_0000"): path for name, path in files.items()} | files  # or as nnU-Net's first channel
    pairs = {case: (files[case], reference) for case, reference in references.items() if case in files}
    if not pairs:
        found, wanted = (listed(sorted(names)) or "nothing" for names in (files, references))
        raise ArgumentError(
            f"no prediction belongs to a reference: {predictions} has {found}, the references are {wanted}",
            "name the predictions as the cases are, NAME.nii.gz",
        )
    return pairs, tuple(case for case in references if case not in pairs)


def _score_case(
    case: str, prediction: Volume, reference: Volume, known: Mapping[str, int], tolerance_mm: float
) -> list[Score]:
    if (reference.path or Path()).suffix.lower() == ".png":  # which does not know its millimetres
        reference = on_film(reference, prediction)
    elif (prediction.path or Path()).suffix.lower() == ".png":
        prediction = on_film(prediction, reference)
    prediction = laid_on(prediction, "the prediction", reference, "the reference")
    if not known:
        values = np.union1d(np.unique(prediction.data), np.unique(reference.data))
        known = {str(int(value)): int(value) for value in values if value}
    voxel_ml = abs(float(np.linalg.det(reference.affine[:3, :3]))) / 1000
    scores = []
    for name, value in known.items():
        predicted, true = np.asarray(prediction.data == value), np.asarray(reference.data == value)
        volumes = (float(mask.sum()) * voxel_ml for mask in (true, predicted))
        scores.append(Score(case, name, overlap(predicted, true, reference.spacing_mm, tolerance_mm), *volumes))
    return scores


def _bounding_box(mask: np.ndarray) -> tuple[slice, ...]:
    """The smallest box around a mask that is not empty: beyond it there is nothing to measure."""
    box = []
    for axis in range(mask.ndim):
        inside = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        box.append(slice(int(inside[0]), int(inside[-1]) + 1))
    return tuple(box)


# --- Classification -------------------------------------------------------------------------------------------------


def _evaluate_classes(predictions: Path, truth: Mapping[str, str]) -> Evaluation:
    used = sorted(set(truth.values()))
    header, rows = _read_table(predictions)
    classes = tuple(name for name in header if name != "case")
    if "case" not in header or len(classes) < 2 or not set(used) <= set(classes):
        raise ArgumentError(
            f"{predictions} has the columns {', '.join(header)}, the references the classes {', '.join(used)}",
            "give the column `case` and a column of probabilities a class, under its name",
        )
    probabilities = {}
    for row in rows:
        try:
            values = tuple(float(row[name]) for name in classes)
        except (TypeError, ValueError):
            values = (math.nan,)
        if not all(0 <= value <= 1 for value in values):  # a NaN also fails
            raise ArgumentError(f"{predictions}: case {row['case']!r} has no probabilities", "give numbers in [0, 1]")
        if row["case"] in truth:
            probabilities[row["case"]] = (truth[row["case"]], values)
    if not probabilities:
        raise ArgumentError(f"no case of {predictions} is among the references", "name the cases as the references do")
    missing = tuple(case for case in truth if case not in probabilities)
    summary = summarise_classes(probabilities, classes)
    return Evaluation("classification", classes, summary, missing, probabilities=probabilities)


def summarise_classes(
    probabilities: Mapping[str, tuple[str, Sequence[float]]], classes: Sequence[str]
) -> dict[str, Any]:
    """Accuracy of the most probable class, and each class's AUC against the others, with 95 % score intervals.

    A class of which there is no case, or nothing else, has no AUC (None). The intervals hold for one scan a subject.
    """
    from monai.metrics import compute_roc_auc

    truth = np.array([classes.index(true) for true, _ in probabilities.values()])
    values = torch.tensor([row for _, row in probabilities.values()], dtype=torch.float64)
    correct = int((values.argmax(1).numpy() == truth).sum())
    rows: dict[str, Any] = {}
    for index, name in enumerate(classes):
        is_class = truth == index
        positives, negatives = int(is_class.sum()), int((~is_class).sum())
        area = Interval(None, None, None, len(truth))
        if positives and negatives:
            auc = compute_roc_auc(values[:, index], torch.from_numpy(is_class).int())
            area = auc_interval(float(np.asarray(auc)), positives, negatives)
        rows[name] = {"cases": positives, "auc": area._asdict()}
    areas = [row["auc"]["mean"] for row in rows.values() if row["auc"]["mean"] is not None]
    return {
        "cases": len(truth),
        "accuracy": proportion_interval(correct, len(truth))._asdict(),
        "mean auc": float(np.mean(areas)) if areas else None,
        "labels": rows,
    }


def _true_classes(
    references: str | os.PathLike[str] | Cases, labels: Mapping[str, int] | None
) -> tuple[dict[str, str], Scans]:
    """The true class by case, and the scans by case, as far as these are known.

    Args:
        labels: names of the numbers that a table has for classes.
    """
    if not isinstance(references, Cases):
        path = Path(references)
        if path.is_file():
            header, rows = _read_table(path)
            if {"case", "label"} <= set(header) and "image" not in header:  # which is a data set's
                if lacking := [row["case"] for row in rows if not row["label"]]:
                    raise ArgumentError(f"{path}: {listed(lacking)} without a label", "name the true class of each")
                given = {str(value): name for name, value in (labels or {}).items()}
                return {row["case"]: given.get(row["label"], row["label"]) for row in rows}, {}
        references = read_cases(path, task="classification", labels=labels)
    names = {label.value: label.name for label in references.labels}
    cases = _to_score(references, int)
    return {case.name: names[int(str(case.label))] for case in cases}, {case.name: case.images for case in cases}


def _read_table(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns of a CSV file, and its rows without space about what they hold; none of two rows of one case."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restval="")
            header, lines = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArgumentError(f"{path} cannot be read: {error}", "give a CSV file with a header") from None
    rows = [{name: line[name].strip() for name in header} for line in lines]
    counts = Counter(row["case"] for row in rows) if "case" in header else Counter()
    if twice := [case for case, count in counts.items() if count > 1]:
        raise ArgumentError(f"{path} has several rows of {listed(twice)}", "keep one of each")
    return header, rows
