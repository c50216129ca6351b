"""The window engine: a function of small images applied to a large one, in bounded memory; tensors only."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError
from ..models.backbone import CHANNELS_LAST, Conv3d

SIGMA_PER_WINDOW = 1 / 8  # of the Gaussian importance (Isensee et al. 2021, nnU-Net): a window is worst at its border
PRECISIONS = ("float32", "bf16")
SUMMED = 2**15  # numbers at once, in float32: fewer take longer, more lose digits
SHARE_OF_FREE = 0.25  # of a GPU's free memory, what an image or its blend may take there

Progress = Callable[[int, int], None]  # windows done, windows in all
Module = TypeVar("Module", bound=nn.Module)


class Window(NamedTuple):
    """One window: its box in the image, and its share of every voxel in it."""

    box: tuple[slice, ...]
    weight: Tensor  # of the box's shape, float32; over all windows the shares of a voxel sum to 1


@dataclass(frozen=True)
class Windows:
    """The fewest windows that cover an image of `shape`, evenly spread, first axis slowest.

    Args:
        shape: spatial shape, (D, H, W) or (H, W).
        window: its edges in voxels; an axis of the image that is shorter is taken whole.
        overlap: the least share of a window that its neighbour also covers, in [0, 1).
        device: of the shares, by default the CPU.

    Windows form a grid, and the importance is a product of Gaussians, so that the shares are normalised an axis at a
    time: they sum to one in every voxel without an image of weights.
    Errors: ArgumentError for a window or an overlap that cannot be.
    """

    shape: tuple[int, ...]
    window: tuple[int, ...]
    overlap: float = 0.25
    device: torch.device | None = None

    def __post_init__(self) -> None:
        if len(self.window) != len(self.shape) or any(int(w) != w or w < 1 for w in self.window):
            raise ArgumentError(
                f"window {tuple(self.window)} for an image of {tuple(self.shape)} voxels",
                f"give {len(self.shape)} whole numbers of voxels, each at least 1",
            )
        if not 0 <= self.overlap < 1:
            raise ArgumentError(f"overlap {self.overlap}", "give a share of the window in [0, 1), for example 0.25")
        object.__setattr__(self, "window", tuple(min(int(w), n) for w, n in zip(self.window, self.shape, strict=True)))

    @cached_property
    def starts(self) -> list[list[int]]:
        """First voxel of the windows along each axis; the last one ends with the image."""
        starts = []
        for size, window in zip(self.shape, self.window, strict=True):
            stride = max(1, window - math.ceil(round(self.overlap * window, 6)))
            last = -(-(size - window) // stride)
            starts.append([i * (size - window) // max(1, last) for i in range(last + 1)])
        return starts

    @cached_property
    def shares(self) -> list[Tensor]:
        """Along each axis, what every window contributes to its own voxels: (windows, window), float32."""
        shares = []
        for size, window, starts in zip(self.shape, self.window, self.starts, strict=True):
            position = torch.arange(window, dtype=torch.float64) - (window - 1) / 2
            importance = torch.exp(-0.5 * (position / (window * SIGMA_PER_WINDOW)).square())
            index = torch.tensor(starts)[:, None] + torch.arange(window)
            total = torch.zeros(size, dtype=torch.float64).index_put_(
                (index,), importance.expand(index.shape), accumulate=True
            )
            shares.append((importance / total[index]).float().to(self.device))
        return shares

    def __len__(self) -> int:
        return math.prod(map(len, self.starts))

    def __iter__(self) -> Iterator[Window]:
        for which in itertools.product(*map(range, map(len, self.starts))):
            box, weight = [], torch.ones((), device=self.device)
            for i, starts, shares, window in zip(which, self.starts, self.shares, self.window, strict=True):
                box.append(slice(starts[i], starts[i] + window))
                weight = weight[..., None] * shares[i]
            yield Window(tuple(box), weight)


def evaluate(function: Callable[[Tensor], Any], patch: Tensor, precision: str = "float32") -> Any:
    """function(patch) without gradients; "bf16" is autocast: x2 to x3.5 on a CPU with AVX512-BF16."""
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision {precision!r}", "use 'float32' or 'bf16'")
    with torch.inference_mode(), torch.autocast(patch.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return function(patch)


class QuickConv3d(nn.Conv3d):
    """A convolution in float32 that always goes through oneDNN; PyTorch has a slower way for small images.

    Padding that is not a number of zeros goes the usual way, and so does what `torch.compile` traces.
    """

    def forward(self, x: Tensor) -> Tensor:
        zeros = self.padding_mode == "zeros" and not isinstance(self.padding, str)
        usual = torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
        if usual or not zeros or x.dtype != torch.float32:
            return super().forward(x)
        settings = (self.padding, self.stride, self.dilation, self.groups)
        out: Tensor = torch.ops.aten.mkldnn_convolution(x, self.weight, self.bias, *settings)
        return out


class ExactGroupNorm(nn.GroupNorm):
    """A GroupNorm whose sums are right; PyTorch's channels-last one adds up millions of float32 and is off by 0.006."""

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 5 or x.dtype != torch.float32:
            return super().forward(x)
        samples = [self._normalised(sample) for sample in x.split(1)]
        return samples[0] if len(samples) == 1 else torch.cat(samples)

    def _normalised(self, x: Tensor) -> Tensor:
        voxels = x[0].movedim(0, -1).reshape(-1, self.num_channels)
        length = max(1, SUMMED // self.num_channels)
        runs = voxels.split(length) if len(voxels) > length else [voxels.double()]
        statistics = [torch.ops.aten.batch_norm_update_stats(run, None, None, 0.0) for run in runs]
        means, variances = (torch.stack(values).double() for values in zip(*statistics, strict=True))  # (runs, C)
        share = torch.tensor([len(run) / len(voxels) for run in runs], dtype=torch.float64)
        mean, square = share @ means, share @ (variances + means.square())
        mean, square = (v.view(self.num_groups, -1).mean(1) for v in (mean, square))
        channels = self.num_channels // self.num_groups
        mean, variance = (v.repeat_interleave(channels).float() for v in (mean, square - mean.square()))
        return F.batch_norm(x, mean, variance, self.weight, self.bias, eps=self.eps)


QUICKER: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv3d: QuickConv3d,
    Conv3d: QuickConv3d,
    nn.GroupNorm: ExactGroupNorm,
}


def ready_copy(module: Module) -> Module:
    """A copy of a module for many windows, in float32 and evaluation mode, whatever the module's own.

    On CUDA and on an x86 CPU it is channels-last, and on the CPU its layers are `QUICKER`.
    """
    copy = deepcopy(module, {id(buffer): buffer for buffer in module.buffers()})  # nothing writes to these
    copy.float().eval()
    device = device_of(copy).type
    if device == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        for layer in copy.modules():
            layer.__class__ = QUICKER.get(type(layer), type(layer))
    elif device != "cuda":
        return copy
    for weight in copy.parameters():
        if weight.ndim in CHANNELS_LAST:
            weight.data = weight.data.to(memory_format=CHANNELS_LAST[weight.ndim])
    return copy


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters lie; the CPU when it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def sliding_slabs(
    image: Tensor,
    function: Callable[[Tensor], Tensor],
    *,
    window: Sequence[int],
    overlap: float = 0.25,
    batch_size: int = 1,
    precision: str = "float32",
    empty_below: float | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """The blended result, slab after slab along the first axis, each as soon as no later window touches it.

    Args:
        image: (1, C, D, H, W), or (1, C, H, W).
        function: (B, C, *window) -> (B, K, *window), any K; runs on `device`, by default the image's.
        window, overlap: see `Windows`.
        batch_size: windows in one call of `function`.
        precision: "float32" or "bf16"; the blend is float32 either way.
        empty_below: a window whose voxels all lie below this value is not computed but taken as 0; the first one is,
            since it tells K, and all are where the whole image lies below.
        progress: called with (done, all) after each window.

    Yields: (first index along the first axis, slab (K, depth, H, W) float32). A slab is valid until the next one is
        asked for. It lies where `function` ran if that is a GPU with much free memory, else on the image's device.
    Memory: K * window[0] * H * W float32 for the blend, and what `function` takes for `batch_size` windows.
    Errors: ArgumentError for arguments that do not fit together, or a function that changes the spatial shape.
    """
    if image.ndim not in (4, 5) or len(image) != 1 or 0 in image.shape:
        raise ArgumentError(f"image of shape {tuple(image.shape)}", "give one image, (1, C, D, H, W) or (1, C, H, W)")
    if batch_size < 1:
        raise ArgumentError(f"batch_size {batch_size}", "give at least 1")
    image = image.detach()
    level = None if empty_below is None or image.amax() < empty_below else empty_below
    device = torch.device(device or image.device)
    windows = Windows(tuple(image.shape[2:]), tuple(window), overlap, device)
    home = image.device
    if _has_room(device, image.numel()):
        image = image.to(device)
    starts = [*windows.starts[0], image.shape[2]]
    row, depth = len(windows) // len(windows.starts[0]), windows.window[0]
    blend, done = torch.empty(0), 0
    for batch in _batches(image, windows, batch_size, level):
        patches = [patch for _, patch in batch if patch is not None]
        results = iter(_results(function, patches, precision, device)) if patches else iter(())
        for (box, weight), patch in batch:
            if patch is not None:
                values = next(results)
                if not done:
                    shape = (len(values), depth, *image.shape[3:])
                    blend = torch.zeros(shape, device=device if _has_room(device, math.prod(shape)) else home)
                values = values.to(blend.device).float()
                blend[(slice(None), slice(None), *box[1:])].addcmul_(values, weight.to(blend.device))
            done += 1
            if progress:
                progress(done, len(windows))
            if done % row == 0:  # all windows at this depth are in
                start, following = starts[done // row - 1 : done // row + 1]
                finished = following - start
                yield start, blend[:, :finished]
                for index in range(finished, depth):  # one slice at a time: source and target may overlap
                    blend[:, index - finished] = blend[:, index]
                blend[:, max(0, depth - finished) :] = 0


def _has_room(device: torch.device, numbers: int) -> bool:
    """Whether so many float32 are little beside what a GPU has free."""
    return device.type == "cuda" and 4 * numbers < SHARE_OF_FREE * torch.cuda.mem_get_info(device)[0]


def _batches(
    image: Tensor, windows: Windows, size: int, level: float | None
) -> Iterator[list[tuple[Window, Tensor | None]]]:
    """Windows in order with their patches, `size` of these at a time; None for the patch of an empty window."""
    batch: list[tuple[Window, Tensor | None]] = []
    full = 0
    for index, window in enumerate(windows):
        patch = image[(slice(None), slice(None), *window.box)]
        wanted = index == 0 or level is None or bool(patch.amax() >= level)
        batch.append((window, patch if wanted else None))
        full += wanted
        if full == size:
            yield batch
            batch, full = [], 0
    if batch:
        yield batch


def _results(
    function: Callable[[Tensor], Tensor], patches: list[Tensor], precision: str, device: torch.device
) -> Tensor:
    """(B, K, *window) of B patches (1, C, *window)."""
    shape = (len(patches), *patches[0].shape[1:])
    layout = CHANNELS_LAST[len(shape)] if device.type in ("cpu", "cuda") else torch.contiguous_format
    batch = torch.empty(shape, dtype=patches[0].dtype, device=device, memory_format=layout)
    for target, patch in zip(batch, patches, strict=True):
        target.copy_(patch[0])
    result: Tensor = evaluate(function, batch, precision)
    if result.shape[2:] != shape[2:] or len(result) != len(batch):
        raise ArgumentError(
            f"the function turned {shape} into {tuple(result.shape)}", "it must keep the batch and the spatial axes"
        )
    return result


def sliding_window(image: Tensor, function: Callable[[Tensor], Tensor], **settings: Any) -> Tensor:
    """The blended result as one tensor, (1, K, D, H, W) float32 on the image's device; settings of `sliding_slabs`."""
    out = torch.empty(0)
    for start, slab in sliding_slabs(image, function, **settings):
        if not start:
            out = torch.empty(1, len(slab), *image.shape[2:], device=image.device)
        out[0, :, start : start + slab.shape[1]] = slab
    return out
