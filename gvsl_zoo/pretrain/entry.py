"""The registry entry that the weights of a run carry, from its settings alone."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

from torch import nn

from ..registry import ModelEntry
from .config import PretrainConfig

CITATION = (
    "He et al., Geometric Visual Similarity Learning in 3D Medical Image Self-supervised Pre-training, CVPR 2023, "
    "arXiv:2303.00874"
)


def describe(config: PretrainConfig, name: str, model: nn.Module) -> ModelEntry:
    """The entry that the run's weights carry, from its settings alone."""
    settings = ", ".join(f"{key} {value}" for key, value in asdict(config).items() if key != "steps")
    words = "-".join(re.findall("[a-z0-9]+", name.lower())) or "run"
    axes = {"axes": "zyx", "spacing_mm": [config.spacing_mm] * 3, "orientation": "RAS"}
    hu = {"unit": "HU", "window": [-1024, 1024], "scale": [0, 1]}
    grey = {"unit": "grey", "window": [0, 255], "scale": [0, 1]}
    model_config: dict[str, Any] = {"ndim": config.ndim, "width": config.width}
    if config.affine_width:
        model_config["affine_width"] = config.affine_width
    return ModelEntry.from_dict(
        {
            "name": f"gvsl-{words}",
            "summary": f"A pre-training run of gvsl-zoo: objective {config.objective}, {config.steps} steps.",
            "status": "available",
            "architecture": "unet",
            "config": model_config,
            "ndim": config.ndim,
            "modality": "CT" if config.ndim == 3 else "X-ray",
            "objective": "gvsl",
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "input": (axes if config.ndim == 3 else {"axes": "yx"}) | {"intensity": hu if config.ndim == 3 else grey},
            "heads": ["affine", "deformable", "restoration"],
            "licence": {"code": "Apache-2.0", "weights": "not stated", "data": "not stated"},
            "citation": CITATION,
            "training": {"recipe": settings, "data": "not stated", "steps": config.steps},
            "limits": "Research only, not a medical device. Nothing has been measured on these weights.",
        }
    )
