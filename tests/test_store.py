"""Tests of gvsl_zoo.pretrain.store: crops against the definition, cost against the number of volumes, damage named."""

from __future__ import annotations

import json
import math
import pickle
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from gvsl_zoo.errors import ArgumentError, VolumeError
from gvsl_zoo.pretrain.store import ENTRY, RANGES, Format, Store, format_facts, shard_path


def make_store(path: Path, volumes: list[np.ndarray], format: Format, entries: int | None = None) -> Path:
    """A store of these volumes by hand, in one shard; with `entries`, the index goes round them that many times."""
    (path / "shards").mkdir(parents=True)
    (path / "store.json").write_text(json.dumps(format_facts(format, "a test")))
    shard_path(path, 0).write_bytes(b"".join(volume.astype("<i2").tobytes() for volume in volumes))
    index = np.zeros(entries or len(volumes), ENTRY)
    offsets = np.cumsum([0, *(volume.size for volume in volumes)])
    for i, volume in enumerate(volumes):
        index["offset"][i :: len(volumes)] = offsets[i]
        index["shape"][i :: len(volumes)] = (1,) * (3 - volume.ndim) + volume.shape
    index["subject"] = np.arange(len(index))
    np.save(path / "index.npy", index)
    (path / "subjects.txt").write_text("".join(f"subject {i}\n" for i in range(len(index))))
    (path / "strata.txt").write_text("\n")
    return path


CT = Format(3, "HU", 1.0)
FILMS = Format(2, "grey", None)


@pytest.fixture
def volumes():
    random = np.random.default_rng(0)
    return [random.integers(-1024, 1025, shape).astype(np.int16) for shape in ((7, 8, 9), (5, 6, 4), (12, 3, 10))]


def test_volumes_come_back_as_they_were_stored_and_cannot_be_changed(tmp_path, volumes):
    store = Store(make_store(tmp_path / "s", volumes, CT))
    assert len(store) == 3 and (store.ndim, store.unit, store.spacing_mm) == (3, "HU", 1.0)
    assert store.subject_names == ["subject 0", "subject 1", "subject 2"] and store.stratum_names == [""]
    for i, volume in enumerate(volumes):
        np.testing.assert_array_equal(store.volume(i), volume)
        assert store.volume(i).dtype == np.int16 and isinstance(store.volume(i).base.base, np.memmap)
    np.testing.assert_array_equal(store.volume(-1), volumes[2])
    with pytest.raises(ValueError, match="read-only"):
        store.volume(0)[0, 0, 0] = 1
    with pytest.raises(IndexError, match="out of bounds"):
        store.volume(3)


@pytest.mark.parametrize("start", [(0, 0, 0), (2, 3, 4), (-2, 0, 5), (3, -4, -100), (7, 0, 0), (-4, 5, 6)])
@pytest.mark.parametrize("shape", [(4, 4, 4), (1, 9, 2), (20, 20, 20)])
def test_a_crop_is_the_box_of_the_volume_in_a_world_of_air(tmp_path, volumes, start, shape):
    store = Store(make_store(tmp_path / "s", volumes, CT))
    world = np.full([n + 240 for n in volumes[0].shape], -1024.0, np.float32)
    world[120:-120, 120:-120, 120:-120] = volumes[0]
    box = world[tuple(slice(120 + a, 120 + a + n) for a, n in zip(start, shape, strict=True))]
    crop = store.crop(0, start, shape)
    assert crop.shape == (1, *shape) and crop.dtype == torch.float32
    np.testing.assert_array_equal(crop[0].numpy(), (box + 1024) / 2048)


@pytest.mark.parametrize(("unit", "ndim"), [("HU", 3), ("arbitrary", 3), ("grey", 2), ("arbitrary", 2)])
def test_the_range_stored_becomes_0_to_1(tmp_path, unit, ndim):
    low, high = RANGES[unit]
    volume = np.linspace(low, high, 64).round().astype(np.int16).reshape((4,) * 3 if ndim == 3 else (8, 8))
    store = Store(make_store(tmp_path / "s", [volume], Format(ndim, unit, None)))
    crop = store.crop(0, (0,) * ndim, volume.shape)
    assert crop.min() == 0 and crop.max() == 1
    np.testing.assert_allclose(crop[0].numpy(), (volume.astype(float) - low) / (high - low), atol=1e-7)


def test_a_film_has_two_axes(tmp_path):
    films = [np.arange(30).reshape(5, 6), np.arange(8).reshape(4, 2)]
    store = Store(make_store(tmp_path / "s", films, FILMS))
    assert store.volume(1).shape == (4, 2) and store.crop(1, (-1, 0), (3, 3)).shape == (1, 3, 3)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        store.crop(1, (0, 0, 0), (1, 1, 1))


def test_opening_and_cropping_do_the_same_work_for_10_and_for_100_000_volumes(tmp_path, volumes):
    """No Python step and no memory an entry: calls are counted, allocations measured."""

    def work(path: Path) -> tuple[int, int]:
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        tracemalloc.start()
        sys.setprofile(count)
        try:
            store = Store(path)
            store.crop(len(store) - 1, (0, 0, 0), (4, 4, 4))
        finally:
            sys.setprofile(None)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return calls, peak

    paths = [make_store(tmp_path / str(n), volumes, CT, n) for n in (10, 1000, 100_000)]
    work(paths[0])  # first use imports and caches
    (calls, few), *others = (work(path) for path in paths)
    for other_calls, peak in others:
        assert other_calls == calls and peak < few + 20_000
    assert few < 200_000 < paths[2].joinpath("index.npy").stat().st_size


def test_a_store_pickles_as_its_path_and_opens_again(tmp_path, volumes):
    store = Store(make_store(tmp_path / "s", volumes, CT, 100_000))
    store.crop(5, (0, 0, 0), (2, 2, 2))
    assert len(store.subject_names) == len(store)
    packed = pickle.dumps(store)
    assert len(packed) < 500
    again = pickle.loads(packed)
    assert torch.equal(again.crop(5, (0, 0, 0), (2, 2, 2)), store.crop(5, (0, 0, 0), (2, 2, 2)))
    assert again.fingerprint == store.fingerprint


def test_the_fingerprint_tells_whether_the_volumes_are_the_same(tmp_path, volumes):
    prints = [Store(make_store(tmp_path / str(n), volumes, CT, n)).fingerprint for n in (3, 4)]
    assert prints[0] != prints[1] and len(prints[0]) == 64


def test_only_so_many_shards_are_mapped_at_a_time(tmp_path, volumes, monkeypatch):
    monkeypatch.setattr("gvsl_zoo.pretrain.store.OPEN_SHARDS", 2)
    path = make_store(tmp_path / "s", volumes[:1], CT, 5)
    index = np.load(path / "index.npy")
    index["shard"] = np.arange(5)
    np.save(path / "index.npy", index)
    for number in range(1, 5):
        shard_path(path, number).write_bytes(shard_path(path, 0).read_bytes())
    store = Store(path)
    for i in (0, 1, 2, 3, 4, 0, 2):
        np.testing.assert_array_equal(store.volume(i), volumes[0])
    assert store._files._shard.cache_info().currsize == 2


# ---- what is no store


def test_a_folder_without_a_store_is_named(tmp_path, volumes):
    with pytest.raises(VolumeError, match=r"is not a store: no store.json; make one: 'gvsl-zoo prepare'"):
        Store(tmp_path)
    path = make_store(tmp_path / "s", volumes, CT)
    (path / "index.npy").unlink()
    with pytest.raises(VolumeError, match="has no index; run 'gvsl-zoo prepare' to its end"):
        Store(path)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"x" * 500, b"PK\x03\x04", "cut", "other"])
def test_a_damaged_index_is_named(tmp_path, volumes, content):
    path = make_store(tmp_path / "s", volumes, CT)
    if content == "other":
        np.save(path / "index.npy", np.zeros(3))
    else:
        (path / "index.npy").write_bytes((path / "index.npy").read_bytes()[:-5] if content == "cut" else content)
    with pytest.raises(VolumeError, match=r"is damaged: index.npy.*; run 'gvsl-zoo prepare' on it again"):
        Store(path)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 1, "ndim": 5, "unit": "HU", "spacing_mm": 1}', "\0"])
def test_a_damaged_description_is_named(tmp_path, volumes, content):
    path = make_store(tmp_path / "s", volumes, CT)
    (path / "store.json").write_text(content)
    with pytest.raises(VolumeError, match=r"has a damaged store.json: .*; prepare it anew"):
        Store(path)


def test_a_newer_store_asks_for_an_upgrade(tmp_path, volumes):
    path = make_store(tmp_path / "s", volumes, CT)
    (path / "store.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(VolumeError, match="has version 2; upgrade gvsl-zoo"):
        Store(path)


def test_a_missing_and_a_short_shard_are_named_when_they_are_used(tmp_path, volumes):
    path = make_store(tmp_path / "s", volumes, CT)
    shard_path(path, 0).write_bytes(shard_path(path, 0).read_bytes()[:-2])
    store = Store(path)
    np.testing.assert_array_equal(store.volume(0), volumes[0])
    with pytest.raises(VolumeError, match=r"volume 2: the shard 00000.i16 ends within it"):
        store.volume(2)
    for spoil in (lambda shard: shard.write_bytes(b""), Path.unlink):
        spoil(shard_path(path, 0))
        with pytest.raises(VolumeError, match=r"is damaged: volume 0( is missing)?: .*(00000.i16|empty)"):
            Store(path).volume(0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, "HU", 1.0), "ndim 4; give 2 or 3"),
        ((3, "grey", 1.0), "unit 'grey' with ndim 3; give HU or arbitrary"),
        ((2, "HU", None), "unit 'HU' with ndim 2; give grey or arbitrary"),
        ((3, "HU", 0.0), r"spacing_mm 0.0; give positive"),
        ((3, "HU", math.nan), "spacing_mm nan; give positive"),
        ((2, "grey", 1.0), r"None \(always in 2D\)"),
    ],
)
def test_impossible_formats_are_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        Format(*arguments)
