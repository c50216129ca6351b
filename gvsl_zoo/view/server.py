"""The server of the page: on 127.0.0.1, under an address that cannot be guessed, and nothing but a fixed list."""

from __future__ import annotations

import hmac
import json
import secrets
import select
import shutil
import socket
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, GvslZooError
from .pair import Pair

PAGE = Path(__file__).with_name("page")  # built from viewer/, see `page_files`
STATIC = {"": "index.html", "app.js": "app.js", "style.css": "style.css", "licences.txt": "licences.txt"}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".txt": "text/plain; charset=utf-8",
    ".nii": "application/octet-stream",
}
LONGEST_QUESTION = 1024  # bytes
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def page_files() -> dict[str, Path]:
    """The built page: files by the name under which they are served.

    Errors: GvslZooError where it was not built.
    """
    files = {name: PAGE / file for name, file in STATIC.items()}
    if not all(path.is_file() for path in files.values()):
        raise GvslZooError(
            "the viewer's page is not built",
            "run `make viewer` in the source tree (it needs Node.js), or install a wheel that `make wheel` made",
        )
    return files


class PageServer(ThreadingHTTPServer):
    """Serves one pair of scans to the browsers of this machine; `url` is the only way in.

    It holds its port from the start; its `pair` is set before it serves.

    Answered are GET of the page, its scans and overlays, and POST of a question to `match`; requests without the token,
    for another host (a name that was made to point here) or from another origin are refused.

    Args: port: 0 for any that is free.
    Errors: GvslZooError where the page was not built, or the port is taken.
    """

    daemon_threads = True
    pair: Pair

    def __init__(self, port: int = 0) -> None:
        self.page = page_files()
        self.token = secrets.token_urlsafe(32)
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise GvslZooError(f"cannot listen on port {port}: {error.strerror}", "choose another --port") from error

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = 60  # seconds that a silent connection is kept

    def do_GET(self) -> None:
        name = self._asked_for()
        if name is None:
            return
        pair = self.server.pair
        if name == "scans.json":
            self._answer_json(HTTPStatus.OK, pair.facts())
        elif name in self.server.page:
            self._answer_file(self.server.page[name])
        elif name in pair.files:
            try:
                self._answer_file(pair.file(name))
            except GvslZooError as error:
                self._refuse(HTTPStatus.CONFLICT, str(error))
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "no such file")

    def do_POST(self) -> None:
        name = self._asked_for()
        if name is None:
            return
        length = self.headers.get("Content-Length", "")
        if name != "match":
            self._refuse(HTTPStatus.NOT_FOUND, "no such question")
        elif self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "ask in JSON")
        elif not length.isdecimal() or len(length) > len(str(LONGEST_QUESTION)) or int(length) > LONGEST_QUESTION:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"ask in at most {LONGEST_QUESTION} bytes")
        else:
            try:
                found = self.server.pair.match(*_question(self.rfile.read(int(length))), self._awaited)
            except GvslZooError as error:
                wrong = HTTPStatus.BAD_REQUEST if isinstance(error, ArgumentError) else HTTPStatus.CONFLICT
                self._refuse(wrong, str(error))
            else:
                if found:
                    self._answer_json(HTTPStatus.OK, found)

    def _awaited(self) -> bool:
        """Whether the browser still holds the connection: it hangs up when the crosshair has moved on."""
        told, _, _ = select.select([self.connection], [], [], 0)
        return not told or bool(self.connection.recv(1, socket.MSG_PEEK))

    def _asked_for(self) -> str | None:
        """The name behind the token; None when the request was refused."""
        port = self.server.server_port
        names = ["127.0.0.1", "localhost"]
        hosts = [f"{name}:{port}" for name in names] + (names if port == 80 else [])  # which browsers leave out
        _, _, rest = self.path.partition("/")
        token, slash, name = rest.partition("/")
        origin = self.headers.get("Origin")
        if self.headers.get("Host") not in hosts:
            self._refuse(HTTPStatus.FORBIDDEN, "this server answers to 127.0.0.1 only")
        elif not slash or not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.FORBIDDEN, "open the whole address that gvsl-zoo view printed")
        elif origin is not None and origin not in [f"http://{host}" for host in hosts]:
            self._refuse(HTTPStatus.FORBIDDEN, "a request from another page")
        else:
            return name
        return None

    def _answer_file(self, path: Path) -> None:
        with path.open("rb") as file:
            self._start(HTTPStatus.OK, TYPES[path.suffix], path.stat().st_size)
            shutil.copyfileobj(file, self.wfile)

    def _answer_json(self, status: HTTPStatus, content: Any) -> None:
        body = json.dumps(content, allow_nan=False).encode()
        self._start(status, "application/json", len(body))
        self.wfile.write(body)

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._answer_json(status, {"error": why})

    def _start(self, status: HTTPStatus, kind: str, length: int) -> None:
        self.send_response(status)
        for name, value in (HEADERS | {"Content-Type": kind, "Content-Length": str(length)}).items():
            self.send_header(name, value)
        self.end_headers()

    def version_string(self) -> str:
        return "gvsl-zoo"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the address, which has the token in it, is not for logs."""


def _question(body: bytes) -> tuple[str, list[float]]:
    """{"scan": "fixed" or "moving", "point_mm": [x, y, z]}; ArgumentError for anything else."""
    try:
        question = json.loads(body)
        scan, point = question["scan"], [float(value) for value in question["point_mm"]]
        if scan not in ("fixed", "moving") or len(point) != 3:
            raise ValueError
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        raise ArgumentError("not a question", 'ask {"scan": "fixed", "point_mm": [x, y, z]}') from None
    return scan, point
