"""Settings of a pre-training run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainConfig:
    """One run. Loss weights are the paper's (He et al. 2023, sec. 3.1: all 1); the rest is sized for a CPU.

    crop: (D, H, W) of the training crops in voxels of `spacing_mm` an axis.
    synthetic_share: share of pairs from synthetic anatomy while scans are given too; without scans all are synthetic.
    ramp_steps: over these the task hardens: synthetic subjects go from alike to fully varied, and scans come in.
    damage_share: share of steps that damage the fixed image; the others match and restore it as it is.
    """

    steps: int
    width: int = 8
    affine_width: int | None = 48
    crop: tuple[int, int, int] = (48, 48, 48)
    spacing_mm: float = 4.0
    batch_size: int = 1
    synthetic_share: float = 0.5
    ramp_steps: int = 3000
    damage_share: float = 0.5
    learning_rate: float = 2e-3  # peak; cosine to zero
    warmup_steps: int = 100
    clip_norm: float = 1.0
    seed: int = 0
    save_every: int = 250
    bf16: bool = True
