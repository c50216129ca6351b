"""Tests of the window engine: every voxel once, in as few windows as can be, in bounded memory."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.inference.sliding import QUICKER, Windows, ready_copy, sliding_slabs, sliding_window
from gvsl_zoo.models.unet import UNet

GRIDS = list(itertools.product([1, 2, 7, 16, 33, 64], [1, 3, 8, 20], [0.0, 0.25, 0.5, 0.8, 0.95]))


def image(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("size", "window", "overlap"), GRIDS)
def test_windows_cover_the_axis_once_each_and_spread_evenly(size: int, window: int, overlap: float) -> None:
    windows = Windows((size,), (window,), overlap)
    (starts,), (edge,) = windows.starts, windows.window
    assert starts[0] == 0 and starts[-1] + edge == size
    strides = [b - a for a, b in itertools.pairwise(starts)]
    assert all(1 <= stride <= edge for stride in strides)  # no duplicate, no gap
    assert max(strides, default=0) - min(strides, default=0) <= 1


@pytest.mark.parametrize(("size", "window", "overlap"), GRIDS)
def test_no_smaller_number_of_windows_has_the_overlap_asked_for(size: int, window: int, overlap: float) -> None:
    windows = Windows((size,), (window,), overlap)
    edge = windows.window[0]
    stride = max(1, math.floor(edge * (1 - overlap) + 1e-6))
    assert all(b - a <= stride for a, b in itertools.pairwise(windows.starts[0]))
    assert edge + (len(windows) - 2) * stride < size or len(windows) == 1


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(20, 33, 9), (8, 8, 8), (5, 40)])
def test_the_shares_of_every_voxel_sum_to_one(shape: tuple[int, ...], overlap: float) -> None:
    total = torch.zeros(shape)
    for box, weight in Windows(shape, (8,) * len(shape), overlap):
        assert (weight > 0).all()
        total[box] += weight
    torch.testing.assert_close(total, torch.ones(shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize("shape", [(21, 18, 30), (4, 5, 6), (40, 25)])
def test_a_pointwise_function_gives_the_same_in_windows_as_at_once(shape: tuple[int, ...], batch_size: int) -> None:
    x = image(1, 2, *shape)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.sin(), x.square()], 1)

    out = sliding_window(x, function, window=(8,) * len(shape), overlap=0.4, batch_size=batch_size)
    torch.testing.assert_close(out, function(x), rtol=1e-6, atol=1e-5)


def test_a_convolution_gives_the_same_in_windows_as_at_once_where_windows_see_its_support() -> None:
    x, kernel = image(1, 1, 24, 24, 24), image(3, 1, 3, 3, 3, seed=1)
    direct = F.conv3d(F.pad(x, [1] * 6), kernel)
    # The function gets a margin of its own, as if the image went on beyond the window.
    padded = F.pad(x, [1] * 6)
    out = torch.zeros(3, 24, 24, 24)
    for box, weight in Windows((24, 24, 24), (10, 10, 10), 0.3):
        around = (..., *(slice(s.start, s.stop + 2) for s in box))
        out[(slice(None), *box)] += F.conv3d(padded[around], kernel)[0] * weight
    torch.testing.assert_close(out[None], direct, rtol=1e-5, atol=1e-5)


def test_a_window_as_large_as_the_image_is_the_function_itself() -> None:
    x, kernel = image(1, 1, 9, 10, 11), image(2, 1, 3, 3, 3, seed=1)
    out = sliding_window(x, lambda x: F.conv3d(x, kernel, padding=1), window=(96, 10, 16))
    torch.testing.assert_close(out, F.conv3d(x, kernel, padding=1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.75])
def test_slabs_come_in_order_without_gaps_and_never_deeper_than_a_window(overlap: float) -> None:
    expected = 0
    for start, slab in sliding_slabs(image(1, 1, 37, 12, 12), lambda x: x, window=(8, 8, 8), overlap=overlap):
        assert start == expected and 0 < slab.shape[1] <= 8
        expected += slab.shape[1]
    assert expected == 37


def test_a_slab_is_given_as_soon_as_no_later_window_touches_it() -> None:
    calls = 0

    def function(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return x

    seen = [calls for _ in sliding_slabs(image(1, 1, 24, 8, 16), function, window=(8, 8, 8), overlap=0)]
    assert seen == [2, 4, 6]


def test_progress_counts_every_window_once() -> None:
    seen: list[tuple[int, int]] = []
    sliding_window(
        image(1, 1, 20, 20), lambda x: x, window=(8, 8), batch_size=4, progress=lambda *now: seen.append(now)
    )
    assert seen == [(n, 9) for n in range(1, 10)]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_windows_below_the_level_are_taken_as_nothing_but_the_first_one(batch_size: int) -> None:
    x, seen = torch.zeros(1, 1, 8, 40), []
    x[..., 22:26] = 1

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.extend(x[:, 0, 0, 0].tolist())
        return x + 5

    progress: list[int] = []
    out = sliding_window(
        x,
        function,
        window=(8, 8),
        overlap=0,
        batch_size=batch_size,
        empty_below=0.5,
        progress=lambda n, _: progress.append(n),
    )
    assert len(seen) == 3 and progress == [1, 2, 3, 4, 5]  # the first, 16 to 24, 24 to 32
    assert (out[..., :8] == 5).all() and not out[..., 8:16].any() and not out[..., 32:].any()
    torch.testing.assert_close(out[..., 16:32], x[..., 16:32] + 5)


def test_an_image_that_lies_wholly_below_the_level_is_computed() -> None:
    out = sliding_window(torch.zeros(1, 1, 20, 8), lambda x: x + 1, window=(8, 8), empty_below=0.5)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_a_ready_copy_computes_the_same_and_leaves_the_module_alone() -> None:
    module, x = UNet(3, 8, generator=torch.Generator().manual_seed(0)).train(), image(1, 1, 16, 16, 16)
    copy = ready_copy(module)
    assert module.training and not copy.training
    assert module.inc.double_conv[0].weight.is_contiguous()
    assert copy.down1.maxpool_conv[1].double_conv[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        torch.testing.assert_close(copy(x), module.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability()[:3] != "AVX", reason="for x86 CPUs")
def test_a_ready_copys_group_norm_is_right_where_pytorchs_is_off() -> None:
    norm = nn.GroupNorm(2, 16)
    nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(norm.bias, generator=torch.Generator().manual_seed(1))
    x = (image(2, 16, 64, 64, 64) + 3).contiguous(memory_format=torch.channels_last_3d)
    with torch.inference_mode():
        expected = F.group_norm(x.double(), 2, norm.weight.double(), norm.bias.double()).float()
        torch.testing.assert_close(ready_copy(norm)(x), expected, rtol=1e-6, atol=2e-6)
        assert (norm(x) - expected).abs().max() > 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_ready_copy_computes_in_float32_whatever_type_the_module_has(dtype: torch.dtype) -> None:
    module, x = UNet(3, 8, generator=torch.Generator().manual_seed(0)).to(dtype), image(1, 1, 16, 16, 16)
    with torch.inference_mode():
        found = ready_copy(module)(x)
        assert {tensor.dtype for tensor in module.state_dict().values()} == {dtype}
        torch.testing.assert_close(found, module.float().eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(2, 4, 3, 2, 1),
        nn.Conv3d(2, 4, 1, bias=False),
        nn.Conv3d(2, 4, 3, groups=2),
        nn.Conv3d(2, 4, 3, padding="same"),
        nn.Conv3d(2, 4, 3, padding="valid"),
        nn.Conv3d(2, 4, 3, padding=1, padding_mode="replicate"),
        nn.Conv3d(2, 4, 3, padding=1, padding_mode="circular"),
    ],
    ids=str,
)
def test_a_ready_copys_convolution_is_the_same_in_both_precisions(layer: nn.Conv3d) -> None:
    x, ready = image(1, 2, 5, 6, 7), ready_copy(layer)
    with torch.inference_mode():
        torch.testing.assert_close(ready(x), layer(x), rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(ready(x).float(), layer(x).float(), rtol=0.02, atol=0.02)
    assert type(layer) is nn.Conv3d


def test_a_layer_of_a_class_of_its_own_keeps_it() -> None:
    class Padded(nn.Conv3d):
        pass

    module = nn.Sequential(Padded(1, 1, 1), nn.Conv3d(1, 1, 1))
    own, quick = ready_copy(module)
    assert type(own) is Padded and type(quick) in (nn.Conv3d, QUICKER[nn.Conv3d])


def test_bf16_is_close_to_float32_and_blended_in_float32() -> None:
    x, kernel = image(1, 1, 16, 16, 16), image(2, 1, 3, 3, 3, seed=1) / 5

    def function(x: torch.Tensor) -> torch.Tensor:
        return F.conv3d(x, kernel, padding=1)

    exact = sliding_window(x, function, window=(16, 16, 16))
    quick = sliding_window(x, function, window=(16, 16, 16), precision="bf16")
    assert quick.dtype == torch.float32 and not torch.equal(quick, exact)
    torch.testing.assert_close(quick, exact, rtol=0.02, atol=0.05)


def test_no_gradient_is_kept_and_the_image_stays_as_it_was() -> None:
    x = image(1, 1, 12, 12).requires_grad_()
    before = x.detach().clone()
    out = sliding_window(x, lambda x: x.mul_(2), window=(8, 8))
    assert not out.requires_grad and torch.equal(x, before)
    out += 1  # an ordinary tensor


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": (8, 8)}, r"window \(8, 8\) .* give 3 whole numbers"),
        ({"window": (8, 0, 8)}, r"window \(8, 0, 8\)"),
        ({"window": (8, 8.5, 8)}, r"window \(8, 8.5, 8\)"),
        ({"overlap": 1.0}, r"overlap 1.0; give a share .* \[0, 1\)"),
        ({"overlap": -0.1}, "overlap -0.1"),
        ({"overlap": float("nan")}, "overlap nan"),
        ({"batch_size": 0}, "batch_size 0; give at least 1"),
        ({"precision": "int8"}, "precision 'int8'; use 'float32' or 'bf16'"),
    ],
)
def test_wrong_settings_are_refused_with_a_way_out(settings: dict, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        sliding_window(image(1, 1, 9, 9, 9), lambda x: x, **{"window": (8, 8, 8)} | settings)


@pytest.mark.parametrize("shape", [(9, 9, 9), (2, 1, 9, 9, 9), (1, 1, 0, 9, 9)])
def test_an_image_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="give one image"):
        sliding_window(torch.zeros(shape), lambda x: x, window=(8, 8, 8))


def test_a_function_that_changes_the_shape_is_refused() -> None:
    with pytest.raises(ArgumentError, match="must keep the batch and the spatial axes"):
        sliding_window(image(1, 1, 9, 9), lambda x: x[..., 1:], window=(8, 8))
