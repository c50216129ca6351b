"""Registration beside SimpleITK: python -m benchmarks.register [--pairs synthetic|real|both] [--data DATA]

Every method on every pair: how far points come to lie from where their anatomy truly is (known of synthetic pairs
alone), the Dice of the labels that the moving scan brings along, folded voxels, seconds. `--pairs none --rounds N`
times the methods, in turn; `--table` writes the tables of docs/register.md. Results are kept pair by pair. DATA holds
the scans of `REAL`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.timing import RESULTS, machine
from gvsl_zoo import Grid, load, read_volume, register
from gvsl_zoo.demo import as_volume
from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.inference.refine import Images, fit
from gvsl_zoo.inference.register import REFINING_STEPS, read_at
from gvsl_zoo.pretrain.anatomy import LABELS, sample_subject, true_displacement
from gvsl_zoo.pretrain.validate import LEFT_OUT
from gvsl_zoo.transforms import (
    LPS,
    Affine,
    Chain,
    Displacement,
    Transform,
    displacement_from_voxels,
    jacobian,
    to_displacement,
    warp_volume,
)
from gvsl_zoo.volume import InputWarning, Prepared, Volume, prepare

FILE = RESULTS / "register.json"
PAGE = Path(__file__).parent.parent / "docs/register.md"
MODEL = "gvsl-unet-ct-nano"
SHAPE, SPACING_MM = (96, 96, 96), 4.0  # of the fixed scan: the model's own spacing
LEAST_HEIGHT = 64  # voxels of the moving scan, which shows a part of the chest
TURN_DEGREES, SHIFT_MM = 8.0, 40.0  # about and along every axis: how far the headers may be wrong
FIRST_SEED, COUNT = 200, 8
TIMED_SEEDS = (204, 205)
SMALLEST_ML = 1.0  # of a label that counts, in both scans
PERCENTILES = (1.0, 99.0)  # of an MR scan, that become the ends of the model's window
LUNGS = {"right lung": (1, 1), "left lung": (2, 2)}
ABDOMEN = {  # TotalSegmentator's numbers in the fixed scan and in the moving one: version 2, and that for MR
    "slab": {
        "spleen": (1, 1),
        "liver": (5, 5),
        "stomach": (6, 6),
        "pancreas": (7, 7),
        "colon": (20, 20),
        "vertebra T12": (32, 32),
        "vertebra T11": (33, 33),
        "aorta": (52, 52),
        "vena cava": (63, 63),
        "spinal cord": (79, 79),
        "left back muscle": (86, 86),
        "right back muscle": (87, 87),
    },
    "mr": {
        "spleen": (1, 1),
        "right kidney": (2, 2),
        "left kidney": (3, 3),
        "liver": (5, 5),
        "stomach": (6, 6),
        "pancreas": (7, 7),
        "small bowel": (13, 18),
        "duodenum": (14, 19),
        "colon": (15, 20),
        "spinal cord": (21, 79),
        "aorta": (23, 52),
        "vena cava": (24, 63),
        "left back muscle": (45, 86),
        "right back muscle": (46, 87),
        "left iliopsoas": (47, 88),
        "right iliopsoas": (48, 89),
    },
}


class Real(NamedTuple):
    """Two patients: fixed and moving scan, the ending of their label files, labels, and the spacing to work at, mm."""

    group: str
    fixed: str
    moving: str
    ending: str
    organs: Mapping[str, tuple[int, int]]
    spacing_mm: float


HIPPOCAMPUS = {"anterior": (1, 1), "posterior": (2, 2)}
CHESTS = (("acrin_flt_013", "cmb_crc_01068"), ("lungfcp_0001", "lidc0001"), ("lidc0001", "lidc0314"))
HIPPOCAMPI = (("017", "006"), ("038", "035"), ("052", "049"), ("075", "068"))
REAL = (
    *(Real("chest CT", f"ct/{a}", f"ct/{b}", "autoseg", LUNGS, 4.0) for a, b in CHESTS),
    Real("abdomen CT", "ct/ts_abdomen_slab", "ct/ts_abdomen", "seg", ABDOMEN["slab"], 4.0),
    Real("abdomen, CT onto MR", "mr/ts_abdomen_mr", "ct/ts_abdomen", "seg", ABDOMEN["mr"], 4.0),
    *(
        Real("hippocampus MR", *(f"mr/hippocampus/hippocampus_{n}" for n in pair), "seg", HIPPOCAMPUS, 1.0)
        for pair in HIPPOCAMPI
    ),
)


@dataclass(frozen=True, eq=False)
class Pair:
    """Two scans with labels, {name: (value in the fixed one, value in the moving one)}, and what is true of them.

    truth_mm: where the voxels of the fixed scan belong in the world of the moving one, (i, j, k, 3), NaN outside the
    body and where the moving scan does not show it.
    """

    group: str
    name: str
    fixed: Volume
    moving: Volume
    fixed_labels: Volume
    moving_labels: Volume
    organs: Mapping[str, tuple[int, int]]
    spacing_mm: float
    truth_mm: np.ndarray | None = None


# --- The pairs -----------------------------------------------------------------------------------------------------


def synthetic_pair(seed: int) -> Pair:
    """Two subjects of full variety; the moving one cropped along z, its header turned and shifted."""
    generator = torch.Generator().manual_seed(seed)
    fixed, moving = (sample_subject(SHAPE, generator, (SPACING_MM,) * 3) for _ in range(2))
    height = int(torch.randint(LEAST_HEIGHT, SHAPE[0] + 1, (), generator=generator))
    first = int(torch.randint(SHAPE[0] - height + 1, (), generator=generator))
    rows = slice(first, first + height)
    moving = replace(
        moving, hu=moving.hu[rows], labels=moving.labels[rows], canonical=moving.canonical[:, rows].contiguous()
    )
    still, other = as_volume(fixed), as_volume(moving)
    chance = 2 * torch.rand(2, 3, generator=generator, dtype=torch.float64).numpy() - 1
    header = pose(np.radians(TURN_DEGREES) * chance[0], SHIFT_MM * chance[1]) @ other.affine
    other = replace(other, affine=header)

    index = np.indices(SHAPE) + true_displacement(fixed, moving).double().numpy()  # (z, y, x) of the moving scan
    last = np.array(moving.hu.shape).reshape(3, 1, 1, 1) - 1
    known = (fixed.labels.numpy() > 0) & ((index >= 0) & (index <= last)).all(0)
    truth = index.transpose(3, 2, 1, 0)[..., ::-1] @ header[:3, :3].T + header[:3, 3]
    truth[~known.transpose(2, 1, 0)] = np.nan
    labels = [
        replace(scan, data=s.labels.permute(2, 1, 0).contiguous().numpy())
        for scan, s in ((still, fixed), (other, moving))
    ]
    organs = {name: (value, value) for name, value in LABELS.items() if name not in LEFT_OUT}
    return Pair("synthetic", f"seed {seed}", still, other, *labels, organs, SPACING_MM, truth)


def pose(turn: np.ndarray, shift_mm: np.ndarray) -> np.ndarray:
    """A rotation about the world's axes x, y, z in radians and a shift, (4, 4)."""
    x, y, z = turn
    matrix = np.eye(4)
    matrix[:3, :3] = torch.linalg.matrix_exp(torch.tensor([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])).numpy()
    matrix[:3, 3] = shift_mm
    return matrix


def real_pair(real: Real, data: Path) -> Pair:
    """Two patients; MR is brought to the range of CT, for all methods alike."""
    scans, labels = [], []
    for file in (real.fixed, real.moving):
        scan = read_volume(data / f"{file}.nii.gz")
        scans.append(_in_window(scan) if file.startswith("mr/") else scan)
        labels.append(read_volume(data / f"{file}_{real.ending}.nii.gz"))
    name = " <- ".join(Path(file).name for file in (real.fixed, real.moving))
    return Pair(real.group, name, *scans, *labels, real.organs, real.spacing_mm)


def _in_window(scan: Volume) -> Volume:
    low, high = np.percentile(scan.data, PERCENTILES)
    return replace(scan, data=np.float32(2048 * (np.clip((scan.data - low) / (high - low), 0, 1) - 0.5)))


# --- The methods: each gives the transform from the fixed scan's world to the moving one's -------------------------


def model_for(pair: Pair, task: str) -> nn.Module:
    model = load(MODEL, task=task)
    model.preprocessing = replace(model.preprocessing, spacing_mm=(pair.spacing_mm,) * 3)
    return model


def prepared_of(pair: Pair) -> tuple[Prepared, Prepared]:
    """Both scans at the spacing to work at, in [0, 1]."""
    recipe = model_for(pair, "backbone").preprocessing
    return prepare(pair.fixed, recipe), prepare(pair.moving, recipe)


def identity(pair: Pair) -> Transform:
    """What the headers say."""
    return Affine(np.eye(4))


def moments(pair: Pair) -> Affine:
    """Centre and principal axes of the one body laid on those of the other, with the least turn."""
    points = []
    for prepared in prepared_of(pair):
        volume = prepared.place(prepared.image[0, 0])
        grid = Grid.of(volume)
        points.append(grid.points()[_body(volume).ravel()])
    centres = [p.mean(0) for p in points]
    (still, axes), (other, own) = (np.linalg.eigh(np.cov(p.T)) for p in points)
    turns = []
    for order, signs in itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)):
        turned = own[:, order] * signs
        scale = np.sqrt(other[list(order)] / still)
        turns.append((np.trace(turned @ axes.T), np.linalg.det(turned @ axes.T), (turned * scale) @ axes.T))
    _, _, linear = max((turn for turn in turns if turn[1] > 0), key=lambda turn: turn[0])
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = centres[1] - linear @ centres[0]
    return Affine(matrix)


def simpleitk(pair: Pair) -> Displacement:
    """Affine and cubic B-spline on Mattes' mutual information in the body, coarse to fine, from the better centre."""
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(torch.get_num_threads())
    volumes = [prepared.place(prepared.image[0, 0]) for prepared in prepared_of(pair)]
    fixed, moving = map(_itk_image, volumes)
    mask = sitk.BinaryDilate(_itk_image(replace(volumes[0], data=_body(volumes[0]).astype(np.uint8))), (2, 2, 2))

    def method() -> Any:
        made = sitk.ImageRegistrationMethod()
        made.SetMetricAsMattesMutualInformation(32)
        made.SetMetricFixedMask(mask)
        made.SetInterpolator(sitk.sitkLinear)
        made.SetShrinkFactorsPerLevel([4, 2, 1])
        made.SetSmoothingSigmasPerLevel([2, 1, 0])
        made.SmoothingSigmasAreSpecifiedInPhysicalUnitsOff()
        return made

    def disagreement(start: Any) -> float:
        made = method()
        made.SetInitialTransform(start)
        return float(made.MetricEvaluate(fixed, moving))

    kinds = sitk.CenteredTransformInitializerFilter
    affine = min(
        (
            sitk.AffineTransform(sitk.CenteredTransformInitializer(fixed, moving, sitk.AffineTransform(3), kind))
            for kind in (kinds.GEOMETRY, kinds.MOMENTS)
        ),
        key=disagreement,
    )
    first = method()
    first.SetMetricSamplingStrategy(first.REGULAR)
    first.SetMetricSamplingPercentagePerLevel([1.0, 0.5, 0.2])
    first.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 150, relaxationFactor=0.7)
    first.SetOptimizerScalesFromPhysicalShift()
    first.SetInitialTransform(affine, inPlace=True)
    first.Execute(fixed, moving)

    extent = [size * step for size, step in zip(fixed.GetSize(), fixed.GetSpacing(), strict=True)]
    knots_mm = KNOTS_MM * pair.spacing_mm / SPACING_MM
    spline = sitk.BSplineTransformInitializer(fixed, [max(1, round(e / knots_mm)) for e in extent], order=3)
    second = method()
    second.SetMetricSamplingStrategy(second.REGULAR)
    second.SetMetricSamplingPercentagePerLevel([1.0, 0.5, 0.2])
    second.SetOptimizerAsLBFGS2(solutionAccuracy=1e-2, numberOfIterations=100, deltaConvergenceTolerance=0.01)
    second.SetMovingInitialTransform(affine)
    second.SetInitialTransformAsBSpline(spline, inPlace=True, scaleFactors=[1, 2, 4])
    second.Execute(fixed, moving)

    whole = sitk.CompositeTransform([affine, spline])
    target = _itk_image(pair.fixed)
    field = sitk.TransformToDisplacementField(
        whole, sitk.sitkVectorFloat64, target.GetSize(), target.GetOrigin(), target.GetSpacing(), target.GetDirection()
    )
    array = sitk.GetArrayFromImage(field).transpose(2, 1, 0, 3) * np.diag(LPS)[:3]
    return Displacement(array, Grid.of(pair.fixed))


KNOTS_MM = 100.0  # of the first level's B-spline where voxels are 4 mm


def _itk_image(volume: Volume) -> Any:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.data.transpose(2, 1, 0)))
    matrix = LPS @ volume.affine
    image.SetSpacing(volume.spacing_mm)
    image.SetOrigin(matrix[:3, 3].tolist())
    image.SetDirection((matrix[:3, :3] / volume.spacing_mm).ravel().tolist())
    return image


def _body(volume: Volume) -> np.ndarray:
    """Where there is more than air, lungs aside: Otsu's threshold."""
    import SimpleITK as sitk

    mask = sitk.OtsuThreshold(_itk_image(volume), 0, 1)
    return sitk.GetArrayFromImage(mask).transpose(2, 1, 0).astype(bool)


def network(pair: Pair) -> Displacement:
    return register(pair.moving, pair.fixed, model_for(pair, "registration"), refine=0).displacement_mm


def refined(pair: Pair) -> Displacement:
    return register(pair.moving, pair.fixed, model_for(pair, "registration"), refine=REFINING_STEPS).displacement_mm


def features_alone(pair: Pair) -> Displacement:
    """A model without matching heads."""
    return register(pair.moving, pair.fixed, model_for(pair, "backbone")).displacement_mm


def images_alone(pair: Pair) -> Transform:
    """The same fit without a network: to the images alone, from the moments."""
    on_fixed, on_moving = prepared_of(pair)
    start = moments(pair)
    ones = torch.ones_like(on_moving.image)
    image, inside = (read_at(x, on_fixed, on_moving, start) for x in (on_moving.image, ones))
    images = Images(on_fixed.image, image, None, (torch.ones_like(on_fixed.image), inside))
    _, displacement = fit(images, REFINING_STEPS)
    return Chain((displacement_from_voxels(displacement, on_fixed), start))


METHODS: dict[str, Callable[[Pair], Transform]] = {
    "identity": identity,
    "affine by moments": moments,
    "SimpleITK, affine + B-spline": simpleitk,
    "heads alone, `--refine 0`": network,
    f"heads and fit, `--refine {REFINING_STEPS}`": refined,
    "fit alone, on images and features": features_alone,
    "fit alone, on images, from moments": images_alone,
}
BASELINE = "SimpleITK, affine + B-spline"


# --- The measures --------------------------------------------------------------------------------------------------


def measure(pair: Pair, method: Callable[[Pair], Transform]) -> dict[str, float]:
    """Mean Dice, folded voxels in %, where the truth is known error_mm (median over the body), Dice of each label."""
    grid = Grid.of(pair.fixed)
    began = time.perf_counter()
    found = method(pair)
    displacement = found if isinstance(found, Displacement) else to_displacement(found, grid)
    seconds = time.perf_counter() - began
    try:
        carried = warp_volume(pair.moving_labels, displacement, grid, nearest=True).data
    except ArgumentError:  # the moving scan lies elsewhere
        carried = np.zeros_like(pair.fixed_labels.data)
    scores = dict(_dice(pair, carried))
    row = {"dice": statistics.fmean(scores.values()), "folded": 100 * float((jacobian(displacement).data <= 0).mean())}
    if pair.truth_mm is not None:
        moved = grid.points().reshape(*grid.shape, 3) + displacement.field_mm
        row["error_mm"] = float(np.nanmedian(np.linalg.norm(moved - pair.truth_mm, axis=-1)))
    return row | {"seconds": seconds, "organs": scores}


def _dice(pair: Pair, carried: np.ndarray) -> Iterator[tuple[str, float]]:
    """Label by label, of those that both scans show."""
    least = [SMALLEST_ML * 1e3 / np.prod(volume.spacing_mm) for volume in (pair.fixed, pair.moving)]
    for name, (own, other) in pair.organs.items():
        a, b = pair.fixed_labels.data == own, carried == other
        if a.sum() >= least[0] and (pair.moving_labels.data == other).sum() >= least[1]:
            yield name, float(2 * (a & b).sum() / (a.sum() + b.sum()))


def mean_and_error(values: Sequence[float]) -> list[float]:
    """Mean and its standard error."""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return [statistics.fmean(values), spread / len(values) ** 0.5]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of every method the means over pairs with standard errors, and the gain in Dice over SimpleITK, pair by pair."""
    names = [name for name in METHODS if name in rows[0]]
    means: dict[str, Any] = {}
    for name in names:
        columns = [key for key in rows[0][name] if key != "organs"]
        means[name] = {key: mean_and_error([row[name][key] for row in rows]) for key in columns}
        gains = [row[name]["dice"] - row[BASELINE]["dice"] for row in rows]
        means[name] |= {"gain": mean_and_error(gains), "better": sum(gain > 0 for gain in gains)}
    return means


def measure_all(pair: Pair) -> dict[str, Any]:
    """Every method on one pair, one after another."""
    row: dict[str, Any] = {"group": pair.group, "pair": pair.name}
    for name, method in METHODS.items():
        row[name] = measure(pair, method)
        shown = {key: round(value, 3) for key, value in row[name].items() if key != "organs"}
        print(f"{pair.group} {pair.name}: {name:<40} {shown}", flush=True)
    return row


def keep(kind: str, row: dict[str, Any], **more: Any) -> None:
    """Put a row, in the place of an older one of the same pair, and the means into the file of results."""
    measured = json.loads(FILE.read_text()) if FILE.exists() else {}
    rows = {old["pair"]: old for old in measured.get(kind, {}).get("pairs", [])} | {row["pair"]: row}
    ordered = [rows[name] for name in sorted(rows)] if kind == "synthetic" else list(rows.values())
    measured[kind] = {"mean": summary(ordered), "pairs": ordered}
    FILE.write_text(json.dumps(measured | {"model": MODEL, "machine": machine()} | more, indent=2) + "\n")


# --- The tables of docs/register.md --------------------------------------------------------------------------------


def tables(measured: Mapping[str, Any]) -> dict[str, str]:
    """The page's tables by their marks."""
    synthetic, real = measured["synthetic"], measured["real"]
    count = len(synthetic["pairs"])
    rows = [f"| {count} synthetic pairs | error, mm | Dice, % | folded, % | seconds |", "|---|---|---|---|---|"]
    for name, mean in synthetic["mean"].items():
        cells = [_cell(mean["error_mm"]), _cell(mean["dice"], 100), f"{mean['folded'][0]:.2f}"]
        rows.append(f"| {name} | {' | '.join(cells)} | {measured['timed']['seconds'][name]:.1f} |")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in real["pairs"]:
        groups.setdefault(row["group"], []).append(row)
    heads = [f"{group} ({len(own)})" for group, own in groups.items()]
    dice = [f"| Dice, % | {' | '.join(heads)} | all |", "|---" * (len(heads) + 2) + "|"]
    for name, mean in real["mean"].items():
        cells = [f"{100 * statistics.fmean(row[name]['dice'] for row in own):.1f}" for own in groups.values()]
        dice.append(f"| {name} | {' | '.join(cells)} | {_cell(mean['dice'], 100)} |")
    return {"synthetic": "\n".join(rows), "real": "\n".join(dice)}


def _cell(mean: Sequence[float], factor: float = 1) -> str:
    return f"{factor * mean[0]:.1f} +- {factor * mean[1]:.1f}"


def with_tables(page: str, measured: Mapping[str, Any]) -> str:
    """The page with its tables written anew."""
    for name, table in tables(measured).items():
        pattern = rf"(<!-- {name}: [^>]*-->\n).*?(<!-- /{name} -->)"
        page, count = re.subn(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", page, flags=re.DOTALL)
        assert count == 1, f"{PAGE} lacks the marks of the table {name!r}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", choices=("synthetic", "real", "both", "none"), default="synthetic")
    parser.add_argument("--count", type=int, default=COUNT, help="synthetic pairs")
    parser.add_argument("--data", type=Path, help="folder of the real scans")
    parser.add_argument("--rounds", type=int, default=0, help="over two synthetic pairs, for the table's seconds")
    parser.add_argument("--table", action="store_true", help="measure nothing; write the page's tables")
    options = parser.parse_args()
    if options.pairs in ("real", "both") and not options.data:
        parser.error("--pairs real needs --data")
    warnings.simplefilter("ignore", InputWarning)
    if options.table:
        PAGE.write_text(with_tables(PAGE.read_text(), json.loads(FILE.read_text())))
        return
    if options.pairs in ("synthetic", "both"):
        for seed in range(FIRST_SEED, FIRST_SEED + options.count):
            keep("synthetic", measure_all(synthetic_pair(seed)))
    if options.pairs in ("real", "both"):
        for real in REAL:
            keep("real", measure_all(real_pair(real, options.data)))
    seconds: dict[str, list[float]] = {name: [] for name in METHODS}
    for seed in TIMED_SEEDS * options.rounds:
        row = measure_all(synthetic_pair(seed))
        for name, values in seconds.items():
            values.append(row[name]["seconds"])
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        keep("synthetic", row, timed={"seconds": medians, "seeds": TIMED_SEEDS, "machine": machine()})


if __name__ == "__main__":
    main()
