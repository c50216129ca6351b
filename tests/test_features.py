"""Tests of features: geometry exact, pooled means equal to those of the dense map, errors with a way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gvsl_zoo.errors import ArgumentError, VolumeError
from gvsl_zoo.inference.features import features, pooled_features, prepare_for, principal_components
from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.volume import InputWarning, Preprocessing, Volume, read_volume, write_volume

DATA = Path(__file__).parents[2] / "shared" / "data"
SMALL = (16, 16, 16)
RAS = np.diag([3.0, 4.0, 5.0, 1.0])
LPS_TURNED = np.array([[0, 0, -4.0, 40], [-3.0, 0, 0, 20], [0, 5.0, 0, -30], [0, 0, 0, 1]])  # axes (y, z, x)


class Ramp(nn.Module):
    """Pointwise: the image and its square."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.square()], 1)


def ready(model: nn.Module, spacing_mm: float | None = None) -> nn.Module:
    model.preprocessing = Preprocessing(None if spacing_mm is None else (spacing_mm,) * 3)  # type: ignore[assignment]
    return model.eval()


def unet(in_chans: int = 1, ndim: int = 3) -> UNet:
    return UNet(ndim, 8, in_chans, generator=torch.Generator().manual_seed(0))


def phantom(shape: tuple[int, int, int] = (20, 18, 22), affine: np.ndarray = RAS) -> Volume:
    """A warm ball in air, in HU, with a smooth gradient inside."""
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    data = np.where(i**2 + j**2 + k**2 < 0.8, 100 + 200 * i + 80 * k, -1000).astype(np.float32)
    return Volume(data, affine)


@pytest.mark.parametrize("affine", [RAS, LPS_TURNED])
def test_features_lie_on_the_scans_own_grid_whatever_its_axes(affine: np.ndarray) -> None:
    scan = phantom(affine=affine)
    out = features(scan, ready(Ramp()), window=(8, 8, 8))
    scaled = (np.clip(scan.data, -1024, 1024) + 1024) / 2048
    assert out.data.shape == (*scan.shape, 2) and out.data.dtype == np.float32
    assert np.array_equal(out.affine, scan.affine)
    np.testing.assert_allclose(out.data[..., 0], scaled, atol=1e-5)
    np.testing.assert_allclose(out.data[..., 1], scaled**2, atol=1e-5)


@pytest.mark.parametrize("affine", [RAS, LPS_TURNED])
def test_features_on_the_models_grid_lie_at_the_same_place_in_the_world(affine: np.ndarray) -> None:
    scan = phantom((24, 20, 28), affine)
    out = features(scan, ready(Ramp(), 6.0), window=(8, 8, 8), grid="model")
    np.testing.assert_allclose(out.spacing_mm, 6.0, rtol=0.08)  # the field of view is kept exactly

    def centre(volume: Volume, weights: np.ndarray) -> np.ndarray:
        grid = np.stack(np.meshgrid(*map(np.arange, volume.shape), indexing="ij"), -1)
        index = (grid * weights[..., None]).sum((0, 1, 2)) / weights.sum()
        return volume.affine[:3, :3] @ index + volume.affine[:3, 3]

    warm = scan.data + 1000
    np.testing.assert_allclose(centre(out, out.data[..., 0] - 24 / 2048), centre(scan, warm), atol=0.5)


def test_one_window_gives_the_backbones_own_features() -> None:
    model, scan = ready(unet()), phantom()
    with torch.inference_mode():
        expected = model(prepare_for(scan, model).image)[0]
    out = features(scan, model, grid="model")
    np.testing.assert_allclose(out.data, expected.permute(3, 2, 1, 0).numpy(), atol=3e-5)  # sums in another order


def test_a_gvsl_module_gives_the_features_of_its_backbone() -> None:
    backbone = unet()
    whole = ready(GVSL(backbone, affine_width=8))
    expected = features(phantom(), ready(backbone), window=SMALL)
    np.testing.assert_array_equal(features(phantom(), whole, window=SMALL).data, expected.data)


def test_a_model_of_three_channels_gets_the_scan_in_each() -> None:
    seen = []
    model = ready(unet(in_chans=3))
    model.inc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features(phantom(), model)
    assert seen[0].shape[1] == 3 and torch.equal(seen[0][:, 0], seen[0][:, 2])


@pytest.mark.parametrize("shape", [(1, 5, 40), (7, 3, 2), (33, 17, 16)])
def test_any_size_of_scan_works(shape: tuple[int, int, int]) -> None:
    with np.errstate(all="raise"):
        out = features(Volume(np.linspace(-1000, 900, np.prod(shape)).reshape(shape), RAS), ready(unet()), window=SMALL)
    assert out.data.shape == (*shape, 8) and np.isfinite(out.data).all()


def test_features_survive_a_file(tmp_path: Path) -> None:
    write_volume(phantom(affine=LPS_TURNED), tmp_path / "scan.nii.gz")
    out = features(tmp_path / "scan.nii.gz", ready(unet()), window=SMALL)
    write_volume(out, tmp_path / "features.nii.gz")
    back = read_volume(tmp_path / "features.nii.gz", channels=True)
    np.testing.assert_array_equal(back.data, out.data)
    np.testing.assert_allclose(back.affine, LPS_TURNED, atol=1e-5)


def test_an_empty_image_gives_finite_features_and_a_warning() -> None:
    scan = Volume(np.zeros((16, 16, 16), np.int16), RAS)
    with pytest.warns(InputWarning, match="every voxel is 0"):
        assert np.isfinite(features(scan, ready(unet())).data).all()
    with pytest.warns(InputWarning, match="every voxel is 0"):
        assert np.isfinite(pooled_features(scan, ready(unet())).local).all()


def test_the_pooled_local_vector_is_the_mean_of_the_blended_map_over_the_mask() -> None:
    scan, model = phantom(), ready(unet())
    inside = Volume((scan.data > 50).astype(np.uint8), RAS)
    dense = features(scan, model, window=SMALL, overlap=0.4).data
    pooled = pooled_features(scan, model, mask=inside, window=SMALL, overlap=0.4)
    np.testing.assert_allclose(pooled.local, dense[inside.data > 0].mean(0), rtol=1e-4, atol=1e-5)


def test_the_pooled_bottleneck_is_its_plain_mean_when_the_whole_scan_counts() -> None:
    scan, model = phantom((32, 16, 48)), ready(unet())  # multiples of the stride: no padding takes part
    with torch.inference_mode():
        bottleneck = model.forward_features(prepare_for(scan, model).image).bottleneck[0]
    pooled = pooled_features(scan, model, mask=Volume(np.ones(scan.shape, np.uint8), RAS))
    np.testing.assert_allclose(pooled.bottleneck, bottleneck.flatten(1).mean(1).numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_of_another_type_gives_the_features_of_its_numbers_in_float32(dtype: torch.dtype) -> None:
    scan, model = phantom((8, 9, 10)), ready(unet().to(dtype))
    dense, pooled = features(scan, model).data, pooled_features(scan, model)
    assert model.inc.double_conv[0].weight.dtype == dtype
    model.float()
    np.testing.assert_array_equal(dense, features(scan, model).data)
    for found, expected in zip(pooled, pooled_features(scan, model), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_body_pooling_leaves_the_air_out() -> None:
    scan, model = phantom(), ready(unet())
    ball = Volume((scan.data > -900).astype(np.uint8), RAS)
    first, second = pooled_features(scan, model), pooled_features(scan, model, mask=ball)
    np.testing.assert_allclose(first.local, second.local, rtol=1e-5)
    np.testing.assert_allclose(first.bottleneck, second.bottleneck, rtol=1e-5)


def test_a_mask_on_another_grid_or_without_a_voxel_is_refused() -> None:
    scan, model = phantom(), ready(unet())
    ones = np.ones(scan.shape, np.uint8)
    for data, affine, message in (
        (ones[:-1], RAS, r"the mask has \(.*\) voxels, the scan \(.*\); resample the mask onto the grid of the scan"),
        (ones, RAS + np.eye(4) * [[0.1], [0], [0], [0]], "the mask lies up to .* mm beside the scan; resample"),
        (ones, np.diag([-1, -1, 1, 1]) @ RAS, "the mask lies up to .* mm beside the scan; resample"),
    ):
        with pytest.raises(VolumeError, match=message):
            pooled_features(scan, model, mask=Volume(data, affine))
    with pytest.raises(VolumeError, match="no voxel above 0"):
        pooled_features(scan, model, mask=Volume(ones * 0, RAS))


def test_a_model_keeps_its_mode() -> None:
    model = ready(unet()).train()
    features(phantom((8, 8, 8)), model)
    pooled_features(phantom((8, 8, 8)), model)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (unet(), "set model.preprocessing"),
        (ready(unet(ndim=2)), r"a 2D model for a volume; choose a 3D model"),
    ],
)
def test_a_model_that_cannot_take_a_scan_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        features(phantom(), model)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ArgumentError, match="grid 'world'; use 'scan' or 'model'"):
        features(phantom(), ready(unet()), grid="world")
    with pytest.raises(ArgumentError, match="Ramp has no bottleneck"):
        pooled_features(phantom(), ready(Ramp()))
    with pytest.raises(ArgumentError, match="window"):
        features(phantom(), ready(unet()), window=(0, 16, 16))
    with pytest.raises(ArgumentError, match="overlap 1"):
        pooled_features(phantom(), ready(unet()), overlap=1)


@pytest.mark.parametrize("model", [unet(), Ramp()])
def test_features_that_would_not_fit_are_refused(model: nn.Module) -> None:
    with pytest.raises(VolumeError, match=r"features of 7920 voxels take .* grid='model'"):
        features(phantom(), ready(model), max_bytes=20_000, window=SMALL)


def test_components_find_the_axes_of_variance_in_order_and_repeat_exactly() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 6, 7, 8, generator=generator) * torch.tensor([9.0, 3.0, 1.0]).view(3, 1, 1, 1)
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator)).Q[:, :3]
    maps = torch.einsum("cn,n...->c...", basis, scores) + 4
    out = principal_components(maps)
    assert torch.equal(out, principal_components(maps))
    assert out.shape == (3, 6, 7, 8) and out.min() == 0 and out.max() == 1
    for found, truth in zip(out.flatten(1), scores.flatten(1), strict=True):
        assert torch.corrcoef(torch.stack([found, truth]))[0, 1].abs() > 0.95


def test_components_do_not_see_what_the_mask_leaves_out() -> None:
    maps = torch.randn(4, 6, 6, 6, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(6, 6, 6, dtype=torch.bool)
    mask[2:5] = True
    changed = torch.where(mask, maps, 1000.0)
    out = principal_components(maps, mask)
    assert torch.equal(out, principal_components(changed, mask))
    assert not out[:, ~mask].any()


def test_components_of_constant_features_are_finite() -> None:
    assert torch.isfinite(principal_components(torch.ones(4, 5, 5, 5))).all()


def test_wrong_components_are_refused() -> None:
    with pytest.raises(ArgumentError, match="4 components of 3 channels"):
        principal_components(torch.zeros(3, 4, 4, 4), n=4)
    with pytest.raises(ArgumentError, match="with 0 voxels"):
        principal_components(torch.zeros(3, 4, 4, 4), torch.zeros(4, 4, 4))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_features_on_a_gpu_are_those_of_the_cpu(precision: str) -> None:
    tolerance = 1e-3 if precision == "float32" else 0.1
    settings = {"window": SMALL, "batch_size": 3, "precision": precision}
    expected = features(phantom(), ready(unet()), window=SMALL).data
    out = features(phantom(), ready(unet()).cuda(), **settings).data  # type: ignore[arg-type]
    assert np.abs(out - expected).mean() < tolerance * np.abs(expected).mean()
    pooled = pooled_features(phantom(), ready(unet()).cuda(), window=SMALL, precision=precision)
    assert np.isfinite(pooled.local).all() and np.isfinite(pooled.bottleneck).all()


@pytest.mark.parametrize("name", ["ct/ts_cardiac", "ct/kits_00072", "mr/studyforrest_t1"])
@pytest.mark.filterwarnings("ignore::gvsl_zoo.volume.InputWarning")
def test_features_of_real_scans_lie_where_the_scan_lies(name: str) -> None:
    path = DATA / f"{name}.nii.gz"
    if not path.exists():
        pytest.skip(f"{path.name} is not in shared/data")
    scan = read_volume(path)
    out = features(scan, ready(Ramp(), 4.0))
    assert out.data.shape == (*scan.shape, 2) and np.array_equal(out.affine, scan.affine)
    scaled = np.clip((scan.data[::4, ::4, ::2].astype(float) + 1024) / 2048, 0, 1)
    assert np.corrcoef(out.data[::4, ::4, ::2, 0].ravel(), scaled.ravel())[0, 1] > 0.9  # a blur of the scan itself


def test_a_compiled_model_gives_the_same_features() -> None:
    model, scan = ready(unet()), phantom()
    compiled = torch.compile(model, backend="eager")
    np.testing.assert_allclose(features(scan, compiled).data, features(scan, model).data, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_components_of_features_of_any_type(dtype: torch.dtype) -> None:
    dense = torch.rand(5, 6, 7, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    torch.testing.assert_close(principal_components(dense), principal_components(dense.float()))
