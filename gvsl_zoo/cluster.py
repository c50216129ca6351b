"""Many machines: the connection to a dask scheduler."""

from __future__ import annotations

from typing import Any

from .errors import VolumeError, needs


def connect(address: str) -> Any:
    """A `distributed.Client` of the scheduler at an address such as tcp://10.0.0.1:8786; a context manager.

    Errors: GvslZooError where dask is not installed, VolumeError when no scheduler answers within 30 seconds.
    """
    needs("cluster", "a cluster", "distributed")
    from distributed import Client

    try:
        return Client(address, timeout=30)
    except (OSError, ValueError) as error:
        raise VolumeError(f"no cluster at {address!r}: {error}", "start 'dask scheduler' and 'dask worker'") from None
