"""Task heads on a backbone: segmentation on its dense features, classification on its pooled bottleneck."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .backbone import CONV, Backbone, Linear, OnBackbone, initialise, whole_number


class HeadedModel(OnBackbone):
    """A backbone with a head, freshly drawn, that gives `num_classes` numbers."""

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.reset_head(num_classes, device=device, generator=generator)

    def _make_head(self, num_classes: int, device: torch.device | str | None) -> nn.Module:
        raise TypeError(f"{type(self).__name__} does not say what its head is")

    def reset_head(
        self,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Put a freshly drawn head for `num_classes` in place of the present one."""
        num_classes = whole_number("num_classes", num_classes)
        if num_classes < 1:
            raise ArgumentError(f"num_classes={num_classes}", "give at least 1 (the background counts as a class)")
        reference = next(self.backbone.parameters())
        head = self._make_head(num_classes, device or reference.device).to(reference.dtype)
        initialise(head, generator)
        self.num_classes, self.head = num_classes, head


class SegmentationModel(HeadedModel):
    """Logits a voxel: one convolution 3 on the dense features (He et al. 2023, sec. 4.1)."""

    def _make_head(self, num_classes: int, device: torch.device | str | None) -> nn.Module:
        return CONV[self.backbone.ndim](self.backbone.num_features, num_classes, 3, padding=1, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes, *spatial) of x (B, C, *spatial)."""
        return self.head(self.backbone(x))


class ClassificationModel(HeadedModel):
    """Logits an image: global average pool of the bottleneck, then a linear layer (He et al. 2023, sec. 4.1)."""

    def _make_head(self, num_classes: int, device: torch.device | str | None) -> nn.Module:
        return Linear(self.backbone.feature_info[-1].channels, num_classes, device=device)

    def _last_level(self) -> int:
        return self.backbone.encoder_levels - 1

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of x (B, C, *spatial)."""
        [bottleneck] = self.backbone.forward_intermediates(x, [-1])
        return self.head(bottleneck.flatten(2).mean(2))
