"""Registration and restoration of chests and films that a model has never seen:
python -m benchmarks.evidence DATA [--model A,B,...] [--simpleitk]

A model is a name of the registry or the folder of a run, such as ./run. Pairs are ordered: three scans that no training
saw, each onto each, and each onto and from four scans that training saw, without their labels. Dice is the mean of both
lungs (labels by threshold, not by experts), on the model's grid.

whole: the shift that lays the scans over each other is sought, as `register` does, then the matching heads answer in
    one pass, whether that correlates more or not. as register answers: in up to four passes, smoothed, those that
    correlate more.
crops: as in training: one pass on boxes of the model's window (where it states none, cubes of 192 mm) about the middle
    of the body at the height of the lungs.

before: the scans laid over each other, or the crops as they are; affine: by the affine head alone, or where there is
none by the affine map nearest to the displacement; after: by the whole pass. affine_sd: SD over pairs of that map's
numbers, their mean; 0 where the affine head says the same of every pair. Restoration is that of damaged crops of the
three unseen scans. Intervals (95 %) are over other scans, not over other pairs of these: between unseen scans
Student's over the jackknife's pseudo-values, scan by scan (Arvesen 1969); otherwise those of
`transfer.statistics.compare` with unseen and seen scans as factors; of the restoration Student's over scans.

films: of a model of films, the 24 that recipes leave out (see benchmarks/transfer.py), each onto each in one pass at
    the model's size; nothing in them is labelled, so the local correlation stands for the Dice.

--simpleitk registers the whole unseen scans with SimpleITK too (benchmarks/register.py), on the same grid.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.register import LUNGS as LUNG_VALUES
from benchmarks.register import Pair, measure, moments, simpleitk
from benchmarks.timing import RESULTS, machine
from benchmarks.transfer import LUNGS, MODEL, probed_films
from gvsl_zoo import load, read_volume
from gvsl_zoo.inference.features import mask_on_grid, prepare_for, preprocessing_of
from gvsl_zoo.inference.register import answered, correlation, lay_over, match, moved, read_at
from gvsl_zoo.inference.sliding import device_of
from gvsl_zoo.ledger import check_unseen
from gvsl_zoo.losses import local_ncc_loss
from gvsl_zoo.models.gemini import WholeModule
from gvsl_zoo.pretrain.augment import damage
from gvsl_zoo.pretrain.data import seeded
from gvsl_zoo.pretrain.validate import moved_organs, organ_dice, psnr
from gvsl_zoo.spatial import affine_coordinates, identity_grid, jacobian_determinant, warp
from gvsl_zoo.transfer.data import box
from gvsl_zoo.transfer.statistics import compare, mean_interval
from gvsl_zoo.transforms import Affine, Chain, Transform, affine_from_voxels, displacement_from_voxels
from gvsl_zoo.volume import CT_WINDOW_HU, InputWarning, Prepared, Preprocessing, Volume, prepare
from gvsl_zoo.weights import values_hash

FILE = RESULTS / "evidence.json"
UNSEEN, SEEN = LUNGS["test"], LUNGS["train"]
GROUPS = {
    "unseen": tuple(itertools.permutations(UNSEEN, 2)),
    "unseen and seen": tuple(pair for a, b in itertools.product(UNSEEN, SEEN) for pair in ((a, b), (b, a))),
}
CROP_MM = 192.0  # 48 voxels of 4 mm: the default of pre-training
DAMAGES, SEED = 8, 7  # of each crop
Row = dict[str, float]


@dataclass(frozen=True, eq=False)
class Chest:
    """A scan on a model's grid, and its right and left lung there, (1, 2, D, H, W) bool."""

    prepared: Prepared
    lungs: Tensor

    @property
    def scan(self) -> Volume:
        """HU, as far as the model's window goes."""
        low, high = CT_WINDOW_HU
        return self.prepared.place(low + (high - low) * self.prepared.image[0, 0])

    @property
    def label_map(self) -> Volume:
        """1 in the right lung, 2 in the left."""
        return self.prepared.place(self.lungs[0, 0] + 2 * self.lungs[0, 1].to(torch.uint8))


@cache
def read_chests(data: Path, recipe: Preprocessing) -> dict[str, Chest]:
    """All scans, for models that take them alike."""
    return {name: read_chest(name, data, recipe) for name in (*UNSEEN, *SEEN)}


def read_chest(name: str, data: Path, recipe: Preprocessing) -> Chest:
    prepared = prepare(read_volume(data / f"ct/{name}.nii.gz"), recipe)
    labels = read_volume(data / f"ct/{name}_autoseg.nii.gz")
    masks = (replace(labels, data=(labels.data == value).astype(np.uint8)) for value, _ in LUNG_VALUES.values())
    return Chest(prepared, torch.stack([mask_on_grid(mask, prepared) > 0.5 for mask in masks])[None])


# --- Whole scans ----------------------------------------------------------------------------------------------------


def pair_of(fixed: Chest, moving: Chest) -> Pair:
    """Both scans and their lungs on the model's grid, as benchmarks/register.py measures them."""
    scans = fixed.scan, moving.scan
    labels = fixed.label_map, moving.label_map
    return Pair("chest CT", "", *scans, *labels, organs=LUNG_VALUES, spacing_mm=fixed.prepared.spacing_mm[0])


def whole_row(fixed: Chest, moving: Chest, model: WholeModule) -> tuple[Row, Tensor]:
    """What one pass makes of two whole scans, and its affine part (n, n + 1)."""
    on_fixed, on_moving, start = fixed.prepared, moving.prepared, start_of(fixed, moving)
    laid, everywhere = read_at(on_moving.image, on_fixed, on_moving, start), torch.ones_like(on_fixed.image)
    affine, displacement = match(model, on_fixed.image, laid, everywhere, "float32")
    pair = pair_of(fixed, moving)
    ways: dict[str, Transform] = {
        "before": start,
        "affine": Chain((affine_from_voxels(affine, on_fixed), start)),
        "after": Chain((displacement_from_voxels(displacement, on_fixed), start)),
        "register": start,
    }
    if again := answered(model, on_fixed.image, laid, everywhere, "float32"):
        ways["register"] = Chain((displacement_from_voxels(again[1], on_fixed), start))
    found = {name: measure(pair, lambda _, way=way: way) for name, way in ways.items()}  # type: ignore[misc]
    row = {f"dice_{name}": 100 * one["dice"] for name, one in found.items()}
    row |= {
        "ncc_before": correlation(laid, on_fixed.image, everywhere),
        "ncc_after": correlation(moved(laid, displacement), on_fixed.image, everywhere),
        "folded": found["after"]["folded"],
        "folded_register": found["register"]["folded"],
    }
    return row, affine[0]


@cache
def start_of(fixed: Chest, moving: Chest) -> Affine:
    """What lays the scans over each other, the same for all models."""
    masks = torch.ones_like(fixed.prepared.image), torch.ones_like(moving.prepared.image)
    return lay_over(fixed.prepared, moving.prepared, masks)


# --- Crops ----------------------------------------------------------------------------------------------------------


def lung_crop(chest: Chest, edges: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Image and lungs about the middle of the body at the height of the lungs, air where the scan ends.

    edges: voxels along each axis.
    """
    image = chest.prepared.image[0]
    heights = chest.lungs[0].any(0).flatten(1).any(1).nonzero()
    first, last = int(heights.min()), int(heights.max())
    mass = image[0, first : last + 1].double().sum(0)
    middle = [(first + last) / 2]
    for along, size in ((mass.sum(1), image.shape[2]), (mass.sum(0), image.shape[3])):
        middle.append(float(along @ torch.arange(size).double() / along.sum()))
    starts = [
        min(max(round(centre - edge / 2), min(0, size - edge)), max(0, size - edge))
        for centre, edge, size in zip(middle, edges, image.shape[1:], strict=True)
    ]
    return box(image, starts, edges)[None], box(chest.lungs[0], starts, edges)[None]


def crop_row(fixed: tuple[Tensor, Tensor], moving: tuple[Tensor, Tensor], model: WholeModule) -> tuple[Row, Tensor]:
    """What one pass makes of two crops, and its affine part (n, n + 1)."""
    (image, lungs), (other, others) = fixed, moving
    affine, displacement = match(model, image, other, torch.ones_like(image), "float32")
    shape = image.shape[2:]
    alone = affine_coordinates(affine, shape) - identity_grid(shape, affine)
    row = {
        "dice_before": 100 * organ_dice(lungs, others),
        "dice_affine": 100 * organ_dice(lungs, moved_organs(others, alone)),
        "dice_after": 100 * organ_dice(lungs, moved_organs(others, displacement)),
        "ncc_before": 1 - local_ncc_loss(other, image).item(),
        "ncc_after": 1 - local_ncc_loss(warp(other, displacement), image).item(),
        "folded": folded(displacement),
    }
    return row, affine[0]


@torch.inference_mode()
def restored(model: WholeModule, damaged: Tensor) -> Tensor:
    """What the model makes of a damaged image, on the CPU."""
    return model.restore(damaged.to(device_of(model))).float().cpu()


def restoration(crops: Sequence[Tensor], model: WholeModule) -> dict[str, Any]:
    """PSNR in dB of damaged crops and of what the model makes of them: means and intervals over scans."""
    rows: dict[str, list[float]] = {"psnr_damaged": [], "psnr_restored": [], "gain": []}
    for place, image in enumerate(crops):
        damaged = [damage(image, seeded("cpu", SEED, place, number)) for number in range(DAMAGES)]
        before = statistics.fmean(psnr(one, image) for one in damaged)
        after = statistics.fmean(psnr(restored(model, one), image) for one in damaged)
        for column, value in zip(rows.values(), (before, after, after - before), strict=True):
            column.append(value)
    return {name: list(mean_interval(values)[:3]) for name, values in rows.items()}


# --- Films ----------------------------------------------------------------------------------------------------------


def film_row(fixed: Tensor, moving: Tensor, model: WholeModule) -> tuple[Row, Tensor]:
    """What one pass makes of two films (1, 1, H, W), and its affine part (n, n + 1)."""
    everywhere = torch.ones_like(fixed)
    affine, displacement = match(model, fixed, moving, everywhere, "float32")
    alone = affine_coordinates(affine, fixed.shape[2:]) - identity_grid(fixed.shape[2:], affine)
    again = answered(model, fixed, moving, everywhere, "float32")
    repeated = again[1] if again else torch.zeros_like(displacement)
    ways = {"affine": alone, "after": displacement, "register": repeated}
    row = {"ncc_before": correlation(moving, fixed, everywhere)}
    row |= {f"ncc_{way}": correlation(moved(moving, found), fixed, everywhere) for way, found in ways.items()}
    return row | {"folded": folded(displacement), "folded_register": folded(repeated)}, affine[0]


def folded(displacement: Tensor) -> float:
    """Voxels that a displacement folds, %."""
    return 100 * (jacobian_determinant(displacement) <= 0).float().mean().item()


def film_evidence(model: WholeModule, data: Path) -> dict[str, Any]:
    """All that is measured of a model of films."""
    entry: Any = model.entry
    files = [data / film for own in probed_films(data).values() for film in own]
    check_unseen({path.name: (path,) for path in files}, {entry.name: entry.ledger})
    films = {path.name: prepare_for(path, model).image[:, :, 0] for path in files}
    pairs = itertools.permutations(films, 2)
    return {
        "values": values_hash(model),
        "films": summary({(a, b): film_row(films[a], films[b], model) for a, b in pairs}, "ncc"),
        "restoration": restoration(list(films.values()), model),
    }


# --- Means ----------------------------------------------------------------------------------------------------------


def summary(answers: Mapping[tuple[str, str], tuple[Row, Tensor]], metric: str = "dice") -> dict[str, Any]:
    """Mean and interval, [mean, low, high], of every column and of the gains in the metric; affine_sd; the rows."""
    table = {
        pair: row
        | {
            f"gain_{way}": row[f"{metric}_{way}"] - row[f"{metric}_before"]
            for way in ("affine", "after", "register")
            if f"{metric}_{way}" in row
        }
        for pair, (row, _) in answers.items()
    }
    columns = next(iter(table.values()))
    found: dict[str, Any] = {name: over_scans({pair: row[name] for pair, row in table.items()}) for name in columns}
    found["better"] = sum(row["gain_after"] > 0 for row in table.values())
    affines = torch.stack([affine for _, affine in answers.values()])
    kept = [{"fixed": fixed, "moving": moving} | row for (fixed, moving), row in table.items()]
    return found | {"pairs": len(table), "affine_sd": affines.std(0).mean().item(), "rows": kept}


def over_scans(values: Mapping[tuple[str, str], float]) -> list[float]:
    """Mean over ordered pairs, and the ends of its 95 % interval over other scans."""
    names = sorted({name for pair in values for name in pair})
    mean = statistics.fmean(values.values())
    if set(names) & set(SEEN):
        both = np.array([[(values[a, b] + values[b, a]) / 2 for b in SEEN] for a in UNSEEN])
        half = compare(both).half if np.ptp(both) else 0.0  # the same everywhere, such as no fold
        return [mean, mean - half, mean + half]
    n = len(names)
    without = [statistics.fmean(value for pair, value in values.items() if name not in pair) for name in names]
    interval = mean_interval([n * mean - (n - 1) * left for left in without])
    return [mean, float(interval.low or mean), float(interval.high or mean)]


def evidence(model: WholeModule, data: Path) -> dict[str, Any]:
    """All that is measured of a model of volumes."""
    entry: Any = model.entry
    files = {name: (data / f"ct/{name}.nii.gz",) for name in UNSEEN}
    check_unseen(files, {entry.name: entry.ledger})
    recipe = preprocessing_of(model)
    chests = read_chests(data, recipe)
    edges = entry.input.window or [round(CROP_MM / mm) for mm in recipe.spacing_mm or (1.0, 1.0, 1.0)]
    crops = {name: lung_crop(chest, edges) for name, chest in chests.items()}
    content: dict[str, Any] = {"values": values_hash(model), "whole": {}, "crops": {}}
    for group, pairs in GROUPS.items():
        content["whole"][group] = summary({(a, b): whole_row(chests[a], chests[b], model) for a, b in pairs})
        content["crops"][group] = summary({(a, b): crop_row(crops[a], crops[b], model) for a, b in pairs})
    content["restoration"] = restoration([crops[name][0] for name in UNSEEN], model)
    return content


def by_simpleitk(data: Path, recipe: Preprocessing) -> dict[str, Any]:
    """Dice and folded voxels, %, of affine maps by moments and of SimpleITK, on the whole unseen scans."""
    chests = read_chests(data, recipe)
    content: dict[str, Any] = {}
    for name, method in (("affine by moments", moments), ("SimpleITK, affine + B-spline", simpleitk)):
        found = {pair: measure(pair_of(*(chests[name] for name in pair)), method) for pair in GROUPS["unseen"]}
        content[name] = {
            "dice": over_scans({pair: 100 * row["dice"] for pair, row in found.items()}),
            "folded": over_scans({pair: row["folded"] for pair, row in found.items()}),
        }
    return content


def lines(name: str, content: Mapping[str, Any]) -> list[str]:
    """A table of what was measured of a model."""
    out = [name, f"{'':<24}pairs  before  affine   after  gain, 95 % interval     better  folded, %  affine_sd"]
    rows = [("films, local NCC", content["films"], "ncc", 3)] if "films" in content else []
    for kind, group in itertools.product(("whole", "crops"), GROUPS) if "whole" in content else ():
        rows.append((f"{kind}, {group}", content[kind][group], "dice", 1))
    for what, row, metric, digits in rows:
        values = "  ".join(f"{row[f'{metric}_{way}'][0]:>6.{digits}f}" for way in ("before", "affine", "after"))
        gain = "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*row["gain_after"], d=digits)
        rest = f"{row['better']:>6}  {row['folded'][0]:>9.2f}  {row['affine_sd']:>9.4f}"
        out.append(f"  {what:<22}{row['pairs']:>5}  {values}  {gain:<22}{rest}")
        if f"{metric}_register" in row:
            after, share = row[f"{metric}_register"][0], row["folded_register"][0]
            gain = "{:+.{d}f} [{:+.{d}f}, {:+.{d}f}]".format(*row["gain_register"], d=digits)
            out.append(f"    {'as register answers':<41}{after:>6.{digits}f}  {gain:<22}{share:>17.2f}")
    damaged, restored, gain = content["restoration"].values()
    out.append(f"  PSNR {damaged[0]:.1f} -> {restored[0]:.1f} dB, gain {'{:+.1f} [{:+.1f}, {:+.1f}]'.format(*gain)}")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default=MODEL, help="one, or several with commas between them")
    parser.add_argument("--device", default="cpu", help="of the network")
    parser.add_argument("--simpleitk", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore", InputWarning)
    measured: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {"models": {}}
    for name in options.model.split(","):
        model: Any = load(name, task="registration", device=options.device)
        measured["models"][name] = (evidence if model.entry.ndim == 3 else film_evidence)(model, options.data)
        print("\n".join(lines(name, measured["models"][name])), flush=True)
    if options.simpleitk:
        measured["others"] = by_simpleitk(options.data, preprocessing_of(load(MODEL)))
        for name, row in measured["others"].items():
            print(f"{name}: Dice {'{:.1f} [{:.1f}, {:.1f}]'.format(*row['dice'])}, folded {row['folded'][0]:.2f} %")
    FILE.write_text(json.dumps(measured | {"machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
