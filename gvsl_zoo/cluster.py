"""Many machines: the connection to a dask scheduler."""

from __future__ import annotations

from typing import Any

from .errors import ArgumentError, VolumeError


def connect(address: str) -> Any:
    """A `distributed.Client` of the scheduler at an address such as tcp://10.0.0.1:8786; a context manager.

    Errors: ArgumentError where dask is not installed; VolumeError when no scheduler answers within 30 seconds.
    """
    try:
        from distributed import Client
    except ImportError:
        raise ArgumentError("a cluster needs dask", "pip install 'gvsl-zoo[cluster]'") from None
    try:
        return Client(address, timeout=30)
    except (OSError, ValueError) as error:
        raise VolumeError(f"no cluster at {address!r}: {error}", "start 'dask scheduler' and 'dask worker'") from None
