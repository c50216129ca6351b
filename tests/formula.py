"""Weights and images from a formula, and the numbers that the released code gave for them."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

DATA = Path(__file__).parent / "data"


def crc(tag):
    return zlib.crc32(tag.encode()) & 0xFFFFFFFF


def rnd(tag, shape):
    """Standard normal numbers that only the tag decides."""
    return torch.from_numpy(np.random.RandomState(crc(tag)).standard_normal(shape).astype(np.float32))


def weight(name, shape):
    values = rnd(name, tuple(shape))
    if len(shape) == 2 or len(shape) >= 4:  # linear, convolution
        return values * math.sqrt(2 / math.prod(shape[1:]))
    return 0.1 * values + (len(shape) == 1 and name.endswith("weight"))  # norms; everything else


def fill(module, prefix=""):
    """Give every tensor of the module its formula value; `prefix` is where it sits in the whole module."""
    module.load_state_dict({name: weight(prefix + name, t.shape) for name, t in module.state_dict().items()})
    return module


def image(tag, shape):
    """Smooth noise in [0, 1], (1, 1, *shape)."""
    pool = F.avg_pool3d if len(shape) == 3 else F.avg_pool2d
    return (0.5 + 1.5 * pool(rnd(tag, (1, 1, *shape)), 5, 1, 2, count_include_pad=False)).clamp(0, 1)


def recorded(file, prefix=""):
    """Recorded arrays of a file of `data` below `prefix`, by the rest of their name."""
    with np.load(DATA / file) as arrays:
        return {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}


def assert_as_recorded(tensor, golden, name, tag, tolerance=1e-4):
    """The tensor has the recorded mean, SD, minimum, maximum and 256 values, up to `tolerance` of its range."""
    flat = tensor.detach().double().flatten().numpy()
    if f"{name}/shape" in golden:
        assert list(tensor.shape) == list(golden[f"{name}/shape"])
    index = np.random.RandomState(crc(tag)).randint(0, flat.size, 256)
    stats = [flat.mean(), flat.std(), flat.min(), flat.max()]
    atol = tolerance * np.abs(golden[f"{name}/stats"]).max()
    np.testing.assert_allclose(flat[index], golden[f"{name}/values"], rtol=0, atol=atol)
    np.testing.assert_allclose(stats, golden[f"{name}/stats"], rtol=0, atol=atol)
