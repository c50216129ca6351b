"""Classification: the probabilities of a trained head, on what it learnt from, one file or many."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gvsl_zoo import classify, finetune, load, model_info, registry, save_pretrained, write_volume
from gvsl_zoo.cli import main
from gvsl_zoo.demo import as_volume
from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.ledger import LeakageWarning
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.pretrain.anatomy import sample_film, sample_subject
from gvsl_zoo.transfer.cases import read_cases
from gvsl_zoo.transfer.classify import classify_all, scans_at
from gvsl_zoo.transfer.config import FinetuneConfig

pytest.importorskip("accelerate")
Image = pytest.importorskip("PIL.Image", reason="needs gvsl-zoo[io]")
MM = 12.0
FILM, SCAN = (24, 32), (20, 18, 24)


@pytest.fixture(autouse=True)
def a_home_and_a_registry_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_added", {})


def table(folder, names):
    """Images by name as a data set of two classes, the last two of them its test cases."""
    rows = [f"{name},{'odd' if n % 2 else 'even'},{'test' if n > 3 else 'train'}" for n, name in enumerate(names)]
    (folder / "data.csv").write_text("\n".join(["image,label,split", *rows]) + "\n")
    return folder / "data.csv"


def trained(data, folder, **settings):
    config = FinetuneConfig(steps=2, task="classification", bf16=False, validation=0.0, **settings)
    finetune(read_cases(data, task="classification"), config, folder, device="cpu")
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Six synthetic films, their table, and a model of two classes fine-tuned on them."""
    folder = tmp_path_factory.mktemp("films")
    for number in range(6):
        film = sample_film(FILM, torch.Generator().manual_seed(number), (MM, MM))
        Image.fromarray((255 * film.image).round().byte().numpy()).save(folder / f"f{number}.png")
    data = table(folder, [f"f{number}.png" for number in range(6)])
    unet = UNet(2, 8, generator=torch.Generator().manual_seed(0))
    entry = replace(model_info("gvsl-unet-xray"), status="available", config={"ndim": 2, "width": 8}, heads=())
    base = save_pretrained(unet, tmp_path_factory.mktemp("base") / "model", entry=entry)
    return folder, data, trained(data, tmp_path_factory.mktemp("films-run") / "run", model=str(base), crop=16)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Six synthetic scans, their table, and a model of two classes fine-tuned on boxes about their middle."""
    folder = tmp_path_factory.mktemp("scans")
    for number in range(6):
        subject = sample_subject(SCAN, torch.Generator().manual_seed(number), (MM,) * 3)
        write_volume(as_volume(subject), folder / f"s{number}.nii.gz")
    data = table(folder, [f"s{number}.nii.gz" for number in range(6)])
    return folder, data, trained(data, tmp_path_factory.mktemp("scans-run") / "run", crop=16, spacing_mm=MM)


def run(*arguments):
    return CliRunner().invoke(main, ["classify", *map(str, arguments), "--device", "cpu"])


def close(found, logits):
    np.testing.assert_allclose(list(found.values()), logits[0].softmax(0).detach(), atol=1e-5)


def test_a_film_is_seen_whole(films):
    folder, _, path = films
    model = load(path, task="classification")
    found = classify(folder / "f0.png", model)
    assert list(found) == ["even", "odd"] and sum(found.values()) == pytest.approx(1)
    close(found, model(model.preprocess(folder / "f0.png")))


def test_of_a_scan_the_box_that_the_head_learnt_from_is_seen(scans):
    folder, _, path = scans
    model = load(path, task="classification")
    assert model.entry.input.window == (16, 16, 16)
    image = model.preprocess(folder / "s0.nii.gz")
    assert image.shape[2:] == SCAN
    close(classify(folder / "s0.nii.gz", model), model(image[..., 2:18, 1:17, 4:20]))


def test_validation_of_a_run_saw_what_classification_sees(films, tmp_path):
    _, data, _ = films
    config = FinetuneConfig(steps=1, task="classification", bf16=False, model=str(films[2]), crop=16, save_every=1)
    with pytest.warns(LeakageWarning, match="validation on scans"):
        finetune(read_cases(data, task="classification"), config, tmp_path / "run", device="cpu")
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    held = json.loads((tmp_path / "run" / "cases.json").read_text())["val"]
    classes = {case.name: case for case in read_cases(data, task="classification")}
    model = load(tmp_path / "run", task="classification")
    right = [max(p := classify(classes[n].images, model), key=p.get) == ("even", "odd")[classes[n].label] for n in held]
    assert record["accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.parametrize("kind", ["films", "scans"])
def test_the_command_classifies_the_test_cases_of_a_data_set_and_evaluate_takes_them(kind, request, tmp_path):
    folder, data, path = request.getfixturevalue(kind)
    result = run("-i", data, "-o", tmp_path / "p.csv", "--model", path, "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    with (tmp_path / "p.csv").open() as file:
        rows = {row.pop("case"): row for row in csv.DictReader(file)}
    assert list(rows) == list(printed) == [f"{kind[0]}4", f"{kind[0]}5"]
    model = load(path, task="classification")
    for case, row in rows.items():
        expected = classify(next(folder.glob(f"{case}.*")), model)
        assert {name: float(p) for name, p in row.items()} == pytest.approx(expected, abs=1e-6)
    arguments = ["evaluate", "--predictions", tmp_path / "p.csv", "--references", data, "--task", "classification"]
    result = CliRunner().invoke(main, [str(a) for a in (*arguments, "-o", tmp_path / "scores")])
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "scores" / "summary.json").read_text())["cases"] == 2


def test_one_that_cannot_be_read_stops_no_other(films, tmp_path):
    folder, _, path = films
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "good.png").write_bytes((folder / "f1.png").read_bytes())
    (tmp_path / "in" / "bad.png").write_bytes(b"no picture")
    result = run("-i", tmp_path / "in", "-o", tmp_path / "p.csv", "--model", path)
    assert result.exit_code == 1 and "1 of 2 cases failed" in result.stderr and "bad" in result.stderr
    assert (tmp_path / "p.csv").read_text().splitlines()[1].startswith("good,")


def test_the_files_of_channels_are_one_case_each_and_none_may_be_missing(tmp_path):
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        (tmp_path / f"{name}.nii.gz").write_bytes(b"")
    found = scans_at(tmp_path, films=False, channels=2)
    assert {case: [path.name[:6] for path in paths] for case, paths in found.items()} == {
        "a": ["a_0000", "a_0001"],
        "b": ["b_0000", "b_0001"],
    }
    assert len(scans_at(tmp_path, films=False)) == 4
    (tmp_path / "b_0001.nii.gz").unlink()
    for path in (tmp_path, tmp_path / "a_0000.nii.gz"):
        with pytest.raises(ArgumentError, match=r"_0000 for a model of 2 channels; give ._0000, ._0001"):
            scans_at(path, films=False, channels=2)


def test_a_folder_a_file_and_a_series_are_told_apart(films, tmp_path):
    folder, data, _ = films
    assert list(scans_at(folder, films=True)) == [f"f{number}" for number in range(6)]
    assert list(scans_at(folder / "f3.png", films=True)) == ["f3"]
    assert list(scans_at(data, films=True)) == ["f4", "f5"]
    (tmp_path / "series").mkdir()
    for number in range(2):
        (tmp_path / "series" / f"{number}.dcm").write_bytes(bytes(128) + b"DICM")
    assert scans_at(tmp_path / "series", films=False) == {"series": (tmp_path / "series",)}
    assert list(scans_at(tmp_path / "series", films=True)) == ["0", "1"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "gvsl-unet-ct-nano"}, "gvsl-unet-ct-nano has no trained classification head; train one: gvsl-zoo fi"),
        ({}, "a UNet without the head that was trained with it; load it with task='classification'"),
        ({"task": "classification", "num_classes": 3}, "ClassificationModel without the head|has no trained"),
    ],
    ids=["no head", "backbone", "fresh head"],
)
def test_a_model_without_its_trained_head_is_refused(films, model, message):
    model = dict(model)
    with pytest.raises(ArgumentError, match=message):
        classify_all({}, load(model.pop("name", films[2]), **model))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["-i", "{films}", "-o", "{out}/p.txt", "--model", "{run}"], 2, "end it in .csv"),
        (["-i", "{films}", "-o", "{films}/data.csv", "--model", "{run}"], 1, "data.csv"),
        (["-i", "{out}", "--model", "{run}"], 2, "holds no .nii.gz, .nii, .png or DICOM"),
        (["-i", "{films}"], 2, "has no trained classification head"),
    ],
    ids=["ending", "output exists", "empty folder", "no head"],
)
def test_a_wrong_call_is_told_in_one_line(films, tmp_path, arguments, code, message):
    places = {"films": films[0], "out": tmp_path, "run": films[2]}
    result = run(*(argument.format(**places) for argument in arguments))
    assert result.exit_code == code and message in result.stderr and len(result.stderr.strip().splitlines()) == 1


def test_scans_of_one_class_or_of_none_can_be_classified_but_not_learnt(films, tmp_path):
    folder, _, path = films
    for label in ("odd", ""):
        (folder / "one.csv").write_text(f"image,label\nf0.png,{label}\nf1.png,{label}\n")
        assert list(scans_at(folder / "one.csv", films=True)) == ["f0", "f1"]
    config = FinetuneConfig(steps=1, task="classification", model=str(path))
    (folder / "one.csv").write_text("image,label\nf0.png,odd\nf1.png,odd\n")
    with pytest.raises(ArgumentError, match=r"the classes \['odd'\]; two at least make a task"):
        finetune(read_cases(folder / "one.csv", task="classification"), config, tmp_path / "run", device="cpu")
