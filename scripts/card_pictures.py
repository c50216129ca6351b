"""Draw the pictures of a model's card from synthetic anatomy: python scripts/card_pictures.py NAME OUT [--run FOLDER]

OUT/NAME-features.png: a scan and its features; NAME-voxels.png: t-SNE of labelled voxels of several subjects, of an
untrained network and of the model; NAME-matches.png: two subjects matched; with --run also NAME-curves.png, learning
curves of the run. --scan gives the scan of the first; everything else needs no data. For 3D models.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gvsl_zoo.demo import SHAPE, SPACING_MM, as_volume, match
from gvsl_zoo.inference.features import body, dense_features, prepare_for, preprocessing_of, principal_components
from gvsl_zoo.pretrain.anatomy import LABELS, sample_subject
from gvsl_zoo.report import curves_picture, draw, embedding_picture, features_picture, matching_row
from gvsl_zoo.volume import read_volume
from gvsl_zoo.weights import write_whole
from gvsl_zoo.zoo import load, widest_task

WIDTH, MOST_BYTES = 1280, 200_000  # of a picture: pixels, and bytes of its file
SUBJECTS, VOXELS = 4, 25  # of t-SNE: subjects, and voxels of a label in each
ORGANS = (
    *("lung_left", "lung_right", "airway", "myocardium", "left_ventricle", "right_ventricle", "aorta"),
    *("liver", "spleen", "stomach", "spine", "ribs", "fat", "soft_tissue"),
)
NEIGHBOURS = 5  # of a voxel, in other subjects
PERPLEXITY, STEPS, PUSHED = 30.0, 600, 150  # of t-SNE (van der Maaten and Hinton 2008); steps with exaggeration
SEED = 2026


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("out", type=Path)
    parser.add_argument("--scan", type=Path)
    parser.add_argument("--run", type=Path, help="folder of a training run, with log.jsonl")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    entry: Any = load(options.name).entry
    model: Any = load(options.name, task=widest_task(entry))
    stem = options.out / entry.name

    generator = torch.Generator().manual_seed(SEED)
    spacing_mm = preprocessing_of(model).spacing_mm or (SPACING_MM,) * 3
    scan = read_volume(options.scan) if options.scan else as_volume(sample_subject(SHAPE, generator, spacing_mm))
    prepared = prepare_for(scan, model)
    local = dense_features(prepared, model)
    components = principal_components(local, body(prepared, model))
    what = options.scan.name if options.scan else "synthetic anatomy"
    features_picture(prepared, components, f"{stem}-features.png", title=f"{entry.name}: features of {what}")
    voxels_picture(options.name, spacing_mm, generator, f"{stem}-voxels.png")
    drawn = ["features", "voxels"]
    if "registration" in entry.tasks:
        images, numbers = match(model, spacing_mm, torch.Generator().manual_seed(SEED))
        note = f"organ Dice {numbers['dice_before']:.2f} → {numbers['dice_after']:.2f}, mean of four pairs"
        draw([matching_row(images, spacing_mm, note)], f"{entry.name}: synthetic subjects", f"{stem}-matches.png")
        drawn.append("matches")
    if options.run:
        log = [json.loads(line) for line in (options.run / "log.jsonl").read_text().splitlines()]
        curves_picture(log, f"{stem}-curves.png", title=f"{entry.name}: learning curves")
        drawn.append("curves")
    for kind in drawn:
        path = Path(f"{stem}-{kind}.png")
        print(f"{path}: {shrunk(path) / 1000:.0f} kB")


def voxels_picture(name: str, spacing_mm: tuple[float, ...], generator: torch.Generator, path: str) -> None:
    """t-SNE of features of labelled voxels, as in He et al. 2023, fig. 7: untrained on the left, pre-trained right."""
    subjects = [sample_subject(SHAPE, generator, spacing_mm) for _ in range(SUBJECTS)]  # type: ignore[arg-type]
    places = [[_drawn(subject.labels == LABELS[organ], generator) for organ in ORGANS] for subject in subjects]
    organs = np.concatenate([np.repeat(np.arange(len(ORGANS)), [len(p) for p in row]) for row in places])
    owners = np.concatenate([np.full(sum(map(len, row)), number) for number, row in enumerate(places)])
    torch.manual_seed(SEED)  # of the network from scratch
    panels = {}
    for title, pretrained in (("from scratch", False), ("pre-trained", True)):
        model = load(name, pretrained=pretrained)
        vectors = []
        for subject, row in zip(subjects, places, strict=True):
            local = dense_features(prepare_for(as_volume(subject), model), model).flatten(1)
            vectors.append(local[:, torch.cat(row)].T)
        x = torch.cat(vectors).double()
        x = (x - x.mean(0)) / x.std(0).clamp_min(1e-9)
        share = neighbours_of_the_same_label(x, organs, owners)
        what = f"{title}: {100 * share:.0f} % of nearest voxels in other subjects are of the same organ"
        panels[what] = tsne(x).numpy()
    names = [organ.replace("_", " ") for organ in ORGANS]
    title = f"{name}: features of labelled voxels of {SUBJECTS} synthetic subjects, t-SNE"
    embedding_picture(panels, organs, names, path, title=title)


def _drawn(mask: Tensor, generator: torch.Generator) -> Tensor:
    inside = mask.flatten().nonzero()[:, 0]
    return inside[torch.randperm(len(inside), generator=generator)[:VOXELS]]


def neighbours_of_the_same_label(x: Tensor, organs: np.ndarray, owners: np.ndarray) -> float:
    """Share of each voxel's nearest ones in other subjects that have its label; chance is one in `ORGANS`."""
    distance = torch.cdist(x, x).numpy()
    distance[owners[:, None] == owners] = np.inf
    nearest = np.argsort(distance, 1)[:, :NEIGHBOURS]
    return float((organs[nearest] == organs[:, None]).mean())


def tsne(x: Tensor) -> Tensor:
    """t-SNE of rows (N, C) in two dimensions, (N, 2), exact: for a few thousand rows; from their first components."""
    squared = torch.cdist(x, x).square().fill_diagonal_(torch.inf)
    low, high = torch.full((len(x), 1), -30.0, dtype=x.dtype), torch.full((len(x), 1), 30.0, dtype=x.dtype)
    for _ in range(60):  # bisection for the widths, in logarithms
        middle = (low + high) / 2
        p = torch.softmax(-squared * middle.exp(), 1)
        entropy = -(p * p.clamp_min(1e-300).log()).sum(1, keepdim=True)
        wide = entropy > np.log(PERPLEXITY)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    p = ((p + p.T) / (2 * len(x))).clamp_min(1e-12)
    y = torch.linalg.svd(x - x.mean(0), full_matrices=False).U[:, :2] * 1e-2
    speed = torch.zeros_like(y)
    for step in range(STEPS):
        q = 1 / (1 + torch.cdist(y, y).square())
        q.fill_diagonal_(0)
        pull = ((12 if step < PUSHED else 1) * p - q / q.sum()) * q
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        speed = (0.5 if step < PUSHED else 0.8) * speed - len(x) / 12 * gradient
        y = y + speed
    return y


def shrunk(path: Path) -> int:
    """The picture at the width of a card, with fewer colours where it would be too large; bytes of the file."""
    with Image.open(path) as image:
        height = round(image.height * WIDTH / image.width)
        small = image.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS)
    for colours in (None, 256, 128, 64):
        content = io.BytesIO()
        shown = small.quantize(colours, dither=Image.Dither.NONE) if colours else small
        shown.save(content, "PNG", optimize=True)
        if content.tell() <= MOST_BYTES:
            break
    write_whole(path, content.getvalue())
    return content.tell()


if __name__ == "__main__":
    main()
