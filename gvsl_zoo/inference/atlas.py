"""Segmentation by atlases: labelled scans registered onto another, which takes their labels over; no training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from ..errors import ArgumentError
from ..losses import local_correlation
from ..transforms import Grid, warp_volume
from ..volume import Volume, laid_on, prepare, read_volume
from .features import preprocessing_of
from .refine import Progress
from .register import REFINING_STEPS, register
from .segment import Scan, label_comment
from .support import named_labels, read_label_map

TRUST = 4  # power of the local correlation: how much better an atlas must fit to overrule another
LEAST_TRUST = 1e-3  # where nothing correlates, the majority decides


def segment_by_atlas(
    volume: Scan,
    atlases: Sequence[tuple[Scan, Scan]],
    model: nn.Module,
    *,
    refine: int = REFINING_STEPS,
    precision: str = "float32",
    progress: Progress | None = None,
) -> Volume:
    """The label map of a scan, on its own grid, from labelled scans that are registered onto it.

    Each atlas votes for the label that it brings along, with the weight of its local correlation with the scan there.

    Args:
        atlases: pairs (scan, label map), each a volume or a path; the map on the scan's grid, 0 for the background.
        model, refine, precision: see `register`.
        progress: called with (atlases done, atlases in all).

    Returns: uint8 or uint16; names and colours, where an atlas has them, are in `comment`.
    Errors: as `register`; VolumeError for labels on another grid than their scan, or that are not whole numbers from 0
        to 65535; ArgumentError without an atlas.
    """
    if not atlases:
        raise ArgumentError("no atlas", "give a labelled scan")
    scan = volume if isinstance(volume, Volume) else read_volume(volume)
    pairs = [(of if isinstance(of, Volume) else read_volume(of), read_label_map(labels)) for of, labels in atlases]
    pairs = [(atlas, laid_on(label_map, "the label map", atlas, "its scan")) for atlas, label_map in pairs]
    labels = named_labels([label_map for _, label_map in pairs])
    grid = Grid.of(scan)
    votes: list[tuple[np.ndarray, np.ndarray]] = []  # labels and trust
    for done, (atlas, label_map) in enumerate(pairs, 1):
        found = register(atlas, scan, model, refine=refine, precision=precision)
        carried = warp_volume(label_map, found.displacement_mm, grid, nearest=True).data
        votes.append((carried, _trust(found.warped, scan, model) if len(atlases) > 1 else np.ones(1)))
        if progress:
            progress(done, len(atlases))
    out = np.zeros(scan.shape, np.uint8 if labels[-1].value < 256 else np.uint16)
    best = np.full(scan.shape, -1.0, np.float32)
    for label in labels:
        score = sum((np.where(carried == label.value, trust, 0) for carried, trust in votes), np.zeros(()))
        out[score > best] = label.value
        np.maximum(best, score, out=best)
    return replace(scan.carrying(out), comment=label_comment(labels))


def _trust(warped: Volume, scan: Volume, model: nn.Module) -> np.ndarray:
    """Weight of an atlas in every voxel of the scan."""
    recipe = preprocessing_of(model)
    still, other = (prepare(replace(scan, data=volume.data), recipe) for volume in (scan, warped))
    fit = local_correlation(other.image, still.image)[0, 0].clamp_min(0) ** TRUST + LEAST_TRUST
    return still.restore(fit).data
