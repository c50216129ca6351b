"""Tests of the package as it is shipped: lazy names, the wheel, what the source must not hold."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import gvsl_zoo

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for part in ("gvsl_zoo", "scripts", "benchmarks", "examples", "tests") for path in (ROOT / part).rglob("*.py")
)
TORCH_SAVED = ("torch.load", "torch.serialization.load")


def python(code, **settings):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, **settings).stdout


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import gvsl_zoo", ["torch", "numpy", "nibabel", "yaml", "click", "rich", "safetensors", "huggingface_hub"]),
        ("import gvsl_zoo.cli", ["torch", "numpy", "nibabel", "huggingface_hub"]),
        ("from gvsl_zoo import list_models; list_models()", ["torch", "numpy", "nibabel"]),
        ("import gvsl_zoo.zoo", ["matplotlib", "monai", "SimpleITK", "huggingface_hub", "torchvision"]),
        ("from gvsl_zoo import load; load('gvsl-unet-ct-nano', task='registration')", ["torch._dynamo"]),
    ],
    ids=lambda a: a if isinstance(a, str) else "",
)
def test_what_is_not_needed_is_not_imported(statement, absent):
    loaded = json.loads(python(f"{statement}; import json, sys; print(json.dumps(list(sys.modules)))"))
    assert "gvsl_zoo" in loaded and sorted(set(absent) & set(loaded)) == []


@pytest.mark.parametrize("name", gvsl_zoo.__all__)
def test_every_public_name_resolves_and_explains_itself(name):
    value = getattr(gvsl_zoo, name)
    assert name in dir(gvsl_zoo)
    if name != "__version__":
        assert value.__name__ == name and value.__doc__


def test_a_star_import_gives_the_public_names():
    names = python("from gvsl_zoo import *; print(*[n for n in dir() if n[0] != '_'])").split()
    assert set(names) == set(gvsl_zoo.__all__) - {"__version__"}


def test_every_public_name_is_known_to_type_checkers():
    """The lazy table and the imports under TYPE_CHECKING tell the same."""
    tree = ast.parse((ROOT / "gvsl_zoo" / "__init__.py").read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    told = {
        (node.module, alias.name)
        for node in ast.walk(checked)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert told == {(home, name) for home, names in gvsl_zoo._HOMES.items() for name in names}


def test_an_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gvsl_zoo' has no attribute 'lod'"):
        gvsl_zoo.lod  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'lod'"):
        exec("from gvsl_zoo import lod")


def test_the_installed_version_is_the_packages():
    assert importlib.metadata.version("gvsl-zoo") == gvsl_zoo.__version__


# --- The source ------------------------------------------------------------------------------------------------


def calls(path):
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_says_what_it_is_and_takes_no_risks(path):
    text = path.read_text()
    assert not text or ast.get_docstring(ast.parse(text)), "no docstring"
    for call in calls(path):
        name = ast.unparse(call.func)
        if not path.is_relative_to(ROOT / "tests"):  # a test of the GPU names it
            assert not name.endswith(".cuda"), f"line {call.lineno}: the device is the tensor's"
        if name in TORCH_SAVED:
            safe = {k.arg: ast.unparse(k.value) for k in call.keywords}.get("weights_only")
            assert safe == "True", f"line {call.lineno}: torch.load without weights_only=True"
        if path.is_relative_to(ROOT / "gvsl_zoo"):
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load", "os.system"), call.lineno


def test_models_know_no_file_and_no_registry():
    own = re.compile(r"from \.+(registry|hub|zoo|weights|volume|cli|report|pretrain|inference)\b")
    for path in [
        *(ROOT / "gvsl_zoo" / "models").glob("*.py"),
        *(ROOT / "gvsl_zoo" / n for n in ("spatial.py", "losses.py")),
    ]:
        assert not own.search(path.read_text()), path.name


def test_embedded_weights_stay_small_and_are_all_listed():
    files = {path.name: path.stat().st_size for path in (ROOT / "gvsl_zoo" / "embedded").iterdir()}
    sources = [s for name in gvsl_zoo.list_models() for s in gvsl_zoo.model_info(name).sources]
    assert set(files) == {source.file for source in sources if source.kind == "embedded"}
    assert sum(files.values()) <= 8_000_000


# --- The wheel -------------------------------------------------------------------------------------------------


def built(kind, source, folder):
    """The "wheel" or "sdist" of a source tree."""
    pytest.importorskip("hatchling", reason="building needs hatchling")
    code = f"import hatchling.build as b; print(b.build_{kind}({str(folder)!r}))"
    return folder / python(code, cwd=source).split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the wheel's content alone, and a way to run Python with it from outside the checkout."""
    target = tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*pip, str(target), str(wheel)], check=True, capture_output=True)
    home = tmp_path_factory.mktemp("home")
    return lambda code: python(
        code, cwd=home, env=os.environ | {"PYTHONPATH": str(target), "HF_HOME": str(home)}
    ), target


@pytest.mark.slow
def test_the_wheel_holds_what_is_needed_and_no_more(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    embedded = {f"gvsl_zoo/embedded/{path.name}" for path in (ROOT / "gvsl_zoo" / "embedded").iterdir()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "gvsl_zoo").rglob("*.py")}
    page = {str(path.relative_to(ROOT)) for path in (ROOT / "gvsl_zoo" / "view" / "page").glob("*")}  # if built
    recipes = {f"gvsl_zoo/recipes/{path.name}" for path in (ROOT / "recipes").iterdir()}
    others = {"gvsl_zoo/weights_registry.yaml", "gvsl_zoo/py.typed"}
    assert embedded | modules | page | recipes | others <= set(names)
    assert any(re.fullmatch(r"[^/]+\.dist-info/(licenses/)?LICENSE", name) for name in names)
    assert {name.split("/")[0] for name in names} == {"gvsl_zoo", f"gvsl_zoo-{gvsl_zoo.__version__}.dist-info"}
    assert len(names) == len(set(names)) and not [name for name in names if re.search(r"(^|/)tests?[/_]|\.pyc", name)]
    assert wheel.stat().st_size < 7_000_000


TYPED = """
from gvsl_zoo import load

net = load("gvsl-unet-ct-nano")
print(net(net.preprocess("scan.nii.gz")), net.entry.name, net.cite())
segmentation = load("gvsl-unet-ct-nano", task="segmentation", num_classes=3)
print(segmentation.parameter_groups(1e-2), segmentation.backbone.freeze())
print(load("gvsl-unet-ct-nano", features_only=True, out_indices=(0, 1)).feature_info.channels())
print(load("gvsl-unet-ct-nano", task="registration", device="cpu").backbone)
load("gvsl-unet-ct-nano", task="classification", num_classes=2).reset_haed(3)
"""


@pytest.mark.slow
def test_code_that_loads_models_has_types(tmp_path):
    pytest.importorskip("mypy", reason="comes with gvsl-zoo[dev]")
    (tmp_path / "own.py").write_text(TYPED)
    call = [sys.executable, "-m", "mypy", "--no-incremental", "--strict", "own.py"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.count(" error: ") == 1, done.stdout
    assert done.stdout.startswith("own.py:10: error: "), done.stdout


@pytest.mark.slow
def test_a_wheel_made_from_the_source_distribution_holds_the_same(wheel, tmp_path):
    with tarfile.open(built("sdist", ROOT, tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    [source] = (path for path in tmp_path.iterdir() if path.is_dir())
    again = built("wheel", source, tmp_path)
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_installed_wheel_works_without_the_checkout(installed):
    run, target = installed
    lines = run(
        "import gvsl_zoo, json\n"
        "print(gvsl_zoo.__file__)\n"
        "print(gvsl_zoo.__version__)\n"
        "print(json.dumps(gvsl_zoo.list_models()))\n"
        "model = gvsl_zoo.load('gvsl-unet-ct-nano', task='pretraining')\n"
        "print(model.load_report.origin, model.load_report.loaded)\n"
        "import importlib.metadata; print(importlib.metadata.version('gvsl-zoo'))\n"
        "from gvsl_zoo.recipes import read_recipe; print(read_recipe('gvsl-unet-ct-nano').seconds)\n"
    ).splitlines()
    assert Path(lines[0]).is_relative_to(target) and lines[1] == lines[4] == gvsl_zoo.__version__
    assert json.loads(lines[2]) == gvsl_zoo.list_models()
    assert lines[3].startswith(str(target)) and int(lines[3].split()[-1]) > 0 and float(lines[5]) > 0


@pytest.mark.slow
def test_the_installed_command_line_works_without_the_checkout(installed):
    run, _ = installed
    code = "import sys; sys.argv = ['gvsl-zoo', 'list', '--available']; from gvsl_zoo.cli import main; main()"
    assert run(code).split()[0] == gvsl_zoo.list_models(available=True)[0]
