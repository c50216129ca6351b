"""Tests of what is inferred of a checkpoint: heads that know one convention name it, blind ones leave it open."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from formula import fill

from gvsl_zoo import convention, load, save_pretrained, write_volume
from gvsl_zoo.cli import main
from gvsl_zoo.convention import Candidate, Ranking, infer_preprocessing, whole_module
from gvsl_zoo.demo import as_volume
from gvsl_zoo.errors import ArgumentError
from gvsl_zoo.film import FilmPreprocessing
from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.volume import Preprocessing, prepare

NANO = "gvsl-unet-ct-nano"
MM = (6.0, 6.0, 6.0)
QUESTIONS = ["intensity", "spacing", "axes"]


@pytest.fixture(scope="module")
def scan():
    return as_volume(sample_subject((44, 40, 48), torch.Generator().manual_seed(3), MM))


class Oracle(GVSL):
    """A module whose restoration head answers what it is told, and whose backbone hands images through."""

    def __init__(self, answer, recipe):
        super().__init__(UNet(width=8, generator=torch.Generator().manual_seed(0)))
        self.answer, self.preprocessing = answer, recipe
        self.unet.forward = lambda x: x

    def restore(self, image):
        return self.answer(image)


def ranked(scan, answer, recipe, monkeypatch, orders=48):
    """The rankings by question, of few spacings and so many orders."""
    all_orders = convention._orders
    monkeypatch.setattr(convention, "_orders", lambda: itertools.islice(all_orders(), orders))
    monkeypatch.setattr(convention, "SPACINGS_MM", (4.0, 6.0, 8.0))
    return {one.question: one for one in infer_preprocessing(scan, Oracle(answer, recipe))}


def knows(scan, recipe):
    """The answer of a head that has learnt this very scan by heart, in one convention."""
    true = prepare(scan, recipe).image
    return lambda local: true if local.shape == true.shape else torch.full_like(local, 0.5)


@pytest.mark.parametrize("window", list(convention.HU_WINDOWS.values()))
def test_a_head_that_knows_the_anatomy_names_its_intensities(window, scan, monkeypatch):
    """Whatever the entry says: here it says -1024 to 1024."""
    known = knows(scan, Preprocessing(MM, window=window))
    found = ranked(scan, known, Preprocessing(MM), monkeypatch, orders=1)["intensity"]
    [best] = found.alike
    assert f"({window[0]:g} to {window[1]:g})" in best.choice
    assert best.declared == (window == (-1024.0, 1024.0))


def test_a_head_that_knows_the_anatomy_names_spacing_and_axes(scan, monkeypatch):
    recipe = Preprocessing(MM)
    found = ranked(scan, knows(scan, recipe), recipe, monkeypatch)
    assert [one.choice for one in found["spacing"].alike] == ["6 mm"] and found["spacing"].alike[0].declared
    assert [one.choice for one in found["axes"].alike] == ["+z +y +x"] and len(found["axes"].candidates) == 48


def test_a_head_that_knows_nothing_leaves_everything_open(scan, monkeypatch):
    found = ranked(scan, lambda local: local, Preprocessing(MM), monkeypatch)
    assert {question: len(one.alike) for question, one in found.items()} == {"intensity": 6, "spacing": 3, "axes": 48}
    assert {candidate.gain for candidate in found["axes"].candidates} == {0.0}


def test_a_narrow_range_of_intensities_does_not_win_by_being_narrow(scan, monkeypatch):
    """A head that paints everything grey: nearer to a narrow image, but further from it than the damaged copy is."""
    found = ranked(scan, lambda local: torch.full_like(local, 0.5), Preprocessing(MM), monkeypatch, orders=1)
    assert all(candidate.gain < 0 for candidate in found["intensity"].candidates)


def test_scans_without_hounsfield_units_are_ranked_by_other_windows(scan, monkeypatch):
    mr = replace(scan, data=(scan.data - scan.data.min()) // 3)
    found = ranked(mr, lambda local: local, Preprocessing(MM, unit="arbitrary"), monkeypatch, orders=1)
    assert [one.choice.partition(" (")[0] for one in found["intensity"].candidates] == list(convention.OTHER_WINDOWS)


def test_the_damages_leave_the_intensities_nearly_as_they_are():
    assert len(convention._seeds()) == convention.DAMAGES == len(set(convention._seeds()))


def test_a_candidate_is_behind_by_its_mean_difference_over_the_same_damages():
    best, other = Candidate("a", (3.0, 5.0, 4.0)), Candidate("b", (2.0, 4.0, 3.0))
    assert other.behind(best) == (1.0, 0.0) and best.behind(best) == (0.0, 0.0)
    noisy = Candidate("c", (5.0, 1.0, 4.0))  # 0.67 behind, with a standard error of 1.76
    less, error = noisy.behind(best)
    assert (round(less, 2), round(error, 2)) == (0.67, 1.76)
    assert Ranking("axes", (best, noisy, other)).alike == (best, noisy)


def test_a_backbone_has_no_restoration_head(scan):
    with pytest.raises(
        ArgumentError, match=r'UNet has no restoration head; load the whole module: .*task="pretraining"'
    ):
        infer_preprocessing(scan, load(NANO))


def test_a_model_of_films_is_refused_and_a_film_for_a_model_of_volumes(scan, tmp_path):
    films = GVSL(UNet(2, 8, generator=torch.Generator().manual_seed(0)), affine_width=16)
    films.preprocessing = FilmPreprocessing()
    with pytest.raises(ArgumentError, match=r"a 2D model: only of 3D models .* gvsl-zoo doctor --input FILM"):
        infer_preprocessing(scan, films)
    (tmp_path / "film.png").write_bytes(b"")
    with pytest.raises(ArgumentError, match=r"film\.png' is a film, the model one of volumes"):
        infer_preprocessing(tmp_path / "film.png", Oracle(lambda local: local, Preprocessing(MM)))


@pytest.mark.slow
def test_the_embedded_model_tells_its_intensities_for_sure(scan, monkeypatch):
    monkeypatch.setattr(convention, "SPACINGS_MM", ())
    monkeypatch.setattr(convention, "_orders", lambda: [])
    subject = sample_subject((80, 80, 80), torch.Generator().manual_seed(5), (4.0, 4.0, 4.0))
    steps = []
    monkeypatch.setattr(convention, "_ranked", lambda q, rows: Ranking(q, tuple(sorted(rows, key=lambda r: -r.gain))))
    found, *_ = infer_preprocessing(
        as_volume(subject), load(NANO, task="pretraining"), progress=lambda *step: steps.append(step)
    )
    assert [one.declared for one in found.alike] == [True] and steps[-1][0] == 7


def small(monkeypatch):
    """Few candidates, on few voxels."""
    orders = list(convention._orders())
    monkeypatch.setattr(convention, "_orders", lambda: orders[:3])
    monkeypatch.setattr(convention, "SPACINGS_MM", (12.0,))
    monkeypatch.setattr(convention, "EDGE", 16)


# --- The command --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["checkpoint", "safetensors"])
def test_the_command_takes_a_checkpoint_of_its_own(kind, scan, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    small(monkeypatch)
    whole, path = load(NANO, task="pretraining"), tmp_path / "theirs.pth"
    if kind == "checkpoint":
        torch.save(whole.state_dict(), path)
    else:
        path = save_pretrained(whole, tmp_path / "mine")
    write_volume(scan, tmp_path / "scan.nii.gz")
    words = ["doctor", "-i", str(tmp_path / "scan.nii.gz"), "--model", str(path), "--infer-preprocessing"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert ("(as the model says)" in result.output) == (kind == "safetensors" or "+z +y +x" in result.output)
    assert [line.partition(":")[0] for line in result.stdout.splitlines() if line[0] != " "] == QUESTIONS


def test_the_commands_json_has_every_candidate(scan, tmp_path, monkeypatch):
    small(monkeypatch)
    write_volume(scan, tmp_path / "scan.nii.gz")
    result = CliRunner().invoke(
        main, ["doctor", "-i", str(tmp_path / "scan.nii.gz"), "--infer-preprocessing", "--json"]
    )
    facts = json.loads(result.output)
    assert list(facts) == QUESTIONS and len(facts["axes"]["candidates"]) == 3
    assert facts["intensity"]["candidates"][0]["behind_db"] == [0.0, 0.0]


def test_a_checkpoint_without_heads_says_so(tmp_path):
    unet = fill(UNet(width=8, device="meta").to_empty(device="cpu"), "unet.")
    torch.save(unet.state_dict(), tmp_path / "backbone.pth")
    with pytest.raises(ArgumentError, match="cannot serve task 'pretraining'"):
        whole_module(tmp_path / "backbone.pth")
