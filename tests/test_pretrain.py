"""Pre-training: what a run writes, that it goes on bit for bit after an interruption, and that it learns."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch.utils._python_dispatch import TorchDispatchMode

from gvsl_zoo import load, recipes
from gvsl_zoo.cli import main
from gvsl_zoo.errors import ArgumentError, TrainingError, VolumeError
from gvsl_zoo.losses import local_ncc_loss, restoration_loss
from gvsl_zoo.models.gemini import GEMINI
from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.pretrain import learner, loop
from gvsl_zoo.pretrain import run as folder_of_a_run
from gvsl_zoo.pretrain.anatomy import sample_film, sample_subject, true_displacement
from gvsl_zoo.pretrain.config import PRESETS, PretrainConfig, settings_of
from gvsl_zoo.pretrain.data import (
    EASIEST_VARIATION,
    Numbers,
    Pair,
    Pairs,
    Scan,
    ScanPairs,
    StorePairs,
    SyntheticPairs,
    open_data,
    seeded,
)
from gvsl_zoo.pretrain.estimate import estimate, peak_memory
from gvsl_zoo.pretrain.objective import (
    Batch,
    GeminiMatching,
    GeminiRestoration,
    Pretraining,
    contrast_loss,
    known_error,
    located,
    make_batch,
    ncc_loss,
    nearest_of,
    poses,
    tasks_of,
)
from gvsl_zoo.pretrain.prepare import prepare_store
from gvsl_zoo.pretrain.run import Run, State
from gvsl_zoo.pretrain.store import Store
from gvsl_zoo.pretrain.validate import organ_dice, organs_of, psnr, validate
from gvsl_zoo.spatial import identity_grid
from gvsl_zoo.transfer import cases, finetune
from gvsl_zoo.transfer.config import FinetuneConfig

pytest.importorskip("accelerate")
CROP = (16, 16, 16)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TERMS = ("ncc", "smoothness", "restoration")
TINY = {"affine_width": 8, "crop": CROP, "spacing_mm": 12.0, "save_every": 2, "warmup_steps": 2, "bf16": False}
TINY["ramp_steps"] = 3000  # so that a step is the same in runs of any length
KNOWN = {"displacement": 0.1, "affine": 0.1, "contrast": 0.1}


def settings(steps=4, **changed):
    return PretrainConfig(steps=steps, **TINY | changed)


def train(folder, *args, **options):
    return loop.pretrain(settings(*args, **options), folder, device="cpu")


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(log):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in log]


def steps_saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").glob("[0-9]*"))


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def scans(*regions, size=(20, 18, 24)):
    """Scans whose intensity is their number: 0.1, 0.2, ..."""
    return [Scan(torch.full((1, *size), 0.1 * (i + 1)), region) for i, region in enumerate(regions)]


def subject(image):
    """Number of the scan that a crop came from."""
    return round(10 * image.max().item())


def batch(numbers=(0, 1), **changed):
    config = settings(**changed)
    pairs = Pairs(config, None, 1)
    return make_batch([pairs[k] for k in numbers], list(numbers), config, CPU)


def interrupt_after(monkeypatch, calls, error, task=Pretraining):
    """Let so many forward passes of a task through, then raise."""
    original, left = task.forward, iter(range(calls))

    def interrupted(*arguments):
        if next(left, None) is None:
            raise error
        return original(*arguments)

    monkeypatch.setattr(task, "forward", interrupted)


# --- What a run writes --------------------------------------------------------------------------------------


def test_a_run_logs_every_step_with_its_terms(tmp_path):
    model = train(tmp_path, 3)
    log = records(tmp_path)
    assert [record["step"] for record in log] == [1, 2, 3]
    for record in log:
        assert record["loss"] == pytest.approx(sum(record[term] for term in TERMS), rel=1e-5)
        assert record["gradient"] > 0 and record["seconds"] > 0
    for record in log[1:]:  # step 2: save_every; step 3: the last
        assert {"ncc_before", "ncc_after", "dice_before", "dice_affine", "dice_after", "folded"} <= record.keys()
        assert {"affine_sd", "bottleneck_sd", "mean_displacement", "psnr_restored"} <= record.keys()
    assert not model.training
    names = {"log.jsonl", "config.json", "checkpoints", "model.safetensors", "curves.png", "pair.png", ".lock"}
    names |= {"README.md", "LICENSE", "preprocessor_config.json", "registry.yaml", "tensorboard"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_runs_folder_opens_with_load(tmp_path):
    model = train(tmp_path / "my run", 2)
    again = load(tmp_path / "my run", task="pretraining")
    assert same(again.state_dict(), model.state_dict())
    assert again.entry.name == "gvsl-my-run" and "seed 0" in again.entry.training.recipe
    assert load(tmp_path / "my run", features_only=True).feature_info.channels() == [8, 16, 32, 64, 128]


def test_a_finished_run_can_be_listed_in_a_registry_and_has_a_card(tmp_path, monkeypatch):
    train(tmp_path / "mine", 2)
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(tmp_path / "mine" / "registry.yaml"))
    entry = load("gvsl-mine", task="registration").entry
    values = {result.metric: result.value for result in entry.evaluation}
    assert values["ncc_after"] == pytest.approx(records(tmp_path / "mine")[-1]["ncc_after"], abs=1e-4)
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "held-out synthetic pairs" in card and "not a medical device" in card and "learning_rate 0.002" in card


def test_tensorboard_has_every_step_once_after_a_resumption(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, KeyboardInterrupt("power cut"))
        with pytest.raises(KeyboardInterrupt, match="power cut"):
            train(tmp_path)
    train(tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4]


def test_averaged_weights_are_the_ones_that_are_kept(tmp_path):
    model = train(tmp_path, 3, ema=0.5)
    raw = Run(tmp_path, settings(3, ema=0.5)).latest().tensors["model"]
    assert same(load(tmp_path, task="pretraining").state_dict(), model.state_dict())
    assert not same(raw, model.state_dict())


def test_only_the_last_checkpoints_are_kept(tmp_path):
    train(tmp_path, 7, save_every=1, keep_last=3)
    assert steps_saved(tmp_path) == [5, 6, 7]


# --- Going on -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return train(folder, 6, ema=0.9).state_dict(), records(folder)


@pytest.mark.parametrize("calls", [1, 3, 5])
def test_an_interrupted_run_ends_bit_identical_to_an_uninterrupted_one(tmp_path, monkeypatch, uninterrupted, calls):
    with monkeypatch.context() as patch:
        interrupt_after(patch, calls, KeyboardInterrupt("power cut"))
        with pytest.raises(KeyboardInterrupt, match="power cut"):
            train(tmp_path, 6, ema=0.9)
    assert same(train(tmp_path, 6, ema=0.9).state_dict(), uninterrupted[0])
    assert untimed(records(tmp_path)) == untimed(uninterrupted[1])


@pytest.mark.parametrize(
    "changed",
    [
        {"accumulate": 2},
        {"batch_size": 2},
        KNOWN,
        {"objective": "no-affine"},
        {"backbone": "xmorpher", "width": 16},
        {"backbone": "xmorpher", "width": 16, "ndim": 2, "crop": (32, 32)},
    ],
    ids=str,
)
def test_every_kind_of_run_goes_on_bit_for_bit(tmp_path, monkeypatch, changed):
    whole = train(tmp_path / "whole", **changed).state_dict()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3 * changed.get("accumulate", 1), KeyboardInterrupt("power cut"))
        with pytest.raises(KeyboardInterrupt, match="power cut"):
            train(tmp_path / "cut", **changed)
    assert same(train(tmp_path / "cut", **changed).state_dict(), whole)


@pytest.mark.parametrize(
    ("task", "changed"),
    [(GeminiMatching, {}), (GeminiRestoration, {"ndim": 2, "crop": (32, 32), "accumulate": 2, "ema": 0.9})],
    ids=["3D", "2D"],
)
def test_a_run_of_gemini_goes_on_bit_for_bit_from_either_update(tmp_path, monkeypatch, task, changed):
    whole = train(tmp_path / "whole", objective="gemini", **changed).state_dict()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3 * changed.get("accumulate", 1), KeyboardInterrupt("power cut"), task)
        with pytest.raises(KeyboardInterrupt, match="power cut"):
            train(tmp_path / "cut", objective="gemini", **changed)
    assert same(train(tmp_path / "cut", objective="gemini", **changed).state_dict(), whole)
    assert untimed(records(tmp_path / "cut")) == untimed(records(tmp_path / "whole"))


def test_a_run_interrupted_while_saving_keeps_the_checkpoint_before(tmp_path, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        original = Path.rename

        def full_disk(path, target):
            if path.name == ".00000004.partial":
                raise OSError(28, "No space left on device")
            return original(path, target)

        patch.setattr(Path, "rename", full_disk)
        with pytest.raises(TrainingError, match=r"step 4 cannot be written .*No space left; free space|No space left"):
            train(tmp_path, 6, ema=0.9)
    assert steps_saved(tmp_path) == [2] and not list((tmp_path / "checkpoints").glob(".*"))
    assert same(train(tmp_path, 6, ema=0.9).state_dict(), uninterrupted[0])


@pytest.mark.parametrize("step", [2, 4])
def test_a_run_killed_behind_a_checkpoint_brings_its_model_where_load_looks(tmp_path, monkeypatch, step):
    def killed(run, path):
        if path.parent.name == f"{step:08d}":
            raise KeyboardInterrupt("power cut")
        return publish(run, path)

    publish = Run._publish
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_publish", killed)
        with pytest.raises(KeyboardInterrupt, match="power cut"):
            train(tmp_path, step, ema=0.9)
    found = train(tmp_path, step, ema=0.9)
    assert same(load(tmp_path, task="pretraining").state_dict(), found.state_dict())


def test_a_run_leaves_the_callers_generator_as_it_was(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(tmp_path, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pair_is_the_same_in_any_number_of_threads():
    config, before, drawn = settings(crop=(40, 52, 36)), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            drawn.append([Pairs(config, None, 1)[number] for number in range(3)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one.fixed, other.fixed) and torch.equal(one.moving, other.moving)


@pytest.mark.parametrize("damage", ["flipped", "short", "no state", "no model"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, uninterrupted, damage):  # T4
    train(tmp_path, 6, ema=0.9)
    newest = tmp_path / "checkpoints" / "00000006"
    target = newest / ("state.json" if damage == "no state" else "ema.safetensors")
    content = bytearray(target.read_bytes())
    content[-1] ^= 1
    target.unlink()
    if damage in ("flipped", "short"):
        target.write_bytes(content[: len(content) // (2 if damage == "short" else 1)])
    with pytest.warns(UserWarning, match="00000006 is passed over"):
        again = train(tmp_path, 6, ema=0.9)
    assert same(again.state_dict(), uninterrupted[0])


def test_damaged_checkpoints_that_were_passed_over_make_way_for_good_ones(tmp_path, monkeypatch):
    train(tmp_path, 6)
    assert steps_saved(tmp_path) == [4, 6]
    for path in (tmp_path / "checkpoints").glob("*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    interrupt_after(monkeypatch, 3, KeyboardInterrupt("power cut"))
    with pytest.warns(UserWarning, match="is passed over"), pytest.raises(KeyboardInterrupt, match="power cut"):
        train(tmp_path, 6)
    assert steps_saved(tmp_path) == [2] and Run(tmp_path, settings(6)).latest().step == 2


@pytest.mark.parametrize("call", [lambda run: run.log({"step": 1}), lambda run: run.truncate_log(0)])
def test_a_log_that_cannot_be_written_is_named(tmp_path, call):
    (tmp_path / "log.jsonl").mkdir()  # as good as a full disk
    with pytest.raises(
        TrainingError, match=r"the log cannot be written to .*: Is a directory; free space; the run goes"
    ):
        call(Run(tmp_path, settings()))


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch):
    train(tmp_path, 2)
    interrupt_after(monkeypatch, 0, AssertionError("it trained"))
    before = (tmp_path / "log.jsonl").read_text()
    train(tmp_path, 2)
    assert (tmp_path / "log.jsonl").read_text() == before


def test_a_finished_run_whose_log_is_lost_is_told_that_its_weights_are_whole(tmp_path):
    train(tmp_path, 1)
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(TrainingError, match=r"log\.jsonl is lost, .* \(model\.safetensors\) are whole and load; rest"):
        train(tmp_path, 1)


def test_a_run_goes_on_only_with_its_own_settings(tmp_path):  # T16
    train(tmp_path, 1)
    with pytest.raises(ArgumentError, match=r"other settings: steps 1 -> 2, learning_rate 0\.002 -> 0\.01; give"):
        train(tmp_path, 2, learning_rate=0.01)


def test_a_run_goes_on_only_with_as_many_pairs_a_step(tmp_path):  # T15
    train(tmp_path, 2)
    state = tmp_path / "checkpoints" / "00000002" / "state.json"
    state.write_text(state.read_text().replace('"pairs_a_step": 1', '"pairs_a_step": 2'))
    with pytest.raises(ArgumentError, match="took 2 pairs a step, these processes take 1"):
        train(tmp_path, 2)


def test_a_run_goes_on_with_as_many_pairs_a_step_dealt_otherwise_and_says_so(tmp_path, monkeypatch):
    train(tmp_path / "whole", batch_size=2)
    folder = tmp_path / "cut"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, KeyboardInterrupt("power cut"))
        with pytest.raises(KeyboardInterrupt, match="power cut"):
            train(folder, batch_size=2)
    with pytest.raises(ArgumentError, match="took 2 pairs a step, these processes take 3"):
        train(folder, batch_size=3)
    assert json.loads((folder / "config.json").read_text())["batch_size"] == 2
    train(folder, batch_size=1, accumulate=2)
    for ours, theirs in zip(records(folder), records(tmp_path / "whole"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    now = json.loads((folder / "config.json").read_text())
    assert (now["batch_size"], now["accumulate"]) == (1, 2)
    assert "batch_size 1, accumulate 2" in load(folder).entry.training.recipe


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path):  # T19
    train(tmp_path, 2)
    state = tmp_path / "checkpoints" / "00000002" / "state.json"
    state.write_text(state.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(TrainingError, match=r"was written by gvsl-zoo .*; upgrade"):
        train(tmp_path, 2)


def test_two_runs_in_one_folder_are_refused(tmp_path):  # T17
    with Run(tmp_path, settings()).locked(), pytest.raises(TrainingError, match="another run is writing"):
        train(tmp_path)


def test_another_seed_gives_another_run(tmp_path, uninterrupted):
    train(tmp_path, 1, seed=5)
    assert records(tmp_path)[0]["loss"] != uninterrupted[1][0]["loss"]


def test_a_run_does_not_depend_on_the_global_generator(tmp_path, uninterrupted):
    torch.manual_seed(99)
    train(tmp_path, 6, ema=0.9)
    assert [record["loss"] for record in records(tmp_path)] == [record["loss"] for record in uninterrupted[1]]


def test_pairs_drawn_ahead_by_workers_are_the_same(tmp_path, uninterrupted):
    loop.pretrain(settings(6, ema=0.9), tmp_path, device="cpu", workers=1)
    assert untimed(records(tmp_path)) == untimed(uninterrupted[1])


@pytest.fixture(params=[0, 1], ids=["at once", "a step behind"])
def behind(request, monkeypatch):
    """Numbers are read at once, as on the CPU, or while the next step runs, as on CUDA."""
    monkeypatch.setitem(learner.BEHIND, "cpu", request.param)
    return request.param


@pytest.mark.usefixtures("behind")
def test_a_loss_that_is_not_finite_stops_the_run_before_it_changes_a_weight(tmp_path, monkeypatch):  # T5
    original, spoil, made = Pretraining.forward, iter((1.0, 1.0, float("nan"), 1.0)), []
    monkeypatch.setattr(
        Pretraining, "forward", lambda *a: {k: v * f for f in [next(spoil)] for k, v in original(*a).items()}
    )
    make = loop.make_learner
    monkeypatch.setattr(loop, "make_learner", lambda *a: made.append(make(*a)) or made[0])
    with pytest.raises(
        TrainingError, match=r"loss became nan and its gradient nan at step 3; .*lower the learning rate"
    ):
        train(tmp_path)
    assert steps_saved(tmp_path) == [2] and len(records(tmp_path)) == 2
    saved = Run(tmp_path, settings()).latest().tensors
    assert all(same(made[0].snapshot()[part], saved[part]) for part in ("model", "optimizer"))
    assert all(tensor.isfinite().all() for tensor in saved["model"].values())


@pytest.mark.parametrize("task", [GeminiMatching, GeminiRestoration])
def test_a_loss_of_gemini_that_is_not_finite_stops_the_run_before_the_next_update(tmp_path, monkeypatch, task):
    original, spoil, made = task.forward, iter((1.0, 1.0, float("nan"), 1.0)), []
    monkeypatch.setattr(task, "forward", lambda *a: {k: v * f for f in [next(spoil)] for k, v in original(*a).items()})
    make = loop.make_learner
    monkeypatch.setattr(loop, "make_learner", lambda *a: made.append(make(*a)) or made[0])
    with pytest.raises(TrainingError, match="loss became nan and its gradient nan at step 3"):
        train(tmp_path, objective="gemini")
    assert steps_saved(tmp_path) == [2]
    saved = Run(tmp_path, settings(objective="gemini")).latest().tensors["model"]
    now = made[0].snapshot()["model"]
    assert {name.split(".")[0] for name in saved if not torch.equal(saved[name], now[name])} == (
        set() if task is GeminiMatching else {"unet", "deformer"}  # the update before was good
    )


@pytest.mark.usefixtures("behind")
def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(tmp_path, monkeypatch):
    original, steps = Pretraining.forward, iter(range(10))

    def spoiled(self, *arguments):
        zero = sum(p.sum() for p in self.model.parameters()) * 0  # finite, but the slope of its root is not
        return original(self, *arguments) | {"root": zero.sqrt() if next(steps) == 1 else zero}

    monkeypatch.setattr(Pretraining, "forward", spoiled)
    with pytest.raises(TrainingError, match=r"gradient (nan|inf) at step 2"):
        train(tmp_path)
    assert steps_saved(tmp_path) == []


@pytest.mark.parametrize("calls", [3, 6])
def test_numbers_that_are_read_a_step_behind_are_those_of_their_step(tmp_path, monkeypatch, uninterrupted, calls):
    monkeypatch.setitem(learner.BEHIND, "cpu", 1)
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        interrupt_after(patch, calls, KeyboardInterrupt("power cut"))
        train(tmp_path, 6, ema=0.9)
    assert same(train(tmp_path, 6, ema=0.9).state_dict(), uninterrupted[0])
    assert untimed(records(tmp_path)) == untimed(uninterrupted[1])


def test_a_run_may_start_from_weights_that_exist(tmp_path):
    start = GVSL(UNet(3, 8), affine_width=8)
    untouched = {name: tensor.clone() for name, tensor in start.state_dict().items()}
    loop.pretrain(settings(1, learning_rate=0), tmp_path, device="cpu", init=start)
    assert same(load(tmp_path, task="pretraining").state_dict(), untouched)
    with pytest.raises(
        ArgumentError,
        match="other tensors than a run of objective gvsl, ndim 3, backbone unet, width 8, affine_width 8",
    ):
        loop.pretrain(settings(1), tmp_path / "wide", device="cpu", init=GVSL(UNet(3, 16)))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"objective": "contrastive"}, "objective 'contrastive'"),
        ({"crop": (16, 16)}, r"crop \(16, 16\) with ndim 3"),
        ({"crop": (8, 16, 16)}, r"crop \(8, 16, 16\)"),
        ({"batch_size": 0}, "a count below 1"),
        ({"ema": 1.0}, "ema 1.0"),
        ({"learning_rate": -1.0}, r"learning_rate -1\.0"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"clip_norm": 0.0}, r"clip_norm 0\.0"),
        ({"warmup_steps": -1}, "warmup_steps -1"),
        ({"affine_width": 12}, "affine_width 12"),
        ({"affine_width": 0}, "affine_width 0"),
        ({"smoothness": -1.0}, r"smoothness -1\.0"),
        ({"contrast": float("inf")}, "contrast inf"),
        ({"ncc": float("nan")}, "ncc nan"),
        ({"spacing_mm": 0.0}, r"spacing_mm 0\.0"),
        ({"ramp_steps": -1}, "ramp_steps -1"),
        ({"synthetic_share": 2.0}, "synthetic_share 2.0"),
        ({"apart": -0.1}, "apart -0.1"),
        ({"views": 1.5}, "views 1.5"),
        ({"bent": 2.0}, "bent 2.0"),
        ({"scales": 0}, "scales 0"),
        ({"objective": "gemini", "scales": 2}, "scales with objective 'gemini'"),
        ({"unit": "grey"}, "unit 'grey' with ndim 3"),
        ({"objective": "gemini", "contrast": 0.1}, "contrast with objective 'gemini'"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(changed, match):
    with pytest.raises(ArgumentError, match=match):
        settings(**changed)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_settings(name):
    config = PretrainConfig(steps=10, **PRESETS[name])
    assert PretrainConfig.from_dict(json.loads(json.dumps(config.__dict__))) == config
    with pytest.raises(ArgumentError, match="unknown settings depth"):
        PretrainConfig.from_dict({"steps": 1, "depth": 5})


@pytest.mark.parametrize(
    ("kind", "name", "value", "wanted"),
    [
        (PretrainConfig, "bf16", "no", "true or false"),
        (PretrainConfig, "checkpointing", 1, "true or false"),
        (PretrainConfig, "batch_size", 1.5, "a whole number"),
        (PretrainConfig, "batch_size", True, "a whole number"),
        (PretrainConfig, "affine_width", 48.0, "a whole number or null"),
        (PretrainConfig, "learning_rate", "1/1000", "a number"),
        (PretrainConfig, "learning_rate", None, "a number"),
        (PretrainConfig, "ncc", True, "a number"),
        (PretrainConfig, "backbone", "resnet", "unet or xmorpher"),
        (PretrainConfig, "unit", "mm", "HU or arbitrary or grey or null"),
        (PretrainConfig, "crop", [16, 16, 16.5], "a list of whole numbers"),
        (PretrainConfig, "crop", [], "a list of whole numbers"),
        (FinetuneConfig, "model", 1, "text"),
        (FinetuneConfig, "crop", "large", "a whole number or a list of whole numbers or null"),
        (FinetuneConfig, "spacing_mm", [1, "2", 3], "a number or a list of numbers or null"),
        (FinetuneConfig, "seed", "x", "a whole number"),
    ],
    ids=str,
)
def test_a_setting_of_another_type_than_its_own_is_refused(kind, name, value, wanted):
    with pytest.raises(ArgumentError, match=rf"^{name} .* in the settings of a run; give {wanted}$"):
        kind.from_dict({"steps": 1, name: value})


def test_settings_of_their_own_types_are_taken():
    values = {
        "spacing_mm": [1, 2.5, 3],
        "crop": [8, 16, 24],
        "learning_rate": None,
        "layer_decay": 1,
        "task": "segmentation",
    }
    assert FinetuneConfig.from_dict({"steps": 1} | values).spacing_mm == (1, 2.5, 3)
    assert FinetuneConfig.from_dict({"steps": 1, "spacing_mm": 2, "crop": 32}).crop == 32
    assert PretrainConfig.from_dict({"steps": 1, "affine_width": None, "ema": 0}).affine_width is None


def test_numbers_are_read_as_json_and_as_python_write_them():
    texts = ("learning_rate=.001", "clip_norm=+5.", "ncc=1E-3", "batch_size=2", "bf16=False", "affine_width=null")
    config = settings_of(PRESETS["nano"], 1, {}, texts)
    assert (config.learning_rate, config.clip_norm, config.ncc) == (0.001, 5.0, 0.001)
    assert (config.batch_size, config.bf16, config.affine_width) == (2, False, None)


def test_the_ramp_is_a_quarter_of_the_run_and_at_most_3000_steps_unless_told_otherwise():
    assert [PretrainConfig(steps).steps_of_ramp for steps in (3, 1000, 12_000, 200_000)] == [0, 250, 3000, 3000]
    assert [PretrainConfig(1000, ramp_steps=steps).steps_of_ramp for steps in (0, 5000)] == [0, 5000]


def test_a_preset_becomes_one_for_films_unless_it_is():
    assert settings_of(PRESETS["base"], 1, {"ndim": 2}).crop == (256, 256)
    assert settings_of(PRESETS["gemini-xray"], 1, {"ndim": 2}) == settings_of(PRESETS["gemini-xray"], 1, {})
    assert settings_of(PRESETS["gemini-xray"], 1, {"crop": 64}).crop == (64, 64)
    brain = settings_of(PRESETS["gemini-brain"], 1, {"ndim": None, "crop": None}, ("synthetic_share=0.5",))
    assert (brain.ndim, brain.scan_unit, brain.batch_size, brain.synthetic_share) == (3, "arbitrary", 1, 0.5)


def test_a_run_goes_on_after_an_upgrade_that_brought_new_settings(tmp_path):
    whole = train(tmp_path, 2).state_dict()
    older = json.loads((tmp_path / "config.json").read_text())
    del older["unit"], older["positive"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert same(train(tmp_path, 2).state_dict(), whole)
    with pytest.raises(ArgumentError, match=r"other settings: positive 1\.0 -> 2\.0"):
        train(tmp_path, 2, positive=2.0)


def test_the_learning_rate_warms_up_and_ends_at_zero():
    rates = [learner.schedule(step, 1000, 10) for step in range(1001)]
    assert rates[0] == pytest.approx(1 / 10)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert max(rates) == pytest.approx(1, rel=1e-3)
    assert rates[500] == pytest.approx(1 / 2)
    assert rates[1000] == pytest.approx(0, abs=1e-12)


# --- Signals ------------------------------------------------------------------------------------------------


def test_the_first_interrupt_asks_to_stop_and_the_second_interrupts():  # T14
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with learner.stop_signals() as stop:
        assert not stop.asked
        signal.raise_signal(signal.SIGINT)
        assert stop.asked and stop.code == 130
        with pytest.raises(KeyboardInterrupt, match=r"^$"):
            signal.raise_signal(signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def signal_in_validation(monkeypatch):
    """SIGTERM comes while the first validation is under way."""
    original, calls = loop.validate, iter(range(10))

    def interrupted(*arguments):
        if next(calls) == 0:
            signal.raise_signal(signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(loop, "validate", interrupted)


def test_a_run_that_is_to_stop_while_it_validates_does_not_finish_that(tmp_path, monkeypatch, uninterrupted, behind):
    with monkeypatch.context() as patch:
        signal_in_validation(patch)
        with pytest.raises(SystemExit, match="143"):
            train(tmp_path, 6, ema=0.9)
    assert steps_saved(tmp_path) == [2] and "ncc_after" not in records(tmp_path)[1]
    assert same(train(tmp_path, 6, ema=0.9).state_dict(), uninterrupted[0])


def test_a_run_that_is_to_stop_at_its_end_ends(tmp_path, monkeypatch):
    signal_in_validation(monkeypatch)
    train(tmp_path, 2)
    assert "ncc_after" in records(tmp_path)[1] and (tmp_path / "README.md").exists()


# --- Processes ----------------------------------------------------------------------------------------------

WORKER = """\
import json, sys, torch
from pathlib import Path
from gvsl_zoo.pretrain.config import PretrainConfig
from gvsl_zoo.pretrain.loop import pretrain
torch.set_num_threads(1)
values = json.loads(sys.argv[2])
pretrain(PretrainConfig.from_dict(values), Path(sys.argv[1]), device="cpu", workers=int(sys.argv[3]))
"""


def values(steps, **changed):
    return json.dumps({"steps": steps} | TINY | changed)


def launch(tmp_path, folder, steps, processes=1, workers=0, **changed):
    (tmp_path / "worker.py").write_text(WORKER)
    call = [sys.executable]
    if processes > 1:
        call += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    call += [str(tmp_path / "worker.py"), str(folder), values(steps, **changed), str(workers)]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_for(folder, lines, process, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        log = folder / "log.jsonl"
        if log.exists() and log.read_text().count("\n") >= lines:
            return
        time.sleep(0.05)
    raise AssertionError(process.communicate()[0] if process.poll() is not None else "too slow")


@pytest.mark.slow
def test_two_processes_learn_as_one_with_the_doubled_batch(tmp_path):
    changed = {**KNOWN, "apart": 0.5}
    one = launch(tmp_path, tmp_path / "one", 4, batch_size=2, **changed)
    assert one.wait(120) == 0, one.stdout.read()
    two = launch(tmp_path, tmp_path / "two", 4, processes=2, **changed)
    assert two.wait(120) == 0, two.stdout.read()
    for ours, theirs in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for term in ("loss", *TERMS, *KNOWN):
            assert ours[term] == pytest.approx(theirs[term], rel=2e-3, abs=1e-4), (ours["step"], term)
        assert ours["gradient"] == pytest.approx(theirs["gradient"], rel=2e-2)


@pytest.mark.slow
def test_two_processes_learn_gemini_as_one_with_the_doubled_batch(tmp_path):
    changed = {"objective": "gemini", "clip_norm": 100.0}
    one = launch(tmp_path, tmp_path / "one", 4, batch_size=2, **changed)
    assert one.wait(120) == 0, one.stdout.read()
    two = launch(tmp_path, tmp_path / "two", 4, processes=2, **changed)
    assert two.wait(120) == 0, two.stdout.read()
    for ours, theirs in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for term in ("loss", "restoration", "smoothness"):
            assert ours[term] == pytest.approx(theirs[term], rel=2e-2, abs=1e-3), (ours["step"], term)


@pytest.mark.slow
def test_when_a_rank_is_killed_all_end_and_a_restart_goes_on(tmp_path):  # T9
    folder = tmp_path / "run"
    group = launch(tmp_path, folder, 400, processes=2)
    wait_for(folder, 4, group)
    os.kill(children(group)[-1], signal.SIGKILL)
    assert group.wait(60) != 0
    saved = steps_saved(folder)[-1]
    again = launch(tmp_path, folder, 400, processes=2)
    wait_for(folder, saved + 2, again)
    kill(again)
    assert [record["step"] for record in records(folder)][: saved + 2] == list(range(1, saved + 3))


def children(process):
    """Their ids."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    return [int(number) for number in found.stdout.split()]


def kill(launcher):
    """With its ranks, of which each leads a group of its own."""
    for number in (launcher.pid, *children(launcher)):
        os.kill(number, signal.SIGKILL)
    launcher.wait(30)


def gone(group, seconds=10):
    """Whether no process of a group is left."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"])
def test_a_signal_to_all_processes_of_a_run_saves_and_ends_it_with_its_code(tmp_path, number, code):  # T13, T14
    folder = tmp_path / "run"
    call = ["--out", folder, "--steps", 500, "--save-every", 400, "--workers", 2, *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "gvsl_zoo", "pretrain", *map(str, call)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for(folder, 3, process)
    assert len(children(process)) == 2
    os.killpg(process.pid, number)
    assert process.wait(25) == code
    assert gone(process.pid), "a worker outlived its run"
    assert steps_saved(folder) == [records(folder)[-1]["step"]]
    assert process.stdout.read() == ""


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["run", "worker"])
def test_when_a_run_or_its_worker_is_killed_nothing_stays_behind(tmp_path, victim):  # T7
    process = launch(tmp_path, tmp_path / "run", 500, workers=2)
    wait_for(tmp_path / "run", 3, process)
    os.kill(process.pid if victim == "run" else children(process)[0], signal.SIGKILL)
    assert process.wait(60) == (-signal.SIGKILL if victim == "run" else 1)
    assert gone(process.pid, 30)


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_processes_at_one_step_and_a_restart_goes_on(tmp_path):
    folder = tmp_path / "run"
    group = launch(tmp_path, folder, 500, processes=2, workers=1, save_every=400)
    wait_for(folder, 3, group)
    ranks = children(group)
    group.send_signal(signal.SIGTERM)
    assert group.wait(40) != 0
    assert len(ranks) == 2 and all(gone(rank) for rank in ranks), "each rank leads a group of its own"
    last = records(folder)[-1]["step"]
    assert steps_saved(folder) == [last]
    again = launch(tmp_path, folder, 500, processes=2, save_every=400)
    wait_for(folder, last + 1, again)
    kill(again)
    assert [record["step"] for record in records(folder)][: last + 1] == list(range(1, last + 2))


def test_a_launcher_that_shards_the_model_is_refused(tmp_path, monkeypatch):
    accelerate = pytest.importorskip("accelerate")
    kind = property(lambda _: accelerate.DistributedType.FSDP)
    monkeypatch.setattr(accelerate.Accelerator, "distributed_type", kind)
    with pytest.raises(ArgumentError, match=r"to shard the model \(FSDP\), and a run cannot; start it with torchrun"):
        train(tmp_path)


def test_the_settings_of_a_launcher_change_nothing(tmp_path, monkeypatch, uninterrupted):
    state = pytest.importorskip("accelerate.state").AcceleratorState
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    state._reset_state()  # else it remembers the precision of the tests before
    try:
        train(tmp_path, 1, ema=0.9)
    finally:
        state._reset_state()
    for name in ("loss", "gradient"):
        assert records(tmp_path)[0][name] == uninterrupted[1][0][name]


class Broken:
    """Scans that cannot be read."""

    def draw(self, generator):
        raise VolumeError("the store 'x' is damaged", "mend it")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_drawing_a_pair_arrives_as_it_is_with_its_cause_and_remedy(tmp_path, workers):
    with pytest.raises(VolumeError, match=r"^the store 'x' is damaged; mend it$") as caught:
        loop.pretrain(settings(synthetic_share=0.0), tmp_path, Broken(), device="cpu", workers=workers)
    assert (caught.value.cause, caught.value.remedy) == ("the store 'x' is damaged", "mend it")


def test_a_worker_that_was_killed_is_told_with_a_remedy(tmp_path):
    def kill(record):
        if record["step"] == 1:
            for worker in multiprocessing.active_children():
                worker.kill()

    with pytest.raises(TrainingError, match=r"draws ahead has died: .*give fewer --workers; --resume goes on from"):
        loop.pretrain(settings(500), tmp_path, device="cpu", workers=1, progress=kill)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), EOFError("Caught EOFError in DataLoader worker")])
def test_an_error_that_a_living_worker_met_is_not_taken_for_its_death(error):
    with pytest.raises(type(error), match=str(error)), learner.drawn([], Numbers(0, 1, 1, 1, 1, 0), 1, CPU):
        raise error


@pytest.mark.slow
def test_whenever_a_run_is_killed_its_last_checkpoint_loads(tmp_path):
    folder, settled = tmp_path / "run", PretrainConfig.from_dict(json.loads(values(5000, save_every=1)))
    saved = 0
    for delay in (0.0, 0.37):
        process = launch(tmp_path, folder, 5000, save_every=1)
        wait_for(folder, saved + 2, process)  # a step is logged, then saved
        time.sleep(delay)
        process.kill()
        process.wait(30)
        state = Run(folder, settled).latest()
        assert state.step >= saved and load(folder).load_report.loaded == 72
        saved = state.step


def test_fifty_kills_amid_saving_leave_a_whole_checkpoint(tmp_path):  # T1, T2
    run, tensors = Run(tmp_path, settings()), {"model": GVSL(UNet(3, 8), affine_width=8).state_dict()}
    entry = loop.describe(settings(), "run", GVSL(UNet(3, 8), affine_width=8))
    run.checkpoints.mkdir()
    started = time.monotonic()
    run.save(State(1, 1, tensors | {"optimizer": {}}, entry))
    one, newest = time.monotonic() - started, 1
    for delay in torch.rand(50, generator=torch.Generator().manual_seed(0)).tolist():
        child = os.fork()
        if child == 0:
            for step in range(newest + 1, newest + 1000):
                run.save(State(step, 1, tensors | {"optimizer": {}}, entry))
            os._exit(0)
        time.sleep(4 * one * delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        state = run.latest()
        assert state.step >= newest and same(state.tensors["model"], tensors["model"])
        newest = state.step
    assert newest > 10  # some came to an end
    with run.locked():
        assert not list(run.checkpoints.glob(".*"))


# --- Pairs and batches --------------------------------------------------------------------------------------


def test_a_pair_is_a_function_of_seed_and_number_alone():
    pairs = Pairs(settings(), None, 1)
    first, again = pairs[7], Pairs(settings(), None, 1)[7]
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.fixed, pairs[8].fixed) and not torch.equal(first.fixed, first.moving)
    assert not torch.equal(first.fixed, Pairs(settings(seed=1), None, 1)[7].fixed)


def test_processes_share_the_pairs_of_a_step_as_one_with_the_doubled_batch_would_take_them():
    one = list(Numbers(3, 5, 4, 2, 1, 0))
    two = [list(Numbers(3, 5, 2, 2, 2, rank)) for rank in range(2)]
    assert one == [[*a, *b] for a, b in zip(*two, strict=True)]
    assert one[0][0] == 3 * 8 and len(one) == len(Numbers(3, 5, 4, 2, 1, 0)) == 4


def test_one_pose_moves_all_three_images_of_a_pair():
    pair = Pairs(settings(), None, 1)[0]
    config = settings(damage_share=0.0)
    fixed, damaged, moving, *_ = make_batch([Pair(pair.fixed, pair.fixed, pair.anatomy, True)], [0], config, CPU)
    assert torch.equal(fixed, damaged) and torch.equal(fixed, moving)
    assert not torch.equal(fixed[0], pair.fixed)


def test_a_batch_is_three_different_images_in_the_unit_range():
    images = batch(damage_share=1.0)[:3]
    assert len({image.sum().item() for image in images}) == 3
    for image in images:
        assert image.shape == (2, 1, *CROP) and image.min() >= 0 and image.max() <= 1 + 1e-6


def test_a_pairs_place_in_the_batch_changes_nothing():
    together, alone = batch((3, 4))[:5], batch((4,))[:5]
    assert all(torch.equal(a[1:], b) for a, b in zip(together, alone, strict=True))


@pytest.mark.parametrize(("share", "real"), [(0.0, True), (1.0, False)])
def test_the_synthetic_share_decides_where_pairs_come_from(share, real):
    config = settings(synthetic_share=share, ramp_steps=0)
    pairs = Pairs(config, ScanPairs(scans("chest", "chest"), CROP), 1)
    assert {pairs[k].known for k in range(5)} == {not real}


def test_without_a_synthetic_share_every_pair_is_of_scans_from_the_first_step_on():
    pairs = Pairs(settings(synthetic_share=0.0), ScanPairs(scans("chest", "chest"), CROP), 1)
    assert not any(pairs[k].known for k in range(5))


def test_views_of_a_scan_come_in_the_share_of_scans_asked_for():
    config = settings(synthetic_share=0.0, ramp_steps=0, views=0.5)
    pairs = [Pairs(config, ScanPairs(scans("chest", "chest"), CROP), 1)[k] for k in range(40)]
    assert 10 < sum(pair.views for pair in pairs) < 30
    for pair in pairs:
        assert pair.known == pair.views == torch.equal(pair.fixed, pair.moving)
        assert pair.anatomy.is_contiguous()  # what repeats itself in memory cannot be pinned


def test_two_views_of_a_scan_show_the_same_where_their_anatomy_is_the_same(generator):
    image = F.interpolate(torch.rand(1, 1, 4, 4, 4, generator=generator), (32, 32, 32), mode="trilinear")[0]
    config = settings(crop=(32, 32, 32), damage_share=0.0, **KNOWN)
    pair = Pair(image, image, identity_grid(config.crop, image).expand(2, -1, -1, -1, -1), True, True)
    seen = make_batch([pair], [0], config, CPU)
    assert not torch.equal(seen.fixed, seen.moving)
    a, b = (anatomy[0].flatten(1).T for anatomy in (seen.anatomy_fixed, seen.anatomy_moving))
    distance, match = torch.cdist(a[:, :3], b[:, :3]).min(1)
    kept = (distance < 0.3) & (a[:, 3] > 0.99) & (b[match, 3] > 0.99)
    assert kept.sum() > 500
    difference = (seen.fixed.flatten()[kept] - seen.moving.flatten()[match[kept]]).abs()
    assert difference.mean() < 0.02 < 0.1 < (seen.fixed - seen.moving).abs().mean()


@pytest.mark.parametrize("crop", [CROP, (32, 24)])
def test_images_apart_have_a_pose_each_and_others_share_one(crop):
    n, image = len(crop), torch.zeros(1, *crop)
    pair = Pair(image, image, torch.zeros(2, n, *crop), False)
    for apart, count in ((0.0, 1), (1.0, 2)):
        config = settings(crop=crop, ndim=n, apart=apart)
        drawn = [poses(pair, config, seeded(CPU, k), CPU) for k in range(200)]
        assert {len(pose) for pose in drawn} == {count}
    shifts = torch.stack([(second - first).flatten(1).mean(1) for first, second in drawn]) / torch.tensor(crop)
    assert shifts.std(0).min() > 0.15 and shifts.mean(0).abs().max() < 0.05


def test_bent_images_are_a_function_of_those_that_they_were():
    plain, bent = batch(bent=0.0, damage_share=0.0), batch(bent=1.0, damage_share=0.0)
    for a, b in ((plain.fixed, bent.fixed), (plain.moving, bent.moving)):
        assert not torch.equal(a, b)
        for image, curved in zip(a.flatten(1), b.flatten(1), strict=True):
            steps = curved[image.argsort()].diff()
            assert (steps >= -1e-6).all() or (steps <= 1e-6).all()  # monotone: up, or down


@pytest.mark.parametrize("shape", [(16, 20, 24), (32, 40)])
def test_the_ncc_over_scales_is_the_mean_of_those_of_halved_images(generator, shape):
    a, b = torch.rand(2, 1, 1, *shape, generator=generator)
    assert torch.equal(ncc_loss(a, b, 1), local_ncc_loss(a, b))
    size = [n // 2 for n in shape]
    halves = [F.interpolate(x, size, mode="area") for x in (a, b)]
    assert ncc_loss(a, b, 2).item() == pytest.approx((local_ncc_loss(a, b) + local_ncc_loss(*halves)).item() / 2)
    assert ncc_loss(a, 2 * a, 3) < 1e-3


def test_the_task_hardens_over_the_ramp(monkeypatch):
    variations = []
    original = SyntheticPairs.subjects
    monkeypatch.setattr(SyntheticPairs, "subjects", lambda s, g, v: variations.append(v) or original(s, g, v))
    pairs = Pairs(settings(ramp_steps=10), None, 2)
    for number in (0, 1, 10, 20, 100):
        pairs[number]
    assert variations == pytest.approx([EASIEST_VARIATION] * 2 + [0.6, 1.0, 1.0])


def test_the_fixed_image_is_damaged_in_the_share_of_pairs_asked_for():
    for share in (0.0, 1.0):
        fixed, damaged, *_ = batch(damage_share=share)
        assert torch.equal(fixed, damaged) == (share == 0.0)


def test_gemini_matches_undamaged_images_and_damages_all_that_it_restores():
    fixed, damaged, *_ = batch(objective="gemini", damage_share=0.0)
    assert not any(torch.equal(a, b) for a, b in zip(fixed, damaged, strict=True))


def test_matching_alone_damages_nothing():
    fixed, damaged, *_ = batch(objective="matching", damage_share=1.0)
    assert torch.equal(fixed, damaged)


# --- Terms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "terms", "still"),
    [
        ("gvsl", TERMS, ()),
        ("restoration", ("restoration",), ("f_conv", "fc_", "sp_conv", "out_flow")),
        ("matching", ("ncc", "smoothness"), ("res_conv",)),
        ("no-affine", TERMS, ("f_conv", "fc_")),
    ],
)
def test_an_objective_has_its_terms_and_trains_its_heads(objective, terms, still):
    config = settings(objective=objective, damage_share=1.0)
    task = Pretraining(GVSL(UNet(3, 8), affine_width=8), config)
    found = task(batch(objective=objective, damage_share=1.0))
    assert set(found) == set(terms)
    sum(found.values()).backward()
    for name, parameter in task.model.named_parameters():
        trained = not name.startswith(still) if still else True
        assert parameter.requires_grad == trained, name
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == trained, name


def test_without_the_affine_head_the_affine_is_the_identity():
    task = Pretraining(GVSL(UNet(3, 8), affine_width=8), settings(objective="no-affine"))
    images = batch()
    affine = task.model(images.fixed, images.moving).affine
    assert torch.equal(affine, torch.eye(3, 4).expand(2, 3, 4))


def test_weights_of_terms_scale_them():
    model = GVSL(UNet(3, 8), affine_width=8)
    changed = {"ncc": 2.0, "smoothness": 3.0, "restoration": 4.0}
    plain = Pretraining(model, settings())(batch())
    scaled = Pretraining(model, settings(**changed))(batch())
    for name, factor in changed.items():
        assert scaled[name].item() == pytest.approx(factor * plain[name].item(), rel=1e-5)


def test_known_terms_reach_the_heads_that_they_supervise():
    config = settings(ncc=0.0, smoothness=0.0, restoration=0.0, **KNOWN)
    task = Pretraining(GVSL(UNet(3, 8), affine_width=8), config)
    terms = task(batch(**KNOWN))
    assert terms.keys() >= KNOWN.keys()
    for name, part in (("affine", "fc_rot"), ("displacement", "out_flow"), ("contrast", "unet.up4")):
        task.zero_grad()
        terms[name].backward(retain_graph=True)
        module = task.model.get_submodule(part)
        assert sum(p.grad.abs().sum() for p in module.parameters() if p.grad is not None) > 0, name


def subjects(shape=(32, 32, 32)):
    generator = torch.Generator().manual_seed(3)
    return [sample_subject(shape, generator, (10.0,) * 3, 0.4) for _ in range(2)]


def anatomies(pair):
    return [torch.cat([s.canonical * 40, torch.ones(1, *s.hu.shape)])[None] for s in pair]


def test_the_known_error_of_the_true_displacement_is_nearly_nothing():
    fixed, moving = subjects()
    truth = true_displacement(fixed, moving)[None]
    right = known_error(*anatomies((fixed, moving)), truth)
    assert right < 0.01 < 0.1 < known_error(*anatomies((fixed, moving)), torch.zeros_like(truth))


def test_the_known_error_says_nothing_where_nothing_is_known():
    fixed, moving = anatomies(subjects())
    fixed[:, -1] = 0
    assert known_error(fixed, moving, torch.zeros(1, 3, 32, 32, 32)) == 0


def test_contrast_is_small_for_features_that_are_the_anatomy_and_large_for_noise(generator):
    fixed, moving = anatomies(subjects())

    def waves(anatomy):
        phases = torch.cat([anatomy[:, :3] * frequency for frequency in (0.2, 0.5, 1.0)], 1)
        return torch.cat([phases.sin(), phases.cos()], 1)

    points = torch.randint(32**3, (1, 256), generator=generator)
    right = contrast_loss(waves(fixed), waves(moving), fixed, moving, points)
    noise = torch.randn(2, 1, 18, 32, 32, 32, generator=generator)
    assert right < 2.0 < contrast_loss(noise[0], noise[1], fixed, moving, points)
    fixed[:, -1] = 0
    assert contrast_loss(waves(fixed), waves(moving), fixed, moving, points) == 0


@pytest.mark.parametrize("offset", [0.0, 3000.0])
def test_the_nearest_of_many_is_found_wherever_the_origin_lies(generator, offset):
    others = offset + 20 * torch.rand(3, 5000, generator=generator)
    points = offset + 20 * torch.rand(3, 200, generator=generator)
    counted = torch.rand(5000, generator=generator) < 0.7
    away = (points.double()[:, :, None] - others.double()[:, None]).norm(dim=0).masked_fill(~counted, torch.inf)
    distance, match = nearest_of(points, others, counted)
    assert torch.equal(match, away.argmin(1))
    torch.testing.assert_close(distance.double(), away.amin(1), atol=2e-3, rtol=0)


def test_at_the_border_a_place_in_the_anatomy_is_not_drawn_towards_the_origin():
    config = settings(crop=(32, 32, 32), damage_share=0.0, **KNOWN)
    places, image = 1000 + identity_grid(config.crop, torch.zeros(1)), torch.zeros(1, *config.crop)
    seen = make_batch([Pair(image, image, places.expand(2, -1, -1, -1, -1), True)] * 40, list(range(40)), config, CPU)
    found, known = located(seen.anatomy_fixed)
    shares = seen.anatomy_fixed[:, -1:][known]
    assert (shares < 1 - 1e-3).any()  # the border is among them
    assert found.masked_select(known).min() > 999.99


@pytest.mark.parametrize("changed", [KNOWN, {"objective": "gemini"}], ids=str)
def test_the_terms_of_a_batch_are_the_means_of_those_of_its_pairs(changed):
    config = settings(**changed)
    torch.manual_seed(0)
    model = loop.build(config, None).eval()
    pairs = [Pairs(config, None, 1)[number] for number in range(3)]
    pairs[2] = pairs[2]._replace(known=False)
    together, *alone = ([pairs, [0, 1, 2]], *([[pair], [number]] for number, pair in enumerate(pairs)))
    for task in tasks_of(model, config):
        terms, *single = (task(make_batch(*given, config, CPU)) for given in (together, *alone))
        for name, term in terms.items():
            assert term.item() == pytest.approx(sum(one[name].item() for one in single) / 3, rel=1e-4), name


# --- Validation ---------------------------------------------------------------------------------------------


def test_validation_is_the_same_each_time_and_leaves_the_module_alone():
    model = GVSL(UNet(3, 8), affine_width=8).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = validate(model, settings())
    assert first == validate(model, settings()) and same(model.state_dict(), before)
    assert 0 <= first["folded"] <= 1 and 0 < first["dice_before"] < 1 and first["psnr_damaged"] > 0


def test_a_validation_in_a_hurry_gives_nothing():
    answers = iter((False, False, True))
    assert validate(GVSL(UNet(3, 8), affine_width=8).eval(), settings(), lambda: next(answers)) == {}


def test_the_picture_of_a_long_run_takes_some_of_its_records_and_all_validations(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "curves_picture", lambda log, *_, **__: seen.extend(log))
    monkeypatch.setattr(loop, "draw_validation", lambda *_: None)
    lines = [{"step": k, "loss": 1.0} | ({"ncc_after": 0.5} if k % 1000 == 0 else {}) for k in range(1, 50_001)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    loop.draw_run(GVSL(UNet(3, 8), affine_width=8), settings(), tmp_path)
    assert 1000 < len(seen) <= loop.CURVE_RECORDS + 50
    assert [record["step"] for record in seen if "ncc_after" in record] == list(range(1000, 50_001, 1000))


def test_a_dead_affine_head_shows():
    model = GVSL(UNet(3, 8), affine_width=8).eval()
    alive = validate(model, settings())["affine_sd"]
    for head in (model.fc_rot, model.fc_scl, model.fc_trans, model.fc_shear):
        torch.nn.init.zeros_(head.weight)
    assert validate(model, settings())["affine_sd"] == 0 < alive


def test_dice_and_psnr_are_what_they_are_called():
    for draw, shape in ((sample_subject, (32, 32, 32)), (sample_film, (64, 64))):
        organs = organs_of(draw(shape, torch.Generator().manual_seed(0)))[None]
        assert organ_dice(organs, organs) == 1 and organ_dice(organs, torch.zeros_like(organs)) == 0
        assert organs.shape == (1, organs.shape[1], *shape) and organs.dtype == torch.bool
    half = torch.zeros(1, 1, 10, 20, dtype=torch.bool)
    half[..., :10] = True
    assert organ_dice(half, half.roll(5, -1)) == pytest.approx(0.5)
    assert psnr(torch.full((4,), 0.1), torch.zeros(4)) == pytest.approx(20)


# --- Scans --------------------------------------------------------------------------------------------------


def test_a_run_on_scans_alone_learns_from_them(tmp_path):
    noise = torch.Generator().manual_seed(0)
    given = ScanPairs([Scan(torch.rand(1, 20, 20, 20, generator=noise), "chest") for _ in range(2)], CROP)
    loop.pretrain(settings(1, synthetic_share=0.0, ramp_steps=0), tmp_path, given, device="cpu")
    assert all(torch.tensor(records(tmp_path)[0][term]).isfinite() for term in TERMS)


def test_a_synthetic_pair_is_two_different_subjects_in_the_unit_range():
    pair = Pairs(settings(), None, 1)[0]
    assert pair.fixed.shape == pair.moving.shape == (1, *CROP) and pair.anatomy.shape == (2, 3, *CROP)
    for image in (pair.fixed, pair.moving):
        assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.05


def test_a_pair_of_scans_is_two_different_subjects_of_one_region(generator):
    pairs = ScanPairs(scans("chest", "head", "chest", "head", "chest", "leg"), CROP)
    drawn = {tuple(map(subject, pairs.draw(generator))) for _ in range(200)}
    chest, head = (1, 3, 5), (2, 4)
    assert drawn == {(a, b) for group in (chest, head) for a in group for b in group if a != b}


@pytest.mark.parametrize("size", [(20, 18, 24), (16, 16, 16), (9, 40, 3)], ids=str)
def test_crops_of_scans_have_the_size_asked_for(generator, size):
    for image in ScanPairs(scans("a", "a", size=size), CROP).draw(generator):
        assert image.shape == (1, *CROP)
        inside = torch.tensor(size).clamp_max(16).prod().item()
        assert (image > 0).sum() == inside  # air only where the scan ends


def test_crops_of_a_pair_come_from_about_the_same_place(generator):
    ramp = torch.linspace(0, 1, 216)[None, :, None, None].expand(1, -1, 16, 16)
    pairs = ScanPairs([Scan(ramp, "a"), Scan(ramp.clone(), "a")], CROP)
    starts = torch.tensor([[image[0, 0, 0, 0].item() for image in pairs.draw(generator)] for _ in range(100)])
    assert (starts[:, 0] - starts[:, 1]).abs().max() <= 0.1 * 200 / 215 + 0.01  # twice POSITION_JITTER of the play
    assert starts[:, 0].max() - starts[:, 0].min() > 0.5


@pytest.mark.parametrize("regions", [("chest",), ("chest", "head", "leg")])
def test_scans_without_two_of_one_region_are_refused(regions):
    with pytest.raises(ArgumentError, match=rf"{len(regions)} scans, no two of one region; pairs need different"):
        ScanPairs(scans(*regions), CROP)


@pytest.mark.slow
def test_a_short_training_learns_to_restore_images_it_has_not_seen(tmp_path):
    config = settings(120, save_every=1000, warmup_steps=5, learning_rate=3e-3, damage_share=1.0)
    unseen: Batch = batch(tuple(range(8)), seed=123, damage_share=1.0)

    def error_after(steps):
        model = loop.pretrain(replace(config, steps=steps), tmp_path / str(steps), device="cpu")
        with torch.no_grad():
            return restoration_loss(model(unseen.damaged, unseen.moving).restored, unseen.fixed)

    after = error_after(config.steps)
    assert after < 0.5 * error_after(1)
    assert after < 0.8 * restoration_loss(unseen.damaged, unseen.fixed)


@pytest.mark.gpu
def test_a_run_on_a_gpu_logs_finite_terms(tmp_path):
    loop.pretrain(settings(2), tmp_path, device="cuda")
    assert all(torch.tensor([record[term] for term in TERMS]).isfinite().all() for record in records(tmp_path))


class Waits(TorchDispatchMode):
    """Notes what would make a GPU's host wait: reading values, shapes that depend on values, copies of host numbers."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh")

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = args[1] if function is torch.ops.aten.index.Tensor else ()
        chosen = any(isinstance(mask, torch.Tensor) and mask.dtype == torch.bool for mask in masks)
        if chosen or any(name in str(function) for name in self.OPERATIONS):
            self.noted.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("changed", [{}, {"displacement": 0.1, "affine": 0.1}, {"objective": "restoration"}], ids=str)
def test_the_forward_and_backward_pass_of_a_batch_never_wait_for_its_numbers(changed):
    task, given = Pretraining(GVSL(UNet(3, 8), affine_width=8), settings(**changed)), batch(**changed)
    with Waits() as waits:
        sum(task(given).values(), torch.zeros(())).backward()
    assert waits.noted == []


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_nothing(tmp_path, monkeypatch):
    forward_backward, validate = loop.forward_backward, loop.validate

    def strict(*arguments):  # from the third step on: the first ones set up
        torch.cuda.set_sync_debug_mode("error" if arguments[-1] > 1 else "default")
        return forward_backward(*arguments)

    def lenient(*arguments):
        torch.cuda.set_sync_debug_mode("default")
        return validate(*arguments)

    monkeypatch.setattr(loop, "forward_backward", strict)
    monkeypatch.setattr(loop, "validate", lenient)
    try:
        loop.pretrain(settings(6, save_every=100, ema=0.9, damage_share=1.0), tmp_path, device="cuda", workers=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 7))


@pytest.mark.gpu
def test_pairs_are_posed_and_damaged_alike_on_every_device():
    config = settings(damage_share=1.0, **KNOWN)
    pairs = [Pairs(config, None, 1)[number] for number in (0, 1)]
    here, there = (make_batch(pairs, [0, 1], config, device) for device in (CPU, CUDA))
    for ours, theirs in zip(here[:5], there[:5], strict=True):
        assert (ours - theirs.cpu()).abs().mean() < 1e-3


# --- Stores ---------------------------------------------------------------------------------------------------------


def put_scans(folder, names, shape=(20, 18, 24), spacing=12.0):
    """Scans of HU that are their number, 100 times: file i holds 100 (i + 1)."""
    folder.mkdir(parents=True)
    for i, name in enumerate(names):
        data = np.full(shape, 100 * (i + 1), np.int16)
        data[:2] = -1000
        nib.save(nib.Nifti1Image(data, np.diag([spacing] * 3 + [1])), folder / f"{name}.nii.gz")


def number(image):
    """Which scan a crop came from: the value of its brightest voxels."""
    return round((image.max().item() * 2048 - 1024) / 100)


@pytest.fixture
def store(tmp_path):
    """Five scans of three subjects in two strata: 1, 2 (a) and 3 (b) of the chest, 4 (c) and 5 (d) of the head."""
    names = ["one", "two", "three", "four", "five"]
    put_scans(tmp_path / "scans", names)
    rows = ["path,subject,stratum"]
    rows += [f"{n}.nii.gz,{s},{t}" for n, s, t in zip(names, "aabcd", ["chest"] * 3 + ["head"] * 2, strict=True)]
    (tmp_path / "table.csv").write_text("\n".join(rows))
    prepare_store(tmp_path / "scans", tmp_path / "store", spacing_mm=12.0, table=tmp_path / "table.csv")
    return Store(tmp_path / "store")


def test_pairs_of_a_store_are_two_subjects_of_one_stratum(store, generator):
    pairs = StorePairs(store, CROP, 12.0)
    drawn = {tuple(map(number, pairs.draw(generator))) for _ in range(300)}
    assert drawn == {(1, 3), (2, 3), (3, 1), (3, 2), (4, 5), (5, 4)}


@pytest.mark.parametrize("crop", [(16, 16, 16), (32, 16, 40)], ids=str)
def test_crops_of_a_store_have_the_size_asked_for_with_air_where_scans_end(store, generator, crop):
    for image in StorePairs(store, crop, 12.0).draw(generator):
        assert image.shape == (1, *crop) and image.dtype == torch.float32
        inside = np.prod([min(c, s) for c, s in zip(crop, (24, 18, 20), strict=True)])
        assert (image > 0.4).sum() >= 0.8 * inside and (image > 0).sum() <= inside


def test_a_store_for_other_settings_is_refused(store, tmp_path):
    with pytest.raises(ArgumentError, match=r"a store of 3D volumes of 12.0 mm .* with --ndim 3 --spacing-mm 4"):
        StorePairs(store, CROP, 4.0)
    put_scans(tmp_path / "single", ["only"])
    prepare_store(tmp_path / "single", tmp_path / "alone", spacing_mm=12.0)
    with pytest.raises(ArgumentError, match="1 volumes, no two subjects of one stratum"):
        StorePairs(Store(tmp_path / "alone"), CROP, 12.0)


def test_a_run_on_mr_says_so_and_a_store_of_another_unit_is_refused(tmp_path):
    put_scans(tmp_path / "scans", ["one", "two"])
    prepare_store(tmp_path / "scans", tmp_path / "mr", spacing_mm=12.0, unit="arbitrary")
    with pytest.raises(ArgumentError, match=r"of the unit 'arbitrary' for a run on 'HU'; say it: --set unit=arbitrary"):
        open_data(str(tmp_path / "mr"), settings(), None)
    config = settings(1, objective="gemini", unit="arbitrary", synthetic_share=0.0, ramp_steps=0)
    loop.pretrain(config, tmp_path / "run", open_data(str(tmp_path / "mr"), config, None), device="cpu")
    entry = load(tmp_path / "run", task="registration").entry
    assert (entry.modality, entry.input.intensity.unit, entry.objective) == ("MR", "arbitrary", "gemini")


def test_a_run_on_a_store_goes_on_bit_for_bit(store, tmp_path, monkeypatch):
    def run(folder):
        config = settings(synthetic_share=0.0, ramp_steps=0)
        return loop.pretrain(
            config, tmp_path / folder, StorePairs(store, CROP, 12.0), device="cpu", workers=1
        ).state_dict()

    whole = run("whole")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3, KeyboardInterrupt("power cut"))
        with pytest.raises(KeyboardInterrupt, match="power cut"):
            run("cut")
    assert same(run("cut"), whole)


def test_a_run_goes_on_only_with_the_data_that_it_learned_from(store, tmp_path):
    folder, own = tmp_path / "run", StorePairs(store, CROP, 12.0)
    put_scans(tmp_path / "more", ["one", "two"])
    prepare_store(tmp_path / "more", tmp_path / "other", spacing_mm=12.0)
    other = StorePairs(Store(tmp_path / "other"), CROP, 12.0)
    refused = pytest.raises(ArgumentError, match=r"learned from other data; give the same --data; .* with --init RUN")

    def run(real, folder=folder):
        return loop.pretrain(settings(1), folder, real, device="cpu")

    run(own)
    for real in (None, other):
        with refused:
            run(real)
    run(StorePairs(Store(store.path), CROP, 12.0))
    run(ScanPairs(scans("a", "a"), CROP))  # of which nothing tells what they are
    state = folder / "checkpoints" / "00000001" / "state.json"
    facts = json.loads(state.read_text())
    assert facts.pop("data") == store.fingerprint
    state.write_text(json.dumps(facts))  # as an earlier version wrote it
    run(other)
    run(None, tmp_path / "synthetic")
    with refused:
        run(own, tmp_path / "synthetic")


# --- Films ---------------------------------------------------------------------------------------------------------

FLAT = {"ndim": 2, "crop": (32, 32), "spacing_mm": 12.0}


@pytest.mark.parametrize("changed", [{}, KNOWN, {"objective": "restoration"}], ids=str)
def test_a_run_on_films_learns_and_opens(tmp_path, changed):
    model = train(tmp_path / "films", 2, **FLAT, **changed)
    log = records(tmp_path / "films")
    assert all(torch.tensor(list(record.values())).isfinite().all() for record in log)
    assert 0 < log[-1]["dice_before"] < 1 and log[-1]["affine_sd"] >= 0
    again = load(tmp_path / "films", task="pretraining")
    assert same(again.state_dict(), model.state_dict()) and again.entry.ndim == 2
    assert load(tmp_path / "films")(torch.rand(1, 1, 40, 50)).shape == (1, 8, 40, 50)


def test_every_parameter_learns_from_films():
    task = Pretraining(GVSL(UNet(2, 8), affine_width=8), settings(**FLAT, damage_share=1.0))
    sum(task(batch(**FLAT, damage_share=1.0)).values()).backward()
    assert [name for name, p in task.model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_known_error_of_two_films_is_nearly_nothing_at_the_true_displacement():
    generator = torch.Generator().manual_seed(1)
    fixed, moving = (sample_film((64, 64), generator, (5.0, 5.0), 0.4) for _ in range(2))
    anatomy = [torch.cat([film.canonical * 80, torch.ones(1, 64, 64)])[None] for film in (fixed, moving)]
    truth = true_displacement(fixed, moving)[None]
    assert known_error(*anatomy, truth) < 0.02 < known_error(*anatomy, torch.zeros_like(truth))


# --- The command ----------------------------------------------------------------------------------------------------


def command(*args):
    return CliRunner().invoke(main, ["pretrain", *map(str, args)])


SMALL = ["--crop", 16, "--set", "spacing_mm=12.0", "--set", "affine_width=8", "--set", "bf16=false", "--device", "cpu"]


def test_the_command_trains_resumes_and_says_what_it_made(tmp_path):
    first = command("--out", tmp_path / "run", "--steps", 2, "--save-every", 1, "--workers", 0, *SMALL, "--json")
    assert first.exit_code == 0, first.output
    facts = json.loads(first.stdout)
    assert facts["step"] == 2 and load(facts["weights"]).entry.name == "gvsl-run"
    again = command("--out", tmp_path / "run", "--steps", 2, "--save-every", 1, *SMALL)
    assert again.exit_code == 2 and "holds a run; add --resume" in again.stderr
    resumed = command("--out", tmp_path / "run", "--steps", 2, "--save-every", 1, "--resume", *SMALL)
    assert resumed.exit_code == 0, resumed.output


def test_the_command_trains_on_a_store_and_from_a_model(store, tmp_path):
    train(tmp_path / "start", 1)
    result = command(
        *("--data", store.path, "--out", tmp_path / "run", "--steps", 1, "--init", tmp_path / "start"), *SMALL
    )
    assert result.exit_code == 0, result.output


def test_the_command_takes_a_folder_of_scans_as_it_is(tmp_path):
    put_scans(tmp_path / "scans", ["one", "two"])
    dry = command("--data", tmp_path / "scans", "--out", tmp_path / "run", "--steps", 1, "--dry-run", *SMALL)
    assert dry.exit_code == 2 and "is no store, and a dry run writes none; run gvsl-zoo prepare first" in dry.stderr
    result = command("--data", tmp_path / "scans", "--out", tmp_path / "run", "--steps", 1, *SMALL)
    assert result.exit_code == 0, result.output
    assert len(Store(tmp_path / "run" / "store")) == 2


def test_the_command_trains_an_xmorpher(tmp_path):
    result = command("--backbone", "xmorpher", "--out", tmp_path / "run", "--steps", 1, *SMALL)
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "run").entry.config == {"ndim": 3, "width": 16, "affine_width": 8}


def test_the_command_trains_on_films(tmp_path):
    result = command("--ndim", 2, "--out", tmp_path / "run", "--steps", 1, *SMALL)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "run" / "config.json").read_text())["crop"] == [16, 16]


def test_the_command_trains_gemini_by_a_preset(tmp_path):
    for preset, axes in (("gemini-brain", 3), ("gemini-xray", 2)):
        call = ["--preset", preset, "--set", "width=8", "--out", tmp_path / preset, "--steps", 1, *SMALL]
        result = command(*call)
        assert result.exit_code == 0, result.output
        found = load(tmp_path / preset, task="pretraining")
        assert isinstance(found, GEMINI) and found.unet.ndim == axes
        resumed = command(*call, "--resume")
        assert resumed.exit_code == 0, resumed.output


def test_the_command_trains_by_a_recipe(tmp_path):
    call = [
        "--recipe",
        "gvsl-unet-ct-nano-contrast",
        "--batch-size",
        1,
        "--out",
        tmp_path / "run",
        "--steps",
        1,
        *SMALL,
    ]
    result = command(*call)
    assert result.exit_code == 0, result.output
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    made = asdict(recipes.read_recipe("gvsl-unet-ct-nano-contrast").settings)
    changed = {"steps": 1, "batch_size": 1, "crop": [16, 16, 16], "spacing_mm": 12.0, "affine_width": 8, "bf16": False}
    changed["ramp_steps"] = 0  # a third of the run
    assert settings == json.loads(json.dumps(made)) | changed
    resumed = command(*call, "--resume")
    assert resumed.exit_code == 0, resumed.output


@pytest.mark.parametrize(
    "name, given, run, start",
    [
        ("gvsl-unet-ct-nano-contrast", None, "settings", None),
        ("gvsl-unet-ct-nano", None, "settings", "gvsl-unet-ct-nano-contrast"),
        ("gvsl-unet-ct-nano", "./mine", "settings", "./mine"),
        ("gvsl-unet-ct-small", None, "before", None),
        ("gvsl-unet-ct-small", "./mine", "settings", "./mine"),
        ("gvsl-xmorpher-ct-nano", None, "settings", None),
    ],
)
@pytest.mark.parametrize("steps", [70, None])
def test_a_run_by_a_recipe_starts_where_that_did_unless_told_otherwise(
    tmp_path, monkeypatch, name, given, run, start, steps
):
    taken = {}
    monkeypatch.setattr("gvsl_zoo.zoo.load", lambda name, task: f"loaded {name}")
    monkeypatch.setattr("gvsl_zoo.pretrain.run.finished", lambda out: {})

    def note(config, *others, init, **options):
        taken.update(config=config, init=init and init())

    monkeypatch.setattr(loop, "pretrain", note)
    others = [*(["--init", given] if given else []), *(["--steps", steps] if steps else [])]
    result = command("--recipe", name, *others, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    made = getattr(recipes.read_recipe(name), run)
    ramp = made.ramp_steps * steps // made.steps if steps else made.ramp_steps
    expected = replace(made, steps=steps or made.steps, ramp_steps=ramp)
    assert taken == {"config": expected, "init": start and f"loaded {start}"}


def test_a_run_without_a_recipe_takes_steps(tmp_path):
    result = command("--out", tmp_path / "run")
    assert result.exit_code == 2 and "takes --steps, or a --recipe" in result.stderr


def test_a_recipe_beside_a_preset_or_of_a_model_without_one_is_refused(tmp_path):
    for call, said in (
        (["--recipe", "gvsl-unet-ct-nano", "--preset", "nano"], "both --preset and --recipe; give one"),
        (["--recipe", "gvsl-unet-ct"], "gvsl-unet-ct has no recipe"),
        (["--recipe", "gvsl-unet-ct-nan"], "did you mean 'gvsl-unet-ct-nano"),
    ):
        result = command(*call, "--out", tmp_path / "run", "--steps", 1)
        assert result.exit_code in (1, 2) and said in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_run_that_goes_on_needs_its_start_no_more_and_a_dry_run_looks_at_it(tmp_path):
    begin = ["--init", tmp_path / "start", "--steps", 2, "--save-every", 1, *SMALL]
    assert command("--out", tmp_path / "start", "--steps", 1, *SMALL).exit_code == 0
    assert command("--out", tmp_path / "run", *begin).exit_code == 0
    refused = command("--out", tmp_path / "other", *begin, "--set", "width=16", "--dry-run")
    assert refused.exit_code == 2 and "other tensors than a run of objective gvsl, ndim 3, backbone unet, width 16" in (
        refused.stderr
    )
    (tmp_path / "start" / "model.safetensors").unlink()
    resumed = command("--out", tmp_path / "run", *begin, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert load(tmp_path / "run").entry.base_model == "gvsl-start"


def test_a_folder_of_scans_tells_what_of_it_cannot_be_used_or_is_odd(tmp_path):
    values = np.random.default_rng(0).integers(-1000, 400, (3, 20, 20, 20)).astype(np.int16)
    (tmp_path / "scans").mkdir()
    for name, image in (("a", values[0]), ("b", values[1]), ("labels", values[2] > 0)):
        nib.save(
            nib.Nifti1Image(image.astype(np.int16), np.diag([12.0, 12, 12, 1])), tmp_path / "scans" / f"{name}.nii"
        )
    (tmp_path / "scans" / "junk.nii").write_bytes(b"junk")
    result = command("--data", tmp_path / "scans", "--out", tmp_path / "run", "--steps", 1, *SMALL)
    assert result.exit_code == 0, result.output
    assert re.search(r"warning: files that cannot be used: 1, see \S+quarantine\.jsonl", result.stderr)
    assert re.search(r"warning: files that are odd, as label maps are: 1, see \S+notes\.jsonl", result.stderr)


def test_films_have_the_size_of_the_recipe(tmp_path):
    from PIL import Image

    (tmp_path / "films").mkdir()
    for name in "abc":
        pixels = np.random.default_rng(ord(name)).integers(0, 255, (48, 40)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "films" / f"{name}.png")
    config = PretrainConfig(1, ndim=2, crop=(16, 16), affine_width=8)
    real = open_data(str(tmp_path / "films"), config, tmp_path / "run", film_size=32)
    assert real.store.format.size == 32
    with pytest.raises(ArgumentError, match="films of 32 pixels an axis for a run on 64; prepare it with --size 64"):
        open_data(str(tmp_path / "run" / "store"), config, None, film_size=64)
    loop.pretrain(config, tmp_path / "run", real, device="cpu")
    assert load(tmp_path / "run").entry.input.size == (32, 32)


def test_a_disk_that_is_full_for_tensorboard_is_left_to_the_checkpoint_to_tell(tmp_path, monkeypatch):
    class Full:
        def __init__(self, *_, **__):
            pass

        def add_scalar(self, *_):
            raise OSError(28, "No space left on device")

        close = add_scalar

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Full)
    train(tmp_path, 1)
    assert (tmp_path / "model.safetensors").exists()


def test_a_transformer_of_a_recipe_keeps_its_width():
    assert settings_of({"width": 24}, 1, {"backbone": "xmorpher"}, ("width=16",)).width == 16
    made = asdict(recipes.read_recipe("gvsl-xmorpher-ct-nano").settings)
    assert settings_of(made, 5, {"backbone": "xmorpher"}) == PretrainConfig(**made | {"steps": 5})


def test_a_dry_run_estimates_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "validate", None)  # which would take longer than the steps
    result = command("--out", tmp_path / "run", "--steps", 1000, "--dry-run", "--workers", 0, *SMALL, "--json")
    facts = json.loads(result.stdout)
    assert facts["hours"] > 0 and facts["peak_memory_GB"] > 0 and facts["parameters"] > 10**6
    assert not (tmp_path / "run").exists()


def test_a_dry_run_goes_without_the_memory_where_the_system_does_not_tell(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert peak_memory() is None


def test_a_dry_run_takes_its_steps_as_they_are_after_the_ramp():
    drawn = []

    class Noted(ScanPairs):
        def draw(self, generator):
            drawn.append(generator)
            return super().draw(generator)

    config = settings(synthetic_share=0.01, batch_size=2)
    estimate(config, Noted(scans("a", "a"), CROP), "cpu", 0)
    assert len(drawn) == 3 * config.batch_size


def test_a_dry_run_of_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = command("--out", tmp_path / "run", "--steps", 1, "--dry-run", *SMALL)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr == "error: a dry run of 2 processes; run it with one, without torchrun\n"


@pytest.mark.parametrize("name", ["pretrain", "finetune", "reproduce"])
def test_facts_are_printed_by_the_first_process_alone(name, tmp_path, monkeypatch):
    outcome = SimpleNamespace(reached=True, lines=lambda: ["a table"], to_dict=dict)
    for module, function, answer in (
        *((loop, "pretrain", None), (finetune, "finetune", None), (cases, "read_cases", None)),
        *((finetune, "best_record", {}), (finetune, "read_log", []), (folder_of_a_run, "finished", {"run": "x"})),
        *((recipes, "train", None), (recipes, "reproduce", outcome)),
    ):
        monkeypatch.setattr(module, function, lambda *_, answer=answer, **__: answer)
    needed = {"pretrain": ["--steps", 1], "finetune": ["--steps", 1, "--data", tmp_path]}
    calls = [[name, *needed.get(name, ["gvsl-unet-ct-nano"]), "--out", tmp_path / "run"]]
    calls += [[*calls[0], "--steps", 1]] * (name == "reproduce")
    for arguments in [[*call, *more] for call in calls for more in ([], ["--json"])]:
        for rank in (0, 1):
            monkeypatch.setenv("RANK", str(rank))
            result = CliRunner().invoke(main, list(map(str, arguments)))
            assert result.exit_code == 0 and bool(result.stdout) == (rank == 0), (arguments, result.output)


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (["--data", "nowhere"], "there is no folder 'nowhere'; give a folder of scans, a store, its URL, or synthetic"),
        (["--data", __file__], "test_pretrain.py' are a file; give a folder of scans"),
        (["--objective", "magic"], "objective 'magic'"),
        (["--set", "depth=5"], "unknown settings depth"),
        (["--set", "leraning_rate=0.1"], "unknown settings leraning_rate; did you mean learning_rate?"),
        (["--set", "ncc"], "'ncc' is no setting; write name=value"),
        (["--set", "ema=high"], "ema 'high' in the settings of a run; give a number"),
        (["--set", "checkpointing=off"], "checkpointing 'off' in the settings of a run; give true or false"),
        (["--set", "ndim=both"], "ndim 'both' in the settings of a run; give a whole number"),
        (["--set", "learning_rate=-1"], "learning_rate -1 in the settings of a run"),
        (
            ["--init", "gvsl-unet-ct-nano"],
            "other tensors than a run of objective gvsl, ndim 3, backbone unet, width 8, affine_width 8",
        ),
        (["--device", "tpu"], "device 'tpu' for a run"),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_a_call_that_cannot_train_says_why_in_a_line(tmp_path, args, match):
    result = command("--out", tmp_path / "run", "--steps", 1, *SMALL, *args)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.exit_code in (1, 2) and len(errors) == 1 and match in errors[0], result.output
    assert not (tmp_path / "run").exists()
