"""GVSL: a backbone, the Z-matching head and the restoration head (He et al. 2023, sec. 3.2-3.3, app. D.3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ArgumentError
from ..spatial import affine_matrix, affine_warp, compose, identity_grid, warp
from .backbone import CONV, Backbone, Features, Linear, OnBackbone, initialise, is_released
from .unet import NEGATIVE_SLOPE, DoubleConv, Layers

CHANNELS_PER_RESTORATION_GROUP = 4  # of the restoration head's GroupNorm; released code
IDENTITY_SD = 1e-5  # of weights that give a transform: it starts at the identity (VoxelMorph, Balakrishnan et al. 2019)


class Matching(NamedTuple):
    """What GVSL says of a pair. The released convention gives the head's own flow as `displacement`."""

    warped: Tensor  # moving image on the fixed one, (B, C, *shape)
    affine: Tensor  # (B, n, n + 1), voxels about the centre
    displacement: Tensor  # (B, n, *shape), voxels: warped = warp(moving, displacement)
    restored: Tensor  # fixed image without its damage, (B, 1, *shape)


class GVSL(OnBackbone):
    """The whole pre-training module; `module(fixed, moving)` matches two images and restores the fixed one.

    Args:
        backbone: gives bottleneck and local features; kept under the released name `unet`.
        affine_width: channels inside the affine head, a multiple of 8; default half the bottleneck's, as released.
        convention: "correct", or "released" for the released code's geometry (equivalence tests only): a zero flow
            is not the identity, two resamplings, translations scaled by the wrong axis.
        device, generator: as for the backbone.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        affine_width: int | None = None,
        convention: str = "correct",
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.released = is_released(convention)
        self.unet = backbone
        ndim = backbone.ndim
        conv = CONV[ndim]
        local = backbone.num_features  # 32 in the released model
        bottleneck = backbone.feature_info[-1].channels  # 512
        hidden, middle = affine_width or bottleneck // 2, max(local // 2, 8)  # 256, 16
        # Z-matching: affine
        self.f_conv = DoubleConv(ndim, 2 * bottleneck, hidden, device)
        self.fc_rot = Linear(hidden, 3 if ndim == 3 else 1, device=device)
        self.fc_scl = Linear(hidden, ndim, device=device)
        self.fc_trans = Linear(hidden, ndim, device=device)
        self.fc_shear = Linear(hidden, ndim * (ndim - 1), device=device)
        # Z-matching: deformable
        self.sp_conv = DoubleConv(ndim, 2 * local, middle, device)
        self.out_flow = conv(middle, ndim, 3, padding=1, device=device)
        self.res_conv = restoration_head(ndim, local, device)
        for name, child in self.named_children():
            if name != "unet":
                initialise(child, generator)
        for output in (self.fc_rot, self.fc_scl, self.fc_trans, self.fc_shear, self.out_flow):
            if output.weight.is_meta:  # as `initialise` leaves it
                continue
            nn.init.normal_(output.weight, std=IDENTITY_SD, generator=generator)
            nn.init.zeros_(output.bias)  # type: ignore[arg-type]

    @property
    def backbone(self) -> Backbone:  # type: ignore[override]
        """`unet`, by the name that it has in other models."""
        return self.unet

    def affine_parameters(self, fixed: Tensor, moving: Tensor) -> Tensor:
        """Raw affine numbers, (B, 15) or (B, 7) in 2D, from the two bottlenecks (B, C, *shape / stride)."""
        pooled = self.f_conv(torch.cat([moving, fixed], 1)).flatten(2).mean(2)
        return torch.cat([fc(pooled) for fc in (self.fc_rot, self.fc_scl, self.fc_trans, self.fc_shear)], 1)

    def match(self, fixed: Features, moving: Features) -> tuple[Tensor, Tensor]:
        """Affine (B, n, n + 1) and flow (B, n, *shape) that bring the moving features onto the fixed ones."""
        affine = affine_matrix(self.affine_parameters(fixed.bottleneck, moving.bottleneck))
        align = released_affine_warp if self.released else affine_warp
        aligned = align(moving.local, affine)  # float32, contiguous
        aligned = torch.empty_like(fixed.local).copy_(aligned)  # type and memory format in one pass
        return affine, self.out_flow(self.sp_conv(torch.cat([aligned, fixed.local], 1)))

    def restore(self, image: Tensor) -> Tensor:
        """Undamaged image (B, 1, *shape) from a damaged one (B, C, *shape)."""
        return self.res_conv(self.unet(image))

    def features(self, fixed: Tensor, moving: Tensor, *, cross: bool = False) -> tuple[Features, Features]:
        """Features of both images (B, C, *shape), from one pass of the backbone; with `cross` they see each other."""
        return pair_features(self.unet, fixed, moving, cross=cross)

    def forward(self, fixed: Tensor, moving: Tensor) -> Matching:
        """Match `moving` to `fixed`, both (B, C, *shape) in [0, 1], and restore `fixed`."""
        f_fixed, f_moving = self.features(fixed, moving)
        affine, flow = self.match(f_fixed, f_moving)
        restored = self.res_conv(f_fixed.local)
        if self.released:
            return Matching(released_warp(released_affine_warp(moving, affine), flow), affine, flow, restored)
        displacement = compose(affine, flow)
        return Matching(warp(moving, displacement), affine, displacement, restored)


def restoration_head(ndim: int, local: int, device: torch.device | str | None = None) -> nn.Sequential:
    """Convolution 3 - GroupNorm - LeakyReLU - convolution 1: an image of one channel from `local` feature channels."""
    conv, middle = CONV[ndim], max(local // 2, 8)
    return Layers(
        conv(local, middle, 3, padding=1, device=device),
        nn.GroupNorm(middle // CHANNELS_PER_RESTORATION_GROUP, middle, device=device),
        nn.LeakyReLU(NEGATIVE_SLOPE, inplace=True),
        conv(middle, 1, 1, device=device),
    )


def pair_features(
    backbone: Backbone, fixed: Tensor, moving: Tensor, *, cross: bool = False
) -> tuple[Features, Features]:
    """Features of both images (B, C, *shape), from one pass of the backbone.

    cross: they see each other, which an XMorpher alone can; else each is seen as if it were alone.
    """
    if fixed.shape != moving.shape:
        raise ArgumentError(
            f"fixed image of shape {tuple(fixed.shape)} with a moving one of {tuple(moving.shape)}",
            "bring both to one grid first",
        )
    if cross:
        return backbone.forward_pair(fixed, moving)
    both = backbone.forward_features(torch.cat([fixed, moving]))
    first, second = zip(*(part.chunk(2) for part in both), strict=True)
    return Features(*first), Features(*second)


# The geometry of the released code, faults included: only the equivalence tests construct a module that uses it.


def released_affine_warp(moving: Tensor, affine: Tensor) -> Tensor:
    """Warp by an affine in normalised (x, y, z) coordinates, its translation divided by (D, H, W)."""
    sizes = affine.new_tensor(moving.shape[2:])[:, None]
    normalised = torch.cat([affine[:, :, :-1], affine[:, :, -1:] / sizes], -1)
    grid = F.affine_grid(normalised, list(moving.shape), align_corners=False)
    return F.grid_sample(moving.to(grid.dtype), grid, align_corners=False)


def released_warp(moving: Tensor, displacement: Tensor, *, mode: str = "bilinear") -> Tensor:
    """Warp that normalises for align_corners=True but samples with False: a zero flow stretches the image."""
    displacement = displacement.float()
    shape = displacement.shape[2:]
    span = displacement.new_tensor(shape).view(1, -1, *[1] * len(shape)) - 1
    unit = 2 * (identity_grid(shape, displacement) + displacement) / span - 1
    return F.grid_sample(moving, unit.flip(1).movedim(1, -1), mode=mode, align_corners=False)
