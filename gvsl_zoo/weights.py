"""Bytes -> tensors: safetensors files, memory-mapped, with every claim of the header checked before it is believed."""

from __future__ import annotations

import glob
import hashlib
import json
import math
import mmap
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from .cache import own_folder
from .errors import WeightsError, listed, short

MAX_HEADER_BYTES = 4 * 2**20  # 400 tensors and a model's entry take 60 kB
FRESH_SECONDS = 60.0
MAX_PARTIAL_NAME = 56  # letters of a file's name in its temporary one: of 4 bytes each they leave room below 255
MAX_AXES = 8  # of a tensor; a convolution in 3D has 5
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
METADATA_KEY = "gvsl_zoo"  # under which a file carries its own entry
WEIGHTS_NAME = "model.safetensors"
DOWNLOAD_AGAIN = "the file is damaged or is no safetensors file: get it again from its source"
CONVERT = "convert it first: gvsl-zoo convert FILE.pth FILE.safetensors"
SAVE_AGAIN = (
    "where you trust the file, open it with its own program and save model.state_dict() with a current torch.save"
)


@dataclass(frozen=True)
class TensorSlot:
    """Where a tensor lies in the file: bytes start to end, counted from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class WeightsFile:
    """A safetensors file whose header has been read and found consistent; its data lies untouched on the disk.

    All of it is of the one file that was opened, whatever bears its name by now.
    """

    path: Path
    stat: os.stat_result
    header: bytes  # JSON, as it stands in the file
    slots: Mapping[str, TensorSlot]
    metadata: Mapping[str, str]
    mapped: mmap.mmap = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.stat.st_size

    @property
    def data(self) -> memoryview:
        """Everything behind the header, mapped."""
        return memoryview(self.mapped)[8 + len(self.header) :]

    def tensor(self, name: str) -> Tensor:
        """A view of the file, mapped copy-on-write: training on it never changes the file."""
        slot = self.slots[name]
        count = math.prod(slot.shape)
        if not count:
            return torch.empty(slot.shape, dtype=slot.dtype)
        if slot.start % slot.dtype.itemsize:
            return torch.frombuffer(bytearray(self.mapped[slot.start : slot.end]), dtype=slot.dtype).view(slot.shape)
        return torch.frombuffer(self.mapped, dtype=slot.dtype, count=count, offset=slot.start).view(slot.shape)


def values_hash(model: nn.Module) -> str:
    """sha256 of the names, shapes and float32 values of a module's tensors, whatever a file holds beside them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().data)
    return digest.hexdigest()


def open_weights(path: Path) -> WeightsFile:
    """Read and check the header of a safetensors file.

    Raises: WeightsError if the file is missing, is something else, or if its header claims what the file does not
    hold: duplicate names, unknown dtypes, sizes that disagree with shapes, holes, overlaps, trailing bytes.
    """
    try:
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            size, start = stat.st_size, file.read(8)
            length = int.from_bytes(start, "little")
            if size < 10 or length > size - 8:
                what, remedy = looks_like(start, size)
                raise WeightsError(f"{path} is not a weights file: {what}", remedy)
            if length > MAX_HEADER_BYTES:
                raise WeightsError(f"{path} has a header of {length} bytes, at most {MAX_HEADER_BYTES} are read")
            header = file.read(length)
            slots, metadata = read_header(path, header, size)
            mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as error:  # the latter: a NUL in the path
        cause = f"{path} cannot be read: {getattr(error, 'strerror', error)}"
        raise WeightsError(cause, "check the path and its permissions") from None
    return WeightsFile(path, stat, header, slots, metadata, mapped)


def read_header(path: Path, header: bytes, size: int) -> tuple[dict[str, TensorSlot], dict[str, str]]:
    """Slots and metadata that the header of a file of `size` bytes tells of, all checked; `path` is for errors."""
    end = 8 + len(header)
    try:
        table = json.loads(header.decode(), object_pairs_hook=_without_duplicates)
        metadata = table.pop("__metadata__", {})
        slots = {name: _slot(name, claim, end) for name, claim in table.items()}
    except WeightsError as error:
        raise WeightsError(f"{path}: {error.cause}", DOWNLOAD_AGAIN) from None
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        raise WeightsError(f"{path} has a header that is not safetensors' JSON", DOWNLOAD_AGAIN) from None
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError(f"{path} has metadata that is not text", DOWNLOAD_AGAIN)
    for name, slot in sorted(slots.items(), key=lambda item: (item[1].start, item[1].end)):
        if slot.start != end:
            raise WeightsError(f"{path}: tensor {name!r} starts at byte {slot.start}, expected {end}", DOWNLOAD_AGAIN)
        end = slot.end
    if end != size:
        raise WeightsError(f"{path} has {size} bytes, its header tells of {end}", DOWNLOAD_AGAIN)
    return slots, metadata


def looks_like(start: bytes, size: int) -> tuple[str, str]:
    """What a file that is no safetensors file seems to be, by its first bytes, and what to do about it."""
    known = {
        b"<": ("it looks like a web page", DOWNLOAD_AGAIN),
        b"version ": ("it is a Git LFS pointer, not the file itself", "fetch the file itself (git lfs pull)"),
        b"PK": ("it looks like a PyTorch .pth or zip file", CONVERT),
        b"\x80": ("it looks like a pickle, which is never opened", SAVE_AGAIN),
    }
    unknown = f"{size} bytes without a header", DOWNLOAD_AGAIN
    return next((found for prefix, found in known.items() if start.startswith(prefix)), unknown)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise WeightsError("the header has the same name twice")
    return table


def _slot(name: str, claim: dict[str, Any], data_start: int) -> TensorSlot:
    dtype = DTYPES.get(claim["dtype"])
    if dtype is None:
        raise WeightsError(f"tensor {name!r} has the unknown dtype {claim['dtype']!r}")
    shape, (start, end) = tuple(claim["shape"]), claim["data_offsets"]
    if len(shape) > MAX_AXES or any(type(n) is int and n >= 2**63 for n in shape):
        raise WeightsError(f"tensor {name[:80]!r} has {len(shape)} axes or more elements than any tensor can")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise WeightsError(f"tensor {name!r} has a negative or fractional size")
    if math.prod(max(n, 1) for n in shape) >= 2**63:  # strides of an empty one
        raise WeightsError(f"tensor {name[:80]!r} of shape {shape} is larger than any tensor can be")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise WeightsError(f"tensor {name[:80]!r} of shape {shape} claims {end - start} bytes")
    return TensorSlot(dtype, shape, data_start + start, data_start + end)


# --- Trust: the hash and the values, read once and remembered for as long as the file stays as it is -----------------


@dataclass(frozen=True)
class _Seal:
    path: str
    size: int
    modified_ns: int
    inode: int
    sha256: str


def check_content(file: WeightsFile, sha256: str | None = None) -> str:
    """Check the file's sha256 and that all its numbers are finite; return the sha256.

    The answer is remembered for a file of unchanged size, time and inode, so that only the first call reads it all.

    Raises: WeightsError for another hash than `sha256`, NaN or Inf.
    """
    path = str(file.path.resolve())
    note = seal_folder() / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"
    current = _Seal(path, file.size, file.stat.st_mtime_ns, file.stat.st_ino, "")
    digest = _remembered(note, current)
    if digest is None:
        digest = hashlib.sha256(file.mapped).hexdigest()
        for name, slot in file.slots.items():
            if slot.dtype.is_floating_point and not torch.isfinite(file.tensor(name)).all():
                raise WeightsError(f"{file.path}: tensor {name!r} holds NaN or Inf", "do not use this file")
        with suppress(OSError):  # without a writable cache the file is read again next time
            note.parent.mkdir(parents=True, exist_ok=True)
            write_whole(note, json.dumps(asdict(current) | {"sha256": digest}).encode())
    if sha256 is not None and digest != sha256:
        raise WeightsError(f"{file.path} has sha256 {digest}, expected {sha256}", DOWNLOAD_AGAIN)
    return digest


def seal_folder() -> Path:
    """Where hashes are remembered."""
    return own_folder() / "seals"


def _remembered(note: Path, current: _Seal) -> str | None:
    try:
        seal = _Seal(**json.loads(note.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return seal.sha256 if asdict(seal) == asdict(current) | {"sha256": seal.sha256} else None


# --- Into a module, and out again --------------------------------------------------------------------------------


def assign(module: nn.Module, tensors: Mapping[str, Tensor], origin: str) -> None:
    """Give `module` exactly these tensors, float32, without copying those that have it already.

    Names, shapes and dtypes are compared first: where they differ the module stays untouched.

    Raises: WeightsError listing what is missing, left over or misshapen.
    """
    expected = module.state_dict()
    wrong = [f"{name} is missing" for name in expected.keys() - tensors.keys()]
    wrong += [f"{name} has no place" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        if tensors[name].shape != expected[name].shape:
            wrong.append(f"{name} is {tuple(tensors[name].shape)}, not {tuple(expected[name].shape)}")
        elif not tensors[name].is_floating_point():
            wrong.append(f"{name} is {tensors[name].dtype}, not a floating-point tensor")
        elif tensors[name].dtype == torch.float64 and not tensors[name].float().isfinite().all():
            wrong.append(f"{name} holds numbers beyond float32")
    if wrong:
        told = [short(text, 200) for text in sorted(wrong)]
        raise WeightsError(
            f"{origin} does not fit {type(module).__name__}: {listed(told, '; ')}",
            "the weights belong to another architecture, width or task",
        )
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)


def write_weights(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; the same tensors and metadata give the same bytes.

    The largest numbers come first, then names decide, as in the files of the safetensors library.

    Raises: WeightsError for a header that would not be read again.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, str(item[1].dtype), item[0]))
    table, end = {}, 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        table[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    data = (tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data for _, tensor in ordered)
    write_whole(path, header_bytes(table, metadata), *data)


def header_bytes(table: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """What stands in front of a safetensors file's data: the length of the header, and the header.

    Raises: WeightsError for one that `open_weights` would refuse.
    """
    whole = {"__metadata__": dict(sorted(metadata.items()))} | dict(table)
    header = json.dumps(whole, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > MAX_HEADER_BYTES:
        cause = f"a header of {len(header)} bytes, at most {MAX_HEADER_BYTES} are read again"
        raise WeightsError(cause, "shorten the entry, such as the scans in its ledger")
    return len(header).to_bytes(8, "little") + header


def write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file of these parts: all of it or nothing, see `whole_file`."""
    with whole_file(path) as file:
        for part in parts:
            file.write(part)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, under a temporary name; at the end it is flushed to the disk and renamed into place.

    What an earlier writer of the same file left when it was killed is removed.
    """
    name = path.name[:MAX_PARTIAL_NAME]
    for orphan in path.parent.glob(f".{glob.escape(name)}.*.partial"):
        _remove_unless_locked(orphan)
    partial = path.with_name(f".{name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            with suppress(OSError):  # a file system without locks (Lustre): nobody sweeps there
                _lock(file)
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _remove_unless_locked(path: Path) -> None:
    with suppress(OSError), path.open("rb") as file:
        _lock(file)
        if time.time() - os.fstat(file.fileno()).st_mtime > FRESH_SECONDS:  # not yet locked, or not yet renamed
            path.unlink()


def _lock(file: BinaryIO) -> None:
    """Mark a file as being written, until it is closed or its process ends; BlockingIOError if another does."""
    try:
        import fcntl
    except ImportError:  # Windows, which itself refuses to remove an open file
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
