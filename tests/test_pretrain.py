"""Pre-training: what a run writes, that it goes on bit for bit after an interruption, and that it learns."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import pytest
import torch

from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.losses import restoration_loss
from gvsl_zoo.pretrain import loop
from gvsl_zoo.pretrain.config import PretrainConfig
from gvsl_zoo.pretrain.data import Scan, ScanPairs, SyntheticPairs

CROP = (16, 16, 16)
TERMS = ("ncc", "smoothness", "restoration")


def settings(steps=4, **changed):
    tiny = {"affine_width": 8, "crop": CROP, "spacing_mm": 12.0, "save_every": 2, "warmup_steps": 2, "bf16": False}
    return PretrainConfig(steps=steps, **tiny | changed)


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(log):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in log]


def scans(*regions, size=(20, 18, 24)):
    """Scans whose intensity is their number: 0.1, 0.2, ..."""
    return [Scan(torch.full((1, *size), 0.1 * (i + 1)), region) for i, region in enumerate(regions)]


def subject(image):
    """Number of the scan that a crop came from."""
    return round(10 * image.max().item())


def interrupt_after(monkeypatch, function, calls, error):
    """Let a function of the loop run so many times, then raise."""
    original, left = getattr(loop, function), iter(range(calls))

    def interrupted(*arguments):
        if next(left, None) is None:
            raise error
        return original(*arguments)

    monkeypatch.setattr(loop, function, interrupted)


def test_a_run_logs_every_step_with_its_terms(tmp_path):
    model = loop.pretrain(settings(3), tmp_path)
    log = records(tmp_path)
    assert [record["step"] for record in log] == [1, 2, 3]
    for record in log:
        assert record["loss"] == pytest.approx(sum(record[term] for term in TERMS), rel=1e-5)
    for record in log[1:]:  # step 2: save_every; step 3: the last
        assert {"ncc_before", "ncc_after", "folded"} <= record.keys()
    assert not model.training
    assert {path.name for path in tmp_path.iterdir()} == {"log.jsonl", "checkpoint.pt"}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return loop.pretrain(settings(), folder).state_dict(), records(folder)


@pytest.mark.parametrize("calls", [2, 3])
def test_an_interrupted_run_ends_bit_identical_to_an_uninterrupted_one(tmp_path, monkeypatch, uninterrupted, calls):
    with monkeypatch.context() as patch:
        interrupt_after(patch, "losses", calls, KeyboardInterrupt("power cut"))
        with pytest.raises(KeyboardInterrupt, match="power cut"):
            loop.pretrain(settings(), tmp_path)
    resumed = loop.pretrain(settings(), tmp_path).state_dict()
    weights, log = uninterrupted
    assert resumed.keys() == weights.keys()
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
    assert untimed(records(tmp_path)[-2:]) == untimed(log[-2:])


def test_the_log_of_a_resumed_run_has_every_step_once(tmp_path, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        interrupt_after(patch, "losses", 3, KeyboardInterrupt("power cut"))  # a step after the last checkpoint
        with pytest.raises(KeyboardInterrupt, match="power cut"):
            loop.pretrain(settings(), tmp_path)
    loop.pretrain(settings(), tmp_path)
    assert untimed(records(tmp_path)) == untimed(uninterrupted[1])


def test_a_run_interrupted_while_saving_keeps_the_checkpoint_before(tmp_path, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        original, left = os.fsync, iter(range(1))

        def full_disk(descriptor):
            if next(left, None) is None:
                raise OSError("no space left on device")
            original(descriptor)

        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(OSError, match="no space left"):
            loop.pretrain(settings(), tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2
    resumed = loop.pretrain(settings(), tmp_path).state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in uninterrupted[0].items())
    assert not list(tmp_path.glob("*.partial"))


def test_a_finished_run_is_not_trained_again(tmp_path, monkeypatch, uninterrupted):
    loop.pretrain(settings(2), tmp_path)
    interrupt_after(monkeypatch, "losses", 0, AssertionError("it trained"))
    before = (tmp_path / "log.jsonl").read_text()
    loop.pretrain(settings(2), tmp_path)
    assert (tmp_path / "log.jsonl").read_text() == before


def test_a_run_goes_on_only_with_its_own_settings(tmp_path):
    loop.pretrain(settings(1), tmp_path)
    with pytest.raises(
        ArgumentError, match=r"other settings: steps 1 -> 2, learning_rate 0\.002 -> 0\.01; use the same"
    ):
        loop.pretrain(settings(2, learning_rate=0.01), tmp_path)


def test_another_seed_gives_another_run(tmp_path, uninterrupted):
    loop.pretrain(settings(1, seed=5), tmp_path)
    assert records(tmp_path)[0]["loss"] != uninterrupted[1][0]["loss"]


def test_a_run_does_not_depend_on_the_global_generator(tmp_path, uninterrupted):
    torch.manual_seed(99)
    loop.pretrain(settings(), tmp_path)
    assert [record["loss"] for record in records(tmp_path)] == [record["loss"] for record in uninterrupted[1]]


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    original = loop.losses
    spoil = iter((1.0, 1.0, float("nan")))
    monkeypatch.setattr(loop, "losses", lambda *a: {k: v * f for f in [next(spoil)] for k, v in original(*a).items()})
    with pytest.raises(
        ArgumentError, match=r"loss became nan and its gradient nan at step 2; .*lower the learning rate"
    ):
        loop.pretrain(settings(), tmp_path)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"] == 2


def test_a_gradient_that_is_not_finite_never_reaches_a_checkpoint(tmp_path, monkeypatch):
    original, steps = loop.losses, iter(range(10))

    def spoiled(model, *arguments):
        zero = sum(p.sum() for p in model.parameters()) * 0  # finite, but the slope of its root is not
        return original(model, *arguments) | ({"root": zero.sqrt()} if next(steps) == 1 else {})

    monkeypatch.setattr(loop, "losses", spoiled)
    with pytest.raises(ArgumentError, match=r"(loss|gradient).* at step"):
        loop.pretrain(settings(), tmp_path)
    saved = [torch.load(path, weights_only=True)["model"] for path in tmp_path.glob("checkpoint.pt")]
    assert all(tensor.isfinite().all() for model in saved for tensor in model.values())


def test_the_learning_rate_warms_up_and_ends_at_zero():
    config = PretrainConfig(steps=1000, warmup_steps=10)
    rates = [loop.learning_rate(config, step) for step in range(1001)]
    assert rates[0] == pytest.approx(config.learning_rate / 10)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert max(rates) == pytest.approx(config.learning_rate, rel=1e-3)
    assert rates[500] == pytest.approx(config.learning_rate / 2)
    assert rates[1000] == pytest.approx(0, abs=1e-12)


def test_one_pose_moves_all_three_images_of_a_pair(generator, monkeypatch):
    drawn, source = [], SyntheticPairs(CROP, 12.0)

    def twice_the_same(generator, variation):
        drawn.append(source.draw(generator)[0])
        return drawn[-1], drawn[-1]

    twins = type("Twins", (), {"draw": staticmethod(twice_the_same)})
    monkeypatch.setattr(loop, "damage", lambda x, generator: x.clone())
    fixed, damaged, moving = loop.draw_batch(settings(batch_size=2), 0, twins, None, generator, "cpu")
    assert torch.equal(fixed, damaged)
    assert torch.equal(fixed, moving)
    assert not torch.equal(fixed, torch.stack(drawn))


def test_a_batch_is_three_different_images_in_the_unit_range(generator):
    batch = loop.draw_batch(
        settings(batch_size=2, damage_share=1.0), 0, SyntheticPairs(CROP, 12.0), None, generator, "cpu"
    )
    assert len({image.sum().item() for image in batch}) == 3
    for image in batch:
        assert image.shape == (2, 1, *CROP)
        assert image.min() >= 0
        assert image.max() <= 1 + 1e-6


@pytest.mark.parametrize(("share", "expected"), [(0.0, True), (1.0, False)])
def test_the_synthetic_share_decides_where_pairs_come_from(generator, share, expected):
    config, real = settings(synthetic_share=share, batch_size=2), ScanPairs(scans("chest", "chest"), CROP)
    synthetic = SyntheticPairs(CROP, 12.0)
    drawn = []
    for source in (synthetic, real):
        original = source.draw
        object.__setattr__(source, "draw", lambda *a, s=source, o=original: drawn.append(s) or o(*a))
    loop.draw_batch(config, config.ramp_steps, synthetic, real, generator, "cpu")
    assert drawn == [real if expected else synthetic] * 2


def test_the_task_hardens_over_the_ramp(generator):
    config, variations = settings(ramp_steps=10), []
    source = type("Source", (), {"draw": staticmethod(lambda g, v: variations.append(v) or draw(g, v))})
    draw = SyntheticPairs(CROP, 12.0).draw
    for step in (0, 5, 10, 50):
        loop.draw_batch(config, step, source, ScanPairs(scans("a", "a"), CROP), generator, "cpu")
    assert variations == sorted(variations)
    assert variations[0] == loop.EASIEST_VARIATION
    assert max(variations) <= 1
    easy, hard = (draw(torch.Generator().manual_seed(3), v) for v in (0.05, 1.0))
    assert (easy[0] - easy[1]).abs().mean() < (hard[0] - hard[1]).abs().mean()


def test_the_fixed_image_is_damaged_in_the_share_of_steps_asked_for(generator):
    for share in (0.0, 1.0):
        fixed, damaged, _ = loop.draw_batch(
            settings(damage_share=share), 0, SyntheticPairs(CROP, 12.0), None, generator, "cpu"
        )
        assert torch.equal(fixed, damaged) == (share == 0.0)


def test_a_run_on_scans_alone_learns_from_them(tmp_path):
    noise = torch.Generator().manual_seed(0)
    given = [Scan(torch.rand(1, 20, 20, 20, generator=noise), "chest") for _ in range(2)]
    loop.pretrain(settings(1, synthetic_share=0.0), tmp_path, given)
    assert all(torch.tensor(records(tmp_path)[0][term]).isfinite() for term in TERMS)


def test_a_synthetic_pair_is_two_different_subjects_in_the_unit_range(generator):
    fixed, moving = SyntheticPairs(CROP, 12.0).draw(generator)
    assert fixed.shape == moving.shape == (1, *CROP)
    assert not torch.equal(fixed, moving)
    for image in (fixed, moving):
        assert image.min() >= 0
        assert image.max() <= 1
        assert image.std() > 0.05


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
    unseen, source = torch.Generator().manual_seed(123), SyntheticPairs(CROP, config.spacing_mm)
    fixed, damaged, moving = loop.draw_batch(settings(batch_size=8, damage_share=1.0), 0, source, None, unseen, "cpu")

    def error_after(steps):
        model = loop.pretrain(replace(config, steps=steps), tmp_path / str(steps))
        with torch.no_grad():
            return restoration_loss(model(damaged, moving).restored, fixed)

    after = error_after(config.steps)
    assert after < 0.5 * error_after(0)
    assert after < 0.8 * restoration_loss(damaged, fixed)


@pytest.mark.gpu
def test_a_run_on_a_gpu_logs_finite_terms(tmp_path):
    loop.pretrain(settings(2), tmp_path, device="cuda")
    assert all(torch.tensor([record[term] for term in TERMS]).isfinite().all() for record in records(tmp_path))
