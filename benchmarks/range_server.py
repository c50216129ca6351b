"""Files over HTTP on 127.0.0.1, with byte ranges, delays and faults on purpose, as a far object store has them.

with FileServer(folder) as server:
    Store(server.url + "/store")
    server.delay_s = 0.03  # of every answer
    server.requests        # (path, range) of all so far

python -m benchmarks.range_server FOLDER DELAY_S serves from a process of its own, and prints its address.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FileServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, delay_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.delay_s, self.ranges = folder, delay_s, True
        self.requests: list[tuple[str, str | None]] = []
        self.failures = 0  # the next so many answers are 503
        self.at_a_time = self.most_at_a_time = 0  # requests not yet answered
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> FileServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    server: FileServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.requests.append((self.path, asked))
        server.at_a_time += 1
        server.most_at_a_time = max(server.most_at_a_time, server.at_a_time)
        time.sleep(server.delay_s)
        server.at_a_time -= 1
        path = server.folder / self.path.lstrip("/")
        if server.failures > 0:
            server.failures -= 1
            return self.reply(503)
        if not path.is_file():
            return self.reply(404)
        size = path.stat().st_size
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", asked or "")
        if match is None or not server.ranges:
            return self.reply(200, path.read_bytes())
        first = int(match[1]) if match[1] else size - int(match[2])
        stop = min(size, int(match[2]) + 1) if match[1] and match[2] else size
        if first >= size:
            return self.reply(416)
        with path.open("rb") as file:
            file.seek(first)
            self.reply(206, file.read(stop - first), {"Content-Range": f"bytes {first}-{stop - 1}/{size}"})

    def reply(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


if __name__ == "__main__":
    with FileServer(Path(sys.argv[1]), float(sys.argv[2])) as serving:
        print(serving.url, flush=True)
        threading.Event().wait()
