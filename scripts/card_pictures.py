"""Draw the pictures of a model's card from synthetic anatomy: python scripts/card_pictures.py NAME OUT [--run FOLDER]

OUT/NAME-features.png: a scan or film and its features; NAME-voxels.png: t-SNE of labelled voxels of several subjects,
of an untrained network and of the model; NAME-matches.png: two subjects matched; with --run also NAME-curves.png,
learning curves of the run. --scan gives the scan or film of the first; everything else needs no data.
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
from sklearn.manifold import TSNE
from torch import Tensor

from gvsl_zoo.demo import FILM_MM, FILM_SHAPE, SHAPE, SPACING_MM, as_volume
from gvsl_zoo.inference.features import body, dense_features, prepare_for, principal_components
from gvsl_zoo.pretrain.anatomy import LABELS, sample_film, sample_subject
from gvsl_zoo.pretrain.config import PretrainConfig
from gvsl_zoo.pretrain.validate import PAIRS, answer, pairs, validate
from gvsl_zoo.registry import ModelEntry
from gvsl_zoo.report import curves_picture, draw, embedding_picture, features_picture, matching_row
from gvsl_zoo.spatial import warp
from gvsl_zoo.volume import Volume
from gvsl_zoo.weights import write_whole
from gvsl_zoo.zoo import load, widest_task

WIDTH, MOST_BYTES = 1280, 200_000  # of a picture: pixels, and bytes beyond which it gets fewer colours
CROP = {3: (48, 48, 48), 2: FILM_SHAPE}  # of two subjects to match, where the model does not say
SUBJECTS, VOXELS = 4, {3: 25, 2: 90}  # of t-SNE: subjects, and voxels or pixels of a label in each
ORGANS = (
    *("lung_left", "lung_right", "airway", "myocardium", "left_ventricle", "right_ventricle", "aorta"),
    *("liver", "spleen", "stomach", "spine", "ribs", "fat", "soft_tissue"),
)
NEIGHBOURS = 5  # of a voxel, in other subjects
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
    drawn, _ = subject_of(entry, generator)
    prepared = prepare_for(options.scan or drawn, model)
    components = principal_components(dense_features(prepared, model), body(prepared, model))
    what = options.scan.name if options.scan else "synthetic anatomy"
    title = f"{entry.name}: features of {what}"
    features_picture(prepared, components, f"{stem}-features.png", film=entry.ndim == 2, title=title)
    voxels_picture(options.name, entry, generator, f"{stem}-voxels.png")
    kinds = ["features", "voxels"]
    if "registration" in entry.tasks:
        matches_picture(model, entry, f"{stem}-matches.png")
        kinds.append("matches")
    if options.run:
        log = [json.loads(line) for line in (options.run / "log.jsonl").read_text().splitlines()]
        curves_picture(log, f"{stem}-curves.png", title=f"{entry.name}: learning curves")
        kinds.append("curves")
    for kind in kinds:
        path = Path(f"{stem}-{kind}.png")
        print(f"{path}: {shrunk(path) / 1000:.0f} kB")


def subject_of(entry: ModelEntry, generator: torch.Generator) -> tuple[Volume, dict[str, Tensor]]:
    """A synthetic scan or film as the model sees it, and where it shows which organ: (D, H, W) or (1, H, W) bool."""
    if entry.ndim == 3:
        z, y, x = entry.input.spacing_mm or (SPACING_MM,) * 3
        subject = sample_subject(SHAPE, generator, (z, y, x))
        return as_volume(subject), {organ: subject.labels == LABELS[organ] for organ in ORGANS}
    H, W = entry.input.size or FILM_SHAPE
    mm = FILM_MM / max(H, W)
    film = sample_film((H, W), generator, (mm, mm))
    left, right, heart, spine = film.masks[:, None]
    other = heart | spine  # before and behind them are lungs too, so that the heart is nowhere alone
    shown = {"lung left": left & ~right & ~other, "lung right": right & ~left & ~other}
    return as_volume(film), shown | {"heart": heart & ~spine, "spine": spine & ~heart}


def voxels_picture(name: str, entry: ModelEntry, generator: torch.Generator, path: str) -> None:
    """t-SNE of features of labelled voxels, as in He et al. 2023, fig. 7: untrained on the left, pre-trained right."""
    subjects = [subject_of(entry, generator) for _ in range(SUBJECTS)]
    places = [[_drawn(mask, VOXELS[entry.ndim], generator) for mask in masks.values()] for _, masks in subjects]
    organs = np.concatenate([np.repeat(np.arange(len(row)), [len(p) for p in row]) for row in places])
    owners = np.concatenate([np.full(sum(map(len, row)), number) for number, row in enumerate(places)])
    unit = "voxels" if entry.ndim == 3 else "pixels"
    torch.manual_seed(SEED)  # of the network from scratch
    panels = {}
    for title, pretrained in (("from scratch", False), ("pre-trained", True)):
        model = load(name, pretrained=pretrained)
        vectors = []
        for (scan, _), row in zip(subjects, places, strict=True):
            local = dense_features(prepare_for(scan, model), model).flatten(1)
            vectors.append(local[:, torch.cat(row)].T)
        x = torch.cat(vectors).double()
        x = (x - x.mean(0)) / x.std(0).clamp_min(1e-9)
        share = neighbours_of_the_same_label(x, organs, owners)
        what = f"{title}: {100 * share:.0f} % of nearest {unit} in other subjects are of the same organ"
        panels[what] = TSNE(random_state=SEED).fit_transform(x.float().numpy())
    names = [organ.replace("_", " ") for organ in subjects[0][1]]
    title = f"{entry.name}: features of labelled {unit} of {SUBJECTS} synthetic subjects, t-SNE"
    embedding_picture(panels, organs, names, path, title=title)


def _drawn(mask: Tensor, count: int, generator: torch.Generator) -> Tensor:
    inside = mask.flatten().nonzero()[:, 0]
    return inside[torch.randperm(len(inside), generator=generator)[:count]]


def neighbours_of_the_same_label(x: Tensor, organs: np.ndarray, owners: np.ndarray) -> float:
    """Share of each voxel's nearest ones in other subjects that have its label; chance is one in the labels."""
    distance = torch.cdist(x, x).numpy()
    distance[owners[:, None] == owners] = np.inf
    nearest = np.argsort(distance, 1)[:, :NEIGHBOURS]
    return float((organs[nearest] == organs[:, None]).mean())


def matches_picture(model: Any, entry: ModelEntry, path: str) -> None:
    """The first of the pairs of synthetic subjects that validate a training, and the means over all."""
    crop = entry.input.window or entry.input.size or CROP[entry.ndim]
    mm = entry.input.spacing_mm[0] if entry.input.spacing_mm else SPACING_MM if entry.ndim == 3 else FILM_MM / max(crop)
    config = PretrainConfig(steps=1, ndim=entry.ndim, crop=crop, spacing_mm=mm)
    fixed, moving, _, damaged = next(pairs(config, next(model.parameters()).device))
    with torch.inference_mode():
        displacement = answer(model, fixed, moving, damaged).displacement
    images = {"fixed": fixed, "moving": moving, "warped": warp(moving, displacement), "displacement": displacement}
    shown = {name: image[0] if name == "displacement" else image[0, 0] for name, image in images.items()}
    if entry.ndim == 2:
        shown = {name: image.unsqueeze(-3) for name, image in shown.items()}
    numbers = validate(model, config)
    note = f"organ Dice {numbers['dice_before']:.2f} → {numbers['dice_after']:.2f}, mean of {PAIRS} pairs"
    draw([matching_row(shown, (mm,) * 3, note)], f"{entry.name}: synthetic subjects", path)


def shrunk(path: Path) -> int:
    """The picture at the width of a card, in 256 colours, dithered, where it would be too large; bytes of the file."""
    with Image.open(path) as image:
        height = round(image.height * WIDTH / image.width)
        small = image.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    small.save(content, "PNG", optimize=True)
    if content.tell() > MOST_BYTES:
        content = io.BytesIO()
        palette = small.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3)
        dithered = small.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        colours = np.reshape(dithered.getpalette(), (-1, 3))
        colours[np.asarray(dithered)[0, 0]] = 255  # the page stays white
        dithered.putpalette(colours.ravel().tolist())
        dithered.save(content, "PNG", optimize=True)
    write_whole(path, content.getvalue())
    return content.tell()


if __name__ == "__main__":
    main()
