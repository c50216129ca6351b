"""ONNX: a loaded model as one file for onnxruntime, with its recipe and licence inside."""

from __future__ import annotations

import copy
import json
import operator
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ArgumentError, WeightsError, needs
from ..models.backbone import Backbone, FeatureList
from ..models.gemini import GEMINI, MutualMatching, WholeModule
from ..models.gvsl import Matching
from ..models.xmorpher import XMorpher
from ..weights import METADATA_KEY, write_whole
from . import parts_of

OPSET = 20  # the first with grid sampling of volumes
RECIPE_KEY = "preprocessing"
EXAMPLE = (37, 50, 61)  # no two sizes alike, none a multiple of the stride: nothing can be mistaken for a constant
AXES = ("depth", "height", "width")


def export_onnx(
    model: nn.Module, path: str | os.PathLike[str], *, shape: Sequence[int] | None = None, overwrite: bool = False
) -> Path:
    """Write a loaded model as an ONNX file, in evaluation mode and float32 whatever the model stands in.

    Input `image` (B, C, *spatial), outputs `features`, `logits`, or the levels' names of a feature list; a U-Net's
    batch and sizes are free. A registration model takes `fixed` and `moving` and gives what it returns, for one pair of
    one shape: its geometry is computed from the size of the grid. The file's metadata hold the entry (`gvsl_zoo`) and
    the recipe of the input (`preprocessing`) as JSON.

    Args:
        path: of the file, .onnx.
        shape: spatial shape to fix, with a batch of one; registration needs it, and so does an XMorpher.

    Returns: the path, written whole or not at all.
    Errors: ArgumentError for what cannot be exported, WeightsError for a file that cannot be written, GvslZooError
        where onnx or onnxscript is not installed.
    """
    entry, backbone = parts_of(model)
    path = Path(path).expanduser()
    if path.exists() and not overwrite:
        raise WeightsError(f"{path} exists already", "choose another name, or pass overwrite=True (--overwrite)")
    if not path.parent.is_dir():
        raise WeightsError(f"the folder {path.parent} does not exist", "make it first")
    if not os.access(path.parent, os.W_OK):
        raise WeightsError(f"the folder {path.parent} may not be written to", "choose another folder")
    if isinstance(model, WholeModule) and shape is None:
        raise ArgumentError("registration computes its grid from the image's size", "give shape=(D, H, W)")
    if isinstance(backbone, XMorpher) and shape is None:
        raise ArgumentError("an XMorpher lays out its windows for one size", "give shape=, a size in voxels an axis")
    size = None if shape is None else _size(shape, backbone.ndim)
    needs("export", "ONNX", "onnx", "onnxscript")
    inputs = ("fixed", "moving") if isinstance(model, WholeModule) else ("image",)
    program = _program(model, backbone, inputs, size)
    recipe = getattr(model, "preprocessing", None)
    program.model.metadata_props[METADATA_KEY] = json.dumps(entry.to_dict())
    program.model.metadata_props[RECIPE_KEY] = json.dumps(None if recipe is None else asdict(recipe))
    try:
        write_whole(path, program.model_proto.SerializeToString())
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {error.strerror}", "choose another place") from None
    return path


def _size(shape: Sequence[int], ndim: int) -> tuple[int, ...]:
    try:
        size = tuple(map(operator.index, shape))
    except TypeError:
        size = ()
    if len(size) != ndim or min(size) < 1:
        raise ArgumentError(f"shape {shape!r} for a {ndim}D model", "give a whole number of voxels an axis")
    return size


def _program(model: nn.Module, backbone: Backbone, inputs: Sequence[str], size: Sequence[int] | None) -> Any:
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()  # the caller's may be training, in half or on a GPU
    batch, shape = (2, EXAMPLE[-backbone.ndim :]) if size is None else (1, size)
    examples = [torch.zeros(batch, backbone.in_chans, *shape) for _ in inputs]  # one for two: one input
    free = {0: "batch"} | {2 + i: name for i, name in enumerate(AXES[-backbone.ndim :])}
    with torch.no_grad():
        return torch.onnx.export(
            model,
            tuple(examples),
            input_names=inputs,
            output_names=output_names(model),
            dynamic_shapes=(free,) if size is None else None,
            opset_version=OPSET,
            custom_translation_table={torch.ops.aten.group_norm.default: _group_norm()},
            dynamo=True,
            verbose=False,
        )


def output_names(model: nn.Module) -> list[str]:
    """Names of the file's outputs."""
    if isinstance(model, WholeModule):
        return list((MutualMatching if isinstance(model, GEMINI) else Matching)._fields)
    if isinstance(model, FeatureList):
        return model.feature_info.module_name()
    return ["features" if isinstance(model, Backbone) else "logits"]


def _group_norm() -> Callable[..., Any]:
    """Group normalisation with means taken an axis at a time: the exporter's own form makes onnxruntime sum millions of
    voxels one by one, which costs three digits where an image is padded.
    """
    from onnxscript.onnx_opset import opset20 as op

    def group_norm(
        x: Any, num_groups: int, weight: Any, bias: Any, eps: float = 1e-5, cudnn_enabled: bool = True
    ) -> Any:
        channels, axes = x.shape[1], range(2, len(x.shape))

        def ints(*values: int) -> Any:
            return op.Constant(value_ints=values)

        def mean(x: Any) -> Any:  # (B, C, *spatial) -> (B, C, 1, ...), the same in all channels of a group
            for axis in reversed(axes):
                x = op.ReduceMean(x, ints(axis))
            x = op.ReduceMean(op.Reshape(x, ints(0, num_groups, -1)), ints(2))
            x = op.Expand(x, ints(1, 1, channels // num_groups))
            return op.Reshape(x, ints(0, channels, *(1 for _ in axes)))

        centred = op.Sub(x, mean(x))
        normal = op.Div(centred, op.Sqrt(op.Add(mean(op.Mul(centred, centred)), eps)))
        per_channel = ints(*range(1, len(axes) + 1))
        return op.Add(op.Mul(normal, op.Unsqueeze(weight, per_channel)), op.Unsqueeze(bias, per_channel))

    return group_norm
