"""Local NCC 9^3, forward and backward, against five dense convolutions: python -m benchmarks.ncc [--size 64]"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import alternate, report
from gvsl_zoo.losses import STABILISER, local_ncc_loss


def dense_ncc_loss(a: Tensor, b: Tensor, window: int = 9) -> Tensor:
    """The definition, every window summed by a dense convolution, with autograd's backward."""
    ones = torch.ones(1, 1, window, window, window, dtype=a.dtype, device=a.device)
    voxels = window**3
    sum_a, sum_b, sum_aa, sum_bb, sum_ab = (F.conv3d(x, ones, padding=window // 2) for x in (a, b, a * a, b * b, a * b))
    cross = sum_ab - sum_a * sum_b / voxels
    var_a, var_b = sum_aa - sum_a * sum_a / voxels, sum_bb - sum_b * sum_b / voxels
    return 1 - (cross * cross / (var_a * var_b + STABILISER)).mean()


def gradient(loss: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    a = a.detach().requires_grad_()
    [slope] = torch.autograd.grad(loss(a, b), a)
    return slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, *[options.size] * 3)
    noise = (torch.rand(shape, generator=generator) for _ in range(2))
    a, b = (F.avg_pool3d(x, 5, 1, 2).to(options.device) for x in noise)
    exact = gradient(dense_ncc_loss, a.double(), b.double())
    errors = {
        name: ((gradient(loss, a, b) - exact).abs().max() / exact.abs().max()).item()
        for name, loss in (("dense convolutions", dense_ncc_loss), ("banded products", local_ncc_loss))
    }
    medians = alternate(
        {
            "dense convolutions": lambda: gradient(dense_ncc_loss, a, b),
            "banded products, own backward": lambda: gradient(local_ncc_loss, a, b),
        },
        rounds=5,
    )
    report("ncc", medians, "dense convolutions", size=options.size, gradient_error_against_float64=errors)


if __name__ == "__main__":
    main()
