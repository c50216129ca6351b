"""Labelled data: which files belong to which case, what their labels mean, and which subjects are held out.

Three layouts are read as they are: nnU-Net's (imagesTr, labelsTr, imagesTs, labelsTs and dataset.json, of version 1 or
2, and the Decathlon's, which is version 1 without channel numbers); a folder with images/ and labels/ of the same
names; and a CSV file with the columns image, label and perhaps case, subject, split, its paths relative to itself.
"""

from __future__ import annotations

import colorsys
import csv
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..cache import sha256_of
from ..errors import ArgumentError, listed
from ..film import read_labels
from ..registry import TRAINED_HEADS, Label
from ..volume import DICOM_SUFFIXES, dicom_files

ENDINGS = (".nii.gz", ".nii", ".png")
SPLITS = ("train", "val", "test")
CHANNEL = re.compile(r"(.+)_(\d{4})")  # nnU-Net: NAME_0000.nii.gz is channel 0 of the case NAME
SUBJECT = re.compile(r"sub-[A-Za-z0-9]+")  # BIDS: what begins so is one subject's
MOST_LABEL = 2**16 - 1  # that a label map of `segment` holds
GOLDEN_SECTION = (5**0.5 - 1) / 2
LAYOUTS = "give an nnU-Net folder, a folder with images/ and labels/, or a CSV file"


@dataclass(frozen=True)
class Case:
    """One scan and what is known of it.

    Args:
        name: unlike that of any other case.
        subject: cases of one subject are never split between training and validation.
        images: a file a channel.
        label: the label file of a segmentation, the value of a class, or None if not known.
        split: train, val or test where the data say so.
    """

    name: str
    subject: str
    images: tuple[Path, ...]
    label: Path | int | None
    split: str | None = None


@dataclass(frozen=True)
class Cases:
    """Cases of one task.

    Args:
        labels: the classes, in the order of their values; in a segmentation the background is the first.
        complete: whether `labels` name every value that label files may hold; otherwise others are background.
        named: whether somebody named the labels; otherwise they are the values that label files hold.
    """

    task: str
    cases: tuple[Case, ...]
    labels: tuple[Label, ...]
    complete: bool = True
    named: bool = True

    def __iter__(self) -> Iterator[Case]:
        return iter(self.cases)

    def __len__(self) -> int:
        return len(self.cases)


class Split(NamedTuple):
    """Cases by their use; no subject has two uses."""

    train: tuple[Case, ...]
    val: tuple[Case, ...]
    test: tuple[Case, ...]


def read_cases(
    data: str | os.PathLike[str], *, task: str = "segmentation", labels: Mapping[str, int] | None = None
) -> Cases:
    """The cases that lie in a folder or are listed in a CSV file; scans themselves are not read.

    Args:
        data: see the head of this file.
        task: "segmentation", or "classification", whose CSV has a number or a name as label.
        labels: names of the values in label files, for instance {"liver": 5}; other values are background then.
            Default: those of dataset.json; else every value that occurs, under its number as name (this does read all
            label files). Of a classification the values by the names in the table, or names of the numbers there.

    Errors: ArgumentError for data that cannot be understood, VolumeError for a label file that cannot be read.
    """
    path = Path(data)
    if task not in TRAINED_HEADS:
        raise ArgumentError(f"task {task!r}", f"choose from {', '.join(TRAINED_HEADS)}")
    named = None
    if path.is_file():
        cases, named = _from_table(path, task, labels)
    elif not path.is_dir():
        raise ArgumentError(f"no data at {str(path)!r}", "check the path")
    elif task == "classification":
        raise ArgumentError(f"{str(path)!r} is a folder", "list scans and classes in a CSV file: image,label")
    elif (path / "imagesTr").is_dir():
        cases, named = _from_nnunet(path)
    elif (path / "images").is_dir():
        cases = _paired(path, "images", "labels", ENDINGS, None)
    else:
        raise ArgumentError(f"{str(path)!r} has neither imagesTr/ nor images/", LAYOUTS)
    if not cases:
        raise ArgumentError(f"{str(path)!r} holds no case", f"put {', '.join(ENDINGS)} files there")
    _check_cases(cases, path)
    given = labels if labels is not None else named
    if given is None:
        found = {str(value): value for value in _values(cases) if value}
        return Cases(task, tuple(cases), _labels(found, task), named=False)
    return Cases(task, tuple(cases), _labels(dict(given), task), complete=labels is None)


def split_cases(cases: Cases, *, seed: int = 0, validation: float = 0.2, subjects: int | None = None) -> Split:
    """Deal the labelled cases out to training, validation and test, whole subjects at a time.

    What the data call val or test stays that. Where they call nothing val, a share of the other subjects is drawn; of a
    single subject none. Cases without a label are neither trained nor validated on. A subject of a classification is of
    the class of its first case.

    Args:
        validation: share of subjects held out, in [0, 1); of a classification, of each class about that.
        subjects: how many to train on: with one seed, the first 3 contain the first 1. Default all. Of a
            classification they are drawn class by class in turn: as many as there are classes hold every class.

    Errors: ArgumentError for a subject with two splits, or fewer subjects than asked for.
    """
    if not 0 <= validation < 1:
        raise ArgumentError(f"validation {validation}", "give a share of the subjects in [0, 1)")
    stated: dict[str, str | None] = {}
    for case in cases:
        if stated.setdefault(case.subject, case.split) != case.split:
            cause = f"subject {case.subject!r} is in the splits {stated[case.subject]} and {case.split}"
            raise ArgumentError(cause, "keep all scans of a subject in one")
    known = [case for case in cases if case.label is not None and case.split != "test"]
    names = sorted({case.subject for case in known})
    drawn = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()]
    kinds: dict[str, Any] = {}
    for case in known:
        kinds.setdefault(case.subject, case.label if cases.task == "classification" else None)
    held = {name for name in names if stated[name] == "val"}
    if not held and validation and len(names) > 1:
        ranks, sizes = _ranks(drawn, kinds), Counter(kinds.values())
        evenly = sorted(drawn, key=lambda name: (ranks[name] + 0.5) / sizes[kinds[name]])
        held = set(evenly[: min(max(1, round(validation * len(names))), len(names) - 1)])
    training = [name for name in drawn if name not in held]
    training.sort(key=_ranks(training, kinds).__getitem__)
    if not training or (subjects is not None and not 1 <= subjects <= len(training)):
        raise ArgumentError(
            f"{len(training)} labelled subjects to train on, {subjects or 'at least 1'} wanted",
            "label more, hold fewer out, or ask for fewer",
        )
    chosen = set(training[:subjects])
    train, val = (tuple(case for case in known if case.subject in group) for group in (chosen, held))
    return Split(train, val, tuple(case for case in cases if case.split == "test"))


def _ranks(subjects: Sequence[str], kinds: Mapping[str, Any]) -> dict[str, int]:
    """The place of each subject among those of its kind."""
    before: Counter[Any] = Counter()
    ranks = {}
    for name in subjects:
        ranks[name] = before[kinds[name]]
        before[kinds[name]] += 1
    return ranks


def files_hash(cases: Iterable[Case]) -> str:
    """sha256 over the bytes of all images and label files of cases, and their classes.

    Unlike that of the leakage ledger it changes with a header, and where a scan or its labels are mirrored.
    """
    parts = []
    for case in cases:
        for part in (*case.images, case.label):
            if isinstance(part, Path):
                parts += [_hash_of(file) for file in (dicom_files(part) if part.is_dir() else [part])]
            else:
                parts.append(str(part))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _hash_of(path: Path) -> str:
    """sha256 of a file, which is read once in a process as long as it does not change."""
    stamp = path.stat()
    return _hash_at(path.resolve(), stamp.st_mtime_ns, stamp.st_size)


@cache
def _hash_at(path: Path, changed_ns: int, size: int) -> str:
    return sha256_of(path)


# --- Layouts --------------------------------------------------------------------------------------------------------


def _from_nnunet(folder: Path) -> tuple[list[Case], dict[str, int]]:
    """Cases and labels of an nnU-Net or Decathlon folder."""
    path = folder / "dataset.json"
    try:
        facts = json.loads(path.read_bytes())
        channels = len(facts.get("channel_names") or facts["modality"])
        ending, pairs = facts.get("file_ending", ".nii.gz"), dict(facts["labels"])
    except OSError as error:
        raise ArgumentError(f"{str(path)!r} cannot be read: {error.strerror}", "nnU-Net's folder has one") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"{str(path)!r} is no description of a data set ({type(error).__name__}: {error})"
        raise ArgumentError(cause, "it needs labels, and channel_names or modality") from None
    if ending not in ENDINGS:
        raise ArgumentError(f"{str(path)!r} has file_ending {ending!r}", f"convert the files to {' or '.join(ENDINGS)}")
    if all(str(key).isdigit() and isinstance(name, str) for key, name in pairs.items()):  # version 1: value -> name
        pairs = {name: int(value) for value, name in pairs.items()}
    odd = [name for name, value in pairs.items() if type(value) is not int or name == "ignore"]
    if odd:
        cause = f"{str(path)!r} has the label {odd[0]!r}: {pairs[odd[0]]!r}"
        raise ArgumentError(cause, "regions and ignored voxels are not supported: give one whole number a label")
    cases = _paired(folder, "imagesTr", "labelsTr", (ending,), None)
    if (folder / "imagesTs").is_dir():
        cases += _paired(folder, "imagesTs", "labelsTs", (ending,), "test", channels)
    if wrong := [case.name for case in cases if len(case.images) != channels]:
        raise ArgumentError(f"{str(folder)!r}: {listed(wrong)} lack some of {channels} channels", "add the files")
    return cases, pairs


def _paired(
    folder: Path, images: str, labels: str, endings: tuple[str, ...], split: str | None, most: int = 10_000
) -> list[Case]:
    """Cases of two folders of the same names; every training image needs its label.

    most: channels that there may be; a higher number is a part of the name.
    """
    targets = named_files(folder / labels, endings) if split is None or (folder / labels).is_dir() else {}
    channels: dict[str, dict[int, Path]] = {}
    for name, path in named_files(folder / images, endings).items():
        match = None if name in targets else CHANNEL.fullmatch(name)
        match = match if match and int(match[2]) < most else None
        case, channel = (match[1], int(match[2])) if match else (name, 0)
        if channel in channels.setdefault(case, {}):
            raise ArgumentError(f"{path.parent}: two files for channel {channel} of {case!r}", "keep one of them")
        channels[case][channel] = path
    lonely = [name for name in channels if name not in targets] if split is None else []
    if lonely:
        cause = f"{str(folder / images)!r}: {listed(lonely)} without a label file of the same name"
        raise ArgumentError(cause, f"put it into {labels}/, or take the image away")
    if lost := [name for name in targets if name not in channels]:
        cause = f"{str(folder / labels)!r}: {listed(lost)} without an image of the same name"
        raise ArgumentError(cause, f"put it into {images}/, or take the label file away")
    cases = []
    for name, paths in channels.items():
        if sorted(paths) != list(range(len(paths))):
            raise ArgumentError(
                f"{str(folder / images)!r}: {name!r} has the channels {', '.join(map(str, sorted(paths)))}",
                "number them from _0000 on, without a gap",
            )
        files = tuple(path for _, path in sorted(paths.items()))
        cases.append(Case(name, _subject(name), files, targets.get(name), split))
    return cases


def named_files(folder: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder by their names without the ending, sorted; hidden ones are not looked at."""
    if not folder.is_dir():
        raise ArgumentError(f"there is no folder {str(folder)!r}", LAYOUTS)
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        name, ending = without_ending(path.name)
        if path.name[0] == "." or ending not in endings:
            continue
        if name in found:
            raise ArgumentError(f"{str(path)!r} and {found[name].name!r} are one case", "keep one of them")
        found[name] = path
    return found


def without_ending(name: str) -> tuple[str, str]:
    """A file's name and its ending, one of ENDINGS, that of a DICOM file, or nothing."""
    ending = next((ending for ending in (*ENDINGS, *DICOM_SUFFIXES) if name.lower().endswith(ending)), "")
    return name[: len(name) - len(ending)], ending


def _from_table(path: Path, task: str, labels: Mapping[str, int] | None) -> tuple[list[Case], Mapping[str, int] | None]:
    """Cases of a CSV file; several channels of an image are separated by a semicolon."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        cause = f"the table {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ArgumentError(cause, "give a CSV file in UTF-8") from None
    if not rows or not {"image", "label"} <= rows[0].keys():
        raise ArgumentError(
            f"the table {str(path)!r} has no rows, or lacks the column image or label",
            "give the columns image, label and, if you like, case, subject, split",
        )
    cells = [{key: (value or "").strip() for key, value in row.items() if isinstance(value, str)} for row in rows]
    named: Mapping[str, int] | None = None
    if task == "classification":
        named = _class_values({cell["label"] for cell in cells if cell.get("label")}, labels, path)
    cases = []
    for line, cell in enumerate(cells, 2):
        label, split = cell.get("label", ""), cell.get("split") or None
        if not cell.get("image"):
            raise ArgumentError(f"{str(path)!r} line {line} names no image", "name one, or take the line away")
        if split not in (None, *SPLITS):
            raise ArgumentError(f"{str(path)!r} line {line}: split {split!r}", f"use {', '.join(SPLITS)} or nothing")
        images = tuple(path.parent / part.strip() for part in cell["image"].split(";"))
        name = cell.get("case") or without_ending(images[0].name)[0]
        known = named[label] if named and label else path.parent / label if label else None
        cases.append(Case(name, cell.get("subject") or _subject(name), images, known, split))
    return cases, named


def _class_values(texts: set[str], labels: Mapping[str, int] | None, path: Path) -> dict[str, int]:
    """Values of the classes by what the table calls them: numbers stay what they are, names are counted in order."""
    values = {text: int(text) for text in sorted(texts, key=lambda text: (len(text), text)) if text.isdecimal()}
    if len(values) < len(texts):
        values = dict(labels) if labels else {text: value for value, text in enumerate(sorted(texts))}
    known = values.keys() if labels is None else {text for text in values if values[text] in labels.values()}
    if unknown := sorted(texts - known):
        raise ArgumentError(f"{str(path)!r} has the classes {listed(unknown)}, which have no label", "name them too")
    return values


def _subject(name: str) -> str:
    match = SUBJECT.match(name)
    return match[0] if match else name


def _check_cases(cases: list[Case], where: Path) -> None:
    """Refuse cases of one name, files that are not there, and cases of different numbers of channels."""
    [(name, count)] = Counter(case.name for case in cases).most_common(1)
    if count > 1:
        raise ArgumentError(f"{str(where)!r} has {count} cases {name!r}", "give each a name of its own (column case)")
    for case in cases:
        files = [*case.images, *([case.label] if isinstance(case.label, Path) else [])]
        for path in files:
            if not path.exists():
                raise ArgumentError(f"case {case.name!r}: there is no file {str(path)!r}", "correct its path")
        if len(case.images) != len(cases[0].images):
            raise ArgumentError(
                f"case {case.name!r} has {len(case.images)} channels, {cases[0].name!r} {len(cases[0].images)}",
                "give every case the same channels",
            )


# --- Labels ---------------------------------------------------------------------------------------------------------


def _values(cases: list[Case]) -> list[int]:
    """Every value in the label files."""
    found: set[int] = set()
    for case in cases:
        if isinstance(case.label, Path):
            found |= {int(value) for value in np.unique(read_labels(case.label).data)}
    return sorted(found)


def _labels(named: dict[str, int], task: str) -> tuple[Label, ...]:
    """Labels with colours, in the order of their values; a segmentation's background comes first, named or not."""
    values = list(named.values())
    if any(type(value) is not int or value < 0 for value in values) or len(set(values)) < len(values):
        raise ArgumentError(f"labels {named}", "give each name a value of its own, a whole number from 0 on")
    if task == "segmentation" and max(values, default=0) > MOST_LABEL:
        raise ArgumentError(f"a label of value {max(values)}", f"renumber the labels: from 0 to {MOST_LABEL}")
    if task == "segmentation" and 0 not in values:
        named = {"background": 0} | named
    if task == "segmentation" and len(named) < 2:
        raise ArgumentError(f"the only label is {next(iter(named))!r}", "two classes at least make a task")
    ordered = sorted(named.items(), key=lambda item: item[1])
    return tuple(Label(name, value, _colour(value) if value else None) for name, value in ordered)


def _colour(value: int) -> tuple[int, int, int]:
    """A colour unlike those of the values near it: hues a golden section apart."""
    red, green, blue = colorsys.hsv_to_rgb(value * GOLDEN_SECTION % 1, 0.7, 0.95)
    return round(255 * red), round(255 * green), round(255 * blue)
