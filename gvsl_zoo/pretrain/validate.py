"""Validation of a run: what matching and restoration do to synthetic pairs that training never draws."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..losses import local_ncc_loss, restoration_loss
from ..models.gemini import GEMINI, WholeModule
from ..report import draw, matching_row, restoration_row
from ..spatial import affine_coordinates, compose, identity_grid, jacobian_determinant, warp
from .anatomy import LABELS, Film
from .augment import damage
from .config import PretrainConfig
from .data import Synthetic, SyntheticPairs, seeded

PAIRS = 8
SEED = 2**31  # apart from every run's
LEFT_OUT = ("background", "soft_tissue", "fat")  # of the mean Dice: no organs
SMALLEST_ORGAN = 50  # voxels in both images; below, Dice is noise


class Answer(NamedTuple):
    """What a module makes of a pair and of the fixed image damaged; affine: None without a head for it."""

    displacement: Tensor
    restored: Tensor
    bottleneck: Tensor  # of the fixed image
    affine: Tensor | None


def answer(model: WholeModule, fixed: Tensor, moving: Tensor, damaged: Tensor) -> Answer:
    f_fixed, f_moving = model.features(fixed, moving)
    restored = model.restore(damaged)
    if isinstance(model, GEMINI):
        return Answer(model.deform(f_moving.local, f_fixed.local), restored, f_fixed.bottleneck, None)
    affine, flow = model.match(f_fixed, f_moving)
    return Answer(compose(affine, flow), restored, f_fixed.bottleneck, affine)


@torch.no_grad()
def validate(
    model: WholeModule, config: PretrainConfig, hurried: Callable[[], bool] = lambda: False
) -> dict[str, float]:
    """Means over held-out synthetic pairs, and what a loss curve hides; nothing if it is `hurried` before the end.

    ncc, dice (organs): before, after matching, and, where there is such a head, after the affine alone; folded: share
    of voxels; mean_displacement: voxels; psnr_damaged, psnr_restored: dB; affine_sd, bottleneck_sd: SD over pairs of
    the affine matrix and of the pooled bottleneck, mean over their numbers, which is near 0 when a head or the
    encoder's end has died.
    """
    rows: list[dict[str, float]] = []
    affines, bottlenecks = [], []
    for fixed, moving, organs, damaged in pairs(config, next(model.parameters()).device):
        if hurried():
            return {}
        displacement, restored, bottleneck, affine = answer(model, fixed, moving, damaged)
        row = {
            "ncc_before": 1 - local_ncc_loss(moving, fixed).item(),
            "ncc_after": 1 - local_ncc_loss(warp(moving, displacement), fixed).item(),
            "dice_before": organ_dice(organs[0], organs[1]),
            "dice_after": organ_dice(organs[0], moved_organs(organs[1], displacement)),
            "folded": (jacobian_determinant(displacement) <= 0).float().mean().item(),
            "mean_displacement": displacement.norm(dim=1).mean().item(),
            "psnr_damaged": psnr(damaged, fixed),
            "psnr_restored": psnr(restored, fixed),
        }
        if affine is not None:
            shape = fixed.shape[2:]
            alone = affine_coordinates(affine, shape) - identity_grid(shape, affine)
            row["dice_affine"] = organ_dice(organs[0], moved_organs(organs[1], alone))
            affines.append(affine.flatten())
        rows.append(row)
        bottlenecks.append(bottleneck.flatten(2).mean(2).flatten())
    numbers = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    if affines:
        numbers["affine_sd"] = torch.stack(affines).std(0).mean().item()
    numbers["bottleneck_sd"] = torch.stack(bottlenecks).float().std(0).mean().item()
    return numbers


def pairs(
    config: PretrainConfig, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor], Tensor]]:
    """Fixed and moving image (1, 1, *crop), the organs of both (1, K, *crop) bool, and the fixed image damaged."""
    synthetic = SyntheticPairs(config.crop, config.spacing_mm)
    for number in range(PAIRS):
        subjects = synthetic.subjects(seeded("cpu", SEED, number))
        pair = synthetic.pair(subjects)
        fixed, moving = pair.fixed[None].to(device), pair.moving[None].to(device)
        first, second = (organs_of(subject)[None].to(device) for subject in subjects)
        yield fixed, moving, (first, second), damage(fixed, seeded("cpu", SEED, 1, number))


@torch.no_grad()
def draw_validation(model: WholeModule, config: PretrainConfig, path: Path) -> None:
    """A picture of the first held-out pair: what the module makes of a damaged image, and of two subjects."""
    fixed, moving, _, damaged = next(pairs(config, next(model.parameters()).device))
    found = answer(model, fixed, moving, damaged)
    warped = warp(moving, found.displacement)
    spacing = (config.spacing_mm,) * 3
    restoration = {"original": fixed, "damaged": damaged, "restored": found.restored.clamp(0, 1)}
    matching = {"fixed": fixed, "moving": moving, "warped": warped}
    before, after = (1 - local_ncc_loss(image, fixed).item() for image in (moving, warped))
    rows = [
        restoration_row({k: v[0, 0].cpu() for k, v in restoration.items()}, spacing, "synthetic, not seen in training"),
        matching_row(
            {k: v[0, 0].cpu() for k, v in matching.items()} | {"displacement": found.displacement[0].cpu()},
            spacing,
            f"two subjects; local NCC {before:.2f} -> {after:.2f}",
        ),
    ]
    draw(rows, "Held-out pair", path)


def moved_organs(organs: Tensor, displacement: Tensor) -> Tensor:
    """Masks (1, K, *shape) read at x + displacement(x), bool."""
    return warp(organs.float(), displacement, mode="nearest") > 0


def organs_of(subject: Synthetic) -> Tensor:
    """Masks of the organs of a subject (K, D, H, W), or those that a film shows (K, H, W), bool."""
    if isinstance(subject, Film):
        return subject.masks
    return torch.stack([subject.labels == number for label, number in LABELS.items() if label not in LEFT_OUT])


def organ_dice(a: Tensor, b: Tensor) -> float:
    """Mean Dice, in [0, 1], of the organs (1, K, *shape) that both show."""
    sizes_a, sizes_b, both = (masks.flatten(2).sum(2)[0] for masks in (a, b, a & b))
    shown = torch.minimum(sizes_a, sizes_b) >= SMALLEST_ORGAN
    return (2 * both[shown] / (sizes_a + sizes_b)[shown]).mean().item() if shown.any() else 0.0


def psnr(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio of images in [0, 1], dB."""
    return -10 * math.log10(max(restoration_loss(image, truth).item(), 1e-10))
