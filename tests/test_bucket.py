"""Stores behind URLs: the same bits as from the folder, few bytes a crop, and every way in which it can fail named."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_store import CT, FILMS, make_store
from torch.utils.data import DataLoader

from benchmarks.range_server import FileServer
from gvsl_zoo.cli import main
from gvsl_zoo.errors import ArgumentError, GvslZooError, VolumeError
from gvsl_zoo.pretrain import bucket as room
from gvsl_zoo.pretrain import upload
from gvsl_zoo.pretrain.bucket import Bucket
from gvsl_zoo.pretrain.config import PretrainConfig
from gvsl_zoo.pretrain.data import Pairs, StorePairs
from gvsl_zoo.pretrain.store import HASHES, LEDGER, Store
from gvsl_zoo.pretrain.upload import upload_store
from gvsl_zoo.registry import Ledger

zarr = pytest.importorskip("zarr", reason="needs gvsl-zoo[cluster]")
fsspec = pytest.importorskip("fsspec", reason="needs gvsl-zoo[cluster]")
pytest.importorskip("aiohttp", reason="needs gvsl-zoo[cluster]")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(room, "PAUSE_S", 0.01)


@pytest.fixture
def volumes():
    """Larger and smaller than a chunk, in no axis a multiple of it, of the extremes and of one value."""
    random = np.random.default_rng(0)
    shapes = ((110, 70, 101), (5, 6, 4), (48, 49, 96))
    return [random.integers(-1024, 1025, shape).astype(np.int16) for shape in shapes] + [np.zeros((50, 50, 50), "i2")]


@pytest.fixture
def store(tmp_path, volumes):
    return named(make_store(tmp_path / "store", volumes, CT))


def named(path: Path) -> Path:
    """With a hash for each volume, as prepare writes them."""
    index = np.load(path / "index.npy")
    index["sha256"] = [f"{i:016x}" for i in range(len(index))]
    np.save(path / "index.npy", index)
    return path


@pytest.fixture
def served(tmp_path, store):
    upload_store(store, f"file://{tmp_path}/remote")
    with FileServer(tmp_path) as server:
        yield server


def shard(tmp_path: Path, i: int = 0) -> Path:
    return tmp_path / "remote" / "volumes" / f"{i:016x}" / "c" / "0" / "0" / "0"


# ---- the same bits


@pytest.mark.parametrize("scheme", ["file", "memory", "http", "simplecache"])
def test_a_store_behind_a_url_is_the_store_in_the_folder(tmp_path, store, volumes, scheme):
    local = Store(store)
    with FileServer(tmp_path) as server:
        written = f"memory://{tmp_path.name}/remote" if scheme == "memory" else f"file://{tmp_path}/remote"
        urls = {"http": f"{server.url}/remote", "simplecache": f"simplecache::{server.url}/remote"}
        upload_store(store, written, workers=3)
        remote = Store(urls.get(scheme, written))
        assert len(remote) == 4 and remote.format == local.format and remote.fingerprint == local.fingerprint
        assert remote.subject_names == local.subject_names and remote.stratum_names == local.stratum_names
        for i, volume in enumerate(volumes):
            found = remote.volume(i)
            np.testing.assert_array_equal(found, volume)
            assert found.dtype == np.int16 and not found.flags.writeable and remote.shape(i) == volume.shape
        for i, start, shape in (
            (0, (0, 0, 0), (96, 64, 96)),
            (0, (13, 5, 47), (50, 50, 50)),
            (0, (48, 48, 48), (48, 20, 48)),
            (0, (-7, 60, 90), (20, 20, 20)),
            (1, (-10, -10, -10), (30, 30, 30)),
            (2, (47, 48, 95), (1, 1, 1)),
            (3, (200, 0, 0), (4, 4, 4)),
        ):
            assert torch.equal(remote.crop(i, start, shape), local.crop(i, start, shape))


def test_a_store_behind_a_url_tells_its_scans_and_an_old_one_does_not(tmp_path, store):
    upload_store(store, f"file://{tmp_path}/remote")
    assert Store(f"file://{tmp_path}/remote").ledger == Ledger(complete=False)
    rows = np.zeros(4, HASHES)
    rows["sha256"], rows["scan_hash"] = np.load(store / "index.npy")["sha256"], np.arange(4)[:, None]
    np.save(store / LEDGER, rows)
    upload_store(store, f"file://{tmp_path}/remote")
    known = Ledger(True, tuple(f"{i:02x}" * 32 for i in range(4)))
    assert Store(f"file://{tmp_path}/remote").ledger == Store(store).ledger == known
    with FileServer(tmp_path) as server:
        assert Store(f"{server.url}/remote").ledger == known


def test_films_have_chunks_of_their_own(tmp_path):
    random = np.random.default_rng(0)
    films = [random.integers(0, 256, shape).astype(np.int16) for shape in ((300, 700), (40, 50))]
    local = named(make_store(tmp_path / "films", films, FILMS))
    upload_store(local, f"file://{tmp_path}/remote")
    remote = Store(f"file://{tmp_path}/remote")
    for i, film in enumerate(films):
        np.testing.assert_array_equal(remote.volume(i), film)
    assert torch.equal(remote.crop(0, (200, 250), (64, 300)), Store(local).crop(0, (200, 250), (64, 300)))


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_pairs_of_a_run_are_the_same_from_workers_that_read_over_http(served, store, method):
    config = PretrainConfig(4, crop=(32, 32, 32), spacing_mm=1.0, synthetic_share=0.0, ramp_steps=0)
    paths = (store, f"{served.url}/remote")
    own, remote = (Pairs(config, StorePairs(Store(path), config.crop, 1.0), 1) for path in paths)
    assert torch.equal(remote[0].fixed, own[0].fixed)  # the connection is there before the fork
    loader = DataLoader(remote, batch_size=None, num_workers=2, multiprocessing_context=method, sampler=range(6))
    for number, found in enumerate(loader):
        assert torch.equal(found.fixed, own[number].fixed) and torch.equal(found.moving, own[number].moving)


def test_what_lies_there_is_plain_zarr(served, tmp_path, volumes):
    for i, volume in enumerate(volumes):
        array = zarr.open_array(f"file://{tmp_path}/remote/volumes/{i:016x}", mode="r")
        assert array.chunks == (48, 48, 48)
        np.testing.assert_array_equal(array[...], volume)


def test_a_store_behind_a_url_pickles_as_the_url(served):
    store = Store(f"{served.url}/remote")
    store.crop(0, (0, 0, 0), (4, 4, 4))
    packed = pickle.dumps(store)
    assert len(packed) < 500 and torch.equal(
        pickle.loads(packed).crop(0, (0, 0, 0), (9, 9, 9)), store.crop(0, (0, 0, 0), (9, 9, 9))
    )


# ---- few bytes a crop


def test_a_crop_asks_for_its_own_chunks_alone_and_for_the_index_of_a_volume_once(served, tmp_path):
    store = Store(f"{served.url}/remote")
    before = len(served.requests)
    store.crop(0, (0, 0, 0), (48, 48, 48))
    (index, first), (again, second) = served.requests[before:]
    assert index == again == f"/remote/volumes/{0:016x}/c/0/0/0" and first == f"bytes=0-{16 * 3 * 2 * 3 + 3}"
    begin, end = map(int, second.removeprefix("bytes=").split("-"))
    assert end - begin < 48**3 * 2 * 1.05 < 0.2 * shard(tmp_path).stat().st_size
    store.crop(0, (0, 0, 0), (48, 48, 48))
    assert [bytes_ for _, bytes_ in served.requests[before + 2 :]] == [second]


def test_the_chunks_of_a_crop_are_asked_for_at_once(served, monkeypatch):
    monkeypatch.setattr(room, "NEAR_BYTES", -1)  # one request a chunk
    store = Store(f"{served.url}/remote")
    store.crop(0, (0, 0, 0), (4, 4, 4))
    served.delay_s, before = 0.2, len(served.requests)
    store.crop(0, (30, 30, 30), (66, 40, 66))
    assert len(served.requests) - before == served.most_at_a_time == 2 * 2 * 2


def test_a_cache_on_the_disk_answers_when_the_server_is_gone(tmp_path, store):
    upload_store(store, f"file://{tmp_path}/remote")
    with FileServer(tmp_path) as server:
        url = f"simplecache::{server.url}/remote"
        cached = Store(url)
        wanted = cached.volume(0)
    np.testing.assert_array_equal(cached.volume(0), wanted)


# ---- copying


def test_a_second_copy_sends_only_what_is_missing(tmp_path, store, volumes, monkeypatch):
    url = f"file://{tmp_path}/remote"
    first = upload_store(store, url)
    assert (first.volumes, first.sent, first.kept) == (4, 4, 0)
    grown = named(make_store(tmp_path / "grown", [*volumes, volumes[0][::-1]], CT))
    calls = []
    report = upload_store(grown, url, workers=2, progress=lambda *numbers: calls.append(numbers))
    assert (report.volumes, report.sent, report.kept) == (5, 1, 4) and calls == [(5, 5)]
    np.testing.assert_array_equal(Store(url).volume(4), volumes[0][::-1])
    shutil.rmtree(tmp_path / "remote" / "volumes" / f"{2:016x}")
    monkeypatch.setattr(upload, "BATCH", 1)
    assert upload_store(grown, url).sent == 1
    np.testing.assert_array_equal(Store(url).volume(2), volumes[2])


def test_a_content_that_came_twice_is_sent_once(tmp_path, store):
    index = np.load(store / "index.npy")
    np.save(store / "index.npy", np.concatenate([index, index[:2]]))
    report = upload_store(store, f"file://{tmp_path}/remote")
    assert (report.volumes, report.sent) == (6, 4)
    remote = Store(f"file://{tmp_path}/remote")
    np.testing.assert_array_equal(remote.volume(4), remote.volume(0))


def copy_and_die(store: Path, url: str, at: int) -> None:
    write, count = os.replace, 0

    def replace(*paths):
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*paths)

    os.replace = replace
    Path.replace = lambda self, target: replace(self, target)
    upload_store(store, url)


@pytest.mark.parametrize("at", [1, 2, 3, 7, 10, 12])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_copy_that_was_killed_goes_on_and_until_then_the_store_is_as_before(tmp_path, store, volumes, at):
    url = f"file://{tmp_path}/remote"
    process = multiprocessing.get_context("fork").Process(target=copy_and_die, args=(store, url, at))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(VolumeError, match=r"is not a store: no store.json|has no index; run 'gvsl-zoo prepare'"):
        Store(url)
    upload_store(store, url)
    for i, volume in enumerate(volumes):
        np.testing.assert_array_equal(Store(url).volume(i), volume)


def test_a_store_of_another_format_is_not_mixed(tmp_path, store):
    films = named(make_store(tmp_path / "films", [np.ones((9, 9))], FILMS))
    upload_store(store, f"file://{tmp_path}/remote")
    with pytest.raises(ArgumentError, match=r"ndim=3, .*not Format\(ndim=2, .*; choose another URL"):
        upload_store(films, f"file://{tmp_path}/remote")


@pytest.mark.parametrize(("url", "workers"), [("somewhere/else", 1), ("memory://x", 0)])
def test_a_copy_needs_a_url_and_workers(store, url, workers):
    with pytest.raises(ArgumentError, match=r"give a URL such as s3://bucket/store, and at least 1"):
        upload_store(store, url, workers=workers)


# ---- what fails


@pytest.mark.parametrize("url", ["file:///nowhere/at/all", "memory://nothing", "http://127.0.0.1:{port}/nothing"])
def test_a_url_without_a_store_is_named(served, url):
    url = url.format(port=served.server_address[1])
    with pytest.raises(VolumeError, match=rf"'{url}' is not a store: no store.json; make one"):
        Store(url)


def test_a_url_that_nothing_opens_is_named():
    with pytest.raises(ArgumentError, match="nope://a cannot be opened: Protocol not known: nope; install fsspec's"):
        Store("nope://a")


def test_without_the_extra_the_error_says_so(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "google_crc32c", None)
    with pytest.raises(GvslZooError, match=r'memory://x needs google_crc32c; pip install "gvsl-zoo\[cluster\]"'):
        Store("memory://x")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(at: int):
    def spoil(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 4
        path.write_bytes(content)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            Path.unlink,
            r"is damaged: volume 0 is missing: \S+/volumes/0{16}/c/0/0/0; copy the store there again",
        ),
        (cut, r"is damaged: volume 0: volumes/0000000000000000/c/0/0/0 ends before byte \d+; copy"),
        (flip(5), r"volume 0: volumes/0000000000000000/c/0/0/0: its index of chunks has another checksum"),
        (flip(-50), r"volume 0: volumes/0000000000000000/c/0/0/0: chunk \(\d, \d, \d\) has another checksum"),
        (lambda path: path.write_bytes(b""), r"ends before byte 292|cannot read .*416"),
    ],
)
@pytest.mark.parametrize("scheme", ["file", "http"])
def test_a_damaged_volume_is_named_and_the_others_are_read(served, tmp_path, volumes, spoil, message, scheme):
    store = Store(f"file://{tmp_path}/remote" if scheme == "file" else f"{served.url}/remote")
    spoil(shard(tmp_path))
    with pytest.raises(VolumeError, match=message):
        store.volume(0)
    np.testing.assert_array_equal(store.volume(1), volumes[1])


def test_a_chunk_that_a_writer_left_out_is_damage_and_not_air(served, tmp_path):
    path = shard(tmp_path)
    array = zarr.open_array(path.parents[3], mode="r+")
    array[:48, :48, :48] = 0  # chunks of the fill value are left out
    with pytest.raises(VolumeError, match=r"volume 0: volumes/0000000000000000/c/0/0/0 lacks chunks; copy the store"):
        Store(f"file://{tmp_path}/remote").volume(0)


@pytest.mark.parametrize("content", [b"", b"x" * 500])
def test_a_damaged_index_is_named(served, tmp_path, content):
    (tmp_path / "remote" / "index.npy").write_bytes(content)
    with pytest.raises(VolumeError, match=r"is damaged: index.npy: .*; copy the store there again"):
        Store(f"{served.url}/remote")


def test_a_server_that_ignores_ranges_is_named(served):
    served.ranges = False
    with pytest.raises(VolumeError, match="its server ignores byte ranges; use one that knows them"):
        Store(f"{served.url}/remote").crop(0, (0, 0, 0), (4, 4, 4))


def test_a_server_that_fails_now_and_then_is_asked_again(served):
    store = Store(f"{served.url}/remote")
    served.failures = 2
    assert store.crop(0, (0, 0, 0), (4, 4, 4)).shape == (1, 4, 4, 4)
    served.failures = 100
    with pytest.raises(VolumeError, match=r"cannot read http://.*503.*; check the network and the credentials"):
        store.crop(1, (0, 0, 0), (4, 4, 4))
    assert served.failures == 97


def test_a_network_that_goes_amid_a_run_ends_it_with_its_cause(tmp_path, store, monkeypatch):
    monkeypatch.setattr(room, "TIMEOUT_S", 0.5)
    upload_store(store, f"file://{tmp_path}/remote")
    config = PretrainConfig(4, crop=(32, 32, 32), spacing_mm=1.0, synthetic_share=0.0, ramp_steps=0)
    with FileServer(tmp_path) as server:
        pairs = Pairs(config, StorePairs(Store(f"{server.url}/remote"), config.crop, 1.0), 1)
        loader = iter(DataLoader(pairs, batch_size=None, num_workers=1, prefetch_factor=1, sampler=range(9)))
        next(loader)
    with pytest.raises(VolumeError, match=r"cannot read http://127.0.0.1.*; check the network and the credentials"):
        list(loader)


def test_a_server_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(room, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/store"
        with pytest.raises(VolumeError, match=rf"cannot read {url}/store.json: .*no answer in time; check the net"):
            Store(url)


def test_what_cannot_be_written_is_named(served, store, monkeypatch):
    with pytest.raises(VolumeError, match=r"cannot write http://.*/new/store.json: .*; check the network and the cred"):
        upload_store(store, f"{served.url}/new")

    def refuse(*_: object) -> None:  # as S3 does where there is no bucket
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "pipe_file", refuse)
    with pytest.raises(VolumeError, match=r"cannot write memory://.*/store.json: .*bucket does not exist; check"):
        upload_store(store, "memory://bucket-that-is-not")


# ---- the commands


@pytest.mark.slow
def test_the_commands_copy_a_store_and_train_from_its_url(tmp_path, store):
    pytest.importorskip("accelerate", reason="needs gvsl-zoo[train]")

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(main, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.output

    url = f"file://{tmp_path}/remote"
    facts = json.loads(run("prepare", "-i", store, "-o", url, "--workers", 2, "--json"))
    assert (facts["url"], facts["volumes"], facts["sent"]) == (url, 4, 4)
    settings = ["spacing_mm=1", "synthetic_share=0", "ramp_steps=0", "affine_width=8", "bf16=false"]
    settings = [part for setting in settings for part in ("--set", setting)]
    for name, data in (("a", store), ("b", url)):
        run("pretrain", "--data", data, "--out", tmp_path / name, "--steps", 1, "--crop", 16, "--workers", 0, *settings)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("a", "b")
    ]
    assert losses[0] == losses[1]


def test_the_command_names_what_is_no_store(tmp_path):
    result = CliRunner().invoke(main, ["prepare", "-i", str(tmp_path), "-o", "memory://x"])
    assert result.exit_code == 1 and "is not a store: no store.json" in result.output
    assert Bucket("memory://x").volumes() == set()


def test_what_is_prepared_during_an_upload_is_left_for_the_next(tmp_path, store, volumes, monkeypatch):
    index, sent = np.load(store / "index.npy"), []

    def prepared_meanwhile(bucket, entry, volume):
        if not sent:
            np.save(store / "index.npy", np.concatenate([index, index[:1]]))
        sent.append(write_volume(bucket, entry, volume))

    write_volume = room.Bucket.write_volume
    monkeypatch.setattr(room.Bucket, "write_volume", prepared_meanwhile)
    upload_store(store, f"file://{tmp_path}/remote")
    assert len(sent) == len(volumes)
    np.testing.assert_array_equal(np.load(tmp_path / "remote" / "index.npy"), index)
