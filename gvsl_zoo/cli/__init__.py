"""The command line: one thin function a sub-command. Errors are one line; exit codes 0 done, 1 failed, 2 wrong call."""

from . import matching, scans, training, weights  # noqa: F401  each adds its commands to `main`
from .common import DEFAULT_MODEL, main

__all__ = ["DEFAULT_MODEL", "main"]
