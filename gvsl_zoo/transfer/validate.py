"""Validation of a fine-tuning run on the subjects held out: Dice a class, or accuracy and AUC."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..inference.sliding import evaluate, sliding_slabs
from ..registry import Label
from .config import FinetuneConfig
from .data import Example, middle_box

SCORE = {"segmentation": "dice", "classification": "auc"}  # by which the best weights are chosen


class Hurried(Exception):
    """Ends a validation before its end."""


def validate(
    net: nn.Module,
    examples: Sequence[Example],
    labels: Sequence[Label],
    config: FinetuneConfig,
    crop: Sequence[int],
    hurried: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Scores by name, each in [0, 1]: `dice` and `dice_NAME` a class; or `accuracy` and `auc`.

    Nothing if it is `hurried`, which is asked before every window, before the end.

    Dice is a mean over the cases that hold the class or are said to, on the model's grid. AUC is that of each class
    against the others, their mean; without two classes among the cases, the accuracy again.
    """
    precision = "bf16" if config.bf16 and config.mode == "full" else "float32"

    def ask(*_: Any) -> None:
        if hurried():
            raise Hurried

    asking = net.register_forward_pre_hook(ask)
    try:
        if config.task == "classification":
            return _classes(net, examples, len(labels), precision, crop)
        return _segmentations(net, examples, labels, precision, crop)
    except Hurried:
        return {}
    finally:
        asking.remove()


def _segmentations(
    net: nn.Module, examples: Sequence[Example], labels: Sequence[Label], precision: str, crop: Sequence[int]
) -> dict[str, float]:
    sums, counts = torch.zeros(2, len(labels), dtype=torch.float64)
    for example in examples:
        table = confusion(_segmented(net, example, precision, crop), example.target, len(labels)).double()
        size = table.sum(0) + table.sum(1)
        sums += 2 * table.diagonal() / size.clamp_min(1)
        counts += size > 0
    dice = (sums / counts)[1:].tolist()
    found = [value for value in dice if not math.isnan(value)]
    scores = {"dice": sum(found) / len(found) if found else 0.0}
    named = zip(labels[1:], dice, strict=True)
    return scores | {f"dice_{label.name}": value for label, value in named if not math.isnan(value)}


def _segmented(net: nn.Module, example: Example, precision: str, crop: Sequence[int]) -> Tensor:
    """The class of every voxel, (*shape) uint8, slab after slab."""
    found = torch.empty_like(example.target)
    device = next(net.parameters()).device
    for start, slab in sliding_slabs(example.image[None], net, window=crop, precision=precision, device=device):
        found[start : start + slab.shape[1]] = slab.argmax(0)
    return found


def confusion(found: Tensor, truth: Tensor, count: int) -> Tensor:
    """Voxels by their true class (rows) and the class found (columns), (count, count) int64."""
    pairs = truth.flatten().long() * count + found.flatten()
    return pairs.bincount(minlength=count * count).view(count, count)


def _classes(
    net: nn.Module, examples: Sequence[Example], count: int, precision: str, crop: Sequence[int]
) -> dict[str, float]:
    device = next(net.parameters()).device
    rows = []
    for example in examples:
        image = example.image if example.image.ndim == 1 else middle_box(example.image, crop)
        rows.append(evaluate(net, image[None].to(device), precision).float().softmax(1).cpu())
    probabilities, truth = torch.cat(rows), torch.stack([example.target for example in examples])
    accuracy = (probabilities.argmax(1) == truth).float().mean().item()
    areas = [area(probabilities[:, k], truth == k) for k in range(count)]
    known = [value for value in areas if not math.isnan(value)]
    return {"accuracy": accuracy, "auc": sum(known) / len(known) if known else accuracy}


def area(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: how often a positive outranks a negative, ties counting half; NaN without both."""
    ahead = scores[positive][:, None] - scores[~positive]
    return ((ahead > 0).float() + 0.5 * (ahead == 0).float()).mean().item()
