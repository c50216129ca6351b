"""Tests of where a model comes from: the order of its sources, what each failure says, bundles and mirrors, kills."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import replace

import hub_server
import pytest
import safetensors.torch
import torch
from drive_server import DriveServer
from drive_server import file as drive_file
from filelock import FileLock
from hub_server import Hub

from gvsl_zoo import bundle, cache, download, drive, registry, sources
from gvsl_zoo.errors import ArgumentError, RegistryError, SourceError, WeightsError
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.registry import Source, model_info
from gvsl_zoo.sources import Access, SourceNotice, export_bundle, import_bundle, locate
from gvsl_zoo.weights import WEIGHTS_NAME, open_weights, write_weights
from gvsl_zoo.zoo import load

NANO = "gvsl-unet-ct-nano"
NANO_SHA256 = model_info(NANO).sources[0].sha256
NANO_FILE = sources.EMBEDDED / model_info(NANO).sources[0].file
THEIRS = "gvsl-unet-ct"  # upstream, with no hash
REPO = "org/model"
OFFLINE = Access(local_files_only=True)


@pytest.fixture(autouse=True)
def a_home_and_a_registry_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_added", {})


@pytest.fixture
def without_embedded(tmp_path, monkeypatch):
    """The package holds no weights."""
    (tmp_path / "embedded").mkdir()
    monkeypatch.setattr(sources, "EMBEDDED", tmp_path / "embedded")
    return tmp_path / "embedded"


@pytest.fixture
def server(monkeypatch):
    with Hub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def authors(monkeypatch):
    server = DriveServer()
    monkeypatch.setattr(drive, "ORIGIN", server.url())
    monkeypatch.setattr(drive, "HOSTS", ("127.0.0.1",))
    yield server
    server.close()


def narrow(seed=0):
    return UNet(width=8, generator=torch.Generator().manual_seed(seed)).state_dict()


def sha256_of(content):
    return hashlib.sha256(content).hexdigest()


def add(name, *places, **changes):
    """A model of one's own with these sources."""
    entry = replace(model_info(NANO), name=name, sources=places, **changes)
    registry._added[name] = entry
    return entry


@pytest.fixture
def everywhere(without_embedded, server, authors, tmp_path, monkeypatch):
    """A model that lies in all five places; ours is one file, the authors' another."""
    ours = tmp_path / "ours.safetensors"
    write_weights({"a": torch.arange(1000.0)}, ours, {})
    content = ours.read_bytes()
    torch.save(narrow(), tmp_path / "theirs.pth")
    theirs = (tmp_path / "theirs.pth").read_bytes()
    commit = server.add(REPO, {WEIGHTS_NAME: content})
    authors.answers = [drive_file(theirs)]
    sha256 = sha256_of(content)
    entry = add(
        "mine",
        Source("embedded", file="mine.safetensors", sha256=sha256),
        Source("hub", repo=REPO, file=WEIGHTS_NAME, revision=commit, bytes=len(content), sha256=sha256),
        Source("gdrive", id="abcdefghij", file="theirs.pth", bytes=len(theirs), sha256=sha256_of(theirs)),
    )
    (without_embedded / "mine.safetensors").write_bytes(content)
    (tmp_path / "mirror").mkdir()
    bundle.write(tmp_path / "mirror" / "mine.safetensors", open_weights(ours), entry, "card")
    stored = cache.stored_path(sha256)
    stored.parent.mkdir(parents=True)
    stored.write_bytes(content)
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(tmp_path / "mirror"))
    monkeypatch.setattr(download, "READ_SECONDS", 0.5)
    return entry


def break_file(path):
    path.write_bytes(b"<html>")


# --- The order of places ----------------------------------------------------------------------------------------------


def test_places_are_tried_in_order_and_the_failed_ones_are_named(everywhere, server, authors, tmp_path):
    stored = cache.stored_path(everywhere.sources[0].sha256)
    mirrored = tmp_path / "mirror" / "mine.safetensors"

    def found_with(notice):
        with pytest.warns(SourceNotice) as notices:
            found = locate(everywhere)
        assert any(notice in str(one.message) for one in notices), [str(one.message) for one in notices]
        return found

    assert locate(everywhere).file.path == sources.EMBEDDED / "mine.safetensors"
    (sources.EMBEDDED / "mine.safetensors").unlink()
    found = found_with(f"mine came from cache (embedded: there is no file {sources.EMBEDDED}")
    assert found.file.path == stored and server.log == authors.log == []
    break_file(stored)
    found = found_with(f"mine came from mirror {mirrored.parent} (embedded: there is no file")
    assert found.file.path == stored and stored.stat().st_size > 4000 and server.log == authors.log == []
    break_file(stored)
    break_file(mirrored)
    found = found_with("mine came from the Hub (embedded: ")
    assert "models--org--model" in str(found.file.path) and server.log and authors.log == []
    shutil.rmtree(cache.hub_folder())
    server.fault = hub_server.status(404)
    found = found_with("mine came from Google Drive (embedded: ")
    assert found.file.path == cache.upstream_folder("mine") / WEIGHTS_NAME and authors.log


def test_the_notice_names_each_failed_place_with_its_cause(everywhere, tmp_path):
    (sources.EMBEDDED / "mine.safetensors").unlink()
    break_file(cache.stored_path(everywhere.sources[0].sha256))
    break_file(tmp_path / "mirror" / "mine.safetensors")
    mirror = tmp_path / "mirror"
    match = rf"from the Hub \(embedded: .* no file .*; cache: .* web page; mirror {mirror}: .* web page\)"
    with pytest.warns(SourceNotice, match=match):
        locate(everywhere)


def test_the_first_place_is_taken_without_a_word(everywhere, server, authors, recwarn):
    assert locate(everywhere).sha256 == everywhere.sources[0].sha256
    assert not recwarn.list and server.log == authors.log == []


def test_when_all_places_fail_each_is_named_with_its_cause_in_seconds(everywhere, server, authors, tmp_path):
    (sources.EMBEDDED / "mine.safetensors").unlink()
    break_file(cache.stored_path(everywhere.sources[0].sha256))
    break_file(tmp_path / "mirror" / "mine.safetensors")
    server.stop()
    authors.close()
    started = time.monotonic()
    with pytest.raises(SourceError, match=r"mine could not be had") as caught:
        locate(everywhere)
    assert time.monotonic() - started < 8
    causes = caught.value.cause
    places = (
        "embedded: there is no file",
        "cache: ",
        "mirror ",
        "the Hub ",
        "Google Drive ",
    )
    positions = [causes.index(place) for place in places]
    assert positions == sorted(positions) and causes.count("cache: ") == 1 and "or a bundle" in caught.value.remedy


def test_offline_the_local_places_serve_and_the_remote_ones_are_named(everywhere, server, authors, monkeypatch):
    assert locate(everywhere, OFFLINE).sha256 == everywhere.sources[0].sha256
    (sources.EMBEDDED / "mine.safetensors").unlink()
    cache.stored_path(everywhere.sources[0].sha256).unlink()
    with pytest.warns(SourceNotice, match=r"came from mirror"):
        locate(everywhere, OFFLINE)
    cache.stored_path(everywhere.sources[0].sha256).unlink()
    monkeypatch.delenv("GVSL_ZOO_REGISTRY")
    match = "the Hub: .*is not in the cache, and the network is not allowed; Google Drive: mine is not in the cache"
    with pytest.raises(SourceError, match=match):
        locate(everywhere, OFFLINE)
    assert server.log == authors.log == []


def test_a_planned_model_is_refused_with_what_comes_nearest():
    with pytest.raises(SourceError, match=rf"gvsl-xmorpher-ct is planned: .*; the nearest is '{NANO}' .available"):
        locate(model_info("gvsl-xmorpher-ct"))


def test_a_planned_model_without_a_neighbour_points_to_the_list():
    entry = add("nothing", status="planned", instead=None)
    with pytest.raises(SourceError, match=r"nothing is planned: .*; see gvsl_zoo.list_models\(available=True\)"):
        locate(entry)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.safetensors", True),
        ("a/b", True),
        ("./a", True),
        (".", True),
        ("..", True),
        ("hf-hub:a/b", False),
        (NANO, False),
    ],
)
def test_a_name_with_a_separator_is_a_path(name, expected):
    assert sources.is_path(name) is expected


# --- Bundles ----------------------------------------------------------------------------------------------------------


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def nano_bundle(tmp_path):
    """The embedded model as a bundle."""
    path = tmp_path / "carried.safetensors"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sources, "EMBEDDED", NANO_FILE.parent)
        return export_bundle(NANO, path)


def stored():
    """What our own folder holds beside seals and locks."""
    own = cache.own_folder()
    return sorted(
        str(path.relative_to(own))
        for path in own.rglob("*")
        if path.is_file() and path.name != ".lock" and path.parent.name != "seals"
    )


def test_a_bundle_brings_a_model_to_a_machine_that_lacks_it(nano_bundle, without_embedded):
    with pytest.raises(SourceError, match=r"could not be had"):
        load(NANO)
    name, found = import_bundle(nano_bundle)
    assert (name, found.sha256) == (NANO, NANO_SHA256)
    with pytest.warns(SourceNotice, match=rf"{NANO} came from cache"):
        model = load(NANO, task="pretraining", local_files_only=True)
    assert same_state(model, load(nano_bundle, task="pretraining"))
    assert model.load_report.sha256 == NANO_SHA256


def test_an_imported_file_is_the_original_byte_for_byte(nano_bundle):
    _, found = import_bundle(nano_bundle)
    assert found.file.path.read_bytes() == NANO_FILE.read_bytes() and found.file.path == cache.stored_path(NANO_SHA256)
    assert nano_bundle.read_bytes() != NANO_FILE.read_bytes()


def test_a_bundle_loads_by_its_path(nano_bundle):
    model, embedded = load(nano_bundle, task="pretraining"), load(NANO, task="pretraining")
    assert same_state(model, embedded) and model.entry == embedded.entry
    assert load(str(nano_bundle)).entry.name == NANO


def test_a_bundle_carries_the_card(nano_bundle):
    card = open_weights(nano_bundle).metadata[bundle.CARD_KEY]
    assert NANO in card and "license" in card


def test_importing_twice_changes_nothing(nano_bundle):
    import_bundle(nano_bundle)
    before = stored()
    assert import_bundle(nano_bundle)[1].sha256 == NANO_SHA256
    assert stored() == before == [f"weights/{NANO_SHA256}.safetensors"]


def test_an_import_mends_a_damaged_file(nano_bundle, without_embedded):
    path = import_bundle(nano_bundle)[1].file.path
    break_file(path)
    import_bundle(nano_bundle)
    assert path.read_bytes() == NANO_FILE.read_bytes()


def test_a_bundle_may_go_into_a_cache_of_ones_own(nano_bundle, without_embedded, tmp_path):
    import_bundle(nano_bundle, tmp_path / "mine")
    assert stored() == []
    with pytest.warns(SourceNotice, match=r"came from cache"):
        assert load(NANO, cache_dir=tmp_path / "mine", local_files_only=True).entry.name == NANO


def test_a_plain_file_survives_the_journey_byte_for_byte(tmp_path):
    plain = tmp_path / "plain.safetensors"
    safetensors.torch.save_file(narrow(), plain)
    content = plain.read_bytes()
    assert b"__metadata__" not in content
    add("plain", Source("file", path=str(plain), sha256=sha256_of(content)), heads=(), parameters=1_472_952)
    carried = export_bundle("plain", tmp_path / "carried.safetensors")
    plain.unlink()
    found = import_bundle(carried)[1]
    assert found.file.path.read_bytes() == content
    with pytest.warns(SourceNotice, match=r"plain came from cache"):
        model = load("plain")
    assert all(torch.equal(tensor, narrow()[name]) for name, tensor in model.state_dict().items())


def test_a_bundle_of_a_bundle_carries_the_same_model(nano_bundle, without_embedded, tmp_path):
    import_bundle(nano_bundle)
    with pytest.warns(SourceNotice, match=r"came from cache"):
        again = export_bundle(NANO, tmp_path / "again.safetensors")
    assert again.read_bytes() == nano_bundle.read_bytes()


@pytest.mark.parametrize(
    ("output", "match"),
    [
        ("there.safetensors", "there.safetensors exists already; choose another name, or pass overwrite=True"),
        ("new.bin", "new.bin is no folder and does not end in .safetensors; give one or the other"),
        ("new", "new is no folder and does not end in .safetensors"),
        ("no/new.safetensors", "the folder .*no does not exist; make it first"),
    ],
)
def test_a_place_where_no_bundle_can_go_is_refused(output, match, tmp_path):
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    with pytest.raises((ArgumentError, WeightsError), match=match):
        export_bundle(NANO, tmp_path / output)
    assert (tmp_path / "there.safetensors").read_bytes() == b"mine" and not (tmp_path / "no").exists()


def test_a_bundle_is_replaced_when_asked_to(tmp_path):
    path = tmp_path / f"{NANO}.safetensors"
    path.write_bytes(b"old")
    assert export_bundle(NANO, tmp_path, overwrite=True) == path and load(path).entry.name == NANO


def test_a_file_is_not_exported_over_itself(tmp_path):
    path = tmp_path / "mine.safetensors"
    safetensors.torch.save_file(narrow(), path)
    before = path.read_bytes()
    place = Source("file", path=str(path), sha256=sha256_of(before))
    add("mine", place, heads=(), config={"ndim": 3, "width": 8}, parameters=1_472_952)
    with pytest.raises(WeightsError, match=r"is the file that is to be exported; choose another place"):
        export_bundle("mine", tmp_path, overwrite=True)
    assert path.read_bytes() == before


def test_any_file_whose_hash_the_registry_knows_can_be_imported(without_embedded, tmp_path):
    plain = tmp_path / "as-it-lies-in-a-clone.safetensors"
    shutil.copy(NANO_FILE, plain)
    with pytest.raises(SourceError, match="there is no file"):
        load(NANO, local_files_only=True)
    assert import_bundle(plain)[0] == NANO and load(NANO, local_files_only=True).entry.name == NANO


def test_a_model_that_cannot_be_had_is_not_exported(without_embedded, tmp_path):
    with pytest.raises(SourceError, match=r"there is no file"):
        export_bundle(NANO, tmp_path)
    with pytest.raises(RegistryError, match=r"unknown model 'nothing'"):
        export_bundle("nothing", tmp_path)
    with pytest.raises(SourceError, match=r"is planned"):
        export_bundle("gvsl-xmorpher-ct", tmp_path)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_a_disk_that_takes_no_bundle_is_told_and_nothing_is_left(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(SourceError, match=r"cannot write .*carried.safetensors: File too large; choose another"):
            export_bundle(NANO, tmp_path / "carried.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == []


def rewrite(path, *, data=None, **metadata):
    """A bundle with other metadata (None: without) or data."""
    file = open_weights(path)
    tensors = {name: file.tensor(name).clone() for name in file.slots}
    if data:
        tensors[data].view(-1)[0] += 1
    changed = {key: value for key, value in {**file.metadata, **metadata}.items() if value is not None}
    del file
    write_weights(tensors, path, changed)


def entry_named(path, name):
    return json.dumps(json.loads(open_weights(path).metadata["gvsl_zoo"]) | {"name": name})


def cut(path):
    os.truncate(path, path.stat().st_size - 1000)


def other_header(path):
    original = json.loads(open_weights(path).metadata[bundle.ORIGINAL_KEY])
    original["extra"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    rewrite(path, gvsl_zoo_original=json.dumps(original))


@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (lambda path: rewrite(path, data="fc_rot.bias"), WeightsError, f"holds sha256 .*; {NANO} is {NANO_SHA256}"),
        (other_header, WeightsError, "holds sha256"),
        (
            lambda path: rewrite(path, gvsl_zoo_original=None),
            WeightsError,
            "is no bundle; make one with",
        ),
        (lambda path: rewrite(path, gvsl_zoo_original="{"), WeightsError, "holds sha256"),
        (lambda path: rewrite(path, gvsl_zoo_original=""), WeightsError, "holds sha256"),
        (lambda path: rewrite(path, gvsl_zoo=None), WeightsError, "is no bundle"),
        (lambda path: rewrite(path, gvsl_zoo="{"), WeightsError, "is no bundle"),
        (lambda path: rewrite(path, gvsl_zoo="[]"), WeightsError, "is no bundle"),
        (lambda path: rewrite(path, gvsl_zoo="[" * 100_000), WeightsError, "is no bundle"),
        (lambda path: rewrite(path, gvsl_zoo=entry_named(path, "unknown")), RegistryError, "unknown model 'unknown'"),
        (lambda path: rewrite(path, gvsl_zoo=entry_named(path, "../x")), RegistryError, "unknown model '../x'"),
        (lambda path: rewrite(path, gvsl_zoo=entry_named(path, 7)), RegistryError, "unknown model '7'"),
        (
            lambda path: rewrite(path, gvsl_zoo=entry_named(path, "gvsl-xmorpher-ct")),
            WeightsError,
            "gvsl-xmorpher-ct is a checkpoint of its authors|gvsl-xmorpher-ct is planned",
        ),
        (cut, WeightsError, "has [0-9]+ bytes, its header tells of"),
        (lambda path: os.truncate(path, 0), WeightsError, "is not a weights file"),
        (lambda path: safetensors.torch.save_file(narrow(), path), WeightsError, "is no bundle"),
        (
            lambda path: path.write_bytes(b"PK\x03\x04" + b"x" * 99),
            WeightsError,
            "looks like a PyTorch .pth",
        ),
        (lambda path: path.unlink(), WeightsError, "cannot be read: No such file"),
    ],
    ids=[
        "data",
        "header",
        "no_header",
        "cut_header",
        "header_list",
        "no_entry",
        "cut_entry",
        "entry_list",
        "deep_entry",
        "unknown",
        "path",
        "number",
        "planned",
        "truncated",
        "empty",
        "plain",
        "zip",
        "missing",
    ],
)
def test_a_wrong_bundle_is_refused_and_nothing_is_stored(damage, error, match, nano_bundle):
    damage(nano_bundle)
    with pytest.raises(error, match=match):
        import_bundle(nano_bundle)
    assert stored() == []


def test_a_bundle_of_another_model_than_the_one_asked_for_is_refused(nano_bundle):
    with pytest.raises(WeightsError, match=rf"carried.safetensors holds {NANO}, not {THEIRS}; rename it, or export it"):
        import_bundle(nano_bundle, name=THEIRS)
    assert stored() == []


# --- Bundles of the authors' checkpoints ------------------------------------------------------------------------------


def theirs(seed, folder):
    """A registry entry of theirs, and its checkpoint as it was converted here; the checkpoint's tensors."""
    checkpoint = folder / f"theirs{seed}.pth"
    torch.save(narrow(seed), checkpoint)
    sources.adopt(model_info("theirs"), checkpoint)
    return narrow(seed)


@pytest.fixture
def upstream_bundle(tmp_path, monkeypatch):
    """A converted checkpoint as a bundle, and a machine that lacks it; the bundle, its tensors."""
    source = Source("gdrive", id="abcdefghij", file="theirs.pth", bytes=30_000_000, pinned=False)
    add("theirs", source, status="upstream", heads=(), config={"ndim": 3, "width": 8}, parameters=1_472_952)
    tensors = theirs(0, tmp_path)
    carried = export_bundle("theirs", tmp_path / "carried.safetensors")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
    return carried, tensors


def test_a_bundle_of_the_authors_checkpoint_brings_it_with_its_record(upstream_bundle):
    carried, tensors = upstream_bundle
    with pytest.raises(SourceError, match=r"theirs is not in the cache, and the network is not allowed"):
        load("theirs", local_files_only=True)
    assert import_bundle(carried)[0] == "theirs"
    model = load("theirs", local_files_only=True)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert stored() == ["upstream/theirs/model.safetensors", "upstream/theirs/record.json"]


def test_another_model_does_not_pass_for_the_authors(tmp_path, monkeypatch):
    (tmp_path / "mirror").mkdir()
    forged, file = tmp_path / "mirror" / "gvsl-unet-ct.safetensors", open_weights(NANO_FILE)
    record = {"sha256": "0" * 64, "safetensors": sha256_of(NANO_FILE.read_bytes()), "first_seen": "yesterday"}
    bundle.write(forged, file, model_info("gvsl-unet-ct"), "card", record)
    with pytest.raises(WeightsError, match=r"holds as gvsl-unet-ct has width 8, gvsl-unet-ct has 32; ask"):
        import_bundle(forged)
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(tmp_path / "mirror"))
    with pytest.raises(SourceError, match="has width 8, gvsl-unet-ct has 32"):
        load("gvsl-unet-ct", local_files_only=True)
    assert stored() == []
    bundle.write(forged, file, model_info("gvsl-unet-ct"), "card", record | {"sha256": "no hash"})
    with pytest.raises(WeightsError, match="is no bundle"):
        import_bundle(forged)


def test_what_a_mirror_brought_once_is_not_brought_again(upstream_bundle, tmp_path, monkeypatch):
    (tmp_path / "mirror").mkdir()
    shutil.move(upstream_bundle[0], tmp_path / "mirror" / "theirs.safetensors")
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(tmp_path / "mirror"))
    load("theirs")
    path = cache.upstream_folder("theirs") / WEIGHTS_NAME
    before = path.stat()
    load("theirs")
    assert path.stat() == before


def test_a_bundle_carries_no_path_of_the_machine_it_was_made_on(tmp_path):
    source = tmp_path / "source.safetensors"
    safetensors.torch.save_file(narrow(), source)
    place = Source("file", path=str(source), sha256=sha256_of(source.read_bytes()))
    add("ours", place, heads=(), config={"ndim": 3, "width": 8}, parameters=1_472_952)
    carried = export_bundle("ours", tmp_path / "carried.safetensors")
    assert str(tmp_path).encode() not in carried.read_bytes()
    assert load(carried).entry.name == "ours"


def test_a_bundle_of_another_checkpoint_than_the_one_seen_first_is_refused(upstream_bundle, tmp_path):
    tensors = theirs(1, tmp_path)
    with pytest.raises(WeightsError, match=r"theirs has sha256 .*; the one seen first \(20.*cache remove theirs"):
        import_bundle(upstream_bundle[0])
    model = load("theirs", local_files_only=True)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


RECORD = "gvsl_zoo_record"


def header_twice(path):
    """Each tensor is told of twice, and the record agrees."""
    file = open_weights(path)
    header = file.metadata[bundle.ORIGINAL_KEY].strip()
    header = header[:-1] + "," + header[1:]
    whole = len(header).to_bytes(8, "little") + header.encode() + bytes(file.data)
    record = json.loads(file.metadata[RECORD]) | {"safetensors": sha256_of(whole)}
    del file
    rewrite(path, gvsl_zoo_original=header, **{RECORD: json.dumps(record)})


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: rewrite(path, **{RECORD: None}),
        lambda path: rewrite(path, **{RECORD: "{"}),
        lambda path: rewrite(path, **{RECORD: "[1]"}),
        lambda path: rewrite(path, **{RECORD: '"text"'}),
        lambda path: rewrite(path, **{RECORD: json.dumps({"sha256": "0" * 64})}),
        lambda path: rewrite(path, data=next(iter(open_weights(path).slots))),
        other_header,
        header_twice,
    ],
    ids=["none", "cut", "list", "text", "without_hash", "data", "header", "header_twice"],
)
@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_a_wrong_bundle_of_the_authors_checkpoint_is_refused_and_nothing_is_lost(
    damage, there, upstream_bundle, tmp_path
):
    carried, _ = upstream_bundle
    if there:
        theirs(0, tmp_path)
    before = {name: (cache.own_folder() / name).read_bytes() for name in stored()}
    assert len(before) == 2 * there
    damage(carried)
    with pytest.raises(WeightsError, match=r"is no bundle|holds a damaged file|is a checkpoint of its authors"):
        import_bundle(carried)
    assert {name: (cache.own_folder() / name).read_bytes() for name in stored()} == before


# --- Mirrors ----------------------------------------------------------------------------------------------------------


def test_a_folder_of_bundles_is_a_mirror(without_embedded, nano_bundle, tmp_path, monkeypatch):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    nano_bundle.rename(mirror / f"{NANO}.safetensors")
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(mirror))
    with pytest.warns(SourceNotice, match=rf"{NANO} came from mirror {mirror}"):
        model = load(NANO, local_files_only=True)
    assert model.load_report.sha256 == NANO_SHA256
    shutil.rmtree(mirror)
    monkeypatch.delenv("GVSL_ZOO_REGISTRY")
    with pytest.warns(SourceNotice, match=rf"{NANO} came from cache"):
        assert same_state(load(NANO, local_files_only=True), model)


MIRRORED = """\
schema_version: 1
models:
  ours:
    summary: formula weights
    status: available
    architecture: unet
    config: {{ndim: 3, width: 8}}
    ndim: 3
    modality: CT
    objective: gvsl
    parameters: 1472952
    input: {{axes: zyx, intensity: {{unit: HU, window: [-1024, 1024], scale: [0, 1]}}}}
    heads: []
    sources: [{{kind: hub, repo: no/where, revision: "{commit}", file: x.safetensors, bytes: 1, sha256: "{sha256}"}}]
    licence: {{code: MIT, weights: MIT, data: none}}
    citation: nobody
"""


def test_a_mirror_may_bring_a_registry_of_its_own(tmp_path, monkeypatch, recwarn):
    plain, mirror = tmp_path / "plain.safetensors", tmp_path / "mirror"
    safetensors.torch.save_file(narrow(), plain)
    mirror.mkdir()
    sha256 = sha256_of(plain.read_bytes())
    (mirror / "weights_registry.yaml").write_text(MIRRORED.format(commit="0" * 40, sha256=sha256))
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(mirror))
    with pytest.raises(SourceError, match=r"the Hub: no/where@000000000000: x.safetensors is not in the cache"):
        load("ours", local_files_only=True)
    entry = model_info("ours")
    bundle.write(mirror / "ours.safetensors", open_weights(plain), entry, "card")
    model = load("ours")
    assert model.load_report.sha256 == sha256 and model.entry.name == "ours" and not recwarn.list
    assert all(torch.equal(tensor, narrow()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("what", ["other_model", "other_bytes", "plain", "cut"])
def test_a_mirror_with_a_wrong_bundle_is_passed_over(what, without_embedded, nano_bundle, tmp_path, monkeypatch):
    damage = {
        "other_model": lambda path: rewrite(path, gvsl_zoo=entry_named(path, THEIRS)),
        "other_bytes": lambda path: rewrite(path, data="fc_rot.bias"),
        "plain": lambda path: shutil.copy(NANO_FILE, path),
        "cut": cut,
    }[what]
    damage(nano_bundle)
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    nano_bundle.rename(bad / f"{NANO}.safetensors")
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(bad))
    with pytest.raises(SourceError, match=rf"embedded: there is no file .*; mirror {bad}: "):
        load(NANO)
    assert stored() == []
    (without_embedded / NANO_FILE.name).symlink_to(NANO_FILE)
    export_bundle(NANO, good)
    (without_embedded / NANO_FILE.name).unlink()
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", f"{bad}{os.pathsep}{good}")
    with pytest.warns(SourceNotice, match=rf"came from mirror {good} .*mirror {bad}: "):
        assert load(NANO).load_report.sha256 == NANO_SHA256


@pytest.mark.parametrize("whose", ["ours", "the authors'"])
def test_a_mirror_serves_a_machine_whose_cache_cannot_be_written(whose, tmp_path, monkeypatch, request):
    bundle_of, name = {"ours": ("nano_bundle", NANO), "the authors'": ("upstream_bundle", "theirs")}[whose]
    given = request.getfixturevalue(bundle_of)
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    shutil.move(given if whose == "ours" else given[0], mirror / f"{name}.safetensors")
    monkeypatch.setattr(sources, "EMBEDDED", tmp_path)
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(mirror))
    monkeypatch.setenv("HF_HOME", os.devnull)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SourceNotice)
        model = load(name, task="backbone", local_files_only=True)
    assert model.load_report.origin == str(mirror / f"{name}.safetensors")
    assert model.load_report.sha256 == sha256_of((mirror / f"{name}.safetensors").read_bytes())
    assert same_state(model, load(NANO_FILE)) if whose == "ours" else narrow().keys() == model.state_dict().keys()


# --- Kills, and places that cannot be written -------------------------------------------------------------------------

WRITE = """\
import sys
from pathlib import Path
from gvsl_zoo import cache
from gvsl_zoo.weights import write_whole
path = Path(sys.argv[1])
with cache.locked(path.parent):
    print("writing", flush=True)
    while True:
        write_whole(path, *[bytes(100_000)] * 100)
"""


@pytest.mark.slow
def test_what_killed_writers_leave_is_swept_by_the_next(tmp_path):
    path = cache.stored_path("0" * 64)
    moments = random.Random(0)
    left = kills = 0
    while kills < 3 or (left == 0 and kills < 40):  # a busy machine may let some end in time
        kills += 1
        writer = subprocess.Popen([sys.executable, "-c", WRITE, str(path)], stdout=subprocess.PIPE)
        writer.stdout.readline()
        time.sleep(moments.uniform(0.05, 0.2))
        writer.kill()
        writer.communicate()
        left += len(list(path.parent.glob(".*.partial")))
        assert not path.exists() or path.read_bytes() == bytes(10_000_000)
        started = time.monotonic()
        with cache.locked(path.parent):
            assert list(path.parent.glob(".*.partial")) == []
        assert time.monotonic() - started < 2
    assert left >= 1


def test_an_import_sweeps_what_an_earlier_one_left(nano_bundle):
    folder = cache.stored_path(NANO_SHA256).parent
    folder.mkdir(parents=True)
    for name in (f".{NANO_SHA256}.safetensors.0123abcd.partial", ".other.safetensors.0123abcd.partial"):
        (folder / name).write_bytes(b"half")
    import_bundle(nano_bundle)
    assert stored() == [f"weights/{NANO_SHA256}.safetensors"]


@pytest.mark.parametrize("home", ["file", "device"])
def test_a_cache_that_cannot_be_written_takes_no_bundle_but_loads(home, nano_bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HF_HOME", {"file": str(tmp_path / "file"), "device": os.devnull}[home])
    with pytest.raises(SourceError, match=r"cannot write to the cache .*: Not a directory; free space, or choose"):
        import_bundle(nano_bundle)
    assert load(NANO).entry.name == load(nano_bundle).entry.name == NANO


def test_a_bundle_of_a_mirror_that_is_read_where_it_lies_can_be_passed_on(
    nano_bundle, without_embedded, tmp_path, monkeypatch
):
    (tmp_path / "mirror").mkdir()
    shutil.copy(nano_bundle, tmp_path / "mirror" / f"{NANO}.safetensors")
    with monkeypatch.context() as patched:
        patched.setenv("GVSL_ZOO_REGISTRY", str(tmp_path / "mirror"))
        patched.setenv("HF_HOME", os.devnull)
        with pytest.warns(SourceNotice):
            export_bundle(NANO, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == nano_bundle.read_bytes()
    import_bundle(tmp_path / "again.safetensors")
    assert stored() == [f"weights/{NANO_SHA256}.safetensors"]


def test_a_full_disk_takes_no_bundle_and_nothing_is_left(nano_bundle):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(SourceError, match=r"cannot write to the cache .*: File too large; free space"):
            import_bundle(nano_bundle)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert stored() == []
    import_bundle(nano_bundle)
    assert stored() == [f"weights/{NANO_SHA256}.safetensors"]


def test_what_fails_under_the_lock_is_not_the_caches_failure(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"), cache.locked(tmp_path / "folder"):
        (tmp_path / "nothing").read_bytes()
    with cache.locked(tmp_path / "folder"):  # it was given back
        pass


def test_whoever_waits_for_another_process_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "NOTICE_SECONDS", 0.01)
    held = threading.Event()

    def hold():
        with FileLock(tmp_path / ".lock"):
            held.set()
            time.sleep(0.3)

    other = threading.Thread(target=hold)
    other.start()
    held.wait()
    said = f"waiting for another process that writes to {tmp_path}"
    with pytest.warns(UserWarning, match=said), cache.locked(tmp_path):
        other.join()


def test_access_does_not_show_its_token():
    assert "hf_secret" not in repr(Access(token="hf_secret"))


# --- By hand ----------------------------------------------------------------------------------------------------------


def test_a_file_brought_by_hand_must_have_the_registrys_hash(without_embedded, tmp_path):
    good = tmp_path / "by-hand.safetensors"
    shutil.copy(NANO_FILE, good)
    sources.adopt(model_info(NANO), good)
    with pytest.warns(SourceNotice, match=r"came from cache"):
        assert load(NANO, local_files_only=True).load_report.sha256 == NANO_SHA256
    rewrite(good, data="fc_rot.bias")
    with pytest.raises(WeightsError, match=rf"has sha256 .*; {NANO} is {NANO_SHA256}; download it again"):
        sources.adopt(model_info(NANO), good)
    assert stored() == [f"weights/{NANO_SHA256}.safetensors"]


def test_a_checkpoint_for_a_model_that_has_none_is_refused(tmp_path):
    torch.save(narrow(), tmp_path / "x.pth")
    with pytest.raises(ArgumentError, match=rf"{NANO} has no checkpoint of its authors; give its .safetensors file"):
        sources.adopt(model_info(NANO), tmp_path / "x.pth")
    with pytest.raises(WeightsError, match=r"nothing.pth cannot be read: No such file"):
        sources.adopt(model_info(NANO), tmp_path / "nothing.pth")
