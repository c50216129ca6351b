"""ONNX and torch.export: what onnxruntime computes is what the model computes, at sizes the export never saw."""

from __future__ import annotations

import copy
import json
import math
import sys

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from gvsl_zoo import load
from gvsl_zoo.cli import main
from gvsl_zoo.errors import ArgumentError, GvslZooError, WeightsError
from gvsl_zoo.integrations.onnx import export_onnx
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.models.xmorpher import XMorpher
from gvsl_zoo.registry import ModelEntry

NAME = "gvsl-unet-ct-nano"
SHAPES = [(1, 1, 48, 32, 16), (2, 1, 21, 50, 33), (1, 1, 5, 7, 9)]  # whole strides, none whole, all within one


def session(path):
    return pytest.importorskip("onnxruntime").InferenceSession(str(path), providers=["CPUExecutionProvider"])


def outputs_of(path, *inputs):
    """What onnxruntime gives, as tensors."""
    opened = session(path)
    names = [given.name for given in opened.get_inputs()]
    results = opened.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    return [torch.from_numpy(x) for x in results]


def assert_same(path, model, *inputs, tolerance=1e-4):
    with torch.no_grad():
        expected = model(*inputs)
    expected = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    for ours, theirs in zip(expected, outputs_of(path, *inputs), strict=True):
        torch.testing.assert_close(theirs, ours, rtol=tolerance, atol=tolerance)


def images(*shape):
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.rand(shape, generator=generator)


# --- torch.export ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("task", "ndim"), [("backbone", 3), ("segmentation", 3), ("features", 3), ("backbone", 2)])
def test_an_exported_program_takes_any_batch_and_any_axis_longer_than_a_stride(task, ndim):
    if ndim == 2:
        model = UNet(2, 8, generator=torch.Generator().manual_seed(0)).eval()
    elif task == "features":
        model = load(NAME, features_only=True)
    else:
        model = load(NAME, task=task, num_classes=3 if task == "segmentation" else None)
    free = {axis: torch.export.Dim.DYNAMIC for axis in (0, *range(2, 2 + ndim))}
    program = torch.export.export(model, (torch.rand(2, 1, *(37, 50, 61)[:ndim]),), dynamic_shapes=(free,)).module()
    for shape in [(1, 48, 32, 64), (3, 17, 40, 25)]:
        x = torch.rand(shape[0], 1, *shape[1 : 1 + ndim])
        with torch.no_grad():
            ours, theirs = model(x), program(x)
        for a, b in zip(*((out,) if isinstance(out, torch.Tensor) else out for out in (ours, theirs)), strict=True):
            assert torch.equal(a, b)


# --- ONNX -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backbone_file(tmp_path_factory):
    pytest.importorskip("onnxscript")
    return export_onnx(load(NAME), tmp_path_factory.mktemp("onnx") / "net.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_onnxruntime_gives_the_backbone_s_features_at_any_size(backbone_file, shape):
    assert_same(backbone_file, load(NAME), next(images(*shape)), tolerance=2e-5)


@pytest.mark.slow
def test_a_mostly_empty_image_costs_no_digits(backbone_file):
    x = torch.zeros(1, 1, 96, 90, 64)
    x[:, :, 30:40, 20:50, 7:30] = next(images(1, 1, 10, 30, 23))
    assert_same(backbone_file, load(NAME), x, tolerance=2e-5)


@pytest.mark.slow
def test_the_file_says_what_it_is_and_what_it_wants(backbone_file):
    opened = session(backbone_file)
    [given], [features] = opened.get_inputs(), opened.get_outputs()
    assert (given.name, given.shape) == ("image", ["batch", 1, "depth", "height", "width"])
    assert (features.name, features.shape) == ("features", ["batch", 8, "depth", "height", "width"])
    facts = opened.get_modelmeta().custom_metadata_map
    model = load(NAME)
    assert ModelEntry.from_dict(json.loads(facts["gvsl_zoo"])) == model.entry
    assert json.loads(facts["preprocessing"])["window"] == [-1024, 1024]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"task": "segmentation", "num_classes": 3, "in_chans": 2}, ["logits"]),
        ({"task": "classification", "num_classes": 3}, ["logits"]),
        ({"features_only": True}, ["inc", "down1", "down2", "down3", "down4"]),
    ],
    ids=["segmentation", "classification", "features"],
)
def test_heads_channels_and_feature_lists_are_exported_too(tmp_path, settings, names):
    pytest.importorskip("onnxscript")
    model = load(NAME, **settings)
    path = export_onnx(model, tmp_path / "net.onnx")
    assert [out.name for out in session(path).get_outputs()] == names
    for batch, _, *shape in SHAPES:
        assert_same(path, model, next(images(batch, settings.get("in_chans", 1), *shape)), tolerance=2e-5)


@pytest.mark.slow
def test_images_are_exported_as_volumes_are(tmp_path):
    pytest.importorskip("onnxscript")
    model = UNet(2, 8, generator=torch.Generator().manual_seed(0)).eval()
    model.entry = load(NAME).entry
    path = export_onnx(model, tmp_path / "net.onnx")
    for batch, chans, *shape in SHAPES:
        assert_same(path, model, next(images(batch, chans, *shape[:2])))


@pytest.mark.slow
def test_an_xmorpher_of_images_is_exported_for_one_shape(tmp_path):
    pytest.importorskip("onnxscript")
    model = XMorpher(2, 16, generator=torch.Generator().manual_seed(0)).eval()
    model.entry = load(NAME).entry
    before = torch.get_rng_state()
    path = export_onnx(model, tmp_path / "net.onnx", shape=(37, 50))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(path, model, next(images(1, 1, 37, 50)))


@pytest.mark.slow
def test_the_file_is_in_evaluation_mode_and_float32_whatever_the_model_stands_in(tmp_path):
    pytest.importorskip("onnxscript")
    model = XMorpher(2, 16, generator=torch.Generator().manual_seed(0)).half().train()
    model.entry = load(NAME).entry
    path = export_onnx(model, tmp_path / "net.onnx", shape=(16, 20))
    assert_same(path, copy.deepcopy(model).float().eval(), next(images(1, 1, 16, 20)))
    assert model.training and next(model.parameters()).dtype == torch.float16


@pytest.mark.slow
def test_a_registration_is_exported_for_one_shape(tmp_path):
    pytest.importorskip("onnxscript")
    model, shape = load(NAME, task="registration"), (20, 21, 33)
    path = export_onnx(model, tmp_path / "net.onnx", shape=shape)
    stream = images(1, 1, *shape)
    fixed, moving = next(stream), next(stream)
    with torch.no_grad():
        expected = model(fixed, moving)
    warped, affine, displacement, restored = outputs_of(path, fixed, moving)
    assert not torch.allclose(warped, restored)
    torch.testing.assert_close(affine, expected.affine, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(displacement, expected.displacement, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(restored, expected.restored, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(warped, expected.warped, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_command_exports_by_the_ending_of_its_output(tmp_path):
    pytest.importorskip("onnxscript")
    run = CliRunner().invoke(main, ["export", NAME, "-o", str(tmp_path / "net.onnx"), "--json"])
    assert run.exit_code == 0, run.output
    facts = json.loads(run.stdout)
    assert facts["bytes"] == (tmp_path / "net.onnx").stat().st_size
    [features] = outputs_of(tmp_path / "net.onnx", torch.rand(1, 1, 16, 18, 20))
    assert math.prod(features.shape) == 8 * 16 * 18 * 20
    again = CliRunner().invoke(main, ["export", NAME, "-o", str(tmp_path / "net.onnx")])
    assert again.exit_code == 1 and "exists already" in again.output


@pytest.mark.parametrize(
    ("model", "settings", "match"),
    [
        (lambda: nn.Identity(), {}, "a Identity is no model of the zoo"),
        (lambda: load(NAME, task="registration"), {}, "computes its grid from the image's size; give shape="),
        (lambda: load(NAME), {"shape": (16, 16)}, r"shape \(16, 16\) for a 3D model"),
        (lambda: load(NAME), {"shape": 32}, "shape 32 for a 3D model; give a whole number of voxels an axis"),
        (lambda: load(NAME), {"shape": (32.0, 32, 32)}, "give a whole number of voxels an axis"),
    ],
    ids=["foreign", "registration", "axes", "number", "fraction"],
)
def test_what_cannot_be_exported_is_refused_before_any_work(tmp_path, model, settings, match):
    with pytest.raises(ArgumentError, match=match):
        export_onnx(model(), tmp_path / "net.onnx", **settings)
    assert not list(tmp_path.iterdir())


def test_without_the_extra_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(GvslZooError, match=r'ONNX needs onnxscript; pip install "gvsl-zoo\[export\]"'):
        export_onnx(load(NAME), tmp_path / "net.onnx")


def test_no_file_is_replaced_unasked(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"mine")
    with pytest.raises(WeightsError, match="exists already"):
        export_onnx(load(NAME), tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").read_bytes() == b"mine"
