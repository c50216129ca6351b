"""Task heads on a backbone: segmentation on its dense features, classification on its pooled bottleneck."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .backbone import CONV, Backbone, Linear, initialise


class HeadedModel(nn.Module):
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

    def _last_level(self) -> int:
        """Index of the backbone's level that the head sees."""
        return len(self.backbone.levels) - 1

    def reset_head(
        self,
        num_classes: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Put a freshly drawn head for `num_classes` in place of the present one."""
        if int(num_classes) != num_classes or num_classes < 1:
            raise ArgumentError(
                f"num_classes={num_classes}", "give at least 1, a whole number (the background counts as a class)"
            )
        reference = next(self.backbone.parameters())
        self.num_classes = num_classes
        self.head = self._make_head(num_classes, device or reference.device).to(reference.dtype)
        initialise(self.head, generator)

    def parameter_groups(self, lr: float, layer_decay: float = 1.0) -> list[dict]:
        """The backbone's groups with rates falling towards its input, and the head at `lr`."""
        head = {"params": list(self.head.parameters()), "lr": lr, "name": "head"}
        return [*self.backbone.parameter_groups(lr * layer_decay, layer_decay, self._last_level()), head]


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
