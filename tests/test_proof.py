"""Tests of proofs: what they say, what they carry, and that a change of weights, code or preprocessing fails them."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from gvsl_zoo import list_models, load, model_info, registry, save_pretrained, write_volume
from gvsl_zoo.cli import main
from gvsl_zoo.errors import ArgumentError, WeightsError
from gvsl_zoo.film import FilmPreprocessing
from gvsl_zoo.models.gemini import GEMINI
from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.models.xmorpher import XMorpher
from gvsl_zoo.pretrain import loop
from gvsl_zoo.pretrain.config import PretrainConfig
from gvsl_zoo.pretrain.loop import pretrain
from gvsl_zoo.proof import (
    FORMULA,
    SIZES,
    TOLERANCE,
    check,
    digest,
    errors,
    formula_film,
    formula_scan,
    prove,
    verify_maths,
)
from gvsl_zoo.registry import Label, ModelEntry
from gvsl_zoo.volume import Preprocessing
from gvsl_zoo.weights import METADATA_KEY, write_weights
from gvsl_zoo.zoo import entry_of, open_weights

ROOT = Path(__file__).parent.parent
NANO = "gvsl-unet-ct-nano"
MM = (4.0, 4.0, 4.0)
CUBE, ODD = [-410, -93, 86, 79], [-742, -411, 33, 224]  # HU
OUTPUTS = ("bottleneck", "local", "affine", "displacement", "restored")


@pytest.fixture(scope="module")
def proved():
    """The nano model's whole module and its proof."""
    model = load(NANO, task="pretraining")
    return model, prove(model)


@pytest.fixture(autouse=True)
def a_home_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_added", {})


# --- The formula -------------------------------------------------------------------------------------------------


def test_the_formula_is_the_same_everywhere():
    """Whole numbers, so that no rounding of a sine shows; these were recorded once."""
    cube, odd = (formula_scan(image, MM, "HU").data for image in ("cube", "odd"))
    assert cube.dtype == np.int16 and cube.shape == SIZES["cube"] and odd.shape == SIZES["odd"]
    assert cube[0, 0, :4].tolist() == CUBE and odd[-1, 5, :4].tolist() == ODD
    assert formula_film("cube").data.dtype == np.uint8


def test_the_two_images_show_one_world():
    """A point that both have has the same value in both, up to what resampling and rounding leave."""
    cube, odd = (formula_scan(image, MM, "HU") for image in ("cube", "odd"))
    points = cube.affine @ np.append(np.array(SIZES["cube"]) / 2, 1)
    index = np.linalg.inv(odd.affine) @ points
    low = np.floor(index[:3]).astype(int)
    around = odd.data[tuple(slice(n, n + 2) for n in low)]
    assert around.min() <= cube.data[8, 8, 8] <= around.max()


@pytest.mark.parametrize("axes", [(0, 2, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0), (2, 0, 1)])
def test_no_exchange_of_axes_leaves_the_formula_as_it_is(axes):
    cube = formula_scan("cube", MM, "HU").data
    assert np.abs(cube.transpose(axes) - cube).mean() > 100


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_no_flip_leaves_the_formula_as_it_is(axis):
    cube = formula_scan("cube", MM, "HU").data
    assert np.abs(np.flip(cube, axis) - cube).mean() > 100


# --- The digest --------------------------------------------------------------------------------------------------


def test_a_digest_has_the_mean_and_the_sd_first(generator):
    x = torch.randn(3, 5, 7, generator=generator)
    assert digest(x)[:2] == pytest.approx((x.mean().item(), x.std(correction=0).item()), rel=1e-6)


def test_white_noise_has_sums_of_its_own_sd(generator):
    """The chirps are as long as a random direction of the space, so that the sums of noise are of its SD."""
    sums = [digest(torch.randn(4096, generator=generator))[2:] for _ in range(50)]
    assert np.std(sums) == pytest.approx(1, abs=0.15)


def test_a_change_anywhere_shows_with_its_root_mean_square(generator):
    x = torch.zeros(1, 8, 12, 12, 12)
    for channel in range(8):
        changed = x.clone()
        changed[0, channel, 3:9, 3:9, 3:9] = 1.0  # smooth, in one channel
        root = changed.square().mean().sqrt().item()
        assert max(map(abs, digest(changed)[2:])) > 0.2 * root


def test_a_digest_of_half_precision_is_that_of_its_values():
    x = torch.linspace(-1, 1, 100).bfloat16()
    assert digest(x) == digest(x.double())


# --- The theorem: what was proved holds, and nothing else does ---------------------------------------------------


def test_a_model_has_its_own_proof_exactly(proved):
    model, proof = proved
    found = check(model, proof)
    assert set(found.values()) == {0.0}
    assert set(found) == {f"{output} of {image}" for image in SIZES for output in OUTPUTS}


def test_another_algorithm_for_the_same_convolutions_stays_within_the_tolerance(proved):
    model, proof = proved
    with torch.backends.mkldnn.flags(enabled=False):
        assert 0 < max(check(model, proof).values()) < TOLERANCE / 2


def test_bfloat16_is_off_by_more_than_float32_may_be_and_within_its_own_tolerance(proved):
    model, proof = proved
    assert TOLERANCE < max(check(model, proof, bf16=True).values()) < proof.tolerance_bf16 < 0.5


EDITED = [
    "unet.inc.double_conv.0.weight",
    "unet.down2.maxpool_conv.1.double_conv.1.bias",
    "unet.down4.maxpool_conv.1.double_conv.3.weight",
    "unet.up4.conv.double_conv.0.weight",
    "f_conv.double_conv.4.weight",
    "fc_trans.bias",
    "sp_conv.double_conv.0.weight",
    "out_flow.weight",
    "res_conv.0.weight",
    "res_conv.3.weight",
]


@pytest.mark.parametrize("name", EDITED)
def test_an_edit_of_one_weight_by_one_sd_fails(name, proved):
    model, proof = proved
    weight = dict(model.named_parameters())[name].data.view(-1)
    place, before = len(weight) // 2, weight[len(weight) // 2].item()
    try:
        weight[place] += float(weight.std())
        assert max(check(model, proof).values()) > proof.tolerance
    finally:
        weight[place] = before


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": (0.0, 2048.0)},  # not shifted by 1024
        {"window": (-500.0, 500.0)},
        {"scale": (-1.0, 1.0)},
        {"spacing_mm": (4.0, 4.0, 5.0)},
    ],
    ids=["shift", "window", "scale", "spacing"],
)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_another_preprocessing_fails_in_either_precision(wrong, bf16, proved, monkeypatch):
    model, proof = proved
    monkeypatch.setattr(model, "preprocessing", replace(model.preprocessing, **wrong))
    found = check(model, proof, bf16=bf16)
    assert max(found.values()) > (proof.tolerance_bf16 if bf16 else proof.tolerance)


def test_float32_sees_a_window_that_is_a_little_off(proved, monkeypatch):
    model, proof = proved
    monkeypatch.setattr(model, "preprocessing", replace(model.preprocessing, window=(-1000.0, 1000.0)))
    assert max(check(model, proof).values()) > 100 * proof.tolerance


@pytest.mark.parametrize(
    "changed",
    [
        {"digests": []},
        {"digests": [{"image": "a", "output": "b", "numbers": [1.0]}]},
        {"spacing_mm": [1.0, 1.0]},
        {"spacing_mm": [1.0, 0.0, 1.0]},
    ],
    ids=str,
)
def test_a_proof_that_cannot_be_checked_is_refused_with_its_file(changed, proved, tmp_path):
    path = save_pretrained(proved[0], tmp_path)
    file = open_weights(path)
    entry = json.loads(file.metadata[METADATA_KEY])
    entry["proof"] |= changed
    write_weights({name: file.tensor(name) for name in file.slots}, path, {METADATA_KEY: json.dumps(entry)})
    with pytest.raises(WeightsError, match="proof"):
        load(path)


@pytest.mark.parametrize("axis", [2, 3, 4])
@pytest.mark.parametrize("how", ["flipped", "exchanged"])
def test_turned_axes_fail(how, axis, proved, monkeypatch):
    import gvsl_zoo.proof as room

    model, proof = proved
    whole = room.prepare_for

    def turned(volume, of):
        prepared = whole(volume, of)
        image = prepared.image
        image = image.flip(axis) if how == "flipped" else image.transpose(axis, 2 + (axis - 1) % 3)
        return replace(prepared, image=image)

    monkeypatch.setattr(room, "prepare_for", turned)
    assert max(check(model, proof, bf16=True).values()) > proof.tolerance_bf16


def test_a_missing_output_and_nan_are_infinitely_off(proved):
    _, proof = proved
    assert set(errors(proof.digests[:1], ()).values()) == {float("inf")}
    spoiled = replace(proof.digests[0], numbers=(float("nan"),) * 6)
    assert set(errors(proof.digests[:1], (spoiled,)).values()) == {float("inf")}


def test_proving_leaves_the_model_as_it_is():
    model = load(NANO, task="segmentation", num_classes=2).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prove(model, stored=torch.float16)
    assert model.training and all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_proof_is_of_the_type_that_is_stored():
    model = load(NANO)
    parameter = next(model.parameters()).data
    parameter += 1e-5 * parameter.abs().max()
    full, half = prove(model), prove(model, stored=torch.float16)
    assert max(errors(full.digests, half.digests).values()) > 0
    assert max(check(model.half().float(), half).values()) == 0


# --- Every kind of model -------------------------------------------------------------------------------------------


def a_gemini():
    model = GEMINI(UNet(width=8, generator=torch.Generator().manual_seed(0)))
    return model, Preprocessing(unit="arbitrary"), {"displacement-ab", "displacement-ba", "restored"}


def a_film_model():
    return UNet(2, 8, generator=torch.Generator().manual_seed(0)), FilmPreprocessing((40, 36)), set()


def a_matcher_of_films():
    model = GVSL(UNet(2, 8, generator=torch.Generator().manual_seed(0)), affine_width=16)
    return model, FilmPreprocessing(), set(OUTPUTS[2:])


def an_xmorpher():
    model = GVSL(XMorpher(3, 16, generator=torch.Generator().manual_seed(0)), affine_width=16)
    return model, Preprocessing(MM), set(OUTPUTS[2:])


def a_classifier():
    model = load(NANO, task="classification", num_classes=3)
    model.backbone = load(NANO)  # with its decoder
    return model, None, {"logits"}


def of_three_channels():
    return load(NANO, in_chans=3), None, set()


@pytest.mark.parametrize(
    "make", [a_gemini, a_film_model, a_matcher_of_films, an_xmorpher, a_classifier, of_three_channels]
)
def test_every_kind_of_model_has_a_proof_of_all_its_outputs(make):
    model, recipe, heads = make()
    model.eval()
    proof = prove(model, recipe)
    if recipe:
        model.preprocessing = recipe
    assert {one.output for one in proof.digests} == {"bottleneck", "local"} | heads
    assert max(check(model, proof).values()) < TOLERANCE / 2
    assert (proof.spacing_mm is None) == isinstance(model.preprocessing, FilmPreprocessing)


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (lambda: torch.nn.Conv3d(1, 1, 1), "a Conv3d cannot be proved; give a backbone"),
        (lambda: UNet(width=8), "this UNet does not say what input it expects"),
    ],
    ids=["other", "no_recipe"],
)
def test_a_model_that_cannot_be_proved_says_why(model, match):
    with pytest.raises(ArgumentError, match=match):
        prove(model())


def test_a_newer_formula_asks_for_an_upgrade(proved):
    model, proof = proved
    with pytest.raises(WeightsError, match="a proof by the formula 'sines-9', which this version lacks; upgrade"):
        check(model, replace(proof, input="sines-9"))


# --- Proofs travel ------------------------------------------------------------------------------------------------


def test_the_registrys_proof_of_the_embedded_model_passes_on_this_machine():
    found = verify_maths(NANO)
    assert found.verdict == "PASS" and found.what == f"{NANO} (maths, cpu float32)"
    assert verify_maths(NANO, bf16=True).verdict == "PASS"
    assert len(json.dumps([one.numbers for one in model_info(NANO).proof.digests])) < 1000  # bytes


def test_a_saved_file_carries_its_own_proof(tmp_path):
    path = save_pretrained(load(NANO, task="pretraining"), tmp_path, dtype=torch.float16)
    assert entry_of(open_weights(path)).proof.input == FORMULA
    assert verify_maths(str(path)).seen.startswith("largest error 0.0e+00 SD")


def test_a_trained_head_is_proved_with_its_backbone(tmp_path):
    model = load(NANO, task="segmentation", num_classes=2)
    labels = (Label("rest", 0), Label("lung", 1))
    entry = replace(model.entry, heads=("segmentation",), labels=labels, objective="supervised")
    path = save_pretrained(model, tmp_path, entry=entry)
    assert {one.output for one in entry_of(open_weights(path)).proof.digests} == {"bottleneck", "local", "logits"}
    assert verify_maths(str(path)).verdict == "PASS"


def test_a_file_whose_weights_are_not_those_proved_fails(tmp_path):
    """As when a conversion or a merge goes wrong: every byte and shape is right."""
    model = load(NANO)
    path = save_pretrained(model, tmp_path / "a")
    proof = entry_of(open_weights(path)).proof
    next(model.parameters()).data[0, 0, 0, 0, 0] += 0.05
    other = save_pretrained(model, tmp_path / "b")
    entry = replace(entry_of(open_weights(other)), proof=proof)
    put_entry(other, entry)
    found = verify_maths(str(other))
    assert (
        found.verdict == "FAIL" and "off: " in found.seen and found.fix.startswith("gvsl-zoo verify checks the bytes")
    )


def put_entry(path: Path, entry: ModelEntry) -> None:
    """Write another entry into a file's header."""
    from gvsl_zoo.weights import METADATA_KEY, write_weights

    file = open_weights(path)
    tensors = {name: file.tensor(name).clone() for name in file.slots}
    write_weights(tensors, path, {METADATA_KEY: json.dumps(entry.to_dict())})


def test_another_window_in_the_entry_fails(tmp_path):
    path = save_pretrained(load(NANO), tmp_path)
    entry = entry_of(open_weights(path))
    wrong = replace(entry.input, intensity=replace(entry.input.intensity, window=(0.0, 2048.0)))
    put_entry(path, replace(entry, input=wrong))
    assert verify_maths(str(path)).verdict == "FAIL"


def test_a_model_without_a_proof_is_a_warning(tmp_path):
    path = save_pretrained(load(NANO), tmp_path)
    put_entry(path, replace(entry_of(open_weights(path)), proof=None))
    found = verify_maths(str(path))
    assert (found.verdict, found.seen) == ("WARN", "its entry carries no proof")


def test_a_device_that_is_not_here_is_a_wrong_call():
    with pytest.raises(ArgumentError, match="this machine has no device cuda:99"):
        verify_maths(NANO, device="cuda:99")


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_a_gpu_passes(bf16):
    assert verify_maths(NANO, device="cuda", bf16=bf16).verdict == "PASS"


# --- The command and the script -----------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_command_checks_bytes_and_then_maths():
    result = run("verify", NANO, "--maths", "--json")
    assert result.exit_code == 0, result.output
    assert [row["verdict"] for row in json.loads(result.output)] == ["PASS", "PASS"]
    assert run("verify", "--all", "--maths", "--bf16").output.count("PASS") == 2 * len(list_models(available=True))


def test_the_command_fails_where_one_of_several_models_does(tmp_path):
    path = save_pretrained(load(NANO), tmp_path)
    entry = entry_of(open_weights(path))
    put_entry(path, replace(entry, proof=replace(entry.proof, digests=model_info(NANO).proof.digests)))
    result = run("verify", NANO, path, "--maths")
    assert result.exit_code == 1 and "FAIL  " in result.output and "affine of cube" in result.output


@pytest.mark.parametrize("option", [("--bf16",), ("--device", "cpu")])
def test_options_of_maths_without_it_are_a_wrong_call(option):
    result = run("verify", NANO, *option)
    assert result.exit_code == 2 and "--device and --bf16 go with --maths" in result.output


def script(monkeypatch, *words):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.setattr(sys, "argv", ["prove.py", *map(str, words)])
    importlib.import_module("prove").main()


def test_the_script_writes_what_the_registry_reads_and_nothing_else(tmp_path, monkeypatch):
    before = (ROOT / "weights_registry.yaml").read_text()
    mine = tmp_path / "registry.yaml"
    mine.write_text(before.replace("tolerance_bf16:", "tolerance_bf16: 0.5 #", 1))
    script(monkeypatch, NANO, "--registry", mine)
    after = registry._read(mine)
    ours = registry._read(ROOT / "weights_registry.yaml")
    assert after.keys() == ours.keys()
    for name in ours.keys() - {NANO}:
        assert after[name].to_dict() == ours[name].to_dict() | {"sources": after[name].to_dict()["sources"]}
    assert replace(after[NANO], proof=None) == replace(ours[NANO], proof=None)
    assert max(errors(ours[NANO].proof.digests, after[NANO].proof.digests).values()) < TOLERANCE


@pytest.mark.parametrize(
    "changes", [{"ndim": 2, "crop": (24, 24)}, {"backbone": "xmorpher", "width": 16}, {"objective": "gemini"}], ids=str
)
def test_the_script_proves_a_run_by_its_own_registry(changes, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "draw_run", lambda *_: None)
    config = PretrainConfig(1, save_every=1, spacing_mm=9.0, **{"crop": (16, 16, 16)} | changes)
    pretrain(config, tmp_path / "lab", device="cpu")
    listing = tmp_path / "lab/registry.yaml"
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(listing))
    name, image = load(tmp_path / "lab").entry.name, tmp_path / "image.nii.gz"
    before = model_info(name)
    volume = formula_film("odd") if config.ndim == 2 else formula_scan("odd", (9.0, 9.0, 9.0), "HU")
    write_volume(volume, image)
    script(monkeypatch, name, "--registry", listing, "--images", image)
    registry._read.cache_clear()
    after = model_info(name)
    assert replace(after, proof=None, input_statistics=None) == before and after.input_statistics.images == 1
    result = run("verify", name, "--maths")
    assert result.exit_code == 0 and f"PASS  {name} (maths" in result.output, result.output


def test_a_proof_holds_in_a_process_that_has_chosen_tf32(tmp_path):
    model = load("gvsl-unet-ct-nano")
    torch.backends.fp32_precision = "tf32"
    try:
        model.save_pretrained(tmp_path / "model")
    finally:
        torch.backends.fp32_precision = "none"
    assert load(tmp_path / "model").entry.proof == save_and_load(model, tmp_path / "again").entry.proof


def test_a_channels_last_model_gets_the_proof_of_its_file(tmp_path):
    model = load("gvsl-unet-ct-nano", task="pretraining")
    plain = save_and_load(model, tmp_path / "plain").entry.proof
    last = save_and_load(model.to(memory_format=torch.channels_last_3d), tmp_path / "last").entry.proof
    assert last == plain


def save_and_load(model, path):
    model.save_pretrained(path)
    return load(path)


def test_a_proof_is_that_of_the_model_in_evaluation_mode():
    model = load("gvsl-xmorpher-ct-nano", task="pretraining").train()
    assert max(check(model, model.entry.proof).values()) < model.entry.proof.tolerance
    assert model.training
