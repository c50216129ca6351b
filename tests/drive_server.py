"""A Google Drive on 127.0.0.1 that answers as it is told and writes down what it was asked.

An answer is a function of the request's handler; those below make the pages that Drive has, the file, and the faults.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

Answer = Callable[[BaseHTTPRequestHandler], None]


class Asked(NamedTuple):
    path: str
    query: dict[str, str]
    headers: dict[str, str]


class DriveServer(ThreadingHTTPServer):
    """`answers` are given one after the other, the last one for ever; `log` holds the requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: list[Answer] = []
        self.log: list[Asked] = []
        self.ended = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}"

    def close(self) -> None:
        self.ended.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: DriveServer

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        self.server.log.append(Asked(parts.path, dict(parse_qsl(parts.query)), dict(self.headers)))
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def log_message(self, *_: object) -> None:
        pass


# --- Answers ----------------------------------------------------------------------------------------------------------


def file(content: bytes, length: int | None = -1, status: int = 200, **headers: str) -> Answer:
    """The file; another `length` than its own (-1) is announced and not kept, None is not announced."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        if length is not None:
            named.setdefault("Content-Length", str(len(content) if length == -1 else length))
        if length != -1:
            named["Connection"] = "close"
        for name, value in ({"Content-Type": "application/octet-stream"} | named).items():
            handler.send_header(name, value)  # notes "Connection: close"
        handler.end_headers()
        handler.wfile.write(content)

    return answer


def page(title: str, body: str = "", status: int = 200, **headers: str) -> Answer:
    style = "<style>.uc-error-caption,.uc-warning-caption{color:#222}</style>"
    html = f"<!DOCTYPE html><html><head><title>{title}</title>{style}</head><body>{body}</body></html>"
    return file(html.encode(), status=status, **({"Content_Type": "text/html; charset=utf-8"} | headers))


def confirm_page(action: str, form_id: str = "download-form") -> Answer:
    """That of a large file, as it is since 2022."""
    fields = {"id": "an-id", "export": "download", "confirm": "t", "uuid": "5f0e&1"}
    hidden = "".join(
        f'<input type="hidden" name="{name}" value="{value.replace("&", "&amp;")}">' for name, value in fields.items()
    )
    return page(
        "Google Drive - Virus scan warning",
        f'<form id="search"><input type="hidden" name="q" value="no"></form><p>Google Drive can\'t scan this file for '
        f"viruses.</p>infected cells.zip (86M) is too large for Google to scan for viruses. Would you still like to "
        f'download this file?<form id="{form_id}" action="{action}" method="get"><input type="submit" '
        f'id="uc-download-link" value="Download anyway"/>{hidden}</form>',
    )


def cookie_page() -> Answer:
    """That of a large file, as it was before."""
    cookie = "download_warning_1305_an-id=Xy7Z; Path=/"
    return page("Google Drive - Virus scan warning", "can't scan this file for viruses", Set_Cookie=cookie)


def redirect(location: str, status: int = 303, **headers: str) -> Answer:
    return file(b"", status=status, Location=location, **headers)


def reset(content: bytes) -> Answer:
    """A part of the file, then a TCP reset."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        file(content, len(content) + 1000)(handler)
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(handler.connection.detach())

    return answer


def slow(blocks: Iterable[bytes], length: int | None, pause: float, status: int = 200, **headers: str) -> Answer:
    """The file block by block, `pause` seconds apart."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        file(b"", length, status, **headers)(handler)
        for block in blocks:
            handler.wfile.write(block)
            if handler.server.ended.wait(pause):
                return

    return answer


def stall(content: bytes) -> Answer:
    """A part of the file, then silence."""
    return slow([content], len(content) + 1000, 3600)


def silence(handler: BaseHTTPRequestHandler) -> None:
    """No answer at all."""
    handler.server.ended.wait()
