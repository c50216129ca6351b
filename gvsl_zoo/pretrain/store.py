"""A store of training volumes: int16 in memory-mapped shards, and an index.

STORE/
    store.json          what all volumes share; written once
    index.npy           an ENTRY a volume, in the order of the source paths
    ledger.npy          the leakage ledger's hash of a scan, by that of its file; old stores lack it, wholly or in part
    subjects.txt        a name a line, as strata.txt: the index counts these lines, to which some are only ever added
    shards/00012.i16    volumes end to end, little-endian; written by one process, only appended to, about 1 GiB
    shards/00012.jsonl  its journal: what lies there whole, a source file a line
    quarantine.jsonl    sources that could not be used, with the cause; notes.jsonl: what was doubtful about others

Behind a URL the same index stands for volumes cut into chunks: see bucket.py.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, VolumeError
from ..ledger import MOST_LISTED
from ..registry import Ledger
from ..volume import CT_WINDOW_HU
from .bucket import COPY_AGAIN, VOXEL, Bucket, is_url

VERSION = 1
RANGES = {  # of the numbers stored: what becomes 0 and what 1
    "HU": (int(CT_WINDOW_HU[0]), int(CT_WINDOW_HU[1])),
    "arbitrary": (0, 32767),  # a volume's own extremes, negative values lost
    "grey": (0, 255),
}
LEDGER = "ledger.npy"
OPEN_SHARDS = 256  # mapped at a time: each holds a file descriptor, of which a process often has 1024
ENTRY = np.dtype(
    [
        ("offset", "<u8"),  # voxels in the shard before the first
        ("shard", "<u4"),
        ("shape", "<u4", 3),  # (D, H, W); a film's is (1, H, W)
        ("subject", "<u4"),
        ("stratum", "<u4"),
        ("spacing_mm", "<f4", 3),  # (z, y, x); a film's is 0
        ("lowest", "<f4"),  # extremes of the source, in its own unit
        ("highest", "<f4"),
        ("sha256", "S16"),  # of the source file, its first 16 digits
    ]
)
HASHES = np.dtype([("sha256", "S16"), ("scan_hash", "u1", 32)])  # as in `ENTRY`; see ledger.scan_hash


@dataclass(frozen=True)
class Format:
    """What all volumes of a store share.

    Args:
        ndim: 3, volumes (D, H, W), or 2, films (H, W).
        unit: "HU" or "arbitrary" (MR) in 3D; "grey" (8 bits) or "arbitrary" in 2D.
        spacing_mm: isotropic; None where each volume keeps its own, as films do.
        size: pixels along both axes of every film; None where each keeps its own shape, as volumes do.
    """

    ndim: int
    unit: str
    spacing_mm: float | None
    size: int | None = None

    def __post_init__(self) -> None:
        units = {3: ("HU", "arbitrary"), 2: ("grey", "arbitrary")}.get(self.ndim)
        if units is None:
            raise ArgumentError(f"ndim {self.ndim}", "give 2 or 3")
        if self.unit not in units:
            raise ArgumentError(f"unit {self.unit!r} with ndim {self.ndim}", f"give {' or '.join(units)}")
        if self.spacing_mm is not None and (self.ndim == 2 or not 0 < self.spacing_mm < math.inf):
            raise ArgumentError(f"spacing_mm {self.spacing_mm}", "give positive millimetres, or None (always in 2D)")
        if self.size is not None and (self.ndim == 3 or self.size < 1):
            raise ArgumentError(f"size {self.size} with ndim {self.ndim}", "give 1 or more, or None (always in 3D)")


class Store:
    """A store opened to read. Opening and cropping cost the same however many volumes there are; pickles are small.

    Args:
        path: the folder that `prepare_store` wrote, or the URL to which `upload_store` copied one. Of a folder the
            index is mapped; from a URL every process that opens it fetches it whole, 68 bytes a volume.

    Errors: VolumeError if it is none, is unfinished, damaged, of a newer version, or out of reach.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: str | Path
        self._files: Bucket | Folder
        if is_url(path):
            self.path, self._files = str(path), Bucket(str(path))
        else:
            self.path = Path(path)
            self._files = Folder(self.path)
        self.format = read_format(self._files)
        try:
            self.entries = self._files.entries()
        except FileNotFoundError:
            cause = f"the store {str(self.path)!r} has no index"
            raise VolumeError(cause, "run 'gvsl-zoo prepare' to its end") from None
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(f"index.npy: {error}") from None
        if self.entries.dtype != ENTRY or self.entries.ndim != 1:
            raise self._damaged("index.npy is no index")

    def __reduce__(self) -> tuple[type[Store], tuple[str | Path]]:
        return Store, (self.path,)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def ndim(self) -> int:
        """Spatial axes of a volume: 3, or 2."""
        return self.format.ndim

    @property
    def unit(self) -> str:
        """HU, arbitrary or grey."""
        return self.format.unit

    @property
    def spacing_mm(self) -> float | None:
        """Of all volumes; None where each keeps its own (`entries["spacing_mm"]`)."""
        return self.format.spacing_mm

    @cached_property
    def subject_names(self) -> list[str]:
        """What `entries["subject"]` counts."""
        return read_names(self._files, "subjects.txt")

    @cached_property
    def stratum_names(self) -> list[str]:
        """What `entries["stratum"]` counts."""
        return read_names(self._files, "strata.txt")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the index: the same only while the store holds the same volumes."""
        return hashlib.sha256(self.entries.tobytes()).hexdigest()

    @cached_property
    def ledger(self) -> Ledger:
        """The scans of all volumes; not complete where one has no hash, and empty for more than `MOST_LISTED`."""
        try:
            known = np.load(io.BytesIO(self._files.read(LEDGER)), allow_pickle=False)
        except FileNotFoundError:
            return Ledger(complete=False)
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged(f"{LEDGER}: {error}") from None
        if known.dtype != HASHES or known.ndim != 1:
            raise self._damaged(f"{LEDGER} is no list of hashes")
        sources = np.unique(self.entries["sha256"])
        if len(sources) > MOST_LISTED:
            return Ledger(complete=False)
        hashes = {row.tobytes().hex() for row in known["scan_hash"][np.isin(known["sha256"], sources)]}
        return Ledger(bool(np.isin(sources, known["sha256"]).all()), tuple(sorted(hashes)))

    def shape(self, i: int) -> tuple[int, ...]:
        """Of volume `i`, (D, H, W) or (H, W)."""
        return tuple(self.entries[i]["shape"].tolist()[-self.ndim :])

    def volume(self, i: int) -> np.ndarray:
        """Volume `i` as stored, (D, H, W) or (H, W) int16, read-only: a view of the disk, or fetched whole.

        Errors: IndexError beyond the end; VolumeError where the shard is missing or too short.
        """
        voxels = self._box(i, [slice(0, n) for n in self.shape(i)])
        voxels.flags.writeable = False
        return voxels

    def crop(self, i: int, start: Sequence[int], shape: Sequence[int]) -> Tensor:
        """A box of volume `i`, (1, *shape) float32 in [0, 1], as `volume.prepare` scales it; air where it leaves it.

        Args:
            start: first voxel (z, y, x) or (y, x); may be negative or beyond the end.
            shape: of the box, (D, H, W) or (H, W).
        """
        low, high = RANGES[self.unit]
        box = np.zeros(shape, np.float32)
        sides = zip(start, shape, self.shape(i), strict=True)
        there = [slice(max(0, first), min(n, first + size)) for first, size, n in sides]
        if all(part.start < part.stop for part in there):
            inside = box[tuple(slice(part.start - a, part.stop - a) for part, a in zip(there, start, strict=True))]
            np.subtract(self._box(i, there), low, out=inside, dtype=np.float32)
            inside /= high - low
        return torch.from_numpy(box)[None]

    def _box(self, i: int, there: Sequence[slice]) -> np.ndarray:
        try:
            return self._files.box(self.entries[i], self.shape(i), there)
        except FileNotFoundError as error:
            raise self._damaged(f"volume {i} is missing: {error.filename or error}") from None
        except (OSError, ValueError) as error:
            raise self._damaged(f"volume {i}: {error}") from None

    def _damaged(self, cause: str) -> VolumeError:
        remedy = "run 'gvsl-zoo prepare' on it again" if isinstance(self.path, Path) else COPY_AGAIN
        return VolumeError(f"the store {str(self.path)!r} is damaged: {cause}", remedy)


# --- The layout, which prepare.py writes --------------------------------------------------------------------------


class Folder:
    """The files of a store on a disk, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._shard = lru_cache(OPEN_SHARDS)(self._map)

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        """A whole file."""
        return (self.path / name).read_bytes()

    def entries(self) -> np.ndarray:
        """The index, mapped; a plain array over the map: the subclass costs at every access."""
        return np.asarray(np.lib.format.open_memmap(self.path / "index.npy", mode="r"))

    def box(self, entry: np.void, shape: Sequence[int], there: Sequence[slice]) -> np.ndarray:
        """A view of the volume that `entry` points at.

        Errors: OSError, ValueError for a shard that is missing, empty or too short.
        """
        number, start = int(entry["shard"]), int(entry["offset"])
        voxels = self._shard(number)[start : start + math.prod(shape)]
        if voxels.size < math.prod(shape):
            raise ValueError(f"the shard {number:05d}.i16 ends within it")
        return voxels.reshape(shape)[tuple(there)]

    def _map(self, number: int) -> np.ndarray:
        path = shard_path(self.path, number)
        return np.asarray(np.memmap(path, VOXEL, mode="r", shape=(path.stat().st_size // VOXEL.itemsize,)))


def shard_path(store: Path, number: int) -> Path:
    """Where shard `number` lies; its journal has the suffix .jsonl."""
    return store / "shards" / f"{number:05d}.i16"


def read_format(files: Folder | Bucket) -> Format:
    """What store.json says.

    Errors: VolumeError if there is none, or one of a newer version.
    """
    try:
        facts: dict[str, Any] = json.loads(files.read("store.json"))
        if facts["version"] > VERSION:
            raise VolumeError(f"the store {str(files)!r} has version {facts['version']}", "upgrade gvsl-zoo")
        return Format(facts["ndim"], facts["unit"], facts["spacing_mm"], facts.get("size"))
    except FileNotFoundError:
        raise VolumeError(f"{str(files)!r} is not a store: no store.json", "make one: 'gvsl-zoo prepare'") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VolumeError(f"the store {str(files)!r} has a damaged store.json: {error}", "prepare it anew") from None


def format_facts(format: Format, made_by: str) -> dict[str, Any]:
    """What goes into store.json."""
    facts = {"version": VERSION, "ndim": format.ndim, "unit": format.unit, "spacing_mm": format.spacing_mm}
    facts |= {"size": format.size} if format.size else {}
    return facts | {"window": RANGES[format.unit], "made_by": made_by}


def read_names(files: Folder | Bucket, name: str) -> list[str]:
    """The lines of a file of names, any bytes that a file name can have; none if there is no file."""
    try:
        return files.read(name).decode("utf-8", "surrogateescape").split("\n")[:-1]
    except FileNotFoundError:
        return []
