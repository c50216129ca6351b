"""Tests of segmentation from labelled scans: the linear map exact at every level, labels carried over, errors early."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import nn

from gvsl_zoo import fit_support, load, read_volume, segment, write_volume
from gvsl_zoo.cli import main
from gvsl_zoo.errors import ArgumentError, VolumeError
from gvsl_zoo.inference.features import prepare_for
from gvsl_zoo.inference.segment import label_comment
from gvsl_zoo.inference.support import SupportModel, _features_at, feature_maps
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.pretrain.anatomy import LABELS as TISSUES
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.registry import Label
from gvsl_zoo.volume import InputWarning, Preprocessing, Volume

MM = 7.0
NAMES = (Label("background", 0), Label("lungs", 3, (1, 2, 3)), Label("heart", 300))
LUNGS = ("lung_left", "lung_right")
HEART = ("myocardium", "left_ventricle", "right_ventricle", "left_atrium", "right_atrium")


@lru_cache
def subject(seed: int) -> tuple[Volume, Volume]:
    """A synthetic chest and the map of its lungs (3) and heart (300)."""
    drawn = sample_subject((40, 36, 48), torch.Generator().manual_seed(seed), (MM,) * 3, variation=0.5)
    labels = np.zeros(drawn.labels.shape, np.uint16)
    for value, tissues in ((3, LUNGS), (300, HEART)):
        labels[np.isin(drawn.labels.numpy(), [TISSUES[name] for name in tissues])] = value
    affine = np.diag([MM, MM, MM, 1.0])
    return Volume(drawn.hu.round().to(torch.int16).numpy().T, affine), Volume(labels.T, affine)


def dice(found: Volume, truth: Volume, value: int) -> float:
    a, b = found.data == value, truth.data == value
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def unet(in_chans: int = 1) -> UNet:
    model = UNet(3, 8, in_chans, generator=torch.Generator().manual_seed(0)).eval()
    model.preprocessing = Preprocessing((MM,) * 3)  # type: ignore[assignment]
    return model


class Polynomial(nn.Module):
    """Features that are no backbone's: powers of the intensity."""

    preprocessing = Preprocessing((MM,) * 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x**n for n in (2, 3, 4)], 1)


@pytest.mark.parametrize("shape", [(32, 16, 48), (21, 30, 17)])
@torch.inference_mode()
def test_mapping_every_level_is_mapping_all_interpolated_levels(
    shape: tuple[int, int, int], generator: torch.Generator
) -> None:
    backbone, x = unet(), torch.rand(2, 1, *shape, generator=generator)
    padding = [(-n) % 16 for n in shape]
    front = [p // 2 for p in padding]
    padded = F.pad(x, [s for p, f in zip(padding[::-1], front[::-1], strict=True) for s in (f, p - f)])
    maps = feature_maps(backbone, padded)
    full = torch.cat([F.interpolate(m, padded.shape[2:], mode="trilinear") for m in maps], 1)
    weight, bias = torch.randn(3, full.shape[1], generator=generator), torch.randn(3, generator=generator)
    expected = torch.einsum("kf,bfzyx->bkzyx", weight, full) + bias.view(1, -1, 1, 1, 1)
    box = tuple(slice(f, f + n) for f, n in zip(front, shape, strict=True))
    out = SupportModel(backbone, weight, bias, NAMES, Preprocessing())(x)
    torch.testing.assert_close(out, expected[(slice(None), slice(None), *box)], rtol=1e-4, atol=1e-4)


def test_features_at_voxels_are_those_of_the_interpolated_maps(generator: torch.Generator) -> None:
    backbone, (scan, _) = unet(), subject(0)
    prepared = prepare_for(scan, backbone)  # 40 x 36 x 48: one window
    points = torch.stack([torch.randint(n, (50,), generator=generator) for n in prepared.shape], 1)
    padded = F.pad(prepared.image, [0, 0, 6, 6, 4, 4])
    with torch.inference_mode():
        maps = [F.interpolate(m, padded.shape[2:], mode="trilinear") for m in feature_maps(backbone, padded)]
    z, y, x = points.T
    expected = torch.cat(maps, 1)[0, :, z + 4, y + 6, x].T
    torch.testing.assert_close(_features_at(points, prepared, backbone, "float32"), expected, rtol=1e-3, atol=1e-4)


def test_the_embedded_model_carries_anatomy_from_one_subject_to_another() -> None:
    (scan, truth) = subject(2)
    found = segment(scan, fit_support([subject(1)], load("gvsl-unet-ct-nano")))
    assert dice(found, truth, 3) > 0.9 and dice(found, truth, 300) > 0.65


def test_two_supports_are_two_halves_of_one_fit_and_each_may_lack_a_label() -> None:
    model, (scan, labels) = unet(), subject(1)
    without = replace(labels, data=np.where(labels.data == 300, 0, labels.data))
    fitted = fit_support([(scan, labels), (scan, without)], model)
    assert [label.value for label in fitted.labels] == [0, 3, 300]
    assert dice(segment(scan, fitted), labels, 3) > 0.8
    first, second = (fit_support([(scan, labels)], model) for _ in range(2))
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)


def test_a_label_that_no_voxel_of_the_grid_shows_is_warned_of() -> None:
    scan, labels = subject(1)
    fine = Volume(
        np.repeat(np.repeat(np.repeat(scan.data, 4, 0), 4, 1), 4, 2), np.diag([*np.array(scan.spacing_mm) / 4, 1])
    )
    small = np.repeat(np.repeat(np.repeat(labels.data, 4, 0), 4, 1), 4, 2)
    small[1, 1, 1] = 7
    with pytest.warns(InputWarning, match="no voxel of the model's grid shows 7, which will not be found"):
        fitted = fit_support([(fine, Volume(small, fine.affine))], unet())
    assert [label.name for label in fitted.labels] == ["background", "3", "7", "300"]


def test_any_module_gives_features() -> None:
    scan, labels = subject(1)
    found = segment(scan, fit_support([(scan, labels)], Polynomial()))
    assert dice(found, labels, 3) > 0.6  # by intensity alone; the air around has that of the lungs


def test_a_model_of_several_channels_gets_the_support_in_each() -> None:
    scan, labels = subject(1)
    fitted = fit_support([(scan, labels)], unet(in_chans=2))
    assert fitted.weight.shape == (3, 2 + 368)
    assert dice(segment(scan, fitted), labels, 3) > 0.8


def test_names_come_from_the_labels_own_header_or_are_the_values() -> None:
    scan, labels = subject(1)
    assert [label.name for label in fit_support([(scan, labels)], Polynomial()).labels] == ["background", "3", "300"]
    named = replace(labels, comment=label_comment(NAMES))
    fitted = fit_support([(scan, named)], Polynomial())
    assert fitted.labels == NAMES
    assert json.loads(segment(scan, fitted).comment)["labels"][1]["name"] == "lungs"


def test_the_backbone_stays_as_it_is() -> None:
    model, (scan, labels) = unet().train(), subject(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fitted = fit_support([(scan, labels)], model)
    assert model.training and not fitted.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda data: data[:-1],
            VolumeError,
            r".47, 36, 40. voxels, its scan .48, 36, 40.; .*same shape",
        ),
        (lambda data: 0 * data, ArgumentError, "nothing but background; give a map with values above 0"),
        (lambda data: data.astype(np.int32) - 1, VolumeError, "holds the label -1; give labels from 0 on"),
        (lambda data: data.astype(np.int32) * 1000, VolumeError, "the value 300000; give whole numbers from 0"),
        (lambda data: data / 2, VolumeError, "holds fractions, not labels"),
    ],
    ids=["another grid", "empty", "negative", "too large", "fractions"],
)
def test_labels_that_cannot_be_used_are_refused(change, error: type[Exception], message: str) -> None:
    scan, labels = subject(1)
    with pytest.raises(error, match=message):
        fit_support([(scan, replace(labels, data=change(labels.data)))], Polynomial())


def test_the_command_segments_from_a_labelled_scan(tmp_path: Path) -> None:
    scan, labels = subject(1)
    write_volume(scan, tmp_path / "support.nii.gz")
    write_volume(replace(labels, comment=label_comment(NAMES)), tmp_path / "support_labels.nii.gz")
    target = Volume(subject(2)[0].data[8:40, 4:32, 8:32], scan.affine)
    write_volume(target, tmp_path / "scan.nii.gz")
    arguments = ["segment", "-i", tmp_path / "scan.nii.gz", "-o", tmp_path / "out.nii.gz", "--device", "cpu"]
    arguments += ["--support", tmp_path / "support.nii.gz", tmp_path / "support_labels.nii.gz"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    assert "lungs" in result.output
    expected = segment(
        target, fit_support([(scan, replace(labels, comment=label_comment(NAMES)))], load("gvsl-unet-ct-nano"))
    )
    np.testing.assert_array_equal(read_volume(tmp_path / "out.nii.gz").data, expected.data)


def test_a_module_with_heads_lends_its_backbone() -> None:
    scan, labels = subject(1)
    alone, whole = (
        fit_support([(scan, labels)], load("gvsl-unet-ct-nano", task=t)) for t in ("backbone", "registration")
    )
    assert torch.equal(alone.weight, whole.weight) and whole.preprocessing == alone.preprocessing
    with pytest.raises(ArgumentError, match="a 2D model for a volume"):
        fit_support([(scan, labels)], load("gvsl-unet-xray-nano"))


def test_it_fits_in_inference_mode_too() -> None:
    scan, labels = subject(1)
    plain = fit_support([(scan, labels)], Polynomial())
    with torch.inference_mode():
        fitted = fit_support([(scan, labels)], Polynomial())
        found = segment(scan, fitted)
    torch.testing.assert_close(fitted.weight, plain.weight)
    np.testing.assert_array_equal(found.data, segment(scan, plain).data)


def test_it_runs_in_double() -> None:
    scan, labels = subject(1)
    fitted = fit_support([(scan, labels)], unet())
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(fitted.double()(x.double()).float(), fitted.float()(x), rtol=1e-4, atol=1e-4)
