"""Linear probe on lungs, frozen features and one convolution 3, against scratch: python -m benchmarks.probe DATA

DATA/ct holds NAME.nii.gz and NAME_autoseg.nii.gz (1 right lung, 2 left lung). Subjects of the test were not seen in
pre-training. Mean Dice of the lungs over the test scans, for several seeds of the voxels and of the scratch network.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import RESULTS, machine
from gvsl_zoo import Volume, load, read_volume
from gvsl_zoo.inference.features import dense_features, prepare_for
from gvsl_zoo.models.backbone import Linear, initialise
from gvsl_zoo.volume import Preprocessing, prepare

TRAIN = ["lidc0001", "cmb_crc_01068", "lidc0314", "lungdx_a0002"]
TEST = ["lungfcp_0001", "acrin_flt_013", "kits_00072"]
CLASSES = 3  # neither, right lung, left lung
VOXELS = 3000  # a class and scan
WEIGHT_DECAY = 1e-3


def labels_on_grid(path: Path, spacing_mm: tuple[float, float, float]) -> Tensor:
    """The label with the largest share of every voxel of the model's grid, (D, H, W)."""
    labels = read_volume(path)
    recipe = Preprocessing(spacing_mm, unit="arbitrary", window=(0.0, 1.0))
    shares = [
        prepare(Volume((labels.data == k).astype("uint8"), labels.affine), recipe).image[0, 0] for k in range(CLASSES)
    ]
    return torch.stack(shares).argmax(0)


def dice(prediction: Tensor, truth: Tensor) -> float:
    """Mean Dice in per cent of the classes that the truth has, background left out."""
    scores = []
    for k in range(1, CLASSES):
        a, b = prediction == k, truth == k
        if b.any():
            scores.append(200 * (a & b).sum().item() / (a.sum() + b.sum()).item())
    return statistics.fmean(scores)


def neighbourhoods(features: Tensor, places: Tensor) -> Tensor:
    """The 3 x 3 x 3 voxels about each of `places` (N, 3), (N, C * 27): what a convolution 3 sees there."""
    padded = F.pad(features, [1] * 6)
    steps = torch.cartesian_prod(*[torch.arange(3)] * 3)
    z, y, x = (places[:, None] + steps).unbind(-1)
    return padded[:, z, y, x].movedim(0, 1).flatten(1)


def probe(features: dict[str, Tensor], labels: dict[str, Tensor], train: list[str], seed: int) -> float:
    """Fit one convolution 3 on voxels of `train`, each class alike; return the mean Dice over the test scans."""
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = [], []
    for name in train:
        for k in range(CLASSES):
            places = (labels[name] == k).nonzero()
            places = places[torch.randint(len(places), (VOXELS,), generator=generator)]
            inputs.append(neighbourhoods(features[name], places))
            targets.append(torch.full((VOXELS,), k))
    x, target = torch.cat(inputs), torch.cat(targets)
    scale = x.std(0).clamp_min(1e-6)
    head = Linear(x.shape[1], CLASSES)
    initialise(head, generator)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(x / scale), target) + WEIGHT_DECAY * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    kernel = (head.weight / scale).detach().view(CLASSES, -1, 3, 3, 3)
    scores = [
        dice(F.conv3d(features[t][None], kernel, head.bias.detach(), padding=1)[0].argmax(0), labels[t]) for t in TEST
    ]
    return statistics.fmean(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="gvsl-unet-ct-nano")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    results: dict[str, dict[str, list[float]]] = {}
    for arm in ("pre-trained", "scratch"):
        results[arm] = {f"{n} scan{'s' * (n > 1)}": [] for n in (1, 2, 4)}
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            model = load(options.model, pretrained=arm == "pre-trained")
            features, labels = {}, {}
            for name in TRAIN + TEST:
                prepared = prepare_for(options.data / "ct" / f"{name}.nii.gz", model)
                features[name] = dense_features(prepared, model)
                labels[name] = labels_on_grid(options.data / "ct" / f"{name}_autoseg.nii.gz", prepared.spacing_mm)
            for n in (1, 2, 4):
                results[arm][f"{n} scan{'s' * (n > 1)}"].append(probe(features, labels, TRAIN[:n], seed))
    table = {
        arm: {n: {"mean": statistics.fmean(v), "sd": statistics.stdev(v), "seeds": v} for n, v in row.items()}
        for arm, row in results.items()
    }
    for arm, row in table.items():
        print(f"{arm:<12}", "   ".join(f"{n}: {cell['mean']:.1f} +- {cell['sd']:.1f}" for n, cell in row.items()))
    content = {"model": options.model, "metric": "mean Dice of both lungs, %", "train": TRAIN, "test": TEST}
    (RESULTS / "probe.json").write_text(json.dumps(content | {"results": table, "machine": machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
