"""Tests of the command line: what it writes, what it says, one line an error, exit codes 0, 1 and 2."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import drive_server
import hub_server
import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from hub_server import Hub

from gvsl_zoo import (
    __version__,
    drive,
    list_models,
    load,
    model_info,
    pooled_features,
    registry,
    save_pretrained,
    sources,
)
from gvsl_zoo.cli import DEFAULT_MODEL, main
from gvsl_zoo.cli.common import show
from gvsl_zoo.errors import ArgumentError, RegistryError, SourceError, WeightsError
from gvsl_zoo.models.unet import UNet

AFFINE = np.array([[0, 0, -4.0, 40], [-3.0, 0, 0, 20], [0, 5.0, 0, -30], [0, 0, 0, 1]])  # axes (y, z, x), mm
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def a_home_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_added", {})


def run(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


def done(*args):
    """What a command printed that went well."""
    result = run(*args)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(code, text, *args):
    """A command fails with its exit code and one line on the error stream, which holds `text`."""
    result = run(*args)
    lines = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert (result.exit_code, len(lines), result.stdout) == (code, 1, ""), result.output
    assert lines[0].startswith("error: ") and text in lines[0] and "Traceback" not in result.stderr


@pytest.fixture
def folder(tmp_path):
    """A folder with a small CT of a warm ball and a mask of its left half."""
    folder = tmp_path / "scans"
    folder.mkdir()
    i, j, k = np.meshgrid(*(np.linspace(-1, 1, n) for n in (24, 20, 28)), indexing="ij")
    data = np.where(i**2 + j**2 + k**2 < 0.8, 100 + 200 * i, -1000).astype(np.int16)
    nib.save(nib.Nifti1Image(data, AFFINE), folder / "ct.nii.gz")
    nib.save(nib.Nifti1Image((i < 0).astype(np.uint8), AFFINE), folder / "mask.nii.gz")
    return folder


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- list, info ------------------------------------------------------------------------------------------------


def test_list_shows_every_model_in_a_line():
    lines = done("list").splitlines()
    assert [line.split()[0] for line in lines] == list_models()
    for line in lines:
        entry = model_info(line.split()[0])
        assert line.split()[1] == entry.status and entry.summary in line


@pytest.mark.parametrize(
    ("args", "settings"),
    [
        ([], {}),
        (["gvsl-*"], {"filter": "gvsl-*"}),
        (["--ndim", "2"], {"ndim": 2}),
        (["--modality", "ct"], {"modality": "CT"}),
        (["--task", "registration"], {"task": "registration"}),
        (["--available"], {"available": True}),
        (["--missing"], {"available": False}),
        (["*-ct*", "--ndim", "3", "--available"], {"filter": "*-ct*", "ndim": 3, "available": True}),
        (["nothing*"], {"filter": "nothing*"}),
    ],
    ids=str,
)
def test_list_filters_as_python_does(args, settings):
    found = json.loads(done("list", "--json", *args))
    assert found == [model_info(name).to_dict() for name in list_models(**settings)]
    assert [line.split()[0] for line in done("list", *args).splitlines()] == list_models(**settings)


@pytest.mark.parametrize("name", list_models())
def test_info_says_all_that_the_registry_knows(name):
    expected = model_info(name).to_dict() | {"tasks": list(model_info(name).tasks)}
    assert json.loads(done("info", name, "--json")) == expected
    assert yaml.safe_load(done("info", name)) == expected


def test_info_says_what_the_weights_of_a_path_know_of_themselves(tmp_path):
    save_pretrained(load(DEFAULT_MODEL), tmp_path / "mine")
    expected = load(tmp_path / "mine").entry
    for path in (tmp_path / "mine", tmp_path / "mine" / "model.safetensors"):
        assert json.loads(done("info", path, "--json")) == expected.to_dict() | {"tasks": list(expected.tasks)}
    refused(1, "No such file or directory", "info", tmp_path / "nothing")
    refused(1, "is not a weights file", "info", tmp_path / "mine" / "README.md")


# --- features --------------------------------------------------------------------------------------------------


def test_features_overlay_the_scan(folder):
    facts = json.loads(done("features", "-i", folder / "ct.nii.gz", "-o", folder / "out.nii.gz", "--json"))
    scan, out = nib.load(folder / "ct.nii.gz"), nib.load(folder / "out.nii.gz")
    assert out.shape == (*scan.shape, load(DEFAULT_MODEL).num_features)
    np.testing.assert_allclose(out.affine, scan.affine, atol=1e-5)
    assert np.isfinite(out.get_fdata()).all() and out.get_fdata().std() > 0
    assert facts == {"output": str(folder / "out.nii.gz"), "shape": list(out.shape), "model": DEFAULT_MODEL}


def test_features_on_the_models_grid_have_the_models_spacing(folder):
    text = done("features", "-i", folder / "ct.nii.gz", "-o", folder / "out.nii.gz", "--grid", "model")
    out = nib.load(folder / "out.nii.gz")
    spacing = model_info(DEFAULT_MODEL).input.spacing_mm
    np.testing.assert_allclose(out.header.get_zooms()[:3], spacing, rtol=0.1)
    assert str(list(out.shape)) in text


def test_features_leave_a_picture_when_asked(folder):
    out, picture = folder / "out.nii.gz", folder / "picture.png"
    assert str(picture) in done("features", "-i", folder / "ct.nii.gz", "-o", out, "--picture", picture)
    assert picture.read_bytes().startswith(PNG) and picture.stat().st_size > 10_000
    assert names_in(folder) == ["ct.nii.gz", "mask.nii.gz", "out.nii.gz", "picture.png"]


@pytest.mark.parametrize("masked", [False, True])
def test_pooled_features_are_those_of_python_in_both_formats(folder, masked):
    scan, mask = folder / "ct.nii.gz", folder / "mask.nii.gz" if masked else None
    expected = pooled_features(scan, load(DEFAULT_MODEL), mask=mask)
    for name in ("pooled.npz", "pooled.json"):
        given = ["--mask", mask] if masked else []
        facts = json.loads(done("features", "-i", scan, "-o", folder / name, "--pool", "--json", *given))
        assert facts["bottleneck"] == len(expected.bottleneck) and facts["local"] == len(expected.local)
        if name.endswith("json"):
            found = json.loads((folder / name).read_text())
        else:
            with np.load(folder / name) as arrays:
                found = dict(arrays)
        np.testing.assert_allclose(found["bottleneck"], expected.bottleneck, atol=1e-6)
        np.testing.assert_allclose(found["local"], expected.local, atol=1e-6)


def test_a_mask_changes_the_pooled_features(folder):
    for name, given in (("a.json", []), ("b.json", ["--mask", folder / "mask.nii.gz"])):
        done("features", "-i", folder / "ct.nii.gz", "-o", folder / name, "--pool", *given)
    assert (folder / "a.json").read_text() != (folder / "b.json").read_text()


@pytest.mark.parametrize("output", ["out.nii.gz", "out.npz"])
def test_an_existing_output_is_kept_unless_told(folder, output):
    (folder / output).write_bytes(b"precious")
    call = ["features", "-i", folder / "ct.nii.gz", "-o", folder / output, *["--pool"] * output.endswith("npz")]
    refused(1, "it exists already", *call)
    assert (folder / output).read_bytes() == b"precious"
    done(*call, "--overwrite")
    assert (folder / output).read_bytes() != b"precious"


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["plain", "overwrite"])
def test_the_input_is_never_the_output(folder, overwrite):
    before = (folder / "ct.nii.gz").read_bytes()
    (folder / "link.nii.gz").symlink_to(folder / "ct.nii.gz")
    for output in ("ct.nii.gz", "link.nii.gz"):
        call = ["-i", folder / "ct.nii.gz", "-o", folder / output, *overwrite]
        refused(1, "it is the input itself", "features", *call)
    (film := folder / "film.png").write_bytes(b"precious")
    call = ["-i", film, "-o", folder / "x.nii.gz", "--picture", film, *overwrite]
    refused(1, "it is the input itself", "features", *call)
    assert film.read_bytes() == b"precious" and (folder / "ct.nii.gz").read_bytes() == before


PAIR = "--fixed ct.nii.gz --moving other.nii.gz"
ITSELF, TWICE = (1, "it is the input itself"), (2, "give each its own name")


@pytest.mark.parametrize(
    ("refusal", "call"),
    [
        (ITSELF, f"register {PAIR} --moving-labels mask.nii.gz --labels-out mask.nii.gz"),
        (ITSELF, f"register {PAIR} --fixed-mask mask.nii.gz -o mask.nii.gz"),
        (ITSELF, f"register {PAIR} --moving-mask mask.nii.gz --jacobian-out ../scans/mask.nii.gz"),
        (TWICE, f"register {PAIR} -o new.nii.gz --jacobian-out ../scans/new.nii.gz"),
        (ITSELF, "warp -i ct.nii.gz --fixed mask.nii.gz --transform t.nii.gz -o mask.nii.gz"),
        (ITSELF, "warp -i ct.nii.gz --fixed mask.nii.gz --transform t.tfm --transform t.nii.gz -o t.nii.gz"),
        (ITSELF, f"correspond {PAIR} --points points.csv -o points.csv"),
        (ITSELF, f"correspond {PAIR} --point 0,0,0 --transform points.csv -o points.csv"),
        (ITSELF, "features -i ct.nii.gz -o vector.npz --pool --mask vector.npz"),
        (ITSELF, "segment -i ct.nii.gz -o mask.nii.gz --support other.nii.gz mask.nii.gz"),
        (ITSELF, "segment -i ct.nii.gz -o mask.nii.gz --atlas mask.nii.gz other.nii.gz"),
        (ITSELF, "segment -i ct.nii.gz -i other.nii.gz -o other.nii.gz"),
        (TWICE, "segment -i ct.nii.gz -o link.nii --picture picture.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("overwrite", ["", " --overwrite"], ids=["plain", "overwrite"])
def test_no_output_replaces_an_input_or_another_output(folder, monkeypatch, refusal, call, overwrite):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("gvsl_zoo.zoo.load", lambda *_, **__: pytest.fail("the model was loaded"))
    for name in ("other.nii.gz", "t.nii.gz", "t.tfm", "vector.npz"):
        Path(name).write_bytes(b"precious")
    Path("points.csv").write_text("x,y,z\n0,0,0\n")
    Path("link.nii").symlink_to("picture.png")  # which is not there yet
    before = {path: path.read_bytes() for path in folder.iterdir() if path.exists()}
    refused(*refusal, *(call + overwrite).split())
    assert {path: path.read_bytes() for path in folder.iterdir() if path.exists()} == before


@pytest.mark.parametrize("command", ["features", "segment"])
def test_a_picture_is_a_png(folder, command):
    call = ("-i", folder / "ct.nii.gz", "-o", folder / "out.nii.gz", "--picture", folder / "picture.jpg")
    refused(2, "the output 'picture.jpg' has no ending for this; end it in .png", command, *call)
    assert names_in(folder) == ["ct.nii.gz", "mask.nii.gz"]


@pytest.mark.parametrize(
    "call",
    [
        "features -i ct.nii.gz -o out.nii.gz --picture picture.PNG",
        "segment -i ct.nii.gz -o out.nii.gz --support ct.nii.gz mask.nii.gz --picture picture.png",
        "register --fixed ct.nii.gz --moving ct.nii.gz --warped-out out.nii.gz --picture picture.png",
    ],
)
def test_a_picture_without_matplotlib_is_refused_before_the_work(folder, monkeypatch, call):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("gvsl_zoo.zoo.load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr("gvsl_zoo.errors.find_spec", lambda name: None if name == "matplotlib" else object())
    refused(1, 'a picture needs matplotlib; pip install "gvsl-zoo[viz]"', *call.split())
    assert names_in(folder) == ["ct.nii.gz", "mask.nii.gz"]


def test_a_folder_that_may_not_be_written_to_is_refused_before_the_work(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("gvsl_zoo.zoo.load", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # to root nothing is read-only
    call = "correspond --fixed ct.nii.gz --moving ct.nii.gz --point 0,0,0 -o matches.csv"
    refused(1, "may not be written to; choose another folder", *call.split())


def test_the_folder_of_heat_maps_is_made_when_the_model_is_there(folder, monkeypatch):
    monkeypatch.chdir(folder)
    call = "correspond --fixed ct.nii.gz --moving ct.nii.gz --point 0,0,0 --device cpu --heat"
    refused(1, "unknown model", *f"{call} heat --model nothing".split())
    assert not Path("heat").exists()
    refused(1, "mask.nii.gz: File exists; check the path, permissions", *f"{call} mask.nii.gz".split())


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "no such file"),
        (b"", "cannot read"),
        (b"<!DOCTYPE html><html>Sign in</html>", "cannot read"),
        (pickle.dumps([1.0] * 200), "cannot read"),
    ],
    ids=["missing", "empty", "html", "pickle"],
)
def test_a_scan_that_is_none_is_refused(folder, content, text):
    scan = folder / "bad.nii.gz"
    if content is not None:
        scan.write_bytes(content)
    refused(1, text, "features", "-i", scan, "-o", folder / "out.nii.gz")
    assert not (folder / "out.nii.gz").exists()


def test_a_film_is_refused(folder):
    nib.save(nib.Nifti1Image(np.zeros((20, 20), np.int16), np.eye(4)), folder / "film.nii.gz")
    refused(1, "a 2-D image of shape (20, 20)", "features", "-i", folder / "film.nii.gz", "-o", folder / "out.nii.gz")


@pytest.mark.parametrize(
    ("code", "text", "args"),
    [
        (1, "does not exist; make it first", ["-o", "none/out.nii.gz"]),
        (2, "end it in .npz or .json", ["-o", "out.nii.gz", "--pool"]),
        (2, "--mask goes with --pool", ["-o", "out.nii.gz", "--mask", "mask.nii.gz"]),
        (2, "--picture without it", ["-o", "out.npz", "--pool", "--picture", "out.png"]),
        (2, "unknown device 'gpu'; use auto, cpu", ["-o", "out.nii.gz", "--device", "gpu"]),
        (1, "did you mean", ["-o", "out.nii.gz", "--model", DEFAULT_MODEL + "o"]),
        (1, f"the nearest is '{DEFAULT_MODEL}' (available)", ["-o", "out.nii.gz", "--model", "gvsl-unet-ct"]),
        (1, "cannot be read", ["-o", "out.nii.gz", "--model", "./nothing"]),
        (1, "no such file", ["-o", "out.npz", "--pool", "--mask", "none.nii.gz"]),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_a_call_that_cannot_succeed_says_why_in_a_line(folder, monkeypatch, code, text, args):
    monkeypatch.chdir(folder)
    before = names_in(folder)
    refused(code, text, "features", "-i", "ct.nii.gz", *args)
    assert names_in(folder) == before


@pytest.mark.parametrize("args", [["-o", "out.txt"], ["-o", "out.nii.gz", "--pool"]], ids=" ".join)
def test_a_wrong_output_name_is_refused_before_the_work(folder, monkeypatch, args):
    monkeypatch.chdir(folder)
    monkeypatch.setattr("gvsl_zoo.zoo.load", lambda *_, **__: pytest.fail("the model was loaded"))
    result = run("features", "-i", "ct.nii.gz", *args)
    assert result.exit_code in (1, 2) and result.stderr.startswith("error: ") and "out." in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["list", "--nonsense"],
        ["list", "--ndim", "4"],
        ["info"],
        ["features"],
        ["features", "-i", "x.nii.gz"],
        ["features", "-i", "x.nii.gz", "-o", "y.nii.gz", "--grid", "moon"],
        ["list", "--modality", "PET"],
        ["list", "--task", "detection"],
    ],
    ids=" ".join,
)
def test_a_wrong_call_ends_with_2(args):
    result = run(*args)
    assert result.exit_code == 2 and "rror: " in result.stderr and "Traceback" not in result.stderr


def test_an_unknown_model_ends_with_1_and_a_near_name():
    refused(1, "did you mean 'gvsl-unet-ct'", "info", "gvsl-unet-tc")


def test_an_unforeseen_error_is_one_line_that_names_debug(monkeypatch):
    def fail(name):
        raise ZeroDivisionError("boom")

    monkeypatch.setattr("gvsl_zoo.registry.model_info", fail)
    refused(1, "unexpected ZeroDivisionError: boom; --debug shows where", "info", DEFAULT_MODEL)
    assert isinstance(run("--debug", "info", DEFAULT_MODEL).exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/data/out"),
            "/data/out: Permission denied; check the path",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "error: No space left on device; check the path"),
        (MemoryError(), "not enough memory; crop the scan"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB"), "not enough memory; crop the scan"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
            "not enough memory; crop the scan",
        ),
        (RuntimeError("shapes differ"), "unexpected RuntimeError: shapes differ; --debug shows where"),
        (OSError("odd"), "unexpected OSError: odd; --debug shows where"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_files_and_of_memory_say_what_to_do(monkeypatch, error, text):
    def fail(name):
        raise error

    monkeypatch.setattr("gvsl_zoo.registry.model_info", fail)
    refused(1, text, "info", DEFAULT_MODEL)


def test_a_pair_is_a_change_and_more_numbers_are_sizes(capsys):
    show({"ncc": (0.25, 0.5), "spacing_mm": (4.0, 4.0, 2.5)}, False)
    assert capsys.readouterr().out.split("\n")[:2] == ["ncc         0.25 -> 0.5", "spacing_mm  4 x 4 x 2.5"]


# --- help, version, processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *sorted(main.commands)])
def test_help_says_in_a_sentence_what_a_command_does(name):
    command = main if name is None else main.commands[name]
    text = done(*[name] * (name is not None), "--help")
    assert command.help and command.help.strip().endswith(".") and command.help.split()[0] in text
    assert text == done(*[name] * (name is not None), "-h")
    for parameter in command.params:
        if parameter.param_type_name == "option" and name is not None:
            assert parameter.opts[-1] in text
            assert parameter.help or parameter.type.name == "choice", parameter.name


def process(*args, **settings):
    return subprocess.run([sys.executable, "-m", "gvsl_zoo", *args], capture_output=True, text=True, **settings)


def test_the_version_is_the_packages():
    assert process("--version").stdout.split() == ["gvsl-zoo,", "version", __version__]
    assert process("--version", check=True).stderr == ""


def test_a_process_ends_with_the_same_codes_and_a_traceback_only_on_request(tmp_path):
    assert process("list", "--json").returncode == 0
    plain, debug = process("info", "nothing"), process("--debug", "info", "nothing")
    assert (plain.returncode, debug.returncode, process("info").returncode) == (1, 1, 2)
    assert plain.stderr.startswith("error: unknown model 'nothing'") and plain.stderr.count("\n") == 1
    assert "Traceback" in debug.stderr and "RegistryError" in debug.stderr


def test_a_reader_that_closes_the_pipe_gets_no_complaint():
    command = f"{shlex.quote(sys.executable)} -m gvsl_zoo list --json | true"
    assert "unexpected" not in subprocess.run(command, shell=True, capture_output=True, text=True).stderr


@pytest.mark.slow
def test_facts_go_to_one_stream_and_notices_to_the_other(folder):
    scan, out = folder / "mr.nii.gz", folder / "out.nii.gz"
    nib.save(nib.Nifti1Image(np.arange(24**3, dtype=np.int16).reshape(24, 24, 24) % 500, np.eye(4) * 4), scan)
    result = process("features", "-i", str(scan), "-o", str(out), "--json", check=True)
    assert json.loads(result.stdout)["output"] == str(out)
    assert all(line.startswith("warning: ") for line in result.stderr.splitlines()), result.stderr


@pytest.mark.slow
def test_the_demo_leaves_a_picture_and_numbers(tmp_path):
    facts = json.loads(done("demo", "-o", tmp_path / "demo", "--json"))
    assert names_in(tmp_path / "demo") == ["demo.png", "features.nii.gz", "input.nii.gz"]
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(PNG)
    assert facts["picture"] == str(tmp_path / "demo" / "demo.png")
    scan, features = nib.load(facts["input"]), nib.load(facts["features"])
    assert features.shape[3] == facts["feature_channels"] and len(scan.shape) == 3
    numbers = [facts[n] for n in ("psnr_damaged_db", "psnr_restored_db", "ncc_before", "ncc_after", "displacement_mm")]
    assert np.isfinite(numbers).all() and 0 <= facts["folded"] <= 1


def test_the_demo_refuses_a_folder_that_is_a_file(tmp_path):
    (tmp_path / "demo").write_bytes(b"")
    refused(1, "cannot make the folder", "demo", "-o", tmp_path / "demo", "--json")


# --- weights: download, convert, export, import, push, verify, doctor, cache -----------------------------------

REPO = "org/model"
THEIRS = """\
schema_version: 1
models:
  theirs:
    summary: a narrow U-Net, as its authors would share it
    status: upstream
    instead: gvsl-unet-ct-nano
    architecture: unet
    config: {ndim: 3, width: 8}
    ndim: 3
    modality: CT
    objective: gvsl
    parameters: 1471080
    input: {axes: zyx, intensity: {unit: HU, window: [-1024, 1024], scale: [0, 1]}}
    sources: [{kind: gdrive, id: 1234567890abc, file: theirs.pth, bytes: 100000000, pinned: false}]
    licence: {code: none stated, weights: ask them, data: none stated}
    citation: nobody 2026
"""


class Evil:
    """What does something when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback, for which there is a token to write."""
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield hub


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A checkpoint of "theirs", a model's folder, a bundle, and files that are none of them."""
    folder = tmp_path_factory.mktemp("prepared")
    for name, width in (("theirs.pth", 8), ("wide.pth", 16)):
        torch.save(UNet(width=width, generator=torch.Generator().manual_seed(0)).state_dict(), folder / name)
    save_pretrained(load(DEFAULT_MODEL), folder / "saved")
    sources.export_bundle(DEFAULT_MODEL, folder / "bundle.safetensors")
    for name in ("page.pth", "page.safetensors"):
        (folder / name).write_text("<!DOCTYPE html><html>Sign in</html>")
    (folder / "pickle.pth").write_bytes(pickle.dumps(Evil("canary")))
    torch.save({"state_dict": {"a": Evil("canary")}}, folder / "evil.pth")
    (folder / "there.safetensors").write_bytes(b"precious")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def files(prepared, tmp_path, monkeypatch):
    """A working folder with what is prepared; "theirs" is in the registry."""
    folder = tmp_path / "files"
    shutil.copytree(prepared, folder, copy_function=os.link)
    monkeypatch.chdir(folder)
    (tmp_path / "theirs.yaml").write_text(THEIRS)
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(tmp_path / "theirs.yaml"))
    yield folder
    assert not (folder / "canary").exists() and (folder / "there.safetensors").read_bytes() == b"precious"


def facts_of(*args):
    """The facts that a command prints as JSON."""
    facts = json.loads(done(*args, "--json"))
    assert isinstance(facts, dict) and facts
    return facts


def sha256_of(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_download_says_where_a_model_lies(files):
    [source] = model_info(DEFAULT_MODEL).sources
    facts = facts_of("download", DEFAULT_MODEL)
    assert facts["sha256"] == sha256_of(facts["file"]) == source.sha256
    assert facts["bytes"] == Path(facts["file"]).stat().st_size and facts["model"] == DEFAULT_MODEL
    text = done("download", DEFAULT_MODEL)
    assert [line.split(maxsplit=1)[0] for line in text.splitlines()] == ["model", "file", "bytes", "sha256"]
    assert all(str(value) in text for value in facts.values())


@pytest.mark.parametrize("own", [False, True], ids=["HF_HOME", "cache_dir"])
def test_download_brings_a_repository_of_the_hub_into_the_cache(own, files, hub, tmp_path):
    old = hub.add(REPO, {"model.safetensors": (files / "saved/model.safetensors").read_bytes()})
    hub.add(REPO, {"model.safetensors": (files / "bundle.safetensors").read_bytes()})
    given = ["--cache-dir", tmp_path / "own"] if own else []
    new_facts = facts_of("download", f"hf-hub:{REPO}", *given)
    facts = facts_of("download", f"hf-hub:{REPO}", "--revision", old, *given)
    assert sha256_of(facts["file"]) == facts["sha256"] == sha256_of("saved/model.safetensors")
    assert sha256_of(new_facts["file"]) == new_facts["sha256"] == sha256_of("bundle.safetensors")
    assert Path(facts["file"]).is_relative_to(tmp_path / ("own" if own else "cache"))


def test_download_of_the_authors_file_converts_it_and_tells_its_terms(files, monkeypatch):
    server = drive_server.DriveServer()
    server.answers = [drive_server.file((files / "theirs.pth").read_bytes())]
    monkeypatch.setattr(drive, "ORIGIN", server.url())
    try:
        result = run("download", "theirs", "--json")
        assert result.exit_code == 0, result.output
        assert sha256_of(json.loads(result.stdout)["file"]) == json.loads(result.stdout)["sha256"]
        assert "warning: " in result.stderr and "ask them" in result.stderr and "nobody 2026" in result.stderr
        assert load("theirs").load_report.origin == json.loads(result.stdout)["file"]
        again = run("download", "theirs", "--json")
        assert (again.stdout, "ask them" in again.stderr, len(server.log)) == (result.stdout, False, 1)
    finally:
        server.close()


def test_download_takes_a_file_that_was_brought_by_hand(files):
    facts = facts_of("download", "theirs", "--from-file", "theirs.pth")
    assert load("theirs").load_report.sha256 == facts["sha256"] == sha256_of(facts["file"])
    assert (files / "theirs.pth").is_file()
    [source] = model_info(DEFAULT_MODEL).sources
    facts = facts_of("download", DEFAULT_MODEL, "--from-file", sources.EMBEDDED / source.file)
    assert facts["file"].endswith(f"weights/{source.sha256}.safetensors")


def test_convert_tells_what_it_found_and_its_file_loads(files):
    facts = facts_of("convert", "theirs.pth", "new.safetensors")
    assert (facts["architecture"], facts["ndim"], facts["width"], facts["heads"]) == ("unet", 3, 8, [])
    assert facts["sha256"] == sha256_of("new.safetensors") and facts["source_sha256"] == sha256_of("theirs.pth")
    assert load("./new.safetensors").load_report.loaded == facts["tensors"]
    text = done("convert", "theirs.pth", "new.safetensors", "--name", "theirs", "--overwrite")
    assert "architecture" in text and sha256_of("new.safetensors") in text
    assert load("./new.safetensors").entry.citation == "nobody 2026"


def test_a_bundle_carries_a_model_to_another_machine(files, tmp_path, monkeypatch):
    done("download", "theirs", "--from-file", "theirs.pth")
    facts = facts_of("export", "theirs", "-o", "theirs.safetensors")
    assert facts == {"model": "theirs", "output": "theirs.safetensors", "bytes": Path(facts["output"]).stat().st_size}
    there = load("theirs").state_dict()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "machine"))
    refused(1, "theirs could not be had", "download", "theirs")
    facts = facts_of("import", "theirs.safetensors")
    assert list(facts) == ["theirs"] and sha256_of(facts["theirs"]["file"]) == facts["theirs"]["sha256"]
    here = load("theirs", local_files_only=True).state_dict()
    assert all(torch.equal(here[name], there[name]) for name in there)


def test_a_folder_of_bundles_is_exported_and_imported_whole(files, tmp_path, monkeypatch):
    done("download", "theirs", "--from-file", "theirs.pth")
    Path("mirror").mkdir()
    for name in ("theirs", DEFAULT_MODEL):
        assert f"mirror/{name}.safetensors" in done("export", name, "-o", "mirror")
    assert names_in(files / "mirror") == [f"{DEFAULT_MODEL}.safetensors", "theirs.safetensors"]
    monkeypatch.setenv("HF_HOME", str(tmp_path / "machine"))
    text = done("import", "mirror")
    assert "theirs" in text and DEFAULT_MODEL in text and "sha256" in text
    assert sorted(facts_of("import", "mirror")) == sorted([DEFAULT_MODEL, "theirs"])
    done("export", DEFAULT_MODEL, "-o", "mirror", "--overwrite")


def test_an_import_that_fails_halfway_is_no_success(files):
    Path("mixed").mkdir()
    (files / "bundle.safetensors").rename("mixed/a.safetensors")
    (files / "page.safetensors").rename("mixed/b.safetensors")
    refused(1, "b.safetensors is not a weights file: it looks like a web page", "import", "mixed", "--json")


def test_push_tells_the_source_for_a_registry_and_the_facts(files, hub):
    Path("saved/README.md").write_text("by hand")
    facts = facts_of("push", "./saved", REPO, "--message", "first", "--private")
    content = hub.files(REPO)["model.safetensors"]
    commit = hub.repos[REPO].branches["main"]
    assert facts == {
        "repo": REPO,
        "revision": commit,
        "sha256": hashlib.sha256(content).hexdigest(),
        "bytes": len(content),
    }
    assert hub.repos[REPO].private and hub.files(REPO)["README.md"] == b"by hand"
    text = done("push", "./saved", REPO, "--branch", "next")
    first, _, lines = text.partition("\n")
    assert first.startswith(f"pushed to {REPO}; ") and set(hub.repos[REPO].branches) == {"main", "next"}
    [source] = yaml.safe_load(lines)
    assert source["kind"] == "hub" and source["revision"] == hub.repos[REPO].branches["next"]


def test_push_keeps_every_head_and_the_stored_numbers(files, hub):
    done("push", DEFAULT_MODEL, REPO)
    model = load(f"hf-hub:{REPO}", task="pretraining")
    assert model.load_report.stored_dtype == load(DEFAULT_MODEL).load_report.stored_dtype == "float16"
    assert model.entry.evaluation == model_info(DEFAULT_MODEL).evaluation != ()


def test_a_push_that_the_hub_does_not_take_ends_with_1(files, hub):
    hub.fault = hub_server.status(500, on=hub_server.at("/commit/"))
    result = run("push", "./saved", REPO, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("error: the Hub answered 500; push again")
    assert list(hub.files(REPO)) == [".gitattributes"]


def test_verify_passes_a_model_and_a_path(files):
    for name in (DEFAULT_MODEL, "./saved", "bundle.safetensors"):
        assert done("verify", name).startswith(f"PASS  {name} (")
    checks = json.loads(done("verify", DEFAULT_MODEL, "./saved", "--json"))
    assert [(check["verdict"], check["fix"]) for check in checks] == [("PASS", "")] * 2
    assert set(checks[0]) == {"what", "verdict", "seen", "fix"}


def test_verify_all_looks_at_what_is_here(files):
    ours = [f"{name} ({model_info(name).sources[0].kind})" for name in list_models(available=True)]
    assert len(done("verify", "--all").splitlines()) == len(ours)
    done("download", "theirs", "--from-file", "theirs.pth")
    whats = [check["what"] for check in json.loads(done("verify", "--all", "--json"))]
    assert whats == [*ours, "theirs (Google Drive)"]


@pytest.mark.parametrize("name", ["theirs", "./nothing.safetensors", "page.safetensors", "gvsl-xmorpher-ct"])
def test_verify_ends_with_1_unless_all_is_well_and_says_what_to_do(name, files):
    result = run("verify", DEFAULT_MODEL, name)
    lines = result.stdout.splitlines()
    assert (result.exit_code, len(lines), result.stderr) == (1, 3, ""), result.output
    assert lines[0].startswith("PASS") and lines[1][:4] in ("WARN", "FAIL") and lines[2].startswith("      -> ")
    result = run("verify", name, "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)[0]["fix"] in lines[2]


def test_a_damaged_copy_fails_verify_until_it_is_removed(files):
    path = Path(facts_of("import", "bundle.safetensors")[DEFAULT_MODEL]["file"])
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run("verify", "--all").exit_code == run("verify", DEFAULT_MODEL).exit_code == 1
    done("cache", "remove", DEFAULT_MODEL)
    assert done("verify", "--all").startswith("PASS")


def test_doctor_ends_with_0_where_nothing_fails(files, hub, monkeypatch):
    monkeypatch.setattr(drive, "ORIGIN", hub.endpoint)
    checks = json.loads(done("doctor", "--json"))
    assert {"gvsl-zoo", "packages", "device", "registry", "cache", "the Hub"} <= {check["what"] for check in checks}
    lines = done("doctor").splitlines()
    assert [line[:4] for line in lines] == ["PASS"] * len(checks)
    hub.stop()  # without network much still works: a warning
    text = done("doctor")
    assert "WARN  the Hub: " in text and "\n      -> without network, use cached models or bundles" in text


@pytest.mark.parametrize("what", ["registry", "cache"])
def test_doctor_ends_with_1_where_something_fails(what, files, tmp_path, monkeypatch):
    name = {"registry": "GVSL_ZOO_REGISTRY", "cache": "HF_HOME"}[what]
    monkeypatch.setenv(name, str(files / "page.pth" / "below"))
    result = run("doctor")
    assert result.exit_code == 1 and f"FAIL  {what}: " in result.stdout and result.stderr == ""
    result = run("doctor", "--json")
    assert result.exit_code == 1 and [c["what"] for c in json.loads(result.stdout) if c["verdict"] == "FAIL"] == [what]


def test_the_cache_is_listed_and_cleared(files, hub):
    assert json.loads(done("cache", "list", "--json")) == {"models": [], "bytes": 0}
    assert done("cache", "list").split() == ["0.0", "MB", "in", "all"]
    done("import", "bundle.safetensors")
    done("download", "theirs", "--from-file", "theirs.pth")
    done("push", "./saved", REPO)
    done("download", f"hf-hub:{REPO}")
    facts = json.loads(done("cache", "list", "--json"))
    on_hub = f"hf-hub:{REPO}@{hub.repos[REPO].branches['main']}"
    assert [(m["name"], m["kind"]) for m in facts["models"]] == [
        (DEFAULT_MODEL, "imported"),
        ("theirs", "upstream"),
        (on_hub, "hub"),
    ]
    assert facts["bytes"] == sum(model["bytes"] for model in facts["models"]) > 0
    assert all(Path(model["path"]).exists() for model in facts["models"])
    lines = done("cache", "list").splitlines()
    assert [line.split()[-1] for line in lines] == [DEFAULT_MODEL, "theirs", on_hub, "all"]
    assert lines[0].split()[:3] == [f"{facts['models'][0]['bytes'] / 1e6:.1f}", "MB", "imported"]
    removed = json.loads(done("cache", "remove", "theirs", "--json"))
    assert removed == {"models": [facts["models"][1]], "bytes": facts["models"][1]["bytes"]}
    assert on_hub in done("cache", "remove", f"hf-hub:{REPO}")
    assert [m["name"] for m in json.loads(done("cache", "list", "--json"))["models"]] == [DEFAULT_MODEL]


def test_a_cache_of_ones_own_is_another_cache(files, tmp_path):
    own = ["--cache-dir", tmp_path / "own"]
    done("import", "bundle.safetensors", *own)
    assert json.loads(done("cache", "list", "--json"))["models"] == []
    [model] = json.loads(done("cache", "list", "--json", *own))["models"]
    assert Path(model["path"]).is_relative_to(tmp_path / "own")
    assert "(cache)" in done("verify", DEFAULT_MODEL, *own) and "(cache)" not in done("verify", DEFAULT_MODEL)
    assert "(cache)" in done("doctor", *own)
    refused(2, "is not in the caches", "cache", "remove", DEFAULT_MODEL)
    done("cache", "remove", DEFAULT_MODEL, *own)


BAD = [
    (1, "did you mean 'theirs'", "download theirz"),
    (1, f"released none; the nearest is '{DEFAULT_MODEL}'", "download gvsl-xmorpher-ct"),
    (1, "theirs could not be had (Google Drive: ", "download theirs"),
    (2, "--revision with the registry's theirs", "download theirs --revision main"),
    (2, "--from-file with an hf-hub: name", "download hf-hub:org/model --from-file theirs.pth"),
    (2, "names no repository; write hf-hub:org/repo", "download hf-hub:model"),
    (1, "no/such does not exist, or is private", "download hf-hub:no/such"),
    (1, "nothing.pth cannot be read: No such file", "download theirs --from-file nothing.pth"),
    (1, "empty cannot be read: Is a directory", "download theirs --from-file empty"),
    (1, "page.pth is not a weights file: it looks like a web page", "download theirs --from-file page.pth"),
    (1, "pickle.pth is not a weights file: it looks like a pickle", "download theirs --from-file pickle.pth"),
    (1, "evil.pth ", "download theirs --from-file evil.pth"),
    (1, "wide.pth has width 16, theirs has 8", "download theirs --from-file wide.pth"),
    (1, "theirs is a checkpoint of its authors (.pth)", "download theirs --from-file saved/model.safetensors"),
    (2, "has no checkpoint of its authors", f"download {DEFAULT_MODEL} --from-file theirs.pth"),
    (1, "saved/model.safetensors has sha256 ", f"download {DEFAULT_MODEL} --from-file saved/model.safetensors"),
    (1, "nothing.pth cannot be read: No such file", "convert nothing.pth new.safetensors"),
    (1, "empty", "convert empty new.safetensors"),
    (1, "page.pth ", "convert page.pth new.safetensors"),
    (1, "pickle.pth ", "convert pickle.pth new.safetensors"),
    (1, "evil.pth ", "convert evil.pth new.safetensors"),
    (1, "which exists already", "convert theirs.pth there.safetensors"),
    (1, "a name that does not end in .safetensors", "convert theirs.pth new.pth"),
    (1, "in a folder that does not exist", "convert theirs.pth none/new.safetensors"),
    (1, "has width 16, theirs has 8", "convert wide.pth new.safetensors --name theirs"),
    (1, "did you mean 'theirs'", "convert theirs.pth new.safetensors --name theirz"),
    (
        1,
        "cannot be gvsl-unet-xray, of which no weights exist",
        "convert theirs.pth new.safetensors --name gvsl-unet-xray",
    ),
    (1, "did you mean 'theirs'", "export theirz -o new.safetensors"),
    (1, "is planned: ", "export gvsl-xmorpher-ct -o new.safetensors"),
    (1, "theirs could not be had (Google Drive: ", "export theirs -o new.safetensors"),
    (1, "the folder nowhere does not exist; make it first", f"export {DEFAULT_MODEL} -o nowhere/net.onnx"),
    (1, "there.safetensors exists already; choose another name, or", f"export {DEFAULT_MODEL} -o there.safetensors"),
    (1, "the folder none does not exist", f"export {DEFAULT_MODEL} -o none/new.safetensors"),
    (2, "is no folder and does not end in .safetensors", f"export {DEFAULT_MODEL} -o new.bin"),
    (1, "nothing cannot be read: No such file", "import nothing"),
    (2, "empty holds no bundle; give a folder of", "import empty"),
    (1, "it looks like a web page", "import page.safetensors"),
    (1, "it looks like a pickle", "import pickle.pth"),
    (1, "it looks like a PyTorch .pth", "import evil.pth"),
    (1, "saved/model.safetensors is no bundle; make one with", "import saved/model.safetensors"),
    (1, "did you mean 'theirs'", "push theirz org/model"),
    (1, "is planned: ", "push gvsl-xmorpher-ct org/model"),
    (2, "theirs is its authors' and not for us to publish (ask them)", "push theirs org/model"),
    (2, "'model' names no repository; write", "push ./saved model"),
    (2, "'../x' is no revision", "push ./saved org/model --branch ../x"),
    (1, "nothing/model.safetensors", "push ./nothing/model.safetensors org/model"),
    (1, "it looks like a web page", "push page.safetensors org/model"),
    (1, "there is no token on this machine; log in (hf auth login", "push ./saved org/model"),
    (2, "verify needs names, or --all", "verify"),
    (2, "verify needs names, or --all", "verify --all theirs"),
    (1, "did you mean 'theirs'", "verify theirz"),
    (2, "'nothing' is not in the caches; they hold nothing", "cache remove nothing"),
]


@pytest.mark.parametrize(("code", "text", "call"), BAD, ids=[call for *_, call in BAD])
def test_a_bad_weights_call_fails_with_one_line_and_leaves_no_file(code, text, call, files, hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    before = names_in(files)
    refused(code, text, *call.split())
    refused(code, text, *call.split(), "--json")
    assert names_in(files) == before and list(hub.repos) == []
    assert not list((files.parent / "cache").rglob("*.partial"))


LACKING = [
    "download",
    "convert",
    "convert a.pth",
    "export",
    f"export {DEFAULT_MODEL}",
    "import",
    "push",
    "push ./saved",
]
LACKING += ["cache", "cache remove", "cache nonsense", "doctor nonsense", "verify --nonsense", "download --nonsense x"]


@pytest.mark.parametrize("call", LACKING)
def test_a_weights_call_that_lacks_something_ends_with_2(call):
    result = run(*call.split())
    assert result.exit_code == 2 and "Traceback" not in result.output


@pytest.mark.parametrize("name", sorted(main.commands["cache"].commands))
def test_help_says_what_a_command_of_the_cache_does(name):
    command = main.commands["cache"].commands[name]
    text = done("cache", name, "--help")
    assert command.help.strip().endswith(".") and command.help.split()[0] in text
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.opts[-1] in text and parameter.help


def test_an_output_that_exists_is_replaced_when_told(files):
    for call in (["convert", "theirs.pth", "old.safetensors"], ["export", DEFAULT_MODEL, "-o", "old.safetensors"]):
        Path("old.safetensors").write_bytes(b"old")
        done(*call, "--overwrite")
        assert Path("old.safetensors").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("convert page.pth new.safetensors", WeightsError),
        ("download theirz", RegistryError),
        ("export theirs -o new.safetensors", SourceError),
        ("import empty", ArgumentError),
    ],
)
def test_debug_gives_the_error_itself(call, error, files):
    assert isinstance(run("--debug", *call.split()).exception, error)


@pytest.mark.slow
def test_processes_of_weights_commands_speak_json_on_one_stream_and_trace_only_on_request(files):
    plain = process("convert", "theirs.pth", "new.safetensors", "--json", check=True)
    assert json.loads(plain.stdout)["sha256"] == sha256_of("new.safetensors") and plain.stderr == ""
    debug = process("--debug", "convert", "evil.pth", "other.safetensors")
    assert (debug.returncode, debug.stdout) == (1, "")
    assert "Traceback" in debug.stderr and "WeightsError" in debug.stderr


def test_no_command_says_a_token(files, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    for call in ("push ./saved org/model", "download hf-hub:org/model", "doctor", "--debug push ./saved org/model"):
        result = run(*call.split())
        assert "hf_secret" not in result.output + str(result.exception)


def test_facts_without_content_are_shown(capsys):
    show({"files": {}, "steps": 3}, False)
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [["files"], ["steps", "3"]]
