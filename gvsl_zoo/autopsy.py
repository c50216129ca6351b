"""Autopsy of an input: what a model's training images were, and whether a scan or film is like them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from .doctor import Check, Verdict
from .errors import ArgumentError, GvslZooError
from .film import own_plane, read_film, read_for
from .registry import InputStatistics, ModelEntry
from .volume import InputWarning, Volume, canonical_view, read_volume
from .zoo import preprocessing

PERCENTS = (0.5, 5.0, 50.0, 95.0, 99.5)
AIR_HU, BONE_HU, BODY_HU = -200.0, 250.0, -300.0
WATER_HU, WATER_SHARE = (-200.0, 300.0), 0.05  # soft tissue and fat: of a body CT never less than so much
SHIFT = 1024  # of CT stored without its negative values
THIN = 96  # voxels an axis that are looked at
FEW_VALUES, LARGEST_LABEL, FLAT = 150, 255, 0.6  # a label map; 0.7 of its neighbours are equal, 0.2 of an image's
CLIPPED = 0.02  # share of voxels at the upper end, by which a window was applied
SMALLEST_FILM = 8  # pixels an axis of a film whose middle and sides are looked at
SHUFFLED, JUMP = 0.8, 2.5  # neighbouring slices: of fifteen CT 0.55 to 0.69 of those two apart, and jumps up to 1.9
BEHIND = 0.03  # of the depth; bones lie 0.21 behind to 0.006 before the middle of the body in fifteen CT
FACTOR, LEAST_VIEW, MOST_VIEW = 2.0, 0.5, 1.5  # of the training data's extremes, still taken as like them
ORIGINAL = "give the original scan, as the scanner's DICOM series or dcm2niix writes it"


# --- What training images were ----------------------------------------------------------------------------------------


def input_statistics(images: Iterable[Volume], unit: str) -> InputStatistics:
    """Statistics of the training images, each of the same weight; films (grey) have no millimetres.

    Args:
        images: as they are read, before they are prepared; one at a time is in memory.
        unit: "HU", "arbitrary" or "grey".

    Errors: ArgumentError for no image.
    """
    percentiles, air, spacings, views, codes = [], [], [], [], []
    for volume in images:
        values, spacing_mm, view_mm = _seen(volume)
        percentiles.append(np.percentile(values, PERCENTS))
        air.append(float((values < AIR_HU).mean()))
        spacings.append(spacing_mm)
        views.append(view_mm)
        codes.append("".join(nib.orientations.aff2axcodes(volume.affine)))
    if not percentiles:
        raise ArgumentError("no image to take statistics of", "give at least one")
    a, b, c, d, e = (float(f"{value:.4g}") for value in np.mean(percentiles, 0))
    flat = unit == "grey"
    return InputStatistics(
        len(percentiles),
        (a, b, c, d, e),
        (round(min(air), 3), round(max(air), 3)) if unit == "HU" else None,
        None if flat else _extremes(spacings),
        None if flat else _extremes(views),
        () if flat else tuple(sorted(set(codes))),
    )


def _seen(volume: Volume) -> tuple[np.ndarray, Sequence[float], Sequence[float]]:
    """Some voxels (z, y, x) of a scan, and along x, y, z its spacing and field of view in mm."""
    voxels, spacing_mm = canonical_view(volume)
    thin = voxels[tuple(slice(None, None, max(1, n // THIN)) for n in voxels.shape)].astype(np.float32)
    return thin, spacing_mm[::-1], [n * mm for n, mm in zip(voxels.shape[::-1], spacing_mm[::-1], strict=True)]


def _extremes(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    least, most = (tuple(round(float(n), 2) for n in end(np.array(rows), axis=0)) for end in (np.min, np.max))
    return least, most


# --- Whether a scan is like them --------------------------------------------------------------------------------------


def autopsy(scan: str | os.PathLike[str] | Volume, entry: ModelEntry) -> list[Check]:
    """What is off with a scan or film for a model, and how to mend it; a finding a question, PASS where all is well.

    Args:
        scan: the file, as it would be given to `preprocess`, or a volume.
        entry: of the model; its `input_statistics`, if it has them, say what is far outside.
    """
    with warnings.catch_warnings(record=True):  # they are in the volume's notes
        warnings.simplefilter("always", InputWarning)
        try:
            volume = read_for(scan, preprocessing(entry.input))
        except GvslZooError as error:
            return [Check("file", "FAIL", error.cause, error.remedy)]
    name = volume.path.name if volume.path else "the volume"
    if volume.data.ndim != 3:
        return [Check("file", "FAIL", f"{name} has {volume.data.shape[3]} channels", "give one of them")]
    checks = [Check("file", "PASS", f"{name}, {' x '.join(map(str, volume.shape))} voxels, {volume.data.dtype}")]
    checks += [_of_note(note) for note in volume.notes]
    if not np.isfinite(volume.data).all():
        return [*checks, Check("values", "FAIL", "NaN or infinite voxels", "replace them by air: -1024 HU, or 0")]
    values, spacing_mm, view_mm = _seen(own_plane(volume) if entry.ndim == 2 else volume)
    checks.append(_intensity(values, entry))
    if entry.ndim == 2:
        shows = min(values[0].shape) >= SMALLEST_FILM and values.min() < values.max()
        return [*checks, _film(values[0])] if shows else checks
    if not any(check.what == "orientation" for check in checks):
        codes = "".join(nib.orientations.aff2axcodes(volume.affine))
        checks.append(Check("orientation", "PASS", f"axes {codes}, turned to RAS+ on the way in"))
    checks += _geometry(spacing_mm, view_mm, entry.input_statistics)
    checks.append(_slices(volume))
    if checks[-1].verdict == "PASS" and entry.input.intensity.unit == "HU":
        checks += _front(values)
    return checks


def _of_note(note: str) -> Check:
    """A doubt of the reader as a finding."""
    if "orientation unknown" in note:
        fix = "write the true affine as sform with code 1, or convert the DICOM series again (dcm2niix)"
        return Check("orientation", "FAIL", note, fix)
    if "NaN or infinite" in note:
        return Check("values", "WARN", note, "replace them by air (-1024 HU, or 0 for MR) before the scan is resampled")
    return Check("header", "WARN", note, "write the true geometry: matching sform, qform and pixdim, in mm")


def _intensity(values: np.ndarray, entry: ModelEntry) -> Check:
    """Whether the values are those of the model's unit."""
    low, high = float(values.min()), float(values.max())
    span, unit = f"{low:g} to {high:g}", entry.input.intensity.unit
    if low == high:
        return Check("intensity", "FAIL", f"every voxel is {low:g}", ORIGINAL)
    if _is_label_map(values):
        seen = f"{len(np.unique(values))} whole numbers, {span}, in flat regions: a label map"
        return Check("intensity", "FAIL", seen, "give the image that the labels belong to")
    dark = float((values < AIR_HU).mean())
    if unit != "HU":
        if dark > 0.01:
            seen = f"{span}, {100 * dark:.0f} % below {AIR_HU:g}: CT in HU, the model is for {entry.modality}"
            return Check("intensity", "FAIL", seen, "choose a CT model: gvsl-zoo list --modality CT")
        return Check("intensity", "PASS", f"{span}, {unit} units{_like(values, entry.input_statistics)}")
    if max(-low, high) <= 1:
        window = [end for end in entry.input.intensity.window if end is not None]
        undo = f", or undo it: x * {window[1] - window[0]:g} + {window[0]:g}" if low >= 0 and len(window) == 2 else ""
        return Check("intensity", "FAIL", f"{span}: already scaled", f"{ORIGINAL}{undo}")
    if low >= 0:
        return Check("intensity", "FAIL", *_without_negatives(values, span))
    if dark == 0:
        seen = f"{span}, nothing below {AIR_HU:g}: windowed, masked without air, or MR"
        return Check("intensity", "FAIL", seen, f"{ORIGINAL}; outside a mask write -1024; for MR choose an MR model")
    if (top := float((values == high).mean())) > CLIPPED:
        seen = f"{span}, {100 * top:.0f} % of the voxels at the upper end: windowed"
        return Check("intensity", "WARN", seen, ORIGINAL)
    tissue = float(((values > WATER_HU[0]) & (values < WATER_HU[1])).mean())
    if tissue < WATER_SHARE:
        seen = f"{span}, only {100 * tissue:.1f} % between {WATER_HU[0]:g} and {WATER_HU[1]:g} HU, where tissue lies"
        return Check("intensity", "FAIL", seen, "check the slope and intercept: water is 0 HU, air -1000")
    air, known = f"{span} HU, {100 * dark:.0f} % air", entry.input_statistics
    if known and known.air and dark < known.air[0] / 2:
        seen = f"{air}; in training {100 * known.air[0]:.0f} to {100 * known.air[1]:.0f} %"
        fix = "crop less tightly, and leave the air around and inside the body in (-1000 HU)"
        return Check("intensity", "WARN", seen, fix)
    return Check("intensity", "PASS", air)


def _is_label_map(values: np.ndarray) -> bool:
    if values.min() < 0 or values.max() > LARGEST_LABEL or (values != np.rint(values)).any():
        return False
    left, right = values[..., 1:], values[..., :-1]
    inside = np.maximum(left, right) > 0  # the air of a picture of 8 bits is flat too
    return len(np.unique(values)) <= FEW_VALUES and float((left == right)[inside].mean()) > FLAT


def _without_negatives(values: np.ndarray, span: str) -> tuple[str, str]:
    """What a scan without negative values is where HU are expected, and how to mend it."""
    moved = values - SHIFT
    air, tissue = float((moved < -800).mean()), float(((moved > WATER_HU[0]) & (moved < WATER_HU[1])).mean())
    if values.max() > SHIFT and air > 0.05 and tissue > WATER_SHARE:
        return f"{span}: HU shifted by {SHIFT}", f"subtract {SHIFT} from every voxel, or set scl_inter to -{SHIFT}"
    if values.max() <= LARGEST_LABEL:
        return f"{span}: 8 bits, a picture of a scan or MR", f"{ORIGINAL}; for MR choose an MR model"
    return f"{span}, no negative value: not CT in HU, perhaps MR", "for MR choose an MR model: gvsl-zoo list"


def _like(values: np.ndarray, known: InputStatistics | None) -> str:
    if known is None:
        return ""
    own = ", ".join(f"{value:.3g}" for value in np.percentile(values, PERCENTS))
    return f"; percentiles {own}, in training {', '.join(f'{value:.3g}' for value in known.percentiles)}"


def _film(pixels: np.ndarray) -> Check:
    """Whether bones are bright: the middle of a frontal chest film, spine and heart, against the lungs beside it."""
    rows = pixels[len(pixels) // 5 : -(len(pixels) // 4)]
    width = rows.shape[1]
    middle = float(rows[:, int(0.42 * width) : int(0.58 * width)].mean())
    lungs = np.concatenate(
        [rows[:, int(0.18 * width) : int(0.35 * width)], rows[:, int(0.65 * width) : int(0.82 * width)]], 1
    )
    reach = float(pixels.max() - pixels.min())
    seen = f"the middle is {abs(middle - lungs.mean()) / reach:.2f} of the range {{}} than the lungs beside it"
    if middle < lungs.mean() - 0.05 * reach:
        fix = "turn it: 255 - x; DICOM with MONOCHROME1 is turned on the way in"
        return Check("inversion", "FAIL", f"{seen.format('darker')}: bones are dark", fix)
    return Check("inversion", "PASS", seen.format("brighter" if middle > lungs.mean() else "darker"))


def _geometry(spacing_mm: Sequence[float], view_mm: Sequence[float], known: InputStatistics | None) -> Iterator[Check]:
    spacing, view = (" x ".join(f"{n:.4g}" for n in numbers) + " mm" for numbers in (spacing_mm, view_mm))
    for what, own, text, pair, least, most in (
        ("spacing", spacing_mm, spacing, known.spacing_mm if known else None, 1 / FACTOR, FACTOR),
        ("field of view", view_mm, view, known.field_of_view_mm if known else None, LEAST_VIEW, MOST_VIEW),
    ):
        if pair is None:
            yield Check(what, "PASS", f"{text}; that of the training data is not stated")
            continue
        between = " to ".join(" x ".join(f"{n:.4g}" for n in end) for end in pair)
        small = any(n < least * low for n, low in zip(own, pair[0], strict=True))
        large = any(n > most * high for n, high in zip(own, pair[1], strict=True))
        verdict: Verdict = "WARN" if small or large else "PASS"
        yield Check(what, verdict, f"{text} along x, y, z; in training {between}", _remedy(what, small, large))


def _remedy(what: str, small: bool, large: bool) -> str:
    if not (small or large):
        return ""
    if what == "spacing":
        return "compare the header with the scanner's protocol; if it is true, expect blur or steps along that axis"
    if small:
        return "if the header's spacing is true, give a larger part of the body"
    return "if the header's spacing is true, crop to the part that training saw"


def _slices(volume: Volume) -> Check:
    """Whether the slices follow each other: neighbours differ less than slices two apart, and no pair much more."""
    voxels, _ = canonical_view(volume)
    z = min(range(3), key=lambda axis: voxels.shape[axis]) if voxels.shape[0] > 1 else 0
    for axis in {0, z}:
        stack = np.moveaxis(voxels, axis, 0)
        stack = stack[(slice(None), *(slice(None, None, max(1, n // THIN)) for n in stack.shape[1:]))]
        stack = np.clip(stack.astype(np.float32), *np.percentile(stack, (1, 99)))
        if len(stack) < 6:
            continue
        near, far = (np.abs(stack[step:] - stack[:-step]).mean((1, 2)) for step in (1, 2))
        ratio, jump = float(near.mean() / max(far.mean(), 1e-6)), float(near.max() / max(np.median(near), 1e-6))
        direction = ("feet to head", "back to front", "left to right")[axis]
        fix = "sort the slices by their position (ImagePositionPatient): dcm2niix, or gvsl-zoo on the DICOM folder"
        if ratio > SHUFFLED:
            seen = f"from {direction} neighbours differ {ratio:.2f} times as much as slices two apart: out of order"
            return Check("slices", "FAIL", seen, fix)
        if axis == 0 and jump > JUMP:
            seen = f"from {direction} one pair of neighbours differs {jump:.1f} times as much as the median: a jump"
            return Check("slices", "WARN", seen, f"{fix}; or the series has a gap")
    return Check("slices", "PASS", "they follow each other")


def _front(values: np.ndarray) -> Iterator[Check]:
    """Whether the spine is behind; which side is right, or up, voxels alone do not tell."""
    body, bone = (np.nonzero(values > level)[1] for level in (BODY_HU, BONE_HU))
    if len(bone) < 100:
        return
    ahead = (bone.mean() - body.mean()) / values.shape[1]
    seen = f"bones lie {abs(ahead):.2f} of the depth {'before' if ahead > 0 else 'behind'} the middle of the body"
    if ahead > BEHIND:
        fix = "the header may exchange front and back: look at the scan with its labels A and P, and mend the affine"
        yield Check("front and back", "WARN", seen, fix)
    else:
        yield Check("front and back", "PASS", seen)


def read_all(paths: Iterable[str | os.PathLike[str]], ndim: int = 3) -> Iterator[Volume]:
    """Scans or films one after the other, their doubts unsaid."""
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)
            yield read_film(path) if ndim == 2 else read_volume(Path(path))
