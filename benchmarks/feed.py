"""Crops of a prepared store against reading whole files, and whether synthetic pairs keep up: python -m benchmarks.feed

A store of many volumes is an index of many entries that point at two volumes: opening and cropping must not depend on
their number. The steps of the smallest preset are those of `pretrain` itself, drawing its pairs in between or in one
process besides.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.step import SCAN_EDGE, read_scan, write_scans
from benchmarks.timing import alternate, report
from gvsl_zoo.pretrain.anatomy import sample_film
from gvsl_zoo.pretrain.config import PretrainConfig
from gvsl_zoo.pretrain.data import Pairs, StorePairs
from gvsl_zoo.pretrain.loop import pretrain
from gvsl_zoo.pretrain.prepare import prepare_store
from gvsl_zoo.pretrain.store import Store

ENTRIES = (10, 1_000, 100_000)
FILM_EDGE = 1024
SKIPPED_STEPS = 3  # of each run: kernels are chosen and the worker starts


def with_entries(store: Path, count: int) -> Path:
    """A store whose index has `count` entries, each of its own subject, that point at the volumes of `store`."""
    path = store.with_name(f"{store.name}_{count}")
    path.mkdir()
    (path / "store.json").write_bytes((store / "store.json").read_bytes())
    (path / "shards").symlink_to(store / "shards")
    index = np.resize(np.load(store / "index.npy"), count)
    index["subject"] = np.arange(count)
    np.save(path / "index.npy", index)
    return path


def cropping(store: Path, crop: tuple[int, ...], random: np.random.Generator) -> Callable[[], Tensor]:
    """One crop at a random place of a random volume."""
    opened = Store(store)

    def run() -> Tensor:
        number = int(random.integers(len(opened)))
        shape = opened.volume(number).shape
        start = [int(random.integers(0, n - edge + 1)) for n, edge in zip(shape, crop, strict=True)]
        return opened.crop(number, start, crop)

    return run


def drawing(store: Path, crop: tuple[int, ...]) -> Callable[[], tuple[Tensor, Tensor]]:
    """Both crops of a pair."""
    pairs, generator = StorePairs(Store(store), crop, 1.0), torch.Generator().manual_seed(0)
    return lambda: pairs.draw(generator)


def write_films(folder: Path) -> None:
    (folder / "films").mkdir()
    for seed in range(2):
        film = sample_film((FILM_EDGE, FILM_EDGE), torch.Generator().manual_seed(seed))
        grey = (film.image * 255).round().to(torch.uint8).numpy()
        Image.fromarray(grey).save(folder / "films" / f"{seed}.png")


def read_film(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L")).astype(np.float32) / 255


class Enough(Exception):
    """Ends a run without the validation and the checkpoint of its last step."""


def nano_steps(threads: int, workers: int, steps: int) -> list[float]:
    """Seconds of each step of a run of the smallest preset on synthetic pairs."""
    seconds: list[float] = []
    torch.set_num_threads(threads)

    def note(record: dict[str, float]) -> None:
        seconds.append(record["seconds"])
        if len(seconds) == steps:
            raise Enough

    with tempfile.TemporaryDirectory() as folder, suppress(Enough):
        pretrain(PretrainConfig(steps=10 * steps), Path(folder), device="cpu", workers=workers, progress=note)
    return seconds[SKIPPED_STEPS:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--film-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    load = os.getloadavg()[0]  # others' work: above 0, the machine is shared
    random = np.random.default_rng(0)
    crop, film_crop = (options.size,) * 3, (options.film_size,) * 2
    reference = f"whole .nii.gz of {SCAN_EDGE}^3, nibabel"
    all_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker of a data loader
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_scans(folder, ".nii.gz")
        write_films(folder)
        prepare_store(folder / "scans", folder / "store")
        prepare_store(folder / "films", folder / "film_store", ndim=2, unit="grey")
        stores = {count: with_entries(folder / "store", count) for count in ENTRIES}
        film_stores = {count: with_entries(folder / "film_store", count) for count in ENTRIES}
        medians = alternate(
            {reference: lambda: read_scan(folder / "scans" / "0.nii.gz")}
            | {f"crop {crop[0]}^3, {n:,} entries": cropping(path, crop, random) for n, path in stores.items()}
            | {f"pair of crops {crop[0]}^3, {n:,} entries": drawing(path, crop) for n, path in stores.items()}
            | {
                f"open store and pairs, {n:,} entries": lambda path=path: StorePairs(Store(path), crop, 1.0)
                for n, path in stores.items()
            }
            | {f"whole .png of {FILM_EDGE}^2, Pillow": lambda: read_film(folder / "films" / "0.png")}
            | {
                f"film crop {film_crop[0]}^2, {n:,} entries": cropping(path, film_crop, random)
                for n, path in film_stores.items()
            },
            options.rounds,
            warmup=3,
        )

    pairs, number = Pairs(PretrainConfig(steps=1, ramp_steps=0), None, 1), iter(range(10**9))
    medians |= alternate({"synthetic pair 48^3, 4 mm, 1 thread": lambda: pairs[next(number)]}, options.rounds)
    a_pair = medians["synthetic pair 48^3, 4 mm, 1 thread"]
    runs = [(threads, workers) for threads in sorted({1, all_threads}) for workers in (0, 1)]
    seconds: dict[tuple[int, int], list[float]] = {run: [] for run in runs}
    for _ in range(2):  # in turn
        for run in runs:
            seconds[run] += nano_steps(*run, options.steps)
    torch.set_num_threads(all_threads)
    for threads, workers in runs:
        name = f"nano step, {threads} thread(s), --workers {workers}"
        medians[name] = statistics.median(seconds[threads, workers])
    fastest = min(medians[name] for name in medians if name.startswith("nano step"))
    report(
        "feed",
        medians,
        reference,
        synthetic_pairs_a_second_and_core=round(1 / a_pair, 1),
        nano_pairs_a_second_at_most=round(1 / fastest, 2),  # its steps are of one pair
        one_core_draws_for_so_many_nano_loops=round(fastest / a_pair, 1),
        load_average_before=round(load, 2),
    )


if __name__ == "__main__":
    main()
