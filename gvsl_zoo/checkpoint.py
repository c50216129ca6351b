"""PyTorch checkpoints (.pth), read as data: nothing is believed before it has been checked, and nothing is executed.

A .pth is a zip archive of a pickle and the bytes of the tensors. First its directory is checked, then `outline` reads
the pickle as plain data, without a call; what it tells of a tensor must fit the bytes that are there. Only when the
caller is content with that does `read_tensors` map the file, through torch.load(weights_only=True).
"""

from __future__ import annotations

import math
import os
import pickletools
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .errors import WeightsError, listed, short
from .weights import MAX_AXES, SAVE_AGAIN, looks_like

MAX_PICKLE_BYTES = 8 * 2**20  # data.pkl of XMorpher with Adam's state has 230 kB
MAX_OPERATIONS = 200_000  # of the pickle; the same has 40,000
MAX_DIRECTORY_BYTES = 4 * 2**20  # of the archive
MEMBER = re.compile(
    r"([^/\\]+)/(data\.pkl|data/\d{1,9}|version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id)"
)
STORAGES = {
    f"torch.{kind}Storage": dtype
    for kind, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "ComplexDouble": torch.complex128,
        "ComplexFloat": torch.complex64,
    }.items()
}
GLOBALS = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.Size",
    "torch.device",
    *STORAGES,
    *map(str, STORAGES.values()),
}
DOWNLOAD_AGAIN = "the file is damaged or no checkpoint of PyTorch: get it again from its source"


# --- The archive -------------------------------------------------------------------------------------------------


def read_archive(path: Path) -> tuple[bytes, dict[str, int]]:
    """The pickle of a checkpoint, and the sizes of its members by their name; every checksum is right."""
    if path.exists() and not path.is_file():
        raise WeightsError("is not a file", "give the path of a .pth file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(300)
        if not start.startswith(b"PK\3\4"):
            if start[8:9] == b"{":
                raise WeightsError("is a safetensors file already", "load opens it as it is")
            tar = start[257:262] == b"ustar"
            what, remedy = ("it looks like a tar archive", SAVE_AGAIN) if tar else looks_like(start, size)
            remedy = DOWNLOAD_AGAIN if start.startswith(b"PK") else remedy
            raise WeightsError(f"is not a zip archive of torch.save: {what}", remedy)
        file.seek(max(0, size - 98))
        end = file.read().rjust(98, b"\0")  # zip64 record (56 bytes), its locator (20), end record (22)
        directory = int.from_bytes(end[40:48] if end[56:60] == b"PK\6\7" else end[88:92], "little")
        if end[76:80] != b"PK\5\6" or end[96:] != b"\0\0" or directory > MAX_DIRECTORY_BYTES:
            raise WeightsError("is a zip archive cut short, or not one of torch.save", DOWNLOAD_AGAIN)
        with zipfile.ZipFile(file) as archive:
            return _read_members(archive, size)


def _read_members(archive: zipfile.ZipFile, size: int) -> tuple[bytes, dict[str, int]]:
    infos = archive.infolist()
    matches = [MEMBER.fullmatch(info.filename) for info in infos]
    odd = [info.filename for info, match in zip(infos, matches, strict=True) if not match]
    if any(name.split("/")[1:2] == ["code"] or name.endswith("/constants.pkl") for name in odd):
        raise WeightsError("is a TorchScript archive, which holds code", SAVE_AGAIN)
    if odd:
        raise WeightsError(f"has members that torch.save does not write: {listed([*map(short, odd)])}", DOWNLOAD_AGAIN)
    members = {match[2]: info for info, match in zip(infos, matches, strict=True) if match}
    roots = {match[1] for match in matches if match}
    if len(members) < len(infos) or len(roots) != 1 or roots & {".", ".."} or "data.pkl" not in members:
        raise WeightsError("has members twice, more than one folder, or no data.pkl", DOWNLOAD_AGAIN)
    for name, info in members.items():
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & ~0x808:
            raise WeightsError(
                f"has a compressed or encrypted member {name}, which torch.save never writes", SAVE_AGAIN
            )
        if not name.startswith("data/") and info.file_size > MAX_PICKLE_BYTES:
            raise WeightsError(f"has {name} of {info.file_size} bytes, at most {MAX_PICKLE_BYTES} are read", SAVE_AGAIN)
    if sum(info.file_size for info in infos) > size:
        raise WeightsError(f"claims more bytes than its {size}: its members overlap", DOWNLOAD_AGAIN)
    if bad := archive.testzip():
        raise WeightsError(
            f"has a damaged member {short(bad)}: another checksum or name than its directory tells", DOWNLOAD_AGAIN
        )
    if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
        raise WeightsError("was not saved in little-endian order", SAVE_AGAIN)
    return archive.read(members["data.pkl"]), {name: info.file_size for name, info in members.items()}


# --- The pickle, read without a call ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """A tensor as the pickle tells of it: that it lies within its storage has been checked."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    count: int


def outline(pickle: bytes, members: Mapping[str, int]) -> Any:
    """What a state dict's pickle holds: dicts, lists, tuples, text and numbers, and a Claim for each tensor.

    Only opcodes that torch.load(weights_only=True) knows are followed, only GLOBALS may be named, and only calls that
    make a tensor or an empty dict are understood; none is made. Takes time and memory in proportion to the pickle.
    """
    stack: list[Any] = []
    marks: list[list[Any]] = []
    memo: dict[int, Any] = {}
    arg: Any
    for count, (opcode, arg, _) in enumerate(pickletools.genops(pickle)):
        if count > MAX_OPERATIONS:
            raise WeightsError(f"has a pickle of more than {MAX_OPERATIONS} operations", SAVE_AGAIN)
        match opcode.name:
            case "PROTO":
                if arg > 3:
                    raise WeightsError(f"is pickled with protocol {arg}, torch.save's own is 2", SAVE_AGAIN)
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(arg)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "MARK":
                marks.append(stack)
                stack = []
            case "TUPLE":
                items, stack = stack, marks.pop()
                stack.append(tuple(items))
            case "APPENDS":
                items, stack = stack, marks.pop()
                _extend(stack[-1], items)
            case "SETITEMS":
                items, stack = stack, marks.pop()
                _update(stack[-1], items)
            case "APPEND":
                _extend(stack[-2], [stack.pop()])
            case "SETITEM":
                _update(stack[-3], [stack.pop(-2), stack.pop()])
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "GLOBAL":
                stack.append(_allowed(arg))
            case "BINPERSID":
                stack[-1] = _storage(stack[-1], members)
            case "REDUCE":
                args = stack.pop()
                stack[-1] = _called(stack[-1], args)
            case "BUILD":  # an ordered dict's attributes
                attributes = stack.pop()
                if type(stack[-1]) is not dict or type(attributes) is not dict or attributes.keys() - {"_metadata"}:
                    _refuse_code("an object with a state of its own")
            case "STOP":
                return stack.pop()
            case "INST":
                _refuse_code(arg.replace(" ", ".", 1))
            case other:
                texts = [item for item in stack if isinstance(item, str)][-2:]
                _refuse_code(f"{other} {'.'.join(texts)}" if other == "STACK_GLOBAL" else other)
    raise WeightsError("has a pickle without an end", DOWNLOAD_AGAIN)


def _refuse_code(what: str) -> NoReturn:
    raise WeightsError(f"holds code or objects that no state dict needs: {short(what)}", SAVE_AGAIN)


def _allowed(arg: str) -> _Global:
    name = arg.replace(" ", ".", 1)
    return _Global(name) if name in GLOBALS else _refuse_code(name)


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is not list:
        _refuse_code(f"items for a {type(target).__name__}")
    target.extend(items)


def _update(target: Any, items: list[Any]) -> None:
    if type(target) is not dict:
        _refuse_code(f"items for a {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int):  # the hash of a nested tuple can take forever
            _refuse_code(f"a dict with a {type(key).__name__} as key")
        target[key] = value


def _storage(reference: Any, members: Mapping[str, int]) -> _Storage:
    match reference:
        case ("storage", _Global(kind), str(key), str(), int(count)) if kind in STORAGES:
            dtype, size = STORAGES[kind], members.get(f"data/{key}", -1)
            if count * dtype.itemsize == size:
                return _Storage(dtype, count)
            raise WeightsError(f"claims {short(count)} numbers of {dtype} in a member of {size} bytes", DOWNLOAD_AGAIN)
    raise WeightsError("refers to bytes outside the file", DOWNLOAD_AGAIN)


def _called(function: Any, args: Any) -> Any:
    """What a call would return."""
    match function, args:
        case _Global("collections.OrderedDict"), ():
            return {}
        case _Global("torch.Size"), (tuple(size),) if len(size) <= MAX_AXES and all(type(n) is int for n in size):
            return size
        case _Global("torch.device"), (str(),) | (str(), int()):
            return None
        case _Global("torch._utils._rebuild_parameter"), (Claim() as tensor, bool(), dict(hooks)) if not hooks:
            return tensor
        case (
            _Global("torch._utils._rebuild_tensor_v2"),
            (_Storage() as storage, int(offset), tuple(shape), tuple(stride), bool(), dict(hooks)),
        ) if not hooks and len(shape) == len(stride) <= MAX_AXES and all(type(n) is int for n in shape + stride):
            return _claim(storage, offset, shape, stride)
    _refuse_code(f"a call of {function.name}" if isinstance(function, _Global) else "a call")


def _claim(storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> Claim:
    sane = all(0 <= n < 2**63 for n in (offset, *shape, *stride))
    repeats = any(step == 0 and n > 1 for n, step in zip(shape, stride, strict=True))
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if not sane or repeats or (0 not in shape and max(last + 1, math.prod(shape)) > storage.count):
        claim = short(f"shape {shape}, stride {stride} and offset {offset}")
        raise WeightsError(f"has a tensor of {claim} in a storage of {storage.count} numbers", DOWNLOAD_AGAIN)
    return Claim(storage.dtype, shape, stride, offset)


# --- The tensors ---------------------------------------------------------------------------------------------------


def read_tensors(
    path: Path, wrapper: str | None, names: Mapping[str, str], claims: Mapping[str, Claim]
) -> dict[str, Tensor]:
    """The finite tensors behind the claims, mapped from the file; float64 becomes float32."""
    loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    state = loaded[wrapper] if wrapper else loaded
    tensors: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        tensor, claim = state[theirs], claims[ours]
        if type(tensor) not in (Tensor, nn.Parameter) or claim != Claim(
            tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
        ):
            raise WeightsError(f"gives another tensor {ours} than it claims", DOWNLOAD_AGAIN)
        tensor = tensor.detach()
        tensors[ours] = tensor.float() if tensor.dtype == torch.float64 else tensor
        if not tensors[ours].isfinite().all():
            raise WeightsError(f"has a tensor {ours} with NaN, Inf or numbers beyond float32", "do not use this file")
    return tensors
