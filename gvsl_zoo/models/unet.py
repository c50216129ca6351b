"""U-Net of GVSL and GEMINI, 2D and 3D, any width (He et al. 2023, sec. 4.1 and released code)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..errors import ArgumentError
from .backbone import CHANNELS_LAST, CONV, Backbone, FeatureInfo, FeatureLevel, initialise, whole_number

CHANNELS_PER_GROUP = 8  # of every GroupNorm
NEGATIVE_SLOPE = 0.2
POOL = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
FUSED = (torch.float32, torch.bfloat16, torch.float16)  # types of which fused.py makes a norm and its activation one


class Layers(nn.Sequential):
    """Layers one after the other; on CUDA a GroupNorm and the LeakyReLU behind it are one (see fused.py)."""

    def forward(self, x: Tensor) -> Tensor:
        left = list(self)
        while left:
            layer, following = left.pop(0), left[0] if left else None
            if (
                isinstance(layer, nn.GroupNorm)
                and isinstance(following, nn.LeakyReLU)
                and _may_fuse(layer, following, x)
            ):
                from .fused import norm_leaky

                left.pop(0)
                x = norm_leaky(x, layer.weight, layer.bias, layer.num_groups, layer.eps, following.negative_slope)
            else:
                x = layer(x)
        return x


def _may_fuse(norm: nn.GroupNorm, leaky: nn.LeakyReLU, x: Tensor) -> bool:
    """Whether the two can be one and nobody would see it: not a hook, a tracer, a transform or a derivative forward."""
    if not x.is_cuda or x.ndim not in CHANNELS_LAST or x.dtype not in FUSED or norm.weight is None or 0 in x.shape:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if torch._C._len_torch_dispatch_stack() or forward_ad._current_level >= 0:  # tensors without memory; duals
        return False
    hooked = any(
        layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
        for layer in (norm, leaky)
    )
    return not hooked and type(norm) is nn.GroupNorm and type(leaky) is nn.LeakyReLU and has_triton()


@cache
def has_triton() -> bool:
    """Whether kernels can be compiled for this GPU, tried once: Triton, which PyTorch brings on Linux, wants a C
    compiler and Python's headers too.
    """
    if find_spec("triton") is None or torch.cuda.get_device_capability() < (7, 0):
        return False
    try:
        from .fused import norm_leaky

        one = torch.ones(8, device="cuda")
        norm_leaky(one.view(1, 8, 1, 1), one, one, 1, 1e-5, NEGATIVE_SLOPE)
    except Exception as error:  # of Triton, of the compiler it calls, or of the folder it writes to
        warnings.warn(f"Triton does not work here, PyTorch's own kernels are used: {error}", stacklevel=2)
        return False
    return True


class DoubleConv(nn.Module):
    """Twice: convolution 3 (with bias) - GroupNorm - LeakyReLU."""

    def __init__(self, ndim: int, in_chans: int, out_chans: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for chans in (in_chans, out_chans):
            layers += [
                CONV[ndim](chans, out_chans, 3, padding=1, device=device),
                nn.GroupNorm(math.gcd(out_chans, out_chans // CHANNELS_PER_GROUP or 1), out_chans, device=device),
                nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
            ]
        self.double_conv = Layers(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.double_conv(x)


class Down(nn.Module):
    """Max-pool by 2, then a double convolution."""

    def __init__(self, ndim: int, in_chans: int, out_chans: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.maxpool_conv = nn.Sequential(POOL[ndim](2), DoubleConv(ndim, in_chans, out_chans, device))

    def forward(self, x: Tensor) -> Tensor:
        return self.maxpool_conv(x)


class _Upsample3d(torch.autograd.Function):
    """Trilinear upsampling by 2, whose gradient is a product with a small matrix an axis: several times faster than
    PyTorch's, in the channels-last memory that the gradient comes in. On CUDA the values are such products too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        if x.is_cuda:
            return _along_axes(x, [_linear(size, x).T for size in x.shape[2:]])
        return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.shape = inputs[0].shape

    @staticmethod
    def jvp(ctx: Any, x: Tensor) -> Tensor:
        return _Upsample3d.forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _along_axes(grad, [_linear(size, grad) for size in ctx.shape[2:]])


def _along_axes(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """x (B, C, D, H, W) times a matrix (new, old) along each spatial axis: of the type of x, channels-last."""
    B, C, D, H, W = x.shape
    exact = x.dtype if x.device.type == "cpu" else torch.promote_types(x.dtype, torch.float32)
    z, y, w = (matrix.to(exact) for matrix in matrices)
    with torch.autocast(x.device.type, enabled=False):
        out = w @ x.movedim(1, -1).reshape(-1, W, C).to(exact)
        out = y @ out.view(-1, H, len(w) * C)
        out = z @ out.view(-1, D, len(y) * len(w) * C)
    return out.view(B, len(z), len(y), len(w), C).movedim(-1, 1).to(x.dtype)


def _linear(size: int, like: Tensor) -> Tensor:
    """What each of `size` voxels gives to the upsampled ones along its axis, (size, 2 * size), in float32 at least."""
    eye = torch.eye(size, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return F.interpolate(eye[None], scale_factor=2, mode="linear", align_corners=True)[0]


def upsample(x: Tensor) -> Tensor:
    """Linear upsampling by 2 of x (B, C, *shape), corners aligned in 3D but not in 2D: as the released models do."""
    if x.ndim == 4:
        return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if not tracing and (x.is_cuda or (x.device.type == "cpu" and x.requires_grad and torch.is_grad_enabled())):
        return _Upsample3d.apply(x)
    return F.interpolate(x, scale_factor=2, mode="trilinear", align_corners=True)


class Up(nn.Module):
    """Linear upsampling by 2, concatenation [skip, upsampled], then a double convolution."""

    def __init__(self, ndim: int, in_chans: int, out_chans: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.conv = DoubleConv(ndim, in_chans, out_chans, device)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.conv(torch.cat([skip, upsample(x)], 1))


class UNet(Backbone):
    """Five encoder levels (width x 1, 2, 4, 8, 16) and four decoder levels; 32 is the released width.

    Args:
        ndim: 2 or 3 spatial axes.
        width: channels of the full-resolution level, a multiple of 8.
        in_chans: image channels.
        decoder: False builds the encoder only, which serves `forward_intermediates`.
        device: where the parameters are made; on "meta" nothing is drawn.
        generator: source of the initial weights; default PyTorch's global one.

    Tensor names are those of the released weights.
    """

    stride = multiple = 16
    input_weight = "inc.double_conv.0.weight"
    encoder_levels = 5

    def __init__(
        self,
        ndim: int = 3,
        width: int = 32,
        in_chans: int = 1,
        *,
        decoder: bool = True,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        ndim, width = whole_number("ndim", ndim), whole_number("width", width)
        in_chans = whole_number("in_chans", in_chans)
        if ndim not in CONV or width < 8 or width % 8 or in_chans < 1:
            raise ArgumentError(
                f"no U-Net with ndim={ndim}, width={width}, in_chans={in_chans}",
                "ndim is 2 or 3, width a multiple of 8, in_chans at least 1",
            )
        self.ndim, self.width, self.in_chans = ndim, width, in_chans
        w1, w2, w4, w8, w16 = (width * k for k in (1, 2, 4, 8, 16))
        self.inc = DoubleConv(ndim, in_chans, w1, device)
        self.down1 = Down(ndim, w1, w2, device)
        self.down2 = Down(ndim, w2, w4, device)
        self.down3 = Down(ndim, w4, w8, device)
        self.down4 = Down(ndim, w8, w16, device)
        table = [("inc", w1, 1), ("down1", w2, 2), ("down2", w4, 4), ("down3", w8, 8), ("down4", w16, 16)]
        if decoder:
            self.up1 = Up(ndim, w16 + w8, w8, device)
            self.up2 = Up(ndim, w8 + w4, w4, device)
            self.up3 = Up(ndim, w4 + w2, w2, device)
            self.up4 = Up(ndim, w2 + w1, w1, device)
            table += [("up1", w8, 8), ("up2", w4, 4), ("up3", w2, 2), ("up4", w1, 1)]
        self.levels = FeatureInfo(FeatureLevel(*row) for row in table)
        initialise(self, generator)

    def _maps(self, x: Tensor, last: int) -> list[Tensor]:
        maps: list[Tensor] = []
        for i, level in enumerate(self.levels[: last + 1]):
            inputs: Sequence[Tensor] = (maps[-1],) if maps else (x,)
            if i >= self.encoder_levels:
                inputs = (maps[-1], maps[2 * (self.encoder_levels - 1) - i])  # the skip of the same size
            maps.append(self._run(self.get_submodule(level.module), *inputs))
        return maps
