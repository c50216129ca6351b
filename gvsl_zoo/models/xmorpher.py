"""XMorpher: a full transformer whose windows attend to those of a second image, 2D and 3D (Shi et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..errors import ArgumentError
from .backbone import (
    CONV,
    CONV_TRANSPOSE,
    Backbone,
    FeatureInfo,
    FeatureLevel,
    Features,
    Linear,
    initialise,
    is_released,
    whole_number,
)

PATCH = 4  # voxels of a token along an axis of the image
HEAD_WIDTH = 16
MLP_RATIO = 4
DEPTHS = (2, 2, 6, 2)  # blocks of the encoder's stages; the decoder mirrors them
DROP_PATH = 0.2  # of the last block of the encoder; linear from 0; the decoder's stages have their twin's rates
GATHERED = 2**20  # numbers of keys and values laid side by side at once on the CPU: what its caches hold
WINDOWS = 2**15  # attended to at once elsewhere: a CUDA kernel's grid takes fewer than 2^16


# --- Tokens and windows: tokens are (B, *shape, C), in windows (B, n, T, C) with n windows of T tokens ---------------


def to_windows(x: Tensor, window: Sequence[int]) -> Tensor:
    """Tokens (B, *shape, C), zero-padded at the far end to whole windows, in windows (B, n, T, C)."""
    B, *shape, C = x.shape
    counts = [-(-size // w) for size, w in zip(shape, window, strict=True)]
    missing = [count * w - size for count, w, size in zip(counts, window, shape, strict=True)]
    if any(missing):
        x = F.pad(x, [0, 0, *(side for m in reversed(missing) for side in (0, m))])
    x = x.reshape(B, *(n for pair in zip(counts, window, strict=True) for n in pair), C)
    axes = 2 * len(shape)
    return x.permute(0, *range(1, axes, 2), *range(2, axes + 1, 2), -1).reshape(B, math.prod(counts), -1, C)


def from_windows(x: Tensor, window: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Tokens (B, *shape, C) of windows (B, n, T, C), without the padding."""
    counts = [-(-size // w) for size, w in zip(shape, window, strict=True)]
    padded = [count * w for count, w in zip(counts, window, strict=True)]
    ndim = len(counts)
    x = x.reshape(len(x), *counts, *window, x.shape[-1])
    x = x.permute(0, *(axis for i in range(1, ndim + 1) for axis in (i, i + ndim)), -1).reshape(len(x), *padded, -1)
    return x[(slice(None), *(slice(size) for size in shape))]


class Neighbours(NamedTuple):
    """The windows around each window, itself included, of a batch of B images with n windows each.

    windows: their numbers in the batch, (B * n, 3^ndim), row by row; for one outside the image, the nearest inside.
    inside: whether each of their tokens lies in the image, (B * n, 3^ndim * T) bool.
    mask: the same as what is added to an attention's logits, (B * n, 1, 1, 3^ndim * T): 0 or -inf.
    """

    windows: Tensor
    inside: Tensor
    mask: Tensor


def neighbours(
    batch: int, shape: Sequence[int], window: Sequence[int], cross: bool, device: torch.device
) -> Neighbours:
    """The neighbours in images of `shape` tokens: in each image itself, or with `cross` in its partner, the image half
    a batch away.
    """
    ndim = len(shape)
    index = torch.zeros([1] * 2 * ndim, dtype=torch.long, device=device)
    inside = torch.ones([1] * 3 * ndim, dtype=torch.bool, device=device)
    for axis, (size, w) in enumerate(zip(shape, window, strict=True)):
        count = -(-size // w)
        near = torch.arange(count, device=device)[:, None] + torch.arange(-1, 2, device=device)  # (count, 3)
        place = near[..., None] * w + torch.arange(w, device=device)  # (count, 3, w)
        lengths = [1] * 3 * ndim
        lengths[axis], lengths[ndim + axis], lengths[2 * ndim + axis] = count, 3, w
        index = index * count + near.clamp(0, count - 1).view(lengths[: 2 * ndim])
        inside = inside & ((place >= 0) & (place < size)).view(lengths)
    index = index.reshape(-1, 3**ndim)
    n = len(index)
    first = torch.arange(batch, device=device).roll(batch // 2 if cross else 0) * n  # window of the image looked at
    index = (first[:, None, None] + index).view(batch * n, -1)
    inside = inside.reshape(n, -1).repeat(batch, 1)
    mask = torch.zeros(inside.shape, device=device).masked_fill_(~inside, -torch.inf)
    return Neighbours(index, inside, mask[:, None, None])


# --- Attention --------------------------------------------------------------------------------------------------------


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Queries q (n, T, C) attend to keys k and values v (n, S, C), in heads of 16: (n, T, C)."""
    shape, mask = q.shape, None if mask is None else mask.to(q.dtype)
    q, k, v = (t.view(*t.shape[:2], -1, HEAD_WIDTH).transpose(1, 2) for t in (q, k, v))  # (n, heads, T or S, 16)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(shape)


def gathered(x: Tensor, windows: Tensor, space: Tensor | None = None) -> Tensor:
    """The tokens (n, S, C) of `windows` (n, 3^ndim) side by side, out of those of all, x (N, T, C); laid in `space`."""
    places = windows.flatten()
    space = None if space is None else space[: len(places)]
    return torch.index_select(x.flatten(1), 0, places, out=space).view(len(windows), -1, x.shape[-1])


def _parts(x: Tensor, windows: Tensor) -> tuple[list[slice], Tensor, Tensor]:
    """Slices of windows whose keys and values are gathered at once; and space for both, because fresh memory costs more
    than the copy.
    """
    (n, around), numbers = windows.shape, x[0].numel()
    step = min(n, max(1, GATHERED // (2 * around * numbers)) if x.device.type == "cpu" else WINDOWS)
    return [slice(i, i + step) for i in range(0, n, step)], *x.new_empty((2, step * around, numbers))


class _WindowAttention(torch.autograd.Function):
    """Attention to the windows around, which keeps no gathered copy: each key is in 3^ndim of them.

    The backward pass gathers again, a part at a time, and sums in float32. On a CPU it works in float32 altogether:
    there PyTorch's backward pass of attention in bf16 is ten times slower. It has no second derivative, no forward AD,
    and nothing of `torch.func`.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, windows: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v, windows, mask)
        out = torch.empty_like(q)
        parts, *spaces = _parts(k, windows)
        for part in parts:
            near_k, near_v = (gathered(x, windows[part], space) for x, space in zip((k, v), spaces, strict=True))
            out[part] = attend(q[part], near_k, near_v, mask[part])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, windows, mask = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        kind = wide if q.device.type == "cpu" else q.dtype
        grad_q, (grad_k, grad_v) = torch.empty_like(q), k.new_zeros((2, len(k), k[0].numel()), dtype=wide)
        parts, *spaces = _parts(k, windows)
        for part in parts:
            near = (gathered(x, windows[part], space) for x, space in zip((k, v), spaces, strict=True))
            queries, near_k, near_v = (x.to(kind).detach().requires_grad_() for x in (q[part], *near))
            with torch.enable_grad():
                out = attend(queries, near_k, near_v, mask[part])
            grad_q[part], *of_near = torch.autograd.grad(out, (queries, near_k, near_v), grad[part].to(kind))
            for total, of in zip((grad_k, grad_v), of_near, strict=True):
                total.index_add_(0, windows[part].flatten(), of.reshape(-1, total.shape[1]).to(wide))
        return grad_q, grad_k.to(k).view_as(k), grad_v.to(v).view_as(v), None, None


class CrossAttention(nn.Module):
    """Queries from the windows of one image; keys and values from the windows around, of the same or another image."""

    def __init__(self, width: int, released: bool, device: torch.device | str | None) -> None:
        super().__init__()
        self.released = released
        self.q = Linear(width, width, device=device)
        self.kv = Linear(width, 2 * width, device=device)
        self.proj = Linear(width, width, device=device)

    def forward(self, x: Tensor, y: Tensor, near: Neighbours) -> Tensor:
        """What x finds in y, both (B, n, T, C)."""
        q, k, v = (t.flatten(0, 1).contiguous() for t in (self.q(x), *self.kv(y).chunk(2, -1)))  # (B * n, T, C)
        if self.released:
            near_k, near_v = (
                torch.where(near.inside[..., None], gathered(t, near.windows), bias)
                for t, bias in zip((k, v), self.kv.bias.chunk(2), strict=True)
            )
            out = attend(q, near_k, near_v, None)
        elif torch.compiler.is_compiling() or torch.jit.is_tracing():
            out = attend(q, gathered(k, near.windows), gathered(v, near.windows), near.mask)
        else:
            out = _WindowAttention.apply(q, k, v, near.windows, near.mask)
        return self.proj(out.view_as(x))


class Mlp(nn.Module):
    """Two linear layers with a GELU between them, on each token alone."""

    def __init__(self, width: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.fc1 = Linear(width, MLP_RATIO * width, device=device)
        self.fc2 = Linear(MLP_RATIO * width, width, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Attention to the windows around and an MLP, each behind a LayerNorm and beside a short cut.

    drop_path: probability, in training, that an image passes either by the short cut alone (Huang et al. 2016).
    """

    def __init__(self, width: int, drop_path: float, released: bool, device: torch.device | str | None) -> None:
        super().__init__()
        self.drop_path, self.released = drop_path, released
        self.norm1 = nn.LayerNorm(width, device=device)
        self.cross_attn = CrossAttention(width, released, device)
        self.norm2 = nn.LayerNorm(width, device=device)
        self.mlp = Mlp(width, device)

    def forward(self, x: Tensor, near: Neighbours) -> Tensor:
        normed = self.norm1(x)
        x = x + self._kept(self.cross_attn(normed, x if self.released else normed, near))
        return x + self._kept(self.mlp(self.norm2(x)))

    def _kept(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_path:
            return x
        kept = x.new_empty((len(x), *[1] * (x.ndim - 1))).bernoulli_(1 - self.drop_path)
        return x * (kept / (1 - self.drop_path))


# --- Between the stages: convolutions whose stride is their kernel, as products of matrices ---------------------------


def merge(conv: nn.Conv2d | nn.Conv3d, x: Tensor) -> Tensor:
    """The convolution of tokens (B, *shape, C), padded at the far end: (B, *ceil(shape / kernel), C')."""
    counts = [-(-size // k) for size, k in zip(x.shape[1:-1], conv.kernel_size, strict=True)]
    blocks = to_windows(x, conv.kernel_size).flatten(2)  # (B, n, kernel^ndim * C)
    merged = F.linear(blocks, conv.weight.movedim(1, -1).flatten(1), conv.bias)
    return merged.view(len(x), *counts, -1)


def expand(conv: nn.ConvTranspose2d | nn.ConvTranspose3d, x: Tensor) -> Tensor:
    """The transposed convolution of tokens (B, *shape, C): (B, *(shape * kernel), C')."""
    voxels = math.prod(conv.kernel_size)
    assert conv.bias is not None
    weight = conv.weight.movedim(1, -1).flatten(1).T  # (kernel^ndim * C', C)
    blocks = F.linear(x, weight, conv.bias.repeat(voxels)).view(len(x), -1, voxels, conv.out_channels)
    shape = [size * k for size, k in zip(x.shape[1:-1], conv.kernel_size, strict=True)]
    return from_windows(blocks, conv.kernel_size, shape)


class PatchEmbedding(nn.Module):
    """A token of each block of 4 voxels an axis."""

    def __init__(self, ndim: int, in_chans: int, width: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.proj = CONV[ndim](in_chans, width, PATCH, stride=PATCH, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, *shape / 4, C) of an image (B, in_chans, *shape)."""
        return merge(self.proj, x.movedim(1, -1))


class Merging(nn.Module):
    """Half as many tokens along an axis, of twice the width."""

    def __init__(self, ndim: int, width: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.down_conv = CONV[ndim](width, 2 * width, 2, stride=2, device=device)
        self.norm = nn.LayerNorm(2 * width, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(merge(self.down_conv, x))


class Expansion(nn.Module):
    """Twice as many tokens along an axis, of half the width."""

    def __init__(self, ndim: int, width: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.up_conv = CONV_TRANSPOSE[ndim](width, width // 2, 2, stride=2, device=device)
        self.norm = nn.LayerNorm(width // 2, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(expand(self.up_conv, x))


class Local(nn.Module):
    """Features of every voxel from those of its token."""

    def __init__(self, ndim: int, width: int, channels: int, device: torch.device | str | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, device=device)
        self.conv = CONV_TRANSPOSE[ndim](width, channels, PATCH, stride=PATCH, device=device)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if torch.is_grad_enabled() and not torch.jit.is_tracing():
            return expand(self.conv, x)
        return self.conv(x.movedim(-1, 1)).movedim(1, -1)  # half the memory, but a slow backward pass


class Stage(nn.Module):
    """Blocks at one resolution, and what leads to the next one (`downsample` as released, in the decoder too)."""

    def __init__(
        self,
        window: int,
        width: int,
        drop_path: Sequence[float],
        downsample: nn.Module | None,
        released: bool,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        self.window, self.released = window, released
        self.blocks = nn.ModuleList(Block(width, rate, released, device) for rate in drop_path)
        self.downsample = downsample

    def forward(self, x: Tensor, cross: bool) -> Tensor:
        """Tokens (B, *shape, C); with `cross` an image attends to the one half a batch away, else to itself."""
        shape = x.shape[1:-1]
        window = [min(self.window, size) for size in shape]
        near = neighbours(len(x), shape, window, cross, x.device)
        if self.released:
            near = released_neighbours(near)
        first: Any = self.blocks[0]  # a replica of nn.DataParallel has no parameters()
        x = to_windows(x.to(first.norm1.weight.dtype), window)  # under autocast sums stay in float32
        for block in self.blocks:
            x = block(x, near)
        return from_windows(x, window, shape)


# --- The backbone -----------------------------------------------------------------------------------------------------


class XMorpher(Backbone):
    """Four encoder stages (width x 1, 2, 4, 8; tokens of 4, 8, 16, 32 voxels an axis) and four decoder stages.

    An image alone attends to itself, as the released network does when it is given twice: one stream is computed.
    `torch.compile` takes it with `dynamic=False`: it reasons for minutes about sizes that it does not know.

    Args:
        ndim: 2 or 3 spatial axes.
        width: channels of the first stage, a multiple of 16 (the width of a head); 48 is the released one. The local
            features have two thirds of it, in steps of 8: 8 at 16, 16 at 32, 32 at 48 as the U-Net.
        in_chans: image channels.
        window: tokens an axis whose queries attend together, to the 3^ndim windows around.
        decoder: False builds the encoder only, which serves `forward_intermediates`.
        convention: "correct", or "released" for the faults of the released code (equivalence tests only): one neighbour
            of 27 and what lies outside the image count as zeros, and keys and values are not normalised.
        device: where the parameters are made; on "meta" nothing is drawn.
        generator: source of the initial weights; default PyTorch's global one.

    Tensor names are those of the released weights, but for `local`, which stands for its joint tail of two images.
    """

    stride = 32
    multiple = PATCH
    centred = False
    input_weight = "patch_embed.proj.weight"
    encoder_levels = 4

    def __init__(
        self,
        ndim: int = 3,
        width: int = 48,
        in_chans: int = 1,
        *,
        window: int = 2,
        decoder: bool = True,
        convention: str = "correct",
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        ndim, width = whole_number("ndim", ndim), whole_number("width", width)
        in_chans, window = whole_number("in_chans", in_chans), whole_number("window", window)
        if ndim not in CONV or width < HEAD_WIDTH or width % HEAD_WIDTH or in_chans < 1 or window < 1:
            raise ArgumentError(
                f"no XMorpher with ndim={ndim}, width={width}, in_chans={in_chans}, window={window}",
                "ndim is 2 or 3, width a multiple of 16, in_chans and window at least 1",
            )
        released = is_released(convention)
        self.ndim, self.width, self.in_chans, self.window = ndim, width, in_chans, window
        widths = [width * 2**i for i in range(4)]
        rates = [DROP_PATH * i / (sum(DEPTHS) - 1) for i in range(sum(DEPTHS))]
        slices = [rates[sum(DEPTHS[:i]) : sum(DEPTHS[: i + 1])] for i in range(4)]
        self.patch_embed = PatchEmbedding(ndim, in_chans, width, device)
        self.layers = nn.ModuleList(
            Stage(window, w, slices[i], Merging(ndim, w, device) if i < 3 else None, released, device)
            for i, w in enumerate(widths)
        )
        self.norm = nn.LayerNorm(widths[3], device=device)
        beside = [("patch_embed",), ("layers.0.downsample",), ("layers.1.downsample",), ("layers.2.downsample", "norm")]
        levels = [FeatureLevel(f"layers.{i}", w, PATCH * 2**i, beside[i]) for i, w in enumerate(widths)]
        if decoder:
            self.up_layers = nn.ModuleList(
                Stage(window, w, slices[i], Expansion(ndim, w, device) if i > 0 else None, released, device)
                for i, w in reversed(list(enumerate(widths)))
            )
            self.concat_back_dim = nn.ModuleDict(
                {str(k): Linear(2 * widths[3 - k], widths[3 - k], device=device) for k in (1, 2, 3)}
            )
            channels = width * 2 // 3 // 8 * 8
            self.local = Local(ndim, width, channels, device)
            beside = [(), *((f"up_layers.{k - 1}.downsample", f"concat_back_dim.{k}") for k in (1, 2, 3))]
            levels += [FeatureLevel(f"up_layers.{k}", widths[3 - k], PATCH * 2 ** (3 - k), beside[k]) for k in range(4)]
            levels.append(FeatureLevel("local", channels, 1))
        self.levels = FeatureInfo(levels)
        initialise(self, generator)

    def forward_pair(self, first: Tensor, second: Tensor) -> tuple[Features, Features]:
        """Features of two images (B, C, *spatial), each of which attends to the other."""
        if first.shape != second.shape:
            shapes = f"{tuple(first.shape)} and {tuple(second.shape)}"
            raise ArgumentError(f"a pair of images of shape {shapes}", "bring both to one grid first")
        bottleneck, local = self._features(torch.cat([first, second]), cross=True)
        (bottleneck_first, bottleneck_second), (local_first, local_second) = bottleneck.chunk(2), local.chunk(2)
        return Features(bottleneck_first, local_first), Features(bottleneck_second, local_second)

    def _maps(self, x: Tensor, last: int, *, cross: bool = False) -> list[Tensor]:
        return [tokens.movedim(-1, 1) for tokens in self._tokens(x, last, cross)]

    def _tokens(self, x: Tensor, last: int, cross: bool) -> list[Tensor]:
        """Feature maps 0..last of a padded input, (B, *shape, C)."""
        maps: list[Tensor] = []
        for i in range(min(last, 3) + 1):
            tokens = self.get_submodule(f"layers.{i - 1}.downsample")(maps[-1]) if i else self.patch_embed(x)
            maps.append(self._run(self.layers[i], tokens, cross))
        if last >= 3:
            maps[3] = self.norm(maps[3])
        for k in range(min(last, 7) - 3):
            tokens = maps[-1]
            if k:
                skip = maps[3 - k]
                larger = resize(self.get_submodule(f"up_layers.{k - 1}.downsample")(tokens), skip.shape[1:-1])
                tokens = self.concat_back_dim[str(k)](torch.cat([larger, skip], -1))
            maps.append(self._run(self.up_layers[k], tokens, cross))
        if last == 8:
            maps.append(self.local(maps[-1]))
        return maps


def resize(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Tokens (B, *any, C) linearly resized to `shape`, corners aligned, where they have another."""
    if list(x.shape[1:-1]) == list(shape):
        return x
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    return F.interpolate(x.movedim(-1, 1), list(shape), mode=mode, align_corners=True).movedim(1, -1)


# The released network and its faults: only the equivalence tests construct it.


def released_neighbours(near: Neighbours) -> Neighbours:
    """Neighbours of which number 20, (1, -1, 1) in 3D, is never there."""
    inside = near.inside.view(*near.windows.shape, -1).clone()
    inside[:, 20:21] = False
    return near._replace(inside=inside.flatten(1))


class ReleasedXMorpher(nn.Module):
    """The released 3D registration network: both streams joined, then a flow. One of its layers is never used."""

    def __init__(self, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.swin = XMorpher(convention="released", device=device)
        del self.swin.local
        self.swin.concat_back_dim["0"] = Linear(768, 384, device=device)
        self.swin.norm2 = nn.LayerNorm(96, device=device)
        self.swin.reverse_patch_embedding = CONV_TRANSPOSE[3](96, 24, PATCH, stride=PATCH, device=device)
        self.out_conv = CONV[3](24, 3, 3, padding=1, device=device)

    def forward(self, moving: Tensor, fixed: Tensor) -> tuple[Tensor, Tensor]:
        """Joint features (B, 24, D, H, W) and flow (B, 3, D, H, W) of images (B, 1, D, H, W), a multiple of 4."""
        tokens = self.swin._tokens(torch.cat([moving, fixed]), 7, cross=True)[7]
        both = self.swin.get_submodule("norm2")(torch.cat(tokens.chunk(2), -1))
        joint = self.swin.get_submodule("reverse_patch_embedding")(both.movedim(-1, 1))
        return joint, self.out_conv(joint)
