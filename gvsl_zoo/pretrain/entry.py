"""The registry entry that the weights of a run carry, from its settings alone."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from ..cache import sha256_of
from ..card import card_files
from ..registry import SCHEMA_VERSION, Evaluation, ModelEntry
from ..weights import WEIGHTS_NAME, write_whole
from .config import PretrainConfig

CITATION = (
    "He et al., Geometric Visual Similarity Learning in 3D Medical Image Self-supervised Pre-training, CVPR 2023, "
    "arXiv:2303.00874"
)
GEMINI_CITATION = (
    "He et al., Homeomorphism Prior for False Positive and Negative Problem in Medical Image Dense Contrastive "
    "Representation Learning (GEMINI), IEEE TPAMI 2025, doi:10.1109/TPAMI.2025.3540644, arXiv:2502.05282"
)
XMORPHER_CITATION = (
    "; Shi et al., XMorpher: Full Transformer for Deformable Medical Image Registration via Cross Attention, "
    "MICCAI 2022, arXiv:2206.07349"
)
LIMITS = "Research only, not a medical device. Measured on synthetic pairs alone."
UNTRAINED = {  # what an objective leaves out
    "gvsl": "",
    "restoration": " The affine and deformable heads were not trained.",
    "matching": " The restoration head was not trained.",
    "no-affine": " The affine head was not trained and gives the identity.",
    "gemini": "",
}
INTENSITY = {  # what the inputs were, by the unit of the scans
    "HU": {"unit": "HU", "window": [-1024, 1024], "scale": [0, 1]},
    "grey": {"unit": "grey", "window": [0, 255], "scale": [0, 1]},
    "arbitrary": {"unit": "arbitrary", "window": [None, None], "scale": [0, 1]},
}


def describe(config: PretrainConfig, name: str, model: nn.Module) -> ModelEntry:
    """The entry that the run's weights carry, from its settings alone."""
    values = asdict(config) | {"pair_mode": config.pair_mode if config.cross_share else "self"}
    settings = ", ".join(f"{key} {value}" for key, value in values.items() if key != "steps")
    words = "-".join(re.findall("[a-z0-9]+", name.lower())) or "run"
    axes = {"axes": "zyx", "spacing_mm": [config.spacing_mm] * 3, "orientation": "RAS"}
    gemini = config.objective == "gemini"
    family = "gemini" if gemini else "gvsl"
    model_config: dict[str, Any] = {"ndim": config.ndim, "width": config.width}
    if config.window:
        model_config["window"] = config.window
    if config.affine_width and not gemini:
        model_config["affine_width"] = config.affine_width
    return ModelEntry.from_dict(
        {
            "name": f"{family}-{words}",
            "summary": f"A pre-training run of gvsl-zoo: objective {config.objective}, {config.steps} steps.",
            "status": "available",
            "architecture": config.backbone,
            "config": model_config,
            "ndim": config.ndim,
            "modality": "X-ray" if config.ndim == 2 else "CT" if config.scan_unit == "HU" else "MR",
            "objective": family,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "input": (axes if config.ndim == 3 else {"axes": "yx"}) | {"intensity": INTENSITY[config.scan_unit]},
            "heads": ["deformer", "restoration"] if gemini else ["affine", "deformable", "restoration"],
            "licence": {"code": "Apache-2.0", "weights": "not stated", "data": "not stated"},
            "citation": (GEMINI_CITATION if gemini else CITATION) + XMORPHER_CITATION * (config.backbone == "xmorpher"),
            "training": {"recipe": settings, "data": "not stated", "steps": config.steps},
            "limits": LIMITS + UNTRAINED[config.objective],
        }
    )


def finish(out: Path, entry: ModelEntry, last: dict[str, float]) -> None:
    """Put beside the weights of a run their card, with what validation measured, and a registry that lists them."""
    measured = ("ncc_before", "ncc_after", "dice_before", "dice_after", "folded")
    command = f"gvsl-zoo pretrain --out {out.name} (validation at its end)"
    results = tuple(
        Evaluation("registration", "8 held-out synthetic pairs", name, round(last[name], 4), command=command)
        for name in measured
    )
    publish(out, replace(entry, evaluation=results))


def publish(out: Path, entry: ModelEntry) -> None:
    """Put beside the weights of a run their card, and a registry that lists them."""
    for name, text in card_files(entry).items():
        if name != "config.json":  # a run's is that of its settings
            write_whole(out / name, text.encode())
    row = entry.to_dict()
    del row["name"]
    row["sources"] = [{"kind": "file", "path": WEIGHTS_NAME, "sha256": sha256_of(out / WEIGHTS_NAME)}]
    listing = {"schema_version": SCHEMA_VERSION, "models": {entry.name: _without_nothing(row)}}
    write_whole(out / "registry.yaml", yaml.safe_dump(listing, width=100, allow_unicode=True).encode())


def _without_nothing(value: Any) -> Any:
    """The same data without fields that say nothing, as a registry has them."""
    if isinstance(value, dict):
        return {key: _without_nothing(item) for key, item in value.items() if item is not None and item != []}
    return [_without_nothing(item) for item in value] if isinstance(value, list) else value
