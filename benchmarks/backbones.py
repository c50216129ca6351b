"""XMorpher beside the U-Net, both at their released width: python -m benchmarks.backbones [--size 96]

Time of a forward pass, and of one with its backward pass, in float32 and under bf16 autocast, of one image; the peak of
memory, each in a process of its own; the arithmetic, counted; and how long that would take at this machine's rate of
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

from benchmarks.step import peak_MiB
from benchmarks.timing import alternate, report
from gvsl_zoo.models.backbone import Backbone
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.models.xmorpher import XMorpher

BACKBONES: dict[str, Callable[[], Backbone]] = {"U-Net": UNet, "XMorpher": XMorpher}
PASSES = ("forward", "forward and backward")
KINDS = {"float32": torch.float32, "bf16": torch.bfloat16}
PRODUCT_GFLOP = 2 * 1024**3 / 1e9
STATED_GFLOP_96 = 48.0  # of the released XMorpher, which projects every key 27 times; in proportion to the voxels
TARGET = 1.3  # times the stated arithmetic at the rate of matrix products


def run(model: nn.Module, x: torch.Tensor, backward: bool, bf16: bool) -> None:
    with torch.set_grad_enabled(backward), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        local = model(x)
    if backward:
        local.float().square().mean().backward()
        model.zero_grad()


def contestants(backbones: Iterable[str], size: int) -> dict[str, Callable[[], None]]:
    x = torch.rand(1, 1, size, size, size)
    made = {}
    for name in backbones:
        model = BACKBONES[name]().to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
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


def products() -> dict[str, Callable[[], torch.Tensor]]:
    """Products of square matrices, of PRODUCT_GFLOP each."""
    pairs = {kind: torch.rand(2, 1024, 1024).to(dtype) for kind, dtype in KINDS.items()}
    return {f"product of matrices, {kind}": partial(torch.matmul, *pair) for kind, pair in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="1 where others use a core")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.alone:
        contestants([options.alone.split(",")[0]], options.size)[options.alone]()
        print(peak_MiB())
        return

    load = os.getloadavg()[0]
    runs = contestants(BACKBONES, options.size)
    peaks = {}
    for name in runs if Path("/proc/self/status").exists() else ():
        command = [sys.executable, "-m", "benchmarks.backbones", "--alone", name]
        command += ["--size", str(options.size), "--threads", str(options.threads)]
        peaks[name] = round(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    medians = alternate(runs | products(), options.rounds)
    rates = {kind: PRODUCT_GFLOP / medians.pop(f"product of matrices, {kind}") for kind in KINDS}
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
    )


if __name__ == "__main__":
    main()
