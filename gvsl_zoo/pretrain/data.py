"""Pairs to match: synthetic subjects, and crops of real scans that show the same region."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ArgumentError
from ..volume import CT_WINDOW_HU
from .anatomy import sample_subject

POSITION_JITTER = 0.05  # of the scan's extent: crops of a pair are alike, not aligned


@dataclass(frozen=True)
class Scan:
    """One scan on the training grid: image (1, D, H, W) in [0, 1], and which scans it may be paired with."""

    image: Tensor
    region: str


@dataclass(frozen=True)
class SyntheticPairs:
    """Pairs of different synthetic subjects, drawn anew each time."""

    crop: tuple[int, int, int]
    spacing_mm: float

    def draw(self, generator: torch.Generator, variation: float = 1.0) -> tuple[Tensor, Tensor]:
        """Fixed and moving image, each (1, D, H, W) in [0, 1]; `variation` as in `sample_subject`."""
        return self._subject(generator, variation), self._subject(generator, variation)

    def _subject(self, generator: torch.Generator, variation: float) -> Tensor:
        low, high = CT_WINDOW_HU
        hu = sample_subject(self.crop, generator, (self.spacing_mm,) * 3, variation).hu
        return ((hu - low) / (high - low)).clamp(0, 1)[None]


class ScanPairs:
    """Crops at about the same relative place of two different scans of one region."""

    def __init__(self, scans: Sequence[Scan], crop: tuple[int, int, int]) -> None:
        regions: dict[str, list[Tensor]] = {}
        for scan in scans:
            regions.setdefault(scan.region, []).append(scan.image)
        self.groups = [images for images in regions.values() if len(images) > 1]
        if not self.groups:
            raise ArgumentError(f"{len(scans)} scans, no two of one region", "pairs need different subjects")
        self.crop = crop

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fixed and moving image, each (1, D, H, W) in [0, 1]."""
        sizes = torch.tensor([float(len(group)) for group in self.groups])
        group = self.groups[int(torch.multinomial(sizes, 1, generator=generator))]
        first, second = torch.randperm(len(group), generator=generator)[:2].tolist()
        place = torch.rand(3, generator=generator)
        return self._crop(group[first], place, generator), self._crop(group[second], place, generator)

    def _crop(self, image: Tensor, place: Tensor, generator: torch.Generator) -> Tensor:
        """The crop at relative `place` of the free play of each axis, air where the scan ends."""
        missing = [max(0, c - s) for c, s in zip(self.crop, image.shape[1:], strict=True)]
        image = F.pad(image, [n for m in reversed(missing) for n in (m // 2, m - m // 2)])
        jitter = (2 * torch.rand(3, generator=generator) - 1) * POSITION_JITTER
        for axis, (size, share) in enumerate(zip(self.crop, (place + jitter).clamp(0, 1).tolist(), strict=True), 1):
            image = image.narrow(axis, round(share * (image.shape[axis] - size)), size)
        return image
