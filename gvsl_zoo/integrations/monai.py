"""MONAI: our models in its axis order, and its transforms that give them what their weights expect."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, VolumeError, needs
from ..models.backbone import Backbone, FeatureList
from ..models.heads import HeadedModel
from ..volume import READ_AGAIN, InputWarning, Preprocessing


class ForMonai(nn.Module):
    """A loaded model that takes and gives MONAI's axes, (B, C, x, y, z), where ours has (B, C, z, y, x).

    Without it a network sees scans lying on their side: it runs, trains and gives the right shapes all the same.

    Args:
        model: a backbone, feature list, segmentation or classification model; shared, not copied.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, Backbone | FeatureList | HeadedModel):
            raise ArgumentError(
                f"a {type(model).__name__} has no one image in and maps out",
                "load a backbone, a segmentation or a classification model",
            )
        self.model = model

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """What the model gives for x (B, C, x, y, z) or (B, C, x, y), its spatial axes in MONAI's order."""
        out = self.model(turned(x))
        return [turned(level) for level in out] if isinstance(out, list) else turned(out)


def turned(x: Tensor) -> Tensor:
    """The spatial axes of (B, C, *spatial) in the opposite order, as a view; (B, K) stays."""
    return x.permute(0, 1, *range(x.ndim - 1, 1, -1))


def image_transforms(model: nn.Module, image: str = "image", label: str | None = None) -> Any:
    """MONAI's transforms that bring a file to what a loaded 3D model expects, in MONAI's axis order.

    RAS axes, the model's spacing, its window and scale; in a `DataLoader` after them goes `ForMonai(model)`. Where
    nothing is resampled the image is `model.preprocess`'s; elsewhere MONAI interpolates without smoothing first. All
    steps but the intensities' can be undone with `Invertd`.

    Args:
        image, label: keys of the dictionary that hold paths; labels get the nearest voxel.

    Returns: a `monai.transforms.Compose`.
    Errors: ArgumentError for a model without a recipe for volumes, GvslZooError where MONAI is not installed.
    """
    needs("monai", "image_transforms", "monai")
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd, Spacingd

    recipe = getattr(model, "preprocessing", None)
    if not isinstance(recipe, Preprocessing):
        raise ArgumentError("a model without a recipe for volumes", "give a 3D model that gvsl_zoo.load returned")
    keys = [image] if label is None else [image, label]
    steps = [LoadImaged(keys), EnsureChannelFirstd(keys), Orientationd(keys, axcodes=recipe.orientation, labels=None)]
    if recipe.spacing_mm is not None:
        modes = ["bilinear", "nearest"][: len(keys)]
        steps.append(Spacingd(keys, pixdim=recipe.spacing_mm[::-1], mode=modes))
    return Compose([*steps, partial(with_scaled, key=image, recipe=recipe)])


def with_scaled(case: dict[str, Any], key: str, recipe: Preprocessing) -> dict[str, Any]:
    """The dictionary with one image `scaled`: a plain function, which MONAI's inverse passes over."""
    return case | {key: scaled(case[key], recipe)}


def scaled(image: Tensor, recipe: Preprocessing) -> Tensor:
    """Intensities (C, *shape) clipped to the recipe's window and mapped onto its scale, each channel for itself.

    NaN and infinity count as the smallest finite value of their channel, with a warning (InputWarning).

    Errors: VolumeError for a channel without any finite value.
    """
    finite = image.isfinite()
    axes = tuple(range(1, image.ndim))
    if not finite.all():
        if not finite.flatten(1).any(1).all():
            raise VolumeError("no voxel has a finite value", READ_AGAIN)
        image = image.where(finite, image.where(finite, torch.inf).amin(axes, keepdim=True))
        text = f"{int((~finite).sum())} of {finite.numel()} voxels were NaN or infinite and are now the smallest value"
        warnings.warn(text, InputWarning, stacklevel=2)
    floor = 0.0 if recipe.unit == "arbitrary" else -torch.inf
    low, high = (
        extreme.clamp(min=floor) if end is None else torch.full_like(extreme, end)
        for end, extreme in zip(
            recipe.window or (None, None), (image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)), strict=True
        )
    )
    span = (high - low).where(high > low, 1.0)
    bottom, top = recipe.scale
    return (image.clamp(low, high) - low) / span * (top - bottom) + bottom
