"""Zoo weights against scratch on labelled scans: python -m benchmarks.transfer ct_lungs|hippocampus DATA OUT

DATA holds ct/NAME.nii.gz and NAME_autoseg.nii.gz (lungs by threshold, not by experts), and index.csv, which lists the
hippocampi (MR) with label files and split. Pre-training saw no test subject. OUT keeps every training that ended: the
same call goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.timing import RESULTS, machine
from gvsl_zoo.transfer.bench import bench
from gvsl_zoo.transfer.cases import read_cases
from gvsl_zoo.transfer.config import FinetuneConfig


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


def table(task: str, data: Path) -> list[tuple[str, str, str]]:
    """Image, label file and split of every case."""
    if task == "ct_lungs":
        names = [(name, split) for split, names in LUNGS.items() for name in names]
        return [(f"ct/{name}.nii.gz", f"ct/{name}_autoseg.nii.gz", split) for name, split in names]
    with (data / "index.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["anatomy"] == "hippocampus"]
    return [(row["file"], row["label_file_or_class"], row["split"]) for row in rows]


def write_cases(task: str, data: Path, path: Path) -> Path:
    """The table as a file that `read_cases` takes."""
    lines = [f"{data / image},{data / label},{split}" for image, label, split in table(task, data)]
    path.write_text("\n".join(["image,label,split", *lines]) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="gvsl-unet-ct-nano")
    parser.add_argument("--modes", default="full,linear")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    task, data = TASKS[options.task], options.data.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    cases = read_cases(write_cases(options.task, data, options.out / "cases.csv"), labels=task.labels)
    report = bench(
        cases,
        options.model.split(","),
        task.config,
        options.out,
        counts=task.counts,
        seeds=options.seeds,
        modes=options.modes.split(","),
        device="cpu",
        say=partial(print, flush=True),
    )
    print("\n".join(report.lines()))
    content = report.to_dict() | {"machine": machine()}
    (RESULTS / f"transfer_{options.task}.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
