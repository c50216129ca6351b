"""The Hugging Face Hub on 127.0.0.1: it answers the real client as the Hub does, or wrongly on purpose.

    with Hub() as hub:
        commit = hub.add("org/repo", {"model.safetensors": b"weights", "config.json": b"{}"})
        hub.fault = truncate(3, times=1)
        hf_hub_download("org/repo", "model.safetensors", endpoint=hub.endpoint)
        assert hub.bodies() == 2

Large files (by their names, LARGE) come from a second server, hub.cdn, to which the first one redirects, as the Hub
does. Three tokens are known: "hf_write" may read and write everything, "hf_read" may read everything, "hf_other" what
is public.

A fault is a function of the request that returns True if it answered. A test may write its own: request.method, .path,
.headers and .reply (the right answer, worked out when first asked for) are there, and request.send(Reply(...)).
Xet storage is offered with Hub(xet=True), but not played. huggingface_hub >= 2 uploads folders only there, unless
told otherwise, and asks huggingface.co about agents whatever endpoint it is given: see `keep_local`.
"""

import base64
import gzip
import hashlib
import json
import os
import re
import socket
import struct
import threading
import time
from contextlib import suppress
from functools import cached_property
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

TOKENS = {"hf_write": ("owner", "write"), "hf_read": ("owner", "read"), "hf_other": ("stranger", "read")}
OWN_NAME = "https://huggingface.co"  # in addresses that are shown to people; nobody asks there
LARGE = (".safetensors", ".pth", ".pt", ".bin")


def keep_local(monkeypatch, xet=False):
    """Let the client of this process ask nobody but the endpoint it is given; `xet`: it may ask for Xet storage."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not xet)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def blob_id(path, data):
    """The id under which the Hub keeps a file: sha256 of large ones, git's sha1 of the others."""
    return sha256(data) if path.endswith(LARGE) else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Reply:
    """A status, a body (bytes, or what JSON can say) and headers; `whole` is the file of which the body is a part."""

    def __init__(self, status=200, body=b"", headers=None, whole=None):
        self.status, self.headers, self.whole = status, dict(headers or {}), whole
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers.setdefault("Content-Type", "text/plain" if isinstance(body, bytes) else "application/json")


class Refusal(Exception):
    def __init__(self, status, message, code=None):
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.reply = Reply(status, {"error": message}, headers)


class Repo:
    """Commits are dicts of files; branches and tags name them."""

    def __init__(self, name, private=False, gated=False):
        self.name, self.private, self.gated = name, private, gated
        self.commits, self.branches, self.tags = {}, {}, {}

    def commit(self, files, branch="main"):
        content = "".join(f"{path}\0{sha256(data)}\n" for path, data in sorted(files.items()))
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = dict(files)
        self.branches[branch] = oid
        return oid

    def find(self, revision):
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid


class Seen(NamedTuple):
    """A request in the log. `headers` has lower-case names, `is_body` tells a GET of a file's bytes."""

    server: str
    method: str
    path: str
    headers: dict
    range: str | None
    is_body: bool


class Server(ThreadingMixIn, TCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, hub, name, answer):
        super().__init__(("127.0.0.1", 0), Request)
        self.hub, self.name, self.answer = hub, name, answer
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def setup(self):
        super().setup()
        self.hub = self.server.hub
        self.hub.connections.add(self.connection)

    def handle(self):
        with suppress(OSError):  # the client has left, or the Hub has closed
            super().handle()

    def finish(self):
        super().finish()
        self.hub.connections.discard(self.connection)

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.__dict__.pop("reply", None)
        self.method, self.name = self.command, self.server.name
        self.parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.payload = self._read_payload()
        headers = {name.lower(): value for name, value in self.headers.items()}
        seen = Seen(self.name, self.method, self.path, headers, headers.get("range"), self.is_body)
        self.hub.log.append(seen)
        if not (self.hub.fault and self.hub.fault(self)):
            self.send(self.reply)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def _read_payload(self):
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        blocks = []
        while size := int(self.rfile.readline().split(b";")[0] or b"0", 16):
            blocks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(blocks)

    @cached_property
    def reply(self):
        """The right answer; working it out has the request's effect."""
        try:
            return self.server.answer(self)
        except Refusal as refusal:
            return refusal.reply

    @property
    def is_body(self):
        return self.method == "GET" and self.reply.whole is not None

    @property
    def user(self):
        """(name, role), None without a token."""
        given = self.headers.get("Authorization")
        if not given:
            return None
        if given.removeprefix("Bearer ") not in TOKENS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return TOKENS[given.removeprefix("Bearer ")]

    def json(self):
        return json.loads(self.payload or b"{}")

    def send(self, reply):
        self.send_head(reply)
        if self.method != "HEAD":
            self.wfile.write(reply.body)
        return True

    def send_head(self, reply):
        """Everything but the body. A header that is None is left out."""
        headers = {"Content-Length": len(reply.body), **reply.headers}
        lines = [
            f"HTTP/1.1 {reply.status} -",
            *(f"{name}: {value}" for name, value in headers.items() if value is not None),
        ]
        self.wfile.write("\r\n".join([*lines, "", ""]).encode())
        if reply.headers.get("Connection") == "close":
            self.close_connection = True

    def hang_up(self, reset=False):
        """End the connection: in order, or with a TCP reset."""
        self.close_connection = True
        if reset:
            time.sleep(0.05)  # a reset destroys what the client has not read yet
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.hub.connections.discard(self.connection)
            os.close(self.connection.detach())


class Hub:
    """The Hub and its content network. `fault`: what goes wrong; `log`: every request; `xet`: offer Xet storage too."""

    def __init__(self, xet=False):
        self.xet, self.fault = xet, None
        self.repos, self.objects, self.log = {}, {}, []
        self.connections, self.closed, self.lock = set(), threading.Event(), threading.Lock()
        self.servers = [Server(self, "hub", self.answer), Server(self, "cdn", self.answer_cdn)]
        self.endpoint, self.cdn = (server.url for server in self.servers)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self):
        """Answer nobody any more: connections break, new ones are refused."""
        self.closed.set()
        for server in self.servers:
            server.shutdown()
            server.server_close()
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def add(self, repo, files, revision=None, private=False, gated=False):
        """Commit exactly these files, {path: bytes}, to the branch `revision` (default main); return the commit."""
        kept = self.repos.setdefault(repo, Repo(repo))
        kept.private, kept.gated = private, gated
        self.objects |= {sha256(data): data for data in files.values()}
        commit = kept.commit(files, revision or "main")
        kept.branches.setdefault("main", commit)
        return commit

    def tag(self, repo, name, revision="main"):
        self.repos[repo].tags[name] = self.repos[repo].find(revision)

    def files(self, repo, revision="main"):
        """What the repository holds, {path: bytes}."""
        return self.repos[repo].commits[self.repos[repo].find(revision)]

    def bodies(self, server=None):
        """How many GETs asked for a file's bytes."""
        return sum(seen.is_body and server in (None, seen.server) for seen in self.log)

    # --- The right answers

    def answer(self, request):
        with self.lock:
            match request.method, *request.parts:
                case "GET", "api", "whoami-v2":
                    name, role = self._known(request)
                    token = {"role": role, "displayName": "test"}
                    return Reply(200, {"type": "user", "name": name, "orgs": [], "auth": {"accessToken": token}})
                case "GET", "api", "agent-harnesses":
                    return Reply(200, {"standardEnvVars": [], "harnesses": {}})
                case "POST", "api", "validate-yaml":
                    return Reply(200, {"errors": [], "warnings": []})
                case "POST", "api", "repos", "create":
                    return self._create(request)
                case "GET" | "POST", "api", "models", org, name, *rest:
                    repo = self._repo(request, f"{org}/{name}")
                    return (
                        self._read_api(repo, rest) if request.method == "GET" else self._write_api(request, repo, rest)
                    )
                case "HEAD" | "GET", org, name, "resolve", revision, *path:
                    return self._resolve(request, self._repo(request, f"{org}/{name}"), revision, "/".join(path))
                case "POST", org, name, "info", "lfs", *rest:
                    self._writer(request)
                    self._repo(request, f"{org}/{name.removesuffix('.git')}")
                    return self._batch(request) if rest == ["objects", "batch"] else Reply(200, {"success": True})
        return Reply(404, {"error": "Not Found"})

    def answer_cdn(self, request):
        match request.method, *request.parts:
            case "HEAD" | "GET", "lfs", oid if oid in self.objects:
                return _file_reply(request, self.objects[oid], {"ETag": f'"{oid}"'})
            case "PUT", "upload", oid:
                if sha256(request.payload) != oid:
                    return Reply(400, b"<Error><Code>BadDigest</Code></Error>")
                self.objects[oid] = request.payload
                return Reply(200, b"", {"ETag": f'"{oid}"'})
        return Reply(403, b"<Error><Code>AccessDenied</Code></Error>")

    def _known(self, request):
        if request.user is None:
            raise Refusal(401, "Invalid username or password.")
        return request.user

    def _writer(self, request):
        if self._known(request)[1] != "write":
            raise Refusal(403, "You don't have the rights to write to this repository")

    def _repo(self, request, name):
        repo, user = self.repos.get(name), request.user
        if repo is None or (repo.private and (user or ("",))[0] != "owner"):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _resolve(self, request, repo, revision, path):
        if repo.gated and (request.user or ("",))[0] != "owner":
            message = f"Access to model {repo.name} is restricted and you are not in the authorized list."
            raise Refusal(403 if request.user else 401, message, "GatedRepo")
        commit = repo.find(revision)
        headers = {"X-Repo-Commit": commit}
        if path not in repo.commits[commit]:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.reply.headers |= headers
            raise refusal
        data = repo.commits[commit][path]
        oid = blob_id(path, data)
        if not path.endswith(LARGE):
            return _file_reply(request, data, {**headers, "ETag": f'"{oid}"'})
        headers |= {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": len(data), "Accept-Ranges": "bytes"}
        headers["Location"] = f"{self.cdn}/lfs/{oid}?signature=valid"
        if self.xet:
            route = f"{self.endpoint}/api/models/{repo.name}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": oid, "X-Xet-Refresh-Route": route, "Link": f'<{route}>; rel="xet-auth"'}
        return Reply(302, f"Found. Redirecting to {headers['Location']}".encode(), headers)

    def _read_api(self, repo, rest):
        match rest:
            case [] | ["revision", _]:
                commit = repo.find(rest[1] if rest else "main")
                siblings = [{"rfilename": path} for path in sorted(repo.commits[commit])]
                info = {"id": repo.name, "modelId": repo.name, "sha": commit, "siblings": siblings}
                return Reply(
                    200, {**info, "private": repo.private, "gated": "auto" if repo.gated else False, "tags": []}
                )
            case ["refs"]:
                named = {"branches": repo.branches, "tags": repo.tags}
                refs = {
                    kind: [{"name": n, "ref": f"refs/{n}", "targetCommit": c} for n, c in own.items()]
                    for kind, own in named.items()
                }
                return Reply(200, {**refs, "converts": []})
            case ["tree", revision, *_]:
                files = repo.commits[repo.find(revision)].items()
                return Reply(200, [_tree_entry(path, data) for path, data in files])
            case ["xet-read-token" | "xet-write-token", _] if self.xet:
                expires = int(time.time()) + 3600
                headers = {"X-Xet-Cas-Url": self.cdn, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": expires}
                return Reply(200, {"casUrl": self.cdn, "accessToken": "xet", "exp": expires}, headers)
        return Reply(404, {"error": "Not Found"})

    def _create(self, request):
        self._writer(request)
        wanted = request.json()
        name = f"{wanted.get('organization') or 'owner'}/{wanted['name']}"
        url = f"{OWN_NAME}/{name}"
        if name in self.repos:
            return Reply(409, {"error": "You already created this model repo", "url": url})
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.add(
            name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, private=bool(private)
        )
        return Reply(200, {"url": url, "name": name, "id": name})

    def _write_api(self, request, repo, rest):
        self._writer(request)
        match rest:
            case ["preupload", revision]:
                there = repo.commits[repo.find(revision)]
                files = [_upload_mode(wanted["path"], there) for wanted in request.json()["files"]]
                return Reply(200, {"files": files, "commitOid": repo.find(revision)})
            case ["branch", name]:
                if name in repo.branches:
                    raise Refusal(409, f"Reference already exists: refs/heads/{name}")
                repo.branches[name] = repo.find(request.json().get("startingPoint", "main"))
                return Reply(200, {})
            case ["tag", revision]:
                repo.tags[request.json()["tag"]] = repo.find(revision)
                return Reply(200, {})
            case ["commit", branch] if branch in repo.branches:
                return self._commit(request, repo, branch)
            case ["commit", branch]:
                raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return Reply(404, {"error": "Not Found"})

    def _batch(self, request):
        """Where to upload the objects that the Hub lacks."""

        def place(wanted):
            if wanted["oid"] in self.objects:
                return wanted
            upload = {"href": f"{self.cdn}/upload/{wanted['oid']}?signature=valid"}
            verify = {"href": f"{self.endpoint}/{'/'.join(request.parts[:2])}/info/lfs/verify"}
            return {**wanted, "authenticated": True, "actions": {"upload": upload, "verify": verify}}

        return Reply(200, {"transfer": "basic", "objects": [place(wanted) for wanted in request.json()["objects"]]})

    def _commit(self, request, repo, branch):
        files = dict(repo.commits[repo.branches[branch]])
        for line in request.payload.splitlines():
            kind, value = (entry := json.loads(line))["key"], entry["value"]
            path = value.get("path")
            match kind:
                case "header" if value.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
                    raise Refusal(412, "A commit has happened since. Please refresh and try again.")
                case "file":
                    files[path] = base64.b64decode(value["content"])
                case "lfsFile":
                    if value["oid"] not in self.objects:
                        raise Refusal(400, f"Your push was rejected: {path} was not uploaded")
                    files[path] = self.objects[value["oid"]]
                case "deletedFile" | "deletedFolder":
                    files = {own: data for own, data in files.items() if own != path and not own.startswith(f"{path}/")}
        oid = repo.commit(files, branch)
        url = f"{OWN_NAME}/{repo.name}/commit/{oid}"
        return Reply(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})


def _file_reply(request, data, headers):
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if not asked:
        return Reply(200, data, headers, whole=data)
    start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
    if start >= len(data):
        return Reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
    return Reply(206, data[start : end + 1], headers, whole=data)


def _tree_entry(path, data):
    entry = {"type": "file", "path": path, "size": len(data), "oid": blob_id(path, data)}
    lfs = {"lfs": {"oid": sha256(data), "size": len(data), "pointerSize": 134}} if path.endswith(LARGE) else {}
    return entry | lfs


def _upload_mode(path, there):
    mode = "lfs" if path.endswith(LARGE) else "regular"
    oid = blob_id(path, there[path]) if path in there else None
    return {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid}


# --- Which requests a fault concerns -----------------------------------------------------------------------------


def anything(request):
    return True


def heads(request):
    return request.method == "HEAD"


def bodies(request):
    """GETs that a file's bytes would answer."""
    return request.is_body


def ranges(request):
    """GETs of bodies that ask for a part."""
    return request.is_body and "Range" in request.headers


def writes(request):
    return request.method in ("POST", "PUT")


def at(text):
    """Requests whose path has this text: "/commit/", "validate-yaml", "/upload/"."""
    return lambda request: text in request.path


# --- What can go wrong ---------------------------------------------------------------------------------------------


def fault(answer, times=None, on=anything):
    """`answer(request)` in place of the right answer, for the first `times` requests (None: all) that `on` picks."""
    lock, done = threading.Lock(), []

    def happens(request):
        with lock:
            if len(done) == times or not on(request):
                return False
            done.append(request.path)
        answer(request)
        return True

    return happens


def first(*faults):
    """The first of several faults that happens."""
    return lambda request: any(one(request) for one in faults)


def status(code, times=None, headers=None, on=anything, body=b""):
    return fault(lambda request: request.send(Reply(code, body, headers)), times, on)


def headers(changes, times=None, on=anything):
    """The right answer with other headers; None removes one."""

    def answer(request):
        request.reply.headers |= changes
        request.send(request.reply)

    return fault(answer, times, on)


def other_etag(times=None):
    """The GET of a body has another ETag than the HEAD had."""
    return headers({"ETag": f'"{"0" * 64}"'}, times, bodies)


def truncate(size, times=None):
    """The header announces the whole body, `size` bytes come, and the connection closes."""

    def answer(request):
        request.send_head(request.reply)
        request.wfile.write(request.reply.body[:size])
        request.hang_up()

    return fault(answer, times, bodies)


def reset(after=0, times=None, on=bodies):
    """A TCP reset after so many bytes of the body; with None before any answer, though the request has its effect."""

    def answer(request):
        reply = request.reply
        if after is not None:
            request.send_head(reply)
            request.wfile.write(reply.body[:after])
        request.hang_up(reset=True)

    return fault(answer, times, on)


def stall(seconds, after=0, times=None):
    """Silence after so many bytes of the body; then the rest."""

    def answer(request):
        request.send_head(request.reply)
        request.wfile.write(request.reply.body[:after])
        request.hub.closed.wait(seconds)
        request.wfile.write(request.reply.body[after:])

    return fault(answer, times, bodies)


def drip(size, interval, times=None):
    """So many bytes of the body every `interval` seconds."""

    def answer(request):
        request.send_head(request.reply)
        for start in range(0, len(request.reply.body), size):
            request.wfile.write(request.reply.body[start : start + size])
            request.hub.closed.wait(interval)

    return fault(answer, times, bodies)


def hang(seconds=60.0, times=None, on=heads):
    """No answer at all; then the connection closes."""

    def answer(request):
        request.hub.closed.wait(seconds)
        request.hang_up()

    return fault(answer, times, on)


def wrong_bytes(times=None, zeros=False):
    """A body of the right length with one byte changed in its middle, or all zeros."""

    def answer(request):
        body = bytearray(request.reply.body)
        if zeros:
            body = bytearray(len(body))
        else:
            body[len(body) // 2] ^= 1
        request.reply.body = bytes(body)
        request.send(request.reply)

    return fault(answer, times, bodies)


def endless(times=None, block=b"\0" * 65536):
    """A body without length that does not end before the client leaves."""

    def answer(request):
        request.reply.headers |= {"Content-Length": None, "Transfer-Encoding": "chunked"}
        request.send_head(request.reply)
        while not request.hub.closed.is_set():
            request.wfile.write(b"%x\r\n%b\r\n" % (len(block), block))

    return fault(answer, times, bodies)


def longer(extra, times=None, announced=True):
    """More bytes than the HEAD has said; not `announced`: even more than the GET's own Content-Length says."""

    def answer(request):
        if not announced:
            request.reply.headers["Content-Length"] = len(request.reply.body)
            request.hang_up()
        request.reply.body += b"\0" * extra
        request.send(request.reply)

    return fault(answer, times, bodies)


def gzipped(times=None):
    """A compressed body that nobody has asked for."""

    def answer(request):
        request.reply.body = gzip.compress(request.reply.body)
        request.reply.headers["Content-Encoding"] = "gzip"
        request.send(request.reply)

    return fault(answer, times, bodies)


def html_portal(on=anything):
    """The sign-in page of a hotel's network, whatever is asked."""
    return status(200, None, {"Content-Type": "text/html"}, on, b"<html><body>Please sign in</body></html>")


def redirect_to(url, times=None, on=anything, code=302):
    return status(code, times, {"Location": url}, on)


def redirect_loop(on=anything, absolute=False):
    """Every address leads to itself."""

    def answer(request):
        request.send(Reply(302, b"", {"Location": request.server.url * absolute + request.path}))

    return fault(answer, None, on)


def wrong_range(start=0, times=None):
    """A part is asked for; another comes, from `start` on, and says so."""

    def answer(request):
        reply = request.reply
        size = len(reply.whole)
        reply.body = reply.whole[start:]
        reply.headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
        request.send(reply)

    return fault(answer, times, ranges)


def ignored_range(times=None):
    """A part is asked for; the whole comes, with status 200."""
    return fault(lambda request: request.send(Reply(200, request.reply.whole)), times, ranges)


def refused_range(times=None):
    """A part is asked for; the answer is 416."""
    return status(416, times, {"Content-Range": "bytes */0"}, ranges)
