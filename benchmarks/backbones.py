"""XMorpher beside the U-Net, both at their released width: python -m benchmarks.backbones [--size 96] [--device cuda]

Time of a forward pass, and of one with its backward pass, in float32 (on CUDA with convolutions in TF32, PyTorch's
default) and under bf16 autocast, of one image; the peak of memory, each in a process of its own, or on CUDA what its
tensors take beyond the weights; the arithmetic, counted; and how long that would take at this machine's rate of
matrix products.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.step import beyond_MiB, peak_MiB
from benchmarks.timing import add_device, alternate, report
from gvsl_zoo.models.backbone import Backbone
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.models.xmorpher import XMorpher

BACKBONES: dict[str, Callable[[], Backbone]] = {"U-Net": UNet, "XMorpher": XMorpher}
PASSES = ("forward", "forward and backward")
KINDS = {"float32": torch.float32, "bf16": torch.bfloat16}
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
STATED_GFLOP_96 = 48.0  # of the released XMorpher, which projects every key 27 times; in proportion to the voxels
TARGET = 1.3  # times the stated arithmetic at the rate of matrix products


def run(model: nn.Module, x: torch.Tensor, backward: bool, bf16: bool) -> None:
    with torch.set_grad_enabled(backward), torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        local = model(x)
    if backward:
        local.float().square().mean().backward()
        model.zero_grad()


def contestants(backbones: Iterable[str], size: int, device: str) -> dict[str, Callable[[], None]]:
    x = torch.rand(1, 1, size, size, size, device=device)
    made = {}
    for name in backbones:
        model = BACKBONES[name]().to(device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        for what in PASSES:
            for kind in KINDS:
                made[f"{name}, {what}, {kind}"] = partial(run, model, x, what != "forward", kind == "bf16")
    return made


def counted(name: str, size: int) -> float:
    """GFLOP of a forward pass, 2 a multiplication with its addition."""
    model, x = BACKBONES[name]().eval(), torch.rand(1, 1, size, size, size)
    attention = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=attention) as counter:
        model(x)
    return counter.get_total_flops() / 1e9


def attention_flop(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """Of an attention of these shapes, (B, heads, tokens, width)."""
    return sdpa_flop_count(q, k, v)


def products(device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Products of square matrices of PRODUCT_SIZE."""
    size = PRODUCT_SIZE[device]
    pairs = {kind: torch.rand(2, size, size, device=device).to(dtype) for kind, dtype in KINDS.items()}
    return {f"product of matrices, {kind}": partial(torch.matmul, *pair) for kind, pair in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 where others use a core")
    add_device(parser)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.alone:
        contestants([options.alone.split(",")[0]], options.size, "cpu")[options.alone]()
        print(peak_MiB())
        return

    load = os.getloadavg()[0]
    runs = contestants(BACKBONES, options.size, options.device)
    peaks = {}
    if options.device == "cuda":
        for once in runs.values():  # what a first pass sets up is not of it
            once()
        peaks = {name: beyond_MiB(once) for name, once in runs.items()}
    elif Path("/proc/self/status").exists():
        for name in runs:
            command = [sys.executable, "-m", "benchmarks.backbones", "--alone", name]
            command += ["--size", str(options.size), "--threads", str(options.threads)]
            peaks[name] = round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = alternate(runs | products(options.device), options.rounds)
    product = 2 * PRODUCT_SIZE[options.device] ** 3 / 1e9
    rates = {kind: product / medians.pop(f"product of matrices, {kind}") for kind in KINDS}
    seconds, stated = medians["XMorpher, forward, float32"], STATED_GFLOP_96 * (options.size / 96) ** 3
    report(
        "backbones" if options.size == 96 else f"backbones_{options.size}",
        medians,
        "U-Net, forward, float32",
        size=options.size,
        parameters={name: sum(p.numel() for p in backbone().parameters()) for name, backbone in BACKBONES.items()},
        peak_MiB=peaks,
        counted_GFLOP={name: round(counted(name, options.size), 1) for name in BACKBONES},
        stated_GFLOP_of_the_released_xmorpher=round(stated, 1),
        matmul_GFLOP_per_second={kind: round(rate) for kind, rate in rates.items()},
        xmorpher_forward_in_times_of_the_stated_arithmetic=round(seconds * rates["float32"] / stated, 2),
        target=TARGET,
        load_average_before=round(load, 2),
        device=options.device,
    )


if __name__ == "__main__":
    main()
