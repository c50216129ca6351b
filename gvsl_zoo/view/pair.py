"""What the page shows of two scans: themselves and their overlays as files, and the match of a point."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import ArgumentError
from ..inference.correspond import Matcher
from ..report import display_range
from ..transforms import Affine, Grid, warp_volume
from ..volume import Volume, write_volume

CELLS = 8  # of the checkerboard along the longest axis
HEAT_VOXELS = 96  # along the longest axis: finer than the eye asks of a heat map, and soon sent
HEAT_QUANTILE = 0.98  # of the similarities: what is less alike is not coloured


class Pair:
    """Two scans and their matcher.

    Args:
        fixed, moving: scans of one channel.
        matcher: of these two.
        folder: where the files that the page reads are written; the caller removes it.
        warped: the moving scan on the fixed one's grid, if there is one.
        names: of "fixed", "moving" and "model", as the page calls them.
    """

    def __init__(
        self,
        fixed: Volume,
        moving: Volume,
        matcher: Matcher,
        folder: Path,
        *,
        warped: Volume | None = None,
        names: Mapping[str, str],
    ) -> None:
        self.scans = {"fixed": fixed, "moving": moving}
        self.warped, self.matcher, self.names, self.folder = warped, matcher, dict(names), folder
        self.ranges = {name: _range(scan) for name, scan in self.scans.items()}
        overlaid = ["moving", "warped"] if warped else ["moving"]
        self.files = ["fixed.nii", "moving.nii"] + [f"{n}-{s}.nii" for n in overlaid for s in ("blend", "checkerboard")]
        self._lock = threading.Lock()

    def facts(self) -> dict[str, Any]:
        """What the page says of the scans, for JSON."""
        described = {
            name: {
                "name": self.names[name],
                "description": f"{' × '.join(map(str, scan.shape))} voxels of {_text(scan.spacing_mm)} mm",
                "range": self.ranges[name],
            }
            for name, scan in self.scans.items()
        }
        return {"model": self.names["model"], "warped": self.warped is not None, **described}

    def file(self, name: str) -> Path:
        """One of `files`, written when it is first asked for."""
        path = self.folder / name
        with self._lock:
            if not path.exists():
                write_volume(self._volume(name.removesuffix(".nii")), path)
        return path

    def match(
        self, scan: str, point_mm: list[float], awaited: Callable[[], bool] = lambda: True
    ) -> dict[str, Any] | None:
        """The match of a point of "fixed" or "moving" in the other, with its heat map, for JSON.

        Without a match the point is None. A question that is no longer `awaited` when its turn comes is not answered.
        Errors: ArgumentError for a point outside its scan.
        """
        back = scan == "moving"
        point = np.array(point_mm, np.float64)
        with self._lock:  # one search at a time: each takes all threads
            if not awaited():
                return None
            found = self.matcher.match(point[None], back=back)
            heat = self.matcher.heat(point, back=back, grid="model")
        step = -(-max(heat.shape) // HEAT_VOXELS)
        values = heat.data[::step, ::step, ::step]
        low, high = np.quantile(values, HEAT_QUANTILE), values.max()
        affine = heat.affine @ np.diag([step, step, step, 1.0])
        path = self.folder / "heat.nii"
        scaled = (254 * ((values - low) / max(high - low, 1e-6)).clip(0, 1)).round().astype(np.uint8)
        with self._lock:
            write_volume(Volume(scaled, affine), path, overwrite=True)
            content = path.read_bytes()
        seen = bool(np.isfinite(found.points_mm).all())
        return {
            "point_mm": found.points_mm[0].tolist() if seen else None,
            "confidence": float(found.confidence[0]),
            "similarity": float(found.similarity[0]) if seen else None,
            "return_mm": float(found.return_mm[0]) if seen else None,
            "heat": base64.b64encode(content).decode(),
        }

    def _volume(self, name: str) -> Volume:
        if name in self.scans:
            scan = self.scans[name]
            return Volume(scan.data, scan.affine)  # without its header, of which NiiVue may take another form
        which, style = name.split("-")
        fixed = self.scans["fixed"]
        laid = self.warped if which == "warped" and self.warped else self._as_headers_say()
        grey = _grey(laid.data, self.ranges["moving"])
        if style == "checkerboard":
            cell_mm = max(n * s for n, s in zip(fixed.shape, fixed.spacing_mm, strict=True)) / CELLS
            cells = [np.arange(n) * s // cell_mm for n, s in zip(fixed.shape, fixed.spacing_mm, strict=True)]
            odd = sum(np.ix_(*cells)) % 2 > 0
            grey = np.where(odd, grey, _grey(fixed.data, self.ranges["fixed"]))
        return Volume(grey, fixed.affine)

    def _as_headers_say(self) -> Volume:
        try:
            return warp_volume(self.scans["moving"], Affine(np.eye(4)), Grid.of(self.scans["fixed"]))
        except ArgumentError:
            cause = "as their headers place them, the scans do not overlap"
            raise ArgumentError(cause, "lay the warped one over: gvsl-zoo view --register") from None


def _range(scan: Volume) -> tuple[float, float]:
    step = -(-max(scan.shape) // 128)
    return display_range(torch.from_numpy(scan.data[::step, ::step, ::step].astype(np.float32)))


def _grey(data: np.ndarray, limits: tuple[float, float]) -> np.ndarray:
    """Values within the limits as 0 to 255."""
    low, high = limits
    return (255 * ((data.astype(np.float32) - low) / (high - low)).clip(0, 1)).round().astype(np.uint8)


def _text(numbers: tuple[float, ...]) -> str:
    return " × ".join(f"{number:.3g}" for number in numbers)
