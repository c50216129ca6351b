"""Scans to a store: every file read once, checked, brought onto the training grid, and written down as finished.

A worker writes a volume into a shard of its own, and only then a line into the shard's journal. The journals are the
truth: a run that was killed at any moment goes on from them, and the index is made of them at the end of a run.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import multiprocessing
import os
import secrets
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
    wait,
)
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..cache import sha256_of
from ..cluster import connect
from ..errors import ArgumentError, VolumeError, listed
from ..film import read_pixels, resized
from ..ledger import scan_hash
from ..volume import InputWarning, Preprocessing, Volume, dicom_files, is_dicom, prepare, read_volume
from ..weights import write_whole
from .store import (
    ENTRY,
    HASHES,
    LEDGER,
    RANGES,
    VOXEL,
    Folder,
    Format,
    format_facts,
    read_format,
    read_names,
    shard_path,
)

MAX_SHARD_VOXELS = 2**29  # 1 GiB
FEW_VALUES = 32  # scans have hundreds
GO_ON = "free space or mend the disk; the same call then goes on where it stopped"
Record = dict[str, Any]  # a line of a journal: a finished file


@dataclass(frozen=True)
class PrepareReport:
    """What a store holds, and what this run did for it.

    Args:
        store: the folder.
        volumes, subjects, strata, bytes: what it holds now.
        prepared, kept: volumes written in this run, and finished before it.
        changed: sources whose content is another than when they were last prepared; prepared again.
        vanished: sources prepared once that are no longer there; the index no longer has them.
        quarantined: sources that could not be used; `quarantine` lists each with its cause.
        doubtful: sources used although something about them is odd; `notes` lists them.
        seconds: of this run.
    """

    store: Path
    volumes: int
    subjects: int
    strata: int
    bytes: int
    prepared: int
    kept: int
    changed: tuple[str, ...]
    vanished: tuple[str, ...]
    quarantined: int
    quarantine: Path
    doubtful: int
    notes: Path
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The facts for JSON and the terminal: of changed and vanished sources the number."""
        facts: dict[str, Any] = {"store": str(self.store), "volumes": self.volumes, "subjects": self.subjects}
        facts |= {"strata": self.strata, "prepared": self.prepared, "kept": self.kept}
        facts |= {"changed": len(self.changed), "vanished": len(self.vanished)}
        facts |= {"quarantined": self.quarantined} | ({"causes_in": str(self.quarantine)} if self.quarantined else {})
        facts |= {"doubtful": self.doubtful} | ({"doubts_in": str(self.notes)} if self.doubtful else {})
        return facts | {"GB": self.bytes / 1e9, "seconds": self.seconds}


def prepare_store(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    spacing_mm: float | None = 1.0,
    unit: str = "HU",
    ndim: int = 3,
    size: int | None = None,
    table: str | os.PathLike[str] | None = None,
    workers: int = 1,
    cluster: str | None = None,
    most_bad: float = 0.5,
    progress: Callable[[int, int], None] | None = None,
) -> PrepareReport:
    """Bring a folder tree of scans into a store that `Store` opens; called again, do only what is missing.

    Memory is bounded by one volume a worker. Links to folders and names that begin with a dot are not followed. Label
    maps that lie among the scans would become volumes, with a doubt noted: choose the scans with a table.

    Args:
        source: a folder of .nii, .nii.gz and DICOM series (a folder each); in 2D of .png and DICOM files (a film each).
        out: the store, new or of the same format; with a cluster, both are folders that all its machines share.
        spacing_mm: isotropic, of the training grid; None keeps each scan's own. Films always keep theirs.
        unit: "HU" or "arbitrary" (MR); in 2D "grey" or "arbitrary" (more than 8 bits).
        size: pixels an axis that films are resized to; None keeps each film's own.
        table: a CSV file with the columns path (below `source`), subject and stratum, that chooses the files. The
            last two may be missing or empty: a subject of its own, and one stratum "" of which all may be paired.
        workers: processes, of one thread each.
        cluster: address of a dask scheduler, such as tcp://10.0.0.1:8786, whose workers are used instead.
        most_bad: the share of bad files above which something else is wrong: then an error instead of a store.
        progress: called with files done and files in all.

    Errors: ArgumentError for a folder without scans, another format than the store's, a faulty table; VolumeError
        when too many files are bad, when the store cannot be written, or when another process writes it.
    """
    began = time.perf_counter()
    folder, store = Path(source).resolve(), Path(out).resolve()
    format = Format(ndim, unit, spacing_mm if ndim == 3 else None, size)
    if workers < 1 or not 0 <= most_bad <= 1:
        raise ArgumentError(f"workers {workers}, most_bad {most_bad}", "give at least 1, and a share from 0 to 1")
    found, bad = _find(folder, ndim, store)
    if not found and not bad:
        kinds = ".nii, .nii.gz or DICOM file" if ndim == 3 else ".png or DICOM file"
        raise ArgumentError(f"{str(folder)!r} holds no {kinds}", "give the folder of the scans")
    chosen, absent = _chosen(found, table)
    if table is not None:
        bad = {path: bad.get(path, "the table has it, the folder has not") for path in absent}
    with _sole_writer(store, format):
        journal = _read_journals(store)
        finished = {path: done for path in chosen if (done := journal.get(path, {}).get(found[path]))}
        run = secrets.token_hex(8)
        jobs = [
            _Job(folder, path, found[path], store, run, format, _by_content(journal.get(path, {})))
            for path in sorted(chosen.keys() - finished.keys(), key=lambda path: (-found[path].size, path))
        ]
        total, kept, changed = len(chosen) + len(bad), len(finished), []
        for count, record in enumerate(_carried_out(jobs, workers, cluster), total - len(jobs) + 1):
            path = record["path"]
            if "cause" in record:
                bad[path] = record["cause"]
            else:
                finished[path] = record
                if path in journal and record["sha256"] not in _by_content(journal[path]):
                    changed.append(path)
            if progress is not None:
                progress(count, total)
        notes = {path: record["notes"] for path, record in sorted(finished.items()) if record["notes"]}
        with _writing(store):
            _write_lines(store / "quarantine.jsonl", ({"path": p, "cause": bad[p]} for p in sorted(bad)))
            _write_lines(store / "notes.jsonl", ({"path": p, "notes": n} for p, n in notes.items()))
            if not finished or len(bad) > most_bad * total:
                causes = [f"{path!r}: {bad[path]}" for path in sorted(bad)]
                cause = f"{len(bad)} of {total} files cannot be used: {listed(causes, '; ')}"
                raise VolumeError(cause, f"all are listed in {str(store / 'quarantine.jsonl')!r}")
            index = _write_index(store, [finished[path] for path in sorted(finished)], chosen)
    return PrepareReport(
        store=store,
        volumes=len(index),
        subjects=len(np.unique(index["subject"])),
        strata=len(np.unique(index["stratum"])),
        bytes=int(index["shape"].astype(np.int64).prod(1).sum()) * VOXEL.itemsize,
        prepared=len(finished) - kept,
        kept=kept,
        changed=tuple(sorted(changed)),
        vanished=tuple(sorted(journal.keys() - found.keys())),
        quarantined=len(bad),
        quarantine=store / "quarantine.jsonl",
        doubtful=len(notes),
        notes=store / "notes.jsonl",
        seconds=time.perf_counter() - began,
    )


# --- What there is to do ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _State:
    """What tells whether a source changed, without reading it; of a DICOM series, the sum and the latest."""

    size: int
    mtime_ns: int


@dataclass(frozen=True)
class _Job:
    """One file or DICOM folder, `path` below `folder`; `known` are records of its earlier states, by sha256."""

    folder: Path
    path: str
    state: _State
    store: Path
    run: str
    format: Format
    known: Mapping[str, Record]


def _find(folder: Path, ndim: int, store: Path) -> tuple[dict[str, _State], dict[str, str]]:
    """All sources below `folder`, and what cannot even be looked at, with the cause."""
    if not folder.is_dir():
        raise ArgumentError(f"{str(folder)!r} is not a folder", "give the folder of the scans")
    found: dict[str, _State] = {}
    bad: dict[str, str] = {}

    def note(path: Path, error: OSError | None = None) -> None:
        name = path.relative_to(folder).as_posix()
        try:
            if error is not None:
                raise error
            found[name] = _state(path)
        except OSError as error:
            bad[name] = error.strerror or str(error)

    for root, folders, names in os.walk(folder, onerror=lambda error: note(Path(error.filename), error)):
        here = Path(root)
        folders[:] = [name for name in folders if name[0] != "." and here / name != store]
        names = [name for name in names if name[0] != "."]
        suffixes = (".nii", ".nii.gz") if ndim == 3 else (".png",)
        for name in names:
            if name.lower().endswith(suffixes) or (ndim == 2 and is_dicom(here / name)):
                note(here / name)
        if ndim == 3 and any(is_dicom(here / name) for name in names):
            note(here)
    for name in [name for name in found if "\n" in name]:
        del found[name]
        bad[name] = "a line break in the name"
    return found, bad


def _state(path: Path) -> _State:
    stats = [file.stat() for file in (dicom_files(path) if path.is_dir() else [path])]
    return _State(sum(s.st_size for s in stats), max((s.st_mtime_ns for s in stats), default=0))


def _content(path: Path) -> str:
    """sha256 of the file; of a DICOM folder, that of its files' hashes."""
    if not path.is_dir():
        return sha256_of(path)
    return hashlib.sha256("".join(map(sha256_of, dicom_files(path))).encode()).hexdigest()


def _chosen(
    found: Mapping[str, _State], table: str | os.PathLike[str] | None
) -> tuple[dict[str, tuple[str, str]], set[str]]:
    """The sources wanted, with (subject, stratum); and those of the table that are not there."""
    if table is None:
        return {path: (path, "") for path in found}, set()
    try:
        with Path(table).open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        cause = f"the table {str(table)!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ArgumentError(cause, "give a CSV file in UTF-8") from None
    if not rows or "path" not in rows[0]:
        cause = f"the table {str(table)!r} has no rows or no column 'path'"
        raise ArgumentError(cause, "give the columns path, subject, stratum")
    chosen: dict[str, tuple[str, str]] = {}
    for row in rows:
        path = os.path.normpath(row["path"] or "").replace(os.sep, "/")
        subject, stratum = row.get("subject") or path, row.get("stratum") or ""
        if path in chosen:
            raise ArgumentError(f"the table {str(table)!r} has {path!r} twice", "give each file one row")
        if "\n" in subject + stratum:
            raise ArgumentError(f"the table {str(table)!r} has a line break in a name of {path!r}", "remove it")
        chosen[path] = subject, stratum
    return {path: names for path, names in chosen.items() if path in found}, chosen.keys() - found.keys()


def _by_content(states: Mapping[_State, Record]) -> dict[str, Record]:
    return {record["sha256"]: record for record in states.values()}


def _read_journals(store: Path) -> dict[str, dict[_State, Record]]:
    """The record of every file and state of it whose volume lies whole in a shard."""
    journal: dict[str, dict[_State, Record]] = {}
    voxels = {int(path.stem): path.stat().st_size // VOXEL.itemsize for path in (store / "shards").glob("*.i16")}
    for path in sorted((store / "shards").glob("*.jsonl")):
        for line in path.read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # a line half written when its writer was killed
                record = json.loads(line)
                if record["offset"] + math.prod(record["shape"]) <= voxels.get(record["shard"], 0):
                    journal.setdefault(record["path"], {})[_State(record["size"], record["mtime_ns"])] = record
    return journal


# --- Who does it --------------------------------------------------------------------------------------------------


def _carried_out(jobs: Iterable[_Job], workers: int, cluster: str | None) -> Iterator[Record]:
    """Results in the order in which they come; few jobs are handed out at a time, so that any number is cheap."""
    if cluster is None and workers == 1:
        try:
            yield from map(_prepare_one, jobs)
        finally:
            _leave_shard()
        return
    with _executor(workers, cluster) as (executor, window, died):
        jobs, waiting = iter(jobs), dict[Future[Record], str]()
        try:
            while True:
                for job in islice(jobs, window - len(waiting)):
                    waiting[executor.submit(_prepare_alone, job)] = job.path
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    yield future.result()
                    del waiting[future]
        except died:
            lost = islice(waiting.values(), workers) if cluster is None else [waiting[future]]
            at = listed([repr(path) for path in lost])
            remedy = "out of memory? Use fewer workers; the same call goes on where it stopped"
            raise VolumeError(f"a worker process died while at {at}", remedy) from None
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def _executor(workers: int, cluster: str | None) -> Iterator[tuple[Executor, int, type[Exception]]]:
    """Processes of this machine or of a cluster, how many jobs keep them busy, and what says that one of them died."""
    if cluster is None:
        # torch's threads do not survive a fork of this process; that of a server which has only imported it is safe
        server = "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if server else "spawn")
        context.set_forkserver_preload([__name__])
        with ProcessPoolExecutor(workers, context, _end_with_parent) as executor:
            yield executor, 4 * workers, BrokenExecutor
        return
    with connect(cluster) as client, client.get_executor(pure=False) as executor:
        from distributed import KilledWorker

        yield executor, max(16, 4 * sum(client.nthreads().values())), KilledWorker


def _end_with_parent() -> None:
    """A worker ends when the process that started it was killed, instead of waiting for work for ever."""

    def watch() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _prepare_alone(job: _Job) -> Record:
    torch.set_num_threads(1)
    return _prepare_one(job)


def _prepare_one(job: _Job) -> Record:
    """The record of a source now finished, or its path and the cause why it cannot be used.

    Errors: VolumeError only if the store cannot be written.
    """
    path, voxels = job.folder / job.path, None
    try:
        sha256 = _content(path)
        record = dict(job.known.get(sha256, ()))
        if not record:
            voxels, record = _read(path, job.format)
        if _state(path) != job.state:
            raise VolumeError("it changed while it was read", "prepare again when it is complete")
    except Exception as error:  # Pillow and ITK raise whatever they like
        kind = "" if isinstance(error, (VolumeError, OSError)) else f"{type(error).__name__}: "
        return {"path": job.path, "cause": kind + " ".join(str(error).split())}
    record |= {"path": job.path, **asdict(job.state), "sha256": sha256}
    return _append(job, voxels, record)


# --- Reading ------------------------------------------------------------------------------------------------------


def _read(path: Path, format: Format) -> tuple[np.ndarray, Record]:
    """A source on the training grid, int16, and what its record says of it."""
    spacing = (0.0, 0.0, 0.0)
    notes: tuple[str, ...] = ()
    if format.ndim == 2:
        source = read_pixels(path, format.unit)
        hashed = scan_hash(Volume(source.T[:, :, None], np.eye(4)))
        lowest, highest = float(source.min()), float(source.max())
        low, high = (0.0, 255.0) if format.unit == "grey" else (lowest, highest)
        image = torch.from_numpy(source.astype(np.float32))[None].sub_(low).div_(max(high - low, 1))  # (1, H, W)
        image = resized(image, (format.size,) * 2 if format.size else None)
    else:
        with warnings.catch_warnings(), ThreadPoolExecutor(1) as beside:
            warnings.simplefilter("ignore", InputWarning)
            volume = read_volume(path)
            hashing = beside.submit(scan_hash, volume)  # a third of the work
            wanted = None if format.spacing_mm is None else (format.spacing_mm,) * 3
            prepared = prepare(volume, Preprocessing(wanted, unit=format.unit))
        source, hashed = volume.data, hashing.result()
        lowest, highest = float(source.min()), float(source.max())
        image, spacing, notes = prepared.image[0, 0], prepared.spacing_mm, prepared.warnings
    stored = _stored(image, format.unit)
    if lowest == highest or stored.min() == stored.max():
        raise VolumeError(f"an empty image: values from {lowest:g} to {highest:g} {format.unit} become all the same")
    thin = source[tuple(slice(None, None, max(1, n // 64)) for n in source.shape)]
    if (values := len(np.unique(thin))) < FEW_VALUES:
        notes += (f"only {values} different values: a label map? Choose the scans with a table",)
    facts = {"shape": list(image.shape), "spacing_mm": spacing, "lowest": lowest, "highest": highest, "notes": notes}
    return stored, facts | {"scan_hash": hashed}


def _stored(image: Tensor, unit: str) -> np.ndarray:
    """[0, 1] -> the range of the numbers stored; the image is used up."""
    low, high = RANGES[unit]
    return image.mul_(high - low).add_(low).round_().to(torch.int16).numpy().astype(VOXEL, copy=False)


# --- Writing ------------------------------------------------------------------------------------------------------

_mine = threading.local()  # .shard: the one that this thread writes


class _Shard:
    """A new shard and its journal, which nobody else writes."""

    def __init__(self, store: Path, run: str) -> None:
        self.run, self.voxels = run, 0
        self.number = max((int(path.stem) for path in (store / "shards").glob("*.i16")), default=-1) + 1
        while True:
            path = shard_path(store, self.number)
            try:
                self.data = path.open("xb", buffering=0)
                break
            except FileExistsError:  # another writer was faster
                self.number += 1
        self.journal = path.with_suffix(".jsonl").open("xb", buffering=0)

    def append(self, voxels: np.ndarray | None, record: Record) -> Record:
        if voxels is not None:
            record = record | {"shard": self.number, "offset": self.voxels}
            _write(self.data, np.ascontiguousarray(voxels).data.cast("B"))
            os.fsync(self.data.fileno())
            self.voxels += voxels.size
        _write(self.journal, memoryview(json.dumps(record).encode() + b"\n"))
        return record


def _write(file: io.FileIO, rest: memoryview) -> None:
    while rest:
        rest = rest[file.write(rest) :]


def _append(job: _Job, voxels: np.ndarray | None, record: Record) -> Record:
    """Write a volume (None: it lies in the store already) and then its record."""
    shard: _Shard | None = getattr(_mine, "shard", None)
    with _writing(job.store):
        if shard is None or shard.run != job.run or shard.voxels + _size(voxels) > MAX_SHARD_VOXELS:
            _leave_shard()
            shard = _mine.shard = _Shard(job.store, job.run)
        try:
            return shard.append(voxels, record)
        except OSError:
            _leave_shard()  # where it ends is no longer known
            raise


def _size(voxels: np.ndarray | None) -> int:
    return 0 if voxels is None else voxels.size


def _leave_shard() -> None:
    shard: _Shard | None = getattr(_mine, "shard", None)
    if shard is not None:
        shard.data.close()
        shard.journal.close()
        _mine.shard = None


def _write_index(store: Path, records: list[Record], chosen: Mapping[str, tuple[str, str]]) -> np.ndarray:
    index = np.zeros(len(records), ENTRY)
    for name in ("shard", "offset", "spacing_mm", "lowest", "highest", "shape", "sha256"):
        index[name] = [record[name] for record in records]
    names = [chosen[record["path"]] for record in records]
    index["subject"] = _numbered(store / "subjects.txt", [subject for subject, _ in names])
    index["stratum"] = _numbered(store / "strata.txt", [stratum for _, stratum in names])
    hashed = [record for record in records if "scan_hash" in record]  # those of an older version have none
    ledger = np.zeros(len(hashed), HASHES)
    ledger["sha256"] = [record["sha256"] for record in hashed]
    hashes = bytes.fromhex("".join(record["scan_hash"] for record in hashed))
    ledger["scan_hash"] = np.frombuffer(hashes, "u1").reshape(-1, 32)
    _write_array(store / LEDGER, ledger)
    _write_array(store / "index.npy", index)
    return index


def _write_array(path: Path, array: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, array)
    write_whole(path, buffer.getbuffer())


def _numbered(path: Path, names: list[str]) -> list[int]:
    """The line of each name in a file of names, to which new ones are added: an older index stays right."""
    lines = {name: line for line, name in enumerate(read_names(Folder(path.parent), path.name))}
    numbers = [lines.setdefault(name, len(lines)) for name in names]
    write_whole(path, "".join(f"{name}\n" for name in lines).encode("utf-8", "surrogateescape"))
    return numbers


def _write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


@contextmanager
def _sole_writer(store: Path, format: Format) -> Iterator[None]:
    """The sole right to prepare into a store, which is made if need be; it ends with the process."""
    from filelock import FileLock, Timeout

    with _writing(store):
        store.mkdir(parents=True, exist_ok=True)
        lock = FileLock(store / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise VolumeError(f"another process prepares {str(store)!r}", "wait for it, or choose another") from None
    try:
        if (store / "store.json").exists():
            if (own := read_format(Folder(store))) != format:
                raise ArgumentError(f"the store {str(store)!r} is {own}, not {format}", "choose another folder")
        elif any(path.name[0] != "." for path in store.iterdir()):
            raise ArgumentError(f"{str(store)!r} holds other things and no store", "choose an empty or new folder")
        else:
            with _writing(store):
                write_whole(store / "store.json", json.dumps(format_facts(format, f"gvsl-zoo {__version__}")).encode())
        with _writing(store):
            (store / "shards").mkdir(exist_ok=True)
        yield
    finally:
        lock.release()


@contextmanager
def _writing(store: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise VolumeError(f"cannot write the store {str(store)!r}: {error.strerror or error}", GO_ON) from error
