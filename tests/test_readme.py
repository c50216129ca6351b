"""The README is right: its tables are the registry's, its Python blocks run, its commands exist."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from gvsl_zoo import write_volume
from gvsl_zoo.cli import main
from gvsl_zoo.demo import as_volume
from gvsl_zoo.film import write_film
from gvsl_zoo.pretrain.anatomy import sample_film, sample_subject

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("gvsl-zoo")
]


@pytest.fixture
def with_scans(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("scan", "other")):
        subject = sample_subject((40, 40, 48), torch.Generator().manual_seed(seed), spacing_mm=(6.0, 6.0, 6.0))
        write_volume(as_volume(subject), tmp_path / f"{name}.nii.gz")
    for seed, name in enumerate(("film", "other")):
        film = as_volume(sample_film((64, 64), torch.Generator().manual_seed(seed), (6.0, 6.0)))
        write_film(film, tmp_path / f"{name}.png", like=film.data.dtype)


def test_the_tables_are_those_of_the_registry_and_of_the_measurements(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from model_table import TABLES, with_tables

    for page in TABLES:
        text = (ROOT / page).read_text()
        assert with_tables(text, page) == text, "run python scripts/model_table.py"


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_every_python_block_runs(block, with_scans):
    names: dict = {}
    exec(compile(block, "README.md", "exec"), names)
    assert "gvsl_zoo" in sys.modules and len(names) > 2


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command, with_scans):
    result = CliRunner().invoke(main, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output


def test_every_linked_file_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_there_are_blocks_and_commands_to_check():
    assert len(PYTHON) >= 5 and len(COMMANDS) >= 5
