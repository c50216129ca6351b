"""The registry: what it accepts, what it refuses and in which line, and what it answers."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import yaml

from gvsl_zoo import registry
from gvsl_zoo.errors import ArgumentError, RegistryError
from gvsl_zoo.registry import Label, ModelEntry, list_models, model_info, register_registry

SHA = "ab" * 32
REVISION = "0123456789" * 4
MINE = f"""\
schema_version: 1
models:
  my-unet:
    summary: a backbone of our lab
    status: available
    architecture: unet
    config: {{ndim: 3, width: 8, depths: [2, 2], act: no, slope: 0.2, bias: true}}
    ndim: 3
    modality: MR
    objective: gvsl
    parameters: 12
    input:
      axes: zyx
      spacing_mm: [3, 1.5, 1.5]
      orientation: RAS
      intensity: {{unit: arbitrary, window: [0, null], scale: [0, 1]}}
    heads: [restoration]
    sources:
      - {{kind: hub, repo: lab/unet, file: sub/model.safetensors, revision: {REVISION}, sha256: {SHA}, bytes: 48}}
    licence: {{code: MIT, weights: MIT, data: no}}
    citation: 0123
"""
HUB = f"{{kind: hub, repo: lab/unet, file: sub/model.safetensors, revision: {REVISION}, sha256: {SHA}, bytes: 48}}"
DRIVE = "{kind: gdrive, id: 12VJbif6Q9KRfVTKWeku2l, file: a.pth, bytes: 9, pinned: false}"


@pytest.fixture(autouse=True)
def no_user_registries(monkeypatch):
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_added", {})


@pytest.fixture
def write(tmp_path):
    def write(content: str | bytes, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


# --- What is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"mine\.yaml:1: empty"),
        (b"# only a comment\n", r"mine\.yaml:1: empty"),
        (b"- a list\n", r"mine\.yaml:1: registry: expected fields"),
        (b"\n\njust text", r"mine\.yaml:3: registry: expected fields"),
        (b"schema_version: 1\nmodels: {a: [\n", r"mine\.yaml:3: not plain YAML"),
        (b"schema_version: 1\nmodels:\n\t- tab", r"mine\.yaml:3: not plain YAML"),
        (b"schema_version: 1\n---\nmodels: {}\n", r"mine\.yaml:2: not plain YAML: but found another document"),
        (b"\xef\xbb\xbf" + MINE.encode(), r"mine\.yaml:1: holds the character U\+FEFF; .*byte order mark"),
        (MINE.encode("utf-16"), r"mine\.yaml:1: not UTF-8"),
        (b"schema_version: 1\nmodels: \xff\n", r"mine\.yaml:2: not UTF-8"),
        (b"schema_version: 1\nmod\0els: {}\n", r"mine\.yaml:2: holds the character U\+0000"),
        (b'schema_version: 1\nmodels: "\\UFFFFFFFF"\n', r"mine\.yaml:[12]: not (plain )?YAML"),
        (b"PK\x03\x04" + bytes(100), r"mine\.yaml:1: holds the character"),
    ],
)
def test_what_is_not_plain_yaml_is_refused_with_its_line(write, content, match):  # Y1
    with pytest.raises(RegistryError, match=match):
        register_registry(write(content))


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        # Y2: nothing is given twice
        ("    ndim: 3\n", "    ndim: 3\n    ndim: 2\n", r"mine\.yaml:9: my-unet: 'ndim' is given twice .*line 8"),
        ("    citation: 0123\n", "    citation: x\n  my-unet: {}\n", r":22: models: 'my-unet' is given twice"),
        ("config: {", "config: {width: 9, ", r":7: my-unet.config: 'width' is given twice"),
        # Y3: no tags
        ("citation: 0123", "citation: !!python/object/apply:os.system [id]", r":21: .*tags are not accepted"),
        ("citation: 0123", "citation: !!str 0123", r":21: .*tags are not accepted"),
        # Y4: unknown, missing and wrongly typed fields
        ("    ndim: 3\n", "    ndim: 3\n    colour: red\n", r":9: my-unet: unknown field 'colour'; known are name"),
        ("spacing_mm:", "spacing:", r":14: my-unet\.input: unknown field 'spacing'"),
        ("unit: arbitrary,", "", r":16: my-unet\.input\.intensity: the field 'unit' is missing"),
        ("models:", "extra: 1\nmodels:", r":2: expected schema_version: 1 and models"),
        ("    citation: 0123\n", "", r"my-unet: the field 'citation' is missing"),
        ("citation: 0123", "citation: ''", r"citation: expected text, got ''"),
        ("citation: 0123", "citation: [a]", r"citation: expected one value"),
        ("    config: {", "    config: {? [a] : b, ", "a key must be plain text"),
        ("ndim: 3\n", "ndim: 4\n", r":8: my-unet\.ndim: expected 2 or 3, got '4'"),
        ("ndim: 3\n", "ndim: 2\n", "ndim 2 does not agree"),
        ("parameters: 12", "parameters: '12'", r":11: my-unet\.parameters: expected a whole number"),
        ("parameters: 12", "parameters: 012", r":11: my-unet\.parameters: expected a whole number"),
        ("parameters: 12", "parameters: -1", r":11: my-unet\.parameters: expected 0 or more"),
        ("[3, 1.5, 1.5]", "[3, 1.5]", r":13: my-unet\.input: expected 3 positive numbers"),
        ("[3, 1.5, 1.5]", "[3, 1.5, .nan]", r":14: .*spacing_mm\[2\]: expected a number, got '\.nan'"),
        ("[3, 1.5, 1.5]", "3", r":14: .*spacing_mm: expected a list"),
        ("scale: [0, 1]", "scale: [1, 0]", r"expected \[low, high\], got \[1, 0\]"),
        ("scale: [0, 1]", "scale: [0]", r"scale: expected 2 values, got 1"),
        ("heads: [restoration]", "heads: [hydra]", r"heads\[0\]: expected affine or .*, got 'hydra'"),
        ("orientation: RAS", "orientation: up", "expected RAS, got"),
        # Y5: a hub source states commit and hash
        (f"sha256: {SHA}, ", "", r":19: .*sources\[0\]: a pinned hub source needs sha256"),
        (f"revision: {REVISION}, ", "", "a pinned hub source needs revision"),
        (REVISION, "main", r":19: .*revision: expected a commit of 40 hexadecimal digits, not a branch"),
        (REVISION, REVISION[:7], "expected a commit of 40 hexadecimal digits"),
        # Y6: hashes
        (SHA, SHA[:-1], "sha256: expected a sha256 of 64 hexadecimal digits"),
        (SHA, "g" + SHA[1:], "sha256: expected a sha256 of 64 hexadecimal digits"),
        # Y7: paths and names
        ("sub/model", "../model", r"file: '\.\./model\.safetensors' is not a plain path"),
        ("sub/model", "sub/./model", "is not a plain path"),
        ("sub/model", "/etc/model", "expected a relative path"),
        ("sub/model", "C:/model", "is not a plain path|expected a relative path"),
        ("sub/model", "sub\\model", "is not a plain path"),
        ("sub/model.safetensors", '"a\\0b"', r":19: .*file: holds the character U\+0000"),
        ("sub/model", "sub/NUL", "a device name on Windows"),
        ("sub/model.safetensors", "com1", "a device name on Windows"),
        ("sub/model.safetensors", "'model. '", "is not a plain path"),
        ("  my-unet:", "  ../my-unet:", "expected a lower-case name"),
        ("  my-unet:", "  con:", "a device name on Windows"),
        (HUB, DRIVE.replace("a.pth", "sub/a.pth"), "expected a file name without a folder"),
        (HUB, f"{{kind: embedded, file: sub/a.bin, sha256: {SHA}}}", "expected a file name without a folder"),
        (HUB, f"{{kind: file, path: ../a.bin, sha256: {SHA}}}", "is not a plain path"),
        # Y8: aliases and depth
        ("summary: a", "summary: &x a", r":4: .*anchors and aliases are not accepted"),
        ("summary: a backbone of our lab", "summary: *x", r":4: .*anchors and aliases are not accepted"),
        ("depths: [2, 2]", "depths: " + "[" * 50 + "]" * 50, r":7: .*nested more than 12 deep"),
        # Y11: no other hosts
        ("citation: 0123", "citation: http://arxiv.org/abs/1", r":21: .*http://arxiv\.org is refused; links are https"),
        ("citation: 0123", "citation: see https://evil.example/x", r"https://evil\.example is refused"),
        ("citation: 0123", "citation: https://doi.org@evil.example", "is refused"),
        ("repo: lab/unet", "repo: https://evil.example/lab/unet", "is refused"),
        ("repo: lab/unet", "repo: evil.example/lab/unet", "repo: expected org/name"),
        ("repo: lab/unet", "url: https://huggingface.co/lab/unet", "unknown field 'url'"),
        (HUB, DRIVE.replace("12VJbif6Q9KRfVTKWeku2l", "a/../b&confirm=1"), "expected a Google Drive file id"),
        # sources and status agree
        ("kind: hub", "kind: ftp", "expected hub or gdrive or file or embedded, got 'ftp'"),
        ("bytes: 48", "bytes: 48, pinned: false", "only a gdrive source may say pinned: false"),
        (HUB, DRIVE, r":3: my-unet: an available model needs a source with a sha256"),
        (HUB, DRIVE.replace(", pinned: false", ""), "a pinned gdrive source needs sha256"),
        (HUB, DRIVE.replace(", bytes: 9", ""), "unpinned gdrive source needs bytes"),
        ("bytes: 48", "bytes: 48, id: 12VJbif6Q9KRf", "a pinned hub source has no id"),
        (HUB, DRIVE.replace("bytes", f"sha256: {SHA}, bytes"), "unpinned gdrive source has no sha256"),
        ("status: available", "status: planned", "a planned model has no sources yet"),
        ("    sources:\n      - " + HUB + "\n", "", "status available, but no source"),
        # Y12: a newer schema
        ("schema_version: 1", "schema_version: 2\nnew_field: 1", "schema_version 2 is newer than 1; upgrade gvsl-zoo"),
        ("schema_version: 1\n", "", "expected schema_version: 1 and models, got models"),
        ("schema_version: 1", "schema_version: 1.0", r":1: schema_version: expected a whole number"),
    ],
)
def test_a_faulty_entry_is_refused_with_file_line_and_field(write, old, new, match):
    assert MINE.count(old) >= 1
    with pytest.raises(RegistryError, match=match):
        register_registry(write(MINE.replace(old, new, 1)))
    assert "my-unet" not in list_models()


def test_an_alias_bomb_is_refused_at_once(write):  # Y8
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)
    ]
    start = time.perf_counter()
    with pytest.raises(RegistryError, match=r":1: .*anchors and aliases"):
        register_registry(write("\n".join(lines)))
    with pytest.raises(RegistryError, match=r"nested more than 12 deep|maximum nesting depth"):
        register_registry(write("[" * 900_000, "deep.yaml"))
    assert time.perf_counter() - start < 5


def test_a_file_beyond_a_megabyte_is_refused_before_it_is_parsed(write, monkeypatch):  # Y13
    monkeypatch.setattr(registry.yaml, "compose", None)
    with pytest.raises(RegistryError, match="larger than 1,000,000 bytes"):
        register_registry(write(MINE + "#" * 1_000_000))


def test_a_registry_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(RegistryError, match=r"cannot read the registry .*absent\.yaml \(No such file"):
        register_registry(tmp_path / "absent.yaml")
    with pytest.raises(RegistryError, match="cannot read the registry"):
        register_registry(tmp_path)


# --- What is accepted --------------------------------------------------------------------------------------


def test_text_stays_text_and_numbers_are_read_by_the_field(write):  # Y9
    register_registry(write(MINE))
    entry = model_info("my-unet")
    assert (entry.citation, entry.licence.data) == ("0123", "no")
    assert entry.sources[0].revision == REVISION  # all digits
    assert entry.config == {"ndim": 3, "width": 8, "depths": (2, 2), "act": "no", "slope": 0.2, "bias": True}
    assert entry.input.spacing_mm == (3.0, 1.5, 1.5)
    assert entry.input.intensity.window == (0.0, None)


def test_a_hash_in_capitals_is_read_as_the_same_hash(write):  # Y6
    register_registry(write(MINE.replace(SHA, SHA.upper())))
    assert model_info("my-unet").sources[0].sha256 == SHA


def test_a_relative_path_starts_at_the_registry_of_the_user(write, tmp_path):
    relative = MINE.replace(HUB, f"{{kind: file, path: runs/a.safetensors, sha256: {SHA}}}")
    register_registry(write(relative))
    assert Path(model_info("my-unet").sources[0].path) == tmp_path / "runs" / "a.safetensors"
    absolute = relative.replace("runs/a", (tmp_path / "b").as_posix()).replace("my-unet", "other")
    register_registry(write(absolute, "other.yaml"))
    assert Path(model_info("other").sources[0].path) == tmp_path / "b.safetensors"


def test_an_absolute_path_is_refused_in_our_own_registry(write, monkeypatch):
    path = write(MINE.replace(HUB, f"{{kind: file, path: /etc/a.bin, sha256: {SHA}}}"), "weights_registry.yaml")
    monkeypatch.setattr(registry, "_own_path", lambda: path)
    with pytest.raises(RegistryError, match=r"^weights_registry\.yaml:19: .*an absolute path is for registries of"):
        list_models()


def test_the_authors_file_without_a_hash_is_accepted_as_upstream(write):
    register_registry(write(MINE.replace(HUB, DRIVE).replace("status: available", "status: upstream")))
    source = model_info("my-unet").sources[0]
    assert (source.pinned, source.sha256, source.bytes) == (False, None, 9)


# --- Registries of users -----------------------------------------------------------------------------------


def test_a_registered_file_adds_its_names_beside_ours(write):
    assert register_registry(str(write(MINE))) == ["my-unet"]
    assert {"my-unet", "gvsl-unet-ct"} <= set(list_models())


def test_a_name_that_exists_is_refused_and_nothing_is_added(write):
    register_registry(write(MINE))
    with pytest.raises(RegistryError, match=r"again\.yaml: the name 'my-unet' exists already"):
        register_registry(write(MINE, "again.yaml"))
    with pytest.raises(RegistryError, match="the name 'gvsl-unet-ct' exists already"):
        register_registry(write(MINE.replace("my-unet", "gvsl-unet-ct"), "ours.yaml"))
    assert model_info("gvsl-unet-ct").modality == "CT"


def test_the_environment_names_several_registries(write, monkeypatch):
    paths = [write(MINE.replace("my-unet", name), f"{name}.yaml") for name in ("one", "two")]
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", os.pathsep.join(map(str, paths)))
    assert {"one", "two", "gvsl-unet-ct"} <= set(list_models())
    monkeypatch.delenv("GVSL_ZOO_REGISTRY")
    assert "one" not in list_models()


def test_a_broken_registry_of_the_environment_is_named_until_it_is_mended(write, monkeypatch):
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(write("nonsense")))
    with pytest.raises(RegistryError, match=r"mine\.yaml:1"):
        list_models()
    write(MINE)
    assert "my-unet" in list_models()


# --- Our registry ------------------------------------------------------------------------------------------


def test_every_name_of_the_official_zoo_page_has_a_row():
    assert {"gvsl-unet-ct", "gvsl-unet-xray", "gvsl-xmorpher-ct", "gvsl-xmorpher-xray"} <= set(list_models())


@pytest.mark.parametrize("name", list_models())
def test_every_entry_survives_json_pickle_and_a_deep_copy(name):
    entry = model_info(name)
    assert ModelEntry.from_dict(json.loads(json.dumps(entry.to_dict()))) == entry
    assert pickle.loads(pickle.dumps(entry)) == deepcopy(entry) == entry
    assert hash(entry) == hash(model_info(name))


@pytest.mark.parametrize("name", list_models())
def test_a_model_without_pinned_bytes_names_one_to_use_instead(name):
    entry = model_info(name)
    assert entry.instead is None or entry.instead in list_models()
    if entry.status == "planned":
        assert model_info(entry.instead).status != "planned"
        assert "no weights exist" in entry.summary


def test_an_entry_read_back_is_read_as_strictly_as_a_registry():
    data = model_info("gvsl-unet-ct").to_dict()
    with pytest.raises(RegistryError, match=r"config\.json:1: entry: unknown field 'colour'"):
        ModelEntry.from_dict({**data, "colour": "red"}, "config.json")
    with pytest.raises(RegistryError, match="nested more than 12 deep"):
        ModelEntry.from_dict({**data, "config": {"a": [[[[[[[[[[[[[]]]]]]]]]]]]]}})


def test_changing_a_returned_config_changes_no_later_answer():
    model_info("gvsl-unet-ct").config["width"] = 1
    assert model_info("gvsl-unet-ct").config["width"] == 32


def test_an_entry_is_frozen():
    with pytest.raises(AttributeError, match="cannot assign to field"):
        model_info("gvsl-unet-ct").ndim = 2


def test_filters_combine():
    nano = "gvsl-unet-ct-nano"
    ours = [nano, f"{nano}-contrast", "gvsl-unet-ct-small"]
    transformer = "gvsl-xmorpher-ct-nano"
    assert list_models("gvsl-*", ndim=3, modality="ct") == ["gvsl-unet-ct", *ours, "gvsl-xmorpher-ct", transformer]
    assert list_models("gvsl-*", ndim=3, available=True) == [*ours, transformer]
    gemini = ["gemini-unet-brain", "gemini-unet-ct-nano", "gemini-unet-xray"]
    assert list_models(task="registration") == [*gemini, *ours, "gvsl-unet-xray-nano", transformer]
    assert list_models("*-xray", task="pretraining") == ["gemini-unet-xray"]
    assert list_models("nothing-*") == []
    assert list_models() == sorted(list_models(available=True) + list_models(available=False))


@pytest.mark.parametrize("wrong", [{"ndim": 4}, {"modality": "PET"}, {"task": "segment"}])
def test_a_filter_that_nothing_can_fit_is_a_wrong_call(wrong):
    with pytest.raises(ArgumentError, match=r"unknown .*; expected one of"):
        list_models(**wrong)


@pytest.mark.parametrize(
    ("heads", "tasks"),
    [
        ("[]", ()),
        ("[restoration]", ()),
        ("[affine, deformable]", ("registration",)),
        ("[affine, deformable, restoration]", ("registration", "pretraining")),
        ("[deformer, restoration]", ("registration",)),  # these heads are GEMINI's, the objective is not
    ],
)
def test_the_heads_say_which_tasks_a_file_serves(write, heads, tasks):
    register_registry(write(MINE.replace("[restoration]", heads)))
    assert model_info("my-unet").tasks == ("backbone", "segmentation", "classification", *tasks)


LABELLED = (
    "heads: [segmentation]\n    labels: [{name: background, value: 0}, {name: lung, value: 3, colour: [9, 99, 255]}]"
)


def test_a_trained_head_has_its_labels_in_the_order_of_its_channels(write):
    register_registry(write(MINE.replace("heads: [restoration]", LABELLED)))
    entry = model_info("my-unet")
    assert entry.labels == (Label("background", 0), Label("lung", 3, (9, 99, 255)))
    assert entry.trained_head == "segmentation" and entry.tasks == ("backbone", "segmentation", "classification")
    assert ModelEntry.from_dict(entry.to_dict()) == entry


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("heads: [segmentation]", "heads: [segmentation, affine]", "a trained segmentation head stands alone, got seg"),
        ("heads: [segmentation]", "heads: [restoration]", "a trained head has labels, and nothing else has"),
        ("labels: [{", "limits: '[{", "a trained head has labels"),
        ("value: 3", "value: 0", "two labels have one value"),
        ("name: lung", "name: background", "two labels have one name"),
        ("255]", "256]", r"labels\[1\]\.colour\[2\]: expected 0 to 255, got 256"),
    ],
)
def test_labels_that_do_not_belong_to_a_head_are_refused(write, old, new, match):
    text = MINE.replace("heads: [restoration]", LABELLED).replace(old, new)
    with pytest.raises(RegistryError, match=match):
        register_registry(write(text.replace("255]}]", "255]}]'") if "limits" in new else text))


@pytest.mark.parametrize(
    ("name", "match"),
    [  # Y10
        (
            "gvsl-unet3d-ct",
            r"^unknown model 'gvsl-unet3d-ct'; did you mean 'gvsl-unet-ct'\? See gvsl_zoo\.list_models\(\)\.$",
        ),
        ("GVSL-UNet-CT", "did you mean 'gvsl-unet-ct'"),
        ("gemini-unet-xrays", "did you mean 'gemini-unet-xray'"),
        ("resnet", r"^unknown model 'resnet'; see gvsl_zoo\.list_models\(\)\.$"),
        ("x" * 10**6, r"^unknown model 'x{77}\.\.\.'"),
        (None, "unknown model 'None'"),
        (["gvsl-unet-ct"], "unknown model"),
        ("here", r"^unknown model 'here'; for the path here write './here'; see gvsl_zoo\.list_models\(\)\.$"),
        ("./here", "unknown model './here'; this takes names of the registry, no path or repository: see"),
        ("hf-hub:org/model", "this takes names of the registry, no path or repository"),
    ],
)
def test_an_unknown_name_brings_near_names(name, match, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(RegistryError, match=match):
        model_info(name)


def test_the_parser_in_c_gives_the_nodes_of_the_one_in_python():
    def facts(node):
        if isinstance(node, yaml.Node):
            return type(node), node.tag, node.start_mark.line, facts(node.value)
        return node if isinstance(node, str) else [*map(facts, node)]

    text = registry._own_path().read_text()
    assert facts(yaml.compose(text, Loader=registry._PlainLoader)) == facts(yaml.compose(text, Loader=yaml.SafeLoader))


def test_the_registry_imports_neither_torch_nor_numpy():
    code = "import sys, gvsl_zoo.registry as r; r.list_models(); print({'torch', 'numpy'} & set(sys.modules))"
    root = Path(registry.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.strip() == "set()"


def test_in_a_wheel_the_registry_lies_beside_the_module(tmp_path, monkeypatch):
    (tmp_path / "weights_registry.yaml").touch()
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "registry.py"))
    assert registry._own_path() == tmp_path / "weights_registry.yaml"
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "gvsl_zoo" / "registry.py"))
    assert registry._own_path() == tmp_path / "weights_registry.yaml"


@pytest.mark.parametrize("name", list_models())
def test_every_model_says_that_it_is_no_medical_device(name):
    assert "not a medical device" in (model_info(name).limits or "")
