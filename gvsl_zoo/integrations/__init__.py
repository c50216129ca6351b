"""Our models in other libraries: MONAI, nnU-Net, ONNX. Each is imported where it is used."""

from __future__ import annotations

from torch import nn

from ..errors import ArgumentError
from ..models.backbone import Backbone
from ..registry import ModelEntry


def parts_of(model: nn.Module) -> tuple[ModelEntry, Backbone]:
    """The entry and the backbone of a loaded model; ArgumentError for another module."""
    entry = getattr(model, "entry", None)
    backbone = model if isinstance(model, Backbone) else getattr(model, "backbone", None)
    if not isinstance(entry, ModelEntry) or not isinstance(backbone, Backbone):
        raise ArgumentError(f"a {type(model).__name__} is no model of the zoo", "give one that gvsl_zoo.load returned")
    return entry, backbone
