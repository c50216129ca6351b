"""What all tests share: one thread (bit-identical sums, light machines), no network, devices, the released model."""

from __future__ import annotations

import signal
import socket

import pytest
import torch
from formula import fill
from hub_server import keep_local

from gvsl_zoo import drive
from gvsl_zoo.models.gvsl import GVSL
from gvsl_zoo.models.unet import UNet

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background jobs; tests send it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


NOBODY = "http://127.0.0.1:9"  # the port of the discard service, on which nothing listens
LOOPBACK = ("127.0.0.1", "::1", "localhost", b"127.0.0.1")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Sources answer on loopback, where a test lets them, and no name is ever looked up elsewhere."""
    look_up = socket.getaddrinfo

    def on_loopback(host, *args, **kwargs):
        if host in LOOPBACK:
            return look_up(host, *args, **kwargs)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known (tests stay on loopback)")

    monkeypatch.setattr(socket, "getaddrinfo", on_loopback)
    keep_local(monkeypatch, xet=True)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")  # for processes that a test starts
    monkeypatch.setenv("HF_ENDPOINT", NOBODY)
    monkeypatch.setattr(drive, "ORIGIN", NOBODY)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def released():
    """The whole module at released size with formula weights and the released code's geometry."""
    return fill(GVSL(UNet(device="meta"), convention="released", device="meta").to_empty(device="cpu")).eval()
