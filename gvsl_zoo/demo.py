"""The demonstration: features, restoration and matching of one model, on a scan, a film or synthetic anatomy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean as mean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, VolumeError, listed
from .film import FilmPreprocessing, write_film
from .inference.features import body, dense_features, prepare_for, principal_components, recipe_of, repeated
from .inference.sliding import device_of
from .losses import local_ncc_loss
from .models.gemini import GEMINI, WholeModule
from .pretrain.anatomy import FILM_LABELS, LABELS, Film, Subject, sample_film, sample_subject
from .pretrain.augment import damage
from .pretrain.validate import LEFT_OUT, SMALLEST_ORGAN, psnr
from .report import Row, check_drawing, draw, matching_row, middle, restoration_row, scan_rows
from .spatial import jacobian_determinant, warp
from .volume import Prepared, Volume, check_outputs, write_volume

SHAPE = (96, 96, 96)  # voxels of the synthetic scan: the whole thorax
SPACING_MM = 4.0  # when the model does not say
MATCH_SHAPE = (48, 48, 48)
FILM_SHAPE = (256, 256)  # pixels of the synthetic film, when the model does not say
FILM_MM = 384.0  # what it spans along its longer axis
CROP = {3: 64, 2: 512}  # voxels or pixels an axis that are damaged and restored
DAMAGES, PAIRS = 8, 4  # restorations and matches averaged; the median restoration and the first pair are shown
SEED = 2023


class DemoResult(NamedTuple):
    """What the demonstration found, and where its files are; of films voxels are pixels.

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
            synthetic one as input.nii.gz, a film as input.png. Those of an earlier demonstration, which left a
            demo.png, are replaced.
        scan: for features and restoration, of a model of films a film; default a synthetic thorax. Matching always
            takes pairs of synthetic subjects, whose organs are known.
        progress: called with a line of text before each step.

    Errors: ArgumentError for a model without the heads; VolumeError for a folder that cannot be written, or that has
        files of these names and no demo.png.
    """
    if not isinstance(model, WholeModule):
        cause = f"{type(model).__name__} has no matching and restoration heads"
        raise ArgumentError(cause, 'load the whole module: gvsl_zoo.load(name, task="pretraining")')
    check_drawing()
    say = progress or (lambda text: None)
    out_dir = Path(out_dir)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise VolumeError(f"cannot make the folder {str(out_dir)!r}: {error.strerror}", "choose another") from error
    drawing, damaging, matching = (torch.Generator().manual_seed(SEED + step) for step in range(3))
    film = isinstance(recipe_of(model), FilmPreprocessing)

    input_path = None if scan else out_dir / ("input.png" if film else "input.nii.gz")
    features_path, picture = out_dir / "features.nii.gz", out_dir / "demo.png"
    strange = [path.name for path in (features_path, input_path) if path and path.exists() and not picture.exists()]
    if strange:
        cause = f"{str(out_dir)!r} has {listed(strange)} and no demo.png, so not of a demonstration"
        raise VolumeError(cause, "choose another folder")
    check_outputs((input_path, features_path, picture), [scan.path if scan else None], overwrite=True)

    if scan is None:
        say(f"drawing a synthetic {'film' if film else 'CT'}")
        scan, _ = subject(model, SHAPE, drawing)
    say("computing dense features")
    prepared = prepare_for(scan, model)
    local = dense_features(prepared, model)
    components = principal_components(local, body(prepared, model))

    say("restoring damaged crops")
    crops = restore(model, prepared, damaging)
    ratios = [tuple(psnr(images[name], images["original"]) for name in ("damaged", "restored")) for images in crops]
    damaged_db, restored_db = (mean(column) for column in zip(*ratios, strict=True))
    shown = sorted(range(DAMAGES), key=lambda index: ratios[index][1])[DAMAGES // 2]

    say("matching synthetic subjects")
    images, numbers, spacing_mm = match(model, matching)

    say("drawing the picture")
    restored = (
        f"PSNR {ratios[shown][0]:.1f} → {ratios[shown][1]:.1f} dB "
        f"(mean of {DAMAGES} random damages: {damaged_db:.1f} → {restored_db:.1f} dB)"
    )
    rows = [
        *(scan_rows(prepared, components, film=True) if film else [_features_row(prepared, components)]),
        restoration_row(crops[shown], prepared.spacing_mm, restored, film=film),
        matching_row(images, spacing_mm, _matching_note(numbers)),
    ]
    entry = getattr(model, "entry", None)
    name = scan.path.name if scan.path else f"synthetic {'film' if film else 'CT'}" if input_path else "a scan"
    title = f"{entry.name if entry else 'GVSL'} on {name}"
    draw(rows, title, picture)  # first: it tells that the files beside it are of a demonstration
    write_volume(prepared.place(local), features_path, overwrite=True)
    if input_path:
        write_film(scan, input_path, like=scan.data.dtype, overwrite=True)
    return DemoResult(
        picture=picture,
        features=features_path,
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
        f"{100 * numbers['folded']:.2g} % folded"
    )


def subject(
    model: WholeModule, shape: tuple[int, int, int], generator: torch.Generator
) -> tuple[Volume, dict[str, Tensor]]:
    """A synthetic subject as the model sees it, and its organs, (D, H, W) or of a film (1, H, W), bool.

    shape: of a scan; a film has the size that the model expects.
    """
    recipe = recipe_of(model)
    if isinstance(recipe, FilmPreprocessing):
        size = recipe.size or FILM_SHAPE
        mm = FILM_MM / max(size)
        film = sample_film(size, generator, (mm, mm))
        return as_volume(film), dict(zip(FILM_LABELS, film.masks[:, None], strict=True))
    drawn = sample_subject(shape, generator, recipe.spacing_mm or (SPACING_MM, SPACING_MM, SPACING_MM))
    organs = {name: drawn.labels == number for name, number in LABELS.items() if name not in LEFT_OUT}
    return as_volume(drawn), organs


def as_volume(subject: Subject | Film) -> Volume:
    """A synthetic subject as a scan, (i, j, k) = (x, y, z) int16 HU, the middle of the view at the world's origin; a
    film as a volume of one slice, (i, j) = (column, row) uint8.
    """
    if isinstance(subject, Film):
        pixels = (255 * subject.image).round().byte().numpy()
        return Volume(pixels.T[:, :, None], np.diag([*reversed(subject.spacing_mm), 1.0, 1.0]))
    data = subject.hu.permute(2, 1, 0).round().to(torch.int16).numpy()
    affine = np.diag([*reversed(subject.spacing_mm), 1.0])
    affine[:3, 3] = -0.5 * (np.array(data.shape) - 1) * affine.diagonal()[:3]
    return Volume(data, affine)


@torch.inference_mode()
def restore(model: WholeModule, prepared: Prepared, generator: torch.Generator) -> list[dict[str, Tensor]]:
    """The middle of the scan, damaged anew each time and restored: "original", "damaged", "restored", (D, H, W)."""
    original, most = prepared.image, CROP[model.unet.ndim]
    for axis, centre in enumerate(middle(original[0, 0]), 2):
        size = min(most, original.shape[axis])
        original = original.narrow(axis, min(max(0, centre - size // 2), original.shape[axis] - size), size)
    original = flat(original, model)
    crops = []
    for _ in range(DAMAGES):
        damaged = damage(original, generator)
        restored = model.restore(on_device(damaged, model)).float().cpu()
        images = {"original": original, "damaged": damaged, "restored": restored}
        crops.append({name: deep(image)[0, 0] for name, image in images.items()})
    return crops


@torch.inference_mode()
def match(
    model: WholeModule, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Any], tuple[float, float, float]]:
    """Match pairs of synthetic subjects: the pictures of the first for `matching_row`, the means of `DemoResult`, and
    the spacing.
    """
    pictures: dict[str, Tensor] = {}
    organs: dict[str, list[tuple[float, float]]] = {}
    numbers: dict[str, list[float]] = {}
    for _ in range(PAIRS):
        subjects = [subject(model, MATCH_SHAPE, generator) for _ in range(2)]
        spacing_mm = prepare_for(subjects[0][0], model).spacing_mm
        fixed, moving = (flat(prepare_for(scan, model).image, model) for scan, _ in subjects)
        answer = model(on_device(fixed, model), on_device(moving, model))
        displacement = answer.displacement_ba if isinstance(model, GEMINI) else answer.displacement
        displacement = displacement.float().cpu()
        warped = warp(moving, displacement)
        millimetres = displacement.new_tensor(spacing_mm[-displacement.shape[1] :])
        length_mm = (displacement.movedim(1, -1) * millimetres).norm(dim=-1)
        found = {
            "ncc_before": 1 - local_ncc_loss(moving, fixed).item(),
            "ncc_after": 1 - local_ncc_loss(warped, fixed).item(),
            "folded": (jacobian_determinant(displacement) <= 0).float().mean().item(),
            "displacement_mm": length_mm.mean().item(),
        }
        for name, value in found.items():
            numbers.setdefault(name, []).append(value)
        (_, truth), (_, before) = subjects
        for name in truth:
            if min(int(truth[name].sum()), int(before[name].sum())) >= SMALLEST_ORGAN:
                mask = before[name].float().view_as(fixed)
                after = warp(mask, displacement, mode="nearest").view_as(truth[name]) > 0
                pair = dice(truth[name], before[name]), dice(truth[name], after)
                organs.setdefault(name, []).append(pair)
        images = {"fixed": fixed, "moving": moving, "warped": warped, "displacement": displacement}
        pictures = pictures or {name: deep(image)[0].squeeze(0) for name, image in images.items()}
    table = {name: (mean(p[0] for p in pairs), mean(p[1] for p in pairs)) for name, pairs in organs.items()}
    means: dict[str, Any] = {name: mean(values) for name, values in numbers.items()}
    means["dice_before"], means["dice_after"] = (mean(pair[when] for pair in table.values()) for when in (0, 1))
    return pictures, means | {"organs": table}, spacing_mm


def flat(image: Tensor, model: WholeModule) -> Tensor:
    """An image (B, C, D, H, W) as the model takes it: of a film (B, C, H, W)."""
    return image if model.unet.ndim == 3 else image[:, :, 0]


def deep(image: Tensor) -> Tensor:
    """A film (B, C, H, W) as one slice, (B, C, 1, H, W); a volume as it is."""
    return image if image.ndim == 5 else image.unsqueeze(2)


def on_device(image: Tensor, model: WholeModule) -> Tensor:
    """The image in every input channel of the model, on its device."""
    return repeated(image, model).to(device_of(model))


def dice(a: Tensor, b: Tensor) -> float:
    """2 |a and b| / (|a| + |b|) of boolean masks, at least one of them not empty."""
    return (2 * (a & b).sum() / (a.sum() + b.sum())).item()
