"""The Hub of the tests is a faithful peer of the real client, and its faults are what they say."""

import gzip
import json
import time
from pathlib import Path

import hub_server
import pytest
import requests
from hub_server import Hub, Reply
from huggingface_hub import HfApi, errors, hf_hub_download

REPO, LARGE, SMALL = "org/model", "model.safetensors", "config.json"
FILES = {LARGE: bytes(range(256)) * 40, SMALL: b'{"a": 1}', "sub/notes.txt": b"notes"}


@pytest.fixture
def hub(monkeypatch):
    hub_server.keep_local(monkeypatch)
    with Hub() as hub:
        hub.add(REPO, FILES)
        yield hub


@pytest.fixture
def download(hub, tmp_path):
    def get(file, repo=REPO, token=False, **more):
        path = hf_hub_download(repo, file, endpoint=hub.endpoint, cache_dir=tmp_path / "cache", token=token, **more)
        return Path(path).read_bytes()

    return get


def fetch(hub, file=LARGE, method="GET", repo=REPO, revision="main", **more):
    return requests.request(method, f"{hub.endpoint}/{repo}/resolve/{revision}/{file}", timeout=0.5, **more)


# --- The right answers


def test_the_client_downloads(hub, download):
    for file, data in FILES.items():
        assert download(file, token="hf_read") == data
        assert download(file, token="hf_read") == data
    assert hub.bodies() == len(FILES) and hub.bodies("cdn") == 1
    assert all("authorization" in seen.headers for seen in hub.log if seen.server == "hub")
    assert not any("authorization" in seen.headers for seen in hub.log if seen.server == "cdn")


def test_commits_branches_and_tags(hub, download):
    old = hub.add(REPO, FILES)
    new = hub.add(REPO, {SMALL: b"new"})
    hub.tag(REPO, "v1", old)
    hub.add(REPO, {SMALL: b"branch"}, revision="fix/it")
    got = [download(SMALL, revision=one) for one in (old, "v1", new, "main", None, "fix/it")]
    assert got == [FILES[SMALL]] * 2 + [b"new"] * 3 + [b"branch"]
    assert hub.add("org/other", FILES) == old  # content decides


def test_the_client_names_what_is_missing_or_closed(hub, download):
    hub.add("org/private", FILES, private=True)
    hub.add("org/gated", FILES, gated=True)
    for token in (False, "hf_other"):
        for repo in ("no/such", "org/private"):
            with pytest.raises(errors.RepositoryNotFoundError, match=r"401|404") as caught:
                download(SMALL, repo, token)
            assert caught.value.response.status_code == (404 if token else 401)
        with pytest.raises(errors.GatedRepoError, match=r"401|403"):
            download(SMALL, "org/gated", token)
    assert download(SMALL, "org/private", "hf_read") == FILES[SMALL]
    assert download(SMALL, "org/gated", "hf_write") == FILES[SMALL]
    with pytest.raises(errors.RevisionNotFoundError, match=r"404"):
        download(SMALL, revision="nope")
    with pytest.raises(errors.EntryNotFoundError, match=r"404"):
        download("nope.txt")
    with pytest.raises(errors.HfHubHTTPError, match=r"40[0-9]") as caught:
        download(SMALL, token="hf_wrong")
    assert caught.value.response.status_code == 401


def test_the_client_pushes(hub, download, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in {LARGE: b"weights", "README.md": b"---\nlicense: mit\n---\n", SMALL: b"{}"}.items():
        (folder / name).write_bytes(data)
    api = HfApi(endpoint=hub.endpoint, token="hf_write")
    for small in (b"{}", b"{0}"):
        (folder / SMALL).write_bytes(small)
        assert api.create_repo("me/new", private=True, exist_ok=True).repo_id == "me/new"
        commit = api.upload_folder(repo_id="me/new", folder_path=folder, commit_message="push")
        assert download(LARGE, "me/new", "hf_read", revision=commit.oid) == b"weights"
        assert download(LARGE, "me/new", "hf_read") == b"weights"
        sent = [seen for seen in hub.log if seen.method == "PUT"]
        assert len(sent) == 1 and "authorization" not in sent[0].headers
    assert set(hub.files("me/new")) == {".gitattributes", LARGE, "README.md", SMALL} and hub.repos["me/new"].private
    assert api.model_info("me/new").sha == commit.oid and api.whoami()["name"] == "owner"
    api.create_branch("me/new", branch="next", exist_ok=True)
    api.create_branch("me/new", branch="next", exist_ok=True)
    (folder / SMALL).write_bytes(b"{1}")
    other = api.upload_folder(repo_id="me/new", folder_path=folder, revision="next", delete_patterns="*.md")
    assert (hub.files("me/new", "next")[SMALL], hub.files("me/new")[SMALL]) == (b"{1}", b"{0}")
    assert "README.md" in hub.files("me/new", other.oid) and other.oid != commit.oid
    assert set(api.list_repo_files("me/new")) == set(hub.files("me/new"))


def test_a_reader_may_not_push(hub, tmp_path):
    (tmp_path / SMALL).write_bytes(b"{}")
    for token, code in (("hf_read", 403), (False, 401)):
        api = HfApi(endpoint=hub.endpoint, token=token)
        with pytest.raises(errors.HfHubHTTPError, match=r"40[0-9]") as caught:
            api.create_repo("me/new", exist_ok=True)
        assert caught.value.response.status_code == code
        with pytest.raises(errors.HfHubHTTPError, match=r"40[0-9]") as caught:
            api.upload_folder(repo_id=REPO, folder_path=tmp_path, allow_patterns=[SMALL])
        assert caught.value.response.status_code == code
    assert hub.files(REPO) == FILES


def test_ranges():
    with Hub(xet=True) as hub:
        hub.add(REPO, FILES)
        head = fetch(hub, method="HEAD", allow_redirects=False)
        assert head.status_code == 302 and head.headers["X-Linked-Size"] == "10240" and head.links["xet-auth"]
        assert len(head.headers["X-Linked-Etag"]) == 66 and head.headers["Location"].startswith(hub.cdn)
        part = fetch(hub, headers={"Range": "bytes=10-"})
        assert part.status_code == 206 and part.content == FILES[LARGE][10:]
        assert part.headers["Content-Range"] == "bytes 10-10239/10240"
        assert fetch(hub, headers={"Range": "bytes=10240-"}).status_code == 416
        assert requests.get(f"{hub.cdn}/lfs/{'0' * 64}", timeout=1).status_code == 403
        endpoint = hub.endpoint
    with pytest.raises(requests.ConnectionError, match=r"Connection|reset|broken|Remote"):
        requests.get(endpoint, timeout=1)


# --- The faults


def test_status_once_and_for_all(hub):
    hub.fault = hub_server.status(429, times=1, headers={"Retry-After": "7"})
    first, second = fetch(hub), fetch(hub)
    assert (first.status_code, first.headers["Retry-After"], second.content) == (429, "7", FILES[LARGE])
    hub.fault = hub_server.status(500, on=hub_server.bodies)
    assert [fetch(hub, method="HEAD").status_code for _ in range(3)] == [200] * 3
    assert [fetch(hub).status_code for _ in range(3)] == [500] * 3


def test_a_fault_before_or_after_the_effect(hub):
    create = {"url": f"{hub.endpoint}/api/repos/create", "json": {"name": "new", "organization": "me"}}
    create["headers"] = {"Authorization": "Bearer hf_write"}
    hub.fault = hub_server.status(500, times=1, on=hub_server.at("/create"))
    assert requests.post(**create, timeout=1).status_code == 500 and "me/new" not in hub.repos
    hub.fault = hub_server.reset(after=None, times=1, on=hub_server.writes)
    with pytest.raises(requests.ConnectionError, match=r"Connection|reset|broken|Remote"):
        requests.post(**create, timeout=1)
    assert "me/new" in hub.repos


def test_a_fault_of_ones_own(hub):
    hub.fault = lambda request: request.method == "HEAD" and request.send(Reply(503))
    assert fetch(hub, method="HEAD").status_code == 503 and fetch(hub).status_code == 200


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("IncompleteRead", hub_server.truncate(100, times=1)),
        ("reset", hub_server.reset(100, times=1)),
        ("timed out", hub_server.stall(5, after=100, times=1)),
    ],
)
def test_bodies_that_break_off(hub, name, fault):
    hub.fault = fault
    answer = fetch(hub, stream=True)
    assert answer.headers["Content-Length"] == "10240" and answer.raw.read(100) == FILES[LARGE][:100]
    with pytest.raises(requests.RequestException, match=name):
        list(answer.iter_content(100))
    assert fetch(hub).content == FILES[LARGE]
    assert hub.bodies("cdn") == 2


def test_slow_bodies(hub):
    hub.fault = hub_server.drip(4000, 0.05)
    start = time.monotonic()
    assert fetch(hub).content == FILES[LARGE] and time.monotonic() - start > 0.1
    hub.fault = hub_server.hang()
    with pytest.raises(requests.Timeout, match=r"[Tt]ime"):
        fetch(hub, method="HEAD")
    assert fetch(hub).content == FILES[LARGE]


def test_wrong_bodies(hub):
    hub.fault = hub_server.wrong_bytes(times=1)
    wrong = fetch(hub).content
    assert len(wrong) == 10240 and sum(a != b for a, b in zip(wrong, FILES[LARGE], strict=True)) == 1
    hub.fault = hub_server.wrong_bytes(zeros=True)
    assert fetch(hub).content == bytes(10240)
    hub.fault = hub_server.longer(5)
    assert fetch(hub).headers["Content-Length"] == "10245" and fetch(hub).content == FILES[LARGE] + bytes(5)
    hub.fault = hub_server.longer(5, announced=False)
    assert fetch(hub).content == FILES[LARGE]
    hub.fault = hub_server.gzipped()
    raw = fetch(hub, stream=True)
    assert raw.headers["Content-Encoding"] == "gzip" and gzip.decompress(raw.raw.read()) == FILES[LARGE]
    hub.fault = hub_server.other_etag()
    assert fetch(hub).headers["ETag"] == f'"{"0" * 64}"'
    hub.fault = hub_server.endless()
    endless, size = fetch(hub, stream=True), 0
    while size < 2**22:
        size += len(endless.raw.read(65536))
    endless.close()


def test_wrong_ranges(hub):
    whole, part = FILES[LARGE], {"Range": "bytes=10-"}
    hub.fault = hub_server.wrong_range(3, times=1)
    answer = fetch(hub, headers=part)
    assert answer.content == whole[3:] and answer.headers["Content-Range"] == "bytes 3-10239/10240"
    hub.fault = hub_server.first(hub_server.ignored_range(times=1), hub_server.refused_range())
    answers = [fetch(hub, headers=part), fetch(hub, headers=part), fetch(hub)]
    assert [answer.status_code for answer in answers] == [200, 416, 200]
    assert answers[0].content == answers[2].content == whole


def test_wrong_places(hub):
    hub.fault = hub_server.html_portal()
    page = fetch(hub, method="HEAD")
    assert page.status_code == 200 and "html" in page.headers["Content-Type"] and "X-Repo-Commit" not in page.headers
    assert b"sign in" in fetch(hub).content
    for absolute in (False, True):
        hub.fault = hub_server.redirect_loop(absolute=absolute)
        with pytest.raises(requests.TooManyRedirects, match=r"redirect"):
            fetch(hub)
    with Hub() as other:
        other.fault = hub_server.status(200, body=b"elsewhere")
        hub.fault = hub_server.redirect_to(f"{other.endpoint}/x")
        assert fetch(hub).content == b"elsewhere"
    hub.fault = hub_server.headers({"X-Repo-Commit": None}, on=hub_server.heads)
    assert "X-Repo-Commit" not in fetch(hub, method="HEAD", allow_redirects=False).headers


def test_the_log_says_what_was_asked(hub):
    fetch(hub, headers={"Range": "bytes=1-", "Authorization": "Bearer hf_read"})
    first, second = hub.log
    assert (first.server, first.method, first.path) == ("hub", "GET", f"/{REPO}/resolve/main/{LARGE}")
    assert first.headers["authorization"] == "Bearer hf_read" and (first.is_body, second.is_body) == (False, True)
    assert second.server == "cdn" and second.range == "bytes=1-" and json.dumps(second.headers)
