"""A scan to labels in windows against MONAI's sliding_window_inference: python -m benchmarks.sliding [--window 128]

The same network, weights, windows, overlap and Gaussian importance (MONAI is given ours: its own stops at 0.001). MONAI
gets the image ready as a tensor and ends with the argmax; ours is `segment`, which also scales the HU and brings the
labels onto the scan's grid and axes. What either takes outside the network is measured with a network that returns a
constant.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.step import peak_MiB
from benchmarks.timing import add_device, alternate, report
from gvsl_zoo.inference.segment import segment
from gvsl_zoo.inference.sliding import SIGMA_PER_WINDOW
from gvsl_zoo.models.heads import SegmentationModel
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.registry import Label
from gvsl_zoo.volume import Preprocessing, Volume, prepare

CLASSES = 4
OVERLAP = 0.5
TARGETS = {"ours, float32": 1.7, "ours, bf16": 3.5}  # times as fast as MONAI in float32
SAME_LABELS = {"ours, float32": 0.9999, "ours, bf16": 0.99}
OUTSIDE_TARGETS = {"seconds": 1.0, "MiB": 300}


class Constant(nn.Module):
    """A network that takes no time."""

    def __init__(self, window: int) -> None:
        super().__init__()
        logits = torch.empty(1, CLASSES, window, window, window, memory_format=torch.channels_last_3d)
        self.register_buffer("logits", logits.normal_(generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def scan(window: int) -> Volume:
    """A synthetic chest, 2 x 2 x 1.5 windows (x, y, z), in HU; its air is too dense to be skipped."""
    shape = (3 * window // 2, 2 * window, 2 * window)
    subject = sample_subject(shape, torch.Generator().manual_seed(0))
    hu = subject.hu.clamp_(min=-900).round().to(torch.int16)
    return Volume(hu.numpy().T, np.diag([*reversed(subject.spacing_mm), 1.0]))


def ours(volume: Volume, model: nn.Module, window: int, precision: str = "float32") -> np.ndarray:
    """Labels (z, y, x)."""
    labels = [Label(str(k), k) for k in range(CLASSES)]
    found = segment(volume, model, labels=labels, window=(window,) * 3, overlap=OVERLAP, precision=precision)
    return found.data.T


def monais(image: Tensor, model: Callable[[Tensor], Tensor], window: int, precision: str = "float32") -> np.ndarray:
    """Labels (z, y, x)."""
    from monai.inferers import sliding_window_inference

    position = torch.arange(window) - (window - 1) / 2
    along = torch.exp(-0.5 * (position / (window * SIGMA_PER_WINDOW)).square())
    importance = (along[:, None, None] * along[:, None] * along).to(image.device)
    with torch.inference_mode(), torch.autocast(image.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = sliding_window_inference(
            image, (window,) * 3, 1, model, OVERLAP, roi_weight_map=importance[None, None]
        )
    return logits.argmax(1)[0].cpu().numpy()  # type: ignore[union-attr]


def with_recipe(model: nn.Module) -> nn.Module:
    model.preprocessing = Preprocessing()  # type: ignore[assignment]
    return model.eval()


def outside(name: str, window: int, device: str) -> Callable[[], np.ndarray]:
    """A whole scan, of noise, with a network that takes no time."""
    shape = (2 * window, 2 * window, 3 * window // 2)
    volume = Volume(np.random.default_rng(0).integers(-1000, 1000, shape, np.int16), np.eye(4))
    model = with_recipe(Constant(window)).to(device)
    if name == "ours":
        return lambda: ours(volume, model, window)
    image = prepare(volume, Preprocessing()).image
    return lambda: monais(image.to(device), model, window)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    add_device(parser)
    parser.add_argument("--alone", choices=("MONAI", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    window = options.window
    if options.alone:
        run = outside(options.alone, window, "cpu")
        if options.alone == "MONAI":
            import monai.inferers  # noqa: F401  its import is no work
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        before = peak_MiB()
        run()
        print(peak_MiB() - before)
        return

    load = os.getloadavg()[0]  # others' work: above 0, the machine is shared
    volume = scan(window)
    image = prepare(volume, Preprocessing()).image
    generator = torch.Generator().manual_seed(0)
    model = with_recipe(SegmentationModel(UNet(3, options.width, generator=generator), CLASSES, generator=generator))
    model.to(options.device)
    labels: dict[str, np.ndarray] = {}

    def keep(name: str, run: Callable[[], np.ndarray]) -> Callable[[], None]:
        return lambda: labels.update({name: run()})

    contestants = {
        "MONAI, float32": keep("MONAI, float32", lambda: monais(image.to(options.device), model, window)),
        "MONAI, bf16": keep("MONAI, bf16", lambda: monais(image.to(options.device), model, window, "bf16")),
        "ours, float32": keep("ours, float32", lambda: ours(volume, model, window)),
        "ours, bf16": keep("ours, bf16", lambda: ours(volume, model, window, "bf16")),
    }
    medians = alternate(contestants, options.rounds)
    seconds = alternate({name: outside(name, window, options.device) for name in ("MONAI", "ours")}, options.rounds)
    peaks = {}
    for name in ("MONAI", "ours") if options.device == "cpu" and Path("/proc/self/status").exists() else ():
        command = [sys.executable, "-m", "benchmarks.sliding", "--alone", name]
        command += ["--window", str(window), "--threads", str(options.threads)]
        peaks[name] = round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    facts = {
        "scan": list(volume.shape),
        "window": window,
        "overlap": OVERLAP,
        "width": options.width,
        "classes": CLASSES,
        "voxels_a_second": {name: round(image.numel() / s) for name, s in medians.items()},
        "same_labels_as_MONAI_float32": {
            name: round(float((found == labels["MONAI, float32"]).mean()), 6) for name, found in labels.items()
        },
        "outside_the_network": {"seconds": {name: round(s, 3) for name, s in seconds.items()}, "MiB": peaks},
        "targets": {"faster": TARGETS, "same_labels": SAME_LABELS, "outside_the_network": OUTSIDE_TARGETS}
        if options.device == "cpu"
        else {},
        "load_average_before": round(load, 2),
    }
    small = "" if (window, options.width) == (128, 32) else f"_{window}_{options.width}"
    report(f"sliding{small}", medians, "MONAI, float32", device=options.device, **facts)


if __name__ == "__main__":
    main()
