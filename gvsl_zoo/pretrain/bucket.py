"""A store behind a URL, whatever fsspec opens: S3, GCS, HTTP, a file system; a crop fetches only the chunks it needs.

URL/
    store.json, index.npy, subjects.txt, strata.txt   as in a folder: see store.py
    volumes/0123456789abcdef/c/0/0/0                  a volume, by the hash of its source: a zarr 3 shard, one object
                                                      that begins with the index of its chunks
    volumes/0123456789abcdef/zarr.json                its description, for other readers of zarr

zarr writes. Reading is done here, from the shard's own index: zarr 3.1 asks for the chunks of a shard one after the
other, and at 30 ms each a crop takes a second. Chunks are compressed (Blosc, LZ4) and carry a CRC, as does the index.
"""

from __future__ import annotations

import io
import itertools
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, GvslZooError, VolumeError, needs
from ..weights import write_whole

CHUNK_EDGE = {3: 48, 2: 256}  # voxels: half of the usual crops, so that they read 3 chunks an axis at most
NEAR_BYTES = 2**16  # what lies no further apart comes in one request
TIMEOUT_S = 30.0  # of a read
RATE_LIMIT = 1e6  # bytes a second, below which a write is given up
ATTEMPTS, PAUSE_S = 3, 1.0  # before a read fails, and after the first; each pause is twice the one before
INDICES = 1024  # of shards, kept in memory; one of 512 chunks has 8 kB
VOXEL = np.dtype("<i2")
COPY_AGAIN = "copy the store there again: gvsl-zoo prepare -i STORE -o URL"


def is_url(path: object) -> bool:
    """s3://bucket/store, https://host/store, file:///disk/store; chains of fsspec's too."""
    return isinstance(path, str) and "://" in path


class Bucket:
    """The objects below a URL. Nothing is kept that a fork would break.

    Credentials and end points are the client's own: AWS_..., GOOGLE_..., FSSPEC_S3_ENDPOINT_URL.

    Errors: ArgumentError for a URL that cannot be opened here; VolumeError for what cannot be reached within a bounded
        time, after a few attempts; FileNotFoundError for an object that is not there, ValueError for a damaged one.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._index = lru_cache(INDICES)(self._read_index)
        self._open()

    def __str__(self) -> str:
        return self.url

    def read(self, name: str) -> bytes:
        """A whole object."""
        return self._asked(name, lambda fs, path: _call(fs, "cat_file", path, timeout=TIMEOUT_S))

    def entries(self) -> np.ndarray:
        """The index, fetched whole."""
        return np.load(io.BytesIO(self.read("index.npy")), allow_pickle=False)

    def box(self, entry: np.void, shape: Sequence[int], there: Sequence[slice]) -> np.ndarray:
        """A box of the volume that `entry` names, int16; `there` lies within its `shape`."""
        name, edge = shard_name(entry, len(shape)), CHUNK_EDGE[len(shape)]
        cells = list(itertools.product(*(range(part.start // edge, -(-part.stop // edge)) for part in there)))
        index = self._index(name, grid_of(shape))
        out = np.empty([part.stop - part.start for part in there], VOXEL)
        for cell, packed in zip(cells, self._parts(name, [tuple(index[cell].tolist()) for cell in cells]), strict=True):
            source, target = [], []
            for part, first in zip(there, (n * edge for n in cell), strict=True):
                begin, end = max(part.start, first), min(part.stop, first + edge)
                source.append(slice(begin - first, end - first))
                target.append(slice(begin - part.start, end - part.start))
            chunk = decoded(checked(packed, f"{name}: chunk {cell}"), edge, len(shape))
            out[tuple(target)] = chunk[tuple(source)]
        return out

    def write(self, name: str, content: bytes) -> None:
        """A whole object, or nothing: object stores do so by themselves."""
        with _reaching(f"{self.url}/{name}", "write"):
            fs, root = self._open()
            if "file" in fs.protocol:
                path = Path(f"{root}/{name}")
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, content)
            else:
                _call(fs, "pipe_file", f"{root}/{name}", content, timeout=TIMEOUT_S + len(content) / RATE_LIMIT)

    def write_volume(self, entry: np.void, voxels: np.ndarray) -> None:
        """The volume that `entry` names; its description comes last, and says that it is there."""
        objects = encoded(voxels)
        for part in sorted(objects):  # c/... before zarr.json
            self.write(f"volumes/{volume_name(entry)}/{part}", objects[part])

    def volumes(self) -> set[str]:
        """The names of the volumes that are there."""
        paths = self._asked("volumes", lambda fs, path: _call(fs, "find", path))
        return {path.split("/")[-2] for path in paths if path.endswith("/zarr.json")}

    def _read_index(self, name: str, grid: tuple[int, ...]) -> np.ndarray:
        """First byte and bytes of each chunk of a shard, (*grid, 2) int64."""
        [raw] = self._parts(name, [(0, 16 * math.prod(grid) + 4)])
        index = np.frombuffer(checked(raw, f"{name}: its index of chunks"), "<i8").reshape(*grid, 2)
        if index.min() < 0:
            raise ValueError(f"{name} lacks chunks")
        return index

    def _parts(self, name: str, spans: Sequence[tuple[int, ...]]) -> list[memoryview]:
        """Parts of an object, each (first byte, bytes): all asked for at once, and what is near in one request."""
        runs: list[list[int]] = []
        for first, size in sorted(spans):
            if runs and first - runs[-1][1] <= NEAR_BYTES:
                runs[-1][1] = first + size
            else:
                runs.append([first, first + size])
        starts, stops = [start for start, _ in runs], [stop for _, stop in runs]
        ask: dict[str, Any] = dict(starts=starts, ends=stops, on_error="raise", timeout=TIMEOUT_S)
        pieces = self._asked(name, lambda fs, path: _call(fs, "cat_ranges", [path] * len(runs), **ask))
        for piece, (start, stop) in zip(pieces, runs, strict=True):
            if len(piece) > stop - start:
                raise VolumeError(f"{self.url}: its server ignores byte ranges", "use one that knows them")
            if len(piece) < stop - start:
                raise ValueError(f"{name} ends before byte {stop}")
        run_of = [bisect_right(starts, first) - 1 for first, _ in spans]
        places = zip(run_of, spans, strict=True)
        return [memoryview(pieces[at])[first - starts[at] : first - starts[at] + size] for at, (first, size) in places]

    def _asked(self, name: str, ask: Callable[[Any, str], Any]) -> Any:
        """The answer for an object, after a few attempts."""
        with _reaching(f"{self.url}/{name}", "read"):
            for attempt in itertools.count(1):
                fs, root = self._open()
                try:
                    return ask(fs, f"{root}/{name}")
                except FileNotFoundError:
                    raise FileNotFoundError(f"{self.url}/{name}") from None
                except (PermissionError, NotImplementedError):
                    raise
                except Exception:
                    if attempt == ATTEMPTS:
                        raise
                    time.sleep(PAUSE_S * 2 ** (attempt - 1))

    def _open(self) -> tuple[Any, str]:
        """File system and root; fsspec keeps one a process, so that a forked worker opens its own."""
        needs("cluster", self.url, "fsspec", "numcodecs", "google_crc32c")
        from fsspec import url_to_fs

        try:
            fs, root = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            remedy = "install fsspec's package for it: s3fs, gcsfs, adlfs, or fsspec[http]"
            raise ArgumentError(f"{self.url} cannot be opened: {error}", remedy) from None
        return fs, root.rstrip("/")


def volume_name(entry: np.void) -> str:
    """By the content of the source: a store that grows or is copied again finds its volumes where they are."""
    return entry["sha256"].decode()


def shard_name(entry: np.void, ndim: int) -> str:
    """Of the object that holds a volume: c/0/0/0 below its folder, a film's c/0/0."""
    return f"volumes/{volume_name(entry)}/" + "/".join("c000"[: ndim + 1])


def grid_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Chunks along each axis."""
    return tuple(-(-n // CHUNK_EDGE[len(shape)]) for n in shape)


def encoded(voxels: np.ndarray) -> dict[str, bytes]:
    """The objects of a zarr array that holds a volume (D, H, W) or a film (H, W): c/0/0/0 or c/0/0, and zarr.json."""
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    edge = CHUNK_EDGE[voxels.ndim]
    objects: dict[str, Any] = {}
    shard: Any = {"shape": tuple(n * edge for n in grid_of(voxels.shape)), "index_location": "start"}
    array = zarr.create_array(
        MemoryStore(objects),
        shape=voxels.shape,
        dtype=VOXEL,
        chunks=(edge,) * voxels.ndim,
        shards=shard,
        compressors=[BloscCodec(typesize=2, cname="lz4", shuffle="shuffle"), Crc32cCodec()],
        fill_value=0,
        config={"write_empty_chunks": True},  # so that one which is missing is damage
    )
    array[...] = voxels
    return {name: content.to_bytes() for name, content in objects.items()}


def checked(raw: memoryview, what: str) -> memoryview:
    """Bytes without the CRC-32C at their end.

    Errors: ValueError if it is another.
    """
    from google_crc32c import value

    if value(bytes(raw[:-4])) != int.from_bytes(raw[-4:], "little"):
        raise ValueError(f"{what} has another checksum")
    return raw[:-4]


def decoded(packed: memoryview, edge: int, ndim: int) -> np.ndarray:
    """Voxels of a chunk."""
    from numcodecs.blosc import Blosc

    return np.frombuffer(Blosc().decode(packed), VOXEL).reshape((edge,) * ndim)


def _call(fs: Any, method: str, *arguments: Any, timeout: float | None = None, **named: Any) -> Any:
    """A method of a file system, within `timeout` seconds where it is asynchronous."""
    if not fs.async_impl:
        return getattr(fs, method)(*arguments, **named)
    from fsspec.asyn import sync

    return sync(fs.loop, getattr(fs, f"_{method}"), *arguments, timeout=timeout, **named)


@contextmanager
def _reaching(url: str, action: str) -> Iterator[None]:
    """Whatever a client raises becomes a VolumeError that names the URL; but for what is not there to read."""
    try:
        yield
    except GvslZooError:
        raise
    except NotImplementedError as error:
        raise ArgumentError(f"cannot {action} {url}: its protocol does not allow it", "choose another") from error
    except Exception as error:  # clients have kinds of their own
        if action == "read" and isinstance(error, FileNotFoundError):
            raise
        cause = f"cannot {action} {url}: {type(error).__name__}: {' '.join(str(error).split()) or 'no answer in time'}"
        raise VolumeError(cause, "check the network and the credentials; the same call then goes on") from error
