"""A prepared store to a URL: the volumes that are missing there, and then the index that names them."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import ArgumentError
from .bucket import Bucket, is_url, volume_name
from .store import LEDGER, Format, Store, format_facts, read_format

BATCH = 256  # volumes handed out at a time, so that any number is cheap


@dataclass(frozen=True)
class UploadReport:
    """What lies behind the URL now, and what this call did for it.

    Args:
        url: of the store.
        volumes: that its index names.
        sent, kept: volumes sent by this call, and found there.
        seconds: of this call.
    """

    url: str
    volumes: int
    sent: int
    kept: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The facts for JSON and the terminal."""
        return asdict(self)


def upload_store(
    source: str | os.PathLike[str],
    url: str,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> UploadReport:
    """Copy a prepared store to a URL, cut into chunks, where `Store(url)` reads it with the same bits.

    Called again, after a kill or when the store has grown, it sends only what is missing; until its end the URL holds
    the store that it held before. Volumes that the store has no longer stay behind, unnamed.

    Args:
        source: the folder of a store.
        url: where fsspec can write; a store of the same format, or nothing, lies there.
        workers: threads; each holds one volume in memory.
        progress: called with volumes done and volumes in all.

    Errors: ArgumentError for a URL that cannot be opened or holds a store of another format; VolumeError for a source
        that is no store or is damaged, and when the URL cannot be reached.
    """
    began = time.perf_counter()
    if not is_url(url) or workers < 1:
        raise ArgumentError(f"url {url!r}, workers {workers}", "give a URL such as s3://bucket/store, and at least 1")
    store, bucket = Store(Path(source)), Bucket(url)
    _claim(bucket, store.format)
    names = np.unique(store.entries["sha256"], return_index=True)[1]  # a content that came twice is sent once
    there = bucket.volumes()
    missing = [int(i) for i in np.sort(names) if volume_name(store.entries[i]) not in there]

    def send(i: int) -> None:
        bucket.write_volume(store.entries[i], store.volume(i))

    kept = len(names) - len(missing)
    with ThreadPoolExecutor(workers) as pool:
        for first in range(0, len(missing), BATCH):
            for sent, _ in enumerate(pool.map(send, missing[first : first + BATCH]), first + 1):
                if progress is not None:
                    progress(kept + sent, len(names))
    for name in ("subjects.txt", "strata.txt", LEDGER):
        if name != LEDGER or (Path(source) / name).exists():
            bucket.write(name, (Path(source) / name).read_bytes())
    index = io.BytesIO()
    np.save(index, store.entries)  # of the volumes sent, whatever was prepared since; last: it counts the others' lines
    bucket.write("index.npy", index.getvalue())
    return UploadReport(url, len(store), len(missing), kept, time.perf_counter() - began)


def _claim(bucket: Bucket, format: Format) -> None:
    """Write what the volumes share, unless a store of that format lies there already."""
    try:
        bucket.read("store.json")
    except FileNotFoundError:
        bucket.write("store.json", json.dumps(format_facts(format, f"gvsl-zoo {__version__}")).encode())
        return
    if (own := read_format(bucket)) != format:
        raise ArgumentError(f"the store {bucket} is {own}, not {format}", "choose another URL")
