"""Classification of scans and films with a trained head: the probability of every class."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArgumentError, GvslZooError, listed
from ..film import FilmPreprocessing, flattened
from ..inference.features import default_window, recipe_of
from ..inference.segment import Scan, prepare_channels
from ..inference.sliding import Progress, device_of, evaluate, ready_copy
from ..models.heads import ClassificationModel
from ..registry import Label
from ..volume import dicom_files
from .cases import CHANNEL, ENDINGS, named_files, read_cases, without_ending
from .data import middle_box

Scans = dict[str, tuple[Path, ...]]  # of a case, a file a channel


def classify(volume: Scan | Sequence[Scan], model: nn.Module) -> dict[str, float]:
    """The probability of every class of a scan or film, by name.

    A film is seen whole, in the model's size; of a scan the box about its middle that the head learnt from.

    Args:
        volume: a scan or its path, for a 2D model a film; for a model of several channels, a sequence on one grid.
        model: as `load(..., task="classification")` gives it of a fine-tuned run, which names its classes.

    Errors: ArgumentError for a model without such a head; VolumeError for a scan that cannot be read or used.
    """
    return _Classifier(model)(volume)


def classify_all(
    scans: Scans, model: nn.Module, *, progress: Progress | None = None
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """The probabilities of every case, and why there are none of a case; one that cannot be read stops no other.

    Args:
        progress: called with (cases done, cases in all).
    """
    classifier = _Classifier(model)
    found: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for done, (case, paths) in enumerate(scans.items(), 1):
        try:
            found[case] = classifier(paths)
        except Exception as error:  # ITK raises whatever it likes
            kind = "" if isinstance(error, GvslZooError) else f"{type(error).__name__}: "
            failed[case] = kind + " ".join(str(error).split())
        if progress:
            progress(done, len(scans))
    return found, failed


def scans_at(path: Path, *, films: bool, channels: int = 1) -> Scans:
    """The scans to classify, by case: one file, a DICOM series, those in a folder, or those of a data set's CSV.

    Of a CSV, as `read_cases` takes it, the test cases count if there are any. In a folder of films every DICOM file is
    one. For a model of several channels NAME_0000.nii.gz, NAME_0001.nii.gz, ... are one scan, as for nnU-Net.

    Errors: ArgumentError where there are none, or one lacks the file of a channel.
    """
    if path.suffix.lower() == ".csv":
        cases = read_cases(path, task="classification")
        chosen = [case for case in cases if case.split == "test"] or list(cases)
        return {case.name: case.images for case in chosen}
    if not path.is_dir() or (dicom_files(path) and not films):
        return by_channels([path], channels)
    files = [*named_files(path, ENDINGS).values(), *(dicom_files(path) if films else ())]
    found = by_channels(files, channels)
    if len(found) < len(files) and channels == 1:
        raise ArgumentError(f"{str(path)!r} holds two files of one name", "list them in a CSV with a column case")
    if not found:
        raise ArgumentError(f"{str(path)!r} holds no {', '.join(ENDINGS)} or DICOM file", "give another folder")
    return found


def by_channels(files: Sequence[Path], channels: int) -> Scans:
    """Files by case: one each, or for a model of several channels one a channel where their names say so."""
    found: Scans = {}
    for file in sorted(files):
        name = without_ending(file.name)[0]
        match = CHANNEL.fullmatch(name) if channels > 1 else None
        case = match[1] if match else name
        found[case] = (*found.get(case, ()), file) if match else (file,)
    for case, paths in found.items():
        numbered = [without_ending(path.name)[0] for path in paths]
        wanted = [f"{case}_{number:04}" for number in range(channels)]
        if channels > 1 and numbered not in ([case], wanted):
            raise ArgumentError(f"{listed(numbered)} for a model of {channels} channels", f"give {listed(wanted)}")
    return found


def table_of(found: dict[str, dict[str, float]], labels: Sequence[Label]) -> str:
    """Probabilities as the CSV that `evaluate` takes: the column `case`, and one a class."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("case", *(label.name for label in labels)))
    rows.writerows((case, *(f"{p:.6g}" for p in probabilities.values())) for case, probabilities in found.items())
    return text.getvalue()


def trained_classes(model: nn.Module) -> tuple[Label, ...]:
    """The classes of the head that was trained with a loaded model, in order; ArgumentError when there is none."""
    entry: Any = getattr(model, "entry", None)
    if entry is None or entry.trained_head != "classification":
        name = entry.name if entry else type(model).__name__
        raise ArgumentError(
            f"{name} has no trained classification head", "train one: gvsl-zoo finetune --task classification"
        )
    labels: tuple[Label, ...] = entry.labels
    return labels


class _Classifier:
    """A model made ready once for many scans."""

    def __init__(self, model: nn.Module) -> None:
        self.labels = trained_classes(model)
        if not isinstance(model, ClassificationModel) or model.num_classes != len(self.labels):
            cause = f"a {type(model).__name__} without the head that was trained with it"
            raise ArgumentError(cause, "load it with task='classification' and without num_classes")
        self.model, self.ready = model, ready_copy(model)
        entry: Any = model.entry
        self.edges = entry.input.window or default_window(model)

    def __call__(self, volume: Scan | Sequence[Scan]) -> dict[str, float]:
        recipe = recipe_of(self.model)
        image = flattened(prepare_channels(volume, self.model).image[0], recipe)
        if not isinstance(recipe, FilmPreprocessing):
            image = middle_box(image, self.edges)
        logits = evaluate(self.ready, image[None].to(device_of(self.ready)))[0]
        return {label.name: p for label, p in zip(self.labels, logits.double().softmax(0).tolist(), strict=True)}
