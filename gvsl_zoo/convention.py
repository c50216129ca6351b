"""Which input a checkpoint was trained with: intensities, spacing and axes, ranked by what its restoration head undoes.

The head was trained to restore damaged images of one convention. A scan is prepared by every candidate convention and
damaged, and the gain is the PSNR of the restored copy over the damaged one: where the input is as in training, much of
the damage is undone; elsewhere the head paints the values that it knows over those that it got. The gain is relative to
the damage, so that a narrow range of intensities does not win by being narrow. What the gain does not tell is said:
many models restore mirrored anatomy as well as anatomy.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from .conversion import convert
from .errors import ArgumentError
from .film import FilmPreprocessing, read_for
from .inference.features import recipe_of, repeated
from .models.gemini import WholeModule
from .pretrain.augment import bend, damage
from .report import middle
from .sources import ANYWHERE, Access
from .volume import CT_WINDOW_HU, Preprocessing, Volume, prepare
from .zoo import load

Window = tuple[float | None, float | None]
HU_WINDOWS: dict[str, Window] = {
    "HU + 1024, by 2048": CT_WINDOW_HU,
    "HU not shifted, by 2048": (0.0, 2048.0),
    "HU + 2048, by 2048": (-2048.0, 0.0),
    "HU of lungs": (-1000.0, 400.0),
    "HU of soft tissue": (-160.0, 240.0),
    "HU up to 3071": (-1024.0, 3071.0),
}
OTHER_WINDOWS: dict[str, Window] = {"least to most": (None, None), "zero to most": (0.0, None)}
SPACINGS_MM = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
UNKNOWN_MM = 2.0  # for the intensities of a model that states no spacing
EDGE = 64  # voxels an axis that are damaged and restored
DAMAGES = 4
STRAIGHT = 0.1  # most that the intensity curve of a damage may depart from a straight line
HIGHEST_GAIN, SURE = 60.0, 2.0  # dB; standard errors between the best and another


@dataclass(frozen=True)
class Candidate:
    """One convention. gains: PSNR gained by restoration, dB, a damage each; declared: the model's entry says it."""

    choice: str
    gains: tuple[float, ...]
    declared: bool = False

    @property
    def gain(self) -> float:
        return sum(self.gains) / len(self.gains)

    def behind(self, best: Candidate) -> tuple[float, float]:
        """How much less it gains than the best, and the standard error of that, over the same damages; dB."""
        differences = [a - b for a, b in zip(best.gains, self.gains, strict=True)]
        mean = sum(differences) / len(differences)
        variance = sum((d - mean) ** 2 for d in differences) / (len(differences) - 1)
        return mean, math.sqrt(variance / len(differences))


@dataclass(frozen=True)
class Ranking:
    """Candidates for one question ("intensity", "spacing", "axes"), the best first."""

    question: str
    candidates: tuple[Candidate, ...]

    @property
    def alike(self) -> tuple[Candidate, ...]:
        """The best, and those that are not surely behind it: one is an answer, several are none."""
        best = self.candidates[0]
        ranked = [(candidate, *candidate.behind(best)) for candidate in self.candidates]
        return tuple(candidate for candidate, less, error in ranked if candidate is best or less <= SURE * error)


def infer_preprocessing(
    scan: str | os.PathLike[str] | Volume,
    model: nn.Module,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Ranking]:
    """Rank intensities, then spacings at the best intensities, then orders and directions of the axes at both.

    Args:
        scan: of the kind that the model was trained on: a good one, in HU where it is CT.
        model: the whole 3D module, with its restoration head.
        progress: called with (candidates done, candidates in all).

    Errors: ArgumentError for a model without the head, a 2D one, or a film; VolumeError for a scan that cannot be read.
    """
    if not isinstance(model, WholeModule):
        remedy = 'load the whole module: gvsl_zoo.load(name, task="pretraining")'
        raise ArgumentError(f"{type(model).__name__} has no restoration head", remedy)
    stated = recipe_of(model)
    if isinstance(stated, FilmPreprocessing):
        remedy = "what a film should be like, its entry and gvsl-zoo doctor --input FILM --model NAME tell"
        raise ArgumentError("a 2D model: only of 3D models can be found which input they were trained with", remedy)
    with warnings.catch_warnings():  # wrong conventions look wrong
        warnings.simplefilter("ignore")
        volume = read_for(scan, stated)
        hounsfield = float(volume.data.min()) < -200
        windows = dict(HU_WINDOWS) if hounsfield else dict(OTHER_WINDOWS)
        declared = stated.window or (None, None)
        if (stated.unit == "HU") == hounsfield and declared not in windows.values():
            windows["as the entry says"] = declared
        spacings = sorted({*SPACINGS_MM, *([max(stated.spacing_mm)] if stated.spacing_mm else [])})
        total, done = len(windows) + len(spacings) + 48, itertools.count(1)
        base = Preprocessing(stated.spacing_mm or (UNKNOWN_MM,) * 3, unit="HU" if hounsfield else "arbitrary")

        def gains(recipe: Preprocessing, axes: Callable[[Tensor], Tensor] = lambda image: image) -> tuple[float, ...]:
            found = _gains(model, axes(prepare(volume, recipe).image))
            if progress:
                progress(next(done), total)
            return found

        intensity = _ranked(
            "intensity",
            [
                Candidate(_said(what, window), gains(replace(base, window=window)), window == declared)
                for what, window in windows.items()
            ],
        )
        best = next(w for what, w in windows.items() if _said(what, w) == intensity.candidates[0].choice)
        base = replace(base, window=best)
        spacing = _ranked(
            "spacing",
            [
                Candidate(f"{mm:g} mm", gains(replace(base, spacing_mm=(mm,) * 3)), stated.spacing_mm == (mm,) * 3)
                for mm in spacings
            ],
        )
        prepared = prepare(volume, base).image  # at the declared spacing: the gain seldom tells it for sure
        rows = []
        for name, turn in _orders():
            rows.append(Candidate(name, _gains(model, turn(prepared)), name == "+z +y +x"))
            if progress:
                progress(next(done), total)
    return [intensity, spacing, _ranked("axes", rows)]


def whole_module(name: str | os.PathLike[str], access: Access = ANYWHERE) -> nn.Module:
    """The module with all heads of a name, a path, or a checkpoint of the released code (.pth)."""
    if Path(name).suffix not in (".pth", ".pt", ".tar"):
        settings: dict[str, Any] = {"cache_dir": access.cache_dir, "token": access.token}
        return load(name, task="pretraining", **settings)
    with TemporaryDirectory() as folder:
        converted = Path(folder) / "model.safetensors"
        convert(name, converted)
        return load(converted, task="pretraining")


def _said(what: str, window: Window) -> str:
    low, high = ("own" if end is None else f"{end:g}" for end in window)
    return f"{what} ({low} to {high})"


def _ranked(question: str, candidates: Sequence[Candidate]) -> Ranking:
    return Ranking(question, tuple(sorted(candidates, key=lambda one: -one.gain)))


def _orders() -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
    """The 48 orders and directions of the axes: which of +-z, +-y, +-x of RAS+ the tensor's axes run along."""
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            name = " ".join(f"{'+' if sign > 0 else '-'}{'zyx'[axis]}" for axis, sign in zip(order, signs, strict=True))
            permuted = (0, 1, *(2 + axis for axis in order))
            flipped = [2 + place for place, sign in enumerate(signs) if sign < 0]
            yield name, lambda image, p=permuted, f=flipped: image.permute(p).flip(f)  # type: ignore[misc]


@torch.inference_mode()
def _gains(model: WholeModule, image: Tensor) -> tuple[float, ...]:
    """PSNR of the restored over the damaged middle of an image (1, 1, D, H, W), dB, for each damage."""
    for axis, centre in enumerate(middle(image[0, 0]), 2):
        size = min(EDGE, image.shape[axis])
        image = image.narrow(axis, min(max(0, centre - size // 2), image.shape[axis] - size), size)
    device, gains = next(model.parameters()).device, []
    for seed in _seeds():
        damaged = damage(image, torch.Generator().manual_seed(seed))
        restored = model.restore(repeated(damaged, model).to(device)).float().cpu()
        before, after = ((other - image).square().mean().item() for other in (damaged, restored))
        gain = 10 * math.log10(max(before, 1e-12) / max(after, 1e-12))
        gains.append(min(max(gain, -HIGHEST_GAIN), HIGHEST_GAIN))
    return tuple(gains)


@lru_cache
def _seeds() -> tuple[int, ...]:
    """Seeds of damages that bend intensities little: a curve that falls would hide which ones were given."""
    ramp, found = torch.linspace(0, 1, EDGE).view(1, 1, -1, 1, 1), []
    for seed in itertools.count():
        bent = ramp.clone()
        bend(bent, torch.Generator().manual_seed(seed))  # the first that `damage` draws
        if (bent - ramp).abs().max() < STRAIGHT:
            found.append(seed)
        if len(found) == DAMAGES:
            break
    return tuple(found)
