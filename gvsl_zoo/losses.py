"""Losses: of GVSL local NCC, smoothness, restoration (He et al. 2023); GEMINI's terms (2025); of segmentation Dice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError
from .spatial import full_precision, warp

STABILISER = 1e-5  # added to the product of the two window variances; released code
ROUNDINGS = 8.0  # machine epsilons of the sums that a window's variance is the difference of: less is rounding
GEMINI_WEIGHTS = {"ncc": 1.0, "smoothness": 0.4, "deformation": 0.8, "positive": 0.08, "restoration": 100.0}  # paper's


def box_sum(x: Tensor, window: int) -> Tensor:
    """Sum of x (B, C, *shape) over a centred window of `window` voxels an axis, zeros outside.

    One product with a banded matrix an axis: exact to float32 rounding, unlike running sums, and its own adjoint.
    """
    with full_precision(x):
        return _banded(x, _bands(x, window))


def _bands(like: Tensor, window: int) -> list[Tensor]:
    """For each spatial axis the matrix, 0 or 1, that says which voxels lie in a window about which."""
    places = [torch.arange(size, device=like.device) for size in like.shape[2:]]
    return [((place[:, None] - place).abs() <= window // 2).to(like.dtype) for place in places]


def _banded(x: Tensor, bands: list[Tensor]) -> Tensor:
    for axis, band in enumerate(bands, 2):
        x = x @ band if axis == x.ndim - 1 else (band @ x.flatten(axis + 1)).view(x.shape)
    return x


def _share_inside(shape: torch.Size, window: int, like: Tensor) -> Tensor:
    """Share of every window that lies inside the image, (*shape): 1 but for the border."""
    share = like.new_ones(())
    for size in shape:
        index = torch.arange(size, device=like.device)
        count = index.clamp(max=window // 2) + index.flip(0).clamp(max=window // 2) + 1
        share = share[..., None] * (count.to(like.dtype) / window)
    return share


def _flat(variance: Tensor, total: Tensor, mean: Tensor, voxels: float) -> Tensor:
    """Where a window's variance is nothing but rounding, and with it all that is divided by it, mask (B, C, *shape).

    In float32 a window of one value has a variance of about 1e-5, of either sign: as much as the stabiliser.
    """
    rounding = ROUNDINGS * torch.finfo(variance.dtype).eps
    return variance < torch.addcmul(rounding * voxels * mean.square(), total, total, value=rounding / voxels)


class _LocalCorrelation(torch.autograd.Function):
    """cc = cross^2 / (var_a var_b + e) a voxel, all three summed over the window, with its gradient in closed form.

    The images are centred first, so that variances do not cancel. Windows count fully at the border, where the released
    code sees zeros outside; `outside` carries what centring would change there. A window that is flat in an image
    has correlation and gradient 0.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, window: int) -> Tensor:
        voxels = float(window ** (a.ndim - 2))
        mean_a, mean_b = a.mean(), b.mean()
        a, b = a - mean_a, b - mean_b
        share = _share_inside(a.shape[2:], window, a)
        outside = 1 - share
        bands = _bands(a, window)
        sum_a, sum_b, sum_aa, sum_bb, sum_ab = (_banded(x, bands) for x in (a, b, a * a, b * b, a * b))

        edge = (voxels / 2) * share * outside
        edge_a, edge_b = edge * mean_a + outside * sum_a, edge * mean_b + outside * sum_b
        cross = sum_ab.addcmul_(sum_a, sum_b, value=-1 / voxels).addcmul_(edge_a, mean_b).addcmul_(edge_b, mean_a)
        var_a = sum_aa.addcmul_(sum_a, sum_a, value=-1 / voxels).addcmul_(edge_a, mean_a, value=2)
        var_b = sum_bb.addcmul_(sum_b, sum_b, value=-1 / voxels).addcmul_(edge_b, mean_b, value=2)
        product = (var_a * var_b).add_(STABILISER)
        flat = _flat(var_a, sum_a, mean_a, voxels) | _flat(var_b, sum_b, mean_b, voxels)
        cross.masked_fill_(flat, 0)
        product.masked_fill_(flat, 1)
        slope = cross / product  # d cc / d cross, halved
        cc = slope * cross
        local_a = sum_a.div_(voxels).addcmul_(outside, mean_a, value=-1)
        local_b = sum_b.div_(voxels).addcmul_(outside, mean_b, value=-1)
        ctx.save_for_backward(a, b, local_a, local_b, slope, cc / product * var_b, cc / product * var_a)
        ctx.bands = bands
        return cc

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph
            raise ArgumentError("a second derivative of the local correlation", "it has the first alone")
        a, b, local_a, local_b, slope, pull_a, pull_b = ctx.saved_tensors
        with torch.no_grad(), full_precision(grad):
            cross = 2 * grad * slope
            spread = _banded(cross, ctx.bands)
            own, other = (a, local_a, pull_a), (b, local_b, pull_b)
            gradients: list[Tensor | None] = []
            for (x, local_x, pull), (y, local_y, _), needed in (
                (own, other, ctx.needs_input_grad[0]),
                (other, own, ctx.needs_input_grad[1]),
            ):
                if not needed:
                    gradients.append(None)
                    continue
                pulled = 2 * grad * pull
                shared = _banded(cross * local_y - pulled * local_x, ctx.bands)
                gradients.append(y * spread - x * _banded(pulled, ctx.bands) - shared)
            return gradients[0], gradients[1], None


def local_correlation(a: Tensor, b: Tensor, window: int = 9) -> Tensor:
    """Squared correlation of a and b (B, C, *shape) in a window about every voxel, in [0, 1], float32.

    Runs in float32 whatever the mixed precision around it: window variances cancel in bf16.
    """
    if a.shape != b.shape or a.ndim not in (4, 5) or window % 2 == 0 or window < 1:
        raise ArgumentError(
            f"images of shapes {tuple(a.shape)} and {tuple(b.shape)}, window {window}",
            "expected two of the same shape (B, C, [D,] H, W) and an odd window",
        )
    with full_precision(a):
        return _LocalCorrelation.apply(a.float(), b.float(), window)


def local_ncc_loss(a: Tensor, b: Tensor, window: int = 9) -> Tensor:
    """1 - mean local squared correlation of a and b (B, C, *shape), scalar; 0 where one is a linear map of the other.

    Source: He et al. 2023, sec. 3.1 (there a similarity to maximise); window 9 voxels an axis.
    """
    return 1 - local_correlation(a, b, window).mean()


def smoothness_loss(displacement: Tensor) -> Tensor:
    """Squared forward differences of a displacement (B, n, *shape): mean over each axis, then over the axes; scalar."""
    x = displacement.float()
    axes = range(2, x.ndim)
    terms = [x.diff(dim=axis).square().mean() for axis in axes if x.shape[axis] > 1]
    return torch.stack(terms).sum() / len(axes) if terms else 0 * x.sum()


def restoration_loss(restored: Tensor, image: Tensor) -> Tensor:
    """Mean squared error of a restored image and the undamaged one, both (B, C, *shape); scalar, float32."""
    return F.mse_loss(restored.float(), image.float())


# --- GEMINI ----------------------------------------------------------------------------------------------------------


class GeminiTerms(NamedTuple):
    """The matching terms of GEMINI, scalars, float32, without their weights; each is a sum over both directions."""

    ncc: Tensor  # L_GVS: the images agree
    smoothness: Tensor  # L_smo: of the displacements
    deformation: Tensor  # L_def: the displacements bring features that agree together
    positive: Tensor  # L_pos: features that were brought together agree


def gemini_terms(
    a: Tensor,
    b: Tensor,
    f_a: Tensor,
    f_b: Tensor,
    displacement_ab: Tensor,
    displacement_ba: Tensor,
    *,
    resample: Callable[..., Tensor] = warp,
) -> GeminiTerms:
    """How well two images and their features match, both ways; what comes from outside an image does not count.

    L_def gives no gradient to the features themselves, L_pos none to the displacements.

    Args:
        a, b: images, (B, 1, *shape). f_a, f_b: their features, (B, C, *shape).
        displacement_ab: (B, n, *shape), voxels: resample(a, displacement_ab) is to look like b; displacement_ba back.
        resample: `spatial.warp`, or a module's own.

    Source: He et al. 2025 (GEMINI).
    """
    ways = []
    for image, target, f, f_target, displacement in (
        (a, b, f_a, f_b, displacement_ab),
        (b, a, f_b, f_a, displacement_ba),
    ):
        still = displacement.detach()
        mask = resample(torch.ones_like(image[:, :1]), still, mode="nearest")
        ways.append(
            (
                masked_ncc_loss(resample(image, displacement), target, mask),
                smoothness_loss(displacement),
                masked_cosine_loss(resample(f.detach(), displacement), f_target.detach(), mask),
                masked_cosine_loss(resample(f, still), f_target, mask),
            )
        )
    return GeminiTerms(*(there + back for there, back in zip(*ways, strict=True)))


def masked_ncc_loss(a: Tensor, b: Tensor, mask: Tensor, window: int = 9) -> Tensor:
    """1 - mean local squared correlation of a and b (B, C, *shape) where the mask (B, 1, *shape) says so; scalar."""
    return 1 - masked_mean(local_correlation(a, b, window), mask)


def masked_cosine_loss(u: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """1 - mean cosine of the feature vectors of u and v (B, C, *shape) where the mask (B, 1, *shape) says so; scalar.

    Runs in float32 whatever the mixed precision around it.
    """
    with full_precision(u):
        return 1 - masked_mean(F.cosine_similarity(u.float(), v.float(), dim=1)[:, None], mask)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, C, *shape) over the voxels that the mask (B, 1, *shape) counts, then over the images; scalar.

    Of an image without any it is 0. A batch of two is the mean of two batches of one.
    """
    inside, counted = (part.flatten(1).sum(1) for part in (x * mask, mask))
    return (inside / (counted * x.shape[1]).clamp_min(1)).mean()


# --- Segmentation ----------------------------------------------------------------------------------------------------


def dice_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """1 - mean soft Dice over the foreground classes that the batch holds; scalar, float32.

    All voxels of the batch count together. A class that no voxel has has no Dice and is left out; without any, 0.

    Args:
        logits: (B, K, *shape); class 0 is the background.
        classes: (B, *shape), from 0 to K - 1.

    Source: Milletari et al. 2016; over the batch as in Isensee et al. 2021 (nnU-Net).
    """
    probabilities = logits.float().softmax(1)
    names = torch.arange(logits.shape[1], device=logits.device).view(-1, *[1] * (logits.ndim - 2))
    truth = classes[:, None] == names
    parts = (torch.where(truth, probabilities, 0.0), probabilities, truth)
    both, found, held = (part.sum([0, *range(2, logits.ndim)])[1:] for part in parts)  # (K - 1,)
    dice = 2 * both / (found + held).clamp_min(1)
    return ((1 - dice) * (held > 0)).sum() / (held > 0).sum().clamp_min(1)
