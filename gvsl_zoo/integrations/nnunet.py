"""nnU-Net v2: our U-Net as a network class of its plans, plans that name it, weights for its -pretrained_weights."""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ArgumentError, GvslZooError, WeightsError
from ..models.backbone import CONV, initialise
from ..models.unet import UNet
from ..registry import Input, ModelEntry
from ..volume import InputWarning
from ..weights import write_whole
from . import parts_of

PLANS_NAME = "gvslPlans"
CT = "CTNormalization"  # clip to two percentiles, subtract the mean, divide by the SD: all four stand in the plans
MIN_MAX = "RescaleTo01Normalization"
REORIENTING_READER = "NibabelIOWithReorient"  # the only one that brings every scan to RAS


class SegmentationOutputs(nn.Module):
    """A convolution 1 a decoder level, coarsest first, named as nnU-Net names them: it never loads `seg_layers`."""

    def __init__(self, ndim: int, channels: Sequence[int], num_classes: int, deep_supervision: bool) -> None:
        super().__init__()
        self.deep_supervision = deep_supervision
        self.seg_layers = nn.ModuleList(CONV[ndim](chans, num_classes, 1) for chans in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor] | Tensor:
        """Logits of the maps, coarsest first: all, finest first, under deep supervision; otherwise the finest."""
        logits = [layer(x) for layer, x in zip(self.seg_layers[-len(maps) :], maps, strict=True)]
        return logits[::-1] if self.deep_supervision else logits[-1]


class NnUNet(nn.Module):
    """The zoo's U-Net as nnU-Net builds its networks: `network_class_name` in the plans of `write_plans`.

    Args:
        input_channels, num_classes: from the data set.
        width: channels of the full-resolution level.
        strides: of every level and axis, [[1, 1, 1], [2, 2, 2], ...]: nnU-Net scales its targets by them.
        deep_supervision: logits of every decoder level, finest first; nnU-Net switches `decoder.deep_supervision`.

    Tensors: `backbone.*` as in the zoo's files, and `decoder.seg_layers.*`.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        width: int,
        strides: Sequence[Sequence[int]],
        deep_supervision: bool = True,
    ) -> None:
        super().__init__()
        ndim = len(strides[0])
        if [list(stride) for stride in strides] != unet_strides(ndim):
            raise ArgumentError(f"strides {strides}", f"the U-Net has {unet_strides(ndim)}")
        self.num_classes = num_classes
        self.backbone = UNet(ndim, width, input_channels)
        self.decoder_levels = range(UNet.encoder_levels, len(self.backbone.levels))
        channels = [self.backbone.levels[i].channels for i in self.decoder_levels]
        self.decoder = SegmentationOutputs(ndim, channels, num_classes, deep_supervision)
        initialise(self.decoder)

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        """Logits (B, num_classes, *spatial) of x (B, C, *spatial), any size; a list under deep supervision."""
        wanted = self.decoder_levels if self.decoder.deep_supervision else self.decoder_levels[-1:]
        return self.decoder(self.backbone.forward_intermediates(x, wanted))

    def compute_conv_feature_map_size(self, input_size: Sequence[int]) -> int:
        """Numbers that the convolutions return for one image (*spatial): nnU-Net's measure of memory."""
        levels, stride = self.backbone.levels, self.backbone.stride
        padded = [-(-size // stride) * stride for size in input_size]
        inside = sum(2 * level.channels * math.prod(s // level.reduction for s in padded) for level in levels)
        supervised = self.decoder_levels if self.decoder.deep_supervision else self.decoder_levels[-1:]
        maps = (math.prod(-(-s // levels[i].reduction) for s in input_size) for i in supervised)
        return inside + self.num_classes * sum(maps)


def unet_strides(ndim: int) -> list[list[int]]:
    """Of the U-Net's encoder levels, as nnU-Net's plans write them."""
    return [[1] * ndim] + [[2] * ndim] * (UNet.encoder_levels - 1)


def export_checkpoint(model: nn.Module, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the backbone of a loaded model as a file for `nnUNetv2_train -pretrained_weights`.

    nnU-Net draws the segmentation layers itself. For data of several channels load the model with `in_chans`.

    Errors: ArgumentError for a module without a whole U-Net, WeightsError for a file that cannot be written.
    """
    _, backbone = _whole_unet(model)
    path = Path(path).expanduser()
    if path.exists() and not overwrite:
        raise WeightsError(f"{path} exists already", "choose another name, or pass overwrite=True")
    weights = {f"backbone.{name}": tensor.detach().cpu().float() for name, tensor in backbone.state_dict().items()}
    buffer = io.BytesIO()
    torch.save({"network_weights": weights}, buffer)
    try:
        write_whole(path, buffer.getbuffer())
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {error.strerror}", "choose another place") from None
    return path


def write_plans(
    model: nn.Module, plans: str | os.PathLike[str], *, name: str = PLANS_NAME, overwrite: bool = False
) -> Path:
    """Write plans with our network beside those that nnU-Net made, for `nnUNetv2_preprocess` and `nnUNetv2_train`.

    Kept: nnU-Net's spacing, resampling and batch size. Changed: the network, intensities (what the weights expect),
    the axes' order (z, y, x, whichever is the coarsest), patches (whole strides), and the names of plans and data.
    Configurations of another dimension and cascades are left out.

    Args:
        model: loaded, of as many image channels as the data set.
        plans: nnUNetPlans.json of the preprocessed data set.
        name: of the new plans, which lie in the same folder.

    Returns: the path of the new plans.
    Errors: ArgumentError where model and plans do not fit together, GvslZooError for a file that cannot be written.
        Warns (InputWarning) where the data set's reader leaves scans in orientations that pre-training never saw.
    """
    entry, backbone = _whole_unet(model)
    source = Path(plans).expanduser()
    if not name or name != Path(name).name:
        raise ArgumentError(f"name={name!r} of the new plans", "give a file's name without a folder and an ending")
    path = source.with_name(f"{name}.json")
    if path.exists() and not overwrite:
        raise ArgumentError(f"{path} exists already", "choose another name=, or pass overwrite=True")
    try:
        known = json.loads(source.read_text(encoding="utf-8"))
        changed = patch_plans(known, entry, backbone, name)
    except ArgumentError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"{source} is not nnU-Net v2's plans ({type(error).__name__}: {error})"
        raise ArgumentError(cause, "give the nnUNetPlans.json that nnUNetv2_plan_experiment wrote") from None
    if entry.ndim == 3 and changed["image_reader_writer"] != REORIENTING_READER:
        text = f"{changed['image_reader_writer']} leaves scans in their own orientation, the weights know RAS"
        remedy = f'write "overwrite_image_reader_writer": "{REORIENTING_READER}" into dataset.json and plan again'
        warnings.warn(f"{text}; {remedy}", InputWarning, stacklevel=2)
    try:
        write_whole(path, json.dumps(changed, indent=4).encode())
    except OSError as error:
        raise GvslZooError(f"cannot write {path}: {error.strerror}", "copy the plans where you may write") from None
    return path


def patch_plans(plans: dict[str, Any], entry: ModelEntry, backbone: UNet, name: str) -> dict[str, Any]:
    """nnU-Net's plans with our network in them, as `write_plans` says."""
    ndim, stride = backbone.ndim, backbone.stride
    back = plans["transpose_backward"] if ndim == 3 else [0, 1]
    configurations, rescaled = {}, set()
    for key, planned in plans["configurations"].items():
        if "architecture" not in planned or len(planned["patch_size"]) != ndim:
            continue
        configuration = {field: value for field, value in planned.items() if field != "next_stage"}
        for field in ("patch_size", "spacing", "median_image_size_in_voxels"):
            configuration[field] = [planned[field][axis] for axis in back]
        configuration["patch_size"] = [-(-size // stride) * stride for size in configuration["patch_size"]]
        schemes, ours = _normalisation(planned["normalization_schemes"], entry.input)
        rescaled |= ours
        if len(schemes) != backbone.in_chans:
            raise ArgumentError(
                f"{len(schemes)} channels in the plans, {backbone.in_chans} in the model",
                f"load the model with in_chans={len(schemes)}",
            )
        configurations[key] = configuration | {
            "data_identifier": f"{name}_{key}",
            "normalization_schemes": schemes,
            "architecture": {
                "network_class_name": f"{NnUNet.__module__}.{NnUNet.__qualname__}",
                "arch_kwargs": {"width": backbone.width, "strides": unet_strides(ndim)},
                "_kw_requires_import": [],
            },
        }
    if not configurations:
        raise ArgumentError(f"the plans have no {ndim}D configuration", f"{entry.name} is a {ndim}D model")
    intensities = dict(plans["foreground_intensity_properties_per_channel"])
    for channel in rescaled:
        intensities[str(channel)] = intensities[str(channel)] | _window(entry.input)
    changed = plans | {
        "plans_name": name,
        "configurations": configurations,
        "foreground_intensity_properties_per_channel": intensities,
    }
    if ndim == 3:
        changed |= {"transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2]}
        for field in ("original_median_spacing_after_transp", "original_median_shape_after_transp"):
            changed[field] = [plans[field][axis] for axis in back]
    return changed


def _whole_unet(model: nn.Module) -> tuple[ModelEntry, UNet]:
    entry, backbone = parts_of(model)
    if not isinstance(backbone, UNet) or not backbone.has_decoder:
        raise ArgumentError(f"{entry.name} as loaded has no U-Net with a decoder", "load it with task='backbone'")
    return entry, backbone


def _normalisation(planned: Sequence[str], given: Input) -> tuple[list[str], set[int]]:
    """The scheme of every channel, and which channels are brought to the model's window.

    Channels of the model's kind, CT or not, get what its weights expect; others keep what was planned.
    """
    is_ct = given.intensity.unit == "HU"
    of_our_kind = {channel for channel, scheme in enumerate(planned) if (scheme == CT) == is_ct}
    if not of_our_kind:
        raise ArgumentError(
            f"the model takes {given.intensity.unit}, but no channel does (planned: {', '.join(planned)})",
            "name the channels in dataset.json for what they are: CT, or anything else",
        )
    windowed = None not in given.intensity.window
    if not windowed and given.intensity.scale != (0.0, 1.0):
        raise ArgumentError("a window without ends that is not scaled to [0, 1]", "nnU-Net has no scheme for it")
    ours = CT if windowed else MIN_MAX
    schemes = [ours if channel in of_our_kind else scheme for channel, scheme in enumerate(planned)]
    return schemes, of_our_kind if windowed else set()


def _window(given: Input) -> dict[str, float]:
    """What makes nnU-Net's CT scheme clip to the model's window and map it onto the model's scale."""
    (low, high), (bottom, top) = given.intensity.window, given.intensity.scale
    assert low is not None and high is not None
    unit = (high - low) / (top - bottom)
    return {"percentile_00_5": low, "percentile_99_5": high, "mean": low - bottom * unit, "std": unit}
