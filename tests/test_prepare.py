"""Tests of gvsl_zoo.pretrain.prepare: what goes in comes out, bad files stand aside, a kill loses little."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_dicom import write_series
from test_film import write_dicom
from test_volume import CONTENTS, DATA, ORIENTATIONS, turned_affine

from gvsl_zoo.cli import main
from gvsl_zoo.errors import ArgumentError, GvslZooError, VolumeError
from gvsl_zoo.ledger import ledger_of
from gvsl_zoo.pretrain import prepare as room
from gvsl_zoo.pretrain import store as store_room
from gvsl_zoo.pretrain.prepare import prepare_store
from gvsl_zoo.pretrain.store import LEDGER, Store
from gvsl_zoo.registry import Ledger
from gvsl_zoo.volume import InputWarning, Preprocessing, prepare, read_volume


def phantom(seed: int, shape: tuple[int, int, int] = (12, 10, 9)) -> np.ndarray:
    """CT-like int16: air, and a warm noisy block that is off the centre on every axis."""
    data = np.full(shape, -1000, np.int16)
    block = tuple(slice(n // 4, n - n // 5) for n in shape)
    data[block] = np.random.default_rng(seed).integers(-100, 1500, data[block].shape)
    return data


def save(path: Path, data: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data, np.diag([1.5, 2, 1, 1]) if affine is None else affine, dtype=data.dtype), path)
    return path


@pytest.fixture
def scans(tmp_path):
    """Five scans of different sizes in two folders, packed and not."""
    names = ("a.nii", "b.nii.gz", "one/c.nii", "one/d.nii.gz", "two words/é.nii.gz")
    for seed, name in enumerate(names):
        save(tmp_path / "scans" / name, phantom(seed, (12, 10 + seed, 9)))
    return tmp_path / "scans"


def content(store: Store) -> dict[tuple[str, bytes], tuple]:
    """What a store holds, whatever the order of writing: by subject and source, the entry and the voxels."""
    fields = ("shape", "spacing_mm", "lowest", "highest")
    return {
        (store.subject_names[e["subject"]], bytes(e["sha256"])): (
            store.stratum_names[e["stratum"]],
            *(e[field].tolist() for field in fields),
            store.volume(i).tobytes(),
        )
        for i, e in enumerate(store.entries)
    }


def quarantined(store: Path) -> dict[str, str]:
    rows = map(json.loads, (store / "quarantine.jsonl").read_text().splitlines())
    return {row["path"]: row["cause"] for row in rows}


# ---- what goes in comes out


@pytest.mark.parametrize("spacing", [None, 1.0, 1.7])
@pytest.mark.parametrize("unit", ["HU", "arbitrary"])
def test_a_crop_is_the_volume_as_a_model_would_get_it(tmp_path, scans, spacing, unit):
    prepare_store(scans, tmp_path / "s", spacing_mm=spacing, unit=unit)
    store = Store(tmp_path / "s")
    assert store.subject_names == sorted(p.relative_to(scans).as_posix() for p in scans.rglob("*.nii*"))
    for i, name in enumerate(store.subject_names):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", InputWarning)
            wanted = prepare(read_volume(scans / name), Preprocessing(spacing and (spacing,) * 3, unit=unit))
        entry = store.entries[i]
        assert tuple(entry["shape"]) == store.volume(i).shape == wanted.shape
        np.testing.assert_allclose(entry["spacing_mm"], wanted.spacing_mm, rtol=1e-6)
        assert (entry["lowest"], entry["highest"]) == (wanted.source.data.min(), wanted.source.data.max())
        crop = store.crop(i, (0, 0, 0), wanted.shape)
        assert (crop - wanted.image[0]).abs().max() <= 0.5 / (2048 if unit == "HU" else 32767) + 1e-7
        if unit == "HU" and spacing is None:
            assert torch.equal(crop, wanted.image[0])


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS[::5])
def test_whatever_a_files_axes_the_volume_is_z_y_x(tmp_path, order, signs):
    upright = phantom(1)
    affine = turned_affine(order, signs)
    own = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.io_orientation(affine))
    save(tmp_path / "in" / "a.nii", nib.orientations.apply_orientation(upright, own), affine)
    prepare_store(tmp_path / "in", tmp_path / "s", spacing_mm=None)
    np.testing.assert_array_equal(Store(tmp_path / "s").volume(0), np.clip(upright, -1024, 1024).T)


def test_arbitrary_units_lose_negatives_and_keep_their_extremes(tmp_path):
    data = np.linspace(-50, 1_700_000, 12 * 10 * 9, dtype=np.float32).reshape(12, 10, 9)
    save(tmp_path / "in" / "a.nii", data)
    prepare_store(tmp_path / "in", tmp_path / "s", unit="arbitrary", spacing_mm=None)
    store = Store(tmp_path / "s")
    assert store.volume(0).min() == 0 and store.volume(0).max() == 32767
    assert store.entries[0]["lowest"] == -50 and store.entries[0]["highest"] == 1_700_000
    np.testing.assert_allclose(store.crop(0, (0, 0, 0), (9, 10, 12))[0], data.clip(0).T / 1_700_000, atol=2e-5)


def test_shards_roll_over_and_a_large_volume_has_one_of_its_own(tmp_path, scans, monkeypatch):
    reference = prepare_store(scans, tmp_path / "one", spacing_mm=None)
    monkeypatch.setattr(room, "MAX_SHARD_VOXELS", 2500)
    save(scans / "large.nii", phantom(9, (20, 20, 20)))
    report = prepare_store(scans, tmp_path / "s", spacing_mm=None)
    sizes = [path.stat().st_size // 2 for path in sorted((tmp_path / "s" / "shards").glob("*.i16"))]
    assert sizes[0] == 8000 and all(size <= 2500 for size in sizes[1:]) and sum(sizes) * 2 == report.bytes
    assert report.bytes == reference.bytes + 16000
    assert content(Store(tmp_path / "one")).items() <= content(Store(tmp_path / "s")).items()


def test_large_files_come_first_and_progress_counts_all(tmp_path, scans):
    (scans / "bad.nii").write_bytes(b"")
    calls = []
    prepare_store(scans, tmp_path / "s", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(n, 6) for n in range(1, 7)]
    journal = next((tmp_path / "s" / "shards").glob("*.jsonl")).read_text().splitlines()
    sizes = [json.loads(line)["size"] for line in journal]
    assert sizes == sorted(sizes, reverse=True)


def test_hidden_files_links_to_folders_and_the_store_itself_are_no_scans(tmp_path, scans):
    (scans / "._a.nii").write_bytes(b"a resource fork")
    (scans / ".snapshot").mkdir()
    save(scans / ".snapshot" / "a.nii", phantom(0))
    (scans / "loop").symlink_to(scans)
    (scans / "readme.txt").write_text("no scan")
    for _ in range(2):
        report = prepare_store(scans, scans / "store")
        assert report.volumes == 5 and report.quarantined == 0


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared/data beside the checkout")
def test_real_scans_of_ct_become_a_store(tmp_path):
    names = ["ct/ts_abdomen.nii.gz", "ct/kits_00072.nii.gz"]
    (tmp_path / "t.csv").write_text("path\n" + "\n".join(names))
    report = prepare_store(DATA, tmp_path / "s", spacing_mm=3.0, table=tmp_path / "t.csv")
    assert (report.volumes, report.quarantined) == (2, 0)
    store = Store(tmp_path / "s")
    wanted = prepare(read_volume(DATA / names[1]), Preprocessing((3.0,) * 3)).image[0]
    assert store.subject_names == sorted(names)
    assert (store.crop(0, (0, 0, 0), wanted.shape[1:]) - wanted).abs().max() <= 0.5 / 2048 + 1e-6


# ---- whose scans they are


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_ledger_of_a_store_is_that_of_its_files(tmp_path, scans, workers):
    write_series(scans / "series", phantom(8))
    (scans / "again.nii").write_bytes((scans / "a.nii").read_bytes())
    (scans / "bad.nii").write_bytes(b"")
    prepare_store(scans, tmp_path / "s", spacing_mm=3.0, workers=workers)
    files = [path for path in scans.rglob("*.nii*") if path.name != "bad.nii"]
    found = Store(tmp_path / "s").ledger
    assert found == ledger_of([*files, scans / "series"]) and len(found.scans) == 6 and found.complete


@pytest.mark.parametrize("unit", ["grey", "arbitrary"])
def test_the_ledger_of_a_store_of_films_is_that_of_their_files(tmp_path, unit):
    (tmp_path / "in").mkdir()
    first, second = np.random.default_rng(0).integers(0, 256, (2, 20, 30), np.uint8)
    Image.fromarray(first).save(tmp_path / "in/a.png")
    write_dicom(tmp_path / "in/b.dcm", second)
    prepare_store(tmp_path / "in", tmp_path / "s", ndim=2, unit=unit, size=16)
    assert Store(tmp_path / "s").ledger == ledger_of((tmp_path / "in").iterdir())


def test_the_ledger_follows_the_scans_that_a_store_holds_now(tmp_path, scans):
    prepare_store(scans, tmp_path / "s")
    (scans / "a.nii").rename(scans / "moved.nii")
    save(scans / "b.nii.gz", phantom(20))
    table = write_table(tmp_path / "t.csv", [{"path": "moved.nii"}, {"path": "b.nii.gz"}])
    report = prepare_store(scans, tmp_path / "s", table=table)
    assert report.volumes == 2 and Store(tmp_path / "s").ledger == ledger_of([scans / "moved.nii", scans / "b.nii.gz"])


def before_the_ledger(store: Path) -> Path:
    """The store as an older version left it."""
    (store / LEDGER).unlink()
    for journal in (store / "shards").glob("*.jsonl"):
        records = [json.loads(line) for line in journal.read_text().splitlines()]
        journal.write_text("".join(json.dumps({k: r[k] for k in r if k != "scan_hash"}) + "\n" for r in records))
    return store


def test_a_store_of_an_older_version_opens_grows_and_does_not_claim_to_know_its_scans(tmp_path, scans):
    store = before_the_ledger(prepare_store(scans, tmp_path / "s").store)
    assert Store(store).ledger == Ledger(complete=False) and len(Store(store)) == 5
    save(scans / "new.nii", phantom(30))
    report = prepare_store(scans, store)
    assert (report.prepared, report.kept) == (1, 5)
    assert Store(store).ledger == replace(ledger_of([scans / "new.nii"]), complete=False)


def test_a_store_of_more_scans_than_an_entry_lists_does_not_claim_to_know_them(tmp_path, scans, monkeypatch):
    prepare_store(scans, tmp_path / "s")
    monkeypatch.setattr(store_room, "MOST_LISTED", 4)
    assert Store(tmp_path / "s").ledger == Ledger(complete=False)


@pytest.mark.parametrize(("damage", "message"), [(lambda x: x[:-1], "ledger.npy: "), (None, "is no list of hashes")])
def test_a_damaged_ledger_is_named_and_mended_by_the_next_run(tmp_path, scans, damage, message):
    path = prepare_store(scans, tmp_path / "s").store / LEDGER
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        np.save(path, np.zeros(3))
    with pytest.raises(VolumeError, match=f"is damaged: .*{message}.*; run 'gvsl-zoo prepare' on it again"):
        _ = Store(tmp_path / "s").ledger
    prepare_store(scans, tmp_path / "s")
    assert len(Store(tmp_path / "s").ledger.scans) == 5


# ---- tables


def write_table(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_table_chooses_files_and_names_subjects_and_strata(tmp_path, scans):
    rows = [
        {"path": "a.nii", "subject": "Anna", "stratum": "chest, AP"},
        {"path": "one/../one/c.nii", "subject": "Anna", "stratum": ""},
        {"path": "two words/é.nii.gz", "subject": "", "stratum": "chest, AP"},
        {"path": "gone.nii", "subject": "Gus", "stratum": ""},
        {"path": "link.nii", "subject": "", "stratum": ""},
    ]
    (scans / "link.nii").symlink_to("nowhere")
    (scans / "other.nii").symlink_to("nowhere")  # not in the table: of no interest
    report = prepare_store(scans, tmp_path / "s", table=write_table(tmp_path / "t.csv", rows))
    assert (report.volumes, report.subjects, report.strata, report.quarantined) == (3, 2, 2, 2)
    causes = {"gone.nii": "the table has it, the folder has not", "link.nii": "No such file or directory"}
    assert quarantined(tmp_path / "s") == causes
    found = {name: values[0] for (name, _), values in content(Store(tmp_path / "s")).items()}
    assert found == {"Anna": "", "two words/é.nii.gz": "chest, AP"}
    assert [e["subject"] for e in Store(tmp_path / "s").entries] == [0, 0, 1]


def test_another_table_renames_without_preparing_again(tmp_path, scans):
    prepare_store(scans, tmp_path / "s")
    table = write_table(tmp_path / "t.csv", [{"path": "b.nii.gz", "subject": "B", "stratum": "x"}])
    report = prepare_store(scans, tmp_path / "s", table=table)
    assert (report.volumes, report.prepared, report.kept, report.vanished) == (1, 0, 1, ())
    store = Store(tmp_path / "s")
    assert store.subject_names[store.entries[0]["subject"]] == "B"
    assert store.stratum_names[store.entries[0]["stratum"]] == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows or no column 'path'"),
        ("path\n", "has no rows or no column 'path'"),
        ("file,subject\na.nii,1\n", "has no rows or no column 'path'"),
        ("path\na.nii\n./a.nii\n", "has 'a.nii' twice; give each file one row"),
        ('path,subject\na.nii,"x\ny"\n', "has a line break in a name of 'a.nii'"),
        ("path\n\xff".encode("latin-1"), "cannot be read: .*; give a CSV file in UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_a_faulty_table_is_refused(tmp_path, scans, text, message):
    table = tmp_path / "t.csv"
    if text is not None:
        table.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ArgumentError, match=message):
        prepare_store(scans, tmp_path / "s", table=table)


# ---- bad files stand aside


def test_every_faulty_file_is_quarantined_with_its_cause(tmp_path, scans):
    for name, (raw, _) in CONTENTS.items():
        (scans / f"{name}.nii.gz").write_bytes(raw)
    (scans / "gone.nii").symlink_to("nowhere")
    save(scans / "flat.nii", np.full((8, 8, 8), -1000, np.int16))
    affine = np.diag([1.5, 1.5, 3, 1])  # resampled, which leaves rounding
    nib.save(nib.Nifti1Image(np.full((40, 40, 30), -999, np.int16), affine), scans / "level.nii")
    save(scans / "bright.nii", np.linspace(1100, 1900, 512).astype(np.int16).reshape(8, 8, 8))
    save(scans / "line\nbreak.nii", phantom(7))
    report = prepare_store(scans, tmp_path / "s", most_bad=1.0)
    causes = quarantined(report.quarantine.parent)
    for name, (_, message) in CONTENTS.items():
        with pytest.raises(VolumeError, match=message):
            raise VolumeError(causes.pop(f"{name}.nii.gz"))
    assert causes.pop("gone.nii") == "No such file or directory"
    assert causes.pop("flat.nii").startswith("an empty image: values from -1000 to -1000 HU become all the same")
    assert causes.pop("level.nii").startswith("an empty image: values from -999 to -999 HU")
    assert causes.pop("bright.nii").startswith("an empty image: values from 1100 to 1900")
    assert causes.pop("line\nbreak.nii") == "a line break in the name"
    assert not causes and report.volumes == 5 and report.quarantined == len(CONTENTS) + 5


def test_doubtful_files_are_used_and_noted(tmp_path, scans):
    holes = phantom(1).astype(np.float32)
    holes[3, 4, 5] = np.nan
    save(scans / "holes.nii", holes)
    save(scans / "mr.nii", np.abs(phantom(2)))
    save(scans / "labels.nii", (phantom(3) // 500).astype(np.int16))
    report = prepare_store(scans, tmp_path / "s")
    notes = {row["path"]: row["notes"] for row in map(json.loads, report.notes.read_text().splitlines())}
    assert report.volumes == 8 and report.doubtful == 3 and notes.keys() == {"holes.nii", "mr.nii", "labels.nii"}
    assert "1 of 1080 voxels were NaN" in notes["holes.nii"][0] and "expected HU, but values" in notes["mr.nii"][0]
    assert "only 5 different values: a label map?" in notes["labels.nii"][-1]


def test_too_many_bad_files_are_an_error_that_names_the_first(tmp_path, scans):
    for name in "xyz":
        (scans / f"{name}.nii").write_bytes(b"")
    message = r"3 of 8 files cannot be used: 'x.nii': .*the file is empty.*quarantine.jsonl"
    with pytest.raises(VolumeError, match=message):
        prepare_store(scans, tmp_path / "s", most_bad=0.3)
    assert quarantined(tmp_path / "s").keys() == {"x.nii", "y.nii", "z.nii"}
    report = prepare_store(scans, tmp_path / "s", most_bad=0.4)
    assert (report.prepared, report.kept, report.quarantined) == (0, 5, 3)


def test_no_usable_file_is_an_error_however_many_bad_ones_are_allowed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "x.nii").write_bytes(b"")
    with pytest.raises(VolumeError, match="1 of 1 files cannot be used"):
        prepare_store(tmp_path / "in", tmp_path / "s", most_bad=1.0)


def test_a_file_that_grows_while_it_is_read_waits_for_the_next_run(tmp_path, scans, monkeypatch):
    read = room.read_volume

    def read_and_touch(path):
        volume = read(path)
        if path.name == "a.nii":
            os.utime(path, ns=(1, time.time_ns()))
        return volume

    monkeypatch.setattr(room, "read_volume", read_and_touch)
    report = prepare_store(scans, tmp_path / "s")
    assert report.volumes == 4 and "changed while it was read" in quarantined(tmp_path / "s")["a.nii"]
    monkeypatch.undo()
    assert prepare_store(scans, tmp_path / "s").prepared == 1


def test_names_in_any_bytes_are_kept(tmp_path, scans):
    names = [
        os.fsdecode(name) for name in (b"caf\xe9.nii", "影像 №1.nii".encode(), b"'\"\t,;.nii", b"x" * 240 + b".nii")
    ]
    for n, name in enumerate(names):
        save(tmp_path / "in" / "plain.nii", phantom(n)).rename(tmp_path / "in" / name)
    (tmp_path / "in" / os.fsdecode(b"bad\xff.nii")).write_bytes(b"")
    report = prepare_store(tmp_path / "in", tmp_path / "s")
    assert report.volumes == 4 and quarantined(tmp_path / "s").keys() == {"bad\udcff.nii"}
    assert sorted(Store(tmp_path / "s").subject_names) == sorted(names)
    assert prepare_store(tmp_path / "in", tmp_path / "s").kept == 4
    assert run("-i", tmp_path / "in", "-o", tmp_path / "s")[0] == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_what_may_not_be_read_is_quarantined(tmp_path, scans):
    (scans / "a.nii").chmod(0)
    (scans / "one").chmod(0)
    try:
        report = prepare_store(scans, tmp_path / "s")
    finally:
        (scans / "one").chmod(0o700)
    assert report.volumes == 2 and set(quarantined(tmp_path / "s").values()) == {"Permission denied"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "workers 0"),
        ({"most_bad": 1.5}, "most_bad 1.5"),
        ({"ndim": 4}, "ndim 4; give 2 or 3"),
        ({"unit": "grey"}, "unit 'grey' with ndim 3"),
        ({"spacing_mm": -1.0}, "spacing_mm -1.0"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_made(tmp_path, scans, settings, message):
    with pytest.raises(ArgumentError, match=message):
        prepare_store(scans, tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()


def test_folders_that_cannot_be_meant_are_refused(tmp_path, scans):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgumentError, match=r"empty' holds no .nii, .nii.gz or DICOM file; give the folder"):
        prepare_store(tmp_path / "empty", tmp_path / "s")
    with pytest.raises(ArgumentError, match=r"scans' holds no .png or DICOM file"):
        prepare_store(scans, tmp_path / "s", ndim=2, unit="grey")
    with pytest.raises(ArgumentError, match="is not a folder"):
        prepare_store(scans / "a.nii", tmp_path / "s")
    with pytest.raises(ArgumentError, match="holds other things and no store"):
        prepare_store(scans, scans / "one")
    with pytest.raises(VolumeError, match=r"cannot write the store .*: (Not a directory|File exists)"):
        prepare_store(scans, scans / "a.nii" / "s")


# ---- again, and after a kill


def test_a_second_run_does_only_what_is_missing(tmp_path, scans, monkeypatch):
    prepare_store(scans, tmp_path / "s")
    before = content(Store(tmp_path / "s"))
    save(scans / "new.nii", phantom(8))
    read = []
    real = room.read_volume
    monkeypatch.setattr(room, "read_volume", lambda path: read.append(path.name) or real(path))
    report = prepare_store(scans, tmp_path / "s")
    assert read == ["new.nii"] and (report.prepared, report.kept, report.volumes) == (1, 5, 6)
    assert before.items() <= content(Store(tmp_path / "s")).items()
    prepare_store(scans, tmp_path / "s")
    assert read == ["new.nii"]


def test_changed_vanished_and_returned_sources_are_noticed(tmp_path, scans):
    prepare_store(scans, tmp_path / "s")
    opened = Store(tmp_path / "s")
    old = content(opened)
    (scans / "b.nii.gz").rename(tmp_path / "b.nii.gz")
    save(scans / "a.nii", phantom(77))
    report = prepare_store(scans, tmp_path / "s")
    assert (report.changed, report.vanished) == (("a.nii",), ("b.nii.gz",))
    assert (report.volumes, report.prepared, report.kept) == (4, 1, 3)
    new = content(Store(tmp_path / "s"))
    assert {name for name, _ in new} == {name for name, _ in old} - {"b.nii.gz"} and len(set(new) - set(old)) == 1
    assert content(opened) == old, "a store that is open goes on as it was"
    assert opened.fingerprint != Store(tmp_path / "s").fingerprint
    (tmp_path / "b.nii.gz").rename(scans / "b.nii.gz")
    report = prepare_store(scans, tmp_path / "s")
    assert (report.volumes, report.prepared, report.vanished) == (5, 0, ())


def test_a_copy_of_the_same_content_is_recognised_and_not_written_again(tmp_path, scans):
    first = prepare_store(scans, tmp_path / "s")
    before, reference = shards_bytes(tmp_path / "s"), content(Store(tmp_path / "s"))
    for path in scans.rglob("*.nii*"):
        os.utime(path, ns=(5, 5))
    report = prepare_store(scans, tmp_path / "s")
    assert (report.volumes, report.prepared, report.changed) == (first.volumes, 5, ())
    assert shards_bytes(tmp_path / "s") == before and content(Store(tmp_path / "s")) == reference
    assert prepare_store(scans, tmp_path / "s").kept == 5


def shards_bytes(store: Path) -> int:
    return sum(path.stat().st_size for path in (store / "shards").glob("*.i16"))


def test_a_store_of_another_format_is_not_mixed(tmp_path, scans):
    prepare_store(scans, tmp_path / "s", spacing_mm=2.0)
    with pytest.raises(
        ArgumentError, match=r"spacing_mm=2\.0, size=None\), not Format\(ndim=3, unit='HU', spacing_mm=1\.0"
    ):
        prepare_store(scans, tmp_path / "s")
    with pytest.raises(ArgumentError, match=r"unit='HU'.*, not .*unit='arbitrary'"):
        prepare_store(scans, tmp_path / "s", spacing_mm=2.0, unit="arbitrary")


def test_damage_to_a_store_is_healed_by_the_next_run(tmp_path, scans):
    prepare_store(scans, tmp_path / "s")
    reference = content(Store(tmp_path / "s"))
    shard = next((tmp_path / "s" / "shards").glob("*.i16"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "s" / "index.npy").write_bytes(b"x")
    report = prepare_store(scans, tmp_path / "s")
    assert (report.prepared, report.kept) == (1, 4) and content(Store(tmp_path / "s")) == reference


def test_two_runs_on_one_store_are_refused(tmp_path, scans):
    from filelock import FileLock

    (tmp_path / "s").mkdir()
    with FileLock(tmp_path / "s" / ".lock"), pytest.raises(VolumeError, match=r"another process prepares .*; wait"):
        prepare_store(scans, tmp_path / "s")
    assert prepare_store(scans, tmp_path / "s").volumes == 5


class Moments:
    """Stands in for `_write` and `write_whole`: acts before, in the middle of or after the n-th write."""

    def __init__(self, monkeypatch, act=lambda: None, at: int = -1) -> None:
        self.count, self.at, self.act = 0, at, act
        self.write, self.whole = room._write, room.write_whole
        monkeypatch.setattr(room, "_write", self.in_parts)
        monkeypatch.setattr(room, "write_whole", self.at_once)

    def moment(self) -> None:
        if self.count == self.at:
            self.act()
        self.count += 1

    def in_parts(self, file, rest) -> None:
        self.moment()
        self.write(file, rest[: len(rest) // 2])
        self.moment()
        self.write(file, rest[len(rest) // 2 :])
        self.moment()

    def at_once(self, path, *parts) -> None:
        self.moment()
        self.whole(path, *parts)
        self.moment()


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed(run, *args, **settings) -> bool:
    """Whether a child that does this is killed, as it asked for; it never comes back into pytest."""
    child = os.fork()
    if child == 0:
        try:
            run(*args, **settings)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside threads: the child only prepares
def test_a_run_killed_at_any_moment_is_finished_by_the_next(tmp_path, scans, monkeypatch):
    for path in [scans / "one" / "c.nii", scans / "one" / "d.nii.gz"]:
        path.unlink()
    (scans / "bad.nii").write_bytes(b"")
    with monkeypatch.context() as patch:
        moments = Moments(patch)
        prepare_store(scans, tmp_path / "s")
    reference = content(Store(tmp_path / "s"))
    assert moments.count == 3 * 2 * 3 + 7 * 2 and len(reference) == 3
    for at in range(moments.count):
        store = tmp_path / f"killed{at}"
        with monkeypatch.context() as patch:
            Moments(patch, kill_self, at)
            assert killed(prepare_store, scans, store)
        try:
            assert content(Store(store)) == reference
        except VolumeError as error:
            assert any(text in str(error) for text in ("no store.json", "no index")), error
        report = prepare_store(scans, store)
        assert report.prepared + report.kept == 3 and report.kept >= (at - 2) // 6 - 1
        assert content(Store(store)) == reference and quarantined(store).keys() == {"bad.nii"}
        assert Store(store).ledger == Store(tmp_path / "s").ledger
        assert not list(store.rglob("*.partial"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_kill_after_kill_makes_progress(tmp_path, scans, monkeypatch):
    store, runs = tmp_path / "s", 0
    with monkeypatch.context() as patch:
        Moments(patch, kill_self, 13)  # in the second volume; what follows the last takes 12
        while killed(prepare_store, scans, store):
            runs += 1
            assert runs < 20
    assert runs and content(Store(store)) == content(Store(prepare_store(scans, tmp_path / "whole").store))


@pytest.mark.parametrize("call", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_refused_and_the_store_still_opens(tmp_path, scans, monkeypatch, call):
    prepare_store(scans, tmp_path / "s")
    reference = content(Store(tmp_path / "s"))
    save(scans / "new.nii", phantom(8))
    save(scans / "newer.nii", phantom(9))
    with monkeypatch.context() as patch:
        moments = Moments(patch)
        prepare_store(scans, tmp_path / "other")

    def full() -> None:
        raise OSError(call, os.strerror(call))

    for at in range(moments.count):
        with monkeypatch.context() as patch:
            Moments(patch, full, at)
            try:
                report = prepare_store(scans, tmp_path / "s")
            except VolumeError as error:
                assert f"cannot write the store '{tmp_path / 's'}': {os.strerror(call)}; free space" in str(error)
                assert reference.items() <= content(Store(tmp_path / "s")).items()
            else:  # fewer writes were left than before
                assert report.kept == 7
    assert content(Store(tmp_path / "s")) == content(Store(tmp_path / "other"))


# ---- several processes


@pytest.mark.slow
def test_two_workers_make_what_one_makes(tmp_path, scans):
    (scans / "bad.nii").write_bytes(b"")
    one = prepare_store(scans, tmp_path / "1")
    two = prepare_store(scans, tmp_path / "2", workers=2)
    assert content(Store(tmp_path / "1")) == content(Store(tmp_path / "2"))
    assert quarantined(tmp_path / "1") == quarantined(tmp_path / "2")
    same = dict(store=one.store, quarantine=one.quarantine, notes=one.notes, seconds=one.seconds)
    assert replace(two, **same) == one
    assert prepare_store(scans, tmp_path / "2", workers=2).kept == 5


def die(job):
    os._exit(1)


@pytest.mark.slow
def test_a_worker_that_dies_is_an_error_that_names_the_files_and_not_a_hang(tmp_path, scans, monkeypatch):
    monkeypatch.setattr(room, "_prepare_alone", die)
    with pytest.raises(VolumeError, match=r"a worker process died while at '.*nii.*'; out of memory\?"):
        prepare_store(scans, tmp_path / "s", workers=2)


def test_a_worker_of_a_cluster_that_dies_is_an_error_that_names_its_file(tmp_path, scans, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="needs gvsl-zoo[cluster]")

    def killed(job):
        if job.path == "b.nii.gz":
            raise distributed.KilledWorker("task", None, 3)  # as dask's future tells it
        return original(job)

    original = room._prepare_alone
    client = SimpleNamespace(nthreads=dict, get_executor=lambda pure: ThreadPoolExecutor(1))
    monkeypatch.setattr(room, "connect", lambda _: nullcontext(client))
    monkeypatch.setattr(room, "_prepare_alone", killed)
    with pytest.raises(
        VolumeError, match=r"a worker process died while at 'b.nii.gz'; out of memory\? .* goes on where"
    ):
        prepare_store(scans, tmp_path / "s", cluster="tcp://127.0.0.1:1")
    monkeypatch.setattr(room, "_prepare_alone", original)
    assert prepare_store(scans, tmp_path / "s", cluster="tcp://127.0.0.1:1").volumes == 5


DIES_AFTER_THE_FIRST = """
import multiprocessing, os, signal, sys
from pathlib import Path
from gvsl_zoo.pretrain.prepare import prepare_store
scans, store, note = sys.argv[1:]
def progress(done, total):
    Path(note).write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
    os.kill(os.getpid(), signal.SIGKILL)
prepare_store(scans, store, workers=2, progress=progress)
"""


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed_and_the_next_run_goes_on(tmp_path, scans):
    command = [sys.executable, "-c", DIES_AFTER_THE_FIRST, scans, tmp_path / "s", tmp_path / "pids"]
    assert subprocess.run(command, timeout=120).returncode == -signal.SIGKILL
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 30
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)
    report = prepare_store(scans, tmp_path / "s")
    assert report.kept >= 1 and report.volumes == 5


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_dask_cluster_makes_what_one_process_makes(tmp_path, scans):
    distributed = pytest.importorskip("distributed", reason="needs gvsl-zoo[cluster]")
    (scans / "bad.nii").write_bytes(b"")
    prepare_store(scans, tmp_path / "1")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, dashboard_address=None, local_directory=tmp_path / "dask"
    ) as cluster:
        for name in ("2", "3"):  # the workers outlive a run
            report = prepare_store(scans, tmp_path / name, cluster=cluster.scheduler_address)
            assert report.prepared == 5 and report.quarantined == 1
            assert content(Store(tmp_path / name)) == content(Store(tmp_path / "1"))
        assert prepare_store(scans, tmp_path / "3", cluster=cluster.scheduler_address).kept == 5


# ---- films


def write_film(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    image = pytest.importorskip("PIL.Image", reason="needs gvsl-zoo[io]")
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(path)


def test_films_come_back_as_they_are(tmp_path):
    random = np.random.default_rng(0)
    films = {f"{name}.png": random.integers(0, 200, (20, 30 + n)).astype(np.uint8) for n, name in enumerate("abc")}
    for (name, pixels), mode in zip(films.items(), ("L", "RGB", "LA"), strict=True):
        write_film(tmp_path / "in" / name, pixels, mode)
    report = prepare_store(tmp_path / "in", tmp_path / "s", ndim=2, unit="grey")
    store = Store(tmp_path / "s")
    assert report.volumes == 3 and (store.ndim, store.unit, store.spacing_mm) == (2, "grey", None)
    for i, pixels in enumerate(films.values()):
        np.testing.assert_array_equal(store.volume(i), pixels)
        np.testing.assert_allclose(store.crop(i, (0, 0), pixels.shape)[0], pixels / 255, atol=1e-7)


def test_films_of_16_bits_are_scaled_by_their_own_extremes(tmp_path):
    pixels = np.linspace(300, 60_000, 600).round().astype(np.uint16).reshape(20, 30)
    write_film(tmp_path / "in" / "a.png", pixels)
    with pytest.raises(VolumeError, match="a picture of 16 bits; choose the unit 'arbitrary'"):
        prepare_store(tmp_path / "in", tmp_path / "grey", ndim=2, unit="grey")
    prepare_store(tmp_path / "in", tmp_path / "s", ndim=2, unit="arbitrary")
    crop = Store(tmp_path / "s").crop(0, (0, 0), (20, 30))
    np.testing.assert_allclose(crop[0], (pixels - 300.0) / 59_700, atol=2e-5)


def test_dicom_films_are_read_one_a_file_and_turned_where_white_is_lowest(tmp_path):
    pixels = np.random.default_rng(0).integers(100, 4000, (20, 30)).astype(np.uint16)
    (tmp_path / "in").mkdir()
    write_dicom(tmp_path / "in" / "a.dcm", pixels)
    write_dicom(tmp_path / "in" / "b.dcm", pixels, b"MONOCHROME1")
    write_dicom(tmp_path / "in" / "colour.dcm", np.zeros((20, 30, 3), np.uint8))
    report = prepare_store(tmp_path / "in", tmp_path / "s", ndim=2, unit="arbitrary")
    assert (report.volumes, report.quarantined) == (2, 1) and "pictures in colour" in report.quarantine.read_text()
    plain, turned = (Store(tmp_path / "s").crop(i, (0, 0), (20, 30)) for i in range(2))
    low, high = int(pixels.min()), int(pixels.max())
    np.testing.assert_allclose(plain[0], (pixels - float(low)) / (high - low), atol=2e-5)
    np.testing.assert_allclose(turned, 1 - plain, atol=4e-5)
    with pytest.raises(VolumeError, match="a picture of more than 8 bits; choose the unit 'arbitrary'"):
        prepare_store(tmp_path / "in", tmp_path / "grey", ndim=2, unit="grey")


def test_films_are_resized_to_the_size_asked_for(tmp_path):
    columns = np.arange(64, dtype=np.uint8) * 3
    write_film(tmp_path / "in" / "a.png", np.broadcast_to(columns, (40, 64)).copy())
    prepare_store(tmp_path / "in", tmp_path / "s", ndim=2, unit="grey", size=32)
    store = Store(tmp_path / "s")
    assert store.shape(0) == (32, 32) and store.format.size == 32
    inside = store.volume(0)[:, 2:-2]
    np.testing.assert_allclose(inside, np.broadcast_to(columns.reshape(32, 2).mean(1)[2:-2], inside.shape), atol=0.5)
    with pytest.raises(ArgumentError, match=r"size=32\), not .*size=None"):
        prepare_store(tmp_path / "in", tmp_path / "s", ndim=2, unit="grey")
    with pytest.raises(ArgumentError, match="size 32 with ndim 3; give 1 or more, or None"):
        prepare_store(tmp_path / "in", tmp_path / "volumes", size=32)


def test_faulty_films_are_quarantined(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 30)).astype(np.uint8)
    write_film(tmp_path / "in" / "good.png", pixels)
    raw = (tmp_path / "in" / "good.png").read_bytes()
    middle = len(raw) // 2
    faults = {
        "cut": raw[:middle],
        "flipped": raw[:middle] + bytes([raw[middle] ^ 1]) + raw[middle + 1 :],
        "text": b"no picture",
        "empty": b"",
    }
    for name, content in faults.items():
        (tmp_path / "in" / f"{name}.png").write_bytes(content)
    write_film(tmp_path / "in" / "colour.png", np.stack([pixels, pixels, pixels // 2], -1))
    write_film(tmp_path / "in" / "black.png", pixels * 0)
    report = prepare_store(tmp_path / "in", tmp_path / "s", ndim=2, unit="grey", most_bad=0.9)
    causes = quarantined(tmp_path / "s")
    assert report.volumes == 1 and causes.keys() == {f"{name}.png" for name in [*faults, "colour", "black"]}
    assert "a picture in colour" in causes["colour.png"] and "an empty image" in causes["black.png"]
    assert all(causes.values())


# ---- DICOM


def test_a_dicom_series_becomes_a_volume_in_hu_and_ras(tmp_path):
    hu = phantom(3, (6, 16, 12))
    write_series(tmp_path / "in" / "patient" / "series", hu)
    prepare_store(tmp_path / "in", tmp_path / "s", spacing_mm=None)
    store = Store(tmp_path / "s")
    assert store.subject_names == ["patient/series"]
    first = (tmp_path / "in" / "patient" / "series" / "s1_006.dcm").read_bytes()[-2 * hu[0].size :]
    np.testing.assert_array_equal(np.frombuffer(first, "<i2"), hu[0].ravel() + 1024)  # numbers stored are not HU
    np.testing.assert_allclose(store.entries[0]["spacing_mm"], (2, 0.75, 0.5))
    np.testing.assert_array_equal(store.volume(0), np.clip(hu, -1024, 1024)[:, ::-1, ::-1])  # LPS -> RAS: y, x turn
    report = prepare_store(tmp_path / "in", tmp_path / "s", spacing_mm=None)
    assert (report.kept, report.prepared) == (1, 0)


def test_names_without_a_suffix_are_dicom_by_their_preamble(tmp_path):
    write_series(tmp_path / "in" / "x", phantom(3, (6, 16, 12)))
    for n, path in enumerate(sorted((tmp_path / "in" / "x").iterdir())):
        path.rename(path.with_name(("IM" if n % 2 else "1.2.840.") + str(n)))
    (tmp_path / "in" / "x" / "README").write_text("not a slice")
    assert prepare_store(tmp_path / "in", tmp_path / "s").volumes == 1


def test_faulty_series_are_quarantined(tmp_path):
    hu = phantom(3, (6, 16, 12))
    source = tmp_path / "in"
    for good in ("good1", "good2"):
        write_series(source / good, hu)
    write_series(source / "gap", hu, places=(0, 2, 6, 8, 10, 12))
    write_series(source / "tilted", hu, direction=(1, 0, 0, 0, 0.866025, 0.5))
    write_series(source / "two", hu, series=1)
    write_series(source / "two", hu, series=2)
    for name, keep in (("cut", 0.6), ("headless", 0.02)):
        write_series(source / name, hu)
        path = sorted((source / name).iterdir())[0]
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    (source / "fake").mkdir()
    (source / "fake" / "x.dcm").write_bytes(b"not DICOM")
    report = prepare_store(source, tmp_path / "s", most_bad=0.9)
    causes = quarantined(tmp_path / "s")
    assert report.volumes == 2 and causes.keys() == {"gap", "tilted", "two", "cut", "headless", "fake"}
    assert "the slices are unevenly spaced" in causes["gap"]
    assert "the slices are sheared by 30 degrees (gantry tilt)" in causes["tilted"]
    assert "2 DICOM series in one folder" in causes["two"]
    assert all("\n" not in cause for cause in causes.values())
    assert "1 of 6 DICOM files are damaged" in causes["headless"]
    assert "it holds no DICOM series" in causes["fake"]


@pytest.mark.parametrize(
    ("module", "name", "cause"),
    [("SimpleITK", "x/a.dcm", "a DICOM series needs SimpleITK"), ("PIL", "a.png", "a .png file needs Pillow")],
)
def test_what_needs_an_extra_says_so(tmp_path, monkeypatch, module, name, cause):
    monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / "in" / "x").mkdir(parents=True)
    (tmp_path / "in" / name).write_bytes(b"some")
    settings = {"ndim": 2, "unit": "grey"} if name.endswith("png") else {}
    with pytest.raises(VolumeError, match=rf"1 of 1 files cannot be used.*{cause}; pip install 'gvsl-zoo\[io\]'"):
        prepare_store(tmp_path / "in", tmp_path / "s", **settings)


def test_a_cluster_without_dask_says_so(tmp_path, scans, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(GvslZooError, match=r'a cluster needs distributed; pip install "gvsl-zoo\[cluster\]"'):
        prepare_store(scans, tmp_path / "s", cluster="tcp://127.0.0.1:1")


# ---- the command


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["prepare", *map(str, args)])
    return result.exit_code, result.output


def test_the_command_prepares_and_tells_what_it_did(tmp_path, scans):
    (scans / "bad.nii").write_bytes(b"")
    code, text = run("-i", scans, "-o", tmp_path / "s", "--json")
    facts = json.loads(text)
    assert code == 0 and facts["volumes"] == facts["subjects"] == 5 and facts["quarantined"] == 1
    assert facts["causes_in"] == str(tmp_path / "s" / "quarantine.jsonl") and facts["GB"] > 0
    code, text = run("-i", scans, "-o", tmp_path / "s")
    assert code == 0 and "kept         5" in text and "quarantined  1" in text


def test_the_commands_settings_reach_the_store(tmp_path, scans):
    table = write_table(tmp_path / "t.csv", [{"path": "a.nii", "subject": "A", "stratum": "x"}])
    settings = ("--own-spacing", "--unit", "arbitrary", "--table", table, "--workers", 1)
    assert run("-i", scans, "-o", tmp_path / "s", *settings)[0] == 0
    store = Store(tmp_path / "s")
    assert len(store) == 1 and store.unit == "arbitrary" and store.spacing_mm is None and store.subject_names == ["A"]
    write_film(tmp_path / "films" / "a.png", np.arange(64, dtype=np.uint8).reshape(8, 8))
    assert run("-i", tmp_path / "films", "-o", tmp_path / "f", "--ndim", 2)[0] == 0
    assert Store(tmp_path / "f").unit == "grey"
    assert run("-i", scans, "-o", tmp_path / "m", "--spacing-mm", 2)[0] == 0
    assert Store(tmp_path / "m").spacing_mm == 2


def test_the_command_fails_with_one_line(tmp_path, scans):
    (tmp_path / "empty").mkdir()
    code, text = run("-i", tmp_path / "empty", "-o", tmp_path / "s")
    assert code == 2 and text.startswith("error: ") and text.count("\n") == 1
    for path in scans.rglob("*.nii*"):
        path.write_bytes(b"")
    code, text = run("-i", scans, "-o", tmp_path / "s")
    assert code == 1 and "5 of 5 files cannot be used" in text and text.count("\n") == 1
