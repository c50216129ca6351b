"""Tests of checkpoints: every layout loads, the recorded numbers survive, code and damage are refused unread."""

from __future__ import annotations

import inspect
import io
import itertools
import json
import math
import os
import pickle
import pickletools
import random
import re
import struct
import tarfile
import time
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from formula import DATA, assert_as_recorded, image, recorded, weight
from torch import nn

from gvsl_zoo import checkpoint, registry
from gvsl_zoo.conversion import WRAPPERS, convert, deformer_shapes, xmorpher_shapes
from gvsl_zoo.errors import RegistryError, SourceError, WeightsError
from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.unet import UNet
from gvsl_zoo.registry import model_info
from gvsl_zoo.weights import METADATA_KEY, open_weights
from gvsl_zoo.zoo import load

NANO = "gvsl-unet-ct-nano"  # width 8, 3D
GVSL_HEADS = ("affine", "deformable", "restoration")


@pytest.fixture(autouse=True)
def a_home_and_a_registry_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GVSL_ZOO_REGISTRY", raising=False)
    monkeypatch.setattr(registry, "_added", {})


@pytest.fixture
def put(tmp_path):
    """Write a checkpoint, bytes or what torch.save takes, into a folder that has no other file."""

    def put(content, name="x.pth") -> Path:
        path = tmp_path / "files" / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        return path

    return put


@pytest.fixture
def dst(tmp_path):
    return tmp_path / "new.safetensors"


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def tensors_of(path):
    file = open_weights(path)
    return {name: file.tensor(name) for name in file.slots}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def small(ndim=3, heads=True):
    """A module of width 8 with drawn weights, always the same."""
    generator = torch.Generator().manual_seed(ndim)
    unet = UNet(ndim, 8, generator=generator)
    return GVSL(unet, generator=generator) if heads else unet


def listed(name):
    """Names and shapes of a released file."""
    return {key: tuple(shape) for key, shape in json.loads((DATA / f"{name}_state_dict.json").read_text()).items()}


# --- Every layout ----------------------------------------------------------------------------------------------

PARTS = {
    "whole": lambda name: True,
    "unet": lambda name: name.startswith("unet."),
    "restoration": lambda name: name.startswith(("unet.", "res_conv.")),
    "affine": lambda name: name.startswith(("unet.", "f_conv.", "fc_")),
}
CASES = list(
    itertools.product((2, 3), (*PARTS, "bare", "bare_whole"), ("", "module.", "_orig_mod.", "module._orig_mod."))
)


@pytest.mark.parametrize(
    ("ndim", "part", "prefix", "wrapper"),
    [(*case, wrapper) for case, wrapper in zip(CASES, itertools.cycle((None, *WRAPPERS)))],
)
def test_every_layout_loads_with_equal_tensors(ndim, part, prefix, wrapper, put, dst):
    whole = small(ndim)
    taken = PARTS.get(part, PARTS["unet" if part == "bare" else "whole"])
    expected = {name: tensor for name, tensor in whole.state_dict().items() if taken(name)}
    names = {name: prefix + (name.removeprefix("unet.") if "bare" in part else name) for name in expected}
    state = OrderedDict((theirs, expected[ours]) for ours, theirs in names.items())
    report = convert(put({wrapper: state, "epoch": 3} if wrapper else state), dst)
    heads = {"whole": GVSL_HEADS, "bare_whole": GVSL_HEADS, "restoration": ("restoration",), "affine": ("affine",)}
    assert report.heads == heads.get(part, ()) == load(dst).entry.heads
    stored = tensors_of(dst)
    assert same({name if report.heads else f"unet.{name}": tensor for name, tensor in stored.items()}, expected)
    assert same(load(dst).state_dict(), whole.unet.state_dict())
    if report.heads == GVSL_HEADS:
        assert same(load(dst, task="registration").state_dict(), whole.state_dict())
    assert (report.ndim, report.width, report.architecture, report.objective) == (ndim, 8, "unet", "gvsl")
    assert report.left_out == (("epoch",) if wrapper else ())
    assert report.parameters == sum(t.numel() for t in expected.values()) and report.tensors == len(expected)


def averaged(state):
    return {"n_averaged": torch.tensor(3)} | prefixed("module.", state)


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("wrapped", "layout", "left_out"),
    [
        (lambda state: {"state_dict": prefixed("model.", state), "epoch": 3}, ("state_dict", "model."), ("epoch",)),
        (lambda state: prefixed("net.backbone.", state), ("net.", "backbone."), ()),
        (lambda state: prefixed("_fsdp_wrapped_module.", state), ("_fsdp_wrapped_module.",), ()),
        (lambda state: {"ema": state, "epoch": 3}, ("ema",), ("epoch",)),
        (averaged, ("module.",), ("n_averaged",)),
        (lambda state: {"model": state, "ema": averaged(state)}, ("model",), ("ema",)),
    ],
    ids=["lightning", "two", "fsdp", "ema", "averaged", "both"],
)
@pytest.mark.parametrize("heads", [False, True], ids=["unet", "whole"])
def test_what_wraps_a_model_is_taken_off_and_told(wrapped, layout, left_out, heads, put, dst):
    model = small(heads=heads)
    report = convert(put(wrapped(model.state_dict())), dst)
    assert (report.layout, report.left_out) == (layout, left_out)
    assert same(load(dst, task="pretraining" if heads else "backbone").state_dict(), model.state_dict())


@pytest.mark.parametrize("heads", [False, True], ids=["unet", "whole"])
def test_matching_heads_that_may_answer_in_another_geometry_are_warned_of(heads, put, dst, recwarn):
    convert(put(small(heads=heads).state_dict()), dst)
    told = ["matching heads that the released code trained" in str(one.message) for one in recwarn]
    assert told == [True] * heads


def test_a_training_loops_file_gives_its_model_and_says_what_it_left(put, dst):
    model = small(heads=False)
    optimiser = torch.optim.Adam(model.parameters())
    sum(p.sum() for p in model.parameters()).backward()
    optimiser.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimiser, 1)
    beside = {"optimizer": optimiser.state_dict(), "lr_scheduler": scheduler.state_dict(), "epoch": torch.tensor(7)}
    beside |= {
        "size": torch.Size([1, 2]),
        "device": torch.device("cuda:0"),
        "dtype": torch.float16,
        3: None,
        "loss": 0.5,
    }
    report = convert(put(beside | {"model": nn.DataParallel(model).state_dict()}), dst)
    assert same(load(dst).state_dict(), model.state_dict())
    assert report.left_out == (*map(str, beside),) and report.layout == ("model", "module.")
    assert "left out: optimizer, lr_scheduler, epoch, size, device and 3 more" in str(report)


@pytest.mark.parametrize("how", ["compiled part", "parameters", "tied", "turned", "slices"])
def test_tensors_of_every_make_come_over(how, put, dst):
    model = small(heads=False)
    state = dict(model.state_dict())
    if how == "compiled part":
        state = {name.replace("double_conv.", "_orig_mod.double_conv."): tensor for name, tensor in state.items()}
    elif how == "parameters":
        state = dict(model.named_parameters())
    elif how == "tied":
        model.inc.double_conv[4].weight = model.inc.double_conv[1].weight
        state = model.state_dict()
    elif how == "turned":
        state = {name: t.mT.contiguous().mT if t.ndim > 1 else t for name, t in state.items()}
    elif how == "slices":
        state = {name: torch.stack([t, t])[1] for name, t in state.items()}
    convert(put(state), dst)
    assert same(load(dst).state_dict(), model.state_dict())


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [(t, t) for t in (torch.float32, torch.float16, torch.bfloat16)] + [(torch.float64, torch.float32)],
    ids=str,
)
def test_half_precision_stays_and_double_becomes_single(dtype, stored, put, dst):
    model = small(heads=False).to(dtype)
    convert(put(model.state_dict()), dst)
    assert {t.dtype for t in tensors_of(dst).values()} == {stored}
    assert same(load(dst).state_dict(), model.float().state_dict())


@pytest.mark.parametrize("ndim", [2, 3])
def test_other_channels_and_another_affine_width_are_found(ndim, put, dst):
    model = GVSL(UNet(ndim, 16, 2), affine_width=24)
    report = convert(put(model.state_dict()), dst)
    assert load(dst).entry.config == {"ndim": ndim, "width": 16, "in_chans": 2, "affine_width": 24}
    assert report.width == 16 and same(load(dst, task="pretraining").state_dict(), model.state_dict())


def test_the_same_file_gives_the_same_bytes(put, tmp_path):
    path = put(small().state_dict())
    reports = [convert(path, tmp_path / f"{i}.safetensors") for i in range(3)]
    assert len({report.sha256 for report in reports}) == 1


def test_the_report_is_json_and_one_paragraph(put, dst):
    path = put({"net": small().state_dict()})
    report = convert(path, dst)
    data = json.loads(json.dumps(report.to_dict()))
    assert data["heads"] == list(GVSL_HEADS) and data["layout"] == ["net"] and data["width"] == 8
    assert (data["source"], data["destination"]) == (str(path), str(dst))
    assert re.fullmatch("[0-9a-f]{64}", data["source_sha256"]) and data["sha256"] == load(dst).load_report.sha256
    assert "\n" not in str(report) and "104 tensors, 2,034,915 parameters" in str(report)


@pytest.mark.parametrize(
    "stem", ["GEMINI_SS_MIP_3d_epoch_1000", "con", "aux", "Größe", "--", "a\u202eb\nc http x", "ü"]
)
def test_a_file_of_any_name_loads(stem, put, dst):
    convert(put(small(2, heads=False).state_dict(), f"{stem}.pth"), dst)
    entry = load(dst).entry
    assert re.fullmatch("[a-z0-9-]{4,}", entry.name) and "Research only, not a medical device" in entry.limits
    assert {entry.licence.code, entry.licence.weights, entry.licence.data, entry.citation} == {"not stated"}
    assert entry.input.axes == "yx" and entry.input.intensity.window == (None, None)


# --- The released files ------------------------------------------------------------------------------------------


def formula_state(name):
    return {key: weight(key, shape) for key, shape in listed(name).items()}


@pytest.mark.parametrize(("name", "ndim"), [("gemini2d", 2), ("gemini3d", 3)])
def test_the_deformers_table_is_the_released_one(name, ndim):
    released = {key: shape for key, shape in listed(name).items() if key.startswith("deformer.")}
    assert deformer_shapes(ndim, 32) == released and len(released) == 22


def test_xmorphers_table_is_the_released_one():
    assert xmorpher_shapes() == listed("xmorpher") and len(xmorpher_shapes()) == 378


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "gvsl-unet-ct"])
@pytest.mark.parametrize("heads", [False, True])
def test_the_released_gvsl_gives_the_recorded_numbers(name, heads, released, put, dst):
    path = put({"state_dict": (released if heads else released.unet).state_dict()})
    report = convert(path, dst, name=name)
    assert report.heads == GVSL_HEADS * heads and report.parameters == (32_440_739 if heads else 23_538_144)
    golden = recorded("official_unet_gvsl.npz", "cube32/")
    backbone = load(dst)
    with torch.no_grad():
        bottleneck, local = backbone.forward_features(image("cube32/A", (32, 32, 32)))
    assert_as_recorded(bottleneck, golden, "f_g", "cube32f_g")
    assert_as_recorded(local, golden, "f_l", "cube32f_l")
    if heads:
        assert same(load(dst, task="registration").state_dict(), released.state_dict())
    expected = model_info("gvsl-unet-ct").citation if name else "not stated"
    assert backbone.cite() == expected and backbone.entry.config == {"ndim": 3, "width": 32}
    path.unlink()
    dst.unlink()


@pytest.mark.parametrize(
    ("file", "name", "cases"),
    [("gemini2d", "gemini-unet-xray", ("g2square", "g2odd")), ("gemini3d", "gemini-unet-brain", ("g3cube", "g3odd"))],
)
@pytest.mark.parametrize("named", [False, True])
def test_the_released_gemini_gives_the_recorded_features(file, name, cases, named, put, dst):
    report = convert(put(formula_state(file)), dst, name=name if named else None)
    assert (report.objective, report.heads) == ("gemini", ("deformer", "restoration"))
    assert report.parameters == model_info(name).parameters
    assert tensors_of(dst).keys() == listed(file).keys()
    backbone = load(dst)
    assert backbone.entry.name == (name if named else "unet-x")
    for case in cases:
        golden = recorded("official_gemini.npz", f"{case}/")
        with torch.no_grad():
            local = backbone(image(f"{case}/A", tuple(golden["shape"])))
        assert_as_recorded(local, golden, "f", f"{case}f")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_released_xmorpher_comes_over(prefix, put, dst):
    state = {name: torch.full(shape, 0.5) for name, shape in listed("xmorpher").items()}
    report = convert(put({prefix + name: tensor for name, tensor in state.items()}), dst)
    assert same(tensors_of(dst), state)
    assert (report.architecture, report.ndim, report.width) == ("xmorpher", 3, None)
    assert (report.objective, report.heads, report.tensors) == ("registration", (), 378)
    assert report.parameters == 15_093_891
    entry = json.loads(open_weights(dst).metadata[METADATA_KEY])
    assert entry["config"] == {"ndim": 3, "window": 2} and entry["architecture"] == "xmorpher"


# --- A name of the registry ------------------------------------------------------------------------------------


def test_a_named_file_carries_the_registrys_entry_with_what_was_found(put, dst):
    report = convert(put(small(heads=False).state_dict()), dst, name=NANO)
    entry = load(dst).entry
    assert entry.heads == report.heads == () and entry.parameters == report.parameters == 1_472_952
    assert entry.config == {"ndim": 3, "width": 8} and entry.name == NANO
    assert (entry.citation, entry.input, entry.licence) == tuple(
        getattr(model_info(NANO), field) for field in ("citation", "input", "licence")
    )
    convert(put(small().state_dict()), dst, name=NANO, overwrite=True)
    assert load(dst, task="pretraining").entry.heads == GVSL_HEADS


@pytest.mark.parametrize(
    ("state", "name", "match"),
    [
        (lambda: small(2).state_dict(), NANO, f"x.pth has ndim 2, {NANO} has 3; convert it without a name"),
        (lambda: UNet(3, 16).state_dict(), NANO, f"has width 16, {NANO} has 8"),
        (lambda: small(2).state_dict(), "gemini-unet-xray", "has width 8, gemini-unet-xray has 32"),
        (lambda: gemini(), NANO, f"has objective gemini and heads deformer, {NANO} has objective gvsl"),
        (lambda: small(2).state_dict(), "gvsl-unet-xray", "cannot be gvsl-unet-xray, of which no weights exist"),
        (lambda: xmorpher(), "gvsl-unet-ct", "has architecture xmorpher, gvsl-unet-ct has unet"),
        (lambda: xmorpher(), "gvsl-xmorpher-ct", "cannot be gvsl-xmorpher-ct"),
    ],
    ids=["ndim", "width", "width32", "objective", "planned", "architecture", "xmorpher"],
)
def test_another_model_than_the_named_one_is_refused(state, name, match, put, dst):
    with pytest.raises(WeightsError, match=match):
        convert(put(state()), dst, name=name)
    assert not dst.exists()


def gemini(ndim=3):
    return small(ndim, heads=False).state_dict() | {n: torch.zeros(s) for n, s in deformer_shapes(ndim, 8).items()}


def xmorpher():
    return {name: torch.zeros(shape) for name, shape in xmorpher_shapes().items()}


def test_an_unknown_name_is_refused_before_anything_is_read(dst):
    with pytest.raises(RegistryError, match="unknown model 'gvsl-unet-cat'; did you mean 'gvsl-unet-ct'"):
        convert("nothing.pth", dst, name="gvsl-unet-cat")


# --- Names, shapes and values that are not a model's -----------------------------------------------------------


def changed(drop=(), heads=True, **changes):
    state = small(2, heads).state_dict()
    state = {name: tensor for name, tensor in state.items() if not name.startswith(tuple(drop) or ("no",))}
    return state | {name.replace("__", "."): tensor for name, tensor in changes.items()}


def value(number, dtype=torch.float32):
    return torch.tensor([0.0, number], dtype=dtype)


MISFITS = {
    "head with a hole": (
        lambda: changed(["fc_rot.bias"]),
        "is not a whole unet: fc_rot.bias is missing; only the U-Net",
    ),
    "half a head": (lambda: changed(["f_conv", "fc_s"]), "f_conv.* is missing, .* and 7 more"),
    "decoder missing": (lambda: changed(["unet.up"]), "unet.up1.* is missing, .* and 27 more"),
    "one tensor missing": (
        lambda: changed(["unet.down3.maxpool_conv.1.double_conv.0.bias"]),
        "double_conv.0.bias is missing",
    ),
    "extra": (lambda: changed(decoder__weight=torch.ones(1)), "is not a whole unet: decoder.weight has no place"),
    "batch norm": (lambda: changed(unet__inc__num_batches_tracked=torch.tensor(3)), "num_batches_tracked has no place"),
    "shape": (lambda: changed(fc_rot__bias=torch.ones(2)), r"fc_rot.bias is \(2,\), not \(1,\)"),
    "turned shape": (lambda: changed(fc_rot__weight=torch.ones(64, 1)), r"fc_rot.weight is \(64, 1\), not \(1, 64\)"),
    "affine width": (
        lambda: changed(f_conv__double_conv__0__weight=torch.ones(7, 256, 3, 3)),
        r"is \(7, 256, 3, 3\), not",
    ),
    "affine scalar": (lambda: changed(f_conv__double_conv__0__weight=torch.tensor(1.0)), r"is \(\), not"),
    "no U-Net": (lambda: changed(["unet.inc"]), "holds no U-Net: inc.double_conv.0.weight is missing"),
    "odd width": (lambda: {"inc.double_conv.0.weight": torch.ones(12, 1, 3, 3)}, r"no U-Net: .* is \(12, 1, 3, 3\)"),
    "1D": (lambda: {"inc.double_conv.0.weight": torch.ones(8, 1, 3)}, r"no U-Net: .* is \(8, 1, 3\)"),
    "too wide": (lambda: {"inc.double_conv.0.weight": torch.ones(1032, 1, 3, 3)}, "no U-Net"),
    "no channels": (lambda: {"inc.double_conv.0.weight": torch.ones(8, 0, 3, 3)}, "no U-Net"),
    "endless head": (
        lambda: changed(f_conv__double_conv__0__weight=torch.ones(2**40, 0)),
        "cannot be read: RuntimeError: Storage size",
    ),
    "twice": (lambda: changed() | {"module.fc_rot.bias": torch.ones(1)}, "holds fc_rot.bias twice"),
    "twice by prefix": (lambda: changed(heads=False) | changed(), "holds unet.inc.double_conv.0.weight twice"),
    "deformer with a hole": (
        lambda: {k: v for k, v in gemini(2).items() if "Conv3" not in k},
        "deformer.0.Conv3.* missing",
    ),
    "xmorpher with a hole": (
        lambda: xmorpher() | {"out_conv.bias": torch.ones(2)},
        r"not a whole xmorpher: out_conv.bias is",
    ),
    "resnet": (lambda: {"layer1.0.conv1.weight": torch.ones(2)}, "holds no U-Net"),
    "no tensors": (lambda: {"epoch": 3}, "holds no state dict, neither on its own nor under a key"),
    "list": (lambda: [torch.ones(2)], "holds no state dict"),
    "tensor": (lambda: torch.ones(2), "holds no state dict"),
    "number": (lambda: 3, "holds no state dict"),
    "nothing": (dict, "holds no state dict"),
    "two unknown wrappers": (lambda: {"ema": changed(), "x": changed()}, "holds several state dicts: ema, x; save the"),
    "wrapped twice": (lambda: {"model": {"state_dict": changed()}}, "holds no state dict"),
    "two models": (lambda: {"model": changed(), "net": changed()}, "holds several state dicts: model, net"),
    "int": (lambda: changed(fc_rot__bias=torch.ones(1).int()), "fc_rot.bias is torch.int32, not a floating-point"),
    "bool": (lambda: changed(fc_rot__bias=torch.ones(1).bool()), "fc_rot.bias is torch.bool, not a floating-point"),
    "complex": (
        lambda: changed(fc_rot__bias=torch.ones(1) + 0j),
        "fc_rot.bias is torch.complex64, not a floating-point",
    ),
    "conjugate": (
        lambda: changed(fc_rot__bias=(torch.ones(1) + 1j).conj()),
        "a call of torch._utils._rebuild_tensor_v2",
    ),
    "sparse": (lambda: changed(fc_rot__bias=torch.ones(1).to_sparse()), "no state dict needs: torch"),
    "quantised": (
        lambda: changed(fc_rot__bias=torch.quantize_per_tensor(torch.ones(1), 0.1, 0, torch.qint8)),
        "no state dict needs: torch",
    ),
    "float8": (lambda: changed(fc_rot__bias=torch.ones(1).to(torch.float8_e5m2)), "no state dict needs: torch"),
    "meta": (lambda: changed(fc_rot__bias=torch.ones(1, device="meta")), "_rebuild_meta_tensor_no_storage"),
    "stride 0": (lambda: changed(fc_scl__bias=torch.ones(1).expand(2)), r"has a tensor of shape \(2,\), stride \(0,\)"),
    "whole module": (lambda: small(2), "holds code or objects that no state dict needs: gvsl_zoo.models.gvsl.GVSL"),
}
VALUES = {
    "nan": value(math.nan),
    "inf": value(math.inf),
    "minus_inf_half": value(-math.inf, torch.float16),
    "nan_bf16": value(math.nan, torch.bfloat16),
    "beyond_float32": value(1e300, torch.float64),
}


@pytest.fixture
def never_mapped(monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file was opened by torch.load"))


def assert_refused(path, dst, match):
    """Refused in two seconds without memory, and nothing is left behind."""
    before = sorted(path.parent.parent.rglob("*"))
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(WeightsError, match=match) as caught:
            convert(path, dst)
        assert time.process_time() - started < 2
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()
    assert str(path) in str(caught.value) and caught.value.remedy
    assert len(str(caught.value)) < 1500
    assert sorted(path.parent.parent.rglob("*")) == before


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("name", MISFITS)
def test_what_is_not_wholly_a_model_is_refused_unopened(name, put, dst, never_mapped):
    state, match = MISFITS[name]
    assert_refused(put(state()), dst, match)


@pytest.mark.parametrize("name", VALUES)
def test_values_that_are_no_numbers_are_refused_by_name(name, put, dst):
    assert_refused(
        put(changed(fc_scl__bias=VALUES[name])), dst, "has a tensor fc_scl.bias with NaN, Inf or numbers beyond"
    )


# --- Code and damage -------------------------------------------------------------------------------------------


def code(o):
    """Opcodes that push a value, without a memo; bytes are opcodes already."""
    if isinstance(o, bytes):
        return o
    if isinstance(o, tuple):
        return b"(" + b"".join(map(code, o)) + b"t"
    if isinstance(o, list):
        return b"](" + b"".join(map(code, o)) + b"e"
    if isinstance(o, dict):
        return b"}(" + b"".join(code(part) for item in o.items() for part in item) + b"u"
    return pickletools.optimize(pickle.dumps(o, 2))[2:-1]


def named(name):
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def call(function, *args):
    return (named(function) if isinstance(function, str) else function) + code(args) + b"R"


def packed(members, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


STORAGE = {"99": struct.pack("<4f", 1, 2, 3, 4)}


def pth(content, data=None, extra=()):
    """A checkpoint of these opcodes and storages."""
    storages = STORAGE if data is None else data
    members = [("x/data.pkl", b"\x80\x02" + code(content) + b"."), ("x/version", b"3\n"), ("x/byteorder", b"little")]
    return packed([*members, *((f"x/data/{key}", value) for key, value in storages.items()), *extra])


ORDERED = call("collections.OrderedDict")


def tensor(shape=(4,), stride=(1,), offset=0, count=4, key="99", kind="torch.FloatStorage", hooks=ORDERED, more=()):
    storage = code(("storage", named(kind), key, "cpu", count)) + b"Q"
    return call("torch._utils._rebuild_tensor_v2", storage, offset, shape, stride, False, hooks, *more)


def good():
    """A checkpoint that converts, by torch.save."""
    buffer = io.BytesIO()
    torch.save(changed(heads=False), buffer)
    return buffer.getvalue()


def members_of(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def repacked(change=lambda name, content: content, extra=(), rename=str):
    return packed([*((rename(name), change(name, content)) for name, content in members_of(good())), *extra])


def beside(payload):
    """A good state dict with a payload as the optimiser's state."""
    members = dict(members_of(good()))
    state = members["archive/data.pkl"][2:-1]
    members["archive/data.pkl"] = b"\x80\x02" + code({"state_dict": state, "optimizer": payload}) + b"."
    return packed([*members.items(), *((f"archive/data/{key}", value) for key, value in STORAGE.items())])


class Live:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def flipped(content, old, new, which=0):
    """The content with `old` replaced where it stands for the which-th time, counted from the end if negative."""
    places = [match.start() for match in re.finditer(re.escape(old), content)]
    place = places[which]
    return content[:place] + new + content[place + len(old) :]


FUNCTIONS = re.findall(
    r"\S+",
    """
    posix.system os.system os.popen nt.system __builtin__.eval builtins.eval builtins.exec builtins.compile
    builtins.__import__ builtins.getattr builtins.open builtins.globals subprocess.Popen subprocess.check_output
    commands.getoutput pty.spawn ctypes.CDLL socket.socket runpy.run_path runpy._run_code webbrowser.open
    importlib.import_module code.InteractiveInterpreter timeit.timeit cProfile.run pdb.run bdb.Bdb trace.Trace
    doctest.debug_script pip.main idlelib.pyshell.ModifiedInterpreter lib2to3.pgen2.grammar.Grammar.loads
    shutil.rmtree operator.attrgetter functools.partial types.FunctionType logging.config.listen _pickle.loads
    pickle.loads marshal.loads torch.load torch.serialization.load torch.hub.load torch.jit.load
    torch.jit.unsupported_tensor_ops.execWrapper torch.utils.bottleneck.__main__.run_cprofile
    torch.utils.collect_env.run torch._dynamo.guards.GuardBuilder.get
    torch.utils.data.datapipes.utils.decoder.basichandlers torch.fx.experimental.symbolic_shapes.ShapeEnv
    torch.distributed.rpc.internal._run_function torch.storage.UntypedStorage torch.Tensor torch.FloatTensor
    torch._utils._rebuild_tensor_v3 torch._utils._rebuild_wrapper_subclass torch._tensor._rebuild_from_type_v2
    numpy.testing._private.utils.runstring numpy._core.multiarray.scalar numpy.core.multiarray._reconstruct
    collections.Counter collections.OrderedDict.fromkeys copyreg._reconstructor _codecs.encode builtins.bytearray
    torch.nn.modules.linear.Linear builtins.set torch._utils torch.FloatStorage.from_file
    """,
)


@pytest.mark.parametrize("where", ["alone", "beside"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_call_of_any_function_is_refused_by_its_name(function, where, put, dst, tmp_path, never_mapped):
    payload = call(function, f"touch {tmp_path / 'files' / 'canary'}")
    content = pth(payload) if where == "alone" else beside(payload)
    assert_refused(put(content), dst, re.escape(f"holds code or objects that no state dict needs: {function}; where"))


LIVE = {
    "os.system": lambda canary: Live(os.system, f"touch {canary}"),
    "eval": lambda canary: Live(eval, f"open({canary!r}, 'w')"),
    "exec": lambda canary: Live(exec, f"open({canary!r}, 'w')"),
    "open": lambda canary: Live(open, canary, "w"),
}
HOLDERS = {
    "alone": lambda o: o,
    "dict": lambda o: {"state_dict": {"a": o}},
    "list": lambda o: [[o]],
    "tuple": lambda o: (o, 1),
    "ordered": lambda o: OrderedDict(a=o),
    "key": lambda o: {(1, o): 1},
    "argument": lambda o: Live(OrderedDict, o),
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("name", LIVE)
def test_live_code_of_every_protocol_is_refused_and_does_not_run(
    name, holder, protocol, put, dst, tmp_path, never_mapped
):
    canary = tmp_path / "canary"
    payload = pickle.dumps(HOLDERS[holder](LIVE[name](str(canary))), protocol)
    assert_refused(put(packed([("x/data.pkl", payload)])), dst, "holds code or objects|is pickled with protocol [45]")
    assert not canary.exists()
    if holder == "list":  # the payload is live: Python's own pickle runs it
        pickle.loads(payload)
        assert canary.exists()


deep = b")" + b"q\x00h\x00\x86" * 60  # a tuple of 2**60 leaves, 300 bytes long
SYSTEM = b"\x8c\x05posix\x8c\x06system"
HOSTILE = {
    "inst": (b"(X\x04\0\0\0trueiposix\nsystem\n", "needs: posix.system"),
    "inst of an allowed name": (b"(icollections\nOrderedDict\n", "needs: collections.OrderedDict"),
    "obj": (b"(" + named("posix.system") + b"X\x04\0\0\0trueo", "needs: posix.system"),
    "obj of an allowed name": (b"(" + named("collections.OrderedDict") + b"o", "needs: OBJ"),
    "ext1": (b"\x82\x01)R", "needs: EXT1"),
    "ext2": (b"\x83\x01\x01)R", "needs: EXT2"),
    "ext4": (b"\x84\x01\x01\x01\x01)R", "needs: EXT4"),
    "stack global": (SYSTEM + b"\x93X\x04\0\0\0true\x85R", "needs: SHORT_BINUNICODE"),
    "stack global of long text": (code("posix") + code("system") + b"\x93", r"needs: STACK_GLOBAL posix\.system"),
    "stack global by memo": (code("system") + b"q\x01" + code("posix") + b"h\x01\x93", "needs: STACK_GLOBAL"),
    "stack global of a call": (ORDERED + code("system") + b"\x93", "needs: STACK_GLOBAL"),
    "newobj": (named("collections.OrderedDict") + b")\x81", "needs: NEWOBJ"),
    "newobj of a tensor": (named("torch.Tensor") + code((2**40,)) + b"\x81", "needs: torch.Tensor"),
    "newobj_ex": (named("collections.OrderedDict") + b")}\x92", "needs: NEWOBJ_EX"),
    "escaped name": (b"ccollections\nOrdered\\x44ict.__init__\n)R", "needs: collections.OrderedDict.__init__"),
    "name with a space": (b"cposix system\nx\n)R", "needs: posix.system x"),
    "name over a module's end": (b"ctorch._utils._rebuild_tensor_v2\n__globals__\n", "needs: torch._utils._rebuild"),
    "memoised function": (named("posix.system") + b"q\x05h\x05" + code(("true",)) + b"R", "needs: posix.system"),
    "call of a result": (ORDERED + b")R", "needs: a call"),
    "call of a text": (code("eval") + b")R", "needs: a call"),
    "call of a dtype": (named("torch.float32") + b")R", "needs: a call of torch.float32"),
    "call of a storage": (named("torch.FloatStorage") + code((2**40,)) + b"R", "needs: a call of torch.FloatStorage"),
    "dict of a dict": (call("collections.OrderedDict", {"a": 1}), "needs: a call of collections.OrderedDict"),
    "size of a deep tuple": (call("torch.Size", deep), "needs: a call of torch.Size"),
    "long size": (call("torch.Size", (1,) * 9), "needs: a call of torch.Size"),
    "device of a deep tuple": (call("torch.device", deep), "needs: a call of torch.device"),
    "parameter of no tensor": (
        call("torch._utils._rebuild_parameter", 3, True, ORDERED),
        "needs: a call of torch._utils",
    ),
    "deep tuple as key": (b"}" + deep + b"Ns", "a dict with a tuple as key"),
    "tensor as key": (b"}" + tensor() + b"Ns", "a dict with a Claim as key"),
    "call of a deep tuple": (deep + b")R", "needs: a call"),
    "state of an ordered dict": (ORDERED + code({"items": 3}) + b"b", "an object with a state of its own"),
    "state of a tensor": (tensor() + code({"_metadata": 3}) + b"b", "an object with a state of its own"),
    "state of a function": (named("collections.OrderedDict") + code({"x": 3}) + b"b", "an object with a state"),
    "items for a tensor": (tensor() + code("a") + b"Ns", "items for a Claim"),
    "items for a function": (named("collections.OrderedDict") + code("a") + b"Ns", "items for a _Global"),
    "append to a tuple": (b"))a", "items for a tuple"),
    "text id": (b"P../../etc/passwd\n", "needs: PERSID"),
    "id of text": (code("storage") + b"Q", "refers to bytes outside the file"),
    "id of something else": (
        code(("module", named("torch.FloatStorage"), "0", "cpu", 4)) + b"Q",
        "refers to bytes outside",
    ),
    "id of a dtype": (code(("storage", named("torch.float32"), "0", "cpu", 4)) + b"Q", "refers to bytes outside"),
    "id of code": (code(("storage", named("posix.system"), "0", "cpu", 4)) + b"Q", "needs: posix.system"),
    "dup": (b"}2", "needs: DUP"),
    "pop": (b"}N0", "needs: POP"),
    "long4": (b"\x8b\x04\0\0\0\1\1\1\1", "needs: LONG4"),
}
DAMAGED = {
    "decimal": (b"I" + b"9" * 5000 + b"\n", "cannot be read"),
    "huge memo": (b"}r\xff\xff\xff\xff", "holds no state dict"),
    "absent memo": (b"h\x07", "cannot be read"),
    "text past the end": (b"X\xff\xff\xff\xffa", "cannot be read"),
    "no text": (b"X\x02\0\0\0\xff\xfe", "cannot be read"),
    "mark missing": (b"t", "cannot be read"),
    "odd items": (b"}(" + code("a") + b"u", "cannot be read"),
    "empty stack": (b"", "cannot be read"),
    "unknown opcode": (b"\xff", "cannot be read"),
    "too many operations": (b"N" * 250_000, "more than 200000 operations"),
    "a text of megabytes as function": (b"cposix\n" + b"x" * 7_000_000 + b"\n", "needs: posix.xxx"),
    "a text of megabytes as key": (code({"k" * 7_000_000: tensor()}), "holds no U-Net"),
    "list that holds itself": (b"]q\x00h\x00a", "holds no state dict"),
    "dict that holds itself": (b"}q\x00" + code("model") + b"h\x00s", "holds no state dict"),
    "nested deeply": (b"(" * 90_000 + b"t" * 90_000, "holds no state dict"),
}
CLAIMS = {
    "hooks": (tensor(hooks=code({"a": 1})), "needs: a call of torch._utils._rebuild_tensor_v2"),
    "metadata": (tensor(more=({"conj": True},)), "needs: a call of torch._utils._rebuild_tensor_v2"),
    "2**40 by stride 0": (
        tensor((2**40,), (0,)),
        r"shape \(1099511627776,\), stride \(0,\) .* in a storage of 4 numbers",
    ),
    "4 by stride 0": (tensor((4,), (0,)), r"stride \(0,\)"),
    "more than the storage": (tensor((5,)), r"shape \(5,\).* in a storage of 4 numbers"),
    "overlapping": (tensor((3, 3), (1, 1), count=4), r"shape \(3, 3\)"),
    "offset past the end": (tensor(offset=1), "offset 1 in a storage of 4"),
    "offset of 2**62": (tensor(offset=2**62), "offset 4611686018427387904 in"),
    "offset of 2**70": (tensor((0,), offset=2**70), "offset 1180591620717411303424 in"),
    "negative offset": (tensor((1,), offset=-1), "offset -1 in"),
    "negative stride": (tensor((2,), (-1,), 3), r"stride \(-1,\)"),
    "huge stride": (tensor((2,), (2**62,)), r"stride \(4611686018427387904,\)"),
    "negative shape": (tensor((-2, -2), (1, 1)), r"shape \(-2, -2\)"),
    "shape that wraps": (tensor((2**32, 2**32), (1, 1)), r"shape \(4294967296, 4294967296\)"),
    "endless number": (tensor((2**2000,)), "in a storage of 4 numbers"),
    "nine axes": (tensor((1,) * 9, (1,) * 9), "needs: a call of torch._utils._rebuild_tensor_v2"),
    "more strides than axes": (tensor((4,), (1, 1)), "needs: a call of torch._utils._rebuild_tensor_v2"),
    "fractional shape": (tensor((1.5,)), "needs: a call of torch._utils._rebuild_tensor_v2"),
    "deep shape": (tensor((deep,)), "needs: a call of torch._utils._rebuild_tensor_v2"),
    "shape of text": (tensor("ab", "ab"), "needs: a call of torch._utils._rebuild_tensor_v2"),
    "storage larger than its bytes": (tensor(count=5), "claims 5 numbers of torch.float32 in a member of 16 bytes"),
    "storage of 2**40": (tensor(count=2**40), "claims 1099511627776 numbers"),
    "storage of 2**2000": (tensor(count=2**2000), "claims 1148130695"),
    "negative storage": (tensor(count=-4), "claims -4 numbers"),
    "storage of another dtype": (tensor(kind="torch.DoubleStorage"), "claims 4 numbers of torch.float64"),
    "storage that is not there": (tensor(key="7"), "in a member of -1 bytes"),
    "storage outside": (tensor(key="../data.pkl"), "in a member of -1 bytes"),
    "storage by number": (tensor(key=0), "refers to bytes outside"),
}


@pytest.mark.parametrize("holder", [pth, beside])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_pickle_that_does_what_no_state_dict_does_is_refused_unopened(name, holder, put, dst, never_mapped):
    opcodes, match = HOSTILE[name]
    assert_refused(put(holder(opcodes)), dst, match)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_pickle_that_makes_no_sense_is_refused_unopened(name, put, dst, never_mapped):
    opcodes, match = DAMAGED[name]
    assert_refused(put(pth(opcodes)), dst, match)


@pytest.mark.parametrize("name", CLAIMS)
def test_a_tensor_that_claims_more_than_its_bytes_is_refused_unopened(name, put, dst, never_mapped):
    opcodes, match = CLAIMS[name]
    assert_refused(put(pth({"inc.double_conv.0.weight": opcodes})), dst, match)


def cut(part):
    content = good()
    return content[: int(part * len(content))]


def legacy(tar):
    buffer = io.BytesIO()
    if tar:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("storages"))
    else:
        torch.save(changed(heads=False), buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def script():
    buffer = io.BytesIO()
    module = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    torch.jit.save(module, buffer)
    return buffer.getvalue()


def doubled():
    """data.pkl twice: the first good, the second hostile."""
    return pth({}, extra=[("x/data/999", b"\x80\x02" + call("posix.system", "true") + b".")]).replace(
        b"x/data/999", b"x/data.pkl"
    )


def overlapping():
    """Two entries of the directory for the same bytes."""
    content = pth({"a": tensor()}, {"0": b"\0" * 50_000, "1": b"\0" * 50_000})
    first, second = (content.rindex(b"PK\1\2", 0, content.rindex(f"x/data/{key}".encode())) for key in "01")
    return content[: second + 42] + content[first + 42 : first + 46] + content[second + 46 :]


def shortened_overlap():
    """An entry whose claimed size reaches over the members behind it."""
    content = pth({"a": tensor()}, {"0": b"\0" * 16, "1": b"\0" * 50_000})
    first = content.rindex(b"PK\1\2", 0, content.rindex(b"x/data/0"))
    return content[: first + 20] + struct.pack("<2I", 50_100, 50_100) + content[first + 28 :]


BOMB = b"\0" * (64 * 2**20)
ARCHIVES = {
    "empty": (lambda: b"", "is not a zip archive of torch.save: 0 bytes without a header; .* get it again"),
    "web page": (lambda: b"<!DOCTYPE html><html>Sign in</html>", "it looks like a web page"),
    "lfs pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "it is a Git LFS pointer"),
    "text": (lambda: b"weights", "7 bytes without a header"),
    "legacy pickle": (
        lambda: legacy(False),
        "it looks like a pickle, .*; where you trust the file, .* current torch.save",
    ),
    "legacy tar": (lambda: legacy(True), "it looks like a tar archive; where you trust the file"),
    "bare pickle": (lambda: pickle.dumps({"a": 1}), "it looks like a pickle"),
    "TorchScript": (script, "is a TorchScript archive, which holds code"),
    "safetensors": (lambda: b"\x40\0\0\0\0\0\0\0{}", "is a safetensors file already; load opens it as it is"),
    "signature alone": (lambda: b"PK\3\4", "is a zip archive cut short"),
    "cut in half": (lambda: cut(0.5), "is a zip archive cut short"),
    "cut at its directory": (lambda: cut(0.999), "is a zip archive cut short"),
    "without its last byte": (lambda: good()[:-1], "is a zip archive cut short"),
    "with a comment": (lambda: good()[:-2] + b"\x01\0x", "is a zip archive cut short"),
    "with bytes behind": (lambda: good() + b"x", "is a zip archive cut short"),
    "with bytes before": (lambda: b"MZ" + good(), "is not a zip archive of torch.save"),
    "without a directory": (lambda: b"PK\3\4" + good()[-22:], "cannot be read"),
    "empty archive": (lambda: b"PK\5\6" + b"\0" * 18, "is not a zip archive of torch.save"),
    "numpy archive": (lambda: packed([("a.npy", b"x")]), "has members that torch.save does not write: a.npy"),
    "another member": (lambda: repacked(extra=[("archive/run.py", b"")]), "does not write: archive/run.py"),
    "member above": (lambda: repacked(extra=[("../evil", b"")]), r"does not write: \.\./evil"),
    "member above in the folder": (
        lambda: repacked(extra=[("archive/../evil", b"")]),
        r"does not write: archive/\.\./evil",
    ),
    "absolute member": (lambda: repacked(extra=[("/etc/cron.d/x", b"")]), "does not write: /etc/cron.d/x"),
    "all members above": (lambda: repacked(rename=lambda n: n.replace("archive", "..")), "more than one folder"),
    "backslashes": (lambda: repacked(rename=lambda n: n.replace("archive/", "..\\a/")), "does not write"),
    "other capitals": (lambda: repacked(extra=[("archive/DATA.PKL", b"")]), "does not write: archive/DATA.PKL"),
    "control characters": (lambda: repacked(extra=[("archive/\x1b[31m", b"")]), r"does not write: archive/\\x1b\[31m"),
    "two folders": (lambda: repacked(extra=[("other/version", b"3")]), "members twice, more than one folder"),
    "no pickle": (lambda: packed([("x/version", b"3")]), "or no data.pkl"),
    "pickle twice": (doubled, "has members twice"),
    "compressed": (lambda: packed(members_of(good()), zipfile.ZIP_DEFLATED), "a compressed or encrypted member"),
    "zip bomb": (
        lambda: packed([("x/data.pkl", BOMB)], zipfile.ZIP_DEFLATED),
        "a compressed or encrypted member data.pkl",
    ),
    "bzip2 bomb": (lambda: packed([("x/data.pkl", BOMB)], zipfile.ZIP_BZIP2), "a compressed or encrypted member"),
    "encrypted": (
        lambda: flipped(pth({}), b"PK\1\2\x14\x03\x14\0\0\0", b"PK\1\2\x14\x03\x14\0\1\0"),
        "or encrypted member",
    ),
    "huge pickle": (
        lambda: packed([("x/data.pkl", b"N" * (9 * 2**20))]),
        "has data.pkl of 9437184 bytes, at most 8388608",
    ),
    "huge version": (
        lambda: packed([("x/data.pkl", b"."), ("x/version", b"3" * (9 * 2**20))]),
        "has version of 9437184 bytes",
    ),
    "overlapping members": (overlapping, "a damaged member x/data/1"),
    "sizes beyond the file": (shortened_overlap, "its members overlap"),
    "endless directory": (lambda: packed((f"x/data/{i}", b"") for i in range(80_000)), "is a zip archive cut short"),
    "big-endian": (lambda: repacked(lambda n, c: b"big" if n.endswith("byteorder") else c), "little-endian"),
    "damaged local header": (lambda: flipped(good(), b"PK\3\4", b"PK\3\5", -3), "a damaged member archive/data/"),
    "wrong checksum": (
        lambda: flipped(pth({"a": tensor()}), struct.pack("<f", 3), b"\0\0\0\0"),
        "a damaged member x/data/99",
    ),
}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", ARCHIVES)
def test_what_torch_save_never_wrote_is_refused_unopened(name, put, dst, never_mapped):
    content, match = ARCHIVES[name]
    assert_refused(put(content()), dst, match)


def test_the_checkpoints_of_the_corpus_convert_without_their_faults(put, dst):
    state = changed(heads=False)
    data = {str(i): t.numpy().tobytes() for i, t in enumerate(state.values())}
    items = {
        name: tensor(tuple(t.shape), t.stride(), count=t.numel(), key=str(i))
        for i, (name, t) in enumerate(state.items())
    }
    for content in (pth(items, data), beside(code({"state": {0: 1.5}})), repacked()):
        convert(put(content), dst, overwrite=True)
        assert same(tensors_of(dst), state)


def test_flipped_bits_are_refused_or_change_nothing(put, dst):
    state = {"a": torch.arange(4.0)}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    rng = random.Random(0)
    read = 0
    for _ in range(1500):
        content = bytearray(buffer.getvalue())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        with pytest.raises(WeightsError, match=r"x\.pth ") as caught:
            convert(put(bytes(content)), dst)
        read += "holds no U-Net" in str(caught.value)
    assert 0 < read < 1000 and not dst.exists()


def test_a_pickle_cut_anywhere_is_refused(put, dst):
    [(name, content), *others] = members_of(good())
    assert name == "archive/data.pkl"
    for length in range(0, len(content), 97):
        with pytest.raises(WeightsError, match=r"cannot be read|protocol"):
            convert(put(packed([(name, content[:length]), *others])), dst)


# --- torch.load ------------------------------------------------------------------------------------------------


def test_torch_opens_files_as_weights_only_and_never_otherwise(put, dst, monkeypatch):
    calls, loader = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: calls.append(kwargs) or loader(*args, **kwargs))
    convert(put(changed()), dst)
    assert calls == [{"map_location": "cpu", "weights_only": True, "mmap": True}]
    source = inspect.getsource(checkpoint)
    assert re.findall(r"load\(.*weights_only.*", source) and "weights_only=False" not in source


@pytest.mark.parametrize(
    "error",
    [pickle.UnpicklingError("Weights only load failed"), RuntimeError("storage"), ValueError(), MemoryError()],
    ids=repr,
)
def test_what_torch_refuses_is_refused_for_good(error, put, dst, monkeypatch):
    calls = []

    def refuse(*_, **kwargs):
        calls.append(kwargs["weights_only"])
        raise error

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(WeightsError, match=r"x\.pth cannot be read: "):
        convert(put(changed()), dst)
    assert calls == [True] and not dst.exists()


@pytest.mark.parametrize(
    "other",
    [torch.ones(1, 2), torch.ones(2).int(), torch.ones(4)[::2], torch.ones(4)[2:], "text", torch.ones(2).to_sparse()],
)
def test_a_tensor_other_than_the_one_announced_is_refused(other, put, dst, monkeypatch):
    loader = torch.load
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: loader(*args, **kwargs) | {"fc_scl.bias": other})
    with pytest.raises(WeightsError, match=r"gives another tensor fc_scl\.bias than it claims"):
        convert(put(changed()), dst)


# --- Paths -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["nothing", "folder", "nul", "fifo", "no permission", "link to nothing"])
def test_a_source_that_cannot_be_read_is_told(what, tmp_path, dst, put, monkeypatch):
    path = tmp_path / ("a\0b.pth" if what == "nul" else "x.pth")
    if what == "folder":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "link to nothing":
        path.symlink_to(tmp_path / "gone")
    elif what == "no permission":  # root may read everything
        path.write_bytes(b"x")
        monkeypatch.setattr(Path, "open", failing(PermissionError(13, "Permission denied")))
    with pytest.raises(WeightsError, match=r"cannot be read: |is not a file") as caught:
        convert(path, dst)
    assert caught.value.remedy and not dst.exists()


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("files/x.pth", "a name that does not end in .safetensors; choose another name"),
        ("gone/x.safetensors", "in a folder that does not exist"),
        ("folder.safetensors", "which is a folder"),
        ("old.safetensors", r"which exists already \(overwrite=True replaces it\)"),
        ("link.safetensors", r"which exists already \(overwrite=True replaces it\)"),
    ],
)
def test_a_new_file_that_cannot_be_is_refused(name, match, put, tmp_path):
    path = put(changed())
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "old.safetensors").write_bytes(b"old")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nothing")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WeightsError, match=match):
        convert(path, tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "old.safetensors").read_bytes() == b"old"


def test_a_new_file_whose_name_cannot_be_is_refused(put, tmp_path):
    with pytest.raises(SourceError, match="cannot be written"):
        convert(put(changed()), tmp_path / "nul\0.safetensors")


@pytest.mark.parametrize("link", [False, True])
def test_a_checkpoint_is_never_replaced_by_its_conversion(link, put, tmp_path):
    path = put(changed(), "x.safetensors")
    before = path.read_bytes()
    if link:
        (tmp_path / "link.safetensors").hardlink_to(path)
    with pytest.raises(WeightsError, match="the same file; choose another name"):
        convert(path, tmp_path / "link.safetensors" if link else path, overwrite=True)
    assert path.read_bytes() == before


def test_an_old_file_is_replaced_on_request_only(put, dst):
    convert(put(changed(heads=False)), dst)
    convert(str(put(changed())), str(dst), overwrite=True)
    assert load(dst).entry.heads == GVSL_HEADS
    convert_refused = changed(fc_scl__bias=VALUES["nan"])
    with pytest.raises(WeightsError, match="NaN"):
        convert(put(convert_refused), dst, overwrite=True)
    assert load(dst).entry.heads == GVSL_HEADS


@pytest.mark.parametrize(("owner", "step"), [(os, "fsync"), (Path, "replace")], ids=["fsync", "rename"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=repr)
def test_an_interrupted_conversion_leaves_nothing_and_the_next_one_succeeds(owner, step, error, put, dst, monkeypatch):
    path = put(changed())
    before = sorted(dst.parent.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, failing(error))
        with pytest.raises((KeyboardInterrupt, SourceError), match=r"^$|cannot be written: No space left"):
            convert(path, dst)
    assert sorted(dst.parent.rglob("*")) == before
    convert(path, dst)
    assert same(load(dst, task="pretraining").state_dict(), changed())
