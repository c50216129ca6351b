"""Segmentation from one or a few labelled scans without training: a linear map of a frozen backbone's feature maps."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, VolumeError, listed
from ..film import read_labels
from ..models.backbone import Backbone, crop, pad_to_multiple
from ..registry import Label
from ..volume import InputWarning, Prepared, Preprocessing, Volume, laid_on
from .features import WINDOW, backbone_of, preprocessing_of
from .refine import recorded
from .segment import Scan, comment_labels, prepare_channels
from .sliding import Windows, device_of, evaluate, ready_copy

# Chosen with a nano CT model on four chest CTs, each labelling the three others; the test scans took no part.
VOXELS = 1000  # of a class and scan, as many of each class as there are: a small organ counts as much as the background
MOST_VOXELS = 30_000  # of a scan
WEIGHT_DECAY = 1e-2  # of weights on features of unit SD
PRIOR = 0.5  # of the logarithm of the true shares of the classes, in the bias
ITERATIONS = 60  # of L-BFGS
OVERLAP = 0.5


class SupportModel(nn.Module):
    """A frozen backbone whose feature maps of all levels, and the image, are mapped linearly to logits.

    Linear map and linear interpolation commute: every level is mapped at its own resolution, and only the K logits are
    brought to that of the image.

    Args:
        backbone: see `feature_maps`.
        weight: (K, F), F the channels of all maps. bias: (K,).
        labels: of the K classes, in order.
        preprocessing: what the backbone expects of a scan.
    """

    def __init__(
        self,
        backbone: nn.Module,
        weight: Tensor,
        bias: Tensor,
        labels: Sequence[Label],
        preprocessing: Preprocessing,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.weight, self.bias = nn.Buffer(weight), nn.Buffer(bias)
        self.labels, self.preprocessing = tuple(labels), preprocessing

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, D, H, W) of x (B, C, D, H, W)."""
        padded, front = pad_to_multiple(x, stride_of(self.backbone))
        maps = feature_maps(self.backbone, padded)
        logits = self.bias.view(1, -1, 1, 1, 1)
        for level, weight in zip(maps, self.weight.split([m.shape[1] for m in maps], 1), strict=True):
            coarse = F.conv3d(level.to(weight.dtype), weight.view(*weight.shape, 1, 1, 1))
            logits = logits + F.interpolate(coarse, padded.shape[2:], mode="trilinear", align_corners=False)
        return crop(logits, front, x.shape[2:])


def fit_support(supports: Sequence[tuple[Scan, Scan]], model: nn.Module, *, precision: str = "float32") -> SupportModel:
    """A model for `segment` that carries the labels of one or a few labelled scans over to others.

    A logistic regression is fitted to features of voxels drawn from the labelled scans; the backbone stays as it is.

    Args:
        supports: pairs (scan, label map), each a volume or a path; the map on the scan's grid, 0 for the background.
        model: with `preprocessing`; a Backbone, or a module that has one as `unet` or `backbone`, or any module
            (B, C, D, H, W) -> (B, F, D, H, W).
        precision: of the backbone, see `sliding_slabs`.

    Returns: the model, with `labels`: every value that occurs, under the name that a map's header gives it (see
        `label_comment`), or else under its number.
    Memory: the scans on the model's grid, one window's activations, and F numbers for up to 30,000 voxels a scan.
    Errors: VolumeError for labels on another grid or that are not whole numbers from 0 to 65535; ArgumentError for
        labels of one value only.
    """
    recipe = preprocessing_of(model)
    pairs = [(prepare_channels(scan, model), read_label_map(labels)) for scan, labels in supports]
    pairs = [(prepared, laid_on(labels, "the label map", prepared.source, "its scan")) for prepared, labels in pairs]
    names = named_labels([labels for _, labels in pairs])
    values = [label.value for label in names]
    generator = torch.Generator().manual_seed(0)
    backbone = ready_copy(backbone_of(model))
    inputs, classes, shares = [], [], torch.zeros(len(values))
    for prepared, labels in pairs:
        index_of = np.zeros(values[-1] + 1, np.int64)
        index_of[values] = np.arange(len(values))
        grid = torch.from_numpy(prepared.bring_labels(index_of[labels.data], len(values)))
        shares += torch.bincount(grid.flatten(), minlength=len(values)) / grid.numel()
        points = _draw(grid, len(values), generator)
        inputs.append(_features_at(points, prepared, backbone, precision))
        classes.append(grid[tuple(points.T)])
    drawn = torch.bincount(torch.cat(classes), minlength=len(values))
    if lost := [label.name for label, count in zip(names, drawn.tolist(), strict=True) if not count]:
        text = f"no voxel of the model's grid shows {listed(lost)}, which will not be found"
        warnings.warn(f"{text}; take a model of a finer one", InputWarning, stacklevel=2)
    with torch.inference_mode(False), torch.enable_grad():  # whatever the caller is in
        weight, bias = _regress(recorded(torch.cat(inputs)), recorded(torch.cat(classes)), len(values))
    bias += PRIOR * (shares / len(pairs)).clamp_min(1e-8).log()
    device = device_of(backbone)
    return SupportModel(backbone, weight.to(device), bias.to(device), names, recipe).eval()


def feature_maps(backbone: nn.Module, x: Tensor) -> list[Tensor]:
    """The image and all feature maps of a backbone, or the output of any other module; x a multiple of its stride."""
    if isinstance(backbone, Backbone):
        return [x, *backbone.forward_intermediates(x, range(len(backbone.levels)))]
    return [x, backbone(x)]


def stride_of(backbone: nn.Module) -> int:
    return backbone.stride if isinstance(backbone, Backbone) else 1


def named_labels(maps: Sequence[Volume]) -> list[Label]:
    """Every value that occurs in label maps, 0 first, under the name that a map's header gives it or its number.

    Errors: ArgumentError for maps of one value only.
    """
    values = sorted({0}.union(*(np.unique(labels.data).tolist() for labels in maps)))
    if len(values) < 2:
        raise ArgumentError("the support labels hold nothing but background", "give a map with values above 0")
    named = {label.value: label for labels in maps for label in comment_labels(labels)}
    return [named.get(value, Label("background" if value == 0 else str(value), value)) for value in values]


def read_label_map(labels: Scan) -> Volume:
    """A label map, uint16. Errors: VolumeError for what is not whole numbers from 0 to 65535."""
    volume = read_labels(labels)
    if (most := volume.data.max()) > np.iinfo(np.uint16).max:
        raise VolumeError(f"the support labels hold the value {most:g}", "give whole numbers from 0 to 65535")
    return replace(volume, data=volume.data.astype(np.uint16))


def _draw(classes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Voxels (N, 3) drawn from each class that there is, without putting back."""
    drawn = []
    for index in range(count):
        found = (classes == index).nonzero()
        drawn.append(found[torch.randperm(len(found), generator=generator)[: min(VOXELS, MOST_VOXELS // count)]])
    return torch.cat(drawn)


def _features_at(points: Tensor, prepared: Prepared, backbone: nn.Module, precision: str) -> Tensor:
    """The blended feature maps, interpolated linearly, at voxels (N, 3) of the model's grid: (N, F) float32."""
    total, device = torch.zeros(len(points), 0), device_of(backbone)
    for box, share in Windows(prepared.shape, WINDOW, OVERLAP):
        start, shape = torch.tensor([s.start for s in box]), torch.tensor(share.shape)
        inside = ((points >= start) & (points < start + shape)).all(1)
        if not inside.any():
            continue
        place = points[inside] - start
        padded, front = pad_to_multiple(prepared.image[(slice(None), slice(None), *box)], stride_of(backbone))
        maps = evaluate(lambda x: feature_maps(backbone, x), padded.to(device), precision)
        centre = 2 * (place + torch.tensor(front) + 0.5) / torch.tensor(padded.shape[2:]) - 1
        grid = centre.flip(1).view(1, -1, 1, 1, 3)
        found = [
            F.grid_sample(level.float().cpu(), grid, padding_mode="border", align_corners=False)[0, :, :, 0, 0]
            for level in maps
        ]
        values = torch.cat(found).T  # (points inside, F)
        if not total.shape[1]:
            total = torch.zeros(len(points), values.shape[1])
        total[inside] += values * share[tuple(place.T)][:, None]
    return total


def _regress(inputs: Tensor, classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression of classes (N,) on inputs (N, F), classes alike: weight (K, F) and bias (K,)."""
    mean, sd = inputs.mean(0), inputs.std(0).clamp_min(1e-6)
    inputs = (inputs - mean) / sd
    weight, bias = (torch.zeros(*shape, requires_grad=True) for shape in ((count, inputs.shape[1]), (count,)))
    alike = 1 / torch.bincount(classes, minlength=count).clamp_min(1)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T + bias, classes, alike) + WEIGHT_DECAY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight, bias = weight.detach() / sd, bias.detach()
    return weight, bias - weight @ mean
