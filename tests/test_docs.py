"""The pages are right: their Python and commands run, in order; weights.md against a Hub and a Drive on loopback."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from drive_server import DriveServer, confirm_page, file
from hub_server import Hub

from gvsl_zoo import convention, drive, load, read_volume, registry, write_volume
from gvsl_zoo.cli import main
from gvsl_zoo.demo import as_volume
from gvsl_zoo.film import read_film
from gvsl_zoo.pretrain.anatomy import LABELS, sample_film, sample_subject
from gvsl_zoo.pretrain.config import PRESETS, Objective, PretrainConfig

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "weights.md").read_text()


def run_blocks(page, monkeypatch):
    """Run the blocks of a page in order; returns the names that its Python left, and the number of blocks."""
    names: dict = {}
    blocks = re.findall(r"```(python|sh)\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    for kind, block in blocks:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if kind == "python":
                exec(compile(block, page, "exec"), names)
            else:
                for line in filter(None, block.splitlines()):
                    run_line(line, monkeypatch)
    return names, len(blocks)


@pytest.fixture
def somewhere(tmp_path, monkeypatch, released):
    """A folder with what the page names: the authors' file on Drive and by hand, and a repository on the Hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    monkeypatch.setattr(registry, "_added", {})
    torch.save(released.unet.state_dict(), "checkpoint.pth")
    Path("GVSL3D-UNet.pth").symlink_to("checkpoint.pth")
    write_volume(as_volume(sample_subject((40, 36, 44), torch.Generator().manual_seed(0), (8.0,) * 3)), "scan.nii.gz")
    monkeypatch.setattr(convention, "EDGE", 16)  # the rankings are not looked at
    server = DriveServer()
    server.answers = [confirm_page("/download"), file(Path("checkpoint.pth").read_bytes())]
    monkeypatch.setattr(drive, "ORIGIN", server.url())
    monkeypatch.setattr(drive, "HOSTS", ("127.0.0.1",))
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.add("org/my-model", {"model.safetensors": embedded().read_bytes()})
        yield hub
    server.close()


def embedded():
    from gvsl_zoo.sources import EMBEDDED

    return EMBEDDED / "gvsl-unet-ct-nano.safetensors"


def run_nnunet(words):
    """A command of nnU-Net in a process of its own, on the CPU, for three iterations and without helpers."""
    words += ["-device", "cpu"] * (words[0] in ("nnUNetv2_train", "nnUNetv2_predict"))
    words += ["-npp", "1", "-nps", "1"] * (words[0] == "nnUNetv2_predict")
    helpers = {"nnUNet_def_n_proc": "1"} | ({"nnUNet_n_proc_DA": "0"} if words[0] == "nnUNetv2_train" else {})
    run = [sys.executable, Path(__file__).with_name("brief_nnunet.py"), *words]
    done = subprocess.run(run, env=os.environ | helpers, capture_output=True, text=True)
    assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-4000:])


def run_line(line, monkeypatch):
    """A line of a shell block; the page uses three commands."""
    words = shlex.split(line, comments=True)
    if words[0] == "mkdir":
        Path(words[-1]).mkdir(exist_ok=True)
    elif words[0] == "export":
        monkeypatch.setenv(*words[1].split("="))
    elif words[0].startswith("nnUNetv2_"):
        run_nnunet(words)
    else:
        assert words[0] == "gvsl-zoo", line
        result = CliRunner().invoke(main, words[1:])
        healthy = 0 if words[1] != "doctor" else result.exit_code  # its exit code speaks of the machine
        assert result.exit_code == healthy and "unexpected" not in result.output, (line, result.output)


@pytest.mark.slow
def test_every_block_of_the_page_on_weights_runs_in_order(somewhere, monkeypatch):
    names, blocks = run_blocks("weights.md", monkeypatch)
    assert blocks >= 9
    assert names["report"].revision in somewhere.repos["org/my-model"].commits
    assert names["again"].load_report.loaded == names["net"].load_report.loaded - 32
    assert Path("bundle.safetensors").is_file() and Path("gvsl-unet-ct.safetensors").is_file()


def test_the_page_names_every_command_that_handles_weights():
    handling = {"download", "convert", "export", "import", "push", "verify", "doctor", "cache"}
    assert {command for command in handling if f"gvsl-zoo {command}" in PAGE} == handling


@pytest.mark.slow
def test_every_block_of_the_page_on_pretraining_runs_in_order(tmp_path, monkeypatch):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    Path("scans").mkdir()
    for seed, name in enumerate("abc"):
        subject = sample_subject((40, 40, 48), torch.Generator().manual_seed(seed), (6.0, 6.0, 6.0))
        write_volume(as_volume(subject), f"scans/{name}.nii.gz")
    table = re.search(r"```text\n(path,.*?)```", (DOCS / "pretrain.md").read_text(), re.DOTALL)
    Path("subjects.csv").write_text(table[1])
    names, blocks = run_blocks("pretrain.md", monkeypatch)
    assert blocks == 4 and names["net"].entry.name == "gvsl-try"
    assert Path("try/curves.png").is_file() and Path("store-by-region/index.npy").is_file()


@pytest.mark.slow
def test_every_block_of_the_page_on_reproducing_runs_in_order(tmp_path, monkeypatch, capsys):
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    write_volume(as_volume(sample_subject((20, 18, 22), torch.Generator().manual_seed(0), (9.0,) * 3)), "scan.nii.gz")
    recipe = re.search(r"```yaml\n(.*?)```", (DOCS / "reproduce.md").read_text(), re.DOTALL)
    Path("lab/recipes").mkdir(parents=True)
    Path("lab/recipes/gvsl-lab.yaml").write_text(recipe[1])
    names, blocks = run_blocks("reproduce.md", monkeypatch)
    assert blocks == 5 and names["known"].complete and capsys.readouterr().out.endswith("True ()\n")
    assert load("./again").entry.name == "gvsl-lab" and load("./again").entry.ledger.complete


@pytest.mark.slow
def test_every_block_of_the_page_on_finetuning_runs_in_order(tmp_path, monkeypatch):
    for package in ("accelerate", "monai"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    organs = {"background": 0, "liver": LABELS["liver"], "spine": LABELS["spine"]}
    for number, part in enumerate(("Tr", "Tr", "Tr", "Ts")):
        subject = sample_subject((28, 24, 32), torch.Generator().manual_seed(number), (9.0, 9.0, 9.0))
        scan, labels = as_volume(subject), subject.labels.permute(2, 1, 0).numpy()
        labels = labels * np.isin(labels, list(organs.values()))
        for kind, volume in (("images", scan), ("labels", replace(scan, data=labels))):
            path = Path(f"mine/{kind}{part}/case{number}{'_0000' * (kind == 'images')}.nii.gz")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_volume(volume, path)
    Path("mine/dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": organs}))
    put_films()
    rows = [f"{name}.png,{kind},{split}" for name, kind, split in FILM_ROWS]
    Path("films.csv").write_text("\n".join(["image,label,split", *rows]))
    names, blocks = run_blocks("finetune.md", monkeypatch)
    assert list(names["probabilities"]) == ["healthy", "ill"]
    assert json.loads(Path("film-scores/summary.json").read_text())["cases"] == 2
    assert set(np.unique(read_volume("from-one.nii.gz").data)) <= set(organs.values())
    assert blocks == 9 and [label.name for label in names["net"].entry.labels] == list(organs)
    summary = json.loads(Path("scores/summary.json").read_text())
    assert summary["cases"] == 1 and set(summary["labels"]) == {"liver", "spine"}
    assert json.loads(Path("verdict/results.json").read_text())["verdicts"]


@pytest.mark.slow
def test_every_block_of_the_page_on_monai_runs_in_order(tmp_path, monkeypatch):
    for package in ("monai", "ignite"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    for seed in range(2):
        subject = sample_subject((40, 36, 44), torch.Generator().manual_seed(seed), (5.0, 5.0, 5.0))
        scan, body = as_volume(subject), (subject.labels > 0).permute(2, 1, 0).numpy().astype(np.uint8)
        write_volume(scan, f"scan{seed}.nii.gz")
        write_volume(replace(scan, data=body), f"labels{seed}.nii.gz")
    names, blocks = run_blocks("monai.md", monkeypatch)
    assert blocks == 4 and names["trainer"].state.iteration == 1 and len(names["report"].placed) == 20
    predicted, scan = read_volume("out/scan0_seg.nii.gz"), read_volume("scan0.nii.gz")
    assert predicted.shape == scan.shape
    np.testing.assert_allclose(predicted.affine, scan.affine, atol=1e-4)


@pytest.mark.slow
def test_every_block_of_the_page_on_export_runs_in_order(tmp_path, monkeypatch):
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    subject = sample_subject((40, 36, 44), torch.Generator().manual_seed(0), (5.0, 5.0, 5.0))
    write_volume(as_volume(subject), "scan.nii.gz")
    names, blocks = run_blocks("export.md", monkeypatch)
    with torch.no_grad():
        expected = names["net"](names["net"].preprocess("scan.nii.gz"))
    assert blocks == 4
    np.testing.assert_allclose(names["features"], expected.numpy(), rtol=2e-5, atol=2e-5)


def test_the_presets_of_the_page_are_those_of_the_package():
    for name, preset in PRESETS.items():
        config = PretrainConfig(steps=1, **preset)
        row = f"| `{name}` | {config.width} | {config.crop[0]} | {config.spacing_mm:g} mm | {config.batch_size} |"
        assert row in (DOCS / "pretrain.md").read_text()


FILM_ROWS = (
    *(("a", "ill", "train"), ("b", "healthy", "train"), ("c", "ill", "train"), ("d", "healthy", "train")),
    *(("e", "ill", "test"), ("f0", "healthy", "test")),
)


def put_films():
    """Films with labels in the folder of the page."""
    fromarray = pytest.importorskip("PIL.Image", reason="needs gvsl-zoo[io]").fromarray
    for seed, name in enumerate(name for name, _, _ in FILM_ROWS):
        drawn = sample_film((96, 96), torch.Generator().manual_seed(seed), (4.0, 4.0))
        fromarray((255 * drawn.image).byte().numpy()).save(f"{name}.png")
        fromarray(drawn.masks[0].byte().numpy()).save(f"{name}_labels.png")


@pytest.mark.slow
def test_every_block_of_the_page_on_registration_runs_in_order(tmp_path, monkeypatch):
    pytest.importorskip("SimpleITK")
    monkeypatch.chdir(tmp_path)
    put_films()
    for seed, name in enumerate(("fixed", "moving")):
        subject = sample_subject((48, 48, 48), torch.Generator().manual_seed(seed), (6.0, 6.0, 6.0))
        scan = as_volume(subject)
        write_volume(scan, f"{name}.nii.gz")
        write_volume(replace(scan, data=subject.labels.permute(2, 1, 0).numpy()), f"{name}_labels.nii.gz")
    middle = scan.affine @ [*(n / 2 for n in scan.shape), 1]
    Path("landmarks.csv").write_text("x,y,z\n" + ",".join(map(str, middle[:3])) + "\n")
    names, blocks = run_blocks("register.md", monkeypatch)
    assert blocks == 7 and names["found"].report["ncc_after"] > names["found"].report["ncc_start"]
    b_on_a, ours = names["sitk"].GetArrayFromImage(names["b_on_a"])[0], read_film("b-on-a.png").data[:, :, 0].T
    assert np.abs(b_on_a - ours)[8:-8, 8:-8].mean() < 1.0 and Path("films.png").is_file()  # grey values of 255
    assert read_film("b-labels-on-a.png").data.max() == 1
    ours = read_volume("warped.nii.gz").data
    theirs = names["sitk"].GetArrayFromImage(names["warped"]).transpose(2, 1, 0)
    assert np.abs(ours - theirs)[4:-4, 4:-4, 4:-4].mean() < 1.0  # HU
    assert Path("registration.png").is_file() and np.unique(read_volume("by-atlas.nii.gz").data).size > 3


@pytest.mark.slow
def test_every_block_of_the_page_on_correspondence_runs_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("fixed", "moving")):
        subject = sample_subject((34, 30, 40), torch.Generator().manual_seed(seed), (6.0, 6.0, 6.0))
        write_volume(as_volume(subject), f"{name}.nii.gz")
    Path("landmarks.csv").write_text("name,x,y,z\ncarina,2,-10,30\n")
    put_films()
    names, blocks = run_blocks("correspond.md", monkeypatch)
    assert blocks == 3 and names["found"].confidence.shape == (2,) and names["heat"].shape == (40, 30, 34)
    assert Path("matches.csv").read_text().startswith("name,x,y,z,confidence\ncarina,")
    assert Path("heat/point-1.nii.gz").is_file()


def test_every_block_of_the_page_on_architectures_runs(monkeypatch):
    names, blocks = run_blocks("architectures.md", monkeypatch)
    alone, seeing = names["alone"], names["seeing"]
    assert blocks == 1 and alone.bottleneck.shape == seeing.bottleneck.shape == (1, 128, 2, 2, 2)
    assert alone.local.shape == seeing.local.shape == (1, 8, 37, 40, 33)
    assert not torch.allclose(alone.local, seeing.local, atol=1e-3)  # the other image was seen


def test_the_pictures_of_architectures_and_objectives_are_those_of_the_modules(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib")
    monkeypatch.syspath_prepend(str(DOCS.parent / "scripts"))
    import diagrams

    diagrams.main(tmp_path)
    drawn = sorted(tmp_path.iterdir())
    shown = set(
        re.findall(r"\((\w+\.svg)\)", (DOCS / "architectures.md").read_text() + (DOCS / "objectives.md").read_text())
    )
    assert {path.name for path in drawn} == shown
    for path in drawn:
        assert path.read_bytes() == (DOCS / path.name).read_bytes(), "run python scripts/diagrams.py"


def test_the_page_on_objectives_names_them_all():
    page = (DOCS / "objectives.md").read_text()
    assert [name for name in get_args(Objective) if name not in page.lower()] == []
