"""Labelled scans on a model's grid, prepared once, and what a step draws of them.

Patch k of a run is a function of the run's seed and of k alone, in whatever process and after whatever interruption.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ArgumentError, TrainingError, VolumeError, listed
from ..film import FilmPreprocessing, flattened, on_film, prepare_scan, read_labels
from ..pretrain.augment import apply_pose, sample_pose
from ..pretrain.data import seeded
from ..registry import Input, Label
from ..volume import InputWarning, Prepared, Volume, check_grid, laid_on
from ..zoo import preprocessing
from .cases import Case
from .config import FinetuneConfig

MEMORY_BYTES = 4 * 2**30  # of prepared scans; those beyond lie in files without a name, which end with the process
PLACES = 10_000  # voxels of a class and case that patches are centred on; Isensee et al. 2021
MARGIN = 0.25  # of a crop, beyond each of its faces: what turning and scaling bring in
# Changes of appearance, our choice; all are scaled by the strength of the augmentation
GAIN, SHIFT, GAMMA, NOISE = 0.15, 0.05, 0.25, 0.02  # relative; of the intensity range; log; SD
Cache = dict[Any, "Example"]  # what earlier runs prepared


@dataclass(frozen=True, eq=False)
class Example:
    """A case as a network takes it.

    Args:
        image: (C, *shape) float32; or features of it; in a classification with frozen features a vector (C,).
        target: the class of each voxel, (*shape) uint8, or of the scan, (), as an index into the labels.
        places: voxels of each class but the background that the case holds, by class, (N, n) int32.
        doubts: what looks unlike the model's input.
    """

    name: str
    image: Tensor
    target: Tensor
    places: dict[int, Tensor]
    doubts: tuple[str, ...] = ()


def prepare_cases(
    cases: Sequence[Case],
    labels: tuple[Label, ...],
    given: Input,
    folder: Path,
    *,
    complete: bool = True,
    cache: Cache | None = None,
) -> list[Example]:
    """Read scans and labels and bring them onto a model's grid.

    Args:
        labels, complete: see `Cases`.
        given: the model's input.
        folder: on whose disk lies what is too much for the memory.
        cache: what earlier calls prepared; what this one prepares is added.

    Errors: VolumeError naming a file that cannot be used, ArgumentError for a class that occurs in no case,
        TrainingError for a full disk.
    """
    if len(labels) > 256:
        raise ArgumentError(f"{len(labels)} labels", "at most 256 are supported")
    cache = {} if cache is None else cache
    examples = []
    for case in cases:
        key = (case, labels, complete, replace(given, window=None))
        examples.append(cached(cache, key, folder, lambda case=case: _prepare(case, labels, given, complete)))  # type: ignore[misc]
    if doubtful := [f"{example.name}: {example.doubts[0]}" for example in examples if example.doubts]:
        text = f"{len(doubtful)} of {len(examples)} scans look unlike the model's input, so {doubtful[0]}"
        hint = " (for MR choose the unit 'arbitrary')" if given.intensity.unit == "HU" else ""
        warnings.warn(text + hint, InputWarning, stacklevel=2)
    return examples


def cached(cache: Cache, key: Any, folder: Path, make: Callable[[], Example]) -> Example:
    """The example of a key, made once."""
    if key not in cache:
        example = make()
        taken = sum(other.image.nbytes for other in cache.values()) + example.image.nbytes
        cache[key] = replace(example, image=_mapped(example.image, folder)) if taken > MEMORY_BYTES else example
    return cache[key]


def _mapped(x: Tensor, folder: Path) -> Tensor:
    """The same numbers in a file without a name."""
    array = np.ascontiguousarray(x.numpy())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(array.data)  # a full disk is an error here, and in a mapped file the end of the process
            mapped = np.memmap(file, array.dtype, "r+", shape=array.shape)  # keeps the file open
    except OSError as error:
        what = f"a prepared scan of {array.nbytes / 1e6:.0f} MB"
        cause = f"{what} cannot be written to {folder}: {error.strerror or error}"
        raise TrainingError(cause, "free space, choose another folder, or train on fewer scans") from error
    return torch.from_numpy(mapped)


# --- From files to the grid -----------------------------------------------------------------------------------------


def _prepare(case: Case, labels: tuple[Label, ...], given: Input, complete: bool) -> Example:
    channels, doubts = _channels(case, given)
    recipe, scan = preprocessing(given), channels[0]
    image = flattened(torch.cat([channel.image[0] for channel in channels]), recipe)
    if not isinstance(case.label, Path):
        index = next((i for i, label in enumerate(labels) if label.value == case.label), None)
        if index is None:
            raise ArgumentError(f"case {case.name!r} has the class {case.label}", "give it one of the labels")
        return Example(case.name, image, torch.tensor(index), {}, doubts)
    classes = _classes(case, scan.source, labels, complete, film=isinstance(recipe, FilmPreprocessing))
    target = flattened(torch.from_numpy(scan.bring_labels(classes, len(labels))), recipe)
    places = {}
    for k in sorted(set(target.unique().tolist()) - {0}):
        found = (target == k).nonzero().int()
        places[int(k)] = found[:: -(-len(found) // PLACES)]
    return Example(case.name, image, target, places, doubts)


def _channels(case: Case, given: Input) -> tuple[list[Prepared], tuple[str, ...]]:
    """The channels of a scan on the model's grid, and doubts about them, which are not warned about one by one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        channels = [prepare_scan(path, preprocessing(given)) for path in case.images]
    for channel in channels[1:]:
        check_grid(channel.source, "the channel", channels[0].source, "the scan")
    return channels, tuple(itertools.chain.from_iterable(channel.warnings for channel in channels))


def _classes(case: Case, scan: Volume, labels: tuple[Label, ...], complete: bool, *, film: bool) -> np.ndarray:
    """The label file of a case with the values replaced by their places in `labels`, uint8."""
    path = case.label
    assert isinstance(path, Path)
    volume = read_labels(path)
    if film:
        on_film(volume, scan)  # its pixels are the film's, whatever their millimetres
    else:
        volume = laid_on(volume, "the label map", scan, "the scan")
    known = [label.value for label in labels]
    values = [int(value) for value in np.unique(volume.data)]
    if complete and (odd := [str(value) for value in values if value not in known]):
        raise VolumeError(
            f"{str(path)!r} holds the labels {listed(odd)}, which have no name; named are "
            + listed([f"{label.value} {label.name}" for label in labels]),
            "name them (--labels), or correct the file",
        )
    place_of = np.zeros(max(known) + 2, np.uint8)  # the last is that of values without a name
    place_of[known] = np.arange(len(known))
    classes = np.empty(volume.shape, np.uint8)
    for index in range(volume.shape[2]):
        part = volume.data[:, :, index].astype(np.int64)
        classes[:, :, index] = place_of[part.clip(max=len(place_of) - 1)]
    return classes


# --- What a step draws ----------------------------------------------------------------------------------------------


class Patch(NamedTuple):
    """A crop, with a margin if it is to be posed: image (C, *crop), target (*crop) or ()."""

    image: Tensor
    target: Tensor


class Patches(Dataset[Patch]):
    """Patch k of a run. In a segmentation every other one is centred on a voxel of a class drawn at random."""

    def __init__(self, examples: Sequence[Example], config: FinetuneConfig, crop: tuple[int, ...]) -> None:
        self.examples, self.seed = examples, config.seed
        self.crop, self.margins = crop, margins(config, crop)
        self.edges = [n + 2 * m for n, m in zip(crop, self.margins, strict=True)]
        self.holders: dict[int, list[Example]] = {}  # of each class
        for example in examples:
            for k in example.places:
                self.holders.setdefault(k, []).append(example)

    def __getitem__(self, number: int) -> Patch:
        generator = seeded("cpu", self.seed, 10, number)
        classes = list(self.holders)
        if number % 2 == 0 and classes:
            k = classes[_below(len(classes), generator)]
            example = self.holders[k][_below(len(self.holders[k]), generator)]
            place = example.places[k][_below(len(example.places[k]), generator)].tolist()
        else:
            example = self.examples[_below(len(self.examples), generator)]
            place = [_below(size, generator) for size in example.target.shape]
        if example.image.ndim == 1:  # features of the whole scan
            return Patch(example.image, example.target)
        if example.target.ndim == 0:
            return Patch(middle_box(example.image, self.edges), example.target)
        axes = zip(place, example.target.shape, self.crop, self.margins, strict=True)
        starts = [_start(at, size, edge) - margin for at, size, edge, margin in axes]
        image, target = (box(x, starts, self.edges) for x in (example.image, example.target[None]))
        return Patch(image, target[0])


def margins(config: FinetuneConfig, crop: Sequence[int]) -> list[int]:
    """Voxels beyond each face of a crop that its pose may read."""
    if not config.augment or config.mode == "linear":
        return [0] * len(crop)
    return [math.ceil(MARGIN * edge) for edge in crop]


def _start(place: int, size: int, edge: int) -> int:
    """First voxel of a crop about `place` that stays inside the scan; a scan that is smaller lies in its middle."""
    return (size - edge) // 2 if size <= edge else min(max(place - edge // 2, 0), size - edge)


def _below(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator))


def box(x: Tensor, starts: Sequence[int], edges: Sequence[int]) -> Tensor:
    """The box of an image (C, *shape) at `starts`, zero where it reaches beyond the image."""
    pads: list[int] = []
    for axis, (start, edge) in enumerate(zip(starts, edges, strict=True), 1):
        first, last = max(start, 0), min(start + edge, x.shape[axis])
        x = x.narrow(axis, first, last - first)
        pads = [first - start, start + edge - last, *pads]
    return F.pad(x, pads) if any(pads) else x


def middle_box(x: Tensor, edges: Sequence[int]) -> Tensor:
    """The box about the middle of an image (C, *shape)."""
    return box(x, [(size - edge) // 2 for size, edge in zip(x.shape[1:], edges, strict=True)], edges)


def make_batch(
    patches: Iterable[Patch], numbers: Sequence[int], config: FinetuneConfig, crop: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Images (B, C, *crop) and targets, int64 (B, *crop) or (B,), posed and changed on the device."""
    images, targets = [], []
    around = margins(config, crop)
    for number, patch in zip(numbers, patches, strict=True):
        image, target = patch.image[None].to(device), patch.target[None].to(device)
        if any(around):
            generator = seeded("cpu", config.seed, 11, number)
            pose = sample_pose(crop, generator, strength=config.augment, device=device)
            pose += torch.tensor(around, device=device).view(1, -1, *[1] * len(crop))
            image = jitter(apply_pose(image, pose), config.augment, generator)
            if target.ndim > 1:
                target = apply_pose(target[None], pose, mode="nearest")[0]
        images.append(image)
        targets.append(target.long())
    return torch.cat(images), torch.cat(targets)


def jitter(image: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """An image in [0, 1] with other brightness, contrast, gamma and noise, drawn from a generator on the CPU."""
    gain, shift, gamma, noise = (2 * torch.rand(4, generator=generator) - 1).tolist()
    image = image.clamp(0, 1) ** math.exp(strength * GAMMA * gamma)
    spread = torch.randn(image.shape, generator=generator).to(image.device)
    image = image * (1 + strength * GAIN * gain) + strength * SHIFT * shift
    return image.add_(spread, alpha=strength * NOISE * abs(noise)).clamp_(0, 1)
