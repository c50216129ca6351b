"""Google Drive: the authors' files, through the pages that Drive puts in front of them."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html.parser import HTMLParser
from itertools import chain
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError
from urllib3.util import parse_url

from . import __version__, download
from .download import TRY_LATER, Meter, Transient
from .errors import SourceError

WHERE = "Google Drive"
ORIGIN = "https://drive.google.com"
HOSTS = ("drive.google.com", "docs.google.com", "drive.usercontent.google.com", ".googleusercontent.com")
SIGN_IN_HOST = "accounts.google.com"
HEADERS = {"User-Agent": f"gvsl-zoo/{__version__}", "Accept-Encoding": "identity", "Accept-Language": "en"}
ROUNDS = 3  # answers of one attempt that may be pages
BLOCK_BYTES = 2**17
PAGE_BYTES = 2**14  # Drive's have 2.4 kB; html.parser's time grows with the square of a hostile page: here 2 s
CHECK_NETWORK = f"check the network (a sign-in page of its own?), or {TRY_LATER}"
FORM_IDS = ("download-form", "downloadForm")  # the latter until 2022

QUOTA = (
    "its quota is used up: too many downloads lately",
    "try later, or make a copy in your own Drive, download that by hand and use gvsl-zoo download --from-file",
)
INFECTED = (
    "Google holds it for infected with a virus and gives it to its owner only",
    "do not use it; tell its authors",
)
ROBOT = ("Google takes this network for a robot", TRY_LATER)
DEAD = ("it does not exist any more", "ask its authors, or bring a copy by hand (gvsl-zoo download --from-file)")
PRIVATE = ("it is private", "ask its authors for access, then bring it by hand (gvsl-zoo download --from-file)")
REFUSALS = {  # what a page says, its title on the first line
    r"quota exceeded|too many users have viewed or downloaded|can.?t view or download": QUOTA,
    r"infected (file|with)": INFECTED,
    r"automated queries|unusual traffic": ROBOT,
    r"file you have requested does not exist|violation of .*terms of service": DEAD,
    r"\A.*\bsign.?in\b|you need (access|permission)|request access": PRIVATE,
}
REFUSED_STATUS = {401: PRIVATE, 403: PRIVATE, 404: DEAD, 410: DEAD}


def fetch(file_id: str, target: Path, most_bytes: int) -> str:
    """Download a shared file, whole or not at all; return its sha256.

    A killed process leaves `.{target.name}.{token}.partial` beside the target, for the caller to sweep.

    Args:
        most_bytes: the most that may arrive.

    Raises: SourceError for every failure: of the network, of Drive, of the disk.
    """
    download.check_name_resolves(ORIGIN, WHERE)
    meter = Meter(WHERE, most_bytes)
    return download.persist(meter, lambda: _attempt(file_id, target, meter))


def _attempt(file_id: str, target: Path, meter: Meter) -> str:
    first = {"export": "download", "id": file_id}
    url, fields = f"{ORIGIN}/uc", first
    with _Session() as session:
        for _ in range(ROUNDS):
            with _answer(session, url, fields, meter) as response:
                _check_answer(response)
                blocks = _blocks(response)
                start = next(blocks, b"")
                is_page = "text/html" in response.headers.get("Content-Type", "").lower() or start.lstrip()[:1] == b"<"
                if response.status_code == 200 and not is_page:
                    return _save(chain([start], blocks), _length(response, meter), target, meter)
                page = _read_page(chain([start], blocks), meter)
            if refusal := page.refusal or REFUSED_STATUS.get(response.status_code):
                cause, remedy = refusal
                raise SourceError(f"{WHERE}, file {file_id}: {cause}", remedy)
            code = next((value for name, value in session.cookies.items() if name.startswith("download_warning")), None)
            if page.action is not None:
                url, fields = _follow(response.url, page.action), page.fields
            elif code is not None:
                url, fields = f"{ORIGIN}/uc", first | {"confirm": code}
            else:
                title = " ".join(page.title.split())[:80]
                cause = f"{WHERE} answered {response.status_code} with a web page instead of the file: {title!r}"
                raise SourceError(cause, CHECK_NETWORK)
    raise SourceError(f"{WHERE} asks for confirmation again and again ({ROUNDS} times)", TRY_LATER)


# --- Asking ---------------------------------------------------------------------------------------------------------


class _Session(requests.Session):
    """Cookies of one attempt, no password from ~/.netrc, and no redirect followed by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.headers.update(HEADERS)
        self.auth = lambda request: request

    def get_redirect_target(self, resp: requests.Response) -> None:
        """None; for a target, requests would read the whole body, however long, even when told not to go there."""


def _answer(session: requests.Session, url: str, fields: dict[str, str], meter: Meter) -> requests.Response:
    """The answer at the end of all redirects, its body unread."""
    while True:
        meter.request()
        with _network():
            response = session.get(url, params=fields, allow_redirects=False, stream=True, timeout=meter.patience)
        meter.answered = True
        if not response.is_redirect:
            return response
        response.close()
        url, fields = _follow(response.url, response.headers["Location"]), {}


def _check_answer(response: requests.Response) -> None:
    status, encoding = response.status_code, response.headers.get("Content-Encoding", "identity")
    if status == 429:
        wait = download.retry_after(response.headers.get("Retry-After"))
        raise Transient(f"{WHERE} is asked too often (429)", TRY_LATER, wait)
    if status == 408 or status >= 500:
        raise Transient(f"{WHERE} answered {status}")
    if encoding != "identity":
        raise SourceError(f"{WHERE} sends a compressed body ({encoding[:20]}), which was not asked for", TRY_LATER)


def _follow(base: str, link: str) -> str:
    """The address of a link, which must not leave Drive."""
    try:
        url = urljoin(base, link)
        parts = parse_url(url)  # as requests reads it; urlsplit sees another host in https://a\@b
    except ValueError:
        raise SourceError(f"{WHERE} leads to {link[:80]!r}, which is no address", TRY_LATER) from None
    host = parts.host or ""
    if host == SIGN_IN_HOST:
        raise SourceError(f"{WHERE} asks to sign in: the file is private", PRIVATE[1])
    allowed = any(host == known or (known.startswith(".") and host.endswith(known)) for known in HOSTS)
    if not allowed or parts.scheme != urlsplit(ORIGIN).scheme:
        raise SourceError(f"{WHERE} leads to the foreign {parts.scheme}://{host[:80]}", CHECK_NETWORK)
    return url


@contextmanager
def _network() -> Iterator[None]:
    """Turn what the HTTP libraries raise into a Transient that says what lies below their wrappings."""
    wrappings = (requests.RequestException, HTTPError)
    try:
        yield
    except (*wrappings, OSError) as error:
        cause: BaseException = error
        while isinstance(cause, wrappings) and (below := cause.__cause__ or cause.__context__):
            cause = below
        raise Transient(f"the connection to {WHERE} failed ({type(cause).__name__}: {str(cause)[:120]})") from error


def _blocks(response: requests.Response) -> Iterator[bytes]:
    """The body as it arrives: a slow one in small blocks, so that its time can be measured."""
    while True:
        with _network():
            block = response.raw.read1(BLOCK_BYTES)
        if not block:
            return
        yield block


# --- The file ---------------------------------------------------------------------------------------------------------


def _length(response: requests.Response, meter: Meter) -> int | None:
    """The announced size, which urllib3 holds the body to."""
    announced = response.headers.get("Content-Length", "")
    if not announced.isdecimal():
        return None
    meter.expect(int(announced))
    return int(announced)


def _save(blocks: Iterator[bytes], length: int | None, target: Path, meter: Meter) -> str:
    from huggingface_hub.utils import tqdm

    digest = hashlib.sha256()
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    bar = tqdm(total=length, unit="B", unit_scale=True, desc=target.name, disable=None)  # None: off without a terminal
    try:
        with bar, partial.open("xb") as file:
            for block in blocks:
                meter.receive(len(block))
                digest.update(block)
                file.write(block)
                bar.update(len(block))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        raise download.disk_error(error, target) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return digest.hexdigest()


# --- The pages --------------------------------------------------------------------------------------------------------


def _read_page(blocks: Iterator[bytes], meter: Meter) -> _Page:
    html = b""
    for block in blocks:
        meter.receive(0)  # a page takes time, but is no part of the file
        html += block
        if len(html) > PAGE_BYTES:
            break
    return _Page(html[:PAGE_BYTES].decode(errors="replace"))


class _Page(HTMLParser):
    """What a page says, its title first, and the download form on it: action (None without a form) and fields."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.title = self.text = ""
        self.action: str | None = None
        self.fields: dict[str, str] = {}
        self._tag, self._in_form = "", False
        with suppress(AssertionError):  # html.parser's, at declarations that it does not know
            self.feed(html)
            self.close()

    @property
    def refusal(self) -> tuple[str, str] | None:
        """Cause and remedy, if the page is known to say no."""
        said = f"{' '.join(self.title.split())}\n{' '.join(self.text.split())}"
        return next((no for pattern, no in REFUSALS.items() if re.search(pattern, said, re.IGNORECASE)), None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        given = {name: value or "" for name, value in attrs}
        if tag == "form":
            self._in_form = given.get("id") in FORM_IDS
            if self._in_form:
                self.action = given.get("action", "")
        elif tag == "input" and self._in_form and given.get("type") == "hidden":
            self.fields[given.get("name", "")] = given.get("value", "")

    def handle_endtag(self, tag: str) -> None:
        self._tag = ""
        self._in_form = self._in_form and tag != "form"

    def handle_data(self, data: str) -> None:
        if self._tag == "title":
            self.title += data
        elif self._tag not in ("script", "style"):
            self.text += data
