"""Tests of the Hub's files: the real client against a Hub of our own on 127.0.0.1, with every fault of a download."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import pwd
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import hub_server
import huggingface_hub
import pytest
import torch
from drive_server import DriveServer
from drive_server import file as drive_file
from hub_server import Hub, Reply, first, redirect_to
from huggingface_hub import constants, file_download, hf_hub_download
from huggingface_hub.utils import _http, get_session

from gvsl_zoo import __version__, cache, download, drive, hub, registry, sources
from gvsl_zoo.errors import ArgumentError, SourceError, WeightsError
from gvsl_zoo.hub import HubFile
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.registry import model_info, register_registry
from gvsl_zoo.sources import SourceNotice
from gvsl_zoo.weights import WEIGHTS_NAME, write_weights
from gvsl_zoo.zoo import load

NANO = "gvsl-unet-ct-nano"
REPO = "org/model"
CONTENT = random.Random(0).randbytes(200_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SECRET = "hf_secret0123456789"


@pytest.fixture(autouse=True)
def a_home_and_a_registry_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_added", {})


@pytest.fixture
def server(monkeypatch):
    with Hub() as server:
        server.add(REPO, {WEIGHTS_NAME: CONTENT, "config.json": b"{}"})
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(download, "READ_SECONDS", 0.3)
    monkeypatch.setattr(download, "GRACE_SECONDS", 2.0)
    monkeypatch.setattr(download, "SLOWEST_RATE", 2**24)


@pytest.fixture
def naps(monkeypatch):
    """Waits before another try, ours and the client's, are noted and not waited for."""
    naps = []
    fake = types.SimpleNamespace(**{**vars(time), "sleep": naps.append})
    for module in (download, file_download, _http):
        monkeypatch.setattr(module, "time", fake)
    return naps


@pytest.fixture
def permissions():
    """The bits of files bind even the super-user, as they bind everybody else."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    before = sets[0]
    sets[0] &= ~0b1111  # effective: CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER
    assert libc.capset(header, sets) == 0
    yield
    sets[0] = before
    assert libc.capset(header, sets) == 0


def check(path):
    if (sha256 := cache.sha256_of(path)) != SHA256:
        raise WeightsError(f"{path} has sha256 {sha256}", "get it again")


def fetch(revision="main", file=WEIGHTS_NAME, repo=REPO, **settings):
    return hub.fetch(HubFile(repo, file, revision), check, most_bytes=len(CONTENT), **settings)


def names_in(part):
    """Files of the repository's blobs or snapshots in the cache."""
    return sorted(path.name for path in cache.hub_folder().glob(f"models--*/{part}/**/*") if not path.is_dir())


def arrives(**settings):
    """The file comes, whole and alone."""
    path = fetch(**settings)
    assert path.read_bytes() == CONTENT
    assert names_in("blobs") == [SHA256] and names_in("snapshots") == [WEIGHTS_NAME]
    return path


def refused(match, seconds=5.0, **settings):
    """The file does not come: one typed error that matches, in time, and no body left behind."""
    started = time.monotonic()
    with pytest.raises(SourceError, match=match) as caught:
        fetch(**settings)
    assert time.monotonic() - started < seconds
    assert caught.value.remedy and names_in("blobs") == names_in("snapshots") == []
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return caught.value


def works_again(server):
    server.fault = None
    arrives()


def tensors(seed=0):
    """A small file of weights."""
    return {"a": torch.rand(50_000, generator=torch.Generator().manual_seed(seed))}


@pytest.fixture
def weights(server, tmp_path):
    """The repository holds a file of weights, and so do we; the file, its commit."""
    path = tmp_path / "weights.safetensors"
    write_weights(tensors(), path, {})
    return path, server.add(REPO, {WEIGHTS_NAME: path.read_bytes()})


@pytest.fixture
def nano(server):
    """The repository holds the embedded model; its commit."""
    return server.add(REPO, {WEIGHTS_NAME: (sources.EMBEDDED / f"{NANO}.safetensors").read_bytes()})


MINE = """\
schema_version: 1
models:
  mine:
    summary: ours
    status: available
    architecture: unet
    config: {{ndim: 3, width: 8, affine_width: 48}}
    ndim: 3
    modality: CT
    objective: gvsl
    parameters: 1875603
    input: {{axes: zyx, intensity: {{unit: HU, window: [-1024, 1024], scale: [0, 1]}}}}
    heads: [affine, deformable, restoration]
    sources:
      - {{kind: hub, repo: {repo}, file: model.safetensors, revision: {commit}, bytes: {size}, sha256: "{sha256}"}}
{more}
    licence: {{code: MIT, weights: MIT, data: none}}
    citation: nobody
"""


def put_registry(tmp_path, content, commit, more=""):
    """A registry with one model on the Hub."""
    path = tmp_path / "mine.yaml"
    sha256 = hashlib.sha256(content).hexdigest()
    path.write_text(MINE.format(repo=REPO, commit=commit, size=len(content), sha256=sha256, more=more))
    return path


def same(found, expected):
    return all(torch.equal(found.file.tensor(name), tensor) for name, tensor in expected.items())


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)


# --- The file ---------------------------------------------------------------------------------------------------------


def test_a_file_comes_once_and_is_then_cached(server):
    assert hub.cached(HubFile(REPO, WEIGHTS_NAME, "main")) is None
    path = arrives()
    assert hub.cached(HubFile(REPO, WEIGHTS_NAME, "main")) == path == arrives()
    assert server.bodies() == 1 and hub.announced_sha256(path) == SHA256


def test_a_cached_commit_asks_nobody(server):
    commit = server.repos[REPO].find("main")
    path = arrives(revision=commit)
    asked = len(server.log)
    assert arrives(revision=commit) == hub.cached(HubFile(REPO, WEIGHTS_NAME, commit)) == path
    assert len(server.log) == asked


def test_the_requests_name_this_package_and_its_version(server):
    arrives()
    agents = [seen.headers["user-agent"] for seen in server.log if seen.server == "hub"]
    assert agents and all(f"gvsl-zoo/{__version__}" in agent for agent in agents)


def test_no_compression_is_asked_for(server):
    arrives()
    assert {seen.headers["accept-encoding"] for seen in server.log} == {"identity"}


def test_a_model_of_the_hub_loads_by_its_name(server, nano):
    by_branch, by_commit, embedded = load(f"hf-hub:{REPO}"), load(f"hf-hub:{REPO}@{nano}"), load(NANO)
    for model in (by_branch, by_commit):
        assert model.entry.name == NANO and model.load_report.sha256 == embedded.load_report.sha256
        assert all(map(torch.equal, model.state_dict().values(), embedded.state_dict().values()))
    assert server.bodies("cdn") == 1


def test_a_hub_source_of_a_registry_loads_under_its_name(server, nano, tmp_path):
    content = server.files(REPO)[WEIGHTS_NAME]
    server.add(REPO, {WEIGHTS_NAME: b"newer"})  # the registry's commit stays what it was
    register_registry(put_registry(tmp_path, content, nano))
    model = load("mine", task="pretraining")
    assert model.load_report.sha256 == hashlib.sha256(content).hexdigest()
    assert model.entry.name == "mine" and load("mine").entry.sources[0].revision == nano
    assert server.bodies("cdn") == 1


def test_another_file_than_the_registrys_is_refused(server, nano, tmp_path):
    register_registry(put_registry(tmp_path, server.files(REPO)[WEIGHTS_NAME] + b"\0", nano))
    with pytest.raises(SourceError, match=r"mine could not be had .the Hub sent a wrong file twice"):
        load("mine")
    assert names_in("blobs") == []


def test_a_branch_that_moved_gives_the_new_commit(server, weights):
    path, _ = weights
    assert same(sources.from_hub_name(f"hf-hub:{REPO}", None, sources.ANYWHERE), tensors())
    write_weights(tensors(1), path, {})
    commit = server.add(REPO, {WEIGHTS_NAME: path.read_bytes()})
    found = sources.from_hub_name(f"hf-hub:{REPO}", None, sources.ANYWHERE)
    assert same(found, tensors(1)) and commit in str(found.file.path)


def test_tags_and_branches_are_revisions(server, weights):
    old = server.repos[REPO].find("main")
    server.tag(REPO, "v1.0")
    server.add(REPO, {WEIGHTS_NAME: b"new"})
    for name, revision in ((f"hf-hub:{REPO}@v1.0", None), (f"hf-hub:{REPO}", "v1.0"), (f"hf-hub:{REPO}@{old}", old)):
        assert same(sources.from_hub_name(name, revision, sources.ANYWHERE), tensors())


def test_a_mirror_is_asked_instead_of_the_hub(server, monkeypatch):
    with Hub() as mirror:
        mirror.add(REPO, {WEIGHTS_NAME: CONTENT})
        monkeypatch.setenv("HF_ENDPOINT", mirror.endpoint + "/")
        arrives()
        assert mirror.bodies("cdn") == 1 and server.log == []


def test_without_the_variable_the_hub_itself_is_asked(monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT")
    refused("the Hub cannot be found: huggingface.co: Name or service not known")


@pytest.mark.parametrize(
    ("name", "revision", "match"),
    [
        ("hf-hub:", None, "'hf-hub:' names no repository; write hf-hub:org/repo"),
        ("hf-hub:model", None, "names no repository"),
        ("hf-hub:a/b/c", None, "names no repository"),
        ("hf-hub:../b", None, "names no repository"),
        ("hf-hub:a/..", None, "names no repository"),
        ("hf-hub:a/b..c", None, "names no repository"),
        ("hf-hub:a/b\n", None, "names no repository"),
        ("hf-hub:https://x/y", None, "names no repository"),
        ("hf-hub:a/b@../../x", None, "'../../x' is no revision; give a commit, a branch or a tag"),
        ("hf-hub:a/b@v 1", None, "'v 1' is no revision"),
        ("hf-hub:a/b@/etc", None, "'/etc' is no revision"),
        ("hf-hub:a/b", "a\0b", "is no revision"),
        ("hf-hub:a/b@v1", "v2", "'hf-hub:a/b@v1' with revision='v2'; give the revision once"),
    ],
)
def test_a_name_that_names_no_file_of_the_hub_is_refused(name, revision, match, server):
    with pytest.raises(ArgumentError, match=match):
        load(name, revision=revision)
    assert server.log == []


def test_a_revision_may_be_given_in_either_place():
    expected = HubFile("a/b", "f", "v1")
    for name, revision in (("hf-hub:a/b@v1", None), ("hf-hub:a/b", "v1"), ("hf-hub:a/b@v1", "v1")):
        assert hub.parse_name(name, "f", revision) == expected
    assert hub.parse_name("hf-hub:a/b", "f") == HubFile("a/b", "f", "main")
    assert str(HubFile("a/b", "f", "0123456789abcdef")) == "a/b@0123456789ab: f"


# --- Without an answer ------------------------------------------------------------------------------------------------


def test_a_refused_connection_is_told_within_seconds(server, monkeypatch):  # D1
    monkeypatch.setattr(download, "READ_SECONDS", 1.0)
    server.stop()
    refused("the Hub does not answer; check the network, or work from the cache or a bundle", 8)


def test_a_cached_branch_is_used_when_nobody_answers_and_the_user_is_told(server, weights, impatient):  # D1
    name = f"hf-hub:{REPO}"
    sources.from_hub_name(name, None, sources.ANYWHERE)
    server.stop()
    with pytest.warns(SourceNotice, match=r"org/model@main: .*: the cached state is used \(the Hub does not answer\)"):
        found = sources.from_hub_name(name, None, sources.ANYWHERE)
    assert same(found, tensors())


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (hub_server.hang(30), "the Hub does not answer"),
        (hub_server.status(500), r"the Hub answered 500 \(tried 3 times\)"),
        (hub_server.status(404), "the Hub answered 404 for org/model"),
        (hub_server.status(401), "the Hub answered 401 for org/model"),
        (hub_server.html_portal(), "the Hub answered 200 for org/model"),
        (hub_server.reset(None, on=hub_server.anything), "the connection to .* failed|the Hub does not answer"),
        (hub_server.status(429, headers={"Retry-After": "3600"}), "the Hub is asked too often .* wait 3600 s"),
    ],
    ids=["hang", "500", "404", "401", "portal", "reset", "429"],
)
def test_a_cached_branch_is_used_whatever_the_answer_and_the_user_is_told(
    fault, cause, server, weights, impatient, naps
):  # D1, D3, D5, D6, D8, D10, D13, D21
    name = f"hf-hub:{REPO}"
    sources.from_hub_name(name, None, sources.ANYWHERE)
    server.fault = fault
    with pytest.warns(SourceNotice, match=rf"org/model@main: .*: the cached state is used \({cause}"):
        assert same(sources.from_hub_name(name, None, sources.ANYWHERE), tensors())


@pytest.mark.parametrize(
    "fault",
    [hub_server.status(503, on=hub_server.bodies), hub_server.status(404, on=lambda request: request.is_body), None],
)
def test_an_update_that_does_not_arrive_leaves_the_cached_state(
    fault, server, weights, impatient, naps, tmp_path
):  # D8, D17
    name = f"hf-hub:{REPO}"
    sources.from_hub_name(name, None, sources.ANYWHERE)
    write_weights({"a": torch.full((9,), float("nan"))}, tmp_path / "new", {})  # refused where it arrives
    server.add(REPO, {WEIGHTS_NAME: (tmp_path / "new").read_bytes()})
    server.fault = fault
    for _ in range(2):
        with pytest.warns(SourceNotice, match="org/model@main: .*: the cached state is used"):
            assert same(sources.from_hub_name(name, None, sources.ANYWHERE), tensors())
    assert same(sources.from_hub_name(name, None, sources.Access(local_files_only=True)), tensors())


@pytest.mark.parametrize("address", ["hf-mirror.com", "ftp://hub"])
def test_an_endpoint_that_is_no_address_is_named(address, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", address)
    with pytest.raises(ArgumentError, match=f"HF_ENDPOINT is '{address}'; write it with https:// before it"):
        sources.from_hub_name(f"hf-hub:{REPO}", None, sources.ANYWHERE)


def test_an_empty_endpoint_is_the_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "")
    assert hub.endpoint() == hub.DEFAULT_ENDPOINT


def test_a_cached_commit_needs_no_hub(server, weights, recwarn):  # D1
    name = f"hf-hub:{REPO}@{weights[1]}"
    sources.from_hub_name(name, None, sources.ANYWHERE)
    server.stop()
    assert same(sources.from_hub_name(name, None, sources.ANYWHERE), tensors()) and not recwarn.list


def test_a_host_that_has_no_address_is_told(monkeypatch):  # D2
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    error = refused("the Hub cannot be found: hub.invalid: Name or service not known")
    assert "gvsl-zoo import" in error.remedy


def test_a_name_server_that_is_silent_is_not_waited_for(impatient, monkeypatch):  # D2
    ended = threading.Event()
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(30))
    refused("hub.invalid: no answer from the name server within", 2)
    ended.set()


def test_a_failure_of_the_server_heals(server, naps):  # D3
    for on in (hub_server.heads, hub_server.bodies):
        server.fault = hub_server.status(500, times=1, on=on)
        arrives()
        shutil.rmtree(cache.hub_folder())
    assert naps == [0.5, 0.5]


@pytest.mark.parametrize("on", [hub_server.heads, hub_server.bodies], ids=["head", "body"])
@pytest.mark.parametrize("code", [500, 503])
def test_a_server_that_fails_always_is_told(code, on, server, naps):  # D3
    server.fault = hub_server.status(code, on=on)
    refused(rf"the Hub answered {code} \(tried 3 times\); try again later")
    works_again(server)


@pytest.mark.parametrize("on", [hub_server.heads, hub_server.bodies], ids=["head", "body"])
def test_a_server_that_asks_for_a_pause_gets_it(on, server, naps):  # D4
    server.fault = hub_server.status(429, times=1, headers={"Retry-After": "7"}, on=on)
    arrives()
    assert naps == [7]


def test_a_server_that_always_asks_for_a_pause_is_given_up(server, naps):  # D4
    server.fault = hub_server.status(429, headers={"Retry-After": "7"})
    refused(r"the Hub is asked too often \(429\) \(tried 3 times\)")
    assert naps == [7, 7]


def test_a_pause_of_an_hour_is_told_and_not_waited_for(server, naps):  # D5
    server.fault = hub_server.status(429, headers={"Retry-After": "3600"})
    refused(r"asked too often \(429\); it asks to wait 3600 s; try again after \d\d:\d\d$")
    assert naps == []


# --- Who may read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [401, 403])
def test_a_token_that_is_not_accepted_names_the_way_to_log_in(code, server):  # D6
    server.fault = hub_server.status(code)
    refused(rf"does not accept the token for org/model \({code}\); log in .hf auth login, or", token=SECRET)


def test_a_wrong_token_is_not_printed(server, monkeypatch):  # D6
    refused("log in .hf auth login, or set HF_TOKEN", token=SECRET)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    refused("log in .hf auth login, or set HF_TOKEN")
    assert any(SECRET in seen.headers.get("authorization", "") for seen in server.log)


@pytest.mark.parametrize("token", [SECRET + "\n", f"{SECRET}\r\nX-Other: 1", SECRET + "é", SECRET + "\0"])
def test_a_token_that_no_header_can_hold_is_not_printed(token, server):  # D6
    refused("token", token=token)
    works_again(server)


def test_a_missing_token_that_was_asked_for_is_told(server):  # D6
    refused("there is no token on this machine; log in", token=True)


def test_a_private_repository_opens_for_its_owner_only(server, monkeypatch):  # D7
    server.add(REPO, {WEIGHTS_NAME: CONTENT}, private=True)
    for token in (None, False, "hf_other"):
        refused("org/model does not exist, or is private; check its name, or log in", token=token)
    arrives(token="hf_read")
    shutil.rmtree(cache.hub_folder())
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    arrives()


def test_a_gated_repository_opens_for_those_who_accepted_its_terms(server):  # D7
    server.add(REPO, {WEIGHTS_NAME: CONTENT}, gated=True)
    for token in (None, "hf_other"):
        refused("org/model is gated; accept its terms on http://127.*/org/model, then log in", token=token)
    arrives(token="hf_read")


def test_load_passes_the_token_on(server, nano):  # D7
    server.repos[REPO].private = True
    with pytest.raises(SourceError, match=r"is private"):
        load(f"hf-hub:{REPO}")
    assert load(f"hf-hub:{REPO}", token="hf_read").entry.name == NANO


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"repo": "org/nothing"}, "org/nothing does not exist, or is private; check its name"),
        ({"revision": "v9"}, "org/model has no such revision; check the commit, branch or tag"),
        ({"revision": "0" * 40}, "org/model has no such revision"),
        ({"file": "other.safetensors"}, "org/model has no such file; check the name and the revision"),
    ],
    ids=["repository", "revision", "commit", "file"],
)
def test_what_the_hub_does_not_have_is_named(settings, match, server):  # D8
    refused(match, **settings)


def test_the_content_network_never_sees_a_token(server):  # D23
    arrives(token="hf_read")
    assert {seen.headers.get("authorization") for seen in server.log if seen.server == "hub"} == {"Bearer hf_read"}
    on_cdn = [seen for seen in server.log if seen.server == "cdn"]
    assert on_cdn and not any("authorization" in seen.headers for seen in on_cdn)


@pytest.mark.parametrize("on", [hub_server.heads, hub_server.bodies, hub_server.anything], ids=["head", "body", "all"])
def test_a_redirect_to_another_site_takes_no_token_along(on, server):  # D23
    with Hub() as other:
        other.add(REPO, {WEIGHTS_NAME: CONTENT, "config.json": CONTENT})
        server.add(REPO, {WEIGHTS_NAME: CONTENT, "config.json": CONTENT})
        for file in (WEIGHTS_NAME, "config.json"):
            server.fault = redirect_to(f"{other.endpoint}/{REPO}/resolve/main/{file}", on=on)
            try:
                assert fetch(file=file, token="hf_read").read_bytes() == CONTENT
            except SourceError as error:  # a HEAD that says nothing of a commit
                assert on is not hub_server.bodies and "does not answer as the Hub does" in str(error)
        assert any("authorization" in seen.headers for seen in server.log)
        assert not any("authorization" in seen.headers for seen in other.log)
        assert other.log or on is not hub_server.bodies


# --- Broken connections -----------------------------------------------------------------------------------------------


def test_a_truncated_body_heals(server, naps):  # D9
    server.fault = hub_server.truncate(1000, times=1)
    arrives()


def test_a_body_that_is_always_truncated_is_told(server, naps):  # D9
    server.fault = hub_server.truncate(1000)
    refused("the connection to http://127.* failed .RemoteProtocolError: .*tried 3 times")
    works_again(server)


@pytest.mark.parametrize("after", [None, 0, 1000])
def test_a_connection_that_was_reset_heals(after, server, naps):  # D10
    server.fault = hub_server.reset(after, times=1)
    arrives()


def test_a_connection_that_is_always_reset_is_told(server, naps):  # D10
    server.fault = hub_server.reset(1000)
    refused(r"the connection to http://127.* failed \(\w+Error: .*tried 3 times")
    works_again(server)


def test_a_reset_before_the_first_answer_heals(server, naps):  # D10
    server.fault = hub_server.reset(None, times=1, on=hub_server.heads)
    arrives()


def test_silence_in_a_body_heals(server, impatient, naps):  # D11
    server.fault = hub_server.stall(30, after=1000, times=1)
    started = time.monotonic()
    arrives()
    assert time.monotonic() - started < 3


def test_silence_in_every_body_ends_in_time(server, impatient, naps):  # D11
    server.fault = hub_server.stall(30, after=1000)
    refused("the Hub took more than 2 s for|failed .TimeoutError: timed out", 6)
    works_again(server)


def test_a_body_that_drips_ends_at_the_total_limit(server, impatient):  # D12
    server.fault = hub_server.drip(1000, 0.05)
    refused("the Hub took more than 2 s for [1-9][0-9]* bytes; try again later", 4)
    works_again(server)


def test_a_slow_body_within_the_limit_arrives(server, impatient, monkeypatch):  # D12
    monkeypatch.setattr(download, "SLOWEST_RATE", 2**16)
    server.fault = hub_server.drip(8000, 0.1)
    arrives()


def test_a_hub_that_hangs_is_told_in_time(server, impatient):  # D13
    server.fault = hub_server.hang(30)
    refused("the Hub does not answer; check the network", 3)
    works_again(server)


def test_a_hub_that_hangs_before_every_body_is_told_in_time(server, impatient, naps):  # D13
    server.fault = hub_server.hang(30, on=hub_server.bodies)
    refused("the Hub took more than 2 s for 0 bytes|failed .TimeoutError: timed out", 6)


# --- Wrong bodies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [False, True], ids=["one_byte", "zeros"])
def test_wrong_bytes_are_fetched_once_more(zeros, server):  # D14
    server.fault = hub_server.wrong_bytes(times=1, zeros=zeros)
    arrives()
    assert server.bodies("cdn") == 2


@pytest.mark.parametrize("zeros", [False, True], ids=["one_byte", "zeros"])
def test_bytes_that_are_wrong_twice_are_refused_and_not_kept(zeros, server):  # D14
    server.fault = hub_server.wrong_bytes(zeros=zeros)
    refused(r"the Hub sent a wrong file twice \(.* has sha256 [0-9a-f]{64}\); report .*; nothing was kept")
    assert server.bodies("cdn") == 2
    works_again(server)


def test_wrong_bytes_are_found_through_load(server, nano):  # D14
    server.fault = hub_server.wrong_bytes()
    with pytest.raises(SourceError, match=r"the Hub sent a wrong file twice .*expected"):
        load(f"hf-hub:{REPO}")
    assert names_in("blobs") == []
    server.fault = hub_server.wrong_bytes(times=1)
    assert load(f"hf-hub:{REPO}").entry.name == NANO


@pytest.fixture
def small_blocks(monkeypatch):
    """The client keeps what came before a break, and asks for the rest."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)


def interruption():
    """Silence in the middle of a body, after which every client asks for the rest."""
    return hub_server.stall(30, after=50_500, times=1)


def ranges_of(server):
    return [seen.range for seen in server.log if seen.range and seen.server == "cdn"]


def test_a_broken_body_goes_on_where_it_broke(server, impatient, naps, small_blocks):  # D9
    server.fault = interruption()
    arrives()
    assert ranges_of(server) == ["bytes=50000-"]


def test_a_file_that_changed_between_its_halves_is_fetched_anew(server, impatient, naps, small_blocks):  # D15
    def other_half(request):
        request.reply.body = bytes(len(request.reply.body))
        request.send(request.reply)

    changed = hub_server.fault(other_half, 1, on=hub_server.ranges)
    server.fault = first(changed, interruption())
    arrives()
    assert ranges_of(server) == ["bytes=50000-"] and server.bodies("cdn") == 3


@pytest.mark.parametrize("fault", ["wrong_range", "ignored_range"])
def test_another_part_than_the_one_asked_for_does_no_harm(fault, server, impatient, naps, small_blocks):  # D16
    server.fault = first(getattr(hub_server, fault)(times=1), interruption())
    arrives()
    assert ranges_of(server)[0] == "bytes=50000-"


def test_a_part_that_is_refused_is_fetched_with_the_whole(server, impatient, naps, small_blocks):  # D17
    server.fault = first(hub_server.refused_range(), interruption())
    arrives()
    assert ranges_of(server) == ["bytes=50000-"]


def test_the_hash_decides_when_the_tags_differ(server):  # D18
    server.fault = hub_server.other_etag()
    arrives()


@pytest.mark.parametrize("extra", [1, 5000])
def test_a_longer_body_than_announced_before_is_refused(extra, server, naps):  # D19
    server.fault = hub_server.longer(extra)
    refused("the Hub sent a body of another size than it announced .tried 3 times")
    works_again(server)


def test_bytes_behind_the_end_of_a_body_do_no_harm(server, naps):  # D19
    server.fault = hub_server.longer(5000, announced=False)
    arrives()


def test_a_body_that_is_too_short_is_refused(server, naps):  # D19
    def short(request):
        request.reply.body = request.reply.body[:-1]
        request.send(request.reply)

    server.fault = hub_server.fault(short, on=hub_server.bodies)
    refused("the Hub sent a body of another size than it announced .tried 3 times")


def test_an_endless_body_ends_at_the_limit(server):  # D20
    server.fault = hub_server.endless()
    refused(f"the Hub sends more than the {len(CONTENT) + download.SPARE_BYTES} bytes expected; it is not the file")
    works_again(server)


def test_an_endless_body_of_unknown_size_ends_at_the_announced_size(server):  # D20
    server.fault = hub_server.endless()
    with pytest.raises(SourceError, match=rf"more than the {len(CONTENT) + download.SPARE_BYTES} bytes expected"):
        hub.fetch(HubFile(REPO, WEIGHTS_NAME, "main"), check)
    assert names_in("blobs") == []


def test_a_body_far_above_the_registered_size_is_refused_unread(server):  # D20
    server.add(REPO, {WEIGHTS_NAME: bytes(len(CONTENT) + download.SPARE_BYTES + 1)})
    refused(r"the Hub offers 1248577 bytes, at most 1248576 are expected")
    assert server.bodies("cdn") == 0


def test_a_compressed_body_is_refused(server):  # D20
    server.fault = hub_server.gzipped()
    refused("sends a compressed body, which was not asked for")


def test_the_sign_in_page_of_a_network_is_no_hub(server):  # D21
    server.fault = hub_server.html_portal()
    refused(r"http://127.* does not answer as the Hub does \(a sign-in page\?\); check the network")
    works_again(server)


def test_a_web_page_in_place_of_the_body_is_no_weights_file(server, weights, naps):  # D21
    server.fault = hub_server.html_portal(on=hub_server.bodies)
    with pytest.raises(SourceError, match=r"a body of another size than it announced"):
        sources.from_hub_name(f"hf-hub:{REPO}", None, sources.ANYWHERE)

    def page(request):
        request.reply.body = b"<html>Please sign in".ljust(len(request.reply.body))
        request.send(request.reply)

    server.fault = hub_server.fault(page, on=hub_server.bodies)
    with pytest.raises(SourceError, match=r"wrong file twice .*is not a weights file: it looks like a web page"):
        sources.from_hub_name(f"hf-hub:{REPO}", None, sources.ANYWHERE)
    assert names_in("blobs") == []


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("on", [hub_server.heads, hub_server.bodies], ids=["head", "body"])
def test_redirects_in_a_circle_end(on, absolute, server):  # D22
    server.fault = hub_server.redirect_loop(on=on, absolute=absolute)
    refused("the Hub redirects in a circle|does not answer as the Hub does")
    assert len(server.log) < 60
    works_again(server)


# --- More than one source ---------------------------------------------------------------------------------------------


@pytest.fixture
def authors(monkeypatch):
    """A Google Drive with a checkpoint of a narrow U-Net."""
    server = DriveServer()
    monkeypatch.setattr(drive, "ORIGIN", server.url())
    monkeypatch.setattr(drive, "HOSTS", ("127.0.0.1",))
    monkeypatch.setenv("NO_PROXY", "*")
    yield server
    server.close()


@pytest.fixture
def two_sources(server, authors, nano, tmp_path):
    """A model on the Hub and on Drive; the checkpoint's tensors."""
    unet = UNet(width=8, generator=torch.Generator().manual_seed(0))
    torch.save(unet.state_dict(), tmp_path / "theirs.pth")
    checkpoint = (tmp_path / "theirs.pth").read_bytes()
    authors.answers = [drive_file(checkpoint)]
    sha256 = hashlib.sha256(checkpoint).hexdigest()
    gdrive = f"      - {{kind: gdrive, id: abcdefghij, file: theirs.pth, bytes: {len(checkpoint)}, sha256: {sha256}}}"
    register_registry(put_registry(tmp_path, server.files(REPO)[WEIGHTS_NAME], nano, gdrive))
    return unet.state_dict()


def test_a_hub_that_is_down_is_replaced_by_drive_and_the_user_is_told(server, authors, two_sources, impatient):  # D24
    server.stop()
    with pytest.warns(SourceNotice) as notices:
        model = load("mine")
    assert any("mine came from Google Drive (the Hub does not answer)" in str(n.message) for n in notices)
    assert all(torch.equal(tensor, two_sources[name]) for name, tensor in model.state_dict().items())


def test_a_hub_with_wrong_bytes_is_replaced_by_drive(server, two_sources):  # D24
    server.fault = hub_server.wrong_bytes()
    with pytest.warns(SourceNotice) as notices:
        load("mine")
    assert any("came from Google Drive (the Hub sent a wrong file twice" in str(n.message) for n in notices)


def test_when_hub_and_drive_are_down_both_are_named(server, authors, two_sources, impatient, naps):  # D25
    server.stop()
    authors.close()
    started = time.monotonic()
    with pytest.raises(SourceError, match=r"mine could not be had \(the Hub.*; Google Drive: the conn.*failed"):
        load("mine")
    assert time.monotonic() - started < 5


# --- Hostile answers --------------------------------------------------------------------------------------------------

OUTSIDE = ["../../../../evil", f"{tempfile.gettempdir()}/evil", "..%2f..%2fevil", "a/b", "..", "x" * 300, "a\\b"]


@pytest.mark.parametrize("value", OUTSIDE)
@pytest.mark.parametrize("header", ["X-Linked-Etag", "X-Repo-Commit"])
def test_what_the_hub_announces_cannot_lead_out_of_the_cache(header, value, server, tmp_path):  # D26
    server.fault = hub_server.headers({header: value}, on=hub_server.heads)
    before = {path for path in tmp_path.rglob("*")}
    refused(re.escape(f"the Hub announces the hash or commit {value[:80]!r}; report it"))
    assert all(path.is_relative_to(tmp_path / "cache") for path in {*tmp_path.rglob("*")} - before)
    assert not Path(tempfile.gettempdir(), "evil").exists() and list(tmp_path.rglob("evil*")) == []
    works_again(server)


def test_the_tag_of_a_small_file_cannot_lead_out_of_the_cache(server, tmp_path):  # D26
    server.fault = hub_server.headers({"ETag": '"../../../../evil"'})
    refused("announces the hash or commit", file="config.json")
    assert list(tmp_path.rglob("evil*")) == []


@pytest.mark.parametrize("file", ["../evil", "a/../../../evil", "/evil", "../../../../evil"])
def test_a_file_name_cannot_lead_out_of_the_cache(file, server, tmp_path):  # D26
    obliging = Reply(200, CONTENT, {"ETag": f'"{SHA256}"', "X-Repo-Commit": server.repos[REPO].find("main")}, CONTENT)
    server.fault = hub_server.fault(lambda request: request.send(obliging))
    try:
        path = fetch(file=file)  # the first clients take /evil for evil
        assert path.read_bytes() == CONTENT
    except SourceError as error:
        assert "Invalid filename" in str(error) or "Invalid pointer path" in str(error)
    snapshots = cache.hub_folder() / "models--org--model" / "snapshots"
    assert all(found.is_relative_to(snapshots) for found in tmp_path.rglob("evil*"))


def test_xet_storage_gives_the_same_file(monkeypatch):  # D27
    with Hub(xet=True) as server:
        server.add(REPO, {WEIGHTS_NAME: CONTENT})
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        assert not constants.HF_HUB_DISABLE_XET
        arrives()
        assert server.bodies("cdn") == 1 and not any("xet" in seen.path for seen in server.log)


# --- Many at once -----------------------------------------------------------------------------------------------------

FETCH = f"""\
import hashlib, sys
from gvsl_zoo import hub
from gvsl_zoo.errors import WeightsError
import huggingface_hub.file_download

def check(path):
    if hashlib.sha256(path.read_bytes()).hexdigest() != "{SHA256}":
        raise WeightsError("other bytes")

print("ready", flush=True)
path = hub.fetch(hub.HubFile("{REPO}", "{WEIGHTS_NAME}", "main"), check, most_bytes={len(CONTENT)})
print(hashlib.sha256(path.read_bytes()).hexdigest())
"""


def start(script=FETCH, **variables):
    environment = {**os.environ, **variables}
    return subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_eight_processes_fetch_a_file_once(server):  # C1
    server.fault = hub_server.drip(20_000, 0.1)
    processes = [start() for _ in range(8)]
    said = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 8, said
    assert {out for out, _ in said} == {f"ready\n{SHA256}\n"}
    assert server.bodies("cdn") == 1 and names_in("blobs") == [SHA256]


def test_two_threads_fetch_two_files_at_once(server):
    other = random.Random(1).randbytes(200_000)
    server.add("org/other", {WEIGHTS_NAME: other})
    server.fault = hub_server.drip(20_000, 0.02)
    wanted = [HubFile(repo, WEIGHTS_NAME, "main") for repo in (REPO, "org/other")]
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda one: hub.fetch(one, Path.read_bytes), wanted))
    assert [path.read_bytes() for path in paths] == [CONTENT, other]


def test_threads_that_begin_together_do_not_disturb_each_other(server, monkeypatch):
    set_factory, calls = huggingface_hub.set_client_factory, []

    def slowly(factory):
        calls.append(factory)
        time.sleep(0.1)
        set_factory(factory)  # closes the session that others may be using

    set_factory(_http.default_client_factory)  # as if nobody had been here before
    monkeypatch.setattr(huggingface_hub, "set_client_factory", slowly)
    monkeypatch.setattr(download, "ATTEMPTS", 1)
    repos = [f"org/model-{i}" for i in range(4)]
    for repo in repos:
        server.add(repo, {WEIGHTS_NAME: CONTENT})
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda repo: fetch(repo=repo), repos))
    assert {path.read_bytes() for path in paths} == {CONTENT} and len(calls) == 1


def test_calls_that_overlap_leave_the_clients_log_as_it_was(server, monkeypatch):
    log = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(log, "level", logging.INFO)
    server.add("org/other", {WEIGHTS_NAME: CONTENT[::-1]})
    server.fault = hub_server.drip(40_000, 0.1)  # half a second
    with ThreadPoolExecutor(2) as pool:
        one = pool.submit(fetch)
        time.sleep(0.25)
        other = pool.submit(hub.fetch, HubFile("org/other", WEIGHTS_NAME, "main"), Path.read_bytes)
        one.result()
        assert not other.done() and log.level == logging.ERROR
        other.result()
    assert log.level == logging.INFO


def test_the_limits_hold_for_our_calls_only(server, impatient, tmp_path, monkeypatch):
    before = hf_hub_download(REPO, "config.json", cache_dir=tmp_path / "theirs", endpoint=server.endpoint)
    log = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(log, "level", logging.INFO)
    arrives()
    server.fault = hub_server.endless()
    with pytest.raises(SourceError, match=r"sends more than"):
        hub.fetch(HubFile(REPO, WEIGHTS_NAME, "main"), flunk, most_bytes=len(CONTENT))
    assert log.level == logging.INFO and Path(before).read_bytes() == b"{}"
    server.fault = hub_server.stall(1, after=1000)  # longer than our calls would wait
    server.log.clear()
    response = get_session().get(f"{server.cdn}/lfs/{SHA256}", timeout=5)
    assert response.content == CONTENT and "identity" not in server.log[0].headers["accept-encoding"]
    server.fault = hub_server.status(500)
    assert get_session().get(server.endpoint).status_code == 500


def flunk(path):
    raise WeightsError("never good enough")


def test_a_session_of_the_users_own_making_is_kept(server):
    def factory():
        client = _http.default_client_factory()
        client.headers["X-Proxy"] = "ours"
        return client

    before = _http._GLOBAL_CLIENT_FACTORY
    huggingface_hub.set_client_factory(factory)
    try:
        server.fault = hub_server.endless()
        refused("sends more than")
        assert {seen.headers.get("x-proxy") for seen in server.log} == {"ours"}
    finally:
        huggingface_hub.set_client_factory(before)


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "ALL_PROXY"])
def test_behind_a_proxy_no_name_is_looked_up_here(name, monkeypatch):
    with pytest.raises(SourceError, match="the Hub cannot be found"):
        download.check_name_resolves("https://hub.example", "the Hub")
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    download.check_name_resolves("https://hub.example", "the Hub")


# --- The cache --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kills_at_any_moment_leave_a_cache_that_heals(server, tmp_path, monkeypatch):  # C2
    moments = random.Random(0)
    drip = hub_server.drip(10_000, 0.02)
    broken = 0
    following = start(HF_HOME=str(tmp_path / "home0"))
    for turn in range(20):
        monkeypatch.setenv("HF_HOME", str(tmp_path / f"home{turn}"))
        server.fault = drip
        process = following
        process.stdout.readline()
        time.sleep(moments.uniform(0, 0.6))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
        broken += any("incomplete" in name for name in names_in("blobs"))
        following = start(HF_HOME=str(tmp_path / f"home{turn + 1}"))
        assert {name for name in names_in("blobs") if "incomplete" not in name} <= {SHA256}
        if path := hub.cached(HubFile(REPO, WEIGHTS_NAME, "main")):
            check(path)
        server.fault = None
        arrives()
    following.kill()
    following.communicate(timeout=10)
    assert broken >= 5


def test_what_a_killed_download_left_is_swept(server):  # C3
    blobs = cache.hub_folder() / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    for name in (f"{SHA256}.0123abcd.incomplete", f"{SHA256}.incomplete", f"{'0' * 64}.incomplete"):
        (blobs / name).write_bytes(b"half")
    arrives()


def test_what_a_living_process_downloads_is_left_alone(server):  # C3
    blobs = cache.hub_folder() / "models--org--model" / "blobs"
    locks = cache.hub_folder() / ".locks" / "models--org--model"
    blobs.mkdir(parents=True)
    locks.mkdir(parents=True)
    other = "0" * 64
    (blobs / f"{other}.0123abcd.incomplete").write_bytes(b"half")
    with (locks / f"{other}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetch()
        assert names_in("blobs") == [f"{other}.0123abcd.incomplete", SHA256]
    arrives()


def test_the_lock_of_a_dead_process_holds_nobody_up(server):  # C4
    locks = cache.hub_folder() / ".locks" / "models--org--model"
    locks.mkdir(parents=True)
    held = locks / f"{SHA256}.lock"
    hold = f"import filelock; filelock.FileLock({str(held)!r}).acquire(); print(1, flush=True); input()"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    holder.kill()
    holder.communicate()
    assert held.exists()
    started = time.monotonic()
    arrives()
    assert time.monotonic() - started < 3


@contextmanager
def read_only(folder):
    inside = [folder, *(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())]
    for path in inside:
        path.chmod(0o555)
    yield
    for path in inside:
        path.chmod(0o755)


@pytest.mark.parametrize("revision", ["main", "commit"])
def test_a_cache_that_cannot_be_written_serves_what_it_has(revision, server, weights, tmp_path, permissions):  # C5
    name = f"hf-hub:{REPO}@{weights[1] if revision == 'commit' else 'main'}"
    sources.from_hub_name(name, None, sources.ANYWHERE)
    with read_only(tmp_path / "cache"):
        with pytest.raises(PermissionError, match=r"cache"):
            (tmp_path / "cache" / "hub" / "x").touch()
        assert same(sources.from_hub_name(name, None, sources.ANYWHERE), tensors())
        assert same(sources.from_hub_name(name, None, sources.Access(local_files_only=True)), tensors())


def test_a_cache_that_cannot_be_written_takes_nothing_new(server, tmp_path, permissions):  # C5
    (tmp_path / "cache").mkdir()
    with read_only(tmp_path / "cache"):
        refused(f"cannot write to {tmp_path}/cache.*: Permission denied; free space or choose another folder")
    arrives()


def test_a_cache_in_a_place_that_is_no_folder_is_told(server, tmp_path, monkeypatch):  # C5
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file"))
    refused(f"cannot write to {tmp_path}/file.*: Not a directory; free space or choose another folder")


def test_a_file_beyond_what_the_disk_takes_is_told_and_not_kept(server):  # C6
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        refused("cannot write to .*: File too large; free space or choose another folder .HF_HOME, cache_dir")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    arrives()


def test_a_full_disk_is_told_and_nothing_is_kept(server, monkeypatch):  # C6
    def full(url, temp_file, **_):
        temp_file.write(CONTENT[:1000])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(file_download, "http_get", full)
        refused("cannot write to the cache: No space left on device; free space")
    arrives()


@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, 1000), lambda path: os.truncate(path, 0)])
@pytest.mark.parametrize("revision", ["main", "commit"])
def test_a_damaged_file_of_the_cache_is_fetched_again(revision, damage, server, weights):  # C7, C8
    name = f"hf-hub:{REPO}@{weights[1] if revision == 'commit' else 'main'}"
    path = sources.from_hub_name(name, None, sources.ANYWHERE).file.path
    damage(path.resolve())
    with pytest.raises(WeightsError, match=r"has sha256|is not a weights file|has 1000 bytes, its header tells of"):
        sources.from_hub_name(name, None, sources.Access(local_files_only=True))
    assert same(sources.from_hub_name(name, None, sources.ANYWHERE), tensors())
    assert server.bodies("cdn") == 2 and len(names_in("blobs")) == 1


@pytest.mark.filterwarnings("ignore::gvsl_zoo.sources.SourceNotice")
def test_a_damaged_file_of_the_cache_is_refused_when_nobody_answers(server, weights, impatient):  # C7
    for name in (f"hf-hub:{REPO}@{weights[1]}", f"hf-hub:{REPO}"):
        flip(sources.from_hub_name(name, None, sources.ANYWHERE).file.path.resolve())
        server.fault = hub_server.status(404)
        with pytest.raises((WeightsError, SourceError), match=r"has sha256"):
            sources.from_hub_name(name, None, sources.ANYWHERE)
        server.fault = None


@pytest.mark.parametrize("damage", [flip, lambda path: os.truncate(path, 1000)])
def test_a_damaged_file_of_a_registrys_model_is_fetched_again(damage, server, weights, tmp_path):  # C7, C8
    register_registry(put_registry(tmp_path, weights[0].read_bytes(), weights[1]))
    entry = model_info("mine")
    path = sources.locate(entry).file.path
    damage(path.resolve())
    with pytest.raises(WeightsError, match=r"has sha256|is not a weights file|has 1000 bytes, its header tells of"):
        sources.locate(entry, sources.Access(local_files_only=True))
    assert same(sources.locate(entry), tensors()) and server.bodies("cdn") == 2


def outside(path, tmp_path):
    secret = tmp_path / "secret.safetensors"
    write_weights(tensors(), secret, {})
    path.symlink_to(secret)


def unreadable(path, tmp_path):
    path.write_bytes(CONTENT)
    path.chmod(0)


@pytest.mark.parametrize(
    ("put", "match"),
    [
        (outside, r"leads to .*secret.safetensors, not to a file of the cache\)?; remove"),
        (lambda path, _: path.mkdir(), r"not to a file of the cache\)?; remove"),
        (lambda path, _: path.symlink_to(path), "cannot be read: .*; mend its permissions, or remove it"),
        (unreadable, r"cannot be read: Permission denied\)?; mend its permissions, or remove it"),
    ],
    ids=["outside", "folder", "loop", "unreadable"],
)
def test_an_entry_of_the_cache_that_is_no_file_is_refused(put, match, server, weights, tmp_path, permissions):  # C9
    path = sources.from_hub_name(f"hf-hub:{REPO}", None, sources.ANYWHERE).file.path
    path.unlink()
    put(path, tmp_path)
    for access in (sources.ANYWHERE, sources.Access(local_files_only=True)):
        for name in (f"hf-hub:{REPO}", f"hf-hub:{REPO}@{weights[1]}"):
            with pytest.raises(SourceError, match=match):
                sources.from_hub_name(name, None, access)
    register_registry(put_registry(tmp_path, weights[0].read_bytes(), weights[1]))
    with pytest.raises(SourceError, match=match):
        sources.locate(model_info("mine"))


def test_a_reference_that_leads_out_of_the_cache_is_refused(server, weights, tmp_path):  # C9
    sources.from_hub_name(f"hf-hub:{REPO}", None, sources.ANYWHERE)
    write_weights(tensors(), tmp_path / WEIGHTS_NAME, {})
    [reference] = cache.hub_folder().glob("models--*/refs/main")
    reference.write_text("../../../..")
    with pytest.raises(SourceError, match=r"not to a file of the cache"):
        sources.from_hub_name(f"hf-hub:{REPO}", None, sources.Access(local_files_only=True))


def test_a_link_whose_file_is_gone_is_fetched_again(server, weights):  # C9
    path = sources.from_hub_name(f"hf-hub:{REPO}", None, sources.ANYWHERE).file.path
    path.resolve().unlink()
    with pytest.raises(SourceError, match=r"is not in the cache, and the network is not allowed"):
        sources.from_hub_name(f"hf-hub:{REPO}", None, sources.Access(local_files_only=True))
    for name in (f"hf-hub:{REPO}", f"hf-hub:{REPO}@{weights[1]}"):
        path.resolve().unlink(missing_ok=True)
        assert same(sources.from_hub_name(name, None, sources.ANYWHERE), tensors())


def test_a_cache_that_was_carried_elsewhere_works_and_is_checked(server, weights, tmp_path, monkeypatch):  # C11
    name = f"hf-hub:{REPO}"
    sources.from_hub_name(name, None, sources.ANYWHERE)
    shutil.copytree(tmp_path / "cache", tmp_path / "elsewhere" / "cache", symlinks=True)
    shutil.rmtree(tmp_path / "cache")
    server.stop()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere" / "cache"))
    offline = sources.Access(local_files_only=True)
    found = sources.from_hub_name(name, None, offline)
    assert same(found, tensors()) and found.file.path.is_relative_to(tmp_path / "elsewhere")
    flip(found.file.path.resolve())
    with pytest.raises(WeightsError, match=r"has sha256 .*, expected"):
        sources.from_hub_name(name, None, offline)


def test_a_cache_of_ones_own_is_used_alone(server, nano, tmp_path):
    model = load(f"hf-hub:{REPO}", cache_dir=tmp_path / "mine")
    assert Path(model.load_report.origin).is_relative_to(tmp_path / "mine") and names_in("blobs") == []
    assert load(f"hf-hub:{REPO}", cache_dir=tmp_path / "mine", local_files_only=True).entry.name == NANO
    with pytest.raises(SourceError, match=r"is not in the cache"):
        load(f"hf-hub:{REPO}", local_files_only=True)


def test_the_hubs_own_variable_names_its_cache(server, nano, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert Path(load(f"hf-hub:{REPO}").load_report.origin).is_relative_to(tmp_path / "elsewhere")


def nobody(uid):
    raise KeyError("no such user")


def test_without_a_home_the_embedded_model_loads_and_a_download_is_refused(server, monkeypatch):  # C12
    for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    assert load(NANO).entry.name == NANO
    refused("cannot write to /dev/null/hub.*: Not a directory; free space or choose another folder .HF_HOME")


# --- Without network --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["argument", "variable"])
def test_what_is_not_cached_is_refused_offline_without_a_question(way, server, nano, tmp_path, monkeypatch):
    settings = {"local_files_only": True} if way == "argument" else {}
    if way == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    register_registry(put_registry(tmp_path, server.files(REPO)[WEIGHTS_NAME], nano))
    for name in (f"hf-hub:{REPO}", f"hf-hub:{REPO}@{nano}", "mine"):
        with pytest.raises(
            SourceError, match=r"is not in the cache, and the network is not allowed\)?; allow it .*export"
        ):
            load(name, **settings)
    assert server.log == []


@pytest.mark.parametrize("way", ["argument", "variable"])
def test_what_is_cached_loads_offline_without_a_question(way, server, nano, tmp_path, monkeypatch):
    names = (f"hf-hub:{REPO}", f"hf-hub:{REPO}@{nano}", "mine")
    register_registry(put_registry(tmp_path, server.files(REPO)[WEIGHTS_NAME], nano))
    load(names[0])
    asked = len(server.log)
    settings = {"local_files_only": True} if way == "argument" else {}
    if way == "variable":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert [load(name, **settings).load_report.loaded > 0 for name in names] == [True] * 3
    assert len(server.log) == asked


SOCKETS = """\
import json, sys
events = []
sys.addaudithook(lambda event, args: events.append(event) if event.startswith("socket.") else None)
import gvsl_zoo
model = gvsl_zoo.load(sys.argv[1])
print(json.dumps([model.load_report.sha256, events]))
"""


@pytest.mark.parametrize("source", ["commit", "registry"])
def test_loading_what_is_cached_opens_no_socket(source, server, nano, tmp_path):
    content = server.files(REPO)[WEIGHTS_NAME]
    mine = put_registry(tmp_path, content, nano)
    register_registry(mine)
    name = f"hf-hub:{REPO}@{nano}" if source == "commit" else "mine"
    load(name)
    environment = {**os.environ, "GVSL_ZOO_REGISTRY": str(mine)}
    done = subprocess.run(
        [sys.executable, "-c", SOCKETS, name], capture_output=True, text=True, check=True, env=environment
    )
    assert json.loads(done.stdout) == [hashlib.sha256(content).hexdigest(), []]


def test_loading_what_is_not_cached_is_seen_to_open_sockets(server, nano):
    done = subprocess.run(
        [sys.executable, "-c", SOCKETS, f"hf-hub:{REPO}@{nano}"], capture_output=True, text=True, check=True
    )
    assert "socket.connect" in json.loads(done.stdout)[1]
