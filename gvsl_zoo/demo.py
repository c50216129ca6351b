"""The demonstration: features, restoration and matching of one model, on a scan or on synthetic anatomy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean as mean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, VolumeError
from .inference.features import body, dense_features, prepare_for, preprocessing_of, principal_components
from .losses import local_ncc_loss
from .models.gemini import GEMINI, WholeModule
from .pretrain.anatomy import LABELS, Subject, sample_subject
from .pretrain.augment import damage
from .report import Row, draw, matching_row, middle, restoration_row, scan_rows
from .spatial import jacobian_determinant, warp
from .volume import Prepared, Volume, write_volume

SHAPE = (96, 96, 96)  # voxels of the synthetic scan: the whole thorax
SPACING_MM = 4.0  # when the model does not say
MATCH_SHAPE = (48, 48, 48)
CROP = 64  # voxels an axis that are damaged and restored
DAMAGES, PAIRS = 8, 4  # restorations and matches averaged; the median restoration and the first pair are shown
LEFT_OUT = ("background", "soft_tissue", "fat")  # of the mean Dice: no organs
SMALLEST_ORGAN = 50  # voxels in each of the two images; below, Dice is noise
SEED = 2023


class DemoResult(NamedTuple):
    """What the demonstration found, and where its files are.

    psnr: means over the damages, dB, for intensities in [0, 1]. ncc: local squared correlation, in [0, 1], mean over
    voxels and pairs. organs: Dice before and after, mean over pairs; dice: mean over organs. folded: share of voxels.
    """

    picture: Path
    features: Path
    input: Path | None
    feature_channels: int
    psnr_damaged_db: float
    psnr_restored_db: float
    ncc_before: float
    ncc_after: float
    dice_before: float
    dice_after: float
    organs: dict[str, tuple[float, float]]
    folded: float
    displacement_mm: float


def run_demo(
    model: WholeModule, out_dir: Path, scan: Volume | None = None, progress: Callable[[str], None] | None = None
) -> DemoResult:
    """Show what a whole module does; the same model and scan give the same numbers and pictures.

    Args:
        model: loaded with task="pretraining", with `preprocessing`.
        out_dir: made if missing; receives demo.png, features.nii.gz (on the model's grid) and, without a scan, the
            synthetic one as input.nii.gz. Files of an earlier demonstration are replaced.
        scan: for features and restoration; default a synthetic thorax. Matching always takes pairs of synthetic
            subjects, whose organs are known.
        progress: called with a line of text before each step.

    Errors: ArgumentError for a model without the heads; VolumeError for a folder that cannot be written.
    """
    if not isinstance(model, WholeModule):
        cause = f"{type(model).__name__} has no matching and restoration heads"
        raise ArgumentError(cause, 'load the whole module: gvsl_zoo.load(name, task="pretraining")')
    say = progress or (lambda text: None)
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VolumeError(f"cannot make the folder {str(out_dir)!r}: {error.strerror}", "choose another") from error
    drawing, damaging, matching = (torch.Generator().manual_seed(SEED + step) for step in range(3))
    spacing_mm = preprocessing_of(model).spacing_mm or (SPACING_MM, SPACING_MM, SPACING_MM)

    input_path = None
    if scan is None:
        say("drawing a synthetic CT")
        scan = as_volume(sample_subject(SHAPE, drawing, spacing_mm))
        input_path = out_dir / "input.nii.gz"
        write_volume(scan, input_path, overwrite=True)
    say("computing dense features")
    prepared = prepare_for(scan, model)
    local = dense_features(prepared, model)
    write_volume(prepared.place(local), out_dir / "features.nii.gz", overwrite=True)
    components = principal_components(local, body(prepared, model))

    say("restoring damaged crops")
    crops = restore(model, prepared, damaging)
    ratios = [tuple(psnr(images[name], images["original"]) for name in ("damaged", "restored")) for images in crops]
    damaged_db, restored_db = (mean(column) for column in zip(*ratios, strict=True))
    shown = sorted(range(DAMAGES), key=lambda index: ratios[index][1])[DAMAGES // 2]

    say("matching synthetic subjects")
    images, numbers = match(model, spacing_mm, matching)

    say("drawing the picture")
    restored = (
        f"PSNR {ratios[shown][0]:.1f} → {ratios[shown][1]:.1f} dB "
        f"(mean of {DAMAGES} random damages: {damaged_db:.1f} → {restored_db:.1f} dB)"
    )
    rows = [
        _features_row(prepared, components),
        restoration_row(crops[shown], prepared.spacing_mm, restored),
        matching_row(images, spacing_mm, _matching_note(numbers)),
    ]
    entry = getattr(model, "entry", None)
    name = scan.path.name if scan.path else "synthetic CT" if input_path else "a scan"
    draw(rows, f"{entry.name if entry else 'GVSL'} on {name}", out_dir / "demo.png")
    return DemoResult(
        picture=out_dir / "demo.png",
        features=out_dir / "features.nii.gz",
        input=input_path,
        feature_channels=len(local),
        psnr_damaged_db=damaged_db,
        psnr_restored_db=restored_db,
        **numbers,
    )


def _features_row(prepared: Prepared, components: Tensor) -> Row:
    """The scan and its components side by side."""
    scan, features = scan_rows(prepared, components)
    note = f"{scan.note}; feature components 1, 2, 3 as red, green, blue"
    return replace(scan, heading="Scan and features", note=note, panels=[*scan.panels, *features.panels])


def _matching_note(numbers: dict[str, Any]) -> str:
    return (
        f"synthetic subjects, means of {PAIRS} pairs: "
        f"organ Dice {numbers['dice_before']:.2f} → {numbers['dice_after']:.2f}, "
        f"local NCC {numbers['ncc_before']:.2f} → {numbers['ncc_after']:.2f}, "
        f"{100 * numbers['folded']:.2g} % of voxels folded"
    )


def as_volume(subject: Subject) -> Volume:
    """A synthetic subject as a scan, (i, j, k) = (x, y, z) int16 HU, the middle of the view at the world's origin."""
    data = subject.hu.permute(2, 1, 0).round().to(torch.int16).numpy()
    affine = np.diag([*reversed(subject.spacing_mm), 1.0])
    affine[:3, 3] = -0.5 * (np.array(data.shape) - 1) * affine.diagonal()[:3]
    return Volume(data, affine)


@torch.inference_mode()
def restore(model: WholeModule, prepared: Prepared, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """The middle of the scan, damaged anew each time and restored: "original", "damaged", "restored", (D, H, W)."""
    original = prepared.image
    for axis, centre in enumerate(middle(original[0, 0]), 2):
        size = min(CROP, original.shape[axis])
        original = original.narrow(axis, min(max(0, centre - size // 2), original.shape[axis] - size), size)
    crops = []
    for _ in range(DAMAGES):
        damaged = damage(original, generator)
        given = on_device(damaged, model)
        restored = model.restore(given if isinstance(model, GEMINI) else model.unet(given)).float().cpu()
        crops.append({"original": original[0, 0], "damaged": damaged[0, 0], "restored": restored[0, 0]})
    return crops


@torch.inference_mode()
def match(
    model: WholeModule, spacing_mm: tuple[float, float, float], generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Match pairs of synthetic subjects: the pictures of the first for `matching_row`, the means of `DemoResult`."""
    pictures: dict[str, Tensor] = {}
    organs: dict[str, list[tuple[float, float]]] = {}
    numbers: dict[str, list[float]] = {}
    for _ in range(PAIRS):
        subjects = [sample_subject(MATCH_SHAPE, generator, spacing_mm) for _ in range(2)]
        fixed, moving = (prepare_for(as_volume(s), model).image for s in subjects)
        answer = model(on_device(fixed, model), on_device(moving, model))
        displacement = answer.displacement_ba if isinstance(model, GEMINI) else answer.displacement
        displacement = displacement.float().cpu()
        warped = warp(moving, displacement)
        length_mm = (displacement * displacement.new_tensor(spacing_mm).view(1, 3, 1, 1, 1)).norm(dim=1)
        found = {
            "ncc_before": 1 - local_ncc_loss(moving, fixed).item(),
            "ncc_after": 1 - local_ncc_loss(warped, fixed).item(),
            "folded": (jacobian_determinant(displacement) <= 0).float().mean().item(),
            "displacement_mm": length_mm.mean().item(),
        }
        for name, value in found.items():
            numbers.setdefault(name, []).append(value)
        truth, before = (s.labels for s in subjects)
        after = warp(before[None, None].float(), displacement, mode="nearest")[0, 0]
        for name, index in LABELS.items():
            seen = min(int((truth == index).sum()), int((before == index).sum()))
            if name not in LEFT_OUT and seen >= SMALLEST_ORGAN:
                pair = dice(truth == index, before == index), dice(truth == index, after == index)
                organs.setdefault(name, []).append(pair)
        images = {"fixed": fixed, "moving": moving, "warped": warped, "displacement": displacement}
        pictures = pictures or {name: image[0].squeeze(0) for name, image in images.items()}
    table = {name: (mean(p[0] for p in pairs), mean(p[1] for p in pairs)) for name, pairs in organs.items()}
    means: dict[str, Any] = {name: mean(values) for name, values in numbers.items()}
    means["dice_before"], means["dice_after"] = (mean(pair[when] for pair in table.values()) for when in (0, 1))
    return pictures, means | {"organs": table}


def on_device(image: Tensor, model: WholeModule) -> Tensor:
    """The image in every input channel of the model, on its device."""
    return image.to(next(model.parameters()).device).expand(-1, model.unet.in_chans, -1, -1, -1)


def psnr(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of images in [0, 1]."""
    return -10 * math.log10(max((image - truth).square().mean().item(), 1e-10))


def dice(a: Tensor, b: Tensor) -> float:
    """2 |a and b| / (|a| + |b|) of boolean masks, at least one of them not empty."""
    return (2 * (a & b).sum() / (a.sum() + b.sum())).item()
