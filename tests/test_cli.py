"""Tests of the command line: what it writes, what it says, one line an error, exit codes 0, 1 and 2."""

from __future__ import annotations

import json
import pickle
import shlex
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from gvsl_zoo import __version__, list_models, load, model_info, pooled_features, registry
from gvsl_zoo.cli import DEFAULT_MODEL, main

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
    call = ["-i", folder / "ct.nii.gz", "-o", folder / "x.nii.gz", "--picture", folder / "ct.nii.gz", *overwrite]
    refused(1, "it is the input itself", "features", *call)
    assert (folder / "ct.nii.gz").read_bytes() == before


def test_the_picture_does_not_replace_the_features(folder):
    out = folder / "out.nii.gz"
    refused(2, "out.nii.gz", "features", "-i", folder / "ct.nii.gz", "-o", out, "--picture", out)
    assert not out.exists()


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
        (2, "end the name in .npz or .json", ["-o", "out.nii.gz", "--pool"]),
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
