"""Tests of what leaves this machine: folders, model cards, and pushes to a Hub on loopback through the real client."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import textwrap
import time
import traceback
import weakref
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import hub_server
import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from hub_server import Hub, at, fault, html_portal, reset, status
from huggingface_hub import ModelCard
from PIL import Image

from gvsl_zoo import from_pretrained, load, model_info, push_to_hub, registry, save_pretrained
from gvsl_zoo.card import card_files, model_card
from gvsl_zoo.demo import as_volume
from gvsl_zoo.errors import ArgumentError, RegistryError, SourceError, WeightsError
from gvsl_zoo.models.heads import SegmentationModel
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.proof import verify_maths
from gvsl_zoo.registry import Digest, Evaluation, Input, Intensity, Label, Licence, Proof, Source, list_models
from gvsl_zoo.volume import write_volume
from gvsl_zoo.weights import WEIGHTS_NAME
from gvsl_zoo.zoo import entry_of, open_weights

NANO = "gvsl-unet-ct-nano"
REPO = "org/model"
FIVE = ["LICENSE", "README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
MEASURED = Evaluation("segmentation", "Ten CTs, own", "Dice, %", 41.9, 24.4, (0, 1), "python -m benchmarks.transfer")
PAPERS = Evaluation("classification", "COVID CT", "AUC, %", 82.2)
MINE = replace(  # an entry of one's own, with everything that a change of the weights makes untrue
    model_info(NANO),
    name="mine",
    evaluation=(MEASURED, PAPERS),
    proof=Proof("sines-0", (Digest("cube", "local", (0.0,) * 6),), 1e-4, 1e-2),  # replaced by that of the weights saved
    licence=Licence("MIT", "research only, ask us", "own scans"),
)


@pytest.fixture(autouse=True)
def a_home_and_a_registry_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_added", {})


@pytest.fixture
def hub(monkeypatch):
    """The Hub on loopback, for which this process and those that it starts have a token to write."""
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield hub


@pytest.fixture
def saved(tmp_path):
    """The nano model's whole module in a folder of its own, under the entry MINE."""
    return save_pretrained(load(NANO, task="pretraining"), tmp_path / "saved", entry=MINE).parent


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def front_matter(card):
    """The card's metadata, as any YAML reader sees it, and its text."""
    head, text = re.fullmatch(r"---\n(.*?\n)---\n(.*)", card, re.DOTALL).groups()
    return yaml.safe_load(head), text


def block_of(card):
    [block] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    return block


# --- The five files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["backbone", "pretraining"])
def test_a_saved_model_is_five_files_that_say_the_same(task, tmp_path):
    path = save_pretrained(load(NANO, task=task), tmp_path / "out")
    assert names_in(path.parent) == FIVE
    own = entry_of(open_weights(path))
    config = json.loads((path.parent / "config.json").read_text())
    assert config["library_name"] == "gvsl-zoo" and config["entry"] == own.to_dict()
    assert json.loads((path.parent / "preprocessor_config.json").read_text()) == own.to_dict()["input"]
    assert (path.parent / "README.md").read_text() == model_card(own)


def test_the_same_model_saved_twice_is_the_same_bytes(tmp_path):
    model = load(NANO)
    folders = [save_pretrained(model, tmp_path / name).parent for name in "ab"]
    assert [(folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in FIVE] == [True] * 5


def test_apache_weights_come_with_the_apache_licence(tmp_path):
    text = (save_pretrained(load(NANO), tmp_path).parent / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0" in text and "END OF TERMS AND CONDITIONS" in text


def test_other_weights_come_with_the_three_statements(saved):
    text = (saved / "LICENSE").read_text()
    assert text == "Weights: research only, ask us\nCode: MIT\nTraining data: own scans\n"


def test_a_file_that_cannot_be_replaced_is_a_typed_error_and_the_old_weights_stay(saved):
    before = (saved / WEIGHTS_NAME).read_bytes()
    (saved / "README.md").unlink()
    (saved / "README.md").mkdir()
    with pytest.raises(WeightsError, match=rf"cannot write to {re.escape(str(saved))}: .*directory; .*another"):
        save_pretrained(load(NANO), saved)
    assert (saved / WEIGHTS_NAME).read_bytes() == before and names_in(saved) == FIVE


# --- The card --------------------------------------------------------------------------------------------------


def test_the_hub_reads_the_cards_metadata(saved):
    card = ModelCard.load(saved / "README.md")
    assert (card.data.library_name, card.data.license, card.data.license_name) == ("gvsl-zoo", "other", "see-license")
    assert {"medical-imaging", "3d", "CT", "gvsl", "unet"} <= set(card.data.tags)
    metadata, _ = front_matter((saved / "README.md").read_text())
    assert metadata == card.data.to_dict() and metadata["pipeline_tag"] == "image-feature-extraction"


def test_only_what_was_measured_with_a_command_is_in_the_model_index(saved):
    text = (saved / "README.md").read_text()
    [result] = ModelCard(text).data.eval_results
    assert (result.metric_value, result.metric_name, result.dataset_name) == (41.9, "Dice, %", "Ten CTs, own")
    assert (result.task_type, result.dataset_type) == ("image-segmentation", "ten-cts-own")
    assert "| COVID CT | AUC, % | 82.2 |  |  | the paper |" in text  # told, as the paper's
    assert "| Ten CTs, own | Dice, % | 41.9 | 24.4 | 0, 1 | `python -m benchmarks.transfer` |" in text


@pytest.mark.parametrize("evaluation", [(), (PAPERS,)], ids=["nothing", "papers"])
def test_without_a_measurement_there_is_no_model_index(evaluation):
    metadata, text = front_matter(model_card(replace(MINE, evaluation=evaluation)))
    assert "model-index" not in metadata and metadata["library_name"] == "gvsl-zoo"
    assert ("Nothing has been measured." in text) == (not evaluation)


def test_apache_weights_are_tagged_as_such():
    metadata, _ = front_matter(model_card(model_info(NANO)))
    assert metadata["license"] == "apache-2.0" and "license_name" not in metadata


@pytest.mark.parametrize("name", list_models())
def test_every_models_card_can_be_read_and_warns(name):
    entry = model_info(name)
    card = ModelCard(model_card(entry))
    assert card.data.license and card.data.tags[1] == f"{entry.ndim}d"
    for said in ("not a medical device", entry.limits, entry.citation, *vars(entry.licence).values()):
        assert said in card.text, said
    compile(block_of(card.text), name, "exec")


def scan_at(path):
    subject = sample_subject((32, 32, 32), torch.Generator().manual_seed(0), spacing_mm=(6.0, 6.0, 6.0))
    write_volume(as_volume(subject), path)


@pytest.mark.parametrize("chans", [1, 3])
def test_the_cards_python_runs(chans, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scan_at(tmp_path / "scan.nii.gz")
    model = load(NANO, in_chans=chans)
    folder = save_pretrained(model, tmp_path / "path/to/this/folder").parent
    names: dict = {}
    exec(block_of((folder / "README.md").read_text()), names)
    with torch.no_grad():
        assert torch.equal(names["features"], model(model.preprocess("scan.nii.gz")))


@pytest.mark.parametrize("chans", [1, 3])
def test_the_python_of_a_card_for_films_runs(chans, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    films = Input("yx", Intensity("grey", (0, 255), (0, 1)))
    entry = replace(MINE, config={"ndim": 2, "width": 8}, ndim=2, modality="X-ray", heads=(), input=films)
    unet = UNet(2, 8, in_chans=chans, generator=torch.Generator().manual_seed(0)).eval()
    folder = save_pretrained(unet, tmp_path / "path/to/this/folder", entry=entry).parent
    Image.fromarray((255 * torch.rand(32, 48)).byte().numpy()).save(tmp_path / "film.png")
    names: dict = {}
    exec(block_of((folder / "README.md").read_text()), names)
    with torch.no_grad():
        assert torch.equal(names["features"], unet(load(folder).preprocess("film.png")))


def test_a_pushed_card_tells_how_to_load_it_from_there():
    assert 'load("hf-hub:org/model")' in block_of(card_files(MINE, REPO)["README.md"])


# --- What was measured belongs to the weights that were measured -----------------------------------------------


def as_it_came(model):
    return model


def copied(model):
    return deepcopy(model)


def to_and_fro(model):
    return model.double().float()


def thawed_and_frozen(model):
    return model.train().requires_grad_(False).eval()


@pytest.mark.parametrize("task", ["backbone", "pretraining"])
@pytest.mark.parametrize("what", [as_it_came, copied, to_and_fro, thawed_and_frozen])
def test_weights_as_they_came_keep_their_evaluation(what, task, saved, tmp_path):
    own = entry_of(open_weights(save_pretrained(what(load(saved, task=task)), tmp_path / "out")))
    assert (own.evaluation, own.sources, own.limits) == (MINE.evaluation, MINE.sources, MINE.limits)
    before = {(one.image, one.output): one for one in load(saved).entry.proof.digests}
    assert all(before[one.image, one.output] == one for one in own.proof.digests)


def test_half_precision_keeps_the_evaluation_and_says_its_dtype(saved, tmp_path):
    full = save_pretrained(load(saved), tmp_path / "full")
    half = save_pretrained(load(saved), tmp_path / "half", dtype=torch.float16)
    assert entry_of(open_weights(half)) == entry_of(open_weights(full))
    assert half.stat().st_size < 0.6 * full.stat().st_size
    assert {slot.dtype for slot in open_weights(half).slots.values()} == {torch.float16}
    again = save_pretrained(load(half.parent), tmp_path / "again", dtype=torch.float16)
    assert again.read_bytes() == half.read_bytes()


def one_number_changed(folder):
    model = load(folder)
    next(model.parameters()).data.view(-1)[0] += 1e-3
    return model


def drawn_at_random(folder):
    return load(folder, pretrained=False)


def drawn_and_saved(folder):
    return load(save_pretrained(drawn_at_random(folder), folder.with_name("drawn")).parent)


def trained_a_step(folder):
    model = load(folder, task="pretraining").train()
    optimiser = torch.optim.SGD(model.parameters(), 1e-2)
    x = torch.rand(1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0))
    sum(out.square().mean() for out in model(x, x.flip(2))).backward()
    optimiser.step()
    return model.eval()


def spread_over_three_channels(folder):
    return load(folder, in_chans=3)


def without_its_file(folder):
    model = load(folder)
    (folder / WEIGHTS_NAME).unlink()
    return model


CHANGES = [one_number_changed, trained_a_step, spread_over_three_channels, without_its_file]


@pytest.mark.parametrize("change", CHANGES)
def test_other_weights_drop_what_was_measured_and_say_so_once(change, saved, tmp_path):
    model = change(saved)
    for turn in "ab":  # from memory, then from the file of the first
        folder = save_pretrained(model, tmp_path / turn).parent
        own = entry_of(open_weights(folder / WEIGHTS_NAME))
        assert (own.evaluation, own.sources) == ((), ())
        assert own.limits.count("are not those of mine") == 1 and own.limits.endswith(MINE.limits)
        metadata, text = front_matter((folder / "README.md").read_text())
        assert "model-index" not in metadata and "Nothing has been measured." in text
        assert text.count("are not those of mine, from which they were made") == 1
        chans = own.config.get("in_chans", 1)
        model = load(folder, task="pretraining" if own.heads else "backbone")
        assert chans == (3 if change is spread_over_three_channels else 1)
        next(model.parameters()).data.view(-1)[0] += 1e-3
    assert verify_maths(str(folder)).verdict == "PASS"  # the proof is theirs


@pytest.mark.parametrize("place", ["where it came from", "elsewhere"])
def test_weights_saved_over_those_they_came_from_are_still_other_weights(place, saved, tmp_path):
    model = one_number_changed(saved)
    save_pretrained(model, saved)
    again = save_pretrained(model, saved if place == "where it came from" else tmp_path / "elsewhere")
    assert entry_of(open_weights(again)).evaluation == ()


def test_an_entry_that_is_given_is_believed(saved, tmp_path):
    path = save_pretrained(one_number_changed(saved), tmp_path / "out", entry=replace(MINE, name="other"))
    own = entry_of(open_weights(path))
    assert (own.name, own.evaluation) == ("other", MINE.evaluation)


@pytest.mark.parametrize("change", [drawn_at_random, drawn_and_saved])
def test_weights_that_began_at_random_are_nobodys(change, saved, tmp_path):
    folder = save_pretrained(change(saved), tmp_path / "out").parent
    own = entry_of(open_weights(folder / WEIGHTS_NAME))
    assert "These weights began at random, in the shape of mine" in own.limits and MINE.limits not in own.limits
    assert (own.training, own.base_model, own.datasets, own.input_statistics, own.evaluation) == (
        None,
        None,
        (),
        None,
        (),
    )
    assert not own.ledger.scans and not own.ledger.complete
    assert own.licence == Licence("MIT", "not stated", "not stated")
    assert "reproduce" not in (folder / "README.md").read_text()


def test_the_shape_of_the_authors_model_may_be_published_with_weights_of_ones_own(hub):
    own = load("gvsl-unet-ct", pretrained=False)
    assert own.push_to_hub(REPO).repo == REPO
    assert load(f"hf-hub:{REPO}").entry.status == "available"


@pytest.mark.parametrize("way", ["loaded with a head", "a head around what was loaded"])
def test_a_head_of_ones_own_takes_over_no_number_and_no_ledger(saved, tmp_path, way):
    model = load(saved, task="segmentation", num_classes=2)
    if way == "a head around what was loaded":
        model = SegmentationModel(load(saved), 2)
    labels = tuple(Label(f"class {value}", value) for value in np.arange(2))
    rows = replace(MEASURED, data="own")
    entry = replace(load(saved).entry, heads=("segmentation",), labels=labels, evaluation=(*MINE.evaluation, rows))
    own = entry_of(open_weights(save_pretrained(model, tmp_path / "out", entry=entry)))
    assert (own.evaluation, own.sources, own.ledger.complete) == ((rows,), (), False)
    assert own.labels == (Label("class 0", 0), Label("class 1", 1)) and own.ledger.scans == MINE.ledger.scans


def test_an_entry_that_load_would_refuse_is_not_written(saved, tmp_path):
    model = load(saved)
    for change, match in (
        ({"name": "LungSeg_v2"}, "expected a lower-case name such as gvsl-unet-ct, got 'LungSeg_v2'"),
        ({"citation": "https://www.example.org/x"}, "www.example.org is refused"),
    ):
        with pytest.raises(RegistryError, match=match):
            save_pretrained(model, tmp_path / "out", entry=replace(MINE, **change))
    assert not (tmp_path / "out").exists()


def test_no_path_of_this_machine_is_saved(tmp_path):
    path = save_pretrained(load(NANO), tmp_path / "made on this machine")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    here = replace(MINE, sources=(Source("file", path=str(path), sha256=digest),))
    folder = save_pretrained(load(NANO, task="pretraining"), tmp_path / "out", entry=here).parent
    assert all(str(tmp_path).encode() not in file.read_bytes() for file in folder.iterdir())


def test_a_backbone_alone_has_no_heads(saved, tmp_path):
    model = load(saved)
    own = entry_of(open_weights(save_pretrained(model, tmp_path / "out")))
    assert own.heads == () and own.parameters == sum(p.numel() for p in model.parameters()) < MINE.parameters
    with pytest.raises(ArgumentError, match="cannot serve task 'registration': its weights hold no heads"):
        load(tmp_path / "out", task="registration")


# --- The bound methods, and from_pretrained --------------------------------------------------------------------


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("way", [deepcopy, through_pickle])
def test_the_bound_methods_of_a_copy_are_about_the_copy(way, saved, tmp_path, hub):
    model = load(saved)
    copy = way(model)
    next(copy.parameters()).data.view(-1)[0] += 1
    assert same_state(load(copy.save_pretrained(tmp_path / "copy")), copy)
    assert same_state(load(model.save_pretrained(tmp_path / "model")), model)
    assert copy.push_to_hub(REPO).repo == REPO
    assert same_state(load(f"hf-hub:{REPO}"), copy) and not same_state(copy, model)


def test_a_folder_is_loaded_by_the_hubs_name(saved, monkeypatch):
    monkeypatch.chdir(saved.parent.parent)
    for name in (saved, str(saved), f"{saved.parent.name}/{saved.name}"):
        model = from_pretrained(name, task="registration")
        assert model.entry.name == "mine" and model.load_report.origin.endswith(WEIGHTS_NAME)


@pytest.mark.parametrize("name", ["plain", NANO])
def test_a_folder_here_comes_before_a_model_of_the_registry(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = one_number_changed(NANO)
    save_pretrained(model, name)
    assert same_state(from_pretrained(name), model)


def test_a_model_that_nobody_holds_is_gone_at_once(saved):
    model = load(saved, task="pretraining")
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_a_repository_is_loaded_by_the_hubs_name_and_revision(hub):
    old, new = load(NANO), load(NANO, pretrained=False)
    commit = push_to_hub(old, REPO).revision
    push_to_hub(new, REPO)
    push_to_hub(old, REPO, branch="stable")
    assert same_state(from_pretrained(REPO), new)
    assert same_state(from_pretrained(f"hf-hub:{REPO}", frozen=True), new)
    for given in ({"revision": commit}, {"revision": "stable"}):
        assert same_state(from_pretrained(REPO, **given), old)
    assert same_state(from_pretrained(f"{REPO}@{commit}"), old)


def test_a_registered_name_is_loaded_by_the_hubs_name():
    assert from_pretrained(NANO).entry.name == NANO


@pytest.mark.parametrize("name", ["{}/none", "./none", "none/a/b"])
def test_a_folder_that_is_not_there_is_missed_by_its_own_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = name.format(tmp_path)
    with pytest.raises(WeightsError, match=f"^{re.escape(name.removeprefix('./'))} cannot be read: No such file"):
        from_pretrained(name)


def test_a_repository_that_is_not_there_is_missed(hub):
    with pytest.raises(SourceError, match="no/such does not exist, or is private; check its name"):
        from_pretrained("no/such")


# --- A push that goes well -------------------------------------------------------------------------------------


def uploads(hub):
    return [seen for seen in hub.log if seen.method == "PUT"]


def commits(hub):
    return [seen for seen in hub.log if seen.method == "POST" and "/commit/" in seen.path]


def test_a_push_is_one_commit_of_five_files(hub, tmp_path):
    model = load(NANO, task="pretraining")
    report = push_to_hub(model, REPO)
    content = hub.files(REPO)
    assert sorted(content) == sorted([".gitattributes", *FIVE]) and len(commits(hub)) == len(uploads(hub)) == 1
    assert report.revision == hub.repos[REPO].branches["main"] and not hub.repos[REPO].private
    assert report.sha256 == hashlib.sha256(content[WEIGHTS_NAME]).hexdigest()
    assert (report.repo, report.bytes) == (REPO, len(content[WEIGHTS_NAME]))
    folder = save_pretrained(model, tmp_path).parent
    told = {name: (folder / name).read_bytes() for name in FIVE if name != "README.md"}
    assert {name: content[name] for name in told} == told
    assert content["README.md"].decode() == model_card(entry_of(open_weights(folder / WEIGHTS_NAME)), REPO)


def test_what_a_folder_holds_beside_its_weights_goes_along(hub, saved):
    card = (saved / "README.md").read_text().replace("# mine", "# mine, by hand")
    (saved / "README.md").write_text(card)
    (saved / "LICENSE").write_text("mine\n")
    for name in ("mine-features.png", "other.png", "notes.txt"):
        (saved / name).write_bytes(name.encode())
    push_to_hub(load(saved, task="pretraining"), REPO, beside=saved)
    content = hub.files(REPO)
    assert sorted(content) == sorted([".gitattributes", "mine-features.png", *FIVE])
    assert content["README.md"].decode() == card.replace("path/to/this/folder", f"hf-hub:{REPO}") != card
    assert content["LICENSE"] == b"mine\n" and content["mine-features.png"] == b"mine-features.png"


def test_a_push_leaves_nothing_behind_and_sends_its_token_to_the_hub_alone(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "temporary").mkdir()
    load(NANO).push_to_hub(REPO)
    assert names_in(tmp_path / "temporary") == []
    assert {seen.server for seen in hub.log if "authorization" in seen.headers} == {"hub"}
    assert {seen.server for seen in hub.log} == {"hub", "cdn"}


FRESH = """\
import json, sys, torch
def local_only(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = args[1][0] if event == "socket.connect" else args[0]
        assert host in ("127.0.0.1", "localhost", "::1", b"127.0.0.1"), host
sys.addaudithook(local_only)
import gvsl_zoo
given = torch.load("given.pt")
names = gvsl_zoo.register_registry("mine.yaml")
found = {}
for name in (*names, "hf-hub:org/model"):
    model = gvsl_zoo.load(name, task="registration")
    with torch.no_grad():
        found[name] = all(map(torch.equal, model(*given["pair"]), given["output"]))
print(json.dumps(found))
"""


@pytest.mark.slow
def test_a_fresh_process_loads_what_was_pushed_by_its_registry_lines_and_by_its_name(hub, tmp_path):
    model = load(NANO, task="registration")
    report = push_to_hub(model, REPO, dtype=torch.float16)
    [lines] = yaml.safe_load(report.registry_lines)
    assert lines["kind"] == "hub" and lines["revision"] == report.revision
    entry = model_info(NANO).to_dict() | {"sources": "SOURCES"}
    text = yaml.safe_dump({"schema_version": 1, "models": {"pushed": {k: v for k, v in entry.items() if k != "name"}}})
    lines = "\n" + textwrap.indent(report.registry_lines, " " * 6)
    (tmp_path / "mine.yaml").write_text(text.replace(" SOURCES", lines))
    pair = torch.rand(2, 1, 1, 32, 32, 32, generator=torch.Generator().manual_seed(0)).unbind()
    with torch.no_grad():
        torch.save({"pair": pair, "output": tuple(model(*pair))}, tmp_path / "given.pt")
    environment = {**os.environ, "HF_HOME": str(tmp_path / "fresh"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", FRESH], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"pushed": True, f"hf-hub:{REPO}": True}
    assert hub.bodies("cdn") == 1  # the second found it in the cache


@pytest.mark.skipif(
    huggingface_hub.__version__.startswith("1.0."), reason="1.0 cannot name a commit without changes on a mirror"
)
def test_an_unchanged_file_is_not_uploaded_again(hub):
    model = load(NANO)
    one = push_to_hub(model, REPO)
    two = push_to_hub(model, REPO, commit_message="again")
    three = push_to_hub(model, REPO, entry=replace(model.entry, heads=(), summary="said better"))
    assert len(uploads(hub)) == 2  # the third has another entry inside
    assert one.sha256 == two.sha256 and one.revision == two.revision != three.revision


def test_a_push_to_a_branch_leaves_main_alone(hub):
    first_push = push_to_hub(load(NANO), REPO)
    for _ in "ab":
        other = push_to_hub(load(NANO, pretrained=False), REPO, branch="next")
    assert hub.repos[REPO].branches == {"main": first_push.revision, "next": other.revision}


@pytest.mark.parametrize("name", [f"{REPO}@next", f"hf-hub:{REPO}@next"])
def test_a_push_goes_to_the_branch_that_its_name_holds(name, hub):
    report = push_to_hub(load(NANO), name)
    assert hub.repos[REPO].branches["next"] == report.revision != hub.repos[REPO].branches["main"]


def test_a_private_repository_is_private_from_its_beginning(hub):
    report = push_to_hub(load(NANO), REPO, private=True, token="hf_write")
    assert hub.repos[REPO].private
    with pytest.raises(SourceError, match=f"{REPO} does not exist, or is private"):
        load(f"hf-hub:{REPO}", token="hf_other")
    assert load(f"hf-hub:{REPO}", revision=report.revision, token="hf_read").entry.name == NANO


def test_a_public_repository_takes_no_private_push(hub, before):
    with pytest.raises(
        ArgumentError, match=f"{REPO} exists and is public; make it private on the Hub, or push without"
    ):
        push_to_hub(load(NANO), REPO, private=True)
    assert_as_before(hub, before)
    assert uploads(hub) == commits(hub) == []


def test_the_message_of_a_commit_names_the_model_or_is_ones_own(hub):
    sent = []
    hub.fault = lambda request: sent.append(request.payload) if "/commit/" in request.path else None
    push_to_hub(load(NANO), REPO)
    push_to_hub(load(NANO, pretrained=False), REPO, commit_message="mine")
    summaries = [json.loads(payload.splitlines()[0])["value"]["summary"] for payload in sent]
    assert summaries[0].startswith(f"{NANO}, saved by gvsl-zoo") and summaries[1] == "mine"


# --- A push that does not --------------------------------------------------------------------------------------


@pytest.fixture
def before(hub):
    """The repository as it was: with another model on main."""
    hub.add(REPO, {"model.safetensors": b"old", "README.md": b"old"})
    return SimpleNamespace(files=hub.files(REPO), branches=dict(hub.repos[REPO].branches))


def assert_as_before(hub, before):
    assert hub.files(REPO) == before.files and hub.repos[REPO].branches == before.branches


@pytest.mark.parametrize(
    ("token", "match"),
    [
        ("hf_read", rf"the Hub does not accept the token for {REPO} \(403\); log in .* with an account that may do"),
        ("hf_secret", rf"the Hub does not accept the token for {REPO} \(401\); log in .* with an account that may do"),
        (None, rf"there is no token on this machine; log in .* with an account that may write to {REPO}"),
    ],
    ids=["reader", "unknown", "none"],
)
@pytest.mark.parametrize("way", ["argument", "environment"])
def test_without_the_right_to_write_nothing_is_pushed_and_no_token_told(token, match, way, hub, before, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    if token and way == "environment":
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SourceError, match=match) as caught:
        push_to_hub(load(NANO), REPO, token=token if way == "argument" else None)
    assert "hf_secret" not in "".join(traceback.format_exception(caught.value))
    assert_as_before(hub, before)
    assert uploads(hub) == commits(hub) == []


@pytest.mark.parametrize(
    ("what", "match"),
    [
        (status(500, on=at("/commit/")), "the Hub answered 500; push again"),
        (
            status(409, on=at("/commit/")),
            rf"the Hub reports a conflict for {REPO} \(409\): somebody else writes to it; push again",
        ),
        (status(500, on=at("/repos/create")), "the Hub answered 500; push again"),
        (status(503, on=at("/preupload/")), "the Hub answered 503; push again"),
        (status(500, on=at("/objects/batch")), "the Hub answered 500; push again"),
        (status(500, on=at("/upload/")), "the Hub answered 500; push again"),
        (status(403, on=at("/upload/")), rf"the Hub .*{REPO}"),
        (status(429, headers={"Retry-After": "3600"}, on=at("/commit/")), r"asked too often \(429\); (push|try) again"),
        (
            reset(None, on=at("/repos/create")),
            r"the connection to http://127\.0\.0\.1:\d+ failed \(\w+: .*; push again",
        ),
        (html_portal(at("/commit/")), "the connection to .* failed .*; push again"),
    ],
    ids=["commit", "conflict", "create", "preupload", "batch", "upload", "denied", "often", "reset", "portal"],
)
def test_a_push_that_the_hub_does_not_take_changes_nothing(what, match, hub, before):
    hub.fault = what
    with pytest.raises(SourceError, match=match):
        push_to_hub(load(NANO), REPO)
    assert_as_before(hub, before)
    hub.fault = None
    assert push_to_hub(load(NANO), REPO).revision == hub.repos[REPO].branches["main"]


def test_a_connection_lost_once_in_the_upload_heals(hub, before):
    hub.fault = reset(None, times=1, on=at("/upload/"))
    report = push_to_hub(load(NANO), REPO)
    assert hashlib.sha256(hub.files(REPO)[WEIGHTS_NAME]).hexdigest() == report.sha256


def test_a_connection_lost_in_every_upload_is_told_and_main_stays(hub, before, monkeypatch):
    sleep = time.sleep  # the client waits 1, 2, 4, 8 and 8 s between its tries
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.1)))
    hub.fault = fault(lambda request: request.hang_up(reset=True), on=at("/upload/"))
    with pytest.raises(SourceError, match=r"the connection to .* failed \(\w+: .*; push again"):
        push_to_hub(load(NANO), REPO)
    assert_as_before(hub, before)


def test_a_hub_that_went_down_is_told(hub):
    hub.stop()
    with pytest.raises(
        SourceError, match=r"the connection to http://127\.0\.0\.1:\d+ failed \(ConnectionRefusedError: "
    ):
        push_to_hub(load(NANO), REPO)


def test_a_hub_that_cannot_be_found_is_told(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    with pytest.raises(SourceError, match=r"the Hub cannot be found: hub\.invalid: .*; check the network"):
        push_to_hub(load(NANO), REPO, token="hf_write")


def test_the_first_push_that_fails_leaves_an_empty_repository_which_the_next_one_fills(hub):
    hub.fault = status(500, on=at("/commit/"))
    with pytest.raises(SourceError, match="the Hub answered 500"):
        push_to_hub(load(NANO), REPO)
    assert list(hub.files(REPO)) == [".gitattributes"]
    hub.fault = None
    push_to_hub(load(NANO), REPO)
    assert sorted(hub.files(REPO)) == sorted([".gitattributes", *FIVE])


def headed():
    return load(NANO, task="segmentation", num_classes=2)


def feature_list():
    return load(NANO, features_only=True)


def of_the_authors():
    model = load(NANO)
    model.entry = model_info("gvsl-unet-ct")
    return model


def not_finite():
    model = load(NANO)
    next(model.parameters()).data.view(-1)[0] = float("nan")
    return model


def without_an_entry():
    return UNet(width=8)


def nano():
    return load(NANO)


@pytest.mark.parametrize(
    ("make", "settings", "error", "match"),
    [
        (headed, {}, ArgumentError, "a SegmentationModel whose 2 classes have no names cannot be saved"),
        (feature_list, {}, ArgumentError, "a FeatureList cannot be saved; save a backbone, a whole module"),
        (without_an_entry, {}, ArgumentError, "a UNet without an entry cannot be saved; .*entry="),
        (of_the_authors, {}, ArgumentError, "gvsl-unet-ct is its authors' and not for us to publish .none stated"),
        (not_finite, {}, WeightsError, "holds NaN or Inf as torch.float32; do not save this model"),
        (nano, {"repo_id": "model"}, ArgumentError, "'model' names no repository; write .*org/repo"),
        (nano, {"repo_id": "../model"}, ArgumentError, "'../model' names no repository"),
        (nano, {"repo_id": "a/b/c"}, ArgumentError, "'a/b/c' names no repository"),
        (nano, {"repo_id": ""}, ArgumentError, "'' names no repository"),
        (nano, {"branch": "../x"}, ArgumentError, "'../x' is no revision; give a commit, a branch or a tag"),
        (nano, {"repo_id": f"{REPO}@a", "branch": "b"}, ArgumentError, "give the revision once"),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (value.get("repo_id") if isinstance(value, dict) else ""),
)
def test_what_cannot_be_published_is_refused_before_any_request(make, settings, error, match, hub):
    with pytest.raises(error, match=match):
        push_to_hub(make(), **{"repo_id": REPO} | settings)
    assert hub.log == [] and hub.repos == {}


def test_what_the_authors_hold_may_go_out_under_an_entry_of_ones_own(hub):
    model = UNet(width=8, generator=torch.Generator().manual_seed(0))
    model.entry = model_info("gvsl-unet-ct")
    with pytest.raises(ArgumentError, match="publish with the authors' leave and an entry of your own"):
        push_to_hub(model, REPO)
    assert push_to_hub(model, REPO, entry=replace(MINE, heads=())).repo == REPO


@pytest.mark.parametrize("word", ["1", "true", "ON"])
def test_offline_nothing_is_asked(word, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", word)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    with pytest.raises(SourceError, match=r"the network is not allowed \(HF_HUB_OFFLINE\); push from where it is"):
        load(NANO).push_to_hub(REPO)
    assert hub.log == []


def test_the_tests_hub_knows_the_tokens_that_are_used_here():
    assert {"hf_write", "hf_read", "hf_other"} == set(hub_server.TOKENS) and "hf_secret" not in hub_server.TOKENS
