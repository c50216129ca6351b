"""Tests of the evidence: who is tested on what, areas under curves, runs taken together, registration over scans."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import evidence, transfer
from benchmarks.evidence import GROUPS, SEEN, UNSEEN, Chest, crop_row, lung_crop, over_scans, restoration, whole_row
from benchmarks.timing import RESULTS
from benchmarks.transfer import FILMS, FOLDS, comparisons, order_scores, probe_films, probed_films, result_path
from gvsl_zoo import list_models, load, model_info
from gvsl_zoo.demo import as_volume
from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.ledger import ledger_of
from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.pretrain.anatomy import LABELS, sample_film, sample_subject
from gvsl_zoo.transfer.bench import Bench
from gvsl_zoo.transfer.cases import read_cases
from gvsl_zoo.transfer.config import FinetuneConfig
from gvsl_zoo.transfer.evaluate import summarise_classes
from gvsl_zoo.volume import prepare, write_volume
from gvsl_zoo.weights import values_hash
from gvsl_zoo.zoo import save_pretrained

NANO = "gvsl-unet-ct-nano"


def write_index(folder, rows):
    lines = ["file,modality,anatomy,shape,spacing_mm,split,label_file_or_class,autolabel_file,licence"]
    lines += [f"{file},CXR,chest,,,pretrain,{kind},," for file, kind in rows]
    (folder / "index.csv").write_text("\n".join(lines))


def write_chest(subject, folder, name):
    """A synthetic scan and the map of its lungs."""
    scan = as_volume(subject)
    lungs = sum(value * (subject.labels == LABELS[side]) for side, value in (("lung_right", 1), ("lung_left", 2)))
    write_volume(scan, folder / f"{name}.nii.gz")
    labels = replace(scan, data=lungs.permute(2, 1, 0).to(torch.uint8).numpy())
    write_volume(labels, folder / f"{name}_autoseg.nii.gz")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A data folder of 48 small films in two classes, each another one."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("data")
    (folder / "xray").mkdir()
    rows = [(f"xray/{kind}_{n:02}.png", kind) for kind in FILMS.labels for n in reversed(range(24))]
    for seed, (file, _) in enumerate(rows):
        film = sample_film((32, 32), torch.Generator().manual_seed(seed)).image
        Image.fromarray((255 * film.numpy()).astype(np.uint8)).save(folder / file)
    write_index(folder, rows)
    return folder


@pytest.fixture(scope="module")
def film_model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "films"
    entry = replace(model_info("gvsl-unet-xray"), status="available", heads=(), config={"ndim": 2, "width": 8})
    save_pretrained(UNet(2, 8, generator=torch.Generator().manual_seed(0)), path, entry=entry)
    return path


# --- Films ----------------------------------------------------------------------------------------------------------


def test_the_films_of_the_probe_are_those_between_the_films_that_recipes_train_on(films):
    for kind, own in probed_films(films).items():
        everything = sorted(path.name for path in (films / "xray").glob(f"{kind}_*"))
        assert set(own).isdisjoint(f"xray/{name}" for name in everything[::2])
        assert len(own) == 12 and set(own) < {f"xray/{name}" for name in everything}


def test_every_film_is_tested_in_one_fold_and_trained_on_in_all_others_and_folds_hold_both_classes_alike(
    films, tmp_path
):
    own, tested = probed_films(films), []
    for fold in range(FOLDS):
        path = transfer.write_fold(own, fold, films, tmp_path / f"{fold}.csv")
        cases = read_cases(path, task="classification", labels=FILMS.labels).cases
        test = [case for case in cases if case.split == "test"]
        assert [case.label for case in test] == [0, 0, 1, 1] and len(cases) == 24
        tested += [case.name for case in test]
    assert len(set(tested)) == len(tested) == 24


def test_a_model_that_knows_a_film_of_any_fold_is_refused_by_its_name_before_anything_is_trained(
    films, film_model, tmp_path
):
    film = films / probed_films(films)["pneumonia"][-1]
    model = load(str(film_model))
    save_pretrained(model, tmp_path / "knowing", entry=replace(model.entry, ledger=ledger_of([film])))
    with pytest.raises(ArgumentError, match=rf"has seen 1 of 24 test cases in training: .*{film.name}"):
        probe_films(films, [str(tmp_path / "knowing")], tmp_path / "out", seeds=3)
    assert not (tmp_path / "out").exists()


def test_a_model_of_volumes_does_not_probe_films(films, tmp_path):
    with pytest.raises(ArgumentError, match=f"{NANO} is a model of volumes"):
        probe_films(films, [NANO], tmp_path, seeds=3)


def folds_of(probabilities):
    """Benches, one a fold, with what an arm says of the films: (seeds, films without, films with) -> probability."""
    seeds, films = probabilities.shape
    benches = []
    for fold in range(FOLDS):
        cells = []
        for seed in range(seeds):
            details = {}
            for index in range(fold, films, FOLDS):
                kind = list(FILMS.labels)[index >= films // 2]
                p = float(probabilities[seed, index])
                details[f"{kind}_{index:02}"] = {"no_findings": 100 * (1 - p), "pneumonia": 100 * p}
            cells.append({"arm": "zoo", "mode": "linear", "count": 20, "seed": seed, "details": details})
        benches.append(Bench("classification", {}, tuple(cells), ()))
    return benches


def test_the_mean_order_of_pairs_of_films_is_the_area_under_the_curve_of_all_folds():
    probabilities = np.random.default_rng(0).uniform(0.1, 0.9, (3, 24)).round(1)  # with ties
    scores = order_scores(folds_of(probabilities))["zoo", "linear", 20]
    assert scores.shape == (3, 12, 12)
    for seed in range(3):
        rows = {str(i): ("yes" if i >= 12 else "no", (1 - p, p)) for i, p in enumerate(probabilities[seed])}
        expected = summarise_classes(rows, ("no", "yes"))["labels"]["yes"]["auc"]["mean"]
        assert scores[seed].mean() == pytest.approx(100 * expected)


def test_odds_beyond_what_a_probability_near_1_can_say_still_have_an_order():
    [bench] = [Bench("classification", {}, ({"arm": "zoo", "mode": "full", "count": 20, "seed": 0, "details": {
        "no_findings_1": {"no_findings": 1e-9, "pneumonia": 100.0},
        "pneumonia_1": {"no_findings": 1e-12, "pneumonia": 100.0},
    }},), ())]  # fmt: skip
    assert order_scores([bench])["zoo", "full", 20].item() == 100


@pytest.mark.slow
def test_films_are_probed_fold_by_fold_and_the_result_is_named_by_the_model(films, film_model, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "RESULTS", tmp_path)
    config = FinetuneConfig(task="classification", steps=1, crop=32, augment=0.0)
    monkeypatch.setattr(transfer, "FILMS", FILMS._replace(config=config))
    words = ["transfer", "xray", str(films), str(tmp_path / "out"), "--model", str(film_model)]
    monkeypatch.setattr(sys, "argv", [*words, "--modes", "linear", "--seeds", "3", "--device", "cpu"])
    transfer.main()
    found = json.loads((tmp_path / "transfer_xray_films.json").read_text())
    [row] = found["comparisons"]
    assert row["count"] == 20 and row["zoo"] - row["scratch"] == pytest.approx(row["difference"])
    assert {area["arm"]: area["auc"] for area in found["areas"]} == {
        "scratch": pytest.approx(row["scratch"]),
        str(film_model): pytest.approx(row["zoo"]),
    }
    tested = [film for fold in found["folds"] for film in fold["settings"]["test"]]
    assert len(set(tested)) == 24 and len(found["folds"]) == FOLDS


# --- Several models -------------------------------------------------------------------------------------------------


def scores_of(gains, spread, cases=10):
    """Scores of runs that gain so much over one scratch, and differ by `spread` from each other."""
    random = np.random.default_rng(0)
    scratch = 50 + random.normal(size=(3, cases))
    scores = {("scratch", "linear", 1): scratch}
    for number, gain in enumerate(gains):
        own = gain + spread * random.normal() + 0.1 * random.normal(size=scratch.shape)
        scores[f"run-{number}", "linear", 1] = scratch + own
    return scores


def test_runs_together_gain_the_mean_of_what_each_gains():
    scores, runs = scores_of([4.0, 5.0, 6.0], 0.0), ["run-0", "run-1", "run-2"]
    arms = dict.fromkeys(runs, "scratch")
    alone = comparisons(scores, arms, [[run] for run in runs])
    [together] = comparisons(scores, arms, [runs])
    assert together.difference == pytest.approx(np.mean([row.difference for row in alone]))
    assert together.model == "3 runs together" and together.p == together.p_corrected
    surest = min(alone, key=lambda row: row.p)
    assert surest.p_corrected == pytest.approx(3 * surest.p)


def test_runs_that_disagree_make_the_gain_of_the_recipe_unsure_however_sure_each_is():
    runs = ["run-0", "run-1", "run-2"]
    arms = dict.fromkeys(runs, "scratch")
    scores = scores_of([4.0, 1.0, 7.0], 0.0)
    assert all(row.effect in ("helps", "probably helps") for row in comparisons(scores, arms, [[run] for run in runs]))
    [together] = comparisons(scores, arms, [runs])
    assert together.half > 6 and together.effect == "unclear"


@pytest.fixture
def lungs(tmp_path, monkeypatch):
    """A data folder of synthetic chests under the names of the task, which trains one step from one scan."""
    (tmp_path / "ct").mkdir()
    for seed, name in enumerate((*UNSEEN, *SEEN)):
        subject = sample_subject((28, 24, 32), torch.Generator().manual_seed(seed), (9.0,) * 3)
        write_chest(subject, tmp_path / "ct", name)
    task = transfer.TASKS["ct_lungs"]._replace(counts=(1,), config=FinetuneConfig(steps=1, crop=16, augment=0.0))
    monkeypatch.setattr(transfer, "TASKS", {"ct_lungs": task})
    monkeypatch.setattr(transfer, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_several_models_are_each_compared_with_scratch_and_together_as_one_recipe(lungs, monkeypatch):
    other = load(NANO)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    save_pretrained(other, lungs / "other", entry=replace(other.entry, sources=(), proof=None))
    models = [NANO, str(lungs / "other")]
    words = ["transfer", "ct_lungs", str(lungs), str(lungs / "out"), "--model", ",".join(models), "--modes", "linear"]
    monkeypatch.setattr(sys, "argv", [*words, "--seeds", "3", "--device", "cpu", "--together"])
    transfer.main()
    found = json.loads((lungs / f"transfer_ct_lungs_{NANO}_other.json").read_text())
    assert [row["model"] for row in found["comparisons"]] == models
    [together] = found["together"]
    assert together["difference"] == pytest.approx(np.mean([row["difference"] for row in found["comparisons"]]))


def test_one_model_is_not_taken_together(lungs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["transfer", "ct_lungs", str(lungs), str(lungs / "out"), "--together"])
    with pytest.raises(SystemExit, match="2"):
        transfer.main()
    assert "--together takes two models or more, all of one shape" in capsys.readouterr().err


def test_the_embedded_models_result_has_the_tasks_name_alone():
    assert result_path("ct_lungs", [NANO]).name == "transfer_ct_lungs.json"
    assert result_path("ct_lungs", ["runs/a", NANO]).name == f"transfer_ct_lungs_a_{NANO}.json"


# --- Registration ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return load(NANO, task="registration")


@pytest.fixture(scope="module")
def chests(model):
    """Two synthetic subjects on the model's grid, with the masks of their lungs."""
    found = []
    for seed in (3, 4):
        subject = sample_subject((72, 80, 88), torch.Generator().manual_seed(seed), (4.0,) * 3)
        lungs = torch.stack([subject.labels == LABELS[side] for side in ("lung_right", "lung_left")])
        found.append(Chest(prepare(as_volume(subject), model.preprocessing), lungs[None]))
    return found


def test_no_pair_is_of_a_scan_with_itself_and_all_hold_an_unseen_one():
    assert len(set(GROUPS["unseen"])) == 6 and len(set(GROUPS["unseen and seen"])) == 2 * len(UNSEEN) * len(SEEN)
    for pair in (pair for pairs in GROUPS.values() for pair in pairs):
        assert pair[0] != pair[1] and set(pair) & set(UNSEEN)


def test_a_chest_on_itself_is_in_place_before_and_after(chests, model):
    row, _ = whole_row(chests[0], chests[0], model)
    assert row["dice_before"] == 100 and row["dice_after"] > 95 and row["folded"] == 0
    crop = lung_crop(chests[0], (48, 48, 48))
    row, _ = crop_row(crop, crop, model)
    assert row["dice_before"] == 100 and row["dice_after"] > 90


def test_whole_chests_are_measured_as_the_registration_brings_them_together(chests, model):
    from gvsl_zoo import Grid, register
    from gvsl_zoo.transforms import warp_volume

    fixed, moving = chests
    found = register(moving.scan, fixed.scan, model)
    assert found.report["answer"] == "the model's matching heads"
    carried = warp_volume(moving.label_map, found.displacement_mm, Grid.of(fixed.scan), nearest=True).data
    truth = fixed.label_map.data
    dice = [200 * ((carried == k) & (truth == k)).sum() / ((carried == k).sum() + (truth == k).sum()) for k in (1, 2)]
    row, affine = whole_row(fixed, moving, model)
    assert row["dice_register"] == pytest.approx(np.mean(dice), abs=0.01)
    assert row["folded_register"] == pytest.approx(100 * found.report["folded"], abs=1e-6)
    assert row["dice_after"] > row["dice_before"] and row["folded"] > row["folded_register"]
    assert affine.shape == (3, 4)


def test_a_crop_holds_the_middle_of_the_lungs_and_air_beyond_the_scan(chests):
    image, lungs = lung_crop(chests[0], (48, 48, 48))
    assert image.shape == (1, 1, 48, 48, 48) and lungs.shape == (1, 2, 48, 48, 48)
    assert lungs.sum() > 0.3 * chests[0].lungs.sum() and (lungs.flatten(2).sum(2) > 0).all()
    whole, beyond = lung_crop(chests[0], (100, 100, 100))
    assert beyond.sum() == chests[0].lungs.sum() and whole[0, 0, 0].sum() == 0


def test_what_a_model_restores_is_compared_with_the_same_damage(chests, model, monkeypatch):
    monkeypatch.setattr(evidence, "DAMAGES", 2)
    crops = [lung_crop(chest, (48, 48, 48))[0] for chest in chests]
    found = restoration(crops, model)
    assert found["gain"][0] == pytest.approx(found["psnr_restored"][0] - found["psnr_damaged"][0])
    assert found == restoration(crops, model)


@pytest.fixture(scope="module")
def matching_films(tmp_path_factory):
    """A folder with an untrained whole module of films of 32 x 32."""
    path = tmp_path_factory.mktemp("model") / "whole"
    row = model_info("gvsl-unet-xray")
    heads, config = ("affine", "deformable", "restoration"), {"ndim": 2, "width": 8, "affine_width": 8}
    entry = replace(row, status="available", heads=heads, config=config, input=replace(row.input, size=(32, 32)))
    generator = torch.Generator().manual_seed(0)
    model = GVSL(UNet(2, 8, generator=generator), affine_width=8, generator=generator)
    save_pretrained(model, path, entry=entry)
    return path


def test_films_are_matched_each_onto_each_and_restored(films, matching_films, monkeypatch):
    monkeypatch.setattr(evidence, "DAMAGES", 1)
    found = evidence.film_evidence(load(matching_films, task="registration"), films)
    pairs, gain = found["films"], found["films"]["gain_after"][0]
    assert pairs["pairs"] == 24 * 23 and 0 < pairs["ncc_before"][0] < 1
    assert gain == pytest.approx(pairs["ncc_after"][0] - pairs["ncc_before"][0])
    table = evidence.lines("mine", found)
    assert table[2].startswith("  films, local NCC") and "as register answers" in table[3] and "PSNR" in table[4]


def test_a_film_on_itself_is_in_place(films, matching_films):
    model = load(matching_films, task="registration")
    film = evidence.prepare_for(films / probed_films(films)["pneumonia"][0], model).image[:, :, 0]
    row, affine = evidence.film_row(film, film, model)
    assert min(row["ncc_before"], row["ncc_after"]) > 0.9 and row["folded"] == 0 and affine.shape == (2, 3)


def test_a_model_that_knows_a_film_is_not_measured_on_it(films, matching_films, tmp_path):
    model = load(matching_films, task="registration")
    seen = ledger_of([films / probed_films(films)["no_findings"][3]])
    save_pretrained(model, tmp_path / "knowing", entry=replace(model.entry, ledger=seen))
    with pytest.raises(ArgumentError, match="has seen 1 of 24"):
        evidence.film_evidence(load(tmp_path / "knowing", task="registration"), films)


def test_scans_not_pairs_decide_how_wide_an_interval_is():
    pairs = GROUPS["unseen"]
    of_scan = dict(zip(UNSEEN, (0.0, 1.0, 2.0), strict=True))
    mean, low, high = over_scans({(a, b): of_scan[a] + of_scan[b] for a, b in pairs})
    assert mean == pytest.approx(2) and high - mean == pytest.approx(mean - low)
    assert high - mean == pytest.approx(2 * 4.303 / np.sqrt(3), rel=1e-3)  # Student's of 2 * (0, 1, 2)
    assert over_scans(dict.fromkeys(pairs, 3.0)) == pytest.approx([3, 3, 3])
    assert over_scans(dict.fromkeys(GROUPS["unseen and seen"], 3.0)) == pytest.approx([3, 3, 3])


def test_chests_are_read_from_scans_and_label_files_of_any_grid(tmp_path, model):
    subject = sample_subject((40, 44, 48), torch.Generator().manual_seed(5), (8.0,) * 3)
    (tmp_path / "ct").mkdir()
    write_chest(subject, tmp_path / "ct", "a")
    chest = evidence.read_chest("a", tmp_path, model.preprocessing)
    assert chest.prepared.shape == chest.lungs.shape[2:]
    for side, own in zip(("lung_right", "lung_left"), chest.lungs[0], strict=True):
        truth = float((subject.labels == LABELS[side]).sum()) * 8.0**3
        assert float(own.sum()) * 4.0**3 == pytest.approx(truth, rel=0.1)


@pytest.mark.slow
def test_the_command_measures_a_model_and_adds_it_to_those_before(lungs, monkeypatch, capsys):
    monkeypatch.setattr(evidence, "SEEN", SEEN[:1])
    pairs = tuple(pair for name in UNSEEN for pair in ((name, SEEN[0]), (SEEN[0], name)))
    monkeypatch.setattr(evidence, "GROUPS", {"unseen": GROUPS["unseen"][:6], "unseen and seen": pairs})
    monkeypatch.setattr(evidence, "DAMAGES", 1)
    monkeypatch.setattr(evidence, "simpleitk", evidence.moments)
    monkeypatch.setattr(evidence, "FILE", lungs / "evidence.json")
    (lungs / "evidence.json").write_text(json.dumps({"models": {"other": {"kept": True}}}))
    monkeypatch.setattr(sys, "argv", ["evidence", str(lungs), "--simpleitk"])
    evidence.main()
    found = json.loads((lungs / "evidence.json").read_text())
    assert found["models"]["other"] == {"kept": True}
    for kind in ("whole", "crops"):
        for group in GROUPS:
            row = found["models"][NANO][kind][group]
            gains = [one["dice_after"] - one["dice_before"] for one in row["rows"]]
            assert row["pairs"] == len(gains) == 6 and row["gain_after"][0] == pytest.approx(np.mean(gains))
            assert row["gain_after"][1] <= row["gain_after"][0] <= row["gain_after"][2]
    by_moments, by_other = found["others"].values()
    assert by_moments["dice"] == pytest.approx(by_other["dice"])
    assert f"{NANO}\n" in capsys.readouterr().out


def test_every_committed_result_is_of_the_weights_that_are_shipped():
    found = set()
    for path in RESULTS.glob("transfer_*.json"):
        content = json.loads(path.read_bytes())
        for part in content.get("folds", [content]):
            found |= {(name, "backbone", values) for name, values in part["settings"]["models"].items()}
    models = json.loads((RESULTS / "evidence.json").read_bytes())["models"]
    found |= {(name, "pretraining", model["values"]) for name, model in models.items()}
    shipped = {(name, task, values) for name, task, values in found if name in list_models(available=True)}
    assert {name for name, _, _ in shipped} == set(list_models(available=True))
    for name, task, values in sorted(shipped):
        assert values_hash(load(name, task=task)) == values, (name, task)


def test_the_hash_of_values_is_of_names_shapes_and_numbers_alone(tmp_path):
    model = load(NANO)
    model.save_pretrained(tmp_path / "model", dtype=torch.float16)
    other = load(tmp_path / "model")
    assert values_hash(other) == values_hash(model) == values_hash(model.to(memory_format=torch.channels_last_3d))
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    assert values_hash(other) != values_hash(model)
