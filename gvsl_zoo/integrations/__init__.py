"""Our models in other libraries: MONAI, nnU-Net, ONNX. Each is imported where it is used."""

from __future__ import annotations

from torch import nn

from ..errors import ArgumentError
from ..models.backbone import Backbone
from ..registry import ModelEntry


def parts_of(model: nn.Module) -> tuple[ModelEntry, Backbone]:
    """The entry and the backbone of a loaded model; ArgumentError for another module."""
    entry = getattr(model, "entry", None)
    candidates = (model, getattr(model, "unet", None), getattr(model, "backbone", None))
    backbone = next((part for part in candidates if isinstance(part, Backbone)), None)
    if not isinstance(entry, ModelEntry) or backbone is None:
        raise ArgumentError(f"a {type(model).__name__} is no model of the zoo", "give one that gvsl_zoo.load returned")
    return entry, backbone
