"""The registry entry of a fine-tuned model: its labels and input, what it was made from, what was measured."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path

from ..errors import ArgumentError
from ..inference.features import WINDOW
from ..pretrain.entry import publish
from ..registry import Evaluation, Input, Intensity, Label, Licence, ModelEntry, Training, is_device_name
from .cases import Split
from .config import FinetuneConfig

MODALITY = {"HU": "CT", "arbitrary": "MR", "grey": "X-ray"}
INTENSITIES: dict[str, tuple[float | None, float | None]] = {
    "HU": (-1024.0, 1024.0),
    "arbitrary": (None, None),
    "grey": (0.0, 255.0),
}
MEASURED = {"dice": "Dice", "accuracy": "accuracy", "auc": "AUC"}


def describe(
    config: FinetuneConfig, name: str, base: ModelEntry, labels: tuple[Label, ...], split: Split, chans: int
) -> ModelEntry:
    """The entry of a run's model, known before its first step.

    Args:
        name: of the run's folder. base: of the model that it starts from. chans: channels of an image.
    """
    words = "-".join(re.findall("[a-z0-9]+", name.lower())) or "run"
    settings = ", ".join(f"{key} {value}" for key, value in asdict(config).items() if key != "steps")
    subjects = len({case.subject for case in split.train})
    classes = ", ".join(label.name for label in labels if label.value or config.task == "classification")
    way = (
        f"from scratch, in the shape of {base.name}"
        if config.from_scratch
        else f"{base.name}, {config.mode} fine-tuning"
    )
    origin = "" if config.from_scratch else f"; made from {base.name} ({base.licence.weights})"
    seen = "" if config.from_scratch else f"; {base.name}: {base.licence.data}"
    limits = "Research only, not a medical device. "
    limits += f"Validated on {len(split.val)} held-out cases alone." if split.val else "Nothing has been measured."
    if config.task == "classification" and base.ndim == 3:
        edges = " x ".join(map(str, config.crop_for(3)))
        limits += f" It learnt from the {edges} voxels about the middle of each scan."
    if config.task == "classification" and config.mode == "full":
        limits += " The decoder beside the encoder was not trained with it."
    return replace(
        base,
        name=words if words[0].isalpha() and not is_device_name(words) else f"run-{words}",
        summary=f"{config.task.capitalize()} of {classes}: {way}, {subjects} subjects, {config.steps} steps.",
        status="available",
        instead=None,
        config={key: value for key, value in base.config.items() if key != "in_chans"}
        | ({"in_chans": chans} if chans != 1 else {}),
        modality=MODALITY[config.unit] if config.unit else base.modality,  # type: ignore[arg-type]
        objective="supervised",
        parameters=0,
        input=input_of(config, base),
        heads=(config.task,),
        labels=labels,
        sources=(),
        licence=Licence("Apache-2.0", f"not stated{origin}", f"not stated{seen}"),
        training=Training(settings, f"{len(split.train)} cases of {subjects} subjects", config.steps),
        evaluation=(),
        limits=limits,
        input_statistics=None,
        datasets=(),
        base_model=None if config.from_scratch else base.name,
        proof=None,
    )


def input_of(config: FinetuneConfig, base: ModelEntry) -> Input:
    """What the trained model expects: the base's input, with the unit and the grid that the settings choose."""
    ndim, given = base.ndim, base.input
    if config.unit == {2: "HU", 3: "grey"}[ndim]:
        raise ArgumentError(
            f"unit {config.unit!r} for a model of {ndim} axes", "volumes: HU or arbitrary; films: grey or arbitrary"
        )
    if config.unit is not None:
        unit = config.unit
        given = replace(given, intensity=Intensity(unit, INTENSITIES[unit], given.intensity.scale))
    if config.spacing_mm is not None:
        spacing = config.spacing_mm if isinstance(config.spacing_mm, tuple) else (config.spacing_mm,) * ndim
        if ndim == 2 or len(spacing) != ndim:
            raise ArgumentError(f"spacing_mm {config.spacing_mm} for a model of {ndim} axes", "give (z, y, x) in 3D")
        given = replace(given, spacing_mm=tuple(map(float, spacing)))
    if ndim == 2 and config.task == "classification" and (config.crop or not given.size):
        given = replace(given, size=config.crop_for(2))
    if config.task == "segmentation":
        given = replace(given, window=config.crop_for(ndim) if config.mode == "full" else WINDOW[:ndim])
    elif ndim == 3:
        given = replace(given, window=config.crop_for(3))
    return given


def finish(out: Path, entry: ModelEntry, scores: dict[str, float], split: Split) -> None:
    """Put beside the weights their card, with what validation measured, and a registry that lists them."""
    data, command = f"{len(split.val)} held-out cases, validation", f"gvsl-zoo finetune --out {out.name}"
    results = []
    for name, value in scores.items():
        kind, _, label = name.partition("_")
        if kind in MEASURED:
            metric = MEASURED[kind] + (f" of {label}" if label else "")
            results.append(Evaluation(entry.heads[0], data, metric, round(value, 4), command=command))
    publish(out, replace(entry, evaluation=tuple(results)))
