"""The leakage ledger: what leaves the hash of a scan as it is and what does not, and who has seen what."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_film import write_dicom
from test_prepare import before_the_ledger

from gvsl_zoo import ledger, load, model_info, save_pretrained, write_volume
from gvsl_zoo.cli import main
from gvsl_zoo.demo import as_volume
from gvsl_zoo.errors import ArgumentError, VolumeError
from gvsl_zoo.ledger import LeakageWarning, check_unseen, file_hash, joined, ledger_of, scan_hash, seen
from gvsl_zoo.pretrain import loop
from gvsl_zoo.pretrain.anatomy import sample_subject
from gvsl_zoo.recipes import check_files, read_recipe
from gvsl_zoo.registry import Ledger, ModelEntry
from gvsl_zoo.volume import Volume

NANO = "gvsl-unet-ct-nano"
UNSURE = "not all scans of the training are known"
SHARED = Path(__file__).parents[2] / "shared" / "data"
AFFINE = np.diag([1.5, 2.0, 4.0, 1.0])
ORIENTATIONS = [
    (axes, turns) for axes in itertools.permutations(range(3)) for turns in itertools.product((1, -1), repeat=3)
]


def scan(seed=0, shape=(7, 9, 5)):
    """A CT's numbers, int16."""
    return np.random.default_rng(seed).integers(-1024, 3072, shape).astype(np.int16)


def hash_of(data, affine=AFFINE):
    return scan_hash(Volume(np.asarray(data), affine))


def write(path, data, affine=AFFINE, **header):
    """Saved by nibabel, as others do it."""
    image = nib.Nifti1Image(data, affine)
    for name, value in header.items():
        image.header[name] = value
    image.to_filename(path)
    return path


# --- Theorems -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 9, 5), (6, 6, 6), (8, 8, 1)], ids=str)
def test_a_scan_has_one_hash_however_its_axes_are_stored_whatever_the_header_says_of_them(shape):
    data = scan(shape=shape)
    found = {hash_of(data.transpose(axes)[tuple(slice(None, None, t) for t in turns)]) for axes, turns in ORIENTATIONS}
    assert found == {hash_of(data)}
    assert hash_of(data, AFFINE @ np.diag([-1, -1, 1, 1])) == hash_of(data)


def test_every_voxel_counts():
    data, known = scan(), set()
    for index in np.ndindex(data.shape):
        other = data.copy()
        other[index] += 1
        known.add(hash_of(other))
    assert len(known) == data.size and hash_of(data) not in known


def test_the_places_of_values_count_and_not_only_how_often_they_are_there():
    data = scan()
    other = data.copy()
    other[0, 0, 0], other[3, 4, 2] = data[3, 4, 2], data[0, 0, 0]
    assert hash_of(other) != hash_of(data)
    flat = np.sort(data, axis=None).reshape(data.shape)
    assert len({hash_of(flat), hash_of(data), hash_of(data.reshape(5, 9, 7))}) == 3


@pytest.mark.parametrize(
    "change", [lambda x: x[1:], lambda x: x.clip(-500, 500), lambda x: x + 1, lambda x: x / 4096], ids=range(4)
)
def test_a_scan_that_was_cropped_clipped_shifted_or_rescaled_is_another(change):
    assert hash_of(change(scan())) != hash_of(scan())


@pytest.mark.parametrize("dtype", [np.int16, ">i2", np.int32, np.int64, np.float32, np.float64])
def test_the_type_and_the_byte_order_of_voxels_make_no_difference(dtype):
    assert hash_of(scan().astype(dtype)) == hash_of(scan())


def test_numbers_that_are_not_whole_are_told_apart_as_float32():
    small = np.random.default_rng(0).random((5, 6, 7)) * 0.1
    assert hash_of(small) == hash_of(small.astype(np.float32)) == hash_of(small[::-1].transpose(2, 0, 1))
    assert len({hash_of(small), hash_of(small + 0.001), hash_of(np.zeros_like(small)), hash_of(small * 1e7)}) == 4
    signed = small.copy()
    small[0, 0, 0], signed[0, 0, 0] = 0.0, -0.0
    assert hash_of(signed) == hash_of(small)


def test_the_values_of_whole_numbers_and_the_bits_of_others_are_not_mixed_up():
    fractions = np.random.default_rng(0).random((4, 5, 6)).astype(np.float32)
    assert hash_of(fractions) != hash_of(fractions.view(np.int32))


# --- Files ----------------------------------------------------------------------------------------------------------


def test_a_file_saved_again_is_known(tmp_path):
    first = file_hash(write(tmp_path / "a.nii.gz", scan()))
    assert first == hash_of(scan())
    lps = np.diag([-1.5, -2.0, 4.0, 1.0])
    for again in (
        write(tmp_path / "b.nii", scan()),
        write(tmp_path / "c.nii.gz", scan()[::-1, ::-1], lps),
        write(tmp_path / "d.nii.gz", scan(), descrip=b"another patient", aux_file=b"x", intent_code=1003),
        write(tmp_path / "e.nii.gz", scan().astype(np.float64)),
        write(tmp_path / "f.nii.gz", scan(), np.diag([1.0, 1.0, 1.0, 1.0])),
    ):
        assert file_hash(again) == first, again.name


@pytest.mark.parametrize("slope", [1.0, 4095 / 65535])
def test_whole_numbers_that_were_stored_as_scaled_integers_are_known(tmp_path, slope):
    stored = nib.Nifti1Image(np.round((scan() + 1024) / slope).astype(np.uint16), AFFINE)
    stored.header.set_slope_inter(slope, -1024)
    stored.to_filename(tmp_path / "a.nii.gz")
    assert file_hash(tmp_path / "a.nii.gz") == hash_of(scan())


def test_a_film_is_known_as_png_as_nifti_and_as_dicom(tmp_path):
    pytest.importorskip("SimpleITK")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 17)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    known = file_hash(tmp_path / "a.png")
    assert file_hash(write(tmp_path / "a.nii.gz", pixels.T[:, :, None])) == known
    assert file_hash(write_dicom(tmp_path / "a.dcm", pixels)) == known


def test_a_file_that_changed_is_read_again_and_one_that_is_not_there_is_an_error(tmp_path):
    path = write(tmp_path / "a.nii", scan())
    before = file_hash(path)
    write(path, scan(1, (8, 9, 5)))
    assert file_hash(path) != before
    with pytest.raises(VolumeError, match="no such file"):
        file_hash(tmp_path / "b.nii")


# --- Who has seen what ----------------------------------------------------------------------------------------------


@pytest.fixture
def cases(tmp_path):
    """Three test cases, the files of each by its name."""
    return {name: (write(tmp_path / f"{name}.nii.gz", scan(seed)),) for seed, name in enumerate("abc")}


def test_a_ledger_goes_on_from_that_of_the_weights_before(cases):
    start = Ledger(complete=False, scans=("0" * 64,))
    after = ledger_of([*cases["a"], *cases["b"], *cases["a"]], start)
    assert set(after.scans) == {"0" * 64, *(file_hash(cases[name][0]) for name in "ab")}
    assert len(after.scans) == 3 and not after.complete and ledger_of([]).complete
    assert seen(cases, after) == ("a", "b") and seen(cases, start) == ()


def test_the_ledger_of_an_entry_lists_so_many_and_says_that_there_are_more(cases, monkeypatch):
    monkeypatch.setattr(ledger, "MOST_LISTED", 2)
    a, b, whole = (
        ledger_of(paths) for paths in (cases["a"], cases["b"], [path for case in cases.values() for path in case])
    )
    assert joined(a, b).complete and len(joined(a, b).scans) == 2
    assert joined(a, whole) == Ledger(False, whole.scans[:2]) and len(whole.scans) == 3 and whole.complete


def test_a_test_on_what_was_seen_is_refused_with_the_files_named(cases):
    ledgers = {"mine": ledger_of(cases["b"]), "other": ledger_of([])}
    with pytest.raises(ArgumentError, match=r"mine has seen 1 of 3 test cases in training: .*/b\.nii\.gz; take them"):
        check_unseen(cases, ledgers)
    assert check_unseen(cases, ledgers, allow=True) == {"mine": ("b",)}
    assert check_unseen({"c": cases["c"]}, ledgers) == {}


def test_weights_that_do_not_tell_all_they_saw_are_warned_of(cases):
    with pytest.warns(LeakageWarning, match=f"mine: {UNSURE}"):
        check_unseen(cases, {"mine": Ledger(complete=False)})


def test_an_entry_carries_its_ledger_and_weights_that_changed_no_longer_tell_all(tmp_path):
    model = load(NANO)
    entry: ModelEntry = model.entry
    assert entry.ledger.complete and len(entry.ledger.scans) == 12
    assert ModelEntry.from_dict(entry.to_dict()) == entry
    save_pretrained(model, tmp_path / "same")
    assert load(tmp_path / "same").entry.ledger == entry.ledger
    next(model.parameters()).data.add_(1)
    save_pretrained(model, tmp_path / "changed")
    assert load(tmp_path / "changed").entry.ledger == replace(entry.ledger, complete=False)


# --- From a store to a test -----------------------------------------------------------------------------------------


def run(*words):
    result = CliRunner().invoke(main, [*map(str, words)])
    assert "unexpected" not in result.output, result.output
    return result


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Four synthetic CTs and their lungs: a and b, of which training gets a store, and c and d, which it never sees."""
    folder = tmp_path_factory.mktemp("labelled")
    for seed, name in enumerate("abcd"):
        subject = sample_subject((20, 18, 22), torch.Generator().manual_seed(seed), (9.0, 9.0, 9.0))
        image = as_volume(subject)
        lungs = replace(image, data=((subject.labels == 2) | (subject.labels == 3)).byte().numpy().T)
        for part in ("all", "seen" if name in "ab" else "new"):
            for kind, volume in (("images", image), ("labels", lungs)):
                (folder / part / kind).mkdir(parents=True, exist_ok=True)
                write_volume(volume, folder / part / kind / f"{name}.nii.gz")
    return folder


@pytest.fixture
def trained(labelled, tmp_path, monkeypatch):
    """The folder of a run of two steps on the store of a and b, after what a test did to the store."""
    monkeypatch.setattr(loop, "draw_run", lambda *_: None)

    def train(change=lambda store: store, *options):
        store = tmp_path / "store"
        result = run("prepare", "-i", labelled / "seen/images", "-o", store, "--spacing-mm", 9)
        assert result.exit_code == 0, result.output
        change(store)
        words = ["--data", store, "--out", tmp_path / "run", "--steps", 2, "--crop", 16, "--workers", 0]
        result = run("pretrain", *words, "--set", "spacing_mm=9", "--device", "cpu", *options)
        assert result.exit_code == 0, result.output
        return tmp_path / "run"

    return train


def scored(labelled, part, model, out):
    data = labelled / part
    return run("evaluate", "--predictions", data / "labels", "--references", data, "--model", model, "-o", out)


def test_a_run_on_a_store_tells_its_scans_and_is_not_tested_on_them(labelled, trained, tmp_path):
    model = trained()
    assert load(model).entry.ledger == ledger_of((labelled / "seen/images").iterdir())
    refused = scored(labelled, "all", model, tmp_path / "scores")
    assert refused.exit_code == 2 and "has seen 2 of 4 test cases in training: " in refused.output
    assert all(f"images/{name}.nii.gz" in refused.output for name in "ab")
    allowed = scored(labelled, "new", model, tmp_path / "scores")
    assert allowed.exit_code == 0 and UNSURE not in allowed.output
    words = ["--data", labelled / "seen", "--model", model, "--out", tmp_path / "bench", "--counts", 1]
    refused = run("bench", *words)
    assert refused.exit_code == 2 and "has seen 1 of 1 test cases in training: " in refused.output


def test_a_run_on_a_store_of_an_older_version_is_warned_of(labelled, trained, tmp_path):
    model = trained(before_the_ledger)
    assert load(model).entry.ledger == Ledger(complete=False)
    warned = scored(labelled, "seen", model, tmp_path / "scores")
    assert warned.exit_code == 0 and UNSURE in warned.output


def test_a_run_on_a_store_that_goes_on_from_other_weights_has_seen_what_both_saw(labelled, trained):
    own, start = ledger_of((labelled / "seen/images").iterdir()), model_info(NANO).ledger
    assert load(trained(lambda store: store, "--init", NANO)).entry.ledger == joined(own, start)


def test_the_registrys_ledger_is_that_of_the_recipes_scans():
    if not (SHARED / "ct").is_dir():
        pytest.skip("the scans are not on this machine")
    known = model_info(NANO).ledger
    assert known == ledger_of(check_files(read_recipe(NANO), SHARED))
    held_out = {name: (SHARED / f"ct/{name}.nii.gz",) for name in ("lungfcp_0001", "acrin_flt_013", "kits_00072")}
    assert check_unseen(held_out, {NANO: known}) == {}
