"""Local NCC 9^3, forward and backward, against five dense convolutions and MONAI's loss: python -m benchmarks.ncc

MONAI's LocalNormalizedCrossCorrelationLoss sums the same window by separable convolutions; it is left out where MONAI
is not installed. Each gradient is compared with that of the same definition in float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import add_device, alternate, report
from gvsl_zoo.losses import STABILISER, local_ncc_loss


def dense_ncc_loss(a: Tensor, b: Tensor, window: int = 9) -> Tensor:
    """The definition, every window summed by a dense convolution, with autograd's backward."""
    ones = torch.ones(1, 1, window, window, window, dtype=a.dtype, device=a.device)
    voxels = window**3
    sum_a, sum_b, sum_aa, sum_bb, sum_ab = (F.conv3d(x, ones, padding=window // 2) for x in (a, b, a * a, b * b, a * b))
    cross = sum_ab - sum_a * sum_b / voxels
    var_a, var_b = sum_aa - sum_a * sum_a / voxels, sum_bb - sum_b * sum_b / voxels
    return 1 - (cross * cross / (var_a * var_b + STABILISER)).mean()


def monai_ncc_loss(window: int = 9) -> Callable[[Tensor, Tensor], Tensor]:
    """MONAI's own: the same squared correlation, variances clamped from below instead of a stabilised product."""
    from monai.losses import LocalNormalizedCrossCorrelationLoss

    return LocalNormalizedCrossCorrelationLoss(kernel_size=window)


def gradient(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    a = a.detach().requires_grad_()
    [slope] = torch.autograd.grad(loss(a, b), a)
    return slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--rounds", type=int, default=5)
    add_device(parser)
    options = parser.parse_args()
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"dense": dense_ncc_loss, "ours": local_ncc_loss}
    if find_spec("monai"):
        losses["MONAI"] = monai_ncc_loss()
    generator = torch.Generator().manual_seed(0)
    medians: dict[str, float] = {}
    errors: dict[str, float] = {}
    for size in options.sizes:
        noise = (torch.rand(1, 1, *[size] * 3, generator=generator) for _ in range(2))
        a, b = (F.avg_pool3d(x, 5, 1, 2).to(options.device) for x in noise)
        for name, loss in losses.items():
            exact = gradient(losses["MONAI"] if name == "MONAI" else dense_ncc_loss, a.double(), b.double())
            error = (gradient(loss, a, b) - exact).abs().max() / exact.abs().max()
            errors[f"{name}, {size}^3"] = error.item()
        medians |= alternate(
            {f"{name}, {size}^3": lambda loss=loss, a=a, b=b: gradient(loss, a, b) for name, loss in losses.items()},
            options.rounds,
        )
    ratios = {
        f"{name}, {size}^3": round(medians[f"{name}, {size}^3"] / medians[f"ours, {size}^3"], 1)
        for size in options.sizes
        for name in losses
        if name != "ours"
    }
    reference = f"dense, {options.sizes[-1]}^3"
    facts = {"ours_faster_than": ratios, "gradient_error_against_float64": errors}
    report("ncc", medians, reference, device=options.device, **facts)


if __name__ == "__main__":
    main()
