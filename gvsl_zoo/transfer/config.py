"""Settings of a fine-tuning run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ArgumentError
from ..pretrain.config import RunConfig, parse_settings

Task = Literal["segmentation", "classification"]
Mode = Literal["full", "linear"]
Unit = Literal["HU", "arbitrary", "grey"]
CROP = {3: 64, 2: 256}  # voxels an axis, by the number of axes
LINEAR_RATE = 0.3  # of a head on frozen features
FULL_RATE, SCRATCH_RATE = 5e-3, 1e-2  # of a whole network whose deepest level has as many channels as this:
CHANNELS = 128


@dataclass(frozen=True)
class FinetuneConfig(RunConfig):
    """One run. The defaults are sized for a few scans and a CPU.

    model: whose backbone is the start: a registry name or a path.
    mode: full, all weights learn; linear, the head alone, on features that are computed once.
    from_scratch: the same network with weights drawn at random.
    unit, spacing_mm: what the scans are measured in and the grid that they are brought to, (z, y, x) or one number,
        where it is to be another than the model's: a model for CT learns MR with unit "arbitrary", which scales each
        volume from its own extremes. The trained model's input says so.
    crop: voxels of that grid an axis, one number for all; default 64, of films 256. In a segmentation the edge of a
        patch; in a classification of the box about the scan's middle, in 2D of the film, resized.
    batch_size: patches or scans a process and step.
    subjects: how many to train on; default all that are not held out.
    validation: share of the subjects held out, on which the best weights are chosen; 0: the last ones are kept.
    save_every: steps between checkpoints, each with a validation.
    learning_rate: peak, of the head; linear warm-up, cosine to zero. Default 0.3 in mode linear; else 5e-3, from
        scratch 1e-2, for a backbone of 128 channels in its deepest level, and the less the more it has (`peak_rate`).
    head_steps: steps first in which the head learns alone, ten times as fast: one that knows nothing would spoil the
        pre-trained weights (Kumar et al. 2022); default a quarter; never from scratch.
    layer_decay: by which pre-trained levels learn slower, level by level towards the input; from scratch all alike.
    ema: decay of the averaged weights, which are then validated and kept; 0 for none.
    augment: strength of poses (see pretrain/augment.py) and of changes in brightness, contrast and noise, from 0, none,
        to 1.
    """

    model: str = "gvsl-unet-ct-nano"
    task: Task = "segmentation"
    mode: Mode = "full"
    from_scratch: bool = False
    unit: Unit | None = None
    spacing_mm: float | tuple[float, ...] | None = None
    crop: int | tuple[int, ...] | None = None
    batch_size: int = 2
    subjects: int | None = None
    validation: float = 0.2
    learning_rate: float | None = None
    head_steps: int | None = None
    layer_decay: float = 0.8
    warmup_steps: int = 20
    weight_decay: float = 0.01
    clip_norm: float = 12.0  # Isensee et al. 2021
    ema: float = 0.0
    augment: float = 1.0
    bf16: bool = True  # in mode full
    checkpointing: bool = False  # of activations: memory for time

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size, self.save_every, self.keep_last)
        crop = self.crop if isinstance(self.crop, tuple) else (self.crop or 1,)
        spacing = self.spacing_mm if isinstance(self.spacing_mm, tuple) else (self.spacing_mm or 1,)
        for wrong, what in (
            (self.task not in get_args(Task), f"task {self.task!r}"),
            (self.mode not in get_args(Mode), f"mode {self.mode!r}"),
            (self.unit not in (None, *get_args(Unit)), f"unit {self.unit!r}"),
            (min(counts) < 1, "a count below 1"),
            (min(crop) < 1, f"crop {self.crop}"),
            (not all(0 < mm < math.inf for mm in spacing), f"spacing_mm {self.spacing_mm}"),
            (not 0 <= self.validation < 1, f"validation {self.validation}"),
            (not 0 <= self.ema < 1, f"ema {self.ema}"),
            (not 0 <= (self.head_steps or 0) <= self.steps, f"head_steps {self.head_steps} of {self.steps}"),
            (not 0 < self.layer_decay <= 1, f"layer_decay {self.layer_decay}"),
            (not 0 <= self.augment <= 1, f"augment {self.augment}"),
            (not 0 <= (self.learning_rate or 0) < math.inf, f"learning_rate {self.learning_rate}"),
            (self.warmup_steps < 0, f"warmup_steps {self.warmup_steps}"),
            (not 0 <= self.weight_decay < math.inf, f"weight_decay {self.weight_decay}"),
            (not self.clip_norm > 0, f"clip_norm {self.clip_norm}"),
        ):
            if wrong:
                raise ArgumentError(f"{what} in the settings of a run", "see gvsl_zoo.transfer.config.FinetuneConfig")

    def crop_for(self, ndim: int) -> tuple[int, ...]:
        """Voxels along each of `ndim` axes."""
        crop = self.crop or CROP[ndim]
        crop = (crop,) * ndim if isinstance(crop, int) else crop
        if len(crop) != ndim:
            raise ArgumentError(f"crop {crop} for a model of {ndim} axes", f"give one number, or {ndim}")
        return crop

    @property
    def steps_of_head(self) -> int:
        """Steps in which the head learns alone before the network does."""
        if self.from_scratch or self.mode == "linear":
            return 0
        return self.steps // 4 if self.head_steps is None else self.head_steps

    def peak_rate(self, channels: int) -> float:
        """Of the head, while all learn that do.

        A step of Adam moves what a layer says by more the wider the layer is, so the rate of a whole network falls with
        its width (Yang et al. 2022, Tensor Programs V).

        Args:
            channels: of the backbone's deepest level.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        if self.mode == "linear":
            return LINEAR_RATE
        return (SCRATCH_RATE if self.from_scratch else FULL_RATE) * CHANNELS / channels


def settings_of(steps: int, named: dict[str, Any], others: tuple[str, ...] = ()) -> FinetuneConfig:
    """Settings by name (None leaves the default), and others as text, "name=value"."""
    values = {key: value for key, value in named.items() if value is not None}
    return FinetuneConfig.from_dict({"steps": steps} | values | parse_settings(others))
