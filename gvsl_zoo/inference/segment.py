"""Segmentation of scans: a label map on each scan's own grid, in bounded memory; one scan, or a folder of them."""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..cluster import connect
from ..errors import ArgumentError, GvslZooError, listed
from ..registry import Label
from ..volume import Prepared, Volume, check_grid, check_output, check_outputs, dicom_files, write_volume
from ..weights import write_whole
from .features import body_level, channels_of, default_window, for_volumes, prepare_for, repeated
from .sliding import Progress, device_of, ready_copy, sliding_slabs

SUFFIXES = (".nii.gz", ".nii")
ENDING = re.compile(r"\.nii(\.gz)?$", re.IGNORECASE)
CHANNEL = re.compile(r"_(\d{4})$")  # nnU-Net: NAME_0000.nii.gz is channel 0 of the scan NAME
Scan = Volume | str | os.PathLike[str]


def segment(
    volume: Scan | Sequence[Scan],
    model: nn.Module,
    *,
    labels: Sequence[Label] | None = None,
    window: Sequence[int] | None = None,
    overlap: float = 0.5,
    batch_size: int = 1,
    precision: str = "float32",
    mirror: bool = False,
    progress: Progress | None = None,
) -> Volume:
    """The label map of a scan, on the scan's own grid: its axes, shape, affine and header.

    Logits are blended window by window, brought linearly onto the scan's grid, and only then compared. A window that
    holds nothing but air is not computed: it is background, the first label.

    Args:
        volume: a scan or its path (for a 2D model a film); for a model of several channels, a sequence on one grid.
        model: with `preprocessing`; (B, C, D, H, W) -> logits (B, K, D, H, W).
        labels: of the K classes, in order; default those of the model's trained head, `model.entry.labels`.
        window: (z, y, x) in voxels of the model's grid; default what the head saw in training, else 96 an axis.
        overlap, batch_size, precision: see `sliding_slabs`.
        mirror: average over the eight mirror images of every window, at eight times the cost.
        progress: called with (windows done, windows in all).

    Returns: `Label.value`s, uint8 or uint16; names and colours are in `comment` (see `label_comment`).
    Memory: beside scan and labels, the scan on the model's grid in float32, one slab of K * window[0] slices, and the
        activations of one window.
    Errors: ArgumentError for a model without a trained head or of another number of classes; VolumeError for a scan
        that cannot be read or used.
    """
    labels = tuple(labels or trained_labels(model))
    prepared = prepare_channels(volume, model)
    ready = for_volumes(ready_copy(model), model)
    slabs = sliding_slabs(
        prepared.image,
        mirrored(ready) if mirror else ready,
        window=window or trained_window(model),
        overlap=overlap,
        batch_size=batch_size,
        precision=precision,
        empty_below=body_level(model),
        device=device_of(model),
        progress=progress,
    )
    found = prepared.restore_labels(slabs, [label.value for label in labels])
    return replace(found, comment=label_comment(labels))


def trained_labels(model: nn.Module) -> tuple[Label, ...]:
    """The labels of a model's trained head (or of `labels`, its attribute); ArgumentError when it has none."""
    labels: tuple[Label, ...] = getattr(model, "labels", ()) or getattr(getattr(model, "entry", None), "labels", ())
    if not labels:
        remedy = "train one with gvsl-zoo finetune, pass labels=, or give a labelled scan (--support)"
        raise ArgumentError(f"this {type(model).__name__} has no trained segmentation head", remedy)
    return labels


def trained_window(model: nn.Module) -> tuple[int, ...]:
    """What a model saw at once in training, (z, y, x) voxels: norms over a wider window change the features."""
    default = default_window(model)
    entry = getattr(model, "entry", None)
    window = (entry.input.window if entry else None) or default
    return (*default[: 3 - len(window)], *window)  # of a film a slice


def prepare_channels(volume: Scan | Sequence[Scan], model: nn.Module) -> Prepared:
    """The scan, or several as channels of one image, on the model's grid: (1, C, D, H, W).

    A model of several channels gets a single scan in each. Errors: VolumeError for channels on different grids.
    """
    scans = [volume] if isinstance(volume, Volume | str | os.PathLike) else list(volume)
    wanted = channels_of(model)
    if len(scans) not in (1, wanted):
        raise ArgumentError(f"{len(scans)} scans for a model of {wanted} channels", "give one scan a channel, in order")
    channels = [prepare_for(scan, model) for scan in scans]
    first = channels[0]
    for number, other in enumerate(channels[1:], 1):
        check_grid(other.source, f"channel {number}", first.source, "channel 0")
    return replace(first, image=repeated(torch.cat([c.image for c in channels], 1), model))


def mirrored(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The mean of `function` over all mirror images of its input, each turned back."""

    def mean(x: Tensor) -> Tensor:
        axes = [axis for axis in range(2, x.ndim) if x.shape[axis] > 1]
        turns = [turn for n in range(len(axes) + 1) for turn in itertools.combinations(axes, n)]
        total = function(x).float()
        for turn in turns[1:]:
            total += function(x.flip(turn)).flip(turn)
        return total / len(turns)

    return mean


# ---- labels


def label_comment(labels: Sequence[Label]) -> str:
    """Names, values and colours as JSON: what a label map carries in its header, and `comment_labels` reads."""
    return json.dumps({"labels": [asdict(label) for label in labels]})


def comment_labels(volume: Volume) -> tuple[Label, ...]:
    """The labels that a map says of itself in its header; none where it says nothing."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        return tuple(
            Label(
                "".join(filter(str.isprintable, str(label["name"])))[:200],
                int(label["value"]),
                _colour(label["colour"]),
            )
            for label in json.loads(volume.comment)["labels"]
        )
    return ()


def _colour(told: Any) -> tuple[int, int, int] | None:
    """The colour that a header tells; ValueError for none."""
    if not told:
        return None
    red, green, blue = map(int, told)
    if not 0 <= min(red, green, blue) <= max(red, green, blue) <= 255:
        raise ValueError("no colour")
    return red, green, blue


def label_volumes(volume: Volume, labels: Sequence[Label]) -> list[dict[str, Any]]:
    """Of every label its name, value and colour, and what the map holds of it: voxels and millilitres."""
    counts = np.zeros(np.iinfo(volume.data.dtype).max + 1, np.int64)
    for index in range(volume.shape[2]):  # bincount takes 8 bytes a voxel
        counts += np.bincount(volume.data[:, :, index].ravel(), minlength=len(counts))
    voxel_ml = abs(float(np.linalg.det(volume.affine[:3, :3]))) / 1000
    return [
        asdict(label) | {"voxels": int(counts[label.value]), "ml": round(float(counts[label.value] * voxel_ml), 3)}
        for label in labels
    ]


# ---- files


class Job(NamedTuple):
    """A scan, a path a channel, and where its label map goes."""

    scans: tuple[Path, ...]
    output: Path

    @property
    def facts(self) -> dict[str, Any]:
        """Where they lie, from whatever folder this is read."""
        paths = [str(scan.absolute()) for scan in self.scans]
        several = {"channels": paths} if len(paths) > 1 else {}
        return {"input": paths[0], **several, "output": str(self.output.absolute())}


def segment_file(
    job: Job, model: nn.Module, *, labels: Sequence[Label] | None = None, overwrite: bool = False, **settings: Any
) -> dict[str, Any]:
    """Segment a scan into a file, NAME.nii.gz, and what it holds of every label (`label_volumes`) into NAME.json.

    Each is written whole or not at all, and the label map last: where it is, all is done.

    Args:
        labels, settings: of `segment`.
        overwrite: replace files that are there; a NAME.json of an earlier call is replaced in any case.

    Returns: what NAME.json holds: "input" and, if there are several, "channels"; "output", "seconds", "labels".
    Errors: those of `segment`, and before its work VolumeError for a file that may not be written.
    """
    began, labels = time.perf_counter(), labels or trained_labels(model)
    if None not in _channel_numbers(job):
        _check_channels(job, channels_of(model))
    job.output.parent.mkdir(parents=True, exist_ok=True)
    check_outputs([job.output], job.scans, overwrite)
    check_record(job.output, overwrite)
    found = segment(job.scans, model, labels=labels, **settings)
    facts = job.facts | {"seconds": round(time.perf_counter() - began, 3)}
    facts["labels"] = label_volumes(found, labels)
    write_whole(_stem(job.output, ".json"), json.dumps(facts, indent=2).encode())
    write_volume(found, job.output, overwrite=True)
    return facts


def check_record(output: Path, overwrite: bool) -> None:
    """Refuse a label map beside whose place lies a NAME.json that `segment_file` did not write: a sidecar of BIDS, say.

    Errors: VolumeError.
    """
    path, found = _stem(output, ".json"), None
    with suppress(OSError, ValueError):
        found = json.loads(path.read_bytes())
    own = isinstance(found, dict) and {"input", "output"} <= found.keys()
    check_output(path, None, overwrite or own)


def segment_folder(
    folder: Path,
    output: Path,
    model: nn.Module,
    *,
    overwrite: bool = False,
    cluster: str | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Segment every scan below a folder; one that cannot be read or used, or lacks a channel, stops no other.

    Args:
        folder, output: see `find_scans`.
        overwrite: make those label maps anew that are there; otherwise a call goes on where an earlier one stopped.
        cluster: address of a dask scheduler, such as tcp://10.0.0.1:8786; its workers see the same folders, get the
            model, and segment a scan a thread.
        progress: called with scans done and scans in all.
        settings: of `segment`.

    Returns: a record a scan: that of `segment_file`, or "input" and "output" with "skipped" or "error".
    Errors: ArgumentError as `find_scans` has them, VolumeError without cluster.
    """
    jobs = find_scans(folder, output, channels_of(model))
    records = {job: job.facts | {"skipped": True} for job in jobs if not overwrite and job.output.exists()}
    settings["overwrite"] = overwrite
    for job, record in _carried_out([job for job in jobs if job not in records], model, settings, cluster):
        records[job] = record
        if progress:
            progress(len(records), len(jobs))
    return [records[job] for job in jobs]


def find_scans(folder: Path, output: Path, channels: int = 1) -> list[Job]:
    """Every .nii, .nii.gz and DICOM series (a folder of its own) below a folder, and its place below `output`.

    Links to folders are followed. What lies in `output` and what begins with a dot is left out. For a model of several
    channels NAME_0000.nii.gz, NAME_0001.nii.gz, ... are one scan, as for nnU-Net.

    Errors: ArgumentError when there is none, when two scans would become one label map, or for an output that is the
        folder itself.
    """
    out = output.resolve()
    if out == folder.resolve():
        raise ArgumentError(f"{str(output)!r} is the folder of the scans", "give the label maps another folder")
    found: dict[Path, list[Path]] = {}
    for root, folders, names in os.walk(folder, followlinks=True):
        here = Path(root)
        closed = {out, *(place.resolve() for place in (here, *here.parents))}  # a link back would have no end
        folders[:] = sorted(name for name in folders if name[0] != "." and (here / name).resolve() not in closed)
        scans = [here / name for name in sorted(names) if name[0] != "." and name.lower().endswith(SUFFIXES)]
        for scan in [here, *scans] if here != folder and dicom_files(here) else scans:
            stem = _stem(output / scan.relative_to(folder), "")
            name = CHANNEL.sub("", stem.name) if channels > 1 else stem.name
            found.setdefault(stem.with_name(f"{name}.nii.gz"), []).append(scan)
    if not found:
        raise ArgumentError(
            f"{str(folder)!r} holds no .nii, .nii.gz or DICOM file", "give a folder of scans; films one a call"
        )
    if channels == 1 and (twice := [scans for scans in found.values() if len(scans) > 1]):
        raise ArgumentError(f"{' and '.join(map(str, twice[0]))} would become one label map", "rename one")
    return [Job(tuple(scans), path) for path, scans in found.items()]


def _check_channels(job: Job, channels: int) -> None:
    """Refuse a scan that lacks the file of a channel: those that there are would silently stand for it."""
    names = [_stem(scan, "").name for scan in job.scans]
    numbers = _channel_numbers(job)
    if channels == 1 or numbers in ([None], list(range(channels))):
        return
    wanted = [f"{CHANNEL.sub('', names[0])}_{number:04}" for number in range(channels)]
    missing = [] if None in numbers else [name for name in wanted if name not in names]
    raise ArgumentError(
        f"{listed([scan.name for scan in job.scans])} for a model of {channels} channels",
        f"add {listed(missing)}" if missing else f"give one file a channel, in order: {listed(wanted)}",
    )


def _channel_numbers(job: Job) -> list[int | None]:
    """The channel that the name of each scan tells."""
    found = (CHANNEL.search(_stem(scan, "").name) for scan in job.scans)
    return [int(match[1]) if match else None for match in found]


def _stem(path: Path, suffix: str) -> Path:
    """The path with another suffix in place of .nii or .nii.gz; other dots in the name stay."""
    return path.with_name(ENDING.sub("", path.name) + suffix)


def _carried_out(
    jobs: Sequence[Job], model: nn.Module, settings: dict[str, Any], cluster: str | None
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """Jobs and their records, in the order in which they are done."""
    if cluster is None:
        for job in jobs:
            yield job, _tried(job, model, settings)
        return
    with connect(cluster) as client:
        from distributed import as_completed

        shared = client.scatter(model, broadcast=True)
        job_of = {client.submit(_tried, job, shared, settings, pure=False): job for job in jobs}
        for future in as_completed(job_of):
            job, end = job_of[future], future.exception()  # of the worker itself, out of memory for instance
            yield job, job.facts | {"error": f"{type(end).__name__}: {end}"} if end else future.result()


def _tried(job: Job, model: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of a scan now segmented, or why it cannot be."""
    try:
        _check_channels(job, channels_of(model))
        return segment_file(job, model, **settings)
    except Exception as error:  # ITK raises whatever it likes
        kind = "" if isinstance(error, GvslZooError) else f"{type(error).__name__}: "
        return job.facts | {"error": kind + " ".join(str(error).split())}
