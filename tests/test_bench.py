"""Tests of the bench: fair pairs, nothing repeated after an interruption, verdicts that follow from the numbers."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gvsl_zoo import model_info
from gvsl_zoo.cli import main
from gvsl_zoo.demo import as_volume
from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.inference.segment import segment
from gvsl_zoo.ledger import ledger_of
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.pretrain.anatomy import LABELS, sample_film, sample_subject
from gvsl_zoo.transfer import bench as room
from gvsl_zoo.transfer import finetune as loop
from gvsl_zoo.transfer.bench import (
    Bench,
    Cell,
    Trainings,
    bench,
    compared,
    dice_of_labels,
    hold_out,
    scratch_arms,
    scratch_before,
    shape_of,
)
from gvsl_zoo.transfer.cases import Case, Cases, read_cases
from gvsl_zoo.transfer.config import FinetuneConfig
from gvsl_zoo.transfer.evaluate import overlap
from gvsl_zoo.transfer.finetune import finetune
from gvsl_zoo.volume import read_volume, write_volume
from gvsl_zoo.zoo import load, save_pretrained

NANO = "gvsl-unet-ct-nano"
RESULTS = Path(__file__).parents[1] / "benchmarks/results"
ORGANS = {"liver": LABELS["liver"], "spine": LABELS["spine"]}
CONFIG = FinetuneConfig(steps=2, crop=16, batch_size=1, augment=0.0)


@pytest.fixture(scope="module", autouse=True)
def without_pictures():
    """Trainings whose folders are thrown away draw no curves here: that is half of the time of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "draw_run", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six labelled synthetic CTs; the table beside them gives two of them classes and none a split."""
    path = tmp_path_factory.mktemp("mine")
    for part in ("images", "labels"):
        (path / part).mkdir()
    for seed, name in enumerate("abcdef"):
        subject = sample_subject((28, 24, 32), torch.Generator().manual_seed(seed), spacing_mm=(9.0, 9.0, 9.0))
        volume = as_volume(subject)
        write_volume(volume, path / f"images/{name}.nii.gz")
        labels = subject.labels.permute(2, 1, 0).numpy()
        write_volume(replace(volume, data=labels), path / f"labels/{name}.nii.gz")
    rows = [f"images/{name}.nii.gz,{'ill' if name in 'ace' else 'healthy'}" for name in "abcdef"]
    (path / "classes.csv").write_text("\n".join(["image,label", *rows]))
    return path


@pytest.fixture(scope="module")
def cases(folder):
    return read_cases(folder, labels=ORGANS)


@pytest.fixture(scope="module")
def done(cases, tmp_path_factory):
    """A bench of linear probes: its report, its folder and what it said."""
    out, said = tmp_path_factory.mktemp("bench"), []
    report = bench(cases, [NANO], CONFIG, out, counts=[1, 3], modes=["linear"], device="cpu", say=said.append)
    return report, out, said


# --- Fair pairs -----------------------------------------------------------------------------------------------------


def test_arms_are_trained_on_the_same_scans_the_fewer_among_the_more_and_never_on_the_test(done):
    report, _, _ = done
    taken = {(c["arm"], c["count"], c["seed"]): c["taken"] for c in report.cells}
    assert len(taken) == 12
    for seed in range(3):
        for count in (1, 3):
            assert taken[NANO, count, seed] == taken["scratch", count, seed]
            assert len(taken[NANO, count, seed]) == count
        assert set(taken[NANO, 1, seed]) < set(taken[NANO, 3, seed])
    assert not {name for names in taken.values() for name in names} & set(report.settings["test"])
    assert len({tuple(taken[NANO, 3, seed]) for seed in range(3)}) > 1


@pytest.mark.parametrize("subjects", [2, 3, 4, 5, 8, 12, 20])
def test_two_subjects_at_least_and_else_a_quarter_are_held_out_with_all_their_scans(cases, subjects):
    rows = [Case(f"{n}-{scan}", str(n), (), 0) for n in range(subjects) for scan in range(2)]
    pool, test = hold_out(Cases("segmentation", tuple(rows), cases.labels))
    expected = max(min(2, subjects - 1), round(subjects / 4))
    assert len({case.subject for case in test}) == expected and len(test) == 2 * expected
    assert len(pool) == len(rows) - len(test)


def test_stated_test_cases_are_those_tested_on_and_the_pool_is_that_of_the_committed_results(cases):
    train = [Case(name, name, (), 0) for name in ("lidc0001", "cmb_crc_01068", "lidc0314", "lungdx_a0002")]
    stated = [Case(name, name, (), 0, "test") for name in ("lungfcp_0001", "acrin_flt_013", "kits_00072")]
    pool, test = hold_out(Cases("segmentation", (*train, *stated), cases.labels))
    settings = json.loads((RESULTS / "transfer_ct_lungs.json").read_bytes())["settings"]
    assert [case.name for case in test] == settings["test"]
    assert [case.name for case in pool] == settings["pool"], "draws would come in another order than they did"


def test_every_cell_has_a_file_of_its_own():
    arms = ["scratch", "./scratch", "run", "./run", "../run", "/run", "a b/run", "a_b/run", "scratch of ./run"]
    names = [Cell(arm, "full", 1, seed).name for arm in arms for seed in range(2)]
    assert len({*names}) == len(names) and names[0] == "scratch-full-1-0"
    assert all(re.fullmatch(r"\w[\w.-]*", name) for name in names)


@pytest.mark.parametrize("name", ["scratch", "scratch of run"])
def test_a_model_is_not_called_as_the_arm_without_weights(cases, tmp_path, name):
    with pytest.raises(ArgumentError, match=f"a model called '{name}', .*; write ./{name}"):
        bench(cases, [NANO, name], CONFIG, tmp_path, device="cpu")


def test_every_number_is_in_the_results(done):
    report, out, _ = done
    saved = json.loads((out / "results.json").read_text())
    assert saved == json.loads(json.dumps(report.to_dict()))
    table = {(c["arm"], c["count"], c["seed"]): list(c["scores"].values()) for c in saved["cells"]}
    for row in saved["comparisons"]:
        differences = [
            np.subtract(table[NANO, row["count"], seed], table["scratch", row["count"], seed]) for seed in range(3)
        ]
        assert row["difference"] == pytest.approx(np.mean(differences))
        assert row["zoo"] - row["scratch"] == pytest.approx(row["difference"])
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in (out / "cells").iterdir() if path.is_dir()]


def test_a_bench_says_first_what_it_will_do_and_then_how_long_it_takes(done):
    report, _, said = done
    assert said[0] == "12 trainings of 8 steps (linear) to do, 0 done before"
    assert report.settings["steps"] == {"linear": 8}
    assert "11 more in mode linear: about" in said[2]


def test_a_probe_scores_what_the_saved_model_would_segment(cases, tmp_path):
    pool, test = hold_out(cases)
    config = replace(CONFIG, mode="linear", validation=0.0, steps=30, crop=32, learning_rate=0.05)
    model = finetune(pool, config, tmp_path / "run", device="cpu")
    trainings = Trainings(pool, test, config, {}, tmp_path, "cpu")
    found = trainings._test(model, test[0], config, {})
    whole = segment(test[0].images[0], model, overlap=room.OVERLAP)
    truth = read_volume(test[0].label).data
    assert found == pytest.approx(dice_of_labels(whole.data, truth, {"background": 0} | ORGANS), abs=0.5)
    assert max(found.values()) > 5


def test_dice_is_that_of_the_evaluation():
    a, b = (np.random.default_rng(seed).integers(0, 4, (9, 8, 7)) for seed in range(2))
    a[a == 3], b[b == 3] = 2, 0
    found = dice_of_labels(a, b, {"background": 0, "one": 1, "two": 2, "nowhere": 9})
    expected = [overlap(a == k, b == k, (1.0, 1.0, 1.0)).dice for k in (1, 2)]
    assert found == {"one": pytest.approx(100 * expected[0]), "two": pytest.approx(100 * expected[1]), "nowhere": None}


def test_nothing_found_where_nothing_is_is_right(cases, tmp_path):
    trainings = Trainings(cases, cases, FinetuneConfig(1), {}, tmp_path, "cpu")
    assert trainings._score(next(iter(cases)), {"a": None, "b": None}) == 100.0
    assert trainings._score(next(iter(cases)), {"a": 0.0, "b": None}) == 0.0


def test_models_of_one_shape_share_their_scratch(tmp_path):
    other, wider = tmp_path / "other", tmp_path / "wider"
    entry = replace(model_info(NANO), heads=(), sources=())
    save_pretrained(UNet(3, 8), other, entry=entry)
    save_pretrained(UNet(3, 16), wider, entry=replace(entry, config=entry.config | {"width": 16}))
    arms = scratch_arms([NANO, str(other), str(wider)], {})
    assert arms == {NANO: "scratch", str(other): "scratch", str(wider): f"scratch of {wider}"}
    begun = {"scratch": shape_of(NANO)}  # a bench that goes on with others knows whose shape its arm has
    assert scratch_arms([str(wider), str(other)], begun) == {str(wider): f"scratch of {wider}", str(other): "scratch"}


def test_a_bench_notes_the_shape_of_its_arm_without_weights_and_each_mode_once(cases, done):
    _, out, _ = done
    assert scratch_before(out) == {"scratch": shape_of(NANO)} and scratch_before(out / "nothing") == {}
    again = bench(cases, [NANO], CONFIG, out, counts=[1, 3], modes=["linear", "linear"], device="cpu")
    assert len(again.cells) == 12 and len(again.comparisons) == 2
    assert not [path for path in (out / "cells").iterdir() if path.is_dir()]
    left = out / "cells" / Cell(NANO, "linear", 1, 0).name  # as of a bench that was killed behind this result
    left.mkdir()
    bench(cases, [NANO], CONFIG, out, counts=[1], modes=["linear"], device="cpu")
    assert not left.exists()


def test_a_bench_of_several_processes_is_refused(cases, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ArgumentError, match="a bench under torchrun; start it in one process"):
        bench(cases, [NANO], CONFIG, tmp_path, counts=[1], modes=["linear"], device="cpu")


# --- Interruption ---------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_an_interrupted_bench_repeats_no_training_and_ends_with_the_same_numbers(cases, done, tmp_path, monkeypatch):
    begun = []

    def limited(data, config, out, **settings):
        begun.append(out.name)
        if len(begun) == 5:
            raise Killed("at the fifth")
        return finetune(data, config, out, **settings)

    monkeypatch.setattr(room, "finetune", limited)
    settings = {"counts": [1, 3], "modes": ["linear"], "device": "cpu"}
    with pytest.raises(Killed, match="at the fifth"):
        bench(cases, [NANO], CONFIG, tmp_path, **settings)
    again = bench(cases, [NANO], CONFIG, tmp_path, **settings)
    assert len(begun) == 13 and begun[4] == begun[5] and len(set(begun)) == 12
    assert [c["scores"] for c in again.cells] == [c["scores"] for c in done[0].cells]


def test_the_features_of_a_frozen_backbone_are_computed_once_for_every_scan(cases, tmp_path, monkeypatch):
    computed, compute = [], loop.sliding_window
    monkeypatch.setattr(loop, "sliding_window", lambda *args, **kw: computed.append(1) or compute(*args, **kw))
    report = bench(cases, [NANO], CONFIG, tmp_path, counts=[1, 2], modes=["linear"], device="cpu")
    test = len(report.settings["test"])
    of_zoo = {name for c in report.cells if c["arm"] == NANO for name in c["taken"]}
    of_scratch = sum(len(c["taken"]) for c in report.cells if (c["arm"], c["count"]) == ("scratch", 2))
    assert len(computed) == len(of_zoo) + test + of_scratch + 3 * test  # one backbone from scratch a seed


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"config": replace(CONFIG, steps=3)}, "training"),
        ({"config": replace(CONFIG, learning_rate=0.5)}, f"{NANO}, linear"),
        ({"cases": {"liver": LABELS["liver"]}}, "labels"),
    ],
)
def test_a_folder_with_another_bench_is_refused(cases, folder, done, change, named):
    data = read_cases(folder, labels=change["cases"]) if "cases" in change else cases
    with pytest.raises(ArgumentError, match=f"holds a bench with other {named}"):
        bench(data, [NANO], change.get("config", CONFIG), done[1], counts=[1], modes=["linear"], device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 2}, "2 seeds"),
        ({"modes": ["half"]}, "modes half"),
        ({"counts": [1, 9]}, "counts 1, 9 of 4 labelled subjects"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(cases, tmp_path, change, message):
    with pytest.raises(ArgumentError, match=message):
        bench(cases, [NANO], CONFIG, tmp_path, device="cpu", **change)


def test_a_bench_whose_label_files_have_changed_is_not_gone_on_with(folder, done, tmp_path):
    mine, out = shutil.copytree(folder, tmp_path / "mine"), shutil.copytree(done[1], tmp_path / "out")
    options = {"counts": [1, 3], "modes": ["linear"], "device": "cpu"}
    same = bench(read_cases(mine, labels=ORGANS), [NANO], CONFIG, out, **options)
    assert same.to_dict() == done[0].to_dict()
    shutil.copy(mine / "labels/a.nii.gz", mine / "labels/b.nii.gz")
    with pytest.raises(ArgumentError, match="holds a bench with other files; use the same"):
        bench(read_cases(mine, labels=ORGANS), [NANO], CONFIG, out, **options)
    settings = json.loads((out / "settings.json").read_text())
    del settings["subjects"], settings["files"]  # as in a bench of before
    (out / "settings.json").write_text(json.dumps(settings))
    bench(read_cases(mine, labels=ORGANS), [NANO], CONFIG, out, **options)
    assert {"subjects", "files"} <= json.loads((out / "settings.json").read_text()).keys()


def test_a_draw_that_lacks_a_label_is_refused_before_the_first_training(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "finetune", lambda *_, **__: pytest.fail("it was trained"))
    mine = shutil.copytree(folder, tmp_path / "mine")
    for name in "abcde":
        volume = read_volume(mine / f"labels/{name}.nii.gz")
        data = np.where(volume.data == ORGANS["spine"], 0, volume.data)
        write_volume(replace(volume, data=data, path=None), mine / f"labels/{name}.nii.gz", overwrite=True)
    with pytest.raises(ArgumentError, match="none of 3 training cases holds spine on the model's grid"):
        bench(read_cases(mine, labels=ORGANS), [NANO], CONFIG, tmp_path / "out", counts=[3], device="cpu")


@pytest.fixture(scope="module")
def knowing(cases, tmp_path_factory):
    """The model as if it had seen a case that is tested on, and one that is not; and the tested one's name."""
    pool, test = hold_out(cases)
    model = load(NANO)
    ledger = ledger_of([*test[0].images, *pool.cases[0].images])
    path = tmp_path_factory.mktemp("knowing") / "model"
    save_pretrained(model, path, entry=replace(model.entry, ledger=ledger))
    return str(path), test[0].name


def test_a_test_on_what_pretraining_saw_is_refused_before_anything_is_trained(cases, knowing, tmp_path):
    model, name = knowing
    with pytest.raises(ArgumentError, match=rf"has seen 1 of 2 test cases in training: .*images/{name}\.nii\.gz"):
        bench(cases, [NANO, model], CONFIG, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_an_allowed_overlap_is_reported_with_the_verdicts(cases, knowing, tmp_path, monkeypatch):
    def invent(self, cells, say):
        random = np.random.default_rng(0)
        return {cell: {"scores": {case.name: random.random() for case in self.test}} for cell in cells}

    monkeypatch.setattr(Trainings, "run", invent)
    model, name = knowing
    options = {"counts": [1], "modes": ["linear"], "device": "cpu", "allow_overlap": True}
    report = bench(cases, [model], CONFIG, tmp_path, **options)
    assert report.to_dict()["seen in training"] == {model: [name]}
    assert report.lines()[-1] == f"{model} saw test cases in training: {name}"


def test_a_test_case_that_is_also_trained_on_under_another_name_is_refused(folder, tmp_path):
    rows = [f"{folder}/images/{name}.nii.gz,{folder}/labels/{name}.nii.gz,train,{name}" for name in "abc"]
    rows.append(f"{folder}/images/b.nii.gz,{folder}/labels/b.nii.gz,test,other")
    (tmp_path / "cases.csv").write_text("\n".join(["image,label,split,case", *rows]))
    with pytest.raises(ArgumentError, match=r"the data set to train on has seen 1 of 1 test cases"):
        bench(read_cases(tmp_path / "cases.csv", labels=ORGANS), [NANO], CONFIG, tmp_path / "out", device="cpu")


# --- Verdicts -------------------------------------------------------------------------------------------------------


def invented(effects, cases=12, scans=1):
    """A bench of invented scores: a zoo arm better than scratch by `effects`, count by count; a subject's scans are
    copies of one.
    """
    random, results = np.random.default_rng(0), {}
    subjects = {f"{subject}-{scan}": str(subject) for subject in range(cases) for scan in range(scans)}
    for count, effect in effects.items():
        for seed in range(3):
            scratch = 50 + 10 * random.normal(size=cases)
            for arm, scores in (("scratch", scratch), ("zoo", scratch + effect + random.normal(size=cases))):
                values = dict(zip(subjects, np.repeat(scores, scans).tolist(), strict=True))
                results[Cell(arm, "full", count, seed)] = {"scores": values}
    rows = compared(results, subjects, {"zoo": "scratch"}, ["full"], list(effects), 3)
    cells = tuple({"arm": c.arm, "mode": c.mode, "count": c.count, "seed": c.seed} | results[c] for c in results)
    return Bench("segmentation", {"test": list(subjects), "subjects": subjects}, cells, rows)


def test_the_verdict_names_the_gain_with_its_interval_and_where_there_is_none():
    [text] = invented({1: 12.0, 3: 0.0}).verdicts
    assert re.match(r"zoo, full: helps by 1[12]\.\d \+- \d\.\d Dice at 1 scan; ", text)
    assert text.endswith("no sure difference at 3 scans")


def test_the_verdict_does_not_flatter():
    assert invented({1: 0.0, 3: 0.0}).verdicts == ["zoo, full: not shown to help: no sure difference at 1, 3 scans"]
    assert re.match(r"zoo, full: hurts by [78]\.\d \+- 1\.\d Dice at 3 scans$", invented({3: -8.0}).verdicts[0])


def test_more_scans_of_the_same_subjects_are_no_more_evidence():
    one, eight = (invented({1: 2.0, 3: 0.0}, cases=4, scans=scans) for scans in (1, 8))
    assert [row.to_dict() for row in eight.comparisons] == [pytest.approx(row.to_dict()) for row in one.comparisons]
    assert eight.lines()[0] == "full: mean Dice in % over 32 test cases of 4 subjects and all seeds"


def test_of_one_test_subject_there_is_no_verdict_and_the_report_says_why(tmp_path):
    report = invented({1: 12.0, 3: 9.0}, cases=1, scans=8)
    assert report.verdicts == ["zoo, full: not shown to help: one test subject says nothing about others"]
    assert [(row.effect, row.p, row.half) for row in report.comparisons] == [("unclear", 1.0, np.inf)] * 2
    room.write_report(report, tmp_path)
    text = (tmp_path / "results.json").read_text()
    rows = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["comparisons"]
    assert [row["half"] for row in rows] == [None, None] and "over 8 test cases of 1 subject and" in report.lines()[0]
    assert (tmp_path / "curves.png").exists()


def test_between_sure_and_unclear_the_verdict_says_probably():
    row = replace(invented({1: 2.0}).comparisons[0], p=0.03, p_corrected=0.06)
    assert row.effect == "probably helps"
    assert replace(row, difference=-row.difference).effect == "probably hurts"
    assert replace(row, p=0.06, p_corrected=0.06).effect == "unclear"
    assert replace(row, p_corrected=0.03).effect == "helps"


def test_pairs_make_a_difference_sure_that_the_spread_of_cases_would_hide():
    [row] = invented({1: 2.0}).comparisons
    assert row.effect == "helps" and row.half < 2 < 10


def test_more_comparisons_ask_for_more_evidence():
    alone, among = invented({1: 2.0}).comparisons[0], invented({1: 2.0, 3: 0.0, 5: 0.0}).comparisons[0]
    assert alone.p == pytest.approx(among.p) and among.p_corrected == pytest.approx(3 * alone.p_corrected)


# --- The command, and other tasks -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_prints_tables_and_verdicts(folder, tmp_path):
    words = ["bench", "--data", str(folder), "--labels", ",".join(f"{k}={v}" for k, v in ORGANS.items())]
    words += ["--counts", "1", "--steps", "1", "--set", "crop=16", "--device", "cpu", "-o", str(tmp_path)]
    words += ["--modes", "full, linear"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert f"{NANO}, full: " in result.output and f"{NANO}, linear: " in result.output
    assert "12 trainings of 1 steps (full) and 4 steps (linear) to do" in result.output
    again = CliRunner().invoke(main, [*words, "--json"])
    assert "0 trainings of 1 steps (full) and 4 steps (linear) to do, 12 done before" in again.stderr
    assert len(json.loads(again.stdout)["cells"]) == 12


def test_a_classification_begins_with_as_many_subjects_as_there_are_classes(folder, tmp_path, monkeypatch):
    def checked(self, cells, say):
        self._check(cells)
        raise Killed(str(sorted({cell.count for cell in cells})))

    monkeypatch.setattr(Trainings, "run", checked)
    data, config = read_cases(folder / "classes.csv", task="classification"), replace(CONFIG, task="classification")
    with pytest.raises(Killed, match=r"\[2, 3\]"):
        bench(data, [NANO], config, tmp_path, seeds=9, device="cpu")
    with pytest.raises(ArgumentError, match=r"none of 1 training cases is of the class (ill|healthy); train on"):
        bench(data, [NANO], config, tmp_path, counts=[1], device="cpu")


@pytest.mark.slow
def test_classes_of_scans_are_scored_by_whether_the_most_probable_is_right(folder, tmp_path):
    data = read_cases(folder / "classes.csv", task="classification")
    config = replace(CONFIG, task="classification", crop=16)
    report = bench(data, [NANO], config, tmp_path, counts=[4], device="cpu")
    assert {value for c in report.cells for value in c["scores"].values()} <= {0.0, 100.0}
    assert all(sum(row.values()) == pytest.approx(100) for c in report.cells for row in c["details"].values())


@pytest.mark.slow
def test_films_are_segmented_too(tmp_path):
    model = tmp_path / "films"
    entry = replace(model_info("gvsl-unet-xray"), status="available", heads=(), config={"ndim": 2, "width": 8})
    save_pretrained(UNet(2, 8, generator=torch.Generator().manual_seed(0)), model, entry=entry)
    from PIL import Image

    for part in ("images", "labels"):
        (tmp_path / "mine" / part).mkdir(parents=True)
    for seed in range(4):
        film = sample_film((48, 48), torch.Generator().manual_seed(seed))
        Image.fromarray((255 * film.image.numpy()).astype(np.uint8)).save(tmp_path / f"mine/images/{seed}.png")
        Image.fromarray(film.masks[0].numpy().astype(np.uint8)).save(tmp_path / f"mine/labels/{seed}.png")
    data = read_cases(tmp_path / "mine", labels={"lungs": 1})
    report = bench(data, [str(model)], replace(CONFIG, crop=32), tmp_path / "out", counts=[2], device="cpu")
    assert len(report.cells) == 12 and all(0 <= v <= 100 for c in report.cells for v in c["scores"].values())
