"""The leakage ledger: hashes of the scans that weights have seen, so that a test on one of them is noticed.

Hashes tell nothing about a scan to those who do not have it; those who have it can ask whether it was used. A copy is
known whatever file it lies in (see `scan_hash`); one that was resampled, cropped or clipped is not, and neither is
another scan of the same subject.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from .errors import ArgumentError, listed
from .film import read_scan
from .registry import Ledger
from .volume import InputWarning, Volume

SALT = b"gvsl-zoo ledger 1"
MOST_LISTED = 10_000  # scans in the ledger of an entry: 0.7 MB of its text
ROUNDING = 1e-5, 0.25  # of the range, at most in units: what a scaled 16-bit integer makes of a whole number


class LeakageWarning(UserWarning):
    """Scans to test or validate on that training has seen, or may have seen."""


def scan_hash(volume: Volume) -> str:
    """What tells a scan, and does not show it: sha256 of a salt, the shape and the voxels, 64 hexadecimal digits.

    Voxels are whole numbers where all are, up to the rounding of scaled integers, and float32 otherwise. No header is
    believed: the axes are ordered by their lengths and by the sums over their planes, and each is turned so that the
    smaller sums come first. So format, compression, byte order, voxel type, orientation (RAS, LPS, in any order) and
    header text make no difference; every other value of a voxel does.
    """
    voxels, kind = _codes(volume.data)
    axes = []
    for axis in range(voxels.ndim):
        others = tuple(other for other in range(voxels.ndim) if other != axis)
        sums = voxels.sum(others, dtype=np.int64).tolist()
        axes.append((len(sums), min(sums, sums[::-1]), axis, -1 if sums > sums[::-1] else 1))
    axes.sort()
    turned = voxels.transpose([axis for _, _, axis, _ in axes])[tuple(slice(None, None, turn) for *_, turn in axes)]
    digest = hashlib.sha256(SALT + f" {kind} {turned.shape} ".encode())
    for plane in turned:
        digest.update(np.ascontiguousarray(plane, "<i4").data)
    return digest.hexdigest()


def _codes(data: np.ndarray) -> tuple[np.ndarray, str]:
    """The voxels as integers that fit 32 bits, and whether these are their values or the bits of float32."""
    low, high = float(data.min()), float(data.max())
    whole = -(2**31) <= low <= high < 2**31
    if whole and data.dtype.kind in "iu":
        return data, "integers"
    if whole:
        rounded = np.rint(data)
        if np.abs(data - rounded).max() <= min(ROUNDING[0] * (high - low), ROUNDING[1]):
            return rounded.astype(np.int32), "integers"
    return (data.astype(np.float32) + 0).view(np.int32), "floats"  # + 0: there is no -0.0 then


def file_hash(path: Path) -> str:
    """`scan_hash` of a file or a DICOM folder, read once in a process as long as it does not change.

    Errors: VolumeError for a file that cannot be read.
    """
    path = path.resolve()
    stamp = path.stat() if path.exists() else None
    return _hash_at(path, stamp.st_mtime_ns if stamp else 0, stamp.st_size if stamp else 0)


@cache
def _hash_at(path: Path, changed_ns: int, size: int) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputWarning)
        return scan_hash(read_scan(path))


def ledger_of(paths: Iterable[Path], start: Ledger | None = None) -> Ledger:
    """The ledger of a training on these files, from weights with the ledger `start`."""
    start = start or Ledger(complete=True)
    return Ledger(start.complete, tuple(sorted({*start.scans, *map(file_hash, paths)})))


def joined(first: Ledger, second: Ledger) -> Ledger:
    """The ledger, for an entry, of what has seen all that two list; with more than MOST_LISTED it is not complete."""
    scans = sorted({*first.scans, *second.scans})
    return Ledger(first.complete and second.complete and len(scans) <= MOST_LISTED, tuple(scans[:MOST_LISTED]))


def seen(cases: Mapping[str, Sequence[Path]], ledger: Ledger) -> tuple[str, ...]:
    """The names of the cases of which a file is in the ledger.

    Args:
        cases: files by name.
    """
    known = set(ledger.scans)
    return tuple(name for name, paths in cases.items() if known & set(map(file_hash, paths))) if known else ()


def check_unseen(
    cases: Mapping[str, Sequence[Path]], ledgers: Mapping[str, Ledger], *, allow: bool = False
) -> dict[str, tuple[str, ...]]:
    """Refuse to test on what training has seen, images or labels; warn where it is not known what that was.

    Args:
        cases: files to test on, by the case's name.
        ledgers: by what was trained.
        allow: go on all the same.

    Returns: names of the cases that were seen, by what saw them; empty unless allowed.
    Errors: ArgumentError that names the files.
    """
    found = {who: names for who, ledger in ledgers.items() if (names := seen(cases, ledger))}
    if found and not allow:
        who, names = next(iter(found.items()))
        files = listed([str(path) for name in names for path in cases[name]])
        raise ArgumentError(
            f"{who} has seen {len(names)} of {len(cases)} test cases in training: {files}",
            "take them out of the test, or report the overlap with the numbers (--allow-overlap)",
        )
    if unsure := [who for who, ledger in ledgers.items() if not ledger.complete]:
        text = f"{listed(unsure)}: not all scans of the training are known, and those of the test may be among them"
        warnings.warn(text, LeakageWarning, stacklevel=2)
    return found
