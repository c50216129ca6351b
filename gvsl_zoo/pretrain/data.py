"""Pairs to match, each a pure function of the run's seed and the pair's number.

No sampler has a state: whoever asks for pair k, in whatever process and after whatever interruption, gets the same.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ArgumentError
from ..spatial import identity_grid
from ..volume import CT_WINDOW_HU, InputWarning
from .anatomy import CANONICAL_MM, Film, Subject, sample_film, sample_subject
from .bucket import is_url
from .config import PretrainConfig
from .prepare import prepare_store
from .store import Store

Synthetic = Subject | Film
POSITION_JITTER = 0.05  # of the scan's extent: crops of a pair are alike, not aligned
EASIEST_VARIATION = 0.2  # of synthetic subjects at the first step: displacements within the window of the NCC


def seeded(device: torch.device | str, *numbers: int) -> torch.Generator:
    """A generator that these numbers alone decide: seed, purpose, step, pair."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


class Pair(NamedTuple):
    """Two images to match, and where their voxels lie in an anatomy common to both, if that is known.

    fixed, moving: (1, *crop) in [0, 1]. anatomy: (2, n, *crop), of fixed and moving, in voxels; zeros if not known.
    known: whether it is. views: whether both are the same image, which only poses of their own make a pair.
    """

    fixed: Tensor
    moving: Tensor
    anatomy: Tensor
    known: bool
    views: bool = False


class PairSource(Protocol):
    """Where pairs of real scans come from."""

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fixed and moving image of two subjects, each (1, *crop) in [0, 1]."""


@dataclass(frozen=True)
class Scan:
    """One scan on the training grid: image (1, *shape) in [0, 1], and which scans it may be paired with."""

    image: Tensor
    region: str


class ScanPairs:
    """Crops at about the same relative place of two different scans of one region."""

    def __init__(self, scans: Sequence[Scan], crop: tuple[int, ...]) -> None:
        regions: dict[str, list[Tensor]] = {}
        for scan in scans:
            regions.setdefault(scan.region, []).append(scan.image)
        self.groups = [images for images in regions.values() if len(images) > 1]
        if not self.groups:
            raise ArgumentError(f"{len(scans)} scans, no two of one region", "pairs need different subjects")
        self.crop = crop

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fixed and moving image, each (1, *crop) in [0, 1]."""
        sizes = torch.tensor([float(len(group)) for group in self.groups])
        group = self.groups[int(torch.multinomial(sizes, 1, generator=generator))]
        first, second = torch.randperm(len(group), generator=generator)[:2].tolist()
        place = torch.rand(len(self.crop), generator=generator)
        return self._crop(group[first], place, generator), self._crop(group[second], place, generator)

    def _crop(self, image: Tensor, place: Tensor, generator: torch.Generator) -> Tensor:
        """The crop at relative `place` of the free play of each axis, air where the scan ends."""
        missing = [max(0, c - s) for c, s in zip(self.crop, image.shape[1:], strict=True)]
        image = F.pad(image, [n for m in reversed(missing) for n in (m // 2, m - m // 2)])
        starts = crop_starts(image.shape[1:], self.crop, place, generator)
        for axis, (start, size) in enumerate(zip(starts, self.crop, strict=True), 1):
            image = image.narrow(axis, start, size)
        return image


def crop_starts(shape: Sequence[int], crop: Sequence[int], place: Tensor, generator: torch.Generator) -> list[int]:
    """First voxels of a crop at about the relative `place` (n,) in [0, 1] of the free play of each axis."""
    jitter = (2 * torch.rand(len(crop), generator=generator) - 1) * POSITION_JITTER
    shares = (place + jitter).clamp(0, 1).tolist()
    return [round(share * (size - edge)) for share, size, edge in zip(shares, shape, crop, strict=True)]


class StorePairs:
    """Crops at about the same relative place of two volumes of a store: of one stratum, and of different subjects.

    Drawing costs the same however many volumes there are; volumes without a partner are left out.
    """

    def __init__(self, store: Store, crop: tuple[int, ...], spacing_mm: float) -> None:
        if store.ndim != len(crop) or (store.ndim == 3 and store.spacing_mm != spacing_mm):
            raise ArgumentError(
                f"a store of {store.ndim}D volumes of {store.spacing_mm} mm for crops {crop} of {spacing_mm} mm",
                f"prepare it with --ndim {len(crop)} --spacing-mm {spacing_mm:g}",
            )
        self.store, self.crop = store, crop
        stratum, subject = (np.asarray(store.entries[name]) for name in ("stratum", "subject"))
        order = np.lexsort((subject, stratum))  # by stratum, then by subject
        self.order, self.subject = order.astype(np.uint32), subject[order]
        _, first, count = np.unique(stratum[order], return_index=True, return_counts=True)
        paired = self.subject[first] != self.subject[first + count - 1]  # sorted: all are one if the ends agree
        self.first, self.count = first[paired], count[paired]  # of the strata, in the order
        self.below = np.cumsum(self.count)  # volumes in the strata up to each
        if not paired.any():
            raise ArgumentError(
                f"{len(store)} volumes, no two subjects of one stratum", "pairs need different subjects"
            )

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fixed and moving image, each (1, *crop) in [0, 1]."""
        number = _below(int(self.below[-1]), generator)
        at = int(np.searchsorted(self.below, number, "right"))
        first, last = int(self.first[at]), int(self.first[at] + self.count[at])
        here = last - (int(self.below[at]) - number)
        own = self.subject[here]
        begin = first + int(np.searchsorted(self.subject[first:last], own, "left"))
        end = first + int(np.searchsorted(self.subject[first:last], own, "right"))
        other = first + _below(last - first - (end - begin), generator)  # among those of other subjects
        there = other if other < begin else other + end - begin
        place = torch.rand(len(self.crop), generator=generator)
        fixed, moving = (self._crop(int(self.order[at]), place, generator) for at in (here, there))
        return fixed, moving

    def _crop(self, number: int, place: Tensor, generator: torch.Generator) -> Tensor:
        shape = self.store.shape(number)
        starts = crop_starts([max(s, c) for s, c in zip(shape, self.crop, strict=True)], self.crop, place, generator)
        centred = [start - max(0, c - s) // 2 for start, s, c in zip(starts, shape, self.crop, strict=True)]
        return self.store.crop(number, centred, self.crop)


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


class SyntheticPairs:
    """Pairs of different synthetic subjects, drawn anew each time: scans for crops (D, H, W), films for (H, W)."""

    def __init__(self, crop: tuple[int, ...], spacing_mm: float) -> None:
        self.crop, self.spacing_mm = crop, spacing_mm

    def subjects(self, generator: torch.Generator, variation: float = 1.0) -> list[Synthetic]:
        """Two subjects on one grid; `variation` as in `sample_subject`."""
        mm = self.spacing_mm
        if len(self.crop) == 2:
            H, W = self.crop
            return [sample_film((H, W), generator, (mm, mm), variation) for _ in range(2)]
        D, H, W = self.crop
        return [sample_subject((D, H, W), generator, (mm, mm, mm), variation) for _ in range(2)]

    def pair(self, subjects: Sequence[Synthetic]) -> Pair:
        """Their images and their common anatomy."""
        fixed, moving = (_image(subject)[None] for subject in subjects)
        anatomy = torch.stack([subject.canonical for subject in subjects]) * (CANONICAL_MM / self.spacing_mm)
        return Pair(fixed, moving, anatomy, True)


def _image(subject: Synthetic) -> Tensor:
    if isinstance(subject, Film):
        return subject.image
    low, high = CT_WINDOW_HU
    return ((subject.hu - low) / (high - low)).clamp(0, 1)


class Pairs(Dataset[Pair]):
    """The pairs of a run by their number: synthetic ones, and those of `real` scans if there are any."""

    def __init__(self, config: PretrainConfig, real: PairSource | None, pairs_a_step: int) -> None:
        self.config, self.real, self.pairs_a_step = config, real, pairs_a_step
        self.synthetic = SyntheticPairs(config.crop, config.spacing_mm)

    def __getitem__(self, number: int) -> Pair:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as a worker has: sums and sigmoids round differently in several
        try:
            return self._drawn(number)
        finally:
            torch.set_num_threads(threads)

    def _drawn(self, number: int) -> Pair:
        config = self.config
        generator = seeded("cpu", config.seed, 0, number)
        step = number // self.pairs_a_step
        difficulty = min(1.0, step / config.steps_of_ramp) if config.steps_of_ramp else 1.0
        scans = (1 - config.synthetic_share) * (difficulty if config.synthetic_share else 1.0)
        if self.real is not None and float(torch.rand(1, generator=generator)) < scans:
            fixed, moving = self.real.draw(generator)
            if config.views and float(torch.rand(1, generator=generator)) < config.views:
                return Pair(
                    fixed, fixed, identity_grid(config.crop, fixed).expand(2, -1, *config.crop).clone(), True, True
                )
            return Pair(fixed, moving, torch.zeros(2, config.ndim, *config.crop), False)
        variation = EASIEST_VARIATION + (1 - EASIEST_VARIATION) * difficulty
        return self.synthetic.pair(self.synthetic.subjects(generator, variation))


@dataclass(frozen=True)
class Numbers:
    """The numbers of the pairs of one process, a list a forward pass, from `first_step` to `last_step`.

    The pairs of a step are dealt out in turn: first to the forward passes, then to the processes, then to the batch;
    so that one process with the doubled batch sees what two processes see together.
    """

    first_step: int
    last_step: int
    batch_size: int
    accumulate: int
    processes: int
    rank: int

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        pass_size = self.batch_size * self.processes
        for step in range(self.first_step, self.last_step):
            for forward in range(self.accumulate):
                start = (step * self.accumulate + forward) * pass_size + self.rank * self.batch_size
                yield list(range(start, start + self.batch_size))


def processes_started() -> int:
    """How many processes a launcher such as torchrun started together."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_first() -> bool:
    """Whether this process is the one of those started together that prints and writes for all."""
    return os.environ.get("RANK", "0") == "0"


def open_data(
    data: str,
    config: PretrainConfig,
    out: Path | None,
    *,
    film_size: int | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> PairSource | None:
    """Pairs of the scans in a store, a folder or a URL, or in a folder of files, which becomes the store `out`/store.

    None: synthetic. Warns (InputWarning) of files that cannot be used, or are odd.

    Args:
        film_size: pixels an axis that films have to have.
        workers, progress: of `prepare_store`.

    Raises: ArgumentError for what is none of these, and for a folder of files without an `out`, or while several
        processes start.
    """
    if data == "synthetic":
        return None
    if not is_url(data) and not Path(data).is_dir():
        cause = f"the data {data!r} are a file" if Path(data).exists() else f"there is no folder {data!r}"
        raise ArgumentError(cause, "give a folder of scans, a store, its URL, or synthetic")
    if not is_url(data) and not (Path(data) / "store.json").exists():
        if out is None or processes_started() > 1:
            cause = "several processes start" if out else "a dry run writes none"
            raise ArgumentError(f"{data} is no store, and {cause}", "run gvsl-zoo prepare first")
        report = prepare_store(
            Path(data),
            out / "store",
            spacing_mm=config.spacing_mm,
            unit=config.scan_unit,
            ndim=config.ndim,
            size=film_size,
            workers=max(1, workers),
            progress=progress,
        )
        for count, what, told_in in (
            (report.quarantined, "cannot be used", report.quarantine),
            (report.doubtful, "are odd, as label maps are", report.notes),
        ):
            if count:
                warnings.warn(f"files that {what}: {count}, see {told_in}", InputWarning, stacklevel=2)
        data = str(out / "store")
    store = Store(data)
    if film_size and store.ndim == 2 and store.format.size != film_size:
        own = f"{store.format.size} pixels an axis" if store.format.size else "their own sizes"
        raise ArgumentError(
            f"a store of films of {own} for a run on {film_size}", f"prepare it with --size {film_size}"
        )
    if store.ndim == config.ndim and store.unit != config.scan_unit:
        cause = f"a store of the unit {store.unit!r} for a run on {config.scan_unit!r}"
        raise ArgumentError(cause, f"say it: --set unit={store.unit}")
    return StorePairs(store, config.crop, config.spacing_mm)
