"""Tests of the care of caches: what is listed and removed, what verify finds, what diagnose advises."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import socket
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub_server import Hub
from huggingface_hub import hf_hub_download

from gvsl_zoo import __version__ as version
from gvsl_zoo import cache, drive, list_models, load, model_info, push_to_hub, registry, save_pretrained, sources
from gvsl_zoo.doctor import Cached, Check, cached_models, diagnose, remove_cached, verify
from gvsl_zoo.errors import ArgumentError, RegistryError, SourceError, WeightsError
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.registry import register_registry
from gvsl_zoo.sources import Access
from gvsl_zoo.weights import METADATA_KEY, write_weights

NANO = "gvsl-unet-ct-nano"
REPO = "org/model"
MANY = 5_000_000  # bytes, more than any header has
MINE = """\
schema_version: 1
models:
  theirs:
    summary: a narrow U-Net, as its authors would share it
    status: upstream
    instead: gvsl-unet-ct-nano
    architecture: unet
    config: {ndim: 3, width: 8}
    ndim: 3
    modality: CT
    objective: gvsl
    parameters: 1471080
    input: {axes: zyx, intensity: {unit: HU, window: [-1024, 1024], scale: [0, 1]}}
    sources: [{kind: gdrive, id: 1234567890abc, file: theirs.pth, bytes: 100000000, pinned: false}]
    licence: {code: none stated, weights: none stated, data: none stated}
    citation: nobody
"""
OURS = """\
  ours:
    summary: a narrow U-Net on the Hub
    status: available
    architecture: unet
    config: {{ndim: 3, width: 8, affine_width: 48}}
    ndim: 3
    modality: CT
    objective: gvsl
    parameters: 1471080
    heads: {heads}
    input: {{axes: zyx, intensity: {{unit: HU, window: [-1024, 1024], scale: [0, 1]}}}}
    sources:
      - {{kind: hub, repo: {repo}, file: model.safetensors, revision: {revision}, bytes: {size}, sha256: {sha256}}}
    licence: {{code: MIT, weights: MIT, data: none}}
    citation: nobody
"""


@pytest.fixture(autouse=True)
def a_home_and_a_registry_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_added", {})


@pytest.fixture
def hub(monkeypatch):
    with Hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("HF_TOKEN", "hf_write")
        yield hub


def bundle_at(path):
    """The nano model as a bundle."""
    return sources.export_bundle(NANO, path)


def with_imported(tmp_path, cache_dir=None):
    """The nano model in our cache beside the embedded one; its file."""
    return sources.import_bundle(bundle_at(tmp_path / "bundle.safetensors"), cache_dir)[1].file.path


def with_upstream(tmp_path, cache_dir=None):
    """A checkpoint of others, brought by hand and converted; its file."""
    (tmp_path / "mine.yaml").write_text(MINE)
    register_registry(tmp_path / "mine.yaml")
    torch.save(UNet(width=8, generator=torch.Generator().manual_seed(0)).state_dict(), tmp_path / "theirs.pth")
    return sources.adopt(model_info("theirs"), tmp_path / "theirs.pth", Access(cache_dir)).file.path


def with_hub(task="backbone", cache_dir=None, registered=False, repo=REPO, heads="[]"):
    """A model in the Hub's cache, if `registered` as "ours" of a registry too; its file."""
    report = push_to_hub(load(NANO, task=task), repo)
    if registered:
        path = Path(os.environ["HF_HOME"]).parent / "ours.yaml"
        text = OURS.format(repo=repo, revision=report.revision, size=report.bytes, sha256=report.sha256, heads=heads)
        path.write_text(MINE[: MINE.index("  theirs")] + text)
        register_registry(path)
    found = sources.from_hub_name(f"hf-hub:{repo}", None, Access(cache_dir))
    assert found.sha256 == report.sha256
    return found.file.path


def with_others(hub):
    """Repositories of others in the Hub's cache; their files, with what is in them."""
    hub.add("other/bert", {"model.safetensors": b"no weights of ours", "config.json": b"{}"})
    write_weights({"a": torch.ones(3)}, Path(os.environ["HF_HOME"]).parent / "x.safetensors", {"format": "pt"})
    plain = (Path(os.environ["HF_HOME"]).parent / "x.safetensors").read_bytes()
    hub.add("other/plain", {"model.safetensors": plain})
    for repo, name in (
        ("other/bert", "model.safetensors"),
        ("other/bert", "config.json"),
        ("other/plain", "model.safetensors"),
    ):
        hf_hub_download(repo, name, endpoint=hub.endpoint, cache_dir=cache.hub_folder(), token=False)
    return {path: path.read_bytes() for path in cache.hub_folder().glob("models--other--*/**/*") if path.is_file()}


def flip(path, kept=True):
    """Change one bit of a file's last byte; `kept`: as a disk does, its size and time stay."""
    real = path.resolve()
    before = real.stat()
    content = bytearray(real.read_bytes())
    content[-1] ^= 1
    with real.open("r+b") as file:
        file.write(content)
    if kept:
        os.utime(real, ns=(before.st_atime_ns, before.st_mtime_ns))


# --- What the caches hold --------------------------------------------------------------------------------------


def test_empty_caches_hold_nothing_and_none_is_made(tmp_path):
    assert cached_models() == [] and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("own", [False, True], ids=["HF_HOME", "cache_dir"])
def test_every_kind_is_listed_with_its_name_size_and_place(own, hub, tmp_path):
    folder = tmp_path / "own" if own else None
    imported, upstream = with_imported(tmp_path, folder), with_upstream(tmp_path, folder)
    on_hub = with_hub(cache_dir=folder)
    commit = hub.repos[REPO].branches["main"]
    size = sum(path.stat().st_size for path in upstream.parent.iterdir())
    assert cached_models(folder) == [
        Cached(NANO, "imported", imported.stat().st_size, imported),
        Cached("theirs", "upstream", size, upstream.parent),
        Cached(f"hf-hub:{REPO}@{commit}", "hub", on_hub.stat().st_size, on_hub),
    ]
    assert cached_models(tmp_path / "nowhere") == [] and (cached_models() == []) == own


def test_a_registered_model_of_the_hub_is_listed_by_its_registry_name(hub):
    path = with_hub(registered=True)
    [found] = cached_models()
    assert (found.name, found.kind, found.path) == ("ours", "hub", path)
    assert remove_cached("ours") == [found] and cached_models() == []


def test_what_is_listed_can_be_loaded_by_that_name_offline(hub, tmp_path):
    with_imported(tmp_path), with_upstream(tmp_path), with_hub()
    hub.stop()
    names = [one.name for one in cached_models()]
    assert len(names) == 3
    for name in names:
        assert load(name, local_files_only=True).load_report.loaded == 72, name


def test_an_imported_file_that_no_registry_knows_is_listed_by_its_hash(tmp_path, monkeypatch):
    path = with_imported(tmp_path)
    path.rename(path.with_name(f"{'0' * 64}.safetensors"))
    assert [one.name for one in cached_models()] == ["0" * 64]
    assert [one.name for one in remove_cached("0" * 64)] == ["0" * 64] and cached_models() == []


def test_a_download_that_failed_is_no_cached_model(tmp_path):
    (tmp_path / "mine.yaml").write_text(MINE)
    register_registry(tmp_path / "mine.yaml")
    with pytest.raises(SourceError, match="theirs could not be had"):
        load("theirs")
    assert cached_models() == []


def test_repositories_of_others_are_neither_listed_nor_touched(hub, tmp_path):
    others = with_others(hub)
    assert len(others) >= 6 and cached_models() == []
    with_hub()
    [ours] = cached_models()
    for name in ("other/bert", "hf-hub:other/bert", "hf-hub:other/plain", "bert"):
        with pytest.raises(ArgumentError, match=f"{name!r} is not in the caches; they hold hf-hub:{REPO}@"):
            remove_cached(name)
    assert remove_cached(ours.name) == [ours]
    assert {path: path.read_bytes() for path in others} == others


def test_a_repository_with_the_same_commit_is_not_touched(hub, tmp_path):
    """As a copy of a repository with its history has."""
    with_hub(registered=True)
    content = {name: data for name, data in hub.files(REPO).items()}
    for repo in ("a/copy", "z/copy"):  # before and behind ours in every order
        commit = hub.add(repo, content)
        assert commit == hub.repos[REPO].branches["main"]
        sources.from_hub_name(f"hf-hub:{repo}", None, Access())
    remove_cached("ours")
    assert [one.name for one in cached_models()] == [f"hf-hub:{repo}@{commit}" for repo in ("a/copy", "z/copy")]


# --- Removing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [False, True], ids=["HF_HOME", "cache_dir"])
@pytest.mark.parametrize("kind", ["imported", "upstream", "hub"])
def test_a_removed_model_is_gone_and_the_others_stay(kind, own, hub, tmp_path):
    folder = tmp_path / "own" if own else None
    with_imported(tmp_path, folder), with_upstream(tmp_path, folder), with_hub(cache_dir=folder)
    before = cached_models(folder)
    [one] = [found for found in before if found.kind == kind]
    assert remove_cached(one.name, folder) == [one]
    assert cached_models(folder) == [found for found in before if found != one]
    assert not os.path.lexists(one.path)
    with pytest.raises(ArgumentError, match=f"{re.escape(repr(one.name))} is not in the caches; they hold "):
        remove_cached(one.name, folder)


def test_a_removed_hub_model_frees_its_bytes(hub):
    path = with_hub()
    real = path.resolve()
    remove_cached(f"hf-hub:{REPO}")
    assert real != path and not real.exists() and not (cache.hub_folder() / "models--org--model").exists()


def test_a_name_without_its_commit_removes_every_revision(hub):
    with_hub()
    with_hub(task="pretraining")
    assert len(cached_models()) == 2
    assert len(remove_cached(f"hf-hub:{REPO}")) == 2 and cached_models() == []


def test_one_revision_is_removed_and_the_other_still_loads(hub):
    first, second = with_hub(), with_hub(task="pretraining")
    [one] = [found for found in cached_models() if found.path == first]
    assert remove_cached(one.name) == [one]
    assert [found.path for found in cached_models()] == [second]
    assert load(f"hf-hub:{REPO}", task="registration", local_files_only=True).entry.name == NANO


def test_a_cache_behind_a_link_is_cleared_too(hub, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "link"))
    with_imported(tmp_path), with_upstream(tmp_path), with_hub()
    for one in cached_models():
        assert remove_cached(one.name) == [one]
    assert cached_models() == []


def test_a_removed_upstream_model_makes_room_for_another_file(tmp_path):
    with_upstream(tmp_path)
    torch.save(UNet(width=8, generator=torch.Generator().manual_seed(1)).state_dict(), tmp_path / "theirs.pth")
    with pytest.raises(WeightsError, match=r"the one seen first .*; .*run gvsl-zoo cache remove theirs"):
        sources.adopt(model_info("theirs"), tmp_path / "theirs.pth")
    remove_cached("theirs")
    assert sources.adopt(model_info("theirs"), tmp_path / "theirs.pth").file.path.is_file()


def test_an_empty_cache_says_that_it_holds_nothing():
    with pytest.raises(ArgumentError, match=f"'{NANO}' is not in the caches; they hold nothing"):
        remove_cached(NANO)


def test_a_removal_that_the_disk_refuses_is_told(tmp_path, monkeypatch):
    path = with_imported(tmp_path)
    monkeypatch.setattr(
        Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    with pytest.raises(SourceError, match=f"{re.escape(str(path))} cannot be removed: Permission denied; mend its"):
        remove_cached(NANO)


# --- verify ----------------------------------------------------------------------------------------------------


def verdicts(checks):
    return [check.verdict for check in checks]


def test_the_embedded_model_passes_with_its_hash():
    [check] = verify(NANO)
    assert check == Check(f"{NANO} (embedded)", "PASS", f"104 tensors, sha256 {model_info(NANO).sources[0].sha256}")


def test_every_copy_is_looked_at(hub, tmp_path):
    path = with_imported(tmp_path)
    assert [(check.what, check.verdict) for check in verify(NANO)] == [
        (f"{NANO} (embedded)", "PASS"),
        (f"{NANO} (cache)", "PASS"),
    ]
    flip(path)
    assert verdicts(verify(NANO)) == ["PASS", "FAIL"]


def test_every_kind_of_copy_passes(hub, tmp_path):
    with_upstream(tmp_path)
    path = with_hub()
    commit = hub.repos[REPO].branches["main"]
    [folder] = [save_pretrained(load(NANO, task="pretraining"), tmp_path / "out").parent]
    hub.stop()
    for name in ("theirs", f"hf-hub:{REPO}", f"hf-hub:{REPO}@{commit}", str(folder), str(path)):
        [check] = verify(name)
        assert check.verdict == "PASS" and check.what.startswith(name) and check.fix == "", check
        assert re.fullmatch(r"\d+ tensors, sha256 [0-9a-f]{64}", check.seen)


def test_a_registered_hub_model_passes_and_an_absent_one_is_a_warning(hub):
    with_hub(registered=True)
    hub.stop()
    assert [(check.what, check.verdict) for check in verify("ours")] == [("ours (the Hub)", "PASS")]
    remove_cached("ours")
    assert verify("ours") == [Check("ours", "WARN", "not on this machine", "gvsl-zoo download ours")]


@pytest.mark.parametrize("kept", [True, False], ids=["bit rot", "rewritten"])
@pytest.mark.parametrize("kind", ["imported", "upstream", "hub", "registered"])
def test_a_flipped_bit_fails_with_a_remedy_that_works(kind, kept, hub, tmp_path):
    name, make = {
        "imported": (NANO, lambda: with_imported(tmp_path)),
        "upstream": ("theirs", lambda: with_upstream(tmp_path)),
        "hub": (f"hf-hub:{REPO}", with_hub),
        "registered": ("ours", lambda: with_hub(registered=True)),
    }[kind]
    path = make()
    assert set(verdicts(verify(name))) == {"PASS"}
    flip(path, kept)
    check = verify(name)[-1]
    assert check.verdict == "FAIL" and str(path.parent) in check.seen
    if kept:
        assert check.seen == f"{path} is no longer what its hash says"
        [command] = re.findall("^gvsl-zoo cache remove (.*)$", check.fix)
        assert [one.kind for one in remove_cached(command)] == ["hub" if kind == "registered" else kind]
        assert "FAIL" not in verdicts(verify(name))
    else:
        assert "get it again from its source" in check.fix or "bring a bundle" in check.fix


def test_a_flipped_bit_of_a_path_fails_though_no_registry_knows_its_hash(tmp_path):
    path = save_pretrained(load(NANO), tmp_path / "out")
    assert verdicts(verify(str(path))) == ["PASS"]
    flip(path)
    [check] = verify(str(path))
    assert check == Check(
        f"{path} (path)", "FAIL", f"{path} is no longer what its hash says", "get it again from its source"
    )


def test_a_removed_and_downloaded_model_passes_again(hub):
    path = with_hub(registered=True)
    flip(path)
    assert verdicts(verify("ours")) == ["FAIL"]
    remove_cached("ours")
    load("ours")
    assert verdicts(verify("ours")) == ["PASS"]


@pytest.mark.parametrize("make", ["path", "registered"])
def test_another_structure_fails_though_every_byte_is_right(make, hub, tmp_path):
    if make == "registered":  # a backbone's file whose registry speaks of heads
        with_hub(registered=True, heads="[affine, deformable, restoration]")
        [check] = verify("ours")
        assert "is missing" in check.seen
    else:
        entry = replace(model_info(NANO), config={"ndim": 3, "width": 16}, heads=())
        tensors = UNet(width=8, generator=torch.Generator().manual_seed(0)).state_dict()
        metadata = {METADATA_KEY: json.dumps(entry.to_dict())}
        write_weights(tensors, tmp_path / "x.safetensors", metadata)
        [check] = verify(str(tmp_path / "x.safetensors"))
        assert "not (32," in check.seen
    assert check.verdict == "FAIL" and check.fix == "the weights belong to another architecture, width or task"


@pytest.mark.parametrize(
    ("content", "seen", "fix"),
    [
        (None, "cannot be read: No such file", "check the path"),
        (b"<html>Sign in</html>", "it looks like a web page", "get it again"),
        (b"", "0 bytes without a header", "get it again"),
        (MANY.to_bytes(8, "little") + bytes(MANY), f"a header of {MANY} bytes", "get it again"),
        ({}, "does not say which model it belongs to", "save it with"),
    ],
    ids=["missing", "html", "empty", "header", "no_entry"],
)
def test_a_path_to_no_model_fails_with_what_to_do(content, seen, fix, tmp_path):
    path = tmp_path / "x.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        write_weights({"a": torch.ones(1)}, path, {"format": "pt"})
    [check] = verify(str(path))
    assert check.verdict == "FAIL" and seen in check.seen and fix in check.fix and str(path) in check.seen


def test_an_absent_upstream_model_is_a_warning_that_says_how_to_get_it():
    assert verify("gvsl-unet-ct") == [
        Check("gvsl-unet-ct", "WARN", "not on this machine", "gvsl-zoo download gvsl-unet-ct")
    ]


def test_a_planned_model_is_a_warning_that_names_another():
    [check] = verify("gvsl-xmorpher-ct")
    assert check.verdict == "WARN" and check.seen.startswith("gvsl-xmorpher-ct is planned: ")
    assert check.fix == f"the nearest is '{NANO}' (available)"


def test_an_absent_name_of_the_hub_is_a_warning(hub):
    [check] = verify(f"hf-hub:{REPO}")
    assert check.verdict == "WARN" and "not on this machine" in check.seen and "download" in check.fix and hub.log == []


def test_an_unknown_name_is_refused():
    with pytest.raises(RegistryError, match="unknown model 'gvsl-unet-ct-nanoo'; did you mean"):
        verify("gvsl-unet-ct-nanoo")


# --- diagnose --------------------------------------------------------------------------------------------------


@pytest.fixture
def contacted(monkeypatch):
    """The hosts to which this process opens connections."""
    hosts = []
    connect = socket.socket.connect

    def noted(self, address):
        hosts.append(address[0] if isinstance(address, tuple) else address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    return hosts


@pytest.fixture
def reachable(hub, monkeypatch):
    """Both origins answer, on loopback."""
    monkeypatch.setattr(drive, "ORIGIN", hub.endpoint)
    return hub


def found(what, cache_dir=None):
    """The one finding about `what`, all findings being in order: each that is no PASS says what to do."""
    checks = diagnose(cache_dir)
    for check in checks:
        assert (check.verdict == "PASS") == (check.fix == ""), check
        assert check.verdict in ("PASS", "WARN", "FAIL") and check.seen
    [one] = [check for check in checks if check.what == what]
    return one


def test_a_healthy_installation_passes_and_asks_only_the_two_origins(reachable, contacted, tmp_path):
    checks = diagnose()
    assert set(verdicts(checks)) == {"PASS"}, checks
    whats = [check.what for check in checks]
    assert whats == [
        "gvsl-zoo",
        "packages",
        "device",
        "registry",
        "cache",
        *(f"{name} ({model_info(name).sources[0].kind})" for name in list_models(available=True)),
        "the Hub",
        "Google Drive",
    ]
    assert checks[0].seen.startswith(f"{version}, Python 3.")
    assert f"torch {torch.__version__.partition('+')[0]}" in checks[1].seen and "huggingface_hub" in checks[1].seen
    assert str(tmp_path / "cache" / "gvsl-zoo") in checks[4].seen
    assert contacted and set(contacted) <= {"127.0.0.1", "::1"}
    assert [(seen.method, seen.path) for seen in reachable.log] == [("HEAD", "/")] * 2


def test_a_second_diagnosis_leaves_nothing_and_finds_the_same(reachable, tmp_path):
    first = diagnose()
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    again = diagnose()
    assert [(check.what, check.verdict) for check in again] == [(check.what, check.verdict) for check in first]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == files


def test_every_copy_on_this_machine_is_verified(reachable, tmp_path):
    with_imported(tmp_path), with_upstream(tmp_path)
    path = with_hub(registered=True)
    flip(path)
    assert found(f"{NANO} (cache)").verdict == found("theirs (Google Drive)").verdict == "PASS"
    check = found("ours (the Hub)")
    assert check.verdict == "FAIL" and "gvsl-zoo cache remove ours" in check.fix


@pytest.mark.parametrize(
    ("torch_version", "verdict"),
    [("2.9.1", "FAIL"), ("1.13.1+cu117", "FAIL"), ("2.10.0", "PASS"), ("2.13.0+cpu", "PASS"), ("3.0.0", "PASS")],
)
def test_a_torch_that_a_checkpoint_can_harm_fails(torch_version, verdict, reachable, monkeypatch):
    known = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: torch_version if name == "torch" else known(name))
    check = found("packages")
    assert check.verdict == verdict and f"torch {torch_version}" in check.seen
    assert ("install torch 2.10 or later" in check.fix) == (verdict == "FAIL")


def test_cpu_torch_is_in_order(reachable, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr("gvsl_zoo.doctor.resolve_device", lambda name: torch.device("cpu"))
    check = found("device")
    assert check.verdict == "PASS" and check.seen == f"cpu, {torch.get_num_threads()} threads"


def test_cuda_torch_without_a_device_is_a_warning(reachable, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    check = found("device")
    assert check.verdict == "WARN" and "no CUDA device" in check.seen and "nvidia-smi" in check.fix


def test_a_cuda_device_is_named(reachable, monkeypatch):
    monkeypatch.setattr("gvsl_zoo.doctor.resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    assert found("device") == Check("device", "PASS", "cuda:0: H100")


@pytest.mark.parametrize(
    ("text", "seen"),
    [("schema_version: [", "not plain YAML"), ("", "empty"), (None, "cannot read the registry")],
    ids=["broken", "empty", "missing"],
)
def test_a_broken_registry_fails_and_the_rest_is_still_looked_at(text, seen, reachable, tmp_path, monkeypatch):
    path = tmp_path / "broken.yaml"
    if text is not None:
        path.write_text(text)
    monkeypatch.setenv("GVSL_ZOO_REGISTRY", str(path))
    check = found("registry")
    assert check.verdict == "FAIL" and seen in check.seen and str(path) in check.seen
    assert found("cache").verdict == found("the Hub").verdict == "PASS"


def test_a_cache_that_cannot_be_written_fails_and_the_rest_is_still_looked_at(reachable, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "home"))
    check = found("cache")
    assert check.verdict == "FAIL" and "cannot write to the cache" in check.seen and "HF_HOME" in check.fix
    assert found(f"{NANO} (embedded)").verdict == found("the Hub").verdict == "PASS"


def test_little_space_is_a_warning(reachable, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40 - 2**29, 2**29))
    check = found("cache")
    assert check.verdict == "WARN" and "0.5 GB free" in check.seen and "free space, or set HF_HOME" in check.fix


@pytest.mark.parametrize("kind", ["upstream", "imported", "hub"])
@pytest.mark.parametrize("own", [False, True], ids=["HF_HOME", "cache_dir"])
def test_leftovers_of_killed_downloads_are_a_warning_until_the_next_one(own, kind, reachable, tmp_path):
    folder = tmp_path / "own" if own else None
    place = {
        "upstream": cache.upstream_folder("theirs", folder) / ".theirs.pth.0a1b.partial",
        "imported": cache.own_folder(folder) / "weights" / ".x.safetensors.0a1b.partial",
        "hub": cache.hub_folder(folder) / "models--org--model" / "blobs" / f"{'0' * 64}.0a1b.incomplete",
    }[kind]
    place.parent.mkdir(parents=True)
    place.write_bytes(bytes(2_500_000))
    check = found("leftovers", folder)
    assert check == Check(
        "leftovers", "WARN", "1 partial files, 2.5 MB", "the next download of the same model sweeps them"
    )
    assert place.exists()
    {
        "upstream": lambda: with_upstream(tmp_path, folder),
        "imported": lambda: with_imported(tmp_path, folder),
        "hub": lambda: with_hub(cache_dir=folder),
    }[kind]()
    assert not place.exists() and "leftovers" not in [check.what for check in diagnose(folder)]


def test_origins_that_do_not_answer_are_warnings(monkeypatch, contacted):
    for what in ("the Hub", "Google Drive"):
        check = found(what)
        assert check.verdict == "WARN" and "127.0.0.1:9 does not answer (Connect" in check.seen
        assert "gvsl-zoo import" in check.fix
    assert set(contacted) <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("endpoint", ["https://hub.invalid", "nonsense", "http://["])
def test_an_address_that_leads_nowhere_is_a_warning(endpoint, monkeypatch, contacted):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    check = found("the Hub")
    assert check.verdict == "WARN" and f"{endpoint} does not answer" in check.seen
    assert set(contacted) <= {"127.0.0.1", "::1"}


def test_a_password_in_an_address_is_not_said(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://me:hf_secret@127.0.0.1:9")
    assert "http://127.0.0.1:9 does not answer" in found("the Hub").seen
    with pytest.raises(SourceError, match="the Hub does not answer") as caught:
        load("hf-hub:org/model")
    assert "hf_secret" not in str(caught.value)


def test_a_hub_that_says_nothing_is_given_up_in_time(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr("gvsl_zoo.doctor.READ_SECONDS", 0.2)
        assert "does not answer (ReadTimeout)" in found("the Hub").seen


def test_offline_nobody_is_asked(reachable, contacted, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for what in ("the Hub", "Google Drive"):
        check = found(what)
        assert check == Check(what, "WARN", "not asked: HF_HUB_OFFLINE is set", "unset it to allow the network")
    assert contacted == [] and reachable.log == []


def test_nothing_of_a_token_is_said(reachable, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in str(diagnose())
    assert all("authorization" not in seen.headers for seen in reachable.log)
