"""Losses: local correlation and Dice by definition and invariants, smoothness of known fields, restoration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from formula import image, rnd

from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.losses import (
    STABILISER,
    _LocalCorrelation,
    box_sum,
    dice_loss,
    gemini_terms,
    local_correlation,
    local_ncc_loss,
    masked_cosine_loss,
    masked_ncc_loss,
    restoration_loss,
    smoothness_loss,
)

SHAPES = [(14, 11, 17), (19, 26)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def images(shape, batch=2):
    """Two related smooth images, (batch, 1, *shape) each."""
    a, noise = (torch.cat([image(f"{tag}{i}", shape) for i in range(batch)]) for tag in ("a", "n"))
    return a, (0.7 * a + 0.3 * noise).square()


def windowed(x, window):
    """Sum over a window by a dense convolution with ones, zeros outside."""
    convolve = {4: F.conv2d, 5: F.conv3d}[x.ndim]
    return convolve(x, torch.ones(1, 1, *[window] * (x.ndim - 2), dtype=x.dtype), padding=window // 2)


def by_definition(a, b, window):
    """cross^2 / (var_a var_b + e) from five dense convolutions; windows count fully at the border."""
    count = window ** (a.ndim - 2)
    mean_a, mean_b = windowed(a, window) / count, windowed(b, window) / count
    cross = windowed(a * b, window) - mean_a * mean_b * count
    var_a, var_b = (windowed(x * x, window) - m * m * count for x, m in ((a, mean_a), (b, mean_b)))
    return cross**2 / (var_a * var_b + STABILISER)


@each_shape
@pytest.mark.parametrize("window", [1, 9, 13])
def test_a_box_sum_is_a_convolution_with_ones(shape, window):
    x = rnd("x", (2, 2, *shape)).double()
    by_channel = windowed(x.flatten(0, 1)[:, None], window).view(x.shape)
    torch.testing.assert_close(box_sum(x, window), by_channel)


@each_shape
@pytest.mark.parametrize("window", [3, 9])
def test_local_correlation_is_its_definition_inside_and_at_the_border(shape, window):
    a, b = (x.double() for x in images(shape))
    expected = by_definition(a, b, window)
    torch.testing.assert_close(_LocalCorrelation.apply(a, b, window), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(local_correlation(a, b, window).double(), expected, rtol=0, atol=1e-3)
    assert local_ncc_loss(a, b, window).item() == pytest.approx(1 - expected.mean().item(), abs=1e-5)


@each_shape
def test_the_closed_gradient_is_that_of_the_definition(shape):
    gradients = []
    for correlation in (_LocalCorrelation.apply, by_definition):
        pair = [x.double().requires_grad_() for x in images(shape)]
        (correlation(*pair, 9) * rnd("w", (2, 1, *shape)).double()).sum().backward()
        gradients.append([x.grad for x in pair])
    for ours, definition in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, definition, rtol=1e-8, atol=1e-9 * definition.abs().max().item())


@pytest.mark.parametrize("shape", [(1, 2, 4, 5, 3), (2, 1, 6, 5)], ids=str)
def test_the_gradient_of_local_correlation_is_that_of_finite_differences(shape):
    a, b = (rnd(tag, shape).double().requires_grad_() for tag in "ab")
    assert torch.autograd.gradcheck(lambda a, b: _LocalCorrelation.apply(a, b, 3), (a, b))


@each_shape
def test_the_gradient_in_float32_is_that_in_float64(shape):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        a, b = (x.to(dtype) for x in images(shape))
        a.requires_grad_()
        _LocalCorrelation.apply(a, b, 9).mean().neg().backward()
        gradients.append(a.grad.double())
    single, double = gradients
    assert (single - double).abs().max() < 1e-6 * double.abs().max()


@pytest.mark.parametrize("shape", [(34, 31, 37), (49, 46)], ids=str)
@pytest.mark.parametrize("level", [0.0, 0.37, 0.95])
def test_a_flat_part_leaves_no_rounding_in_the_gradient(shape, level):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        a, b = (image(tag, shape).to(dtype) for tag in "ab")
        a[..., : shape[-1] // 2], b[..., : shape[-2] // 2, :] = level, 0.37
        _LocalCorrelation.apply(a.requires_grad_(), b.requires_grad_(), 9).mean().backward()
        gradients.append((a.grad.double(), b.grad.double()))
    for single, double in zip(*gradients, strict=True):
        assert (single - double).abs().max() < 1e-5 * double.abs().max()


@each_shape
def test_only_the_image_that_asks_gets_a_gradient(shape):
    for asking in (0, 1):
        pair = list(images(shape))
        pair[asking].requires_grad_()
        local_ncc_loss(*pair).backward()
        assert pair[asking].grad.abs().max() > 0
        assert pair[1 - asking].grad is None


@each_shape
@pytest.mark.parametrize(("slope", "offset"), [(0.5, 0.2), (2.0, 0.0), (-1.0, 1.0)])
def test_ncc_is_the_same_after_a_linear_intensity_change(shape, slope, offset):
    a, b = images(shape)
    inside = (..., *[slice(4, -4)] * len(shape))  # whose windows see no zeros from outside
    changed, plain = local_correlation(slope * a + offset, b)[inside], local_correlation(a, b)[inside]
    torch.testing.assert_close(changed, plain, rtol=0, atol=2e-3)


@each_shape
def test_ncc_of_an_image_with_itself_is_nearly_zero_and_never_below(shape):
    a, _ = images(shape)
    assert local_ncc_loss(a, a).item() == pytest.approx(0, abs=1e-4)
    assert local_correlation(a, a).max() < 1 + 1e-6


@each_shape
def test_ncc_is_symmetric(shape):
    a, b = images(shape)
    torch.testing.assert_close(local_correlation(a, b), local_correlation(b, a), rtol=0, atol=1e-5)


@each_shape
def test_ncc_falls_as_images_come_to_agree(shape):
    a, b = images(shape)
    found = [local_ncc_loss(torch.lerp(b, a, share), a).item() for share in (0.0, 0.5, 1.0)]
    assert found == sorted(found, reverse=True)
    assert found[0] > 0.05


@each_shape
@pytest.mark.parametrize("other", ["empty", "textured"])
def test_an_empty_image_has_loss_one_and_no_gradient(shape, other):
    a = torch.zeros(2, 1, *shape, requires_grad=True)
    b = {"empty": torch.zeros(2, 1, *shape), "textured": images(shape)[0]}[other].requires_grad_()
    loss = local_ncc_loss(a, b)
    loss.backward()
    assert loss.item() == 1
    assert a.grad.isfinite().all()
    assert b.grad.abs().max() == 0
    assert other == "textured" or a.grad.abs().max() == 0


@each_shape
@pytest.mark.parametrize("values", [(0.3, 0.7), (1.0, 1.0)])
def test_constant_images_do_not_correlate_and_give_a_finite_gradient(shape, values):
    a, b = (torch.full((1, 1, *shape), value, requires_grad=True) for value in values)
    correlation = local_correlation(a, b)
    correlation.mean().backward()
    inside = (..., *[slice(4, -4)] * len(shape))
    assert correlation.isfinite().all()
    assert correlation[inside].abs().max() < 1e-3
    assert a.grad.isfinite().all()
    assert b.grad.isfinite().all()


@each_shape
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_losses_do_not_change_under_mixed_precision(shape, device):
    a, b = (x.to(device) for x in images(shape))
    flow = rnd("flow", (2, len(shape), *shape)).to(device)
    results = []
    for mixed in (False, True):
        leaf = a.clone().requires_grad_()
        with torch.autocast(device, torch.bfloat16, enabled=mixed):
            terms = local_ncc_loss(leaf, b), smoothness_loss(flow), restoration_loss(a, b)
            terms[0].backward()
        results.append((*terms, leaf.grad))
    for plain, mixed in zip(*results, strict=True):
        assert mixed.dtype == torch.float32
        assert torch.equal(plain, mixed)


@pytest.mark.parametrize(
    ("a", "b", "window"),
    [
        ((1, 1, 8, 8), (1, 1, 8, 9), 9),
        ((1, 1, 8, 8), (1, 1, 8, 8), 8),
        ((8, 8), (8, 8), 9),
        ((1, 1, 8, 8),) * 2 + (-1,),
    ],
)
def test_images_that_cannot_be_compared_are_refused(a, b, window):
    with pytest.raises(ArgumentError, match=r"images of shapes .*expected two of the same shape .* and an odd window"):
        local_ncc_loss(torch.zeros(a), torch.zeros(b), window)


@each_shape
def test_a_constant_displacement_is_perfectly_smooth(shape):
    assert smoothness_loss(torch.full((2, len(shape), *shape), 3.7)) == 0


@each_shape
def test_the_smoothness_of_a_linear_displacement_is_the_mean_square_of_its_slopes(shape):
    ndim = len(shape)
    slopes = rnd("slopes", (ndim, ndim))  # component, axis
    grid = torch.stack(torch.meshgrid([torch.arange(float(n)) for n in shape], indexing="ij"))
    displacement = torch.tensordot(slopes, grid, 1)[None]
    assert smoothness_loss(displacement).item() == pytest.approx(slopes.square().mean().item(), rel=1e-4)


def test_smoothness_passes_over_an_axis_of_one_voxel():
    assert smoothness_loss(rnd("thin", (1, 3, 1, 8, 8))).isfinite()


@each_shape
def test_restoration_is_the_mean_squared_error(shape):
    a, b = images(shape)
    assert restoration_loss(a, b).item() == pytest.approx((a - b).square().mean().item(), rel=1e-6)
    assert restoration_loss(a, a) == 0


@each_shape
def test_losses_of_a_batch_are_the_mean_of_its_images(shape):
    a, b = images(shape)
    flow = rnd("flow", (2, len(shape), *shape))
    for loss, arguments in ((local_ncc_loss, (a, b)), (restoration_loss, (a, b)), (smoothness_loss, (flow,))):
        single = sum(loss(*(x[i : i + 1] for x in arguments)).item() for i in range(2)) / 2
        assert loss(*arguments).item() == pytest.approx(single, rel=1e-5)


# --- GEMINI ---------------------------------------------------------------------------------------------------------


def matched(shape, batch=2):
    """Images, features and displacements of a pair, as `gemini_terms` takes them."""
    a, b = images(shape, batch)
    f_a, f_b = (rnd(tag, (batch, 5, *shape)) for tag in ("f_a", "f_b"))
    there, back = (2 * rnd(tag, (batch, len(shape), *shape)) for tag in ("there", "back"))
    return a, b, f_a, f_b, there, back


@each_shape
def test_without_displacement_everything_counts_and_the_terms_are_the_plain_ones(shape):
    a, b, f_a, f_b, there, back = matched(shape)
    terms = gemini_terms(a, b, f_a, f_b, 0 * there, 0 * back)
    cosine = 1 - F.cosine_similarity(f_a, f_b).mean().item()
    assert terms.ncc.item() == pytest.approx(2 * local_ncc_loss(a, b).item(), rel=1e-4)
    assert terms.deformation.item() == pytest.approx(2 * cosine, rel=1e-5)
    assert terms.positive.item() == pytest.approx(2 * cosine, rel=1e-5)
    assert terms.smoothness == 0


@each_shape
def test_what_comes_from_outside_does_not_count(shape):
    """A shift matches an image and its features to their shifted copies, whatever lies where nothing is known."""
    a, _, f_a, noise, *_ = matched(shape)
    shift = torch.zeros(2, len(shape), *shape)
    shift[:, -1] = 3.0
    b, f_b = a.roll(-3, -1), f_a.roll(-3, -1)
    b[..., -3:], f_b[..., -3:] = 0.5, noise[..., -3:]
    terms = gemini_terms(a, b, f_a, f_b, shift, -shift)
    assert max(terms.deformation.item(), terms.positive.item()) < 1e-4
    wrong = gemini_terms(a, b, f_a, f_b, -shift, shift)
    assert wrong.deformation > 1 and wrong.ncc > terms.ncc


@each_shape
def test_swapping_the_images_and_the_ways_changes_no_term(shape):
    a, b, f_a, f_b, there, back = matched(shape)
    for ours, swapped in zip(
        gemini_terms(a, b, f_a, f_b, there, back), gemini_terms(b, a, f_b, f_a, back, there), strict=True
    ):
        assert ours.item() == pytest.approx(swapped.item(), rel=1e-6)


@each_shape
def test_the_deformation_term_moves_displacements_alone_and_the_positive_term_features_alone(shape):
    given = [x.requires_grad_() for x in matched(shape)]
    terms = gemini_terms(*given)
    for term, moved in ((terms.deformation, given[4:]), (terms.positive, given[2:4]), (terms.smoothness, given[4:])):
        gradients = torch.autograd.grad(term, given, allow_unused=True, retain_graph=True)
        for x, gradient in zip(given, gradients, strict=True):
            assert (gradient is not None) == any(x is other for other in moved)
            assert gradient is None or gradient.abs().max() > 0
    there, back = torch.autograd.grad(terms.ncc, given[4:])
    assert there.abs().max() > 0 and back.abs().max() > 0
    assert terms.deformation.item() == pytest.approx(terms.positive.item(), rel=1e-6)


@each_shape
def test_a_pair_that_lies_wholly_outside_has_loss_one_each_way_and_a_finite_gradient(shape):
    a, b, f_a, f_b, there, back = matched(shape)
    far = [torch.full_like(u, 1000.0).requires_grad_() for u in (there, back)]
    terms = gemini_terms(a, b, f_a.requires_grad_(), f_b, *far)
    (terms.ncc + terms.deformation + terms.positive).backward()
    assert terms.ncc == terms.deformation == terms.positive == 2
    assert far[0].grad.isfinite().all() and f_a.grad.isfinite().all()


@each_shape
def test_a_mask_of_ones_changes_nothing_and_others_leave_out(shape):
    a, b, f_a, f_b, *_ = matched(shape)
    ones, half = torch.ones_like(a), torch.ones_like(a)
    half[..., : shape[-1] // 2] = 0
    assert masked_ncc_loss(a, b, ones).item() == pytest.approx(local_ncc_loss(a, b).item(), rel=1e-5)
    kept = local_correlation(a, b)[..., shape[-1] // 2 :].mean().item()
    assert masked_ncc_loss(a, b, half).item() == pytest.approx(1 - kept, rel=1e-5)
    f_c = torch.where(half > 0, f_a, f_b)
    assert masked_cosine_loss(f_a, f_c, half).item() == pytest.approx(0, abs=1e-6)
    assert masked_cosine_loss(f_a, f_c, ones) > 0.1
    assert masked_cosine_loss(f_a, -3 * f_a, ones).item() == pytest.approx(2, rel=1e-5)


@each_shape
def test_masked_losses_of_a_batch_are_the_mean_of_its_images(shape):
    a, b, f_a, f_b, *_ = matched(shape)
    mask = torch.ones_like(a)
    mask[0, ..., : shape[-1] // 2] = 0
    for loss, given in ((masked_ncc_loss, (a, b, mask)), (masked_cosine_loss, (f_a, f_b, mask))):
        single = sum(loss(*(x[i : i + 1] for x in given)).item() for i in range(2)) / 2
        assert loss(*given).item() == pytest.approx(single, rel=1e-5)


@each_shape
def test_the_terms_do_not_change_under_mixed_precision(shape):
    given = matched(shape)
    plain = gemini_terms(*given)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gemini_terms(*given)
    assert all(term.dtype == torch.float32 for term in mixed)
    assert plain == mixed


# --- Segmentation ---------------------------------------------------------------------------------------------------


def labelled(shape, classes=4):
    """Random logits and classes of a batch of two."""
    classes_of = (rnd("classes", (2, *shape)).sigmoid() * classes).long()
    return rnd("logits", (2, classes, *shape)), classes_of


@each_shape
def test_the_dice_loss_of_a_sure_answer_is_one_less_dice(shape):
    logits, truth = labelled(shape)
    found = logits.argmax(1)
    sure = 1e4 * F.one_hot(found, 4).movedim(-1, 1).float()
    dice = [2 * ((found == k) & (truth == k)).sum() / ((found == k).sum() + (truth == k).sum()) for k in (1, 2, 3)]
    assert dice_loss(sure, truth).item() == pytest.approx(1 - sum(dice).item() / 3, rel=1e-5)
    assert dice_loss(1e4 * F.one_hot(truth, 4).movedim(-1, 1).float(), truth) == 0


@each_shape
def test_a_class_that_the_batch_lacks_has_no_dice(shape):
    logits, truth = labelled(shape)
    without = truth.masked_fill(truth == 3, 0)
    three = torch.cat([logits[:, [0, 3]].logsumexp(1, keepdim=True), logits[:, 1:3]], 1)  # 3 is background
    assert dice_loss(logits, without).item() == pytest.approx(dice_loss(three, without).item(), rel=1e-5)


def test_without_any_foreground_the_dice_loss_and_its_gradient_are_zero():
    logits = rnd("logits", (1, 3, 6, 7)).requires_grad_()
    loss = dice_loss(logits, torch.zeros(1, 6, 7))
    loss.backward()
    assert loss == 0 and not logits.grad.any()


@each_shape
def test_the_dice_loss_counts_the_voxels_of_a_batch_together(shape):
    logits, truth = labelled(shape)
    as_one = [torch.cat(list(x), 1 if x is logits else 0)[None] for x in (logits, truth)]
    assert dice_loss(logits, truth).item() == pytest.approx(dice_loss(*as_one).item(), rel=1e-5)


def test_the_dice_loss_is_float32_also_of_bf16_logits():
    logits, truth = labelled((9, 9))
    assert dice_loss(logits.bfloat16(), truth).dtype == torch.float32


def test_one_voxel_is_smooth():
    x = torch.ones(1, 3, 1, 1, 1, requires_grad=True)
    smoothness_loss(x).backward()
    assert smoothness_loss(x) == 0 and not x.grad.any()


def test_the_local_correlation_refuses_a_second_derivative_and_is_not_silently_wrong(generator):
    a, b = torch.rand(2, 1, 1, 12, 12, generator=generator)
    a.requires_grad_()
    with pytest.raises(ArgumentError, match="second derivative of the local correlation"):
        torch.autograd.grad(local_ncc_loss(a, b), a, create_graph=True)
    assert torch.autograd.grad(local_ncc_loss(a, b), a)[0].abs().max() > 0
