"""Features of a scan: dense and local, or pooled to one vector; windowed, for scans of any size."""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError, VolumeError
from ..film import FilmPreprocessing, on_film, own_plane, prepare_scan, read_for
from ..models.backbone import Backbone, pad_to_multiple
from ..volume import MAX_BYTES, Prepared, Preprocessing, Volume, laid_on, prepare
from ..weights import write_whole
from .sliding import Progress, Windows, device_of, evaluate, ready_copy, sliding_slabs

WINDOW = (96, 96, 96)  # voxels; the crop of He et al. 2023
FILM_WINDOW = (1, 512, 512)  # pixels; the size of He et al. 2025
BODY_LEVEL = 0.03  # of the model's intensity range: above -963 HU (CT), lung included, the air outside not
GRIDS = ("scan", "model")
PCA_VOXELS = 50_000  # enough for the covariance of a few hundred channels


class PooledFeatures(NamedTuple):
    """One scan as vectors: means over the mask of the bottleneck (C_b,) and of the local features (C_l,), float32."""

    bottleneck: np.ndarray
    local: np.ndarray


def features(
    volume: Volume | str | os.PathLike[str],
    model: nn.Module,
    *,
    window: Sequence[int] | None = None,
    overlap: float = 0.25,
    batch_size: int = 1,
    precision: str = "float32",
    grid: str = "scan",
    max_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
) -> Volume:
    """Dense local features of a scan, (i, j, k, C) float32, on the grid that `affine` describes.

    Args:
        volume: a scan of one channel, or its path; for a 2D model a film, which is a volume of one slice.
        model: with `preprocessing`; a Backbone, the GVSL module (its `unet` is used), or any module
            (B, C, D, H, W) -> (B, K, D, H, W). A model of several input channels gets the scan in each.
        window: (z, y, x) in voxels of the model's grid; default 96 an axis, of a film 512.
        overlap, batch_size, precision: see `sliding_slabs`.
        grid: "scan" for the scan's own axes, shape, affine and header, "model" for the model's grid (canonical axes,
            its spacing; nothing is resampled). Both lie in the same world.
        max_bytes: the most memory that the features may take.
        progress: called with (windows done, windows in all).

    Memory: the features on the model's grid and, for "scan", on the scan's (C * 4 bytes a voxel each); beside them one
        slab of `window[0]` slices, one window's activations, and one channel at a time on its way to the scan's grid.
    Errors: ArgumentError for arguments that do not fit together; VolumeError for a scan that cannot be read or used, or
        features beyond `max_bytes`, before they are computed when the model is a Backbone.
    """
    prepared = prepare_for(volume, model)
    out = dense_features(
        prepared,
        model,
        window=window,
        overlap=overlap,
        batch_size=batch_size,
        precision=precision,
        max_bytes=max_bytes,
        progress=progress,
        grid=grid,
    )
    return prepared.restore(out) if grid == "scan" else prepared.place(out)


def dense_features(
    prepared: Prepared,
    model: nn.Module,
    *,
    window: Sequence[int] | None = None,
    overlap: float = 0.25,
    batch_size: int = 1,
    precision: str = "float32",
    max_bytes: int = MAX_BYTES,
    progress: Progress | None = None,
    grid: str = "model",
) -> Tensor:
    """Dense local features on the model's grid, (C, D, H, W) float32 on the CPU; the arguments are those of `features`.

    grid: where the features will be brought; `max_bytes` counts there.
    """
    if grid not in GRIDS:
        raise ArgumentError(f"grid {grid!r}", "use 'scan' or 'model'")
    backbone = backbone_of(model)
    voxels = max(prepared.image.numel(), int(np.prod(prepared.source.shape)) if grid == "scan" else 0)
    if isinstance(backbone, Backbone):
        _check_bytes(voxels, backbone.num_features, max_bytes)
    out = torch.empty(0)
    for start, slab in sliding_slabs(
        repeated(prepared.image, backbone),
        for_volumes(ready_copy(backbone), model),
        window=window or default_window(model),
        overlap=overlap,
        batch_size=batch_size,
        precision=precision,
        device=device_of(backbone),
        progress=progress,
    ):
        if start == 0:
            _check_bytes(voxels, len(slab), max_bytes)
            out = torch.empty(len(slab), *prepared.shape)
        out[:, start : start + slab.shape[1]] = slab
    return out


def pooled_features(
    volume: Volume | str | os.PathLike[str],
    model: nn.Module,
    *,
    mask: Volume | str | os.PathLike[str] | None = None,
    window: Sequence[int] | None = None,
    overlap: float = 0.25,
    precision: str = "float32",
    progress: Progress | None = None,
) -> PooledFeatures:
    """Mean feature vectors of a scan, over a mask or over the body.

    A mean is linear, so each window is pooled at once with its share of every voxel: the result is the mean of the
    blended map, which is never stored. A bottleneck voxel counts by the part of the mask inside it.

    Args:
        mask: a Volume on the scan's grid, or its path; voxels above 0 count. That of a film has a value for each of
            its pixels. Default: the voxels above 3 % of the model's intensity range (CT: above -963 HU), or all of them
            when there are none.
        volume, model, window, overlap, precision, progress: see `features`.

    Memory: the scan and its mask on the model's grid, and one window's activations.
    Errors: as for `features`; VolumeError for a mask on another grid or without a voxel; ArgumentError for a model that
        has no bottleneck.
    """
    backbone = backbone_of(model)
    if not isinstance(backbone, Backbone):
        raise ArgumentError(f"{type(backbone).__name__} has no bottleneck", "give a backbone, or a module that has one")
    prepared = prepare_for(volume, model)
    image = repeated(prepared.image, backbone)
    counted = body(prepared, model).float() if mask is None else mask_on_grid(mask, prepared, recipe_of(model))
    device, function = device_of(backbone), ready_copy(backbone).forward_features
    sums = [torch.zeros(c, dtype=torch.float64) for c in (backbone.feature_info[-1].channels, backbone.num_features)]
    windows = Windows(prepared.shape, tuple(window or default_window(model)), overlap)
    flat = backbone.ndim == 2
    pool = F.avg_pool2d if flat else F.avg_pool3d
    for done, (box, share) in enumerate(windows, 1):
        weight = share * counted[box]
        if weight.any():
            patch = image[(slice(None), slice(None), *box)].to(device)
            patch, weight = (patch[:, :, 0], weight[0]) if flat else (patch, weight)
            maps = evaluate(function, patch, precision)
            blocks, _ = pad_to_multiple(weight[None, None], backbone.stride, centred=backbone.centred)
            coarse = pool(blocks, backbone.stride) * backbone.stride**backbone.ndim
            for total, values, part in zip(sums, maps, (coarse, weight), strict=True):
                total += (values[0].float().flatten(1) @ part.flatten().to(device)).cpu()
        if progress:
            progress(done, len(windows))
    bottleneck, local = ((total / counted.sum(dtype=torch.float64)).float().numpy() for total in sums)
    return PooledFeatures(bottleneck, local)


def save_pooled(pooled: PooledFeatures, path: str | os.PathLike[str]) -> None:
    """Write pooled features as .npz (arrays) or .json (lists), whole or not at all."""
    path = Path(path)
    if path.suffix == ".npz":
        content = io.BytesIO()
        np.savez(content, **pooled._asdict())
        write_whole(path, content.getvalue())
    elif path.suffix == ".json":
        write_whole(path, json.dumps({name: vector.tolist() for name, vector in pooled._asdict().items()}).encode())
    else:
        raise ArgumentError(f"pooled features cannot be written as {path.name!r}", "end the name in .npz or .json")


def principal_components(features: Tensor, mask: Tensor | None = None, n: int = 3, *, seed: int = 0) -> Tensor:
    """The first principal components of dense features, for pictures.

    Args:
        features: (C, D, H, W) or (C, H, W).
        mask: True where the components are fitted and shown, of the spatial shape; elsewhere the result is 0.
        n: how many, at most C.
        seed: of the voxels drawn for the fit (at most 50,000).

    Returns: (n, *spatial) float32 in [0, 1], each from its 1st to its 99th percentile, in order of variance. The sign
        is such that the largest loading is positive: the same features give the same picture.
    Errors: ArgumentError for a mask of another shape or without a voxel, or n beyond C.
    """
    channels, shape = len(features), features.shape[1:]
    mask = torch.ones(shape, dtype=torch.bool) if mask is None else mask.bool().cpu()
    if mask.shape != shape or not mask.any():
        raise ArgumentError(
            f"mask of shape {tuple(mask.shape)} with {int(mask.sum())} voxels", f"expected {tuple(shape)}"
        )
    if not 1 <= n <= channels:
        raise ArgumentError(f"{n} components of {channels} channels", f"n must be 1 to {channels}")
    flat = features.detach().float().reshape(channels, -1)
    inside = mask.flatten().nonzero()[:, 0]
    drawn = inside[torch.randperm(len(inside), generator=torch.Generator().manual_seed(seed))[:PCA_VOXELS]]
    sample = flat[:, drawn.to(flat.device)].double().cpu()
    mean = sample.mean(1, keepdim=True)
    covariance = (sample - mean) @ (sample - mean).T
    axes = torch.linalg.eigh(covariance).eigenvectors.flip(1)[:, :n]  # (C, n), largest variance first
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    scores = axes.T @ (sample - mean)
    low, high = torch.quantile(scores[:, :PCA_VOXELS], torch.tensor([0.01, 0.99], dtype=torch.float64), dim=1)
    scale = 1 / (high - low).clamp_min(1e-12)
    offset = -(axes.T @ mean)[:, 0] - low
    out = (scale[:, None] * axes.T).to(flat) @ flat.float() + (scale * offset).to(flat)[:, None]
    return (out.clamp_(0, 1) * mask.flatten().to(out.device)).view(n, *shape)


def recipe_of(model: nn.Module) -> Preprocessing | FilmPreprocessing:
    """What the model says of its input; ArgumentError when it says nothing."""
    found = getattr(model, "preprocessing", None)
    if not isinstance(found, Preprocessing | FilmPreprocessing):
        remedy = "load it with gvsl_zoo.load, or set model.preprocessing = gvsl_zoo.volume.Preprocessing(...)"
        raise ArgumentError(f"this {type(model).__name__} does not say what input it expects", remedy)
    return found


def preprocessing_of(model: nn.Module) -> Preprocessing:
    """What a 3D model says of its input; ArgumentError for a 2D one, or when it says nothing."""
    recipe = recipe_of(model)
    if isinstance(recipe, FilmPreprocessing) or getattr(backbone_of(model), "ndim", 3) != 3:
        raise ArgumentError("a 2D model for a volume", "choose a 3D model: gvsl_zoo.list_models(ndim=3)")
    return recipe


def prepare_for(volume: Volume | str | os.PathLike[str], model: nn.Module) -> Prepared:
    """The scan or film, given or read, on the grid of the model."""
    recipe = recipe_of(model)
    return prepare_scan(volume, recipe if isinstance(recipe, FilmPreprocessing) else preprocessing_of(model))


class OneSlice(nn.Module):
    """A model of films as one of volumes of one slice: (B, C, 1, H, W) -> (B, K, 1, H, W)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.squeeze(2)).unsqueeze(2)


def for_volumes(function: nn.Module, model: nn.Module) -> nn.Module:
    """A function of a model's images as one of what `prepare_for` makes for that model."""
    return OneSlice(function) if isinstance(recipe_of(model), FilmPreprocessing) else function


def default_window(model: nn.Module) -> tuple[int, int, int]:
    """(z, y, x) voxels that a model sees at once where nobody says."""
    return FILM_WINDOW if isinstance(recipe_of(model), FilmPreprocessing) else WINDOW


def body(prepared: Prepared, model: nn.Module) -> Tensor:
    """Where there is more than air, (D, H, W) bool: above 3 % of the intensity range; everywhere if that is nowhere."""
    inside = prepared.image[0, 0] > body_level(model)
    return inside if inside.any() else torch.ones_like(inside)


def body_level(model: nn.Module) -> float:
    """The value of the model's input above which there is more than air."""
    low, high = recipe_of(model).scale
    return low + BODY_LEVEL * (high - low)


def mask_on_grid(
    mask: Volume | str | os.PathLike[str],
    prepared: Prepared,
    recipe: Preprocessing | FilmPreprocessing | None = None,
) -> Tensor:
    """The part of every voxel of the model's grid that the mask covers, (D, H, W) float32 in [0, 1].

    recipe: of the model; that of films takes a mask of a film's pixels whatever their millimetres.
    """
    mask, source = read_for(mask, recipe or Preprocessing(), fill=0.0), prepared.source
    if isinstance(recipe, FilmPreprocessing):
        mask = own_plane(on_film(mask, source))
    else:
        mask = laid_on(mask, "the mask", source, "the scan")
    data = (mask.data > 0).astype(np.uint8)
    if not data.any():
        raise VolumeError("the mask has no voxel above 0", "give another mask, or none for the whole body")
    with warnings.catch_warnings():  # a full mask is no empty image
        warnings.simplefilter("ignore")
        coarse = Preprocessing(prepared.spacing_mm, unit="arbitrary", window=(0.0, 1.0))
        return prepare(Volume(data, mask.affine), coarse).image[0, 0]


def backbone_of(model: nn.Module) -> nn.Module:
    """What gives the features: the module's backbone, or the module itself."""
    inner = (getattr(model, name, None) for name in ("unet", "backbone"))
    return next((module for module in inner if isinstance(module, Backbone)), model)


def repeated(image: Tensor, model: nn.Module) -> Tensor:
    """An image of one channel in every channel that the model takes; one of several as it is."""
    return image.expand(-1, channels_of(model), *image.shape[2:])


def channels_of(model: nn.Module) -> int:
    """Image channels that a model takes."""
    return int(getattr(backbone_of(model), "in_chans", 1))


def _check_bytes(voxels: int, channels: int, max_bytes: int) -> None:
    if 4 * voxels * channels > max_bytes:
        cause = f"{channels} features of {voxels} voxels take {4 * voxels * channels / 2**30:.3g} GiB"
        raise VolumeError(cause, "use grid='model', pooled_features, or a crop of the scan, or raise max_bytes")
