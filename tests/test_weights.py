"""Tests of gvsl_zoo.weights: bits that survive, a corpus of damaged files, the seal, assignment, whole writes."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import math
import mmap
import os
import pickle
import pwd
import random
import re
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from gvsl_zoo import weights
from gvsl_zoo.errors import WeightsError
from gvsl_zoo.weights import DTYPES, WeightsFile, assign, check_content, open_weights, seal_folder, write_weights


@pytest.fixture(autouse=True)
def seals_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))


@pytest.fixture
def put(tmp_path):
    """Write bytes to a file in a folder that has no other."""

    def put(content: bytes, name: str = "x.safetensors") -> Path:
        path = tmp_path / "files" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return path

    return put


def claim(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def packed(header, data=b"", length=None):
    """A file's bytes: header as given (JSON of anything but bytes), its length true unless told."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


A, B = claim([2], 0, 8), claim([1], 8, 12)
BODY = bytes(range(1, 13))
GOOD = packed({"__metadata__": {"format": "pt"}, "a": A, "b": B}, BODY)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random_bits(dtype, *shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    raw = torch.randint(256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


# --- What goes in comes out ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype, tmp_path):
    tensors = {"cube": random_bits(dtype, 2, 3, 5), "scalar": random_bits(dtype), "turned": random_bits(dtype, 4, 7).T}
    write_weights(tensors, tmp_path / "x.safetensors", {"format": "pt", "note": "Größe"})
    file = open_weights(tmp_path / "x.safetensors")
    assert file.metadata == {"format": "pt", "note": "Größe"} and file.slots.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (file.tensor(name).dtype, file.tensor(name).shape) == (dtype, tensor.shape)
        assert torch.equal(bits(file.tensor(name)), bits(tensor)), name


def test_dtypes_and_empty_tensors_live_in_one_file(tmp_path):
    tensors = {str(dtype): random_bits(dtype, 3) for dtype in DTYPES.values()} | {"empty": torch.empty(0, 4)}
    write_weights(tensors, tmp_path / "x.safetensors", {})
    file = open_weights(tmp_path / "x.safetensors")
    assert all(torch.equal(bits(file.tensor(name)), bits(tensor)) for name, tensor in tensors.items())
    assert file.tensor("empty").shape == (0, 4)


def test_a_file_without_tensors_is_a_file(put):
    content = packed(b"{}   ")
    file = open_weights(put(content))
    assert not file.slots and check_content(file) == hashlib.sha256(content).hexdigest()


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    tensors = {"a": torch.rand(3, 4), "b": torch.arange(5), "c": torch.rand(2).bfloat16()}
    write_weights(tensors, tmp_path / "x.safetensors", {"author": "us"})
    theirs = safetensors.torch.load_file(tmp_path / "x.safetensors")
    assert theirs.keys() == tensors.keys()
    assert all(torch.equal(theirs[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"author": "us"}


def test_we_read_what_the_safetensors_library_writes(tmp_path):
    tensors = {"a": torch.rand(3, 4), "b": torch.arange(5), "c": torch.rand(2).bfloat16(), "d": torch.tensor(True)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    file = open_weights(tmp_path / "x.safetensors")
    assert file.metadata == {} and all(torch.equal(file.tensor(name), tensors[name]) for name in tensors)


def test_tensors_that_start_at_odd_bytes_are_read(put):
    numbers = torch.tensor([1.5, -2.0])
    table = {"flag": claim([1], 0, 1, "BOOL"), "x": claim([2], 1, 9)}
    for pad in range(4):
        header = json.dumps(table).encode() + b" " * pad
        file = open_weights(put(packed(header, b"\1" + bits(numbers).numpy().tobytes())))
        assert torch.equal(file.tensor("x"), numbers) and file.tensor("flag").item() is True


@pytest.mark.parametrize("order", [["a", "none", "b"], ["b", "a", "none"], ["none", "b", "a"]], ids="-".join)
def test_the_order_of_the_header_does_not_matter(put, order):
    table = {"a": A, "b": B, "none": claim([0, 3], 12, 12)}
    file = open_weights(put(packed({name: table[name] for name in order}, BODY)))
    assert bytes(bits(file.tensor("a")).tolist() + bits(file.tensor("b")).tolist()) == BODY
    assert file.tensor("none").shape == (0, 3)


def test_an_empty_tensor_may_stand_after_the_one_that_starts_where_it_does(put):
    file = open_weights(put(packed({"a": A, "none": claim([0], 0, 0), "b": B}, BODY)))
    assert file.tensor("none").shape == (0,)


@pytest.mark.parametrize("names", ["two", "views"])
def test_tied_tensors_are_written(names, tmp_path):
    base = torch.rand(4)
    tensors = {"a": base, "b": base} if names == "two" else {"a": base[:3], "b": base[1:]}
    write_weights(tensors, tmp_path / "x.safetensors", {})
    file = open_weights(tmp_path / "x.safetensors")
    assert all(torch.equal(file.tensor(name), tensors[name]) for name in tensors)


def test_training_on_mapped_tensors_leaves_the_file_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    write_weights(nn.Linear(4, 3).state_dict(), path, {})
    before = path.read_bytes()
    file, module = open_weights(path), nn.Linear(4, 3, device="meta")
    assign(module, {name: file.tensor(name) for name in file.slots}, "x")
    assert module.weight.data_ptr() == file.tensor("weight").data_ptr()  # mapped, not copied
    optimiser = torch.optim.SGD(module.parameters(), lr=1.0)
    module(torch.ones(2, 4)).sum().backward()
    optimiser.step()
    module.bias.data.zero_()
    fresh = open_weights(path)
    assert not torch.equal(module.weight, fresh.tensor("weight"))
    assert path.read_bytes() == before


# --- What is damaged is refused --------------------------------------------------------------------------------


def torch_file(**settings):
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, **settings)
    return buffer.getvalue()


def one(**changes):
    return packed({"a": A | changes}, BODY[:8])


CORPUS = {
    "empty": (b"", "is not a weights file: 0 bytes without a header"),
    "short": (b"\x10\0\0\0", "is not a weights file: 4 bytes"),
    "length_alone": (GOOD[:8], "is not a weights file"),
    "truncated_header": (GOOD[:60], "is not a weights file"),
    "truncated_body": (GOOD[:-1], r"has \d+ bytes, its header tells of"),
    "no_body": (GOOD[: -len(BODY)], r"has \d+ bytes, its header tells of"),
    "length_2_63": (packed(b"{}", BODY, 2**63), "is not a weights file"),
    "length_2_64": (packed(b"{}", BODY, 2**64 - 1), "is not a weights file"),
    "length_200_mb": (packed(b"{}", BODY, 200_000_000), "is not a weights file"),
    "length_too_short": (packed({"a": A}, BODY, 20), "not safetensors' JSON"),
    "length_0": (packed(b"", BODY, 0), "not safetensors' JSON"),
    "overlap": (packed({"a": A, "b": claim([1], 4, 8)}, BODY[:8]), "'b' starts at byte"),
    "twice_the_same": (packed({"a": A, "b": A}, BODY[:8]), "'b' starts at byte"),
    "hole": (packed({"a": A, "b": claim([1], 12, 16)}, BODY + b"1234"), "'b' starts at byte"),
    "hole_in_front": (packed({"a": claim([1], 4, 8)}, BODY[:8]), "'a' starts at byte"),
    "trailing": (GOOD + b"x", r"has \d+ bytes, its header tells of"),
    "unlisted_body": (packed(b"{}", BODY), r"has \d+ bytes, its header tells of"),
    "huge_shape": (one(shape=[2**40]), "claims 8 bytes"),
    "huge_shape_and_offsets": (one(shape=[2**40], data_offsets=[0, 2**42]), r"has \d+ bytes, its header tells of"),
    "wrapped_shape": (one(shape=[2**62 + 2]), "claims 8 bytes"),
    "shape_too_small": (one(shape=[]), "claims 8 bytes"),
    "negative_shape": (one(shape=[-2], data_offsets=[8, 0]), "negative or fractional"),
    "two_negatives": (one(shape=[-1, -2]), "negative or fractional"),
    "negative_offset": (one(data_offsets=[-8, 0]), "negative or fractional"),
    "offsets_turned": (one(data_offsets=[8, 0]), "claims -8 bytes"),
    "fractional_shape": (one(shape=[2.0]), "negative or fractional"),
    "boolean_shape": (one(shape=[2, True]), "negative or fractional"),
    "text_shape": (one(shape="12"), "negative or fractional"),
    "nan_shape": (packed(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', BODY[:8]), "fractional"),
    "null_shape": (one(shape=None), "not safetensors' JSON"),
    "one_offset": (one(data_offsets=[0]), "not safetensors' JSON"),
    "three_offsets": (one(data_offsets=[0, 8, 8]), "not safetensors' JSON"),
    "text_offsets": (one(data_offsets="08"), "negative or fractional"),
    "long_number": (
        packed(b'{"a": {"dtype": "F32", "shape": [' + b"9" * 9000 + b'], "data_offsets": [0, 8]}}', BODY[:8]),
        "not safetensors' JSON",
    ),
    "unknown_dtype": (one(dtype="F31"), "unknown dtype 'F31'"),
    "lower_case_dtype": (one(dtype="f32"), "unknown dtype 'f32'"),
    "null_dtype": (one(dtype=None), "unknown dtype None"),
    "list_dtype": (one(dtype=["F32"]), "not safetensors' JSON"),
    "no_dtype": (packed({"a": {"shape": [2], "data_offsets": [0, 8]}}, BODY[:8]), "not safetensors' JSON"),
    "claim_is_a_number": (packed({"a": 8}, BODY[:8]), "not safetensors' JSON"),
    "claim_is_null": (packed({"a": None}), "not safetensors' JSON"),
    "duplicate_names": (packed(b'{"a": %b, "a": %b}' % ((json.dumps(A).encode(),) * 2), BODY[:8]), "same name twice"),
    "duplicate_field": (
        packed(b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', BODY[:8]),
        "same name twice",
    ),
    "duplicate_by_escape": (
        packed(b'{"a": %b, "\\u0061": %b}' % ((json.dumps(A).encode(),) * 2), BODY[:8]),
        "same name twice",
    ),
    "number_in_metadata": (packed({"__metadata__": {"steps": 3}}), "metadata that is not text"),
    "list_as_metadata": (packed({"__metadata__": ["pt"]}), "metadata that is not text"),
    "null_metadata": (packed({"__metadata__": None}), "metadata that is not text"),
    "no_json": (packed(b"not json at all"), "not safetensors' JSON"),
    "json_list": (packed([1, 2]), "not safetensors' JSON"),
    "json_text": (packed("text"), "not safetensors' JSON"),
    "two_documents": (packed(b"{} {}"), "not safetensors' JSON"),
    "no_utf8": (packed(b'{"\xff": 1}'), "not safetensors' JSON"),
    "utf16": (packed('{"a": 1}'.encode("utf-16")), "not safetensors' JSON"),
    "deep_lists": (packed(b"[" * 200_000), "not safetensors' JSON"),
    "deep_tables": (packed(b'{"a":' * 200_000 + b"1" + b"}" * 200_000), "not safetensors' JSON"),
    "lfs_pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "a Git LFS pointer"),
    "html": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "looks like a web page"),
    "pickle": (pickle.dumps({"a": [1.0] * 9}), "looks like a pickle, which is never opened"),
    "old_pth": (torch_file(_use_new_zipfile_serialization=False), "looks like a pickle, which is never opened"),
    "zip_pth": (torch_file(), "looks like a PyTorch .pth or zip file"),
}


@pytest.mark.parametrize("name", CORPUS)
def test_a_damaged_file_is_refused_before_anything_is_allocated(name, put, monkeypatch):
    content, match = CORPUS[name]
    path = put(content)
    monkeypatch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("the data was mapped"))
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=match) as caught:
            open_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("start", "remedy"),
    [(b"PK\3\4", "convert it first: gvsl-zoo convert"), (b"\x80\2", "open it with its own program"), (b"v", "get it")],
)
def test_a_checkpoint_in_the_place_of_weights_is_told_what_to_do_with(start, remedy, put):
    with pytest.raises(WeightsError, match=f"is not a weights file: .*; .*{remedy}"):
        open_weights(put(start + b"\xff" * 20))


@pytest.mark.parametrize("length", [200_000_000, 5 * 2**20])
def test_a_header_that_is_there_but_absurdly_long_is_not_read(put, length):
    path = put(struct.pack("<Q", length))
    with path.open("r+b") as file:
        file.truncate(length + 8)  # sparse
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match=f"has a header of {length} bytes, at most"):
            open_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_three_hundred_thousand_names_are_refused_unread(put):
    entries = ",".join(f'"{n}":{{"dtype":"U8","shape":[],"data_offsets":[{n},{n + 1}]}}' for n in range(300_000))
    path = put(packed(f"{{{entries}}}".encode(), bytes(300_000)))
    tracemalloc.start()
    try:
        with pytest.raises(WeightsError, match="has a header of"):
            open_weights(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "shape", [[0, 2**70], [2**63, 0], [0, 2**62, 2**62], [0] * 100, [1] * 100], ids=lambda s: f"{s[:2]}x{len(s)}"
)
def test_a_shape_that_no_tensor_can_have_is_refused(shape, put):
    size = 4 * math.prod(shape)
    with pytest.raises(WeightsError, match="'a'"):
        check_content(open_weights(put(packed({"a": claim(shape, 0, size)}, bytes(size)))))


def test_an_error_about_an_absurd_shape_is_short(put):
    with pytest.raises(WeightsError, match="'a'") as caught:
        open_weights(put(packed({"a": claim([1] * 10_000, 0, 8)}, BODY[:8])))
    assert len(str(caught.value)) < 1000


def test_an_error_about_an_absurd_name_is_short(put):
    with pytest.raises(WeightsError, match="claims 8 bytes") as caught:
        open_weights(put(packed({"x" * 100_000: A | {"shape": [3]}}, BODY[:8])))
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("what", ["nothing", "folder", "link_to_nothing"])
def test_what_is_no_file_cannot_be_read(what, tmp_path):
    path = tmp_path / "x.safetensors"
    if what == "folder":
        path.mkdir()
    elif what == "link_to_nothing":
        path.symlink_to(tmp_path / "gone")
    with pytest.raises(WeightsError, match=re.escape(f"{path} cannot be read: ")):
        open_weights(path)


@pytest.mark.parametrize("flips", [1, 2, 8])
def test_a_header_with_flipped_bits_is_refused_or_still_tells_of_every_byte(flips, put):
    rng = random.Random(flips)
    changed = len(GOOD) - len(BODY)
    opened = 0
    for _ in range(1500):
        content = bytearray(GOOD)
        for _ in range(flips):
            content[rng.randrange(changed)] ^= 1 << rng.randrange(8)
        path = put(bytes(content))
        try:
            file = open_weights(path)
        except WeightsError:
            continue
        opened += 1
        slots = sorted(file.slots, key=lambda name: file.slots[name].start)
        assert b"".join(bits(file.tensor(name)).numpy().tobytes() for name in slots) == BODY
    assert opened < 1500


def test_what_is_accepted_after_random_damage_is_accepted_by_the_safetensors_library_too(put):
    rng = random.Random(9)
    accepted = 0
    for _ in range(3000):
        content = bytearray(GOOD)
        content[rng.randrange(8, len(GOOD) - len(BODY))] = rng.choice(b'0123456789abBFIU"{}[]:,- _')
        path = put(bytes(content))
        try:
            names = open_weights(path).slots.keys()
        except WeightsError:
            continue
        accepted += 1
        try:
            assert names == safetensors.torch.load(bytes(content)).keys(), bytes(content)
        except SafetensorError as error:
            pytest.fail(f"{bytes(content)!r}: {error}")
    assert accepted


# --- Trust -----------------------------------------------------------------------------------------------------


@pytest.fixture
def good(put):
    return put(GOOD)


def poisoned(dtype, value):
    return {"fine": torch.ones(3), "count": torch.arange(3), "bad": torch.tensor([0.0, value, 1.0], dtype=dtype)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_value_that_is_no_number_is_refused_every_time(dtype, value, tmp_path):
    write_weights(poisoned(dtype, value), tmp_path / "x.safetensors", {})
    for _ in range(2):  # the refusal is not remembered as trust
        with pytest.raises(WeightsError, match="tensor 'bad' holds NaN or Inf"):
            check_content(open_weights(tmp_path / "x.safetensors"))


def test_the_sha256_is_that_of_the_file(good):
    digest = hashlib.sha256(GOOD).hexdigest()
    assert check_content(open_weights(good)) == check_content(open_weights(good), digest) == digest


@pytest.mark.parametrize("sealed", [False, True])
def test_another_sha256_is_refused(good, sealed):
    if sealed:
        check_content(open_weights(good))
    with pytest.raises(WeightsError, match=f"has sha256 {hashlib.sha256(GOOD).hexdigest()}, expected {'0' * 64}"):
        check_content(open_weights(good), "0" * 64)


@pytest.fixture
def reading_fails(monkeypatch):
    def arm():
        monkeypatch.setattr(WeightsFile, "tensor", lambda *_: pytest.fail("the data was read again"))

    return arm


def test_a_second_look_reads_nothing(good, reading_fails):
    digest = check_content(open_weights(good))
    reading_fails()
    assert check_content(open_weights(good), digest) == digest


def test_seals_lie_in_the_hubs_home(good, tmp_path, monkeypatch):
    check_content(open_weights(good))
    assert len(list((tmp_path / "cache" / "gvsl-zoo" / "seals").iterdir())) == 1
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert seal_folder() == tmp_path / "xdg" / "huggingface" / "gvsl-zoo" / "seals"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert seal_folder() == tmp_path / ".cache" / "huggingface" / "gvsl-zoo" / "seals"


@pytest.mark.parametrize("change", ["time", "replaced", "size"])
def test_a_changed_file_is_read_again(good, change):
    digest = check_content(open_weights(good))
    stat = good.stat()
    other = GOOD[:-1] + b"\0" if change != "size" else packed({"a": A}, BODY[:8])
    if change == "replaced":  # same size and time, another inode
        (good.parent / "new").write_bytes(other)
        (good.parent / "new").replace(good)
        os.utime(good, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        good.write_bytes(other)
        os.utime(good, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert check_content(open_weights(good)) == hashlib.sha256(other).hexdigest()
    with pytest.raises(WeightsError, match=f"expected {digest}"):
        check_content(open_weights(good), digest)


@pytest.mark.parametrize(
    "other", [packed({"a": A}, BODY[:8]), packed({"a": A, "b": B, "c": claim([9], 12, 48)}, BODY * 4)]
)
def test_a_file_that_is_replaced_after_it_was_opened_stays_what_it_was(good, other):
    file = open_weights(good)
    (good.parent / "new").write_bytes(other)
    (good.parent / "new").replace(good)
    assert check_content(file) == hashlib.sha256(GOOD).hexdigest()
    assert bytes(bits(file.tensor("a"))) == BODY[:8] and bytes(file.data) == BODY and file.size == len(GOOD)
    assert check_content(open_weights(good)) == hashlib.sha256(other).hexdigest()


def test_a_name_that_is_no_unicode_is_a_name(good):
    path = Path(os.fsdecode(os.fsencode(good.parent) + b"/\xe9.safetensors"))
    try:
        good.rename(path)
    except OSError:
        pytest.skip("this file system has no such names")
    assert check_content(open_weights(path)) == check_content(open_weights(path)) == hashlib.sha256(GOOD).hexdigest()


def test_a_seal_is_of_one_path_only(good):
    digest = check_content(open_weights(good))
    [note] = seal_folder().iterdir()
    copy = good.with_name("copy.safetensors")
    copy.write_bytes(GOOD[:-1] + b"\0")
    assert check_content(open_weights(copy)) != digest
    for seal in seal_folder().iterdir():
        if seal != note:
            seal.write_bytes(note.read_bytes())  # a seal under another's name
    assert check_content(open_weights(copy)) != digest


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"7", b'{"path": 1}', b"\xff\xfe", b'{"sha256": "0"}', b"[" * 200_000],
    ids=lambda c: repr(c[:12]),
)
def test_a_damaged_seal_is_ignored_and_replaced(good, content, reading_fails):
    digest = check_content(open_weights(good))
    [seal] = seal_folder().iterdir()
    seal.write_bytes(content)
    assert check_content(open_weights(good), digest) == digest
    assert seal.read_bytes() != content
    reading_fails()
    assert check_content(open_weights(good)) == digest


def test_a_seal_that_is_a_folder_is_ignored(good):
    digest = check_content(open_weights(good))
    [seal] = seal_folder().iterdir()
    seal.unlink()
    (seal / "inside").mkdir(parents=True)
    assert check_content(open_weights(good)) == digest
    assert [p.name for p in seal_folder().iterdir()] == [seal.name]


def test_a_cache_that_cannot_be_written_is_no_obstacle(good, tmp_path, monkeypatch):
    (tmp_path / "plain_file").write_bytes(b"")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "plain_file"))
    assert check_content(open_weights(good)) == check_content(open_weights(good))


def test_a_full_disk_is_no_obstacle_to_loading(good, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(OSError(errno.ENOSPC, "No space left on device")))
    assert check_content(open_weights(good)) == hashlib.sha256(GOOD).hexdigest()
    assert list(seal_folder().iterdir()) == []


def test_without_a_home_the_file_is_read_each_time(good, monkeypatch):
    for name in ("HF_HOME", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", failing(KeyError("no such user")))
    assert check_content(open_weights(good)) == hashlib.sha256(GOOD).hexdigest()


# --- Into a module ---------------------------------------------------------------------------------------------


def small():
    return nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))


def mismatch(change):
    tensors = {name: torch.randn_like(tensor) for name, tensor in small().state_dict().items()}
    return tensors | change if isinstance(change, dict) else {n: t for n, t in tensors.items() if n != change}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ("0.bias", "0.bias is missing; "),
        ({"2.weight": torch.ones(1)}, "2.weight has no place; "),
        ({"1.weight": torch.ones(3)}, r"1.weight is \(3,\), not \(2,\); "),
        ({"0.weight": torch.ones(2, 3, 1)}, r"0.weight is \(2, 3, 1\), not \(2, 3\); "),
        ({"1.bias": torch.ones(2).int()}, "1.bias is torch.int32, not a floating-point tensor; "),
        ({"1.bias": torch.ones(2).bool()}, "1.bias is torch.bool, not a floating-point tensor; "),
    ],
    ids=["missing", "extra", "size", "axes", "integer", "boolean"],
)
def test_tensors_that_do_not_fit_leave_the_module_untouched(change, match, device):
    module = small().to(device)
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in module.named_parameters()}
    with pytest.raises(WeightsError, match=f"file.x does not fit Sequential: {match}"):
        assign(module, mismatch(change), "file.x")
    for name, parameter in module.named_parameters():
        same, pointer, values = before[name]
        assert parameter is same and parameter.data_ptr() == pointer
        assert parameter.is_meta if device == "meta" else torch.equal(parameter, values)


@pytest.mark.parametrize("count", [5, 6, 40])
def test_an_error_lists_five_names_and_counts_the_rest(count):
    extra = {f"extra{n:02}": torch.ones(1) for n in range(count)}
    with pytest.raises(WeightsError, match="extra00 has no place; extra01") as caught:
        assign(small(), mismatch(extra), "x")
    assert str(caught.value).count("has no place") == 5
    assert (f" and {count - 5} more" in str(caught.value)) == (count > 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_module_has_float32_parameters_that_learn_whatever_was_stored(dtype, device):
    module, tensors = small().to(device), {name: t.to(dtype) for name, t in small().state_dict().items()}
    assign(module, tensors, "x")
    for name, parameter in module.named_parameters():
        assert isinstance(parameter, nn.Parameter) and parameter.requires_grad and parameter.dtype == torch.float32
        assert torch.equal(parameter, tensors[name].float())


def test_a_number_beyond_float32_is_refused():
    module = nn.Linear(1, 1)
    before = module.weight.detach().clone()
    with pytest.raises(WeightsError, match="weight"):
        assign(module, {"weight": torch.tensor([[1e300]], dtype=torch.float64), "bias": torch.ones(1)}, "x")
    assert torch.equal(module.weight, before)


# --- Whole or not at all ---------------------------------------------------------------------------------------


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(("owner", "step"), [(os, "fsync"), (Path, "replace")], ids=["fsync", "rename"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(owner, step, error, existing, put, monkeypatch):
    path = put(GOOD)
    if not existing:
        path.unlink()
    monkeypatch.setattr(owner, step, failing(error))
    with pytest.raises(type(error), match=r"No space left|^$"):
        write_weights({"a": torch.ones(1000)}, path, {})
    assert [p.name for p in path.parent.iterdir()] == [path.name] * existing
    assert not existing or path.read_bytes() == GOOD


def test_a_write_replaces_the_old_file_under_the_feet_of_nobody(put):
    path = put(GOOD)
    old = open_weights(path)
    kept = old.tensor("a")
    write_weights({"a": torch.zeros(5)}, path, {})
    assert bytes(bits(kept).tolist()) == BODY[:8]
    assert torch.equal(open_weights(path).tensor("a"), torch.zeros(5))


def test_a_written_file_is_as_readable_for_others_as_any_new_file(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    weights.write_whole(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_same_tensors_and_metadata_give_the_same_bytes(tmp_path):
    tensors, metadata = {"b": torch.ones(3), "a": torch.zeros(2)}, {"format": "pt", "zoo": "ä", "x": "1", "y": "2"}
    contents = set()
    for index in range(12):
        write_weights(tensors, tmp_path / f"{index}.safetensors", metadata)
        contents.add((tmp_path / f"{index}.safetensors").read_bytes())
    assert len(contents) == 1
    assert dict(open_weights(tmp_path / "0.safetensors").metadata) == metadata


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    (tmp_path / ".x.safetensors.0a1b2c3d.partial").write_bytes(b"half")
    (tmp_path / ".other.safetensors.0a1b2c3d.partial").write_bytes(b"of another file")
    for path in tmp_path.iterdir():
        an_hour_ago(path)
    (tmp_path / ".x.safetensors.4e5f6a7b.partial").write_bytes(b"of a writer that is about to lock or rename it")
    write_weights({"a": torch.ones(3)}, tmp_path / "x.safetensors", {})
    kept = [".other.safetensors.0a1b2c3d.partial", ".x.safetensors.4e5f6a7b.partial", "x.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == kept


def an_hour_ago(path):
    os.utime(path, (time.time() - 3600,) * 2)


def test_a_header_that_would_not_be_read_again_is_not_written(tmp_path):
    with pytest.raises(WeightsError, match=r"a header of \d+ bytes, at most 4194304 are read again; shorten the entry"):
        write_weights({"a": torch.ones(3)}, tmp_path / "x.safetensors", {"entry": "x" * weights.MAX_HEADER_BYTES})
    assert not list(tmp_path.iterdir())


def test_a_write_leaves_that_of_a_living_process_alone(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    busy = tmp_path / ".x.safetensors.0a1b2c3d.partial"
    with busy.open("xb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        an_hour_ago(busy)
        write_weights({"a": torch.ones(3)}, tmp_path / "x.safetensors", {})
        assert busy.exists()
    write_weights({"a": torch.ones(3)}, tmp_path / "x.safetensors", {})
    assert not busy.exists()


def test_a_file_system_without_locks_takes_weights(tmp_path, monkeypatch):
    def missing(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")  # what Lustre says where it is mounted without flock

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", missing)
    write_weights({"a": torch.ones(3)}, tmp_path / "x.safetensors", {})
    assert torch.equal(open_weights(tmp_path / "x.safetensors").tensor("a"), torch.ones(3))


def test_writing_takes_no_second_copy_of_the_tensors(tmp_path):
    tracemalloc.start()
    write_weights({name: torch.ones(2**20) for name in "abcd"}, tmp_path / "x.safetensors", {})  # 16 MB in torch
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()
