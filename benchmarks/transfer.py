"""Zoo weights against scratch on labelled scans and films:
python -m benchmarks.transfer ct_lungs|hippocampus|xray DATA OUT [--model A,B,...] [--together] [--device cpu]

A model is a name of the registry or the folder of a run, such as ./run; each is compared with its own shape from
scratch. With --together the models are runs of one recipe that differ in their pre-training seed: what they gain on
average is compared too, over pre-training seeds, seeds of the probe and test cases, all random.

DATA holds ct/NAME.nii.gz and NAME_autoseg.nii.gz (lungs by threshold, not by experts), and index.csv, which lists the
hippocampi (MR) with label files and split, and the films (xray/) with their class. Pre-training saw no test subject.
OUT keeps every training that ended: the same call goes on, and so does one with more models.

Films, no finding against pneumonia: recipes train on every second film of each class in the order of names, from the
first on; the other 24 are the probe's. They are dealt into 6 folds of 2 of each class, and each fold is tested by a
model trained on the 20 films of the others, never on the 24 that pre-training may have seen. Films have the size that
the model says, else 256 pixels an axis. The AUC is that of all 24 held-out films of one seed, and its mean over seeds
is reported. As in DeLong's, it is the mean over pairs of a film of each class of whether the probe puts them in order,
and its intervals are over seeds and films of either class. A model that has seen one of the 24 is refused by name; of
one whose ledger is not complete, such as a run on a store, that is not known, and a warning says so.

The result is results/transfer_TASK.json of the embedded model alone, from which scripts/model_table.py writes tables;
of other models results/transfer_TASK_MODEL_MODEL....json, each named by the last part of its name or path.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.timing import RESULTS, machine
from gvsl_zoo import load
from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.ledger import check_unseen
from gvsl_zoo.transfer.bench import STATISTICS, Bench, Comparison, bench, scratch_arms, scratch_before
from gvsl_zoo.transfer.cases import read_cases
from gvsl_zoo.transfer.config import FinetuneConfig
from gvsl_zoo.transfer.statistics import compare, holm

MODEL = "gvsl-unet-ct-nano"


class Task(NamedTuple):
    """A task, how often it is repeated with how many scans, and the settings of every training."""

    labels: dict[str, int]
    counts: tuple[int, ...]
    config: FinetuneConfig


TASKS = {
    "ct_lungs": Task({"lung_right": 1, "lung_left": 2}, (1, 2, 4), FinetuneConfig(steps=200, crop=48)),
    "hippocampus": Task(
        {"anterior": 1, "posterior": 2},
        (1, 3, 5, 10),
        FinetuneConfig(steps=200, crop=(32, 48, 32), unit="arbitrary", spacing_mm=1.0),
    ),
}
LUNGS = {
    "train": ("lidc0001", "cmb_crc_01068", "lidc0314", "lungdx_a0002"),
    "test": ("lungfcp_0001", "acrin_flt_013", "kits_00072"),
}
FILMS = Task({"no_findings": 0, "pneumonia": 1}, (20,), FinetuneConfig(task="classification", steps=200, batch_size=4))
FOLDS = 6
Scores = dict[tuple[str, str, int], np.ndarray]  # in %, by arm, mode and number of scans: (seeds, test cases)


# --- The cases ------------------------------------------------------------------------------------------------------


def table(task: str, data: Path) -> list[tuple[str, str, str]]:
    """Image, label file and split of every case."""
    if task == "ct_lungs":
        names = [(name, split) for split, names in LUNGS.items() for name in names]
        return [(f"ct/{name}.nii.gz", f"ct/{name}_autoseg.nii.gz", split) for name, split in names]
    rows = [row for row in read_index(data) if row["anatomy"] == "hippocampus"]
    return [(row["file"], row["label_file_or_class"], row["split"]) for row in rows]


def write_cases(task: str, data: Path, path: Path) -> Path:
    """The table as a file that `read_cases` takes."""
    return write_table(((data / image, data / label, split) for image, label, split in table(task, data)), path)


def probed_films(data: Path) -> dict[str, list[str]]:
    """The films by class that no recipe trains on: every second one in the order of names, from the second on."""
    rows = read_index(data)
    return {
        kind: sorted(row["file"] for row in rows if row["modality"] == "CXR" and row["label_file_or_class"] == kind)[
            1::2
        ]
        for kind in FILMS.labels
    }


def write_fold(films: dict[str, list[str]], fold: int, data: Path, path: Path) -> Path:
    """A fold of the films as a file that `read_cases` takes."""
    rows = [
        (data / film, kind, "test" if place % FOLDS == fold else "train")
        for kind, own in films.items()
        for place, film in enumerate(own)
    ]
    return write_table(rows, path)


def read_index(data: Path) -> list[dict[str, str]]:
    with (data / "index.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def write_table(rows: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["image,label,split", *(",".join(map(str, row)) for row in rows)]) + "\n")
    return path


# --- The trainings --------------------------------------------------------------------------------------------------


def probe_films(data: Path, models: Sequence[str], out: Path, **settings: Any) -> list[Bench]:
    """A bench a fold; every model is asked first whether it knows a film of any."""
    films = probed_films(data)
    entries: dict[str, Any] = {model: load(model).entry for model in models}
    for model, entry in entries.items():
        if entry.ndim != 2:
            raise ArgumentError(f"{model} is a model of volumes", "give models of films (ndim 2)")
    paths = {film: (data / film,) for own in films.values() for film in own}
    check_unseen(paths, {model: entry.ledger for model, entry in entries.items()})
    benches = []
    for fold in range(FOLDS):
        path = write_fold(films, fold, data, out / f"fold-{fold}.csv")
        cases = read_cases(path, task="classification", labels=FILMS.labels)
        benches.append(bench(cases, models, FILMS.config, out / f"fold-{fold}", counts=FILMS.counts, **settings))
    return benches


# --- The scores -----------------------------------------------------------------------------------------------------


def dice_scores(report: Bench) -> Scores:
    """Mean Dice of every seed and test case."""
    rows: dict[tuple[str, str, int], dict[int, list[float]]] = {}
    for cell in report.cells:
        rows.setdefault((cell["arm"], cell["mode"], cell["count"]), {})[cell["seed"]] = list(cell["scores"].values())
    return {key: np.array([own[seed] for seed in sorted(own)]) for key, own in rows.items()}


def order_scores(folds: Sequence[Bench]) -> Scores:
    """Whether a film with pneumonia is given the higher odds of it than one without, 100 or 0, 50 for a tie: (seeds,
    films with, films without), films of all folds; the mean is the AUC.
    """
    odds: dict[tuple[str, str, int], dict[tuple[int, str], float]] = {}
    for cell in (cell for report in folds for cell in report.cells):
        own = odds.setdefault((cell["arm"], cell["mode"], cell["count"]), {})
        for film, detail in cell["details"].items():
            without, having = (np.log(max(detail[kind], 1e-40)) for kind in FILMS.labels)
            own[cell["seed"], film] = float(having - without)
    scores = {}
    for key, own in odds.items():
        seeds, films = (sorted(set(part)) for part in zip(*own, strict=True))
        without, having = (
            np.array([[own[seed, film] for film in films if film.startswith(kind)] for seed in seeds])
            for kind in FILMS.labels
        )
        scores[key] = 50 * (1 + np.sign(having[:, :, None] - without[:, None, :]))
    return scores


def comparisons(scores: Scores, arms: dict[str, str], runs: Sequence[Sequence[str]]) -> list[Comparison]:
    """Models with their scratch, p corrected for the number of comparisons.

    Args:
        arms: the arm that each model is compared with.
        runs: what is compared: a model, or several that are runs of one recipe.
    """
    rows = []
    keys = list(dict.fromkeys((mode, count) for _, mode, count in scores))
    for models, (mode, count) in itertools.product(runs, keys):
        zoo = np.stack([scores[model, mode, count] for model in models])
        scratch = np.stack([scores[arms[model], mode, count] for model in models])
        mean, half, p = compare(zoo - scratch)
        name = models[0] if len(models) == 1 else f"{len(models)} runs together"
        rows.append(Comparison(name, mode, count, float(scratch.mean()), float(zoo.mean()), mean, half, p, p))
    corrected = holm([row.p for row in rows])
    return [replace(row, p_corrected=p) for row, p in zip(rows, corrected, strict=True)]


def lines(rows: Sequence[Comparison], metric: str) -> list[str]:
    """A table, a line a comparison."""
    width = max(len(row.model) for row in rows)
    out = [f"{metric:<{width}}  mode    scans  scratch  pre-trained  difference        corrected p"]
    for row in rows:
        gain = f"{row.difference:+.1f} +- {row.half:.1f}"
        means = f"{row.count:>5}  {row.scratch:>7.1f}  {row.zoo:>11.1f}  {gain:<16}  {row.p_corrected:.3f}"
        out.append(f"{row.model:<{width}}  {row.mode:<6}  {means}  {row.effect}")
    return out


def areas(scores: Scores) -> list[dict[str, Any]]:
    """The AUC of every arm with its interval, in %."""
    rows = []
    for (arm, mode, count), values in scores.items():
        mean, half, _ = compare(values)
        low, high = max(0.0, mean - half), min(100.0, mean + half)
        rows.append({"arm": arm, "mode": mode, "count": count, "auc": mean, "low": low, "high": high})
    return rows


def result_path(task: str, models: Sequence[str]) -> Path:
    """Where the result lies."""
    names = [] if list(models) == [MODEL] else [Path(model).name for model in models]
    return RESULTS / f"{'_'.join(['transfer', task, *names])}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=[*TASKS, "xray"])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default=MODEL, help="one, or several with commas between them")
    parser.add_argument("--modes", default="full,linear")
    parser.add_argument("--seeds", type=int, default=5, help="of the probes")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--together", action="store_true", help="the models are runs of one recipe")
    options = parser.parse_args()
    data, models = options.data.resolve(), options.model.split(",")
    arms = scratch_arms(models, scratch_before(options.out / "fold-0" if options.task == "xray" else options.out))
    if options.together and (len(models) < 2 or len(set(arms.values())) > 1):
        parser.error("--together takes two models or more, all of one shape and input")
    settings: dict[str, Any] = {
        "seeds": options.seeds,
        "modes": options.modes.split(","),
        "device": options.device,
        "say": partial(print, flush=True),
    }
    if options.task == "xray":
        folds = probe_films(data, models, options.out, **settings)
        metric, scores = "AUC, %", order_scores(folds)
        rows = comparisons(scores, arms, [[model] for model in models])
        print("\n".join([*lines(rows, metric), STATISTICS]))
        content = {
            "metric": metric,
            "statistics": STATISTICS,
            "comparisons": [row.to_dict() for row in rows],
            "areas": areas(scores),
            "folds": [{"settings": report.settings, "cells": report.cells} for report in folds],
        }
    else:
        task = TASKS[options.task]
        cases = read_cases(write_cases(options.task, data, options.out / "cases.csv"), labels=task.labels)
        report = bench(cases, models, task.config, options.out, counts=task.counts, **settings)
        metric, scores, content = "Dice, %", dice_scores(report), report.to_dict()
        print("\n".join(report.lines()))
    if options.together:
        rows = comparisons(scores, arms, [models])
        print("\n".join(["", *lines(rows, metric)]))
        content["together"] = [row.to_dict() for row in rows]
    text = json.dumps(content | {"machine": machine()}, indent=2)
    result_path(options.task, models).write_text(text + "\n")


if __name__ == "__main__":
    main()
