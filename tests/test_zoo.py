"""Tests of load() and save_pretrained(): every task, the recorded numbers after a round trip, what is refused."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from formula import assert_as_recorded, image, recorded
from torch import nn

from gvsl_zoo import registry, sources
from gvsl_zoo.doctor import verify
from gvsl_zoo.errors import ArgumentError, RegistryError, SourceError, VolumeError, WeightsError
from gvsl_zoo.models.backbone import Backbone, FeatureList
from gvsl_zoo.models.gemini import GEMINI
from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.heads import ClassificationModel, SegmentationModel
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.proof import prove
from gvsl_zoo.registry import Label, model_info, register_registry
from gvsl_zoo.volume import Volume, write_volume
from gvsl_zoo.weights import METADATA_KEY, open_weights, write_weights
from gvsl_zoo.zoo import HEADED, build, from_pretrained, load, preprocessing, save_pretrained

NANO = "gvsl-unet-ct-nano"
WIDTH = model_info(NANO).config["width"]
CHANNELS = [WIDTH * k for k in (1, 2, 4, 8, 16)]
TASKS = {
    "backbone": {},
    "features": {"features_only": True},
    "segmentation": {"task": "segmentation", "num_classes": 4},
    "classification": {"task": "classification", "num_classes": 3},
    "registration": {"task": "registration"},
    "pretraining": {"task": "pretraining"},
}


@pytest.fixture(autouse=True)
def a_home_and_a_registry_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_added", {})


@pytest.fixture
def float32_copy(tmp_path):
    """The nano model's whole module as a float32 file, which is mapped, not converted."""
    return save_pretrained(load(NANO, task="pretraining"), tmp_path / "float32")


def noise(*shape, seed=1):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def seeded(*args, **kwargs):
    torch.manual_seed(0)
    return load(*args, **kwargs)


def outputs(model, x):
    """What a model says of x, as a list of tensors; a whole module gets x and x mirrored."""
    with torch.no_grad():
        out = model(x, x.flip(2)) if isinstance(model, GVSL) else model(x)
    return [out] if isinstance(out, torch.Tensor) else list(out)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def bytes_of(o):
    buffer = io.BytesIO()
    torch.save(o, buffer)
    return buffer.tell()


# --- What every task gives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32, 32), (37, 50, 61)], ids=str)
def test_every_task_gives_its_class_and_shapes(size):
    x = noise(2 if size[0] == 32 else 1, 1, *size)
    batch = len(x)
    features = [(batch, c, *(-(-s // 2**i) for s in size)) for i, c in enumerate(CHANNELS)]
    whole = [(batch, 1, *size), (batch, 3, 4), (batch, 3, *size), (batch, 1, *size)]
    expected = {
        "backbone": (Backbone, [(batch, WIDTH, *size)]),
        "features": (FeatureList, features),
        "segmentation": (SegmentationModel, [(batch, 4, *size)]),
        "classification": (ClassificationModel, [(batch, 3)]),
        "registration": (GVSL, whole),
        "pretraining": (GVSL, whole),
    }
    for name, settings in TASKS.items():
        model = load(NANO, **settings)
        kind, shapes = expected[name]
        assert isinstance(model, kind), name
        found = outputs(model, x)
        assert [tuple(t.shape) for t in found] == shapes, name
        assert all(t.isfinite().all() for t in found), name


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", TASKS)
def test_a_loaded_model_evaluates_and_learns_unless_frozen(name, frozen):
    model = load(NANO, frozen=frozen, **TASKS[name])
    inner = model if isinstance(model, Backbone) else getattr(model, "unet", None) or model.backbone
    heads = {id(p) for p in model.parameters()} - {id(p) for p in inner.parameters()}
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad == (not frozen or id(p) in heads) for p in model.parameters())
    assert all(p.is_leaf and p.dtype == torch.float32 and not p.is_meta for p in model.parameters())
    model.train()
    assert inner.training == (not frozen) and all(module.training == (not frozen) for module in inner.modules())
    inner.unfreeze()
    model.train()
    assert all(p.requires_grad for p in model.parameters()) and all(m.training for m in model.modules())


@pytest.mark.parametrize("name", TASKS)
def test_three_copies_of_one_channel_give_the_response_of_one(name):
    one, three = (seeded(NANO, in_chans=n, **TASKS[name]) for n in (1, 3))
    x = noise(1, 1, 32, 37, 32)
    for a, b in zip(outputs(one, x), outputs(three, x.expand(-1, 3, -1, -1, -1)), strict=True):
        torch.testing.assert_close(b, a.expand_as(b), rtol=1e-5, atol=1e-5)


def test_a_feature_list_is_the_whole_backbones_intermediates():
    x = noise(1, 1, 37, 50, 61)
    whole = load(NANO)
    found = outputs(load(NANO, features_only=True), x)
    with torch.no_grad():
        assert all(map(torch.equal, found, whole.forward_intermediates(x)))


@pytest.mark.parametrize("indices", [(4, 0), (-1,), (8,), (2, 7, -2), (1, 1)], ids=str)
def test_any_levels_can_be_chosen(indices):
    x = noise(1, 1, 32, 32, 32)
    whole, chosen = load(NANO), load(NANO, features_only=True, out_indices=indices)
    with torch.no_grad():
        expected = whole.forward_intermediates(x, indices)
    assert all(map(torch.equal, outputs(chosen, x), expected))
    assert chosen.feature_info.channels() == [t.shape[1] for t in expected]
    assert chosen.feature_info.reduction() == [32 // t.shape[2] for t in expected]


def test_a_feature_list_says_what_it_gives():
    info = load(NANO, features_only=True).feature_info
    assert (info.channels(), info.reduction()) == (CHANNELS, [1, 2, 4, 8, 16])


def test_an_encoder_alone_holds_no_decoder():
    whole, encoder = load(NANO), load(NANO, features_only=True)
    decoder = {name for name in whole.state_dict() if name.startswith("up")}
    assert decoder and not any("up" in name.split(".")[1] for name in encoder.state_dict())
    assert len(encoder.state_dict()) == len(whole.state_dict()) - len(decoder)
    assert set(encoder.load_report.unused) >= {f"unet.{name}" for name in decoder}
    assert not encoder.backbone.has_decoder
    assert load(NANO, features_only=True, out_indices=[5]).backbone.has_decoder


def test_out_indices_may_come_from_numpy():
    model = load(NANO, features_only=True, out_indices=np.array([0, 2]))
    assert list(model.out_indices) == [0, 2]


def test_the_report_says_what_was_taken_left_and_drawn():
    whole = load(NANO, task="pretraining")
    heads = {n for n in whole.state_dict() if not n.startswith("unet.")}
    assert whole.load_report.loaded == len(whole.state_dict())
    assert whole.load_report.unused == whole.load_report.fresh == ()
    model = load(NANO, task="segmentation", num_classes=2)
    report = model.load_report
    assert set(report.unused) == heads and set(report.fresh) == {"head.weight", "head.bias"}
    assert report.loaded == len(model.backbone.state_dict())
    assert report.sha256 == hashlib.sha256(Path(report.origin).read_bytes()).hexdigest()
    assert f"{report.loaded} tensors from" in str(report) and "drawn at random: head.weight, head.bias" in str(report)


def test_registration_and_pretraining_are_one_module():
    a, b = load(NANO, task="registration"), load(NANO, task="pretraining")
    assert same_state(a, b) and same_state(a.unet, load(NANO))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_model_comes_in_the_dtype_asked_for(dtype):
    for settings in TASKS.values():
        assert {p.dtype for p in load(NANO, dtype=dtype, **settings).parameters()} == {dtype}
    model = load(NANO, task="segmentation", num_classes=2, dtype=dtype)
    model.reset_head(3)
    assert model.head.weight.dtype == dtype


def test_bf16_is_close_to_float32():
    x = noise(1, 1, 32, 32, 32)
    [exact], [rough] = outputs(load(NANO), x), outputs(load(NANO, dtype=torch.bfloat16), x.bfloat16())
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).square().mean() < 0.01 * exact.square().mean()


def test_the_cpu_is_found_whatever_it_is_called():
    for device in ("cpu", "cpu:0", torch.device("cpu"), *(["auto"] if not torch.cuda.is_available() else [])):
        assert {p.device.type for p in load(NANO, device=device).parameters()} <= {"cpu", "mps"}


# --- Training on it --------------------------------------------------------------------------------------------


def trained(model, steps=6, classes=2):
    """Losses of plain PyTorch steps on one image whose bright half is class 1."""
    x = noise(2, 1, 32, 32, 32) * 0.2
    x[1, :, :16] += 0.6
    truth = (x[:, 0] > 0.5).long() if isinstance(model, SegmentationModel) else torch.arange(2)
    optimiser = torch.optim.Adam(model.parameter_groups(2e-3))
    model.train()
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_headed_model_learns_in_plain_pytorch(task):
    model = seeded(NANO, task=task, num_classes=2)
    losses = trained(model)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_every_parameter_of_a_headed_model_gets_a_gradient(task):
    model = load(NANO, task=task, num_classes=3).train()
    model(noise(2, 1, 32, 32, 32)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_frozen_backbone_stays_while_its_head_learns(task):
    model = seeded(NANO, task=task, num_classes=2, frozen=True)
    head = deepcopy(model.head.state_dict())
    losses = trained(model)
    assert losses[-1] < losses[0]
    assert same_state(model.backbone, seeded(NANO, task=task, num_classes=2).backbone)
    assert not any(torch.equal(model.head.state_dict()[name], head[name]) for name in head)
    assert all(p.grad is None for p in model.backbone.parameters())


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_new_head_replaces_the_old_one_only(task):
    model = load(NANO, task=task, num_classes=2)
    before = deepcopy(model.backbone)
    model.reset_head(5)
    assert model.num_classes == 5 and outputs(model, noise(1, 1, 32, 32, 32))[0].shape[1] == 5
    assert same_state(model.backbone, before)
    assert all(p.requires_grad for p in model.head.parameters())
    heads = []
    for seed in (3, 3, 4):
        model.reset_head(2, generator=torch.Generator().manual_seed(seed))
        heads.append(model.head.weight.detach().clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    for wrong, remedy in ((0, "give at least 1"), (3.0, "give a whole number"), (None, "give a whole number")):
        with pytest.raises(ArgumentError, match=f"num_classes={wrong}; {remedy}"):
            model.reset_head(wrong)
        assert model.num_classes == 2 and len(model.head.weight) == 2


@pytest.mark.parametrize("name", ["backbone", "segmentation", "classification"])
def test_parameter_groups_hold_every_parameter_once(name):
    model = load(NANO, **TASKS[name])
    groups = model.parameter_groups(1e-3, 0.5)
    ids = [id(p) for group in groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in model.parameters())
    rates = [group["lr"] for group in groups]
    assert rates == sorted(rates) and rates[-1] == 1e-3 and len(set(rates)) == len(rates)
    assert {group["lr"] for group in model.parameter_groups(1e-3)} == {1e-3}


@pytest.mark.parametrize("name", ["segmentation", "classification", "registration"])
def test_a_whole_model_is_frozen_checkpointed_and_grouped_as_its_backbone(name):
    model, runs = load(NANO, **TASKS[name]), []
    assert model.freeze().train() is model and not model.backbone.training
    heads = {id(p) for p in model.parameters() if p.requires_grad}
    assert heads and heads == {id(p) for group in model.parameter_groups(1e-3) for p in group["params"]}
    assert model.unfreeze().train() is model and model.backbone.training
    *levels, head = model.parameter_groups(1e-3, 0.5)
    assert {id(p) for p in head["params"]} == heads and [g["lr"] for g in (levels[-1], head)] == [5e-4, 1e-3]
    model.backbone.down2.register_forward_pre_hook(lambda *_: runs.append(1))
    model.set_grad_checkpointing()
    found = model(*[noise(1, 1, 16, 16, 16)] * (2 if name == "registration" else 1))
    (found.warped if name == "registration" else found).sum().backward()
    assert len(runs) == 2


def test_a_classification_learns_at_the_same_rates_whether_or_not_its_backbone_has_a_decoder():
    models = (load(NANO, task="classification", num_classes=2), ClassificationModel(load(NANO), 2))
    assert [model.backbone.has_decoder for model in models] == [False, True]
    lean, whole = ({g["name"]: g["lr"] for g in model.parameter_groups(1e-3, 0.5)} for model in models)
    assert lean == whole


@pytest.mark.parametrize("stored", ["embedded", "float32"])
def test_two_loads_share_nothing_and_leave_the_file_alone(stored, float32_copy):
    source = NANO if stored == "embedded" else float32_copy.parent
    first, second = (seeded(source, task="segmentation", num_classes=2) for _ in range(2))
    path = Path(first.load_report.origin)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert same_state(first, second)
    before = deepcopy(second)
    trained(first, steps=1)
    assert not same_state(first, second) and same_state(second, before)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    assert same_state(seeded(source, task="segmentation", num_classes=2), before)


@pytest.mark.parametrize("name", TASKS)
def test_without_pretraining_the_seed_alone_decides(name):
    a, b = (seeded(NANO, pretrained=False, **TASKS[name]) for _ in range(2))
    assert same_state(a, b) and not same_state(a, load(NANO, pretrained=False, **TASKS[name]))
    loaded = load(NANO, **TASKS[name]).state_dict()
    assert not any(torch.equal(loaded[n], t) for n, t in a.state_dict().items() if t.ndim > 1)
    report = a.load_report
    assert (report.origin, report.sha256, report.loaded) == ("random initialisation", None, 0)
    assert set(report.fresh) == set(a.state_dict()) and not a.training
    assert all(p.requires_grad and p.isfinite().all() for p in a.parameters())


def test_a_new_head_obeys_the_seed():
    a, b = (seeded(NANO, task="segmentation", num_classes=2) for _ in range(2))
    c = load(NANO, task="segmentation", num_classes=2)
    assert torch.equal(a.head.weight, b.head.weight) and not torch.equal(a.head.weight, c.head.weight)


@pytest.mark.slow
def test_a_model_can_be_compiled_and_exported():
    model, x = load(NANO, task="segmentation", num_classes=2), noise(1, 1, 32, 32, 32)
    [expected] = outputs(model, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # the tracing, without a C++ compiler's time
    torch.testing.assert_close(outputs(compiled, x)[0], expected, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x).detach(), expected, rtol=1e-4, atol=1e-4)
    compiled.train()
    compiled(x).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# --- What it carries -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_copies_and_pickles_of_a_model_are_the_model(name):
    model, x = load(NANO, **TASKS[name]), noise(1, 1, 32, 32, 32)
    expected = outputs(model, x)
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(map(torch.equal, outputs(copy, x), expected))
        assert copy.entry == model.entry and copy.cite() == model.cite() and copy.load_report == model.load_report
        next(copy.parameters()).data.zero_()
        assert all(map(torch.equal, outputs(model, x), expected))


def test_a_saved_or_pickled_model_is_as_large_as_its_parameters(float32_copy):
    for settings in ({}, {"features_only": True}):
        model = load(float32_copy.parent, **settings)
        size = sum(4 * p.numel() for p in model.parameters())
        assert bytes_of(model.state_dict()) < 1.1 * size + 100_000
        assert len(pickle.dumps(model)) < 1.1 * size + 100_000


@pytest.fixture
def ct(tmp_path):
    """A warm ball in air, HU, 44 x 40 x 48 voxels of 2 mm."""
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, n) for n in (44, 40, 48)), indexing="ij")
    data = np.where(i**2 + j**2 + k**2 < 0.8, 100 + 200 * i, -1000).astype(np.int16)
    write_volume(Volume(data, np.diag([2.0, 2.0, 2.0, 1.0])), tmp_path / "ct.nii.gz")
    return tmp_path / "ct.nii.gz"


@pytest.mark.parametrize("in_chans", [1, 3])
def test_preprocess_takes_a_path_or_a_volume_to_the_models_input(ct, in_chans):
    model = load(NANO, in_chans=in_chans)
    x = model.preprocess(ct)
    size_mm = (96, 80, 88)
    expected = [round(mm / s) for mm, s in zip(size_mm, model.entry.input.spacing_mm, strict=True)]
    assert x.dtype == torch.float32 and list(x.shape) == [1, in_chans, *expected]
    low, high = model.entry.input.intensity.scale
    assert low <= x.min() < x.max() <= high
    assert all(torch.equal(x[:, 0], x[:, c]) for c in range(in_chans))
    from gvsl_zoo import read_volume

    assert torch.equal(model.preprocess(read_volume(ct)), x)
    assert torch.equal(model.preprocess(str(ct)), x)
    assert outputs(model, x)[0].shape[2:] == x.shape[2:]


def test_a_model_says_what_it_is_and_whom_to_cite():
    model = load(NANO, task="segmentation", num_classes=2)
    assert model.entry == model_info(NANO)
    assert model.cite() == model.entry.citation and "He et al." in model.cite()
    assert model.preprocessing == preprocessing(model.entry.input)


def test_a_model_of_films_takes_no_volumes(ct):
    model = load("gemini-unet-xray", pretrained=False)
    assert outputs(model, noise(1, 1, 33, 47))[0].shape == (1, model.num_features, 33, 47)
    with pytest.raises(VolumeError, match=r"a volume of \d+ slices for a model of films; give a film, or choose a 3D"):
        model.preprocess(ct)


# --- The recorded numbers, through files -----------------------------------------------------------------------

GOLDEN_ENTRY = replace(
    model_info("gvsl-unet-ct"), name="golden", heads=("affine", "deformable", "restoration"), parameters=32_440_739
)
MINE = """\
schema_version: 1
models:
  my-unet:
    summary: formula weights
    status: available
    architecture: unet
    config: {{ndim: 3, width: {width}}}
    ndim: 3
    modality: CT
    objective: gvsl
    parameters: 1
    input: {{axes: zyx, intensity: {{unit: HU, window: [-1024, 1024], scale: [0, 1]}}}}
    heads: [{heads}]
    sources: [{{kind: file, path: {path}, sha256: {sha256}}}]
    licence: {{code: MIT, weights: MIT, data: none}}
    citation: nobody
"""


def put_beside(path, width, heads="", sha256=None):
    """A registry beside a weights file, which it names by a relative path."""
    digest = sha256 or hashlib.sha256(path.read_bytes()).hexdigest()
    mine = path.parent / "mine.yaml"
    mine.write_text(MINE.format(width=width, heads=heads, path=path.name, sha256=digest))
    return mine


@pytest.fixture(scope="module")
def golden_files(released, tmp_path_factory):
    """The released module as our folder, and its U-Net alone as any other program would save it."""
    folder = tmp_path_factory.mktemp("golden")
    whole = save_pretrained(released, folder / "whole", entry=GOLDEN_ENTRY)
    plain = folder / "plain.safetensors"
    safetensors.torch.save_file(released.unet.state_dict(), plain)
    yield whole, plain
    whole.unlink()  # 220 MB
    plain.unlink()


def assert_golden(backbone):
    golden = recorded("official_unet_gvsl.npz", "cube32/")
    with torch.no_grad():
        f_g, f_l = backbone.forward_features(image("cube32/A", (32, 32, 32)))
    assert_as_recorded(f_g, golden, "f_g", "cube32f_g")
    assert_as_recorded(f_l, golden, "f_l", "cube32f_l")


@pytest.mark.slow
def test_released_weights_give_the_recorded_numbers_after_a_round_trip(golden_files, released):
    whole, _ = golden_files
    assert same_state(load(whole, task="pretraining"), released)
    model = load(whole.parent)
    assert model.entry.proof is not None and replace(model.entry, proof=None) == GOLDEN_ENTRY
    assert len(model.load_report.unused) == len(released.state_dict()) - len(model.state_dict())
    assert_golden(model)
    assert_golden(load(whole, task="registration").unet)


@pytest.mark.slow
def test_a_registry_of_ones_own_gives_the_recorded_numbers_from_a_plain_file(golden_files):
    _, plain = golden_files
    mine = put_beside(plain, 32)
    assert register_registry(mine) == ["my-unet"]
    model = load("my-unet")
    assert model.entry.name == "my-unet" and model.load_report.unused == ()
    assert_golden(model)


@pytest.fixture
def unet_file(tmp_path):
    """A narrow U-Net alone, without `unet.` before its names, without an entry."""
    unet = UNet(width=8, generator=torch.Generator().manual_seed(0))
    safetensors.torch.save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    return unet, tmp_path / "unet.safetensors"


def test_a_file_of_the_backbone_alone_serves_what_a_backbone_can(unet_file):
    unet, path = unet_file
    register_registry(put_beside(path, 8))
    assert same_state(load("my-unet"), unet)
    assert same_state(load("my-unet", task="segmentation", num_classes=2).backbone, unet)
    with pytest.raises(
        ArgumentError, match=r"cannot serve task 'registration': its weights hold no heads .*; it serves"
    ):
        load("my-unet", task="registration")


def test_heads_that_a_file_lacks_are_named(unet_file):
    register_registry(put_beside(unet_file[1], 8, "affine, deformable, restoration"))
    with pytest.raises(WeightsError, match=r"does not fit GVSL: f_conv\.\S+ is missing; .* and \d+ more"):
        load("my-unet", task="registration")


def test_another_width_is_refused(unet_file):
    register_registry(put_beside(unet_file[1], 16))
    with pytest.raises(
        WeightsError, match=r"is \(\d+.*, not \(\d+.* and \d+ more; .*another architecture, width or task"
    ):
        load("my-unet")


def test_a_file_other_than_the_registrys_is_refused(unet_file):
    register_registry(put_beside(unet_file[1], 8, sha256="0" * 64))
    with pytest.raises(WeightsError, match=f"has sha256 [0-9a-f]{{64}}, expected {'0' * 64}"):
        load("my-unet")


def test_a_file_that_went_away_is_missed_by_its_path(unet_file):
    _, path = unet_file
    register_registry(put_beside(path, 8))
    path.unlink()
    with pytest.raises(SourceError, match=re.escape(f"file: there is no file {path}")):
        load("my-unet")


# --- Saving ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["backbone", "pretraining"])
@pytest.mark.parametrize("given", ["folder", "file", "text"])
def test_what_was_saved_loads_back_equal(name, given, tmp_path):
    model = load(NANO, **TASKS[name])
    path = save_pretrained(model, tmp_path / "new" / "run")
    assert path == tmp_path / "new" / "run" / "model.safetensors"
    back = load({"folder": path.parent, "file": path, "text": str(path)}[given], **TASKS[name])
    heads = model.entry.heads if name == "pretraining" else ()
    size = sum(parameter.numel() for parameter in model.parameters())
    expected = replace(model.entry, heads=heads, parameters=size, proof=prove(model))
    assert same_state(back, model) and back.entry == expected
    assert back.load_report.stored_dtype == "float32" and back.load_report.origin == str(path)


def test_half_precision_halves_the_file_and_loads_as_float32(tmp_path):
    model = load(NANO)
    half = save_pretrained(model, tmp_path / "half", dtype=torch.float16)
    assert half.stat().st_size < 0.6 * save_pretrained(model, tmp_path / "full").stat().st_size
    back = load(half)
    assert back.load_report.stored_dtype == "float16"
    assert {p.dtype for p in back.parameters()} == {torch.float32}
    assert all(torch.equal(t, model.state_dict()[n].half().float()) for n, t in back.state_dict().items())


def test_a_whole_module_serves_every_task_from_its_file(float32_copy):
    for settings in TASKS.values():
        assert same_state(seeded(float32_copy, **settings), seeded(NANO, **settings))


def test_saving_over_the_file_that_is_mapped_is_safe(float32_copy):
    model = load(float32_copy, task="pretraining")
    before = deepcopy(model)
    save_pretrained(model, float32_copy.parent)
    assert same_state(model, before) and same_state(load(float32_copy, task="pretraining"), before)


def test_a_model_of_three_channels_loads_back_as_it_was_saved(tmp_path):
    model, x = load(NANO, in_chans=3), noise(1, 3, 32, 32, 32)
    path = save_pretrained(model, tmp_path)
    assert all(map(torch.equal, outputs(load(path, in_chans=3), x), outputs(model, x)))
    assert all(map(torch.equal, outputs(load(path), x), outputs(model, x)))
    assert [check.verdict for check in verify(str(path))] == ["PASS"]


@pytest.mark.parametrize("chans", [1, 2])
def test_only_one_channel_is_spread_over_others(chans, tmp_path):
    path = save_pretrained(load(NANO, in_chans=3), tmp_path)
    with pytest.raises(ArgumentError, match=f"in_chans={chans} of weights for 3 input channels; leave in_chans out"):
        load(path, in_chans=chans)
    assert load(path, in_chans=chans, pretrained=False).in_chans == chans


@pytest.mark.parametrize("dtype", [torch.int8, "float16", torch.float8_e4m3fn, None], ids=str)
def test_a_dtype_that_no_file_holds_is_refused(dtype, tmp_path):
    with pytest.raises(ArgumentError, match=r"dtype .*; parameters are floating-point numbers"):
        save_pretrained(load(NANO), tmp_path / "x", dtype=dtype)


def test_a_path_object_is_a_path_whatever_its_name(tmp_path, monkeypatch):
    save_pretrained(load(NANO), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert same_state(load(Path("run")), load("./run"))


@pytest.mark.parametrize("what", ["headed", "features", "no_entry"])
def test_what_cannot_be_loaded_back_is_not_saved(what, tmp_path):
    model = {
        "headed": lambda: load(NANO, task="segmentation", num_classes=2),
        "features": lambda: load(NANO, features_only=True),
        "no_entry": lambda: UNet(width=8),
    }[what]()
    with pytest.raises(
        ArgumentError, match=f"a {type(model).__name__} .*cannot be saved; (save a backbone|give entry=)"
    ):
        save_pretrained(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


LABELS = (Label("background", 0), Label("lung", 3, (9, 99, 255)))


def headed(task):
    """A model with a head of two named classes, and its entry."""
    model = HEADED[task](load(NANO), 2, generator=torch.Generator().manual_seed(0)).eval()
    return model, replace(model_info(NANO), objective="supervised", heads=(task,), labels=LABELS)


@pytest.mark.parametrize("task", ["segmentation", "classification"])
def test_a_trained_head_is_saved_with_its_labels_and_loads_back_equal(task, tmp_path):
    model, entry = headed(task)
    path = save_pretrained(model, tmp_path, entry=entry)
    back, x = load(tmp_path, task=task), noise(1, 1, 16, 16, 16)
    assert same_state(back, model) and torch.equal(outputs(back, x)[0], outputs(model, x)[0])
    assert back.entry.labels == LABELS and not back.load_report.fresh and not back.load_report.unused
    again = save_pretrained(back, tmp_path / "again")
    assert open_weights(again).metadata == open_weights(path).metadata and same_state(load(again, task=task), model)
    assert [check.verdict for check in verify(str(path))] == ["PASS"]
    card = (tmp_path / "README.md").read_text()
    assert f'task="{task}"' in card and "| 1 | lung | 3 |" in card and f"pipeline_tag: image-{task}" in card


@pytest.mark.parametrize("settings", TASKS.values(), ids=TASKS)
def test_beside_a_trained_head_lies_a_backbone_for_every_other_task(settings, tmp_path):
    model, entry = headed("segmentation")
    save_pretrained(model, tmp_path, entry=entry)
    if settings.get("task") in ("registration", "pretraining"):
        with pytest.raises(
            ArgumentError, match="its weights hold segmentation beside the backbone; it serves backbone"
        ):
            load(tmp_path, **settings)
        return
    assert same_state(seeded(tmp_path, **settings), seeded(NANO, **settings))


def test_a_new_head_does_not_go_by_the_labels_of_the_old_one(tmp_path):
    model, entry = headed("segmentation")
    save_pretrained(model, tmp_path / "a", entry=entry)
    fresh = load(tmp_path / "a", task="segmentation", num_classes=2)
    assert fresh.entry.labels == () and not torch.equal(fresh.head.weight, model.head.weight)
    with pytest.raises(ArgumentError, match="whose 2 classes have no names cannot be saved; give entry="):
        save_pretrained(fresh, tmp_path / "b")
    with pytest.raises(ArgumentError, match="'classification' with num_classes=None"):
        load(tmp_path / "a", task="classification")


def test_of_a_trained_model_the_backbone_alone_has_no_labels(tmp_path):
    model, entry = headed("segmentation")
    save_pretrained(model, tmp_path / "a", entry=entry)
    save_pretrained(load(tmp_path / "a"), tmp_path / "b")
    back = load(tmp_path / "b")
    assert same_state(back, model.backbone) and back.entry.heads == back.entry.labels == ()


def test_a_head_without_the_decoder_of_its_backbone_is_not_saved(tmp_path):
    model, entry = load(NANO, task="classification", num_classes=2), headed("classification")[1]
    with pytest.raises(ArgumentError, match=r"without its backbone's decoder cannot be saved; put it into a whole one"):
        save_pretrained(model, tmp_path, entry=entry)
    whole = ClassificationModel(load(NANO), 2)
    assert not whole.load_state_dict(model.state_dict(), strict=False).unexpected_keys  # as the remedy says
    save_pretrained(whole, tmp_path, entry=entry)
    x = noise(1, 1, 32, 32, 32)
    assert torch.equal(load(tmp_path, task="classification")(x), model.eval()(x))


def test_without_pretraining_a_trained_model_gives_its_shape(tmp_path):
    model, entry = headed("segmentation")
    save_pretrained(model, tmp_path, entry=entry)
    scratch = load(tmp_path, task="segmentation", pretrained=False)
    assert scratch.num_classes == 2 and not torch.equal(scratch.head.weight, model.head.weight)


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises((WeightsError, ArgumentError), match=re.escape(str(tmp_path / "file"))):
        save_pretrained(load(NANO), tmp_path / "file")


@pytest.mark.parametrize("value", [float("nan"), 1e5], ids=["nan", "beyond_float16"])
def test_weights_that_load_would_refuse_do_not_replace_good_ones(value, tmp_path):
    model = load(NANO)
    path = save_pretrained(model, tmp_path, dtype=torch.float16)
    good = path.read_bytes()
    next(model.parameters()).data.view(-1)[0] = value
    with pytest.raises(WeightsError, match="NaN or Inf"):
        save_pretrained(model, tmp_path, dtype=torch.float16)
    assert path.read_bytes() == good


def with_config(**changes):
    """The nano backbone's file with another config in its entry."""
    path = save_pretrained(load(NANO), Path("changed"))
    file = open_weights(path)
    entry = json.loads(file.metadata[METADATA_KEY])
    entry["config"] |= changes.pop("config", {})
    write_weights({n: file.tensor(n) for n in file.slots}, path, {METADATA_KEY: json.dumps(entry | changes)})
    return path


UNKNOWN = r"no unet can be made with the config .*; upgrade gvsl-zoo if a newer version wrote the file"


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"depth": 5}, UNKNOWN),
        ({"width": "8"}, "width='8'"),
        ({"width": 8.0}, r"width=8\.0"),
        ({"width": 8 * 10**12}, UNKNOWN),
        ({"device": "cpu"}, UNKNOWN),
        ({"decoder": False}, UNKNOWN),
        ({"in_chans": "a"}, "in_chans='a'"),
        ({"in_chans": 3}, "does not fit"),
        ({"in_chans": 400_000}, "does not fit"),
    ],
    ids=str,
)
def test_a_file_whose_config_this_version_does_not_know_is_refused(config, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = with_config(config=config)
    with pytest.raises((WeightsError, ArgumentError), match=match):
        load(path)
    assert [check.verdict for check in verify(str(path))] == ["FAIL"]


def test_an_entry_with_a_field_of_a_newer_version_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=r"unknown field 'depth'; known are .*; upgrade gvsl-zoo if"):
        load(with_config(depth=5))


def parametrised():
    model = load(NANO)
    nn.utils.parametrizations.weight_norm(model.inc.double_conv[0])
    return model


def with_more():
    model = load(NANO)
    model.extra = nn.Linear(2, 2)
    return model


def of_another_width():
    model = UNet(width=16)
    model.entry = model_info(NANO)
    return model


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            parametrised,
            r"in inc\.double_conv\.0\.parametrizations\..* it is not what .* take out what was added",
        ),
        (with_more, r"in extra\.bias, extra\.weight it is not what the config .* makes; take out what was added"),
        (of_another_width, r"and \d+ more it is not what the config .*, or give entry= with the model's own config"),
        (
            lambda: nn.DataParallel(load(NANO)),
            r"a DataParallel .*cannot be saved; save the model inside: model\.module",
        ),
        (lambda: torch.compile(load(NANO)), r"cannot be saved; save the model inside: model\._orig_mod"),
    ],
    ids=["parametrised", "more", "width", "parallel", "compiled"],
)
def test_a_model_that_could_not_be_loaded_again_is_not_saved(make, match, tmp_path):
    with pytest.raises(ArgumentError, match=match):
        save_pretrained(make(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "config.json", "preprocessor_config.json"])
def test_files_of_ones_own_are_not_replaced(name, tmp_path):
    (tmp_path / name).write_text('{"mine": 1}')
    with pytest.raises(ArgumentError, match=rf"holds files of other origin: {name}; choose another folder"):
        save_pretrained(load(NANO), tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == [name]
    assert (tmp_path / name).read_text() == '{"mine": 1}'


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert save_pretrained(load(NANO), "~/saved") == tmp_path / "saved" / "model.safetensors"
    assert same_state(load("~/saved"), from_pretrained("~/saved"))


# --- What is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "error", "match"),
    [
        ("gvsl-unet3d-ct", {}, RegistryError, "unknown model 'gvsl-unet3d-ct'; did you mean .*'gvsl-unet-ct'"),
        ("resnet", {}, RegistryError, r"unknown model 'resnet'; see gvsl_zoo.list_models\(\)"),
        ("", {}, RegistryError, "unknown model ''"),
        (NANO, {"task": "detection"}, ArgumentError, "unknown task 'detection'; choose from backbone, segmentation"),
        (NANO, {"task": "segmentation"}, ArgumentError, "'segmentation' with num_classes=None; segmentation and"),
        (NANO, {"task": "classification"}, ArgumentError, "'classification' with num_classes=None"),
        (NANO, {"num_classes": 2}, ArgumentError, "'backbone' with num_classes=2"),
        (NANO, {"task": "registration", "num_classes": 2}, ArgumentError, "'registration' with num_classes=2"),
        (NANO, {"task": "segmentation", "num_classes": 0}, ArgumentError, "num_classes=0; give at least 1"),
        (NANO, {"features_only": True, "task": "pretraining"}, ArgumentError, "features_only with task 'pretraining'"),
        (NANO, {"out_indices": [0]}, ArgumentError, "out_indices without features_only; add features_only=True"),
        (NANO, {"features_only": True, "out_indices": [9]}, ArgumentError, r"levels \(9,\) asked for, but .* has 9"),
        (NANO, {"features_only": True, "out_indices": 3}, ArgumentError, "feature levels 3; give a sequence"),
        (
            NANO,
            {"features_only": True, "out_indices": [2.5]},
            ArgumentError,
            r"feature levels \[2.5\]; give a sequence",
        ),
        (NANO, {"features_only": True, "out_indices": [-6]}, ArgumentError, r"levels \(-6,\) asked for"),
        (NANO, {"in_chans": 0}, ArgumentError, "in_chans=0; .*in_chans at least 1"),
        (NANO, {"device": "gpu"}, ArgumentError, "unknown device 'gpu'; use auto, cpu, cuda, cuda:N or mps"),
        (NANO, {"device": "cuda:99"}, ArgumentError, "this machine has no device cuda:99; it has"),
        (
            "gvsl-xmorpher-ct",
            {},
            SourceError,
            rf"gvsl-xmorpher-ct is planned: .*; the nearest is '{NANO}' \(available\)",
        ),
        (
            "gvsl-unet-ct",
            {},
            SourceError,
            rf"gvsl-unet-ct could not be had \(Google Drive: .*; the nearest is '{NANO}' \(available\)",
        ),
        (
            "gvsl-unet-ct",
            {"task": "pretraining", "pretrained": False},
            ArgumentError,
            "cannot serve task 'pretraining'",
        ),
        ("./nothing", {}, WeightsError, "nothing cannot be read: No such file"),
        ("a/" + "b" * 5000, {}, WeightsError, "cannot be read: File name too long"),
        (NANO, {"device": None}, ArgumentError, "unknown device None; use auto, cpu"),
        (NANO, {"dtype": "float16"}, ArgumentError, "dtype 'float16'; .*give torch's float32, float16 or bfloat16"),
        (NANO, {"in_chans": "3"}, ArgumentError, "in_chans='3'; give a whole number"),
        (NANO, {"in_chans": 2.5}, ArgumentError, r"in_chans=2\.5; give a whole number"),
        (
            NANO,
            {"task": "segmentation", "num_classes": 2.0},
            ArgumentError,
            r"num_classes=2\.0; give",
        ),
        ("nothing.safetensors", {}, WeightsError, "nothing.safetensors cannot be read: No such file"),
    ],
    ids=str,
)
def test_a_wrong_call_is_refused_with_a_remedy(name, settings, error, match):
    with pytest.raises(error, match=match):
        load(name, **settings)


def test_a_module_that_this_version_lacks_is_not_replaced_by_another():
    entry = replace(GOLDEN_ENTRY, objective="restoration", heads=("restoration",))
    with pytest.raises(ArgumentError, match="this version lacks the heads of restoration; load the backbone"):
        build(entry, "pretraining", device="meta")
    assert isinstance(build(model_info("gemini-unet-xray"), "pretraining", device="meta"), GEMINI)


def test_a_folder_without_weights_is_told(tmp_path):
    with pytest.raises(WeightsError, match=re.escape(f"{tmp_path / 'model.safetensors'} cannot be read: No such file")):
        load(tmp_path)


def test_a_file_without_an_entry_is_refused(unet_file):
    with pytest.raises(WeightsError, match="does not say which model it belongs to; save it with"):
        load(unet_file[1])


@pytest.mark.parametrize(
    "text", ["{", "[]", "7", '{"name": "x"}', '{"ledger": [1]}', '{"ledger": "a"}', "[" * 100_000], ids=lambda t: t[:9]
)
def test_a_file_with_a_damaged_entry_is_refused(text, tmp_path):
    write_weights({"a": torch.ones(1)}, tmp_path / "x.safetensors", {METADATA_KEY: text})
    with pytest.raises((WeightsError, RegistryError), match=re.escape(str(tmp_path / "x.safetensors"))):
        load(tmp_path / "x.safetensors")


@pytest.mark.parametrize("task", ["backbone", "features", "segmentation", "pretraining"])
def test_weights_with_a_hole_are_refused(task, tmp_path, float32_copy):
    file = open_weights(float32_copy)
    tensors = {name: file.tensor(name) for name in file.slots if name != "unet.down1.maxpool_conv.1.double_conv.0.bias"}
    write_weights(tensors, tmp_path / "x.safetensors", file.metadata)
    with pytest.raises(WeightsError, match=r"double_conv\.0\.bias is missing"):
        load(tmp_path / "x.safetensors", **TASKS[task])


def test_weights_with_nan_are_refused(tmp_path, float32_copy):
    file = open_weights(float32_copy)
    tensors = {name: file.tensor(name) for name in file.slots}
    tensors["fc_rot.bias"][0] = float("nan")
    write_weights(tensors, tmp_path / "x.safetensors", file.metadata)
    with pytest.raises(WeightsError, match=r"'fc_rot\.bias' holds NaN or Inf"):
        load(tmp_path / "x.safetensors", task="pretraining")


def test_a_changed_embedded_file_is_refused(tmp_path, monkeypatch):
    [source] = model_info(NANO).sources
    content = bytearray((sources.EMBEDDED / source.file).read_bytes())
    content[-1] ^= 1
    (tmp_path / source.file).write_bytes(content)
    monkeypatch.setattr(sources, "EMBEDDED", tmp_path)
    with pytest.raises(WeightsError, match=f"has sha256 [0-9a-f]{{64}}, expected {source.sha256}"):
        load(NANO)


OFFLINE = f"""\
import json, sys
events = []
sys.addaudithook(lambda event, args: events.append(event) if event.startswith("socket.") else None)
import gvsl_zoo
gvsl_zoo.load("{NANO}", task="segmentation", num_classes=2)
print(json.dumps(events))
"""


def test_loading_the_embedded_model_opens_no_socket():
    done = subprocess.run([sys.executable, "-c", OFFLINE], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_loaded_model_is_a_plain_module():
    model = load(NANO)
    assert isinstance(model, nn.Module) and isinstance(nn.Sequential(model, nn.Conv3d(WIDTH, 1, 1)), nn.Module)
    assert not any(key.startswith(("entry", "preprocess", "load_report")) for key in model.state_dict())


def test_parameters_are_floating_point_numbers():
    with pytest.raises(ArgumentError, match="float32, float16 or bfloat16"):
        load("gvsl-unet-ct-nano", dtype=torch.int32)


def test_a_fraction_of_a_class_is_refused():
    with pytest.raises(ArgumentError, match=r"num_classes=2\.5; give a whole number"):
        load("gvsl-unet-ct-nano", task="segmentation", num_classes=2.5)


def test_a_path_with_a_nul_is_refused():
    with pytest.raises(WeightsError, match="cannot be read"):
        load("bad\0name.safetensors")


def test_weights_of_other_origin_are_not_replaced(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"theirs")
    with pytest.raises(ArgumentError, match=r"holds files of other origin: model\.safetensors"):
        save_pretrained(load(NANO), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"theirs"


def test_pytorchs_default_type_does_not_decide_that_of_a_model():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = load(NANO, task="segmentation", num_classes=2, pretrained=False)
    finally:
        torch.set_default_dtype(before)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_an_entry_that_would_take_minutes_to_read_is_refused(tmp_path):
    path = save_pretrained(load(NANO), tmp_path / "a")
    file = open_weights(path)
    entry = json.loads(file.metadata[METADATA_KEY])
    entry["config"]["x"] = [0] * 200_000
    long = tmp_path / "long.safetensors"
    write_weights({name: file.tensor(name) for name in file.slots}, long, {METADATA_KEY: json.dumps(entry)})
    with pytest.raises(WeightsError, match=r"has an entry of \d+ characters; save it again"):
        load(long)
