"""What a training step asks of a module: pose, damage, match, restore, and the terms of the loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..losses import (
    GEMINI_WEIGHTS,
    gemini_terms,
    local_ncc_loss,
    masked_mean,
    restoration_loss,
    smoothness_loss,
)
from ..models.backbone import Features
from ..models.gemini import GEMINI, WholeModule
from ..models.gvsl import GVSL
from ..spatial import affine_coordinates, compose, full_precision, identity_grid, warp
from .augment import apply_pose, bend, damage, moved, sample_pose
from .config import PretrainConfig
from .data import Pair, seeded

DAMAGED_SHARE = {"matching": 0.0, "gemini": 1.0}  # of pairs, by the objectives for which it is no setting
CONTRAST_POINTS = 256  # voxels of each image whose match is sought among the others
CONTRAST_TEMPERATURE = 0.1
SHIFT = 0.3  # of the crop's extent, the most that a pose of its own is shifted
MATCHED_VOXELS = 1.0  # a point's match lies nearer than this, or it has none
KNOWN = 0.99  # share from which on a place in the common anatomy counts as known
UNLIKELY, IGNORED = -1e4, -100  # logit and target of a point without a match: no shape depends on how many have one


class Batch(NamedTuple):
    """Posed pairs on the device, each tensor (B, ...).

    fixed, damaged, moving: (B, 1, *crop). anatomy_fixed, anatomy_moving: (B, n + 1, *crop), where each voxel lies in
    the common anatomy, in voxels, times a last channel, how far that is known, from 0 to 1; (B, 0, *crop) if nobody
    asks. cross: whether the images see each other. points: (B, `CONTRAST_POINTS`) int64, voxels of the fixed image
    for `contrast_loss`, or None.
    """

    fixed: Tensor
    damaged: Tensor
    moving: Tensor
    anatomy_fixed: Tensor
    anatomy_moving: Tensor
    cross: bool = False
    points: Tensor | None = None


def make_batch(pairs: list[Pair], numbers: list[int], config: PretrainConfig, device: torch.device) -> Batch:
    """Pose and damage pairs on the device; the draws of a pair are a function of the seed and its number, anywhere."""
    rows = []
    for pair, number in zip(pairs, numbers, strict=True):
        generator = seeded("cpu", config.seed, 1, number)
        images = torch.stack([moved(pair.fixed, device), moved(pair.moving, device)])  # (2, 1, *crop)
        if config.known:
            known = torch.full_like(images, float(pair.known))
            images = torch.cat([images, moved(pair.anatomy, device), known], 1)
        fixed, moving = apply_pose(images, poses(pair, config, generator, device)).split(1)
        if config.bent and float(torch.rand(1, generator=generator)) < config.bent:
            for image in (fixed, moving):
                bend(image[:, :1], generator)
        image = fixed[:, :1]
        share = DAMAGED_SHARE.get(config.objective, config.damage_share)
        damaging = float(torch.rand(1, generator=generator)) < share
        damaged = damage(image, generator) if damaging else image
        rows.append((image, damaged, moving[:, :1], fixed[:, 1:], moving[:, 1:]))
    cross = float(torch.rand(1, generator=seeded("cpu", config.seed, 4, numbers[0]))) < config.cross_share
    fixed, damaged, moving, *anatomies = (torch.cat(parts) for parts in zip(*rows, strict=True))
    points = drawn_points(numbers, config, device) if config.contrast else None
    return Batch(fixed, damaged, moving, anatomies[0], anatomies[1], cross, points)


def drawn_points(numbers: list[int], config: PretrainConfig, device: torch.device) -> Tensor:
    """For each pair as many voxels of the crop as a contrast takes, (B, `CONTRAST_POINTS`) int64."""
    voxels = math.prod(config.crop)
    generators = [seeded("cpu", config.seed, 3, number) for number in numbers]
    return moved(torch.stack([torch.randint(voxels, (CONTRAST_POINTS,), generator=g) for g in generators]), device)


def poses(pair: Pair, config: PretrainConfig, generator: torch.Generator, device: torch.device) -> Tensor:
    """One pose for both images of a pair, (1, n, *crop), or one each, (2, n, *crop), the second one shifted as well."""
    apart = pair.views or (config.apart > 0 and float(torch.rand(1, generator=generator)) < config.apart)
    drawn = sample_pose(config.crop, generator, 2 if apart else 1, device=device)
    if apart:
        shift = SHIFT * (2 * torch.rand(config.ndim, generator=generator) - 1) * torch.tensor(config.crop)
        drawn[1] += moved(shift, device).view(-1, *[1] * config.ndim)
    return drawn


def ncc_loss(warped: Tensor, fixed: Tensor, scales: int) -> Tensor:
    """Mean of the local NCC loss over resolutions, each half the one before; scalar."""
    losses = [local_ncc_loss(warped, fixed)]
    for _ in range(scales - 1):
        warped, fixed = halved(warped), halved(fixed)
        losses.append(local_ncc_loss(warped, fixed))
    return torch.stack(losses).mean()


def halved(x: Tensor) -> Tensor:
    return F.avg_pool3d(x, 2) if x.ndim == 5 else F.avg_pool2d(x, 2)


def tasks_of(model: WholeModule, config: PretrainConfig) -> list[nn.Module]:
    """What a step does one after the other, a module and an update each; all are called like `Pretraining`."""
    if isinstance(model, GEMINI):
        return [GeminiMatching(model, config), GeminiRestoration(model, config)]
    return [Pretraining(model, config)]


class Pretraining(nn.Module):
    """A whole module and its loss, as one module, so that parallel wrappers see a single forward pass.

    forward(batch) -> the terms of the loss by name, each weighted, scalar, float32: means of those of each pair alone.
    """

    def __init__(self, model: GVSL, config: PretrainConfig) -> None:
        super().__init__()
        self.model, self.config = model, config
        self.matches = config.objective != "restoration"
        self.restores = config.objective != "matching"
        outputs = (model.fc_rot, model.fc_scl, model.fc_trans, model.fc_shear)
        for heads, used in (
            ((model.f_conv, *outputs), config.objective in ("gvsl", "matching")),
            ((model.sp_conv, model.out_flow), self.matches),
            ((model.res_conv,), self.restores),
        ):
            for head in heads:
                head.requires_grad_(used)
        if not model.fc_rot.weight.requires_grad:  # an affine head that is not trained gives the identity
            for output in outputs:
                nn.init.zeros_(output.weight)
                nn.init.zeros_(output.bias)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        config, model = self.config, self.model
        terms: dict[str, Tensor] = {}
        restored: Tensor | None = None
        with torch.autocast(batch.fixed.device.type, torch.bfloat16, enabled=config.bf16):
            if not self.matches:
                restored = model.restore(batch.damaged)
            else:
                f_fixed, f_moving = model.features(batch.damaged, batch.moving, cross=batch.cross)
                affine, flow = model.match(f_fixed, f_moving)
                if self.restores:
                    restored = model.res_conv(f_fixed.local)
        if self.matches:
            displacement = compose(affine, flow)
            terms["ncc"] = config.ncc * ncc_loss(warp(batch.moving, displacement), batch.fixed, config.scales)
            terms["smoothness"] = config.smoothness * smoothness_loss(flow)
            if config.known:
                terms |= self._known_terms(batch, affine, displacement, f_fixed, f_moving)
        if restored is not None:
            terms["restoration"] = config.restoration * restoration_loss(restored, batch.fixed)
        return terms

    def _known_terms(
        self, batch: Batch, affine: Tensor, displacement: Tensor, f_fixed: Features, f_moving: Features
    ) -> dict[str, Tensor]:
        config, terms = self.config, {}
        if config.displacement:
            error = known_error(batch.anatomy_fixed, batch.anatomy_moving, displacement)
            terms["displacement"] = config.displacement * error
        if config.affine:
            shape = displacement.shape[2:]
            alone = affine_coordinates(affine, shape) - identity_grid(shape, affine)
            terms["affine"] = config.affine * known_error(batch.anatomy_fixed, batch.anatomy_moving, alone)
        if batch.points is not None:
            pairs = (f_fixed.local, f_moving.local, batch.anatomy_fixed, batch.anatomy_moving)
            terms["contrast"] = config.contrast * contrast_loss(*pairs, batch.points)
        return terms


class GeminiMatching(nn.Module):
    """The first update of GEMINI's step: two undamaged images are matched both ways.

    Its parameters are those that learn from it, of which a parallel wrapper expects all gradients.
    """

    def __init__(self, model: GEMINI, config: PretrainConfig) -> None:
        super().__init__()
        self.unet, self.deformer = model.unet, model.deformer
        self.match, self.warp, self.config = model.forward, model.warp, config

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(batch.fixed.device.type, torch.bfloat16, enabled=self.config.bf16):
            match = self.match(batch.fixed, batch.moving)
        terms = gemini_terms(batch.fixed, batch.moving, *match, resample=self.warp)._asdict()
        return {name: getattr(self.config, name) * GEMINI_WEIGHTS[name] * term for name, term in terms.items()}


class GeminiRestoration(nn.Module):
    """The second update of GEMINI's step: the first image is restored from its damaged copy."""

    def __init__(self, model: GEMINI, config: PretrainConfig) -> None:
        super().__init__()
        self.unet, self.res_conv = model.unet, model.res_conv
        self.restore, self.config = model.restore, config

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        with torch.autocast(batch.fixed.device.type, torch.bfloat16, enabled=self.config.bf16):
            restored = self.restore(batch.damaged)
        weight = self.config.restoration * GEMINI_WEIGHTS["restoration"]
        return {"restoration": weight * restoration_loss(restored, batch.fixed)}


def known_error(anatomy_fixed: Tensor, anatomy_moving: Tensor, displacement: Tensor) -> Tensor:
    """How far, in voxels, a displacement leads from the known match: mean of |error| (smooth below 1), scalar.

    A voxel x of the fixed image is matched by x + u(x) when both lie at one point of the common anatomy; so no known
    displacement has to be inverted. The mean is taken over the voxels of a pair whose match is known, of a pair without
    any it is 0, then over pairs. Args: anatomies (B, n + 1, *shape) as in Batch; displacement (B, n, *shape).
    """
    wanted, there = located(anatomy_fixed)
    found, here = located(warp(anatomy_moving, displacement))
    return masked_mean(F.smooth_l1_loss(found, wanted, reduction="none"), there & here)


def located(anatomy: Tensor) -> tuple[Tensor, Tensor]:
    """Where voxels lie in the common anatomy, (B, n, *shape), and where that is known, mask (B, 1, *shape).

    Args: an anatomy (B, n + 1, *shape) as in Batch. A voxel at the border of what is known is not drawn towards 0.
    """
    share = anatomy[:, -1:]
    return anatomy[:, :-1] / share.clamp_min(KNOWN), share > KNOWN


def contrast_loss(
    local_fixed: Tensor, local_moving: Tensor, anatomy_fixed: Tensor, anatomy_moving: Tensor, points: Tensor
) -> Tensor:
    """Dense contrast: the feature of a voxel must name its known match among those of other voxels; scalar.

    InfoNCE over some voxels of the fixed image and their nearest voxels, in the common anatomy, of the moving one; mean
    over pairs. Args: features (B, C, *shape); anatomies (B, n + 1, *shape) as in Batch; points (B, N) int64.
    """
    losses = []
    for f, m, a, b, at in zip(local_fixed, local_moving, anatomy_fixed, anatomy_moving, points, strict=True):
        f, m, a, b = f.flatten(1), m.flatten(1), a.flatten(1), b.flatten(1)
        (places, known), (others, counted) = (located(x[None]) for x in (a[:, at], b))
        nearest, matches = nearest_of(places[0], others[0], counted[0, 0])
        kept = (nearest < MATCHED_VOXELS) & known[0, 0]
        own, theirs = (F.normalize(x.float(), dim=0) for x in (f[:, at], m[:, matches]))
        logits = (own.T @ theirs / CONTRAST_TEMPERATURE).masked_fill(~(kept[:, None] & kept), UNLIKELY)
        target = torch.where(kept, torch.arange(len(kept), device=kept.device), IGNORED)
        both = [F.cross_entropy(x, target, ignore_index=IGNORED, reduction="sum") for x in (logits, logits.T)]
        losses.append((both[0] + both[1]) / (2 * kept.sum()).clamp_min(1))
    return torch.stack(losses).mean()


def nearest_of(points: Tensor, others: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Distance (N,) and number (N,) of the nearest to each point (n, N) among others (n, M), of those that count (M,).

    |p - q|^2 = |p|^2 - 2 p.q + |q|^2: one product, whose rounding is least about the middle.
    """
    middle = points.mean(1, keepdim=True)
    points, others = points - middle, others - middle
    with full_precision(others):
        squares = torch.where(counted, others.square().sum(0), torch.inf)
        least, matches = torch.addmm(squares, points.T, others, alpha=-2).min(1)
    return (least + points.square().sum(0)).clamp_min(0).sqrt(), matches
