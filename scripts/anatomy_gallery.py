"""Pictures of the synthetic anatomy, to be looked at: python scripts/anatomy_gallery.py OUT.png [--seed 0]

Eight subjects with their labels, eight chest films with theirs, and pairs before and after the true displacement.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

from gvsl_zoo.pretrain.anatomy import FILM_LABELS, LABELS, Film, Subject, sample_film, sample_subject, true_displacement
from gvsl_zoo.spatial import warp

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SUBJECTS, PAIRS, EDGE, FILM_EDGE = 8, 4, 128, 256
WINDOW_HU = (-1000.0, 400.0)
CELL = 1.6  # inches


def coloured(image: Tensor, labels: Tensor, colours: np.ndarray) -> np.ndarray:
    """Grey image (rows, columns) in [0, 1] under half-transparent colours of its labels; label 0 stays clear."""
    grey, names = image.numpy()[..., None].repeat(3, -1), labels.numpy()
    return np.where(names[..., None] > 0, 0.55 * grey + 0.45 * colours[names], grey).clip(0, 1)


def planes(volume: Tensor) -> list[Tensor]:
    """Axial, coronal and sagittal middle slices of (D, H, W) as a radiologist looks at them."""
    d, h, w = (n // 2 for n in volume.shape)
    axial, coronal, sagittal = volume[d], volume[:, int(1.1 * h)], volume[:, :, int(0.95 * w)]
    return [axial.flip(0, 1), coronal.flip(0, 1), sagittal.flip(0, 1)]


def grey(subject: Subject) -> Tensor:
    low, high = WINDOW_HU
    return ((subject.hu - low) / (high - low)).clamp(0, 1)


def subject_rows(generator: torch.Generator) -> list[list[tuple[str, np.ndarray]]]:
    colours = plt.get_cmap("tab20")(np.arange(len(LABELS)) % 20)[:, :3]
    hidden = torch.tensor([name in ("soft_tissue", "fat") for name in LABELS])
    subjects = [sample_subject((EDGE,) * 3, generator) for _ in range(SUBJECTS)]
    rows: list[list[tuple[str, np.ndarray]]] = [[] for _ in range(6)]
    for subject in subjects:
        shown = subject.labels.masked_fill(hidden[subject.labels.long()], 0).long()
        for plane, (image, labels) in enumerate(zip(planes(grey(subject)), planes(shown), strict=True)):
            name = ("axial", "coronal", "sagittal")[plane]
            rows[2 * plane].append((f"{name}, {subject.spacing_mm[0]:.1f} mm", image.numpy()))
            rows[2 * plane + 1].append(("", coloured(image, labels, colours)))
    return rows


def film_rows(generator: torch.Generator) -> list[list[tuple[str, np.ndarray]]]:
    colours = plt.get_cmap("tab10")(np.arange(len(FILM_LABELS) + 1))[:, :3]
    films = [sample_film((FILM_EDGE, FILM_EDGE), generator) for _ in range(SUBJECTS)]
    ranks = torch.arange(1, len(FILM_LABELS) + 1)[:, None, None]
    overlaid = [coloured(f.image, (f.masks * ranks).amax(0), colours) for f in films]
    first = [(f"film, {film.spacing_mm[0]:.1f} mm", film.image.numpy()) for film in films]
    return [first, [(" ".join(FILM_LABELS) if not i else "", image) for i, image in enumerate(overlaid)]]


def pair_row(fixed: Subject | Film, moving: Subject | Film) -> list[tuple[str, np.ndarray]]:
    """Fixed, moving, moving after the true displacement, and the differences before and after (grey: none)."""
    a, b = (x.image if isinstance(x, Film) else grey(x) for x in (fixed, moving))
    warped = warp(b[None, None], true_displacement(fixed, moving)[None])[0, 0]
    images = [a, b, warped, (b - a + 1) / 2, (warped - a + 1) / 2]
    if a.ndim == 3:
        images = [planes(x)[1] for x in images]
    names = ("fixed", "moving", "moving, true warp", "difference before", "difference after")
    return [(name, x.numpy()) for name, x in zip(names, images, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(options.seed)
    rows = subject_rows(generator) + film_rows(generator)
    for _ in range(PAIRS // 2):
        rows.append(pair_row(*[sample_subject((EDGE,) * 3, generator) for _ in range(2)]))
    for _ in range(PAIRS // 2):
        rows.append(pair_row(*[sample_film((FILM_EDGE, FILM_EDGE), generator) for _ in range(2)]))
    figure, axes = plt.subplots(len(rows), SUBJECTS, figsize=(CELL * SUBJECTS, 1.1 * CELL * len(rows)), squeeze=False)
    for row, cells in zip(axes, rows, strict=True):
        for ax in row:
            ax.axis("off")
        for ax, (title, image) in zip(row, cells, strict=False):
            ax.imshow(image, cmap="gray", vmin=0, vmax=1)
            ax.set_title(title, fontsize=5)
    figure.subplots_adjust(0.005, 0.005, 0.995, 0.985, 0.02, 0.12)
    figure.savefig(options.out, dpi=130)
    print(options.out)


if __name__ == "__main__":
    main()
