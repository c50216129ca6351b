"""Errors: each says what was given, what was expected and how to fix it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

MAX_LISTED = 5  # names that an error lists


def listed(names: Sequence[str], separator: str = ", ") -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return separator.join(names[:MAX_LISTED]) + more


def short(key: object, length: int = 80) -> str:
    """What a file says, fit for any terminal."""
    return ascii(key if isinstance(key, str) else str(key))[1:-1][:length]


class GvslZooError(Exception):
    """Base of every error that the package raises on purpose.

    Args:
        cause: what was given and why it cannot be used.
        remedy: what to do about it.
    """

    def __init__(self, cause: str, remedy: str = "") -> None:
        super().__init__(f"{cause}; {remedy}" if remedy else cause)
        self.cause = cause
        self.remedy = remedy


def needs(extra: str, what: str, *modules: str) -> None:
    """Refuse what cannot be done without the modules of an optional extra, where one of them is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise GvslZooError(f"{what} needs {' and '.join(missing)}", f'pip install "gvsl-zoo[{extra}]"')


class ArgumentError(GvslZooError, ValueError):
    """A call whose arguments do not fit together."""


class RegistryError(GvslZooError):
    """A registry file or a model name that cannot be used."""


class SourceError(GvslZooError):
    """Bytes that could not be had from where they should come from."""


class WeightsError(GvslZooError):
    """A weights file that is damaged, dangerous, or not the one that was asked for."""


class TrainingError(GvslZooError):
    """A training run that cannot start, go on or be saved."""


class VolumeError(GvslZooError):
    """An image file that cannot be read, trusted or written."""
