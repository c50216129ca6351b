"""What all tests share: one thread (bit-identical sums, light machines), devices, the released model."""

from __future__ import annotations

import pytest
import torch
from formula import fill

from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.unet import UNet

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def released():
    """The whole module at released size with formula weights and the released code's geometry."""
    return fill(GVSL(UNet(device="meta"), convention="released", device="meta").to_empty(device="cpu")).eval()
