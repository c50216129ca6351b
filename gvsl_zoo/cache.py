"""What stays on this machine: the Hub's cache, left as it is, and a folder of our own beside it.

HF_HOME/gvsl-zoo/
    seals/      hashes of files that have been read, so that they need not be read again
    weights/    SHA256.safetensors: imported bundles
    upstream/   NAME/: the authors' checkpoints as safetensors, and a record of the file that they came from
With a `cache_dir` of one's own, that folder is the Hub's cache and holds ours as `gvsl-zoo`.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import SourceError

OFFLINE_WORDS = {"1", "on", "yes", "true"}  # as the Hub's client reads HF_HUB_OFFLINE
CacheDir = str | os.PathLike[str] | None
NOTICE_SECONDS = 1.0  # of waiting for another process in silence


def _hf_home() -> Path:
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface"
    try:
        return Path(os.path.expandvars(home)).expanduser()
    except RuntimeError:  # no home at all: nothing can be kept
        return Path(os.devnull)


def own_folder(cache_dir: CacheDir = None) -> Path:
    """Our folder: below `cache_dir`, or beside the Hub's cache, following HF_HOME and XDG_CACHE_HOME."""
    return (_hf_home() if cache_dir is None else Path(cache_dir).expanduser()) / "gvsl-zoo"


def hub_folder(cache_dir: CacheDir = None) -> Path:
    """The Hub's cache: `cache_dir`, HF_HUB_CACHE, or the hub folder of HF_HOME."""
    named = cache_dir or os.environ.get("HF_HUB_CACHE")
    return Path(os.path.expandvars(named)).expanduser() if named else _hf_home() / "hub"


def offline() -> bool:
    """Whether the environment forbids the network (HF_HUB_OFFLINE)."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in OFFLINE_WORDS


def stored_path(sha256: str, cache_dir: CacheDir = None) -> Path:
    """Where an imported file with this hash lies."""
    return own_folder(cache_dir) / "weights" / f"{sha256}.safetensors"


def upstream_folder(name: str, cache_dir: CacheDir = None) -> Path:
    """Where the converted checkpoint of an upstream model lies."""
    return own_folder(cache_dir) / "upstream" / name


def sha256_of(path: Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The sole right to write into a folder of ours, which is made; what killed writers left is swept away.

    The lock is the operating system's and ends with its process.

    Raises: SourceError when the folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=NOTICE_SECONDS)
        except Timeout:
            warnings.warn(f"waiting for another process that writes to {folder}", stacklevel=3)
            lock.acquire()
    try:
        for orphan in folder.glob(".*.partial"):
            with suppress(OSError):
                orphan.unlink()
        yield
    finally:
        lock.release()


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Say of a failed write into a folder of ours that it is the cache's: SourceError."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        cause = f"cannot write to the cache {folder}: {getattr(error, 'strerror', None) or error}"
        raise SourceError(cause, "free space, or choose another folder (HF_HOME, cache_dir)") from error
