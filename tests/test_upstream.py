"""The authors' models, from a Drive on loopback to a module: fetched, converted and described once, then cached."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from drive_server import DriveServer, confirm_page, file, page
from formula import assert_as_recorded, image, recorded, weight

from gvsl_zoo import cache, drive, load, model_info, register_registry, registry, sources
from gvsl_zoo.errors import ArgumentError, SourceError, WeightsError
from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.unet import UNet

NAME = "their-unet"
MINE = """\
schema_version: 1
models:
  their-unet:
    summary: a small file of other authors
    status: upstream
    architecture: unet
    config: {ndim: 3, width: 8}
    ndim: 3
    modality: CT
    objective: gvsl
    parameters: 1472952
    input: {axes: zyx, intensity: {unit: HU, window: [-1024, 1024], scale: [0, 1]}}
    sources: [{kind: gdrive, id: abcdefghij, file: theirs.pth, bytes: 30000000, pinned: false}]
    licence: {code: none stated, weights: none stated by them, data: unknown}
    citation: They et al. 2023
"""


@pytest.fixture
def server(monkeypatch):
    server = DriveServer()
    monkeypatch.setattr(drive, "ORIGIN", server.url())
    monkeypatch.setattr(drive, "HOSTS", ("127.0.0.1",))
    yield server
    server.close()


@pytest.fixture(autouse=True)
def theirs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_added", {})
    (tmp_path / "theirs.yaml").write_text(MINE)
    register_registry(tmp_path / "theirs.yaml")


def unet(seed=0):
    return UNet(3, 8, generator=torch.Generator().manual_seed(seed))


def checkpoint(path, module):
    torch.save(module.state_dict(), path)
    return path


@pytest.fixture
def pth(tmp_path):
    """A U-Net alone, as the authors may have saved it."""
    return checkpoint(tmp_path / "by-hand.pth", unet())


def same_state(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def folder():
    return cache.upstream_folder(NAME)


def names_in(path):
    return sorted(one.name for one in path.iterdir() if one.name != ".lock")


def quietly(*args, **settings):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load(*args, **settings)


# --- The first time and the next ----------------------------------------------------------------------------------


def test_the_first_load_fetches_converts_and_says_whose_it_is(server, pth):
    server.answers = [confirm_page("/download"), file(pth.read_bytes())]
    with pytest.warns(sources.SourceNotice, match=r"authors' own file.*none stated by them.*They et al\. 2023"):
        net = load(NAME)
    assert same_state(net, unet()) and net.entry.heads == () and len(server.log) == 2
    assert names_in(folder()) == ["model.safetensors", "record.json"]
    record = json.loads((folder() / "record.json").read_text())
    assert record["sha256"] == cache.sha256_of(pth) and record["bytes"] == pth.stat().st_size
    assert record["safetensors"] == net.load_report.sha256 and len(record["first_seen"]) == 10


def test_the_next_load_asks_nobody_and_says_nothing(server, pth):
    server.answers = [file(pth.read_bytes())]
    quietly(NAME)
    asked = len(server.log)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_state(load(NAME), unet()) and same_state(load(NAME, local_files_only=True), unet())
    assert len(server.log) == asked


def test_a_cache_of_ones_own_holds_the_model_and_the_other_does_not(server, pth, tmp_path):
    server.answers = [file(pth.read_bytes())]
    quietly(NAME, cache_dir=tmp_path / "mine")
    assert (tmp_path / "mine/gvsl-zoo/upstream" / NAME / "model.safetensors").is_file() and not folder().exists()


OFFLINE = """\
import json, sys
events = []
sys.addaudithook(lambda event, args: events.append(event) if event.startswith("socket.") else None)
import gvsl_zoo
gvsl_zoo.register_registry(sys.argv[1])
gvsl_zoo.load("their-unet")
print(json.dumps(events))
"""


def test_a_cached_model_opens_no_socket(server, pth, tmp_path):
    server.answers = [file(pth.read_bytes())]
    quietly(NAME)
    call = [sys.executable, "-c", OFFLINE, str(tmp_path / "theirs.yaml")]
    assert json.loads(subprocess.run(call, capture_output=True, text=True, check=True).stdout) == []


WORKER = """\
import sys, warnings
warnings.simplefilter("ignore")
from gvsl_zoo import drive, load, register_registry
drive.ORIGIN, drive.HOSTS = sys.argv[2], ("127.0.0.1",)
register_registry(sys.argv[1])
print(load("their-unet").load_report.sha256)
"""


@pytest.mark.slow
def test_eight_processes_on_a_cold_cache_fetch_once(server, pth, tmp_path):  # C1
    server.answers = [file(pth.read_bytes())]
    call = [sys.executable, "-c", WORKER, str(tmp_path / "theirs.yaml"), server.url()]
    workers = [subprocess.Popen(call, stdout=subprocess.PIPE, text=True) for _ in range(8)]
    digests = {worker.communicate(timeout=120)[0] for worker in workers}
    assert len(digests) == 1 and all(worker.returncode == 0 for worker in workers)
    assert len(server.log) == 1


# --- What the file holds ------------------------------------------------------------------------------------------


def test_a_file_of_the_unet_alone_says_what_it_lacks_for_registration(server, pth):
    server.answers = [file(pth.read_bytes())]
    with pytest.raises(ArgumentError, match=r"cannot serve task 'registration'.*no heads.*it serves backbone"):
        quietly(NAME, task="registration")


def test_a_file_of_the_whole_module_serves_registration(server, tmp_path):
    whole = GVSL(unet())
    server.answers = [file(checkpoint(tmp_path / "whole.pth", whole).read_bytes())]
    net = quietly(NAME, task="registration")
    assert same_state(net, whole) and net.entry.heads == ("affine", "deformable", "restoration")
    assert same_state(load(NAME), whole.unet)


def test_a_file_of_another_model_is_refused_and_not_kept(server, tmp_path):
    wide = UNet(3, 16, generator=torch.Generator().manual_seed(0))
    server.answers = [file(checkpoint(tmp_path / "wide.pth", wide).read_bytes())]
    with pytest.raises(WeightsError, match="has width 16, their-unet has 8"):
        load(NAME)
    assert names_in(folder()) == []


@pytest.mark.parametrize("answer", [page("Quota exceeded", status=429), page("Sign in")], ids=["quota", "private"])
def test_a_page_in_the_way_is_told_with_a_way_out(server, answer):
    server.answers = [answer]
    with pytest.raises(SourceError, match=r"their-unet could not be had \(Google Drive.*(--from-file|by hand)"):
        load(NAME)
    assert names_in(folder()) == []


def test_without_a_network_the_error_says_what_to_do():
    with pytest.raises(SourceError, match=r"could not be had \(Google Drive: the connection.*gvsl-zoo import"):
        load(NAME)
    with pytest.raises(SourceError, match=r"not in the cache, and the network is not allowed.*bundle"):
        load(NAME, local_files_only=True)


# --- What was seen first is what stays ----------------------------------------------------------------------------


def test_a_file_replaced_at_its_source_is_refused(server, pth, tmp_path):  # G8
    server.answers = [file(pth.read_bytes())]
    quietly(NAME)
    (folder() / "model.safetensors").unlink()
    other = checkpoint(tmp_path / "another.pth", unet(1))
    assert other.stat().st_size == pth.stat().st_size
    server.answers = [file(other.read_bytes())]
    with pytest.raises(WeightsError, match=r"has sha256 [0-9a-f]{64}; the one seen first \(.*\) had"):
        load(NAME)
    assert names_in(folder()) == ["record.json"]


@pytest.mark.parametrize("damage", ["missing", "flipped", "short"])
def test_a_damaged_conversion_is_fetched_again(server, pth, damage):  # C7, C8
    server.answers = [file(pth.read_bytes())]
    quietly(NAME)
    path = folder() / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // (2 if damage == "short" else 1)])
    assert same_state(quietly(NAME), unet()) and len(server.log) == 2


def test_a_damaged_conversion_is_refused_without_network(server, pth):
    server.answers = [file(pth.read_bytes())]
    quietly(NAME)
    path = folder() / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(WeightsError, match="is damaged, and the network is not allowed"):
        load(NAME, local_files_only=True)


def test_a_checkpoint_whose_conversion_was_killed_is_converted_without_asking_again(pth):  # W18, C10
    folder().mkdir(parents=True)
    (folder() / "theirs.pth").write_bytes(pth.read_bytes())
    (folder() / ".model.safetensors.1234.partial").write_bytes(b"half")
    assert same_state(quietly(NAME), unet()) and names_in(folder()) == ["model.safetensors", "record.json"]


def test_a_full_disk_keeps_what_was_fetched(server, pth, monkeypatch):
    server.answers = [file(pth.read_bytes())]
    with monkeypatch.context() as patch:
        full = OSError(28, "No space left on device")
        patch.setattr("gvsl_zoo.conversion.write_weights", lambda *_: (_ for _ in ()).throw(full))
        with pytest.raises(SourceError, match=r"model.safetensors cannot be written: No space left on device"):
            load(NAME)
    assert names_in(folder()) == ["theirs.pth"]
    assert same_state(quietly(NAME), unet()) and len(server.log) == 1


def test_a_checkpoint_with_code_is_refused_and_not_kept(server, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "canary",)

    torch.save({"state_dict": unet().state_dict(), "hook": Payload()}, tmp_path / "evil.pth")
    server.answers = [file((tmp_path / "evil.pth").read_bytes())]
    with pytest.raises(WeightsError, match="holds code"):
        load(NAME)
    assert not (tmp_path / "canary").exists() and names_in(folder()) == []


# --- By hand --------------------------------------------------------------------------------------------------------


def test_a_file_fetched_by_hand_is_taken_and_stays_where_it_is(pth):
    sources.adopt(model_info(NAME), pth)
    assert same_state(load(NAME, local_files_only=True), unet()) and pth.is_file()


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "cannot be read: No such file"),
        (b"", "not a weights file"),
        (b"<html>Quota exceeded</html>", "web page"),
        (b"PK\x03\x04 and no more", "cut short"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", "a pickle, .*; where you trust the file, open it with its own"),
    ],
    ids=["missing", "empty", "html", "half", "legacy"],
)
def test_a_file_by_hand_that_is_none_is_refused(tmp_path, content, match):
    if content is not None:
        (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=match):
        sources.adopt(model_info(NAME), tmp_path / "bad.pth")
    assert not (folder() / "model.safetensors").exists()


def test_a_checkpoint_by_hand_is_for_models_that_have_one(pth):
    with pytest.raises(ArgumentError, match=r"has no checkpoint of its authors; give its \.safetensors"):
        sources.adopt(model_info("gvsl-unet-ct-nano"), pth)


# --- The official rows, at their size -----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_official_ct_model_gives_the_recorded_numbers(server, released, tmp_path):
    path = checkpoint(tmp_path / "official.pth", released.unet)
    server.answers = [confirm_page("/download"), file(path.read_bytes())]
    path.unlink()
    net = quietly("gvsl-unet-ct")
    with torch.no_grad():
        f_g, f_l = net.forward_features(image("cube32/A", (32, 32, 32)))
    golden = recorded("official_unet_gvsl.npz", "cube32/")
    assert_as_recorded(f_g, golden, "f_g", "cube32f_g")
    assert_as_recorded(f_l, golden, "f_l", "cube32f_l")
    assert net.entry.parameters == 23_538_144 and net.preprocessing.spacing_mm == (1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dimension"), [("gemini-unet-xray", "2d"), ("gemini-unet-brain", "3d")])
def test_the_gemini_models_load_as_backbones(server, tmp_path, name, dimension):
    shapes = json.loads((Path(__file__).parent / f"data/gemini{dimension}_state_dict.json").read_text())
    torch.save({tensor: weight(tensor, shape) for tensor, shape in shapes.items()}, tmp_path / "gemini.pth")
    server.answers = [file((tmp_path / "gemini.pth").read_bytes())]
    net = quietly(name)
    assert net.entry.heads == ("deformer", "restoration") and net.entry.parameters == model_info(name).parameters
    assert torch.equal(net.inc.double_conv[0].bias, weight("unet.inc.double_conv.0.bias", (32,)))
