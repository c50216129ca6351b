"""The Hugging Face Hub through its own client, within limits that the client itself lacks.

The client keeps its cache layout, tokens, mirrors (HF_ENDPOINT) and proxies. What is added passes through hooks of
its HTTP session, which do nothing outside our calls: limits of bytes and time, no compression, no endless waits.
Bodies come over plain HTTP, where those limits hold, and not over Xet; the bytes are the same.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from . import __version__, download
from .cache import CacheDir, hub_folder
from .download import Meter, Transient
from .errors import ArgumentError, GvslZooError, SourceError, WeightsError

PREFIX = "hf-hub:"
LONGEST_REPO = 96  # characters that the Hub takes
WHERE = "the Hub"
DEFAULT_ENDPOINT = "https://huggingface.co"
CLIENT: dict[str, Any] = {"library_name": "gvsl-zoo", "library_version": __version__}
MOST_BYTES = 4 * 2**30  # of a file whose size no registry knows
UPLOAD_SECONDS = 60.0  # silence that is accepted while the Hub digests an upload
PUBLISHER = "report it to the model's publisher"
LOG_IN = "log in (hf auth login, or set HF_TOKEN) with an account that may"
COMMIT = re.compile("[0-9a-f]{40}")
_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
_TIMEOUTS = ("connect", "read", "write", "pool")
_meter: ContextVar[HubMeter | None] = ContextVar("meter", default=None)
_lock = threading.Lock()  # of the client's factory and its log, which all threads share
_log_levels: list[int] = []  # before each call in progress; the first is the user's


class HubFile(NamedTuple):
    """A file of a repository at a revision: a commit, a branch or a tag."""

    repo: str
    file: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision[:12]}: {self.file}"


class HubMeter(Meter):
    """Notes whether the Hub named a commit, as it does for every file that it has, and its last status."""

    named_commit = False
    status: int | None = None


def endpoint() -> str:
    """The Hub's address, or that of the mirror in HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def _check_endpoint() -> None:
    """Refuse an HF_ENDPOINT that is no address, or whose host cannot be found."""
    if not endpoint().startswith(("http://", "https://")):
        raise ArgumentError(f"HF_ENDPOINT is {shown(endpoint())!r}", "write it with https:// before it")
    download.check_name_resolves(endpoint(), WHERE)


def shown(url: str) -> str:
    """An address without the name and password that it may hold."""
    return re.sub("//[^/]*@", "//", url)


def parse_name(name: str, file: str, revision: str | None = None) -> HubFile:
    """The file that `hf-hub:org/repo` or `hf-hub:org/repo@revision` means; default the branch main."""
    repo, _, own = name.removeprefix(PREFIX).partition("@")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*", repo) or ".." in repo:
        raise ArgumentError(f"{name!r} names no repository", "write hf-hub:org/repo or hf-hub:org/repo@revision")
    if "--" in repo or repo.endswith((".git", ".", "-")) or len(repo) > LONGEST_REPO:
        raise ArgumentError(f"{repo!r} is no name that the Hub has", "it has no --, .git, . or - at its end")
    if own and revision and own != revision:
        raise ArgumentError(f"{name!r} with revision={revision!r}", "give the revision once")
    wanted = own or revision or "main"
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._/-]*", wanted) or ".." in wanted:
        raise ArgumentError(f"{wanted!r} is no revision", "give a commit, a branch or a tag")
    return HubFile(repo, file, wanted)


# --- Reading ---------------------------------------------------------------------------------------------------


def cached(wanted: HubFile, cache_dir: CacheDir = None) -> Path | None:
    """The file's path in the Hub's cache, or None; no network, no client.

    Raises: SourceError for an entry of the cache that leads out of it or cannot be read.
    """
    folder = _repo_folder(wanted.repo, cache_dir)
    commit = wanted.revision
    if not COMMIT.fullmatch(commit):
        try:
            commit = (folder / "refs" / commit).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
    path = folder / "snapshots" / commit / wanted.file
    if not os.path.lexists(path):
        return None
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(hub_folder(cache_dir).resolve()) or not real.is_file():
            raise SourceError(f"{path} leads to {real}, not to a file of the cache", f"remove {path}")
        with real.open("rb"):
            return path
    except FileNotFoundError:  # a link whose blob is gone: not cached
        return None
    except (OSError, RuntimeError) as error:
        cause = f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        raise SourceError(cause, "mend its permissions, or remove it") from None


def fetch(
    wanted: HubFile,
    check: Callable[[Path], object],
    *,
    most_bytes: int | None = None,
    cache_dir: CacheDir = None,
    token: str | bool | None = None,
) -> Path:
    """Bring a file into the Hub's cache, unless it is there; what `check` refuses is fetched once more, then dropped.

    Args:
        check: raises WeightsError for wrong content.
        most_bytes: the size that the registry states; a little more may arrive.

    Raises: SourceError for every failure, of whatever library.
    """
    limit = MOST_BYTES if most_bytes is None else most_bytes + download.SPARE_BYTES
    meter = HubMeter(WHERE, limit)
    with _kept_ref(wanted, cache_dir):
        path = _download(wanted, meter, cache_dir, token, force=False)
        try:
            check(path)
            return path
        except WeightsError:
            path = _download(wanted, meter, cache_dir, token, force=True)
        try:
            check(path)
            return path
        except WeightsError as error:
            for wrong in (path.resolve(), path):
                with suppress(OSError):
                    wrong.unlink()
            raise SourceError(
                f"{WHERE} sent a wrong file twice ({error.cause})", f"{PUBLISHER}; nothing was kept"
            ) from None


@contextmanager
def _kept_ref(wanted: HubFile, cache_dir: CacheDir) -> Iterator[None]:
    """Where a branch's new file does not arrive, let the branch be what is cached of it: the client moves it first."""
    ref = _repo_folder(wanted.repo, cache_dir) / "refs" / wanted.revision
    before = None
    with suppress(OSError):
        before = ref.read_bytes()
    try:
        yield
    except BaseException:
        if before is not None:
            with suppress(OSError):
                ref.write_bytes(before)
        raise


def _download(wanted: HubFile, meter: HubMeter, cache_dir: CacheDir, token: str | bool | None, *, force: bool) -> Path:
    from huggingface_hub import hf_hub_download

    def once() -> Path:
        _sweep(_repo_folder(wanted.repo, cache_dir))  # each time: early clients go on from what a failed attempt left
        with _explained(wanted.repo):
            _check_token(token)
            path = Path(
                hf_hub_download(
                    wanted.repo,
                    wanted.file,
                    revision=wanted.revision,
                    cache_dir=hub_folder(cache_dir),
                    endpoint=endpoint(),
                    token=token,
                    force_download=force,
                    etag_timeout=download.READ_SECONDS,
                    **CLIENT,
                )
            )
        if not (meter.named_commit or COMMIT.fullmatch(wanted.revision)):  # the client took its cache, and says nothing
            said = f"answered {meter.status} for {wanted.repo}" if meter.answered else "does not answer"
            raise SourceError(f"{WHERE} {said}", "check the network, the name and the token")
        return path

    _check_endpoint()
    try:
        with _metered(meter):
            return download.persist(meter, once)
    finally:
        _sweep(_repo_folder(wanted.repo, cache_dir))


def _check_token(token: str | bool | None) -> None:
    """Refuse a token that no header can hold; the libraries below quote it in their errors."""
    from huggingface_hub import get_token

    given = token if isinstance(token, str) else None if token is False else get_token()
    if given and not re.fullmatch("[!-~]+", given):
        raise SourceError("the token holds characters that no token has", f"{LOG_IN} do this")


def announced_sha256(path: Path) -> str | None:
    """The sha256 that the Hub announced for a cached file: its blob's name; None where it keeps no such names."""
    name = path.resolve().name
    return name if re.fullmatch("[0-9a-f]{64}", name) else None


def _repo_folder(repo: str, cache_dir: CacheDir) -> Path:
    return hub_folder(cache_dir) / f"models--{repo.replace('/', '--')}"


def _sweep(folder: Path) -> None:
    """Remove what killed downloads left: an .incomplete file whose lock nobody holds."""
    from filelock import FileLock, Timeout

    for orphan in (folder / "blobs").glob("*.incomplete"):
        lock = folder.parent / ".locks" / folder.name / f"{orphan.name.split('.')[0]}.lock"
        with suppress(OSError, Timeout, NotImplementedError):
            lock.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(lock, timeout=0):
                orphan.unlink()


# --- The client's session -----------------------------------------------------------------------------------------


@contextmanager
def _metered(meter: HubMeter) -> Iterator[None]:
    """Let the client's requests of this context pass by `meter`, and keep its log from repeating what we say."""
    _watch_sessions()
    log = logging.getLogger("huggingface_hub")
    token = _meter.set(meter)
    with _lock:
        _log_levels.append(log.level)
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        with _lock:
            log.setLevel(_log_levels.pop())  # the user's comes last, whoever ends last
        _meter.reset(token)


def _watch_sessions() -> None:
    """Add our hooks to every session that the client makes from now on."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    with _lock:
        make = _http._GLOBAL_CLIENT_FACTORY
        if getattr(make, "watched", False):
            return

        def watched_factory() -> Any:
            client = make()
            hooks = client.event_hooks
            client.event_hooks = {
                "request": [*hooks.get("request", ()), _on_request],
                "response": [*hooks.get("response", ()), _on_response],
            }
            return client

        watched_factory.watched = True  # type: ignore[attr-defined]
        set_client_factory(watched_factory)


def _on_request(request: Any) -> None:
    if meter := _meter.get():
        meter.request()
        own = request.extensions.get("timeout", {})
        limits = {kind: min(own.get(kind) or meter.patience, meter.patience) for kind in _TIMEOUTS}
        request.extensions["timeout"] = limits
        request.headers["Accept-Encoding"] = "identity"


def _on_response(response: Any) -> None:
    meter = _meter.get()
    if meter is None:
        return
    meter.answered = True
    status, headers = response.status_code, response.headers
    meter.status = status
    meter.named_commit |= "X-Repo-Commit" in headers
    if status == 429:
        wait = download.retry_after(headers.get("Retry-After"))
        raise Transient(f"{WHERE} is asked too often (429)", download.TRY_LATER, wait)
    if status in (408, 416) or status >= 500:
        raise Transient(f"{WHERE} answered {status}")
    for name in ("X-Linked-Etag", "ETag", "X-Repo-Commit"):  # the client makes paths of them
        if not re.fullmatch(r'(W/)?"?[A-Za-z0-9_-]{0,128}"?', headers.get(name, "")):
            raise SourceError(f"{WHERE} announces the hash or commit {headers[name][:80]!r}", PUBLISHER)
    for name in ("X-Xet-Hash", "X-Xet-Refresh-Route"):
        headers.pop(name, None)
    announced = headers.get("X-Linked-Size", "")
    if announced.isdecimal():
        meter.expect(int(announced))
        meter.most_bytes = min(meter.most_bytes, int(announced) + download.SPARE_BYTES)
    if response.request.method == "GET" and status in (200, 206):
        if headers.get("Content-Encoding", "identity") != "identity":
            raise SourceError(f"{WHERE} sends a compressed body, which was not asked for", download.TRY_LATER)
        response.stream = _measured(response.stream, meter)


def _measured(stream: Any, meter: Meter) -> Any:
    """A stream of the client's HTTP library whose bytes are counted; httpx, or httpx2 in later clients."""
    library = sys.modules[type(stream).__module__.partition(".")[0]]

    class Measured(library.SyncByteStream):  # type: ignore[name-defined]
        def __iter__(self) -> Iterator[bytes]:
            for block in stream:
                meter.receive(len(block))
                yield block

        def close(self) -> None:
            stream.close()

    return Measured()


# --- What went wrong ------------------------------------------------------------------------------------------------


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Turn whatever the client and the libraries below it raise into a SourceError."""
    try:
        yield
    except GvslZooError:
        raise
    except Exception as error:
        raise _explanation(error, repo) from error


def _explanation(error: Exception, repo: str) -> SourceError:
    from huggingface_hub import errors as hub

    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
        if isinstance(cause, SourceError):  # ours, wrapped by the client's upload threads
            return cause
    address = shown(endpoint())
    known: tuple[tuple[type[BaseException], str, str], ...] = (
        (hub.GatedRepoError, f"{repo} is gated", f"accept its terms on {address}/{repo}, then {LOG_IN} see it"),
        (hub.RepositoryNotFoundError, f"{repo} does not exist, or is private", f"check its name, or {LOG_IN} see it"),
        (hub.RevisionNotFoundError, f"{repo} has no such revision", "check the commit, branch or tag"),
        (hub.RemoteEntryNotFoundError, f"{repo} has no such file", "check the name and the revision"),
        (hub.FileMetadataError, f"{address} does not answer as the Hub does (a sign-in page?)", "check the network"),
        (hub.OfflineModeIsEnabled, "the client is offline (HF_HUB_OFFLINE)", "go online, or import a bundle"),
        (hub.LocalTokenNotFoundError, "there is no token on this machine", f"{LOG_IN} do this"),
    )
    for kind, text, remedy in known:
        if any(isinstance(one, kind) for one in chain):
            return SourceError(text, remedy)
    for one in chain:
        if isinstance(one, hub.HfHubHTTPError):
            status = one.response.status_code
            if status in (401, 403):
                return SourceError(f"{WHERE} does not accept the token for {repo} ({status})", f"{LOG_IN} do this")
            if status == 409:
                return Transient(f"{WHERE} reports a conflict for {repo} (409): somebody else writes to it")
            return SourceError(f"{WHERE} answered {status} for {repo}", "check the name and the revision")
        if isinstance(one, OSError) and one.errno in _DISK_ERRORS:
            return download.disk_error(one, one.filename or "the cache")
    if isinstance(error, OSError) and "Consistency check" in str(error):
        return Transient(f"{WHERE} sent a body of another size than it announced")
    last = type(chain[-1]).__name__
    if "Redirect" in last:
        return SourceError(f"{WHERE} redirects in a circle", download.TRY_LATER)
    said = str(chain[-1]).replace(endpoint(), address)[:120]
    return Transient(f"the connection to {address} failed ({last}: {said})")


# --- Writing --------------------------------------------------------------------------------------------------------


def push(folder: Path, repo: str, *, token: str | None, private: bool, branch: str | None, message: str) -> str:
    """Upload the files of a folder in one commit, making the repository if need be; return the commit.

    Raises: ArgumentError for a public repository that was to be private; SourceError for every failure, of whatever
        library.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    if token is None and get_token() is None:
        raise SourceError("there is no token on this machine", f"{LOG_IN} write to {repo}")
    size = sum(path.stat().st_size for path in folder.iterdir())
    meter = HubMeter(WHERE, size, patience=UPLOAD_SECONDS)
    _check_endpoint()
    api = HfApi(endpoint=endpoint(), token=token, **CLIENT)
    with _of_a_push(), _metered(meter), _explained(repo), ExitStack() as files:
        _check_token(token)
        api.create_repo(repo, private=private or None, exist_ok=True)  # None: as the organisation says
        if private and not api.repo_info(repo).private:
            raise ArgumentError(f"{repo} exists and is public", "make it private on the Hub, or push without private")
        if branch:
            api.create_branch(repo, branch=branch, exist_ok=True)
        additions = [  # open files go over plain HTTP, as downloads do
            CommitOperationAdd(path.name, files.enter_context(path.open("rb"))) for path in sorted(folder.iterdir())
        ]
        commit = api.create_commit(repo, additions, commit_message=message, revision=branch)
    return str(commit.oid)


@contextmanager
def _of_a_push() -> Iterator[None]:
    """Give a passing fault the remedy of an upload."""
    try:
        yield
    except Transient as error:
        raise SourceError(error.cause, "push again; what has arrived already is not sent twice") from error
