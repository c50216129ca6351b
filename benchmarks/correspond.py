"""Matches of points between synthetic subjects whose true correspondence is known: python -m benchmarks.correspond

Median distance in mm from where the anatomy truly lies, of 1000 points a pair: left where they are, matched, and
brought along by a refined registration. Beside it the Spearman correlation of the confidence with the error.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import numpy as np
import torch

from benchmarks.timing import RESULTS, machine
from gvsl_zoo import Grid, Matcher, load, register
from gvsl_zoo.demo import as_volume
from gvsl_zoo.pretrain.anatomy import sample_subject, true_displacement

MODEL = "gvsl-unet-ct-nano"
SHAPE, SPACING_MM = (80, 80, 96), 4.0
FIRST_SEED, PAIRS, POINTS, REFINE = 100, 8, 1000, 60


def measure(seed: int, refine: int) -> dict[str, float]:
    """One pair: medians in mm, the confidence's rank correlation with the error, seconds."""
    generator = torch.Generator().manual_seed(seed)
    fixed, moving = (sample_subject(SHAPE, generator, (SPACING_MM,) * 3) for _ in range(2))
    displacement = true_displacement(fixed, moving)
    voxels = (fixed.labels > 0).nonzero()
    voxels = voxels[torch.randperm(len(voxels), generator=generator)]
    target = voxels + displacement[:, voxels[:, 0], voxels[:, 1], voxels[:, 2]].T
    seen = ((target >= 0) & (target <= torch.tensor(SHAPE) - 1)).all(1)
    scans = as_volume(fixed), as_volume(moving)
    matrix = Grid.of(scans[0]).affine
    points, truth = (
        x[seen][:POINTS].flip(1).double().numpy() @ matrix[:3, :3].T + matrix[:3, 3] for x in (voxels, target)
    )
    began = time.perf_counter()
    matcher = Matcher(*scans, load(MODEL))
    ready = time.perf_counter()
    found = matcher.match(points)
    matched = time.perf_counter()
    error = np.linalg.norm(found.points_mm - truth, axis=1)
    known = np.isfinite(error)
    ranks = (np.argsort(np.argsort(x[known])) for x in (found.confidence, error))
    row = {
        "identity_mm": float(np.median(np.linalg.norm(points - truth, axis=1))),
        "matched_mm": float(np.median(error[known])),
        "without_match": int((~known).sum()),
        "confidence_error": float(np.corrcoef(*ranks)[0, 1]),
        "features_seconds": ready - began,
        "points_seconds": matched - ready,
    }
    if refine:
        whole = register(scans[1], scans[0], load(MODEL, task="registration"), refine=refine)
        row["registered_mm"] = float(np.median(np.linalg.norm(whole.displacement_mm(points) - truth, axis=1)))
        row["register_seconds"] = time.perf_counter() - matched
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--refine", type=int, default=REFINE, help="steps of the registration beside it; 0: none")
    args = parser.parse_args()
    rows = []
    for seed in range(FIRST_SEED, FIRST_SEED + args.pairs):
        rows.append({"seed": seed} | measure(seed, args.refine))
        print({name: round(value, 2) for name, value in rows[-1].items()}, flush=True)
    means = {name: statistics.fmean(row[name] for row in rows) for name in rows[0] if name != "seed"}
    print("mean", {name: round(value, 2) for name, value in means.items()})
    content = {"machine": machine(), "model": MODEL, "refine": args.refine, "mean": means, "pairs": rows}
    (RESULTS / "correspond.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
