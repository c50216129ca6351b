"""Tests of what a card says of input, proof, base and pictures; tests/test_share.py has how it travels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard

from gvsl_zoo import load, model_info, save_pretrained
from gvsl_zoo.card import PICTURES, card_files, model_card
from gvsl_zoo.registry import Evaluation, Label, ModelEntry, Source, list_models
from gvsl_zoo.report import curves_picture

NANO = "gvsl-unet-ct-nano"
CT = model_info(NANO)


def test_the_metadata_is_what_the_hub_knows():
    """Names of the Hub's model card specification, and nothing of ours."""
    card = ModelCard(model_card(CT))
    known = {"datasets", "library_name", "license", "pipeline_tag", "tags", "model-index", "base_model"}
    assert set(card.data.to_dict()) <= known
    other = ModelCard(model_card(replace(CT, licence=replace(CT.licence, weights="ask us")))).data
    assert (other.license, other.license_name, other.license_link) == ("other", "see-license", "LICENSE")
    assert card.data.datasets == list(CT.datasets) and card.data.library_name == "gvsl-zoo"
    assert {result.dataset_name for result in card.data.eval_results} == {one.data for one in CT.evaluation}


def test_a_card_tells_the_statistics_of_the_training_images():
    text, known = model_card(CT), CT.input_statistics
    assert f"- {known.images} images; " in text and "- voxels below -200 HU: " in text
    assert "- spacing along x, y, z: 1.5 x 1.5 x 1.5 to 3 x 3 x 8 mm" in text
    assert "What the training images were" not in model_card(replace(CT, input_statistics=None))


@pytest.mark.parametrize(("repo", "name"), [(None, "path/to/this/folder"), ("org/model", "hf-hub:org/model")])
def test_a_card_tells_how_to_check_its_proof(repo, name):
    text = model_card(CT, repo)
    assert f"`gvsl-zoo verify --maths {name}`" in text and f"{len(CT.proof.digests)} digests" in text
    assert "## Proof" not in model_card(replace(CT, proof=None))


def test_a_bar_in_a_text_does_not_end_a_cell_of_a_table():
    labels = (Label("left | right", 1),)
    text = model_card(
        replace(CT, heads=("segmentation",), labels=labels, evaluation=(Evaluation("t", "a|b", "m", 1.0),))
    )
    assert "| 0 | left \\| right | 1 |" in text and "| t | a\\|b | m | 1 |" in text


def test_a_model_with_a_recipe_tells_the_command_that_repeats_it():
    assert f"`gvsl-zoo reproduce {NANO} --data DATA --out RUN`" in model_card(CT)
    other = replace(CT, training=replace(CT.training, recipe="by hand"))
    assert f"gvsl-zoo reproduce {NANO} --data" not in model_card(other)


@pytest.mark.parametrize(
    ("base", "told"), [("org/model", "org/model"), (NANO, None), ("nobodys-model", None), (None, None)]
)
def test_the_base_is_in_the_metadata_where_the_hub_has_it_and_in_the_text_always(base, told):
    text = model_card(replace(CT, base_model=base))
    assert ModelCard(text).data.base_model == told and (f"Made from {base}." in text) == (base is not None)


def test_the_base_is_the_repository_of_a_registered_model(monkeypatch):
    import gvsl_zoo.card as room

    source = Source("hub", repo="org/base", file="model.safetensors", revision="0" * 40, bytes=1, sha256="0" * 64)
    monkeypatch.setattr(room, "model_info", lambda name: replace(CT, sources=(source,)))
    assert ModelCard(model_card(replace(CT, base_model="base"))).data.base_model == "org/base"


def test_pictures_are_shown_where_they_lie_beside_the_card(tmp_path):
    there = [f"{NANO}-{kind}.png" for kind in PICTURES]
    text = card_files(CT, pictures=[*there[:2], "other.png"])["README.md"]
    assert [f"]({name})" in text for name in [*there, "other.png"]] == [True, True, False, False, False]
    assert "## Pictures" not in model_card(CT)
    (tmp_path / there[0]).write_bytes(b"")
    save_pretrained(load(NANO), tmp_path)
    assert f"]({there[0]})" in (tmp_path / "README.md").read_text()


def test_a_large_picture_keeps_its_shades_in_few_colours(tmp_path, monkeypatch):
    for package in ("PIL", "sklearn", "matplotlib"):
        pytest.importorskip(package, reason="pictures need gvsl-zoo[viz]")
    from PIL import Image

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
    import card_pictures as room

    rows, columns = np.mgrid[:320, : room.WIDTH]
    shades = np.stack([columns / 5, rows / 1.3, 255 - columns / 5], -1)
    shades += np.random.default_rng(0).normal(0, 4, shades.shape)
    shades = shades.clip(0, 255).astype(np.uint8)
    shades[:16] = 255
    Image.fromarray(shades).save(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > room.MOST_BYTES
    assert room.shrunk(tmp_path / "x.png") == (tmp_path / "x.png").stat().st_size
    with Image.open(tmp_path / "x.png") as image:
        assert image.mode == "P" and image.size == (room.WIDTH, 320)
        error = np.asarray(image.convert("RGB"), float) - shades
        assert not error[:15].any()  # white stays white
    assert np.abs(error.reshape(20, 16, -1, 16, 3).mean((1, 3))).mean() < 0.6  # of 255; 1.2 without dithering


@pytest.mark.parametrize("name", list_models())
def test_every_entry_survives_its_own_card(name):
    entry = model_info(name)
    assert ModelEntry.from_dict(entry.to_dict()) == entry and ModelCard(model_card(entry)).data.tags


def test_learning_curves_take_a_log_whose_first_record_was_not_validated(tmp_path):
    """As one is that was stopped by a signal."""
    pytest.importorskip("matplotlib", reason="pictures need gvsl-zoo[viz]")
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "ncc_before": 0.3}, {"step": 3, "loss": 1.5}]
    curves_picture(log, tmp_path / "first.png")
    log = [{"step": 1, "loss": 2.0, "other": 0.1}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5, "other": 0.3}]
    curves_picture(log, tmp_path / "gap.png")
    assert (tmp_path / "first.png").is_file() and (tmp_path / "gap.png").is_file()
