"""Pre-train each architecture with each objective in 2D and 3D, and draw the curves: python scripts/train_family.py OUT

On pairs of synthetic subjects that stay alike, at nano width, each for the same few hundred steps. OUT keeps the runs:
the same call goes on.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
import torch
from matplotlib import pyplot

from gvsl_zoo.memory import keep_freed_memory
from gvsl_zoo.pretrain.config import PRESETS, PretrainConfig, settings_of
from gvsl_zoo.pretrain.loop import pretrain
from gvsl_zoo.pretrain.run import LOG

DOCS = Path(__file__).parent.parent / "docs"
ARCHITECTURES, OBJECTIVES, AXES = ("unet", "xmorpher"), ("gvsl", "gemini"), (3, 2)
CROP = {2: 128, 3: 48}
SMOOTHED = 25  # steps that a point of a curve is the mean of
COLOURS = {"ncc": "#1f77b4", "restoration": "#e07b39"}


def config_of(architecture: str, objective: str, ndim: int, steps: int) -> PretrainConfig:
    named: dict[str, Any] = {"backbone": architecture, "objective": objective, "ndim": ndim, "crop": CROP[ndim]}
    return settings_of(
        PRESETS["nano"], steps, named | {"ramp_steps": 20 * steps, "save_every": steps, "learning_rate": 1e-3}
    )


def curves(out: Path) -> dict[str, list[float]]:
    """Of a finished run its matching and its restoration term, smoothed."""
    log = [json.loads(line) for line in (out / LOG).read_text().splitlines()]
    window = np.ones(SMOOTHED) / SMOOTHED
    return {name: np.convolve([row[name] for row in log], window, "valid").tolist() for name in COLOURS}


def draw(runs: dict[str, dict[str, list[float]]], path: Path) -> None:
    """One panel a run; each term as a share of its first value."""
    figure, panels = pyplot.subplots(2, len(runs) // 2, figsize=(12, 5), sharex=True, sharey=True, layout="constrained")
    for axes, (name, terms) in zip(panels.flat, runs.items(), strict=True):
        for term, values in terms.items():
            axes.plot(np.array(values) / values[0], color=COLOURS[term], label=f"{term}, {values[0]:.3f} at first")
        axes.set_title(name, fontsize=10)
        axes.axhline(1, color="#c5ced6", lw=0.8, zorder=0)
        axes.legend(fontsize=8, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel(f"share of the first value, mean of {SMOOTHED} steps", fontsize=9)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    runs = {}
    for architecture, objective, ndim in itertools.product(ARCHITECTURES, OBJECTIVES, AXES):
        name = f"{architecture}, {objective}, {ndim}D"
        out = options.out / name.replace(", ", "-")
        pretrain(config_of(architecture, objective, ndim, options.steps), out, device="cpu")
        runs[name] = curves(out)
        ends = {term: f"{values[0]:.4f} -> {values[-1]:.4f}" for term, values in runs[name].items()}
        print(name, ends, flush=True)
    draw(runs, DOCS / "family.png")


if __name__ == "__main__":
    main()
