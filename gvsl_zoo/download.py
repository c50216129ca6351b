"""What every download keeps to: limits of bytes, time and silence, and another try where one may help."""

from __future__ import annotations

import email.utils
import os
import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from .errors import SourceError

READ_SECONDS = 10.0  # the longest silence on an open connection, and the longest wait for one
SPARE_BYTES = 2**20  # what may arrive beyond the registered size
SLOWEST_RATE = 32 * 2**10  # bytes a second, over the whole download
GRACE_SECONDS = 60.0  # on top of what the slowest rate takes
LONGEST_WAIT = 30.0  # seconds; a server that asks for more is told to the user instead of being waited for
ATTEMPTS = 3
MAX_REQUESTS = 20  # of one attempt, redirects included
TRY_LATER = "try again later, or bring the file by hand (gvsl-zoo download --from-file, gvsl-zoo import)"
NOT_THE_FILE = "it is not the file that the registry knows; report it to the model's publisher"

T = TypeVar("T")


class Transient(SourceError):
    """A fault that may be gone at the next try, `wait` seconds from now."""

    def __init__(self, cause: str, remedy: str = TRY_LATER, wait: float = 0.5) -> None:
        super().__init__(cause, remedy)
        self.wait = wait


class Meter:
    """The limits of one download; every request and every byte passes here.

    Args:
        where: the source, for errors: "the Hub", "Google Drive".
        most_bytes: the most that may arrive.
        patience: seconds of silence that are accepted; default READ_SECONDS.
    """

    def __init__(self, where: str, most_bytes: int, patience: float | None = None) -> None:
        self.where, self.most_bytes = where, most_bytes
        self.patience = READ_SECONDS if patience is None else patience
        self.started = time.monotonic()
        self.answered = False
        self.begin()

    def begin(self) -> None:
        """A new attempt: bytes and requests are counted anew, time is not."""
        self.received = self.requests = 0

    def seconds_left(self) -> float:
        allowed = GRACE_SECONDS + self.most_bytes / SLOWEST_RATE
        return self.started + allowed - time.monotonic()

    def request(self) -> None:
        """Call before every request."""
        self.requests += 1
        if self.requests > MAX_REQUESTS:
            raise SourceError(f"{self.where} redirects in a circle, or breaks off each time", TRY_LATER)
        if not self.answered and time.monotonic() - self.started > self.patience:
            raise SourceError(f"{self.where} does not answer", "check the network, or work from the cache or a bundle")
        self._check_time()

    def expect(self, size: int) -> None:
        """Call when the server says how much is to come."""
        if size > self.most_bytes:
            raise SourceError(f"{self.where} offers {size} bytes, at most {self.most_bytes} are expected", NOT_THE_FILE)

    def receive(self, count: int) -> None:
        """Call for every block of a body, before it is kept."""
        self.received += count
        if self.received > self.most_bytes:
            raise SourceError(f"{self.where} sends more than the {self.most_bytes} bytes expected", NOT_THE_FILE)
        self._check_time()

    def _check_time(self) -> None:
        if self.seconds_left() < 0:
            raise SourceError(
                f"{self.where} took more than {time.monotonic() - self.started:.0f} s for {self.received} bytes",
                TRY_LATER,
            )


def persist(meter: Meter, fetch: Callable[[], T]) -> T:
    """The answer of `fetch`, asked again after a transient fault, within the limits of `meter`."""
    for attempt in range(1, ATTEMPTS + 1):
        meter.begin()
        try:
            return fetch()
        except Transient as error:
            if error.wait > LONGEST_WAIT:
                when = time.strftime("%H:%M", time.localtime(time.time() + error.wait))
                cause = f"{error.cause}; it asks to wait {error.wait:.0f} s"
                raise SourceError(cause, f"try again after {when}") from None
            if attempt == ATTEMPTS or meter.seconds_left() < error.wait:
                times = f" (tried {attempt} times)" if attempt > 1 else ""
                raise SourceError(f"{error.cause}{times}", error.remedy) from None
            time.sleep(error.wait)
    raise AssertionError("the last attempt returns or raises")


def retry_after(value: str | None, default: float = 1.0) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date."""
    text = (value or "").strip()
    if text.isdecimal():
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return default


def check_name_resolves(url: str, where: str) -> None:
    """Refuse a host whose name cannot be resolved in time; the resolver itself knows no limit.

    Behind a proxy the proxy resolves names, and nothing is checked.
    """
    host = urlsplit(url).hostname or ""
    proxies = urllib.request.getproxies()
    if (proxies.get(urlsplit(url).scheme) or proxies.get("all")) and not urllib.request.proxy_bypass(host):
        return
    failure: list[str | None] = [f"no answer from the name server within {READ_SECONDS:.0f} s"]

    def resolve() -> None:
        try:
            socket.getaddrinfo(host, None)
            failure[0] = None
        except (OSError, UnicodeError) as error:
            failure[0] = getattr(error, "strerror", None) or str(error)

    worker = threading.Thread(target=resolve, daemon=True)
    worker.start()
    worker.join(READ_SECONDS)
    if failure[0]:
        remedy = "check the network; without one, use a cached model or a bundle (gvsl-zoo import)"
        raise SourceError(f"{where} cannot be found: {host}: {failure[0]}", remedy)


def disk_error(error: OSError, where: str | os.PathLike[str]) -> SourceError:
    """What a failed write of a download means."""
    remedy = "free space or choose another folder (HF_HOME, cache_dir)"
    return SourceError(f"cannot write to {where}: {error.strerror or error}", remedy)
