"""GEMINI: agreement with the released code, symmetry, gradients, and a run of its two updates a step in 2D and 3D."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from formula import DATA, assert_as_recorded, fill, image, recorded, rnd, weight

from gvsl_zoo import Affine, Volume, convert, load, model_info, register, save_pretrained
from gvsl_zoo.errors import ArgumentError, VolumeError
from gvsl_zoo.losses import GEMINI_WEIGHTS, gemini_terms, restoration_loss
from gvsl_zoo.models.backbone import pad_to_multiple
from gvsl_zoo.models.gemini import GEMINI, Deformer
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.models.xmorpher import XMorpher
from gvsl_zoo.pretrain import loop
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.pretrain.augment import damage
from gvsl_zoo.pretrain.config import PretrainConfig
from gvsl_zoo.pretrain.objective import Batch, tasks_of
from gvsl_zoo.pretrain.validate import validate

FILES = {2: ("gemini2d_state_dict.json", "gemini-unet-xray"), 3: ("gemini3d_state_dict.json", "gemini-unet-brain")}
SIZES = [(16, 20, 24), (24, 37)]
each_size = pytest.mark.parametrize("size", SIZES, ids=str)


def gemini(ndim=3, **settings):
    generator = torch.Generator().manual_seed(0)
    return GEMINI(UNet(ndim, 8, generator=generator), generator=generator, **settings).eval()


def pair(*size, batch=2, seed=1):
    return torch.rand(2, batch, 1, *size, generator=torch.Generator().manual_seed(seed))


def listed(ndim):
    """Names and shapes of the released tensors."""
    return json.loads((DATA / FILES[ndim][0]).read_text())


def settings(ndim=3, **changed):
    crop = {3: (16, 16, 16), 2: (32, 32)}[ndim]
    small = {"ndim": ndim, "crop": crop, "spacing_mm": 12.0, "save_every": 2, "warmup_steps": 2, "bf16": False}
    return PretrainConfig(**{"steps": 2, "objective": "gemini"} | small | changed)


def terms_of(model, fixed, moving, damaged=None, **changed):
    """The weighted terms of both updates of a step."""
    batch = Batch(fixed, fixed if damaged is None else damaged, moving, fixed[:, :0], fixed[:, :0])
    ndim = fixed.ndim - 2
    config = settings(ndim, crop=tuple(fixed.shape[2:]), **changed)
    return {name: t for task in tasks_of(model, config) for name, t in task(batch).items()}


# --- The released code --------------------------------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=[("g3cube", 3), ("g3odd", 3), ("g2square", 2), ("g2odd", 2)], ids=lambda case: case[0]
)
def run(request):
    """A case's name, its recorded numbers, images A and B, the module, and what it says of them."""
    case, ndim = request.param
    golden = recorded("official_gemini.npz", f"{case}/")
    model = GEMINI(UNet(ndim, device="meta"), convention="released", device="meta").to_empty(device="cpu")
    a, b = (image(f"{case}/{tag}", tuple(golden["shape"])) for tag in "AB")
    with torch.no_grad():
        return case, golden, a, b, fill(model).eval(), model(a, b)


def test_features_displacements_and_restoration_are_those_of_the_released_code(run):
    case, golden, a, _, model, match = run
    with torch.no_grad():
        restored = model.restore(a)
    found = {"f": match.f_fixed, "flow_AB": match.displacement_ab, "flow_BA": match.displacement_ba}
    for name, tensor in (found | {"restored": restored}).items():
        assert_as_recorded(tensor, golden, name, case + name)
    assert restoration_loss(restored, a).item() == pytest.approx(float(golden["loss_mse"]), rel=1e-4)


def test_losses_are_those_of_the_released_code(run):
    _, golden, a, b, model, match = run
    terms = gemini_terms(a, b, *match, resample=model.warp)
    for ours, theirs in (("ncc", "gvs"), ("smoothness", "smo"), ("deformation", "def")):
        assert getattr(terms, ours).item() == pytest.approx(float(golden[f"loss_{theirs}"]), rel=1e-4), ours
    assert terms.positive.item() == pytest.approx(terms.deformation.item(), rel=1e-6)


@pytest.mark.parametrize(("ndim", "count"), [(2, 8_033_059), (3, 24_080_708)])
def test_tensors_have_the_released_names_shapes_and_number(ndim, count):
    tensors = GEMINI(UNet(ndim, device="meta"), device="meta").state_dict()
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == listed(ndim)
    assert sum(tensor.numel() for tensor in tensors.values()) == count == model_info(FILES[ndim][1]).parameters


@pytest.mark.parametrize("ndim", [2, 3])
def test_a_released_file_becomes_a_model_for_every_task(ndim, tmp_path):
    state = {name: weight(name, shape) for name, shape in listed(ndim).items()}
    torch.save(state, tmp_path / "theirs.pth")
    convert(tmp_path / "theirs.pth", tmp_path / "ours.safetensors", name=FILES[ndim][1])
    for task in ("registration", "pretraining"):
        model = load(tmp_path / "ours.safetensors", task=task)
        assert isinstance(model, GEMINI) and model.load_report.unused == model.load_report.fresh == ()
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    backbone = load(tmp_path / "ours.safetensors")
    assert isinstance(backbone, UNet)
    assert torch.equal(backbone.inc.double_conv[0].bias, state["unet.inc.double_conv.0.bias"])


@each_size
def test_a_zero_displacement_is_the_identity_but_was_not_in_the_released_code(size):
    x, zero = pair(*size)[0], torch.zeros(2, len(size), *size)
    assert (gemini(len(size)).warp(x, zero) - x).abs().max() < 1e-5
    assert (gemini(len(size), convention="released").warp(x, zero) - x).abs().max() > 0.1


def test_an_unknown_convention_is_refused():
    with pytest.raises(ArgumentError, match='unknown convention \'old\'; use "correct" or "released"'):
        gemini(2, convention="old")


# --- The module ---------------------------------------------------------------------------------------------------


@each_size
def test_swapping_the_pair_swaps_the_answers_and_keeps_the_matching_loss(size):
    model, (fixed, moving) = gemini(len(size)), pair(*size)
    with torch.no_grad():
        there, back = model(fixed, moving), model(moving, fixed)
        before, after = terms_of(model, fixed, moving), terms_of(model, moving, fixed)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(there.f_fixed, back.f_moving, **close)
    torch.testing.assert_close(there.displacement_ab, back.displacement_ba, **close)
    torch.testing.assert_close(there.displacement_ba, back.displacement_ab, **close)
    assert not torch.allclose(there.displacement_ab, there.displacement_ba, **close)
    for name in ("ncc", "smoothness", "deformation", "positive"):
        assert before[name].item() == pytest.approx(after[name].item(), rel=1e-4), name


@each_size
def test_each_pair_of_a_batch_is_matched_on_its_own(size):
    model, (fixed, moving) = gemini(len(size)), pair(*size)
    with torch.no_grad():
        both = model(fixed, moving)
        single = [model(fixed[i : i + 1], moving[i : i + 1]) for i in range(2)]
        swapped, plain = (terms_of(model, f, m) for f, m in ((fixed.flip(0), moving.flip(0)), (fixed, moving)))
    for together, *apart in zip(both, *single, strict=True):
        torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4)
    for name, term in plain.items():
        assert swapped[name].item() == pytest.approx(term.item(), rel=1e-4), name


@pytest.mark.parametrize("size", [(5, 9, 7), (21, 16, 33), (16, 50), (3, 11)], ids=str)
def test_any_size_keeps_its_shape(size):
    model, (fixed, moving) = gemini(len(size)), pair(*size)
    with torch.no_grad():
        match = model(fixed, moving)
        restored = model.restore(fixed)
    assert match.f_fixed.shape == match.f_moving.shape == (2, 8, *size)
    assert match.displacement_ab.shape == match.displacement_ba.shape == (2, len(size), *size)
    assert restored.shape == fixed.shape


@pytest.mark.parametrize("size", [(5, 9, 8), (9, 14)], ids=str)
def test_the_deformer_sees_zeros_up_to_a_multiple_of_four(size):
    deformer, x = Deformer(len(size), 8).eval(), rnd("x", (1, 16, *size))
    for name, parameter in deformer.named_parameters():
        parameter.data = weight(name, parameter.shape)
    padded, front = pad_to_multiple(x, 4)
    assert all(edge % 4 == 0 for edge in padded.shape[2:]) and padded.shape != x.shape
    with torch.no_grad():
        whole = deformer(padded)
        part = whole[(..., *(slice(start, start + edge) for start, edge in zip(front, size, strict=True)))]
        assert torch.equal(deformer(x), part)


def test_bf16_features_do_not_make_bf16_geometry():
    model, (fixed, moving) = gemini(2), pair(32, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        match = model(fixed, moving)
    assert match.f_fixed.dtype == torch.bfloat16
    assert match.displacement_ab.dtype == match.displacement_ba.dtype == torch.float32


def test_images_on_different_grids_are_refused():
    with pytest.raises(ArgumentError, match=r"fixed image of shape .* with a moving one of .*; bring both to one grid"):
        gemini(2)(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 32))


# --- Gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("size", [(32, 32, 32), (32, 48)], ids=str)
def test_every_parameter_of_a_task_gets_a_gradient_from_it_and_no_other_does(size, bf16):
    fixed, moving = pair(*size)
    batch = Batch(fixed, moving, moving, fixed[:, :0], fixed[:, :0])
    model = gemini(len(size))
    learnt = set()
    for task in tasks_of(model, settings(len(size), crop=size, bf16=bf16)):
        model.zero_grad()
        sum(task(batch).values()).backward()
        own = {id(parameter) for parameter in task.parameters()}
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (id(parameter) in own), name
            assert parameter.grad is None or (parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0), name
        learnt |= own
    assert learnt == {id(parameter) for parameter in model.parameters()}


@each_size
def test_the_pull_on_features_does_not_reach_the_deformer(size):
    model = gemini(len(size))
    terms_of(model, *pair(*size))["positive"].backward()
    assert all(parameter.grad is None for parameter in model.deformer.parameters())
    assert model.unet.inc.double_conv[0].weight.grad.abs().max() > 0


@each_size
def test_the_pull_on_the_deformer_reaches_the_backbone_through_the_displacement_alone(size):
    model, (fixed, moving) = gemini(len(size)), pair(*size)
    model.deform = lambda f_a, f_b: model.deformer(torch.cat([f_a, f_b], 1).detach())
    terms_of(model, fixed, moving)["deformation"].backward()
    assert all(parameter.grad is None for parameter in model.unet.parameters())
    assert all(parameter.grad.abs().max() > 0 for parameter in model.deformer.parameters())


def test_terms_have_the_weights_of_the_paper_unless_told_otherwise():
    model, (fixed, moving) = gemini(2), pair(32, 32)
    with torch.no_grad():
        plain = gemini_terms(fixed, moving, *model(fixed, moving))._asdict()
        plain["restoration"] = restoration_loss(model.restore(moving), fixed)
        paper, other = (terms_of(model, fixed, moving, moving, **{name: s for name in plain}) for s in (1.0, 2.0))
    published = {"ncc": 1, "smoothness": 0.4, "deformation": 0.8, "positive": 0.8 * 0.1, "restoration": 100}
    assert pytest.approx(published) == GEMINI_WEIGHTS
    for name, term in plain.items():
        assert paper[name].item() == pytest.approx(GEMINI_WEIGHTS[name] * term.item(), rel=1e-5), name
        assert other[name].item() == pytest.approx(2 * paper[name].item(), rel=1e-5), name


def test_checkpointing_changes_no_gradient():
    gradients = []
    for enable in (False, True):
        model = gemini()
        model.set_grad_checkpointing(enable)
        sum(terms_of(model, *pair(16, 16, 16)).values()).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


# --- On an XMorpher -----------------------------------------------------------------------------------------------


def on_xmorpher(ndim):
    generator = torch.Generator().manual_seed(0)
    return GEMINI(XMorpher(ndim, 16, generator=generator), generator=generator)


@pytest.mark.parametrize("size", [(9, 20, 14), (37, 50)], ids=str)
def test_on_an_xmorpher_features_and_displacements_have_the_size_of_the_pair(size):
    model, (fixed, moving) = on_xmorpher(len(size)).eval(), pair(*size)
    with torch.no_grad():
        match = model(fixed, moving)
        restored = model.restore(moving)
    assert match.f_fixed.shape == match.f_moving.shape == (2, 8, *size)
    assert match.displacement_ab.shape == match.displacement_ba.shape == (2, len(size), *size)
    assert restored.shape == moving.shape


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("size", [(64, 32, 36), (64, 72)], ids=str)
def test_on_an_xmorpher_every_parameter_gets_a_gradient(size, bf16):
    model, (fixed, moving) = on_xmorpher(len(size)).eval(), pair(*size, batch=1)  # no path is dropped
    batch = Batch(fixed, moving, moving, fixed[:, :0], fixed[:, :0])
    changed = {"crop": size, "bf16": bf16, "backbone": "xmorpher", "width": 16}
    for task in tasks_of(model, settings(len(size), **changed)):
        sum(task(batch).values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


# --- A run --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[3, 2], ids=["3D", "2D"])
def trained(request, tmp_path_factory):
    """A finished run's axes, folder and module."""
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("runs") / "first try"
    return request.param, folder, loop.pretrain(settings(request.param), folder, device="cpu")


def test_a_run_logs_the_terms_of_both_updates_and_what_validation_measures(trained):
    ndim, folder, _ = trained
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for record in log:
        assert record["loss"] == pytest.approx(sum(record[term] for term in GEMINI_WEIGHTS), rel=1e-5)
        assert record["gradient"] > 0
    measured = {"ncc_before", "ncc_after", "dice_before", "dice_after", "folded", "psnr_restored", "bottleneck_sd"}
    assert measured <= log[-1].keys() and not {"dice_affine", "affine_sd"} & log[-1].keys()
    assert (folder / "curves.png").exists() and (folder / "pair.png").exists() == (ndim == 3)


def test_a_run_in_bf16_stays_finite(tmp_path):
    pytest.importorskip("accelerate")
    model = loop.pretrain(settings(2, bf16=True, backbone="xmorpher", width=16), tmp_path / "run", device="cpu")
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 2 and all(np.isfinite(list(record.values())).all() for record in log)
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in model.parameters())


def test_a_runs_folder_opens_for_every_task_and_says_what_it_is(trained):
    ndim, folder, model = trained
    entry = load(folder).entry
    assert (entry.name, entry.objective, entry.heads) == ("gemini-first-try", "gemini", ("deformer", "restoration"))
    assert "GEMINI" in entry.citation and "affine_width" not in entry.config
    for task in ("registration", "pretraining"):
        again = load(folder, task=task)
        assert isinstance(again, GEMINI) and again.state_dict().keys() == model.state_dict().keys()
        assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))
    x = torch.rand(1, 1, *(20, 24, 28)[:ndim])
    assert load(folder)(x).shape == (1, 8, *x.shape[2:])
    assert load(folder, task="segmentation", num_classes=3)(x).shape == (1, 3, *x.shape[2:])
    assert load(folder, task="classification", num_classes=2)(x).shape == (1, 2)


def test_a_saved_module_is_loaded_as_it_was(trained, tmp_path):
    _, folder, _ = trained
    model = load(folder, task="pretraining")
    save_pretrained(model, tmp_path / "saved")
    again = load(tmp_path / "saved", task="pretraining")
    assert again.entry.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


def test_both_updates_learn_from_one_pair():
    model, fixed = gemini(2), image("a", (32, 32))
    moving, damaged = fixed.roll(2, -1), damage(fixed, torch.Generator().manual_seed(0))
    batch = Batch(fixed, damaged, moving, fixed[:, :0], fixed[:, :0])
    optimizer, tasks = torch.optim.Adam(model.parameters(), lr=3e-3), tasks_of(model, settings(2))
    log = []
    for _ in range(80):
        log.append({})
        for task in tasks:
            terms = task(batch)
            sum(terms.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
            log[-1] |= {name: term.item() for name, term in terms.items()}
    for term, share in (("restoration", 0.3), ("ncc", 0.5), ("deformation", 0.5)):
        assert log[-1][term] < share * log[0][term], term


def test_validation_warps_the_moving_image_onto_the_fixed_one(monkeypatch):
    model = gemini()
    towards = []
    monkeypatch.setattr(model, "deform", lambda f_a, f_b: towards.append((f_a, f_b)) or torch.zeros(1, 3, 16, 16, 16))
    numbers = validate(model, settings())
    assert numbers["ncc_after"] == pytest.approx(numbers["ncc_before"], abs=1e-6)
    assert numbers["dice_after"] == numbers["dice_before"] and numbers["folded"] == 0
    assert len(towards) == 8


# --- Registration -------------------------------------------------------------------------------------------------


def scan(seed, mm=12.0):
    found = sample_subject((24, 24, 24), torch.Generator().manual_seed(seed), (mm,) * 3)
    return Volume(found.hu.round().to(torch.int16).numpy().transpose(2, 1, 0), np.diag([mm, mm, mm, 1.0]))


@pytest.mark.parametrize("trained", [3], indirect=True)
def test_registration_takes_the_way_from_the_moving_scan_to_the_fixed_one(trained, monkeypatch):
    _, folder, _ = trained
    model, fixed = load(folder, task="registration"), scan(1)
    shift = torch.tensor([0.0, 2.0, 0.0]).view(1, 3, 1, 1, 1)  # voxels along y
    both_ways = iter([-shift.expand(1, 3, 24, 24, 24), shift.expand(1, 3, 24, 24, 24)])
    there = torch.zeros(1, 3, 24, 24, 24)  # what is left once they are brought together
    monkeypatch.setattr(model, "deform", lambda f_a, f_b: next(both_ways, there))
    moving = Volume(np.roll(fixed.data, 2, 1), fixed.affine)
    monkeypatch.setattr("gvsl_zoo.inference.register.lay_over", lambda *_: Affine(np.eye(4)))
    found = register(moving, fixed, model)
    assert found.report["answer"] == "the model's matching heads" and found.report["ncc_after"] > 0.95
    np.testing.assert_allclose(found.displacement_mm.field_mm[4:-4, 4:-4, 4:-4].mean((0, 1, 2)), [0, 24, 0], atol=0.5)
    np.testing.assert_allclose(found.affine.matrix[:3, 3], [0, 24, 0], atol=0.5)


def test_a_trained_run_registers_two_scans(trained):
    ndim, folder, _ = trained
    if ndim == 2:
        with pytest.raises(VolumeError, match="a volume of 24 slices for a model of films"):
            register(scan(1), scan(2), load(folder, task="registration"))
        return
    found = register(scan(1), scan(2), load(folder, task="registration"), refine=6)
    assert found.report["ncc_after"] >= found.report["ncc_start"] and found.warped.shape == scan(2).shape
