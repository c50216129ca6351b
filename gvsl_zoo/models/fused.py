"""GroupNorm and the LeakyReLU behind it as one, on CUDA: channels-last memory is read twice and written once.

PyTorch's GroupNorm brings such memory into another order first, and under autocast into float32; with what a U-Net does
around it that takes most of a step. Sums are float32, of differences from each channel's first value, in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .backbone import CHANNELS_LAST

TILE = 8192  # numbers that a program takes at once
PROGRAMS = 528  # for a sum: four for each multiprocessor of an H100
LISTED = 4096  # partial sums that a program adds up at once


@triton.jit
def _sums(x_at, sums_at, N, C, span, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Sums of x - x[0] and of its square over `span` voxels, by channel."""
    part, image, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    channel = tl.arange(0, WIDE)
    there = channel < C
    x_at += image.to(tl.int64) * N * C
    first = tl.load(x_at + channel, mask=there, other=0.0).to(tl.float32)
    total = tl.zeros((WIDE,), tl.float32)
    square = tl.zeros((WIDE,), tl.float32)
    end = tl.minimum((part + 1) * span, N)
    for start in range(part * span, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & there[None, :]
        x = tl.load(x_at + row.to(tl.int64)[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, x - first[None, :], 0.0)
        total += tl.sum(x, 0)
        square += tl.sum(x * x, 0)
    sums_at += (image * parts + part) * 2 * C + channel
    tl.store(sums_at, total, mask=there)
    tl.store(sums_at + C, square, mask=there)


@triton.jit
def _added(sums_at, C, parts, channel, there, LIST: tl.constexpr, WIDE: tl.constexpr):
    """Both rows of partial sums (parts, 2, C) of some channels, added up."""
    first = tl.zeros((WIDE,), tl.float32)
    second = tl.zeros((WIDE,), tl.float32)
    for start in range(0, parts, LIST):
        part = start + tl.arange(0, LIST)
        mask = (part < parts)[:, None] & there[None, :]
        at = sums_at + part[:, None] * 2 * C + channel[None, :]
        first += tl.sum(tl.load(at, mask=mask, other=0.0), 0)
        second += tl.sum(tl.load(at + C, mask=mask, other=0.0), 0)
    return first, second


@triton.jit
def _moments(x_at, sums_at, mean_at, rstd_at, N, C, parts, width, eps, LIST: tl.constexpr, WIDE: tl.constexpr):
    """Mean and 1 / SD of a group of `width` channels."""
    group, image, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    place = tl.arange(0, WIDE)
    there = place < width
    channel = group * width + place
    total, square = _added(sums_at + image * parts * 2 * C, C, parts, channel, there, LIST, WIDE)
    first = tl.load(x_at + image.to(tl.int64) * N * C + channel, mask=there, other=0.0).to(tl.float32)
    shift, square = total / N, square / N
    mean = tl.sum(tl.where(there, first + shift, 0.0), 0) / width
    apart = first + shift - mean
    variance = tl.sum(tl.where(there, square - shift * shift + apart * apart, 0.0), 0) / width
    tl.store(mean_at + image * groups + group, mean)
    tl.store(rstd_at + image * groups + group, 1 / tl.sqrt(variance + eps))


@triton.jit
def _tile(N, C, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """Offsets and mask of a tile, and its channels."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    at = tl.program_id(1).to(tl.int64) * N * C + row.to(tl.int64)[:, None] * C + channel[None, :]
    return at, (row < N)[:, None] & (channel < C)[None, :], channel


@triton.jit
def _norm(x_at, y_at, weight_at, bias_at, mean_at, rstd_at, N, C, width, slope, ROWS: tl.constexpr, WIDE: tl.constexpr):
    at, mask, channel = _tile(N, C, ROWS, WIDE)
    there = channel < C
    group = tl.program_id(1) * (C // width) + channel // width
    mean = tl.load(mean_at + group, mask=there, other=0.0)
    scale = tl.load(rstd_at + group, mask=there, other=0.0) * tl.load(weight_at + channel, mask=there, other=0.0)
    bias = tl.load(bias_at + channel, mask=there, other=0.0)
    x = tl.load(x_at + at, mask=mask, other=0.0).to(tl.float32)
    z = (x - mean[None, :]) * scale[None, :] + bias[None, :]
    tl.store(y_at + at, tl.where(z > 0, z, slope * z).to(y_at.dtype.element_ty), mask=mask)


@triton.jit
def _slopes(x_at, grad_at, at, mask, channel, weight_at, bias_at, mean_at, rstd_at, C, width, slope):
    """Of a tile the normalised values, and the gradient of what the LeakyReLU was given."""
    there = channel < C
    group = tl.program_id(1) * (C // width) + channel // width
    mean = tl.load(mean_at + group, mask=there, other=0.0)
    rstd = tl.load(rstd_at + group, mask=there, other=0.0)
    weight = tl.load(weight_at + channel, mask=there, other=0.0)
    bias = tl.load(bias_at + channel, mask=there, other=0.0)
    x = tl.load(x_at + at, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_at + at, mask=mask, other=0.0).to(tl.float32)
    z = (x - mean[None, :]) * (rstd * weight)[None, :] + bias[None, :]
    normed = tl.where(mask, (x - mean[None, :]) * rstd[None, :], 0.0)
    return normed, tl.where(z > 0, grad, slope * grad), weight, rstd


@triton.jit
def _grad_sums(
    x_at, grad_at, sums_at, weight_at, bias_at, mean_at, rstd_at, N, C, width, span, slope,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient, and of its product with the normalised values, over `span` voxels, by channel."""
    part, image, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    channel = tl.arange(0, WIDE)
    there = channel < C
    total = tl.zeros((WIDE,), tl.float32)
    product = tl.zeros((WIDE,), tl.float32)
    end = tl.minimum((part + 1) * span, N)
    for start in range(part * span, end, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < end)[:, None] & there[None, :]
        at = image.to(tl.int64) * N * C + row.to(tl.int64)[:, None] * C + channel[None, :]
        normed, grad, _, _ = _slopes(
            x_at, grad_at, at, mask, channel, weight_at, bias_at, mean_at, rstd_at, C, width, slope
        )
        total += tl.sum(grad, 0)
        product += tl.sum(grad * normed, 0)
    sums_at += (image * parts + part) * 2 * C + channel
    tl.store(sums_at, total, mask=there)
    tl.store(sums_at + C, product, mask=there)


@triton.jit
def _grad_moments(sums_at, weight_at, totals_at, shares_at, N, C, parts, width, LIST: tl.constexpr, WIDE: tl.constexpr):
    """Sums of a group by channel, (images, 2, C), and their weighted means over the group, (images, groups, 2)."""
    group, image, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    place = tl.arange(0, WIDE)
    there = place < width
    channel = group * width + place
    total, product = _added(sums_at + image * parts * 2 * C, C, parts, channel, there, LIST, WIDE)
    tl.store(totals_at + image * 2 * C + channel, total, mask=there)
    tl.store(totals_at + image * 2 * C + C + channel, product, mask=there)
    weight = tl.load(weight_at + channel, mask=there, other=0.0)
    numbers = N * width
    tl.store(shares_at + (image * groups + group) * 2, tl.sum(weight * total, 0) / numbers)
    tl.store(shares_at + (image * groups + group) * 2 + 1, tl.sum(weight * product, 0) / numbers)


@triton.jit
def _grad_norm(
    x_at, grad_at, out_at, weight_at, bias_at, mean_at, rstd_at, shares_at, N, C, width, slope,
    ROWS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    at, mask, channel = _tile(N, C, ROWS, WIDE)
    normed, grad, weight, rstd = _slopes(
        x_at, grad_at, at, mask, channel, weight_at, bias_at, mean_at, rstd_at, C, width, slope
    )
    there = channel < C
    share = shares_at + (tl.program_id(1) * (C // width) + channel // width) * 2
    mean = tl.load(share, mask=there, other=0.0)
    pull = tl.load(share + 1, mask=there, other=0.0)
    out = rstd[None, :] * (weight[None, :] * grad - mean[None, :] - normed * pull[None, :])
    tl.store(out_at + at, out.to(out_at.dtype.element_ty), mask=mask)


class _Grid:
    """How a tensor (B, C, *shape) is dealt out."""

    def __init__(self, x: Tensor, groups: int) -> None:
        self.images, self.channels = x.shape[:2]
        self.voxels, self.width = x[0, 0].numel(), self.channels // groups
        wide, narrow = triton.next_power_of_2(self.channels), triton.next_power_of_2(self.width)
        rows = max(1, TILE // wide)
        self.tile = {"ROWS": rows, "WIDE": wide, "num_warps": 8}
        self.list = {"LIST": max(1, LISTED // narrow), "WIDE": narrow}
        wanted = min(triton.cdiv(self.voxels, rows), max(1, PROGRAMS // self.images))
        self.span = triton.cdiv(triton.cdiv(self.voxels, wanted), rows) * rows
        self.parts = triton.cdiv(self.voxels, self.span)
        self.some, self.all = (self.parts, self.images), (triton.cdiv(self.voxels, rows), self.images)
        self.each = (groups, self.images)


class _NormLeaky(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, slope: float) -> Tensor:
        grid = _Grid(x, groups)
        N, C, width = grid.voxels, grid.channels, grid.width
        w, b = weight.float(), bias.float()
        sums = w.new_empty(grid.images, grid.parts, 2, C)
        mean, rstd = w.new_empty(2, grid.images, groups)
        y = torch.empty_like(x)
        with torch.cuda.device_of(x):
            _sums[grid.some](x, sums, N, C, grid.span, **grid.tile)
            _moments[grid.each](x, sums, mean, rstd, N, C, grid.parts, width, eps, **grid.list)
            _norm[grid.all](x, y, w, b, mean, rstd, N, C, width, slope, **grid.tile)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps, ctx.slope = groups, eps, slope
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for
            y = F.leaky_relu(F.group_norm(x.float(), ctx.groups, weight.float(), bias.float(), ctx.eps), ctx.slope)
            wanted = [i for i in range(3) if ctx.needs_input_grad[i]]
            leaves = [(x, weight, bias)[i] for i in wanted]
            slopes = dict(zip(wanted, torch.autograd.grad(y, leaves, grad.float(), create_graph=True), strict=True))
            return *(slopes.get(i) for i in range(3)), None, None, None
        grad = grad.to(x.dtype).contiguous(memory_format=CHANNELS_LAST[x.ndim])
        grid = _Grid(x, ctx.groups)
        N, C, width = grid.voxels, grid.channels, grid.width
        w, b = weight.float(), bias.float()
        sums, totals = w.new_empty(grid.images, grid.parts, 2, C), w.new_empty(grid.images, 2, C)
        shares, out = w.new_empty(grid.images, ctx.groups, 2), torch.empty_like(x)
        with torch.cuda.device_of(x):
            of = (w, b, mean, rstd)
            _grad_sums[grid.some](x, grad, sums, *of, N, C, width, grid.span, ctx.slope, **grid.tile)
            _grad_moments[grid.each](sums, w, totals, shares, N, C, grid.parts, width, **grid.list)
            _grad_norm[grid.all](x, grad, out, *of, shares, N, C, width, ctx.slope, **grid.tile)
        of_bias, of_weight = totals.sum(0)
        return out, of_weight.to(weight.dtype), of_bias.to(bias.dtype), None, None, None


def norm_leaky(x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, slope: float) -> Tensor:
    """leaky_relu(group_norm(x), slope) of x (B, C, *shape) on CUDA, in the type of x, channels-last."""
    return _NormLeaky.apply(x.contiguous(memory_format=CHANNELS_LAST[x.ndim]), weight, bias, groups, eps, slope)
