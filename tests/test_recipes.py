"""Recipes: one for every model of ours, what is refused of others, and a model made again from one."""

from __future__ import annotations

import json
import re
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from PIL import Image

from gvsl_zoo import list_models, load, model_info, recipes, register_registry, registry, write_volume
from gvsl_zoo.cache import sha256_of
from gvsl_zoo.cli import main
from gvsl_zoo.demo import as_volume
from gvsl_zoo.errors import ArgumentError, RegistryError, TrainingError
from gvsl_zoo.ledger import file_hash
from gvsl_zoo.pretrain import loop
from gvsl_zoo.pretrain.anatomy import sample_film, sample_subject
from gvsl_zoo.pretrain.config import PretrainConfig
from gvsl_zoo.pretrain.data import Scan, ScanPairs
from gvsl_zoo.pretrain.entry import describe
from gvsl_zoo.pretrain.loop import build, ledger_of_pairs, pretrain, with_start
from gvsl_zoo.recipes import Verdict, check, check_files, read_recipe, recipe_path, reproduce, train, training_scans
from gvsl_zoo.registry import Ledger
from gvsl_zoo.volume import Preprocessing, prepare, read_volume

ROOT = Path(__file__).parents[1]
OURS = list_models(available=True)
SETTINGS = {"steps": 3, "save_every": 2, "crop": [16, 16, 16], "spacing_mm": 9, "width": 8, "ramp_steps": 0}
SETTINGS |= {"bf16": False, "synthetic_share": 0.5}
FILM_SETTINGS = SETTINGS | {"ndim": 2, "crop": [24, 24], "objective": "gemini", "affine_width": None}
NUMBERS = {"ncc_after": {"value": 0.5, "spread": 0.6}, "folded": {"value": 0.2, "spread": 0.3}}
NANO = "gvsl-unet-ct-nano"


@pytest.fixture(autouse=True)
def no_user_registries(monkeypatch):
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_added", {})


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch):
    monkeypatch.setattr(loop, "draw_run", lambda *_: None)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Three synthetic CTs and two films below a folder."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("ct", "xray"):
        (folder / kind).mkdir()
    for seed in range(3):
        subject = sample_subject((20, 18, 22), torch.Generator().manual_seed(seed), (9.0, 9.0, 9.0))
        write_volume(as_volume(subject), folder / f"ct/{seed}.nii.gz")
    for seed in range(2):
        film = sample_film((40, 32), torch.Generator().manual_seed(seed), (9.0, 9.0))
        Image.fromarray((255 * film.image).round().byte().numpy()).save(folder / f"xray/{seed}.png")
    return folder


def rows(folder, pattern, **changes):
    """The recipe's part on the files of a pattern."""
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.glob(pattern))}
    return [{"stratum": "chest", "licence": "MIT", "origin": "drawn by the tests", "files": files} | changes]


@pytest.fixture
def registered(tmp_path):
    """Put a model with this recipe into a registry; returns its name."""

    def put(name="mine-unet", *, text=None, **recipe):
        settings = recipe.setdefault("settings", SETTINGS)
        fields = {"hardware": "a core", "seconds": 10, "numbers": NUMBERS, "spreads": "invented"} | recipe
        config = PretrainConfig.from_dict(settings)
        row = describe(config, "mine", build(config, None)).to_dict()
        measured = {"task": "segmentation", "data": "CT", "metric": "Dice", "value": 1, "command": "python measure.py"}
        row |= {"status": "planned", "evaluation": [measured]}
        row["training"] |= {"hardware": "a core", "seconds": 10}
        content = {"schema_version": 1, "models": {name: {k: v for k, v in row.items() if v is not None}}}
        del content["models"][name]["name"]
        listing = tmp_path / f"{name}.yaml"  # a file is read once in a process
        listing.write_text(yaml.safe_dump(_stated(content)))
        (tmp_path / "recipes").mkdir(exist_ok=True)
        written = text if text is not None else yaml.safe_dump(fields, sort_keys=False)
        (tmp_path / f"recipes/{name}.yaml").write_text(written)
        register_registry(listing)
        return name

    return put


def _stated(value):
    """Without fields that say nothing."""
    if isinstance(value, dict):
        return {key: _stated(item) for key, item in value.items() if item is not None}
    return [_stated(item) for item in value] if isinstance(value, list) else value


# --- Ours -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_every_model_of_ours_has_a_recipe_that_agrees_with_its_entry(name):
    recipe, entry = read_recipe(name), model_info(name)
    config, training = recipe.settings, entry.training
    assert training.steps == recipe.steps and training.seconds == recipe.seconds
    assert training.hardware == recipe.hardware and f"recipes/{name}.yaml" in training.recipe
    made = describe(config, name, build(config, None))
    assert (made.architecture, made.config, made.parameters) == (entry.architecture, entry.config, entry.parameters)
    assert (made.objective, made.heads, made.modality) == (entry.objective, entry.heads, entry.modality)
    assert made.input.spacing_mm == entry.input.spacing_mm and made.input.intensity == entry.input.intensity
    assert entry.ledger.complete and entry.base_model == recipe.start
    before = model_info(recipe.start).ledger.scans if recipe.start else ()
    assert len(set(entry.ledger.scans) - set(before)) <= len(recipe.files) <= len(entry.ledger.scans)


def test_every_recipe_belongs_to_a_model_of_ours():
    assert sorted(path.stem for path in (ROOT / "recipes").iterdir()) == OURS


@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_the_shipped_weights_reach_the_numbers_of_their_recipe(name):
    result = check(name, device="cpu")
    assert result.reached, "\n".join(result.lines())


# --- What a recipe is -----------------------------------------------------------------------------------------------


def test_a_recipe_is_read_into_settings_files_and_numbers(registered, scans):
    recipe = read_recipe(registered(data=rows(scans, "ct/*") + rows(scans, "xray/*", stratum="hip")))
    assert recipe.settings == PretrainConfig.from_dict(SETTINGS)
    assert list(recipe.files) == ["ct/0.nii.gz", "ct/1.nii.gz", "ct/2.nii.gz", "xray/0.png", "xray/1.png"]
    assert recipe.numbers["folded"].spread == 0.3 and recipe.needs["hours"] == pytest.approx(10 / 3600)
    assert recipe.origins["ct/0.nii.gz"] == "drawn by the tests; MIT"


def test_recipes_of_a_folder_of_the_environment_lie_beside_its_registry(registered, monkeypatch, tmp_path):
    name = registered()
    (tmp_path / "mine-unet.yaml").rename(tmp_path / "weights_registry.yaml")
    monkeypatch.setattr(registry, "_added", {})
    with pytest.raises(RegistryError, match="unknown model 'mine-unet'"):
        read_recipe(name)
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(tmp_path))
    assert recipe_path(name) == tmp_path / "recipes/mine-unet.yaml" and read_recipe(name).seconds == 10


def test_a_model_without_a_recipe_says_so():
    with pytest.raises(ArgumentError, match="gvsl-unet-ct has no recipe"):
        read_recipe("gvsl-unet-ct")


GOOD = f"""\
settings: {{steps: 3}}
hardware: a core
seconds: 10
numbers:
  ncc_after: {{value: 0.5, spread: 0.1}}
spreads: invented
data:
  - stratum: chest
    licence: MIT
    origin: nowhere
    files:
      ct/a.nii.gz: {"ab" * 32}
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("seconds: 10", "seconds: 10\nhours: 1"), r"mine-unet\.yaml:4: recipe: unknown field 'hours'"),
        (("{steps: 3}", "{steps: 3, step: 1}"), r":1: recipe\.settings: unknown field 'step'"),
        (("{steps: 3}", "{seed: 3}"), r":1: recipe\.settings: the field 'steps' is missing"),
        (("{steps: 3}", "{steps: 0}"), r":1: recipe\.settings: a count below 1"),
        (("{steps: 3}", "{steps: 3, bf16: 1}"), r"settings\.bf16: expected true or false"),
        (("{steps: 3}", "{steps: 3, objective: simclr}"), r"settings\.objective: expected gvsl or "),
        (("spreads: invented\n", ""), "the field 'spreads' is missing"),
        (("spread: 0.1", "spread: -0.1"), r"numbers\.ncc_after: expected a spread of 0 or more"),
        (("value: 0.5, ", ""), r"numbers\.ncc_after: the field 'value' is missing"),
        (("\n  ncc_after: {value: 0.5, spread: 0.1}", " {}"), "expected numbers to reach"),
        (("ab" * 32, "abab"), r":12: recipe\.data\[0\]\.files\.ct/a\.nii\.gz: expected a sha256"),
        (("ct/a", "../a"), r"data\[0\]: '\.\./a\.nii\.gz' is not a plain path"),
        (("ct/a", "/ct/a"), r"data\[0\]: expected a relative path"),
        (("data:\n", "data: &x\n"), "anchors and aliases are not accepted"),
        (("origin: nowhere", "origin: http://example.com/a"), "is refused"),
        ((GOOD, "- 1\n"), r"expected fields \(key: value\)"),
        ((GOOD, ""), "empty"),
        ((GOOD, "#" * 1_000_001), "larger than 1,000,000 bytes, which no recipe is"),
    ],
    ids=lambda a: a if isinstance(a, str) else "",
)
def test_a_faulty_recipe_is_refused_with_file_line_and_field(registered, change, message):
    assert read_recipe(registered("good-unet", text=GOOD)).settings.steps == 3
    registry._added.clear()
    name = registered(text=GOOD.replace(*change))
    with pytest.raises(RegistryError, match=message):
        read_recipe(name)


def test_a_file_listed_twice_is_refused(registered, scans):
    name = registered(data=rows(scans, "ct/*") + rows(scans, "ct/0*"))
    with pytest.raises(RegistryError, match="a file is listed twice"):
        read_recipe(name)


# --- Data -----------------------------------------------------------------------------------------------------------


def test_files_that_are_missing_or_other_are_named_with_where_to_get_them(registered, scans, tmp_path):
    recipe = read_recipe(registered(data=rows(scans, "ct/*")))
    assert [path.name for path in check_files(recipe, scans)] == ["0.nii.gz", "1.nii.gz", "2.nii.gz"]
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct/0.nii.gz").write_bytes((scans / "ct/0.nii.gz").read_bytes())
    (tmp_path / "ct/1.nii.gz").write_bytes((scans / "ct/2.nii.gz").read_bytes())
    with pytest.raises(TrainingError, match="2 of 3 files are not those of the recipe") as caught:
        check_files(recipe, tmp_path)
    assert str(caught.value).startswith("2 of 3 files are not those of the recipe: ct/1.nii.gz is another file: ")
    assert "ct/2.nii.gz is missing (drawn by the tests)" in str(caught.value)
    with pytest.raises(TrainingError, match=r"ct/1\.nii\.gz is another file"):
        train(recipe, tmp_path / "run", tmp_path)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ArgumentError, match=r"the recipe has 3 scans; give the folder of them \(--data\)"):
        check_files(recipe, None)


def test_scans_are_brought_onto_the_grid_of_the_run_by_their_strata(registered, scans):
    recipe = read_recipe(registered(data=rows(scans, "ct/[01]*") + rows(scans, "ct/2*", stratum="hip")))
    found = training_scans(recipe, scans)
    assert [scan.region for scan in found] == ["chest", "chest", "hip"]
    expected = prepare(read_volume(scans / "ct/1.nii.gz"), Preprocessing((9.0, 9.0, 9.0))).image[0]
    assert torch.equal(found[1].image, expected) and found[1].image.shape == (1, 20, 18, 22)


def test_films_are_resized_and_keep_their_greys(registered, scans):
    recipe = read_recipe(registered(settings=FILM_SETTINGS, data=rows(scans, "xray/*")))
    own = training_scans(recipe, scans)
    assert [scan.image.shape for scan in own] == [(1, 40, 32)] * 2
    drawn = sample_film((40, 32), torch.Generator().manual_seed(1), (9.0, 9.0)).image
    torch.testing.assert_close(own[1].image[0], drawn, atol=0.6 / 255, rtol=0)
    resized = training_scans(replace(recipe, film_size=24), scans)
    assert resized[0].image.shape == (1, 24, 24)
    fixed, moving = ScanPairs(resized, recipe.settings.crop).draw(torch.Generator().manual_seed(0))
    assert fixed.shape == moving.shape == (1, 24, 24)


def test_a_run_carries_what_its_start_saw_and_tells_all_only_without_scans_of_its_own(tmp_path):
    config = PretrainConfig.from_dict(SETTINGS | {"steps": 1})
    pretrain(config, tmp_path / "alone", device="cpu")
    assert load(tmp_path / "alone").entry.ledger == Ledger(complete=True)
    start = load(NANO, task="pretraining")
    known = start.entry.ledger
    entry = describe(config, "run", start)
    assert with_start(entry, start).ledger == known
    assert with_start(entry, build(config, None)).ledger == Ledger(complete=False)
    pairs = ScanPairs([Scan(torch.rand(1, 16, 16, 16), "chest")] * 2, config.crop)
    assert ledger_of_pairs(pairs) == Ledger(complete=False) and ledger_of_pairs(None) == Ledger(complete=True)


def test_a_run_that_goes_on_keeps_what_is_known_of_its_start(tmp_path):
    config = PretrainConfig.from_dict(SETTINGS | {"steps": 2, "save_every": 1, "affine_width": 48})
    start = load(NANO, task="pretraining")

    def stop(_record):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(config, tmp_path, device="cpu", init=start, progress=stop)
    pretrain(config, tmp_path, device="cpu")
    entry = load(tmp_path).entry
    assert entry.training.steps == 2 and entry.base_model == NANO and entry.ledger == start.entry.ledger
    assert f"made from {NANO} (Apache-2.0)" in entry.licence.weights and "LIDC" in entry.licence.data


# --- Again ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("measured", "reached"), [(0.4, True), (0.6, True), (0.39, False), (float("nan"), False)])
def test_a_number_is_reached_within_its_spread_in_both_directions(measured, reached):
    assert Verdict("ncc_after", 0.5, 0.1 + 1e-12, measured).reached == reached
    assert not Verdict("ncc_after", 0.5, 0.1, None).reached


def reproduced(*words):
    result = CliRunner().invoke(main, ["reproduce", *map(str, words), "--device", "cpu", "--workers", "0"])
    assert "unexpected" not in result.output, result.output
    return result


def test_a_model_is_made_again_carries_its_entry_and_ledger_and_a_second_call_goes_on(registered, scans, tmp_path):
    name, out = registered(data=rows(scans, "ct/*")), tmp_path / "run"
    first = reproduced(name, "--data", scans, "--out", out)
    assert first.exit_code == 0, first.output
    assert re.search(r"ncc_after +0\.5 \+- 0\.6 +-?0\.\d+ +reached", first.output)
    assert first.output.startswith("hardware  a core") and first.output.endswith("measured by\n  python measure.py\n")
    model = load(out, task="pretraining")
    assert model.entry.name == name and model.load_report.stored_dtype == "float16"
    assert model.entry.ledger.complete
    assert set(model.entry.ledger.scans) == {file_hash(path) for path in (scans / "ct").iterdir()}
    assert [row.metric for row in model.entry.evaluation] == list(NUMBERS)
    weights, log = (out / "model.safetensors").read_bytes(), (out / "log.jsonl").read_text()
    again = reproduced(name, "--data", scans, "--out", out, "--json")
    facts = json.loads(again.stdout)
    assert facts["reached"] and [row["name"] for row in facts["numbers"]] == list(NUMBERS)
    assert facts["commands"] == ["python measure.py"]
    assert (out / "model.safetensors").read_bytes() == weights and (out / "log.jsonl").read_text() == log


def test_a_run_before_is_made_first_and_its_weights_are_the_start(registered, scans, tmp_path):
    first = deepcopy(SETTINGS) | {"steps": 2, "learning_rate": 0.01}  # YAML would write what is shared as an anchor
    name = registered(data=rows(scans, "ct/*"), before=first, settings=SETTINGS | {"steps": 1, "learning_rate": 0.0})
    recipe, records = read_recipe(name), []
    assert recipe.steps == recipe.needs["steps"] == 3
    model = train(recipe, tmp_path / "run", scans, device="cpu", progress=records.append)
    assert [record["step"] for record in records] == [1, 2, 3]
    start = load(tmp_path / "run/before", task="pretraining").state_dict()
    assert all(torch.equal(tensor, start[key]) for key, tensor in model.state_dict().items())
    drawn = build(recipe.settings, None).state_dict()
    assert any(not torch.equal(tensor, drawn[key]) for key, tensor in start.items())
    logs = [tmp_path / "run" / log for log in ("before/log.jsonl", "log.jsonl")]
    written = [log.read_bytes() for log in logs]
    again = train(recipe, tmp_path / "run", scans, device="cpu").state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in model.state_dict().items())
    assert [log.read_bytes() for log in logs] == written
    tried = reproduced(name, "--data", scans, "--out", tmp_path / "other", "--steps", "1", "--json")
    assert tried.exit_code == 0 and (tmp_path / "other/before/log.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize(
    "other", [{"spacing_mm": 3.0}, {"unit": "arbitrary"}, {"width": 16}, {"objective": "gemini"}], ids=str
)
def test_a_run_before_has_the_network_and_the_grid_of_the_run(registered, other):
    name = registered(before=deepcopy(SETTINGS) | other)
    with pytest.raises(RegistryError, match="the run before has another network, spacing or unit than the run"):
        read_recipe(name)


def test_of_several_processes_the_first_alone_writes_the_entry(registered, tmp_path, monkeypatch):
    for function in ("prove", "write_weights", "publish"):
        monkeypatch.setattr(recipes, function, lambda *_, **__: pytest.fail("it was written twice"))
    monkeypatch.setattr(recipes, "is_first", lambda: False)
    assert reproduce(registered(), tmp_path / "run", device="cpu").reached


def test_a_number_that_is_not_reached_is_shown_and_makes_the_exit_code_1(registered, tmp_path):
    numbers = NUMBERS | {"dice_after": {"value": 5, "spread": 0.1}, "spice": {"value": 1, "spread": 0.1}}
    result = reproduced(registered(numbers=numbers), "--out", tmp_path / "run")
    assert result.exit_code == 1, result.output
    assert re.search(r"dice_after +5 \+- 0\.1 +0\.\d+ +NOT REACHED", result.output)
    assert re.search(r"spice +1 \+- 0\.1 +none +NOT REACHED", result.output)


@pytest.mark.parametrize("objective", ["gemini", "gvsl"])
def test_a_film_model_is_made_again(objective, registered, scans, tmp_path):
    settings = FILM_SETTINGS | {"objective": objective}
    name = registered(settings=settings, data=rows(scans, "xray/*"), film_size=24)
    result = reproduce(name, tmp_path / "run", scans, device="cpu")
    assert result.reached and load(tmp_path / "run", task="pretraining").entry.modality == "X-ray"


@pytest.mark.parametrize("changes", [{"backbone": "xmorpher", "width": 16}, {"objective": "gemini"}], ids=str)
def test_a_3d_model_of_another_kind_is_made_again(changes, registered, scans, tmp_path):
    name = registered(settings=SETTINGS | changes, data=rows(scans, "ct/*"))
    result = reproduce(name, tmp_path / "run", scans, device="cpu")
    assert result.reached and load(tmp_path / "run", task="pretraining").entry.ledger.complete


def test_a_model_made_from_another_starts_with_its_weights_and_has_seen_its_scans(registered, scans, tmp_path):
    settings = SETTINGS | {"affine_width": 48, "learning_rate": 0.0, "steps": 1}
    name = registered(settings=settings, start=NANO, data=rows(scans, "ct/*"))
    assert read_recipe(name).needs["start"] == NANO
    result = reproduce(name, tmp_path / "run", scans, device="cpu")
    assert result.reached
    made, start = (load(origin, task="pretraining") for origin in (tmp_path / "run", NANO))
    assert all(map(torch.equal, made.state_dict().values(), start.state_dict().values()))
    own = {file_hash(path) for path in (scans / "ct").iterdir()}
    assert set(made.entry.ledger.scans) == own | set(start.entry.ledger.scans) and made.entry.ledger.complete


def test_a_try_of_few_steps_has_no_verdict(registered, tmp_path):
    result = reproduced(registered(), "--out", tmp_path / "try", "--steps", "1", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["step"] == 1 and "reached" not in result.output


def test_a_dry_run_says_what_it_takes_checks_the_files_and_trains_nothing(registered, scans, tmp_path):
    name = registered(data=rows(scans, "ct/*"))
    facts = json.loads(reproduced(name, "--dry-run", "--json", "--data", scans).stdout)
    assert facts["hardware"] == "a core" and facts["found"] == facts["scans"] == 3
    assert facts["files"]["ct/1.nii.gz"] == "drawn by the tests; MIT"
    assert reproduced(name, "--dry-run", "--data", tmp_path).exit_code == 1
    assert "scans     3" in reproduced(name, "--dry-run").output


def test_a_run_needs_its_folders(registered, scans):
    result = reproduced(registered(data=rows(scans, "ct/*")))
    assert result.exit_code == 2 and "give --out, or --check" in result.output


def test_the_weights_that_there_are_can_be_measured_instead(registered, tmp_path):
    name, out = registered(), tmp_path / "run"
    made = reproduce(name, out, device="cpu")
    (out / "recipes").mkdir()
    (out / f"recipes/{name}.yaml").write_text((tmp_path / f"recipes/{name}.yaml").read_text())
    registry._added.clear()
    register_registry(out / "registry.yaml")
    result = reproduced(name, "--check", "--json")
    assert result.exit_code == 0, result.output
    measured = {row["name"]: row["measured"] for row in json.loads(result.stdout)["numbers"]}
    assert measured == pytest.approx({row.name: row.measured for row in made.verdicts}, abs=2e-3)  # stored as float16
