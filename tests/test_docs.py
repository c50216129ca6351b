"""The pages are right: their Python and commands run, in order; weights.md against a Hub and a Drive on loopback."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from drive_server import DriveServer, confirm_page, file
from hub_server import Hub

from gvsl_zoo import drive, registry, write_volume
from gvsl_zoo.cli import main
from gvsl_zoo.demo import as_volume
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.pretrain.config import PRESETS, PretrainConfig

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


def run_line(line, monkeypatch):
    """A line of a shell block; the page uses three commands."""
    words = shlex.split(line, comments=True)
    if words[0] == "mkdir":
        Path(words[-1]).mkdir(exist_ok=True)
    elif words[0] == "export":
        monkeypatch.setenv(*words[1].split("="))
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


def test_the_presets_of_the_page_are_those_of_the_package():
    for name, preset in PRESETS.items():
        config = PretrainConfig(steps=1, **preset)
        row = f"| `{name}` | {config.width} | {config.crop[0]} | {config.spacing_mm:g} mm | {config.batch_size} |"
        assert row in (DOCS / "pretrain.md").read_text()
