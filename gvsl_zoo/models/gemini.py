"""GEMINI: a backbone, a deformer between the features of two images, and the restoration head (He et al. 2025)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..spatial import warp
from .backbone import CONV, Backbone, Features, OnBackbone, crop, initialise, is_released, pad_to_multiple
from .gvsl import GVSL, pair_features, released_warp, restoration_head
from .unet import CHANNELS_PER_GROUP, NEGATIVE_SLOPE, POOL, Layers, upsample

DEFORMER_STRIDE = 4  # voxels of the image a voxel of the deformer's coarsest level


class MutualMatching(NamedTuple):
    """What GEMINI says of a pair: both images' features, and the ways from either to the other (a fixed, b moving).

    A displacement pulls back: warp(fixed, displacement_ab) looks like the moving image, and warp(moving,
    displacement_ba) like the fixed one, as in registration.
    """

    f_fixed: Tensor  # local features, (B, C, *shape)
    f_moving: Tensor
    displacement_ab: Tensor  # (B, n, *shape), voxels
    displacement_ba: Tensor


class GEMINI(OnBackbone):
    """The whole pre-training module; `module(fixed, moving)` matches two images both ways, `restore` undoes damage.

    Args:
        backbone: gives local features; kept under the released name `unet`.
        convention: "correct", or "released" for the released code's warp (equivalence tests only), in which a zero
            displacement is not the identity.
        device, generator: as for the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        convention: str = "correct",
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.released = is_released(convention)
        self.unet = backbone
        ndim, local = backbone.ndim, backbone.num_features  # 32 channels in the released models
        flow = CONV[ndim](local, ndim, 3, padding=1, device=device)
        self.deformer = nn.Sequential(Deformer(ndim, local, device), flow)
        self.res_conv = restoration_head(ndim, local, device)
        for head in (self.deformer, self.res_conv):
            initialise(head, generator)

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]
        """`unet`, by the name that it has in other models."""
        return self.unet

    def deform(self, f_a: Tensor, f_b: Tensor) -> Tensor:
        """Displacement (B, n, *shape), voxels, by which image a comes to look like b; features (B, C, *shape)."""
        return self.deformer(torch.cat([f_a, f_b], 1)).float()

    def restore(self, image: Tensor) -> Tensor:
        """Undamaged image (B, 1, *shape) from a damaged one (B, C, *shape)."""
        return self.res_conv(self.unet(image))

    def features(self, fixed: Tensor, moving: Tensor) -> tuple[Features, Features]:
        """Features of both images (B, C, *shape), from one pass of the backbone."""
        return pair_features(self.unet, fixed, moving)

    def warp(self, moving: Tensor, displacement: Tensor, *, mode: str = "bilinear") -> Tensor:
        """`spatial.warp`, in the module's convention."""
        resample = released_warp if self.released else warp
        return resample(moving, displacement, mode=mode)

    def forward(self, fixed: Tensor, moving: Tensor) -> MutualMatching:
        """Match two images, both (B, C, *shape) in [0, 1]."""
        f_fixed, f_moving = (features.local for features in self.features(fixed, moving))
        return MutualMatching(f_fixed, f_moving, self.deform(f_fixed, f_moving), self.deform(f_moving, f_fixed))


class Deformer(nn.Module):
    """A U-Net of three levels, from the stacked features of two images (B, 2 * width, *shape) to (B, width, *shape).

    Any size: zero-padded to a multiple of 4. Concatenation is [upsampled, skip], unlike in the backbone.
    """

    def __init__(self, ndim: int, width: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.pool = POOL[ndim](2)
        self.Conv1 = OneConv(ndim, 2 * width, width, device)
        self.Conv2 = OneConv(ndim, width, 2 * width, device)
        self.Conv3 = OneConv(ndim, 2 * width, 2 * width, device)
        self.Conv4 = OneConv(ndim, 4 * width, 2 * width, device)
        self.Conv5 = OneConv(ndim, 3 * width, width, device)

    def forward(self, x: Tensor) -> Tensor:
        padded, front = pad_to_multiple(x, DEFORMER_STRIDE)
        fine = self.Conv1(padded)
        middle = self.Conv2(self.pool(fine))
        coarse = self.Conv3(self.pool(middle))
        middle = self.Conv4(torch.cat([upsample(coarse), middle], 1))
        fine = self.Conv5(torch.cat([upsample(middle), fine], 1))
        return crop(fine, front, x.shape[2:])


class OneConv(nn.Module):
    """Convolution 3 (with bias) - GroupNorm - LeakyReLU."""

    def __init__(self, ndim: int, in_chans: int, out_chans: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.one_conv = Layers(
            CONV[ndim](in_chans, out_chans, 3, padding=1, device=device),
            nn.GroupNorm(out_chans // CHANNELS_PER_GROUP or 1, out_chans, device=device),
            nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.one_conv(x)


WholeModule = GVSL | GEMINI  # a backbone with all heads of its objective
